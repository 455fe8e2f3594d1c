"""What a trial says: its metric, on standard output or in a JSON file of its folder."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.errors import InvalidValueError, shown

_TAIL = 10_000_000
"""Bytes at the end of standard output that are looked at."""
_MOST_BYTES = 100_000_000
"""Of a file."""
_NAMED = 5
"""Names that a message lists."""
_REST_OF_LINE = re.compile(r"[^\S\n]*(?=\n|$)")


class NoMetricError(Exception):
    """The trial has no metric; the text says what was looked for, and what is there."""


class MissingMetricError(NoMetricError):
    """Nothing of the metric's name is there, not even one that is no finite number."""


@dataclass(frozen=True)
class Metric:
    """Where the metric is.

    Attributes:
        key: of a member of a JSON object, with dots between the keys of nested objects: `results.acc`. Standard output
            may also end with a line that is a number, which needs none.
        file: name of a JSON file in the trial's folder or below, also a pattern: `*.json`; the newest counts. None for
            standard output, whose last number or JSON object with the key counts.
    """

    key: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Metric:
        """From `KEY` or `FILE.json:KEY`; an InvalidValueError."""
        file, key = re.fullmatch(r"(?:(.*?\.json):)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        if not key:
            reason = "must be a key such as loss, or a file and a key such as results.json:results.acc"
            raise InvalidValueError("metric", reason, value=text or "(empty)")
        return cls(key, file)

    @property
    def text(self) -> str:
        """As `parse` takes it; empty for a line that is a number."""
        return ":".join(filter(None, (self.file, self.key)))

    @property
    def label(self) -> str:
        """For tables and axes."""
        return self.key or "metric"

    def read(self, stdout: Path, folder: Path) -> tuple[float, float | None]:
        """The metric and its standard error, None where there is none; a NoMetricError."""
        if self.file is None or self.key is None:
            return self._printed(read_tail(stdout, _TAIL))
        try:
            return self._stored(folder, self.file, self.key)
        except OSError as error:
            raise NoMetricError(f"{self.file} cannot be read: {error.strerror or error}") from error

    def _printed(self, text: str) -> tuple[float, float | None]:
        """The last line that is a number, or JSON object with the key, which may take several lines."""
        found: float | tuple[dict[str, Any], str] | None = None
        names: list[str] = []
        begin = end = 0
        for line in text.splitlines(keepends=True):
            start, begin = begin, begin + len(line)
            if start < end:
                continue  # within a JSON value
            number = _number(line.strip())
            if number is not None:
                found = number
                continue
            value, end = _json_at(text, start + len(line) - len(line.lstrip()))
            if self.key is not None and isinstance(value, dict):
                held = _holder(value, self.key)
                if isinstance(held, tuple):
                    found = held
                else:
                    names += held
        if isinstance(found, tuple):
            return _pair(*found)
        if found is not None:
            return _finite(found), None
        wanted = "a number" if self.key is None else f"a number or a JSON object with {shown(self.key)}"
        raise MissingMetricError(f"no line of its output is {wanted}{_there(names)}")

    @staticmethod
    def _stored(folder: Path, pattern: str, key: str) -> tuple[float, float | None]:
        """From the newest file of the pattern that has it; the error is that of the newest."""
        paths = [path for path in folder.rglob("*") if path.relative_to(folder).match(pattern) and path.is_file()]
        reasons = []
        for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path), reverse=True):
            if path.stat().st_size > _MOST_BYTES:
                reasons.append(f"{path.name} has more than {_MOST_BYTES:,} bytes")
                continue
            try:
                held = _holder(json.loads(path.read_text(encoding="utf-8-sig")), key)
            except (ValueError, RecursionError) as error:
                reasons.append(f"{path.name} cannot be read: {error}")
                continue
            if isinstance(held, tuple):
                return _pair(*held)
            reasons.append(f"{path.name} has no member {shown(key)}{_there(held)}")
        there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        raise MissingMetricError(next(iter(reasons), f"there is no {pattern} in its folder{_there(there)}"))


def read_tail(path: Path, count: int) -> str:
    """The last `count` bytes of a file as text."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return file.read().decode(errors="replace")


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON object or list that begins there and ends a line, and where it ends; None and 0 where there is none."""
    if text[start : start + 1] not in ("{", "["):
        return None, 0
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, 0
    return (value, end) if _REST_OF_LINE.match(text, end) else (None, 0)


def _holder(value: Any, key: str) -> tuple[dict[str, Any], str] | list[str]:
    """The object that has the member of a dotted key, and its name in it; names may themselves have dots in them.

    The names in the nearest object where there is none.
    """
    if not isinstance(value, dict):
        return []
    if key in value:
        return value, key
    nearest = list(value)
    for name in value:
        if key.startswith(f"{name}."):
            found = _holder(value[name], key[len(name) + 1 :])
            if isinstance(found, tuple):
                return found
            nearest = found
    return nearest


def _pair(values: dict[str, Any], name: str) -> tuple[float, float | None]:
    """A value, and the standard error that stands beside it: `acc_stderr` of `acc`, lm-eval's `acc_stderr,none`."""
    head, comma, tail = name.partition(",")
    beside = (f"{head}_{word}{comma}{tail}" for word in ("stderr", "se", "standard_error"))
    errors = (_number(values[other]) for other in beside if other in values)
    error = next((error for error in errors if error is not None and 0 < error < math.inf), None)
    value = _number(values[name])
    if value is None:
        raise NoMetricError(f"{shown(name)} is {shown(values[name])}, no number")
    return _finite(value), error


def _number(value: object) -> float | None:
    try:
        return None if isinstance(value, bool) or not isinstance(value, str | int | float) else float(value)
    except (ValueError, OverflowError):
        return None


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise NoMetricError(f"its metric is {value}")
    return value


def _there(names: list[str]) -> str:
    unique = list(dict.fromkeys(names))
    listed = ", ".join(map(shown, unique[:_NAMED]))
    return f"; there are {listed}{', ...' * (len(unique) > _NAMED)}" if names else ""
