"""The step of a checkpoint: from a pattern of the user's, its content, or its name; or why none of
them has it.

A number in a name is the step if a word says so, or if it is the only one, and if it is of plain
digits: `1_000`, `1.5k` or a date may mean something else, and a wrong step would put weights at a
wrong time without notice.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from posthoc_cli.checkpoints.index import ENDINGS, IndexedCheckpoint
from posthoc_cli.checkpoints.settings import ImportSettings, read_number
from posthoc_cli.errors import InvalidValueError, shown

_MOST_STEPS = 10**15
_HINT = r"import with `step_from`, a pattern such as 'step(\d+)'"

# what follows digits that are a part of a number, or have a unit
_MORE = r"(?P<more>(?:[.,_-][0-9]+)+|[a-z]+)?"
_STEP = r"(?:steps?|iter(?:ation)?s?)"
_MARKED = (
    re.compile(rf"(?<![a-z]){_STEP}[=_.\- ]*(?P<number>[0-9]+){_MORE}", re.I),
    re.compile(
        rf"(?<![0-9])(?<![0-9][.,_-])(?P<number>[0-9]+)(?P<more>[kmb])?[_\- "
        rf"]?{_STEP}(?![a-z]|[=_.\- ]*[0-9])",
        re.I,
    ),
)
_CHECKPOINT = re.compile(
    rf"(?<![a-z])(?:checkpoint|ckpt)s?[=_.\- ]*(?P<number>[0-9]+){_MORE}", re.I
)
_ALONE = re.compile(
    rf"(?P<other>(?<![a-z])(?:v|version|fp|bf|int|float)[_.\-]?)?(?P<number>[0-9]+){_MORE}", re.I
)
_DATE = re.compile(r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])")
# a number in a name that is no step, such as a decay or a loss
_FRACTION = re.compile(r"(?<![0-9])0\.[0-9]+")


class Reading(NamedTuple):
    """The step in a name, or the doubt about it; and whether a word such as step marks the
    number."""

    step: int | None = None
    doubt: str = ""
    by_word: bool = False


def step_of(
    indexed: IndexedCheckpoint, settings: ImportSettings, is_ema: bool, by_word: str
) -> int:
    """Return the step of a checkpoint; 0 before the training. Raise InvalidValueError if nothing
    tells it.

    Numbers in names of EMAs may count epochs. `by_word` is another checkpoint's name with a word
    such as step, which this name must then have too; or empty.
    """
    path, pattern = indexed.path, settings.step_from
    if pattern is not None:
        match = re.search(pattern, str(path))
        if (number := read_number(match[1] or "") if match else None) is None:
            raise InvalidValueError("step_from", f"finds no number in {path}", value=pattern)
        return checked_step(path, number)
    if (step := indexed.step) is not None:
        return checked_step(path, step)
    named, epoch = named_step(path), indexed.values.get("epoch")
    if is_ema and type(epoch) is int and named.step in (None, epoch, epoch + 1):
        if settings.steps_per_epoch is None:
            reason = (
                f"must be given: {path.name} holds its epoch, {epoch} counted from 0, and "
                f"not its step"
            )
            raise InvalidValueError("steps_per_epoch", reason)
        return checked_step(path, (epoch + 1) * settings.steps_per_epoch)
    if named.step is None or (by_word and not named.by_word):
        doubt = named.doubt or f"no word such as step marks it, as in {shown(by_word)}"
        raise InvalidValueError(
            path, f"neither its content nor its name tells its step: {doubt}", _HINT
        )
    return checked_step(path, named.step)


def checked_step(path: Path, step: float) -> int:
    """Return a step as an int; raise InvalidValueError if it is not a whole number in the allowed
    range."""
    if not 0 <= step <= _MOST_STEPS or step != int(step):
        reason = f"its step is {shown(step)}; must be a whole number up to {_MOST_STEPS:.0e}"
        raise InvalidValueError(path, reason, f"leave it out, or {_HINT}")
    return int(step)


def named_step(path: Path) -> Reading:
    """Return the step in the name of a file or folder: the number next to a word such as step, else
    the only number.

    If the name has no number, use that of the parent folder, only with such a word: it may be that
    of an experiment.
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
        return Reading(doubt="it has no number, or several")
    parts = matches[0].groupdict("")
    other, number, more = parts.get("other", ""), parts["number"], parts["more"]
    if other or more:
        return Reading(doubt=f"{other + number + more!r} may be something else")
    if not marked and _DATE.fullmatch(number):
        return Reading(doubt=f"{number!r} may be a date")
    return Reading(int(number), by_word=bool(by_word))
