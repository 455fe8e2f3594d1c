"""Which process of a group keeps the averages of a model that all of them train."""

from __future__ import annotations

import logging

import torch
import torch.distributed as dist

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.tracker.naming import is_fsdp, named_modules, wrapped_child

log = logging.getLogger(__name__)


def choose_writer(chosen: bool | None, model: torch.nn.Module | None) -> bool | None:
    """Whether this process keeps the averages of a model and writes them.

    Without a choice it is the first process of the group in which DistributedDataParallel, or FSDP without sharding,
    holds the model. A model that no wrapper holds yet goes by the group of all processes: training scripts make their
    tracker before they wrap the model, and each process that took itself for the writer would want the same directory.

    Arguments:
        chosen: the user's choice, or None.
        model: what is trained, where it is known.

    Returns:
        None where that cannot be known yet: there is no group, and may be one later.

    Raises:
        InvalidValueError: the choice is none of True, False and None.
    """
    if chosen is not None:
        if not isinstance(chosen, bool):
            raise InvalidValueError("writer", "must be True, False or None", value=f"{chosen!r}")
        return chosen
    if not (dist.is_available() and dist.is_initialized()):
        return None
    wrapper = None if model is None else _replicating(model)
    return bool(dist.get_rank(getattr(wrapper, "process_group", None)) <= 0)


def warn_of_assumption(chosen: bool | None, model: torch.nn.Module) -> None:
    """Warn where only the rank says that this process keeps nothing: processes may train different models."""
    if chosen is None and choose_writer(None, model) is False and _replicating(model) is None:
        log.warning(
            "process %d of its group keeps no averages, as the first one is assumed to train the same model; if this "
            "process trains another one, say from_model(..., writer=True), else writer=False to silence this warning",
            dist.get_rank(),
        )


def is_in_group() -> bool:
    """Whether this is one of several processes that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _replicating(model: torch.nn.Module) -> torch.nn.Module | None:
    """The wrapper that keeps a model, or a part of it, the same in several processes."""
    return next((place.module for place in named_modules(model) if _replicates(place.module)), None)


def _replicates(module: torch.nn.Module) -> bool:
    return is_fsdp(module) or (
        wrapped_child(module) == "module" and isinstance(module, torch.nn.parallel.DistributedDataParallel)
    )
