"""A search for the best length from few noisy measurements, by Bayesian optimization in one
dimension, and its report.

A metric is modelled as a quadratic of x, the logarithm of the length scaled to [0, 1], plus a
Gaussian process with a Matern 5/2 kernel for the deviation from it, plus an offset for each seed,
plus noise. (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: sections 2.7 and
4.2.) The hyperparameters are not fitted but averaged over a grid, weighted by their likelihood:
with seven points many of them explain the data, and a single choice would state too narrow a range.
All reported numbers are statistics of curves drawn from the model, but for the metric of the best
length, which is measured.

The trials are the only state of a search: it can be continued from a list of them.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, PostHocError, check_count, check_number, percent
from posthoc_cli.profiles import FloatArray, Point
from posthoc_cli.run import Run
from posthoc_cli.targets import KINDS, WIDTH, Target, bad, kind_of, parse_numbers

log = logging.getLogger(__name__)

RAW = "raw"  # the target of trials of raw weights, which are not an average
RESULT = "sweep.json"  # the file of a report in the folder of a sweep

POINTS = 101  # the number of points of the grid over the range, on which curves are drawn
_GRID = np.linspace(0, 1, POINTS)

FIRST = 6  # lengths in the first batch, which are spread evenly
NEXT = 2  # lengths in each further batch
USUAL = 12  # lengths after which 98 % of searches have found the best (scripts/bench_sweep.py)

CONFIDENCE = 0.95  # the probability that the best length lies in the stated range
GOOD_ERROR = 0.01  # the largest predicted error in the default range

_LENGTHS = (0.1, 0.2, 0.4, 0.8)  # length scales of the kernel, as a fraction of the range
_SIZES = (0.01, 0.1, 0.3, 1.0, 3.0)
"""Standard deviations of the deviation from a quadratic; as the following, relative to the spread
of the values."""
_NOISES = (0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.8)
"""Standard deviations of the noise, used if no standard errors are given."""
_OFFSETS = (0.0, 0.1, 1.0)  # standard deviations of the offset that a seed adds to all its trials
_TRENDS = (10.0, 1.0, 1.0)  # prior standard deviations of the coefficients of the quadratic
_FAR = 12.0
"""The largest distance of a value above the upper quartile, in distances of that from the second
best value. Larger values are clipped: they only show that a length is bad."""
_DRAWS = 1024
_STATED = 1e-3, 1e6  # bounds of stated standard errors, relative to the spread of the values
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
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for value in (self.low, self.high, *(self.values or ())):
            self.target(value)  # raises an InvalidValueError for a bad value
        if not self.low < self.high:
            ends = f"{self.low:g}:{self.high:g}"
            raise InvalidValueError(self.kind, "the first must be below the second", value=ends)

    @classmethod
    def of_values(cls, kind: str, values: Sequence[float]) -> Axis:
        """Return the axis of given values, which are all measured."""
        unique = sorted(
            {check_number(kind, value, math.isfinite, "be a number") for value in values}
        )
        if len(unique) < 2:
            raise InvalidValueError("values", "name at least two lengths", value=list(values))
        return cls(kind, unique[0], unique[-1], tuple(unique))

    @classmethod
    def parse(cls, text: str, name: str, kind: str = "") -> Axis:
        """Return the axis of KIND:LOW:HIGH (a search), KIND:LIST or KIND:LOW:HIGH:STEP; a given
        `kind` is not repeated.

        Raises an InvalidValueError about `name` that says what is accepted.
        """
        found = (_KINDS[kind], text) if kind else kind_of(text)
        if found is None:
            raise bad(name, text, f"must be a range or a list of {', '.join(KINDS)}")
        searched, rest = found
        form = f"a range LOW:HIGH, such as {searched.range}, or a list"
        try:
            if rest.count(":") != 1:
                return cls.of_values(searched.name, parse_numbers(rest, name, form))
            low, high = parse_numbers(rest.replace(":", ","), name, form)
            return cls(searched.name, low, high)
        except InvalidValueError as error:
            raise bad(name, text, error.reason, error.hint) from error

    def __contains__(self, value: float) -> bool:
        return value in self.values if self.values else self.low <= value <= self.high

    def target(self, value: float) -> Target:
        return _KINDS[self.kind].make(value)

    def place(self, values: FloatArray | Sequence[float]) -> FloatArray:
        """Return the places of values in the range, from 0 to 1 by the logarithm of the length."""
        low, high = self._lengths()
        lengths = _KINDS[self.kind].length(np.asarray(values))
        return np.asarray(np.log(lengths / low) / math.log(high / low))

    def at(self, places: FloatArray | float) -> FloatArray:
        """Return the exact values at places in [0, 1], the inverse of `place`."""
        low, high = self._lengths()
        return np.asarray(_KINDS[self.kind].value(low * (high / low) ** places))

    def value_at(self, place: float) -> float:
        """Return the value at a place, rounded to three digits (more in a narrow range)."""
        low, high = self._lengths()
        exact = float(self.at(place))
        digits = max(3, 2 - math.floor(math.log10(math.log(high / low))))
        if self.kind == "beta":  # the digits of 1 - beta
            rounded = round(1 - float(f"{1 - exact:.{digits}g}"), 12)
        elif _KINDS[self.kind].is_whole:
            rounded = round(exact)
        else:
            rounded = float(f"{exact:.{digits}g}")
        return min(max(rounded, self.low), self.high)

    def _lengths(self) -> tuple[float, float]:
        kind = _KINDS[self.kind]
        return kind.length(self.low), kind.length(self.high)


def good_range(run: Run, t: float | None = None) -> Axis:
    """Return the widest range of sigma_rel whose predicted error is below GOOD_ERROR, or raise an
    InvalidValueError."""
    ranges = run.error_curve(t=t).ranges_below(GOOD_ERROR)
    if not ranges:
        reason = f"no length has a predicted error below {100 * GOOD_ERROR:g} %"
        raise InvalidValueError("sigma_rel", reason, "name a range, such as 0.05:0.25")
    low, high = max(ranges, key=lambda ends: ends[1] / ends[0])
    return Axis("sigma_rel", math.ceil(low * 1e4) / 1e4, math.floor(high * 1e4) / 1e4)


def has_raw(run: Run, t: float | None = None) -> bool:
    """Return whether a checkpoint holds the weights themselves at a time, by default at the newest
    snapshot's."""
    sources = run.sources
    time = sources[-1].t if t is None else t
    return any(isinstance(source.profile, Point) and source.t == time for source in sources)


@dataclass(frozen=True)
class Trial:
    """One measurement of a metric; or images without a metric."""

    target: str  # the title of the target, such as `sigma_rel 0.15`; `raw` for raw weights
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
        return name_of(self.target, self.seed)


def name_of(target: str, seed: int) -> str:
    """Return the name of a trial for files."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", f"{target}-seed-{seed}")


# --- the estimate from trials


@dataclass(frozen=True)
class Estimate:
    """The estimate of the best value from trials."""

    axis: Axis
    best: float  # the value with the best estimate, which may not be that of the best measurement
    mean: float  # the estimated metric at `best`
    standard_error: float
    low: float  # of the range that contains the best with a probability of CONFIDENCE,
    high: float  # which is equal within the noise
    regret: float  # how much worse than the true best `best` is expected to be; not negative
    noise: float  # the standard deviation of one measurement, without the offset of its seed
    curve: FloatArray  # the estimated metric over the range: shape [POINTS]
    errors: FloatArray  # its standard errors
    draws: FloatArray  # curves drawn from the model, of which lower is better: [draws, POINTS]

    @property
    def settled(self) -> bool:
        """Whether more measurements would hardly lead to a better choice."""
        spread = float(np.ptp(self.curve))
        return self.regret <= max(self.noise / 4, 0.005 * spread)

    @property
    def edge(self) -> float | None:
        """The end of the range at or beyond which the best lies with a probability above one half;
        None if neither."""
        places = _GRID[self.draws.argmin(axis=1)]
        if np.mean(places <= _SAME) > 0.5:
            return self.axis.low
        return self.axis.high if np.mean(places >= 1 - _SAME) > 0.5 else None


def estimate(trials: Sequence[Trial], axis: Axis, minimize: bool = True) -> Estimate:
    """Estimate the best value from at least three successful trials with different metrics."""
    measured = [trial for trial in trials if trial.value is not None and trial.x is not None]
    sign = 1.0 if minimize else -1.0
    values = _clipped(sign * np.array([trial.value for trial in measured], float))
    centre = float(values.mean())
    scale = float(values.std())
    errors = np.array([trial.standard_error or math.nan for trial in measured]) / scale
    _, seeds = np.unique([trial.seed for trial in measured], return_inverse=True)
    xs = [float(trial.x or 0) for trial in measured]
    places = axis.place(xs)
    draws, noise = _draw(places, (values - centre) / scale, errors, seeds.astype(np.intp))
    curve = centre + scale * draws.mean(axis=0)
    spread = scale * draws.std(axis=0)
    if axis.values:
        points = np.array([_nearest(place) for place in axis.place(axis.values)])
        chosen = int(curve[points].argmin())
        point = int(points[chosen])
        best = axis.values[chosen]
    else:
        point = int(curve.argmin())
        best = _known_or_new(axis, point, xs)
    low, high = map(axis.value_at, _likely(draws).tolist())
    regrets = draws[:, point] - draws.min(axis=1)
    return Estimate(
        axis,
        best,
        mean=sign * float(curve[point]),
        standard_error=float(spread[point]),
        low=min(low, best),
        high=max(high, best),
        regret=scale * float(regrets.mean()),
        noise=scale * noise,
        curve=sign * curve,
        errors=spread,
        draws=draws,
    )


def _clipped(values: FloatArray) -> FloatArray:
    upper = float(np.quantile(values, 0.75))
    reach = upper - float(np.sort(values)[1])
    return np.minimum(values, upper + _FAR * reach) if reach > 0 else values


def _known_or_new(axis: Axis, point: int, known: Sequence[float]) -> float:
    """Return the measured value next to a point of the grid, or else the value there."""
    distances = np.abs(axis.place(known) - _GRID[point])
    nearest = int(distances.argmin())
    if distances[nearest] < _SAME:
        return known[nearest]
    return axis.value_at(float(_GRID[point]))


def _nearest(place: float) -> int:
    """Return the point of the grid that is nearest to a place."""
    return int(np.abs(_GRID - place).argmin())


def first_batch(axis: Axis) -> list[float]:
    """Return the given values, or FIRST values spread evenly in the logarithm, both ends
    included."""
    if axis.values:
        return list(axis.values)
    places = np.linspace(0, 1, FIRST).tolist()
    return list(dict.fromkeys(map(axis.value_at, places)))


def next_batch(
    found: Estimate, trials: Sequence[Trial], count: int = NEXT, repeat: bool = False
) -> list[float]:
    """Return up to `count` values to measure next, chosen one after another.

    Each has the largest expected improvement, over the drawn curves, on the lowest of the best and
    those chosen before. (Ginsbourger et al., Kriging is well-suited to parallelize optimization,
    2010.) With `repeat`, and if the metric varies by less than the noise where the best may be, a
    measured value replaces one next to it, for another seed.
    """
    axis = found.axis
    known = [trial.x for trial in trials if trial.value is not None and trial.x is not None]
    low, high = _likely(found.draws)
    within = found.curve[(low <= _GRID) & (high >= _GRID)]
    flat = repeat and found.noise > float(np.ptp(within))
    wanted: list[float] = []
    best = _nearest(float(axis.place([found.best])[0]))
    lowest = found.draws[:, best]
    for _ in range(count):
        improved = np.minimum(found.draws, lowest[:, None])
        pick = int(improved.mean(axis=0).argmin())
        lowest = np.minimum(lowest, found.draws[:, pick])
        new = axis.value_at(float(_GRID[pick]))
        wanted.append(_known_or_new(axis, pick, known) if flat else new)
    return list(dict.fromkeys(wanted))


def _likely(draws: FloatArray) -> FloatArray:
    """Return the ends of the range that contains the best with a probability of CONFIDENCE, as
    places; shape [2]."""
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(_GRID[draws.argmin(axis=1)], [tail, 1 - tail])
    half = 0.5 / (POINTS - 1)
    return np.asarray(np.clip(ends + np.array([-half, half]), 0, 1))


def _draw(
    places: FloatArray, values: FloatArray, errors: FloatArray, seeds: npt.NDArray[np.intp]
) -> tuple[FloatArray, float]:
    """Return curves on _GRID drawn from the mixture over all hyperparameters, [draws, POINTS], and
    the noise."""
    given = bool(np.isfinite(errors).all())
    scales = np.clip(errors, *_STATED) if given else np.ones_like(errors)
    has_offsets = 1 < len(set(seeds.tolist())) < len(seeds)
    offsets = _OFFSETS if has_offsets else _OFFSETS[:1]
    noises = (1.0,) if given else _NOISES
    options = list(itertools.product(_LENGTHS, _SIZES, noises, offsets))
    same_seed = (seeds[:, None] == seeds[None]).astype(float)

    both = np.concatenate([places, _GRID])
    count = len(values)
    trends = np.vander(2 * both - 1, 3, increasing=True) * _TRENDS
    kernels = {length: _matern(both, length) for length in _LENGTHS}

    def covariance(length: float, size: float) -> FloatArray:
        """Return the covariance of the metric at all places with that at the measured ones."""
        trend = trends @ trends[:count].T
        return np.asarray(size**2 * kernels[length][:, :count] + trend)

    def factor(length: float, size: float, noise: float, offset: float) -> FloatArray:
        """Return the Cholesky factor of the covariance of the measured values."""
        within = covariance(length, size)[:count] + offset**2 * same_seed
        within += np.diag((noise * scales) ** 2)
        return np.asarray(cholesky(within, lower=True, check_finite=False))

    logs = []
    # one at a time: all for hundreds of trials would take gigabytes
    for root in itertools.starmap(factor, options):
        square = values @ cho_solve((root, True), values, check_finite=False)
        volume = np.log(np.diagonal(root)).sum()
        logs.append(-0.5 * square - volume)
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    roots = {
        length: np.linalg.cholesky(kernel + 1e-9 * np.eye(len(both)))
        for length, kernel in kernels.items()
    }
    random = np.random.default_rng(0)
    draws = []
    for option, shape in zip(options, random.multinomial(_DRAWS, weights), strict=True):
        if shape == 0:
            continue
        length, size, noise, offset = option
        # Draws from the prior, corrected by the measurements to draws from the posterior
        # (Matheron's rule).
        curves = size * roots[length] @ random.standard_normal((len(both), shape))
        curves += trends @ random.standard_normal((3, shape))
        chance = noise * scales[:, None] * random.standard_normal((count, shape))
        chance += offset * random.standard_normal((count, shape))[seeds]
        missing = values[:, None] - curves[:count] - chance
        solved = cho_solve((factor(*option), True), missing)
        moved = covariance(length, size)[count:] @ solved
        draws.append((curves[count:] + moved).T)
    expected = weights @ [noise for _, _, noise, _ in options]
    scale = np.sqrt((scales**2).mean())
    return np.concatenate(draws), float(scale * expected)


def _matern(x: FloatArray, length: float) -> FloatArray:
    distance = math.sqrt(5) * np.abs(x[:, None] - x[None]) / length
    return np.asarray((1 + distance + distance**2 / 3) * np.exp(-distance))


# --- the search

Wanted = Sequence[tuple[float | None, int]]  # values to measure, or None for raw weights, and seeds
Measure = Callable[[Wanted], Iterable[Trial]]  # measures them, and returns a trial of each


class Search:
    """A search for the best value of an axis, which continues from successful `trials` that are
    added to it.

    At most `budget` lengths are measured, the best one last, each `repeats` times; with `again`,
    also once more with another seed, which counts again. With `raw` the raw weights are measured as
    well. `found` is the estimate after the latest round, and `stopped` why
    the search ended. If `minimize` is None, nothing is searched: the first lengths are tried.
    """

    found: Estimate | None = None
    stopped = "it is still measuring"

    def __init__(
        self,
        axis: Axis,
        *,
        minimize: bool | None,
        budget: int,
        repeats: int,
        again: bool,
        raw: bool = False,
    ) -> None:
        least = FIRST + 1 if axis.values is None else 1  # all values of a list are measured
        reason = f"be at least {least}: those that a search begins with, and the best one"
        check_number("budget", check_count("budget", budget), lambda count: count >= least, reason)
        self.axis = axis
        self.trials = list[Trial]()
        self._minimize = minimize
        self._budget = budget
        self._repeats = check_count("repeats", repeats)
        self._again = again
        self._raw = raw

    @property
    def expected(self) -> int:
        """About how many trials there will be; of a list, exactly."""
        lengths = len(first_batch(self.axis))
        if self.axis.values is None and self._minimize is not None:
            lengths = min(self._budget, USUAL)
        return max(self._repeats * (self._raw + lengths), len(self.trials))

    def rounds(self, measure: Measure) -> Iterator[None]:
        """Measure until the best is known within the noise or the budget is spent; yield after each
        round."""
        first = first_batch(self.axis)
        self._take(measure(self._missing([None, *first] if self._raw else first)))
        if self._minimize is None:
            self.stopped = "no metric was asked for"
            yield
            return
        while True:
            least = min(3, max(2, len(first) - 1), len(first))  # of three one may fail
            found = self._estimate(least, self._minimize)
            self.found = found
            yield
            wanted = self._next(found)
            if not wanted:
                break
            self._take(measure(wanted))
        self._take(measure(self._missing([found.best])))
        yield

    def report(self, metric: str, settings: dict[str, Any], again: str = "") -> SweepReport:
        """Return the report after the latest round; `metric` is the name of what was measured."""
        return SweepReport(
            self.axis,
            metric,
            self._minimize,
            tuple(self.trials),
            self.found,
            self.stopped,
            settings=settings,
            again=again,
        )

    def _seeds(self, x: float | None) -> set[int]:
        return {trial.seed for trial in self.trials if trial.x == x}

    def _missing(self, values: Sequence[float | None]) -> Wanted:
        pairs = itertools.product(values, range(self._repeats))
        return [(x, seed) for x, seed in pairs if seed not in self._seeds(x)]

    def _take(self, trials: Iterable[Trial]) -> None:
        """Add trials; raise a PostHocError after two that failed alike, as all others would."""
        for trial in trials:
            before = self.trials[-1].error if self.trials else None
            self.trials.append(trial)
            if trial.error and before and _cause(trial.error) == _cause(before):
                reason = f"two trials in a row have failed alike; the last one: {trial.target}"
                raise PostHocError("the sweep", f"{reason}: {trial.error}")
            values = self._values()
            if len(values) == 2 and len({*values.values()}) == 1:
                same = f"the first two lengths have the same metric, {trial.value}"
                log.warning("%s: does the evaluation use the weights?", same)

    def _values(self) -> dict[float, float]:
        """Return the latest metric of each length."""
        return {
            trial.x: trial.value
            for trial in self.trials
            if trial.x is not None and trial.value is not None
        }

    def _next(self, found: Estimate) -> Wanted:
        """Return the values of the next round with seeds; none if the search has ended, for the
        reason in `stopped`."""
        lengths = {trial.x for trial in self.trials} - {None}
        spent = sum(math.ceil(len(self._seeds(x)) / self._repeats) for x in lengths)
        left = self._budget - spent - 1  # the best length is measured last
        if self.axis.values is not None:
            reason = "all given lengths are measured"
        elif found.settled:
            reason = "the best length is known within the noise"
        elif left <= 0:
            reason = "the budget is spent"
        else:
            reason = "nothing is left to measure between the measured lengths"
            if wanted := self._proposed(
                next_batch(found, self.trials, min(NEXT, left), self._again)
            ):
                return wanted
        if found.edge is not None:
            kind = "list" if self.axis.values else "range"
            title = self.axis.target(found.edge).title
            reason += f"; the best lies at the end of the {kind}, {title}, and may lie beyond"
        self.stopped = reason
        return []

    def _proposed(self, values: Sequence[float]) -> Wanted:
        """Return proposed values with the next seeds, but those that have failed, or that may not
        be measured again."""
        failed = {trial.x for trial in self.trials if trial.error}
        wanted = list[tuple[float | None, int]]()
        for x in values:
            seeds = self._seeds(x)
            if x not in failed and (self._again or not seeds):
                after = max(seeds, default=-1) + 1
                wanted += [(x, after + index) for index in range(self._repeats)]
        return wanted

    def _estimate(self, least: int, minimize: bool) -> Estimate:
        """Estimate the best value, or raise a PostHocError if less than `least` lengths allow
        it."""
        values = self._values()
        if len(values) < least:
            failed = [trial for trial in self.trials if trial.error]
            reason = f"{len(failed)} of {len(self.trials)} trials have failed, too many to choose"
            last = f"the last one: {failed[-1].target}: {failed[-1].error}"
            raise PostHocError("the sweep", reason, last)
        if len({*values.values()}) == 1:
            reason = f"every trial has the same metric, {next(iter(values.values())):.12g}"
            raise PostHocError("the sweep", reason, "does the evaluation use the weights?")
        return estimate(self.trials, self.axis, minimize)


def _cause(error: str) -> str:
    """Return why a trial has failed, without what its program wrote."""
    return error.partition(": ")[0]


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
    trials: tuple[Trial, ...]
    estimate: Estimate | None
    stopped: str
    outputs: tuple[Path, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    again: str = ""

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

    def __repr__(self) -> str:
        texts = [f"{name}: {text}" for name, text in answer(self.to_dict()).items()]
        return f"SweepReport({', '.join(texts)})"

    @property
    def raw(self) -> float | None:
        """The mean metric of the raw weights; None if they were not measured."""
        return self._mean(None)

    @property
    def value(self) -> float | None:
        """The mean metric of the best average, as measured; None if that failed."""
        return None if self.estimate is None else self._mean(self.estimate.best)

    def _mean(self, x: float | None) -> float | None:
        values = [trial.value for trial in self.trials if trial.x == x and trial.value is not None]
        return sum(values) / len(values) if values else None

    def write(self, folder: str | Path) -> None:
        """Write the report to a folder, for `ema report`; raise a WriteError if that fails."""
        folder = files.expanded(folder)
        files.make_directory(folder)
        text = f"{json.dumps(self.to_dict(), indent=1)}\n"
        files.write_atomically(folder / RESULT, text.encode(), overwrite=True)

    def to_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "minimize": self.minimize,
            "axis": self.axis.kind,
            "raw": self.raw,
            "stopped": self.stopped,
            "trials": [vars(trial) for trial in self.trials],
            "again": self.again,
            "outputs": list(map(str, self.outputs)),
            "settings": self.settings,
            **({} if self.estimate is None else self._result(self.estimate)),
        }

    def _result(self, found: Estimate) -> dict[str, Any]:
        xs = self.axis.at(_GRID).tolist()
        curve = zip(xs, found.curve.tolist(), found.errors.tolist(), strict=True)
        return {
            "best": {"target": self.best.title, self.axis.kind: found.best},
            "value": self.value,
            "estimate": found.mean,
            "standard_error": found.standard_error,
            "equal_within_noise": [found.low, found.high],
            "expected_regret": found.regret,
            "noise": found.noise,
            "curve": [{"x": x, "estimate": y, "standard_error": error} for x, y, error in curve],
        }


def answer(found: dict[str, Any]) -> dict[str, str]:
    """Return the results of a report's `to_dict` as texts for people."""
    trials = found["trials"]
    failed = sum(trial["error"] is not None for trial in trials)
    measured = {trial["target"] for trial in trials if trial["error"] is None} - {RAW}
    count = f"{len(measured)} averages in {len(trials)} trials"
    if failed:
        count += f", {failed} of which failed"
    texts = {"metric": str(found["metric"]), "measured": f"{count}; {found['stopped']}"}
    if "best" not in found:
        return texts
    raw = found["raw"]
    value = found["value"]
    low, high = found["equal_within_noise"]
    return texts | {
        "best": str(found["best"]["target"]),
        "value": "not measured: its trial failed" if value is None else f"{value:.6g}",
        "estimate": f"{found['estimate']:.6g} ± {found['standard_error']:.2g}",
        "equal": f"{low:.12g} to {high:.12g}",
        "raw": "not measured" if raw is None else f"{raw:.6g}",
        "gain": _gain(raw, value, found["minimize"]),
    }


def _gain(raw: float | None, value: float | None, minimize: bool) -> str:
    """Return how much better than the raw weights the best average is; empty if that is unknown."""
    if raw is None or value is None or raw == 0:
        return ""
    change = (value - raw) / abs(raw)
    better = "better" if (change < 0) == minimize else "worse"
    return f"{percent(abs(change))} {better} than the raw weights"
