"""A tensor file is absent or whole, and complete when it is there."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import RUN_ID, write_snapshot
from snapshots.recorded import call_number, failing

from posthoc_cli.errors import InvalidValueError, OutputExistsError, WriteError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.format import OutputInfo, output_metadata
from posthoc_cli.snapshots.reader import TensorFile
from posthoc_cli.snapshots.writer import TensorFileWriter

SPECS = [fmt.TensorSpec("a", "U8", (4,)), fmt.TensorSpec("b", "F32", (1,))]


def write(path: Path, overwrite: bool = False) -> None:
    with TensorFileWriter(path, SPECS, {}, overwrite) as writer:
        writer.write("a", b"abcd")
        writer.write("b", bytes(4))
        writer.commit()


@contextmanager
def refused(folder: Path, match: str, kind: type[BaseException] = InvalidValueError) -> Iterator[None]:
    """The block raises, and leaves nothing in the folder."""
    with pytest.raises(kind, match=match) as caught:
        yield
    assert len(str(caught.value)) < 300
    assert list(folder.iterdir()) == []


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    write(tmp_path / "x")
    with TensorFileWriter(tmp_path / "y", SPECS, {}) as writer:
        writer.write("b", bytes(4))
        writer.write("a", bytearray(b"abcd"))
        writer.commit()
    with TensorFile(tmp_path / "y") as file:
        assert file.read("a").tobytes() == b"abcd"
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_a_model_without_tensors_is_a_file(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x", [], {}) as writer:
        writer.commit()
    with TensorFile(tmp_path / "x") as file:
        assert file.header.tensors == {}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize(
    ("operation", "number"),
    [
        ("open_new", 0), ("write", 0), ("write", 1), ("write", 2), ("fsync", 0), ("link", 0), ("unlink", 0),
        ("fsync_directory", 0),
    ],
)  # fmt: skip
def test_a_save_that_fails_is_told_and_leaves_nothing(tmp_path: Path, operation: str, number: int, code: int) -> None:
    """Two tensors and the header are three writes."""
    with refused(tmp_path, os.strerror(code).lower(), WriteError), failing(operation, code, call_number(number)):
        write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": torch.ones(3), "v": torch.ones(2)})


def test_a_file_that_was_not_committed_leaves_nothing(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x", SPECS, {}) as writer:
        writer.write("a", b"abcd")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"abc", b"abcde"])
def test_a_wrong_number_of_bytes_is_refused(tmp_path: Path, data: bytes) -> None:
    with refused(tmp_path, r"'a': .* 4 were due"), TensorFileWriter(tmp_path / "x", SPECS, {}) as writer:
        writer.write("a", data)


@pytest.mark.parametrize(
    ("names", "metadata", "told"),
    [
        (["a", "a"], {}, "must be unique"), (["__metadata__"], {}, "must be unique"),
        (["x" * 10_000, "half \ud800 a pair"], {}, r"half .*ud800"), (["a", "b"], {}, "'b' was never written"),
        ([], {"note": "x" * 100_000_000}, "100,000,000"),  # a header that readers would refuse
    ],
)  # fmt: skip
def test_what_no_reader_would_take_is_not_written(
    tmp_path: Path, names: list[str], metadata: dict[str, str], told: str
) -> None:
    specs = [fmt.TensorSpec(name, "U8", (1,)) for name in names]
    with refused(tmp_path, told), TensorFileWriter(tmp_path / "x", specs, metadata) as writer:
        for name in names[:1]:
            writer.write(name, b"x")
        writer.commit()


@pytest.mark.parametrize(
    ("name", "where"), [("a\0", {}), ("a", {"aliases": {"b\0": "a"}}), ("a", {"left_out": ("b\0",)})]
)
def test_a_name_with_a_zero_byte_is_refused_before_a_file_appears(
    tmp_path: Path, name: str, where: dict[str, Any]
) -> None:
    with refused(tmp_path, "zero byte"):
        write_snapshot(tmp_path, 10, 0.05, RUN_ID, {name: torch.ones(1)}, **where)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_never_written(number: float) -> None:
    info = OutputInfo(RUN_ID, "sigma_rel 0.1", 0.1, 7.0, 1.0, "steps", "paper", 0.0, None, (("a", number),))
    with pytest.raises(ValueError, match="JSON"):
        output_metadata(info)


def test_a_snapshot_is_never_replaced(tmp_path: Path) -> None:
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": torch.ones(3)})
    before = path.read_bytes()
    with pytest.raises(OutputExistsError):
        write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": torch.zeros(3)})
    assert path.read_bytes() == before


def test_a_replaced_output_is_a_new_file_and_open_readers_keep_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "x")
    before = (tmp_path / "x").stat().st_ino
    with TensorFile(tmp_path / "x") as reader:
        write(tmp_path / "x", overwrite=True)
        assert reader.read("a").tobytes() == b"abcd"
    assert (tmp_path / "x").stat().st_ino != before
