"""The tracker within training frameworks: one module each, which imports its framework. See the guide `trainers`.

Only the public tracker is used here.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from posthoc_cli.errors import MismatchError
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)

PARTS_NAME = "posthoc_ema"  # the tracker's own state in a framework's checkpoint: a folder where processes share it,
STATE_NAME = f"{PARTS_NAME}.safetensors"  # else a file


_made: WeakValueDictionary[Path, PostHocEMA] = WeakValueDictionary()  # by directory, the last one


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether processes hold chunks of the model."""
    # What is no model is refused when the tracker is made.
    return isinstance(model, torch.nn.Module) and any(hasattr(one, "placements") for one in model.parameters())


def new_state(folder: str | Path, model: torch.nn.Module, number: int = 0) -> Path:
    """The path for the state of a tracker in a checkpoint, the first, second, ... of its training."""
    return Path(folder) / _state_names(number)[is_sharded(model)]


def find_state(folder: str | Path, number: int = 0) -> Path | None:
    """The path of that state in a checkpoint, which may be of another arrangement of processes.

    Raises:
        MismatchError: both a file and a folder are there, from two saves to one checkpoint.
    """
    found = [path for name in _state_names(number) if (path := Path(folder) / name).exists()]
    if len(found) > 1:
        raise MismatchError(
            f"{found[0]} and {found[1]}", "are the tracker's states of two saves", "remove the older one"
        )
    return found[0] if found else None


def _state_names(number: int) -> tuple[str, str]:
    """As accelerate numbers models: the first one has none."""
    mark = f"_{number}" if number else ""
    return STATE_NAME.replace(".", f"{mark}."), f"{PARTS_NAME}{mark}"


def make_tracker(
    model: torch.nn.Module, checkpoint_dir: str | Path, is_first: bool, options: dict[str, Any], has_state: bool = False
) -> PostHocEMA:
    """A tracker of a model; of replicas in several processes the first one keeps the averages.

    An earlier one of this process in the directory is closed: where an exception ends a training, not all frameworks
    tell. Where a checkpoint `has_state` for it, that says where to go on, and `resume` nothing.
    """
    options = {name: value for name, value in options.items() if not (has_state and name == "resume")}
    directory = Path(checkpoint_dir).absolute()
    if (earlier := _made.get(directory)) is not None and not earlier.closed:
        log.warning("%s: an earlier tracker of this directory is closed; each model needs its own", directory)
        earlier.close()
    writer = None if is_sharded(model) else is_first
    _made[directory] = made = PostHocEMA.from_model(model, checkpoint_dir, **{"writer": writer} | options)
    return made


def has_average(ema: PostHocEMA) -> bool:
    """Whether an update was due by now."""
    schedule = ema.settings.schedule
    first = (schedule.update_after_step // schedule.update_every + 1) * schedule.update_every
    return ema.step >= first


def averaged(
    ema: PostHocEMA, model: torch.nn.Module, sigma_rel: float, alone: bool = False
) -> AbstractContextManager[torch.nn.Module]:
    """The model with averaged weights, as `PostHocEMA.model` gives it; before the first update with its own."""
    return ema.model(model, sigma_rel, alone=alone) if has_average(ema) else nullcontext(model)


def was_left_out(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the step that ends now has changed nothing: a GradScaler calls fused optimizers also on infinities."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def figures(ema: PostHocEMA, sigma_rel: float | None) -> dict[str, float]:
    """The tracker's metrics under names for a logger."""
    wanted = () if sigma_rel is None else (sigma_rel,)
    return {f"ema/{name}": value for name, value in ema.metrics(wanted).items()}
