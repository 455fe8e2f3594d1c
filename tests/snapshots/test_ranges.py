"""Parts of a tensor, written and read in order and in pieces of any size, with the checksums of whole blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.headers import decode_checksums
from posthoc_cli.snapshots.reader import TensorFile, read_header
from posthoc_cli.snapshots.writer import TensorFileWriter

BLOCK = 16
SIZE = 3 * BLOCK + 5
DATA = bytes(range(7, 7 + SIZE))


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmt, "BLOCK_BYTES", BLOCK)


def pieces(data: bytes, size: int) -> Iterator[memoryview]:
    for begin in range(0, len(data), size):
        yield memoryview(data)[begin : begin + size]


def write(path: Path, size: int, cut: int = 2 * BLOCK) -> Path:
    """A tensor between two others, written from two ranges, the later one first, in pieces of `size` bytes."""
    specs = [fmt.TensorSpec(name, "U8", (count,)) for name, count in (("before", 3), ("x", SIZE), ("after", 2))]
    with TensorFileWriter(path, specs, {"ema.format": "snapshot"}) as writer:
        for begin, end in ((cut, SIZE), (0, cut)):
            part = writer.write_range("x", begin, end)
            for piece in pieces(DATA[begin:end], size):
                part.write(piece)
            part.close()
        writer.write("before", b"abc")
        writer.write("after", b"de")
        writer.commit()
    return path


@pytest.mark.parametrize("size", [1, 5, 15, 16, 17, 32, 40, 1000])
def test_a_tensor_written_in_pieces_is_the_tensor(tmp_path: Path, size: int) -> None:
    path = write(tmp_path / "x.safetensors", size)
    header = read_header(path)
    digits = "".join(xxhash.xxh3_64_hexdigest(DATA[begin : begin + BLOCK]) for begin in range(0, SIZE, BLOCK))
    assert decode_checksums(path, header)["x"] == digits
    with TensorFile(path) as file:
        assert [file.read(name).tobytes() for name in ("before", "x", "after")] == [b"abc", DATA, b"de"]


@pytest.mark.parametrize("size", [1, 5, 15, 16, 17, 32, 40, 1000])
@pytest.mark.parametrize(
    ("begin", "end"), [(0, SIZE), (0, BLOCK), (BLOCK, SIZE), (BLOCK, 3 * BLOCK), (3 * BLOCK, SIZE)]
)
def test_a_range_is_read_and_each_of_its_blocks_is_verified(tmp_path: Path, begin: int, end: int, size: int) -> None:
    path = write(tmp_path / "x.safetensors", 1000)

    def read() -> bytes:
        with TensorFile(path) as file:
            reader, found = file.read_range("x", begin, end), bytearray(end - begin)
            for piece in range(0, len(found), size):
                reader.read_into(memoryview(found)[piece : piece + size])
            return bytes(found)

    assert read() == DATA[begin:end]
    start = read_header(path).payload_start + 3
    whole = bytearray(path.read_bytes())
    for position in range(SIZE):
        whole[start + position] ^= 1
        path.write_bytes(whole)
        if begin <= position < end:
            with pytest.raises(FileFormatError, match=r"x\.safetensors: tensor 'x' is damaged: its checksum"):
                read()
        else:
            assert read() == DATA[begin:end]
        whole[start + position] ^= 1


def test_ranges_that_overlap_or_leave_a_gap_are_refused(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x", [fmt.TensorSpec("x", "U8", (SIZE,))], {}) as writer:
        part = writer.write_range("x", BLOCK, SIZE)
        with pytest.raises(InvalidValueError, match="tensor 'x': written twice"):
            writer.write_range("x", 0, 2 * BLOCK)
        part.write(memoryview(DATA[BLOCK:]))
        part.close()
        with pytest.raises(InvalidValueError, match="tensor 'x' was never written"):
            writer.commit()
    assert list(tmp_path.iterdir()) == []
