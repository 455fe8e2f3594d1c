"""Averaging profiles: how much each moment of training counts in an average. NumPy only, float64.

Training time `s` starts at 0 on the run's clock, in any unit. An average at time `t` is sum_k w_k
theta_k over the weights of the network after each step. Its profile is its `tail`: tail(s) is the
mass at times after s, 1 before the start and 0 from `t` on. The weights of step k have the mass
tail(step k-1) - tail(step k). A tail is also what multiplies updates: sum_k w_k theta_k = theta_0 +
sum_k tail(step k-1) (theta_k - theta_k-1).

Below: the power function, which runs track, and averages over known times. `decay_rules` has the
averages of other programs, `targets` the profiles that a user may ask for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError, abbreviate

FloatArray = npt.NDArray[np.float64]


def _floats(values: npt.ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float64)


class Profile(Protocol):
    """The mass of an average, 1 in total, over times on the run's clock."""

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Compute the mass at times after `s`, any shape: 1 before the start, 0 from the end on,
        never increasing."""


class StoredProfile(Profile, Protocol):
    """The profile of a stored average: `PowerFunction`, `Point`, `Discrete`, or another profile
    with a time.

    A profile with mass at points has their times as `jumps`, in ascending order.
    """

    @property
    def t(self) -> float:
        """The time at which the average was taken, above 0; all mass is at or before it."""


def tails_at(times: FloatArray, profiles: Sequence[Profile]) -> FloatArray:
    """Compute the mass of each profile after each of the times: shape [times, profiles]."""
    columns = [profile.tail(times) for profile in profiles]
    return np.stack(columns, axis=1)


# --- the power function (Karras et al., arXiv 2312.02696, section 3.1)
#
# An average taken at time t with exponent gamma weighs the network at time s by
#
#     density(s) = (gamma + 1) s**gamma / t**(gamma + 1),     0 < s <= t      (equation 121),
#
# whose mean is t (gamma + 1) / (gamma + 2) and whose standard deviation, divided by t, is
#
#     sigma_rel = sqrt((gamma + 1) / ((gamma + 2)**2 (gamma + 3)))          (equation 123).
#
# gamma = 0 is the uniform average, sigma_rel = 12**-0.5 = 0.2887, the longest one.

UNIFORM_SIGMA_REL = 12**-0.5
SHORTEST_SIGMA_REL = 1e-12
"""sigma_rel of the uniform average, which is above every other, and the least one: shorter than one
step of any training. Far below it the formulas overflow."""

_LONGEST = 0.2886  # the longest of four digits


def check_sigma_rel(sigma_rel: float, name: str = "sigma_rel") -> float:
    """Convert `sigma_rel` to a float; raise an InvalidValueError about `name` if it is out of
    range."""
    try:
        value = math.nan if isinstance(sigma_rel, str) else float(sigma_rel)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if SHORTEST_SIGMA_REL <= value < UNIFORM_SIGMA_REL:
        return value
    reason = "lie in (0, 0.2887); 0.2887 is the uniform average over all of training"
    if isinstance(sigma_rel, int | float):
        raise InvalidValueError(name, f"must {reason}", value=f"{sigma_rel:g}")
    raise InvalidValueError(name, f"must be a number, and {reason}", value=abbreviate(sigma_rel))


def round_sigma_rel(sigma_rel: float, digits: int) -> float:
    """Round a width to so many digits; one that would round to that of the uniform average becomes
    0.2886, which is accepted as a width."""
    return min(float(f"{sigma_rel:.{digits}g}"), _LONGEST)


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Compute the exponent of the profile with width `sigma_rel`, gamma + 1 to about 1e-15
    relative."""
    return _gamma(check_sigma_rel(sigma_rel))


@lru_cache(maxsize=4096)
def _gamma(sigma_rel: float) -> float:
    """Solve equation 123.

    With x = gamma + 1 and T = sigma_rel**-2 it reads f(x) = (x + 1)**2 (x + 2) - T x = 0. Near the
    uniform average that has two positive roots; the larger one is the solution. f is convex for x >
    0, and x = 1 / sigma_rel lies right of both roots, so that Newton's method from there decreases
    monotonically to the larger one.
    """
    if sigma_rel < 1e-6:
        # x = 1/sigma_rel - 2 - sigma_rel/2 + O(sigma_rel**2); beyond that, f overflows or loses
        # digits.
        return 1 / sigma_rel - 3 - sigma_rel / 2
    inverse_square = 1 / (sigma_rel * sigma_rel)
    x = 1 / sigma_rel
    while True:
        cubic = (x + 1) ** 2 * (x + 2)
        value = cubic - inverse_square * x
        cubic_slope = (x + 1) * (3 * x + 5)
        slope = cubic_slope - inverse_square
        smaller = x - value / slope
        if not smaller < x:
            return x - 1
        x = smaller


def sigma_rel_from_gamma(gamma: float) -> float:
    """Compute the width of the profile with exponent `gamma` > 0, as a fraction of training
    time."""
    if not (gamma > 0 and math.isfinite(gamma)):
        reason = "must be above 0, the uniform average, and finite"
        raise InvalidValueError("gamma", reason, value=f"{gamma:g}")
    ratio = (gamma + 1) / (gamma + 3)
    return math.sqrt(ratio) / (gamma + 2)


def sigma_rel_from_decay(decay: float, steps: float) -> float | None:
    """Compute the width of the power function that is as long, after so many steps, as an ordinary
    EMA of this decay in (0, 1): their mean ages are equal.

    An ordinary EMA has the mean age -1 / ln(decay), about 1 / (1 - decay), in steps; a power
    function steps / (gamma + 2). None for an EMA that is longer than the uniform average.
    """
    gamma = -steps * math.log(decay) - 2
    return sigma_rel_from_gamma(gamma) if gamma > 0 else None


def decay_from_sigma_rel(sigma_rel: float, steps: float) -> float:
    """Compute the decay of the ordinary EMA that is as long as a power function: the inverse of
    `sigma_rel_from_decay`."""
    return math.exp(-(gamma_from_sigma_rel(sigma_rel) + 2) / steps)


@dataclass(frozen=True)
class PowerFunction:
    """The power-function profile of an average taken at time `t` > 0, with exponent `gamma` >=
    0."""

    gamma: float
    t: float

    @classmethod
    def from_sigma_rel(cls, sigma_rel: float, t: float) -> PowerFunction:
        return cls(gamma_from_sigma_rel(sigma_rel), float(t))

    @property
    def sigma_rel(self) -> float:
        return sigma_rel_from_gamma(self.gamma)

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Compute the mass per unit of time at `s`; 0 outside (0, t]."""
        relative = _floats(s) / self.t
        inside = (relative > 0) & (relative <= 1)
        relative = np.where(inside, relative, 1.0)
        powers = np.power(relative, self.gamma)
        of_average = np.where(inside, powers, 0.0)
        return of_average * (self.gamma + 1) / self.t

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Compute the mass after `s`: 1 - (s/t)**(gamma + 1) within (0, t]."""
        relative = np.clip(_floats(s) / self.t, 0.0, 1.0)
        with np.errstate(divide="ignore"):
            logs = (self.gamma + 1) * np.log(relative)
        return np.asarray(-np.expm1(logs))


# --- averages over known times


@dataclass(frozen=True)
class Point:
    """The profile of the weights at time `t` > 0 themselves: an ordinary checkpoint."""

    t: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", float(self.t))

    @property
    def t_first(self) -> float:
        """The time at which averages begin: the first step on a step clock, not the first
        checkpoint."""
        return min(1.0, self.t)

    @property
    def jumps(self) -> FloatArray:
        return np.array([self.t])

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Compute the mass after `s`: 1 before `t`, 0 from `t` on."""
        is_before = _floats(s) < self.t
        return np.where(is_before, 1.0, 0.0)


class Discrete:
    """An average over weights at known times, sum_k masses_k theta(times_k), taken at time `t`, by
    default the last.

    `times` are ascending, above 0 and at most `t`; `masses` at least 0, and scaled to the sum 1.
    """

    def __init__(
        self,
        times: Sequence[float] | FloatArray,
        masses: Sequence[float] | FloatArray,
        t: float = 0.0,
    ) -> None:
        self.times = np.array(times, dtype=np.float64)
        mass = np.array(masses, dtype=np.float64)
        self.jumps = self.times
        self.masses = mass / mass.sum()
        self.t = float(t or self.times[-1])

    @property
    def t_first(self) -> float:
        """The time of the earliest weights in the average."""
        return float(self.times[0])

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        passed = np.searchsorted(self.times, _floats(s), side="right")
        return self._later[passed]

    @cached_property
    def _later(self) -> FloatArray:
        """The mass from each of the times on, then 0; summed from the end, which keeps the digits
        of small tails."""
        backwards = np.cumsum(self.masses[::-1])
        later = np.append(backwards[::-1], 0.0)
        later[0] = 1.0
        return later
