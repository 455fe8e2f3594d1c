"""What tracking a sharded model costs each of its processes, beside one process that holds all of the model.

    python scripts/bench_sharded.py [--ranks 2] [--repeats 5] [--folder FOLDER] [--quick]

Real processes on gloo, one thread each, train a model of `fully_shard`; there should be a core for each. Jobs take
turns with one process that tracks the same model whole, in quiet moments; see `quiet_timing`. Of each job it counts the
slowest process, and of several jobs the median. Two averages, an update at every call, float16 snapshots.

**An update** is the median of calls of `update_` at which no snapshot is due, begun by all processes together. **Parts
durable** is from the beginning of a call at which snapshots are due until they are fsynced. **Peak memory** is what a
process holds more, at its peak, than with the model alone: averages, buffers, and what writing takes. All three are
compared with what one process takes, divided by the number of processes. **Collectives** are all that a process enters
during updates and writing, as torch's CommDebugMode counts them. Memory is read from Linux's /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from quiet_timing import Report, Seconds, load_text, take_turns
from synthesis_cases import Layers, large_tensors
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from update_cases import start_tracker

from posthoc_cli import PostHocEMA

ROUNDS = 3
"""Checkpoints of a job, each after `CALLS` usual updates."""

CALLS = 10


@dataclass(frozen=True)
class Job:
    """What the processes of a job have measured: of each figure the largest, and the load beside them."""

    seconds: Seconds
    durable: Seconds
    peak: float
    share: float
    collectives: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and the goals."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the model")
    parser.add_argument("--repeats", type=int, default=5, help="jobs of each kind")
    parser.add_argument("--folder", type=Path, help="for snapshots of up to 1 GB; by default the system's own")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--job", nargs=5, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.job:
        rank, world, parameters, meeting, folder = asked.job
        print(json.dumps(measure(int(rank), int(world), int(parameters), meeting, Path(folder))))
        return
    parameters, report = 50_000 if asked.quick else 50_000_000, Report(1 if asked.quick else asked.repeats)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {load_text()}\n")
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        one, many = compare(report, Path(name), parameters, asked.ranks)
    print("| | parameters held | an update | parts durable | peak memory | collectives |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for what, job in (("one process", one), (f"each of {asked.ranks}", many)):
        cells = [f"{job.share / 1e6:.3g} MB", f"{1000 * job.seconds.median:.1f} ms", f"{job.durable.median:.2f} s"]
        print(f"| {what} | {' | '.join(cells)} | {job.peak / 1e6:.0f} MB | {job.collectives} |")
    times, writes = [one.seconds, many.seconds], [one.durable, many.durable]
    unit = f"in times of one process's / {asked.ranks}"
    report.goal(f"an update, {unit}", asked.ranks * many.seconds.median / one.seconds.median, 1.3, times)
    report.goal(f"parts durable, {unit}", asked.ranks * many.durable.median / one.durable.median, 1.5, writes)
    report.goal(f"peak memory, {unit}", asked.ranks * many.peak / one.peak, 1.1, [])
    report.goal("collectives in updates and writing", many.collectives, 0, [])
    print("\nGoals:")
    print("\n".join(report.goals))


def compare(report: Report, folder: Path, parameters: int, ranks: int) -> tuple[Job, Job]:
    """Jobs of one process and of several, in turns."""
    worlds, found = (1, ranks), dict[int, list[dict[str, float]]]()

    def runner(world: int) -> Callable[[], None]:
        return lambda: found.setdefault(world, []).append(run_job(folder, parameters, world))

    loads = take_turns([runner(world) for world in worlds], report.repeats)
    jobs = []
    for world, load in zip(worlds, loads, strict=True):
        figures = {name: tuple(job[name] for job in found[world]) for name in found[world][0]}
        seconds, durable = (Seconds(figures[name], load.contended) for name in ("update", "durable"))
        peak, share = (statistics.median(figures[name]) for name in ("peak", "share"))
        jobs.append(Job(seconds, durable, peak, share, int(max(figures["collectives"]))))
    return jobs[0], jobs[1]


def run_job(folder: Path, parameters: int, world: int) -> dict[str, float]:
    """Run the processes of a job to their end; the largest of each figure."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        (Path(name) / "meeting").touch()
        words = [str(word) for word in (world, parameters, Path(name) / "meeting", name)]
        processes = [start(["--job", str(rank), *words]) for rank in range(world)]
        printed = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), printed
    found = [json.loads(text) for text in printed]
    return {what: max(one[what] for one in found) for what in found[0]}


def start(arguments: Sequence[str]) -> Any:
    """A process of this script; tests put another in place, that need not import torch first."""
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)


# --- in a process of its own -----------------------------------------------------------------------


def measure(rank: int, world: int, parameters: int, meeting: str, folder: Path) -> dict[str, float]:
    """Track a model, whole or this process's chunks of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    _rounds(_begin(20_000, world, folder / "first")[1], [], [])  # loads and makes all that is made once
    model, call = _begin(parameters, world, folder / "run")
    share = sum(4 * getattr(one, "to_local", lambda one=one: one)().numel() for one in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")
    before, usual, due = _status("VmRSS"), list[float](), list[float]()
    _rounds(call, usual, due)
    peak = _status("VmHWM") - before
    with CommDebugMode() if world > 1 else nullcontext() as mode:
        _rounds(call, [], [])
    found = {"update": statistics.median(usual), "durable": statistics.median(due), "peak": peak, "share": share}
    dist.barrier()
    dist.destroy_process_group()
    return {**found, "collectives": 0 if mode is None else mode.get_total_counts()}


def _begin(parameters: int, world: int, folder: Path) -> tuple[torch.nn.Module, Callable[[bool], float]]:
    """A model, and a call of its tracker, of which the first makes it; seconds of the call, all of it if told."""
    model = Layers(large_tensors(parameters, 24))
    if world > 1:
        fully_shard(model)
    trackers: list[PostHocEMA] = []

    def call(durable: bool) -> float:
        if not trackers:
            trackers.append(start_tracker(model, folder, "model", 1, CALLS + 1))
        dist.barrier()
        started = time.perf_counter()
        trackers[0].update_(model)
        if durable:
            trackers[0].flush()
        return time.perf_counter() - started

    return model, call


def _rounds(call: Callable[[bool], float], usual: list[float], due: list[float]) -> None:
    for _ in range(ROUNDS):
        usual += [call(False) for _ in range(CALLS)]
        due.append(call(True))


def _status(key: str) -> int:
    """Bytes that the system says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
