"""A sweep by the user's command, with a process and a record of each trial; and one in Python, by a
function."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from posthoc_cli import files
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    OutputExistsError,
    PostHocError,
    shown,
    warn,
)
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.like import check_shape
from posthoc_cli.export.writing import SynthesisReport
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.run import Run
from posthoc_cli.snapshots.directory import LOCK_NAME, DirectoryLock
from posthoc_cli.snapshots.snapshot import (
    Snapshot,
    are_equal,
    places,
    recorded_weights,
    statistics_notice,
)
from posthoc_cli.snapshots.tensorfile import read_file
from posthoc_cli.sweep import images
from posthoc_cli.sweep.search import (
    Average,
    Axis,
    Measure,
    Search,
    SweepReport,
    Trial,
    good_range,
    has_raw,
)
from posthoc_cli.sweep.trials import Metric, TrialError, measure
from posthoc_cli.targets import Mean, SigmaRel, Target
from posthoc_cli.tracker import PostHocEMA
from posthoc_cli.tracker.filling import swapped_in

log = logging.getLogger(__name__)

TRIALS = "trials.jsonl"  # the settings of the sweep, then a trial a line
LOGS = "logs"
_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|seed|dir)\}")
_SCRATCH = ".scratch"
_DIRECTIONS = {True: "minimize", False: "maximize", None: "look"}
_OPERATORS = ("|", "||", "&&", ">", ">>", "<", "&>", "2>", "2>&1")
_USE_A_SHELL = "pipes, variables, cd and the like need a shell: sh -c '...'"


@dataclass(eq=False)
class Sweep:
    """A search for the best length of an average by a user's command; or, if `minimize` is None, a
    look at the images that it makes of some lengths."""

    run: Run  # the snapshots. Raw weights are measured, too, if it has a checkpoint of the time `t`
    # the command line, with `{weights}` and optionally `{sigma_rel}`, `{seed}`, `{dir}`
    command: str
    metric: Metric
    out: Path  # folder for the records, logs, images and the best average
    # the lengths; by default every sigma_rel whose predicted error is below 1 %
    axis: Axis | None = None
    minimize: bool | None = True
    repeats: int = 1  # trials of each length, with the seeds 0, 1, ...
    budget: int = 20  # the most lengths to measure
    t: float | None = None
    like: Path | None = None  # as in `Run.write`
    raw: Path | None = None  # a checkpoint with the raw weights, if the run lacks them
    images: str | None = None  # a glob of the images to keep; "none", or None for all
    again: str = ""  # the command line that repeats this sweep
    # called with every trial when it ends, its number, and about how many there will be
    say: Callable[[Trial, int, int], None] = lambda *_: None
    progress: ProgressBar = no_bar

    def run_all(self) -> SweepReport:
        """Run the sweep, or continue one with the same settings that was stopped.

        Raises:
            InvalidValueError: an argument cannot be used.
            OutputExistsError: the folder holds something else, such as another sweep.
            LockedError: another sweep is running in this folder.
            PostHocError: two trials in a row have failed alike, or all have the same metric.
        """
        self._check_command()
        target: Target = SigmaRel(0.2)
        if self.axis is not None:
            target = self.axis.target(self.axis.high)
        self.t = self._write(target, None, dry_run=True).plan.t
        axis = self.axis or good_range(self.run, self.t)
        report = SweepReport(
            axis=axis,
            metric=self.metric.key or "metric",
            minimize=self.minimize,
            settings=self._describe(axis.kind),
            again=self.again,
        )
        search = Search(
            report=report,
            budget=self.budget,
            repeats=self.repeats,
            repeats_known=self.repeats > 1 or "{seed}" in self.command,
            measures_raw=self._measures_raw(self.t),
        )
        with self._locked_folder():
            self._search(search)
            report = search.report
            if report.estimate is not None:
                report = replace(report, outputs=(self._write_best(report.best),))
            elif not (self.out / images.FOLDER).is_dir():
                reason = "no trial has left an image in {dir}"
                raise PostHocError("the sweep", f"{reason}: {', '.join(images.ENDINGS)}")
            report.write(self.out)
            return report

    def _measures_raw(self, t: float) -> bool:
        """Return whether there are raw weights to measure; raise an InvalidValueError if some are
        named although the run contains those of time `t`."""
        contains_raw = has_raw(self.run, t)
        if contains_raw and self.raw is not None:
            reason = "is not needed: the run contains the raw weights of this time"
            raise InvalidValueError("raw", reason, value=self.raw)
        return contains_raw or self.raw is not None

    def _describe(self, kind: str) -> dict[str, Any]:
        """Return what all trials of the folder have in common."""
        return {
            "run": self.run.sources[-1].run_id,
            "t": self.t,
            "command": self.command,
            "metric": None if self.minimize is None else self.metric.text,
            "direction": _DIRECTIONS[self.minimize],
            "kind of length": kind,
            "like": None if self.like is None else str(self.like.resolve()),
        }

    def _search(self, search: Search) -> None:
        """Go on from the recorded trials, and record those that follow."""
        axis = search.report.axis
        recorded = self._recorded(search.report.settings)
        known = [trial for trial in recorded if trial.x is None or trial.x in axis]
        search.report = replace(search.report, trials=tuple(known))
        with self.progress("measuring", search.expected) as advance:
            advance(len(known))
            for trial in search.run(lambda x: self._average(axis, x)):
                self._record(trial)
                report = search.report
                self.say(trial, len(report.trials), search.expected)
                advance(1)
                if report.estimate is not None:  # if the next trial is interrupted, this is known
                    report.write(self.out)

    def _write_best(self, best: Target) -> Path:
        path = self.out / f"best{self._suffix}"
        if not self._suffix:  # a folder is never overwritten
            images.remove(path)
        self._write(best, path, overwrite=bool(self._suffix))
        return path

    def _check_command(self) -> None:
        """Raise an InvalidValueError if the command cannot be used."""
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise self._unusable(f"cannot be split into words: {error}") from error
        if not any("{weights}" in word for word in words):
            raise self._unusable("must contain {weights}, which becomes the path of the average")
        if self.minimize is None and self.images == "none":
            raise InvalidValueError("images", "would leave nothing to look at", value="none")
        if "{dir}" not in self.command:
            if self.metric.file is not None:
                file = "the folder that is searched for the file with the metric"
                raise self._unusable(f"must contain {{dir}}, {file}")
            if self.minimize is None or self.images not in (None, "none"):
                raise self._unusable("must contain {dir}, the folder for the images")
        _check_program(words)

    def _unusable(self, reason: str) -> InvalidValueError:
        return InvalidValueError("command", reason, value=self.command or "(empty)")

    @contextmanager
    def _locked_folder(self) -> Iterator[None]:
        """Make and lock the folder of the sweep; remove averages that a killed sweep has left, and
        at the end ours."""
        files.check_parent(self.out)
        files.check_folder(self.out)
        names = set[str]()
        if self.out.is_dir():
            names = {path.name for path in files.system.list(self.out)}
        if names - {LOCK_NAME, LOGS, _SCRATCH} and TRIALS not in names:
            # A sweep might replace or remove files of other programs that have the same names as
            # its own.
            reason = "is not empty, and not the folder of a sweep"
            raise OutputExistsError(self.out, reason, "name another folder")
        files.make_directory(self.out / LOGS)
        with DirectoryLock(self.out):
            try:
                images.remove(self.out / _SCRATCH)
                yield
            finally:
                images.remove(self.out / _SCRATCH)

    @property
    def _suffix(self) -> str:
        if self.like is None:
            return ".safetensors"
        return "" if self.like.is_dir() else self.like.suffix

    def _write(
        self,
        target: Target,
        path: Path | None,
        **options: Any,
    ) -> SynthesisReport:
        written = self.run.write(target, path, t=self.t, like=self.like, **options)
        assert written is not None  # as of a process other than the first one
        return written

    # --- trials

    @contextmanager
    def _average(
        self,
        axis: Axis,
        x: float | None,
    ) -> Iterator[tuple[Measure, float | None]]:
        """Make an average or the raw weights; yield what runs the command with a seed, and the
        predicted error."""
        scratch = (self.out / _SCRATCH).absolute()  # the command may change the directory
        files.make_directory(scratch)
        weights = scratch / f"weights{self._suffix}"
        error = None
        if x is not None:
            written = self._write(axis.target(x), weights)
            error = written.plan.predicted_error(0)
        elif self.raw is not None:
            self._write_raw(self.raw, weights)
        else:
            self._write(Mean(1), weights)
        yield functools.partial(self._evaluate, weights), error
        images.remove(scratch)

    def _write_raw(self, raw: Path, weights: Path) -> None:
        """Write the raw weights of a checkpoint as averages are written."""
        plain = weights.with_name("raw.safetensors")
        try:
            export_file(raw, plain, weights=True)
        except InvalidValueError:  # a file of nothing but weights
            export_file(raw, plain)
        names = read_file(plain).entries.keys()
        lacking = self.run.tensors.keys() - names
        if lacking:
            reason = f"lacks tensor {shown(min(lacking))} of the averages"
            raise MismatchError(raw, reason)
        self._warn_of_other_step(raw, plain)
        if self.like is None:
            plain.rename(weights)
        else:
            export_file(plain, weights, like=self.like)

    def _warn_of_other_step(self, raw: Path, plain: Path) -> None:
        """Warn if raw weights are not those that the hook has recorded with the snapshots of the
        averages' time."""
        snapshots = []
        for source in self.run.sources:
            if isinstance(source, Snapshot) and source.t == self.t:
                snapshots.append(source)
        if not snapshots:
            return
        newest = snapshots[-1]
        recorded = recorded_weights(snapshots).get(newest.step)
        if recorded is None:
            return
        shapes = {name: newest.entries[name].shape for name in newest.averages}
        values = []
        with safe_open(plain, "pt") as file:
            for name, elements in groupby(places(shapes), key=itemgetter(0)):
                tensor = file.get_tensor(name)
                check_shape(raw, name, tuple(tensor.shape), shapes[name])
                flat = tensor.flatten().float()
                values += [float(flat[index]) for _, index in elements]
        if not are_equal(np.array(values, np.float32), recorded):
            log.warning(
                "%s: holds other weights than the model had at step %d, of the averages; the gain "
                "is over those",
                raw,
                newest.step,
            )

    def _evaluate(
        self,
        weights: Path,
        trial: Trial,
    ) -> tuple[float | None, float | None]:
        """Run the command; return the metric and its standard error, or raise a TrialError."""
        # Each trial has a new folder: the process of a killed sweep may still write to its old one.
        folder = Path(tempfile.mkdtemp(prefix=f"{trial.name}-", dir=weights.parent))
        length = "raw"
        if trial.x is not None:
            length = str(trial.x).removesuffix(".0")
        texts = {
            "weights": weights,
            "sigma_rel": length,
            "seed": trial.seed,
            "dir": folder,
        }
        words = [
            _PLACEHOLDER.sub(lambda match: str(texts[match[1]]), word)
            for word in shlex.split(self.command)
        ]
        metric = None if self.minimize is None else self.metric
        try:
            measured = measure(words, folder, self.out / LOGS / trial.name, metric)
            if self.images != "none":
                kept = self.out / images.FOLDER / trial.name
                images.keep_images(folder, kept, self.images)
            return measured
        finally:
            images.remove(folder)

    # --- the record

    def _recorded(
        self,
        asked: dict[str, Any],
    ) -> list[Trial]:
        """Return the recorded trials that succeeded, the last of repeated ones; raise an
        OutputExistsError if they are of another sweep."""
        path = self.out / TRIALS
        if not path.exists():
            self._write_lines([json.dumps(asked)])
            return []
        recorded = {}
        try:
            first, *trials = map(json.loads, path.read_text().splitlines())
            settings = {**first}
            for entry in trials:
                trial = Trial(**entry)
                if trial.error is None:
                    recorded[trial.target, trial.seed] = trial
        except (ValueError, TypeError) as error:
            raise FileFormatError(path, "is not a sweep's record", "name another folder") from error
        if not recorded:  # nothing to lose: the call may have been wrong
            self._write_lines([json.dumps(asked)])
            return []
        for name, value in asked.items():
            known = settings.get(name, value)
            if known != value:
                reason = f"holds a sweep of another {name}, {shown(known)}"
                raise OutputExistsError(self.out, reason, "name another folder")
        return [*recorded.values()]

    def _record(self, trial: Trial) -> None:
        """Add a trial durably to the file; raise a WriteError if that fails."""
        lines = (self.out / TRIALS).read_text().splitlines()
        line = json.dumps(asdict(trial), allow_nan=False)
        self._write_lines([*lines, line])

    def _write_lines(self, lines: Sequence[str]) -> None:
        text = "".join(f"{line}\n" for line in lines)
        files.write_atomically(self.out / TRIALS, text.encode(), overwrite=True)


def _check_program(words: Sequence[str]) -> None:
    """Raise an InvalidValueError unless the words of a command can be run without a shell."""
    operators = [word for word in words if word in _OPERATORS]
    if operators:
        reason = "is for a shell, without which the command is run"
        raise InvalidValueError("command", reason, _USE_A_SHELL, value=operators[0])
    if not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
        reason = "its first word is neither a program on the PATH nor an executable file"
        hint = f"a script may need its interpreter first: python3; {_USE_A_SHELL}"
        raise InvalidValueError("command", reason, hint, value=words[0])
    script = words[1] if len(words) > 1 else ""
    if script.endswith((".py", ".sh")) and not Path(script).is_file():
        raise InvalidValueError("command", "no such file", value=script)


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
        reason = "must be a function of a model, or of weights by name"
        raise InvalidValueError("metric", reason, value=shown(metric))
    averages = _Averages(run, model)
    stored = averages.run
    newest = stored.sources[-1]
    if notice := statistics_notice(newest.copies):
        warn(notice)
    report = SweepReport(
        axis=_axis(stored, low, high, values),
        metric=name,
        minimize=minimize,
        settings={"run": newest.run_id, "t": averages.t, "command": None},
    )
    search = Search(
        report=report,
        budget=budget,
        repeats=repeats,
        repeats_known=repeats > 1,
        measures_raw=averages.are_raw_known,
    )

    for _ in search.run(averages.measured_by(metric)):
        pass
    return search.report


def _axis(
    run: Run,
    low: float | None,
    high: float | None,
    values: Sequence[float] | None,
) -> Axis:
    if values is not None:
        return Axis.of_values("sigma_rel", values)
    if low is not None and high is not None:
        return Axis("sigma_rel", low, high)
    good = good_range(run, run.t)
    return Axis("sigma_rel", low or good.low, high or good.high)


class _Averages:
    """The arguments of the metric of a sweep in Python."""

    def __init__(
        self,
        run: Run | PostHocEMA | str | Path,
        model: torch.nn.Module | None,
    ) -> None:
        self.tracker = run if isinstance(run, PostHocEMA) else None
        stored = run.run if isinstance(run, PostHocEMA) else run
        self.run = stored if isinstance(stored, Run) else Run(stored)
        self.model = model
        self._is_tracked = (
            model is not None and self.tracker is not None and self.tracker.tracks(model)
        )

    @property
    def t(self) -> float:
        return self.run.t if self.tracker is None else self.tracker.t

    @property
    def are_raw_known(self) -> bool:
        return self._is_tracked or has_raw(self.run, self.run.t)

    def measured_by(self, metric: Callable[[Any], Any]) -> Average:
        @contextmanager
        def average(x: float | None) -> Iterator[tuple[Measure, float | None]]:
            with self.at(x) as (averaged, error):
                yield lambda _: _checked(metric(averaged)), error

        return average

    @contextmanager
    def at(
        self,
        x: float | None,
    ) -> Iterator[tuple[Any, float | None]]:
        """Yield the argument of the metric for a length, or None for the raw weights, and the
        predicted error."""
        model = self.model
        tracker = self.tracker
        if model is not None and self._is_tracked and x is None:
            with swapped_in(model, {}):  # keeps its weights, and is only put into eval mode
                yield model, None
        elif model is not None and tracker is not None and x is not None:
            with tracker.model(model, sigma_rel=x):
                yield model, None
        else:
            if tracker is not None and x is not None:
                weights = tracker.state_dict(sigma_rel=x)
            else:
                weights = self.run.average(Mean(1) if x is None else x)
            error = None if x is None else weights.predicted_error
            with nullcontext() if model is None else swapped_in(model, weights):
                yield weights if model is None else model, error


def _checked(result: Any) -> tuple[float, float | None]:
    """Return what a metric has returned, as a number and its standard error; raise an
    InvalidValueError if it is something else, and a TrialError if it is not finite."""
    try:
        value, error = result if isinstance(result, tuple) else (result, None)
        number = float(value)
        noise = float(error) if error is not None and 0 < error < math.inf else None
    except (TypeError, ValueError, RuntimeError) as cause:
        raise InvalidValueError(
            "metric", "must return a number, or a number and its standard error"
        ) from cause
    if not math.isfinite(number):
        raise TrialError(f"its metric is {number}")
    return number, noise
