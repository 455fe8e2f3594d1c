"""The times of checkpoints: numbers in their contents or names, and what these count.

A number is steps if the content or a word in the name says so. It is epochs if a word in the name
says so, if the content holds an equal `epoch`, or if the numbers of the files follow each other
without a gap. Any other lone number is taken for a step, whose unit nothing states.

A number in a name counts if a word marks it, or if it is the only one, and if it is of plain
digits, or as `step_1.5k`: `1_000`, another `1.5k` or a date may mean something else, and a wrong
step would put weights at a wrong time without notice.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from posthoc_cli.checkpoints.content import Content, stem_of
from posthoc_cli.checkpoints.programs import EPOCH_VALUES, FROM_0, STEP_VALUES, Unit
from posthoc_cli.checkpoints.settings import ImportSettings, read_number
from posthoc_cli.errors import InvalidValueError, shown

log = logging.getLogger(__name__)

_MOST = 10**15
_HINT = r"import with `step_from`, a pattern such as 'step(\d+)'"

_MORE = r"(?P<more>(?:[.,_-][0-9]+)+[km]?|[a-z]+)?"  # what follows digits of a number, or its unit
_STEP = r"(?:steps?|iter(?:ation)?s?)"
_EPOCH = r"ep(?:och)?s?"
_BEFORE = r"(?<![a-z]){word}[=_.\- ]*(?P<number>[0-9]+)" + _MORE
_AFTER = (
    r"(?<![0-9])(?<![0-9][.,_-])(?P<number>[0-9]+)(?P<more>(?:\.[0-9]+)?[kmb])?[_\- ]?{word}"
    r"(?![a-z]|[=_.\- ]*[0-9])"
)


def _pattern(template: str, word: str) -> re.Pattern[str]:
    return re.compile(template.replace("{word}", word), re.IGNORECASE)


_MARKS: tuple[tuple[Unit, re.Pattern[str]], ...] = (
    ("steps", _pattern(_BEFORE, _STEP)),
    ("epochs", _pattern(_BEFORE, _EPOCH)),
    ("steps", _pattern(_AFTER, _STEP)),
    ("epochs", _pattern(_AFTER, _EPOCH)),
)
_COUNT = re.compile(rf"(?:[a-z]+_)?n?(?:{_STEP}|it|updates?)(?:_(?:count|num))?")  # names of values
_CHECKPOINT = _pattern(_BEFORE, "(?:checkpoint|ckpt)s?")
_NO_STEP = "v|version|fp|bf|int|float|fold|seed|copy|acc|loss|fid|psnr|wer|m?ap|m?iou|auc|dice"
_ALONE = re.compile(
    rf"(?P<other>(?<![a-z])(?:{_NO_STEP})[_.=\-]?)?(?P<number>[0-9]+){_MORE}", re.IGNORECASE
)
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[0-9]{4}|[0-9]{6})?"
    r"|1[5-9][0-9]{8}(?:[0-9]{3})?"  # seconds, or thousandths, of 2017 to 2033
)
_THOUSANDS = re.compile(r"[0-9]+(?:\.[0-9]+)?[km]", re.IGNORECASE)  # steps as 10k or 1.5M
_GOES_ON = re.compile(r"[.,_-]?[0-9]")  # after such a letter: it is no unit then, as in 1k5
_ANEW = {"", "step", "steps", "iteration"}  # values that may begin anew in each epoch, or a name's
_SHARD = re.compile(r"[0-9]+-of-[0-9]+")
_LONE = re.compile(r"[0-9]{3,}")  # the whole name of a folder; a shorter one may be an experiment's
_FRACTION = re.compile(r"(?<![0-9])0\.[0-9]+")  # a decay or a loss in a name


@dataclass(frozen=True)
class Reading:
    """The number of one checkpoint."""

    number: int
    unit: Unit  # empty if nothing states it
    origin: str  # where it was found, for a message
    epoch: int | None = None  # in its content, or in its name beside a step
    is_nameless: bool = False  # whether only its content has a number
    is_marked: bool = False  # whether its name has a word for it, such as `checkpoint`
    is_of_folder: bool = False  # whether it is in the name of the folder, not in that of the file
    named: Reading | None = None  # what its name says, where its content has a step
    is_from_0: bool = False  # whether it is of a program that counts epochs from 0
    count: int = 0  # updates that an average has counted, one for each step
    path: Path = Path()  # of the checkpoint
    value: str = ""  # the name of the value in its content


UNREAD = Reading(0, "", "")


@dataclass(frozen=True)
class Times:
    """The times of a run's checkpoints."""

    unit: str
    is_stated: bool  # whether files or the user state the unit
    says: str  # what "numbers are", as the rest of a sentence
    numbers: Sequence[int]  # 0 before the training


# --- one checkpoint


def read_time(content: Content, settings: ImportSettings) -> Reading:
    """Return the number of a checkpoint; raise InvalidValueError if nothing tells it."""
    is_from_0 = any(content.values.keys() >= marks for marks in FROM_0)
    reading = _read_number(content, settings)
    return replace(reading, is_from_0=is_from_0, path=content.path)


def _read_number(content: Content, settings: ImportSettings) -> Reading:
    path = content.path
    epoch = _whole(content, EPOCH_VALUES)
    if settings.step_from is not None:
        return replace(_searched(path, settings), epoch=epoch)
    last = {re.sub(r"\.\d+\.", ".*.", name): value for name, value in content.values.items()}
    for name, unit in STEP_VALUES.items():
        value = last.get(name)
        if isinstance(value, str) and value.isdecimal() and len(value) < 20:
            value = int(value)
        if isinstance(value, int | float) and value > 0:
            number = checked_number(path, value)
            return Reading(number, unit, _stored(name), epoch, named=time_in_name(path), value=name)
    of_content = _only_in_content(content, epoch)
    try:
        reading = named_time(path)
    except InvalidValueError:
        if of_content is None:
            raise
        return of_content
    if of_content and reading.is_of_folder and reading.unit == "epochs":
        return of_content  # the name may be that of an experiment
    return replace(reading, epoch=reading.epoch if epoch is None else epoch)


def _only_in_content(content: Content, epoch: int | None) -> Reading | None:
    """Return the number of a checkpoint whose name may have none: the epoch, or the only value that
    is called as a count of steps is, such as `n_iter`; None if there is none."""
    if epoch is not None and epoch >= 0:
        return Reading(epoch, "epochs", _stored("epoch"), epoch, is_nameless=True)
    counts = [name for name in content.values if _COUNT.fullmatch(name)]
    number = _whole(content, counts)
    if number is None or len(counts) > 1:
        return None
    return Reading(checked_number(content.path, number), "steps", _stored(counts[0]))


def _stored(name: str) -> str:
    """Return where a value is found; its name may be that of an option, too."""
    return f"{name!r} in the contents"


def time_in_name(path: Path) -> Reading | None:
    """Return the number in the name of a file or folder itself, if there is one."""
    with suppress(InvalidValueError):
        reading = named_time(path)
        if not reading.is_of_folder:
            return reading
    return None


def _searched(path: Path, settings: ImportSettings) -> Reading:
    """Return the number that the user's pattern finds in a path."""
    pattern = settings.step_from or ""
    match = re.search(pattern, str(path))
    number = read_number(match[1] or "") if match else None
    if match is None or number is None:
        raise InvalidValueError("step_from", f"finds no number in {path}", value=pattern)
    unit: Unit = "epochs"
    if not settings.steps_per_epoch:
        unit = _unit_at(match[0], match.start(1) - match.start())
    return Reading(checked_number(path, number), unit, "what `step_from` finds")


def _unit_at(text: str, begin: int) -> Unit:
    """Return what the number that begins at a place of a text counts, by the word before it, or
    else behind it; empty if there is none."""
    for unit, pattern in _MARKS:
        if any(match.start("number") == begin for match in pattern.finditer(text)):
            return unit
    return ""


def _whole(content: Content, names: Sequence[str]) -> int | None:
    for name in names:
        value = content.values.get(name)
        if type(value) is int:
            return value
    return None


def checked_number(path: Path, number: float) -> int:
    """Return a number as an int; raise InvalidValueError if it is not whole or out of range."""
    if not 0 <= number <= _MOST or number != int(number):
        reason = f"its step is {shown(number)}; must be a whole number up to {_MOST:.0e}"
        raise InvalidValueError(path, reason, f"leave it out, or {_HINT}")
    return int(number)


def named_time(path: Path) -> Reading:
    """Return the number in the name of a file or folder: next to a word, else the only one.

    If the name has no number, use that of the parent folder, only with such a word, or if it is the
    whole name, such as `0000100` or `100.ckpt`: it may be that of an experiment.
    """
    stem = _SHARD.sub("", stem_of(path.name))
    has_number = re.search("[0-9]", stem) is not None
    outer = stem_of(path.parent.name)
    name = _FRACTION.sub("", stem if has_number else outer)
    unit, matches = _marked(name)
    is_marked = bool(matches)
    is_whole = _LONE.fullmatch(outer) or (outer.isdecimal() and outer != path.parent.name)
    if not matches and (has_number or is_whole):
        matches = [*_ALONE.finditer(name)]
    if len(matches) != 1:
        raise _doubt(path, "it has no number, or several")
    number = _number_in(matches[0], unit, path)
    if not unit and _DATE.fullmatch(matches[0]["number"]):
        raise _doubt(path, f"'{number}' may be a date")
    origin = f"the word for {unit} in names" if unit else "the only number in names"
    of_folder = not has_number
    epoch = _epoch_in(name) if unit == "steps" else None
    return Reading(number, unit, origin, epoch, is_marked=is_marked, is_of_folder=of_folder)


def _number_in(match: re.Match[str], unit: Unit, path: Path) -> int:
    """Return the number of a match: of plain digits, or of steps as 1.5k or 2M."""
    parts = match.groupdict("")
    other = parts.get("other", "")
    text = parts["number"] + parts["more"]
    if not other and not parts["more"]:
        return int(text)
    rest = match.string[match.end("more") :]
    if unit == "steps" and _THOUSANDS.fullmatch(text) and not _GOES_ON.match(rest):
        number = read_number(text)
        if isinstance(number, int):
            return number
    raise _doubt(path, f"{other + text!r} may be something else")


def _epoch_in(name: str) -> int | None:
    """Return the number next to a word for epochs; None if there is none, or are several."""
    matches = _matches(name, "epochs")
    return int(matches[0]["number"]) if len(matches) == 1 else None


def _matches(
    name: str,
    unit: Unit,
) -> list[re.Match[str]]:
    """Return the numbers next to a word for a unit."""
    matches = list[re.Match[str]]()
    for other, pattern in _MARKS:
        if other == unit:
            matches += pattern.finditer(name)
    return matches


def _marked(name: str) -> tuple[Unit, list[re.Match[str]]]:
    """Return the numbers next to a word, and what it says that they count."""
    for unit, _ in _MARKS:
        if matches := _matches(name, unit):
            return unit, matches
    return "", [*_CHECKPOINT.finditer(name)]


def _doubt(path: Path, doubt: str) -> InvalidValueError:
    return InvalidValueError(
        path, f"neither its content nor its name tells its step: {doubt}", _HINT
    )


# --- all checkpoints of a run


def _by_names(readings: Sequence[Reading]) -> Sequence[Reading]:
    """Return the numbers in names where they exceed the count in the contents, if that repeats or
    is called `iteration`, as VITS calls its epoch. Log which are taken where the two differ."""
    named = [reading.named for reading in readings if reading.named is not None]
    if len({reading.number for reading in named}) < max(2, len(readings)):
        return readings
    pairs = [*zip(readings, named, strict=True)]
    ahead = [of_name.number - reading.number for reading, of_name in pairs]
    if min(ahead) < -1 or max(ahead) <= 1:  # 1: counted from 0
        return readings
    reading, of_name = next(pair for pair, more in zip(pairs, ahead, strict=True) if more > 1)
    number = f"{reading.origin} is {reading.number:,}"
    says = f"{number}, and the number in its name {of_name.number:,}: taken"
    repeats = len({reading.number for reading in readings}) < len(readings)
    if repeats or reading.value == "iteration":
        log.warning("%s: %s is that in names", reading.path, says)
        return [replace(of_name, count=reading.count) for reading, of_name in pairs]
    log.warning("%s: %s is %s; `step_from` takes that in names", reading.path, says, reading.origin)
    return readings


def times_of(readings: Sequence[Reading], settings: ImportSettings) -> Times:
    """Return the times of a run's checkpoints, and what their numbers count.

    Raise InvalidValueError if `steps_per_epoch` is given, and the numbers are not epochs.
    """
    numbers = _by_names(readings)
    origin = numbers[0].origin
    as_they_are = [reading.number for reading in numbers]
    stated = {reading.unit for reading in numbers} & {"steps", "images"}
    if len(stated) > 1:
        reason = "must be given: some files state their steps, and others images"
        raise InvalidValueError("step_from", reason)
    if stated:
        (unit,) = stated
        if settings.step_from is None and _begin_anew(numbers):
            return _times_within_epochs(numbers, settings)
        if settings.steps_per_epoch:
            reason = f"does not apply to numbers that are {unit}, by {origin}"
            raise InvalidValueError("steps_per_epoch", reason, value=settings.steps_per_epoch)
        return Times(unit, True, f"{unit}, by {origin}", as_they_are)
    why = _why_epochs(numbers)
    if not why and all(reading.count > reading.number + 1 for reading in numbers):
        why = "averages have counted more updates"
    if settings.steps_per_epoch and not why:
        why = "`steps_per_epoch` is given"
    if not why:
        says = f"taken for steps: they are {origin}, and nothing states their unit"
        return Times("steps", False, says, as_they_are)
    return _times_of_epochs(numbers, settings, why)


def _begin_anew(numbers: Sequence[Reading]) -> bool:
    """Return whether steps begin anew in each epoch: a later epoch has a step that is not later. It
    may be that epochs begin anew at a resume, if names hold the same steps, and nothing else."""
    if any(reading.epoch is None or reading.value not in _ANEW for reading in numbers):
        return False
    named = [reading.named for reading in numbers if reading.named and reading.named.epoch is None]
    if [reading.number for reading in named] == [reading.number for reading in numbers]:
        return False
    in_order = sorted((reading.epoch or 0, reading.number) for reading in numbers)
    for (epoch, number), (later, later_number) in pairwise(in_order):
        if epoch < later and number >= later_number:
            return True
    return False


def _times_within_epochs(numbers: Sequence[Reading], settings: ImportSettings) -> Times:
    """Return the times of checkpoints whose numbers are steps within their epochs."""
    most = max(reading.number for reading in numbers)
    each = settings.steps_per_epoch
    says = f"steps that begin anew in each epoch, by {numbers[0].origin}"
    if not each:
        reason = f"must be given: numbers are {says}"
        raise InvalidValueError("steps_per_epoch", reason, "it is a setting of imports")
    if each < most:
        reason = f"must be at least {most:,}: numbers are {says}"
        raise InvalidValueError("steps_per_epoch", reason, value=each)
    first = settings.first_epoch
    if first is None:
        first = min(1, *(reading.epoch or 0 for reading in numbers))
    steps = [each * ((reading.epoch or 0) - first) + reading.number for reading in numbers]
    return Times("steps", True, f"{says}, of epochs counted from {first}", steps)


def _times_of_epochs(
    numbers: Sequence[Reading],
    settings: ImportSettings,
    why: str,
) -> Times:
    """Return the times of checkpoints whose numbers are epochs, in steps if those are known."""
    offset = _offset(numbers, settings)
    says = f"epochs, counted from {1 - offset}: {why}"
    is_sure = offset or settings.first_epoch is not None
    if not is_sure and not _begin_at_1(reading.number for reading in numbers):
        says += ", and nothing shows the first: `first_epoch` is 0 if it is"
    epochs = [reading.number + offset for reading in numbers]
    if each := settings.steps_per_epoch:
        steps = [each * epoch for epoch in epochs]
        says += f"; the first checkpoint is of step {min(steps):,}"
        return Times("steps", True, says, steps)
    counts = [reading.count for reading in numbers]
    if all(counts):
        late = _late(epochs, counts)
        if not late:
            says += "; steps are the updates that the averages have counted"
            return Times("steps", True, says, counts)
        says += f", and the averages count their updates since epoch {late}"
    return Times("epochs", False, says, epochs)


def _late(
    epochs: Sequence[int],
    counts: Sequence[int],
) -> int:
    """Return the epoch after which averages began to count their updates, as torchvision's do when
    the learning rate has risen; 0 if they did with the training."""
    pairs = sorted(zip(epochs, counts, strict=True))
    first, count = pairs[0]
    last, most = pairs[-1]
    if most <= count or last == first:
        return 0
    begin = first - count * (last - first) / (most - count)
    return max(round(begin), 0)


def _why_epochs(numbers: Sequence[Reading]) -> str:
    """Return why the numbers are epochs; empty if they are not."""
    if any(reading.unit == "epochs" for reading in numbers):
        return f"by {numbers[0].origin}"
    if all(reading.epoch is not None for reading in numbers):
        apart = {reading.epoch - reading.number for reading in numbers if reading.epoch is not None}
        if apart <= {0} or apart <= {1}:
            return "the contents hold the same epoch"
    distinct = {reading.number for reading in numbers}
    span = max(distinct) - min(distinct)
    if len(distinct) > 1 and span == len(distinct) - 1:
        return "they follow each other without a gap"
    return ""


def _begin_at_1(numbers: Iterable[int]) -> bool:
    """Return whether numbers are those of each epoch from 1 on, or of each k-th one: k, 2 k, ..."""
    ascending = sorted({0, *numbers})
    steps = {after - before for before, after in pairwise(ascending)}
    return len(steps) == 1


def _offset(numbers: Sequence[Reading], settings: ImportSettings) -> int:
    """Return 1 if epochs are counted from 0: by their program, if the content's number is one more,
    if there is an epoch 0, or if checkpoints of each k-th epoch have the numbers k - 1, 2 k - 1,
    ..."""
    if settings.first_epoch is not None:
        return 1 - settings.first_epoch
    if all(reading.is_from_0 for reading in numbers):
        return 1
    if all(reading.epoch == reading.number + 1 for reading in numbers):
        return 1
    distinct = sorted({reading.number for reading in numbers})
    if distinct[0] == 0:
        return 1
    every = math.gcd(*(number - distinct[0] for number in distinct))
    return int(every > 1 and (distinct[0] + 1) % every == 0)
