"""A synthesis into files."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from posthoc_cli import files
from posthoc_cli.export.layouts import DEFAULT_SHARD_SIZE, layout_of, make_sink, parse_size
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.synthesis import Plan, Progress, synthesize


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
) -> None:
    """Synthesize every target of a plan into its path; none appears before all are complete.

    Arguments:
        plan: from `plan_synthesis`.
        paths: an output a target.
        layout, overwrite, max_shard_size: as in `export_file`.
        dtype, device, progress: as in `synthesis.synthesize`.
        folder: the folder of the outputs, to be made when it is missing.
    """
    specs = plan.specs(dtype)
    limit = parse_size(max_shard_size)
    with ExitStack() as stack:
        if folder is not None and folder.parent.is_dir():
            stack.enter_context(files.new_directory(folder))
        sinks = []
        for index, path in enumerate(paths):
            metadata = fmt.output_metadata(plan.output_info(index))
            sink = make_sink(layout_of(path, layout), path, specs, metadata, overwrite, limit)
            sinks.append(stack.enter_context(sink))
        for name, tensors in synthesize(plan, dtype, device, progress):
            for sink, tensor in zip(sinks, tensors, strict=True):
                sink.write(name, tensor)
        for sink in sinks:
            sink.commit()
