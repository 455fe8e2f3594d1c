"""An index of shards leads to files beside it and nowhere else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.outputs import INDEX_NAME, ShardIndex, decode_index, encode_index, is_plain_name
from posthoc_cli.snapshots.reader import read_small_file

SUFFIX = ".safetensors"


@pytest.mark.parametrize(
    "name",
    ["a", "model-00001-of-00002", "ä", "模型", "a b", "a..b", "x" * (255 - len(SUFFIX)), "ä" * 121, "-", "$HOME"],
)
def test_a_plain_name_may_be_any_visible_one(name: str) -> None:
    assert is_plain_name(name + SUFFIX)


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
        assert "is not the name of a file beside it" in str(caught.value)


def test_what_is_written_is_read_and_is_as_other_libraries_write_it(tmp_path: Path) -> None:
    text = encode_index({"b": "2" + SUFFIX, "a": "2" + SUFFIX, "c": "1" + SUFFIX}, 12)
    assert text.decode() == (
        '{\n  "metadata": {\n    "total_size": 12\n  },\n  "weight_map": {\n'
        f'    "a": "2{SUFFIX}",\n    "b": "2{SUFFIX}",\n    "c": "1{SUFFIX}"\n  }}\n}}\n'
    )
    (tmp_path / INDEX_NAME).write_bytes(text)
    found = decode_index(tmp_path / INDEX_NAME)
    assert found == ShardIndex({"1" + SUFFIX: ["c"], "2" + SUFFIX: ["a", "b"]}, 12)
    assert list(found.shards) == ["1" + SUFFIX, "2" + SUFFIX]


@pytest.mark.parametrize("total", [None, "12", 12.0, True, [12]])
def test_a_size_that_is_no_whole_number_says_nothing(tmp_path: Path, total: Any) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": {}}))
    assert decode_index(tmp_path / INDEX_NAME).total_size is None


@pytest.mark.parametrize(
    ("text", "told"), [("[]", "it is no JSON object"), ("{}", "no weight_map"), ("{", "damaged index")]
)
def test_what_is_no_index_is_said_so(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(FileFormatError, match=told):
        decode_index(tmp_path / INDEX_NAME)


def test_a_small_file_has_at_most_so_many_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcd")
    assert read_small_file(tmp_path / "x", 4) == b"abcd"
    with pytest.raises(FileFormatError, match=r"x: has 4 bytes; at most 3 are allowed"):
        read_small_file(tmp_path / "x", 3)
