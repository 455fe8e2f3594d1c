"""From words on the command line to values."""

from __future__ import annotations

import stat
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated

import typer

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, OutputExistsError
from posthoc_cli.files import parse_bytes as parse_bytes
from posthoc_cli.profiles import check_sigma_rel
from posthoc_cli.targets import SHORTEST_BETA, Beta, Between, ProfileFile, SigmaRel, Target, Window

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, option: str, example: str = "100000, 1e5 or 100K") -> int:
    """A whole number from 1.2e9, 1.2B, 350M or 350,000,000.

    Raises:
        InvalidValueError: naming the option and the accepted forms.
    """
    value = files.parse_amount(text, _COUNTS)
    if value is None or value != value.to_integral_value():
        shown = text.strip() or "(empty)"
        raise InvalidValueError(f"{option} {shown}", f"must be a whole number, at least 1, such as {example}")
    return int(value)


# --- From words on the command line to values ------------------------------------------------------


_MOST_DIGITS = 1_000
"""Before and behind the point: far more than a float has, and few enough to count with."""

MOST_VALUES = 10_000

_FORMS = {
    "--window": "a whole number of steps, a list such as 500,1000 or a range such as 500:2000:500",
    "--beta": "a number, a list such as 0.999,0.9999 or a range such as 0.99:0.999:0.003",
}
_SIGMA_FORMS = "a number, a list such as 0.05,0.10 or a range such as 0.05:0.25:0.05"
"""What `parse_numbers` takes, for each option."""


def one_of(*words: str) -> Callable[[str], list[str]]:
    """What a shell offers as the value of an option: those of `words` that begin as what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


# What help does not load names of its own: a test holds these lists and the library's together.
DTYPE_WORDS = one_of("keep", "float32", "float16", "bfloat16", "float64")
LAYOUT_WORDS = one_of("safetensors", "sharded", "pt")
METHOD_WORDS = one_of("minvar", "paper")

# --- options of several commands -------------------------------------------------------------------

BetaOption = Annotated[
    str | None,
    typer.Option(
        help="Classical EMA: x <- beta x + (1 - beta) theta at every step (call of update_), begun as the first "
        "weights there are, those of the first update. A number, list or range: 0.999,0.9999."
    ),
]
WindowOption = Annotated[
    str | None,
    typer.Option(help="The mean of the last so many steps, each of which counts 1 / window: a number, list or range."),
]
BetweenOption = Annotated[
    str | None,
    typer.Option(
        metavar="START:END", help="The mean over a span of training time, such as 50000:80000, or a list of them."
    ),
]
ProfileOption = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="Any profile: a CSV file of time,density, linear between its points, 0 outside them, scaled to mass 1. "
        "May be given several times.",
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        autocompletion=METHOD_WORDS,
        metavar="minvar|paper",
        help="The solver: minvar, the least expected error of the weights, or paper, the nearest profile, as "
        "published. [default: minvar]",
    ),
]


# --- numbers ---------------------------------------------------------------------------------------


def parse_numbers(text: str, option: str) -> list[float]:
    """Numbers from `0.05,0.10`, `0.05:0.25:0.05` or `0.05,0.06,...,0.25`, in the order given, each once.

    Steps are exact decimals, so that `0.05:0.25:0.05` ends at 0.25 and holds 0.15, not 0.15000000000000002.

    Raises:
        InvalidValueError: naming the option, the part, and the accepted forms.
    """
    parts = [part.strip() for part in text.split(",")]
    numbers: list[Decimal] = []
    for index, part in enumerate(parts):
        if part == "...":
            if not 2 <= index < len(parts) - 1:
                raise InvalidValueError(f"{option} {text}", "'...' needs two numbers before it and one after")
            last, step = numbers[-1], numbers[-1] - numbers[-2]
            numbers += _steps(last + step, _number(parts[index + 1], option), step, text, option)
        elif ":" in part:
            ends = part.split(":")
            if len(ends) != 3:
                raise InvalidValueError(f"{option} {part}", "a range is START:STOP:STEP, such as 0.05:0.25:0.05")
            start, stop, step = (_number(end, option) for end in ends)
            numbers += _steps(start, stop, step, part, option)
        else:
            numbers.append(_number(part, option))
    return list(dict.fromkeys(float(number) for number in numbers))


def _number(text: str, option: str) -> Decimal:
    try:
        number = Decimal(text)
    except InvalidOperation:
        number = Decimal("nan")
    if not text.strip() or not number.is_finite() or abs(number.adjusted()) > _MOST_DIGITS:
        shown = text if text.strip() else "(empty)"
        raise InvalidValueError(f"{option} {shown}", f"must be {_FORMS.get(option, _SIGMA_FORMS)}")
    return number


def _steps(start: Decimal, stop: Decimal, step: Decimal, text: str, option: str) -> list[Decimal]:
    if step == 0 or (stop - start) * step < 0:
        raise InvalidValueError(f"{option} {text}", "the step must lead from the start to the stop, and not be 0")
    count = int((stop - start) / step) + 1
    if count > MOST_VALUES:
        raise InvalidValueError(f"{option} {text}", f"makes {count:,} values; at most {MOST_VALUES:,} are accepted")
    return [start + index * step for index in range(count)]


def parse_sigma_rels(text: str, option: str = "--sigma-rel") -> list[float]:
    """Widths from `--sigma-rel` or an option like it, all in range.

    Raises:
        InvalidValueError: naming the option and the range.
    """
    return [_sigma_rel(width, option) for width in parse_numbers(text, option)]


def _sigma_rel(width: float, option: str) -> float:
    try:
        return check_sigma_rel(width)
    except InvalidValueError as error:
        is_beta = SHORTEST_BETA <= width < 1 and option in ("--sigma-rel", "--draw")
        hint = f"for a decay of {width!r} a step there is --beta {width!r}" if is_beta else error.hint
        raise InvalidValueError(option, error.reason, hint, value=error.value) from None


def parse_sigma_range(text: str) -> tuple[float, float]:
    """Both ends of `--sigma-range`, LOW:HIGH.

    Raises:
        InvalidValueError: naming the option and the accepted form.
    """
    from posthoc_cli.planning import check_sigma_range

    try:
        low, high = (float(end) for end in text.split(":"))
    except ValueError:
        shown = text.strip() or "(empty)"
        raise InvalidValueError("--sigma-range", "must be LOW:HIGH, such as 0.05:0.28", value=shown) from None
    return check_sigma_range((low, high))


def parse_max_error(text: str) -> float:
    """A relative error from `--max-error`: 0.01, or 1% for the same.

    Raises:
        InvalidValueError: naming the option and the range.
    """
    number = text.strip()
    try:
        value = Decimal(number.removesuffix("%").strip()) / (100 if number.endswith("%") else 1)
    except InvalidOperation:
        value = Decimal("nan")
    if not (value.is_finite() and 0 < float(value) < 1):
        shown = number or "(empty)"
        raise InvalidValueError("--max-error", "must be a relative error in (0, 1), such as 0.01 or 1%", value=shown)
    return float(value)


# --- paths -----------------------------------------------------------------------------------------


def existing(path: Path) -> Path:
    """An input that the command line names, with ~ expanded.

    Raises:
        InvalidValueError: there is none, or it is a pickle.
    """
    from posthoc_cli.snapshots.directory import PICKLES

    path, mode = _looked_up(path)
    if mode is None:
        raise InvalidValueError(path, "no such file or directory")
    if path.suffix in PICKLES and not stat.S_ISDIR(mode):
        raise InvalidValueError(path, "is a pickle (.pt, .bin), which is never read; save it as safetensors")
    return path


def existing_directory(path: Path) -> Path:
    """A directory of snapshots that the command line names, with ~ expanded.

    Raises:
        InvalidValueError: there is none, or it is no directory.
    """
    path, mode = _looked_up(path)
    if mode is None or not stat.S_ISDIR(mode):
        what = "no such directory" if mode is None else "is not a directory"
        raise InvalidValueError(path, f"{what}", "name the directory that a tracker writes its snapshots to")
    return path


def _looked_up(path: Path) -> tuple[Path, int | None]:
    """A path with ~ expanded, and what it leads to as a file mode; None where that is nothing."""
    path = files.expanded(path)
    try:
        return path, path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return path, None


def check_folder(path: Path, option: str) -> None:
    """Refuse, before any work, an output for which there is no folder.

    Raises:
        InvalidValueError: naming the option.
    """
    if not path.parent.is_dir():
        raise InvalidValueError(f"{option} {path}", "its folder does not exist")


def check_output(path: Path, option: str, force: bool) -> None:
    """Refuse, before any work, a file that could not be written.

    Raises:
        InvalidValueError: its folder does not exist.
        OutputExistsError: it is there, and `force` is False.
    """
    check_folder(path, option)
    if path.exists() and not force:
        raise OutputExistsError(path, "is there already", "choose another name, or --force to replace it")


# --- targets ---------------------------------------------------------------------------------------


def parse_targets(
    sigma_rel: str | None,
    beta: str | None,
    window: str | None,
    between: str | None,
    profile: Sequence[Path] | None,
    width_option: str = "--sigma-rel",
) -> list[Target]:
    """What is wanted, from the options of these names: kind after kind, each target once.

    `width_option` is what the first one is called.

    Raises:
        InvalidValueError: naming the option, and what would be accepted.
    """
    targets: list[Target] = []
    targets += [] if sigma_rel is None else map(SigmaRel, parse_sigma_rels(sigma_rel, width_option))
    targets += [] if beta is None else map(Beta, parse_numbers(beta, "--beta"))
    targets += [] if window is None else map(Window, map(_whole, parse_numbers(window, "--window")))
    targets += [] if between is None else map(_between, between.split(","))
    targets += [ProfileFile(files.expanded(path)) for path in profile or ()]
    return list(dict.fromkeys(targets))


def _whole(number: float) -> int:
    """A whole number as one, so that it is shown without a point; any other as it is, to be refused."""
    return int(number) if number.is_integer() else number  # type: ignore[return-value]


def _between(text: str) -> Between:
    try:
        start, end = (Decimal(end.strip()) for end in text.split(":"))
    except (InvalidOperation, ValueError):
        start = end = Decimal("nan")
    if not (start.is_finite() and end.is_finite()):
        shown = text.strip() or "(empty)"
        raise InvalidValueError("--between", "must be START:END, two training times, such as 50000:80000", value=shown)
    return Between(float(start), float(end))
