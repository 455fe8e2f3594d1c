"""Export of a model in another layout, dtype or naming, completed from a full model."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from posthoc_cli.checkpoints.index import DCP_METADATA, sets_in
from posthoc_cli.checkpoints.layouts import stored_in
from posthoc_cli.dtypes import EPS, parse_dtype, torch_dtype
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    check_alone,
    shown,
)
from posthoc_cli.export.layouts import Output, OutputOptions, check_shape, files_of, nbytes, write_outputs
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.snapshots.directory import PICKLES as PICKLED
from posthoc_cli.snapshots.directory import is_parts_folder, read_snapshot
from posthoc_cli.snapshots.outputs import OutputInfo, Used, index_of, models_at, read_model
from posthoc_cli.snapshots.snapshot import Snapshot, decode, decode_snapshot, running_statistics
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import FORMAT, Entry, TensorFile
from posthoc_cli.synthesis.engine import holds


@dataclass(frozen=True)
class ExportReport:
    """The result of an export: the number of tensors, how many of them came from the base, their bytes, the time."""

    output: Path
    tensors: int
    from_base: int
    nbytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        counts = {"tensors": self.tensors, "from_base": self.from_base, "bytes": self.nbytes}
        return {"output": str(self.output), **counts, "seconds": self.seconds}


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
    """Write a model in another layout; only "pt" and "dcp" need memory for all tensors.

    Arguments:
        source: an output of a synthesis, a snapshot (exported in the model's own dtypes) or any safetensors file; a
            training's checkpoint that `torch.save` or torch.distributed.checkpoint wrote, from which the average is
            taken; or shards or parts of one of these: their index, or its folder.
        out: the output, whose name decides the layout unless `layout` is given.
        dtype: dtype of all floating-point tensors except copies; None to keep each tensor's own.
        base: a model that completes the output with the tensors that `source` lacks: a safetensors file, an index of
            shards, or a folder with one of these.
        prefix, strip_prefix: text to put before, or to remove from, the names in `source`, before they are compared
            with those in `base`.
        overwrite: replace an existing output.
        max_shard_size: largest size of a shard, such as "5GB", which is the default.
        weights: of a training's checkpoint take the raw weights, not the average.
        average: the key or prefix of the average in a training's checkpoint, or a glob of it, if no word says it.
        progress: opens a progress bar of the bytes to write.

    Raises:
        FileFormatError, MismatchError, InvalidValueError, OutputExistsError, WriteError, NonFiniteError.
    """
    started = time.perf_counter()
    check_alone(weights=weights, average=average)
    is_checkpoint = average is not None or _is_checkpoint(source)
    if weights and not is_checkpoint:
        raise InvalidValueError("weights", f"is for a training's checkpoint, and {source.name} is none")
    source, *more = [source] if is_checkpoint else models_at(source)
    if more:
        raise DirectoryError(source.parent, f"holds {1 + len(more)} models", f"name one of them, such as {source.name}")
    wanted = parse_dtype(dtype)
    options = OutputOptions(layout=layout, overwrite=overwrite, max_shard_size=max_shard_size)
    layout = options.layout_of(out)
    info = None
    with ExitStack() as stack:
        if is_checkpoint:
            tensors = _of_source(stack.enter_context(stored_in(source, weights, average)))
        else:
            tensors, info = _read_model(stack, source)
        own, tensors = len(tensors), _rename(tensors, prefix, strip_prefix)
        if base is not None:
            tensors |= _read_base(stack, base, tensors)
        entries = {name: Entry(tensor.dtype(wanted), tensor.shape) for name, tensor in tensors.items()}
        content: dict[str, Any] = {"format": FORMAT}
        if info is not None:
            copies = tuple(name for name, tensor in tensors.items() if tensor.role == "copy")
            content = replace(info, copies=copies).encoded()
        parts, others = files_of(layout, entries, options.shard_bytes)
        advance = stack.enter_context(progress("exporting", nbytes(entries)))

        def fill(outputs: Sequence[Output], in_file: Mapping[str, Entry]) -> None:
            for name, entry in in_file.items():
                outputs[0].write(name, tensors[name].read(entry.dtype))
                advance(entry.nbytes)

        write_outputs([out], layout, parts, [content], fill, others, overwrite)
    return ExportReport(out, len(entries), len(entries) - own, nbytes(entries), time.perf_counter() - started)


# --- what is read


class _Tensor(NamedTuple):
    """A tensor of an input under its name there, the dtype that its model has, and its role: "other" if unknown."""

    file: TensorFile | Source
    name: str
    own: str
    role: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.entries[self.name].shape

    def dtype(self, wanted: str | None) -> str:
        """Return the dtype in the output: its own unless it is a floating-point parameter."""
        return self.own if wanted is None or self.role in ("statistic", "copy") or self.own not in EPS else wanted

    def read(self, dtype: str) -> torch.Tensor:
        """Return it in a dtype; raise a NonFiniteError for a nan or infinite average, or a too small dtype."""
        tensor, wanted = self.file.tensor(self.name), torch_dtype(dtype)
        values = tensor.float() if tensor.element_size() == 1 else tensor  # torch lacks functions for 8-bit dtypes
        reason = ""
        if self.role in ("average", "statistic") and not bool(values.isfinite().all()):
            reason = "holds nan or infinity"
        elif tensor.dtype != wanted and not holds(wanted, values.nan_to_num(0.0, 0.0, 0.0)):
            reason = f"{wanted} cannot hold its largest value"
        if reason:
            raise NonFiniteError(f"{self.file.path}: tensor {self.name!r}", reason)
        return tensor.to(wanted)


_Tensors = dict[str, _Tensor]


def _is_checkpoint(source: Path) -> bool:
    """Return whether a source is a training's checkpoint: a pickle, a DCP folder, or weights next to an average."""
    if source.is_dir():
        return (source / DCP_METADATA).is_file() or bool(sets_in(source))
    return source.name.endswith((*PICKLED, ".pth.tar")) and source.is_file()


def _of_source(source: Source) -> _Tensors:
    """Return the tensors of a snapshot or checkpoint, under all their names."""
    names = {name: name for name in source.tensors} | source.aliases
    tensors = source.tensors
    return {name: _Tensor(source, own, tensors[own].dtype, tensors[own].role) for name, own in names.items()}


def _open_model(stack: ExitStack, path: Path) -> Sequence[TensorFile | Snapshot]:
    """Open the files of a model until the stack ends."""
    opened = [read_snapshot(path)] if is_parts_folder(path) else read_model(path)
    return [stack.enter_context(file) for file in opened]


def _read_model(stack: ExitStack, source: Path) -> tuple[_Tensors, OutputInfo | None]:
    """Return the tensors of a model, and its header as an output."""
    opened, index = _open_model(stack, source), index_of(source)
    name = source.name if index is None else index.parent.name
    tensors, info = _Tensors(), None
    for file in opened:
        in_file, info = _read_file(file, name)
        if twice := in_file.keys() & tensors.keys():
            raise FileFormatError(file.path, f"tensor {shown(min(twice))} is in {tensors[min(twice)].file.path} too")
        tensors |= in_file
    return tensors, info


def _read_file(file: TensorFile | Snapshot, model: str) -> tuple[_Tensors, OutputInfo | None]:
    """Return the tensors of a file, and its header as an output; `model` is the name of the source."""
    if not isinstance(file, Snapshot) and file.kind == "snapshot":
        file = decode_snapshot(file)
        if file.part is not None:
            raise FileFormatError(file.path, "is a part of a snapshot", "export the folder of all its parts")
    if isinstance(file, Snapshot):
        return _of_source(file), OutputInfo(
            file.run_id, f"sigma_rel {file.sigma_rel!r}", file.sigma_rel, file.gamma, file.t, file.t_unit, "tracked",
            profile_error=0.0, predicted_error=None, snapshots=(Used(model, 1.0),),
        )  # fmt: skip
    info, roles = None, dict.fromkeys(file.entries, "other")
    if file.kind is not None:
        info = decode(file, "output", OutputInfo)
        roles = dict.fromkeys(file.entries, "average") | dict.fromkeys(running_statistics(file.entries), "statistic")
        roles |= dict.fromkeys(info.copies, "copy")
    return {name: _Tensor(file, name, entry.dtype, roles[name]) for name, entry in file.entries.items()}, info


def _rename(tensors: _Tensors, prefix: str, strip: str) -> _Tensors:
    if strip and not any(name.startswith(strip) for name in tensors):
        reason = f"no tensor's name begins so; the first is {min(tensors, default='')!r}"
        raise InvalidValueError("strip_prefix", reason, value=f"{strip!r}")
    renamed = _Tensors()
    for name, tensor in tensors.items():
        new = prefix + name.removeprefix(strip)
        if new in renamed:
            raise InvalidValueError("strip_prefix", f"gives two tensors the name {new!r}", value=f"{strip!r}")
        renamed[new] = tensor
    return renamed


def _read_base(stack: ExitStack, base: Path, own: _Tensors) -> _Tensors:
    """Return the tensors that only the base has; tensors in both must have the same shape."""
    tensors = _Tensors()
    for file in _open_model(stack, base):
        for name, entry in file.entries.items():
            tensors[name] = _Tensor(file, name, entry.dtype, "other")
            if name in own:
                check_shape(file.path, name, entry.shape, own[name].shape)
    if not tensors.keys() & own.keys():
        names = f"its names look like {min(tensors, default='')!r}, theirs like {min(own, default='')!r}"
        hint = "rename them by `prefix` and `strip_prefix`"
        raise MismatchError(base, f"none of the averaged tensors is in it: {names}", hint)
    return {name: tensor for name, tensor in tensors.items() if name not in own}
