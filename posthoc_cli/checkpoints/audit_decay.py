"""Find the decay that explains how an average moved between checkpoints of it and of the weights;
and its uncertainty.

Let x and e be the weights and the average at one checkpoint, x' and e' those at the next one, d = e
- x, v = x' - x and y = e' - x. If the weights moved on the line from x to x', then

    y = B d + s v + residual,

where B is the mass of e' from before the interval, and s the mean of its tail over the interval.
Both follow from how much the average forgets, which a `Model` says. The sums of products of y, d
and v over the elements of a piece of a tensor (Gram matrices) suffice: the best value has the
smallest residuals, each weighted by the inverse of its piece's. Rounding of stored averages adds a
known variance to d and y, which is subtracted.

Weights do not move on lines, and the shorter the average, the more this matters. So this value is
only the begin of a search for the value that explains all checkpoints together, by the covariance
of weights and averages at all times.

A path is a sum of responses to independent impulses. The response after the time u is 1 for a
random walk, exp(-u / theta) for noise that decays, and 1 - exp(-u / theta) for motion that builds
up, for several theta. Each has its own variance q in each interval, the walk in each half of an
interval. Longer motion shows in the weights alone: their principal components over the checkpoints,
interpolated by splines, are parts of the path too, each with one variance. For a value of a model
the covariance of all weights and averages is then a sum of q times known matrices C_q.

With S the sample covariance and P the inverse of that sum, the most likely variances follow from
the iteration q <- q sqrt(tr(P S P C_q) / tr(P C_q)), and the best value is that of the largest
likelihood. In this way a path that is pulled back between two checkpoints, or continues in one
direction, is accounted for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from posthoc_cli.checkpoints.settings import warm_up_text
from posthoc_cli.profiles import (
    POWER_FUNCTION,
    RAMP_UP,
    UNLIMITED,
    DecayRule,
    FloatArray,
    sigma_rel_from_gamma,
)

_CELLS = 32  # most cells between two checkpoints
_MOST_INDEPENDENT = 30_000  # most elements that count as independent of each other
_POINTS = 512  # most points in an interval at which the tail of the average is computed
_EVERYTHING = 1000.0  # -log of the share that remains after a restart, which is 0 in float64
_NOISE = (0.03, 0.3, 1.0, 3.0)  # theta of decaying noise, relative to the time between checkpoints
_BUILD_UP = (0.03, 0.1, 0.3, 1.0)  # theta of motion that builds up
_CHECKPOINTS_A_COMPONENT = 5  # checkpoints for each principal component of the weights in the path
# for the variances: to find a value, its uncertainty, or a rule
_ROUNDS, _SOME_ROUNDS, _FEW_ROUNDS = (300, 100, 25)
# least share of variance left: with 1e-9 a path without noise has a singular covariance
_UNEXPLAINED = 1e-6
_STEP = 0.01  # difference of logarithms for the second derivative of a likelihood
_FEW = 0.04  # uncertainty of checkpoints too few to compare the earlier half with the later one
# uncertainty for other kinds of paths, relative to interval / length / sqrt(checkpoints)
_UNLIKE = 0.01
# rules with log residuals, summed over the intervals, above the least ones by this are not compared
# further
_FAR = 3.0
# rules explain files about equally if -2 log of their likelihoods for each element differ by less
_ALIKE = 0.05
# rules are the same if their tails differ by less, as much as those of lengths that differ by 5 %
_SAME = 0.02

CONSTANT = DecayRule(UNLIMITED)
_RULES = (
    CONSTANT,
    DecayRule(UNLIMITED, "ratio"),
    DecayRule(UNLIMITED, "power"),
    DecayRule(UNLIMITED, "power", power=0.75),
    DecayRule(UNLIMITED, "ramp-up", power=RAMP_UP),
    DecayRule(UNLIMITED, POWER_FUNCTION),
)
"""A constant decay, the warm-ups that libraries have, and the power function."""


@dataclass(frozen=True)
class Model:
    """An average whose updates follow a rule, and which began from the weights at each of the
    `starts`."""

    rule: DecayRule = CONSTANT
    claimed: float | None = None  # the claimed value
    # What it forgets in a unit of time after a warm-up, or gamma + 1 of a power function. Of a
    # claimed decay with a warm-up a factor of what each update forgets: k for an average that is
    # updated k times a step.
    value: float = 1.0
    every: float = 1.0  # time between updates, 0 if they are many
    starts: tuple[float, ...] = (0.0,)

    @property
    def is_power(self) -> bool:
        return self.rule.warm_up == POWER_FUNCTION

    @property
    def rises(self) -> bool:
        """Whether first updates forget more than later ones; one copy alone is no more than a
        start."""
        return not self.is_power and bool(self.rule.warm_up or self.rule.copies > 1)

    @property
    def warm_up(self) -> str:
        """The warm-up, as `ImportSettings.ema_warmup` names it; empty without one."""
        text = warm_up_text(self.rule)
        return "" if text == "none" else text

    @property
    def unit(self) -> float:
        """What the value 1 forgets in a unit of time after a warm-up."""
        is_factor = self.rises and self.claimed is not None
        return -math.log(self.rule.decay) / self.every if is_factor else 1.0

    @property
    def length(self) -> float:
        """The time constant after a warm-up, or the sigma_rel."""
        if self.is_power:
            # gamma 0 is that of the longest one
            return sigma_rel_from_gamma(max(self.value - 1, 1e-300))
        return self.every / -math.expm1(-self.value * self.unit * self.every)

    @property
    def parameter(self) -> float:
        """The decay of one update after a warm-up, or the sigma_rel."""
        return self.length if self.is_power else 1 - self.every / self.length

    def parameter_at(self, t: float) -> float:
        """Return the decay of the update at a time, or the sigma_rel."""
        before, after = self.forgotten(np.array([t - self.every, t])).tolist()
        return self.length if self.is_power else math.exp(before - after)

    def scaled(self, log: float) -> Model:
        return replace(self, value=self.value * math.exp(log))

    def begun(self, *starts: float) -> Model:
        return replace(self, starts=tuple(sorted({*self.starts, *starts})))

    def forgotten(self, t: FloatArray) -> FloatArray:
        """Return -log of the share that remains of an earlier mass, at each time, up to a
        constant."""
        starts = np.array(self.starts)
        last = np.maximum(np.searchsorted(starts, t, "right") - 1, 0)
        before, since = _EVERYTHING * last, t - starts[last]
        if self.is_power:
            return np.asarray(before + self.value * np.log(np.maximum(since, self.every or 1e-300)))
        if not self.rises:
            return np.asarray(before + self.value * since)
        numbers = since / self.every
        places, logs, slowing = _warming(self.rule, 1 << int(numbers.max() + 1).bit_length())
        if self.claimed is not None:
            return np.asarray(before + self.value * np.interp(numbers, places, logs))
        limit = self.value * self.every
        reached = int(np.searchsorted(slowing, -limit))
        rising = np.interp(np.minimum(numbers, reached), places, logs)
        return np.asarray(before + rising + np.maximum(numbers - reached, 0) * limit)


@functools.lru_cache(maxsize=8)
def _warming(rule: DecayRule, most: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the numbers of updates from 0, how much each has forgotten in all, and minus what each
    one forgets."""
    logs = -rule.kept_logs(most)
    return np.arange(most + 1.0), logs, -np.diff(logs)


# --- the checkpoints, and the intervals between them


@dataclass(frozen=True)
class Series:
    """Elements of the weights and of an average at n times, by piece of a tensor."""

    times: FloatArray  # [n]
    # of each piece, the weights and the averages: [2, n, elements]
    values: Sequence[npt.NDArray[np.floating]]
    rounding: FloatArray  # squared rounding error of each piece of the averages: [n, pieces]

    def __getitem__(self, times: slice) -> Series:
        return Series(
            self.times[times], [values[:, times] for values in self.values], self.rounding[times]
        )

    def intervals(self) -> Intervals:
        """Return the Gram matrices between successive times, without the variance of rounding in
        them."""
        grams = []
        for x, e in (values.astype(np.float64) for values in self.values):
            rows = np.stack([e[1:] - x[:-1], e[:-1] - x[:-1], x[1:] - x[:-1]], axis=1)
            grams.append(rows @ rows.swapaxes(1, 2))
        gram, before, after = np.stack(grams, axis=1), self.rounding[:-1], self.rounding[1:]
        gram[..., 0, 0] = np.maximum(gram[..., 0, 0] - after, 0)
        gram[..., 1, 1] = np.maximum(gram[..., 1, 1] - before, 0)
        return Intervals(self.times[:-1], self.times[1:], gram, before + after)

    def covariance(self) -> tuple[FloatArray, FloatArray]:
        """Return S of the later weights and the averages, without the first weights; and its part
        from rounding.

        The elements of each piece are divided by their root mean square.
        """
        count = len(self.times)
        total, rounding, elements = np.zeros((2 * count - 1,) * 2), np.zeros(2 * count - 1), 0
        for values, errors in zip(self.values, self.rounding.T, strict=True):
            x, e = values.astype(np.float64)
            moved = np.concatenate([x[1:], e]) - x[0]
            gram = moved @ moved.T
            scale = max(float(np.trace(gram)), 1e-300) / moved.shape[1]
            total += gram / scale
            rounding[count - 1 :] += errors / scale
            elements += moved.shape[1]
        return total / elements, np.diag(rounding / elements)


@dataclass(frozen=True)
class Intervals:
    """Sums of products between checkpoints, by interval and piece."""

    begin: FloatArray  # [intervals]
    end: FloatArray  # [intervals]
    gram: FloatArray  # Gram matrices of y, d and v: [intervals, pieces, 3, 3]
    rounding: FloatArray  # its variance: [intervals, pieces]

    def __getitem__(self, rows: Sequence[int]) -> Intervals:
        return Intervals(self.begin[rows], self.end[rows], self.gram[rows], self.rounding[rows])

    def residuals(self, model: Model) -> FloatArray:
        """Return the squared norms of y - B d - s v, [intervals, pieces]; s is a mean of at most
        `_POINTS` updates."""
        begin, length = self.begin[:, None], (self.end - self.begin)[:, None]
        counts = (
            np.maximum(length / model.every, 1) if model.every else np.full(length.shape, _POINTS)
        )
        points = int(min(counts.max(), _POINTS))
        updates = (np.arange(points) + 0.5) * (counts / points) - 0.5
        forgotten = model.forgotten(
            np.hstack([begin + updates * (length / counts), begin, self.end[:, None]])
        )
        kept = np.exp(np.minimum(forgotten[:, :-1] - forgotten[:, -1:], 0))
        gram, b, s = self.gram, kept[:, -1:], 1 - kept[:, :-1].mean(axis=1, keepdims=True)
        squares = gram[..., 0, 0] + b * b * gram[..., 1, 1] + s * s * gram[..., 2, 2]
        return np.asarray(
            squares - 2 * (b * gram[..., 0, 1] + s * gram[..., 0, 2] - b * s * gram[..., 1, 2])
        )

    def shares(self, model: Model) -> FloatArray:
        """Return the sums of residuals, each divided by that of its piece if nothing is explained:
        [intervals]."""
        moved = np.einsum("ipjj->ip", self.gram).clip(1e-300)
        return np.asarray((self.residuals(model) / moved).sum(axis=1))

    def search(
        self, model_of: Callable[[float], Model], grid: FloatArray, near: float | None = None
    ) -> tuple[float, FloatArray]:
        """Return the value whose model has the smallest residuals, each weighted by its inverse,
        and these residuals.

        With `near` it is the minimum that leads down from there.
        """
        moved = self.gram[..., 0, 0] + self.gram[..., 2, 2]
        least = 1e-20 * moved.max() + 1e-300  # above 0 also for a piece that stands still
        weights = 1 / np.maximum(moved, least)

        def cost(value: float) -> float:
            return float((self.residuals(model_of(value)) * weights).sum())

        for _ in range(4):
            costs = [cost(value) for value in grid.tolist()]
            best = int(
                np.argmin(costs)
                if near is None
                else np.abs(np.log(grid / max(near, grid[0]))).argmin()
            )
            while costs[best] > min(costs[max(best - 1, 0) : best + 2]):
                best += 1 if best + 1 < len(costs) and costs[best + 1] < costs[best] else -1
            low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
            exact = {"xatol": 1e-5 * (high - low)}
            value = float(
                minimize_scalar(cost, bounds=(low, high), method="bounded", options=exact).x
            )
            near = None if near is None else value
            left = np.maximum(self.residuals(model_of(value)), 0) + self.rounding
            weights = 1 / np.maximum(left, 1e-4 * self.gram[..., 2, 2] + least)
            after = int(np.searchsorted(grid, value))
            grid = grid[max(after - 6, 0) : after + 6]
        return value, left

    def fit(self, model: Model, near: float | None = None) -> tuple[Model, float]:
        """Return the model with the value that explains the intervals best, and its log residuals,
        to compare models.

        Values to try are those of lengths from 1/100 of the least interval to 100 times the run.
        """
        grid = np.geomspace(1.0, 2000.0, 60)
        if not model.is_power:
            shortest = max(float((self.end - self.begin).min()) / 100, model.every / 20)
            grid = np.geomspace(0.01 / (self.end[-1] - self.begin[0]), 1 / shortest, 60)
        value, left = self.search(
            lambda value: replace(model, value=value), grid / model.unit, near
        )
        return replace(model, value=value), float(
            np.log(np.maximum(left, 1e-300)).mean(axis=1).sum()
        )


# --- the likelihood of all checkpoints together


def _likelihood(
    model: Model, series: Series, rounds: int, with_motion: bool = True
) -> Callable[[float], float]:
    """Return -2 log of the likelihood of checkpoints for each element, by log(value / value of the
    model)."""
    times, every, (covariance, rounding) = series.times, model.every, series.covariance()
    starts = np.append(max(0.0, 2 * times[0] - times[1]), times[:-1])
    counts = np.full(times.size, _CELLS)
    if every:
        counts = np.clip((times - starts) / every, 1, _CELLS).astype(int)
    cuts = [np.linspace(a, b, m + 1) for a, b, m in zip(starts, times, counts, strict=True)]
    edges = np.hstack([[cut[:-1], cut[1:]] for cut in cuts])
    interval = np.repeat(np.arange(times.size), counts)
    half_interval = 2 * interval + np.concatenate([np.arange(m) * 2 // m for m in counts])
    length, middle = edges[1] - edges[0], edges.mean(axis=0) + every / 2
    # the share of a cell's updates after its impulses
    within = 0.5 + 0.5 * np.minimum(every / length, 1)
    is_past = edges[1][:, None] <= times + 1e-9 * times[-1]
    since, until = np.maximum(middle - middle[:, None], 0), np.maximum(times - middle[:, None], 0)
    thetas = np.median(np.diff(times)) * np.array([*_NOISE, *_BUILD_UP * with_motion])
    responses = []
    for index, theta in enumerate([np.inf, *thetas]):
        later, same_cell, at = (np.exp(-u / theta) for u in (since, length / 3, until))
        if index > len(_NOISE):
            later, same_cell, at = 1 - later, 1 - same_cell, 1 - at
        at = np.where(is_past, at, 0)
        response = (
            np.triu(later, 1) + np.diag(within * same_cell),
            at[:, 1:] - at[:, :1],
            at[:, :1],
        )
        responses.append((*response, interval if index else half_interval))
    others, components = times.size - 1, times.size // _CHECKPOINTS_A_COMPONENT * with_motion
    principal = np.linalg.eigh(covariance[:others, :others])[1][:, others - components :]
    motion = CubicSpline(times, np.vstack([np.zeros(components), principal]))(
        middle.clip(max=times[-1])
    )
    # all matrices are symmetric: one half of each suffices
    upper = np.triu_indices(len(covariance))
    size = np.trace(covariance) / len(covariance)
    known = rounding + _UNEXPLAINED * size * np.eye(len(covariance))

    def cost(log: float) -> float:
        begin, end, at = (model.scaled(log).forgotten(t) for t in (*edges, times))
        after, before = (np.exp(np.minimum(edge[:, None] - at, 0)) for edge in (end, begin))
        masses, local = np.where(is_past, after - before, 0), []
        for within, weights, first, part in responses:
            rows = (
                np.hstack([weights, within @ masses - first]) * np.sqrt(length / times[-1])[:, None]
            )
            local += [rows[part == index].T @ rows[part == index] for index in np.unique(part)]
        start = np.append(np.zeros(others), np.exp(np.minimum(at[0] - at, 0)))
        lasting = np.vstack([start, np.hstack([principal.T, motion.T @ masses])])
        matrices = np.concatenate([local, lasting[:, :, None] * lasting[:, None, :]])  # C_q
        half, total = matrices[:, upper[0], upper[1]], np.empty_like(known)
        double, traces = (
            half * np.where(upper[0] == upper[1], 1.0, 2.0),
            np.trace(matrices, axis1=1, axis2=2),
        )
        # Variances begin equal: those of another value would bias towards it, since one near 0
        # hardly grows.
        variances = np.where(traces > 0, size / 3 / np.maximum(traces, 1e-300), 0.0)
        for _ in range(rounds + 1):
            total[upper] = total.T[upper] = variances @ half
            inverse = np.linalg.inv(known + total)
            measured, expected = (
                double @ (inverse @ covariance @ inverse)[upper],
                double @ inverse[upper],
            )
            variances = variances * np.sqrt(np.maximum(measured, 0) / np.maximum(expected, 1e-300))
        return float(
            np.linalg.slogdet(known + total)[1]
            + np.trace(np.linalg.solve(known + total, covariance))
        )

    return cost


def _least(cost: Callable[[float], float], exact: float = 1e-2) -> tuple[float, float]:
    """Return where it is least near 0, and how large it is there."""
    bracket = [-0.7, 0.0, 0.7]
    costs = [cost(log) for log in bracket]
    while costs[1] > min(costs) and abs(bracket[1]) < 3:
        direction = int(np.sign(costs[0] - costs[2]))
        bracket = [log + 0.7 * direction for log in bracket]
        costs = [*costs[1:], cost(bracket[2])] if direction > 0 else [cost(bracket[0]), *costs[:2]]
    found = minimize_scalar(
        cost, bounds=(bracket[0], bracket[2]), method="bounded", options={"xatol": exact}
    )
    return float(found.x), float(found.fun)


def best_models(model: Model, rows: Intervals, series: Series) -> list[Model]:
    """Return the claimed model; without a claim, that of the best rule and others that explain
    files about as well.

    The value is that of a fit to the intervals. A path that turns back, or slows down, looks like
    another rule: the likelihoods decide. Among rules that are alike, and make the same averages, it
    is the first one.
    """
    rules = _RULES if model.claimed is None else (model.rule,)
    fits = [rows.fit(replace(model, rule=rule)) for rule in rules]
    least = min(misfit for _, misfit in fits)
    models = [model for model, misfit in fits if misfit < least + _FAR]
    if len(models) == 1:
        return models
    costs, masses = [], []
    for model in models:
        log, cost = _least(_likelihood(model, series, _FEW_ROUNDS))
        forgotten = model.scaled(log).forgotten(series.times)
        masses.append(np.tril(np.exp(np.minimum(forgotten - forgotten[:, None], 0.0))))
        costs.append(cost)
    alike = [index for index, cost in enumerate(costs) if cost <= min(costs) + _ALIKE]
    first = alike[0]
    return [
        models[i] for i in alike if i == first or np.abs(masses[i] - masses[first]).max() > _SAME
    ]


def refine(model: Model, series: Series) -> tuple[Model, float]:
    """Return the model with the value that explains all checkpoints together, and its length's
    relative uncertainty.

    The uncertainty has four parts: twice that of the likelihood; half the difference to paths
    without lasting motion; half the difference between the earlier and the later half; and
    `_UNLIKE` for other kinds of paths.
    """
    count = len(series.times)
    if count < 3:  # one interval shows none
        return model, math.inf

    def roughly(part: Series, with_motion: bool = True) -> float:
        return _least(_likelihood(model, part, _SOME_ROUNDS, with_motion))[0]

    cost = _likelihood(model, series, _ROUNDS)
    log, least = _least(cost, 1e-4)
    elements = min(sum(values.shape[2] for values in series.values), _MOST_INDEPENDENT)
    curvature = elements * (cost(log - _STEP) + cost(log + _STEP) - 2 * least)
    parts = [
        2 * _STEP * math.sqrt(2 / max(curvature, 1e-9)),
        (roughly(series, with_motion=False) - log) / 2,
    ]
    half = count // 2
    earlier, later = series[: count - half], series[count - half - 1 :]
    parts.append((roughly(earlier) - roughly(later)) / 2 if half > 2 else _FEW)
    found = model.scaled(log)
    if not model.is_power:
        share = float(np.median(np.diff(series.times))) / found.length
        parts.append(_UNLIKE * share / math.sqrt(count))
    return found, math.hypot(*parts)
