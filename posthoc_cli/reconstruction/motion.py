"""What is known about stored averages in addition to their profiles: the motion of their network,
their norms, and the errors of their copies.

Model of the motion: the weights follow a random walk with independent increments of variance v(s)
ds, which depends on the learning rate, plus noise of intensity w(s) whose memory is shorter than
the time between snapshots, as of a network that is pulled back to its path. An average is theta_i =
integral p_i(s) theta(s) ds = theta(0) + integral tail_i(s) d theta(s). The expected squared
distance of two averages, one of them stored with a rounding error of variance r_j, is

    E |theta_i - theta_j|^2 = integral v (tail_i - tail_j)^2 ds + integral w (p_i - p_j)^2 ds + r_j,

linear in v and w. With both constant on segments of training, every measured distance is a linear
equation for them. Measurements are sums over the elements of all averaged (not copied) tensors, in
float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from posthoc_cli.decay_rules import OrdinaryEMA
from posthoc_cli.profiles import Discrete, FloatArray, Point, PowerFunction, StoredProfile, tails_at
from posthoc_cli.reconstruction.nodes import EQUAL, MOST_POINTS, Nodes, Steps, evenly_chosen
from posthoc_cli.reconstruction.sketch import Sketch

# --- stored averages

MEASURED = "measured"
SAMPLED = "sampled"
ASSUMED = "assumed"

ROUNDING: float = math.sqrt(2 * math.log(2) / 36)
"""Root mean square error of one rounding to nearest, relative to the values, in units of eps:
0.196.

The error of a value m 2**e is uniform within a spacing of eps 2**e, with variance (eps 2**e)**2 /
12. If logarithms of values are evenly distributed, the mean square of m in [1, 2) is 3 / (2 ln 2).
"""


@dataclass(frozen=True)
class Distance:
    """A squared distance from the average of the profile `other`, and the part of it that comes
    from roundings."""

    other: StoredProfile
    squared: float
    rounding: float
    # whether `other` takes the weights of two intervals before for the newest ones
    is_far: bool = False


Pair = tuple[StoredProfile, Distance]  # an average, and its distance from an earlier one


@dataclass(frozen=True)
class Measurements:
    """The squared norms of an exact average and of the rounding error of its stored copy; estimates
    for a large model.

    `distances` are to other averages, where both were sampled from files; headers hold none.
    """

    norm: float
    rounding: float
    distances: tuple[Distance, ...] = ()


@dataclass(frozen=True)
class StoredAverage:
    """A stored average, and its measurements."""

    profile: PowerFunction | Point | Discrete
    eps: float  # distance from 1 to the next number of the accumulator's dtype
    measurements: Measurements | None
    steps: Steps | None = None
    # time of a power function's first update, whose values also stand for the mass before it
    t_first: float = 1.0

    @property
    def start(self) -> float:
        """The earliest time at which motion matters: a tracker's first update, otherwise the first
        training step, or the beginning if steps are unknown."""
        if isinstance(self.profile, PowerFunction):
            return self.t_first
        if self.steps is None:
            return 0.0
        first_step = float(self.steps.clock.time_at(1))
        return min(self.profile.t_first, first_step)


# --- the prior


@dataclass(frozen=True)
class Prior:
    """What is known about snapshots in addition to their profiles. Arrays are in the snapshots'
    order: shape [n] each.

    `misfit` says how badly the motion explains the distances: the root mean square of log(measured
    / expected). A walk with noise explains the distances of ordinary training within a few per
    cent; if the path oscillates, or is smooth between snapshots, some distances are many times
    larger than expected, and others smaller.
    """

    motion: Motion
    rounding: FloatArray  # variance of each stored copy's rounding, r_i; 0 for an exact copy
    floor: FloatArray  # variance of one rounding of each average: no copy is more exact
    norm: FloatArray  # squared norm of each average
    # where the numbers come from: "measured" while training, "sampled" from the files, or "assumed"
    evidence: str
    steps: Steps | None = None
    misfit: float = 0.0
    sketch: Sketch | None = None

    def subset(self, snapshots: Sequence[int]) -> Prior:
        """Select the prior of some of the snapshots, given by their indices."""
        index = np.asarray(snapshots, dtype=np.intp)
        return replace(
            self,
            rounding=self.rounding[index],
            floor=self.floor[index],
            norm=self.norm[index],
        )


def assumed_prior(
    snapshots: Sequence[StoredProfile],
    rounding: float = 0.0,
    motion: Motion | None = None,
) -> Prior:
    """Assume the prior of planned or unmeasured snapshots, relative to the norm; `rounding` is a
    root mean square."""
    last = max(profile.t for profile in snapshots)
    ones = np.ones(len(snapshots))
    return Prior(
        motion=motion or Motion.even(last),
        rounding=rounding**2 * ones,
        floor=0 * ones,
        norm=ones,
        evidence=ASSUMED,
    )


# squared distance, relative to the largest one, below which its exact value hardly matters
_NEGLIGIBLE = 1e-4


def measured_prior(
    averages: Sequence[StoredAverage],
    sketch: Sketch | None = None,
) -> Prior:
    """Derive the prior from the measurements of a run's averages; `assumed_prior` if any average
    has none.

    The order of the averages affects only the order of the arrays. `sketch` covers the path up to
    the last one.
    """
    profiles = [average.profile for average in averages]
    measured = [average.measurements for average in averages if average.measurements is not None]
    if not measured or len(measured) < len(averages):
        return assumed_prior(profiles)
    norm = np.array([measurements.norm for measurements in measured])
    rounding = np.array([measurements.rounding for measurements in measured])
    eps = np.array([average.eps for average in averages])
    floor = norm * (ROUNDING * eps) ** 2
    steps = _newest_steps(averages)
    evidence = MEASURED
    misfit = 0.0
    pairs = _pairs(profiles, measured, floor) if sketch is None else []
    if sketch is not None:
        motion = Motion.from_sketch(sketch, steps)
    elif pairs:
        motion, misfit = _fit_distances(averages, pairs, norm, steps)
    else:
        motion = _even_motion(profiles, norm, steps)
        # Weights that are all 0 have distances, but all of these are 0.
        if norm.any() or not any(each.distances for each in measured):
            evidence = ASSUMED
    return Prior(
        motion=motion,
        rounding=rounding,
        floor=floor,
        norm=norm,
        evidence=evidence,
        steps=steps,
        misfit=misfit,
        sketch=sketch,
    )


def _even_motion(
    profiles: Sequence[StoredProfile],
    norm: FloatArray,
    steps: Steps | None,
) -> Motion:
    last = max(profile.t for profile in profiles)
    variance = ASSUMED_STRETCH**2 * float(norm.mean())
    return Motion.even(last, variance, steps)


def _newest_steps(averages: Sequence[StoredAverage]) -> Steps | None:
    """Find the steps of the newest average, or, if its file does not say the unit of its number, as
    for weights, of the one next to it."""
    in_order = sorted(averages, key=lambda average: _sort_key(average.profile))
    for average in reversed(in_order):
        if average.steps is not None:
            return average.steps
    return None


_NOISY = 0.5
"""Misfit that noise leaves, relative to a walk alone, below which averages of other libraries, one
at a time and without weights, show it. Of 20 motions with files 100 steps apart, noise that
forgets in 1 to 300 steps leaves 0 to 0.06, with a drift or of SGD about a minimum 0.12 to 0.23;
walks leave 0.68 to 0.93, with noise beside them 0.51 to 0.67. Taken for a walk, noise of one step
made errors 4.0 times the predicted ones, and 2.2 times so."""


def _fit_distances(
    averages: Sequence[StoredAverage],
    pairs: Sequence[Pair],
    norm: FloatArray,
    steps: Steps | None,
) -> tuple[Motion, float]:
    """Fit the motion that explains the distances of averages, of these squared norms; return it
    with `Prior.misfit`."""
    profiles = [average.profile for average in averages]
    times = [profile.t for profile in profiles]
    start = min(average.start for average in averages)
    # Other libraries' averages of one time take the mean of the same weights in late intervals:
    # with noise in place of a walk, combinations were up to 28 times as far off.
    discrete = [profile.t for profile in profiles if isinstance(profile, Discrete)]
    has_weights = any(isinstance(profile, Point) for profile in profiles)
    ordinary = discrete if has_weights else []
    near = [pair for pair in pairs if not pair[1].is_far]
    motion, expected = fit_motion(start, times, near, steps, not discrete, ordinary)
    misfit = _misfit(near, expected)
    are_sampled = any(update_interval(profile) > 1 for profile in profiles)
    if len(near) < len(pairs) and not are_sampled:
        motion = _fit_noise_instead(start, times, pairs, steps) or motion
    motion = _add_scatter(motion, profiles, steps)
    even = _even_motion(profiles, norm, steps)
    first = seen_from(start, profiles)
    return motion.with_unseen(first, float(even.walk[0])), misfit


def _fit_noise_instead(
    start: float,
    times: Sequence[float],
    pairs: Sequence[Pair],
    steps: Steps | None,
) -> Motion | None:
    """Fit the motion with noise that explains the distances; None if a walk does as well."""
    _, of_walk = fit_motion(start, times, pairs, steps, may_have_noise=False)
    motion, of_noise = fit_motion(start, times, pairs, steps)
    shows_noise = _misfit(pairs, of_noise) < _NOISY * _misfit(pairs, of_walk)
    return motion if shows_noise else None


def _add_scatter(
    motion: Motion,
    profiles: Sequence[StoredProfile],
    steps: Steps | None,
) -> Motion:
    """Add to a fitted motion the noise that its scatter shows."""
    discrete = [profile.t for profile in profiles if isinstance(profile, Discrete)]
    if any(update_interval(profile) > 1 for profile in profiles):
        times = [profile.t for profile in profiles]
        return replace(motion, sampling=sample_motion(motion, times, steps))
    return motion.with_forgotten(measure_spacing(motion.edges, discrete, steps))


_SAME = 0.98
"""Tail of an average from which on it is taken for equal to all others that have as much: what lies
before moves their difference by at most a fiftieth of its own motion."""

_SEEN_WITHIN = 400  # parts of training: `seen_from` is exact to one of them for averages


def seen_from(start: float, profiles: Sequence[StoredProfile]) -> float:
    """Find the time from which on averages show the motion: before it all of them move alike."""
    first = []
    for profile in profiles:
        if isinstance(profile, Point):
            first.append(profile.t)
            continue
        times = np.linspace(start, profile.t, _SEEN_WITHIN)
        same = times[profile.tail(times) >= _SAME]
        first.append(max(same, default=start))
    return float(min(first))


def _misfit(pairs: Sequence[Pair], expected: FloatArray) -> float:
    """Compute `Prior.misfit`, from what motion expects relative to each distance."""
    squares = np.array([distance.squared for _, distance in pairs])
    least = _NEGLIGIBLE * squares.max()
    ratios = (squares * expected + least) / (squares + least)
    logs = np.log(ratios)
    mean_square = np.mean(logs**2)
    return float(np.sqrt(mean_square)) / 2


def _sort_key(profile: StoredProfile) -> tuple[float, float, float]:
    """Make a sort key that depends on the profile alone; equal profiles have equal keys."""
    if isinstance(profile, PowerFunction):
        return profile.t, profile.gamma, 0.0
    late = profile.tail(profile.t / 2)
    return profile.t, np.inf, float(late)


def _pairs(
    profiles: Sequence[StoredProfile],
    measured: Sequence[Measurements],
    floor: FloatArray,
) -> list[Pair]:
    """Collect the measured distance of each pair of averages; if a pair has several records, the
    last one.

    Pairs of one power function, up to rounding, are left out: no motion explains their distance.
    """
    pairs: dict[tuple[object, object], Pair] = {}
    largest = max(measurements.norm for measurements in measured)
    least = 1e-18 * largest
    variances = floor.tolist()
    order = sorted(range(len(profiles)), key=lambda index: _sort_key(profiles[index]))
    for index in order:
        profile = profiles[index]
        variance = variances[index]
        for distance in measured[index].distances:
            earlier, later = sorted((profile, distance.other), key=_sort_key)
            keys = (_sort_key(later), _sort_key(earlier))
            # An average that equals the weights began again there: no motion explains that.
            is_at_once = isinstance(earlier, Discrete) and later == Point(earlier.t)
            if (is_at_once and distance.squared == 0) or _is_one_profile(*keys):
                continue
            # The partner may have been deleted; its floor is about the same.
            noise = distance.rounding + 2 * variance
            # A distance below the errors is only known to be small.
            squared = max(distance.squared, noise, least)
            if squared > 0:
                key = (_identity(later), _identity(earlier))
                pairs[key] = (later, Distance(earlier, squared, noise, distance.is_far))
    return list(pairs.values())


def _identity(profile: StoredProfile) -> object:
    """Make a key that only equal profiles share: a gamma that was computed elsewhere may differ in
    its last bits."""
    if isinstance(profile, PowerFunction):
        return profile.t, round(profile.gamma, 9)
    return profile


def _is_one_profile(
    later: tuple[float, ...],
    earlier: tuple[float, ...],
) -> bool:
    """Return whether two keys of `_sort_key` belong to one power function, up to rounding."""
    t, gamma, _ = later
    earlier_t, earlier_gamma, _ = earlier
    is_one_time = t - earlier_t <= EQUAL * t
    return is_one_time and abs(gamma - earlier_gamma) < 1e-6 * (gamma + 1)


# --- motion

ASSUMED_STRETCH = 0.25
"""Assumed root mean square length of the walk over all of training, relative to the norm of the
weights. Recorded runs have 0.01 (learning rate decayed to almost 0) to 0.45 (constant learning
rate)."""


# segments of a walk that rises towards the first update: each is off by a sixteenth of the rise
_UNSEEN = 8


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
        """Make a constant walk of total `variance` over (0, t], without noise."""
        count = t if steps is None else float(steps.clock.step_at(t))
        edges = np.array([0.0, t])
        walk = np.array([variance / count])
        return cls(edges, walk, noise=np.zeros(1))

    @classmethod
    def from_sketch(cls, sketch: Sketch, steps: Steps | None) -> Motion:
        """Derive the walk of a sketched path, see `Sketch.walked`, without noise."""
        distinct = np.unique(sketch.edges)
        if distinct.size < 2:
            last = distinct[0]
            edges = np.array([last / 2, last])
            return cls(edges, walk=np.zeros(1), noise=np.zeros(1))
        edges = evenly_chosen(distinct, MOST_SEGMENTS + 1)
        ends = edges if steps is None else steps.clock.step_at(edges)
        counts = np.diff(ends)
        walk = sketch.walk_length(edges) / counts
        return cls(edges, walk, noise=np.zeros_like(walk))

    def on(
        self,
        edges: FloatArray,
        alone: Sequence[float] = (),
        instant: float = 1.0,
    ) -> tuple[FloatArray, FloatArray]:
        """Compute walk and noise on intervals, each within one segment; the outer segments extend:
        [K + 1] to [K] each.

        Intervals that end at the times `alone` are single steps, as long as an `instant`, with much
        of an average's mass, as of a checkpoint: there noise is the scatter of one value.
        """
        middle = (edges[:-1] + edges[1:]) / 2
        begun = np.searchsorted(self.edges, middle, side="right")
        last = self.walk.size - 1
        segment = np.clip(begun - 1, 0, last)
        walk = self.walk[segment]
        noise = self.noise[segment]
        if self.scatter is not None:
            steps = np.searchsorted(edges, alone) - 1
            steps = steps[steps >= 0]
            scatter = self.scatter[segment[steps]]
            noise[steps] = instant * scatter
        return walk, noise

    def with_unseen(self, end: float, most: float) -> Motion:
        """Add a walk that rises to `most` from `end` back to the first update, where no average
        shows it.

        Learning rates fall: if only the last files of a run were kept, training before them was
        seldom as quiet as after.
        """
        start = self.edges[0]
        if end <= start:
            return self
        unseen = np.linspace(start, end, _UNSEEN + 1)
        edges = np.append(unseen, self.edges[self.edges > end])
        segment = find_segments(self.edges, edges[1:])
        motion = self._divide(edges, segment)
        walk = motion.walk[:_UNSEEN]
        middle = (unseen[1:] + unseen[:-1]) / 2
        share = (end - middle) / (end - start)
        walk += share * np.maximum(most - walk, 0.0)
        return motion

    def _divide(
        self,
        edges: FloatArray,
        segment: npt.NDArray[np.intp],
    ) -> Motion:
        """Divide the segments of the motion, each into some of the new ones."""
        scatter = self.scatter
        if scatter is not None:
            scatter = scatter[segment]
        sampling = self.sampling
        if sampling is not None:
            sampling = sampling[segment]
        return Motion(edges, self.walk[segment], self.noise[segment], scatter, sampling)

    def with_forgotten(self, spacing: FloatArray) -> Motion:
        """Replace the part of the walk that checkpoints show to be forgotten by noise.

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
        share = np.zeros_like(walked)
        np.divide(forgotten, total, out=share, where=self.scatter > 0)
        spectrum = share**2
        noise = self.noise + spectrum * walked * spacing / 3
        walk = (1 - spectrum) * self.walk
        return replace(self, walk=walk, noise=noise)


# --- the fit

# limit of the number of segments; with more snapshot times, several share a segment
MOST_SEGMENTS = 64

_DISTANCES_FOR_NOISE = 1.5
"""Number of distances per segment from which on noise is fitted, too. One profile whose snapshots
each have distances to the two previous ones has nearly 2."""

_FIRST = (1.0, 0.1)
_UPDATES = 1000
"""First walk, and first noise or scatter, each relative to what would explain the distances alone,
and the number of updates of a fit. Of 120 averages of checkpoints all were within 2 of the
predicted error; with a first noise of 1 or 0.01, 99 % were, and with 100 updates in place of 300 to
3,000, 93 %."""

_LEAST_OF_NEIGHBOURS = 0.3
"""Least walk of a segment, relative to the median of the five about it. Where distances overlap,
the best fit may have segments without any motion, which then cost nothing: coefficients as large as
46 used one, and were 50 times as far off as predicted. In `bench_checkpoints.py`, 5 of the 252
cells with uneven steps are beyond 3 of predicted without it, and 2 with it."""

_NO_WALK = 1e-300  # whose logarithm is finite
_LEAST_OF_NEXT = 0.01
"""Least walk of a segment, relative to the ones next to it: weights that come back to where they
were show none, and a walk of 1e-64 made a predicted error of 1e-6 for one of 0.07. The last of 20
segments of a rate that falls by a cosine has 0.03."""

_MOST_RAISED = 2.0
"""Most that the least walk may raise an expected distance to, relative to the measured one: then a
predicted error is at most 1.5 times too large by it."""

_UNSHOWN = 1e-20
"""Influence of a segment on the distances, relative to the largest, that comes from rounding alone:
eps squared."""


def fit_motion(
    start: float,
    times: Sequence[float],
    pairs: Sequence[Pair],
    steps: Steps | None = None,
    may_have_noise: bool = True,
    ordinary: Sequence[float] = (),
) -> tuple[Motion, FloatArray]:
    """Fit the motion that explains measured distances best; return it, and what it expects relative
    to the distances: shape [pairs].

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
    influences = compute_influences(edges, pairs, steps)
    spacing = measure_spacing(edges, ordinary, steps)
    has_enough = len(pairs) >= _DISTANCES_FOR_NOISE * segments
    fits_noise = may_have_noise and has_enough
    fits_scatter = len(ordinary) > 0
    fit = _Fit(influences, spacing, fits_noise, fits_scatter)
    if not fit.has_influence:
        still = np.zeros(segments)
        return Motion(edges, walk=still, noise=still), influences.rounding
    for _ in range(_UPDATES):
        fit.update()
    walk, noise = fit.intensities()
    others = influences.noise @ noise + influences.rounding
    walk = with_floor(walk, influences.walk, others)
    scatter = fit.proportion * walk * spacing
    expected = influences.expected_distances(walk, noise, scatter)
    motion = Motion(edges, walk, noise)
    if fits_scatter:
        motion = replace(motion, scatter=scatter)
    return motion, expected


def _ends_of_segments(start: float, times: Sequence[float]) -> FloatArray:
    later = [t for t in times if t > start]
    distinct = np.unique([start, *later])
    if distinct.size == 1:
        return np.array([start / 2, start])
    return evenly_chosen(distinct, MOST_SEGMENTS + 1)


class _Fit:
    """The unknowns of `fit_motion`, and their updates.

    `proportion` is the proportion of scatter to the walk from one time of an ordinary average to
    the next.
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
        has_walk = influences.walk.any(axis=1)
        explained = has_walk | (influences.rounding > 0)
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
            totals = influence.sum(axis=1)
            mean = max(totals.mean(), 1e-300)
            first.append(share / mean)
        self._intensities = np.repeat(first, self._segments)
        self.proportion = _FIRST[1] if fits_scatter else 0.0
        self._scattered = np.zeros_like(self._influence)
        by_spacing = influences.scatter * spacing
        self._scattered[:, : self._segments] = by_spacing[explained]
        self._rows = self._influence + self.proportion * self._scattered

    def update(self) -> None:
        rows = self._rows
        total = rows.sum(axis=0)
        expected = rows @ self._intensities + self._known
        weights = np.maximum(expected, 1e-12) ** -2
        weighted = weights @ rows
        changes = np.ones_like(total)
        np.divide(weighted, total, out=changes, where=total > 0)
        if self.proportion:
            scatter = self._scattered @ self._intensities
            if scatter.any():
                self.proportion *= np.sqrt(weights @ scatter / scatter.sum())
                self._rows = self._influence + self.proportion * self._scattered
        self._intensities *= np.sqrt(changes)

    def intensities(self) -> FloatArray:
        """Return walk and noise: shape [2, segments].

        A segment that no distance shows, such as the one before the first update, moves as its
        neighbours do.
        """
        fitted = self._intensities.reshape(-1, self._segments)
        totals = self._influence.sum(axis=0)
        sizes = totals.reshape(fitted.shape)
        segments = np.arange(self._segments)
        result = np.zeros((2, self._segments))
        for kind, values in enumerate(fitted):
            least = _UNSHOWN * sizes[kind].max()
            shown = np.flatnonzero(sizes[kind] > least)
            result[kind] = np.interp(segments, shown, values[shown])
        return result


def with_floor(walk: FloatArray, walks: FloatArray, others: FloatArray) -> FloatArray:
    """Raise a fitted walk to the least walk in each segment, where the distances allow it.

    `walks` is the influence of the walk on the distances, and `others` what else they consist of,
    both relative to the measured ones: shapes [pairs, segments] and [pairs]. Where distances show a
    standstill, a hundredth of the next segment's walk is left, as they may be small for another
    reason.
    """
    least = _LEAST_OF_NEIGHBOURS * median_of_neighbours(walk)
    added = np.maximum(least - walk, 0.0)
    raised = walks * added
    sums = raised.sum(axis=1)
    total = np.maximum(sums, 1e-300)
    # A distance that its neighbours' walk explains more than once may still be all of this one's.
    explained = np.minimum(walks @ walk, 1.0)
    room = np.maximum(_MOST_RAISED - explained - others, 0.0)
    allowed = np.minimum(room / total, 1.0)
    shares = np.where(raised > 0, allowed[:, None], 1.0)
    share = shares.min(axis=0)
    logs = np.log(np.maximum(walk + share * added, _NO_WALK))
    falls = math.log(_LEAST_OF_NEXT) * np.arange(walk.size)
    from_before = np.maximum.accumulate(logs - falls) + falls
    from_after = np.maximum.accumulate((logs + falls)[::-1])[::-1] - falls
    floored = np.exp(np.maximum(from_before, from_after))
    return np.where(floored > 2 * _NO_WALK, floored, 0.0)


def update_interval(profile: StoredProfile) -> int:
    """Find the number of steps from one update of an average to the next."""
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


def sample_motion(
    motion: Motion,
    times: Sequence[float],
    steps: Steps | None,
) -> FloatArray:
    """Estimate `Motion.sampling` for averages at these times."""
    if motion.scatter is not None:
        return _SAMPLED_OF_SCATTER * motion.scatter
    spacing = measure_spacing(motion.edges, times, steps)
    return _SAMPLED_OF_WALK * motion.walk * spacing


def sampling_errors(profiles: Sequence[StoredProfile], motion: Motion) -> FloatArray:
    """Compute a root of the covariance of the errors of averages that take in one value of several:
    shape [n or less, n].

    Their sum over updates k is sum_k m_k (theta_k - the mean of the steps since update k - 1), with
    the masses m_k. Averages that share masses share their error.
    """
    intervals = np.array([update_interval(profile) for profile in profiles])
    jumps = [profile.jumps for profile in profiles if isinstance(profile, OrdinaryEMA)]
    if motion.sampling is None or not jumps:
        return np.zeros((0, len(profiles)))
    times = np.unique(np.concatenate(jumps))
    edges = evenly_chosen(times, MOST_POINTS)
    tails = tails_at(edges, profiles)
    masses = -np.diff(tails, axis=0, prepend=1.0)
    steps = np.diff(edges, prepend=edges[0])
    counts = steps[:, None] / intervals
    updates = np.maximum(counts, 1.0)
    segment = find_segments(motion.edges, edges)
    variance = motion.sampling[segment]
    deviation = np.sqrt(variance[:, None] / updates)
    errors = deviation * masses
    rows = np.where(intervals > 1, errors, 0.0)
    return compress_rows(rows)


def compress_rows(rows: FloatArray) -> FloatArray:
    """Reduce rows to at most as many as there are columns, with the same covariance."""
    triangle = np.linalg.qr(rows, mode="r")
    return np.asarray(triangle)


def median_of_neighbours(values: FloatArray) -> FloatArray:
    """Compute the median of each value, the two before and the two after it, where these exist:
    shape of `values`."""
    padded = np.pad(values, 2, constant_values=np.nan)
    neighbours = sliding_window_view(padded, 5)
    return np.nanmedian(neighbours, axis=1)


class Influences(NamedTuple):
    """Contributions to each measured distance, relative to it: of a walk, a noise and a scatter of
    intensity 1 on each segment alone, [pairs, segments] each, and of rounding, [pairs]."""

    walk: FloatArray
    noise: FloatArray
    scatter: FloatArray
    rounding: FloatArray

    def expected_distances(
        self,
        walk: FloatArray,
        noise: FloatArray,
        scatter: FloatArray,
    ) -> FloatArray:
        """Compute what motion expects of the distances, relative to them: shape [pairs]."""
        lasting = self.walk @ walk + self.noise @ noise
        known = lasting + self.rounding
        return np.asarray(known + self.scatter @ scatter)


def compute_influences(
    edges: FloatArray,
    pairs: Sequence[Pair],
    steps: Steps | None,
) -> Influences:
    """Compute the influences of motion between `edges` on measured distances."""
    integrals = _Integrals(edges, pairs, steps)
    segments = edges.size - 1
    walk, noise, scatter = np.zeros((3, len(pairs), segments))
    rounding = np.zeros(len(pairs))
    for row, (profile, distance) in enumerate(pairs):
        both = (profile, distance.other)
        walk[row] = integrals.integrate_tails(*both)
        noise[row] = integrals.integrate_masses(*both)
        if walk[row].any():  # else an average that is a copy of the checkpoint
            points = [each.t for each in both if isinstance(each, Point)]
            segment = find_segments(edges, points)
            scatter[row] = np.bincount(segment, minlength=segments)
        for kind in (walk, noise, scatter):
            kind[row] /= distance.squared
        share = distance.rounding / distance.squared
        rounding[row] = min(share, 1.0)
    return Influences(walk, noise, scatter, rounding)


class _Integrals:
    """Integrals over each segment of squared differences between two profiles: shape
    [segments]."""

    def __init__(
        self,
        edges: FloatArray,
        pairs: Sequence[Pair],
        steps: Steps | None,
    ) -> None:
        self._columns: dict[StoredProfile, int] = {}
        for profile, distance in pairs:
            for each in (profile, distance.other):
                self._columns.setdefault(each, len(self._columns))
        profiles = list(self._columns)
        nodes = Nodes(edges, profiles, steps)
        self._tails = nodes.tails(profiles)
        self._masses = nodes.masses(profiles)
        self._weight = nodes.weight
        self._segments = edges.size - 1
        first = np.searchsorted(nodes.edges, edges[:-1])
        begun = np.searchsorted(first, nodes.interval, side="right")
        self._segment = begun - 1

    def integrate_tails(self, later: StoredProfile, earlier: StoredProfile) -> FloatArray:
        return self._integrate_square(self._tails, later, earlier)

    def integrate_masses(self, later: StoredProfile, earlier: StoredProfile) -> FloatArray:
        return self._integrate_square(self._masses, later, earlier)

    def _integrate_square(
        self,
        values: FloatArray,
        later: StoredProfile,
        earlier: StoredProfile,
    ) -> FloatArray:
        of_later = values[:, self._columns[later]]
        of_earlier = values[:, self._columns[earlier]]
        difference = of_later - of_earlier
        squares = self._weight * difference**2
        sums = np.bincount(self._segment, squares, self._segments)
        return np.asarray(sums)


def find_segments(
    edges: FloatArray,
    times: npt.ArrayLike,
) -> npt.NDArray[np.intp]:
    """Find the segment of each time; a time at an edge belongs to the segment that ends there."""
    segment = np.searchsorted(edges, times) - 1
    return np.clip(segment, 0, edges.size - 2)


def measure_spacing(
    edges: FloatArray,
    times: Sequence[float],
    steps: Steps | None,
) -> FloatArray:
    """Measure the steps from one of the times to the next on each segment: shape [segments]."""
    distinct = np.unique(times)
    segment = find_segments(edges, distinct)
    counts = np.bincount(segment, minlength=edges.size - 1)
    ends = edges if steps is None else steps.clock.step_at(edges)
    lengths = np.diff(ends)
    return np.asarray(lengths / np.maximum(counts, 1))
