"""The averages that other programs store: the rules of their decay, and the profiles that follow.
NumPy only, float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError, check_number
from posthoc_cli.profiles import Discrete, FloatArray

MOST_UPDATES = 20_000_000
"""Limit of the updates of one average: far more than a training makes, and few enough for memory.
"""

MOST_TIMES = 16_384
"""Limit of the times in a profile. If there are more updates, neighbours are joined, which moves
mass by < 1e-4 of training."""


def ema_pytorch_profile(
    gamma: float,
    step: int,
    every: int,
    first: int = 1,
) -> Discrete:
    """Compute the profile that `ema-pytorch` 0.8.3 and `pytorch-posthoc-ema` 1.0.10 store, on the
    step clock.

    They count calls from the first update, c = 1, 1 + every, ..., and keep (1 - 1 / (c +
    1))**(gamma + 1), whatever `every` is; at the first update, nothing. With every = 1 that is the
    power function of `gamma`, shifted by a step; with more it is close to the power function of the
    exponent (gamma + 1) / every - 1, a longer average. `first` is the step of the first update: 1,
    or `update_after_step` of the latter library.

    Raises:
        InvalidValueError: the step is before the first update, or makes more than `MOST_UPDATES`.
    """
    accepted = f"be at least {first}, the step of the first update"
    check_number("step", step, lambda number: number >= first, accepted)
    count = (step - first) // every + 1
    _check_updates(count, step)
    calls = np.arange(1.0, count) * every + 1
    share = 1 / (calls + 1)
    logs = (gamma + 1) * np.log1p(-share)
    backwards = np.cumsum(logs[::-1])
    later = -np.expm1(backwards[::-1])
    # the mass after each update, beginning before the first one
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
    usual: float | None = None  # its value without NUMBER, from the library that has the rule
    is_schedule: bool = False  # whether it leads to 1 at a step of the training, without `decay`
    others: tuple[float, ...] = ()  # the number's values in other libraries


WARM_UPS: dict[str, WarmUp] = {
    # LitEma, torch-ema and diffusers
    "ratio": WarmUp(_ratio, "the warm-up (1 + n) / (10 + n)"),
    # ema-pytorch, timm; diffusers with use_ema_warmup; a mean teacher's is min(1 - 1 / (n + 1), d)
    "power": WarmUp(
        _power,
        "the warm-up 1 - (1 + {n})^-{power:.3g}",
        "power",
        2 / 3,
        others=(0.75, 1.0),
    ),
    # EDM and StyleGAN
    "ramp-up": WarmUp(
        _ramp_up,
        "the ramp-up of its half-life to {power:g} of the training so far",
        "power",
        RAMP_UP,
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
    "": WarmUp(_constant, "a constant decay"),
    # after one copy it is equation 2 of arXiv 2312.02696, with power = gamma + 1
    POWER_FUNCTION: WarmUp(_power_function, "(n / (n + 1))^{power:.3g}", "power"),
}


@dataclass(frozen=True)
class DecayRule:
    """The decay of each update of an ordinary EMA: a row of `WARM_UPS`, and the row's numbers.

    The first update that is not a copy has n = 1; in a schedule the first one, copy or not.
    """

    # the constant decay, or the decay that a warm-up leads to; unused by a schedule
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
    # time by which the average may have begun again from the weights; 0 if it did not
    restart: float = 0.0

    def __post_init__(self) -> None:
        check_number("ema_decay", self.decay, lambda decay: 0 < decay < 1, "lie in (0, 1)")
        accepted = "be a fraction such as 0.03"
        check_number("ema_uncertainty", self.uncertainty, lambda part: 0 <= part < 1e9, accepted)

    @property
    def is_schedule(self) -> bool:
        return RULES[self.warm_up].is_schedule

    def with_number(self, number: float) -> DecayRule:
        """Set another number of the rule's row in `WARM_UPS`."""
        name = RULES[self.warm_up].number
        changes: dict[str, Any] = {name: number}
        return replace(self, **changes)

    def longer(self, factor: float) -> DecayRule:
        """Make the rule of an average that is longer by a factor at its end."""
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
        """Compute the share of a schedule that has passed before the n-th update."""
        updates = n - 1 + self.before
        return np.minimum(updates / self.steps, 1.0)

    def at(self, updates: FloatArray) -> FloatArray:
        """Compute the share of the previous average that updates keep, by their numbers from 1:
        shape of `updates`."""
        numbers = 1 + (updates - 1) * self.stride
        n = numbers
        if not self.is_schedule:
            n = np.maximum(numbers - self.copies, 0.0)
        by_rule = RULES[self.warm_up].decay(self, n)
        kept = np.maximum(by_rule, self.least)
        return np.where(numbers > self.copies, kept, 0.0)

    def kept_logs(self, updates: int) -> FloatArray:
        """Compute the logarithm of the share that updates 1 to k keep together, for k from 0 to
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
        """Compute the profile of the average at a step of the training, after so many updates, one
        in `every` steps.

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
        s = np.asarray(s, dtype=np.float64)
        intervals = (s - self._first) / self._every
        updates = np.floor(intervals) + 1  # up to each time
        done = np.clip(updates, 0, self._count).astype(np.intp)
        later = self._logs[-1] - self._logs[done]
        masses = -np.expm1(later)
        return np.where(s < self._start, 1.0, masses)

    @cached_property
    def doubted(self) -> OrdinaryEMA:
        """The average if it is not as it is said: its time constant is longer by its uncertainty,
        or it began again; itself without either."""
        rule = self.rule
        if not (rule.uncertainty or rule.restart):
            return self
        rule = replace(rule, uncertainty=0.0, restart=0.0).longer(1 + rule.uncertainty)
        first = self._first
        count = self._count
        if 0 < self.rule.restart <= self.t:
            passed = max(math.ceil((self.rule.restart - first) / self._every), 0)
            first += passed * self._every
            count = max(count - passed, 1)
        return OrdinaryEMA(rule, int(self.t), count, self._every, first)


def _group_ends(logs: FloatArray) -> npt.NDArray[np.bool_]:
    """Decide whether each update ends a group, from the logarithms of the share that is kept of the
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
