"""Copies of a model's values on the host, the order of work on accelerators, and the averages as they are stored."""

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
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.path import encode_sample
from posthoc_cli.snapshots.sources import ElementRange
from posthoc_cli.tracker.averages import Averages
from posthoc_cli.tracker.layout import (
    Bucket,
    BucketTile,
    Elements,
    HostTensors,
    Layout,
    LayoutReader,
    Values,
    joined,
    on_host,
    ranges_of,
    tiles_of,
)
from posthoc_cli.tracker.measuring import Subset
from posthoc_cli.tracker.model_tensors import TrackedModel, nonfinite_name
from posthoc_cli.tracker.worker import SINGLE_THREAD, ThreadPool

FREE_SHARE = 0.1
"""Largest share of an accelerator's free memory that is used as a buffer for copies to the host."""


# --- accelerators

Streams = dict[torch.device, Any]
DeviceEvents = tuple[tuple[torch.device, Any], ...]  # a CUDA event a device: it ends when the work queued before it has


class DeviceStreams:
    """Orders a tracker's threads on accelerators, each in its own streams; `last_events` mark the last update's end."""

    def __init__(self) -> None:
        self.last_events: DeviceEvents = ()
        self._own: Streams = {}

    @staticmethod
    def current(devices: Iterable[torch.device]) -> Streams:
        """Return the streams that the calling thread uses on these devices."""
        return {device: torch.cuda.current_stream(device) for device in {*devices} if device.type == "cuda"}

    @staticmethod
    def record_events(streams: Streams) -> DeviceEvents:
        """Record events after the work that is queued in the streams so far."""
        return tuple((device, stream.record_event()) for device, stream in streams.items())

    @contextmanager
    def in_streams_of_caller(self, streams: Streams) -> Iterator[None]:
        """Work in the streams of another thread, which waits for the block; set `last_events` at its end."""
        with ExitStack() as stack:
            for stream in streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            yield
            self.last_events = self.record_events(streams)

    @contextmanager
    def in_own_streams(self) -> Iterator[None]:
        """Work in separate streams, after the last update, and wait for that work at the end of the block."""
        cuda: Any = torch.cuda
        with ExitStack() as stack:
            for device, event in self.last_events:
                if device not in self._own:
                    self._own[device] = cuda.Stream(device)
                self._own[device].wait_event(event)
                stack.enter_context(cuda.stream(self._own[device]))
            yield
            for device, _ in self.last_events:
                self._own[device].synchronize()


class _Ring:
    """A ring of buffers on an accelerator, through which tiles go to the host in a separate stream.

    The ring holds all tiles if they take a small share of the free memory. Otherwise the training stream waits, before
    it fills a buffer, until the tile that the buffer held before has been copied to the host.
    """

    def __init__(self, device: torch.device, sizes: Sequence[int]) -> None:
        cuda: Any = torch.cuda
        free = cuda.mem_get_info(device)[0]
        count = min(len(sizes), max(2, int(FREE_SHARE * free) // max(sizes)))
        self._device, self._stream = device, cuda.Stream(device)
        self._buffers = [
            torch.empty(max(sizes[index::count]), dtype=torch.uint8, device=device) for index in range(count)
        ]
        self._sent: list[Any] = [None] * count  # each buffer's last event
        self.nbytes = sum(buffer.nbytes for buffer in self._buffers)

    def send(self, number: int, values: list[torch.Tensor], out: torch.Tensor) -> Any:
        """Queue the copy of tile `number`, counted from 0, to `out` on the host; return the event after the copy."""
        cuda: Any = torch.cuda
        index, training = number % len(self._buffers), cuda.current_stream(self._device)
        if self._sent[index] is not None:
            training.wait_event(self._sent[index])
        buffer = self._buffers[index]
        staged = buffer[: out.nbytes].view(out.dtype)
        _fill(staged, values)
        self._stream.wait_stream(training)
        with cuda.stream(self._stream):
            out.copy_(staged, non_blocking=True)
        # A thread that waits for a blocking event sleeps, and takes no core from the training.
        self._sent[index] = self._stream.record_event(cuda.Event(blocking=True))
        # torch must not reuse a freed buffer's memory before both streams have finished with the buffer.
        for user in (self._stream, training):
            buffer.record_stream(user)
        return self._sent[index]


def _fill(flat: torch.Tensor, values: list[torch.Tensor]) -> None:
    """Copy flat tensors end to end into `flat`."""
    torch._foreach_copy_([*torch.split(flat, [value.numel() for value in values])], values)


# --- the model's values


@dataclass(frozen=True, eq=False)
class ModelCopy:
    """A model's values at one moment, on the host, in the model's dtypes; complete after the `events`."""

    host: HostTensors
    values: LayoutReader
    events: tuple[Any, ...] = ()

    def arrived(self) -> LayoutReader:
        """Wait until all values have arrived, and return a reader of them."""
        for event in self.events:
            event.synchronize()
        return self.values


class ModelCopier:
    """Copies a model's values to memory on the host, which it reuses, for readers of `threads` threads."""

    def __init__(self, threads: int = 1) -> None:
        self._threads = threads
        self._free: deque[ModelCopy] = deque(maxlen=1)  # one is enough, and copies of old layouts drop out
        self._layout: Layout = ()
        self._rings: dict[torch.device, _Ring] = {}
        self._host_bytes = 0

    @property
    def nbytes(self) -> int:
        """Bytes of memory on the host and on accelerators, including a copy that is in use."""
        return self._host_bytes + sum(ring.nbytes for ring in self._rings.values())

    @torch.inference_mode(False)
    @torch.no_grad()
    def copy(self, model: LayoutReader, pool: ThreadPool = SINGLE_THREAD) -> ModelCopy:
        """Copy the values as they are now; `give_back` the copy. From accelerators `pool` must be `SINGLE_THREAD`."""
        layout, sizes = model.layout, defaultdict(list)
        if layout != self._layout:
            for tile in model.tiles:
                if (bucket := layout[tile.bucket]).device.type == "cuda":
                    sizes[bucket.device].append((tile.end - tile.begin) * bucket.dtype.itemsize)
            self._rings = {device: _Ring(device, nbytes) for device, nbytes in sizes.items()}
            self._layout = layout
        copy = self._free.pop() if self._free else None
        if copy is None or copy.host.layout != on_host(layout):
            host = HostTensors(on_host(layout), pinned=bool(self._rings))
            copy = ModelCopy(host, LayoutReader.of_host(host, self._threads))
            self._host_bytes = host.nbytes
        host, events = copy.host, dict[torch.device, Any]()
        counts: dict[torch.device, int] = defaultdict(int)

        def copy_tile(tile: BucketTile, _: int) -> None:
            device = layout[tile.bucket].device
            (out,) = host.flat(tile.bucket, tile.begin, tile.end)
            if device in self._rings:  # a stream keeps order: the last event is enough
                events[device] = self._rings[device].send(counts[device], model.current(tile), out)
                counts[device] += 1
            else:
                _fill(out, model.current(tile))

        pool.each(copy_tile, model.tiles)
        return replace(copy, events=tuple(events.values()))

    def give_back(self, copy: ModelCopy) -> None:
        """Take back a copy that has arrived and is no longer needed; may be called from any thread."""
        self._free.append(copy)


# --- what is stored of averages


class StorageLayout:
    """How averages of a layout are stored, and which of their elements are measured.

    Attributes:
        stored: the same buckets on the host in the storage dtype.
        weights: names of the tensors that are measured and rounded: all but running statistics.
        shapes, dtypes: the shape of each tensor, and the dtype that it is stored in if its values fit.
        subset: the elements of the weights that are measured.
        sample: the elements of a snapshot's sample.
    """

    def __init__(self, layout: Layout, tracked: TrackedModel, dtype: str | None) -> None:
        self.layout, self.tracked = layout, tracked
        self.stored = tuple(replace(b, dtype=torch_dtype(dtype) if dtype else b.dtype) for b in on_host(layout))
        self.weights = frozenset(tracked.weights)
        self.subset = Subset(layout, self.weights)
        self.shapes = {n: shape for bucket in layout for n, shape in zip(bucket.names, bucket.shapes, strict=True)}
        self.dtypes = {name: bucket.dtype for bucket in self.stored for name in bucket.names}
        places = {name: (index, begin) for index, b in enumerate(layout) for name, (begin, _) in b.places.items()}
        sampled = [(places[name][0], places[name][1] + i) for name, i in tracked.sampled.values()]
        pairs = np.array(sampled, np.int64).reshape(-1, 2)
        self._order = np.lexsort(pairs.T[::-1])
        ordered = pairs[self._order]
        self.sample = Elements(layout, [ordered[ordered[:, 0] == index, 1] for index in range(len(layout))])

    def in_order(self, buffers: Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Return the values of a snapshot's sample, one buffer a bucket, in the sample's order."""
        values = np.empty(len(self._order), np.float32)
        with np.errstate(over="ignore"):  # values that float32 cannot hold become infinite
            values[self._order] = joined(buffers)
        return values


@dataclass(frozen=True, eq=False)
class StagedAverages:
    """The averages of one update as they are stored; each list has one item a profile.

    Attributes:
        copies: the values, except tensors that are stored in another dtype, which are in `others`.
        nonfinite: the first tensor that holds a nan or an infinity.
        measurements: of each average.
        samples: the exact and the model's values of the sample, encoded for the header; "" if the model's are unknown.
    """

    layout: StorageLayout
    copies: Sequence[HostTensors]
    others: Sequence[dict[str, torch.Tensor]]
    nonfinite: Sequence[str | None]
    measurements: Sequence[Measurements | None]
    samples: Sequence[str]

    def flats(self, index: int) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Yield the stored tensors of `copies`: several end to end in one flat tensor, or one in several."""
        copies, others = self.copies[index], self.others[index]
        for number, (bucket, edges) in enumerate(zip(copies.layout, copies.edges, strict=True)):

            def slabs(name: str, bucket: Bucket = bucket, edges: Sequence[int] = edges) -> tuple[int, int] | None:
                begin, end = bucket.places[name]
                return None if name in others else (bisect_right(edges, begin), bisect_left(edges, end))

            for span, group in groupby(bucket.names, slabs):
                names = [*group]
                if span is not None:
                    yield names, copies.flat(number, bucket.places[names[0]][0], bucket.places[names[-1]][1])


@torch.no_grad()
def stage(
    layout: StorageLayout, averages: Averages, copies: Sequence[HostTensors], pool: ThreadPool = SINGLE_THREAD
) -> StagedAverages:
    """Round the averages as they are now into `copies`, which may be pinned: complete when the current stream is.

    Results do not depend on the pool's threads.
    """
    profiles, subset = range(len(averages.sigma_rels)), layout.subset
    subset_buffers, samples = ([elements.buffers() for _ in profiles] for elements in (subset, layout.sample))
    tiles = tiles_of(layout.layout)
    norms: list[list[torch.Tensor]] = [[] for _ in tiles]

    def stage_tile(tile: BucketTile, thread: int) -> None:
        for index in profiles:
            exact = averages.values(tile, index, thread)
            (out,) = copies[index].flat(tile.bucket, tile.begin, tile.end)
            if exact.device.type == "cpu":
                out.copy_(exact)
            else:
                out.copy_(exact.to(out.dtype), non_blocking=True)
            norms[tile.number].append(torch.linalg.vector_norm(exact))
            subset.take(tile, exact, subset_buffers[index])
            layout.sample.take(tile, exact, samples[index])

    pool.each(stage_tile, tiles)
    doubtful: list[set[str]] = [set() for _ in profiles]
    for tile, tile_norms, ranges in zip(tiles, norms, ranges_of(layout.layout), strict=True):
        largest = torch.finfo(layout.stored[tile.bucket].dtype).max
        for index, norm in enumerate(tile_norms):
            if not float(norm) <= largest:
                doubtful[index] |= {piece.name for piece in ranges}
    measured = [joined(buffers) for buffers in subset_buffers]
    paired = [zip(buffers, layout.stored, strict=True) for buffers in subset_buffers]
    stored = [joined([values.to(bucket.dtype).to(values.dtype) for values, bucket in pairs]) for pairs in paired]
    others = [
        _stored_in_other_dtypes(layout, averages, index, doubtful[index], measured[index], stored[index])
        for index in profiles
    ]
    nonfinite = [nonfinite_name(tensors) for tensors in others]
    weights = averages.sample
    encoded = ["" if weights is None else encode_sample(*map(layout.in_order, (weights, exact))) for exact in samples]
    measurements = [subset.measured(*values) for values in zip(measured, stored, strict=True)]
    return StagedAverages(layout, copies, others, nonfinite, measurements, encoded)


def _stored_in_other_dtypes(
    layout: StorageLayout, averages: Averages, index: int, doubtful: set[str], measured: Values, stored: Values
) -> dict[str, torch.Tensor]:
    """Return the tensors of an average that are stored in another dtype than their bucket's, in that dtype.

    These are running statistics, and weights that their bucket's dtype cannot hold: those are stored in float32, or
    else in float64, and their measured values are changed in `stored`.
    """
    subset, found = layout.subset, {}
    spans = dict(zip(subset.sizes, pairwise(subset.edges.tolist()), strict=True))
    norms, errors = subset.sums(measured), subset.sums(measured, stored)
    for name, norm, error in zip(spans, norms.tolist(), errors.tolist(), strict=True):
        if not _is_accurate(norm, error, layout.dtypes[name]):
            doubtful.add(name)
    for name in [name for name in layout.dtypes if name in doubtful or name not in layout.weights]:
        shape, usual = layout.shapes[name], layout.dtypes[name]
        (exact,) = averages.read(index, [ElementRange(name, 0, math.prod(shape))])
        candidates = (usual, torch.float32) if name in layout.weights else ()
        dtype = next((candidate for candidate in candidates if _holds(candidate, exact)), exact.dtype)
        if name not in layout.weights or dtype != usual or not bool(exact.isfinite().all()):
            found[name] = exact.to(dtype).view(shape)
            span = slice(*spans.get(name, (0, 0)))
            stored[span] = measured[span].astype(np.float64 if dtype == torch.float64 else np.float32)
    return found


def _holds(dtype: torch.dtype, exact: torch.Tensor) -> bool:
    """Return whether a dtype holds a tensor as accurately as ordinary values."""
    error = exact - exact.to(dtype).to(exact.dtype)
    norm, rounding = (float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2 for values in (exact, error))
    return _is_accurate(norm, rounding, dtype)


def _is_accurate(norm: float, rounding: float, dtype: torch.dtype) -> bool:
    """Return whether the squared rounding error of a tensor of this squared norm is that of ordinary values.

    Rounding to nearest costs at most half a unit in the last place, eps / 2 relative; more if a value becomes infinite,
    or if all values are about as small as the dtype's subnormal numbers.
    """
    return math.isfinite(rounding) and rounding <= (torch.finfo(dtype).eps / 2) ** 2 * norm


def measured_now(subset: Subset, averages: Averages, pool: ThreadPool = SINGLE_THREAD) -> list[Measurements | None]:
    """Return the measurements of the averages as they are now, not rounded."""
    profiles = range(len(averages.sigma_rels))
    buffers = [subset.buffers() for _ in profiles]

    def take(tile: BucketTile, thread: int) -> None:
        for index in profiles:
            subset.take(tile, averages.values(tile, index, thread), buffers[index])

    pool.each(take, tiles_of(subset.layout))
    return [subset.measured(joined(values)) for values in buffers]
