"""The power function of Karras et al. (arXiv 2312.02696, section 3.1), the tracked profile.

Training time `t` runs from 0, in any unit. An average taken at time `t` with exponent `gamma` weighs the network at
time `s` by

    density(s) = (gamma + 1) s**gamma / t**(gamma + 1),     0 < s <= t      (equation 121),

whose mean is t (gamma + 1) / (gamma + 2) and whose standard deviation, divided by `t`, is

    sigma_rel = sqrt((gamma + 1) / ((gamma + 2)**2 (gamma + 3)))          (equation 123).

gamma = 0 is the uniform average, sigma_rel = 12**-0.5 = 0.2887, the longest one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError

FloatArray = npt.NDArray[np.float64]


class Profile(Protocol):
    """The mass of an average, 1 in total, over times on the run's clock. Both functions take arrays of any shape."""

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at times `s`; points of mass are left out."""

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass at times after `s`: 1 before the start, 0 from the end on. It never grows."""


class StoredProfile(Profile, Protocol):
    """The profile of a stored average: `PowerFunction`, `Point`, `Discrete`, or another one with a time."""

    @property
    def t(self) -> float:
        """When it was taken, above 0; its mass is at or before that."""


UNIFORM_SIGMA_REL = 12**-0.5
"""sigma_rel of the uniform average over all of training; every power function is shorter."""

SHORTEST_SIGMA_REL = 1e-12
"""Shorter than one step of any training; far below it the formulas overflow."""


def check_sigma_rel(sigma_rel: float) -> float:
    """`sigma_rel` as a float, or an InvalidValueError that names the range."""
    try:
        value = math.nan if isinstance(sigma_rel, str) else float(sigma_rel)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        value = math.nan
    if not 0 < value < UNIFORM_SIGMA_REL:
        shown = f"{sigma_rel:g}" if isinstance(sigma_rel, int | float) else repr(sigma_rel)[:40]
        reason = "must lie in (0, 0.2887); 0.2887 is the uniform average over all of training"
        raise InvalidValueError("sigma_rel", reason, value=shown)
    if value < SHORTEST_SIGMA_REL:
        reason = f"too short to be told from no averaging; must be at least {SHORTEST_SIGMA_REL:g}"
        raise InvalidValueError("sigma_rel", reason, value=f"{value:g}")
    return value


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent whose profile has the width `sigma_rel`, to about 1e-15 relative in gamma + 1 (equation 126).

    With x = gamma + 1 and T = sigma_rel**-2 equation 123 reads f(x) = (x + 1)**2 (x + 2) - T x = 0. Near the uniform
    average f has two positive roots (x = 1 and x = 0.37 at T = 12), of which the larger is wanted. f is convex for
    x > 0, and x = 1 / sigma_rel lies right of both roots, so that Newton's method from there falls monotonically onto
    the larger root.
    """
    sigma_rel = check_sigma_rel(sigma_rel)
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
    """The width of the profile with exponent `gamma` > 0, as a fraction of training time."""
    if not (gamma > 0 and math.isfinite(gamma)):
        raise InvalidValueError("gamma", "must be above 0, the uniform average, and finite", value=f"{gamma:g}")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def new_value_share(gamma: float, t_prev: float, t: float) -> float:
    """1 - beta: the share that an update at time `t` gives to the new value.

    beta = (t_prev / t)**(gamma + 1) with the *true* interval since the last update (equation 127). A chain of such
    updates leaves on each value the power function's mass on the interval before it. `t_prev` = 0 is the first update.
    """
    if not 0 <= t_prev < t:
        raise InvalidValueError("t", f"must grow; the last update was at t = {t_prev:,.12g}", value=f"{t:,.12g}")
    if t_prev == 0:
        return 1.0
    return -math.expm1((gamma + 1) * math.log1p(-(t - t_prev) / t))


@dataclass(frozen=True)
class PowerFunction:
    """The power-function profile of an average taken at time `t` > 0, with exponent `gamma` >= 0."""

    gamma: float
    t: float

    @classmethod
    def from_sigma_rel(cls, sigma_rel: float, t: float) -> PowerFunction:
        """The power function whose width is `sigma_rel`, at time `t`."""
        return cls(gamma_from_sigma_rel(sigma_rel), float(t))

    @property
    def sigma_rel(self) -> float:
        """Standard deviation as a fraction of `t`."""
        return sigma_rel_from_gamma(self.gamma)

    @property
    def mean_age(self) -> float:
        """Mean distance to `t`, in the unit of `t`: t / (gamma + 2)."""
        return self.t / (self.gamma + 2)

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s`; 0 outside (0, t]."""
        relative = np.asarray(s, dtype=np.float64) / self.t
        inside = (relative > 0) & (relative <= 1)
        return np.where(inside, np.power(np.where(inside, relative, 1.0), self.gamma), 0.0) * (self.gamma + 1) / self.t

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`: 1 - (s/t)**(gamma + 1) within (0, t]."""
        relative = np.clip(np.asarray(s, dtype=np.float64) / self.t, 0.0, 1.0)
        with np.errstate(divide="ignore"):
            return np.asarray(-np.expm1((self.gamma + 1) * np.log(relative)), dtype=np.float64)

    def discrete_weights(self, times: npt.ArrayLike) -> FloatArray:
        """The weight of each value after updates at `times` (growing, the last one at `t`): shape [len(times)].

        The value at t_k has (t_k/t)**(gamma+1) - (t_{k-1}/t)**(gamma+1), with t_0 = 0; they sum to 1.
        """
        grid = np.asarray(times, dtype=np.float64)
        if grid.size == 0 or grid[0] <= 0 or np.any(np.diff(grid) <= 0) or grid[-1] != self.t:
            raise InvalidValueError("times", f"must grow from above 0 and end at t = {self.t:,.12g}")
        return -np.diff(self.tail(np.concatenate(([0.0], grid))))


@dataclass(frozen=True)
class RecordedPowerFunction:
    """A power function as a tracker recorded it, from discrete updates.

    The mass before the first update, (t_first / t)**(gamma + 1), sits on the value at `t_first`. Later updates are at
    most `max_interval` apart, so that mass is displaced by no more.
    """

    gamma: float
    t: float
    t_first: float
    max_interval: float

    @property
    def pure(self) -> PowerFunction:
        """The power function without the effects of discrete updates."""
        return PowerFunction(self.gamma, self.t)
