"""Descriptions from headers; `ema info` prints them, see tests/cli and the recorded reports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import RUN_ID, flip_bit, write_snapshot

from posthoc_cli.errors import DirectoryError
from posthoc_cli.export.convert import export_file
from posthoc_cli.snapshots.description import describe
from posthoc_cli.snapshots.outputs import INDEX_NAME

VALUES = {"a": torch.arange(6.0), "n": torch.tensor(3)}


def test_each_kind_says_what_and_where_it_is(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, VALUES)
    single, shards = tmp_path / "single", tmp_path / "shards"
    single.mkdir()
    export_file(snapshot, single / "model.safetensors")
    export_file(snapshot, shards, max_shard_size="24")
    for path, kind, where in (
        (snapshot, "snapshot", snapshot),
        (tmp_path / "run", "directory", tmp_path / "run"),
        (single, "output", single / "model.safetensors"),
        (shards, "output", shards),
        (shards / INDEX_NAME, "output", shards / INDEX_NAME),
        (tmp_path, "outputs", tmp_path),
    ):
        found = describe(path)
        assert (found["kind"], found["path"]) == (kind, str(where)), path
    assert describe(shards)["files"] == 2
    assert describe(tmp_path / "run")["profiles"][0]["times"] == [10]


def test_a_damaged_snapshot_is_a_problem_of_its_directory(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, VALUES)
    write_snapshot(tmp_path, 20, 0.05, RUN_ID, VALUES)
    flip_bit(path, 30)
    found = describe(tmp_path)
    assert found["snapshots"] == 1
    assert [problem.startswith(f"{path}: damaged header") for problem in found["problems"]] == [True]
    path.unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DirectoryError):
        describe(tmp_path / "empty")
