"""Synthesis as callers see it: tensors streamed, or placed wherever they belong."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.synthesis.devices import numbered_device
from posthoc_cli.synthesis.plan import Plan, names_by_tensor
from posthoc_cli.synthesis.tiles import Tile, cut_tiles

if TYPE_CHECKING:
    import torch

    from posthoc_cli.synthesis.making import Placement

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
    from posthoc_cli.synthesis.placing import PendingTensors

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
    from posthoc_cli.synthesis.making import Maker, chunk_elements
    from posthoc_cli.synthesis.workers import make_tiles, worker_count

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
