"""Fixtures of the tracker's tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def one_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give all runs the same id, so that files of two directories can be compared byte for byte."""
    monkeypatch.setattr("posthoc_cli.tracker.posthoc_ema.secrets.token_hex", lambda count: "5eed" * (count // 2))


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process look like the second one of a group."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda _=None: 1)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", torch.distributed.HashStore)
