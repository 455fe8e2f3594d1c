"""Tiles: the ranges of large tensors, and batches of small ones, that threads make; and how a source's tile is read.

Tiles share nothing. Their edges are edges of checksum blocks in every snapshot and in the output, for all dtypes;
so each byte is read once, and verified in the pass that reads it. Chunks in the parts of a snapshot end anywhere: of
these the blocks at the edges of a tile are read twice.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import torch

from posthoc_cli.dtypes import ITEM_BYTES, torch_dtype
from posthoc_cli.snapshots.format import BLOCK_BYTES
from posthoc_cli.snapshots.reading import ElementRange, TensorReader
from posthoc_cli.snapshots.sources import FileSource, ReadRanges
from posthoc_cli.synthesis.plan import Plan

MAX_BATCH = 1024
"""Small tensors in one tile at most, so that a tile takes milliseconds even if tensors have one element."""

PARTED_BLOCKS = 4
"""Blocks in a tile, for each chunk in a row, where chunks end within blocks: these are read once for each tile."""


@dataclass(frozen=True)
class Tile:
    """Some elements of a large tensor, or several small tensors, end to end.

    Attributes:
        ranges: what it consists of, in order.
        role: "average", "copy" or "variance", an average that is kept positive; the same for all tensors.
        dtype: the safetensors name of the output's dtype, the same for all tensors.
        wide: that of the sums; for copies `dtype` itself.
        aliases: every name of each tensor, its own first.
        stored_bytes: bytes to read for it, over all sources.
        last: whether its tensors are complete when it and those before it are.
    """

    ranges: tuple[ElementRange, ...]
    role: str
    dtype: str
    wide: str
    aliases: Mapping[str, Sequence[str]]
    stored_bytes: int
    last: bool = True

    @cached_property
    def bounds(self) -> list[int]:
        """Where each tensor begins, in elements of the tile, and where the last one ends."""
        return [0, *accumulate(one.end - one.begin for one in self.ranges)]

    @cached_property
    def names(self) -> list[str]:
        """The tensors, in order."""
        return [one.name for one in self.ranges]

    def steps(self, chunk: int) -> Iterator[tuple[int, int]]:
        """Element ranges of at most `chunk`, in order; a tile of several tensors, or of none, is one step."""
        for begin in range(0, max(1, self.bounds[-1]), chunk):
            yield begin, min(begin + chunk, self.bounds[-1])


def cut_tiles(plan: Plan, chunk: int, wide_dtype: str | None) -> list[Tile]:
    """All tiles of a synthesis; tiles of one tensor follow each other.

    A thread has room for `chunk` elements, a power of two up to 2**19: tensors up to that size are batched. All sums
    are in `wide_dtype`, if it is not None.
    """
    tiles: list[Tile] = []
    batches: dict[tuple[str, str, str], _Batch] = {}
    for name, tensor in plan.tensors.items():
        made = plan.output_dtype(name)
        exact = tensor.dtype == "F64" or name not in plan.coarse
        wide = made if tensor.role == "copy" else wide_dtype or ("F64" if exact else "F32")
        role = "variance" if name in plan.variances else "copy" if tensor.role == "copy" else "average"
        kind = (role, made, wide)
        sizes = [ITEM_BYTES[source.stored[name].dtype] for source in plan.sources]
        count, stored = math.prod(plan.newest.stored[name].shape), sum(sizes)
        if count > chunk:
            block = BLOCK_BYTES // min(ITEM_BYTES[made], *sizes)
            cells = max(source.cells(name) if isinstance(source, FileSource) else 0 for source in plan.sources)
            step = block * max(1, PARTED_BLOCKS * cells)
            for begin in range(0, count, step):
                end = min(begin + step, count)
                own = (ElementRange(name, begin, end),)
                tiles.append(Tile(own, *kind, plan.names, stored * (end - begin), end == count))
            continue
        batch = batches.setdefault(kind, _Batch())
        if batch.elements + count > chunk or len(batch.ranges) == MAX_BATCH:
            tiles.append(Tile(tuple(batch.ranges), *kind, plan.names, batch.nbytes))
            batch = batches[kind] = _Batch()
        batch.ranges.append(ElementRange(name, 0, count))
        batch.elements += count
        batch.nbytes += stored * count
    return tiles + [Tile(tuple(batch.ranges), *kind, plan.names, batch.nbytes) for kind, batch in batches.items()]


@dataclass
class _Batch:
    """Small tensors of one kind that will be a tile."""

    ranges: list[ElementRange] = field(default_factory=list)
    elements: int = 0
    nbytes: int = 0


# --- reading -----------------------------------------------------------------------------------------


def open_tile(source: TensorReader | ReadRanges, tile: Tile) -> TileReader:
    """Start reading a tile of an open source."""
    if callable(source):
        return _MemoryTile(source(tile.ranges), tile)
    return _FileRange(source, tile.ranges[0]) if len(tile.ranges) == 1 else _FileBatch(source, tile)


class Scratch:
    """A thread's room for bytes as they are stored, made once and used for every chunk.

    With an accelerator there are two: the next bytes are read while the last ones are copied to it.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._rooms = deque(_Room(nbytes, pinned) for _ in range(1 + pinned))

    def next(self) -> _Room:
        """A room; the values sent from it before, if any, have arrived."""
        self._rooms.rotate()
        if self._rooms[0].sent is not None:
            self._rooms[0].sent.synchronize()
        return self._rooms[0]


class _Room:
    """Bytes, the same as tensors of any dtype, and the event after which they may be overwritten."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self._bytes, self._pinned = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned), pinned
        self.view = self._bytes.numpy().data
        self.sent: Any = None
        self._typed: dict[str, torch.Tensor] = {}
        self._bounds: Sequence[int] = ()
        self._views: list[memoryview] = []

    def cut(self, bounds: Sequence[int]) -> list[memoryview]:
        """The bytes cut at `bounds`, which are mostly the same for every source."""
        if bounds != self._bounds:
            self._bounds, self._views = bounds, [self.view[a:b] for a, b in pairwise(bounds)]
        return self._views

    def send(self, slot: torch.Tensor, dtype: str) -> None:
        """Convert the first values, of a safetensors dtype, into `slot`, on its device."""
        if dtype not in self._typed:
            self._typed[dtype] = self._bytes.view(torch_dtype(dtype))
        values = self._typed[dtype][: slot.numel()]
        if slot.device.type == "cpu":
            slot.copy_(values)
            return
        slot.copy_(values.to(slot.device, non_blocking=self._pinned))
        if self._pinned:
            self.sent = torch.cuda.current_stream(slot.device).record_event()


class _FileRange:
    def __init__(self, file: TensorReader, wanted: ElementRange) -> None:
        self._dtype = file.header.tensors[wanted.name].dtype
        self._size = ITEM_BYTES[self._dtype]
        place = wanted.name, wanted.begin * self._size, wanted.end * self._size
        file.expect([place])
        self._range = file.read_range(*place)

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        room = scratch.next()
        self._range.read_into(room.view[: slot.numel() * self._size])
        room.send(slot, self._dtype)


class _FileBatch:
    """Small tensors of a file: those of one dtype are read and converted together, each is verified alone."""

    def __init__(self, file: TensorReader, tile: Tile) -> None:
        self._file, self._tile = file, tile
        self._entries = [file.header.tensors[name] for name in tile.names]
        file.expect((name, 0, entry.nbytes) for name, entry in zip(tile.names, self._entries, strict=True))

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        entries, bounds = self._entries, self._tile.bounds
        apart = [index for index, (one, other) in enumerate(pairwise(entries), 1) if other.dtype != one.dtype]
        for first, end in pairwise([0, *apart, len(entries)]):
            names, dtype, room = self._tile.names[first:end], entries[first].dtype, scratch.next()
            edges = [ITEM_BYTES[dtype] * (bound - bounds[first]) for bound in bounds[first : end + 1]]
            self._file.read_small(names, room.cut(edges), room.view[: edges[-1]])
            room.send(slot[bounds[first] : bounds[end]], dtype)


class _MemoryTile:
    def __init__(self, values: Sequence[torch.Tensor], tile: Tile) -> None:
        self._values = values
        self._bounds = tile.bounds

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        if len(self._values) == 1:
            slot.copy_(self._values[0][begin : begin + slot.numel()])
            return
        for (start, end), values in zip(pairwise(self._bounds), self._values, strict=True):
            slot[start:end].copy_(values)


TileReader = _FileRange | _FileBatch | _MemoryTile
"""One tile of one source, read in order: `read_into(slot, begin, scratch)` fills `slot` with the elements of the tile
from `begin` on, in the slot's dtype and on its device; a FileFormatError names the file and the tensor."""
