"""Which decay explains all checkpoints together best: by the covariance of the weights and averages at all times.

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

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from posthoc_cli.checkpoints.audit_decay import MOST, Fit, Model
from posthoc_cli.profiles import FloatArray

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


@dataclass
class Series:
    """Some elements of the weights and of the average at all checkpoints.

    Attributes:
        times: of the checkpoints, [n].
        values: of each piece the weights at all times, then the averages: [2 n, elements].
        rounding: variance of each, [pieces, 2 n].
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
        after, before = (np.exp(np.minimum(one[:, None] - gone[2], MOST)) for one in (gone[1], gone[0]))
        masses = np.where(self.is_past, after - before, 0)
        made = []
        for within, weights, first, part in self.answers:
            rows = np.hstack([weights, within @ masses - first]) * self.size
            made += [rows[part == index].T @ rows[part == index] for index in np.unique(part)]
        start = np.append(np.zeros(self.times.size - 1), np.exp(np.minimum(gone[2][0] - gone[2], MOST)))
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
