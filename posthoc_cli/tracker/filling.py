"""Averaged weights in a model: filled in for good, or swapped in for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch

from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError
from posthoc_cli.tracker.model import ON_META, Block, NamedTensor, check_model, named_tensors
from posthoc_cli.tracker.processes import held_part, is_fully_sharded, is_sharded, reshard


def targets_of(
    model: torch.nn.Module, shapes: Mapping[str, tuple[int, ...]], dtype: object = None
) -> dict[str, NamedTensor]:
    """Return the model's tensors to load, after checking names, shapes and, unless None, that it
    can take a `dtype`."""
    tensors = {tensor.name: tensor for tensor in named_tensors(check_model(model))}
    for name, shape in shapes.items():
        tensor = tensors[name].tensor if name in tensors else None
        if tensor is None:
            reason = "is in the averaged weights, but the model has no such tensor"
        elif tensor.is_meta:
            raise InvalidValueError("tensor", *ON_META, value=f"{name!r}")
        elif (held := list(held_part(tensor).shape)) == list(shape):
            continue
        elif is_sharded(tensor):
            reason = (
                "is sharded over processes, and this tracker was made before that, or "
                "without the model"
            )
        else:
            reason = f"has the shape {held} in the model, {list(shape)} in the averaged weights"
        raise ModelMismatchError(f"tensor {name!r}", reason)
    keeps = any(map(is_fully_sharded, model.modules()))
    if dtype is not None and (keeps or any(is_sharded(entry.tensor) for entry in tensors.values())):
        raise InvalidValueError(
            "dtype", "a sharded model keeps the dtypes it has", "leave dtype out", value=dtype
        )
    return {name: tensors[name] for name in shapes}


@torch.no_grad()
def check_weights(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], own_dtypes: bool = True
) -> dict[str, NamedTensor]:
    """Return the model's tensors that `weights` are for, see `targets_of`; a NonFiniteError names
    one out of range."""
    dtypes = {str(value.dtype) for value in weights.values()} if not own_dtypes else ()
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    targets = targets_of(model, shapes, ", ".join(sorted(dtypes)) or None)
    for name, target in targets.items() if own_dtypes else ():
        _check_fits(name, weights[name], target.tensor.dtype)
    return targets


def _check_fits(name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise a NonFiniteError if a model's dtype has too small a range for the values of its
    tensor."""
    both = values.dtype.is_floating_point and dtype.is_floating_point
    if not both or torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return
    lost = values.isfinite() & ~values.to(dtype).float().isfinite()
    if bool(lost.any()):
        largest = f"cannot hold its largest value, {float(values[lost].abs().max()):.6g}"
        reason = f"the model's {dtype} {largest}; dtype=torch.float32 changes the model's"
        raise NonFiniteError(f"tensor {name!r}", reason)


def load_weights(model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy `weights` into the model's tensors of these names; an error leaves the model
    unchanged."""
    check_weights(model, weights)
    fill(model, weights.items())


@torch.inference_mode(False)
@torch.no_grad()
def fill(
    model: torch.nn.Module, weights: Iterable[tuple[str, torch.Tensor]], own_dtypes: bool = True
) -> None:
    """Load weights, whose names and shapes fit, one by one; the model keeps its dtypes or takes
    theirs."""
    targets = {tensor.name: tensor.tensor for tensor in named_tensors(model)}
    for name, value in weights:
        if own_dtypes:
            _check_fits(name, value, targets[name].dtype)
        _load(targets[name], value, own_dtypes)


def _load(target: torch.Tensor, value: torch.Tensor, own_dtype: bool) -> None:
    """Copy one value into a model's tensor, for a DTensor into this process's part."""
    target = held_part(target)
    if _is_writable(target) and (own_dtype or value.dtype == target.dtype):
        target.data.copy_(value)
    else:
        target.data = value.to(target.device, target.dtype if own_dtype else value.dtype, copy=True)


def _is_writable(tensor: torch.Tensor) -> bool:
    """Return whether values can be copied into a tensor: not if elements share memory (expanded),
    nor if sparse."""
    is_dense = tensor.layout == torch.strided
    return is_dense and all(
        step > 0 or size < 2 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


@contextmanager
def swapped_in(
    model: torch.nn.Module, weights: Mapping[str, torch.Tensor], own_dtypes: bool = True
) -> Iterator[None]:
    """Give the model `weights` and eval mode for the block; restore everything afterwards, also on
    an error.

    Meanwhile the model's raw values are kept in host memory, so that an accelerator holds no second
    copy.
    """
    targets = check_weights(model, weights, own_dtypes)
    for name, target in targets.items():
        if target.tensor.is_inference():
            hint = "make the model under torch.no_grad()"
            raise InvalidValueError(
                "model", f"its tensor {name!r} was made in inference mode, and is read-only", hint
            )
    new_dtypes = {id(target.tensor): weights[name].dtype for name, target in targets.items()}
    # Tensors may be replaced while the weights are swapped; the modules that hold them may not.
    holders = (
        id(module)
        for module in model.modules()
        if any(
            id(one) in new_dtypes
            for one in chain(module.parameters(recurse=False), module.buffers(recurse=False))
        )
    )
    block = Block(frozenset(chain(new_dtypes, holders)))
    with ExitStack() as stack:
        stack.callback(block.leave)
        block.enter()
        with torch.inference_mode(False), torch.no_grad():
            for module in model.modules():
                block.undo.callback(setattr, module, "training", module.training)
                for contents in (module._parameters, module._buffers):
                    for key, tensor in contents.items():
                        dtype = None if tensor is None else new_dtypes.get(id(tensor))
                        block.undo.callback(_restorer(contents, key, dtype, own_dtypes))
        # is called first: a forward pass may have replaced chunks by complete tensors
        block.undo.callback(reshard, model)
        # The gradients belong to the raw weights, not to the averaged ones, and may have another
        # dtype.
        for parameter in model.parameters():
            parameter.grad = None
        with torch.inference_mode(False), torch.no_grad():
            for name, target in targets.items():
                _load(target.tensor, weights[name], own_dtypes)
        try:
            model.eval()
        except NotImplementedError as error:  # of torch.export
            hint = "take the average by state_dict, or fill the model by load_into"
            raise InvalidValueError("model", f"has no eval mode: {error}", hint) from error
        yield


def _restorer(
    contents: dict[str, Any], key: str, new_dtype: torch.dtype | None, own_dtypes: bool
) -> Callable[[], None]:
    """Return a function that restores a module's tensor, whose values weights of `new_dtype`
    replace, if not None."""
    tensor: torch.Tensor | None = contents[key]
    if tensor is None:
        return lambda: contents.__setitem__(key, None)
    held = held_part(tensor)
    device = tensor.device
    gradients: tuple[bool, torch.Tensor | None] | None = None
    if isinstance(tensor, torch.nn.Parameter):
        gradients = tensor.requires_grad, tensor.grad
        # Where elements share memory it is not written to: other memory takes its place.
        saves = new_dtype is not None and _is_writable(held)
        is_replaced = saves and not own_dtypes and new_dtype != tensor.dtype
    else:  # a forward pass may change a buffer; on meta it has no values to save
        is_replaced = False
        saves = not tensor.is_meta and _is_writable(tensor)
    storage = None if is_replaced else held.data
    values = held.data.to("cpu", copy=True) if saves else None

    def restore() -> None:
        # moving a module between kinds of devices may replace the Parameter itself
        contents[key] = tensor
        if storage is not None:
            if values is not None:
                storage.copy_(values)
            if held is tensor:
                tensor.data = storage
        elif values is not None:
            tensor.data = values.to(device)
        if gradients is not None:
            tensor.requires_grad_(gradients[0])
            tensor.grad = gradients[1]

    return restore
