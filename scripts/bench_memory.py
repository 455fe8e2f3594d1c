"""The memory of a tracker of two profiles of float32 parameters whose snapshots are float16.

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
    """Print bytes a parameter, and the GB of 7 billion."""
    for device in ("model", "cpu"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a peak is that of a process
            held, peak = pool.submit(_bytes_each, device).result()
        print(
            f'device="{device}": {held:.1f} bytes a parameter held, {7 * held:,.0f} GB of 7 billion; '
            f"{peak:.1f} bytes more in the process at its peak"
        )


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
