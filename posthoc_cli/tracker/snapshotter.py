"""The averages of one moment: as sources of a synthesis beside the snapshots on disk, and written as snapshots."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Generic, TypeVar

import torch

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, MismatchError, NonFiniteError
from posthoc_cli.snapshots.directory import (
    StoredSnapshot,
    find_snapshots,
    newest_before,
    on_schedule,
    set_aside,
    snapshot_path,
    thin,
)
from posthoc_cli.snapshots.format import BLOCK_BYTES, ITEM_BYTES, SnapshotInfo, TensorSpec, snapshot_metadata
from posthoc_cli.snapshots.lock import DirectoryLock
from posthoc_cli.snapshots.measurements import motion_so_far
from posthoc_cli.snapshots.tensors import stored_name, tensor_bytes
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.sources import Source
from posthoc_cli.tracker.averages import Accumulators, Rounded, RunningAverages, Standing
from posthoc_cli.tracker.measuring import measure_live, measure_stored
from posthoc_cli.tracker.model_tensors import nonfinite_name
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.state import STATE_NAME, TrackerState, Tracking, write_state

log = logging.getLogger(__name__)

_SAME = 1e-12
"""Relative difference of one norm, summed twice in float64 in different orders."""

_FITTED = 24
"""Snapshots that a new one's motion is fitted to; earlier ones' measurements are in their headers."""

Room = TypeVar("Room", Rounded, Accumulators)


@dataclass(frozen=True)
class Reading(Generic[Room]):
    """The averages as they were after one update.

    Attributes:
        tracking: of that moment, but for its averages, which go on.
        standing: of the averages.
        room: their tensors, on the host; None before the first update.
        copies: name -> tensor as it was, on the host.
    """

    tracking: Tracking
    standing: Standing
    room: Room | None
    copies: Mapping[str, torch.Tensor]


def exact_state(reading: Reading[Accumulators], snapshots: Sequence[str]) -> TrackerState:
    """The state that a reading holds."""
    averages = RunningAverages(reading.tracking.averages.sigma_rels, reading.standing, reading.room, reading.copies)
    return TrackerState(replace(reading.tracking, averages=averages), frozenset(snapshots))


# --- sources of a synthesis ---


@dataclass(frozen=True)
class LiveSource:
    """One running average, with its copies and the header that its snapshot would have."""

    info: SnapshotInfo
    averages: Mapping[str, torch.Tensor]
    copies: Mapping[str, torch.Tensor]

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Averages and copies."""
        return {**self.averages, **self.copies}

    @property
    def name(self) -> str:
        """For messages, in place of a file name."""
        return f"live average of sigma_rel {self.info.sigma_rel:g}"

    @cached_property
    def stored(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of its tensors."""
        return {n: TensorSpec(n, stored_name(one.dtype), tuple(one.shape)) for n, one in self.tensors.items()}

    def open(self) -> AbstractContextManager[Mapping[str, torch.Tensor]]:
        """Its tensors."""
        return nullcontext(self.tensors)


def live_sources(settings: Settings, reading: Reading[Rounded], off_schedule: bool = False) -> list[LiveSource]:
    """The running averages, one a profile; none before the first update."""
    if reading.room is None:
        return []
    tracking, standing = reading.tracking, reading.standing
    tracked, averages = tracking.tracked, tracking.averages
    knots = tracking.progress.clock.knots_until(standing.step, standing.t)
    sources = []
    for index, (sigma_rel, gamma) in enumerate(zip(averages.sigma_rels, averages.gammas, strict=True)):
        info = SnapshotInfo(
            run_id=tracking.run_id,
            sigma_rel=sigma_rel,
            gamma=gamma,
            sigma_rels=averages.sigma_rels,
            t=standing.t,
            t_unit=settings.t_unit,
            step=standing.step,
            clock=knots,
            t_first=standing.t_first,
            max_interval=standing.max_interval,
            schedule=settings.schedule,
            tensors=tracked.tensors,
            aliases=tracked.aliases,
            left_out=tracked.left_out,
            selection=settings.selection,
            segment=tracked.segment,
            updates=standing.updates,
            inherited=standing.inherited[index],
            off_schedule=off_schedule,
        )
        sources.append(LiveSource(info, reading.room.profiles[index].views, reading.copies))
    return sources


def current_sources(directory: Path, run_id: str, live: Sequence[LiveSource]) -> list[Source]:
    """Snapshots of a run on disk and, where they are newer, its live averages, measured; none of them twice."""
    snapshots = find_snapshots(directory)
    if snapshots and snapshots[0].info.run_id != run_id:
        snapshots = []
    own = {source.info.segment for source in live}
    alike = [StoredSnapshot.of(snapshot) for snapshot in snapshots if snapshot.info.segment in own]
    sources: list[Source] = list(_measured(live, alike))
    now = live[0].info.t if live else max((snapshot.info.t for snapshot in snapshots), default=0.0)
    held = {source.info.sigma_rel for source in live}
    for snapshot in snapshots:
        info = snapshot.info
        if info.t < now or (info.t == now and info.sigma_rel not in held):
            sources.append(snapshot)
    return sources


def _measured(live: Sequence[LiveSource], stored: Sequence[StoredSnapshot]) -> list[LiveSource]:
    """The same sources with measurements: those of their snapshots where these were just written, else new ones."""
    if not live:
        return []
    known = {(snapshot.t, snapshot.sigma_rel): snapshot.info.measurements for snapshot in stored}
    infos = [source.info for source in live]
    found = [known.get((info.t, info.sigma_rel)) for info in infos]
    if None in found:
        found = measure_live(infos, [source.averages for source in live], newest_before(infos[0], stored))
    return [
        replace(source, info=replace(source.info, measurements=measured and replace(measured, rounding=0.0)))
        for source, measured in zip(live, found, strict=True)
    ]


# --- snapshots ---


class Snapshotter:
    """The one writer of a directory, from its construction until `close`.

    Arguments:
        directory: made when it is missing.
        settings: of the tracker that writes.

    Raises:
        LockedError: another writer holds the directory.
        DirectoryError, FileFormatError, MismatchError: a file is in its place, or what is in it cannot be read, is
            damaged, or does not belong together.
        WriteError: the directory cannot be made or written.
    """

    def __init__(self, directory: Path, settings: Settings) -> None:
        self.directory = directory
        self._settings = settings
        with files.reported_as_write_error(directory):
            _check_no_file(directory)
            files.make_directory(directory)
        self._lock = DirectoryLock(directory)
        try:
            snapshots = find_snapshots(directory)
        except BaseException:
            self.close()
            raise
        # From here on nobody else writes: what is here need not be read again.
        self._run_id = snapshots[0].info.run_id if snapshots else None
        # By time: later ones are set aside before an earlier one is written.
        self._stored = [StoredSnapshot.of(snapshot) for snapshot in snapshots]
        self._kept_step = 0

    @property
    def checksums(self) -> list[str]:
        """Header checksums of the stored snapshots."""
        return [snapshot.checksum for snapshot in self._stored]

    def check_run(self, run_id: str) -> None:
        """Raise a MismatchError where the directory holds snapshots of another run."""
        if self._run_id not in (None, run_id):
            raise MismatchError(
                self.directory,
                f"holds snapshots of run {str(self._run_id)[:8]}, this tracker is run {run_id[:8]}",
                "continue that run with PostHocEMA.from_path, or use another directory",
            )

    def set_aside_others(self, t: float, known: Container[str]) -> None:
        """Set aside snapshots that are not part of a training that goes on from `t`.

        These are later than `t`, or their header checksums are not `known`: they are of another attempt, that went on
        from an earlier state.
        """
        own: list[StoredSnapshot] = []
        others: list[StoredSnapshot] = []
        for snapshot in self._stored:
            (own if snapshot.t <= t and snapshot.checksum in known else others).append(snapshot)
        for path in set_aside(others):
            log.warning("training goes on from t = %g: %s is not part of it and was set aside", t, path)
        self._stored = own

    def holding(self, averages: RunningAverages) -> frozenset[str]:
        """Header checksums of the snapshots off the schedule that hold these very averages.

        A state that was saved before they were written does not list them. Averages of another attempt at the same
        time would have other norms.
        """
        t, kept = averages.standing.t, averages.accumulators
        there = [s for s in self._stored if s.t == t and s.info.off_schedule and s.sigma_rel in averages.sigma_rels]
        if not there or kept is None:
            return frozenset()
        room = Rounded.on_host(kept)
        room.read(averages)
        norms = {
            sigma_rel: sum(
                float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2 for value in own.views.values()
            )
            for sigma_rel, own in zip(averages.sigma_rels, room.profiles, strict=True)
        }
        measured = [(s, s.info.measurements) for s in there]
        return frozenset(
            s.checksum for s, own in measured if own and math.isclose(own.norm, norms[s.sigma_rel], rel_tol=_SAME)
        )

    def is_behind(self, tracking: Tracking) -> bool:
        """Whether averages, or calls that the exact state counts, are not stored."""
        standing = tracking.averages.standing
        if not standing.t:
            return False
        # Calls may have been counted since that brought no update.
        kept_behind = self._settings.keep_state and self._kept_step != tracking.progress.step
        return kept_behind or not self._holds(standing)

    def is_behind_at_end(self, tracking: Tracking) -> bool:
        """The same at the end of training, if a last snapshot is wanted; logs why a directory stays empty."""
        standing, schedule = tracking.averages.standing, self._settings.schedule
        wanted = self._settings.final_snapshot or self._holds(standing)
        behind = wanted and self.is_behind(tracking)
        if not behind and not self._stored:
            log.warning(
                "%s: no snapshot: %s updates since the training began; update_every=%d, update_after_step=%d, "
                "checkpoint_every=%d, final_snapshot=%s",
                self.directory,
                standing.updates,
                schedule.update_every,
                schedule.update_after_step,
                schedule.checkpoint_every,
                self._settings.final_snapshot,
            )
        return behind

    def record(
        self,
        reading: Reading[Rounded],
        network: Mapping[str, torch.Tensor] | None,
        exact: Reading[Accumulators] | None,
        is_due: bool = True,
    ) -> None:
        """Write the averages of one time, thin, and replace the exact state where one is given.

        Arguments:
            network: the values of the model's parameters, where they are known.
            is_due: whether the schedule asks for it; else only what is not stored yet is written.
        """
        schedule, standing = self._settings.schedule, reading.standing
        if is_due or not self._holds(standing):
            off_schedule = not is_due and not self._settings.snapshot_is_due(standing.step)
            self.write(live_sources(self._settings, reading, off_schedule), network)
            self._stored = thin(self._stored, schedule.max_checkpoints, schedule.sigma_range)
        if exact is not None:  # after the snapshots, so that it is never of a later time
            write_state(self.directory / STATE_NAME, exact_state(exact, self.checksums), self._settings)
            self._kept_step = exact.tracking.progress.step

    def write(self, sources: Sequence[LiveSource], network: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the snapshots of one time, each durably, with their measurements.

        After skipped updates an average may be due that is stored already: it is not written again. Snapshots on the
        schedule are written, and measured, as if there were none off it.

        Raises:
            NonFiniteError: an average is not finite, by name; nothing is written.
            WriteError: the system refused. Snapshots of the other profiles may be there, each complete.
        """
        due = [not self._has_written(source.info) for source in sources]
        if not any(due):
            return
        infos = [source.info for source in sources]
        averages = [source.averages for source in sources]
        behind = self._stored if infos[0].off_schedule else on_schedule(self._stored)
        measured, storage = measure_stored(infos, averages, newest_before(infos[0], behind), network)
        for average, measurements in zip(averages, measured, strict=True):
            if measurements is None and (bad := nonfinite_name(average)) is not None:
                raise NonFiniteError(f"average of {bad!r}", "holds nan or infinity; no snapshot of it is written")
        for name, copy in sources[0].copies.items():
            if copy.is_floating_point() and bool(copy.isnan().any()):
                log.warning("tensor %r holds nan; it is copied as it is", name)
        infos = [replace(info, measurements=found) for info, found in zip(infos, measured, strict=True)]
        motion = motion_so_far([*(snapshot.info for snapshot in _newest(infos[0], behind)), *infos])
        for source, info, dtypes, is_due in zip(sources, infos, storage, due, strict=True):
            if is_due:
                self._write_one(replace(info, motion=motion), source, dtypes)

    def close(self) -> None:
        """Let another writer in."""
        self._lock.release()

    def _write_one(self, info: SnapshotInfo, source: LiveSource, dtypes: Mapping[str, torch.dtype]) -> None:
        tensors = source.tensors
        storage = {name: dtypes.get(name, tensor.dtype) for name, tensor in tensors.items()}
        specs = [
            TensorSpec(name, stored_name(dtype, name), tuple(tensors[name].shape)) for name, dtype in storage.items()
        ]
        path = snapshot_path(self.directory, info.t, info.sigma_rel)
        others = [snapshot for snapshot in self._stored if snapshot.path != path]
        replaces = len(others) < len(self._stored)  # one off the schedule, of the same average
        with TensorFileWriter(path, specs, snapshot_metadata(info), replaces) as writer:
            for names in _batches(specs):
                if len(names) > 1:
                    flat = [tensors[name].reshape(-1).to(storage[name]) for name in names]
                    writer.write_many(names, tensor_bytes(torch.cat(flat)))
                else:
                    _write_large(writer, names[0], tensors[names[0]], storage[names[0]])
            checksum = writer.commit()
        self._run_id = info.run_id
        self._stored = [*others, StoredSnapshot(path, info, checksum)]
        log.info("wrote %s", path)

    def _holds(self, standing: Standing) -> bool:
        """Whether each average has a snapshot as it stands."""
        there = {snapshot.sigma_rel for snapshot in self._stored if snapshot.t == standing.t}
        return there >= set(self._settings.sigma_rels)

    def _has_written(self, info: SnapshotInfo) -> bool:
        newest = takewhile(lambda s: s.t >= info.t, reversed(self._stored))
        same = (s for s in newest if (s.t, s.sigma_rel) == (info.t, info.sigma_rel))
        return any(info.off_schedule or not s.info.off_schedule for s in same)


def _check_no_file(directory: Path) -> None:
    for place in (directory, *directory.parents):
        if (place.exists() or place.is_symlink()) and not place.is_dir():
            raise DirectoryError(
                place,
                f"is not a directory; snapshots are written to the directory {directory}",
                "name another one, or move the file away",
            )


def _newest(info: SnapshotInfo, behind: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """The newest snapshots of this segment, as many as a motion is fitted to."""
    own = (s for s in reversed(behind) if s.info.segment == info.segment and s.info.measurements)
    return [snapshot for snapshot in islice(own, _FITTED) if snapshot.t < info.t][::-1]


def _batches(specs: Sequence[TensorSpec]) -> Iterator[list[str]]:
    """Names of small tensors of one dtype in batches, of large ones alone: few large writes are fast."""
    batch: list[str] = []
    dtype, nbytes = "", 0
    for spec in sorted(specs, key=lambda s: -ITEM_BYTES[s.dtype]):  # as they lie in the file
        if batch and (spec.dtype != dtype or nbytes + spec.nbytes > BLOCK_BYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(spec.name)
        dtype, nbytes = spec.dtype, nbytes + spec.nbytes
    if batch:
        yield batch


def _write_large(writer: TensorFileWriter, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Write a tensor block by block, so that no second copy of it is held."""
    flat = tensor.reshape(-1)
    out = writer.write_range(name, 0, flat.numel() * dtype.itemsize)
    for values in torch.split(flat, BLOCK_BYTES // dtype.itemsize):
        out.write(tensor_bytes(values.to(dtype)))
    out.close()
