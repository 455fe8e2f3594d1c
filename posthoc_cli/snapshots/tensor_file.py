"""One safetensors file with checksums: opened, its header read, and written; its tensors are read by `reading`.

Files are read, never mapped, so that one that shrinks under a reader is no crash. A FileFormatError names the file that
cannot be opened, is no regular file, is damaged or too short.

Written: a file is absent or complete, see `files.PendingFile`: a write that was not committed leaves nothing. Every
byte of every tensor is written exactly once, in any order and from any number of threads, and has a checksum. The
header, which holds the checksums, is laid out first and filled in last. Memory: the header and what is being written.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
"""First bytes of pickles and of archives of torch.save."""

_File = TypeVar("_File", bound="OpenedFile")


# --- opening files


@contextmanager
def named_on_error(path: Path, verb: str) -> Iterator[None]:
    """Turn the system's errors of the block into a FileFormatError: the file cannot be opened, or read."""
    try:
        yield
    except RemoteError:
        raise
    except OSError as error:
        raise _cannot(path, verb, error) from error
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r}", f"cannot be {verb}: no file can have this name") from error


def _cannot(path: Path, verb: str, error: OSError) -> FileFormatError:
    # On a network file system an open file goes away, too, when another host removes it.
    kind = VanishedError if error.errno in (errno.ENOENT, errno.ESTALE) else FileFormatError
    hint = "raise the limit of open files, as by ulimit -n 4096" if error.errno == errno.EMFILE else ""
    return kind(path, f"cannot be {verb}: {(error.strerror or str(error)).lower()}", hint)


class _LocalBytes:
    """The bytes of a regular file."""

    tag = ""

    def __init__(self, path: Path) -> None:
        self._descriptor = files.system.open(path)
        known = os.fstat(self._descriptor)
        self.size = known.st_size
        if not stat.S_ISREG(known.st_mode):
            self.close()
            raise FileFormatError(path, "is not a regular file")

    @property
    def stamp(self) -> tuple[int, int]:
        found = os.fstat(self._descriptor)
        return found.st_size, found.st_mtime_ns

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """The system reads ahead itself."""

    def read(self, view: memoryview, offset: int) -> int:
        return files.system.read(self._descriptor, view, offset)

    def close(self) -> None:
        files.system.close(self._descriptor)


def _opened(path: Path) -> _LocalBytes | RemoteBytes:
    if not files.is_url(path):
        return _LocalBytes(path)
    from posthoc_cli.remote.ranges import RemoteBytes
    from posthoc_cli.remote.store import RemotePath

    if isinstance(path, RemotePath) and path.is_spooled:
        with suppress(FileNotFoundError):
            return _LocalBytes(path)
    return RemoteBytes(path)


class OpenedFile:
    """A regular file or an object in a store, open for reading at any place by any number of threads.

    All that readers ask of a file: its `size` and `stamp`, and its bytes at an offset by `read_into`. A context
    manager.

    Attributes:
        tag: what tells an object from others of its name; empty for a file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with named_on_error(path, "opened"):
            self._bytes = _opened(path)
        self.size, self.tag = self._bytes.size, self._bytes.tag

    @property
    def stamp(self) -> tuple[int, int | str]:
        """Another one when the file has been written to."""
        return self._bytes.stamp

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which bytes this thread will read next, in order: of an object they are asked for ahead."""
        self._bytes.expect(ranges)

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with the bytes from an offset on; returns how many, fewer only at the end of the file."""
        done = 0
        with named_on_error(self.path, "read"):
            while done < len(view) and (count := self._bytes.read(view[done:], offset + done)):
                done += count
        return done

    def read_at(self, count: int, offset: int) -> bytes:
        """The bytes at an offset; fewer at the end of the file."""
        room = bytearray(count)
        return bytes(room[: self.read_into(memoryview(room), offset)])

    def close(self) -> None:
        """Close the file."""
        self._bytes.close()

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close()


def opened_in_turn(paths: Iterable[Path]) -> Iterator[Path]:
    """The same paths, of files that will be opened one after the other: objects are asked for ahead."""
    paths = list(paths)
    if not any(map(files.is_url, paths)):
        return iter(paths)
    from posthoc_cli.remote.ranges import starts_ahead

    return starts_ahead(paths)


def read_small_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes."""
    with OpenedFile(path) as file:
        if file.size > most:
            raise FileFormatError(path, f"has {file.size:,} bytes; at most {most:,} are allowed")
        return file.read_at(file.size, 0)


def read_header(path: Path, cache: DecodeCache | None = None) -> fmt.FileHeader:
    """The checked header of a safetensors file."""
    with OpenedFile(path) as file:
        return headers.decode_header(path, read_start(file), file.size, cache)


def read_start(file: OpenedFile) -> bytes:
    """The first 8 + N bytes: all before the payload."""
    prefix = file.read_at(8, 0)
    if len(prefix) < 8:
        raise FileFormatError(file.path, f"truncated: {file.size:,} bytes cannot hold a safetensors header")
    length = int.from_bytes(prefix, "little")
    if length > fmt.MAX_HEADER_BYTES or 8 + length > file.size:
        if prefix.startswith(_PICKLES):
            raise FileFormatError(file.path, "is a pickle (.pt, .bin), not safetensors", "give it its own ending")
        told = f"its header would take {length:,} bytes of a file of {file.size:,}"
        raise FileFormatError(file.path, f"damaged, truncated or not safetensors: {told}")
    text = file.read_at(length, 8)
    if len(text) < length:
        raise FileFormatError(file.path, "the file became shorter while it was read")
    return prefix + text


# --- writing


class TensorFileWriter:
    """Writes one safetensors file. Use it as a context manager and end with `commit`.

    `specs` are all tensors that will be written; checksums are added to `metadata`.
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
        """Write the bytes of one tensor to its place, once."""
        self.write_many([name], memoryview(data))

    def write_many(self, names: Sequence[str], data: memoryview) -> None:
        """Write the bytes of several tensors, which follow each other in `data`; neighbours go in one write."""
        view = data.cast("B")
        ends = list(accumulate(self._entries[name].nbytes for name in names))
        begin = run = 0
        for name, end, following in zip(names, ends, [*names[1:], None], strict=True):
            for index, checksum in enumerate(fmt.block_checksums(view[begin:end])):
                self._blocks[name][index] = checksum
            stop = self._position(name) + end - begin
            if following is None or self._position(following) != stop:
                self._file.write_at(view[run:end], stop - (end - run))
                run = end
            begin = end

    def write_range(self, name: str, begin: int) -> RangeWriter:
        """Write the bytes of a tensor, in order, from the start of a block to the end of a block or of the tensor."""
        sums = fmt.BlockChecksums(begin, self._entries[name].nbytes)
        return RangeWriter(self._file, self._blocks[name], sums, self._position(name))

    def commit(self) -> str:
        """Fill in the header, make everything durable, and give the file its name; returns the header's checksum."""
        checksums = {name: "".join(blocks) for name, blocks in self._blocks.items()}
        header = fmt.encode_header(self._entries, self._metadata, checksums)
        self._file.write_at(header, 0)
        self._file.publish()
        return fmt.header_checksum(header)

    def _position(self, name: str) -> int:
        return self._payload_start + self._entries[name].begin

    def discard(self) -> None:
        """Remove what was written; does nothing after `commit`."""
        self._file.discard()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class RangeWriter:
    """Some blocks of one tensor, written in order, in parts of any size; checksums run along."""

    def __init__(self, file: files.PendingFile, blocks: list[str], sums: fmt.BlockChecksums, start: int) -> None:
        self._file, self._blocks, self._sums, self._start = file, blocks, sums, start

    def write(self, data: memoryview) -> None:
        """Write the bytes that come next."""
        view = data.cast("B")
        self._file.write_at(view, self._start + self._sums.position)
        for block, checksum in self._sums.of(view):
            self._blocks[block] = checksum


# --- bytes and values


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row-major; a view where it is contiguous and on the CPU."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_bytes(data: npt.NDArray[np.uint8], dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of these bytes; it shares their memory."""
    import torch

    if data.size == 0:
        # torch gives an empty array the stride 0, which it then refuses to view as another dtype.
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.from_numpy(data).view(torch_dtype(dtype)).reshape(shape)


def decode_values(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    """Little-endian bytes as float64; a complex number is its two parts."""
    if dtype.startswith("F8"):  # NumPy lacks them, and torch takes a second to import
        return tensor_from_bytes(data.copy(), dtype, data.shape).double().numpy()  # which it may write
    if dtype == "BF16":  # the upper half of a float32
        values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view("float32" if dtype == "C64" else DTYPES[dtype].torch_name)
    with np.errstate(invalid="ignore"):  # some kinds of nan raise a flag of the processor
        return values.astype(np.float64)


def holds_nonfinite(data: memoryview, dtype: str) -> bool:
    """Whether little-endian numbers of a dtype (a safetensors name) include nan or infinity.

    Without their signs, the bits of floating-point numbers are in the order of the numbers, and those that are not
    finite come last. As signed integers the positive ones are in this order, above all others; as unsigned ones the
    negative ones are, above all others. So the two largest integers decide, without a copy.
    """
    item, least = DTYPES[dtype].nbytes, DTYPES[dtype].first_nonfinite
    if not least or not len(data):
        return False
    sign = 1 << (8 * item - 1)
    signed = np.frombuffer(data, f"<i{item}")
    return int(signed.max()) >= least or int(signed.view(f"<u{item}").max()) >= sign | least
