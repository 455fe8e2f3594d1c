"""Where the sums are made."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import torch

from posthoc_cli.errors import InvalidValueError, NonFiniteError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.tensors import round_to, torch_dtype
from posthoc_cli.synthesis.plan import Plan, names_by_tensor
from posthoc_cli.synthesis.reading import Scratch
from posthoc_cli.synthesis.sources import OpenSource
from posthoc_cli.synthesis.sums import Precision, Sums, matmul_precision
from posthoc_cli.synthesis.tiles import Tile, cut_tiles

if TYPE_CHECKING:
    import torch

AUTO_REASON = "auto: reading and verifying on the CPU is the limit, and the bus would be one more"
"""Why `auto` is the CPU, whatever else is there: every byte is read and verified there in any case, and the sums take
a fraction of that time; `scripts/bench_synthesis.py --device cuda` prints both."""


def parse_device(device: str) -> str:
    """The device to make sums on.

    Raises:
        InvalidValueError: not a device, or not there; says what is.
    """
    import torch

    available = ["cpu"]
    available += [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if device == "auto":
        return "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in available:
        raise InvalidValueError(
            "device", "is not there", f"choose from auto, {', '.join(available)}", value=f"{device!r}"
        )
    return wanted


def numbered_device(device: torch.device | str) -> torch.device:
    """The same device; for `cuda` the calling thread's current one, which is another in the threads that make sums."""
    import torch

    found = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if found == torch.device("cuda") else found


def device_reason(device: str) -> str:
    """Why the sums are made where they are, for reports."""
    return AUTO_REASON if device == "auto" else "asked for"


# --- How one thread makes one tile: read, verify, convert, sum, cast, hand over, chunk by chunk in the ca ---


ONE_TARGET_CHUNK = 524_288
"""Elements of a chunk for one target: smaller ones stay in the second-level cache, but two threads then wait for each
other's short calls (measured on two cores: 65,536 elements 5.6 GB/s, 262,144 11.3, 524,288 12.6)."""

CHUNK = 32_768
"""The same for several targets, whose sums need room for a row a source and a row a target."""


def chunk_elements(targets: int) -> int:
    """Elements that are worked on at a time."""
    return ONE_TARGET_CHUNK if targets == 1 else CHUNK


class Stopped(Exception):  # noqa: N818
    """Raised in a thread that another one's error has stopped."""


class Placement(Protocol):
    """Where the results of one tile go; one thread uses it."""

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:
        """Take the elements of the tile from `begin` on, for one target; `values` is reused afterwards."""
        ...

    def close(self) -> None:
        """The tile is complete."""
        ...


def caller_event(device: torch.device) -> Any:
    """The event after which all is done that the calling thread's stream has to do on a device; None for the CPU."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


class Maker:
    """One thread's rooms, and the work that is done in them."""

    def __init__(self, plan: Plan, opened: Sequence[OpenSource], device: torch.device, chunk: int) -> None:
        self._plan, self._opened, self._device, self._chunk = plan, opened, device, chunk
        self._scratch = Scratch(chunk * max(fmt.ITEM_BYTES.values()), device)
        self._sums: dict[tuple[str, Precision], Sums] = {}
        self._rooms: dict[str, torch.Tensor] = {}
        cuda: Any = torch.cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None

    def make(self, tile: Tile, placement: Placement, stop: threading.Event, opened: Any) -> None:
        """Make all targets of a tile.

        Arguments:
            tile: what to make.
            placement: where it goes.
            stop: set when it is no longer wanted.
            opened: the caller's event after which the sources can be read and the placement written.

        Raises:
            Stopped: `stop` was set meanwhile.
            FileFormatError, NonFiniteError: naming the tensor.
        """
        with self._own_stream(opened):
            self._copy(tile, placement, stop) if tile.role == "copy" else self._average(tile, placement, stop)
            placement.close()

    @contextmanager
    def _own_stream(self, opened: Any) -> Iterator[None]:
        """Work in this thread's stream, and leave none under way: whoever is told of an error frees what it writes."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(opened)
            try:
                yield
            finally:
                self._stream.synchronize()

    def _copy(self, tile: Tile, placement: Placement, stop: threading.Event) -> None:
        reader = self._opened[self._plan.sources.index(self._plan.newest)].open_tile(tile)
        for begin, end in tile.steps(self._chunk):
            if stop.is_set():
                raise Stopped
            values = self._room(tile.dtype)[: end - begin]
            reader.read_into(values, begin, self._scratch)
            for target in range(len(self._plan.targets)):
                placement.place(target, begin, values)

    def _average(self, tile: Tile, placement: Placement, stop: threading.Event) -> None:
        readers = [source.open_tile(tile) for source in self._opened]
        sums = self._sums_in(tile.wide)
        for begin, end in tile.steps(self._chunk):
            sums.start(end - begin)
            for index, reader in enumerate(readers):
                if stop.is_set():
                    raise Stopped
                reader.read_into(sums.slot(index), begin, self._scratch)
                sums.add(index)
            result = sums.result()
            if not sums.surely_finite() or result.dtype != torch_dtype(tile.dtype):
                check_finite(tile, begin, result)
            for target, total in enumerate(result):
                placement.place(target, begin, self._cast(total, tile.dtype))

    def _cast(self, total: torch.Tensor, dtype: str) -> torch.Tensor:
        if total.dtype == torch_dtype(dtype):
            return total
        once = round_to(total, torch_dtype(dtype)) if total.dtype == torch.float64 else total
        return self._room(dtype)[: total.numel()].copy_(once)

    def _room(self, dtype: str) -> torch.Tensor:
        if dtype not in self._rooms:
            self._rooms[dtype] = torch.empty(self._chunk, dtype=torch_dtype(dtype), device=self._device)
        return self._rooms[dtype]

    def _sums_in(self, wide: str) -> Sums:
        key = wide, matmul_precision()
        if key not in self._sums:
            coefficients, places = self._plan.reconstruction.coefficients, self._plan.places
            self._sums[key] = Sums(coefficients, self._chunk, torch_dtype(wide), self._device, places)
        return self._sums[key]


def check_finite(tile: Tile, begin: int, sums: torch.Tensor) -> None:
    """Check that the output's dtype can hold the sums, shape [targets, n], of a tile's elements from `begin` on.

    Raises:
        NonFiniteError: naming the tensor.
    """
    dtype = torch_dtype(tile.dtype)
    # Casting is monotone, and both bounds are nan where a value is.
    if not sums.numel() or _holds(dtype, torch.stack(torch.aminmax(sums))):
        return
    starts = tile.bounds
    for piece, start, end in zip(tile.pieces, starts, starts[1:], strict=False):
        own = sums[:, max(0, start - begin) : max(0, end - begin)]
        if _holds(dtype, own):
            continue
        if bool(own.isfinite().all()):
            largest = float(own.abs().max())
            raise NonFiniteError(
                f"tensor {piece.name!r}",
                f"{dtype} cannot hold its largest value, {largest:.6g}",
                "take float32 or bfloat16",
            )
        raise NonFiniteError(
            f"tensor {piece.name!r}", "the result is not finite; a snapshot holds nan or infinity, or the sum overflows"
        )


def _holds(dtype: torch.dtype, values: torch.Tensor) -> bool:
    """Whether values stay finite in a dtype."""
    if dtype.itemsize > 1:
        return bool(round_to(values, dtype).isfinite().all())
    # In 8 bits torch rounds what is too large down to the largest value: half a unit beyond it is too large.
    info = torch.finfo(dtype)
    limit = info.max + info.eps * 2.0 ** math.floor(math.log2(info.max)) / 2
    return bool((values.abs() <= limit).all())


# --- Results in memory: tensors of their own, filled by threads ------------------------------------


class PendingTensors:
    """Tensors that are being made, from the first tile of each to its last."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._targets = len(plan.targets)
        self._shapes = plan.newest.shapes
        self._device = device
        self._tensors: dict[str, list[torch.Tensor]] = {}

    def open(self, tile: Tile) -> TensorPlacement:
        """A place for a tile; its tensors are made if they are not there yet."""
        dtype = torch_dtype(tile.dtype)
        with torch.inference_mode(False):
            for name in tile.names:
                if name not in self._tensors:
                    self._tensors[name] = self._new(self._shapes[name], dtype)
        return TensorPlacement(self._tensors, tile)

    def take(self, tile: Tile) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """The tensors that are complete with this tile, which are then no longer held here."""
        for piece in tile.pieces if tile.last else ():
            yield piece.name, self._tensors.pop(piece.name)

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device=self._device) for _ in range(self._targets)]


class TensorPlacement:
    """A tile's place in tensors, one a target."""

    def __init__(self, tensors: Mapping[str, Sequence[torch.Tensor]], tile: Tile) -> None:
        self._bounds = tile.bounds
        self._begin = tile.pieces[0].begin
        pieces = [[tensor.view(-1) for tensor in tensors[name]] for name in tile.names]
        self._flat = list(zip(*pieces, strict=True))  # by target

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:
        """See `making.Placement`."""
        flat = self._flat[target]
        if len(flat) == 1:
            start = self._begin + begin
            flat[0][start : start + values.numel()].copy_(values)
        else:
            torch._foreach_copy_(flat, torch.split(values, _sizes(self._bounds)))

    def close(self) -> None:
        """Nothing to do."""


class Nowhere:
    """Takes results and drops them: everything is verified, nothing is changed."""

    def __init__(self, tile: Tile) -> None:
        del tile

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:
        """See `making.Placement`."""

    def close(self) -> None:
        """Nothing to do."""


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in pairwise(bounds)]


# --- Threads that make tiles, each with rooms of its own, a few tiles at a time and in order -------


MAX_WORKERS = 16
"""Threads at most: beyond, the memory bus is full, and Python's own lock is in the way."""


def worker_count(wanted: int | None = None) -> int:
    """Threads to work with: as many as this process has cores, up to MAX_WORKERS."""
    if wanted is not None:
        return max(1, wanted)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def make_tiles(
    tiles: Iterable[Tile],
    open_placement: Callable[[Tile], Placement],
    new_maker: Callable[[], Maker],
    workers: int,
    device: torch.device,
) -> Generator[Tile, None, None]:
    """Make tiles with `workers` threads; yields each when it and all before it are made.

    No more than two tiles a worker are under way. Whatever ends the iteration, an error in a thread, Ctrl-C or a
    caller that goes away, stops every thread within a chunk before anything else happens.

    Arguments:
        tiles: the work.
        open_placement: where the results of a tile go; called here, in order.
        new_maker: called once a thread, in it.
        workers: threads.
        device: where the makers work; they wait for what the caller's stream there does up to the opening of a tile.
    """
    own, stop = threading.local(), threading.Event()
    threads = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(1)  # for this thread: the tiles themselves are what runs side by side

    def work(tile: Tile, placement: Placement, opened: Any) -> Tile:
        with torch.inference_mode(False), torch.no_grad():
            try:
                if not hasattr(own, "maker"):
                    own.maker = new_maker()
                own.maker.make(tile, placement, stop, opened)
            except BaseException:
                stop.set()
                raise
        return tile

    waiting: deque[Future[Tile]] = deque()
    with ThreadPoolExecutor(workers, "ema-synthesis", begin) as pool:
        try:
            for tile in tiles:
                waiting.append(pool.submit(work, tile, open_placement(tile), caller_event(device)))
                if len(waiting) == 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except Stopped:
            raise _first_error(waiting) from None
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(threads)  # also what threads that begin later will take


def _first_error(waiting: Iterable[Future[Tile]]) -> BaseException:
    """What made the others stop."""
    for future in waiting:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, Stopped):
            return error
    return RuntimeError("a synthesis was stopped without a reason")


# --- Synthesis as callers see it: tensors streamed, or placed wherever they belong -----------------


Progress = Callable[[int], None]
"""Called with the number of bytes that were just read, in the thread that synthesizes."""


def synthesize(
    plan: Plan,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    accumulate: torch.dtype | str | None = None,
    workers: int | None = None,
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Stream the targets' tensors: (name, one tensor a target), on `device`. Small tensors come in batches.

    What is held at a time is a few chunks a thread and the tensors that the next few tiles belong to.

    Arguments:
        plan: from `plan_synthesis`.
        dtype: of the averages; None for each parameter's own. Copies (buffers) keep their own.
        device: where the sums are made.
        progress: told the bytes read so far.
        accumulate: dtype of the sums, float32 or float64; None for float64 where parameters are in float64, or averages
            are stored in float32 or better, and float32 for all others.
        workers: threads; None for one a core. The results are the same bits for any number.

    Raises:
        FileFormatError: a snapshot is damaged, naming it and the tensor.
        NonFiniteError: a result is not finite, or `dtype` cannot hold it, naming the tensor.
    """

    device = numbered_device(device)
    pending = PendingTensors(plan, device)
    names = names_by_tensor(plan.newest.info)
    with closing(place_synthesis(plan, pending.open, dtype, device, progress, accumulate, workers)) as made:
        for tile in made:
            for name, values in pending.take(tile):
                for alias in names[name]:
                    yield alias, list(values)
                del values  # not held while the next tensor is made


def place_synthesis(
    plan: Plan,
    open_placement: Callable[[Tile], Placement],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    accumulate: torch.dtype | str | None = None,
    workers: int | None = None,
    chunk: int | None = None,
    tile_elements: int | None = None,
) -> Generator[Tile, None, None]:
    """Synthesize into whatever `open_placement` gives for a tile; yields the tiles as they are complete, in order.

    Arguments:
        open_placement: called in the caller's thread; its result is used in another.
        chunk, tile_elements: elements a thread works on, or makes, at a time; measured values for None.
        others: as in `synthesize`.
    """

    where = numbered_device(device)
    size = chunk or chunk_elements(len(plan.targets))
    wide = parse_accumulate(accumulate) or ("F32" if where.type == "mps" else None)  # which has no float64
    tiles = cut_tiles(plan, size, dtype, wide, tile_elements)
    with ExitStack() as stack:
        opened = [stack.enter_context(source.open()) for source in plan.sources]
        count = min(worker_count(workers), max(1, len(tiles)))
        made = make_tiles(tiles, open_placement, lambda: Maker(plan, opened, where, size), count, where)
        # Closed before the files are: its threads read them.
        stack.callback(made.close)
        for tile in made:
            if progress is not None:
                progress(tile.stored_bytes)
            yield tile


def parse_accumulate(accumulate: torch.dtype | str | None) -> str | None:
    """The safetensors name of the dtype of sums; None for the default.

    Raises:
        InvalidValueError: neither float32 nor float64.
    """
    from posthoc_cli.snapshots.tensors import parse_dtype, stored_name

    wide = None if accumulate is None else parse_dtype(accumulate)
    name = None if wide is None else stored_name(wide)
    if name not in (None, "F32", "F64"):
        raise InvalidValueError("accumulate", "must be float32 or float64", value=accumulate)
    return name
