"""Runs of a real tracker, for tests that harm them."""

from __future__ import annotations

from pathlib import Path

import torch

from posthoc_cli import PostHocEMA


class Walk:
    """A model whose weights wander the same way whenever it is trained."""

    def __init__(self, dtype: torch.dtype = torch.float32, scale: float = 0.1) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(torch.nn.Linear(30, 20), torch.nn.BatchNorm1d(20)).to(dtype)
        self.scale = scale
        self.generator = torch.Generator().manual_seed(1)

    def train(self, tracker: PostHocEMA, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(self.scale * torch.randn(parameter.shape, generator=self.generator))
            tracker.update_(self.model)


def new_tracker(walk: Walk, folder: Path, **options: object) -> PostHocEMA:
    """One that writes a snapshot at every tenth step and keeps all, unless `options` say otherwise."""
    settings = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": None, **options}
    return PostHocEMA.from_model(walk.model, folder, **settings)  # type: ignore[arg-type]


def record(
    folder: Path, steps: int = 60, dtype: torch.dtype = torch.float32, scale: float = 0.1, **options: object
) -> Path:
    """Train for so many steps; returns the folder with its snapshots."""
    walk = Walk(dtype, scale)
    with new_tracker(walk, folder, **options) as tracker:
        walk.train(tracker, steps)
    return folder
