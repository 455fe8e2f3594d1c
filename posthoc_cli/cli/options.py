"""The command line's gate: options that several commands share, and what turns their texts into
values."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial, wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_type_hints

from typer import Argument, Option

from posthoc_cli import errors, files, resources, targets
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning import check_sigma_range
from posthoc_cli.request import Help, OutputRequest, SweepRequest
from posthoc_cli.targets import Beta, SigmaRel, Target, bad, parse_numbers

if TYPE_CHECKING:
    from posthoc_cli.run import Run

_T = TypeVar("_T")
TARGETS = partial(Option, rich_help_panel="Targets")
OUTPUT = partial(Option, rich_help_panel="Output")
RUN = partial(Option, rich_help_panel="Which run")
HOW = partial(Option, rich_help_panel="How")
SCHEDULE = partial(Option, rich_help_panel="Before a training")
RARE = partial(Option, rich_help_panel="Rarely needed")
"""Options by the panel of the help in which they appear; the panel that most users need comes
first."""

Method = Literal["minvar", "paper"]
Layout = Literal["safetensors", "sharded", "pt"]
Dtype = Literal["keep", "float32", "float16", "bfloat16", "float64", "fp32", "fp16", "bf16", "fp64"]


SIGMA_REL = TARGETS(
    [],
    metavar="LENGTHS",
    help=(
        "Lengths: a number, a list 0.05,0.10, a range 0.05:0.25:0.05 or 0.05,0.06,...,0.25. "
        "Repeatable."
    ),
)
DECAY = TARGETS(
    [],
    metavar="DECAYS",
    help="Ordinary EMAs, by their decay: 0.9999; also lists or ranges. Repeatable.",
)
TARGET = TARGETS(
    [],
    metavar="KIND:VALUE",
    help=f"Other averages: {targets.EXAMPLES}; also lists or ranges. Repeatable.",
)
_FLAGS = {"overwrite": ("--overwrite", "-f"), "evaluate": ("--eval",)}


def make_option(field: Field[Any]) -> Any:
    """Make the option for a field of a request."""
    help: Help = field.metadata["help"]
    return Option(
        ... if field.default is MISSING else field.default,
        *_name_option(field),
        metavar=help.metavar or None,
        show_default=help.default or True,
        help=help.text,
        rich_help_panel=help.panel,
    )


def _name_option(field: Field[Any]) -> tuple[str, ...]:
    return _FLAGS.get(field.name, (f"--{field.name.replace('_', '-')}",))


_FIELDS = {field.name: field for field in fields(OutputRequest)}
METHOD = make_option(_FIELDS["method"])
LAYOUT = make_option(_FIELDS["layout"])
DTYPE = make_option(_FIELDS["dtype"])
LIKE_MODEL = make_option(_FIELDS["like"])
TIME = make_option(_FIELDS["t"])
MAX_SHARD_SIZE = make_option(_FIELDS["max_shard_size"])
OVERWRITE = make_option(_FIELDS["overwrite"])
STEP_FROM = RARE(
    None,
    metavar="PATTERN",
    show_default="content or name",
    help=r"A pattern of the steps in names: 'step(\d+)'.",
)
STEPS_PER_EPOCH = RUN(
    None, metavar="COUNT", help="Steps per epoch, for files whose numbers are epochs."
)
FIRST_EPOCH = RARE(
    None,
    metavar="NUMBER",
    show_default="by the numbers",
    help="The number of the first epoch: 0 or 1.",
)
SIGMA_RANGE = TARGETS(
    "0.05:0.28", metavar="LOW:HIGH", help="The range of sigma_rel that you will want."
)
DIRECTORY = Argument(..., metavar="DIR", help="The directory of the tracker's snapshots.")
DIRECTORY_OR_CHECKPOINTS = Argument(
    ..., metavar="DIR", help="The directory of the tracker's snapshots, or of checkpoints."
)
PICTURE = OUTPUT(None, "--out", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf.")
JSON = OUTPUT(False, "--json", help="Print one JSON object.")


# --- values


def parse_count(text: str, option: str) -> int:
    """Parse a whole number, such as 1.2e9, 1.2B, 350M or 350,000,000."""
    value = resources.parse_amount(text, resources.COUNTS)
    if value is None or value > resources.MOST or value != value.to_integral_value():
        limit = ", at most 9e18" if value is not None and value > resources.MOST else ""
        raise bad(option, text, f"must be a whole number{limit}, such as 20, 1e5 or 100K")
    return int(value)


def parse_number(text: str, option: str) -> float:
    """Parse a number: 50000, 5e4 or 50K; also a part of a whole, 0.05 or 5%. The library checks its
    limits."""
    number = text.strip()
    value = resources.parse_amount(number.removesuffix("%"), resources.COUNTS)
    if value is None:
        raise bad(option, text, "must be a number, such as 0.05, 5% or 50K")
    return float(value) / (100 if number.endswith("%") else 1)


def parse_sigma_range(text: str) -> tuple[float, float]:
    """Parse `--sigma-range`, LOW:HIGH."""
    form = "LOW:HIGH in (0, 0.2887), such as 0.05:0.28"
    try:
        return check_sigma_range(parse_numbers(text.replace(":", ","), "--sigma-range", form))
    except InvalidValueError as error:
        raise bad("--sigma-range", text, error.reason) from error


def parse_targets(
    sigma_rels: Sequence[str],
    decays: Sequence[str],
    others: Sequence[str],
) -> list[Target]:
    """Parse the targets of each --sigma-rel, --decay and --target, in this order, without
    duplicates."""
    parsed = list[Target]()
    for text in sigma_rels:
        parsed += targets.parse_values(text, "--sigma-rel", SigmaRel, targets.SIGMA_FORMS)
    for text in decays:
        parsed += targets.parse_values(text, "--decay", Beta)
    for text in others:
        parsed += targets.parse_targets(text, "--target")
    return list(dict.fromkeys(parsed))


def with_request(
    kind: type[OutputRequest | SweepRequest],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a request in place of its argument `request`: their values by
    name, parsed.

    Layout and size of shards follow from the output's name, and `ema export` changes them.
    """
    asked = []
    for field in fields(kind):
        if "help" in field.metadata and field.name not in ("layout", "max_shard_size"):
            asked.append(field)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def call(**values: Any) -> None:
            request = {field.name: _parse(field, values.pop(field.name)) for field in asked}
            command(**values, request=request)

        own = signature(command)
        types = get_type_hints(command)
        parameters = []
        for parameter in own.parameters.values():
            if parameter.name != "request":
                parameters.append(parameter)
                continue
            for field in asked:
                types[field.name] = _find_type(field)
                option = make_option(field)
                parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=option))
        vars(call)["__signature__"] = own.replace(parameters=parameters)
        call.__annotations__ = types
        return call

    return decorate


def _find_type(field: Field[Any]) -> Any:
    """Find the type of a field's option for the parser of the command line."""
    if "bool" in _list_types(field):
        return bool
    known = {
        "method": Method | None,
        "dtype": Dtype | None,
        "include": list[str],
        "exclude": list[str],
    }
    return known.get(field.name, str | None)


def optional(
    parse: Callable[..., _T],
    text: str | None,
    *arguments: str,
) -> _T | None:
    """Parse the text of an option; None without the option."""
    return None if text is None else parse(text, *arguments)


def optional_count(text: str | None, option: str) -> int | None:
    """Parse a whole number; None without the option."""
    return optional(parse_count, text, option)


# --- paths


def check_exists(
    given: str | Path,
    directory: bool = False,
    name: str = "DIR",
) -> Path:
    """Find an existing input, with ~ expanded; an error without one, or if it should be a
    `directory` and is not one."""
    path = files.check_path(name, given)
    try:
        mode = path.stat().st_mode
        reason = "is not a directory" if directory and not stat.S_ISDIR(mode) else ""
    except (FileNotFoundError, NotADirectoryError):
        reason = "no such directory" if directory else "no such file or directory"
    if reason:
        hint = "name a directory of snapshots or checkpoints" if directory else ""
        raise InvalidValueError(path, reason, hint)
    if stat.S_ISREG(mode) and not files.is_url(path):
        _check_content(path)
    return path


def _check_content(path: Path) -> None:
    """Raise an InvalidValueError for an empty file, and for a text file other than the index of
    shards."""
    from posthoc_cli.snapshots.opened_file import OpenedFile

    with OpenedFile(path) as file:
        beginning = file.read_at(min(256, file.size), 0)
    if not beginning:
        raise InvalidValueError(path, "is an empty file")
    text = beginning.decode(errors="replace")
    is_text = all(c.isprintable() or c.isspace() for c in text)
    if is_text and not path.name.endswith(".index.json"):
        reason = f"is a text file, not a file of tensors: {errors.quote(text[:40])}"
        raise InvalidValueError(path, reason)


def _list_types(field: Field[Any]) -> list[str]:
    return str(field.type).split(" | ")


def _parse(field: Field[Any], value: Any) -> Any:
    """Turn the text of an option for a field of a request into a value of the field's type."""
    if not isinstance(value, str):
        return value
    option = _name_option(field)[0]
    types = _list_types(field)
    if "int" in types:
        return parse_count(value, option)
    if "float" in types:
        return parse_number(value, option)
    return check_exists(value, name=option) if "Path" in types else value


def new_picture(out: str | None, overwrite: bool) -> Path | None:
    """Check that the picture of `--out` may be written, and return its path."""
    from posthoc_cli import plots

    if out is not None:
        return files.new_file(out, plots.PICTURES, overwrite)
    if overwrite:
        raise InvalidValueError("overwrite", f"needs {errors.argument('out')}, which it replaces")
    return None


def open_path(given: str, directory: bool = False) -> Run:
    """Open DIR, a glob or, unless `directory`, a file, whatever it holds."""
    from posthoc_cli.run import Run

    path = files.check_path("DIR", given)
    return Run(path if files.is_glob(path) else check_exists(path, directory))


def open_run(given: str, directory: bool = True) -> Run:
    """Open the run of DIR, which may be a file unless `directory`."""
    from posthoc_cli.checkpoints.places import holds_checkpoints

    run = open_path(given, directory)
    path = run.directory
    if files.is_glob(path) or not path.is_dir() or holds_snapshots(path):
        return run
    if directory and (path / "sweep.json").is_file():
        raise InvalidValueError(path, "is the folder of a sweep", "name the directory of the run")
    if _find_run_in(path) is not None and not holds_checkpoints(path):
        check_not_above_run(path)
    return run


def check_not_above_run(path: Path) -> None:
    """Raise an InvalidValueError if a folder in this one holds snapshots."""
    folder = _find_run_in(path)
    if folder is not None:
        raise InvalidValueError(path, "holds no snapshots itself", f"did you mean {folder}?")


def _find_run_in(path: Path) -> Path | None:
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and holds_snapshots(folder):
            return folder
    return None


def holds_snapshots(folder: Path) -> bool:
    """Return whether a folder has files with names of snapshots."""
    from posthoc_cli.snapshots.directory import is_snapshot_name

    return any(map(is_snapshot_name, folder.iterdir()))
