"""Reading stored tensors: of one file or several, complete or a box of each; every byte of a result is verified.

A snapshot is one file, or parts that each hold boxes of its tensors; a checkpoint of another program is the same,
without checksums. A reader asks the files behind it for nothing but ranges of bytes, see `OpenedFile`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, chain, groupby, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash
from numpy.lib.stride_tricks import as_strided

from posthoc_cli import files
from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import headers
from posthoc_cli.snapshots.chunks import Box, boxes_of_range, copy_range
from posthoc_cli.snapshots.tensor_file import (
    OpenedFile,
    decode_values,
    holds_nonfinite,
    read_header,
    read_start,
)

THREADS = 8
"""Blocks that are read at a time: some devices need several requests in flight."""

_NEAR = 4096
"""Bytes between two small tensors that are read rather than passed over by another request."""

_SKIPPED = 256 * 1024
"""Bytes that are read at a time for their checksum alone."""

_SAMPLES, _SAMPLE = 16, 4096
"""Pieces of a file's content that tell it from others, and bytes of each."""


@dataclass(frozen=True)
class BackingFile:
    """A file with stored tensors: what is where in it, and the box of each tensor; no boxes if all are complete.

    A file that was indexed as another program's is known by its `identity`, see `sampled_identity`; any other by its
    header.
    """

    path: Path
    header: fmt.FileHeader
    boxes: Mapping[str, Box] = field(default_factory=dict)
    identity: str = ""

    def is_in(self, file: OpenedFile) -> bool:
        """Whether an opened file is the one that was indexed, or whose header was read."""
        if self.identity:
            return sampled_identity(file) == self.identity
        start, checksum = read_start(file), self.header.metadata.get("ema.checksum")
        same_size = (len(start), file.size) == (self.header.payload_start, self.header.file_bytes)
        if same_size and checksum is not None and headers.has_checksum(start, checksum):
            return True
        return headers.decode_header(self.path, start, file.size) == self.header


def sampled_identity(file: OpenedFile) -> str:
    """16 hexadecimal digits of a file's size and of pieces of its content, from the first to the last.

    Of an object with a tag they are of its size and that.
    """
    digest = xxhash.xxh3_64(file.size.to_bytes(8, "little") + file.tag.encode())
    if file.tag:
        return digest.hexdigest()
    last = max(0, file.size - _SAMPLE)
    for index in range(_SAMPLES):
        digest.update(file.read_at(_SAMPLE, last * index // (_SAMPLES - 1)))
    return digest.hexdigest()


class ElementRange(NamedTuple):
    """The elements `begin` to `end` of a tensor, row-major."""

    name: str
    begin: int
    end: int


def open_file(path: Path, header: fmt.FileHeader | None = None) -> TensorReader:
    """A reader of the tensors of one file, which must still have this header, if one is given."""
    header = header or read_header(path)
    return TensorReader(path, header, (BackingFile(path, header),))


class TensorReader:
    """Reads stored tensors, each as if all its elements were in one file; any number of threads may read at once.

    With `boxes` its tensors are these boxes of the stored ones; files that hold none of them stay closed. A context
    manager. A FileFormatError names the file that is damaged or too short, and the tensor.

    Attributes:
        path: the file, or the folder of its parts.
        header: its tensors, as they are read.
    """

    def __init__(
        self, path: Path, header: fmt.FileHeader, parts: Sequence[BackingFile], boxes: Mapping[str, Box] | None = None
    ) -> None:
        self.path, self.header, self._boxes = path, header, boxes
        self._is_single = boxes is None and len(parts) == 1 and parts[0].header.tensors == header.tensors
        if boxes is not None:
            cut = [fmt.TensorSpec(name, header.tensors[name].dtype, box.shape) for name, box in boxes.items()]
            self.header = replace(header, tensors=fmt.lay_out(cut))
        self._files: list[_File] = []
        with ExitStack() as stack:
            for part in parts:
                held = None if self._is_single else self._held_by(part)
                if held != {} or boxes is None:
                    self._files.append(stack.enter_context(_File(part, held)))
            self._opened = stack.pop_all()
        self._is_remote = any(files.is_url(file.path) for file in self._files)

    def _held_by(self, part: BackingFile) -> dict[str, Box]:
        """The boxes of a part that hold elements of tensors that are read."""
        stored = part.header.tensors
        boxes = part.boxes or {n: Box.whole(entry.shape) for n, entry in stored.items()}
        if self._boxes is not None:
            return {n: box for n, box in boxes.items() if n in self._boxes and box.meet(self._boxes[n]).size}
        return {name: box for name, box in boxes.items() if box.size}

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, verified: shape [nbytes]."""
        data = np.empty(self.header.tensors[name].nbytes, dtype=np.uint8)
        self.expect([(name, 0, data.size)])
        reader = self.read_range(name, 0, data.size)
        for begin in range(0, data.size, fmt.BLOCK_BYTES):  # checksums find a block in the cache
            reader.read_into(data[begin : begin + fmt.BLOCK_BYTES].data)
        return data

    def read_range(self, name: str, begin: int, end: int) -> FileRange | TensorRange:
        """The bytes `begin` to `end` of a tensor, at ends of its blocks, read in order; each block is verified."""
        return self._range(name, begin, end, is_verified=True)

    def expect(self, ranges: Iterable[tuple[str, int, int]], is_verified: bool = True) -> None:
        """Say which bytes of which tensors this thread will read next, with whole blocks if they will be verified."""
        spans: dict[_File, list[tuple[int, int]]] = {}
        for name, begin, end in ranges if self._is_remote else ():
            for file in self._files:
                if file.holds(name) and (span := self._span(file, name, begin, end)):
                    spans.setdefault(file, []).append(file.place(name, *span, is_verified))
        for file, found in spans.items():
            file.expect(found)

    def _span(self, file: _File, name: str, begin: int, end: int) -> tuple[int, int] | None:
        """The bytes of a file's own tensor that hold what is in a range of the tensor as it is read."""
        if self._is_single:
            return begin, end
        entry, own, stored = self.header.tensors[name], file.box(name), file.header.tensors[name].dtype
        box, item = Box.whole(entry.shape) if self._boxes is None else self._boxes[name], DTYPES[entry.dtype].nbytes
        boxes = [own.meet(one) for one in boxes_of_range(box, begin // item, end // item)]
        found = [own.span(one) for one in boxes if one.size]
        size = DTYPES[stored].nbytes
        return (min(a for a, _ in found) * size, max(b for _, b in found) * size) if found else None

    def read_sample(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """The bytes `begin` to `end` of a tensor, without checksums, for estimates only: shape [end - begin]."""
        data = np.empty(end - begin, dtype=np.uint8)
        self._range(name, begin, end, is_verified=False).read_into(data.data)
        return data

    def read_small(self, names: Sequence[str], views: Sequence[memoryview], room: memoryview | None = None) -> None:
        """Fill `views` with tensors of at most one block each, verified; of `room` they are consecutive parts."""
        if self._is_single:
            self._files[0].read_small(names, views, room)
        elif self._boxes is not None:  # of a box, stored tensors may be large
            for name, view in zip(names, views, strict=True):
                self.read_range(name, 0, len(view)).read_into(view)
        else:
            wanted = dict(zip(names, views, strict=True))
            for file in self._files:
                self._read_chunks(file, {name: wanted[name] for name in names if file.holds(name)})

    def _read_chunks(self, file: _File, views: Mapping[str, memoryview]) -> None:
        """Read the chunks that a part holds, and copy their elements to their places in complete tensors."""
        edges = [0, *accumulate(file.header.tensors[name].nbytes for name in views)]
        room = np.empty(edges[-1], np.uint8)
        parts = [room[begin:end] for begin, end in pairwise(edges)]
        if views:
            file.read_small(list(views), [part.data for part in parts], room.data)
        for (name, view), part in zip(views.items(), parts, strict=True):
            entry, stored = self.header.tensors[name], file.header.tensors[name].dtype
            chunk = _as_dtype(part, stored, entry.dtype)
            held = (file.box(name), lambda begin, end, chunk=chunk: chunk[begin:end])
            copy_range(np.frombuffer(view, chunk.dtype), Box.whole(entry.shape), 0, [held])

    def _range(self, name: str, begin: int, end: int, is_verified: bool) -> FileRange | TensorRange:
        if self._is_single:
            return FileRange(self._files[0], name, begin, is_verified)
        entry = self.header.tensors[name]
        box = Box.whole(entry.shape) if self._boxes is None else self._boxes[name]
        chunks = [(file.box(name), FileRange(file, name, 0, is_verified)) for file in self._files if file.holds(name)]
        chunks = [(own, stored) for own, stored in chunks if own.meet(box).size]
        if len(chunks) == 1 and chunks[0][0] == box and chunks[0][1].dtype == entry.dtype:
            chunks[0][1].go_to(begin)
            return chunks[0][1]
        return TensorRange(box, entry.dtype, begin, end, chunks)

    def check_payload(self) -> Generator[Checked, None, None]:
        """Check every byte of one file, from the first to the last, on all cores; continue after damage."""
        return _check_payload(self._files[0])

    def close(self) -> None:
        """Close all files."""
        self._opened.close()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)


def _items(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype for copying elements bit by bit."""
    return np.dtype(f"u{DTYPES[dtype].nbytes}")


def _as_dtype(data: npt.NDArray[np.uint8], stored: str, wanted: str) -> npt.NDArray[Any]:
    """Elements, to be copied bit by bit, of the same values in a dtype that holds them exactly."""
    if stored != wanted:  # a part with values too large or too small for the run's dtype has a wider one than others
        data = decode_values(data, stored).astype(np.dtype(DTYPES[wanted].torch_name)).view(np.uint8)
    return data.view(_items(wanted))


class TensorRange:
    """Elements of a box of one tensor, the bytes `begin` to `end` in it, read in order from the chunks that hold it.

    What is read of a file is verified in the same pass, from the block that it begins in to the end of its last one.
    """

    def __init__(self, box: Box, dtype: str, begin: int, end: int, chunks: Sequence[tuple[Box, FileRange]]) -> None:
        self._box, self._dtype, self._position, self._end = box, _items(dtype), begin, end
        self._stored = [stored for _, stored in chunks]
        self._chunks = [(held, partial(stored.elements, dtype)) for held, stored in chunks]

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next."""
        if view:
            first = self._position // self._dtype.itemsize
            copy_range(np.frombuffer(view, self._dtype), self._box, first, self._chunks)
        self._position += len(view)
        if self._position == self._end:
            for stored in self._stored:
                stored.finish()


class _File(OpenedFile):
    """A part, opened; `boxes` are those of its tensors that are read, None if all are complete."""

    def __init__(self, part: BackingFile, boxes: Mapping[str, Box] | None) -> None:
        self.header, self._boxes = part.header, boxes
        self._checksums = headers.decode_checksums(part.path, part.header)
        self._gathered: dict[str, npt.NDArray[np.uint8]] = {}
        self._lock = threading.Lock()
        super().__init__(part.path)
        try:
            if not part.is_in(self):
                raise FileFormatError(part.path, "was replaced while it was being used", "run again")
            self._stamp = self.stamp
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: object, *_: object) -> None:
        """Close it; a FileFormatError if there are no checksums and it was written to meanwhile."""
        try:
            if kind is None and not self._checksums and self.stamp != self._stamp:
                raise FileFormatError(self.path, "was changed while it was being read", "run again")
        finally:
            self.close()

    def holds(self, name: str) -> bool:
        """Whether it has elements of a tensor."""
        return self._boxes is None or name in self._boxes

    def box(self, name: str) -> Box:
        """The elements of a tensor that it has."""
        return Box.whole(self.header.tensors[name].shape) if self._boxes is None else self._boxes[name]

    def place(self, name: str, begin: int, end: int, is_verified: bool) -> tuple[int, int]:
        """Where bytes of a tensor are in the file, with whole blocks if they will be verified."""
        entry = self.header.tensors[name]
        if is_verified and self.checksum(name, 0) is not None:
            begin -= begin % fmt.BLOCK_BYTES
            end = min(-(-end // fmt.BLOCK_BYTES) * fmt.BLOCK_BYTES, entry.nbytes)
        start = self.header.payload_start + entry.begin
        return (start, start) if entry.strides else (start + begin, start + end)

    def fill(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view`, unverified, from byte `begin` of a tensor on, across the tensors that follow."""
        entry = self.header.tensors[name]
        if entry.strides:
            view[:] = self._in_order(name)[begin : begin + len(view)].data
        else:
            self._read(name, view, begin)

    def _read(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view` from a place in the file: `begin` counts from where a tensor is stored."""
        if self.read_into(view, self.header.payload_start + self.header.tensors[name].begin + begin) < len(view):
            raise FileFormatError(self.path, f"tensor {shown(name)}: the file became shorter while it was read")

    def _in_order(self, name: str) -> npt.NDArray[np.uint8]:
        """All bytes of a tensor whose elements are not stored in their order; the last one is kept."""
        with self._lock:
            if name not in self._gathered:
                entry, dtype = self.header.tensors[name], _items(self.header.tensors[name].dtype)
                reach = 1 + sum((size - 1) * step for size, step in zip(entry.shape, entry.strides, strict=True))
                stored = np.empty(reach, dtype)
                self._read(name, stored.view(np.uint8).data, 0)
                made = as_strided(stored, entry.shape, [dtype.itemsize * step for step in entry.strides])
                self._gathered = {name: np.ascontiguousarray(made).reshape(-1).view(np.uint8)}
            return self._gathered[name]

    def read_small(self, names: Sequence[str], views: Sequence[memoryview], room: memoryview | None = None) -> None:
        """Fill `views` with tensors of at most one block each, verified; of `room` they are consecutive parts."""
        places = [self.header.tensors[name] for name in names]
        if any(place.strides for place in places):
            for name, view in zip(names, views, strict=True):
                self.fill(name, view, 0)
        elif room is not None and all(other.begin == one.begin + one.nbytes for one, other in pairwise(places)):
            self.fill(names[0], room, 0)
        else:
            self._gather(names, places, views)
        if self._checksums:
            found = [xxhash.xxh3_64_hexdigest(view) if view else "" for view in views]
            expected = [*map(self._checksums.__getitem__, names)]
            if found != expected:
                raise self.damaged(next(n for n, a, b in zip(names, found, expected, strict=True) if a != b))

    def _gather(self, names: Sequence[str], places: Sequence[fmt.TensorEntry], views: Sequence[memoryview]) -> None:
        """Read tensors anywhere in the file, those that are near each other together."""
        order = sorted(range(len(names)), key=lambda index: places[index].begin)
        ends = [place.begin + place.nbytes for place in places]
        far = [i for i, (a, b) in enumerate(pairwise(order), 1) if places[b].begin - ends[a] > _NEAR]
        for first, last in pairwise([0, *far, len(order)]):
            begin = places[order[first]].begin
            room = np.empty(ends[order[last - 1]] - begin, np.uint8).data
            self.fill(names[order[first]], room, 0)
            for index in order[first:last]:
                views[index][:] = room[places[index].begin - begin : ends[index] - begin]

    def checksum(self, name: str, block: int) -> str | None:
        """The checksum that the header has for a block, 16 hexadecimal digits; None in a file without checksums."""
        digits = self._checksums.get(name)
        return None if digits is None else digits[16 * block : 16 * block + 16]

    def damaged(self, name: str) -> FileFormatError:
        """The error for a block that does not match its checksum."""
        return FileFormatError(self.path, f"tensor {shown(name)} is damaged: its checksum does not match")


class FileRange:
    """The bytes of one tensor in a file from `begin` on, read forwards; each block that is read is verified."""

    def __init__(self, file: _File, name: str, begin: int, is_verified: bool) -> None:
        entry = file.header.tensors[name]
        self.dtype, self._nbytes = entry.dtype, entry.nbytes
        self._file, self._name, self._sums = file, name, fmt.BlockChecksums(begin, entry.nbytes)
        self._is_verified = is_verified and file.checksum(name, 0) is not None

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the bytes that come next."""
        self._file.fill(self._name, view, self._sums.position)
        if not self._is_verified:
            self._sums.position += len(view)
            return
        for block, checksum in self._sums.of(view):
            if checksum != self._file.checksum(self._name, block):
                raise self._file.damaged(self._name)

    def go_to(self, begin: int) -> None:
        """Continue at a byte, never before those that were read: within a block by reading on, for its checksum."""
        if not self._is_verified:
            self._sums.position = begin
            return
        first = begin - begin % fmt.BLOCK_BYTES
        if self._sums.position < first:
            self.finish()
            self._sums.position = first
        self._skip_to(begin)

    def finish(self) -> None:
        """Read the block that was begun to its end."""
        if self._is_verified:
            self._skip_to(min(self._nbytes, -(-self._sums.position // fmt.BLOCK_BYTES) * fmt.BLOCK_BYTES))

    def elements(self, wanted: str, begin: int, end: int) -> npt.NDArray[Any]:
        """Elements of the tensor in a dtype that holds them exactly; see `chunks.ForwardReader`."""
        item = DTYPES[self.dtype].nbytes
        self.go_to(begin * item)
        data = np.empty((end - begin) * item, dtype=np.uint8)
        self.read_into(data.data)
        return _as_dtype(data, self.dtype, wanted)

    def _skip_to(self, end: int) -> None:
        while self._sums.position < end:
            self.read_into(memoryview(bytearray(min(end - self._sums.position, _SKIPPED))))


# --- verifying a payload: on all cores, in constant memory


class Checked(NamedTuple):
    """A part of a payload: tensors that do not match their checksums, why the first does not, those with nan or inf."""

    nbytes: int
    damaged: Sequence[str] = ()
    error: FileFormatError | None = None
    nonfinite: Sequence[str] = ()


def verify_payload(path: Path, header: fmt.FileHeader, progress: Callable[[int], object] | None = None) -> None:
    """Read a file, whose header must still be this, and check each block of each tensor. Memory: a block a thread."""
    with open_file(path, header) as file, closing(file.check_payload()) as found:
        for checked in found:
            if checked.error is not None:
                raise checked.error
            if progress is not None:
                progress(checked.nbytes)


def _check_payload(file: _File) -> Generator[Checked, None, None]:
    buffers = threading.local()  # each thread keeps one

    def check(spans: Sequence[_Span]) -> Checked:
        if not hasattr(buffers, "own"):
            buffers.own = memoryview(bytearray(fmt.BLOCK_BYTES))
        view = buffers.own[: sum(end - begin for _, begin, end in spans)]
        try:
            file.fill(spans[0][0], view, spans[0][1])
        except FileFormatError as error:
            return Checked(len(view), [name for name, _, _ in spans], error)
        damaged, nonfinite, at = [], [], 0
        for dtype, alike in groupby(spans, lambda span: file.header.tensors[span[0]].dtype):
            parts, start = [], at
            for name, begin, end in alike:
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
    pool, in_work = ThreadPoolExecutor(THREADS, "ema-verify"), deque[Future[Checked]]()
    try:
        for block in chain(first, blocks):
            in_work.append(pool.submit(check, block))
            if len(in_work) > 4 * THREADS:
                yield in_work.popleft().result()
        while in_work:
            yield in_work.popleft().result()
    finally:  # also on an error or an interrupt: what was begun is finished, and nothing else
        pool.shutdown(wait=True, cancel_futures=True)


_Span = tuple[str, int, int]
"""The bytes of a tensor from one to another, within one of its blocks."""


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
            batch.append((name, begin, end))
            size += end - begin
    if batch:
        yield batch
