"""The memory of a tracker of two profiles of float32 parameters whose snapshots are float16, and of large models.

Measured of a model of 34 million parameters: what the tracker holds, and what the process has more at its peak.
"""

from __future__ import annotations

import resource
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from posthoc_cli import PostHocEMA


def main() -> None:
    """Print bytes a parameter, and the GB of 1, 7 and 70 billion, alone and in each of 8 that share the model."""
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
