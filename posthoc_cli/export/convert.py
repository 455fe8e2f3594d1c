"""Export: a model in another layout, dtype or naming, completed from a full model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import EPS, parse_dtype
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    shown,
)
from posthoc_cli.export.outputs import DEFAULT_SHARD_SIZE, export_paths, layout_of, output_exists
from posthoc_cli.export.sinks import make_sink
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.format import TensorSpec
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.outputs import (
    OutputInfo,
    check_alike,
    check_indexed,
    decode_output,
    index_of,
    model_files,
    models_at,
    output_metadata,
)
from posthoc_cli.snapshots.reader import TensorFile, read_header
from posthoc_cli.snapshots.tensors import tensor_from_bytes, torch_dtype
from posthoc_cli.synthesis.engine import Options, Progress


@dataclass(frozen=True)
class Exported:
    """What an export wrote: the number of tensors, how many of them came from the base, and their bytes."""

    tensors: int
    from_base: int
    nbytes: int


def export_file(
    source: Path,
    out: Path,
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    base: Path | None = None,
    prefix: str = "",
    strip_prefix: str = "",
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    progress: Progress | None = None,
) -> Exported:
    """Write a model in another layout. One tensor at a time, except for .pt.

    Arguments:
        source: an output of a synthesis, a snapshot (exported in the model's own dtypes) or any safetensors file; or
            shards of one of these: their index, or its folder.
        out: the output; its name decides the layout unless `layout` does.
        dtype: of all floating-point tensors but copies; None keeps each one's own.
        base: a safetensors file, an index of shards, or a folder of one of these, whose further tensors complete the
            output.
        prefix, strip_prefix: put in front of, or taken from, the names in `source`, before they are compared
            with those in `base`.
        overwrite: replace an output that is there.
        max_shard_size: such as "5GB".
        progress: called with the bytes just written.

    Raises:
        FileFormatError, MismatchError, InvalidValueError, OutputExistsError, WriteError, NonFiniteError.
    """
    layout, wanted = layout_of(out, layout), parse_dtype(dtype)
    options = Options(overwrite=overwrite, max_shard_size=files.parse_bytes(max_shard_size, "max_shard_size"))
    with ExitStack() as stack:
        own, info = _read_source(stack, source, wanted)
        renamed = _rename(own, prefix, strip_prefix)
        if info is not None:
            copies = tuple(name for name, tensor in renamed.items() if tensor.role == "copy")
            info = replace(info, copies=copies)
        added = {} if base is None else _read_base(stack, base, wanted, renamed)
        tensors = renamed | added
        metadata = {"format": "pt"} if info is None else output_metadata(info)
        specs = [tensor.spec(name) for name, tensor in tensors.items()]
        with make_sink(layout, out, specs, metadata, options) as sink:
            for spec in specs:
                sink.write(spec.name, tensors[spec.name].read())
                if progress is not None:
                    progress(spec.nbytes)
            sink.commit()
    return Exported(len(tensors), len(added), sum(spec.nbytes for spec in specs))


@dataclass(frozen=True)
class ExportReport:
    """The outputs of an export, with what each holds.

    Attributes:
        made: by output.
        several: whether a folder of models was exported into a folder.
        seconds: how long it took.
    """

    made: dict[Path, Exported]
    several: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        reports = [{"output": str(path), **vars(one)} for path, one in self.made.items()]
        return {**({"outputs": reports} if self.several else reports[0]), "seconds": self.seconds}


def export_models(
    source: Path,
    out: Path,
    layout: str | None = None,
    dtype: torch.dtype | str | None = None,
    base: Path | None = None,
    prefix: str = "",
    strip_prefix: str = "",
    overwrite: bool = False,
    max_shard_size: str = DEFAULT_SHARD_SIZE,
    progress: ProgressBar = no_bar,
) -> ExportReport:
    """As `export_file`, also for a folder of several outputs, which go into the folder `out`.

    Raises:
        OutputExistsError: one of several outputs is there already; nothing was written.
        others: as `export_file`.
    """
    started = time.perf_counter()
    sources = models_at(source)
    several = len(sources) > 1
    outs = export_paths(sources, out, layout) if several else [out]
    if several:
        for path in outs if not overwrite else ():
            if output_exists(path, layout_of(path, layout)):
                hint = "choose another folder, or overwrite=True to replace it"
                raise OutputExistsError(path, "is there already", hint)
        if out.parent.is_dir():
            files.make_directory(out)
    total = sum(read_header(path).file_bytes for model in sources for path in model_files(model))
    with progress("exporting", total) as advance:
        made = {
            path: export_file(
                model, path, layout, dtype, base, prefix, strip_prefix, overwrite, max_shard_size, advance
            )
            for model, path in zip(sources, outs, strict=True)
        }
    return ExportReport(made, several, time.perf_counter() - started)


@dataclass(frozen=True)
class _PlannedTensor:
    """A tensor of an input, with the dtype that it will have."""

    file: TensorFile
    name: str
    dtype: str
    role: str  # "average", "copy", or "other": not known

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.header.tensors[self.name].shape

    def spec(self, name: str) -> TensorSpec:
        """What it will be in the output, under a name."""
        return TensorSpec(name, self.dtype, self.shape)

    def read(self) -> torch.Tensor:
        stored = tensor_from_bytes(self.file.read(self.name), self.file.header.tensors[self.name].dtype, self.shape)
        result = stored.to(torch_dtype(self.dtype))
        where = f"{self.file.path}: tensor {self.name!r}"
        if self.role == "average" and not bool(stored.isfinite().all()):
            raise NonFiniteError(where, "holds nan or infinity")
        if result.dtype != stored.dtype and bool((_finite(stored) & ~_finite(result)).any()):
            raise NonFiniteError(where, f"{self.dtype} cannot hold its largest value")
        return result


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    """Which values are finite; torch cannot tell for every dtype of 8 bits."""
    return (tensor.float() if tensor.element_size() == 1 else tensor).isfinite()


def _read_source(
    stack: ExitStack, source: Path, dtype: str | None
) -> tuple[dict[str, _PlannedTensor], OutputInfo | None]:
    """The tensors of the model to export, under all their names, and its metadata as an output."""
    tensors: dict[str, _PlannedTensor] = {}
    first: tuple[Path, OutputInfo | None] | None = None
    index = index_of(source)
    name = source.name if index is None else index.parent.name
    for file in _open_model(stack, source):
        own, info = _read_file(file, name, dtype)
        first = (file.path, info) if first is None else first
        check_alike(*first, file.path, info)
        twice = own.keys() & tensors.keys()
        if twice:
            raise FileFormatError(file.path, f"tensor {shown(min(twice))} is in {tensors[min(twice)].file.path} too")
        tensors |= own
    return tensors, None if first is None else first[1]


def _read_file(file: TensorFile, model: str, dtype: str | None) -> tuple[dict[str, _PlannedTensor], OutputInfo | None]:
    """The tensors of one file, under all their names, and its metadata; `model` is the name of the source."""
    kind = file_kind(file.header)
    if kind == "snapshot":
        return _read_snapshot(file, model, dtype)
    if kind == "state":
        raise FileFormatError(file.path, "is a tracker's state, not weights", "export a snapshot, or a synthesis")
    if kind not in (None, "output"):
        raise FileFormatError(file.path, f"its ema.format is {shown(kind)}, which this release does not know")
    if kind is None:
        return {name: _planned(file, name, "other", dtype) for name in file.header.tensors}, None
    info = decode_output(file.path, file.header)
    roles = {name: "copy" if name in info.copies else "average" for name in file.header.tensors}
    return {name: _planned(file, name, role, dtype) for name, role in roles.items()}, info


def _read_snapshot(file: TensorFile, model: str, dtype: str | None) -> tuple[dict[str, _PlannedTensor], OutputInfo]:
    snapshot = decode_snapshot(file.path, file.header)
    tensors = {}
    for alias, name in ({name: name for name in snapshot.tensors} | snapshot.aliases).items():
        tracked = snapshot.tensors[name]
        stored = tracked.dtype if tracked.role == "copy" else dtype or tracked.dtype
        tensors[alias] = _PlannedTensor(file, name, stored, tracked.role)
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
        snapshots=((model, 1.0),),
    )
    return tensors, info


def _planned(file: TensorFile, name: str, role: str, dtype: str | None) -> _PlannedTensor:
    own = file.header.tensors[name].dtype
    return _PlannedTensor(file, name, own if role == "copy" or own not in EPS else dtype or own, role)


def _rename(tensors: Mapping[str, _PlannedTensor], prefix: str, strip: str) -> dict[str, _PlannedTensor]:
    if strip and not any(name.startswith(strip) for name in tensors):
        raise InvalidValueError(
            "strip_prefix", f"no tensor's name begins so; the first is {min(tensors, default='')!r}", value=f"{strip!r}"
        )
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
    """The tensors that only the base has; those in both must have the same shape."""
    tensors = {}
    seen = set()
    for file in _open_model(stack, base):
        for name, entry in file.header.tensors.items():
            seen.add(name)
            if name not in own:
                tensors[name] = _planned(file, name, "other", dtype)
            elif own[name].shape != entry.shape:
                shapes = f"has the shape {list(entry.shape)}, the average {list(own[name].shape)}"
                raise MismatchError(file.path, f"tensor {name!r} {shapes}")
    if not seen & own.keys():
        names = f"its names look like {min(seen, default='')!r}, theirs like {min(own, default='')!r}"
        hint = "rename them by prefix and strip_prefix"
        raise MismatchError(base, f"none of the averaged tensors is in it: {names}", hint)
    return tensors


def _open_model(stack: ExitStack, path: Path) -> list[TensorFile]:
    """The files of a model, opened; each holds what the index says, if there is one."""
    opened = []
    for file_path, names in model_files(path).items():
        opened.append(stack.enter_context(TensorFile(file_path)))
        check_indexed(file_path, opened[-1].header, names)
    return opened
