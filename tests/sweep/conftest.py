"""A run for sweeps."""

from __future__ import annotations

import pytest
from factories import random_walk, write_run

from posthoc_cli import Run


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("swept") / "run"
    write_run(folder, random_walk(20, {"a": (30, 10), "b": (7,)}), range(1, 21))
    return Run(folder)
