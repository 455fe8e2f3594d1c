"""A run to search, and the folder of a sweep."""

import pytest
from factories import random_walk, write_run

from posthoc_cli import Run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run whose weights are the step, so that those of an average are its mean time."""
    folder = tmp_path_factory.mktemp("swept") / "run"
    walk = random_walk(40, {"a": (40,)})
    for step, weights in enumerate(walk, start=1):
        weights["a"] = step + 1e-3 * weights["a"]
    write_run(folder, walk, range(1, 41))
    return Run(folder)


@pytest.fixture
def out(tmp_path):
    """The folder of a sweep, which does not exist yet."""
    return tmp_path / "out"
