"""The engine of a synthesis: threads read, verify, convert and sum tiles, in constant memory.

Tiles do not overlap, and consist of the blocks that have checksums, for every dtype of the
snapshots and the output; so each byte is read once, and verified as it is read. An exception is the
chunks in the parts of a snapshot, which end anywhere: their blocks at the edges of a tile are read
twice.
"""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, cycle
from typing import Any, NamedTuple, Protocol

import torch

from posthoc_cli.devices import in_stream, list_devices, streams_of
from posthoc_cli.dtypes import EPS, ITEM_BYTES, torch_dtype
from posthoc_cli.errors import InvalidValueError, NonFiniteError
from posthoc_cli.files import is_url
from posthoc_cli.profiles import FloatArray
from posthoc_cli.resources import worker_count
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.entry import BLOCK, tensor_bytes, tensor_from_bytes
from posthoc_cli.snapshots.opened_file import in_turn
from posthoc_cli.snapshots.selection import running_statistics
from posthoc_cli.snapshots.sources import StoredTensors
from posthoc_cli.synthesis.plan import Combination, Plan

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


# --- tiles

# Elements of a tile for one target; for several, whose sums need memory for a row each, a tile is
# one block. Smaller tiles make short calls, for which threads wait for each other (measured on two
# cores: 65,536 elements 5.6 GB/s, 262,144 11.3, 524,288 12.6).
ONE_TARGET = 4 * BLOCK
# of a tensor whose rows are spread over chunks, which each tile reads some blocks of twice
MOST_PARTED = 16 * BLOCK
# small tensors in one tile, so that it takes milliseconds even if tensors have one element
MAX_BATCH = 1024


class Kind(NamedTuple):
    """What the tensors of a tile have in common: they are made alike."""

    # "average"; "variance", an average that is kept positive; "stored", an average that is taken
    # as it is; or "copy"
    role: str
    dtype: str  # safetensors name of the output's dtype
    wide: str  # of the dtype of the sums; without sums of the stored dtype
    stored: tuple[str, ...]  # the dtype in each source


@dataclass(frozen=True)
class Tile:
    """The elements from `begin` on of a large tensor, or several complete small tensors, end to
    end."""

    plan: Combination  # with the coefficients of its tensors
    kind: Kind
    names: tuple[str, ...]  # the stored names of the tensors
    # the offset of each tensor in the tile, in elements, and the number of elements
    bounds: tuple[int, ...]
    begin: int = 0
    last: bool = True  # whether this tile and the tiles before it complete its tensors

    @property
    def size(self) -> int:
        return self.bounds[-1]

    @cached_property
    def box(self) -> Box:
        """The box of a large tensor."""
        return self.plan.box(self.names[0])

    @cached_property
    def spans(self) -> list[tuple[str, int, int]]:
        """The name of each tensor, with its beginning and its end in the tile."""
        begins = self.bounds[:-1]
        ends = self.bounds[1:]
        return list(zip(self.names, begins, ends, strict=True))

    def pieces(
        self,
        values: torch.Tensor,
    ) -> Iterator[tuple[str, memoryview, int]]:
        """Yield under all names the bytes of each tensor, and where in the tensor they begin."""
        view = tensor_bytes(values)
        item = ITEM_BYTES[self.kind.dtype]
        for name, begin, end in self.spans:
            data = view[begin * item : end * item]
            for alias in self.plan.names[name]:
                yield alias, data, self.begin * item

    @property
    def stored_bytes(self) -> int:
        """The bytes to read for the tile, over all sources."""
        item_bytes = [ITEM_BYTES[dtype] for dtype in self.kind.stored]
        return self.size * sum(item_bytes)


def tile_size(targets: int) -> int:
    """Choose the number of elements in a tile of one large tensor."""
    return ONE_TARGET if targets == 1 else BLOCK


def cut_tiles(
    plan: Combination,
    targets: int,
    device: torch.device,
) -> list[Tile]:
    """Cut all tensors into tiles; the tiles of one tensor are consecutive."""
    tiles = list[Tile]()
    statistics = running_statistics(plan.newest.tensors)
    batches = defaultdict[Kind, list[str]](list)
    sizes = Counter[Kind]()
    for name in plan.tensors:
        kind = _tile_kind(plan, name, statistics, device)
        size = plan.box(name).size
        if size > BLOCK or name in plan.boxes:
            tiles += _cut_tensor(plan, kind, name, tile_size(targets))
            continue
        is_full = len(batches[kind]) == MAX_BATCH
        if is_full or sizes[kind] + size > BLOCK:
            names = batches.pop(kind)
            tiles.append(_join_tensors(plan, kind, names))
            sizes[kind] = 0
        batches[kind].append(name)
        sizes[kind] += size
    for kind, names in batches.items():
        tiles.append(_join_tensors(plan, kind, names))
    return tiles


def _tile_kind(
    plan: Combination,
    name: str,
    statistics: Collection[str],
    device: torch.device,
) -> Kind:
    tensor = plan.tensors[name]
    stored = tuple(source.entries[name].dtype for source in plan.sources)
    dtype = plan.output_dtype(name)
    if tensor.role == "copy" or plan.coefficients is None:
        role = "copy" if tensor.role == "copy" else "stored"
        newest = plan.newest.entries[name].dtype
        return Kind(role, dtype, newest, stored)
    role = "average"
    is_statistic = tensor.role == "statistic" or name in statistics
    if is_statistic and name.endswith("running_var"):
        role = "variance"
    # Else large coefficients of both signs would cost a sum too many digits.
    is_coarse = any(ITEM_BYTES[each] < 4 for each in stored)
    wide = "F64"
    if device.type == "mps" or (is_coarse and tensor.dtype != "F64"):
        wide = "F32"
    return Kind(role, dtype, wide, stored)


def _cut_tensor(
    plan: Combination,
    kind: Kind,
    name: str,
    size: int,
) -> Iterator[Tile]:
    """Yield the tiles of a tensor, of at most `size` elements unless chunks make them longer."""
    count = plan.box(name).size
    cells = max(source.cells(name) for source in plan.sources)
    step = min(size * max(1, cells), max(size, MOST_PARTED))
    for begin in range(0, max(count, 1), step):
        end = min(begin + step, count)
        bounds = (0, end - begin)
        yield Tile(plan, kind, (name,), bounds, begin, last=end == count)


def _join_tensors(
    plan: Combination,
    kind: Kind,
    names: Sequence[str],
) -> Tile:
    sizes = [plan.box(name).size for name in names]
    bounds = accumulate(sizes, initial=0)
    return Tile(plan, kind, tuple(names), tuple(bounds))


# --- outputs


class Output(Protocol):
    """What takes the tiles of one target."""

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        """Take the values of a tile, once, in any thread; the caller reuses their memory."""


class InMemory:
    """Complete tensors of one target, by their stored names."""

    def __init__(self, plan: Combination, device: torch.device) -> None:
        self.tensors = dict[str, torch.Tensor]()
        self._plan = plan
        self._device = device

    def allocate(self, names: Iterable[str]) -> None:
        """Allocate these tensors, unless that was done."""
        with torch.inference_mode(False):  # the caller may have enabled it
            for name in names:
                if name not in self.tensors:
                    dtype = torch_dtype(self._plan.output_dtype(name))
                    shape = self._plan.box(name).shape
                    self.tensors[name] = torch.empty(shape, dtype=dtype, device=self._device)

    def write(self, tile: Tile, values: torch.Tensor) -> None:
        flat = []
        sizes = []
        for name, begin, end in tile.spans:
            flat.append(self.tensors[name].view(-1))
            sizes.append(end - begin)
        if len(flat) == 1:
            flat = [flat[0][tile.begin : tile.begin + tile.size]]
        torch._foreach_copy_(flat, torch.split(values, sizes))


def synthesize(
    plan: Plan,
    device: torch.device | str = "cpu",
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> Iterator[tuple[str, list[torch.Tensor]]]:
    """Yield (name, one tensor per target) for each tensor, on `device`. Small tensors come in
    batches.

    Memory is needed for a few tiles per thread (of stores, for `AHEAD` blocks), and for the tensors
    that the next few tiles belong to. Errors name the tensor: FileFormatError of a damaged
    snapshot, NonFiniteError of a result that the plan's dtype cannot hold.

    There are `workers` threads, by default one per core; the results are the same bits for any
    number. `progress` is called with the number of bytes just read, in the calling thread.
    """
    chosen = check_device(device)
    outputs = [InMemory(plan, chosen) for _ in plan.targets]
    tiles = _allocate_each(cut_tiles(plan, len(outputs), chosen), outputs)
    with closing(compute_tiles(plan, tiles, outputs, chosen, workers)) as computed:
        for tile in computed:
            if progress is not None:
                progress(tile.stored_bytes)
            if not tile.last:
                continue
            for name in tile.names:
                values = [output.tensors.pop(name) for output in outputs]
                for alias in plan.names[name]:
                    yield alias, list(values)
                del values  # release the memory before the next tensor is made


def _allocate_each(
    tiles: Iterable[Tile],
    outputs: Sequence[InMemory],
) -> Iterator[Tile]:
    """Yield tiles, each when it is to be computed, after allocating its tensors."""
    for tile in tiles:
        for output in outputs:
            output.allocate(tile.names)
        yield tile


# --- threads

# For sources in an object store: the requests of ONE_TARGET elements at a time; the blocks that are
# requested ahead for each thread, which are of one tile; so also the least number of threads, and
# the most of these if sources are few.
REQUESTS = 32
AHEAD = 24
REMOTE_THREADS = 6
MOST_THREADS = 16


def compute_tiles(
    plan: Combination,
    tiles: Iterable[Tile],
    outputs: Sequence[Output],
    device: torch.device,
    workers: int | None = None,
) -> Generator[Tile, None, None]:
    """Compute the tiles of a plan, write them to outputs, one per target, and yield each complete
    tile, in order.

    At most two tiles per thread are queued or in progress. When the iteration ends, whether by an
    error in a thread, by Ctrl-C or because the caller stops iterating, every thread is stopped
    first, within a tile.
    """
    sources = plan.sources
    remote = any(is_url(source.path) for source in sources)
    count = worker_count(workers)
    if workers is None and remote:
        requested = min(REQUESTS // len(sources), MOST_THREADS)
        count = max(count, REMOTE_THREADS, requested)
    queue = deque[Future[Tile]]()
    with ExitStack() as stack:
        for source in in_turn(lambda source: source.__enter__(), sources, remote):
            stack.push(source.__exit__)
        threads = stack.enter_context(_Threads(plan, outputs, device, count, remote))
        for tile in tiles:
            queue.append(threads.submit(tile))
            if len(queue) == 2 * count:
                yield threads.result(queue.popleft())
        while queue:
            yield threads.result(queue.popleft())


class _Threads:
    """Threads that compute tiles; at the end of a `with` block all are stopped."""

    def __init__(
        self,
        plan: Combination,
        outputs: Sequence[Output],
        device: torch.device,
        count: int,
        remote: bool,
    ) -> None:
        self.plan = plan
        self.outputs = outputs
        self.device = device
        self.size = tile_size(len(outputs))
        self._local = threading.local()
        # the first error of a thread comes first; any stops all threads
        self.errors = list[BaseException]()
        self.readers = None
        if remote:
            requests = REQUESTS * ONE_TARGET // self.size
            self.readers = ThreadPoolExecutor(requests, "ema-requests")
        self._torch_threads = torch.get_num_threads()
        # Within a worker torch uses one thread: the tiles run in parallel instead.
        self._pool = ThreadPoolExecutor(count, "ema-synthesis", torch.set_num_threads, (1,))

    def submit(self, tile: Tile) -> Future[Tile]:
        ready: Any = None
        if module := streams_of(self.device):
            # after all work so far in the calling thread's stream
            stream = module.current_stream(self.device)
            ready = stream.record_event()
        return self._pool.submit(self._compute, tile, ready)

    def result(self, future: Future[Tile]) -> Tile:
        try:
            return future.result()
        except CancelledError:
            raise self.errors[0] from None

    def _compute(self, tile: Tile, ready: Any) -> Tile:
        with torch.inference_mode(False), torch.no_grad():
            try:
                if not hasattr(self._local, "calculator"):
                    self._local.calculator = Calculator(self)
                self._local.calculator.compute(tile, ready)
            except BaseException as error:
                self.errors.append(error)
                raise
        return tile

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self.errors.append(CancelledError())
        if self.readers:
            self.readers.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.readers:
            self.readers.shutdown()
        self.errors.clear()  # their tracebacks hold the memory of tiles
        # the workers' setting would also apply to threads that begin later
        torch.set_num_threads(self._torch_threads)


def check_device(device: torch.device | str) -> torch.device:
    """Choose the device for the sums; "cuda" is the calling thread's current device, which differs
    between threads.

    "auto" is always the CPU: it reads and verifies every byte in any case, and the sums take a
    fraction of that time; `scripts/bench_synthesis.py --device cuda` prints both times. An
    InvalidValueError lists the usable devices.
    """
    reason = "holds no values"
    try:
        chosen = torch.device("cpu" if device == "auto" else device)
        if chosen.type != "meta":
            return torch.empty(0, device=chosen).device
    # AssertionError: torch was built without the device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = f"cannot be used: {str(error).partition(chr(10))[0]}"
        if "device string" in reason:  # torch lists some twenty kinds
            reason = "is not a device"
    hint = f"choose from {', '.join(['auto', *list_devices()])}"
    raise InvalidValueError("device", reason, hint, value=f"{str(device)!r}")


# --- one thread


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

    def __init__(self, threads: _Threads) -> None:
        self.plan = threads.plan
        self._threads = threads
        self._device = threads.device
        self._size = threads.size
        module = streams_of(self._device)
        self._stream = module.Stream(self._device) if module else None
        # With a stream the next bytes are read into one of two buffers while the other is copied.
        self._ahead = AHEAD * BLOCK if threads.readers else 0  # in elements
        self._spare = int(self._stream is not None)
        buffers = self._ahead // self._size + 1 + self._spare
        self._stored = [StoredBytes(self._stream is not None) for _ in range(buffers)]
        self._sums: dict[str, Sums] = {}
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
            outputs = self._threads.outputs
            if kind.role in ("copy", "stored"):
                results = [self._copy(tile)] * len(outputs)
            else:
                results = [*self._sum(tile)]
            for values, output in zip(results, outputs, strict=True):
                if kind.dtype != kind.wide:
                    rounded = self._buffer(kind.dtype, tile.size)
                    values = rounded.copy_(values)
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
        sums = self._thread_sums(tile.kind.wide, tile.size)
        sums.start(tile.size)
        smallest: torch.Tensor | None = None
        stored = self._values(self.plan.sources, tile)
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
        for source in self.plan.sources:
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
        stored = next(self._values([source], tile))
        return stored.cpu().double()

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
        if self._threads.errors:
            raise CancelledError
        if buffer.sent:
            buffer.sent.synchronize()
        dtype = source.entries[tile.names[0]].dtype
        data, values = buffer.views(tile.size, dtype)
        if readers := self._threads.readers:
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

    def _thread_sums(self, wide: str, size: int) -> Sums:
        sums = self._sums.get(wide)
        if sums is None or sums.room < size:
            coefficients = self.plan.coefficients
            assert coefficients is not None, "only sums have them"
            columns = -(-size // COLUMNS) * COLUMNS
            room = max(self._size, columns)
            sums = Sums(coefficients, room, torch_dtype(wide), self._device)
            self._sums[wide] = sums
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
