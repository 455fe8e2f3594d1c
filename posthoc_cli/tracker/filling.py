"""Averaged weights in a model: filled in for good, or swapped in for a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from itertools import chain
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError, NotReadyError
from posthoc_cli.tracker.model import ON_META, NamedTensor, check_model, named_tensors
from posthoc_cli.tracker.processes import held_part, is_sharded, reshard


@torch.no_grad()
def check_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
) -> dict[str, NamedTensor]:
    """Return the model's tensors that `weights` are for, after checking names, shapes and that its
    dtypes have the range of the values."""
    tensors = {tensor.name: tensor for tensor in named_tensors(check_model(model))}
    for name, value in weights.items():
        if name not in tensors:
            reason = "is in the averaged weights, but the model has no such tensor"
            raise ModelMismatchError(f"tensor {name!r}", reason)
        tensor = tensors[name].tensor
        if tensor.is_meta:
            hint = (
                "model.load_state_dict(ema.state_dict(sigma_rel=...), assign=True) gives it those "
                "of an average"
            )
            raise InvalidValueError("tensor", ON_META, hint, value=f"{name!r}")
        _check_shape(name, tensor, value)
        _check_fits(name, value, tensor.dtype)
    return {name: tensors[name] for name in weights}


def _check_shape(name: str, tensor: Tensor, value: Tensor) -> None:
    own = list(held_part(tensor).shape)
    shape = list(value.shape)
    if own == shape:
        return
    reason = f"has the shape {own} in the model, {shape} in the averaged weights"
    if is_sharded(tensor):
        reason = (
            "is sharded over processes, and this tracker was made before that, or without the model"
        )
    raise ModelMismatchError(f"tensor {name!r}", reason)


def _check_fits(
    name: str,
    values: Tensor,
    dtype: torch.dtype,
) -> None:
    """Raise a NonFiniteError if a model's dtype has too small a range for the values of its
    tensor."""
    if not (values.dtype.is_floating_point and dtype.is_floating_point):
        return
    if torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return
    fits = values.to(dtype).float().isfinite()
    lost = values[values.isfinite() & ~fits]
    if lost.numel():
        largest = float(lost.abs().max())
        reason = f"the model's {dtype} cannot hold its largest value, {largest:.6g}"
        hint = "convert the model first, by model.float()"
        raise NonFiniteError(f"tensor {name!r}", reason, hint)


def _load(target: Tensor, value: Tensor) -> None:
    """Copy one value into a model's tensor, for a DTensor into this process's part."""
    target = held_part(target)
    if _is_writable(target):
        target.data.copy_(value, non_blocking=target.is_cuda)
    else:
        target.data = value.to(target.device, target.dtype, copy=True)


def _is_writable(tensor: Tensor) -> bool:
    """Return whether values can be copied into a tensor: not if elements share memory (expanded),
    nor if sparse."""
    if tensor.layout != torch.strided:
        return False
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    return all(stride > 0 or size < 2 for stride, size in dimensions)


class Block:
    """A block with averaged weights. `held` are the ids of the swapped tensors, and of the modules
    that hold them; `undo` refers to all of these objects, so that no id is reused."""

    def __init__(self, held: frozenset[int]) -> None:
        self.held = held
        self.undo = ExitStack()  # calls all callbacks even if one fails
        self._thread = get_ident()

    def enter(self) -> None:
        """Begin the block; refuse it while another thread has a block of the same tensors.

        That block would take the averages of this one for the raw weights.
        """
        swapped.append(self)
        self.undo.callback(swapped.remove, self)
        for other in swapped[: swapped.index(self)]:
            if other.held & self.held and other._thread != self._thread:
                reason = "another thread evaluates averaged weights of this model"
                hint = "evaluate one average after the other, or another copy of the model"
                raise NotReadyError("model", reason, hint)

    def leave(self) -> None:
        """Undo the block, unless one around it has undone both.

        A later block of the same thread that is still open is undone first, and is an error: it
        would restore this block's averages as raw weights.
        """
        if self not in swapped:
            return
        within = []
        for other in swapped[swapped.index(self) + 1 :]:
            if other.held & self.held and other._thread == self._thread:
                within.append(other)
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            for block in (self, *within):
                stack.callback(block.undo.close)
        if within:
            reason = "a block was left before one that was entered within it; both are undone"
            raise NotReadyError("model", reason, "leave blocks in reverse order")


swapped: list[Block] = []
"""The open blocks of this process."""


def is_swapped(model: nn.Module) -> bool:
    """Return whether a model, a part of it, or one that it is a part of, holds averaged weights."""
    if not swapped:
        return False
    objects = chain(model.modules(), model.parameters(), model.buffers())
    ids = frozenset(map(id, objects))
    return any(ids & block.held for block in [*swapped])


@contextmanager
def swapped_in(
    model: nn.Module,
    weights: Mapping[str, Tensor],
) -> Iterator[None]:
    """Give the model `weights` and eval mode for the block; restore everything afterwards, also on
    an error.

    Meanwhile the model's raw values are kept in host memory, so that an accelerator holds no second
    copy.
    """
    targets = check_weights(model, weights)
    for name, target in targets.items():
        if target.tensor.is_inference():
            hint = "make the model under torch.no_grad()"
            raise InvalidValueError(
                "model", f"its tensor {name!r} was made in inference mode, and is read-only", hint
            )
    replaced = {id(target.tensor) for target in targets.values()}
    block = Block(frozenset(chain(replaced, _holders(model, replaced))))
    with ExitStack() as stack:
        stack.callback(block.leave)
        block.enter()
        _keep_raw(model, replaced, block.undo)
        # the gradients belong to the raw weights, not to the averaged ones
        for parameter in model.parameters():
            parameter.grad = None
        fill_in(targets, weights)
        try:
            model.eval()
        except NotImplementedError as error:  # of torch.export
            hint = "take the average by state_dict, or fill the model by load_into"
            raise InvalidValueError("model", f"has no eval mode: {error}", hint) from error
        yield


@torch.inference_mode(False)
@torch.no_grad()
def _keep_raw(
    model: nn.Module,
    replaced: Set[int],
    undo: ExitStack,
) -> None:
    """Have `undo` restore a model, the values of those of its tensors with `replaced` ids too."""
    undo.callback(_forget_computed)  # is called last
    for module in model.modules():
        undo.callback(_module_restorer(module))
        for tensor in chain(module._parameters.values(), module._buffers.values()):
            if tensor is not None:
                undo.callback(_restorer(tensor, id(tensor) in replaced))
    # is called first: a forward pass may have replaced chunks by complete tensors
    undo.callback(reshard, model)


@torch.inference_mode(False)
@torch.no_grad()
def fill_in(
    targets: Mapping[str, NamedTensor],
    weights: Mapping[str, Tensor],
) -> None:
    """Copy weights into their targets in a model, and wait once for all copies, of the raw values
    and of the averages."""
    for name, target in targets.items():
        _load(target.tensor, weights[name])
    for device in {target.tensor.device for target in targets.values()}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    _forget_computed()


def _forget_computed() -> None:
    """Have torch compute anew what it has from weights that have changed: autocast's copies of
    parameters, and the tensors of `parametrize.cached`."""
    torch.clear_autocast_cache()
    parametrize._cache.clear()


def _holders(
    model: nn.Module,
    tensors: Set[int],
) -> Iterator[int]:
    """Yield the ids of the modules that hold some of these tensors, which may be replaced while the
    weights are swapped; the modules may not."""
    for module in model.modules():
        own = chain(module._parameters.values(), module._buffers.values())
        if any(id(tensor) in tensors for tensor in own):
            yield id(module)


def _module_restorer(module: nn.Module) -> Callable[[], None]:
    """Return a function that restores what a module has and is: moving it between kinds of devices
    may replace parameters, quantizing it modules, and parametrizing it its class. A buffer that a
    forward pass has added, such as a table of longer positions, stays."""
    kind = type(module)
    training = module.training
    registries: list[dict[str, Any]] = [module._modules, module._parameters, module._buffers]
    contents = [{**registry} for registry in registries]

    def restore() -> None:
        if type(module) is not kind:
            module.__class__ = kind
        module.training = training
        for registry, before in zip(registries, contents, strict=True):
            if registry is not module._buffers:
                for name in registry.keys() - before.keys():
                    del registry[name]
            registry.update(before)

    return restore


def _restorer(tensor: Tensor, is_replaced: bool) -> Callable[[], None]:
    """Return a function that restores a tensor, whose values weights replace or not."""
    part = held_part(tensor)
    is_parameter = isinstance(tensor, nn.Parameter)
    requires_grad = tensor.requires_grad
    grad = tensor.grad if is_parameter else None
    # A forward pass may change a buffer. On meta it has no values to save; where elements share
    # memory it is not written to: other memory takes its place.
    saves = (is_replaced or not is_parameter) and not tensor.is_meta and _is_writable(part)
    storage = part.data
    values = None
    if saves:  # asynchronous copies are waited for together
        values = storage.to("cpu", non_blocking=part.is_cuda, copy=True)

    def restore() -> None:
        if values is not None:
            storage.copy_(values, non_blocking=storage.is_cuda)
        if part is tensor:
            tensor.data = storage
        if is_parameter:
            tensor.requires_grad_(requires_grad)
            tensor.grad = grad

    return restore
