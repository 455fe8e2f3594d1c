"""Copies of a model's values on the host, the order of work on accelerators, and what is stored of averages."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.dtypes import torch_dtype
from posthoc_cli.snapshots.format import encode_sample
from posthoc_cli.snapshots.reading import ElementRange
from posthoc_cli.tracker.layout import (
    Bucket,
    Elements,
    HostTensors,
    Layout,
    Tile,
    TileReader,
    Values,
    joined,
    on_host,
    ranges_of,
    tiles_of,
)
from posthoc_cli.tracker.measuring import Subset
from posthoc_cli.tracker.model_tensors import TrackedModel, nonfinite_name
from posthoc_cli.tracker.running import RunningAverages
from posthoc_cli.tracker.worker import ALONE, Crew

FREE_SHARE = 0.1
"""Share of an accelerator's free memory that copies may pass through."""


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
    """An accelerator's memory through which tiles go to the host, in a stream of its own while training goes on.

    It holds all of them where that is a small share of the free memory. Else the training's stream waits, with the
    copying of a tile, until the one that was in its place before has left.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        cuda: Any = torch.cuda
        free = cuda.mem_get_info(device)[0]
        count = min(len(sizes), max(2, int(FREE_SHARE * free) // max(sizes)))
        self._device, self._stream = device, cuda.Stream(device)
        self._buffers = [
            torch.empty(max(sizes[place::count]), dtype=torch.uint8, device=device) for place in range(count)
        ]
        self._sent: list[Any] = [None] * count
        self.nbytes = sum(buffer.nbytes for buffer in self._buffers)

    def send(self, number: int, values: list[torch.Tensor], room: torch.Tensor) -> Any:
        """Have the tile of this number, from 0 on, copied into room on the host; returns the event after it."""
        cuda: Any = torch.cuda
        place, training = number % len(self._buffers), cuda.current_stream(self._device)
        if self._sent[place] is not None:
            training.wait_event(self._sent[place])
        buffer = self._buffers[place]
        passing = buffer[: room.nbytes].view(room.dtype)
        _fill(passing, values)
        self._stream.wait_stream(training)
        with cuda.stream(self._stream):
            room.copy_(passing, non_blocking=True)
        # A thread that waits for a blocking event sleeps, and takes no core from the training.
        self._sent[place] = self._stream.record_event(cuda.Event(blocking=True))
        # When it is freed, torch must not use its memory again before both streams are done with it.
        for user in (self._stream, training):
            buffer.record_stream(user)
        return self._sent[place]


def _fill(flat: torch.Tensor, values: list[torch.Tensor]) -> None:
    """Copy flat tensors end to end."""
    torch._foreach_copy_([*torch.split(flat, [value.numel() for value in values])], values)


# --- the model's values


@dataclass(frozen=True, eq=False)
class ModelCopy:
    """A model's values at one moment on the host, in their own dtypes; they are there after the `events`."""

    host: HostTensors
    values: TileReader
    events: tuple[Any, ...] = ()

    def arrived(self) -> TileReader:
        """The values; waits until they are there."""
        for event in self.events:
            event.synchronize()
        return self.values


class ModelCopier:
    """Copies a model's values to memory on the host, which it uses again, to be read by so many threads.

    `nbytes` is what it holds, there and on accelerators: with a copy that nobody has given back, too.
    """

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._free: deque[ModelCopy] = deque(maxlen=1)  # one is enough, and old layouts go
        self._layout: Layout = ()
        self._rings: dict[torch.device, _Ring] = {}
        self._host_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._host_bytes + sum(ring.nbytes for ring in self._rings.values())

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, model: TileReader, crew: Crew = ALONE) -> ModelCopy:
        """A copy of the values as they are now; `give_back` it. From accelerators the crew must be the caller alone."""
        layout, sizes = model.layout, defaultdict(list)
        if layout != self._layout:
            for tile in model.tiles:
                if (bucket := layout[tile.bucket]).device.type == "cuda":
                    sizes[bucket.device].append((tile.end - tile.begin) * bucket.dtype.itemsize)
            self._rings = {device: _Ring(device, own) for device, own in sizes.items()}
            self._layout = layout
        copy = self._free.pop() if self._free else None
        if copy is None or copy.host.layout != on_host(layout):
            host = HostTensors(on_host(layout), pinned=bool(self._rings))
            copy = ModelCopy(host, TileReader.of_host(host, self._threads))
            self._host_bytes = host.nbytes
        host, events = copy.host, dict[torch.device, Any]()
        counts: dict[torch.device, int] = defaultdict(int)

        def work(tile: Tile, _: int) -> None:
            device = layout[tile.bucket].device
            (room,) = host.flat(tile.bucket, tile.begin, tile.end)
            if device in self._rings:  # its stream keeps order: the last event is enough
                events[device] = self._rings[device].send(counts[device], model.current(tile), room)
                counts[device] += 1
            else:
                _fill(room, model.current(tile))

        crew.each(work, model.tiles)
        return replace(copy, events=tuple(events.values()))

    def give_back(self, copy: ModelCopy) -> None:
        """Take back a copy that has arrived and is no longer needed; from any thread."""
        self._free.append(copy)


# --- what is stored of averages


class StorageLayout:
    """How averages of a layout are stored, and which of their elements are measured.

    Attributes:
        stored: the same buckets on the host in the storage dtype.
        weights: names of tensors that are measured and rounded: not running statistics.
        shapes, dtypes: of all, as they are stored if their values fit.
        subset: elements of the weights that are measured.
        sample: those of a snapshot's sample.
    """

    def __init__(self, layout: Layout, tracked: TrackedModel, dtype: str | None) -> None:
        self.layout, self.tracked = layout, tracked
        self.stored = tuple(replace(b, dtype=torch_dtype(dtype) if dtype else b.dtype) for b in on_host(layout))
        self.weights = frozenset(tracked.weights)
        self.subset = Subset(layout, self.weights)
        self.shapes = {n: shape for bucket in layout for n, shape in zip(bucket.names, bucket.shapes, strict=True)}
        self.dtypes = {name: bucket.dtype for bucket in self.stored for name in bucket.names}
        places = {name: (at, begin) for at, b in enumerate(layout) for name, (begin, _) in b.places.items()}
        sampled = np.array([(places[n][0], places[n][1] + i) for n, i in tracked.sampled], np.int64).reshape(-1, 2)
        self._order = np.lexsort(sampled.T[::-1])
        ordered = sampled[self._order]
        self.sample = Elements(layout, [ordered[ordered[:, 0] == at, 1] for at in range(len(layout))])

    def in_order(self, room: Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Values of a snapshot's sample, in its order."""
        values = np.empty(len(self._order), np.float32)
        with np.errstate(over="ignore"):  # what float32 cannot hold is infinite
            values[self._order] = joined(room)
        return values


@dataclass(frozen=True, eq=False)
class StagedAverages:
    """The averages of one update as they are stored; one of each a profile.

    Attributes:
        copies: the values; those of tensors that are stored in another dtype are in `others`.
        nonfinite: the first tensor that holds a nan or an infinity.
        averages, stored: values of the subset that is measured, exact and as they are stored.
        network: the network's, where known.
        samples: of exact values and the network's, as a header has them; empty where the network's are not known.
    """

    layout: StorageLayout
    copies: Sequence[HostTensors]
    others: Sequence[dict[str, torch.Tensor]]
    nonfinite: Sequence[str | None]
    averages: Sequence[Values]
    stored: Sequence[Values]
    network: Values | None
    samples: Sequence[str]

    def flats(self, index: int) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """The tensors of `copies` that are stored: several end to end in one flat tensor, or one in several."""
        copies, others = self.copies[index], self.others[index]
        for at, (bucket, edges) in enumerate(zip(copies.layout, copies.edges, strict=True)):

            def slabs(name: str, bucket: Bucket = bucket, edges: Sequence[int] = edges) -> tuple[int, int] | None:
                begin, end = bucket.places[name]
                return None if name in others else (bisect_right(edges, begin), bisect_left(edges, end))

            for held, own in groupby(bucket.names, slabs):
                names = [*own]
                if held is not None:
                    yield names, copies.flat(at, bucket.places[names[0]][0], bucket.places[names[-1]][1])


@torch.no_grad()
def stage(
    layout: StorageLayout, averages: RunningAverages, copies: Sequence[HostTensors],
    network: Sequence[torch.Tensor] | None = None, crew: Crew = ALONE,
) -> StagedAverages:  # fmt: skip
    """The averages as they are now, in `copies`, which may be pinned and not there before their stream is done.

    `network` is a room with the model's values of the subset. The results do not depend on the crew's threads.
    """
    profiles, subset = range(len(averages.sigma_rels)), layout.subset
    values, samples = ([own.room() for _ in profiles] for own in (subset, layout.sample))
    tiles = tiles_of(layout.layout)
    norms: list[list[torch.Tensor]] = [[] for _ in tiles]

    def work(tile: Tile, thread: int) -> None:
        for index in profiles:
            exact = averages.values(tile, index, thread)
            (room,) = copies[index].flat(tile.bucket, tile.begin, tile.end)
            if exact.device.type == "cpu":
                room.copy_(exact)
            else:
                room.copy_(exact.to(room.dtype), non_blocking=True)
            norms[tile.number].append(torch.linalg.vector_norm(exact))
            subset.take(tile, exact, values[index])
            layout.sample.take(tile, exact, samples[index])

    crew.each(work, tiles)
    doubtful: list[set[str]] = [set() for _ in profiles]
    for tile, own, held in zip(tiles, norms, ranges_of(layout.layout), strict=True):
        most = torch.finfo(layout.stored[tile.bucket].dtype).max
        for index, norm in enumerate(own):
            if not float(norm) <= most:
                doubtful[index] |= {one.name for one in held}
    found = [joined(own) for own in values]
    rounded = [zip(own, layout.stored, strict=True) for own in values]
    stored = [joined([one.to(bucket.dtype).to(one.dtype) for one, bucket in own]) for own in rounded]
    others = [_otherwise(layout, averages, index, doubtful[index], found[index], stored[index]) for index in profiles]
    nonfinite = [nonfinite_name(own) for own in others]
    known, measured = averages.sample, None if network is None else joined(network)
    told = ["" if known is None else encode_sample(*map(layout.in_order, (known, own))) for own in samples]
    return StagedAverages(layout, copies, others, nonfinite, found, stored, measured, told)


def _otherwise(
    layout: StorageLayout, averages: RunningAverages, index: int, doubtful: set[str], measured: Values, stored: Values
) -> dict[str, torch.Tensor]:
    """Tensors of an average in the dtype that they are stored in, where that is another one than their bucket's.

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


def squared_norms(averages: RunningAverages, measured: Iterable[str]) -> dict[float, float]:
    """The squared norm of each average, as it would be in a snapshot, by its sigma_rel."""
    kept = averages.tensors
    assert kept is not None
    subset, found = Subset(kept.layout, measured), {}
    for index, sigma_rel in enumerate(averages.sigma_rels):
        room = subset.room()
        for tile in tiles_of(kept.layout):
            subset.take(tile, averages.values(tile, index), room)
        found[sigma_rel] = subset.squared(joined(room))
    return found
