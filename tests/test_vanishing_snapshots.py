"""Readers, which take no lock, while a writer thins the snapshots."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_command import Ema
from factories import random_walk, write_run
from safetensors.torch import load_file
from snapshots.recorded import failing, record

from posthoc_cli import PostHocEMA
from posthoc_cli import run as run_module
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots import sources
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.synthesis.plan import Plan, plan_synthesis
from posthoc_cli.tracker import posthoc_ema


def average(folder: Path) -> torch.Tensor:
    return PostHocEMA.from_path(folder).state_dict(sigma_rel=0.15)["0.weight"]


def remove_one(plan: Plan) -> Plan:
    """Delete one of the plan's snapshots, not the newest, as a writer that thins does."""
    plan.sources[len(plan.sources) // 2].path.unlink()  # type: ignore[attr-defined]
    return plan


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The first plan of the tracker or the command, one of whose snapshots is deleted before the plan is used."""
    real, removed = plan_synthesis, list[Plan]()

    def plan_and_remove(*arguments: Any, **options: Any) -> Plan:
        plan = real(*arguments, **options)
        return plan if removed else removed.append(remove_one(plan)) or plan  # type: ignore[func-returns-value]

    monkeypatch.setattr(posthoc_ema, "plan_synthesis", plan_and_remove)
    monkeypatch.setattr(run_module, "plan_synthesis", plan_and_remove)
    return removed


@pytest.mark.parametrize("way", ["state_dict", "command"])
def test_weights_are_made_from_the_remaining_snapshots(tmp_path: Path, way: str, planned: list[Plan], ema: Ema) -> None:
    run, out = record(tmp_path / "run", 20, checkpoint_every=2), tmp_path / "out.safetensors"
    if way == "state_dict":
        found = average(run)
    else:
        result = ema("synthesize", run, "--sigma-rel", "0.15", "--out", out)
        assert result.code == 0
        assert "planning again" in result.err
        found = load_file(out)["0.weight"]
        assert not list(tmp_path.glob(".ema-*"))
    assert len(planned) == 1
    assert torch.equal(found, average(run))


def test_a_snapshot_that_vanishes_while_it_is_measured_is_planned_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without measurements in headers, planning itself reads tensors."""
    write_run(tmp_path, random_walk(80, {"0.weight": (3,)}), range(10, 81, 10))
    real, removed = sources.sample_measurements, []

    def sample(snapshots: Sequence[Snapshot], local: bool = False) -> list[Measurements]:
        if not removed:
            removed.append(snapshots[3].path)
            snapshots[3].path.unlink()
        return real(snapshots, local)

    monkeypatch.setattr("posthoc_cli.snapshots.sources.sample_measurements", sample)
    found = average(tmp_path)
    assert f"{removed[0]}: cannot be opened: no such file or directory; planning again" in caplog.text
    assert torch.equal(found, average(tmp_path))


def test_an_open_file_that_another_host_removes_is_planned_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a local file system the file would stay readable; a client of a network file system gets ESTALE."""
    record(tmp_path, 20, checkpoint_every=2)
    expected = average(tmp_path)
    once = iter([True])
    with failing("read", errno.ESTALE, lambda _file, _view, at: at > 8 and next(once, False)):  # beyond the header
        assert torch.equal(average(tmp_path), expected)
    (warning,) = caplog.records
    assert ".safetensors: cannot be read: stale file handle; planning again" in warning.getMessage()
