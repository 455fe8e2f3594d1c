"""A sweep by the user's command, with a process and a record of each trial; and one in Python, by a
function."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, OutputExistsError, shown, warn
from posthoc_cli.export.writing import SynthesisReport
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.run import Run
from posthoc_cli.snapshots.directory import LOCK_NAME, DirectoryLock
from posthoc_cli.snapshots.snapshot import statistics_notice
from posthoc_cli.sweep.search import (
    RAW,
    RESULT,
    Axis,
    Search,
    SweepReport,
    Trial,
    good_range,
    has_raw,
)
from posthoc_cli.sweep.trials import Metric, MissingMetricError, TrialError, measure
from posthoc_cli.targets import Mean, SigmaRel, Target
from posthoc_cli.tracker import PostHocEMA
from posthoc_cli.tracker.filling import swapped_in

TRIALS = "trials.jsonl"
_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|seed|dir)\}")
_SCRATCH, _LOGS = ".scratch", "logs"


@dataclass(eq=False)
class Sweep:
    """A search for the best length of an average by a user's command."""

    run: Run  # the snapshots. Raw weights are measured, too, if it has a checkpoint of the time `t`
    command: (
        str  # the command line, with `{weights}` and optionally `{sigma_rel}`, `{seed}`, `{dir}`
    )
    metric: Metric
    out: Path  # folder for the records, logs and the best average
    # the lengths; by default every sigma_rel whose predicted error is below 1 %
    axis: Axis | None = None
    minimize: bool = True
    repeats: int = 1  # trials of each length, with the seeds 0, 1, ...
    budget: int = 20  # the most lengths to measure
    t: float | None = None
    like: Path | None = None  # as in `Run.write`
    again: str = ""  # the command line that repeats this sweep
    say: Callable[[Trial], None] = lambda _: None  # called with every trial when it ends
    progress: ProgressBar = no_bar
    _settings: dict[str, Any] = field(init=False)

    def run_all(self) -> SweepReport:
        """Run the sweep, or continue one with the same settings that was stopped.

        Raises:
            InvalidValueError: an argument cannot be used.
            LockedError: another sweep is running in this folder.
            PostHocError: too few trials have succeeded, or all have the same metric.
        """
        self._check()
        target = SigmaRel(0.2) if self.axis is None else self.axis.target(self.axis.high)
        self.t = self._write(target, None, dry_run=True).plan.t
        # as --metric takes it
        self._settings = {
            "run": self.run.sources[-1].run_id,
            "t": self.t,
            "command": self.command,
            "metric": ":".join(filter(None, (self.metric.file, self.metric.key))),
            "like": None if self.like is None else str(self.like.resolve()),
        }
        axis = self.axis or good_range(self.run, self.t)
        search = Search(
            axis,
            minimize=self.minimize,
            budget=self.budget,
            repeats=self.repeats,
            again=self.repeats > 1 or "{seed}" in self.command,
            raw=has_raw(self.run, self.t),
        )
        with self._locked_folder(), self.progress("measuring", search.most) as advance:
            for trial in self._recorded():  # of any kind of length
                if trial.target == RAW or (trial.target.startswith(axis.kind) and trial.x in axis):
                    search.trials.append(trial)
            advance(len(search.trials))
            for _ in search.rounds(functools.partial(self._measure, axis, advance)):
                report = search.report(self.metric.key or "metric", self._settings, self.again)
                report.write(self.out)  # if the next round is interrupted, this is known
            best = self.out / f"best{self._suffix}"
            if not self._suffix:  # a folder is never overwritten
                _remove(best)
            self._write(report.best, best, overwrite=bool(self._suffix))
            report = replace(report, outputs=(best,))
            report.write(self.out)
            return report

    def _check(self) -> None:
        """Raise an InvalidValueError that names an argument that cannot be used."""
        value, reason, hint = self.command or "(empty)", "", ""
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            reason = f"cannot be split into words: {error}"
        else:
            if not any("{weights}" in word for word in words):
                reason = "must contain {weights}, which becomes the path of the average"
            elif self.metric.file is not None and "{dir}" not in self.command:
                reason = (
                    "must contain {dir}, the folder that is searched for the file with the metric"
                )
            elif not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
                value, reason = (
                    words[0],
                    "its first word is neither a program on the PATH nor an executable file",
                )
                hint = "a script may need its interpreter first: python3"
        if reason:
            raise InvalidValueError("command", reason, hint, value=value)

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Make and lock the folder of the sweep; remove averages that a killed sweep has left, and
        at the end ours."""
        files.check_parent("out", self.out)
        if self.out.exists() and not self.out.is_dir():
            raise InvalidValueError("out", "is a file", "name a folder", value=self.out)
        names = {path.name for path in files.system.list(self.out)} if self.out.is_dir() else set()
        if names - {LOCK_NAME, _LOGS, _SCRATCH} and not names & {TRIALS, RESULT}:
            # A sweep might replace or remove files of other programs that have the same names as
            # its own.
            raise OutputExistsError(
                self.out, "is not empty, and not the folder of a sweep", "name another folder"
            )
        files.make_directory(self.out / _LOGS)
        with DirectoryLock(self.out):
            try:
                _remove(self.out / _SCRATCH)
                yield
            finally:
                _remove(self.out / _SCRATCH)

    @property
    def _suffix(self) -> str:
        if self.like is None:
            return ".safetensors"
        return "" if self.like.is_dir() else self.like.suffix

    def _write(self, target: Target, path: Path | None, **options: Any) -> SynthesisReport:
        written = self.run.write(target, path, t=self.t, like=self.like, **options)
        assert written is not None  # as of a process other than the first one
        return written

    def _measure(
        self, axis: Axis, advance: Callable[[int], None], wanted: Sequence[tuple[float, int]]
    ) -> Iterator[Trial]:
        """Make one average after another, run the command with each seed, and yield the recorded
        results."""
        scratch = (self.out / _SCRATCH).absolute()  # the command may change the directory
        for x, pairs in itertools.groupby(wanted, lambda pair: pair[0]):
            files.make_directory(scratch)
            target, weights = axis.target(x) if x else Mean(1), scratch / f"weights{self._suffix}"
            predicted = self._write(target, weights).plan.predicted_error(0)
            title, error = (target.title, predicted) if x else (RAW, None)
            for _, seed in pairs:
                started, name = (
                    time.monotonic(),
                    re.sub(r"[^A-Za-z0-9_.-]", "-", f"{title}-seed-{seed}"),
                )
                value, noise, reason = self._evaluate(
                    name, weights, sigma_rel=str(x), seed=str(seed)
                )
                seconds = time.monotonic() - started
                trial = Trial(
                    title, x, seed, value, noise, error, seconds, reason, f"{_LOGS}/{name}"
                )
                self._record(trial)
                self.say(trial)
                advance(1)
                yield trial
            _remove(scratch)

    def _evaluate(
        self, name: str, weights: Path, **texts: str
    ) -> tuple[float | None, float | None, str | None]:
        """Run the command; return the metric and its standard error, or the reason why there is
        none."""
        # Each trial has a new folder: the process of a killed sweep may still write to its old one.
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=weights.parent))
        texts |= {"weights": str(weights), "dir": str(folder)}
        words = [
            _PLACEHOLDER.sub(lambda match: texts[match[1]], word)
            for word in shlex.split(self.command)
        ]
        try:
            return *measure(words, folder, self.out / _LOGS / name, self.metric), None
        except TrialError as error:
            # further trials would fail, too
            if isinstance(error, MissingMetricError) and not self._recorded():
                raise InvalidValueError("metric", str(error), value=self.metric.key or "") from None
            return None, None, str(error)
        finally:
            _remove(folder)

    def _recorded(self) -> list[Trial]:
        """Return the successful trials with these settings, the last of repeated ones; skip lines
        of any other content.

        The file may have trials with other settings, which are not comparable.
        """
        path, settings = self.out / TRIALS, json.loads(json.dumps(self._settings))
        found = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            with suppress(ValueError, TypeError, KeyError, RecursionError, OverflowError):
                entry = json.loads(line)
                trial = Trial(**entry["trial"])
                # The sum of what is no number raises a TypeError, also of the value of a failed
                # trial, None.
                numbers: Any = trial.x, trial.seed, trial.value, trial.standard_error or 0.0
                is_ours = entry["settings"] == settings and isinstance(trial.target, str)
                if is_ours and math.isfinite(math.fsum(numbers)):
                    found[trial.target, trial.x, trial.seed] = trial
        return [*found.values()]

    def _record(self, trial: Trial) -> None:
        """Add a trial durably to the file; raise a WriteError if that fails."""
        path = self.out / TRIALS
        lines = path.read_bytes().splitlines() if path.exists() else []
        lines.append(
            json.dumps(
                {"settings": self._settings, "trial": asdict(trial)}, allow_nan=False
            ).encode()
        )
        files.write_atomically(path, b"".join(line + b"\n" for line in lines), overwrite=True)


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists; raise a WriteError if that
    fails."""
    with files.reported_as_write_error(path, "removed"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            files.unlink_if_exists(path)


# --- in Python


def sweep(
    run: Run | PostHocEMA | str | Path,
    metric: Callable[[Any], float | tuple[float, float]],
    *,
    model: torch.nn.Module | None = None,
    low: float | None = None,
    high: float | None = None,
    values: Sequence[float] | None = None,
    minimize: bool = True,
    repeats: int = 1,
    budget: int = 20,
    name: str = "metric",
) -> SweepReport:
    """Find the best sigma_rel by a metric, in memory.

    Arguments:
        run: snapshots or checkpoints, or a tracker, which may be training. Raw weights are
            measured, too, if they are available: in the model that the tracker averages, or in a
            checkpoint of the newest time.
        metric: a function of `model` with the averaged weights, in eval mode, or without a model of
            the weights by name; returns the metric, or a tuple of the metric and its standard
            error. Random seeds are up to it.
        model: receives the weights of each average in place, and is restored afterwards.
        low, high: ends of the range; by default the range where the predicted error is below 1 %.
        values: the lengths to measure, instead of a search.
        repeats: calls for each length.
        budget: the most lengths to measure.
        name: of the metric in the report.

    Raises:
        InvalidValueError: an argument cannot be used.
        PostHocError: the metric was finite for too few lengths, or the same for all.
    """
    if not callable(metric):
        raise InvalidValueError(
            "metric", "must be a function of a model, or of weights by name", value=shown(metric)
        )
    tracker = run if isinstance(run, PostHocEMA) else None
    stored = run if isinstance(run, Run) else run.run if isinstance(run, PostHocEMA) else Run(run)
    newest = stored.sources[-1]
    if values is not None:
        axis = Axis.of_values("sigma_rel", values)
    else:
        good = good_range(stored) if low is None or high is None else Axis("sigma_rel", low, high)
        axis = Axis(
            "sigma_rel", good.low if low is None else low, good.high if high is None else high
        )
    if notice := statistics_notice(newest.copies):
        warn(notice)
    is_tracked = model is not None and tracker is not None and tracker.tracks(model)
    raw = is_tracked or has_raw(stored)
    search = Search(
        axis, minimize=minimize, budget=budget, repeats=repeats, again=repeats > 1, raw=raw
    )
    averages = functools.partial(_average, stored, tracker, model, is_tracked)

    def measure(wanted: Sequence[tuple[float, int]]) -> Iterator[Trial]:
        for length, seed in wanted:
            started = time.perf_counter()
            with averages(length) as (average, error):
                value, noise = _checked(metric(average))
            title, seconds = (
                SigmaRel(length).title if length else RAW,
                time.perf_counter() - started,
            )
            reason = None if math.isfinite(value) else f"its metric is {value}"
            yield Trial(
                title, length, seed, None if reason else value, noise, error, seconds, reason
            )

    for _ in search.rounds(measure):
        pass
    return search.report(
        name,
        {"run": newest.run_id, "t": newest.t if tracker is None else tracker.t, "command": None},
    )


@contextmanager
def _average(
    run: Run,
    tracker: PostHocEMA | None,
    model: torch.nn.Module | None,
    is_tracked: bool,
    length: float,
) -> Iterator[tuple[Any, float | None]]:
    """Yield the argument of the metric, and the predicted error of the average; the length 0 means
    the raw weights."""
    if model is not None and tracker is not None and (length or is_tracked):
        # Without a length the model keeps its weights, and is only put into eval mode.
        with tracker.model(model, sigma_rel=length) if length else swapped_in(model, {}):
            yield model, None
        return
    weights = (
        tracker.state_dict(sigma_rel=length)
        if tracker and length
        else run.average(length or Mean(1))
    )
    with nullcontext() if model is None else swapped_in(model, weights):
        yield (weights if model is None else model), weights.predicted_error if length else None


def _checked(result: Any) -> tuple[float, float | None]:
    """Return what a metric has returned, as a number and its standard error; else raise an
    InvalidValueError."""
    try:
        value, error = result if isinstance(result, tuple) else (result, None)
        return float(value), float(error) if error is not None and 0 < error < math.inf else None
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidValueError(
            "metric", "must return a number, or a number and its standard error"
        ) from cause
