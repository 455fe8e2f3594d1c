"""The tracker within training frameworks, one module per framework; see the guide `trainers`."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from posthoc_cli.errors import MismatchError
from posthoc_cli.targets import Target
from posthoc_cli.tracker import PostHocEMA

log = logging.getLogger(__name__)

# The name of the tracker's own state in a framework's checkpoint: for a sharded model a folder of
# torch.distributed.checkpoint, else, with a suffix, a file of `torch.save`.
STATE_NAME = "posthoc_ema"


def make_tracker(
    model: torch.nn.Module,
    checkpoint_dir: str | Path,
    options: dict[str, Any],
) -> PostHocEMA:
    """Make a tracker of a model, by default with `resume="auto"`."""
    return PostHocEMA.from_model(model, checkpoint_dir, **{"resume": "auto"} | options)


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether processes hold chunks of the model, even if a forward pass has made its
    parameters complete."""
    has_dtensors = any(hasattr(parameter, "placements") for parameter in model.parameters())
    return has_dtensors or any(hasattr(module, "reshard") for module in model.modules())


def write_state(
    ema: PostHocEMA,
    folder: str | Path,
    model: torch.nn.Module,
    number: int = 0,
    averages: Mapping[str, Target] = MappingProxyType({}),
) -> None:
    """Write a tracker's own state into a checkpoint's folder, complete or not at all. Every process
    makes the call.

    `number` is the tracker's index among the trackers of its training; `averages` are as in
    `name_averages`.
    """
    path = Path(folder) / _state_names(number)[is_sharded(model)]
    state = name_averages(ema.state_dict(), averages)
    temporary = path.with_name(f".{path.name}.tmp")
    if not is_sharded(model):
        if state:  # the state is empty in a process that keeps no averages
            torch.save(state, temporary)
            temporary.replace(path)
        return
    save(state, checkpoint_id=temporary)
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    dist.barrier()


def name_averages(state: dict[str, Any], averages: Mapping[str, Target]) -> dict[str, Any]:
    """Say in a tracker's state which averages lie beside it in a checkpoint, by their keys there:
    `ema` knows them by it. An empty key is for what the state itself lies in."""
    if not (state and averages):
        return state
    labels = {key: target.label for key, target in averages.items()}
    info = json.loads(state["info"]) | {"averages": labels}
    return state | {"info": json.dumps(info)}


def read_state(
    ema: PostHocEMA,
    folder: str | Path,
    number: int = 0,
    of_model: bool = False,
) -> None:
    """Continue from the state in a checkpoint, which other processes may have written; warn if it
    has none, or with `of_model` if the state belongs to other weights than the model's."""
    places = [Path(folder) / name for name in _state_names(number)]
    paths = [path for path in places if path.exists()]
    if len(paths) > 1:
        names = " and ".join(path.name for path in paths)
        reason = f"{names} are the tracker's states of two saves"
        raise MismatchError(folder, reason, "remove the older")
    for path in paths:
        if path.is_dir():
            state = ema.state_dict()
            load(state, checkpoint_id=path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not of_model or ema.fits(state):
            ema.load_state_dict(state)
            return
    if ema.keeps_averages:
        log.warning(
            "%s holds no averages of these weights: they continue from a snapshot with these "
            "weights, or begin with this training",
            folder,
        )


def average_blocks(
    ema: PostHocEMA,
    model: torch.nn.Module,
    targets: Sequence[Target],
) -> dict[str, AbstractContextManager[torch.nn.Module]]:
    """Make the blocks of `PostHocEMA.models` for averages of the present step; none before the
    first update.

    Lengths that are not tracked are made of a snapshot of this step.
    """
    if not ema.has_average:
        return {}
    tracked = ema.settings.sigma_rels
    if not ema.closed and any(target.sigma_rel not in tracked for target in targets):
        ema.snapshot(keep=False)
    return ema.models(model, targets)


def _state_names(number: int) -> tuple[str, str]:
    """Name a tracker's file and folder; like accelerate's for models, the first has no number."""
    name = f"{STATE_NAME}_{number}" if number else STATE_NAME
    return f"{name}.pt", name


def figures(
    ema: PostHocEMA,
    targets: Iterable[Target] = (),
) -> dict[str, float]:
    """Collect the tracker's metrics, with the predicted errors of these lengths, under names for a
    logger."""
    return {f"ema/{name}": value for name, value in ema.metrics([*targets]).items()}
