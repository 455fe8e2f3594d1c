"""The measurements in a snapshot's header agree with a direct computation in float64.

The exact averages are those of the tracker at the time of a snapshot, the stored ones those that safetensors reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import refuse_for_space, tiny_model
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import WriteError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.tracker import memory

Tensors = dict[str, torch.Tensor]
SETTINGS: dict = {"update_every": 1, "checkpoint_every": 5}


@dataclass
class Watched:
    """A tracker and its exact averages at the times of its snapshots, by t and sigma_rel."""

    tracker: PostHocEMA
    exact: dict[tuple[float, float], Tensors] = field(default_factory=dict)

    def train(self, model: torch.nn.Module, first: int, last: int) -> None:
        for step in range(first, last + 1):
            generator = torch.Generator().manual_seed(step)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data.add_((change * 0.1).to(parameter))
            self.tracker.update_(model)
            if step % SETTINGS["checkpoint_every"] == 0 or step == last:
                self.look()
        self.tracker.flush()

    def look(self) -> None:
        for sigma_rel in self.tracker.settings.sigma_rels:
            self.exact[self.tracker.t, sigma_rel] = self.tracker.state_dict(sigma_rel, dtype="float64")

    def check(self, info: Snapshot, stored: Tensors | None = None) -> None:
        exact = {name: self.exact[info.t, info.sigma_rel][name] for name in info.averages}
        found = info.measurements
        assert found is not None
        # Differences of float32 are rounded by 2^-24 of themselves; sums are float64.
        assert found.norm == pytest.approx(squares(exact), rel=1e-12)
        assert found.rounding == pytest.approx(0.0 if stored is None else squares(exact, stored), rel=1e-6)

    def check_all(self, folder: Path) -> None:
        for snapshot in read_directory(folder):
            self.check(snapshot, load_file(snapshot.path))


def squares(tensors: Tensors, other: Tensors | None = None) -> float:
    """Return the squared norm, or the squared distance from `other`, in float64."""
    total = 0.0
    for name, tensor in tensors.items():
        difference = tensor.double().numpy() - (0 if other is None else other[name].double().numpy())
        total += float(np.sum(difference**2))
    return total


def watched_run(model: torch.nn.Module, folder: Path, last: int, *rels: tuple[float, ...], **settings: Any) -> Watched:
    with PostHocEMA.from_model(model, folder, *rels, **SETTINGS | settings) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, last)
    return watched


@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.28), (0.05, 0.1, 0.28)])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_measurements_are_those_of_a_direct_computation(
    tmp_path: Path, sigma_rels: tuple[float, ...], stored: str | None, dtype: torch.dtype
) -> None:
    """A model with tied parameters, buffers (not measured) and a frozen parameter."""
    model = tiny_model().to(dtype)
    watched_run(model, tmp_path, 15, sigma_rels, checkpoint_dtype=stored).check_all(tmp_path)
    assert read_directory(tmp_path)[-1].sigma_rels == sigma_rels


@pytest.mark.parametrize("scale", [1e6, 1e-6, 2e-8])
def test_a_tensor_that_is_stored_in_float32_counts_as_not_rounded(tmp_path: Path, scale: float) -> None:
    """Its values would be too large, too small (subnormal) or zero in float16."""
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(scale)
    model.weight.requires_grad_(False)  # constant, but tracked
    watched_run(model, tmp_path, 10, include="*").check_all(tmp_path)
    for snapshot in read_directory(tmp_path):
        found = {name: entry.dtype for name, entry in snapshot.entries.items()}
        assert found == {"weight": "F32", "bias": "F16"}


def test_values_that_only_float64_can_hold_are_stored_in_it_and_not_measured(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2, dtype=torch.float64)
    with torch.no_grad():
        model.bias.fill_(1e200)
    with PostHocEMA.from_model(model, tmp_path, (0.28,), update_every=1, checkpoint_every=1) as tracker:
        tracker.update_(model)
        tracker.update_(model)
    for snapshot in read_directory(tmp_path):
        assert snapshot.entries["bias"].dtype == "F64"
        assert snapshot.measurements is None
        assert torch.equal(load_file(snapshot.path)["bias"], model.bias)


def test_a_profile_that_could_not_be_written_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the second of two files fails: the first is complete, and nothing is left of the second."""
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 9)
        real, calls = files.system.fsync, iter(range(9))

        def fail_second(descriptor: int) -> None:
            refuse_for_space() if next(calls) == 1 else real(descriptor)

        with monkeypatch.context() as fault:
            fault.setattr(files.system, "fsync", fail_second)
            with pytest.raises(WriteError, match="no space left"):
                watched.train(model, 10, 10)
        assert [(s.t, s.sigma_rel) for s in read_directory(tmp_path)] == [(5, 0.05), (5, 0.28), (10, 0.05)]
        assert not list(tmp_path.glob(".ema-*"))
        tracker.snapshot()
        watched.look()
        watched.check_all(tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_averages_on_a_device_are_measured_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "DEVICE_TILE", 1_000)
    model = torch.nn.Linear(123, 45).cuda()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        watched = Watched(tracker)
        watched.train(model, 1, 10)
        watched.exact = {key: {n: t.cpu() for n, t in value.items()} for key, value in watched.exact.items()}
    watched.check_all(tmp_path)
