"""Options that several commands share, and the parsing of their values."""

from __future__ import annotations

import math
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from typer import Argument, Option

from posthoc_cli import files, resources, targets
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.targets import FORMS, SigmaRel, Target, bad, parse_numbers

if TYPE_CHECKING:
    from posthoc_cli.run import Run

_T = TypeVar("_T")
_PANELS = "Targets", "Output", "Which run", "How", "A schedule not yet run"
TARGETS, OUTPUT, RUN, HOW, SCHEDULE = (partial(Option, rich_help_panel=panel) for panel in _PANELS)
"""Options in the parts of a command's help; what everyone needs first comes first there."""


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Completion in a shell: those of `words` that begin with what was typed."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


def flag(option: Callable[..., Any], *names: str, help: str) -> Any:
    """An option without a value."""
    return option(False, *names, metavar="", help=help)


STORED_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Short words for the dtypes of planned snapshots."""
STORED = one_of(*STORED_DTYPES.values())

SIGMA_REL = TARGETS(
    None, help="Lengths of averages: a number, a list 0.05,0.10, a range 0.05:0.25:0.05 or 0.05,0.06,...,0.25."
)
TARGET = TARGETS(
    [],
    metavar="KIND:VALUE",
    autocompletion=one_of(*(f"{kind}:" for kind in FORMS)),
    help="Averages of other kinds, such as beta:0.9999, window:1000, last:10 or decay:linear:20%, each also as a list "
    "or a range; `ema help targets` lists them. Give it again for more.",
)
METHOD = HOW(
    None,
    autocompletion=one_of("minvar", "paper"),
    metavar="minvar|paper",
    show_default="minvar",
    help="The solver: minvar, the least expected error of the weights, or paper, the nearest profile, as published.",
)
LAYOUT = OUTPUT(
    None,
    autocompletion=one_of("safetensors", "sharded", "pt", "dcp"),
    show_default="from the output's name",
    help="safetensors, sharded (a folder), pt, or dcp (a folder of torch's DCP).",
)
DTYPE = OUTPUT(
    "keep",
    autocompletion=one_of("keep", "float32", "float16", "bfloat16", "float64"),
    help="float32, float16, bfloat16, float64 (or fp32, ...), or keep: each tensor's own.",
)
COMPONENT = OUTPUT(None, metavar="NAME", help="The part of a pipeline with the weights: unet.")
LIKE_MODEL = OUTPUT(
    None,
    metavar="MODEL_FOLDER",
    help="A new folder like this one of transformers, diffusers or PEFT, with averaged weights: the same names, files "
    "and dtypes, and copies of all other files.",
)
TIME = RUN(None, metavar="TIME", show_default="the last", help="The averages as they stood at this training time.")
STEP = RUN(None, metavar="COUNT", help="The same in steps (calls of update_): 50000, 5e4, 50K.")
MAX_SHARD_SIZE = OUTPUT(None, metavar="SIZE", show_default="5GB", help="The largest shard of a sharded output.")
LIKE = RUN(
    None,
    metavar="DIR|GLOB",
    show_default="evenly",
    help="Snapshots or checkpoints of an earlier run that the network will move like.",
)
SIGMA_RANGE = TARGETS("0.05:0.28", metavar="LOW:HIGH", help="The averages that you will want.")
DIRECTORY = Argument(..., metavar="DIR", help="The directory that the tracker wrote.")
DIRECTORY_OR_CHECKPOINTS = Argument(
    None, metavar="DIR", help="The directory that the tracker wrote, or of checkpoints.", show_default=False
)
PICTURE = OUTPUT(None, "--out", "-o", metavar="FILE", help="The picture: .png, .svg or .pdf.")
OVERWRITE = flag(OUTPUT, "--overwrite", help="Replace existing outputs.")
JSON = flag(OUTPUT, "--json", help="Print one JSON object.")
YES = flag(HOW, "--yes", "-y", help="Do not ask.")
CHECKPOINTS = RUN(
    None,
    metavar="DIR|GLOB",
    help="Checkpoints of the training, such as 'out/step*.safetensors': in place of DIR, or beside its snapshots.",
)


_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, option: str, example: str = "100000, 1e5 or 100K") -> int:
    """A whole number from 1.2e9, 1.2B, 350M or 350,000,000."""
    value = resources.parse_amount(text, _COUNTS)
    if value is None or value > resources.MOST or value != value.to_integral_value():
        accepted = "at most 9e18" if value is not None and value > resources.MOST else "at least 1"
        raise bad(option, text, f"must be a whole number, {accepted}, such as {example}")
    return int(value)


def parse_sigma_rels(text: str, option: str = "--sigma-rel") -> list[float]:
    """Widths, all in range."""
    widths = parse_numbers(text, option)
    for width in widths:
        try:
            SigmaRel(width)
        except InvalidValueError as error:
            raise InvalidValueError(option, error.reason, error.hint, value=error.value) from None
    return widths


def parse_sigma_range(text: str) -> tuple[float, float]:
    """Both ends of `--sigma-range`, LOW:HIGH."""
    from posthoc_cli.planning import check_sigma_range

    try:
        low, high = (float(end) for end in text.split(":"))
        return check_sigma_range((low, high))
    except ValueError:
        raise bad("--sigma-range", text, "must be LOW:HIGH in (0, 0.2887), such as 0.05:0.28") from None


def parse_max_error(text: str) -> float:
    """A relative error from `--max-error`: 0.01, or 1% for the same."""
    try:
        value = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise bad("--max-error", text, "must be a relative error in (0, 1), such as 0.01 or 1%")
    return value


def check_confirmation(agreed: bool, as_json: bool, otherwise: str = "") -> None:
    """Refuse a command that changes files and cannot ask for confirmation."""
    if as_json and not agreed:
        raise InvalidValueError("--json", "shows what is changed only afterwards", f"add --yes{otherwise}")
    if not (agreed or sys.stdin.isatty()):
        raise InvalidValueError("--yes", f"is needed without a terminal{otherwise}")


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
    if is_directory:
        if (pickles or directory) and (runs := _runs_in(path)):
            raise InvalidValueError(path, f"holds runs, and no snapshots itself: {', '.join(runs)}", "name one of them")
        return path
    if directory:
        raise InvalidValueError(path, "is not a directory", hint)
    if path.suffix in PICKLES and not pickles:
        reason = "is a pickle (.pt, .bin), which this command does not read; save it as safetensors"
        raise InvalidValueError(path, reason)
    if not (path.suffix in (".safetensors", *PICKLES) or _may_hold_weights(path)):
        raise InvalidValueError(path, "is neither a safetensors file nor one of torch")
    return path


def _runs_in(directory: Path) -> list[str]:
    """The names of the folders in it, if all hold snapshots and no other weights are beside them."""
    from posthoc_cli.snapshots.directory import PICKLES, is_snapshot_name

    with suppress(OSError):
        there = sorted(path for path in directory.iterdir() if not path.name.startswith("."))
        folders = [path for path in there if path.is_dir() and path.name != "damaged"]
        weights = any(path.suffix in (".safetensors", *PICKLES) for path in there)
        if not weights and all(any(map(is_snapshot_name, folder.iterdir())) for folder in folders):
            return [folder.name for folder in folders]
    return []


def _may_hold_weights(path: Path) -> bool:
    """Whether a file begins as safetensors, JSON, an archive or a pickle does; also one that cannot be read, or is a
    pipe or device, which is told later."""
    if files.is_url(path) or not path.is_file():
        return True
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError:
        return True
    return head[8:] == b"{" or head[:1] in (b"{", b"\x80") or head[:2] == b"PK"


def open_run(place: Path | None, checkpoints: str | None = None, directory: bool = True) -> Run:
    """The run of DIR and --checkpoints, of which one is there; DIR may be a file if not `directory`."""
    from posthoc_cli.checkpoints.open_run import is_glob
    from posthoc_cli.run import Run

    def path(named: str | Path, directory: bool) -> Path:
        named = files.expanded(files.given_path("--checkpoints", named))
        return named if is_glob(named) else existing(named, directory, pickles=not directory)

    if place is not None:
        return Run(path(place, directory), also=None if checkpoints is None else path(checkpoints, False))
    if checkpoints is None:
        raise InvalidValueError("DIR", "is missing; name a directory, or checkpoints by --checkpoints")
    return Run(path(checkpoints, directory))


def open_runs(places: Sequence[Path], checkpoints: str | None) -> list[Run]:
    """The runs of all DIR, or that of --checkpoints."""
    if checkpoints is not None and len(places) > 1:
        raise InvalidValueError("--checkpoints", "are of one training; name one DIR at most", value=checkpoints)
    return [open_run(place, checkpoints) for place in places] or [open_run(None, checkpoints)]


def parse_targets(sigma_rel: str | None, others: Sequence[str]) -> list[Target]:
    """Targets from --sigma-rel and --target, in this order, each once."""
    found: list[Target] = [] if sigma_rel is None else [*map(SigmaRel, parse_sigma_rels(sigma_rel))]
    for text in others:
        found += targets.parse_targets(text, "--target")
    return list(dict.fromkeys(found))


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
