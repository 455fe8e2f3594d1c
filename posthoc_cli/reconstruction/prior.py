"""The prior of a reconstruction: the motion of a run's network, and the errors of its stored averages.

Measurements are sums over the elements of all averaged tensors (not of copied ones), in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from posthoc_cli.profiles import (
    Discrete,
    FloatArray,
    Point,
    PowerFunction,
    StoredProfile,
    roundings,
)
from posthoc_cli.reconstruction.basis import Steps, gammas_and_times, order_of
from posthoc_cli.reconstruction.motion import (
    ASSUMED_STRETCH,
    Motion,
    PairDistance,
    Sketch,
    expected_distances,
    fit_motion,
)

MEASURED, SAMPLED, ASSUMED = "measured", "sampled", "assumed"

ROUNDING: float = math.sqrt(2 * math.log(2) / 36)
"""Root mean square error of one rounding to nearest, relative to the values, in units of eps: 0.196.

The error of a value m 2**e is uniform within a spacing of eps 2**e, with variance (eps 2**e)**2 / 12. If logarithms of
values are evenly distributed, the mean square of m in [1, 2) is 3 / (2 ln 2).
"""


@dataclass(frozen=True)
class Distance:
    """The squared Euclidean distance between an average and another average of the same run, its partner.

    `t` and `sigma_rel` belong to the partner, which may have been deleted since. `squared` is the distance of this
    average, exact, from the partner, exact if it has the same time, else as stored; `rounding` is the part of `squared`
    that the partner's rounding causes.
    """

    t: float
    sigma_rel: float
    squared: float
    rounding: float

    @property
    def other(self) -> StoredProfile:
        """The partner's profile."""
        return PowerFunction.from_sigma_rel(self.sigma_rel, self.t)


@dataclass(frozen=True)
class DistanceTo(Distance):
    """A distance to a partner that is no power function; headers hold no such distances."""

    profile: StoredProfile

    @property
    def other(self) -> StoredProfile:
        """The partner's profile."""
        return self.profile


@dataclass(frozen=True)
class Measurements:
    """The measurements of one stored average; for a large model estimates from one subset of the elements.

    Attributes:
        norm: squared norm of the exact average.
        rounding: squared norm of the difference between the stored copy and the exact average.
        distances: to other averages, where both were sampled from files; headers hold none.
    """

    norm: float
    rounding: float
    distances: tuple[Distance, ...] = ()


@dataclass(frozen=True)
class StoredAverage:
    """A stored average and its measurements.

    Attributes:
        profile: of its tracker, of a checkpoint or of an average over known times.
        updates: number of updates in the average.
        eps: distance from 1 to the next number of the accumulator's dtype.
        measurements: None if nothing was measured.
        steps: the run's steps up to that time; None if unknown.
        inherited: expected squared error that remains from rounded snapshots from which the run was resumed.
        gammas: exponents of all profiles that share means with this one; empty if its means have its own weights.
        t_first: time of a power function's first update: its mass before that applies to the values of that time.
    """

    profile: PowerFunction | Point | Discrete
    updates: int
    eps: float
    measurements: Measurements | None
    steps: Steps | None = None
    inherited: float = 0.0
    gammas: tuple[float, ...] = ()
    t_first: float = 1.0

    @property
    def start(self) -> float:
        """The earliest time at which motion matters: a tracker's first update, otherwise the first training step."""
        if isinstance(self.profile, PowerFunction):
            return self.t_first
        first = self.profile.t_first
        return first if self.steps is None else min(first, float(self.steps.clock.time_at(1)))

    @property
    def roundings(self) -> float:
        """The number of independent roundings, each of a value of the average's size, that the average contains."""
        if isinstance(self.profile, PowerFunction):
            return roundings(self.profile.gamma, self.updates)
        if isinstance(self.profile, Point):
            return 0.0
        # Each update rounds, and its error decays as the mass of the earlier values does.
        return float(np.sum((1 - self.profile.tail(self.profile.times)) ** 2))


@dataclass(frozen=True)
class Prior:
    """What is known about snapshots in addition to their profiles. Arrays are in the snapshots' order: shape [n] each.

    Attributes:
        motion: of the network.
        rounding: variance of each stored copy's rounding, r_i; 0 for an exact copy.
        arithmetic: variance of each average from the arithmetic of its updates.
        norm: squared norm of each average.
        source: where the numbers come from: "measured" while training, "sampled" from the files, or "assumed".
        steps: of the run; None if unknown.
        doubt: how badly the motion explains the measured distances, see `_doubt`.
        sketch: of the path of the weights; None if the hook made none.
        shared: errors that averages have in common, as independent components: shape [n, components]; None for none.
    """

    motion: Motion
    rounding: FloatArray
    arithmetic: FloatArray
    norm: FloatArray
    source: str
    steps: Steps | None = None
    doubt: float = 0.0
    sketch: Sketch | None = None
    shared: FloatArray | None = None

    def of(self, snapshots: Sequence[int]) -> Prior:
        """Return the prior of a subset of the snapshots, given by their indices."""
        index = np.asarray(snapshots, dtype=np.intp)
        arrays: dict[str, Any] = {name: v[index] for name, v in vars(self).items() if isinstance(v, np.ndarray)}
        return replace(self, **arrays)

    def sampled(self) -> Prior:
        """Return this prior with `source` "sampled" if it was "measured"."""
        return replace(self, source=SAMPLED) if self.source == MEASURED else self

    def stretched(self, steps: float, t: float, norm: float) -> Motion:
        """Return the motion of a run with `steps` steps that takes the path up to `t`, relative to a squared norm.

        The increments over dn steps have the variance v dn, so that v shrinks as the number of steps grows. Densities
        shrink, too, and integral w p^2 dn with them, so that w grows.
        """
        motion = self.motion
        edges = motion.edges if self.steps is None else self.steps.clock.step_at(motion.edges)
        factor = steps / (t if self.steps is None else float(self.steps.clock.step_at(t)))
        # The new run moves from its start, even if the averages of this run began later.
        edges = np.concatenate(([0.0], edges[1:] * factor))
        return Motion(edges, motion.walk / (factor * norm), motion.noise * factor / norm)


def assumed_prior(snapshots: Sequence[StoredProfile], rounding: float = 0.0, motion: Motion | None = None) -> Prior:
    """Return the prior of planned or unmeasured snapshots, relative to the norm.

    `rounding` is the root mean square error of a stored copy; `motion` is an even walk by default.
    """
    ones = np.ones(len(snapshots))
    motion = motion or Motion.even(max(p.t for p in snapshots))
    return Prior(motion, rounding**2 * ones, 0 * ones, ones, ASSUMED)


def measured_prior(averages: Sequence[StoredAverage], sketch: Sketch | None = None) -> Prior:
    """Return the prior from the measurements of a run's averages, or `assumed_prior` if any average has none.

    The order of the averages affects only the order of the arrays. `sketch` covers the path up to the last average.
    """
    measured = [average.measurements for average in averages if average.measurements is not None]
    if not measured or len(measured) < len(averages):
        return assumed_prior([average.profile for average in averages])
    norm = np.array([measurements.norm for measurements in measured])
    counts = np.array([average.roundings for average in averages])
    arithmetic = norm * np.array([(ROUNDING * average.eps) ** 2 for average in averages]) * counts
    inherited = np.array([average.inherited for average in averages])
    profiles = [average.profile for average in averages]
    in_order = sorted(range(len(averages)), key=lambda i: order_of(profiles[i]))
    steps = averages[in_order[-1]].steps
    found = [] if sketch else _distances([(profiles[i], measured[i], arithmetic[i]) for i in in_order])
    distances = [distance for distance in found if not distance.same_profile]
    if sketch is not None:
        motion = sketch.motion(steps)
    elif distances:
        times = [profile.t for profile in profiles]
        # Other libraries' averages of one time take the mean of the same weights in late intervals: with noise in place
        # of a walk, combinations were up to 28 times as far off.
        may_have_noise = not any(isinstance(profile, Discrete) for profile in profiles)
        start = min(average.start for average in averages)
        motion = fit_motion(start, times, distances, steps, may_have_noise)
    else:
        motion = Motion.even(profiles[in_order[-1]].t, ASSUMED_STRETCH**2 * float(norm.mean()), steps)
    # Weights that are all 0 have distances, but all of these are 0.
    still = not norm.any() and any(measurements.distances for measurements in measured)
    return Prior(
        motion, np.array([measurements.rounding for measurements in measured]), arithmetic, norm,
        MEASURED if distances or still or sketch is not None else ASSUMED, steps,
        _doubt(motion, distances, steps) if distances else 0.0, sketch, _shared(averages, inherited, sketch),
    )  # fmt: skip


def misfit(averages: Sequence[StoredAverage]) -> float:
    """Return how badly even the best motion explains the distances: the root mean square of log(measured / fitted).

    Return nan with fewer than two distances above 0, and infinity where no motion can explain them.
    """
    measured = [
        (average.profile, average.measurements, 0.0) for average in averages if average.measurements is not None
    ]
    distances = [distance for distance in _distances(measured) if not distance.same_profile]
    if len(distances) < 2:
        return math.nan
    steps, start, times = averages[0].steps, min(average.start for average in averages), [p.t for p, _, _ in measured]
    even = Motion(np.array([start, max(times)]), np.ones(1), np.ones(1))
    if start >= max(times) or np.any(expected_distances(even, distances, steps) <= 0):
        return math.inf  # profiles that are equal have no distance, whatever the motion
    motion = fit_motion(start, times, distances, steps)
    return float(np.sqrt(np.mean(np.log(expected_distances(motion, distances, steps)) ** 2)))


_NEGLIGIBLE = 1e-4
"""Squared distance, relative to the largest one, below which its exact value hardly matters."""


def _doubt(motion: Motion, distances: Sequence[PairDistance], steps: Steps | None) -> float:
    """Return how badly the motion explains the distances: the root mean square of log(measured / expected).

    A walk with noise whose sizes vary explains the distances of ordinary training within a few per cent. If the path
    oscillates, or is smooth between snapshots, some are many times larger than expected, and others smaller.
    """
    measured = np.array([distance.squared for distance in distances])
    least = _NEGLIGIBLE * measured.max()
    expected = measured * expected_distances(motion, distances, steps)
    return float(np.sqrt(np.mean(np.log((expected + least) / (measured + least)) ** 2))) / 2


def _shared(averages: Sequence[StoredAverage], inherited: FloatArray, sketch: Sketch | None) -> FloatArray | None:
    """Return `Prior.shared`: inherited errors, and those from means that profiles share."""
    powers = {i: average.profile for i, average in enumerate(averages) if isinstance(average.profile, PowerFunction)}
    tracked, profiles = list(powers), list(powers.values())
    gammas, times = gammas_and_times(profiles)
    rows = [np.zeros((0, len(tracked)))]
    if inherited.any():
        order = np.argsort(times, kind="stable")
        rows.append(np.zeros((len(tracked), len(tracked))))
        rows[-1][:, order] = inherited_factor(inherited[tracked][order], gammas[order], times[order])
    largest = max((gamma for average in averages for gamma in average.gammas), default=0.0)
    steps = averages[-1].steps
    if sketch is not None and steps is not None and np.any(gammas < largest):
        updates = steps.clock.step_at(sketch.edges) / steps.stride
        rows += (errors for errors in sketch.of_shared_means(profiles, largest, updates) if errors.any())
    shared = np.zeros((len(averages), sum(map(len, rows))))
    shared[tracked] = np.vstack(rows).T
    return shared if shared.any() else None


def _distances(averages: Sequence[tuple[StoredProfile, Measurements, float]]) -> list[PairDistance]:
    """Return the measured distance of each pair of averages; if a pair has several records, the last one."""
    distances: dict[tuple[tuple[float, ...], ...], PairDistance] = {}
    floor = 1e-18 * max(measurements.norm for _, measurements, _ in averages)
    for profile, measurements, arithmetic in averages:
        for distance in measurements.distances:
            earlier, later = sorted((profile, distance.other), key=order_of)
            # The partner may have been deleted; its arithmetic has about the same variance.
            noise = distance.rounding + 2 * arithmetic
            # A distance below the errors is only known to be small.
            squared = max(distance.squared, noise, floor)
            if squared > 0:
                # A gamma that was computed elsewhere may differ in its last bits.
                pair = tuple((t, round(gamma, 9), half) for t, gamma, half in map(order_of, (later, earlier)))
                distances[pair] = PairDistance(later, earlier, squared, noise)
    return list(distances.values())


# --- correlated roundings --------------------------------------------------------------------------
#
# If an element moves by several spacings of the storage dtype between two snapshots, its rounding errors in them are
# independent. If it hardly moves, it is rounded to the same value, and combining the snapshots does not average the
# error out. The errors are uniform within a spacing h, with variance r = h^2 / 12, and periodic in the value with
# period h. By the Fourier series of that sawtooth, their correlation after a Gaussian displacement of variance d is
#
#     rho = 6 / pi^2 sum_k k^-2 exp(-2 pi^2 k^2 d / h^2) = 6 / pi^2 sum_k k^-2 exp(-pi^2 / 6 k^2 d / r).
#
# With sums over all elements for d and r, it holds for a network whose elements move by equally many spacings. As a
# function of expected squared distances it is a mixture of Gaussian kernels, hence positive semidefinite.

_FAR = 12.0
"""Squared distance d / r beyond which the correlation is negligible: exp(-pi^2 / 6 * 12) = 3e-9."""

_LARGEST = 0.99
"""Correlation of the errors of two copies without motion between them. With 1, coefficients of opposite signs could
cancel errors whose sizes differ a little, and grow without bound."""


def rounding_factor(rounding: FloatArray, arithmetic: FloatArray, apart: FloatArray) -> FloatArray:
    """Return a matrix B such that B^T B is the covariance of the stored copies' errors: shape [n, n].

    `rounding` and `arithmetic` are variances, [n], the latter of independent errors; `apart` holds the expected squared
    distances of the averages, [n, n].
    """
    root = np.sqrt(rounding)
    scale = root[:, None] * root
    with np.errstate(over="ignore"):  # infinity is a valid limit
        near = (apart < _FAR * scale) & ~np.eye(root.size, dtype=bool)
    if not near.any():
        return np.diag(np.sqrt(rounding + arithmetic))
    correlation = np.eye(root.size)
    correlation[near] = _LARGEST * _correlation(apart[near] / scale[near])
    # NumPy's eigh uses divide and conquer; the QR driver fails on about 1 % of these clustered spectra.
    values, vectors = np.linalg.eigh(correlation * scale + np.diag(arithmetic))
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T, dtype=np.float64)


def inherited_factor(inherited: FloatArray, gamma: FloatArray, times: FloatArray) -> FloatArray:
    """Return a matrix B such that B^T B is the covariance of errors inherited from rounded snapshots: shape [n, n].

    An average at t keeps the share (t_i / t)^(gamma + 1) of the error of an earlier average of its profile; the rest of
    its error arose between the two. `inherited` holds the variances, [n]; `times` are in ascending order.
    """
    factor = np.zeros((times.size, times.size))
    for profile in (np.flatnonzero(gamma == exponent) for exponent in np.unique(gamma)):
        factor[profile[0], profile[0]] = np.sqrt(inherited[profile[0]])
        for before, after in pairwise(profile.tolist()):
            kept = factor[:, before] * (times[before] / times[after]) ** (gamma[after] + 1)
            variance = float(kept @ kept)
            factor[:, after] = kept * np.sqrt(min(1.0, inherited[after] / variance)) if variance > 0 else 0.0
            factor[after, after] = np.sqrt(max(inherited[after] - variance, 0.0))
    return factor


def error_after_rounding(error: float, rounding: float, spread: float, moved: float, share: float) -> float:
    """Return the expected squared error of an average that resumes from its stored copy, `error` before the rounding.

    The values of a copy are representable in the storage dtype, so that the next rounding depends only on the
    displacement from them: `share`, the mass of the values since the last resume, times the average's lag, of which the
    same share is forgotten. Two consecutive displacements differ by 2 share times their square; where that is small,
    the errors have one sign and add up. `rounding` is the squared error of the last rounding, `spread` its expectation
    for arbitrary values; `moved` is the squared distance from the copy of the last resume.
    """
    correlation = float(_correlation(np.array([2 * share * moved / spread]))[0]) if spread > 0 else 0.0
    return error + rounding + 2 * correlation * float(np.sqrt(error * rounding))


def _correlation(distance: FloatArray) -> FloatArray:
    """Return the correlation of two rounding errors at squared distances d / r: shape of `distance`."""
    squares = np.arange(1, 65) ** 2
    return np.asarray(sum(np.exp(-(np.pi**2) / 6 * k * distance) / k for k in squares) / sum(1 / squares))
