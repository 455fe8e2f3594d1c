"""Changes to a directory of snapshots: its lock, removing and setting aside, thinning and pruning.

The lock is `flock`, which the system releases when its holder dies. On a file system without locks, or one that keeps
them to one host, a second writer cannot be excluded; a warning says so if that can be detected. A file next to the
lock names its holder, for people.

Deletions are safe at any moment: pruning deletes only what was planned, only after all survivors were read and
verified, and the least needed snapshots first, so that an interruption leaves the best valid directory of its size.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import weakref
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
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
    SPARED_TIMES,
    check_max_error,
    check_sigma_range,
    exchanged,
    forecast,
    removal_order,
    snapshots_to_drop,
    spared_times,
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
"""The age from which temporary files in a locked directory are removed: a synthesis into it takes no lock."""

# --- the lock

LOCK_NAME = ".ema.lock"
HOLDER_NAME = ".ema.lock.holder"
MOST_HOLDER_BYTES = 10_000

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Error numbers of `flock` on a file system without locks."""


class DirectoryLock:
    """The exclusive right to write to a directory, held from construction to `release`; a context manager.

    Raises LockedError if another tracker or command holds it, WriteError if the system refused an operation.
    """

    def __init__(self, directory: Path) -> None:
        import filelock  # imported here since it takes a tenth of a second, which reading a run need not wait for

        self._holder = directory / HOLDER_NAME
        self._clear_note: Callable[[], object] = lambda: None
        with files.reported_as_write_error(directory):
            # Without filelock's fallback, a lock by the existence of a file, which would survive a crash.
            path = directory / LOCK_NAME
            if path.is_file() and path.stat().st_size:  # releases of filelock for Python 3.10 truncate the file
                raise WriteError(path, "is not a lock: it has content", "move it away")
            self._lock = filelock.FileLock(path, blocking=False, is_singleton=False, fallback_to_soft=False)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                reason = f"{self._named_holder()} is writing here"
                raise LockedError(directory, reason, "close that tracker, or take another directory") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                why = (error.strerror or str(error)).lower()
                log.warning("%s: no locks on this file system (%s): make sure that nothing else writes", directory, why)
            try:
                if self._holder.exists() and self._holder.stat().st_size:
                    log.warning("%s: %s", directory, self._takeover_warning())
                self._note_holder()
                # Clears the note also without `release`: when the process ends or the last reference is gone.
                self._clear_note = weakref.finalize(self, _clear, self._holder, os.getpid())
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Release the lock."""
        try:
            if self._clear_note():
                with suppress(OSError):
                    files.unlink_if_exists(self._holder)
        finally:
            if self._lock.is_locked:
                self._lock.release()

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _note_holder(self) -> None:
        """Write the note on the holder; nothing depends on it, so this need not be atomic."""
        note = {"host": socket.gethostname(), "process": os.getpid()}
        files.unlink_if_exists(self._holder)
        descriptor = files.system.open_new(self._holder)
        try:
            files.write_at(descriptor, json.dumps(note).encode(), 0)
        finally:
            files.system.close(descriptor)

    def _takeover_warning(self) -> str:
        """Return the warning about a note whose holder no longer has the lock."""
        holder = self._read_holder()
        if self._lock.is_locked and (holder is None or holder[1] == socket.gethostname()):
            return f"{self._named_holder()} died without releasing it; taken over"
        warning = f"{self._named_holder()} has not released it, and holds no lock that can be seen here; taken over: "
        return warning + "make sure that it is not running any more"

    def _read_holder(self) -> tuple[int, str] | None:
        """Return the process and host in the note; None if it cannot be read."""
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
    """Empty the note of a lock that this process, not its parent, took; return whether that is the case.

    The garbage collector may clear a lock while the directory is being deleted, which would fail if a name in it
    vanished meanwhile. The file is therefore emptied and not removed.
    """
    if is_own := os.getpid() == process:
        with suppress(OSError):
            os.truncate(holder, 0)
    return is_own


# --- removing from a directory


def remove_snapshot(path: Path) -> None:
    """Delete a snapshot if it exists; raise WriteError if the system refuses.

    A folder of parts remains if it holds anything else, or if a network file system keeps a file that is being read.
    """
    with files.reported_as_write_error(path, "removed"):
        if path.is_symlink() or not path.is_dir():
            files.unlink_if_exists(path)
            return
        with suppress(FileNotFoundError):
            listing = Listing(path, tuple(sorted(files.system.list(path))))
            for file in (*listing.files, *listing.leftovers):
                files.unlink_if_exists(file)
            try:
                files.system.remove_directory(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise


def remove_leftovers(directory: Path) -> None:
    """Remove temporary files of interrupted writes from a locked directory and from the snapshots in it."""
    for folder in (directory, *list_directory(directory).folders):
        if folder.is_dir() and not folder.is_symlink():
            files.remove_leftovers(folder, STILL_SECONDS)


def set_aside(stored: Sequence[StoredSnapshot]) -> list[Path]:
    """Move snapshots durably to the folder `superseded` of their directory; return their new paths.

    Nothing in the folder is replaced; missing paths are skipped. Raises DirectoryError if `superseded` is not a folder.
    """
    if not stored:
        return []
    directory = stored[0].path.parent
    folder = directory / SUPERSEDED
    if not files.is_absent(folder) and (folder.is_symlink() or not folder.is_dir()):
        reason = "is a link or no directory; snapshots are set aside in a directory of that name"
        raise DirectoryError(folder, reason, "move it away")
    with files.reported_as_write_error(folder):
        files.make_directory(folder)
        moved = []
        for snapshot in stored:
            if not files.is_absent(snapshot.path):
                target = _free_name(folder / snapshot.path.name)
                files.system.rename(snapshot.path, target)
                moved.append(target)
        # Sync the new names first, so that a crash in between loses no file.
        for changed in (folder, directory):
            files.system.fsync_directory(changed)
    return moved


def _free_name(path: Path) -> Path:
    """Return the path, or one with a number, that does not exist; raise an OSError if that is unknown."""
    name, suffix = path.name.removesuffix(SUFFIX), SUFFIX * path.name.endswith(SUFFIX)
    numbered = (path.with_name(f"{name}.{number}{suffix}") for number in count(1))
    for candidate in chain([path], numbered):
        try:
            candidate.lstat()
        except FileNotFoundError:
            break
    return candidate


# --- thinning while a training writes


def on_schedule(stored: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """Return the snapshots on the schedule, which do not depend on where the training was stopped."""
    return [snapshot for snapshot in stored if not snapshot.info.off_schedule]


def thin(
    stored: Sequence[StoredSnapshot], max_checkpoints: int | None, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> list[StoredSnapshot]:
    """Keep the `max_checkpoints` snapshots per profile that reconstruction needs most; delete the others.

    Snapshots on the schedule are chosen as if there were no others, so that a training that was stopped in between
    keeps the same ones. Of those off the schedule, the latest stay if there is room, and in any case those of the newest
    `SPARED_TIMES`: a checkpoint of the training may belong to them. Returns the remaining snapshots in order of time.
    """
    if max_checkpoints is None:
        return list(stored)
    surplus = _surplus(stored, max_checkpoints, sigma_range)
    for snapshot in surplus:
        log.debug("thinning: removing %s", snapshot.path)
        remove_snapshot(snapshot.path)
    return [snapshot for snapshot in stored if snapshot not in surplus]


def _surplus(
    stored: Sequence[StoredSnapshot], max_checkpoints: int, sigma_range: tuple[float, float]
) -> list[StoredSnapshot]:
    """Choose the snapshots that `thin` deletes."""
    if max(Counter(snapshot.sigma_rel for snapshot in stored).values(), default=0) <= max_checkpoints:
        return []
    scheduled = on_schedule(stored)
    counts = Counter(snapshot.sigma_rel for snapshot in scheduled)
    surplus: list[StoredSnapshot] = []
    if max(counts.values(), default=0) > max_checkpoints:
        averages = [snapshot.info.average() for snapshot in scheduled]
        profiles = [snapshot.info.profile.pure for snapshot in scheduled]
        spared = spared_times(max_checkpoints)
        dropped = snapshots_to_drop(profiles, measured_prior(averages), max_checkpoints, sigma_range, spared)
        surplus += [scheduled[index] for index in dropped]
    oldest_spared = sorted({snapshot.t for snapshot in stored})[-SPARED_TIMES:][0]
    for sigma_rel in dict.fromkeys(snapshot.sigma_rel for snapshot in stored):
        off_schedule = [s for s in stored if s.info.off_schedule and s.sigma_rel == sigma_rel]
        room = max(max_checkpoints - counts[sigma_rel], 0)
        surplus += [s for s in off_schedule[: max(len(off_schedule) - room, 0)] if s.t < oldest_spared]
    return surplus


# --- pruning: a plan of what to delete, with the errors, and the deletion

_MARGIN = 2.0
"""The factor by which predicted errors stay below a user's bound, since true errors may exceed the expected ones
(measured: without it, 5 of 42 prunings exceeded the bound, by up to 1.45; with 1.5, one of 54, by 1.22)."""


@dataclass(frozen=True)
class Pruning:
    """A plan of what to delete: `kept` by time, then sigma_rel, and `to_delete` in the order of deletion.

    `before` and `after` are the expected errors from all snapshots and from the survivors, with the prior from all
    headers; of very many snapshots only some are used, see `thinned_subset`. `source` is that of `Prior`.
    """

    kept: tuple[Snapshot, ...]
    to_delete: tuple[Snapshot, ...]
    before: ErrorCurve
    after: ErrorCurve
    source: str
    deleted: bool = False

    def __repr__(self) -> str:
        count, left = len(self.kept) + len(self.to_delete), len(self.kept)
        errors = f"worst error {percent(self.after.worst)}, before {percent(self.before.worst)}"
        return f"Pruning({left} of {count} snapshots stay: {errors})"

    @property
    def read_bytes(self) -> int:
        """The number of bytes to read for verifying the survivors."""
        return sum(entry.nbytes for snapshot in self.kept for entry in snapshot.header.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data for JSON."""
        return {
            "run": self.kept[0].info.run_id,
            "kept": [snapshot.path.name for snapshot in self.kept],
            "gone": [
                {"file": s.path.name, "t": s.info.t, "sigma_rel": s.info.sigma_rel, "bytes": s.header.file_bytes}
                for s in self.to_delete
            ],
            "bytes": file_bytes(self.kept),
            "gone_bytes": file_bytes(self.to_delete),
            "before": {"worst_error": self.before.worst, "median_error": self.before.median},
            "after": {"worst_error": self.after.worst, "median_error": self.after.median},
            "prior": self.source,
            "deleted": self.deleted,
        }


def file_bytes(snapshots: Sequence[Snapshot]) -> int:
    """Return the size of the files of all snapshots."""
    return sum(snapshot.header.file_bytes for snapshot in snapshots)


@one_blas_thread()
def plan_pruning(
    snapshots: Sequence[Snapshot],
    keep: int | None = None,
    max_size: int | None = None,
    max_error: float | None = None,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> Pruning:
    """Plan which snapshots to delete. Reads no tensors, except a sample if headers have no measurements.

    The newest snapshot of each profile stays, and those of the newest time that all profiles have, from which training
    can continue. Of very many snapshots, those that a reconstruction would not use are deleted first.

    Arguments:
        snapshots: all snapshots of one directory.
        keep: the number of snapshots to keep of each profile; or
        max_size: keep as many snapshots as fit in this number of bytes; or
        max_error: keep as few snapshots as have at most this worst error over `sigma_range`, with a margin for the
            prediction. Exactly one of the three must be given.

    Raises:
        InvalidValueError: `keep` exceeds the number of snapshots, or the newest ones take more than `max_size`.
        InexactError: the error of all snapshots together exceeds `max_error`.
    """
    check_alone(1, keep=keep, max_size=max_size, max_error=max_error)
    check_max_error(max_error)
    check_sigma_range(sigma_range)
    most = max(Counter(snapshot.info.sigma_rel for snapshot in snapshots).values())
    if max_size is not None:
        check_count("max_size", max_size)
    if keep is not None and check_count("keep", keep) > most:
        existing = f"there are only {most} snapshots" if most > 1 else "there is only 1 snapshot"
        raise InvalidValueError("keep", f"{existing} a profile; nothing was deleted", value=keep)
    errors = _Errors(snapshots, sigma_range)
    if max_error is not None and errors.before.worst > max_error:
        raise InexactError(
            "max_error",
            f"all {len(snapshots)} snapshots together have a predicted error of up to "
            f"{errors.before.worst:.2g} for sigma_rel {sigma_range[0]:g} to {sigma_range[1]:g}; nothing can go",
            value=f"{max_error:g}",
        )
    gone = errors.deletion_order(keep or 1)
    bound = math.inf if max_error is None else max_error / _MARGIN
    if max_size is not None:
        gone = gone[: _enough_bytes(snapshots, gone, max_size)]
    if max_error is not None:  # the errors grow with the number of deletions
        gone = gone[: bisect_left(range(1, len(gone) + 1), True, key=lambda n: errors.without(gone[:n]).worst > bound)]
    exchanged = errors.exchanged(gone)
    size = file_bytes([snapshots[index] for index in errors.left(exchanged)])
    fits = max_size is None or size <= max_size  # headers of later snapshots are longer
    if fits and (max_error is None or errors.without(exchanged).worst <= bound):
        gone = exchanged
    kept, deleted = (tuple(snapshots[index] for index in chosen) for chosen in (errors.left(gone), gone))
    return Pruning(kept, deleted, errors.before, errors.without(gone) if gone else errors.before, errors.prior.source)


class _Errors:
    """The expected errors from subsets of a directory's snapshots, given as indices; `before` are those from all."""

    def __init__(self, snapshots: Sequence[Snapshot], sigma_range: tuple[float, float]) -> None:
        self._snapshots, self._sigma_range = snapshots, sigma_range
        self._profiles = [snapshot.info.profile.pure for snapshot in snapshots]
        self._needed = _needed(self._profiles)
        self._used = sorted({*thinned_subset(self._profiles), *self._needed})
        self.prior = source_prior([snapshots[index] for index in self._used])
        self.before = forecast([self._profiles[index] for index in self._used], self.prior, sigma_range)

    def without(self, gone: Sequence[int]) -> ErrorCurve:
        """Return the error curve after deletions."""
        left = self.left(gone)
        chosen = [left[place] for place in thinned_subset([self._profiles[index] for index in left])]
        if set(chosen) <= set(self._used):
            prior = self.prior.of([self._used.index(index) for index in chosen])
        else:
            prior = replace(source_prior([self._snapshots[index] for index in chosen]), motion=self.prior.motion)
        after = forecast([self._profiles[index] for index in chosen], prior, self._sigma_range)
        # The expected distance cannot decrease, but the norm that it is relative to is estimated from fewer averages.
        return replace(after, predicted_error=np.maximum(after.predicted_error, self.before.predicted_error))

    def deletion_order(self, keep: int) -> list[int]:
        """Return the snapshots that may be deleted, the least needed first, so that `keep` of each profile remain."""
        profiles = self._profiles
        staying = {*thinned_subset(profiles, keep=keep), *self._needed}
        order = _spread_out([index for index in range(len(profiles)) if index not in staying])
        if staying == set(self._used):
            used = [profiles[index] for index in self._used]
            removable = removal_order(used, self.prior, range(len(used)), keep, _needed(used), self._sigma_range)
            order += [self._used[index] for index in removable]
        return order

    def exchanged(self, gone: list[int]) -> list[int]:
        """Return better deletions of the same number by exchanges; the same ones if not all snapshots are used."""
        if len(self._used) < len(self._profiles):
            return gone
        return exchanged(self._profiles, self.prior, self.left(gone), gone, self._needed, self._sigma_range)

    def left(self, gone: Sequence[int]) -> list[int]:
        """Return the remaining snapshots after deletions."""
        return sorted(set(range(len(self._profiles))) - set(gone))


def prune(directory: Path, pruning: Pruning, progress: Callable[[int], object] = lambda _: None) -> Pruning:
    """Carry out a plan as the one writer: verify all survivors, then delete the other snapshots.

    Raises:
        LockedError: a tracker is writing to the directory.
        DirectoryError, MismatchError, FileFormatError: it has changed, or a survivor is damaged; nothing is deleted.
        WriteError: the system refused a deletion. All survivors remain.
    """
    with DirectoryLock(directory):
        remove_leftovers(directory)
        planned = {snapshot.path: snapshot.header for snapshot in (*pruning.kept, *pruning.to_delete)}
        if {snapshot.path: snapshot.header for snapshot in read_directory(directory)} != planned:
            raise MismatchError(directory, "has changed since it was read; nothing was deleted", "run again")
        for snapshot in pruning.kept:
            for part in snapshot.files:
                assert part.header is not None, "only files of other programs have none"
                verify_payload(part.path, part.header, progress)
        for snapshot in pruning.to_delete:
            remove_snapshot(snapshot.path)
        with files.reported_as_write_error(directory):
            files.system.fsync_directory(directory)
    return replace(pruning, deleted=True)


def _needed(profiles: Sequence[PowerFunction]) -> set[int]:
    """Return the indices of each profile's newest snapshot, and of those of the newest time that all profiles have."""
    times = {gamma: {p.t for p in profiles if p.gamma == gamma} for gamma in {p.gamma for p in profiles}}
    newest = {gamma: max(of_profile) for gamma, of_profile in times.items()}
    complete = max(set.intersection(*times.values()), default=None)
    return {index for index, p in enumerate(profiles) if p.t in (newest[p.gamma], complete)}


def _spread_out(indices: Sequence[int]) -> list[int]:
    """Reorder indices by the reversed bits of their places, so that every prefix is spread evenly over them."""
    bits = len(indices).bit_length()
    return [indices[place] for place in sorted(range(len(indices)), key=lambda place: f"{place:0{bits}b}"[::-1])]


def _enough_bytes(snapshots: Sequence[Snapshot], order: Sequence[int], max_size: int) -> int:
    """Return how many of the first snapshots in `order` must be deleted for the others to fit."""
    freed = [0, *accumulate(snapshots[index].header.file_bytes for index in order)]
    size = file_bytes(snapshots)
    fitting = next((count for count, nbytes in enumerate(freed) if size - nbytes <= max_size), None)
    if fitting is None:
        reason = f"the newest snapshots of each profile, which stay, take {size - freed[-1]:,} bytes"
        raise InvalidValueError("max_size", reason, value=f"{max_size:,} bytes")
    return fitting
