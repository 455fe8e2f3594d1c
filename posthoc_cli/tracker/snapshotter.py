"""The averages of one update: written as snapshots, and as sources of a synthesis beside the
snapshots on disk."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from posthoc_cli import files
from posthoc_cli.dtypes import stored_name, torch_dtype
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    Log,
    MismatchError,
    NonFiniteError,
    WriteError,
)
from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.boxes import Chunk
from posthoc_cli.snapshots.directory import (
    LOCK_NAME,
    ON_ONE_FILE_SYSTEM,
    DirectoryLock,
    LockFile,
    find_snapshots,
    inspect_directory,
    read_kept_time,
    remove_incomplete,
    remove_leftovers,
    set_aside,
    snapshot_path,
    thin,
    write_kept_time,
)
from posthoc_cli.snapshots.entry import Entry, tensor_bytes
from posthoc_cli.snapshots.sketch_text import encode_path
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot
from posthoc_cli.snapshots.source import PathSketch
from posthoc_cli.snapshots.tensorfile import read_file
from posthoc_cli.snapshots.weights_sample import encode_sample
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.tracker.arguments import Settings
from posthoc_cli.tracker.background import ThreadPool
from posthoc_cli.tracker.measuring import Subset, Values, join_buckets, make_measurements
from posthoc_cli.tracker.memory import (
    BucketTile,
    Elements,
    HostTensors,
    Layout,
    find_places,
    find_ranges,
    on_host,
    read_numbers,
    tile_buckets,
)
from posthoc_cli.tracker.model import TrackedModel, nonfinite_name
from posthoc_cli.tracker.processes import PATIENCE, Members
from posthoc_cli.tracker.resume import ways_to_resume
from posthoc_cli.tracker.state import Tracking
from posthoc_cli.tracker.tracked_averages import Averages

log = Log(__name__)

# Seconds that the first process waits at its end for the last parts of others, which are as large
# as its own: so long takes a part of 10 GB at 1 GB/s. Others may have died.
LAST_PARTS = 10.0


def headers(
    settings: Settings,
    state: Tracking,
    path: PathSketch | None,
    sample: Values | None,
    measured: Sequence[Measurements | None],
) -> list[Snapshot]:
    """Make the headers of snapshots of a state's averages, one for each profile, from the
    measurements of each, and the network's path and sampled weights."""
    averages = state.averages
    standing = averages.standing
    tracked = state.tracked
    members = tracked.members
    chunks = {}
    if members.is_chunked:
        for name, box in tracked.boxes.items():
            chunks[name] = Chunk(tracked.shapes[name], box.offset)
    sketch = encode_path(path)
    sampled = "" if sample is None else encode_sample(sample)
    return [
        Snapshot(
            run_id=state.run_id,
            sigma_rel=sigma_rel,
            gamma=gamma,
            sigma_rels=averages.sigma_rels,
            **vars(standing.last),
            t_unit=settings.t_unit,
            t_first=standing.t_first,
            max_interval=standing.max_interval,
            schedule=settings.schedule,
            tensors=tracked.tensors,
            aliases=tracked.aliases,
            left_out=tracked.left_out,
            selection=settings.selection,
            updates=standing.updates,
            measurements=measurements,
            sample=sampled,
            sketch=sketch,
            chunks=chunks,
            part=members.part,
            mesh=members.mesh,
            session=members.session,
        )
        for sigma_rel, gamma, measurements in zip(
            averages.sigma_rels, averages.gammas, measured, strict=True
        )
    ]


class Snapshotter:
    """The one writer of a directory, from its construction until `close`; makes the directory if it
    is missing.

    Of several processes each writes a part of every snapshot; rank 0 holds the directory's lock,
    and thins.
    """

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        members: Members,
    ) -> None:
        self.directory = directory
        self.times_written = 0
        self.nbytes = 0  # of the last snapshots
        self._settings = settings
        self._members = members
        self._leads = members.rank == 0
        files.make_directory(directory)
        self._lock: LockFile
        if self._leads:
            self._lock = DirectoryLock(directory)
        until = time.monotonic() + PATIENCE
        # a network file system may show rank 0's file late
        while not (directory / LOCK_NAME).exists():
            if time.monotonic() > until:
                reason = "is another directory than the one that rank 0 writes to"
                raise DirectoryError(directory, reason, ON_ONE_FILE_SYSTEM)
            time.sleep(0.1)
        if not self._leads:
            self._lock = LockFile(directory)
        try:
            if self._leads:
                _clean(directory, self._lock)
            # Nobody else writes here from now on. By time: later ones are set aside before an
            # earlier one is written.
            self._stored = [*find_snapshots(directory)]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lock.release()

    def check_run(self, run_id: str) -> None:
        newest = self._stored[-1] if self._stored else None
        if newest is not None and newest.run_id != run_id:
            reason = f"holds snapshots of run {newest.run_id[:8]}, this tracker is run {run_id[:8]}"
            raise MismatchError(self.directory, reason, ways_to_resume(newest.step))

    def continue_from(self, state: Tracking) -> None:
        """Set aside the snapshots that are later than a state."""
        t = state.progress.t
        later = [snapshot for snapshot in self._find_complete() if snapshot.t > t]
        if self._leads and (moved := set_aside(later, self._lock)):
            log.warning(
                "training continues from t = %.12g: %d later snapshots moved to %s",
                t,
                len(moved),
                moved[0].parent,
            )
        self._stored = [snapshot for snapshot in self._stored if snapshot.t <= t]

    def record(
        self,
        infos: Sequence[Snapshot],
        staged: Sequence[StagedAverage],
        copies: Mapping[str, Tensor],
    ) -> None:
        """Write the snapshots of one time durably, and thin; none if an average is not finite.

        Averages that are stored already, as after skipped updates, are not written again.
        """
        first = infos[0]
        if self.has(first.t):
            return
        self._check_directory(first)
        self._members.check_part(first.step, first.t)
        for average in staged:
            if average.nonfinite is not None:
                subject = f"average of {average.nonfinite!r}"
                reason = "holds nan or infinity; no snapshot of it is written"
                raise NonFiniteError(subject, reason)
        for name, copy in copies.items():
            if copy.is_floating_point() and bool(copy.isnan().any()):
                log.warning("tensor %r holds nan, and is copied unchanged", name)
        self.nbytes = 0
        for info, average in zip(infos, staged, strict=True):
            self.nbytes += self._write(info, average, copies)
        self.times_written += 1
        self._thin()

    def keep(self, t: float) -> None:
        """Keep the snapshots of a time from thinning, and no longer those of an earlier call."""
        if self._leads and self.has(t):
            write_kept_time(self.directory, t, self._lock)

    def _check_directory(self, info: Snapshot) -> None:
        """Raise a WriteError if the directory was deleted, and a LockedError if another one is at
        its path."""
        if files.is_absent(self.directory):
            reason = f"was moved or deleted: the averages of step {info.step} are lost"
            raise WriteError(self.directory, reason, errno=errno.ENOENT)
        self._lock.check()

    def _write(
        self,
        info: Snapshot,
        staged: StagedAverage,
        copies: Mapping[str, Tensor],
    ) -> int:
        path = snapshot_path(self.directory, info.t, info.sigma_rel, info.part)
        kept = [snapshot for snapshot in self._stored if snapshot.path != path]
        # The path may hold a snapshot of the same average off the schedule, or a part of an earlier
        # training's process.
        replaces = len(kept) < len(self._stored)
        if info.part is not None:
            files.make_directory(path.parent)
            replaces = replaces or _is_of_earlier_session(path, info.session)
        others = staged.others | dict(copies)
        entries = staged.storage.entries | make_entries(others)
        header = info.encode()
        with TensorFileWriter(path, entries, header, info.for_dcp, replaces) as writer:
            staged.write_rounded(writer)
            for name, tensor in others.items():
                writer.write(name, [tensor_bytes(tensor)])
            self._lock.check()  # a large file takes a while
            file = writer.publish()
        written = replace(info, path=path, files=(file,), entries=file.entries)
        self._stored = [*kept, written]
        log.info("wrote %s", path)
        return sum(entry.nbytes for entry in entries.values())

    def _find_complete(self) -> list[Snapshot]:
        """Find the complete snapshots among those that this process has written, or has written a
        part of."""
        if not self._members.is_chunked:
            return self._stored
        own = {(part.t, part.sigma_rel) for part in self._stored}
        return [s for s in find_snapshots(self.directory) if (s.t, s.sigma_rel) in own]

    @property
    def known(self) -> Sequence[Snapshot] | None:
        """All snapshots of the directory, as this process holds them; None if others write parts
        or thin."""
        return self._stored if self._leads and not self._members.is_chunked else None

    def end(self) -> None:
        """Thin once more when the training has ended and all parts are there."""
        until = time.monotonic() + LAST_PARTS
        while not self._thin() and time.monotonic() < until:
            time.sleep(0.1)

    def _thin(self) -> bool:
        """Thin the times whose snapshots are complete: another process may die before it has
        written its part. Return whether all are."""
        schedule = self._settings.schedule
        if self._leads:
            # which were too young when the training began
            remove_leftovers(self.directory, self._lock)
        if self._members.is_chunked:
            self._stored = [snapshot for snapshot in self._stored if snapshot.path.exists()]
        if not self._leads or schedule.max_checkpoints is None:
            return True
        snapshots = self._find_complete()
        complete = {(snapshot.t, snapshot.sigma_rel) for snapshot in snapshots}
        unfinished = set()
        for snapshot in self._stored:
            if (snapshot.t, snapshot.sigma_rel) not in complete:
                unfinished.add(snapshot.t)
        finished = [s for s in snapshots if s.t not in unfinished]
        kept = thin(
            finished,
            schedule.max_checkpoints,
            self._lock,
            schedule.sigma_range,
            read_kept_time(self.directory),
        )
        times = unfinished.union(s.t for s in kept)
        self._stored = [s for s in self._stored if s.t in times]
        return not unfinished

    def has(self, t: float) -> bool:
        """Return whether each profile has a snapshot of a time."""
        profiles = set()
        for snapshot in self._stored:
            if snapshot.t == t:
                profiles.add(snapshot.sigma_rel)
        return profiles.issuperset(self._settings.sigma_rels)


def _clean(directory: Path, lock: LockFile) -> None:
    """Remove what an interrupted training has left: its parts, together with parts of this
    training, could look like one snapshot."""
    remove_leftovers(directory, lock)
    for folder, parts in inspect_directory(directory).incomplete.items():
        log.warning("%s: has %s, left by an interrupted training, and is removed", folder, parts)
        remove_incomplete(folder, lock)


def make_entries(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Make the entries of tensors that are stored as they are."""
    entries = {}
    for name, tensor in tensors.items():
        dtype = stored_name(tensor.dtype, name)
        entries[name] = Entry(dtype, tuple(tensor.shape))
    return entries


def _is_of_earlier_session(path: Path, session: int) -> bool:
    """Return whether a file is a readable part of a snapshot of an earlier training."""
    try:
        return decode_snapshot(read_file(path)).session < session
    except FileFormatError:
        return False


class Storage:
    """How averages of a layout are stored, and which of their elements are measured, or belong to a
    snapshot's sample."""

    def __init__(
        self,
        layout: Layout,
        tracked: TrackedModel,
        dtype: str | None,
    ) -> None:
        self.layout = layout
        self.tracked = tracked
        # The same buckets on the host in the storage dtype, in which values are stored if they fit.
        self.stored = on_host(layout)
        if dtype:
            rounded = torch_dtype(dtype)
            self.stored = tuple(replace(bucket, dtype=rounded) for bucket in self.stored)
        self.places = find_places(layout)
        # are measured and rounded: all but running statistics
        self.weights = frozenset(tracked.weights)
        self.subset = Subset(layout, self.weights)
        self.memory: list[HostTensors] = []  # for each profile; reused, since allocation is slow
        sampled = []  # the bucket and the position of each element
        for name, index in tracked.sample_places.values():
            number, place = self.places[name]
            (position,) = place.positions(np.array([index]))
            sampled.append((number, position))
        buckets, positions = np.array(sampled, np.int64).reshape(-1, 2).T
        self._order = np.lexsort((positions, buckets))  # sorted ones are taken faster
        of_buckets = []
        for number in range(len(layout)):
            in_bucket = positions[buckets == number]
            of_buckets.append(np.sort(in_bucket))
        self.sample = Elements(layout, of_buckets)

    def dtype(self, name: str) -> torch.dtype:
        bucket, _ = self.places[name]
        return self.stored[bucket].dtype

    @property
    def entries(self) -> dict[str, Entry]:
        entries = {}
        for name, (_, place) in self.places.items():
            dtype = stored_name(self.dtype(name), name)
            entries[name] = Entry(dtype, place.shape)
        return entries

    def allocate(self, profiles: int) -> None:
        while len(self.memory) < profiles:
            self.memory.append(HostTensors(self.stored, self.layout))

    def in_order(self, buffers: Sequence[Tensor]) -> Values:
        """Sort the values of a snapshot's sample into the sample's order, in float32."""
        values = np.empty(len(self._order), np.float32)
        with np.errstate(over="ignore"):  # values that float32 cannot hold become infinite
            values[self._order] = join_buckets(buffers)
        return values


class StagedAverage:
    """An average as it is stored: rounded into memory tile by tile, and measured meanwhile."""

    # known when all tiles have been taken
    others: dict[str, Tensor]  # tensors that are stored in another dtype, exactly
    nonfinite: str | None  # the first tensor that holds a nan or an infinity
    measurements: Measurements | None

    def __init__(self, storage: Storage, memory: HostTensors) -> None:
        self.storage = storage
        self.memory = memory
        self._tiles = tile_buckets(storage.layout)
        self._norms = [torch.empty(0)] * len(self._tiles)
        self._measured = storage.subset.buffers()
        self._views = storage.subset.views(self._measured)

    def take(self, tile: BucketTile, exact: Tensor) -> None:
        self._norms[tile.number] = torch.linalg.vector_norm(exact)
        self.storage.subset.take(tile, exact, self._views)
        if exact.device.type != "cpu":
            exact = exact.to(self.storage.stored[tile.bucket].dtype)
        self.memory.copy(tile, exact)

    def finish(self, averages: Averages, index: int) -> None:
        """Decide which tensors of the average with this index are stored otherwise, when all tiles
        have been taken."""
        storage = self.storage
        norms = read_numbers(self._norms, self._tiles)
        doubtful = _find_overflowing(storage, norms)
        squares = storage.subset.sums(join_buckets(self._measured))
        rounding = _rounding(storage, self._measured)
        names = [*storage.subset.sizes]
        for name, norm, error in zip(names, squares, rounding, strict=True):
            if not _is_accurate(norm, error, storage.dtype(name)):
                doubtful.add(name)
        self.others = _read_exact(storage, averages, index, doubtful)
        self.nonfinite = nonfinite_name(self.others)
        rounding[[name in self.others for name in names]] = 0.0
        self.measurements = make_measurements(squares, rounding)

    def write_rounded(self, writer: TensorFileWriter) -> None:
        for name in self.storage.places:
            if name not in self.others:
                parts = self.memory.row_major(name)
                writer.write(name, map(tensor_bytes, parts))


@torch.no_grad()
def stage(
    storage: Storage,
    averages: Averages,
    pool: ThreadPool,
) -> list[StagedAverage]:
    """Round the averages as they are now into `storage.memory`: complete when the current stream
    is."""
    staged = [StagedAverage(storage, memory) for memory in storage.memory]

    def take(tile: BucketTile, thread: int) -> None:
        for index, average in enumerate(staged):
            average.take(tile, averages.values(tile, index, thread))

    pool.each(take, tile_buckets(storage.layout))
    for index, average in enumerate(staged):
        average.finish(averages, index)
    return staged


def _find_overflowing(
    storage: Storage,
    norms: Sequence[float],
) -> set[str]:
    """Find the tensors of tiles whose norm the storage dtype cannot hold."""
    names = set[str]()
    ranges = find_ranges(storage.layout)
    tiles = tile_buckets(storage.layout)
    for tile, norm in zip(tiles, norms, strict=True):
        dtype = storage.stored[tile.bucket].dtype
        if not norm <= torch.finfo(dtype).max:
            names.update(piece.name for piece in ranges[tile.number])
    return names


def _rounding(storage: Storage, measured: Sequence[Tensor]) -> FloatArray:
    """Compute the squared rounding error of each measured tensor in the storage dtype."""
    rounded = []
    for values, bucket in zip(measured, storage.stored, strict=True):
        rounded.append(values.to(bucket.dtype).to(values.dtype))
    return storage.subset.sums(join_buckets(measured), join_buckets(rounded))


def _read_exact(
    storage: Storage,
    averages: Averages,
    index: int,
    doubtful: set[str],
) -> dict[str, Tensor]:
    """Read what is stored exactly: running statistics, and the doubtful weights that the storage
    dtype cannot hold."""
    others = {}
    for name in storage.places:
        if name in storage.weights and name not in doubtful:
            continue
        dtype = storage.dtype(name)
        exact = averages.read(index, name)
        error = exact - exact.to(dtype).to(exact.dtype)
        is_held = _is_accurate(_squared_norm(exact), _squared_norm(error), dtype)
        if name not in storage.weights or not is_held:
            others[name] = exact
    return others


def _squared_norm(values: Tensor) -> float:
    norm = torch.linalg.vector_norm(values, dtype=torch.float64)
    return float(norm) ** 2


def _is_accurate(
    norm: float,
    rounding: float,
    dtype: torch.dtype,
) -> bool:
    """Return whether a squared rounding error is at most eps / 2 relative: not for values out of
    the dtype's range."""
    relative = torch.finfo(dtype).eps / 2
    return math.isfinite(rounding) and rounding <= relative**2 * norm
