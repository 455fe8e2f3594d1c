"""Measure what tracking a sharded model costs each process, compared with one process that holds the model.

    python scripts/bench_sharded.py [--ranks 2] [--quick]

Processes on gloo, one thread each, track a model of `fully_shard`: two averages, an update at every call, float16
snapshots. **Peak memory** is the peak of a process above that with the model alone, from Linux's /proc; the largest is
shown. **Collectives** are all that a process enters during updates and writing, counted by torch's CommDebugMode.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from synthesis_cases import TRACKED, Layers, large_tensors
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from posthoc_cli import PostHocEMA

CALLS = 33
"""Updates, with snapshots at every eleventh."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="processes that share the model")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.job:
        rank, world, parameters, folder = asked.job
        print(json.dumps(measure(int(rank), int(world), int(parameters), Path(folder))))
        return
    print("| | parameters held | peak memory | collectives |\n| --- | ---: | ---: | ---: |")
    for world in (1, asked.ranks):
        held, peak, collectives = run_job(50_000 if asked.quick else 50_000_000, world)
        label = "one process" if world == 1 else f"each of {world}"
        print(f"| {label} | {held / 1e6:.3g} MB | {peak / 1e6:,.0f} MB | {collectives} |")


def run_job(parameters: int, world: int) -> list[int]:
    """Run the processes of a job until they end; return the largest value of each figure."""
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "meeting").touch()
        processes = [start(["--job", str(rank), str(world), str(parameters), name]) for rank in range(world)]
        printed = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes), printed
    return [max(figures) for figures in zip(*map(json.loads, printed), strict=True)]


def start(arguments: Sequence[str]) -> Any:
    """Start a process of this script. Tests replace it by one that need not import torch."""
    return subprocess.Popen([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True)


# --- in a process of its own -----------------------------------------------------------------------


def measure(rank: int, world: int, parameters: int, folder: Path) -> tuple[int, int, int]:
    """Track the complete model or this process's chunks: bytes held, additional bytes at the peak, collectives."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    track(make_model(20_000, world), folder / "first")  # loads and makes all that is made once
    model = make_model(parameters, world)
    held = sum(4 * getattr(one, "to_local", lambda one=one: one)().numel() for one in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    track(model, folder / "run")
    peak = _status("VmHWM") - before
    with CommDebugMode() if world > 1 else nullcontext() as mode:
        track(model, folder / "counted")
    dist.barrier()
    dist.destroy_process_group()
    return held, peak, 0 if mode is None else mode.get_total_counts()


def make_model(parameters: int, world: int) -> torch.nn.Module:
    """Make a model of 24 matrices."""
    model = Layers(large_tensors(parameters, 24))
    if world > 1:
        fully_shard(model)
    return model


def track(model: torch.nn.Module, folder: Path) -> None:
    """Make the updates and write the snapshots."""
    tracker = PostHocEMA.from_model(
        model, folder, sigma_rels=TRACKED, update_every=1, checkpoint_every=CALLS // 3, device="model"
    )
    for _ in range(CALLS):
        tracker.update_(model)
    tracker.flush()


def _status(key: str) -> int:
    """Return a size of this process, in bytes, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
