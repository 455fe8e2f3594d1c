"""A directory of snapshots: its names and headers, what belongs together, its lock, removing, and
thinning.

Names are for people (`<t, zero-padded>-<sigma_rel>.safetensors`); the headers alone are
authoritative. A directory is listed, the headers of its files are read, parts are joined to
snapshots, and these are compared with each other.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import socket
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.dtypes import ITEM_BYTES
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    LockedError,
    Log,
    MismatchError,
    PostHocError,
    quote,
)
from posthoc_cli.planning import (
    USEFUL_RANGE,
    count_protected_times,
    newest_times,
    times_to_drop,
)
from posthoc_cli.reconstruction import Measurements
from posthoc_cli.snapshots.boxes import Box, cover_problem
from posthoc_cli.snapshots.entry import Entry
from posthoc_cli.snapshots.opened_file import in_turn, read_small_file
from posthoc_cli.snapshots.sketch_text import join_paths
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot
from posthoc_cli.snapshots.source import TrackedTensor, by_time, model_difference
from posthoc_cli.snapshots.sources import Sources
from posthoc_cli.snapshots.tensorfile import SUFFIX, KeptOpen, TensorFile, read_file
from posthoc_cli.snapshots.weights_sample import join_samples

log = Log(__name__)

# the folder for snapshots from after the step at which training was resumed
SUPERSEDED = "superseded"
# suffixes of files that are usually pickles; none is ever opened
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".th", ".tar", ".ema")
MANIFEST = "ema-import.json"  # the file of an import, see `checkpoints.manifest`
ON_ONE_FILE_SYSTEM = (
    "all processes of a training write to one directory, on a file system that they share"
)
# The age from which temporary files in a locked directory are removed: a synthesis into it takes no
# lock.
STILL_SECONDS = 60.0

_NAME_A_RUN = "name the directory that a tracker writes its snapshots to"
_PART_NAME = re.compile(r"part-\d{5,}-of-\d{5,}\.safetensors")
_SNAPSHOT_NAME = re.compile(r"\d{16,}(\.\d+)?-(0\.\d+|[\d.]+e-\d+)")


# --- listing and reading a directory


@dataclass(frozen=True)
class Directory:
    """The names in a directory, and once the headers of its files are read, what they say."""

    path: Path
    entries: tuple[Path, ...] = ()  # sorted
    # Each file, and each folder with the name of a snapshot, with the files to read.
    candidates: Mapping[Path, Sequence[Path]] = field(default_factory=dict)
    # temporary files of interrupted writes, or of writes in progress
    leftovers: Sequence[Path] = ()
    snapshots: tuple[Snapshot, ...] = ()  # complete ones, by time, then sigma_rel
    # unreadable headers, and snapshots that contradict each other
    problems: Sequence[PostHocError] = ()
    notes: Sequence[str] = ()  # lines about unusual entries
    # folders that lack parts, with the parts that they have
    incomplete: Mapping[Path, str] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        return [file for paths in self.candidates.values() for file in paths]

    @property
    def superseded(self) -> int:
        """The number of snapshots that were set aside; 0 if their folder is a link or cannot be
        read."""
        folder = self.path / SUPERSEDED
        with suppress(DirectoryError):
            if not folder.is_symlink():
                return sum(path.name[0] != "." for path in list_directory(folder))
        return 0


def is_import(path: str | Path) -> bool:
    """Return whether a path is a folder with the manifest of an import."""
    manifest = files.as_path(path) / MANIFEST
    if files.is_url(manifest):
        return manifest.is_file()
    return os.path.lexists(manifest)


def is_snapshot_name(path: Path) -> bool:
    """Return whether a file or folder has a name as `snapshot_path` makes it."""
    return _SNAPSHOT_NAME.fullmatch(path.name.removesuffix(SUFFIX)) is not None


def is_tensor_file(path: Path) -> bool:
    """Return whether a path has the name of a visible file of tensors."""
    return path.suffix == SUFFIX and not path.name.startswith(".")


def is_parts_folder(path: Path) -> bool:
    """Return whether a path is a folder whose names are parts of one snapshot."""
    with suppress(DirectoryError):
        if path.is_symlink():
            return False
        names = []
        for entry in list_directory(path):
            if is_tensor_file(entry) or is_snapshot_name(entry):
                names.append(entry.name)
        return bool(names) and all(map(_PART_NAME.fullmatch, names))
    return False


def list_directory(directory: Path, look: files.Look | None = None) -> tuple[Path, ...]:
    """List the paths in a directory; raise DirectoryError if it is not one, or cannot be read."""
    try:
        return tuple(look.list_folder(directory) if look else sorted(files.system.list(directory)))
    except OSError as error:
        if isinstance(error, PostHocError):
            raise
        known = {errno.ENOENT: "no such directory", errno.ENOTDIR: "is not a directory"}
        if error.errno in known:
            raise DirectoryError(directory, known[error.errno], _NAME_A_RUN) from error
        reason = error.strerror or str(error)
        raise DirectoryError(directory, f"cannot be read: {reason.lower()}") from error


def list_candidates(directory: Path, look: files.Look | None = None) -> Directory:
    """List a directory and the folders of parts in it; raise the errors of `list_directory`."""
    entries = list_directory(directory, look)
    candidates = dict[Path, list[Path]]()
    everything = [*entries]
    for path in entries:
        if is_tensor_file(path):
            candidates[path] = [path]
        elif is_snapshot_name(path) and path.suffix != SUFFIX and files.is_real_folder(path):
            inside = [path]  # if it cannot be listed, the attempt to read it will say why
            with suppress(DirectoryError):
                inside = [*list_directory(path, look)]
            candidates[path] = [file for file in inside if is_tensor_file(file) or file == path]
            everything += inside
    leftovers = [path for path in everything if files.is_temporary(path.name)]
    return Directory(directory, entries, candidates, leftovers)


def _read(kept: KeptOpen, path: Path) -> Snapshot | FileFormatError | None:
    """Read the header of a snapshot, or of a part; None for another file, or a file that no longer
    exists."""
    try:
        file = kept.read_file(path)
        if file.kind in (None, "output"):
            return None
        return decode_snapshot(file)
    except FileFormatError as error:
        return None if files.is_absent(path) else error


def inspect_directory(
    directory: Path, look: files.Look | None = None, kept: KeptOpen | None = None
) -> Directory:
    """Read the headers of all snapshots in a directory, continuing after errors; raise the errors
    of `list_directory`. Files of other programs are kept open as `kept` says."""
    listing = list_candidates(directory, look)
    read = partial(_read, kept or KeptOpen(most=0))
    headers = in_turn(read, listing.files, files.is_url(directory))
    return inspect_listing(listing, headers)


def inspect_listing(listing: Directory, headers: Iterable[object]) -> Directory:
    """Add to a listing what the headers of its files say, see `join_parts`."""
    snapshots = list[Snapshot]()
    problems = list[PostHocError]()
    notes = list[str]()
    incomplete = dict[Path, str]()
    header_of = dict(zip(listing.files, headers, strict=True))
    for path, paths in listing.candidates.items():
        try:
            content = join_parts(path, [header_of[file] for file in paths])
        except PostHocError as error:
            if not files.is_absent(path):
                problems.append(error)
            continue
        if isinstance(content, Snapshot):
            snapshots.append(content)
        elif content:
            notes.append(f"{path.name}: has {content}")
            if path not in paths:
                incomplete[path] = content
    snapshots = by_time(snapshots)
    notes += _missing_at_newest(snapshots)
    problems += contradictions(snapshots)
    return replace(
        listing,
        snapshots=tuple(snapshots),
        problems=problems,
        notes=notes,
        incomplete=incomplete,
    )


def _missing_at_newest(snapshots: Sequence[Snapshot]) -> list[str]:
    """Note each profile without a snapshot of the newest time, which thinning never removes. A run
    that was resumed without a profile no longer tracks it."""
    if not snapshots:
        return []
    last = snapshots[-1].t
    missing = {snapshot.sigma_rel for snapshot in snapshots}
    for snapshot in snapshots:
        if snapshot.t == last:
            missing &= {*snapshot.sigma_rels}
            missing.discard(snapshot.sigma_rel)
    at = f"t = {last:,.12g}, the newest"
    return [f"{at}: no snapshot of sigma_rel {sigma_rel:g}" for sigma_rel in sorted(missing)]


def read_snapshot(path: Path) -> Snapshot:
    """Read a snapshot, a file or a folder of parts; raise FileFormatError or MismatchError if it is
    not one."""
    paths = [path]
    if path.is_dir():
        paths = [*filter(is_tensor_file, list_directory(path))]
    headers = [*map(partial(_read, KeptOpen(most=0)), paths)]
    content = join_parts(path, headers)
    if not isinstance(content, Snapshot):
        raise FileFormatError(path, f"is not a complete snapshot: it has {content or 'no parts'}")
    return content


def find_snapshots(directory: Path) -> list[Snapshot]:
    """Read the snapshots of a run as `read_directory` does; return none for a missing or empty
    directory."""
    if files.is_absent(directory):
        return []
    return _without_problems(inspect_directory(directory))


def read_directory(
    directory: Path, look: files.Look | None = None, kept: KeptOpen | None = None
) -> list[Snapshot]:
    """Read the snapshots of one run, by time, then sigma_rel. Reads headers only.

    Raises DirectoryError if there are none, FileFormatError for a damaged file, MismatchError for
    two that differ.
    """
    content = inspect_directory(directory, look, kept)
    if snapshots := _without_problems(content):
        return snapshots
    others = [*content.notes]
    for path in content.entries:
        if path.suffix in (SUFFIX, *PICKLES):
            others.append(f"{path.name} is not a snapshot of this package")
    reason = "; ".join(["no snapshots here", *others[:1]])
    hint = _NAME_A_RUN if others else "name a directory of snapshots or checkpoints"
    if content.incomplete:
        hint = ON_ONE_FILE_SYSTEM
    raise DirectoryError(directory, reason, hint)


def _without_problems(content: Directory) -> list[Snapshot]:
    """List the snapshots of a directory; raise its first problem."""
    for problem in content.problems:
        raise problem
    return [*content.snapshots]


# --- snapshots of several parts

# The fields in which parts may differ.
_OWN = (
    "tensors", "aliases", "measurements", "sample", "sketch", "part", "chunks", "mesh",
    "path", "files", "entries",
)  # fmt: skip


def join_parts(path: Path, headers: Sequence[object]) -> Snapshot | str:
    """Join the headers that were read in a file or a folder of parts to a snapshot; raise an error
    among them.

    If the snapshot is incomplete, return what is there, such as "2 of 4 parts", or an empty text
    for something else. The headers of parts are equal, except for what describes their own tensors
    (`_OWN`). Readers add up the measurements, and the numbers and squared distances of the
    sketches. Raises FileFormatError if elements of a tensor are missing, MismatchError if two parts
    do not belong together.
    """
    for header in headers:
        if isinstance(header, FileFormatError):
            raise header
    parts = [header for header in headers if isinstance(header, Snapshot)]
    if not parts:
        return "" if headers else "no parts"
    if parts[0].path == path and parts[0].part is None:
        return parts[0]
    sets = _group_parts(parts)
    complete = []
    texts = []
    for (number, _), members in sorted(sets.items()):
        if len(members) == number:
            complete.append(members)
        texts.append(f"{len(members)} of {number} parts")
    if len(complete) > 1:
        first, other = complete[:2]
        raise _mismatch(first[0], other[0], "are parts of two complete snapshots", "remove one")
    if complete:
        return _merge(path, complete[0])
    sessions = {session for _, session in sets}
    if len(sessions) > 1:
        texts.append("of different sessions of the training")
    return ", ".join(texts)


def _group_parts(parts: Sequence[Snapshot]) -> dict[tuple[int, int], list[Snapshot]]:
    """Group the parts of each snapshot, by their number and the session of the training."""
    sets = defaultdict[tuple[int, int], list[Snapshot]](list)
    shared = [each.name for each in fields(Snapshot) if each.name not in _OWN]
    for part in sorted(parts, key=lambda part: part.part or (0, 0)):
        if part.part is None:
            reason = "is in a folder of parts but is not a part of a snapshot"
            raise FileFormatError(part.path, reason, "move it to the directory")
        members = sets[part.part[1], part.session]
        if members:
            _check_parts(members[-1], part, shared)
        members.append(part)
    return sets


def _check_parts(before: Snapshot, part: Snapshot, shared: Sequence[str]) -> None:
    """Raise MismatchError unless two parts are different ones of the same snapshot."""
    reason = _difference(before, part, shared)
    if part.part == before.part:
        reason = "are both part {} of {}".format(*part.part or ())
    if reason:
        raise _mismatch(before, part, reason)


def _mismatch(
    first: Snapshot,
    other: Snapshot,
    reason: str,
    hint: str = "",
) -> MismatchError:
    """Make the error that two files do not belong together."""
    return MismatchError(f"{first.path} and {other.path}", reason, hint)


def _merge(folder: Path, parts: Sequence[Snapshot]) -> Snapshot:
    """Make the snapshot of these parts, whose chunks must hold each element of a tensor exactly
    once."""
    shared = shared_fields(parts)
    entries = {name: _merge_entry(folder, name, parts) for name in shared["tensors"]}
    boxes = list[dict[str, Box]]()
    part_files = list[TensorFile]()
    for part in parts:
        chunks = {}
        for name, chunk in part.chunks.items():
            chunks[name] = chunk.box(part.entries[name].shape)
        boxes.append(chunks)
        part_files.append(replace(part.files[0], boxes=chunks))
    shapes = dict[str, tuple[int, ...]]()
    for name, tensor in shared["tensors"].items():
        if tensor.role == "average":
            shapes[name] = entries[name].shape
    samples = [part.sample for part in parts]
    sketches = [part.sketch for part in parts]
    return replace(
        parts[0],
        **shared,
        sample=join_samples(samples, boxes, shapes),
        sketch=join_paths(sketches),
        path=folder,
        entries=entries,
        files=tuple(part_files),
    )


def _merge_entry(
    folder: Path,
    name: str,
    parts: Sequence[Snapshot],
) -> Entry:
    shapes = set()
    boxes = []
    dtypes = []
    for part in parts:
        if name in part.chunks:
            chunk = part.chunks[name]
            entry = part.entries[name]
            shapes.add(chunk.shape)
            boxes.append(chunk.box(entry.shape))
            dtypes.append(entry.dtype)
    shape, *others = shapes
    problem = cover_problem(shape, boxes)
    if others:
        problem = f"its chunks are of the shapes {sorted([shape, *others])}"
    if problem:
        raise FileFormatError(folder, f"tensor {quote(name)}: {problem}")
    # The widest dtype holds all values exactly: parts have the run's dtype or a wider one.
    widest = max(dtypes, key=ITEM_BYTES.__getitem__)
    return Entry(widest, shape)


def shared_fields(parts: Sequence[Snapshot]) -> dict[str, Any]:
    """Derive the fields of a snapshot that follow from the headers of its parts alone."""
    tensors = dict[str, TrackedTensor]()
    aliases = dict[str, str]()
    known = []
    for part in parts:
        tensors |= part.tensors
        aliases |= part.aliases
        if part.measurements is not None:
            known.append(part.measurements)
    measured = None
    if len(known) == len(parts):
        norm = sum(measurements.norm for measurements in known)
        rounding = sum(measurements.rounding for measurements in known)
        measured = Measurements(norm, rounding)
    return {
        "tensors": tensors,
        "aliases": aliases,
        "measurements": measured,
        "part": None,
        "chunks": {},
    }


# --- what belongs together


def contradictions(snapshots: Sequence[Snapshot]) -> list[MismatchError]:
    """Make an error for each pair of snapshots that cannot be in one directory; `snapshots` are in
    order of time."""
    errors = list[MismatchError]()
    seen = dict[tuple[float, float], Snapshot]()
    for snapshot in snapshots:
        first = snapshots[0]
        reason = _difference(first, snapshot, ("run_id", "t_unit"))
        reason = reason or model_difference(first, snapshot)
        if reason:
            errors.append(
                _mismatch(first, snapshot, reason, "give each run a directory of its own")
            )
        same = seen.setdefault((snapshot.t, snapshot.sigma_rel), snapshot)
        if same is not snapshot:
            reason = f"both hold sigma_rel {same.sigma_rel:g} at t = {same.t:,.12g}"
            errors.append(_mismatch(same, snapshot, reason, "remove one"))
    return errors


def _difference(
    one: Snapshot,
    other: Snapshot,
    names: Iterable[str],
) -> str:
    """Describe the first difference between fields of two headers, to follow the names of the
    files; empty if there is none."""
    for name in names:
        first = getattr(one, name)
        second = getattr(other, name)
        if first != second:
            return f"differ in {quote(name)}: {quote(first)} and {quote(second)}"
    return ""


# --- adding to a directory


def snapshot_path(
    directory: Path,
    t: float,
    sigma_rel: float,
    part: tuple[int, int] | None = None,
) -> Path:
    """Make the path of a new snapshot, or of a part of one. Names sort by time up to 2**53."""
    integer, _, fraction = f"{Decimal(repr(t)):f}".partition(".")
    clock = f"{int(integer):016d}"
    if fraction.strip("0"):
        clock += f".{fraction}"
    inside = "/part-{:05d}-of-{:05d}".format(*part) if part else ""
    return directory / f"{clock}-{sigma_rel!r}{inside}{SUFFIX}"


# --- the lock

LOCK_NAME = ".ema.lock"
# of `flock` on a file system without locks
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class LockFile:
    """The open lock file of a directory, by which a process knows that the path still leads there.

    A directory may be moved, deleted or replaced while a training goes on. What lies at its path
    then belongs to somebody else: `check` comes before each write and each deletion.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        # A link would lead to a file of somebody else.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        with files.raise_write_errors(directory):
            self._descriptor = os.open(directory / LOCK_NAME, flags, 0o666)
        self.release = weakref.finalize(self, _release, self._descriptor, 0)

    def check(self) -> None:
        """Raise LockedError unless the lock file at the directory's path is the open one."""
        with files.raise_write_errors(self._directory), suppress(FileNotFoundError):
            at_path = os.lstat(self._directory / LOCK_NAME)
            if os.path.samestat(at_path, os.fstat(self._descriptor)):
                return
        reason = f"was moved, replaced, or lost its {LOCK_NAME}: nothing is written or deleted here"
        raise LockedError(self._directory, reason, "move it back, or use another directory")


class DirectoryLock(LockFile, AbstractContextManager["DirectoryLock"]):
    """The exclusive right to write to a directory, held from construction to `release`; a context
    manager.

    It is a `flock` on the lock file, which also names its holder; the system releases it when the
    holder dies. On a file system without locks, or one that keeps them to one host, a second writer
    cannot be excluded; a warning says so if that can be detected. Raises LockedError if another
    tracker or command holds it.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        own = f"process {os.getpid()} on {socket.gethostname()}"
        try:
            with files.raise_write_errors(directory):
                self._take(own)
            # the name is for messages only, and a full disk, which `prune` may free, has no room
            with suppress(OSError):
                os.ftruncate(self._descriptor, 0)
                os.write(self._descriptor, own.encode())
        except BaseException:
            self.release()
            raise
        self.release.detach()
        # Releases it also when the process ends or the last reference is gone.
        self.release = weakref.finalize(self, _release, self._descriptor, os.getpid())

    def _take(self, own: str) -> None:
        """Lock the file; warn on a file system without locks."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            name = _read_holder(self._descriptor)
            holder = f"another tracker of this {own}" if name == own else quote(name)[1:-1]
            reason = f"{holder or 'another process'} is writing here"
            hint = "end it first, or use another directory"
            raise LockedError(self._directory, reason, hint) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            why = (error.strerror or str(error)).lower()
            text = "%s: no locks on this file system (%s): make sure that nothing else writes"
            log.warning(text, self._directory, why)

    def __exit__(self, *_: object) -> None:
        self.release()


def _release(descriptor: int, holder: int) -> None:
    """Release the lock of the process `holder` and close the file; in a forked child only close."""
    with suppress(OSError):
        if os.getpid() == holder:
            os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _read_holder(descriptor: int) -> str:
    """Read the name in a lock file; empty while its holder takes or releases the lock."""
    name = bytearray(100)
    count = files.system.read(descriptor, memoryview(name), 0)
    return name[:count].decode(errors="replace")


# --- removing from a directory


def remove_snapshot(snapshot: Snapshot, lock: LockFile) -> None:
    """Delete a snapshot; raise LockedError if the directory is another one now, and WriteError if
    the system refuses.

    Files that are not of the snapshot's run stay.
    """
    lock.check()
    with files.raise_write_errors(snapshot.path, "removed"):
        for file in _tensor_files(snapshot.path):
            if _read_run_id(file) == snapshot.run_id:
                files.unlink_if_exists(file)
            elif not files.is_absent(file):
                log.warning("%s: no longer belongs to this run, and is not removed", file)
        _remove_empty_folder(snapshot.path)


def remove_incomplete(folder: Path, lock: LockFile) -> None:
    """Delete the parts of a snapshot that was never complete; raise as `remove_snapshot` does."""
    lock.check()
    with files.raise_write_errors(folder, "removed"):
        for file in _tensor_files(folder):
            files.unlink_if_exists(file)
        _remove_empty_folder(folder)


def _tensor_files(path: Path) -> list[Path]:
    """List the files of a snapshot: the path itself, or the parts in a folder."""
    if not files.is_real_folder(path):
        return [path]
    return [file for file in sorted(files.system.list(path)) if is_tensor_file(file)]


def _read_run_id(path: Path) -> str:
    """Read the id of the run that wrote a file; empty if that is unknown."""
    with suppress(FileFormatError):
        return str(read_file(path).content.get("run_id", ""))
    return ""


def _remove_empty_folder(path: Path) -> None:
    """Remove a folder of parts unless it holds anything else, such as a file that a network file
    system keeps while it is being read."""
    if not files.is_real_folder(path):
        return
    for file in files.system.list(path):
        if files.is_temporary(file.name):
            files.unlink_if_exists(file)
    if not files.system.list(path):
        files.system.remove_directory(path)


def remove_leftovers(directory: Path, lock: LockFile) -> None:
    """Remove temporary files of interrupted writes from a locked directory and from the snapshots
    in it."""
    lock.check()
    folders = [directory]
    for path, paths in list_candidates(directory).candidates.items():
        if path not in paths:
            folders.append(path)
    for folder in folders:
        files.remove_leftovers(folder, STILL_SECONDS)


def set_aside(stored: Sequence[Snapshot], lock: LockFile) -> list[Path]:
    """Move snapshots durably to the folder `superseded` of their directory; return their new paths.

    Nothing in the folder is replaced; missing paths are skipped. Raises LockedError if the
    directory is another one now, and DirectoryError if `superseded` is not a folder.
    """
    if not stored:
        return []
    directory = stored[0].path.parent
    folder = directory / SUPERSEDED
    if not (files.is_absent(folder) or files.is_real_folder(folder)):
        reason = "is a link or no directory; snapshots are set aside in a directory of that name"
        raise DirectoryError(folder, reason, "move it away")
    lock.check()
    files.make_directory(folder)
    with files.raise_write_errors(folder):
        moved = []
        for snapshot in stored:
            if not files.is_absent(snapshot.path):
                path = _free_path(folder, snapshot.path.name)
                moved.append(path)
                files.system.rename(snapshot.path, path)
        # Sync the new names first, so that a crash in between loses no file.
        for changed in (folder, directory):
            files.system.fsync_directory(changed)
    return moved


def _free_path(folder: Path, name: str) -> Path:
    """Find a free path for a name in a folder, with a random word before the name if it is
    taken."""
    path = folder / name
    while not files.is_absent(path):
        path = folder / f"{secrets.token_hex(4)}-{name}"
    return path


# --- thinning while a training writes

KEPT_NAME = ".ema.kept"


def write_kept_time(directory: Path, t: float, lock: LockFile) -> None:
    """Note the time whose snapshots thinning keeps, as the user asked for them. It is no part of a
    header: the snapshots may be there already."""
    lock.check()
    files.write_atomically(directory / KEPT_NAME, repr(t).encode(), overwrite=True)


def read_kept_time(directory: Path) -> float | None:
    """Read the time that `write_kept_time` has noted."""
    with suppress(PostHocError, OSError, ValueError):
        return float(read_small_file(directory / KEPT_NAME, 100))
    return None


def thin(
    stored: Sequence[Snapshot],
    max_checkpoints: int | None,
    lock: LockFile,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    kept_time: float | None = None,
) -> list[Snapshot]:
    """Keep the snapshots of the `max_checkpoints` times that reconstruction needs most, among them
    those of `kept_time` and the newest; delete the others.

    Returns the remaining snapshots in order of time.
    """
    times = {snapshot.t for snapshot in stored}
    if max_checkpoints is None or len(times) <= max_checkpoints:
        return list(stored)
    dropped = _least_needed(stored, max_checkpoints, sigma_range, kept_time)
    remaining = list[Snapshot]()
    for snapshot in stored:
        if snapshot.t in dropped:
            log.debug("thinning: removing %s", snapshot.path)
            remove_snapshot(snapshot, lock)
        else:
            remaining.append(snapshot)
    return remaining


def _least_needed(
    snapshots: Sequence[Snapshot],
    keep: int,
    sigma_range: tuple[float, float],
    kept_time: float | None,
) -> set[float]:
    """Find the times that reconstruction needs least, so that `keep` are left, or at least the
    newest and `kept_time`."""
    prior = Sources.of(snapshots).prior()
    profiles = [snapshot.profile for snapshot in snapshots]
    needed = {*newest_times(profiles, count_protected_times(keep))}
    needed.update(profile.t for profile in profiles if profile.t == kept_time)
    return {time.t for time in times_to_drop(profiles, prior, keep, needed, sigma_range)}
