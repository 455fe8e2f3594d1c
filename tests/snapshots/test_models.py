"""An index of shards names only files in its own folder; each kind of file and folder is described as such."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from factories import RUN_ID, flip_bit, write_snapshot

from posthoc_cli.errors import DirectoryError, FileFormatError
from posthoc_cli.export.convert import export_file
from posthoc_cli.snapshots.outputs import INDEX_NAME, decode_index, describe, encode_index, is_plain_name

SUFFIX = ".safetensors"


@pytest.mark.parametrize(
    "name",
    [
        "", "a", "a.safetensors.bak", "a.SAFETENSORS", SUFFIX, ".a" + SUFFIX, "..a" + SUFFIX, "../a" + SUFFIX,
        "/a" + SUFFIX, "a/b" + SUFFIX, "a\\b" + SUFFIX, "C:a" + SUFFIX, "a\n" + SUFFIX, "a\0" + SUFFIX,
        "a\x1b[31m" + SUFFIX, "a\u202e" + SUFFIX, "\ud800" + SUFFIX, "x" * (256 - len(SUFFIX)) + SUFFIX,
        "ä" * 122 + SUFFIX,
    ],
)  # fmt: skip
def test_a_hostile_index_is_named(tmp_path: Path, name: str) -> None:
    assert not is_plain_name(name)
    index = tmp_path / INDEX_NAME
    index.write_text(json.dumps({"weight_map": {"w\x1b": name}}))
    with pytest.raises(FileFormatError, match=f"^{re.escape(str(index))}: ") as caught:
        decode_index(index)
    if name.isprintable() and "\ud800" not in name:
        assert r"tensor 'w\x1b'" in str(caught.value)
        assert "is not the name of a file in its folder" in str(caught.value)


def test_an_index_is_read_back_and_has_the_form_of_other_libraries(tmp_path: Path) -> None:
    text = encode_index({"b": "2" + SUFFIX, "a": "2" + SUFFIX, "c": "1" + SUFFIX}, 12)
    assert text.decode() == (
        '{\n  "metadata": {\n    "total_size": 12\n  },\n  "weight_map": {\n'
        f'    "a": "2{SUFFIX}",\n    "b": "2{SUFFIX}",\n    "c": "1{SUFFIX}"\n  }}\n}}\n'
    )
    (tmp_path / INDEX_NAME).write_bytes(text)
    found = decode_index(tmp_path / INDEX_NAME)
    assert found == {"1" + SUFFIX: ["c"], "2" + SUFFIX: ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "damaged index"), ("[]", "must be a JSON object"), ("{}", "no weight_map"), ("{", "damaged index"),
        ("[" * 100_000, "damaged index"), ('{"weight_map":{"a":1}}', "1 is not the name of a file in its folder"),
        ('{"weight_map":{"a":"\\ud800"}}', "is no Unicode text"), ('{"weight_map":{}}', "or an empty one"),
    ],
)  # fmt: skip
def test_an_invalid_index_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(FileFormatError, match=message):
        describe(tmp_path / INDEX_NAME)


# --- descriptions; `ema info` prints them, see tests/cli and the recorded reports

VALUES = {"a": torch.arange(6.0), "n": torch.tensor(3)}


def test_each_kind_is_described_with_its_path(tmp_path: Path) -> None:
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
    assert describe(shards)["shards"] == 2
    assert describe(tmp_path / "run")["profiles"][0]["times"] == [10]


def test_a_damaged_snapshot_is_a_problem_of_its_directory(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, VALUES)
    write_snapshot(tmp_path, 20, 0.05, RUN_ID, VALUES)
    flip_bit(path, 30)
    found = describe(tmp_path)
    assert len(found["snapshots"]) == 1
    assert [problem.startswith(f"{path}: damaged header") for problem in found["problems"]] == [True]
    path.unlink()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DirectoryError):
        describe(tmp_path / "empty")
