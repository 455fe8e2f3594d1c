"""The best length of an average by a metric: rounds of candidates, each measured, until the answer is known."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, LockedError, PostHocError
from posthoc_cli.profiles import SHAPES
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.run import Run
from posthoc_cli.snapshots.lock import DirectoryLock
from posthoc_cli.sweep import search
from posthoc_cli.sweep.metrics import Metric
from posthoc_cli.sweep.processes import Evaluation, end_leftovers, run_all, split_command
from posthoc_cli.sweep.records import Record, Records
from posthoc_cli.targets import Beta, Decay, SigmaRel, Target, Window

if TYPE_CHECKING:
    import torch

    from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)

GOOD_ERROR = 0.01
"""Predicted error of the lengths that are searched unless others are named."""
RAW = "raw"
_PLACEHOLDER = re.compile(r"\{(weights|sigma_rel|seed|dir)\}")
_SCRATCH, _LOGS, RESULT = ".scratch", "logs", "sweep.json"

Say = Callable[[Record], None]
"""Told of every trial as it ends."""


@dataclass(frozen=True)
class Axis:
    """What is searched: a kind of target with one parameter.

    Attributes:
        kind: "sigma_rel", "beta" or "window"; or "decay 1-sqrt over", "decay linear over" or "decay cosine over", whose
            values are parts of training.
        low, high: ends of the range.
        values: measure exactly these; None for a search.
    """

    kind: str
    low: float
    high: float
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise InvalidValueError("axis", f"must be one of {', '.join(_KINDS)}", value=self.kind)
        for end in (self.low, self.high, *(self.values or ())):
            self.target(end)  # checks it
        if not self.low < self.high:
            reason = "name two lengths or more" if self.values else "the first must be below the second"
            raise InvalidValueError(self.kind, reason, value=f"{self.low:g}:{self.high:g}")

    @classmethod
    def of_values(cls, kind: str, values: Sequence[float]) -> Axis:
        """A grid."""
        return cls(kind, min(values), max(values), tuple(sorted(set(values))))

    def target(self, value: float) -> Target:
        """The target of a value, as a user writes it."""
        return _KINDS[self.kind](value)

    def scaled(self, value: float) -> float:
        """The parameter whose logarithm is searched: of a decay its horizon in steps, else the value itself."""
        return 1 / (1 - value) if self.kind == "beta" else value

    def value(self, x: float) -> float:
        """The value of a parameter, with three digits."""
        if self.kind == "beta":
            value = round(1 - search.rounded(1 / x), 12)
        else:
            value = round(x) if self.kind == "window" else search.rounded(x)
        return min(max(value, self.low), self.high)


_KINDS: dict[str, Callable[[Any], Target]] = {
    "sigma_rel": SigmaRel,
    "beta": Beta,
    "window": Window,
    **{f"decay {shape} over": functools.partial(Decay, shape) for shape in SHAPES},
}


@dataclass(frozen=True)
class GroupResult:
    """What the search of one group's length has found, the others being as they were found before.

    Attributes:
        glob: on the names of its tensors.
        sigma_rel: the length that it is given: the best, or the one before where the gain is lost in the noise.
        low, high: ends of the range that is equal to the best within the noise.
        mean, standard_error: the metric at the best.
        gains: whether the length before lies outside that range.
    """

    glob: str
    sigma_rel: float
    low: float
    high: float
    mean: float
    standard_error: float
    gains: bool


@dataclass(frozen=True)
class SweepReport:
    """What a sweep has found.

    Attributes:
        metric: its name.
        minimize: whether lower is better.
        axis: what was searched.
        trials: all measured ones, failed ones with their error.
        found: the estimate; `value_of` gives its `best`, `low` and `high` as a user writes them.
        outputs: files that stay.
        settings: what makes the trials comparable.
        stopped: why no more was measured.
        groups: lengths of single groups of tensors, which were searched after the one of all.
        lengths: sigma_rel by glob of what was written, where a group has one of its own; else empty.
    """

    metric: str
    minimize: bool
    axis: Axis
    trials: tuple[Record, ...]
    found: search.Estimate
    stopped: str
    outputs: tuple[Path, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    groups: tuple[GroupResult, ...] = ()
    lengths: dict[str, float] = field(default_factory=dict)

    @property
    def best(self) -> Target:
        """The average whose metric is estimated to be best."""
        return self.axis.target(self.value_of(self.found.best))

    @property
    def failed(self) -> list[Record]:
        """Trials without a value."""
        return [trial for trial in self.trials if trial.value is None]

    @property
    def raw(self) -> float | None:
        """The metric of the raw weights, where they were measured."""
        values = [trial.value for trial in self.trials if trial.target == RAW and trial.value is not None]
        return sum(values) / len(values) if values else None

    def value_of(self, x: float) -> float:
        """A searched parameter as a user writes it."""
        return self.axis.value(x)

    def write(self, folder: str | Path) -> None:
        """Write it to a folder, as a page takes it; a WriteError."""
        folder = files.expanded(folder)
        with files.reported_as_write_error(folder):
            files.make_directory(folder)
        files.write_whole(folder / RESULT, f"{json.dumps(self.to_dict(), indent=1)}\n".encode(), overwrite=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        found = self.found
        curve = zip(found.xs.tolist(), found.curve.tolist(), found.errors.tolist(), strict=True)
        return {
            "metric": self.metric,
            "minimize": self.minimize,
            "axis": self.axis.kind,
            "best": {"target": self.best.title, self.axis.kind: self.value_of(found.best)},
            "mean": found.mean,
            "standard_error": found.standard_error,
            "equal_within_noise": [self.value_of(found.low), self.value_of(found.high)],
            "expected_regret": found.regret,
            "noise": found.noise,
            "raw": self.raw,
            "stopped": self.stopped,
            "trials": [vars(trial) for trial in self.trials],
            "curve": [{"x": self.value_of(x), "mean": mean, "standard_error": error} for x, mean, error in curve],
            "groups": [vars(group) for group in self.groups],
            "lengths": self.lengths,
            "outputs": list(map(str, self.outputs)),
            "settings": self.settings,
        }


Measure = Callable[[Sequence[tuple[float, int]]], Iterator[Record]]
"""Measures values, as a user writes them, each with a seed, and gives a record of each."""


Make = Callable[[Sequence[float]], list[tuple[Path, float | None]]]
"""Writes the averages of some values, and gives the path and the predicted error of each."""


def explore(
    axis: Axis, measure: Measure, known: Iterable[Record], minimize: bool, budget: int, repeats: int, again: bool
) -> tuple[list[Record], search.Estimate, str]:
    """Measure until the best is known within the noise, or the budget is spent.

    Arguments:
        known: trials that are there already.
        budget: lengths to measure, each `repeats` times; one that is measured again counts again.
        again: whether a length can be measured again with another seed.

    Returns:
        All trials, what they say, and why no more was measured.

    Raises:
        PostHocError: too few trials have succeeded.
    """
    low, high = axis.scaled(axis.low), axis.scaled(axis.high)
    trials = list(known)

    def seeds_of(value: float) -> set[int]:
        return {trial.seed for trial in trials if trial.x == value}

    def spent() -> int:
        return sum(
            -(-len(seeds_of(value)) // repeats) for value in {trial.x for trial in trials if trial.target != RAW}
        )

    batch = axis.values or [*map(axis.value, search.first_batch(low, high))]
    wanted = [(value, seed) for seed in range(repeats) for value in batch if seed not in seeds_of(value)]
    while True:
        trials += measure(wanted)
        found = _estimate(axis, trials, minimize)
        left = budget - spent()
        if axis.values is not None:
            return trials, found, "all named lengths are measured"
        if found.settled:
            return trials, found, "the best length is known within the noise"
        if left <= 0:
            return trials, found, "the budget is spent"
        good = _good(axis, trials)
        proposed = [axis.value(x) for x in search.next_batch(found, good, min(search.NEXT, left), again)]
        failed = {trial.x for trial in trials if trial.value is None}
        proposed = [v for v in dict.fromkeys(proposed) if v not in failed and (again or not seeds_of(v))]
        if not proposed:
            return trials, found, "nothing is left to measure between the measured lengths"
        wanted = []
        for value in proposed:
            start = max(seeds_of(value), default=-1) + 1
            wanted += [(value, seed) for seed in range(start, start + repeats)]


def _good(axis: Axis, trials: Iterable[Record]) -> list[search.Trial]:
    return [
        search.Trial(axis.scaled(trial.x), trial.value, trial.standard_error, trial.seed)
        for trial in trials
        if trial.value is not None
    ]


def _estimate(axis: Axis, trials: Sequence[Record], minimize: bool) -> search.Estimate:
    good = _good(axis, trials)
    if len({trial.x for trial in good}) < min(3, len(axis.values or (0, 0, 0))):
        failed = [trial for trial in trials if trial.value is None]
        reason = f"{len(failed)} of {len(trials)} trials have failed, too many to choose; the last one"
        raise PostHocError("the sweep", f"{reason}: {failed[-1].target}: {failed[-1].error}")
    return search.estimate(good, axis.scaled(axis.low), axis.scaled(axis.high), minimize)


def good_range(run: Run, t: float | None = None, method: str | None = None) -> tuple[float, float]:
    """The widest range of sigma_rel whose predicted error is below GOOD_ERROR.

    Raises:
        InvalidValueError: there is none.
    """
    ranges = run.error_curve(t=t, method=method).ranges_below(GOOD_ERROR)
    if not ranges:
        reason = f"no length has a predicted error below {100 * GOOD_ERROR:g} %"
        raise InvalidValueError("sigma_rel", reason, "name a range, such as 0.05:0.25")
    low, high = max(ranges, key=lambda ends: ends[1] / ends[0])
    return math.ceil(low * 1e4) / 1e4, math.floor(high * 1e4) / 1e4


# --- by a command ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A request for the best length by a user's command.

    Attributes:
        run: the snapshots.
        command: with `{weights}`, and if wanted `{sigma_rel}`, `{seed}`, `{dir}`.
        metric: where the command says it.
        out: folder for the records, logs and the best average.
        axis: what is searched; by default sigma_rel where the predicted error is below 1 %.
        minimize: whether lower is better.
        repeats: trials of each length, with the seeds 0, 1, ...
        budget: lengths to measure at most.
        jobs: trials at a time.
        devices: given out as CUDA_VISIBLE_DEVICES.
        timeout: seconds that a trial may take.
        disk: bytes of averages at a time, None for all of a round.
        raw: a file of raw weights to compare with.
        groups: globs on tensors' names, whose lengths are searched one after another when that of all is found.
        t, step, method, dtype, layout: as in `Run.write`.
        progress: opens a progress bar.
        say: called with a line about every trial.
    """

    run: Run
    command: str
    metric: Metric
    out: Path
    axis: Axis | None = None
    minimize: bool = True
    repeats: int = 1
    budget: int = 20
    jobs: int = 1
    devices: tuple[str, ...] = ()
    timeout: float | None = None
    disk: int | None = None
    raw: Path | None = None
    groups: tuple[str, ...] = ()
    t: float | None = None
    step: int | None = None
    method: str | None = None
    dtype: torch.dtype | str | None = None
    layout: str | None = None
    progress: ProgressBar = no_bar
    say: Say = lambda _: None

    def run_all(self) -> SweepReport:
        """Do it. A call that was stopped is continued by the next one like it.

        Raises:
            InvalidValueError: an argument cannot be used.
            LockedError: another sweep works in this folder.
            PostHocError: too few trials have succeeded.
        """
        words = self._checked_words()
        any_target = 0.2 if self.axis is None else self.axis.target(self.axis.high)
        plan = self.run.plan(any_target, t=self.t, step=self.step, method=self.method, dtype=self.dtype)
        if self.disk is not None and self.disk < plan.nbytes:
            reason = f"one average takes {plan.nbytes:,} bytes"
            raise InvalidValueError("disk", f"must have room for one; {reason}", value=f"{self.disk:,} bytes")
        axis = self.axis or Axis("sigma_rel", *good_range(self.run, plan.t, self.method))
        settings = {
            "run": plan.newest.info.run_id, "t": plan.t, "method": plan.method, "dtype": plan.dtype,
            "layout": self.layout, "command": self.command, "metric": vars(self.metric),
        }  # fmt: skip
        globs = list(self.groups)
        if any(not any(fnmatchcase(n, glob) for n in names for glob in globs) for names in plan.names.values()):
            globs.append("*")
        if self.groups:
            from posthoc_cli.export.groups import group_parts

            group_parts(plan, globs)  # checks them
        search_one = functools.partial(self._search, axis, words, plan.nbytes)
        with self._folder():
            records = Records(self.out, settings)
            raw = [trial for trial in _known(records, axis) if trial.target == RAW]
            if self.raw is not None and not raw:
                wanted = [(RAW, 0.0, seed, self.raw, None) for seed in range(self.repeats)]
                raw = list(self._evaluate(wanted, words, records))
            trials, found, why = search_one(records, functools.partial(self._make, axis, plan.t), "")
            lengths, results = dict.fromkeys(globs, axis.value(found.best)), []
            for glob in self.groups:
                others = {other: width for other, width in lengths.items() if other != glob}
                records = Records(self.out, settings | {"group": glob, "others": others})
                make = functools.partial(self._make_groups, plan.t, dict(lengths), glob)
                more, one, _ = search_one(records, make, f"{glob} ")
                trials += more
                low, best, high = map(axis.value, (one.low, one.best, one.high))
                gains = not low <= lengths[glob] <= high
                lengths[glob] = best if gains else lengths[glob]
                results.append(GroupResult(glob, lengths[glob], low, high, one.mean, one.standard_error, gains))
            return self._finish(
                SweepReport(
                    self.metric.label, self.minimize, axis, (*raw, *trials), found, why, (), settings, tuple(results),
                    lengths if any(group.gains for group in results) else {},
                ),
                plan.t,
            )  # fmt: skip

    def _search(
        self, axis: Axis, words: list[str], nbytes: int, records: Records, make: Make, prefix: str
    ) -> tuple[list[Record], search.Estimate, str]:
        """Search one length; `prefix` goes before the titles of its trials."""
        at_once = None if self.disk is None else self.disk // nbytes
        measure = functools.partial(self._measure, axis, make, words, records, at_once, prefix)
        known = [trial for trial in _known(records, axis) if trial.target != RAW]
        again = self.repeats > 1 or "{seed}" in self.command
        return explore(axis, measure, known, self.minimize, self.budget, self.repeats, again)

    def _finish(self, report: SweepReport, t: float) -> SweepReport:
        """Write the best average and the report."""
        best = self.out / f"best{_suffix(self.layout)}"
        if report.lengths:
            self.run.write_groups([report.lengths], [best], t=t, overwrite=True, **self._options)
        else:
            self.run.write(report.best, best, t=t, overwrite=True, progress=self.progress, **self._options)
        report = replace(report, outputs=(best,))
        report.write(self.out)
        return report

    def _checked_words(self) -> list[str]:
        try:
            words = split_command(self.command)
        except ValueError as error:
            raise InvalidValueError("run", f"cannot be split into words: {error}", value=self.command) from error
        if not any("{weights}" in word for word in words):
            raise InvalidValueError("run", "must have {weights} where the file goes", value=self.command or "(empty)")
        if (self.metric.json or self.metric.csv) and "{dir}" not in self.command:
            reason = "must have {dir}, the folder in which the file with the metric is looked for"
            raise InvalidValueError("run", reason, value=self.command)
        _check_counts(self.repeats, self.budget, self.axis)
        if self.jobs < 1:
            raise InvalidValueError("jobs", "must be at least 1", value=self.jobs)
        if self.groups and self.axis is not None and self.axis.kind != "sigma_rel":
            raise InvalidValueError("groups", "have lengths in sigma_rel", value=", ".join(self.groups))
        if self.timeout is not None and not self.timeout > 0:
            raise InvalidValueError("timeout", "must be above 0 seconds", value=f"{self.timeout:g}")
        if self.raw is not None and not self.raw.exists():
            raise InvalidValueError("raw", "no such file or directory", value=self.raw)
        return words

    @contextmanager
    def _folder(self) -> Iterator[None]:
        """The folder of the sweep, locked; what a killed one has left is ended and removed."""
        if not self.out.parent.is_dir():
            raise InvalidValueError("out", "its parent folder does not exist", value=self.out)
        with files.reported_as_write_error(self.out):
            for folder in (self.out, self.out / _LOGS):
                files.make_directory(folder)
        try:
            lock = DirectoryLock(self.out)
        except LockedError as error:
            raise LockedError(self.out, error.reason, "wait for that sweep, or take another folder") from error
        scratch = self.out / _SCRATCH
        with lock:
            end_leftovers(scratch)
            _remove(scratch)
            try:
                yield
            finally:
                end_leftovers(scratch)  # an interruption may come while a process starts
                _remove(scratch)

    @property
    def _options(self) -> dict[str, Any]:
        return {"method": self.method, "dtype": self.dtype, "layout": self.layout}

    def _make(self, axis: Axis, t: float, values: Sequence[float]) -> list[tuple[Path, float | None]]:
        """Averages in the scratch folder, with their predicted errors."""
        targets = [axis.target(value) for value in values]
        pattern = str(self.out / _SCRATCH / f"{{target}}{_suffix(self.layout)}")
        made = self.run.write(targets, pattern, t=t, overwrite=True, progress=self.progress, **self._options)
        assert made is not None
        return [(path, made.plan.predicted_error(index)) for index, path in enumerate(made.outputs)]

    def _make_groups(
        self, t: float, lengths: dict[str, float], glob: str, values: Sequence[float]
    ) -> list[tuple[Path, float | None]]:
        """The same, of one group of tensors; the others have the lengths given."""
        paths = [self.out / _SCRATCH / f"{value!r}{_suffix(self.layout)}" for value in values]
        wanted = [lengths | {glob: value} for value in values]
        errors = self.run.write_groups(wanted, paths, t=t, overwrite=True, **self._options)
        return list(zip(paths, errors, strict=True))

    def _measure(
        self, axis: Axis, make: Make, words: list[str], records: Records, at_once: int | None, prefix: str,
        wanted: Sequence[tuple[float, int]],
    ) -> Iterator[Record]:  # fmt: skip
        """Synthesize values in one pass, as many as the disk may hold, and run the command for each."""
        values = list(dict.fromkeys(value for value, _ in wanted))
        size = max(1, at_once or len(values))
        for begin in range(0, len(values), size):
            some, scratch = values[begin : begin + size], self.out / _SCRATCH
            with files.reported_as_write_error(scratch):
                files.make_directory(scratch)
            outputs = dict(zip(some, make(some), strict=True))
            jobs = [(f"{prefix}{axis.target(v).title}", v, seed, *outputs[v]) for v, seed in wanted if v in outputs]
            yield from self._evaluate(jobs, words, records)
            _remove(scratch)

    def _evaluate(
        self, wanted: Sequence[tuple[str, float, int, Path, float | None]], words: list[str], records: Records
    ) -> Iterator[Record]:
        """Run the command for each (target, value, seed, weights, predicted error), and write the outcomes down."""
        evaluations = []
        for target, value, seed, weights, _ in wanted:
            name = re.sub(r"[^\w.-]", "-", f"{target}-seed-{seed}")
            folder = self.out / _SCRATCH / f"trial-{name}"
            files.make_directory(folder)
            filled = {"weights": str(weights), "sigma_rel": repr(value), "seed": str(seed), "dir": str(folder)}
            command = [_PLACEHOLDER.sub(lambda found: filled[found[1]], word) for word in words]  # noqa: B023
            evaluations.append(Evaluation(command, folder, self.out / _LOGS / name))
        for index, outcome in run_all(evaluations, self.metric, self.jobs, self.devices, self.timeout):
            target, value, seed, _, error = wanted[index]
            record = Record(
                target, value, seed, outcome.value, outcome.standard_error, error, outcome.seconds, outcome.error,
                f"{_LOGS}/{evaluations[index].log.name}",
            )  # fmt: skip
            records.append(record)
            _remove(evaluations[index].folder)
            self.say(record)
            yield record


def _known(records: Records, axis: Axis) -> list[Record]:
    """What was measured before and belongs to the search; of a trial that was made twice the last one."""

    def within(trial: Record) -> bool:
        if trial.target != RAW and f" {axis.kind} " not in f" {trial.target}":
            return False
        return trial.target == RAW or (trial.x in axis.values if axis.values else axis.low <= trial.x <= axis.high)

    trials = {(trial.target, trial.seed): trial for trial in records.read()}
    return [trial for trial in trials.values() if trial.value is not None and within(trial)]


def _check_counts(repeats: int, budget: int, axis: Axis | None) -> None:
    least = search.FIRST if axis is None or axis.values is None else 1  # a list is measured whole
    if budget < least:
        raise InvalidValueError("budget", f"must be at least {least}, the first batch", value=budget)
    if repeats < 1:
        raise InvalidValueError("repeats", "must be at least 1", value=repeats)


def _suffix(layout: str | None) -> str:
    from posthoc_cli.export.outputs import suffix_of

    return suffix_of(layout)


def _remove(folder: Path) -> None:
    if folder.exists():
        with files.reported_as_write_error(folder, "removed"):
            shutil.rmtree(folder)


# --- in Python ---------------------------------------------------------------------------------------


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
        run: snapshots or checkpoints, or a tracker, also one that is training.
        metric: takes `model` with the averaged weights in it, in eval mode, or without a model the weights by name;
            gives the metric, or it and its standard error. Its random numbers are its own affair.
        model: gets the weights of each average in place; afterwards it is as it was.
        low, high: ends of the range; by default where the predicted error is below 1 %.
        values: measure exactly these instead.
        minimize: whether lower is better.
        repeats: calls for each length.
        budget: lengths to measure at most.
        name: of the metric, for the report.

    Raises:
        InvalidValueError: an argument cannot be used.
        PostHocError: too few trials have succeeded: the metric was not finite.
    """
    from posthoc_cli.tracker import PostHocEMA
    from posthoc_cli.tracker.model_weights import swapped_in

    tracker = run if isinstance(run, PostHocEMA) else None
    stored = run if isinstance(run, Run) else run.run if isinstance(run, PostHocEMA) else Run(run)
    if values is not None:
        axis = Axis.of_values("sigma_rel", values)
    else:
        ends = good_range(stored) if low is None or high is None else (low, high)
        axis = Axis("sigma_rel", ends[0] if low is None else low, ends[1] if high is None else high)
    _check_counts(repeats, budget, axis)

    def measure(wanted: Sequence[tuple[float, int]]) -> Iterator[Record]:
        for value, seed in wanted:
            started = time.perf_counter()
            if model is not None and tracker is not None:
                with tracker.model(model, sigma_rel=value):
                    yield record(value, seed, metric(model), None, started)
                continue
            weights = stored.average(value) if tracker is None else tracker.state_dict(sigma_rel=value)
            with nullcontext() if model is None else swapped_in(model, weights):
                found = metric(weights if model is None else model)
            yield record(value, seed, found, weights.predicted_error, started)

    def record(value: float, seed: int, found: Any, predicted: float | None, started: float) -> Record:
        measured, error = found if isinstance(found, tuple) else (found, None)
        measured = float(measured)
        wrong = None if math.isfinite(measured) else f"its metric is {measured}"
        seconds = time.perf_counter() - started
        valid = None if wrong else measured
        return Record(axis.target(value).title, value, seed, valid, error, predicted, seconds, wrong, "")

    trials, found, why = explore(axis, measure, (), minimize, budget, repeats, again=repeats > 1)
    newest = stored.sources[-1].info
    settings = {"run": newest.run_id, "t": newest.t, "command": None}
    return SweepReport(name, minimize, axis, tuple(trials), found, why, settings=settings)
