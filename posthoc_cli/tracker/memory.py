"""The layout of a model's tensors in flat memory, and the tiles that work is divided into.

Tensors of one device and dtype form a bucket and lie end to end in it. A tile is a range of a bucket that stays in the
cache while a thread works on it, so that thousands of small tensors cost no more calls than a few large ones.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.snapshots.sources import ElementRange
from posthoc_cli.tracker.background import SINGLE_THREAD, ThreadPool

HOST = torch.device("cpu")

TILE, DEVICE_TILE = 2**19, 2**22
"""Elements of a tile on the CPU, where one thread works on it, and on an accelerator, where starting a kernel costs
more than leaving the cache."""

SLAB = 2**26
"""Elements of the largest slabs of memory on the host."""

_LIKE_FLOAT32 = (torch.float32, torch.float64, torch.bfloat16)  # norms of ordinary values are finite in these dtypes

Values = npt.NDArray[Any]


class BucketTile(NamedTuple):
    """A range of elements of the bucket of index `bucket`; `number` is the tile's index in the layout."""

    number: int
    bucket: int
    begin: int
    end: int

    @property
    def where(self) -> slice:
        """The range as a slice of the bucket's flat tensor."""
        return slice(self.begin, self.end)


@dataclass(frozen=True)
class Bucket:
    """Tensors of one device and dtype, end to end; `bounds` are 0 and the end of each tensor, in elements."""

    device: torch.device
    dtype: torch.dtype
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of averages: in half precision, an average with a decay of 0.9999 would never move."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tile(self) -> int:
        """The number of elements of a tile."""
        return TILE if self.device.type == "cpu" else DEVICE_TILE

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """The begin and the end of each tensor, in elements, by name."""
        return dict(zip(self.names, pairwise(self.bounds), strict=True))

    def edges(self) -> list[int]:
        """Return 0 and the end of each tile, in elements."""
        return _edges(self.bounds[-1], self.tile)

    def cut(self) -> list[list[ElementRange]]:
        """Return the ranges of tensors in each tile."""
        edges = self.edges()
        ranges: list[list[ElementRange]] = [[] for _ in edges[1:]]
        for name, (begin, end) in self.places.items():
            first = begin
            while first < end:
                tile = bisect_right(edges, first) - 1
                last = min(end, edges[tile + 1])
                ranges[tile].append(ElementRange(name, first - begin, last - begin))
                first = last
        return ranges


Layout = tuple[Bucket, ...]


def lay_out(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Return the buckets of tensors."""
    return buckets_of({name: (tensor.device, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})


def buckets_of(tensors: Mapping[str, tuple[torch.device, torch.dtype, tuple[int, ...]]]) -> Layout:
    """Return the buckets of tensors of these devices, dtypes and shapes."""
    shapes: dict[tuple[torch.device, torch.dtype], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, (device, dtype, shape) in tensors.items():
        shapes[device, dtype][name] = shape
    return tuple(
        Bucket(*key, tuple(named), tuple(named.values()), (0, *accumulate(map(math.prod, named.values()))))
        for key, named in shapes.items()
    )


def on_host(layout: Layout) -> Layout:
    """Return the same buckets in the host's memory; buckets of several devices stay separate."""
    return tuple(replace(bucket, device=HOST) for bucket in layout)


def tiles_of(layout: Layout) -> list[BucketTile]:
    """Return the tiles of all buckets of a layout."""
    spans = [(index, *ends) for index, bucket in enumerate(layout) for ends in pairwise(bucket.edges())]
    return [BucketTile(number, *span) for number, span in enumerate(spans)]


def ranges_of(layout: Layout) -> list[list[ElementRange]]:
    """Return the ranges of tensors in each tile of a layout."""
    return [ranges for bucket in layout for ranges in bucket.cut()]


# --- memory


class FlatTensors:
    """Zeros in the averages' dtypes: one flat tensor a bucket, and views of the tensors in it by name."""

    def __init__(self, layout: Layout) -> None:
        # `zero_` makes the system allocate the memory now, not at the first write.
        self.flats = [torch.empty(b.bounds[-1], dtype=b.wide, device=b.device).zero_() for b in layout]
        self.views: dict[str, torch.Tensor] = {}
        for bucket, flat in zip(layout, self.flats, strict=True):
            shapes = zip(bucket.places.items(), bucket.shapes, strict=True)
            self.views.update((name, flat[begin:end].view(shape)) for (name, (begin, end)), shape in shapes)


class HostTensors:
    """Uninitialized tensors of a layout on the host, end to end in slabs; each tile lies in one slab.

    torch rounds pinned memory up to powers of two. Slabs have such sizes, except the last one of each bucket: it is
    the last CPU tile, which rounding extends by less than half of `TILE` elements.
    """

    def __init__(self, layout: Layout, pinned: bool = False) -> None:
        self.layout = layout
        self.edges = [_edges(bucket.bounds[-1], SLAB) for bucket in layout]
        self.slabs = [
            [torch.empty(end - begin, dtype=bucket.dtype, pin_memory=pinned) for begin, end in pairwise(edges)]
            for bucket, edges in zip(layout, self.edges, strict=True)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(slab.nbytes for slabs in self.slabs for slab in slabs)

    def flat(self, bucket: int, begin: int, end: int) -> list[torch.Tensor]:
        """Return views of a bucket's elements from `begin` to `end`, one for each slab that holds some of them."""
        edges, slabs = self.edges[bucket], self.slabs[bucket]
        numbers = range(bisect_right(edges, begin) - 1, bisect_left(edges, end))
        return [slabs[number][max(begin - edges[number], 0) : end - edges[number]] for number in numbers]


def _edges(count: int, most: int) -> list[int]:
    """Cut elements into powers of two of at most `most`, largest first; the last piece is at most a CPU tile."""
    edges = [0]
    while left := count - edges[-1]:
        edges.append(edges[-1] + (left if left <= TILE else min(most, 2 ** (left.bit_length() - 1))))
    return edges


# --- reading


TilePart = torch.Tensor | tuple[torch.Tensor, int, int]
"""A flat tensor, or a tensor that is not contiguous with a range of its elements in row-major order."""


def _current(part: TilePart) -> torch.Tensor:
    """Return the values of a part as they are now, flat; values that are not contiguous are copied."""
    if isinstance(part, torch.Tensor):
        return part
    tensor, begin, end = part
    row = tensor[0].numel()
    first = begin // row
    return tensor[first : -(-end // row)].reshape(-1)[begin - first * row : end - first * row]


class LayoutReader:
    """A reader of a layout's tensors, tile by tile, in up to `threads` threads. It holds views of the tensors, no copy.

    `parts` are those of each tile, in order, on the bucket's device.
    """

    def __init__(self, layout: Layout, parts: Sequence[Sequence[TilePart]], threads: int = 1) -> None:
        self.layout, self.tiles, self._parts = layout, tiles_of(layout), parts
        sizes = [min(bucket.bounds[-1], bucket.tile) for bucket in layout]
        self._scratch = [
            [torch.empty(size, dtype=b.wide, device=b.device) for b, size in zip(layout, sizes, strict=True)]
            for _ in range(threads)
        ]

    @classmethod
    def of_tensors(cls, layout: Layout, tensors: Mapping[str, torch.Tensor], threads: int = 1) -> LayoutReader:
        """Return a reader of tensors by name."""
        detached = {name: tensor.detach() for name, tensor in tensors.items()}

        def part(name: str, begin: int, end: int) -> TilePart:
            tensor = detached[name]
            return tensor.view(-1)[begin:end] if tensor.is_contiguous() else (tensor, begin, end)

        return cls(layout, [[part(*piece) for piece in ranges] for ranges in ranges_of(layout)], threads)

    @classmethod
    def of_host(cls, host: HostTensors, threads: int = 1) -> LayoutReader:
        """Return a reader of tensors on the host."""
        return cls(host.layout, [host.flat(*tile[1:]) for tile in tiles_of(host.layout)], threads)

    @property
    def nbytes(self) -> int:
        """Bytes of scratch memory."""
        return sum(buffer.nbytes for buffers in self._scratch for buffer in buffers)

    def current(self, tile: BucketTile) -> list[torch.Tensor]:
        """Return a tile's values as they are now, in flat tensors that follow each other."""
        return [*map(_current, self._parts[tile.number])]

    def flat(self, tile: BucketTile, thread: int = 0) -> torch.Tensor:
        """Return a tile's values, flat, in a dtype with float32's range; valid until the same thread's next call."""
        first, *others = parts = self.current(tile)
        if not others and first.dtype in _LIKE_FLOAT32:
            return first
        scratch = self._scratch_of(tile, thread)
        return torch.cat(parts, out=scratch) if others else scratch.copy_(first)

    def values(self, tile: BucketTile, thread: int = 0) -> torch.Tensor:
        """Return a tile's values, flat, in the averages' dtype; valid until the same thread's next call."""
        flat, scratch = self.flat(tile, thread), self._scratch_of(tile, thread)
        return flat if flat.dtype == scratch.dtype else scratch.copy_(flat)

    def norms(self, pool: ThreadPool = SINGLE_THREAD) -> list[float]:
        """Return the norm of each tile's values: not finite if a value is not, or if squares overflow.

        Waits for an accelerator once a bucket.
        """
        norms = [torch.empty(0)] * len(self.tiles)

        def measure(tile: BucketTile, thread: int) -> None:
            norms[tile.number] = torch.linalg.vector_norm(self.flat(tile, thread))

        pool.each(measure, self.tiles)
        buckets = groupby(self.tiles, attrgetter("bucket"))
        stacked = (torch.stack([norms[tile.number] for tile in tiles]) for _, tiles in buckets)
        return [norm for bucket in stacked for norm in bucket.tolist()]

    def nonfinite_name(self, norms: Sequence[float]) -> str | None:
        """Return the first tensor with a nan or an infinity in the tiles whose norms are not finite, or None."""
        bad = [tile for tile, norm in zip(self.tiles, norms, strict=True) if not math.isfinite(norm)]
        ranges = ranges_of(self.layout) if bad else []
        for tile in bad:
            pieces = ranges[tile.number]
            parts = torch.split(self.values(tile), [piece.end - piece.begin for piece in pieces])
            for piece, values in zip(pieces, parts, strict=True):
                if not bool(values.isfinite().all()):
                    return piece.name
        return None

    def _scratch_of(self, tile: BucketTile, thread: int) -> torch.Tensor:
        return self._scratch[thread][tile.bucket][: tile.end - tile.begin]


# --- some of the elements


class Elements:
    """A selection of a layout's elements, given by sorted indices into each bucket.

    Attributes:
        counts: the number of selected elements of each bucket.
        of_tiles: the range of selected elements in each tile, numbered in the bucket, and their indices in the tile.
    """

    def __init__(self, layout: Layout, indices: Sequence[npt.NDArray[np.int64]]) -> None:
        self.layout, self.counts = layout, [len(selected) for selected in indices]
        self.of_tiles: list[tuple[int, int, torch.Tensor]] = []
        for tile in tiles_of(layout):
            selected = indices[tile.bucket]
            first, last = np.searchsorted(selected, (tile.begin, tile.end)).tolist()
            index = torch.from_numpy((selected[first:last] - tile.begin).astype(np.int32))
            self.of_tiles.append((first, last, index.to(layout[tile.bucket].device)))

    def buffers(self) -> list[torch.Tensor]:
        """Return zeros for the values of the selected elements, one tensor a bucket."""
        pairs = zip(self.counts, self.layout, strict=True)
        return [torch.zeros(count, dtype=bucket.wide, device=bucket.device) for count, bucket in pairs]

    def take(self, tile: BucketTile, values: torch.Tensor, buffers: Sequence[torch.Tensor]) -> None:
        """Copy the selected elements of a tile, which has these values, to the buffers."""
        first, last, index = self.of_tiles[tile.number]
        if first < last:
            torch.index_select(values, 0, index, out=buffers[tile.bucket][first:last])


def joined(buffers: Sequence[torch.Tensor]) -> Values:
    """Return the values of all buckets, on the host: shape [elements]."""
    parts = [buffer.cpu().numpy() for buffer in buffers]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
