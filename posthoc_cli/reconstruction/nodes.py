"""The nodes at which the solver evaluates tails: every integral over training is a weighted sum over them.

Motion is modelled per step, not per unit of time, since a clock may advance while nothing is trained. Over the usual
hundreds of updates between snapshots, integrals over time are as good as sums over updates. Intervals with only a few
updates are summed instead, since an average ignores how the network moved between updates: their updates are the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import Clock, FloatArray, PowerFunction, Profile, StoredProfile

FEW = 8
"""Intervals of at most this many updates are summed. With more updates, integral and sum differ by less than 10 %."""

_ORDER = 8
"""Gauss-Legendre nodes in an interval in which power functions vary; where all stored profiles are constant, one."""

_FALL = 2.0
"""Limit of the change of log(mass) within an interval. With exp(2 _FALL u), u in [0, 1], for the product of two
profiles, the error of 8 nodes, (2 _FALL)^16 8!^4 / (17 16!^3), is 1e-13 of the largest value."""

_FALLEN = 32.0
"""A power function that has fallen by exp(-32) is 0 in float64."""

MOST_POINTS = 16_384
"""Limit of the points of mass that intervals end at; among more points, evenly spaced ones are chosen."""

_SAME = 1e-9
"""Relative difference below which two times, or numbers of updates, are equal."""


@dataclass(frozen=True)
class Steps:
    """A run's clock, and the steps between its updates."""

    clock: Clock
    stride: int = 1


def points_of(profiles: Iterable[StoredProfile]) -> FloatArray:
    """Return the distinct times at which the profiles have mass, in ascending order, at most MOST_POINTS."""
    points = np.unique(np.concatenate([np.zeros(0), *(getattr(profile, "jumps", ()) for profile in profiles)]))
    if points.size <= MOST_POINTS:
        return points
    return np.asarray(points[np.linspace(0, points.size - 1, MOST_POINTS).round().astype(np.intp)])


class Nodes:
    """Times within (edges[0], edges[-1]] with weights, for stored profiles and the targets made of them.

    The intervals end at the given edges, at the stored profiles' times, at their points of mass and one update before
    these, over which such mass is spread, where the clock bends, and often enough for each power function to be a
    polynomial between them.

    Attributes:
        edges: ends of the intervals, ascending: shape [K + 1].
        interval: of each node: shape [M].
        weight: the steps that each node stands for; without `steps`, or if not `per_step`, its time: shape [M].
    """

    def __init__(
        self, edges: FloatArray, stored: Sequence[StoredProfile], steps: Steps | None = None, per_step: bool = True
    ) -> None:
        low, high = float(edges.min()), float(edges.max())
        powers = [profile for profile in stored if isinstance(profile, PowerFunction)]
        self._gamma = max((profile.gamma for profile in powers), default=-1.0)
        points = points_of(stored)
        spread = points - 1 if steps is None else steps.clock.time_at(steps.clock.step_at(points) - steps.stride)
        steps = steps if per_step else None
        bends = () if steps is None else steps.clock.times
        cuts = np.concatenate((edges, [profile.t for profile in stored], points, spread, bends))
        base = np.unique(np.clip(cuts, low, high))
        few, density, listed = np.zeros(base.size - 1, dtype=bool), np.ones(0), np.zeros(0, dtype=np.intp)
        self._before = self._after = np.zeros(0)
        self._stride = 0.0
        if steps is not None:
            # An update exactly at an edge belongs to the interval that ends there.
            count = np.floor(steps.clock.step_at(base) / steps.stride * (1 + _SAME) + _SAME).astype(np.int64)
            few = np.diff(count) <= FEW
            spans = zip(count[:-1][few], count[1:][few], strict=True)
            number = np.concatenate([np.zeros(0), *(np.arange(a, b) for a, b in spans)])
            self._before = np.maximum(steps.clock.time_at(number * steps.stride), low)
            self._after, self._stride = steps.clock.time_at((number + 1) * steps.stride), float(steps.stride)
        self.edges = _cut(base, few, powers)
        widths = np.diff(self.edges)
        if steps is not None:
            listed = np.repeat(np.searchsorted(self.edges, base[:-1][few]), np.diff(count)[few])
            density = np.diff(steps.clock.step_at(self.edges)) / widths
        few = few[np.searchsorted(base, self.edges[1:]) - 1]
        x, w = _gauss(_ORDER if powers else 1)
        self._order, self._cells = x.size, np.flatnonzero(~few)
        half = widths[self._cells, None] / 2
        self._s = (self.edges[self._cells, None] + half * (1 + x)).ravel()
        self._width = (half * w).ravel()
        self.interval = np.append(np.repeat(self._cells, x.size), listed)
        self._density = np.repeat(np.ones(self._cells.size) if steps is None else density[self._cells], x.size)
        self.weight = np.append(self._width * self._density, np.full(listed.size, self._stride))

    def tails(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return the mass of each stored profile after each node: shape [M, n]."""
        return np.stack([np.append(p.tail(self._s), self._listed(p, self._before)) for p in profiles], axis=1)

    def masses(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return the mass of each stored profile per step, without a clock per time, at each node: shape [M, n]."""
        return np.stack([self._mass(profile) for profile in profiles], axis=1)

    def goal_tails(self, target: Profile) -> tuple[FloatArray, FloatArray]:
        """Return the values of a target for `tails`, [M], and the integral of the square that these miss, [K]."""
        if self._is_resolved(target):
            return self.tails([target])[:, 0], np.zeros(self.edges.size - 1)
        values, missed = self._projected(target, lambda s, _: target.tail(s))
        return np.append(values, self._listed(target, self._before)), missed

    def goal_masses(self, target: Profile) -> tuple[FloatArray, FloatArray]:
        """Return the values of a target for `masses`, [M], and the integral of the square that these miss, [K].

        With a clock, the mass of an update is spread over it: a density that grows without bound, as at the start of a
        1-sqrt decay, has no integrable square, although the mass of each update is finite.
        """
        if self._is_resolved(target):
            return self.masses([target])[:, 0], np.zeros(self.edges.size - 1)
        per_step = np.ones(self.edges.size - 1)
        per_step[self._cells] = self._density[:: self._order]

        def mass(s: FloatArray, home: npt.NDArray[np.intp]) -> FloatArray:
            begin, end = self.edges[home], self.edges[home + 1]
            reach = np.maximum(_STEP * (end - begin), self._stride / 2 / per_step[home])
            low, high = np.maximum(s - reach, begin), np.minimum(s + reach, end)
            steps = np.maximum(high - low, 1e-300) * per_step[home]  # 0 in the last digits before an end
            return np.asarray((target.tail(low) - target.tail(high)) / steps)

        values, missed = self._projected(target, mass)
        return np.append(values, self._listed_mass(target)), missed

    def _is_resolved(self, target: Profile) -> bool:
        return isinstance(target, PowerFunction) and target.gamma <= self._gamma and target.t in self._ends

    @cached_property
    def _ends(self) -> set[float]:
        return set(self.edges.tolist())

    def _mass(self, profile: Profile) -> FloatArray:
        if isinstance(profile, PowerFunction):
            inside = profile.density(self._s)
        else:
            begin, end = self.edges[self._cells], self.edges[self._cells + 1]
            inside = np.repeat((profile.tail(begin) - profile.tail(end)) / (end - begin), self._order)
        return np.append(inside / self._density, self._listed_mass(profile))

    def _listed_mass(self, profile: Profile) -> FloatArray:
        """Return the mass of each listed update, per step."""
        return (self._listed(profile, self._before) - self._listed(profile, self._after)) / (self._stride or 1.0)

    def _listed(self, profile: Profile, s: FloatArray) -> FloatArray:
        """Return the tail before or after each listed update; 0 for power functions that end before the update."""
        end = profile.t * (1 + _SAME) if isinstance(profile, PowerFunction) else np.inf
        return np.where(self._after <= end, profile.tail(s), 0.0)

    def _projected(
        self, target: Profile, value: Callable[[FloatArray, npt.NDArray[np.intp]], FloatArray]
    ) -> tuple[FloatArray, FloatArray]:
        """Return the polynomial nearest to a function on each interval, at its nodes, and the squares missed, [K].

        A polynomial is sum_j value_j l_j with Lagrange's l_j, which are orthogonal with squared norms `_width`.
        """
        s, weights, home = resolving_nodes(target, self.edges)
        place = np.full(self.edges.size - 1, -1)
        place[self._cells] = np.arange(self._cells.size)
        inside = place[home] >= 0
        s, weights, home = s[inside], weights[inside], home[inside]
        begin, end = self.edges[home], self.edges[home + 1]
        lagrange = _lagrange((2 * s - begin - end) / (end - begin), self._order)
        values, cells = value(s, home), place[home]
        sums = np.zeros((self._cells.size, self._order))
        np.add.at(sums, cells, lagrange * (values * weights)[:, None])
        at_nodes = sums / self._width.reshape(sums.shape)
        left = values - np.sum(lagrange * at_nodes[cells], axis=1)
        scale = self._density[:: self._order][cells]
        missed = np.bincount(home, left**2 * weights * scale, self.edges.size - 1)
        return at_nodes.ravel(), np.asarray(missed, dtype=np.float64)


def _cut(edges: FloatArray, few: npt.NDArray[np.bool_], powers: Sequence[PowerFunction]) -> FloatArray:
    """Return edges between which log(s / t)**(gamma + 1) changes by at most `_FALL` for each power function.

    Intervals with `few` updates, [K], are left as they are.
    """
    cuts = [edges]
    for steep in {profile.gamma + 1 for profile in powers}:
        for begin, end in zip(edges[:-1][~few].tolist(), edges[1:][~few].tolist(), strict=True):
            fall = min(_FALLEN, steep * np.log(end / begin)) if begin > 0 else _FALLEN
            if fall > _FALL:
                count = np.ceil(fall / _FALL)
                cuts.append(end * np.exp(-np.arange(1, count + (begin <= 0)) * fall / count / steep))
    return np.unique(np.concatenate(cuts))


def _lagrange(x: FloatArray, order: int) -> FloatArray:
    """Return Lagrange's polynomials of the Gauss nodes at x in [-1, 1], from Legendre's: shape [x, order].

    l_j(x) = w_j sum_k (2 k + 1) / 2 P_k(x_j) P_k(x).
    """
    nodes, weights = _gauss(order)
    at, of = (np.polynomial.legendre.legvander(points, order - 1) for points in (x, nodes))
    return np.asarray(at @ ((np.arange(order) + 0.5)[:, None] * of.T * weights))


# --- nodes for one target ---------------------------------------------------------------------------

_STEP = 1e-6
"""Half the width of the difference quotient for a target's density, as a fraction of its interval."""

_FINE = 16
"""Number of Gauss-Legendre nodes in each section of an interval, for a target."""

_BISECTIONS = 100


def resolving_nodes(profile: Profile, edges: FloatArray) -> tuple[FloatArray, FloatArray, npt.NDArray[np.intp]]:
    """Return nodes and weights for integrals between `edges`, and the index of each node's interval: shape [M] each.

    The intervals are cut at quantiles of the profile's mass: evenly spaced levels, and levels that approach 0 and 1
    geometrically. That resolves an average over a few of thousands of steps, and finds the edges of a window up to
    rounding.
    """
    geometric = np.exp2(-np.arange(1.0, 50.0))
    levels = np.unique(np.concatenate((np.linspace(0, 1, 65)[1:-1], geometric, 1 - geometric)))
    cuts = np.unique(np.concatenate((edges, _quantiles(profile, levels, float(edges[0]), float(edges[-1])))))
    abscissae, weights = _gauss(_FINE)
    half = np.diff(cuts)[:, None] / 2
    points = (cuts[:-1, None] + half) + half * abscissae
    interval = np.searchsorted(edges, cuts[:-1], side="right") - 1
    return points.reshape(-1), (half * weights).reshape(-1), np.repeat(interval, _FINE)


def _quantiles(profile: Profile, levels: FloatArray, begin: float, end: float) -> FloatArray:
    """Return the times in [begin, end] from which on the tail is at most each of the levels: shape of `levels`."""
    if isinstance(profile, PowerFunction):
        return np.clip(profile.t * (1 - levels) ** (1 / (profile.gamma + 1)), begin, end)
    low, high = np.full(levels.size, begin), np.full(levels.size, end)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = profile.tail(middle) > levels
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return high


@lru_cache
def _gauss(order: int) -> tuple[FloatArray, FloatArray]:
    """Return the nodes and weights of Gauss-Legendre quadrature on [-1, 1]: shape [order] each."""
    return np.polynomial.legendre.leggauss(order)


def relative_width(profile: Profile, t: float) -> float:
    """Return the standard deviation of a profile within (0, t], as a fraction of `t`, mass at its start included.

    With F = 1 - tail, by partial integration the mean is t - integral F and the mean square t^2 - 2 integral s F.
    """
    points, weights, _ = resolving_nodes(profile, np.array([0.0, t]))
    below = (1 - profile.tail(points)) * weights
    mean = t - float(below.sum())
    return float(np.sqrt(max(t * t - 2 * float(below @ points) - mean**2, 0.0))) / t
