"""What an evaluation says: its metric, on standard output or in a JSON or CSV file of its folder."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.errors import shown

_TAIL = 1_000_000
"""Bytes at the end of standard output that are looked at."""
_MOST_FILES = 1_000
_MOST_BYTES = 100_000_000
_NAMED = 5
"""Names that a message lists."""


class NoMetricError(Exception):
    """The evaluation does not say its metric; the text says what was looked for, and what is there."""


@dataclass(frozen=True)
class Metric:
    """Where the metric is.

    Attributes:
        name: of a member of a JSON object on a line of standard output. A line that is a number needs no name.
        json: path of a member in a JSON file of the trial's folder, such as `results.hellaswag.acc_norm,none`.
        csv: a column of a CSV file of the trial's folder, whose last row counts.
    """

    name: str | None = None
    json: str | None = None
    csv: str | None = None

    @property
    def label(self) -> str:
        """For tables and axes."""
        return self.json or self.csv or self.name or "metric"

    def read(self, stdout: Path, folder: Path) -> tuple[float, float | None]:
        """The metric and its standard error, None where there is none; a NoMetricError."""
        if self.json is not None:
            path = self.json
            return _from_files(folder, ".json", f"member {shown(path)}", lambda text: _member(json.loads(text), path))
        if self.csv is not None:
            column = self.csv
            return _from_files(folder, ".csv", f"column {shown(column)}", lambda text: _column(text, column))
        return self._printed(read_tail(stdout, _TAIL))

    def _printed(self, text: str) -> tuple[float, float | None]:
        """The last line that is a number, or a JSON object with the name."""
        names: dict[str, None] = {}
        for line in reversed(text.splitlines()):
            with_number = _number(line.strip())
            if with_number is not None:
                return _finite(with_number), None
            if self.name is not None and line.lstrip().startswith("{"):
                try:
                    found = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if self.name in found:
                    return _pair(found, self.name)
                names |= dict.fromkeys(found)
        wanted = "a number" if self.name is None else f"a number or a JSON object with {shown(self.name)}"
        raise NoMetricError(f"no line of its output is {wanted}{_there(names)}")


def read_tail(path: Path, count: int) -> str:
    """The last `count` bytes of a file as text."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return file.read().decode(errors="replace")


def _from_files(
    folder: Path, suffix: str, wanted: str, read: Callable[[str], tuple[float, float | None]]
) -> tuple[float, float | None]:
    """What `read` finds in the newest file that has it."""
    reason = f"there is no {suffix} file in its folder"
    for path in _newest(folder, suffix):
        try:
            return read(path.read_text(encoding="utf-8-sig"))  # whatever the terminal's is, and as Excel writes it
        except KeyError as error:
            reason = f"{path.name} has no {wanted}{_there(dict.fromkeys(error.args[0]))}"
        except (ValueError, RecursionError, OSError, csv.Error) as error:
            reason = f"{path.name} cannot be read: {error}"
    raise NoMetricError(reason)


def _newest(folder: Path, suffix: str) -> list[Path]:
    found = [path for path in folder.rglob(f"*{suffix}") if path.is_file() and path.stat().st_size <= _MOST_BYTES]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, path), reverse=True)[:_MOST_FILES]


def _member(value: Any, path: str) -> tuple[float, float | None]:
    """Names may themselves have dots in them."""
    if not isinstance(value, dict):
        raise KeyError([])
    if path in value:
        return _pair(value, path)
    missing = KeyError(list(value))
    for name in value:
        if path.startswith(f"{name}."):
            try:
                return _member(value[name], path[len(name) + 1 :])
            except KeyError as error:
                missing = error
    raise missing


def _column(text: str, column: str) -> tuple[float, float | None]:
    rows = csv.DictReader(io.StringIO(text))
    last: dict[str, Any] = {}
    for last in rows:  # noqa: B007 - the last one counts
        pass
    if column not in last:
        raise KeyError(rows.fieldnames or [])
    return _pair(last, column)


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


def _there(names: dict[str, None]) -> str:
    listed = ", ".join(map(shown, list(names)[:_NAMED]))
    return f"; there are {listed}{', ...' * (len(names) > _NAMED)}" if names else ""
