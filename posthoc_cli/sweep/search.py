"""A search for the best length from few noisy measurements, by Bayesian optimization in one
dimension, and its report.

A metric is modelled as a quadratic of x, the logarithm of the length scaled to [0, 1], plus a
Gaussian process with a Matern 5/2 kernel for the deviation from it, plus an offset for each seed,
plus noise. (Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006: sections 2.7 and
4.2.) The hyperparameters are not fitted but averaged over a grid, weighted by their likelihood:
with seven points many of them explain the data, and a single choice would state too narrow a range.
All reported numbers are statistics of curves drawn from the model.

The trials are the only state of a search: it can be continued from a list of them.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import cho_solve, cholesky, solve_triangular

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, PostHocError, check_count, check_number
from posthoc_cli.profiles import FloatArray, Point
from posthoc_cli.run import Run
from posthoc_cli.targets import KINDS, WIDTH, Target, bad, kind_of, parse_numbers

RAW, RESULT = "raw", "sweep.json"
"""The target of trials of raw weights, which are not an average; and the file of a report in the
folder of a sweep."""

POINTS = 101  # the number of points of the grid over the range, on which curves are drawn
_GRID = np.linspace(0, 1, POINTS)

# the number of lengths in the first batch, which are spread evenly, and in each further batch
FIRST, NEXT = (6, 2)

CONFIDENCE, GOOD_ERROR = 0.95, 0.01
"""The probability that the best length lies in the stated range; the largest predicted error in the
default range."""

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
_DRAWS, _MIXED = 1024, 32
_STATED = 1e-3, 1e6  # bounds of stated standard errors, relative to the spread of the values
_SAME = 0.02
"""The distance from a measured length, as a fraction of the range, below which a proposal repeats
that length."""

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
        for name in ("low", "high"):
            self.target(getattr(self, name))  # raises an InvalidValueError for a bad value
            # NumPy's numbers become Python's
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.low < self.high:
            ends = f"{self.low:g}:{self.high:g}"
            raise InvalidValueError(self.kind, "the first must be below the second", value=ends)

    @classmethod
    def of_values(cls, kind: str, values: Sequence[float]) -> Axis:
        """Return the axis of given values, which are all measured; an InvalidValueError names a bad
        one."""
        for value in values:
            _KINDS[kind].make(value)  # raises an InvalidValueError for a bad value
        unique = sorted(set(map(float, values)))
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
        is_range = rest.count(":") == 1
        form = f"a range LOW:HIGH, such as {searched.range}, or a list"
        try:
            values = parse_numbers(rest.replace(":", ",") if is_range else rest, name, form)
            if is_range:
                return cls(searched.name, values[0], values[-1])
            return cls.of_values(searched.name, values)
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
    time = run.sources[-1].t if t is None else t
    return any(isinstance(source.profile, Point) and source.t == time for source in run.sources)


@dataclass(frozen=True)
class Trial:
    """One measurement of a metric."""

    target: str  # the title of the target, such as `sigma_rel 0.15`; `raw` for raw weights
    x: float  # the searched value; 0 for raw weights
    seed: int  # as given to the command; trials of one seed share an offset
    # the metric, finite; None for a failed trial, of which `error` says why
    value: float | None = None
    standard_error: float | None = None
    predicted_error: float | None = None  # of the weights; None if unknown
    seconds: float = 0.0
    error: str | None = None
    # the path of its logs without the endings .out and .err, relative to the folder of the sweep
    log: str = ""


# --- the estimate from trials


@dataclass(frozen=True)
class Estimate:
    """The estimate of the best value from trials."""

    axis: Axis
    best: float  # the value with the best estimate, which may not be that of the best measurement
    mean: float  # the estimated metric at `best`
    standard_error: float
    # the range that contains the best with a probability of CONFIDENCE; it is equal within the
    # noise
    low: float
    high: float
    # how much worse than the true best the metric at `best` is expected to be; not negative
    regret: float
    noise: float  # the standard deviation of one measurement, without the offset of its seed
    # the range: shape [POINTS], as are the estimated metric over it, and its standard error
    xs: FloatArray
    curve: FloatArray
    errors: FloatArray
    # curves drawn from the model, standardized so that lower is better: shape [draws, POINTS]
    draws: FloatArray

    @property
    def settled(self) -> bool:
        """Whether more measurements would hardly lead to a better choice."""
        return self.regret <= max(self.noise / 4, 0.005 * float(np.ptp(self.curve)))

    @property
    def edge(self) -> float | None:
        """The end of the range at or beyond which the best lies with a probability above one half;
        None if neither."""
        places, margin = self.draws.argmin(axis=1), _SAME * (POINTS - 1)
        ends = {self.axis.low: places <= margin, self.axis.high: places >= POINTS - 1 - margin}
        return next((end for end, is_best in ends.items() if is_best.mean() > 0.5), None)


def estimate(trials: Sequence[Trial], axis: Axis, minimize: bool = True) -> Estimate:
    """Estimate the best value from at least three successful trials."""
    measured = [(trial, trial.value) for trial in trials if trial.value is not None and trial.x]
    sign = 1.0 if minimize else -1.0
    values = sign * np.array([value for _, value in measured])
    upper = float(np.quantile(values, 0.75))
    reach = upper - float(np.sort(values)[1])
    values = np.minimum(values, upper + _FAR * reach) if reach > 0 else values
    centre = float(values.mean())
    scale = float(values.std()) if np.ptp(values) > 0 else 1e-9 * (abs(centre) or 1.0)
    errors = np.array([trial.standard_error or math.nan for trial, _ in measured]) / scale
    _, seeds = np.unique([trial.seed for trial, _ in measured], return_inverse=True)
    places = axis.place([trial.x for trial, _ in measured])
    draws, noise = _draw(places, (values - centre) / scale, errors, seeds.astype(np.intp))
    curve, spread = centre + scale * draws.mean(axis=0), scale * draws.std(axis=0)
    choices = axis.place(axis.values) if axis.values else _GRID
    points = np.abs(_GRID - choices[:, None]).argmin(axis=1)
    chosen = int(curve[points].argmin())
    point, best = (
        int(points[chosen]),
        axis.values[chosen] if axis.values else axis.value_at(float(_GRID[chosen])),
    )
    low, high = map(axis.value_at, _likely(draws).tolist())
    regret = scale * float((draws[:, point] - draws.min(axis=1)).mean())
    return Estimate(
        axis,
        best,
        sign * float(curve[point]),
        float(spread[point]),
        min(low, best),
        max(high, best),
        regret,
        scale * noise,
        axis.at(_GRID),
        sign * curve,
        spread,
        draws,
    )


def first_batch(axis: Axis) -> list[float]:
    """Return the given values, or FIRST values spread evenly in the logarithm, both ends
    included."""
    return [*(axis.values or dict.fromkeys(map(axis.value_at, np.linspace(0, 1, FIRST).tolist())))]


def next_batch(
    found: Estimate, trials: Sequence[Trial], count: int = NEXT, repeat: bool = False
) -> list[float]:
    """Return up to `count` values to measure next, chosen one after another.

    Each has the largest expected improvement, over the drawn curves, on the lowest of the best and
    those chosen before. (Ginsbourger et al., Kriging is well-suited to parallelize optimization,
    2010.) With `repeat`, and if the metric varies by less than the noise where the best may be, a
    measured value replaces one next to it, for another seed.
    """
    known = sorted({trial.x for trial in trials if trial.value is not None and trial.x})
    places = found.axis.place(known)
    low, high = _likely(found.draws)
    within = found.curve[(low <= _GRID) & (high >= _GRID)]
    flat = repeat and found.noise > float(np.ptp(within))
    wanted: list[float] = []
    lowest = found.draws[:, np.abs(_GRID - found.axis.place([found.best])).argmin()]
    for _ in range(count):
        pick = int(np.minimum(found.draws, lowest[:, None]).mean(axis=0).argmin())
        lowest = np.minimum(lowest, found.draws[:, pick])
        nearest = int(np.abs(places - _GRID[pick]).argmin())
        near = flat and abs(places[nearest] - _GRID[pick]) < _SAME
        wanted.append(known[nearest] if near else found.axis.value_at(float(_GRID[pick])))
    return list(dict.fromkeys(wanted))


def _likely(draws: FloatArray) -> FloatArray:
    """Return the ends of the range that contains the best with a probability of CONFIDENCE, as
    places; shape [2]."""
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(_GRID[draws.argmin(axis=1)], [tail, 1 - tail]) + np.array([-0.5, 0.5]) / (
        POINTS - 1
    )
    return np.asarray(np.clip(ends, 0, 1))


def _draw(
    places: FloatArray, values: FloatArray, errors: FloatArray, seeds: npt.NDArray[np.intp]
) -> tuple[FloatArray, float]:
    """Return curves on _GRID drawn from the mixture over all hyperparameters, [draws, POINTS], and
    the noise."""
    given = bool(np.isfinite(errors).all())
    same_seed = (seeds[:, None] == seeds[None]).astype(float)
    offsets = _OFFSETS if 1 < len(set(seeds.tolist())) < len(seeds) else _OFFSETS[:1]
    options = list(itertools.product(_LENGTHS, _SIZES, (1.0,) if given else _NOISES, offsets))
    scales = np.clip(errors, *_STATED) if given else np.ones_like(errors)

    both, count = np.concatenate([places, _GRID]), len(values)
    trends = np.vander(2 * both - 1, 3, increasing=True) * _TRENDS
    kernels = {length: _matern(both, length) for length in _LENGTHS}

    def covariance(length: float, size: float) -> FloatArray:
        """Return the covariance of the metric at all places with that at the measured ones."""
        return np.asarray(size**2 * kernels[length][:, :count] + trends @ trends[:count].T)

    def factor(length: float, size: float, noise: float, offset: float) -> FloatArray:
        """Return the Cholesky factor of the covariance of the measured values."""
        within = (
            covariance(length, size)[:count]
            + np.diag((noise * scales) ** 2)
            + offset**2 * same_seed
        )
        return np.asarray(cholesky(within, lower=True, check_finite=False))

    logs = []
    # one at a time: all for hundreds of trials would take gigabytes
    for root in itertools.starmap(factor, options):
        whitened = solve_triangular(root, values, lower=True, check_finite=False)
        logs.append(-0.5 * (whitened**2).sum() - np.log(np.diagonal(root)).sum())
    weights = np.exp(np.array(logs) - max(logs))
    weights /= weights.sum()
    random = np.random.default_rng(0)
    # Systematic resampling: the count of each option differs by less than one from its weight times
    # _MIXED.
    levels = (np.arange(_MIXED) + random.random()) / _MIXED
    chosen = np.searchsorted(np.cumsum(weights), levels).clip(max=len(options) - 1)
    roots = {
        length: np.linalg.cholesky(kernels[length] + 1e-9 * np.eye(len(both)))
        for length in _LENGTHS
    }
    draws = []
    for index, times in zip(*np.unique(chosen, return_counts=True), strict=True):
        length, size, noise, offset = options[index]
        shape = _DRAWS // _MIXED * int(times)
        # Draws from the prior, corrected by the measurements to draws from the posterior
        # (Matheron's rule).
        curves = size * roots[length] @ random.standard_normal((len(both), shape))
        curves += trends @ random.standard_normal((3, shape))
        chance = noise * scales[:, None] * random.standard_normal((count, shape))
        chance += offset * random.standard_normal((count, shape))[seeds]
        missing = values[:, None] - curves[:count] - chance
        moved = covariance(length, size)[count:] @ cho_solve(
            (factor(*options[index]), True), missing
        )
        draws.append((curves[count:] + moved).T)
    sizes = np.array([noise for _, _, noise, _ in options])
    return np.concatenate(draws), float(np.sqrt((scales**2).mean()) * (weights * sizes).sum())


def _matern(x: FloatArray, length: float) -> FloatArray:
    distance = math.sqrt(5) * np.abs(x[:, None] - x[None]) / length
    return np.asarray((1 + distance + distance**2 / 3) * np.exp(-distance))


# --- the search

Measure = Callable[[Sequence[tuple[float, int]]], Iterable[Trial]]
"""A function that measures values, each with a seed, and returns a trial of each."""


class Search:
    """A search for the best value of an axis, which continues from successful `trials` that are
    added to it.

    At most `budget` lengths are measured, each `repeats` times; with `again`, also once more with
    another seed, which counts again. With `raw` the raw weights are measured as well. `found` is
    the estimate after the latest round, and `stopped` why the search ended.
    """

    found: Estimate
    stopped = "it is still measuring"

    def __init__(
        self,
        axis: Axis,
        *,
        minimize: bool,
        budget: int,
        repeats: int,
        again: bool,
        raw: bool = False,
    ) -> None:
        least = FIRST if axis.values is None else 1  # all values of a list are measured
        reason = f"be at least {least}, the number of lengths that a search begins with"
        check_number("budget", check_count("budget", budget), lambda count: count >= least, reason)
        self.axis, self.trials = axis, list[Trial]()
        self._minimize, self._budget, self._repeats = (
            minimize,
            budget,
            check_count("repeats", repeats),
        )
        self._again, self._raw = again, raw

    @property
    def most(self) -> int:
        """The largest number of trials."""
        return self._repeats * (
            self._raw + (self._budget if self.axis.values is None else len(self.axis.values))
        )

    def rounds(self, measure: Measure) -> Iterator[Estimate]:
        """Measure until the best is known within the noise or the budget is spent; yield the
        estimate of each round."""
        first = first_batch(self.axis)
        pairs = itertools.product([0.0] * self._raw + first, range(self._repeats))
        wanted = [(x, seed) for x, seed in pairs if seed not in self._seeds(x)]
        while True:
            self.trials += measure(wanted)
            self.found = self._estimate(min(3, len(first)))
            wanted = self._next()
            yield self.found
            if not wanted:
                return

    def report(self, metric: str, settings: dict[str, Any], again: str = "") -> SweepReport:
        """Return the report after the latest round; `metric` is the name of what was measured."""
        return SweepReport(
            metric,
            self._minimize,
            tuple(self.trials),
            self.found,
            self.stopped,
            settings=settings,
            again=again,
        )

    def _seeds(self, x: float) -> set[int]:
        return {trial.seed for trial in self.trials if trial.x == x}

    def _next(self) -> list[tuple[float, int]]:
        """Return the values of the next round with seeds; none if the search has ended, for the
        reason in `stopped`."""
        spent = (
            math.ceil(len(self._seeds(x)) / self._repeats)
            for x in {trial.x for trial in self.trials} - {0.0}
        )
        left = self._budget - sum(spent)
        if self.axis.values is not None:
            reason = "all given lengths are measured"
        elif self.found.settled:
            reason = "the best length is known within the noise"
        elif left <= 0:
            reason = "the budget is spent"
        else:
            reason = "nothing is left to measure between the measured lengths"
            failed = {trial.x for trial in self.trials if trial.value is None}
            proposed = next_batch(self.found, self.trials, min(NEXT, left), self._again)
            values = [
                x for x in proposed if x not in failed and (self._again or not self._seeds(x))
            ]
            after = {x: max(self._seeds(x), default=-1) + 1 for x in values}
            if values:
                return [(x, after[x] + index) for x in values for index in range(self._repeats)]
        if (edge := self.found.edge) is not None:
            kind, title = "list" if self.axis.values else "range", self.axis.target(edge).title
            reason += f"; the best lies at the end of the {kind}, {title}, and may lie beyond"
        self.stopped = reason
        return []

    def _estimate(self, least: int) -> Estimate:
        """Estimate the best value, or raise a PostHocError if less than `least` lengths allow
        it."""
        trials = [trial for trial in self.trials if trial.x]
        good = {trial.x: trial.value for trial in trials if trial.value is not None}
        values = {trial.value for trial in trials} - {None}
        if len(good) < least:
            failed = [trial for trial in trials if trial.value is None]
            reason = (
                f"{len(failed)} of {len(trials)} trials have failed, too many to choose; "
                f"the last one: "
            )
            raise PostHocError("the sweep", f"{reason}{failed[-1].target}: {failed[-1].error}")
        if len(values) == 1:
            reason = f"every trial has the same metric, {next(iter(good.values())):.12g}"
            raise PostHocError("the sweep", reason, "does the evaluation use the weights?")
        return estimate(trials, self.axis, self._minimize)


# --- the report


@dataclass(frozen=True, repr=False)
class SweepReport:
    """The result of a sweep: all its trials, the estimate, why the search ended, and the files of
    the best average.

    `settings` are what the trials share; `again` is the command line that repeats the sweep.
    """

    metric: str
    minimize: bool
    trials: tuple[Trial, ...]
    found: Estimate
    stopped: str
    outputs: tuple[Path, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    again: str = ""

    @property
    def best(self) -> Target:
        """The average whose metric is estimated to be best, which was written."""
        return self.found.axis.target(self.found.best)

    def __repr__(self) -> str:
        texts = [f"{name}: {text}" for name, text in answer(self.to_dict()).items()]
        return f"SweepReport({', '.join(texts)})"

    @property
    def raw(self) -> float | None:
        """The mean metric of the raw weights; None if they were not measured."""
        values = [
            trial.value for trial in self.trials if trial.target == RAW and trial.value is not None
        ]
        return sum(values) / len(values) if values else None

    def write(self, folder: str | Path) -> None:
        """Write the report to a folder, for `ema report`; raise a WriteError if that fails."""
        folder = files.expanded(folder)
        files.make_directory(folder)
        files.write_atomically(
            folder / RESULT, f"{json.dumps(self.to_dict(), indent=1)}\n".encode(), overwrite=True
        )

    def to_dict(self) -> dict[str, Any]:
        found = self.found
        curve = zip(found.xs.tolist(), found.curve.tolist(), found.errors.tolist(), strict=True)
        return {
            "metric": self.metric,
            "minimize": self.minimize,
            "axis": found.axis.kind,
            "best": {"target": self.best.title, found.axis.kind: found.best},
            "estimate": found.mean,
            "standard_error": found.standard_error,
            "equal_within_noise": [found.low, found.high],
            "expected_regret": found.regret,
            "noise": found.noise,
            "raw": self.raw,
            "stopped": self.stopped,
            "trials": [vars(trial) for trial in self.trials],
            "curve": [{"x": x, "estimate": y, "standard_error": error} for x, y, error in curve],
            "again": self.again,
            "outputs": list(map(str, self.outputs)),
            "settings": self.settings,
        }


def answer(found: dict[str, Any]) -> dict[str, str]:
    """Return the results of a report's `to_dict` as texts for people."""
    low, high = found["equal_within_noise"]
    trials = found["trials"]
    failed = sum(trial["value"] is None for trial in trials)
    measured = {trial["target"] for trial in trials if trial["value"] is not None} - {RAW}
    return {
        "best": str(found["best"]["target"]),
        "metric": str(found["metric"]),
        "estimate": f"{found['estimate']:.6g} ± {found['standard_error']:.2g}",
        "equal": f"{low:.12g} to {high:.12g}",
        "raw": "not measured" if found["raw"] is None else f"{found['raw']:.6g}",
        "measured": f"{len(measured)} averages in {len(trials)} trials"
        + f", {failed} of which failed" * bool(failed)
        + f"; {found['stopped']}",
    }
