"""Steps and updates within intervals of training; the averages saw every `stride`-th step.

Motion is modelled per step, not per unit of time, since a clock may run on while nothing is trained. Over the usual
hundreds of updates between snapshots, integrals over time are as good as sums over updates. Intervals of a few updates
are summed, since an average ignores how the network moved between updates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import Clock, FloatArray, Profile

FEW = 8
"""Up to so many updates an interval is summed. With more, integral and sum differ by less than a tenth."""

_SAME = 1e-9
"""Relative difference below which two times, or numbers of updates, are equal."""


@dataclass(frozen=True)
class Cells:
    """Intervals of training, each with steps of one length, and the updates in those that have few.

    Attributes:
        edges: of the intervals, growing: shape [K + 1].
        density: steps per unit of time within each interval; 0 where its updates are listed instead: shape [K].
        before, after: times of the update before each listed one, and of itself: shape [M].
        interval: index of the interval of each listed update: shape [M].
        stride: steps between updates.
    """

    edges: FloatArray
    density: FloatArray
    before: FloatArray
    after: FloatArray
    interval: npt.NDArray[np.intp]
    stride: float

    @property
    def duration(self) -> FloatArray:
        """Time of a step within each interval; 0 where its updates are listed instead: shape [K]."""
        return np.divide(1.0, self.density, out=np.zeros_like(self.density), where=self.density > 0)

    def tails(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        """Mass that averages have at or after each listed update, [n] power functions: shape [M, n]."""
        return self._mass_after(self.before, gamma, t)

    def masses(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        """Mass that averages have on each listed update: shape [M, n]."""
        return self.tails(gamma, t) - self._mass_after(self.after, gamma, t)

    def target_tails(self, target: Profile) -> FloatArray:
        """The same for any profile: shape [M]."""
        return target.tail(self.before)

    def target_masses(self, target: Profile) -> FloatArray:
        """The same for any profile: shape [M]."""
        return target.tail(self.before) - target.tail(self.after)

    def _mass_after(self, s: FloatArray, gamma: FloatArray, t: FloatArray) -> FloatArray:
        """Tails of the averages that include the update; 0 for the others."""
        included = self.after[:, None] <= t * (1 + _SAME)
        ratio = np.minimum(s[:, None] / t, 1.0)
        with np.errstate(divide="ignore"):  # all of the mass is after time 0
            return np.where(included, -np.expm1((gamma + 1) * np.log(ratio)), 0.0)


@dataclass(frozen=True)
class Steps:
    """A run's clock, and the steps between its updates."""

    clock: Clock
    stride: int = 1

    def cells(self, edges: FloatArray) -> Cells:
        """The intervals between `edges`, cut where the length of a step changes."""
        knots = np.asarray(self.clock.times)
        edges = np.union1d(edges, knots[(knots > edges[0]) & (knots < edges[-1])])
        steps = self.clock.step_at(edges)
        # An update at an edge belongs to the interval before it.
        count = np.floor(steps / self.stride * (1 + _SAME) + _SAME).astype(np.int64)
        updates = np.diff(count)
        few = updates <= FEW
        interval = np.repeat(np.flatnonzero(few), updates[few])
        listed = [np.arange(a, b) for a, b in zip(count[:-1][few], count[1:][few], strict=True)]
        number = np.concatenate(listed) if listed else np.zeros(0)
        before = np.maximum(self.clock.time_at(number * self.stride), edges[0])
        after = self.clock.time_at((number + 1) * self.stride)
        density = np.where(few, 0.0, np.diff(steps) / np.diff(edges))
        return Cells(edges, density, before, after, interval, float(self.stride))


def unknown_steps(edges: FloatArray) -> Cells:
    """The intervals of a run with unknown steps: many, of one unit of time each."""
    none = np.zeros(0)
    return Cells(edges, np.ones(edges.size - 1), none, none, np.zeros(0, dtype=np.intp), 0.0)
