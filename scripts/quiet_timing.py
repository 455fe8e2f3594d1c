"""Benchmarks: times of runs in turns on a quiet machine.

A busy neighbour multiplies the time of work on torch's thread pool, which spins until its slowest thread is done, and
hardly slows independent threads, so that ratios of such times are meaningless. Compared runs take turns, each waits
for a quiet moment, and contended ones are marked.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MOST_OTHERS = 0.1
"""Share of all cores that other processes may take during a run that counts as quiet."""

PATIENCE = 10.0
"""Seconds to wait for a quiet moment before a run."""

CORES = os.cpu_count() or 1


@dataclass(frozen=True)
class Seconds:
    """Times of repeated runs; `contended` of them were not quiet, or cannot be told to have been."""

    runs: tuple[float, ...]
    contended: int

    @property
    def median(self) -> float:
        """The median."""
        return statistics.median(self.runs)

    @property
    def mark(self) -> str:
        """A note about the runs that were not quiet."""
        return f"  {self.contended} contended" if self.contended else ""

    def __str__(self) -> str:
        return f"{self.median:9.3f} s  ({min(self.runs):.3f} to {max(self.runs):.3f}){self.mark}"


def take_turns(
    runs: list[Callable[[], object]],
    repeats: int,
    before: Callable[[], None] | None = None,
) -> list[Seconds]:
    """Time several runs `repeats` times, in turns."""
    found: list[list[tuple[float, float]]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, times in zip(runs, found, strict=True):
            if before is not None:
                before()
            end = time.monotonic() + PATIENCE
            while time.monotonic() < end and _timed(lambda: time.sleep(0.2))[1] > MOST_OTHERS / 2:
                pass
            times.append(_timed(run))
    return [Seconds(tuple(one for one, _ in times), sum(share > MOST_OTHERS for _, share in times)) for times in found]


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and the share of all cores that other processes took meanwhile."""
    before, started = _others(), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    # Counted in ticks of 10 ms: a tick a core is no neighbour.
    return seconds, (_others() - before - 0.01 * CORES) / (seconds * CORES)


def _others() -> float:
    """Processor seconds of other processes."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return busy_seconds() - sum(one.ru_utime + one.ru_stime for one in used)


def busy_seconds() -> float:
    """Processor seconds of all processes; where the system does not say, as if all cores were always busy."""
    try:
        ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return 2 * CORES * time.perf_counter()
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


@dataclass
class Report:
    """Prints times as they are measured."""

    repeats: int

    def times(
        self,
        runs: dict[str, Callable[[], object]],
        nbytes: int = 0,
        before: Callable[[], None] | None = None,
    ) -> list[Seconds]:
        """Time runs to be compared, in turns, and print them with their rates over `nbytes`."""
        found = take_turns(list(runs.values()), self.repeats, before)
        for label, seconds in zip(runs, found, strict=True):
            rate = f"  {nbytes / seconds.median / 1e9:6.2f} GB/s" if nbytes else ""
            print(f"  {label:<44}{seconds}{rate}", flush=True)
        return found
