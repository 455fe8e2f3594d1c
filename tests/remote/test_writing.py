"""Runs in an object store that a tracker writes: spool, uploads, lease."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.remote.path import RemotePath
from posthoc_cli.snapshots.directory import find_snapshots

SETTINGS = {"update_every": 1, "checkpoint_every": 10, "max_checkpoints": 4}


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for what is not uploaded yet."""
    monkeypatch.setenv("EMA_SPOOL", str(tmp_path / "spool"))
    return tmp_path / "spool"


def train(model: torch.nn.Module, tracker: PostHocEMA, first: int, last: int) -> None:
    for number in range(first, last + 1):
        with torch.no_grad():
            model.weight.copy_(torch.randn(4, 4, generator=torch.Generator().manual_seed(number)))
        tracker.update_(model)


def waiting(spool: Path) -> list[Path]:
    return [path for path in spool.rglob("*.safetensors")]


def test_a_run_is_in_the_store_when_the_tracker_is_closed(bucket: str, spool: Path, tmp_path: Path) -> None:
    url, model = f"{bucket}/some/run", torch.nn.Linear(4, 4, bias=False)
    with PostHocEMA.from_model(model, url, **SETTINGS) as tracker:
        train(model, tracker, 1, 95)
        assert str(tracker.checkpoint_dir) == url
    local = PostHocEMA.from_model(model, tmp_path / "local", **SETTINGS)
    train(model, local, 1, 95)
    local.close()
    there = find_snapshots(RemotePath(url))
    assert [s.name for s in there] == [s.name for s in find_snapshots(tmp_path / "local")]
    assert not waiting(spool)
    ours, theirs = Run(url).average(0.15), Run(tmp_path / "local").average(0.15)
    assert torch.equal(ours["weight"], theirs["weight"])
