"""The directory side of a tracker: the lock, whose run it is, writing snapshots, thinning."""

from __future__ import annotations

import logging
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path

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
from posthoc_cli.tracker.averages import Accumulators, RunningAverages, Standing
from posthoc_cli.tracker.layout import on_host
from posthoc_cli.tracker.live import LiveSource, Reading, Tracking, Values, live_sources
from posthoc_cli.tracker.measuring import measure_stored
from posthoc_cli.tracker.model_tensors import nonfinite_name
from posthoc_cli.tracker.pipeline import Writer
from posthoc_cli.tracker.resuming import STATE_NAME
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.state import TrackerState
from posthoc_cli.tracker.state_file import write_state

log = logging.getLogger(__name__)

_SAME = 1e-12
"""Relative difference of one norm, summed twice in float64 in different orders."""

_FITTED = 24
"""Snapshots that a motion is fitted to when another one is written; what those before told is in their headers."""


class Recorder:
    """The one writer of a directory, from the moment it is made until `close`.

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
        """Header checksums of what is stored."""
        return [snapshot.checksum for snapshot in self._stored]

    def check_run(self, run_id: str) -> None:
        """Raise a MismatchError where the directory holds snapshots of another run."""
        if self._run_id not in (None, run_id):
            raise MismatchError(
                self.directory,
                f"holds snapshots of run {str(self._run_id)[:8]}, this tracker is run {run_id[:8]}: "
                "continue that run with PostHocEMA.from_path, or take another directory",
            )

    def set_aside_others(self, t: float, known: Container[str]) -> None:
        """Set aside what the training that goes on from `t` has not behind it.

        Snapshots later than `t`, and those whose header checksums are not `known`: they are of another attempt, that
        went on from an earlier state.
        """
        own: list[StoredSnapshot] = []
        others: list[StoredSnapshot] = []
        for snapshot in self._stored:
            (own if snapshot.t <= t and snapshot.checksum in known else others).append(snapshot)
        for path in set_aside(others):
            log.warning("training goes on from t = %g: %s is not on its way and was set aside", t, path)
        self._stored = own

    def holding(self, averages: RunningAverages) -> frozenset[str]:
        """Header checksums of the snapshots off the schedule that hold these very averages.

        A state that was saved before they were written does not know them. Of another attempt, averages of the same
        time would have other norms.
        """
        t, kept = averages.standing.t, averages.accumulators
        there = [s for s in self._stored if s.t == t and s.info.off_schedule and s.sigma_rel in averages.sigma_rels]
        if not there or kept is None:
            return frozenset()
        room = Values(on_host(kept.layout), len(averages.sigma_rels))
        averages.read(room.tensors)
        norms = {
            sigma_rel: sum(
                float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2 for value in own.views.values()
            )
            for sigma_rel, own in zip(averages.sigma_rels, room.tensors, strict=True)
        }
        measured = [(s, s.info.measurements) for s in there]
        return frozenset(
            s.checksum for s, own in measured if own and math.isclose(own.norm, norms[s.sigma_rel], rel_tol=_SAME)
        )

    # --- what is due -------------------------------------------------------------------------------

    def record(
        self,
        reading: Reading[Values],
        weights: Mapping[str, torch.Tensor] | None,
        exact: Reading[Accumulators] | None,
        off_schedule: bool = False,
    ) -> None:
        """Write the averages of one time, thin, and keep the exact state where one is given."""
        self.write(live_sources(self._settings, reading, off_schedule), weights)
        schedule = self._settings.schedule
        self._stored = thin(self._stored, schedule.max_checkpoints, schedule.sigma_range)
        self._keep(exact)

    def missing(self, tracking: Tracking) -> Writer | None:
        """What writes the averages at any time; None where there are none, or all of this is written."""
        standing = tracking.averages.standing
        if not standing.t:
            return None
        if not self._holds(standing):
            return partial(self.record, off_schedule=not self._settings.snapshot_is_due(standing.step))
        # Calls may have been counted since that brought no update.
        behind = self._settings.keep_state and self._kept_step != tracking.progress.step
        return (lambda _, __, exact: self._keep(exact)) if behind else None

    def last(self, tracking: Tracking) -> Writer | None:
        """The same at the end of training, where it is wanted then; why a directory stays empty goes to the log."""
        standing, schedule = tracking.averages.standing, self._settings.schedule
        wanted = self._settings.final_snapshot or self._holds(standing)
        writer = self.missing(tracking) if wanted else None
        if writer is None and not self._stored:
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
        return writer

    def _holds(self, standing: Standing) -> bool:
        """Whether each average has a snapshot as it stands."""
        there = {snapshot.sigma_rel for snapshot in self._stored if snapshot.t == standing.t}
        return there >= set(self._settings.sigma_rels)

    def _keep(self, exact: Reading[Accumulators] | None) -> None:
        """Replace the exact state beside the snapshots; after them, so that it is never of a later time."""
        if exact is None:
            return
        state = TrackerState.of(exact, frozenset(self.checksums))
        write_state(self.directory / STATE_NAME, state, self._settings)
        self._kept_step = state.step

    # --- writing -----------------------------------------------------------------------------------

    def write(self, sources: Sequence[LiveSource], weights: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the snapshots of one time, each durably, with what is measured of them.

        After skipped updates an average may be due that is stored already: that one is not written again. Snapshots on
        the schedule are written, and measured, as if there were none off it.

        Arguments:
            sources: the running averages, one a profile.
            weights: the network's, at the time of the averages; None where they are not at hand.

        Raises:
            NonFiniteError: an average is not finite, by name; nothing is written.
            WriteError: the system refused. Snapshots of the other profiles may be there, each whole.
        """
        due = [not self._has_written(source.info) for source in sources]
        if not any(due):
            return
        infos = [source.info for source in sources]
        averages = [source.averages for source in sources]
        behind = self._stored if infos[0].off_schedule else on_schedule(self._stored)
        measured, storage = measure_stored(infos, averages, newest_before(infos[0], behind), weights)
        for average, measurements in zip(averages, measured, strict=True):
            if measurements is None:
                _check_finite(average)
        _warn_of_nan(sources[0].copies)
        infos = [replace(info, measurements=found) for info, found in zip(infos, measured, strict=True)]
        motion = motion_so_far([*(snapshot.info for snapshot in _newest(infos[0], behind)), *infos])
        for source, info, dtypes, is_due in zip(sources, infos, storage, due, strict=True):
            if is_due:
                self._write(replace(info, motion=motion), source, dtypes)

    def _write(self, info: SnapshotInfo, source: LiveSource, dtypes: Mapping[str, torch.dtype]) -> None:
        tensors = {**source.averages, **source.copies}
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
                    parts = [tensors[name].reshape(-1).to(storage[name]) for name in names]
                    writer.write_many(names, tensor_bytes(torch.cat(parts)))
                else:
                    _write_large(writer, names[0], tensors[names[0]], storage[names[0]])
            checksum = writer.commit()
        self._run_id = info.run_id
        self._stored = [*others, StoredSnapshot(path, info, checksum)]
        log.info("wrote %s", path)

    def _has_written(self, info: SnapshotInfo) -> bool:
        newest = takewhile(lambda s: s.t >= info.t, reversed(self._stored))
        same = (s for s in newest if (s.t, s.sigma_rel) == (info.t, info.sigma_rel))
        return any(info.off_schedule or not s.info.off_schedule for s in same)

    def close(self) -> None:
        """Let another writer in."""
        self._lock.release()


def _check_no_file(directory: Path) -> None:
    """Raise a DirectoryError where a file is in the place of a directory or of one of its parents."""
    for place in (directory, *directory.parents):
        if (place.exists() or place.is_symlink()) and not place.is_dir():
            raise DirectoryError(
                place,
                f"is not a directory; snapshots are written to the directory {directory}: name another one, "
                "or move the file away",
            )


def _newest(info: SnapshotInfo, behind: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """The newest snapshots of this segment, as many as are worth fitting a motion to."""
    own = (s for s in reversed(behind) if s.info.segment == info.segment and s.info.measurements)
    return [snapshot for snapshot in islice(own, _FITTED) if snapshot.t < info.t][::-1]


def _batches(specs: Sequence[TensorSpec]) -> Iterator[list[str]]:
    """Names of small tensors of one dtype in batches, of large ones alone: a file is written in large pieces."""
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
    part = writer.write_range(name, 0, flat.numel() * dtype.itemsize)
    for values in torch.split(flat, BLOCK_BYTES // dtype.itemsize):
        part.write(tensor_bytes(values.to(dtype)))
    part.close()


def _check_finite(averages: Mapping[str, torch.Tensor]) -> None:
    bad = nonfinite_name(averages)
    if bad is not None:
        raise NonFiniteError(f"average of {bad!r}", "holds nan or infinity; no snapshot of it is written")


def _warn_of_nan(copies: Mapping[str, torch.Tensor]) -> None:
    for name, copy in copies.items():
        if copy.is_floating_point() and bool(copy.isnan().any()):
            log.warning("tensor %r holds nan; it is copied as it is", name)
