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
the search for another one begins, in which all checkpoints are explained together, by the covariance of the weights and
averages at all times.

A path is a sum of answers to independent impulses: after the time u 1 for a random walk, exp(-u / theta) for noise that
is forgotten, 1 - exp(-u / theta) for motion that gathers, of several theta. Each has a variance q of its own in each
interval, the walk in each half of one. Motion that lasts longer shows in the weights alone: their principal components
over the checkpoints, smooth in between, are parts of the path, too, each of a variance. For a value of a model the
covariance of all weights and averages is then a sum of q times known matrices C_q.

With S the covariance over the elements and P the inverse of that sum, the most probable variances come from rounds of q
<- q sqrt(tr(P S P C_q) / tr(P C_q)), and the best value is that of the most probable sum. So it counts that a path is
pulled back, or goes on, between two checkpoints.
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
from posthoc_cli.profiles import FloatArray, sigma_rel_from_gamma
from posthoc_cli.profiles.other_libraries import POWER, Decay
from posthoc_cli.snapshots.sources import FileSource, expected_rounding, read_values

MOST_ELEMENTS, _TOGETHER = 1_000_000, 30_000
"""Of the sample; and of all checkpoints together."""

PIECES = 32
"""Parts of tensors that are read, at least, as far as there are elements."""

_POINTS = 512
"""Of an interval, at which the tail of the average is taken."""

_NEAR = np.geomspace(0.5, 2, 11)
"""Values that are tried again, in times of one that was found."""

_MOST = 30.0
"""Logarithm of the most that a wrong sign lets an average grow."""

_MOST_CHECKPOINTS, _CELLS = 24, 32
"""That are explained together; and parts of the time between two."""

_NOISE, _GATHERED = (0.03, 0.3, 1.0, 3.0), (0.03, 0.1, 0.3, 1.0)
"""Times in which answers to impulses end, and in which others are complete, in times of that between checkpoints."""

_PRINCIPAL = 5
"""One principal component of the weights is a part of the path for so many checkpoints."""

_ROUNDS, _FEW_ROUNDS = 300, 25
"""Of improving the variances of a path: to find a value, and to compare models."""

_BEND = 0.01
"""At which distance of logarithms the curvature of a likelihood is taken."""

_UNLIKE = 0.01
"""By which share of interval / length, divided by the root of the number of checkpoints, paths are otherwise."""


# --- samples of checkpoints


@dataclass
class Sample:
    """Elements of the weights and of the average at a time: by piece, [elements] each; variance of their rounding."""

    t: float
    weights: list[FloatArray]
    average: list[FloatArray]
    rounding: FloatArray

    def thinned(self) -> Sample:
        """At most some `_TOGETHER` elements of it."""
        every = -(-sum(values.size for values in self.weights) // _TOGETHER)
        sizes = [len(values) / len(values[::every]) for values in self.weights]
        weights, average = ([values[::every] for values in own] for own in (self.weights, self.average))
        return Sample(self.t, weights, average, self.rounding / sizes)


def pieces_of(sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Parts of tensors to read: name, begin and end; all of small tensors, and as much of each larger one."""
    names = sorted(name for name in sizes if sizes[name])
    quota, left = MOST_ELEMENTS, MOST_ELEMENTS
    for rest, size in zip(range(len(names), 0, -1), sorted(sizes[name] for name in names), strict=True):
        quota = left // rest
        if size > quota:
            break
        left -= size
    parts = -(-PIECES // max(1, len(names)))
    found = []
    for name in names:
        each = max(1, min(sizes[name], max(quota, 1)) // parts)
        starts = np.unique(np.linspace(0, sizes[name] - each, min(parts, sizes[name])).astype(np.int64))
        found += [(name, int(start), int(start) + each) for start in starts]
    return found


def read_sample(weights: FileSource, average: FileSource, pieces: Sequence[tuple[str, int, int]]) -> Sample:
    """The pieces of the weights and of the average at one time."""
    read = []
    for source in (weights, average):
        with source.open() as file:
            read.append([read_values(file, *piece) for piece in pieces])
        for values, (name, *_) in zip(read[-1], pieces, strict=True):
            if not np.isfinite(values).all():
                raise NonFiniteError(source.path, f"tensor {name!r}: holds nan or infinity")
    dtypes = [average.stored[name].dtype for name, *_ in pieces]
    rounding = [expected_rounding(values, dtype, "F32") for values, dtype in zip(read[1], dtypes, strict=True)]
    return Sample(average.info.t, read[0], read[1], np.array(rounding))


@dataclass
class Products:
    """Of the pieces in one interval: Gram matrices of y, d, v, [pieces, 3, 3], and the part of rounding, subtracted.

    Also the shares of elements of the average that are equal at both times, and of those that are equal to the weights
    at the begin and at the end, [2, pieces].
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


@dataclass
class Series:
    """Some elements of each piece at all times: of the weights, then of the averages, [2 n, elements].

    With the variance of their rounding, [pieces, 2 n].
    """

    times: FloatArray
    values: list[npt.NDArray[np.float32]]
    rounding: FloatArray

    def covariance(self, pieces: npt.NDArray[np.bool_], first: int, last: int) -> tuple[FloatArray, FloatArray, int]:
        """S of the differences to the first weights in [first, last), the part of rounding, and how many elements.

        Each piece counts by its elements, in times of its own mean square.
        """
        n, count = len(self.times), last - first
        apart = np.zeros((2 * count - 1, 2 * n))
        rows = [*range(first + 1, last), *range(n + first, n + last)]
        apart[np.arange(2 * count - 1), rows] = 1
        apart[:, first] -= 1
        total, rounding, elements = np.zeros((2 * count - 1,) * 2), np.zeros(2 * n), 0
        for values, own in compress(zip(self.values, self.rounding, strict=True), pieces):
            moved = apart @ values
            gram = moved @ moved.T
            scale = max(float(np.trace(gram)), 1e-300) / moved.shape[1]
            total += gram / scale
            rounding += own * moved.shape[1] / scale
            elements += moved.shape[1]
        return total / elements, apart * rounding / elements @ apart.T, elements


def products_of(a: Sample, b: Sample) -> Products:
    """What happened between two checkpoints."""
    grams, same, copied = [], [], []
    for x, e, later_x, later_e in zip(a.weights, a.average, b.weights, b.average, strict=True):
        rows = np.array([later_e - x, e - x, later_x - x])
        grams.append(rows @ rows.T)
        same.append(np.mean(later_e == e))
        copied.append((np.mean(e == x), np.mean(later_e == later_x)))
    rounding = np.array([b.rounding, a.rounding])
    gram = np.array(grams)
    gram[:, 0, 0] = np.maximum(gram[:, 0, 0] - rounding[0], 0)
    gram[:, 1, 1] = np.maximum(gram[:, 1, 1] - rounding[1], 0)
    return Products(a.t, b.t, gram, rounding.sum(axis=0), np.array(same), np.array(copied).T)


def series_of(samples: Sequence[Sample]) -> Series:
    """All checkpoints together."""
    values = [
        np.array([*(one.weights[piece] for one in samples), *(one.average[piece] for one in samples)], np.float32)
        for piece in range(len(samples[0].weights))
    ]
    sizes = np.array([one.shape[1] for one in values])
    rounding = np.array([one.rounding / sizes for one in samples])
    return Series(np.array([one.t for one in samples]), values, np.vstack([0 * rounding, rounding]).T)


def is_low(values: FloatArray) -> bool:
    """Whether all values are as bfloat16 or float16 has them."""
    single = values.astype(np.float32)
    with np.errstate(over="ignore"):
        is_half = bool((single.astype(np.float16).astype(np.float32) == single).all())
    return is_half or not (single.view(np.uint32) & 0xFFFF).any()


# --- what an average may be


@dataclass(frozen=True)
class Model:
    """What an average may be, but for one value: a constant decay; `value` is what is claimed, None for nothing."""

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

    @property
    def kept(self) -> FloatArray:
        """B of every interval."""
        return factors(self.model, self.value, self.times)[0]

    def rests(self, value: float, model: Model | None = None) -> FloatArray:
        """Squared length of y - B d - s v, [intervals, pieces]; also of another model."""
        kept, passed = factors(model or self.model, value, self.times)
        return rests(self.gram, kept[:, None], passed[:, None])

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


def factors(model: Model, value: float, times: FloatArray) -> tuple[FloatArray, FloatArray]:
    """B and s of intervals with these `_points`, for a value: [intervals] each."""
    gone = model.forgotten(value, times.ravel()).reshape(times.shape)
    kept = np.exp(np.minimum(gone[:, :-1] - gone[:, -1:], _MOST))
    return kept[:, -1], 1 - kept[:, :-1].mean(axis=1)


def unexplained(model: Model, value: float, one: Products) -> FloatArray:
    """What a value leaves of one interval, by piece."""
    return rests(one.gram, *factors(model, value, _points(model, np.array([one.begin]), np.array([one.end]))))


def passed_since(model: Model, value: float, begin: float, end: float) -> float:
    """s of an average that begins from the weights at some time."""
    return float(factors(model.since(begin), value, _points(model, np.array([begin]), np.array([end])))[1][0])


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


# --- all checkpoints together


class _Paths:
    """The matrices of `Series` for any value of a model: answers to impulses in cells between times."""

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
        within = 0.5 + 0.5 * np.minimum(model.every / length, 1)  # of a cell's updates those after its impulses
        self.is_past = self.edges[1][:, None] <= times + 1e-9 * times[-1]
        since, until = np.maximum(middle - middle[:, None], 0), np.maximum(times - middle[:, None], 0)
        rates = np.median(np.diff(times)) * np.array([*_NOISE, *_GATHERED * with_motion])
        self.answers, self.size = [], np.sqrt(length / times[-1])[:, None]
        for index, theta in enumerate([np.inf, *rates]):
            later, own, at = (np.exp(-u / theta) for u in (since, length / 3, until))
            if index > len(_NOISE):
                later, own, at = 1 - later, 1 - own, 1 - at
            at = np.where(self.is_past, at, 0)
            answer = (np.triu(later, 1) + np.diag(within * own), at[:, 1:] - at[:, :1], at[:, :1])
            self.answers.append((*answer, interval if index else half))
        others, components = times.size - 1, times.size // _PRINCIPAL * with_motion
        self.principal = np.linalg.eigh(covariance[:others, :others])[1][:, others - components :]
        known = np.vstack([np.zeros(components), self.principal])
        self.motion = CubicSpline(times, known)(middle.clip(max=times[-1]))

    def matrices(self, value: float) -> FloatArray:
        """C_q for a value: [variances, 2 n - 1, 2 n - 1]."""
        gone = [self.model.forgotten(value, t) for t in (*self.edges, self.times)]
        after, before = (np.exp(np.minimum(one[:, None] - gone[2], _MOST)) for one in (gone[1], gone[0]))
        masses = np.where(self.is_past, after - before, 0)
        made = []
        for within, weights, first, part in self.answers:
            rows = np.hstack([weights, within @ masses - first]) * self.size
            made += [rows[part == index].T @ rows[part == index] for index in np.unique(part)]
        start = np.append(np.zeros(self.times.size - 1), np.exp(np.minimum(gone[2][0] - gone[2], _MOST)))
        whole = np.vstack([start, np.hstack([self.principal.T, self.motion.T @ masses])])
        return np.concatenate([made, whole[:, :, None] * whole[:, None, :]])


def _misfit(matrices: FloatArray, covariance: FloatArray, rounding: FloatArray, rounds: int) -> float:
    """-2 / elements of the logarithm of the likelihood, with the most probable variances."""
    flat, traces = matrices.reshape(len(matrices), -1), np.trace(matrices, axis1=1, axis2=2)
    size = np.trace(covariance) / len(covariance)
    known = rounding + 1e-9 * size * np.eye(len(covariance))
    variances = np.where(traces > 0, size / 3 / np.maximum(traces, 1e-300), 0.0)
    for _ in range(rounds):
        inverse = np.linalg.inv(known + np.tensordot(variances, matrices, 1))
        fit, own = flat @ (inverse @ covariance @ inverse).ravel(), flat @ inverse.ravel()
        variances = variances * np.sqrt(np.maximum(fit, 0) / np.maximum(own, 1e-300))
    total = known + np.tensordot(variances, matrices, 1)
    return float(np.linalg.slogdet(total)[1] + np.trace(np.linalg.solve(total, covariance)))


def misfit(fit: Fit, series: Series, pieces: npt.NDArray[np.bool_], first: int, last: int) -> float:
    """-2 log of a model's likelihood near the value of a fit, in few rounds: to be compared between models."""
    cost = _cost(fit, series, pieces, max(first, last - _MOST_CHECKPOINTS), last, rounds=_FEW_ROUNDS)
    return float(minimize_scalar(cost, bounds=(-0.7, 0.7), method="bounded", options={"xatol": 0.01}).fun)


def refined(fit: Fit, series: Series, pieces: npt.NDArray[np.bool_], first: int, last: int) -> tuple[float, float]:
    """The value that explains the checkpoints in [first, last) together, and the relative uncertainty of its length.

    The uncertainty has four parts: twice what the likelihood says; half the difference to paths without motion that
    lasts; half that between the earlier and the later half; and a share for what paths there are beside these.
    """
    if fit.value <= 0:  # no average of any length
        return fit.value, math.inf
    first = max(first, last - _MOST_CHECKPOINTS)
    log, sigma = _lowest(_cost(fit, series, pieces, first, last))
    others = (_lowest(_cost(fit, series, pieces, first, last, with_motion=False))[0] - log) / 2
    half, change = (last - first) // 2, 0.0
    if half > 2:
        earlier, later = ((first, last - half), (last - half - 1, last))
        change = (_lowest(_cost(fit, series, pieces, *earlier))[0] - _lowest(_cost(fit, series, pieces, *later))[0]) / 2
    value = fit.value * math.exp(log)
    share = 0.0
    if fit.model.what == "decay":
        share = float(np.median(np.diff(series.times[first:last]))) / abs(fit.model.length(value))
    return value, math.hypot(2 * sigma, others, change, _UNLIKE * share / math.sqrt(last - first))


def _cost(
    fit: Fit, series: Series, pieces: npt.NDArray[np.bool_], begin: int, end: int, *, with_motion: bool = True,
    rounds: int = _ROUNDS,
) -> Callable[[float], float]:  # fmt: skip
    """-2 log of the likelihood, of the logarithm of a value in times of that of a fit."""
    covariance, rounding, elements = series.covariance(pieces, begin, end)
    paths = _Paths(fit.model, series.times[begin:end], covariance, with_motion)

    def cost(log: float) -> float:
        return elements * _misfit(paths.matrices(fit.value * math.exp(log)), covariance, rounding, rounds)

    return cost


def _lowest(cost: Callable[[float], float]) -> tuple[float, float]:
    """Where a function is least, near 0, and the uncertainty if it is -2 log of a likelihood."""
    places = [-0.7, 0.0, 0.7]
    costs = [cost(place) for place in places]
    while costs[1] > min(costs) and abs(places[1]) < 3:
        onward = int(np.sign(costs[0] - costs[2]))
        places = [place + 0.7 * onward for place in places]
        costs = [*costs[1:], cost(places[2])] if onward > 0 else [cost(places[0]), *costs[:2]]
    found = minimize_scalar(cost, bounds=(places[0], places[2]), method="bounded", options={"xatol": 1e-4})
    bend = cost(found.x - _BEND) + cost(found.x + _BEND) - 2 * found.fun
    return float(found.x), _BEND * math.sqrt(2 / max(bend, 1e-9))
