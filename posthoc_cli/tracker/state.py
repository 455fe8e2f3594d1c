"""A tracker's state in and out: of a plain dict, exactly, and of snapshots, as rounded as they are."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.errors import DirectoryError, InvalidValueError, ModelMismatchError, NonFiniteError
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.sharded import open_tensors
from posthoc_cli.snapshots.store import read_directory
from posthoc_cli.snapshots.tensors import tensor_from_bytes, torch_dtype
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.layout import accumulator_dtype
from posthoc_cli.tracker.model_tensors import TrackedModel, nonfinite_name
from posthoc_cli.tracker.settings import Settings

STATE_VERSION = 1


@dataclass(frozen=True)
class TrackerState:
    """What a tracker continues from."""

    run_id: str
    step: int
    t: float
    clock: ClockRecorder
    averages: RunningAverages
    snapshots: frozenset[str]
    """Header checksums of the snapshots that the training had behind it."""
    segment: int = 0


# --- a plain dict ----------------------------------------------------------------------------------


@torch.inference_mode(False)
@torch.no_grad()
def pack_state(
    run_id: str,
    settings: Settings,
    tracked: TrackedModel,
    step: int,
    t: float,
    clock: ClockRecorder,
    averages: RunningAverages,
    snapshots: Sequence[str],
) -> dict[str, Any]:
    """The state as a dict of tensors, numbers, strings and lists; `torch.load(weights_only=True)` reads it.

    Before the first update the tensors are zeros (`averages_t` = 0 says that they mean nothing): loaders that fill
    the tensors of a fresh object's state, such as torch.distributed.checkpoint, find them in their places.
    """
    values, copies = averages.values, averages.copies
    if not averages.exist:
        values = tuple(_zeros(tracked, "average") for _ in averages.sigma_rels)
        copies = _zeros(tracked, "copy")
    return {
        "version": STATE_VERSION,
        "run_id": run_id,
        "step": step,
        "t": t,
        "t_unit": settings.t_unit,
        "clock": clock.state(),
        "schedule": dict(vars(settings.schedule)),
        "sigma_rels": list(averages.sigma_rels),
        "segment": tracked.segment,
        "averages_t": averages.t,
        "averages_step": averages.step,
        "t_first": averages.t_first,
        "max_interval": averages.max_interval,
        "snapshots": list(snapshots),
        "averages": [{name: value.clone() for name, value in average.items()} for average in values],
        "copies": {name: value.clone() for name, value in copies.items()},
    }


def _zeros(tracked: TrackedModel, role: str) -> dict[str, torch.Tensor]:
    zeros = {}
    for name, tensor in tracked.tensors.items():
        if tensor.role == role:
            own = torch_dtype(tensor.dtype)
            zeros[name] = torch.zeros(tracked.shapes[name], dtype=own if role == "copy" else accumulator_dtype(own))
    return zeros


@torch.inference_mode(False)
@torch.no_grad()
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
        step, t = int(state["step"]), float(state["t"])
        _check_times(averages, step, t)
        clock = _clock(state["clock"], step, t)
        if averages.exist:
            averages.values = tuple(
                _checked(values, tracked, "average")
                for _, values in zip(settings.sigma_rels, state["averages"], strict=True)
            )
            averages.copies = _checked(state["copies"], tracked, "copy")
        segment = int(state.get("segment", 0))
        if segment < 0:
            raise InvalidValueError(f"state: segment {segment} must be at least 0")
        run_id = state["run_id"]
        if not isinstance(run_id, str) or not re.fullmatch("[0-9a-f]{32}", run_id):
            raise InvalidValueError(f"state: run_id {run_id!r} is not 32 hexadecimal digits")
        return TrackerState(run_id, step, t, clock, averages, frozenset(map(str, state["snapshots"])), segment)
    except InvalidValueError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InvalidValueError(f"state: is not a tracker's state ({type(error).__name__}: {error})") from error


def _check_times(averages: RunningAverages, step: int, t: float) -> None:
    """Times and counters of one training: finite, and none after what it must not be after."""
    in_order = 0 <= averages.t_first <= averages.t <= t < math.inf and 0 <= averages.step <= step
    if not in_order or not 0 <= averages.max_interval <= averages.t or averages.exist != (averages.t_first > 0):
        raise InvalidValueError(
            f"state: t {t!r}, step {step}, averages at {averages.t!r} since {averages.t_first!r}: "
            "not times of one training"
        )


def _clock(state: Any, step: int, t: float) -> ClockRecorder:
    """The clock of a training that is at `step` and `t`."""
    try:
        clock = ClockRecorder.of_state(state)
    except InvalidValueError as error:
        raise InvalidValueError(f"state: {error}") from error
    if (clock.step, clock.t) != (step, t):
        raise InvalidValueError(
            f"state: clock: ends at step {clock.step}, t {clock.t!r}; the training is at step {step}, t {t!r}"
        )
    return clock


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
    bad = nonfinite_name(tensors) if role == "average" else None
    if bad is not None:
        raise NonFiniteError(f"tensor {bad!r}: the state's average of it holds nan or infinity")
    return {name: tensors[name].clone() for name in tracked.tensors if name in tensors}


# --- snapshots -------------------------------------------------------------------------------------


def newest_complete(snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> dict[float, Snapshot] | None:
    """The snapshots of the newest time that has one of every profile, by sigma_rel; None where no time has."""
    by_time: dict[float, dict[float, Snapshot]] = {}
    for snapshot in snapshots:
        by_time.setdefault(snapshot.info.t, {})[snapshot.info.sigma_rel] = snapshot
    complete = [t for t, found in by_time.items() if set(found) == set(sigma_rels)]
    return by_time[max(complete)] if complete else None


@torch.inference_mode(False)
@torch.no_grad()
def load_averages(directory: Path, sigma_rels: Sequence[float]) -> tuple[RunningAverages, ClockRecorder]:
    """The averages as the newest snapshots hold them that hold every profile, and the run's clock up to there.

    Raises:
        DirectoryError: at no time are all profiles there.
    """
    newest = newest_complete(read_directory(directory), sigma_rels)
    if newest is None:
        raise DirectoryError(f"{directory}: at no time is there a snapshot of every profile to go on from")
    averages = RunningAverages(sigma_rels)
    averages.values = tuple(_read(newest[sigma_rel], "average") for sigma_rel in sigma_rels)
    last = newest[sigma_rels[0]]
    averages.copies = _read(last, "copy")
    averages.t, averages.step = last.info.t, last.info.step
    averages.t_first, averages.max_interval = last.info.t_first, last.info.max_interval
    return averages, ClockRecorder.of_knots(last.info.clock_pairs)


def _read(snapshot: Snapshot, role: str) -> dict[str, torch.Tensor]:
    tensors = {}
    with open_tensors(snapshot) as file:
        for name, tensor in snapshot.info.tensors.items():
            if tensor.role == role:
                entry = snapshot.header.tensors[name]
                value = tensor_from_bytes(file.read(name), entry.dtype, entry.shape)
                tensors[name] = value.to(accumulator_dtype(torch_dtype(tensor.dtype))) if role == "average" else value
    return tensors
