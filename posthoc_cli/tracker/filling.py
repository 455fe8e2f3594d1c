"""Synthesized weights in Python: as a state dict, and swapped into a live model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, islice
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from posthoc_cli.dtypes import DTYPES, parse_dtype, torch_dtype
from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError, warn
from posthoc_cli.run import Weights
from posthoc_cli.snapshots.snapshot import running_statistics, statistics_notice
from posthoc_cli.synthesis.engine import check_device, synthesize
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.tracker.model import (
    ON_META,
    ModelTensors,
    NamedTensor,
    check_model,
    named_tensors,
    swapped,
)
from posthoc_cli.tracker.processes import as_dtensor, held_part, is_fsdp, is_fully_sharded, is_sharded, reshard

Entered = TypeVar("Entered")


class WithStatement(Generic[Entered]):
    """A context manager that can be entered more than once, and cannot be used as a decorator by mistake."""

    def __init__(self, make: Callable[[], AbstractContextManager[Entered]]) -> None:
        self._make = make
        self._open: list[AbstractContextManager[Entered]] = []

    def __enter__(self) -> Entered:
        context = self._make()
        entered = context.__enter__()
        self._open.append(context)
        return entered

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.pop().__exit__(kind, error, trace)


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], own_dtypes: bool = True) -> None:
    """Copy `weights` into the tensors of a model that have their names; its other tensors do not change.

    The shapes are those of the model, of a DTensor that of this process's part. With `own_dtypes` the model keeps its
    dtypes and is changed in place; else it takes the dtypes of `weights`. An error leaves the model unchanged.
    """
    targets = check_weights(model, weights, own_dtypes)
    with torch.inference_mode(False), torch.no_grad():
        for name, target in targets.items():
            load_weight(target.tensor, weights[name], own_dtypes)


@torch.no_grad()
def check_weights(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], own_dtypes: bool = True, meta: bool = False
) -> dict[str, NamedTensor]:
    """Return the model's tensors that `weights` are for; with `meta` also tensors without values.

    Raises:
        ModelMismatchError, InvalidValueError, NonFiniteError: a tensor cannot be loaded; the message names it.
    """
    targets = weight_targets(model, {name: tuple(value.shape) for name, value in weights.items()})
    for name, target in targets.items():
        if target.tensor.is_meta and not meta:
            raise InvalidValueError("tensor", *ON_META, value=f"{name!r}")
        if own_dtypes:
            check_fits(name, weights[name], target.tensor.dtype)
    if not own_dtypes:
        check_dtypes_free(model, ", ".join(sorted({str(weights[name].dtype) for name in targets})))
    return targets


@torch.inference_mode(False)
@torch.no_grad()
def copied_weights(tensors: ModelTensors, dtype: torch.dtype | str | None) -> Weights:
    """Return copies of a model's tensors on the host under all of their names, the averaged ones in `dtype`."""
    stored = parse_dtype(dtype)
    wanted = None if stored is None else torch_dtype(stored)
    weights = Weights()
    for name, value in tensors.averaged.items():
        weights[name] = value.to("cpu", wanted, copy=True)
    for name, value in tensors.copied.items():
        weights[name] = value.to("cpu", copy=True)
    for alias, name in tensors.aliases.items():
        weights[alias] = weights[name]
    return weights


def load_weight(target: torch.Tensor, value: torch.Tensor, own_dtype: bool) -> None:
    """Copy one value into a model's tensor, for a DTensor into this process's part; see `load_weights`."""
    if is_sharded(target) and not own_dtype and value.dtype != target.dtype:
        _replace_chunk(target, value)
        return
    target = held_part(target)
    if not _is_writable(target):
        target.data = value.to(target.device, target.dtype, copy=True)
    elif own_dtype or value.dtype == target.dtype:
        target.data.copy_(value)
    else:
        target.data = value.to(target.device, copy=True)


def _replace_chunk(tensor: torch.Tensor, local: torch.Tensor) -> None:
    """Replace the elements of a DTensor in this process by others of another dtype; it stays the same object."""
    new = as_dtensor(local.clone(), tensor).to(tensor.device)
    if isinstance(tensor, torch.nn.Parameter):
        new = torch.nn.Parameter(new, tensor.requires_grad)
    vars(new).update(vars(tensor))
    torch.utils.swap_tensors(tensor, new)  # type: ignore[no-untyped-call]


def check_fits(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise a NonFiniteError, naming the tensor, if a model's dtype has too small a range for its values."""
    both = values.dtype.is_floating_point and dtype.is_floating_point
    if not both or torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return
    lost = values.isfinite() & ~values.to(dtype).float().isfinite()
    if bool(lost.any()):
        largest = float(values[lost].abs().max())
        reason = (
            f"the model's {dtype} cannot hold its largest value, {largest:.6g}; dtype=torch.float32 changes the model's"
        )
        raise NonFiniteError(f"tensor {name!r}", reason)


@contextmanager
def swapped_in(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], own_dtypes: bool = True) -> Iterator[None]:
    """Give the model `weights` and eval mode for the block; restore everything afterwards, also on an error.

    Meanwhile the model's raw values are kept in host memory, so that an accelerator holds no second copy. The arguments
    are those of `load_weights`.
    """
    reshard(check_model(model))
    targets = check_weights(model, weights, own_dtypes)
    for name, target in targets.items():
        if target.tensor.is_inference():
            hint = "make the model under torch.no_grad()"
            raise InvalidValueError("model", f"its tensor {name!r} was made in inference mode, and is read-only", hint)
    new_dtypes = {id(target.tensor): weights[name].dtype for name, target in targets.items()}
    # Tensors may be replaced while the weights are swapped; the modules that hold them may not.
    holders = (
        id(module)
        for module in model.modules()
        if any(id(one) in new_dtypes for one in chain(module.parameters(recurse=False), module.buffers(recurse=False)))
    )
    changed = frozenset(chain(new_dtypes, holders))
    with ExitStack() as stack:  # it calls all callbacks even if one fails
        swapped.append(changed)
        stack.callback(swapped.remove, changed)
        with torch.inference_mode(False), torch.no_grad():
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
                for contents in (module._parameters, module._buffers):
                    for key, tensor in contents.items():
                        if tensor is None:
                            stack.callback(contents.__setitem__, key, None)
                        else:
                            _save(stack, contents, key, tensor, new_dtypes, own_dtypes)
        stack.callback(reshard, model)  # is called first: a forward pass may have replaced chunks by complete tensors
        # The gradients belong to the raw weights, not to the averaged ones, and may have another dtype.
        for parameter in model.parameters():
            parameter.grad = None
        with torch.inference_mode(False), torch.no_grad():
            for name, target in targets.items():
                load_weight(target.tensor, weights[name], own_dtypes)
        model.eval()
        yield


def _save(
    stack: ExitStack,
    contents: dict[str, Any],
    key: str,
    tensor: torch.Tensor,
    new_dtypes: Mapping[int, torch.dtype],
    own_dtypes: bool,
) -> None:
    """Push a callback that restores a module's tensor: its storage and, if its values may change, the values."""
    if is_parameter := isinstance(tensor, torch.nn.Parameter):
        saves = id(tensor) in new_dtypes
        # The storage itself is kept, unless one of another dtype is to replace it.
        in_place = not saves or own_dtypes or new_dtypes[id(tensor)] == tensor.dtype
        gradients = tensor.requires_grad, tensor.grad
    else:  # a buffer on meta has no values to save, and none can be written to it
        saves, in_place = not tensor.is_meta and _is_writable(tensor), True
    device, held = tensor.device, held_part(tensor)
    storage = held.data if in_place else None
    values = held.data.to("cpu", copy=True) if saves else None
    is_chunk = held is not tensor

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore() -> None:
        contents[key] = tensor  # moving a module between kinds of devices may replace the Parameter itself
        if storage is not None:
            if values is not None:
                storage.copy_(values)
            if not is_chunk:
                tensor.data = storage
        elif values is not None and is_chunk:
            _replace_chunk(tensor, values)
        elif values is not None:
            tensor.data = values.to(device)
        if is_parameter:
            tensor.requires_grad_(gradients[0])
            tensor.grad = gradients[1]

    stack.callback(restore)


def _is_writable(tensor: torch.Tensor) -> bool:
    """Return whether values can be copied into a tensor: not if elements share memory (expanded), nor if sparse."""
    return tensor.layout == torch.strided and all(
        stride > 0 or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def weight_targets(model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, NamedTensor]:
    """Return the model's tensors of these names and, in this process, shapes; a ModelMismatchError names a misfit."""
    tensors = {tensor.name: tensor for tensor in named_tensors(check_model(model))}
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelMismatchError(f"tensor {name!r}", "is in the averaged weights, but the model has no such tensor")
        held = list(held_part(tensors[name].tensor).shape)
        if held != list(shape):
            reason = f"has the shape {held} in the model, {list(shape)} in the averaged weights"
            if is_sharded(tensors[name].tensor):
                reason = "is sharded over processes, and this tracker was made before that, or without the model"
            raise ModelMismatchError(f"tensor {name!r}", reason)
    return {name: tensors[name] for name in shapes}


def check_dtypes_free(model: torch.nn.Module, dtype: torch.dtype | str) -> None:
    """Raise an InvalidValueError if the model's tensors cannot take another dtype: FSDP's buffers have theirs."""
    if any(is_fsdp(module) or is_fully_sharded(module) for module in model.modules()):
        raise InvalidValueError("dtype", "a model under FSDP keeps the dtypes it has", "leave dtype out", value=dtype)


def fill_model(model: torch.nn.Module, plan: Plan, device: torch.device | str = "cpu") -> None:
    """Fill a model's tensors with the first target of a plan; those on `meta` are created on `device`.

    Names, shapes and dtypes are checked before the first tensor changes. A snapshot that is found to be damaged later,
    or a value that the model's dtype cannot hold, leaves the tensors before it filled.
    """
    shapes = {name: entry.shape for name, entry in plan.entries.items()}
    targets = weight_targets(model, shapes)
    if plan.dtype is not None:
        check_dtypes_free(model, DTYPES[plan.dtype].torch_name)
    created_on, values = check_device(device), synthesize(plan)
    with torch.inference_mode(False):
        first = list(islice(values, 1))  # now all files are open, so that none can vanish

    def checked() -> Iterator[tuple[str, torch.Tensor]]:
        for name, (value,) in chain(first, values):
            if plan.dtype is None:
                check_fits(name, value, targets[name].tensor.dtype)
            yield name, value

    fill(model, shapes, checked(), plan.dtype is None, created_on)


def fill(
    model: torch.nn.Module, names: Collection[str], weights: Iterable[tuple[str, torch.Tensor]], own_dtypes: bool,
    device: torch.device,
) -> None:  # fmt: skip
    """Load weights of these names, known to fit, into a model, after creating its tensors on `meta` on `device`."""
    with torch.inference_mode(False), torch.no_grad():
        _materialise(model, {*names}, device)
        targets = {tensor.name: tensor for tensor in named_tensors(model)}
        for name, value in weights:
            load_weight(targets[name].tensor, value, own_dtypes)
    left = [*{id(tensor.tensor): tensor.name for tensor in named_tensors(model) if tensor.tensor.is_meta}.values()]
    if left:
        warn(
            f"on meta still, since no average fills them: {', '.join(left[:10])}"
            f"{f' and {len(left) - 10} more' if len(left) > 10 else ''}; give them values before the model is used"
        )


def _materialise(model: torch.nn.Module, filled: set[str], device: torch.device) -> None:
    """Create on `device` the tensors on `meta` that will be filled; tied tensors stay tied under all names."""
    on_meta = (named.tensor for named in named_tensors(model) if named.tensor.is_meta and named.name in filled)
    old = {id(tensor): tensor for tensor in on_meta}
    new = {key: torch.empty_like(tensor, device=device) for key, tensor in old.items()}
    for key, tensor in old.items():
        if isinstance(tensor, torch.nn.Parameter):
            new[key] = torch.nn.Parameter(new[key], tensor.requires_grad)
    for module in model.modules():
        for named in (module.named_parameters, module.named_buffers):
            for name, value in [*named(recurse=False, remove_duplicate=False)]:
                if id(value) in new:
                    setattr(module, name, new[id(value)])


def warn_of_statistics(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], copies: Collection[str]) -> bool:
    """Warn, and return True, if a model still has the running statistics that are copies in averaged weights."""
    notice = statistics_notice(copies)
    if notice is None:
        return False
    tensors = {tensor.name: tensor.tensor for tensor in named_tensors(model)}
    for name in running_statistics(copies):
        present = held_part(tensors[name])
        if not torch.equal(present, weights[name].to(present.device, present.dtype)):
            return False  # the statistics were recomputed
    warn(notice)
    return True


@torch.no_grad()
def update_bn(model: torch.nn.Module, loader: Iterable[Any]) -> None:
    """Recompute a model's BatchNorm statistics for its present weights, with equal weight for every batch.

    It works like `torch.optim.swa_utils.update_bn`. Within `with ema.model(...)` the new statistics last
    until the end of the block, else permanently. Modes and momenta do not change.

    Arguments:
        model: a model in any mode, on any device; without BatchNorm layers nothing happens.
        loader: yields the model's inputs, or lists or tuples whose first item is the input, in host memory or not; a
            dict is passed as keyword arguments if `forward` accepts them. A loader without batches is an
            InvalidValueError. After any error the statistics are as before.
    """
    layers = [module for module in check_model(model).modules() if isinstance(module, _BatchNorm)]
    if not layers:
        return
    first = next(model.parameters(), next(model.buffers(), None))
    device, count = None if first is None else first.device, 0
    with ExitStack() as always, ExitStack() as on_error:
        for module in model.modules():
            always.callback(setattr, module, "training", module.training)
        for layer in layers:
            always.callback(setattr, layer, "momentum", layer.momentum)
            for buffer in layer.buffers(recurse=False):
                on_error.callback(buffer.copy_, buffer.clone())
            layer.reset_running_stats()
            layer.momentum = None  # the mean of all batches
        model.train()
        for count, batch in enumerate(loader, 1):  # noqa: B007  # `count` is read below
            value = _moved(batch[0] if isinstance(batch, list | tuple) else batch, device)
            model(**value) if _takes_keywords(model, value) else model(value)
        if not count:
            raise InvalidValueError("update_bn", "the loader gave no batch to measure BatchNorm statistics on")
        on_error.pop_all()


def _takes_keywords(model: torch.nn.Module, batch: Any) -> bool:
    """Return whether a batch is a dict of keyword arguments of the model."""
    try:
        inspect.signature(model.forward).bind(**batch)
    except TypeError:
        return False
    return True


def _moved(value: Any, device: torch.device | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
