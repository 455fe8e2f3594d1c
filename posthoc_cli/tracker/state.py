"""The settings and the state of a tracker: in memory, and as a dict, which holds the averages exactly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import torch

from posthoc_cli.dtypes import parse_dtype, torch_dtype
from posthoc_cli.errors import (
    InvalidValueError,
    ModelMismatchError,
    NonFiniteError,
    check_count,
    check_word,
    shown,
    warn,
)
from posthoc_cli.planning import listed, range_of
from posthoc_cli.profiles import ClockRecorder, check_sigma_rel
from posthoc_cli.snapshots.path import path_of_part
from posthoc_cli.snapshots.snapshot import (
    ANY_SIGN,
    EARLIEST,
    LATEST,
    RunId,
    Selection,
    SketchText,
    TrackingSchedule,
    converted,
)
from posthoc_cli.tracker.averages import Averages, AverageTensors, Standing
from posthoc_cli.tracker.memory import HOST, Layout, buckets_of
from posthoc_cli.tracker.model import TrackedModel, named_tensors, nonfinite_name
from posthoc_cli.tracker.processes import as_dtensor, held_box, reshard

STATE_VERSION = 6

DEFAULT_UPDATE_EVERY = 10


@dataclass(frozen=True)
class Settings:
    """The settings of a tracker; the arguments of `PostHocEMA.from_model`."""

    sigma_rels: tuple[float, ...]
    schedule: TrackingSchedule
    t_unit: str = "steps"
    selection: Selection = field(default_factory=Selection)
    on_nonfinite: str = "raise"

    @classmethod
    def checked(
        cls, sigma_rels: Sequence[float], update_every: int, checkpoint_every: int, update_after_step: int,
        max_checkpoints: int | None, checkpoint_dtype: torch.dtype | str | None, t_unit: str, selection: Selection,
        on_nonfinite: str,
    ) -> Settings:  # fmt: skip
        """Return the settings, with profiles in ascending order; an InvalidValueError names an unfit argument."""
        numbers = sigma_rels if isinstance(sigma_rels, Iterable) and not isinstance(sigma_rels, str) else ()
        profiles = sorted(map(check_sigma_rel, numbers))
        if not profiles or len(set(profiles)) < len(profiles):
            reason = "must be a sequence of different numbers, such as (0.05, 0.28)"
            raise InvalidValueError("sigma_rels", reason, value=f"{sigma_rels!r}")
        every, snapshot_every = (
            check_count("update_every", update_every),
            check_count("checkpoint_every", checkpoint_every),
        )
        after = check_count("update_after_step", update_after_step, 0)
        most = None if max_checkpoints is None else check_count("max_checkpoints", max_checkpoints)
        if snapshot_every % every and every == DEFAULT_UPDATE_EVERY:
            every = math.gcd(every, snapshot_every)
            warn(f"update_every is {every}, so that checkpoint_every {snapshot_every} is a multiple of it")
        if snapshot_every % every:
            reason = f"must be a multiple of update_every {every}, so that a snapshot holds the average of its own time"
            raise InvalidValueError("checkpoint_every", reason, value=snapshot_every)
        dtype = parse_dtype(checkpoint_dtype, "checkpoint_dtype")
        if not isinstance(t_unit, str) or not t_unit or not t_unit.isprintable():
            reason = "must name what t counts, such as 'steps' or 'images'"
            raise InvalidValueError("t_unit", reason, value=f"{t_unit!r}")
        check_word("on_nonfinite", on_nonfinite, ("raise", "skip"))
        schedule = TrackingSchedule(every, snapshot_every, after, most, dtype, range_of(profiles))
        return cls(tuple(profiles), schedule, t_unit, selection, on_nonfinite)

    def tracked_index(self, wanted: float) -> int | None:
        """Return the index of a tracked profile, also of its float32 value; None for any other."""
        equal = (i for i, tracked in enumerate(self.sigma_rels) if math.isclose(wanted, tracked, rel_tol=1e-6))
        return next(equal, None)

    def update_is_due(self, step: int) -> bool:
        """Return whether the averages are updated at this call."""
        return step > self.schedule.update_after_step and step % self.schedule.update_every == 0

    def snapshot_is_due(self, step: int) -> bool:
        """Return whether snapshots are written at this call, if averages exist."""
        return step % self.schedule.checkpoint_every == 0

    def skip_update(self, error: NonFiniteError) -> None:
        """Raise the error, or warn that the update is skipped, as `on_nonfinite` says."""
        if self.on_nonfinite == "raise":
            raise error
        warn(f"update skipped: {error}")

    def first_update(self, step: int) -> str:
        """Return a sentence that says at which call, after `step` calls so far, the first update is due."""
        every, after = self.schedule.update_every, self.schedule.update_after_step
        return f"the first update is at call {(max(after, step) // every + 1) * every:,} of update_"


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of a training: the clock of all calls, and `updated`, the last call at which an update was due.

    `own_clock` says whether the calls pass `t`; None while unknown.
    """

    clock: ClockRecorder = field(default_factory=ClockRecorder)
    own_clock: bool | None = None
    updated: int = 0

    @classmethod
    def resumed(cls, clock: ClockRecorder, updated: int | None = None) -> TrainingProgress:
        """Return the progress of a resumed run; whether its calls pass `t` is unknown where time and step are equal."""
        return cls(clock, True if clock.t != clock.step else None, clock.step if updated is None else updated)

    @property
    def step(self) -> int:
        """The number of the last call; 0 before the first."""
        return self.clock.step

    @property
    def t(self) -> float:
        """The time of the last call."""
        return self.clock.t

    def after(self, t: float | None, settings: Settings) -> TrainingProgress:
        """Return the progress after one more call, with the caller's `t`, which must be later than the last one."""
        unit, step, reason, hint, value = settings.t_unit, self.step + 1, "", "", ""
        try:
            time = math.nan if isinstance(t, str) else float(step if t is None else t)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            time = math.nan
        if self.own_clock not in (None, t is not None):
            reason = f"earlier calls of update_ in this run {'passed' if self.own_clock else 'did not pass'} t"
            hint = "pass it at every call or at none"
        elif t is None and unit != "steps":
            reason, hint = f"this run counts {unit}", "pass t= at every call of update_"
        elif not EARLIEST <= time <= LATEST or time <= self.t:
            reason = f"must lie between {EARLIEST:g} and {LATEST:g}, and be larger than at the last call"
            reason, value = f"{reason}, {self.t:,.12g} {unit}", f"{time:.12g}"
        if reason:
            raise InvalidValueError("t", reason, hint, value=value)
        updated = step if settings.update_is_due(step) else self.updated
        return TrainingProgress(self.clock.add(step, time), t is not None, updated)


@dataclass(frozen=True)
class Tracking:
    """The complete state of a tracker; replaced in one assignment, so that its fields are always consistent.

    `resumes` says whether the averages are still to be loaded from the directory; in a state to continue from,
    `snapshots` are the header checksums of the snapshots written until its time.
    """

    run_id: str
    progress: TrainingProgress
    tracked: TrackedModel
    averages: Averages
    resumes: bool = False
    snapshots: frozenset[str] = frozenset()

    @classmethod
    def new(cls, run_id: str, tracked: TrackedModel, sigma_rels: Sequence[float], resumes: bool = False) -> Tracking:
        """Return the state of a tracker before its first call."""
        return cls(run_id, TrainingProgress(), tracked, Averages.none_yet(sigma_rels), resumes)


# --- a dict ---


@dataclass(frozen=True)
class StateInfo:
    """A tracker's state without its tensors.

    `clock` is from `ClockRecorder.state`, and ends at the last call; `snapshots` are the header checksums of the
    snapshots on disk; `weights` are the network's at the last call, at the elements of a snapshot's sample, empty if
    unknown.
    """

    run_id: RunId
    t_unit: str
    sigma_rels: tuple[float, ...]
    standing: Standing
    clock: Any  # `ClockRecorder.of_state` checks it
    sketch: SketchText
    snapshots: tuple[str, ...]
    weights: tuple[Annotated[float, ANY_SIGN], ...]


@torch.inference_mode(False)
@torch.no_grad()
def pack_state(state: Tracking, info: StateInfo, model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Return the state as a dict of tensors, numbers, strings and lists; `torch.load(weights_only=True)` reads it.

    Averages have their sigma_rel as key, so that a tracker of fewer profiles finds its own. Before the first update
    (`standing` has t = 0) the tensors are zeros, for loaders that fill the tensors of a fresh object's state, such as
    torch.distributed.checkpoint. With a sharded `model` the chunks that this process owns are DTensors.
    """
    averages, tracked = state.averages, state.tracked
    kept, copies = averages.tensors, averages.copies
    if kept is None or not averages.exist:
        kept = AverageTensors(host_layout(tracked), len(averages.sigma_rels))
        dtypes = tracked.dtypes(copied=True)
        copies = {name: torch.zeros(tracked.shapes[name], dtype=dtype) for name, dtype in dtypes.items()}
    keys, dtensors = [repr(sigma_rel) for sigma_rel in averages.sigma_rels], {}
    if model is not None:
        reshard(model)
        dtensors = {tensor.name: tensor.tensor for tensor in named_tensors(model)}

    def packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: as_dtensor(value, dtensors[name]) if dtensors else value for name, value in tensors.items()}

    first, is_shared = kept.mean[0].views, averages.standing.shared  # the first mean may serve all profiles
    means = [
        {name: first[name] if is_shared and view.dtype == torch.float32 else view for name, view in mean.views.items()}
        for mean in kept.mean
    ]
    return {
        "version": STATE_VERSION,
        **json.loads(json.dumps(asdict(info))),  # tuples become lists; numbers stay exact
        "mean": {key: packed(mean) for key, mean in zip(keys, means, strict=True)},
        "high": {key: packed(high.views) for key, high in zip(keys, kept.high, strict=True)},
        "copies": packed({name: value.clone() for name, value in copies.items()}),
    }


@torch.inference_mode(False)
@torch.no_grad()
def unpack_state(
    state: Mapping[str, Any], settings: Settings, tracked: TrackedModel
) -> tuple[Tracking, tuple[float, ...]]:
    """Check a state against the tracker that is to continue from it, and load it one tensor after the other.

    Return also the network's sampled weights. Profiles that only the state has are dropped; one that only the tracker
    has cannot begin in mid-run. In a group of processes each takes the chunks that it owns, also from complete tensors.
    """
    version = state.get("version") if isinstance(state, Mapping) else None
    if version != STATE_VERSION:
        reason = f"must come from state_dict() of a process that keeps averages, of version {STATE_VERSION}"
        raise InvalidValueError("state", f"{reason}, not {shown(version)}")
    try:
        info = converted(dict(state), StateInfo)
        clock = ClockRecorder.of_state(info.clock)
        if info.t_unit != settings.t_unit:
            raise ValueError(f"counts time in {shown(info.t_unit)}, this tracker in {settings.t_unit!r}")
        if len(info.standing.inherited) != len(info.sigma_rels):
            raise ValueError(f"inherited: must be one for each profile, not {len(info.standing.inherited)}")
    except ValueError as error:
        raise InvalidValueError("state", str(error)) from error
    standing, wanted = info.standing, settings.sigma_rels
    averages = Averages.none_yet(wanted)
    if standing.t > 0 and tracked.tensors:
        check_profiles(info.sigma_rels, wanted)
        inherited = dict(zip(info.sigma_rels, standing.inherited, strict=True))
        standing = replace(standing, inherited=tuple(inherited[one] * tracked.leads for one in wanted))
        kept = AverageTensors(host_layout(tracked), len(wanted))
        for kind, flats in (("high", kept.high), ("mean", kept.mean)):
            for one, flat in zip(wanted, flats, strict=True):
                stored = state[kind][repr(one)]
                _check_names(stored, flat.views, tracked)
                for name, view in flat.views.items():  # each is checked before the next is read: they may be on disk
                    view.copy_(_own_part(name, stored, tracked, view.dtype))
        dtypes = tracked.dtypes(copied=True)
        _check_names(state["copies"], dtypes, tracked)
        copies = {name: _own_part(name, state["copies"], tracked, dtype).clone() for name, dtype in dtypes.items()}
        path = path_of_part(info.sketch, tracked.members.part)
        averages = Averages(wanted, standing, kept, copies, known_path=path)
    progress = TrainingProgress.resumed(clock, standing.step)
    return Tracking(info.run_id, progress, tracked, averages, snapshots=frozenset(info.snapshots)), info.weights


def host_layout(tracked: TrackedModel) -> Layout:
    """Return the layout of the averages of a model in host memory."""
    averaged = tracked.dtypes(copied=False)
    return buckets_of({name: (HOST, dtype, tracked.shapes[name]) for name, dtype in averaged.items()})


def _check_names(tensors: Mapping[str, Any], expected: Mapping[str, object], tracked: TrackedModel) -> None:
    if differing := (set(expected) - set(tensors)) | (set(tensors) - set(expected) - tracked.members.names):
        reason = "is in the state or in the model, but not in both"
        hint = "make the tracker with the include, exclude and buffers of the tracker that made the state"
        raise ModelMismatchError(f"tensor {min(differing)!r}", reason, hint)


def _own_part(name: str, tensors: Mapping[str, Any], tracked: TrackedModel, dtype: torch.dtype) -> torch.Tensor:
    """Return the part of a tensor of a state that this process owns, after checking it."""
    subject, stored = f"tensor {name!r}", tensors[name]
    expected = f"{dtype} of shape {list(tracked.complete_shape(name))}"
    if (found := f"{stored.dtype} of shape {list(stored.shape)}") != expected:
        model = torch_dtype(tracked.tensors[name].dtype)
        raise ModelMismatchError(subject, f"is {found} in the state, not {expected}; the model's is {model}")
    (local, held), wanted = held_box(name, stored), tracked.box(name)
    if held.intersection(wanted) != wanted:
        reason = "is sharded over the processes in another way in the state than in the model"
        raise ModelMismatchError(subject, reason, "let torch.distributed.checkpoint load it, which reshards it")
    starts = [begin - first for begin, first in zip(wanted.offset, held.offset, strict=True)]
    tensor = local[tuple(slice(at, at + size) for at, size in zip(starts, wanted.shape, strict=True))]
    if tracked.tensors[name].role != "copy" and nonfinite_name({name: tensor}) is not None:
        raise NonFiniteError(subject, "the state's average of it holds nan or infinity")
    return tensor


def check_profiles(held: Sequence[float], wanted: Sequence[float]) -> None:
    """Raise an InvalidValueError unless the run holds every profile that is wanted."""
    for sigma_rel in wanted:
        if sigma_rel not in held:
            reason = f"{sigma_rel:g} is none of the tracked ones, {listed(held)}: an average cannot begin in mid-run"
            raise InvalidValueError("sigma_rels", reason, "leave it out, and synthesize it from the tracked ones")
