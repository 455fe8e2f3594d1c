"""Reading files: the header first and checked, then tensors, each block verified as it is read.

No torch here: tensors come as bytes. Files are read, never mapped, so that one that shrinks under a reader is
an error and not a crash.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, VanishedError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.headers import Sharing

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""What archives of torch.save begin with, and pickles."""


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk: its path, its header, what it says about itself."""

    path: Path
    header: fmt.FileHeader
    info: fmt.SnapshotInfo


def read_header(path: Path, sharing: Sharing | None = None) -> fmt.FileHeader:
    """The checked header of a safetensors file.

    Arguments:
        sharing: of the files that are read one after another.

    Raises:
        FileFormatError: the file cannot be opened, is no regular file, or is damaged.
    """
    descriptor = _open(path)
    try:
        with _reported(path, "read"):
            start, size = _read_start(path, descriptor)
        return headers.decode_header(path, start, size, sharing)
    finally:
        files.system.close(descriptor)


def read_header_alone(path: Path) -> fmt.FileHeader:
    """As `read_header`, whatever became of the tensors behind it: what a damaged file was.

    Raises:
        FileFormatError: as there, but not for a file that is shorter or longer than its header says.
    """
    descriptor = _open(path)
    try:
        with _reported(path, "read"):
            start, _ = _read_start(path, descriptor)
        return headers.decode_header(path, start, None)
    finally:
        files.system.close(descriptor)


class TensorFile:
    """A safetensors file opened for its tensors. Use it as a context manager.

    The header is read again and, where `expected` is given, must be that one: the file that was planned with
    is the file that is read. Any number of threads may read at once.
    """

    def __init__(self, path: Path, expected: fmt.FileHeader | None = None) -> None:
        self.path = path
        self._descriptor = _open(path)
        try:
            self.header = _known_header(path, self._descriptor, expected)
            if expected is not None and self.header != expected:
                raise FileFormatError(path, "was replaced while it was being used", "run again")
            self._checksums = headers.decode_checksums(path, self.header)
        except BaseException:
            files.system.close(self._descriptor)
            raise

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, verified where the file has checksums: shape [nbytes].

        Raises:
            FileFormatError: naming the file and the tensor, when a block does not match or bytes are missing.
        """
        entry = self.header.tensors[name]
        data = np.empty(entry.nbytes, dtype=np.uint8)
        digits = self._checksums.get(name)
        for index, begin in enumerate(range(0, entry.nbytes, fmt.BLOCK_BYTES)):
            block = data[begin : begin + fmt.BLOCK_BYTES]
            self.fill(name, block.data, begin)
            if digits is not None and xxhash.xxh3_64_hexdigest(block.data) != self.checksum(name, index):
                raise self.damaged(name)
        return data

    def read_range(self, name: str, begin: int, end: int) -> RangeReader:
        """The bytes `begin` to `end` of a tensor, to be read in order and verified on the way.

        `begin` is at the start of a block; `end` at the end of one, or of the tensor.
        """
        return RangeReader(self, name, begin, end)

    def fill(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view` with the bytes from `begin` on that follow the start of a tensor, across tensors, unverified.

        Raises:
            FileFormatError: naming the file and the tensor, when bytes are missing.
        """
        self._fill(name, view, self.header.payload_start + self.header.tensors[name].begin + begin)

    def verify(self, names: Sequence[str], parts: Sequence[memoryview]) -> None:
        """Check all bytes of tensors of at most one block each, which the caller has read by `fill`.

        Raises:
            FileFormatError: naming the file and the first tensor whose bytes do not match.
        """
        if not self._checksums:
            return
        found = [xxhash.xxh3_64_hexdigest(part) if part else "" for part in parts]
        expected = [*map(self._checksums.__getitem__, names)]
        if found != expected:
            raise self.damaged(next(n for n, a, b in zip(names, found, expected, strict=True) if a != b))

    def checksum(self, name: str, block: int = 0) -> str | None:
        """What the file says of a block: 16 hexadecimal digits; None where it has no checksums."""
        digits = self._checksums.get(name)
        return None if digits is None else digits[16 * block : 16 * block + 16]

    def damaged(self, name: str) -> FileFormatError:
        """The error for a block that is not what its checksum says."""
        return FileFormatError(self.path, f"tensor {shown(name)} is damaged: its checksum does not match")

    def read_unverified(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """The bytes `begin` to `end` of a tensor, for estimates only: no checksum is looked at. Shape [end - begin].

        Raises:
            FileFormatError: naming the file and the tensor, when bytes are missing.
        """
        data = np.empty(end - begin, dtype=np.uint8)
        self.fill(name, data.data, begin)
        return data

    def _fill(self, name: str, view: memoryview, offset: int) -> None:
        while view:
            try:
                count = files.system.read(self._descriptor, view, offset)
            except OSError as error:
                raise _cannot(self.path, "read", error) from error
            if count == 0:
                raise FileFormatError(self.path, f"tensor {shown(name)}: the file became shorter while it was read")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Close the file."""
        files.system.close(self._descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RangeReader:
    """Some blocks of one tensor, read in order, in parts of any size; each block is verified when it is through.

    The parts of one block are never held together: the checksum runs along.
    """

    def __init__(self, file: TensorFile, name: str, begin: int, end: int) -> None:
        self._file, self._name, self._position, self._end = file, name, begin, end
        self._hash = xxhash.xxh3_64()

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next.

        Raises:
            FileFormatError: naming the file and the tensor, when a block does not match or bytes are missing.
        """
        self._file.fill(self._name, view, self._position)
        while view:
            left = fmt.BLOCK_BYTES - self._position % fmt.BLOCK_BYTES
            part, view = view[:left], view[left:]
            self._hash.update(part)
            self._position += len(part)
            if self._position % fmt.BLOCK_BYTES == 0 or self._position == self._end:
                self._finish_block()

    def _finish_block(self) -> None:
        expected = self._file.checksum(self._name, (self._position - 1) // fmt.BLOCK_BYTES)
        if expected is not None and self._hash.hexdigest() != expected:
            raise self._file.damaged(self._name)
        self._hash.reset()


def read_small_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        FileFormatError: it is larger or no regular file, or cannot be opened or read.
    """
    descriptor = _open(path)
    try:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise FileFormatError(path, f"has {size:,} bytes; at most {most:,} are allowed")
        with _reported(path, "read"):
            return files.read_at(descriptor, size, 0)
    finally:
        files.system.close(descriptor)


@contextmanager
def _reported(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _cannot(path, verb, error) from error


def _cannot(path: Path, verb: str, error: OSError) -> FileFormatError:
    # On a network file system an open file goes away, too, when another host removes it.
    kind = VanishedError if error.errno in (errno.ENOENT, errno.ESTALE) else FileFormatError
    reason = (error.strerror or str(error)).lower()
    hint = ""
    if error.errno == errno.EMFILE:
        hint = "a synthesis holds all its snapshots open: raise the limit of this process, as by ulimit -n 4096"
    return kind(path, f"cannot be {verb}: {reason}", hint)


def _open(path: Path) -> int:
    try:
        with _reported(path, "opened"):
            descriptor = files.system.open(path)
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r}", "cannot be opened: no file can have this name") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        files.system.close(descriptor)
        raise FileFormatError(path, "is not a regular file")
    return descriptor


def _known_header(path: Path, descriptor: int, known: fmt.FileHeader | None) -> fmt.FileHeader:
    """The checked header; `known` itself where the file still has it, which saves taking it apart again."""
    with _reported(path, "read"):
        start, size = _read_start(path, descriptor)
    if known is not None and len(start) == known.payload_start and size == known.file_bytes:
        checksum = known.metadata.get("ema.checksum")
        if checksum is not None and headers.has_header_checksum(start, checksum):
            return known
    return headers.decode_header(path, start, size)


def _read_start(path: Path, descriptor: int) -> tuple[bytes, int]:
    """The first 8 + N bytes, and the size of the file."""
    size = os.fstat(descriptor).st_size
    prefix = files.read_at(descriptor, 8, 0)
    if len(prefix) < 8:
        raise FileFormatError(path, f"truncated: {size:,} bytes cannot hold a safetensors header")
    length = int.from_bytes(prefix, "little")
    if length > fmt.MAX_HEADER_BYTES or 8 + length > size:
        if prefix.startswith(_PICKLES):
            raise FileFormatError(path, "is a pickle (.pt, .bin), which is never read; save it as safetensors")
        raise FileFormatError(
            path, f"damaged, truncated or not safetensors: its header would take {length:,} bytes of a file of {size:,}"
        )
    start = prefix + files.read_at(descriptor, length, len(prefix))
    if len(start) < 8 + length:
        raise FileFormatError(path, "the file became shorter while it was read")
    return start, size
