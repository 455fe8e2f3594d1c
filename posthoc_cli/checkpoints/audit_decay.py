"""Find the decay that explains how an average moved between checkpoints of it and of the weights; and its uncertainty.

Let x and e be the weights and the average at one checkpoint, x' and e' those at the next one, d = e - x, v = x' - x and
y = e' - x. If the weights moved on the line from x to x', then

    y = B d + s v + residual,

where B is the mass of e' from before the interval, and s the mean of its tail over the interval. Both follow from how
much the average forgets, which a `Model` says. The sums of products of y, d and v over the elements of a piece of a
tensor (Gram matrices) suffice: the best value has the smallest residuals, each weighted by the inverse of its piece's.
Rounding of stored averages adds a known variance to d and y, which is subtracted.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from posthoc_cli.profiles import POWER, POWER_FUNCTION, DecayRule, FloatArray, sigma_rel_from_gamma

MOST_CHECKPOINTS, _CELLS = 24, 32  # most checkpoints that are explained together, and cells between two of them
_MOST_INDEPENDENT = 30_000  # most elements that count as independent of each other
_POINTS = 512  # most points in an interval at which the tail of the average is computed
_EVERYTHING = 1000.0  # -log of the share that remains after a restart, which is 0 in float64
_NOISE = (0.03, 0.3, 1.0, 3.0)  # theta of decaying noise, relative to the time between checkpoints
_BUILD_UP = (0.03, 0.1, 0.3, 1.0)  # theta of motion that builds up
_CHECKPOINTS_A_COMPONENT = 5  # checkpoints for each principal component of the weights in the path
_ROUNDS, _SOME_ROUNDS, _FEW_ROUNDS = 300, 100, 25  # for the variances: to find a value, its uncertainty, or a rule
_UNEXPLAINED = 1e-6  # least share of variance left: with 1e-9 a path without noise has a singular covariance
_STEP = 0.01  # difference of logarithms for the second derivative of a likelihood
_FEW = 0.04  # uncertainty of checkpoints too few to compare the earlier half with the later one
_UNLIKE = 0.01  # uncertainty for other kinds of paths, relative to interval / length / sqrt(checkpoints)

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Model:
    """A family of averages with one free value, which began from the weights at each of the `starts`.

    The value is the rate of the decay that a warm-up leads to; of a power function it is gamma + 1. Of a claimed decay
    with a warm-up it is a factor of what each update forgets, k for an average that is updated k times a step.
    `claimed` is the claimed value, and `every` the time between updates, 0 if they are many.
    """

    rule: DecayRule = DecayRule(0.5)  # noqa: RUF009 - it is frozen
    claimed: float | None = None
    every: float = 1.0
    starts: tuple[float, ...] = (0.0,)

    @property
    def is_power(self) -> bool:
        """Whether it is a power function."""
        return self.rule.warm_up == POWER_FUNCTION

    @property
    def what(self) -> str:
        """The parameter that names a member."""
        return "sigma_rel" if self.is_power else "decay"

    @property
    def rises(self) -> bool:
        """Whether the decays of the first updates differ from the later ones."""
        return not self.is_power and bool(self.rule.warm_up or self.rule.copies > 1)

    @property
    def _rate(self) -> float:
        """The rate of the value 1."""
        is_factor = self.rises and self.claimed is not None
        return -math.log(self.rule.decay) / self.every if is_factor else 1.0

    @property
    def warm_up(self) -> str:
        """The warm-up, as `ImportSettings.ema_warmup` names it; empty without one."""
        usual = self.rule.warm_up != "power" or self.rule.power == POWER
        return "" if self.is_power else self.rule.warm_up + ("" if usual else f":{self.rule.power:g}")

    def begun(self, *starts: float) -> Model:
        """Return the model with further starts."""
        return replace(self, starts=tuple(sorted({*self.starts, *starts})))

    def forgotten(self, value: float, t: FloatArray) -> FloatArray:
        """Return -log of the share that remains of an earlier mass, at each time, up to a constant."""
        starts = np.array(self.starts)
        last = np.maximum(np.searchsorted(starts, t, "right") - 1, 0)
        return np.asarray(self._forgotten_since(value, t - starts[last]) + _EVERYTHING * last)

    def masses_before(self, value: float, times: FloatArray) -> FloatArray:
        """Return the mass before each time in the averages of all these times: [times, times]."""
        forgotten = self.forgotten(value, times)
        return np.tril(np.exp(np.minimum(forgotten - forgotten[:, None], 0.0)))

    def _forgotten_since(self, value: float, t: FloatArray) -> FloatArray:
        if self.is_power:
            return np.asarray(value * np.log(np.maximum(t, self.every or 1e-300)))
        if not self.rises:
            return value * t
        numbers = t / self.every
        most = 1 << int(numbers.max() + 1).bit_length()
        if self.claimed is not None:
            places, logs, _ = _warming(self.rule, most)
            return np.asarray(value * np.interp(numbers, places, logs))
        places, logs, slowing = _warming(replace(self.rule, decay=1 - 1e-12), most)
        reached = int(np.searchsorted(slowing, -value * self.every))
        rising = np.interp(np.minimum(numbers, reached), places, logs)
        return np.asarray(rising + np.maximum(numbers - reached, 0) * value * self.every)

    def length(self, value: float) -> float:
        """Return the time constant after a warm-up, or the sigma_rel."""
        if self.is_power:
            return sigma_rel_from_gamma(value - 1) if value > 1 else 12**-0.5
        return self.every / -math.expm1(-value * self._rate * self.every) if value else math.inf

    def parameter(self, value: float) -> float:
        """Return the decay of one update after a warm-up, or the sigma_rel."""
        length = self.length(value)
        return length if self.is_power else 1 - self.every / length

    def at_end(self, value: float, end: float) -> tuple[float, bool]:
        """Return the parameter at the end, and whether a warm-up is still below the decay that it leads to."""
        parameter = self.parameter(value)
        if not self.warm_up:
            return parameter, False
        last = math.exp(-float(np.diff(self.forgotten(value, np.array([end - self.every, end])))[0]))
        return min(parameter, last), self.claimed is None and parameter > last + 1e-9

    def grid(self, intervals: Intervals) -> FloatArray:
        """Return the values to try: lengths from 1/100 of the least interval to 100 times the run."""
        if self.is_power:
            return np.geomspace(1.0, 2000.0, 60)
        span = intervals.end[-1] - intervals.begin[0]
        shortest = max(float((intervals.end - intervals.begin).min()) / 100, self.every / 20)
        return np.geomspace(0.01 / span, 1 / shortest, 60) / self._rate


@functools.lru_cache(maxsize=8)
def _warming(rule: DecayRule, most: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the numbers of updates from 0, how much each has forgotten in all, and minus what each one forgets."""
    logs = -rule.kept_logs(most)
    return np.arange(most + 1.0), logs, -np.diff(logs)


# --- the checkpoints, and fits to each interval between them


@dataclass
class Series:
    """Elements of the weights and of an average at n times, by piece of a tensor.

    Attributes:
        times: [n].
        values: of each piece, the weights and the averages: [2, n, elements].
        rounding: the squared rounding error of each piece of the averages: [n, pieces].
    """

    times: FloatArray
    values: Sequence[npt.NDArray[np.floating]]
    rounding: FloatArray

    def intervals(self, pieces: Mask) -> Intervals:
        """Return the Gram matrices between successive times, without the variance of rounding in them."""
        grams = []
        for x, e in (values.astype(np.float64) for values in compress(self.values, pieces)):
            rows = np.stack([e[1:] - x[:-1], e[:-1] - x[:-1], x[1:] - x[:-1]], axis=1)
            grams.append(rows @ rows.swapaxes(1, 2))
        gram = np.array(grams).reshape(-1, len(self.times) - 1, 3, 3).swapaxes(0, 1)
        before, after = self.rounding[:-1, pieces], self.rounding[1:, pieces]
        gram[..., 0, 0] = np.maximum(gram[..., 0, 0] - after, 0)
        gram[..., 1, 1] = np.maximum(gram[..., 1, 1] - before, 0)
        return Intervals(self.times[:-1], self.times[1:], gram, before + after)

    def covariance(self, pieces: Mask, first: int, last: int) -> tuple[FloatArray, FloatArray]:
        """Return S of the differences to the weights at `first`, and its part from rounding.

        It is over the checkpoints in [first, last): of the weights after `first`, then of the averages. The elements of
        each piece are divided by their root mean square.
        """
        total, rounding, elements = np.zeros(()), np.zeros(last - first), 0
        for values, errors in compress(zip(self.values, self.rounding.T, strict=True), pieces):
            x, e = values.astype(np.float64)
            moved = np.concatenate([x[first + 1 : last], e[first:last]]) - x[first]
            gram = moved @ moved.T
            scale = max(float(np.trace(gram)), 1e-300) / moved.shape[1]
            total = total + gram / scale
            rounding += errors[first:last] / scale
            elements += moved.shape[1]
        return total / elements, np.diag(np.append(np.zeros(last - first - 1), rounding / elements))


@dataclass
class Intervals:
    """Sums of products between checkpoints, by interval and piece: Gram matrices of y, d and v.

    `begin` and `end` are [intervals], `gram` [intervals, pieces, 3, 3], `rounding`, its variance, [intervals, pieces].
    """

    begin: FloatArray
    end: FloatArray
    gram: FloatArray
    rounding: FloatArray

    def __getitem__(self, rows: Sequence[int]) -> Intervals:
        return Intervals(self.begin[rows], self.end[rows], self.gram[rows], self.rounding[rows])

    def factors(self, model: Model, value: float) -> tuple[FloatArray, FloatArray]:
        """Return B and s of each interval, [intervals] each; the tail at the times of at most `_POINTS` updates."""
        begin, length = self.begin[:, None], (self.end - self.begin)[:, None]
        counts = np.maximum(length / model.every, 1) if model.every else np.full(length.shape, _POINTS)
        points = int(min(counts.max(), _POINTS))
        updates = (np.arange(points) + 0.5) * (counts / points) - 0.5
        times = np.hstack([begin + updates * (length / counts), begin, self.end[:, None]])
        forgotten = model.forgotten(value, times.ravel()).reshape(times.shape)
        kept = np.exp(np.minimum(forgotten[:, :-1] - forgotten[:, -1:], 0))
        return kept[:, -1], 1 - kept[:, :-1].mean(axis=1)

    def residuals(self, model: Model, value: float) -> FloatArray:
        """Return the squared norms of y - B d - s v, [intervals, pieces]."""
        gram, (b, s) = self.gram, (each[:, None] for each in self.factors(model, value))
        squares = gram[..., 0, 0] + b * b * gram[..., 1, 1] + s * s * gram[..., 2, 2]
        return np.asarray(squares - 2 * (b * gram[..., 0, 1] + s * gram[..., 0, 2] - b * s * gram[..., 1, 2]))

    def shares(self, model: Model, value: float) -> FloatArray:
        """Return the sums of residuals, each divided by that of its piece if nothing is explained: [intervals]."""
        moved = np.einsum("ipjj->ip", self.gram).clip(1e-300)
        return np.asarray((self.residuals(model, value) / moved).sum(axis=1))

    def search(
        self, residuals: Callable[[float], FloatArray], grid: FloatArray, begin: float | None = None
    ) -> tuple[float, FloatArray]:
        """Return the value with the smallest residuals, each weighted by its inverse, and these residuals.

        With `begin` it is the minimum that leads down from there.
        """
        moved = self.gram[..., 0, 0] + self.gram[..., 2, 2]
        least = 1e-20 * moved.max() + 1e-300  # above 0 also for a piece that stands still
        weights = 1 / np.maximum(moved, least)

        def cost(value: float) -> float:
            return float((residuals(value) * weights).sum())

        for _ in range(4):
            value = _argmin(cost, grid, begin)
            begin = None if begin is None else value
            left = np.maximum(residuals(value), 0) + self.rounding
            weights = 1 / np.maximum(left, 1e-4 * self.gram[..., 2, 2] + least)
            near = int(np.searchsorted(grid, value))
            grid = grid[max(near - 6, 0) : near + 6]
        return value, left


def _argmin(cost: Callable[[float], float], grid: FloatArray, begin: float | None) -> float:
    """Return where a function is smallest on a grid, or down from `begin`; then between the neighbours."""
    costs = [cost(float(value)) for value in grid]
    best = int(np.argmin(costs)) if begin is None else int(np.abs(np.log(grid / max(begin, grid[0]))).argmin())
    while begin is not None and costs[best] > min(costs[max(best - 1, 0) : best + 2]):
        best += 1 if best + 1 < len(costs) and costs[best + 1] < costs[best] else -1
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    return float(minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-5 * (high - low)}).x)


class Fit:
    """The value of a model that explains intervals best; `misfit` compares it with other models."""

    def __init__(self, model: Model, intervals: Intervals, begin: float | None = None) -> None:
        self.model, self.intervals, grid = model, intervals, model.grid(intervals)
        self.value, left = intervals.search(lambda value: intervals.residuals(model, value), grid, begin)
        self.misfit = float(np.log(np.maximum(left, 1e-300)).mean(axis=1).sum())


# --- the likelihood of all checkpoints together


class _Likelihood:
    """-2 log of the likelihood of the checkpoints in [first, last) for each element, by log(value / value of a fit)."""

    def __init__(
        self, fit: Fit, series: Series, pieces: Mask, first: int, last: int, rounds: int = _ROUNDS,
        with_motion: bool = True,
    ) -> None:  # fmt: skip
        """Compute the responses to impulses in cells between the checkpoints."""
        self.fit, self.rounds, self.times = fit, rounds, series.times[first:last]
        self.covariance, self.rounding = series.covariance(pieces, first, last)
        times, every = self.times, fit.model.every
        starts = np.append(max(0.0, 2 * times[0] - times[1]), times[:-1])
        counts = np.full(times.size, _CELLS)
        if every:
            counts = np.clip((times - starts) / every, 1, _CELLS).astype(int)
        cuts = [np.linspace(a, b, m + 1) for a, b, m in zip(starts, times, counts, strict=True)]
        self.edges = np.hstack([[cut[:-1], cut[1:]] for cut in cuts])
        interval = np.repeat(np.arange(times.size), counts)
        half = 2 * interval + np.concatenate([np.arange(m) * 2 // m for m in counts])
        length = self.edges[1] - self.edges[0]
        middle = self.edges.mean(axis=0) + every / 2
        within = 0.5 + 0.5 * np.minimum(every / length, 1)  # the share of a cell's updates after its impulses
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
        self.principal = np.linalg.eigh(self.covariance[:others, :others])[1][:, others - components :]
        known = np.vstack([np.zeros(components), self.principal])
        self.motion = CubicSpline(times, known)(middle.clip(max=times[-1]))

    def _matrices(self, value: float) -> FloatArray:
        """Return C_q for a value: [variances, 2 n - 1, 2 n - 1]."""
        begin, end, at = (self.fit.model.forgotten(value, t) for t in (*self.edges, self.times))
        after, before = (np.exp(np.minimum(edge[:, None] - at, 0)) for edge in (end, begin))
        masses = np.where(self.is_past, after - before, 0)
        local = []
        for within, weights, first, part in self.responses:
            rows = np.hstack([weights, within @ masses - first]) * self.size
            local += [rows[part == index].T @ rows[part == index] for index in np.unique(part)]
        start = np.append(np.zeros(self.times.size - 1), np.exp(np.minimum(at[0] - at, 0)))
        lasting = np.vstack([start, np.hstack([self.principal.T, self.motion.T @ masses])])
        return np.concatenate([local, lasting[:, :, None] * lasting[:, None, :]])

    def __call__(self, log: float) -> float:
        """Find the most likely variances, from equal ones.

        Rounds that begin with variances for another value are biased towards it: a variance near 0 hardly grows.
        """
        matrices, covariance = self._matrices(self.fit.value * math.exp(log)), self.covariance
        # All matrices are symmetric: one half of each suffices.
        upper = np.triu_indices(len(covariance))
        traces, half = np.trace(matrices, axis1=1, axis2=2), matrices[:, upper[0], upper[1]]
        double = half * np.where(upper[0] == upper[1], 1.0, 2.0)
        size = np.trace(covariance) / len(covariance)
        known = self.rounding + _UNEXPLAINED * size * np.eye(len(covariance))
        variances = np.where(traces > 0, size / 3 / np.maximum(traces, 1e-300), 0.0)
        total = np.empty_like(known)

        def add_up() -> FloatArray:
            total[upper] = total.T[upper] = variances @ half
            return np.asarray(known + total)

        for _ in range(self.rounds):
            inverse = np.linalg.inv(add_up())
            measured, expected = double @ (inverse @ covariance @ inverse)[upper], double @ inverse[upper]
            variances = variances * np.sqrt(np.maximum(measured, 0) / np.maximum(expected, 1e-300))
        total = add_up()
        return float(np.linalg.slogdet(total)[1] + np.trace(np.linalg.solve(total, covariance)))

    def least(self, exact: float = 1e-2) -> tuple[float, float]:
        """Return where it is least near 0, and how large it is there."""
        bracket = [-0.7, 0.0, 0.7]
        costs = [self(log) for log in bracket]
        while costs[1] > min(costs) and abs(bracket[1]) < 3:
            direction = int(np.sign(costs[0] - costs[2]))
            bracket = [log + 0.7 * direction for log in bracket]
            costs = [*costs[1:], self(bracket[2])] if direction > 0 else [self(bracket[0]), *costs[:2]]
        found = minimize_scalar(self, bounds=(bracket[0], bracket[2]), method="bounded", options={"xatol": exact})
        return float(found.x), float(found.fun)


def likelihood(fit: Fit, series: Series, pieces: Mask, first: int, last: int) -> tuple[float, float]:
    """Return the value near that of a fit with the largest likelihood, and -2 log of that for each element."""
    log, cost = _Likelihood(fit, series, pieces, first, last, _FEW_ROUNDS).least()
    return fit.value * math.exp(log), cost


def refine(fit: Fit, series: Series, pieces: Mask, first: int, last: int) -> tuple[float, float]:
    """Return the value that explains the checkpoints in [first, last) together, and its length's relative uncertainty.

    The uncertainty has four parts: twice that of the likelihood; half the difference to paths without lasting motion;
    half the difference between the earlier and the later half; and `_UNLIKE` for other kinds of paths.
    """
    if last - first < 3:  # one interval shows none
        return fit.value, math.inf

    def roughly(first: int, last: int, with_motion: bool = True) -> float:
        return _Likelihood(fit, series, pieces, first, last, _SOME_ROUNDS, with_motion).least()[0]

    cost = _Likelihood(fit, series, pieces, first, last)
    log, _ = cost.least(1e-4)
    value = fit.value * math.exp(log)
    elements = min(sum(values.shape[2] for values in compress(series.values, pieces)), _MOST_INDEPENDENT)
    curvature = elements * (cost(log - _STEP) + cost(log + _STEP) - 2 * cost(log))
    parts = [2 * _STEP * math.sqrt(2 / max(curvature, 1e-9)), (roughly(first, last, with_motion=False) - log) / 2]
    half = (last - first) // 2
    parts.append((roughly(first, last - half) - roughly(last - half - 1, last)) / 2 if half > 2 else _FEW)
    if not fit.model.is_power:
        share = float(np.median(np.diff(series.times[first:last]))) / fit.model.length(value)
        parts.append(_UNLIKE * share / math.sqrt(last - first))
    return value, math.hypot(*parts)
