"""Which process of a job keeps averages: of a model that several hold whole, the first."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist

from posthoc_cli.tracker.naming import is_fsdp, named_modules, wrapped_child

_wrapper_in: WeakKeyDictionary[torch.nn.Module, ref[torch.nn.Module] | None] = WeakKeyDictionary()
"""The wrapper that keeps a model the same in several processes, by the model; looked for once."""


def is_replica(model: torch.nn.Module) -> bool:
    """Whether the first process of a group holds the same model and tracks it.

    That is so in the others of DistributedDataParallel, and of FSDP without sharding, whether it wraps the model or
    a part of it. A bare model is nobody's replica: processes may well train different ones.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return False
    if model not in _wrapper_in:
        wrapper = next((place.module for place in named_modules(model) if _replicates(place.module)), None)
        _wrapper_in[model] = None if wrapper is None else ref(wrapper)
    held = _wrapper_in[model]
    wrapper = None if held is None else held()
    group: Any = None if wrapper is None else getattr(wrapper, "process_group", None)
    return wrapper is not None and dist.get_rank(group) > 0


def _replicates(module: torch.nn.Module) -> bool:
    return is_fsdp(module) or (
        wrapped_child(module) == "module" and isinstance(module, torch.nn.parallel.DistributedDataParallel)
    )


def is_in_group() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
