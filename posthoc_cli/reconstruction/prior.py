"""What reconstruction assumes about a run: how its network moved, and how exactly its averages are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posthoc_cli.profiles import FloatArray, PowerFunction, RecordedPowerFunction
from posthoc_cli.reconstruction.measurements import Measurements
from posthoc_cli.reconstruction.motion import Motion, PairDistance, fit_motion

MEASURED, SAMPLED, ASSUMED = "measured", "sampled", "assumed"

ASSUMED_STRETCH = 0.25
"""Without measurements: root mean square length of the walk over all of training at its last pace, relative to the norm
of the weights. Recorded runs have 0.01 (rate cut to nothing) to 0.45 (constant rate)."""

_ADDITION = 0.196
"""Root mean square error of one rounding to nearest, relative to the values, in eps: (12 * 3 / (2 ln 2))**-0.5.

An error is uniform within a spacing of eps 2**e around a value m 2**e, and where logarithms are spread evenly the
mean square of m in [1, 2) is 3 / (2 ln 2).
"""


@dataclass(frozen=True)
class StoredAverage:
    """An average as reconstruction sees it.

    Attributes:
        profile: as it was recorded.
        updates: how many updates made it.
        eps: distance from 1 to the next number of the accumulator's dtype.
        measurements: what it says about itself, if anything.
    """

    profile: RecordedPowerFunction
    updates: int
    eps: float
    measurements: Measurements | None


@dataclass(frozen=True)
class Prior:
    """What is known besides the profiles. The arrays have the snapshots' order: shape [n] each.

    Attributes:
        motion: how the network moved.
        rounding: variance of each stored copy's error: r_i.
        exact: whether a stored copy is the average to the last bit of its accumulator.
        norm: squared norm of each average.
        source: "measured" while training, "sampled" from the files, or "assumed" where there was nothing to measure.
    """

    motion: Motion
    rounding: FloatArray
    exact: tuple[bool, ...]
    norm: FloatArray
    source: str

    def of(self, chosen: Sequence[int]) -> Prior:
        """The same for some of the snapshots."""
        index = np.asarray(chosen, dtype=np.intp)
        exact = tuple(self.exact[i] for i in chosen)
        return replace(self, rounding=self.rounding[index], exact=exact, norm=self.norm[index])

    def sampled(self) -> Prior:
        """The same, marked as estimated from a sample of elements."""
        return replace(self, source=SAMPLED) if self.source == MEASURED else self


def assumed_prior(snapshots: Sequence[PowerFunction], rounding: float = 0.0, motion: Motion | None = None) -> Prior:
    """For a plan, or where nothing was measured: an even walk, and weights of norm 1.

    Arguments:
        snapshots: profiles of the stored averages.
        rounding: root mean square error of a stored copy, relative to its norm.
        motion: how the network moved relative to its norm, where more is known.
    """
    last = max(p.t for p in snapshots)
    ones = np.ones(len(snapshots))
    if motion is None:
        motion = Motion.even(last, ASSUMED_STRETCH**2)
    return Prior(motion, rounding**2 * ones, (rounding == 0,) * len(snapshots), ones, ASSUMED)


def measured_prior(averages: Sequence[StoredAverage]) -> Prior:
    """What the measurements of a run's averages tell; `assumed_prior` where they tell nothing of its movement.

    Each r_i is the measured rounding of the stored copy, and the expected rounding of the arithmetic that made it:
    every update rounds each element once, and what an update at t_k leaves fades like (t_k / t)**(gamma + 1), so that
    the squares add up to those of n / (2 gamma + 3) roundings.
    """
    known = [average.measurements for average in averages if average.measurements is not None]
    if not known or len(known) < len(averages):
        return assumed_prior([average.profile.pure for average in averages])
    norm = np.array([measurements.norm for measurements in known])
    arithmetic = np.array([_arithmetic(average) for average in averages])
    stored = np.array([measurements.rounding for measurements in known])
    start = min(average.profile.t_first for average in averages)
    distances = _distances(averages, arithmetic)
    if distances:
        motion = fit_motion(start, [average.profile.t for average in averages], distances)
    else:
        motion = Motion.even(max(average.profile.t for average in averages), ASSUMED_STRETCH**2 * float(norm.mean()))
    source = MEASURED if distances else ASSUMED
    return Prior(motion, stored + arithmetic, tuple(bool(r == 0) for r in stored), norm, source)


def _arithmetic(average: StoredAverage) -> float:
    norm = average.measurements.norm if average.measurements is not None else 0.0
    return norm * (_ADDITION * average.eps) ** 2 * average.updates / (2 * average.profile.gamma + 3)


def _distances(averages: Sequence[StoredAverage], arithmetic: FloatArray) -> list[PairDistance]:
    """Every measured distance, each pair of averages once."""
    found: dict[tuple[tuple[float, float], tuple[float, float]], PairDistance] = {}
    nought = 1e-18 * max((a.measurements.norm for a in averages if a.measurements is not None), default=0.0)
    for average, own in zip(averages, arithmetic, strict=True):
        if average.measurements is None:
            continue
        profile = average.profile
        for distance in average.measurements.distances:
            gamma = PowerFunction.from_sigma_rel(distance.sigma_rel, distance.t).gamma
            ends = ((profile.t, profile.gamma), (distance.t, gamma))
            # The other one's arithmetic cannot be told apart where it is gone; it is about as large as this one's.
            noise = distance.rounding + 2 * own
            least = max(distance.squared, nought)
            if least > 0:
                later, earlier = max(ends), min(ends)
                # A gamma computed elsewhere may differ in its last bits.
                key = ((later[0], round(later[1], 9)), (earlier[0], round(earlier[1], 9)))
                found[key] = PairDistance((later[1], earlier[1]), (later[0], earlier[0]), least, noise)
    return list(found.values())
