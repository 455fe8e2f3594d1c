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

Tensors = dict[str, torch.Tensor]
Exact = dict[tuple[float, float], Tensors]
SETTINGS: dict = {"update_every": 1, "checkpoint_every": 5}


def train(tracker: PostHocEMA, model: torch.nn.Module, last: int, size: float = 0.1) -> Exact:
    """Train up to a step; return the exact averages at the times of snapshots, by t and sigma_rel."""
    exact: Exact = {}
    while tracker.step < last:
        generator = torch.Generator().manual_seed(tracker.step)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.add_((change * size).to(parameter))
        tracker.update_(model)
        if tracker.step % 5 == 0:
            rels = tracker.settings.sigma_rels
            exact |= {(tracker.t, s): tracker.state_dict(s, dtype="float64") for s in rels}
    tracker.flush()
    return exact


def check(folder: Path, known: Exact, norm: float = 1e-12, rounding: float = 1e-6) -> None:
    for snapshot in read_directory(folder):
        stored, found = load_file(snapshot.path), snapshot.measurements
        exact = {name: known[snapshot.t, snapshot.sigma_rel][name].cpu() for name in snapshot.averages}
        # Differences of float32 are rounded by 2^-24 of themselves; sums are float64.
        assert found.norm == pytest.approx(sum(squares(one) for one in exact.values()), rel=norm)
        errors = [squares(one - stored[name].double()) for name, one in exact.items()]
        assert found.rounding == pytest.approx(sum(errors), rel=rounding)


def squares(tensor: torch.Tensor) -> float:
    return float(np.sum(tensor.double().numpy() ** 2))


def check_run(model: torch.nn.Module, folder: Path, *rels: tuple[float, ...], **settings: Any) -> None:
    with PostHocEMA.from_model(model, folder, *rels, **SETTINGS | settings) as tracker:
        exact = train(tracker, model, 10)
    check(folder, exact)


@pytest.mark.parametrize("stored", ["float16", "bfloat16", "float32", "float64", None])
@pytest.mark.parametrize(("dtype", "sigma_rels"), [
    (torch.float32, (0.05, 0.1, 0.28)), (torch.float64, (0.1,)), (torch.bfloat16, (0.05, 0.28)),
])  # fmt: skip
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


@pytest.mark.parametrize(("stored", "size"), [("float16", 1e-2), ("bfloat16", 1e-4), ("float16", 1e-5)])
def test_measurements_of_a_subset_are_those_of_all_elements(tmp_path: Path, size: float, stored: str) -> None:
    """Steps are from far above the rounding to far below it. Sums of n squares of normal numbers have a relative
    standard error of (2 / n)^(1/2): four times that is allowed."""
    model = torch.nn.Sequential(torch.nn.Linear(1500, 600), torch.nn.LayerNorm(600), torch.nn.Linear(600, 1500))
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS | {"checkpoint_dtype": stored}) as tracker:
        exact = train(tracker, model, 10, size)
    off = 4 * (2 / 2**19) ** 0.5
    check(tmp_path, exact, norm=off, rounding=2 * off)  # larger in each binade
    norms = [sum(map(squares, exact[s.t, s.sigma_rel].values())) for s in read_directory(tmp_path)]
    assert norms != [s.measurements.norm for s in read_directory(tmp_path)]


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_averages_on_a_device_are_measured_there(tmp_path: Path) -> None:
    """All elements of a small model, and a subset of one of several tiles."""
    check_run(torch.nn.Linear(123, 45).cuda(), tmp_path / "small")
    model = torch.nn.Linear(2100, 2100).cuda()
    with PostHocEMA.from_model(model, tmp_path / "large", **SETTINGS) as tracker:
        exact = train(tracker, model, 10)
    check(tmp_path / "large", exact, norm=0.01, rounding=0.02)
