"""Measure the memory of a tracker of two profiles of float32 parameters with float16 snapshots."""

from __future__ import annotations

import tempfile

import torch

from posthoc_cli import PostHocEMA


def main() -> None:
    """Print bytes a parameter after two snapshots of a model of 34 million parameters, and GB for 7 billion."""
    model = torch.nn.ModuleList(torch.nn.Linear(2048, 2048, bias=False) for _ in range(8))
    for device in ("model", "cpu"):
        with (
            tempfile.TemporaryDirectory() as folder,
            PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=2, device=device) as ema,
        ):
            for _ in range(4):
                ema.update_(model)
            ema.flush()
            held = ema.metrics()["bytes"] / sum(parameter.numel() for parameter in model.parameters())
        print(f'device="{device}": {held:.1f} bytes a parameter held, {7 * held:,.0f} GB of 7 billion')


if __name__ == "__main__":
    main()
