"""Verify a path: check each file against its checksums, and compare files that belong together."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from posthoc_cli import files
from posthoc_cli.errors import (
    DirectoryError,
    FileFormatError,
    InvalidValueError,
    MismatchError,
    count_noun,
)
from posthoc_cli.resources import ProgressBar, no_bar
from posthoc_cli.snapshots.decoding import decode
from posthoc_cli.snapshots.directory import (
    PICKLES,
    Directory,
    inspect_listing,
    is_parts_folder,
    list_candidates,
)
from posthoc_cli.snapshots.opened_file import file_size
from posthoc_cli.snapshots.output_info import OutputInfo
from posthoc_cli.snapshots.outputs import (
    INDEX_NAME,
    INDEX_SUFFIX,
    decode_index,
    read_index,
    read_model,
)
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot
from posthoc_cli.snapshots.sources import Sources
from posthoc_cli.snapshots.tensorfile import FORMAT, FORMATS, SUFFIX, read_file

T = TypeVar("T")

ACCEPTED = (
    "name a snapshot directory, a folder of outputs, a .safetensors file, or the index of a "
    "sharded model; "
    "no pickle is opened here"
)

# The states of a file.
INTACT = "intact"  # unchanged since it was written
UNCHANGED = "unchanged"  # of an import: its size and a sample of its content are as they were
UNCHECKED = "unchecked"  # has no checksums: only its structure was checked
DAMAGED = "damaged"  # changed since it was written, or not a file of this format
# its content is unknown: the system refused to read it, or it is of a later release
UNREADABLE = "unreadable"

# Error numbers of opening or reading that mean a broken file: a bad disk, a broken link, not a
# regular file.
_BROKEN_FILE = (errno.EIO, errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV)


# --- reports


@dataclass(frozen=True)
class FileReport:
    """The result of verifying a file."""

    path: Path
    what: str = "unknown"  # the file in a few words
    state: str = INTACT
    detail: str = ""  # explains the state
    nbytes: int = 0
    # what a valid header says: a snapshot or a part of one, or an output
    header: Snapshot | OutputInfo | None = None
    error: FileFormatError | None = None

    @property
    def is_fine(self) -> bool:
        return self.state in (INTACT, UNCHANGED, UNCHECKED)


@dataclass(frozen=True)
class Verification:
    """The result of verifying a path."""

    path: Path
    is_directory: bool
    files: tuple[FileReport, ...] = ()
    problems: tuple[str, ...] = ()  # about files that contradict each other
    notes: tuple[str, ...] = ()  # about unusual files that are not broken
    # temporary files of interrupted writes, or of writes in progress
    leftovers: tuple[Path, ...] = ()
    superseded: int = 0  # snapshots that were set aside, which are not read
    seconds: float = 0.0

    def __repr__(self) -> str:
        wrong = len(self.broken) + len(self.problems)
        return (
            f"Verification({self.path}: {count_noun(len(self.files), 'file')}, "
            f"{count_noun(self.nbytes, 'byte')}, {count_noun(wrong, 'problem')})"
        )

    @property
    def broken(self) -> tuple[Path, ...]:
        return tuple(report.path for report in self.files if not report.is_fine)

    @property
    def is_fine(self) -> bool:
        return not (self.broken or self.problems)

    @property
    def nbytes(self) -> int:
        return sum(report.nbytes for report in self.files)

    def to_dict(self) -> dict[str, Any]:
        def name(path: Path) -> str:
            return str(path.relative_to(self.path)) if self.is_directory else str(path)

        return {
            "kind": "directory" if self.is_directory else "file",
            "path": str(self.path),
            "files": [
                {
                    "path": name(r.path),
                    "what": r.what,
                    "state": r.state,
                    "detail": r.detail,
                    "bytes": r.nbytes,
                }
                for r in self.files
            ],
            "problems": list(self.problems),
            "notes": list(self.notes),
            "leftovers": [name(path) for path in self.leftovers],
            "superseded": self.superseded,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


def verify(path: Path, progress: ProgressBar = no_bar) -> Verification:
    """Read every byte of a directory or a file; check checksums, headers, and snapshots against
    each other.

    No lock is taken: files that a training deletes meanwhile are left out, files that it adds are
    not read.
    """
    started = time.perf_counter()
    listing, indexes, shards = _list(path)
    paths = sorted({*listing.files, *shards})
    reports = _reports(paths, progress)
    headers = []
    for file in listing.files:
        report = reports.get(file)
        headers.append(report and (report.error or report.header))
    content = inspect_listing(listing, headers)
    problems = [str(error) for error in content.problems if error not in headers]
    notes = [*content.notes]
    incomplete = {*content.incomplete}
    if path in incomplete:  # the parts of one snapshot were named
        problems = notes
        notes = []
        incomplete = set()
    if not problems and content.snapshots:
        sources = Sources.of(content.snapshots)
        problems += _find_problems(lambda: sources.clock)
    for index in indexes:
        problems += _find_problems(partial(_check_index, index))
    notes += _note_of_pickles(listing)
    return Verification(
        path,
        path.is_dir(),
        tuple(reports.values()),
        tuple(problems),
        tuple(notes),
        tuple(sorted({*listing.leftovers, *incomplete})),
        listing.superseded if path.is_dir() else 0,
        time.perf_counter() - started,
    )


def _note_of_pickles(listing: Directory) -> list[str]:
    count = sum(entry.suffix in PICKLES for entry in listing.entries)
    note = f"pickled files (.pt and the like) have no checksums and were not read: {count:,}"
    return [note] if count else []


def _reports(
    paths: Sequence[Path],
    progress: ProgressBar,
) -> dict[Path, FileReport]:
    """Read files, and report on each that can be reported on."""
    reports = {}
    with progress("verifying", sum(map(file_size, paths))) as advance:
        for path in paths:
            report = _report(path, advance)
            if report:
                reports[path] = report
    return reports


def _find_problems(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (FileFormatError, MismatchError) as error:
        return [str(error)]
    return []


def _list(path: Path) -> tuple[Directory, list[Path], list[Path]]:
    """List a path, with indexes of shards and the files that belong to them; DirectoryError if it
    holds nothing."""
    listing = Directory(path, candidates={path: [path]})
    indexes = list[Path]()
    if path.is_dir():
        listing = list_candidates(path)
        indexes = _indexes_in(listing)
    elif files.is_absent(path):
        raise DirectoryError(path, "no such file or directory", ACCEPTED)
    elif path.suffix in PICKLES:
        raise InvalidValueError(path, "has no checksums", ACCEPTED)
    elif path.name.endswith(INDEX_SUFFIX):
        listing = Directory(path)
        indexes = [path]
    shards = list[Path]()
    leftovers = [*listing.leftovers]
    for index in indexes:
        with suppress(DirectoryError):  # the files that it names are read in any case
            inner = list_candidates(index.parent)
            shards += inner.files
            leftovers += inner.leftovers
        with suppress(FileFormatError):  # which is one of the problems in the end
            shards += [index.parent / name for name in decode_index(index)]
    if not (listing.candidates or indexes or leftovers):
        raise DirectoryError(path, "holds no snapshots or outputs", ACCEPTED)
    candidates = {path: listing.files} if is_parts_folder(path) else listing.candidates
    return replace(listing, candidates=candidates, leftovers=leftovers), indexes, shards


def _indexes_in(listing: Directory) -> list[Path]:
    """List the indexes of sharded models in a directory and in the folders in it."""
    indexes = list[Path]()
    for folder in (listing.path, *listing.entries):
        if folder.suffix == SUFFIX:
            continue
        index = folder / INDEX_NAME
        with suppress(OSError):  # no permission, or a name too long
            if index.is_file() and (folder == listing.path or not folder.is_symlink()):
                indexes.append(index)
    return indexes


def _check_index(path: Path) -> None:
    """Raise an error unless an index fits its shards; the index of an output says their size."""
    shards, output = read_model(path)
    nbytes = 0
    for shard in shards:
        nbytes += sum(entry.nbytes for entry in shard.entries.values())
    metadata = read_index(path).get("metadata")
    if output is not None and metadata != {"total_size": nbytes}:
        raise FileFormatError(path, f"damaged: its metadata must be the total_size {nbytes:,}")


# --- a file


def _report(
    path: Path,
    progress: Callable[[int], object],
) -> FileReport | None:
    """Read every byte of a file and report on it; None if the file does not exist, or no longer
    does."""
    report = FileReport(path)
    is_known = True
    try:
        file = read_file(path)
        is_known = (
            file.kind in (None, "snapshot", "output")
            and file.content.get("format", FORMAT) in FORMATS
        )
        output = decode(file, "output", OutputInfo) if file.kind == "output" else None
        header = output or (None if file.kind is None else decode_snapshot(file))
        report = FileReport(
            path,
            _describe_header(header),
            INTACT if header else UNCHECKED,
            nbytes=file.nbytes,
            header=header,
        )
        file.verify(progress)
        return report
    except FileFormatError as error:
        if files.is_absent(path):
            return None
        cause = error.__cause__
        is_broken = is_known and not (
            isinstance(cause, OSError) and cause.errno not in _BROKEN_FILE
        )
        return replace(
            report,
            state=DAMAGED if is_broken else UNREADABLE,
            detail=error.reason,
            error=error,
        )


def _describe_header(header: Snapshot | OutputInfo | None) -> str:
    if header is None:
        return "foreign"
    if isinstance(header, OutputInfo):
        profile = header.profile if len(header.profile) <= 60 else f"{header.profile[:57]}..."
        return f"output {profile} at t = {header.t:,.12g}"
    part = "part {}/{} of ".format(*header.part) if header.part else ""
    return f"{part}snapshot sigma_rel {header.sigma_rel:g} at t = {header.t:,.12g}"
