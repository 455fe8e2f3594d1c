"""The averages of one update: written as snapshots, and as sources of a synthesis in addition to those on disk."""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES, stored_name
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    MismatchError,
    NonFiniteError,
    PostHocError,
    RemoteError,
    WriteError,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.directory import (
    LOCK_NAME,
    ON_ONE_FILE_SYSTEM,
    DirectoryLock,
    find_snapshots,
    inspect_directory,
    list_folder,
    remove_leftovers,
    remove_snapshot,
    set_aside,
    snapshot_path,
    thin,
)
from posthoc_cli.snapshots.path import decode_sample, encode_path, squared_distance
from posthoc_cli.snapshots.snapshot import Snapshot, TrackingSchedule, read_one
from posthoc_cli.snapshots.sources import ElementRange, Source
from posthoc_cli.snapshots.tensorfile import Box, Entry, TensorFileWriter, tensor_bytes
from posthoc_cli.tracker.averages import Averages
from posthoc_cli.tracker.layout import Layout
from posthoc_cli.tracker.resuming import ways_to_resume
from posthoc_cli.tracker.sharding import PATIENCE, Members
from posthoc_cli.tracker.staging import StagedAverages
from posthoc_cli.tracker.state import Settings, Tracking

log = logging.getLogger(__name__)

_SAME_NORM = 1e-12  # largest relative difference of one norm, summed twice in float64 in different orders


# --- sources of a synthesis ---


@dataclass(frozen=True)
class LiveSource:
    """One running average, with its copies and the header that its snapshot would have.

    Attributes:
        entries: dtype and shape of its tensors.
        read: returns ranges of them, flat.
    """

    info: Snapshot
    entries: Mapping[str, Entry]
    read: Callable[[Sequence[ElementRange]], list[torch.Tensor]]

    @property
    def name(self) -> str:
        """The source's name in messages, in place of a file name."""
        return f"live average of sigma_rel {self.info.sigma_rel:g}"

    @property
    def profile(self) -> PowerFunction:
        """The power function that the average tracks."""
        return self.info.profile

    def read_box(self, name: str, box: Box, out: memoryview, begin: int = 0) -> None:  # noqa: ARG002 - this process has no other
        """Fill `out` with the elements from `begin` on of the box that this process holds; see `Source`."""
        end = begin + len(out) // ITEM_BYTES[self.entries[name].dtype]
        (values,) = self.read([ElementRange(name, begin, end)])
        out[:] = tensor_bytes(values)

    def read_many(self, names: Sequence[str], out: memoryview) -> None:
        """Fill `out` with complete tensors, end to end; see `Source`."""
        at = 0
        for values in self.read([ElementRange(name, 0, self.entries[name].size) for name in names]):
            data = tensor_bytes(values)
            out[at : at + len(data)] = data
            at += len(data)


def headers(
    settings: Settings, state: Tracking, measurements: Sequence[Measurements | None], off_schedule: bool = False
) -> list[Snapshot]:
    """Return the headers of snapshots of a state's averages, one a profile."""
    averages, standing, tracked = state.averages, state.averages.standing, state.tracked
    knots, members = state.progress.clock.knots_until(standing.step, standing.t), tracked.members
    sketch = encode_path(averages.known_path)
    return [
        Snapshot(
            run_id=state.run_id, sigma_rel=sigma_rel, gamma=gamma,
            sigma_rels=averages.sigma_rels, t=standing.t, t_unit=settings.t_unit, step=standing.step, clock=knots,
            t_first=standing.t_first, max_interval=standing.max_interval, schedule=settings.schedule,
            tensors=tracked.tensors, aliases=tracked.aliases, left_out=tracked.left_out,
            selection=settings.selection, skip_nonfinite=settings.on_nonfinite == "skip", updates=standing.updates,
            inherited=inherited, off_schedule=off_schedule, measurements=measured, sketch=sketch, chunks=tracked.chunks,
            part=members.part, mesh=members.mesh, session=members.session,
        )
        for sigma_rel, gamma, inherited, measured in zip(
            averages.sigma_rels, averages.gammas, standing.errors, measurements, strict=True
        )
    ]  # fmt: skip


def live_sources(
    settings: Settings, state: Tracking, layout: Layout, measurements: Sequence[Measurements | None],
    read: Callable[[int, Sequence[ElementRange]], list[torch.Tensor]],
) -> list[LiveSource]:  # fmt: skip
    """Return the averages of a state as sources, one a profile; `read` returns ranges of averages, on the host."""
    copies = state.averages.copies
    specs = {
        name: Entry(stored_name(bucket.wide), shape)
        for bucket in layout
        for name, shape in zip(bucket.names, bucket.shapes, strict=True)
    }
    specs |= {name: Entry(stored_name(copy.dtype), tuple(copy.shape)) for name, copy in copies.items()}

    def read_with_copies(index: int, ranges: Sequence[ElementRange]) -> list[torch.Tensor]:
        averages = iter(read(index, [piece for piece in ranges if piece.name not in copies]))
        return [copies[name].reshape(-1)[i:j] if name in copies else next(averages) for name, i, j in ranges]

    infos = headers(settings, state, measurements)
    return [LiveSource(info, specs, partial(read_with_copies, index)) for index, info in enumerate(infos)]


def run_snapshots(directory: Path, run_id: str) -> list[Snapshot]:
    """Return the snapshots of a run on disk; none if the directory belongs to another run."""
    snapshots = find_snapshots(directory)
    return snapshots if snapshots and snapshots[0].info.run_id == run_id else []


def with_snapshots(live: Sequence[LiveSource], snapshots: Sequence[Snapshot]) -> list[Source]:
    """Return live averages, and the snapshots of other averages up to their time."""
    now, profiles = live[0].info.t if live else math.inf, {source.info.sigma_rel for source in live}
    infos = ((snapshot, snapshot.info) for snapshot in snapshots)
    return [*live, *(s for s, info in infos if info.t < now or (info.t == now and info.sigma_rel not in profiles))]


# --- snapshots ---


class Snapshotter:
    """The one writer of a directory, from its construction until `close`; makes the directory if it is missing.

    Attributes:
        written: the number of times with snapshots that were written, and the bytes of the last snapshots.

    Raises:
        LockedError: another writer holds the directory.
        DirectoryError, FileFormatError, MismatchError, WriteError: the path is no directory, cannot be read or written,
            or is not rank 0's directory but one on this process's local disk.
    """

    def __init__(self, directory: Path, settings: Settings, members: Members) -> None:
        self.directory = directory
        self.written = (0, 0)
        self._settings, self._members = settings, members
        self._leads = members.rank == 0
        with files.reported_as_write_error(directory):
            files.make_directory(directory)
        self._lock = DirectoryLock(directory) if self._leads else None
        if not self._leads:
            _check_shared(directory)
        try:
            if self._leads:
                remove_leftovers(directory)
                # Parts of an interrupted training and of this one could look like one snapshot.
                for folder, parts in inspect_directory(directory).incomplete.items():
                    log.warning("%s: has %s, left by an interrupted training, and is removed", folder, parts)
                    remove_snapshot(folder)
            snapshots = find_snapshots(directory)
        except BaseException:
            self.close()
            raise
        # From now on nobody else writes to the directory, so that it need not be read again.
        self._run_id = snapshots[0].info.run_id if snapshots else None
        # Ordered by time: later snapshots are set aside before an earlier one is written.
        self._stored = [*snapshots]

    @property
    def checksums(self) -> frozenset[str]:
        """Header checksums of the stored snapshots."""
        return frozenset(snapshot.checksum for snapshot in self._stored)

    def distances(self) -> dict[float, float]:
        """Return each average's distance from the model when it was last stored, relative to its norm, by sigma_rel.

        It is estimated from the sample in the header, see `snapshots.path`.
        """
        distances = {}
        for sigma_rel, newest in {snapshot.sigma_rel: snapshot for snapshot in self._stored}.items():
            weights, average = decode_sample(newest.sample)
            shapes = {name: newest.entries[name].shape for name in newest.averages}
            if len(weights) and (norm := squared_distance(average, 0 * average, shapes)):
                distances[sigma_rel] = math.sqrt(squared_distance(weights, average, shapes) / norm)
        return distances

    def check_run(self, run_id: str) -> None:
        """Raise a MismatchError if the directory holds snapshots of another run."""
        if self._run_id not in (None, run_id):
            reason = f"holds snapshots of run {str(self._run_id)[:8]}, this tracker is run {run_id[:8]}"
            hint = f"{ways_to_resume(self._stored[-1].info.step)}; for a new run name another directory"
            raise MismatchError(self.directory, reason, hint)

    def list_complete(self) -> None:
        """Replace the parts of this process by complete snapshots, as states list them; a sole writer has no parts."""

    def set_aside_others(self, t: float, known: Container[str]) -> None:
        """Set aside snapshots later than `t`, or not `known`: of another attempt that resumed from an earlier state."""
        own: list[Snapshot] = []
        others: list[Snapshot] = []
        for snapshot in self._stored:
            (own if snapshot.t <= t and snapshot.checksum in known else others).append(snapshot)
        if moved := set_aside(others) if self._leads else []:
            names = ", ".join(path.name for path in moved[:2]) + f" and {len(moved) - 2:,} more" * (len(moved) > 2)
            what = f"{len(moved):,} snapshot{'s' * (len(moved) > 1)}, later or of another attempt"
            log.warning(
                "training continues from t = %s: %s, moved to %s: %s", f"{t:,.12g}", what, moved[0].parent, names
            )
        self._stored = own

    def holding(self, averages: Averages, norms: Mapping[float, float]) -> frozenset[str]:
        """Return the header checksums of the snapshots off the schedule that hold these averages, of these norms.

        A state that was saved before such a snapshot was written does not list it. Averages of another attempt at the
        same time would have other squared norms.
        """
        same_time = [s for s in self._stored if s.t == averages.standing.t and s.info.off_schedule]
        stored = [(s, s.info.measurements.norm) for s in same_time if s.info.measurements and s.sigma_rel in norms]
        return frozenset(s.checksum for s, norm in stored if math.isclose(norm, norms[s.sigma_rel], rel_tol=_SAME_NORM))

    def is_behind(self, tracking: Tracking, at_end: bool = False) -> bool:
        """Return whether the averages are not stored; with `at_end`, log why a directory stays empty."""
        standing, schedule = tracking.averages.standing, self._settings.schedule
        behind = standing.t > 0 and not self._holds(standing.t)
        if at_end and not behind and not self._stored and not files.is_absent(self.directory):
            log.warning(
                "%s: no snapshot: %s updates since the training began; update_every=%d, update_after_step=%d",
                self.directory, standing.updates, schedule.update_every, schedule.update_after_step,
            )  # fmt: skip
        return behind

    def record(self, state: Tracking, staged: StagedAverages, is_due: bool = True) -> None:
        """Write the snapshots of one time, and thin.

        `staged` are the averages of `state`. Without `is_due` only averages that are not stored yet are written.
        """
        standing = state.averages.standing
        if is_due or not self._holds(standing.t):
            off_schedule = not is_due and not self._settings.snapshot_is_due(standing.step)
            try:
                if files.is_absent(self.directory):
                    reason = f"was deleted: the averages of step {standing.step} are lost"
                    raise WriteError(self.directory, reason, errno=errno.ENOENT)
                made = headers(self._settings, state, staged.measurements, off_schedule)
                infos = zip(made, staged.samples, strict=True)
                self.write([replace(info, sample=sample) for info, sample in infos], staged, state.averages.copies)
                self._thin()
            except PostHocError as error:
                self._members.announce_failure(error)
                raise

    def write(self, infos: Sequence[Snapshot], staged: StagedAverages, copies: Mapping[str, torch.Tensor]) -> None:
        """Write the snapshots of one time durably; none if an average is not finite.

        After skipped updates, an average that is due may be stored already: then it is not written again. Snapshots on
        the schedule are written as if none existed off the schedule.
        """
        due = [not self._has(info.t, info.sigma_rel, scheduled=not info.off_schedule) for info in infos]
        if not any(due):
            return
        for bad in filter(None, staged.nonfinite):
            raise NonFiniteError(f"average of {bad!r}", "holds nan or infinity; no snapshot of it is written")
        for name, copy in copies.items():
            if copy.is_floating_point() and bool(copy.isnan().any()):
                log.warning("tensor %r holds nan, and is copied unchanged", name)
        nbytes = 0
        for index, (info, is_due) in enumerate(zip(infos, due, strict=True)):
            if is_due:
                nbytes += self._write_one(info, staged, index, copies)
        self.written = (self.written[0] + 1, nbytes)

    def _thin(self) -> None:
        schedule = self._settings.schedule
        self._stored = thin(self._stored, schedule.max_checkpoints, schedule.sigma_range)

    def close(self) -> None:
        """Release the directory for another writer."""
        if self._lock is not None:
            self._lock.release()

    def _write_one(self, info: Snapshot, staged: StagedAverages, index: int, copies: Mapping[str, torch.Tensor]) -> int:
        """Write the snapshot of the average of that index; return the bytes of its tensors."""
        others = staged.others[index]
        dtypes = staged.layout.dtypes | {name: tensor.dtype for name, tensor in others.items()}
        entries = {n: Entry(stored_name(dtype, n), staged.layout.shapes[n]) for n, dtype in dtypes.items()}
        entries |= {n: Entry(stored_name(copy.dtype, n), tuple(copy.shape)) for n, copy in copies.items()}
        path = snapshot_path(self.directory, info.t, info.sigma_rel, info.part)
        if info.part is not None:
            with files.reported_as_write_error(path.parent):
                files.make_directory(path.parent)
        kept = [snapshot for snapshot in self._stored if snapshot.path != path]
        # The path may hold a snapshot of the same average off the schedule, or a part of an earlier training's process.
        replaces = len(kept) < len(self._stored) or (info.part is not None and _is_of_earlier_session(path, info))
        with TensorFileWriter(path, entries, info.encoded(), info.for_dcp, replaces) as writer:
            for names, flats in staged.flats(index):
                if len(flats) == 1:
                    writer.write_many(names, tensor_bytes(flats[0]))
                else:
                    writer.write_parts(names[0], map(tensor_bytes, flats))
            for name, tensor in (others | dict(copies)).items():
                writer.write(name, tensor_bytes(tensor))
            file = writer.commit()
        self._run_id = info.run_id
        self._stored = [*kept, replace(info, path=path, files=(file,), entries=file.entries)]
        log.info("wrote %s", path)
        return sum(entry.nbytes for entry in entries.values())

    def _holds(self, t: float) -> bool:
        """Return whether each average of a time has a snapshot."""
        return all(self._has(t, sigma_rel) for sigma_rel in self._settings.sigma_rels)

    def _has(self, t: float, sigma_rel: float, scheduled: bool = False) -> bool:
        """Return whether an average has a snapshot, or with `scheduled` one on the schedule."""
        newest = takewhile(lambda s: s.t >= t, reversed(self._stored))
        same = (s for s in newest if (s.t, s.sigma_rel) == (t, sigma_rel))
        return any(not (scheduled and s.info.off_schedule) for s in same)


class PartSnapshotter(Snapshotter):
    """The writer of one process of several that write a part of every snapshot to one directory.

    The process with rank 0 has the directory's lock, and thins.
    """

    @property
    def checksums(self) -> frozenset[str]:
        """Header checksums of the stored snapshots that are complete."""
        own, complete = {(part.t, part.sigma_rel) for part in self._stored}, self._complete()
        return frozenset(snapshot.checksum for key, snapshot in complete.items() if key in own)

    def distances(self) -> dict[float, float]:
        """Return no distances: each process has measured only its own part."""
        return {}

    def list_complete(self) -> None:
        """Replace the list of this process's parts by that of the complete snapshots."""
        self._stored = [*self._complete().values()]

    def _thin(self) -> None:
        with suppress(RemoteError):  # if the store does not answer, the next snapshots thin
            self._stored = [*filter(_exists, self._stored)]
            if self._leads:
                self._warn_of_incomplete()
                self._thin_complete(self._settings.schedule)

    def _thin_complete(self, schedule: TrackingSchedule) -> None:
        """Thin the times whose snapshots are complete: another process may die before it has written its part."""
        if schedule.max_checkpoints is None:
            return
        complete = self._complete()
        unfinished = {snapshot.t for snapshot in self._stored if (snapshot.t, snapshot.sigma_rel) not in complete}
        finished = [complete[s.t, s.sigma_rel] for s in self._stored if s.t not in unfinished]
        left = thin(finished, schedule.max_checkpoints, schedule.sigma_range)
        kept = {(snapshot.t, snapshot.sigma_rel) for snapshot in left}
        self._stored = [s for s in self._stored if s.t in unfinished or (s.t, s.sigma_rel) in kept]

    def _warn_of_incomplete(self) -> None:
        """Warn if the third newest snapshots still lack parts, although each process writes in order of time."""
        times = sorted({snapshot.t for snapshot in self._stored})
        for path, part in [(s.path, s.info.part) for s in self._stored if s.t in times[-3:-2]]:
            if part is not None and (count := len(list_folder(path.parent).files)) < part[1]:
                what = "%s: has %d of %d parts only, though later ones were written: %s; and pass the same t to update_"
                log.warning(what, path.parent, count, part[1], ON_ONE_FILE_SYSTEM)

    def _complete(self) -> dict[tuple[float, float], Snapshot]:
        """Return the snapshots whose parts are complete, by time and sigma_rel."""
        return {(s.t, s.sigma_rel): s for s in find_snapshots(self.directory)}


def _check_shared(directory: Path) -> None:
    """Raise a DirectoryError unless this process sees rank 0's lock file; a network file system may show it late."""
    until = time.monotonic() + PATIENCE
    while not (directory / LOCK_NAME).exists():
        if time.monotonic() > until:
            reason = "is not the directory of that name in which rank 0 writes"
            raise DirectoryError(directory, reason, ON_ONE_FILE_SYSTEM)
        time.sleep(0.1)


def _exists(snapshot: Snapshot) -> bool:
    """Return whether a snapshot exists; True if its store does not answer."""
    try:
        return snapshot.path.exists()
    except RemoteError:
        return True


def _is_of_earlier_session(path: Path, own: Snapshot) -> bool:
    """Return whether the path holds a part of an earlier session of the training."""
    with suppress(FileFormatError, RemoteError):  # there is no readable part
        return read_one(path).session < own.session
    return False
