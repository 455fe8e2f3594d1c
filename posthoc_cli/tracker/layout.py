"""Where the elements of a model's tensors lie in flat memory, and the tiles of it that are worked on at a time.

Tensors of one device and dtype form a bucket and lie end to end in it. A tile is a range of a bucket that stays in the
cache while it is worked on: thousands of small tensors cost no more calls than a few large ones.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.snapshots.reading import ElementRange
from posthoc_cli.tracker.worker import ALONE, Crew

HOST = torch.device("cpu")

TILE, DEVICE_TILE = 2**19, 2**22
"""Elements of a tile on the CPU, which one thread works on, and on an accelerator, where starting a kernel costs more
than leaving the cache."""

SLAB = 2**26
"""Elements of the largest slabs of memory on the host."""

_LIKE_FLOAT32 = (torch.float32, torch.float64, torch.bfloat16)  # whose norms of ordinary values stay finite

Values = npt.NDArray[Any]


class Tile(NamedTuple):
    """A range of elements of a bucket; `number` is its place among all tiles of a layout."""

    number: int
    bucket: int
    begin: int
    end: int

    @property
    def where(self) -> slice:
        """The same as an index."""
        return slice(self.begin, self.end)


@dataclass(frozen=True)
class Bucket:
    """Tensors of one device and dtype, end to end; `bounds` are their ends in elements, beginning with 0."""

    device: torch.device
    dtype: torch.dtype
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of averages: at a decay of 0.9999 one in half precision never moves."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def tile(self) -> int:
        """Elements of a tile."""
        return TILE if self.device.type == "cpu" else DEVICE_TILE

    @cached_property
    def places(self) -> dict[str, tuple[int, int]]:
        """Where each tensor begins and ends."""
        return dict(zip(self.names, pairwise(self.bounds), strict=True))

    def edges(self) -> list[int]:
        """Where its tiles end, beginning with 0."""
        return _edges(self.bounds[-1], self.tile)

    def cut(self) -> list[list[ElementRange]]:
        """The ranges of tensors in each of its tiles."""
        edges = self.edges()
        found: list[list[ElementRange]] = [[] for _ in edges[1:]]
        for name, (begin, end) in self.places.items():
            first = begin
            while first < end:
                at = bisect_right(edges, first) - 1
                last = min(end, edges[at + 1])
                found[at].append(ElementRange(name, first - begin, last - begin))
                first = last
        return found


Layout = tuple[Bucket, ...]


def lay_out(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """The buckets of tensors."""
    return buckets_of({name: (tensor.device, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})


def buckets_of(tensors: Mapping[str, tuple[torch.device, torch.dtype, tuple[int, ...]]]) -> Layout:
    """The same for tensors that are known by device, dtype and shape."""
    buckets: dict[tuple[torch.device, torch.dtype], dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name, (device, dtype, shape) in tensors.items():
        buckets[device, dtype][name] = shape
    return tuple(
        Bucket(*key, tuple(own), tuple(own.values()), (0, *accumulate(math.prod(shape) for shape in own.values())))
        for key, own in buckets.items()
    )


def on_host(layout: Layout) -> Layout:
    """The same buckets in the host's memory; those of several devices stay apart."""
    return tuple(replace(bucket, device=HOST) for bucket in layout)


def tiles_of(layout: Layout) -> list[Tile]:
    """All of a layout's buckets, in tiles."""
    found = [(at, *ends) for at, bucket in enumerate(layout) for ends in pairwise(bucket.edges())]
    return [Tile(number, *one) for number, one in enumerate(found)]


def ranges_of(layout: Layout) -> list[list[ElementRange]]:
    """The ranges of tensors in each of a layout's tiles."""
    return [own for bucket in layout for own in bucket.cut()]


# --- memory


class FlatTensors:
    """One flat tensor a bucket, and the tensors in it by name; a bucket with None has no elements and no views."""

    def __init__(self, layout: Layout, flats: Iterable[torch.Tensor | None]) -> None:
        self.flats: list[torch.Tensor] = []
        self.views: dict[str, torch.Tensor] = {}
        for bucket, flat in zip(layout, flats, strict=True):
            self.flats.append(torch.empty(0, device=bucket.device) if flat is None else flat)
            if flat is not None:
                shapes = zip(bucket.places.items(), bucket.shapes, strict=True)
                self.views.update((name, flat[begin:end].view(shape)) for (name, (begin, end)), shape in shapes)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros, for which the system allocates memory now, and not at the first write."""
    return torch.empty(shape, dtype=dtype, device=device).zero_()


class HostTensors:
    """Tensors of a layout on the host, without values, end to end in slabs. Each tile is in one of them.

    torch rounds pinned memory up to powers of two, which all slabs have but the last, of at most a tile on the CPU.
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
        """Elements of a bucket, of each slab that holds some."""
        edges, slabs = self.edges[bucket], self.slabs[bucket]
        held = range(bisect_right(edges, begin) - 1, bisect_left(edges, end))
        return [slabs[at][max(begin - edges[at], 0) : end - edges[at]] for at in held]


def _edges(count: int, most: int) -> list[int]:
    """Cut elements into powers of two, the largest first, down to a last piece of at most a tile on the CPU."""
    edges = [0]
    while left := count - edges[-1]:
        edges.append(edges[-1] + (left if left <= TILE else min(most, 2 ** (left.bit_length() - 1))))
    return edges


# --- reading


Source = torch.Tensor | tuple[torch.Tensor, int, int]
"""A flat tensor, or elements of one that is not contiguous."""


def _source(tensor: torch.Tensor, begin: int, end: int) -> Source:
    return tensor.view(-1)[begin:end] if tensor.is_contiguous() else (tensor, begin, end)


def _current(source: Source) -> torch.Tensor:
    if isinstance(source, torch.Tensor):
        return source
    tensor, begin, end = source
    row = tensor[0].numel()  # a copy of the rows that hold them
    first = begin // row
    return tensor[first : -(-end // row)].reshape(-1)[begin - first * row : end - first * row]


class TileReader:
    """Tensors of a layout, tile by tile, for so many threads at a time. Holds views of the tensors, and no copy.

    `sources` are those of each tile, in order, on the bucket's device.
    """

    def __init__(self, layout: Layout, sources: Sequence[Sequence[Source]], threads: int = 1) -> None:
        self.layout, self.tiles, self._sources = layout, tiles_of(layout), sources
        sizes = [min(bucket.bounds[-1], bucket.tile) for bucket in layout]
        self._scratch = [
            [torch.empty(size, dtype=b.wide, device=b.device) for b, size in zip(layout, sizes, strict=True)]
            for _ in range(threads)
        ]

    @classmethod
    def of_tensors(cls, layout: Layout, tensors: Mapping[str, torch.Tensor], threads: int = 1) -> TileReader:
        """A reader of tensors by name."""
        held = {name: tensor.detach() for name, tensor in tensors.items()}
        return cls(layout, [[_source(held[name], *ends) for name, *ends in own] for own in ranges_of(layout)], threads)

    @classmethod
    def of_host(cls, host: HostTensors, threads: int = 1) -> TileReader:
        """A reader of tensors on the host."""
        return cls(host.layout, [host.flat(*tile[1:]) for tile in tiles_of(host.layout)], threads)

    @property
    def nbytes(self) -> int:
        """Bytes of memory for values on their way."""
        return sum(room.nbytes for own in self._scratch for room in own)

    def current(self, tile: Tile) -> list[torch.Tensor]:
        """A tile's values as they are now, in flat tensors, one after the other."""
        return [*map(_current, self._sources[tile.number])]

    def flat(self, tile: Tile, thread: int = 0) -> torch.Tensor:
        """A tile's values, flat, in a dtype with the range of float32; valid until the same thread's next call."""
        first, *others = found = self.current(tile)
        if not others and first.dtype in _LIKE_FLOAT32:
            return first
        room = self._room(tile, thread)
        return torch.cat(found, out=room) if others else room.copy_(first)

    def wide(self, flat: torch.Tensor, tile: Tile, thread: int = 0) -> torch.Tensor:
        """A tile's `flat` values in the averages' dtype; valid until the same thread's next call."""
        room = self._room(tile, thread)
        return flat if flat.dtype == room.dtype else room.copy_(flat)

    def values(self, tile: Tile, thread: int = 0) -> torch.Tensor:
        """A tile's values, flat, in the averages' dtype; valid until the same thread's next call."""
        return self.wide(self.flat(tile, thread), tile, thread)

    def norms(self, crew: Crew = ALONE) -> list[float]:
        """The norm of each tile's values: not finite where one is not, or where they are too large to be squared.

        Waits for an accelerator once a bucket.
        """
        found = [torch.empty(0)] * len(self.tiles)

        def measure(tile: Tile, thread: int) -> None:
            found[tile.number] = torch.linalg.vector_norm(self.flat(tile, thread))

        crew.each(measure, self.tiles)
        buckets = groupby(self.tiles, attrgetter("bucket"))
        return [norm for _, own in buckets for norm in torch.stack([found[tile.number] for tile in own]).tolist()]

    def nonfinite_name(self, tiles: Iterable[Tile]) -> str | None:
        """The first tensor that holds a nan or an infinity in these tiles."""
        ordered = sorted(tiles)
        ranges = ranges_of(self.layout) if ordered else []
        for tile in ordered:
            own = ranges[tile.number]
            parts = torch.split(self.values(tile), [one.end - one.begin for one in own])
            for one, values in zip(own, parts, strict=True):
                if not bool(values.isfinite().all()):
                    return one.name
        return None

    def _room(self, tile: Tile, thread: int) -> torch.Tensor:
        return self._scratch[thread][tile.bucket][: tile.end - tile.begin]


# --- some of the elements


class Elements:
    """Some elements of a layout's tensors, given by their places in each bucket, in order.

    Attributes:
        counts: how many there are of each bucket.
        of_tiles: of each tile the numbers, from and to, that they have in their bucket, and their places in the tile.
    """

    def __init__(self, layout: Layout, places: Sequence[npt.NDArray[np.int64]]) -> None:
        self.layout, self.counts = layout, [len(own) for own in places]
        self.of_tiles: list[tuple[int, int, torch.Tensor]] = []
        for tile in tiles_of(layout):
            own = places[tile.bucket]
            first, last = np.searchsorted(own, (tile.begin, tile.end)).tolist()
            index = torch.from_numpy((own[first:last] - tile.begin).astype(np.int32))
            self.of_tiles.append((first, last, index.to(layout[tile.bucket].device)))

    def room(self) -> list[torch.Tensor]:
        """Memory for their values, one a bucket."""
        pairs = zip(self.counts, self.layout, strict=True)
        return [torch.zeros(count, dtype=bucket.wide, device=bucket.device) for count, bucket in pairs]

    def take(self, tile: Tile, values: torch.Tensor, room: Sequence[torch.Tensor]) -> None:
        """Put those of a tile, which has these values, in their room."""
        first, last, index = self.of_tiles[tile.number]
        if first < last:
            torch.index_select(values, 0, index, out=room[tile.bucket][first:last])


def joined(room: Sequence[torch.Tensor]) -> Values:
    """Values of all buckets, on the host: shape [elements]."""
    parts = [own.cpu().numpy() for own in room]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])
