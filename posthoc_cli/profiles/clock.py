"""Steps over training time, for averages over steps on a clock in images or tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.power import FloatArray


@dataclass(frozen=True)
class Clock:
    """A run's steps (calls of `update_`) over its training time, interpolated linearly from step 0 at time 0.

    After the last known pair steps are as long as before it. The step clock is the identity.

    Attributes:
        steps, times: the known pairs, at least one, both growing from above 0.
    """

    steps: Sequence[float]
    times: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("steps", "times"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    @classmethod
    def of_steps(cls) -> Clock:
        """The step clock: the time of a step is its number."""
        return cls((1.0,), (1.0,))

    def step_at(self, s: npt.ArrayLike) -> FloatArray:
        """The step at times `s`, any shape, with fractions; 0 up to time 0."""
        times, steps = self._nodes
        return _interpolated(np.asarray(s, dtype=np.float64), times, steps)

    def time_at(self, step: npt.ArrayLike) -> FloatArray:
        """The time of steps, any shape: the inverse of `step_at`."""
        times, steps = self._nodes
        return _interpolated(np.asarray(step, dtype=np.float64), steps, times)

    def steps_per_time(self, s: npt.ArrayLike) -> FloatArray:
        """Steps per unit of time at times `s`, any shape: the slope of `step_at` up to `s`; 0 up to time 0."""
        at = np.asarray(s, dtype=np.float64)
        times, steps = self._nodes
        slopes = np.diff(steps) / np.diff(times)
        interval = np.searchsorted(times, at, side="left") - 1
        return np.where(at > 0, slopes[np.clip(interval, 0, len(slopes) - 1)], 0.0)

    @cached_property
    def _nodes(self) -> tuple[FloatArray, FloatArray]:
        return np.array([0.0, *self.times]), np.array([0.0, *self.steps])


def _interpolated(x: FloatArray, knots: FloatArray, values: FloatArray) -> FloatArray:
    """Linear between the knots, constant before the first, with the last slope after the last."""
    slope = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
    beyond = values[-1] + (x - knots[-1]) * slope
    return np.where(x > knots[-1], beyond, np.interp(x, knots, values))


MOST_KNOTS = 256
"""Pairs that a ClockRecorder keeps, the newest one included."""

TOLERANCE = 0.5
"""Error of a clock between its knots, in steps, while there is room for knots."""


Knots = tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class ClockRecorder:
    """Records a clock call by call as knots, pairs between which time grows evenly with steps. Never changed.

    A line starts at a knot, the first one at step 0 and time 0, and continues while it passes every pair since then
    within the tolerance. The slopes that do form an interval, which each pair narrows, so that no pair is stored. When
    the interval is empty, the previous pair becomes the next knot.

    At `MOST_KNOTS` the knot nearest to the line between its neighbours is dropped, and the tolerance grows to that
    distance, so that the rest of training is not recorded more closely than its past.

    Attributes:
        step, t: the newest pair; 0 before the first.
    """

    step: int = 0
    t: float = 0.0
    _knots: Knots = ()
    _lowest: float = 0.0
    _highest: float = math.inf
    _tolerance: float = TOLERANCE

    @classmethod
    def of_knots(cls, knots: Sequence[tuple[int, float]]) -> ClockRecorder:
        """A recorder that continues from the result of `knots_until`, at least one knot.

        Of the slopes that the last line allowed only the mean one is known, so that the last knot stays unless steps
        keep exactly that length.
        """
        *earlier, (step, t) = knots
        kept, tolerance = _with_room(earlier, TOLERANCE)
        begin, begin_t = kept[-1] if kept else (0, 0.0)
        slope = (step - begin) / (t - begin_t)
        return cls(step, t, kept, slope, slope, tolerance)

    def add(self, step: int, t: float) -> ClockRecorder:
        """A recorder with the next pair, too, which must be above the last one."""
        knots, lowest, highest, tolerance = self._knots, self._lowest, self._highest, self._tolerance
        begin, begin_t = knots[-1] if knots else (0, 0.0)
        if not lowest <= (step - begin) / (t - begin_t) <= highest:
            knots, tolerance = _with_room([*knots, (self.step, self.t)], tolerance)
            (begin, begin_t), lowest, highest = knots[-1], 0.0, math.inf
        lowest = max(lowest, (step - begin - tolerance) / (t - begin_t))
        highest = min(highest, (step - begin + tolerance) / (t - begin_t))
        return ClockRecorder(step, t, knots, lowest, highest, tolerance)

    def knots_until(self, step: int, t: float) -> Knots:
        """The knots up to an added pair, that pair last; empty for the step clock."""
        knots = (*(knot for knot in self._knots if knot[0] < step), (step, t))
        return () if all(knot[0] == knot[1] for knot in knots) else knots

    def state(self) -> list[float]:
        """Tolerance, slopes, and each knot's step and time, from which `of_state` continues exactly."""
        pairs = (*self._knots, (self.step, self.t))
        return [self._tolerance, self._lowest, self._highest, *(number for pair in pairs for number in pair)]

    @classmethod
    def of_state(cls, state: Sequence[float]) -> ClockRecorder:
        """The recorder that gave this `state`.

        Raises:
            InvalidValueError: not such a state.
        """
        if not _is_state(state):
            expected = f"a tolerance, two slopes and up to {MOST_KNOTS} pairs of a step and its time, both growing"
            raise InvalidValueError("clock", f"must be a list of {expected}")
        tolerance, lowest, highest = map(float, state[:3])
        *earlier, (step, t) = ((int(step), float(t)) for step, t in zip(state[3::2], state[4::2], strict=True))
        return cls(step, t, tuple(earlier), lowest, highest, tolerance)


def _with_room(knots: list[tuple[int, float]], tolerance: float) -> tuple[Knots, float]:
    """The knots, some dropped to make room for the newest pair, and the tolerance that they then have."""
    while len(knots) >= MOST_KNOTS:
        changes = [
            abs(step - a - (b - a) * ((t - a_t) / (b_t - a_t)))
            for (a, a_t), (step, t), (b, b_t) in zip([(0, 0.0), *knots], knots, knots[1:], strict=False)
        ]
        tolerance = max(tolerance, min(changes))
        del knots[changes.index(min(changes))]
    return tuple(knots), tolerance


def _is_state(state: object) -> bool:
    if not isinstance(state, list) or not 5 <= len(state) <= 3 + 2 * MOST_KNOTS or len(state) % 2 == 0:
        return False
    if not all(type(x) is float or (type(x) is int and x < 2**63) for x in state):
        return False
    tolerance, lowest, highest, *pairs = state
    if not (TOLERANCE <= tolerance < math.inf and 0 <= lowest <= highest):
        return False
    steps, times = [0, *pairs[::2]], [0.0, *pairs[1::2]]
    growing = all(a < b < math.inf for values in (steps, times) for a, b in pairwise(values))
    return pairs == [0, 0] or (growing and all(type(step) is int for step in steps))
