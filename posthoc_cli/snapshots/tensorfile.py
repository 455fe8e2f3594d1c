"""One file of tensors: read by verified ranges, from any thread, and written durably.

A file of this package is a safetensors file, which any safetensors reader opens:

    8 bytes     N, the length of the header, unsigned little-endian, at most 100,000,000
    N bytes     the header: one JSON object in UTF-8, padded with spaces to a multiple of 8
    the rest    the payload: at most 200,000 tensors in the order of their offsets, little-endian,
                without gaps

The header maps each tensor's name to {"dtype", "shape", "data_offsets": [begin, end]} (offsets
count from the start of the payload), and `__metadata__` to strings, of which these are ours and
come first:

    ema.checksum    the checksum of the header
    ema             one JSON object: "sums" (it comes first), "kind" ("snapshot" or "output"),
                    "format" (4), and the fields of the dataclass of that kind,
                    `snapshot.Snapshot` or `outputs.OutputInfo`

Checksums are XXH3 (64 bits, seed 0), written as 16 hexadecimal digits, most significant first.
"sums" concatenates the checksums of all blocks of the payload, in its order. A block has 131,072
elements of one tensor in row-major order; the last one of a tensor is shorter. The checksum of the
header is computed over its 8 + N bytes with zeros in place of these 16 digits.

A header is checked in this order: its checksum, its structure (strict JSON, known dtypes, tensors
that fill the file without gap or overlap), its content. Files are read, never mapped into memory,
so that a file that shrinks does not crash its reader. Every fault is a FileFormatError that names
the file, and the tensor or key.
"""

from __future__ import annotations

import errno
import json
import math
import operator
import os
import re
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from numpy.lib.stride_tricks import as_strided

from posthoc_cli import files
from posthoc_cli.dtypes import DTYPES, ITEM_BYTES, torch_dtype
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    RemoteError,
    UnsuitableError,
    VanishedError,
    quote,
)

if TYPE_CHECKING:
    import torch

    from posthoc_cli.remote import RemoteBytes

SUFFIX = ".safetensors"
FORMAT = 4
WITH_AVERAGE = 3  # the format in which a snapshot's sample also had as many values of the average
FORMATS = (WITH_AVERAGE, FORMAT)  # that are read
BLOCK = 131_072
"""Elements of a block, which has a checksum of its own: the tiles of a synthesis consist of blocks,
for any dtype."""

MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 200_000
# of a header: a tensor of ten dimensions has 16. A parsed value takes up to 90 bytes of memory.
MAX_VALUES = 16 * MAX_TENSORS
"""The largest number of tensors in a file: twice as many as the largest models have. It bounds the
time to read a header."""

# requests to a store, or blocks to verify, at a time: they wait more than they compute
THREADS = 16

_START = b'{"__metadata__":{"ema.checksum":"'
# the place of the header's checksum in a file
_DIGITS = slice(8 + len(_START), 8 + len(_START) + 16)
_SUMS_AT = _DIGITS.stop + len(b'","ema":"{\\"sums\\":\\"')
"""The place of the checksums of blocks in a file that was written here."""

# blocks that are read by one request, and verified while they are in the processor's cache
_PIECE = 8

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""The first bytes of pickles and of archives written by torch.save."""

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored tensor: its dtype (a safetensors name), its shape and, if it is in a file, where it
    begins there.

    `strides` has the stride of each dimension, in elements; it is empty if the tensor is stored in
    row-major order.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int = 0
    strides: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // BLOCK)

    @property
    def block_bytes(self) -> int:
        return BLOCK * ITEM_BYTES[self.dtype]

    @property
    def reach(self) -> int:
        """The number of elements from the first to the last in the file."""
        if not self.strides:
            return self.size
        reach = 1
        for length, step in zip(self.shape, self.strides, strict=True):
            reach += (length - 1) * step
        return reach

    def view(
        self,
        data: npt.NDArray[np.uint8],
    ) -> npt.NDArray[Any]:
        """View the elements in the bytes of the file from `begin` on."""
        dtype = items(self.dtype)
        stored = data[: self.reach * dtype.itemsize].view(dtype)
        strides = self.strides or row_major(self.shape)
        steps = [dtype.itemsize * step for step in strides]
        return as_strided(stored, self.shape, steps)


# --- boxes
#
# Training on several processes cuts a tensor into chunks, each a box of its index space. A reader
# asks for another box: the complete tensor, or a chunk of another device mesh. Every box is stored
# in row-major order, so that the elements of an intersection have the same order in both boxes.


@dataclass(frozen=True)
class Box:
    """A box of a tensor's index space: `shape` indices from `offset` on in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def full(cls, shape: Sequence[int]) -> Box:
        """Make the box of all indices of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """The first index after the box in each dimension."""
        return tuple(map(operator.add, self.offset, self.shape))

    def intersection(self, other: Box) -> Box:
        """Intersect with another box; the result has size 0 if they have no common element."""
        begin = tuple(map(max, self.offset, other.offset))
        end = map(min, self.end, other.end)
        lengths = []
        for first, last in zip(begin, end, strict=True):
            lengths.append(max(0, last - first))
        return Box(begin, tuple(lengths))

    def span(self, inner: Box) -> tuple[int, int]:
        """Find the row-major positions in this box of the first element of `inner` and after its
        last one."""
        first = 0
        reach = 1
        for axis, step in enumerate(row_major(self.shape)):
            first += (inner.offset[axis] - self.offset[axis]) * step
            reach += (inner.shape[axis] - 1) * step
        return first, first + reach

    def view(
        self,
        elements: npt.NDArray[Any],
        inner: Box,
        first: int,
    ) -> npt.NDArray[Any]:
        """View the elements of `inner` among this box's row-major elements, which begin with number
        `first`."""
        begin, _ = self.span(inner)
        steps = [elements.itemsize * step for step in row_major(self.shape)]
        return as_strided(elements[begin - first :], inner.shape, steps)


@dataclass(frozen=True)
class Chunk:
    """The place of a chunk: the `shape` of the complete tensor and the `offset` of the chunk's
    first element."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def box(self, shape: tuple[int, ...]) -> Box:
        """Make the chunk's box, given its own shape."""
        return Box(self.offset, shape)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Compute the row-major strides of a shape, in elements."""
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def boxes_of_range(
    box: Box,
    begin: int,
    end: int,
) -> Iterator[Box]:
    """Yield the row-major elements `begin` to `end` of a box as boxes, in order: less than two per
    dimension."""
    if begin >= end:
        return
    if not box.shape:
        yield box
        return
    inner = Box(box.offset[1:], box.shape[1:])
    row = inner.size
    while begin < end:
        index, within = divmod(begin, row)
        at = box.offset[0] + index
        count = (end - begin) // row if within == 0 else 0
        if count:
            yield Box((at, *inner.offset), (count, *inner.shape))
        else:
            last = min(within + end - begin, row)
            for part in boxes_of_range(inner, within, last):
                yield Box((at, *part.offset), (1, *part.shape))
        begin = (index + max(count, 1)) * row


def cover_problem(
    shape: Sequence[int],
    chunks: Sequence[Box],
) -> str | None:
    """Say why chunks do not hold each element of a tensor exactly once; None if they do.

    Chunks of a mesh are the cells of a grid: each dimension is cut into intervals, and every
    combination occurs once. Chunks without elements are ignored.
    """
    filled = [chunk for chunk in chunks if chunk.size]
    is_empty = not filled and 0 in shape
    if chunks and (is_empty or _are_cells(filled, shape)):
        return None
    return "its chunks do not hold each element exactly once"


def _are_cells(
    chunks: Sequence[Box],
    shape: Sequence[int],
) -> bool:
    """Return whether chunks are all cells of a grid over a shape, each once."""
    cells = 1
    for axis, length in enumerate(shape):
        intervals = sorted({(chunk.offset[axis], chunk.end[axis]) for chunk in chunks})
        begins = [begin for begin, _ in intervals]
        ends = [end for _, end in intervals]
        if [0, *ends] != [*begins, length]:
            return False
        cells *= len(intervals)
    return len({*chunks}) == len(chunks) == cells


# --- opening files


@contextmanager
def named_on_error(path: Path, verb: str) -> Iterator[None]:
    """Turn the system's errors in the block into a FileFormatError: the file "cannot be {verb}", as
    "opened"."""
    try:
        yield
    except RemoteError:
        raise
    except OSError as error:
        # ESTALE: on a network file system another host has removed a file that is open here.
        kind = VanishedError if error.errno in (errno.ENOENT, errno.ESTALE) else FileFormatError
        reason = error.strerror or str(error)
        hint = ""
        if error.errno == errno.EMFILE:
            hint = "raise the limit of open files, as with ulimit -n 4096"
        raise kind(path, f"cannot be {verb}: {reason.lower()}", hint) from error
    except ValueError as error:
        reason = "no file can have this name"
        raise FileFormatError(f"{str(path)!r}", f"cannot be {verb}: {reason}") from error


class OpenedFile:
    """A regular file or one in a store, open for reading at any offset by any number of threads.

    It is a context manager.

    Attributes:
        size: its length in bytes.
        tag: what a store says that differs for other content; empty for a file.
        stamp: a value that changes when the file is written to, as it was at the opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tag = ""
        self.remote: RemoteBytes | None = None
        with named_on_error(path, "opened"):
            if files.is_url(path):
                from posthoc_cli.remote import RemoteBytes

                self.remote = RemoteBytes(path)
                self.size = self.remote.size
                self.tag = self.remote.tag
                self.stamp: tuple[int, int | str] = self.size, self.tag
                return
            self._descriptor = files.system.open(path)
            status = os.fstat(self._descriptor)
            self.size = status.st_size
            self.stamp = self.size, status.st_mtime_ns
            if not stat.S_ISREG(status.st_mode):
                self.close()
                raise UnsuitableError(path, "is not a regular file")

    def is_changed(self) -> bool:
        """Return whether the file was written to since the opening."""
        if self.remote:
            with named_on_error(self.path, "read"):
                return self.remote.stamp() != self.stamp
        status = os.fstat(self._descriptor)
        return (status.st_size, status.st_mtime_ns) != self.stamp

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with the bytes from an offset on; return the number read, smaller only at the
        end of the file."""
        done = 0
        count = 1
        with named_on_error(self.path, "read"):
            while done < len(view) and count:
                rest = view[done:]
                at = offset + done
                if self.remote:
                    count = self.remote.read(rest, at)
                else:
                    count = files.system.read(self._descriptor, rest, at)
                done += count
        return done

    def read_at(self, count: int, offset: int) -> bytes:
        """Read `count` bytes at an offset, fewer at the end of the file."""
        buffer = bytearray(count)
        count = self.read_into(memoryview(buffer), offset)
        return bytes(buffer[:count])

    def close(self) -> None:
        if self.remote:
            self.remote.close()
        else:
            files.system.close(self._descriptor)

    def __enter__(self) -> OpenedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_small_file(path: Path, most: int) -> bytes:
    """Read the content of a regular file; raise FileFormatError if it has more than `most`
    bytes."""
    with OpenedFile(path) as file:
        if file.size > most:
            raise FileFormatError(path, f"has {file.size:,} bytes; at most {most:,} are allowed")
        return file.read_at(file.size, 0)


def file_size(path: Path) -> int:
    """Find the size of a file or object for a progress bar; 0 if it is unknown."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


# the number and size of the pieces of a file from which its identity is computed
_SAMPLES = 16
_SAMPLE = 4096


def sampled_identity(file: OpenedFile) -> str:
    """Compute 16 hexadecimal digits from a file's size and evenly spaced pieces of its content; for
    an object with a tag from its size and the tag."""
    size = file.size.to_bytes(8, "little")
    digest = xxhash.xxh3_64(size + file.tag.encode())
    last = max(0, file.size - _SAMPLE)
    for index in range(0 if file.tag else _SAMPLES):
        position = last * index // (_SAMPLES - 1)
        digest.update(file.read_at(_SAMPLE, position))
    return digest.hexdigest()


def in_turn(
    work: Callable[[S], T],
    things: Sequence[S],
    at_once: bool,
) -> Iterator[T]:
    """Yield the result of `work` for each thing, in order; with `at_once` for several at a time, as
    requests to a store wait more than they compute."""
    if not at_once:
        yield from map(work, things)
        return
    with ThreadPoolExecutor(THREADS, "ema-in-turn") as pool:
        yield from pool.map(work, things)


# --- a file of tensors


@dataclass(eq=False)
class Handle:
    """A file that is opened once for all who read it at a time, in any thread."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    file: OpenedFile | None = None
    users: int = 0
    # the last tensor that is stored in another order, and its bytes in row-major order
    reordered: tuple[Entry, npt.NDArray[np.uint8]] | None = None


@dataclass(eq=False)
class TensorFile:
    """A file of tensors, each at a known place. As a context manager it stays open; else it is
    opened for each read."""

    path: Path
    entries: Mapping[str, Entry]  # the tensors in the file, or the chunks of tensors
    stamp: tuple[int, int | str]  # the file's size, and a value that changes when it is written to
    # the checksums of each tensor's blocks; empty for another program's file
    sums: Mapping[str, str] = field(default_factory=dict)
    # what chunks hold; empty if all tensors are complete
    boxes: Mapping[str, Box] = field(default_factory=dict)
    # the strings in its header, but for this package's
    metadata: Mapping[str, str] = field(default_factory=dict)
    # this package's JSON object, without "sums"
    content: Mapping[str, Any] = field(default_factory=dict)
    # identifies the content: the header's checksum, or for a checkpoint `sampled_identity`
    checksum: str = ""
    # the sets of tensors of a checkpoint share it
    handle: Handle = field(default_factory=Handle, repr=False)

    @property
    def nbytes(self) -> int:
        return self.stamp[0]

    @property
    def kind(self) -> str | None:
        """The kind of the file: "snapshot", "output", or None for another program's file."""
        kind = self.content.get("kind")
        return kind if kind is None else str(kind)

    def box(self, name: str) -> Box | None:
        """Find the box of a tensor's elements in the file; None if it has none."""
        if self.boxes:
            return self.boxes.get(name)
        if name not in self.entries:
            return None
        return Box.full(self.entries[name].shape)

    def __enter__(self) -> TensorFile:
        handle = self.handle
        with handle.lock:
            if handle.file is None:
                handle.file = self._open()
            handle.users += 1
        return self

    @contextmanager
    def opened(self) -> Iterator[OpenedFile]:
        """Open the file as `with` does, to read any of its bytes."""
        with self:
            assert self.handle.file is not None, "it is open"
            yield self.handle.file

    def _open(self) -> OpenedFile:
        """Open the file; raise FileFormatError if it is not the one whose header was read."""
        with ExitStack() as stack:
            file = stack.enter_context(OpenedFile(self.path))
            if file.stamp != self.stamp:
                # The header identifies a file whose blocks are verified, also if it was copied over
                # itself.
                start = file.read_at(_DIGITS.stop, 0)
                if not self.sums or start[_DIGITS] != self.checksum.encode():
                    reason = "was replaced while it was being used"
                    raise FileFormatError(self.path, reason, "run again")
            stack.pop_all()
        return file

    def __exit__(self, kind: object, *_: object) -> None:
        """Close the file; raise FileFormatError if it has no checksums and was changed
        meanwhile."""
        handle = self.handle
        with handle.lock:
            handle.users -= 1
            file = handle.file
            if handle.users or file is None:
                return
            handle.file = None
            handle.reordered = None
        with file:
            if kind is None and not self.sums and file.is_changed():
                raise FileFormatError(self.path, "was changed while it was being read", "run again")

    def read(
        self,
        name: str,
        begin: int,
        view: memoryview,
        verify: bool = True,
    ) -> None:
        """Fill `view` with the bytes of a tensor, in row-major order, from `begin` on; verify all
        their blocks."""
        entry = self.entries[name]
        end = begin + len(view)
        with self:
            if entry.strides:
                view[:] = self._in_order(name)[begin:end].data
                return
            if not (verify and self.sums):
                self._fill(entry.begin + begin, view)
                return
            block = entry.block_bytes
            first = begin - begin % block
            blocks = -(-end // block)
            last = min(blocks * block, entry.nbytes)
            room = view
            if (first, last) != (begin, end):
                room = np.empty(last - first, np.uint8).data
            size = _PIECE * block
            for at in range(first, last, size):
                start = at - first
                piece = room[start : start + size]
                self._fill(entry.begin + at, piece)
                self._check(name, at, piece)
            if room is not view:
                view[:] = room[begin - first : end - first]

    def read_many(self, names: Sequence[str], view: memoryview) -> None:
        """Fill `view` with complete tensors, end to end, verified; neighbours in the file are read
        together."""
        # the place in the file less that in `view`, begin and end in `view`
        runs: list[list[int]] = []
        sizes = [self.entries[name].nbytes for name in names]
        spans = [*pairwise(accumulate(sizes, initial=0))]
        with self:
            for name, (begin, end) in zip(names, spans, strict=True):
                entry = self.entries[name]
                offset = entry.begin - begin
                if entry.strides:
                    self.read(name, 0, view[begin:end])
                elif runs and runs[-1][::2] == [offset, begin]:
                    runs[-1][2] = end
                else:
                    runs.append([offset, begin, end])
            for offset, begin, end in runs:
                self._fill(offset + begin, view[begin:end])
        for name, (begin, end) in zip(names, spans, strict=True):
            self._check(name, 0, view[begin:end])

    def _check(
        self,
        name: str,
        begin: int,
        view: memoryview,
    ) -> None:
        """Raise FileFormatError unless the complete blocks of a tensor from `begin` on match their
        checksums."""
        if not self.sums:
            return
        size = self.entries[name].block_bytes
        sums = self.sums[name]
        for at in range(0, len(view), size):
            position = 16 * ((begin + at) // size)
            digest = xxhash.xxh3_64_hexdigest(view[at : at + size])
            if digest != sums[position : position + 16]:
                reason = f"tensor {quote(name)} is damaged: its checksum does not match"
                raise FileFormatError(self.path, reason)

    def _fill(self, offset: int, view: memoryview) -> None:
        file = self.handle.file
        assert file is not None, "each caller has opened it"
        if file.read_into(view, offset) < len(view):
            raise FileFormatError(self.path, _SHORTER)

    def _in_order(self, name: str) -> npt.NDArray[np.uint8]:
        """Read the bytes, in row-major order, of a tensor stored in another order; the last such
        tensor is kept."""
        entry = self.entries[name]
        handle = self.handle
        with handle.lock:
            if handle.reordered is None or handle.reordered[0] != entry:
                stored = np.empty(entry.reach * ITEM_BYTES[entry.dtype], np.uint8)
                self._fill(entry.begin, stored.data)
                values = np.ascontiguousarray(entry.view(stored)).reshape(-1)
                handle.reordered = entry, values.view(np.uint8)
            return handle.reordered[1]

    def verify(self, progress: Callable[[int], object]) -> None:
        """Read every byte, on several threads; raise the FileFormatError of the first damaged
        tensor."""
        blocks = []
        in_order = sorted(self.entries.items(), key=lambda item: item[1].begin)
        for name, entry in in_order:
            for begin in range(0, entry.nbytes, entry.block_bytes):
                blocks.append((name, begin))

        def read(block: tuple[str, int]) -> int:
            name, begin = block
            entry = self.entries[name]
            size = min(entry.block_bytes, entry.nbytes - begin)
            self.read(name, begin, np.empty(size, np.uint8).data)
            return size

        progress(self.nbytes - sum(entry.nbytes for entry in self.entries.values()))
        sizes: Any = in_turn(read, blocks, at_once=True)
        with self, closing(sizes):  # which cancels the blocks that were not begun
            for size in sizes:
                progress(size)


# --- headers


def read_file(path: Path) -> TensorFile:
    """Read the header of a safetensors file, and check all that can be checked without the
    payload."""
    with OpenedFile(path) as file:
        return decode_file(file)


def decode_file(file: OpenedFile) -> TensorFile:
    """Read and check the header of an opened safetensors file."""
    start = _read_start(file)
    checksum = ""
    if start.startswith(_START, 8):
        checksum = start[_DIGITS].decode(errors="replace")
    try:
        _require(not checksum or checksum == seal(bytearray(start)), _DAMAGED)
        _require_few(start.count(b'"dtype"'))  # before all of them are parsed
        raw = parse_object(file.path, start[8:], "header")
        metadata = raw.pop("__metadata__", {})
        _require(_are_strings(metadata), "__metadata__ must map names to strings")
        own = metadata.pop("ema", "")
        mark = metadata.pop("ema.checksum", "")
        _require(bool(checksum) or not (mark or own.startswith('{"')), _DAMAGED)
        entries = _decode_entries(raw, len(start), file.size)
        content: dict[str, Any] = {}
        sums: dict[str, str] = {}
        if checksum:
            content = parse_object(file.path, own, "ema")
            sums = _decode_sums(content.pop("sums", None), entries)
    except ValueError as error:
        raise FileFormatError(file.path, str(error)) from None
    return TensorFile(file.path, entries, file.stamp, sums, {}, metadata, content, checksum)


def _are_strings(metadata: Any) -> bool:
    return isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())


_DAMAGED = "damaged header: its checksum does not match"
_SHORTER = "became shorter while it was read"


def _require(is_right: bool, problem: str) -> None:
    """Raise a ValueError that says what is wrong, unless a condition holds."""
    if not is_right:
        raise ValueError(problem)


def _require_few(count: int) -> None:
    problem = f"its header names {count:,} tensors; at most {MAX_TENSORS:,} are allowed"
    _require(count <= MAX_TENSORS, problem)


def _read_start(file: OpenedFile) -> bytes:
    """Read the first 8 + N bytes of a file, which precede the payload."""
    prefix = file.read_at(8, 0)
    if len(prefix) < 8:
        reason = f"truncated: {file.size:,} bytes cannot hold a safetensors header"
        raise FileFormatError(file.path, reason)
    length = int.from_bytes(prefix, "little")
    if length <= MAX_HEADER_BYTES and 8 + length <= file.size:
        text = file.read_at(length, 8)
        if len(text) < length:
            raise FileFormatError(file.path, _SHORTER)
        return prefix + text
    if prefix.startswith(_PICKLES):
        reason = "is a pickle (.pt, .bin), not safetensors"
        hint = "name a safetensors file, or give this one the suffix of its format"
        raise FileFormatError(file.path, reason, hint)
    taken = f"its header would take {length:,} bytes of a file of {file.size:,}"
    raise FileFormatError(file.path, f"damaged, truncated or not safetensors: {taken}")


def seal(header: bytearray) -> str:
    """Put the checksum of a header into it, and return it."""
    header[_DIGITS] = b"0" * 16
    checksum = xxhash.xxh3_64_hexdigest(header)
    header[_DIGITS] = checksum.encode()
    return checksum


def _decode_entries(
    raw: dict[str, Any],
    start: int,
    nbytes: int,
) -> dict[str, Entry]:
    """Decode the tensors in their order in the payload, which they must fill to the end of the file
    of `nbytes`."""
    _require_few(len(raw))  # escaped keys were not counted before
    entries = {name: _decode_entry(name, value, start) for name, value in raw.items()}

    def place(name: str) -> tuple[int, int, str]:
        return entries[name].begin, entries[name].nbytes, name

    in_order = {name: entries[name] for name in sorted(entries, key=place)}
    position = start
    for name, entry in in_order.items():
        if entry.begin != position:
            places = f"{entry.begin - start:,}, not at {position - start:,}"
            raise ValueError(f"tensor {quote(name)}: begins at {places}")
        position += entry.nbytes
    state = "truncated" if nbytes < position else "too long"
    problem = f"{state}: has {nbytes:,} bytes, its header says {position:,}"
    _require(position == nbytes, problem)
    return in_order


def _decode_entry(name: str, value: Any, start: int) -> Entry:
    """Decode a tensor's entry of a header; raise ValueError if it is malformed."""
    try:
        dtype = value["dtype"]
        shape = value["shape"]
        begin, end = value["data_offsets"]
        are_sizes = isinstance(shape, list) and is_sizes([begin, end, *shape])
        is_entry = len(value) == 3 and are_sizes
    except (TypeError, KeyError, ValueError):
        is_entry = False
    # Sizes of 0 are ignored here, since no array library can represent the strides of such a shape.
    is_usual = is_entry and len(shape) <= 64 and math.prod(filter(None, shape)) < 2**60
    if not is_usual:
        raise ValueError(f"tensor {quote(name)}: its header entry is malformed")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        accepted = ", ".join(ITEM_BYTES)
        raise ValueError(f"tensor {quote(name)}: dtype {quote(dtype)} is not one of {accepted}")
    entry = Entry(dtype, tuple(shape), start + begin)
    if end - begin != entry.nbytes:
        reason = f"{end - begin:,} bytes do not make {dtype} of shape {shape}"
        raise ValueError(f"tensor {quote(name)}: {reason}")
    return entry


def _decode_sums(
    sums: Any,
    entries: Mapping[str, Entry],
) -> dict[str, str]:
    lengths = [16 * entry.blocks for entry in entries.values()]
    is_complete = isinstance(sums, str) and len(sums) == sum(lengths)
    _require(is_complete, "ema: sums must have a checksum for each block of each tensor")
    of_tensors = {}
    begin = 0
    for name, length in zip(entries, lengths, strict=True):
        end = begin + length
        of_tensors[name] = sums[begin:end]
        begin = end
    return of_tensors


def is_sizes(value: Any) -> bool:
    """Return whether a JSON value is a list of valid sizes or offsets, such as a shape."""
    return isinstance(value, list | tuple) and all(
        type(size) is int and 0 <= size < 2**60 for size in value
    )


# --- JSON


def parse_object(
    path: Path,
    data: bytes | str,
    what: str,
    most: int = MAX_VALUES,
) -> dict[str, Any]:
    """Parse an object of at most `most` values in strict JSON: no duplicate keys, no NaN, no zero
    bytes, no text that is not Unicode."""
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        objects = text.count("{") + text.count("[")  # each takes 64 bytes of memory
        most_objects = len(text) // 8 + 1000
        _require(objects <= most_objects, "holds more objects than its length explains")
        values = text.count(",")
        _require(values <= most, f"holds {values:,} values; at most {most:,} are allowed")
        value: dict[str, Any] = _DECODER.decode(text)
        if "\\u" in text:  # only escapes can produce such text
            check_text(compact(value))
        _require(isinstance(value, dict), "must be a JSON object")
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, f"damaged {what}: {str(error)[:200]}") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    _require(len(result) == len(pairs), "the same key twice")
    return result


_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=lambda constant: _require(False, f"{constant} is not JSON"),
)

_NO_TEXT = re.compile(r"[\ud800-\udfff]|\\u0000")  # lone surrogates and escaped zero bytes


def check_text(text: str) -> None:
    """Raise ValueError if a name or value in compact JSON has a zero byte or is not Unicode."""
    if bad := _NO_TEXT.search(text):
        begin = max(0, bad.start() - 40)
        near = ascii(text[begin : bad.end() + 40])
        raise ValueError(f"a name or value has a zero byte or is not Unicode text: {near}")


def compact(value: object) -> str:
    """Write a value as JSON without spaces: arrays as lists, dataclasses as objects."""

    def plain(value: Any) -> object:
        if isinstance(value, np.ndarray):
            return value.tolist()
        return vars(value)

    return json.dumps(
        value,
        separators=(",", ":"),
        ensure_ascii=False,
        allow_nan=False,
        default=plain,
    )


# --- writing


class TensorFileWriter:
    """A writer of one file, which is absent or complete, see `files.PendingFile`. Call `publish` at
    the end.

    Every byte of every tensor is written once, in any order and by any number of threads. The
    header, which holds the checksums, is laid out first and filled in last.

    Arguments:
        entries: dtype and shape of all tensors that will be written, by name.
        content: the JSON object of this package, without the checksums.
        metadata: further strings of the header.
    """

    def __init__(
        self,
        path: Path,
        entries: Mapping[str, Entry],
        content: Mapping[str, Any],
        metadata: Mapping[str, str],
        overwrite: bool = False,
    ) -> None:
        self.path = path
        self.entries = dict[str, Entry]()
        laid_out = lay_out(entries)
        self._header = encode_header(laid_out, content, metadata)
        self._sums = dict[str, bytearray]()
        for name, entry in laid_out.items():
            begin = len(self._header) + entry.begin
            self.entries[name] = replace(entry, begin=begin)
            self._sums[name] = bytearray(16 * entry.blocks)
        self._file = files.PendingFile(path, overwrite)

    def write(
        self,
        name: str,
        parts: Iterable[memoryview],
        begin: int = 0,
    ) -> None:
        """Write complete blocks of a tensor, from byte `begin` on, in consecutive parts of any
        size."""
        entry = self.entries[name]
        digest = xxhash.xxh3_64()
        at = begin
        block = entry.block_bytes
        for part in parts:
            view = part.cast("B")
            self._file.write_at(view, entry.begin + at)
            while view:
                taken = view[: block - at % block]
                digest.update(taken)
                view = view[len(taken) :]
                at = at + len(taken)
                if at % block == 0 or at == entry.nbytes:
                    position = 16 * ((at - 1) // block)
                    self._sums[name][position : position + 16] = digest.hexdigest().encode()
                    digest.reset()

    def publish(self) -> TensorFile:
        """Fill in the header, make the file durable and give it its name; return the file."""
        sums = b"".join(self._sums.values())
        self._header[_SUMS_AT : _SUMS_AT + len(sums)] = sums
        checksum = seal(self._header)
        self._file.write_at(memoryview(self._header), 0)
        status = os.fstat(self._file.descriptor)
        self._file.publish()
        texts = {name: of_tensor.decode() for name, of_tensor in self._sums.items()}
        stamp = status.st_size, status.st_mtime_ns
        return TensorFile(self.path, self.entries, stamp, texts, checksum=checksum)

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was written; do nothing after `publish`."""
        self._file.discard()


def encode_header(
    entries: Mapping[str, Entry],
    content: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> bytearray:
    """Lay out a file's bytes up to the payload, for tensors in its order, with zeros for all
    checksums.

    Raises InvalidValueError for a header that readers would refuse.
    """
    blocks = sum(entry.blocks for entry in entries.values())
    own = compact({"sums": "0" * (16 * blocks), **content})
    strings = {"ema.checksum": "0" * 16, "ema": own, "format": "pt", **metadata}
    header: dict[str, Any] = {"__metadata__": strings}
    try:
        _require_few(len(entries))
        for name, entry in entries.items():
            problem = "no tensor in a safetensors file can be named '__metadata__'"
            _require(name not in header, problem)
            offsets = [entry.begin, entry.begin + entry.nbytes]
            header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        written = compact(header)
        check_text(written)
        text = written.encode()
        text += b" " * (-len(text) % 8)
        problem = f"would take {len(text):,} bytes; at most {MAX_HEADER_BYTES:,} are allowed"
        _require(len(text) <= MAX_HEADER_BYTES, problem)
    except ValueError as error:
        raise InvalidValueError("header", str(error)) from None
    return bytearray(len(text).to_bytes(8, "little") + text)


def lay_out(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Assign places in a payload: wide items first, so that every tensor is aligned to its item
    size.

    Among items of one width, tensors of one block come last, next to each other: a synthesis reads
    many of them at a time.
    """

    def place(name: str) -> tuple[int, bool]:
        return -ITEM_BYTES[entries[name].dtype], entries[name].size <= BLOCK

    placed: dict[str, Entry] = {}
    begin = 0
    for name in sorted(entries, key=place):
        entry = entries[name]
        placed[name] = Entry(entry.dtype, entry.shape, begin)
        begin += entry.nbytes
    return placed


# --- bytes and values


def items(dtype: str) -> np.dtype[Any]:
    """Choose the NumPy dtype for copying elements bit by bit."""
    return np.dtype(f"u{ITEM_BYTES[dtype]}")


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """View the row-major bytes of a tensor if it is contiguous and on the CPU; else copy them."""
    import torch

    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensor_from_bytes(
    data: npt.NDArray[np.uint8],
    dtype: str,
    shape: tuple[int, ...],
) -> torch.Tensor:
    """Make a tensor that shares the memory of these bytes."""
    import torch

    if data.size == 0:
        # torch gives empty arrays the stride 0 and refuses to view them as another dtype.
        return torch.empty(shape, dtype=torch_dtype(dtype))
    return torch.from_numpy(data).view(torch_dtype(dtype)).reshape(shape)


def decode_values(
    data: npt.NDArray[np.uint8],
    dtype: str,
) -> npt.NDArray[np.float64]:
    """Decode little-endian bytes as float64; a complex number becomes two."""
    # NumPy lacks these dtypes; torch is imported only here, since that takes a second
    if dtype.startswith("F8"):
        # torch needs writable memory
        exact = tensor_from_bytes(data.copy(), dtype, data.shape).double()
        return exact.numpy()
    if dtype == "BF16":  # the upper half of a float32
        halves = data.view("<u2").astype(np.uint32)
        values = (halves << 16).view(np.float32)
    else:
        name = "float32" if dtype == "C64" else DTYPES[dtype].torch_name
        values = data.view(name)
    with np.errstate(invalid="ignore"):  # converting a signalling nan sets a floating-point flag
        return values.astype(np.float64)
