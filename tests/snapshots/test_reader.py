"""What cannot be read ends in an error that names the file, before a value is used; what can is verified."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from factories import RUN_ID, write_snapshot
from snapshots.recorded import call_number, failing

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, InvalidValueError, VanishedError
from posthoc_cli.export.layouts import write_synthesis
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.headers import decode_checksums
from posthoc_cli.snapshots.reader import TensorFile, read_header, read_small_file
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.plan import disk_sources, plan_synthesis

Small = Callable[[str], Path]

# --- accidents


def test_a_file_that_shrinks_under_a_reader_is_an_error_and_no_crash(small: Small) -> None:
    path = small("snapshot")
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(FileFormatError, match=r"'b': the file became shorter"):
            file.read("b")


def test_a_file_that_shrinks_while_its_header_is_read_is_an_error(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = small("snapshot"), files.system.read
    monkeypatch.setattr(files.system, "read", lambda file, view, at: real(file, view, at) if at == 0 else 0)
    with pytest.raises(FileFormatError, match="became shorter"):
        read_header(path)


def read_tensor(path: Path) -> object:
    with TensorFile(path) as file:
        return file.read("a")


@pytest.mark.parametrize(
    ("read", "fails"), [(read_tensor, 0), (read_tensor, 1), (read_tensor, 2), (lambda p: read_small_file(p, 10**6), 0)]
)
def test_whoever_reads_says_what_could_not_be_read(small: Small, read: Callable[[Path], object], fails: int) -> None:
    """The header's length, the header, a tensor; a whole file. Then the same of a file that is gone."""
    path = small("snapshot")
    told = rf"^{path}: .*cannot be read: input/output error$"
    with failing("read", errno.EIO, call_number(fails)), pytest.raises(FileFormatError, match=told):
        read(path)
    path.unlink()
    with pytest.raises(VanishedError, match=rf"^{path}: cannot be opened: no such file or directory$"):
        read(path)


@pytest.mark.parametrize(
    ("code", "kind", "told"),
    [
        (errno.ENOENT, VanishedError, "no such file or directory"), (errno.ESTALE, VanishedError, "stale file handle"),
        (errno.EACCES, FileFormatError, "permission denied"),
        (errno.EMFILE, FileFormatError, "too many open files; raise the limit"),
    ],
)  # fmt: skip
def test_why_a_file_cannot_be_opened(code: int, kind: type[FileFormatError], told: str) -> None:
    with failing("open", code), pytest.raises(FileFormatError) as caught:
        read_header(Path("x"))
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"x: cannot be opened: {told}")
    assert ("raise the limit" in str(caught.value)) == (code == errno.EMFILE)


@pytest.mark.parametrize("same_checksum", [False, True])
@pytest.mark.parametrize("kind", ["snapshot", "output"])
def test_a_file_that_was_replaced_since_it_was_planned_with_is_refused(
    small: Small, kind: str, same_checksum: bool
) -> None:
    """One of the same size, whose header may carry the checksum of the other, wrongly."""
    path = small(kind)
    header = read_header(path)
    TensorFile(path, header).close()
    start = path.read_bytes()
    other = bytearray(start.replace(b'"ema.t":"10.0"', b'"ema.t":"11.0"'))
    assert other != start
    if not same_checksum:
        digits = other.index(fmt.CHECKSUM_MARK) + len(fmt.CHECKSUM_MARK)
        other[digits : digits + 16] = b"0" * 16
        length = 8 + int.from_bytes(other[:8], "little")
        other[digits : digits + 16] = xxhash.xxh3_64_hexdigest(bytes(other[:length])).encode()
    path.write_bytes(other)
    told = "damaged header: its checksum does not match" if same_checksum else "was replaced while it was being used"
    with pytest.raises(FileFormatError, match=told):
        TensorFile(path, header)


def test_a_flip_that_makes_a_nan_is_damage(tmp_path: Path) -> None:
    """Values are sampled before they are verified where headers have no measurements."""
    path = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, {"a": torch.tensor([1.0, 2.0])}, sigma_rels=(0.05,))
    path.write_bytes(path.read_bytes()[:-2] + b"\xc0\x7f")
    with pytest.raises(FileFormatError, match="tensor 'a' is damaged"):
        write_synthesis(plan_synthesis(disk_sources(tmp_path / "run"), [0.05]), [tmp_path / "out.safetensors"])
    assert not (tmp_path / "out.safetensors").exists()


# --- what is no file


def test_a_path_that_no_system_accepts_is_refused() -> None:
    with pytest.raises(FileFormatError, match="cannot be opened"):
        read_header(Path("a\0b"))


def test_a_small_file_has_at_most_so_many_bytes(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcd")
    assert read_small_file(tmp_path / "x", 4) == b"abcd"
    with pytest.raises(FileFormatError, match=r"x: has 4 bytes; at most 3 are allowed"):
        read_small_file(tmp_path / "x", 3)


# --- parts of a tensor, in pieces of any size, with the checksums of whole blocks

BLOCK = 16
SIZE = 3 * BLOCK + 5
DATA = bytes(range(7, 7 + SIZE))
PIECES = pytest.mark.parametrize("size", [1, 5, 15, 16, 17, 32, 40, 1000])


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fmt, "BLOCK_BYTES", BLOCK)


def write_pieces(path: Path, size: int, cut: int = 2 * BLOCK) -> Path:
    """A tensor between two others, written from two ranges, the later one first, in pieces of `size` bytes."""
    specs = [fmt.TensorSpec(name, "U8", (count,)) for name, count in (("before", 3), ("x", SIZE), ("after", 2))]
    with TensorFileWriter(path, specs, {"ema.format": "snapshot"}) as writer:
        for begin, end in ((cut, SIZE), (0, cut)):
            part = writer.write_range("x", begin)
            for at in range(begin, end, size):
                part.write(memoryview(DATA)[at : min(at + size, end)])
            part.close()
        writer.write("before", b"abc")
        writer.write("after", b"de")
        writer.commit()
    return path


@PIECES
@pytest.mark.usefixtures("_small_blocks")
def test_a_tensor_written_in_pieces_is_the_tensor(tmp_path: Path, size: int) -> None:
    path = write_pieces(tmp_path / "x.safetensors", size)
    digits = "".join(xxhash.xxh3_64_hexdigest(DATA[begin : begin + BLOCK]) for begin in range(0, SIZE, BLOCK))
    assert decode_checksums(path, read_header(path))["x"] == digits
    with TensorFile(path) as file:
        assert [file.read(name).tobytes() for name in ("before", "x", "after")] == [b"abc", DATA, b"de"]
        assert file.read_unverified("x", 4, 8).tobytes() == DATA[4:8]
        assert file.read_unverified("x", 1, 1).size == 0


@PIECES
@pytest.mark.parametrize(
    ("begin", "end"), [(0, SIZE), (0, BLOCK), (BLOCK, SIZE), (BLOCK, 3 * BLOCK), (3 * BLOCK, SIZE)]
)
@pytest.mark.usefixtures("_small_blocks")
def test_a_range_is_read_and_each_of_its_blocks_is_verified(tmp_path: Path, begin: int, end: int, size: int) -> None:
    path = write_pieces(tmp_path / "x.safetensors", 1000)

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


@pytest.mark.usefixtures("_small_blocks")
def test_ranges_that_leave_a_gap_are_refused(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x", [fmt.TensorSpec("x", "U8", (SIZE,))], {}) as writer:
        part = writer.write_range("x", BLOCK)
        part.write(memoryview(DATA[BLOCK:]))
        part.close()
        with pytest.raises(InvalidValueError, match="tensor 'x' was never written"):
            writer.commit()
    assert list(tmp_path.iterdir()) == []
