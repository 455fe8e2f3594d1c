"""Low-rank adapters: the average of their products applied to the weights of their base model.

A module's update is s B A, with factors B of shape [out, r] and A of shape [r, in]. The mean of products over training,
sum_i c_i s_i B_i A_i over checkpoints, is not the product of the mean factors: it has a rank of up to r times their
number, and only the full weight can hold it. Here it is one matrix product of all factors side by side, tensor by
tensor. Averages of factors, as snapshots are, no longer know the products that they were made of: of them the product
of the mean factors is nearer to it than the mean of their products (`scripts/adapter_means.py`).
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.dtypes import torch_dtype
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError, NonFiniteError
from posthoc_cli.export.convert import Exported, ExportReport
from posthoc_cli.export.layouts import OutputOptions, check_shape, converted, open_model, write_tensors
from posthoc_cli.profiles import Point
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots.format import TensorSpec, output_metadata
from posthoc_cli.snapshots.sources import FileSource
from posthoc_cli.snapshots.tensor_file import tensor_from_bytes
from posthoc_cli.synthesis.plan import Plan

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
    """Write a base model with the average of an adapter's products added. One tensor at a time, sums in float32.

    Arguments:
        plan: for one target, with the dtype of the output's floating-point tensors; None for those of the base.
        base: a safetensors file, an index of shards, or a folder of one of these.
        out, options, progress: as in `Run.merge`.

    Raises:
        MismatchError: the base lacks a module, or has another shape or quantized weights; or the adapter is not of
            LoRA, or says nothing about its scale.
        FileFormatError, InvalidValueError, OutputExistsError, WriteError, NonFiniteError.
    """
    started = time.perf_counter()
    options.check_layout(out)
    sources = [source for source in plan.sources if isinstance(source, FileSource)]
    modules, are_weights = _modules(plan, sources[-1].path), all(isinstance(one.profile, Point) for one in sources)
    with ExitStack() as stack:
        opened = [stack.enter_context(source.open()) for source in sources]
        stored = {name: (file, one) for file in open_model(stack, base) for name, one in file.header.tensors.items()}
        placed = _placed(modules, base, {name: entry.dtype for name, (_, entry) in stored.items()})
        specs = [
            TensorSpec(name, plan.dtype if plan.dtype and entry.dtype in _MERGED else entry.dtype, entry.shape)
            for name, (_, entry) in stored.items()
        ]

        def merged(name: str) -> torch.Tensor:
            file, entry = stored[name]
            value = tensor_from_bytes(file.read(name), entry.dtype, entry.shape)
            if (module := placed.get(name)) is None:
                return value
            coefficients = plan.reconstruction.coefficients[:, plan.columns_of(module.down)[0]].tolist()
            change = _change(module, opened, coefficients, are_weights)
            if value.dim() > 2 and change.shape == value.flatten(1).shape:  # a convolution
                change = change.view(value.shape)
            check_shape(file.path, name, entry.shape, change.shape)
            value = value.to(torch.promote_types(value.dtype, torch.float32)) + change
            if not bool(value.isfinite().all()):
                raise NonFiniteError(f"{file.path}: tensor {name!r}", "holds nan or infinity after the merge")
            return value

        values = (converted(f"tensor {s.name!r}", merged(s.name), torch_dtype(s.dtype)) for s in specs)
        nbytes, metadata = sum(spec.nbytes for spec in specs), output_metadata(replace(plan.output_info(0), copies=()))
        advance = stack.enter_context(progress("merging", nbytes))
        write_tensors(out, specs, metadata, values, options, advance)
    made = Exported(len(specs), len(specs) - len(placed), nbytes)
    return ExportReport({out: made}, False, time.perf_counter() - started)


def _change(module: _Module, opened: Sequence[Any], coefficients: Sequence[float], are_weights: bool) -> torch.Tensor:
    """The average of a module's products, in float32: shape [out, in], of a convolution [out, in x its window]."""
    downs, ups, scale = [], [], 0.0
    for file, coefficient in zip(opened, coefficients, strict=True):
        entries = file.header.tensors
        names = [name for name in (module.down, module.up, module.alpha) if isinstance(name, str)]
        down, up, *alpha = (tensor_from_bytes(file.read(n), entries[n].dtype, entries[n].shape).float() for n in names)
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
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FileFormatError(found, "is no configuration of LoRA with a number lora_alpha") from error
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
