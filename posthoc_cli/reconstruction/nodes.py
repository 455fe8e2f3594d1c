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
from numpy.polynomial.legendre import leggauss, legvander

from posthoc_cli.profiles import FloatArray, PowerFunction, Profile, StoredProfile
from posthoc_cli.run_clock import Clock

IndexArray = npt.NDArray[np.intp]

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
    """Updates that are nodes themselves: the times before and after each, the interval in which it
    lies, and the steps that each stands for, [L]."""

    before: FloatArray
    after: FloatArray
    interval: IndexArray
    stride: float

    @classmethod
    def none(cls) -> _Updates:
        nothing = np.zeros(0)
        no_interval = np.zeros(0, dtype=np.intp)
        return cls(nothing, nothing, no_interval, 0.0)

    @classmethod
    def in_intervals(
        cls,
        intervals: IndexArray,
        ends: FloatArray,
        until: IndexArray,
        steps: Steps,
    ) -> _Updates:
        """List the updates of some of the intervals between `ends`, which follow `until` updates
        each; no update begins before the first end."""
        first = until[intervals]
        counts = until[intervals + 1] - first
        home = np.repeat(intervals, counts)
        done = np.cumsum(counts) - counts
        index = np.arange(counts.sum()) - np.repeat(done, counts)
        number = np.repeat(first, counts) + index
        before = steps.clock.time_at(number * steps.stride)
        before = np.maximum(before, ends[0])
        after = steps.clock.time_at((number + 1) * steps.stride)
        return cls(before, after, home, float(steps.stride))

    def tails(self, profile: Profile) -> FloatArray:
        return self._at(self.before, profile)

    def masses(self, profile: Profile) -> FloatArray:
        """Compute a profile's mass on each update, per step."""
        later = self._at(self.after, profile)
        masses = self.tails(profile) - later
        return masses / (self.stride or 1.0)

    def _at(self, times: FloatArray, profile: Profile) -> FloatArray:
        """Compute a profile's tail; 0 for power functions that end before the update."""
        end = np.inf
        if isinstance(profile, PowerFunction):
            end = profile.t * (1 + EQUAL)
        tails = profile.tail(times)
        return np.where(self.after <= end, tails, 0.0)


class _Points(NamedTuple):
    """Points at which a target is integrated: times, weights and the interval of each, [P]."""

    s: FloatArray
    weights: FloatArray
    home: IndexArray


class Nodes:
    """Times within (edges[0], edges[-1]], by which integrals over stored profiles and targets are
    sums.

    The intervals end at the given edges, at the stored profiles' times, at their points of mass and
    one update before these, over which such mass is spread, where the clock bends, and often enough
    for each power function to be a polynomial between them. Intervals of few updates have the
    updates as nodes, which follow all others.

    `instant` is the number of steps, or the time without `steps`, that a point of mass is spread
    over; `edges` are the ends of the intervals, [K + 1]; `interval` is the interval of each node,
    [M]; `weight` the steps that it stands for, [M]; without `steps`, or if not `per_step`, its
    time.
    """

    def __init__(
        self,
        edges: FloatArray,
        stored: Sequence[StoredProfile],
        steps: Steps | None = None,
        per_step: bool = True,
    ) -> None:
        powers = [profile for profile in stored if isinstance(profile, PowerFunction)]
        gammas = [profile.gamma for profile in powers]
        self._gamma = max(gammas, default=-1.0)
        self._order = _ORDER if powers else 1
        self.instant = INSTANT if steps is None else float(steps.stride)
        base = _ends_of_mass(edges, stored, steps)
        few = np.zeros(base.size - 1, dtype=bool)
        self._updates = _Updates.none()
        steps = steps if per_step else None
        if steps is not None:
            start = base[0]
            last = base[-1]
            bends = np.clip(steps.clock.times, start, last)
            base = np.union1d(base, bends)
            until = _updates_until(base, steps)
            few = np.diff(until) <= FEW
            summed = np.flatnonzero(few)
            self._updates = _Updates.in_intervals(summed, base, until, steps)
        self.edges = _cut(base, few, powers)
        self._density = _steps_per_time(self.edges, steps)
        self._set_nodes(base, few)

    def _set_nodes(
        self,
        base: FloatArray,
        few: npt.NDArray[np.bool_],
    ) -> None:
        """Set the interval and the weight of each node; updates come last."""
        ends = self.edges[1:]
        home = np.searchsorted(base, ends) - 1
        is_cell = ~few[home]
        self._cells = np.flatnonzero(is_cell)
        by_time = self._place_in_cells()
        of_cells = np.repeat(self._cells, self._order)
        begins = base[self._updates.interval]
        of_updates = np.searchsorted(self.edges, begins)
        by_update = np.full(of_updates.size, self._updates.stride)
        self.interval = np.append(of_cells, of_updates)
        self.weight = np.append(by_time, by_update)

    def _place_in_cells(self) -> FloatArray:
        """Place nodes in the intervals whose updates are not nodes; return their weights:
        [cells, order]."""
        x, w = _gauss(self._order)
        begin = self.edges[self._cells, None]
        end = self.edges[self._cells + 1, None]
        half_width = (end - begin) / 2
        times = begin + half_width * (1 + x)
        self._s = times.ravel()
        self._width = half_width * w
        density = self._density[self._cells, None]
        return self._width * density

    def tails(self, profiles: Sequence[Profile]) -> FloatArray:
        """Compute each stored profile's mass after each node: shape [M, n]."""
        columns = [self._tail(profile) for profile in profiles]
        return np.stack(columns, axis=1)

    def _tail(self, profile: Profile) -> FloatArray:
        inside = profile.tail(self._s)
        of_updates = self._updates.tails(profile)
        return np.append(inside, of_updates)

    def masses(self, profiles: Sequence[Profile]) -> FloatArray:
        """Compute each stored profile's mass at each node per step, or per time without a clock:
        shape [M, n]."""
        columns = [self._mass(profile) for profile in profiles]
        return np.stack(columns, axis=1)

    def _mass(self, profile: Profile) -> FloatArray:
        if isinstance(profile, PowerFunction):
            per_time = profile.density(self._s)
        else:
            begin = self.edges[self._cells]
            end = self.edges[self._cells + 1]
            mass = profile.tail(begin) - profile.tail(end)
            mean = mass / (end - begin)
            per_time = np.repeat(mean, self._order)
        interval = self.interval[: per_time.size]
        inside = per_time / self._density[interval]
        of_updates = self._updates.masses(profile)
        return np.append(inside, of_updates)

    def project_tail(self, target: Profile) -> tuple[FloatArray, FloatArray]:
        """Compute a target's values for `tails`, [M], and the integral of the square that they
        miss, [K]; see `_project`."""
        if self._is_polynomial(target):
            nothing = np.zeros(self.edges.size - 1)
            return self._tail(target), nothing
        points = self._place_points(target)
        tails = target.tail(points.s)
        inside, residual = self._project(points, tails)
        of_updates = self._updates.tails(target)
        return np.append(inside, of_updates), residual

    def project_mass(self, target: Profile) -> tuple[FloatArray, FloatArray]:
        """Compute a target's values for `masses`, [M], and the integral of the square that they
        miss, [K].

        The mass of an update is spread over it: a density that grows without bound, as at the start
        of a 1-sqrt decay, has no integrable square, although the mass of each update is finite.
        """
        if self._is_polynomial(target):
            nothing = np.zeros(self.edges.size - 1)
            return self._mass(target), nothing
        points = self._place_points(target)
        begin = self.edges[points.home]
        end = self.edges[points.home + 1]
        density = self._density[points.home]
        half_update = self._updates.stride / 2 / density
        step = _STEP * (end - begin)
        reach = np.maximum(step, half_update)
        low = np.maximum(points.s - reach, begin)
        high = np.minimum(points.s + reach, end)
        width = np.maximum(high - low, 1e-300)  # 0 in the last digits before an end
        mass = target.tail(low) - target.tail(high)
        steps = width * density
        inside, residual = self._project(points, mass / steps)
        of_updates = self._updates.masses(target)
        return np.append(inside, of_updates), residual

    def _is_polynomial(self, target: Profile) -> bool:
        if not isinstance(target, PowerFunction):
            return False
        return target.gamma <= self._gamma and target.t in self.edges

    def _place_points(self, target: Profile) -> _Points:
        """Choose points that resolve a target, in intervals whose updates are not nodes."""
        points = _resolving_points(target, self.edges)
        inside = np.isin(points.home, self._cells)
        s = points.s[inside]
        weights = points.weights[inside]
        return _Points(s, weights, points.home[inside])

    def _project(
        self,
        points: _Points,
        values: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Compute the nearest polynomial's values at the nodes inside intervals, and the integral
        of the square that it misses, [K].

        The polynomial is sum_j value_j l_j with Lagrange's l_j, which are orthogonal with squared
        norms `_width`, and with Legendre's P_k l_j(x) = w_j sum_k (2 k + 1) / 2 P_k(x_j) P_k(x).
        """
        home = points.home
        begin = self.edges[home]
        end = self.edges[home + 1]
        from_middle = 2 * points.s - begin - end
        x = from_middle / (end - begin)
        lagrange = _lagrange_polynomials(x, self._order)
        cells = np.searchsorted(self._cells, home)
        weighted = values * points.weights
        products = lagrange * weighted[:, None]
        sums = np.zeros_like(self._width)
        np.add.at(sums, cells, products)
        at_nodes = sums / self._width
        terms = lagrange * at_nodes[cells]
        left = values - np.sum(terms, axis=1)
        density = self._density[home]
        squares = left**2 * points.weights * density
        intervals = self.edges.size - 1
        residual = np.bincount(home, squares, intervals)
        return at_nodes.ravel(), residual.astype(np.float64)


def _lagrange_polynomials(x: FloatArray, order: int) -> FloatArray:
    """Evaluate at `x`, in [-1, 1], the polynomials that are 1 at one of the nodes of an interval,
    and 0 at the others: shape [points, order]."""
    nodes, w = _gauss(order)
    degree = order - 1
    at_points = legvander(x, degree)
    at_nodes = legvander(nodes, degree)
    norms = np.arange(order) + 0.5
    coefficients = norms[:, None] * at_nodes.T * w
    return np.asarray(at_points @ coefficients)


def _ends_of_mass(
    edges: FloatArray,
    stored: Sequence[StoredProfile],
    steps: Steps | None,
) -> FloatArray:
    """Add to these edges the times between them at which stored profiles end, and points of mass
    begin and end."""
    nothing = np.zeros(0)
    jumps = [getattr(profile, "jumps", nothing) for profile in stored]
    distinct = np.unique(np.concatenate(jumps))
    points = evenly_chosen(distinct, MOST_POINTS)
    if steps is None:
        before = points - INSTANT
    else:
        step = steps.clock.step_at(points)
        before = steps.clock.time_at(step - steps.stride)
    times = [profile.t for profile in stored]
    cuts = np.concatenate((edges, times, points, before))
    first = edges.min()
    last = edges.max()
    return np.unique(cuts.clip(first, last))


def _updates_until(times: FloatArray, steps: Steps) -> IndexArray:
    """Count the updates until each time; one exactly at a time is before it."""
    count = steps.clock.step_at(times) / steps.stride
    raised = count * (1 + EQUAL) + EQUAL
    return np.floor(raised).astype(np.intp)


def _steps_per_time(edges: FloatArray, steps: Steps | None) -> FloatArray:
    if steps is None:
        return np.ones(edges.size - 1)
    ends = steps.clock.step_at(edges)
    lengths = np.diff(edges)
    return np.asarray(np.diff(ends) / lengths)


def evenly_chosen(values: FloatArray, most: int) -> FloatArray:
    """Choose at most `most` of the values, both ends included."""
    count = min(values.size, most)
    places = np.linspace(0, values.size - 1, count)
    indices = places.round().astype(np.intp)
    return np.asarray(values[indices])


def _cut(
    edges: FloatArray,
    few: npt.NDArray[np.bool_],
    powers: Sequence[PowerFunction],
) -> FloatArray:
    """Add edges until log(s / t)**(gamma + 1) changes by at most `_FALL` between them, except in
    intervals of `few`."""
    cuts = [edges]
    begins = edges[:-1]
    ends = edges[1:]
    for steep in {profile.gamma + 1 for profile in powers}:
        for index in np.flatnonzero(~few):
            between = _cuts_between(float(begins[index]), float(ends[index]), steep)
            cuts.append(between)
    return np.unique(np.concatenate(cuts))


def _cuts_between(begin: float, end: float, steep: float) -> FloatArray:
    """Find times in an interval between which log(s / t)**steep changes by at most `_FALL`."""
    fall = _FALLEN
    if begin > 0:
        change = steep * np.log(end / begin)
        fall = min(fall, change)
    if fall <= _FALL:
        return np.zeros(0)
    count = np.ceil(fall / _FALL)
    last = count if begin > 0 else count + 1
    falls = np.arange(1, last) * fall / count
    relative = np.exp(-falls / steep)
    return np.asarray(end * relative)


def _resolving_points(profile: Profile, edges: FloatArray) -> _Points:
    """Choose points for integrals of a target between `edges`.

    The intervals are cut at quantiles of the mass, evenly spaced ones and others that approach 0
    and 1 geometrically: that resolves an average over a few of thousands of steps, and finds the
    edges of a window up to rounding.
    """
    even = np.arange(1, 64) / 64
    halvings = np.arange(1.0, 50.0)
    geometric = np.exp2(-halvings)
    levels = np.concatenate((even, geometric, 1 - geometric))
    quantiles = _quantiles(profile, np.unique(levels), edges)
    cuts = np.union1d(edges, quantiles)
    begins = cuts[:-1]
    x, w = _gauss(_FINE)
    half_width = np.diff(cuts)[:, None] / 2
    middle = begins[:, None] + half_width
    times = middle + half_width * x
    widths = half_width * w
    begun = np.searchsorted(edges, begins, side="right")
    home = np.repeat(begun - 1, _FINE)
    return _Points(times.ravel(), widths.ravel(), home)


def _quantiles(profile: Profile, levels: FloatArray, edges: FloatArray) -> FloatArray:
    """Find the times between `edges` after which a profile has the mass of each level."""
    low = edges[0]
    high = edges[-1]
    if isinstance(profile, PowerFunction):
        power = 1 / (profile.gamma + 1)
        times = profile.t * (1 - levels) ** power
        return np.clip(times, low, high)
    begin = np.full(levels.size, low)
    end = np.full(levels.size, high)
    for _ in range(100):  # bisections, to the last bit
        middle = (begin + end) / 2
        tail = profile.tail(middle)
        above = tail > levels
        begin = np.where(above, middle, begin)
        end = np.where(above, end, middle)
    return end


_gauss = lru_cache(leggauss)


def relative_width(profile: Profile, t: float) -> float:
    """Compute the standard deviation of a profile within (0, t], as a fraction of `t`, mass at its
    start included."""
    # With F = 1 - tail, by partial integration the mean is t - integral F and the mean square t^2 -
    # 2 integral s F.
    edges = np.array([0.0, t])
    points = _resolving_points(profile, edges)
    below = 1 - profile.tail(points.s)
    weighted = below * points.weights
    mean = t - float(weighted.sum())
    moment = float(weighted @ points.s)
    mean_square = t * t - 2 * moment
    variance = max(mean_square - mean**2, 0.0)
    return float(np.sqrt(variance)) / t
