"""Trainings whose steps depend on their number only, so that two runs can be compared, and what they leave on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from factories import averages_in, exact_average

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import DirectoryError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.tensorfile import tensor_bytes

STEPS = 50
VALUES = torch.randn(STEPS + 1, 4, 4, generator=torch.Generator().manual_seed(0)).cumsum(0)


def step(model: torch.nn.Module, number: int) -> None:
    """Add noise to the parameters, and 1 to the buffers."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
        for buffer in model.buffers():
            buffer.add_(1)


def train(model: torch.nn.Module, tracker: PostHocEMA, first: int, last: int) -> None:
    for number in range(first, last + 1):
        step(model, number)
        tracker.update_(model)


def matrix() -> torch.nn.Linear:
    return torch.nn.Linear(4, 4, bias=False)


def walk(
    model: torch.nn.Linear, tracker: PostHocEMA, first: int, last: int, scale: float = 1.0, t: float = 0.0
) -> None:
    """Set a `matrix` to the `VALUES` of these steps and track them; with `t` on a clock of that interval."""
    for number in range(first, last + 1):
        with torch.no_grad():
            model.weight.copy_(VALUES[number] * scale)
        tracker.update_(model, t * number if t else None)


def tracked_error(tracker: PostHocEMA, name: str, values: np.ndarray, updates: Sequence[int]) -> float:
    """Return the largest relative distance of a tensor's tracked averages from the float64 sum over the updates."""
    found, distances = averages_in(tracker.state_dict()), []
    for sigma_rel in tracker.settings.sigma_rels:
        exact = exact_average(values, sigma_rel, updates)
        distances.append(np.linalg.norm(found[repr(sigma_rel)][name].numpy() - exact) / np.linalg.norm(exact))
    return float(max(distances))


def wait_for_writers(folder: Path) -> None:
    """Wait until this process's trackers have written all due snapshots to a folder, or failed to."""
    with suppress(DirectoryError):  # the folder has no snapshot yet
        PostHocEMA.from_path(folder)


def times(folder: Path) -> set[float]:
    """Return the times with snapshots."""
    return {snapshot.t for snapshot in read_directory(folder)}


def contents(folder: Path) -> dict[str, dict[str, bytes]]:
    """Return the tensors of the snapshots on the schedule."""
    result = {}
    for snapshot in (s for s in read_directory(folder) if not s.off_schedule):
        result[snapshot.path.name] = {name: bytes(tensor_bytes(snapshot.tensor(name))) for name in snapshot.entries}
    return result


def scheduled(folder: Path) -> dict[str, bytes]:
    """Return the complete files of the snapshots on the schedule."""
    return {s.path.name: s.path.read_bytes() for s in read_directory(folder) if not s.off_schedule}


def as_if_killed(folder: Path) -> None:
    """Remove the snapshots off the schedule, which the end of a training has written."""
    for snapshot in read_directory(folder):
        if snapshot.off_schedule:
            snapshot.path.unlink()


def assert_near(found: Mapping[str, torch.Tensor], exact: Mapping[str, torch.Tensor], within: float = 1e-6) -> None:
    """Fail unless all exact tensors, in float64, are found within a relative and absolute tolerance."""
    for name, tensor in exact.items():
        assert torch.allclose(found[name].double(), tensor, rtol=within, atol=within), name
