"""Measure the speed of a synthesis against a plain loop over the same bytes and the peers, and its
memory.

    python scripts/bench_synthesis.py [--device cpu] [--repeats 5]

20 float16 snapshots of a made-up model of 100 M parameters, half of them for each of two profiles;
targets are float32. Files of up to 10 GB are in the system's folder for temporary ones (`TMPDIR`).
Times are medians of repeated runs in turns, in milliseconds. All runs of this package verify every
checksum. "Dropped" is a caller who takes each tensor and drops it; "to a file" includes
fsync. The peers read their own checkpoints, of as many parameters and the same dtype, through their
public interfaces."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_update import (
    TRACKED,
    Layers,
    Shapes,
    benchmark_parser,
    installed_peers,
    large_tensors,
    machine,
    times,
)
from compare_peers import without_noise
from xxhash import xxh3_64_hexdigest

from posthoc_cli import PostHocEMA, Request, disk_sources
from posthoc_cli.export.writing import write_synthesis
from posthoc_cli.request import OutputRequest
from posthoc_cli.snapshots.entry import BLOCK, Entry
from posthoc_cli.snapshots.snapshot import decode_snapshot
from posthoc_cli.snapshots.tensorfile import read_file, seal
from posthoc_cli.snapshots.writer import encode_header, lay_out
from posthoc_cli.synthesis.engine import check_device, synthesize
from posthoc_cli.synthesis.plan import Plan, plan_synthesis

MANY = np.linspace(0.03, 0.27, 31).round(3).tolist()
"""31 targets."""


def main() -> None:
    """Measure everything and print the tables."""
    asked = benchmark_parser(__doc__).parse_args()
    device = str(check_device(asked.device))
    print(f"{machine()}, sums on {device}")
    print("\n20 float16 snapshots of 100 M parameters")
    shapes = large_tensors(100_000_000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_snapshots(folder / "run", shapes)
        measure_ours(folder, asked.repeats, device)
        measure_peers(folder, asked.repeats, device, shapes)
    print("\nPeak resident memory above that of a process that imports torch; one target to a file")
    for millions in (10, 1000):
        peak = synthesis_memory(millions * 1_000_000)
        print(f"  {millions:>5} M parameters, 4 snapshots: {peak / 1e6:6.1f} MB")


def measure_ours(folder: Path, repeats: int, device: str) -> None:
    """Measure one target and 31 targets of the snapshots."""
    run = folder / "run"
    out = folder / "out.safetensors"
    buffer = mmap.mmap(-1, 4 * 2**20)
    request = OutputRequest([0.15], out, device=device, overwrite=True)
    one = planned(run, [0.15])
    many = planned(run, MANY)
    runs = {
        "plain readinto loop, one thread": partial(read_plainly, run, buffer),
        "one core, dropped": lambda: exhaust(synthesize(one, device, 1)),
        "all cores, dropped": lambda: exhaust(synthesize(one, device)),
        "all cores, to a file": lambda: write_synthesis(one, [out], request),
    }
    show(times(runs, repeats), one.read_bytes)
    runs = {f"{len(MANY)} targets, dropped": lambda: exhaust(synthesize(many, device))}
    show(times(runs, repeats))


def measure_peers(
    folder: Path,
    repeats: int,
    device: str,
    shapes: Shapes,
) -> None:
    """Measure one target, whose tensors are kept, in turns with each of the peers."""
    plan = planned(folder / "run", [0.15])
    for peer, start in installed_peers().items():
        with tempfile.TemporaryDirectory(dir=folder) as checkpoints, without_noise():
            library = start(Layers(shapes), Path(checkpoints), 1, 1, torch.float16)
            for _ in range(10):
                library.update()
            os.sync()  # writing back would compete for the disk
            runs = {
                "all cores, kept": lambda: dict(synthesize(plan, device)),
                f"{peer}, 20 of its own": partial(library.average, 0.15),
            }
            found = times(runs, repeats)
        show(found)


def show(found: dict[str, float], nbytes: int = 0) -> None:
    """Print times, with their rates over `nbytes`."""
    for label, seconds in found.items():
        rate = f"{nbytes / seconds / 1e9:6.2f} GB/s" if nbytes else ""
        print(f"  {label:<44}{1000 * seconds:<9.3g}{rate}", flush=True)


def planned(run: Path, targets: Sequence[float]) -> Plan:
    """Make a plan for targets of a directory."""
    return plan_synthesis(disk_sources(run), Request(targets, dtype="float32"))


def exhaust(items: Iterable[object]) -> None:
    """Take all tensors and drop them."""
    for _ in items:
        pass


def read_plainly(folder: Path, buffer: mmap.mmap) -> None:
    """Read every byte of every snapshot by `readinto`, in one thread, to the start of a page.

    To a place 16 bytes after it, where a bytearray begins, some processors copy at a sixth of the
    speed.
    """
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# --- our snapshots
# ---------------------------------------------------------------------------------


def write_snapshots(folder: Path, shapes: Shapes, times: int = 10) -> None:
    """Write float16 snapshots of a model that walks at random, of two profiles at so many times."""
    model = Layers(shapes)
    options = {"update_every": 1, "checkpoint_every": 1, "max_checkpoints": None}
    with PostHocEMA.from_model(model, folder, TRACKED, **options) as ema:
        for _ in range(times):
            for parameter in model.parameters():
                move = torch.randn_like(parameter)
                parameter.data.add_(move, alpha=0.1)
            ema.update_(model)


def write_sparse_snapshots(
    folder: Path,
    parameters: int,
    tensors: int,
    times: int,
) -> None:
    """Write the same snapshots of zeros as sparse files: a model of any size takes no disk."""
    shapes = large_tensors(parameters, tensors)
    write_snapshots(folder, dict.fromkeys(shapes, (1,)), times)
    entries = lay_out({name: Entry("F16", shape) for name, shape in shapes.items()})
    checksums = ""
    payload = 0
    for entry in entries.values():
        checksums += checksums_of_zeros(entry.nbytes)
        payload += entry.nbytes
    for path in folder.glob("*.safetensors"):
        snapshot = decode_snapshot(read_file(path))
        header = encode_header(entries, {"sums": checksums, **snapshot.encode()}, {})
        seal(header)
        path.write_bytes(header)
        os.truncate(path, len(header) + payload)


def checksums_of_zeros(nbytes: int) -> str:
    """Return the checksums of a tensor's blocks."""
    size = 2 * BLOCK
    blocks, rest = divmod(nbytes, size)
    checksums = blocks * xxh3_64_hexdigest(bytes(size))
    if rest:
        checksums += xxh3_64_hexdigest(bytes(rest))
    return checksums


# --- memory
# ----------------------------------------------------------------------------------------

_PEAK = """
import re, resource, sys, torch

if len(sys.argv) > 1:
    from pathlib import Path
    from posthoc_cli.export.writing import write_synthesis
    from posthoc_cli import Request, disk_sources, plan_synthesis
    from posthoc_cli.request import OutputRequest

    plan = plan_synthesis(disk_sources(sys.argv[1]), Request([0.15], dtype="float32"))
    out = Path(sys.argv[2])
    write_synthesis(plan, [out], OutputRequest([0.15], out))
try:
    print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
except OSError:
    print(
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
    )
"""
# Linux lets a process inherit ru_maxrss from its parent; VmHWM is the same quantity, counted from
# its own start.


def synthesis_memory(parameters: int) -> int:
    """Return the peak resident bytes of a process that writes one target, above those of `import
    torch`."""
    with tempfile.TemporaryDirectory() as name:
        run = Path(name) / "run"
        out = Path(name) / "out.safetensors"
        write_sparse_snapshots(run, parameters, tensors=20, times=2)
        return peak_memory(run, out) - peak_memory()


def peak_memory(*arguments: Path) -> int:
    """Return the peak resident bytes of a process that imports torch, and perhaps writes."""
    command = [sys.executable, "-c", _PEAK, *map(str, arguments)]
    return int(subprocess.check_output(command))


if __name__ == "__main__":
    main()
