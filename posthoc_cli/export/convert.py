"""Export of a model in another layout, dtype or naming, completed from a full model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from posthoc_cli import files
from posthoc_cli.checkpoints.content import DCP_METADATA, sets_in
from posthoc_cli.checkpoints.layouts import Stored
from posthoc_cli.dtypes import EPS, parse_dtype, torch_dtype
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    check_alone,
    shown,
)
from posthoc_cli.export.layouts import (
    Arrangement,
    Copied,
    OutputOptions,
    arranged,
    check_ending,
    check_shape,
    layout_of,
    nbytes,
)
from posthoc_cli.export.like import Like
from posthoc_cli.export.writing import write_outputs
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.snapshots.directory import PICKLES, is_parts_folder, read_snapshot
from posthoc_cli.snapshots.outputs import OutputInfo, Used, models_at, read_model
from posthoc_cli.snapshots.snapshot import running_statistics
from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import FORMAT, Entry, TensorFile
from posthoc_cli.synthesis.engine import holds


@dataclass(frozen=True)
class ExportReport:
    """The result of an export."""

    output: Path
    tensors: int
    from_base: int  # the number of tensors that came from the base
    nbytes: int
    seconds: float
    copied: Copied | None = None  # the checkpoint that it is a copy of

    def to_dict(self) -> dict[str, Any]:
        report: dict[str, Any] = {
            "output": str(self.output),
            "tensors": self.tensors,
            "from_base": self.from_base,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }
        if self.copied is not None:
            report["like"] = self.copied.to_dict()
        return report


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
    like: Path | None = None,
    progress: ProgressBar = no_bar,
) -> ExportReport:
    """Write a model in another layout; only "pt" and "dcp" need memory for all tensors.

    Arguments:
        source: an output of a synthesis, a snapshot (exported in the model's own dtypes) or any
            safetensors file; a training's checkpoint that `torch.save` or
            torch.distributed.checkpoint wrote, from which the average is taken; or shards or parts
            of one of these: their index, or its folder.
        out: the output, whose name decides the layout unless `layout` is given.
        dtype: dtype of all floating-point tensors except copies; None to keep each tensor's own.
        base: a model that completes the output with the tensors that `source` lacks; as `source`,
            but no checkpoint.
        prefix, strip_prefix: text to put before, or to remove from, the names in `source`, before
            they are compared with those in `base`.
        overwrite: replace an existing output.
        max_shard_size: largest size of a shard, such as "5GB", which is the default.
        weights: of a training's checkpoint take the raw weights, not the average; with `like`,
            replace its weights.
        average: the key or prefix of the average in a training's checkpoint, or a glob of it, if no
            word says it; with `like`, that of the tensors to replace.
        like: a checkpoint or model folder, which the output is a copy of, but for the tensors of
            its average, or if it has none of its weights.
        progress: opens a progress bar of the bytes to write.

    Raises:
        FileFormatError, MismatchError, InvalidValueError, OutputExistsError, WriteError,
        NonFiniteError.
    """
    started = time.perf_counter()
    wanted = parse_dtype(dtype)
    check_alone(weights=weights, average=average)
    check_alone(base=base, like=like)
    options = OutputOptions(
        layout=layout, overwrite=overwrite, max_shard_size=max_shard_size, like=like
    )
    options.check_like(dtype)
    out = files.output_path("out", out)
    check_ending(out, options)
    files.check_parent("out", out)
    with ExitStack() as stack:
        if like is None:
            tensors, info = _read_source(stack, source, weights, average)
        else:
            tensors, info = _read_source(stack, source, False, None)
        tensors = _renamed(tensors, prefix, strip_prefix)
        own = len(tensors)
        if base is not None:
            tensors |= _read_base(stack, base, tensors)
        if like is None:
            entries = {name: tensor.entry(wanted) for name, tensor in tensors.items()}
            arrangement = arranged(layout_of(out, layout), entries, options)
        else:
            found = Like.find(like, tensors, weights, average)
            arrangement = _arranged_like(found, tensors)
            entries = arrangement.entries
            own = len(entries)
        written = nbytes(entries)
        with progress("exporting", written) as advance:
            fill = _Filling(tensors, entries, advance)
            header = _header(tensors, info)
            write_outputs([out], arrangement, [header], fill, overwrite)
    return ExportReport(
        out,
        tensors=len(entries),
        from_base=len(entries) - own,
        nbytes=written,
        seconds=time.perf_counter() - started,
        copied=arrangement.copied,
    )


@dataclass(frozen=True)
class _Filling:
    """What writes tensors into an output."""

    tensors: _Tensors
    entries: Mapping[str, Entry]  # in the output
    advance: Callable[[int], object]

    def __call__(self, outputs: Sequence[Any], names: Iterable[str]) -> None:
        for name in names:
            entry = self.entries[name]
            tensor = self.tensors[name].read(entry.dtype)
            outputs[0].write_tensor(name, tensor)
            self.advance(entry.nbytes)


def _header(tensors: _Tensors, info: OutputInfo | None) -> dict[str, Any]:
    if info is None:
        return {"format": FORMAT}
    copies = list[str]()
    for name, tensor in tensors.items():
        if tensor.role == "copy":
            copies.append(name)
    return replace(info, copies=tuple(copies)).encoded()


def _arranged_like(like: Like, tensors: _Tensors) -> Arrangement:
    entries = {name: tensor.own for name, tensor in tensors.items()}
    averages = list[str]()
    for name, tensor in tensors.items():
        if tensor.role in ("average", "other") and tensor.own.dtype in EPS:
            averages.append(name)

    def are_equal(one: str, other: str) -> bool:
        dtype = tensors[one].own.dtype
        first = tensors[one].read(dtype)
        second = tensors[other].read(dtype)
        return torch.equal(first, second)

    names = {name: [name] for name in tensors}
    return like.arranged(entries, names, averages, are_equal)


def _renamed(
    tensors: _Tensors,
    prefix: str,
    strip_prefix: str,
) -> _Tensors:
    renamed = _Tensors()
    is_used = not strip_prefix
    for name, tensor in tensors.items():
        is_used |= name.startswith(strip_prefix)
        end = name.removeprefix(strip_prefix)
        renamed[prefix + end] = tensor
    if not is_used or len(renamed) < len(tensors):
        first = min(tensors, default="")
        reason = f"must begin a name, and make no two alike; the first is {first!r}"
        raise InvalidValueError("strip_prefix", reason, value=repr(strip_prefix))
    return renamed


class _Tensor(NamedTuple):
    file: TensorFile | Source
    name: str  # in the file
    own: Entry  # its dtype in its model, and its shape
    role: str  # "other" if unknown

    def entry(self, wanted: str | None) -> Entry:
        """Return its entry in the output: in the wanted dtype if it is a floating-point
        parameter."""
        if wanted is None or self.role in ("statistic", "copy"):
            return self.own
        if self.own.dtype not in EPS:
            return self.own
        return Entry(wanted, self.own.shape)

    def read(self, dtype: str) -> torch.Tensor:
        """Return it in a dtype; raise a NonFiniteError for a nan or infinite average, or a too
        small dtype."""
        tensor = self.file.tensor(self.name)
        wanted = torch_dtype(dtype)
        # torch lacks functions for 8-bit dtypes
        values = tensor.float() if tensor.element_size() == 1 else tensor
        reason = ""
        is_average = self.role in ("average", "statistic")
        if is_average and not bool(values.isfinite().all()):
            reason = "holds nan or infinity"
        elif tensor.dtype != wanted and not holds(wanted, values.nan_to_num(0.0, 0.0, 0.0)):
            reason = f"{wanted} cannot hold its largest value"
        if reason:
            raise NonFiniteError(f"{self.file.path}: tensor {self.name!r}", reason)
        return tensor.to(wanted)


_Tensors = dict[str, _Tensor]


def _read_source(
    stack: ExitStack,
    source: Path,
    weights: bool,
    average: str | None,
) -> tuple[_Tensors, OutputInfo | None]:
    """Return the tensors of the model or of the training's checkpoint to export; see
    `_read_model`."""
    if average is not None or _is_checkpoint(source):
        stored = Stored(source, average)
        checkpoint = stored.weights if weights else stored.average
        if checkpoint is None:
            reason = f"holds no average that its keys name ({stored.groups})"
            hint = "name its key by `average`, or say `weights` for the raw ones"
            raise FileFormatError(source, reason, hint)
        return _of_source(stack.enter_context(checkpoint)), None
    if weights:
        reason = f"is for a training's checkpoint, and {source.name} is none"
        raise InvalidValueError("weights", reason)
    return _read_model(stack, source)


def _is_checkpoint(source: Path) -> bool:
    """Return whether a source is a training's checkpoint: a pickle, a DCP folder, or weights next
    to an average."""
    if source.is_dir():
        return (source / DCP_METADATA).is_file() or bool(sets_in(source))
    return source.name.endswith(PICKLES) and source.is_file()


def _of_source(source: Source) -> _Tensors:
    """Return the tensors of a snapshot or checkpoint, under all their names."""
    tensors = _Tensors()
    for name, tensor in source.tensors.items():
        own = Entry(tensor.dtype, source.entries[name].shape)
        tensors[name] = _Tensor(source, name, own, tensor.role)
    for alias, name in source.aliases.items():
        tensors[alias] = tensors[name]
    return tensors


def _read_model(stack: ExitStack, path: Path) -> tuple[_Tensors, OutputInfo | None]:
    """Return the tensors of a model, whose files are open until the stack ends, and its header as
    an output."""
    path, *more = models_at(path)
    if more:
        hint = f"name one of them, such as {path.name}"
        raise InvalidValueError(path.parent, f"holds {1 + len(more)} models", hint)
    if is_parts_folder(path):
        return _of_snapshot(stack, path)
    opened, info = read_model(path)
    if opened[0].kind == "snapshot":
        return _of_snapshot(stack, path)
    tensors = _Tensors()
    for file in opened:
        stack.enter_context(file)
        roles = _roles_in(file, info)
        for name, entry in file.entries.items():
            if name in tensors:
                other = tensors[name].file.path
                raise FileFormatError(file.path, f"tensor {shown(name)} is in {other} too")
            tensors[name] = _Tensor(file, name, Entry(entry.dtype, entry.shape), roles[name])
    return tensors, info


def _of_snapshot(stack: ExitStack, path: Path) -> tuple[_Tensors, OutputInfo]:
    snapshot = stack.enter_context(read_snapshot(path))
    if snapshot.part is not None:
        hint = "export the folder of all its parts"
        raise FileFormatError(path, "is a part of a snapshot", hint)
    info = OutputInfo(
        run_id=snapshot.run_id,
        profile=f"sigma_rel {snapshot.sigma_rel!r}",
        sigma_rel=snapshot.sigma_rel,
        gamma=snapshot.gamma,
        t=snapshot.t,
        t_unit=snapshot.t_unit,
        method="tracked",
        profile_error=0.0,
        predicted_error=None,
        snapshots=(Used(path.name, 1.0),),
    )
    return _of_source(snapshot), info


def _roles_in(file: TensorFile, info: OutputInfo | None) -> dict[str, str]:
    if info is None:
        return dict.fromkeys(file.entries, "other")
    roles = dict.fromkeys(file.entries, "average")
    roles |= dict.fromkeys(running_statistics(file.entries), "statistic")
    roles |= dict.fromkeys(info.copies, "copy")
    return roles


def _read_base(
    stack: ExitStack,
    base: Path,
    own: _Tensors,
) -> _Tensors:
    """Return the tensors that only the base has; tensors in both must have the same shape."""
    tensors, _ = _read_model(stack, base)
    common = tensors.keys() & own.keys()
    for name in common:
        check_shape(tensors[name].file.path, name, tensors[name].own.shape, own[name].own.shape)
    if not common:
        names = (
            f"its names look like {min(tensors, default='')!r}, theirs like "
            f"{min(own, default='')!r}"
        )
        hint = "rename them by `prefix` and `strip_prefix`"
        raise MismatchError(base, f"none of the averaged tensors is in it: {names}", hint)
    return {name: tensor for name, tensor in tensors.items() if name not in own}
