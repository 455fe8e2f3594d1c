"""Averaged weights in a model: filled in for good, or swapped in for a block."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from itertools import chain
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn

# see `posthoc_ema`
from torch._compile import _disable_dynamo as not_compiled
from torch.nn.parameter import is_lazy

from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    RefusedCallError,
    list_first,
)
from posthoc_cli.run import Weights
from posthoc_cli.synthesis.calculator import holds
from posthoc_cli.tracker.model import ON_META, NamedTensor, check_model, named_tensors
from posthoc_cli.tracker.processes import (
    is_sharded,
    local_part,
    refresh_shards,
    reshard,
)

Module = TypeVar("Module", bound=nn.Module)


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
    finite = values[values.isfinite()]
    if not holds(dtype, finite):
        largest = float(finite.abs().max())
        reason = f"{dtype} cannot hold its largest value, {largest:.6g}"
        hint = "take it in float32, or convert the model first, with model.float()"
        raise NonFiniteError(f"tensor {name!r}", reason, hint)


def _is_writable(tensor: Tensor) -> bool:
    """Return whether values can be copied into a tensor: not if its elements share memory
    (expanded), nor if it is sparse or nested."""
    if tensor.is_nested or tensor.layout != torch.strided:
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
    ids = _part_ids(model)
    return any(ids & held for held in [*_swapped])


def check_raw(model: nn.Module, call: str) -> None:
    """Raise a RefusedCallError if a model holds averaged weights."""
    if is_swapped(model):
        reason = "the model holds averaged weights now"
        raise RefusedCallError(call, reason, "call it outside `with ema.model(...)`")


def _part_ids(model: nn.Module) -> frozenset[int]:
    """Find the ids of a model's tensors, and of its modules: a block may replace tensors."""
    return frozenset(map(id, chain(model.parameters(), model.buffers(), model.modules())))


@contextmanager
def swap_in(
    model: nn.Module,
    weights: Mapping[str, Tensor],
) -> Iterator[None]:
    """Give the model `weights` and eval mode for the block; afterwards, even after an error,
    restore its parameters, buffers, gradients and modes.

    Meanwhile the model's raw values are kept in host memory, so that an accelerator holds no second
    copy. It is not pinned: torch would pin up to twice as much.

    Raises a ModelMismatchError with the raw `weights` if the model can no longer hold them.
    """
    targets = check_weights(model, weights)
    held = _part_ids(model)
    try:
        with _entering:
            if is_swapped(model):
                reason = "holds averaged weights now"
                raise RefusedCallError("model", reason, "evaluate one average after the other")
            _swapped.append(held)
        raw = _RawModel(model, targets.values())
        try:
            raw.clear_gradients()
            fill_in(targets, weights)
            model.eval()
            yield
        finally:
            raw.restore()
    finally:
        with _entering:
            _swapped[:] = [each for each in _swapped if each is not held]


class AveragedModel(AbstractContextManager[Module]):
    """A `with` block in which a model holds averaged weights of time `t`, made when it is
    entered."""

    def __init__(self, model: Module, make: Callable[[], Weights]) -> None:
        self.t: float | None = None
        self._model = model
        self._make = make
        self._stack = ExitStack()

    @not_compiled
    def __enter__(self) -> Module:
        weights = self._make()
        self._stack.enter_context(swap_in(self._model, weights))
        self.t = weights.t
        return self._model

    @not_compiled
    def __exit__(self, *error: Any) -> bool | None:
        return self._stack.__exit__(*error)

    def __call__(self, *_: object, **__: object) -> NoReturn:
        hint = "with ema.model(model, sigma_rel) as averaged: averaged(...)"
        raise RefusedCallError("model", "holds averaged weights only within a `with` block", hint)


class _RawModel:
    """The tensors and modules of a model before a block that fills some of the tensors."""

    def __init__(self, model: nn.Module, filled: Iterable[NamedTensor]) -> None:
        self._model = model
        changing = {id(target.tensor) for target in filled}
        changing.update(map(id, model.buffers()))  # a forward pass may change them
        modules = dict(model.named_modules())
        self._modes = [(module, module.training) for module in modules.values()]
        self._modules: dict[str, _RawModule] = {}
        for path, module in modules.items():
            # the first batch gives a module of lazy tensors another class, which stays
            if not _has_lazy_tensors(module):
                self._modules[path] = _RawModule(module)
        self._adapters = [_RawAdapter(layer) for layer in _find_adapters(modules.values())]
        known: dict[int, _RawTensor] = {}
        self._tensors: dict[str, _RawTensor] = {}  # by all names of a tied one
        for entry in named_tensors(model):
            key = id(entry.tensor)
            if is_lazy(entry.tensor):
                continue
            if key not in known:
                known[key] = _RawTensor(entry, key in changing)
            self._tensors[entry.name] = known[key]
        self._gradients = [(parameter, parameter.grad) for parameter in model.parameters()]

    def clear_gradients(self) -> None:
        """Remove the gradients for the block: they belong to the raw weights."""
        for parameter, _ in self._gradients:
            parameter.grad = None

    def restore(self) -> None:
        """Put the same objects, in the same memory, and their values back, whatever the block has
        converted, moved, replaced or rebuilt."""
        # a forward pass may have replaced chunks by complete tensors
        lost = [f"{name}: its complete tensor was replaced" for name in reshard(self._model)]
        present = dict(self._model.named_modules(remove_duplicate=False))
        raw = dict.fromkeys(self._tensors.values())
        lost += _restore_each(raw, _RawTensor.restore_memory)
        try:
            for path, module in self._modules.items():
                lost += module.restore(present.get(path))
            self._undo_merges()
        finally:
            lost += _restore_each(raw, _RawTensor.restore_values)
            self._finish(lost)

    def _undo_merges(self) -> None:
        """Have layers subtract what they have added to other weights, in the body or in `eval`,
        while the memory still holds averaged ones."""
        for adapter in self._adapters:
            adapter.unmerge()
        _, mode = self._modes[0]
        self._model.train(mode)

    def _finish(self, lost: Sequence[str]) -> None:
        """Restore modes and gradients; raise an error that has the raw weights if some are lost."""
        for module, mode in self._modes:
            module.training = mode
        parts: list[_RawModule | _RawTensor] = [*self._modules.values(), *self._tensors.values()]
        if any(part.was_replaced for part in parts):
            refresh_shards(self._model)
        torch.clear_autocast_cache()
        if lost:
            reason = f"cannot have its own weights again after the block: {list_first(lost)}"
            failure = ModelMismatchError(
                "model", reason, "the attribute weights of this error has them"
            )
            failure.weights = {name: tensor.raw for name, tensor in self._tensors.items()}
            raise failure
        for parameter, gradient in self._gradients:
            parameter.grad = gradient


def _restore_each(
    tensors: Iterable[_RawTensor],
    restore: Callable[[_RawTensor], None],
) -> list[str]:
    """Restore tensors; return why some cannot be restored."""
    failures = []
    for tensor in tensors:
        try:
            restore(tensor)
        except RuntimeError as error:
            failures.append(f"{tensor.name}: {error}")
    return failures


def _has_lazy_tensors(module: nn.Module) -> bool:
    """Return whether a module has tensors of its own that have no shape yet."""
    tensors = chain(module._parameters.values(), module._buffers.values())
    return any(is_lazy(tensor) for tensor in tensors if tensor is not None)


_REGISTRIES = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)]
"""The attributes in which every module registers tensors, children and hooks."""

_CONTENT = ("_parameters", "_buffers", "_modules")


class _RawModule:
    """A module before a block: its class, its attributes, and what it had registered.

    Attributes and hooks that the block sets stay, such as counters and caches of a forward pass,
    unless the structure shows that it has rebuilt the module (fused layers, merged branches,
    removed a weight norm): then attributes, such as `forward` or a flag, belong to that structure.
    """

    def __init__(self, module: nn.Module) -> None:
        self.was_replaced = False  # whether anything was registered anew
        self._module = module
        self._class = type(module)
        self._properties = _find_properties(self._class)
        self._attributes = _read_attributes(module)
        self._registered = {name: copy(self._attributes[name]) for name in _REGISTRIES}
        self._structure = self._read_structure()

    def _read_structure(self) -> tuple[object, ...]:
        """Read the module's class, `forward` and children, and the sizes of its tensors, except
        caches that were registered since."""
        module = self._module
        forward = vars(module).get("forward")
        children = {name: id(child) for name, child in module._modules.items()}
        parameters = {name: _size(tensor) for name, tensor in module._parameters.items()}
        buffers = {name: _size(tensor) for name, tensor in module._buffers.items()}
        for name in module._non_persistent_buffers_set - self._registered["_buffers"].keys():
            buffers.pop(name, None)
        properties = _find_properties(type(module))
        return type(module), properties, id(forward), children, parameters, buffers

    def restore(self, present: nn.Module | None) -> list[str]:
        """Register again what was replaced or removed, and restore the rest if the module was
        rebuilt or is not the one that its place in the model has at present. Return what something
        else hides now."""
        if present is not self._module or self._read_structure() != self._structure:
            self._restore_attributes()
        hidden = []
        for name in _CONTENT:
            hidden += self._register_again(self._attributes[name], self._registered[name])
        return hidden

    def _restore_attributes(self) -> None:
        """Restore class, attributes and hooks, and remove what was registered since."""
        module = self._module
        module.__class__ = self._class
        # torch keeps a parametrization as a property of a class that it makes for the module
        for name in _find_properties(self._class).keys() - self._properties.keys():
            delattr(self._class, name)
        for name in self._properties.keys() - _find_properties(self._class).keys():
            setattr(self._class, name, self._properties[name])
        for name in _read_attributes(module).keys() - self._attributes.keys():
            del vars(module)[name]
        vars(module).update(self._attributes)
        for name, before in self._registered.items():
            registry = self._attributes[name]
            if name not in _CONTENT:
                registry.clear()
                registry.update(before)
                continue
            for key in registry.keys() - before.keys():
                del registry[key]

    def _register_again(
        self,
        registry: dict[str, Any],
        before: Mapping[str, Any],
    ) -> list[str]:
        module = self._module
        hidden = []
        for key, value in before.items():
            if key in registry and registry[key] is value:
                continue
            self.was_replaced = True
            registry[key] = value
            setattr(module, key, value)  # some modules keep it elsewhere, too, as an LSTM does
            if getattr(module, key) is not value:
                hidden.append(f"{key} of {type(module).__name__}")
        if [*registry][: len(before)] != [*before]:
            for key in before:
                registry[key] = registry.pop(key)
        return hidden


def _read_attributes(module: nn.Module) -> dict[str, Any]:
    """Read a module's own attributes except lists: an LSTM's keeps weak references, and while they
    exist torch cannot swap its parameters."""
    return {name: value for name, value in vars(module).items() if not isinstance(value, list)}


def _find_properties(kind: type) -> dict[str, property]:
    """Find the properties that a class itself defines."""
    return {name: value for name, value in vars(kind).items() if isinstance(value, property)}


def _size(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.numel()


def _find_adapters(modules: Iterable[nn.Module]) -> list[Any]:
    """Find PEFT's layers whose adapters are not merged into their weights."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in modules if isinstance(module, BaseTunerLayer)]
    return [layer for layer in layers if not layer.merged]


class _RawAdapter:
    """One of PEFT's layers before a block, and checksums of its weights.

    Merging adds the adapter to weights that may be frozen, of which there is no copy.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = layer
        parameters = layer.get_base_layer().parameters(recurse=False)
        parts = [local_part(parameter).data for parameter in parameters]
        # merging replaces quantized weights
        self._parts = [part for part in parts if type(part) is Tensor and not part.is_meta]
        self._checksums = [*map(_checksum, self._parts)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the averaged adapter from the weights, if the block has added it to them."""
        if not self._layer.merged:
            return
        if [*map(_checksum, self._parts)] != self._checksums:
            self._layer.unmerge()
        else:  # it was added to a copy
            self._layer.merged_adapters.clear()


def _checksum(tensor: Tensor) -> int:
    """Sum the bits of a tensor's values, as integers: the sum does not depend on the order."""
    bits: torch.dtype = getattr(torch, f"int{8 * tensor.element_size()}")
    return int(tensor.view(bits).sum())


class _RawTensor:
    """A tensor's memory in this process, and if its values may change these, on the host."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, entry: NamedTensor, is_changing: bool) -> None:
        self.name = entry.name
        self.tensor = entry.tensor
        self.was_replaced = False  # whether the content of a sharded one was exchanged
        self._requires_grad = entry.tensor.requires_grad
        self._before = entry.tensor.detach()
        self._part = local_part(entry.tensor).data
        self._values: Tensor | None = None
        if is_changing and not self._part.is_meta and _is_writable(self._part):
            self._values = self._part.to("cpu", copy=True)
            self._bytes = self._part.untyped_storage().nbytes()

    @property
    def raw(self) -> Tensor:
        return self._part if self._values is None else self._values

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore_memory(self) -> None:
        tensor = self.tensor
        if not is_sharded(tensor):
            tensor.data = self._part
        elif not _is_same(local_part(tensor), self._part):
            before = nn.Parameter(self._before, requires_grad=self._requires_grad)
            torch.utils.swap_tensors(tensor, before)  # type: ignore[no-untyped-call]
            self.was_replaced = True

    @torch.inference_mode(False)
    @torch.no_grad()
    def restore_values(self) -> None:
        if self._values is not None:
            storage = self._part.untyped_storage()
            if storage.nbytes() < self._bytes:  # the block has freed it
                storage.resize_(self._bytes)
            self._part.copy_(self._values)
        if self._requires_grad != self.tensor.requires_grad:
            self.tensor.requires_grad_(self._requires_grad)


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are views of the same elements."""
    return one.dtype == other.dtype and one.device == other.device and one.is_set_to(other)


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
            part.data.copy_(weights[name])
        else:
            part.data = weights[name].to(part.device, part.dtype, copy=True)
    torch.clear_autocast_cache()  # which copies of parameters fill
