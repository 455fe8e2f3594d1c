"""A tensor file is absent or complete; a file that cannot be read is an error that names it before
a value is used."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from checking import refused
from factories import RUN_ID, flip_bit, forge, write_snapshot
from safetensors.torch import save_file
from snapshots.recorded import call_number, failing

from posthoc_cli import Run
from posthoc_cli.errors import FileFormatError, VanishedError
from posthoc_cli.snapshots.entry import BLOCK, Entry
from posthoc_cli.snapshots.tensorfile import read_file
from posthoc_cli.snapshots.writer import TensorFileWriter


def bytes_of(file, name):
    room = bytearray(file.entries[name].nbytes)
    file.read(name, 0, memoryview(room))
    return bytes(room)


def read_tensor(path):
    with read_file(path) as file:
        return bytes_of(file, "a")


# --- accidents during reading


@pytest.mark.parametrize("fails", [0, 2])
def test_an_error_of_reading_names_the_file_and_the_reason(small, fails):
    """Reading the header or a tensor fails."""
    path = small("snapshot")
    with (
        failing("read", errno.EIO, call_number(fails)),
        refused(path, "input/output error", kind=FileFormatError),
    ):
        read_tensor(path)


def test_a_file_that_was_deleted_has_vanished(small):
    path = small("snapshot")
    path.unlink()
    with refused(path, kind=VanishedError):
        read_tensor(path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(small):
    path = small("snapshot")
    with read_file(path) as file:
        assert bytes_of(file, "a") == torch.tensor([1.0, -2.5]).numpy().tobytes()
        os.truncate(path, path.stat().st_size - 1)
        with refused(path, "shorter", kind=FileFormatError):
            bytes_of(file, "b")


def test_a_file_that_was_replaced_after_its_header_was_read_is_refused(small):
    path = small("snapshot")
    file = read_file(path)
    forge(path, {"t": "11.0"})
    with refused(path, "replaced", kind=FileFormatError):
        bytes_of(file, "a")


def test_a_file_without_checksums_that_changes_during_reading_is_an_error(tmp_path):
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(3)}, foreign)
    with refused(foreign, "changed", kind=FileFormatError), read_file(foreign):
        os.utime(foreign, (0, 0))


def test_a_file_with_checksums_may_be_touched(small):
    """Each block shows by itself whether it has changed."""
    path = small("output")
    with read_file(path):
        os.utime(path, (0, 0))


def test_a_flip_that_makes_a_nan_is_damage(tmp_path):
    """Values are sampled before they are verified where headers have no measurements."""
    run = tmp_path / "run"
    values = {"a": torch.tensor([1.0, 2.0])}
    path = write_snapshot(run, 10, 0.05, RUN_ID, values, sigma_rels=(0.05,))
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    with refused(path, "'a' is damaged", kind=FileFormatError):
        Run(run).average(0.05)


# --- ranges of a tensor, each with the checksums of all blocks that it touches

SIZE = 11 * BLOCK + 5  # more than is read by one request
DATA = np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


def write_pieces(path, size):
    """Write a tensor between two others, in parts of `size` bytes."""
    entries = {
        "before": Entry("U8", (3,)),
        "x": Entry("U8", (SIZE,)),
        "after": Entry("U8", (2,)),
    }
    with TensorFileWriter(path, entries, {"format": 3}, {}) as writer:
        writer.write("x", pieces(size))
        writer.write("before", [memoryview(b"abc")])
        writer.write("after", [memoryview(b"de")])
        writer.publish()
    return read_file(path)


def pieces(size):
    for begin in range(0, SIZE, size):
        yield DATA[begin : begin + size].data


@pytest.mark.parametrize("size", [1000, BLOCK + 1, SIZE])
def test_a_tensor_written_in_pieces_is_the_tensor(tmp_path, size):
    file = write_pieces(tmp_path / "x.safetensors", size)
    room = memoryview(bytearray(SIZE + 5))
    file.read_many(["after", "before", "x"], room)
    assert bytes(room) == b"deabc" + bytes(DATA)


@pytest.mark.parametrize(
    ("begin", "end"),
    [
        (BLOCK, 3 * BLOCK),
        (BLOCK - 1, BLOCK + 1),
        (5, SIZE),
    ],
)
def test_a_range_is_read_from_any_thread_and_each_of_its_blocks_is_verified(tmp_path, begin, end):
    path = tmp_path / "x.safetensors"
    file = write_pieces(path, SIZE)

    def read(verify=True):
        found = bytearray(end - begin)
        file.read("x", begin, memoryview(found), verify)
        return bytes(found)

    expected = bytes(DATA[begin:end])
    with file, ThreadPoolExecutor(4) as pool:
        assert {*pool.map(read, [True, False] * 20)} == {expected}
    stamp = path.stat()
    for position in (0, BLOCK - 1, BLOCK, 3 * BLOCK, SIZE - 1):
        flip_bit(path, file.entries["x"].begin + position)
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
        if begin // BLOCK <= position // BLOCK <= (end - 1) // BLOCK:
            with refused(path, "'x' is damaged", kind=FileFormatError):
                read()
        else:
            assert read() == expected
        flip_bit(path, file.entries["x"].begin + position)


# --- writing


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("a\0", {}),
        ("a", {"left_out": ("b\0",)}),
    ],
)
def test_a_name_with_a_zero_byte_is_refused_before_a_file_appears(tmp_path, name, where):
    with refused("header"):
        write_snapshot(tmp_path, 10, 0.05, RUN_ID, {name: torch.ones(1)}, **where)
    assert list(tmp_path.iterdir()) == []


def write(path, text):
    with TensorFileWriter(path, {"a": Entry("U8", (4,))}, {"format": 3}, {}, True) as writer:
        writer.write("a", [memoryview(text)])
        writer.publish()


def test_a_replaced_output_is_a_new_file_and_open_readers_keep_the_old_one(tmp_path):
    path = tmp_path / "x"
    write(path, b"abcd")
    with read_file(path) as reader:
        write(path, b"efgh")
        assert bytes_of(reader, "a") == b"abcd"
    assert read_tensor(path) == b"efgh"
