"""What tracking a sharded model costs each of its processes, beside one process that holds all of the model.

    python scripts/bench_sharded.py [--ranks 2] [--repeats 5] [--folder FOLDER] [--quick]

Real processes on gloo, one thread each, train a model of `fully_shard`; there should be a core for each. Jobs take
turns with one process that tracks the same model whole. Of each job the slowest process counts, and of several jobs the
median. Two averages, an update at every call, float16 snapshots.

**An update** is the median of calls of `update_` at which no snapshot is due, begun by all processes together. **Parts
durable** is from the beginning of a call at which snapshots are due until they are fsynced. **Peak memory** is what a
process holds more, at its peak, than with the model alone. **Collectives** are all that a process enters during updates
and writing, as torch's CommDebugMode counts them. Memory is read from Linux's /proc.
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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from quiet_timing import load_text, take_turns
from synthesis_cases import Layers, large_tensors
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from update_cases import start_tracker

ROUNDS = 3
"""Checkpoints of a job, each after `CALLS` usual updates."""

CALLS = 10


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the model")
    parser.add_argument("--repeats", type=int, default=5, help="jobs of each kind")
    parser.add_argument("--folder", type=Path, help="for snapshots of up to 1 GB; by default the system's own")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.job:
        rank, world, parameters, folder = asked.job
        print(json.dumps(measure(int(rank), int(world), int(parameters), Path(folder))))
        return
    parameters, repeats = (50_000, 1) if asked.quick else (50_000_000, asked.repeats)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {load_text()}\n")
    found: dict[int, list[dict[str, float]]] = {1: [], asked.ranks: []}

    def runner(world: int) -> Callable[[], None]:
        return lambda: found[world].append(run_job(asked.folder, parameters, world))

    marks = [times.mark for times in take_turns([runner(world) for world in found], repeats)]
    print("| | parameters held | an update | parts durable | peak memory | collectives |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for (world, jobs), mark in zip(found.items(), marks, strict=True):
        of = {what: statistics.median(job[what] for job in jobs) for what in jobs[0]}
        cells = [f"{of['held'] / 1e6:.3g} MB", f"{1000 * of['update']:.1f} ms", f"{of['durable']:.2f} s"]
        cells += [f"{of['peak'] / 1e6:.0f} MB", f"{of['collectives']:.0f}"]
        print(f"| {'one process' if world == 1 else f'each of {world}'}{mark} | {' | '.join(cells)} |")


def run_job(folder: Path | None, parameters: int, world: int) -> dict[str, float]:
    """Run the processes of a job to their end; the largest of each figure."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        (Path(name) / "meeting").touch()
        processes = [start(["--job", str(rank), str(world), str(parameters), name]) for rank in range(world)]
        printed = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), printed
    found = [json.loads(text) for text in printed]
    return {what: max(one[what] for one in found) for what in found[0]}


def start(arguments: Sequence[str]) -> Any:
    """A process of this script; tests put another in place, that need not import torch first."""
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)


# --- in a process of its own -----------------------------------------------------------------------


def measure(rank: int, world: int, parameters: int, folder: Path) -> dict[str, float]:
    """Track a model, whole or this process's chunks of it."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    track(make_model(20_000, world), folder / "first")  # loads and makes all that is made once
    model = make_model(parameters, world)
    held = sum(4 * getattr(one, "to_local", lambda one=one: one)().numel() for one in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    update, durable = track(model, folder / "run")
    peak = _status("VmHWM") - before
    with CommDebugMode() if world > 1 else nullcontext() as mode:
        track(model, folder / "counted")
    dist.barrier()
    dist.destroy_process_group()
    collectives = 0 if mode is None else mode.get_total_counts()
    return {"held": held, "update": update, "durable": durable, "peak": peak, "collectives": collectives}


def make_model(parameters: int, world: int) -> torch.nn.Module:
    """Of 24 matrices."""
    model = Layers(large_tensors(parameters, 24))
    if world > 1:
        fully_shard(model)
    return model


def track(model: torch.nn.Module, folder: Path) -> tuple[float, float]:
    """The median seconds of a usual update, and of one with its snapshots durable."""
    tracker, usual, due = start_tracker(model, folder, "model", 1, CALLS + 1), list[float](), list[float]()
    for call in range(1, ROUNDS * (CALLS + 1) + 1):
        dist.barrier()
        started = time.perf_counter()
        tracker.update_(model)
        if call % (CALLS + 1):
            usual.append(time.perf_counter() - started)
        else:
            tracker.flush()
            due.append(time.perf_counter() - started)
    return statistics.median(usual), statistics.median(due)


def _status(key: str) -> int:
    """Bytes that the system says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
