"""A synthesis into files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from posthoc_cli import files
from posthoc_cli.export.layouts import DEFAULT_SHARD_SIZE, Sink, layout_of, make_sink, parse_size
from posthoc_cli.export.space import check_space
from posthoc_cli.snapshots.outputs import output_metadata
from posthoc_cli.synthesis import Plan, Progress, place_synthesis
from posthoc_cli.synthesis.plan import names_by_tensor
from posthoc_cli.synthesis.tiles import Tile


def write_synthesis(
    plan: Plan,
    paths: Sequence[Path],
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
    folder: Path | None = None,
    accumulate: torch.dtype | str | None = None,
    workers: int | None = None,
) -> None:
    """Synthesize every target of a plan into its path; none appears before all are complete.

    Arguments:
        plan: from `plan_synthesis`.
        paths: an output a target.
        layout, overwrite, max_shard_size: as in `export_file`.
        dtype, device, progress, accumulate, workers: as in `synthesis.synthesize`.
        folder: the folder of the outputs, to be made when it is missing.

    Raises:
        WriteError: the system refused, or the outputs do not fit on the disk; the latter before anything is written.
    """
    specs = plan.specs(dtype)
    limit = parse_size(max_shard_size)
    check_space(dict.fromkeys(paths, sum(spec.nbytes for spec in specs)))
    with ExitStack() as stack:
        if folder is not None and folder.parent.is_dir():
            stack.enter_context(files.new_directory(folder))
        sinks = []
        for index, path in enumerate(paths):
            metadata = output_metadata(plan.output_info(index))
            sink = make_sink(layout_of(path, layout), path, specs, metadata, overwrite, limit)
            sinks.append(stack.enter_context(sink))
        fill_sinks(plan, sinks, dtype, device, progress, accumulate, workers)
        for sink in sinks:
            sink.commit()


def fill_sinks(
    plan: Plan,
    sinks: Sequence[Sink],
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    accumulate: torch.dtype | str | None = None,
    workers: int | None = None,
) -> None:
    """Synthesize every target of a plan into its sink; commits none. Arguments as in `synthesis.synthesize`."""
    names = names_by_tensor(plan.newest.info)
    made = place_synthesis(
        plan, lambda tile: _TargetParts(sinks, tile, names), dtype, device, progress, accumulate, workers
    )
    with closing(made):
        for _ in made:
            pass


class _TargetParts:
    """One tile's places in the outputs of all targets."""

    def __init__(self, sinks: Sequence[Sink], tile: Tile, names: Mapping[str, Sequence[str]]) -> None:
        self._parts = [sink.open_tile(tile, names) for sink in sinks]

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:
        self._parts[target].write(begin, values)

    def close(self) -> None:
        for part in self._parts:
            part.close()
