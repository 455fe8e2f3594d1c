"""Checkpoints of a random walk, written in any layout."""

import pytest
from checkpoint_layouts import LAYOUTS, walk


@pytest.fixture(scope="session")
def weights():
    return walk()


@pytest.fixture
def files(tmp_path):
    """Return where a test's checkpoints go."""
    return tmp_path / "files"


@pytest.fixture
def run(tmp_path):
    """Return where a test's import goes."""
    return tmp_path / "run"


@pytest.fixture
def write(tmp_path, weights):
    """Return a function that writes all steps in a layout, and returns the folder."""

    def make(layout):
        run = tmp_path / "run"
        run.mkdir()
        for step, state in weights.items():
            LAYOUTS[layout](run, step, state)
        return run

    return make
