"""A tensor file is absent or whole, and complete when it is there."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from factories import RUN_ID, write_snapshot

from posthoc_cli import files
from posthoc_cli.errors import InvalidValueError, OutputExistsError, WriteError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.reader import TensorFile
from posthoc_cli.snapshots.writer import TensorFileWriter

SPECS = [fmt.TensorSpec("a", "U8", (4,)), fmt.TensorSpec("b", "F32", (1,))]


def write(path: Path, overwrite: bool = False) -> None:
    with TensorFileWriter(path, SPECS, {}, overwrite) as writer:
        writer.write("a", b"abcd")
        writer.write("b", bytes(4))
        writer.commit()


def test_tensors_may_come_in_any_order(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x", SPECS, {}) as writer:
        writer.write("b", bytes(4))
        writer.write("a", bytearray(b"abcd"))
        writer.commit()
    with TensorFile(tmp_path / "x") as file:
        assert file.read("a").tobytes() == b"abcd"


def test_the_same_content_makes_the_same_file(tmp_path: Path) -> None:
    write(tmp_path / "x")
    write(tmp_path / "y")
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


@pytest.mark.parametrize("operation", ["open_new", "write", "fsync", "link", "unlink", "fsync_directory"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_save_that_fails_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, code: int
) -> None:
    real, calls = getattr(files.system, operation), []

    def fail_once(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) > 1:
            return real(*arguments)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.system, operation, fail_once)
    with pytest.raises(WriteError, match=os.strerror(code).lower()):
        write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": torch.ones(3)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("refused", range(3))
def test_a_disk_that_fills_up_at_any_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int
) -> None:
    """Two tensors and the header: three writes."""
    real, calls = files.system.write, iter(range(3))

    def full(descriptor: int, view: memoryview, offset: int) -> int:
        if next(calls) == refused:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, view, offset)

    monkeypatch.setattr(files.system, "write", full)
    with pytest.raises(WriteError, match="no space left on device"):
        write(tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_not_committed_leaves_nothing(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x", SPECS, {}) as writer:
        writer.write("a", b"abcd")
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), TensorFileWriter(tmp_path / "x", SPECS, {}) as writer:
        writer.write("a", b"abcd")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_that_was_forgotten_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    with (
        pytest.raises(InvalidValueError, match="'b' was never written"),
        TensorFileWriter(tmp_path / "x", SPECS, {}) as writer,
    ):
        writer.write("a", b"abcd")
        writer.commit()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"abc", b"abcde"])
def test_a_wrong_number_of_bytes_is_refused(tmp_path: Path, data: bytes) -> None:
    with (
        pytest.raises(InvalidValueError, match=r"'a': .* 4 were due"),
        TensorFileWriter(tmp_path / "x", SPECS, {}) as writer,
    ):
        writer.write("a", data)


def test_a_tensor_is_written_once(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x", SPECS, {}) as writer:
        writer.write("a", b"abcd")
        with pytest.raises(InvalidValueError, match="'a': written twice"):
            writer.write("a", b"efgh")
        with pytest.raises(InvalidValueError, match="'c': not one"):
            writer.write("c", b"")
        writer.write("b", bytes(4))
        writer.commit()
    with TensorFile(tmp_path / "x") as file:
        assert file.read("a").tobytes() == b"abcd"


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


def test_a_model_without_tensors_is_a_file(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x", [], {}) as writer:
        writer.commit()
    with TensorFile(tmp_path / "x") as file:
        assert file.header.tensors == {}
