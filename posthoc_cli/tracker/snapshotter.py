"""The averages of one update: written as snapshots, and as sources of a synthesis beside those on disk."""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import stored_name, torch_dtype
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
from posthoc_cli.reconstruction import MEASURED, Motion, measured_prior
from posthoc_cli.snapshots.directory import (
    ON_ONE_FILE_SYSTEM,
    StoredSnapshot,
    find_snapshots,
    list_directory,
    list_folder,
    newest_before,
    read_folders,
    snapshot_path,
)
from posthoc_cli.snapshots.format import (
    SnapshotInfo,
    TensorSpec,
    TrackingSchedule,
    encode_path,
    snapshot_metadata,
)
from posthoc_cli.snapshots.headers import decode_snapshot
from posthoc_cli.snapshots.reading import ElementRange
from posthoc_cli.snapshots.sources import Snapshot, Source
from posthoc_cli.snapshots.tensor_file import TensorFileWriter, read_header, tensor_bytes
from posthoc_cli.snapshots.writer import (
    LOCK_NAME,
    DirectoryLock,
    on_schedule,
    remove_leftovers,
    remove_snapshot,
    set_aside,
    thin,
)
from posthoc_cli.tracker.going_on import ways_on
from posthoc_cli.tracker.layout import HOST, Layout, buckets_of
from posthoc_cli.tracker.measuring import Subset, measurements
from posthoc_cli.tracker.running import RunningAverages
from posthoc_cli.tracker.sharding import PATIENCE, Members
from posthoc_cli.tracker.staging import StagedAverages
from posthoc_cli.tracker.state import STATE_NAME, Settings, Tracking, state_info, write_state
from posthoc_cli.tracker.worker import Worker

if TYPE_CHECKING:
    from posthoc_cli.tracker.spool import Spool

log = logging.getLogger(__name__)

_SAME = 1e-12  # relative difference of one norm, summed twice in float64 in different orders
_FITTED = 24  # snapshots that a new one's motion is fitted to; earlier ones' measurements are in their headers


# --- sources of a synthesis ---


@dataclass(frozen=True)
class LiveSource:
    """One running average, with its copies and the header that its snapshot would have.

    Attributes:
        stored: dtype and shape of its tensors.
        read: gives ranges of them, flat.
    """

    info: SnapshotInfo
    stored: Mapping[str, TensorSpec]
    read: Callable[[Sequence[ElementRange]], list[torch.Tensor]]

    @property
    def name(self) -> str:
        """For messages, in place of a file name."""
        return f"live average of sigma_rel {self.info.sigma_rel:g}"

    @property
    def profile(self) -> PowerFunction:
        """The power function that it tracks."""
        return self.info.profile.pure

    def open(self) -> AbstractContextManager[Callable[[Sequence[ElementRange]], list[torch.Tensor]]]:
        """What reads it."""
        return nullcontext(self.read)


def headers(settings: Settings, state: Tracking, off_schedule: bool = False) -> list[SnapshotInfo]:
    """What snapshots of a state's averages would say of themselves, one a profile."""
    averages, standing, tracked = state.averages, state.averages.standing, state.tracked
    knots, members = state.progress.clock.knots_until(standing.step, standing.t), tracked.members
    sketch = "" if averages.known_path is None else encode_path(averages.known_path)
    return [
        SnapshotInfo(
            run_id=state.run_id, sigma_rel=sigma_rel, gamma=gamma,
            sigma_rels=averages.sigma_rels, t=standing.t, t_unit=settings.t_unit, step=standing.step, clock=knots,
            t_first=standing.t_first, max_interval=standing.max_interval, schedule=settings.schedule,
            tensors=tracked.tensors, aliases=tracked.aliases, left_out=tracked.left_out,
            selection=settings.selection, updates=standing.updates,
            inherited=inherited, off_schedule=off_schedule, sketch=sketch, chunks=tracked.chunks,
            part=members.part, mesh=members.mesh, session=members.session,
        )
        for sigma_rel, gamma, inherited in zip(averages.sigma_rels, averages.gammas, standing.inherited, strict=True)
    ]  # fmt: skip


def live_sources(
    settings: Settings, state: Tracking, layout: Layout,
    read: Callable[[int, Sequence[ElementRange]], list[torch.Tensor]],
) -> list[LiveSource]:  # fmt: skip
    """The averages of a state, one a profile, of which `read` gives ranges, on the host, rounded once."""
    copies = state.averages.copies
    specs = {
        name: TensorSpec(name, stored_name(bucket.wide), shape)
        for bucket in layout
        for name, shape in zip(bucket.names, bucket.shapes, strict=True)
    }
    specs |= {name: TensorSpec(name, stored_name(one.dtype), tuple(one.shape)) for name, one in copies.items()}

    def own(index: int, ranges: Sequence[ElementRange]) -> list[torch.Tensor]:
        averages = iter(read(index, [one for one in ranges if one.name not in copies]))
        return [
            copies[one.name].reshape(-1)[one.begin : one.end] if one.name in copies else next(averages)
            for one in ranges
        ]

    return [LiveSource(info, specs, partial(own, index)) for index, info in enumerate(headers(settings, state))]


def run_snapshots(directory: Path, run_id: str) -> list[Snapshot]:
    """The snapshots of a run on disk; none where the directory is another run's."""
    snapshots = find_snapshots(directory)
    return snapshots if snapshots and snapshots[0].info.run_id == run_id else []


def with_older(live: Sequence[LiveSource], snapshots: Sequence[Snapshot]) -> list[Source]:
    """Live averages, and the snapshots of other averages up to their time."""
    now, held = live[0].info.t if live else math.inf, {source.info.sigma_rel for source in live}
    times = ((snapshot, snapshot.info.t) for snapshot in snapshots)
    return [*live, *(one for one, t in times if t < now or (t == now and one.info.sigma_rel not in held))]


def measured(live: Sequence[LiveSource], stored: Sequence[StoredSnapshot]) -> list[LiveSource]:
    """The same sources with measurements: those of their snapshots where these were just written, else new ones."""
    if not live:
        return []
    infos = [source.info for source in live]
    alike = (snapshot for snapshot in stored if snapshot.info.part == infos[0].part)
    known = {(snapshot.t, snapshot.sigma_rel): snapshot.info.measurements for snapshot in alike}
    found = [known.get((info.t, info.sigma_rel)) for info in infos]
    if None in found:
        own = {name: live[0].stored[name] for name in infos[0].averages if name in live[0].stored}
        layout = buckets_of({name: (HOST, torch_dtype(spec.dtype), spec.shape) for name, spec in own.items()})
        subset = Subset(layout, own)
        values = [subset.read(source.read) for source in live]
        found = measurements(infos, subset, values, newest_before(infos[0], stored))
    return [
        replace(source, info=replace(source.info, measurements=one and replace(one, rounding=0.0)))
        for source, one in zip(live, found, strict=True)
    ]


# --- snapshots ---


class Snapshotter:
    """The one writer of a directory, which it makes when it is missing, from its construction until `close`.

    Attributes:
        written: how often snapshots were written, and the bytes of the last ones.

    Raises:
        LockedError: another writer holds the directory.
        DirectoryError, FileFormatError, MismatchError, WriteError: it cannot be one, be read, or be written; or it is
            another one than rank 0's, on a disk of this process's own.
    """

    def __init__(self, directory: Path, settings: Settings, members: Members) -> None:
        self.directory = directory
        self.written = (0, 0)
        self._settings, self._members = settings, members
        self._leads = members.rank == 0
        with files.reported_as_write_error(directory):
            files.make_directory(directory)
        self._lock = DirectoryLock(directory) if self._leads else None
        self._spool: Spool | None = None
        self._uploads, self._has_waited = Worker("uploads"), False
        if not self._leads and not files.is_url(directory):
            _check_shared(directory)
        try:
            if files.is_url(directory):
                from posthoc_cli.tracker import spool

                assert isinstance(directory, spool.SpooledPath)
                self._spool = spool.Spool(directory, members.part, self._leads)
            if self._leads:
                remove_leftovers(directory)
                # Parts of a killed attempt and of this one could look like one snapshot.
                for folder, there in read_folders(list_directory(directory)).incomplete.items():
                    log.warning("%s: has %s, left by an interrupted training, and is removed", folder, there)
                    remove_snapshot(folder)
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
    def checksums(self) -> frozenset[str]:
        """Header checksums of the stored snapshots."""
        return frozenset(snapshot.checksum for snapshot in self._stored)

    def distances(self) -> dict[float, float]:
        """How far each average was from the network when it was last stored, relative to its norm, by sigma_rel."""
        newest = {one.sigma_rel: one.info.measurements for one in self._stored}
        known = {sigma_rel: one for sigma_rel, one in newest.items() if one is not None and one.weights is not None}
        return {sigma_rel: math.sqrt((one.weights or 0.0) / one.norm) for sigma_rel, one in known.items() if one.norm}

    def check_run(self, run_id: str) -> None:
        """Raise a MismatchError where the directory holds snapshots of another run."""
        if self._run_id not in (None, run_id):
            reason = f"holds snapshots of run {str(self._run_id)[:8]}, this tracker is run {run_id[:8]}"
            hint = f"{ways_on(self._stored[-1].info.step)}; for a new run name another directory"
            raise MismatchError(self.directory, reason, hint)

    def stored(self, off_schedule: bool = True) -> list[StoredSnapshot]:
        """The stored snapshots, or those on the schedule."""
        return self._stored if off_schedule else on_schedule(self._stored)

    def read_again(self) -> None:
        """Know the stored snapshots as states do: as complete ones."""

    def set_aside_others(self, t: float, known: Container[str]) -> None:
        """Set aside snapshots later than `t`, or of another attempt that went on from an earlier state: not `known`."""
        own: list[StoredSnapshot] = []
        others: list[StoredSnapshot] = []
        for snapshot in self._stored:
            (own if snapshot.t <= t and snapshot.checksum in known else others).append(snapshot)
        if moved := set_aside(others) if self._leads else []:
            names = ", ".join(path.name for path in moved[:2]) + f" and {len(moved) - 2:,} more" * (len(moved) > 2)
            what = f"{len(moved):,} snapshot{'s' * (len(moved) > 1)}, later or of another attempt"
            log.warning("training goes on from t = %s: %s, moved to %s: %s", f"{t:,.12g}", what, moved[0].parent, names)
        self._stored = own

    def holding(self, averages: RunningAverages, norms: Mapping[float, float]) -> frozenset[str]:
        """Header checksums of the snapshots off the schedule that hold these very averages, of these squared norms.

        A state that was saved before they were written does not list them. Averages of another attempt at the same
        time would have other norms.
        """
        there = [s for s in self._stored if s.t == averages.standing.t and s.info.off_schedule]
        measured = [(s, s.info.measurements.norm) for s in there if s.info.measurements and s.sigma_rel in norms]
        return frozenset(s.checksum for s, norm in measured if math.isclose(norm, norms[s.sigma_rel], rel_tol=_SAME))

    def is_behind(self, tracking: Tracking, at_end: bool = False) -> bool:
        """Whether averages, or calls that the exact state counts, are not stored.

        At the end of training, whether a last snapshot is wanted, too; logs why a directory stays empty.
        """
        settings, standing, schedule = self._settings, tracking.averages.standing, self._settings.schedule
        holds = self._holds(standing.t)
        # Calls may have been counted since that brought no update.
        kept_behind = settings.keep_state and self._kept_step != tracking.progress.step
        behind = standing.t > 0 and (kept_behind or not holds)
        if at_end and not behind and not self._stored and not files.is_gone(self.directory):
            log.warning(
                "%s: no snapshot: %s updates since the training began; update_every=%d, update_after_step=%d",
                self.directory, standing.updates, schedule.update_every, schedule.update_after_step,
            )  # fmt: skip
        return behind

    def record(self, state: Tracking, staged: StagedAverages, exact: Tracking | None, is_due: bool = True) -> None:
        """Write the averages of one time, thin, and replace the exact state where one is given.

        Of `state` the averages are `staged`. Without `is_due` only what is not stored yet is written.
        """
        standing = state.averages.standing
        self._wait_for_room()
        if is_due or not self._holds(standing.t):
            off_schedule = not is_due and not self._settings.snapshot_is_due(standing.step)
            try:
                if files.is_gone(self.directory):
                    reason = f"was deleted: the averages of step {standing.step} are lost"
                    raise WriteError(self.directory, reason, errno=errno.ENOENT)
                infos = zip(headers(self._settings, state, off_schedule), staged.samples, strict=True)
                self.write([replace(info, sample=one) for info, one in infos], staged, state.averages.copies)
                self._thin()
            except PostHocError as error:
                self._members.announce_failure(error)
                raise
        if exact is not None:  # after the snapshots, so that it is never of a later time
            info = state_info(replace(exact, snapshots=self.checksums), self._settings)
            write_state(self.directory / STATE_NAME, exact, info)
            self._kept_step = exact.progress.step
        if self._spool is not None:
            self._spool.kept = frozenset([*self._newest(), self.directory / STATE_NAME])
            if not self._spool.is_due:  # while a store fails, each takes long
                self._spool.is_due = True
                self._uploads.submit(self._spool.sync)

    def upload(self) -> None:
        """Return when everything written is in the store of a run by URL; a WriteError if it cannot be uploaded."""
        if self._spool is not None:
            self._uploads.call(partial(self._spool.sync, must=True))

    def take_error(self) -> Exception | None:
        """An error of uploading; each is returned once."""
        return self._uploads.take_error()

    def _wait_for_room(self) -> None:
        """Return when the spool of a run by URL can take more."""
        if self._spool is None or self._spool.has_room():
            return
        if not self._has_waited:
            what = (
                "%s: training waits for uploads: files that wait for theirs take more than is free on the spool's disk"
            )
            log.warning(what, self.directory)
            self._has_waited = True
        while not self._spool.has_room():
            self._uploads.call(self._spool.sync)
            time.sleep(0.1)

    def _newest(self) -> list[Path]:
        """The snapshots that the next ones are measured against, see `newest_before`."""
        kept = []
        for stored in (self._stored, on_schedule(self._stored)):
            for sigma_rel in self._settings.sigma_rels:
                kept += [one.path for one in stored if one.sigma_rel == sigma_rel][-2:]
        return kept

    def write(self, infos: Sequence[SnapshotInfo], staged: StagedAverages, copies: Mapping[str, torch.Tensor]) -> None:
        """Write the snapshots of one time, each durably, with their measurements, or none where one is not finite.

        After skipped updates an average may be due that is stored already: it is not written again. Snapshots on the
        schedule are written, and measured, as if there were none off it.
        """
        due = [not self._has(info.t, info.sigma_rel, scheduled=not info.off_schedule) for info in infos]
        if not any(due):
            return
        behind = self.stored(infos[0].off_schedule)
        for bad in filter(None, staged.nonfinite):
            raise NonFiniteError(f"average of {bad!r}", "holds nan or infinity; no snapshot of it is written")
        subset, before = staged.layout.subset, newest_before(infos[0], behind)
        found = measurements(infos, subset, staged.averages, before, staged.stored, staged.network)
        for name, copy in copies.items():
            if copy.is_floating_point() and bool(copy.isnan().any()):
                log.warning("tensor %r holds nan; it is copied as it is", name)
        infos = [replace(info, measurements=one) for info, one in zip(infos, found, strict=True)]
        motion = self._motion(behind, infos)
        nbytes = 0
        for index, (info, is_due) in enumerate(zip(infos, due, strict=True)):
            if is_due:
                nbytes += self._write_one(replace(info, motion=motion), staged, index, copies)
        self.written = (self.written[0] + 1, nbytes)

    def _motion(self, behind: Sequence[StoredSnapshot], infos: Sequence[SnapshotInfo]) -> Motion | None:
        """The motion up to these snapshots, for their headers; None if too few were measured."""
        known = (snapshot for snapshot in reversed(behind) if snapshot.info.measurements)
        fitted = [snapshot.info for snapshot in islice(known, _FITTED) if snapshot.t < infos[0].t][::-1]
        prior = measured_prior([info.average() for info in [*fitted, *infos]])
        is_known = prior.source == MEASURED and prior.motion.edges[0] > 0  # an assumed motion begins at time 0
        return prior.motion.handed_on() if is_known else None

    def _thin(self) -> None:
        schedule = self._settings.schedule
        self._stored = thin(self._stored, schedule.max_checkpoints, schedule.sigma_range)

    def close(self) -> None:
        """Let another writer in, when everything written is uploaded, or that was tried."""
        spool, self._spool = self._spool, None
        if spool is not None:
            spool.kept = frozenset()
            self._uploads.submit(spool.sync)
            self._uploads.close()
            spool.close()
        if self._lock is not None:
            self._lock.release()

    def _write_one(
        self, info: SnapshotInfo, staged: StagedAverages, index: int, copies: Mapping[str, torch.Tensor]
    ) -> int:
        """Write the snapshot of the average of that index; returns its tensors' bytes."""
        others = staged.others[index]
        dtypes = staged.layout.dtypes | {name: one.dtype for name, one in others.items()}
        specs = [TensorSpec(n, stored_name(dtype, n), staged.layout.shapes[n]) for n, dtype in dtypes.items()]
        specs += [TensorSpec(n, stored_name(one.dtype, n), tuple(one.shape)) for n, one in copies.items()]
        path = snapshot_path(self.directory, info.t, info.sigma_rel, info.part)
        if info.part is not None:
            with files.reported_as_write_error(path.parent):
                files.make_directory(path.parent)
        earlier = [snapshot for snapshot in self._stored if snapshot.path != path]
        # One off the schedule, of the same average; or of a process that has outlived its training.
        replaces = len(earlier) < len(self._stored) or (info.part is not None and _is_earlier(path, info))
        with TensorFileWriter(path, specs, snapshot_metadata(info), replaces) as writer:
            for names, flats in staged.flats(index):
                if len(flats) == 1:
                    writer.write_many(names, tensor_bytes(flats[0]))
                else:
                    out = writer.write_range(names[0], 0)
                    for flat in flats:
                        out.write(tensor_bytes(flat))
            for name, tensor in (others | dict(copies)).items():
                writer.write(name, tensor_bytes(tensor))
            checksum = writer.commit()
        self._run_id = info.run_id
        self._stored = [*earlier, StoredSnapshot(path, info, checksum)]
        log.info("wrote %s", path)
        return sum(spec.nbytes for spec in specs)

    def _holds(self, t: float) -> bool:
        """Whether each average of a time has a snapshot."""
        return all(self._has(t, sigma_rel) for sigma_rel in self._settings.sigma_rels)

    def _has(self, t: float, sigma_rel: float, scheduled: bool = False) -> bool:
        newest = takewhile(lambda s: s.t >= t, reversed(self._stored))
        same = (s for s in newest if (s.t, s.sigma_rel) == (t, sigma_rel))
        return any(not (scheduled and s.info.off_schedule) for s in same)


class PartSnapshotter(Snapshotter):
    """One of the processes that write to a directory together, each its part of every snapshot.

    The first one has the directory's lock, and thins.
    """

    @property
    def checksums(self) -> frozenset[str]:
        """Header checksums of the stored snapshots that are complete."""
        own, complete = {(one.t, one.sigma_rel) for one in self._stored}, self._complete()
        return frozenset(one.checksum for key, one in complete.items() if key in own)

    def distances(self) -> dict[float, float]:
        """None: each process has measured its own part only."""
        return {}

    def stored(self, off_schedule: bool = True) -> list[StoredSnapshot]:
        """As above, without those that another process has removed."""
        return [*filter(_is_there, super().stored(off_schedule))]

    def read_again(self) -> None:
        """As above: this process knows the parts that it has written."""
        self._stored = [*self._complete().values()]

    def _motion(self, behind: Sequence[StoredSnapshot], infos: Sequence[SnapshotInfo]) -> None:
        """None: each process has measured its own part only."""

    def _thin(self) -> None:
        with suppress(RemoteError):  # of a store that does not answer: the next snapshots thin
            self._stored = [*filter(_is_there, self._stored)]
            if self._leads:
                self._warn_of_incomplete()
                self._thin_complete(self._settings.schedule)

    def _thin_complete(self, schedule: TrackingSchedule) -> None:
        """Thin the times of which everything is there: another process may die before it has written its part."""
        if schedule.max_checkpoints is None:
            return
        complete = self._complete()
        unfinished = {snapshot.t for snapshot in self._stored if (snapshot.t, snapshot.sigma_rel) not in complete}
        finished = [complete[s.t, s.sigma_rel] for s in self._stored if s.t not in unfinished]
        left = thin(finished, schedule.max_checkpoints, schedule.sigma_range)
        kept = {(snapshot.t, snapshot.sigma_rel) for snapshot in left}
        self._stored = [s for s in self._stored if s.t in unfinished or (s.t, s.sigma_rel) in kept]

    def _warn_of_incomplete(self) -> None:
        """Warn of the third newest snapshots if they still lack parts: each process writes one time after the other."""
        times = sorted({snapshot.t for snapshot in self._stored})
        for path, part in [(s.path, s.info.part) for s in self._stored if s.t in times[-3:-2]]:
            if part is not None and (there := len(list_folder(path.parent).files)) < part[1]:
                what = "%s: has %d of %d parts only, though later ones were written: %s; and pass the same t to update_"
                log.warning(what, path.parent, there, part[1], ON_ONE_FILE_SYSTEM)

    def _complete(self) -> dict[tuple[float, float], StoredSnapshot]:
        """The snapshots of which all parts are there, by time and sigma_rel."""
        return {(s.info.t, s.info.sigma_rel): StoredSnapshot.of(s) for s in find_snapshots(self.directory)}


def _check_shared(directory: Path) -> None:
    """Raise a DirectoryError unless this process sees the lock that rank 0 has made; a network may show it late."""
    until = time.monotonic() + PATIENCE
    while not (directory / LOCK_NAME).exists():
        if time.monotonic() > until:
            reason = "is not the directory of that name in which rank 0 writes"
            raise DirectoryError(directory, reason, ON_ONE_FILE_SYSTEM)
        time.sleep(0.1)


def _is_there(snapshot: StoredSnapshot) -> bool:
    """Whether a snapshot is there; also where its store does not answer."""
    try:
        return snapshot.path.exists()
    except RemoteError:
        return True


def _is_earlier(path: Path, own: SnapshotInfo) -> bool:
    """Whether there is a part of an earlier training under a name."""
    with suppress(FileFormatError, RemoteError):  # or there is none
        return decode_snapshot(path, read_header(path)).session < own.session
    return False
