"""A tracker's state: in memory, as a dict, as a file, and where a run goes on from its directory.

A dict and a file hold the averages exactly; snapshots hold them rounded to their storage dtype.
"""

from __future__ import annotations

import logging
import math
import os
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    OutputExistsError,
    shown,
)
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.reconstruction import ROUNDING, error_after_rounding
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.directory import StoredSnapshot, read_directory
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.reader import Snapshot, TensorFile, read_header
from posthoc_cli.snapshots.states import (
    COPY,
    StateInfo,
    clock_at,
    decode_state,
    recent_prefix,
    state_from,
    state_metadata,
    tensor_name,
    tensors_with,
    total_prefix,
)
from posthoc_cli.snapshots.tensors import stored_name, tensor_bytes, tensor_from_bytes, torch_dtype
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.tracker.averages import Accumulators, RunningAverages, Standing
from posthoc_cli.tracker.buffers import HOST, FlatTensors, Layout, group_tensors
from posthoc_cli.tracker.model_tensors import TrackedModel, nonfinite_name
from posthoc_cli.tracker.settings import Settings, check_count, check_sigma_rels

log = logging.getLogger(__name__)

STATE_NAME = "state.safetensors"
"""The file beside the snapshots that a tracker keeps its exact state in."""

STATE_VERSION = int(fmt.STATE_VERSION)

_MOST_NAMED = 20


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        clock: of all calls.
        own_clock: whether the calls pass a time; None while unknown.
        updated: the last call at which an update was due; 0 before.
    """

    clock: ClockRecorder = field(default_factory=ClockRecorder)
    own_clock: bool | None = None
    updated: int = 0

    @classmethod
    def resumed(cls, clock: ClockRecorder) -> Progress:
        """The progress of a resumed run; whether it passes `t` is unknown where time and step are equal."""
        return cls(clock, True if clock.t != clock.step else None, clock.step)

    @property
    def step(self) -> int:
        """The last call; 0 before the first."""
        return self.clock.step

    @property
    def t(self) -> float:
        """Its time."""
        return self.clock.t

    def after(self, t: float, own_clock: bool, is_update: bool) -> Progress:
        """The progress after one more call."""
        step = self.step + 1
        return Progress(self.clock.add(step, t), own_clock, step if is_update else self.updated)


@dataclass(frozen=True)
class Tracking:
    """All that a tracker has; replaced in one assignment, so that its fields always belong together.

    Attributes:
        run_id: of its run.
        progress: of the training.
        tracked: what the averages are of.
        averages: the running ones.
        resumes: whether they are still to be loaded from the directory.
    """

    run_id: str
    progress: Progress
    tracked: TrackedModel
    averages: RunningAverages
    resumes: bool = False


@dataclass(frozen=True)
class TrackerState:
    """What a tracker continues from: its tensors, copied, and the header checksums of the snapshots until then."""

    tracking: Tracking
    snapshots: frozenset[str] = frozenset()


# --- a dict ---


@torch.inference_mode(False)
@torch.no_grad()
def pack_state(state: TrackerState, settings: Settings) -> dict[str, Any]:
    """The state as a dict of tensors, numbers, strings and lists; `torch.load(weights_only=True)` reads it.

    Averages have their sigma_rel as key, so that a tracker of fewer profiles finds its own. Before the first update
    the tensors are zeros (`averages_t` = 0 says so): loaders that fill the tensors of a fresh object's state, such as
    torch.distributed.checkpoint, find them in their places.
    """
    averages, tracked = state.tracking.averages, state.tracking.tracked
    kept, copies = averages.accumulators, averages.copies
    if kept is None or not averages.exist:
        kept = Accumulators.zeros(_host_layout(tracked), len(averages.sigma_rels))
        copies = {
            name: torch.zeros(tracked.shapes[name], dtype=torch_dtype(tensor.dtype))
            for name, tensor in tracked.tensors.items()
            if tensor.role == "copy"
        }
    keys = [repr(sigma_rel) for sigma_rel in averages.sigma_rels]
    return _plain(_state_info(state, settings)) | {
        "totals": {key: dict(own.views) for key, own in zip(keys, kept.totals, strict=True)},
        "recent": {key: dict(own.views) for key, own in zip(keys, kept.recent, strict=True)},
        "copies": {name: value.clone() for name, value in copies.items()},
    }


@torch.inference_mode(False)
@torch.no_grad()
def unpack_state(state: Mapping[str, Any], settings: Settings, tracked: TrackedModel) -> TrackerState:
    """Check a state against the tracker that is to continue from it, one tensor after the other.

    The tracker's schedule holds from here on. Profiles that only the state has are dropped; one that only the tracker
    has cannot begin in mid-run.

    Raises:
        InvalidValueError, ModelMismatchError, NonFiniteError: naming what does not fit.
    """
    if not isinstance(state, Mapping):
        raise InvalidValueError("state", f"must be the dict that state_dict() gives, not {shown(state)}")
    if not state:
        raise InvalidValueError(
            "state", "is empty: it is of a process that keeps no averages", "load the one of the group's writer"
        )
    if (version := _entry(state, "version")) != STATE_VERSION:
        raise InvalidValueError("state", f"has version {shown(version)}; this release reads {STATE_VERSION}")
    info, schedule = state_from(state, settings.schedule), _mapping(state, "schedule")
    if info.t_unit != settings.t_unit:
        raise InvalidValueError("state", f"counts time in {shown(info.t_unit)}, this tracker in {settings.t_unit!r}")
    averages, wanted = RunningAverages.none_yet(settings.sigma_rels), settings.sigma_rels
    if info.averages_t > 0:
        check_profiles(info.sigma_rels, wanted)
        held = (info.t_first, info.max_interval, info.updates, info.window, info.masses, info.inherited)
        indices = [info.sigma_rels.index(sigma_rel) for sigma_rel in wanted]
        standing = Standing(info.averages_t, info.averages_step, *held).of_profiles(indices)
        kept = _checked_averages(state, wanted, tracked)
        averages = RunningAverages(wanted, standing, kept, _checked_copies(_mapping(state, "copies"), tracked))
    _log_changes(info.sigma_rels, schedule, settings)
    progress = Progress.resumed(clock_at(list(info.clock), info.step, info.t))
    tracking = Tracking(info.run_id, progress, replace(tracked, segment=info.segment), averages)
    return TrackerState(tracking, frozenset(info.snapshots))


def _state_info(state: TrackerState, settings: Settings) -> StateInfo:
    """All of a state but tensors."""
    tracking = state.tracking
    standing = tracking.averages.standing
    return StateInfo(
        run_id=tracking.run_id,
        step=tracking.progress.step,
        t=tracking.progress.t,
        t_unit=settings.t_unit,
        sigma_rels=tracking.averages.sigma_rels,
        averages_t=standing.t,
        averages_step=standing.step,
        t_first=standing.t_first,
        max_interval=standing.max_interval,
        updates=standing.updates,
        window=standing.window,
        masses=standing.masses,
        inherited=standing.inherited,
        schedule=settings.schedule,
        clock=tuple(tracking.progress.clock.state()),
        snapshots=tuple(sorted(state.snapshots)),
        segment=tracking.tracked.segment,
    )


def _plain(info: StateInfo) -> dict[str, Any]:
    """The same as numbers, strings, lists and dicts."""
    schedule = vars(info.schedule) | {"sigma_range": list(info.schedule.sigma_range)}
    lists = {key: list(value) for key, value in vars(info).items() if isinstance(value, tuple)}
    return {"version": STATE_VERSION, **vars(info), **lists, "schedule": schedule}


def _host_layout(tracked: TrackedModel) -> Layout:
    """The layout of the averages of a model in the host's memory."""
    return group_tensors(
        {
            name: (HOST, torch_dtype(tensor.dtype), tracked.shapes[name])
            for name, tensor in tracked.tensors.items()
            if tensor.role == "average"
        }
    )


def _entry(entries: Mapping[str, Any], key: str) -> Any:
    if key not in entries:
        raise InvalidValueError("state", f"{key}: is missing; not a tracker's state, as state_dict() gives it")
    return entries[key]


def _mapping(entries: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = _entry(entries, key)
    if not isinstance(value, Mapping):
        raise InvalidValueError("state", f"{key}: must be a dict, not {shown(value)}")
    return value


def _checked_averages(state: Mapping[str, Any], sigma_rels: Sequence[float], tracked: TrackedModel) -> Accumulators:
    """Copies of the averages. Each tensor is checked before the next is looked at: they may be on disk."""
    kept = Accumulators.zeros(_host_layout(tracked), len(sigma_rels))
    for kind, rooms in (("totals", kept.totals), ("recent", kept.recent)):
        stored = _mapping(state, kind)
        for sigma_rel, room in zip(sigma_rels, rooms, strict=True):
            tensors = _mapping(stored, repr(sigma_rel))
            _check_names(tensors, tracked, "average")
            for name, own in room.views.items():
                own.copy_(_checked_tensor(name, tensors[name], tracked, own.dtype))
    return kept


def _checked_copies(tensors: Mapping[str, Any], tracked: TrackedModel) -> dict[str, torch.Tensor]:
    _check_names(tensors, tracked, "copy")
    return {
        name: _checked_tensor(name, tensors[name], tracked, torch_dtype(own.dtype)).clone()
        for name, own in tracked.tensors.items()
        if own.role == "copy"
    }


def _check_names(tensors: Mapping[str, Any], tracked: TrackedModel, role: str) -> None:
    expected = {name for name, tensor in tracked.tensors.items() if tensor.role == role}
    if set(tensors) != expected:
        name = min(set(tensors) ^ expected, key=str)
        raise ModelMismatchError(f"tensor {name!r}", "is in the state or in the model, but not in both")


def _checked_tensor(name: str, tensor: Any, tracked: TrackedModel, dtype: torch.dtype) -> torch.Tensor:
    subject = f"tensor {name!r}"
    if not isinstance(tensor, torch.Tensor):
        raise InvalidValueError(subject, f"is {shown(tensor)} in the state, and no tensor")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise InvalidValueError(subject, f"is {tensor.layout} on {tensor.device} in the state; must be dense")
    found, expected = list(tensor.shape), list(tracked.shapes[name])
    if found != expected:
        raise ModelMismatchError(subject, f"has the shape {found} in the state, {expected} in the model")
    if tensor.dtype != dtype:
        own = torch_dtype(tracked.tensors[name].dtype)
        raise ModelMismatchError(subject, f"is {tensor.dtype} in the state, not {dtype}; the model's is {own}")
    if tracked.tensors[name].role == "average" and nonfinite_name({name: tensor}) is not None:
        raise NonFiniteError(subject, "the state's average of it holds nan or infinity")
    return tensor.detach()


def check_profiles(held: Sequence[float], wanted: Sequence[float]) -> None:
    """Raise an InvalidValueError unless every profile to go on with is there."""
    for sigma_rel in wanted:
        if sigma_rel not in held:
            raise InvalidValueError(
                "sigma_rels",
                f"{sigma_rel:g} is none of the tracked ones, {_listed(held)}: an average cannot begin in mid-run",
                "leave it out, and synthesize it from the others",
            )


def _listed(sigma_rels: Iterable[float]) -> str:
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


def _log_changes(held: Sequence[float], schedule: Mapping[str, Any], settings: Settings) -> None:
    for sigma_rel in held:
        if sigma_rel not in settings.sigma_rels:
            log.info("sigma_rel %g is not tracked from here on; its snapshots stay in use", sigma_rel)
    for key in ("update_every", "checkpoint_every", "update_after_step"):
        before, now = schedule.get(key), getattr(settings.schedule, key)
        if before != now:
            log.info("%s is %s from here on; it was %s", key, now, shown(before))


# --- a file ---


def write_state(path: Path, state: TrackerState, settings: Settings) -> None:
    """Write a state to a file. See `PostHocEMA.save_state`."""
    _check_replaceable(path)
    tensors = dict(_named_tensors(state.tracking.averages))
    specs = [fmt.TensorSpec(name, stored_name(one.dtype, name), tuple(one.shape)) for name, one in tensors.items()]
    with TensorFileWriter(path, specs, state_metadata(_state_info(state, settings)), overwrite=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor_bytes(tensor))
        writer.commit()


@contextmanager
def open_state(path: Path) -> Iterator[dict[str, Any]]:
    """A state as `pack_state` gives it, except that each tensor is read when it is used.

    Raises:
        FileFormatError: the file cannot be opened, is no state, or is damaged; of a tensor also when it is read.
    """
    with TensorFile(path) as file:
        info = decode_state(path, file.header)
        totals = {repr(sigma_rel): _StoredTensors(file, total_prefix(sigma_rel)) for sigma_rel in info.sigma_rels}
        recent = {repr(sigma_rel): _StoredTensors(file, recent_prefix(sigma_rel)) for sigma_rel in info.sigma_rels}
        try:
            yield _plain(info) | {"totals": totals, "recent": recent, "copies": _StoredTensors(file, COPY)}
        except (InvalidValueError, ModelMismatchError, NonFiniteError) as error:
            raise type(error)(path, str(error)) from error


class _StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of one kind in a file, by the model's names; each is read and verified when it is used."""

    def __init__(self, file: TensorFile, prefix: str) -> None:
        self._file = file
        self._names = tensors_with(prefix, file.header)

    def __getitem__(self, name: str) -> torch.Tensor:
        entry = self._file.header.tensors[self._names[name]]
        return tensor_from_bytes(self._file.read(self._names[name]), entry.dtype, entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _named_tensors(averages: RunningAverages) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors under their names in the file; none before the first update."""
    kept = averages.accumulators
    if kept is None:
        return
    for sigma_rel, total, recent in zip(averages.sigma_rels, kept.totals, kept.recent, strict=True):
        for prefix, tensors in ((total_prefix(sigma_rel), total), (recent_prefix(sigma_rel), recent)):
            for name, value in tensors.views.items():
                yield tensor_name(prefix, name), value
    for name, value in averages.copies.items():
        yield tensor_name(COPY, name), value


def _check_replaceable(path: Path) -> None:
    """Raise an OutputExistsError where the path holds anything but a state."""
    if not os.path.lexists(path) or path.is_dir():
        return  # the writer's error tells about a directory
    try:
        kind = file_kind(read_header(path))
    except FileFormatError as error:
        raise OutputExistsError(
            path, "is there already, and cannot be read as a state", "choose another name"
        ) from error
    if kind != "state":
        raise OutputExistsError(path, "is there already, and is no tracker's state", "choose another name")


# --- a directory ---


@dataclass(frozen=True)
class _Start:
    """Where a run goes on: snapshots of one time by sigma_rel, and the exact state of that time if there is one."""

    snapshots: Mapping[float, Snapshot]
    kept: StateInfo | None


def resumed_tracking(directory: Path, snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> Tracking:
    """What a directory says of the newest time with a snapshot of every profile, averages not loaded yet.

    Where there is no such time, of the newest snapshot, which can be read.
    """
    start = _find_start(directory, snapshots, sigma_rels)
    last = snapshots[-1] if start is None else next(iter(start.snapshots.values()))
    clock = ClockRecorder.of_knots(last.info.clock_pairs)
    if start is not None and start.kept is not None:
        clock = clock_at(list(start.kept.clock), start.kept.step, start.kept.t)
    tracked, averages = TrackedModel.of_snapshot(last), RunningAverages.none_yet(sigma_rels)
    return Tracking(last.info.run_id, Progress.resumed(clock), tracked, averages, resumes=True)


def load_from_directory(
    directory: Path, settings: Settings, tracked: TrackedModel, step: int | None = None
) -> TrackerState:
    """The exact state, or else the averages of the newest snapshots up to a call.

    Raises:
        DirectoryError: at no time are all profiles there.
        InvalidValueError: not at that call.
    """
    sigma_rels = settings.sigma_rels
    snapshots = snapshots_until(read_directory(directory), sigma_rels, step)
    start = _find_start(directory, snapshots, sigma_rels)
    if start is None:
        there = sorted({snapshot.info.sigma_rel for snapshot in snapshots[-len(sigma_rels) :]})
        raise DirectoryError(
            directory,
            f"has no time with a snapshot of every profile ({_listed(sigma_rels)}) to go on from",
            f"go on without some (the newest are of {_listed(there)}) with from_path(..., sigma_rels=...), or begin a "
            "new run in another directory",
        )
    if start.kept is not None:
        try:
            with open_state(directory / STATE_NAME) as state:
                return unpack_state(state, settings, tracked)
        except FileFormatError as error:
            _warn_of_damage(error)
    return _rounded_state([start.snapshots[sigma_rel] for sigma_rel in sigma_rels], snapshots, tracked)


def snapshots_until(snapshots: Sequence[Snapshot], sigma_rels: Sequence[float], step: int | None) -> Sequence[Snapshot]:
    """The snapshots up to a call, which must have one of every profile; all of them for None.

    Raises:
        InvalidValueError: it has not; names the calls that have.
    """
    if step is None:
        return snapshots
    step = check_count("step", step, 1)
    there = sorted({found[sigma_rels[0]].info.step for found in _complete(snapshots, sigma_rels).values()})
    if step not in there:
        known = ", ".join(f"{one:,}" for one in there[-_MOST_NAMED:]) or "none"
        more = "..., " * (len(there) > _MOST_NAMED)
        raise InvalidValueError(
            "step",
            f"there are no snapshots of every profile ({_listed(sigma_rels)}) of this call of update_; "
            f"of these there are: {more}{known}",
            value=f"{step:,}",
        )
    return [snapshot for snapshot in snapshots if snapshot.info.step <= step]


def resumed_profiles(
    snapshots: Sequence[Snapshot], chosen: Sequence[float] | types.EllipsisType = ...
) -> tuple[float, ...]:
    """The profiles to go on with: the run's own, or the `chosen` ones, which must have snapshots.

    Raises:
        InvalidValueError: a chosen one has none.
    """
    tracked = snapshots[-1].info.sigma_rels
    if chosen is ...:
        return tracked
    there = {snapshot.info.sigma_rel for snapshot in snapshots}
    wanted = check_sigma_rels(chosen)
    check_profiles([sigma_rel for sigma_rel in tracked if sigma_rel in there], wanted)
    return wanted


def keeps_state(directory: Path, run_id: str) -> bool:
    """Whether a state of this run lies beside its snapshots."""
    found = _read_state_info(directory)
    return found is not None and found.run_id == run_id


def _find_start(directory: Path, snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> _Start | None:
    """The newest time that has a snapshot of every profile; None where no time has."""
    complete = _complete(snapshots, sigma_rels)
    if not complete:
        return None
    newest, found = complete[max(complete)], _read_state_info(directory)
    if found is None:
        return _Start(newest, None)
    # The state is used only where its averages are those that the snapshots hold, rounded.
    stored = [StoredSnapshot.of(snapshot) for snapshot in newest.values()]
    same = all(one.checksum in found.snapshots and one.t == found.averages_t for one in stored)
    if same and set(found.sigma_rels) >= set(newest):
        return _Start(newest, found)
    log.info("%s is not of the snapshots of t = %g, which are used instead", directory / STATE_NAME, stored[0].t)
    return _Start(newest, None)


def _complete(snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> dict[float, dict[float, Snapshot]]:
    """The times that have a snapshot of every profile: time -> sigma_rel -> snapshot."""
    by_time: dict[float, dict[float, Snapshot]] = {}
    for snapshot in snapshots:
        if snapshot.info.sigma_rel in sigma_rels:
            by_time.setdefault(snapshot.info.t, {})[snapshot.info.sigma_rel] = snapshot
    return {t: found for t, found in by_time.items() if len(found) == len(sigma_rels)}


def _read_state_info(directory: Path) -> StateInfo | None:
    path = directory / STATE_NAME
    try:
        header = read_header(path) if path.is_file() else None
        return None if header is None or file_kind(header) != "state" else decode_state(path, header)
    except FileFormatError as error:
        _warn_of_damage(error)
        return None


def _warn_of_damage(error: FileFormatError) -> None:
    log.warning("%s; the averages go on from the snapshots, rounded as they are", error)


@torch.inference_mode(False)
@torch.no_grad()
def _rounded_state(chosen: Sequence[Snapshot], snapshots: Iterable[Snapshot], tracked: TrackedModel) -> TrackerState:
    """The averages as the `chosen` snapshots, one a profile, hold them; of `snapshots` those up to then are behind."""
    last = chosen[0].info
    kept = Accumulators.zeros(_host_layout(TrackedModel.of_snapshot(chosen[0])), len(chosen))
    standing = Standing(
        t=last.t,
        step=last.step,
        t_first=last.t_first,
        max_interval=last.max_interval,
        updates=last.updates,
        masses=(0.0,) * len(chosen),
        inherited=tuple(_read_total(snapshot, total) for snapshot, total in zip(chosen, kept.totals, strict=True)),
    )
    averages = RunningAverages(
        tuple(snapshot.info.sigma_rel for snapshot in chosen), standing, kept, _read_copies(chosen[0])
    )
    behind = frozenset(StoredSnapshot.of(snapshot).checksum for snapshot in snapshots if snapshot.info.t <= last.t)
    progress = Progress.resumed(ClockRecorder.of_knots(last.clock_pairs))
    return TrackerState(Tracking(last.run_id, progress, replace(tracked, segment=last.segment), averages), behind)


def _read_total(snapshot: Snapshot, total: FlatTensors) -> float:
    """Fill a total with a snapshot; returns the expected squared norm of the error of that."""
    expected = 0.0
    with TensorFile(snapshot.path, snapshot.header) as file:
        for name, own in total.views.items():
            entry = snapshot.header.tensors[name]
            own.copy_(tensor_from_bytes(file.read(name), entry.dtype, entry.shape))
            if torch_dtype(entry.dtype).itemsize < own.dtype.itemsize:
                eps = torch.finfo(torch_dtype(entry.dtype)).eps
                expected += (ROUNDING * eps) ** 2 * float(torch.linalg.vector_norm(own)) ** 2
    info, measured = snapshot.info, snapshot.info.measurements
    before = [d for d in measured.distances if d.sigma_rel == info.sigma_rel] if measured is not None else []
    last = max(before, key=lambda d: d.t, default=None)
    moved, share = (math.inf, 1.0) if last is None else (last.squared, 1 - (last.t / info.t) ** (info.gamma + 1))
    rounding = expected if measured is None else measured.rounding
    found = error_after_rounding(info.inherited, rounding, expected, moved, share)
    return found if math.isfinite(found) else 0.0


def _read_copies(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    tensors = {}
    with TensorFile(snapshot.path, snapshot.header) as file:
        for name, tensor in snapshot.info.tensors.items():
            if tensor.role == "copy":
                entry = snapshot.header.tensors[name]
                tensors[name] = tensor_from_bytes(file.read(name), entry.dtype, entry.shape)
    return tensors
