"""Change a directory of snapshots: its one writer, what is removed and set aside, what is thinned and pruned.

The lock is `flock`, which the system releases when its holder dies. On a file system without locks, or one that keeps
them to one host, nothing can exclude a second writer; a warning says so if that can be detected. A note next to the
lock names its holder, for people.

Deleting is safe at any moment: pruning deletes only what was planned, only after every survivor was read and verified,
and the least needed first, so that an interruption leaves a valid directory, and the best one of its size.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate, chain, count
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli import files
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InexactError,
    InvalidValueError,
    LockedError,
    MismatchError,
    WriteError,
    check_alone,
    check_count,
    percent,
    printable,
)
from posthoc_cli.planning import (
    USEFUL_RANGE,
    ErrorCurve,
    check_max_error,
    check_sigma_range,
    exchanged,
    forecast,
    removal_order,
    snapshots_to_drop,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import measured_prior, one_blas_thread, thinned_subset
from posthoc_cli.snapshots.directory import SUPERSEDED, Listing, StoredSnapshot, list_directory, read_directory
from posthoc_cli.snapshots.format import SUFFIX
from posthoc_cli.snapshots.reading import verify_payload
from posthoc_cli.snapshots.sources import Snapshot, source_prior
from posthoc_cli.snapshots.tensor_file import read_small_file

log = logging.getLogger(__name__)

STILL_SECONDS = 60.0
"""Temporaries in a locked directory are removed if they are older: a synthesis into it takes no lock."""

# --- the one writer

LOCK_NAME = ".ema.lock"
HOLDER_NAME = ".ema.lock.holder"
MOST_HOLDER_BYTES = 10_000

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of `flock` on a file system without locks."""


class DirectoryLock:
    """The exclusive right to write to a directory: held from construction until `release`, also a context manager.

    A LockedError if another tracker or command holds it, a WriteError if the system refused.
    """

    def __init__(self, directory: Path) -> None:
        import filelock  # takes a tenth of a second, which a look at a run need not wait for

        self._holder = directory / HOLDER_NAME
        self._clear_note: Callable[[], object] = lambda: None
        with files.reported_as_write_error(directory):
            # Not filelock's substitute, a file that exists or not: it would survive a crash.
            path = directory / LOCK_NAME
            if path.is_file() and path.stat().st_size:  # releases of filelock for Python 3.10 would empty it
                raise WriteError(path, "is not a lock: it has content", "move it away")
            self._lock = filelock.FileLock(path, blocking=False, is_singleton=False, fallback_to_soft=False)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                what = f"{self._named_holder()} is writing here"
                raise LockedError(directory, what, "close that tracker, or take another directory") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                why = (error.strerror or str(error)).lower()
                log.warning("%s: no locks on this file system (%s): make sure that nothing else writes", directory, why)
            try:
                if self._holder.exists() and self._holder.stat().st_size:
                    log.warning("%s: %s", directory, self._left_behind())
                self._note_holder()
                # Also without a call of `release`: at the end of the process, or of all references.
                self._clear_note = weakref.finalize(self, _clear, self._holder, os.getpid())
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Release the lock."""
        try:
            if self._clear_note():
                with suppress(OSError):
                    files.unlink_if_there(self._holder)
        finally:
            if self._lock.is_locked:
                self._lock.release()

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _note_holder(self) -> None:
        """Write the note; nothing depends on it, so that it need not be atomic."""
        own = {"host": socket.gethostname(), "process": os.getpid()}
        files.unlink_if_there(self._holder)
        descriptor = files.system.open_new(self._holder)
        try:
            files.write_at(descriptor, json.dumps(own).encode(), 0)
        finally:
            files.system.close(descriptor)

    def _left_behind(self) -> str:
        """A warning about a note without a lock."""
        holder = self._read_holder()
        if self._lock.is_locked and (holder is None or holder[1] == socket.gethostname()):
            return f"{self._named_holder()} died without releasing it; taken over"
        what = f"{self._named_holder()} has not released it, and holds no lock that can be seen here; taken over: "
        return what + "make sure that it is not running any more"

    def _read_holder(self) -> tuple[int, str] | None:
        """Process and host of the note; None if it cannot be read."""
        try:
            holder = json.loads(read_small_file(self._holder, MOST_HOLDER_BYTES))
            return int(holder["process"]), str(holder["host"])
        except (FileFormatError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def _named_holder(self) -> str:
        holder = self._read_holder()
        if holder is None:
            return "another process"
        process, host = holder
        if holder == (os.getpid(), socket.gethostname()):
            return f"another tracker of this process ({process})"
        return f"process {process} on {printable(host[:80])}"


def _clear(holder: Path, process: int) -> bool:
    """Empty the note of a holder; not in a child that was forked from it. Returns whether it was this process's.

    A forgotten lock is cleared whenever the garbage collector runs, also while the directory is being deleted: that
    fails if a name in it goes away meanwhile, so the name stays.
    """
    if is_own := os.getpid() == process:
        with suppress(OSError):
            os.truncate(holder, 0)
    return is_own


@contextmanager
def one_writer(directory: Path) -> Iterator[Callable[[], None]]:
    """Hold the lock of a directory, or the lease of a run in a store, for the block.

    Yields a function that raises a LockedError if another process has taken over the lease meanwhile.
    """
    if not files.is_url(directory):
        with DirectoryLock(directory):
            yield lambda: None
        return
    from posthoc_cli.remote.lease import held

    if not files.is_remote(directory):  # deletions in a spool wait for the next uploads of its tracker
        raise LockedError(directory, "is opened by a tracker of this process", "open the run by its URL, as text")
    with held(directory) as check:
        yield check


# --- removing from a directory


def remove_snapshot(path: Path) -> None:
    """Delete a snapshot; a missing one is no error. A WriteError if the system refuses.

    A folder of parts stays where something else is in it, or where a network file system keeps a file that is read.
    """
    with files.reported_as_write_error(path, "removed"):
        if path.is_symlink() or not path.is_dir():
            files.unlink_if_there(path)
            return
        with suppress(FileNotFoundError):
            listing = Listing(path, tuple(sorted(files.system.list(path))))
            for file in (*listing.files, *listing.leftovers):
                files.unlink_if_there(file)
            try:
                files.system.remove_directory(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise


def remove_leftovers(directory: Path) -> None:
    """Remove temporaries of interrupted writes from a directory, and from the snapshots in it, while it is locked."""
    for folder in (directory, *list_directory(directory).folders):
        if folder.is_dir() and not folder.is_symlink():
            files.remove_leftovers(folder, STILL_SECONDS)


def set_aside(stored: Sequence[StoredSnapshot]) -> list[Path]:
    """Move snapshots to the folder `superseded` beside them; returns their new paths. See `move_aside`."""
    if not stored:
        return []
    return move_aside([snapshot.path for snapshot in stored], stored[0].path.parent / SUPERSEDED)


def move_aside(paths: Sequence[Path], folder: Path) -> list[Path]:
    """Move files and directories, durably, into a folder of the same file system; returns their new paths.

    Nothing there is replaced; missing paths are skipped. A DirectoryError if it is a link or no folder.
    """
    if not files.is_gone(folder) and (folder.is_symlink() or not folder.is_dir()):
        reason = "is a link or no directory; snapshots are set aside in a directory of that name"
        raise DirectoryError(folder, reason, "move it away")
    with files.reported_as_write_error(folder):
        files.make_directory(folder)
        moved = []
        for path in paths:
            if not files.is_gone(path):
                free = _free_name(folder / path.name)
                files.system.rename(path, free)
                moved.append(free)
        # The new names first, so that a crash in between loses no file.
        for directory in (folder, *sorted({path.parent for path in paths})):
            files.system.fsync_directory(directory)
    return moved


def _free_name(path: Path) -> Path:
    name, suffix = path.name.removesuffix(SUFFIX), SUFFIX * path.name.endswith(SUFFIX)
    numbered = (path.with_name(f"{name}.{number}{suffix}") for number in count(1))
    return next(free for free in chain([path], numbered) if files.is_gone(free))


# --- thinning while a training writes


def on_schedule(stored: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """Those that every run of this schedule has, wherever it was stopped in between."""
    return [snapshot for snapshot in stored if not snapshot.info.off_schedule]


def thin(
    stored: Sequence[StoredSnapshot], max_checkpoints: int | None, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> list[StoredSnapshot]:
    """Keep `max_checkpoints` snapshots a profile, those that reconstruction needs most; delete the others.

    Those on the schedule are chosen as if there were no others, so that a training which was stopped in between keeps
    the same ones. Of those off the schedule the latest stay if there is room, and the newest of all snapshots always.
    Returns what is left, in order of time.
    """
    if max_checkpoints is None:
        return list(stored)
    gone = _surplus(stored, max_checkpoints, sigma_range)
    for snapshot in gone:
        log.debug("thinning: removing %s", snapshot.path)
        remove_snapshot(snapshot.path)
    return [snapshot for snapshot in stored if snapshot not in gone]


def _surplus(
    stored: Sequence[StoredSnapshot], max_checkpoints: int, sigma_range: tuple[float, float]
) -> list[StoredSnapshot]:
    if max(Counter(snapshot.sigma_rel for snapshot in stored).values(), default=0) <= max_checkpoints:
        return []
    scheduled = on_schedule(stored)
    counts = Counter(snapshot.sigma_rel for snapshot in scheduled)
    gone: list[StoredSnapshot] = []
    if max(counts.values(), default=0) > max_checkpoints:
        averages = [snapshot.info.average() for snapshot in scheduled]
        profiles = [snapshot.info.profile.pure for snapshot in scheduled]
        dropped = snapshots_to_drop(profiles, measured_prior(averages), max_checkpoints, sigma_range)
        gone += [scheduled[index] for index in dropped]
    for sigma_rel in dict.fromkeys(snapshot.sigma_rel for snapshot in stored):
        others = [s for s in stored if s.info.off_schedule and s.sigma_rel == sigma_rel]
        room = max(max_checkpoints - counts[sigma_rel], 0)
        gone += [snapshot for snapshot in others[: max(len(others) - room, 0)] if snapshot.t < stored[-1].t]
    return gone


# --- pruning: a plan of what to delete, with the errors, and the deletion

_MARGIN = 2.0
"""A bound on the error is kept by this factor, since an error may be above the expected one (measured: what was left in
5 of 42 cases missed its bound without, by up to 1.45, and with 1.5 one of 54, by 1.22)."""


@dataclass(frozen=True)
class Pruning:
    """A plan of what to delete: `kept` by time, then sigma_rel, `gone` in the order to delete.

    `before` and `after` are expected errors from all snapshots and from the survivors, both with the prior from all
    headers; of very many snapshots only some are used, see `thinned_subset`. `source` as in `Prior`.
    """

    kept: tuple[Snapshot, ...]
    gone: tuple[Snapshot, ...]
    before: ErrorCurve
    after: ErrorCurve
    source: str
    deleted: bool = False

    def __repr__(self) -> str:
        count, left = len(self.kept) + len(self.gone), len(self.kept)
        errors = f"worst error {percent(self.after.worst)}, before {percent(self.before.worst)}"
        return f"Pruning({left} of {count} snapshots stay: {errors})"

    @property
    def read_bytes(self) -> int:
        """Bytes to read for verifying the survivors."""
        return sum(entry.nbytes for snapshot in self.kept for entry in snapshot.header.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as data for JSON."""
        gone = [(s.path.name, s.info.t, s.info.sigma_rel, s.header.file_bytes) for s in self.gone]
        return {
            "run": self.kept[0].info.run_id,
            "kept": [snapshot.path.name for snapshot in self.kept],
            "gone": [dict(zip(("file", "t", "sigma_rel", "bytes"), one, strict=True)) for one in gone],
            "bytes": file_bytes(self.kept),
            "gone_bytes": file_bytes(self.gone),
            "before": {"worst_error": self.before.worst, "median_error": self.before.median},
            "after": {"worst_error": self.after.worst, "median_error": self.after.median},
            "prior": self.source,
            "deleted": self.deleted,
        }


def file_bytes(snapshots: Sequence[Snapshot]) -> int:
    """The size of all their files."""
    return sum(snapshot.header.file_bytes for snapshot in snapshots)


@one_blas_thread()
def plan_pruning(
    snapshots: Sequence[Snapshot],
    keep: int | None = None,
    max_bytes: int | None = None,
    max_error: float | None = None,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> Pruning:
    """Plan which snapshots to delete. Reads no tensor, but a sample if headers have no measurements.

    The newest one of each profile stays, and so do those of the newest time that all profiles have: training can
    continue from these. Of very many, those that a reconstruction would not use go first.

    Arguments:
        snapshots: all of one directory.
        keep: the number to keep of each profile; or
        max_bytes: keep as many as take at most this; or
        max_error: keep as few as have at most this worst error over `sigma_range`, with a margin for the prediction.
            Exactly one of the three.

    Raises:
        InvalidValueError: `keep` is more than there are, or `max_bytes` less than the newest ones take.
        InexactError: all snapshots together miss `max_error`.
    """
    check_alone(1, keep=keep, max_size=max_bytes, max_error=max_error)
    check_max_error(max_error)
    check_sigma_range(sigma_range)
    most = max(Counter(snapshot.info.sigma_rel for snapshot in snapshots).values())
    if max_bytes is not None:
        check_count("max_bytes", max_bytes)
    if keep is not None and check_count("keep", keep) > most:
        there = f"there are only {most} snapshots" if most > 1 else "there is only 1 snapshot"
        raise InvalidValueError("keep", f"{there} a profile; nothing was deleted", value=keep)
    profiles = [snapshot.info.profile.pure for snapshot in snapshots]
    needed = _needed(profiles)
    solved = sorted({*thinned_subset(profiles), *needed})
    prior = source_prior([snapshots[index] for index in solved])
    before = forecast([profiles[index] for index in solved], prior, sigma_range)

    def errors_without(gone: Sequence[int]) -> ErrorCurve:
        left = sorted(set(range(len(profiles))) - set(gone))
        chosen = [left[place] for place in thinned_subset([profiles[index] for index in left])]
        if set(chosen) <= set(solved):
            known = prior.of([solved.index(index) for index in chosen])
        else:
            known = replace(source_prior([snapshots[index] for index in chosen]), motion=prior.motion)
        after = forecast([profiles[index] for index in chosen], known, sigma_range)
        # The expected distance cannot fall, but the norm that it is relative to is estimated from fewer averages.
        return replace(after, predicted_error=np.maximum(after.predicted_error, before.predicted_error))

    if max_error is not None and before.worst > max_error:
        raise InexactError(
            "max_error",
            f"all {len(snapshots)} snapshots together have a predicted error of up to "
            f"{before.worst:.2g} for sigma_rel {sigma_range[0]:g} to {sigma_range[1]:g}; nothing can go",
            value=f"{max_error:g}",
        )
    staying = {*thinned_subset(profiles, keep=keep or 1), *needed}
    order = _spread_out([index for index in range(len(profiles)) if index not in staying])
    if staying == set(solved):
        among = [profiles[index] for index in solved]
        found = removal_order(among, prior, range(len(among)), keep or 1, _needed(among), sigma_range)
        order += [solved[index] for index in found]
    count = len(order)
    if max_bytes is not None:
        count = _enough_bytes(snapshots, order, max_bytes)
    if max_error is not None:
        # The errors grow with what goes.
        bound = max_error / _MARGIN
        count = bisect_left(range(1, count + 1), True, key=lambda n: errors_without(order[:n]).worst > bound)
    gone = order[:count]
    if len(solved) == len(profiles):
        left = sorted(set(range(len(profiles))) - set(gone))
        better = exchanged(profiles, prior, left, gone, needed, sigma_range)
        stay = [snapshot for index, snapshot in enumerate(snapshots) if index not in set(better)]
        fits = max_bytes is None or file_bytes(stay) <= max_bytes  # later ones have longer headers
        if fits and (max_error is None or errors_without(better).worst <= max_error / _MARGIN):
            gone = better
    leaving = set(gone)
    kept = [snapshot for index, snapshot in enumerate(snapshots) if index not in leaving]
    after = errors_without(gone) if gone else before
    return Pruning(tuple(kept), tuple(snapshots[index] for index in gone), before, after, prior.source)


def prune(directory: Path, pruning: Pruning, progress: Callable[[int], object] = lambda _: None) -> Pruning:
    """Delete what was planned, as the one writer: verify all survivors, then delete the others.

    Raises:
        LockedError: a tracker is writing to the directory.
        DirectoryError, MismatchError, FileFormatError: it has changed, or a survivor is damaged; nothing is deleted.
        WriteError: the system refused a deletion. All survivors are there.
    """
    with one_writer(directory) as check_lease:
        remove_leftovers(directory)
        planned = {snapshot.path: snapshot.header for snapshot in (*pruning.kept, *pruning.gone)}
        if {snapshot.path: snapshot.header for snapshot in read_directory(directory)} != planned:
            raise MismatchError(directory, "has changed since it was read; nothing was deleted", "run again")
        for snapshot in pruning.kept:
            for part in snapshot.parts or (snapshot,):
                verify_payload(part.path, part.header, progress)
        for snapshot in pruning.gone:
            check_lease()
            remove_snapshot(snapshot.path)
        with files.reported_as_write_error(directory):
            files.system.fsync_directory(directory)
    return replace(pruning, deleted=True)


def _needed(profiles: Sequence[PowerFunction]) -> set[int]:
    """Indices of the newest of each profile, and of those of the newest time that has all."""
    times = {gamma: {p.t for p in profiles if p.gamma == gamma} for gamma in {p.gamma for p in profiles}}
    newest = {gamma: max(own) for gamma, own in times.items()}
    complete = max(set.intersection(*times.values()), default=None)
    return {index for index, p in enumerate(profiles) if p.t in (newest[p.gamma], complete)}


def _spread_out(indices: Sequence[int]) -> list[int]:
    """The same in an order whose every beginning is spread evenly over them: by the reversed bits of their places."""
    bits = len(indices).bit_length()
    return [indices[place] for place in sorted(range(len(indices)), key=lambda place: f"{place:0{bits}b}"[::-1])]


def _enough_bytes(snapshots: Sequence[Snapshot], order: Sequence[int], max_bytes: int) -> int:
    """How many of the first ones must go for the rest to fit."""
    freed = [0, *accumulate(snapshots[index].header.file_bytes for index in order)]
    size = file_bytes(snapshots)
    fitting = next((count for count, nbytes in enumerate(freed) if size - nbytes <= max_bytes), None)
    if fitting is None:
        reason = f"the newest snapshots of each profile, which stay, take {size - freed[-1]:,} bytes"
        raise InvalidValueError("max_size", reason, value=f"{max_bytes:,} bytes")
    return fitting
