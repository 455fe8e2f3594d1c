"""Opening and writing of one safetensors file with checksums; `reading` reads the tensors.

Files are read, never mapped into memory, so that a file that shrinks does not crash its reader. A FileFormatError names
a file that cannot be opened, is not a regular file, is damaged or too short.

A written file is absent or complete, see `files.PendingFile`: a write that was not committed leaves nothing. Every byte
of every tensor is written exactly once, in any order and from any number of threads, and has a checksum. The header,
which holds the checksums, is laid out first and filled in last. Memory: the header and the data being written.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from posthoc_cli import files
from posthoc_cli.dtypes import DTYPES, torch_dtype
from posthoc_cli.errors import FileFormatError, RemoteError, VanishedError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.headers import DecodeCache

if TYPE_CHECKING:
    import torch

    from posthoc_cli.remote.ranges import RemoteBytes

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""The first bytes of pickles and of archives written by torch.save."""

_File = TypeVar("_File", bound="OpenedFile")


# --- opening files


@contextmanager
def named_on_error(path: Path, verb: str) -> Iterator[None]:
    """Turn the system's errors in the block into a FileFormatError: the file "cannot be {verb}", as "opened"."""
    try:
        yield
    except RemoteError:
        raise
    except OSError as error:
        raise _cannot(path, verb, error) from error
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r}", f"cannot be {verb}: no file can have this name") from error


def _cannot(path: Path, verb: str, error: OSError) -> FileFormatError:
    # ESTALE: on a network file system another host has removed a file that is open here.
    kind = VanishedError if error.errno in (errno.ENOENT, errno.ESTALE) else FileFormatError
    hint = "raise the limit of open files, as by ulimit -n 4096" if error.errno == errno.EMFILE else ""
    return kind(path, f"cannot be {verb}: {(error.strerror or str(error)).lower()}", hint)


class _LocalBytes:
    """A regular file, open for reading."""

    tag = ""

    def __init__(self, path: Path) -> None:
        self._descriptor = files.system.open(path)
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise FileFormatError(path, "is not a regular file")

    @property
    def stamp(self) -> tuple[int, int]:
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Do nothing: the operating system reads ahead."""

    def read(self, view: memoryview, offset: int) -> int:
        return files.system.read(self._descriptor, view, offset)

    def close(self) -> None:
        files.system.close(self._descriptor)


def _opened(path: Path) -> _LocalBytes | RemoteBytes:
    if not files.is_url(path):
        return _LocalBytes(path)
    from posthoc_cli.remote.ranges import RemoteBytes

    return RemoteBytes(path)


class OpenedFile:
    """A regular file or an object in a store, open for reading at any offset by any number of threads.

    Readers use its `size`, its `stamp`, and `read_into` for the bytes at an offset. It is a context manager.

    Attributes:
        tag: the identifier of an object's version; empty for a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with named_on_error(path, "opened"):
            self._bytes = _opened(path)
        self.size, self.tag = self._bytes.size, self._bytes.tag

    @property
    def stamp(self) -> tuple[int, int | str]:
        """A value that changes when the file is written to."""
        return self._bytes.stamp

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Announce which bytes this thread will read next, in order, so that those of an object are prefetched."""
        self._bytes.expect(ranges)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with the bytes from an offset on; return the number read, smaller only at the end of the file."""
        done = 0
        with named_on_error(self.path, "read"):
            while done < len(view) and (count := self._bytes.read(view[done:], offset + done)):
                done += count
        return done

    def read_at(self, count: int, offset: int) -> bytes:
        """Return `count` bytes at an offset, fewer at the end of the file."""
        buffer = bytearray(count)
        return bytes(buffer[: self.read_into(memoryview(buffer), offset)])

    def close(self) -> None:
        """Close the file."""
        self._bytes.close()

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()


def opened_in_turn(paths: Iterable[Path]) -> Iterator[Path]:
    """Iterate over the paths of files to be opened one after the other; the headers of objects are prefetched."""
    paths = list(paths)
    if not any(map(files.is_url, paths)):
        return iter(paths)
    from posthoc_cli.remote.ranges import starts_ahead

    return starts_ahead(paths)


def read_small_file(path: Path, most: int) -> bytes:
    """Return the content of a regular file; raise FileFormatError if it has more than `most` bytes."""
    with OpenedFile(path) as file:
        if file.size > most:
            raise FileFormatError(path, f"has {file.size:,} bytes; at most {most:,} are allowed")
        return file.read_at(file.size, 0)


def read_header(path: Path, cache: DecodeCache | None = None) -> fmt.FileHeader:
    """Read and check the header of a safetensors file."""
    with OpenedFile(path) as file:
        return headers.decode_header(path, read_start(file), file.size, cache)


def read_start(file: OpenedFile) -> bytes:
    """Return the first 8 + N bytes of a file, which precede the payload."""
    prefix = file.read_at(8, 0)
    if len(prefix) < 8:
        raise FileFormatError(file.path, f"truncated: {file.size:,} bytes cannot hold a safetensors header")
    length = int.from_bytes(prefix, "little")
    if length > fmt.MAX_HEADER_BYTES or 8 + length > file.size:
        if prefix.startswith(_PICKLES):
            raise FileFormatError(
                file.path, "is a pickle (.pt, .bin), not safetensors", "rename it with the suffix of its format"
            )
        reason = f"its header would take {length:,} bytes of a file of {file.size:,}"
        raise FileFormatError(file.path, f"damaged, truncated or not safetensors: {reason}")
    text = file.read_at(length, 8)
    if len(text) < length:
        raise FileFormatError(file.path, "the file became shorter while it was read")
    return prefix + text


# --- writing


class TensorFileWriter:
    """A writer of one safetensors file. Use it as a context manager and call `commit` at the end.

    `specs` are all tensors that will be written; the writer adds checksums to `metadata`.
    """

    def __init__(
        self, path: Path, specs: Sequence[fmt.TensorSpec], metadata: Mapping[str, str], overwrite: bool = False
    ) -> None:
        self.path, self._metadata = path, metadata
        self._entries = fmt.lay_out(specs)
        self._blocks = {n: [""] * -(-entry.nbytes // fmt.BLOCK_BYTES) for n, entry in self._entries.items()}
        blank = {name: fmt.blank_checksums(entry.nbytes) for name, entry in self._entries.items()}
        self._payload_start = len(fmt.encode_header(self._entries, metadata, blank))
        self._file = files.PendingFile(path, overwrite)

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write the bytes of one tensor to its place; at most once."""
        self.write_many([name], memoryview(data))

    def write_many(self, names: Sequence[str], data: memoryview) -> None:
        """Write the bytes of several tensors, concatenated in `data`; neighbours in the file are written together."""
        view = data.cast("B")
        ends = list(accumulate(self._entries[name].nbytes for name in names))
        begin = run = 0
        for name, end, following in zip(names, ends, [*names[1:], None], strict=True):
            self._blocks[name] = fmt.block_checksums(view[begin:end])
            stop = self._position(name) + end - begin
            if following is None or self._position(following) != stop:
                self._file.write_at(view[run:end], stop - (end - run))
                run = end
            begin = end

    def write_range(self, name: str, begin: int) -> RangeWriter:
        """Return a writer of a tensor's bytes from the start of a block, `begin`, to the end of another."""
        checksums = fmt.BlockChecksums(begin, self._entries[name].nbytes)
        return RangeWriter(self._file, self._blocks[name], checksums, self._position(name))

    def commit(self) -> str:
        """Fill in the header, make the file durable and give it its name; return the header's checksum."""
        checksums = {name: "".join(blocks) for name, blocks in self._blocks.items()}
        header = fmt.encode_header(self._entries, self._metadata, checksums)
        self._file.write_at(header, 0)
        self._file.publish()
        return fmt.header_checksum(header)

    def _position(self, name: str) -> int:
        return self._payload_start + self._entries[name].begin

    def discard(self) -> None:
        """Remove what was written; do nothing after `commit`."""
        self._file.discard()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class RangeWriter:
    """A writer of some blocks of one tensor, in order, in parts of any size; it computes the checksums."""

    def __init__(self, file: files.PendingFile, blocks: list[str], checksums: fmt.BlockChecksums, start: int) -> None:
        self._file, self._blocks, self._checksums, self._start = file, blocks, checksums, start

    def write(self, data: memoryview) -> None:
        """Write the next bytes."""
        view = data.cast("B")
        self._file.write_at(view, self._start + self._checksums.position)
        for block, checksum in self._checksums.of(view):
            self._blocks[block] = checksum


# --- bytes and values


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the row-major bytes of a tensor: a view if it is contiguous and on the CPU, else a copy."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_bytes(data: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor that shares the memory of these bytes."""
    import torch

    if data.size == 0:
        # torch gives empty arrays the stride 0 and refuses to view them as another dtype.
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.from_numpy(data).view(torch_dtype(dtype)).reshape(shape)


def decode_values(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    """Decode little-endian bytes as float64; a complex number becomes two."""
    if dtype.startswith("F8"):  # NumPy lacks these dtypes; torch is imported only here, since that takes a second
        return tensor_from_bytes(data.copy(), dtype, data.shape).double().numpy()  # torch needs writable memory
    if dtype == "BF16":  # the upper half of a float32
        values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view("float32" if dtype == "C64" else DTYPES[dtype].torch_name)
    with np.errstate(invalid="ignore"):  # converting a signalling nan sets a floating-point flag
        return values.astype(np.float64)


def holds_nonfinite(data: memoryview, dtype: str) -> bool:
    """Return whether little-endian numbers of a dtype (a safetensors name) include nan or infinity.

    Without the sign, the bit patterns of floating-point numbers are in the order of the numbers, non-finite ones last.
    Read as signed integers, the positive numbers are the largest, in this order; read as unsigned integers, the
    negative numbers are. Comparing the two maxima with the first non-finite number therefore suffices, without a copy.
    """
    item, nonfinite = DTYPES[dtype].nbytes, DTYPES[dtype].first_nonfinite
    if not nonfinite or not len(data):
        return False
    sign = 1 << (8 * item - 1)
    signed = np.frombuffer(data, f"<i{item}")
    return int(signed.max()) >= nonfinite or int(signed.view(f"<u{item}").max()) >= sign | nonfinite
