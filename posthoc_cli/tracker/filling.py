"""Averaged weights in a model: filled in for good, or swapped in for a block."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError, NotReadyError
from posthoc_cli.tracker.model import ON_META, NamedTensor, check_model, named_tensors
from posthoc_cli.tracker.processes import is_sharded, local_part, reshard


@torch.no_grad()
def check_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
) -> dict[str, NamedTensor]:
    """Find the model's tensors that `weights` are for. Check names and shapes, and that the model's
    dtypes have the range of the values."""
    tensors = {tensor.name: tensor for tensor in named_tensors(check_model(model))}
    for name, value in weights.items():
        if name not in tensors:
            reason = "is in the averaged weights, but the model has no such tensor"
            raise ModelMismatchError(f"tensor {name!r}", reason)
        tensor = tensors[name].tensor
        if tensor.is_meta:
            hint = (
                "give it averaged ones with model.load_state_dict(ema.state_dict(sigma_rel=...), "
                "assign=True)"
            )
            raise InvalidValueError("tensor", ON_META, hint, value=f"{name!r}")
        _check_shape(name, tensor, value)
        check_fits(name, value, tensor.dtype)
    return {name: tensors[name] for name in weights}


def _check_shape(name: str, tensor: Tensor, value: Tensor) -> None:
    own = list(local_part(tensor).shape)
    shape = list(value.shape)
    if own == shape:
        return
    reason = f"has the shape {own} in the model, {shape} in the averaged weights"
    if is_sharded(tensor):
        reason = (
            "is sharded over processes, and this tracker was made before the sharding, or without "
            "the model"
        )
    raise ModelMismatchError(f"tensor {name!r}", reason)


def check_fits(
    name: str,
    values: Tensor,
    dtype: torch.dtype,
) -> None:
    """Raise a NonFiniteError if a dtype has too small a range for the values of a tensor."""
    if not (values.dtype.is_floating_point and dtype.is_floating_point):
        return
    if torch.finfo(dtype).max >= torch.finfo(values.dtype).max:
        return
    fits = values.to(dtype).float().isfinite()
    lost = values[values.isfinite() & ~fits]
    if lost.numel():
        largest = float(lost.abs().max())
        reason = f"{dtype} cannot hold its largest value, {largest:.6g}"
        hint = "take it in float32, or convert the model first, with model.float()"
        raise NonFiniteError(f"tensor {name!r}", reason, hint)


def _is_writable(tensor: Tensor) -> bool:
    """Return whether values can be copied into a tensor: not if its elements share memory
    (expanded), nor if it is sparse."""
    if tensor.layout != torch.strided:
        return False
    dimensions = zip(tensor.stride(), tensor.shape, strict=True)
    return all(stride > 0 or size < 2 for stride, size in dimensions)


_swapped: list[frozenset[int]] = []
"""The ids of the tensors of each open block."""

_entering = threading.RLock()  # held while a block is checked and noted


def is_swapped(model: nn.Module) -> bool:
    """Return whether a model, a part of it, or a model that it is a part of, holds averaged
    weights."""
    if not _swapped:
        return False
    ids = frozenset(map(id, chain(model.parameters(), model.buffers())))
    return any(ids & held for held in [*_swapped])


@contextmanager
def swap_in(
    model: nn.Module,
    weights: Mapping[str, Tensor],
) -> Iterator[None]:
    """Give the model `weights` and eval mode for the block; afterwards, even after an error,
    restore its parameters, buffers, gradients and modes.

    Meanwhile the model's raw values are kept in host memory, so that an accelerator holds no second
    copy.
    """
    targets = check_weights(model, weights)
    kept = {id(target.tensor): target.tensor for target in targets.values()}
    kept |= {id(buffer): buffer for buffer in model.buffers()}  # a forward pass may change them
    held = frozenset(kept)
    try:
        with _entering:
            if is_swapped(model):
                reason = "holds averaged weights now"
                raise NotReadyError("model", reason, "evaluate one average after the other")
            _swapped.append(held)
        raw = [_RawTensor(tensor) for tensor in kept.values() if not tensor.is_meta]
        modes = [(module, module.training) for module in model.modules()]
        gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        try:
            for parameter in model.parameters():  # gradients belong to the raw weights
                parameter.grad = None
            fill_in(targets, weights)
            model.eval()
            yield
        finally:
            reshard(model)  # a forward pass may have replaced chunks by complete tensors
            for tensor in raw:
                tensor.restore()
            _finish_copies(kept.values())
            for module, training in modes:
                module.training = training
            for parameter, gradient in gradients:
                parameter.grad = gradient
    finally:
        with _entering:
            _swapped[:] = [each for each in _swapped if each is not held]


class _RawTensor:
    """A tensor's part in this process, and its values, on the host."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._part = local_part(tensor).data
        self._values: Tensor | None = None
        if _is_writable(self._part):
            self._values = self._part.to("cpu", non_blocking=self._part.is_cuda, copy=True)

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore(self) -> None:
        if self._values is None:
            self._tensor.data = self._part
        else:
            self._part.copy_(self._values, non_blocking=self._part.is_cuda)


@torch.inference_mode(False)
@torch.no_grad()
def fill_in(
    targets: Mapping[str, NamedTensor],
    weights: Mapping[str, Tensor],
) -> None:
    """Copy weights into their targets in a model."""
    for name, target in targets.items():
        part = local_part(target.tensor)
        if _is_writable(part):
            part.data.copy_(weights[name], non_blocking=part.is_cuda)
        else:
            part.data = weights[name].to(part.device, part.dtype, copy=True)
    _finish_copies(target.tensor for target in targets.values())


def _finish_copies(tensors: Iterable[Tensor]) -> None:
    """Wait for the copies into tensors, and have autocast copy parameters anew."""
    for device in {tensor.device for tensor in tensors}:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    torch.clear_autocast_cache()
