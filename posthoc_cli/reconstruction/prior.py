"""What is known about stored averages in addition to their profiles: their motion, their norms, and
the errors of their copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posthoc_cli.profiles import (
    Discrete,
    FloatArray,
    Point,
    PowerFunction,
    StoredProfile,
    roundings,
)
from posthoc_cli.reconstruction.motion import (
    ASSUMED_STRETCH,
    Distance,
    Motion,
    Pair,
    fit_motion,
    interval_of,
    sampling_of,
    spacing_of,
)
from posthoc_cli.reconstruction.nodes import EQUAL, Steps
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

    def of(self, snapshots: Sequence[int]) -> Prior:
        """Return the prior of a subset of the snapshots, given by their indices."""
        index = np.asarray(snapshots, dtype=np.intp)
        return replace(
            self,
            rounding=self.rounding[index],
            arithmetic=self.arithmetic[index],
            norm=self.norm[index],
            shared=None if self.shared is None else self.shared[index],
        )


def assumed_prior(
    snapshots: Sequence[StoredProfile],
    rounding: float = 0.0,
    motion: Motion | None = None,
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
    norm = np.array([measurements.norm for measurements in measured])
    rounding = np.array([measurements.rounding for measurements in measured])
    arithmetic = _arithmetic(averages, norm)
    steps = _newest_steps(averages)
    source = MEASURED
    doubt = 0.0
    if sketch is not None:
        motion = sketch.motion(steps)
    elif pairs := _pairs(profiles, measured, arithmetic):
        motion, doubt = _fitted(averages, pairs, steps)
    else:
        variance = ASSUMED_STRETCH**2 * float(norm.mean())
        motion = Motion.even(max(profile.t for profile in profiles), variance, steps)
        # Weights that are all 0 have distances, but all of these are 0.
        is_still = not norm.any() and any(measurements.distances for measurements in measured)
        source = MEASURED if is_still else ASSUMED
    return Prior(
        motion=motion,
        rounding=rounding,
        arithmetic=arithmetic,
        norm=norm,
        source=source,
        steps=steps,
        doubt=doubt,
        sketch=sketch,
        shared=_shared(averages, sketch),
    )


def _arithmetic(averages: Sequence[StoredAverage], norm: FloatArray) -> FloatArray:
    """Return `Prior.arithmetic` of averages with these squared norms."""
    counts = np.array([average.roundings for average in averages])
    eps = np.array([average.eps for average in averages])
    return np.asarray(norm * (ROUNDING * eps) ** 2 * counts)


def _newest_steps(averages: Sequence[StoredAverage]) -> Steps | None:
    """Return the steps of the newest average, or of the one next to it whose steps are known, as
    those of weights whose file does not say the unit of its number."""
    in_order = sorted(averages, key=lambda average: _order_of(average.profile))
    for average in reversed(in_order):
        if average.steps is not None:
            return average.steps
    return None


def _fitted(
    averages: Sequence[StoredAverage],
    pairs: Sequence[Pair],
    steps: Steps | None,
) -> tuple[Motion, float]:
    """Return the motion that explains the distances of averages, and `Prior.doubt`."""
    profiles = [average.profile for average in averages]
    times = [profile.t for profile in profiles]
    start = min(average.start for average in averages)
    # Other libraries' averages of one time take the mean of the same weights in late intervals:
    # with noise in place of a walk, combinations were up to 28 times as far off.
    discrete = [profile.t for profile in profiles if isinstance(profile, Discrete)]
    has_weights = any(isinstance(profile, Point) for profile in profiles)
    beside = discrete if has_weights else []
    motion, expected = fit_motion(start, times, pairs, steps, not discrete, beside)
    doubt = _doubt(pairs, expected)
    if any(interval_of(profile) > 1 for profile in profiles):
        sampling = sampling_of(motion, times, steps)
        return replace(motion, sampling=sampling), doubt
    spacing = spacing_of(motion.edges, discrete, steps)
    return motion.with_forgotten(spacing), doubt


def _doubt(pairs: Sequence[Pair], expected: FloatArray) -> float:
    """Return `Prior.doubt`, from what motion expects relative to each distance."""
    squares = np.array([distance.squared for _, distance in pairs])
    least = _NEGLIGIBLE * squares.max()
    ratios = (squares * expected + least) / (squares + least)
    return float(np.sqrt(np.mean(np.log(ratios) ** 2))) / 2


def _shared(averages: Sequence[StoredAverage], sketch: Sketch | None) -> FloatArray | None:
    """Return `Prior.shared`, from means that profiles share; None if there are none."""
    steps = averages[-1].steps
    largest = max((gamma for average in averages for gamma in average.gammas), default=0.0)
    powers = {
        index: average.profile
        for index, average in enumerate(averages)
        if isinstance(average.profile, PowerFunction)
    }
    if sketch is None or steps is None or all(p.gamma >= largest for p in powers.values()):
        return None
    updates = steps.clock.step_at(sketch.edges) / steps.stride
    rows = np.vstack(sketch.of_shared_means([*powers.values()], largest, updates))
    if not rows.any():
        return None
    shared = np.zeros((len(averages), len(rows)))
    shared[[*powers]] = rows.T
    return shared


def _order_of(profile: StoredProfile) -> tuple[float, float, float]:
    """Return a sort key that depends on the profile alone; equal profiles have equal keys."""
    if isinstance(profile, PowerFunction):
        return profile.t, profile.gamma, 0.0
    return profile.t, np.inf, float(profile.tail(profile.t / 2))


def _pairs(
    profiles: Sequence[StoredProfile],
    measured: Sequence[Measurements],
    arithmetic: FloatArray,
) -> list[Pair]:
    """Return the measured distance of each pair of averages; if a pair has several records, the
    last one.

    Pairs of one power function, up to rounding, are left out: no motion explains their distance.
    """
    pairs: dict[tuple[tuple[float, ...], ...], Pair] = {}
    floor = 1e-18 * max(measurements.norm for measurements in measured)
    averages = zip(profiles, measured, arithmetic.tolist(), strict=True)
    for profile, measurements, variance in sorted(averages, key=lambda row: _order_of(row[0])):
        for distance in measurements.distances:
            earlier, later = sorted((profile, distance.other), key=_order_of)
            keys = (_order_of(later), _order_of(earlier))
            if _is_one_profile(*keys):
                continue
            # The partner may have been deleted; its arithmetic has about the same variance.
            noise = distance.rounding + 2 * variance
            # A distance below the errors is only known to be small.
            squared = max(distance.squared, noise, floor)
            if squared > 0:
                # A gamma that was computed elsewhere may differ in its last bits.
                key = tuple((t, round(gamma, 9), tail) for t, gamma, tail in keys)
                pairs[key] = (later, Distance(earlier, squared, noise))
    return list(pairs.values())


def _is_one_profile(later: tuple[float, ...], earlier: tuple[float, ...]) -> bool:
    """Return whether two keys of `_order_of` are of one power function, up to rounding."""
    t, gamma, _ = later
    earlier_t, earlier_gamma, _ = earlier
    return t - earlier_t <= EQUAL * t and abs(gamma - earlier_gamma) < 1e-6 * (gamma + 1)


# --- correlated roundings
#
# If an element moves by several spacings of the storage dtype between two snapshots, its rounding
# errors in them are independent. If it hardly moves, it is rounded to the same value, and combining
# the snapshots does not average the error out. The errors are uniform within a spacing h, with
# variance r = h^2 / 12, and periodic in the value with period h. By the Fourier series of that
# sawtooth, their correlation after a Gaussian displacement of variance d is
#
#     rho = 6 / pi^2 sum_k k^-2 exp(-2 pi^2 k^2 d / h^2)
#         = 6 / pi^2 sum_k k^-2 exp(-pi^2 / 6 k^2 d / r).
#
# With sums over all elements for d and r, it holds for a network whose elements move by equally
# many spacings. As a function of expected squared distances it is a mixture of Gaussian kernels,
# hence positive semidefinite.

_FAR = 12.0
"""Squared distance d / r beyond which the correlation is negligible, exp(-pi^2 / 6 * 12) = 3e-9."""

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
    near = (apart < _FAR * scale) & ~np.eye(root.size, dtype=bool)
    if not near.any():
        return np.diag(np.sqrt(rounding + arithmetic))
    covariance = np.diag(rounding + arithmetic)
    scales = scale[near]
    correlation = _correlation(apart[near] / scales)
    covariance[near] = _LARGEST * scales * correlation
    # NumPy's eigh uses divide and conquer; the QR driver fails on about 1 % of these clustered
    # spectra.
    values, vectors = np.linalg.eigh(covariance)
    roots = np.sqrt(np.maximum(values, 0.0))
    return np.asarray(roots[:, None] * vectors.T)


def _correlation(distance: FloatArray) -> FloatArray:
    """Return the correlation of two rounding errors at squared distances d / r: shape of
    `distance`."""
    squares = np.arange(1, 65) ** 2
    total = np.zeros_like(distance)
    for square in squares:
        total += np.exp(-(np.pi**2) / 6 * square * distance) / square
    return total / sum(1 / squares)
