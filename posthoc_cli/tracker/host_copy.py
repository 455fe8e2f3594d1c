"""Copies of a model's values on the host.

On an accelerator training's own stream copies each tile to a buffer of a ring; another stream
sends it to pinned memory, while training goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from posthoc_cli.tracker.background import SINGLE_THREAD, ThreadPool
from posthoc_cli.tracker.memory import FlatTensors, Layout, Reader, Tile, on_host, tiles_of

# of an accelerator's free memory, the most that is used as a buffer for copies to the host
FREE_SHARE = 0.1


class _Ring:
    """A ring of buffers on an accelerator, through which tiles go to the host in a separate stream.

    If the free memory is too small for all tiles, the training stream waits before it fills a
    buffer again.
    """

    def __init__(
        self,
        device: torch.device,
        sizes: Sequence[int],
    ) -> None:
        cuda: Any = torch.cuda
        # torch keeps memory that it has freed
        kept = cuda.memory_reserved(device) - cuda.memory_allocated(device)
        free, _ = cuda.mem_get_info(device)
        usable = int(FREE_SHARE * (free + kept))
        count = max(2, usable // max(sizes))
        count = min(count, len(sizes))
        self._device = device
        self._stream = cuda.Stream(device)
        self._buffers = list[Tensor]()
        for number in range(count):
            size = max(sizes[number::count])
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            self._buffers.append(buffer)
        self._sent: list[Any] = [None] * count  # each buffer's last event
        self.nbytes = sum(buffer.nbytes for buffer in self._buffers)

    def send(
        self,
        number: int,
        values: list[Tensor],
        out: Tensor,
    ) -> Any:
        """Queue the copy of tile `number`, counted from 0, to `out` on the host; return the event
        after the copy."""
        cuda: Any = torch.cuda
        index = number % len(self._buffers)
        training = cuda.current_stream(self._device)
        earlier = self._sent[index]
        if earlier is not None:
            training.wait_event(earlier)
        buffer = self._buffers[index]
        staged = buffer[: out.nbytes].view(out.dtype)
        _fill(staged, values)
        self._stream.wait_stream(training)
        with cuda.stream(self._stream):
            out.copy_(staged, non_blocking=True)
        # A thread that waits for a blocking event sleeps, and takes no core from the training.
        event = cuda.Event(blocking=True)
        self._stream.record_event(event)
        self._sent[index] = event
        # torch must not reuse a freed buffer's memory before both streams have finished with the
        # buffer.
        for user in (self._stream, training):
            buffer.record_stream(user)
        return event


def _fill(flat: Tensor, values: list[Tensor]) -> None:
    sizes = [value.numel() for value in values]
    parts = torch.split(flat, sizes)
    torch._foreach_copy_([*parts], values)


def _rings_for(model: Reader) -> dict[torch.device, _Ring]:
    """Return a ring on each accelerator that holds some of a model's tiles."""
    sizes: dict[torch.device, list[int]] = defaultdict(list)
    for tile in model.tiles:
        bucket = model.layout[tile.bucket]
        if bucket.device.type == "cuda":
            elements = tile.end - tile.begin
            sizes[bucket.device].append(elements * bucket.dtype.itemsize)
    rings = {}
    for device, of_tiles in sizes.items():
        rings[device] = _Ring(device, of_tiles)
    return rings


class ModelCopier:
    """Copies a model's values to memory on the host, for a reader of `threads` threads."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._layout: Layout = ()
        self._rings: dict[torch.device, _Ring] = {}
        self.memory = FlatTensors(())
        self._values = Reader((), ())
        self._events: list[Any] = []  # after which the last copy is complete

    @property
    def nbytes(self) -> int:
        """Bytes of memory on the host and on accelerators."""
        return self.memory.nbytes + sum(ring.nbytes for ring in self._rings.values())

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, model: Reader, pool: ThreadPool = SINGLE_THREAD) -> None:
        """Copy the values as they are now, in place of those of the last copy, which must have
        arrived. From accelerators `pool` must be `SINGLE_THREAD`."""
        if model.layout != self._layout:
            self._rings = _rings_for(model)
            host = on_host(model.layout)
            self.memory = FlatTensors(host, pinned=bool(self._rings))
            parts = [[self.memory.tile(tile)] for tile in tiles_of(host)]
            self._values = Reader(host, parts, self._threads)
            self._layout = model.layout
        events = dict[torch.device, Any]()
        counts = defaultdict[torch.device, int](int)

        def copy_tile(tile: Tile, _: int) -> None:
            # Tiles of an accelerator are larger than the reader's, which are the host's.
            device = model.layout[tile.bucket].device
            values = model.current(tile)
            out = self.memory.tile(tile)
            ring = self._rings.get(device)
            if ring is None:
                _fill(out, values)
                return
            # a stream keeps order: the last event is enough
            events[device] = ring.send(counts[device], values, out)
            counts[device] += 1

        pool.each(copy_tile, model.tiles)
        self._events = [*events.values()]

    def arrived(self) -> Reader:
        """Wait until all values have arrived, and return a reader of them."""
        for event in self._events:
            event.synchronize()
        return self._values
