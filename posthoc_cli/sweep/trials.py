"""A trial: the user's command as a process, and the metric that it prints or writes.

Each process has a separate process group, so that all its remaining children can be ended with it.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, printable, shown

_GRACE, _TICK = 0.5, 0.01
"""Seconds between SIGTERM and SIGKILL, and between looks at a process."""
_TAIL, _END_OF_LOG, _MOST_NAMES = 10_000_000, 300, 5
"""Bytes at the end of standard output that are searched for the metric, and of a log and names that a message shows."""
_REST_OF_LINE = re.compile(r"[^\S\n]*(?=\n|$)")


class TrialError(Exception):
    """A trial has no usable metric; the text says why."""


class MissingMetricError(TrialError):
    """The command succeeded, but its output or files have no member with the metric's name."""


def measure(words: Sequence[str], folder: Path, log: Path, metric: Metric) -> tuple[float, float | None]:
    """Run a command, and return its metric and the standard error of that, if any; a TrialError says why it has none.

    `folder` is where files with the metric may be; `log` the path of the logs of standard output and error, without the
    endings .out and .err.
    """
    out, err = (log.with_name(log.name + ending) for ending in (".out", ".err"))
    for path in (out, err):
        files.unlink_if_exists(path)  # the process of a killed sweep may still write to the old file
    try:
        _run(words, out, err)
        return metric.read(out, folder)
    except TrialError as error:
        texts = (" ".join(_read_tail(path, _END_OF_LOG).split()) for path in (err, out))
        text = next(filter(None, texts), "")
        raise type(error)(f"{error}: {printable(text)}" if text else f"{error}, and wrote nothing") from error


def _run(words: Sequence[str], out: Path, err: Path) -> None:
    """Run a command until it ends; raise a TrialError if it fails. All its remaining children end with it."""
    with out.open("wb") as stdout, err.open("wb") as stderr, ThreadPoolExecutor(1) as pool:
        # In another thread, since the exception of a signal would lose a process that is just being started.
        starting = pool.submit(
            lambda: subprocess.Popen(
                list(words), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
        )
        try:
            process = starting.result()
            while process.poll() is None:  # not `wait`: another thread may receive the signal of Ctrl-C
                time.sleep(_TICK)
        except OSError as failure:
            raise TrialError(f"cannot be started: {failure.strerror or failure}") from failure
        finally:
            if starting.exception() is None:
                _end_group(starting.result())
    if process.returncode:
        code = process.returncode
        raise TrialError(f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the group of a process, also on a second Ctrl-C; the group keeps the id of a process that has ended."""
    try:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# --- metrics


@dataclass(frozen=True)
class Metric:
    """The place where a command prints or writes the metric.

    `key` is the key of a member of a JSON object, with dots between the keys of nested objects: `results.acc`; None if
    the metric is a line of standard output that is a number. `file` is the name or pattern of JSON files in the trial's
    folder or below, of which the newest is used; None for standard output, whose last number or object with the key is.
    """

    key: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> Metric:
        """Return the metric that `KEY` or `FILE.json:KEY` names; raise an InvalidValueError for other texts."""
        file, key = re.fullmatch(r"(?:(.*?\.json):)?(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        if not key:
            reason = "must be a key such as loss, or a file and a key such as results.json:results.acc"
            raise InvalidValueError("metric", reason, value=text or "(empty)")
        return cls(key, file)

    @property
    def text(self) -> str:
        """The text that `parse` takes; empty for a line that is a number."""
        return ":".join(filter(None, (self.file, self.key)))

    @property
    def label(self) -> str:
        """The name of the metric in tables and plots."""
        return self.key or "metric"

    def read(self, stdout: Path, folder: Path) -> tuple[float, float | None]:
        """Return the metric and its standard error, if any; raise a TrialError if there is no metric."""
        if self.file is None or self.key is None:
            return self._printed(_read_tail(stdout, _TAIL))
        return _stored(folder, self.file, self.key)

    def _printed(self, text: str) -> tuple[float, float | None]:
        """Return the metric from the last line that is a number, or the last JSON object with the key."""
        found: tuple[dict[str, Any], str] | float | None = None
        names: list[str] = []
        begin = end = 0
        for line in text.splitlines(keepends=True):
            start, begin = begin, begin + len(line)
            if start < end:
                continue  # within a JSON value
            if (number := _number(line.strip())) is not None:
                found = number
                continue
            value, end = _json_at(text, start + len(line) - len(line.lstrip()))
            if self.key is not None and isinstance(value, dict):
                holder, name = _holder(value, self.key)
                names += holder if name is None else ()
                found = found if name is None else (holder, name)
        if found is None:
            wanted = "a number" if self.key is None else f"a number or a JSON object with {shown(self.key)}"
            raise MissingMetricError(f"no line of its output is {wanted}{_listed(names)}")
        return _pair(*found) if isinstance(found, tuple) else (_finite(found), None)


def _stored(folder: Path, pattern: str, key: str) -> tuple[float, float | None]:
    """Return the metric from the newest matching file."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    matching = [path for path in paths if path.relative_to(folder).match(pattern)]
    newest = max(matching, key=lambda path: (path.stat().st_mtime_ns, path), default=None)
    if newest is None:
        fault, cause = (
            f"there is no {pattern} in its folder{_listed([str(p.relative_to(folder)) for p in paths])}",
            None,
        )
    else:
        try:
            holder, name = _holder(json.loads(newest.read_text(encoding="utf-8-sig")), key)
            if name is not None:
                return _pair(holder, name)
            fault, cause = f"{newest.name} has no member {shown(key)}{_listed([*holder])}", None
        except (OSError, ValueError, RecursionError) as error:
            fault, cause = f"{newest.name} cannot be read: {error}", error
    raise MissingMetricError(fault) from cause


def _read_tail(path: Path, count: int) -> str:
    """Return the last `count` bytes of a file as text."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - count))
        return file.read().decode(errors="replace")


def _json_at(text: str, start: int) -> tuple[Any, int]:
    """Return the JSON object or list that begins at `start` and ends a line, and its end; else None and 0."""
    if text[start : start + 1] not in ("{", "["):
        return None, 0
    try:
        value, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, 0
    return (value, end) if _REST_OF_LINE.match(text, end) else (None, 0)


def _holder(value: Any, key: str) -> tuple[dict[str, Any], str | None]:
    """Return the object that has the member of a dotted key, and the member's name; names may contain dots themselves.

    If no object has it, return the nearest one and None.
    """
    nearest = value if isinstance(value, dict) else {}
    if key in nearest:
        return nearest, key
    for name in [name for name in nearest if key.startswith(f"{name}.")]:
        nearest, found = _holder(value[name], key[len(name) + 1 :])
        if found is not None:
            return nearest, found
    return nearest, None


def _pair(values: dict[str, Any], name: str) -> tuple[float, float | None]:
    """Return a value and its standard error, such as `acc_stderr` of `acc`, or lm-eval's `acc_stderr,none`."""
    head, comma, tail = name.partition(",")
    names = (f"{head}_{word}{comma}{tail}" for word in ("stderr", "se", "standard_error"))
    errors = (_number(values[other]) for other in names if other in values)
    error = next((error for error in errors if error is not None and 0 < error < math.inf), None)
    value = _number(values[name])
    return _finite(value, f"{shown(name)} is {shown(values[name])}, not a number"), error


def _number(value: object) -> float | None:
    """Return a number or the text of one as a float; None for other values."""
    try:
        return None if isinstance(value, bool) or not isinstance(value, str | int | float) else float(value)
    except (ValueError, OverflowError):
        return None


def _finite(value: float | None, no_number: str = "") -> float:
    """Return a finite value; raise a TrialError for nan and infinity, and for None the one that says `no_number`."""
    if value is None or not math.isfinite(value):
        raise TrialError(no_number if value is None else f"its metric is {value}")
    return value


def _listed(names: list[str]) -> str:
    """Return the end of a message that lists names."""
    unique = list(dict.fromkeys(names))
    shown_names = ", ".join(map(shown, unique[:_MOST_NAMES]))
    return f"; found {shown_names}{', ...' * (len(unique) > _MOST_NAMES)}" if names else ""
