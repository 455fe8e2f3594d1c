"""Checkpoints of a random walk, written in any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_layouts import LAYOUTS, Weights, walk


@pytest.fixture(scope="session")
def weights() -> dict[int, Weights]:
    """The weights at some steps."""
    return walk()


@pytest.fixture
def write(tmp_path: Path, weights: dict[int, Weights]) -> Callable[[str], Path]:
    """Write all steps in a layout, and give the folder."""

    def make(layout: str) -> Path:
        run = tmp_path / "run"
        run.mkdir()
        for step, state in weights.items():
            LAYOUTS[layout](run, step, state)
        return run

    return make
