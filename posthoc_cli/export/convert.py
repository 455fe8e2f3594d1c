"""Export of a model in another layout or dtype, or into a copy of a checkpoint."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.checkpoints.content import OFFSETS
from posthoc_cli.checkpoints.folders import (
    AVERAGE_WORD,
    Layout,
    OneFile,
    Parts,
    Refused,
    Sets,
    Shards,
)
from posthoc_cli.checkpoints.layouts import Stored
from posthoc_cli.checkpoints.places import Place
from posthoc_cli.dtypes import EPS, parse_dtype
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    UnsuitableError,
    argument,
    at_most_one,
    quote,
)
from posthoc_cli.export.job import OutputJob
from posthoc_cli.export.like import Like, Replacement
from posthoc_cli.export.names import check_not_in_run
from posthoc_cli.request import FileRequest
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.snapshots.directory import is_import, is_parts_folder, read_snapshot
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.output_info import OutputInfo, Used
from posthoc_cli.snapshots.outputs import models_at, read_model
from posthoc_cli.snapshots.selection import running_statistics
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.source import StoredTensors, TrackedTensor
from posthoc_cli.snapshots.tensorfile import FORMAT, SUFFIX, TensorFile
from posthoc_cli.synthesis.plan import Combination, nbytes

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """The result of an export."""

    output: Path
    tensors: int
    nbytes: int
    seconds: float
    copied: Replacement | None = None  # the checkpoint that it is a copy of

    def to_dict(self) -> dict[str, Any]:
        report: dict[str, Any] = {
            "output": str(self.output),
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }
        if self.copied is not None:
            report["like"] = self.copied.to_dict()
        return report


def export_file(
    source: str | Path,
    out: str | Path,
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    overwrite: bool = False,
    max_shard_size: str | None = None,
    raw: bool = False,
    average: str | None = None,
    weights: str | None = None,
    like: str | Path | None = None,
    progress: ProgressBar = no_bar,
) -> ExportReport:
    """Write a model in another layout; only "pt" needs memory for all tensors.

    Arguments:
        source: an output of a synthesis, a snapshot (exported in the model's own dtypes) or any
            safetensors file; a training's checkpoint that `torch.save` or
            torch.distributed.checkpoint wrote, from which the average is taken; or shards or parts
            of one of these: their index, or its folder.
        out: the output, whose name decides the layout unless `layout` is given.
        dtype: dtype of all floating-point tensors except copies; None to keep each tensor's own.
        overwrite: replace an existing output.
        max_shard_size: largest size of a shard, such as "5GB", which is the default.
        raw: of a training's checkpoint take the raw weights, not the average; with `like`, replace
            its weights.
        average, weights: the key, prefix or glob of the average, or of the weights, to take from a
            training's checkpoint, where no word says it; with both, the average. With `like`, of
            the tensors to replace.
        like: a checkpoint or model folder, which the output is a copy of, but for the tensors of
            its average, or if it has none of its weights.
        progress: opens a progress bar of the bytes to write.

    Raises:
        FileFormatError, MismatchError, InvalidValueError, OutputExistsError, WriteError,
        NonFiniteError.
    """
    started = time.perf_counter()
    target_dtype = parse_dtype(dtype)
    at_most_one(raw=raw, average=average)
    at_most_one(raw=raw, weights=weights)
    request = FileRequest(
        dtype=dtype, layout=layout, max_shard_size=max_shard_size, like=like, overwrite=overwrite
    )
    source = files.check_path("source", source)
    output_name = str(out)
    out = files.local_path("out", out)
    is_folder = request.find_layout(out) == "sharded" or request.makes_folders
    if output_name.endswith("/") and not is_folder:
        raise InvalidValueError("out", "is a folder; name a file", value=output_name)
    files.check_parent(out)
    check_not_in_run(out)
    sets = (raw, average, weights)
    model = _read_source(source, *sets) if like is None else _read_source(source)
    plan = _combine(model, target_dtype)
    copied = None
    if like is not None:
        plan, copied = Like.find(like, plan.entries, *sets).fit(plan)
    job = OutputJob(plan, {out: _header(plan)}, request, copied)
    with progress("exporting", plan.read_bytes) as advance:
        job.write(advance)
    written = plan.entries if copied is None else copied.entries
    return ExportReport(
        out,
        tensors=len(written),
        nbytes=nbytes(written),
        seconds=time.perf_counter() - started,
        copied=copied,
    )


class Model(StoredTensors):
    """A model in one file or several; the tensors of another program, which has no `info`, are
    copies, which may hold infinity."""

    t = 0.0

    def __init__(
        self,
        path: Path,
        opened: Sequence[TensorFile],
        info: OutputInfo | None,
    ) -> None:
        self.path = path
        self.files = tuple(opened)
        self.info = info
        self.aliases = {}
        self.tensors = {}
        self.entries = entries = dict[str, Entry]()
        places = dict[str, Path]()
        for file in opened:
            roles = dict.fromkeys(file.entries, "copy")
            if info is not None:
                roles = dict.fromkeys(file.entries, "average")
                roles |= dict.fromkeys(running_statistics(file.entries), "statistic")
                roles |= dict.fromkeys(info.copies, "copy")
            for name, entry in file.entries.items():
                if name in places:
                    reason = f"tensor {quote(name)} is in {places[name]} too"
                    raise FileFormatError(file.path, reason)
                places[name] = file.path
                entries[name] = entry
                self.tensors[name] = TrackedTensor(roles[name], entry.dtype)


def _combine(source: StoredTensors, dtype: str | None) -> Combination:
    """Combine a source to a model in its own dtypes, or with its averages in another dtype."""
    dtypes = {}
    if dtype is not None and isinstance(source, Model) and source.info is None:
        floats = [name for name, entry in source.entries.items() if entry.dtype in EPS]
        dtypes = dict.fromkeys(floats, dtype)
    return Combination(sources=(source,), dtype=dtype, dtypes=dtypes)


def _header(plan: Combination) -> dict[str, Any]:
    """Make the content of the header: the model's, with the names of its copies."""
    info = _output_info(plan.newest)
    if info is None:
        return {"format": FORMAT}
    copies = list[str]()
    for name in plan.newest.copies:
        copies += plan.names.get(name, ())
    return replace(info, copies=tuple(copies)).encode()


def _output_info(source: StoredTensors) -> OutputInfo | None:
    if isinstance(source, Snapshot):
        return OutputInfo(
            run_id=source.run_id,
            profile=f"sigma_rel {source.sigma_rel!r}",
            sigma_rel=source.sigma_rel,
            gamma=source.gamma,
            t=source.t,
            t_unit=source.t_unit,
            method="tracked",
            profile_error=0.0,
            predicted_error=None,
            snapshots=(Used(source.path.name, 1.0),),
        )
    return source.info if isinstance(source, Model) else None


# --- reading


def _read_source(
    source: Path,
    raw: bool = False,
    average: str | None = None,
    weights: str | None = None,
) -> StoredTensors:
    """Read the model to export, or what is wanted of a training's checkpoint."""
    if is_import(source):
        reason = "is the run of an import, which refers to other files"
        raise UnsuitableError(source, reason, "make an average of it with `ema synthesize`")
    if is_parts_folder(source):
        return read_snapshot(source)
    place = Place(source)
    layout = place.layout_at(source) if source.exists() else None
    for note in place.notes:
        log.warning("%s: %s", source, note)
    if average is not None or weights is not None or _is_checkpoint(layout):
        stored = Stored(source, raw, average, weights)
        checkpoint = stored.weights if stored.is_raw else stored.average
        if checkpoint is None:
            reason = f"none of its keys names an average ({stored.groups})"
            hint = f"name its key with {argument('average')}, or take its tensors as they are with "
            hint += argument("raw")
            raise UnsuitableError(source, reason, hint)
        return checkpoint
    if raw:
        reason = f"is for a training's checkpoint, and {source.name} is not one"
        raise InvalidValueError("raw", reason)
    if isinstance(layout, OneFile | Shards) and source not in (layout.path, layout.path.parent):
        source = layout.path
    return _read_model(source)


def _is_checkpoint(layout: Layout | None) -> bool:
    """Return whether a source is a training's checkpoint: a file or folder that is not safetensors,
    parts of a model, or an average among several models, which may lie deeper in it."""
    if isinstance(layout, Sets):
        has_average = any(map(AVERAGE_WORD.search, layout.members))
        return has_average or any(map(_is_pickled, layout.members.values()))
    if isinstance(layout, Parts | Refused):
        return True
    return layout is not None and _is_pickled(layout)


def _is_pickled(layout: Layout) -> bool:
    return isinstance(layout, Sets) or SUFFIX not in layout.path.name


def _read_model(path: Path) -> StoredTensors:
    path, *more = models_at(path)
    if more:
        hint = f"name one of them, such as {path.name}"
        raise InvalidValueError(path.parent, f"holds {1 + len(more)} models", hint)
    if is_parts_folder(path):
        return read_snapshot(path)
    opened, info = read_model(path)
    if opened[0].kind == "snapshot":
        snapshot = read_snapshot(path)
        if snapshot.part is not None:
            hint = "export the folder of all its parts"
            raise UnsuitableError(path, "is a part of a snapshot", hint)
        return snapshot
    if any(OFFSETS in file.metadata for file in opened):
        Place(path).open_at(path)  # whose error says so if it is a part of a model
    return Model(path, opened, info)
