"""A tracker's state in and out: of a plain dict, exactly, and of snapshots, as rounded as they are."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posthoc_cli.errors import InvalidValueError, ModelMismatchError, NonFiniteError, shown
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.headers import is_number
from posthoc_cli.snapshots.states import StateInfo, check_times, check_window, clock_at
from posthoc_cli.snapshots.tensors import torch_dtype
from posthoc_cli.tracker.averages import Accumulators, RunningAverages, Standing
from posthoc_cli.tracker.layout import Layout, group_tensors
from posthoc_cli.tracker.live import Reading
from posthoc_cli.tracker.model_tensors import TrackedModel, nonfinite_name
from posthoc_cli.tracker.settings import Settings, check_sigma_rels


class Facts:
    """The entries of a tracker's state.

    Raises:
        InvalidValueError: it is no dict; and from every method: the entry is missing, or not what it must be.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise InvalidValueError("state", f"must be the dict that state_dict() gives, not {shown(state)}")
        self._state = state

    def value(self, key: str) -> Any:
        """Whatever is there."""
        if key not in self._state:
            raise InvalidValueError("state", f"{key}: is missing; not a tracker's state, as state_dict() gives it")
        return self._state[key]

    def whole(self, key: str) -> int:
        """A whole number, at least 0."""
        value = self.value(key)
        if type(value) is not int or not 0 <= value < 2**63:
            raise _bad(key, "a whole number, at least 0", value)
        return value

    def number(self, key: str) -> float:
        """A finite number, at least 0."""
        value = self.value(key)
        if not is_number(value) or value < 0:
            raise _bad(key, "a finite number, at least 0", value)
        return float(value)

    def text(self, key: str) -> str:
        """A string."""
        value = self.value(key)
        if not isinstance(value, str):
            raise _bad(key, "a string", value)
        return value

    def run_id(self) -> str:
        """32 hexadecimal digits."""
        value = self.text("run_id")
        if not re.fullmatch("[0-9a-f]{32}", value):
            raise _bad("run_id", "32 hexadecimal digits", value)
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self.value(key)
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise _bad(key, "a list of strings", value)
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers, at least 0."""
        value = self.value(key)
        if not isinstance(value, (list, tuple)) or not all(is_number(item) and item >= 0 for item in value):
            raise _bad(key, "a list of finite numbers, at least 0", value)
        return tuple(map(float, value))

    def sigma_rels(self) -> tuple[float, ...]:
        """The profiles."""
        try:
            return check_sigma_rels(self.value("sigma_rels"))
        except InvalidValueError as error:
            raise InvalidValueError("state", str(error)) from error

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A dict."""
        return self.tensors(self._state, key)

    @staticmethod
    def tensors(entries: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        """The dict under a key of `entries`."""
        if key not in entries:
            raise InvalidValueError("state", f"{key}: is missing; not a tracker's state, as state_dict() gives it")
        value = entries[key]
        if not isinstance(value, Mapping):
            raise _bad(key, "a dict", value)
        return value


def _bad(key: str, accepted: str, value: object) -> InvalidValueError:
    return InvalidValueError("state", f"{key}: must be {accepted}, not {shown(value)}")


# --- A tracker's state in and out: of a plain dict, exactly, and of snapshots, as rounded as they are ---


log = logging.getLogger(__name__)

STATE_VERSION = int(fmt.STATE_VERSION)


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

    @classmethod
    def before(cls, run_id: str, sigma_rels: Sequence[float]) -> TrackerState:
        """That before the first call of a run."""
        return cls(run_id, 0, 0.0, ClockRecorder(), RunningAverages.none_yet(sigma_rels), frozenset())

    @classmethod
    def of(cls, reading: Reading[Accumulators], snapshots: frozenset[str]) -> TrackerState:
        """A state with the tensors of a reading."""
        tracking = reading.tracking
        averages = RunningAverages(tracking.averages.sigma_rels, reading.standing, reading.room, reading.copies)
        progress = tracking.progress
        return cls(
            tracking.run_id, progress.step, progress.t, progress.clock, averages, snapshots, tracking.tracked.segment
        )


# --- a plain dict ----------------------------------------------------------------------------------


def state_info(state: TrackerState, settings: Settings) -> StateInfo:
    """All of a state that is no tensor."""
    averages, standing = state.averages, state.averages.standing
    return StateInfo(
        run_id=state.run_id,
        step=state.step,
        t=state.t,
        t_unit=settings.t_unit,
        sigma_rels=averages.sigma_rels,
        averages_t=standing.t,
        averages_step=standing.step,
        t_first=standing.t_first,
        max_interval=standing.max_interval,
        updates=standing.updates,
        window=standing.window,
        masses=standing.masses,
        inherited=standing.inherited,
        schedule=settings.schedule,
        clock=tuple(state.clock.state()),
        snapshots=tuple(sorted(state.snapshots)),
        segment=state.segment,
    )


def as_dict(info: StateInfo) -> dict[str, Any]:
    """The same as numbers, strings, lists and dicts."""
    schedule = vars(info.schedule) | {"sigma_range": list(info.schedule.sigma_range)}
    lists = {key: list(value) for key, value in vars(info).items() if isinstance(value, tuple)}
    return {"version": STATE_VERSION, **vars(info), **lists, "schedule": schedule}


@torch.inference_mode(False)
@torch.no_grad()
def pack_state(state: TrackerState, settings: Settings, tracked: TrackedModel) -> dict[str, Any]:
    """The state as a dict of tensors, numbers, strings and lists; `torch.load(weights_only=True)` reads it.

    Averages are found by their sigma_rel and never by their place, so that a tracker of fewer profiles takes its own.
    Before the first update the tensors are zeros (`averages_t` = 0 says that they mean nothing): loaders that fill
    the tensors of a fresh object's state, such as torch.distributed.checkpoint, find them in their places.
    """
    averages = state.averages
    kept, copies = averages.accumulators, averages.copies
    if kept is None or not averages.exist:
        kept = Accumulators.zeros(host_layout(tracked), len(averages.sigma_rels))
        copies = _zero_copies(tracked)
    keys = [repr(sigma_rel) for sigma_rel in averages.sigma_rels]
    return as_dict(state_info(state, settings)) | {
        "totals": {key: dict(own.views) for key, own in zip(keys, kept.totals, strict=True)},
        "recent": {key: dict(own.views) for key, own in zip(keys, kept.recent, strict=True)},
        "copies": {name: value.clone() for name, value in copies.items()},
    }


def host_layout(tracked: TrackedModel) -> Layout:
    """How the averages lie in the host's memory: as those of a model there do."""
    host = torch.device("cpu")
    return group_tensors(
        {
            name: (host, torch_dtype(tensor.dtype), tracked.shapes[name])
            for name, tensor in tracked.tensors.items()
            if tensor.role == "average"
        }
    )


def _zero_copies(tracked: TrackedModel) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros(tracked.shapes[name], dtype=torch_dtype(tensor.dtype))
        for name, tensor in tracked.tensors.items()
        if tensor.role == "copy"
    }


@torch.inference_mode(False)
@torch.no_grad()
def unpack_state(state: Mapping[str, Any], settings: Settings, tracked: TrackedModel) -> TrackerState:
    """Check a state against the tracker that is to continue from it. Tensors are looked at one after the other.

    The tracker's schedule holds from here on, whatever the state's was: averages take in true intervals. Profiles of
    the state that the tracker has not are left behind; one that only the tracker has cannot begin in mid-run.

    Raises:
        InvalidValueError, ModelMismatchError, NonFiniteError: naming what does not fit.
    """
    if isinstance(state, Mapping) and not state:
        raise InvalidValueError(
            "state", "is empty: it is of a process that keeps no averages", "load the one of the group's writer"
        )
    facts = Facts(state)
    version = facts.value("version")
    if version != STATE_VERSION:
        raise InvalidValueError("state", f"has version {shown(version)}; this release reads {STATE_VERSION}")
    if facts.text("t_unit") != settings.t_unit:
        found = shown(facts.text("t_unit"))
        raise InvalidValueError("state", f"counts time in {found}, this tracker in {settings.t_unit!r}")
    held, schedule = facts.sigma_rels(), facts.mapping("schedule")
    standing = _standing(facts)
    step, t = facts.whole("step"), facts.number("t")
    try:
        check_times(step, t, standing.step, standing.t, standing.t_first, standing.max_interval)
        check_window(len(held), standing.step, standing.updates, standing.window, standing.masses, standing.inherited)
        clock = clock_at(facts.value("clock"), step, t)
    except InvalidValueError as error:
        raise InvalidValueError("state", str(error)) from error
    segment = facts.whole("segment")
    run_id, snapshots = facts.run_id(), frozenset(facts.texts("snapshots"))
    averages = RunningAverages.none_yet(settings.sigma_rels)
    if standing.t > 0:
        check_profiles(held, settings.sigma_rels)
        averages = RunningAverages(
            settings.sigma_rels,
            standing.of_profiles([held.index(sigma_rel) for sigma_rel in settings.sigma_rels]),
            _checked_averages(facts, settings.sigma_rels, tracked),
            _checked_copies(facts.mapping("copies"), tracked),
        )
    _log_changes(held, settings.sigma_rels, schedule, settings.schedule)
    return TrackerState(run_id, step, t, clock, averages, snapshots, segment)


def check_profiles(held: Sequence[float], wanted: Sequence[float]) -> None:
    """Every profile to go on with must be there."""
    for sigma_rel in wanted:
        if sigma_rel not in held:
            raise InvalidValueError(
                "sigma_rels",
                f"{sigma_rel:g} is none of the tracked ones, {listed(held)}: an average cannot begin in mid-run",
                "leave it out, and synthesize it from the others",
            )


def listed(sigma_rels: Iterable[float]) -> str:
    """Profiles for a message."""
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


def _log_changes(
    held: Sequence[float], wanted: Sequence[float], schedule: Mapping[str, Any], chosen: fmt.TrackingSchedule
) -> None:
    for sigma_rel in held:
        if sigma_rel not in wanted:
            log.info("sigma_rel %g is not tracked from here on; its snapshots stay in use", sigma_rel)
    for key in ("update_every", "checkpoint_every", "update_after_step"):
        if schedule.get(key) != getattr(chosen, key):
            log.info("%s is %s from here on; it was %s", key, getattr(chosen, key), shown(schedule.get(key)))


def _standing(facts: Facts) -> Standing:
    return Standing(
        t=facts.number("averages_t"),
        step=facts.whole("averages_step"),
        t_first=facts.number("t_first"),
        max_interval=facts.number("max_interval"),
        updates=None if facts.value("updates") is None else facts.whole("updates"),
        window=facts.whole("window"),
        masses=facts.numbers("masses"),
        inherited=facts.numbers("inherited"),
    )


def _checked_averages(facts: Facts, sigma_rels: Sequence[float], tracked: TrackedModel) -> Accumulators:
    """Copies of the averages, each tensor checked before the next is looked at: they may be on disk."""
    kept = Accumulators.zeros(host_layout(tracked), len(sigma_rels))
    for kind, rooms in (("totals", kept.totals), ("recent", kept.recent)):
        stored = facts.mapping(kind)
        for sigma_rel, room in zip(sigma_rels, rooms, strict=True):
            tensors = facts.tensors(stored, repr(sigma_rel))
            _check_names(tensors, tracked, "average")
            for name, own in room.views.items():
                own.copy_(_checked_tensor(name, tensors[name], tracked, own.dtype))
    return kept


def _checked_copies(tensors: Mapping[str, Any], tracked: TrackedModel) -> dict[str, torch.Tensor]:
    _check_names(tensors, tracked, "copy")
    return {
        name: _checked_tensor(name, tensors[name], tracked, torch_dtype(own.dtype)).detach().clone()
        for name, own in tracked.tensors.items()
        if own.role == "copy"
    }


def _check_names(tensors: Mapping[str, Any], tracked: TrackedModel, role: str) -> None:
    expected = {name for name, tensor in tracked.tensors.items() if tensor.role == role}
    if set(tensors) != expected:
        name = min(set(tensors) ^ expected, key=str)
        raise ModelMismatchError(f"tensor {name!r}", "is in the state or in the model, but not in both")


def _checked_tensor(name: str, tensor: Any, tracked: TrackedModel, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise InvalidValueError("tensor", f"is {shown(tensor)} in the state, and no tensor", value=f"{name!r}")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InvalidValueError(
            "tensor", f"is {tensor.layout} on {tensor.device} in the state; must be dense", value=f"{name!r}"
        )
    shapes = list(tensor.shape), list(tracked.shapes[name])
    if shapes[0] != shapes[1]:
        raise ModelMismatchError(
            f"tensor {name!r}", f"has the shape {shapes[0]} in the state, {shapes[1]} in the model"
        )
    if tensor.dtype != dtype:
        own = torch_dtype(tracked.tensors[name].dtype)
        raise ModelMismatchError(
            f"tensor {name!r}", f"is {tensor.dtype} in the state, not {dtype}; the model's is {own}"
        )
    if tracked.tensors[name].role == "average" and nonfinite_name({name: tensor}) is not None:
        raise NonFiniteError(f"tensor {name!r}", "the state's average of it holds nan or infinity")
    return tensor.detach()
