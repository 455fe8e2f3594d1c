"""A copy of a checkpoint with other values for some of its tensors, and every other byte as it is.

A file is copied in blocks, except for the bytes of the tensors to replace, which are then written
in tiles, in any order. Nothing is unpickled. A tensor that is stored in another order (a
transposed one, or `channels_last`) is collected in memory and written when it is complete.

The CRC-32 of a member of an archive of `torch.save` follows its content: it is in its entry in the
central directory, at the end of the archive, and either in the descriptor after its content, if
bit 3 of its flags is set, or in the local header before it. A file is one archive, or several end
to end (torch.distributed.checkpoint). torch's `.data/serialization_id`, a hash of all of them, says
which save a file is of, and stays.
"""

from __future__ import annotations

import io
import shutil
import struct
import threading
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import as_strided

from posthoc_cli import files
from posthoc_cli.checkpoints.pickles import FileRange, is_archive, member_begin
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, MismatchError, shown
from posthoc_cli.snapshots.sources import StoredTensors
from posthoc_cli.snapshots.tensorfile import (
    Box,
    Entry,
    OpenedFile,
    boxes_of_range,
    items,
    row_major,
)
from posthoc_cli.synthesis.engine import Tile

_BLOCK = 4 << 20  # bytes copied at a time: enough that calls cost nothing next to the copying


class Chunk(NamedTuple):
    """A box of a tensor in a file, by its name there."""

    path: Path
    stamp: tuple[int, int | str]  # the file's
    name: str
    entry: Entry
    box: Box

    @property
    def begin(self) -> int:
        return self.entry.begin

    @property
    def end(self) -> int:
        """The place in the file after the last byte."""
        return self.begin + self.entry.reach * ITEM_BYTES[self.entry.dtype]

    def view(self, data: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Return the view [*shape, bytes of an element] of the bytes from `begin` on."""
        item = ITEM_BYTES[self.entry.dtype]
        strides = self.entry.strides or row_major(self.entry.shape)
        return as_strided(data, (*self.entry.shape, item), (*(item * s for s in strides), 1))


class Replaced(NamedTuple):
    """The dtype and shape of a tensor of a checkpoint, and its chunks."""

    entry: Entry
    chunks: list[Chunk]


def chunks_of(source: StoredTensors) -> dict[str, list[Chunk]]:
    """Return the chunks of the tensors of a checkpoint, by their stored names."""
    chunks = dict[str, list[Chunk]]()
    for file in source.files:
        for name, entry in file.entries.items():
            box = file.boxes.get(name) or Box.full(entry.shape)
            chunks.setdefault(name, []).append(Chunk(file.path, file.stamp, name, entry, box))
    return chunks


# --- a file


class CopiedFile:
    """A copy of a file in a pending one, but for the bytes of the chunks: each is to be written
    once.

    Raises FileFormatError if the file was changed since its index was read, and MismatchError if
    chunks overlap.
    """

    def __init__(self, path: Path, chunks: Iterable[Chunk], out: files.PendingFile) -> None:
        self._path = path
        filled = [chunk for chunk in chunks if chunk.entry.size]
        self._chunks = sorted(filled, key=lambda chunk: chunk.begin)
        self._members = set[Member]()
        self._collected = dict[Chunk, _Collected]()
        self._lock = threading.Lock()
        self._file = out
        _check_apart(self._chunks)
        with OpenedFile(path) as source:
            self._check(source, "replaced while it was being used")
            for begin, end in self._gaps(source.size):
                for at in range(begin, end, _BLOCK):
                    out.write_at(source.read_at(min(_BLOCK, end - at), at), at)
            if is_archive(source):
                self._members = members_at(source, [chunk.begin for chunk in self._chunks])
            self._check(source, "changed while it was being read")

    def _check(self, source: OpenedFile, problem: str) -> None:
        if any(chunk.stamp != source.stamp for chunk in self._chunks):
            raise FileFormatError(self._path, f"was {problem}", "run again")

    def _gaps(self, size: int) -> Iterator[tuple[int, int]]:
        """Yield the ranges to copy; those of tensors stored in another order are among them."""
        begin = 0
        for chunk in self._chunks:
            if not chunk.entry.strides:
                yield begin, chunk.begin
                begin = chunk.end
        yield begin, size

    def write(self, chunk: Chunk, data: memoryview, begin: int) -> None:
        """Write bytes of a chunk in row-major order, from byte `begin` on."""
        if not chunk.entry.strides:
            self._file.write_at(data, chunk.begin + begin)
            return
        with self._lock:  # the bytes between those of a chunk are read and written back
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


def _check_apart(chunks: Sequence[Chunk]) -> None:
    """Raise a MismatchError if two elements have bytes in common; the chunks of a file are by their
    places."""
    reaching = list[Chunk]()  # some of whose bytes may be in common
    end = 0
    for chunk in chunks:
        if chunk.begin >= end:
            _check_cluster(reaching)
            reaching = []
        reaching.append(chunk)
        end = max(end, chunk.end)
    _check_cluster(reaching)


def _check_cluster(chunks: Sequence[Chunk]) -> None:
    if not any(chunk.entry.strides for chunk in chunks) and len(chunks) < 2:
        return
    begin = chunks[0].begin
    used = np.zeros(max(chunk.end for chunk in chunks) - begin, bool)
    for chunk in chunks:
        chunk.view(used[chunk.begin - begin :])[...] = True
    if np.count_nonzero(used) < sum(chunk.entry.nbytes for chunk in chunks):
        names = " and ".join(shown(chunk.name) for chunk in chunks[:2])
        reason = f"elements of {names} have bytes in common, as after `expand`"
        raise MismatchError(chunks[0].path, reason, "they would get different values")


# --- archives

_LOCAL_CRC = 14
_DESCRIPTOR_CRC = 4
_ENTRY_CRC = 16
_ENTRY_BYTES = 46  # of an entry of the central directory, without name, extra field and comment
_HAS_DESCRIPTOR = 8
_IS_UTF8 = 0x800


class Member(NamedTuple):
    """The content of a member, and the places of its CRC-32."""

    begin: int
    end: int
    checksums: tuple[int, int]


def members_at(file: OpenedFile, places: Iterable[int]) -> set[Member]:
    """Return the members that hold the bytes at these places of a file of archives."""
    left = sorted(places)
    members = set[Member]()
    end = file.size
    try:
        while left:
            archive = zipfile.ZipFile(io.BufferedReader(FileRange(file, 0, end)))
            entries = _entries(archive)
            headers = sorted(entries)
            end = headers[0]
            while left and left[-1] >= end:
                place = left.pop()
                header = headers[bisect_right(headers, place) - 1]
                members.add(_member(file, *entries[header], place))
    except (zipfile.BadZipFile, ValueError, LookupError, struct.error) as error:
        reason = "its tensors cannot be replaced in place: not an archive as torch.save writes it"
        raise FileFormatError(file.path, reason) from error
    return members


def _entries(archive: zipfile.ZipFile) -> dict[int, tuple[zipfile.ZipInfo, int]]:
    """Return members, and the places of their entries, by the places of their local headers."""
    entries = dict[int, tuple[zipfile.ZipInfo, int]]()
    at = archive.start_dir
    for info in archive.infolist():
        entries[info.header_offset] = info, at
        encoding = "utf-8" if info.flag_bits & _IS_UTF8 else "cp437"
        name = info.orig_filename.encode(encoding)
        at += _ENTRY_BYTES + len(name) + len(info.extra) + len(info.comment)
    return entries


def _member(file: OpenedFile, info: zipfile.ZipInfo, entry: int, place: int) -> Member:
    begin = member_begin(file, info)
    end = begin + info.file_size
    checksum = info.header_offset + _LOCAL_CRC
    if info.flag_bits & _HAS_DESCRIPTOR:
        checksum = end + _DESCRIPTOR_CRC
    if not begin <= place < end:
        raise ValueError("a tensor is outside the members")
    return Member(begin, end, (checksum, entry + _ENTRY_CRC))


# --- the output


@dataclass(frozen=True)
class Replacement:
    """A checkpoint, and what an output that is a copy of it has instead."""

    path: Path  # the file or folder
    word: str  # which tensors are replaced: "average" or "weights"
    tensors: Mapping[str, Replaced]  # by their names in the output of a synthesis
    kept: Sequence[str]  # those of them that stay, since the run does not have them
    shared: Sequence[str]  # averages that have no place of their own: it is the weights', too
    files: Mapping[Path, str]  # the files of the model, with their paths in the folder
    beside: Mapping[str, Path]  # the other files to copy, by their paths in the folder
    left_out: Sequence[str]  # what is not copied from a folder

    @property
    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in (*self.files, *self.beside.values()))

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "replaced": self.word,
            "kept": self.kept,
            "shared": self.shared,
            "left_out": self.left_out,
        }


class Copy:
    """An output that is a copy of a file, or of a folder."""

    def __init__(
        self,
        stack: ExitStack,
        replacement: Replacement,
        path: Path,
        overwrite: bool,
        folder: files.PendingFolder | None,
    ) -> None:
        self._replacement = replacement
        self._folder = folder
        self._files = dict[Path, CopiedFile]()
        chunks: dict[Path, list[Chunk]] = {file: [] for file in replacement.files}
        for replaced in replacement.tensors.values():
            for chunk in replaced.chunks:
                chunks[chunk.path].append(chunk)
        for file, name in replacement.files.items():
            place = path if folder is None else folder.temporary / name
            files.make_directory(place.parent)
            pending = stack.enter_context(files.PendingFile(place, overwrite))
            self._files[file] = CopiedFile(file, chunks[file], pending)

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        for name, data, begin in tile.pieces(values):
            if name in self._replacement.tensors:
                self._put(*self._replacement.tensors[name], data, begin)

    def _put(self, entry: Entry, chunks: Iterable[Chunk], data: memoryview, begin: int) -> None:
        """Write bytes of a tensor, from byte `begin` on, to its chunks."""
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
        if self._folder is None:
            return
        for file in self._files.values():
            file.publish()
        for name, other in self._replacement.beside.items():
            place = self._folder.temporary / name
            files.make_directory(place.parent)
            with files.reported_as_write_error(other, "copied"):
                shutil.copyfile(other, place)

    def publish(self) -> None:
        if self._folder is not None:
            self._folder.publish()
            return
        for file in self._files.values():
            file.publish()
