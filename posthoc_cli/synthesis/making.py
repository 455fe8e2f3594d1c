"""How one thread makes one tile: read, verify, convert, sum, cast, hand over, chunk by chunk in the cache."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from posthoc_cli.errors import NonFiniteError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.tensors import round_to, torch_dtype
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.synthesis.reading import Scratch
from posthoc_cli.synthesis.sources import OpenSource
from posthoc_cli.synthesis.sums import Precision, Sums, matmul_precision
from posthoc_cli.synthesis.tiles import Tile

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
