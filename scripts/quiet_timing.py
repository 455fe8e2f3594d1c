"""Benchmarks: times of runs in turns on a quiet machine, goals, and busy processes to measure beside.

A busy neighbour multiplies the time of work on torch's thread pool, which spins until its slowest thread is done
(measured: 1.6 s to 16 s for a peer's synthesis), and hardly slows independent threads, so that ratios of such times are
meaningless. Compared runs take turns, each waits for a quiet moment, and contended ones give no verdict.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
        """The median."""
        return statistics.median(self.runs)

    @property
    def decides(self) -> bool:
        """Whether most runs were quiet."""
        return self.contended is not None and 2 * self.contended < len(self.runs)

    @property
    def mark(self) -> str:
        """A note about the runs that were not quiet."""
        if self.contended == 0:
            return ""
        return "  load unknown" if self.contended is None else f"  {self.contended} contended"

    def __str__(self) -> str:
        return f"{self.median:9.3f} s  ({min(self.runs):.3f} to {max(self.runs):.3f}){self.mark}"


def take_turns(
    runs: list[Callable[[], object]], repeats: int, before: Callable[[], None] | None = None, busy: bool = False
) -> list[Seconds]:
    """Time several runs `repeats` times, in turns; `busy` if other processes run on purpose."""
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
    busy, own, started = busy_seconds(), _own(), time.perf_counter()
    run()
    seconds = time.perf_counter() - started
    later = busy_seconds()
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


def busy_seconds() -> float | None:
    """Processor seconds of all processes; None where the system does not say."""
    try:
        ticks = [int(word) for word in _STAT.read_text().splitlines()[0].split()[1:9]]
    except OSError:
        return None
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _own() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


@dataclass
class Report:
    """Prints times as they are measured, and collects the goals."""

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
        """Time runs to be compared, in turns; `busy` if other processes run on purpose."""
        found = take_turns(list(runs.values()), self.repeats, before, busy)
        for label, seconds in zip(runs, found, strict=True):
            rate = f"  {nbytes / seconds.median / 1e9:6.2f} GB/s" if nbytes else ""
            print(f"  {label:<44}{seconds}{rate}", flush=True)
        return found

    def goal(self, what: str, found: float, limit: float, rests_on: Sequence[Seconds], at_least: bool = False) -> None:
        """Note whether a goal is met; without a verdict if one of its times was contended."""
        met = found >= limit if at_least else found <= limit
        verdict = ("met" if met else "MISSED") if all(seconds.decides for seconds in rests_on) else "NOT JUDGED"
        self.goals.append(f"  {verdict:<10}  {what}: {found:.2f} (goal {'>=' if at_least else '<='} {limit:g})")


PER_CORE = 2

_WORK = """
import os
parent = os.getppid()
while os.getppid() == parent:  # ends with its parent
    sum(range(1_000_000))
"""


@contextmanager
def busy_machine(processes: int | None = None) -> Iterator[None]:
    """Keep processes busy within the block, PER_CORE for each core by default."""
    count = PER_CORE * (os.cpu_count() or 1) if processes is None else processes
    running = [subprocess.Popen([sys.executable, "-c", _WORK]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
        for process in running:
            process.wait()


def load_text() -> str:
    """The system's load average over the last minute."""
    return f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
