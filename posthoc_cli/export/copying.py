"""Copies of checkpoints with other values for some of their tensors, and every other byte as it is.

A file is copied in blocks, except for the bytes of the tensors to replace, which are then written
in tiles, in any order. Nothing is unpickled. A tensor that is stored in another order (a
transposed one, or `channels_last`) is collected in memory and written when it is complete.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from posthoc_cli import files
from posthoc_cli.checkpoints.pickles import is_archive
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, MismatchError, shown
from posthoc_cli.export.archives import Member, members_at
from posthoc_cli.export.outputs import FileOutput
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import (
    Box,
    Entry,
    OpenedFile,
    TensorFile,
    boxes_of_range,
    items,
    row_major,
)

_BLOCK = 4 << 20  # bytes copied at a time: enough that calls cost nothing next to the copying


class Chunk(NamedTuple):
    """A box of a tensor in a file, by its name there."""

    file: TensorFile
    name: str

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def entry(self) -> Entry:
        return self.file.entries[self.name]

    @property
    def place(self) -> tuple[Path, Entry]:
        return self.path, self.entry

    @property
    def box(self) -> Box:
        return self.file.boxes.get(self.name) or Box.full(self.entry.shape)

    @property
    def begin(self) -> int:
        return self.entry.begin

    @property
    def end(self) -> int:
        """The place in the file after the last byte."""
        if not self.entry.strides:
            return self.begin + self.entry.nbytes
        last = 0
        for size, step in zip(self.box.shape, self.entry.strides, strict=True):
            last += (size - 1) * step
        return self.begin + (last + 1) * ITEM_BYTES[self.entry.dtype]

    def view(self, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the view [*shape, bytes of an element] of the bytes from `begin` on."""
        item = ITEM_BYTES[self.entry.dtype]
        shape = self.box.shape
        strides = self.entry.strides or row_major(shape)
        steps = [item * step for step in strides]
        return as_strided(data, (*shape, item), (*steps, 1))


class Placed(NamedTuple):
    """The dtype and shape of a tensor of a checkpoint, and its chunks."""

    entry: Entry
    chunks: list[Chunk]


def chunks_of(source: Source) -> dict[str, list[Chunk]]:
    """Return the chunks of the tensors of a checkpoint, by their stored names."""
    chunks = dict[str, list[Chunk]]()
    for file in source.files:
        for name in file.entries:
            chunks.setdefault(name, []).append(Chunk(file, name))
    return chunks


def _check_apart(chunks: Sequence[Chunk]) -> None:
    """Raise a MismatchError if two elements have bytes in common; the chunks of a file are by their
    places."""
    reaching = list[Chunk]()
    for chunk in chunks:
        if chunk.entry.strides:
            own = np.zeros(chunk.end - chunk.begin, bool)
            chunk.view(own)[...] = True
            if np.count_nonzero(own) < chunk.entry.nbytes:
                reason = f"tensor {shown(chunk.name)} repeats its elements, as `expand` does"
                raise MismatchError(chunk.path, reason, "they would get different values")
        reaching = [before for before in reaching if before.end > chunk.begin]
        for before in reaching:
            # those with strides may only interleave
            end = max(before.end, chunk.end)
            reached = np.zeros(end - before.begin, bool)
            before.view(reached)[...] = True
            rest = reached[chunk.begin - before.begin :]
            if chunk.view(rest).any():
                reason = (
                    f"tensors {shown(before.name)} and {shown(chunk.name)} have bytes in common"
                )
                raise MismatchError(chunk.path, reason, "they would get different values")
        reaching.append(chunk)


class CopiedFile:
    """A copy of a file in a pending one.

    The bytes of the chunks are not copied; each must be written once. Raises FileFormatError if
    the file was changed since its index was read, and MismatchError if chunks overlap.
    """

    def __init__(self, path: Path, chunks: Sequence[Chunk], out: files.PendingFile) -> None:
        self._path = path
        self._chunks = [chunk for chunk in chunks if chunk.entry.size]
        self._chunks.sort(key=lambda chunk: chunk.begin)
        self._members = set[Member]()
        self._collected = dict[Chunk, _Collected]()
        self._lock = threading.Lock()
        _check_apart(self._chunks)
        self._file = out

    def copy(self) -> None:
        """Copy the file but for the bytes of the chunks; those stored in another order, too."""
        with OpenedFile(self._path) as source:
            self._check(source, "replaced while it was being used")
            for begin, end in self._gaps(source.size):
                self._copy_range(source, begin, end)
            if is_archive(source):
                self._members = members_at(source, [chunk.begin for chunk in self._chunks])
            self._check(source, "changed while it was being read")

    def _check(self, source: OpenedFile, problem: str) -> None:
        for chunk in self._chunks:
            if chunk.file.stamp != source.stamp:
                raise FileFormatError(self._path, f"was {problem}", "run again")

    def _gaps(self, size: int) -> Iterator[tuple[int, int]]:
        begin = 0
        for chunk in self._chunks:
            if not chunk.entry.strides:
                yield begin, chunk.begin
                begin = chunk.end
        yield begin, size

    def _copy_range(self, source: OpenedFile, begin: int, end: int) -> None:
        for at in range(begin, end, _BLOCK):
            count = min(_BLOCK, end - at)
            data = source.read_at(count, at)
            self._file.write_at(data, at)

    def write(self, chunk: Chunk, data: memoryview, begin: int) -> None:
        """Write bytes of a chunk in row-major order, from byte `begin` on."""
        with self._lock:  # the bytes between those of a strided chunk are read and written back
            if not chunk.entry.strides:
                self._file.write_at(data, chunk.begin + begin)
                return
            if chunk not in self._collected:
                self._collected[chunk] = _Collected(chunk.entry.nbytes)
            collected = self._collected[chunk]
            collected.add(data, begin)
            if not collected.left:
                stored = np.empty(chunk.end - chunk.begin, np.uint8)
                self._read(stored.data, chunk.begin)
                view = chunk.view(stored)
                view[...] = collected.data.reshape(view.shape)
                self._file.write_at(stored.data, chunk.begin)
                del self._collected[chunk]

    def _read(self, view: memoryview, offset: int) -> None:
        """Read what was written."""
        with files.reported_as_write_error(self._file.path):
            while view:
                count = files.system.read(self._file.descriptor, view, offset)
                view = view[count:]
                offset += count

    def complete(self) -> None:
        """Set the checksums of changed members of an archive."""
        room = memoryview(bytearray(_BLOCK))
        for begin, end, places in self._members:
            checksum = 0
            for at in range(begin, end, _BLOCK):
                view = room[: end - at]
                self._read(view, at)
                checksum = zlib.crc32(view, checksum)
            for place in places:
                self._file.write_at(checksum.to_bytes(4, "little"), place)

    def publish(self) -> None:
        self._file.publish()


class _Collected:
    """The bytes of a chunk in row-major order."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.empty(nbytes, np.uint8)
        self.left = nbytes

    def add(self, data: memoryview, begin: int) -> None:
        self.data[begin : begin + len(data)] = data
        self.left -= len(data)


class Copy(FileOutput):
    """Copies of all files that hold tensors to replace.

    Arguments:
        places: the tensors to replace, by their names in the tiles.
        pending: the output of each file.
    """

    def __init__(
        self, places: Mapping[str, Placed], pending: Mapping[Path, files.PendingFile]
    ) -> None:
        self._places = places
        self._files = dict[Path, CopiedFile]()
        chunks: dict[Path, list[Chunk]] = {path: [] for path in pending}
        for placed in places.values():
            for chunk in placed.chunks:
                chunks[chunk.path].append(chunk)
        for path, out in pending.items():
            self._files[path] = CopiedFile(path, chunks[path], out)
            self._files[path].copy()

    def put(self, name: str, data: memoryview, begin: int) -> None:
        if name not in self._places:
            return
        entry, chunks = self._places[name]
        whole = Box.full(entry.shape)
        item = ITEM_BYTES[entry.dtype]
        first = begin // item
        values = np.frombuffer(data, items(entry.dtype))
        steps = [item * step for step in row_major(entry.shape)]
        for chunk in chunks:
            file = self._files[chunk.path]
            if chunk.box == whole:
                file.write(chunk, data, begin)
                continue
            for piece in boxes_of_range(whole, first, first + values.size):
                part = chunk.box.intersection(piece)
                if part.size:
                    start, _ = whole.span(part)
                    view = as_strided(values[start - first :], part.shape, steps)
                    at, _ = chunk.box.span(part)  # in a row: `piece` has all of its last axes
                    file.write(chunk, memoryview(view.tobytes()), at * item)

    def complete(self) -> None:
        for file in self._files.values():
            file.complete()

    def publish(self) -> None:
        for file in self._files.values():
            file.publish()
