"""Reading files: the header first and checked, then tensors, each block verified as it is read.

No torch here: tensors come as bytes. Files are read, never mapped, so that one that shrinks under a reader is
an error and not a crash.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots import decoding
from posthoc_cli.snapshots import format as fmt


@dataclass(frozen=True)
class Snapshot:
    """A snapshot on disk: its path, its header, what it says about itself."""

    path: Path
    header: fmt.FileHeader
    info: fmt.SnapshotInfo


def read_header(path: Path) -> fmt.FileHeader:
    """The checked header of a safetensors file.

    Raises:
        FileFormatError: the file cannot be opened, is no regular file, or is damaged.
    """
    descriptor = _open(path)
    try:
        return _read_header(path, descriptor)
    finally:
        os.close(descriptor)


class TensorFile:
    """A safetensors file opened for its tensors. Use it as a context manager.

    The header is read again and, where `expected` is given, must be that one: the file that was planned with
    is the file that is read.
    """

    def __init__(self, path: Path, expected: fmt.FileHeader | None = None) -> None:
        self.path = path
        self._descriptor = _open(path)
        try:
            self.header = _read_header(path, self._descriptor)
            if expected is not None and self.header != expected:
                raise FileFormatError(f"{path}: was replaced while it was being used; run again")
            self._checksums = decoding.decode_checksums(path, self.header)
        except BaseException:
            os.close(self._descriptor)
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
            self._fill(name, block, self.header.payload_start + entry.begin + begin)
            if digits is not None and xxhash.xxh3_64_hexdigest(block.data) != digits[16 * index : 16 * index + 16]:
                raise FileFormatError(f"{self.path}: tensor {name!r} is damaged: its checksum does not match")
        return data

    def read_unverified(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """The bytes `begin` to `end` of a tensor, for estimates only: no checksum is looked at. Shape [end - begin].

        Raises:
            FileFormatError: naming the file and the tensor, when bytes are missing.
        """
        data = np.empty(end - begin, dtype=np.uint8)
        self._fill(name, data, self.header.payload_start + self.header.tensors[name].begin + begin)
        return data

    def _fill(self, name: str, block: npt.NDArray[np.uint8], offset: int) -> None:
        view = block.data
        while view:
            with _reported(self.path, "read"):
                count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise FileFormatError(f"{self.path}: tensor {name!r}: the file became shorter while it was read")
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _reported(path: Path, verb: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be {verb}: {(error.strerror or str(error)).lower()}") from error


def _open(path: Path) -> int:
    try:
        with _reported(path, "opened"):
            # Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r}: cannot be opened: no file can have this name") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileFormatError(f"{path}: is not a regular file")
    return descriptor


def _read_header(path: Path, descriptor: int) -> fmt.FileHeader:
    with _reported(path, "read"):
        return _read_header_from(path, descriptor)


def _read_header_from(path: Path, descriptor: int) -> fmt.FileHeader:
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    if len(prefix) < 8:
        raise FileFormatError(f"{path}: truncated: {size:,} bytes cannot hold a safetensors header")
    length = int.from_bytes(prefix, "little")
    if length > fmt.MAX_HEADER_BYTES or 8 + length > size:
        raise FileFormatError(
            f"{path}: damaged, truncated or not safetensors: its header would take {length:,} bytes "
            f"of a file of {size:,}"
        )
    start = bytearray(prefix)
    while len(start) < 8 + length:
        part = os.pread(descriptor, 8 + length - len(start), len(start))
        if not part:
            raise FileFormatError(f"{path}: the file became shorter while it was read")
        start += part
    return decoding.decode_header(path, bytes(start), size)
