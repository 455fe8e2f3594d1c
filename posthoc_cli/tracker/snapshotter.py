"""The averages of one update: written as snapshots, and as sources of a synthesis in addition to
those on disk."""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES, stored_name, torch_dtype
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    Log,
    MismatchError,
    NonFiniteError,
    PostHocError,
    WriteError,
)
from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.directory import (
    LOCK_NAME,
    ON_ONE_FILE_SYSTEM,
    DirectoryLock,
    find_snapshots,
    inspect_directory,
    remove_leftovers,
    remove_snapshot,
    set_aside,
    snapshot_path,
    thin,
)
from posthoc_cli.snapshots.path import PathSketch, decode_sample, encode_path, encode_sample
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot
from posthoc_cli.snapshots.sources import ElementRange
from posthoc_cli.snapshots.tensorfile import (
    Box,
    Chunk,
    Entry,
    TensorFileWriter,
    read_file,
    tensor_bytes,
)
from posthoc_cli.tracker.averages import Averages
from posthoc_cli.tracker.background import SINGLE_THREAD, ThreadPool
from posthoc_cli.tracker.clock import Settings
from posthoc_cli.tracker.measuring import Subset, Values, joined, measured_as
from posthoc_cli.tracker.memory import (
    Elements,
    FlatTensors,
    Layout,
    Tile,
    numbers_of,
    on_host,
    places_of,
    ranges_of,
    tiles_of,
)
from posthoc_cli.tracker.model import TrackedModel, nonfinite_name
from posthoc_cli.tracker.processes import Members
from posthoc_cli.tracker.resume import ways_to_resume
from posthoc_cli.tracker.state import Tracking

log = Log(__name__)

PATIENCE = 60.0  # seconds that a network file system may take to show a file


@dataclass(frozen=True, repr=False)
class LiveSource(Snapshot):
    """One running average, with its copies: the snapshot that would be written now.

    It is read in place until the next update, which has it copied first; `call` runs `read`, which
    returns flat ranges.
    """

    held: dict[str, torch.Tensor] = field(default_factory=dict)  # what need not be read in place
    read: Callable[[Sequence[ElementRange]], list[torch.Tensor]] = lambda _: []
    call: Callable[[Callable[[], list[torch.Tensor]]], list[torch.Tensor]] = lambda work: work()

    @classmethod
    def of(
        cls, header: Snapshot, layout: Layout, copies: Mapping[str, torch.Tensor], **functions: Any
    ) -> LiveSource:
        entries = {
            name: Entry(stored_name(bucket.wide), place.shape)
            for bucket in layout
            for name, place in bucket.places.items()
        }
        entries |= {
            name: Entry(stored_name(copy.dtype), tuple(copy.shape)) for name, copy in copies.items()
        }
        return cls(**vars(header) | {"entries": entries, "held": dict(copies)} | functions)

    @property
    def name(self) -> str:
        return f"live average of sigma_rel {self.sigma_rel:g}"

    def read_box(
        self,
        name: str,
        box: Box,  # noqa: ARG002
        out: memoryview,
        begin: int = 0,
        verify: bool = True,  # noqa: ARG002
    ) -> None:
        """Fill `out` with the elements from `begin` on of the box that this process holds, the only
        one."""
        end = begin + len(out) // ITEM_BYTES[self.entries[name].dtype]
        self._fill(out, [ElementRange(name, begin, end)])

    def read_many(self, names: Sequence[str], out: memoryview) -> None:
        self._fill(out, [ElementRange(name, 0, self.entries[name].size) for name in names])

    def copy(self) -> None:
        """Copy what would be read in place; called in the thread that changes the averages, before
        it does."""
        missing = [
            ElementRange(name, 0, one.size)
            for name, one in self.entries.items()
            if name not in self.held
        ]
        self.held.update(zip([one.name for one in missing], self.read(missing), strict=True))

    def _fill(self, out: memoryview, ranges: Sequence[ElementRange]) -> None:
        for values in self.call(lambda: self._values(ranges)):
            data = tensor_bytes(values)
            out[: len(data)] = data
            out = out[len(data) :]

    def _values(self, ranges: Sequence[ElementRange]) -> list[torch.Tensor]:
        held = self.held
        values = iter(self.read([one for one in ranges if one.name not in self.held]))
        return [
            held[name].reshape(-1)[i:j] if name in held else next(values) for name, i, j in ranges
        ]


def headers(
    settings: Settings,
    state: Tracking,
    path: PathSketch | None,
    measured: Sequence[tuple[Measurements | None, str]],
    off_schedule: bool = False,
) -> list[Snapshot]:
    """Return the headers of snapshots of a state's averages, one a profile, from the measurements
    and the sample of each."""
    averages = state.averages
    standing = averages.standing
    tracked = state.tracked
    members = tracked.members
    chunks = {n: Chunk(tracked.complete_shape(n), tracked.box(n).offset) for n in tracked.boxes}
    sketch = encode_path(path)
    return [
        Snapshot(
            run_id=state.run_id,
            sigma_rel=sigma_rel,
            gamma=gamma,
            sigma_rels=averages.sigma_rels,
            t=standing.t,
            t_unit=settings.t_unit,
            step=standing.step,
            t_first=standing.t_first,
            max_interval=standing.max_interval,
            schedule=settings.schedule,
            tensors=tracked.tensors,
            aliases=tracked.aliases,
            left_out=tracked.left_out,
            selection=settings.selection,
            updates=standing.updates,
            off_schedule=off_schedule,
            measurements=measurements,
            sample=sample,
            sketch=sketch,
            chunks=chunks,
            part=members.part,
            mesh=members.mesh,
            session=members.session,
        )
        for sigma_rel, gamma, (measurements, sample) in zip(
            averages.sigma_rels, averages.gammas, measured, strict=True
        )
    ]


class Snapshotter:
    """The one writer of a directory, from its construction until `close`; makes the directory if it
    is missing.

    Of several processes each writes a part of every snapshot; that of rank 0 has the directory's
    lock, and thins.
    """

    def __init__(self, directory: Path, settings: Settings, members: Members) -> None:
        self.directory = directory
        self.times_written = self.nbytes = 0  # how often; and the size of the last snapshots
        self._settings = settings
        self._members = members
        self._leads = members.rank == 0
        with files.reported_as_write_error(directory):
            files.make_directory(directory)
        self._lock = DirectoryLock(directory) if self._leads else None
        until = time.monotonic() + PATIENCE
        # a network file system may show rank 0's file late
        while not (directory / LOCK_NAME).exists():
            if time.monotonic() > until:
                reason = "is not the directory of that name in which rank 0 writes"
                raise DirectoryError(directory, reason, ON_ONE_FILE_SYSTEM)
            time.sleep(0.1)
        with ExitStack() as stack:
            stack.callback(self.close)
            if self._leads:
                remove_leftovers(directory)
                # Parts of an interrupted training and of this one could look like one snapshot.
                for folder, parts in inspect_directory(directory).incomplete.items():
                    log.warning(
                        "%s: has %s, left by an interrupted training, and is removed", folder, parts
                    )
                    remove_snapshot(folder)
            # Nobody else writes here from now on. By time: later ones are set aside before an
            # earlier one is written.
            self._stored = [*find_snapshots(directory)]
            stack.pop_all()
        self._run_id = self._stored[0].run_id if self._stored else None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release()

    @property
    def checksums(self) -> frozenset[str]:
        return frozenset(snapshot.identity for snapshot in self._complete())

    def check_run(self, run_id: str) -> None:
        if self._run_id not in (None, run_id):
            reason = (
                f"holds snapshots of run {str(self._run_id)[:8]}, this tracker is run {run_id[:8]}"
            )
            raise MismatchError(self.directory, reason, ways_to_resume(self._stored[-1].step))

    def continue_from(self, state: Tracking) -> None:
        """Set aside the snapshots that are later than a state, or of another attempt, which the
        state does not list.

        Those that `close` wrote after it was saved belong to it if they hold its averages.
        """
        stored = self._complete()
        t = state.progress.t
        known = state.snapshots | {
            s.identity for s in stored if s.off_schedule and _holds_average(s, state)
        }
        own = [s for s in stored if s.t <= t and s.identity in known]
        others = [s for s in stored if s.t > t or s.identity not in known]
        if moved := set_aside(others) if self._leads else []:
            names = ", ".join(path.name for path in moved[:2]) + f" and {len(moved) - 2:,} more" * (
                len(moved) > 2
            )
            what = (
                f"{len(moved):,} snapshot{'s' * (len(moved) > 1)}, later, of another attempt "
                f"or of a dropped profile"
            )
            log.warning(
                "training continues from t = %.12g: %s, moved to %s: %s",
                t,
                what,
                moved[0].parent,
                names,
            )
        self._stored = own

    def is_behind(self, tracking: Tracking) -> bool:
        """Return whether the averages are not stored."""
        t = tracking.averages.standing.t
        return t > 0 and not all(self._has(t, one) for one in self._settings.sigma_rels)

    def record(
        self,
        infos: Sequence[Snapshot],
        staged: Sequence[StagedAverage],
        copies: Mapping[str, torch.Tensor],
    ) -> None:
        """Write the snapshots of one time durably, and thin; none if an average is not finite.

        Averages that are stored on the schedule already, as after skipped updates, are not written
        again.
        """
        due = [
            (info, one)
            for info, one in zip(infos, staged, strict=True)
            if not self._has(info.t, info.sigma_rel, scheduled=not info.off_schedule)
        ]
        if not due:
            return
        try:
            if files.is_absent(self.directory):
                reason = f"was deleted: the averages of step {infos[0].step} are lost"
                raise WriteError(self.directory, reason, errno=errno.ENOENT)
            for bad in filter(None, (one.nonfinite for one in staged)):
                raise NonFiniteError(
                    f"average of {bad!r}", "holds nan or infinity; no snapshot of it is written"
                )
            for name, copy in copies.items():
                if copy.is_floating_point() and bool(copy.isnan().any()):
                    log.warning("tensor %r holds nan, and is copied unchanged", name)
            self.nbytes = sum(self._write(info, one, copies) for info, one in due)
            self.times_written += 1
            self._thin()
        except PostHocError as error:
            self._members.announce_failure(error)
            raise

    def _write(
        self, info: Snapshot, staged: StagedAverage, copies: Mapping[str, torch.Tensor]
    ) -> int:
        others = staged.others | dict(copies)
        storage = staged.storage
        entries = {
            name: Entry(stored_name(storage.dtype(name), name), place.shape)
            for name, (_, place) in storage.places.items()
        }
        entries |= {
            n: Entry(stored_name(one.dtype, n), tuple(one.shape)) for n, one in others.items()
        }
        path = snapshot_path(self.directory, info.t, info.sigma_rel, info.part)
        if info.part is not None:
            with files.reported_as_write_error(path.parent):
                files.make_directory(path.parent)
        kept = [snapshot for snapshot in self._stored if snapshot.path != path]
        # The path may hold a snapshot of the same average off the schedule, or a part of an earlier
        # training's process.
        replaces = len(kept) < len(self._stored)
        if info.part is not None and not replaces:
            with suppress(FileFormatError):  # there is no readable part
                replaces = decode_snapshot(read_file(path)).session < info.session
        with TensorFileWriter(path, entries, info.encoded(), info.for_dcp, replaces) as writer:
            for number, bucket in enumerate(storage.stored):
                for name in filter(lambda name: name not in others, bucket.places):
                    parts = staged.memory.row_major(number, name)
                    writer.write_parts(name, map(tensor_bytes, parts))
            for name, tensor in others.items():
                writer.write(name, tensor_bytes(tensor))
            file = writer.commit()
        self._run_id = info.run_id
        self._stored = [*kept, replace(info, path=path, files=(file,), entries=file.entries)]
        log.info("wrote %s", path)
        return sum(entry.nbytes for entry in entries.values())

    def _complete(self) -> list[Snapshot]:
        """Return the complete snapshots, of those that this process has written, or has written a
        part of."""
        if not self._members.is_chunked:
            return self._stored
        own = {(part.t, part.sigma_rel) for part in self._stored}
        return [s for s in find_snapshots(self.directory) if (s.t, s.sigma_rel) in own]

    def _thin(self) -> None:
        """Thin the times whose snapshots are complete: another process may die before it has
        written its part."""
        schedule = self._settings.schedule
        if self._leads:
            remove_leftovers(self.directory)  # which were too young when the training began
        if self._members.is_chunked:
            self._stored = [snapshot for snapshot in self._stored if snapshot.path.exists()]
        if not self._leads or schedule.max_checkpoints is None:
            return
        complete = self._complete()
        found = {(s.t, s.sigma_rel) for s in complete}
        unfinished = {s.t for s in self._stored if (s.t, s.sigma_rel) not in found}
        finished = [s for s in complete if s.t not in unfinished]
        kept = {
            (s.t, s.sigma_rel)
            for s in thin(finished, schedule.max_checkpoints, schedule.sigma_range)
        }
        self._stored = [s for s in self._stored if s.t in unfinished or (s.t, s.sigma_rel) in kept]

    def _has(self, t: float, sigma_rel: float, scheduled: bool = False) -> bool:
        """Return whether an average has a snapshot, or with `scheduled` one on the schedule."""
        newest = takewhile(lambda s: s.t >= t, reversed(self._stored))
        same = (s for s in newest if (s.t, s.sigma_rel) == (t, sigma_rel))
        return any(not (scheduled and s.off_schedule) for s in same)


def _holds_average(snapshot: Snapshot, state: Tracking) -> bool:
    """Return whether a snapshot's sample of its average equals a state's values, as far as this
    process has them."""
    averages = state.averages
    sampled = state.tracked.sampled
    if snapshot.t != averages.standing.t or snapshot.sigma_rel not in averages.sigma_rels:
        return False
    recorded = decode_sample(snapshot.sample)[1]
    ranges = [ElementRange(name, at, at + 1) for name, at in sampled.values()]
    own = averages.read(averages.sigma_rels.index(snapshot.sigma_rel), ranges)
    values = np.array([float(value) for value in own], np.float32)
    return len(recorded) > max(sampled, default=-1) and np.array_equal(
        recorded[list(sampled)], values
    )


class Storage:
    """How averages of a layout are stored, and which of their elements are measured, or are of a
    snapshot's sample."""

    def __init__(self, layout: Layout, tracked: TrackedModel, dtype: str | None) -> None:
        self.layout = layout
        self.tracked = tracked
        # The same buckets on the host in the storage dtype, in which values are stored if they fit.
        self.stored = tuple(
            replace(b, dtype=torch_dtype(dtype) if dtype else b.dtype) for b in on_host(layout)
        )
        self.places = places_of(layout)
        # are measured and rounded: all but running statistics
        self.weights = frozenset(tracked.weights)
        self.subset = Subset(layout, self.weights)
        self.memory: list[FlatTensors] = []  # for each profile; reused, since allocation is slow
        sampled = []
        for name, index in tracked.sampled.values():
            number, place = self.places[name]
            sampled.append((number, *place.positions(np.array([index]))))
        buckets, positions = np.array(sampled, np.int64).reshape(-1, 2).T
        self._order = np.lexsort((positions, buckets))  # sorted ones are taken faster
        of_buckets = [np.sort(positions[buckets == number]) for number in range(len(layout))]
        self.sample = Elements(layout, of_buckets)

    def dtype(self, name: str) -> torch.dtype:
        return self.stored[self.places[name][0]].dtype

    def allocate(self, profiles: int) -> None:
        pinned = any(bucket.device.type == "cuda" for bucket in self.layout)
        self.memory = self.memory or [FlatTensors(self.stored, pinned) for _ in range(profiles)]

    def in_order(self, buffers: Sequence[torch.Tensor]) -> Values:
        """Return the values of a snapshot's sample in float32, in the sample's order."""
        values = np.empty(len(self._order), np.float32)
        with np.errstate(over="ignore"):  # values that float32 cannot hold become infinite
            values[self._order] = joined(buffers)
        return values


@dataclass(frozen=True, eq=False)
class StagedAverage:
    """An average as it is stored."""

    storage: Storage
    memory: FlatTensors
    others: dict[str, torch.Tensor]  # those that are stored in another dtype, exactly
    nonfinite: str | None  # the first tensor that holds a nan or an infinity
    measurements: Measurements | None
    # the model's and the exact values, encoded for the header; "" if the model's are unknown
    sample: str


@torch.no_grad()
def stage(
    storage: Storage, averages: Averages, pool: ThreadPool = SINGLE_THREAD
) -> list[StagedAverage]:
    """Round the averages as they are now into `storage.memory`: complete when the current stream
    is."""
    tiles = tiles_of(storage.layout)
    measured = [storage.subset.buffers() for _ in storage.memory]
    samples = [storage.sample.buffers() for _ in storage.memory]
    norms = [[torch.empty(0)] * len(tiles) for _ in storage.memory]

    def stage_tile(tile: Tile, thread: int) -> None:
        for index, stored in enumerate(storage.memory):
            exact = averages.values(tile, index, thread)
            out = stored.tile(tile)
            out.copy_(
                exact if exact.device.type == "cpu" else exact.to(out.dtype), non_blocking=True
            )
            norms[index][tile.number] = torch.linalg.vector_norm(exact)
            storage.subset.take(tile, exact, measured[index])
            storage.sample.take(tile, exact, samples[index])

    pool.each(stage_tile, tiles)
    staged = []
    for index, stored in enumerate(storage.memory):
        doubtful = _outside(storage, numbers_of(norms[index], tiles))
        rounding = _rounding(storage, measured[index])
        squares = storage.subset.sums(joined(measured[index]))
        for number, name in enumerate(storage.subset.sizes):
            if not _is_accurate(squares[number], rounding[number], storage.dtype(name)):
                doubtful.add(name)
        others = _stored_exactly(storage, averages, index, doubtful)
        rounding[[name in others for name in storage.subset.sizes]] = 0.0
        sample = ""
        if averages.sample is not None:
            weights = storage.in_order(averages.sample)
            sample = encode_sample(weights, storage.in_order(samples[index]))
        measurements = measured_as(squares, rounding)
        staged.append(
            StagedAverage(storage, stored, others, nonfinite_name(others), measurements, sample)
        )
    return staged


def _outside(storage: Storage, norms: Sequence[float]) -> set[str]:
    """Return the tensors of tiles whose norm the storage dtype cannot hold."""
    names = set[str]()
    ranges = ranges_of(storage.layout)
    for tile, norm in zip(tiles_of(storage.layout), norms, strict=True):
        if not norm <= torch.finfo(storage.stored[tile.bucket].dtype).max:
            names.update(piece.name for piece in ranges[tile.number])
    return names


def _rounding(storage: Storage, measured: Sequence[torch.Tensor]) -> FloatArray:
    """Return the squared rounding error of each measured tensor in the storage dtype."""
    rounded = []
    for values, bucket in zip(measured, storage.stored, strict=True):
        rounded.append(values.to(bucket.dtype).to(values.dtype))
    return storage.subset.sums(joined(measured), joined(rounded))


def _stored_exactly(
    storage: Storage, averages: Averages, index: int, doubtful: set[str]
) -> dict[str, torch.Tensor]:
    """Return running statistics, and those of the doubtful weights that the storage dtype cannot
    hold."""
    others = {}
    for name, (_, place) in storage.places.items():
        if name in storage.weights and name not in doubtful:
            continue
        (exact,) = averages.read(index, [ElementRange(name, 0, place.end - place.begin)])
        error = exact - exact.to(storage.dtype(name)).to(exact.dtype)
        norm = float(torch.linalg.vector_norm(exact, dtype=torch.float64)) ** 2
        rounding = float(torch.linalg.vector_norm(error, dtype=torch.float64)) ** 2
        is_held = _is_accurate(norm, rounding, storage.dtype(name))
        if name not in storage.weights or not is_held:
            others[name] = exact.view(place.shape)
    return others


def _is_accurate(norm: float, rounding: float, dtype: torch.dtype) -> bool:
    """Return whether a squared rounding error is at most eps / 2 relative: not for values out of
    the dtype's range."""
    return math.isfinite(rounding) and rounding <= (torch.finfo(dtype).eps / 2) ** 2 * norm


def measured_now(
    subset: Subset, averages: Averages, pool: ThreadPool = SINGLE_THREAD
) -> list[Measurements | None]:
    """Return the measurements of the averages as they are now, not rounded."""
    buffers = [subset.buffers() for _ in averages.sigma_rels]

    def take(tile: Tile, thread: int) -> None:
        for index, own in enumerate(buffers):
            subset.take(tile, averages.values(tile, index, thread), own)

    pool.each(take, tiles_of(subset.layout))
    return [measured_as(subset.sums(joined(values))) for values in buffers]
