"""The tracked profile and the clock of a run, as its snapshots record them.

The profile is the power function of Karras et al. (arXiv 2312.02696, section 3.1).

Training time `t` starts at 0, in any unit. An average taken at time `t` with exponent `gamma` weighs the network at
time `s` by

    density(s) = (gamma + 1) s**gamma / t**(gamma + 1),     0 < s <= t      (equation 121),

whose mean is t (gamma + 1) / (gamma + 2) and whose standard deviation, divided by `t`, is

    sigma_rel = sqrt((gamma + 1) / ((gamma + 2)**2 (gamma + 3)))          (equation 123).

gamma = 0 is the uniform average, sigma_rel = 12**-0.5 = 0.2887, the longest one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError

FloatArray = npt.NDArray[np.float64]


class Profile(Protocol):
    """The mass of an average, 1 in total, over times on the run's clock. Both functions take arrays of any shape."""

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass per unit of time at times `s`; points of mass are left out."""

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass at times after `s`: 1 before the start, 0 from the end on, and never increasing."""


class StoredProfile(Profile, Protocol):
    """The profile of a stored average: `PowerFunction`, `Point`, `Discrete`, or another profile with a time."""

    @property
    def t(self) -> float:
        """The time at which the average was taken, above 0; all mass is at or before it."""


UNIFORM_SIGMA_REL = 12**-0.5
"""sigma_rel of the uniform average over all of training; every power function is shorter."""

SHORTEST_SIGMA_REL = 1e-12
"""The least sigma_rel, shorter than one step of any training; far below it the formulas overflow."""


def check_sigma_rel(sigma_rel: float, name: str = "sigma_rel") -> float:
    """Return `sigma_rel` as a float; raise an InvalidValueError about `name` if it is out of range."""
    try:
        value = math.nan if isinstance(sigma_rel, str) else float(sigma_rel)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if not 0 < value < UNIFORM_SIGMA_REL:
        shown = f"{sigma_rel:g}" if isinstance(sigma_rel, int | float) else repr(sigma_rel)[:40]
        must = "must lie" if isinstance(sigma_rel, int | float) else "must be a number, and lie"
        reason = f"{must} in (0, 0.2887); 0.2887 is the uniform average over all of training"
        raise InvalidValueError(name, reason, value=shown)
    if value < SHORTEST_SIGMA_REL:
        reason = f"too short to differ from no averaging; must be at least {SHORTEST_SIGMA_REL:g}"
        raise InvalidValueError(name, reason, value=f"{value:g}")
    return value


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent of the profile with width `sigma_rel` (equation 126), gamma + 1 to about 1e-15 relative.

    With x = gamma + 1 and T = sigma_rel**-2, equation 123 reads f(x) = (x + 1)**2 (x + 2) - T x = 0. Near the uniform
    average f has two positive roots (x = 1 and x = 0.37 at T = 12); the larger one is the solution. f is convex for
    x > 0, and x = 1 / sigma_rel lies right of both roots, so that Newton's method from there decreases monotonically to
    the larger root.
    """
    return _gamma(check_sigma_rel(sigma_rel))


@lru_cache(maxsize=4096)
def _gamma(sigma_rel: float) -> float:
    if sigma_rel < 1e-6:
        # x = 1/sigma_rel - 2 - sigma_rel/2 + O(sigma_rel**2); beyond that, f overflows or loses digits.
        return 1 / sigma_rel - 3 - sigma_rel / 2
    inverse_square = 1 / (sigma_rel * sigma_rel)
    x = 1 / sigma_rel
    while True:
        value = (x + 1) ** 2 * (x + 2) - inverse_square * x
        slope = (x + 1) * (3 * x + 5) - inverse_square
        smaller = x - value / slope
        if not smaller < x:
            return x - 1
        x = smaller


def sigma_rel_from_gamma(gamma: float) -> float:
    """Return the width of the profile with exponent `gamma` > 0, as a fraction of training time."""
    if not (gamma > 0 and math.isfinite(gamma)):
        raise InvalidValueError("gamma", "must be above 0, the uniform average, and finite", value=f"{gamma:g}")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def new_value_share(gamma: float, t_prev: float, t: float) -> float:
    """Return 1 - beta, the share of the new value in an update at time `t`.

    beta = (t_prev / t)**(gamma + 1) with the *true* interval since the last update (equation 127). A chain of such
    updates gives each value the power function's mass on the interval before it. At the first update `t_prev` is 0.
    """
    if t_prev == 0:
        return 1.0
    return -math.expm1((gamma + 1) * math.log1p(-(t - t_prev) / t))


WINDOW = 256
"""Limit of the updates in a mean, which collects their roundings; shorter means would round the average more often."""

LONGEST_OWN = 1 / 8
"""Limit of the time that a mean of one profile covers, relative to all of training so far."""

UNEVEN = 1 / 60
"""Limit of the relative difference between profiles in their weights within a mean that they share."""

LONGEST = 1 / 1000
"""The time that a shared mean of more than two values may cover, relative to all of training so far."""


def reach(gammas: Sequence[float]) -> float:
    """Return the time that a mean of more than two values may cover for these profiles, relative to `t`."""
    spread = max(gammas) - min(gammas)
    return min(LONGEST, UNEVEN / spread) if spread else LONGEST


def window_ends(gammas: Sequence[float], window: int, begin: float, t: float, shared: bool) -> bool:
    """Return whether the means of the last `window` values, after `begin`, are folded into the averages at time `t`.

    The first update is always folded. A mean that profiles share is exact for two values, however far they are apart.
    """
    if window >= WINDOW or t - begin >= LONGEST_OWN * t:
        return True
    return shared and window > 1 and t - begin > reach(gammas) * t


def may_share_mean(window: int, begin: float, t: float) -> bool:
    """Return whether all profiles may share a mean of `WINDOW` updates, each as long as these in (begin, t]."""
    return (t - begin) * WINDOW <= LONGEST * t * window


def sketched_window_ends(gammas: Sequence[float], begin: float, before: float, t: float) -> bool:
    """Return whether, where profiles have their own means, the sketch's window after `begin` ends at `t`.

    `before` is the time of the last update.

    A window is as long as a shared mean; where that would contain two values, each value has a window.
    """
    least = 2 if begin == before else 1
    return (t - begin) * least > reach(gammas) * t


def roundings(gamma: float, updates: int) -> float:
    """Return the number of independent roundings, each of the average's size, that remain in it after the updates.

    Reading the average rounds once. A mean of n updates is rounded at each of them; the k-th rounding decays as k / n,
    which leaves n / 3. If the mean covers most of the average, they decay as the average does, (s / t)^(gamma + 1),
    which leaves `updates` / (2 gamma + 3). The average over many means reduces this by the sum of their squared masses
    p(s) n dt, n dt integral p^2 ds = (gamma + 1)^2 / (2 gamma + 1) n / `updates`. Each fold rounds once more;
    `updates` / n / (2 gamma + 3) of these remain.
    """
    n = min(WINDOW, max(1.0, LONGEST_OWN * updates))
    fading = 2 * gamma + 3
    means = min(n / 3, updates / fading) * min(1.0, n / updates * (gamma + 1) ** 2 / (2 * gamma + 1))
    return 1 + means + updates / n / fading


@dataclass(frozen=True)
class PowerFunction:
    """The power-function profile of an average taken at time `t` > 0, with exponent `gamma` >= 0."""

    gamma: float
    t: float

    @classmethod
    def from_sigma_rel(cls, sigma_rel: float, t: float) -> PowerFunction:
        """Return the power function of width `sigma_rel` at time `t`."""
        return cls(gamma_from_sigma_rel(sigma_rel), float(t))

    @property
    def sigma_rel(self) -> float:
        """The standard deviation as a fraction of `t`."""
        return sigma_rel_from_gamma(self.gamma)

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass per unit of time at `s`; 0 outside (0, t]."""
        relative = np.asarray(s, dtype=np.float64) / self.t
        inside = (relative > 0) & (relative <= 1)
        return np.where(inside, np.power(np.where(inside, relative, 1.0), self.gamma), 0.0) * (self.gamma + 1) / self.t

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`: 1 - (s/t)**(gamma + 1) within (0, t]."""
        relative = np.clip(np.asarray(s, dtype=np.float64) / self.t, 0.0, 1.0)
        with np.errstate(divide="ignore"):
            return np.asarray(-np.expm1((self.gamma + 1) * np.log(relative)), dtype=np.float64)


@dataclass(frozen=True)
class RecordedPowerFunction:
    """A power function as a tracker recorded it, from discrete updates.

    The mass before the first update, (t_first / t)**(gamma + 1), lies on the value at `t_first`. Later updates are at
    most `max_interval` apart, so that mass is displaced by at most that time.
    """

    gamma: float
    t: float
    t_first: float
    max_interval: float

    @property
    def pure(self) -> PowerFunction:
        """The power function without the effects of discrete updates."""
        return PowerFunction(self.gamma, self.t)


# --- steps over training time, for averages over steps on a clock in images or tokens


@dataclass(frozen=True)
class Clock:
    """A run's steps (calls of `update_`) over its training time, interpolated linearly from step 0 at time 0.

    After the last known pair, steps are as long as just before it. The step clock is the identity.

    Attributes:
        steps, times: the known pairs, at least one, both ascending from above 0.
    """

    steps: Sequence[float]
    times: Sequence[float]

    def __post_init__(self) -> None:
        for name in ("steps", "times"):
            object.__setattr__(self, name, tuple(map(float, getattr(self, name))))

    @classmethod
    def of_steps(cls) -> Clock:
        """Return the step clock: the time of a step is its number."""
        return cls((1.0,), (1.0,))

    def step_at(self, s: npt.ArrayLike) -> FloatArray:
        """Return the step at times `s`, any shape, with fractions; 0 up to time 0."""
        times, steps = self._nodes
        return _interpolated(np.asarray(s, dtype=np.float64), times, steps)

    def time_at(self, step: npt.ArrayLike) -> FloatArray:
        """Return the time of steps, any shape: the inverse of `step_at`."""
        times, steps = self._nodes
        return _interpolated(np.asarray(step, dtype=np.float64), steps, times)

    def steps_per_time(self, s: npt.ArrayLike) -> FloatArray:
        """Return the steps per unit of time at `s`, any shape: the left derivative of `step_at`; 0 up to time 0."""
        at = np.asarray(s, dtype=np.float64)
        times, steps = self._nodes
        slopes = np.diff(steps) / np.diff(times)
        interval = np.searchsorted(times, at, side="left") - 1
        return np.where(at > 0, slopes[np.clip(interval, 0, len(slopes) - 1)], 0.0)

    @cached_property
    def _nodes(self) -> tuple[FloatArray, FloatArray]:
        return np.array([0.0, *self.times]), np.array([0.0, *self.steps])


def _interpolated(x: FloatArray, knots: FloatArray, values: FloatArray) -> FloatArray:
    """Interpolate linearly between knots: constant before the first one, with the last slope after the last."""
    slope = (values[-1] - values[-2]) / (knots[-1] - knots[-2])
    beyond = values[-1] + (x - knots[-1]) * slope
    return np.where(x > knots[-1], beyond, np.interp(x, knots, values))


MOST_KNOTS = 256
"""Limit of the pairs that a ClockRecorder keeps, the newest one included."""

TOLERANCE = 0.5
"""Largest error of a clock between its knots, in steps, until `MOST_KNOTS` is reached."""


Knots = tuple[tuple[int, float], ...]


@dataclass(slots=True, eq=False)
class ClockRecorder:
    """A clock, recorded call by call as knots: pairs of step and time, with a line between neighbours. Immutable.

    A line starts at a knot, the first one at step 0 and time 0, and continues while it passes every later pair within
    the tolerance. The possible slopes form an interval, which each pair narrows, so that no pair is stored. When the
    interval is empty, the previous pair becomes the next knot.

    At `MOST_KNOTS` knots the one nearest to the line between its neighbours is dropped, and the tolerance grows to that
    distance, so that the rest of training is not recorded more precisely than its past.

    Attributes:
        step, t: the newest pair; 0 before the first pair.
    """

    step: int = 0
    t: float = 0.0
    _knots: Knots = ()
    _lowest: float = 0.0
    _highest: float = math.inf
    _tolerance: float = TOLERANCE

    @classmethod
    def of_knots(cls, knots: Sequence[tuple[int, float]]) -> ClockRecorder:
        """Return a recorder that continues from the result of `knots_until`, at least one knot.

        The interval of possible slopes is lost except for the mean slope, so that the last pair becomes a knot unless
        later steps have exactly that length.
        """
        *earlier, (step, t) = knots
        kept, tolerance = _with_room(earlier, TOLERANCE)
        begin, begin_t = kept[-1] if kept else (0, 0.0)
        slope = (step - begin) / (t - begin_t)
        return cls(step, t, kept, slope, slope, tolerance)

    def add(self, step: int, t: float) -> ClockRecorder:
        """Return a recorder that also has the next pair, which must be above the last one."""
        knots, lowest, highest, tolerance = self._knots, self._lowest, self._highest, self._tolerance
        begin, begin_t = knots[-1] if knots else (0, 0.0)
        if not lowest <= (step - begin) / (t - begin_t) <= highest:
            knots, tolerance = _with_room([*knots, (self.step, self.t)], tolerance)
            (begin, begin_t), lowest, highest = knots[-1], 0.0, math.inf
        lowest = max(lowest, (step - begin - tolerance) / (t - begin_t))
        highest = min(highest, (step - begin + tolerance) / (t - begin_t))
        return ClockRecorder(step, t, knots, lowest, highest, tolerance)

    def knots_until(self, step: int, t: float) -> Knots:
        """Return the knots up to an added pair, which becomes the last one; nothing for the step clock."""
        knots = (*(knot for knot in self._knots if knot[0] < step), (step, t))
        return () if all(knot[0] == knot[1] for knot in knots) else knots

    def state(self) -> list[float]:
        """Return tolerance, slopes, and each knot's step and time, from which `of_state` continues exactly."""
        pairs = (*self._knots, (self.step, self.t))
        return [self._tolerance, self._lowest, self._highest, *(number for pair in pairs for number in pair)]

    @classmethod
    def of_state(cls, state: Sequence[float]) -> ClockRecorder:
        """Return the recorder with this `state`.

        Raises:
            InvalidValueError: the value is not the state of a recorder.
        """
        if not _is_state(state):
            expected = f"a tolerance, two slopes and up to {MOST_KNOTS} pairs of a step and its time, both ascending"
            raise InvalidValueError("clock", f"must be a list of {expected}")
        tolerance, lowest, highest = map(float, state[:3])
        *earlier, (step, t) = ((int(step), float(t)) for step, t in zip(state[3::2], state[4::2], strict=True))
        return cls(step, t, tuple(earlier), lowest, highest, tolerance)


def _with_room(knots: list[tuple[int, float]], tolerance: float) -> tuple[Knots, float]:
    """Drop knots until there is room for the newest pair; return the rest and their tolerance."""
    while len(knots) >= MOST_KNOTS:
        changes = [
            abs(step - a - (b - a) * ((t - a_t) / (b_t - a_t)))
            for (a, a_t), (step, t), (b, b_t) in zip([(0, 0.0), *knots], knots, knots[1:], strict=False)
        ]
        tolerance = max(tolerance, min(changes))
        del knots[changes.index(min(changes))]
    return tuple(knots), tolerance


def _is_state(state: object) -> bool:
    """Return whether a value read from a file is the `state` of a ClockRecorder."""
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
