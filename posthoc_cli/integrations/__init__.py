"""The tracker within training frameworks: one module each, which imports its framework. See the guide `trainers`.

Only the public tracker is used here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from posthoc_cli.errors import MismatchError, NotReadyError
from posthoc_cli.targets import as_target
from posthoc_cli.tracker import PostHocEMA

STATE_NAME = "posthoc_ema"
"""The tracker's own state in a framework's checkpoint: a folder of torch.distributed.checkpoint where processes share
it, else this with the suffix of a file of `torch.save`."""


def lengths(given: Any) -> dict[str, float | str]:
    """What an argument asks for, by label: a sigma_rel, a target's text form, several, or None; else an error."""
    wanted = [] if given is None else given if isinstance(given, list | tuple) else [given]
    return {as_target(one).label: one for one in wanted}


def make_tracker(model: torch.nn.Module, checkpoint_dir: str | Path, options: dict[str, Any]) -> PostHocEMA:
    """A tracker of a model, which goes on with the directory's run if the model, or a state, is of it."""
    return PostHocEMA.from_model(model, checkpoint_dir, **{"resume": "auto"} | options)


def check_found(where: str, release: str, found: Mapping[str, bool]) -> None:
    """Raise a NotReadyError if a release of a framework lacks one of these names."""
    missing = [name for name, is_there in found.items() if not is_there]
    if missing:
        reason = f"found no {' and no '.join(missing)} in {release}"
        raise NotReadyError(where, reason, "use a release that the guide `trainers` names")


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether processes hold chunks of the model. After a forward pass without backward parameters may be complete."""
    held = any(hasattr(one, "placements") for one in model.parameters())
    return held or any(hasattr(module, "reshard") for module in model.modules())


def write_state(ema: PostHocEMA, folder: str | Path, model: torch.nn.Module, number: int = 0) -> None:
    """Write a tracker's own state into a checkpoint, complete or not at all; every process calls it.

    Arguments:
        folder: of the checkpoint.
        model: the one that is tracked.
        number: of the tracker, the first, second, ... of its training.
    """
    path = Path(folder) / _state_names(number)[is_sharded(model)]
    state, temporary = ema.state_dict(), path.with_name(f".{path.name}.tmp")
    if not is_sharded(model):
        if state:  # else this process keeps no averages
            torch.save(state, temporary)
            temporary.replace(path)
        return
    save(state, checkpoint_id=temporary)
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    dist.barrier()


def read_state(ema: PostHocEMA, folder: str | Path, number: int = 0) -> bool:
    """Continue from the state in a checkpoint, which may be of another arrangement of processes; False if it has none.

    Raises:
        MismatchError: both a file and a folder are there, from two saves to one checkpoint.
        others: as `PostHocEMA.load_state_dict`.
    """
    found = [path for name in _state_names(number) if (path := Path(folder) / name).exists()]
    if len(found) > 1:
        names = f"{found[0]} and {found[1]}"
        raise MismatchError(names, "are the tracker's states of two saves", "remove the older one")
    for path in found:
        if path.is_dir():
            state = ema.state_dict()
            load(state, checkpoint_id=path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        ema.load_state_dict(state)
    return bool(found)


def _state_names(number: int) -> tuple[str, str]:
    """As accelerate numbers models: the first one has none."""
    name = f"{STATE_NAME}_{number}" if number else STATE_NAME
    return f"{name}.pt", name


def was_left_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that ends now has changed nothing: a GradScaler calls fused optimizers also on infinities."""
    return bool(getattr(optimizer, "found_inf", None))


def figures(ema: PostHocEMA, wanted: Iterable[float | str] = ()) -> dict[str, float]:
    """The tracker's metrics, with the predicted errors of these lengths, under names for a logger."""
    return {f"ema/{name}": value for name, value in ema.metrics([*wanted]).items()}
