"""The settings of a tracker, and the clock of its calls: their number and the training time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from posthoc_cli.dtypes import parse_dtype
from posthoc_cli.errors import InvalidValueError, brief, check_count, warn
from posthoc_cli.planning import range_of
from posthoc_cli.profiles import check_sigma_rel
from posthoc_cli.snapshots.snapshot import EARLIEST, LATEST, Selection, TrackingSchedule

DEFAULT_UPDATE_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """The settings of a tracker; the arguments of `PostHocEMA.from_model`."""

    sigma_rels: tuple[float, ...]
    schedule: TrackingSchedule
    t_unit: str = "steps"
    selection: Selection = field(default_factory=Selection)

    @classmethod
    def checked(
        cls,
        sigma_rels: Sequence[float],
        update_every: int,
        checkpoint_every: int,
        update_after_step: int,
        max_checkpoints: int | None,
        checkpoint_dtype: torch.dtype | str | None,
        t_unit: str,
        selection: Selection,
    ) -> Settings:
        """Return the settings, with profiles in ascending order; an InvalidValueError names an
        unfit argument."""
        profiles = _checked_profiles(sigma_rels)
        every = check_count("update_every", update_every)
        snapshot_every = check_count("checkpoint_every", checkpoint_every)
        if snapshot_every % every and every == DEFAULT_UPDATE_EVERY:
            every = math.gcd(every, snapshot_every)
            warn(
                f"update_every is {every}, so that checkpoint_every {snapshot_every} is a "
                f"multiple of it"
            )
        if snapshot_every % every:
            reason = f"must be a multiple of update_every {every}"
            why = "so that a snapshot holds the average of its own time"
            raise InvalidValueError("checkpoint_every", f"{reason}, {why}", value=snapshot_every)
        if not isinstance(t_unit, str) or not t_unit or not t_unit.isprintable():
            reason = "must name what t counts, such as 'steps' or 'images'"
            raise InvalidValueError("t_unit", reason, value=repr(t_unit))
        most = None
        if max_checkpoints is not None:
            most = check_count("max_checkpoints", max_checkpoints)
        schedule = TrackingSchedule(
            every,
            snapshot_every,
            check_count("update_after_step", update_after_step, 0),
            most,
            parse_dtype(checkpoint_dtype, "checkpoint_dtype"),
            range_of(profiles),
        )
        return cls(profiles, schedule, t_unit, selection)

    def update_is_due(self, step: int) -> bool:
        return step > self.schedule.update_after_step and step % self.schedule.update_every == 0

    def snapshot_is_due(self, step: int) -> bool:
        return step % self.schedule.checkpoint_every == 0

    def first_update(self, step: int) -> str:
        """Return a sentence that says at which call, after `step` calls so far, the first update is
        due."""
        every = self.schedule.update_every
        after = self.schedule.update_after_step
        return f"the first update is at call {(max(after, step) // every + 1) * every:,} of update_"


def _checked_profiles(sigma_rels: Any) -> tuple[float, ...]:
    numbers: list[float] = []
    if isinstance(sigma_rels, Iterable) and not isinstance(sigma_rels, str):
        numbers = [check_sigma_rel(number) for number in sigma_rels]
    if not numbers or len(set(numbers)) < len(numbers):
        reason = "must be a sequence of different numbers, as (0.05, 0.28)"
        raise InvalidValueError("sigma_rels", reason, value=repr(sigma_rels))
    return tuple(sorted(numbers))


@dataclass(frozen=True)
class TrainingProgress:
    """The last call of a training: its number and its time on the run's clock; 0 before the
    first."""

    step: int = 0
    t: float = 0.0
    updated: int = 0  # the last call at which an update was due
    own_clock: bool | None = None  # whether the calls pass `t`; None while unknown

    @classmethod
    def resumed(
        cls,
        step: int,
        t: float,
        updated: int,
    ) -> TrainingProgress:
        """Return the progress of a resumed run; whether its calls pass `t` is unknown where time
        and step are equal."""
        return cls(step, t, updated, True if t != step else None)

    def after(self, t: float | None, settings: Settings) -> TrainingProgress:
        """Return the progress after one more call, with the caller's `t`, which must be later than
        the last one."""
        unit = settings.t_unit
        step = self.step + 1
        if self.own_clock not in (None, t is not None):
            passed = "passed" if self.own_clock else "did not pass"
            reason = f"earlier calls of update_ in this run {passed} t"
            raise InvalidValueError("t", reason, "pass it at every call or at none")
        if t is None and unit != "steps":
            hint = "pass t= at every call of update_"
            raise InvalidValueError("t", f"this run counts {unit}", hint)
        given = step if t is None else t
        time = _number(given)
        if not EARLIEST <= time <= LATEST or time <= self.t:
            reason = (
                f"must lie between {EARLIEST:g} and {LATEST:g}, and be larger than at the last "
                f"call, {self.t:,.12g} {unit}"
            )
            raise InvalidValueError("t", reason, value=brief(given))
        updated = step if settings.update_is_due(step) else self.updated
        return TrainingProgress(step, time, updated, t is not None)


def _number(t: Any) -> float:
    """Return a time as a float; nan if it is not a number."""
    if isinstance(t, str):
        return math.nan
    try:
        return float(t)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan
