"""Averages of single weights: one checkpoint, or values at known times.

A checkpoint has mass at points only, so that its density is 0 everywhere and its tail falls in jumps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.tracked import FloatArray

_SUM = 1e-6
"""Accepted difference of a sum of masses from 1; the masses are scaled to a sum of 1."""


@dataclass(frozen=True)
class Point:
    """The weights at time `t` > 0 themselves: an ordinary checkpoint."""

    t: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", float(self.t))

    @property
    def t_first(self) -> float:
        """The first step of a training on a clock of steps: its averages begin there, not at the first checkpoint."""
        return min(1.0, self.t)

    @property
    def jumps(self) -> FloatArray:
        """The times at which it has mass: shape [1]."""
        return np.array([self.t])

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """0: all mass is at one point."""
        return np.zeros(np.shape(s))

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`: 1 before `t`, 0 from `t` on."""
        return np.where(np.asarray(s, dtype=np.float64) < self.t, 1.0, 0.0)


@dataclass(frozen=True, eq=False)
class Discrete:
    """An average over weights at known times, sum_k masses_k theta(times_k), taken at time `t`.

    Attributes:
        times: growing from above 0, at least one, none after `t`.
        masses: 0 or above, with sum 1: one for each of `times`.
        t: by default the last of `times`.
    """

    times: FloatArray
    masses: FloatArray
    t: float = 0.0

    def __init__(
        self, times: Sequence[float] | FloatArray, masses: Sequence[float] | FloatArray, t: float = 0.0
    ) -> None:
        at, mass = np.array(times, dtype=np.float64), np.array(masses, dtype=np.float64)
        is_alike = at.ndim == 1 and at.shape == mass.shape and at.size > 0
        end = float(at[-1]) if is_alike and not t else float(t)
        if not (is_alike and np.all(np.diff(at, prepend=0.0) > 0) and at[-1] <= end < math.inf
                and np.all(mass >= 0) and abs(mass.sum() - 1) <= _SUM):  # fmt: skip
            reason = "must grow from above 0 up to t, each time with a mass, of sum 1"
            raise InvalidValueError("times and masses", reason)
        mass /= mass.sum()
        for name, value in (("times", at), ("masses", mass), ("t", end)):
            object.__setattr__(self, name, value)

    @property
    def t_first(self) -> float:
        """The time of the earliest weights in it."""
        return float(self.times[0])

    @property
    def jumps(self) -> FloatArray:
        """The times at which it has mass."""
        return self.times

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """0: all mass is at points."""
        return np.zeros(np.shape(s))

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`."""
        return self._later[np.searchsorted(self.times, np.asarray(s, dtype=np.float64), side="right")]

    @cached_property
    def _later(self) -> FloatArray:
        """Mass from each of the times on, and 0: summed from the end, where small tails keep their digits."""
        later = np.append(np.cumsum(self.masses[::-1])[::-1], 0.0)
        later[0] = 1.0
        return later
