"""A run that counts images while its batch size changes: what its snapshots know of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis
from posthoc_cli.snapshots.store import read_directory
from posthoc_cli.synthesis import synthesize
from posthoc_cli.targets import Target

STEPS = 2000
SETTINGS: dict = {
    "sigma_rels": (0.03, 0.05, 0.10, 0.15, 0.20, 0.28), "update_every": 1, "checkpoint_every": 250,
    "checkpoint_dtype": None, "t_unit": "images",
}  # fmt: skip


def changing_twice() -> np.ndarray:
    """Images seen after each step: the batch grows and shrinks again between two snapshots."""
    batch = np.full(STEPS, 64.0)
    batch[1290:1440] = 256
    return np.cumsum(batch)


def uneven(steps: int = STEPS) -> np.ndarray:
    """Tokens seen after each step: a thousand, up to 20 % more or fewer."""
    return np.cumsum(np.random.default_rng(0).integers(800, 1201, steps)).astype(np.float64)


def path(times: np.ndarray) -> np.ndarray:
    """Where the network is after each step: it settles, and drifts, and swings slowly; shape [steps, 3]."""
    s = times / times[-1]
    return np.stack([np.exp(-3 * s), 1 + s, np.sin(4 * s) + 2], axis=1)


def track(folder: Path, times: Sequence[float], first: int = 1, tracker: PostHocEMA | None = None) -> PostHocEMA:
    """Train from step `first` on along `path`, the network's values being those of its time."""
    model = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))})
    values = torch.from_numpy(path(np.asarray(times)))
    tracker = tracker or PostHocEMA.from_model(model, folder, **SETTINGS)
    with tracker, torch.no_grad():
        for step in range(first, len(times) + 1):
            model["w"].copy_(values[step - 1])
            tracker.update_(model, t=times[step - 1])
    return tracker


def clocks(folder: Path) -> dict[float, tuple]:
    return {snapshot.info.t: snapshot.info.clock for snapshot in read_directory(folder)}


def error(folder: Path, target: Target, exact: np.ndarray, known: bool = True) -> float:
    """Relative distance of the synthesized weights; with `known` False, as if headers had no clock."""
    sources = disk_sources(folder)
    if not known:
        sources = [replace(s, snapshot=replace(s.snapshot, info=replace(s.info, clock=()))) for s in sources]
    plan = plan_synthesis(sources, [target])
    (found,) = dict(synthesize(plan))["w"]
    return float(np.linalg.norm(found.numpy() - exact) / np.linalg.norm(exact))
