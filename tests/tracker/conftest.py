"""Fixtures of the tracker's tests."""

import pytest

from posthoc_cli.tracker import memory


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide the tensors of small models into many tiles, as those of large ones are."""
    monkeypatch.setattr(memory, "TILE", 64)
