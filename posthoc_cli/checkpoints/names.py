"""The numbers in the names of files and folders, and what the words beside them say.

A decimal in a name is a metric, unless a word for time precedes it. Any other number counts if it
is of plain digits, or as `step_1.5k`: `1_000`, another `1.5k` or a date may mean something else,
and a wrong step would put weights at a wrong time without notice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Unit = Literal["steps", "epochs", "images", ""]

NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?(?:[kmb](?![a-z0-9]))?", re.IGNORECASE)
"""A number in a name: a step, also as 1.2M, an epoch, or a metric."""
_LENGTH = re.compile(
    r"(?<![a-z])(?:emas?|decay|sigma|rel|beta|avg)[a-z_=-]{0,9}(0?\.[0-9]+)", re.IGNORECASE
)
"""A number behind a word for decay or width: it says which average a file holds."""

_MARK = re.compile(
    r"""
    (?: (?<![a-z]) (?:
        (?P<before> steps? | iter(?:ation)?s? | ep(?:och)?s? | (?:checkpoint|ckpt)s? ) [=_.\-\ ]*
      | (?P<other> (?: v | version | avg | ave | fp | bf | int | float | fold | seed | copy
                     | rank | worker | gpu | node | acc | loss | fid | psnr | wer | m?ap | m?iou
                     | auc | dice ) [_.=\-]? ) ) )?
    (?P<digits> [0-9]+ (?:[.,_-][0-9]+)*
                (?: [kmb] (?= (?:steps?|iter(?:ation)?s?)? (?![a-z0-9]) ) )? )
    (?: [_\-\ ]? (?P<behind> steps? | iter(?:ation)?s? | ep(?:och)?s? ) (?![a-z]|[=_.\-\ ]*[0-9])
      | (?P<attached> [a-z]+ ) )?
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""A number with the words beside it. Numbers that a `_`, `-`, comma or point alone joins are one,
such as a date."""
_METRIC = re.compile(
    r"(?P<word>[a-z]*)[=_-]?(?<![0-9.,])[0-9]+(?:\.[0-9]+(?![0-9.,]|[_,][0-9]|[kmb])|e-[0-9]+)",
    re.IGNORECASE,
)
_SCORE = re.compile(
    r"(?<![a-z])(?:acc|loss|fid|psnr|wer|m?ap|m?iou|auc|dice)[_.=-]?[0-9]+"
    r"(?![0-9]|\.[0-9]|[_\- ]?(?:step|it|ep))",
    re.IGNORECASE,
)
"""A metric that is a whole number."""
_OF_TIME = re.compile("steps?|iter(?:ation)?s?|ep(?:och)?s?|checkpoint|ckpt", re.IGNORECASE)
_WORDS = {"s": "steps", "i": "steps", "e": "epochs", "c": "checkpoint"}  # by their first letters
_SHARD = re.compile(r"[0-9]+-of-[0-9]+")  # a number "of" several
_THOUSANDS = re.compile(r"[0-9]+(?:\.[0-9]+)?[km]", re.IGNORECASE)
SECONDS = re.compile(r"1[5-9][0-9]{8}(?:[0-9]{3})?")  # or thousandths, of 2017 to 2033
_DATE = re.compile(
    r"(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12][0-9]|3[01])(?:[0-9]{4}|[0-9]{6})?|"
    + SECONDS.pattern
)
_MOMENT = re.compile(
    r"""
    (?<![0-9]) (?:19|20)[0-9]{2} (?:
        (?P<join>[-_.]) (?:0[1-9]|1[0-2]) (?P=join) (?:0[1-9]|[12][0-9]|3[01])
        (?: [-_.T\ ] (?:[01][0-9]|2[0-3]) [-_.:h]? [0-5][0-9] (?: [-_.:m]? [0-5][0-9] )? )?
      | (?:0[1-9]|1[0-2]) (?:0[1-9]|[12][0-9]|3[01]) [-_T]
        (?:[01][0-9]|2[0-3]) [0-5][0-9] [0-5][0-9]
    ) (?![0-9])
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""A date in parts, such as 2024-05-01 or 20240501-123000: none of its numbers is a step."""
_DECIMAL = re.compile(r"(?<![0-9])[0-9]+\.[0-9]+(?![0-9]|\.[0-9]|[kmb])", re.IGNORECASE)
MOST = 10**15
"""The largest number that is read as a time."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
_SPELLED = re.compile(
    r"((?:[0-9]{1,3}(?:(?:,[0-9]{3})+|(?:_[0-9]{3})+)|[0-9]+)(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)([kmb]?)",
    re.IGNORECASE,
)


def read_number(text: str) -> float | None:
    """Read the number in a text such as 1500, 1,500, 1_500, 1.5k or 1.5e3, an int if possible; else
    None."""
    match = _SPELLED.fullmatch(text)
    if match is None or sum(map(str.isdigit, text)) > 19:
        return None
    digits = re.sub("[,_]", "", match[1])
    value = Decimal(digits) * _UNITS[match[2].lower()]
    return int(value) if value == value.to_integral_value() else float(value)


@dataclass(frozen=True)
class Mark:
    """A number in a name that may be a time, and what the word beside it says."""

    text: str  # as it stands there, with what makes it unclear
    begin: int
    number: int | None  # None if it may be something else than a time
    word: str  # "steps", "epochs", "checkpoint", "other", or "" for none of these

    @property
    def unit(self) -> Unit:
        """What it counts; empty if no word says so."""
        return "steps" if self.word == "steps" else "epochs" if self.word == "epochs" else ""


def read_name(name: str) -> list[Mark]:
    """Find the numbers in a name but for metrics."""
    marks = []
    for match in _MARK.finditer(_METRIC.sub(_hide_metric, _SHARD.sub("", name))):
        word = "other" if match["other"] else _find_word(match["before"])
        if word not in ("steps", "epochs"):
            word = _find_word(match["behind"]) or word
        text = match["digits"] + (match["attached"] or "")
        if word == "other":
            text = match["other"] + text
        number = None if match["attached"] else _read_time(text, word)
        marks.append(Mark(text, match.start("digits"), number, word))
    return marks


def _find_word(text: str | None) -> str:
    return _WORDS[text[0].lower()] if text else ""


def _hide_metric(match: re.Match[str]) -> str:
    """Return a decimal behind a word for time, and signs that are no digits for any other."""
    return match[0] if _OF_TIME.fullmatch(match["word"]) else _hide(match)


def _read_time(text: str, word: str) -> int | None:
    """Read plain digits, or steps as in 1.5k or 2M; None for anything else."""
    is_step = word == "steps"
    if not text.isdecimal() and not (is_step and _THOUSANDS.fullmatch(text)):
        return None
    if not is_step and word != "epochs" and _DATE.fullmatch(text):
        return None
    number = read_number(text)
    return number if isinstance(number, int) and number <= MOST else None


def hide_dates(name: str) -> str:
    """Replace dates in parts by signs that are no digits, as many of them."""
    return _MOMENT.sub(_hide, name)


def hide_decimals(name: str) -> str:
    """Replace decimals by signs that are no digits, as many of them."""
    return _DECIMAL.sub(_hide, name)


def hide_scores(name: str) -> str:
    """Replace whole numbers behind words for metrics by signs that are no digits."""
    return _SCORE.sub(_hide, name)


def hide_shards(name: str) -> str:
    """Replace the numbers of shards, such as 00001-of-00002, by signs that are no digits."""
    return _SHARD.sub(_hide, name)


def are_counters(names: Iterable[str]) -> bool:
    """Return whether what looks like decimals in names are two numbers, as in `Net.0.9` and
    `Net.0.10`: those behind the points have several lengths, and some of them end with 0, which is
    written of no metric."""
    texts = [text for name in names for text in _DECIMAL.findall(name)]
    behind = {text.partition(".")[2] for text in texts}
    are_whole = not any(text.startswith("0") and text != "0" for text in behind)
    has_round = any(text.endswith("0") for text in behind)
    return are_whole and has_round and len({*map(len, behind)}) > 1


def _hide(match: re.Match[str]) -> str:
    return "~" * len(match[0])


def find_times(name: str) -> list[Mark]:
    """Find the numbers in a name that may be its time: beside a word for steps, else for epochs,
    else for checkpoints, else all."""
    marks = read_name(name)
    for word in ("steps", "epochs", "checkpoint"):
        chosen = [mark for mark in marks if mark.word == word]
        if chosen:
            return chosen
    return marks


def has_time(name: str) -> bool:
    """Return whether a word in a name says a time, or all of it is a number."""
    words = {mark.word for mark in read_name(name)}
    return name.isdecimal() or not words.isdisjoint({"steps", "epochs", "checkpoint"})


def make_glob(name: str) -> str:
    """Make a glob of the names that differ from a name in their numbers alone, but not in the
    length of an average."""
    begin = 0
    glob = ""
    for length in _LENGTH.finditer(name):
        glob += NUMBER.sub("*", name[begin : length.start(1)]) + length[1]
        begin = length.end(1)
    return glob + NUMBER.sub("*", name[begin:])
