"""Names of PEFT's adapters: those that PEFT's own loading takes. PEFT is asked; nothing of it is repeated here.

Names of a model's tensors, the same whatever the model is wrapped in.

`torch.compile`, DataParallel, DistributedDataParallel, FSDP and activation checkpointing put a child between a module
and its tensors' names. Here such a child is told by the type of its parent, never by what it is called: a module of
one's own may have a child called `module`. Adapters of PEFT have the names that PEFT saves and loads them by.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch

from posthoc_cli.errors import InvalidValueError


class Place(Protocol):
    """A module and the paths to it; see `naming.NamedModule`."""

    @property
    def path(self) -> str:
        """Without wrappers."""
        ...

    @property
    def raw(self) -> str:
        """As torch names it."""
        ...

    @property
    def module(self) -> torch.nn.Module:
        """Itself."""
        ...


@dataclass(frozen=True)
class AdapterRoot:
    """A module with one adapter in it, or a PeftModel around one.

    Attributes:
        path, raw: see `naming.NamedModule`.
        module: what PEFT is asked about.
        adapter: the adapter's name, which its tensors' names do not have where PEFT has saved them.
    """

    path: str
    raw: str
    module: torch.nn.Module
    adapter: str

    def saved_names(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """The names that PEFT saves the adapter's tensors under, by the names in the module."""
        from peft import get_peft_model_state_dict

        # An object for each name, so that what comes back tells where it was.
        state = {name: tensor.detach() for name, tensor in tensors.items()}
        names = {id(tensor): name for name, tensor in state.items()}
        saved = get_peft_model_state_dict(
            self.module, state_dict=dict(state), adapter_name=self.adapter, save_embedding_layers=False
        )
        return {names[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in names}


def adapter_roots(places: Sequence[Place]) -> Iterator[AdapterRoot]:
    """The outermost modules with an adapter each.

    With several adapters in a module names stay as they are, with the adapter's in them: without it they would be the
    same. So do those of prompt learning, which PEFT saves computed.
    """
    if "peft" not in sys.modules:
        return
    found: list[str] = []
    for place in places:
        if any(place.raw == raw or place.raw.startswith(f"{raw}." if raw else "") for raw in found):
            continue
        configs = _configs(place.module)
        if configs:
            found.append(place.raw)
            adapter, config = next(iter(configs.items()))
            if len(configs) == 1 and not config.is_prompt_learning:
                yield AdapterRoot(place.path, place.raw, place.module, adapter)


def _configs(module: torch.nn.Module) -> Mapping[str, Any]:
    """The adapters that a module says it has."""
    from peft import PeftConfig, PeftModel

    # Not `getattr`: wrappers hand on what they wrap.
    configs = module.peft_config if isinstance(module, PeftModel) else vars(module).get("peft_config")
    if not isinstance(configs, Mapping):
        return {}
    return {name: config for name, config in configs.items() if isinstance(config, PeftConfig)}


# --- Names of a model's tensors, the same whatever the model is wrapped in -------------------------


_WRAPPERS = (
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper", "_checkpoint_wrapped_module"),
)
"""Where each wrapper is defined, its class, and the child that it wraps."""


@dataclass(frozen=True)
class NamedModule:
    """A module, at one of the paths that lead to it.

    Attributes:
        path: without wrappers; "" for the model itself.
        raw: as torch names it.
        module: itself, which may be a wrapper.
    """

    path: str
    raw: str
    module: torch.nn.Module


@dataclass(frozen=True)
class NamedTensor:
    """A parameter or buffer, under one of its names.

    Attributes:
        name: without wrappers.
        raw: as torch names it.
        tensor: the values; tied names have the same object.
        registered: the tensor that the module holds: `tensor` itself, or the flat parameter it is a part of.
        is_parameter: else a buffer.
        in_state: whether it is in the state dict: all but transient buffers.
    """

    name: str
    raw: str
    tensor: torch.Tensor
    registered: torch.Tensor
    is_parameter: bool
    in_state: bool = True


def named_tensors(model: torch.nn.Module) -> list[NamedTensor]:
    """Parameters, then buffers, in the order of the modules, tied names included.

    Raises:
        InvalidValueError: the model is sharded over processes, or two tensors have one name.
    """
    modules = list(named_modules(model))
    tensors = [*_parameters(modules), *_buffers(modules)]
    renamed: dict[str, str] = {}
    for root in adapter_roots(modules):
        renamed |= _adapter_names(root, modules, tensors)
    if renamed:
        tensors = [_renamed(tensor, renamed) for tensor in tensors]
        _check_distinct(tensors)
    return tensors


def named_modules(model: torch.nn.Module, path: str = "", raw: str = "") -> Iterator[NamedModule]:
    """Every module by every path, wrappers too (under the path of what they wrap)."""
    yield NamedModule(path, raw, model)
    wrapped = wrapped_child(model)
    for key, child in model._modules.items():
        if child is not None:
            yield from named_modules(child, path if key == wrapped else _join(path, key), _join(raw, key))


def wrapped_child(module: torch.nn.Module) -> str | None:
    """The name of the child that a wrapper wraps; None for a module that is no wrapper."""
    for where, kind, child in _WRAPPERS:
        # A wrapper whose module nobody has imported is nowhere.
        found = getattr(sys.modules.get(where), kind, None)
        if found is not None and isinstance(module, found):
            return child
    return None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside all of its wrappers."""
    while (child := wrapped_child(model)) is not None:
        inner = model._modules[child]
        assert inner is not None
        model = inner
    return model


def is_fsdp(module: torch.nn.Module) -> bool:
    """Whether a module is a wrapper of FSDP, the first one (`fully_shard` wraps nothing)."""
    return wrapped_child(module) == "_fsdp_wrapped_module"


# --- inside ----------------------------------------------------------------------------------------


def _parameters(modules: list[NamedModule]) -> Iterator[NamedTensor]:
    for place in modules:
        if is_fsdp(place.module):
            _check_whole(place)
        for key, parameter in place.module._parameters.items():
            if parameter is None:
                continue
            if getattr(parameter, "_is_flat_param", False):
                yield from _parts_of_flat(place, parameter)
            else:
                yield NamedTensor(_join(place.path, key), _join(place.raw, key), parameter, parameter, True)


def _buffers(modules: list[NamedModule]) -> Iterator[NamedTensor]:
    for place in modules:
        transient = place.module._non_persistent_buffers_set
        for key, buffer in place.module._buffers.items():
            if buffer is not None:
                path, raw = _join(place.path, key), _join(place.raw, key)
                yield NamedTensor(path, raw, buffer, buffer, False, key not in transient)


def _check_whole(place: NamedModule) -> None:
    strategy = getattr(place.module, "sharding_strategy", None)
    if getattr(strategy, "name", None) != "NO_SHARD":
        where = f"module {place.path!r}" if place.path else "the model"
        raise InvalidValueError(
            where,
            f"its parameters are sharded over processes (FSDP, {getattr(strategy, 'name', 'unknown')}), "
            "and sharded models cannot be tracked yet; DistributedDataParallel and FSDP with NO_SHARD "
            "can",
        )


def _parts_of_flat(place: NamedModule, flat: torch.nn.Parameter) -> Iterator[NamedTensor]:
    """The parameters that FSDP without `use_orig_params` has laid end to end in one, as views of it."""
    what: dict[str, torch.Tensor] = {}
    info = vars(flat)
    sizes, paddings = info["_numels_with_padding"], info["_is_padding_mask"]
    begins = [begin for begin, padding in zip(accumulate((0, *sizes)), paddings, strict=False) if not padding]
    values = flat.detach()
    for name, begin, size, shape in zip(info["_fqns"], begins, info["_numels"], info["_shapes"], strict=True):
        part = values[begin : begin + size].view(shape).requires_grad_(flat.requires_grad)
        what[name] = part
    for shared in info["_shared_param_infos"]:
        own = _join(shared.prim_module_name, shared.prim_param_name)
        what[_join(shared.module_name, shared.param_name)] = what[own]
    for name, part in what.items():
        # FSDP has taken wrappers' prefixes off these names itself.
        yield NamedTensor(_join(place.path, name), _join(place.raw, name), part, flat, True)


def _adapter_names(root: AdapterRoot, modules: list[NamedModule], tensors: list[NamedTensor]) -> dict[str, str]:
    """Names within a model of PEFT, by torch's own: those that PEFT saves and loads."""
    start = f"{root.raw}." if root.raw else ""
    inside = {tensor.raw.removeprefix(start): tensor for tensor in tensors if tensor.raw.startswith(start)}
    wrappers = [place for place in modules if place.raw.startswith(start) and wrapped_child(place.module)]
    found = {}
    for raw, saved in root.saved_names({raw: tensor.tensor for raw, tensor in inside.items()}).items():
        name = start + saved
        # The innermost wrapper last: its path tells what its parents' prefixes are without theirs.
        for place in wrappers:
            prefix = _join(place.raw, str(wrapped_child(place.module))) + "."
            if (start + raw).startswith(prefix) and name.startswith(prefix):
                clean = (f"{place.path}." if place.path else "") + name.removeprefix(prefix)
                found[start + raw] = clean
        found.setdefault(start + raw, (f"{root.path}." if root.path else "") + saved)
    return found


def _renamed(tensor: NamedTensor, names: dict[str, str]) -> NamedTensor:
    name = names.get(tensor.raw, tensor.name)
    return NamedTensor(name, tensor.raw, tensor.tensor, tensor.registered, tensor.is_parameter, tensor.in_state)


def _check_distinct(tensors: list[NamedTensor]) -> None:
    seen: dict[str, str] = {}
    for tensor in tensors:
        if seen.setdefault(tensor.name, tensor.raw) != tensor.raw:
            raise InvalidValueError(
                "tensors", f"both are {tensor.name!r}", value=f"{seen[tensor.name]!r} and {tensor.raw!r}"
            )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
