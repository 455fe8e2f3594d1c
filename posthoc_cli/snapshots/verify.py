"""Verify a path: check each file against its checksums, and compare files that belong together."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    PostHocError,
    VanishedError,
    shown,
)
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.snapshots.directory import (
    PICKLES,
    SUPERSEDED,
    Directory,
    inspected,
    is_parts_folder,
    is_snapshot_name,
    list_directory,
    list_folder,
    read_folder,
)
from posthoc_cli.snapshots.outputs import INDEX_NAME, INDEX_SUFFIX, OutputInfo, decode_index, read_model
from posthoc_cli.snapshots.snapshot import Snapshot, decode, decode_snapshot
from posthoc_cli.snapshots.sources import run_clock
from posthoc_cli.snapshots.tensorfile import FORMAT, SUFFIX, TensorFile, file_size, read_file

ACCEPTED = "name a snapshot directory, a folder of outputs, a .safetensors file, or the index of a sharded model"

# The states of a file.
INTACT = "intact"  # unchanged since it was written
UNCHECKED = "unchecked"  # has no checksums: only its structure was checked
DAMAGED = "damaged"  # changed since it was written, or not a file of this format
UNREADABLE = "unreadable"  # its content is unknown: the system refused to read it, or it is of a later release

_BROKEN_FILE = (errno.EIO, errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Error numbers of opening or reading that mean a broken file: a bad disk, a broken link, not a regular file."""


# --- reports


@dataclass(frozen=True)
class FileReport:
    """The result of verifying a file."""

    path: Path
    what: str = "unknown"  # the file in a few words
    state: str = INTACT
    detail: str = ""  # explains the state, or notes something unusual
    nbytes: int = 0
    header: Snapshot | OutputInfo | None = None  # what a valid header says: a snapshot or a part of one, or an output

    @property
    def is_fine(self) -> bool:
        return self.state in (INTACT, UNCHECKED)


@dataclass(frozen=True)
class Verification:
    """The result of verifying a path.

    `problems` name files that contradict each other; `notes` are about unusual files that are not broken. `leftovers`
    are temporary files of interrupted writes, or of writes in progress. `superseded` counts snapshots that were set
    aside, which are not read.
    """

    path: Path
    is_directory: bool
    files: tuple[FileReport, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    leftovers: tuple[Path, ...] = ()
    superseded: int = 0
    seconds: float = 0.0

    def __repr__(self) -> str:
        wrong = len(self.broken) + len(self.problems)
        return f"Verification({self.path}: {len(self.files)} files, {self.nbytes:,} bytes, {wrong} problems)"

    @property
    def broken(self) -> tuple[Path, ...]:
        return tuple(report.path for report in self.files if not report.is_fine)

    @property
    def is_fine(self) -> bool:
        return not (self.broken or self.problems)

    @property
    def nbytes(self) -> int:
        return sum(report.nbytes for report in self.files)

    def name(self, path: Path) -> str:
        """Return the name of a file for reports: relative to the directory if one was verified."""
        return str(path.relative_to(self.path)) if self.is_directory else str(path)

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": "directory" if self.is_directory else "file",
            "path": str(self.path),
            "files": [
                {"path": self.name(r.path), "what": r.what, "state": r.state, "detail": r.detail, "bytes": r.nbytes}
                for r in self.files
            ],
            "problems": list(self.problems),
            "notes": list(self.notes),
            "leftovers": [self.name(path) for path in self.leftovers],
            "superseded": self.superseded,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


def verify(path: Path, progress: ProgressBar = no_bar) -> Verification:
    """Read every byte of a directory or a file; check checksums, headers, and snapshots against each other.

    No lock is taken: files that a training deletes meanwhile are left out, files that it adds are not read.
    """
    started = time.perf_counter()
    listing, paths, indexes, leftovers = _listed(path)
    with progress("verifying", sum(map(file_size, paths))) as advance:
        found = {file: _read(file, advance) for file in paths}
    reports = [report for report in found.values() if report is not None]
    # What is wrong with a file is said once: the others in a folder of parts are not compared with it.
    whole = {report.path: report.header for report in reports if report.is_fine and isinstance(report.header, Snapshot)}
    broken = {file.parent for file in found if file not in whole}
    known = Directory(path, tuple(entry for entry in listing.entries if entry not in broken))
    is_parts = is_parts_folder(path)
    content = inspected(known, whole.get) if path.is_dir() and not is_parts else known
    problems = [str(problem) for problem in content.problems]
    try:
        if is_parts and len(whole) == len(found) and not isinstance(parts := read_folder(path, whole.get), Snapshot):
            problems = [f"{path}: has {parts}"]
        if content.snapshots and not problems:
            run_clock(content.snapshots)
    except PostHocError as error:
        problems = [str(error)]
    for index in indexes:
        try:
            read_model(index)
        except (FileFormatError, MismatchError) as error:
            problems.append(str(error))
    result = Verification(path, path.is_dir(), tuple(reports), tuple(problems))
    notes = [f"{result.name(report.path)}: {report.detail}" for report in reports if report.is_fine and report.detail]
    if pickles := len(listing.pickles):
        notes.append(f"{pickles:,} pickled files (.pt and the like) have no checksums and were not read")
    return replace(
        result, notes=(*notes, *content.notes), leftovers=tuple(sorted({*leftovers, *content.incomplete})),
        superseded=listing.superseded if path.is_dir() else 0, seconds=time.perf_counter() - started,
    )  # fmt: skip


def _listed(path: Path) -> tuple[Directory, list[Path], list[Path], list[Path]]:
    """List a path; return also all files to read, indexes of shards, and leftovers; DirectoryError if nothing."""
    listing, indexes = Directory(path, (path,)), [path] if path.name.endswith(INDEX_SUFFIX) else []
    if path.is_dir():
        listing = list_directory(path)
        others = (p for p in listing.entries if p.suffix != SUFFIX and p.name != SUPERSEDED and not p.is_symlink())
        indexes = [folder / INDEX_NAME for folder in (path, *others) if _has_index(folder)]
    elif files.is_absent(path):
        raise DirectoryError(path, "no such file or directory", ACCEPTED)
    elif path.suffix in PICKLES:
        raise InvalidValueError(path, "has no checksums, and no pickle is opened here", ACCEPTED)
    paths = [*listing.files] if path.is_dir() else [] if indexes else [path]
    leftovers = listing.leftovers
    for folder in (*listing.folders, *(index.parent for index in indexes if index.parent != path)):
        with suppress(DirectoryError):  # which is one of the problems in the end
            inner = list_folder(folder)
            paths += inner.files
            leftovers += inner.leftovers
    for index in indexes:
        with suppress(FileFormatError):  # which is one of the problems in the end
            paths += [index.parent / name for name in decode_index(index)]
    if path.is_dir() and not (paths or indexes or leftovers or listing.folders):
        reason = "holds no snapshots or outputs" + "; no pickle is opened here" * bool(listing.pickles)
        raise DirectoryError(path, reason, ACCEPTED)
    return listing, sorted({*paths}), indexes, leftovers


def _has_index(folder: Path) -> bool:
    with suppress(OSError):  # no permission, or a name too long
        return (folder / INDEX_NAME).is_file()
    return False


# --- a file


def _read(path: Path, progress: Callable[[int], object]) -> FileReport | None:
    """Read every byte of a file and return the report; None if the file does not exist, or not any more."""
    is_named = is_snapshot_name(path) or is_snapshot_name(path.parent)
    report = FileReport(path, "snapshot, by its name" if is_named else "unknown")
    try:
        file = read_file(path)
        kind, known = file.kind, file.content.get("format")
        if kind is not None and (kind not in ("snapshot", "output") or known != FORMAT):
            detail = f"this release does not know {shown(kind)} of format {shown(known)}"
            return replace(report, state=UNREADABLE, detail=detail)
        report = _described(file)
        progress(file.nbytes - sum(entry.nbytes for entry in file.entries.values()))
        file.verify(progress)
        return report
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_absent(path):
            return None
        is_broken = not isinstance(error.__cause__, OSError) or error.__cause__.errno in _BROKEN_FILE
        return replace(report, state=DAMAGED if is_broken else UNREADABLE, detail=error.reason)


def _described(file: TensorFile) -> FileReport:
    """Return the report of a file by its header; raise FileFormatError if it is invalid."""
    if file.kind is None:
        return FileReport(file.path, "foreign", UNCHECKED, nbytes=file.nbytes)
    if file.kind == "output":
        output = decode(file, "output", OutputInfo)
        profile = output.profile if len(output.profile) <= 60 else f"{output.profile[:57]}..."
        return FileReport(file.path, f"output {profile} at t = {output.t:,.12g}", nbytes=file.nbytes, header=output)
    snapshot = decode_snapshot(file)
    part = "part {}/{} of ".format(*snapshot.part) if snapshot.part else ""
    what = f"{part}snapshot sigma_rel {snapshot.sigma_rel:g} at t = {snapshot.t:,.12g}"
    return FileReport(file.path, what, nbytes=file.nbytes, header=snapshot)
