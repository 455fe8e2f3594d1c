"""Memory on the host for a model's values and what is stored of its averages, and the order of work on accelerators.

The memory is in chunks whose sizes are powers of two: torch rounds pinned memory up to these.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from posthoc_cli.snapshots.reading import ElementRange
from posthoc_cli.tracker.averages import BlockReader, Group, Layout, lay_out, on_host
from posthoc_cli.tracker.model_tensors import nonfinite_name

CHUNK_BYTES = 2**28
"""Bytes of the largest chunks of host memory, and of an accelerator's memory that copies pass through."""

REST_BYTES = 2**16
"""The last bytes of a buffer, up to so many, are one chunk, whatever their number."""

FREE_SHARE = 0.1
"""Share of an accelerator's free memory that copies may pass through."""


def elements(parts: Sequence[torch.Tensor], begin: int, end: int) -> torch.Tensor:
    """Elements of a tensor that lies in parts, end to end; a view where they are contiguous in one of them."""
    found = []
    for part in parts:
        first, last = max(begin, 0), min(end, part.numel())
        if first < last:
            found.append(_elements(part.detach(), first, last))
        begin, end = begin - part.numel(), end - part.numel()
    return found[0] if len(found) == 1 else torch.cat(found or [parts[0].view(-1)])


def ranges_of(tensors: Mapping[str, torch.Tensor], ranges: Sequence[ElementRange]) -> list[torch.Tensor]:
    """Ranges of tensors, flat."""
    return [elements([tensors[one.name]], one.begin, one.end) for one in ranges]


def locate(parts: Sequence[torch.Tensor], index: int) -> tuple[torch.Tensor, int]:
    """The part that holds an element of a tensor, and the element's place in it."""
    for part in parts:
        if index < part.numel():
            return part, index
        index -= part.numel()
    raise IndexError(index)


def nonfinite_part(tensors: Mapping[str, Sequence[torch.Tensor]]) -> str | None:
    """The first tensor, in parts, that holds a nan or an infinity."""
    found = (nonfinite_name({name: part}) for name, parts in tensors.items() for part in parts)
    return next((name for name in found if name is not None), None)


def _elements(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    if tensor.is_contiguous():
        return tensor.view(-1)[begin:end]
    row = tensor[0].numel()  # a copy of the rows that hold them
    first = begin // row
    return tensor[first : -(-end // row)].reshape(-1)[begin - first * row : end - first * row]


def chunk_bounds(count: int, itemsize: int) -> list[int]:
    """Where chunks of so many elements end, beginning with 0."""
    bounds = [0]
    while (left := (count - bounds[-1]) * itemsize) > 0:
        size = left if left <= REST_BYTES else 2 ** (left.bit_length() - 1)
        bounds.append(bounds[-1] + min(size, CHUNK_BYTES) // itemsize)
    return bounds


def ranges_between(group: Group, bounds: Sequence[int]) -> list[list[ElementRange]]:
    """The ranges of tensors, of a group that is cut at these elements, in each piece."""
    found: list[list[ElementRange]] = [[] for _ in bounds[1:]]
    place = 0
    for name, (begin, end) in zip(group.names, pairwise(group.bounds), strict=True):
        first = begin
        while first < end:
            while bounds[place + 1] <= first:
                place += 1
            last = min(end, bounds[place + 1])
            found[place].append(ElementRange(name, first - begin, last - begin))
            first = last
    return found


class HostTensors:
    """Tensors of a layout on the host, without values: end to end in chunks. A tensor lies in one or several parts."""

    def __init__(self, layout: Layout, pinned: bool = False) -> None:
        self.layout = layout
        self.bounds = [chunk_bounds(group.bounds[-1], group.dtype.itemsize) for group in layout]
        self.chunks = [
            [torch.empty(end - begin, dtype=group.dtype, pin_memory=pinned) for begin, end in pairwise(bounds)]
            for group, bounds in zip(layout, self.bounds, strict=True)
        ]
        self.ranges = [ranges_between(group, bounds) for group, bounds in zip(layout, self.bounds, strict=True)]
        self.parts: dict[str, list[torch.Tensor]] = {name: [] for group in layout for name in group.names}
        for group, chunks, ranges in zip(layout, self.chunks, self.ranges, strict=True):
            for chunk, own in zip(chunks, ranges, strict=True):
                for one, part in zip(own, torch.split(chunk, [one.end - one.begin for one in own]), strict=True):
                    self.parts[one.name].append(part)
            for name in group.names:
                self.parts[name] = self.parts[name] or [torch.empty(0, dtype=group.dtype)]

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(chunk.nbytes for chunks in self.chunks for chunk in chunks)


# --- accelerators

Streams = dict[torch.device, Any]
Marks = tuple[tuple[torch.device, Any], ...]  # events: work that was queued on the device before is done when they are


class DeviceStreams:
    """Orders a tracker's threads on accelerators, where each has its own stream; `last` marks the last update's end."""

    def __init__(self) -> None:
        self.last: Marks = ()
        self._own: Streams = {}

    @staticmethod
    def current(devices: Iterable[torch.device]) -> Streams:
        """The streams that the calling thread uses on these devices."""
        return {device: torch.cuda.current_stream(device) for device in {*devices} if device.type == "cuda"}

    @classmethod
    def marks(cls, tensors: Iterable[torch.Tensor]) -> Marks:
        """Marks after what the calling thread has queued so far."""
        return tuple(
            (device, stream.record_event()) for device, stream in cls.current(t.device for t in tensors).items()
        )

    @contextmanager
    def entered(self, streams: Streams) -> Iterator[None]:
        """Work in the streams of another thread, which waits meanwhile; updates `last`."""
        with ExitStack() as stack:
            for stream in streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            yield
            self.last = tuple((device, stream.record_event()) for device, stream in streams.items())

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """Work in streams of this thread's own, after the last update; it is done at the end of the block."""
        cuda: Any = torch.cuda
        with ExitStack() as stack:
            for device, event in self.last:
                if device not in self._own:
                    self._own[device] = cuda.Stream(device)
                self._own[device].wait_event(event)
                stack.enter_context(cuda.stream(self._own[device]))
            yield
            for device, _ in self.last:
                self._own[device].synchronize()


class _Ring:
    """An accelerator's memory through which chunks go to the host, in a stream of its own while training goes on.

    It holds all of them where that is a small share of the free memory. Else the training's stream waits, with the
    copying of a chunk, until the one that was in its place before has left.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        cuda: Any = torch.cuda
        free = cuda.mem_get_info(device)[0]
        count = min(len(sizes), max(2, int(FREE_SHARE * free) // CHUNK_BYTES))
        self._device, self._stream = device, cuda.Stream(device)
        self._buffers = [
            torch.empty(max(sizes[place::count]), dtype=torch.uint8, device=device) for place in range(count)
        ]
        self._sent: list[Any] = [None] * count
        self.nbytes = sum(buffer.nbytes for buffer in self._buffers)

    def send(self, number: int, values: list[torch.Tensor], chunk: torch.Tensor) -> Any:
        """Have the chunk of this number, from 0 on, filled; returns the event after which it is."""
        cuda: Any = torch.cuda
        place, training = number % len(self._buffers), cuda.current_stream(self._device)
        if self._sent[place] is not None:
            training.wait_event(self._sent[place])
        buffer = self._buffers[place]
        room = buffer[: chunk.nbytes].view(chunk.dtype)
        _fill(room, values)
        self._stream.wait_stream(training)
        with cuda.stream(self._stream):
            chunk.copy_(room, non_blocking=True)
        # A thread that waits for a blocking event sleeps, and takes no core from the training.
        self._sent[place] = self._stream.record_event(cuda.Event(blocking=True))
        # When it is freed, torch must not use its memory again before both streams are done with it.
        for user in (self._stream, training):
            buffer.record_stream(user)
        return self._sent[place]


def _fill(flat: torch.Tensor, values: list[torch.Tensor]) -> None:
    """Copy tensors, or ranges of them, end to end."""
    parts = torch.split(flat, [value.numel() for value in values])
    torch._foreach_copy_([part.view(value.shape) for part, value in zip(parts, values, strict=True)], values)


# --- the model's values


@dataclass(frozen=True, eq=False)
class ModelCopy:
    """A model's values at one moment on the host, in their own dtypes; they are there after the `events`."""

    host: HostTensors
    events: tuple[Any, ...] = ()

    def arrived(self) -> HostTensors:
        """The values; waits until they are there."""
        for event in self.events:
            event.synchronize()
        return self.host

    def reader(self, threads: int) -> BlockReader:
        """The values block by block, for so many threads; waits until they are there."""
        host = self.arrived()
        return BlockReader(host.layout, host.chunks, threads)


class ModelCopier:
    """Copies a model's values to memory on the host, which it uses again. `nbytes` is what it holds, there and on
    accelerators: with a copy that nobody has given back, too."""

    def __init__(self) -> None:
        self._free: deque[HostTensors] = deque(maxlen=1)  # one is enough, and old layouts go
        self._last: _Sources | None = None
        self._host_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        last = self._last
        return self._host_bytes + (0 if last is None else sum(ring.nbytes for ring in last.rings.values()))

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, tensors: Mapping[str, torch.Tensor]) -> ModelCopy:
        """A copy of tensors as they are now; `give_back` it."""
        last = self._last
        layout = lay_out(tensors) if last is None or last.tensors is not tensors else last.layout
        host = self._free.pop() if self._free else None
        if host is None or host.layout != on_host(layout):
            host = HostTensors(on_host(layout), any(group.device.type == "cuda" for group in layout))
            self._host_bytes = host.nbytes
        if last is None or last.tensors is not tensors:
            last = self._last = _Sources(tensors, layout, host)
        events = []
        counts: dict[torch.device, int] = defaultdict(int)
        for group, chunks, sources in zip(layout, host.chunks, last.sources, strict=True):
            for chunk, own in zip(chunks, sources, strict=True):
                values = [one if isinstance(one, torch.Tensor) else elements(*one) for one in own]
                if group.device in last.rings:
                    events.append(last.rings[group.device].send(counts[group.device], values, chunk))
                    counts[group.device] += 1
                else:
                    _fill(chunk, values)
        return ModelCopy(host, tuple(events))

    def give_back(self, copy: ModelCopy) -> None:
        """Take back a copy that has arrived and is no longer needed; from any thread."""
        self._free.append(copy.host)


class _Sources:
    """What goes into each chunk of a copy: tensors, or views of parts, or which part of one that is not contiguous."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], layout: Layout, host: HostTensors) -> None:
        self.tensors, self.layout = tensors, layout
        self.sources = [[[_source(tensors, one) for one in own] for own in chunks] for chunks in host.ranges]
        sizes: dict[torch.device, list[int]] = defaultdict(list)
        for group, chunks in zip(layout, host.chunks, strict=True):
            if group.device.type == "cuda":
                sizes[group.device] += [chunk.nbytes for chunk in chunks]
        self.rings = {device: _Ring(device, own) for device, own in sizes.items() if own}


def _source(
    tensors: Mapping[str, torch.Tensor], one: ElementRange
) -> torch.Tensor | tuple[Sequence[torch.Tensor], int, int]:
    tensor = tensors[one.name].detach()
    if one.end - one.begin == tensor.numel():
        return tensor
    return elements([tensor], one.begin, one.end) if tensor.is_contiguous() else ([tensor], one.begin, one.end)
