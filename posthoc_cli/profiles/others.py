"""Profiles beside the power function: the classical average with one decay, uniform averages, and tables of points."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.clock import Clock
from posthoc_cli.profiles.power import FloatArray, gamma_from_sigma_rel, sigma_rel_from_gamma


@dataclass(frozen=True)
class ClassicalEMA:
    """The average x <- beta x + (1 - beta) theta of every step, at time `t`.

    With n(s) the step at time `s`, the mass after `s` is 1 - beta**(n(t) - n(s)). The rest, beta**(n(t) - n(start)),
    sits on the value at time `start`, from which it was initialised.

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
            reason = f"must lie in [0, t] with t = {self.t:,.12g} above 0 and finite"
            raise InvalidValueError("start", reason, value=f"{self.start:,.12g}")

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s` in (start, t]; the mass at `start` itself is left out."""
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
        return np.asarray(math.log(self.beta) * np.maximum(later_steps, 0.0))


def mean_age(gamma: float, steps: int) -> float:
    """Mean age, in steps, of the values in a power-function average that is updated at every step 1 .. `steps`.

    sum_k w_k (T - k) with the discrete weights w, by partial summation sum_{j=1}^{T-1} (j/T)**(gamma+1).
    """
    if steps < 1:
        raise InvalidValueError("steps", "must be at least 1", value=steps)
    x = gamma + 1
    if steps <= 1_000_000:
        return float(np.sum(np.power(np.arange(1, steps) / steps, x)))
    if x > 0.1 * steps:
        # The terms fall by a factor exp(-x/T) each: 400 of them leave out less than e**-40.
        return float(np.sum(np.exp(x * np.log1p(-np.arange(1, 401) / steps))))
    # Euler-Maclaurin; the next terms are of order (x/T)**5 / 30240.
    ratio = x / steps
    return float(steps / (x + 1) - 0.5 + ratio / 12 - ratio * (x - 1) * (x - 2) / steps**2 / 720)


def classical_beta(sigma_rel: float, steps: int) -> float:
    """The constant decay whose average has the power function's mean age: beta / (1 - beta) after `steps` steps."""
    age = mean_age(gamma_from_sigma_rel(sigma_rel), steps)
    return age / (1 + age)


def sigma_rel_from_classical_beta(beta: float, steps: int) -> float:
    """The inverse of `classical_beta`, for beta below 1 - 2 / (steps + 1), which has the uniform average's mean age."""
    if steps < 2:
        raise InvalidValueError("steps", "must be at least 2", value=steps)
    longest = 1 - 2 / (steps + 1)
    if not 0 < beta < longest:
        reason = f"after {steps:,} steps it must lie in (0, {longest:.7g}), below the mean age of the uniform average"
        raise InvalidValueError("beta", reason, value=f"{beta!r}")
    from scipy.optimize import brentq  # slow to import

    age = beta / (1 - beta)
    # Mean age falls from (T-1)/2 at x = 1 roughly as T/(x+1), and for huge x as exp(-x/T).
    largest = steps * (2 + max(0.0, -math.log(age))) * 2

    def excess(log_x: float) -> float:
        return mean_age(math.expm1(log_x), steps) - age

    return sigma_rel_from_gamma(math.expm1(brentq(excess, 0.0, math.log(largest), xtol=1e-15, rtol=1e-14)))


@dataclass(frozen=True)
class Conversion:
    """A power function, and the classical EMA that has the same mean age after some number of steps.

    Attributes:
        sigma_rel, gamma: of the power function.
        mean_age, std: mean age of the averaged values and standard deviation of their times, in steps.
        beta: of the classical EMA.
    """

    sigma_rel: float
    gamma: float
    mean_age: float
    std: float
    beta: float

    def to_dict(self) -> dict[str, Any]:
        """The attributes, for JSON."""
        return asdict(self)


def convert(steps: int, sigma_rels: Sequence[float] = (), betas: Sequence[float] = ()) -> list[Conversion]:
    """The power functions of these widths, and those of these classical decays, after `steps` steps.

    Raises:
        InvalidValueError: `steps` is not from 1 to 1e15, or a width or a decay is out of its range.
    """
    if not 1 <= steps <= 10**15:
        raise InvalidValueError("steps", "must be from 1 to 1e15", value=f"{steps:g}")
    pairs = [(sigma_rel, classical_beta(sigma_rel, steps)) for sigma_rel in sigma_rels]
    pairs += [(sigma_rel_from_classical_beta(beta, steps), beta) for beta in betas]
    gammas = [gamma_from_sigma_rel(sigma_rel) for sigma_rel, _ in pairs]
    return [
        Conversion(sigma_rel, gamma, mean_age(gamma, steps), sigma_rel * steps, beta)
        for (sigma_rel, beta), gamma in zip(pairs, gammas, strict=True)
    ]


@dataclass(frozen=True)
class Uniform:
    """Density 1 / (end - start) on (start, end], in the run's unit of time; 0 <= start < end."""

    start: float
    end: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end < math.inf:
            value = f"{self.start:,.12g} to {self.end:,.12g}"
            raise InvalidValueError("uniform", "must start at 0 or later and before its end", value=value)

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
    """The mean of the last `steps` steps up to time `t`, 1 / steps each; the run has at least as many up to `t`.

    With n(s) the step at time `s`, the mass after `s` is (n(t) - n(s)) / steps.
    """

    steps: int
    t: float
    clock: Clock

    def __post_init__(self) -> None:
        if not self.steps >= 1:
            raise InvalidValueError("window", "must be a whole number of steps, at least 1", value=self.steps)
        found = float(self.clock.step_at(self.t))
        if self.steps > found:
            reason = f"the run has {math.floor(found):,} steps up to t = {self.t:,.12g}; must be at most that"
            raise InvalidValueError("window", reason, value=self.steps)

    @property
    def start(self) -> float:
        """The time of the step before the window."""
        return float(self.clock.time_at(self.clock.step_at(self.t) - self.steps))

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s`: steps per unit of time, divided by `steps`, on (start, t]."""
        times = np.asarray(s, dtype=np.float64)
        inside = (times > self.start) & (times <= self.t)
        return np.where(inside, self.clock.steps_per_time(times) / self.steps, 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`: (n(t) - n(s)) / steps, between 0 and 1."""
        return np.clip((self.clock.step_at(self.t) - self.clock.step_at(s)) / self.steps, 0.0, 1.0)


@dataclass(frozen=True)
class Tabulated:
    """Density linear between given points and 0 outside them, scaled to a mass of 1.

    `times` are two at least, growing, from 0 or later; `values` in any unit, 0 or above and not all 0.
    """

    times: Sequence[float]
    values: Sequence[float]

    def __post_init__(self) -> None:
        times, values = (np.asarray(given, dtype=np.float64) for given in (self.times, self.values))
        if times.ndim != 1 or times.shape != values.shape or times.size < 2:
            found = f"times of shape {times.shape} with densities of shape {values.shape}"
            raise InvalidValueError("profile", f"must be two lists of equal length, of two points or more, not {found}")
        if (fault := first_fault(times, values)) is not None:
            raise InvalidValueError("profile", f"point {fault[0] + 1}: {fault[1]}")
        object.__setattr__(self, "times", tuple(times.tolist()))
        object.__setattr__(self, "values", tuple(values.tolist()))
        if not (np.any(values > 0) and self._curve[2][0] > 0):
            raise InvalidValueError("profile", "its mass is 0; at least one density must be above 0")

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Mass per unit of time at `s`; 0 outside the first and the last of `times`."""
        knots, relative, later, scale = self._curve
        height = np.interp(np.asarray(s, dtype=np.float64), knots, relative, left=0.0, right=0.0)
        height = np.maximum(height, 0.0)  # rounding may go below 0 on a steep slope
        return np.asarray(height / (later[0] * scale), dtype=np.float64)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Mass after `s`."""
        knots, relative, later, scale = self._curve
        at = np.clip(np.asarray(s, dtype=np.float64), knots[0], knots[-1])
        right = np.clip(np.searchsorted(knots, at, side="right"), 1, len(knots) - 1)
        heights = relative[right] + np.interp(at, knots, relative)
        inside = heights / 2 * ((knots[right] - at) / scale)
        return np.asarray(np.clip((later[right] + inside) / later[0], 0.0, 1.0), dtype=np.float64)

    @cached_property
    def _curve(self) -> tuple[FloatArray, FloatArray, FloatArray, float]:
        """(times, densities relative to the highest, the integral from each time on, the unit of its time).

        Relative, so that no given scale overflows. The integral is summed from the end, where small tails keep their
        digits.
        """
        knots, values = np.array(self.times), np.array(self.values)
        relative = values / values.max()
        scale = float(knots[-1] - knots[0])
        masses = (relative[1:] / 2 + relative[:-1] / 2) * (np.diff(knots) / scale)
        later = np.append(np.cumsum(masses[::-1])[::-1], 0.0)
        return knots, relative, later, scale


def first_fault(times: FloatArray, values: FloatArray) -> tuple[int, str] | None:
    """The index of the first invalid point and what is wrong with it; None if all are valid."""
    after_last = np.diff(times, prepend=-np.inf) > 0
    good = np.isfinite(times) & (times >= 0) & np.isfinite(values) & (values >= 0) & after_last
    if good.all():
        return None
    index = int(np.argmin(good))
    time, value = float(times[index]), float(values[index])
    if not (np.isfinite(time) and time >= 0):
        return index, f"time {time:,.12g}: must be 0 or later, and finite"
    if not (np.isfinite(value) and value >= 0):
        return index, f"density {value:g}: must be 0 or above, and finite"
    return index, f"time {time:,.12g} after {float(times[index - 1]):,.12g}: times must grow"
