"""A sweep: the user's command, run for averages of several lengths, with a record of each trial."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from posthoc_cli import files
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import (
    CommandError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    OutputExistsError,
    argument,
    check_count,
    percent,
    quote,
)
from posthoc_cli.export.convert import export_file
from posthoc_cli.export.like import check_shape
from posthoc_cli.export.writing import SynthesisReport
from posthoc_cli.planning import SMALL_LOSS
from posthoc_cli.profiles import UNIFORM_SIGMA_REL, Point
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.run import Run
from posthoc_cli.snapshots.decoding import convert
from posthoc_cli.snapshots.directory import LOCK_NAME, DirectoryLock
from posthoc_cli.snapshots.snapshot import Snapshot, recorded_weights
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import read_file
from posthoc_cli.snapshots.weights_sample import are_equal, places
from posthoc_cli.sweep import images
from posthoc_cli.sweep.report import SweepReport
from posthoc_cli.sweep.search import (
    LARGEST,
    LEAST_BUDGET,
    USUAL_BUDGET,
    Lengths,
    Trial,
    next_measurements,
)
from posthoc_cli.sweep.trials import Metric, NoMetricError, TrialError, measure
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.targets import Mean, SigmaRel, Target

log = logging.getLogger(__name__)

TRIALS = "trials.jsonl"  # the settings of the sweep, then a trial a line
LOGS = "logs"
LAST_WEIGHTS = "last weights"
_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|seed|dir)\}")
_SCRATCH = ".scratch"
_DIRECTIONS = {True: "minimize", False: "maximize", None: "look"}
_OPERATORS = ("|", "||", "&&", ">", ">>", "<", "&>", "2>", "2>&1")
_DOUBT = "does the evaluation use the weights?"
_USE_A_SHELL = "for pipes, variables or cd, use a shell: sh -c '...'"


@dataclass(frozen=True)
class Weights:
    """Weights to measure: an average, or others that are compared with averages."""

    title: str
    sigma_rel: float | None
    text: str  # what {sigma_rel} becomes
    # writes them to a file, and returns the plan of an average
    write: Callable[[Path], Plan | None]


@dataclass(eq=False)
class Sweep:
    """A search for the best length of an average by a user's command; or, if `minimize` is None, a
    look at the images that it makes of some lengths."""

    run: Run
    # the command line, with `{weights}` and optionally `{sigma_rel}`, `{seed}`, `{dir}`
    command: str
    metric: Metric
    out: Path  # folder for the records, logs, images and the best average
    lengths: Lengths | None = None  # by default see `searchable_lengths`
    minimize: bool | None = True
    budget: int = USUAL_BUDGET  # lengths of the grid
    t: float | None = None
    like: Path | None = None  # as in `Run.write`
    raw: Path | None = None  # a checkpoint with the last weights, if the run lacks them
    rerun_command: str = ""  # the command line that repeats this sweep
    # called with every trial when it ends, its title, its number, and about how many there will be
    on_trial: Callable[[Trial, str, int, int], None] = lambda *_: None
    progress: ProgressBar = no_bar

    def run_all(self) -> SweepReport:
        """Run the sweep, or continue one with the same settings that was stopped.

        Raises:
            InvalidValueError: an argument cannot be used.
            OutputExistsError: the folder holds something else, such as another sweep.
            LockedError: another sweep is running in this folder.
            CommandError: the first trial has printed no metric, two trials in a row have failed
                alike, or all have the same metric, your own EMA and the last weights, too.
        """
        check_command(self.command, self.metric, needs_images=self.minimize is None)
        check_count("budget", self.budget, LEAST_BUDGET)
        target: Target = SigmaRel(0.2 if self.lengths is None else self.lengths.high)
        with mute_warnings():
            plan = self._write(target, None, dry_run=True).plan
            self.t = plan.t
        lengths = self.lengths or searchable_lengths(self.run, self.t)
        compared = self._compared_weights(self.t)
        self._report = SweepReport(
            lengths=lengths,
            budget=self.budget,
            compared=tuple(weights.title for weights in compared),
            metric=self.metric.key or "metric",
            minimize=self.minimize,
            settings=self._describe(),
            steps=plan.steps,
            rerun_command=self.rerun_command,
        )
        with self._locked_folder():
            recorded = self._read_recorded(self._report.settings)
            known = [trial for trial in recorded if self._is_asked(trial)]
            self._report = replace(self._report, trials=tuple(known))
            with self.progress("measuring", self._expected) as advance:
                advance(len(known))
                for trial in self._measure_all(compared):
                    self._record(trial)
                    title = self._report.title(trial)
                    self.on_trial(trial, title, len(self._report.trials), self._expected)
                    advance(1)
                    self._check_latest()
            self._check_enough()
            if self.minimize is not None:
                path = self._write_best(self._report.best)
                self._report = replace(self._report, outputs=(path,))
            self._report.write(self.out)
            return self._report

    def _is_asked(self, trial: Trial) -> bool:
        if trial.sigma_rel is None:
            return trial.target in self._report.compared
        return trial.sigma_rel in self._report.lengths

    def _describe(self) -> dict[str, Any]:
        """Describe what all trials of the folder have in common."""
        return {
            "run": self.run.sources[-1].run_id,
            "t": self.t,
            "command": self.command,
            "metric": None if self.minimize is None else self.metric.text,
            "direction": _DIRECTIONS[self.minimize],
            "like": None if self.like is None else str(self.like.resolve()),
        }

    @property
    def _expected(self) -> int:
        """About how many trials there will be; for a short list, exactly."""
        report = self._report
        grid = report.lengths.grid(self.budget)
        planned = len(report.compared) + len(grid)
        if self.minimize is not None and len(grid) >= LEAST_BUDGET:
            planned += 1 if report.lengths.listed else 2  # the best length, and once more
        return max(planned, len(report.trials))

    # --- the weights to measure

    def _compared_weights(self, t: float) -> list[Weights]:
        """Find what averages are compared with: the user's own newest EMA, and the last weights, as
        far as they are known."""
        compared = []
        own = None
        last = None
        for source in self.run.sources:
            if isinstance(source, Checkpoint) and source.decay and source.t <= t:
                own = source
            if isinstance(source.profile, Point) and source.t == t:
                last = source
        if own is not None:
            title = f"your EMA ({own.decay:.7g})"
            compared.append(Weights(title, None, "ema", partial(self._copy, own)))
        if last is not None and self.raw is not None:
            reason = "is not needed: the run contains the last weights"
            raise InvalidValueError("raw", reason, value=self.raw)
        if last is not None:
            compared.append(Weights(LAST_WEIGHTS, None, "raw", partial(self._copy, last)))
        elif self.raw is not None:
            compared.append(Weights(LAST_WEIGHTS, None, "raw", self._write_raw))
        return compared

    def _average(self, sigma_rel: float) -> Weights:
        target = SigmaRel(sigma_rel)

        def write(path: Path) -> Plan:
            return self._write(target, path).plan

        return Weights(target.title, sigma_rel, f"{sigma_rel!r}", write)

    def _write(self, target: Target, path: Path | None, **options: Any) -> SynthesisReport:
        written = self.run.write(target, path, t=self.t, like=self.like, **options)
        assert written is not None  # as of a process other than the first one
        return written

    def _copy(self, source: Source, path: Path) -> None:
        """Write an average or weights as they are stored."""
        StoredRun(self.run.directory, source).write(Mean(1), path, like=self.like)

    def _write_raw(self, path: Path) -> None:
        """Write the weights in the checkpoint `raw` as averages are written."""
        raw = self.raw
        assert raw is not None
        plain = path.with_name("raw.safetensors")
        try:
            export_file(raw, plain, weights=True)
        except InvalidValueError:  # a file of nothing but weights
            export_file(raw, plain)
        lacking = self.run.tensors.keys() - read_file(plain).entries.keys()
        if lacking:
            reason = f"lacks tensor {quote(min(lacking))} of the averages"
            raise MismatchError(raw, reason)
        self._warn_of_other_step(raw, plain)
        if self.like is None:
            plain.rename(path)
        else:
            export_file(plain, path, like=self.like)

    def _warn_of_other_step(self, raw: Path, plain: Path) -> None:
        """Warn if weights differ from what the hook has recorded with the snapshots of the
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

    def _write_best(self, sigma_rel: float) -> Path:
        path = self.out / f"best{self._suffix}"
        if not self._suffix:  # a folder is never overwritten
            images.remove(path)
        self._write(SigmaRel(sigma_rel), path, overwrite=bool(self._suffix))
        return path

    @property
    def _suffix(self) -> str:
        if self.like is None:
            return ".safetensors"
        return "" if self.like.is_dir() else self.like.suffix

    # --- trials

    def _measure_all(self, compared: Sequence[Weights]) -> Iterator[Trial]:
        """Yield each trial when it has ended; the report then has it."""
        known = {(trial.target, trial.seed) for trial in self._report.trials}
        for weights in compared:
            if (weights.title, 0) not in known:
                yield self._measure(weights, 0)
        while True:
            report = self._report
            batch = next_measurements(report.trials, report.lengths, self.budget, self.minimize)
            if not batch:
                break
            for sigma_rel, seed in batch:
                yield self._measure(self._average(sigma_rel), seed)
            self._check_enough()
        if self.minimize is not None and self._report.estimate.noise > 0:
            # of one measurement, your own EMA would have most of the gain's error
            for weights in compared[:1]:
                if (weights.title, 1) not in known:
                    yield self._measure(weights, 1)

    def _measure(self, weights: Weights, seed: int) -> Trial:
        """Make weights, run the command, and add the trial to the report."""
        scratch = (self.out / _SCRATCH).absolute()  # the command may change the directory
        files.make_directory(scratch)
        path = scratch / f"weights{self._suffix}"
        with mute_warnings():
            plan = weights.write(path)
        trial = Trial(weights.title, weights.sigma_rel, seed)
        if plan is not None:
            error = plan.predicted_error(0)
            trial = replace(trial, predicted_error=error, lost_gain=plan.lost_gain(0))
        started = time.monotonic()
        try:
            value, noise = self._evaluate(path, trial, weights.text)
            trial = replace(trial, value=value, standard_error=noise)
        except NoMetricError as failure:
            if not self._report.trials:
                raise CommandError("--run", str(failure), failure.hint) from failure
            trial = replace(trial, error=str(failure))
        except TrialError as failure:
            trial = replace(trial, error=str(failure))
        trial = replace(trial, seconds=time.monotonic() - started)
        self._report = replace(self._report, trials=(*self._report.trials, trial))
        images.remove(scratch)
        return trial

    def _evaluate(
        self,
        path: Path,
        trial: Trial,
        text: str,
    ) -> tuple[float | None, float | None]:
        """Run the command, and find the metric and its standard error, or raise a TrialError."""
        # Each trial has a new folder: the process of a killed sweep may still write to its old one.
        folder = Path(tempfile.mkdtemp(prefix=f"{trial.name}-", dir=path.parent))
        texts = {"weights": path, "sigma_rel": text, "seed": trial.seed, "dir": folder}
        words = []
        for word in shlex.split(self.command):
            words.append(_PLACEHOLDER.sub(lambda match: str(texts[match[1]]), word))
        metric = None if self.minimize is None else self.metric
        try:
            measured = measure(words, folder, self.out / LOGS / trial.name, metric)
            images.keep_images(folder, self.out / images.FOLDER / trial.name)
            return measured
        finally:
            images.remove(folder)

    def _check_latest(self) -> None:
        """Raise a CommandError after two trials that failed alike, as all others would."""
        last = self._report.trials[-1]
        causes = []
        for trial in self._report.trials[-2:]:
            cause, _, _ = (trial.error or "").partition(": ")
            causes.append(cause)
        if last.error and causes == causes[:1] * 2:
            reason = f"two trials in a row have failed alike; the last one: {last.target}"
            raise CommandError("the sweep", f"{reason}: {last.error}")
        measured = [trial for trial in self._report.trials if trial.value is not None]
        lengths = [trial for trial in measured if trial.sigma_rel is not None]
        if len(lengths) == 2 and len({trial.value for trial in measured}) == 1:
            log.warning("all trials so far have the same metric, %s: %s", last.value, _DOUBT)

    def _check_enough(self) -> None:
        """Raise a CommandError if too many lengths have failed, or all have the same metric; of a
        look, if it has no image."""
        if self.minimize is None:
            if not (self.out / images.FOLDER).is_dir():
                reason = "no trial has left an image in {dir}"
                raise CommandError("the sweep", f"{reason}: {', '.join(images.ENDINGS)}")
            return
        report = self._report
        measured = [trial for trial in report.trials if trial.value is not None]
        lengths = {trial.sigma_rel for trial in measured} - {None}
        least = min(3, max(2, len(report.lengths.grid(self.budget)) - 1))  # of three one may fail
        if len(lengths) < least:
            failed = [trial for trial in report.trials if trial.error]
            reason = f"{len(failed)} of {len(report.trials)} trials have failed, too many to choose"
            last = f"the last one: {failed[-1].target}: {failed[-1].error}"
            raise CommandError("the sweep", f"{reason}; {last}")
        if len({trial.value for trial in measured}) == 1:
            reason = f"every trial has the same metric, {measured[0].value:.12g}"
            raise CommandError("the sweep", reason, _DOUBT)

    # --- the folder

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

    def _read_recorded(self, asked: dict[str, Any]) -> list[Trial]:
        """Read the recorded trials that succeeded, the last of repeated ones; raise an
        OutputExistsError if they belong to another sweep."""
        path = self.out / TRIALS
        if not path.exists():
            self._write_lines([json.dumps(asked)])
            return []
        recorded = {}
        try:
            first, *entries = map(json.loads, path.read_text().splitlines())
            settings = {**first}
            for entry in entries:
                trial = trial_from_json(entry)
                is_measured = trial.value is not None or self.minimize is None
                if is_measured and trial.error is None:
                    recorded[trial.target, trial.seed] = trial
        except (ValueError, TypeError, RecursionError) as error:
            reason = "is not the record of a sweep"
            raise FileFormatError(path, reason, "name another folder") from error
        if not recorded:  # nothing to lose: the call may have been wrong
            self._write_lines([json.dumps(asked)])
            return []
        for name, value in asked.items():
            known = settings.get(name, value)
            if known != value:
                reason = f"holds a sweep of another {name}, {quote(known)}"
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


class StoredRun(Run):
    """One stored average of a run, or its weights at one time, as a run."""

    def __init__(self, directory: Path, source: Source) -> None:
        super().__init__(directory)
        self._source = source

    @property
    def sources(self) -> list[Source]:
        return [self._source]


def trial_from_json(entry: Any) -> Trial:
    """Decode a recorded trial; raise a ValueError if a value is of another kind."""
    trial: Trial = convert(entry, Trial)
    if max(abs(trial.value or 0.0), trial.standard_error or 0.0) > LARGEST:
        raise ValueError("a metric that is too large")
    if trial.sigma_rel is not None:
        return replace(trial, target=SigmaRel(trial.sigma_rel).title)
    return trial


@contextmanager
def mute_warnings() -> Iterator[None]:
    """Mute the warnings of inexact averages, of which a sweep has said the range before."""
    planning = logging.getLogger("posthoc_cli.synthesis.plan")
    was_disabled = planning.disabled
    planning.disabled = True
    try:
        yield
    finally:
        planning.disabled = was_disabled


# --- what to search, and by which command


def searchable_lengths(run: Run, t: float) -> Lengths:
    """Find the widest range of sigma_rel whose lost gain is below SMALL_LOSS.

    Without one, take the range from the mean of the last two stored times to the mean of all, and
    warn of what they lose.
    """
    curve = run.error_curve(t=t)
    ranges = curve.ranges_below(SMALL_LOSS)
    if ranges:
        low, high = max(ranges, key=lambda ends: ends[1] / ends[0])
        return Lengths(round(low, 4), round(high, 4))
    times = sorted({source.t for source in run.sources if source.t <= t})
    if len(times) < 3:
        reason = f"{len(times)} times are too few to search"
        raise InvalidValueError(run.directory, reason, f"name lengths with {argument('sigma_rel')}")
    # the width of a uniform mean over a window, as a fraction of t
    spacing = UNIFORM_SIGMA_REL * (t - times[-3]) / t
    whole = UNIFORM_SIGMA_REL * (t - times[0] + t - times[-2]) / t
    lengths = Lengths(round(spacing, 4), min(round(whole, 4), 0.28))
    is_searched = (curve.sigma_rels >= lengths.low) & (curve.sigma_rels <= lengths.high)
    losses = curve.lost_gain[is_searched]
    log.warning(
        "%s: searching sigma_rel %g to %g, from the mean of the last two files to the mean of all: "
        "lost gain %s to %s; %s",
        run.directory,
        lengths.low,
        lengths.high,
        percent(float(losses.min())),
        percent(float(losses.max())),
        "`ema guide exactness` says what that costs",
    )
    return lengths


def check_command(command: str, metric: Metric, needs_images: bool) -> None:
    """Raise an InvalidValueError if the command cannot be used."""
    value = command or "(empty)"
    try:
        words = shlex.split(command)
    except ValueError as error:
        reason = f"invalid quoting: {error}"
        raise InvalidValueError("command", reason, value=value) from error
    if not any("{weights}" in word for word in words):
        reason = "must contain {weights}, which becomes the path of the average"
        raise InvalidValueError("command", reason, value=value)
    if "{dir}" not in command and metric.file is not None:
        reason = "must contain {dir}, the folder that is searched for the file with the metric"
        raise InvalidValueError("command", reason, value=value)
    if "{dir}" not in command and needs_images:
        reason = "must contain {dir}, the folder for the images"
        raise InvalidValueError("command", reason, value=value)
    operators = [word for word in words if word in _OPERATORS]
    if operators:
        reason = "the command runs without a shell"
        raise InvalidValueError("command", reason, _USE_A_SHELL, value=operators[0])
    if not _PLACEHOLDER.search(words[0]) and shutil.which(words[0]) is None:
        reason = "command not found"
        hint = f"start a script with its interpreter, such as python3; {_USE_A_SHELL}"
        raise InvalidValueError("command", reason, hint, value=words[0])
    script = words[1] if len(words) > 1 else ""
    if script.endswith((".py", ".sh")) and not Path(script).is_file():
        raise InvalidValueError("command", "no such file", value=script)
