"""The engine of a synthesis: threads read, verify, convert and sum tiles, in constant memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import torch

from posthoc_cli.devices import list_devices, streams_of
from posthoc_cli.dtypes import torch_dtype
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.files import is_url
from posthoc_cli.resources import worker_count
from posthoc_cli.snapshots.opened_file import in_turn
from posthoc_cli.synthesis.calculator import Calculator
from posthoc_cli.synthesis.plan import Combination, Plan
from posthoc_cli.synthesis.tiles import ONE_TARGET, Output, Tile, cut_tiles, tile_size


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

# For sources in an object store: the requests of ONE_TARGET elements at a time; the least number of
# threads, which request `AHEAD` blocks of one tile each, and the most of these if sources are few.
REQUESTS = 32
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
    sources = plan.opened
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
        self._device = device
        self._local = threading.local()
        # the first error of a thread comes first; any stops all threads
        self._errors = list[BaseException]()
        self._readers = None
        if remote:
            requests = REQUESTS * ONE_TARGET // tile_size(len(outputs))
            self._readers = ThreadPoolExecutor(requests, "ema-requests")
        self._make_calculator = partial(
            Calculator, plan, outputs, device, self._readers, self._errors
        )
        self._torch_threads = torch.get_num_threads()
        # Within a worker torch uses one thread: the tiles run in parallel instead.
        self._pool = ThreadPoolExecutor(count, "ema-synthesis", torch.set_num_threads, (1,))

    def submit(self, tile: Tile) -> Future[Tile]:
        ready: Any = None
        if module := streams_of(self._device):
            # after all work so far in the calling thread's stream
            ready = module.current_stream(self._device).record_event()
        return self._pool.submit(self._compute, tile, ready)

    def result(self, future: Future[Tile]) -> Tile:
        try:
            return future.result()
        except CancelledError:
            raise self._errors[0] from None

    def _compute(self, tile: Tile, ready: Any) -> Tile:
        with torch.inference_mode(False), torch.no_grad():
            try:
                if not hasattr(self._local, "calculator"):
                    self._local.calculator = self._make_calculator()
                self._local.calculator.compute(tile, ready)
            except BaseException as error:
                self._errors.append(error)
                raise
        return tile

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, *_: object) -> None:
        self._errors.append(CancelledError())
        if self._readers:
            self._readers.shutdown(wait=False, cancel_futures=True)
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._readers:
            self._readers.shutdown()
        self._errors.clear()  # their tracebacks hold the memory of tiles
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
