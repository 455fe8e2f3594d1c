"""What `bench_synthesis.py` measures: snapshots of made-up models, the peers' own checkpoints, plain loops, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash

from posthoc_cli.snapshots.directory import snapshot_path
from posthoc_cli.snapshots.sources import TrackedTensor
from posthoc_cli.snapshots.tensorfile import BLOCK, Entry, encode_header, lay_out

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from factories import RUN_ID, make_info, write_snapshot

TRACKED = (0.05, 0.28)
Shapes = Mapping[str, tuple[int, ...]]


def large_tensors(parameters: int, count: int = 20) -> dict[str, tuple[int, ...]]:
    """Make a model of that many parameters in at least `count` equal matrices."""
    width = 1024
    rows = max(1, parameters // count // width)
    return {f"layers.{index}.weight": (rows, width) for index in range(count)}


def small_tensors(count: int) -> dict[str, tuple[int, ...]]:
    """Make a model of 64 x 64 matrices."""
    return {f"layers.{index}.weight": (64, 64) for index in range(count)}


# --- our snapshots ---------------------------------------------------------------------------------


def write_snapshots(folder: Path, shapes: Shapes, snapshots: int = 20) -> None:
    """Write float16 snapshots of random numbers for a float32 model, half of them for each of two profiles."""
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator).half() for name, shape in shapes.items()}
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
    return {"sigma_rels": TRACKED, "tensors": {name: TrackedTensor("average", "F32") for name in shapes}}


# --- plain loops -----------------------------------------------------------------------------------


def read_plainly(folder: Path, buffer: bytearray) -> None:
    """Read every byte of every snapshot by `readinto`, in one thread."""
    for path in sorted(folder.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


# --- memory ----------------------------------------------------------------------------------------

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
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))
"""
# Linux lets a process inherit ru_maxrss from its parent; VmHWM is the same quantity, counted from its own start.


def peak_memory(folder: Path, out: Path) -> int:
    """Return the peak resident bytes of a process that writes one target, above those of `import torch`."""
    with_synthesis, without = (
        int(subprocess.check_output([sys.executable, "-c", _PEAK, *arguments]))
        for arguments in ([str(folder), str(out)], [])
    )
    return with_synthesis - without


# --- the peers -------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """A model with parameters of these shapes."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = torch.nn.ParameterList(torch.randn(shape) for shape in shapes.values())
