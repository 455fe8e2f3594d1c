"""Where a tracker starts: a new run, or the call of `update_` from which it resumes the run in its
directory.

A run resumes from the snapshots of the newest time at which the network had the model's weights, or
of a given one. Every profile has a snapshot of that time: thinning keeps and drops times, not
single snapshots.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    MismatchError,
    ModelMismatchError,
    check_count,
    shown,
)
from posthoc_cli.snapshots.directory import DirectoryLock, find_snapshots, read_directory
from posthoc_cli.snapshots.snapshot import (
    Floats,
    Selection,
    Snapshot,
    are_equal,
    check_globs,
    path_of_part,
    recorded_weights,
)
from posthoc_cli.snapshots.tensorfile import Box, check_text, compact
from posthoc_cli.tracker.averages import Averages, Standing
from posthoc_cli.tracker.clock import Settings, TrainingProgress
from posthoc_cli.tracker.model import ModelTensors, TrackedModel, collect_tensors, named_tensors
from posthoc_cli.tracker.processes import Group, Members, ShardOwners, is_first_of_group
from posthoc_cli.tracker.state import Tracking, check_profiles, zero_averages

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Start:
    """Where a tracker starts: at a given call, or the newest one at which the network had the
    weights that the model has when its tracker is made, or when its `load_state_dict` was called
    since.

    `step` is the number of that call: 0 for a new beginning, None for the newest snapshots.
    `sample` are the model's values of a snapshot's sample at that moment, and `recorded` the
    network's at a given call, or in a loaded state; empty if unknown.
    """

    directory: Path
    settings: Settings
    step: int | None
    stored: Sequence[Snapshot]
    tracking: Tracking
    sample: dict[int, float] | None = None
    recorded: Floats = field(default_factory=lambda: np.empty(0, np.float32))
    # of the last call that an earlier tracker of this model in this process has counted
    counted: TrainingProgress | None = None
    _progress: TrainingProgress | None = None  # where the snapshots do not say it

    def __post_init__(self) -> None:
        # A link, such as one to the newest run, may lead elsewhere later. The path of another
        # machine's process may be another one, so that processes have compared the given ones.
        self.directory = self.directory.resolve()
        self.is_given = self.step is not None
        self.stored = _complete(self.stored, self.settings.sigma_rels)
        if self.step:
            self.recorded = recorded_weights(self.stored).get(self.step, self.recorded)

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        directory: Path,
        settings: Settings,
        resume: str | int | None,
    ) -> Start:
        """Return the start of a new run, or with `resume`, see `PostHocEMA.from_model`, of the run
        in the directory."""
        step = _checked_step(resume)
        stored: Sequence[Snapshot] = []
        if step:
            stored = read_directory(directory)
        elif resume is not None:  # an existing run may be absent only without a step
            stored = find_snapshots(directory)
        if stored and step != 0:
            settings = _checked_settings(settings, stored[-1], directory)
            if step is None and _is_beginning(stored, settings):
                # The run was killed while it wrote its first snapshots: they are set aside when it
                # begins again.
                step = 0
        _check_names(model, settings.selection)
        tensors = collect_tensors(model, settings.selection)
        if tensors.tracked.is_sharded or is_first_of_group(model):
            _check_directory(directory, is_new=resume is None)
        if stored and step != 0:
            last = _until(_complete(stored, settings.sigma_rels), step, "resume")[-1]
            tracking = _resumed(last, settings.sigma_rels)
        else:
            run_id = stored[-1].run_id if stored else secrets.token_hex(16)
            none = Averages(settings.sigma_rels)
            tracking = Tracking(run_id, tensors.tracked, none, resumes=bool(stored))
        tracking = _with_members(tracking, model, tensors, settings, directory)
        return cls(directory, settings, step if stored else None, stored, tracking)

    @classmethod
    def of_run(
        cls,
        directory: Path,
        model: nn.Module | None,
        step: int | None,
    ) -> Start:
        """Return the start at a call, or at the newest snapshots, of the run in a directory, with
        its settings."""
        stored = read_directory(directory)
        newest = _until(stored, step)[-1]
        selection = (newest.selection or Selection()).resumed(newest)
        settings = Settings(stored[-1].sigma_rels, newest.schedule, newest.t_unit, selection)
        tracking = _resumed(newest, settings.sigma_rels)
        if model is not None:
            # By the names in the snapshots: a model that is only to be filled may be frozen.
            tensors = collect_tensors(model, selection, tracking.tracked.known_names)
            tracking = _with_members(tracking, model, tensors, settings, directory)
        return cls(directory, settings, step, stored, tracking)

    def choose(
        self,
        now: Tracking,
        group: Group,
        writes: bool,
        is_first_call: bool,
    ) -> Tracking:
        """Return the tracking that resumes from the newest call with the model's weights, for all
        processes alike.

        At the first call of `update_`, not before it, any other model is an error.
        """
        values = sample_of_all(group, self.sample or {})
        # A process that only counts must not see which snapshots the writer sets aside meanwhile.
        stored = self.stored
        if writes:
            stored = _complete(find_snapshots(self.directory), self.settings.sigma_rels)
        weights = recorded_weights(stored) if stored else {}
        step, newest = group.from_first(lambda: _fitting_and_newest_step(values, weights, stored))
        self._progress = None
        counted = self.counted
        if counted is not None:
            # a process that only counts may look before the newest are written
            if not writes:
                newest = max(newest, counted.updated)
            if step is None and counted.updated == newest:
                self._progress = counted
                step = newest
        if is_first_call and step is None:
            if group.leads and writes:
                # a training that is still running here is the better reason
                DirectoryLock(self.directory).release()
            raise self._is_other([*weights] or [newest], len(values))
        self.step = None if step == newest else step
        if step is None:
            return now
        return replace(now, progress=self._progress or _progress_at(_until(stored, step)[-1]))

    def read(self, now: Tracking) -> Tracking:
        """Load the averages of the chosen call."""
        if self.step == 0:
            return replace(now, progress=TrainingProgress(), resumes=False)
        stored = _complete(read_directory(self.directory), self.settings.sigma_rels)
        chosen = _until(stored, self.step)
        loaded = _load(chosen, self.settings.sigma_rels, now.tracked)
        if now.tracked.members.rank == 0 and _are_rounded(stored[-1]):
            log.warning(
                "%s: the averages continue from step %d, rounded as its snapshots are, which "
                "predicted errors do not contain; a state, ema.state_dict(), is exact",
                self.directory,
                loaded.averages.standing.step,
            )
        return replace(loaded, progress=self._progress or loaded.progress)

    def is_other_network(
        self,
        group: Group,
        present: Mapping[int, float],
    ) -> bool:
        """Return whether the model had other weights than those recorded, when it was made or
        restored and now; once.

        If nobody noticed that it was restored in place, the present ones are a step later.
        """
        recorded = self.recorded
        self.recorded = np.empty(0, np.float32)
        are_other = []
        for own in (self.sample or {}, present):
            sample = sample_of_all(group, own)
            if len(sample) == len(recorded):
                are_other.append(not are_equal(sample, recorded))
        return bool(are_other) and all(are_other)

    def _is_other(self, steps: Sequence[int], compared: int) -> ModelMismatchError:
        times = f"{len(steps):,} times, step {steps[0]:,} to {steps[-1]:,}"
        elements = f"{compared} elements compared, also rounded to half precision"
        reason = f"its weights are those of no snapshot of the run in {self.directory}"
        anew = "to begin anew, pass resume=0, which sets the snapshots aside"
        hint = f"{anew}; {_RESTORE}; {_rarer_ways(steps[-1])}"
        return ModelMismatchError("model", f"{reason} ({times}; {elements})", hint)


def _fitting_and_newest_step(
    values: Floats,
    weights: Mapping[int, Floats],
    stored: Sequence[Snapshot],
) -> tuple[int | None, int]:
    """Return the newest step at which the network had these values, and that of the newest
    snapshot."""
    steps = [step for step, recorded in weights.items() if are_equal(values, recorded)]
    newest = stored[-1].step if stored else 0
    return max(steps, default=None), newest


def sample_of_all(group: Group, own: Mapping[int, float]) -> Floats:
    """Return the values of a sample, of which each process has some by number."""
    sample = ChainMap(*group.from_all(dict(own)))
    values = [sample[number] for number in sorted(sample)]
    return np.array(values, np.float32)


# --- the arguments, and the directory


def _checked_step(resume: str | int | None) -> int | None:
    """Return the call to resume from; None for the newest one that fits, or a new run."""
    if resume in (None, "auto"):
        return None
    if isinstance(resume, bool | str):
        reason = "must be 'auto' (continue where the weights fit), a step that has snapshots, "
        reason += "0 (begin anew), or None"
        raise InvalidValueError("resume", reason, value=f"{resume!r}")
    return check_count("resume", resume, 0)


def _checked_settings(settings: Settings, newest: Snapshot, directory: Path) -> Settings:
    """Return the settings with which a run continues from its newest snapshot."""
    if newest.t_unit != settings.t_unit:
        reason = f"the run in {directory} counts {shown(newest.t_unit)}"
        raise InvalidValueError("t_unit", reason, value=f"{settings.t_unit!r}")
    check_profiles(newest.sigma_rels, settings.sigma_rels)
    return replace(settings, selection=settings.selection.resumed(newest))


def _check_names(model: nn.Module, selection: Selection) -> None:
    """Raise an InvalidValueError for a name that no snapshot's header can hold, or a glob that
    matches none."""
    names = [tensor.name for tensor in named_tensors(model)]
    for name in names:
        try:
            check_text(compact(name))
        except ValueError as error:
            raise InvalidValueError("tensor", str(error), "rename it") from error
    check_globs(selection, names)


def check_path(path: str | Path) -> Path:
    """Return an absolute path, since the working directory may change later."""
    given = files.given_path("checkpoint_dir", path)
    try:
        absolute = given.absolute()
    except FileNotFoundError as error:
        reason = "is relative to the working directory, which was deleted"
        raise InvalidValueError("checkpoint_dir", reason, value=given) from error
    if files.is_url(absolute):
        reason = (
            "must be a folder of this machine: snapshots are copied to a store by `rclone` "
            "or `aws s3 sync`"
        )
        raise InvalidValueError("checkpoint_dir", reason, value=absolute)
    return absolute


def _check_directory(directory: Path, is_new: bool) -> None:
    with files.reported_as_write_error(directory):  # the name may be too long
        existing = directory
        while not (existing.is_symlink() or existing.exists()):
            existing = existing.parent
    what = ""
    if not existing.is_dir():
        what = "is not a directory"
    elif not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written to"
    if what:
        reason = f"{what}; snapshots are written to the directory {directory}"
        raise DirectoryError(existing, reason, "name another one")
    stored = find_snapshots(directory) if is_new else []
    if stored:
        newest = stored[-1]
        reason = f"holds snapshots of run {newest.run_id[:8]}, up to step {newest.step:,}"
        raise MismatchError(directory, reason, ways_to_resume(newest.step))


def _with_members(
    tracking: Tracking,
    model: nn.Module,
    tensors: ModelTensors,
    settings: Settings,
    directory: Path,
) -> Tracking:
    """Return `tracking` with the processes of the model; of a sharded one this process's part,
    after a rendezvous."""
    if not tensors.tracked.is_sharded:
        members = Members(model, directory, tensors.tracked.shapes)
        return replace(tracking, tracked=replace(tracking.tracked, members=members))
    values = vars(settings) | vars(settings.schedule) | vars(settings.selection)
    # the last one says whether there is an `include`
    left_out = ("schedule", "selection", "only_trainable")
    options = {name: str(value) for name, value in values.items() if name not in left_out}
    options["checkpoint_dir"] = str(directory)
    options["to resume"] = "nothing"
    if tracking.resumes:
        options["to resume"] = f"run {tracking.run_id[:8]} at step {tracking.progress.step}"
    owners = ShardOwners(model, tensors.tracked, options, tracking.run_id)
    if tracking.resumes:
        tracking.tracked.check(tensors.tracked, owners.names)
    part = replace(tensors.tracked.of(owners), everywhere=owners.shapes)
    return replace(tracking, run_id=owners.run_id, tracked=part)


_RESTORE = "to continue, restore the model's checkpoint, then call from_model(..., resume='auto')"
_ANEW = "for a new run, pass resume=0, which sets these snapshots aside, or name another directory"


def ways_to_resume(step: int) -> str:
    """Return the ways to resume a run, or to begin another, for the hints of errors."""
    return f"{_RESTORE}; {_ANEW}; {_rarer_ways(step)}"


def _rarer_ways(step: int) -> str:
    state = "or, if the checkpoint holds ema.state_dict(), call ema.load_state_dict(state)"
    anyway = f"or, whatever the weights, pass resume={step} or call from_path(..., step={step})"
    return f"{state}; {anyway}"


# --- snapshots to resume from


def _is_beginning(stored: Sequence[Snapshot], settings: Settings) -> bool:
    """Return whether all that a run has written are some of the snapshots of its first time."""
    schedule = settings.schedule
    is_first = stored[-1].step <= schedule.update_after_step + schedule.checkpoint_every
    return is_first and len(stored) < len(settings.sigma_rels)


def _complete(
    stored: Sequence[Snapshot],
    sigma_rels: Sequence[float],
) -> list[Snapshot]:
    """Return the snapshots of the times that have one of each profile."""
    profiles: dict[float, set[float]] = defaultdict(set)
    for snapshot in stored:
        profiles[snapshot.t].add(snapshot.sigma_rel)
    return [snapshot for snapshot in stored if profiles[snapshot.t].issuperset(sigma_rels)]


def _until(
    snapshots: Sequence[Snapshot],
    step: int | None,
    argument: str = "step",
) -> Sequence[Snapshot]:
    """Return the snapshots up to a call, which must have one; all for None. Errors name
    `argument`."""
    if step is None and snapshots:
        return snapshots
    steps = sorted({snapshot.step for snapshot in snapshots})
    if step is None:
        reason = "no call of update_ has snapshots of all profiles"
        raise InvalidValueError(argument, reason, "begin anew by resume=0")
    step = check_count(argument, step)
    if step not in steps:
        numbers = [f"{number:,}" for number in steps[-20:]]
        if len(steps) > 20:
            numbers.insert(0, "...")
        known = ", ".join(numbers)
        reason = f"this call of update_ has no snapshot; calls that have one: {known}"
        raise InvalidValueError(argument, reason, value=f"{step:,}")
    return [snapshot for snapshot in snapshots if snapshot.step <= step]


def _resumed(last: Snapshot, sigma_rels: Sequence[float]) -> Tracking:
    shapes = {name: entry.shape for name, entry in last.entries.items()}
    boxes = {name: Box.full(shape) for name, shape in shapes.items()}
    tracked = TrackedModel(last.tensors, shapes, boxes, last.aliases, last.left_out)
    averages = Averages(tuple(sigma_rels))
    return Tracking(last.run_id, tracked, averages, _progress_at(last), resumes=True)


def _progress_at(snapshot: Snapshot) -> TrainingProgress:
    return TrainingProgress.resumed(snapshot.step, snapshot.t, snapshot.step)


def _are_rounded(snapshot: Snapshot) -> bool:
    """Return whether averages are stored in less than float32."""
    dtypes = {snapshot.entries[name].dtype for name in snapshot.averages}
    return any(ITEM_BYTES[dtype] < 4 for dtype in dtypes)


@torch.inference_mode(False)
@torch.no_grad()
def _load(
    snapshots: Sequence[Snapshot],
    sigma_rels: Sequence[float],
    tracked: TrackedModel,
) -> Tracking:
    """Load the averages of the newest of these snapshots."""
    newest = snapshots[-1]
    chosen = {s.sigma_rel: s for s in snapshots if s.t == newest.t}
    averages = zero_averages(tuple(sigma_rels), tracked)
    for sigma_rel, high in zip(sigma_rels, averages.tensors.high, strict=True):
        _fill(high.views, chosen[sigma_rel], tracked)
    _fill(averages.copies, newest, tracked)
    averages.standing = Standing(
        newest.t,
        newest.step,
        newest.t_first,
        newest.max_interval,
        newest.updates,
        folded_t=newest.t,
    )
    averages.known_path = path_of_part(newest.sketch, tracked.members.part)
    known = frozenset(snapshot.identity for snapshot in snapshots)
    return Tracking(newest.run_id, tracked, averages, _progress_at(newest), snapshots=known)


def _fill(
    tensors: Mapping[str, Tensor],
    snapshot: Snapshot,
    tracked: TrackedModel,
) -> None:
    with snapshot:
        for name, tensor in tensors.items():
            tensor.copy_(snapshot.tensor(name, tracked.boxes[name]))
