"""The tensors of a model: their names, which of them are averaged, copied or left out, and whether
they match a run.

Names do not depend on wrappers. `torch.compile`, DataParallel, DistributedDataParallel and
activation checkpointing insert a child between a module and its tensors' names. Such a child is
recognised by its parent's type, never by its name: a user's module may have a child called
`module`. Tensors of PEFT's adapters have PEFT's names.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from posthoc_cli.dtypes import EPS, stored_name, torch_dtype
from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    RefusedCallError,
)
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.selection import Selection, running_statistics
from posthoc_cli.snapshots.source import TrackedTensor
from posthoc_cli.snapshots.weights_sample import index_within, places
from posthoc_cli.tracker.processes import (
    Members,
    as_dtensor,
    is_sharded,
    local_box,
    local_tensors,
    reshard,
)

Value = TypeVar("Value")
Shape = tuple[int, ...]

EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)  # dtypes for which torch has no arithmetic
AVERAGED_DTYPES = tuple(map(torch_dtype, EPS))

ON_META = "is on the meta device and has no values"

_OTHER_DTYPE = (
    "convert the model before the tracker is made; or use torch.autocast, which does "
    "not change parameters"
)
_SHAPED_BY_DATA = (
    "if the first batch gives it its shape, run one through the model before the tracker is made"
)
_FROZEN_TOO = (
    "call update_ while the same parameters require gradients, or make the tracker with "
    "include='*', which tracks frozen ones, too"
)


@dataclass(frozen=True)
class TrackedModel:
    """The tracked tensors of a model, by the name they are stored under, as far as they must not
    change during a run.

    Floating-point parameters are averaged, and BatchNorm's running statistics, and the buffers that
    the user wants averaged; other persistent buffers and parameters are copied. For a sharded model
    these are the tensors that this process owns.
    """

    tensors: dict[str, TrackedTensor]
    shapes: Mapping[str, Shape]  # of the complete tensors
    boxes: Mapping[str, Box]  # the elements that this process holds
    aliases: dict[str, str]  # further names of these tensors (tied parameters) -> the stored name
    left_out: tuple[str, ...]  # names in the model's state that are not tracked
    frozen: frozenset[str] = frozenset()  # names of parameters without gradients
    is_sharded: bool = False
    members: Members = field(default_factory=Members)  # the processes that track the model
    # of a sharded one: all averages' shapes
    everywhere: Mapping[str, Shape] = field(default_factory=dict)

    @property
    def known_names(self) -> frozenset[str]:
        return frozenset(self.tensors.keys() | self.aliases.keys())

    @property
    def complete_shapes(self) -> Mapping[str, Shape]:
        """The shapes of the weights of all processes."""
        return self.everywhere or _select(self.shapes, {*self.weights})

    @property
    def weights(self) -> list[str]:
        """Names of the averages that are rounded, measured and sketched: all but running
        statistics."""
        return [name for name, tensor in self.tensors.items() if tensor.role == "average"]

    @cached_property
    def sample_places(self) -> dict[int, tuple[str, int]]:
        """The elements of a snapshot's sample that this process holds, by number: name, and
        row-major local index."""
        own = {}
        for number, (name, index) in enumerate(places(self.complete_shapes)):
            if name not in self.tensors:
                continue
            local = index_within(self.boxes[name], self.shapes[name], index)
            if local is not None:
                own[number] = name, local
        return own

    def dtypes(self, copied: bool) -> dict[str, torch.dtype]:
        """List the model's dtypes, by name, of the copied tensors or else of the averaged ones."""
        dtypes = {}
        for name, tensor in self.tensors.items():
            if (tensor.role == "copy") == copied:
                dtypes[name] = torch_dtype(tensor.dtype)
        return dtypes

    def select_for(self, members: Members) -> TrackedModel:
        """Select the tensors that this process averages and writes."""
        names = members.select_owned(self.tensors.keys())
        aliases = {alias: name for alias, name in self.aliases.items() if name in names}
        return replace(
            self,
            tensors=_select(self.tensors, names),
            shapes=_select(self.shapes, names),
            boxes=_select(self.boxes, names),
            aliases=aliases,
            members=members,
        )

    def check(
        self,
        current: TrackedModel,
        elsewhere: Set[str] = frozenset(),
    ) -> None:
        """Raise a ModelMismatchError that names a tensor whose name, shape, dtype, role or tie is
        not the same.

        `elsewhere` are the tensors of other processes, such as other stages of a pipeline.
        """
        names = chain(self.tensors, self.aliases, current.tensors, current.aliases)
        others = elsewhere - current.known_names
        for name in dict.fromkeys(names):
            if name in others:
                continue
            was = self._describe(name)
            now = current._describe(name)
            if now != was:
                reason = f"is {now}, and was {was} when tracking began"
                raise ModelMismatchError(f"tensor {name!r}", reason, self._hint(name, current))

    def _hint(self, name: str, current: TrackedModel) -> str:
        """Name the way out where a tensor is not the same."""
        is_found = name in current.tensors
        if name in self.tensors and is_found:
            if self.tensors[name].dtype != current.tensors[name].dtype:
                return _OTHER_DTYPE
        elif name in current.frozen or (name in self.left_out and is_found):
            return _FROZEN_TOO
        known = self.tensors | current.tensors
        if name in known and known[name].role == "copy":
            return f"{_SHAPED_BY_DATA}, or leave it out with exclude={name!r}"
        return ""

    def _describe(self, name: str) -> str:
        if name in self.aliases:
            return f"tied to {self.aliases[name]!r}"
        if name in self.frozen and name not in self.tensors:
            return "left out, as it requires no gradients"
        if name not in self.tensors:
            return "not tracked"
        tensor = self.tensors[name]
        kind = {
            "average": "averaged",
            "statistic": "averaged as a running statistic",
            "copy": "copied",
        }[tensor.role]
        shape = list(self.shapes[name])
        described = f"{kind}, {torch_dtype(tensor.dtype)} of shape {shape}"
        if self.members.is_chunked:
            box = self.boxes[name]
            described += f"; this process has {list(box.shape)} at {list(box.offset)}"
        return described


def _select(
    named: Mapping[str, Value],
    names: Set[str],
) -> dict[str, Value]:
    return {name: value for name, value in named.items() if name in names}


@dataclass(frozen=True, eq=False)
class ModelTensors:
    """The tensors of a model that this process holds, averaged and copied ones, and what is tracked
    of them."""

    averaged: dict[str, Tensor]
    copied: dict[str, Tensor]
    tracked: TrackedModel

    def select_for(self, members: Members) -> ModelTensors:
        tracked = self.tracked.select_for(members)
        names = tracked.tensors.keys()
        return ModelTensors(_select(self.averaged, names), _select(self.copied, names), tracked)


def check_model(model: nn.Module) -> nn.Module:
    """Return `model`, or raise an InvalidValueError if it is not a module."""
    if not isinstance(model, nn.Module):
        raise InvalidValueError("model", f"must be a torch.nn.Module, not {type(model).__name__}")
    return model


# --- the selection of a model's tensors ---


def collect_tensors(
    model: nn.Module,
    selection: Selection,
    also: frozenset[str] = frozenset(),
) -> ModelTensors:
    """Collect a model's selected tensors, or this process's parts; parameters in `also` need not
    require gradients."""
    reshard(model)
    entries = named_tensors(model)
    collection = _Collection(entries, selection)
    for entry in entries:
        if entry.in_state:
            collection.add(entry, entry.name in also)
    return collection.tensors()


class _Collection:
    """The selected tensors of a model, as they are collected."""

    def __init__(self, entries: Sequence[NamedTensor], selection: Selection) -> None:
        self._selection = selection
        # A tied parameter is one tensor with several names; any of them may be selected.
        self._copied = set()
        for entry in entries:
            if selection.copies(entry.name):
                self._copied.add(id(entry.tensor))
        buffers = [entry.name for entry in entries if not entry.is_parameter]
        self._running = running_statistics(buffers)
        self._parts = dict[str, Tensor]()
        self._tracked = dict[str, TrackedTensor]()
        self._aliases = dict[str, str]()
        self._left_out = list[str]()
        self._first_names = dict[int, str]()
        self._shapes = dict[str, Shape]()
        self._boxes = dict[str, Box]()
        self._is_sharded = False

    def add(self, entry: NamedTensor, also_frozen: bool) -> None:
        name = entry.name
        tensor = entry.tensor
        is_copied = id(tensor) in self._copied
        if not _is_selected(entry, self._selection, is_copied or also_frozen):
            self._left_out.append(name)
            return
        _check(entry)
        first_name = self._first_names.setdefault(id(tensor), name)
        if first_name != name:
            self._aliases[name] = first_name
            return
        self._parts[name], self._boxes[name] = local_box(name, tensor)
        self._shapes[name] = tuple(tensor.shape)
        self._is_sharded |= is_sharded(tensor)
        role = "copy" if is_copied else self._role(entry)
        dtype = stored_name(tensor.dtype, name)
        self._tracked[name] = TrackedTensor(role, dtype)

    def _role(self, entry: NamedTensor) -> str:
        buffers = self._selection.buffers
        if entry.tensor.dtype not in AVERAGED_DTYPES:
            return "copy"
        if entry.name in self._running and buffers == "statistics":
            return "statistic"
        return "average" if entry.is_parameter or buffers == "average" else "copy"

    def tensors(self) -> ModelTensors:
        frozen = frozenset(filter(self._selection.names, self._left_out))
        averaged = dict[str, Tensor]()
        copied = dict[str, Tensor]()
        for name, part in self._parts.items():
            role = self._tracked[name].role
            kind = copied if role == "copy" else averaged
            kind[name] = part
        tracked = {name: self._tracked[name] for name in chain(averaged, copied)}
        left_out = tuple(self._left_out)
        known = TrackedModel(
            tracked,
            self._shapes,
            self._boxes,
            self._aliases,
            left_out,
            frozen,
            self._is_sharded,
        )
        return ModelTensors(averaged, copied, known)


def _is_selected(entry: NamedTensor, selection: Selection, also_frozen: bool) -> bool:
    if not selection.names(entry.name):
        return False
    is_trained = entry.tensor.requires_grad or not selection.only_trainable
    return is_trained or also_frozen or not entry.is_parameter


def check_averages(tracked: TrackedModel, selection: Selection) -> None:
    """Raise an InvalidValueError if no parameter of a model is averaged."""
    if any(tensor.role == "average" for tensor in tracked.tensors.values()):
        return
    reason = "none of floating-point values requires gradients"
    hint = "include='*' takes frozen ones, too"
    if not tracked.frozen and (selection.include or selection.exclude):
        reason = "include and exclude leave none"
        hint = ""
    raise InvalidValueError("model", f"has no parameter to average: {reason}", hint)


def _check(entry: NamedTensor) -> None:
    """Raise an InvalidValueError for a tensor that no snapshot can hold or whose values cannot be
    averaged here."""
    name = entry.name
    tensor = entry.tensor
    value = repr(name)
    if name == "__metadata__":
        hint = f"rename it in the model, or leave it out with exclude={value}"
        raise InvalidValueError("tensor", "safetensors files reserve this name", hint, value=value)
    if torch.nn.parameter.is_lazy(tensor):
        hint = "run a batch through the model first"
        raise InvalidValueError("tensor", "has no shape yet", hint, value=value)
    if hasattr(tensor, "ds_id") and hasattr(tensor, "ds_tensor"):
        reason = "is sharded over processes by DeepSpeed ZeRO-3, whose parameters have no values"
        hint = "use ZeRO-1 or ZeRO-2, or fully_shard"
        raise InvalidValueError("tensor", f"{reason} between steps", hint, value=value)
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        reason = f"is {kind}; only dense tensors can be tracked"
        hint = f"leave it out with exclude={value}"
        raise InvalidValueError("tensor", reason, hint, value=value)
    if tensor.is_meta:
        hint = "model.to_empty(device=...), then load or initialise its weights"
        raise InvalidValueError("tensor", ON_META, hint, value=value)
    _check_class(name, tensor)
    has_fractions = tensor.is_complex() or tensor.is_floating_point()
    if not entry.is_parameter or not has_fractions or tensor.dtype in AVERAGED_DTYPES:
        return
    accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in AVERAGED_DTYPES)
    reason = f"dtype {tensor.dtype} cannot be averaged; {accepted} can"
    hint = ""
    if tensor.is_complex():
        hint = f"let the model hold torch.view_as_real of it, or leave it out with exclude={value}"
    raise InvalidValueError("parameter", reason, hint, value=value)


def _check_class(name: str, tensor: Tensor) -> None:
    """Raise an InvalidValueError for a tensor of a class that lacks torch's operations, such as a
    class of quantized weights."""
    if type(tensor) in (Tensor, nn.Parameter) or is_sharded(tensor):
        return
    try:
        # not if values are computed, as in quantized weights
        is_reached = tensor.detach().is_set_to(tensor)
    except (NotImplementedError, TypeError):
        is_reached = False
    if not is_reached:
        reason = f"is a {type(tensor.data).__name__}, whose values torch cannot read and write"
        hint = f"leave it out with exclude={name!r}"
        raise InvalidValueError("tensor", reason, hint, value=repr(name))


def into_dtensors(
    chunks: dict[str, Tensor],
    model: nn.Module,
) -> None:
    """Replace the chunks of a sharded model by DTensors in host memory, which are sharded like its
    tensors of these names; tied names share one."""
    reshard(model)
    converted = dict[int, Tensor]()  # by the chunk
    for name, _, tensor, *_ in named_tensors(model):
        if name in chunks:
            chunk = chunks[name]
            if id(chunk) not in converted:
                converted[id(chunk)] = as_dtensor(chunk, tensor)
            chunks[name] = converted[id(chunk)]


def nonfinite_name(tensors: Mapping[str, Tensor]) -> str | None:
    """Find the first tensor that holds a nan or an infinity, or None."""
    for name, tensor in tensors.items():
        values = tensor.float() if tensor.dtype in EIGHT_BITS else tensor
        if not bool(values.isfinite().all()):
            return name
    return None


def nonfinite_error(
    name: str,
    tracked: Mapping[str, TrackedTensor],
    step: int,
) -> NonFiniteError:
    """Make the error for a tensor that holds nan or infinity."""
    reason = f"holds nan or infinity at step {step}; no average has taken it in"
    if name in tracked and tracked[name].role == "statistic":
        hint = "buffers='copy' copies running statistics"
        return NonFiniteError(f"running statistic {name!r}", reason, hint)
    return NonFiniteError(f"parameter {name!r}", reason)


class ModelWatch:
    """The model that a tracker was made with, while it exists, and a cache of the tensors of the
    model that it tracks, invalid when that changes, and gone when it is."""

    def __init__(
        self,
        selection: Selection,
        members: Members,
        model: nn.Module | None = None,
    ) -> None:
        self._selection = selection
        self._members = members
        self.has_model = model is not None
        self._model: Callable[[], nn.Module | None] = lambda: None
        if model is not None:
            self._model = weakref.ref(unwrap(model))
        self._compared = self._model  # the model whose tensors were compared last
        self._cached: WeakKeyDictionary[
            nn.Module, tuple[TrackedModel, _ModelFingerprint, ModelTensors]
        ] = WeakKeyDictionary()

    @property
    def model(self) -> nn.Module | None:
        """The bare model that the tracker was made with; None if there is none any more."""
        return self._model()

    def find_model(self, call: str) -> nn.Module:
        """Return the model that the tracker was made with, which a call needs."""
        model = self.model
        if model is None:
            reason = "the model that this tracker was made with no longer exists"
            raise RefusedCallError(call, reason)
        return model

    def find_sharded_model(self, call: str) -> nn.Module | None:
        """Return the sharded model, whose parameters say where each chunk is; None if the model is
        not sharded."""
        return self.find_model(call) if self._members.is_chunked else None

    def check_kind(self, model: nn.Module, tracked: TrackedModel) -> None:
        """Raise a ModelMismatchError at the first call with another model, which has other
        tensors."""
        bare = unwrap(model)
        if self._compared() is not bare:
            self.check(model, tracked)
            self._compared = weakref.ref(bare)

    def tensors(self, model: nn.Module, tracked: TrackedModel) -> ModelTensors:
        """Return the model's tensors, the same object unless the model has changed; raise an error
        if they are not the tracked ones."""
        if model in self._cached:
            known, fingerprint, collected = self._cached[model]
            if known is tracked and fingerprint.is_same():
                return collected
        self.forget()
        collected = self.check(model, tracked)
        self._cached[model] = tracked, _ModelFingerprint(model, collected.tracked), collected
        return collected

    def check(self, model: nn.Module, tracked: TrackedModel) -> ModelTensors:
        """Return the model's tensors; raise a ModelMismatchError if they are not the tracked
        ones."""
        collected = self._collect(model)
        try:
            tracked.check(collected.tracked)
        except ModelMismatchError as error:
            raise error.with_hint("begin a new directory for the changed model") from None
        return collected

    def forget(self) -> None:
        """Release the model's tensors."""
        self._cached.clear()

    def sample(
        self,
        model: nn.Module,
        tracked: TrackedModel,
    ) -> dict[int, float]:
        """Read the model's values in a snapshot's sample that this process holds, by number; frozen
        parameters count, too."""
        collected = self._collect(model, tracked.known_names)
        tracked.check(collected.tracked)
        picked: list[Tensor] = []
        for name, index in tracked.sample_places.values():
            tensor = collected.averaged[name]
            position = np.unravel_index(index, tensor.shape)
            picked.append(tensor[position])
        if not picked:
            return {}
        device = picked[0].device  # which is waited for once
        values = [value.to(device, torch.float32) for value in picked]
        numbers = torch.stack(values).tolist()
        return dict(zip(tracked.sample_places, numbers, strict=True))

    def check_sharding(self, model: nn.Module) -> None:
        """Raise a ModelMismatchError if a model is sharded, but was not when its tracker was
        made."""
        if self._members.is_chunked:
            return
        if any(map(is_sharded, model.parameters())):
            reason = "is sharded over processes, and was not when this tracker was made"
            way = "make the tracker in every process, with from_model or from_path(path, model)"
            raise ModelMismatchError("model", reason, f"shard the model first; then {way}")

    def _collect(
        self,
        model: nn.Module,
        also: frozenset[str] = frozenset(),
    ) -> ModelTensors:
        collected = collect_tensors(model, self._selection, also)
        self.check_sharding(model)
        return collected.select_for(self._members)


class _ModelFingerprint:
    """The registries of a model's modules at one moment, which are faster to compare than to walk
    through, and the memory of the tracked tensors."""

    def __init__(self, model: nn.Module, tracked: TrackedModel) -> None:
        self._registries: list[dict[str, Any]] = []
        for module in model.modules():
            self._registries += module._parameters, module._buffers, module._modules
        self._filled = [registry for registry in self._registries if registry]
        # kept alive so that no id is reused
        self._objects = [*chain.from_iterable(map(dict.values, self._filled))]
        self._tensors = [*model.parameters(), *model.buffers()]
        names = tracked.tensors.keys()
        self._tracked = [entry.tensor for entry in named_tensors(model) if entry.name in names]
        self._are_sharded = any(map(is_sharded, self._tracked))
        self._properties = self._read()
        self._views = [*map(Tensor.detach, self._parts())]

    def is_same(self) -> bool:
        """Return whether nothing has changed."""
        if self._read() != self._properties:
            return False
        return all(map(Tensor.is_set_to, self._parts(), self._views))

    def _parts(self) -> Sequence[Tensor]:
        """List the parts of the tracked tensors that this process holds."""
        return local_tensors(self._tracked) if self._are_sharded else self._tracked

    def _read(self) -> tuple[object, ...]:
        """Read all compared properties except the memory."""
        return (
            [*map(len, self._registries)],
            [*chain.from_iterable(self._filled)],
            [*map(id, chain.from_iterable(map(dict.values, self._filled)))],
            [tensor.requires_grad for tensor in self._tensors],
            [tensor.dtype for tensor in self._tensors],
        )


# --- names, without wrappers ---


_WRAPPERS = (
    ("torch.nn.parallel.data_parallel", "DataParallel"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch._dynamo.eval_frame", "OptimizedModule"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"),
)
"""The module and the name of each wrapper class. A wrapper has one child, the module that it wraps.
"""


NamedModule = tuple[str, str, nn.Module]
"""A path of a module without wrappers ("" for the model itself), and torch's (`raw`); and the
module or wrapper."""


class NamedTensor(NamedTuple):
    """A parameter or buffer under one of its names, without wrappers, and under torch's (`raw`).

    The names of a tied tensor share it.
    """

    name: str
    raw: str
    tensor: Tensor
    is_parameter: bool
    in_state: bool = True  # not for buffers that are not persistent


def named_tensors(model: nn.Module) -> list[NamedTensor]:
    """List the parameters, then the buffers, in the order of the modules, tied names included."""
    modules = [*_named_modules(model)]
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    for *_, module in modules:
        if isinstance(module, fsdp):
            way = "use fully_shard or DistributedDataParallel"
            raise InvalidValueError("model", "FSDP1 lays parameters end to end", way)
        if isinstance(module, torch.jit.ScriptModule):
            hint = "track the module that it was made from, which has the same parameters"
            raise InvalidValueError("model", "is compiled by torch.jit", hint)
    tensors = []
    buffers = []
    for path, raw, module in modules:  # `state_dict` would call hooks, and copy
        for key, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            name = _join(path, key)
            tensors.append(NamedTensor(name, _join(raw, key), tensor, True))
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            name = _join(path, key)
            in_state = key not in module._non_persistent_buffers_set
            buffers.append(NamedTensor(name, _join(raw, key), buffer, False, in_state))
    tensors += buffers
    renamed = _adapter_names(modules, tensors)
    if not renamed:
        return tensors
    result = []
    for entry in tensors:
        name = renamed.get(entry.raw, entry.name)
        result.append(entry._replace(name=name))
    return result


def _named_modules(model: nn.Module) -> Iterator[NamedModule]:
    """Yield every module by every path, and wrappers under the path of the module that they
    wrap."""
    # by torch's path: the path, and the name of a wrapped child
    parents: dict[str, tuple[str, str | None]] = {}
    for raw, module in model.named_modules(remove_duplicate=False):
        parent, _, key = raw.rpartition(".")
        above, wrapped = parents.get(parent, ("", ""))
        path = above if key == wrapped else _join(above, key)
        parents[raw] = path, find_wrapped_child(module)
        yield path, raw, module


def find_wrapped_child(module: nn.Module) -> str | None:
    """Find the name of the child that a wrapper wraps; None if the module is not a wrapper."""
    for defined_in, name in _WRAPPERS:
        # A class that nobody has imported wraps nothing. A release of torch without the class is an
        # error.
        if defined_in not in sys.modules:
            continue
        kind: type = getattr(sys.modules[defined_in], name)
        if isinstance(module, kind):
            return next(child for child, _ in module.named_children())
    return None


def unwrap(model: nn.Module) -> nn.Module:
    """Find the model inside all of its wrappers."""
    while (child := find_wrapped_child(model)) is not None:
        model = model.get_submodule(child)
    return model


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _adapter_names(
    modules: Sequence[NamedModule],
    tensors: Sequence[NamedTensor],
) -> dict[str, str]:
    """Find the names under which PEFT saves and loads adapters' tensors, by torch's names.

    Tensors of several adapters keep torch's names, as do tensors of prompt learning, which PEFT
    computes when it saves.
    """
    if "peft" not in sys.modules:
        return {}
    from peft import PeftConfig, PeftModel

    names = dict[str, str]()
    roots = list[str]()  # the outermost modules with adapters
    for _, root, module in modules:
        if any(root.startswith(outer) for outer in roots):
            continue
        # Not `getattr`: wrappers forward the attributes of the module that they wrap.
        own = vars(module)
        configs = module.peft_config if isinstance(module, PeftModel) else own.get("peft_config")
        if not isinstance(configs, Mapping):
            continue
        adapters = [name for name in configs if isinstance(configs[name], PeftConfig)]
        if not adapters:
            continue
        start = _join(root, "")
        roots.append(start)
        if len(adapters) > 1 or configs[adapters[0]].is_prompt_learning:
            continue
        own_tensors = [entry for entry in tensors if entry.raw.startswith(start)]
        saved_names = _names_in_adapter(module, adapters[0], own_tensors, start)
        for raw, saved in saved_names.items():
            names[raw] = start + saved
    _leave_out_wrappers(names, modules)
    return names


def _names_in_adapter(
    module: nn.Module,
    adapter: str,
    tensors: Sequence[NamedTensor],
    start: str,
) -> dict[str, str]:
    """Find the names in PEFT's state of an adapter, by torch's names, which begin with `start`."""
    from peft import get_peft_model_state_dict

    # One tensor object for each name: the identity of a tensor in PEFT's result shows which name
    # it had.
    state = dict[str, Tensor]()
    raw_names = dict[int, str]()
    for entry in tensors:
        tensor = entry.tensor.detach()
        state[entry.raw.removeprefix(start)] = tensor
        raw_names[id(tensor)] = entry.raw
    options: dict[str, Any] = {"adapter_name": adapter, "save_embedding_layers": False}
    saved = get_peft_model_state_dict(module, state_dict=dict(state), **options)
    names = {}
    for name, tensor in saved.items():
        if id(tensor) in raw_names:
            names[raw_names[id(tensor)]] = name
    return names


def _leave_out_wrappers(
    names: dict[str, str],
    modules: Sequence[NamedModule],
) -> None:
    """Remove from the names the children that wrappers insert."""
    if not names:
        return
    for _, wrapper, module in reversed(modules):  # the innermost first
        child = find_wrapped_child(module)
        if child is None:
            continue
        prefix = _join(wrapper, f"{child}.")
        for raw, name in names.items():
            if name.startswith(prefix):
                names[raw] = _join(wrapper, name.removeprefix(prefix))
