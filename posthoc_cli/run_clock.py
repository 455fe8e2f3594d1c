"""The clock of a run: its steps over its training time, which may count images or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import FloatArray

EQUAL_STEPS = 1e-9  # relative difference of the length of steps: a rounding error


@dataclass(frozen=True)
class Clock:
    """A run's steps (calls of `update_`) over its training time, interpolated linearly from step 0
    at time 0.

    The known pairs are at least one, both ascending. After the last one, steps are as long as just
    before it.
    """

    steps: Sequence[float]
    times: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("steps", "times"):
            values = map(float, getattr(self, name))
            object.__setattr__(self, name, tuple(values))

    @property
    def is_even(self) -> bool:
        """Whether the known steps and times are in one ratio."""
        lengths = np.array(self.times) / np.array(self.steps)
        return bool(np.ptp(lengths) <= EQUAL_STEPS * lengths[-1])

    def step_at(self, s: npt.ArrayLike) -> FloatArray:
        """Interpolate the step at times `s`, any shape, with fractions; 0 up to time 0."""
        times, steps = self._nodes
        return _interpolate(_as_floats(s), times, steps)

    def time_at(self, step: npt.ArrayLike) -> FloatArray:
        """Interpolate the time of steps, any shape: the inverse of `step_at`."""
        times, steps = self._nodes
        return _interpolate(_as_floats(step), steps, times)

    @cached_property
    def _nodes(self) -> tuple[FloatArray, FloatArray]:
        times = np.array([0.0, *self.times])
        steps = np.array([0.0, *self.steps])
        return times, steps


class EpochClock(Clock):
    """The clock of checkpoints whose numbers are epochs: nothing says the steps of one."""

    @property
    def is_even(self) -> bool:
        return False

    def step_at(self, s: npt.ArrayLike) -> FloatArray:  # noqa: ARG002
        reason = "must be given to an import: numbers of these checkpoints are epochs, not steps"
        raise InvalidValueError("steps_per_epoch", reason)


def _interpolate(x: FloatArray, knots: FloatArray, values: FloatArray) -> FloatArray:
    """Interpolate linearly between knots: constant before the first one, with the last slope after
    the last."""
    last = knots[-1]
    change = values[-1] - values[-2]
    slope = change / (last - knots[-2])
    later = values[-1] + (x - last) * slope
    between = np.interp(x, knots, values)
    return np.where(x > last, later, between)


def _as_floats(values: npt.ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float64)
