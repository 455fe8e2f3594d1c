"""A model in another layout, dtype or naming, completed from a full model; or with an adapter added to its weights."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import EPS, parse_dtype, torch_dtype
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    MismatchError,
    NonFiniteError,
    OutputExistsError,
    shown,
)
from posthoc_cli.export.layouts import (
    OTHER_FOLDER,
    PICKLES,
    OutputOptions,
    Sink,
    check_shape,
    converted,
    layout_of,
    open_model,
    output_exists,
    plain,
    stored_tensor,
    suffix_of,
    write_outputs,
)
from posthoc_cli.profiles import Point
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots.directory import is_parts_folder, read_snapshot
from posthoc_cli.snapshots.format import (
    SUFFIX,
    OutputInfo,
    SnapshotInfo,
    TensorSpec,
    output_metadata,
)
from posthoc_cli.snapshots.headers import decode_snapshot, file_kind
from posthoc_cli.snapshots.outputs import (
    check_alike,
    decode_output,
    index_of,
    model_files,
    models_at,
    training_metadata,
)
from posthoc_cli.snapshots.reading import TensorReader
from posthoc_cli.snapshots.selection import running_statistics
from posthoc_cli.snapshots.sources import FileSource
from posthoc_cli.snapshots.tensor_file import read_header
from posthoc_cli.synthesis.plan import Plan


@dataclass(frozen=True)
class Exported:
    """What an output holds: the number of tensors, how many of them came from the base, and their bytes."""

    tensors: int
    from_base: int
    nbytes: int


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
        reports = [
            {"output": str(path), "tensors": one.tensors, "from_base": one.from_base, "bytes": one.nbytes}
            for path, one in self.made.items()
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
    progress: ProgressBar = no_bar,
) -> ExportReport:
    """Write a model, or each model of a folder, in another layout. One tensor at a time, except for .pt.

    Arguments:
        source: an output of a synthesis, a snapshot (exported in the model's own dtypes) or any safetensors file; or
            shards or parts of one of these: their index, or its folder; or a folder of several outputs.
        out: the output, whose name decides the layout unless `layout` does; a folder for several.
        dtype: of all floating-point tensors but copies; None keeps each one's own.
        base: a safetensors file, an index of shards, or a folder of one of these, whose further tensors complete the
            output.
        prefix, strip_prefix: put in front of, or taken from, the names in `source`, before they are compared
            with those in `base`.
        overwrite: replace an output that is there.
        max_shard_size: of shards, such as "5GB", which is the default.
        progress: opens a progress bar, of the bytes to read.

    Raises:
        FileFormatError, MismatchError, InvalidValueError, OutputExistsError, WriteError, NonFiniteError.
    """
    started = time.perf_counter()
    sources, wanted = models_at(source), parse_dtype(dtype)
    outs = [out] if len(sources) == 1 else _outputs_in(out, sources, layout, overwrite)
    options = OutputOptions(layout=layout, overwrite=overwrite, max_shard_size=max_shard_size)
    made = {}
    total = sum(read_header(path).file_bytes for model in sources for path in model_files(model))
    with progress("exporting", total) as advance:
        for model, path in zip(sources, outs, strict=True):
            options.check_layout(path)
            with ExitStack() as stack:
                own, info = _read_source(stack, model, wanted)
                tensors = _rename(own, prefix, strip_prefix)
                if base is not None:
                    tensors |= _read_base(stack, base, wanted, tensors)
                metadata = {"format": "pt"}
                if info is not None:
                    copies = tuple(name for name, tensor in tensors.items() if tensor.role == "copy")
                    metadata = output_metadata(replace(info, copies=copies))
                if len(model_files(model)) == 1:
                    unchanged = wanted is None and not (prefix or strip_prefix or base)
                    metadata |= training_metadata(read_header(next(iter(model_files(model)))), unchanged)
                specs = [TensorSpec(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
                read = {name: tensor.read for name, tensor in tensors.items()}
                made[path] = _write(path, specs, len(tensors) - len(own), metadata, read, options, advance)
    return ExportReport(made, len(sources) > 1, time.perf_counter() - started)


def _write(
    path: Path,
    specs: Sequence[TensorSpec],
    from_base: int,
    metadata: Mapping[str, str],
    read: Mapping[str, Callable[[], torch.Tensor]],
    options: OutputOptions,
    advance: Callable[[int], object],
) -> Exported:
    """Write an output of these tensors, one at a time; tells how many bytes are written. It appears whole or not."""

    def fill(names: Sequence[str], sinks: Sequence[Sink]) -> None:
        for name in names:
            tensor = read[name]()
            sinks[0].write(name, tensor)
            advance(tensor.nbytes)

    write_outputs([path], specs, [metadata], options, fill)
    return Exported(len(specs), from_base, sum(spec.nbytes for spec in specs))


def _outputs_in(folder: Path, sources: Sequence[Path], layout: str | None, overwrite: bool) -> list[Path]:
    """The outputs of several models, in a folder that is made for them, each under its own name."""
    if folder.suffix in (SUFFIX, *PICKLES) and not folder.is_dir():
        raise InvalidValueError("out", f"{len(sources)} models need a folder", value=folder)
    paths = [folder / f"{source.name.removesuffix(SUFFIX)}{suffix_of(layout)}" for source in sources]
    for path in paths if not overwrite else ():
        if output_exists(path, layout_of(path, layout)):
            raise OutputExistsError(path, "is there already", OTHER_FOLDER)
    files.check_parent("out", folder)
    files.make_directory(folder)
    return paths


@dataclass(frozen=True)
class _PlannedTensor:
    """A tensor of an input, with the dtype that it will have; its role is one of `ROLES` or, if unknown, "other"."""

    file: TensorReader
    name: str
    dtype: str
    role: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.file.header.tensors[self.name].shape

    def read(self) -> torch.Tensor:
        stored = stored_tensor(self.file, self.name)
        where = f"{self.file.path}: tensor {self.name!r}"
        if self.role in ("average", "statistic") and not bool(plain(stored).isfinite().all()):
            raise NonFiniteError(where, "holds nan or infinity")
        return converted(where, stored, torch_dtype(self.dtype))


def _read_source(
    stack: ExitStack, source: Path, dtype: str | None
) -> tuple[dict[str, _PlannedTensor], OutputInfo | None]:
    """The tensors of the model to export, under all their names, and its metadata as an output."""
    model = source.name if (index := index_of(source)) is None else index.parent.name
    if is_parts_folder(source):
        parts = read_snapshot(source)
        return _read_file(stack.enter_context(parts.open()), parts.info, model, dtype)
    tensors: dict[str, _PlannedTensor] = {}
    found: list[tuple[Path, OutputInfo | None]] = []
    for file in open_model(stack, source):
        own, info = _read_file(file, None, model, dtype)
        found.append((file.path, info))
        check_alike(*found[0], *found[-1])
        if twice := own.keys() & tensors.keys():
            raise FileFormatError(file.path, f"tensor {shown(min(twice))} is in {tensors[min(twice)].file.path} too")
        tensors |= own
    return tensors, found[0][1] if found else None


def _read_file(
    file: TensorReader, snapshot: SnapshotInfo | None, model: str, dtype: str | None
) -> tuple[dict[str, _PlannedTensor], OutputInfo | None]:
    """The tensors of a file, under all their names, and its metadata; `model` names the source."""
    kind, entries, info = file_kind(file.header), file.header.tensors, None
    found = {name: (name, entry.dtype, "other") for name, entry in entries.items()}
    if kind == "snapshot" and snapshot is None:
        snapshot = decode_snapshot(file.path, file.header)
        if snapshot.part is not None:
            raise FileFormatError(file.path, "is a part of a snapshot", "export the folder of all its parts")
    if snapshot is not None:
        names = {name: name for name in snapshot.tensors} | snapshot.aliases
        found = {name: (own, snapshot.tensors[own].dtype, snapshot.tensors[own].role) for name, own in names.items()}
        info = OutputInfo(
            snapshot.run_id, f"sigma_rel {snapshot.sigma_rel!r}", snapshot.sigma_rel, snapshot.gamma, snapshot.t,
            snapshot.t_unit, "tracked", profile_error=0.0, predicted_error=None, snapshots=((model, 1.0),),
        )  # fmt: skip
    elif kind == "output":
        info = decode_output(file.path, file.header)
        roles = dict.fromkeys(entries, "average") | dict.fromkeys(running_statistics(entries), "statistic")
        roles |= dict.fromkeys(info.copies, "copy")
        found = {name: (name, entry.dtype, roles[name]) for name, entry in entries.items()}
    elif kind is not None:
        reason = f"its ema.format is {shown(kind)}: no weights, or of a later release"
        raise FileFormatError(file.path, reason, "export a snapshot, or a synthesis")
    return {name: _planned(file, *one, dtype) for name, one in found.items()}, info


def _planned(file: TensorReader, name: str, own: str, role: str, dtype: str | None) -> _PlannedTensor:
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
    """The tensors that only the base has; those in both must have the same shape."""
    tensors, seen = {}, set[str]()
    for file in [stack.enter_context(read_snapshot(base).open())] if is_parts_folder(base) else open_model(stack, base):
        for name, entry in file.header.tensors.items():
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


# --- low-rank adapters
#
# A module's update is s B A, with factors B of shape [out, r] and A of shape [r, in]. The mean of products over
# training, sum_i c_i s_i B_i A_i over checkpoints, is not the product of the mean factors: it has a rank of up to r
# times their number, and only the full weight can hold it. Here it is one matrix product of all factors side by side,
# tensor by tensor. Averages of factors, as snapshots are, no longer know the products that they were made of: of them
# the product of the mean factors is nearer to it than the mean of their products (`scripts/adapter_means.py`).

_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|down|up)(?:\.[^.]+)?\.weight")
_ALPHA, _CONFIG = ".alpha", "adapter_config.json"
_MERGED = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class _Module:
    """A module of an adapter: the names of its factors, and of its alpha in kohya's files; else alpha over rank**power.

    The product is transposed where PEFT says so.
    """

    name: str
    down: str
    up: str
    alpha: str | float
    power: float = 1.0
    is_transposed: bool = False


def merge(plan: Plan, base: Path, out: Path, options: OutputOptions, progress: ProgressBar = no_bar) -> ExportReport:
    """Write a base model with the average of an adapter's products added, of a plan for one target: see `Run.merge`.

    One tensor at a time, sums in float32. A MismatchError if the base lacks a module, or has another shape or quantized
    weights; or if the adapter is not of LoRA, or says nothing about its scale.
    """
    started = time.perf_counter()
    options.check_layout(out)
    sources = [source for source in plan.sources if isinstance(source, FileSource)]
    modules, are_weights = _modules(plan, sources[-1].path), all(isinstance(one.profile, Point) for one in sources)
    with ExitStack() as stack:
        opened = [stack.enter_context(source.open()) for source in sources]
        stored = {name: (file, one) for file in open_model(stack, base) for name, one in file.header.tensors.items()}
        placed = _placed(modules, base, {name: entry.dtype for name, (_, entry) in stored.items()})
        dtypes = {name: plan.dtype if entry.dtype in _MERGED else None for name, (_, entry) in stored.items()}
        specs = [TensorSpec(name, dtypes[name] or entry.dtype, entry.shape) for name, (_, entry) in stored.items()]

        def merged(name: str) -> torch.Tensor:
            file, entry = stored[name]
            value = stored_tensor(file, name)
            own = torch_dtype(dtypes[name] or entry.dtype)
            if (module := placed.get(name)) is None:
                return converted(f"tensor {name!r}", value, own)
            coefficients = plan.reconstruction.coefficients[:, plan.columns_of(module.down)[0]].tolist()
            change = _change(module, opened, coefficients, are_weights)
            if value.dim() > 2 and change.shape == value.flatten(1).shape:  # a convolution
                change = change.view(value.shape)
            check_shape(file.path, name, entry.shape, change.shape)
            value = value.to(torch.promote_types(value.dtype, torch.float32)) + change
            if not bool(value.isfinite().all()):
                raise NonFiniteError(f"{file.path}: tensor {name!r}", "holds nan or infinity after the merge")
            return converted(f"tensor {name!r}", value, own)

        read, metadata = (
            {name: partial(merged, name) for name in stored},
            output_metadata(replace(plan.output_info(0), copies=())),
        )
        advance = stack.enter_context(progress("merging", sum(spec.nbytes for spec in specs)))
        made = _write(out, specs, len(specs) - len(placed), metadata, read, options, advance)
    return ExportReport({out: made}, False, time.perf_counter() - started)


def _change(module: _Module, opened: Sequence[Any], coefficients: Sequence[float], are_weights: bool) -> torch.Tensor:
    """The average of a module's products, in float32: shape [out, in], of a convolution [out, in x its window]."""
    downs, ups, scale = [], [], 0.0
    for file, coefficient in zip(opened, coefficients, strict=True):
        names = [name for name in (module.down, module.up, module.alpha) if isinstance(name, str)]
        down, up, *alpha = (stored_tensor(file, name).float() for name in names)
        scale = (float(alpha[0]) if alpha else float(module.alpha)) / down.shape[0] ** module.power
        downs.append(down.flatten(1) * (1.0 if are_weights else coefficient))
        ups.append(up.flatten(1) * (coefficient * scale if are_weights else coefficient))
    if are_weights:
        change = torch.cat(ups, 1) @ torch.cat(downs)
    else:
        change = scale * torch.stack(ups).sum(0) @ torch.stack(downs).sum(0)
    return change.T if module.is_transposed else change


def _modules(plan: Plan, path: Path) -> list[_Module]:
    """The modules of an adapter; an error where tensors are no factors of LoRA, and would be lost."""
    parts: dict[str, dict[str, str]] = {}
    for name in plan.tensors:
        match = _FACTOR.fullmatch(name)
        if match is not None:
            parts.setdefault(match["module"], {})["up" if match["part"] in ("B", "up") else "down"] = name
        elif not name.endswith(_ALPHA):
            reason = f"{name!r} is no factor of LoRA (lora_A.weight and lora_B.weight, or lora_down and lora_up)"
            raise MismatchError(path, reason, "only these are merged")
    for module, own in parts.items():
        if len(own) < 2:
            raise MismatchError(path, f"{module!r} has only one of its two factors")
    if all(module + _ALPHA in plan.tensors for module in parts):
        return [_Module(module, own["down"], own["up"], module + _ALPHA) for module, own in parts.items()]
    config = _config(path)
    patterns, power = config.get("alpha_pattern") or {}, 0.5 if config.get("use_rslora") else 1.0
    made = []
    for module, own in parts.items():  # as in PEFT: of the first pattern that ends the module's name, else of all
        fitting = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
        alpha = float(next(fitting, config["lora_alpha"]))
        made.append(_Module(module, own["down"], own["up"], alpha, power, bool(config.get("fan_in_fan_out"))))
    return made


def _config(path: Path) -> dict[str, Any]:
    """What PEFT's file says in the folder of a checkpoint, or beside one or a snapshot."""
    found = next((one / _CONFIG for one in (path, path.parent) if (one / _CONFIG).is_file()), None)
    if found is None:
        hint = f"put the adapter's {_CONFIG} beside it"
        raise MismatchError(path, "does not say the alpha by which its products are scaled", hint)
    try:
        config: dict[str, Any] = json.loads(found.read_text())
        float(config["lora_alpha"])
        for pattern, alpha in (config.get("alpha_pattern") or {}).items():
            re.compile(pattern)
            float(alpha)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise FileFormatError(found, "is no configuration of LoRA with numbers lora_alpha and alpha_pattern") from error
    return config


def _placed(modules: Sequence[_Module], base: Path, dtypes: Mapping[str, str]) -> dict[str, _Module]:
    """The module of each weight of the base: of the same name, or of kohya's, in which dots are underscores."""
    plain = {name.removesuffix(".weight"): name for name in dtypes if name.endswith(".weight")}
    counts = Counter(short.replace(".", "_") for short in plain)
    known = {flat: name for short, name in plain.items() if counts[flat := short.replace(".", "_")] == 1} | plain
    placed: dict[str, _Module] = {}
    for module in modules:
        own = module.name.removeprefix("base_model.model.")
        forms = (own, own.partition(".")[2], re.sub(r"^lora_[^_]+_", "", own))
        name = next((known[form] for form in forms if form in known), None)
        if name is None:
            reason = f"has no weight of the adapter's module {own!r}; it has such as {min(plain, default='')!r}"
            raise MismatchError(base, reason, "an import of the adapter with include takes some of its modules")
        if dtypes[name] not in _MERGED:
            reason = f"tensor {name!r} is quantized: {dtypes[name]} cannot take up an adapter"
            raise MismatchError(base, reason, "use the model in bf16, fp16 or fp32")
        if name in placed:
            raise InvalidValueError("merge", f"{placed[name].name!r} and {module.name!r} are both of {name!r}")
        placed[name] = module
    return placed
