"""A sweep by the user's command, which runs as a separate process for each trial, and the record of its trials."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, LockedError, OutputExistsError
from posthoc_cli.export.writing import SynthesisReport
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.run import Run
from posthoc_cli.snapshots.directory import LOCK_NAME, DirectoryLock
from posthoc_cli.sweep.search import RAW, RESULT, Axis, Search, SweepReport, Trial, check_counts, good_range, has_raw
from posthoc_cli.sweep.trials import Metric, MissingMetricError, TrialError, measure
from posthoc_cli.targets import Mean, SigmaRel, Target

TRIALS = "trials.jsonl"
_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|seed|dir)\}")
_SCRATCH, _LOGS = ".scratch", "logs"


class Records:
    """The recorded trials of one question, in a file of `folder` that may contain trials of other questions.

    The question is the settings that comparable trials share: the run, its time, the command, the metric, ...
    """

    def __init__(self, folder: Path, question: Mapping[str, Any]) -> None:
        self._path, self._question = folder / TRIALS, json.loads(json.dumps(question))

    def read(self) -> list[Trial]:
        """Return the successful trials of this question, the last of repeated ones; skip other lines of any content."""
        trials = {}
        for line in self._path.read_bytes().splitlines() if self._path.exists() else ():
            try:
                entry = json.loads(line)
                if entry["question"] == self._question:
                    trial = Trial(**entry["trial"])
                    numbers: Any = (trial.x, trial.value, trial.standard_error or 0.0)
                    if isinstance(trial.seed, int) and all(abs(number) < 1e300 for number in numbers):
                        trials[trial.x, trial.seed] = trial
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return [*trials.values()]

    def append(self, trial: Trial) -> None:
        """Append a trial durably to the file; raise a WriteError if that fails."""
        line = json.dumps({"question": self._question, "trial": asdict(trial)}, allow_nan=False)
        with files.reported_as_write_error(self._path):
            descriptor = files.system.open_append(self._path)
            try:
                size = os.fstat(descriptor).st_size
                # Whatever a crash cut off becomes a line of its own, which `read` skips.
                is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
                files.write_at(descriptor, f"{chr(10) * is_cut}{line}\n".encode(), size)
                files.system.fsync(descriptor)
            finally:
                files.system.close(descriptor)


@dataclass(eq=False)
class Sweep:
    """A search for the best length of an average by a user's command.

    Attributes:
        run: the snapshots. Raw weights are measured, too, if it has a checkpoint of the time `t`.
        command: the command line, with `{weights}` and optionally `{sigma_rel}`, `{seed}`, `{dir}`.
        out: folder for the records, logs and the best average.
        axis: the lengths; by default every sigma_rel whose predicted error is below 1 %.
        repeats: trials of each length, with the seeds 0, 1, ...
        budget: the most lengths to measure.
        like, component: as in `Run.write`.
        again: the command line that repeats this sweep.
        say: called with every trial when it ends.
    """

    run: Run
    command: str
    metric: Metric
    out: Path
    axis: Axis | None = None
    minimize: bool = True
    repeats: int = 1
    budget: int = 20
    t: float | None = None
    like: Path | None = None
    component: str | None = None
    again: str = ""
    say: Callable[[Trial], None] = lambda _: None
    progress: ProgressBar = no_bar

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
        axis = self.axis or good_range(self.run, self.t)
        check_counts(self.repeats, self.budget, axis)
        settings = {
            "run": self.run.sources[-1].run_id, "t": self.t, "command": self.command, "metric": self.metric.text,
            "like": None if self.like is None else str(self.like.resolve()), "component": self.component,
        }  # fmt: skip
        most = self.repeats * (self.budget if axis.values is None else len(axis.values))
        with self._locked_folder(), self.progress("measuring", most) as advance:
            raw_records = Records(self.out, settings | {"searched": RAW})
            raw = raw_records.read()
            if has_raw(self.run, self.t):
                seeds = sorted(set(range(self.repeats)) - {trial.seed for trial in raw})
                raw += self._measure([(0.0, seed) for seed in seeds], lambda _: Mean(1), raw_records)
            records = Records(self.out, settings | {"searched": axis.kind})
            search = Search(
                axis, records.read(), minimize=self.minimize, budget=self.budget,
                repeats=self.repeats, again=self.repeats > 1 or "{seed}" in self.command,
            )  # fmt: skip
            advance(len(search.trials))

            def measured(wanted: Sequence[tuple[float, int]]) -> Iterator[Trial]:
                for trial in self._measure(wanted, axis.target, records):
                    yield trial
                    advance(1)

            def report(outputs: tuple[Path, ...] = ()) -> SweepReport:
                trials, label = (*raw, *search.trials), self.metric.label
                made = SweepReport(
                    label, self.minimize, trials, search.found, search.stopped, outputs, settings, self.again
                )
                made.write(self.out)
                return made

            for _ in search.rounds(measured):
                report()  # of what is known if the next round is interrupted
            best = self.out / f"best{self._suffix}"
            if self.like is not None:  # a model folder is never overwritten
                _remove(best)
            self._write(axis.target(search.found.best), best, overwrite=self.like is None)
            return report((best,))

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
                reason = "must contain {dir}, the folder that is searched for the file with the metric"
            elif not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
                value, reason = words[0], "its first word is neither a program on the PATH nor an executable file"
                hint = "a script may need its interpreter first: python3"
        if reason:
            raise InvalidValueError("command", reason, hint, value=value)
        if self.out.exists() and not self.out.is_dir():
            raise InvalidValueError("out", "is a file", "name a folder", value=self.out)

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Make and lock the folder of the sweep, and remove averages that a killed sweep has left."""
        files.check_parent("out", self.out)
        names = {path.name for path in files.system.list(self.out)} if self.out.is_dir() else set()
        if names - {LOCK_NAME, _LOGS, _SCRATCH} and not names & {TRIALS, RESULT}:
            # A sweep might replace or remove files of other programs that have the same names as its own.
            raise OutputExistsError(self.out, "is not empty, and not the folder of a sweep", "name another folder")
        with files.reported_as_write_error(self.out):
            for folder in (self.out, self.out / _LOGS):
                files.make_directory(folder)
        try:
            lock = DirectoryLock(self.out)
        except LockedError as error:
            raise LockedError(self.out, error.reason, "wait for that sweep, or name another folder") from error
        with lock:
            _remove(self.out / _SCRATCH)
            try:
                yield
            finally:
                _remove(self.out / _SCRATCH)

    @property
    def _suffix(self) -> str:
        return ".safetensors" if self.like is None else ""

    def _write(self, target: Target, path: Path | None, **options: Any) -> SynthesisReport:
        """Write one average."""
        written = self.run.write(target, path, t=self.t, like=self.like, component=self.component, **options)
        assert written is not None  # as of a process other than the first one
        return written

    def _measure(
        self, wanted: Sequence[tuple[float, int]], target_of: Callable[[float], Target], records: Records
    ) -> Iterator[Trial]:
        """Make one average after another, run the command with each seed, and yield the recorded results."""
        scratch = (self.out / _SCRATCH).absolute()  # the command may change the directory
        for value, pairs in itertools.groupby(wanted, lambda pair: pair[0]):
            with files.reported_as_write_error(scratch):
                files.make_directory(scratch)
            weights = scratch / f"weights{self._suffix}"
            predicted = self._write(target_of(value), weights).plan.predicted_error(0)
            for _, seed in pairs:
                title = target_of(value).title if value else RAW
                trial = Trial(title, value, seed, predicted_error=predicted if value else None)
                trial = self._evaluate(trial, weights, is_first=not records.read())
                records.append(trial)
                self.say(trial)
                yield trial
            _remove(scratch)

    def _evaluate(self, trial: Trial, weights: Path, is_first: bool) -> Trial:
        """Run the command for one trial; return the trial with its metric, or with the reason why it failed."""
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{trial.target}-seed-{trial.seed}")
        # Each trial has a new folder: the process of a killed sweep may still write to its old one.
        folder = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=weights.parent))
        texts = {"weights": str(weights), "sigma_rel": str(trial.x), "seed": str(trial.seed), "dir": str(folder)}
        words = [_PLACEHOLDER.sub(lambda match: texts[match[1]], word) for word in shlex.split(self.command)]
        started, value, standard_error, reason = time.monotonic(), None, None, None
        try:
            value, standard_error = measure(words, folder, self.out / _LOGS / name, self.metric)
        except TrialError as error:
            if isinstance(error, MissingMetricError) and is_first:  # further trials would fail, too
                raise InvalidValueError("metric", str(error), value=self.metric.key or "") from None
            reason = str(error)
        _remove(folder)
        return replace(
            trial, value=value, standard_error=standard_error, seconds=time.monotonic() - started, error=reason,
            log=f"{_LOGS}/{name}",
        )  # fmt: skip


def _remove(path: Path) -> None:
    """Remove a file, or a folder with its contents, if it exists; raise a WriteError if that fails."""
    with files.reported_as_write_error(path, "removed"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            files.unlink_if_exists(path)
