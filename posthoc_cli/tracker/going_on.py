"""Where a run begins, or goes on: from the snapshots at or before the model's place on the run's path.

Snapshots hold the averages rounded to their storage dtype. An exact state of their time is used in their place.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from posthoc_cli import files
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    ModelMismatchError,
    check_count,
    percent,
    shown,
)
from posthoc_cli.profiles import ClockRecorder
from posthoc_cli.reconstruction import ROUNDING, error_after_rounding
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots import states
from posthoc_cli.snapshots.directory import StoredSnapshot, find_snapshots, read_directory
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.path import Found, find, path_of
from posthoc_cli.snapshots.sources import Snapshot
from posthoc_cli.snapshots.states import StateInfo, decode_state
from posthoc_cli.snapshots.tensor_file import read_header
from posthoc_cli.tracker.layout import FlatTensors
from posthoc_cli.tracker.model_tensors import TrackedModel
from posthoc_cli.tracker.running import AverageTensors, RunningAverages, Standing
from posthoc_cli.tracker.sharding import Group, led, mesh_of
from posthoc_cli.tracker.state import (
    STATE_NAME,
    Progress,
    Settings,
    Tracking,
    check_profiles,
    host_layout,
    listed,
    open_state,
    read_tensor,
    unpack_state,
)

log = logging.getLogger(__name__)

_MOST_NAMED = 20


class Start:
    """Where a tracker goes on from in its directory.

    Attributes:
        step: the call of `update_`; 0 for a new beginning, None for the newest snapshots.
        read_at: the same when the averages have been read; -1 before.
    """

    def __init__(self, directory: Path, settings: Settings, step: int | None, stored: Sequence[Snapshot]) -> None:
        self.step, self.read_at = step, -1
        self._directory, self._settings, self._stored, self._is_given = directory, settings, stored, step is not None
        self._seen: tuple[Mapping[int, float], float] | None = None

    def choose(
        self, now: Tracking, sample: Mapping[int, float], group: Group, writes: bool, is_first_call: bool
    ) -> Tracking:
        """What goes on from the newest snapshots at or before the model's place on the run's path.

        The first call of `update_` decides, for all processes alike: a model may be restored after its tracker was
        made. When that is made, a place on the path is taken, so that `step` is right, and any other one waits. A
        ModelMismatchError at the first call, if the model is not on the path, and no step was named.
        """
        if self._is_near(sample):
            return now
        # One that only counts must not see what the writer sets aside meanwhile.
        stored = find_snapshots(self._directory) if writes else self._stored
        place = group.from_first(lambda: find_place(stored, self._settings.sigma_rels, sample))
        level, text = logging.WARNING, ""
        if place is None:
            if is_first_call:
                text = "whether the model is on the run's path cannot be checked: its snapshots hold no sample of it"
        elif self._is_given:
            step = place[0].step
            if step != self.step:
                where = f"those of step {step:,}, or a little later" if step else "not on the run's path"
                text = f"the averages go on from step {self.step}, as asked; the model's weights are {where}"
        elif place[0].step is None:
            if is_first_call:
                raise off_path(self._directory, *place)
        else:
            found, newest = place
            now, self._seen = self._at(now, found.step, newest, stored), (sample, found.reach)
            text = f"continuing at step {found.step}, where the model's weights are"
            if self.step is None:
                level = logging.INFO
            else:
                text += f"; later snapshots, up to step {newest:,}, will be set aside"
        if text and group.leads and writes:
            log.log(level, "%s: %s", self._directory, text)
        return now

    def _at(self, now: Tracking, step: int | None, newest: int, stored: Sequence[Snapshot]) -> Tracking:
        """The same at a place on the path."""
        before, self.step = self.step, None if step == newest else step
        if self.step is None and before is None:
            return now
        until = snapshots_until(stored, self._settings.sigma_rels, self.step)
        resumed = resumed_tracking(self._directory, until, self._settings.sigma_rels)
        return replace(now, progress=resumed.progress)

    def _is_near(self, sample: Mapping[int, float]) -> bool:
        """Whether the model is about where it was when this tracker was made: the first step may be a large one."""
        if self._seen is None:
            return False
        before, reach = self._seen
        moved = sum((value - before[number]) ** 2 for number, value in sample.items())
        return moved <= (3 * reach) ** 2 * sum(value**2 for value in sample.values())

    def read(self, now: Tracking) -> Tracking:
        """The state in the directory to go on from."""
        if self.step == 0:
            return replace(now, progress=Progress(), resumes=False)
        return load_from_directory(self._directory, self._settings, now.tracked, self.step)


def stored_to_resume(directory: Path, resume: str | int) -> Sequence[Snapshot]:
    """The snapshots that a directory holds to go on with; none where it holds nothing, and may."""
    if isinstance(resume, bool | str) and resume != "auto":
        reason = "must be 'auto', a call of update_ that has snapshots, or None"
        raise InvalidValueError("resume", reason, value=f"{resume!r}")
    return find_snapshots(directory) if resume == "auto" else read_directory(directory)


def finish_uploads(directory: Path, model: torch.nn.Module | None) -> None:
    """Upload what an earlier tracker of a run by URL has left on this machine; of a sharded model on any of them."""
    if files.is_url(directory):
        from posthoc_cli.tracker.spool import SpooledPath, finish, hold

        assert isinstance(directory, SpooledPath)
        if model is None or not mesh_of(model):
            finish(directory)
        else:
            with led(lambda: hold(directory), "uploaded what it had left"):
                finish(directory, leads=False)


def check_path(path: str | Path) -> Path:
    """An absolute path: the working directory may change later. Of a URL one that a tracker can write to."""
    found = files.given_path("checkpoint_dir", path).absolute()
    if not files.is_url(found):
        return found
    from posthoc_cli.tracker.spool import spooled

    return spooled(found)


def check_place(directory: Path, is_new: bool) -> None:
    """Raise an error if no tracker can write to a directory, which may be missing yet, or begin a new run there."""
    with files.reported_as_write_error(directory):  # the name may be too long
        place = next(place for place in (directory, *directory.parents) if place.is_symlink() or place.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        what = "cannot be written to" if place.is_dir() else "is not a directory"
        reason = f"{what}; snapshots are written to the directory {directory}"
        raise DirectoryError(place, reason, "name another one")
    for newest in find_snapshots(directory)[-1:] if is_new else ():
        reason = f"holds snapshots of run {newest.info.run_id[:8]}, up to step {newest.info.step:,}"
        raise MismatchError(directory, reason, f"{ways_on(newest.info.step)}; for a new run name another directory")


def find_run(
    directory: Path, stored: Sequence[Snapshot], settings: Settings, tracked: TrackedModel, resume: str | int
) -> tuple[Tracking, int | None] | None:
    """What a directory with these snapshots has to go on with, and the call to go on from; None if it has nothing."""
    if not stored:
        return None
    newest, schedule, sigma_rels = stored[-1].info, settings.schedule, settings.sigma_rels
    if newest.t_unit != settings.t_unit:
        reason = f"the run in {directory} counts {shown(newest.t_unit)}"
        raise InvalidValueError("t_unit", reason, value=f"{settings.t_unit!r}")
    check_profiles(newest.sigma_rels, sigma_rels)
    is_first = newest.step <= schedule.update_after_step + schedule.checkpoint_every
    if resume == "auto" and is_first and len(stored) < len(sigma_rels):
        # Killed while it wrote its first snapshots: they are set aside when it begins again.
        return Tracking.new(newest.run_id, tracked, sigma_rels, resumes=True), 0
    step = None if isinstance(resume, str) else resume
    return resumed_tracking(directory, snapshots_until(stored, sigma_rels, step, "resume"), sigma_rels), step


def find_place(
    snapshots: Sequence[Snapshot], sigma_rels: Sequence[float], sample: Mapping[int, float]
) -> tuple[Found, int] | None:
    """Where on a run's path a model is, and the newest call to go on from; None where that cannot be told.

    That is where headers hold no sample, as earlier releases wrote them, or where they show no motion yet.
    """
    path, complete = path_of(snapshots), _complete(snapshots, sigma_rels)
    steps = [found[0].info.step for found in complete]
    if not steps or steps[-1] not in {moment.step for moment in path} or len(sample) != len(path[0].weights):
        return None
    found = find(np.array([sample[number] for number in sorted(sample)], np.float32), path)
    if found is None:
        return None
    if found.step is None:
        return found, steps[-1]
    before = max((step for step in steps if step <= found.step), default=None)
    return replace(found, step=before, is_before=before is None), steps[-1]


def off_path(directory: Path, found: Found, newest: int) -> ModelMismatchError:
    """The error for a model that is not on the path of the run in a directory."""
    where = f"its weights are not on the path of the run in {directory}"
    if found.is_before:
        reason = f"{where}: they are of before its first snapshot, or of another training"
    else:
        away, reach = percent(found.away), percent(found.reach)
        reason = f"{where}: the nearest, of step {found.nearest:,}, are {away} away, where {reach} would be expected"
    return ModelMismatchError("model", reason, f"{ways_on(newest)}; for a new run name another directory")


def ways_on(step: int) -> str:
    """How to go on with a run, for errors."""
    restored = "restore the model's checkpoint first, and go on with from_model(..., resume='auto') or from_path"
    return f"{restored}; or go on from a step whatever the weights, with resume={step} or from_path(..., step={step})"


def resumed_tracking(directory: Path, snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> Tracking:
    """What a directory says of the newest time with a snapshot of every profile, or else of the newest snapshot."""
    found, kept = _find_start(directory, snapshots, sigma_rels)
    last = found[0] if found else snapshots[-1]
    clock = ClockRecorder.of_knots(last.info.clock_pairs)
    if kept is not None:
        clock = states.clock_at(list(kept.clock), kept.step, kept.t)
    tracking = Tracking.new(last.info.run_id, TrackedModel.of_snapshot(last), sigma_rels, resumes=True)
    return replace(tracking, progress=Progress.resumed(clock))


def load_from_directory(directory: Path, settings: Settings, tracked: TrackedModel, step: int | None) -> Tracking:
    """The exact state, or else the averages of the newest snapshots up to a call, with one of every profile."""
    sigma_rels = settings.sigma_rels
    snapshots = snapshots_until(read_directory(directory), sigma_rels, step)
    found, kept = _find_start(directory, snapshots, sigma_rels)
    if not found:
        there = sorted({snapshot.info.sigma_rel for snapshot in snapshots[-len(sigma_rels) :]})
        reason = f"has no time with a snapshot of every profile ({listed(sigma_rels)}) to go on from"
        hint = f"go on without some (the newest are of {listed(there)}): from_model(..., sigma_rels=..., resume='auto')"
        raise DirectoryError(directory, reason, f"{hint}, or begin a new run in another directory")
    if kept is not None:
        try:
            with open_state(directory / STATE_NAME) as state:
                return unpack_state(state, settings, tracked)
        except FileFormatError as error:
            _warn_of_damage(error)
    behind = [StoredSnapshot.of(snapshot) for snapshot in snapshots if snapshot.info.t <= found[0].info.t]
    return replace(_rounded_state(found, tracked), snapshots=frozenset(one.checksum for one in behind))


def snapshots_until(
    snapshots: Sequence[Snapshot], sigma_rels: Sequence[float], step: int | None, argument: str = "step"
) -> Sequence[Snapshot]:
    """The snapshots up to a call, which must have one of every profile; all for None. Errors name the `argument`."""
    if step is None:
        return snapshots
    step = check_count(argument, step)
    there = sorted({found[0].info.step for found in _complete(snapshots, sigma_rels)})
    if step not in there:
        known = ", ".join(f"{one:,}" for one in there[-_MOST_NAMED:]) or "none"
        more = "..., " * (len(there) > _MOST_NAMED)
        reason = f"there are no snapshots of every profile ({listed(sigma_rels)}) of this call of update_"
        raise InvalidValueError(argument, f"{reason}; of these there are: {more}{known}", value=f"{step:,}")
    return [snapshot for snapshot in snapshots if snapshot.info.step <= step]


def _find_start(
    directory: Path, snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]
) -> tuple[list[Snapshot], StateInfo | None]:
    """The newest snapshots of one time, one a profile, or none; and the exact state of that time if there is one."""
    complete = _complete(snapshots, sigma_rels)
    if not complete:
        return [], None
    newest, found = complete[-1], read_state_info(directory)
    if found is None:
        return newest, None
    # The state is used only where its averages are those that the snapshots hold, rounded.
    stored = [StoredSnapshot.of(snapshot) for snapshot in newest]
    same = all(one.checksum in found.snapshots and one.t == found.averages_t for one in stored)
    if same and set(found.sigma_rels) >= set(sigma_rels):
        return newest, found
    log.info("%s is not of the snapshots of t = %g, which are used instead", directory / STATE_NAME, stored[0].t)
    return newest, None


def _complete(snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> list[list[Snapshot]]:
    """The snapshots of each time that has one of every profile, in the order of time and profiles."""
    by_time: dict[float, dict[float, Snapshot]] = {}
    for snapshot in snapshots:
        by_time.setdefault(snapshot.info.t, {})[snapshot.info.sigma_rel] = snapshot
    complete = [by_time[t] for t in sorted(by_time) if by_time[t].keys() >= set(sigma_rels)]
    return [[found[sigma_rel] for sigma_rel in sigma_rels] for found in complete]


def read_state_info(directory: Path) -> StateInfo | None:
    """The state beside the snapshots, if there is one."""
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
def _rounded_state(chosen: Sequence[Snapshot], tracked: TrackedModel) -> Tracking:
    """The averages as the snapshots of one time, one a profile, hold them."""
    last = chosen[0].info
    kept = AverageTensors(host_layout(tracked), len(chosen))
    inherited = tuple(_read_average(snapshot, own, tracked) for snapshot, own in zip(chosen, kept.high, strict=True))
    with chosen[0].open(tracked.boxes()) as file:
        copies = {name: read_tensor(file, name) for name, own in tracked.tensors.items() if own.role == "copy"}
    standing = Standing(last.t, last.step, last.t_first, last.max_interval, last.updates, 0, last.t, 0, inherited)
    averages = RunningAverages(
        tuple(snapshot.info.sigma_rel for snapshot in chosen), standing, kept, copies,
        known_path=fmt.path_of_part(chosen[0].info.sketch, tracked.part),
    )  # fmt: skip
    progress = Progress.resumed(ClockRecorder.of_knots(last.clock_pairs))
    return Tracking(last.run_id, progress, tracked, averages)


def _read_average(snapshot: Snapshot, room: FlatTensors, tracked: TrackedModel) -> float:
    """Fill room for an average with a snapshot; returns the expected squared norm of the error of that."""
    expected = norm = 0.0
    boxes = tracked.boxes()
    with snapshot.open(boxes) as file:
        for name, own in room.views.items():
            value = read_tensor(file, name)
            own.copy_(value)
            if tracked.tensors[name].role == "statistic":
                continue  # what snapshots measure is of weights
            square = float(torch.linalg.vector_norm(own, dtype=torch.float64)) ** 2
            norm += square
            if value.element_size() < own.element_size():
                expected += (ROUNDING * torch.finfo(value.dtype).eps) ** 2 * square
    info, measured = snapshot.info, snapshot.info.measurements
    before = [d for d in measured.distances if d.sigma_rel == info.sigma_rel] if measured is not None else []
    last = max(before, key=lambda d: d.t, default=None)
    moved, share = (math.inf, 1.0) if last is None else (last.squared, 1 - (last.t / info.t) ** (info.gamma + 1))
    rounding = expected if measured is None else measured.rounding
    # What the snapshot says is of the complete tensors; this process may own a part of them.
    part = 1.0 if boxes is None or measured is None else norm / measured.norm if measured.norm else 0.0
    found = error_after_rounding(part * info.inherited, part * rounding, expected, part * moved, share)
    return found if math.isfinite(found) else 0.0
