"""Tiles: the ranges of large tensors, and batches of small tensors, that threads make; and how sources are read.

Tiles do not overlap. Their edges are edges of checksum blocks in every snapshot and in the output, for all dtypes;
so each byte is read once, and verified as it is read. An exception is the chunks in the parts of a snapshot, which end
anywhere: their blocks at the edges of a tile are read twice.
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
"""Largest number of small tensors in one tile, so that a tile takes milliseconds even if tensors have one element."""

PARTED_BLOCKS = 4
"""Blocks of a tile, per chunk in a row of the tensor, if chunks end within blocks, which each tile reads again."""


@dataclass(frozen=True)
class Tile:
    """A range of elements of a large tensor, or several complete small tensors, end to end.

    Attributes:
        ranges: the element ranges of the tile, in order.
        role: "average", "copy" or "variance" (an average that is kept positive); the same for all tensors.
        dtype: safetensors name of the output's dtype, the same for all tensors.
        wide: safetensors name of the sums' dtype; `dtype` for copies.
        aliases: all names of each tensor, the stored name first.
        stored_bytes: bytes to read for the tile, over all sources.
        last: whether this tile and the tiles before it complete its tensors.
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
        """The offset of each tensor, in elements of the tile, and the number of elements."""
        return [0, *accumulate(elements.end - elements.begin for elements in self.ranges)]

    @cached_property
    def names(self) -> list[str]:
        """The stored names of the tensors, in order."""
        return [elements.name for elements in self.ranges]

    def steps(self, chunk: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of chunks of at most `chunk` elements; a tile of several or no tensors is one chunk."""
        for begin in range(0, max(1, self.bounds[-1]), chunk):
            yield begin, min(begin + chunk, self.bounds[-1])


def cut_tiles(plan: Plan, chunk: int, wide_dtype: str | None) -> list[Tile]:
    """Return all tiles of a synthesis; the tiles of one tensor are consecutive.

    Arguments:
        chunk: elements in a thread's buffer, a power of two up to 2**19; tensors of at most that size are batched.
        wide_dtype: dtype of all sums; None to choose it for each tensor.
    """
    tiles: list[Tile] = []
    batches: dict[tuple[str, str, str], _Batch] = {}
    for name, tensor in plan.tensors.items():
        dtype = plan.output_dtype(name)
        exact = tensor.dtype == "F64" or name not in plan.coarse
        wide = dtype if tensor.role == "copy" else wide_dtype or ("F64" if exact else "F32")
        role = "variance" if name in plan.variances else "copy" if tensor.role == "copy" else "average"
        kind = (role, dtype, wide)
        sizes = [ITEM_BYTES[source.stored[name].dtype] for source in plan.sources]
        count, stored = math.prod(plan.newest.stored[name].shape), sum(sizes)
        if count > chunk:
            block = BLOCK_BYTES // min(ITEM_BYTES[dtype], *sizes)
            cells = max(source.cells(name) if isinstance(source, FileSource) else 0 for source in plan.sources)
            step = block * max(1, PARTED_BLOCKS * cells)
            for begin in range(0, count, step):
                end = min(begin + step, count)
                elements = (ElementRange(name, begin, end),)
                tiles.append(Tile(elements, *kind, plan.names, stored * (end - begin), end == count))
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
    """Small tensors of one role and dtype, collected for a tile."""

    ranges: list[ElementRange] = field(default_factory=list)
    elements: int = 0
    nbytes: int = 0


# --- reading -----------------------------------------------------------------------------------------


def open_tile(source: TensorReader | ReadRanges, tile: Tile) -> TileReader:
    """Return a reader of a tile of an open source."""
    if callable(source):
        return _MemoryTile(source(tile.ranges), tile)
    return _FileSlice(source, tile.ranges[0]) if len(tile.ranges) == 1 else _FileBatch(source, tile)


class Scratch:
    """A thread's buffers for stored bytes, allocated once and used for every chunk.

    For CUDA there are two: the next bytes are read into one while the other is copied to the device.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._buffers = deque(_Buffer(nbytes, pinned) for _ in range(1 + pinned))

    def next(self) -> _Buffer:
        """Return a buffer that may be overwritten, after waiting for its last copy to the device."""
        self._buffers.rotate()
        if self._buffers[0].sent is not None:
            self._buffers[0].sent.synchronize()
        return self._buffers[0]


class _Buffer:
    """A buffer of bytes with views as tensors of any dtype, and the event after which it may be overwritten."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self._bytes, self._pinned = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned), pinned
        self.view = self._bytes.numpy().data
        self.sent: Any = None
        self._typed: dict[str, torch.Tensor] = {}
        self._bounds: Sequence[int] = ()
        self._views: list[memoryview] = []

    def cut(self, bounds: Sequence[int]) -> list[memoryview]:
        """Return the bytes split at `bounds`, which mostly are the same for every source."""
        if bounds != self._bounds:
            self._bounds, self._views = bounds, [self.view[a:b] for a, b in pairwise(bounds)]
        return self._views

    def send(self, slot: torch.Tensor, dtype: str) -> None:
        """Convert the first values, read as a safetensors dtype, into `slot`, on the device of `slot`."""
        if dtype not in self._typed:
            self._typed[dtype] = self._bytes.view(torch_dtype(dtype))
        values = self._typed[dtype][: slot.numel()]
        if slot.device.type == "cpu":
            slot.copy_(values)
            return
        slot.copy_(values.to(slot.device, non_blocking=self._pinned))
        if self._pinned:
            self.sent = torch.cuda.current_stream(slot.device).record_event()


class _FileSlice:
    """A reader of a range of one tensor in a file."""

    def __init__(self, file: TensorReader, wanted: ElementRange) -> None:
        self._dtype = file.tensors[wanted.name].dtype
        self._size = ITEM_BYTES[self._dtype]
        byte_range = wanted.name, wanted.begin * self._size, wanted.end * self._size
        file.expect([byte_range])
        self._range = file.read_range(*byte_range)

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        buffer = scratch.next()
        self._range.read_into(buffer.view[: slot.numel() * self._size])
        buffer.send(slot, self._dtype)


class _FileBatch:
    """A reader of small tensors in a file: neighbours of one dtype are read together, and each tensor is verified."""

    def __init__(self, file: TensorReader, tile: Tile) -> None:
        self._file, self._tile = file, tile
        self._entries = [file.tensors[name] for name in tile.names]
        file.expect((name, 0, entry.nbytes) for name, entry in zip(tile.names, self._entries, strict=True))

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        entries, bounds = self._entries, self._tile.bounds
        changes = [index for index, (one, other) in enumerate(pairwise(entries), 1) if other.dtype != one.dtype]
        for first, end in pairwise([0, *changes, len(entries)]):
            names, dtype, buffer = self._tile.names[first:end], entries[first].dtype, scratch.next()
            edges = [ITEM_BYTES[dtype] * (bound - bounds[first]) for bound in bounds[first : end + 1]]
            self._file.read_small(names, buffer.cut(edges), buffer.view[: edges[-1]])
            buffer.send(slot[bounds[first] : bounds[end]], dtype)


class _MemoryTile:
    """A reader of a tile whose tensors are in memory."""

    def __init__(self, values: Sequence[torch.Tensor], tile: Tile) -> None:
        self._values = values
        self._bounds = tile.bounds

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        if len(self._values) == 1:
            slot.copy_(self._values[0][begin : begin + slot.numel()])
            return
        for (start, end), values in zip(pairwise(self._bounds), self._values, strict=True):
            slot[start:end].copy_(values)


TileReader = _FileSlice | _FileBatch | _MemoryTile
"""A reader of one tile of one source, in order: `read_into(slot, begin, scratch)` fills `slot` with the elements from
`begin` on, in the slot's dtype and on its device, or raises a FileFormatError that names the file and the tensor."""
