"""Files and directories that tests may damage: copies of files that are made once."""

import shutil
from pathlib import Path

import pytest
from snapshots.recorded import record, small_output, small_snapshot


@pytest.fixture(scope="session")
def _recorded(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recorded") / "run")


@pytest.fixture
def run(_recorded, tmp_path):
    """A directory with snapshots at 6 times x 2 profiles, up to step 60, and a state."""
    return Path(shutil.copytree(_recorded, tmp_path / "run"))


@pytest.fixture(scope="session")
def _small(tmp_path_factory):
    snapshot = small_snapshot(tmp_path_factory.mktemp("snapshot"))
    output = small_output(tmp_path_factory.mktemp("output"))
    return {"snapshot": snapshot, "output": output}


@pytest.fixture
def small(_small, tmp_path):
    """A function that copies a small file of a kind, "snapshot" or "output", and returns its
    path."""
    return lambda kind: Path(shutil.copy(_small[kind], tmp_path))
