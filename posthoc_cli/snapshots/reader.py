"""Read files: the header first, checked; then tensors, each block verified as it is read.

No torch: tensors come as bytes. Files are read, never mapped, so that one that shrinks under a reader is no crash.
A FileFormatError names the file that cannot be opened, is no regular file, is damaged or too short, and the tensor.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, chain, groupby, islice, pairwise
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash
from numpy.lib.stride_tricks import as_strided

from posthoc_cli import files
from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import FileFormatError, VanishedError, shown
from posthoc_cli.profiles import PowerFunction, StoredProfile
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.chunks import Box, copy_range, row_major
from posthoc_cli.snapshots.headers import DecodeCache

THREADS = 8
"""Blocks that are read at a time: some devices need several requests in flight."""

_NEAR = 4096
"""Bytes between two small tensors that are read rather than passed over by another request."""

_SKIPPED = 256 * 1024
"""Bytes that are read at a time for their checksum alone."""

_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""First bytes of pickles and of archives of torch.save."""

_Info = TypeVar("_Info")
_File = TypeVar("_File", bound="OpenedFile")
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Part:
    """A file of a snapshot of several, with the box of each of its tensors."""

    path: Path
    header: fmt.FileHeader
    boxes: Mapping[str, Box]

    def open(self) -> TensorFile:
        """Open it; it must be the file whose header was read."""
        return TensorFile(self.path, self.header)


@dataclass(frozen=True)
class Stored(Generic[_Info]):
    """A file, its header, and what it says about itself; or a folder of `parts`, as if they were one file."""

    path: Path
    header: fmt.FileHeader
    info: _Info
    parts: tuple[Part, ...] = ()

    def open(self, boxes: Mapping[str, Box] | None = None) -> OpenSnapshot:
        """Open it, or boxes of some tensors as if these were all; its files must be those whose headers were read."""
        return PartedFile(self, boxes) if self.parts or boxes is not None else TensorFile(self.path, self.header)


@dataclass(frozen=True)
class FileSource(Stored[fmt.SnapshotInfo]):
    """A snapshot on disk, or another program's checkpoint."""

    @property
    def name(self) -> str:
        """The file's or folder's name."""
        return self.path.name

    @property
    def profile(self) -> StoredProfile:
        """What its averages are of."""
        return self.info.profile.pure

    @property
    def stored(self) -> Mapping[str, fmt.TensorEntry]:
        """Dtype, shape and place of each stored tensor."""
        return self.header.tensors

    def cells(self, name: str) -> int:
        """The number of chunks that rows of a tensor go through; 0 where it is in one file."""
        boxes = [part.boxes[name] for part in self.parts if name in part.boxes and part.boxes[name].size]
        return len(boxes) // max(1, len({box.offset[:1] for box in boxes}))


class Snapshot(FileSource):
    """A snapshot on disk."""

    @property
    def profile(self) -> PowerFunction:
        """The power function that it holds."""
        return self.info.profile.pure


# --- opening files


@contextmanager
def named_on_error(path: Path, verb: str) -> Iterator[None]:
    """Turn the system's errors of the block into a FileFormatError: the file cannot be opened, or read."""
    try:
        yield
    except OSError as error:
        raise _cannot(path, verb, error) from error
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r}", f"cannot be {verb}: no file can have this name") from error


def _cannot(path: Path, verb: str, error: OSError) -> FileFormatError:
    # On a network file system an open file goes away, too, when another host removes it.
    kind = VanishedError if error.errno in (errno.ENOENT, errno.ESTALE) else FileFormatError
    hint = "raise the limit of open files, as by ulimit -n 4096" if error.errno == errno.EMFILE else ""
    return kind(path, f"cannot be {verb}: {(error.strerror or str(error)).lower()}", hint)


class OpenedFile:
    """A regular file, open for reading at any place; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with named_on_error(path, "opened"):
            self._descriptor = files.system.open(path)
        known = os.fstat(self._descriptor)
        self.size = known.st_size
        if not stat.S_ISREG(known.st_mode):
            self.close()
            raise FileFormatError(path, "is not a regular file")

    def read_at(self, count: int, offset: int) -> bytes:
        """The bytes at an offset; fewer at the end of the file."""
        with named_on_error(self.path, "read"):
            return files.read_at(self._descriptor, count, offset)

    def close(self) -> None:
        """Close the file."""
        files.system.close(self._descriptor)

    def __enter__(self: _File) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_small_file(path: Path, most: int) -> bytes:
    """The content of a regular file of at most `most` bytes."""
    with OpenedFile(path) as file:
        if file.size > most:
            raise FileFormatError(path, f"has {file.size:,} bytes; at most {most:,} are allowed")
        return file.read_at(file.size, 0)


def read_header(path: Path, cache: DecodeCache | None = None, check_size: bool = True) -> fmt.FileHeader:
    """The checked header of a safetensors file; without `check_size` also of a truncated file."""
    with OpenedFile(path) as file:
        return headers.decode_header(path, _read_start(file), file.size if check_size else None, cache)


def _read_start(file: OpenedFile) -> bytes:
    """The first 8 + N bytes."""
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


# --- tensors


class TensorFile(OpenedFile):
    """A safetensors file opened for its tensors; any number of threads may read at once.

    The header is read again and must be `expected`: the file that was planned with is the file that is read.
    """

    def __init__(self, path: Path, expected: fmt.FileHeader | None = None) -> None:
        super().__init__(path)
        try:
            self.header = self._checked_header(expected)
            self._checksums = headers.decode_checksums(path, self.header)
        except BaseException:
            self.close()
            raise

    def _checked_header(self, expected: fmt.FileHeader | None) -> fmt.FileHeader:
        """The header; `expected` itself if the file still has it, which saves decoding it again."""
        start = _read_start(self)
        if expected is not None and (len(start), self.size) == (expected.payload_start, expected.file_bytes):
            checksum = expected.metadata.get("ema.checksum")
            if checksum is not None and headers.has_header_checksum(start, checksum):
                return expected
        header = headers.decode_header(self.path, start, self.size)
        if expected not in (None, header):
            raise FileFormatError(self.path, "was replaced while it was being used", "run again")
        return header

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, verified where the file has checksums: shape [nbytes]."""
        data = np.empty(self.header.tensors[name].nbytes, dtype=np.uint8)
        reader = self.read_range(name, 0, data.size)
        for begin in range(0, data.size, fmt.BLOCK_BYTES):  # checksums find a block in the cache
            reader.read_into(data[begin : begin + fmt.BLOCK_BYTES].data)
        return data

    def read_range(self, name: str, begin: int, end: int) -> RangeReader:
        """The bytes `begin` to `end` of a tensor, at ends of its blocks, read in order and verified."""
        return RangeReader(self, name, begin, end)

    def read_small(self, names: Sequence[str], parts: Sequence[memoryview], view: memoryview | None = None) -> None:
        """Fill `parts` with tensors of at most one block each, verified; of `view` they are consecutive parts."""
        places = [self.header.tensors[name] for name in names]
        if view is not None and all(other.begin == _end(one) for one, other in pairwise(places)):
            self.fill(names[0], view, 0)
        else:
            self._gather(names, places, parts)
        self.verify(names, parts)

    def _gather(self, names: Sequence[str], places: Sequence[fmt.TensorEntry], parts: Sequence[memoryview]) -> None:
        """The same, unverified, of tensors anywhere in the file: those that are near each other are read together."""
        order = sorted(range(len(names)), key=lambda index: places[index].begin)
        far = [i for i, (a, b) in enumerate(pairwise(order), 1) if places[b].begin - _end(places[a]) > _NEAR]
        for first, last in pairwise([0, *far, len(order)]):
            begin, end = places[order[first]].begin, _end(places[order[last - 1]])
            room = np.empty(end - begin, np.uint8).data
            self.fill(names[order[first]], room, 0)
            for index in order[first:last]:
                at = places[index].begin - begin
                parts[index][:] = room[at : at + places[index].nbytes]

    def fill(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view`, unverified, from byte `begin` of a tensor on, across the tensors that follow."""
        self._fill_from(name, view, self.header.payload_start + self.header.tensors[name].begin + begin)

    def _fill_from(self, name: str, view: memoryview, offset: int) -> None:
        while view:
            try:
                count = files.system.read(self._descriptor, view, offset)
            except OSError as error:
                raise _cannot(self.path, "read", error) from error
            if count == 0:
                raise FileFormatError(self.path, f"tensor {shown(name)}: the file became shorter while it was read")
            view, offset = view[count:], offset + count

    def verify(self, names: Sequence[str], parts: Sequence[memoryview]) -> None:
        """Check all bytes of tensors of at most one block each, which the caller has read by `fill`."""
        if not self._checksums:
            return
        found = [xxhash.xxh3_64_hexdigest(part) if part else "" for part in parts]
        expected = [*map(self._checksums.__getitem__, names)]
        if found != expected:
            raise self.damaged(next(n for n, a, b in zip(names, found, expected, strict=True) if a != b))

    def checksum(self, name: str, block: int = 0) -> str | None:
        """The checksum that the header has for a block, 16 hexadecimal digits; None in a file without checksums."""
        digits = self._checksums.get(name)
        return None if digits is None else digits[16 * block : 16 * block + 16]

    def damaged(self, name: str) -> FileFormatError:
        """The error for a block that does not match its checksum."""
        return FileFormatError(self.path, f"tensor {shown(name)} is damaged: its checksum does not match")

    def read_unverified(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """The bytes `begin` to `end` of a tensor, without checksums, for estimates only: shape [end - begin]."""
        data = np.empty(end - begin, dtype=np.uint8)
        self.fill(name, data.data, begin)
        return data


class RangeReader:
    """Some blocks of one tensor, read in order, in parts of any size; each block is verified at its end."""

    def __init__(self, file: TensorFile, name: str, begin: int, end: int) -> None:
        self._file, self._name, self._position, self._end = file, name, begin, end
        self._hash = xxhash.xxh3_64()

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next."""
        self._file.fill(self._name, view, self._position)
        if self._file.checksum(self._name) is None:
            self._position += len(view)
            return
        while view:
            left = fmt.BLOCK_BYTES - self._position % fmt.BLOCK_BYTES
            part, view = view[:left], view[left:]
            self._hash.update(part)
            self._position += len(part)
            if self._position % fmt.BLOCK_BYTES == 0 or self._position == self._end:
                expected = self._file.checksum(self._name, (self._position - 1) // fmt.BLOCK_BYTES)
                if self._hash.hexdigest() != expected:
                    raise self._file.damaged(self._name)
                self._hash.reset()


# --- snapshots of several parts


class PartedFile:
    """A snapshot of several parts opened for its tensors, as a TensorFile is: each reads as if it were in one file.

    With `boxes` its tensors are these boxes of the snapshot's; parts that hold none of them stay closed.
    """

    def __init__(self, snapshot: Stored[Any], boxes: Mapping[str, Box] | None = None) -> None:
        self.path, self.header, self.info = snapshot.path, snapshot.header, snapshot.info
        stored = snapshot.header.tensors
        self._boxes = {name: Box.whole(entry.shape) for name, entry in stored.items()} if boxes is None else boxes
        if boxes is not None:
            cut = [fmt.TensorSpec(name, stored[name].dtype, box.shape) for name, box in boxes.items()]
            self.header = replace(snapshot.header, tensors=fmt.lay_out(cut))
        self._is_cut = boxes is not None
        whole = Part(snapshot.path, snapshot.header, {name: Box.whole(entry.shape) for name, entry in stored.items()})
        self._files: list[tuple[TensorFile, Mapping[str, Box]]] = []
        self._chunks: dict[str, list[tuple[TensorFile, Box]]] = {name: [] for name in self._boxes}
        with ExitStack() as stack:
            for part in snapshot.parts or (whole,):
                held = {n: box for n, box in part.boxes.items() if n in self._boxes and box.size}
                if self._is_cut:
                    held = {name: box for name, box in held.items() if box.meet(self._boxes[name]).size}
                if self._is_cut and not held:
                    continue
                file = stack.enter_context(part.open())
                self._files.append((file, held))
                for name, box in held.items():
                    self._chunks[name].append((file, box))
            self._opened = stack.pop_all()

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a complete tensor, verified: shape [nbytes]."""
        data = np.empty(self.header.tensors[name].nbytes, dtype=np.uint8)
        reader = self.read_range(name, 0, data.size)
        for begin in range(0, data.size, fmt.BLOCK_BYTES):  # keeps memory little above the size of the result
            reader.read_into(data[begin : begin + fmt.BLOCK_BYTES].data)
        return data

    def read_range(self, name: str, begin: int, end: int) -> BoxReader | RangeReader:
        """The bytes `begin` to `end` of a complete tensor, read in order; each block of a part is verified."""
        if (whole := self._file_with(name)) is not None:
            return whole.read_range(name, begin, end)
        return BoxReader(self._boxes[name], begin, end, self.header.tensors[name].dtype, self._chunks[name], name)

    def _file_with(self, name: str) -> TensorFile | None:
        """The file that holds all of a tensor, as it is read here; None if there is none."""
        if len(self._chunks[name]) != 1:
            return None
        file, box = self._chunks[name][0]
        alike = box == self._boxes[name] and file.header.tensors[name].dtype == self.header.tensors[name].dtype
        return file if alike else None

    def read_small(self, names: Sequence[str], parts: Sequence[memoryview], _: memoryview | None = None) -> None:
        """Fill `parts` with tensors of at most one block each, verified."""
        if self._is_cut:
            for name, part in zip(names, parts, strict=True):
                self.read_range(name, 0, len(part)).read_into(part)
            return
        targets = dict(zip(names, parts, strict=True))
        for file, boxes in self._files:
            stored = file.header.tensors
            own = [name for name in names if name in boxes]
            if not own:
                continue
            # A tensor that is whole in the file goes to its place, a chunk first to room of its own.
            kinds = {n: (stored[n].dtype, stored[n].shape) for n in own}
            chunks = [n for n in own if kinds[n] != (self.header.tensors[n].dtype, self.header.tensors[n].shape)]
            edges = [0, *accumulate(stored[name].nbytes for name in chunks)]
            room = np.empty(edges[-1], np.uint8).data
            rooms = {name: room[begin:end] for name, (begin, end) in zip(chunks, pairwise(edges), strict=True)}
            file.read_small(own, [rooms.get(name, targets[name]) for name in own], room if chunks == own else None)
            for name, data in rooms.items():
                self._place(targets[name], name, boxes[name], stored[name].dtype, data)

    def _place(self, target: memoryview, name: str, box: Box, dtype: str, data: memoryview) -> None:
        """Copy the elements of a chunk to their places in a complete tensor."""
        entry = self.header.tensors[name]
        values, item = _as_stored(np.frombuffer(data, np.uint8), dtype, entry.dtype), DTYPES[entry.dtype].nbytes
        whole = Box.whole(entry.shape)
        first, last = whole.span(box)
        if last - first == box.size:
            target[first * item : last * item] = values.data
        else:
            kind, steps = _items(entry.dtype), [item * step for step in row_major(entry.shape)]
            elements = as_strided(np.frombuffer(target, kind)[first:last], box.shape, steps)
            elements[...] = values.view(kind).reshape(box.shape)

    def read_unverified(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """The bytes `begin` to `end` of a complete tensor, without checksums, for estimates only."""
        if (whole := self._file_with(name)) is not None:
            return whole.read_unverified(name, begin, end)
        entry = self.header.tensors[name]
        item = DTYPES[entry.dtype].nbytes
        data = np.empty(end - begin, dtype=np.uint8)
        chunks = [(box, _Unverified(file, name, entry.dtype).read) for file, box in self._chunks[name]]
        copy_range(data.view(_items(entry.dtype)), self._boxes[name], begin // item, chunks)
        return data

    def close(self) -> None:
        """Close all parts."""
        self._opened.close()

    def __enter__(self) -> PartedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


OpenSnapshot = TensorFile | PartedFile
"""A snapshot opened for its tensors: a context manager; any number of threads may read at once."""


class BoxReader:
    """Elements of a box of one tensor, of the bytes `begin` to `end` in it, read in order from chunks that hold it.

    What is read of a part is verified in the same pass, from the block that it begins in to the end of its last one.
    """

    def __init__(
        self, box: Box, begin: int, end: int, dtype: str, chunks: Sequence[tuple[TensorFile, Box]], name: str
    ) -> None:
        self._box, self._position, self._end = box, begin, end
        self._type, self._item = _items(dtype), DTYPES[dtype].nbytes
        self._chunks = [(held, _Verified(file, name, dtype)) for file, held in chunks if held.meet(box).size]

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next, of complete elements."""
        if view:
            chunks = [(held, stored.read) for held, stored in self._chunks]
            copy_range(np.frombuffer(view, self._type), self._box, self._position // self._item, chunks)
        self._position += len(view)
        if self._position == self._end:
            for _, stored in self._chunks:
                stored.finish()


class _Unverified:
    """Stored elements of a chunk, as a dtype that holds them exactly."""

    def __init__(self, file: TensorFile, name: str, dtype: str) -> None:
        self._file, self._name, self._dtype = file, name, dtype
        self._entry = file.header.tensors[name]
        self._item = DTYPES[self._entry.dtype].nbytes

    def read(self, begin: int, end: int) -> npt.NDArray[Any]:
        """See `chunks.ForwardReader`."""
        data = self._bytes(begin * self._item, end * self._item)
        return _as_stored(data, self._entry.dtype, self._dtype).view(_items(self._dtype))

    def _bytes(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        return self._file.read_unverified(self._name, begin, end)


class _Verified(_Unverified):
    """The same, verified: bytes on the way to those that are wanted, within their block, are read for its checksum."""

    def __init__(self, file: TensorFile, name: str, dtype: str) -> None:
        super().__init__(file, name, dtype)
        self._position, self._range = -1, RangeReader(file, name, 0, self._entry.nbytes)

    def finish(self) -> None:
        """Read the last block to its end."""
        if self._position > 0 and self._position % fmt.BLOCK_BYTES:
            self._skip_to(min(self._entry.nbytes, -(-self._position // fmt.BLOCK_BYTES) * fmt.BLOCK_BYTES))

    def _bytes(self, begin: int, end: int) -> npt.NDArray[np.uint8]:
        first = begin - begin % fmt.BLOCK_BYTES
        if self._position < first:
            self.finish()
            self._range, self._position = RangeReader(self._file, self._name, first, self._entry.nbytes), first
        self._skip_to(begin)
        data = np.empty(end - begin, dtype=np.uint8)
        self._range.read_into(data.data)
        self._position = end
        return data

    def _skip_to(self, end: int) -> None:
        while self._position < end:
            size = min(end - self._position, _SKIPPED)
            self._range.read_into(memoryview(bytearray(size)))
            self._position += size


def _as_stored(data: npt.NDArray[np.uint8], dtype: str, wanted: str) -> npt.NDArray[np.uint8]:
    """The bytes of the same values in a dtype that holds them exactly."""
    if dtype == wanted:
        return data
    # A part with values too large or too small for the run's dtype has a wider one than the others.
    return decode_values(data, dtype).astype(np.dtype(DTYPES[wanted].torch_name)).view(np.uint8)


def _end(entry: fmt.TensorEntry) -> int:
    return entry.begin + entry.nbytes


def _items(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype for copying elements bit by bit."""
    return np.dtype(f"u{DTYPES[dtype].nbytes}")


def read_values(file: OpenSnapshot, name: str, begin: int, end: int) -> npt.NDArray[np.float64]:
    """The elements `begin` to `end` of a tensor as `decode_values` gives them, unverified: for estimates only."""
    dtype = file.header.tensors[name].dtype
    item = DTYPES[dtype].nbytes
    return decode_values(file.read_unverified(name, begin * item, end * item), dtype)


def _e4m3_values() -> npt.NDArray[np.float64]:
    """The value of each byte: a sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, one nan a sign."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, (codes & 7) / 8
    values = np.where(exponents > 0, 1 + mantissas, 2 * mantissas) * 2.0 ** (exponents - 7)
    values[127] = np.nan
    return np.concatenate([values, -values])


_E4M3 = _e4m3_values()


def decode_values(data: npt.NDArray[np.uint8], dtype: str) -> npt.NDArray[np.float64]:
    """Little-endian bytes as float64; a complex number is its two parts."""
    if dtype == "F8_E4M3":
        return _E4M3[data]
    if dtype == "BF16":  # the upper half of a float32
        values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F8_E5M2":  # the upper half of a float16
        values = (data.astype(np.uint16) << 8).view(np.float16)
    else:
        values = data.view("float32" if dtype == "C64" else DTYPES[dtype].torch_name)
    with np.errstate(invalid="ignore"):  # some kinds of nan raise a flag of the processor
        return values.astype(np.float64)


# --- verifying a payload: on all cores, in constant memory


class Checked(NamedTuple):
    """A part of a payload: tensors that do not match their checksums, why the first does not, those with nan or inf."""

    nbytes: int
    damaged: Sequence[str] = ()
    error: FileFormatError | None = None
    nonfinite: Sequence[str] = ()


def verify_snapshot(snapshot: Snapshot, progress: Callable[[int], object] | None = None) -> None:
    """Read all files of a snapshot, as `verify_payload` does."""
    for part in snapshot.parts or (snapshot,):
        verify_payload(part.path, part.header, progress)


def verify_payload(path: Path, header: fmt.FileHeader, progress: Callable[[int], object] | None = None) -> None:
    """Read a file, whose header must still be this, and check each block of each tensor. Memory: a block a thread."""
    with TensorFile(path, header) as file, closing(check_payload(file)) as found:
        for checked in found:
            if checked.error is not None:
                raise checked.error
            if progress is not None:
                progress(checked.nbytes)


def check_payload(file: TensorFile) -> Generator[Checked, None, None]:
    """Check a payload from its first byte to its last; continue after damage."""
    buffers = threading.local()  # each thread keeps one

    def check(spans: Sequence[_Span]) -> Checked:
        if not hasattr(buffers, "own"):
            buffers.own = memoryview(bytearray(fmt.BLOCK_BYTES))
        view = buffers.own[: sum(span.end - span.begin for span in spans)]
        try:
            file.fill(spans[0].name, view, spans[0].begin)
        except FileFormatError as error:
            return Checked(len(view), [span.name for span in spans], error)
        damaged, nonfinite, at = [], [], 0
        for dtype, group in groupby(spans, lambda span: file.header.tensors[span.name].dtype):
            parts, start = [], at
            for name, begin, end in group:
                parts.append((name, view[at : at + end - begin]))
                at += end - begin
                expected = file.checksum(name, begin // fmt.BLOCK_BYTES)
                if expected is not None and xxhash.xxh3_64_hexdigest(parts[-1][1]) != expected:
                    damaged.append(name)
            if holds_nonfinite(view[start:at], dtype):  # neighbours together, and one by one only if that finds some
                nonfinite += [name for name, part in parts if holds_nonfinite(part, dtype)]
        return Checked(len(view), damaged, file.damaged(damaged[0]) if damaged else None, nonfinite)

    blocks = _blocks(file.header)
    first = list(islice(blocks, 2))
    if len(first) < 2:  # threads take longer to start than to read a small file
        yield from map(check, first)
        return
    with worker_threads() as pool:
        yield from in_order(pool, check, chain(first, blocks))


class _Span(NamedTuple):
    """The bytes `begin` to `end` of a tensor, within one of its blocks."""

    name: str
    begin: int
    end: int


def _blocks(header: fmt.FileHeader) -> Iterator[list[_Span]]:
    """The payload from its first byte to its last, in consecutive spans of at most a block together."""
    batch: list[_Span] = []
    size = 0
    for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].begin):
        for begin in range(0, entry.nbytes, fmt.BLOCK_BYTES):
            end = min(begin + fmt.BLOCK_BYTES, entry.nbytes)
            if size + end - begin > fmt.BLOCK_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(_Span(name, begin, end))
            size += end - begin
    if batch:
        yield batch


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


@contextmanager
def worker_threads(count: int = THREADS) -> Iterator[Executor]:
    """Threads for the block; at its end, also on error, they finish what they have begun and nothing else."""
    pool = ThreadPoolExecutor(count, "ema-verify")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """The function's result for each item, in their order; a limited number are in work at a time."""
    in_work: deque[Future[_Result]] = deque()
    for item in items:
        in_work.append(pool.submit(function, item))
        if len(in_work) > 4 * THREADS:
            yield in_work.popleft().result()
    while in_work:
        yield in_work.popleft().result()
