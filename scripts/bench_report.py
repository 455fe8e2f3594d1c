"""What a benchmark found, printed as it comes, and its goals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from quiet_timing import Seconds, take_turns


@dataclass
class Report:
    """What was found, printed as it comes, and the goals."""

    repeats: int
    goals: list[str] = field(default_factory=list)

    def time(
        self, label: str, run: Callable[[], object], nbytes: int = 0, before: Callable[[], None] | None = None
    ) -> Seconds:
        """Time a run, and print it with its rate over `nbytes`."""
        return self.times({label: run}, nbytes, before)[0]

    def times(
        self,
        runs: dict[str, Callable[[], object]],
        nbytes: int = 0,
        before: Callable[[], None] | None = None,
        busy: bool = False,
    ) -> list[Seconds]:
        """Time runs that will be compared, in turns; `busy`: beside other processes, that are there on purpose."""
        found = take_turns(list(runs.values()), self.repeats, before, busy)
        for label, seconds in zip(runs, found, strict=True):
            rate = f"  {nbytes / seconds.median / 1e9:6.2f} GB/s" if nbytes else ""
            print(f"  {label:<44}{seconds}{rate}", flush=True)
        return found

    def goal(self, what: str, found: float, limit: float, rests_on: Sequence[Seconds], at_least: bool = False) -> None:
        """Note whether a goal is met; not where a time that it rests on was taken beside busy neighbours."""
        met = found >= limit if at_least else found <= limit
        verdict = ("met" if met else "MISSED") if all(seconds.decides for seconds in rests_on) else "NOT JUDGED"
        self.goals.append(f"  {verdict:<10}  {what}: {found:.2f} (goal {'>=' if at_least else '<='} {limit:g})")
