"""Resuming a run from the snapshots at or before the model's place on the run's path.

Snapshots hold the averages rounded to their storage dtype. If there is an exact state of their time, it is used.
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
from posthoc_cli.snapshots import states
from posthoc_cli.snapshots.codecs import path_of_part
from posthoc_cli.snapshots.directory import StoredSnapshot, find_snapshots, read_directory
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.path import Location, locate, path_of
from posthoc_cli.snapshots.sources import Snapshot
from posthoc_cli.snapshots.states import StateInfo, decode_state
from posthoc_cli.snapshots.tensor_file import read_header
from posthoc_cli.tracker.layout import FlatTensors
from posthoc_cli.tracker.model_tensors import TrackedModel
from posthoc_cli.tracker.running import AverageTensors, RunningAverages, Standing
from posthoc_cli.tracker.sharding import Group, mesh_of, while_rank_0_holds
from posthoc_cli.tracker.state import (
    STATE_NAME,
    Settings,
    Tracking,
    TrainingProgress,
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
    """The call of `update_` from which a tracker resumes the run in its directory.

    Attributes:
        step: the number of that call; 0 for a new beginning, None for the newest snapshots.
        read_at: the number of that call once the averages have been read; -1 before.
    """

    def __init__(self, directory: Path, settings: Settings, step: int | None, stored: Sequence[Snapshot]) -> None:
        self.step, self.read_at = step, -1
        self._directory, self._settings, self._stored, self._is_given = directory, settings, stored, step is not None
        self._seen: tuple[Mapping[int, float], float] | None = None

    def choose(
        self, now: Tracking, sample: Mapping[int, float], group: Group, writes: bool, is_first_call: bool
    ) -> Tracking:
        """Return the tracking that resumes from the newest snapshots at or before the model's place on the run's path.

        The first call of `update_` decides, for all processes alike: a model may be restored after its tracker was
        made. When the tracker is made, a model on the path sets `step` already, and any other model is left for the
        first call, which raises a ModelMismatchError if the model is not on the path and no step was named.
        """
        if self._is_near(sample):
            return now
        # A process that only counts must not see which snapshots the writer sets aside meanwhile.
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
                text = f"the averages continue from step {self.step}, as requested; the model's weights are {where}"
        elif place[0].step is None:
            if is_first_call:
                raise off_path_error(self._directory, *place)
        else:
            on_path, newest = place
            now, self._seen = self._resumed_at(now, on_path.step, newest, stored), (sample, on_path.reach)
            text = f"continuing at step {on_path.step}, where the model's weights are"
            if self.step is None:
                level = logging.INFO
            else:
                text += f"; later snapshots, up to step {newest:,}, will be set aside"
        if text and group.leads and writes:
            log.log(level, "%s: %s", self._directory, text)
        return now

    def _resumed_at(self, now: Tracking, step: int | None, newest: int, stored: Sequence[Snapshot]) -> Tracking:
        """Set `step`, and return `now` with the progress of the run at that call."""
        before, self.step = self.step, None if step == newest else step
        if self.step is None and before is None:
            return now
        until = snapshots_until(stored, self._settings.sigma_rels, self.step)
        resumed = resumed_tracking(self._directory, until, self._settings.sigma_rels)
        return replace(now, progress=resumed.progress)

    def _is_near(self, sample: Mapping[int, float]) -> bool:
        """Return whether the model is near its place when this tracker was made: the first step may be a large one."""
        if self._seen is None:
            return False
        before, reach = self._seen
        moved = sum((value - before[number]) ** 2 for number, value in sample.items())
        return moved <= (3 * reach) ** 2 * sum(value**2 for value in sample.values())

    def read(self, now: Tracking) -> Tracking:
        """Read the state to resume from out of the directory."""
        if self.step == 0:
            return replace(now, progress=TrainingProgress(), resumes=False)
        return load_from_directory(self._directory, self._settings, now.tracked, self.step)


def stored_to_resume(directory: Path, resume: str | int) -> Sequence[Snapshot]:
    """Return the snapshots in a directory to be resumed. With "auto", a directory without any is no error."""
    if isinstance(resume, bool | str) and resume != "auto":
        reason = "must be 'auto', a call of update_ that has snapshots, or None"
        raise InvalidValueError("resume", reason, value=f"{resume!r}")
    return find_snapshots(directory) if resume == "auto" else read_directory(directory)


def finish_uploads(directory: Path, model: torch.nn.Module | None) -> None:
    """Upload what an earlier tracker of a run by URL has left on this machine, for a sharded model on any machine."""
    if files.is_url(directory):
        from posthoc_cli.tracker.spool import SpooledPath, finish, hold

        assert isinstance(directory, SpooledPath)
        if model is None or not mesh_of(model):
            finish(directory)
        else:
            with while_rank_0_holds(lambda: hold(directory), "uploaded its remaining snapshots"):
                finish(directory, leads=False)


def check_path(path: str | Path) -> Path:
    """Return an absolute path, since the working directory may change later, or a URL's path with a local spool."""
    absolute = files.given_path("checkpoint_dir", path).absolute()
    if not files.is_url(absolute):
        return absolute
    from posthoc_cli.tracker.spool import spooled

    return spooled(absolute)


def check_directory(directory: Path, is_new: bool) -> None:
    """Raise an error if a tracker cannot write to a directory, which may not exist yet, or begin a new run there."""
    with files.reported_as_write_error(directory):  # the name may be too long
        existing = next(path for path in (directory, *directory.parents) if path.is_symlink() or path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)):
        what = "cannot be written to" if existing.is_dir() else "is not a directory"
        reason = f"{what}; snapshots are written to the directory {directory}"
        raise DirectoryError(existing, reason, "name another one")
    for newest in find_snapshots(directory)[-1:] if is_new else ():
        reason = f"holds snapshots of run {newest.info.run_id[:8]}, up to step {newest.info.step:,}"
        hint = f"{ways_to_resume(newest.info.step)}; for a new run name another directory"
        raise MismatchError(directory, reason, hint)


def find_run(
    directory: Path, stored: Sequence[Snapshot], settings: Settings, tracked: TrackedModel, resume: str | int
) -> tuple[Tracking, int | None] | None:
    """Return the run to resume in a directory with these snapshots, and the call to resume from; None without any."""
    if not stored:
        return None
    newest, schedule, sigma_rels = stored[-1].info, settings.schedule, settings.sigma_rels
    if newest.t_unit != settings.t_unit:
        reason = f"the run in {directory} counts {shown(newest.t_unit)}"
        raise InvalidValueError("t_unit", reason, value=f"{settings.t_unit!r}")
    check_profiles(newest.sigma_rels, sigma_rels)
    is_first = newest.step <= schedule.update_after_step + schedule.checkpoint_every
    if resume == "auto" and is_first and len(stored) < len(sigma_rels):
        # The run was killed while it wrote its first snapshots: they are set aside when it begins again.
        return Tracking.new(newest.run_id, tracked, sigma_rels, resumes=True), 0
    step = None if isinstance(resume, str) else resume
    return resumed_tracking(directory, snapshots_until(stored, sigma_rels, step, "resume"), sigma_rels), step


def find_place(
    snapshots: Sequence[Snapshot], sigma_rels: Sequence[float], sample: Mapping[int, float]
) -> tuple[Location, int] | None:
    """Return a model's place on a run's path, and the newest call to resume from; None where no place can be found.

    That is where headers hold no sample, as in files of earlier releases, or show no motion yet.
    """
    path = path_of(snapshots)
    steps = [of_time[0].info.step for of_time in _complete(snapshots, sigma_rels)]
    if not steps or steps[-1] not in {moment.step for moment in path} or len(sample) != len(path[0].weights):
        return None
    place = locate(np.array([sample[number] for number in sorted(sample)], np.float32), path)
    if place is None:
        return None
    if place.step is None:
        return place, steps[-1]
    before = max((step for step in steps if step <= place.step), default=None)
    return replace(place, step=before, is_before=before is None), steps[-1]


def off_path_error(directory: Path, place: Location, newest: int) -> ModelMismatchError:
    """Return the error for a model that is not on the path of the run in a directory."""
    where = f"its weights are not on the path of the run in {directory}"
    if place.is_before:
        reason = f"{where}: they are from before its first snapshot, or of another training"
    else:
        away, reach = percent(place.distance), percent(place.reach)
        reason = f"{where}: the nearest, of step {place.nearest:,}, are {away} away, where {reach} would be expected"
    return ModelMismatchError("model", reason, f"{ways_to_resume(newest)}; for a new run name another directory")


def ways_to_resume(step: int) -> str:
    """Return the ways to resume a run, for the hints of errors."""
    restored = "restore the model's checkpoint first, and continue with from_model(..., resume='auto') or from_path"
    return f"{restored}; or from a step whatever the weights, with resume={step} or from_path(..., step={step})"


def resumed_tracking(directory: Path, snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> Tracking:
    """Return the tracking at the newest time with a snapshot of every profile, or else at the newest snapshot."""
    chosen, exact = _find_start(directory, snapshots, sigma_rels)
    last = chosen[0] if chosen else snapshots[-1]
    clock = ClockRecorder.of_knots(last.info.clock_pairs)
    if exact is not None:
        clock = states.clock_at(list(exact.clock), exact.step, exact.t)
    tracking = Tracking.new(last.info.run_id, TrackedModel.of_snapshot(last), sigma_rels, resumes=True)
    return replace(tracking, progress=TrainingProgress.resumed(clock))


def load_from_directory(directory: Path, settings: Settings, tracked: TrackedModel, step: int | None) -> Tracking:
    """Load the exact state, or else the averages of the newest snapshots of every profile, up to a call `step`."""
    sigma_rels = settings.sigma_rels
    snapshots = snapshots_until(read_directory(directory), sigma_rels, step)
    chosen, exact = _find_start(directory, snapshots, sigma_rels)
    if not chosen:
        newest = listed(sorted({snapshot.info.sigma_rel for snapshot in snapshots[-len(sigma_rels) :]}))
        reason = f"has no time with a snapshot of every profile ({listed(sigma_rels)}) to resume from"
        hint = f"continue with fewer (the newest are of {newest}): from_model(..., sigma_rels=..., resume='auto')"
        raise DirectoryError(directory, reason, f"{hint}, or begin a new run in another directory")
    if exact is not None:
        try:
            with open_state(directory / STATE_NAME) as state:
                return unpack_state(state, settings, tracked)
        except FileFormatError as error:
            _warn_of_damage(error)
    earlier = [StoredSnapshot.of(snapshot) for snapshot in snapshots if snapshot.info.t <= chosen[0].info.t]
    return replace(_rounded_state(chosen, tracked), snapshots=frozenset(snapshot.checksum for snapshot in earlier))


def snapshots_until(
    snapshots: Sequence[Snapshot], sigma_rels: Sequence[float], step: int | None, argument: str = "step"
) -> Sequence[Snapshot]:
    """Return the snapshots up to a call, which must have one of every profile; all for None. Errors name `argument`."""
    if step is None:
        return snapshots
    step = check_count(argument, step)
    complete = sorted({of_time[0].info.step for of_time in _complete(snapshots, sigma_rels)})
    if step not in complete:
        known = ", ".join(f"{number:,}" for number in complete[-_MOST_NAMED:]) or "none"
        more = "..., " * (len(complete) > _MOST_NAMED)
        reason = f"this call of update_ has no snapshots of every profile ({listed(sigma_rels)})"
        raise InvalidValueError(argument, f"{reason}; calls that have them: {more}{known}", value=f"{step:,}")
    return [snapshot for snapshot in snapshots if snapshot.info.step <= step]


def _find_start(
    directory: Path, snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]
) -> tuple[list[Snapshot], StateInfo | None]:
    """Return the newest snapshots of one time, one per profile, or none, and the exact state of that time or None."""
    complete = _complete(snapshots, sigma_rels)
    if not complete:
        return [], None
    newest, state = complete[-1], read_state_info(directory)
    if state is None:
        return newest, None
    # The state is used only where its averages, rounded, are those in the snapshots.
    stored = [StoredSnapshot.of(snapshot) for snapshot in newest]
    same = all(snapshot.checksum in state.snapshots and snapshot.t == state.averages_t for snapshot in stored)
    if same and set(state.sigma_rels) >= set(sigma_rels):
        return newest, state
    path = directory / STATE_NAME
    log.info("%s does not belong to the snapshots of t = %g, which are used instead", path, stored[0].t)
    return newest, None


def _complete(snapshots: Sequence[Snapshot], sigma_rels: Sequence[float]) -> list[list[Snapshot]]:
    """Return the snapshots of each time that has one of every profile, in the order of time and profiles."""
    by_time: dict[float, dict[float, Snapshot]] = {}
    for snapshot in snapshots:
        by_time.setdefault(snapshot.info.t, {})[snapshot.info.sigma_rel] = snapshot
    complete = [by_time[t] for t in sorted(by_time) if by_time[t].keys() >= set(sigma_rels)]
    return [[of_time[sigma_rel] for sigma_rel in sigma_rels] for of_time in complete]


def read_state_info(directory: Path) -> StateInfo | None:
    """Read the header of the state next to the snapshots; None where there is no such state, or a damaged one."""
    path = directory / STATE_NAME
    try:
        header = read_header(path) if path.is_file() else None
        return None if header is None or file_kind(header) != "state" else decode_state(path, header)
    except FileFormatError as error:
        _warn_of_damage(error)
        return None


def _warn_of_damage(error: FileFormatError) -> None:
    log.warning("%s; the averages continue from the snapshots, with their rounding", error)


@torch.inference_mode(False)
@torch.no_grad()
def _rounded_state(chosen: Sequence[Snapshot], tracked: TrackedModel) -> Tracking:
    """Load the averages from the snapshots of one time, one per profile, with their rounding."""
    last = chosen[0].info
    kept = AverageTensors(host_layout(tracked), len(chosen))
    inherited = tuple(_read_average(snapshot, high, tracked) for snapshot, high in zip(chosen, kept.high, strict=True))
    with chosen[0].open(tracked.boxes()) as file:
        copies = {name: read_tensor(file, name) for name, tensor in tracked.tensors.items() if tensor.role == "copy"}
    standing = Standing(last.t, last.step, last.t_first, last.max_interval, last.updates, 0, last.t, 0, inherited)
    averages = RunningAverages(
        tuple(snapshot.info.sigma_rel for snapshot in chosen), standing, kept, copies,
        known_path=path_of_part(chosen[0].info.sketch, tracked.part),
    )  # fmt: skip
    progress = TrainingProgress.resumed(ClockRecorder.of_knots(last.clock_pairs))
    return Tracking(last.run_id, progress, tracked, averages)


def _read_average(snapshot: Snapshot, average: FlatTensors, tracked: TrackedModel) -> float:
    """Fill `average` from a snapshot, and return the expected squared norm of its error."""
    expected = norm = 0.0
    boxes = tracked.boxes()
    with snapshot.open(boxes) as file:
        for name, view in average.views.items():
            value = read_tensor(file, name)
            view.copy_(value)
            if tracked.tensors[name].role == "statistic":
                continue  # the measurements in snapshots cover weights only
            square = float(torch.linalg.vector_norm(view, dtype=torch.float64)) ** 2
            norm += square
            if value.element_size() < view.element_size():
                expected += (ROUNDING * torch.finfo(value.dtype).eps) ** 2 * square
    info, measured = snapshot.info, snapshot.info.measurements
    before = [d for d in measured.distances if d.sigma_rel == info.sigma_rel] if measured is not None else []
    last = max(before, key=lambda d: d.t, default=None)
    moved, share = (math.inf, 1.0) if last is None else (last.squared, 1 - (last.t / info.t) ** (info.gamma + 1))
    rounding = expected if measured is None else measured.rounding
    # The snapshot's measurements cover the complete tensors; this process may own a part of them.
    part = 1.0 if boxes is None or measured is None else norm / measured.norm if measured.norm else 0.0
    error = error_after_rounding(part * info.inherited, part * rounding, expected, part * moved, share)
    return error if math.isfinite(error) else 0.0
