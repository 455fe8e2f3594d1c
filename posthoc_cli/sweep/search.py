"""The search for the best sigma_rel: where to measure next, and the estimate from noisy
measurements.

Lengths are compared by their place, the logarithm of sigma_rel. The trials are the only state of a
search: what to measure next follows from them alone, so that a search continues from a record of
them. It measures a grid of lengths, then the one where a quadratic through the best ones is lowest,
then the best once more, and, if that has another metric, its neighbours. A list is measured as it
is, without additions.

Of lengths that have exactly the same metric, the nearest to UNTUNED is the best one. If all have,
this one is measured, too.

If the longest length is the best one, the training may have gone on for too long: the search then
measures averages of this length that end earlier. An average that is later and longer holds about
what an earlier and shorter one does, so that this line finds the best pair of end and length.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from scipy.special import stdtrit

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import FloatArray, check_sigma_rel, round_sigma_rel, sigma_rel_from_decay
from posthoc_cli.snapshots.decoding import ANY_SIGN
from posthoc_cli.targets import Beta, SigmaRel, bad, parse_numbers

LEAST_BUDGET = 4  # a quadratic needs three lengths, and a fourth to show noise
USUAL_BUDGET = 12  # lengths of the grid: with it 94 % of choices are within the noise of the best
WINDOW = 2.5
"""Distance to which lengths count in the quadratic at one of them, in steps of the grid. From 2.1
to 4 it hardly matters: 91 to 94 % (both from scripts/bench_sweep.py)."""
_WIDE = 0.75
_SAME = 0.1
"""Distances in steps of the grid: between lengths with a gap to measure in, and below which two are
the same."""
_EARLIER = (
    0.8  # ratio of one end to the one before it, which hardly matters: scripts/overfitting.py
)
_MOST_WORSE = 2  # ends in a row that are worse than the best one, after which the search has ended
UNTUNED = 0.05  # the sigma_rel to take without a search, see the guide `gain`
LARGEST = 1e100  # the largest magnitude of a metric: sums of squares are finite
_FEWEST_FITTED = 6
"""The number of lengths from which on the quadratic at the best one, and not its measured mean, is
taken for its metric: the best of many is measured too good, and of few the quadratic is wide."""
_FAR = 12.0
"""The largest distance of a metric above the upper quartile, in distances of the quartile from the
second best metric. Larger ones are lowered: they only show that a length is bad."""


@dataclass(frozen=True)
class Lengths:
    """The sigma_rels to search: a range, or a list that is measured as it is."""

    low: float
    high: float
    listed: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for sigma_rel in (self.low, self.high, *self.listed):
            check_sigma_rel(sigma_rel)
        if not self.low < self.high:
            ends = f"{self.low:g}:{self.high:g}"
            raise InvalidValueError("sigma_rel", "the first must be below the second", value=ends)

    @classmethod
    def from_list(cls, sigma_rels: Sequence[float]) -> Lengths:
        listed = tuple(sorted({*sigma_rels}))
        if len(listed) < 2:
            raise InvalidValueError("sigma_rel", "give at least two lengths", value=list(listed))
        return cls(listed[0], listed[-1], listed)

    @classmethod
    def parse(cls, text: str, name: str, steps: float | None = None) -> Lengths:
        """Parse a range LOW:HIGH or a list of sigma_rels, or, with a number of `steps`, of decays,
        each for the sigma_rel that is as long; an InvalidValueError about `name`
        says what is accepted."""
        is_range = text.count(":") == 1 and "," not in text
        numbers = text.replace(":", ",") if is_range else text
        example = "0.02:0.28" if steps is None else "0.99:0.9999"
        try:
            sigma_rels = parse_numbers(
                numbers, name, f"a range LOW:HIGH, such as {example}, or a list"
            )
            if steps is not None:
                sigma_rels = [sigma_rel_for_decay(decay, steps) for decay in sigma_rels]
            if is_range:
                return cls(sigma_rels[0], sigma_rels[-1])
            return cls.from_list(sigma_rels)
        except InvalidValueError as error:
            raise bad(name, text, error.reason, error.hint) from error

    def __contains__(self, sigma_rel: float) -> bool:
        if self.listed:
            return sigma_rel in self.listed
        return self.low <= sigma_rel <= self.high

    def grid(self, budget: int) -> list[float]:
        """List the given lengths, or `budget` lengths of the range, evenly in their logarithm."""
        if self.listed:
            return list(self.listed)
        inner = np.geomspace(self.low, self.high, budget)[1:-1].tolist()
        return list(dict.fromkeys([self.low, *map(self.round, inner), self.high]))

    def round(self, sigma_rel: float) -> float:
        """Round to three digits, more in a narrow range, within the range."""
        width = math.log(self.high / self.low)
        digits = max(3, 2 - math.floor(math.log10(width)))
        return min(max(float(f"{sigma_rel:.{digits}g}"), self.low), self.high)

    def step(self, budget: int) -> float:
        """Compute the mean distance between the places of the grid."""
        return math.log(self.high / self.low) / (len(self.grid(budget)) - 1)


def sigma_rel_for_decay(decay: float, steps: float) -> float:
    """Find the sigma_rel that is as long as a decay after this number of steps, to four digits."""
    sigma_rel = sigma_rel_from_decay(Beta(decay).beta, steps)
    if sigma_rel is None:
        most = 1 - 2 / steps
        reason = f"is longer than the uniform average of {steps:,.12g} steps; must be below "
        raise InvalidValueError("decay", f"{reason}{most:.6g}", value=f"{decay:g}")
    return round_sigma_rel(sigma_rel, 4)


RANDOM_WEIGHTS = "random weights"
"""The target of trials that show whether an evaluation uses the weights, where all others have the
same metric."""


@dataclass(frozen=True)
class Trial:
    """One measurement of a metric; or images without a metric."""

    target: str  # the title of what was measured, such as `sigma_rel 0.15` or `last weights`
    sigma_rel: float | None  # None for weights that are compared with averages
    seed: int  # as given to the command
    # the metric, at most LARGEST; None without a metric, and of a failed trial
    value: Annotated[float, ANY_SIGN] | None = None
    standard_error: float | None = None
    predicted_error: float | None = None  # of the weights; None if unknown
    lost_gain: float | None = None  # by this error, at most
    seconds: float = 0.0  # of the evaluation alone
    error: str | None = None  # why it failed
    t: float | None = None  # where an average ends that ends earlier than the others

    @property
    def name(self) -> str:
        """The name of its logs and of the folder of its images."""
        return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{self.target}-seed-{self.seed}")

    @property
    def is_random(self) -> bool:
        return self.target == RANDOM_WEIGHTS


def average_title(sigma_rel: float, end: float | None = None) -> str:
    """Name an average by its length, and by where it ends if it ends earlier than the others."""
    title = SigmaRel(sigma_rel).title
    return title if end is None else f"{title} at t = {end:,.12g}"


def common_metric(trials: Iterable[Trial]) -> float | None:
    """Find the metric that all successful trials have, at least two, but for random weights."""
    values = []
    for trial in trials:
        if trial.value is not None and not trial.is_random:
            values.append(trial.value)
    is_common = len(values) > 1 and len({*values}) == 1
    return values[0] if is_common else None


class Measured(NamedTuple):
    """The successful trials of averages, by length or by end, shape [points]."""

    points: FloatArray
    means: FloatArray
    counts: FloatArray
    # sum of the squared deviations of repeated measurements from their mean
    scatter: float
    # the median standard error that trials state; nan if one states none
    stated: float


def gather(trials: Iterable[tuple[float, Trial]]) -> Measured:
    """Combine the successful trials of each point."""
    values: dict[float, list[float]] = {}
    stated = []
    for point, trial in trials:
        if trial.value is not None:
            values.setdefault(point, []).append(trial.value)
            stated.append(trial.standard_error or math.nan)
    points = sorted(values)
    scatter = 0.0
    for measured in values.values():
        scatter += float(np.var(measured)) * len(measured)
    return Measured(
        np.array(points),
        np.array([np.mean(values[point]) for point in points]),
        np.array([float(len(values[point])) for point in points]),
        scatter,
        float(np.median(stated)) if stated else math.nan,
    )


@dataclass(frozen=True)
class Estimate:
    """The metric of each measured point, a length or an end, where near ones and repetitions are
    averaged.

    Attributes:
        points: the measured lengths or ends, in ascending order.
        means: the estimated metrics; as measured if the metric has no noise.
        errors: their standard errors; nan if the noise is unknown.
        noise: the standard deviation of one measurement; 0 if a repetition had the same metric;
            nan if too few measurements show it.
        best: the point with the best estimate.
        tied: the first and the last of the points around it that are not significantly worse; None
            if the noise is unknown, or if it is 0 and the next points are worse.
        shown: which points are not so bad that their metrics were lowered.
        vertex: the place where the quadratic at the best point is lowest, at most a step away.
        value: the estimated metric of the best point, of few points its measured mean.
        error: its standard error; nan if the noise is unknown.
        freedom: the degrees of freedom of the noise; infinite if only trials state it.
        stated: the standard error that trials state; nan if one states none.
    """

    points: FloatArray
    means: FloatArray
    errors: FloatArray
    noise: float
    best: float
    tied: tuple[float, float] | None
    shown: FloatArray
    vertex: float
    value: float
    error: float
    freedom: float
    stated: float

    def margin(self, count: int) -> float:
        """Compute half the width of the 95 % interval of the difference between the best point's
        metric and the mean of `count` measurements of other weights; nan if unknown.

        Repetitions show only the noise that is drawn anew. The error that trials state is also that
        of the examples, which all may share. It is then common to a part, and twice the error of
        one mean bounds the error of the difference.
        """
        if self.noise == 0:
            return 2 * self.stated
        error = math.hypot(self.error, self.noise / math.sqrt(count))
        return float(np.fmax(stdtrit(self.freedom, 0.975) * error, 2 * self.stated))


def estimate(trials: Sequence[Trial], step: float, minimize: bool) -> Estimate:
    """Estimate the metric at each measured length, `step` apart in the grid; the noise follows from
    residuals and repetitions."""
    lengths = []
    for trial in trials:
        if trial.sigma_rel is not None and trial.t is None:
            lengths.append((trial.sigma_rel, trial))
    return _smooth(gather(lengths), step, minimize, UNTUNED)


def estimate_ends(
    trials: Sequence[Trial],
    found: Estimate,
    t: float,
    minimize: bool,
) -> Estimate:
    """Estimate the metric at each measured end of the best length of a search; the noise is as
    `found` among all lengths, which end at `t`."""
    ends = []
    for trial in trials:
        if trial.sigma_rel == found.best:
            ends.append((t if trial.t is None else trial.t, trial))
    known_noise = (found.noise, found.freedom)
    return _smooth(gather(ends), -math.log(_EARLIER), minimize, t, known_noise)


def _smooth(
    measured: Measured,
    step: float,
    minimize: bool,
    usual: float,
    known_noise: tuple[float, float] | None = None,
) -> Estimate:
    """Estimate the metric at each measured point from a quadratic at each, with the weights of
    Cleveland (1979) to WINDOW steps.

    Of points that are equally good the nearest to the `usual` one is the best. The estimates are
    linear in the measurements, so that their standard errors follow from the noise and its degrees
    of freedom.
    """
    sign = 1.0 if minimize else -1.0
    values = lower_far_values(sign * measured.means)
    places = np.log(measured.points)
    fits = fit_quadratics(places, measured.counts, WINDOW * step)
    smoother = fits[0]
    is_exact = measured.counts.max() > 1 and measured.scatter == 0
    if known_noise is not None:
        is_exact = known_noise[0] == 0
    if is_exact or values.min() == values.max():  # else sums would round equal ones differently
        smoother = np.eye(len(places))
    smooth = smoother @ values
    noise = 0.0
    freedom = math.inf
    if not is_exact:
        noise, freedom = known_noise or estimate_noise(measured, smoother, values - smooth)
    distances = np.where(smooth == smooth.min(), abs(places - math.log(usual)), math.inf)
    best = int(distances.argmin())
    differences = smoother - smoother[best]
    means = sign * smooth
    errors = noise * spread(smoother, measured.counts)
    value = float(means[best])
    error = float(errors[best])
    if len(places) < _FEWEST_FITTED:
        value = float(measured.means[best])
        error = noise / math.sqrt(measured.counts[best])
    return Estimate(
        measured.points,
        means,
        errors,
        noise,
        float(measured.points[best]),
        tied_range(measured.points, smooth, best, noise * spread(differences, measured.counts)),
        values == sign * measured.means,
        places[best] + vertex_offset(fits[:, best] @ values, step),
        value,
        error,
        freedom,
        measured.stated,
    )


def fit_quadratics(places: FloatArray, counts: FloatArray, window: float) -> FloatArray:
    """Fit what gives value, slope and curvature of the local quadratic at each place, from all
    values: shape [3, places, values]."""
    fits = []
    for place in places:
        offsets = places - place
        distances = np.minimum(abs(offsets) / window, 1.0)
        roots = np.sqrt(counts * (1 - distances**3) ** 3)
        powers = np.vander(offsets, 3, increasing=True)
        fits.append(np.linalg.pinv(roots[:, None] * powers) * roots)
    return np.stack(fits, axis=1)


def vertex_offset(coefficients: FloatArray, step: float) -> float:
    """Find the offset at which a quadratic is lowest, at most a step."""
    _, slope, curvature = coefficients.tolist()
    if curvature <= 0:
        return -math.copysign(step, slope)
    return float(min(max(-slope / (2 * curvature), -step), step))


def spread(rows: FloatArray, counts: FloatArray) -> FloatArray:
    """Compute the standard deviation of sums of means of so many measurements with a noise of 1."""
    return np.asarray(np.sqrt((rows**2 / counts).sum(axis=1)))


def estimate_noise(
    measured: Measured,
    smoother: FloatArray,
    residuals: FloatArray,
) -> tuple[float, float]:
    """Estimate the standard deviation of a measurement, at most what trials state, and its degrees
    of freedom; nan if there are too few."""
    counts = measured.counts
    # the expectation of the sum below for a noise of 1
    freedom = counts @ spread(np.eye(len(counts)) - smoother, counts) ** 2
    freedom += (counts - 1).sum()
    if freedom < 1:
        return measured.stated, math.inf
    squares = counts @ residuals**2 + measured.scatter
    noise = np.fmin(math.sqrt(squares / freedom), measured.stated)
    return float(noise), float(freedom)


def tied_range(
    points: FloatArray,
    smooth: FloatArray,
    best: int,
    errors: FloatArray,
) -> tuple[float, float] | None:
    """Find the first and the last of the points around the best one whose difference from it is
    within two standard errors of the difference; None without errors if only the best one is."""
    if np.isnan(errors).any():
        return None
    is_worse = smooth - smooth[best] > 2 * errors
    worse = np.flatnonzero(is_worse)
    first = worse[worse < best].max(initial=-1) + 1
    last = worse[worse > best].min(initial=len(smooth)) - 1
    if first == last and not errors.any():
        return None
    return float(points[first]), float(points[last])


def lower_far_values(values: FloatArray) -> FloatArray:
    """Lower the values that are far above most, where lower is better."""
    if len(values) < 4:
        return values
    upper = float(np.quantile(values, 0.75))
    reach = upper - np.sort(values)[1]
    if reach <= 0:
        return values
    return np.asarray(np.minimum(values, upper + _FAR * reach))


def next_measurements(
    trials: Sequence[Trial],
    lengths: Lengths,
    budget: int,
    minimize: bool | None,
) -> list[tuple[float, int]]:
    """Choose the lengths to measure next, each with its seed; none if the search has ended.

    Without a direction, `minimize` None, only the grid is measured. Residuals of a quadratic would
    be taken for noise of a metric that has none: of a list with residuals the best is repeated.
    """
    tried = {(trial.sigma_rel, trial.seed) for trial in trials if trial.t is None}
    missing = []
    for sigma_rel in lengths.grid(budget):
        if (sigma_rel, 0) not in tried:
            missing.append((sigma_rel, 0))
    if missing or minimize is None:
        return missing
    step = lengths.step(budget)
    found = estimate(trials, step, minimize)
    if lengths.listed and math.isnan(found.noise):
        return []  # few lengths: the best is as measured
    between = lengths.round(math.exp(found.vertex))
    is_useful = is_in_gap(found, step)
    if found.means.min() == found.means.max():
        between = UNTUNED
        is_useful = UNTUNED in lengths
    if not lengths.listed and (between, 0) not in tried and is_useful:
        return [(between, 0)]
    repeated = [sigma_rel for sigma_rel, seed in tried if seed and sigma_rel is not None]
    if not repeated:
        return [(found.best, 1)]
    if found.noise == 0 or len(repeated) > 1:
        return []
    place = int(abs(found.points - repeated[0]).argmin())
    neighbours = found.points[max(0, place - 1) : place + 2].tolist()
    return [(sigma_rel, 1) for sigma_rel in neighbours if (sigma_rel, 1) not in tried]


def earlier_ends(times: Iterable[float], t: float) -> list[float]:
    """List the stored times that are nearest to 0.8, 0.64, ... of `t`, the latest first; each has
    another stored time before it, since an average of one is none."""
    _, *usable = sorted({*times})
    ends = []
    end = _EARLIER * t
    while usable and end > _EARLIER * usable[0]:
        ends.append(min(usable, key=lambda time: abs(time - end)))
        end *= _EARLIER
    return [time for time in dict.fromkeys(ends) if time < t]


def next_ends(
    trials: Sequence[Trial],
    found: Estimate,
    ends: Sequence[float],
    t: float,
    minimize: bool,
) -> list[tuple[float, int]]:
    """Choose the earlier `ends` at which to measure the best length of a search next, each with its
    seed; none if it has ended.

    It ends when two in a row are worse than the best one. Where the metric is noisy, that one is
    measured once more: the best of some is measured too good.
    """
    tried = {(trial.t, trial.seed) for trial in trials}
    estimated = estimate_ends(trials, found, t, minimize)
    means = _measured_means(trials, found.best, minimize)
    best = means[None]
    worse = 0
    for index, end in enumerate(ends):
        if (end, 0) not in tried:
            return [(time, 0) for time in ends[index : index + _MOST_WORSE - worse]]
        mean = means.get(end, math.inf)
        worse = 0 if mean < best else worse + 1
        best = min(best, mean)
        if worse == _MOST_WORSE:
            break
    if estimated.best < t and estimated.noise != 0 and (estimated.best, 1) not in tried:
        return [(estimated.best, 1)]
    return []


def _measured_means(
    trials: Sequence[Trial], sigma_rel: float, minimize: bool
) -> dict[float | None, float]:
    """Average the metrics of a length at each end, by `Trial.t`, so that lower is better."""
    values: dict[float | None, list[float]] = {}
    for trial in trials:
        if trial.sigma_rel == sigma_rel and trial.value is not None:
            values.setdefault(trial.t, []).append(trial.value)
    sign = 1 if minimize else -1
    return {end: sign * sum(measured) / len(measured) for end, measured in values.items()}


def is_in_gap(found: Estimate, step: float) -> bool:
    """Return whether the vertex lies between lengths that are about a step apart, and near
    neither."""
    offsets = np.log(found.points) - found.vertex
    below = -offsets[offsets <= 0].max(initial=-math.inf)
    above = offsets[offsets > 0].min(initial=math.inf)
    return bool(min(below, above) > _SAME * step and below + above > _WIDE * step)
