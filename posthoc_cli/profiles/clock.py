"""Steps over training time: what an average over steps needs on a clock in images or tokens.

`ClockRecorder` follows a clock during training, `Clock` is what is known of one afterwards.
"""

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
    """A run's steps (calls of `update_`) over its training time, from what is known of it.

    Between the known pairs, the first of which is step 0 at time 0, steps are equally long; after the last pair
    they are as long as before it. A run on the step clock has the identity.

    Attributes:
        steps, times: the known pairs, at least one, both growing from above 0. Any sequence of numbers will do.
    """

    steps: Sequence[float]
    times: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("steps", "times"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            growing = values.ndim == 1 and np.all(np.diff(values, prepend=0.0) > 0) and np.all(np.isfinite(values))
            if not growing or values.size == 0:
                raise InvalidValueError("clock", f"{name} must be finite and grow from above 0, one at least")
            object.__setattr__(self, name, tuple(values.tolist()))
        if len(self.steps) != len(self.times):
            raise InvalidValueError(
                "clock", f"{len(self.steps)} steps and {len(self.times)} times; each pair needs both"
            )

    @classmethod
    def of_steps(cls) -> Clock:
        """The step clock: the time of a step is its number."""
        return cls((1.0,), (1.0,))

    def step_at(self, s: npt.ArrayLike) -> FloatArray:
        """The step at times `s`, any shape, between whole steps a fraction; 0 up to time 0."""
        times, steps = self._nodes
        return _along(np.asarray(s, dtype=np.float64), times, steps)

    def time_at(self, step: npt.ArrayLike) -> FloatArray:
        """The time of steps, any shape: the inverse of `step_at`."""
        times, steps = self._nodes
        return _along(np.asarray(step, dtype=np.float64), steps, times)

    def steps_per_time(self, s: npt.ArrayLike) -> FloatArray:
        """Steps per unit of time at times `s`, any shape: the slope of `step_at` up to `s`; 0 up to time 0."""
        at = np.asarray(s, dtype=np.float64)
        times, steps = self._nodes
        slopes = np.diff(steps) / np.diff(times)
        piece = np.searchsorted(times, at, side="left") - 1
        return np.where(at > 0, slopes[np.clip(piece, 0, len(slopes) - 1)], 0.0)

    @cached_property
    def _nodes(self) -> tuple[FloatArray, FloatArray]:
        return np.array([0.0, *self.times]), np.array([0.0, *self.steps])


MOST_KNOTS = 256
"""Pairs that a ClockRecorder keeps at most, the newest one among them."""

TOLERANCE = 0.5
"""Steps that a clock may lie off between its knots, until they become too many."""


class ClockRecorder:
    """Follows a clock call by call, and keeps its knots: the few pairs between which time grows evenly with steps.

    A piece begins at a knot, the first one at step 0 and time 0, and goes on as long as the straight line from its
    beginning to the newest pair passes every pair between them within `TOLERANCE` steps. The slopes of all lines that
    do are an interval, which each further pair can only narrow: no pair needs to be remembered. The pair after which
    no line is left becomes the next knot. Every knot is a pair that was, none is made up.

    When `MOST_KNOTS` are reached, that one goes which lies nearest to the line between its neighbours; the tolerance
    grows to that distance, since it makes no sense to follow the rest of training more closely than what is past.

    A recorder never changes: `add` gives another one, so that whoever holds one has a clock of one moment.

    Attributes:
        step, t: the newest pair; 0 before the first.
    """

    __slots__ = ("_begin", "_begin_t", "_highest", "_knots", "_lowest", "_tolerance", "step", "t")

    def __init__(self) -> None:
        self.step = 0
        self.t = 0.0
        self._knots: tuple[tuple[int, float], ...] = ()
        self._begin, self._begin_t = 0, 0.0
        self._lowest, self._highest = 0.0, math.inf
        self._tolerance = TOLERANCE

    @classmethod
    def of_knots(cls, knots: Sequence[tuple[int, float]]) -> ClockRecorder:
        """A recorder that goes on from knots as `knots_until` gives them, one at least.

        The last of them stays one unless steps go on to be exactly as long as they were on average since the one
        before: of the slopes that the last piece would have allowed, that is the only one known.
        """
        recorder = cls()
        *earlier, (recorder.step, recorder.t) = knots
        recorder._begin_after(earlier)
        slope = (recorder.step - recorder._begin) / (recorder.t - recorder._begin_t)
        recorder._lowest = recorder._highest = slope
        return recorder

    def add(self, step: int, t: float) -> ClockRecorder:
        """A recorder that has taken in the next call's pair, too: both must be above the last ones."""
        new = ClockRecorder()
        new.step, new.t = step, t
        time = t - self._begin_t
        if self._lowest <= (step - self._begin) / time <= self._highest:
            new._knots, new._begin, new._begin_t = self._knots, self._begin, self._begin_t
            new._lowest, new._highest, new._tolerance = self._lowest, self._highest, self._tolerance
        else:
            new._tolerance = self._tolerance
            new._begin_after([*self._knots, (self.step, self.t)])
            time = t - new._begin_t
        new._lowest = max(new._lowest, (step - new._begin - new._tolerance) / time)
        new._highest = min(new._highest, (step - new._begin + new._tolerance) / time)
        return new

    def knots_until(self, step: int, t: float) -> tuple[tuple[int, float], ...]:
        """The clock up to one of the pairs that were added, which is the last of the knots.

        Empty where every one of them has a time that is its step: the step clock needs none.
        """
        knots = (*(knot for knot in self._knots if knot[0] < step), (step, t))
        return () if all(knot[0] == knot[1] for knot in knots) else knots

    def state(self) -> list[float]:
        """All that `of_state` needs to go on exactly: tolerance, slopes, and each knot's step and time."""
        pairs = (*self._knots, (self.step, self.t))
        return [self._tolerance, self._lowest, self._highest, *(number for pair in pairs for number in pair)]

    @classmethod
    def of_state(cls, state: Sequence[float]) -> ClockRecorder:
        """A recorder that goes on exactly where another one gave its `state`.

        Raises:
            InvalidValueError: it is no such state.
        """
        recorder = cls()
        if not _is_state(state):
            raise InvalidValueError(
                "clock",
                f"must be a list of a tolerance, two slopes and up to {MOST_KNOTS} pairs of a step and its "
                "time, both growing",
            )
        recorder._tolerance, recorder._lowest, recorder._highest = map(float, state[:3])
        pairs = [(int(step), float(t)) for step, t in zip(state[3::2], state[4::2], strict=True)]
        *earlier, (recorder.step, recorder.t) = pairs
        recorder._begin_after(earlier)
        return recorder

    def _begin_after(self, knots: list[tuple[int, float]]) -> None:
        """Begin a piece at the last of these knots, of which some go where there is no room for the newest pair."""
        while len(knots) >= MOST_KNOTS:
            self._drop_one(knots)
        self._knots = tuple(knots)
        if knots:
            self._begin, self._begin_t = knots[-1]

    def _drop_one(self, knots: list[tuple[int, float]]) -> None:
        """Drop the knot that is missed least; not the last, from which the piece at hand begins."""
        changes = [
            abs(step - a - (b - a) * ((t - a_t) / (b_t - a_t)))
            for (a, a_t), (step, t), (b, b_t) in zip([(0, 0.0), *knots], knots, knots[1:], strict=False)
        ]
        least = min(changes)
        del knots[changes.index(least)]
        self._tolerance = max(self._tolerance, least)


def _is_state(state: object) -> bool:
    """Whether this is what `ClockRecorder.state` gives."""
    if not isinstance(state, list) or not 5 <= len(state) <= 3 + 2 * MOST_KNOTS or len(state) % 2 == 0:
        return False
    if not all(type(x) is float or (type(x) is int and x < 2**63) for x in state):
        return False
    tolerance, lowest, highest, *pairs = state
    if not (TOLERANCE <= tolerance < math.inf and 0 <= lowest <= highest):
        return False
    steps, times = [0, *pairs[::2]], [0.0, *pairs[1::2]]
    if pairs == [0, 0]:
        return True
    return (
        all(type(step) is int for step in steps)
        and all(a < b for a, b in pairwise(steps))
        and all(a < b < math.inf for a, b in pairwise(times))
    )


def _along(x: FloatArray, knots: FloatArray, values: FloatArray) -> FloatArray:
    """Linear between the knots, constant before the first, with the last slope after the last."""
    slope = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
    beyond = values[-1] + (x - knots[-1]) * slope
    return np.where(x > knots[-1], beyond, np.interp(x, knots, values))
