"""How an ordinary EMA was updated, and the profile that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from posthoc_cli.checkpoints.settings import Arguments, ImportSettings
from posthoc_cli.decay_rules import RULES, UNLIMITED, DecayRule, OrdinaryEMA
from posthoc_cli.errors import InvalidValueError

_ANY_DECAY = 0.999  # in place of an unknown decay

Calls = Literal["multiples", "from first", "counted", "after copy"]
"""Which calls update an EMA: the multiples of `every`; the first one and each `every` calls later;
the same, with a `count` of calls; or a copy at the step that settings name, and then multiples."""

_FROM_FIRST = ("from first", "counted")


@dataclass(frozen=True)
class Updates:
    """What a file says of how its ordinary EMA was updated."""

    # arguments of `DecayRule`; without "decay", "base" and "steps" if they are unknown
    rule: Arguments = field(default_factory=dict)
    count: int | None = None  # number of updates; None if it is unknown
    every: int = 1  # calls between updates
    calls: Calls = "multiples"

    def is_known(self, settings: ImportSettings) -> bool:
        """Whether the file and the settings say the decay of every update."""
        name = "steps" if self.ends(settings) else "decay"
        return name in self._rule(settings, 1)

    def ends(self, settings: ImportSettings) -> bool:
        """Whether the decay rises to 1 at a step of the training."""
        return _is_schedule(self._rule(settings, 1))

    def needs_steps(self, settings: ImportSettings) -> bool:
        """Whether the decay rises until a step of the training that nothing says."""
        return self.ends(settings) and not self.is_known(settings)

    def profile(
        self,
        path: Path,
        step: int,
        settings: ImportSettings,
    ) -> OrdinaryEMA:
        """Compute the profile at a step, with `_ANY_DECAY` if none is known."""
        every = settings.update_every or self.every
        if self.count is None:
            first, count = self._place_after(settings, step, every)
        else:
            first, count = self._place_counted(self.count, path, settings, step, every)
        rule: Arguments = {"decay": _ANY_DECAY} | self._rule(settings, every)
        rule |= self._copies(settings, every)
        if _is_schedule(rule):
            rule["before"] = (first - 1) // every
            rule["decay"] = rule.get("base", _ANY_DECAY)
            rule["steps"] = rule.get("steps", math.inf) / every
        return DecayRule(**rule).profile(step, count, every, first)

    def _rule(self, settings: ImportSettings, every: int) -> Arguments:
        arguments = settings.rule(every)
        if "decay" not in arguments:
            return self.rule | arguments
        of_file = self.rule.get("warm_up")
        is_other = arguments.get("warm_up", "") != of_file
        is_replaced = settings.ema_warmup is not None and is_other
        if of_file and is_replaced:
            return arguments
        if self.rule.get("decay") == UNLIMITED:
            return arguments  # another kind of rule
        return self.rule | arguments

    def _copies(self, settings: ImportSettings, every: int) -> Arguments:
        """Say which updates copy the weights, where `update_after_step` says that."""
        after = settings.update_after_step or 0
        if self.calls == "counted" and self.count is not None:
            return {"copies": 1 + after, "stride": every}
        if self.calls == "after copy" and self.count is None and after:
            return {"copies": 1}
        return {}

    def _place_counted(
        self,
        count: int,
        path: Path,
        settings: ImportSettings,
        step: int,
        every: int,
    ) -> tuple[int, int]:
        """Find the step of the first of so many updates, or calls, and their number."""
        counted = count
        if count == step + 1:  # the first step has the number 0
            count = step
        if self.calls == "counted":
            first = step - count + 1
            count = (count - 1) // every + 1
        else:
            first = self._last(step, every) - (count - 1) * every
            # 50 updates at step 100 may be one in two steps, or all since the 51st
            is_each_step = 0 <= step - count <= 1
            if count and settings.update_every is None and not is_each_step:
                first = 0
        if first < 1:
            says = f"{path.name} counts the updates of its EMA: {counted:,} by step {step:,}"
            reason = f"must be given, and fit: {says}"
            hint = "it is a setting of imports, and 1 if the EMA began late"
            raise InvalidValueError("update_every", reason, hint)
        return first, count

    def _place_after(
        self,
        settings: ImportSettings,
        step: int,
        every: int,
    ) -> tuple[int, int]:
        """Find the step of the first update after the one that settings name, and the number of
        updates."""
        after = settings.update_after_step or 0
        if self.calls == "after copy" and after:
            first = after
        elif self.calls in _FROM_FIRST:
            first = after + 1
        else:
            first = self._last(after, every) + every
        first = min(first, step + every)  # of no updates until then: a copy of the weights
        return first, (step - first) // every + 1

    def _last(self, step: int, every: int) -> int:
        """Find the step of the last update up to a step."""
        remainder = int(self.calls in _FROM_FIRST)
        return (step - remainder) // every * every + remainder


def _is_schedule(rule: Arguments) -> bool:
    return RULES[rule.get("warm_up", "")].is_schedule
