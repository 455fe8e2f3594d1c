"""Times of runs, and whether other processes were using the machine meanwhile.

A busy neighbour does not slow everything alike. Work on torch's own pool of threads waits for its slowest thread by
spinning, so that a neighbour multiplies its time (measured: 1.6 s to 16 s for a peer's synthesis), and hardly touches
work on independent threads. A ratio of two such times says something about the neighbour. So runs that are compared
take turns, each waits for a quiet moment, and what was not quiet is marked and decides nothing.
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

_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Seconds:
    """Times of repeated runs; `contended` of them were not quiet, None where the system cannot tell."""

    runs: tuple[float, ...]
    contended: int | None

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.runs)

    @property
    def decides(self) -> bool:
        """Whether most runs were quiet."""
        return self.contended is not None and 2 * self.contended < len(self.runs)

    @property
    def mark(self) -> str:
        """What a line of a table says about the runs that were not quiet."""
        if self.contended == 0:
            return ""
        return "  load unknown" if self.contended is None else f"  {self.contended} contended"

    def __str__(self) -> str:
        return f"{self.median:9.3f} s  ({min(self.runs):.3f} to {max(self.runs):.3f}){self.mark}"


def take_turns(
    runs: list[Callable[[], object]], repeats: int, before: Callable[[], None] | None = None, busy: bool = False
) -> list[Seconds]:
    """Time several runs `repeats` times, in turns; `busy`: beside other processes, that are there on purpose."""
    found: list[list[tuple[float, float | None]]] = [[] for _ in runs]
    for _ in range(repeats):
        for index, run in enumerate(runs):
            if before is not None:
                before()
            if not busy:
                _wait_for_quiet()
            seconds, share = _timed(run)
            found[index].append((seconds, 0.0 if busy else share))
    return [_summary(times) for times in found]


def _summary(times: list[tuple[float, float | None]]) -> Seconds:
    shares = [share for _, share in times if share is not None]
    contended = sum(share > MOST_OTHERS for share in shares) if len(shares) == len(times) else None
    return Seconds(tuple(seconds for seconds, _ in times), contended)


def _timed(run: Callable[[], object]) -> tuple[float, float | None]:
    """Seconds, and the share of all cores that other processes took meanwhile."""
    busy, own, started = _busy(), _own(), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    later = _busy()
    if busy is None or later is None:
        return seconds, None
    # Counted in ticks of 10 ms: a tick a core is no neighbour.
    others = later - busy - (_own() - own) - 0.01 * (os.cpu_count() or 1)
    return seconds, max(0.0, others) / (seconds * (os.cpu_count() or 1))


def _wait_for_quiet() -> None:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        _, share = _timed(lambda: time.sleep(0.2))
        if share is None or share < MOST_OTHERS / 2:
            return


def _busy() -> float | None:
    """Seconds that all cores have worked, for whomever; None where the system does not say."""
    try:
        ticks = [int(word) for word in _STAT.read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
