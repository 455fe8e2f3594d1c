"""The classical average, with one constant decay: its profile, and which power function it resembles.

Every step k makes x <- beta x + (1 - beta) theta_k, so that after step n the value of step k counts
(1 - beta) beta**(n - k), and all values after step k count 1 - beta**(n - k) together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.clock import Clock
from posthoc_cli.profiles.power import gamma_from_sigma_rel, sigma_rel_from_gamma
from posthoc_cli.profiles.protocol import FloatArray

_DIRECT_SUM_LIMIT = 1_000_000
"""Steps up to which the mean age is summed term by term."""


@dataclass(frozen=True)
class ClassicalEMA:
    """The average x <- beta x + (1 - beta) theta of every step, at time `t`.

    With n(s) the step at time `s`, the mass after `s` is 1 - beta**(n(t) - n(s)). It began as a copy of the value
    at time `start`, on which the rest sits: beta**(n(t) - n(start)), at `start` = 0 beta**n(t).

    Attributes:
        beta: decay of one step, in (0, 1).
        t: the average's time, above 0.
        clock: the run's steps over time.
        start: time of the value that the average began as, in [0, t].
    """

    beta: float
    t: float
    clock: Clock
    start: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise InvalidValueError("beta", "must lie in (0, 1)", value=f"{self.beta!r}")
        if not (0 <= self.start <= self.t and 0 < self.t < math.inf):
            raise InvalidValueError(
                f"an average from {self.start:,.12g} to t = {self.t:,.12g}", "must start at 0 or later and by t"
            )

    @property
    def mass_on_start(self) -> float:
        """The mass that sits on the value at `start`."""
        return float(np.exp(self._log_kept(self.start)))

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s` in (start, t]; the mass at `start` itself is `mass_on_start`."""
        times = np.asarray(s, dtype=np.float64)
        kept = np.exp(self._log_kept(times)) * -math.log(self.beta) * self.clock.steps_per_time(times)
        return np.where((times > self.start) & (times <= self.t), kept, 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`: 1 before `start`, 0 from `t` on."""
        times = np.asarray(s, dtype=np.float64)
        return np.where(times < self.start, 1.0, -np.expm1(self._log_kept(times)))

    def _log_kept(self, s: npt.ArrayLike) -> FloatArray:
        """log(beta**(n(t) - n(s))), 0 from `t` on: the logarithm keeps the digits of a beta near 1."""
        later_steps = self.clock.step_at(self.t) - self.clock.step_at(s)
        return np.asarray(math.log(self.beta) * np.maximum(later_steps, 0.0), dtype=np.float64)


# --- the power function that it resembles ----------------------------------------------------------


def mean_age(gamma: float, steps: int) -> float:
    """Mean age in steps of the values in an average updated at every step 1 .. `steps`.

    sum_k w_k (T - k) with the discrete weights of the power function; by partial summation
    sum_{j=1}^{T-1} (j/T)**(gamma+1).
    """
    if steps < 1:
        raise InvalidValueError("steps", "must be at least 1", value=steps)
    x = gamma + 1
    if steps <= _DIRECT_SUM_LIMIT:
        return float(np.sum(np.power(np.arange(1, steps) / steps, x)))
    if x > 0.1 * steps:
        # The terms fall by a factor exp(-x/T) each: 400 of them leave out less than e**-40.
        return float(np.sum(np.exp(x * np.log1p(-np.arange(1, 401) / steps))))
    # Euler-Maclaurin; the next terms are of order (x/T)**5 / 30240.
    ratio = x / steps
    return float(steps / (x + 1) - 0.5 + ratio / 12 - ratio * (x - 1) * (x - 2) / steps**2 / 720)


def classical_beta(sigma_rel: float, steps: int) -> float:
    """The constant decay whose average has the same mean age after `steps` steps as the power function.

    A classical EMA with decay beta has mean age beta / (1 - beta) steps.
    """
    age = mean_age(gamma_from_sigma_rel(sigma_rel), steps)
    return age / (1 + age)


def sigma_rel_from_classical_beta(beta: float, steps: int) -> float:
    """The inverse of `classical_beta`.

    No power function has a higher mean age than the uniform average, (steps - 1) / 2: a beta at or above
    1 - 2 / (steps + 1) has no counterpart after that many steps, however its table may name one.
    """
    if steps < 2:
        raise InvalidValueError("steps", "must be at least 2", value=steps)
    longest = 1 - 2 / (steps + 1)
    if not 0 < beta < longest:
        raise InvalidValueError(
            "beta",
            f"after {steps:,} steps it must lie in (0, {longest:.7g}); {longest:.7g} has the mean age "
            "of the uniform average, and no power function a higher one",
            value=f"{beta!r}",
        )
    from scipy.optimize import brentq  # slow to import, and needed here alone

    age = beta / (1 - beta)
    # Mean age falls from (T-1)/2 at x = 1 roughly as T/(x+1), and for huge x as exp(-x/T).
    largest = steps * (2 + max(0.0, -math.log(age))) * 2
    log_x = brentq(
        lambda value: mean_age(math.expm1(value), steps) - age, 0.0, math.log(largest), xtol=1e-15, rtol=1e-14
    )
    return sigma_rel_from_gamma(math.expm1(log_x))
