"""The layout of a model's tensors in flat memory, and the tiles that work is divided into.

Tensors of one device and dtype form a bucket and lie end to end in it, each with its elements in
the order of its own memory: reading weights in `channels_last` does not transpose them. A tile is a
range of a bucket that stays in the cache while a thread works on it, so that thousands of small
tensors cost no more calls than a few large ones.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from posthoc_cli.devices import HOST, copy_to_host, record_end, streams_of
from posthoc_cli.snapshots.source import ElementRange
from posthoc_cli.tracker.background import SINGLE_THREAD, ThreadPool

Positions = npt.NDArray[np.int64]

# Most elements of a tile; on an accelerator starting a kernel costs more than leaving the cache.
TILE = 2**19
DEVICE_TILE = 2**22

# norms of ordinary values are finite in these dtypes
_LIKE_FLOAT32 = (torch.float32, torch.float64, torch.bfloat16)


class Slot(NamedTuple):
    """Where a tensor begins in its bucket. `order` lists its dimensions, from the outermost in
    memory."""

    begin: int
    end: int
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def is_row_major(self) -> bool:
        return [*self.order] == sorted(self.order)

    @property
    def _sizes(self) -> list[int]:
        return [self.shape[axis] for axis in self.order]

    @property
    def _axes(self) -> list[int]:
        """The place in `order` of each dimension."""
        return [self.order.index(axis) for axis in range(len(self.order))]

    def positions(self, indices: Positions) -> Positions:
        """Find the positions in the bucket of elements with these row-major indices."""
        if self.is_row_major:
            return self.begin + indices
        by_axis = np.unravel_index(indices, self.shape)
        in_order = [by_axis[axis] for axis in self.order]
        return self.begin + np.ravel_multi_index(in_order, self._sizes)

    def view(self, flat: Tensor) -> Tensor:
        """View `flat` memory as the tensor."""
        return flat.view(self._sizes).permute(self._axes)


@dataclass(frozen=True)
class Bucket:
    """Tensors of one device and dtype, end to end."""

    device: torch.device
    dtype: torch.dtype
    places: Mapping[str, Slot]
    size: int

    @property
    def wide(self) -> torch.dtype:
        """The dtype of averages: in half precision, an average with a decay of 0.9999 would never
        move."""
        if self.dtype == torch.float64:
            return torch.float64
        return torch.float32

    @property
    def tile(self) -> int:
        """The most elements of a tile."""
        if self.device.type == "cpu":
            return TILE
        return DEVICE_TILE

    @property
    def tile_edges(self) -> list[int]:
        """The ends of all tiles, and 0."""
        return self._host_edges if self.device.type == "cpu" else self._device_edges

    @cached_property
    def _device_edges(self) -> list[int]:
        """The ends of an accelerator's tiles, and 0. Each tile consists of tiles of the host."""
        edges = [0]
        for edge, next_edge in pairwise(self._host_edges):
            if next_edge - edges[-1] > DEVICE_TILE:
                edges.append(edge)
        if self.size:
            edges.append(self.size)
        return edges

    @cached_property
    def _host_edges(self) -> list[int]:
        """The ends of tiles on the host, and 0.

        A tensor larger than a tile shares none with others, so that it is read in place; smaller
        ones share a tile, into which they are copied.
        """
        edges = [0]
        for place in self.places.values():
            end = place.end
            if end - edges[-1] > TILE and place.begin > edges[-1]:
                edges.append(place.begin)
            if end - edges[-1] > TILE:
                edges += range(edges[-1] + TILE, end, TILE)
                edges.append(end)
        if edges[-1] < self.size:
            edges.append(self.size)
        return edges


Layout = tuple[Bucket, ...]
BucketKind = tuple[torch.device, torch.dtype]


class BucketTile(NamedTuple):
    """A range of elements of the bucket of index `bucket`; `number` is the tile's index in the
    layout."""

    number: int
    bucket: int
    begin: int
    end: int


def find_layout(tensors: Mapping[str, Tensor]) -> Layout:
    """Arrange tensors with these devices, dtypes, shapes and strides in buckets."""
    places: dict[BucketKind, dict[str, Slot]] = defaultdict(dict)
    sizes: dict[BucketKind, int] = defaultdict(int)
    for name, tensor in tensors.items():
        kind = tensor.device, tensor.dtype
        begin = sizes[kind]
        end = begin + tensor.numel()
        shape = tuple(tensor.shape)
        places[kind][name] = Slot(begin, end, shape, _order(tensor))
        sizes[kind] = end
    buckets = []
    for kind, of_bucket in places.items():
        buckets.append(Bucket(*kind, of_bucket, sizes[kind]))
    return tuple(buckets)


def find_places(layout: Layout) -> dict[str, tuple[int, Slot]]:
    """Find the bucket's index and the place of each tensor."""
    places = {}
    for number, bucket in enumerate(layout):
        for name, place in bucket.places.items():
            places[name] = number, place
    return places


def _order(tensor: Tensor) -> tuple[int, ...]:
    """Sort the dimensions from the outermost in memory; leave them in order if the elements do not
    lie end to end."""
    order = tuple(range(tensor.ndim))
    if not tensor.is_contiguous():
        by_stride = sorted(order, key=tensor.stride, reverse=True)
        if tensor.permute(by_stride).is_contiguous():
            return tuple(by_stride)
    return order


def on_host(layout: Layout) -> Layout:
    """Move a layout to the host's memory; buckets of several devices stay separate."""
    return tuple(replace(bucket, device=HOST) for bucket in layout)


def is_on_host(layout: Layout) -> bool:
    """Return whether all tensors are in the host's memory."""
    return all(bucket.device.type == "cpu" for bucket in layout)


def tile_buckets(layout: Layout) -> list[BucketTile]:
    """List the tiles of all buckets of a layout."""
    tiles: list[BucketTile] = []
    for index, bucket in enumerate(layout):
        for begin, end in pairwise(bucket.tile_edges):
            number = len(tiles)
            tiles.append(BucketTile(number, index, begin, end))
    return tiles


def find_ranges(layout: Layout) -> list[list[ElementRange]]:
    """Find the ranges of tensors, in memory, in each tile of a layout."""
    result = []
    for bucket in layout:
        edges = bucket.tile_edges
        ranges: list[list[ElementRange]] = [[] for _ in edges[1:]]
        for name, place in bucket.places.items():
            begin = place.begin
            while begin < place.end:
                tile = bisect_right(edges, begin) - 1
                end = min(place.end, edges[tile + 1])
                piece = ElementRange(name, begin - place.begin, end - place.begin)
                ranges[tile].append(piece)
                begin = end
        result += ranges
    return result


def read_numbers(
    values: Sequence[Tensor],
    tiles: Sequence[BucketTile],
) -> list[float]:
    """Read the numbers of all tiles, waiting once for each bucket."""
    numbers: list[float] = []
    for _, of_bucket in groupby(tiles, attrgetter("bucket")):
        in_bucket = [values[tile.number] for tile in of_bucket]
        numbers += torch.stack(in_bucket).tolist()
    return numbers


class FlatTensors:
    """Memory for the tensors of a layout, not initialized: one flat tensor for each bucket."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.flats = list[Tensor]()
        for bucket in layout:
            self.flats.append(torch.empty(bucket.size, dtype=bucket.dtype, device=bucket.device))

    @property
    def nbytes(self) -> int:
        return sum(flat.nbytes for flat in self.flats)

    @cached_property
    def views(self) -> dict[str, Tensor]:
        """The tensors by name, as views."""
        views = {}
        for bucket, flat in zip(self.layout, self.flats, strict=True):
            for name, place in bucket.places.items():
                elements = flat[place.begin : place.end]
                views[name] = place.view(elements)
        return views

    @cached_property
    def _tiles(self) -> list[Tensor]:
        tiles = []
        for tile in tile_buckets(self.layout):
            tiles.append(self.flats[tile.bucket][tile.begin : tile.end])
        return tiles

    def tile(self, tile: BucketTile) -> Tensor:
        return self._tiles[tile.number]


class HostTensors:
    """Memory of the host for copies of the tensors of a layout, not initialized: for each bucket
    flat pieces that follow each other. It is pinned where `sources`, the buckets that are copied,
    are on a device with streams; then sizes are powers of two, to which torch would round them."""

    def __init__(self, layout: Layout, sources: Layout) -> None:
        self._places = find_places(layout)
        self._pieces = list[list[Tensor]]()
        for bucket, source in zip(layout, sources, strict=True):
            pinned = streams_of(source.device) is not None
            sizes = _powers_of_two(bucket.size) if pinned else [bucket.size]
            dtype = bucket.dtype
            pieces = [torch.empty(size, dtype=dtype, pin_memory=pinned) for size in sizes]
            self._pieces.append(pieces)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for pieces in self._pieces for piece in pieces)

    def tile(self, tile: BucketTile) -> list[Tensor]:
        """Return the parts of a tile, one in memory that is not pinned."""
        return self._parts(tile.bucket, tile.begin, tile.end)

    def copy(self, tile: BucketTile, values: Tensor) -> None:
        """Copy the values of a tile: complete when the current stream of their device is."""
        parts = self.tile(tile)
        sizes = [len(part) for part in parts]
        for part, piece in zip(parts, torch.split(values, sizes), strict=True):
            copy_to_host(part, piece)

    def row_major(self, name: str) -> list[Tensor]:
        """Return the elements of a tensor in row-major order, in flat parts."""
        bucket, place = self._places[name]
        parts = self._parts(bucket, place.begin, place.end)
        if place.is_row_major:
            return parts
        return [place.view(torch.cat(parts)).reshape(-1)]

    def _parts(self, bucket: int, begin: int, end: int) -> list[Tensor]:
        parts = []
        first = 0
        for piece in self._pieces[bucket]:
            last = first + len(piece)
            if begin < last and first < end:
                parts.append(piece[max(0, begin - first) : end - first])
            first = last
        return parts


def _powers_of_two(size: int) -> list[int]:
    """Divide a size into powers of two, in descending order, which are together at most a 16th
    larger."""
    sizes = []
    rest = size
    while rest > size // 16:
        sizes.append(1 << (rest.bit_length() - 1))
        rest -= sizes[-1]
    if rest:
        sizes.append(1 << (rest - 1).bit_length())
    return sizes


# flat, or not contiguous with a range of row-major elements
TilePart = Tensor | tuple[Tensor, slice]


def _tile_part(tensor: Tensor, begin: int, end: int) -> TilePart:
    if tensor.is_contiguous():
        return tensor.view(-1)[begin:end]
    row = tensor[0].numel()
    first = begin // row
    last = -(-end // row)
    skipped = first * row
    return tensor[first:last], slice(begin - skipped, end - skipped)


def _in_place(parts: Sequence[TilePart], dtype: torch.dtype) -> Tensor | None:
    """Return a tile's only part if it is flat and of this dtype."""
    first, *others = parts
    if others or not isinstance(first, Tensor) or first.dtype != dtype:
        return None
    return first


class TileReader:
    """Reads a layout's tensors by tile in up to `threads` threads: views, no copies. `parts` are
    the parts of each tile."""

    def __init__(
        self,
        layout: Layout,
        parts: Sequence[Sequence[TilePart]],
        threads: int = 1,
    ) -> None:
        self.layout = layout
        self.tiles = tile_buckets(layout)
        self._parts = parts
        # of each tile: its values, if they can be read in place
        self._in_place = list[Tensor | None]()
        for tile, of_tile in zip(self.tiles, parts, strict=True):
            self._in_place.append(_in_place(of_tile, layout[tile.bucket].wide))
        self._scratch = list[Tensor]()  # by bucket, a row for each thread
        for bucket in layout:
            shape = threads, min(bucket.size, bucket.tile)
            rows = torch.empty(shape, dtype=bucket.wide, device=bucket.device)
            self._scratch.append(rows)

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        threads: int = 1,
    ) -> TileReader:
        layout = find_layout(tensors)
        in_memory = dict[str, Tensor]()  # with the dimensions as they are in memory
        for bucket in layout:
            for name, place in bucket.places.items():
                values = tensors[name].detach()
                in_memory[name] = values.permute(place.order)
        parts = []
        for ranges in find_ranges(layout):
            of_tile = []
            for name, begin, end in ranges:
                of_tile.append(_tile_part(in_memory[name], begin, end))
            parts.append(of_tile)
        return cls(layout, parts, threads)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._scratch)

    def current(self, tile: BucketTile) -> list[Tensor]:
        """Return a tile's values as they are now, in flat tensors that follow each other."""
        parts = self._parts[tile.number]
        # a comprehension, since there may be thousands
        return [
            part if isinstance(part, Tensor) else part[0].reshape(-1)[part[1]] for part in parts
        ]

    def values(self, tile: BucketTile, thread: int = 0) -> Tensor:
        """Return a tile's values, flat, in the averages' dtype; valid until the same thread's next
        call."""
        in_place = self._in_place[tile.number]
        if in_place is not None:
            return in_place
        flat = self._flat(tile, thread)
        if flat.dtype == self.layout[tile.bucket].wide:
            return flat
        return self._make_scratch(tile, thread).copy_(flat)

    def norms(self, pool: ThreadPool = SINGLE_THREAD) -> list[float]:
        """Compute each tile's norm: not finite if a value is not, or if squares overflow. It waits
        once for each bucket."""
        norms = [torch.empty(0)] * len(self.tiles)

        def measure(tile: BucketTile, thread: int) -> None:
            values = self._flat(tile, thread)
            norms[tile.number] = torch.linalg.vector_norm(values)

        pool.each(measure, self.tiles)
        return read_numbers(norms, self.tiles)

    def nonfinite_name(self, norms: Sequence[float]) -> str | None:
        """Find the first tensor with a nan or an infinity in the tiles whose norms are not finite,
        or None."""
        if all(map(math.isfinite, norms)):
            return None
        of_tiles = find_ranges(self.layout)
        for tile in self.tiles:
            if math.isfinite(norms[tile.number]):
                continue
            end = 0
            values = self.values(tile)
            for name, first, last in of_tiles[tile.number]:
                begin = end
                end += last - first
                if not bool(values[begin:end].isfinite().all()):
                    return name
        return None

    def _flat(self, tile: BucketTile, thread: int) -> Tensor:
        """Return a tile's values, flat, in a dtype with float32's range."""
        first, *others = parts = self.current(tile)
        if not others and first.dtype in _LIKE_FLOAT32:
            return first
        scratch = self._make_scratch(tile, thread)
        if others:
            return torch.cat(parts, out=scratch)
        return scratch.copy_(first)

    def _make_scratch(self, tile: BucketTile, thread: int) -> Tensor:
        size = tile.end - tile.begin
        return self._scratch[tile.bucket][thread, :size]


class Elements:
    """A selection of a layout's elements, given by positions in each bucket."""

    def __init__(self, layout: Layout, positions: Sequence[Positions]) -> None:
        self.layout = layout
        self._counts = [*map(len, positions)]
        # of each tile: where its elements are in it, and where in the buffer
        self._of_tiles: list[tuple[Tensor, slice | Tensor]] = []
        orders = [np.argsort(of_bucket, kind="stable") for of_bucket in positions]
        self._tiles = tile_buckets(layout)
        for tile in self._tiles:
            device = layout[tile.bucket].device
            order = orders[tile.bucket]
            ascending = positions[tile.bucket][order]
            first, last = np.searchsorted(ascending, (tile.begin, tile.end)).tolist()
            in_tile = ascending[first:last] - tile.begin
            index = torch.from_numpy(in_tile.astype(np.int32))
            target = order[first:last]
            numbers: slice | Tensor = slice(first, last)
            if not np.array_equal(target, np.arange(first, last)):
                numbers = torch.from_numpy(target).to(device)
            self._of_tiles.append((index.to(device), numbers))

    def buffers(self) -> list[Tensor]:
        """Make zeros for the values of the selected elements, one tensor for each bucket."""
        zeros = []
        for count, bucket in zip(self._counts, self.layout, strict=True):
            buffer = torch.zeros(count, dtype=bucket.wide, device=bucket.device)
            zeros.append(buffer)
        return zeros

    def views(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """View each tile's part of the buffers, or the whole buffer if its elements are apart."""
        views = []
        for tile, (_, numbers) in zip(self._tiles, self._of_tiles, strict=True):
            buffer = buffers[tile.bucket]
            views.append(buffer[numbers] if isinstance(numbers, slice) else buffer)
        return views

    def take(
        self,
        tile: BucketTile,
        values: Tensor,
        views: Sequence[Tensor],
    ) -> None:
        """Copy the selected elements of a tile, which has these values, to views of buffers."""
        index, numbers = self._of_tiles[tile.number]
        view = views[tile.number]
        if isinstance(numbers, Tensor):
            selected = values.index_select(0, index)
            view.index_copy_(0, numbers, selected)
        elif numbers.start < numbers.stop:
            torch.index_select(values, 0, index, out=view)


class HostCopy:
    """A model's values at one moment, on the host: in pinned memory if they come from an
    accelerator. It is read by `threads` threads."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._layout: Layout = ()
        self._memory = HostTensors((), ())
        self._values = TileReader((), ())
        self._events: list[Any] = []  # after which the last copy is complete

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, model: TileReader, pool: ThreadPool = SINGLE_THREAD) -> None:
        """Copy the values as they are now, in place of the last copy, which must have arrived.

        An accelerator copies in the training's own stream, by one thread, so that nothing changes
        the values before.
        """
        if model.layout != self._layout:
            host = on_host(model.layout)
            self._memory = HostTensors(host, model.layout)
            parts = [self._memory.tile(tile) for tile in tile_buckets(host)]
            self._values = TileReader(host, parts, self._threads)
            self._layout = model.layout

        def copy_tile(tile: BucketTile, _: int) -> None:
            # Tiles of an accelerator are larger than the host's.
            values = model.current(tile)
            if values[0].device.type != "cpu":
                joined = values[0] if len(values) == 1 else torch.cat(values)
                self._memory.copy(tile, joined)
                return
            (out,) = self._memory.tile(tile)
            parts = torch.split(out, [value.numel() for value in values])
            torch._foreach_copy_([*parts], values)

        pool.each(copy_tile, model.tiles)
        devices = {bucket.device for bucket in model.layout}
        self._events = [record_end(device) for device in devices if streams_of(device)]

    def wait(self) -> TileReader:
        """Wait until all values have arrived, and return a reader of them."""
        for event in self._events:
            event.synchronize()
        return self._values
