"""Checkpoints of a random walk, written in any layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_layouts import LAYOUTS, Weights, walk


@pytest.fixture(scope="session")
def weights() -> dict[int, Weights]:
    return walk()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return where a test's checkpoints go."""
    return tmp_path / "files"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return where a test's import goes."""
    return tmp_path / "run"


@pytest.fixture
def write(
    tmp_path: Path,
    weights: dict[int, Weights],
) -> Callable[[str], Path]:
    """Return a function that writes all steps in a layout, and returns the folder."""

    def make(layout: str) -> Path:
        run = tmp_path / "run"
        run.mkdir()
        for step, state in weights.items():
            LAYOUTS[layout](run, step, state)
        return run

    return make
