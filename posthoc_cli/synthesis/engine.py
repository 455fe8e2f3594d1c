"""The engine of a synthesis: threads read, verify, convert and sum tiles, in constant memory.

`synthesize` yields tensors; `synthesize_into` passes tiles to writers.
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
# One target is summed by additions, several targets by matrix products, whose terms a library may add in any order; so
# another target in the same pass may change the last bits. The tiles and the number of threads do not change them:
# sums are padded to a multiple of COLUMNS, so every element goes through the same instructions wherever a chunk ends.

SLOTS = 64
"""Number of sources in one matrix product."""

COLUMNS = 16_384
"""Columns of one matrix product: the most at which its operands stay in the second-level cache (measured)."""


class Sums:
    """One thread's buffers: the sums of a chunk, [targets, chunk], and slots for the sources of a matrix product.

    For every chunk, call `start`, then for each source in order fill `slot(i)` and call `add(i)`, then call `result`.

    Arguments:
        coefficients: float64, shape [sources, targets].
        chunk: largest number of elements in a chunk, a multiple of COLUMNS.
        wide: dtype of the sums.
        device: device of the sums.
    """

    def __init__(
        self, coefficients: npt.NDArray[np.float64], chunk: int, wide: torch.dtype, device: torch.device
    ) -> None:
        self._sources, targets = coefficients.shape
        self._slot_count = 1 if targets == 1 else min(SLOTS, self._sources)
        self._scales = coefficients.tolist()
        self._matrix = torch.from_numpy(coefficients.T.copy()).to(device, wide)
        # Initialized to zero: nan in the padding of a shorter chunk would slow down the arithmetic.
        self._totals = torch.zeros(targets, chunk, dtype=wide, device=device)
        self._values = torch.zeros(self._slot_count, chunk, dtype=wide, device=device)
        self._weights = torch.full((chunk,), 2.0**-20, dtype=wide, device=device)
        self._size = self._padded = -1  # not 0, which is the size of an empty chunk

    def start(self, size: int) -> None:
        """Begin the sums of a chunk of `size` elements."""
        if size != self._size:
            self._size, self._padded = size, -(-size // COLUMNS) * COLUMNS
            self._slots = [row[:size] for row in self._values.unbind()]
            self._terms = [row[: self._padded] for row in self._values.unbind()]
            self._rows = [row[: self._padded] for row in self._totals.unbind()]

    def slot(self, source: int) -> torch.Tensor:
        """Return the buffer for the values of a source, shape [size]."""
        return self._slots[source % self._slot_count]

    def add(self, source: int) -> None:
        """Add the values in the slot of a source, or leave them until the slots of a matrix product are full."""
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
        """Return the sums, shape [targets, size]; they are valid until the next `start`."""
        return self._totals[:, : self._size]

    def surely_finite(self) -> bool:
        """Return whether all sums are known to be finite; False also if the test itself overflows.

        The test is a weighted sum over all elements, which reads them once, at the speed of memory.
        """
        return bool(torch.mv(self.result(), self._weights[: self._size]).isfinite().all())


def multiply(matrix: torch.Tensor, values: torch.Tensor, sums: torch.Tensor, first: bool) -> None:
    """Add [rows, sources] x [sources, n x COLUMNS] to the sums, or if `first` set them to it, COLUMNS at a time."""
    for begin in range(0, values.shape[1], COLUMNS):
        columns = sums[:, begin : begin + COLUMNS]
        torch.addmm(columns, matrix, values[:, begin : begin + COLUMNS], beta=0 if first else 1, out=columns)


def has_full_precision() -> bool:
    """Return whether torch now keeps all bits of a matrix product's factors (no TF32); a program may change this."""
    backends: Any = torch.backends
    try:
        allowed = {backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision}
    except AttributeError:  # before torch 2.9
        return torch.get_float32_matmul_precision() == "highest"
    return allowed <= {"none", "ieee"}


# --- tiles on threads


Progress = Callable[[int], None]
"""A function that is called with the number of bytes just read, in the thread that called the engine."""

ONE_TARGET_CHUNK = 524_288
"""Elements of a chunk for one target. Smaller chunks stay in the second-level cache, but make short calls, for which
threads wait for each other (measured on two cores: 65,536 elements 5.6 GB/s, 262,144 11.3, 524,288 12.6)."""

CHUNK = 32_768
"""Elements of a chunk for several targets, whose sums need memory for a row per source and a row per target."""

REMOTE_CHUNK, REMOTE_THREADS = 131_072, 4
"""For sources in an object store: elements of a chunk for one target, so that the chunks of all sources fit into the
read-ahead; and the least number of threads, since some wait for the network while others compute."""


@dataclass(frozen=True)
class Options:
    """Options of a synthesis that change no value, except for its last rounding.

    Attributes:
        device: device that computes the sums.
        workers: number of threads; None for one per core. The results are the same bits for any number.
        progress: called with the number of bytes read since the last call.
    """

    device: torch.device | str = "cpu"
    workers: int | None = None
    progress: Progress | None = None


def synthesize(plan: Plan, options: Options = Options()) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield (name, one tensor per target) for each tensor, on `options.device`. Small tensors come in batches.

    Memory is needed for a few chunks per thread, and for the tensors that the next few tiles belong to.

    Raises:
        FileFormatError: a snapshot is damaged; the error names it and the tensor.
        NonFiniteError: a result is not finite, or the plan's dtype cannot hold it; the error names the tensor.
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
                del values  # release the memory before the next tensor is made


def synthesize_into(plan: Plan, outputs: Sequence[Output], options: Options = Options()) -> Generator[Tile, None, None]:
    """Synthesize into outputs, and yield each complete tile, in order.

    At most two tiles per thread are queued or in progress. When the iteration ends, whether by an error in a thread, by
    Ctrl-C or because the caller stops iterating, every thread is stopped first, within a chunk.

    Arguments:
        outputs: one per target. Tiles are opened in the caller's thread, and written in a worker thread.
    """
    device = check_device(options.device)
    is_remote = any(isinstance(source, FileSource) and is_url(source.path) for source in plan.sources)
    alone = REMOTE_CHUNK if is_remote else ONE_TARGET_CHUNK
    size = alone if len(plan.targets) == 1 else CHUNK
    wide = "F32" if device.type == "mps" else None  # mps has no float64
    tiles = deque((part, tile) for part in plan.passes() for tile in cut_tiles(part, size, wide))
    least = REMOTE_THREADS if is_remote and options.workers is None else 1
    workers = min(max(least, worker_count(options.workers)), max(1, len(tiles)))
    local, stop, torch_threads = threading.local(), threading.Event(), torch.get_num_threads()
    queue: deque[Future[Tile]] = deque()

    def work(part: Plan, tile: Tile, writers: Sequence[TileWriter], ready: Any) -> Tile:
        with torch.inference_mode(False), torch.no_grad():
            try:
                if not hasattr(local, "maker") or local.maker.plan is not part:
                    local.maker = Maker(part, opened, device, size)
                local.maker.make(tile, writers, stop, ready)
            except BaseException:
                stop.set()
                raise
        return tile

    with ExitStack() as stack:
        opened = stack.enter_context(all_open(plan.sources))
        # Within a worker torch uses one thread: the tiles run in parallel instead.
        pool = stack.enter_context(ThreadPoolExecutor(workers, "ema-synthesis", torch.set_num_threads, (1,)))
        try:
            while tiles or queue:
                if tiles and len(queue) < 2 * workers:
                    part, tile = tiles.popleft()
                    writers = [output.open_tile(tile) for output in outputs]
                    queue.append(pool.submit(work, part, tile, writers, caller_event(device)))
                    continue
                tile = queue.popleft().result()
                if options.progress is not None:
                    options.progress(tile.stored_bytes)
                yield tile
        except Stopped:
            errors = [future.exception() for future in queue if not future.cancelled()]
            raise next(error for error in errors if error is not None and not isinstance(error, Stopped)) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(torch_threads)  # the workers' setting is also that of threads that begin later


class Output(Protocol):
    """An object that takes the tiles of one target, several at a time, in any threads."""

    def open_tile(self, tile: Tile) -> TileWriter:
        """Return a writer for a tile."""


class TileWriter:
    """A writer for one tile of one target, used by one thread. This base class discards the values."""

    def write(self, begin: int, values: torch.Tensor) -> None:
        """Write the next elements of the tile, which start at `begin`; the caller reuses `values` afterwards."""

    def close(self) -> None:
        """Finish the tile, of which all elements are written."""


class TensorOutput:
    """An output that makes tensors of the given shapes on a device; `tensors` holds the begun and the complete ones."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: torch.device) -> None:
        self._shapes, self._device = shapes, device
        self.tensors: dict[str, torch.Tensor] = {}

    def open_tile(self, tile: Tile) -> TileWriter:
        """Return a writer for a tile; see `Output`."""
        with torch.inference_mode(False):  # the caller may have enabled it
            for name in tile.names:
                if name not in self.tensors:
                    dtype = torch_dtype(tile.dtype)
                    self.tensors[name] = torch.empty(self._shapes[name], dtype=dtype, device=self._device)
        return TensorTile([self.tensors[name] for name in tile.names], tile)


class TensorTile(TileWriter):
    """A writer that copies a tile into its tensors."""

    def __init__(self, tensors: Sequence[torch.Tensor], tile: Tile) -> None:
        self._begin = tile.ranges[0].begin
        self._sizes = [end - begin for begin, end in pairwise(tile.bounds)]
        self._flat = [tensor.view(-1) for tensor in tensors]

    def write(self, begin: int, values: torch.Tensor) -> None:
        """Copy the elements from `begin` on; see `TileWriter`."""
        if len(self._flat) == 1:
            start = self._begin + begin
            self._flat[0][start : start + values.numel()].copy_(values)
        else:
            torch._foreach_copy_(self._flat, torch.split(values, self._sizes))


# --- devices and threads -----------------------------------------------------------------------------


def check_device(device: torch.device | str) -> torch.device:
    """Return the device for the sums; "cuda" is the calling thread's current device, which differs between threads.

    "auto" is always the CPU: it reads and verifies every byte in any case, and the sums take a fraction of that time;
    `scripts/bench_synthesis.py --device cuda` prints both times.

    Raises:
        InvalidValueError: the device does not exist or cannot be used; the hint lists the devices of this machine.
    """
    reason = "holds no values"
    try:
        wanted = torch.device("cpu" if device == "auto" else device)
        if wanted.type != "meta":
            return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch was built without the device
        reason = f"cannot be used: {str(error).partition(chr(10))[0]}"
    available = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    available += ["mps"] * torch.backends.mps.is_available()
    raise InvalidValueError("device", reason, f"choose from auto, {', '.join(available)}", value=f"{str(device)!r}")


def caller_event(device: torch.device) -> Any:
    """Record an event after all work so far in the calling thread's stream on a device; None for the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class Stopped(Exception):  # noqa: N818
    """The error in a thread that is stopped because another thread has failed."""


class Maker:
    """One thread's maker of tiles, with the buffers of that thread."""

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
        """Make a tile of all targets and pass it to its writers, one per target; raise `Stopped` once `stop` is set.

        `opened` is the caller's event after which the sources can be read and the results written.
        """
        with self._stream_after(opened):
            self._copy(tile, writers, stop) if tile.role == "copy" else self._average(tile, writers, stop)
            for writer in writers:
                writer.close()

    @contextmanager
    def _stream_after(self, opened: Any) -> Iterator[None]:
        """Run the block in this thread's stream, and wait for the stream: after an error the caller frees results."""
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
            if smallest is not None:  # extrapolating coefficients can make a small variance zero or negative
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
        """Raise a NonFiniteError that names the checkpoint with non-finite values in a tile, if there is one.

        Snapshots are not searched: trackers refuse non-finite values.
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
    """Raise a NonFiniteError if the output's dtype cannot hold the sums, [targets, n], of a tile from `begin` on."""
    dtype = torch_dtype(tile.dtype)
    # Casting is monotone, and both bounds are nan if any value is.
    if not sums.numel() or holds(dtype, torch.stack(torch.aminmax(sums))):
        return
    for name, (start, end) in zip(tile.names, pairwise(tile.bounds), strict=True):
        values = sums[:, max(0, start - begin) : max(0, end - begin)]
        if holds(dtype, values):
            continue
        reason, hint = "the result is not finite; a snapshot holds nan or infinity, or the sum overflows", ""
        if bool(values.isfinite().all()):
            reason = f"{dtype} cannot hold its largest value, {float(values.abs().max()):.6g}"
            hint = "take float32 or bfloat16"
        raise NonFiniteError(f"tensor {name!r}", reason, hint)


def holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    """Return whether all values are finite in a dtype."""
    if dtype.itemsize > 1:
        return bool(values.to(dtype).isfinite().all())
    # For 8-bit dtypes torch clips to the largest value; a value is too large if it is half a unit or more beyond it.
    info = torch.finfo(dtype)
    limit = info.max + info.eps * 2.0 ** math.floor(math.log2(info.max)) / 2
    return bool((values.abs() <= limit).all())
