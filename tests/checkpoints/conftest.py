"""Checkpoints of a random walk, written in any layout."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_layouts import LAYOUTS, Weights, walk

from posthoc_cli import Run, import_checkpoints

Imported = Callable[..., Run]


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


@pytest.fixture
def imported(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    """Return a function that imports a folder with settings, and opens the run."""

    def make(place: Path, **settings: Any) -> Run:
        out = tmp_path_factory.mktemp("imported")
        assert import_checkpoints(place, out, **settings).written
        return Run(out)

    return make
