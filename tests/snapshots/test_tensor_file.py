"""A tensor file is absent or complete; a file that cannot be read is an error that names it before
a value is used."""

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from factories import RUN_ID, flip_bit, forge, write_snapshot
from safetensors.torch import save_file
from snapshots.recorded import call_number, failing

from posthoc_cli import Run
from posthoc_cli.errors import FileFormatError, InvalidValueError, VanishedError
from posthoc_cli.snapshots.tensorfile import (
    BLOCK,
    Entry,
    TensorFile,
    TensorFileWriter,
    read_file,
    read_small_file,
    tensor_bytes,
    tensor_from_bytes,
)

Small = Callable[[str], Path]

# --- accidents during reading


def tensor_in(file: TensorFile, name: str) -> torch.Tensor:
    entry = file.entries[name]
    data = np.empty(entry.nbytes, np.uint8)
    file.read(name, 0, data.data)
    return tensor_from_bytes(data, entry.dtype, entry.shape)


def read_tensor(path: Path) -> object:
    with read_file(path) as file:
        return tensor_in(file, "a")


@pytest.mark.parametrize(
    ("read", "fails"),
    [
        (read_tensor, 0),
        (read_tensor, 2),
        (lambda p: read_small_file(p, 10**6), 0),
    ],
)
def test_an_error_of_reading_names_the_file_and_the_reason(
    small: Small,
    read: Callable[[Path], object],
    fails: int,
) -> None:
    """Reading the header, a tensor, or a small file fails; afterwards the file
    is deleted."""
    path = small("snapshot")
    message = rf"^{path}: .*cannot be read: input/output error$"
    refused = pytest.raises(FileFormatError, match=message)
    with failing("read", errno.EIO, call_number(fails)), refused:
        read(path)
    path.unlink()
    message = rf"^{path}: cannot be opened: no such file or directory$"
    with pytest.raises(VanishedError, match=message):
        read(path)


def test_a_file_that_was_replaced_or_shrinks_after_its_header_was_read_is_refused(
    small: Small,
) -> None:
    path = small("snapshot")
    with read_file(path) as file:
        assert tensor_in(file, "a").tolist() == [1.0, -2.5]
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileFormatError, match="became shorter while it was read"):
            tensor_in(file, "b")
    forge(small("snapshot"), {"t": "11.0"})
    with pytest.raises(FileFormatError, match="was replaced while it was being used"):
        tensor_in(file, "a")


def test_a_file_without_checksums_that_changes_during_reading_is_an_error(
    small: Small,
    tmp_path: Path,
) -> None:
    """With checksums each block shows by itself whether it has changed."""
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(3)}, foreign)
    with pytest.raises(FileFormatError, match="was changed while it was"), read_file(foreign):
        os.utime(foreign, (0, 0))
    with read_file(path := small("output")):
        os.utime(path, (0, 0))


def test_a_tensor_in_another_order_between_others_is_read_in_row_major_order(
    tmp_path: Path,
) -> None:
    """As views of one storage in a pickle; tensors around it are read together only if they
    follow each other."""
    values = torch.arange(27, dtype=torch.float32)
    save_file({"a": values}, tmp_path / "a.safetensors")
    file = read_file(tmp_path / "a.safetensors")
    begin = file.entries["a"].begin
    entries = {
        "first": Entry("F32", (9,), begin),
        "transposed": Entry("F32", (3, 3), begin + 36, (1, 3)),
        "last": Entry("F32", (3, 3), begin + 72, (1, 3)),
    }
    room = np.empty(27, np.float32)
    file = replace(file, entries=entries)
    file.read_many([*entries], room.view(np.uint8).data)
    expected = values.reshape(3, 3, 3)
    expected[1:] = expected[1:].mT.clone()
    assert np.array_equal(room, expected.reshape(-1).numpy())


def test_a_flip_that_makes_a_nan_is_damage(tmp_path: Path) -> None:
    """Values are sampled before they are verified where headers have no measurements."""
    run = tmp_path / "run"
    out = tmp_path / "out.safetensors"
    values = {"a": torch.tensor([1.0, 2.0])}
    path = write_snapshot(run, 10, 0.05, RUN_ID, values, sigma_rels=(0.05,))
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    with pytest.raises(FileFormatError, match="tensor 'a' is damaged"):
        Run(run).write(0.05, out)
    assert not out.exists()


# --- ranges of a tensor, each with the checksums of all blocks that it touches

SIZE = 11 * BLOCK + 5  # more than is read by one request
DATA = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)
RANGES = [
    (BLOCK, 3 * BLOCK),
    (BLOCK - 1, BLOCK + 1),
    (SIZE - 1, SIZE),
    (5, SIZE - 3),
]


def write_pieces(path: Path, size: int) -> Path:
    """Write a tensor between two others, in parts of `size` bytes; or if 0 in two ranges, the later
    one first."""
    entries = {
        "before": Entry("U8", (3,)),
        "x": Entry("U8", (SIZE,)),
        "after": Entry("U8", (2,)),
    }
    with TensorFileWriter(path, entries, {"format": 3}, {}) as writer:
        if size:
            writer.write("x", pieces(size))
        else:
            writer.write("x", [DATA[2 * BLOCK :].data], 2 * BLOCK)
            writer.write("x", [DATA[: 2 * BLOCK].data])
        writer.write("before", [memoryview(b"abc")])
        writer.write("after", [memoryview(b"de")])
        writer.publish()
    return path


def pieces(size: int) -> Iterator[memoryview]:
    for begin in range(0, SIZE, size):
        yield DATA[begin : begin + size].data


@pytest.mark.parametrize("size", [0, 1000, BLOCK, BLOCK + 1, SIZE])
def test_a_tensor_written_in_pieces_is_the_tensor(tmp_path: Path, size: int) -> None:
    file = read_file(write_pieces(tmp_path / "x.safetensors", size))
    assert file.sums["x"] == "".join(map(xxhash.xxh3_64_hexdigest, pieces(BLOCK)))
    assert tensor_bytes(tensor_in(file, "before")) == b"abc"
    assert tensor_bytes(tensor_in(file, "x")) == DATA.data
    assert tensor_bytes(tensor_in(file, "after")) == b"de"
    room = memoryview(bytearray(SIZE + 5))
    file.read_many(["after", "before", "x"], room)
    assert bytes(room) == b"deabc" + bytes(DATA)


FLIPPED = [0, BLOCK - 1, BLOCK, 3 * BLOCK, SIZE - 1]


@pytest.mark.parametrize(("begin", "end"), RANGES)
def test_a_range_is_read_from_any_thread_and_each_of_its_blocks_is_verified(
    tmp_path: Path,
    begin: int,
    end: int,
) -> None:
    path = write_pieces(tmp_path / "x.safetensors", 0)
    file = read_file(path)

    def read(verify: bool = True) -> bytes:
        found = bytearray(end - begin)
        file.read("x", begin, memoryview(found), verify)
        return bytes(found)

    expected = bytes(DATA[begin:end])
    with file, ThreadPoolExecutor(4) as pool:
        assert {*pool.map(read, [True, False] * 20)} == {expected}
    start = file.entries["x"].begin
    blocks = range(begin // BLOCK, (end - 1) // BLOCK + 1)
    damaged = r"x\.safetensors: tensor 'x' is damaged: its checksum"
    stamp = path.stat()
    for position in FLIPPED:
        flip_bit(path, start + position)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        if position // BLOCK in blocks:
            with pytest.raises(FileFormatError, match=damaged):
                read()
        else:
            assert read() == expected
        flip_bit(path, start + position)


# --- writing


def write(path: Path, overwrite: bool = False) -> None:
    entries = {
        "a": Entry("U8", (4,)),
        "b": Entry("F32", (1,)),
    }
    with TensorFileWriter(path, entries, {"format": 3}, {}, overwrite) as writer:
        writer.write("a", [memoryview(b"abcd")])
        writer.write("b", [memoryview(bytes(4))])
        writer.publish()


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a\0", {}),
        ("a", {"aliases": {"b\0": "a"}}),
        ("a", {"left_out": ("b\0",)}),
    ],
)
def test_a_name_with_a_zero_byte_is_refused_before_a_file_appears(
    tmp_path: Path,
    name: str,
    where: dict[str, Any],
) -> None:
    with pytest.raises(InvalidValueError, match="zero byte"):
        write_snapshot(tmp_path, 10, 0.05, RUN_ID, {name: torch.ones(1)}, **where)
    assert list(tmp_path.iterdir()) == []


def test_a_replaced_output_is_a_new_file_and_open_readers_keep_the_old_one(tmp_path: Path) -> None:
    write(tmp_path / "x")
    before = (tmp_path / "x").stat().st_ino
    with read_file(tmp_path / "x") as reader:
        write(tmp_path / "x", overwrite=True)
        assert bytes(tensor_bytes(tensor_in(reader, "a"))) == b"abcd"
    assert (tmp_path / "x").stat().st_ino != before
