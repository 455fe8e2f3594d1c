"""Measure the speed of a synthesis against a plain loop over the same bytes and the peers, and its
memory.

    python scripts/bench_synthesis.py [--device cpu] [--repeats 5] [--folder FOLDER] [--quick]

20 float16 snapshots of made-up models, half of them for each of two profiles; targets are float32.
Times are medians of repeated runs in turns, in milliseconds, with the processor time of all threads
in parentheses, which other programs on the machine change less. All runs of this package verify
every checksum. "Dropped" is a caller who takes each tensor and drops it; "to a file" includes
fsync. The peers read their own checkpoints, of as many parameters and the same dtype, through their
public interfaces."""

from __future__ import annotations

import argparse
import mmap
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash
from bench_update import TRACKED, Layers, Shapes, cell, is_installed, large_tensors, times
from compare_peers import ema_pytorch, posthoc_ema, without_noise

from posthoc_cli import disk_sources
from posthoc_cli.export.writing import OutputOptions, write_synthesis
from posthoc_cli.snapshots.directory import snapshot_path
from posthoc_cli.snapshots.tensorfile import BLOCK, Entry, encode_header, lay_out
from posthoc_cli.synthesis.engine import check_device, synthesize
from posthoc_cli.synthesis.plan import Plan, plan_synthesis

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from factories import RUN_ID, make_info, write_snapshot

MANY = [round(0.03 + 0.008 * index, 3) for index in range(31)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu", help="where the sums are made: cpu, cuda, mps")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    parser.add_argument(
        "--folder", type=Path, help="for files of up to 10 GB; by default the system's own"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    asked = parser.parse_args(arguments)
    device = str(check_device(asked.device))
    million = 10_000 if asked.quick else 1_000_000
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, sums on {device}"
    )
    repeats = 1 if asked.quick else asked.repeats
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        for parameters in (48 * million, 100 * million):
            measure_model(repeats, folder, parameters, device)
        measure_memory(folder, (10 * million, 1000 * million))


def measure_model(repeats: int, folder: Path, parameters: int, device: str) -> None:
    """Measure one target and 31 targets of a model, and one with the peers, warm and cold."""
    run = folder / "run"
    out = folder / "out.safetensors"
    buffer = mmap.mmap(-1, 4 * 2**20)
    write_snapshots(run, large_tensors(parameters))
    one = planned(run, [0.15])
    many = planned(run, MANY)
    print(f"\n20 float16 snapshots of {parameters:,} parameters; one target")
    runs = {
        "plain readinto loop, one thread": partial(read_plainly, run, buffer),
        "one core, dropped": lambda: exhaust(synthesize(one, device, 1)),
        "all cores, dropped": lambda: exhaust(synthesize(one, device)),
        "all cores, to a file": lambda: write_synthesis(
            one, [out], OutputOptions(device, overwrite=True)
        ),
    }
    show(runs, repeats, one.read_bytes)
    for start, others in ((posthoc_ema, {"update_after_step": 0}), (ema_pytorch, {})):
        if not is_installed(start.__name__):
            continue
        with tempfile.TemporaryDirectory(dir=folder) as checkpoints, without_noise():
            update, average = start(
                Layers(large_tensors(parameters)), Path(checkpoints), 1, 1, torch.float16, **others
            )
            for _ in range(10):
                update()
            os.sync()  # writing back would compete for the disk
            label = f"{start.__name__}, 20 of its own"
            peer = partial(average, 0.15)
            found = times(
                {"ours, kept": lambda: dict(synthesize(one, device)), label: peer}, repeats
            )
        for label, one_found in found.items():
            print(f"  {label:<44}{cell(*one_found)}", flush=True)
    print(f"{len(MANY)} targets")
    show({"dropped": lambda: exhaust(synthesize(many, device))}, repeats)
    shutil.rmtree(run)
    out.unlink()


def measure_memory(folder: Path, models: Sequence[int]) -> None:
    """Measure peak resident memory for models of very different sizes, from sparse files."""
    print("\nPeak resident memory above that of a process that imports torch; one target to a file")
    for parameters in models:
        run = folder / "run"
        out = folder / "out.safetensors"
        write_sparse_snapshots(run, parameters, tensors=20, snapshots=4)
        print(
            f"  {parameters:>13,} parameters, 4 snapshots: {peak_memory(run, out) / 1e6:6.1f} MB",
            flush=True,
        )
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


# --- our snapshots
# ---------------------------------------------------------------------------------


def write_snapshots(folder: Path, shapes: Shapes, snapshots: int = 20) -> None:
    """Write float16 snapshots of random numbers for a float32 model, half of them for each of two
    profiles."""
    generator = torch.Generator().manual_seed(0)
    values = {
        name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()
    }
    for t, sigma_rel in _times(snapshots):
        write_snapshot(folder, t, sigma_rel, RUN_ID, values, **_tracked(shapes))


def write_sparse_snapshots(folder: Path, parameters: int, tensors: int, snapshots: int) -> None:
    """Write the same snapshots of zeros as sparse files: a model of any size takes no disk."""
    folder.mkdir()
    shapes = large_tensors(parameters, tensors)
    entries = lay_out({name: Entry("F16", shape) for name, shape in shapes.items()})
    full = xxhash.xxh3_64_hexdigest(bytes(2 * BLOCK))
    checksums = ""
    for entry in entries.values():
        blocks, rest = divmod(entry.nbytes, 2 * BLOCK)
        checksums += full * blocks + (xxhash.xxh3_64_hexdigest(bytes(rest)) if rest else "")
    for t, sigma_rel in _times(snapshots):
        info = make_info({}, t, sigma_rel, RUN_ID, **_tracked(shapes))
        header = encode_header(entries, info.encoded(), {}, checksums)
        path = snapshot_path(folder, t, sigma_rel)
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(entry.nbytes for entry in entries.values()))


def _times(snapshots: int) -> list[tuple[float, float]]:
    return [(1000.0 * (index // 2 + 1), TRACKED[index % 2]) for index in range(snapshots)]


def _tracked(shapes: Shapes) -> dict[str, Any]:
    return {"sigma_rels": TRACKED, "tensors": dict.fromkeys(shapes, "average F32")}


# --- plain loops
# -----------------------------------------------------------------------------------


def read_plainly(folder: Path, buffer: mmap.mmap) -> None:
    """Read every byte of every snapshot by `readinto`, in one thread, to the start of a page.

    To a place 16 bytes after it, where a bytearray begins, some processors copy at a sixth of the
    speed.
    """
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# --- memory
# ----------------------------------------------------------------------------------------

_PEAK = """
import re, resource, sys, torch

if len(sys.argv) > 1:
    from pathlib import Path
    from posthoc_cli.export.writing import write_synthesis
    from posthoc_cli import disk_sources, plan_synthesis

    plan = plan_synthesis(disk_sources(sys.argv[1]), [0.15], dtype="float32")
    write_synthesis(plan, [Path(sys.argv[2])])
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


def peak_memory(folder: Path, out: Path) -> int:
    """Return the peak resident bytes of a process that writes one target, above those of `import
    torch`."""
    with_synthesis, without = (
        int(subprocess.check_output([sys.executable, "-c", _PEAK, *arguments]))
        for arguments in ([str(folder), str(out)], [])
    )
    return with_synthesis - without


if __name__ == "__main__":
    main()
