"""Copies of checkpoints with other values for some of their tensors, and every other byte as it is.

A file is copied in blocks, except for the bytes of the tensors to replace, which are then written
in tiles, in any order. Nothing is unpickled. A tensor that is stored in another order (a
transposed one, or `channels_last`) is collected in memory and written when it is complete.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, MismatchError, shown
from posthoc_cli.export.archives import Member, is_archive, members_at
from posthoc_cli.export.outputs import FileOutput
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import (
    Box,
    Entry,
    OpenedFile,
    boxes_of_range,
    items,
    row_major,
)

_BLOCK = 4 << 20  # bytes copied at a time: enough that calls cost nothing next to the copying


class Chunk(NamedTuple):
    """A box of a tensor, and its place in a file."""

    path: Path
    stamp: tuple[int, int | str]
    entry: Entry
    box: Box

    @property
    def end(self) -> int:
        """The place in the file after the last byte."""
        entry = self.entry
        count = entry.size
        if entry.strides:
            steps = zip(entry.shape, entry.strides, strict=True)
            count = 1 + sum((size - 1) * step for size, step in steps)
        return entry.begin + count * ITEM_BYTES[entry.dtype]


def chunks_of(source: Source) -> dict[str, list[Chunk]]:
    """Return the chunks of the tensors of a checkpoint, by their stored names."""
    chunks = dict[str, list[Chunk]]()
    for file in source.files:
        for name, entry in file.entries.items():
            box = file.box(name)
            if box is not None:
                chunks.setdefault(name, []).append(Chunk(file.path, file.stamp, entry, box))
    return chunks


def check_apart(places: Mapping[str, Placed]) -> None:
    """Raise a MismatchError if two tensors have an element in common."""
    by_file = dict[Path, list[tuple[Chunk, str]]]()
    for name, placed in places.items():
        for chunk in placed.chunks:
            if chunk.entry.size:
                by_file.setdefault(chunk.path, []).append((chunk, name))
    for path, found in by_file.items():
        reaching = list[tuple[Chunk, str]]()
        for chunk, name in sorted(found, key=lambda item: item[0].entry.begin):
            reaching = [item for item in reaching if item[0].end > chunk.entry.begin]
            for before, other in reaching:
                if _share_bytes(before, chunk):
                    reason = f"tensors {shown(other)} and {shown(name)} have bytes in common"
                    raise MismatchError(path, reason, "and would get different values")
            reaching.append((chunk, name))


def _share_bytes(before: Chunk, after: Chunk) -> bool:
    """Return whether two chunks that reach over the same bytes share some; those with strides may
    only interleave."""
    if not (before.entry.strides or after.entry.strides):
        return True
    reached = np.zeros(max(before.end, after.end) - before.entry.begin, bool)
    _bytes_of(before, reached)[...] = True
    return bool(_bytes_of(after, reached[after.entry.begin - before.entry.begin :]).any())


def _bytes_of(chunk: Chunk, reached: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the view of a chunk's bytes in an array that begins where the chunk does."""
    item = ITEM_BYTES[chunk.entry.dtype]
    steps = [item * step for step in chunk.entry.strides or row_major(chunk.entry.shape)]
    return as_strided(reached, (*chunk.entry.shape, item), (*steps, 1))


class _Collected:
    """The bytes of a chunk in row-major order."""

    def __init__(self, nbytes: int) -> None:
        self.data = np.empty(nbytes, np.uint8)
        self.left = nbytes


class CopiedFile:
    """A copy of a file, which is absent or complete, see `files.PendingFile`.

    The bytes of the chunks are not copied; each must be written once. Raises FileFormatError if
    the file was changed since its index was read.
    """

    def __init__(self, path: Path, chunks: Sequence[Chunk], out: Path, overwrite: bool) -> None:
        self._chunks = chunks
        self._path = path
        self._collected = dict[int, _Collected]()
        self._members = list[Member]()
        self._lock = threading.Lock()
        self._file = files.PendingFile(out, overwrite)

    def __enter__(self) -> CopiedFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was written; do nothing after `publish`."""
        self._file.discard()

    def copy(self) -> None:
        """Copy the file but for the bytes of the chunks; those stored in another order, too."""
        with OpenedFile(self._path) as source:
            self._check(source, "replaced while it was being used")
            for begin, end in self._gaps(source.size):
                self._copy_range(source, begin, end)
            if is_archive(source):
                filled = (chunk.entry.begin for chunk in self._chunks if chunk.entry.size)
                self._members = members_at(source, filled)
            self._check(source, "changed while it was being read")

    def _check(self, source: OpenedFile, problem: str) -> None:
        if any(source.stamp != chunk.stamp for chunk in self._chunks):
            raise FileFormatError(self._path, f"was {problem}", "run again")

    def _gaps(self, size: int) -> Iterator[tuple[int, int]]:
        begin = 0
        plain = [chunk for chunk in self._chunks if not chunk.entry.strides]
        for chunk in sorted(plain, key=lambda chunk: chunk.entry.begin):
            yield begin, chunk.entry.begin
            begin = chunk.end
        yield begin, size

    def _copy_range(self, source: OpenedFile, begin: int, end: int) -> None:
        room = memoryview(bytearray(min(_BLOCK, end - begin)))
        for at in range(begin, end, _BLOCK):
            view = room[: end - at]
            if source.read_into(view, at) < len(view):
                raise FileFormatError(self._path, "became shorter while it was read")
            self._file.write_at(view, at)

    def write(self, chunk: Chunk, data: memoryview, begin: int) -> None:
        """Write bytes of a chunk in row-major order, from byte `begin` on."""
        entry = chunk.entry
        with self._lock:  # the bytes between those of a strided chunk are read and written back
            if not entry.strides:
                self._file.write_at(data, entry.begin + begin)
                return
            if entry.begin not in self._collected:
                self._collected[entry.begin] = _Collected(entry.nbytes)
            collected = self._collected[entry.begin]
            collected.data[begin : begin + len(data)] = np.frombuffer(data, np.uint8)
            collected.left -= len(data)
            if not collected.left:
                del self._collected[entry.begin]
                self._write_strided(chunk, collected.data)

    def _write_strided(self, chunk: Chunk, data: npt.NDArray[np.uint8]) -> None:
        entry = chunk.entry
        dtype = items(entry.dtype)
        stored = np.empty(chunk.end - entry.begin, np.uint8)
        self._read(stored.data, entry.begin)
        steps = [dtype.itemsize * step for step in entry.strides]
        values = data.view(dtype).reshape(entry.shape)
        as_strided(stored.view(dtype), entry.shape, steps)[...] = values
        self._file.write_at(stored.data, entry.begin)

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


class Placed(NamedTuple):
    """The dtype and shape of a tensor of a checkpoint, and its chunks."""

    entry: Entry
    chunks: list[Chunk]


class Copy(FileOutput):
    """Copies of all files that hold tensors to replace.

    Arguments:
        stack: its end removes what was not published.
        places: the tensors to replace, by their names in the tiles.
        paths: the output of each file.
    """

    def __init__(
        self,
        stack: ExitStack,
        places: Mapping[str, Placed],
        paths: Mapping[Path, Path],
        overwrite: bool,
    ) -> None:
        self._places = places
        self._files = dict[Path, CopiedFile]()
        by_file: dict[Path, list[Chunk]] = {path: [] for path in paths}
        for placed in places.values():
            for chunk in placed.chunks:
                by_file[chunk.path].append(chunk)
        for path, chunks in by_file.items():
            files.make_directory(paths[path].parent)
            file = stack.enter_context(CopiedFile(path, chunks, paths[path], overwrite))
            file.copy()
            self._files[path] = file

    def put(self, name: str, data: memoryview, begin: int) -> None:
        if name not in self._places:
            return
        entry, chunks = self._places[name]
        whole = Box.full(entry.shape)
        for chunk in chunks:
            if chunk.box == whole:
                self._files[chunk.path].write(chunk, data, begin)
            else:
                self._put_parts(chunk, entry, data, begin // ITEM_BYTES[entry.dtype])

    def _put_parts(self, chunk: Chunk, entry: Entry, data: memoryview, first: int) -> None:
        """Write the elements that a chunk has of those from `first` on of its tensor."""
        whole = Box.full(entry.shape)
        item = ITEM_BYTES[entry.dtype]
        values = np.frombuffer(data, items(entry.dtype))
        steps = [item * step for step in row_major(entry.shape)]
        for piece in boxes_of_range(whole, first, first + values.size):
            part = chunk.box.intersection(piece)
            if part.size:
                begin, _ = whole.span(part)
                cut = np.ascontiguousarray(as_strided(values[begin - first :], part.shape, steps))
                at, _ = chunk.box.span(part)  # in a row: `piece` is complete in its last axes
                self._files[chunk.path].write(chunk, cut.reshape(-1).view(np.uint8).data, at * item)

    def complete(self) -> None:
        for file in self._files.values():
            file.complete()

    def publish(self) -> None:
        for file in self._files.values():
            file.publish()
