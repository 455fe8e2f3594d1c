"""Trials as processes: each in a process group of its own, which is ended with all that is still in it."""

from __future__ import annotations

import math
import os
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

from posthoc_cli import files
from posthoc_cli.errors import printable
from posthoc_cli.sweep.metrics import Metric, MissingMetricError, NoMetricError, read_tail
from posthoc_cli.sweep.results import Record

_DEVICES = "CUDA_VISIBLE_DEVICES"
_GRACE = 0.5
"""Seconds between SIGTERM and SIGKILL."""
_TICK = 0.01
_LONGEST_LOG = 1_000_000
_END_OF_LOG = 300


@dataclass(frozen=True)
class Command:
    """The user's command for one trial.

    Attributes:
        trial: what is known of it before.
        words: all placeholders filled in.
        folder: of the trial; exists.
        log: where standard output and error go, with the endings .out and .err.
    """

    trial: Record
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
    told: Callable[[Command, Record, bool], None],
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

    def run(command: Command) -> tuple[Record, bool]:
        slot = slots.get()
        try:
            began(command)
            own = devices[slot % len(devices) :: jobs] if devices else []
            return _run(command, metric, own, timeout, stop)
        finally:
            slots.put(slot)

    # Ctrl-C interrupts the main thread only, never a thread that is just starting or ending a process.
    pool, running = ThreadPoolExecutor(jobs), dict[Future[tuple[Record, bool]], Command]()
    waiting = iter(commands)
    try:
        while True:
            # None begins before what has come of the last one is told, which may be a reason to end.
            for command in islice(waiting, jobs - len(running)):
                running[pool.submit(run, command)] = command
            if not running:
                break
            for trial in wait(running, return_when=FIRST_COMPLETED).done:
                told(running.pop(trial), *trial.result())
    finally:
        stop.set()
        pool.shutdown(wait=False)
        with suppress(KeyboardInterrupt):  # a second one; all is ended soon
            wait(running)
        wait(running)


def _run(
    command: Command, metric: Metric, devices: Sequence[str], timeout: float | None, stop: threading.Event
) -> tuple[Record, bool]:
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
    for path in (out, err):
        if path.stat().st_size > _LONGEST_LOG:
            files.write_whole(path, read_tail(path, _LONGEST_LOG).encode(), overwrite=True)
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
    texts = (" ".join(read_tail(path, _END_OF_LOG).split()) for path in paths)
    text = next(filter(None, texts), "")
    return f": {printable(text)}" if text else ", and wrote nothing"
