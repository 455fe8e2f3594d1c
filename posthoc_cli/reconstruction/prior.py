"""The prior of a reconstruction: the motion of a run's network, and the errors of its stored averages."""

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
"""Assumed root mean square length of the walk over all of training, relative to the norm of the weights. Recorded runs
have 0.01 (rate cut to nothing) to 0.45 (constant rate)."""

_MEMORY = 12
"""Steps over which training is smooth (momentum 0.9 remembers 10): the weights at one moment move like an average of
that width, not like a walk down to the single step."""

ROUNDING: float = math.sqrt(2 * math.log(2) / 36)
"""Root mean square error of one rounding to nearest, relative to the values, in units of eps: 0.196.

An error is uniform within a spacing of eps 2**e around a value m 2**e, variance (eps 2**e)**2 / 12, and where
logarithms are spread evenly the mean square of m in [1, 2) is 3 / (2 ln 2).
"""


@dataclass(frozen=True)
class StoredAverage:
    """A stored average and its measurements.

    Attributes:
        profile: as recorded.
        updates: number of updates in it.
        eps: distance from 1 to the next number of the accumulator's dtype.
        measurements: None where it has none.
        step_length: time of a training step then; 0 if unknown.
        steps: of the run until then; None if unknown.
        motion: of the network until then, as known then.
        inherited: expected squared error left from rounded snapshots that the run resumed from.
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
    """What is known of the snapshots beside their profiles. Arrays have the snapshots' order: shape [n] each.

    Attributes:
        motion: of the network.
        rounding: variance of each stored copy's rounding, r_i; 0 for an exact copy.
        arithmetic: variance of each average from the arithmetic of its updates.
        norm: squared norm of each average.
        source: "measured" while training, "sampled" from the files, or "assumed".
        steps: of the run; None if unknown.
        inherited: variance of each average from rounded snapshots that the run resumed from; None for none.
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

    def of(self, snapshots: Sequence[int]) -> Prior:
        """The same for some of the snapshots."""
        index = np.asarray(snapshots, dtype=np.intp)
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
    """The prior of a plan, or without measurements: weights of norm 1.

    Arguments:
        snapshots: profiles of the stored averages.
        rounding: root mean square error of a stored copy, relative to its norm.
        motion: of the network, relative to its norm; by default an even walk.
    """
    last = max(p.t for p in snapshots)
    ones = np.ones(len(snapshots))
    if motion is None:
        motion = Motion.even(last, ASSUMED_STRETCH**2)
    return Prior(motion, rounding**2 * ones, 0 * ones, ones, ASSUMED)


def measured_prior(averages: Sequence[StoredAverage]) -> Prior:
    """The prior from the measurements of a run's averages; `assumed_prior` without them.

    The order of the averages changes only that of the arrays.
    """
    known = [average.measurements for average in averages if average.measurements is not None]
    if not known or len(known) < len(averages):
        return assumed_prior([average.profile.pure for average in averages])
    norm = np.array([measurements.norm for measurements in known])
    arithmetic = np.array([_arithmetic(average) for average in averages])
    profiles = [average.profile for average in averages]
    start, last = min(p.t_first for p in profiles), max(p.t for p in profiles)
    steps = max(averages, key=lambda average: average.profile.t).steps
    newest = max(
        (average for average in averages if average.motion is not None),
        key=lambda average: (average.profile.t, average.profile.gamma),
        default=None,
    )
    earlier = None if newest is None else newest.motion
    distances = [distance for distance in _distances(averages, arithmetic) if not distance.alike]
    if distances:
        motion = fit_motion(start, [p.t for p in profiles], distances, steps, earlier)
    elif earlier is not None:
        motion = earlier
    else:
        motion = Motion.even(last, ASSUMED_STRETCH**2 * float(norm.mean()), steps)
    # Weights that are all 0 have distances, but none above 0.
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
"""Updates in the recent mean of a tracked average, see `tracker.averages`: a compromise between the cost of adding it
to the total and its own roundings."""


def roundings(gamma: float, updates: int) -> float:
    """The number of independent roundings, of an average's size, that its updates leave in it.

    Reading rounds once. The mean of a window of n updates is rounded at each; within the window that fades as k / n to
    n / 3 roundings, in the first window as (k / n)^(gamma + 1). Over windows it averages out: with masses p(s) n dt the
    sum of their squares is n dt integral p^2 ds, (gamma + 1)^2 / (2 gamma + 1) n for `updates` of them.
    """
    if updates <= WINDOW:
        return 1 + updates / (2 * gamma + 3)
    return 1 + WINDOW / 3 * min(1.0, WINDOW / updates * (gamma + 1) ** 2 / (2 * gamma + 1))


def _arithmetic(average: StoredAverage) -> float:
    """Expected squared error of an average before it is stored."""
    measured = average.measurements or Measurements(0.0, 0.0)
    relative = (ROUNDING * average.eps) ** 2 * roundings(average.profile.gamma, average.updates)
    return measured.norm * relative + measured.arithmetic


def _distances(averages: Sequence[StoredAverage], arithmetic: FloatArray) -> list[PairDistance]:
    """Every measured distance, one for each pair of averages."""
    found: dict[tuple[tuple[float, float], tuple[float, float]], PairDistance] = {}
    nought = 1e-18 * max((a.measurements.norm for a in averages if a.measurements is not None), default=0.0)
    # The last record of a pair counts, in a fixed order.
    order = sorted(range(len(averages)), key=lambda i: (averages[i].profile.t, averages[i].profile.gamma))
    for average, own in ((averages[i], arithmetic[i]) for i in order):
        if average.measurements is None:
            continue
        profile = average.profile
        for distance in average.measurements.distances:
            gamma = PowerFunction.from_sigma_rel(distance.sigma_rel, distance.t).gamma
            ends = ((profile.t, profile.gamma), (distance.t, gamma))
            # The other average may be gone; its arithmetic has about the same variance.
            noise = distance.rounding + 2 * own
            # Less than the errors themselves tells no more than that.
            least = max(distance.squared, noise, nought)
            if least > 0:
                later, earlier = max(ends), min(ends)
                # A gamma computed elsewhere may differ in its last bits.
                key = ((later[0], round(later[1], 9)), (earlier[0], round(earlier[1], 9)))
                found[key] = PairDistance((later[1], earlier[1]), (later[0], earlier[0]), least, noise)
    weights = [_to_weights(average, own) for average, own in zip(averages, arithmetic, strict=True)]
    return list(found.values()) + [distance for distance in weights if distance is not None]


def _to_weights(average: StoredAverage, arithmetic: float) -> PairDistance | None:
    """The measured distance to the weights of the same time, which move like an average over a few steps.

    None if that average is not much shorter than this one.
    """
    profile, found = average.profile, average.measurements
    width = max(_MEMORY * average.step_length, profile.max_interval) / profile.t
    if found is None or not found.weights or not average.step_length or not width < profile.pure.sigma_rel / 8:
        return None
    gamma = gamma_from_sigma_rel(width)
    return PairDistance((profile.gamma, gamma), (profile.t, profile.t), found.weights, float(arithmetic))
