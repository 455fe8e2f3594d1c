"""A search for the best length from few noisy measurements, by Bayesian optimization in one
dimension, and its report.

All reported numbers are statistics of curves drawn from a model of the metric, see `curves`, but
for the metric of the best length, which is measured.

The trials are the only state of a search: it can be continued from a list of them.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, PostHocError, check_count, check_number, percent
from posthoc_cli.planning import GOOD_ERROR
from posthoc_cli.profiles import FloatArray, Point
from posthoc_cli.run import Run
from posthoc_cli.sweep.curves import GRID, POINTS, clipped, draw_curves
from posthoc_cli.sweep.trials import TrialError
from posthoc_cli.targets import KINDS, WIDTH, Kind, Target, bad, kind_of, parse_numbers

log = logging.getLogger(__name__)

RAW = "raw weights"  # the target of trials of raw weights, which are not an average
RESULT = "sweep.json"  # the file of a report in the folder of a sweep
_CURVE = ("x", "estimate", "standard_error")  # of each point of its curve

FIRST = 6  # lengths in the first batch, which are spread evenly
NEXT = 2  # lengths in each further batch
USUAL = 12  # lengths after which 97 % of searches have found the best (scripts/bench_sweep.py)

CONFIDENCE = 0.95  # the probability that the best length lies in the stated range

_SAME = 0.02
"""The distance from a measured length, as a fraction of the range, below which that length is
meant."""

_KINDS = {WIDTH.name: WIDTH, **KINDS}


@dataclass(frozen=True)
class Axis:
    """The lengths to search: a kind of target with one parameter, its range, and the values to
    measure, if given.

    `kind` is "sigma_rel" or one of `targets.KINDS`. The values of "decay:linear" and its like are
    fractions of training.
    """

    kind: str
    low: float
    high: float
    values: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for value in (self.low, self.high, *self.values):
            self.target(value)  # raises an InvalidValueError for a bad value
        if not self.low < self.high:
            ends = f"{self.low:g}:{self.high:g}"
            raise InvalidValueError(self.kind, "the first must be below the second", value=ends)

    @classmethod
    def of_values(cls, kind: str, values: Sequence[float]) -> Axis:
        """Return the axis of given values, which are all measured."""
        numbers = set[float]()
        for value in values:
            number = check_number(kind, value, math.isfinite, "be a number")
            _KINDS[kind].make(number)  # its error says more than that of one length
            numbers.add(number)
        if len(numbers) < 2:
            raise InvalidValueError("values", "name at least two lengths", value=list(values))
        ordered = sorted(numbers)
        return cls(kind, ordered[0], ordered[-1], tuple(ordered))

    @classmethod
    def parse(
        cls,
        text: str,
        name: str,
        kind: str = "",
    ) -> Axis:
        """Return the axis of KIND:LOW:HIGH (a search), KIND:LIST or KIND:LOW:HIGH:STEP; a given
        `kind` is not repeated.

        Raises an InvalidValueError about `name` that says what is accepted.
        """
        kind_and_rest = (_KINDS[kind], text) if kind else kind_of(text)
        if kind_and_rest is None:
            raise bad(name, text, f"must be a range or a list of {', '.join(KINDS)}")
        searched, rest = kind_and_rest
        form = f"a range LOW:HIGH, such as {searched.range}, or a list"
        is_range = rest.count(":") == 1 and "," not in rest
        if is_range:
            rest = rest.replace(":", ",")
        try:
            numbers = parse_numbers(rest, name, form)
            if is_range:
                return cls(searched.name, numbers[0], numbers[-1])
            return cls.of_values(searched.name, numbers)
        except InvalidValueError as error:
            raise bad(name, text, error.reason, error.hint) from error

    def __contains__(self, value: float) -> bool:
        if self.values:
            return value in self.values
        return self.low <= value <= self.high

    @property
    def _of_kind(self) -> Kind:
        return _KINDS[self.kind]

    def target(self, value: float) -> Target:
        return self._of_kind.make(value)

    def place(self, values: FloatArray | Sequence[float]) -> FloatArray:
        """Return the places of values in the range, from 0 to 1 by the logarithm of the length."""
        low, ratio = self._lengths()
        lengths = self._of_kind.length(np.asarray(values))
        places = np.log(lengths / low) / math.log(ratio)
        return np.asarray(places)

    def at(self, places: FloatArray | float) -> FloatArray:
        """Return the exact values at places in [0, 1], the inverse of `place`."""
        low, ratio = self._lengths()
        values = self._of_kind.value(low * ratio**places)
        return np.asarray(values)

    def value_at(self, position: float) -> float:
        """Return the value at a place, whose length is rounded to three digits (more in a narrow
        range)."""
        kind = self._of_kind
        low, ratio = self._lengths()
        length = low * ratio**position
        if kind.is_whole:
            value = float(round(length))
        else:
            width = abs(math.log(ratio))
            digits = max(3, 2 - math.floor(math.log10(width)))
            rounded = float(f"{length:.{digits}g}")
            value = round(kind.value(rounded), 15)
        value = max(value, self.low)
        return float(min(value, self.high))

    def _lengths(self) -> tuple[float, float]:
        """Return the length of the lowest value, and the ratio of that of the highest one to it."""
        low = self._of_kind.length(self.low)
        high = self._of_kind.length(self.high)
        return low, high / low


def good_range(run: Run, t: float) -> Axis:
    """Return the widest range of sigma_rel whose predicted error is below GOOD_ERROR, or raise an
    InvalidValueError."""
    curve = run.error_curve(t=t)
    ranges = curve.ranges_below(GOOD_ERROR)
    if not ranges:
        reason = f"no length has a predicted error below {100 * GOOD_ERROR:g} %"
        raise InvalidValueError("sigma_rel", reason, "name a range, such as 0.05:0.25")

    def ratio(ends: tuple[float, float]) -> float:
        low, high = ends
        return high / low

    low, high = max(ranges, key=ratio)
    return Axis("sigma_rel", round(low, 4), round(high, 4))


def has_raw(run: Run, t: float) -> bool:
    """Return whether a checkpoint holds the weights themselves at a time."""
    profiles = [source.profile for source in run.sources if source.t == t]
    return any(isinstance(profile, Point) for profile in profiles)


@dataclass(frozen=True)
class Trial:
    """One measurement of a metric; or images without a metric."""

    target: str  # the title of the target, such as `sigma_rel 0.15`, or RAW
    x: float | None  # the searched value; None for raw weights
    seed: int  # as given to the command; trials of one seed share an offset
    value: float | None = None  # the metric, finite; None without a metric, and of a failed trial
    standard_error: float | None = None
    predicted_error: float | None = None  # of the weights; None if unknown
    seconds: float = 0.0
    error: str | None = None  # why it failed

    @property
    def name(self) -> str:
        """The name of its logs and of the folder of its images."""
        return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{self.target}-seed-{self.seed}")


# --- the estimate from trials


class Estimate:
    """The estimate of the best value, from at least two lengths with different metrics.

    Attributes:
        best: the value with the best estimate, which may not be that of the best measurement.
        mean, standard_error: the estimated metric at `best`.
        low, high: ends of the range that contains the best with a probability of CONFIDENCE, which
            is equal within the noise.
        noise: the standard deviation of one measurement, without the offset of its seed.
        curve, errors: the estimated metric over the range, with standard errors: shape [POINTS].
        shown: the points between measurements that are not clipped; beyond these the curve only
            shows that lengths are bad.
        draws: curves drawn from the model, of which lower is better: shape [draws, POINTS].
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        axis: Axis,
        minimize: bool = True,
    ) -> None:
        xs, values, errors, seeds = _measurements(trials)
        sign = 1.0 if minimize else -1.0
        self._axis = axis
        self._known = xs
        if axis.values:
            self._known = np.array(axis.values)
        places = axis.place(xs)
        signed = sign * values
        self.shown = _between(places[clipped(signed) == signed])
        self.draws, self.noise = draw_curves(places, signed, errors, seeds)
        self.curve = sign * self.draws.mean(axis=0)
        self.errors = self.draws.std(axis=0)
        point = self._best_point()
        self.best = self._known_or_new(point)
        self.mean = float(self.curve[point])
        self.standard_error = float(self.errors[point])
        low, high = map(axis.value_at, self._likely())
        self.low = min(low, self.best)
        self.high = max(high, self.best)

    def _best_point(self) -> int:
        """Return the point of the grid with the best estimate, of a list the best of its values."""
        means = self.draws.mean(axis=0)
        if not self._axis.values:
            return int(means.argmin())
        places = self._axis.place(self._axis.values)
        points = _nearest_points(places)
        best = means[points].argmin()
        return int(points[best])

    def _likely(self) -> list[float]:
        """Return the ends of the range that contains the best with a probability of CONFIDENCE, as
        places."""
        tail = (1 - CONFIDENCE) / 2
        quantiles = np.quantile(self._best_places(), [tail, 1 - tail])
        low, high = quantiles.tolist()
        half = 0.5 / (POINTS - 1)
        low = max(low - half, 0.0)
        high = min(high + half, 1.0)
        return [low, high]

    def _best_places(self) -> FloatArray:
        """Return where each drawn curve is best: shape [draws]."""
        points = self.draws.argmin(axis=1)
        return np.asarray(GRID[points])

    def _known_or_new(self, point: int) -> float:
        """Return the measured value next to a point of the grid, or else the value there."""
        position = float(GRID[point])
        known = self._axis.place(self._known)
        distances = np.abs(known - position)
        nearest = distances.argmin()
        if distances[nearest] < _SAME:
            return float(self._known[nearest])
        return self._axis.value_at(position)

    @property
    def regret(self) -> float:
        """How much worse than the true best `best` is expected to be; not negative."""
        least = self.draws.min(axis=1)
        regrets = self.draws[:, self._best_point()] - least
        return float(regrets.mean())

    @property
    def settled(self) -> bool:
        """Whether more measurements would hardly lead to a better choice."""
        spread = float(np.ptp(self.curve))
        return self.regret <= max(self.noise / 4, 0.005 * spread)

    @property
    def edge(self) -> float | None:
        """The end of the range at or beyond which the best lies with a probability above one half;
        None if neither."""
        places = self._best_places()
        if np.mean(places <= _SAME) > 0.5:
            return self._axis.low
        if np.mean(places >= 1 - _SAME) > 0.5:
            return self._axis.high
        return None

    def proposed(
        self,
        count: int = NEXT,
        repeat: bool = False,
    ) -> list[float]:
        """Return up to `count` values to measure next, chosen one after another.

        Each has the largest expected improvement, over the drawn curves, on the lowest of the best
        and those chosen before. (Ginsbourger et al., Kriging is well-suited to parallelize
        optimization, 2010.) With `repeat`, and if the metric varies by less than the noise where
        the best may be, a measured value replaces one next to it, for another seed.
        """
        low, high = self._likely()
        is_likely = (low <= GRID) & (high >= GRID)
        spread = np.ptp(self.curve[is_likely])
        is_flat = repeat and self.noise > spread
        (best,) = _nearest_points(self._axis.place([self.best]))
        lowest = self.draws[:, best]
        values = []
        for _ in range(count):
            improved = np.minimum(self.draws, lowest[:, None])
            means = improved.mean(axis=0)
            point = int(means.argmin())
            lowest = improved[:, point]
            if is_flat:
                value = self._known_or_new(point)
            else:
                value = self._axis.value_at(float(GRID[point]))
            values.append(value)
        return list(dict.fromkeys(values))


def _nearest_points(places: FloatArray) -> npt.NDArray[np.intp]:
    """Return the points of the grid that are nearest to places."""
    return np.rint((POINTS - 1) * places).astype(np.intp)


def _between(places: FloatArray) -> slice:
    """Return the points of the grid from the first to the last of some places."""
    points = _nearest_points(places)
    return slice(points.min(), points.max() + 1)


def _measurements(trials: Sequence[Trial]) -> FloatArray:
    """Return the lengths of successful trials, their metrics, standard errors or nan, and seeds."""
    rows = []
    for trial in trials:
        if trial.x is not None and trial.value is not None:
            error = trial.standard_error or math.nan
            rows.append((trial.x, trial.value, error, trial.seed))
    return np.transpose(rows).astype(float)


def first_batch(axis: Axis) -> list[float]:
    """Return the given values, or FIRST values spread evenly in the logarithm, both ends
    included."""
    if axis.values:
        return list(axis.values)
    places = np.linspace(0, 1, FIRST).tolist()
    inner = map(axis.value_at, places[1:-1])
    values = [axis.low, *inner, axis.high]
    return list(dict.fromkeys(values))


# --- the report


@dataclass(frozen=True, repr=False)
class SweepReport:
    """The result of a sweep: all its trials, the estimate, why the search ended, and the files of
    the best average.

    `settings` are what the trials share; `again` is the command line that repeats the sweep.
    `estimate` is None without a metric.
    """

    axis: Axis
    metric: str
    minimize: bool | None
    settings: dict[str, Any]
    again: str = ""
    trials: tuple[Trial, ...] = ()
    estimate: Estimate | None = None
    stopped: str = "it is still measuring"
    outputs: tuple[Path, ...] = ()

    @property
    def found(self) -> Estimate:
        """The estimate; raises an InvalidValueError without a metric."""
        if self.estimate is None:
            raise InvalidValueError("found", "there is no estimate without a metric")
        return self.estimate

    @property
    def best(self) -> Target:
        """The average whose metric is estimated to be best, which was written."""
        return self.axis.target(self.found.best)

    @property
    def raw(self) -> float | None:
        """The mean metric of the raw weights; None if they were not measured."""
        return self._mean(None)

    @property
    def value(self) -> float | None:
        """The mean metric of the best average, as measured; None if that failed."""
        if self.estimate is None:
            return None
        return self._mean(self.estimate.best)

    def _mean(self, x: float | None) -> float | None:
        of_length = [trial.value for trial in self.trials if trial.x == x]
        values = [value for value in of_length if value is not None]
        if not values:
            return None
        return sum(values) / len(values)

    def __repr__(self) -> str:
        texts = answer(self.to_dict())
        facts = [f"{name}: {text}" for name, text in texts.items()]
        return f"SweepReport({', '.join(facts)})"

    def write(self, folder: str | Path) -> None:
        """Write the report to a folder, for `ema report`; raise a WriteError if that fails."""
        folder = files.expanded(folder)
        files.make_directory(folder)
        text = f"{json.dumps(self.to_dict(), indent=1)}\n"
        files.write_atomically(folder / RESULT, text.encode(), overwrite=True)

    def to_dict(self) -> dict[str, Any]:
        values = {
            "metric": self.metric,
            "minimize": self.minimize,
            "axis": self.axis.kind,
            "raw": self.raw,
            "stopped": self.stopped,
            "trials": [vars(trial) for trial in self.trials],
            "again": self.again,
            "outputs": list(map(str, self.outputs)),
            "settings": self.settings,
        }
        estimate = self.estimate
        if estimate is None:
            return values
        best = {"target": self.best.title, self.axis.kind: estimate.best}
        xs = self.axis.at(GRID)
        rows = np.column_stack([xs, estimate.curve, estimate.errors])[estimate.shown]
        curve = []
        for row in rows.tolist():
            curve.append(dict(zip(_CURVE, row, strict=True)))
        return values | {
            "best": best,
            "value": self.value,
            "estimate": estimate.mean,
            "standard_error": estimate.standard_error,
            "equal_within_noise": [estimate.low, estimate.high],
            "expected_regret": estimate.regret,
            "noise": estimate.noise,
            "curve": curve,
        }


# --- the search

Lengths = Mapping[float | None, Iterable[int]]  # or None for raw weights, and the seeds of each
Measure = Callable[[Trial], tuple[float | None, float | None]]
"""Measures an average with a seed: the metric, and its standard error; raises a TrialError."""
Average = Callable[[float | None], AbstractContextManager[tuple[Measure, float | None]]]
"""Makes the average of a length, or None for raw weights, for a block: yields what measures it, and
its predicted error."""


@dataclass(eq=False, kw_only=True)
class Search:
    """A search for the best value of a report's axis, which continues from its successful trials.

    `report` is replaced after each trial. At most `budget` lengths are measured, the best one last,
    each `repeats` times; with `repeats_known`, also once more with another seed, which counts
    again. If the report's `minimize` is None, nothing is searched: the first lengths are tried.
    """

    report: SweepReport
    budget: int
    repeats: int
    repeats_known: bool
    measures_raw: bool

    def __post_init__(self) -> None:
        least = 1 if self.report.axis.values else FIRST + 1
        hint = f"a search begins with {FIRST} lengths, and measures the best one last"
        check_count("budget", self.budget, least, hint)
        check_count("repeats", self.repeats)

    @property
    def expected(self) -> int:
        """About how many trials there will be; of a list, exactly."""
        axis = self.report.axis
        lengths = len(first_batch(axis))
        if not axis.values and self.report.minimize is not None:
            lengths = min(self.budget, USUAL)
        planned = self.repeats * (self.measures_raw + lengths)
        return max(planned, len(self.report.trials))

    def run(self, average: Average) -> Iterator[Trial]:
        """Measure until the best is known within the noise or the budget is spent; yield each trial
        when it has ended."""
        first: list[float | None] = [None] if self.measures_raw else []
        first += first_batch(self.report.axis)
        yield from self._measure(average, self._unmeasured(first))
        if self.report.minimize is None:
            self.report = replace(self.report, stopped="no metric was asked for")
            return
        axis = self.report.axis
        estimate = self._estimate(axis)
        while lengths := self._next(estimate):
            yield from self._measure(average, lengths)
            estimate = self._estimate(axis)
        yield from self._measure(average, self._unmeasured([estimate.best]))
        # the last measurement may show that another one is the best
        self._estimate(replace(axis, values=tuple(self._values())))

    def _seeds(self, x: float | None) -> set[int]:
        trials = self.report.trials
        return {trial.seed for trial in trials if trial.x == x}

    def _unmeasured(self, values: Iterable[float | None]) -> Lengths:
        """Return values with the first seeds, as far as they are missing."""
        lengths: dict[float | None, Iterable[int]] = {}
        for x in values:
            repeats = range(self.repeats)
            measured = self._seeds(x)
            if not all(seed in measured for seed in repeats):  # a set of them may not fit memory
                lengths[x] = itertools.filterfalse(measured.__contains__, repeats)
        return lengths

    def _once_more(self, values: Iterable[float]) -> Lengths:
        """Return values with the seeds that follow the measured ones."""
        lengths: dict[float | None, Iterable[int]] = {}
        for x in values:
            first = max(self._seeds(x), default=-1) + 1
            lengths[x] = range(first, first + self.repeats)
        return lengths

    def _measure(self, average: Average, lengths: Lengths) -> Iterator[Trial]:
        for x, seeds in lengths.items():
            title = RAW
            if x is not None:
                title = self.report.axis.target(x).title
            with average(x) as (measure, predicted_error):
                for seed in seeds:
                    trial = Trial(title, x, seed, predicted_error=predicted_error)
                    trial = _measured(trial, measure)
                    trials = (*self.report.trials, trial)
                    self.report = replace(self.report, trials=trials)
                    yield trial
                    self._check_latest()

    def _values(self) -> dict[float, float]:
        """Return the latest metric of each length."""
        return {
            trial.x: trial.value
            for trial in self.report.trials
            if trial.x is not None and trial.value is not None
        }

    def _check_latest(self) -> None:
        """Raise a PostHocError after two trials that failed alike, as all others would."""
        last = self.report.trials[-1]
        causes = []
        for trial in self.report.trials[-2:]:
            cause, _, _ = (trial.error or "").partition(": ")
            causes.append(cause)
        if last.error and causes == causes[:1] * 2:
            reason = f"two trials in a row have failed alike; the last one: {last.target}"
            raise PostHocError("the sweep", f"{reason}: {last.error}")
        values = [*self._values().values()]
        if len(values) == 2 and values[0] == values[1]:
            doubt = "does the evaluation use the weights?"
            log.warning("two lengths have the same metric, %s: %s", last.value, doubt)

    def _estimate(self, axis: Axis) -> Estimate:
        """Estimate the best value of an axis, or raise a PostHocError if the trials do not allow
        it."""
        values = self._values()
        first = len(first_batch(self.report.axis))
        least = min(3, max(2, first - 1))  # of three one may fail
        if len(values) < least:
            trials = self.report.trials
            failed = [trial for trial in trials if trial.error]
            reason = f"{len(failed)} of {len(trials)} trials have failed, too many to choose"
            last = f"the last one: {failed[-1].target}: {failed[-1].error}"
            raise PostHocError("the sweep", reason, last)
        if len({*values.values()}) == 1:
            reason = f"every trial has the same metric, {next(iter(values.values())):.12g}"
            raise PostHocError("the sweep", reason, "does the evaluation use the weights?")
        trials = self.report.trials
        estimate = Estimate(trials, axis, bool(self.report.minimize))
        self.report = replace(self.report, estimate=estimate)
        return estimate

    def _next(self, estimate: Estimate) -> Lengths:
        """Return the lengths of the next round; none if the search has ended, for the reason in
        `stopped`."""
        lengths = {trial.x for trial in self.report.trials}
        spent = 0
        for x in lengths - {None}:
            seeds = self._seeds(x)
            spent += math.ceil(len(seeds) / self.repeats)
        left = self.budget - spent - 1  # the best length is measured last
        if self.report.axis.values:
            reason = "all given lengths are measured"
        elif estimate.settled:
            reason = "the best length is known within the noise"
        elif left <= 0:
            reason = "the budget is spent"
        elif proposed := self._proposed(estimate, min(NEXT, left)):
            return proposed
        else:
            reason = "nothing is left to measure between the measured lengths"
        if estimate.edge is not None:
            title = self.report.axis.target(estimate.edge).title
            reason += f"; the best lies at the end, {title}, and may lie beyond"
        self.report = replace(self.report, stopped=reason)
        return {}

    def _proposed(self, estimate: Estimate, count: int) -> Lengths:
        """Return proposed lengths with seeds, but those that have failed."""
        failed = {trial.x for trial in self.report.trials if trial.error}
        proposed = estimate.proposed(count, self.repeats_known)
        values = [x for x in proposed if x not in failed]
        if self.repeats_known:
            return self._once_more(values)
        return self._unmeasured(values)


def _measured(trial: Trial, measure: Measure) -> Trial:
    """Return a trial with its metric, or why it failed, and the time that it took."""
    started = time.monotonic()
    try:
        value, noise = measure(trial)
        trial = replace(trial, value=value, standard_error=noise)
    except TrialError as failure:
        trial = replace(trial, error=str(failure))
    return replace(trial, seconds=time.monotonic() - started)


# --- texts for people


def answer(report: dict[str, Any]) -> dict[str, str]:
    """Return the results of a report's `to_dict` as texts for people."""
    trials = report["trials"]
    targets = {trial["target"] for trial in trials}
    succeeded = [trial["target"] for trial in trials if trial["error"] is None]
    failed = len(trials) - len(succeeded)
    measured = {*succeeded} - {RAW}
    count = f"{len(measured)} averages in {len(trials)} trials"
    if failed:
        count += f", {failed} of which failed"
    texts = {"metric": report["metric"], "measured": f"{count}; {report['stopped']}"}
    if "best" not in report:
        return texts
    raw = report["raw"]
    value = report["value"]
    low, high = report["equal_within_noise"]
    return texts | {
        "best": report["best"]["target"],
        "value": _metric(value),
        "estimate": _with_error(report["estimate"], report["standard_error"]),
        "equal": f"{low:.12g} to {high:.12g}",
        "raw": _metric(raw) if RAW in targets else "not measured",
        "gain": _gain(raw, value, report["minimize"]),
    }


def _metric(value: float | None) -> str:
    return "not measured: its trial failed" if value is None else f"{value:.6g}"


def _with_error(value: float, error: float) -> str:
    """Return a value with its standard error, and no digits that the error makes meaningless."""
    decade = math.floor(math.log10(max(error, 1e-12)))
    digits = max(0, 1 - decade)
    return f"{value:.{digits}f} ± {error:.2g}"


def _gain(
    raw: float | None,
    value: float | None,
    minimize: bool,
) -> str:
    """Return how much better than the raw weights the best average is; empty if that is unknown."""
    if not raw or value is None:
        return ""
    change = (value - raw) / abs(raw)
    better = "better" if (change < 0) == minimize else "worse"
    return f"{percent(abs(change))} {better} than the raw weights"
