"""Averaging profiles: how much each moment of training counts in an average. NumPy only, float64.

Training time `s` starts at 0 on the run's clock, in any unit. An average at time `t` is sum_k w_k
theta_k over the weights of the network after each step. Its profile is its `tail`: tail(s) is the
mass at times after s, 1 before the start and 0 from `t` on. The weights of step k have the mass
tail(step k-1) - tail(step k). A tail is also what multiplies updates: sum_k w_k theta_k = theta_0 +
sum_k tail(step k-1) (theta_k - theta_k-1).

Below: the power function, which runs track; averages over known times, which other programs store;
and how updates are folded into tracked averages. `targets` has the profiles that a user may ask
for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError, abbreviate, check_number

FloatArray = npt.NDArray[np.float64]


def _floats(values: npt.ArrayLike) -> FloatArray:
    return np.asarray(values, dtype=np.float64)


class Profile(Protocol):
    """The mass of an average, 1 in total, over times on the run's clock."""

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass at times after `s`, any shape: 1 before the start, 0 from the end on,
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
    """Return the mass of each profile after each of the times: shape [times, profiles]."""
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


def check_sigma_rel(sigma_rel: float, name: str = "sigma_rel") -> float:
    """Return `sigma_rel` as a float; raise an InvalidValueError about `name` if it is out of
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


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """Return the exponent of the profile with width `sigma_rel`, gamma + 1 to about 1e-15
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
    """Return the width of the profile with exponent `gamma` > 0, as a fraction of training time."""
    if not (gamma > 0 and math.isfinite(gamma)):
        reason = "must be above 0, the uniform average, and finite"
        raise InvalidValueError("gamma", reason, value=f"{gamma:g}")
    ratio = (gamma + 1) / (gamma + 3)
    return math.sqrt(ratio) / (gamma + 2)


def sigma_rel_from_decay(decay: float, steps: float) -> float | None:
    """Return the width of the power function that is as long, after so many steps, as an ordinary
    EMA of this decay in (0, 1): their mean ages are equal.

    An ordinary EMA has the mean age -1 / ln(decay), about 1 / (1 - decay), in steps; a power
    function steps / (gamma + 2). None of an EMA that is longer than the uniform average.
    """
    gamma = -steps * math.log(decay) - 2
    return sigma_rel_from_gamma(gamma) if gamma > 0 else None


def decay_from_sigma_rel(sigma_rel: float, steps: float) -> float:
    """Return the decay of the ordinary EMA that is as long as a power function: the inverse of
    `sigma_rel_from_decay`."""
    return math.exp(-(gamma_from_sigma_rel(sigma_rel) + 2) / steps)


def new_value_share(gamma: float, t_prev: float, t: float) -> float:
    """Return 1 - beta, the share of the new value in an update at time `t`; at the first one
    `t_prev` is 0.

    beta = (t_prev / t)**(gamma + 1) with the *true* interval since the last update (equation 127).
    A chain of such updates gives each value the power function's mass on the interval before it.
    """
    if t_prev == 0:
        return 1.0
    passed = (t - t_prev) / t
    if passed == 1:  # beta, below 1e-16, is lost in rounding
        return 1.0
    log_beta = (gamma + 1) * math.log1p(-passed)
    return -math.expm1(log_beta)


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
        """Return the mass per unit of time at `s`; 0 outside (0, t]."""
        relative = _floats(s) / self.t
        inside = (relative > 0) & (relative <= 1)
        relative = np.where(inside, relative, 1.0)
        powers = np.power(relative, self.gamma)
        of_average = np.where(inside, powers, 0.0)
        return of_average * (self.gamma + 1) / self.t

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`: 1 - (s/t)**(gamma + 1) within (0, t]."""
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
        """Return the mass after `s`: 1 before `t`, 0 from `t` on."""
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


MOST_UPDATES = 20_000_000
"""Limit of the updates of one average: far more than a training makes, and few enough for memory.
"""

MOST_TIMES = 16_384
"""Limit of the times in a profile. Of more updates, neighbours are joined, which moves mass by <
1e-4 of training."""


def ema_pytorch_profile(
    gamma: float,
    step: int,
    every: int,
    first: int = 1,
) -> Discrete:
    """Return the profile that `ema-pytorch` 0.8.3 and `pytorch-posthoc-ema` 1.0.10 store, on the
    step clock.

    They count calls from the first update, c = 1, 1 + every, ..., and keep (1 - 1 / (c +
    1))**(gamma + 1), whatever `every` is; at the first update, nothing. With every = 1 that is the
    power function of `gamma`, shifted by a step; with more it is close to that of the exponent
    (gamma + 1) / every - 1, a longer average. `first` is the step of the first update: 1, or
    `update_after_step` of the latter library.

    Raises:
        InvalidValueError: the step is before the first update, or makes more than `MOST_UPDATES`.
    """
    accepted = f"be at least {first}, that of the first update"
    check_number("step", step, lambda number: number >= first, accepted)
    count = (step - first) // every + 1
    _check_updates(count, step)
    calls = np.arange(1.0, count) * every + 1
    share = 1 / (calls + 1)
    logs = (gamma + 1) * np.log1p(-share)
    backwards = np.cumsum(logs[::-1])
    later = -np.expm1(backwards[::-1])
    # the mass after each update, from that before the first one
    after = np.concatenate(([1.0], later, [0.0]))
    numbers, masses = _join(-np.diff(after))
    return Discrete(first + every * numbers, masses, step)


def _join(masses: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Join neighbours, so that at most `MOST_TIMES` are left; return their mean numbers, from 0,
    and their masses."""
    size = -(-masses.size // MOST_TIMES)  # of a group
    begins = np.arange(0, masses.size, size)
    sums = np.add.reduceat(masses, begins)
    numbers = np.arange(masses.size) % size
    moments = np.add.reduceat(masses * numbers, begins)
    # Far before the end of a short average, masses are 0 in float64.
    means = np.zeros(begins.size)
    np.divide(moments, sums, out=means, where=sums > 1e-300)
    return begins + means, sums


# --- ordinary EMAs: one decay, perhaps with a warm-up


def _check_updates(count: int, step: int) -> None:
    if count > MOST_UPDATES:
        reason = f"makes more than {MOST_UPDATES:,} updates"
        raise InvalidValueError("step", reason, value=f"{step:,}")


POWER_FUNCTION = "power function"
UNLIMITED = 0.5**1e-9  # the decay of a rule without an upper limit
RAMP_UP = 0.05  # the usual `DecayRule.power` of the warm-up "ramp-up"

_FINEST = 128
_STEPS_FINEST = 512
"""Number of times of an ordinary EMA in each of its time constants, and in each doubling of the
steps."""

_FORGOTTEN = 30.0
_COPY = -1e3
"""Age in time constants from which on values are left out (mass below 1e-13), and the number used
as log(0)."""


def _constant(rule: DecayRule, n: FloatArray) -> FloatArray:
    return np.full(n.shape, rule.decay)


def _ratio(rule: DecayRule, n: FloatArray) -> FloatArray:
    ratio = (1 + n) / (10 + n)
    return np.minimum(ratio, rule.decay)


def _power(rule: DecayRule, n: FloatArray) -> FloatArray:
    logs = np.log1p(n / rule.inv_gamma)
    rising = -np.expm1(-rule.power * logs)
    return np.minimum(rising, rule.decay)


def _ramp_up(rule: DecayRule, n: FloatArray) -> FloatArray:
    half_life = rule.power * np.maximum(n, 1)
    rising = np.exp2(-1 / half_life)
    return np.minimum(rising, rule.decay)


def _power_function(rule: DecayRule, n: FloatArray) -> FloatArray:
    ratio = n / (n + 1)
    return np.asarray(ratio**rule.power)


def _exponential(rule: DecayRule, n: FloatArray) -> FloatArray:
    return -rule.decay * np.expm1(-n / rule.tau)


def _unbiased(rule: DecayRule, n: FloatArray) -> FloatArray:
    # 1 - d^n without cancellation; its quotient is exactly 1 for the first update
    logs = np.maximum(n, 1) * np.log(rule.decay)
    lost = -np.expm1(logs)
    kept = 1 - (1 - rule.decay) / lost
    return np.where(n > 1, kept, 0.0)


def _cosine(rule: DecayRule, n: FloatArray) -> FloatArray:
    # (1 + cos x) / 2 = cos^2(x / 2), which keeps the digits near the end
    angle = np.pi / 2 * rule.progress(n)
    return 1 - (1 - rule.base) * np.cos(angle) ** 2


def _linear(rule: DecayRule, n: FloatArray) -> FloatArray:
    left = 1 - rule.progress(n)
    return 1 - (1 - rule.base) * left


@dataclass(frozen=True)
class WarmUp:
    """A rule by which the decay of an ordinary EMA's updates rises."""

    decay: Callable[[DecayRule, FloatArray], FloatArray]  # of the n-th update, n from 1
    formula: str  # for messages; fields of the rule in braces
    number: str = ""  # the field of `DecayRule` that NUMBER sets in an option NAME:NUMBER
    usual: float | None = None  # its value without NUMBER: that of the library it comes from
    is_schedule: bool = False  # whether it leads to 1 at a step of the training, without `decay`
    others: tuple[float, ...] = ()  # the number's values in other libraries
    is_common: bool = False  # whether many libraries have it


WARM_UPS: dict[str, WarmUp] = {
    # LitEma, torch-ema and diffusers
    "ratio": WarmUp(_ratio, "the warm-up (1 + n) / (10 + n)", is_common=True),
    # ema-pytorch, timm; diffusers with use_ema_warmup; a mean teacher's is min(1 - 1 / (n + 1), d)
    "power": WarmUp(
        _power,
        "the warm-up 1 - (1 + {n})^-{power:.3g}",
        "power",
        2 / 3,
        others=(0.75, 1.0),
        is_common=True,
    ),
    # EDM and StyleGAN
    "ramp-up": WarmUp(
        _ramp_up,
        "the ramp-up of its half-life to {power:g} of the training so far",
        "power",
        RAMP_UP,
        is_common=True,
    ),
    # ultralytics, yolov5
    "exp": WarmUp(_exponential, "the warm-up d (1 - exp(-n / {tau:g}))", "tau", 2000.0),
    # audiocraft, demucs: the mean of all weights so far, with weights d^age
    "unbiased": WarmUp(_unbiased, "the warm-up 1 - (1 - d) / (1 - d^n)"),
    # BYOL, DINO and MoCo v3, whose k = 0 is the first update: 1 is the decay after the last one
    "cosine": WarmUp(
        _cosine, "a cosine from {base:.7g} to 1 in {steps:,.12g} updates", "base", 0.996, True
    ),
    # I-JEPA, V-JEPA
    "linear": WarmUp(
        _linear, "a line from {base:.7g} to 1 in {steps:,.12g} updates", "base", 0.996, True
    ),
}
"""The rules that have a name in options and settings; `RULES` has two more."""

RULES = WARM_UPS | {
    "": WarmUp(_constant, "a constant decay", is_common=True),
    # after one copy it is equation 2 of arXiv 2312.02696, with power = gamma + 1
    POWER_FUNCTION: WarmUp(_power_function, "(n / (n + 1))^{power:.3g}", "power"),
}


@dataclass(frozen=True)
class DecayRule:
    """The decay of each update of an ordinary EMA: a row of `WARM_UPS`, and the row's numbers.

    The first update that is not a copy has n = 1; in a schedule the first one, copy or not.
    """

    # the constant decay, or the one that a warm-up leads to; unused by a schedule
    decay: float = UNLIMITED
    warm_up: str = ""  # "" for none, a name in `WARM_UPS`, or `POWER_FUNCTION`
    copies: int = 0  # number of initial updates that copy the weights
    stride: int = 1  # increment of n per update, for libraries that count calls
    inv_gamma: float = 1.0  # of "power": n counts 1 / inv_gamma times
    power: float = 2 / 3  # of "power", "ramp-up" and `POWER_FUNCTION`
    tau: float = 2000.0  # of "exp"
    base: float = 0.996  # of a schedule: the decay of the training's first update
    steps: float = math.inf  # of a schedule: number of updates until the decay is 1
    before: int = 0  # of a schedule: updates that the training could have made before the first one
    least: float = 0.0  # lower limit of the decay
    # relative, of the time constant 1 / (1 - decay), if the decay was estimated
    uncertainty: float = 0.0

    def __post_init__(self) -> None:
        check_number("ema_decay", self.decay, lambda decay: 0 < decay < 1, "lie in (0, 1)")
        accepted = "be a fraction such as 0.03"
        check_number("ema_uncertainty", self.uncertainty, lambda part: 0 <= part <= 3, accepted)

    @property
    def is_schedule(self) -> bool:
        return RULES[self.warm_up].is_schedule

    @property
    def begins_as_mean(self) -> bool:
        """Whether an average begins as the mean of all weights: with each update, one more
        counts."""
        updates = np.array([2.0, 3.0])
        earlier, later = 1 / (1 - self.at(updates))
        return bool(np.isclose(later - earlier, 1))

    def with_number(self, number: float) -> DecayRule:
        """Return the rule with another number of its row in `WARM_UPS`."""
        name = RULES[self.warm_up].number
        changes: dict[str, Any] = {name: number}
        return replace(self, **changes)

    def longer(self, factor: float) -> DecayRule:
        """Return the rule of an average that is longer by a factor at its end."""
        if self.is_schedule:
            share = (1 - self.base) / factor
            return replace(self, base=1 - share)
        if self.warm_up == POWER_FUNCTION:
            return replace(self, power=self.power / factor)
        if self.warm_up == "ramp-up" and self.decay == UNLIMITED:
            return replace(self, power=self.power * factor)
        share = (1 - self.decay) / factor
        return replace(self, decay=1 - share)

    @property
    def rule(self) -> str:
        """The warm-up in words, for messages."""
        n = "n" if self.inv_gamma == 1 else f"n / {self.inv_gamma:g}"
        formula = RULES[self.warm_up].formula
        return formula.format(n=n, **vars(self))

    def progress(self, n: FloatArray) -> FloatArray:
        """Return the share of a schedule that has passed before the n-th update."""
        updates = n - 1 + self.before
        return np.minimum(updates / self.steps, 1.0)

    def at(self, updates: FloatArray) -> FloatArray:
        """Return the share of the previous average that updates keep, by their numbers from 1:
        shape of `updates`."""
        numbers = 1 + (updates - 1) * self.stride
        n = numbers
        if not self.is_schedule:
            n = np.maximum(numbers - self.copies, 0.0)
        by_rule = RULES[self.warm_up].decay(self, n)
        kept = np.maximum(by_rule, self.least)
        return np.where(numbers > self.copies, kept, 0.0)

    def kept_logs(self, updates: int) -> FloatArray:
        """Return the logarithm of the share that updates 1 to k keep together, for k from 0 to
        `updates`."""
        digits = max(10, updates.bit_length())
        logs = _kept_logs(self, 1 << digits)
        return logs[: updates + 1]

    def profile(
        self,
        step: int,
        updates: int,
        every: int = 1,
        first: int = 0,
    ) -> OrdinaryEMA:
        """Return the profile of the average at a step of the training, after so many updates, one
        `every` steps.

        `first` is the step of the first update; 0 if updates are at the last multiples of `every`.
        The initial average is the weights one interval before the first update, at the earliest at
        time 0.5.
        """
        _check_updates(updates, step)
        if not first:
            last = step // every * every
            first = last - (updates - 1) * every
        return OrdinaryEMA(self, step, updates, every, first)


@lru_cache(maxsize=4)
def _kept_logs(decay: DecayRule, most: int) -> FloatArray:
    kept = decay.at(np.arange(1.0, most + 1))
    with np.errstate(divide="ignore"):
        logs = np.log(kept)
    bounded = np.maximum(logs, _COPY)
    return np.append(0.0, np.cumsum(bounded))


class OrdinaryEMA(Discrete):
    """The profile of an ordinary EMA at a step, from the product of the decays of its updates.

    `times`, at which a solver's intervals end, joins updates where that moves little mass, and
    leaves out negligible ones. Tails are exact at any time, so that the common part of two
    successive averages cancels.
    """

    def __init__(
        self,
        decay: DecayRule,
        step: int,
        updates: int,
        every: int,
        first: int,
    ) -> None:
        self.rule = decay
        self._count = updates
        self._every = every
        self._first = first
        self.settings: dict[str, Any] = vars(decay) | {
            "updates": updates,
            "every": every,
            "first": first,
        }
        self._start = max(float(first - every), 0.5)
        logs = decay.kept_logs(updates)
        self._logs = logs
        is_remembered = logs[1:] - logs[-1] < _FORGOTTEN
        ends = 1 + np.flatnonzero(_group_ends(logs) & is_remembered)
        later = first + every * (ends - 1.0)
        times = np.append(self._start, later)
        before = logs[np.append(0, ends)]
        kept = np.exp(logs[-1] - before)
        masses = np.diff(kept, prepend=0.0)
        super().__init__(times, masses, step)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        s = _floats(s)
        intervals = (s - self._first) / self._every
        updates = np.floor(intervals) + 1  # up to each time
        done = np.clip(updates, 0, self._count).astype(np.intp)
        later = self._logs[-1] - self._logs[done]
        masses = -np.expm1(later)
        return np.where(s < self._start, 1.0, masses)

    @cached_property
    def longer(self) -> OrdinaryEMA:
        """The average whose time constant is longer by its uncertainty; itself for 0."""
        if not self.rule.uncertainty:
            return self
        rule = replace(self.rule, uncertainty=0.0).longer(1 + self.rule.uncertainty)
        return OrdinaryEMA(rule, int(self.t), self._count, self._every, self._first)


def _group_ends(logs: FloatArray) -> npt.NDArray[np.bool_]:
    """Return whether each update ends a group, from the logarithms of the share that is kept of the
    average before it, as `kept_logs`: shape [updates].

    Groups depend on an update's number alone, so that averages at different times have the same
    groups.
    """
    numbers = np.arange(1, logs.size)
    falls = np.maximum(np.diff(logs), -1.0)
    fallen = np.maximum(np.cumsum(falls), _COPY)
    level = np.floor(fallen * -_FINEST)
    doublings = np.log2(numbers / _STEPS_FINEST)
    octave = np.maximum(np.floor(doublings), 0)
    size = np.exp2(octave)
    groups = np.floor((numbers - 1) / size)
    has_fallen = np.diff(level) > 0
    has_next = np.diff(groups * size) > 0
    # also the last update
    return np.append(has_fallen | has_next, [True])


# --- folding updates into tracked averages

WINDOW = 104
LONGEST_OWN = 1 / 8
"""Limits of the updates in a mean, and of the time that a mean of one profile covers, relative to
all of training so far. Longer means round the average less often, but lag further behind a steady
drift (measured after 1,000,000 updates, with 256: noise 9.6e-7, drift 3.1e-6; with 104: 1.3e-6 and
1.4e-6)."""

LONGEST = 1 / 1000
UNEVEN = 1 / 60
"""Limits of the time that a mean that profiles share may cover with more than two values, relative
to all of training so far, and of the relative difference between the profiles in their weights
within it."""


def _reach(gammas: Sequence[float]) -> float:
    """Return the time that a mean of more than two values may cover for these profiles, relative to
    `t`."""
    spread = max(gammas) - min(gammas)
    return min(LONGEST, UNEVEN / spread) if spread else LONGEST


def window_ends(
    gammas: Sequence[float],
    window: int,
    begin: float,
    t: float,
    shared: bool,
) -> bool:
    """Return whether the means of the last `window` values, after `begin`, are folded into the
    averages at time `t`.

    The first update is always folded. A mean that profiles share is exact for two values, however
    far they are apart.
    """
    covered = t - begin
    if window >= WINDOW or covered >= LONGEST_OWN * t:
        return True
    if not shared or window <= 1:
        return False
    return covered > _reach(gammas) * t


def may_share_mean(window: int, begin: float, t: float) -> bool:
    """Return whether all profiles may share a mean of `WINDOW` updates, each as long as these in
    (begin, t]."""
    return (t - begin) * WINDOW <= LONGEST * t * window


def sketched_window_ends(
    gammas: Sequence[float],
    begin: float,
    before: float,
    t: float,
) -> bool:
    """Return whether, where profiles have their own means, the sketch's window after `begin` ends
    at `t`.

    `before` is the time of the last update. A window is as long as a shared mean; where that would
    contain two values, each value has a window.
    """
    covered = t - begin
    if begin == before:
        covered *= 2
    return covered > _reach(gammas) * t
