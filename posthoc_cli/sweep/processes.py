"""Evaluations as processes: each in a group of its own, which is ended with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import printable
from posthoc_cli.sweep.metrics import Metric, NoMetricError, read_tail

_MARK = "EMA_TRIAL"
"""Environment variable by which the processes of a trial are known, also those that have left its group."""
_GRACE = 0.5
"""Seconds between SIGTERM and SIGKILL."""
_TICK = 0.01
_ROUNDS = 50
"""Of looking for processes that must end; one that waits for a dead file system never does."""
_LONGEST_LOG = 1_000_000
_END_OF_LOG = 300


@dataclass(frozen=True)
class Evaluation:
    """One run of the user's command.

    Attributes:
        words: the command, all placeholders filled in.
        folder: of the trial; exists.
        log: where standard output and error go, with the endings .out and .err.
    """

    words: Sequence[str]
    folder: Path
    log: Path


@dataclass(frozen=True)
class Outcome:
    """What an evaluation has given: a value, or an error."""

    value: float | None
    standard_error: float | None
    seconds: float
    error: str | None


def run_all(
    evaluations: Sequence[Evaluation],
    metric: Metric,
    jobs: int = 1,
    devices: Sequence[str] = (),
    timeout: float | None = None,
) -> Iterator[tuple[int, Outcome]]:
    """Run evaluations, up to `jobs` at a time; gives the index and outcome of each as it ends.

    Whatever ends the iteration ends the processes. `devices` are given out as CUDA_VISIBLE_DEVICES.
    """
    waiting, running = list(enumerate(evaluations)), dict[int, tuple[int, _Process]]()
    try:
        while waiting or running:
            for slot in [slot for slot in range(jobs) if slot not in running][: len(waiting)]:
                index, evaluation = waiting.pop(0)
                running[slot] = index, _Process(evaluation, devices[slot % len(devices)] if devices else None)
            for slot, (index, process) in list(running.items()):
                outcome = process.outcome(metric, timeout)
                if outcome is not None:
                    del running[slot]
                    yield index, outcome
            time.sleep(_TICK)
    finally:
        for _, process in running.values():
            process.signal(signal.SIGTERM)
        until = time.monotonic() + _GRACE
        for _, process in running.values():
            process.end(until)


def end_leftovers(folder: Path) -> None:
    """End what a killed sweep has left running in a folder of trials."""
    _kill_marked(f"{_MARK}={folder.resolve()}/")


class _Process:
    def __init__(self, evaluation: Evaluation, device: str | None) -> None:
        self._evaluation, self._started, self._mark = evaluation, time.monotonic(), f"{evaluation.folder.resolve()}/"
        environment = os.environ | {_MARK: self._mark}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        self._error = ""
        with self._path(".out").open("wb") as out, self._path(".err").open("wb") as err:
            try:
                self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    list(evaluation.words), stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                self._process, self._error = None, f"cannot be started: {error.strerror or error}"

    def outcome(self, metric: Metric, timeout: float | None) -> Outcome | None:
        """What has come of it; None while it runs."""
        seconds = time.monotonic() - self._started
        if self._process is not None and self._process.poll() is None:
            if timeout is None or seconds < timeout:
                return None
            self.signal(signal.SIGTERM)
            self._error = f"took more than {timeout:g} s"
        self.end(time.monotonic() + _GRACE)
        code = 0 if self._process is None else self._process.returncode
        if not self._error and code:
            self._error = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        value = standard_error = None
        if not self._error:
            try:
                value, standard_error = metric.read(self._path(".out"), self._evaluation.folder)
            except NoMetricError as error:
                self._error = str(error)
        message = f"{self._error}{self._end_of_log()}" if self._error else None
        self._shorten_logs()
        return Outcome(value, standard_error, seconds, message)

    def signal(self, number: int) -> None:
        """Send a signal to the whole group, which keeps its id while it has members, also without its leader."""
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def end(self, until: float) -> None:
        """End what is left of it: SIGKILL, where it has not ended by itself by then."""
        if self._process is None:
            return
        while self._process.poll() is None and time.monotonic() < until:
            time.sleep(_TICK)
        self.signal(signal.SIGKILL)
        _kill_marked(f"{_MARK}={self._mark}")
        self._process.wait()

    def _path(self, ending: str) -> Path:
        return self._evaluation.log.with_name(self._evaluation.log.name + ending)

    def _end_of_log(self) -> str:
        """The end of standard error, or else of standard output, for a message."""
        texts = (" ".join(read_tail(self._path(ending), _END_OF_LOG).split()) for ending in (".err", ".out"))
        text = next(filter(None, texts), "")
        return f": {printable(text)}" if text else ", and wrote nothing"

    def _shorten_logs(self) -> None:
        for path in (self._path(".out"), self._path(".err")):
            if path.stat().st_size > _LONGEST_LOG:
                files.write_whole(path, read_tail(path, _LONGEST_LOG).encode(), overwrite=True)


def _kill_marked(mark: str) -> None:
    """Kill processes whose environment has a variable that begins so; where the system shows environments."""
    if not sys.platform.startswith("linux"):
        return
    for _ in range(_ROUNDS):  # a process may start another while this looks
        found = False
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                variables = (folder / "environ").read_bytes().split(b"\0")
                if int(folder.name) != os.getpid() and any(v.startswith(os.fsencode(mark)) for v in variables):
                    os.kill(int(folder.name), signal.SIGKILL)
                    found = True
        if not found:
            return
        time.sleep(_TICK)
