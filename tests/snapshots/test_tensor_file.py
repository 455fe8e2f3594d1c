"""A tensor file is absent or complete; a file that cannot be read is an error that names it before a value is used."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from factories import RUN_ID, write_snapshot
from safetensors.torch import save_file
from snapshots.recorded import call_number, failing

from posthoc_cli import disk_sources, files
from posthoc_cli.dtypes import ITEM_BYTES, stored_name, torch_dtype
from posthoc_cli.errors import FileFormatError, InvalidValueError, VanishedError
from posthoc_cli.export.writing import write_synthesis
from posthoc_cli.snapshots.outputs import OutputInfo
from posthoc_cli.snapshots.tensorfile import (
    BLOCK,
    Entry,
    TensorFileWriter,
    read_file,
    read_small_file,
    tensor_bytes,
    tensor_from_bytes,
)
from posthoc_cli.synthesis.plan import plan_synthesis

Small = Callable[[str], Path]

# --- accidents during reading


def test_a_file_that_shrinks_under_a_reader_is_an_error_and_no_crash(small: Small) -> None:
    path = small("snapshot")
    with read_file(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileFormatError, match=r"'b': the file became shorter"):
            file.read("b")


def test_a_file_that_shrinks_while_its_header_is_read_is_an_error(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = small("snapshot"), files.system.read
    monkeypatch.setattr(files.system, "read", lambda file, view, at: real(file, view, at) if at == 0 else 0)
    with pytest.raises(FileFormatError, match="became shorter"):
        read_file(path)


def read_tensor(path: Path) -> object:
    with read_file(path) as file:
        return file.read("a")


@pytest.mark.parametrize(
    ("read", "fails"), [(read_tensor, 0), (read_tensor, 1), (read_tensor, 2), (lambda p: read_small_file(p, 10**6), 0)]
)
def test_an_error_of_reading_names_the_file_and_the_reason(
    small: Small, read: Callable[[Path], object], fails: int
) -> None:
    """Reading the header's length, the header, a tensor, or a small file fails; afterwards the file is deleted."""
    path = small("snapshot")
    message = rf"^{path}: .*cannot be read: input/output error$"
    with failing("read", errno.EIO, call_number(fails)), pytest.raises(FileFormatError, match=message):
        read(path)
    path.unlink()
    with pytest.raises(VanishedError, match=rf"^{path}: cannot be opened: no such file or directory$"):
        read(path)


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        (errno.ENOENT, VanishedError, "no such file or directory"), (errno.ESTALE, VanishedError, "stale file handle"),
        (errno.EACCES, FileFormatError, "permission denied"),
        (errno.EMFILE, FileFormatError, "too many open files; raise the limit"),
    ],
)  # fmt: skip
def test_the_reason_why_a_file_cannot_be_opened_is_named(code: int, kind: type[FileFormatError], message: str) -> None:
    with failing("open", code), pytest.raises(FileFormatError) as caught:
        read_file(Path("x"))
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"x: cannot be opened: {message}")
    assert ("raise the limit" in str(caught.value)) == (code == errno.EMFILE)


@pytest.mark.parametrize("same_checksum", [False, True])
@pytest.mark.parametrize("kind", ["snapshot", "output"])
def test_a_file_that_was_replaced_after_its_header_was_read_is_refused(
    small: Small, kind: str, same_checksum: bool
) -> None:
    """The new file has the same size, and perhaps wrongly the checksum of the old one."""
    path = small(kind)
    header = read_file(path)
    read_file(path, header).close()
    start = path.read_bytes()
    other = bytearray(start.replace(b'"ema.t":"10.0"', b'"ema.t":"11.0"'))
    assert other != start
    if not same_checksum:
        digits = other.index(fmt.CHECKSUM_MARK) + len(fmt.CHECKSUM_MARK)
        other[digits : digits + 16] = b"0" * 16
        length = 8 + int.from_bytes(other[:8], "little")
        other[digits : digits + 16] = xxhash.xxh3_64_hexdigest(bytes(other[:length])).encode()
    path.write_bytes(other)
    reason = "damaged header: its checksum does not match" if same_checksum else "was replaced while it was being used"
    with pytest.raises(FileFormatError, match=reason):
        read_file(path, header)


def test_a_file_without_checksums_that_changes_during_reading_is_an_error(small: Small, tmp_path: Path) -> None:
    """With checksums each block shows by itself whether it has changed."""
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(3)}, foreign)
    with pytest.raises(FileFormatError, match="was changed while it was"), read_file(foreign):
        os.utime(foreign, (0, 0))
    with read_file(path := small("output")):
        os.utime(path, (0, 0))


def test_a_flip_that_makes_a_nan_is_damage(tmp_path: Path) -> None:
    """Values are sampled before they are verified where headers have no measurements."""
    path = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, {"a": torch.tensor([1.0, 2.0])}, sigma_rels=(0.05,))
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    with pytest.raises(FileFormatError, match="tensor 'a' is damaged"):
        write_synthesis(plan_synthesis(disk_sources(tmp_path / "run"), [0.05]), [tmp_path / "out.safetensors"])
    assert not (tmp_path / "out.safetensors").exists()


def test_a_small_file_is_read_up_to_a_limit_and_an_impossible_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcd")
    assert read_small_file(tmp_path / "x", 4) == b"abcd"
    with pytest.raises(FileFormatError, match=r"x: has 4 bytes; at most 3 are allowed"):
        read_small_file(tmp_path / "x", 3)
    with pytest.raises(FileFormatError, match="cannot be opened"):
        read_file(Path("a\0b"))


# --- ranges of a tensor, in pieces of any size, with the checksums of complete blocks

BLOCK = 16
SIZE = 3 * BLOCK + 5
DATA = bytes(range(7, 7 + SIZE))
PIECES = pytest.mark.parametrize("size", [1, 5, 15, 16, 17, 32, 40, 1000])


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmt, "BLOCK_BYTES", BLOCK)


def write_pieces(path: Path, size: int, cut: int = 2 * BLOCK) -> Path:
    """Write a tensor between two others, in two ranges, the later one first, in pieces of `size` bytes."""
    specs = [Entry(name, "U8", (count,)) for name, count in (("before", 3), ("x", SIZE), ("after", 2))]
    with TensorFileWriter(path, specs, {"ema.format": "snapshot"}) as writer:
        for begin, end in ((cut, SIZE), (0, cut)):
            part = writer.write_range("x", begin)
            for at in range(begin, end, size):
                part.write(memoryview(DATA)[at : min(at + size, end)])
        writer.write("before", b"abc")
        writer.write("after", b"de")
        writer.commit()
    return path


@PIECES
@pytest.mark.usefixtures("_small_blocks")
def test_a_tensor_written_in_pieces_is_the_tensor(tmp_path: Path, size: int) -> None:
    path = write_pieces(tmp_path / "x.safetensors", size)
    digits = "".join(xxhash.xxh3_64_hexdigest(DATA[begin : begin + BLOCK]) for begin in range(0, SIZE, BLOCK))
    assert decode_checksums(path, read_file(path))["x"] == digits
    with read_file(path) as file:
        assert [file.read(name).tobytes() for name in ("before", "x", "after")] == [b"abc", DATA, b"de"]
        assert file.read_sample("x", 4, 8).tobytes() == DATA[4:8]
        assert file.read_sample("x", 1, 1).size == 0


@PIECES
@pytest.mark.parametrize(
    ("begin", "end"), [(0, SIZE), (0, BLOCK), (BLOCK, SIZE), (BLOCK, 3 * BLOCK), (3 * BLOCK, SIZE)]
)
@pytest.mark.usefixtures("_small_blocks")
def test_a_range_is_read_and_each_of_its_blocks_is_verified(tmp_path: Path, begin: int, end: int, size: int) -> None:
    path = write_pieces(tmp_path / "x.safetensors", 1000)

    def read() -> bytes:
        with read_file(path) as file:
            reader, found = file.read_range("x", begin, end), bytearray(end - begin)
            for piece in range(0, len(found), size):
                reader.read_into(memoryview(found)[piece : piece + size])
            return bytes(found)

    assert read() == DATA[begin:end]
    start = read_file(path).payload_start + 3
    data = bytearray(path.read_bytes())
    for position in range(SIZE):
        data[start + position] ^= 1
        path.write_bytes(data)
        if begin <= position < end:
            with pytest.raises(FileFormatError, match=r"x\.safetensors: tensor 'x' is damaged: its checksum"):
                read()
        else:
            assert read() == DATA[begin:end]
        data[start + position] ^= 1


# --- writing

SPECS = [Entry("a", "U8", (4,)), Entry("b", "F32", (1,))]


def write(path: Path, overwrite: bool = False) -> None:
    with TensorFileWriter(path, SPECS, {}, overwrite) as writer:
        writer.write("a", b"abcd")
        writer.write("b", bytes(4))
        writer.commit()


@contextmanager
def refused(folder: Path, match: str) -> Iterator[None]:
    """Require that the block raises, and leaves nothing in the folder."""
    with pytest.raises(InvalidValueError, match=match) as caught:
        yield
    assert len(str(caught.value)) < 300
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "metadata", "message"),
    [
        (["a", "a"], {}, "must be unique"), (["__metadata__"], {}, "must be unique"),
        (["x" * 10_000, "half \ud800 a pair"], {}, r"half .*ud800"),
        ([], {"note": "x" * 100_000_000}, "100,000,000"),
    ],
)  # fmt: skip
def test_headers_that_readers_refuse_are_not_written(
    tmp_path: Path, names: list[str], metadata: dict[str, str], message: str
) -> None:
    specs = [Entry(name, "U8", (1,)) for name in names]
    with refused(tmp_path, message), TensorFileWriter(tmp_path / "x", specs, metadata) as writer:
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


def test_a_replaced_output_is_a_new_file_and_open_readers_keep_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "x")
    before = (tmp_path / "x").stat().st_ino
    with read_file(tmp_path / "x") as reader:
        write(tmp_path / "x", overwrite=True)
        assert reader.read("a").tobytes() == b"abcd"
    assert (tmp_path / "x").stat().st_ino != before


# --- tensors to bytes and back, bit for bit

SHAPES = [(), (1,), (0,), (3, 0, 2), (2, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(ITEM_BYTES))
def test_any_bytes_are_a_tensor_of_any_dtype_and_come_back(name: str, shape: tuple[int, ...]) -> None:
    count = int(np.prod(shape)) * ITEM_BYTES[name]
    data = np.random.default_rng(0).integers(0, 2 if name == "BOOL" else 256, count, dtype=np.uint8)
    tensor = tensor_from_bytes(data, name, shape)
    assert (tensor.dtype, tuple(tensor.shape)) == (torch_dtype(name), shape)
    assert stored_name(tensor.dtype) == name
    assert bytes(tensor_bytes(tensor)) == data.tobytes()


def test_the_bytes_are_row_major_whatever_the_memory_is_and_copied_only_then() -> None:
    grid = torch.arange(6, dtype=torch.int16).reshape(2, 3)
    expected = struct.pack("<6h", 0, 3, 1, 4, 2, 5)
    assert bytes(tensor_bytes(grid.T)) == expected
    assert bytes(tensor_bytes(grid.repeat(1, 2)[:, :3].T)) == expected
    assert bytes(tensor_bytes(torch.tensor(7, dtype=torch.int16).expand(2))) == struct.pack("<2h", 7, 7)
    assert bytes(tensor_bytes(torch.nn.Parameter(torch.tensor([1.0])))) == struct.pack("<f", 1.0)
    view = np.frombuffer(tensor_bytes(grid), np.int16)
    grid[0, 1] = 9
    assert view[1] == 9
