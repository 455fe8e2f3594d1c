"""Reading of stored tensors, complete or a box of each, from one file or several; every byte of a result is verified.

A snapshot is one file, or parts that each hold boxes of its tensors; another program's checkpoint has the same form
without checksums. A reader only asks the files behind it for ranges of bytes, see `OpenedFile`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
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
"""The number of blocks that are read in parallel: some devices need several requests in flight."""

_NEAR = 4096
"""The largest gap in bytes between two small tensors that are read in one request."""

_SKIPPED = 256 * 1024
"""The number of bytes that are read at a time only for their checksum."""

_SAMPLES, _SAMPLE = 16, 4096
"""The number and size of the pieces of a file from which its identity is computed."""


@dataclass(frozen=True)
class BackingFile:
    """A file with stored tensors, and the box of each; without boxes if all tensors are complete.

    It is recognized by its header, or if it is another program's by its `identity`, see `sampled_identity`.
    """

    path: Path
    tensors: Mapping[str, fmt.TensorEntry]
    boxes: Mapping[str, Box] = field(default_factory=dict)
    header: fmt.FileHeader | None = None
    identity: str = ""

    def is_in(self, file: OpenedFile) -> bool:
        """Return whether an opened file is the one whose identity or header is recorded."""
        if self.header is None:
            return sampled_identity(file) == self.identity
        start, checksum = read_start(file), self.header.metadata.get("ema.checksum")
        has_size = (len(start), file.size) == (self.header.payload_start, self.header.file_bytes)
        if has_size and checksum is not None and headers.has_checksum(start, checksum):
            return True
        return headers.decode_header(self.path, start, file.size) == self.header


def sampled_identity(file: OpenedFile) -> str:
    """Return 16 hexadecimal digits computed from a file's size and pieces of its content, evenly spaced.

    For an object with a tag they are computed from its size and the tag.
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
    """Open one file for reading its tensors; if a header is given, the file must still have it."""
    header = header or read_header(path)
    return TensorReader(path, header.tensors, (BackingFile(path, header.tensors, header=header),))


class TensorReader:
    """A reader of stored tensors, each as if it were in one file; any number of threads may read in parallel.

    With `boxes` it reads only these boxes of the stored tensors, and files that hold none of them stay closed. It is a
    context manager. A FileFormatError names the file that is damaged or too short, and the tensor.

    Attributes:
        path: the file, or the folder of the parts.
        tensors: dtype, shape and size of the tensors as they are read.
    """

    def __init__(
        self, path: Path, tensors: fmt.TensorSpecs, parts: Sequence[BackingFile], boxes: Mapping[str, Box] | None = None
    ) -> None:
        self.path, self.tensors, self._boxes = path, tensors, boxes
        self._is_single = boxes is None and len(parts) == 1 and parts[0].tensors == tensors
        if boxes is not None:
            self.tensors = {name: fmt.TensorSpec(name, tensors[name].dtype, box.shape) for name, box in boxes.items()}
        self._files: list[_File] = []
        with ExitStack() as stack:
            for part in parts:
                held = None if self._is_single else self._held_by(part)
                if held != {} or boxes is None:
                    self._files.append(stack.enter_context(_File(part, held)))
            self._opened = stack.pop_all()
        self._is_remote = any(files.is_url(file.path) for file in self._files)

    @property
    def header(self) -> fmt.FileHeader:
        """The header of the file, or of the first of several; files of other programs have none."""
        header = self._files[0].header
        assert header is not None
        return header

    def _held_by(self, part: BackingFile) -> dict[str, Box]:
        """Return the boxes of a part that hold elements to be read."""
        boxes = part.boxes or {n: Box.full(entry.shape) for n, entry in part.tensors.items()}
        if self._boxes is not None:
            return {n: box for n, box in boxes.items() if n in self._boxes and box.intersection(self._boxes[n]).size}
        return {name: box for name, box in boxes.items() if box.size}

    def read(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the verified bytes of a tensor: shape [nbytes]."""
        data = np.empty(self.tensors[name].nbytes, dtype=np.uint8)
        self.expect([(name, 0, data.size)])
        reader = self.read_range(name, 0, data.size)
        for begin in range(0, data.size, fmt.BLOCK_BYTES):  # a block is still in the cache for its checksum
            reader.read_into(data[begin : begin + fmt.BLOCK_BYTES].data)
        return data

    def read_range(self, name: str, begin: int, end: int) -> FileRange | TensorRange:
        """Return a reader of the bytes `begin` to `end` of a tensor, both at ends of blocks; verifies each block."""
        return self._range(name, begin, end, is_verified=True)

    def expect(self, ranges: Iterable[tuple[str, int, int]], is_verified: bool = True) -> None:
        """Announce which ranges this thread will read next, so that remote files prefetch them, blocks if verified."""
        spans: dict[_File, list[tuple[int, int]]] = {}
        for name, begin, end in ranges if self._is_remote else ():
            for file in self._files:
                if file.holds(name) and (span := self._span(file, name, begin, end)):
                    spans.setdefault(file, []).append(file.place(name, *span, is_verified))
        for file, of_file in spans.items():
            file.expect(of_file)

    def _span(self, file: _File, name: str, begin: int, end: int) -> tuple[int, int] | None:
        """Return the bytes of a tensor's chunk in a file that cover a range of the tensor; None without any."""
        if self._is_single:
            return begin, end
        item = DTYPES[self.tensors[name].dtype].nbytes
        chunk, stored_item = file.box(name), DTYPES[file.tensors[name].dtype].nbytes
        boxes = [chunk.intersection(box) for box in boxes_of_range(self._box(name), begin // item, end // item)]
        spans = [chunk.span(box) for box in boxes if box.size]
        return (min(a for a, _ in spans) * stored_item, max(b for _, b in spans) * stored_item) if spans else None

    def _box(self, name: str) -> Box:
        """Return the box of a stored tensor that is read."""
        return Box.full(self.tensors[name].shape) if self._boxes is None else self._boxes[name]

    def read_sample(self, name: str, begin: int, end: int) -> npt.NDArray[np.uint8]:
        """Return the bytes `begin` to `end` of a tensor, unverified, for estimates only: shape [end - begin]."""
        data = np.empty(end - begin, dtype=np.uint8)
        self._range(name, begin, end, is_verified=False).read_into(data.data)
        return data

    def read_small(self, names: Sequence[str], views: Sequence[memoryview], room: memoryview | None = None) -> None:
        """Fill `views`, consecutive parts of `room` if given, with tensors of at most one block each, verified."""
        if self._is_single:
            self._files[0].read_small(names, views, room)
        elif self._boxes is not None:  # the stored tensor may be large even if the box is small
            for name, view in zip(names, views, strict=True):
                self.read_range(name, 0, len(view)).read_into(view)
        else:
            wanted = dict(zip(names, views, strict=True))
            for file in self._files:
                self._read_chunks(file, {name: wanted[name] for name in names if file.holds(name)})

    def _read_chunks(self, file: _File, views: Mapping[str, memoryview]) -> None:
        """Read the chunks in a part and copy their elements to their places in the complete tensors."""
        edges = [0, *accumulate(file.tensors[name].nbytes for name in views)]
        room = np.empty(edges[-1], np.uint8)
        parts = [room[begin:end] for begin, end in pairwise(edges)]
        if views:
            file.read_small(list(views), [part.data for part in parts], room.data)
        for (name, view), part in zip(views.items(), parts, strict=True):
            entry, stored = self.tensors[name], file.tensors[name].dtype
            chunk = _as_dtype(part, stored, entry.dtype)
            reader = (file.box(name), lambda begin, end, chunk=chunk: chunk[begin:end])
            copy_range(np.frombuffer(view, chunk.dtype), Box.full(entry.shape), 0, [reader])

    def _range(self, name: str, begin: int, end: int, is_verified: bool) -> FileRange | TensorRange:
        if self._is_single:
            return FileRange(self._files[0], name, begin, is_verified)
        box, dtype = self._box(name), self.tensors[name].dtype
        holders = [file for file in self._files if file.holds(name) and file.box(name).intersection(box).size]
        chunks = [(file.box(name), FileRange(file, name, 0, is_verified)) for file in holders]
        if len(chunks) == 1 and chunks[0][0] == box and chunks[0][1].dtype == dtype:
            chunks[0][1].go_to(begin)
            return chunks[0][1]
        return TensorRange(box, dtype, begin, end, chunks)

    def check_payload(self) -> Generator[Checked, None, None]:
        """Check every byte of one file in order, with several threads; continue after damage."""
        return _check_payload(self._files[0])

    def close(self) -> None:
        """Close all files."""
        self._opened.close()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)


def _items(dtype: str) -> np.dtype[Any]:
    """Return the NumPy dtype for copying elements bit by bit."""
    return np.dtype(f"u{DTYPES[dtype].nbytes}")


def _as_dtype(data: npt.NDArray[np.uint8], stored: str, wanted: str) -> npt.NDArray[Any]:
    """Convert elements to a dtype that holds their values exactly; return them for copying bit by bit."""
    if stored != wanted:  # parts use a wider dtype for values that are too large or too small for the run's dtype
        data = decode_values(data, stored).astype(np.dtype(DTYPES[wanted].torch_name)).view(np.uint8)
    return data.view(_items(wanted))


class TensorRange:
    """A reader of the bytes `begin` to `end` in a box of one tensor, in order, from the chunks that hold the elements.

    It verifies the blocks in the same pass, and therefore reads each file from the start of a block to the end of one.
    """

    def __init__(self, box: Box, dtype: str, begin: int, end: int, chunks: Sequence[tuple[Box, FileRange]]) -> None:
        self._box, self._dtype, self._position, self._end = box, _items(dtype), begin, end
        self._stored = [stored for _, stored in chunks]
        self._chunks = [(held, partial(stored.elements, dtype)) for held, stored in chunks]

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes."""
        if view:
            first = self._position // self._dtype.itemsize
            copy_range(np.frombuffer(view, self._dtype), self._box, first, self._chunks)
        self._position += len(view)
        if self._position == self._end:
            for stored in self._stored:
                stored.finish()


class _File(OpenedFile):
    """An opened part; `boxes` are the boxes of its tensors that are read, None if all tensors are complete."""

    def __init__(self, part: BackingFile, boxes: Mapping[str, Box] | None) -> None:
        self.header, self.tensors, self._boxes = part.header, part.tensors, boxes
        self._checksums = headers.decode_checksums(part.path, part.header) if part.header else {}
        self._payload_start = part.header.payload_start if part.header else 0
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
        """Close the file; raise FileFormatError if it has no checksums and was changed meanwhile."""
        try:
            if kind is None and not self._checksums and self.stamp != self._stamp:
                raise FileFormatError(self.path, "was changed while it was being read", "run again")
        finally:
            self.close()

    def holds(self, name: str) -> bool:
        """Return whether the file has elements of a tensor."""
        return self._boxes is None or name in self._boxes

    def box(self, name: str) -> Box:
        """Return the box of a tensor's elements in the file."""
        return Box.full(self.tensors[name].shape) if self._boxes is None else self._boxes[name]

    def place(self, name: str, begin: int, end: int, is_verified: bool) -> tuple[int, int]:
        """Return the begin and end in the file of a range of a tensor, widened to complete blocks for verification."""
        entry = self.tensors[name]
        if is_verified and self.checksum(name, 0) is not None:
            begin -= begin % fmt.BLOCK_BYTES
            end = min(-(-end // fmt.BLOCK_BYTES) * fmt.BLOCK_BYTES, entry.nbytes)
        start = self._payload_start + entry.begin
        return (start, start) if entry.strides else (start + begin, start + end)

    def fill(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view`, unverified, from byte `begin` of a tensor on, continuing into the tensors that follow it."""
        entry = self.tensors[name]
        if entry.strides:
            view[:] = self._in_order(name)[begin : begin + len(view)].data
        else:
            self._read(name, view, begin)

    def _read(self, name: str, view: memoryview, begin: int) -> None:
        """Fill `view` from the file; `begin` counts from the start of the stored tensor."""
        if self.read_into(view, self._payload_start + self.tensors[name].begin + begin) < len(view):
            raise FileFormatError(self.path, f"tensor {shown(name)}: the file became shorter while it was read")

    def _in_order(self, name: str) -> npt.NDArray[np.uint8]:
        """Return the bytes, in row-major order, of a tensor stored in another order; the last such tensor is cached."""
        with self._lock:
            if name not in self._gathered:
                entry, dtype = self.tensors[name], _items(self.tensors[name].dtype)
                reach = 1 + sum((size - 1) * step for size, step in zip(entry.shape, entry.strides, strict=True))
                stored = np.empty(reach, dtype)
                self._read(name, stored.view(np.uint8).data, 0)
                strided = as_strided(stored, entry.shape, [dtype.itemsize * step for step in entry.strides])
                self._gathered = {name: np.ascontiguousarray(strided).reshape(-1).view(np.uint8)}
            return self._gathered[name]

    def read_small(self, names: Sequence[str], views: Sequence[memoryview], room: memoryview | None = None) -> None:
        """Fill `views`, consecutive parts of `room` if given, with tensors of at most one block each, verified."""
        places = [self.tensors[name] for name in names]
        if any(place.strides for place in places):
            for name, view in zip(names, views, strict=True):
                self.fill(name, view, 0)
        elif room is not None and all(b.begin == a.begin + a.nbytes for a, b in pairwise(places)):
            self.fill(names[0], room, 0)
        else:
            self._gather(names, places, views)
        if self._checksums:
            for name, view in zip(names, views, strict=True):
                if self._checksums[name] != (xxhash.xxh3_64_hexdigest(view) if view else ""):
                    raise self.damaged(name)

    def _gather(self, names: Sequence[str], places: Sequence[fmt.TensorEntry], views: Sequence[memoryview]) -> None:
        """Read tensors from anywhere in the file, with one request for those that are near each other."""
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
        """Return the checksum of a block in the header, 16 hexadecimal digits; None in a file without checksums."""
        digits = self._checksums.get(name)
        return None if digits is None else digits[16 * block : 16 * block + 16]

    def damaged(self, name: str) -> FileFormatError:
        """Return the error for a block that does not match its checksum."""
        return FileFormatError(self.path, f"tensor {shown(name)} is damaged: its checksum does not match")


class FileRange:
    """A forward reader of the bytes of one tensor in a file from `begin` on; it verifies each block that it reads."""

    def __init__(self, file: _File, name: str, begin: int, is_verified: bool) -> None:
        entry = file.tensors[name]
        self.dtype, self._nbytes = entry.dtype, entry.nbytes
        self._file, self._name, self._sums = file, name, fmt.BlockChecksums(begin, entry.nbytes)
        self._is_verified = is_verified and file.checksum(name, 0) is not None

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes."""
        self._file.fill(self._name, view, self._sums.position)
        if not self._is_verified:
            self._sums.position += len(view)
            return
        for block, checksum in self._sums.of(view):
            if checksum != self._file.checksum(self._name, block):
                raise self._file.damaged(self._name)

    def go_to(self, begin: int) -> None:
        """Move forward to a byte; within a block, read up to it for the checksum."""
        if not self._is_verified:
            self._sums.position = begin
            return
        first = begin - begin % fmt.BLOCK_BYTES
        if self._sums.position < first:
            self.finish()
            self._sums.position = first
        self._skip_to(begin)

    def finish(self) -> None:
        """Read the current block to its end, to verify it."""
        if self._is_verified:
            self._skip_to(min(self._nbytes, -(-self._sums.position // fmt.BLOCK_BYTES) * fmt.BLOCK_BYTES))

    def elements(self, wanted: str, begin: int, end: int) -> npt.NDArray[Any]:
        """Return elements of the tensor in a dtype that holds them exactly; see `chunks.ForwardReader`."""
        item = DTYPES[self.dtype].nbytes
        self.go_to(begin * item)
        data = np.empty((end - begin) * item, dtype=np.uint8)
        self.read_into(data.data)
        return _as_dtype(data, self.dtype, wanted)

    def _skip_to(self, end: int) -> None:
        while self._sums.position < end:
            self.read_into(memoryview(bytearray(min(end - self._sums.position, _SKIPPED))))


# --- verifying a payload: in parallel, in constant memory


class Checked(NamedTuple):
    """The result for a piece of a payload: damaged tensors, the error of the first, tensors with nan or infinity."""

    nbytes: int
    damaged: Sequence[str] = ()
    error: FileFormatError | None = None
    nonfinite: Sequence[str] = ()


def verify_payload(path: Path, header: fmt.FileHeader, progress: Callable[[int], object] | None = None) -> None:
    """Read a file, which must still have this header, and verify each block. Memory: one block per thread."""
    with open_file(path, header) as file, closing(file.check_payload()) as results:
        for checked in results:
            if checked.error is not None:
                raise checked.error
            if progress is not None:
                progress(checked.nbytes)


_Span = tuple[str, int, int]
"""The name of a tensor and the begin and end of a range of its bytes within one block."""


def _check_payload(file: _File) -> Generator[Checked, None, None]:
    """Check all blocks of a file in order, in parallel unless there is only one."""
    buffers = threading.local()  # one buffer per thread

    def check(spans: Sequence[_Span]) -> Checked:
        if not hasattr(buffers, "block"):
            buffers.block = memoryview(bytearray(fmt.BLOCK_BYTES))
        return _check_spans(file, spans, buffers.block)

    blocks = _blocks(file.tensors)
    first = list(islice(blocks, 2))
    if len(first) < 2:  # starting threads takes longer than reading a small file
        yield from map(check, first)
        return
    pool, pending = ThreadPoolExecutor(THREADS, "ema-verify"), deque[Future[Checked]]()
    try:
        for block in chain(first, blocks):
            pending.append(pool.submit(check, block))
            if len(pending) > 4 * THREADS:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # on an error or an interrupt, too: wait for the blocks being read and cancel the others
        pool.shutdown(wait=True, cancel_futures=True)


def _check_spans(file: _File, spans: Sequence[_Span], buffer: memoryview) -> Checked:
    """Read consecutive spans and check their checksums and values."""
    view = buffer[: sum(end - begin for _, begin, end in spans)]
    try:
        file.fill(spans[0][0], view, spans[0][1])
    except FileFormatError as error:
        return Checked(len(view), [name for name, _, _ in spans], error)
    damaged, nonfinite, at = [], [], 0
    for dtype, same_dtype in groupby(spans, lambda span: file.tensors[span[0]].dtype):
        parts, start = [], at
        for name, begin, end in same_dtype:
            parts.append((name, view[at : at + end - begin]))
            at += end - begin
            expected = file.checksum(name, begin // fmt.BLOCK_BYTES)
            if expected is not None and xxhash.xxh3_64_hexdigest(parts[-1][1]) != expected:
                damaged.append(name)
        if holds_nonfinite(view[start:at], dtype):  # one test for neighbours, and for each tensor only if it fails
            nonfinite += [name for name, part in parts if holds_nonfinite(part, dtype)]
    return Checked(len(view), damaged, file.damaged(damaged[0]) if damaged else None, nonfinite)


def _blocks(tensors: Mapping[str, fmt.TensorEntry]) -> Iterator[list[_Span]]:
    """Yield the payload in order, in lists of consecutive spans of at most one block in total."""
    batch: list[_Span] = []
    size = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].begin):
        for begin in range(0, entry.nbytes, fmt.BLOCK_BYTES):
            end = min(begin + fmt.BLOCK_BYTES, entry.nbytes)
            if size + end - begin > fmt.BLOCK_BYTES:
                yield batch
                batch, size = [], 0
            batch.append((name, begin, end))
            size += end - begin
    if batch:
        yield batch
