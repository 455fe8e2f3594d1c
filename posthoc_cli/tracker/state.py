"""The settings and the state of a tracker: new, from a dict, which holds the averages exactly, or
from snapshots.

A run continues from the snapshots of the newest time at which the network had the model's weights,
or of a given one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch

from posthoc_cli import files
from posthoc_cli.dtypes import parse_dtype, torch_dtype
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    MismatchError,
    ModelMismatchError,
    NonFiniteError,
    check_count,
    percent,
    shown,
    warn,
)
from posthoc_cli.planning import listed, range_of
from posthoc_cli.profiles import ClockRecorder, check_sigma_rel, new_value_share
from posthoc_cli.reconstruction import ROUNDING, error_after_rounding
from posthoc_cli.snapshots.directory import DirectoryLock, find_snapshots, read_directory
from posthoc_cli.snapshots.path import (
    Floats,
    are_equal,
    decode_sample,
    path_of_part,
    squared_distance,
)
from posthoc_cli.snapshots.snapshot import (
    ANY_SIGN,
    EARLIEST,
    LATEST,
    RunId,
    Selection,
    SketchText,
    Snapshot,
    TrackingSchedule,
    check_globs,
    converted,
    recorded_weights,
)
from posthoc_cli.synthesis.engine import synthesize
from posthoc_cli.synthesis.plan import plan_synthesis
from posthoc_cli.tracker.averages import Averages, AverageTensors, Standing
from posthoc_cli.tracker.memory import HOST, FlatTensors, Layout, buckets_of
from posthoc_cli.tracker.model import (
    ModelTensors,
    TrackedModel,
    collect_tensors,
    named_tensors,
    nonfinite_name,
)
from posthoc_cli.tracker.processes import (
    Group,
    Members,
    ShardOwners,
    as_dtensor,
    held_box,
    is_first_of_group,
    reshard,
)

log = logging.getLogger(__name__)

STATE_VERSION = 6

DEFAULT_UPDATE_EVERY = 10

# the largest predicted error of an average that is reconstructed to resume from
_MOST_MISSING = 0.01


@dataclass(frozen=True)
class Settings:
    """The settings of a tracker; the arguments of `PostHocEMA.from_model`."""

    sigma_rels: tuple[float, ...]
    schedule: TrackingSchedule
    t_unit: str = "steps"
    selection: Selection = field(default_factory=Selection)

    @classmethod
    def checked(
        cls,
        sigma_rels: Sequence[float],
        update_every: int,
        checkpoint_every: int,
        update_after_step: int,
        max_checkpoints: int | None,
        checkpoint_dtype: torch.dtype | str | None,
        t_unit: str,
        selection: Selection,
    ) -> Settings:
        """Return the settings, with profiles in ascending order; an InvalidValueError names an
        unfit argument."""
        numbers = (
            sigma_rels
            if isinstance(sigma_rels, Iterable) and not isinstance(sigma_rels, str)
            else ()
        )
        profiles = sorted(map(check_sigma_rel, numbers))
        every = check_count("update_every", update_every)
        snapshot_every = check_count("checkpoint_every", checkpoint_every)
        after = check_count("update_after_step", update_after_step, 0)
        most = None if max_checkpoints is None else check_count("max_checkpoints", max_checkpoints)
        dtype = parse_dtype(checkpoint_dtype, "checkpoint_dtype")
        if snapshot_every % every and every == DEFAULT_UPDATE_EVERY:
            every = math.gcd(every, snapshot_every)
            warn(
                f"update_every is {every}, so that checkpoint_every {snapshot_every} is a "
                f"multiple of it"
            )
        name, value, must = "", "", ""
        if not 0 < len(set(profiles)) == len(profiles):
            name, value, must = (
                "sigma_rels",
                f"{sigma_rels!r}",
                "be a sequence of different numbers, as (0.05, 0.28)",
            )
        elif snapshot_every % every:
            must = (
                f"be a multiple of update_every {every}, so that a snapshot holds the "
                f"average of its own time"
            )
            name, value = "checkpoint_every", f"{snapshot_every}"
        elif not isinstance(t_unit, str) or not t_unit or not t_unit.isprintable():
            name, value, must = (
                "t_unit",
                f"{t_unit!r}",
                "name what t counts, such as 'steps' or 'images'",
            )
        if name:
            raise InvalidValueError(name, f"must {must}", value=value)
        schedule = TrackingSchedule(every, snapshot_every, after, most, dtype, range_of(profiles))
        return cls(tuple(profiles), schedule, t_unit, selection)

    def update_is_due(self, step: int) -> bool:
        return step > self.schedule.update_after_step and step % self.schedule.update_every == 0

    def snapshot_is_due(self, step: int) -> bool:
        return step % self.schedule.checkpoint_every == 0

    def first_update(self, step: int) -> str:
        """Return a sentence that says at which call, after `step` calls so far, the first update is
        due."""
        every, after = self.schedule.update_every, self.schedule.update_after_step
        return f"the first update is at call {(max(after, step) // every + 1) * every:,} of update_"


@dataclass(frozen=True)
class TrainingProgress:
    """The progress of a training: the clock of all calls."""

    clock: ClockRecorder = field(default_factory=ClockRecorder)
    own_clock: bool | None = None  # whether the calls pass `t`; None while unknown
    updated: int = 0  # the last call at which an update was due

    @classmethod
    def resumed(cls, clock: ClockRecorder, updated: int | None = None) -> TrainingProgress:
        """Return the progress of a resumed run; whether its calls pass `t` is unknown where time
        and step are equal."""
        return cls(
            clock,
            True if clock.t != clock.step else None,
            clock.step if updated is None else updated,
        )

    @property
    def step(self) -> int:
        return self.clock.step

    @property
    def t(self) -> float:
        return self.clock.t

    def after(self, t: float | None, settings: Settings) -> TrainingProgress:
        """Return the progress after one more call, with the caller's `t`, which must be later than
        the last one."""
        unit, step, reason, hint, value = settings.t_unit, self.step + 1, "", "", ""
        try:
            time = math.nan if isinstance(t, str) else float(step if t is None else t)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            time = math.nan
        if self.own_clock not in (None, t is not None):
            reason = (
                f"earlier calls of update_ in this run "
                f"{'passed' if self.own_clock else 'did not pass'} t"
            )
            hint = "pass it at every call or at none"
        elif t is None and unit != "steps":
            reason, hint = f"this run counts {unit}", "pass t= at every call of update_"
        elif not EARLIEST <= time <= LATEST or time <= self.t:
            reason = (
                f"must lie between {EARLIEST:g} and {LATEST:g}, and be larger than at the last call"
            )
            reason, value = f"{reason}, {self.t:,.12g} {unit}", f"{time:.12g}"
        if reason:
            raise InvalidValueError("t", reason, hint, value=value)
        updated = step if settings.update_is_due(step) else self.updated
        return TrainingProgress(self.clock.add(step, time), t is not None, updated)


@dataclass(frozen=True)
class Tracking:
    """The complete state of a tracker; replaced in one assignment, so that its fields are always
    consistent."""

    run_id: str
    tracked: TrackedModel
    averages: Averages
    progress: TrainingProgress = field(default_factory=TrainingProgress)
    resumes: bool = False  # whether the averages are still to be loaded from the directory
    # header checksums of those written, in a state to continue from
    snapshots: frozenset[str] = frozenset()


class Start:
    """Where a tracker starts: a new run, or the call of `update_` from which it resumes the run in
    its directory.

    It is a given one, or the newest one at which the network had the weights that the model has
    when its tracker is made, or when its `load_state_dict` was called since. `step` is its number:
    0 for a new beginning, None for the newest snapshots. `weights` are the network's sampled
    weights at a given call; empty if unknown.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        step: int | None,
        stored: Sequence[Snapshot],
        tracking: Tracking,
        model: torch.nn.Module | None,
        tensors: ModelTensors | None,
    ) -> None:
        self.directory, self.settings, self.step, self.is_given = (
            directory,
            settings,
            step,
            step is not None,
        )
        self.tracking = tracking
        if model is not None and tensors is not None:
            self.tracking = _with_members(tracking, model, tensors, settings, directory)
        recorded = None if step is None else recorded_weights(stored).get(step)
        self.weights: tuple[float, ...] = () if recorded is None else tuple(recorded.tolist())
        self._stored, self._newest = stored, stored[-1].step if stored else 0
        # of the last call that an earlier tracker of this model in this process has counted
        self.counted: TrainingProgress | None = None
        self._progress: TrainingProgress | None = None  # where the snapshots do not say it

    @classmethod
    def of_model(
        cls, model: torch.nn.Module, directory: Path, settings: Settings, resume: str | int | None
    ) -> Start:
        """Return the start of a new run, or with `resume`, see `PostHocEMA.from_model`, of the run
        in the directory."""
        # an existing run may be absent only without a step
        step = None if resume in (None, "auto") else resume
        if isinstance(step, bool | str):
            reason = "must be 'auto', to go on where the weights fit, a step that has snapshots, "
            reason += "0, to begin anew, or None"
            raise InvalidValueError("resume", reason, value=f"{resume!r}")
        if step is not None:
            step = check_count("resume", step, 0)
        stored: Sequence[Snapshot] = []
        if step:
            stored = read_directory(directory)
        elif resume is not None:
            stored = find_snapshots(directory)
        if stored and step != 0:
            settings = replace(settings, selection=settings.selection.resumed(stored[-1].roles))
        check_globs(settings.selection, [tensor.name for tensor in named_tensors(model)])
        tensors = collect_tensors(model, settings.selection)
        if tensors.tracked.chunks or is_first_of_group(model):
            _check_directory(directory, is_new=resume is None)
        if not stored:
            tracking = Tracking(
                secrets.token_hex(16), tensors.tracked, Averages.none_yet(settings.sigma_rels)
            )
            return cls(directory, settings, None, stored, tracking, model, tensors)
        newest, schedule, sigma_rels = stored[-1], settings.schedule, settings.sigma_rels
        anew = Tracking(newest.run_id, tensors.tracked, Averages.none_yet(sigma_rels), resumes=True)
        if step == 0:
            return cls(directory, settings, 0, stored, anew, model, tensors)
        if newest.t_unit != settings.t_unit:
            reason = f"the run in {directory} counts {shown(newest.t_unit)}"
            raise InvalidValueError("t_unit", reason, value=f"{settings.t_unit!r}")
        _check_profiles(newest.sigma_rels, sigma_rels)
        tracking = _resumed(_until(stored, step, "resume")[-1], sigma_rels)
        is_first = newest.step <= schedule.update_after_step + schedule.checkpoint_every
        if step is None and is_first and len(stored) < len(sigma_rels):
            # The run was killed while it wrote its first snapshots: they are set aside when it
            # begins again.
            return cls(directory, settings, 0, stored, anew, model, tensors)
        return cls(directory, settings, step, stored, tracking, model, tensors)

    @classmethod
    def of_run(cls, directory: Path, model: torch.nn.Module | None, step: int | None) -> Start:
        """Return the start at a call, or at the newest snapshots, of the run in a directory, with
        its settings."""
        stored = read_directory(directory)
        newest = _until(stored, step)[-1]
        selection = (newest.selection or Selection()).resumed(newest.roles)
        settings = Settings(stored[-1].sigma_rels, newest.schedule, newest.t_unit, selection)
        tracking = _resumed(newest, settings.sigma_rels)
        # By the names in the snapshots: a model that is only to be filled may be frozen.
        names = tracking.tracked.known_names
        tensors = None if model is None else collect_tensors(model, selection, names)
        return cls(directory, settings, step, stored, tracking, model, tensors)

    def choose(
        self, now: Tracking, values: Floats, group: Group, writes: bool, is_first_call: bool
    ) -> Tracking:
        """Return the tracking that resumes from the newest call with the model's weights, for all
        processes alike.

        At the first call of `update_`, not before it, any other model is an error.
        """
        # A process that only counts must not see which snapshots the writer sets aside meanwhile.
        stored = find_snapshots(self.directory) if writes else self._stored

        def find() -> tuple[int | None, int]:
            same = (
                step
                for step, weights in recorded_weights(stored).items()
                if are_equal(values, weights)
            )
            return max(same, default=None), stored[-1].step

        found, newest = group.from_first(find)
        self._progress = None
        # a process that only counts may look before the newest are written
        counted = self.counted
        if counted is not None and not writes:
            newest = max(newest, counted.updated)
        if found is None and counted is not None and counted.updated == newest:
            self._progress = counted
            found = newest
        if is_first_call and (found is None or newest > self._newest):
            if group.leads and writes:
                # a training that is still running here is the better reason
                DirectoryLock(self.directory).release()
            if found is not None:
                reason = (
                    f"has advanced from step {self._newest:,} to {newest:,} since this "
                    f"tracker was made"
                )
                raise MismatchError(
                    self.directory, reason, "restore the model and make the tracker again"
                )
            steps = [*recorded_weights(stored)] or [newest]
            times = f"{len(steps):,} times, step {steps[0]:,} to {steps[-1]:,}"
            compared = f"{len(values)} elements compared, also rounded to half precision"
            reason = (
                f"its weights are those of no snapshot of the run in {self.directory} "
                f"({times}; {compared})"
            )
            anew = "to begin anew say resume=0, which sets the snapshots aside"
            hint = f"{anew}; else {_RESTORE}; {_rarer_ways(steps[-1])}"
            raise ModelMismatchError("model", reason, hint)
        self.step, self._newest = None if found == newest else found, newest
        if found is None:
            return now
        progress = self._progress or _progress_at(_until(stored, self.step)[-1])
        return replace(now, progress=progress)

    def read(self, now: Tracking) -> Tracking:
        if self.step == 0:
            return replace(now, progress=TrainingProgress(), resumes=False)
        loaded = _load(self.directory, self.settings.sigma_rels, now.tracked, self.step)
        return replace(loaded, progress=self._progress or loaded.progress)


def sample_of_all(group: Group, own: Mapping[int, float]) -> Floats:
    """Return the values of a sample, of which each process has some by number."""
    sample = ChainMap(*group.from_all(dict(own)))
    return np.array([sample[number] for number in sorted(sample)], np.float32)


def least_distance(
    samples: Sequence[Floats], recorded: Floats, shapes: Mapping[str, Sequence[int]]
) -> float:
    """Return the squared distance of recorded weights from the nearest complete sample; 0 where one
    equals them."""
    complete = [sample for sample in samples if len(sample) == len(recorded)]
    if any(are_equal(sample, recorded) for sample in complete):
        return 0.0
    return min((squared_distance(sample, recorded, shapes) for sample in complete), default=0.0)


def check_path(path: str | Path) -> Path:
    """Return an absolute path, since the working directory may change later."""
    absolute = files.given_path("checkpoint_dir", path).absolute()
    if files.is_url(absolute):
        reason = (
            "must be a folder of this machine: snapshots are copied to a store by `rclone` "
            "or `aws s3 sync`"
        )
        raise InvalidValueError("checkpoint_dir", reason, value=absolute)
    return absolute


def _check_directory(directory: Path, is_new: bool) -> None:
    with files.reported_as_write_error(directory):  # the name may be too long
        existing = next(
            path for path in (directory, *directory.parents) if path.is_symlink() or path.exists()
        )
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        what = "cannot be written to" if existing.is_dir() else "is not a directory"
        reason = f"{what}; snapshots are written to the directory {directory}"
        raise DirectoryError(existing, reason, "name another one")
    for newest in find_snapshots(directory)[-1:] if is_new else ():
        reason = f"holds snapshots of run {newest.run_id[:8]}, up to step {newest.step:,}"
        raise MismatchError(directory, reason, ways_to_resume(newest.step))


def _with_members(
    tracking: Tracking,
    model: torch.nn.Module,
    tensors: ModelTensors,
    settings: Settings,
    directory: Path,
) -> Tracking:
    """Return `tracking` with the processes of the model; of a sharded one this process's part,
    after a rendezvous."""
    if not tensors.tracked.chunks:
        members = Members(model, directory, tensors.tracked.shapes)
        return replace(tracking, tracked=replace(tracking.tracked, members=members))
    values = vars(settings) | vars(settings.schedule) | vars(settings.selection)
    # the last one says whether there is an `include`
    left_out = ("schedule", "selection", "only_trainable")
    options = {name: str(value) for name, value in values.items() if name not in left_out}
    start = (
        f"run {tracking.run_id[:8]} at step {tracking.progress.step}"
        if tracking.resumes
        else "nothing"
    )
    options |= {"checkpoint_dir": str(directory), "to resume": start}
    owners = ShardOwners(
        model,
        tensors.averaged | tensors.copied,
        tensors.tracked.chunks,
        tensors.tracked.aliases,
        tensors.tracked.complete_shapes,
        options,
        tracking.run_id,
    )
    if tracking.resumes:
        tracking.tracked.check(tensors.tracked, owners.names)
    part = replace(tensors.tracked.of(owners), everywhere=owners.shapes)
    return replace(tracking, run_id=owners.run_id, tracked=part)


_RESTORE = "restore the model's checkpoint first, then from_model(..., resume='auto')"
_ANEW = "for a new run resume=0, which sets these snapshots aside, or another directory"


def ways_to_resume(step: int) -> str:
    """Return the ways to resume a run, or to begin another, for the hints of errors."""
    return f"{_RESTORE}; {_ANEW}; {_rarer_ways(step)}"


def _rarer_ways(step: int) -> str:
    state = "or ema.load_state_dict(state), if the checkpoint holds ema.state_dict()"
    anyway = f"or whatever the weights with resume={step} or from_path(..., step={step})"
    return f"{state}; {anyway}"


def _resumed(last: Snapshot, sigma_rels: Sequence[float]) -> Tracking:
    shapes = {name: entry.shape for name, entry in last.entries.items()}
    tracked = TrackedModel(last.tensors, shapes, last.aliases, last.left_out)
    return Tracking(
        last.run_id, tracked, Averages.none_yet(sigma_rels), _progress_at(last), resumes=True
    )


def _progress_at(snapshot: Snapshot) -> TrainingProgress:
    return TrainingProgress.resumed(ClockRecorder.of_knots(snapshot.clock_pairs))


def _until(
    snapshots: Sequence[Snapshot], step: int | None, argument: str = "step"
) -> Sequence[Snapshot]:
    """Return the snapshots up to a call, which must have one; all for None. Errors name
    `argument`."""
    if step is None:
        return snapshots
    step = check_count(argument, step)
    steps = sorted({snapshot.step for snapshot in snapshots})
    if step not in steps:
        known = ", ".join(["..."] * (len(steps) > 20) + [f"{number:,}" for number in steps[-20:]])
        reason = f"this call of update_ has no snapshot; calls that have one: {known}"
        raise InvalidValueError(argument, reason, value=f"{step:,}")
    return [snapshot for snapshot in snapshots if snapshot.step <= step]


@torch.inference_mode(False)
@torch.no_grad()
def _load(
    directory: Path, sigma_rels: Sequence[float], tracked: TrackedModel, step: int | None
) -> Tracking:
    """Load the averages of a call `step`, of None the newest, from snapshots; reconstruct those
    without one then."""
    snapshots = _until(read_directory(directory), step)
    newest = snapshots[-1]
    chosen = {s.sigma_rel: s for s in snapshots if s.t == newest.t}
    kept = AverageTensors(host_layout(tracked), len(sigma_rels))
    inherited = tuple(
        _read_average(chosen[sigma_rel], snapshots, high, tracked)
        if sigma_rel in chosen
        else _reconstruct(directory, snapshots, sigma_rel, high, tracked)
        for sigma_rel, high in zip(sigma_rels, kept.high, strict=True)
    )
    with newest:
        copies = {
            name: newest.tensor(name, tracked.boxes.get(name))
            for name in tracked.dtypes(copied=True)
        }
    since = newest.t, newest.step, newest.t_first, newest.max_interval, newest.updates
    standing = Standing(*since, folded_t=newest.t, inherited=inherited)
    path = path_of_part(newest.sketch, tracked.members.part)
    averages = Averages(tuple(sigma_rels), standing, kept, copies, known_path=path)
    known = frozenset(snapshot.identity for snapshot in snapshots)
    return Tracking(newest.run_id, tracked, averages, _progress_at(newest), snapshots=known)


def _reconstruct(
    directory: Path,
    snapshots: Sequence[Snapshot],
    sigma_rel: float,
    average: FlatTensors,
    tracked: TrackedModel,
) -> float:
    """Fill `average` with a reconstruction at the time of the newest snapshot; return its expected
    squared error."""
    plan = plan_synthesis(snapshots, [sigma_rel], dtype=torch.float32)
    predicted, at = (
        plan.predicted_error(0),
        f"sigma_rel {sigma_rel:g} has no snapshot at step {snapshots[-1].step:,}",
    )
    if predicted is None or predicted > _MOST_MISSING:
        error = "an unknown error" if predicted is None else f"an error of {percent(predicted)}"
        reason = (
            f"{at}, and would be reconstructed with {error}; at most "
            f"{percent(_MOST_MISSING)} is accepted"
        )
        steps = [snapshot.step for snapshot in snapshots if snapshot.sigma_rel == sigma_rel]
        anyway = f"from_model(..., resume={max(steps)}), whatever the weights; " if steps else ""
        hint = (
            f"restore a checkpoint of another step; or {anyway}or track fewer: "
            f"from_model(..., sigma_rels=...)"
        )
        raise DirectoryError(directory, reason, hint)
    if tracked.leads:
        log.warning(
            "%s: %s: it is reconstructed, with a predicted error of %s",
            directory,
            at,
            percent(predicted),
        )
    names, norm = frozenset(average.views), 0.0
    held = {name: box for name, box in tracked.boxes.items() if name in names}
    for name, (value,) in synthesize(replace(plan, subset=names, boxes=held)):
        if name in names:  # else another name of the tensor
            average.views[name].copy_(value)
            norm += float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2
    return predicted**2 * norm


def _read_average(
    snapshot: Snapshot, earlier: Sequence[Snapshot], average: FlatTensors, tracked: TrackedModel
) -> float:
    """Fill `average` from a snapshot, and return the expected squared norm of its error; see
    `error_after_rounding`.

    How far the average has moved since the `earlier` snapshot of its profile is estimated from the
    samples of both.
    """
    expected = norm = 0.0
    with snapshot:
        for name, view in average.views.items():
            value = snapshot.tensor(name, tracked.boxes.get(name))
            view.copy_(value)
            if tracked.tensors[name].role == "statistic":
                continue  # the measurements in snapshots cover weights only
            square = float(torch.linalg.vector_norm(view, dtype=torch.float64)) ** 2
            norm += square
            if value.element_size() < view.element_size():
                expected += (ROUNDING * torch.finfo(value.dtype).eps) ** 2 * square
    measured = snapshot.measurements
    before = [
        s for s in earlier if s.sigma_rel == snapshot.sigma_rel and s.t < snapshot.t and s.sample
    ]
    moved, share = math.inf, 1.0
    if before and snapshot.sample:
        now, last = (decode_sample(one.sample)[1] for one in (snapshot, before[-1]))
        moved = squared_distance(
            now, last, {name: snapshot.entries[name].shape for name in snapshot.averages}
        )
        share = new_value_share(snapshot.gamma, before[-1].t, snapshot.t)
    rounding = expected if measured is None else measured.rounding
    # The snapshot's measurements cover the complete tensors; this process may own a part of them.
    part = 1.0
    if measured is not None and tracked.members.is_chunked:
        part = norm / measured.norm if measured.norm else 0.0
    error = error_after_rounding(
        part * snapshot.inherited, part * rounding, expected, part * moved, share
    )
    return error if math.isfinite(error) else 0.0


# --- a dict ---


@dataclass(frozen=True)
class StateInfo:
    """A tracker's state without its tensors."""

    run_id: RunId
    t_unit: str
    sigma_rels: tuple[float, ...]
    standing: Standing
    clock: Any  # `ClockRecorder.state` at the last call; `of_state` checks it
    sketch: SketchText
    snapshots: tuple[str, ...]  # header checksums of those on disk
    # of a snapshot's sample at the last call; empty if unknown
    weights: tuple[Annotated[float, ANY_SIGN], ...]


@torch.inference_mode(False)
@torch.no_grad()
def pack_state(
    state: Tracking, info: StateInfo, model: torch.nn.Module | None = None
) -> dict[str, Any]:
    """Return the state as a dict of tensors, numbers, strings and lists;
    `torch.load(weights_only=True)` reads it.

    Averages have their sigma_rel as key. Before the first update the tensors are zeros, for loaders
    that fill those of a fresh object's state, such as torch.distributed.checkpoint. Of a sharded
    `model` owned chunks are DTensors.
    """
    averages, tracked = state.averages, state.tracked
    kept, copies = averages.tensors, averages.copies
    if kept is None or not averages.exist:
        kept = AverageTensors(host_layout(tracked), len(averages.sigma_rels))
        dtypes = tracked.dtypes(copied=True)
        copies = {
            name: torch.zeros(tracked.shapes[name], dtype=dtype) for name, dtype in dtypes.items()
        }
    keys, dtensors = [repr(sigma_rel) for sigma_rel in averages.sigma_rels], {}
    if model is not None:
        reshard(model)
        dtensors = {tensor.name: tensor.tensor for tensor in named_tensors(model)}

    def packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: as_dtensor(value, dtensors[name]) if dtensors else value
            for name, value in tensors.items()
        }

    # the first mean may serve all profiles
    first, is_shared = (kept.mean[0].views, averages.standing.shared)
    means = [
        {
            name: first[name] if is_shared and view.dtype == torch.float32 else view
            for name, view in mean.views.items()
        }
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
    """Check a state against the tracker that is to continue from it, and load it one tensor after
    the other.

    Return also the network's sampled weights. Profiles that only the state has are dropped; one
    that only the tracker has cannot begin in mid-run. In a group of processes each takes the chunks
    that it owns, also from complete tensors.
    """
    version, reason = state.get("version") if isinstance(state, Mapping) else None, ""
    if version != STATE_VERSION:
        reason = (
            f"must come from state_dict() of a process that keeps averages, of version "
            f"{STATE_VERSION}"
        )
        if isinstance(state, Mapping) and version is None:
            names = ", ".join(map(shown, [*state][:3]))
            reason = f"is none of a tracker, but of a model or optimizer: it holds {names}; load "
            reason += "what ema.state_dict() has returned"
        else:
            reason += f", not {shown(version)}"
    else:
        try:
            info = converted(dict(state), StateInfo)
            clock = ClockRecorder.of_state(info.clock)
            if info.t_unit != settings.t_unit:
                reason = f"counts time in {shown(info.t_unit)}, this tracker in {settings.t_unit!r}"
            elif len(info.standing.inherited) != len(info.sigma_rels):
                reason = (
                    f"inherited: must be one for each profile, not {len(info.standing.inherited)}"
                )
        except ValueError as error:
            reason = str(error)
    if reason:
        raise InvalidValueError("state", reason)
    standing, wanted = info.standing, settings.sigma_rels
    averages = Averages.none_yet(wanted)
    if standing.t > 0 and tracked.tensors:
        _check_profiles(info.sigma_rels, wanted)
        inherited = dict(zip(info.sigma_rels, standing.inherited, strict=True))
        errors = tuple(inherited[one] * tracked.leads for one in wanted)
        standing = replace(standing, inherited=errors, missing=standing.missing * tracked.leads)
        kept = AverageTensors(host_layout(tracked), len(wanted))
        for kind, flats in (("high", kept.high), ("mean", kept.mean)):
            for one, flat in zip(wanted, flats, strict=True):
                stored = state[kind][repr(one)]
                _check_names(stored, flat.views, tracked)
                # each is checked before the next is read: they may be on disk
                for name, view in flat.views.items():
                    view.copy_(_own_part(name, stored, tracked, view.dtype))
        dtypes = tracked.dtypes(copied=True)
        _check_names(state["copies"], dtypes, tracked)
        copies = {
            name: _own_part(name, state["copies"], tracked, dtype).clone()
            for name, dtype in dtypes.items()
        }
        path = path_of_part(info.sketch, tracked.members.part)
        averages = Averages(wanted, standing, kept, copies, known_path=path)
    progress = TrainingProgress.resumed(clock, standing.step)
    return Tracking(
        info.run_id, tracked, averages, progress, snapshots=frozenset(info.snapshots)
    ), info.weights


def host_layout(tracked: TrackedModel) -> Layout:
    """Return the layout of the averages of a model in host memory."""
    averaged = tracked.dtypes(copied=False)
    return buckets_of(
        {name: (HOST, dtype, tracked.shapes[name]) for name, dtype in averaged.items()}
    )


def _check_names(
    tensors: Mapping[str, Any], expected: Mapping[str, object], tracked: TrackedModel
) -> None:
    if differing := (set(expected) - set(tensors)) | (
        set(tensors) - set(expected) - tracked.members.names
    ):
        reason = "is in the state or in the model, but not in both"
        hint = (
            "make the tracker with the include, exclude and buffers of the tracker that made "
            "the state"
        )
        raise ModelMismatchError(f"tensor {min(differing)!r}", reason, hint)


def _own_part(
    name: str, tensors: Mapping[str, Any], tracked: TrackedModel, dtype: torch.dtype
) -> torch.Tensor:
    """Return the part of a tensor of a state that this process owns, after checking it."""
    subject, stored, reason, hint = f"tensor {name!r}", tensors[name], "", ""
    expected = f"{dtype} of shape {list(tracked.complete_shape(name))}"
    (local, held), wanted = held_box(name, stored), tracked.box(name)
    if (found := f"{stored.dtype} of shape {list(stored.shape)}") != expected:
        reason = f"is {found} in the state, not {expected}"
        if list(stored.shape) != list(tracked.complete_shape(name)):
            hint = "the state is of another model"
        else:
            hint = f"the model's is {torch_dtype(tracked.tensors[name].dtype)}"
    elif held.intersection(wanted) != wanted:
        reason = "is sharded over the processes in another way in the state than in the model"
        hint = "let torch.distributed.checkpoint load it, which reshards it"
    if reason:
        raise ModelMismatchError(subject, reason, hint)
    starts = [begin - first for begin, first in zip(wanted.offset, held.offset, strict=True)]
    tensor = local[
        tuple(slice(at, at + size) for at, size in zip(starts, wanted.shape, strict=True))
    ]
    if tracked.tensors[name].role != "copy" and nonfinite_name({name: tensor}) is not None:
        raise NonFiniteError(subject, "the state's average of it holds nan or infinity")
    return tensor


def _check_profiles(held: Sequence[float], wanted: Sequence[float]) -> None:
    """Raise an InvalidValueError unless the run holds every profile that is wanted."""
    for sigma_rel in wanted:
        if sigma_rel not in held:
            reason = (
                f"{sigma_rel:g} is none of the tracked ones, {listed(held)}: an average "
                f"cannot begin in mid-run"
            )
            raise InvalidValueError(
                "sigma_rels", reason, "leave it out, and synthesize it from the tracked ones"
            )
