"""Profiles other than the power function: classical and uniform averages, decays, and a check of users' profiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError, check_number
from posthoc_cli.profiles.tracked import Clock, FloatArray, Profile, gamma_from_sigma_rel, sigma_rel_from_gamma


@dataclass(frozen=True)
class ClassicalEMA:
    """The average x <- beta x + (1 - beta) theta of every step, at time `t`.

    With n(s) the step at time `s`, the mass after `s` is 1 - beta**(n(t) - n(s)). The rest, beta**(n(t) - n(start)),
    lies on the value at time `start`, with which the average was initialised.

    Attributes:
        beta: decay of one step, in (0, 1).
        t: the average's time, above 0.
        clock: the run's steps over time.
        start: time of the initial value, in [0, t].
    """

    beta: float
    t: float
    clock: Clock
    start: float = 0.0

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass per unit of time at `s` in (start, t]; the mass at `start` itself is left out."""
        times = np.asarray(s, dtype=np.float64)
        kept = np.exp(self._log_kept(times)) * -math.log(self.beta) * self.clock.steps_per_time(times)
        return np.where((times > self.start) & (times <= self.t), kept, 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`: 1 before `start`, 0 from `t` on."""
        times = np.asarray(s, dtype=np.float64)
        return np.where(times < self.start, 1.0, -np.expm1(self._log_kept(times)))

    def _log_kept(self, s: npt.ArrayLike) -> FloatArray:
        """Return log(beta**(n(t) - n(s))), 0 from `t` on: the logarithm keeps the digits of a beta near 1."""
        later_steps = self.clock.step_at(self.t) - self.clock.step_at(s)
        return np.asarray(math.log(self.beta) * np.maximum(later_steps, 0.0))


def mean_age(gamma: float, steps: int) -> float:
    """Return the mean age, in steps, of the values in a power-function average updated at every step 1 .. `steps`.

    It is sum_k w_k (T - k) with the discrete weights w, by partial summation sum_{j=1}^{T-1} (j/T)**(gamma+1).
    """
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
    """Return the constant decay beta whose mean age beta / (1 - beta) is the power function's after `steps` steps."""
    age = mean_age(gamma_from_sigma_rel(sigma_rel), steps)
    return age / (1 + age)


def sigma_rel_from_classical_beta(beta: float, steps: int) -> float:
    """Return the inverse of `classical_beta`; beta is below the uniform average's, 1 - 2 / (steps + 1)."""
    longest = 1 - 2 / (steps + 1)
    if not 0 < beta < longest:
        reason = f"after {steps:,} steps beta must lie in (0, {longest:.7g}), below the mean age of the uniform average"
        raise InvalidValueError("betas", reason, value=f"{beta!r}")
    from scipy.optimize import brentq  # slow to import

    age = beta / (1 - beta)
    # The mean age falls from (T-1)/2 at x = 1 roughly as T/(x+1), and for huge x as exp(-x/T).
    largest = steps * (2 + max(0.0, -math.log(age))) * 2

    def excess(log_x: float) -> float:
        return mean_age(math.expm1(log_x), steps) - age

    return sigma_rel_from_gamma(math.expm1(brentq(excess, 0.0, math.log(largest), xtol=1e-15, rtol=1e-14)))


@dataclass(frozen=True)
class Conversion:
    """A power function, and the classical EMA with the same mean age after a number of steps.

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
        """Return the attributes for JSON."""
        return asdict(self)


def convert(steps: int, sigma_rels: Sequence[float] = (), betas: Sequence[float] = ()) -> list[Conversion]:
    """Return the power functions with these widths, then those with the mean ages of these classical decays.

    Raises:
        InvalidValueError: `steps` is not from 1 to 1e15, or a width or a decay is out of its range.
    """
    check_number("steps", steps, lambda count: 1 <= count <= 10**15, "be from 1 to 1e15")
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

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass per unit of time at `s`."""
        times = np.asarray(s, dtype=np.float64)
        return np.where((times > self.start) & (times <= self.end), 1 / (self.end - self.start), 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`: (end - s) / (end - start) between the two."""
        times = np.asarray(s, dtype=np.float64)
        return np.clip((self.end - times) / (self.end - self.start), 0.0, 1.0)


@dataclass(frozen=True)
class StepWindow:
    """The mean of the last `steps` steps up to time `t`, 1 / steps each; the run has at least that many up to `t`.

    With n(s) the step at time `s`, the mass after `s` is (n(t) - n(s)) / steps.
    """

    steps: int
    t: float
    clock: Clock

    def __post_init__(self) -> None:
        count = float(self.clock.step_at(self.t))
        if self.steps > count:
            reason = f"the run has {math.floor(count):,} steps up to t = {self.t:,.12g}; must be at most that"
            raise InvalidValueError("target", reason, value=f"window:{self.steps}")

    @property
    def start(self) -> float:
        """The time of the step before the window."""
        return float(self.clock.time_at(self.clock.step_at(self.t) - self.steps))

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass per unit of time at `s`: steps per unit of time, divided by `steps`, on (start, t]."""
        times = np.asarray(s, dtype=np.float64)
        inside = (times > self.start) & (times <= self.t)
        return np.where(inside, self.clock.steps_per_time(times) / self.steps, 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`: (n(t) - n(s)) / steps, limited to [0, 1]."""
        return np.clip((self.clock.step_at(self.t) - self.clock.step_at(s)) / self.steps, 0.0, 1.0)


_SLACK = 1e-9
"""Accepted rounding error of a tail."""

SHAPES: dict[str, Callable[[FloatArray], FloatArray]] = {
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
}
"""The multiplier d(x) at the fraction x of a decay, from 1 down to 0."""

_STEP = 1e-6
"""Half the width of the difference quotient for the density, as a fraction of the decay."""


@dataclass(frozen=True)
class EmulatedDecay:
    """The average that emulates a decay of the learning rate from time `start` to `end` (0 <= start < end).

    The weights are theta(0) plus a sum of updates. An average with the mass tail(s) after s multiplies the update at
    time s by tail(s). So an average with tail(s) = d((s - start) / (end - start)) equals the weights of a run whose
    learning rate is multiplied by d from `start` on, if the updates themselves are otherwise the same. As a combination
    of checkpoints, sum_j c_j theta_j, it has the sums w_i = sum_(j >= i) c_j, the multiplier of the updates up to
    theta_i (WSM, arXiv 2507.17634, for evenly spaced checkpoints).

    Attributes:
        start, end: times on the run's clock.
        shape: one of `SHAPES`.
    """

    start: float
    end: float
    shape: str

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass per unit of time at `s`."""
        times, width = np.asarray(s, dtype=np.float64), self.end - self.start
        last = self.end - _STEP * width
        a, b = (np.clip(times + sign * _STEP * width, self.start, last) for sign in (-1, 1))
        inside = (times > self.start) & (times <= self.end) & (b > a)
        return np.where(inside, (self.tail(a) - self.tail(b)) / np.where(inside, b - a, 1.0), 0.0)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`: 1 up to `start`, 0 from `end` on."""
        times = np.asarray(s, dtype=np.float64)
        x = np.clip((times - self.start) / (self.end - self.start), 0.0, 1.0)
        values = SHAPES[self.shape](x)
        return np.where(times < self.start, 1.0, np.where(times >= self.end, 0.0, values))


# --- profiles from users


def try_profile(profile: Profile, t: float, title: str) -> None:
    """Check a profile at about 1,200 times from before the run to after `t`, which are denser near 0 and `t`.

    Both functions must take arrays and return finite values of the same shape; the density must not be below 0; the
    tail must lie in [0, 1], be 1 before 0 and 0 from `t` on, and never grow. Mass at time 0 is allowed. Whether the
    density is the slope of the tail is not checked.

    Raises:
        InvalidValueError: with `title` as its subject.
    """
    # Evenly spaced times, and times that approach both ends.
    near = np.geomspace(1e-9, 1e-3, 61)
    inside = np.unique(np.concatenate((np.arange(1, 1025) / 1024, near, 1 - near))) * t
    density = _values(profile, "density", inside, title)
    _check(title, "density", inside, density, density < 0, "must not be below 0")
    times = np.concatenate(([-t, -1e-6 * t, 0.0], inside, [1.5 * t]))
    tail = _values(profile, "tail", times, title)
    least, most = np.where(times < 0, 1.0, 0.0), np.where(times >= t, 0.0, 1.0)
    accepted = f"must lie in [0, 1], be 1 before 0, and 0 from t = {t:,.12g} on"
    _check(title, "tail", times, tail, (tail < least - _SLACK) | (tail > most + _SLACK), accepted)
    _check(title, "tail", times[1:], tail[1:], np.diff(tail) > _SLACK, "must never grow")


def _check(
    title: str, name: str, times: FloatArray, values: FloatArray, is_wrong: npt.NDArray[np.bool_], accepted: str
) -> None:
    """Raise an InvalidValueError that names the first time at which a function's value is wrong."""
    if is_wrong.any():
        first = is_wrong.argmax()
        raise InvalidValueError(title, f"{name} is {values[first]:.6g} at s = {times[first]:,.12g}; {accepted}")


def _values(profile: Profile, name: str, times: FloatArray, title: str) -> FloatArray:
    """Return a function's values at the times; raise an InvalidValueError unless they are finite and in their shape."""
    try:
        result = np.asarray(getattr(profile, name)(times), dtype=np.float64)
    except (TypeError, ValueError, ArithmeticError) as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        reason = f"{name} fails for an array of times: {cause}; must take any shape"
        raise InvalidValueError(title, reason) from error
    if result.shape != times.shape:
        reason = f"{name} of times of shape {times.shape} has shape {result.shape}; must have the same"
        raise InvalidValueError(title, reason)
    _check(title, name, times, result, ~np.isfinite(result), "must be finite")
    return result
