"""What a model too large for any test takes, on paper: a synthesis, and with `--hook` the memory of a tracker.

    seconds of a process = bytes read / min(read rate, rate of the sums) + bytes written / write rate

Reading overlaps with the sums, so that the slower one counts; writing and fsync are counted as if they came after
it. The rates are those that `scripts/bench_synthesis.py` measures on the machine in question. The tracker's bytes a
parameter are measured here, of a model of 34 million: what it holds, and what the process has more at its peak.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from posthoc_cli import PostHocEMA

GB = 1e9


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parameters", type=float, default=70e9)
    parser.add_argument("--snapshots", type=int, default=40)
    parser.add_argument("--item-bytes", type=int, default=2, help="of a stored and of a written element")
    parser.add_argument("--targets", type=int, default=1)
    parser.add_argument("--machines", type=int, default=8)
    parser.add_argument("--disk", type=float, default=2.2, help="GB/s that a machine's disk reads")
    parser.add_argument("--disk-write", type=float, default=1.6, help="GB/s that it writes, fsync included")
    parser.add_argument("--cores", type=float, default=11.0, help="GB/s of verified input that its cores sum up")
    parser.add_argument("--hook", action="store_true", help="the memory of a tracker instead")
    asked = parser.parse_args()
    if asked.hook:
        print_hook()
        return
    model = asked.parameters * asked.item_bytes / GB
    read, written = model * asked.snapshots, model * asked.targets
    print("| | one machine |", f"{asked.machines} machines |")
    print("| --- | ---: | ---: |")
    rows = [("GB read, each", read), ("GB written, each", written)]
    writing = written / asked.disk_write
    rows.append((f"s from a disk of {asked.disk:g} GB/s", read / min(asked.disk, asked.cores) + writing))
    rows.append((f"s from memory at {asked.cores:g} GB/s", read / asked.cores + writing))
    for name, value in rows:
        print(f"| {name} | {value:,.4g} | {value / asked.machines:,.4g} |")


def print_hook() -> None:
    """Print the memory of a tracker of two profiles whose snapshots are float16."""
    found = {}
    for device in ("model", "cpu"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a peak is that of a process
            found[device], peak = pool.submit(_bytes_each, device).result()
        print(
            f'device="{device}": {found[device]:.1f} bytes a parameter held, {peak:.1f} more in the process at its peak'
        )
    sizes = (1, 7, 70)
    print("| |", " | ".join(f"{size} B | over 8" for size in sizes), "|")
    print("| --- |" + " ---: | ---: |" * len(sizes))
    for device, nbytes in found.items():
        cells = (f"{size * nbytes:,.0f} | {size * nbytes / 8:,.1f}" for size in sizes)
        print(f'| `device="{device}"`, {nbytes:.1f} bytes a parameter |', " | ".join(cells), "|")


def _bytes_each(device: str) -> tuple[float, float]:
    """Bytes a parameter: held, and that the process has more at its peak."""
    _measured(torch.nn.Linear(300, 300), "cpu")  # what torch and the threads take once
    model = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(8))
    before, count = _resident(), sum(parameter.numel() for parameter in model.parameters())
    return _measured(model, device) / count, (_resident() - before) / count


def _measured(model: torch.nn.Module, device: str) -> float:
    """The bytes that a tracker holds after two snapshots."""
    with tempfile.TemporaryDirectory() as folder:
        ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=2, device=device)
        with ema:
            for _ in range(4):
                ema.update_(model)
            ema.flush()
            return ema.metrics()["bytes"]


def _resident() -> float:
    """The most bytes that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
