"""The state of a tracker, and its form as a dict, which holds the averages exactly."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from posthoc_cli.dtypes import torch_dtype
from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    list_first,
    quote,
)
from posthoc_cli.planning import format_widths
from posthoc_cli.snapshots.decoding import ANY_SIGN, RunId, convert
from posthoc_cli.snapshots.sketch_text import SketchText, path_of_part
from posthoc_cli.snapshots.snapshot import START, Moment
from posthoc_cli.tracker.arguments import Settings
from posthoc_cli.tracker.memory import find_layout, on_host
from posthoc_cli.tracker.model import TrackedModel, into_dtensors, nonfinite_name
from posthoc_cli.tracker.processes import local_box
from posthoc_cli.tracker.progress import TrainingProgress
from posthoc_cli.tracker.tracked_averages import Averages, AverageTensors, Standing

STATE_VERSION = 8


@dataclass(frozen=True)
class Tracking:
    """The complete state of a tracker; replaced in one assignment, so that its fields are always
    consistent."""

    run_id: str
    tracked: TrackedModel
    averages: Averages
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    resumes: bool = False  # whether the averages are still to be loaded from the directory


# --- a dict


@dataclass(frozen=True)
class StateInfo:
    """A tracker's state without its tensors: one JSON text, which leaves out what equals its
    default, so that torch.distributed.checkpoint loads states of releases with fewer fields."""

    run_id: RunId
    t_unit: str
    sigma_rels: tuple[float, ...]
    standing: Standing = field(default_factory=Standing)
    last: Moment = START  # the last call
    sketch: SketchText = ""
    # of a snapshot's sample at the last call; empty if unknown
    weights: tuple[Annotated[float, ANY_SIGN], ...] = ()
    directory: str = ""  # of the snapshots: `ema` names it to users of checkpoints with this state

    def encode(self) -> str:
        return json.dumps(_without_defaults(self))


def _without_defaults(record: Any) -> dict[str, Any]:
    values = {}
    for each in fields(record):
        value = getattr(record, each.name)
        if is_dataclass(value):
            value = _without_defaults(value)
        if value != each.default and value != {}:
            values[each.name] = value
    return values


@torch.inference_mode(False)
@torch.no_grad()
def pack_state(
    state: Tracking,
    info: StateInfo,
    model: nn.Module | None,
) -> dict[str, Any]:
    """Pack the state into a dict of tensors, numbers, strings and lists;
    `torch.load(weights_only=True)` reads it.

    Averages have their sigma_rel as key. Before the first update the tensors are zeros, for loaders
    that fill a fresh object's state, such as torch.distributed.checkpoint. Owned chunks of a
    sharded `model` are DTensors.
    """
    averages = state.averages
    if not averages.exist:
        averages = zero_averages(averages.sigma_rels, state.tracked)
    tensors = averages.tensors
    means = {}
    highs = {}
    for profile, sigma_rel in enumerate(averages.sigma_rels):
        means[repr(sigma_rel)] = {
            name: tensors.mean_view(profile, name, averages.standing.shared)
            for name in tensors.places
        }
        highs[repr(sigma_rel)] = dict(tensors.high[profile].views)
    copies = {name: value.clone() for name, value in averages.copies.items()}
    if model is not None:
        for chunks in (*means.values(), *highs.values(), copies):
            into_dtensors(chunks, model)
    return {
        "version": STATE_VERSION,
        "info": info.encode(),
        "mean": means,
        "high": highs,
        "copies": copies,
    }


def zero_averages(sigma_rels: tuple[float, ...], tracked: TrackedModel) -> Averages:
    """Make averages before the first update, in host memory."""
    averaged = {}
    for name, dtype in tracked.dtypes(copied=False).items():
        averaged[name] = torch.empty(tracked.boxes[name].shape, dtype=dtype, device="meta")
    tensors = AverageTensors(on_host(find_layout(averaged)), len(sigma_rels))
    copies = {}
    for name, dtype in tracked.dtypes(copied=True).items():
        copies[name] = torch.zeros(tracked.boxes[name].shape, dtype=dtype, device="cpu")
    return Averages(sigma_rels, tensors=tensors, copies=copies)


@torch.inference_mode(False)
@torch.no_grad()
def unpack_state(
    state: Mapping[str, Any],
    settings: Settings,
    tracked: TrackedModel,
) -> tuple[Tracking, tuple[float, ...]]:
    """Check a state against the tracker that is to continue from it, and load it one tensor after
    the other.

    Return also the network's sampled weights. Profiles that only the state has are left out; a
    profile that only the tracker has cannot begin in mid-run. In a group of processes each takes
    the chunks that it owns, also from complete tensors.
    """
    info = read_info(state)
    if info.t_unit != settings.t_unit:
        unit = quote(info.t_unit)
        reason = f"counts time in {unit}, this tracker in {settings.t_unit!r}"
        raise InvalidValueError("state", reason)
    standing = info.standing
    averages = Averages(settings.sigma_rels)
    if standing.t > 0 and tracked.tensors:
        check_profiles(info.sigma_rels, settings.sigma_rels)
        averages = _unpack_averages(state, info, settings.sigma_rels, tracked)
    progress = TrainingProgress.resume(info.last, standing.step)
    loaded = Tracking(info.run_id, tracked, averages, progress)
    return loaded, info.weights


def _unpack_averages(
    state: Mapping[str, Any],
    info: StateInfo,
    sigma_rels: tuple[float, ...],
    tracked: TrackedModel,
) -> Averages:
    averages = zero_averages(sigma_rels, tracked)
    tensors = averages.tensors
    for kind, profiles in (("high", tensors.high), ("mean", tensors.mean)):
        for sigma_rel, flat in zip(sigma_rels, profiles, strict=True):
            _fill(flat.views, _find_tensors(state, kind, repr(sigma_rel)), tracked)
    _fill(averages.copies, _find_tensors(state, "copies"), tracked)
    averages.standing = info.standing
    averages.known_path = path_of_part(info.sketch, tracked.members.part)
    return averages


def _find_tensors(state: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """Find a set of tensors in a state; raise an InvalidValueError if it is not there."""
    found: Any = state
    for key in keys:
        found = found.get(key) if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping):
        place = "".join(f"[{key!r}]" for key in keys)
        raise InvalidValueError("state", f"{place} must hold tensors by name, not {quote(found)}")
    return found


def _fill(
    tensors: Mapping[str, Tensor],
    stored: Mapping[str, Any],
    tracked: TrackedModel,
) -> None:
    """Copy the parts of a state's tensors that this process owns, each checked before the next is
    read: they may be on disk."""
    missing = tensors.keys() - stored.keys()
    others = stored.keys() - tensors.keys() - tracked.members.names
    if differing := missing | others:
        reason = "is in the state or in the model, but not in both"
        hint = (
            "make the tracker with the include, exclude and buffers of the tracker that made "
            "the state"
        )
        raise ModelMismatchError(f"tensor {min(differing)!r}", reason, hint)
    for name, tensor in tensors.items():
        tensor.copy_(_own_part(name, stored, tracked, tensor.dtype))


def read_info(state: Any) -> StateInfo:
    """Read the numbers and texts of a state; raise an InvalidValueError for another object."""
    version = state.get("version") if isinstance(state, Mapping) else None
    if isinstance(state, Mapping) and version is None:
        names = list_first(map(quote, state), 3) or "nothing"
        reason = f"is the state of a model or optimizer, not of a tracker: it holds {names}"
        raise InvalidValueError("state", reason, "load what ema.state_dict() has returned")
    if type(version) is not int or version != STATE_VERSION:
        reason = (
            f"must come from state_dict() of a process that keeps averages, of version "
            f"{STATE_VERSION}, not {quote(version)}"
        )
        raise InvalidValueError("state", reason)
    try:
        info: StateInfo = convert(json.loads(state["info"]), StateInfo)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidValueError("state", str(error)) from error
    standing = info.standing
    if not standing.folded_t <= standing.t <= info.last.t or standing.step > info.last.step:
        raise InvalidValueError("state", "its last fold, update and call are not in this order")
    return info


def _own_part(
    name: str,
    tensors: Mapping[str, Any],
    tracked: TrackedModel,
    dtype: torch.dtype,
) -> Tensor:
    """Read the part of a tensor of a state that this process owns, and check it."""
    subject = f"tensor {name!r}"
    stored = tensors[name]
    if not isinstance(stored, Tensor):
        raise InvalidValueError(subject, f"is {quote(stored)} in the state")
    if stored.is_meta or stored.layout != torch.strided:
        raise InvalidValueError(subject, "has no dense values in the state")
    shape = list(tracked.shapes[name])
    stored_shape = list(stored.shape)
    if stored.dtype != dtype or stored_shape != shape:
        hint = f"the model's is {torch_dtype(tracked.tensors[name].dtype)}"
        if stored_shape != shape:
            hint = "the state is of another model"
        reason = f"is {stored.dtype} of shape {stored_shape} in the state"
        raise ModelMismatchError(subject, f"{reason}, not {dtype} of shape {shape}", hint)
    tensor, box = local_box(name, stored)
    own = tracked.boxes[name]
    if box.intersection(own) != own:
        reason = "is sharded over the processes in another way in the state than in the model"
        hint = "let torch.distributed.checkpoint load it, which reshards it"
        raise ModelMismatchError(subject, reason, hint)
    for dim, size in enumerate(own.shape):
        begin = own.offset[dim] - box.offset[dim]
        tensor = tensor.narrow(dim, begin, size)
    if tracked.tensors[name].role != "copy" and nonfinite_name({name: tensor}) is not None:
        raise NonFiniteError(subject, "the state's average of it holds nan or infinity")
    return tensor


def check_profiles(
    stored: Sequence[float],
    widths: Sequence[float],
) -> None:
    """Raise an InvalidValueError unless the run holds every profile that is wanted."""
    for sigma_rel in widths:
        if sigma_rel not in stored:
            reason = (
                f"{sigma_rel:g} is not among the tracked ones, {format_widths(stored)}: an average "
                f"cannot begin in mid-run"
            )
            raise InvalidValueError(
                "sigma_rels", reason, "leave it out, and synthesize it from the tracked ones"
            )
