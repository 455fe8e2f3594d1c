"""The nodes over which integrals over stored profiles and targets are sums.

Motion is modelled per step, not per time, since a clock may advance while nothing is trained.
Over hundreds of updates, integrals over time are as good as sums over updates. Over few they are
not, since an average ignores how the network moved between updates: these updates are the nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

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

_ORDER = 8
_FINE = 16
"""Gauss-Legendre nodes in an interval, one where all stored profiles are constant, and in a section
for a target."""

_FALL = 2.0
_FALLEN = 32.0
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


@dataclass(frozen=True)
class _Updates:
    """Updates that are nodes themselves: the times before and after each, [L], and the steps that
    each stands for."""

    before: FloatArray
    after: FloatArray
    stride: float

    @classmethod
    def none(cls) -> _Updates:
        return cls(np.zeros(0), np.zeros(0), 0.0)

    @classmethod
    def numbered(cls, numbers: FloatArray, steps: Steps, low: float) -> _Updates:
        """Return the updates that follow so many updates each; none begins before `low`."""
        before = np.maximum(steps.clock.time_at(numbers * steps.stride), low)
        after = steps.clock.time_at((numbers + 1) * steps.stride)
        return cls(before, after, float(steps.stride))

    def tails(self, profile: Profile) -> FloatArray:
        return self._at(self.before, profile)

    def masses(self, profile: Profile) -> FloatArray:
        """Return a profile's mass on each update, per step."""
        masses = self.tails(profile) - self._at(self.after, profile)
        return masses / (self.stride or 1.0)

    def _at(self, times: FloatArray, profile: Profile) -> FloatArray:
        """Return a profile's tail; 0 for power functions that end before the update."""
        end = np.inf
        if isinstance(profile, PowerFunction):
            end = profile.t * (1 + EQUAL)
        return np.where(self.after <= end, profile.tail(times), 0.0)


class _Points(NamedTuple):
    """Points at which a target is integrated: times, weights and the interval of each, [P]."""

    s: FloatArray
    weights: FloatArray
    home: npt.NDArray[np.intp]


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
        low = float(edges.min())
        high = float(edges.max())
        powers = [profile for profile in stored if isinstance(profile, PowerFunction)]
        self._gamma = max((profile.gamma for profile in powers), default=-1.0)
        jumps = [getattr(profile, "jumps", np.zeros(0)) for profile in stored]
        points = evenly_chosen(np.unique(np.concatenate(jumps)), MOST_POINTS)
        if steps is None:
            self.instant = INSTANT
            before = points - INSTANT
        else:
            self.instant = float(steps.stride)
            before = steps.clock.time_at(steps.clock.step_at(points) - steps.stride)
        if not per_step:
            steps = None
        bends = () if steps is None else steps.clock.times
        times = [profile.t for profile in stored]
        cuts = np.concatenate((edges, times, points, before, bends))
        base = np.unique(np.clip(cuts, low, high))
        few = np.zeros(base.size - 1, dtype=bool)
        count = np.zeros(base.size, dtype=np.int64)
        self._updates = _Updates.none()
        if steps is not None:
            count = _updates_until(base, steps)
            few = np.diff(count) <= FEW
            numbers = [np.zeros(0)]
            for first, last in zip(count[:-1][few], count[1:][few], strict=True):
                numbers.append(np.arange(first, last))
            self._updates = _Updates.numbered(np.concatenate(numbers), steps, low)
        self.edges = _cut(base, few, powers)
        self._density = _steps_per_time(self.edges, steps)
        home = np.searchsorted(base, self.edges[1:]) - 1
        self._cells = np.flatnonzero(~few[home])
        x, w = _gauss(_ORDER if powers else 1)
        self._order = x.size
        begin = self.edges[self._cells, None]
        half = np.diff(self.edges)[self._cells, None] / 2
        self._s = (begin + half * (1 + x)).ravel()
        self._width = half * w
        of_few = np.searchsorted(self.edges, base[:-1][few])
        listed = np.repeat(of_few, np.diff(count)[few])
        self.interval = np.append(np.repeat(self._cells, x.size), listed)
        by_time = self._width * self._density[self._cells, None]
        by_update = np.full(listed.size, self._updates.stride)
        self.weight = np.append(by_time, by_update)

    def tails(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return each stored profile's mass after each node: shape [M, n]."""
        return np.stack([self._tail(profile) for profile in profiles], axis=1)

    def _tail(self, profile: Profile) -> FloatArray:
        return np.append(profile.tail(self._s), self._updates.tails(profile))

    def masses(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return each stored profile's mass at each node per step, or per time without a clock:
        shape [M, n]."""
        return np.stack([self._mass(profile) for profile in profiles], axis=1)

    def _mass(self, profile: Profile) -> FloatArray:
        return np.append(self._mass_inside(profile), self._updates.masses(profile))

    def _mass_inside(self, profile: Profile) -> FloatArray:
        density = self._density[self.interval[: self._s.size]]
        if isinstance(profile, PowerFunction):
            return profile.density(self._s) / density
        begin = self.edges[self._cells]
        end = self.edges[self._cells + 1]
        mass = profile.tail(begin) - profile.tail(end)
        mean = mass / (end - begin)
        return np.repeat(mean, self._order) / density

    def goal_of_tail(self, target: Profile) -> tuple[FloatArray, FloatArray]:
        """Return a target's values for `tails`, [M], and the integral of the square that they miss,
        [K]; see `_projected`."""
        if self._is_polynomial(target):
            return self._tail(target), np.zeros(self.edges.size - 1)
        points = self._points_of(target)
        inside, missed = self._projected(points, target.tail(points.s))
        return np.append(inside, self._updates.tails(target)), missed

    def goal_of_mass(self, target: Profile) -> tuple[FloatArray, FloatArray]:
        """Return a target's values for `masses`, [M], and the integral of the square that they
        miss, [K].

        The mass of an update is spread over it: a density that grows without bound, as at the start
        of a 1-sqrt decay, has no integrable square, although the mass of each update is finite.
        """
        if self._is_polynomial(target):
            return self._mass(target), np.zeros(self.edges.size - 1)
        points = self._points_of(target)
        begin = self.edges[points.home]
        end = self.edges[points.home + 1]
        density = self._density[points.home]
        half_update = self._updates.stride / 2 / density
        reach = np.maximum(_STEP * (end - begin), half_update)
        low = np.maximum(points.s - reach, begin)
        high = np.minimum(points.s + reach, end)
        steps = np.maximum(high - low, 1e-300) * density  # 0 in the last digits before an end
        mass = target.tail(low) - target.tail(high)
        inside, missed = self._projected(points, mass / steps)
        return np.append(inside, self._updates.masses(target)), missed

    def _is_polynomial(self, target: Profile) -> bool:
        if not isinstance(target, PowerFunction):
            return False
        return target.gamma <= self._gamma and target.t in self.edges

    def _points_of(self, target: Profile) -> _Points:
        """Return points that resolve a target, in intervals whose updates are not nodes."""
        points = _resolving_points(target, self.edges)
        inside = np.isin(points.home, self._cells)
        return _Points(points.s[inside], points.weights[inside], points.home[inside])

    def _projected(self, points: _Points, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return the nearest polynomial's values at the nodes inside intervals, and the integral of
        the square that it misses, [K].

        The polynomial is sum_j value_j l_j with Lagrange's l_j, which are orthogonal with squared
        norms `_width`, and with Legendre's P_k l_j(x) = w_j sum_k (2 k + 1) / 2 P_k(x_j) P_k(x).
        """
        begin = self.edges[points.home]
        end = self.edges[points.home + 1]
        x = (2 * points.s - begin - end) / (end - begin)
        nodes, w = _gauss(self._order)
        at = np.polynomial.legendre.legvander(x, self._order - 1)
        of = np.polynomial.legendre.legvander(nodes, self._order - 1)
        norms = np.arange(self._order) + 0.5
        lagrange = at @ (norms[:, None] * of.T * w)
        cells = np.searchsorted(self._cells, points.home)
        weighted = values * points.weights
        sums = np.zeros_like(self._width)
        np.add.at(sums, cells, lagrange * weighted[:, None])
        at_nodes = sums / self._width
        left = values - np.sum(lagrange * at_nodes[cells], axis=1)
        squares = left**2 * points.weights * self._density[points.home]
        missed = np.bincount(points.home, squares, self.edges.size - 1)
        return at_nodes.ravel(), np.asarray(missed, dtype=np.float64)


def _updates_until(times: FloatArray, steps: Steps) -> npt.NDArray[np.int64]:
    """Return the number of updates until each time; one exactly at a time is before it."""
    count = steps.clock.step_at(times) / steps.stride
    return np.floor(count * (1 + EQUAL) + EQUAL).astype(np.int64)


def _steps_per_time(edges: FloatArray, steps: Steps | None) -> FloatArray:
    widths = np.diff(edges)
    if steps is None:
        return np.ones(widths.size)
    return np.asarray(np.diff(steps.clock.step_at(edges)) / widths)


def evenly_chosen(values: FloatArray, most: int) -> FloatArray:
    """Return at most so many of the values, both ends included."""
    count = min(values.size, most)
    places = np.linspace(0, values.size - 1, count).round()
    return np.asarray(values[places.astype(np.intp)])


def _cut(
    edges: FloatArray, few: npt.NDArray[np.bool_], powers: Sequence[PowerFunction]
) -> FloatArray:
    """Return edges between which log(s / t)**(gamma + 1) changes by at most `_FALL`, except in
    intervals of `few`."""
    cuts = [edges]
    begins = edges[:-1][~few].tolist()
    ends = edges[1:][~few].tolist()
    for steep in {profile.gamma + 1 for profile in powers}:
        for begin, end in zip(begins, ends, strict=True):
            fall = _FALLEN
            if begin > 0:
                fall = min(_FALLEN, steep * np.log(end / begin))
            if fall <= _FALL:
                continue
            count = np.ceil(fall / _FALL)
            places = np.arange(1, count + (begin <= 0))
            cuts.append(end * np.exp(-places * fall / count / steep))
    return np.unique(np.concatenate(cuts))


def _resolving_points(profile: Profile, edges: FloatArray) -> _Points:
    """Return points for integrals of a target between `edges`.

    The intervals are cut at quantiles of the mass, evenly spaced ones and others that approach 0
    and 1 geometrically: that resolves an average over a few of thousands of steps, and finds the
    edges of a window up to rounding.
    """
    even = np.linspace(0, 1, 65)[1:-1]
    geometric = np.exp2(-np.arange(1.0, 50.0))
    levels = np.unique(np.concatenate((even, geometric, 1 - geometric)))
    quantiles = _quantiles(profile, levels, float(edges[0]), float(edges[-1]))
    cuts = np.unique(np.concatenate((edges, quantiles)))
    abscissae, weights = _gauss(_FINE)
    half = np.diff(cuts)[:, None] / 2
    middle = cuts[:-1, None] + half
    times = (middle + half * abscissae).ravel()
    widths = (half * weights).ravel()
    interval = np.searchsorted(edges, cuts[:-1], side="right") - 1
    return _Points(times, widths, np.repeat(interval, _FINE))


def _quantiles(profile: Profile, levels: FloatArray, low: float, high: float) -> FloatArray:
    """Return the times within [low, high] after which a profile has the mass of each level."""
    if isinstance(profile, PowerFunction):
        times = profile.t * (1 - levels) ** (1 / (profile.gamma + 1))
        return np.clip(times, low, high)
    begin = np.full(levels.size, low)
    end = np.full(levels.size, high)
    for _ in range(100):  # bisections, to the last bit
        middle = (begin + end) / 2
        above = profile.tail(middle) > levels
        begin = np.where(above, middle, begin)
        end = np.where(above, end, middle)
    return end


_gauss = lru_cache(np.polynomial.legendre.leggauss)


def relative_width(profile: Profile, t: float) -> float:
    """Return the standard deviation of a profile within (0, t], as a fraction of `t`, mass at its
    start included."""
    # With F = 1 - tail, by partial integration the mean is t - integral F and the mean square t^2 -
    # 2 integral s F.
    points = _resolving_points(profile, np.array([0.0, t]))
    below = (1 - profile.tail(points.s)) * points.weights
    mean = t - float(below.sum())
    mean_square = t * t - 2 * float(below @ points.s)
    variance = max(mean_square - mean**2, 0.0)
    return float(np.sqrt(variance)) / t
