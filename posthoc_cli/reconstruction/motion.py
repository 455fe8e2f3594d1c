"""What is known about a run in addition to the profiles of its averages: the motion of its network,
fitted to measured distances or sketched by the hook, and the errors of the stored averages; and the
nodes over which integrals are summed.

Model: the weights follow a random walk with independent increments of variance v(s) ds, which
depends on the learning rate, plus noise of intensity w(s) whose memory is shorter than the time
between snapshots, as of a network that is pulled back to its path. An average is theta_i = integral
p_i(s) theta(s) ds = theta(0) + integral tail_i(s) d theta(s). The expected squared distance of two
averages, one of them stored with a rounding error of variance r_j, is

    E |theta_i - theta_j|^2 = integral v (tail_i - tail_j)^2 ds + integral w (p_i - p_j)^2 ds + r_j,

linear in v and w. With both constant on segments of training, every measured distance is a linear
equation for them. Measurements are sums over the elements of all averaged tensors (not of copied
ones), in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from posthoc_cli.profiles import (
    LONGEST,
    WINDOW,
    Clock,
    Discrete,
    FloatArray,
    OrdinaryEMA,
    Point,
    PowerFunction,
    Profile,
    StoredProfile,
    roundings,
)

# --- nodes
#
# Motion is modelled per step, not per time, since a clock may advance while nothing is trained.
# Over hundreds of updates, integrals over time are as good as sums over updates. Over few they are
# not, since an average ignores how the network moved between updates: these updates are the nodes.

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

_EQUAL, _STEP = 1e-9, 1e-6
"""Relative difference below which two times, or numbers of updates, are equal; and half the width
of the difference quotient for a target's density, as a fraction of its interval."""


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
        points = _evenly_chosen(np.unique(jumps), MOST_POINTS)
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
        few, count = np.zeros(base.size - 1, dtype=bool), np.zeros(base.size, dtype=np.int64)
        self._before, self._after, self._stride = np.zeros(0), np.zeros(0), 0.0
        if steps is not None:
            # An update exactly at an edge belongs to the interval that ends there.
            count = np.floor(
                steps.clock.step_at(base) / steps.stride * (1 + _EQUAL) + _EQUAL
            ).astype(np.int64)
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
        end = profile.t * (1 + _EQUAL) if isinstance(profile, PowerFunction) else np.inf
        before, after = (
            np.where(self._after <= end, profile.tail(s), 0.0) for s in (self._before, self._after)
        )
        return (before - after) / (self._stride or 1.0) if mass else before


def _evenly_chosen(values: FloatArray, most: int) -> FloatArray:
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


# --- motion

ASSUMED_STRETCH = 0.25
"""Assumed root mean square length of the walk over all of training, relative to the norm of the
weights. Recorded runs have 0.01 (learning rate decayed to almost 0) to 0.45 (constant learning
rate)."""


@dataclass(frozen=True, eq=False)
class Motion:
    """Walk and noise, summed over all elements of the weights, constant on each segment of
    training."""

    # ends of the segments, ascending, the first at the first update: shape [segments + 1]
    edges: FloatArray
    # variance of the increments per step, v: shape [segments]; per unit of `t` if steps are unknown
    walk: FloatArray
    # intensity of the noise, variance times step, w: shape [segments]; 0 with too few distances
    noise: FloatArray
    # Variance of a checkpoint about the path, from motion that is forgotten before the next one:
    # shape [segments]; None where no average of the weights between checkpoints shows it.
    scatter: FloatArray | None = None
    # Variance of the value that an average takes in about the mean of the steps since its last
    # update: shape [segments]; None if every average is updated at every step.
    sampling: FloatArray | None = None

    @classmethod
    def even(
        cls, t: float, variance: float = ASSUMED_STRETCH**2, steps: Steps | None = None
    ) -> Motion:
        """Return a constant walk of total `variance` over (0, t], without noise."""
        count = t if steps is None else float(steps.clock.step_at(t))
        return cls(np.array([0.0, t]), np.array([variance / count]), np.zeros(1))

    def on(
        self, edges: FloatArray, alone: Sequence[float] = (), instant: float = 1.0
    ) -> tuple[FloatArray, FloatArray]:
        """Return walk and noise on intervals, each within one segment; the outer segments extend:
        [K + 1] to [K] each.

        Intervals that end at the times `alone` are single steps, as long as an `instant`, with much
        of an average's mass, as of a checkpoint: there noise is the scatter of one value.
        """
        middle = (edges[:-1] + edges[1:]) / 2
        segment = np.clip(
            np.searchsorted(self.edges, middle, side="right") - 1, 0, self.walk.size - 1
        )
        walk, noise = self.walk[segment], self.noise[segment]
        if self.scatter is not None:
            steps = np.searchsorted(edges, alone) - 1
            steps = steps[steps >= 0]
            noise[steps] = instant * self.scatter[segment[steps]]
        return walk, noise

    def with_forgotten(self, spacing: FloatArray) -> Motion:
        """Return the motion with noise in place of the part of the walk that checkpoints show to be
        forgotten.

        Means of the weights over successive intervals of L steps, the `spacing`, [segments], are
        squared 2/3 v L apart for a walk and 2 w / L for noise: averages alone cannot tell v from w
        = v L^2 / 3. Of the squared distance v L + 2 scatter of checkpoints the second part, a share
        q, is forgotten. If that decays exponentially, within L / 20, L / 6 or L / 2 steps, q is
        0.86, 0.62 or 0.34, and its spectrum at the slowest wave that fits between two averages is
        0.91, 0.48 or 0.09 of noise's: about q^2.
        """
        if self.scatter is None:
            return self
        walked = self.walk * spacing
        share = (
            np.divide(
                2 * self.scatter, walked + 2 * self.scatter, out=0 * walked, where=self.scatter > 0
            )
            ** 2
        )
        return replace(
            self, walk=(1 - share) * self.walk, noise=self.noise + share * walked * spacing / 3
        )


# --- the fit

# limit of the number of segments; of more snapshot times, several share a segment
MOST_SEGMENTS = 64

_DISTANCES_FOR_NOISE = 1.5
"""Number of distances per segment from which on noise is fitted, too. One profile whose snapshots
each have distances to the two previous ones has nearly 2."""

_FIRST, _UPDATES = (1.0, 0.1), 1000
"""First walk, and first noise or scatter, each relative to what would explain the distances alone,
and the number of updates of a fit. Of 120 averages of checkpoints, all were within 2 of the
predicted error, with a first noise of 1 or 0.01 99 %, and with 100 updates in place of 300 to 3,000
93 %."""

_LEAST_OF_NEIGHBOURS = 0.3
"""Least walk of a segment, relative to the median of the five about it. Where distances overlap,
the best fit may have segments without any motion, which then cost nothing: coefficients of 46 used
one, and were 50 times as far off as predicted. Of the 252 cells of `bench_checkpoints.py` with
uneven steps, 5 are beyond 3 of predicted without it, and 2 with it."""

_UNSHOWN = 1e-20
"""Influence of a segment on the distances, relative to the largest, that comes from rounding alone:
eps squared."""


@dataclass(frozen=True)
class Distance:
    """A squared distance from the average of the profile `other`, and the part of it that comes
    from roundings."""

    other: StoredProfile
    squared: float
    rounding: float


Pair = tuple[StoredProfile, Distance]  # an average, and its distance from an earlier one


def fit_motion(
    start: float,
    times: Sequence[float],
    pairs: Sequence[Pair],
    steps: Steps | None = None,
    may_have_noise: bool = True,
    ordinary: Sequence[float] = (),
) -> tuple[Motion, FloatArray]:
    """Return the motion that explains measured distances best, and what it expects relative to
    them: shape [pairs].

    Minimises the sum of (model - 1)^2 / model, where model is an expected distance relative to the
    measured one, so that too large and too small fits cost the same, and the distances of a pause
    do not outweigh all others. The model is linear in the unknowns x >= 0, model = A x + rounding,
    and the sum convex. Replacing 1 / model by its bound from Jensen's inequality, which is exact at
    the current x, gives the multiplicative update

        x_j <- x_j sqrt(sum_i A_ij / model_i^2 / sum_i A_ij),

    which never increases the sum. The proportion of scatter, in which the model is linear too, is
    updated alike.

    `start` is the time of the first update; the snapshots' `times` after it bound the segments.
    `pairs` are at least one, above 0, none of one profile. With enough of them noise is fitted,
    too, unless all carry the same information about an interval: it makes successive intervals
    differ more than a walk does. Beside `ordinary` averages, at these times, checkpoints may
    scatter, in one proportion to the walk from one such time to the next."""
    edges = _evenly_chosen(np.unique([start, *(t for t in times if t > start)]), MOST_SEGMENTS + 1)
    if edges.size == 1:
        edges = np.array([start / 2, start])
    segments = edges.size - 1
    walks, noises, scatters, rounding = influences(edges, pairs, steps)
    # Averages that should be equal, and differ, are not what their files say: no motion explains
    # them.
    explained = walks.any(axis=1) | (rounding > 0)
    kinds = (
        [walks, noises]
        if may_have_noise and len(pairs) >= _DISTANCES_FOR_NOISE * segments
        else [walks]
    )
    influence, known = np.hstack(kinds)[explained], rounding[explained]
    walk, noise = unknowns = np.zeros((2, segments))
    if not influence.any():
        return Motion(edges, walk, noise), rounding
    # The same walk everywhere, as large as the distances are in the mean, and far less noise.
    parts = zip(_FIRST, np.hsplit(influence, len(kinds)), strict=False)
    x = np.repeat([share / max(part.sum(axis=1).mean(), 1e-300) for share, part in parts], segments)
    spacing = spacing_of(edges, ordinary, steps)
    scattered, share = np.zeros_like(influence), _FIRST[1] if len(ordinary) else 0.0
    scattered[:, :segments] = (scatters * spacing)[explained]
    rows = influence + share * scattered
    for _ in range(_UPDATES):
        total = rows.sum(axis=0)
        weights = np.maximum(rows @ x + known, 1e-12) ** -2
        change = np.sqrt(np.divide(weights @ rows, total, out=np.ones_like(total), where=total > 0))
        if share and (each := scattered @ x).any():
            share *= np.sqrt(weights @ each / each.sum())
            rows = influence + share * scattered
        x *= change
    # A segment that no distance shows, as that before the first update, moves as its neighbours do.
    fitted = zip(
        unknowns, np.split(x, len(kinds)), np.split(influence.sum(axis=0), len(kinds)), strict=False
    )
    for kind, values, size in fitted:
        shown = np.flatnonzero(size > _UNSHOWN * size.max())
        kind[:] = np.interp(np.arange(segments), shown, values[shown])
    walk = np.maximum(walk, _LEAST_OF_NEIGHBOURS * median_of_neighbours(walk))
    scatter = share * walk * spacing
    expected = walks @ walk + noises @ noise + rounding + scatters @ scatter
    return Motion(edges, walk, noise, scatter if len(ordinary) else None), np.asarray(expected)


def interval_of(profile: StoredProfile) -> int:
    """Return the number of steps from one update of an average to the next."""
    return int(profile.settings["every"]) if isinstance(profile, OrdinaryEMA) else 1


_SAMPLED_OF_SCATTER, _SAMPLED_OF_WALK = 0.4, 0.25
"""Variance of one value about the mean of the steps since the last update, relative to the scatter
of checkpoints, and to the walk from one file to the next where no checkpoints show it.

Noise that forgets in `tau` steps has the variance s about the mean of k steps: 1.1 of its own for
tau far below k, 0.42 for tau = k, 0.2 for 3 k. Averages at files L steps apart show its spectrum at
0, as a walk of v L = 6 tau / L of its own variance at least: for L = 10 k, s is 3.7 v L for tau far
below k, 0.65 for tau = k, 0.11 for 3 k, and 0.03 for a walk."""


def sampling_of(motion: Motion, times: Sequence[float], steps: Steps | None) -> FloatArray:
    """Return `Motion.sampling` for averages at these times."""
    if motion.scatter is not None:
        return _SAMPLED_OF_SCATTER * motion.scatter
    return _SAMPLED_OF_WALK * motion.walk * spacing_of(motion.edges, times, steps)


def sampling_errors(profiles: Sequence[StoredProfile], motion: Motion) -> FloatArray:
    """Return a root of the covariance of the errors of averages that take in one value of several:
    shape [n or less, n].

    Their sum over updates k is sum_k m_k (theta_k - the mean of the steps since update k - 1), with
    the masses m_k. Averages have it in common as far as they have masses in common.
    """
    intervals = np.array([interval_of(profile) for profile in profiles])
    jumps = [profile.jumps for profile in profiles if isinstance(profile, OrdinaryEMA)]
    if motion.sampling is None or not jumps:
        return np.zeros((0, len(profiles)))
    edges = _evenly_chosen(np.unique(np.concatenate(jumps)), MOST_POINTS)
    tails = np.stack([profile.tail(edges) for profile in profiles], axis=1)
    masses = -np.diff(tails, axis=0, prepend=1.0)
    updates = np.maximum(np.diff(edges, prepend=edges[0])[:, None] / intervals, 1.0)
    variance = motion.sampling[_segments(motion.edges, edges)]
    rows = np.where(intervals > 1, np.sqrt(variance[:, None] / updates) * masses, 0.0)
    return np.asarray(np.linalg.qr(rows, mode="r"))


def median_of_neighbours(values: FloatArray) -> FloatArray:
    """Return the median of each value, the two before and the two after it, as far as there are
    such: shape of `values`."""
    padded = np.pad(values, 2, constant_values=np.nan)
    return np.asarray(np.nanmedian(sliding_window_view(padded, 5), axis=1))


def influences(
    edges: FloatArray, pairs: Sequence[Pair], steps: Steps | None
) -> tuple[FloatArray, ...]:
    """Return the contributions to each measured distance, relative to it: a walk, a noise and a
    scatter of intensity 1 on each segment between `edges` alone, [pairs, segments] each, and
    rounding, [pairs].
    """
    place: dict[StoredProfile, int] = {}
    columns = [
        [place.setdefault(p, len(place)) for p in (later, each.other)] for later, each in pairs
    ]
    nodes = Nodes(edges, list(place), steps)
    first = np.searchsorted(nodes.edges, edges[:-1])
    segment = np.searchsorted(first, nodes.interval, side="right") - 1
    tails, masses = (nodes.columns(list(place), mass) for mass in (False, True))
    walk, noise, scatter = np.zeros((3, len(pairs), edges.size - 1))
    for row, ((profile, each), (later, earlier)) in enumerate(zip(pairs, columns, strict=True)):
        for kind, values in ((walk, tails), (noise, masses)):
            squares = (values[:, later] - values[:, earlier]) ** 2
            kind[row] = np.bincount(segment, nodes.weight * squares, edges.size - 1) / each.squared
        if walk[row].any():  # else an average that is a copy of the checkpoint
            points = [one.t for one in (profile, each.other) if isinstance(one, Point)]
            np.add.at(scatter[row], _segments(edges, points), 1 / each.squared)
    return (
        walk,
        noise,
        scatter,
        np.array([min(each.rounding / each.squared, 1.0) for _, each in pairs]),
    )


def _segments(edges: FloatArray, times: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Return the segment of each time; a time at an edge belongs to the segment that ends there."""
    return np.clip(np.searchsorted(edges, times) - 1, 0, edges.size - 2)


def spacing_of(edges: FloatArray, times: Sequence[float], steps: Steps | None) -> FloatArray:
    """Return the steps from one of the times to the next on each segment: shape [segments]."""
    count = np.bincount(_segments(edges, np.unique(times)), minlength=edges.size - 1)
    return np.asarray(
        np.diff(edges if steps is None else steps.clock.step_at(edges)) / np.maximum(count, 1)
    )


# --- the sketch

_POINTS = 4  # number of points in a window at which tails are evaluated


@dataclass(frozen=True, eq=False)
class Sketch:
    """The path of the weights as the hook measured it: random projections of their mean over each
    window of updates.

    The projection S is fixed and linear, and preserves squared lengths in expectation: D numbers do
    up to a factor 1 +- sqrt(2 / D). Let m_k be the mean of the k-th window and x_k = S m_k.
    Coefficients c give that window the mass g_k = sum_i c_i P_i(k) - P(k) too much, so that their
    error is measured, whatever the motion is:

        |error|^2 = |sum_k g_k m_k|^2 ~ |sum_k g_k x_k|^2 = |sum_k G_k (x_k+1 - x_k)|^2,    G =
        sum_i c_i tail_i - tail,

    with G at the ends of the windows. That assumes that G is linear within a window: the shorter
    the windows, the more exact it is. Within window k, G departs from the line by b_k in the mean.
    Steady motion, from the previous window to the next one, adds b_k times itself to the error. The
    rest is unseen: motion that the neighbours do not predict, as of a walk, and the part of the
    window's spread that is not steady motion, as of noise.

    `edges` are the times of the first update and of the last one in each window, [K + 1]; of each
    window `folds` is the number of folds, [K], `means` the projected mean, [K, D], and `spread` the
    mean squared distance of the folds' weights from it, [K]."""

    edges: FloatArray
    folds: FloatArray
    means: FloatArray
    spread: FloatArray

    def measured(self, profiles: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        """Return a column per profile whose combinations are errors: projected, [D, n], and unseen,
        [K + 2, n]."""
        tails = np.stack([profile.tail(self.edges) for profile in profiles], axis=1)
        place = (np.arange(_POINTS) + 0.5) / _POINTS
        times = (self.edges[:-1, None] + np.diff(self.edges)[:, None] * place).ravel()
        within = np.stack(
            [profile.tail(times).reshape(-1, _POINTS).mean(axis=1) for profile in profiles], axis=1
        )
        bend = within - (tails[1:] + tails[:-1]) / 2
        seen = (
            np.diff(self.means, axis=0).T @ tails[1:-1]
            + (self._across * self._inner[:, None]).T @ bend
        )
        # G, a parabola within a window, has the mean square departure 6/5 b^2 from its line. Noise
        # of n folds of variance s adds 12 s / n, for b = 1.
        walk = np.sqrt(6 / 5 * self._inner * self._squares)
        noise = np.sqrt(12 * self._beyond / np.maximum(self.folds - 1, 1))
        # Noise may be equal in all windows, as of weights that alternate: then its contributions
        # add up.
        aligned = noise @ bend
        # The mass of the first update lies on one value, not on the mean of its window.
        first = np.sqrt(self.spread[0]) * tails[0]
        return seen, np.vstack((np.hypot(walk, noise)[:, None] * bend, aligned, first))

    def of_shared_means(
        self, profiles: Sequence[PowerFunction], largest: float, updates: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return the errors of averages that share means with the weights of the `largest` gamma:
        projected, unseen.

        The shapes are [D, n] and [K, n]. Within a fold of relative length L the shared weights are
        steeper by u = (largest - gamma) L. If the fold has the mass m in an average, the error
        contains u m / 12 of the steady motion across the fold, which projections show. To the
        squared error, noise that leaves the variance s in a fold's mean adds u^2 m^2 s / 12, and a
        walk of variance v across the fold u^2 m^2 v / 120, a third of it seen as steady motion.
        Averages of one profile share the errors of their common folds. `updates` counts the updates
        until each edge: folds of two are exact, since the newest value has each profile's own
        weight, and early in a run means are not shared.
        """
        counts = np.maximum(np.diff(updates) / self.folds, 2.0)
        part = (counts - 1) * (counts - 2) / counts**2
        length = np.diff(self.edges) / self.folds / self.edges[1:]
        steeper = np.array([largest - profile.gamma for profile in profiles])
        masses = -np.diff(
            np.stack([profile.tail(self.edges) for profile in profiles], axis=1), axis=0
        )
        late = np.logical_or.accumulate((length > 0) & (length * WINDOW <= LONGEST * counts))
        part = np.where(late, part, 0.0)
        bend = (part * length / self.folds / 12)[:, None] * steeper * masses
        # For n folds, each with noise s and a walk v, `_beyond` is s (1 - 1/n) (1 - (1 + 1/n) / (24
        # n)) + 19/144 v (n - 1/n), and `_squares` is 6 s / n + v n.
        n = np.maximum(self.folds, 2.0)
        noise = np.maximum(self._beyond - 19 / 144 * self._inner * self._squares, 0.0)
        noise /= (1 - 1 / n) * (1 - 5 / 6 * (1 + 1 / n) / n)
        walk = np.maximum(self._squares - 6 * noise / n, 0.0) / n
        unseen = 12 * noise / np.where(part > 0, part, 1.0) + 144 / 120 * 2 / 3 * walk
        return self._across.T @ bend, np.sqrt(unseen * self.folds)[:, None] * bend

    def motion(self, steps: Steps | None) -> Motion:
        """Return the walk that the path makes beyond its main direction, without noise.

        A projection shows motion in one direction fully, and coefficients fitted to it are right; a
        walk in many directions has errors in those that it does not show. Without that distinction
        errors of oscillations are up to 400 times larger; leaving out 4 or 16 directions in place
        of 1 makes a few ordinary ones larger.
        """
        edges = _evenly_chosen(
            self.edges[np.diff(self.edges, prepend=-np.inf) > 0], MOST_SEGMENTS + 1
        )
        if edges.size < 2:
            return Motion(np.array([self.edges[0] / 2, self.edges[0]]), np.zeros(1), np.zeros(1))
        misses = self._misses
        if misses.any():  # scaled up as if the main direction had been an average one
            main = np.linalg.svd(misses, full_matrices=False)[2][:1]
            misses = (misses - misses @ main.T @ main) * np.sqrt(
                misses.shape[1] / (misses.shape[1] - 1)
            )
        counts = np.diff(edges if steps is None else steps.clock.step_at(edges))
        ends = np.searchsorted(self.edges[1:], edges[1:], side="right")
        squares = np.append(0.0, np.cumsum(self._squares_of(misses)))[ends]
        return Motion(edges, np.diff(squares, prepend=0.0) / counts, 0 * counts)

    @cached_property
    def _inner(self) -> FloatArray:
        """The share of a window's motion that lies inside it and not at its ends, 0 for a single
        fold: shape [K]."""
        return np.asarray(1 - 1 / self.folds**2)

    @cached_property
    def _middle(self) -> FloatArray:
        return (self.edges[1:] + self.edges[:-1]) / 2

    @cached_property
    def _across(self) -> FloatArray:
        """Projected steady motion across each window: shape [K, D]."""
        if len(self.means) < 2:
            return np.zeros_like(self.means)
        return np.asarray(
            np.gradient(self.means, self._middle, axis=0) * np.diff(self.edges)[:, None]
        )

    @cached_property
    def _beyond(self) -> FloatArray:
        """The part of each window's spread that is not steady motion: shape [K]."""
        return np.asarray(
            np.maximum(self.spread - self._inner * np.sum(self._across**2, axis=1) / 12, 0.0)
        )

    @cached_property
    def _misses(self) -> FloatArray:
        """Twice the differences between inner windows' means and the line between their
        neighbours': shape [K - 2, D].

        A walk of variance V across a window has the expected square V. Of two windows, the
        difference of their means.
        """
        if len(self.means) < 3:
            return np.diff(self.means, axis=0)
        place = (self._middle[1:-1] - self._middle[:-2]) / (self._middle[2:] - self._middle[:-2])
        line = self.means[:-2] + (self.means[2:] - self.means[:-2]) * place[:, None]
        return np.asarray(2 * (self.means[1:-1] - line))

    @cached_property
    def _squares(self) -> FloatArray:
        """Squared length of a walk across each window: shape [K]."""
        return self._squares_of(self._misses)

    def _squares_of(self, misses: FloatArray) -> FloatArray:
        """Return the squared lengths that misses stand for; the first and the last window are like
        their neighbours."""
        squares = np.sum(misses**2, axis=1)
        if len(self.means) < 3:
            return np.full(len(self.means), squares.sum())
        return np.pad(squares, 1, mode="edge")


# --- stored averages

MEASURED, SAMPLED, ASSUMED = "measured", "sampled", "assumed"

ROUNDING: float = math.sqrt(2 * math.log(2) / 36)
"""Root mean square error of one rounding to nearest, relative to the values, in units of eps:
0.196.

The error of a value m 2**e is uniform within a spacing of eps 2**e, with variance (eps 2**e)**2 /
12. If logarithms of values are evenly distributed, the mean square of m in [1, 2) is 3 / (2 ln 2).
"""


@dataclass(frozen=True)
class Measurements:
    """The squared norms of an exact average and of what its stored copy differs by; estimates for a
    large model.

    `distances` are to other averages, where both were sampled from files; headers hold none.
    """

    norm: float
    rounding: float
    distances: tuple[Distance, ...] = ()


@dataclass(frozen=True)
class StoredAverage:
    """A stored average of so many updates, and its measurements."""

    profile: PowerFunction | Point | Discrete
    updates: int
    eps: float  # distance from 1 to the next number of the accumulator's dtype
    measurements: Measurements | None
    steps: Steps | None = None
    # expected squared error that remains from rounded snapshots it was resumed from
    inherited: float = 0.0
    # exponents of all profiles that share means with it; empty if it has its own
    gammas: tuple[float, ...] = ()
    # time of a power function's first update: its mass before that applies to those values
    t_first: float = 1.0

    @property
    def start(self) -> float:
        """The earliest time at which motion matters: a tracker's first update, otherwise the first
        training step, or the beginning if steps are unknown."""
        if isinstance(self.profile, PowerFunction):
            return self.t_first
        if self.steps is None:
            return 0.0
        return min(self.profile.t_first, float(self.steps.clock.time_at(1)))

    @property
    def roundings(self) -> float:
        """The number of independent roundings, each of a value of the average's size, that the
        average contains."""
        if isinstance(self.profile, PowerFunction):
            return roundings(self.profile.gamma, self.updates)
        if isinstance(self.profile, Point):
            return 0.0
        # Each update rounds, and its error decays as the mass of the earlier values does.
        return float(np.sum((1 - self.profile.tail(self.profile.times)) ** 2))


# --- the prior


@dataclass(frozen=True)
class Prior:
    """What is known about snapshots in addition to their profiles. Arrays are in the snapshots'
    order: shape [n] each.

    `doubt` says how badly the motion explains the distances: the root mean square of log(measured /
    expected). A walk with noise explains those of ordinary training within a few per cent; if the
    path oscillates, or is smooth between snapshots, some are many times larger than expected, and
    others smaller.
    """

    motion: Motion
    rounding: FloatArray  # variance of each stored copy's rounding, r_i; 0 for an exact copy
    arithmetic: FloatArray  # variance of each average from the arithmetic of its updates
    norm: FloatArray  # squared norm of each average
    # where the numbers come from: "measured" while training, "sampled" from the files, or "assumed"
    source: str
    steps: Steps | None = None
    doubt: float = 0.0
    sketch: Sketch | None = None
    # errors that averages have in common, independent ones: shape [n, components]
    shared: FloatArray | None = None
    # The share of the rounding error of copy i that average j inherited, since the run was resumed
    # from it: [n, n].
    passed_on: FloatArray | None = None

    def of(self, snapshots: Sequence[int]) -> Prior:
        """Return the prior of a subset of the snapshots, given by their indices."""
        index = np.asarray(snapshots, dtype=np.intp)
        arrays: dict[str, Any] = {
            name: v[index] for name, v in vars(self).items() if isinstance(v, np.ndarray)
        }
        if self.passed_on is not None:
            arrays["passed_on"] = arrays["passed_on"][:, index]
            # What came from copies outside the subset is an error that those inside have in common.
            outside = np.setdiff1d(np.arange(len(self.norm)), index)
            lost = (
                np.sqrt(self.rounding[outside, None]) * self.passed_on[np.ix_(outside, index)]
            ).T
            arrays["shared"] = lost if self.shared is None else np.hstack((arrays["shared"], lost))
        return replace(self, **arrays)

    def stretched(self, steps: float, t: float, norm: float) -> Motion:
        """Return the motion of a run with `steps` steps that takes the path up to `t`, relative to
        a squared norm."""
        motion = self.motion
        edges = motion.edges if self.steps is None else self.steps.clock.step_at(motion.edges)
        factor = steps / (t if self.steps is None else float(self.steps.clock.step_at(t)))
        # The new run moves from its start, even if the averages of this run began later.
        edges = np.concatenate(([0.0], edges[1:] * factor))
        # Increments over dn steps have the variance v dn, so that v shrinks as the number of steps
        # grows. Densities shrink, too, and integral w p^2 dn with them, so that w grows.
        return Motion(edges, motion.walk / (factor * norm), motion.noise * factor / norm)


def assumed_prior(
    snapshots: Sequence[StoredProfile], rounding: float = 0.0, motion: Motion | None = None
) -> Prior:
    """Return the prior of planned or unmeasured snapshots, relative to the norm; `rounding` is root
    mean square."""
    ones = np.ones(len(snapshots))
    motion = motion or Motion.even(max(p.t for p in snapshots))
    return Prior(motion, rounding**2 * ones, 0 * ones, ones, ASSUMED)


# squared distance, relative to the largest one, below which its exact value hardly matters
_NEGLIGIBLE = 1e-4


def measured_prior(averages: Sequence[StoredAverage], sketch: Sketch | None = None) -> Prior:
    """Return the prior from the measurements of a run's averages, or `assumed_prior` if any average
    has none.

    The order of the averages affects only that of the arrays. `sketch` covers the path up to the
    last one.
    """
    profiles = [average.profile for average in averages]
    measured = [average.measurements for average in averages if average.measurements is not None]
    if not measured or len(measured) < len(averages):
        return assumed_prior(profiles)
    norm, rounding = (
        np.array(each) for each in zip(*((m.norm, m.rounding) for m in measured), strict=True)
    )
    counts, eps = np.array([(average.roundings, average.eps) for average in averages]).T
    arithmetic = norm * (ROUNDING * eps) ** 2 * counts
    in_order = sorted(range(len(averages)), key=lambda i: _order_of(profiles[i]))
    steps = averages[in_order[-1]].steps
    pairs = [] if sketch else _pairs([(profiles[i], measured[i], arithmetic[i]) for i in in_order])
    doubt = 0.0
    if sketch is not None:
        motion = sketch.motion(steps)
    elif pairs:
        # Other libraries' averages of one time take the mean of the same weights in late intervals:
        # with noise in place of a walk, combinations were up to 28 times as far off.
        discrete = [profile.t for profile in profiles if isinstance(profile, Discrete)]
        is_sparse = any(interval_of(profile) > 1 for profile in profiles)
        beside = discrete if any(isinstance(p, Point) for p in profiles) else []
        start, times = (
            min(average.start for average in averages),
            [profile.t for profile in profiles],
        )
        fitted, expected = fit_motion(start, times, pairs, steps, not discrete, beside)
        squares = np.array([each.squared for _, each in pairs])
        least = _NEGLIGIBLE * squares.max()
        doubt = (
            float(np.sqrt(np.mean(np.log((squares * expected + least) / (squares + least)) ** 2)))
            / 2
        )
        if is_sparse:
            motion = replace(fitted, sampling=sampling_of(fitted, times, steps))
        else:
            motion = fitted.with_forgotten(spacing_of(fitted.edges, discrete, steps))
    else:
        motion = Motion.even(
            profiles[in_order[-1]].t, ASSUMED_STRETCH**2 * float(norm.mean()), steps
        )
    # Weights that are all 0 have distances, but all of these are 0.
    still = not norm.any() and any(measurements.distances for measurements in measured)
    source = MEASURED if pairs or still or sketch is not None else ASSUMED
    shared, passed_on = _shared(averages, rounding, sketch)
    return Prior(
        motion, rounding, arithmetic, norm, source, steps, doubt, sketch, shared, passed_on
    )


def _shared(
    averages: Sequence[StoredAverage], rounding: FloatArray, sketch: Sketch | None
) -> tuple[FloatArray | None, FloatArray | None]:
    """Return `Prior.shared`, from inherited errors and from means that profiles share, and
    `Prior.passed_on`."""
    powers = {
        i: average.profile
        for i, average in enumerate(averages)
        if isinstance(average.profile, PowerFunction)
    }
    tracked, profiles = list(powers), list(powers.values())
    gammas, times = np.array([p.gamma for p in profiles]), np.array([p.t for p in profiles])
    rows, passed_on = [np.zeros((0, len(tracked)))], np.zeros((len(averages), len(averages)))
    inherited = np.array([average.inherited for average in averages])
    if inherited.any():
        factor, passed_on[np.ix_(tracked, tracked)] = inherited_factor(
            inherited[tracked], rounding[tracked], gammas, times
        )
        rows.append(factor)
    largest = max((gamma for average in averages for gamma in average.gammas), default=0.0)
    steps = averages[-1].steps
    if sketch is not None and steps is not None and np.any(gammas < largest):
        updates = steps.clock.step_at(sketch.edges) / steps.stride
        rows += (
            errors for errors in sketch.of_shared_means(profiles, largest, updates) if errors.any()
        )
    shared = np.zeros((len(averages), sum(map(len, rows))))
    shared[tracked] = np.vstack(rows).T
    return shared if shared.any() else None, passed_on if passed_on.any() else None


def _order_of(profile: StoredProfile) -> tuple[float, float, float]:
    """Return a sort key that depends on the profile alone; equal profiles have equal keys."""
    if isinstance(profile, PowerFunction):
        return profile.t, profile.gamma, 0.0
    return profile.t, np.inf, float(profile.tail(profile.t / 2))


def _pairs(averages: Sequence[tuple[StoredProfile, Measurements, float]]) -> list[Pair]:
    """Return the measured distance of each pair of averages; if a pair has several records, the
    last one.

    Pairs of one power function, up to rounding, are left out: no motion explains their distance.
    """
    pairs: dict[tuple[tuple[float, ...], ...], Pair] = {}
    floor = 1e-18 * max((measurements.norm for _, measurements, _ in averages), default=0.0)
    for profile, measurements, arithmetic in averages:
        for distance in measurements.distances:
            earlier, later = sorted((profile, distance.other), key=_order_of)
            keys = (t, gamma, _), (other_t, other_gamma, _) = _order_of(later), _order_of(earlier)
            if t - other_t <= _EQUAL * t and abs(gamma - other_gamma) < 1e-6 * (gamma + 1):
                continue
            # The partner may have been deleted; its arithmetic has about the same variance.
            noise = distance.rounding + 2 * arithmetic
            # A distance below the errors is only known to be small.
            squared = max(distance.squared, noise, floor)
            if squared > 0:
                # A gamma that was computed elsewhere may differ in its last bits.
                key = tuple((t, round(gamma, 9), half) for t, gamma, half in keys)
                pairs[key] = later, Distance(earlier, squared, noise)
    return list(pairs.values())


# --- correlated roundings
#
# The rounding errors of an element in two copies are equal if it hardly moves between them, and
# independent if it moves by several spacings h of the storage dtype; combining copies averages only
# the latter out. If all elements move alike, half a spacing is enough for independence; but those
# that move least keep their errors longest. So errors count as correlated until the copies are
# about a spacing apart: by a Gaussian kernel, exp(-d / h^2) at the squared distance d, with sums
# over all elements for d and for h^2, which is 12 times the variance of an error uniform within a
# spacing. As a function of expected squared distances it is positive semidefinite.

_LARGEST = 0.99
"""Correlation of the errors of two copies without motion between them. With 1, coefficients of
opposite signs could cancel errors whose sizes differ a little, and grow without bound."""


def rounding_factor(rounding: FloatArray, arithmetic: FloatArray, apart: FloatArray) -> FloatArray:
    """Return a matrix B such that B^T B is the covariance of the stored copies' errors: shape [n,
    n].

    `rounding` and `arithmetic` are variances, [n], the latter of independent errors; `apart` are
    expected squared distances, [n, n].
    """
    root = np.sqrt(rounding)
    scale = root[:, None] * root
    spacings = np.divide(apart, 12 * scale, out=np.full(apart.shape, np.inf), where=scale > 0)
    covariance = _LARGEST * scale * np.exp(-spacings)
    np.fill_diagonal(covariance, rounding + arithmetic)
    # NumPy's eigh uses divide and conquer; the QR driver fails on about 1 % of these clustered
    # spectra.
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T, dtype=np.float64)


_ALIKE = 0.9
"""Correlation of what averages inherited with the errors of the copy, and among each other. Where
weights hardly move, copies are rounded back to the earlier one's values; with 1, large coefficients
of opposite signs would cancel errors that depart by that: errors were up to 14 times the predicted
ones, and at most 1.9 times with 0.9 (288 averages)."""

_SAME = 0.98  # ratio of two variances that are one, up to the estimate of the share of each process


def inherited_factor(
    inherited: FloatArray, rounding: FloatArray, gamma: FloatArray, times: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Return the errors that averages inherited from rounded snapshots, in two parts: shapes [2 n,
    n] and [n, n].

    An average at t keeps the share (t_i / t)^(gamma + 1) of the error of an earlier average of its
    profile. If as much as the earlier one's rounding was added between the two, the run was resumed
    from that copy, and the rounding errors are the same: the second result R has the shares, R_ij
    of copy i in average j. The rest arose from copies that are gone; B^T B is its covariance, with
    B the first result. Arguments are variances, exponents, and times.
    """
    factor, passed_on = np.zeros((2, times.size, times.size))
    by_time = np.argsort(times, kind="stable")
    for profile in (by_time[gamma[by_time] == exponent].tolist() for exponent in np.unique(gamma)):
        factor[profile[0], profile[0]] = np.sqrt(inherited[profile[0]])
        for before, after in pairwise(profile):
            share = (times[before] / times[after]) ** (gamma[after] + 1)
            kept, copied = share**2 * inherited[before], share**2 * rounding[before]
            part = share * np.sqrt(min(1.0, inherited[after] / kept)) if kept > 0 else 0.0
            factor[:, after], passed_on[:, after] = (
                part * factor[:, before],
                part * passed_on[:, before],
            )
            added = max(inherited[after] - kept, 0.0)
            # The errors of two resumes may add up, see `error_after_rounding`.
            if 0 < _SAME * copied <= added <= (copied + 2 * np.sqrt(kept * copied)) / _SAME:
                passed_on[before, after] += share
                added = max(added - copied, 0.0)
            factor[after, after] = np.sqrt(added)
    own = np.diag(np.sqrt((1 - _ALIKE**2) * inherited))
    return np.vstack((_ALIKE * factor, own)), _ALIKE * passed_on


def error_after_rounding(
    error: float, rounding: float, spread: float, moved: float, share: float
) -> float:
    """Return the expected squared error of an average that resumes from its stored copy, `error`
    before the rounding.

    A copy's values are representable in the storage dtype, so that the next rounding depends only
    on the displacement from them: `share`, the mass of the values since the last resume, times the
    average's lag, of which the same share is forgotten. Two consecutive displacements differ by 2
    share times their square; where that is small, the errors have one sign and add up. `rounding`
    is the last squared error, `spread` its expectation for arbitrary values, and `moved` the
    squared distance from the copy of the last resume.
    """
    correlation = (
        float(_correlation(np.array([2 * share * moved / spread]))[0]) if spread > 0 else 0.0
    )
    return error + rounding + 2 * correlation * float(np.sqrt(error * rounding))


def _correlation(distance: FloatArray) -> FloatArray:
    """Return the correlation of two rounding errors at squared distances d / r: shape of
    `distance`."""
    squares = np.arange(1, 65) ** 2
    return np.asarray(
        sum(np.exp(-(np.pi**2) / 6 * k * distance) / k for k in squares) / sum(1 / squares)
    )
