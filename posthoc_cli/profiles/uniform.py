"""Uniform averages: every moment of a stretch of time, or every one of some steps, counts the same."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.clock import Clock
from posthoc_cli.profiles.protocol import FloatArray


@dataclass(frozen=True)
class Uniform:
    """Density 1 / (end - start) on (start, end], in the run's unit of time; 0 <= start < end."""

    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end < math.inf:
            raise InvalidValueError(
                f"uniform from {self.start:,.12g} to {self.end:,.12g}", "must start at 0 or later and before its end"
            )

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s`."""
        times = np.asarray(s, dtype=np.float64)
        return np.where((times > self.start) & (times <= self.end), 1 / (self.end - self.start), 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`: (end - s) / (end - start) between the two."""
        times = np.asarray(s, dtype=np.float64)
        return np.clip((self.end - times) / (self.end - self.start), 0.0, 1.0)


@dataclass(frozen=True)
class StepWindow:
    """The mean of the last `steps` steps up to time `t`, 1 / steps each, whatever time each of them took.

    With n(s) the step at time `s`, the mass after `s` is (n(t) - n(s)) / steps: uniform over steps, and over time
    too where steps are equally long.

    Attributes:
        steps: at least 1, at most the steps that the run has up to `t`.
        t: the average's time.
        clock: the run's steps over time.
    """

    steps: int
    t: float
    clock: Clock

    def __post_init__(self) -> None:
        if not self.steps >= 1:
            raise InvalidValueError("window", "must be a whole number of steps, at least 1", value=self.steps)
        there = float(self.clock.step_at(self.t))
        if self.steps > there:
            raise InvalidValueError(
                "window",
                f"the run has {math.floor(there):,} steps up to t = {self.t:,.12g}; must be at most that",
                value=self.steps,
            )

    @property
    def start(self) -> float:
        """The time at which the window begins: that of the step before its first."""
        return float(self.clock.time_at(self.clock.step_at(self.t) - self.steps))

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s`: steps per unit of time, divided by `steps`, on (start, t]."""
        times = np.asarray(s, dtype=np.float64)
        inside = (times > self.start) & (times <= self.t)
        return np.where(inside, self.clock.steps_per_time(times) / self.steps, 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`: (n(t) - n(s)) / steps, between 0 and 1."""
        later_steps = self.clock.step_at(self.t) - self.clock.step_at(s)
        return np.clip(later_steps / self.steps, 0.0, 1.0)
