"""The measurements in a snapshot's header agree with a direct computation in float64.

The exact averages are those of the tracker at the time of a snapshot, the stored ones those that safetensors reads.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_model
from safetensors.torch import load_file
from snapshots.recorded import call_number, failing

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import WriteError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker import measuring, memory

Tensors = dict[str, torch.Tensor]
Exact = dict[tuple[float, float], Tensors]
SETTINGS: dict = {"update_every": 1, "checkpoint_every": 5}


def train(tracker: PostHocEMA, model: torch.nn.Module, last: int) -> Exact:
    """Train up to a step; return the exact averages at the times of snapshots, by t and sigma_rel."""
    exact: Exact = {}
    while tracker.step < last:
        generator = torch.Generator().manual_seed(tracker.step)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_((change * 0.1).to(parameter))
        tracker.update_(model)
        if tracker.step % 5 == 0:
            rels = tracker.settings.sigma_rels
            exact |= {(tracker.t, s): tracker.state_dict(s, dtype="float64") for s in rels}
    tracker.flush()
    return exact


def check(folder: Path, known: Exact) -> None:
    for snapshot in read_directory(folder):
        stored, found = load_file(snapshot.path), snapshot.measurements
        exact = {name: known[snapshot.t, snapshot.sigma_rel][name].cpu() for name in snapshot.averages}
        # Differences of float32 are rounded by 2^-24 of themselves; sums are float64.
        assert found.norm == pytest.approx(sum(squares(one) for one in exact.values()), rel=1e-12)
        errors = [squares(one - stored[name].double()) for name, one in exact.items()]
        assert found.rounding == pytest.approx(sum(errors), rel=1e-6)


def squares(tensor: torch.Tensor) -> float:
    return float(np.sum(tensor.double().numpy() ** 2))


def check_run(model: torch.nn.Module, folder: Path, *rels: tuple[float, ...], **settings: Any) -> None:
    with PostHocEMA.from_model(model, folder, *rels, **SETTINGS | settings) as tracker:
        exact = train(tracker, model, 10)
    check(folder, exact)


@pytest.mark.parametrize("sigma_rels", [(0.1,), (0.05, 0.1, 0.28)])
@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_measurements_are_those_of_a_direct_computation(
    tmp_path: Path, sigma_rels: tuple[float, ...], stored: str | None, dtype: torch.dtype
) -> None:
    """A model with tied parameters, buffers (not measured) and a frozen parameter."""
    check_run(tiny_model().to(dtype), tmp_path, sigma_rels, checkpoint_dtype=stored)
    assert read_directory(tmp_path)[-1].sigma_rels == sigma_rels


@pytest.mark.parametrize("scale", [1e6, 1e-6, 2e-8])
def test_a_tensor_that_is_stored_in_float32_counts_as_not_rounded(tmp_path: Path, scale: float) -> None:
    """Its values would be too large, too small (subnormal) or zero in float16."""
    model = torch.nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.fill_(scale)
    model.weight.requires_grad_(False)  # constant, but tracked
    check_run(model, tmp_path, include="*")
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


def test_a_profile_that_could_not_be_written_is_written_later(tmp_path: Path) -> None:
    """Writing the second of two files fails: the first is complete, and nothing is left of the second."""
    model = tiny_model()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        exact = train(tracker, model, 9)
        refused = pytest.raises(WriteError, match="no space left")
        with failing("fsync", errno.ENOSPC, call_number(1)), refused:
            exact |= train(tracker, model, 10)
        assert [(s.t, s.sigma_rel) for s in read_directory(tmp_path)] == [(5, 0.05), (5, 0.28), (10, 0.05)]
        assert not list(tmp_path.glob(".ema-*"))
        tracker.snapshot()
        exact |= {(tracker.t, s): tracker.state_dict(s, dtype="float64") for s in (0.05, 0.28)}
        check(tmp_path, exact)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_measurements_of_a_subset_are_those_of_all_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, stored: str
) -> None:
    """Steps are from far above the rounding to far below it. Sums of n squares of normal numbers have a relative
    standard error of (2 / n)^(1/2); LayerNorm's weights among others make it larger: four times that is allowed."""
    found = []
    for most in (2**20, 2_000):
        monkeypatch.setattr(measuring, "MEASURED_ELEMENTS", most)
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.LayerNorm(200), torch.nn.Linear(200, 300))
        options = SETTINGS | {"checkpoint_dtype": stored}
        with PostHocEMA.from_model(model, tmp_path / str(most), **options) as ema:
            for number in range(1, 31):
                for parameter in model.parameters():
                    parameter.data.mul_(1 - 1 / (10 + number)).add_(torch.randn(parameter.shape), alpha=size)
                ema.update_(model)
        found.append([snapshot.measurements for snapshot in read_directory(tmp_path / str(most))])
    off = 4 * (2 / 2_000) ** 0.5
    for exact, sampled in zip(*found, strict=True):
        assert sampled.norm == pytest.approx(exact.norm, rel=off)
        assert sampled.norm != exact.norm
        assert sampled.rounding == pytest.approx(exact.rounding, rel=2 * off)  # larger in each binade


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_averages_on_a_device_are_measured_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "DEVICE_TILE", 1_000)
    check_run(torch.nn.Linear(123, 45).cuda(), tmp_path)
