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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, escape_text, list_first, quote

_GRACE = 0.5  # seconds between SIGTERM and SIGKILL
_TICK = 0.01  # seconds between looks at a process
_TAIL = 10_000_000  # bytes at the end of standard output that are searched for the metric
_END_OF_LOG = 300  # bytes at the end of a log that a message shows
_BEGIN_OF_JSON = re.compile(r'[^\S\n]*(?=\{\s*["}]|\[)')
_REST_OF_LINE = re.compile(r"[^\S\n]*(?=\n|$)")
_NUMBER = r"(?:\s*[:=]\s*|\s+)([-+]?(?:\d*\.?\d+(?:e[-+]?\d+)?|nan|inf))(?!\w|[.,]\d)"
_NAMED_NUMBER = re.compile(rf"([A-Za-z][\w.]*){_NUMBER}", re.IGNORECASE)


class TrialError(Exception):
    """A trial has no usable metric; the text says why."""


class NoMetricError(TrialError):
    """The metric is found nowhere; `hint` says how to find it, in terms of our own options."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.hint = hint


def measure(
    words: Sequence[str],
    folder: Path,
    log: Path,
    metric: Metric | None,
) -> tuple[float | None, float | None]:
    """Run a command, and find its metric, if one is asked for, and the standard error of the
    metric, if any; a TrialError says why it has none.

    `folder` is where files with the metric may be; `log` the path of the logs of standard output
    and error, without the endings .out and .err.
    """
    out = log.with_name(f"{log.name}.out")
    err = log.with_name(f"{log.name}.err")
    for path in (out, err):
        # the process of a killed sweep may still write to the old file
        files.unlink_if_exists(path)
    try:
        _run(words, out, err)
    except TrialError as error:
        raise TrialError(f"{error}: {_last_words(out, err)}") from error
    return (None, None) if metric is None else metric.read(out, folder)


def _last_words(out: Path, err: Path) -> str:
    """Find the last line of standard error, which says most of a traceback, or else the end of
    standard output."""
    _, _, line = _read_tail(err, _END_OF_LOG).strip().rpartition("\n")
    text = line or " ".join(_read_tail(out, _END_OF_LOG).split())
    return escape_text(text) or "it wrote nothing"


def _run(
    words: Sequence[str],
    out: Path,
    err: Path,
) -> None:
    """Run a command until it ends; raise a TrialError if it fails. All its remaining children end
    with it."""
    with out.open("wb") as stdout, err.open("wb") as stderr, ThreadPoolExecutor(1) as pool:
        # In another thread, since the exception of a signal would lose a process that is just being
        # started.
        starting = pool.submit(
            lambda: subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
        )
        try:
            process = starting.result()
            # not `wait`: another thread may receive the signal of Ctrl-C
            while process.poll() is None:
                time.sleep(_TICK)
        except OSError as failure:
            raise TrialError(f"cannot be started: {failure.strerror or failure}") from failure
        finally:
            if starting.exception() is None:
                _end_group(starting.result())
    if code := process.returncode:
        raise TrialError(f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the group of a process, also on a second Ctrl-C; the group keeps the id of a process that
    has ended."""
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

    `key` is the key of a member of a JSON object, with dots between the keys of nested objects:
    `results.acc`, or the word before a number, as in `loss: 2.67`; None if the metric is a line of
    standard output that is a number. `file` is the name or pattern of JSON files in the trial's
    folder or below, of which the newest is used; None for standard output, where the last counts,
    and a number without the key only if there is none with it.
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

    def read(
        self,
        stdout: Path,
        folder: Path,
    ) -> tuple[float, float | None]:
        """Read the metric and its standard error, if any; raise a TrialError if there is no
        metric."""
        if self.file is None:
            text = _read_tail(stdout, _TAIL)
            values = [*_find_printed(text, self.key)]
        else:
            path, value = _find_stored(folder, self.file)
            values = [value]
        objects = [_members(value) for value in reversed(values)]
        key = self.key or ""
        for name in (key, ""):
            for members in objects:
                if name in members:
                    return _check(members, name)
        keys = [*dict.fromkeys(chain.from_iterable(objects))]
        if self.file is None:
            raise _no_metric_error(text, self.key, keys)
        closest = get_close_matches(key, keys, 5, 0)
        reason = f"{path.name} has no member {quote(self.key)}{_list_names(closest)}"
        raise NoMetricError(reason, "")


def _no_metric_error(text: str, key: str | None, keys: list[str]) -> NoMetricError:
    """Make the error for an output without the metric, which says what its last line is."""
    reason = "no line of its standard output is a number alone"
    if key is not None:
        reason = f"its standard output has no number after {quote(key)}"
    _, _, last = text.strip()[-_END_OF_LOG:].rpartition("\n")
    if last:
        reason += f"; the last line is `{escape_text(last.strip())}`"
    else:
        reason += ", and is empty"
    names = get_close_matches(key or "", keys, 3, 0) or [
        name for name, _ in _NAMED_NUMBER.findall(last)
    ]
    hint = f"add `metric` {' or '.join(names)}" if names else ""
    return NoMetricError(reason, hint)


def _check(
    members: dict[str, Any],
    name: str,
) -> tuple[float, float | None]:
    number = _number(members[name])
    if number is None:
        raise TrialError(f"{quote(name)} is {quote(members[name])}, not a number")
    if not math.isfinite(number):
        raise TrialError(f"its metric is {number}")
    return number, _standard_error(members, name)


def _find_printed(text: str, key: str | None) -> Iterator[Any]:
    """Yield the numbers, the JSON objects and lists, and the numbers after the key, each on one or
    more complete lines."""
    text = text.replace("\r", "\n")
    end = 0
    named = re.compile(rf"(?<![\w.]){re.escape(key or '')}{_NUMBER}", re.IGNORECASE)
    for line in re.finditer(r"^.+$", text, re.MULTILINE):
        if line.start() < end:
            continue  # within a JSON value
        with suppress(ValueError):
            yield float(line[0])
        numbers = named.findall(line[0])
        if key and numbers:
            yield {key: numbers[-1]}
        with suppress(ValueError, RecursionError):
            if begin := _BEGIN_OF_JSON.match(text, line.start()):
                value, end_of_value = json.JSONDecoder().raw_decode(text, begin.end())
                if _REST_OF_LINE.match(text, end_of_value):
                    yield value
                    end = end_of_value


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
        return newest, json.loads(newest.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TrialError(f"{newest.name} cannot be read: {error}") from error


def _read_tail(path: Path, count: int) -> str:
    """Read the last `count` bytes of a file as text."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - count))
        return file.read().decode(errors="replace")


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
        if error is not None and 0 < error < math.inf:
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
