"""A profile from a file: comma-separated times and densities, a line a point.

    # comments and empty lines are skipped
    time,density
    0,0
    50000,1
    100000,0.25

The header line may be missing. The text is UTF-8, with or without a byte order mark, with any line ends.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.tabulated import Tabulated, first_fault

MOST_LINES = 1_000_000
MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class Table:
    """What such a file says.

    Attributes:
        path: the file.
        profile: the profile through its points.
        lines: the line of each point, counted from 1.
    """

    path: Path
    profile: Tabulated
    lines: tuple[int, ...]


def read_table(path: Path) -> Table:
    """Read and check a file of times, on the run's clock, and densities, in any unit.

    Raises:
        InvalidValueError: naming the file, the line where there is one, and what would be accepted.
    """
    lines, times, values = [], [], []
    for line, time, value in _points(path, _text(path)):
        lines.append(line)
        times.append(time)
        values.append(value)
    if len(lines) < 2:
        raise _bad(
            path, f"holds {len(lines)} point{'s' * (len(lines) != 1)}; needs two or more, a line time,density each"
        )
    fault = first_fault(np.array(times), np.array(values))
    if fault is not None:
        raise _bad(path, f"line {lines[fault[0]]}: {fault[1]}")
    try:
        return Table(path, Tabulated(times, values), tuple(lines))
    except InvalidValueError as error:  # no mass: all that is left to find
        raise _bad(path, f"lines {lines[0]} to {lines[-1]}: {error.reason}") from error


def _bad(path: Path, reason: str) -> InvalidValueError:
    return InvalidValueError("profile", reason, value=path)


def _text(path: Path) -> str:
    """The whole file, up to the limit. Nothing that could keep a reader waiting, such as a pipe, is read."""
    try:
        descriptor = files.system.open(path)
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            files.system.close(descriptor)
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise _bad(path, f"is {kind}; must be a text file, a line time,density each")
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except InvalidValueError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _bad(path, f"cannot be read: {reason}; must be a text file, a line time,density each") from error
    if len(data) > MOST_BYTES:
        raise _bad(path, f"is larger than {MOST_BYTES // 10**6} MB; at most that is accepted")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad(path, _not_text(data.count(b"\n", 0, error.start) + 1)) from error
    if "\0" in text:
        raise _bad(path, _not_text(text.count("\n", 0, text.index("\0")) + 1))
    return text


def _not_text(line: int) -> str:
    return f"line {line}: not a text file in UTF-8; must be one, a line time,density each"


def _points(path: Path, text: str) -> Iterator[tuple[int, float, float]]:
    """(line, time, density) of every line that holds a point."""
    header_may_come = True
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if number > MOST_LINES:
            raise _bad(path, f"line {number}: at most {MOST_LINES:,} lines are accepted")
        row = line.strip()
        if not row or row.startswith("#"):
            continue
        columns = [column.strip() for column in row.split(",")]
        if len(columns) != 2:
            found = f"{len(columns)} column{'s' * (len(columns) != 1)}"
            raise _bad(path, f"line {number}: {found} in {row[:40]!r}; must be two, time,density")
        found_numbers = [_number(column) for column in columns]
        is_header = header_may_come and found_numbers == [None, None]
        header_may_come = False
        if is_header:
            continue
        time, value = found_numbers
        if time is None or value is None:
            raise _bad(path, f"line {number}: {row[:40]!r} holds no two numbers; must be time,density")
        yield number, time, value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
