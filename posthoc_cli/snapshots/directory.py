"""A directory of snapshots: its names and headers, what belongs together, its lock, removing, and thinning.

Names are for people (`<t, zero-padded>-<sigma_rel>.safetensors`); the headers alone are authoritative.

The lock is `flock`, which the system releases when its holder dies. On a file system without locks, or one that keeps
them to one host, a second writer cannot be excluded; a warning says so if that can be detected. A file next to the
lock names its holder, for people.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import socket
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import chain, combinations, count, pairwise
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    LockedError,
    MismatchError,
    PostHocError,
    RemoteError,
    WriteError,
    printable,
    shown,
)
from posthoc_cli.planning import SPARED_TIMES, USEFUL_RANGE, snapshots_to_drop, spared_times
from posthoc_cli.reconstruction import Measurements, measured_prior
from posthoc_cli.snapshots.path import decode_path, index_within, joined_paths, joined_sample, places
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot, read_one
from posthoc_cli.snapshots.tensorfile import SUFFIX, Box, Entry, cover_problem, in_turn, read_file, read_small_file

log = logging.getLogger(__name__)

SUPERSEDED = "superseded"
"""The name of the folder for snapshots from after the step at which training was resumed."""

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Suffixes of files that are usually pickles; such files are never opened."""

NAME_A_RUN = "name the directory that a tracker writes its snapshots to"

ON_ONE_FILE_SYSTEM = "all processes of a training write to one directory, on a file system that they share"

STILL_SECONDS = 60.0
"""The age from which temporary files in a locked directory are removed: a synthesis into it takes no lock."""


# --- listing and reading a directory


@dataclass(frozen=True)
class Directory:
    """The names in a directory, sorted, and once its headers are read, what they say.

    Attributes:
        snapshots: complete snapshots by time, then sigma_rel.
        problems: what is wrong: unreadable headers, and snapshots that contradict each other.
        notes: lines about unusual entries.
        incomplete: folders that lack parts of a snapshot, left by an interrupted training or still being written, each
            with the parts that exist, in words.
    """

    path: Path
    entries: tuple[Path, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    problems: tuple[PostHocError, ...] = ()
    notes: tuple[str, ...] = ()
    incomplete: Mapping[Path, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The visible files that may be snapshots or outputs."""
        return [path for path in self.entries if path.suffix == SUFFIX and not path.name.startswith(".")]

    @property
    def folders(self) -> list[Path]:
        """The folders that, by their names, may be snapshots in several parts."""
        return [path for path in self.entries if is_snapshot_name(path) and path.suffix != SUFFIX]

    @property
    def parts_folders(self) -> list[Path]:
        """The folders of parts, whatever their names: setting one aside may have added a number to its name."""
        return [path for path in self.entries if path.suffix != SUFFIX and _may_hold_parts(path)]

    @property
    def leftovers(self) -> list[Path]:
        """The temporary files of interrupted writes, or of writes in progress."""
        return [path for path in self.entries if files.is_temporary(path.name)]

    @property
    def pickles(self) -> list[Path]:
        """The files that, by their names, are pickles."""
        return [path for path in self.entries if path.suffix in PICKLES]

    @property
    def superseded(self) -> int:
        """The number of snapshots that were set aside; 0 if their folder cannot be read."""
        with suppress(DirectoryError):
            superseded = list_folder(self.path / SUPERSEDED)
            return len(superseded.files) + len(superseded.parts_folders)
        return 0


def list_directory(directory: Path) -> Directory:
    """List a directory; raise DirectoryError if it does not exist, is not a directory, or cannot be read."""
    try:
        return Directory(directory, tuple(sorted(files.system.list(directory))))
    except FileNotFoundError as error:
        raise DirectoryError(directory, "no such directory", NAME_A_RUN) from error
    except NotADirectoryError as error:
        raise DirectoryError(directory, "is not a directory", NAME_A_RUN) from error
    except RemoteError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        reason = getattr(error, "strerror", None) or str(error)
        raise DirectoryError(f"{str(directory)!r}", f"cannot be read: {reason.lower()}") from error


def list_folder(folder: Path) -> Directory:
    """List a folder like `list_directory`; return nothing for a link, which may lead elsewhere, or for a file."""
    if folder.is_symlink():
        return Directory(folder)
    try:
        return list_directory(folder)
    except DirectoryError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return Directory(folder)
        raise


def inspect_directory(directory: Path) -> Directory:
    """Read the headers of all snapshots in a directory, continuing after errors; raise errors of `list_directory`."""
    listing = list_directory(directory)
    snapshots: list[Snapshot] = []
    problems: list[PostHocError] = []
    notes: list[str] = []
    incomplete: dict[Path, str] = {}
    for result in _snapshots_in(listing.files):
        if isinstance(result, FileFormatError):
            problems.append(result)
        elif result.part is None:
            snapshots.append(result)
        else:
            notes.append(f"{result.name}: is a part of a snapshot, outside the folder of the others; not read")
    for folder in listing.folders:
        try:
            content = read_folder(folder)
        except PostHocError as error:
            if not files.is_absent(folder):
                problems.append(error)
            continue
        if isinstance(content, Snapshot):
            snapshots.append(content)
        elif content:
            incomplete[folder] = content
            notes.append(f"{folder.name}/: has {content}")
    snapshots.sort(key=time_order)
    problems += contradictions(snapshots)
    notes = [*missing_at_newest(snapshots), *notes]
    return replace(
        listing, snapshots=tuple(snapshots), problems=tuple(problems), notes=tuple(notes), incomplete=incomplete
    )


def _snapshots_in(paths: Sequence[Path]) -> Iterator[Snapshot | FileFormatError]:
    """Yield the snapshots and parts among files, and an error for each unreadable file that still exists."""

    def read(path: Path) -> Snapshot | FileFormatError | None:
        try:
            file = read_file(path)
            return None if file.kind in (None, "output") else decode_snapshot(file)
        except FileFormatError as error:
            return None if files.is_absent(path) else error

    return filter(None, in_turn(read, paths, any(map(files.is_url, paths))))


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot, a file or a folder of parts; raise FileFormatError or MismatchError if it is not one."""
    if not path.is_dir():
        return read_one(path)
    content = read_folder(path)
    if isinstance(content, Snapshot):
        return content
    raise FileFormatError(path, f"is no complete snapshot: it has {content or 'no parts'}")


def find_snapshots(directory: Path) -> list[Snapshot]:
    """Read the snapshots of a run like `read_directory`; return none for a missing or empty directory."""
    try:
        return list(_sound(directory).snapshots)
    except DirectoryError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return []
        raise


def _sound(directory: Path) -> Directory:
    """Read a directory like `inspect_directory`, but raise the first problem."""
    content = inspect_directory(directory)
    if content.problems:
        raise content.problems[0]
    return content


def read_directory(directory: Path) -> list[Snapshot]:
    """Return the snapshots of one run, by time, then sigma_rel. Reads headers only.

    Raises:
        DirectoryError: the directory does not exist, cannot be read, or holds no snapshot.
        FileFormatError: a file in it is damaged.
        MismatchError: two files do not belong together; both are named.
    """
    content = _sound(directory)
    if content.snapshots:
        return list(content.snapshots)
    if content.incomplete:
        folder, parts = next(iter(content.incomplete.items()))
        raise DirectoryError(directory, f"no complete snapshots here; {folder.name}/ has {parts}", ON_ONE_FILE_SYSTEM)
    if is_parts_folder(directory):
        raise DirectoryError(directory, "holds the parts of one snapshot", NAME_A_RUN)
    foreign = [path.name for path in content.entries if path.suffix in (SUFFIX, *PICKLES)]
    example = f"; {foreign[0]} is not a snapshot of this package" if foreign else ""
    raise DirectoryError(directory, f"no snapshots here{example}", NAME_A_RUN)


# --- snapshots of several parts

PART_NAME = re.compile(r"part-\d{5,}-of-\d{5,}\.safetensors")
_SNAPSHOT_NAME = re.compile(r"\d{16,}(\.\d+)?-(0\.\d+|[\d.]+e-\d+)")


def is_snapshot_name(path: Path) -> bool:
    """Return whether a path has a name as from `snapshot_path`, of a file or of a folder."""
    return _SNAPSHOT_NAME.fullmatch(path.name.removesuffix(SUFFIX)) is not None


def is_parts_folder(path: Path) -> bool:
    """Return whether a path is a folder that, by the names in it, holds parts of one snapshot and nothing else."""
    listing = list_folder(path)
    are_parts = [PART_NAME.fullmatch(file.name) is not None for file in listing.files]
    return bool(are_parts) and all(are_parts) and not listing.folders


def _may_hold_parts(path: Path) -> bool:
    """Return whether a path is a folder of parts, or a folder that cannot be read."""
    try:
        return is_parts_folder(path)
    except DirectoryError:
        return True


def read_folder(folder: Path) -> Snapshot | str:
    """Read the parts in a folder and join them, see `joined`; the text is empty if it is not a folder of parts."""
    parts: list[Snapshot] = []
    for result in _snapshots_in(list_folder(folder).files):
        if isinstance(result, FileFormatError):
            raise result
        parts.append(result)
    if not parts:
        is_empty = folder.is_dir() and not folder.is_symlink() and not list_directory(folder).files
        return "no parts" if is_empty else ""
    return joined(folder, parts)


def joined(folder: Path, parts: Sequence[Snapshot]) -> Snapshot | str:
    """Join the parts in a folder to a snapshot; if it is incomplete, return what is there, such as "2 of 4 parts".

    Parts are equal in all of their headers but for what describes their own tensors (`_OWN`). Readers add their
    measurements and `inherited`. Sketches add up, too: the projected numbers and the squared distances.

    Raises:
        FileFormatError: elements of a tensor are missing.
        MismatchError: two parts do not belong together; both are named.
    """
    sets: dict[tuple[int, int], list[Snapshot]] = defaultdict(list)
    for part in sorted(parts, key=lambda part: (part.part or (0, 0), part.path.name)):
        if part.part is None:
            reason = "is in a folder of parts but is not a part of a snapshot"
            raise FileFormatError(part.path, reason, "move it to the directory")
        sets[part.part[1], part.session].append(part)
    for of_set in sets.values():
        _check_parts(of_set)
    # A snapshot off the schedule may be in the course of being replaced, part by part, by the same one on it.
    complete = [
        of_set
        for (number, _), of_set in sets.items()
        if len(of_set) == number and len({part.off_schedule for part in of_set}) == 1
    ]
    if len(complete) > 1:
        raise _apart(complete[0][0], complete[1][0], "are parts of two complete snapshots", "remove one")
    if complete:
        return _join(folder, complete[0])
    counts = [f"{len(of_set)} of {number} parts" for (number, _), of_set in sorted(sets.items())]
    sessions = {session for _, session in sets}
    return ", ".join(counts + ["of different sessions of the training"] * (len(sessions) > 1))


_OWN = (
    "tensors", "aliases", "inherited", "off_schedule", "measurements", "sample", "sketch", "part", "chunks", "mesh",
    "path", "files", "entries",
)  # fmt: skip
"""The fields in which parts may differ."""


def _apart(first: Snapshot, other: Snapshot, reason: str, hint: str = "") -> MismatchError:
    """Return the error that two files do not belong together."""
    return MismatchError(f"{first.path} and {other.path}", reason, hint)


def _check_parts(parts: Sequence[Snapshot]) -> None:
    """Raise MismatchError, naming two of them, if parts in order of their numbers are not of one snapshot."""
    for before, part in pairwise(parts):
        if before.part == part.part:
            raise _apart(before, part, "are both part {} of {}".format(*(part.part or (0, 0))), "remove one")
        for key, value in vars(before).items():
            if key not in _OWN and getattr(part, key) != value:
                raise _apart(before, part, f"are not of one snapshot: they differ in {key}")


def _join(folder: Path, parts: Sequence[Snapshot]) -> Snapshot:
    """Return the snapshot of these parts; raise the errors of `joined` if their chunks are not complete tensors."""
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    held: dict[str, list[Snapshot]] = defaultdict(list)
    for part in parts:
        for name in part.chunks:
            held[name].append(part)
    entries = {name: _joined_entry(folder, name, holders) for name, holders in held.items()}
    held_files = [replace(part.files[0], boxes={name: _box(part, name) for name in part.chunks}) for part in parts]
    shapes = {name: entries[name].shape for name, tensor in tensors.items() if tensor.role == "average"}
    sampled = list(enumerate(places(shapes)))
    samples = []
    for part in parts:
        inside = (
            position
            for position, (name, index) in sampled
            if name in part.chunks and index_within(_box(part, name), shapes[name], index) is not None
        )
        samples.append((part.sample, [*inside]))
    return replace(
        parts[0], tensors=tensors, aliases={alias: name for part in parts for alias, name in part.aliases.items()},
        inherited=sum(part.inherited for part in parts),
        measurements=sum_of_parts([part.measurements for part in parts]), sample=joined_sample(samples),
        sketch=joined_paths([part.sketch for part in parts]),
        part=None, chunks={}, path=folder, files=tuple(held_files), entries=entries,
    )  # fmt: skip


def _box(part: Snapshot, name: str) -> Box:
    return part.chunks[name].box(part.entries[name].shape)


def _joined_entry(folder: Path, name: str, holders: Sequence[Snapshot]) -> Entry:
    """Return a complete tensor; raise an error unless the chunks of it hold each of its elements exactly once."""
    shape = holders[0].chunks[name].shape
    for part in holders:
        if (other := part.chunks[name].shape) != shape:
            reason = f"do not match: tensor {shown(name)} has the shapes {list(shape)} and {list(other)}"
            raise _apart(holders[0], part, reason)
    if problem := cover_problem(shape, [_box(part, name) for part in holders]):
        for first, part in combinations(holders, 2):
            if _box(first, name).intersection(_box(part, name)).size:
                raise _apart(first, part, f"tensor {shown(name)}: both hold some of its elements")
        raise FileFormatError(folder, f"tensor {shown(name)}: {problem}")
    # The widest dtype holds all values exactly: parts have the run's dtype or a wider one.
    return Entry(max((part.entries[name].dtype for part in holders), key=ITEM_BYTES.__getitem__), shape)


def sum_of_parts(parts: Sequence[Measurements | None]) -> Measurements | None:
    """Return the measurements of all parts together; None if a part has none."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    return Measurements(sum(part.norm for part in known), sum(part.rounding for part in known))


# --- what belongs together


def time_order(snapshot: Snapshot) -> tuple[float, float, str]:
    """Return the key that sorts snapshots by time, then sigma_rel."""
    return snapshot.t, snapshot.sigma_rel, snapshot.path.name


def contradictions(snapshots: Sequence[Snapshot]) -> list[MismatchError]:
    """Return an error for each pair of snapshots that cannot be in one directory; `snapshots` are in order of time."""
    errors = [
        _apart(snapshots[0], other, reason)
        for other in snapshots[1:]
        if (reason := difference(snapshots[0], other)) is not None
    ]
    seen: dict[tuple[float, float], Snapshot] = {}
    for snapshot in snapshots:
        t, sigma_rel = snapshot.t, snapshot.sigma_rel
        first = seen.setdefault((t, sigma_rel), snapshot)
        if first is not snapshot:
            reason = f"both hold sigma_rel {sigma_rel:g} at t = {t:,.12g}"
            errors.append(_apart(first, snapshot, reason, "remove one"))
    return errors


def difference(first: Snapshot, other: Snapshot) -> str | None:
    """Return why a snapshot and a later one cannot be in one directory, to follow their names; None if they can."""
    a, b = first, other
    if a.run_id != b.run_id:
        return f"are of different runs ({a.run_id[:8]} and {b.run_id[:8]}); keep one run a directory"
    if a.t_unit != b.t_unit:
        return f"count time in {shown(a.t_unit)} and {shown(b.t_unit)}"
    # A run that lost all snapshots of a profile may have been resumed without that profile.
    if not (set(a.sigma_rels) <= set(b.sigma_rels) or set(b.sigma_rels) <= set(a.sigma_rels)):
        return f"do not match: their runs track the profiles {_widths(a.sigma_rels)} and {_widths(b.sigma_rels)}"
    is_same = a.tensors == b.tensors and all(entry.shape == b.entries[n].shape for n, entry in a.entries.items())
    for name in () if is_same else sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in a.tensors or name not in b.tensors:
            missing = other if name in a.tensors else first
            return f"do not match: tensor {shown(name)} is missing in {missing.path.name}"
        shapes = [list(s.entries[name].shape) for s in (first, other)]
        if shapes[0] != shapes[1]:
            return f"do not match: tensor {shown(name)} has the shapes {shapes[0]} and {shapes[1]}"
        if a.tensors[name] != b.tensors[name]:
            kinds = [f"{tensor.role} of {tensor.dtype}" for tensor in (a.tensors[name], b.tensors[name])]
            return f"do not match: tensor {shown(name)} is {kinds[0]} and {kinds[1]}"
    return None if a.aliases == b.aliases else "do not match: they tie different names together"


def missing_at_newest(snapshots: Sequence[Snapshot]) -> list[str]:
    """Return a line about profiles without a snapshot at the newest time, where thinning never removes one.

    Profiles that the run no longer tracks, since it was resumed without them, are not reported.
    """
    of_run = [snapshot for snapshot in snapshots if snapshot.run_id == snapshots[0].run_id]
    newest = [snapshot for snapshot in of_run if snapshot.t == of_run[-1].t]
    tracked = {sigma_rel for snapshot in newest for sigma_rel in snapshot.sigma_rels}
    missing = ({snapshot.sigma_rel for snapshot in of_run} & tracked) - {snapshot.sigma_rel for snapshot in newest}
    if not missing:
        return []
    return [f"t = {of_run[-1].t:,.12g}, the newest: no snapshot of sigma_rel {_widths(sorted(missing))}"]


def _widths(sigma_rels: Sequence[float]) -> str:
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


# --- adding to a directory


def snapshot_path(directory: Path, t: float, sigma_rel: float, part: tuple[int, int] | None = None) -> Path:
    """Return the path of a new snapshot, or of a part of one. Names sort by time up to 2**53."""
    integer, _, fraction = f"{Decimal(repr(t)):f}".partition(".")
    clock = f"{int(integer):016d}" + (f".{fraction}" if fraction.strip("0") else "")
    if part is None:
        return directory / f"{clock}-{sigma_rel!r}{SUFFIX}"
    number, parts = part
    return directory / f"{clock}-{sigma_rel!r}" / f"part-{number:05d}-of-{parts:05d}{SUFFIX}"


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
            listing = Directory(path, tuple(sorted(files.system.list(path))))
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


def set_aside(stored: Sequence[Snapshot]) -> list[Path]:
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


def on_schedule(stored: Sequence[Snapshot]) -> list[Snapshot]:
    """Return the snapshots on the schedule, which do not depend on where the training was stopped."""
    return [snapshot for snapshot in stored if not snapshot.off_schedule]


def thin(
    stored: Sequence[Snapshot], max_checkpoints: int | None, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> list[Snapshot]:
    """Keep the `max_checkpoints` snapshots per profile that reconstruction needs most; delete the others.

    Snapshots on the schedule are chosen as if there were no others, so that a training that was stopped in between
    keeps the same ones. Of those off the schedule, the latest stay if there is room, and in any case those of the
    newest `SPARED_TIMES`: a checkpoint of the training may belong to them. Returns the remaining ones in order of time.
    """
    if max_checkpoints is None:
        return list(stored)
    surplus = _surplus(stored, max_checkpoints, sigma_range)
    for snapshot in surplus:
        log.debug("thinning: removing %s", snapshot.path)
        remove_snapshot(snapshot.path)
    return [snapshot for snapshot in stored if snapshot not in surplus]


def _surplus(stored: Sequence[Snapshot], max_checkpoints: int, sigma_range: tuple[float, float]) -> list[Snapshot]:
    """Choose the snapshots that `thin` deletes."""
    if max(Counter(snapshot.sigma_rel for snapshot in stored).values(), default=0) <= max_checkpoints:
        return []
    scheduled = on_schedule(stored)
    counts = Counter(snapshot.sigma_rel for snapshot in scheduled)
    surplus: list[Snapshot] = []
    if max(counts.values(), default=0) > max_checkpoints:
        averages = [snapshot.average() for snapshot in scheduled]
        profiles = [snapshot.profile for snapshot in scheduled]
        spared = spared_times(max_checkpoints)
        newest = scheduled[-1].sketch
        prior = measured_prior(averages, decode_path(newest).sketch if newest else None)
        dropped = snapshots_to_drop(profiles, prior, max_checkpoints, sigma_range, spared)
        surplus += [scheduled[index] for index in dropped]
    oldest_spared = sorted({snapshot.t for snapshot in stored})[-SPARED_TIMES:][0]
    for sigma_rel in dict.fromkeys(snapshot.sigma_rel for snapshot in stored):
        off_schedule = [s for s in stored if s.off_schedule and s.sigma_rel == sigma_rel]
        room = max(max_checkpoints - counts[sigma_rel], 0)
        surplus += [s for s in off_schedule[: max(len(off_schedule) - room, 0)] if s.t < oldest_spared]
    return surplus
