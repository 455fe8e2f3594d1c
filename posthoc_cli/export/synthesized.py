"""A synthesis into files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import torch

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, MismatchError, OutputExistsError, shown
from posthoc_cli.export.layouts import DEFAULT_SHARD_SIZE, Sink, layout_of, make_sink, output_exists, parse_size
from posthoc_cli.export.sharded import SHARD_PATTERN
from posthoc_cli.export.space import check_space
from posthoc_cli.snapshots.index import INDEX_NAME, read_index
from posthoc_cli.snapshots.outputs import (
    OutputInfo,
    decode_output,
    output_difference,
    output_metadata,
    same_coefficients,
)
from posthoc_cli.snapshots.reader import read_header
from posthoc_cli.snapshots.verifying import verify_payload
from posthoc_cli.synthesis import Plan, Progress, place_synthesis
from posthoc_cli.synthesis.plan import names_by_tensor
from posthoc_cli.synthesis.tiles import Tile

Contents = tuple[str, tuple[int, ...]]
"""Dtype and shape of a tensor."""


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


def existing_outputs(
    plan: Plan, paths: Sequence[Path], layout: str | None = None, dtype: torch.dtype | str | None = None
) -> set[int]:
    """The targets of a plan, by index, whose output is there already: every byte is verified.

    Arguments:
        plan, paths, layout, dtype: as in `write_synthesis`.

    Raises:
        OutputExistsError: what has an output's name is damaged, or of another run, target, time, method or dtype, of
            other snapshots, or says nothing of what it is.
    """
    there = set()
    specs = {spec.name: (spec.dtype, spec.shape) for spec in plan.specs(dtype)}
    for index, path in enumerate(paths):
        kind = layout_of(path, layout)
        if not output_exists(path, kind):
            continue
        try:
            _check_output(path, kind, plan.output_info(index), specs)
        except (FileFormatError, MismatchError) as error:
            raise OutputExistsError(
                error.subject, error.reason, "choose another name, or overwrite=True to replace it"
            ) from error
        there.add(index)
    return there


def _check_output(path: Path, layout: str, wanted: OutputInfo, specs: Mapping[str, Contents]) -> None:
    """Check that an output is there as it would be made.

    Raises:
        FileFormatError: it is damaged, or no output.
        MismatchError: it is another one; says what differs.
    """
    if layout == "pt":
        raise MismatchError(path, "is there already, and a .pt file does not say which average it holds")
    index = path / INDEX_NAME
    shards = [path] if layout == "safetensors" else [path / name for name in _shard_names(index)]
    found: dict[str, Contents] = {}
    for shard in shards:
        header = read_header(shard)
        info = decode_output(shard, header)
        difference = output_difference(info, wanted)
        if difference is None and (_names(info) != _names(wanted) or not same_coefficients(info, wanted)):
            difference = "its snapshots or their coefficients are others"
        if difference is not None:
            raise MismatchError(shard, f"is another output: {difference}")
        verify_payload(shard, header)
        found |= {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}
    for name in sorted(found.keys() | specs.keys()):
        if found.get(name) != specs.get(name):
            raise MismatchError(path, "is another output: it has other tensors, or other dtypes", f"see {shown(name)}")


def _shard_names(index: Path) -> list[str]:
    """The files of a model in a folder; one without an index is one file."""
    return list(read_index(index)) if os.path.lexists(index) else [SHARD_PATTERN.format(suffix="")]


def _names(info: OutputInfo) -> list[str]:
    return [name for name, coefficient in info.snapshots if coefficient]


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
