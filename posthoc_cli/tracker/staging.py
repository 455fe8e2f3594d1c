"""Memory on the host for a model's values and what is stored of its averages, and the order of work on accelerators.

The memory is in chunks whose sizes are powers of two: torch rounds pinned memory up to these.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.dtypes import torch_dtype
from posthoc_cli.snapshots.reading import ElementRange
from posthoc_cli.tracker.averages import BlockReader, Group, Layout, Range, RunningAverages, lay_out, on_host
from posthoc_cli.tracker.measuring import Elements, Subset, Values
from posthoc_cli.tracker.model_tensors import TrackedModel, nonfinite_name
from posthoc_cli.tracker.worker import ALONE, Crew

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


# --- what is stored of averages


class StorageLayout:
    """How averages of a layout are stored, and which of their elements are measured.

    Attributes:
        rooms: the same groups on the host in the storage dtype.
        weights: names of tensors that are measured and rounded: not running statistics.
        shapes, dtypes: of all, as they are stored if their values fit.
        subset: elements of the weights that are measured.
        sample: those of a snapshot's sample.
        pieces: all of the averages in blocks, each with the chunk of a copy that it belongs in, and its place there.
    """

    def __init__(self, layout: Layout, tracked: TrackedModel, dtype: str | None) -> None:
        self.layout, self.tracked = layout, tracked
        self.rooms = tuple(replace(g, dtype=torch_dtype(dtype) if dtype else g.dtype) for g in on_host(layout))
        self.weights = frozenset(tracked.weights)
        self.subset = Subset(layout, self.weights)
        self.shapes = {n: shape for group in layout for n, shape in zip(group.names, group.shapes, strict=True)}
        self.dtypes = {name: group.dtype for group in self.rooms for name in group.names}
        places = {n: (at, begin) for at, g in enumerate(layout) for n, begin in zip(g.names, g.bounds, strict=False)}
        sampled = np.array([(places[n][0], places[n][1] + i) for n, i in tracked.sampled], np.int64).reshape(-1, 2)
        self._order = np.lexsort(sampled.T[::-1])
        ordered = sampled[self._order]
        self.sample = Elements(layout, [ordered[ordered[:, 0] == at, 1] for at in range(len(layout))])
        self.pieces = [
            (Range(at, begin, end), number, begin - first)
            for at, (group, room) in enumerate(zip(layout, self.rooms, strict=True))
            for number, (first, last) in enumerate(pairwise(chunk_bounds(room.bounds[-1], room.dtype.itemsize)))
            for begin, end in ((part.begin, part.end) for part in Range(at, first, last).cut(group.fold_block))
        ]

    def names_in(self, block: Range) -> set[str]:
        """The tensors that have elements in a block."""
        group = self.layout[block.group]
        spans = zip(group.names, pairwise(group.bounds), strict=True)
        return {name for name, (begin, end) in spans if begin < block.end and block.begin < end}

    def in_order(self, room: Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Values of a snapshot's sample, in its order."""
        values = np.empty(len(self._order), np.float32)
        values[self._order] = np.concatenate([np.empty(0, np.float32), *(own.float().cpu().numpy() for own in room)])
        return values


@dataclass(frozen=True, eq=False)
class StagedAverages:
    """The averages of one update as they are stored; one of each a profile.

    Attributes:
        copies: the values; those of tensors that are stored in another dtype are in `others`.
        nonfinite: the first tensor that holds a nan or an infinity.
        averages, stored: values of the subset that is measured, exact and as they are stored.
        network: the network's, where known.
        samples: exact values of a snapshot's sample.
    """

    layout: StorageLayout
    copies: Sequence[HostTensors]
    others: Sequence[dict[str, torch.Tensor]]
    nonfinite: Sequence[str | None]
    averages: Sequence[Values]
    stored: Sequence[Values]
    network: Values | None
    samples: Sequence[npt.NDArray[np.float32]]

    def parts(self, index: int) -> dict[str, list[torch.Tensor]]:
        """The tensors of an average as they are stored, each in flat parts."""
        others = {name: [own.view(-1)] for name, own in self.others[index].items()}
        return self.copies[index].parts | others


@torch.no_grad()
def stage(
    layout: StorageLayout, averages: RunningAverages, copies: Sequence[HostTensors], network: BlockReader | None = None,
    crew: Crew = ALONE,
) -> StagedAverages:  # fmt: skip
    """The averages as they are now, in `copies`, which may be pinned and not there before their stream is done.

    `network` reads the model's values then. The results do not depend on the number of threads of the crew.
    """
    profiles, subset = range(len(averages.sigma_rels)), layout.subset
    values, samples = ([own.room() for _ in profiles] for own in (subset, layout.sample))
    norms: list[list[torch.Tensor]] = [[] for _ in layout.pieces]

    def work(number: int, thread: int) -> None:
        block, chunk, begin = layout.pieces[number]
        for index in profiles:
            exact = averages.values(block, index, thread)
            place = copies[index].chunks[block.group][chunk][begin : begin + exact.numel()]
            if exact.device.type == "cpu":
                place.copy_(exact)
            else:
                place.copy_(exact.to(place.dtype), non_blocking=True)
            norms[number].append(torch.linalg.vector_norm(exact))
            subset.take(block, exact, values[index])
            layout.sample.take(block, exact, samples[index])

    crew.each(work, range(len(layout.pieces)))
    known = subset.room()
    if network is not None:
        read = network.values
        crew.each(lambda block, thread: subset.take(block, read(block, thread), known), network.blocks)
    doubtful: list[set[str]] = [set() for _ in profiles]
    for (block, *_), own in zip(layout.pieces, norms, strict=True):
        most = torch.finfo(layout.rooms[block.group].dtype).max
        for index, norm in enumerate(own):
            if not float(norm) <= most:
                doubtful[index] |= layout.names_in(block)
    found = [subset.joined(own) for own in values]
    rounded = [zip(own, layout.rooms, strict=True) for own in values]
    stored = [subset.joined([one.to(room.dtype).to(one.dtype) for one, room in own]) for own in rounded]
    others = [_otherwise(layout, averages, index, doubtful[index], found[index], stored[index]) for index in profiles]
    nonfinite = [nonfinite_name(own) for own in others]
    return StagedAverages(
        layout, copies, others, nonfinite, found, stored, None if network is None else subset.joined(known),
        [layout.in_order(own) for own in samples],
    )  # fmt: skip


def _otherwise(
    layout: StorageLayout, averages: RunningAverages, index: int, doubtful: set[str], measured: Values, stored: Values
) -> dict[str, torch.Tensor]:
    """Tensors of an average in the dtype that they are stored in, where that is another one than their group's.

    These are running statistics, and weights that it does not hold: float32 does, or else float64. Of weights the
    values that are measured are changed in `stored`.
    """
    subset, found = layout.subset, {}
    spans = dict(zip(subset.sizes, pairwise(subset.edges.tolist()), strict=True))
    norms, errors = subset.sums(measured), subset.sums(measured, stored)
    for name, norm, error in zip(spans, norms.tolist(), errors.tolist(), strict=True):
        if not _is_held(norm, error, layout.dtypes[name]):
            doubtful.add(name)
    for name in [name for name in layout.dtypes if name in doubtful or name not in layout.weights]:
        shape, own = layout.shapes[name], layout.dtypes[name]
        (exact,) = averages.read(index, [ElementRange(name, 0, math.prod(shape))])
        kinds = (own, torch.float32) if name in layout.weights else ()
        dtype = next((kind for kind in kinds if _holds(kind, exact)), exact.dtype)
        if name not in layout.weights or dtype != own or not bool(exact.isfinite().all()):
            found[name] = exact.to(dtype).view(shape)
            span = slice(*spans.get(name, (0, 0)))
            stored[span] = measured[span].astype(np.float64 if dtype == torch.float64 else np.float32)
    return found


def _holds(dtype: torch.dtype, exact: torch.Tensor) -> bool:
    error = exact - exact.to(dtype).to(exact.dtype)
    norm, rounding = (float(torch.linalg.vector_norm(own, dtype=torch.float64)) ** 2 for own in (exact, error))
    return _is_held(norm, rounding, dtype)


def _is_held(norm: float, rounding: float, dtype: torch.dtype) -> bool:
    """Whether a dtype holds a tensor with these sums.

    Rounding to nearest costs at most half a unit in the last place, eps / 2 relative; more where a value becomes
    infinite, or all are about as small as the subnormal numbers.
    """
    return math.isfinite(rounding) and rounding <= (torch.finfo(dtype).eps / 2) ** 2 * norm
