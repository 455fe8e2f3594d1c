"""How an ordinary EMA was updated, and the profile that follows."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posthoc_cli.checkpoints.settings import ImportSettings
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import UNLIMITED, DecayRule, OrdinaryEMA

_ANY_DECAY = 0.999  # in place of an unknown decay


@dataclass(frozen=True)
class Updates:
    """How an ordinary EMA was updated, as far as its file says."""

    # arguments of `DecayRule`; without "decay" if it is unknown
    rule: dict[str, Any] = field(default_factory=dict)
    count: int | None = None  # number of updates; None if it is unknown
    every: int = 1  # calls between updates; for EDM images of a batch, 0 if they are unknown
    from_first: bool = False  # whether the first call is an update, and not call number `every`
    # whether `count` is of calls, whatever their number between two updates
    counts_calls: bool = False
    # whether a first update after the begin is at the step that settings name, and copies
    at_start: bool = False

    def profile(self, path: Path, step: int, settings: ImportSettings) -> OrdinaryEMA:
        """Return the profile at a step, that of `_ANY_DECAY` if none is known."""
        every, after, count = (
            settings.update_every or self.every,
            settings.update_after_step or 0,
            self.count,
        )
        said = settings.rule(every)
        # another kind of rule
        of_file = {} if "decay" in said and self.rule.get("decay") == UNLIMITED else self.rule
        rule = {"decay": _ANY_DECAY} | of_file | said
        if restart := max(
            (restart for restart in settings.ema_restarts if restart < step), default=0
        ):
            rule |= {"copies": 0, "late": settings.ema_late or 0}
            first, count = restart + every, (step - restart) // every
        elif count is None:
            first = after + 1 if self.from_first else (after // every + 1) * every
            if after and self.at_start:
                first, rule["copies"] = after, 1
            first = min(first, step + every)  # of no updates until then: a copy of the weights
            count = (step - first) // every + 1
            rule |= {"late": settings.ema_late or 0} if after else {}
        elif self.counts_calls:
            rule["copies"] = 1 + after
            rule["stride"], first, count = every, step - count + 1, (count - 1) // every + 1
        else:
            last = (step - 1) // every * every + 1 if self.from_first else step // every * every
            first = last - (count - 1) * every
            if settings.update_every is None and count and not 0 <= step - count <= 1:
                first = 0  # 50 updates at step 100 may be one in two steps, or all since the 51st
        if first < 1:
            counted = f"{path.name} has counted {self.count:,} updates of its EMA by step {step:,}"
            raise InvalidValueError(
                "update_every", f"must be given, and fit: {counted}", "1 if the EMA began late"
            )
        return DecayRule(**rule).profile(step, count, every, first)
