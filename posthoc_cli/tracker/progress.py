"""How far a training is: the number of its calls of `update_`, and the training time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from posthoc_cli.errors import InvalidValueError, abbreviate
from posthoc_cli.snapshots.snapshot import EARLIEST, LATEST, START, Moment
from posthoc_cli.tracker.arguments import Settings


@dataclass(frozen=True)
class TrainingProgress:
    """The last call of a training; all is 0 before the first."""

    last: Moment = START
    updated: int = 0  # the step of the last call at which an update was due
    own_clock: bool | None = None  # whether the calls pass `t`; None while unknown

    @classmethod
    def resume(cls, last: Moment, updated: int) -> TrainingProgress:
        """Make the progress of a resumed run; whether its calls pass `t` is unknown where time and
        step are equal."""
        return cls(last, updated, True if last.t != last.step else None)

    @property
    def step(self) -> int:
        return self.last.step

    @property
    def t(self) -> float:
        return self.last.t

    def is_after(self, other: TrainingProgress) -> bool:
        """Return whether more calls are counted, or as many and the last one as an update, too."""
        return (self.step, self.updated) > (other.step, other.updated)

    def after(self, t: float | None, settings: Settings) -> TrainingProgress:
        """Count one more call, with the caller's `t`, which must be later than the last one."""
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
            raise InvalidValueError("t", reason, value=abbreviate(given))
        updated = step if settings.update_is_due(step) else self.updated
        return TrainingProgress(Moment(step, time), updated, t is not None)


def _number(t: Any) -> float:
    """Convert a time to a float; nan if it is not a number."""
    if isinstance(t, str):
        return math.nan
    try:
        return float(t)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan
