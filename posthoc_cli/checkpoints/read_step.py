"""The step of a checkpoint: from a pattern of the user's, its content, or its name; or why none of them has it.

A number in a name is read with its digit groups, decimals, exponent and unit: `step=1_000`, `1,000`, `1.5k`, `1e5`,
`2M-steps`. It is the step if a word says so, or if it is the only number. A number that could mean something else is
refused: a wrong step would put weights at a wrong time without notice.
"""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from posthoc_cli.checkpoints.read_model import ENDINGS, IndexedCheckpoint
from posthoc_cli.errors import InvalidValueError, shown
from posthoc_cli.snapshots.tensorfile import parse_object, read_small_file

_TRAINER_STATE = "trainer_state.json"
_MOST_STATE = 1_000_000_000
_MOST_STEPS = 10**15
_HINT = r"import with `step_from`, a pattern such as 'step(\d+)'"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_MOST_DIGITS = 19

_PLAIN = r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:_[0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:e\+?[0-9]{1,2}(?![0-9]))?"
_NUMBER = re.compile(rf"({_PLAIN})([kmb]?)", re.IGNORECASE)
_TOKEN = rf"(?P<number>{_PLAIN})(?P<unit>[a-z]*)(?P<more>[.,]?[0-9])?"
_STRONG = r"(?:steps?|iter(?:ation)?s?)"
_BEFORE = re.compile(
    rf"(?<![a-z])(?:(?P<strong>{_STRONG})|checkpoints?|ckpts?)(?P<apart>[=_.\- ]*){_TOKEN}", re.IGNORECASE
)
_AFTER = re.compile(
    rf"(?<![0-9.,])(?P<number>{_PLAIN})(?P<unit>[kmb]?)(?P<apart>[_\- ]?)(?P<strong>{_STRONG})(?![a-z]|[=_.\- ]*[0-9])",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"(?P<other>(?<![a-z])(?:v|version|fp|bf|int|float|bfloat)[_.\-]?)?{_TOKEN}", re.IGNORECASE)
_DATE = re.compile(r"(?<![0-9])(?:19|20)[0-9]{2}([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01])(?![0-9])")


class Reading(NamedTuple):
    """The step in a name, which may be no whole number, or the doubt about it; neither if the name has none.

    `by_word` is whether a word such as step marks the number.
    """

    step: float | None = None
    doubt: str = ""
    by_word: bool = False


def step_of(path: Path, indexed: IndexedCheckpoint, step_from: str | None, by_word: str, per_epoch: int | None) -> int:
    """Return the step of a checkpoint, if given by a search for `step_from` in its path.

    Arguments:
        by_word: another checkpoint's name with a word such as step, which this name must then have too; or empty.
        per_epoch: for EMAs the number of steps in an epoch, 0 if unknown, so that the name may count epochs; or None.

    Raises:
        InvalidValueError: neither path, content nor name has the step.
    """
    if step_from is not None:
        match = re.search(step_from, str(path))
        number = None if match is None else read_number(match[1] or "")
        if number is None:
            raise InvalidValueError("step_from", f"finds no number in {path}", value=step_from)
        return checked_step(path, number)
    step = _trainer_step(path) or indexed.step
    if step is None:
        named = named_step(path)
        epoch = indexed.values.get("epoch")
        if per_epoch is not None and type(epoch) is int and named.step in (None, epoch, epoch + 1):
            return checked_step(path, (epoch + 1) * per_epoch or _optimizer_step(path, indexed, epoch))
        if named.doubt or named.step is None:
            doubt = f": {named.doubt}" * bool(named.doubt)
            raise InvalidValueError(path, f"neither its content nor its name tells its step{doubt}", _HINT)
        if by_word and not named.by_word:
            reason = f"its name has no word such as step at its number, as {shown(by_word)} has"
            raise InvalidValueError(path, reason, f"leave it out, or {_HINT}")
        step = named.step
    return checked_step(path, step) if step else 0


def _optimizer_step(path: Path, indexed: IndexedCheckpoint, epoch: int) -> float:
    """Return the number of updates that an optimizer has counted."""
    counted = [value for name, value in indexed.values.items() if name.endswith(".step") and ".state." in name]
    counted += [count for keys in indexed.tensors if keys[-1] == "step" and "state" in keys
                if (count := indexed.number(*keys))]  # fmt: skip
    if not counted:
        reason = f"must be given: {path.name} holds its epoch, {epoch} counted from 0, and not its step"
        raise InvalidValueError("steps_per_epoch", reason)
    return float(max(counted))


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
    name = stem if has_number else path.parent.name
    matches = [*_BEFORE.finditer(name), *_AFTER.finditer(name)]
    matches = [match for match in matches if match["strong"]] or matches
    by_word = bool(matches)
    if has_number and not matches:
        matches = [match for match in _ALONE.finditer(name) if not match["number"].startswith("0.")]  # such as a decay
    return _interpret(name, matches[0], by_word) if len(matches) == 1 else Reading()


def _interpret(name: str, match: re.Match[str], by_word: bool) -> Reading:
    """Return the step that a match of a number in a name means, or why it may mean something else."""
    parts = match.groupdict("")
    number, unit, token = parts["number"], parts["unit"].lower(), match[0]
    is_sure = bool(parts.get("strong"))
    date = next((date for date in _DATE.finditer(name) if date.start() <= match.start("number") < date.end()), None)
    if not is_sure and parts.get("other"):
        return Reading(doubt=f"{token!r} is no step")
    if date is not None and (date[1] or not is_sure):
        return Reading(doubt=f"{date[0]!r} may be a date")
    if "_" in number and "=" not in parts.get("apart", ""):
        return Reading(doubt=f"{number!r} may be one number or several")
    if parts.get("more") and unit in _UNITS:
        return Reading(doubt=f"{number + parts['unit'] + parts['more']!r} is no number")
    if unit not in _UNITS and (unit[0] in "kmbgt" or unit == "e" or not by_word):
        return Reading(doubt=f"{number + parts['unit']!r} has another unit than k, M or B")
    if unit == "b" and not is_sure:
        return Reading(doubt=f"{number + parts['unit']!r} may be the size of the model")
    return Reading(read_number(number + (unit if unit in _UNITS else "")), by_word=by_word)


def _trainer_step(path: Path) -> float | None:
    """Return the step in the state of a transformers Trainer; None if there is none."""
    state = path / _TRAINER_STATE
    if not (path.is_dir() and state.is_file()):
        return None
    step = parse_object(state, read_small_file(state, _MOST_STATE), "state of a Trainer").get("global_step")
    return step if type(step) is int else None


def read_number(text: str) -> float | None:
    """Return the number in a text such as 1500, 1,500, 1_500, 1.5k or 1.5e3, an int if possible; else None."""
    match = _NUMBER.fullmatch(text)
    if match is None or sum(map(str.isdigit, text)) > _MOST_DIGITS:
        return None
    value = Decimal(re.sub("[,_]", "", match[1])) * _UNITS[match[2].lower()]
    return int(value) if value == value.to_integral_value() else float(value)
