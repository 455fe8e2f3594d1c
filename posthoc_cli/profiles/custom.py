"""Profiles from users: a check of an object with `density` and `tail`, and a file of points.

A file holds comma-separated times and densities, one point a line, in UTF-8:

    # comments and empty lines are skipped
    time,density
    0,0
    50000,1
    100000,0.25

The header line is optional.
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
"""Accepted rounding error of a tail."""

MOST_LINES = 1_000_000
MOST_BYTES = 100_000_000
"""Size limit of a file of points."""

_EXPECTED = "must be a text file, a line time,density each"


def try_profile(profile: Profile, t: float, title: str) -> None:
    """Check a profile at some 1,200 times from before the run to after `t`, which are denser near 0 and `t`.

    Both functions must take arrays and return finite values of the same shape; the density must not be below 0; the
    tail must lie in [0, 1], be 1 before 0 and 0 from `t` on, and never grow. Mass at time 0 is allowed. Whether the
    density is the slope of the tail is not checked.

    Raises:
        InvalidValueError: about `title`.
    """
    # Evenly spaced, and approaching both ends.
    near = np.geomspace(1e-9, 1e-3, 61)
    inside = np.unique(np.concatenate((np.arange(1, 1025) / 1024, near, 1 - near))) * t
    density = _values(profile, "density", inside, title)
    if np.any(density < 0):
        lowest = density.argmin()
        reason = f"density is {density[lowest]:.6g} at s = {inside[lowest]:,.12g}; must not be below 0"
        raise InvalidValueError(title, reason)
    times = np.concatenate(([-t, -1e-6 * t, 0.0], inside, [1.5 * t]))
    tail = _values(profile, "tail", times, title)
    outside, growth = np.maximum(tail - 1, -tail), np.diff(tail)
    if outside.max() > _SLACK:
        worst = outside.argmax()
        reason = f"tail is {tail[worst]:.6g} at s = {times[worst]:,.12g}; must lie in [0, 1], and be 1 before 0"
        raise InvalidValueError(title, reason)
    before, after = 1 - tail[times < 0].min(), tail[times >= t].max()
    for mass, where in ((before, "before 0"), (after, f"after t = {t:,.12g}")):
        if mass > _SLACK:
            raise InvalidValueError(title, f"{mass:.6g} of its mass lies {where}; must lie within the run, (0, t]")
    if growth.max() > _SLACK:
        reason = f"tail grows after s = {times[growth.argmax()]:,.12g}; the mass after s must never grow"
        raise InvalidValueError(title, reason)


def _values(profile: Profile, name: str, times: FloatArray, title: str) -> FloatArray:
    """The values of one of the functions at times, finite and of their shape."""
    try:
        result = np.asarray(getattr(profile, name)(times), dtype=np.float64)
    except (TypeError, ValueError, ArithmeticError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        reason = f"{name} fails for an array of times: {cause}; must take any shape"
        raise InvalidValueError(title, reason) from error
    if result.shape != times.shape:
        reason = f"{name} of times of shape {times.shape} has shape {result.shape}; must have the same"
        raise InvalidValueError(title, reason)
    if not np.all(np.isfinite(result)):
        worst = np.argmin(np.isfinite(result))
        raise InvalidValueError(title, f"{name} is {result[worst]} at s = {times[worst]:,.12g}; must be finite")
    return result


@dataclass(frozen=True)
class Table:
    """The profile through the points of a file, and the line of each point, counted from 1."""

    path: Path
    profile: Tabulated
    lines: tuple[int, ...]


def read_table(path: Path) -> Table:
    """Read a file of times, on the run's clock, and densities, in any unit.

    Raises:
        InvalidValueError: names the file, the line where there is one, and what would be accepted.
    """
    points = list(_points(path, read_text(path, "profile", _EXPECTED)))
    if len(points) < 2:
        found = f"{len(points)} point{'s' * (len(points) != 1)}"
        raise _bad_file(path, f"holds {found}; needs two or more, a line time,density each")
    lines, times, values = zip(*points, strict=True)
    if (fault := first_fault(np.array(times), np.array(values))) is not None:
        raise _bad_file(path, f"line {lines[fault[0]]}: {fault[1]}")
    try:
        return Table(path, Tabulated(times, values), lines)
    except InvalidValueError as error:  # the only remaining fault: no mass
        raise _bad_file(path, f"lines {lines[0]} to {lines[-1]}: {error.reason}") from error


def _bad_file(path: Path, reason: str) -> InvalidValueError:
    return InvalidValueError("profile", reason, value=path)


def read_text(path: Path, subject: str, expected: str = "must be a text file") -> str:
    """The content of a regular file, in UTF-8; reading a pipe could wait forever.

    Raises:
        InvalidValueError: about `subject`; names the file and what was `expected`.
    """

    def bad(reason: str) -> InvalidValueError:
        return InvalidValueError(subject, reason, value=path)

    try:
        with open(path, "rb", opener=lambda name, _: files.system.open(Path(name))) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise bad(f"is no regular file; {expected}")
            data = file.read(MOST_BYTES + 1)
    except IsADirectoryError:
        raise bad(f"is a directory; {expected}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidValueError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise bad(f"cannot be read: {reason}; {expected}") from error
    if len(data) > MOST_BYTES:
        raise bad(f"is larger than {MOST_BYTES // 10**6} MB, the limit")
    end = data.find(b"\0")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        end = error.start
    if end >= 0:
        line = data.count(b"\n", 0, end) + 1
        raise bad(f"line {line}: not a text file in UTF-8; {expected}")
    return text


def _points(path: Path, text: str) -> Iterator[tuple[int, float, float]]:
    """(line, time, density) of every line that holds a point."""
    first = True
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        row = line.strip()
        if not row or row.startswith("#"):
            continue
        if number > MOST_LINES:
            raise _bad_file(path, f"line {number}: at most {MOST_LINES:,} lines are accepted")
        columns = row.split(",")
        if len(columns) != 2:
            found = f"{len(columns)} column{'s' * (len(columns) != 1)}"
            raise _bad_file(path, f"line {number}: {found} in {row[:40]!r}; must be two, time,density")
        time, value = (_number(column) for column in columns)
        if time is not None and value is not None:
            yield number, time, value
        elif not (first and time is None and value is None):  # which is a header
            raise _bad_file(path, f"line {number}: {row[:40]!r} holds no two numbers; must be time,density")
        first = False


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
