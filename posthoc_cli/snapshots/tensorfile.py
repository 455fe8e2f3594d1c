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
                    `snapshot.Snapshot` or `output_info.OutputInfo`

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

import math
import resource
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import FileFormatError, count_noun, quote
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.entry import MAX_TENSORS, Entry, is_sizes
from posthoc_cli.snapshots.opened_file import SHORTER, OpenedFile, Span, in_turn
from posthoc_cli.snapshots.strict_json import parse_object, require

SUFFIX = ".safetensors"
FORMAT = 4
WITH_AVERAGE = 3  # the format in which a snapshot's sample also had as many values of the average
FORMATS = (WITH_AVERAGE, FORMAT)  # that are read

MAX_HEADER_BYTES = 100_000_000
_START = b'{"__metadata__":{"ema.checksum":"'

# the place of the header's checksum in a file
_DIGITS = slice(8 + len(_START), 8 + len(_START) + 16)

SUMS_AT = _DIGITS.stop + len(b'","ema":"{\\"sums\\":\\"')
"""The place of the checksums of blocks in a file that was written here."""

# blocks that are read by one request, and verified while they are in the processor's cache
_PIECE = 8
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""The first bytes of pickles and of archives written by torch.save."""


@dataclass(eq=False)
class Handle:
    """A file that is opened once for all who read it at a time, in any thread."""

    lock: threading.RLock = field(default_factory=threading.RLock)
    file: OpenedFile | None = None
    users: int = 0
    keepers: int = 0  # while there are any, it stays open between its users
    # the last tensor that is stored in another order, and its bytes in row-major order
    reordered: tuple[Entry, npt.NDArray[np.uint8]] | None = None

    def close_unused(self) -> None:
        """Close the file if nobody uses or keeps it."""
        file = self.file
        if file is not None and not (self.users or self.keepers):
            self.file = None
            self.reordered = None
            file.close()


class KeptOpen:
    """Files that stay open between those who read them, while this is, as a context manager: so
    many at `most`, by default a quarter of those that the process may open.

    Attributes:
        foreign: the safetensors files of other programs whose headers were read.
    """

    def __init__(self, most: int | None = None) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = limit // 4 if most is None else most
        self._handles = list[Handle]()
        self.foreign = dict[Path, TensorFile]()

    def read_file(self, path: Path) -> TensorFile:
        """Read the header of a safetensors file, as the function `read_file` does; keep it and the
        open file if another program wrote it, for those who read it as a checkpoint."""
        with ExitStack() as stack:
            opened = stack.enter_context(OpenedFile(path))
            file = decode_file(opened)
            if file.kind is None:
                self.foreign[path] = file
                if self.take(file, opened):
                    stack.pop_all()
        return file

    def keep(self, file: TensorFile) -> None:
        """Keep a file once it is opened."""
        handle = file.handle
        if len(self._handles) < self._most:
            with handle.lock:
                handle.keepers += 1
            self._handles.append(handle)

    def take(self, file: TensorFile, opened: OpenedFile) -> bool:
        """Take what is opened for the file, and keep it; return False if there are too many."""
        if len(self._handles) >= self._most:
            return False
        file.handle.file = opened
        self.keep(file)
        return True

    def __enter__(self) -> KeptOpen:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            with handle.lock:
                handle.keepers -= 1
                handle.close_unused()


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
            try:
                if kind is None and not self.sums and file.is_changed():
                    reason = "was changed while it was being read"
                    raise FileFormatError(self.path, reason, "run again")
            finally:
                handle.close_unused()

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

    def read_spans(self, spans: Sequence[Span]) -> npt.NDArray[np.uint8]:
        """Read ranges of bytes of the file, unverified, as `OpenedFile.read_spans`."""
        with self.opened() as file:
            return file.read_spans(spans)

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
        file.fill(view, offset)

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
        require(not checksum or checksum == seal(bytearray(start)), _DAMAGED)
        require_few(start.count(b'"dtype"'))  # before all of them are parsed
        raw = parse_object(file.path, start[8:], "header")
        metadata = raw.pop("__metadata__", {})
        require(_are_strings(metadata), "__metadata__ must map names to strings")
        own = metadata.pop("ema", "")
        mark = metadata.pop("ema.checksum", "")
        require(bool(checksum) or not (mark or own.startswith('{"')), _DAMAGED)
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


def require_few(count: int) -> None:
    """Raise a ValueError if a header names too many tensors."""
    problem = f"its header names {count:,} tensors; at most {MAX_TENSORS:,} are allowed"
    require(count <= MAX_TENSORS, problem)


def _read_start(file: OpenedFile) -> bytes:
    """Read the first 8 + N bytes of a file, which precede the payload."""
    prefix = file.read_at(8, 0)
    if len(prefix) < 8:
        reason = f"truncated: {count_noun(file.size, 'byte')} cannot hold a safetensors header"
        raise FileFormatError(file.path, reason)
    length = int.from_bytes(prefix, "little")
    if length <= MAX_HEADER_BYTES and 8 + length <= file.size:
        text = file.read_at(length, 8)
        if len(text) < length:
            raise FileFormatError(file.path, SHORTER)
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
    require_few(len(raw))  # escaped keys were not counted before
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
    problem = f"{state}: has {count_noun(nbytes, 'byte')}, its header says {position:,}"
    require(position == nbytes, problem)
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
    require(is_complete, "ema: sums must have a checksum for each block of each tensor")
    of_tensors = {}
    begin = 0
    for name, length in zip(entries, lengths, strict=True):
        end = begin + length
        of_tensors[name] = sums[begin:end]
        begin = end
    return of_tensors
