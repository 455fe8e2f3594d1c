"""The times of checkpoints: numbers in their contents or names, and what these count.

A number is a step if the content states it, if a word in the name says so, or if a number in the
name is one in the content that is called so. It is an epoch by the same signs, or if the numbers of
the files follow each other without a gap. Any other lone number is taken for a step, which is said.
The files of a run are read by one sign, the first in `_SIGNS` that most have and that tells them
apart.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from posthoc_cli.checkpoints.ask import Answer, QuestionError
from posthoc_cli.checkpoints.containers import strip_ending
from posthoc_cli.checkpoints.content import Content
from posthoc_cli.checkpoints.names import (
    MOST,
    NUMBER,
    SECONDS,
    Unit,
    are_counters,
    find_times,
    has_time,
    hide_dates,
    hide_decimals,
    hide_scores,
    hide_shards,
    make_glob,
    read_name,
    read_number,
)
from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.errors import InvalidValueError, argument, quote
from posthoc_cli.files import escape_glob, is_url, list_in_braces
from posthoc_cli.snapshots.opened_file import read_small_file

STEPS = (
    "global_step", "global_steps", "step", "steps", "step_count", "iter_num", "iteration", "iter",
    "iters", "n_iter", "it", "ss_steps", "train_steps", "num_updates", "batch_idx_train",
    "num_batches_seen", "batch",
)  # fmt: skip
"""Keys of a checkpoint's own values that are steps, or whole paths of those deeper in it; if it has
several, the first one counts."""
EPOCHS = ("epoch", "last_epoch", "current_epoch")
_VALUES: Mapping[Unit, Sequence[str]] = {"steps": STEPS, "epochs": EPOCHS}
_TIMM = 2  # the version of its checkpoints, which state epochs from 0 on, and their architecture
_ANEW = {"step", "steps", "iteration", "iter"}  # values that may begin anew in each epoch
_START = re.compile(r"(?<![a-z])init(?:ial)?(?![a-z])", re.IGNORECASE)
"""In names of weights before the training: their epoch 0 is not the first of several."""
_LONE_FOLDER = re.compile(r"[0-9]{3,}")  # a shorter one may be an experiment's
NEARLY_ALL = 0.9  # share of the files that a pattern must read: one of ten may be named otherwise


@dataclass(frozen=True)
class Time:
    """A number of a checkpoint that may be its time, or is, and what shows that."""

    number: int  # 0 before the training
    unit: Unit  # empty if nothing states it
    origin: str  # where it was found, or what the numbers of a run are, for a message
    key: str = ""  # of the value in the content that shows it
    is_stated: bool = True  # whether files or the user state the unit of a run's times


Signs = Mapping[str, Time]
"""The numbers of one checkpoint, by the sign that shows each, or `COUNTED`."""

LONE = "lone"
COUNTED = "counted"  # updates that its average has counted, one for each step
_SIGNS = (
    "given", "stated", "step in name", "confirmed steps", "epoch in name", "confirmed epochs", LONE,
    "stated epoch",
)  # fmt: skip
"""From the surest on."""
STATED = ("stated", "stated epoch")
_IN_NAMES = {*_SIGNS} - {*STATED}
IN_NAME: Mapping[Unit, str] = {"steps": "step in name", "epochs": "epoch in name", "": LONE}


def has_word(signs: Signs) -> bool:
    """Return whether a word in a name, or a pattern, says the time."""
    return not {"given", "step in name", "epoch in name"}.isdisjoint(signs)


def is_numbered(path: Path, signs: Signs) -> bool:
    """Return whether a name has a number that may be a time: no decimal, and behind no word such as
    `v` or `avg`."""
    marks = read_name(strip_ending(path.name))
    return not _IN_NAMES.isdisjoint(signs) or any(mark.word != "other" for mark in marks)


# --- one checkpoint


def read_signs(content: Content, settings: ImportSettings, outside: Path | None = None) -> Signs:
    """Find the numbers of a checkpoint, in its content and in its name; the folder `outside`, in
    which all checkpoints lie, says no time."""
    found = dict[str, Time]()
    if epoch := _find_value(content, "epochs"):
        if content.values.get("version") == _TIMM and "arch" in content.values:
            epoch = replace(epoch, number=epoch.number + 1)
        if epoch.number or not _START.search(content.path.name):
            found["stated epoch"] = epoch
    if settings.step_from is not None:
        return {**found, "given": _search_path(content.path, settings)}
    stated = _find_value(content, "steps")
    if stated is not None and stated.number:
        found["stated"] = stated
    name = _name_with_time(content.path, outside)
    epochs = [mark for mark in read_name(name) if mark.unit == "epochs"]
    for marks in (epochs, find_times(name)):
        if len(marks) == 1 and marks[0].number is not None:
            unit = marks[0].unit
            origin = f"the word for {unit} in names" if unit else "the only number in names"
            found[IN_NAME[unit]] = Time(marks[0].number, unit, origin)
    if "step in name" not in found:
        found |= confirm(content, found.get(LONE))
    if stated is not None and found.keys() <= {"stated epoch"}:
        found["stated"] = stated  # the start, of step 0
    return found


def _find_value(content: Content, unit: Unit) -> Time | None:
    """Find the first key for a unit that states a whole number."""
    for key in _VALUES[unit]:
        number = _parse_whole(content.values.get(key))
        if number is not None:  # the name may also be that of an option
            return Time(number, unit, f"{key!r} in the contents", key)
    return None


def _parse_whole(value: object) -> int | None:
    """Convert a number, or a text of digits, to an int if it is whole and in range."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return int(value) if 0 <= value < MOST and value == int(value) else None


def _name_with_time(path: Path, outside: Path | None) -> str:
    """Find the name that may say the time of a file or folder: its own if it has numbers that may
    be times, else that of the folder around it.

    The latter counts only if a word is beside its number, or if it is the whole name, such as
    `0000100` or `100.ckpt`: any other number may belong to an experiment. A revision in the cache
    of a hub is called by its reference, such as `step1000`.
    """
    name = _find_reference(path) or strip_ending(path.name)
    if any(mark.word != "other" for mark in read_name(name)) or path.parent == outside:
        return name
    outer = strip_ending(path.parent.name)
    is_whole = _LONE_FOLDER.fullmatch(outer) or (outer.isdecimal() and outer != path.parent.name)
    return outer if is_whole or any(mark.word for mark in find_times(outer)) else ""


_REVISION = re.compile("[0-9a-f]{40}")
_REFERENCE = 41  # bytes of a file that names a revision, with the end of its line


def _find_reference(path: Path) -> str:
    """Find the reference to a revision in a hub's cache, `snapshots/<hash>`: one with a time before
    others, such as `main`. Empty if there is none."""
    is_revision = path.parent.name == "snapshots" and _REVISION.fullmatch(path.name)
    if not is_revision or is_url(path):
        return ""
    named = []
    for file in sorted((path.parent.parent / "refs").glob("*")):
        is_reference = file.is_file() and file.stat().st_size <= _REFERENCE
        if is_reference and read_small_file(file, _REFERENCE).strip() == path.name.encode():
            named.append(file.name)
    return max(named, key=has_time, default="")


def confirm(content: Content, lone: Time | None) -> dict[str, Time]:
    """Find the number in a name that a value in the content equals, or is one more than. If a name
    has several numbers, only those from 10 on count: small numbers are equal by chance."""
    digits = re.findall("[0-9]{2,15}", strip_ending(content.path.name))
    numbers = {*map(int, digits)} if lone is None else {lone.number}
    for unit, names in _VALUES.items():
        for key, value in content.values.items():
            number = _parse_whole(value)
            is_named = key.rpartition(".")[2] in names and not content.is_of_optimizer(key)
            if number is None or not is_named:
                continue
            for each in (number, number - 1):
                if each in numbers:
                    origin = f"the number in names, which {key!r} in the contents confirms"
                    return {f"confirmed {unit}": Time(each, unit, origin, key)}
    return {}


def _search_path(path: Path, settings: ImportSettings) -> Time:
    """Find the number that the user's pattern matches in a path, and what the word beside it
    says."""
    pattern = settings.step_from or ""
    match = re.search(pattern, str(path))
    number = read_number(match[1] or "") if match else None
    if match is None or number is None:
        raise InvalidValueError("step_from", f"finds no number in {path}", value=pattern)
    unit: Unit = "epochs" if settings.steps_per_epoch else ""
    for mark in read_name(match[0]):
        if mark.begin == match.start(1) - match.start():
            unit = unit or mark.unit
    return Time(check_whole_number(path, number), unit, "what the given pattern finds")


def check_whole_number(path: Path, number: float) -> int:
    """Convert a number to an int; raise InvalidValueError if it is not whole or out of range."""
    if not 0 <= number <= MOST or number != int(number):
        reason = f"its step is {quote(number)}; must be a whole number up to {MOST:.0e}"
        raise InvalidValueError(path, reason, f"leave it out, or {_describe_pattern()}")
    return int(number)


GROUPED = re.compile(r"(?<![0-9])(?<![0-9]\.)[0-9]{1,3}(?:[_,][0-9]{3})+(?![0-9])")  # 1_000


def read_varying(names: Sequence[str]) -> list[Time]:
    """Read the only number that differs in all of several names, but for dates; none if several do,
    or if it may mean something else. Decimals are metrics, but 1.2M is a number."""
    names = [hide_scores(hide_dates(strip_ending(name))) for name in names]
    found = []
    for column in zip(*map(NUMBER.findall, names), strict=False):
        numbers = [read_number(text) for text in column]
        if all(isinstance(number, int) for number in numbers) and len({*numbers}) == len(names):
            found.append(column)
    is_unclear = any(GROUPED.search(name) for name in names)
    if len(found) != 1 or is_unclear or any(map(_is_date, found[0])):
        return []
    origin = "the only number that differs in names"
    return [Time(int(read_number(text) or 0), "", origin) for text in found[0]]


def _is_date(text: str) -> bool:
    return text.isdecimal() and read_name(text)[0].number is None


# --- questions about the number in a name

_SPELLING = r"[0-9]{1,3}(?:[_,][0-9]{3})+(?![0-9kmb])|[0-9]+(?:\.[0-9]+)?[kmb](?![a-z0-9])|[0-9]+"
"""1_000, 1.5k or 1000."""


def _ask_for_step(path: Path, files: Iterable[Path]) -> InvalidValueError:
    """Make the question which number of a name is the step, of a file among others."""
    marks = find_times(_name_with_time(path, path.parent))
    doubt = "its name has no number, or several"
    if len(marks) == 1:
        doubt = f"{marks[0].text!r} may be something else"
    reason = f"cannot determine its training step: {doubt}"
    answers = list_patterns(path, files)
    rename = "leave it out, or rename copies of the files after their steps: step1000.pt"
    if not answers:
        return InvalidValueError(path, reason, rename)
    return QuestionError(path, reason, *answers, otherwise=rename)


def list_patterns(path: Path, files: Iterable[Path]) -> list[Answer]:
    """List the answers by patterns that each find one number of a name, in nearly all files: first
    one whose numbers are as evenly spaced as times are, then the last one; numbers behind words
    such as `seed` come last."""
    names = _names_below(files)
    hide = _hide_counted if are_counters(names.values()) else _hide_metrics
    spellings = [_SPELLING, "[0-9]+"] if _are_grouped(names.values()) else ["[0-9]+", _SPELLING]
    if "kK" in _generalise(names[path]):
        spellings = [_SPELLING]  # the digits of 1.5k alone are no steps
    ranks = dict[str, tuple[int, bool, int, bool, int]]()
    for order, spelled in enumerate(spellings):
        for (is_free, end), pattern in _find_patterns(names[path], hide(names[path]), spelled):
            matches = [*filter(None, (re.search(pattern, name) for name in names.values()))]
            is_even = _are_even(read_number(match[1]) or 0 for match in matches)
            ranks.setdefault(pattern, (len(matches), is_free, -order, is_even, end))
    most = max((rank[0] for rank in ranks.values()), default=0)
    if most < NEARLY_ALL * len(names):
        return []
    likely = [pattern for pattern, rank in ranks.items() if rank[0] == most]
    in_order = sorted(likely, key=ranks.__getitem__, reverse=True)
    return [{"step_from": pattern} for pattern in in_order]


def _names_below(files: Iterable[Path]) -> dict[Path, str]:
    """Find the names of files; their paths from the folder of all on, if all have one name."""
    names = {file: file.name for file in files}
    if len(names) == 1 or len({*names.values()}) > 1:
        return names
    common = os.path.commonpath([str(file) for file in names])
    return {file: str(file)[len(common) + 1 :] for file in names}


def _are_grouped(names: Iterable[str]) -> bool:
    """Return whether digits such as 42_100 are one number: the 42 differs among files, none begins
    with 0, and none is as long as in 4200_100."""
    together = " ".join(names)
    first = {re.split("[_,]", text)[0] for text in GROUPED.findall(together)}
    if len(first) < 2 or any(text.startswith("0") for text in first):
        return False
    return not re.search("[0-9]{4}[_,][0-9]{3}(?![0-9])", together)


def _are_even(numbers: Iterable[float]) -> bool:
    """Return whether most intervals between numbers are equal, and none is 0."""
    intervals = Counter(after - before for before, after in pairwise(sorted(numbers)))
    return 0 not in intervals and 2 * max(intervals.values(), default=0) > intervals.total()


def _hide_counted(name: str) -> str:
    """Hide the parts of dates, and the numbers of shards."""
    return hide_scores(hide_dates(hide_shards(name)))


def _hide_metrics(name: str) -> str:
    return hide_decimals(_hide_counted(name))


def _find_patterns(name: str, hidden: str, spelled: str) -> Iterator[tuple[tuple[bool, int], str]]:
    """Find the patterns of a name that each find one of its numbers, by how these are spelled, and
    its place: none that is `hidden`. What stands before it may be a hash of each file."""
    others = {mark.begin for mark in read_name(name) if mark.word == "other"}
    for number in re.finditer(spelled, hidden, re.IGNORECASE):
        if SECONDS.fullmatch(number[0]):
            continue
        place = (number.start() not in others, number.end())
        before = name[: number.start()]
        found = f"({_generalise(number[0])}){_generalise(name[number.end() :])}$"
        yield place, _generalise(before) + found
        yield place, _generalise(before[-1:]) + found


def _generalise(text: str) -> str:
    """Make the pattern of a text in which its numbers may be others."""
    pattern = ""
    end = 0
    for number in re.finditer(_SPELLING, text, re.IGNORECASE):
        digits = r"\d+"
        if not number[0].isdecimal():
            digits = "[0-9.]+[kKmMbB]" if number[0][-1].isalpha() else r"\d[\d_,]*"
        pattern += re.escape(text[end : number.start()]) + digits
        end = number.end()
    return pattern + re.escape(text[end:])


def _describe_pattern() -> str:
    return rf"import with {argument('step_from')}, a pattern such as 'step(\d+)'"


# --- all checkpoints of a run


def read_times(files: Mapping[Path, Signs], settings: ImportSettings) -> list[Time]:
    """Determine the times of a run's checkpoints, and what their numbers count: `origin` says what
    "numbers are", as the rest of a sentence.

    Raise InvalidValueError if no sign shows them, if two signs contradict each other, or if
    `steps_per_epoch` is given, and the numbers are not epochs.
    """
    sign = sign_of_most(files)
    for path, signs in files.items():
        if sign not in signs:
            raise _ask_for_step(path, files)
    if sign is not None and not _are_told_apart(files, sign):
        _ask_for_another(files, sign)
    return _Clock(files, [signs[sign or ""] for signs in files.values()], settings).read()


def sign_of_most(files: Mapping[Path, Signs]) -> str | None:
    """Find the sign that most files have, of several the surest, among those that tell the files of
    each series apart if there are any; None if no file has a sign."""
    best: tuple[bool, int, int] | None = None
    for rank, sign in enumerate(_SIGNS):
        count = sum(sign in signs for signs in files.values())
        if count:
            rating = (_are_told_apart(files, sign), count, -rank)
            best = max(best or rating, rating)
    return _SIGNS[-best[2]] if best else None


def _are_told_apart(files: Mapping[Path, Signs], sign: str) -> bool:
    """Return whether a sign tells the files of each series apart, or is the user's own."""
    signed = {path: signs[sign].number for path, signs in files.items() if sign in signs}
    numbers = [(_series(path), number) for path, number in signed.items()]
    return sign == "given" or len({*numbers}) == len(numbers)


def _ask_for_another(files: Mapping[Path, Signs], sign: str) -> None:
    """Raise a QuestionError if the numbers of a sign are equal in several files: the times may be
    another number in names, as in `ep00-gs00100` and `ep00-gs00200`; or a few are one too many."""
    kept = dict[tuple[str, int], Path]()
    twins = []
    for path, signs in files.items():
        first = kept.setdefault((_series(path), signs[sign].number), path)
        if first != path:
            twins.append(f"{first.name} and {path.name}")
    path, signs = next(iter(files.items()))
    reason = f"must be given: {twins[0]} have the same number, by {signs[sign].origin}"
    answers = list_patterns(path, files)
    if len(kept) >= NEARLY_ALL * len(files) and len({each.parent for each in files}) == 1:
        names = list_in_braces(each.name for each in kept.values())
        answers.append({"place": f"{escape_glob(str(path.parent))}/{names}"})
    if answers:
        raise QuestionError("step_from", reason, *answers)


def _series(path: Path) -> str:
    """Make the glob of a file and its folder, which the names of a series share."""
    return make_glob(f"{path.parent.name}/{path.name}")


def ask_about_names(files: Mapping[Path, Signs], named: str, stated: str) -> QuestionError:
    """Make the question whether the numbers in names are the times, which contents contradict: VITS
    stores the epoch as `iteration`, and has the step in the name alone."""
    path, signs = next(iter(files.items()))
    number = signs[named].number
    reason = f"must be given: {signs[stated].origin} is {signs[stated].number:,} in {path.name}, "
    reason += f"whose name says {number:,}"
    answers = []
    for answer in list_patterns(path, files):
        match = re.search(answer["step_from"], path.name)
        if match and read_number(match[1]) == number:
            answers.append(answer)
    rename = "rename copies of the files after their steps: step1000.pt"
    return QuestionError("step_from", reason, *answers, otherwise=rename)


@dataclass(frozen=True)
class _Clock:
    """The numbers of a run's checkpoints, by one sign."""

    files: Mapping[Path, Signs]
    numbers: Sequence[Time]
    settings: ImportSettings

    def read(self) -> list[Time]:
        """Determine the times that the numbers are."""
        first = self.numbers[0]
        each = self.settings.steps_per_epoch
        if not {"steps", "images"}.isdisjoint(time.unit for time in self.numbers):
            self._check_one_count()
            unit: Unit = "images" if first.unit == "images" else "steps"
            says = f"{unit}, by {first.origin}"
            self._refuse("steps_per_epoch", says)
            self._refuse("first_epoch", says)
            return self._as(unit, says)
        why = self._why_epochs()
        if why and each != 1:
            return self._read_epochs(why)
        says = f"taken for steps: they are {first.origin}, and nothing states their unit"
        self._refuse("first_epoch", says)
        return self._as("steps", says, is_stated=each == 1)

    def _refuse(self, setting: str, says: str) -> None:
        """Raise InvalidValueError if a setting of epochs is given."""
        value = getattr(self.settings, setting)
        if value is not None:
            reason = f"does not apply to numbers that are {says}"
            raise InvalidValueError(setting, reason, value=value)

    def _as(
        self,
        unit: Unit,
        says: str,
        numbers: Iterable[int] | None = None,
        is_stated: bool = True,
    ) -> list[Time]:
        """Take the numbers, or others, for times."""
        if numbers is None:
            numbers = [time.number for time in self.numbers]
        return [Time(number, unit, says, is_stated=is_stated) for number in numbers]

    @property
    def _counts(self) -> list[int]:
        """The updates that averages have counted; 0 for others."""
        return [signs[COUNTED].number if COUNTED in signs else 0 for signs in self.files.values()]

    def _check_one_count(self) -> None:
        """Raise InvalidValueError if steps begin anew in each epoch: a later epoch has a step that
        is not later."""
        pairs = set()
        for signs, time in zip(self.files.values(), self.numbers, strict=True):
            epoch = signs.get("stated epoch") or signs.get("epoch in name")
            if epoch is None or (time.key and time.key not in _ANEW):
                return
            pairs.add((epoch.number, time.number))
        for (before, number), (later, later_number) in pairwise(sorted(pairs)):
            if before < later and number >= later_number:
                origin = self.numbers[0].origin
                reason = f"must be given: the steps, by {origin}, begin anew in each epoch"
                hint = "rename copies of the files after the step of the whole training"
                raise InvalidValueError("step_from", reason, hint)

    def _why_epochs(self) -> str:
        """Say why the numbers are epochs; empty if they are not."""
        distinct = {time.number for time in self.numbers}
        if any(time.unit == "epochs" for time in self.numbers):
            return f"by {self.numbers[0].origin}"
        if len(distinct) > 1 and are_gapless(distinct):
            return "they follow each other without a gap"
        if self.settings.steps_per_epoch:
            return f"{argument('steps_per_epoch')} is given"
        counts = zip(self._counts, self.numbers, strict=True)
        if min(count - time.number for count, time in counts) > 1:
            return "averages have counted more updates"
        return ""

    def _read_epochs(self, why: str) -> list[Time]:
        """Determine times in epochs, or in steps if these are known."""
        numbers = [time.number for time in self.numbers]
        first = self.settings.first_epoch
        offset = self._find_offset() if first is None else 1 - first
        says = f"epochs, counted from {1 - offset}: {why}"
        if not offset and first is None and not _begin_at_1(numbers):
            says += f", and nothing shows the first: {argument('first_epoch')} is 0 if it is"
        epochs = [number + offset for number in numbers]
        if each := self.settings.steps_per_epoch:
            steps = [each * epoch for epoch in epochs]
            says += f"; the first checkpoint is of step {min(steps):,}"
            return self._as("steps", says, steps)
        if self._spread(epochs) <= _SPREAD:
            says += "; steps are the updates that the averages have counted"
            return self._as("steps", says, self._counts)
        return self._as("epochs", says, epochs, is_stated=False)

    def _find_offset(self) -> int:
        """Return 1 if epochs are counted from 0: if the content's number is one more, if there is
        an epoch 0, or if checkpoints of every k-th epoch have the numbers k - 1, 2 k - 1, ..."""
        numbers = [time.number for time in self.numbers]
        later = [number + 1 for number in numbers]
        stated = [signs.get("stated epoch") for signs in self.files.values()]
        if [time and time.number for time in stated] == later or 0 in numbers:
            return 1
        if all(self._counts):
            return int(self._spread(later) < min(self._spread(numbers), _SPREAD))
        every = math.gcd(*(number - numbers[0] for number in numbers))
        return int(every > 1 and later[0] % every == 0)

    def _spread(self, epochs: Sequence[int]) -> float:
        """Compute the largest number of counted updates in an epoch, relative to the smallest;
        infinity if an average has counted none."""
        rates = [count / max(epoch, 1) for count, epoch in zip(self._counts, epochs, strict=True)]
        return max(rates) / min(rates) if all(rates) else math.inf


def are_gapless(numbers: Collection[int]) -> bool:
    """Return whether distinct numbers follow each other."""
    return len(numbers) == max(numbers) - min(numbers) + 1


_SPREAD = 1.01  # of counts of the whole training: torchvision's begin when the rate has risen


def _begin_at_1(numbers: Iterable[int]) -> bool:
    """Return whether numbers count every epoch from 1 on, or every k-th one: k, 2 k, ..."""
    return len({after - before for before, after in pairwise(sorted({0, *numbers}))}) == 1
