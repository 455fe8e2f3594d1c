"""What an experiment counts, and what makes one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Tally:
    """What an experiment has seen so far.

    Attributes:
        tried: faults, damages, kills or hostile inputs so far.
        lost: a line for each time that something durable was gone, changed or half there.
        missed: a line for each time that something wrong was not found, or was reported as something else than one
            clear error of this package.
        executed: a line for each time that foreign code ran, or a file outside the named places was touched.
    """

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[str]:
        """All lines."""
        return self.lost + self.missed + self.executed


@dataclass(frozen=True)
class Experiment:
    """One row of the table.

    Attributes:
        name: what is done, in the words of the table.
        run: does it in an empty folder, for a share of all that there is to try (0 to 1, at least one of each kind),
            from a seed.
        share: what `make test` tries.
    """

    name: str
    run: Callable[[Path, float, int], Tally]
    share: float
