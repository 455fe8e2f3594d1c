"""What an experiment counts, and what makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Tally:
    """How many faults, damages, kills or hostile inputs were tried, and a line for each that went wrong."""

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    """Something durable was gone, changed or half there."""
    missed: list[str] = field(default_factory=list)
    """Something wrong was not found, or was reported as something else than one clear error of this package."""
    executed: list[str] = field(default_factory=list)
    """Foreign code ran, or a file outside the named places was touched."""

    @property
    def failures(self) -> list[str]:
        """All lines."""
        return self.lost + self.missed + self.executed


@dataclass(frozen=True)
class Experiment:
    """One row of the table, in whose words its name is."""

    name: str
    run: Callable[[Path, float, int], Tally]
    """In an empty folder, for a share of all there is to try (0 to 1, at least one of each kind), from a seed."""
    share: float
    """What `make test` tries."""
