"""Where a tracker starts: a new run, or the call of `update_` from which it resumes the run in its
directory.

A run resumes from the snapshots of the newest time at which the network had the model's weights, or
of a given one. Every profile has a snapshot of that time: thinning keeps or drops all snapshots of
a time.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    PostHocError,
    RefusedCallError,
    check_count,
    count_noun,
    quote,
)
from posthoc_cli.group import Group
from posthoc_cli.snapshots.boxes import Box
from posthoc_cli.snapshots.directory import find_snapshots, read_directory
from posthoc_cli.snapshots.selection import Selection, check_globs
from posthoc_cli.snapshots.sketch_text import path_of_part
from posthoc_cli.snapshots.snapshot import Snapshot, recorded_weights
from posthoc_cli.snapshots.strict_json import check_text, compact
from posthoc_cli.snapshots.weights_sample import Floats, are_equal
from posthoc_cli.tracker.arguments import Settings
from posthoc_cli.tracker.model import (
    ModelTensors,
    ModelWatch,
    TrackedModel,
    check_averages,
    collect_tensors,
    named_tensors,
)
from posthoc_cli.tracker.processes import Members, Notes, ShardOwners, find_group
from posthoc_cli.tracker.progress import TrainingProgress
from posthoc_cli.tracker.state import Tracking, check_profiles, zero_averages
from posthoc_cli.tracker.tracked_averages import Averages, Standing

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Start:
    """Where a tracker starts: a new run, or a call of `update_` of the run in its directory.

    `step` is the number of that call: 0 for a new beginning, None for the newest snapshots, which
    can be read. Updates need a step or a state: until then they raise the `refusal`.
    """

    directory: Path
    settings: Settings
    step: int | None
    tracking: Tracking
    refusal: PostHocError | None = None

    def __post_init__(self) -> None:
        # A link, such as one to the newest run, may lead elsewhere later. The path of another
        # machine's process may be another one, so that processes have compared the given ones.
        self.directory = self.directory.resolve()

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        directory: Path,
        settings: Settings,
        resume: str | int | None,
        group: Any = None,
    ) -> Start:
        """Make the start of a new run, or with `resume`, see `PostHocEMA.from_model`, of the run in
        the directory."""
        step = _check_step(resume)
        stored: Sequence[Snapshot] = []
        if step:
            stored = read_directory(directory)
        elif resume is not None:  # an existing run may be absent only without a step
            stored = find_snapshots(directory)
        if stored and step != 0:
            settings = _adapt_settings(settings, stored[-1], directory)
            if step is None and _is_beginning(stored, settings):
                # The run was killed while it wrote its first snapshots: they are set aside when it
                # begins again.
                step = 0
        _check_names(model, settings.selection)
        tensors = collect_tensors(model, settings.selection)
        check_averages(tensors.tracked, settings.selection)
        processes = find_group(model, group)
        if tensors.tracked.is_sharded or processes.leads:
            _check_directory(directory, is_new=resume is None)
        if not stored or step == 0:
            run_id = stored[-1].run_id if stored else secrets.token_hex(16)
            none = Averages(settings.sigma_rels)
            tracking = Tracking(run_id, tensors.tracked, none, resumes=bool(stored))
            tracking = _with_members(tracking, model, tensors, settings, directory, processes)
            return cls(directory, settings, step if stored else None, tracking)
        complete = _select_until(_select_complete(stored, settings.sigma_rels), step, "resume")
        tracking = _resume(complete[-1], settings.sigma_rels)
        tracking = _with_members(tracking, model, tensors, settings, directory, processes)
        start = cls(directory, settings, step, tracking)
        start.look(model, complete)
        return start

    @classmethod
    def for_run(
        cls,
        directory: Path,
        model: nn.Module | None,
        step: int | None,
        group: Any = None,
    ) -> Start:
        """Make the start at a call, or at the newest snapshots, of the run in a directory, with its
        settings."""
        stored = read_directory(directory)
        sigma_rels = stored[-1].sigma_rels
        stored = [*_select_until(stored, step)]
        newest = stored[-1]
        selection = (newest.selection or Selection()).adapt_to(newest)
        settings = Settings(sigma_rels, newest.schedule, newest.t_unit, selection)
        tracking = _resume(newest, settings.sigma_rels)
        if model is None:
            reason = "was made without a model, and reads the run"
            hint = "to continue the run, pass the model to from_path or from_model"
            refusal = RefusedCallError(directory, reason, hint)
            return cls(directory, settings, step, tracking, refusal)
        # By the names in the snapshots: a model that is only to be filled may be frozen.
        tensors = collect_tensors(model, selection, tracking.tracked.known_names)
        processes = find_group(model, group)
        tracking = _with_members(tracking, model, tensors, settings, directory, processes)
        start = cls(directory, settings, step, tracking)
        start.look(model, _select_complete(stored, settings.sigma_rels))
        return start

    def look(self, model: nn.Module, stored: Sequence[Snapshot]) -> None:
        """Compare the model's weights with the network's at the times of snapshots.

        Without a step choose the newest time at which they were the same; with a step warn if they
        are others.
        """
        tracking = self.tracking
        group = tracking.tracked.members.keepers()
        sample = sample_of_all(group, group.together(lambda: self._sample(model)))

        def find_equal() -> tuple[list[int], list[int]]:
            weights = recorded_weights(stored) if stored else {}
            equal = [step for step, own in weights.items() if are_equal(sample, own)]
            return [*weights], equal

        steps, equal = group.from_first(find_equal)
        if self.step is not None:
            if self.step in steps and self.step not in equal and group.leads:
                warn_of_other_weights(self.directory, self.step)
            return
        if not equal:
            self.refusal = self._no_snapshot(steps or [tracking.progress.step])
            return
        self.step = max(equal)
        chosen = [snapshot for snapshot in stored if snapshot.step == self.step]
        self.tracking = replace(tracking, progress=_progress_at(chosen[-1]))

    def _sample(self, model: nn.Module) -> dict[int, float]:
        tracked = self.tracking.tracked
        try:
            return ModelWatch(self.settings.selection, tracked.members).sample(model, tracked)
        except ModelMismatchError as error:
            hint = (
                f"the run in {self.directory} is of another model; use its model, or another "
                f"directory"
            )
            raise error if error.hint else error.with_hint(hint) from None

    def _no_snapshot(self, steps: Sequence[int]) -> ModelMismatchError:
        times = f"{count_noun(len(steps), 'time')}, step {steps[0]:,} to {steps[-1]:,}"
        reason = f"its weights match no snapshot of the run in {self.directory} ({times})"
        return ModelMismatchError("model", reason, ways_to_resume(steps[-1]))

    def read(self, now: Tracking) -> Tracking:
        """Load the averages of the chosen call."""
        if self.step == 0:
            return replace(now, resumes=False)
        stored = _select_complete(read_directory(self.directory), self.settings.sigma_rels)
        chosen = _select_until(stored, self.step)
        loaded = _load(chosen, self.settings.sigma_rels, now.tracked)
        if now.tracked.members.rank == 0 and _are_rounded(stored[-1]):
            log.warning(
                "%s: the averages continue from step %d, rounded as its snapshots are, which the "
                "predicted errors of later snapshots do not contain; a state, ema.state_dict(), is "
                "exact",
                self.directory,
                loaded.averages.standing.step,
            )
        return loaded


def warn_of_other_weights(directory: Path, step: int) -> None:
    """Warn that a model is not the network whose averages continue from a step."""
    log.warning(
        "%s: the averages continue from step %d; the model has other weights than the network had "
        "then",
        directory,
        step,
    )


def sample_of_all(group: Group, own: Mapping[int, float]) -> Floats:
    """Collect the values of a sample by number; each process has some."""
    sample = ChainMap(*group.from_all(dict(own)))
    values = [sample[number] for number in sorted(sample)]
    return np.array(values, np.float32)


# --- the arguments, and the directory


def _check_step(resume: str | int | None) -> int | None:
    """Check the call to resume from; None for the newest one that fits, or a new run."""
    if resume in (None, "auto"):
        return None
    if isinstance(resume, bool | str):
        reason = "must be 'auto' (continue where the weights fit), a step that has snapshots, "
        reason += "0 (begin anew), or None"
        raise InvalidValueError("resume", reason, value=f"{resume!r}")
    return check_count("resume", resume, 0)


def _adapt_settings(settings: Settings, newest: Snapshot, directory: Path) -> Settings:
    """Make the settings with which a run continues from its newest snapshot."""
    if newest.t_unit != settings.t_unit:
        reason = f"the run in {directory} counts {quote(newest.t_unit)}"
        raise InvalidValueError("t_unit", reason, value=f"{settings.t_unit!r}")
    check_profiles(newest.sigma_rels, settings.sigma_rels)
    return replace(settings, selection=settings.selection.adapt_to(newest))


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
    """Make a path absolute, since the working directory may change later."""
    given = files.check_path("checkpoint_dir", path)
    try:
        absolute = given.absolute()
    except FileNotFoundError as error:
        reason = "is relative to the working directory, which was deleted"
        raise InvalidValueError("checkpoint_dir", reason, value=given) from error
    if files.is_url(absolute):
        reason = (
            "must be a folder on this machine; copy the snapshots to a store with `rclone sync` "
            "or `aws s3 sync`"
        )
        raise InvalidValueError("checkpoint_dir", reason, value=absolute)
    return absolute


def _check_directory(directory: Path, is_new: bool) -> None:
    with files.raise_write_errors(directory):  # the name may be too long
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
    group: Group,
) -> Tracking:
    """Give `tracking` the processes of the model; for a sharded model, after they have met, this
    process's part."""
    if not tensors.tracked.is_sharded:
        notes = None if group.is_alone else Notes(group, directory, tensors.tracked.shapes)
        members = Members(group, notes)
        return replace(tracking, tracked=replace(tracking.tracked, members=members))
    values = vars(settings) | vars(settings.schedule) | vars(settings.selection)
    # the last one says whether there is an `include`
    not_compared = ("schedule", "selection", "only_trainable")
    options = {name: str(value) for name, value in values.items() if name not in not_compared}
    options["checkpoint_dir"] = str(directory)
    options["to resume"] = "nothing"
    if tracking.resumes:
        options["to resume"] = f"run {tracking.run_id[:8]} at step {tracking.progress.step}"
    owners = ShardOwners(group, model, tensors.tracked, options, tracking.run_id)
    if tracking.resumes:
        tracking.tracked.check(tensors.tracked, owners.names)
    part = replace(tensors.tracked.select_for(owners), everywhere=owners.shapes)
    return replace(tracking, run_id=owners.run_id, tracked=part)


def ways_to_resume(step: int) -> str:
    """List the ways to resume a run, or to begin another, for the hints of errors."""
    return (
        "to continue, load the checkpoint's weights into the model, then call from_model(..., "
        f"resume='auto'); or pass resume={step}, whatever the weights; for a new run pass "
        "resume=0, which sets these snapshots aside, or name another directory"
    )


# --- snapshots to resume from


def _is_beginning(stored: Sequence[Snapshot], settings: Settings) -> bool:
    """Return whether a run has written nothing but snapshots of its first time, and perhaps not all
    of these."""
    schedule = settings.schedule
    is_first = stored[-1].step <= schedule.update_after_step + schedule.checkpoint_every
    return is_first and len(stored) < len(settings.sigma_rels)


def _select_complete(
    stored: Sequence[Snapshot],
    sigma_rels: Sequence[float],
) -> list[Snapshot]:
    """Select the snapshots of the times that have one of each profile."""
    profiles: dict[float, set[float]] = defaultdict(set)
    for snapshot in stored:
        profiles[snapshot.t].add(snapshot.sigma_rel)
    return [snapshot for snapshot in stored if profiles[snapshot.t].issuperset(sigma_rels)]


def _select_until(
    snapshots: Sequence[Snapshot],
    step: int | None,
    argument: str = "step",
) -> Sequence[Snapshot]:
    """Select the snapshots up to a call, which must have one; all for None. Errors name
    `argument`."""
    if step is None and snapshots:
        return snapshots
    steps = sorted({snapshot.step for snapshot in snapshots})
    if step is None:
        reason = "no call of update_ has snapshots of all profiles"
        raise InvalidValueError(argument, reason, "begin anew with resume=0")
    step = check_count(argument, step)
    if step not in steps:
        numbers = [f"{number:,}" for number in steps[-20:]]
        if len(steps) > 20:
            numbers.insert(0, "...")
        known = ", ".join(numbers)
        reason = f"this call of update_ has no snapshot; calls that have one: {known}"
        raise InvalidValueError(argument, reason, value=f"{step:,}")
    return [snapshot for snapshot in snapshots if snapshot.step <= step]


def _resume(last: Snapshot, sigma_rels: Sequence[float]) -> Tracking:
    shapes = {name: entry.shape for name, entry in last.entries.items()}
    boxes = {name: Box.full(shape) for name, shape in shapes.items()}
    tracked = TrackedModel(last.tensors, shapes, boxes, last.aliases, last.left_out)
    averages = Averages(tuple(sigma_rels))
    return Tracking(last.run_id, tracked, averages, _progress_at(last), resumes=True)


def _progress_at(snapshot: Snapshot) -> TrainingProgress:
    return TrainingProgress.resume(snapshot.moment, snapshot.step)


def _are_rounded(snapshot: Snapshot) -> bool:
    """Return whether averages are stored in less than float32."""
    dtypes = {snapshot.entries[name].dtype for name in snapshot.averaged}
    return any(ITEM_BYTES[dtype] < 4 for dtype in dtypes)


def _relative_rounding(snapshot: Snapshot) -> float:
    """Compute the relative error of a snapshot's stored averages; 0 if it is not known."""
    measured = snapshot.measurements
    return math.sqrt(measured.rounding / measured.norm) if measured and measured.norm else 0.0


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
        newest.moment,
        newest.t_first,
        newest.max_interval,
        newest.updates,
        folded_t=newest.t,
        rounding=max(map(_relative_rounding, chosen.values())),
        rounded_t=newest.t,
    )
    averages.known_path = path_of_part(newest.sketch, tracked.members.part)
    return Tracking(newest.run_id, tracked, averages, _progress_at(newest))


def _fill(
    tensors: Mapping[str, Tensor],
    snapshot: Snapshot,
    tracked: TrackedModel,
) -> None:
    with snapshot:
        for name, tensor in tensors.items():
            tensor.copy_(snapshot.tensor(name, tracked.boxes[name]))
