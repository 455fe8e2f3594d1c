"""The tracker within training frameworks: one module each, which imports its framework. See the guide `trainers`.

Only the public tracker is used here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from posthoc_cli.tracker import PostHocEMA

STATE_NAME = "posthoc_ema.safetensors"  # the tracker's own state in a framework's checkpoint


_made: WeakValueDictionary[Path, PostHocEMA] = WeakValueDictionary()  # by directory, the last one


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether processes hold chunks of the model."""
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def make_tracker(
    model: torch.nn.Module, checkpoint_dir: str | Path, is_first: bool, options: dict[str, Any]
) -> PostHocEMA:
    """A tracker of a model; of replicas in several processes the first one keeps the averages.

    An earlier one of this process in the directory is closed: where an exception ends a training, not all frameworks
    tell.
    """
    directory = Path(checkpoint_dir).absolute()
    if (earlier := _made.get(directory)) is not None:
        earlier.close()
    writer = None if is_sharded(model) else is_first
    if writer is None:
        torch.distributed.barrier()  # every part of an earlier tracker's last snapshot is there
    _made[directory] = made = PostHocEMA.from_model(model, directory, **{"writer": writer} | options)
    return made


def has_average(ema: PostHocEMA) -> bool:
    """Whether an update was due by now."""
    schedule = ema.settings.schedule
    first = (schedule.update_after_step // schedule.update_every + 1) * schedule.update_every
    return ema.step >= first


def figures(ema: PostHocEMA, sigma_rel: float | None) -> dict[str, float]:
    """The tracker's metrics under names for a logger."""
    wanted = () if sigma_rel is None else (sigma_rel,)
    return {f"ema/{name}": value for name, value in ema.metrics(wanted).items()}
