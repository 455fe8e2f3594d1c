"""Trying a profile that somebody else wrote, before anything is built on it.

A profile from a file: comma-separated times and densities, a line a point.

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
from posthoc_cli.profiles.others import Tabulated, first_fault
from posthoc_cli.profiles.power import FloatArray, Profile

_SLACK = 1e-9
"""How far rounding may take a tail from where it belongs."""


def try_profile(profile: Profile, t: float, title: str) -> None:
    """Look at a profile at some 1,200 times from before the run to after `t`, the denser the nearer to 0 and to `t`.

    Both functions must take arrays and return finite values in their shape; the density must not be below 0; the
    tail must lie in [0, 1], be 1 before 0 and 0 from `t` on, and never grow. It may fall at once at 0: that is mass
    on the start. Whether the density is the tail's slope is not looked at.

    Raises:
        InvalidValueError: what is wrong, after `title`.
    """
    inside = _times_inside(t)
    density = _values(profile, "density", inside, title)
    if np.any(density < 0):
        lowest = density.argmin()
        raise _bad(title, f"density is {density[lowest]:.6g} at s = {inside[lowest]:,.12g}; must not be below 0")
    times = np.concatenate(([-t, -1e-6 * t, 0.0], inside, [1.5 * t]))
    _check_tail(times, _values(profile, "tail", times, title), t, title)


def _check_tail(times: FloatArray, tail: FloatArray, t: float, title: str) -> None:
    outside = np.maximum(tail - 1, -tail)
    if outside.max() > _SLACK:
        worst = outside.argmax()
        raise _bad(
            title, f"tail is {tail[worst]:.6g} at s = {times[worst]:,.12g}; must lie in [0, 1], and be 1 before 0"
        )
    before, after = 1 - tail[times < 0].min(), tail[times >= t].max()
    for mass, where in ((before, "before 0"), (after, f"after t = {t:,.12g}")):
        if mass > _SLACK:
            raise _bad(title, f"{mass:.6g} of its mass lies {where}; must lie within the run, (0, t]")
    growth = np.diff(tail)
    if growth.max() > _SLACK:
        raise _bad(title, f"tail grows after s = {times[growth.argmax()]:,.12g}; the mass after s must never grow")


def _times_inside(t: float) -> FloatArray:
    """Times in (0, t]: evenly spread, and approaching both ends."""
    near = np.geomspace(1e-9, 1e-3, 61)
    relative = np.unique(np.concatenate((np.arange(1, 1025) / 1024, near, 1 - near)))
    return np.asarray(relative * t, dtype=np.float64)


def _values(profile: Profile, name: str, times: FloatArray, title: str) -> FloatArray:
    """What one of the functions makes of times, finite and in their shape."""
    try:
        result = np.asarray(getattr(profile, name)(times), dtype=np.float64)
    except (TypeError, ValueError, ArithmeticError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _bad(title, f"{name} fails for an array of times: {reason}; must take any shape") from error
    if result.shape != times.shape:
        raise _bad(title, f"{name} of times of shape {times.shape} has shape {result.shape}; must have the same")
    if not np.all(np.isfinite(result)):
        worst = np.argmin(np.isfinite(result))
        raise _bad(title, f"{name} is {result[worst]} at s = {times[worst]:,.12g}; must be finite")
    return result


def _bad(title: str, reason: str) -> InvalidValueError:
    return InvalidValueError(title, reason)


# --- A profile from a file: comma-separated times and densities, a line a point --------------------


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
        raise _bad_table(
            path, f"holds {len(lines)} point{'s' * (len(lines) != 1)}; needs two or more, a line time,density each"
        )
    fault = first_fault(np.array(times), np.array(values))
    if fault is not None:
        raise _bad_table(path, f"line {lines[fault[0]]}: {fault[1]}")
    try:
        return Table(path, Tabulated(times, values), tuple(lines))
    except InvalidValueError as error:  # no mass: all that is left to find
        raise _bad_table(path, f"lines {lines[0]} to {lines[-1]}: {error.reason}") from error


def _bad_table(path: Path, reason: str) -> InvalidValueError:
    return InvalidValueError("profile", reason, value=path)


def _text(path: Path) -> str:
    """The whole file, up to the limit. Nothing that could keep a reader waiting, such as a pipe, is read."""
    try:
        descriptor = files.system.open(path)
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            files.system.close(descriptor)
            kind = "a directory" if stat.S_ISDIR(mode) else "no regular file"
            raise _bad_table(path, f"is {kind}; must be a text file, a line time,density each")
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except InvalidValueError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _bad_table(path, f"cannot be read: {reason}; must be a text file, a line time,density each") from error
    if len(data) > MOST_BYTES:
        raise _bad_table(path, f"is larger than {MOST_BYTES // 10**6} MB; at most that is accepted")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _bad_table(path, _not_text(data.count(b"\n", 0, error.start) + 1)) from error
    if "\0" in text:
        raise _bad_table(path, _not_text(text.count("\n", 0, text.index("\0")) + 1))
    return text


def _not_text(line: int) -> str:
    return f"line {line}: not a text file in UTF-8; must be one, a line time,density each"


def _points(path: Path, text: str) -> Iterator[tuple[int, float, float]]:
    """(line, time, density) of every line that holds a point."""
    header_may_come = True
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if number > MOST_LINES:
            raise _bad_table(path, f"line {number}: at most {MOST_LINES:,} lines are accepted")
        row = line.strip()
        if not row or row.startswith("#"):
            continue
        columns = [column.strip() for column in row.split(",")]
        if len(columns) != 2:
            found = f"{len(columns)} column{'s' * (len(columns) != 1)}"
            raise _bad_table(path, f"line {number}: {found} in {row[:40]!r}; must be two, time,density")
        found_numbers = [_number(column) for column in columns]
        is_header = header_may_come and found_numbers == [None, None]
        header_may_come = False
        if is_header:
            continue
        time, value = found_numbers
        if time is None or value is None:
            raise _bad_table(path, f"line {number}: {row[:40]!r} holds no two numbers; must be time,density")
        yield number, time, value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
