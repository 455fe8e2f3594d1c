"""A tracker's state in and out: of a plain dict, exactly, and of snapshots, as rounded as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.errors import DirectoryError, InvalidValueError, ModelMismatchError
from posthoc_cli.snapshots.reader import Snapshot, TensorFile
from posthoc_cli.snapshots.store import read_directory
from posthoc_cli.snapshots.tensors import tensor_from_bytes, torch_dtype
from posthoc_cli.tracker.averages import RunningAverages, accumulator_dtype
from posthoc_cli.tracker.model_tensors import TrackedModel
from posthoc_cli.tracker.settings import Settings

STATE_VERSION = 1


@dataclass(frozen=True)
class TrackerState:
    """What a tracker continues from."""

    run_id: str
    step: int
    t: float
    averages: RunningAverages


# --- a plain dict ----------------------------------------------------------------------------------


def pack_state(run_id: str, settings: Settings, step: int, t: float, averages: RunningAverages) -> dict[str, Any]:
    """The state as a dict of tensors, numbers, strings and lists; `torch.load(weights_only=True)` reads it."""
    return {
        "version": STATE_VERSION,
        "run_id": run_id,
        "step": step,
        "t": t,
        "t_unit": settings.t_unit,
        "schedule": dict(vars(settings.schedule)),
        "sigma_rels": list(averages.sigma_rels),
        "averages_t": averages.t,
        "averages_step": averages.step,
        "t_first": averages.t_first,
        "max_interval": averages.max_interval,
        "averages": [{name: value.clone() for name, value in values.items()} for values in averages.values],
        "copies": {name: value.clone() for name, value in averages.copies.items()},
    }


def unpack_state(state: Mapping[str, Any], settings: Settings, tracked: TrackedModel) -> TrackerState:
    """Check a state against the tracker that is to continue from it.

    Raises:
        InvalidValueError, ModelMismatchError: naming what does not fit.
    """
    try:
        if state["version"] != STATE_VERSION:
            raise InvalidValueError(f"state: has version {state['version']!r}; this release reads {STATE_VERSION}")
        if tuple(state["sigma_rels"]) != settings.sigma_rels:
            raise InvalidValueError(
                f"state: holds the profiles {tuple(state['sigma_rels'])}, this tracker has {settings.sigma_rels}"
            )
        if state["t_unit"] != settings.t_unit:
            raise InvalidValueError(f"state: counts time in {state['t_unit']!r}, this tracker in {settings.t_unit!r}")
        averages = RunningAverages(settings.sigma_rels)
        averages.t, averages.step = float(state["averages_t"]), int(state["averages_step"])
        averages.t_first, averages.max_interval = float(state["t_first"]), float(state["max_interval"])
        if averages.exist:
            averages.values = tuple(_checked(values, tracked, "average") for values in state["averages"])
            averages.copies = _checked(state["copies"], tracked, "copy")
        return TrackerState(str(state["run_id"]), int(state["step"]), float(state["t"]), averages)
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidValueError(f"state: is not a tracker's state ({type(error).__name__}: {error})") from error


def _checked(tensors: Mapping[str, torch.Tensor], tracked: TrackedModel, role: str) -> dict[str, torch.Tensor]:
    expected = {name for name, tensor in tracked.tensors.items() if tensor.role == role}
    if set(tensors) != expected:
        name = min(set(tensors) ^ expected)
        raise ModelMismatchError(f"tensor {name!r}: is in the state or in the model, but not in both")
    for name, tensor in tensors.items():
        own = torch_dtype(tracked.tensors[name].dtype)
        if tuple(tensor.shape) != tracked.shapes[name]:
            raise ModelMismatchError(
                f"tensor {name!r}: has the shape {list(tensor.shape)} in the state, "
                f"{list(tracked.shapes[name])} in the model"
            )
        if tensor.dtype != (own if role == "copy" else accumulator_dtype(own)):
            raise ModelMismatchError(f"tensor {name!r}: is {tensor.dtype} in the state; the model's is {own}")
    return {name: tensors[name].clone() for name in tracked.tensors if name in tensors}


# --- snapshots -------------------------------------------------------------------------------------


def load_averages(directory: Path, sigma_rels: Sequence[float]) -> RunningAverages:
    """The averages as the newest snapshots hold them that hold every profile.

    Raises:
        DirectoryError: at no time are all profiles there.
    """
    by_time: dict[float, dict[float, Snapshot]] = {}
    for snapshot in read_directory(directory):
        by_time.setdefault(snapshot.info.t, {})[snapshot.info.sigma_rel] = snapshot
    whole = [t for t, found in by_time.items() if set(found) == set(sigma_rels)]
    if not whole:
        raise DirectoryError(f"{directory}: at no time is there a snapshot of every profile to go on from")
    newest = by_time[max(whole)]
    averages = RunningAverages(sigma_rels)
    averages.values = tuple(_read(newest[sigma_rel], "average") for sigma_rel in sigma_rels)
    last = newest[sigma_rels[0]]
    averages.copies = _read(last, "copy")
    averages.t, averages.step = last.info.t, last.info.step
    averages.t_first, averages.max_interval = last.info.t_first, last.info.max_interval
    return averages


def _read(snapshot: Snapshot, role: str) -> dict[str, torch.Tensor]:
    tensors = {}
    with TensorFile(snapshot.path, snapshot.header) as file:
        for name, tensor in snapshot.info.tensors.items():
            if tensor.role == role:
                entry = snapshot.header.tensors[name]
                value = tensor_from_bytes(file.read(name), entry.dtype, entry.shape)
                tensors[name] = value.to(accumulator_dtype(torch_dtype(tensor.dtype))) if role == "average" else value
    return tensors
