"""Export of a model in another layout, dtype or naming, completed from a full model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.checkpoints.formats import stored_in
from posthoc_cli.checkpoints.read_model import DCP_METADATA, sets_in
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.dtypes import EPS, parse_dtype, torch_dtype
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    check_alone,
    shown,
)
from posthoc_cli.export.layouts import (
    PICKLES,
    OutputOptions,
    check_shape,
    converted,
    files_of,
    layout_of,
    open_model,
    open_outputs,
    output_exists,
    plain,
    suffix_of,
)
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots.directory import PICKLES as PICKLED
from posthoc_cli.snapshots.directory import is_parts_folder, read_snapshot
from posthoc_cli.snapshots.outputs import (
    OutputInfo,
    Used,
    check_alike,
    decode_output,
    index_of,
    model_files,
    models_at,
    training_metadata,
)
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot, running_statistics
from posthoc_cli.snapshots.sources import FileSource
from posthoc_cli.snapshots.tensorfile import FORMAT, SUFFIX, Entry, TensorFile, file_size


@dataclass(frozen=True)
class Exported:
    """The content of an output: the number of tensors, how many of them came from the base, and their bytes."""

    tensors: int
    from_base: int
    nbytes: int


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    Attributes:
        made: the content of each output, by its path.
        several: whether a folder of models was exported into a folder.
        seconds: duration of the export.
    """

    made: dict[Path, Exported]
    several: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        reports = [
            {"output": str(path), "tensors": made.tensors, "from_base": made.from_base, "bytes": made.nbytes}
            for path, made in self.made.items()
        ]
        return {**({"outputs": reports} if self.several else reports[0]), "seconds": self.seconds}


def export_file(
    source: Path,
    out: Path,
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    base: Path | None = None,
    prefix: str = "",
    strip_prefix: str = "",
    overwrite: bool = False,
    max_shard_size: str | None = None,
    weights: bool = False,
    average: str | None = None,
    progress: ProgressBar = no_bar,
) -> ExportReport:
    """Write a model, or each model of a folder, in another layout; only "pt" and "dcp" need memory for all tensors.

    Arguments:
        source: an output of a synthesis, a snapshot (exported in the model's own dtypes) or any safetensors file; a
            training's checkpoint that `torch.save` or torch.distributed.checkpoint wrote, from which the average is
            taken; or shards or parts of one of these: their index, or its folder; or a folder of several outputs.
        out: the output, whose name decides the layout unless `layout` is given; a folder for several outputs.
        dtype: dtype of all floating-point tensors except copies; None to keep each tensor's own.
        base: a model that completes the output with the tensors that `source` lacks: a safetensors file, an index of
            shards, or a folder with one of these.
        prefix, strip_prefix: text to put before, or to remove from, the names in `source`, before they are compared
            with those in `base`.
        overwrite: replace existing outputs.
        max_shard_size: largest size of a shard, such as "5GB", which is the default.
        weights: of a training's checkpoint take the raw weights, not the average.
        average: the key or prefix of the average in a training's checkpoint, or a glob of it, if no word says it.
        progress: opens a progress bar of the bytes to read.

    Raises:
        FileFormatError, MismatchError, InvalidValueError, OutputExistsError, WriteError, NonFiniteError.
    """
    started = time.perf_counter()
    check_alone(weights=weights, average=average)
    is_checkpoint = average is not None or _is_checkpoint(source)
    if weights and not is_checkpoint:
        raise InvalidValueError("weights", f"is for a training's checkpoint, and {source.name} is none")
    sources, wanted = [source] if is_checkpoint else models_at(source), parse_dtype(dtype)
    checkpoints = {
        model: stored_in(model, weights, average) for model in sources if is_checkpoint or _is_checkpoint(model)
    }
    outs = [out] if len(sources) == 1 else _outputs_in(out, sources, layout, overwrite)
    options = OutputOptions(layout=layout, overwrite=overwrite, max_shard_size=max_shard_size)
    made = {}
    total = sum(
        checkpoints[model].file_bytes if model in checkpoints else sum(map(file_size, model_files(model)))
        for model in sources
    )
    with progress("exporting", total) as advance:
        for model, path in zip(sources, outs, strict=True):
            options.check_layout(path)
            with ExitStack() as stack:
                files: Sequence[TensorFile] = ()
                if model in checkpoints:
                    stored, info = _read_checkpoint(stack, checkpoints[model], wanted), None
                else:
                    stored, info, files = _read_source(stack, model, wanted)
                tensors = _rename(stored, prefix, strip_prefix)
                if base is not None:
                    tensors |= _read_base(stack, base, wanted, tensors)
                metadata: dict[str, str] = {}
                content: dict[str, Any] = {"format": FORMAT}
                if info is not None:
                    copies = tuple(name for name, tensor in tensors.items() if tensor.role == "copy")
                    content = replace(info, copies=copies).encoded()
                if len(files) == 1:
                    unchanged = wanted is None and not (prefix or strip_prefix or base)
                    metadata |= training_metadata(files[0], unchanged)
                entries = {name: Entry(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
                kind = layout_of(path, layout)
                parts, others = files_of(kind, entries, options.shard_bytes)
                with open_outputs([path], kind, parts, [(content, metadata)], others, overwrite) as opened:
                    for (sink,), in_file in opened:
                        for name in in_file:
                            tensor = tensors[name].read()
                            sink.write(name, tensor)
                            advance(tensor.nbytes)
                made[path] = Exported(
                    len(entries), len(entries) - len(stored), sum(entry.nbytes for entry in entries.values())
                )
    return ExportReport(made, len(sources) > 1, time.perf_counter() - started)


def _outputs_in(folder: Path, sources: Sequence[Path], layout: str | None, overwrite: bool) -> list[Path]:
    """Create a folder for the outputs of several models, and return the path of each."""
    if folder.suffix in (SUFFIX, *PICKLES) and not folder.is_dir():
        raise InvalidValueError("out", f"{len(sources)} models need a folder", value=folder)
    paths = [folder / f"{source.name.removesuffix(SUFFIX)}{suffix_of(layout)}" for source in sources]
    for path in paths if not overwrite else ():
        if output_exists(path, layout_of(path, layout)):
            raise OutputExistsError(path, "already exists", "choose another folder, or `overwrite` to replace it")
    files.check_parent("out", folder)
    files.make_directory(folder)
    return paths


@dataclass(frozen=True)
class _PlannedTensor:
    """A tensor of an input, with its dtype in the output; its role is one of `ROLES` or, if unknown, "other"."""

    file: TensorFile | FileSource
    name: str
    dtype: str
    role: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    def read(self) -> torch.Tensor:
        stored = self.file.tensor(self.name)
        where = f"{self.file.path}: tensor {self.name!r}"
        if self.role in ("average", "statistic") and not bool(plain(stored).isfinite().all()):
            raise NonFiniteError(where, "holds nan or infinity")
        return converted(where, stored, torch_dtype(self.dtype))


def _read_source(
    stack: ExitStack, source: Path, dtype: str | None
) -> tuple[dict[str, _PlannedTensor], OutputInfo | None, Sequence[TensorFile]]:
    """Return the tensors of the model to export, under all their names, its metadata as an output, and its files."""
    model = source.name if (index := index_of(source)) is None else index.parent.name
    if is_parts_folder(source):
        parts = read_snapshot(source)
        return *_read_file(stack.enter_context(parts), parts, model, dtype), parts.files
    tensors: dict[str, _PlannedTensor] = {}
    infos: list[tuple[Path, OutputInfo | None]] = []
    files = open_model(stack, source)
    for file in files:
        in_file, info = _read_file(file, None, model, dtype)
        infos.append((file.path, info))
        check_alike(*infos[0], *infos[-1])
        if twice := in_file.keys() & tensors.keys():
            raise FileFormatError(file.path, f"tensor {shown(min(twice))} is in {tensors[min(twice)].file.path} too")
        tensors |= in_file
    return tensors, infos[0][1] if infos else None, files


def _is_checkpoint(source: Path) -> bool:
    """Return whether a source is a training's checkpoint: a pickle, a DCP folder, or weights next to an average."""
    if source.is_dir():
        return (source / DCP_METADATA).is_file() or bool(sets_in(source))
    return source.name.endswith((*PICKLED, ".pth.tar")) and source.is_file()


def _read_checkpoint(stack: ExitStack, one: Checkpoint, dtype: str | None) -> dict[str, _PlannedTensor]:
    """Return the tensors of a checkpoint, under all their names."""
    file, names = stack.enter_context(one), {name: name for name in one.info.tensors} | one.info.aliases
    return {
        name: _planned(file, own, one.info.tensors[own].dtype, one.info.tensors[own].role, dtype)
        for name, own in names.items()
    }


def _read_file(
    file: TensorFile | Snapshot, snapshot: Snapshot | None, model: str, dtype: str | None
) -> tuple[dict[str, _PlannedTensor], OutputInfo | None]:
    """Return the tensors of a file, under all their names, and its metadata; `model` is the name of the source."""
    kind = file.kind if isinstance(file, TensorFile) else "snapshot"
    entries, info = file.entries, None
    stored = {name: (name, entry.dtype, "other") for name, entry in entries.items()}
    if isinstance(file, TensorFile) and kind == "snapshot":
        snapshot = decode_snapshot(file)
        if snapshot.part is not None:
            raise FileFormatError(file.path, "is a part of a snapshot", "export the folder of all its parts")
    if snapshot is not None:
        names = {name: name for name in snapshot.tensors} | snapshot.aliases
        stored = {name: (own, snapshot.tensors[own].dtype, snapshot.tensors[own].role) for name, own in names.items()}
        info = OutputInfo(
            snapshot.run_id, f"sigma_rel {snapshot.sigma_rel!r}", snapshot.sigma_rel, snapshot.gamma, snapshot.t,
            snapshot.t_unit, "tracked", profile_error=0.0, predicted_error=None, snapshots=(Used(model, 1.0),),
        )  # fmt: skip
    elif isinstance(file, TensorFile) and kind == "output":
        info = decode_output(file)
        roles = dict.fromkeys(entries, "average") | dict.fromkeys(running_statistics(entries), "statistic")
        roles |= dict.fromkeys(info.copies, "copy")
        stored = {name: (name, entry.dtype, roles[name]) for name, entry in entries.items()}
    elif kind is not None:
        reason = f"its kind is {shown(kind)}: no weights, or of a later release"
        raise FileFormatError(file.path, reason, "export a snapshot, or a synthesis")
    return {name: _planned(file, *tensor, dtype) for name, tensor in stored.items()}, info


def _planned(file: TensorFile | FileSource, name: str, own: str, role: str, dtype: str | None) -> _PlannedTensor:
    """Return a tensor with its dtype in the output: `own` unless it is a floating-point parameter."""
    return _PlannedTensor(file, name, own if role in ("statistic", "copy") or own not in EPS else dtype or own, role)


def _rename(tensors: Mapping[str, _PlannedTensor], prefix: str, strip: str) -> dict[str, _PlannedTensor]:
    if strip and not any(name.startswith(strip) for name in tensors):
        reason = f"no tensor's name begins so; the first is {min(tensors, default='')!r}"
        raise InvalidValueError("strip_prefix", reason, value=f"{strip!r}")
    renamed: dict[str, _PlannedTensor] = {}
    for name, tensor in tensors.items():
        new = prefix + name.removeprefix(strip)
        if new in renamed:
            raise InvalidValueError("strip_prefix", f"gives two tensors the name {new!r}", value=f"{strip!r}")
        renamed[new] = tensor
    return renamed


def _read_base(
    stack: ExitStack, base: Path, dtype: str | None, own: Mapping[str, _PlannedTensor]
) -> dict[str, _PlannedTensor]:
    """Return the tensors that only the base has; tensors in both must have the same shape."""
    tensors, seen = {}, set[str]()
    models: Sequence[TensorFile | FileSource]
    models = [stack.enter_context(read_snapshot(base))] if is_parts_folder(base) else open_model(stack, base)
    for file in models:
        for name, entry in file.entries.items():
            seen.add(name)
            if name not in own:
                tensors[name] = _planned(file, name, entry.dtype, "other", dtype)
            else:
                check_shape(file.path, name, entry.shape, own[name].shape)
    if not seen & own.keys():
        names = f"its names look like {min(seen, default='')!r}, theirs like {min(own, default='')!r}"
        hint = "rename them by `prefix` and `strip_prefix`"
        raise MismatchError(base, f"none of the averaged tensors is in it: {names}", hint)
    return tensors
