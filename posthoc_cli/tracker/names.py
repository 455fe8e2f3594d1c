"""Names of a model's tensors, the same whatever the model is wrapped in.

`torch.compile`, DataParallel, DistributedDataParallel, FSDP and activation checkpointing put a child between a module
and its tensors' names. Such a child is recognised by its parent's type, never by its name: a user's module may have a
child called `module`. Tensors of a PEFT adapter have the names under which PEFT saves and loads them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from posthoc_cli.errors import InvalidValueError

_WRAPPERS = (
    ("torch.nn.parallel.data_parallel", "DataParallel"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel"),
    ("torch._dynamo.eval_frame", "OptimizedModule"),
    ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"),
    _FSDP := ("torch.distributed.fsdp", "FullyShardedDataParallel"),
)
"""Where each wrapper is defined, and its class. It has one child, the module that it wraps."""


@dataclass(frozen=True)
class NamedModule:
    """A module or wrapper, at one of the paths to it: without wrappers ("" for the model itself), and as torch's."""

    path: str
    raw: str
    module: torch.nn.Module


@dataclass(frozen=True)
class NamedTensor:
    """A parameter or buffer, under one of its names: without wrappers, and as torch's. Tied names have one `tensor`.

    `in_state` are all but transient buffers.
    """

    name: str
    raw: str
    tensor: torch.Tensor
    is_parameter: bool
    in_state: bool = True


def named_tensors(model: torch.nn.Module) -> list[NamedTensor]:
    """Parameters, then buffers, in the order of the modules, tied names included.

    Raises:
        InvalidValueError: the first FSDP has sharded the model, or laid its parameters end to end in another one.
    """
    modules = list(named_modules(model))
    _check_unsharded(modules)
    tensors = [*_parameters(modules), *_buffers(modules)]
    renamed: dict[str, str] = {}
    for root, adapter in _adapter_roots(modules):
        renamed |= _adapter_names(root, adapter, modules, tensors)
    return [replace(tensor, name=renamed[tensor.raw]) if tensor.raw in renamed else tensor for tensor in tensors]


def named_modules(model: torch.nn.Module) -> Iterator[NamedModule]:
    """Every module by every path, wrappers too (under the path of the module they wrap)."""
    found: dict[str, tuple[str, str | None]] = {}  # the path of each, and the child that it wraps
    for raw, module in model.named_modules(remove_duplicate=False):
        parent, _, key = raw.rpartition(".")
        above, wrapped = found.get(parent, ("", ""))
        path = above if key == wrapped else _join(above, key)
        found[raw] = path, wrapped_child(module)
        yield NamedModule(path, raw, module)


def wrapped_child(module: torch.nn.Module) -> str | None:
    """The name of the child that a wrapper wraps; None for a module that is no wrapper."""
    if any(_is_a(module, wrapper) for wrapper in _WRAPPERS):
        return next(name for name, _ in module.named_children())
    return None


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside all of its wrappers."""
    while (child := wrapped_child(model)) is not None:
        model = model.get_submodule(child)
    return model


def is_fsdp(module: torch.nn.Module) -> bool:
    """Whether a module is a wrapper of the first FSDP (`fully_shard` wraps nothing)."""
    return _is_a(module, _FSDP)


def _is_a(module: torch.nn.Module, wrapper: tuple[str, str]) -> bool:
    where, kind = wrapper
    # What nobody has imported wraps nothing. That another release of torch has no such class is an error.
    return where in sys.modules and isinstance(module, getattr(sys.modules[where], kind))


def _parameters(modules: list[NamedModule]) -> Iterator[NamedTensor]:
    for place in modules:
        for key, parameter in place.module.named_parameters(recurse=False, remove_duplicate=False):
            yield NamedTensor(_join(place.path, key), _join(place.raw, key), parameter, True)


def _buffers(modules: list[NamedModule]) -> Iterator[NamedTensor]:
    for place in modules:
        for key, buffer in place.module.named_buffers(recurse=False, remove_duplicate=False):
            in_state = key not in place.module._non_persistent_buffers_set
            yield NamedTensor(_join(place.path, key), _join(place.raw, key), buffer, False, in_state)


def _check_unsharded(modules: Iterable[NamedModule]) -> None:
    for place in modules:
        if not is_fsdp(place.module):
            continue
        from torch.distributed.fsdp import FlatParameter, ShardingStrategy

        where = f"module {place.path!r}" if place.path else "the model"
        if place.module.sharding_strategy != ShardingStrategy.NO_SHARD:
            reason = f"FSDP has laid its parameters end to end and cut them ({place.module.sharding_strategy})"
            hint = "use torch.distributed.fsdp.fully_shard, DistributedDataParallel, or FSDP with NO_SHARD"
            raise InvalidValueError(where, reason, hint)
        if any(isinstance(parameter, FlatParameter) for parameter in place.module.parameters()):
            raise InvalidValueError(
                where, "FSDP has laid its parameters end to end", "say use_orig_params=True to FSDP"
            )


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


# --- adapters of PEFT ---


def _adapter_roots(modules: Sequence[NamedModule]) -> Iterator[tuple[NamedModule, str]]:
    """The outermost modules with one adapter, and its name, which PEFT leaves out of its tensors' names.

    With several, tensors keep torch's names, which tell them apart; so do those of prompt learning, saved computed.
    """
    if "peft" not in sys.modules:
        return
    found: list[str] = []
    for place in modules:
        if any(place.raw == raw or place.raw.startswith(f"{raw}." if raw else "") for raw in found):
            continue
        configs = _adapter_configs(place.module)
        if configs:
            found.append(place.raw)
            adapter, config = next(iter(configs.items()))
            if len(configs) == 1 and not config.is_prompt_learning:
                yield place, adapter


def _adapter_configs(module: torch.nn.Module) -> Mapping[str, Any]:
    from peft import PeftConfig, PeftModel

    # Not `getattr`: wrappers hand on the attributes of what they wrap.
    configs = module.peft_config if isinstance(module, PeftModel) else vars(module).get("peft_config")
    if not isinstance(configs, Mapping):
        return {}
    return {name: config for name, config in configs.items() if isinstance(config, PeftConfig)}


def _adapter_names(
    root: NamedModule, adapter: str, modules: list[NamedModule], tensors: list[NamedTensor]
) -> dict[str, str]:
    """The names under which PEFT saves and loads an adapter's tensors, by torch's names."""
    start = f"{root.raw}." if root.raw else ""
    inside = {t.raw.removeprefix(start): t.tensor for t in tensors if t.raw.startswith(start)}
    wrappers = [place for place in modules if place.raw.startswith(start) and wrapped_child(place.module)]
    found = {}
    for raw, saved in _saved_names(root.module, adapter, inside).items():
        name = start + saved
        found[start + raw] = _join(root.path, saved)
        # The innermost wrapper last: its path is without its parents' prefixes.
        for place in wrappers:
            prefix = _join(place.raw, str(wrapped_child(place.module))) + "."
            if (start + raw).startswith(prefix) and name.startswith(prefix):
                found[start + raw] = _join(place.path, name.removeprefix(prefix))
    return found


def _saved_names(module: torch.nn.Module, adapter: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    from peft import get_peft_model_state_dict

    # An object for each name: PEFT's result tells by it where a tensor was.
    state = {name: tensor.detach() for name, tensor in tensors.items()}
    names = {id(tensor): name for name, tensor in state.items()}
    saved = get_peft_model_state_dict(module, state_dict=dict(state), adapter_name=adapter, save_embedding_layers=False)
    return {names[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in names}
