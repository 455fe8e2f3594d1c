"""Tiles: the ranges of large tensors, and batches of small ones, that threads make; and how a source's tile is read.

Tiles share nothing. Their edges are edges of checksum blocks in every snapshot and in the output, for all dtypes;
so each byte is read once, and verified in the pass that reads it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch

from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.snapshots.format import BLOCK_BYTES
from posthoc_cli.snapshots.reader import TensorFile
from posthoc_cli.snapshots.tensors import torch_dtype
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.synthesis.sources import distinct_dtypes

MAX_BATCH = 1024
"""Small tensors in one tile at most, so that a tile takes milliseconds even if tensors have one element."""


@dataclass(frozen=True)
class Piece:
    """The elements `begin` to `end` of a tensor, row-major."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Tile:
    """One piece of a large tensor, or several small tensors, end to end.

    Attributes:
        pieces: what it consists of, in order.
        role: "average" or "copy", the same for all pieces.
        dtype: the safetensors name of the output's dtype, the same for all pieces.
        wide: that of the sums; for copies `dtype` itself.
        stored_bytes: bytes to read for it, over all sources.
        last: whether its tensors are complete when it and those before it are.
    """

    pieces: tuple[Piece, ...]
    role: str
    dtype: str
    wide: str
    stored_bytes: int
    last: bool = True

    @cached_property
    def bounds(self) -> list[int]:
        """Where each piece begins, in elements of the tile, and where the last one ends."""
        return [0, *accumulate(piece.end - piece.begin for piece in self.pieces)]

    @cached_property
    def names(self) -> list[str]:
        """The tensor of each piece."""
        return [piece.name for piece in self.pieces]

    def steps(self, chunk: int) -> Iterator[tuple[int, int]]:
        """Element ranges of at most `chunk`, in order; a tile of several tensors, or of none, is one step."""
        elements = self.bounds[-1]
        if len(self.pieces) > 1 or not elements:
            yield 0, elements
            return
        for begin in range(0, elements, chunk):
            yield begin, min(begin + chunk, elements)


def cut_tiles(plan: Plan, chunk: int, tile_elements: int | None = None, wide_dtype: str | None = None) -> list[Tile]:
    """All tiles of a synthesis; tiles of one tensor follow each other.

    Arguments:
        plan: what will be made.
        chunk: elements that a thread has room for, a power of two up to 2**19; tensors up to that size are batched.
        tile_elements: wanted elements a tile, rounded to a number of blocks; one block for None.
        wide_dtype: dtype of all sums in place of the plan's.
    """
    tiles: list[Tile] = []
    batches: dict[tuple[str, str, str], _Batch] = {}
    wide_dtype = plan.accumulate or wide_dtype
    dtypes = distinct_dtypes(plan.sources)
    for name, tensor in plan.tensors.items():
        made = plan.output_dtype(name)
        exact = tensor.dtype == "F64" or name not in plan.coarse
        wide = made if tensor.role == "copy" else wide_dtype or ("F64" if exact else "F32")
        sizes = [(ITEM_BYTES[types[name]], sources) for types, sources in dtypes]
        count, stored = math.prod(plan.newest.stored[name].shape), sum(size * sources for size, sources in sizes)
        if count > chunk:
            block = BLOCK_BYTES // min(ITEM_BYTES[made], *(size for size, _ in sizes))
            step = block * max(1, round((tile_elements or block) / block))
            for begin in range(0, count, step):
                end = min(begin + step, count)
                piece = Piece(name, begin, end)
                tiles.append(Tile((piece,), tensor.role, made, wide, stored * (end - begin), end == count))
            continue
        kind = (tensor.role, made, wide)
        batch = batches.setdefault(kind, _Batch([]))
        if batch.elements + count > chunk or len(batch.pieces) == MAX_BATCH:
            tiles.append(batch.tile(kind))
            batch = batches[kind] = _Batch([])
        batch.pieces.append(Piece(name, 0, count))
        batch.elements += count
        batch.nbytes += stored * count
    return tiles + [batch.tile(kind) for kind, batch in batches.items()]


@dataclass
class _Batch:
    """Small tensors of one kind that will be a tile."""

    pieces: list[Piece]
    elements: int = 0
    nbytes: int = 0

    def tile(self, kind: tuple[str, str, str]) -> Tile:
        return Tile(tuple(self.pieces), *kind, self.nbytes)


# --- reading -----------------------------------------------------------------------------------------


class TileReader(Protocol):
    """One tile of one source, read in order."""

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:
        """Fill `slot` with the elements of the tile from `begin` on, in the slot's dtype and on its device.

        Raises:
            FileFormatError: naming the file and the tensor.
        """
        ...


def open_tile(source: TensorFile | Mapping[str, torch.Tensor], tile: Tile) -> TileReader:
    """Start reading a tile of an open source."""
    if isinstance(source, Mapping):
        return _MemoryTile(source, tile)
    return _FileRange(source, tile.pieces[0]) if len(tile.pieces) == 1 else _FileBatch(source, tile)


class Scratch:
    """A thread's room for bytes as they are stored, made once and used for every chunk."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        # With an accelerator the next bytes are read while the last ones are copied to it.
        self._rooms = [_Room(nbytes, self._pinned) for _ in range(1 + self._pinned)]
        self._turn = 0

    def next(self, nbytes: int) -> memoryview:
        """Room for that many bytes; what `next` gave before the last time is overwritten."""
        self._turn = (self._turn + 1) % len(self._rooms)
        room = self._rooms[self._turn]
        if room.sent is not None:
            room.sent.synchronize()
        return room.view[:nbytes]

    def parts(self, bounds: Sequence[int]) -> list[memoryview]:
        """The bytes that `next` gave, cut at `bounds`."""
        return self._rooms[self._turn].parts(bounds)

    def send(self, slot: torch.Tensor, dtype: str) -> None:
        """Convert the first values in the room, of a safetensors dtype, into `slot`, on its device."""
        room = self._rooms[self._turn]
        values = room.typed(dtype)[: slot.numel()]
        if slot.device.type == "cpu":
            slot.copy_(values)
            return
        slot.copy_(values.to(slot.device, non_blocking=self._pinned))
        if self._pinned:
            room.sent = torch.cuda.current_stream(slot.device).record_event()


class _Room:
    """Bytes, the same as tensors of any dtype, and the event after which they may be overwritten."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self._bytes = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.view = self._bytes.numpy().data
        self.sent: Any = None
        self._typed: dict[str, torch.Tensor] = {}
        self._bounds: Sequence[int] = ()
        self._parts: list[memoryview] = []

    def typed(self, dtype: str) -> torch.Tensor:
        if dtype not in self._typed:
            self._typed[dtype] = self._bytes.view(torch_dtype(dtype))
        return self._typed[dtype]

    def parts(self, bounds: Sequence[int]) -> list[memoryview]:
        # Mostly the same bounds for every source.
        if bounds != self._bounds:
            self._bounds, self._parts = bounds, [self.view[a:b] for a, b in pairwise(bounds)]
        return self._parts


class _FileRange:
    """A range of one tensor in a file, chunk by chunk."""

    def __init__(self, file: TensorFile, piece: Piece) -> None:
        self._dtype = file.header.tensors[piece.name].dtype
        self._size = ITEM_BYTES[self._dtype]
        self._range = file.read_range(piece.name, piece.begin * self._size, piece.end * self._size)

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        self._range.read_into(scratch.next(slot.numel() * self._size))
        scratch.send(slot, self._dtype)


class _FileBatch:
    """Small tensors of a file: neighbours are read and converted together, each is verified alone."""

    def __init__(self, file: TensorFile, tile: Tile) -> None:
        self._file = file
        self._bounds = tile.bounds
        self._names = tile.names
        self._entries = [file.header.tensors[name] for name in tile.names]

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        first = 0
        for end in self._run_ends():
            self._read_run(slot, first, end, scratch)
            first = end

    def _run_ends(self) -> list[int]:
        """Where runs of neighbours of one dtype end."""
        start, dtype = self._entries[0].begin, self._entries[0].dtype
        begins, dtypes = [entry.begin for entry in self._entries], {entry.dtype for entry in self._entries}
        if dtypes == {dtype} and begins == [start + ITEM_BYTES[dtype] * bound for bound in self._bounds[:-1]]:
            return [len(self._entries)]  # mostly all of them
        cuts = [
            index
            for index, (one, other) in enumerate(pairwise(self._entries), 1)
            if other.begin != one.begin + one.nbytes or other.dtype != one.dtype
        ]
        return [*cuts, len(self._entries)]

    def _read_run(self, slot: torch.Tensor, first: int, end: int, scratch: Scratch) -> None:
        names, dtype = self._names[first:end], self._entries[first].dtype
        size, start = ITEM_BYTES[dtype], self._bounds[first]
        bounds = [size * (bound - start) for bound in self._bounds[first : end + 1]]
        self._file.fill(names[0], scratch.next(bounds[-1]), 0)
        self._file.verify(names, scratch.parts(bounds))
        scratch.send(slot[start : self._bounds[end]], dtype)


class _MemoryTile:
    """A tile of tensors in memory."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], tile: Tile) -> None:
        self._pieces = [tensors[piece.name].detach().reshape(-1)[piece.begin : piece.end] for piece in tile.pieces]
        self._bounds = tile.bounds

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        if len(self._pieces) == 1:
            slot.copy_(self._pieces[0][begin : begin + slot.numel()])
            return
        for (start, end), piece in zip(pairwise(self._bounds), self._pieces, strict=True):
            slot[start:end].copy_(piece)
