"""The motion of a network, fitted to the distances of its averages.

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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from posthoc_cli.profiles import (
    FloatArray,
    OrdinaryEMA,
    Point,
    StoredProfile,
)
from posthoc_cli.reconstruction.nodes import MOST_POINTS, Nodes, Steps, evenly_chosen

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
        cls,
        t: float,
        variance: float = ASSUMED_STRETCH**2,
        steps: Steps | None = None,
    ) -> Motion:
        """Return a constant walk of total `variance` over (0, t], without noise."""
        count = t if steps is None else float(steps.clock.step_at(t))
        edges = np.array([0.0, t])
        walk = np.array([variance / count])
        return cls(edges, walk, noise=np.zeros(1))

    def on(
        self,
        edges: FloatArray,
        alone: Sequence[float] = (),
        instant: float = 1.0,
    ) -> tuple[FloatArray, FloatArray]:
        """Return walk and noise on intervals, each within one segment; the outer segments extend:
        [K + 1] to [K] each.

        Intervals that end at the times `alone` are single steps, as long as an `instant`, with much
        of an average's mass, as of a checkpoint: there noise is the scatter of one value.
        """
        middle = (edges[:-1] + edges[1:]) / 2
        segment = np.searchsorted(self.edges, middle, side="right") - 1
        segment = np.clip(segment, 0, self.walk.size - 1)
        walk = self.walk[segment]
        noise = self.noise[segment]
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
        forgotten = 2 * self.scatter
        total = walked + forgotten
        share = np.divide(forgotten, total, out=0 * walked, where=self.scatter > 0)
        spectrum = share**2
        noise = self.noise + spectrum * walked * spacing / 3
        walk = (1 - spectrum) * self.walk
        return replace(self, walk=walk, noise=noise)


# --- the fit

# limit of the number of segments; of more snapshot times, several share a segment
MOST_SEGMENTS = 64

_DISTANCES_FOR_NOISE = 1.5
"""Number of distances per segment from which on noise is fitted, too. One profile whose snapshots
each have distances to the two previous ones has nearly 2."""

_FIRST = (1.0, 0.1)
_UPDATES = 1000
"""First walk, and first noise or scatter, each relative to what would explain the distances alone,
and the number of updates of a fit. Of 120 averages of checkpoints, all were within 2 of the
predicted error, with a first noise of 1 or 0.01 99 %, and with 100 updates in place of 300 to 3,000
93 %."""

_LEAST_OF_NEIGHBOURS = 0.3
"""Least walk of a segment, relative to the median of the five about it. Where distances overlap,
the best fit may have segments without any motion, which then cost nothing: coefficients of 46 used
one, and were 50 times as far off as predicted. Of the 252 cells of `bench_checkpoints.py` with
uneven steps, 5 are beyond 3 of predicted without it, and 2 with it."""

_MOST_RAISED = 2.0
"""Most that the least walk may raise an expected distance to, relative to the measured one: then a
predicted error is at most 1.5 times too large by it."""

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
    edges = _ends_of_segments(start, times)
    segments = edges.size - 1
    influences = influences_of(edges, pairs, steps)
    spacing = spacing_of(edges, ordinary, steps)
    fits_noise = may_have_noise and len(pairs) >= _DISTANCES_FOR_NOISE * segments
    fit = _Fit(influences, spacing, fits_noise, fits_scatter=len(ordinary) > 0)
    if not fit.has_influence:
        return Motion(edges, *np.zeros((2, segments))), influences.rounding
    for _ in range(_UPDATES):
        fit.update()
    walk, noise = fit.intensities()
    others = influences.noise @ noise + influences.rounding
    walk = with_floor(walk, influences.walk, others)
    scatter = fit.proportion * walk * spacing
    expected = influences.expected(walk, noise, scatter)
    motion = Motion(edges, walk, noise, scatter if len(ordinary) else None)
    return motion, expected


def _ends_of_segments(start: float, times: Sequence[float]) -> FloatArray:
    later = [t for t in times if t > start]
    distinct = np.unique([start, *later])
    if distinct.size == 1:
        return np.array([start / 2, start])
    return evenly_chosen(distinct, MOST_SEGMENTS + 1)


class _Fit:
    """The unknowns of `fit_motion`, and their updates.

    `proportion` is that of scatter to the walk from one time of an ordinary average to the next.
    """

    def __init__(
        self,
        influences: Influences,
        spacing: FloatArray,
        fits_noise: bool,
        fits_scatter: bool,
    ) -> None:
        # Averages that should be equal, and differ, are not what their files say: no motion
        # explains them.
        explained = influences.walk.any(axis=1) | (influences.rounding > 0)
        self._known = influences.rounding[explained]
        kinds = [influences.walk[explained]]
        if fits_noise:
            kinds.append(influences.noise[explained])
        self._segments = spacing.size
        self._influence = np.hstack(kinds)
        self.has_influence = bool(self._influence.any())
        # The same walk everywhere, as large as the distances are in the mean, and far less noise.
        first = []
        for share, influence in zip(_FIRST, kinds, strict=False):
            mean = influence.sum(axis=1).mean()
            first.append(share / max(mean, 1e-300))
        self._intensities = np.repeat(first, self._segments)
        self.proportion = _FIRST[1] if fits_scatter else 0.0
        self._scattered = np.zeros_like(self._influence)
        by_spacing = influences.scatter * spacing
        self._scattered[:, : self._segments] = by_spacing[explained]
        self._rows = self._influence + self.proportion * self._scattered

    def update(self) -> None:
        rows = self._rows
        total = rows.sum(axis=0)
        expected = np.maximum(rows @ self._intensities + self._known, 1e-12)
        weights = expected**-2
        changes = np.divide(weights @ rows, total, out=np.ones_like(total), where=total > 0)
        if self.proportion:
            scatter = self._scattered @ self._intensities
            if scatter.any():
                self.proportion *= np.sqrt(weights @ scatter / scatter.sum())
                self._rows = self._influence + self.proportion * self._scattered
        self._intensities *= np.sqrt(changes)

    def intensities(self) -> FloatArray:
        """Return walk and noise: shape [2, segments].

        A segment that no distance shows, as that before the first update, moves as its neighbours
        do.
        """
        fitted = self._intensities.reshape(-1, self._segments)
        sizes = self._influence.sum(axis=0).reshape(fitted.shape)
        result = np.zeros((2, self._segments))
        for kind, values in enumerate(fitted):
            shown = np.flatnonzero(sizes[kind] > _UNSHOWN * sizes[kind].max())
            result[kind] = np.interp(np.arange(self._segments), shown, values[shown])
        return result


def with_floor(walk: FloatArray, walks: FloatArray, others: FloatArray) -> FloatArray:
    """Return a fitted walk with the least walk in each segment, where the distances allow it.

    `walks` is the influence of the walk on the distances, and `others` what else they consist of,
    both relative to the measured ones: shapes [pairs, segments] and [pairs]. A standstill that
    distances show remains one.
    """
    least = _LEAST_OF_NEIGHBOURS * median_of_neighbours(walk)
    added = np.maximum(least - walk, 0.0)
    raised = walks * added
    total = np.maximum(raised.sum(axis=1), 1e-300)
    room = np.maximum(_MOST_RAISED - walks @ walk - others, 0.0)
    allowed = np.minimum(room / total, 1.0)
    shares = np.where(raised > 0, allowed[:, None], 1.0)
    return np.asarray(walk + shares.min(axis=0) * added)


def interval_of(profile: StoredProfile) -> int:
    """Return the number of steps from one update of an average to the next."""
    if isinstance(profile, OrdinaryEMA):
        return int(profile.settings["every"])
    return 1


_SAMPLED_OF_SCATTER = 0.4
_SAMPLED_OF_WALK = 0.25
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
    times = np.unique(np.concatenate(jumps))
    edges = evenly_chosen(times, MOST_POINTS)
    tails = np.stack([profile.tail(edges) for profile in profiles], axis=1)
    masses = -np.diff(tails, axis=0, prepend=1.0)
    steps = np.diff(edges, prepend=edges[0])
    updates = np.maximum(steps[:, None] / intervals, 1.0)
    segment = segments_of(motion.edges, edges)
    variance = motion.sampling[segment]
    deviation = np.sqrt(variance[:, None] / updates)
    rows = np.where(intervals > 1, deviation * masses, 0.0)
    return np.asarray(np.linalg.qr(rows, mode="r"))


def median_of_neighbours(values: FloatArray) -> FloatArray:
    """Return the median of each value, the two before and the two after it, as far as there are
    such: shape of `values`."""
    padded = np.pad(values, 2, constant_values=np.nan)
    return np.nanmedian(sliding_window_view(padded, 5), axis=1)


class Influences(NamedTuple):
    """Contributions to each measured distance, relative to it: of a walk, a noise and a scatter of
    intensity 1 on each segment alone, [pairs, segments] each, and of rounding, [pairs]."""

    walk: FloatArray
    noise: FloatArray
    scatter: FloatArray
    rounding: FloatArray

    def expected(self, walk: FloatArray, noise: FloatArray, scatter: FloatArray) -> FloatArray:
        """Return what motion expects of the distances, relative to them: shape [pairs]."""
        lasting = self.walk @ walk + self.noise @ noise
        return np.asarray(lasting + self.rounding + self.scatter @ scatter)


def influences_of(edges: FloatArray, pairs: Sequence[Pair], steps: Steps | None) -> Influences:
    """Return the influences of motion between `edges` on measured distances."""
    integrals = _Integrals(edges, pairs, steps)
    walk, noise, scatter = np.zeros((3, len(pairs), edges.size - 1))
    for row, (profile, distance) in enumerate(pairs):
        both = (profile, distance.other)
        walk[row] = integrals.of_tails(*both)
        noise[row] = integrals.of_masses(*both)
        if walk[row].any():  # else an average that is a copy of the checkpoint
            points = [each.t for each in both if isinstance(each, Point)]
            scatter[row] = np.bincount(segments_of(edges, points), minlength=edges.size - 1)
    squared = np.array([distance.squared for _, distance in pairs])
    rounding = np.array([distance.rounding for _, distance in pairs])
    by_pair = squared[:, None]
    relative_rounding = np.minimum(rounding / squared, 1.0)
    return Influences(walk / by_pair, noise / by_pair, scatter / by_pair, relative_rounding)


class _Integrals:
    """Integrals over each segment of squared differences between two profiles: shape
    [segments]."""

    def __init__(self, edges: FloatArray, pairs: Sequence[Pair], steps: Steps | None) -> None:
        self._columns: dict[StoredProfile, int] = {}
        for profile, distance in pairs:
            self._columns.setdefault(profile, len(self._columns))
            self._columns.setdefault(distance.other, len(self._columns))
        profiles = list(self._columns)
        nodes = Nodes(edges, profiles, steps)
        self._tails = nodes.tails(profiles)
        self._masses = nodes.masses(profiles)
        self._weight = nodes.weight
        self._segments = edges.size - 1
        first = np.searchsorted(nodes.edges, edges[:-1])
        self._segment = np.searchsorted(first, nodes.interval, side="right") - 1

    def of_tails(self, later: StoredProfile, earlier: StoredProfile) -> FloatArray:
        return self._of(self._tails, later, earlier)

    def of_masses(self, later: StoredProfile, earlier: StoredProfile) -> FloatArray:
        return self._of(self._masses, later, earlier)

    def _of(self, values: FloatArray, later: StoredProfile, earlier: StoredProfile) -> FloatArray:
        difference = values[:, self._columns[later]] - values[:, self._columns[earlier]]
        squares = self._weight * difference**2
        return np.asarray(np.bincount(self._segment, squares, self._segments))


def segments_of(edges: FloatArray, times: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Return the segment of each time; a time at an edge belongs to the segment that ends there."""
    segment = np.searchsorted(edges, times) - 1
    return np.clip(segment, 0, edges.size - 2)


def spacing_of(edges: FloatArray, times: Sequence[float], steps: Steps | None) -> FloatArray:
    """Return the steps from one of the times to the next on each segment: shape [segments]."""
    segment = segments_of(edges, np.unique(times))
    count = np.bincount(segment, minlength=edges.size - 1)
    ends = edges if steps is None else steps.clock.step_at(edges)
    return np.asarray(np.diff(ends) / np.maximum(count, 1))
