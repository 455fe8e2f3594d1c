"""Find the decay that explains how an average moved between checkpoints of it and of the weights; and its uncertainty.

Let x and e be the weights and the average at one checkpoint, x' and e' those at the next one, d = e - x, v = x' - x and
y = e' - x. If the weights moved on the line from x to x', then

    y = B d + s v + residual,

where B is the mass of e' from before the interval, and s the mean of its tail over the interval. Both follow from how
much the average forgets, which a `Model` says: rate * t for a constant decay, log t times an exponent for a power
function, a sum over the updates for a warm-up. The sums of products of y, d and v over the elements of a piece of a
tensor (Gram matrices) suffice: the best value has the smallest residuals, each weighted by the inverse of its piece's.
A wrong sign of the update is a negative rate, B > 1. Rounding of stored averages adds a known variance to d and y,
which is subtracted.

Weights do not move on lines, and the shorter the average, the more this matters. So this value is only the begin of a
search for the value that explains all checkpoints together, by the covariance of weights and averages at all times.

A path is a sum of responses to independent impulses. The response after the time u is 1 for a random walk,
exp(-u / theta) for noise that decays, and 1 - exp(-u / theta) for motion that builds up, for several theta. Each has
its own variance q in each interval, the walk in each half of an interval. Longer motion shows in the weights alone:
their principal components over the checkpoints, interpolated by splines, are parts of the path too, each with one
variance. For a value of a model the covariance of all weights and averages is then a sum of q times known matrices C_q.

With S the sample covariance and P the inverse of that sum, the most likely variances follow from the iteration
q <- q sqrt(tr(P S P C_q) / tr(P C_q)), and the best value is that of the largest likelihood. In this way a path that is
pulled back between two checkpoints, or continues in one direction, is accounted for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import compress

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from posthoc_cli.errors import NonFiniteError
from posthoc_cli.profiles import POWER, DecayRule, FloatArray, sigma_rel_from_gamma
from posthoc_cli.snapshots.sources import Source, expected_rounding

_MOST_ELEMENTS, _MOST_INDEPENDENT = 100_000, 30_000
"""Largest number of elements in the sample, and of those that count as independent of each other."""

PIECES = 32
"""Smallest number of pieces of tensors in a sample of enough elements."""

_POINTS = 512
"""Largest number of points in an interval at which the tail of the average is computed."""

_NEAR = np.geomspace(0.5, 2, 11)
"""Grid of the later searches, relative to the value of the search before."""

_MOST_GROWTH = 30.0
"""Largest logarithm of the growth of an average whose update has the wrong sign."""

_EVERYTHING = 1000.0
"""-log of the share that remains after a restart, which is 0 in float64."""

_MOST_CHECKPOINTS, _CELLS = 24, 32
"""Largest numbers of checkpoints that are explained together, and of cells between two of them."""

_NOISE, _BUILD_UP = (0.03, 0.3, 1.0, 3.0), (0.03, 0.1, 0.3, 1.0)
"""theta of decaying noise and of motion that builds up, relative to the time between checkpoints."""

_CHECKPOINTS_A_COMPONENT = 5
"""Number of checkpoints for each principal component of the weights in the path."""

_ROUNDS, _SOME_ROUNDS, _FEW_ROUNDS = 300, 100, 25
"""Rounds of the iteration for the variances: to find a value, its uncertainty, and to compare models."""

_STEP = 0.01
"""Difference of logarithms for the second derivative of a likelihood."""

_UNLIKE = 0.01
"""Uncertainty for other kinds of paths, relative to interval / length / sqrt(number of checkpoints)."""

Mask = npt.NDArray[np.bool_]

# --- a sample of all checkpoints


def choose_pieces(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Return the pieces of tensors to read, (name, begin, end): small tensors complete, larger ones in equal shares."""
    names = sorted(name for name in sizes if sizes[name])
    quota, left = _MOST_ELEMENTS, _MOST_ELEMENTS
    for rest, size in zip(range(len(names), 0, -1), sorted(sizes[name] for name in names), strict=True):
        quota = left // rest
        if size > quota:
            break
        left -= size
    parts = -(-PIECES // max(1, len(names)))
    pieces = []
    for name in names:
        each = max(1, min(sizes[name], max(quota, 1)) // parts)
        starts = np.unique(np.linspace(0, sizes[name] - each, min(parts, sizes[name])).astype(np.int64))
        pieces += [(name, int(start), int(start) + each) for start in starts]
    return pieces


def read_series(pairs: Sequence[tuple[Source, Source]], pieces: Sequence[tuple[str, int, int]]) -> Series:
    """Return these pieces of weights and averages of the same times; raise NonFiniteError for nan or infinity."""
    rounding = np.zeros((len(pairs), len(pieces)))
    rows: list[list[FloatArray]] = [[], []]
    for at, pair in enumerate(pairs):
        for source, read in zip(pair, rows, strict=True):
            with source:
                held = [source.values(*piece) for piece in pieces]
            for each, (name, *_) in zip(held, pieces, strict=True):
                if not np.isfinite(each).all():
                    raise NonFiniteError(source.path, f"tensor {name!r}: holds nan or infinity")
            read.append(np.concatenate(held).astype(np.float32))
        dtypes = [source.entries[name].dtype for name, *_ in pieces]
        rounding[at] = [expected_rounding(each, dtype, "F32") for each, dtype in zip(held, dtypes, strict=True)]
    ends = np.cumsum([end - begin for _, begin, end in pieces])[:-1]
    values = np.split(np.array(rows[0] + rows[1]), ends, axis=1)
    return Series(np.array([average.t for _, average in pairs]), values, rounding)


@dataclass
class Series:
    """Elements of the weights and of an average at n times, by piece of a tensor.

    Attributes:
        times: [n].
        values: of each piece, of the weights, then of the averages: [2 n, elements].
        rounding: the squared rounding error of each piece of the averages: [n, pieces].
    """

    times: FloatArray
    values: Sequence[npt.NDArray[np.floating]]
    rounding: FloatArray

    @cached_property
    def intervals(self) -> Intervals:
        """The Gram matrices between successive times, without the variance of rounding in them."""
        grams = []
        for values in self.values:
            x, e = np.split(values.astype(np.float64), 2)
            rows = np.stack([e[1:] - x[:-1], e[:-1] - x[:-1], x[1:] - x[:-1]], axis=1)
            grams.append(rows @ rows.swapaxes(1, 2))
        gram, before, after = np.array(grams).swapaxes(0, 1), self.rounding[:-1], self.rounding[1:]
        gram[..., 0, 0] = np.maximum(gram[..., 0, 0] - after, 0)
        gram[..., 1, 1] = np.maximum(gram[..., 1, 1] - before, 0)
        return Intervals(self.times[:-1], self.times[1:], gram, before + after)

    @property
    def same(self) -> FloatArray:
        """The share of elements of the average that are equal at successive times: [intervals, pieces]."""
        n = len(self.times)
        return np.asarray(np.array([(values[n + 1 :] == values[n:-1]).mean(axis=1) for values in self.values]).T)

    @property
    def copied(self) -> FloatArray:
        """The share of elements of the average that equal the weights: [n, pieces]."""
        return np.asarray(np.array([np.equal(*np.split(values, 2)).mean(axis=1) for values in self.values]).T)

    def covariance(self, pieces: Mask, first: int, last: int) -> tuple[FloatArray, FloatArray]:
        """Return S of the differences to the weights at `first`, and its part from rounding.

        It is over the checkpoints in [first, last). The elements of each piece are divided by their root mean square.
        """
        n, count = len(self.times), last - first
        apart = np.zeros((2 * count - 1, 2 * n))
        rows = [*range(first + 1, last), *range(n + first, n + last)]
        apart[np.arange(2 * count - 1), rows] = 1
        apart[:, first] -= 1
        total, rounding, elements = np.zeros((2 * count - 1,) * 2), np.zeros(2 * n), 0
        for values, errors in compress(zip(self.values, self.rounding.T, strict=True), pieces):
            moved = apart @ values
            gram = moved @ moved.T
            scale = max(float(np.trace(gram)), 1e-300) / moved.shape[1]
            total += gram / scale
            rounding[n:] += errors / scale
            elements += moved.shape[1]
        return total / elements, apart * rounding / elements @ apart.T


@dataclass
class Intervals:
    """Sums of products between checkpoints, by interval and piece: Gram matrices of y, d and v.

    `begin` and `end` are [intervals], `gram` [intervals, pieces, 3, 3], `rounding`, its variance, [intervals, pieces].
    """

    begin: FloatArray
    end: FloatArray
    gram: FloatArray
    rounding: FloatArray
    _times: dict[float, FloatArray] = field(default_factory=dict)

    def __getitem__(self, rows: Sequence[int]) -> Intervals:
        return Intervals(self.begin[rows], self.end[rows], self.gram[rows], self.rounding[rows])

    def of_pieces(self, kept: Mask) -> Intervals:
        """Return the intervals with the pieces in a mask."""
        return Intervals(self.begin, self.end, self.gram[:, kept], self.rounding[:, kept])

    @property
    def scale(self) -> FloatArray:
        """Factors that make each residual at most about 1, also if a piece stands still: [intervals, pieces]."""
        return np.asarray(1 / np.einsum("ipjj->ip", self.gram).clip(1e-300))

    def factors(self, model: Model, value: float) -> tuple[FloatArray, FloatArray]:
        """Return B and s of each interval for a value of a model: [intervals] each.

        The tail is computed at the times of at most `_POINTS` updates in each interval.
        """
        if (times := self._times.get(model.every)) is None:
            begin, length = self.begin[:, None], (self.end - self.begin)[:, None]
            counts = np.maximum(length / model.every, 1) if model.every else np.full(length.shape, _POINTS)
            points = int(min(counts.max(), _POINTS))
            updates = (np.arange(points) + 0.5) * (counts / points) - 0.5
            times = np.hstack([begin + updates * (length / counts), begin, self.end[:, None]])
            self._times[model.every] = times
        forgotten = model.forgotten(value, times.ravel()).reshape(times.shape)
        kept = np.exp(np.minimum(forgotten[:, :-1] - forgotten[:, -1:], _MOST_GROWTH))
        return kept[:, -1], 1 - kept[:, :-1].mean(axis=1)

    def residuals(self, model: Model, value: float) -> FloatArray:
        """Return the squared norms of y - B d - s v, [intervals, pieces]."""
        gram, (b, s) = self.gram, (each[:, None] for each in self.factors(model, value))
        squares = gram[..., 0, 0] + b * b * gram[..., 1, 1] + s * s * gram[..., 2, 2]
        return np.asarray(squares - 2 * (b * gram[..., 0, 1] + s * gram[..., 0, 2] - b * s * gram[..., 1, 2]))


# --- models of an average


@dataclass(frozen=True)
class Model:
    """A family of averages with one free value, which begin again from the weights at each of the `starts`.

    Here it is the rate of a constant decay. `value` is the claimed one, and `every` the time between updates.
    """

    value: float | None = None
    every: float = 1.0
    starts: tuple[float, ...] = (0.0,)
    what = "decay"
    warm_up = ""

    def forgotten(self, value: float, t: FloatArray) -> FloatArray:
        """Return -log of the share that remains of an earlier mass, at each time, up to a constant."""
        starts = np.array(self.starts)
        last = np.maximum(np.searchsorted(starts, t, "right") - 1, 0)
        return np.asarray(self.forgotten_since(value, t - starts[last]) + _EVERYTHING * last)

    def forgotten_since(self, value: float, t: FloatArray) -> FloatArray:
        """Return the same at times since the last start."""
        return value * t

    def length(self, value: float) -> float:
        """Return the time constant."""
        return math.inf if value == 0 else self.every / -math.expm1(-value * self.every)

    def parameter(self, value: float) -> float:
        """Return the decay of one update."""
        return 1 - self.every / self.length(value)

    def grid(self, intervals: Intervals) -> FloatArray:
        """Return the values to try: lengths from 1/100 of the least interval to 100 times the run, of both signs."""
        span = intervals.end[-1] - intervals.begin[0]
        shortest = max(float((intervals.end - intervals.begin).min()) / 100, self.every / 20)
        rates = np.geomspace(0.01 / span, 1 / shortest, 60)
        return np.concatenate((-rates[::-1], [0.0], rates))


@dataclass(frozen=True)
class PowerModel(Model):
    """A power function; the free value is gamma + 1."""

    every: float = 0.0
    what = "sigma_rel"

    def forgotten_since(self, value: float, t: FloatArray) -> FloatArray:
        """Override `Model`."""
        return np.asarray(value * np.log(np.maximum(t, self.every or 1e-300)))

    def length(self, value: float) -> float:
        """Return the sigma_rel."""
        return sigma_rel_from_gamma(value - 1) if value > 1 else 12**-0.5

    parameter = length

    def grid(self, _: Intervals) -> FloatArray:
        """Override `Model`."""
        return np.geomspace(1.0, 2000.0, 60)


@dataclass(frozen=True)
class WarmModel(Model):
    """A decay with a warm-up.

    The free value is the rate after the warm-up. For a claimed decay it is a factor of what each update forgets, k for
    an average that is updated k times a step.
    """

    decay: DecayRule = DecayRule(0.5)  # noqa: RUF009 - it is frozen

    @property
    def warm_up(self) -> str:  # type: ignore[override]
        """The rule, as `ImportSettings.ema_warmup` names it."""
        number = f":{self.decay.power:g}" * (self.decay.warm_up == "power" and self.decay.power != POWER)
        return self.decay.warm_up + number

    def forgotten_since(self, value: float, t: FloatArray) -> FloatArray:
        """Override `Model`."""
        numbers = t / self.every
        most = 1 << int(numbers.max() + 1).bit_length()
        if self.value is not None:
            places, logs, _ = _warming(self.decay, most)
            return np.asarray(value * np.interp(numbers, places, logs))
        places, logs, slowing = _warming(replace(self.decay, decay=1 - 1e-12), most)
        reached = int(np.searchsorted(slowing, -value * self.every))
        rising = np.interp(np.minimum(numbers, reached), places, logs)
        return np.asarray(rising + np.maximum(numbers - reached, 0) * value * self.every)

    def length(self, value: float) -> float:
        """Override `Model`."""
        rate = value if self.value is None else -math.log(self.decay.decay) / self.every * value
        return super().length(rate)

    def grid(self, intervals: Intervals) -> FloatArray:
        """Override `Model`."""
        rates = super().grid(intervals)
        return rates[rates > 0] if self.value is None else rates * self.length(1.0)


@functools.lru_cache(maxsize=8)
def _warming(decay: DecayRule, most: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the numbers of updates from 0, how much each has forgotten in all, and minus what each one forgets."""
    logs = -decay.kept_logs(most)
    return np.arange(most + 1.0), logs, -np.diff(logs)


# --- fits


@dataclass
class Fit:
    """The value of a model with the smallest residuals; `weights` are inverse residuals, [intervals, pieces]."""

    model: Model
    intervals: Intervals

    def __post_init__(self) -> None:
        gram, grid = self.intervals.gram, self.model.grid(self.intervals)
        moved = gram[..., 0, 0] + gram[..., 2, 2]
        least_moved = 1e-20 * moved.max() + 1e-300  # above 0 also for a piece that stands still
        self.weights = 1 / np.maximum(moved, least_moved)
        floor = 1e-4 * gram[..., 2, 2] + least_moved
        self.value = self._best(grid)
        for _ in range(3):
            self.weights = 1 / np.maximum(self._left(), floor)
            self.value = self._best(self.value * _NEAR if self.value > 0 else grid)

    def _left(self) -> FloatArray:
        return np.maximum(self.intervals.residuals(self.model, self.value), 0) + self.intervals.rounding

    def _best(self, grid: FloatArray) -> float:
        """Return the value with the smallest weighted residuals."""
        return argmin(lambda value: self.cost(self.model, value), grid)

    def cost(self, model: Model, value: float) -> float:
        """Return the weighted residuals of a model."""
        return float((self.intervals.residuals(model, value) * self.weights).sum())

    @cached_property
    def misfit(self) -> float:
        """The mean logarithm of the pieces' residuals, summed over the intervals; to compare models."""
        return float(np.log(np.maximum(self._left(), 1e-300)).mean(axis=1).sum())


def argmin(cost: Callable[[float], float], grid: FloatArray) -> float:
    """Return where a function is smallest: on a grid, then between the neighbours."""
    best = int(np.argmin([cost(float(value)) for value in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    return float(minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-5 * (high - low)}).x)


# --- the likelihood of all checkpoints together


class _Paths:
    """The matrices C_q of a model for any value: responses to impulses in cells between the checkpoints."""

    def __init__(self, model: Model, times: FloatArray, covariance: FloatArray, with_motion: bool) -> None:
        self.model, self.times = model, times
        starts = np.append(max(0.0, 2 * times[0] - times[1]), times[:-1])
        counts = np.full(times.size, _CELLS)
        if model.every:
            counts = np.clip((times - starts) / model.every, 1, _CELLS).astype(int)
        cuts = [np.linspace(a, b, m + 1) for a, b, m in zip(starts, times, counts, strict=True)]
        self.edges = np.hstack([[cut[:-1], cut[1:]] for cut in cuts])
        interval = np.repeat(np.arange(times.size), counts)
        half = 2 * interval + np.concatenate([np.arange(m) * 2 // m for m in counts])
        length = self.edges[1] - self.edges[0]
        middle = self.edges.mean(axis=0) + model.every / 2
        within = 0.5 + 0.5 * np.minimum(model.every / length, 1)  # the share of a cell's updates after its impulses
        self.is_past = self.edges[1][:, None] <= times + 1e-9 * times[-1]
        since, until = np.maximum(middle - middle[:, None], 0), np.maximum(times - middle[:, None], 0)
        thetas = np.median(np.diff(times)) * np.array([*_NOISE, *_BUILD_UP * with_motion])
        self.responses, self.size = [], np.sqrt(length / times[-1])[:, None]
        for index, theta in enumerate([np.inf, *thetas]):
            later, same_cell, at = (np.exp(-u / theta) for u in (since, length / 3, until))
            if index > len(_NOISE):
                later, same_cell, at = 1 - later, 1 - same_cell, 1 - at
            at = np.where(self.is_past, at, 0)
            response = (np.triu(later, 1) + np.diag(within * same_cell), at[:, 1:] - at[:, :1], at[:, :1])
            self.responses.append((*response, interval if index else half))
        others, components = times.size - 1, times.size // _CHECKPOINTS_A_COMPONENT * with_motion
        self.principal = np.linalg.eigh(covariance[:others, :others])[1][:, others - components :]
        known = np.vstack([np.zeros(components), self.principal])
        self.motion = CubicSpline(times, known)(middle.clip(max=times[-1]))

    def matrices(self, value: float) -> FloatArray:
        """Return C_q for a value: [variances, 2 n - 1, 2 n - 1]."""
        begin, end, at = (self.model.forgotten(value, t) for t in (*self.edges, self.times))
        after, before = (np.exp(np.minimum(edge[:, None] - at, _MOST_GROWTH)) for edge in (end, begin))
        masses = np.where(self.is_past, after - before, 0)
        local = []
        for within, weights, first, part in self.responses:
            rows = np.hstack([weights, within @ masses - first]) * self.size
            local += [rows[part == index].T @ rows[part == index] for index in np.unique(part)]
        start = np.append(np.zeros(self.times.size - 1), np.exp(np.minimum(at[0] - at, _MOST_GROWTH)))
        lasting = np.vstack([start, np.hstack([self.principal.T, self.motion.T @ masses])])
        return np.concatenate([local, lasting[:, :, None] * lasting[:, None, :]])


def _misfit(matrices: FloatArray, covariance: FloatArray, rounding: FloatArray, rounds: int) -> float:
    """Return -2 / elements of the log likelihood, with the most likely variances after so many rounds from equal ones.

    Rounds that begin with variances for another value are biased towards it: a variance near 0 hardly grows.
    """
    # All matrices are symmetric: one half of each suffices.
    count = len(covariance)
    upper = np.triu_indices(count)
    traces, half = np.trace(matrices, axis1=1, axis2=2), matrices[:, upper[0], upper[1]]
    double = half * np.where(upper[0] == upper[1], 1.0, 2.0)
    size = np.trace(covariance) / count
    known = rounding + 1e-9 * size * np.eye(count)
    variances = np.where(traces > 0, size / 3 / np.maximum(traces, 1e-300), 0.0)
    total = np.empty_like(known)

    def add_up() -> FloatArray:
        total[upper] = total.T[upper] = variances @ half
        return np.asarray(known + total)

    for _ in range(rounds):
        inverse = np.linalg.inv(add_up())
        measured, expected = double @ (inverse @ covariance @ inverse)[upper], double @ inverse[upper]
        variances = variances * np.sqrt(np.maximum(measured, 0) / np.maximum(expected, 1e-300))
    total = add_up()
    return float(np.linalg.slogdet(total)[1] + np.trace(np.linalg.solve(total, covariance)))


def misfit(fit: Fit, series: Series, pieces: Mask, first: int, last: int) -> tuple[float, float]:
    """Return -2 log of a model's likelihood for each element, near the value of a fit, and the best value."""
    cost = _cost(fit, series, pieces, max(first, last - _MOST_CHECKPOINTS), last, rounds=_FEW_ROUNDS)
    found = minimize_scalar(cost, bounds=(-0.7, 0.7), method="bounded", options={"xatol": 0.01})
    return float(found.fun), fit.value * math.exp(found.x)


def refine(fit: Fit, series: Series, pieces: Mask, first: int, last: int) -> tuple[float, float]:
    """Return the value that explains the checkpoints in [first, last) together, and its length's relative uncertainty.

    The uncertainty has four parts: twice that of the likelihood; half the difference to paths without lasting motion;
    half the difference between the earlier and the later half; and `_UNLIKE` for other kinds of paths.
    """
    if fit.value <= 0 or last - first < 3:  # no average has such a value, or one interval shows any
        return fit.value, math.inf
    first = max(first, last - _MOST_CHECKPOINTS)
    cost = _cost(fit, series, pieces, first, last)
    log = _minimize(cost, 1e-4)
    elements = min(sum(values.shape[1] for values in compress(series.values, pieces)), _MOST_INDEPENDENT)
    curvature = elements * (cost(log - _STEP) + cost(log + _STEP) - 2 * cost(log))
    sigma = _STEP * math.sqrt(2 / max(curvature, 1e-9))
    motion = (_minimize(_cost(fit, series, pieces, first, last, with_motion=False, rounds=_SOME_ROUNDS)) - log) / 2
    half, change = (last - first) // 2, 0.0
    if half > 2:
        ranges = (first, last - half), (last - half - 1, last)
        earlier, later = (_minimize(_cost(fit, series, pieces, *some, rounds=_SOME_ROUNDS)) for some in ranges)
        change = (earlier - later) / 2
    value = fit.value * math.exp(log)
    share = 0.0
    if fit.model.what == "decay":
        share = float(np.median(np.diff(series.times[first:last]))) / abs(fit.model.length(value))
    return value, math.hypot(2 * sigma, motion, change, _UNLIKE * share / math.sqrt(last - first))


def _cost(
    fit: Fit, series: Series, pieces: Mask, begin: int, end: int, *, with_motion: bool = True,
    rounds: int = _ROUNDS,
) -> Callable[[float], float]:  # fmt: skip
    """Return the function that gives -2 log of the likelihood for each element, for log(value / value of the fit)."""
    covariance, rounding = series.covariance(pieces, begin, end)
    paths = _Paths(fit.model, series.times[begin:end], covariance, with_motion)

    def cost(log: float) -> float:
        return _misfit(paths.matrices(fit.value * math.exp(log)), covariance, rounding, rounds)

    return cost


def _minimize(cost: Callable[[float], float], exact: float = 1e-2) -> float:
    """Return where a cost is least near 0."""
    bracket = [-0.7, 0.0, 0.7]
    costs = [cost(log) for log in bracket]
    while costs[1] > min(costs) and abs(bracket[1]) < 3:
        direction = int(np.sign(costs[0] - costs[2]))
        bracket = [log + 0.7 * direction for log in bracket]
        costs = [*costs[1:], cost(bracket[2])] if direction > 0 else [cost(bracket[0]), *costs[:2]]
    bounds = bracket[0], bracket[2]
    return float(minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": exact}).x)
