"""Resuming a run from the snapshots of the newest time at which the network had the model's weights.

Snapshots hold the averages rounded to their storage dtype; the exact state is `ema.state_dict()`.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from posthoc_cli import files
from posthoc_cli.errors import (
    DirectoryError,
    InvalidValueError,
    MismatchError,
    ModelMismatchError,
    check_count,
    percent,
    shown,
)
from posthoc_cli.profiles import ClockRecorder, new_value_share
from posthoc_cli.reconstruction import ROUNDING, error_after_rounding
from posthoc_cli.snapshots.directory import DirectoryLock, find_snapshots, read_directory
from posthoc_cli.snapshots.path import Floats, are_equal, decode_sample, path_of_part, squared_distance
from posthoc_cli.snapshots.snapshot import Snapshot, recorded_weights
from posthoc_cli.synthesis.engine import synthesize
from posthoc_cli.synthesis.plan import plan_synthesis
from posthoc_cli.tracker.averages import Averages, AverageTensors, Standing
from posthoc_cli.tracker.memory import FlatTensors
from posthoc_cli.tracker.model import TrackedModel
from posthoc_cli.tracker.processes import Group
from posthoc_cli.tracker.state import Settings, Tracking, TrainingProgress, check_profiles, host_layout

log = logging.getLogger(__name__)

_MOST_MISSING = 0.01  # the largest predicted error of an average that is reconstructed to resume from


class Start:
    """The call of `update_` from which a tracker resumes the run in its directory.

    It is a given one, or the newest one at which the network had the weights that the model has when its tracker is
    made, or when its `load_state_dict` was called since.

    Attributes:
        step, is_given: the number of that call; 0 for a new beginning, None for the newest snapshots.
        weights: the network's sampled weights at a given call; empty if unknown.
    """

    def __init__(self, directory: Path, settings: Settings, step: int | None, stored: Sequence[Snapshot]) -> None:
        self.step, self.is_given = step, step is not None
        recorded = None if step is None else recorded_weights(stored).get(step)
        self.weights: tuple[float, ...] = () if recorded is None else tuple(recorded.tolist())
        self._directory, self._settings, self._stored = directory, settings, stored
        self._newest = stored[-1].step if stored else 0

    def choose(self, now: Tracking, values: Floats, group: Group, writes: bool, is_first_call: bool) -> Tracking:
        """Return the tracking that resumes from the newest call with the model's weights, for all processes alike.

        When the tracker is made, or the model restored, any other model is left as it is; at the first call of
        `update_` it is an error.
        """
        # A process that only counts must not see which snapshots the writer sets aside meanwhile.
        stored = find_snapshots(self._directory) if writes else self._stored

        def find() -> tuple[int | None, int]:
            same = (step for step, weights in recorded_weights(stored).items() if are_equal(values, weights))
            return max(same, default=None), stored[-1].step

        found, newest = group.from_first(find)
        leads, has_advanced = group.leads and writes, newest > self._newest
        if is_first_call and (found is None or has_advanced):
            if leads:
                DirectoryLock(self._directory).release()  # a training that is still running here is the better reason
            if found is not None:
                reason = f"has advanced from step {self._newest:,} to {newest:,} since this tracker was made"
                raise MismatchError(self._directory, reason, "restore the model and make the tracker again")
            steps = [*recorded_weights(stored)] or [newest]
            times = f"{len(steps):,} times, step {steps[0]:,} to {steps[-1]:,}"
            compared = f"{len(values)} elements compared, also rounded to half precision"
            reason = f"its weights are those of no snapshot of the run in {self._directory} ({times}; {compared})"
            raise ModelMismatchError("model", reason, ways_to_resume(steps[-1]))
        self.step, self._newest = None if found == newest else found, newest
        if found is None:
            return now
        if is_first_call and leads and found < newest:
            text = f"continuing at step {found:,}, where the network had the model's weights"
            text += f"; later snapshots, up to step {newest:,}, will be set aside"
            log.warning("%s: %s", self._directory, text)
        return replace(now, progress=_progress_at(snapshots_until(stored, self.step)[-1]))

    def read(self, now: Tracking) -> Tracking:
        """Read the state to resume from out of the directory."""
        if self.step == 0:
            return replace(now, progress=TrainingProgress(), resumes=False)
        return _load(self._directory, self._settings.sigma_rels, now.tracked, self.step)


def sample_of_all(group: Group, own: Mapping[int, float]) -> Floats:
    """Return the values of a sample, of which each process has some by number."""
    sample = ChainMap(*group.from_all(dict(own)))
    return np.array([sample[number] for number in sorted(sample)], np.float32)


def least_distance(samples: Sequence[Floats], recorded: Floats, shapes: Mapping[str, Sequence[int]]) -> float:
    """Return the squared distance of recorded weights from the nearest complete sample; 0 where one equals them."""
    complete = [sample for sample in samples if len(sample) == len(recorded)]
    if any(are_equal(sample, recorded) for sample in complete):
        return 0.0
    return min((squared_distance(sample, recorded, shapes) for sample in complete), default=0.0)


def check_path(path: str | Path) -> Path:
    """Return an absolute path, since the working directory may change later."""
    absolute = files.given_path("checkpoint_dir", path).absolute()
    if files.is_url(absolute):
        reason = "must be a folder of this machine: snapshots are copied to a store by `rclone` or `aws s3 sync`"
        raise InvalidValueError("checkpoint_dir", reason, value=absolute)
    return absolute


def check_directory(directory: Path, is_new: bool) -> None:
    """Raise an error if a tracker cannot write to a directory, which may not exist yet, or begin a new run there."""
    with files.reported_as_write_error(directory):  # the name may be too long
        existing = next(path for path in (directory, *directory.parents) if path.is_symlink() or path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        what = "cannot be written to" if existing.is_dir() else "is not a directory"
        reason = f"{what}; snapshots are written to the directory {directory}"
        raise DirectoryError(existing, reason, "name another one")
    for newest in find_snapshots(directory)[-1:] if is_new else ():
        reason = f"holds snapshots of run {newest.run_id[:8]}, up to step {newest.step:,}"
        raise MismatchError(directory, reason, ways_to_resume(newest.step))


def begin(
    directory: Path, stored: Sequence[Snapshot], settings: Settings, tracked: TrackedModel, step: int | None
) -> tuple[Tracking, int | None]:
    """Return a new run or, if there are snapshots, their run at a `step` or at the newest, and the step to begin at."""
    if not stored:
        return Tracking.new(secrets.token_hex(16), tracked, settings.sigma_rels), None
    newest, schedule, sigma_rels = stored[-1], settings.schedule, settings.sigma_rels
    if newest.t_unit != settings.t_unit:
        reason = f"the run in {directory} counts {shown(newest.t_unit)}"
        raise InvalidValueError("t_unit", reason, value=f"{settings.t_unit!r}")
    check_profiles(newest.sigma_rels, sigma_rels)
    is_first = newest.step <= schedule.update_after_step + schedule.checkpoint_every
    if step is None and is_first and len(stored) < len(sigma_rels):
        # The run was killed while it wrote its first snapshots: they are set aside when it begins again.
        return Tracking.new(newest.run_id, tracked, sigma_rels, resumes=True), 0
    return resumed_tracking(snapshots_until(stored, step, "resume"), sigma_rels), step


def ways_to_resume(step: int) -> str:
    """Return the ways to resume a run, or to begin another, for the hints of errors."""
    restored = "restore the model's checkpoint first, of a step with a snapshot, then from_model(..., resume='auto')"
    state = "or ema.load_state_dict(state), where the checkpoint holds ema.state_dict(), which is exact at any step"
    anyway = f"or whatever the weights with resume={step} or from_path(..., step={step})"
    return f"{restored}; {state}; {anyway}; for a new run name another directory"


def resumed_tracking(snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> Tracking:
    """Return the tracking at the newest time with snapshots."""
    last = snapshots[-1]
    tracking = Tracking.new(last.run_id, TrackedModel.of_snapshot(last), sigma_rels, resumes=True)
    return replace(tracking, progress=_progress_at(last))


def _progress_at(snapshot: Snapshot) -> TrainingProgress:
    return TrainingProgress.resumed(ClockRecorder.of_knots(snapshot.clock_pairs))


def snapshots_until(snapshots: Sequence[Snapshot], step: int | None, argument: str = "step") -> Sequence[Snapshot]:
    """Return the snapshots up to a call, which must have one; all for None. Errors name `argument`."""
    if step is None:
        return snapshots
    step = check_count(argument, step)
    steps = sorted({snapshot.step for snapshot in snapshots})
    if step not in steps:
        known = ", ".join(["..."] * (len(steps) > 20) + [f"{number:,}" for number in steps[-20:]])
        raise InvalidValueError(
            argument, f"this call of update_ has no snapshot; calls that have one: {known}", value=f"{step:,}"
        )
    return [snapshot for snapshot in snapshots if snapshot.step <= step]


@torch.inference_mode(False)
@torch.no_grad()
def _load(directory: Path, sigma_rels: Sequence[float], tracked: TrackedModel, step: int | None) -> Tracking:
    """Load the averages of a call `step`, of None the newest one, from snapshots, with their rounding.

    An average without a snapshot at that time is reconstructed from the snapshots at or before it.
    """
    snapshots = snapshots_until(read_directory(directory), step)
    newest = snapshots[-1]
    chosen = {s.sigma_rel: s for s in snapshots if s.t == newest.t}
    kept = AverageTensors(host_layout(tracked), len(sigma_rels))
    inherited = tuple(
        _read_average(chosen[sigma_rel], snapshots, high, tracked)
        if sigma_rel in chosen
        else _reconstruct(directory, snapshots, sigma_rel, high, tracked)
        for sigma_rel, high in zip(sigma_rels, kept.high, strict=True)
    )
    boxes = tracked.boxes() or {}
    with newest:
        copies = {name: newest.tensor(name, boxes.get(name)) for name in tracked.dtypes(copied=True)}
    standing = Standing(
        newest.t, newest.step, newest.t_first, newest.max_interval, newest.updates,
        folded_t=newest.t, inherited=inherited,
    )  # fmt: skip
    path = path_of_part(newest.sketch, tracked.members.part)
    averages = Averages(tuple(sigma_rels), standing, kept, copies, known_path=path)
    known = frozenset(snapshot.identity for snapshot in snapshots)
    return Tracking(newest.run_id, _progress_at(newest), tracked, averages, snapshots=known)


def _reconstruct(
    directory: Path, snapshots: Sequence[Snapshot], sigma_rel: float, average: FlatTensors, tracked: TrackedModel
) -> float:
    """Fill `average` with a reconstruction at the time of the newest snapshot; return its expected squared error.

    Raises:
        DirectoryError: the predicted error is above 1 %.
    """
    plan = plan_synthesis(snapshots, [sigma_rel], dtype=torch.float32)
    predicted, at = plan.predicted_error(0), f"sigma_rel {sigma_rel:g} has no snapshot at step {snapshots[-1].step:,}"
    if predicted is None or predicted > _MOST_MISSING:
        error = "an unknown error" if predicted is None else f"an error of {percent(predicted)}"
        reason = f"{at}, and would be reconstructed with {error}; at most {percent(_MOST_MISSING)} is accepted"
        steps = [snapshot.step for snapshot in snapshots if snapshot.sigma_rel == sigma_rel]
        anyway = f"from_model(..., resume={max(steps)}), whatever the weights; " if steps else ""
        hint = f"restore a checkpoint of another step; or {anyway}or track fewer: from_model(..., sigma_rels=...)"
        raise DirectoryError(directory, reason, hint)
    if tracked.leads:
        log.warning("%s: %s: it is reconstructed, with a predicted error of %s", directory, at, percent(predicted))
    names, boxes = frozenset(average.views), tracked.boxes()
    held = {name: box for name, box in (boxes or {}).items() if name in names}
    norm = 0.0
    for name, (value,) in synthesize(replace(plan, subset=names, boxes=held)):
        if name in names:  # else another name of the tensor
            average.views[name].copy_(value)
            norm += float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2
    return predicted**2 * norm


def _read_average(
    snapshot: Snapshot, earlier: Sequence[Snapshot], average: FlatTensors, tracked: TrackedModel
) -> float:
    """Fill `average` from a snapshot, and return the expected squared norm of its error.

    The errors of two resumes may add up, see `error_after_rounding`. How far the average has moved since the `earlier`
    snapshot of its profile is estimated from the samples of both.
    """
    expected = norm = 0.0
    boxes = tracked.boxes()
    with snapshot:
        for name, view in average.views.items():
            value = snapshot.tensor(name, (boxes or {}).get(name))
            view.copy_(value)
            if tracked.tensors[name].role == "statistic":
                continue  # the measurements in snapshots cover weights only
            square = float(torch.linalg.vector_norm(view, dtype=torch.float64)) ** 2
            norm += square
            if value.element_size() < view.element_size():
                expected += (ROUNDING * torch.finfo(value.dtype).eps) ** 2 * square
    measured = snapshot.measurements
    before = [s for s in earlier if s.sigma_rel == snapshot.sigma_rel and s.t < snapshot.t and s.sample]
    moved, share = math.inf, 1.0
    if before and snapshot.sample:
        now, last = (decode_sample(one.sample)[1] for one in (snapshot, before[-1]))
        moved = squared_distance(now, last, {name: snapshot.entries[name].shape for name in snapshot.averages})
        share = new_value_share(snapshot.gamma, before[-1].t, snapshot.t)
    rounding = expected if measured is None else measured.rounding
    # The snapshot's measurements cover the complete tensors; this process may own a part of them.
    part = 1.0 if boxes is None or measured is None else norm / measured.norm if measured.norm else 0.0
    error = error_after_rounding(part * snapshot.inherited, part * rounding, expected, part * moved, share)
    return error if math.isfinite(error) else 0.0
