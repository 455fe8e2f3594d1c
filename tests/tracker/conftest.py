"""Fixtures of the tracker's tests."""

from __future__ import annotations

import pytest


@pytest.fixture
def one_run_id(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give all runs the same id, so that files of two directories can be compared byte for byte."""
    monkeypatch.setattr("posthoc_cli.tracker.resuming.secrets.token_hex", lambda count: "5eed" * (count // 2))
