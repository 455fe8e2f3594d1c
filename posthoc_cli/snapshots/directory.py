"""A directory of snapshots: its names and headers, what belongs together, its lock, removing, and thinning.

Names are for people (`<t, zero-padded>-<sigma_rel>.safetensors`); the headers alone are authoritative.
"""

from __future__ import annotations

import errno
import fcntl
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
from itertools import count, pairwise
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
from posthoc_cli.snapshots.sources import model_difference
from posthoc_cli.snapshots.tensorfile import SUFFIX, Entry, cover_problem, in_turn, read_file

log = logging.getLogger(__name__)

SUPERSEDED = "superseded"
"""The name of the folder for snapshots from after the step at which training was resumed."""

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""Suffixes of files that are usually pickles; such files are never opened."""

MANIFEST = "ema-import.json"
"""The file of an import, see `checkpoints.manifest`."""

NAME_A_RUN = "name the directory that a tracker writes its snapshots to"

ON_ONE_FILE_SYSTEM = "all processes of a training write to one directory, on a file system that they share"

STILL_SECONDS = 60.0
"""The age from which temporary files in a locked directory are removed: a synthesis into it takes no lock."""


# --- listing and reading a directory


@dataclass(frozen=True)
class Directory:
    """The names in a directory, sorted, and once its headers are read, what they say."""

    path: Path
    entries: tuple[Path, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()  # complete ones, by time, then sigma_rel
    problems: tuple[PostHocError, ...] = ()  # unreadable headers, and snapshots that contradict each other
    notes: tuple[str, ...] = ()  # lines about unusual entries
    # Folders that lack parts of a snapshot, with those they have in words.
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
    def leftovers(self) -> list[Path]:
        """The temporary files of interrupted writes, or of writes in progress."""
        return [path for path in self.entries if files.is_temporary(path.name)]

    @property
    def pickles(self) -> list[Path]:
        return [path for path in self.entries if path.suffix in PICKLES]

    @property
    def superseded(self) -> int:
        """The number of snapshots that were set aside; 0 if their folder cannot be read."""
        with suppress(DirectoryError):
            entries = list_folder(self.path / SUPERSEDED).entries
            return sum(not path.name.startswith(".") for path in entries)
        return 0


def is_import(path: str | Path) -> bool:
    """Return whether a path is a folder with the manifest of an import."""
    manifest = files.as_path(path) / MANIFEST
    return manifest.is_file() if files.is_url(manifest) else os.path.lexists(manifest)


_NO_DIRECTORY: dict[type[OSError], str] = {
    FileNotFoundError: "no such directory",
    NotADirectoryError: "is not a directory",
}


def list_directory(directory: Path) -> Directory:
    """List a directory; raise DirectoryError if it does not exist, is not a directory, or cannot be read."""
    try:
        return Directory(directory, tuple(sorted(files.system.list(directory))))
    except RemoteError:
        raise
    except OSError as error:
        reason = _NO_DIRECTORY.get(type(error))
        unread = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise DirectoryError(directory, reason or unread, NAME_A_RUN if reason else "") from error


def list_folder(folder: Path) -> Directory:
    """List a folder like `list_directory`; return nothing for a link, which may lead elsewhere, or for a file."""
    try:
        return Directory(folder) if folder.is_symlink() else list_directory(folder)
    except DirectoryError as error:
        if type(error.__cause__) not in _NO_DIRECTORY:
            raise
        return Directory(folder)


Read = Callable[[Path], Snapshot | FileFormatError | None]
"""What reads the header of a snapshot or a part; None for another kind of file, or one that no longer exists."""


def _read(path: Path) -> Snapshot | FileFormatError | None:
    try:
        file = read_file(path)
        return None if file.kind in (None, "output") else decode_snapshot(file)
    except FileFormatError as error:
        return None if files.is_absent(path) else error


def inspect_directory(directory: Path) -> Directory:
    """Read the headers of all snapshots in a directory, continuing after errors; raise errors of `list_directory`."""
    return inspected(list_directory(directory))


def inspected(listing: Directory, read: Read = _read) -> Directory:
    """Return a listing with what the headers in it say."""
    snapshots, problems = list[Snapshot](), list[PostHocError]()
    notes, incomplete = list[str](), dict[Path, str]()
    for result in _results(listing.files, read):
        if isinstance(result, FileFormatError):
            problems.append(result)
        elif result.part is None:
            snapshots.append(result)
        else:
            notes.append(f"{result.name}: is a part of a snapshot, outside the folder of the others; not read")
    for folder in listing.folders:
        try:
            content = read_folder(folder, read)
        except PostHocError as error:
            if not files.is_absent(folder):
                problems.append(error)
            continue
        if isinstance(content, Snapshot):
            snapshots.append(content)
        elif content:
            incomplete[folder] = content
            notes.append(f"{folder.name}/: has {content}")
    snapshots.sort(key=lambda snapshot: (snapshot.t, snapshot.sigma_rel, snapshot.path.name))
    problems += contradictions(snapshots)
    return replace(
        listing, snapshots=tuple(snapshots), problems=tuple(problems), notes=tuple(notes), incomplete=incomplete
    )


def _results(paths: Sequence[Path], read: Read) -> Iterator[Snapshot | FileFormatError]:
    return filter(None, in_turn(read, paths, any(map(files.is_url, paths))))


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot, a file or a folder of parts; raise FileFormatError or MismatchError if it is not one."""
    content = read_folder(path) if path.is_dir() else read_one(path)
    if not isinstance(content, Snapshot):
        raise FileFormatError(path, f"is no complete snapshot: it has {content or 'no parts'}")
    return content


def find_snapshots(directory: Path) -> list[Snapshot]:
    """Read the snapshots of a run like `read_directory`; return none for a missing or empty directory."""
    return [] if files.is_absent(directory) else _checked(inspect_directory(directory))


def read_directory(directory: Path) -> list[Snapshot]:
    """Return the snapshots of one run, by time, then sigma_rel. Reads headers only.

    Raises DirectoryError if it holds none, FileFormatError for a damaged file, MismatchError for two that differ.
    """
    content = inspect_directory(directory)
    if found := _checked(content):
        return found
    foreign = [path.name for path in content.entries if path.suffix in (SUFFIX, *PICKLES)]
    reason, hint = "no snapshots here", NAME_A_RUN
    if content.incomplete:
        folder, parts = next(iter(content.incomplete.items()))
        reason, hint = f"no complete snapshots here; {folder.name}/ has {parts}", ON_ONE_FILE_SYSTEM
    elif is_parts_folder(directory):
        reason = "holds the parts of one snapshot"
    elif foreign:
        reason += f"; {foreign[0]} is not a snapshot of this package"
    raise DirectoryError(directory, reason, hint)


def _checked(content: Directory) -> list[Snapshot]:
    """Return the snapshots in a directory; raise the first of its problems."""
    if content.problems:
        raise content.problems[0]
    return list(content.snapshots)


# --- snapshots of several parts

_PART_NAME = re.compile(r"part-\d{5,}-of-\d{5,}\.safetensors")
_SNAPSHOT_NAME = re.compile(r"\d{16,}(\.\d+)?-(0\.\d+|[\d.]+e-\d+)")


def is_snapshot_name(path: Path) -> bool:
    """Return whether a path has a name as from `snapshot_path`, of a file or of a folder."""
    return _SNAPSHOT_NAME.fullmatch(path.name.removesuffix(SUFFIX)) is not None


def is_parts_folder(path: Path) -> bool:
    """Return whether a path is a folder that, by the names in it, holds parts of one snapshot, or cannot be read."""
    try:
        listing = list_folder(path)
    except DirectoryError:
        return is_snapshot_name(path)
    are_parts = [_PART_NAME.fullmatch(file.name) is not None for file in listing.files]
    return bool(are_parts) and all(are_parts) and not listing.folders


def read_folder(folder: Path, read: Read = _read) -> Snapshot | str:
    """Read the parts in a folder and join them, see `joined`; the text is empty if it is not a folder of parts."""
    parts: list[Snapshot] = []
    for result in _results(list_folder(folder).files, read):
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
    measurements and `inherited`. Sketches add up, too: the projected numbers and the squared distances. Raises
    FileFormatError if elements of a tensor are missing, MismatchError if two parts do not belong together.
    """
    sets: dict[tuple[int, int], list[Snapshot]] = defaultdict(list)
    for part in sorted(parts, key=lambda part: (part.part or (0, 0), part.path.name)):
        if part.part is None:
            reason = "is in a folder of parts but is not a part of a snapshot"
            raise FileFormatError(part.path, reason, "move it to the directory")
        sets[part.part[1], part.session].append(part)
    for before, part in (pair for of_set in sets.values() for pair in pairwise(of_set)):
        if before.part == part.part:
            raise _apart(before, part, "are both part {} of {}; remove one".format(*(part.part or ())))
        for key, value in vars(before).items():
            if key not in _OWN and getattr(part, key) != value:
                raise _apart(before, part, f"are not of one snapshot: they differ in {key}")
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


def _join(folder: Path, parts: Sequence[Snapshot]) -> Snapshot:
    """Return the snapshot of these parts; raise the errors of `joined` if their chunks are not complete tensors."""
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    boxes = [{name: chunk.box(part.entries[name].shape) for name, chunk in part.chunks.items()} for part in parts]
    entries = {name: _joined_entry(folder, name, parts) for name in tensors}
    shapes = {name: entries[name].shape for name, tensor in tensors.items() if tensor.role == "average"}
    samples = []
    for part, held_boxes in zip(parts, boxes, strict=True):
        inside = (
            position
            for position, (name, index) in enumerate(places(shapes))
            if name in held_boxes and index_within(held_boxes[name], shapes[name], index) is not None
        )
        samples.append((part.sample, [*inside]))
    return replace(
        parts[0], tensors=tensors, aliases={alias: name for part in parts for alias, name in part.aliases.items()},
        inherited=sum(part.inherited for part in parts),
        measurements=sum_of_parts([part.measurements for part in parts]), sample=joined_sample(samples),
        sketch=joined_paths([part.sketch for part in parts]), part=None, chunks={}, path=folder, entries=entries,
        files=tuple(replace(part.files[0], boxes=held) for part, held in zip(parts, boxes, strict=True)),
    )  # fmt: skip


def _joined_entry(folder: Path, name: str, parts: Sequence[Snapshot]) -> Entry:
    """Return a complete tensor; raise an error unless the chunks of it hold each of its elements exactly once."""
    parts = [part for part in parts if name in part.chunks]
    shape = parts[0].chunks[name].shape
    for part in parts:
        if (other := part.chunks[name].shape) != shape:
            raise _apart(parts[0], part, _two_shapes(name, shape, other))
    if problem := cover_problem(shape, [part.chunks[name].box(part.entries[name].shape) for part in parts]):
        raise FileFormatError(folder, f"tensor {shown(name)}: {problem}")
    # The widest dtype holds all values exactly: parts have the run's dtype or a wider one.
    return Entry(max((part.entries[name].dtype for part in parts), key=ITEM_BYTES.__getitem__), shape)


def sum_of_parts(parts: Sequence[Measurements | None]) -> Measurements | None:
    """Return the measurements of all parts together; None if a part has none."""
    known = [part for part in parts if part is not None]
    together = Measurements(sum(part.norm for part in known), sum(part.rounding for part in known))
    return together if len(known) == len(parts) else None


# --- what belongs together


def contradictions(snapshots: Sequence[Snapshot]) -> list[MismatchError]:
    """Return an error for each pair of snapshots that cannot be in one directory; `snapshots` are in order of time."""
    differing = ((other, _difference(snapshots[0], other)) for other in snapshots[1:])
    errors = [_apart(snapshots[0], other, reason) for other, reason in differing if reason]
    seen: dict[tuple[float, float], Snapshot] = {}
    for snapshot in snapshots:
        first = seen.setdefault((snapshot.t, snapshot.sigma_rel), snapshot)
        if first is not snapshot:
            reason = f"both hold sigma_rel {first.sigma_rel:g} at t = {first.t:,.12g}"
            errors.append(_apart(first, snapshot, reason, "remove one"))
    return errors


def _difference(a: Snapshot, b: Snapshot) -> str:
    """Return why a snapshot and a later one cannot be in one directory, to follow their names; else nothing."""
    if a.run_id != b.run_id:
        return f"are of different runs ({a.run_id[:8]} and {b.run_id[:8]}); keep one run a directory"
    if a.t_unit != b.t_unit:
        return f"count time in {shown(a.t_unit)} and {shown(b.t_unit)}"
    # A run that lost all snapshots of a profile may have been resumed without that profile.
    if not (set(a.sigma_rels) <= set(b.sigma_rels) or set(b.sigma_rels) <= set(a.sigma_rels)):
        return f"do not match: their runs track the profiles {_widths(a.sigma_rels)} and {_widths(b.sigma_rels)}"
    return model_difference(a, b)


def _two_shapes(name: str, one: Sequence[int], other: Sequence[int]) -> str:
    return f"do not match: tensor {shown(name)} has the shapes {list(one)} and {list(other)}"


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
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Error numbers of `flock` on a file system without locks."""


class DirectoryLock:
    """The exclusive right to write to a directory, held from construction to `release`; a context manager.

    It is a `flock` on a file that also names its holder; the system releases it when the holder dies. On a file system
    without locks, or one that keeps them to one host, a second writer cannot be excluded; a warning says so if that can
    be detected. Raises LockedError if another tracker or command holds it.
    """

    def __init__(self, directory: Path) -> None:
        with files.reported_as_write_error(directory):
            # A link would lead to a file of somebody else.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            descriptor = os.open(directory / LOCK_NAME, flags, 0o666)
            try:
                if os.fstat(descriptor).st_nlink > 1:
                    raise WriteError(directory / LOCK_NAME, "is not a lock: it is a hard link to another file")
                _take(directory, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        # Releases it also when the process ends or the last reference is gone.
        self.release = weakref.finalize(self, _release, descriptor, os.getpid())

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _take(directory: Path, descriptor: int) -> None:
    """Lock the file and write the holder's name into it."""
    process, host = os.getpid(), socket.gethostname()
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _holder(descriptor) or "another process"
        holder = f"another tracker of this process ({process})" if holder == f"process {process} on {host}" else holder
        hint = "end that first, or take another directory"
        raise LockedError(directory, f"{holder} is writing here", hint) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        why = (error.strerror or str(error)).lower()
        log.warning("%s: no locks on this file system (%s): make sure that nothing else writes", directory, why)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"host": host, "process": process}).encode(), 0)


def _holder(descriptor: int) -> str:
    """Return the process and the host that a lock names; empty if it names none."""
    try:
        holder = json.loads(os.pread(descriptor, 1_000, 0))
        return f"process {int(holder['process'])} on {printable(str(holder['host'])[:80])}"
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return ""


def _release(descriptor: int, process: int) -> None:
    """Release a lock; in a forked child, which has not taken it, only close the file."""
    with suppress(OSError):
        if os.getpid() == process:
            os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


# --- removing from a directory


def remove_snapshot(path: Path) -> None:
    """Delete a snapshot if it exists; raise WriteError if the system refuses.

    A folder of parts remains if it holds anything else, or if a network file system keeps a file that is being read.
    """
    with files.reported_as_write_error(path, "removed"), suppress(FileNotFoundError):
        if path.is_symlink() or not path.is_dir():
            files.system.unlink(path)
            return
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
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        reason = "is a link or no directory; snapshots are set aside in a directory of that name"
        raise DirectoryError(folder, reason, "move it away")
    files.make_directory(folder)
    with files.reported_as_write_error(folder):
        moved = []
        for path in (snapshot.path for snapshot in stored if not files.is_absent(snapshot.path)):
            stem, suffix = path.name.removesuffix(SUFFIX), SUFFIX * path.name.endswith(SUFFIX)
            numbered = (folder / f"{stem}{f'.{number}' * bool(number)}{suffix}" for number in count())
            moved.append(next(free for free in numbered if files.is_absent(free)))
            files.system.rename(path, moved[-1])
        # Sync the new names first, so that a crash in between loses no file.
        for changed in (folder, directory):
            files.system.fsync_directory(changed)
    return moved


# --- thinning while a training writes


def thin(
    stored: Sequence[Snapshot], max_checkpoints: int | None, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> list[Snapshot]:
    """Keep the `max_checkpoints` snapshots per profile that reconstruction needs most; delete the others.

    Snapshots on the schedule are chosen as if there were no others, so that a training that was stopped in between
    keeps the same ones. Of those off the schedule, the latest stay if there is room, and in any case those of the
    newest `SPARED_TIMES`: a checkpoint of the training may belong to them. Returns the remaining ones in order of time.
    """
    scheduled = [snapshot for snapshot in stored if not snapshot.off_schedule]
    counts = Counter(snapshot.sigma_rel for snapshot in scheduled)
    widths = Counter(snapshot.sigma_rel for snapshot in stored)
    if max_checkpoints is None or max(widths.values(), default=0) <= max_checkpoints:
        return list(stored)
    surplus: list[Snapshot] = []
    if max(counts.values(), default=0) > max_checkpoints:
        newest = scheduled[-1].sketch
        averages = [snapshot.average() for snapshot in scheduled]
        prior = measured_prior(averages, decode_path(newest).sketch if newest else None)
        profiles, spared = [snapshot.profile for snapshot in scheduled], spared_times(max_checkpoints)
        dropped = snapshots_to_drop(profiles, prior, max_checkpoints, sigma_range, spared)
        surplus += [scheduled[index] for index in dropped]
    oldest_spared = sorted({snapshot.t for snapshot in stored})[-SPARED_TIMES:][0]
    for sigma_rel in widths:
        off_schedule = [s for s in stored if s.off_schedule and s.sigma_rel == sigma_rel]
        room = max(max_checkpoints - counts[sigma_rel], 0)
        surplus += [s for s in off_schedule[: max(len(off_schedule) - room, 0)] if s.t < oldest_spared]
    for snapshot in surplus:
        log.debug("thinning: removing %s", snapshot.path)
        remove_snapshot(snapshot.path)
    return [snapshot for snapshot in stored if snapshot not in surplus]
