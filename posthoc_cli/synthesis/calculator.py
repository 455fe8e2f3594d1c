"""What one thread of a synthesis does: it reads the bytes of a tile, sums and checks them, and
writes the results."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import ExitStack
from itertools import cycle
from typing import Any

import torch

from posthoc_cli.devices import in_stream, streams_of
from posthoc_cli.dtypes import EPS, ITEM_BYTES, torch_dtype
from posthoc_cli.errors import NonFiniteError
from posthoc_cli.profiles import FloatArray
from posthoc_cli.snapshots.entry import BLOCK, tensor_from_bytes
from posthoc_cli.snapshots.source import StoredTensors
from posthoc_cli.synthesis.plan import Combination
from posthoc_cli.synthesis.tiles import Output, Tile, tile_size

# --- sums
#
# One target is summed by additions, several targets by matrix products, whose terms a library may
# add in any order; so another target in the same pass may change the last bits. The tiles and the
# number of threads do not change them: sums are padded to a multiple of COLUMNS, so every element
# goes through the same instructions wherever a chunk ends.

SLOTS = 32  # number of sources in one matrix product
# of one matrix product: the most at which its operands stay in the second-level cache (measured)
COLUMNS = 16_384


class Sums:
    """One thread's buffers: the sums of a chunk, [targets, chunk], and slots for the sources of a
    matrix product.

    For a chunk, call `start`, then for each source in order fill `slot(i)` and call `add(i)`;
    `totals` are the sums. `coefficients` are [sources, targets]. A chunk has up to `room` elements,
    a multiple of COLUMNS.
    """

    def __init__(
        self,
        coefficients: FloatArray,
        room: int,
        wide: torch.dtype,
        device: torch.device,
    ) -> None:
        self.room = room
        self._sources, targets = coefficients.shape
        self._slot_count = 1 if targets == 1 else min(SLOTS, self._sources)
        self._scales = coefficients.tolist()
        by_target = torch.from_numpy(coefficients.T.copy())
        self._matrix = by_target.to(device, wide)
        # Initialized to zero: nan in the padding of a shorter chunk would slow down the arithmetic.
        self.totals = torch.zeros(targets, room, dtype=wide, device=device)
        self._values = torch.zeros(self._slot_count, room, dtype=wide, device=device)
        self.weights = torch.full((room,), 2.0**-20, dtype=wide, device=device)
        self._size = self._padded = -1  # not 0, which is the size of an empty chunk

    def start(self, size: int) -> None:
        """Begin the sums of a chunk of `size` elements."""
        if size != self._size:
            self._size = size
            self._padded = -(-size // COLUMNS) * COLUMNS
            padded = self._padded
            self._slots = [row[:size] for row in self._values.unbind()]
            self._terms = [row[:padded] for row in self._values.unbind()]
            self._rows = [row[:padded] for row in self.totals.unbind()]

    def slot(self, source: int) -> torch.Tensor:
        """Find the buffer for the values of a source, shape [size]."""
        return self._slots[source % self._slot_count]

    def add(self, source: int) -> None:
        """Add the values in the slot of a source, or leave them until the slots of a matrix product
        are full."""
        count = source % self._slot_count + 1
        if count < self._slot_count and source + 1 < self._sources:
            return
        first = source + 1 - count
        if self._slot_count > 1 and has_full_precision():
            self._add_product(first, count)
            return
        for index in range(first, source + 1):
            values = self._terms[index - first]
            scales = self._scales[index]
            for total, scale in zip(self._rows, scales, strict=True):
                if index == 0:
                    torch.mul(values, scale, out=total)
                else:
                    total.add_(values, alpha=scale)

    def _add_product(self, first: int, count: int) -> None:
        """Add the values in `count` slots, of the sources from the first one on."""
        matrix = self._matrix[:, first : first + count]
        keeps_sums = int(first > 0)
        for begin in range(0, self._padded, COLUMNS):
            end = begin + COLUMNS
            sums = self.totals[:, begin:end]
            values = self._values[:count, begin:end]
            torch.addmm(sums, matrix, values, beta=keeps_sums, out=sums)


def has_full_precision() -> bool:
    """Return whether torch now keeps all bits of a matrix product's factors (no TF32); a program
    may change this."""
    backends: Any = torch.backends
    try:
        on_cuda = backends.cuda.matmul.fp32_precision
        on_cpu = backends.mkldnn.matmul.fp32_precision
    except AttributeError:  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    exact = ("none", "ieee")
    return on_cuda in exact and on_cpu in exact


# --- one thread

AHEAD = 24
"""Blocks of one tile that are requested ahead from a store."""


class StoredBytes:
    """A buffer for bytes of a file; pinned for devices with streams, where `sent` is the event
    after its last values were copied."""

    def __init__(self, pinned: bool) -> None:
        self._bytes = torch.zeros(0, dtype=torch.uint8)
        self._pinned = pinned
        self.sent = None
        # to make one takes 10 us
        self._views: dict[tuple[int, str], tuple[memoryview, torch.Tensor]] = {}

    def views(
        self,
        count: int,
        dtype: str,
    ) -> tuple[memoryview, torch.Tensor]:
        """View the first bytes of the buffer for `count` elements, as bytes and as a tensor."""
        views = self._views.get((count, dtype))
        if views is None:
            nbytes = count * ITEM_BYTES[dtype]
            if self._bytes.numel() < nbytes:
                self._bytes = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self._pinned)
                self._views = {}
            data = self._bytes[:nbytes].numpy()
            values = tensor_from_bytes(data, dtype, (count,))
            views = (data.data, values)
            self._views[count, dtype] = views
        return views


Reading = tuple[Future[None] | None, StoredBytes, torch.Tensor]
"""A tile's values of a source, with the buffer that a request may still read them into."""


class Calculator:
    """What computes the tiles of one thread, with the buffers of that thread."""

    def __init__(
        self,
        plan: Combination,
        outputs: Sequence[Output],
        device: torch.device,
        readers: Executor | None,
        errors: Sequence[BaseException],
    ) -> None:
        """`readers` are the threads that request bytes of a store; `errors` those of all threads,
        any of which stops this one."""
        self.plan = plan
        self._outputs = outputs
        self._device = device
        self._readers = readers
        self._errors = errors
        self._size = tile_size(len(outputs))
        module = streams_of(self._device)
        self._stream = module.Stream(self._device) if module else None
        # With a stream the next bytes are read into one of two buffers while the other is copied.
        self._ahead = AHEAD * BLOCK if readers else 0  # in elements
        self._spare = int(self._stream is not None)
        buffers = self._ahead // self._size + 1 + self._spare
        self._stored = [StoredBytes(self._stream is not None) for _ in range(buffers)]
        self._sums: dict[tuple[str, int], Sums] = {}  # by dtype and number of sources
        self._buffers: dict[str, torch.Tensor] = {}

    def compute(self, tile: Tile, opened: Any) -> None:
        """Compute a tile of all targets and write it to their outputs; raise CancelledError after
        errors.

        `opened` is the caller's event after which the sources can be read and the results written.
        """
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(in_stream(self._stream))
                self._stream.wait_event(opened)
                # also after an error, since the caller then frees the results
                stack.callback(self._stream.synchronize)
            kind = tile.kind
            if kind.role in ("copy", "stored"):
                results = [self._copy(tile)] * len(self._outputs)
            else:
                results = [*self._sum(tile)]
            for values, output in zip(results, self._outputs, strict=True):
                if kind.dtype != kind.wide:
                    values = self._buffer(kind.dtype, tile.size).copy_(values)
                output.write(tile, values)

    def _copy(self, tile: Tile) -> torch.Tensor:
        """Read the values of the newest source; in a copy nan and infinity are kept."""
        kind = tile.kind
        (copy,) = self._values([self.plan.newest], tile)
        is_checked = kind.wide != kind.dtype or kind.role == "stored"
        if is_checked and kind.wide in EPS:
            values = copy.cpu().double()
            if kind.role == "copy":
                values = values.nan_to_num(0.0, 0.0, 0.0)
            self._check_finite(tile, values[None])
        return copy

    def _sum(self, tile: Tile) -> torch.Tensor:
        """Compute the sums of a tile, [targets, n]; they are valid until the next call."""
        sums = self._thread_sums(tile)
        sums.start(tile.size)
        smallest: torch.Tensor | None = None
        stored = self._values(self.plan.summed(tile.names[0]), tile)
        for index, values in enumerate(stored):
            slot = sums.slot(index).copy_(values)
            if tile.kind.role == "variance":
                least = slot if smallest is None else smallest
                smallest = least.minimum(slot)
            sums.add(index)
        result = sums.totals[:, : tile.size]
        # extrapolating coefficients can make a small variance zero or negative
        if smallest is not None:
            result.copy_(result.maximum(smallest / 2))
        # A weighted sum reads all elements once, at the speed of memory; it may overflow itself.
        weights = sums.weights[: tile.size]
        weighted = torch.mv(result, weights)
        is_finite = bool(weighted.isfinite().all())
        if not is_finite or tile.kind.wide != tile.kind.dtype:
            self._check_finite(tile, result)
        return result

    def _check_finite(self, tile: Tile, sums: torch.Tensor) -> None:
        """Raise a NonFiniteError if the output's dtype cannot hold the sums, [targets, n]; it names
        the source that holds nan or infinity."""
        dtype = torch_dtype(tile.kind.dtype)
        if holds(dtype, sums):
            return
        masks = {}
        if tile.kind.role != "copy":
            masks = self._masks(tile)
        for name, begin, end in tile.spans:
            values = sums[:, begin:end]
            if name in masks:
                values[:] = masks[name]
                continue
            if not bool(values.isfinite().all()):
                raise NonFiniteError(f"tensor {name!r}", "the sum overflows")
            if not holds(dtype, values):
                largest = float(values.abs().max())
                reason = f"{dtype} cannot hold its largest value, {largest:.6g}"
                raise NonFiniteError(f"tensor {name!r}", reason, "take float32 or bfloat16")

    def _masks(self, tile: Tile) -> dict[str, torch.Tensor]:
        """Find the masks in a tile by name, which all sources hold alike; raise a NonFiniteError if
        one holds nan or infinity elsewhere."""
        newest = self._doubles(self.plan.newest, tile)
        masks = {}
        for source in self.plan.summed(tile.names[0]):
            values = self._doubles(source, tile)
            for name, begin, end in tile.spans:
                part = values[begin:end]
                last = newest[begin:end]
                is_finite = bool(part.isfinite().all())
                if is_finite and bool(last.isfinite().all()):
                    continue
                if not (source.is_mask(part.numpy()) and torch.equal(part, last)):
                    reason = f"tensor {name!r}: holds nan or infinity"
                    if is_finite:
                        source = self.plan.newest
                    raise NonFiniteError(source.path, reason)
                masks[name] = last
        return masks

    def _doubles(self, source: StoredTensors, tile: Tile) -> torch.Tensor:
        return next(self._values([source], tile)).cpu().double()

    def _values(
        self,
        sources: Sequence[StoredTensors],
        tile: Tile,
    ) -> Iterator[torch.Tensor]:
        """Yield a tile's values of each source, in the stored dtype, on the device; each is valid
        until the next."""
        ahead = self._ahead // max(tile.size, self._size)
        used = ahead + 1 + self._spare
        buffers = cycle(self._stored[:used])
        begun = deque[Reading]()
        for source in sources:
            begun.append(self._read(source, tile, next(buffers)))
            if len(begun) > ahead:
                yield self._receive(begun.popleft())
        while begun:
            yield self._receive(begun.popleft())

    def _read(
        self,
        source: StoredTensors,
        tile: Tile,
        buffer: StoredBytes,
    ) -> Reading:
        """Read a tile of a source into a buffer, or request it; raise CancelledError after
        errors."""
        if self._errors:
            raise CancelledError
        if buffer.sent:
            buffer.sent.synchronize()
        dtype = source.entries[tile.names[0]].dtype
        data, values = buffer.views(tile.size, dtype)
        if readers := self._readers:
            request = readers.submit(_read_tile, source, tile, data)
            return request, buffer, values
        _read_tile(source, tile, data)
        return None, buffer, values

    def _receive(self, reading: Reading) -> torch.Tensor:
        """Wait for what is read, and return it on the device."""
        request, buffer, values = reading
        if request:
            request.result()
        if self._stream is not None:
            values = values.to(self._device, non_blocking=True)
            buffer.sent = self._stream.record_event()
            return values
        return values.to(self._device)

    def _buffer(self, dtype: str, size: int) -> torch.Tensor:
        buffer = self._buffers.get(dtype)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch_dtype(dtype), device=self._device)
            self._buffers[dtype] = buffer
        return buffer[:size]

    def _thread_sums(self, tile: Tile) -> Sums:
        kind = tile.kind
        key = (kind.wide, len(kind.stored))
        sums = self._sums.get(key)
        if sums is None or sums.room < tile.size:
            factors = self.plan.factors(tile.names[0])
            assert factors is not None, "only sums have them"
            columns = -(-tile.size // COLUMNS) * COLUMNS
            room = max(self._size, columns)
            sums = Sums(factors, room, torch_dtype(kind.wide), self._device)
            self._sums[key] = sums
        return sums


def _read_tile(source: StoredTensors, tile: Tile, data: memoryview) -> None:
    if len(tile.names) > 1:
        source.read_many(tile.names, data)
    else:
        source.read_box(tile.names[0], tile.box, data, tile.begin)


def holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    """Return whether all values are finite in a dtype. Casting is monotone, so both bounds tell;
    nan is in both."""
    if not values.numel():
        return True
    bounds = torch.stack(torch.aminmax(values))
    if dtype.itemsize > 1:
        rounded = bounds.to(dtype)
        return bool(rounded.isfinite().all())
    # For 8-bit dtypes torch clips to the largest value; a value is too large if it is half a unit
    # or more beyond it.
    info = torch.finfo(dtype)
    exponent = math.floor(math.log2(info.max))
    unit = info.eps * 2.0**exponent
    are_small = bounds.abs() <= info.max + unit / 2
    return bool(are_small.all())
