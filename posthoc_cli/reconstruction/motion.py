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
        cls, t: float, variance: float = ASSUMED_STRETCH**2, steps: Steps | None = None
    ) -> Motion:
        """Return a constant walk of total `variance` over (0, t], without noise."""
        count = t if steps is None else float(steps.clock.step_at(t))
        edges = np.array([0.0, t])
        walk = np.array([variance / count])
        return cls(edges, walk, noise=np.zeros(1))

    def on(
        self, edges: FloatArray, alone: Sequence[float] = (), instant: float = 1.0
    ) -> tuple[FloatArray, FloatArray]:
        """Return walk and noise on intervals, each within one segment; the outer segments extend:
        [K + 1] to [K] each.

        Intervals that end at the times `alone` are single steps, as long as an `instant`, with much
        of an average's mass, as of a checkpoint: there noise is the scatter of one value.
        """
        middle = (edges[:-1] + edges[1:]) / 2
        found = np.searchsorted(self.edges, middle, side="right") - 1
        segment = np.clip(found, 0, self.walk.size - 1)
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
        share = np.divide(forgotten, total, out=0 * walked, where=self.scatter > 0) ** 2
        noise = self.noise + share * walked * spacing / 3
        return replace(self, walk=(1 - share) * self.walk, noise=noise)


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
    later = [t for t in times if t > start]
    edges = evenly_chosen(np.unique([start, *later]), MOST_SEGMENTS + 1)
    if edges.size == 1:
        edges = np.array([start / 2, start])
    segments = edges.size - 1
    walks, noises, scatters, rounding = influences(edges, pairs, steps)
    # Averages that should be equal, and differ, are not what their files say: no motion explains
    # them.
    explained = walks.any(axis=1) | (rounding > 0)
    kinds = [walks]
    if may_have_noise and len(pairs) >= _DISTANCES_FOR_NOISE * segments:
        kinds.append(noises)
    influence = np.hstack(kinds)[explained]
    known = rounding[explained]
    walk, noise = unknowns = np.zeros((2, segments))
    if not influence.any():
        return Motion(edges, walk, noise), rounding
    # The same walk everywhere, as large as the distances are in the mean, and far less noise.
    first = []
    for share, part in zip(_FIRST, np.hsplit(influence, len(kinds)), strict=False):
        mean = part.sum(axis=1).mean()
        first.append(share / max(mean, 1e-300))
    x = np.repeat(first, segments)
    spacing = spacing_of(edges, ordinary, steps)
    scattered = np.zeros_like(influence)
    share = _FIRST[1] if len(ordinary) else 0.0
    scattered[:, :segments] = (scatters * spacing)[explained]
    rows = influence + share * scattered
    for _ in range(_UPDATES):
        total = rows.sum(axis=0)
        weights = np.maximum(rows @ x + known, 1e-12) ** -2
        ratio = np.divide(weights @ rows, total, out=np.ones_like(total), where=total > 0)
        if share and (each := scattered @ x).any():
            share *= np.sqrt(weights @ each / each.sum())
            rows = influence + share * scattered
        x *= np.sqrt(ratio)
    # A segment that no distance shows, as that before the first update, moves as its neighbours do.
    sizes = np.split(influence.sum(axis=0), len(kinds))
    for kind, values, size in zip(unknowns, np.split(x, len(kinds)), sizes, strict=False):
        shown = np.flatnonzero(size > _UNSHOWN * size.max())
        kind[:] = np.interp(np.arange(segments), shown, values[shown])
    walk = with_floor(walk, walks, noises @ noise + rounding)
    scatter = share * walk * spacing
    expected = walks @ walk + noises @ noise + rounding + scatters @ scatter
    motion = Motion(edges, walk, noise, scatter if len(ordinary) else None)
    return motion, np.asarray(expected)


def with_floor(walk: FloatArray, walks: FloatArray, others: FloatArray) -> FloatArray:
    """Return a fitted walk with the least walk in each segment, where the distances allow it.

    `walks` is the influence of the walk on the distances, and `others` what else they consist of,
    both relative to the measured ones: shapes [pairs, segments] and [pairs]. A standstill that
    distances show remains one.
    """
    least = _LEAST_OF_NEIGHBOURS * median_of_neighbours(walk)
    added = np.maximum(least - walk, 0.0)
    raised = walks * added
    total = raised.sum(axis=1)
    room = np.maximum(_MOST_RAISED - walks @ walk - others, 0.0)
    allowed = np.minimum(room / np.maximum(total, 1e-300), 1.0)
    shares = np.where(raised > 0, allowed[:, None], 1.0).min(axis=0)
    return np.asarray(walk + shares * added)


def interval_of(profile: StoredProfile) -> int:
    """Return the number of steps from one update of an average to the next."""
    return int(profile.settings["every"]) if isinstance(profile, OrdinaryEMA) else 1


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
    edges = evenly_chosen(np.unique(np.concatenate(jumps)), MOST_POINTS)
    tails = np.stack([profile.tail(edges) for profile in profiles], axis=1)
    masses = -np.diff(tails, axis=0, prepend=1.0)
    steps = np.diff(edges, prepend=edges[0])[:, None]
    updates = np.maximum(steps / intervals, 1.0)
    variance = motion.sampling[segments_of(motion.edges, edges)][:, None]
    deviation = np.sqrt(variance / updates)
    rows = np.where(intervals > 1, deviation * masses, 0.0)
    return np.asarray(np.linalg.qr(rows, mode="r"))


def median_of_neighbours(values: FloatArray) -> FloatArray:
    """Return the median of each value, the two before and the two after it, as far as there are
    such: shape of `values`."""
    padded = np.pad(values, 2, constant_values=np.nan)
    return np.nanmedian(sliding_window_view(padded, 5), axis=1)


def influences(
    edges: FloatArray, pairs: Sequence[Pair], steps: Steps | None
) -> tuple[FloatArray, ...]:
    """Return the contributions to each measured distance, relative to it: a walk, a noise and a
    scatter of intensity 1 on each segment between `edges` alone, [pairs, segments] each, and
    rounding, [pairs].
    """
    place: dict[StoredProfile, int] = {}
    for profile, each in pairs:
        place.setdefault(profile, len(place))
        place.setdefault(each.other, len(place))
    nodes = Nodes(edges, list(place), steps)
    first = np.searchsorted(nodes.edges, edges[:-1])
    segment = np.searchsorted(first, nodes.interval, side="right") - 1
    tails = nodes.tails(list(place))
    masses = nodes.masses(list(place))
    segments = edges.size - 1
    walk, noise, scatter = np.zeros((3, len(pairs), segments))
    rounding = np.zeros(len(pairs))
    for row, (profile, each) in enumerate(pairs):
        later = place[profile]
        earlier = place[each.other]
        for kind, values in ((walk, tails), (noise, masses)):
            squares = (values[:, later] - values[:, earlier]) ** 2
            sums = np.bincount(segment, nodes.weight * squares, segments)
            kind[row] = sums / each.squared
        if walk[row].any():  # else an average that is a copy of the checkpoint
            points = [one.t for one in (profile, each.other) if isinstance(one, Point)]
            np.add.at(scatter[row], segments_of(edges, points), 1 / each.squared)
        rounding[row] = min(each.rounding / each.squared, 1.0)
    return walk, noise, scatter, rounding


def segments_of(edges: FloatArray, times: npt.ArrayLike) -> npt.NDArray[np.intp]:
    """Return the segment of each time; a time at an edge belongs to the segment that ends there."""
    return np.clip(np.searchsorted(edges, times) - 1, 0, edges.size - 2)


def spacing_of(edges: FloatArray, times: Sequence[float], steps: Steps | None) -> FloatArray:
    """Return the steps from one of the times to the next on each segment: shape [segments]."""
    count = np.bincount(segments_of(edges, np.unique(times)), minlength=edges.size - 1)
    ends = edges if steps is None else steps.clock.step_at(edges)
    return np.asarray(np.diff(ends) / np.maximum(count, 1))
