"""A trial: the user's command as a process, and the metric that it prints or writes.

Each process is in a process group of its own, which is ended with all that is still in it.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, printable, shown
from posthoc_cli.sweep.search import Trial

_DEVICES = "CUDA_VISIBLE_DEVICES"
_GRACE = 0.5
"""Seconds between SIGTERM and SIGKILL."""
_TICK = 0.01
_END_OF_LOG = 300
_TAIL = 10_000_000
"""Bytes at the end of standard output that are looked at."""
_NAMED = 5
"""Names that a message lists."""
_REST_OF_LINE = re.compile(r"[^\S\n]*(?=\n|$)")


@dataclass(frozen=True)
class Command:
    """The user's command for one trial.

    Attributes:
        trial: what is known of it before.
        words: all placeholders filled in.
        folder: of the trial; exists.
        log: where standard output and error go, with the endings .out and .err.
    """

    trial: Trial
    words: Sequence[str]
    folder: Path
    log: Path

    @property
    def logs(self) -> tuple[Path, Path]:
        """The files of standard output and error."""
        out, err = (self.log.with_name(self.log.name + ending) for ending in (".out", ".err"))
        return out, err


def run_all(
    commands: Sequence[Command],
    metric: Metric,
    told: Callable[[Command, Trial, bool], None],
    jobs: int = 1,
    timeout: float | None = None,
    began: Callable[[Command], None] = lambda _: None,
) -> None:
    """Run commands, up to `jobs` at a time, and tell which one begins, and what has come of each as it ends.

    That is a record with a value or an error, and whether a command ended well that does not say its metric. Whatever
    ends this ends the processes. Those that run side by side share out CUDA_VISIBLE_DEVICES.
    """
    devices = [name for name in os.environ.get(_DEVICES, "").split(",") if name]
    slots = SimpleQueue[int]()
    for slot in range(jobs):
        slots.put(slot)
    stop = threading.Event()

    def run(command: Command) -> tuple[Trial, bool]:
        slot = slots.get()
        try:
            began(command)
            own = devices[slot % len(devices) :: jobs] if devices else []
            return _run(command, metric, own, timeout, stop)
        finally:
            slots.put(slot)

    # Ctrl-C interrupts the main thread only, never a thread that is just starting or ending a process.
    pool, running = ThreadPoolExecutor(jobs), dict[Future[tuple[Trial, bool]], Command]()
    waiting = iter(commands)
    try:
        while True:
            # None begins before what has come of the last one is told, which may be a reason to end.
            for command in islice(waiting, jobs - len(running)):
                running[pool.submit(run, command)] = command
            if not running:
                break
            # Not for ever: a signal may have been delivered to another thread, which does not wake this one.
            for trial in wait(running, _GRACE, FIRST_COMPLETED).done:
                told(running.pop(trial), *trial.result())
    finally:
        stop.set()
        pool.shutdown(wait=False)
        with suppress(KeyboardInterrupt):  # a second one; all is ended soon
            wait(running)
        wait(running)


def _run(
    command: Command, metric: Metric, devices: Sequence[str], timeout: float | None, stop: threading.Event
) -> tuple[Trial, bool]:
    started, out, err = time.monotonic(), *command.logs
    error, value, standard_error, is_missing = "", None, None, False
    for path in (out, err):
        files.unlink_if_there(path)  # a trial of a killed sweep may still write to the old one
    with out.open("wb") as stdout, err.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                list(command.words), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True,
                env=os.environ | ({_DEVICES: ",".join(devices)} if devices else {}),
            )  # fmt: skip
        except OSError as refused:
            error = f"cannot be started: {refused.strerror or refused}"
    if not error:
        until = math.inf if timeout is None else started + timeout
        while process.poll() is None and not stop.is_set() and not error:
            error = f"took more than {timeout:g} s" if time.monotonic() > until else ""
            time.sleep(_TICK)
        code = _end(process)
        if not error and code:
            error = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    seconds = time.monotonic() - started
    if not error:
        try:
            value, standard_error = metric.read(out, command.folder)
        except NoMetricError as wrong:
            error, is_missing = str(wrong), isinstance(wrong, MissingMetricError)
    error = error and f"{error}{_end_of_logs(err, out)}"
    trial = replace(command.trial, value=value, standard_error=standard_error, seconds=seconds, error=error or None)
    return trial, is_missing


def _end(process: subprocess.Popen[bytes]) -> int:
    """End what is left of a process and its group, which has its id also when it has ended; its exit code."""

    def send(number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)

    send(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    send(signal.SIGKILL)
    return process.wait()


def _end_of_logs(*paths: Path) -> str:
    """The end of the first log that says something, for a message."""
    texts = (" ".join(_read_tail(path, _END_OF_LOG).split()) for path in paths)
    text = next(filter(None, texts), "")
    return f": {printable(text)}" if text else ", and wrote nothing"


# --- metrics


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
            return self._printed(_read_tail(stdout, _TAIL))
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


def _read_tail(path: Path, count: int) -> str:
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
