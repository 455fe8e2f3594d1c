"""The step in the name of a checkpoint, or why the name does not tell it.

A number counts with its digit groups, decimals, exponent and unit: `step=1_000`, `1,000`, `1.5k`, `1e5`, `2M-steps`.
It is the step if a word says so, or if it is the only number. What could also mean something else is refused: a wrong
step would put weights at a wrong time in silence.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import NamedTuple

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_MOST_DIGITS = 19

_PLAIN = r"(?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:_[0-9]{3})+)(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:e\+?[0-9]{1,2}(?![0-9]))?"
_NUMBER = re.compile(rf"({_PLAIN})([kmb]?)", re.IGNORECASE)
_TOKEN = rf"(?P<number>{_PLAIN})(?P<unit>[a-z]*)(?P<more>[.,]?[0-9])?"
_STRONG = r"(?:steps?|iter(?:ation)?s?)"
_BEFORE = re.compile(
    rf"(?<![a-z])(?:(?P<strong>{_STRONG})|checkpoints?|ckpts?)(?P<apart>[=_.\- ]*){_TOKEN}", re.IGNORECASE
)
_BEHIND = re.compile(
    rf"(?<![0-9.,])(?P<number>{_PLAIN})(?P<unit>[kmb]?)(?P<apart>[_\- ]?)(?P<strong>{_STRONG})(?![a-z]|[=_.\- ]*[0-9])",
    re.IGNORECASE,
)
_ALONE = re.compile(rf"(?P<other>(?<![a-z])(?:v|version|fp|bf|int|float|bfloat)[_.\-]?)?{_TOKEN}", re.IGNORECASE)
_DATE = re.compile(r"(?<![0-9])(?:19|20)[0-9]{2}([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01])(?![0-9])")


class Reading(NamedTuple):
    """What a name says: a step, which may be no whole number, or why it is in doubt; neither where there is none.

    `by_word` is whether a word such as step says so.
    """

    step: float | None = None
    doubt: str = ""
    by_word: bool = False


def read_number(text: str) -> float | None:
    """The number that a text is, such as 1500, 1,500, 1_500, 1.5k or 1.5e3, an int if whole; None if it is none."""
    match = _NUMBER.fullmatch(text)
    if match is None or sum(map(str.isdigit, text)) > _MOST_DIGITS:
        return None
    value = Decimal(re.sub("[,_]", "", match[1])) * _UNITS[match[2].lower()]
    return int(value) if value == value.to_integral_value() else float(value)


def read_name(name: str, words_only: bool = False) -> Reading:
    """The step that a name tells, without the ending of its file: by a word, else by its only number."""
    found = [*_BEFORE.finditer(name), *_BEHIND.finditer(name)]
    found = [match for match in found if match["strong"]] or found
    by_word = bool(found)
    if not found and not words_only:
        found = [*_ALONE.finditer(name)]
    if len(found) != 1:
        return Reading()
    return _read(name, found[0], by_word)


def _read(name: str, match: re.Match[str], by_word: bool) -> Reading:
    parts = match.groupdict("")
    number, unit, token = parts["number"], parts["unit"].lower(), match[0]
    is_sure = bool(parts.get("strong"))
    date = next((one for one in _DATE.finditer(name) if one.start() <= match.start("number") < one.end()), None)
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
