"""The averages of one moment: measured, written as snapshots, and as sources of a synthesis beside those on disk.

Measurements are norms, rounding errors and distances, taken in one pass, tensor by tensor, in chunks that stay in the
cache. Differences of float32 values are taken in float32, their squares and sums in float64.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, islice, takewhile
from pathlib import Path

import torch

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES, stored_name, torch_dtype
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    MismatchError,
    NonFiniteError,
    PostHocError,
    WriteError,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import MEASURED, Distance, Measurements, Motion, measured_prior
from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.directory import (
    ON_ONE_FILE_SYSTEM,
    StoredSnapshot,
    find_snapshots,
    list_directory,
    list_folder,
    newest_before,
    on_schedule,
    read_folders,
    read_snapshot,
    remove_leftovers,
    remove_snapshot,
    set_aside,
    snapshot_path,
    thin,
)
from posthoc_cli.snapshots.format import (
    BLOCK_BYTES,
    SnapshotInfo,
    TensorSpec,
    encode_path,
    encode_sample,
    snapshot_metadata,
)
from posthoc_cli.snapshots.headers import decode_snapshot
from posthoc_cli.snapshots.lock import LOCK_NAME, DirectoryLock
from posthoc_cli.snapshots.sources import OpenSnapshot, Snapshot, Source
from posthoc_cli.snapshots.tensor_file import TensorFile, TensorFileWriter, read_header, tensor_bytes, tensor_from_bytes
from posthoc_cli.tracker.averages import Accumulators, RunningAverages, Sampler, on_host, on_host_in_order
from posthoc_cli.tracker.model_tensors import EIGHT_BITS, nonfinite_name
from posthoc_cli.tracker.settings import Settings
from posthoc_cli.tracker.sharding import PATIENCE, Members
from posthoc_cli.tracker.state import STATE_NAME, Tracking, state_info, ways_on, write_state

log = logging.getLogger(__name__)

CPU_CHUNK, DEVICE_CHUNK = 30_000, 2**24
"""Elements at a time. On the CPU a chunk stays in the cache, and has fewer than torch splits over threads (32,768),
whose barriers would wait for seconds; on an accelerator starting a kernel costs more than leaving the cache."""

_SAME = 1e-12  # relative difference of one norm, summed twice in float64 in different orders
_FITTED = 24  # snapshots that a new one's motion is fitted to; earlier ones' measurements are in their headers

Averages = Sequence[Mapping[str, torch.Tensor]]  # of one time, one a profile: equal names, shapes and devices
Key = tuple[str, int, int]
"""What a sum is of: "norm" or "rounding" of the average (i, i), its distance from the "network" (i, i), the "live"
distance of the averages (i, j), i < j, or the "earlier" distance of the average i from the snapshot j."""


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

    @property
    def profile(self) -> PowerFunction:
        """The power function that it tracks."""
        return self.info.profile.pure

    @cached_property
    def stored(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of its tensors."""
        return {n: TensorSpec(n, stored_name(one.dtype), tuple(one.shape)) for n, one in self.tensors.items()}

    def open(self) -> AbstractContextManager[Mapping[str, torch.Tensor]]:
        """Its tensors."""
        return nullcontext(self.tensors)


def live_sources(settings: Settings, reading: Tracking, off_schedule: bool = False) -> list[LiveSource]:
    """The running averages of a reading, one a profile; none before the first update."""
    averages, standing, tracked = reading.averages, reading.averages.standing, reading.tracked
    if averages.accumulators is None:
        return []
    knots, members = reading.progress.clock.knots_until(standing.step, standing.t), tracked.members
    sketch = "" if averages.known_path is None else encode_path(averages.known_path)
    sources = []
    for index, values in enumerate(averages.accumulators.high):
        info = SnapshotInfo(
            run_id=reading.run_id, sigma_rel=averages.sigma_rels[index], gamma=averages.gammas[index],
            sigma_rels=averages.sigma_rels, t=standing.t, t_unit=settings.t_unit, step=standing.step, clock=knots,
            t_first=standing.t_first, max_interval=standing.max_interval, schedule=settings.schedule,
            tensors=tracked.tensors, aliases=tracked.aliases, left_out=tracked.left_out,
            selection=settings.selection, updates=standing.updates,
            inherited=standing.inherited[index], off_schedule=off_schedule, sketch=sketch, chunks=tracked.chunks,
            part=members.part if members else None, mesh=members.mesh if members else {},
            session=members.session if members else 0,
        )  # fmt: skip
        sources.append(LiveSource(info, values.views, averages.copies))
    return sources


def current_sources(directory: Path, run_id: str, live: Sequence[LiveSource]) -> list[Source]:
    """Snapshots of a run on disk and, where they are newer, its live averages, measured; none of them twice."""
    snapshots = run_snapshots(directory, run_id)
    return with_older(measured(live, [*map(StoredSnapshot.of, snapshots)]), snapshots)


def run_snapshots(directory: Path, run_id: str) -> list[Snapshot]:
    """The snapshots of a run on disk; none where the directory is another run's."""
    snapshots = find_snapshots(directory)
    return snapshots if snapshots and snapshots[0].info.run_id == run_id else []


def with_older(live: Sequence[LiveSource], snapshots: Sequence[Snapshot]) -> list[Source]:
    """Live averages, and the snapshots of other averages up to their time."""
    sources: list[Source] = list(live)
    now = live[0].info.t if live else max((snapshot.info.t for snapshot in snapshots), default=0.0)
    held = {source.info.sigma_rel for source in live}
    for snapshot in snapshots:
        info = snapshot.info
        if info.t < now or (info.t == now and info.sigma_rel not in held):
            sources.append(snapshot)
    return sources


def measured(live: Sequence[LiveSource], stored: Sequence[StoredSnapshot]) -> list[LiveSource]:
    """The same sources with measurements: those of their snapshots where these were just written, else new ones."""
    if not live:
        return []
    infos = [source.info for source in live]
    alike = (snapshot for snapshot in stored if snapshot.info.part == infos[0].part)
    known = {(snapshot.t, snapshot.sigma_rel): snapshot.info.measurements for snapshot in alike}
    found = [known.get((info.t, info.sigma_rel)) for info in infos]
    if None in found:
        found, _ = measure(infos, [source.averages for source in live], newest_before(infos[0], stored), stored=False)
    return [
        replace(source, info=replace(source.info, measurements=one and replace(one, rounding=0.0)))
        for source, one in zip(live, found, strict=True)
    ]


# --- snapshots ---


class Snapshotter:
    """The one writer of a directory, which it makes when it is missing, from its construction until `close`.

    Of several `members` each writes its part; the first one holds the directory's lock, and thins.

    Attributes:
        written: how often snapshots were written, and the bytes of the last ones.

    Raises:
        LockedError: another writer holds the directory.
        DirectoryError, FileFormatError, MismatchError, WriteError: it cannot be one, be read, or be written; or it is
            another one than rank 0's, on a disk of this process's own.
    """

    def __init__(self, directory: Path, settings: Settings, members: Members | None = None) -> None:
        self.directory = directory
        self.written = (0, 0)
        self._settings, self._members = settings, members
        self._leads = members is None or members.rank == 0
        with files.reported_as_write_error(directory):
            for place in (directory, *directory.parents):
                if (place.exists() or place.is_symlink()) and not place.is_dir():
                    reason = f"is not a directory; snapshots are written to the directory {directory}"
                    raise DirectoryError(place, reason, "name another one, or move the file away")
            files.make_directory(directory)
        self._lock = DirectoryLock(directory) if self._leads else None
        if not self._leads:
            _check_shared(directory)
        try:
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
        """Header checksums of the stored snapshots; of several processes, of those that are complete."""
        if self._members is None:
            return frozenset(snapshot.checksum for snapshot in self._stored)
        own, complete = {(one.t, one.sigma_rel) for one in self._stored}, self._complete()
        return frozenset(one.checksum for key, one in complete.items() if key in own)

    def distances(self) -> dict[float, float]:
        """How far each average was from the network when it was last stored, relative to its norm, by sigma_rel."""
        newest = {one.sigma_rel: one.info.measurements for one in self._stored if self._members is None}
        known = {sigma_rel: one for sigma_rel, one in newest.items() if one is not None and one.weights is not None}
        return {sigma_rel: math.sqrt((one.weights or 0.0) / one.norm) for sigma_rel, one in known.items() if one.norm}

    def check_run(self, run_id: str) -> None:
        """Raise a MismatchError where the directory holds snapshots of another run."""
        if self._run_id not in (None, run_id):
            reason = f"holds snapshots of run {str(self._run_id)[:8]}, this tracker is run {run_id[:8]}"
            hint = f"{ways_on(self._stored[-1].info.step)}; for a new run name another directory"
            raise MismatchError(self.directory, reason, hint)

    def stored(self, off_schedule: bool = True) -> list[StoredSnapshot]:
        """The stored snapshots, or those on the schedule; of several processes another one may have removed some."""
        among = self._stored if off_schedule else on_schedule(self._stored)
        return [one for one in among if self._members is None or one.path.exists()]

    def read_again(self) -> None:
        """Know the snapshots of which this process has written parts as complete ones, as states do."""
        if any(snapshot.info.part is not None for snapshot in self._stored):
            self._stored = [*self._complete().values()]

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

    def holding(self, averages: RunningAverages, norms: Callable[[], Mapping[float, float]]) -> frozenset[str]:
        """Header checksums of the snapshots off the schedule that hold these very averages, of these squared norms.

        A state that was saved before they were written does not list them. Averages of another attempt at the same
        time would have other norms.
        """
        there = [s for s in self._stored if s.t == averages.standing.t and s.info.off_schedule]
        found = norms() if there else {}
        measured = [(s, s.info.measurements.norm) for s in there if s.info.measurements and s.sigma_rel in found]
        return frozenset(s.checksum for s, norm in measured if math.isclose(norm, found[s.sigma_rel], rel_tol=_SAME))

    def is_behind(self, tracking: Tracking, at_end: bool = False) -> bool:
        """Whether averages, or calls that the exact state counts, are not stored.

        At the end of training, whether a last snapshot is wanted, too; logs why a directory stays empty.
        """
        settings, standing, schedule = self._settings, tracking.averages.standing, self._settings.schedule
        holds = self._holds(standing.t)
        # Calls may have been counted since that brought no update.
        kept_behind = settings.keep_state and self._kept_step != tracking.progress.step
        behind = standing.t > 0 and (kept_behind or not holds) and (not at_end or settings.final_snapshot or holds)
        if at_end and not behind and not self._stored and not files.is_gone(self.directory):
            log.warning(
                "%s: no snapshot: %s updates since the training began; update_every=%d, update_after_step=%d, "
                "checkpoint_every=%d, final_snapshot=%s",
                self.directory, standing.updates, schedule.update_every, schedule.update_after_step,
                schedule.checkpoint_every, settings.final_snapshot,
            )  # fmt: skip
        return behind

    def record(
        self, reading: Tracking, network: Mapping[str, torch.Tensor] | None, exact: Tracking | None, is_due: bool = True
    ) -> None:
        """Write the averages of one time, thin, and replace the exact state where one is given.

        `network` are the values of the model's parameters, where known. Without `is_due` only what is not stored yet
        is written.
        """
        standing = reading.averages.standing
        if is_due or not self._holds(standing.t):
            off_schedule = not is_due and not self._settings.snapshot_is_due(standing.step)
            try:
                if files.is_gone(self.directory):
                    reason = f"was deleted: the averages of step {standing.step} are lost"
                    raise WriteError(self.directory, reason, errno=errno.ENOENT)
                sources = [_with_sample(one, reading) for one in live_sources(self._settings, reading, off_schedule)]
                self.write(sources, network)
                self._thin()
            except PostHocError as error:
                if self._members is not None:
                    self._members.announce("failed", f"rank {self._members.rank}: {error}")
                raise
        if exact is not None:  # after the snapshots, so that it is never of a later time
            info = state_info(replace(exact, snapshots=self.checksums), self._settings)
            write_state(self.directory / STATE_NAME, exact, info)
            self._kept_step = exact.progress.step

    def write(self, sources: Sequence[LiveSource], network: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the snapshots of one time, each durably, with their measurements, or none where one is not finite.

        After skipped updates an average may be due that is stored already: it is not written again. Snapshots on the
        schedule are written, and measured, as if there were none off it.
        """
        infos = [source.info for source in sources]
        due = [not self._has(info.t, info.sigma_rel, scheduled=not info.off_schedule) for info in infos]
        if not any(due):
            return
        averages = [source.averages for source in sources]
        behind = self.stored(infos[0].off_schedule)
        found, storage = measure(infos, averages, newest_before(infos[0], behind), network)
        for average, measurements in zip(averages, found, strict=True):
            if measurements is None and (bad := nonfinite_name(average)) is not None:
                raise NonFiniteError(f"average of {bad!r}", "holds nan or infinity; no snapshot of it is written")
        for name, copy in sources[0].copies.items():
            if copy.is_floating_point() and bool(copy.isnan().any()):
                log.warning("tensor %r holds nan; it is copied as it is", name)
        infos = [replace(info, measurements=one) for info, one in zip(infos, found, strict=True)]
        # The newest snapshots, as many as a motion is fitted to.
        known = (snapshot for snapshot in reversed(behind) if snapshot.info.measurements)
        fitted = [snapshot.info for snapshot in islice(known, _FITTED) if snapshot.t < infos[0].t][::-1]
        # Of several processes each knows the measurements of its own part only.
        motion = _motion_so_far([*fitted, *infos]) if self._members is None else None
        nbytes = 0
        for source, info, dtypes, is_due in zip(sources, infos, storage, due, strict=True):
            if is_due:
                nbytes += self._write_one(replace(info, motion=motion), source, dtypes)
        self.written = (self.written[0] + 1, nbytes)

    def _thin(self) -> None:
        schedule = self._settings.schedule
        if self._members is None:
            self._stored = thin(self._stored, schedule.max_checkpoints, schedule.sigma_range)
            return
        self._stored = [snapshot for snapshot in self._stored if snapshot.path.exists()]
        if self._leads:
            self._warn_of_incomplete()
        if self._leads and schedule.max_checkpoints is not None:
            # Only times of which everything is there: another process may die before it has written its part.
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

    def close(self) -> None:
        """Let another writer in."""
        if self._lock is not None:
            self._lock.release()

    def _write_one(self, info: SnapshotInfo, source: LiveSource, dtypes: Mapping[str, torch.dtype]) -> int:
        """Write a snapshot; returns the bytes of its tensors."""
        tensors = source.tensors
        storage = {name: dtypes.get(name, tensor.dtype) for name, tensor in tensors.items()}
        specs = [TensorSpec(name, stored_name(storage[name], name), tuple(one.shape)) for name, one in tensors.items()]
        path = snapshot_path(self.directory, info.t, info.sigma_rel, info.part)
        if info.part is not None:
            with files.reported_as_write_error(path.parent):
                files.make_directory(path.parent)
        others = [snapshot for snapshot in self._stored if snapshot.path != path]
        # One off the schedule, of the same average; or of a process that has outlived its training.
        replaces = len(others) < len(self._stored) or _is_earlier(path, info)
        with TensorFileWriter(path, specs, snapshot_metadata(info), replaces) as writer:
            for names in _batches(specs):
                tensor, dtype = tensors[names[0]], storage[names[0]]
                if len(names) > 1:
                    flat = torch.cat([tensors[name].reshape(-1).to(dtype) for name in names])
                    writer.write_many(names, tensor_bytes(flat))
                else:  # block by block, so that no second copy of it is held
                    out = writer.write_range(names[0], 0)
                    for values in torch.split(tensor.reshape(-1), BLOCK_BYTES // dtype.itemsize):
                        out.write(tensor_bytes(values.to(dtype)))
                    out.close()
            checksum = writer.commit()
        self._run_id = info.run_id
        self._stored = [*others, StoredSnapshot(path, info, checksum)]
        log.info("wrote %s", path)
        return sum(spec.nbytes for spec in specs)

    def _holds(self, t: float) -> bool:
        """Whether each average of a time has a snapshot."""
        return all(self._has(t, sigma_rel) for sigma_rel in self._settings.sigma_rels)

    def _has(self, t: float, sigma_rel: float, scheduled: bool = False) -> bool:
        newest = takewhile(lambda s: s.t >= t, reversed(self._stored))
        same = (s for s in newest if (s.t, s.sigma_rel) == (t, sigma_rel))
        return any(not (scheduled and s.info.off_schedule) for s in same)


def _check_shared(directory: Path) -> None:
    """Raise a DirectoryError unless this process sees the lock that rank 0 has made; a network may show it late."""
    until = time.monotonic() + PATIENCE
    while not (directory / LOCK_NAME).exists():
        if time.monotonic() > until:
            reason = "is not the directory of that name in which rank 0 writes"
            raise DirectoryError(directory, reason, ON_ONE_FILE_SYSTEM)
        time.sleep(0.1)


def _is_earlier(path: Path, own: SnapshotInfo) -> bool:
    """Whether there is a part of an earlier training under a name."""
    if own.part is None or not path.exists():
        return False
    with suppress(FileFormatError):
        return decode_snapshot(path, read_header(path)).session < own.session
    return False


def _motion_so_far(infos: Sequence[SnapshotInfo]) -> Motion | None:
    """The motion up to the newest snapshots, for their headers; None if too few were measured."""
    prior = measured_prior([info.average() for info in infos])
    known = prior.source == MEASURED and prior.motion.edges[0] > 0  # an assumed motion begins at time 0
    return prior.motion.handed_on() if known else None


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


def _with_sample(source: LiveSource, reading: Tracking) -> LiveSource:
    """The same source with a sample of the network at its time, where that is known, and of itself."""
    elements, taken = reading.tracked.sampled, reading.averages.sample
    if not taken:
        return source
    values = on_host_in_order(Sampler(source.averages, elements).take())
    return replace(source, info=replace(source.info, sample=encode_sample(on_host_in_order(taken), values)))


# --- measurements ---


def squared_norms(state: Tracking) -> dict[float, float]:
    """The squared norm of each average, rounded as it would be in a snapshot, by its sigma_rel."""
    averages, tensors = state.averages, state.tracked.tensors
    kept = averages.accumulators
    if kept is None:
        return {}
    room = Accumulators(on_host(kept.layout), len(kept.high), exact=False)
    averages.read(room.high)
    return {
        sigma_rel: sum(float(_square(value)) for name, value in own.views.items() if tensors[name].role == "average")
        for sigma_rel, own in zip(averages.sigma_rels, room.high, strict=True)
    }


def measure(
    infos: Sequence[SnapshotInfo],
    averages: Averages,
    earlier: Sequence[StoredSnapshot],
    network: Mapping[str, torch.Tensor] | None = None,
    stored: bool = True,
) -> tuple[list[Measurements | None], list[dict[str, torch.dtype]]]:
    """Measurements of averages, and the dtypes to store them in if they are to be, by name; one a profile each.

    Measurements are None where a value is not finite, or the squares are too large for float64. Memory: a tensor of
    each of the `earlier` snapshots at a time. These are read from disk and verified; one that is gone or damaged is
    left out, with a warning.
    """
    sums: dict[Key, float] = defaultdict(float)
    storage: list[dict[str, torch.dtype]] = [{} for _ in infos]
    boxes = {name: chunk.box(averages[0][name].shape) for name, chunk in infos[0].chunks.items() if name in averages[0]}
    with _EarlierFiles(earlier, boxes) as others:
        for name in (name for name in averages[0] if infos[0].tensors[name].role == "average"):
            exact = {index: _flat(average[name]) for index, average in enumerate(averages)}
            wanted = {
                index: torch_dtype(info.schedule.checkpoint_dtype or info.tensors[name].dtype)
                for index, info in enumerate(infos if stored else ())
            }
            own = None if network is None else _flat(network[name].detach())
            found = _sums_of(exact, wanted, others.read(name, exact[0].device), own)
            for i in wanted:
                storage[i][name] = _widened(exact[i], wanted[i], i, found)
            for key, value in found.items():
                sums[key] += value
        return [_measurements(sums, infos, index, others.readable()) for index in range(len(infos))], storage


def _measurements(
    sums: Mapping[Key, float], infos: Sequence[SnapshotInfo], index: int, earlier: Mapping[int, StoredSnapshot]
) -> Measurements | None:
    """The measurements of the average of that index, from its sums over all tensors."""
    norm = sums.get(("norm", index, index), 0.0)
    if not math.isfinite(norm):
        return None
    found = [
        (info.t, info.sigma_rel, sums.get(("live", min(index, j), max(index, j)), 0.0), 0.0)
        for j, info in enumerate(infos)
        if j != index
    ]
    part = infos[index].part
    for j, snapshot in earlier.items():
        if snapshot.info.measurements is not None:
            # Readers add the parts'. Of a complete snapshot the first part tells it alone.
            counts = snapshot.info.part == part or part is None or part[0] == 1
            rounding = snapshot.info.measurements.rounding if counts else 0.0
            found.append((snapshot.t, snapshot.sigma_rel, sums.get(("earlier", index, j), 0.0), rounding))
    # The difference of two large numbers may overflow where neither does.
    finite = tuple(Distance(*distance) for distance in found if math.isfinite(distance[2]))
    network = sums.get(("network", index, index), math.inf)
    rounding = sums.get(("rounding", index, index), 0.0)
    return Measurements(norm, rounding, finite, network if math.isfinite(network) else None)


def _sums_of(
    averages: Mapping[int, torch.Tensor],
    stored: Mapping[int, torch.dtype],
    earlier: Mapping[int, torch.Tensor],
    network: torch.Tensor | None = None,
) -> dict[Key, float]:
    """All sums of one tensor, flat in averages, earlier snapshots and the network; `stored` are dtypes of storage."""
    first = averages[min(averages)]
    chunk = CPU_CHUNK if first.device.type == "cpu" else DEVICE_CHUNK
    total: dict[Key, torch.Tensor] = {}

    def add(kind: str, i: int, j: int, values: torch.Tensor) -> None:
        square, key = _square(values), (kind, i, j)
        total[key] = total[key] + square if key in total else square

    for begin in range(0, first.numel(), chunk):
        part = slice(begin, begin + chunk)
        cut = {i: average[part] for i, average in averages.items()}
        for i, average in cut.items():
            add("norm", i, i, average)
            if i in stored:
                add("rounding", i, i, average - _with_arithmetic(average.to(stored[i])))
            if network is not None:
                add("network", i, i, average - network[part].to(average.device, average.dtype))
            for j, snapshot in earlier.items():
                add("earlier", i, j, average - snapshot[part])
        for i, j in combinations(cut, 2):
            add("live", i, j, cut[i] - cut[j])
    # One synchronisation a tensor, not one a sum.
    values = torch.stack(list(total.values())).tolist() if total else []
    return defaultdict(float, zip(total, values, strict=True))


def _square(values: torch.Tensor) -> torch.Tensor:
    """The squared norm of a vector, float64."""
    norm: torch.Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
    return norm.square()


def _with_arithmetic(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype in EIGHT_BITS else tensor


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """A vector of the elements, row-major, on a device that has float64: not on Apple's GPUs."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).reshape(-1)


def _widened(average: torch.Tensor, wanted: torch.dtype, index: int, sums: dict[Key, float]) -> torch.dtype:
    """The dtype to store a tensor in: the wanted one, or wider where that would lose more than its rounding.

    Rounding to nearest costs at most half a unit in the last place, eps / 2 relative; more where a value becomes
    infinite, or all are about as small as the subnormal numbers. Leaves the rounding of that dtype in `sums`.
    """
    norm, rounding = ("norm", index, index), ("rounding", index, index)
    for dtype in (wanted, torch.float32):
        if dtype != wanted:
            sums[rounding] = _sums_of({index: average}, {index: dtype}, {})[rounding]
        if math.isfinite(sums[rounding]) and sums[rounding] <= (torch.finfo(dtype).eps / 2) ** 2 * sums[norm]:
            return dtype
    sums[rounding] = 0.0
    return average.dtype


class _EarlierFiles(ExitStack):
    """Snapshots that are read beside the averages, or `boxes` of their tensors, if any.

    One that cannot be read is left out, with a warning.
    """

    def __init__(self, snapshots: Sequence[StoredSnapshot], boxes: Mapping[str, Box]) -> None:
        super().__init__()
        self._snapshots, self._boxes = snapshots, boxes
        self._files: dict[int, OpenSnapshot] = {}

    def __enter__(self) -> _EarlierFiles:
        for index, snapshot in enumerate(self._snapshots):
            with self._left_out_on_error(index):
                self._files[index] = file = self._opened(snapshot)
                self.callback(file.close)
        return self

    def _opened(self, snapshot: StoredSnapshot) -> OpenSnapshot:
        if snapshot.info.part is not None or not (self._boxes or snapshot.path.is_dir()):
            file: OpenSnapshot = TensorFile(snapshot.path)
            checksum = file.header.metadata.get("ema.checksum")
        else:
            found = read_snapshot(snapshot.path)
            file, checksum = found.open(self._boxes or None), found.header.metadata["ema.checksum"]
        if checksum != snapshot.checksum:
            file.close()
            raise FileFormatError(snapshot.path, "was replaced by another one")
        return file

    def readable(self) -> dict[int, StoredSnapshot]:
        """Those that have been read without an error so far, by index."""
        return {index: self._snapshots[index] for index in self._files}

    def read(self, name: str, device: torch.device) -> dict[int, torch.Tensor]:
        """One tensor of each that is readable, flat, by index."""
        tensors = {}
        for index, file in list(self._files.items()):
            with self._left_out_on_error(index):
                entry = file.header.tensors[name]
                value = tensor_from_bytes(file.read(name), entry.dtype, entry.shape).reshape(-1)
                tensors[index] = _with_arithmetic(value).to(device)
        return tensors

    @contextmanager
    def _left_out_on_error(self, index: int) -> Iterator[None]:
        try:
            yield
        except PostHocError as error:
            log.warning("%s; new snapshots are written without their distance to it", error)
            self._files.pop(index, None)
