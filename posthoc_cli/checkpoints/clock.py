"""The times of checkpoints: numbers in their contents or names, and what these count.

A number is a step if the content states it, if a word in the name says so, or if a number in the
name is one in the content that is called so. It is an epoch by the same signs, or if the numbers of
the files follow each other without a gap. Any other lone number is taken for a step, which is said.
The files of a run are read by one sign, the first in `_SIGNS` that most have and that tells them
apart.

A decimal in a name is a metric, unless a word for time precedes it. Any other number counts if it
is of plain digits, or as `step_1.5k`: `1_000`, another `1.5k` or a date may mean something else,
and a wrong step would put weights at a wrong time without notice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from posthoc_cli.checkpoints.ask import Answer, QuestionError
from posthoc_cli.checkpoints.containers import strip_ending
from posthoc_cli.checkpoints.content import Content
from posthoc_cli.checkpoints.folders import NUMBER, make_glob
from posthoc_cli.checkpoints.settings import ImportSettings, read_number
from posthoc_cli.errors import InvalidValueError, argument, quote

Unit = Literal["steps", "epochs", "images", ""]

STEPS = (
    "global_step", "global_steps", "step", "steps", "iter_num", "iteration", "iter", "n_iter", "it",
    "step_count", "ss_steps", "train_steps", "num_updates", "batch_idx_train", "num_batches_seen",
    "batch",
)  # fmt: skip
"""Last keys of values that are steps; if a checkpoint has several, the first one counts."""
EPOCHS = ("epoch", "last_epoch", "current_epoch")
_ANEW = {"step", "steps", "iteration", "iter"}  # values that may begin anew in each epoch

_MOST = 10**15
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
_CHECKPOINT = _pattern(_BEFORE, "(?:checkpoint|ckpt)s?")
_NO_STEP = "v|version|avg|fp|bf|int|float|fold|seed|copy|acc|loss|fid|psnr|wer|m?ap|m?iou|auc|dice"
_ALONE = re.compile(
    rf"(?P<other>(?<![a-z])(?:{_NO_STEP})[_.=\-]?)?(?P<number>[0-9]+){_MORE}", re.IGNORECASE
)
_GROUPED = re.compile(r"(?<![0-9])[0-9]{1,3}(?:[_,][0-9]{3})+(?![0-9])")  # 1_000
_SPELLED = r"[0-9]{1,3}(?:[_,][0-9]{3})+(?![0-9])|[0-9]+(?:\.[0-9]+)?(?:[kmb](?![a-z0-9]))?"
"""1_000, 1.5k or 1000."""
_SECONDS = re.compile(r"1[5-9][0-9]{8}(?:[0-9]{3})?")  # or thousandths, of 2017 to 2033
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[0-9]{4}|[0-9]{6})?|"
    + _SECONDS.pattern
)
_THOUSANDS = re.compile(r"[0-9]+(?:\.[0-9]+)?[km]", re.IGNORECASE)  # steps as 10k or 1.5M
_GOES_ON = re.compile(r"[.,_-]?[0-9]")  # after such a letter: it is no unit then, as in 1k5
_SHARD = re.compile(r"[0-9]+-of-[0-9]+")
_LONE = re.compile(r"[0-9]{3,}")  # the whole name of a folder; a shorter one may be an experiment's
_METRIC = re.compile(
    r"(?P<word>[a-z]*)[=_-]?(?<![0-9.,])[0-9]+\.[0-9]+(?![0-9.,]|[_,][0-9]|[kmb])", re.IGNORECASE
)
_OF_TIME = re.compile(r"steps?|iter(?:ation)?s?|ep(?:och)?s?|checkpoint|ckpt", re.IGNORECASE)


@dataclass(frozen=True)
class Reading:
    """A number of one checkpoint, and what shows that it counts steps or epochs."""

    number: int
    unit: Unit  # empty if nothing states it
    origin: str  # where it was found, for a message
    value: str = ""  # the key of the value in the content that shows it


@dataclass(frozen=True)
class Signs:
    """The numbers of one checkpoint, by the sign that shows each."""

    path: Path
    by_sign: Mapping[str, Reading]
    epoch: int | None = None  # in its content, or in its name beside a step
    problem: InvalidValueError | None = None  # why its name tells no time
    count: int = 0  # updates that its average has counted, one for each step

    @property
    def series(self) -> str:
        """The glob of its file and folder, which the names of a series share."""
        return make_glob(f"{self.path.parent.name}/{self.path.name}")

    @property
    def has_word(self) -> bool:
        """Whether a word in its name, or a pattern, says its time."""
        return not {"given", "step in name", "epoch in name"}.isdisjoint(self.by_sign)

    @property
    def is_numbered(self) -> bool:
        """Whether its name has a number that may be its time: no decimal, and behind no word such
        as `v` or `avg`."""
        if not _IN_NAMES.isdisjoint(self.by_sign):
            return True
        name = _METRIC.sub(_keep_time, strip_ending(self.path.name))
        return any(not match["other"] for match in _ALONE.finditer(name))


LONE = "lone"
_SIGNS = (
    "given", "stated", "step in name", "confirmed step", "epoch in name", "confirmed epoch", LONE,
    "stated epoch",
)  # fmt: skip
"""From the surest on."""
_IN_NAMES = {*_SIGNS} - {"stated", "stated epoch"}


@dataclass(frozen=True)
class Times:
    """The times of a run's checkpoints."""

    unit: str
    is_stated: bool  # whether files or the user state the unit
    says: str  # what "numbers are", as the rest of a sentence
    numbers: Sequence[int]  # 0 before the training


# --- one checkpoint


def read_signs(content: Content, settings: ImportSettings, outside: Path | None = None) -> Signs:
    """Find the numbers of a checkpoint, in its content and in its name; the folder `outside`, in
    which all checkpoints lie, says no time."""
    path = content.path
    if settings.step_from is not None:
        reading = _search_path(path, settings)
        return Signs(path, {"given": reading}, _find_value(content, EPOCHS)[1])
    found = {}
    name, stated = _find_value(content, STEPS)
    if stated:
        found["stated"] = Reading(stated, "steps", _describe_origin(name), name)
    epoch_name, epoch = _find_value(content, EPOCHS)
    if epoch is not None:
        found["stated epoch"] = Reading(epoch, "epochs", _describe_origin(epoch_name))
    problem = None
    try:
        named = find_time_in_name(path, outside)
        sign = {"steps": "step in name", "epochs": "epoch in name"}.get(named.unit, "lone")
        found[sign] = named
    except InvalidValueError as error:
        problem = error
    if "step in name" not in found:
        found |= _confirm(content, found.get("lone"))
    if epoch is None:
        epoch = _find_epoch(path)
    return Signs(path, found, epoch, problem)


def _find_value(content: Content, names: Sequence[str]) -> tuple[str, int | None]:
    """Find the first of these keys that states a whole number, and the number."""
    for name in names:
        number = _parse_whole(content.values.get(name))
        if number is not None:
            return name, number
    return "", None


def _parse_whole(value: object) -> int | None:
    """Convert a number, or a text of digits, to an int if it is whole and in range."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not 0 <= value < _MOST or value != int(value):
        return None
    return int(value)


_CONFIRMED: tuple[tuple[str, Unit, Sequence[str]], ...] = (
    ("confirmed step", "steps", STEPS),
    ("confirmed epoch", "epochs", EPOCHS),
)


def _confirm(content: Content, lone: Reading | None) -> dict[str, Reading]:
    """Find the number in a name that a value in the content equals, or is one more than. If a name
    has several numbers, only those from 10 on count: small numbers are equal by chance."""
    digits = re.findall("[0-9]{1,15}", strip_ending(content.path.name))
    numbers = {int(text) for text in digits if len(text) > 1}
    if lone is not None:
        numbers = {lone.number}
    for sign, unit, names in _CONFIRMED:
        for key, value in content.values.items():
            number = _parse_whole(value)
            is_named = key.rpartition(".")[2] in names and not content.is_of_optimizer(key)
            if number is None or not is_named:
                continue
            for each in (number, number - 1):
                if each in numbers:
                    origin = f"the number in names, which {key!r} in the contents confirms"
                    return {sign: Reading(each, unit, origin, key)}
    return {}


def _describe_origin(name: str) -> str:
    """Say where a value was found; its name may also be the name of an option."""
    return f"{name!r} in the contents"


def _search_path(path: Path, settings: ImportSettings) -> Reading:
    """Find the number that the user's pattern matches in a path."""
    pattern = settings.step_from or ""
    match = re.search(pattern, str(path))
    number = read_number(match[1] or "") if match else None
    if match is None or number is None:
        raise InvalidValueError("step_from", f"finds no number in {path}", value=pattern)
    unit: Unit = "epochs"
    if not settings.steps_per_epoch:
        unit = _unit_at(match[0], match.start(1) - match.start())
    return Reading(check_whole_number(path, number), unit, "what the given pattern finds")


def _unit_at(text: str, begin: int) -> Unit:
    """Find what the number at a place of a text counts, by the word before it, or else the word
    behind it; empty if there is no such word."""
    for unit, pattern in _MARKS:
        if any(match.start("number") == begin for match in pattern.finditer(text)):
            return unit
    return ""


def check_whole_number(path: Path, number: float) -> int:
    """Convert a number to an int; raise InvalidValueError if it is not whole or out of range."""
    if not 0 <= number <= _MOST or number != int(number):
        reason = f"its step is {quote(number)}; must be a whole number up to {_MOST:.0e}"
        raise InvalidValueError(path, reason, f"leave it out, or {_describe_pattern()}")
    return int(number)


def find_time_in_name(path: Path, outside: Path | None = None) -> Reading:
    """Find the number in the name of a file or folder: next to a word, else the only number.

    If the name has no number, take it from the name of the parent folder, but only if it stands
    next to such a word, or is the whole name, such as `0000100` or `100.ckpt`: any other number may
    belong to an experiment.
    """
    stem = _SHARD.sub("", strip_ending(path.name))
    has_number = re.search("[0-9]", stem) is not None
    outer = "" if path.parent == outside else strip_ending(path.parent.name)
    name = _METRIC.sub(_keep_time, stem if has_number else outer)
    unit, matches = _find_marks(name)
    is_whole = _LONE.fullmatch(outer) or (outer.isdecimal() and outer != path.parent.name)
    if not matches and (has_number or is_whole):
        matches = [*_ALONE.finditer(name)]
    if len(matches) != 1:
        raise _ask_for_step(path, "its name has no number, or several")
    number = _read_number(matches[0], unit, path)
    if not unit and _DATE.fullmatch(matches[0]["number"]):
        raise _ask_for_step(path, f"'{number}' may be a date")
    return Reading(number, unit, f"the word for {unit} in names" if unit else _ONLY)


def _keep_time(match: re.Match[str]) -> str:
    """Return a decimal behind a word for time, and nothing for any other."""
    return match[0] if _OF_TIME.fullmatch(match["word"]) else ""


_ONLY = "the only number in names"


def read_number_in_names(names: Sequence[str]) -> list[Reading]:
    """Read the only number that differs in all of several names; none if several do, or if it may
    mean something else. Decimals are metrics, but 1.2M is a number."""
    found = []
    for column in zip(*(NUMBER.findall(strip_ending(name)) for name in names), strict=False):
        numbers = [read_number(text) for text in column]
        if all(isinstance(number, int) for number in numbers) and len({*numbers}) == len(names):
            found.append(column)
    is_unclear = any(_GROUPED.search(name) for name in names)
    if len(found) != 1 or is_unclear or any(map(_DATE.fullmatch, found[0])):
        return []
    origin = "the only number that differs in names"
    return [Reading(int(read_number(text) or 0), "", origin) for text in found[0]]


def _read_number(match: re.Match[str], unit: Unit, path: Path) -> int:
    """Read the number of a match: plain digits, or steps as in 1.5k or 2M."""
    parts = match.groupdict("")
    other = parts.get("other", "")
    text = parts["number"] + parts["more"]
    if not other and not parts["more"]:
        return check_whole_number(path, int(text[:20]))
    rest = match.string[match.end("more") :]
    if unit == "steps" and _THOUSANDS.fullmatch(text) and not _GOES_ON.match(rest):
        number = read_number(text)
        if isinstance(number, int):
            return number
    raise _ask_for_step(path, f"{other + text!r} may be something else")


def _find_epoch(path: Path) -> int | None:
    """Find the number next to a word for epochs; None if there is none, or if there are several."""
    matches = _matches(strip_ending(path.name), "epochs")
    return int(matches[0]["number"]) if len(matches) == 1 else None


def _matches(name: str, unit: Unit) -> list[re.Match[str]]:
    """Find the numbers next to a word for a unit."""
    matches = list[re.Match[str]]()
    for other, pattern in _MARKS:
        if other == unit:
            matches += pattern.finditer(name)
    return matches


def _find_marks(name: str) -> tuple[Unit, list[re.Match[str]]]:
    """Find the numbers next to a word, and the unit that the word names."""
    for unit, _ in _MARKS:
        if matches := _matches(name, unit):
            return unit, matches
    return "", [*_CHECKPOINT.finditer(name)]


def _ask_for_step(path: Path, doubt: str) -> InvalidValueError:
    """Make the question which number of a name is the step; the last one is proposed first."""
    reason = f"cannot determine its training step: {doubt}"
    patterns = dict[str, None]()
    for spelled in (_SPELLED, "[0-9]+"):
        patterns |= dict.fromkeys(reversed(_list_patterns(path, spelled).values()))
    if patterns:
        return QuestionError(path, reason, *({"step_from": pattern} for pattern in patterns))
    hint = _describe_pattern()
    if _SECONDS.search(path.name) or not re.search("[0-9]", path.name):
        hint = "leave it out, or rename copies of the files after their steps: step1000.pt"
    return InvalidValueError(path, reason, hint)


def _list_patterns(path: Path, spelled: str) -> dict[str, str]:
    """List the patterns that find the numbers of a name, by these; each finds its number in the
    whole path first, which may have others."""
    found = {}
    end = 0
    for number in re.finditer(spelled, path.name):
        before = re.escape(path.name[end : number.start()]) or "/"
        digits = r"(\d+)"
        if not number[0].isdecimal():
            digits = r"(\d[\d_,]*\d)" if number[0][-1].isdigit() else r"([\d.]+[kmb])"
        end = number.end()
        if _SECONDS.fullmatch(number[0]):
            continue
        behind = re.escape(re.split("[0-9]", path.name[end:], maxsplit=1)[0])
        for after in ("", behind, f"{behind}$"):
            pattern = before + digits + after
            match = re.search(pattern, str(path))
            if match is not None and match.end(1) == len(str(path)) - len(path.name) + end:
                found[number[0]] = pattern
                break
    return found


def _describe_pattern() -> str:
    return rf"import with {argument('step_from')}, a pattern such as 'step(\d+)'"


# --- all checkpoints of a run


def read_times(files: Sequence[Signs], settings: ImportSettings) -> Times:
    """Determine the times of a run's checkpoints, and what their numbers count.

    Raise InvalidValueError if no sign shows them, if two signs contradict each other, or if
    `steps_per_epoch` is given, and the numbers are not epochs.
    """
    sign = sign_of_most(files)
    if sign is None or any(sign not in file.by_sign for file in files):
        raise _explain_no_sign(files)
    numbers = [file.by_sign[sign] for file in files]
    if sign == "stated":
        _check_names(files)
    if any(reading.unit in ("steps", "images") for reading in numbers):
        return _read_steps(files, numbers, settings)
    return _read_unknown_numbers(files, numbers, settings)


def sign_of_most(files: Sequence[Signs]) -> str | None:
    """Find the sign that most files have, of several the surest, among those that tell the files of
    each series apart if there are any; None if no file has a sign."""
    best: tuple[bool, int, int] | None = None
    for rank, sign in enumerate(_SIGNS):
        having = [file for file in files if sign in file.by_sign]
        if having:
            is_distinct = sign == "given" or _are_distinct(having, sign)
            best = max(best or (False, 0, 0), (is_distinct, len(having), -rank))
    return _SIGNS[-best[2]] if best else None


def _explain_no_sign(files: Sequence[Signs]) -> InvalidValueError:
    """Make the error about files whose times no sign shows."""
    first = next((file for file in files if not file.by_sign), files[0])
    hint = "name the files of one run with a glob"
    unsaid = InvalidValueError(first.path, "states no step, nor does its name", hint)
    return first.problem or unsaid


def _are_distinct(files: Sequence[Signs], sign: str) -> bool:
    places = {(file.series, file.by_sign[sign].number) for file in files}
    return len(places) == len({file.path for file in files})


def _check_names(files: Sequence[Signs]) -> None:
    """Raise a QuestionError if the numbers in names are ahead of the steps that contents state:
    VITS stores the epoch as `iteration`, and has the step in the name alone."""
    named = []
    for file in files:
        reading = file.by_sign.get("step in name") or file.by_sign.get("lone")
        if reading is None:
            return
        named.append(reading.number)
    stated = [file.by_sign["stated"].number for file in files]
    ahead = [number - step for number, step in zip(named, stated, strict=True)]
    if min(ahead) <= 1 or len(set(named)) < 2:
        return
    first = files[0]
    reason = f"must be given: {first.by_sign['stated'].origin} is {stated[0]:,} in "
    reason += f"{first.path.name}, behind the {named[0]:,} in its name"
    answers: list[Answer] = []
    for number, pattern in _list_patterns(first.path, "[0-9]+").items():
        if int(number) == named[0]:
            answers.append({"step_from": pattern})
    raise QuestionError("step_from", reason, *answers)


def _read_steps(
    files: Sequence[Signs],
    numbers: Sequence[Reading],
    settings: ImportSettings,
) -> Times:
    _check_one_count(files, numbers)
    unit = "images" if numbers[0].unit == "images" else "steps"
    says = f"{unit}, by {numbers[0].origin}"
    if settings.steps_per_epoch:
        reason = f"does not apply to numbers that are {says}"
        raise InvalidValueError("steps_per_epoch", reason, value=settings.steps_per_epoch)
    return Times(unit, True, says, [reading.number for reading in numbers])


def _read_unknown_numbers(
    files: Sequence[Signs],
    numbers: Sequence[Reading],
    settings: ImportSettings,
) -> Times:
    """Determine the times of checkpoints whose numbers nothing calls steps."""
    as_they_are = [reading.number for reading in numbers]
    why = _explain_epochs(numbers)
    if not why and settings.steps_per_epoch:
        why = f"{argument('steps_per_epoch')} is given"
    ahead = [file.count - number for file, number in zip(files, as_they_are, strict=True)]
    if not why and min(ahead) > 1:
        why = "averages have counted more updates"
    if not why or settings.steps_per_epoch == 1:
        says = f"taken for steps: they are {numbers[0].origin}, and nothing states their unit"
        return Times("steps", settings.steps_per_epoch == 1, says, as_they_are)
    return _read_epochs(files, as_they_are, settings, why)


def _check_one_count(files: Sequence[Signs], numbers: Sequence[Reading]) -> None:
    """Raise InvalidValueError if steps begin anew in each epoch: a later epoch has a step that is
    not later.

    Where names confirm the steps of contents, the epochs may begin anew at a resume.
    """
    pairs = set()
    for file, reading in zip(files, numbers, strict=True):
        named = file.by_sign.get("step in name") or file.by_sign.get("lone")
        is_confirmed = bool(reading.value) and named is not None and named.number == reading.number
        may_begin_anew = not reading.value or reading.value in _ANEW
        if file.epoch is None or is_confirmed or not may_begin_anew:
            return
        pairs.add((file.epoch, reading.number))
    for (epoch, number), (later, later_number) in pairwise(sorted(pairs)):
        if epoch < later and number >= later_number:
            reason = f"must be given: the steps, by {numbers[0].origin}, begin anew in each epoch"
            hint = "rename copies of the files after the step of the whole training"
            raise InvalidValueError("step_from", reason, hint)


def _read_epochs(
    files: Sequence[Signs],
    numbers: Sequence[int],
    settings: ImportSettings,
    why: str,
) -> Times:
    """Determine the times of checkpoints whose numbers are epochs, in steps if these are known."""
    offset = _offset(files, numbers, settings)
    says = f"epochs, counted from {1 - offset}: {why}"
    is_sure = offset or settings.first_epoch is not None
    if not is_sure and not _begin_at_1(numbers):
        says += f", and nothing shows the first: {argument('first_epoch')} is 0 if it is"
    epochs = [number + offset for number in numbers]
    if each := settings.steps_per_epoch:
        steps = [each * epoch for epoch in epochs]
        says += f"; the first checkpoint is of step {min(steps):,}"
        return Times("steps", True, says, steps)
    counts = [file.count for file in files]
    if all(counts) and _spread(counts, epochs) <= _SPREAD:
        says += "; steps are the updates that the averages have counted"
        return Times("steps", True, says, counts)
    return Times("epochs", False, says, epochs)


_SPREAD = 1.01  # of counts of the whole training: torchvision's begin when the rate has risen


def _spread(counts: Sequence[int], epochs: Sequence[int]) -> float:
    """Compute the largest number of updates in an epoch, relative to the smallest."""
    rates = [count / max(epoch, 1) for count, epoch in zip(counts, epochs, strict=True)]
    return max(rates) / min(rates)


def _explain_epochs(numbers: Sequence[Reading]) -> str:
    """Say why the numbers are epochs; empty if they are not."""
    if any(reading.unit == "epochs" for reading in numbers):
        return f"by {numbers[0].origin}"
    distinct = {reading.number for reading in numbers}
    span = max(distinct) - min(distinct)
    if len(distinct) > 1 and span == len(distinct) - 1:
        return "they follow each other without a gap"
    return ""


def _begin_at_1(numbers: Iterable[int]) -> bool:
    """Return whether numbers count every epoch from 1 on, or every k-th one: k, 2 k, ..."""
    ascending = sorted({0, *numbers})
    steps = {after - before for before, after in pairwise(ascending)}
    return len(steps) == 1


def _offset(files: Sequence[Signs], numbers: Sequence[int], settings: ImportSettings) -> int:
    """Return 1 if epochs are counted from 0: if the content's number is one more, if there is an
    epoch 0, or if checkpoints of every k-th epoch have the numbers k - 1, 2 k - 1, ..."""
    if settings.first_epoch is not None:
        return 1 - settings.first_epoch
    if all(file.epoch == number + 1 for file, number in zip(files, numbers, strict=True)):
        return 1
    distinct = sorted({*numbers})
    if distinct[0] == 0:
        return 1
    counts = [file.count for file in files]
    if all(counts):
        later = [number + 1 for number in numbers]
        return int(_spread(counts, later) < min(_spread(counts, numbers), _SPREAD))
    every = math.gcd(*(number - distinct[0] for number in distinct))
    return int(every > 1 and (distinct[0] + 1) % every == 0)
