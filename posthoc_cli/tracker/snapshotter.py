"""The averages of one update: written as snapshots, and as sources of a synthesis in addition to those on disk."""

from __future__ import annotations

import errno
import logging
import math
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby, pairwise, takewhile
from pathlib import Path

import numpy as np
import numpy.typing as npt
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
from posthoc_cli.snapshots.path import decode_sample, encode_path, encode_sample
from posthoc_cli.snapshots.snapshot import Snapshot, read_one
from posthoc_cli.snapshots.sources import ElementRange
from posthoc_cli.snapshots.tensorfile import Box, Chunk, Entry, TensorFileWriter, tensor_bytes
from posthoc_cli.tracker.averages import Averages
from posthoc_cli.tracker.background import SINGLE_THREAD, ThreadPool
from posthoc_cli.tracker.measuring import Subset
from posthoc_cli.tracker.memory import (
    Bucket,
    BucketTile,
    Elements,
    HostTensors,
    Layout,
    Values,
    joined,
    on_host,
    ranges_of,
    tiles_of,
)
from posthoc_cli.tracker.model import TrackedModel, nonfinite_name
from posthoc_cli.tracker.processes import Members
from posthoc_cli.tracker.resuming import ways_to_resume
from posthoc_cli.tracker.state import Settings, Tracking

log = logging.getLogger(__name__)

PATIENCE = 60.0  # seconds that a network file system may take to show a file


# --- sources of a synthesis ---


@dataclass(frozen=True, repr=False)
class LiveSource(Snapshot):
    """One running average, with its copies: the snapshot that would be written now.

    Attributes:
        read: returns ranges of its tensors, flat.
    """

    read: Callable[[Sequence[ElementRange]], list[torch.Tensor]] = lambda _: []

    @property
    def name(self) -> str:
        """The source's name in messages, in place of a file name."""
        return f"live average of sigma_rel {self.sigma_rel:g}"

    @property
    def header(self) -> Snapshot:
        """The same without values, to be sent to other processes."""
        return Snapshot(**{each.name: getattr(self, each.name) for each in fields(Snapshot)})

    def read_box(self, name: str, box: Box, out: memoryview, begin: int = 0, verify: bool = True) -> None:  # noqa: ARG002
        """Fill `out` with the elements from `begin` on of the box that this process holds, the only one."""
        end = begin + len(out) // ITEM_BYTES[self.entries[name].dtype]
        (values,) = self.read([ElementRange(name, begin, end)])
        out[:] = tensor_bytes(values)

    def read_many(self, names: Sequence[str], out: memoryview) -> None:
        """Fill `out` with complete tensors, end to end."""
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
    chunks = {n: Chunk(tracked.complete_shape(n), tracked.box(n).offset) for n in tracked.boxes() or ()}
    sketch = encode_path(averages.known_path)
    return [
        Snapshot(
            run_id=state.run_id, sigma_rel=sigma_rel, gamma=gamma,
            sigma_rels=averages.sigma_rels, t=standing.t, t_unit=settings.t_unit, step=standing.step, clock=knots,
            t_first=standing.t_first, max_interval=standing.max_interval, schedule=settings.schedule,
            tensors=tracked.tensors, aliases=tracked.aliases, left_out=tracked.left_out,
            selection=settings.selection, skip_nonfinite=settings.on_nonfinite == "skip", updates=standing.updates,
            inherited=inherited, off_schedule=off_schedule, measurements=measured, sketch=sketch, chunks=chunks,
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

    return [
        LiveSource(**vars(header) | {"entries": specs, "read": partial(read_with_copies, index)})
        for index, header in enumerate(headers(settings, state, measurements))
    ]


# --- snapshots ---


class Snapshotter:
    """The one writer of a directory, from its construction until `close`; makes the directory if it is missing.

    Attributes:
        times_written, nbytes: the number of times with snapshots that were written, and the bytes of the last ones.

    Raises:
        LockedError: another writer holds the directory.
        DirectoryError, FileFormatError, MismatchError, WriteError: the path is no directory, cannot be read or written,
            or is not rank 0's directory but one on this process's local disk.
    """

    def __init__(self, directory: Path, settings: Settings, members: Members) -> None:
        self.directory = directory
        self.times_written = self.nbytes = 0
        self._settings, self._members = settings, members
        self._leads = members.rank == 0
        with files.reported_as_write_error(directory):
            files.make_directory(directory)
        self._lock = DirectoryLock(directory) if self._leads else None
        until = time.monotonic() + PATIENCE
        while not (directory / LOCK_NAME).exists():  # a network file system may show rank 0's file late
            if time.monotonic() > until:
                reason = "is not the directory of that name in which rank 0 writes"
                raise DirectoryError(directory, reason, ON_ONE_FILE_SYSTEM)
            time.sleep(0.1)
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
        self._run_id = snapshots[0].run_id if snapshots else None
        # Ordered by time: later snapshots are set aside before an earlier one is written.
        self._stored = [*snapshots]

    @property
    def checksums(self) -> frozenset[str]:
        """Header checksums of the stored snapshots that are complete."""
        return frozenset(snapshot.identity for snapshot in self._complete())

    def check_run(self, run_id: str) -> None:
        """Raise a MismatchError if the directory holds snapshots of another run."""
        if self._run_id not in (None, run_id):
            reason = f"holds snapshots of run {str(self._run_id)[:8]}, this tracker is run {run_id[:8]}"
            raise MismatchError(self.directory, reason, ways_to_resume(self._stored[-1].step))

    def continue_from(self, state: Tracking) -> None:
        """Set aside the snapshots that are later than a state, or of another attempt, which the state does not list.

        Those off the schedule that were written after it was saved, as by `close`, belong to it if they hold its
        averages.
        """
        stored, t = self._complete(), state.progress.t
        known = state.snapshots | {s.identity for s in stored if s.off_schedule and _holds_average(s, state)}
        own: list[Snapshot] = []
        others: list[Snapshot] = []
        for snapshot in stored:
            (own if snapshot.t <= t and snapshot.identity in known else others).append(snapshot)
        if moved := set_aside(others) if self._leads else []:
            names = ", ".join(path.name for path in moved[:2]) + f" and {len(moved) - 2:,} more" * (len(moved) > 2)
            what = f"{len(moved):,} snapshot{'s' * (len(moved) > 1)}, later or of another attempt"
            log.warning("training continues from t = %.12g: %s, moved to %s: %s", t, what, moved[0].parent, names)
        self._stored = own

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
        """Write the snapshots of one time durably, and thin; none if an average is not finite.

        `staged` are the averages of `state`. Without `is_due` only averages that are not stored yet are written. After
        skipped updates one that is due may be stored already: then it is not written again. Snapshots on the schedule
        are written as if none existed off the schedule.
        """
        standing, copies = state.averages.standing, state.averages.copies
        off_schedule = not is_due and not self._settings.snapshot_is_due(standing.step)
        due = [not self._has(standing.t, one, scheduled=not off_schedule) for one in state.averages.sigma_rels]
        if not any(due):
            return
        try:
            if files.is_absent(self.directory):
                reason = f"was deleted: the averages of step {standing.step} are lost"
                raise WriteError(self.directory, reason, errno=errno.ENOENT)
            for bad in filter(None, staged.nonfinite):
                raise NonFiniteError(f"average of {bad!r}", "holds nan or infinity; no snapshot of it is written")
            for name, copy in copies.items():
                if copy.is_floating_point() and bool(copy.isnan().any()):
                    log.warning("tensor %r holds nan, and is copied unchanged", name)
            nbytes = 0
            for index, info in enumerate(headers(self._settings, state, staged.measurements, off_schedule)):
                if due[index]:
                    nbytes += self._write_one(replace(info, sample=staged.samples[index]), staged, index, copies)
            self.times_written, self.nbytes = self.times_written + 1, nbytes
            self._thin()
        except PostHocError as error:
            self._members.announce_failure(error)
            raise

    def _complete(self) -> list[Snapshot]:
        return self._stored

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
        replaces = len(kept) < len(self._stored)
        if info.part is not None and not replaces:
            with suppress(FileFormatError):  # there is no readable part
                replaces = read_one(path).session < info.session
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
        return any(not (scheduled and s.off_schedule) for s in same)


class PartSnapshotter(Snapshotter):
    """The writer of one process of several that write a part of every snapshot to one directory.

    The process with rank 0 has the directory's lock, and thins.
    """

    def _complete(self) -> list[Snapshot]:
        """Return the snapshots whose parts are complete, of those that this process has written a part of."""
        own = {(part.t, part.sigma_rel) for part in self._stored}
        return [s for s in find_snapshots(self.directory) if (s.t, s.sigma_rel) in own]

    def _thin(self) -> None:
        """Thin the times whose snapshots are complete: another process may die before it has written its part."""
        self._stored = [snapshot for snapshot in self._stored if snapshot.path.exists()]
        schedule = self._settings.schedule
        if not self._leads or schedule.max_checkpoints is None:
            return
        complete = self._complete()
        found = {(snapshot.t, snapshot.sigma_rel) for snapshot in complete}
        unfinished = {snapshot.t for snapshot in self._stored if (snapshot.t, snapshot.sigma_rel) not in found}
        finished = [snapshot for snapshot in complete if snapshot.t not in unfinished]
        kept = {(s.t, s.sigma_rel) for s in thin(finished, schedule.max_checkpoints, schedule.sigma_range)}
        self._stored = [s for s in self._stored if s.t in unfinished or (s.t, s.sigma_rel) in kept]


def _holds_average(snapshot: Snapshot, state: Tracking) -> bool:
    """Return whether a snapshot's sample of its average equals a state's values, as far as this process has them."""
    averages, sampled = state.averages, state.tracked.sampled
    if snapshot.t != averages.standing.t or snapshot.sigma_rel not in averages.sigma_rels:
        return False
    recorded = decode_sample(snapshot.sample)[1]
    ranges = [ElementRange(name, at, at + 1) for name, at in sampled.values()]
    own = averages.read(averages.sigma_rels.index(snapshot.sigma_rel), ranges)
    values = np.array([float(value) for value in own], np.float32)
    return len(recorded) > max(sampled, default=-1) and np.array_equal(recorded[list(sampled)], values)


# --- what is stored of averages


class StorageLayout:
    """How averages of a layout are stored, and which of their elements are measured.

    Attributes:
        stored: the same buckets on the host in the storage dtype.
        weights: names of the tensors that are measured and rounded: all but running statistics.
        shapes, dtypes: the shape of each tensor, and the dtype that it is stored in if its values fit.
        subset: the elements of the weights that are measured.
        sample: the elements of a snapshot's sample.
    """

    def __init__(self, layout: Layout, tracked: TrackedModel, dtype: str | None) -> None:
        self.layout, self.tracked = layout, tracked
        self.stored = tuple(replace(b, dtype=torch_dtype(dtype) if dtype else b.dtype) for b in on_host(layout))
        self.weights = frozenset(tracked.weights)
        self.subset = Subset(layout, self.weights)
        self.shapes = {n: shape for bucket in layout for n, shape in zip(bucket.names, bucket.shapes, strict=True)}
        self.dtypes = {name: bucket.dtype for bucket in self.stored for name in bucket.names}
        places = {name: (index, begin) for index, b in enumerate(layout) for name, (begin, _) in b.places.items()}
        sampled = [(places[name][0], places[name][1] + i) for name, i in tracked.sampled.values()]
        pairs = np.array(sampled, np.int64).reshape(-1, 2)
        self._order = np.lexsort(pairs.T[::-1])
        ordered = pairs[self._order]
        self.sample = Elements(layout, [ordered[ordered[:, 0] == index, 1] for index in range(len(layout))])

    def in_order(self, buffers: Sequence[torch.Tensor]) -> npt.NDArray[np.float32]:
        """Return the values of a snapshot's sample, one buffer a bucket, in the sample's order."""
        values = np.empty(len(self._order), np.float32)
        with np.errstate(over="ignore"):  # values that float32 cannot hold become infinite
            values[self._order] = joined(buffers)
        return values


@dataclass(frozen=True, eq=False)
class StagedAverages:
    """The averages of one update as they are stored; each list has one item a profile.

    Attributes:
        copies: the values, except tensors that are stored in another dtype, which are in `others`.
        nonfinite: the first tensor that holds a nan or an infinity.
        measurements: of each average.
        samples: the exact and the model's values of the sample, encoded for the header; "" if the model's are unknown.
    """

    layout: StorageLayout
    copies: Sequence[HostTensors]
    others: Sequence[dict[str, torch.Tensor]]
    nonfinite: Sequence[str | None]
    measurements: Sequence[Measurements | None]
    samples: Sequence[str]

    def flats(self, index: int) -> Iterator[tuple[list[str], list[torch.Tensor]]]:
        """Yield the stored tensors of `copies`: several end to end in one flat tensor, or one in several."""
        copies, others = self.copies[index], self.others[index]
        for number, (bucket, edges) in enumerate(zip(copies.layout, copies.edges, strict=True)):

            def slabs(name: str, bucket: Bucket = bucket, edges: Sequence[int] = edges) -> tuple[int, int] | None:
                begin, end = bucket.places[name]
                return None if name in others else (bisect_right(edges, begin), bisect_left(edges, end))

            for span, group in groupby(bucket.names, slabs):
                names = [*group]
                if span is not None:
                    yield names, copies.flat(number, bucket.places[names[0]][0], bucket.places[names[-1]][1])


@torch.no_grad()
def stage(
    layout: StorageLayout, averages: Averages, copies: Sequence[HostTensors], pool: ThreadPool = SINGLE_THREAD
) -> StagedAverages:
    """Round the averages as they are now into `copies`, which may be pinned: complete when the current stream is.

    Results do not depend on the pool's threads.
    """
    profiles, subset = range(len(averages.sigma_rels)), layout.subset
    subset_buffers, samples = ([elements.buffers() for _ in profiles] for elements in (subset, layout.sample))
    tiles = tiles_of(layout.layout)
    norms: list[list[torch.Tensor]] = [[] for _ in tiles]

    def stage_tile(tile: BucketTile, thread: int) -> None:
        for index in profiles:
            exact = averages.values(tile, index, thread)
            (out,) = copies[index].flat(tile.bucket, tile.begin, tile.end)
            if exact.device.type == "cpu":
                out.copy_(exact)
            else:
                out.copy_(exact.to(out.dtype), non_blocking=True)
            norms[tile.number].append(torch.linalg.vector_norm(exact))
            subset.take(tile, exact, subset_buffers[index])
            layout.sample.take(tile, exact, samples[index])

    pool.each(stage_tile, tiles)
    doubtful: list[set[str]] = [set() for _ in profiles]
    for tile, tile_norms, ranges in zip(tiles, norms, ranges_of(layout.layout), strict=True):
        largest = torch.finfo(layout.stored[tile.bucket].dtype).max
        for index, norm in enumerate(tile_norms):
            if not float(norm) <= largest:
                doubtful[index] |= {piece.name for piece in ranges}
    measured = [joined(buffers) for buffers in subset_buffers]
    paired = [zip(buffers, layout.stored, strict=True) for buffers in subset_buffers]
    stored = [joined([values.to(bucket.dtype).to(values.dtype) for values, bucket in pairs]) for pairs in paired]
    others = [
        _stored_in_other_dtypes(layout, averages, index, doubtful[index], measured[index], stored[index])
        for index in profiles
    ]
    nonfinite = [nonfinite_name(tensors) for tensors in others]
    weights = averages.sample
    encoded = ["" if weights is None else encode_sample(*map(layout.in_order, (weights, exact))) for exact in samples]
    measurements = [subset.measured(*values) for values in zip(measured, stored, strict=True)]
    return StagedAverages(layout, copies, others, nonfinite, measurements, encoded)


def _stored_in_other_dtypes(
    layout: StorageLayout, averages: Averages, index: int, doubtful: set[str], measured: Values, stored: Values
) -> dict[str, torch.Tensor]:
    """Return the tensors of an average that are stored in another dtype than their bucket's, in that dtype.

    These are running statistics, and weights that their bucket's dtype cannot hold: those are stored in float32, or
    else in float64, and their measured values are changed in `stored`.
    """
    subset, found = layout.subset, {}
    spans = dict(zip(subset.sizes, pairwise(subset.edges.tolist()), strict=True))
    norms, errors = subset.sums(measured), subset.sums(measured, stored)
    for name, norm, error in zip(spans, norms.tolist(), errors.tolist(), strict=True):
        if not _is_accurate(norm, error, layout.dtypes[name]):
            doubtful.add(name)
    for name in [name for name in layout.dtypes if name in doubtful or name not in layout.weights]:
        shape, usual = layout.shapes[name], layout.dtypes[name]
        (exact,) = averages.read(index, [ElementRange(name, 0, math.prod(shape))])
        candidates = (usual, torch.float32) if name in layout.weights else ()
        dtype = next((candidate for candidate in candidates if _holds(candidate, exact)), exact.dtype)
        if name not in layout.weights or dtype != usual or not bool(exact.isfinite().all()):
            found[name] = exact.to(dtype).view(shape)
            span = slice(*spans.get(name, (0, 0)))
            stored[span] = measured[span].astype(np.float64 if dtype == torch.float64 else np.float32)
    return found


def _holds(dtype: torch.dtype, exact: torch.Tensor) -> bool:
    """Return whether a dtype holds a tensor as accurately as ordinary values."""
    error = exact - exact.to(dtype).to(exact.dtype)
    norm, rounding = (float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2 for values in (exact, error))
    return _is_accurate(norm, rounding, dtype)


def _is_accurate(norm: float, rounding: float, dtype: torch.dtype) -> bool:
    """Return whether the squared rounding error of a tensor of this squared norm is that of ordinary values.

    Rounding to nearest costs at most half a unit in the last place, eps / 2 relative; more if a value becomes infinite,
    or if all values are about as small as the dtype's subnormal numbers.
    """
    return math.isfinite(rounding) and rounding <= (torch.finfo(dtype).eps / 2) ** 2 * norm


def measured_now(subset: Subset, averages: Averages, pool: ThreadPool = SINGLE_THREAD) -> list[Measurements | None]:
    """Return the measurements of the averages as they are now, not rounded."""
    profiles = range(len(averages.sigma_rels))
    buffers = [subset.buffers() for _ in profiles]

    def take(tile: BucketTile, thread: int) -> None:
        for index in profiles:
            subset.take(tile, averages.values(tile, index, thread), buffers[index])

    pool.each(take, tiles_of(subset.layout))
    return [subset.measured(joined(values)) for values in buffers]
