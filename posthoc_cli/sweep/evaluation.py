"""What measures weights: the user's command, in a process for each trial, or a function in Python.

Each process has a separate process group, so that all its remaining children can be ended with it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from posthoc_cli import files
from posthoc_cli.devices import visible_cuda_devices
from posthoc_cli.errors import InvalidValueError, escape_text
from posthoc_cli.request import SweepRequest
from posthoc_cli.sweep import images
from posthoc_cli.sweep.folder import LOGS, SCRATCH
from posthoc_cli.sweep.metric import Metric, TrialError, check_metric, read_tail
from posthoc_cli.sweep.trial import Trial
from posthoc_cli.sweep.weights import Candidate
from posthoc_cli.synthesis.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor

_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|seed|dir|job)\}")
_OPERATORS = ("|", "||", "&&", ">", ">>", "<", "&>", "2>", "2>&1")
_USE_A_SHELL = "for pipes, variables or cd, use a shell: sh -c '...'"
_GRACE = 0.5  # seconds between SIGTERM and SIGKILL
_TICK = 0.01  # seconds between looks at a process
_END_OF_LOG = 300  # bytes at the end of a log that a message shows

Measure = Callable[[], "tuple[float | None, float | None]"]
"""Finds the metric of weights, if one is asked for, and its standard error, if any; a TrialError
says why it has none."""


class Evaluation(Protocol):
    """A way to measure weights."""

    @property
    def name(self) -> str:
        """What a record of trials knows it by."""

    def executor(self) -> AbstractContextManager[Executor]:
        """Make what runs measurements; all that still run end with the block."""

    def prepare(self, weights: Candidate, trial: Trial, job: int) -> tuple[Measure, Plan | None]:
        """Make weights; return what measures them, and their plan, as `Candidate` returns it."""


# --- a function


@dataclass(frozen=True)
class Function:
    """A function that takes tensors by name and returns their metric, or the metric and its
    standard error."""

    function: Callable[[dict[str, Tensor]], Any]

    @property
    def name(self) -> str:
        return getattr(self.function, "__qualname__", type(self.function).__qualname__)

    def executor(self) -> Executor:
        return _Caller()

    def prepare(
        self,
        weights: Candidate,
        trial: Trial,  # noqa: ARG002
        job: int,  # noqa: ARG002
    ) -> tuple[Measure, Plan | None]:
        tensors, plan = weights.make()
        return partial(self._measure, dict(tensors)), plan

    def _measure(self, tensors: dict[str, Tensor]) -> tuple[float, float | None]:
        result = self.function(tensors)
        value, error = result if isinstance(result, tuple) else (result, None)
        try:
            return check_metric(float(value), None if error is None else float(error))
        except (TypeError, ValueError) as failure:
            reason = "must return a number, or a number and its standard error"
            raise InvalidValueError("evaluate", reason, value=repr(result)) from failure


class _Caller(Executor):
    """Call in the thread that submits: functions of users may work in the main thread alone."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        future = Future[Any]()
        try:
            future.set_result(function(*args, **options))
        except TrialError as error:
            future.set_exception(error)
        return future


# --- a command


@dataclass(frozen=True)
class Command:
    """A command line, with `{weights}` and optionally `{sigma_rel}`, `{seed}`, `{dir}`, `{job}`.

    Several at a time each have a CUDA device of their own, in turn, where there are some.
    """

    name: str
    metric: Metric | None  # None if it only makes images
    out: Path  # folder for logs and images
    like: Path | None  # as in `Run.write`
    request: SweepRequest  # how commands run
    _is_stopped: threading.Event = field(default_factory=threading.Event)
    _streams: list[str] = field(default_factory=list)  # on which the first trial has its metric
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)  # that have begun

    @contextmanager
    def executor(self) -> Iterator[Executor]:
        with ThreadPoolExecutor(self.request.jobs) as executor:
            try:
                yield executor
            finally:
                # In this thread, which a second Ctrl-C interrupts, and not only in the others,
                # which may end with it.
                self._is_stopped.set()
                _end_groups(self._processes)

    def prepare(self, weights: Candidate, trial: Trial, job: int) -> tuple[Measure, Plan | None]:
        folder = (self.out / SCRATCH / str(job)).absolute()  # the command may change the directory
        files.make_directory(folder)
        path = folder / f"weights{ending_like(self.like)}"
        plan = weights.write(path, self.like)
        # Each trial has a new folder: the process of a killed sweep may still write to its old one.
        made = Path(tempfile.mkdtemp(prefix=f"{trial.name}-", dir=folder))
        texts = {
            "weights": path,
            "sigma_rel": weights.text,
            "seed": trial.seed,
            "dir": made,
            "job": job,
        }
        words = []
        for word in shlex.split(self.name):
            words.append(_PLACEHOLDER.sub(lambda match: str(texts[match[1]]), word))
        return partial(self._measure, words, trial, made, self._environment(job)), plan

    def _environment(self, job: int) -> dict[str, str]:
        devices = visible_cuda_devices() if self.request.jobs > 1 else []
        if not devices:
            return {**os.environ}
        return {**os.environ, "CUDA_VISIBLE_DEVICES": devices[job % len(devices)]}

    def _measure(
        self,
        words: Sequence[str],
        trial: Trial,
        folder: Path,
        environment: Mapping[str, str],
    ) -> tuple[float | None, float | None]:
        log = self.out / LOGS / trial.name
        out = log.with_name(f"{log.name}.out")
        err = log.with_name(f"{log.name}.err")
        for path in (out, err):
            # the process of a killed sweep may still write to the old file
            files.unlink_if_exists(path)
        try:
            self._run(words, out, err, environment)
            measured: tuple[float | None, float | None] = (None, None)
            if self.metric is not None:
                measured = self.metric.read(log, folder, self._streams)
            images.keep_images(folder, self.out / images.FOLDER / trial.name)
        finally:
            images.remove(folder.parent)  # with the weights
        return measured

    def _run(
        self,
        words: Sequence[str],
        out: Path,
        err: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Run a command until it ends, or is stopped; raise a TrialError if it fails. All its
        remaining children end with it."""
        with out.open("wb") as stdout, err.open("wb") as stderr:
            try:
                process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                    env=environment,
                )
            except OSError as failure:
                reason = f"cannot be started: {failure.strerror or failure}"
                raise TrialError(reason) from failure
            self._processes.append(process)
            while process.poll() is None and not self._is_stopped.wait(_TICK):
                pass
            _end_groups([process])
            self._processes.remove(process)
        if code := process.returncode:
            reason = f"ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise TrialError(f"{reason}: {_last_words(out, err)}")


def ending_like(like: Path | None) -> str:
    """Find the ending of an average that is written like a file; a folder has none."""
    if like is None:
        return ".safetensors"
    return "" if like.is_dir() else like.suffix


def _last_words(out: Path, err: Path) -> str:
    """Find the last line of standard error, which says most of a traceback, or else the end of
    standard output."""
    _, _, line = read_tail(err, _END_OF_LOG).strip().rpartition("\n")
    text = line or " ".join(read_tail(out, _END_OF_LOG).split())
    return escape_text(text) or "it wrote nothing"


def _end_groups(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """End the groups of processes, also on a second Ctrl-C; a group keeps the id of a process that
    has ended."""
    ending = [*processes]
    try:
        for process in ending:
            _signal_group(process, signal.SIGTERM)
        for process in ending:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
    finally:
        for process in ending:
            _signal_group(process, signal.SIGKILL)
        for process in ending:
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def check_command(command: str, metric: Metric | None) -> None:
    """Raise an InvalidValueError if the command cannot be used."""
    value = command or "(empty)"
    try:
        words = shlex.split(command)
    except ValueError as error:
        reason = f"invalid quoting: {error}"
        raise InvalidValueError("evaluate", reason, value=value) from error
    if not any("{weights}" in word for word in words):
        reason = "must contain {weights}, which becomes the path of the average"
        raise InvalidValueError("evaluate", reason, value=value)
    if "{dir}" not in command and metric is not None and metric.file is not None:
        reason = "must contain {dir}, the folder that is searched for the file with the metric"
        raise InvalidValueError("evaluate", reason, value=value)
    if "{dir}" not in command and metric is None:
        reason = "must contain {dir}, the folder for the images"
        raise InvalidValueError("evaluate", reason, value=value)
    operators = [word for word in words if word in _OPERATORS]
    if operators:
        reason = "the command runs without a shell"
        raise InvalidValueError("evaluate", reason, _USE_A_SHELL, value=operators[0])
    if not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
        reason = "command not found"
        hint = f"start a script with its interpreter, such as python3; {_USE_A_SHELL}"
        raise InvalidValueError("evaluate", reason, hint, value=words[0])
    script = words[1] if len(words) > 1 else ""
    if script.endswith((".py", ".sh")) and not Path(script).is_file():
        raise InvalidValueError("evaluate", "no such file", value=script)
