"""What a tracker has, its settings and its state: in memory, as a dict, and as a file.

A dict and a file hold the averages exactly; snapshots hold them rounded to their storage dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from posthoc_cli.dtypes import parse_dtype, stored_name, torch_dtype
from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    check_count,
    check_word,
    shown,
    warn,
)
from posthoc_cli.planning import range_of
from posthoc_cli.profiles import ClockRecorder, check_sigma_rel
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import states
from posthoc_cli.snapshots.format import TrackingSchedule
from posthoc_cli.snapshots.reading import TensorReader
from posthoc_cli.snapshots.selection import Selection
from posthoc_cli.snapshots.states import StateInfo, high_prefix, low_prefix
from posthoc_cli.snapshots.tensor_file import TensorFileWriter, tensor_bytes, tensor_from_bytes
from posthoc_cli.tracker.layout import HOST, Layout, buckets_of
from posthoc_cli.tracker.model_tensors import TrackedModel, named_tensors, nonfinite_name
from posthoc_cli.tracker.running import AverageTensors, RunningAverages, Standing
from posthoc_cli.tracker.sharding import as_dtensor, held_box, reshard

STATE_NAME = "state.safetensors"  # the file beside the snapshots that a tracker keeps its exact state in
STATE_VERSION = int(fmt.STATE_VERSION)


@dataclass(frozen=True)
class Settings:
    """The settings of a tracker; the arguments of `PostHocEMA.from_model`."""

    sigma_rels: tuple[float, ...]
    schedule: TrackingSchedule
    t_unit: str = "steps"
    selection: Selection = field(default_factory=Selection)
    on_nonfinite: str = "raise"
    keep_state: bool = False

    @classmethod
    def checked(
        cls, sigma_rels: Sequence[float], update_every: int, checkpoint_every: int, update_after_step: int,
        max_checkpoints: int | None, checkpoint_dtype: torch.dtype | str | None, t_unit: str, selection: Selection,
        on_nonfinite: str, keep_state: bool,
    ) -> Settings:  # fmt: skip
        """The settings of these arguments; an InvalidValueError names one that cannot be. Profiles are ascending."""
        given = () if isinstance(sigma_rels, str) or not isinstance(sigma_rels, Iterable) else sigma_rels
        profiles = sorted(check_sigma_rel(sigma_rel) for sigma_rel in given)
        if not profiles or len(set(profiles)) < len(profiles):
            reason = "must be a sequence of different numbers, such as (0.05, 0.28)"
            raise InvalidValueError("sigma_rels", reason, value=f"{sigma_rels!r}")
        every = check_count("update_every", update_every)
        snapshots = check_count("checkpoint_every", checkpoint_every)
        after = check_count("update_after_step", update_after_step, 0)
        most = None if max_checkpoints is None else check_count("max_checkpoints", max_checkpoints)
        if snapshots % every:
            reason = f"must be a multiple of update_every {every}, so that a snapshot holds the average of its own time"
            raise InvalidValueError("checkpoint_every", reason, value=snapshots)
        dtype = parse_dtype(checkpoint_dtype, "checkpoint_dtype")
        if not isinstance(t_unit, str) or not t_unit or not t_unit.isprintable():
            reason = "must name what t counts, such as 'steps' or 'images'"
            raise InvalidValueError("t_unit", reason, value=f"{t_unit!r}")
        check_word("on_nonfinite", on_nonfinite, ("raise", "skip"))
        schedule = TrackingSchedule(every, snapshots, after, most, dtype, range_of(profiles))
        return cls(tuple(profiles), schedule, t_unit, selection, on_nonfinite, keep_state)

    def tracked_index(self, tracked: float) -> int:
        """Which of the tracked profiles a sigma_rel is; an InvalidValueError names them if it is none."""
        for index, own in enumerate(self.sigma_rels):
            if isinstance(tracked, Real) and math.isclose(tracked, own, rel_tol=1e-6):  # also 0.05 of float32
                return index
        reason = f"must be one of the tracked profiles, {', '.join(f'{s:g}' for s in self.sigma_rels)}"
        hint = "for any other use model(model, sigma_rel=...)"
        raise InvalidValueError("tracked", reason, hint, value=f"{tracked!r}")

    def update_is_due(self, step: int) -> bool:
        """Whether averages take in the model at this call."""
        return step > self.schedule.update_after_step and step % self.schedule.update_every == 0

    def snapshot_is_due(self, step: int) -> bool:
        """Whether snapshots are written at this call, if averages exist."""
        return step % self.schedule.checkpoint_every == 0

    def skip_update(self, error: NonFiniteError) -> None:
        """Leave out an update as `on_nonfinite` says: raise the error, or warn."""
        if self.on_nonfinite == "raise":
            raise error
        warn(f"update skipped: {error}")

    def first_update(self, step: int) -> str:
        """When the first average comes, in words, after so many calls."""
        every, after = self.schedule.update_every, self.schedule.update_after_step
        return f"the first update is at call {(max(after, step) // every + 1) * every:,} of update_"


@dataclass(frozen=True)
class Progress:
    """How far a training is: the clock of all calls, and the last one at which an update was due.

    `own_clock` says whether the calls pass a time; None while unknown.
    """

    clock: ClockRecorder = field(default_factory=ClockRecorder)
    own_clock: bool | None = None
    updated: int = 0

    @classmethod
    def resumed(cls, clock: ClockRecorder, updated: int | None = None) -> Progress:
        """The progress of a resumed run; whether it passes `t` is unknown where time and step are equal."""
        return cls(clock, True if clock.t != clock.step else None, clock.step if updated is None else updated)

    @property
    def step(self) -> int:
        """The last call; 0 before the first."""
        return self.clock.step

    @property
    def t(self) -> float:
        """Its time."""
        return self.clock.t

    def after(self, t: float | None, settings: Settings) -> Progress:
        """The progress after one more call, with the caller's `t`, which is checked against the last one."""
        unit, step = settings.t_unit, self.step + 1
        if self.own_clock is not None and self.own_clock != (t is not None):
            habit = "passed t" if self.own_clock else "did not pass t"
            reason = f"earlier calls of update_ in this run {habit}"
            raise InvalidValueError("t", reason, "pass it at every call or at none")
        if t is None and unit != "steps":
            raise InvalidValueError("t", f"this run counts {unit}", "pass t= at every call of update_")
        time = float(step) if t is None else _number(t)
        if not fmt.EARLIEST <= time <= fmt.LATEST or time <= self.t:
            within = f"must lie between {fmt.EARLIEST:g} and {fmt.LATEST:g}"
            reason = f"{within}, and be larger than at the last call, {self.t:,.12g} {unit}"
            raise InvalidValueError("t", reason, value=f"{time:.12g}")
        updated = step if settings.update_is_due(step) else self.updated
        return Progress(self.clock.add(step, time), t is not None, updated)


def _number(t: float) -> float:
    """`t` as a float; nan if it is no number."""
    try:
        return math.nan if isinstance(t, str) else float(t)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


@dataclass(frozen=True)
class Tracking:
    """All that a tracker has; replaced in one assignment, so that its fields always belong together.

    Attributes:
        resumes: whether the averages are still to be loaded from the directory.
        snapshots: of a state to continue from: header checksums of the snapshots until then.
    """

    run_id: str
    progress: Progress
    tracked: TrackedModel
    averages: RunningAverages
    resumes: bool = False
    snapshots: frozenset[str] = frozenset()

    @classmethod
    def new(cls, run_id: str, tracked: TrackedModel, sigma_rels: Sequence[float], resumes: bool = False) -> Tracking:
        """What a tracker has before its first call."""
        return cls(run_id, Progress(), tracked, RunningAverages.none_yet(sigma_rels), resumes)


# --- a dict ---


@torch.inference_mode(False)
@torch.no_grad()
def pack_state(state: Tracking, info: StateInfo, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """The state as a dict of tensors, numbers, strings and lists; `torch.load(weights_only=True)` reads it.

    Averages have their sigma_rel as key, so that a tracker of fewer profiles finds its own. Before the first update
    the tensors are zeros (`averages_t` = 0 says so): loaders that fill the tensors of a fresh object's state, such as
    torch.distributed.checkpoint, find them in their places. With a sharded `model` what this process owns are DTensors.
    """
    averages, tracked = state.averages, state.tracked
    kept, copies = averages.tensors, averages.copies
    if kept is None or not averages.exist:
        kept = AverageTensors(host_layout(tracked), len(averages.sigma_rels))
        dtypes = tracked.dtypes(copied=True)
        copies = {name: torch.zeros(tracked.shapes[name], dtype=dtype) for name, dtype in dtypes.items()}
    keys = [repr(sigma_rel) for sigma_rel in averages.sigma_rels]
    spread = {}
    if model is not None:
        reshard(model)
        spread = {found.name: found.tensor for found in named_tensors(model)}

    def packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: as_dtensor(value, spread[name]) if spread else value for name, value in tensors.items()}

    return _plain(info) | {
        "mean": packed(kept.mean.views),
        "high": {key: packed(own.views) for key, own in zip(keys, kept.high, strict=True)},
        "low": {key: packed(own.views) for key, own in zip(keys, kept.bits, strict=True)},
        "copies": packed({name: value.clone() for name, value in copies.items()}),
    }


@torch.inference_mode(False)
@torch.no_grad()
def unpack_state(state: Mapping[str, Any], settings: Settings, tracked: TrackedModel) -> Tracking:
    """Check a state against the tracker that is to continue from it, one tensor after the other.

    Profiles that only the state has are dropped; one that only the tracker has cannot begin in mid-run. Of complete
    tensors, a process of several takes what it owns.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if version != STATE_VERSION:
        reason = f"must be what state_dict() of the process that keeps averages gives, of version {STATE_VERSION}"
        raise InvalidValueError("state", f"{reason}, not {shown(version)}")
    info = states.state_from(state, settings.schedule)
    if info.t_unit != settings.t_unit:
        raise InvalidValueError("state", f"counts time in {shown(info.t_unit)}, this tracker in {settings.t_unit!r}")
    wanted = settings.sigma_rels
    averages = RunningAverages.none_yet(wanted)
    if info.averages_t > 0 and tracked.tensors:
        check_profiles(info.sigma_rels, wanted)
        inherited = tuple(error if tracked.leads else 0.0 for error in info.inherited)
        standing = Standing(
            info.averages_t, info.averages_step, info.t_first, info.max_interval, info.updates, info.window,
            info.folded_t, info.folds, inherited,
        )  # fmt: skip
        kept = AverageTensors(host_layout(tracked), len(info.sigma_rels))
        sets = [(state["mean"], kept.mean)]
        # Early in a run the means of the shortest profile and the longest are in what those two have.
        ends = {info.sigma_rels[0], info.sigma_rels[-1]}
        needed = ends if standing.early and not (len(wanted) == 1 and ends.issuperset(wanted)) else set[float]()
        if absent := sorted(one for one in needed if repr(one) not in state["low"]):
            reason = f"lacks profile {absent[0]:g}, which those in between need early in a run"
            raise InvalidValueError("state", reason, f"track {absent[0]:g} too, or load the complete state")
        for sigma_rel, high, low in zip(info.sigma_rels, kept.high, kept.bits, strict=True):
            key = repr(sigma_rel)
            if sigma_rel in wanted:
                sets.append((state["high"][key], high))
            if sigma_rel in needed.union(wanted):
                sets.append((state["low"][key], low))
        for stored, room in sets:
            _check_names(stored, room.views, tracked)
            for name, own in room.views.items():  # each is checked before the next is read: they may be on disk
                own.copy_(_own_part(name, stored, tracked, own.dtype))
        if standing.early:
            kept.unpack_()
        dtypes = tracked.dtypes(copied=True)
        _check_names(state["copies"], dtypes, tracked)
        copies = {name: _own_part(name, state["copies"], tracked, dtype).clone() for name, dtype in dtypes.items()}
        path = fmt.path_of_part(info.sketch, tracked.part)
        averages = RunningAverages(info.sigma_rels, standing, kept, copies, known_path=path)
        if info.sigma_rels != wanted:
            averages = averages.of(wanted)
    progress = Progress.resumed(states.clock_at(list(info.clock), info.step, info.t), info.averages_step)
    return Tracking(info.run_id, progress, tracked, averages, snapshots=frozenset(info.snapshots))


def state_info(state: Tracking, settings: Settings) -> StateInfo:
    """All of a state but tensors."""
    progress, averages, standing = state.progress, state.averages, state.averages.standing
    return StateInfo(
        run_id=state.run_id, step=progress.step, t=progress.t, t_unit=settings.t_unit,
        sigma_rels=averages.sigma_rels, averages_t=standing.t, averages_step=standing.step,
        t_first=standing.t_first, max_interval=standing.max_interval, updates=standing.updates,
        window=standing.window, folded_t=standing.folded_t, folds=standing.folds, inherited=standing.inherited,
        schedule=settings.schedule, clock=tuple(progress.clock.state()),
        sketch=sketch_of(averages),
        snapshots=tuple(sorted(state.snapshots)),
    )  # fmt: skip


def sketch_of(averages: RunningAverages) -> str:
    """The path of what is averaged here, as a state has it."""
    return "" if averages.known_path is None else fmt.encode_path(averages.known_path, exact=True)


def _plain(info: StateInfo) -> dict[str, Any]:
    """The same as numbers, strings, lists and dicts."""
    schedule = vars(info.schedule) | {"sigma_range": list(info.schedule.sigma_range)}
    lists = {key: list(value) for key, value in vars(info).items() if isinstance(value, tuple)}
    return {"version": STATE_VERSION, **vars(info), **lists, "schedule": schedule}


def host_layout(tracked: TrackedModel) -> Layout:
    """The layout of the averages of a model in the host's memory."""
    averaged = tracked.dtypes(copied=False)
    return buckets_of({name: (HOST, dtype, tracked.shapes[name]) for name, dtype in averaged.items()})


def _check_names(tensors: Mapping[str, Any], expected: Mapping[str, object], tracked: TrackedModel) -> None:
    if differing := (set(expected) - set(tensors)) | (set(tensors) - set(expected) - tracked.members.names):
        reason = "is in the state or in the model, but not in both"
        hint = "make the tracker with the include, exclude and buffers of the one that the state is of"
        raise ModelMismatchError(f"tensor {min(differing)!r}", reason, hint)


def _own_part(name: str, tensors: Mapping[str, Any], tracked: TrackedModel, dtype: torch.dtype) -> torch.Tensor:
    """What this process owns of a tensor, checked."""
    subject, own, found = f"tensor {name!r}", tracked.tensors[name], tensors[name]
    shape = tuple(found.shape)
    if shape != (expected := tracked.complete_shape(name)):
        raise ModelMismatchError(subject, f"has the shape {list(shape)} in the state, {list(expected)} in the model")
    (local, held), wanted = held_box(name, found), tracked.box(name)
    if held.meet(wanted) != wanted:
        reason = "is spread over the processes in another way in the state than in the model"
        raise ModelMismatchError(subject, reason, "let torch.distributed.checkpoint load it, which reshards it")
    starts = [begin - first for begin, first in zip(wanted.offset, held.offset, strict=True)]
    tensor = local[tuple(slice(at, at + size) for at, size in zip(starts, wanted.shape, strict=True))]
    if tensor.dtype != dtype:
        model = torch_dtype(own.dtype)
        raise ModelMismatchError(subject, f"is {tensor.dtype} in the state, not {dtype}; the model's is {model}")
    if own.role != "copy" and nonfinite_name({name: tensor}) is not None:
        raise NonFiniteError(subject, "the state's average of it holds nan or infinity")
    return tensor


def check_profiles(held: Sequence[float], wanted: Sequence[float]) -> None:
    """Raise an InvalidValueError unless every profile to go on with is there."""
    for sigma_rel in wanted:
        if sigma_rel not in held:
            reason = f"{sigma_rel:g} is none of the tracked ones, {listed(held)}: an average cannot begin in mid-run"
            raise InvalidValueError("sigma_rels", reason, "leave it out, and synthesize it from the others")


def listed(sigma_rels: Sequence[float]) -> str:
    """Profiles in words."""
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


# --- a file ---


def write_state(path: Path, state: Tracking, info: StateInfo) -> None:
    """Write a state to a file, in place of an older one: complete or not at all, durable, checksummed."""
    averages, kept = state.averages, state.averages.tensors
    sets: dict[str, Mapping[str, torch.Tensor]] = {}
    if kept is not None:  # else before the first update
        sets[states.MEAN] = kept.mean.views
        for sigma_rel, high, low in zip(averages.sigma_rels, kept.high, kept.bits, strict=True):
            sets |= {high_prefix(sigma_rel): high.views, low_prefix(sigma_rel): low.views}
    sets[states.COPY] = averages.copies
    tensors = {states.tensor_name(prefix, name): one for prefix, own in sets.items() for name, one in own.items()}
    specs = [fmt.TensorSpec(name, stored_name(one.dtype, name), tuple(one.shape)) for name, one in tensors.items()]
    with TensorFileWriter(path, specs, states.state_metadata(info), overwrite=True) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor_bytes(tensor))
        writer.commit()


@contextmanager
def open_state(path: Path) -> Iterator[dict[str, Any]]:
    """A state as `pack_state` gives it, except that each tensor is read when it is used."""
    stored = states.read_state(path)
    info, header = stored.info, stored.header
    prefixes = [states.MEAN, *map(high_prefix, info.sigma_rels), *map(low_prefix, info.sigma_rels), states.COPY]
    names = {prefix: states.tensors_with(prefix, header) for prefix in prefixes}
    with stored.open() as file:
        if (masses := states.older_masses(header)) is not None:
            yield _plain(info) | _converted(file, info, masses)
            return
        found = {prefix: _StoredTensors(file, own) for prefix, own in names.items()}
        high = {repr(sigma_rel): found[high_prefix(sigma_rel)] for sigma_rel in info.sigma_rels}
        low = {repr(sigma_rel): found[low_prefix(sigma_rel)] for sigma_rel in info.sigma_rels}
        yield _plain(info) | {"mean": found[states.MEAN], "high": high, "low": low, "copies": found[states.COPY]}


class _StoredTensors(Mapping[str, torch.Tensor]):
    """Tensors of one kind in a state, by the model's names; each is read and verified when it is used."""

    def __init__(self, file: TensorReader, names: Mapping[str, str]) -> None:
        self._file, self._names = file, names

    def __getitem__(self, name: str) -> torch.Tensor:
        return read_tensor(self._file, self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _converted(file: TensorReader, info: StateInfo, masses: Sequence[float]) -> dict[str, Any]:
    """The tensors of a state of release 0.2, see `states.older_masses`, as one keeps them now, with an empty mean."""
    parts: dict[str, Any] = {"high": {}, "low": {}}
    for sigma_rel, mass in zip(info.sigma_rels, masses, strict=True):
        for kind in ("high", "low"):
            parts[kind][repr(sigma_rel)] = _OlderTensors(file, high_prefix(sigma_rel), mass, kind == "low")
    copies = _StoredTensors(file, states.tensors_with(states.COPY, file.header))
    return parts | {"mean": parts["high"][repr(info.sigma_rels[0])], "copies": copies}


class _OlderTensors(_StoredTensors):
    """The averages of a profile, rounded to the dtype of their means, or what the rounding takes away."""

    def __init__(self, file: TensorReader, prefix: str, mass: float, is_low: bool) -> None:
        names, self._means = (states.tensors_with(one, file.header) for one in (prefix, f"recent-{prefix}"))
        wide = [name for name in names if file.header.tensors[self._means[name]].dtype == "F64"] if is_low else ()
        super().__init__(file, {name: full for name, full in names.items() if name not in wide})
        self._mass, self._is_low = mass, is_low

    def __getitem__(self, name: str) -> torch.Tensor:
        total, mean = super().__getitem__(name), read_tensor(self._file, self._means[name])
        exact = total + self._mass * (mean - total)
        high = exact.to(mean.dtype)
        return (exact - high).to(torch.bfloat16).view(torch.int16) if self._is_low else high


def read_tensor(file: TensorReader, name: str) -> torch.Tensor:
    """A tensor of a file, verified."""
    entry = file.header.tensors[name]
    return tensor_from_bytes(file.read(name), entry.dtype, entry.shape)
