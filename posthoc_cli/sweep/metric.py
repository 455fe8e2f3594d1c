"""The metric that a command prints or writes."""

from __future__ import annotations

import json
import logging
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    argument,
    escape_text,
    list_first,
    quote,
)
from posthoc_cli.snapshots.opened_file import OpenedFile, read_small_file
from posthoc_cli.sweep.trial import LARGEST

log = logging.getLogger(__name__)

_TAIL = 10_000_000  # bytes at the end of standard output that are searched for the metric
_MOST_BYTES = 1_000_000_000  # of a JSON file: programs may store each of their samples in it
_END_OF_LOG = 300  # characters at the end of a log that a message shows
_END_OF_OUTPUT = 10_000  # characters at the end of an output whose names a hint may name
_DEEPEST = 100  # brackets in brackets; json.loads takes some 1,000, results of programs have 10
_STRING_OR_BRACKET = re.compile(
    r'"(?:[^"\\\n]|\\.)*\\?(?:"|$)'
    r"|(?P<first>^[^\S\n]*)?(?P<opening>[\[{])"
    r"|(?P<closing>[\]}])(?P<last>[^\S\n]*$)?",
    re.MULTILINE,
)
_CLOSING = {"[": "]", "{": "}"}
_SPACE = r"[^\S\n]"
_NUMBER = (
    rf"(?:{_SPACE}*[:=]{_SPACE}*|{_SPACE}+)"
    r"([-+]?(?:(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?|nan|inf))(?!\w|[.,]\d)"
)
_NAMED_NUMBER = re.compile(rf"(?<![\w.])([A-Za-z][\w.]*){_NUMBER}", re.IGNORECASE)
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# Each of these expressions reads a character a few times, however long the line is.


class TrialError(Exception):
    """A trial has no usable metric; the text says why."""


class NoMetricError(TrialError):
    """The metric is found nowhere; `hint` says how to find it, in terms of our own options."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


@dataclass(frozen=True)
class Metric:
    """The place where a command prints or writes the metric.

    `key` is the key of a member of a JSON object, with dots between the keys of nested objects:
    `results.acc`, or the word before a number, as in `loss: 2.67`; None if the metric is a line of
    output that is a number. `file` is the name or pattern of JSON files in the trial's
    folder or below, where the newest counts; None for the output, where the last counts.
    """

    key: str | None = None
    file: str | None = None

    @property
    def text(self) -> str:
        """The metric as --metric takes it."""
        return ":".join(filter(None, (self.file, self.key)))

    @classmethod
    def parse(cls, text: str) -> Metric:
        """Parse `KEY` or `FILE.json:KEY`; raise an InvalidValueError for other texts."""
        file, key = re.fullmatch(r"(?:(.*?\.json):)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        if not key:
            reason = (
                "must be a key such as loss, or a file and a key such as results.json:results.acc"
            )
            raise InvalidValueError("metric", reason, value=text or "(empty)")
        return cls(key, file)

    def read(self, printed: Path, folder: Path, streams: list[str]) -> tuple[float, float | None]:
        """Read the metric and its standard error, if any, from a file in `folder`, or from what
        was printed: the path `printed` with the ending .out, of standard output, and, if that has
        none, with a warning, .err, of standard error.

        `streams` receives the one of the first trial. Raises a TrialError if there is no metric, or
        if it is on another stream: numbers of two streams are two metrics.
        """
        key = self.key or ""
        if self.file is not None:
            path, stored = _find_stored(folder, self.file)
            members = _members(stored)
            if key in members:
                return _check(members, key)
            closest = get_close_matches(key, members, 5, 0)
            reason = f"{path.name} has no member {quote(self.key)}{_list_names(closest)}"
            raise NoMetricError(reason, "")
        output = _read_lines(printed.with_name(f"{printed.name}.out"))
        found, names = _find_last(output, self.key)
        if found is not None:
            _check_stream(_OUTPUT, streams)
            return _check(found, key)
        errors = _read_lines(printed.with_name(f"{printed.name}.err"))
        found, error_names = _find_last(errors, self.key)
        if found is None:
            text = output.strip() or errors.strip()
            raise _no_metric_error(text, self.key, names | error_names)
        _check_stream(_ERRORS, streams)
        _warn_of_standard_error(output.strip(), self.key, names)
        return _check(found, key)


_OUTPUT = "standard output"
_ERRORS = "standard error"


def _check_stream(stream: str, streams: list[str]) -> None:
    if not streams:
        streams.append(stream)
    if streams[0] != stream:
        raise TrialError(f"its metric is on {stream}, and that of the first trial on {streams[0]}")


def _find_last(text: str, key: str | None) -> tuple[dict[str, Any] | None, dict[str, None]]:
    """Find the last members with this key that an output holds, if any, and the names of all."""
    names = dict[str, None]()
    found = None
    for value in _find_printed(text, key):
        members = _members(value)
        names |= dict.fromkeys(members)
        if (key or "") in members:
            found = members
    return found, names


def _warn_of_standard_error(output: str, key: str | None, members: Iterable[str]) -> None:
    """Warn that the metric is on standard error alone, where progress bars and logs have numbers,
    too; and name those of standard output."""
    reason = "no line of standard output is a number alone"
    if key is not None:
        reason = f"standard output has no number after {quote(key)}"
    text = f"{reason}: the metric is taken from standard error"
    if names := _similar_names(output, key, members):
        text += f"; for the one of standard output, add {argument('metric')} {' or '.join(names)}"
    log.warning("%s", text)


def _no_metric_error(text: str, key: str | None, members: Iterable[str]) -> NoMetricError:
    """Make the error for an output without the metric, which says what its last line is, and hints
    at the names that are there."""
    reason = "no line of its output is a number alone"
    if key is not None:
        reason = f"its output has no number after {quote(key)}"
    _, _, last = text[-_END_OF_LOG:].rpartition("\n")
    if last:
        reason += f"; the last line is `{escape_text(last.strip())}`"
    else:
        reason += ", and is empty"
    names = _similar_names(text, key, members)
    hint = f"add {argument('metric')} {' or '.join(names)}" if names else ""
    return NoMetricError(reason, hint)


def _similar_names(text: str, key: str | None, members: Iterable[str]) -> list[str]:
    """List the names of an output that are most like a key, or those of its last line."""
    searched = text[-_END_OF_OUTPUT:]
    if key is None:
        _, _, searched = text[-_END_OF_LOG:].rpartition("\n")
    named = _NAMED_NUMBER.findall(searched)
    names = [*dict.fromkeys([*filter(None, members), *(name for name, _ in named)])]
    return names[:3] if key is None else get_close_matches(key, names, 3, 0)


def _check(
    members: dict[str, Any],
    name: str,
) -> tuple[float, float | None]:
    number = _number(members[name])
    if number is None:
        raise TrialError(f"{quote(name)} is {quote(members[name])}, not a number")
    return check_metric(number, _standard_error(members, name))


def check_metric(value: float, error: float | None) -> tuple[float, float | None]:
    """Raise a TrialError for a metric that is no finite number of usual size; leave out such a
    standard error."""
    if not abs(value) <= LARGEST:
        raise TrialError(f"its metric is {value}")
    is_usable = error is not None and 0 < error <= LARGEST
    return value, error if is_usable else None


def _find_printed(text: str, key: str | None) -> Iterator[Any]:
    """Yield the numbers, the JSON objects and lists, and the numbers after the key, each on one or
    more complete lines."""
    ends = _match_brackets(text)
    named = re.compile(rf"(?<![\w.]){re.escape(key or '')}{_NUMBER}", re.IGNORECASE)
    end = broken = 0
    for line in re.finditer(r"^[^\S\n]*(.+)$", text, re.MULTILINE):
        if line.start() < end:
            continue  # within a JSON value
        with suppress(ValueError):
            yield float(line[1])
        if key and (numbers := named.findall(line[0])):
            yield {key: numbers[-1]}
        begin = line.start(1)
        stop = ends.get(begin, begin)
        if begin < stop and not begin < broken < stop:
            try:
                yield json.loads(text[begin:stop], parse_int=float)
                end = stop
            except json.JSONDecodeError as error:
                broken = begin + error.pos  # no value around this place is valid


def _match_brackets(text: str) -> dict[int, int]:
    """Find the end of each JSON object or list that begins and ends its lines, by its beginning, if
    it is one: in a single pass, since any line of a log may begin with a bracket."""
    ends = {}
    opened = deque[re.Match[str]](maxlen=_DEEPEST)
    for token in _STRING_OR_BRACKET.finditer(text):
        if token["opening"]:
            opened.append(token)
        elif token["closing"]:
            if not opened or _CLOSING[opened[-1]["opening"]] != token["closing"]:
                opened.clear()
                continue
            first = opened.pop()
            if first["first"] is not None and token["last"] is not None:
                ends[first.start("opening")] = token.end("closing")
    return ends


def _find_stored(folder: Path, pattern: str) -> tuple[Path, Any]:
    """Find the newest matching file, and read its JSON value; raise a TrialError if there is
    none."""
    names = []
    matching = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder)
            names.append(str(name))
            if name.match(pattern):
                matching.append(path)
    if not matching:
        raise TrialError(f"there is no {pattern} in its folder{_list_names(names)}")
    newest = max(matching, key=lambda path: (path.stat().st_mtime_ns, path))
    try:
        text = read_small_file(newest, _MOST_BYTES).decode("utf-8-sig")
        return newest, json.loads(text)
    except FileFormatError as error:
        raise TrialError(f"{newest.name} {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise TrialError(f"{newest.name} cannot be read: {error}") from error


def read_tail(path: Path, count: int) -> str:
    """Read the last `count` bytes of a file as text, without the colours of a terminal."""
    with OpenedFile(path) as file:
        count = min(count, file.size)
        tail = file.read_at(count, file.size - count)
    return _COLOURS.sub("", tail.decode(errors="replace"))


def _read_lines(path: Path) -> str:
    """Read the end of an output as lines; a progress bar ends its own by a carriage return."""
    return read_tail(path, _TAIL).replace("\r", "\n")


def _members(value: Any) -> dict[str, Any]:
    """List the members of a JSON object and of objects in it, by dotted keys; a number has the key
    ""."""
    if isinstance(value, float):
        return {"": value}
    members: dict[str, Any] = {}
    objects = [("", value)] if isinstance(value, dict) else []
    for prefix, holder in objects:  # it grows meanwhile
        for name, member in holder.items():
            if isinstance(member, dict):
                objects.append((f"{prefix}{name}.", member))
            else:
                members.setdefault(prefix + name, member)
    return members


def _standard_error(
    members: dict[str, Any],
    name: str,
) -> float | None:
    """Find the standard error of a member, such as `acc_stderr` of `acc`, or lm-eval's
    `acc_stderr,none`, if any."""
    head, comma, tail = name.partition(",")
    for word in ("stderr", "se", "standard_error"):
        error = _number(members.get(f"{head}_{word}{comma}{tail}"))
        if error is not None:
            return error
    return None


def _number(value: Any) -> float | None:
    """Convert a number, or the text of one, to a float; None for other values."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _list_names(names: list[str]) -> str:
    """Write the end of a message that lists the first names."""
    return f"; found {list_first(map(quote, names))}" if names else ""
