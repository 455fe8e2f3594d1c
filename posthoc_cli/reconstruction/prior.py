"""What reconstruction assumes about a run: how its network moved, and how exactly its averages are stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from posthoc_cli.profiles import FloatArray, PowerFunction, RecordedPowerFunction, gamma_from_sigma_rel
from posthoc_cli.reconstruction.measurements import Measurements
from posthoc_cli.reconstruction.motion import Motion, PairDistance, fit_motion
from posthoc_cli.reconstruction.steps import Cells, Steps, unknown_steps

MEASURED, SAMPLED, ASSUMED = "measured", "sampled", "assumed"

ASSUMED_STRETCH = 0.25
"""Without measurements: root mean square length of the walk over all of training at its last pace, relative to the norm
of the weights. Recorded runs have 0.01 (rate cut to nothing) to 0.45 (constant rate)."""

_MEMORY = 12
"""Steps over which an optimizer's path is smooth (momentum 0.9 remembers 10): the weights of one moment move like an
average as wide as that, and not like a walk down to the single step."""

ROUNDING: float = math.sqrt(2 * math.log(2) / 36)
"""Root mean square error of one rounding to nearest, relative to the values, in units of eps: 0.196.

An error is uniform within a spacing of eps 2**e around a value m 2**e, variance (eps 2**e)**2 / 12, and where
logarithms are spread evenly the mean square of m in [1, 2) is 3 / (2 ln 2).
"""


@dataclass(frozen=True)
class StoredAverage:
    """An average as reconstruction sees it.

    Attributes:
        profile: as it was recorded.
        updates: how many updates made it.
        eps: distance from 1 to the next number of the accumulator's dtype.
        measurements: what it says about itself, if anything.
        step_length: time of a training step then; 0 where it is not known.
        steps: the run's, up to then; None where they are not known.
        motion: how the network had moved, as far as was known then.
        inherited: expected squared error that is left of snapshots, rounded as they are, which the run went on from.
    """

    profile: RecordedPowerFunction
    updates: int
    eps: float
    measurements: Measurements | None
    step_length: float = 0.0
    steps: Steps | None = None
    motion: Motion | None = None
    inherited: float = 0.0


@dataclass(frozen=True)
class Prior:
    """What is known besides the profiles. The arrays have the snapshots' order: shape [n] each.

    Attributes:
        motion: how the network moved.
        rounding: variance of each stored copy's rounding, r_i; 0 for one that is exact.
        arithmetic: variance that the arithmetic of the updates left in each average.
        norm: squared norm of each average.
        source: "measured" while training, "sampled" from the files, or "assumed" where there was nothing to measure.
        steps: when the network moved; None where it is not known.
        inherited: variance that going on from rounded snapshots left in each average; None for none.
    """

    motion: Motion
    rounding: FloatArray
    arithmetic: FloatArray
    norm: FloatArray
    source: str
    steps: Steps | None = None
    inherited: FloatArray | None = None

    def cells(self, edges: FloatArray) -> Cells:
        """The intervals between `edges`, and the steps within them."""
        return unknown_steps(edges) if self.steps is None else self.steps.cells(edges)

    def of(self, chosen: Sequence[int]) -> Prior:
        """The same for some of the snapshots."""
        index = np.asarray(chosen, dtype=np.intp)
        return replace(
            self,
            rounding=self.rounding[index],
            arithmetic=self.arithmetic[index],
            norm=self.norm[index],
            inherited=None if self.inherited is None else self.inherited[index],
        )

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
    return Prior(motion, rounding**2 * ones, 0 * ones, ones, ASSUMED)


def measured_prior(averages: Sequence[StoredAverage]) -> Prior:
    """What the measurements of a run's averages tell; `assumed_prior` where they tell nothing of its movement.

    The order of the averages changes nothing but that of the arrays.
    """
    known = [average.measurements for average in averages if average.measurements is not None]
    if not known or len(known) < len(averages):
        return assumed_prior([average.profile.pure for average in averages])
    norm = np.array([measurements.norm for measurements in known])
    arithmetic = np.array([_arithmetic(average) for average in averages])
    profiles = [average.profile for average in averages]
    start, last = min(p.t_first for p in profiles), max(p.t for p in profiles)
    steps = max(averages, key=lambda average: average.profile.t).steps
    told = [average for average in averages if average.motion is not None]
    earlier = max(told, key=lambda average: (average.profile.t, average.profile.gamma)).motion if told else None
    distances = [distance for distance in _distances(averages, arithmetic) if not distance.alike]
    if distances:
        motion = fit_motion(start, [p.t for p in profiles], distances, steps, earlier)
    elif earlier is not None:
        motion = earlier
    else:
        motion = Motion.even(last, ASSUMED_STRETCH**2 * float(norm.mean()), steps)
    # Weights that are all 0 have no distances above 0, and do not move.
    still = not norm.any() and any(measurements.distances for measurements in known)
    return Prior(
        motion,
        np.array([measurements.rounding for measurements in known]),
        arithmetic,
        norm,
        MEASURED if distances or earlier is not None or still else ASSUMED,
        steps,
        np.array([average.inherited for average in averages]) if any(a.inherited for a in averages) else None,
    )


WINDOW = 32
"""Updates of a recent mean, see `tracker.averages`: adding it to the total costs a pass over both, and its float32 is
off by no more digits than so many roundings take."""


def roundings(gamma: float, updates: int) -> float:
    """How many independent roundings of an average's size the arithmetic of its updates has left in it.

    It is rounded once when it is read. The mean of a window of n updates is rounded at each of them, and what that
    leaves fades as k / n within the window, n / 3 roundings in all; in the first one faster, as (k / n)^(gamma + 1).
    Over windows it averages out: with masses p(s) n dt the sum of their squares is n dt integral p^2 ds,
    (gamma + 1)^2 / (2 gamma + 1) n for `updates` of them.
    """
    if updates <= WINDOW:
        return 1 + updates / (2 * gamma + 3)
    return 1 + WINDOW / 3 * min(1.0, WINDOW / updates * (gamma + 1) ** 2 / (2 * gamma + 1))


def _arithmetic(average: StoredAverage) -> float:
    """Expected squared error of an exact average that was never stored."""
    norm = average.measurements.norm if average.measurements is not None else 0.0
    return float(norm * (ROUNDING * average.eps) ** 2 * roundings(average.profile.gamma, average.updates))


def _distances(averages: Sequence[StoredAverage], arithmetic: FloatArray) -> list[PairDistance]:
    """Every measured distance, each pair of averages once."""
    found: dict[tuple[tuple[float, float], tuple[float, float]], PairDistance] = {}
    nought = 1e-18 * max((a.measurements.norm for a in averages if a.measurements is not None), default=0.0)
    # Of two records of one pair the last one counts: in an order of ours.
    order = sorted(range(len(averages)), key=lambda i: (averages[i].profile.t, averages[i].profile.gamma))
    for average, own in ((averages[i], arithmetic[i]) for i in order):
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
    weights = [_to_weights(average, own) for average, own in zip(averages, arithmetic, strict=True)]
    return list(found.values()) + [distance for distance in weights if distance is not None]


def _to_weights(average: StoredAverage, arithmetic: float) -> PairDistance | None:
    """The measured distance to the weights of the same time, as one to the average over a few steps that they are.

    None where that would be no small part of the average itself.
    """
    profile, found = average.profile, average.measurements
    width = max(_MEMORY * average.step_length, profile.max_interval) / profile.t
    if found is None or not found.weights or not average.step_length or not width < profile.pure.sigma_rel / 8:
        return None
    gamma = gamma_from_sigma_rel(width)
    return PairDistance((profile.gamma, gamma), (profile.t, profile.t), found.weights, float(arithmetic))
