"""Measure the speed of a synthesis against a plain loop over the same bytes and the peers, and its memory.

    python scripts/bench_synthesis.py [--device cpu] [--repeats 5] [--folder FOLDER] [--quick]

20 float16 snapshots of made-up models, half of them for each of two profiles; targets are float32. Times are medians of
repeated runs in turns, in milliseconds, with the processor time of all threads in parentheses, which other programs on
the machine change less. All runs of this package verify every checksum. "Dropped" is a caller who takes each tensor and
drops it; "to a file" includes fsync. The peers read their own checkpoints, of as many parameters and the same dtype,
through their public interfaces.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from bench_update import cell, times
from compare_peers import ema_pytorch, posthoc_ema, without_noise
from synthesis_cases import (
    Layers,
    large_tensors,
    peak_memory,
    read_plainly,
    write_snapshots,
    write_sparse_snapshots,
)

from posthoc_cli import disk_sources
from posthoc_cli.export.layouts import OutputOptions
from posthoc_cli.export.writing import write_synthesis
from posthoc_cli.synthesis.engine import Options, check_device, synthesize
from posthoc_cli.synthesis.plan import Plan, plan_synthesis

MANY = [round(0.03 + 0.008 * index, 3) for index in range(31)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="where the sums are made: cpu, cuda, mps")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    parser.add_argument("--folder", type=Path, help="for files of up to 10 GB; by default the system's own")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    asked = parser.parse_args(arguments)
    device, million = str(check_device(asked.device)), 10_000 if asked.quick else 1_000_000
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, sums on {device}")
    repeats = 1 if asked.quick else asked.repeats
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        for parameters in (48 * million, 100 * million):
            measure_model(repeats, folder, parameters, device)
        measure_memory(folder, (10 * million, 1000 * million))


def measure_model(repeats: int, folder: Path, parameters: int, device: str) -> None:
    """Measure one target and 31 targets of a model, and one with the peers, warm and cold."""
    run, out, buffer, options = folder / "run", folder / "out.safetensors", bytearray(4 * 2**20), Options(device)
    write_snapshots(run, large_tensors(parameters))
    one, many = planned(run, [0.15]), planned(run, MANY)
    print(f"\n20 float16 snapshots of {parameters:,} parameters; one target")
    runs = {
        "plain readinto loop, one thread": partial(read_plainly, run, buffer),
        "one core, dropped": lambda: exhaust(synthesize(one, Options(device, 1))),
        "all cores, dropped": lambda: exhaust(synthesize(one, options)),
        "all cores, to a file": lambda: write_synthesis(one, [out], OutputOptions(device, overwrite=True)),
    }
    show(runs, repeats, one.read_bytes)
    for start, others in ((posthoc_ema, {"update_after_step": 0}), (ema_pytorch, {})):
        with tempfile.TemporaryDirectory(dir=folder) as checkpoints, without_noise():
            update, average = start(Layers(large_tensors(parameters)), Path(checkpoints), 1, 1, torch.float16, **others)
            for _ in range(10):
                update()
            os.sync()  # writing back would compete for the disk
            label, peer = f"{start.__name__}, 20 of its own", partial(average, 0.15)
            found = times({"ours, kept": lambda: dict(synthesize(one, options)), label: peer}, repeats)
        for label, one_found in found.items():
            print(f"  {label:<44}{cell(*one_found)}", flush=True)
    print(f"{len(MANY)} targets")
    show({"dropped": lambda: exhaust(synthesize(many, options))}, repeats)
    shutil.rmtree(run)
    out.unlink()


def measure_memory(folder: Path, models: Sequence[int]) -> None:
    """Measure peak resident memory for models of very different sizes, from sparse files."""
    print("\nPeak resident memory above that of a process that imports torch; one target to a file")
    for parameters in models:
        run, out = folder / "run", folder / "out.safetensors"
        write_sparse_snapshots(run, parameters, tensors=20, snapshots=4)
        print(f"  {parameters:>13,} parameters, 4 snapshots: {peak_memory(run, out) / 1e6:6.1f} MB", flush=True)
        shutil.rmtree(run)
        out.unlink()


def show(runs: dict[str, Callable[[], object]], repeats: int, nbytes: int = 0) -> None:
    """Time runs in turns, and print them with their rates over `nbytes`."""
    for label, found in times(runs, repeats).items():
        rate = f"{nbytes / statistics.median(found[0]) / 1e9:6.2f} GB/s" if nbytes else ""
        print(f"  {label:<44}{cell(*found):<20}{rate}", flush=True)


def planned(run: Path, targets: Sequence[float]) -> Plan:
    """Make a plan for targets of a directory."""
    return plan_synthesis(disk_sources(run), targets, dtype="float32")


def exhaust(items: Iterable[object]) -> None:
    """Take all tensors and drop them."""
    for _ in items:
        pass


if __name__ == "__main__":
    main()
