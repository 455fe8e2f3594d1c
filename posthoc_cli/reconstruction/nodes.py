"""The nodes over which integrals over stored profiles and targets are sums.

Motion is modelled per step, not per time, since a clock may advance while nothing is trained.
Over hundreds of updates, integrals over time are as good as sums over updates. Over few they are
not, since an average ignores how the network moved between updates: these updates are the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import (
    Clock,
    FloatArray,
    PowerFunction,
    Profile,
    StoredProfile,
)

FEW = 8
"""Intervals of at most this many updates are summed. With more updates, integral and sum differ by
less than 10 %."""

_ORDER, _FINE = 8, 16
"""Gauss-Legendre nodes in an interval, one where all stored profiles are constant, and in a section
for a target."""

_FALL, _FALLEN = 2.0, 32.0
"""Limit of the change of log(mass) within an interval: the error of 8 nodes for exp(2 _FALL u), u
in [0, 1], is then (2 _FALL)^16 8!^4 / (17 16!^3) = 1e-13 of the largest value. And the change after
which a power function is 0."""

MOST_POINTS = 16_384
"""Limit of the points of mass that intervals end at; among more points, evenly spaced ones are
chosen."""

EQUAL = 1e-9
"""Relative difference below which two times, or numbers of updates, are equal."""

_STEP = 1e-6
"""Half the width of the difference quotient for a target's density, as a fraction of its
interval."""


INSTANT = 1e-3
"""Time over which mass at one time is spread where steps are unknown. Times are whole numbers
there, of steps or of epochs, so that it is far less than lies between two: noise of single values
is then averaged out of a target, as if it forgot at once."""


@dataclass(frozen=True)
class Steps:
    """A run's clock, and the steps between its updates."""

    clock: Clock
    stride: int = 1


class Nodes:
    """Times within (edges[0], edges[-1]], by which integrals over stored profiles and targets are
    sums.

    The intervals end at the given edges, at the stored profiles' times, at their points of mass and
    one update before these, over which such mass is spread, where the clock bends, and often enough
    for each power function to be a polynomial between them. Those of few updates have the updates
    as nodes, which follow all others.

    `instant` is the number of steps, or the time without `steps`, that a point of mass is spread
    over; `edges` are the ends of the intervals, [K + 1]; `interval` is that of each node, [M];
    `weight` the steps that it stands for, [M]; without `steps`, or if not `per_step`, its time.
    """

    def __init__(
        self,
        edges: FloatArray,
        stored: Sequence[StoredProfile],
        steps: Steps | None = None,
        per_step: bool = True,
    ) -> None:
        low, high = float(edges.min()), float(edges.max())
        powers = [profile for profile in stored if isinstance(profile, PowerFunction)]
        self._gamma = max((profile.gamma for profile in powers), default=-1.0)
        jumps = np.concatenate(
            [np.zeros(0), *(getattr(profile, "jumps", ()) for profile in stored)]
        )
        points = evenly_chosen(np.unique(jumps), MOST_POINTS)
        if steps is None:
            self.instant = INSTANT
            before = points - INSTANT
        else:
            self.instant = float(steps.stride)
            before = steps.clock.time_at(steps.clock.step_at(points) - steps.stride)
        steps = steps if per_step else None
        bends = () if steps is None else steps.clock.times
        cuts = np.concatenate((edges, [profile.t for profile in stored], points, before, bends))
        base = np.unique(np.clip(cuts, low, high))
        few = np.zeros(base.size - 1, dtype=bool)
        count = np.zeros(base.size, dtype=np.int64)
        self._before = np.zeros(0)
        self._after = np.zeros(0)
        self._stride = 0.0
        if steps is not None:
            # An update exactly at an edge belongs to the interval that ends there.
            count = np.floor(steps.clock.step_at(base) / steps.stride * (1 + EQUAL) + EQUAL).astype(
                np.int64
            )
            few = np.diff(count) <= FEW
            spans = zip(count[:-1][few], count[1:][few], strict=True)
            number = np.concatenate([np.zeros(0), *(np.arange(a, b) for a, b in spans)])
            self._before = np.maximum(steps.clock.time_at(number * steps.stride), low)
            self._after, self._stride = (
                steps.clock.time_at((number + 1) * steps.stride),
                float(steps.stride),
            )
        self.edges = _cut(base, few, powers)
        widths = np.diff(self.edges)
        # Steps per time in each interval.
        self._density = (
            np.ones(widths.size)
            if steps is None
            else np.diff(steps.clock.step_at(self.edges)) / widths
        )
        listed = np.repeat(np.searchsorted(self.edges, base[:-1][few]), np.diff(count)[few])
        x, w = _gauss(_ORDER if powers else 1)
        self._order, self._cells = (
            x.size,
            np.flatnonzero(~few[np.searchsorted(base, self.edges[1:]) - 1]),
        )
        half = widths[self._cells, None] / 2
        self._s = (self.edges[self._cells, None] + half * (1 + x)).ravel()
        self._width = half * w
        self.interval = np.append(np.repeat(self._cells, x.size), listed)
        by_time = (self._width * self._density[self._cells, None]).ravel()
        self.weight = np.append(by_time, np.full(listed.size, self._stride))

    def columns(self, profiles: Sequence[Profile], mass: bool) -> FloatArray:
        """Return each stored profile's mass after each node, or its `mass` there per step, per time
        without a clock.

        The shape is [M, n].
        """
        begin, end = self.edges[self._cells], self.edges[self._cells + 1]
        columns = []
        for profile in profiles:
            if not mass:
                inside = profile.tail(self._s)
            elif isinstance(profile, PowerFunction):
                inside = profile.density(self._s) / self._density[self.interval[: self._s.size]]
            else:
                inside = np.repeat(
                    (profile.tail(begin) - profile.tail(end)) / (end - begin), self._order
                )
                inside /= self._density[self.interval[: self._s.size]]
            columns.append(np.append(inside, self._listed(profile, mass)))
        return np.stack(columns, axis=1)

    def goal(self, target: Profile, mass: bool) -> tuple[FloatArray, FloatArray]:
        """Return a target's values for `columns`, [M], and the integral of the square that they
        miss, [K].

        Values inside intervals are those of the nearest polynomial there: sum_j value_j l_j with
        Lagrange's l_j, which are orthogonal with squared norms `_width`, and with Legendre's P_k
        l_j(x) = w_j sum_k (2 k + 1) / 2 P_k(x_j) P_k(x).
        """
        if (
            isinstance(target, PowerFunction)
            and target.gamma <= self._gamma
            and target.t in self.edges
        ):
            return self.columns([target], mass)[:, 0], np.zeros(self.edges.size - 1)
        s, weights, home = _resolving_nodes(target, self.edges)
        inside = np.isin(home, self._cells)
        s, weights, home = s[inside], weights[inside], home[inside]
        begin, end, density = self.edges[home], self.edges[home + 1], self._density[home]
        if mass:
            # The mass of an update is spread over it: a density that grows without bound, as at the
            # start of a 1-sqrt decay, has no integrable square, although the mass of each update is
            # finite.
            reach = np.maximum(_STEP * (end - begin), self._stride / 2 / density)
            low, high = np.maximum(s - reach, begin), np.minimum(s + reach, end)
            steps = np.maximum(high - low, 1e-300) * density  # 0 in the last digits before an end
            values = (target.tail(low) - target.tail(high)) / steps
        else:
            values = target.tail(s)
        nodes, w = _gauss(self._order)
        x = (2 * s - begin - end) / (end - begin)
        at, of = (
            np.polynomial.legendre.legvander(points, self._order - 1) for points in (x, nodes)
        )
        lagrange = at @ ((np.arange(self._order) + 0.5)[:, None] * of.T * w)
        cells, sums = np.searchsorted(self._cells, home), np.zeros_like(self._width)
        np.add.at(sums, cells, lagrange * (values * weights)[:, None])
        at_nodes = sums / self._width
        left = values - np.sum(lagrange * at_nodes[cells], axis=1)
        missed = np.bincount(home, left**2 * weights * density, self.edges.size - 1)
        return np.append(at_nodes.ravel(), self._listed(target, mass)), np.asarray(
            missed, dtype=np.float64
        )

    def _listed(self, profile: Profile, mass: bool) -> FloatArray:
        """Return what `columns` has of each listed update; 0 for power functions that end before
        the update."""
        end = profile.t * (1 + EQUAL) if isinstance(profile, PowerFunction) else np.inf
        before, after = (
            np.where(self._after <= end, profile.tail(s), 0.0) for s in (self._before, self._after)
        )
        return (before - after) / (self._stride or 1.0) if mass else before


def evenly_chosen(values: FloatArray, most: int) -> FloatArray:
    """Return at most so many of the values, both ends included."""
    return np.asarray(
        values[np.linspace(0, values.size - 1, min(values.size, most)).round().astype(np.intp)]
    )


def _cut(
    edges: FloatArray, few: npt.NDArray[np.bool_], powers: Sequence[PowerFunction]
) -> FloatArray:
    """Return edges between which log(s / t)**(gamma + 1) changes by at most `_FALL`, except in
    intervals of `few`."""
    cuts = [edges]
    for steep in {profile.gamma + 1 for profile in powers}:
        for begin, end in zip(edges[:-1][~few].tolist(), edges[1:][~few].tolist(), strict=True):
            fall = min(_FALLEN, steep * np.log(end / begin)) if begin > 0 else _FALLEN
            if fall > _FALL:
                count = np.ceil(fall / _FALL)
                cuts.append(
                    end * np.exp(-np.arange(1, count + (begin <= 0)) * fall / count / steep)
                )
    return np.unique(np.concatenate(cuts))


def _resolving_nodes(
    profile: Profile, edges: FloatArray
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.intp]]:
    """Return nodes and weights for integrals of a target between `edges`, and each node's interval:
    shape [M] each.

    The intervals are cut at quantiles of the mass, evenly spaced ones and others that approach 0
    and 1 geometrically: that resolves an average over a few of thousands of steps, and finds the
    edges of a window up to rounding.
    """
    geometric = np.exp2(-np.arange(1.0, 50.0))
    levels = np.unique(np.concatenate((np.linspace(0, 1, 65)[1:-1], geometric, 1 - geometric)))
    if isinstance(profile, PowerFunction):
        quantiles = np.clip(
            profile.t * (1 - levels) ** (1 / (profile.gamma + 1)), edges[0], edges[-1]
        )
    else:
        low, quantiles = np.full(levels.size, edges[0]), np.full(levels.size, edges[-1])
        for _ in range(100):  # bisections, to the last bit
            middle = (low + quantiles) / 2
            above = profile.tail(middle) > levels
            low, quantiles = np.where(above, middle, low), np.where(above, quantiles, middle)
    cuts = np.unique(np.concatenate((edges, quantiles)))
    abscissae, weights = _gauss(_FINE)
    half = np.diff(cuts)[:, None] / 2
    points = (cuts[:-1, None] + half) + half * abscissae
    interval = np.searchsorted(edges, cuts[:-1], side="right") - 1
    return points.ravel(), (half * weights).ravel(), np.repeat(interval, _FINE)


_gauss = lru_cache(np.polynomial.legendre.leggauss)


def relative_width(profile: Profile, t: float) -> float:
    """Return the standard deviation of a profile within (0, t], as a fraction of `t`, mass at its
    start included."""
    # With F = 1 - tail, by partial integration the mean is t - integral F and the mean square t^2 -
    # 2 integral s F.
    points, weights, _ = _resolving_nodes(profile, np.array([0.0, t]))
    below = (1 - profile.tail(points)) * weights
    mean = t - float(below.sum())
    return float(np.sqrt(max(t * t - 2 * float(below @ points) - mean**2, 0.0))) / t
