"""Which decay explains how an average moved between checkpoints that hold it and the weights, and how sure that is.

Between two checkpoints, with the weights x and the average e at both, let d = e - x and v = x' - x of the first and of
what they become, and y = e' - x. With the raw weights in between expected on the line,

    y = B d + s v + the rest,

where B is the mass that e' has of before, and s the mean of its tail over the interval. Both follow from how much the
average forgets, which a `Model` says: rate * t for a constant decay, log t times an exponent for a power function, a
sum over the updates for a warm-up. The sums of products of y, d and v over the elements of a tensor (Gram matrices)
hold all that is needed: the best value is where the rest is least, weighted by each tensor's own. A sign that is
flipped is a negative rate, B > 1. Rounding of stored averages adds a known variance to d and y, which is subtracted.

Weights move on no line, which matters the more the shorter the average is. So the value that this finds is only where
the search for another one begins, in which all checkpoints are explained together: see `audit_together`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import FloatArray, sigma_rel_from_gamma
from posthoc_cli.profiles.other_libraries import POWER, Decay

_POINTS = 512
"""Of an interval, at which the tail of the average is taken."""

_NEAR = np.geomspace(0.5, 2, 11)
"""Values that are tried again, in times of one that was found."""

MOST = 30.0
"""Logarithm of the most that a wrong sign lets an average grow."""


@dataclass
class Products:
    """Of the pieces in one interval: Gram matrices of y, d, v, [pieces, 3, 3], and shares of equal elements, [pieces].

    Attributes:
        begin, end: times.
        gram: without the expected part of the rounding.
        rounding: that part of y and d, [pieces].
        same: elements of the average that are equal at both times.
        copied: elements that are equal to the weights, at the begin and at the end, [2, pieces].
    """

    begin: float
    end: float
    gram: FloatArray
    rounding: FloatArray
    same: FloatArray
    copied: FloatArray

    @property
    def length(self) -> float:
        """Time between the checkpoints."""
        return self.end - self.begin

    @property
    def scale(self) -> FloatArray:
        """By which what is left of a piece is at most about 1, also of one that stands still: [pieces]."""
        return np.asarray(1 / np.einsum("pii->p", self.gram).clip(1e-300))

    def only(self, kept: npt.NDArray[np.bool_]) -> Products:
        """The same of some of the pieces."""
        held = (self.gram[kept], self.rounding[kept], self.same[kept], self.copied[:, kept])
        return Products(self.begin, self.end, *held)


@dataclass(frozen=True)
class Model:
    """What an average may be, but for one value: a constant decay.

    Attributes:
        value: what is claimed; None for nothing.
        every: time between updates.
    """

    value: float | None = None
    every: float = 1.0
    what = "decay"
    warm_up = ""

    def forgotten(self, value: float, t: FloatArray) -> FloatArray:
        """-log of the share that remains at some times, from any time on; the value is the rate."""
        return value * t

    def length(self, value: float) -> float:
        """The time constant."""
        return math.inf if value == 0 else self.every / -math.expm1(-value * self.every)

    def told(self, value: float) -> float:
        """The decay of an update."""
        return 1 - self.every / self.length(value)

    def grid(self, products: Sequence[Products]) -> FloatArray:
        """Values to try: lengths from a hundredth of the least interval to a hundred times the run, of both signs."""
        span = products[-1].end - products[0].begin
        shortest = max(min(one.length for one in products) / 100, self.every / 20)
        rates = np.geomspace(0.01 / span, 1 / shortest, 60)
        return np.concatenate((-rates[::-1], [0.0], rates))

    def since(self, _: float) -> Model:
        """The same for an average that began at some time."""
        return self


@dataclass(frozen=True)
class PowerModel(Model):
    """A power function; the value is gamma + 1."""

    every: float = 0.0
    what = "sigma_rel"

    def forgotten(self, value: float, t: FloatArray) -> FloatArray:
        """See `Model`."""
        return value * np.log(np.maximum(t, 1e-300))

    def length(self, value: float) -> float:
        """The sigma_rel."""
        return sigma_rel_from_gamma(value - 1) if value > 1 else 12**-0.5

    def told(self, value: float) -> float:
        """The sigma_rel."""
        return self.length(value)

    def grid(self, _: Sequence[Products]) -> FloatArray:
        """See `Model`."""
        return np.geomspace(1.0, 2000.0, 60)


@dataclass(frozen=True)
class WarmModel(Model):
    """A decay that is reached by a warm-up, counted from the last of some starts.

    The value is the rate of the decay that is reached; where that is claimed, in times of the claimed one, at every
    update: an average that is updated k times a step forgets k times as much.
    """

    decay: Decay = field(default_factory=lambda: Decay(0.5))
    starts: tuple[float, ...] = (0.0,)

    @property
    def warm_up(self) -> str:  # type: ignore[override]
        """The rule, as settings name it."""
        number = f":{self.decay.power:g}" * (self.decay.warm_up == "power" and self.decay.power != POWER)
        return self.decay.warm_up + number

    def forgotten(self, value: float, t: FloatArray) -> FloatArray:
        """See `Model`."""
        starts = np.array(self.starts)
        numbers = (t - starts[np.maximum(np.searchsorted(starts, t, "right") - 1, 0)]) / self.every
        most = 1 << int(numbers.max() + 1).bit_length()
        if self.value is not None:
            places, logs, _ = _warming(self.decay, most)
            return np.asarray(value * np.interp(numbers, places, logs))
        places, logs, slowing = _warming(replace(self.decay, decay=1 - 1e-12), most)
        reached = int(np.searchsorted(slowing, -value * self.every))
        rising = np.interp(np.minimum(numbers, reached), places, logs)
        return np.asarray(rising + np.maximum(numbers - reached, 0) * value * self.every)

    def length(self, value: float) -> float:
        """See `Model`."""
        rate = value if self.value is None else -math.log(self.decay.decay) / self.every * value
        return super().length(rate)

    def grid(self, products: Sequence[Products]) -> FloatArray:
        """See `Model`."""
        rates = super().grid(products)
        return rates[rates > 0] if self.value is None else rates * self.length(1.0)

    def since(self, t: float) -> Model:
        """See `Model`."""
        return replace(self, starts=(t,))


@functools.lru_cache(maxsize=8)
def _warming(decay: Decay, most: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Numbers of updates from 0, how much was forgotten by each, and the negative of what each forgets."""
    logs = -decay.kept_logs(most)
    return np.arange(most + 1.0), logs, -np.diff(logs)


# --- fits


@dataclass(frozen=True)
class Factors:
    """B and s of each interval: [intervals]."""

    kept: FloatArray
    passed: FloatArray


@dataclass
class Fit:
    """The value of a model that leaves least of some intervals; `weights` are of their pieces, [intervals, pieces]."""

    model: Model
    products: Sequence[Products]

    def __post_init__(self) -> None:
        begin, end = (np.array([getattr(one, name) for one in self.products]) for name in ("begin", "end"))
        self.times = _points(self.model, begin, end)
        self.grid = self.model.grid(self.products)
        self.gram = np.array([one.gram for one in self.products])
        moved = self.gram[..., 0, 0] + self.gram[..., 2, 2]
        least_moved = 1e-20 * moved.max() + 1e-300  # also of a piece that stands still
        self.weights = 1 / np.maximum(moved, least_moved)
        floor = 1e-4 * self.gram[..., 2, 2] + least_moved
        rounding = np.array([one.rounding for one in self.products])
        self.value = self.best(self.weights)
        for _ in range(3):
            self.weights = 1 / np.maximum(np.maximum(self.rests(self.value), 0) + rounding, floor)
            self.value = self.best(self.weights, self.value)

    def factors(self, value: float) -> Factors:
        """Of every interval, for a value."""
        return factors(self.model, value, self.times)

    def rests(self, value: float, model: Model | None = None) -> FloatArray:
        """Squared length of y - B d - s v, [intervals, pieces]; also of another model."""
        found = factors(model or self.model, value, self.times)
        return rests(self.gram, found.kept[:, None], found.passed[:, None])

    def best(self, weights: FloatArray, near: float = 0.0) -> float:
        """The value that leaves least; of those near another one, if that is above 0."""
        grid = near * _NEAR if near > 0 else self.grid
        return least(lambda value: float((self.rests(value) * weights).sum()), grid)

    @cached_property
    def misfit(self) -> float:
        """Mean logarithm of what is left, to be compared between models; summed over the intervals."""
        left = np.maximum(self.rests(self.value), 0) + np.array([one.rounding for one in self.products])
        return float(np.log(np.maximum(left, 1e-300)).mean(axis=1).sum())


def _points(model: Model, begin: FloatArray, end: FloatArray) -> FloatArray:
    """The times of updates in intervals, or as many between, then their begin and end: [intervals, points]."""
    counts = np.maximum((end - begin) / model.every, 1) if model.every else np.full(end.size, _POINTS)
    points = int(min(counts.max(), _POINTS))
    updates = (np.arange(points) + 0.5) * (counts / points)[:, None] - 0.5
    return np.hstack([begin[:, None] + updates * ((end - begin) / counts)[:, None], begin[:, None], end[:, None]])


def factors(model: Model, value: float, times: FloatArray) -> Factors:
    """Of intervals with these `_points`, for a value."""
    gone = model.forgotten(value, times.ravel()).reshape(times.shape)
    kept = np.exp(np.minimum(gone[:, :-1] - gone[:, -1:], MOST))
    return Factors(kept[:, -1], 1 - kept[:, :-1].mean(axis=1))


def unexplained(model: Model, value: float, one: Products) -> FloatArray:
    """What a value leaves of one interval, by piece."""
    found = factors(model, value, _points(model, np.array([one.begin]), np.array([one.end])))
    return rests(one.gram, found.kept, found.passed)


def passed_since(model: Model, value: float, begin: float, end: float) -> float:
    """s of an average that begins from the weights at some time."""
    return float(factors(model.since(begin), value, _points(model, np.array([begin]), np.array([end]))).passed[0])


def rests(gram: FloatArray, kept: npt.ArrayLike, passed: npt.ArrayLike) -> FloatArray:
    """Squared length of y - B d - s v, for Gram matrices of these three."""
    b, s = np.asarray(kept), np.asarray(passed)
    own = gram[..., 0, 0] + b * b * gram[..., 1, 1] + s * s * gram[..., 2, 2]
    return np.asarray(own - 2 * (b * gram[..., 0, 1] + s * gram[..., 0, 2] - b * s * gram[..., 1, 2]))


def least(cost: Callable[[float], float], grid: FloatArray) -> float:
    """Where a function of one value is least: on a grid, then between its neighbours by golden sections."""
    best = int(np.argmin([cost(float(value)) for value in grid]))
    low, high = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, len(grid) - 1)])
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(24):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if cost(a) < cost(b) else (a, high)
    return (low + high) / 2
