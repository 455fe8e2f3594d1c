"""The step of a checkpoint: from a pattern of the user's, its content, or its name; or why none of them has it.

A number in a name is the step if a word says so, or if it is the only one, and if it is of plain digits: `1_000`,
`1.5k` or a date may mean something else, and a wrong step would put weights at a wrong time without notice.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from posthoc_cli.checkpoints.index import ENDINGS, IndexedCheckpoint
from posthoc_cli.errors import InvalidValueError, shown
from posthoc_cli.snapshots.tensorfile import parse_object, read_small_file

_MOST_STATE = 1_000_000_000
_MOST_STEPS = 10**15
_MOST_DIGITS = 19
_HINT = r"import with `step_from`, a pattern such as 'step(\d+)'"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_NUMBER = re.compile(
    r"((?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:_[0-9]{3})+)|[0-9]+)(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)([kmb]?)", re.I
)

_MORE = r"(?P<more>(?:[.,_-][0-9]+)+|[a-z]+)?"
"""What follows digits that are only a part of a number, or have a unit."""
_STEP = r"(?:steps?|iter(?:ation)?s?)"
_MARKED = (
    re.compile(rf"(?<![a-z]){_STEP}[=_.\- ]*(?P<number>[0-9]+){_MORE}", re.I),
    re.compile(
        rf"(?<![0-9])(?<![0-9][.,_-])(?P<number>[0-9]+)(?P<more>[kmb])?[_\- ]?{_STEP}(?![a-z]|[=_.\- ]*[0-9])", re.I
    ),
)
_CHECKPOINT = re.compile(rf"(?<![a-z])(?:checkpoint|ckpt)s?[=_.\- ]*(?P<number>[0-9]+){_MORE}", re.I)
_ALONE = re.compile(rf"(?P<other>(?<![a-z])(?:v|version|fp|bf|int|float)[_.\-]?)?(?P<number>[0-9]+){_MORE}", re.I)
_DATE = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])")
_FRACTION = re.compile(r"(?<![0-9])0\.[0-9]+")
"""A number in a name that is no step, such as a decay or a loss."""


class Reading(NamedTuple):
    """The step in a name, or the doubt about it, or neither; and whether a word such as step marks the number."""

    step: int | None = None
    doubt: str = ""
    by_word: bool = False


def step_of(indexed: IndexedCheckpoint, step_from: str | None, by_word: str, per_epoch: int | None) -> int:
    """Return the step of a checkpoint, if given by a search for `step_from` in its path; 0 before the training.

    Arguments:
        by_word: another checkpoint's name with a word such as step, which this name must then have too; or empty.
        per_epoch: for EMAs the number of steps in an epoch, 0 if unknown, so that the name may count epochs; or None.

    Raises:
        InvalidValueError: neither path, content nor name has the step.
    """
    path = indexed.path
    if step_from is not None:
        match = re.search(step_from, str(path))
        number = read_number(match[1] or "") if match else None
        if number is None:
            raise InvalidValueError("step_from", f"finds no number in {path}", value=step_from)
        return checked_step(path, number)
    state, step = path / "trainer_state.json", None
    if path.is_dir() and state.is_file():
        step = parse_object(state, read_small_file(state, _MOST_STATE), "state of a Trainer").get("global_step")
    step = (step if type(step) is int else None) or indexed.step
    if step is None:
        named, epoch, reason, hint = named_step(path), indexed.values.get("epoch"), "", _HINT
        if per_epoch is not None and type(epoch) is int and named.step in (None, epoch, epoch + 1):
            if per_epoch:
                return checked_step(path, (epoch + 1) * per_epoch)
            reason = f"must be given: {path.name} holds its epoch, {epoch} counted from 0, and not its step"
            raise InvalidValueError("steps_per_epoch", reason)
        if named.step is None:
            reason = f"neither its content nor its name tells its step{': ' * bool(named.doubt)}{named.doubt}"
        elif by_word and not named.by_word:
            reason = f"its name has no word such as step at its number, as {shown(by_word)} has"
            hint = f"leave it out, or {_HINT}"
        if reason:
            raise InvalidValueError(path, reason, hint)
        step = named.step
    return checked_step(path, step) if step else 0


def checked_step(path: Path, step: float) -> int:
    """Return a step as an int; raise InvalidValueError if it is not a whole number in the allowed range."""
    if not 0 < step <= _MOST_STEPS or step != int(step):
        reason = f"its step is {shown(step)}; must be a whole number from 1 to {_MOST_STEPS:.0e}"
        raise InvalidValueError(path, reason, f"leave it out, or {_HINT}")
    return int(step)


def named_step(path: Path) -> Reading:
    """Return the step in the name of a file or folder: the number next to a word such as step, else the only number.

    If the name has no number, use that of the parent folder, only with such a word: it may be that of an experiment.
    """
    stem = path.name
    for ending in ENDINGS:
        stem = stem.removesuffix(ending)
    has_number = re.search("[0-9]", stem) is not None
    name = _FRACTION.sub("", stem if has_number else path.parent.name)
    marked = [match for pattern in _MARKED for match in pattern.finditer(name)]
    by_word = marked or [*_CHECKPOINT.finditer(name)]
    matches = by_word or [*_ALONE.finditer(name)] * has_number
    if len(matches) != 1:
        return Reading()
    parts = matches[0].groupdict("")
    other, number, more = parts.get("other", ""), parts["number"], parts["more"]
    if other or more:
        return Reading(doubt=f"{other + number + more!r} may be something else")
    if not marked and _DATE.fullmatch(number):
        return Reading(doubt=f"{number!r} may be a date")
    return Reading(int(number) if len(number) <= _MOST_DIGITS else None, by_word=bool(by_word))


def read_number(text: str) -> float | None:
    """Return the number in a text such as 1500, 1,500, 1_500, 1.5k or 1.5e3, an int if possible; else None."""
    match = _NUMBER.fullmatch(text)
    if match is None or sum(map(str.isdigit, text)) > _MOST_DIGITS:
        return None
    value = Decimal(re.sub("[,_]", "", match[1])) * _UNITS[match[2].lower()]
    return int(value) if value == value.to_integral_value() else float(value)
