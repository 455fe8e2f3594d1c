"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import functools
import inspect
import math
import stat
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from typer import Argument, Option

from posthoc_cli import files
from posthoc_cli.checkpoints import KINDS
from posthoc_cli.errors import InvalidValueError, OutputExistsError
from posthoc_cli.profiles import SHAPES, check_sigma_rel
from posthoc_cli.targets import SHORTEST_BETA, Beta, Between, Decay, Mean, ProfileFile, SigmaRel, Target, Window

if TYPE_CHECKING:
    from posthoc_cli.checkpoints.opening import Origin
    from posthoc_cli.run import Run

_T = TypeVar("_T")
PANEL_RUN, PANEL_TARGETS, PANEL_HOW, PANEL_OUTPUT = "Which run", "Targets", "How", "Output"
"""Parts of a command's help."""


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Completion in a shell: those of `words` that begin with what was typed."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


PICTURES = (".png", ".svg", ".pdf")
STORED_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Short words for the dtypes of planned snapshots."""
STORED = one_of(*STORED_DTYPES.values())

BETA = Option(
    None,
    help="Classical EMA: x <- beta x + (1 - beta) theta at every step (call of update_), starting from the weights of "
    "the first update. A number, list or range: 0.999,0.9999.",
)
WINDOW = Option(None, help="The mean of the last steps, each with weight 1 / window: a number, list or range.")
BETWEEN = Option(
    None, metavar="START:END", help="The mean over a span of training time, such as 50000:80000, or a list of them."
)
PROFILE = Option(
    None,
    metavar="FILE",
    help="Any profile: a CSV file of time,density, linear between its points, 0 outside them, scaled to mass 1. May be "
    "given several times.",
)
DECAY = Option(
    None,
    metavar="1-sqrt|linear|cosine|FILE",
    autocompletion=one_of("1-sqrt", "linear", "cosine"),
    help="The weights after a decay of the learning rate that was not run: the updates of its last part (--over) times "
    "a multiplier that falls from 1 to 0, or a CSV file of x,multiplier with x from 0 to 1.",
)
OVER = Option(
    None,
    metavar="PART|START:END",
    help="The part of training that --decay falls over: 20%, or 50000:80000. [default: 20%]",
)
LR = Option(
    None, metavar="FILE", help="For --decay: the run's own learning rate, a CSV file of time,rate, if it fell, too."
)
METHOD = Option(
    None,
    autocompletion=one_of("minvar", "paper"),
    metavar="minvar|paper",
    help="The solver: minvar, the least expected error of the weights, or paper, the nearest profile, as published. "
    "[default: minvar]",
)
LAYOUT = Option(
    None,
    "--format",
    autocompletion=one_of("safetensors", "sharded", "pt", "dcp"),
    help="safetensors, sharded (a folder), pt, or dcp (a folder of torch.distributed.checkpoint). [default: from the "
    "output's name]",
    rich_help_panel=PANEL_OUTPUT,
)
DTYPE = Option(
    "keep",
    autocompletion=one_of("keep", "float32", "float16", "bfloat16", "float64"),
    help="float32, float16, bfloat16, float64 (or fp32, ...), or keep: each tensor's own.",
    rich_help_panel=PANEL_OUTPUT,
)
COMPONENT = Option(
    None, metavar="NAME", help="The part of a pipeline with the weights: unet.", rich_help_panel=PANEL_OUTPUT
)
STEP = Option(None, metavar="COUNT", help="The same in steps (calls of update_): 50000, 5e4, 50K.")
MAX_SHARD_SIZE = Option(None, help="Of a sharded output. [default: 5GB]")
LIKE = Option(
    None,
    metavar="DIR",
    help="Snapshots or checkpoints of an earlier run that the network will move like. [default: evenly]",
)
SIGMA_RANGE = Option("0.05:0.28", help="The averages that you will want: LOW:HIGH.")
DIRECTORY = Argument(..., metavar="DIR", help="The directory that the tracker wrote.")
DIRECTORY_OR_CHECKPOINTS = Argument(
    None,
    metavar="DIR",
    help="The directory that the tracker wrote, or of checkpoints.",
    show_default=False,
    rich_help_panel=PANEL_RUN,
)
PICTURE = Option(None, "--out", "-o", help="The picture: .png, .svg or .pdf.")
FORCE = Option(False, "--force", help="Replace existing outputs.")
QUIET = Option(False, "--quiet", "-q", help="Print nothing but errors and warnings.", rich_help_panel=PANEL_OUTPUT)
JSON = Option(False, "--json", help="Print one JSON object.", rich_help_panel=PANEL_OUTPUT)
YES = Option(False, "--yes", "-y", help="Do not ask.")
CHECKPOINTS = Option(
    None,
    metavar="DIR|GLOB",
    help="Checkpoints of the training, such as 'out/step*.safetensors': in place of DIR, or beside its snapshots.",
    rich_help_panel=PANEL_RUN,
)
_ORIGIN: dict[str, tuple[Any, Any]] = {
    "kind": (
        str | None,
        Option(
            None,
            "--from",
            metavar="KIND",
            autocompletion=one_of(*KINDS),
            help=f"What DIR holds: {', '.join(KINDS)}. [default: found by names and contents]",
        ),
    ),
    "step_from": (
        str | None,
        Option(
            None,
            metavar="PATTERN",
            help=r"Of checkpoints: a regular expression of their steps: 'step(\d+)'. [default: content or name]",
        ),
    ),
    "prefix": (str, Option("", help="Of checkpoints: take tensors whose names begin so, such as model., without it.")),
    "include": (list[str], Option([], metavar="GLOB", help="Of checkpoints: take tensors of these names only.")),
    "exclude": (list[str], Option([], metavar="GLOB", help="Of checkpoints: leave tensors of these names out.")),
    "sigma_rels": (
        str | None,
        Option(None, help="Of averages of other libraries: their widths, in the order of their numbers: 0.05,0.28."),
    ),
    "update_every": (int | None, Option(None, help="Of averages of other libraries: calls between updates.")),
    "update_after_step": (
        int | None,
        Option(None, help="Of averages of other libraries: calls before the first update. [default: theirs]"),
    ),
}
"""Options that say what checkpoints do not: type and default of each."""


def with_origin(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options about checkpoints, which it gets as `origin`; one that it has itself stays its."""
    own = dict(inspect.signature(command).parameters)
    types = get_type_hints(command, localns={"Origin": object})
    del own["origin"], types["origin"]
    added = {name: option for name, option in _ORIGIN.items() if name not in own}

    @functools.wraps(command)
    def run(**given: Any) -> None:
        from posthoc_cli.checkpoints.opening import Origin

        fields = {name: given.pop(name) for name in added}
        widths = fields.pop("sigma_rels", None)
        for name, least in (("update_every", 1), ("update_after_step", 0)):
            if fields[name] is not None and fields[name] < least:
                raise bad(f"--{name.replace('_', '-')}", str(fields[name]), f"must be a whole number, at least {least}")
        known = {name: value for name, value in fields.items() if value not in (None, [], "")}
        tracked = () if widths is None else parse_sigma_rels(widths, "--sigma-rels")
        command(**given, origin=Origin(**known, sigma_rels=tuple(tracked)))

    kind = inspect.Parameter.KEYWORD_ONLY
    new = [inspect.Parameter(name, kind, default=default, annotation=hint) for name, (hint, default) in added.items()]
    *first, last = own.values()
    both = [parameter.replace(kind=kind) for parameter in (*first, *new, last)]
    run.__signature__ = inspect.Signature(both)  # type: ignore[attr-defined]
    run.__annotations__ = types | {name: hint for name, (hint, _) in added.items()}
    return run


def bad(option: str, text: str, reason: str) -> InvalidValueError:
    """The error of an option whose value, as typed, is not accepted."""
    return InvalidValueError(option, reason, value=text.strip() or "(empty)")


_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MOST_DIGITS = 1_000
"""Before and after the point: far more than a float has, and few enough to calculate with."""
MOST_VALUES = 10_000
_FORMS = {
    "--window": "a whole number of steps, a list such as 500,1000 or a range such as 500:2000:500",
    "--beta": "a number, a list such as 0.999,0.9999 or a range such as 0.99:0.999:0.003",
}
_SIGMA_FORMS = "a number, a list such as 0.05,0.10 or a range such as 0.05:0.25:0.05"


def parse_count(text: str, option: str, example: str = "100000, 1e5 or 100K") -> int:
    """A whole number from 1.2e9, 1.2B, 350M or 350,000,000."""
    value = files.parse_amount(text, _COUNTS)
    if value is None or value != value.to_integral_value():
        raise bad(option, text, f"must be a whole number, at least 1, such as {example}")
    if value > files.MOST:
        raise bad(option, text, f"must be at most {files.MOST:,}")
    return int(value)


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text.strip())
    except InvalidOperation:
        return Decimal("nan")


def _fraction(text: str) -> Decimal:
    """0.01, or 1% for the same."""
    return _decimal(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)


def parse_numbers(text: str, option: str) -> list[float]:
    """Numbers from `0.05,0.10`, `0.05:0.25:0.05` or `0.05,0.06,...,0.25`, in the order given, each once.

    Steps are exact decimals, so that `0.05:0.25:0.05` ends at 0.25 and holds 0.15, not 0.15000000000000002.
    """
    items = [item.strip() for item in text.split(",")]
    numbers: list[Decimal] = []
    for index, item in enumerate(items):
        if item == "...":
            if not 2 <= index < len(items) - 1:
                raise bad(option, text, "'...' needs two numbers before it and one after")
            last, step = numbers[-1], numbers[-1] - numbers[-2]
            numbers += _steps(last + step, _number(items[index + 1], option), step, text, option)
        elif ":" in item:
            ends = item.split(":")
            if len(ends) != 3:
                raise bad(option, item, "a range is START:STOP:STEP, such as 0.05:0.25:0.05")
            start, stop, step = (_number(end, option) for end in ends)
            numbers += _steps(start, stop, step, item, option)
        else:
            numbers.append(_number(item, option))
    return list(dict.fromkeys(map(float, numbers)))


def _number(text: str, option: str) -> Decimal:
    number = _decimal(text)
    if not number.is_finite() or abs(number.adjusted()) > _MOST_DIGITS or math.isinf(float(number)):
        raise bad(option, text, f"must be {_FORMS.get(option, _SIGMA_FORMS)}")
    return number


def _steps(start: Decimal, stop: Decimal, step: Decimal, text: str, option: str) -> list[Decimal]:
    if step == 0 or (stop - start) * step < 0:
        raise bad(option, text, "the step must lead from the start to the stop, and not be 0")
    count = int((stop - start) / step) + 1
    if count > MOST_VALUES:
        raise bad(option, text, f"makes more than {MOST_VALUES:,} values")
    return [start + index * step for index in range(count)]


def parse_sigma_rels(text: str, option: str = "--sigma-rel") -> list[float]:
    """Widths, all in range."""
    widths = parse_numbers(text, option)
    for width in widths:
        try:
            check_sigma_rel(width)
        except InvalidValueError as error:
            is_beta = SHORTEST_BETA <= width < 1 and option in ("--sigma-rel", "--draw")
            hint = f"for a decay of {width!r} a step there is --beta {width!r}" if is_beta else error.hint
            raise InvalidValueError(option, error.reason, hint, value=error.value) from None
    return widths


def parse_sigma_range(text: str) -> tuple[float, float]:
    """Both ends of `--sigma-range`, LOW:HIGH."""
    from posthoc_cli.planning import check_sigma_range

    try:
        low, high = (float(end) for end in text.split(":"))
    except ValueError:
        raise bad("--sigma-range", text, "must be LOW:HIGH, such as 0.05:0.28") from None
    return check_sigma_range((low, high))


def parse_max_error(text: str) -> float:
    """A relative error from `--max-error`: 0.01, or 1% for the same."""
    value = _fraction(text)
    if not (value.is_finite() and 0 < float(value) < 1):
        raise bad("--max-error", text, "must be a relative error in (0, 1), such as 0.01 or 1%")
    return float(value)


def check_confirmation(yes: bool, dry_run: bool, as_json: bool) -> None:
    """Refuse a command that changes files and cannot ask for confirmation."""
    if as_json and not (yes or dry_run):
        raise InvalidValueError("--json", "shows what is changed only afterwards", "add --yes or --dry-run")
    if not (yes or dry_run or sys.stdin.isatty()):
        raise InvalidValueError("--yes", "is needed without a terminal; --dry-run shows what would be changed")


def optional(parse: Callable[..., _T], text: str | None, *arguments: str) -> _T | None:
    """What `parse` makes of an option's text; None without the option."""
    return None if text is None else parse(text, *arguments)


def existing(path: Path, directory: bool = False, pickles: bool = False) -> Path:
    """An input that exists, with ~ expanded; with `directory` one that may hold snapshots. A pickle only if allowed."""
    from posthoc_cli.snapshots.directory import PICKLES

    path = files.expanded(path)
    what = "no such directory" if directory else "no such file or directory"
    hint = "name the directory that a tracker writes its snapshots to" if directory else ""
    try:
        is_directory = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidValueError(path, what, hint) from None
    if directory and not is_directory:
        raise InvalidValueError(path, "is not a directory", hint)
    if path.suffix in PICKLES and not (is_directory or pickles):
        reason = "is a pickle (.pt, .bin), which this command does not read; save it as safetensors"
        raise InvalidValueError(path, reason)
    return path


def existing_run(place: str | Path, directory: bool = True) -> Path:
    """A directory that may hold snapshots or checkpoints, or a glob on names of checkpoints."""
    from posthoc_cli.checkpoints.opening import is_glob

    path = files.expanded(place)
    return path if is_glob(place) else existing(path, directory, pickles=not directory)


def open_run(place: Path | None, checkpoints: str | None, origin: Origin, directory: bool = True) -> Run:
    """The run of DIR and --checkpoints, of which one is there; DIR may be a file if not `directory`."""
    from posthoc_cli.run import Run

    if checkpoints == "":
        raise InvalidValueError("--checkpoints", files.EMPTY)
    if place is not None:
        also = None if checkpoints is None else existing_run(checkpoints, directory=False)
        return Run(existing_run(place, directory), also=also, origin=origin)
    if checkpoints is None:
        raise InvalidValueError("DIR", "is missing; name a directory, or checkpoints by --checkpoints")
    return Run(existing_run(checkpoints, directory), origin=origin)


def new_file(path: Path | None, option: str, endings: Sequence[str], overwrite: bool) -> Path | None:
    """An output with one of these endings that can be written, with ~ expanded; checked before any work."""
    if path is None:
        return None
    path = files.expanded(path)
    if path.suffix not in endings:
        raise InvalidValueError(option, f"must end in {', '.join(endings)}", value=path)
    if not path.parent.is_dir():
        raise InvalidValueError(option, "its folder does not exist", value=path)
    if path.exists() and not overwrite:
        raise OutputExistsError(path, "is there already", "choose another name, or --force to replace it")
    return path


def parse_targets(
    sigma_rel: str | None,
    beta: str | None,
    window: str | None,
    between: str | None,
    profile: Sequence[Path] | None,
    width_option: str = "--sigma-rel",
    decay: str | None = None,
    over: str | None = None,
    lr: Path | None = None,
) -> list[Target]:
    """Targets from the options of these names, kind after kind, each once; `width_option` names the first."""
    targets: list[Target] = []
    targets += [] if sigma_rel is None else map(SigmaRel, parse_sigma_rels(sigma_rel, width_option))
    targets += [] if beta is None else map(Beta, parse_numbers(beta, "--beta"))
    targets += [] if window is None else map(_window, parse_numbers(window, "--window"))
    targets += [] if between is None else [Between(*_ends(text, "--between")) for text in between.split(",")]
    targets += [ProfileFile(files.expanded(path)) for path in profile or ()]
    for option, value in (("--over", over), ("--lr", lr)):
        if decay is None and value is not None:
            raise InvalidValueError(option, "is for --decay", value=value)
    if decay is not None:
        if not decay.strip():
            raise bad("--decay", decay, f"must be {', '.join(SHAPES)} or a file of lines x,multiplier")
        shape = decay if decay in SHAPES else files.expanded(Path(decay))
        part = _part("20%" if over is None else over)
        targets.append(Decay(shape, part, None if lr is None else files.expanded(lr)))
    return list(dict.fromkeys(targets))


def parse_groups(texts: Sequence[str]) -> dict[str, float]:
    """sigma_rel by glob, from the values of --group: GLOB=SIGMA_REL."""
    groups: dict[str, float] = {}
    for text in texts:
        glob, equals, width = text.rpartition("=")
        widths = parse_sigma_rels(width, "--group") if glob and equals else []
        if len(widths) != 1 or glob in groups:
            raise bad("--group", text, "must be GLOB=SIGMA_REL, each glob once, such as 'unet.up.*=0.12'")
        groups[glob] = widths[0]
    return groups


def _window(steps: float) -> Window:
    return Window(int(steps) if steps.is_integer() else steps)  # type: ignore[arg-type]  # which it refuses


def _ends(text: str, option: str) -> tuple[float, float]:
    ends = [_decimal(end) for end in text.split(":")]
    if len(ends) != 2 or not all(math.isfinite(end) for end in map(float, ends)):
        raise bad(option, text, "must be START:END, two training times, such as 50000:80000")
    return float(ends[0]), float(ends[1])


def _part(text: str) -> float | tuple[float, float]:
    """`--over`: 20%, 0.2, or START:END."""
    if ":" in text:
        start, end = _ends(text, "--over")
        if not 0 <= start < end:
            raise bad("--over", text, "must start at 0 or later, and end after its start")
        return start, end
    value = _fraction(text)
    if not (value.is_finite() and 0 < value <= 1):
        raise bad("--over", text, "must be a part of training, such as 20%, or START:END, such as 50000:80000")
    return float(value)


def parse_mean(text: str) -> Mean:
    """`--mean`: last:10."""
    word, colon, count = text.partition(":")
    if word.strip() != "last" or not colon:
        raise bad("--mean", text, "must be last:COUNT, such as last:10")
    return Mean(parse_count(count, "--mean", "last:10"))
