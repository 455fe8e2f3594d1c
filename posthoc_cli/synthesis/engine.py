"""The engine of a synthesis: threads read, verify, convert and sum tiles, in constant memory.

`synthesize` streams tensors; `synthesize_into` hands tiles to writers.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.dtypes import ITEM_BYTES, torch_dtype
from posthoc_cli.errors import InvalidValueError, NonFiniteError
from posthoc_cli.files import is_url
from posthoc_cli.resources import worker_count
from posthoc_cli.snapshots.reading import TensorReader
from posthoc_cli.snapshots.sources import FileSource, ReadRanges, Snapshot, all_open
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.synthesis.tiles import Scratch, Tile, cut_tiles, open_tile

# --- sums
#
# One target is summed by additions, several by matrix products, of which a library may sum the terms in any order; so
# another target in the same pass may change the last bits. Neither tiles nor the number of threads do: both ways take
# whole columns, so that every element goes through the same instructions wherever a chunk ends.

SLOTS = 64
"""Sources of one matrix product."""

COLUMNS = 16_384
"""Columns of one matrix product: the widest at which its operands stay in the second-level cache (measured)."""


class Sums:
    """One thread's buffers for the sums of a chunk: [targets, chunk], and slots for the sources of a matrix product.

    For every chunk: `start`, then for each source in order fill `slot(i)` and call `add(i)`, then `result`.

    Arguments:
        coefficients: float64, shape [sources, targets].
        chunk: elements of a chunk, a multiple of COLUMNS.
        wide: dtype of the sums.
        device: where they are made.
    """

    def __init__(
        self, coefficients: npt.NDArray[np.float64], chunk: int, wide: torch.dtype, device: torch.device
    ) -> None:
        self._sources, targets = coefficients.shape
        self._slot_count = 1 if targets == 1 else min(SLOTS, self._sources)
        self._scales = coefficients.tolist()
        self._matrix = torch.from_numpy(coefficients.T.copy()).to(device, wide)
        # Zeros: a nan beyond a shorter chunk would slow the arithmetic down.
        self._totals = torch.zeros(targets, chunk, dtype=wide, device=device)
        self._values = torch.zeros(self._slot_count, chunk, dtype=wide, device=device)
        self._weights = torch.full((chunk,), 2.0**-20, dtype=wide, device=device)
        self._size = self._padded = -1  # none yet: a chunk may be empty

    def start(self, size: int) -> None:
        """Begin the sums of a chunk of `size` elements."""
        if size != self._size:
            self._size, self._padded = size, -(-size // COLUMNS) * COLUMNS
            self._slots = [row[:size] for row in self._values.unbind()]
            self._terms = [row[: self._padded] for row in self._values.unbind()]
            self._rows = [row[: self._padded] for row in self._totals.unbind()]

    def slot(self, source: int) -> torch.Tensor:
        """Where the values of a source go: shape [size]."""
        return self._slots[source % self._slot_count]

    def add(self, source: int) -> None:
        """Add the values in the slot."""
        count = source % self._slot_count + 1
        if count < self._slot_count and source + 1 < self._sources:
            return
        first = source + 1 - count
        if self._slot_count > 1 and has_full_precision():
            matrix, values = self._matrix[:, first : source + 1], self._values[:count, : self._padded]
            multiply(matrix, values, self._totals[:, : self._padded], first == 0)
            return
        for index in range(first, source + 1):
            for total, scale in zip(self._rows, self._scales[index], strict=True):
                (total.zero_() if index == 0 else total).add_(self._terms[index - first], alpha=scale)

    def result(self) -> torch.Tensor:
        """The sums, shape [targets, size]; valid until the next `start`."""
        return self._totals[:, : self._size]

    def surely_finite(self) -> bool:
        """Whether no sum is nan or infinite; False also where the test itself overflows.

        A weighted sum over all elements reads them once, at the speed of memory; no other test does.
        """
        return bool(torch.mv(self.result(), self._weights[: self._size]).isfinite().all())


def multiply(matrix: torch.Tensor, values: torch.Tensor, sums: torch.Tensor, first: bool) -> None:
    """Add [rows, sources] x [sources, n x COLUMNS] to the sums, or begin them with it, COLUMNS at a time."""
    for begin in range(0, values.shape[1], COLUMNS):
        own = sums[:, begin : begin + COLUMNS]
        torch.addmm(own, matrix, values[:, begin : begin + COLUMNS], beta=0 if first else 1, out=own)


def has_full_precision() -> bool:
    """Whether torch's settings keep all bits of a matrix product's factors (no TF32); a program may change them."""
    backends: Any = torch.backends
    try:
        allowed = {backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
    except AttributeError:  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return allowed <= {"none", "ieee"}


# --- tiles on threads


Progress = Callable[[int], None]
"""Called with the number of bytes just read, in the thread that synthesizes."""

ONE_TARGET_CHUNK = 524_288
"""Elements of a chunk for one target: smaller ones stay in the second-level cache, but two threads then wait for each
other's short calls (measured on two cores: 65,536 elements 5.6 GB/s, 262,144 11.3, 524,288 12.6)."""

CHUNK = 32_768
"""The same for several targets, whose sums need room for a row a source and a row a target."""

REMOTE_CHUNK, REMOTE_THREADS = 131_072, 4
"""The same for one target of objects in a store, so that the chunks of all sources fit into what is asked for ahead;
and threads at least, of which some wait for the network while others work."""


@dataclass(frozen=True)
class Options:
    """How tensors are made. None of it changes a value beyond its last rounding.

    Attributes:
        device: where the sums are made.
        workers: threads; None for one a core. The results are the same bits for any number.
        progress: called with the bytes read so far.
    """

    device: torch.device | str = "cpu"
    workers: int | None = None
    progress: Progress | None = None


def synthesize(plan: Plan, options: Options = Options()) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Stream the targets' tensors: (name, one tensor a target), on `options.device`. Small tensors come in batches.

    Memory is needed for a few chunks a thread, and for the tensors that the next few tiles belong to.

    Raises:
        FileFormatError: a snapshot is damaged, naming it and the tensor.
        NonFiniteError: a result is not finite, or the plan's dtype cannot hold it, naming the tensor.
    """
    device = check_device(options.device)
    shapes = {name: plan.newest.stored[name].shape for name in plan.tensors}
    outputs = [TensorOutput(shapes, device) for _ in plan.targets]
    with closing(synthesize_into(plan, outputs, options)) as made:
        for tile in made:
            for name in tile.names if tile.last else ():
                values = [output.tensors.pop(name) for output in outputs]
                for alias in tile.aliases[name]:
                    yield alias, list(values)
                del values  # not held while the next tensor is made


def synthesize_into(plan: Plan, outputs: Sequence[Output], options: Options = Options()) -> Generator[Tile, None, None]:
    """Synthesize into outputs; yields the tiles as they are complete, in order.

    No more than two tiles a thread are under way. Whatever ends the iteration, an error in a thread, Ctrl-C or a
    caller that stops iterating, first stops every thread, within a chunk.

    Arguments:
        outputs: one a target. Tiles are opened in the caller's thread, and written in another.
    """
    device = check_device(options.device)
    is_remote = any(isinstance(one, FileSource) and is_url(one.path) for one in plan.sources)
    alone = REMOTE_CHUNK if is_remote else ONE_TARGET_CHUNK
    size = alone if len(plan.targets) == 1 else CHUNK
    wide = "F32" if device.type == "mps" else None  # which has no float64
    tiles = deque((one, tile) for one in plan.passes() for tile in cut_tiles(one, size, wide))
    least = REMOTE_THREADS if is_remote and options.workers is None else 1
    workers = min(max(least, worker_count(options.workers)), max(1, len(tiles)))
    own, stop, threads = threading.local(), threading.Event(), torch.get_num_threads()
    waiting: deque[Future[Tile]] = deque()

    def work(one: Plan, tile: Tile, writers: Sequence[TileWriter], ready: Any) -> Tile:
        with torch.inference_mode(False), torch.no_grad():
            try:
                if not hasattr(own, "maker") or own.maker.plan is not one:
                    own.maker = Maker(one, opened, device, size)
                own.maker.make(tile, writers, stop, ready)
            except BaseException:
                stop.set()
                raise
        return tile

    with ExitStack() as stack:
        opened = stack.enter_context(all_open(plan.sources))
        # One thread of torch in each of these: the tiles run side by side instead.
        pool = stack.enter_context(ThreadPoolExecutor(workers, "ema-synthesis", torch.set_num_threads, (1,)))
        try:
            while tiles or waiting:
                if tiles and len(waiting) < 2 * workers:
                    one, tile = tiles.popleft()
                    writers = [output.open_tile(tile) for output in outputs]
                    waiting.append(pool.submit(work, one, tile, writers, caller_event(device)))
                    continue
                tile = waiting.popleft().result()
                if options.progress is not None:
                    options.progress(tile.stored_bytes)
                yield tile
        except Stopped:
            errors = [future.exception() for future in waiting if not future.cancelled()]
            raise next(error for error in errors if error is not None and not isinstance(error, Stopped)) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # also for threads that begin later


class Output(Protocol):
    """Takes the tiles of one target, several at a time, in any threads."""

    def open_tile(self, tile: Tile) -> TileWriter:
        """A writer for a tile."""


class TileWriter:
    """Takes one tile of one target; one thread uses it. This one drops it: all is verified, and nothing changed."""

    def write(self, begin: int, values: torch.Tensor) -> None:
        """Take the elements of the tile from `begin` on, which follow those before; `values` is reused afterwards."""

    def close(self) -> None:
        """The tile is complete."""


class TensorOutput:
    """Makes tensors of these shapes, on a device: those that are begun or complete are in `tensors`."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes, self._device = shapes, device
        self.tensors: dict[str, torch.Tensor] = {}

    def open_tile(self, tile: Tile) -> TileWriter:
        """See `Output`."""
        with torch.inference_mode(False):  # the caller may have set a mode
            for name in tile.names:
                if name not in self.tensors:
                    dtype = torch_dtype(tile.dtype)
                    self.tensors[name] = torch.empty(self._shapes[name], dtype=dtype, device=self._device)
        return TensorTile([self.tensors[name] for name in tile.names], tile)


class TensorTile(TileWriter):
    """Writes a tile into its tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor], tile: Tile) -> None:
        self._begin = tile.ranges[0].begin
        self._sizes = [end - begin for begin, end in pairwise(tile.bounds)]
        self._flat = [tensor.view(-1) for tensor in tensors]

    def write(self, begin: int, values: torch.Tensor) -> None:
        """See `TileWriter`."""
        if len(self._flat) == 1:
            start = self._begin + begin
            self._flat[0][start : start + values.numel()].copy_(values)
        else:
            torch._foreach_copy_(self._flat, torch.split(values, self._sizes))


# --- devices and threads -----------------------------------------------------------------------------


def check_device(device: torch.device | str) -> torch.device:
    """The device to make sums on; of `cuda` the calling thread's current one, which is another in other threads.

    "auto" is always the CPU: every byte is read and verified there in any case, and the sums take a fraction of that
    time; `scripts/bench_synthesis.py --device cuda` prints both.

    Raises:
        InvalidValueError: no such device, or one that cannot be used; the hint lists those there are.
    """
    reason = "holds no values"
    try:
        found = torch.device("cpu" if device == "auto" else device)
        if found.type != "meta":
            return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, TypeError) as error:  # the second where torch was built without it
        reason = f"cannot be used: {str(error).partition(chr(10))[0]}"
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    there += ["mps"] * torch.backends.mps.is_available()
    raise InvalidValueError("device", reason, f"choose from auto, {', '.join(there)}", value=f"{str(device)!r}")


def caller_event(device: torch.device) -> Any:
    """The event after which all work that the calling thread's stream has on a device is done; None for the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class Stopped(Exception):  # noqa: N818
    """Raised in a thread that another one's error has stopped."""


class Maker:
    """Makes tiles in one thread, in buffers of its own."""

    def __init__(
        self, plan: Plan, opened: Sequence[TensorReader | ReadRanges], device: torch.device, chunk: int
    ) -> None:
        self.plan, self._opened, self._device, self._chunk = plan, opened, device, chunk
        self._scratch = Scratch(chunk * max(ITEM_BYTES.values()), device)
        self._sums: dict[str, Sums] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None

    def make(self, tile: Tile, writers: Sequence[TileWriter], stop: threading.Event, opened: Any) -> None:
        """Make all targets of a tile for its writers, one a target; `stop` ends it with `Stopped`.

        `opened` is the caller's event after which the sources can be read and the results written.
        """
        with self._own_stream(opened):
            self._copy(tile, writers, stop) if tile.role == "copy" else self._average(tile, writers, stop)
            for writer in writers:
                writer.close()

    @contextmanager
    def _own_stream(self, opened: Any) -> Iterator[None]:
        """Work in this thread's stream, and wait for it: the caller frees the results on an error."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(opened)
            try:
                yield
            finally:
                self._stream.synchronize()

    def _copy(self, tile: Tile, writers: Sequence[TileWriter], stop: threading.Event) -> None:
        reader = open_tile(self._opened[self.plan.sources.index(self.plan.newest)], tile)
        for begin, end in tile.steps(self._chunk):
            if stop.is_set():
                raise Stopped
            values = self._buffer(tile.dtype)[: end - begin]
            reader.read_into(values, begin, self._scratch)
            for writer in writers:
                writer.write(begin, values)

    def _average(self, tile: Tile, writers: Sequence[TileWriter], stop: threading.Event) -> None:
        readers = [open_tile(source, tile) for source in self._opened]
        sums = self._sums_in(tile.wide)
        for begin, end in tile.steps(self._chunk):
            sums.start(end - begin)
            smallest: torch.Tensor | None = None
            for index, reader in enumerate(readers):
                if stop.is_set():
                    raise Stopped
                reader.read_into(sums.slot(index), begin, self._scratch)
                if tile.role == "variance":
                    stored = sums.slot(index)
                    smallest = stored.clone() if smallest is None else smallest.minimum(stored)
                sums.add(index)
            result = sums.result()
            if smallest is not None:  # coefficients that extrapolate can make a small variance 0 or negative
                result.copy_(result.maximum(smallest / 2))
            if not sums.surely_finite() or result.dtype != torch_dtype(tile.dtype):
                try:
                    check_finite(tile, begin, result)
                except NonFiniteError:
                    self._check_checkpoints(tile)
                    raise
            for total, writer in zip(result, writers, strict=True):
                writer.write(begin, self._cast(total, tile.dtype))

    def _check_checkpoints(self, tile: Tile) -> None:
        """Raise a NonFiniteError that names the checkpoint which holds what is not finite in a tile.

        A snapshot has none: its tracker refused it.
        """
        for source, opened in zip(self.plan.sources, self._opened, strict=True):
            if isinstance(source, Snapshot) or not isinstance(source, FileSource):
                continue
            reader = open_tile(opened, tile)
            for begin, end in tile.steps(self._chunk):
                values = self._buffer(tile.wide)[: end - begin]
                reader.read_into(values, begin, self._scratch)
                if not bool(values.isfinite().all()):
                    at = begin + int(values.isfinite().logical_not().nonzero()[0])
                    name = tile.names[bisect_right(tile.bounds, at) - 1]
                    raise NonFiniteError(source.path, f"tensor {name!r}: holds nan or infinity")

    def _cast(self, total: torch.Tensor, dtype: str) -> torch.Tensor:
        if total.dtype == torch_dtype(dtype):
            return total
        return self._buffer(dtype)[: total.numel()].copy_(total)

    def _buffer(self, dtype: str) -> torch.Tensor:
        if dtype not in self._buffers:
            self._buffers[dtype] = torch.empty(self._chunk, dtype=torch_dtype(dtype), device=self._device)
        return self._buffers[dtype]

    def _sums_in(self, wide: str) -> Sums:
        if wide not in self._sums:
            coefficients = self.plan.reconstruction.coefficients
            self._sums[wide] = Sums(coefficients, self._chunk, torch_dtype(wide), self._device)
        return self._sums[wide]


def check_finite(tile: Tile, begin: int, sums: torch.Tensor) -> None:
    """A NonFiniteError if the output's dtype cannot hold the sums, shape [targets, n], of a tile from `begin` on."""
    dtype = torch_dtype(tile.dtype)
    # Casting is monotone, and both bounds are nan where a value is.
    if not sums.numel() or holds(dtype, torch.stack(torch.aminmax(sums))):
        return
    for name, (start, end) in zip(tile.names, pairwise(tile.bounds), strict=True):
        own = sums[:, max(0, start - begin) : max(0, end - begin)]
        if holds(dtype, own):
            continue
        reason, hint = "the result is not finite; a snapshot holds nan or infinity, or the sum overflows", ""
        if bool(own.isfinite().all()):
            reason = f"{dtype} cannot hold its largest value, {float(own.abs().max()):.6g}"
            hint = "take float32 or bfloat16"
        raise NonFiniteError(f"tensor {name!r}", reason, hint)


def holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    """Whether values stay finite in a dtype."""
    if dtype.itemsize > 1:
        return bool(values.to(dtype).isfinite().all())
    # In 8 bits torch rounds what is too large down to the largest value: half a unit beyond it is too large.
    info = torch.finfo(dtype)
    limit = info.max + info.eps * 2.0 ** math.floor(math.log2(info.max)) / 2
    return bool((values.abs() <= limit).all())
