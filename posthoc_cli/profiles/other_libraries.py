"""The true profiles of other programs' averages: checkpoints, averages over known times, ordinary EMAs.

All of them have mass at points only, so that their densities are 0 everywhere and their tails fall in jumps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles.tracked import FloatArray

_SUM = 1e-6
"""Accepted difference between a sum of masses and 1; the masses are then scaled to sum to 1."""


@dataclass(frozen=True)
class Point:
    """The profile of the weights at time `t` > 0 themselves: an ordinary checkpoint."""

    t: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "t", float(self.t))

    @property
    def t_first(self) -> float:
        """The time at which averages begin: the first step on a step clock, not the first checkpoint."""
        return min(1.0, self.t)

    @property
    def jumps(self) -> FloatArray:
        """The times at which the profile has mass: shape [1]."""
        return np.array([self.t])

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Return 0: all mass is at one point."""
        return np.zeros(np.shape(s))

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`: 1 before `t`, 0 from `t` on."""
        return np.where(np.asarray(s, dtype=np.float64) < self.t, 1.0, 0.0)


class Discrete:
    """An average over weights at known times, sum_k masses_k theta(times_k), taken at time `t`.

    Attributes:
        times: at least one, in ascending order, above 0 and at most `t`.
        masses: at least 0, with sum 1: one for each of `times`.
        t: by default the last of `times`.
    """

    def __init__(
        self, times: Sequence[float] | FloatArray, masses: Sequence[float] | FloatArray, t: float = 0.0
    ) -> None:
        at, mass = np.array(times, dtype=np.float64), np.array(masses, dtype=np.float64)
        is_alike = at.ndim == 1 and at.shape == mass.shape and at.size > 0
        end = float(at[-1]) if is_alike and not t else float(t)
        if not (is_alike and np.all(np.diff(at, prepend=0.0) > 0) and at[-1] <= end < math.inf
                and np.all(mass >= 0) and abs(mass.sum() - 1) <= _SUM):  # fmt: skip
            reason = "must grow from above 0 up to t, each time with a mass, of sum 1"
            raise InvalidValueError("times and masses", reason)
        self.times, self.masses, self.t = at, mass / mass.sum(), end

    @property
    def t_first(self) -> float:
        """The time of the earliest weights in the average."""
        return float(self.times[0])

    @property
    def jumps(self) -> FloatArray:
        """The times at which the profile has mass."""
        return self.times

    def density(self, s: npt.ArrayLike) -> FloatArray:
        """Return 0: all mass is at points."""
        return np.zeros(np.shape(s))

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`."""
        return self._later[np.searchsorted(self.times, np.asarray(s, dtype=np.float64), side="right")]

    @cached_property
    def _later(self) -> FloatArray:
        """The mass from each of the times on, then 0; summed from the end, which keeps the digits of small tails."""
        later = np.append(np.cumsum(self.masses[::-1])[::-1], 0.0)
        later[0] = 1.0
        return later


# --- libraries of power functions -------------------------------------------------------------------
#
# `ema-pytorch` 0.8.3 and `pytorch-posthoc-ema` 1.0.10 count the calls of their update from 1. They update at the calls
# c = 1, 1 + m, 1 + 2 m, ... with m = `update_every`, and keep the share
#
#     beta = (1 - 1 / (c + 1))**(gamma + 1) = (c / (c + 1))**(gamma + 1)
#
# of the average, whatever m is. So the weights of update k have the mass (1 - beta_k) prod_(j > k) beta_j, and those of
# the first update the rest. With m = 1 that is the power function of `gamma`, shifted by a step; with larger m it is
# close to the power function of the exponent (gamma + 1) / m - 1, a longer average.
#
# torchtitan's `EMAOptimizersContainer` (main branch, 2026) updates at the steps `start_step` + k m with
# m = `update_every_n_steps`, and keeps 2**(-20 / max(k, 1)) of the average, unless its `half_life_fraction`, 0.05, is
# changed. Since k counts updates, that is close to the power function of the exponent 20 ln 2 - 1 for any m.

MOST_UPDATES = 20_000_000
"""Limit of the updates of one average: far more than a training makes, and few enough for memory."""

MOST_TIMES = 16_384
"""Limit of the times in a profile. Of more updates, neighbours are joined, which moves mass by < 1e-4 of training."""


def ema_pytorch_profile(gamma: float, step: int, update_every: int, started: int = 0) -> Discrete:
    """Return the profile that `ema-pytorch` stores in the file `<index>.<step>.pt`, on the training's step clock.

    Arguments:
        gamma: exponent of the power function that the user asked for.
        step: the number in the file's name, which counts the calls of `update`: at least 1.
        update_every: the library's setting, at least 1.
        started: steps of the training before the first call of `update`.

    Raises:
        InvalidValueError: a value is out of its range.
    """
    calls = _calls(1, step, update_every)
    return _product(calls + started, (gamma + 1) * np.log1p(-1 / (calls + 1)), update_every, step + started)


DEFAULT_UPDATE_AFTER_STEP = 100
"""The default of `pytorch-posthoc-ema`."""


def posthoc_ema_profile(
    gamma: float, step: int, update_every: int = 10, update_after_step: int = DEFAULT_UPDATE_AFTER_STEP
) -> Discrete:
    """Return the profile that `pytorch-posthoc-ema` stores at call `step` of `update_`, on the step clock.

    The first update is at call `update_after_step`; the defaults are the package's. Errors as in `ema_pytorch_profile`.
    """
    before = max(update_after_step, 1) - 1
    if step <= before:
        reason = f"must be at least update_after_step, {update_after_step}"
        raise InvalidValueError("step", reason, value=step)
    return ema_pytorch_profile(gamma, step - before, update_every, before)


def power_function_profile(gamma: float, step: int, update_every: int = 1, update_after_step: int = 0) -> Discrete:
    """Return the profile of an EMA whose n-th update keeps (1 - 1/n)^(gamma + 1), of Eq. 2 of arXiv 2312.02696.

    The first update is at the first multiple of `update_every` after `update_after_step`.

    Raises:
        InvalidValueError: the step is before it.
    """
    first = (update_after_step // update_every + 1) * update_every
    if step < first:
        raise InvalidValueError("step", f"must be at least {first}, that of the first update", value=step)
    calls = _calls(first, step, update_every)
    counts = np.maximum(np.arange(1.0, calls.size + 1), 2.0)  # the first update keeps nothing in any case
    return _product(calls, (gamma + 1) * np.log1p(-1 / counts), update_every, step)


TORCHTITAN_GAMMA = 20 * math.log(2) - 1


def torchtitan_profile(step: int, update_every: int = 1, start_step: int = 0) -> Discrete:
    """Return the profile of torchtitan's EMA at a step of the training; the defaults are torchtitan's.

    Raises:
        InvalidValueError: the step is before the first update.
    """
    first = start_step or update_every
    if step < first:
        raise InvalidValueError("step", f"must be at least {first}, that of the first update", value=step)
    calls = _calls(first, step, update_every)
    counts = np.maximum((calls - start_step) // update_every, 1)
    return _product(calls, -(TORCHTITAN_GAMMA + 1) / counts, update_every, step)


def _calls(first: int, last: int, interval: int) -> FloatArray:
    """Return first, first + interval, ... up to `last`."""
    if (last - first) // interval >= MOST_UPDATES:
        reason = f"makes more than {MOST_UPDATES:,} updates, one every {interval:,} steps"
        raise InvalidValueError("step", reason, value=f"{last:,}")
    return np.arange(float(first), last + 1, interval)


def _product(times: FloatArray, logs: FloatArray, interval: int, t: int) -> Discrete:
    """Return the average of updates at `times` that keep exp(logs) of the previous average, the first one nothing."""
    kept = np.append(np.cumsum(logs[:0:-1])[::-1], 0.0)
    after = -np.expm1(kept)  # mass after each update
    masses = -np.diff(after, prepend=1.0)
    size = -(-times.size // MOST_TIMES)
    groups = np.arange(0, times.size, size)
    joined = np.add.reduceat(masses, groups)
    # Each group lies at its mean time. Far before the end of a short average, masses are 0 in float64.
    later = np.add.reduceat(masses * (np.arange(times.size) % size), groups)
    means = times[groups] + interval * np.divide(later, joined, out=np.zeros(groups.size), where=joined > 1e-300)
    return Discrete(means, joined, t)


# --- ordinary EMAs: one decay, perhaps with a warm-up -----------------------------------------------

WARM_UPS = ("ratio", "power", "ramp-up")
POWER, RAMP_UP = 2 / 3, 0.05
"""The usual defaults of libraries, for `DecayRule.power` of the warm-ups "power" and "ramp-up"."""

_FINEST, _STEPS_FINEST = 128, 512
"""Number of times of an ordinary EMA in each of its time constants, and in each doubling of the steps."""

_FORGOTTEN = 30.0
"""Age in time constants from which on values are left out: their mass is below 1e-13."""

_COPY = -1e3
"""The number used as the logarithm of 0."""


@dataclass(frozen=True)
class DecayRule:
    """The decay of each update of an ordinary EMA.

    Attributes:
        decay: the constant decay; with a warm-up, its upper limit.
        warm_up: the decay of the n-th update up to that limit: "" for none, "ratio" for (1 + n) / (10 + n), "power" for
            1 - (1 + n / inv_gamma)**-power, or "ramp-up" for 2**(-1 / (power n)), a half-life that is a share of the
            training so far. The first update that is no copy has n = 1.
        copies: number of initial updates that copy the weights.
        stride: increment of n per update, for libraries that count calls.
        inv_gamma, power, least: parameters of the warm-up; `least` is a lower limit of the decay.
        uncertainty: relative, of the time constant 1 / (1 - decay), if the decay was estimated; 0 if it is known.
        late: steps by which the first update may be later, if its step was estimated; 0 if it is known.
    """

    decay: float
    warm_up: str = ""
    copies: int = 0
    stride: int = 1
    inv_gamma: float = 1.0
    power: float = POWER
    least: float = 0.0
    uncertainty: float = 0.0
    late: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.decay, float) and 0 < self.decay < 1):
            raise InvalidValueError("ema_decay", "must lie in (0, 1)", value=self.decay)
        if not (isinstance(self.uncertainty, float) and 0 <= self.uncertainty <= 3):
            raise InvalidValueError("ema_uncertainty", "must be a fraction such as 0.03", value=self.uncertainty)

    @property
    def rule(self) -> str:
        """The warm-up in words, for messages."""
        if self.warm_up == "ratio":
            return "the warm-up (1 + n) / (10 + n)"
        if self.warm_up == "ramp-up":
            return f"the ramp-up of its half-life to {self.power:g} of the training so far"
        scaled = "n" if self.inv_gamma == 1 else f"n / {self.inv_gamma:g}"
        return f"the warm-up 1 - (1 + {scaled})^-{self.power:.3g}"

    def at(self, updates: FloatArray) -> FloatArray:
        """Return the share of the previous average that updates keep, by their numbers from 1: shape of `updates`."""
        numbers = 1 + (updates - 1) * self.stride
        n = np.maximum(numbers - self.copies, 0.0)
        if self.warm_up == "ratio":
            kept = np.minimum((1 + n) / (10 + n), self.decay)
        elif self.warm_up == "power":
            kept = np.minimum(-np.expm1(-self.power * np.log1p(n / self.inv_gamma)), self.decay)
        elif self.warm_up == "ramp-up":
            kept = np.minimum(np.exp2(-1 / (self.power * np.maximum(n, 1))), self.decay)
        else:
            kept = np.full(n.size, self.decay)
        return np.where(numbers > self.copies, np.maximum(kept, self.least), 0.0)

    def kept_logs(self, updates: int) -> FloatArray:
        """Return the logarithm of the share that updates 1 to k keep together, for k from 0 to `updates`."""
        return _kept_logs(self, 1 << max(10, updates.bit_length()))[: updates + 1]

    def profile(self, step: int, updates: int, every: int = 1, first: int = 0) -> OrdinaryEMA:
        """Return the profile of the average at a step of the training.

        Arguments:
            step: the time of the average.
            updates: number of updates up to `step`.
            every: steps between updates.
            first: the step of the first update; 0 if updates are at the last multiples of `every`. The initial average
                is the weights one interval before the first update, at the earliest at time 0.5.
        """
        if updates > MOST_UPDATES:
            raise InvalidValueError("step", f"makes more than {MOST_UPDATES:,} updates", value=f"{step:,}")
        return OrdinaryEMA(self, step, updates, every, first or step // every * every - (updates - 1) * every)


@lru_cache(maxsize=4)
def _kept_logs(decay: DecayRule, most: int) -> FloatArray:
    with np.errstate(divide="ignore"):
        logs = np.log(decay.at(np.arange(1.0, most + 1)))
    return np.append(0.0, np.cumsum(np.maximum(logs, _COPY)))


class OrdinaryEMA(Discrete):
    """The profile of an ordinary EMA at a step, from the product of the decays of its updates.

    `times`, at which the intervals of a solver end, joins updates where that moves little mass, and leaves out those
    with negligible mass. Tails are exact at any time, so that the common part of two successive averages cancels.
    """

    def __init__(self, decay: DecayRule, step: int, updates: int, every: int, first: int) -> None:
        logs = self._logs = decay.kept_logs(updates)
        self._start = max(float(first - every), 0.5)
        self.settings: dict[str, Any] = vars(decay) | {"updates": updates, "every": every, "first": first}
        numbers = np.arange(1, updates + 1)
        # Groups depend on an update's number alone, so that averages at different times have the same groups.
        level = np.floor(np.maximum(np.cumsum(np.maximum(np.diff(logs), -1.0)), _COPY) * -_FINEST)
        size = np.exp2(np.maximum(np.floor(np.log2(numbers / _STEPS_FINEST)), 0))
        place = np.floor((numbers - 1) / size) * size
        is_end = np.append((np.diff(level) > 0) | (np.diff(place) > 0), np.ones(min(1, updates), bool))
        ends = numbers[is_end & (logs[1:] - logs[-1] < _FORGOTTEN)]
        times = np.append(self._start, first + every * (ends - 1.0))
        masses = np.diff(np.exp(logs[-1] - logs[np.append(0, ends)]), prepend=0.0)
        super().__init__(times, masses, step)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        """Return the mass after `s`."""
        at, logs = np.asarray(s, dtype=np.float64), self._logs
        done = np.floor((at - self.settings["first"]) / self.settings["every"]) + 1
        done = np.clip(done, 0, logs.size - 1).astype(np.intp)
        return np.where(at < self._start, 1.0, -np.expm1(logs[-1] - logs[done]))

    @classmethod
    def of(cls, step: int, updates: int, every: int, first: int, **decay: Any) -> OrdinaryEMA:
        """Return the average with these `settings`, plain values for JSON."""
        return cls(DecayRule(**decay), step, updates, every, first)

    @property
    def others(self) -> tuple[OrdinaryEMA, OrdinaryEMA]:
        """The averages with a longer time constant and a later start, by their uncertainties; itself for 0."""
        settings = self.settings | {"uncertainty": 0.0, "late": 0}
        longer, later = 1 + float(self.settings["uncertainty"]), self.settings["late"] // self.settings["every"]
        decay = {"decay": 1 - (1 - settings["decay"]) / longer}
        copies = {"copies": settings["copies"] + min(later, settings["updates"] - 1)}
        return (
            OrdinaryEMA.of(int(self.t), **settings | decay) if longer > 1 else self,
            OrdinaryEMA.of(int(self.t), **settings | copies) if later > 0 else self,
        )
