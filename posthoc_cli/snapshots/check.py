"""Verify a path: read each file against its checksums, compare snapshots with each other; set aside what is broken.

Broken files of a snapshot directory go into its folder `damaged`, under their names; only without a writer.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from posthoc_cli.progress import ProgressBar, no_bar
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.directory import (
    BROKEN,
    PICKLES,
    SUPERSEDED,
    Listing,
    contradictions,
    is_parts_folder,
    is_snapshot_name,
    list_directory,
    list_folder,
    missing_at_newest,
    parts_folders,
    read_folder,
    read_folders,
    time_order,
)
from posthoc_cli.snapshots.format import OutputInfo
from posthoc_cli.snapshots.headers import decode_snapshot, file_kind
from posthoc_cli.snapshots.outputs import INDEX_NAME, INDEX_SUFFIX, check_alike, decode_index, decode_output
from posthoc_cli.snapshots.reading import open_file
from posthoc_cli.snapshots.sources import Snapshot, run_clock
from posthoc_cli.snapshots.states import COPY, decode_state, tensors_with
from posthoc_cli.snapshots.tensor_file import read_header
from posthoc_cli.snapshots.writer import LOCK_NAME, move_aside, one_writer, remove_leftovers

ACCEPTED = "name a snapshot directory, a folder of outputs, a .safetensors file, or the index of a sharded model"

# The states of a file.
INTACT = "intact"  # as it was written
UNCHECKED = "unchecked"  # no checksums: only its structure was checked
DAMAGED = "damaged"  # not as it was written, or never a file of this format
MISSING = "missing"  # named by an index, and not there
NONFINITE = "nonfinite"  # an average in it holds nan or infinity
MISMATCHED = "mismatched"  # an index that does not match its shards, or shards of different models
UNREADABLE = "unreadable"  # the system refused to read it, so that nothing is known of it
UNSUPPORTED = "unsupported"  # of a kind or version that this release does not know

MOVED = frozenset({DAMAGED, MISSING, NONFINITE, MISMATCHED})
"""States of files that a repair sets aside."""

_BROKEN_FILE = (errno.EIO, errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Errors of opening or reading that are the file's fault: a bad disk, a broken link, no regular file."""


# --- reports


@dataclass(frozen=True)
class FileReport:
    """What was found in a file; `is_fine` if nothing is wrong.

    `unit` is what is moved if it is broken: the file, or the folder of a model in several. `what` describes it in a few
    words, `kind` is "snapshot", "output", "state" or None. `detail` says why it is in its `state`, or what is unusual
    and not wrong. The rest is what a valid header says: `averages` must be finite; a snapshot is one of the directory,
    and is in the report of one of its parts, a broken one if there is one.
    """

    path: Path
    unit: Path
    what: str = "unknown"
    kind: str | None = None
    state: str = INTACT
    detail: str = ""
    nbytes: int = 0
    header: fmt.FileHeader | None = None
    snapshot: Snapshot | None = None
    output: OutputInfo | None = None
    averages: Collection[str] = ()

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.state in (INTACT, UNCHECKED)


@dataclass(frozen=True)
class Verification:
    """What was found in a path.

    `problems` are files that contradict each other, both named; `notes` are unusual and not wrong. `leftovers` are
    temporaries of interrupted writes, or of writes in progress. `superseded` counts snapshots that were set aside,
    `moved` broken files that a repair has moved to `damaged/`. `going` is what a repair would move, each with its
    identity, to notice a file that was replaced.
    """

    path: Path
    is_directory: bool
    files: tuple[FileReport, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    leftovers: tuple[Path, ...] = ()
    superseded: int = 0
    moved: int = 0
    seconds: float = 0.0
    going: Mapping[Path, tuple[int, ...] | None] = field(default_factory=dict)

    def __repr__(self) -> str:
        wrong = len(self.broken) + len(self.problems)
        return f"Verification({self.path}: {len(self.files)} files, {self.nbytes:,} bytes, {wrong} problems)"

    @property
    def broken(self) -> tuple[Path, ...]:
        """What is moved if it is broken: units with something wrong."""
        return tuple(dict.fromkeys(report.unit for report in self.files if not report.is_fine))

    @property
    def staying(self) -> tuple[FileReport, ...]:
        """What is not fine, but may be valid, and is not moved."""
        return tuple(one for one in self.files if not (one.is_fine or {one.unit, one.path} & self.going.keys()))

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.broken or self.problems)

    @property
    def is_of_tracker(self) -> bool:
        """Whether a tracker writes, or has written, to the directory."""
        own = any(report.kind == "snapshot" and report.unit.parent == self.path for report in self.files)
        return self.is_directory and (own or (self.path / LOCK_NAME).exists())

    @property
    def nbytes(self) -> int:
        """How much was read."""
        return sum(report.nbytes for report in self.files)

    def name(self, path: Path) -> str:
        """The name of a file in reports: relative to a directory that was verified."""
        return str(path.relative_to(self.path)) if self.is_directory else str(path)

    def to_dict(self) -> dict[str, Any]:
        """The report as data for JSON."""
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
            "moved": self.moved,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


# --- listing


class _Unit(NamedTuple):
    """A file, or the files of a sharded model with the tensors that its index names; those need not exist.

    Or the parts of a snapshot. `path` is what is moved if it is broken.
    """

    path: Path
    files: Mapping[Path, Collection[str]]
    indexed_by: Path | None = None
    superseded: bool = False
    has_parts: bool = False


def _listed(path: Path) -> tuple[Verification, list[_Unit]]:
    """What there is to verify: a DirectoryError if nothing. Reads indexes, and the headers of parts."""
    if is_parts_folder(path):
        return Verification(path, True, leftovers=tuple(list_directory(path).leftovers)), [_parts(path)]
    if path.is_dir():
        return _listed_directory(path)
    if files.is_gone(path):
        raise DirectoryError(path, "no such file or directory", ACCEPTED)
    if path.suffix in PICKLES:
        raise InvalidValueError(path, "has no checksums, and no pickle is opened here", ACCEPTED)
    return Verification(path, False), [_shards(path) if path.name.endswith(INDEX_SUFFIX) else _Unit(path, {path: ()})]


def _listed_directory(directory: Path) -> tuple[Verification, list[_Unit]]:
    listing = list_directory(directory)
    sharded_in = [path for path in listing.entries if path.name not in (SUPERSEDED, BROKEN) and _has_index(path)]
    units = [_shards(folder / INDEX_NAME) for folder in (directory, *sharded_in) if _has_index(folder)]
    sharded = {path for unit in units for path in unit.files}
    units += [_Unit(path, {path: ()}) for path in listing.files if path not in sharded]
    parted = read_folders(listing)
    # What is wrong with parts is reported when they are read.
    units += [_parts(folder) for folder in (*parted.snapshots, *parted.problems)]
    units.sort(key=lambda unit: unit.indexed_by or unit.path)
    notes = parted.notes
    inner = [_readable(folder) for folder in (*sharded_in, *parted.snapshots, *parted.problems)]
    aside = _readable(directory / SUPERSEDED, notes)
    old = [_Unit(path, {path: ()}, superseded=True) for path in aside.files]
    old += [_parts(path)._replace(superseded=True) for path in parts_folders(aside)]
    leftovers = sorted([*parted.incomplete, *(path for one in (listing, *inner, aside) for path in one.leftovers)])
    moved, count = len(_readable(directory / BROKEN).entries), len(listing.pickles)
    if not (units or old or leftovers or moved):
        what = "holds no snapshots, outputs or states" + "; no pickle is opened here" * bool(count)
        raise DirectoryError(directory, what, ACCEPTED)
    if count:
        notes.append(f"{count:,} pickled files (.pt and the like) have no checksums and were not read")
    if moved:
        notes.append(f"{moved:,} in {BROKEN}/, where a repair has moved them; not read")
    found = Verification(
        directory, True, notes=tuple(notes), leftovers=tuple(leftovers), superseded=len(old), moved=moved
    )
    return found, [*units, *old]


def _readable(folder: Path, notes: list[str] | None = None) -> Listing:
    """As `list_folder`; nothing, and a note, where it cannot be read."""
    reason = "is a symbolic link; not read" if folder.is_symlink() else ""
    found = Listing(folder, ())
    try:
        found = list_folder(folder)
    except DirectoryError:
        reason = "cannot be read"
    if reason and notes is not None:
        notes.append(f"{folder.name}/ {reason}")
    return found


def _has_index(folder: Path) -> bool:
    with suppress(OSError):  # no permission, or a name too long
        return (folder / INDEX_NAME).is_file()
    return False


def _parts(folder: Path) -> _Unit:
    return _Unit(folder, dict.fromkeys(list_folder(folder).files, ()), has_parts=True)


def _shards(index: Path) -> _Unit:
    """The shards that an index names; none if it cannot be read, so that each file beside it is a unit of its own."""
    try:
        shards = decode_index(index).shards
    except FileFormatError:  # reported when the index is compared with the shards
        shards = {}
    return _Unit(index.parent, {index.parent / name: names for name, names in shards.items()}, index)


# --- verifying


def verify(path: Path, progress: ProgressBar = no_bar) -> Verification:
    """Read every byte of a directory or a file, and compare: checksums, headers, values, snapshots with each other.

    Takes no lock: files that a training thins away meanwhile are left out, files that it adds are not read. A
    DirectoryError if there is nothing to verify.
    """
    started = time.perf_counter()
    found, units = _listed(path)
    with progress("verifying", _size(units)) as advance:
        reports = [report for unit in units for report in _read_unit(unit, advance)]
    own = sorted((r.snapshot for r in reports if r.snapshot and r.is_fine), key=time_order)
    problems = contradictions(own)
    if own and not problems:
        try:
            run_clock([snapshot.info for snapshot in own])
        except MismatchError as error:
            problems = [error]
    notes = [f"{found.name(report.path)}: {report.detail}" for report in reports if report.is_fine and report.detail]
    if found.is_directory:
        notes += missing_at_newest(own)
    broken = {report.unit for report in reports if report.state in MOVED}
    # A model whose shards are in the directory itself is moved file by file.
    going = (report.path if report.unit == path else report.unit for report in reports if report.unit in broken)
    return replace(
        found, files=tuple(reports), problems=tuple(map(str, problems)), notes=(*notes, *found.notes),
        seconds=time.perf_counter() - started, going={one: _stamp(one) for one in going},
    )  # fmt: skip


def _size(units: Sequence[_Unit]) -> int:
    """About how much there is to read."""
    total = 0
    for path in (path for unit in units for path in unit.files):
        with suppress(OSError):
            total += path.stat().st_size
    return total


# --- reading a file


def _read_unit(unit: _Unit, progress: Callable[[int], object]) -> list[FileReport]:
    """Reports of the files of a unit, its index first; none for files that were deleted after the listing."""
    read = {path: _read_file(path, unit.path, progress) for path in unit.files}
    there = [report for report in read.values() if report is not None]
    if unit.indexed_by is not None:
        return _shard_reports(unit, unit.indexed_by, read, there)
    if unit.superseded:
        return [replace(report, what=f"superseded {report.what}", snapshot=None) for report in there]
    if unit.has_parts:
        return _part_reports(unit, there) if len(there) == len(read) else []  # else it is being thinned away
    return there


def _read_file(path: Path, unit: Path, progress: Callable[[int], object]) -> FileReport | None:
    """Read every byte of a file; None if it was deleted meanwhile."""
    nbytes = 0
    damaged: dict[str, FileFormatError] = {}
    nonfinite: dict[str, None] = {}
    try:
        with open_file(path) as file, closing(file.check_payload()) as found:
            report = _described(FileReport(path, unit), file.header)
            nbytes = file.header.payload_start
            progress(nbytes)
            for checked in found:
                if checked.error is not None:
                    damaged |= dict.fromkeys(checked.damaged, checked.error)
                nonfinite |= dict.fromkeys(checked.nonfinite)
                nbytes += checked.nbytes
                progress(checked.nbytes)
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_gone(path):
            return None  # a writer has thinned it away
        return replace(_unreadable(FileReport(path, unit), error), nbytes=nbytes)
    bad = [name for name in nonfinite if name in report.averages]
    state, detail = UNCHECKED if report.kind is None else INTACT, ""
    if damaged:
        state, detail = DAMAGED, f"{next(iter(damaged.values())).reason}{_and_more(len(damaged) - 1, 'tensor')}"
    elif bad:
        state, detail = NONFINITE, f"average {_nonfinite(bad)}{_and_more(len(bad) - 1, 'average')}"
    elif nonfinite:
        what, more = "tensor" if report.kind is None else "copy", _and_more(len(nonfinite) - 1, "tensor")
        detail = f"{what} {_nonfinite(nonfinite)}{more}"
    return replace(report, nbytes=nbytes, state=state, detail=detail)


def _nonfinite(names: Collection[str]) -> str:
    return f"{shown(next(iter(names)))} holds nan or infinity"


def _described(report: FileReport, header: fmt.FileHeader) -> FileReport:
    """The report with what a header says; a FileFormatError if it contradicts itself."""
    averages: Collection[str]
    path, kind = report.path, file_kind(header)
    report = replace(report, kind=kind, header=header)
    if kind is None:
        return replace(report, what="foreign")
    part = f"part {_shortened(header.metadata['ema.part'])} of " if "ema.part" in header.metadata else ""
    if kind == "output":
        output = decode_output(path, header)
        what, averages = f"{part}{_output_words(output)}", header.tensors.keys() - set(output.copies)
        return replace(report, what=what, output=output, averages=averages)
    if kind == "state":
        averages = header.tensors.keys() - set(tensors_with(COPY, header).values())
        what = f"{part}state at t = {decode_state(path, header).t:,.12g}"
        return replace(report, what=what, averages=averages)
    if kind == "checkpoint":
        return replace(report, what="checkpoint")
    info = decode_snapshot(path, header)
    what = f"{part}snapshot sigma_rel {info.sigma_rel:g} at t = {info.t:,.12g}"
    snapshot = None if part else Snapshot(path, header, info)
    averages = frozenset(name for name, tensor in info.tensors.items() if tensor.role != "copy")
    return replace(report, what=what, snapshot=snapshot, averages=averages)


def _fault(error: FileFormatError) -> tuple[str, str]:
    known = not isinstance(error.__cause__, OSError) or error.__cause__.errno in _BROKEN_FILE
    return DAMAGED if known else UNREADABLE, error.reason


def _unreadable(report: FileReport, error: FileFormatError) -> FileReport:
    """The report of a file that cannot be read, with what its name says."""
    state, detail = _fault(error)
    if is_snapshot_name(report.unit):
        report = replace(report, what="snapshot, by its name", kind="snapshot")
    with suppress(FileFormatError):
        header = read_header(report.path)
        kind, version = file_kind(header), header.metadata.get("ema.version")
        known = fmt.version_of(kind)
        if kind not in (None, "snapshot", "output", "state", "checkpoint"):
            state, detail = UNSUPPORTED, f"its ema.format is {shown(kind)}, which this release does not know"
        elif version not in (None, known):
            state, detail = UNSUPPORTED, f"its ema.version is {shown(version)}; this release reads {known}"
    return replace(report, state=state, detail=detail)


def _output_words(output: OutputInfo) -> str:
    return f"output {_shortened(output.profile)} at t = {output.t:,.12g}"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _and_more(count: int, what: str) -> str:
    return f" (and {count:,} {what}{'s' * (count > 1)} more)" if count else ""


# --- the parts of a snapshot


def _part_reports(unit: _Unit, there: Sequence[FileReport]) -> list[FileReport]:
    """The reports of the parts; a snapshot, or what is wrong between them, is in that of one."""
    place = next((index for index, report in enumerate(there) if not report.is_fine), 0)
    reports = list(there)
    try:
        found = read_folder(unit.path)
    except PostHocError as error:
        if reports[place].is_fine:  # else the cause has a line of its own
            detail = str(error).replace(f"{unit.path}{os.sep}", "").removeprefix(f"{unit.path}: ")
            reports[place] = replace(reports[place], state=MISMATCHED, detail=detail)
        return reports
    if isinstance(found, Snapshot):
        reports[place] = replace(reports[place], snapshot=found)
    if isinstance(found, str):
        reports.insert(0, FileReport(unit.path, unit.path, "snapshot", "snapshot", MISSING, f"has {found}"))
    return reports


# --- an index against its shards


def _shard_reports(
    unit: _Unit, index: Path, read: Mapping[Path, FileReport | None], there: Sequence[FileReport]
) -> list[FileReport]:
    model = next((report for report in there if report.output), FileReport(index, unit.path))
    of = f" of {_output_words(model.output)}" if model.output else ""
    state, detail = _index_fault(unit, index, there)
    reports = [FileReport(index, unit.path, f"index{of}", model.kind, state, detail)]
    for path, report in read.items():
        if report is None:
            report = FileReport(path, unit.path, f"shard{of}", None, MISSING, f"{index.name} names it")
        reports.append(replace(report, what=f"shard{of}" if report.output else report.what, snapshot=None))
    return reports


def _index_fault(unit: _Unit, index: Path, there: Sequence[FileReport]) -> tuple[str, str]:
    """State and detail of an index, compared with the shards that are there."""
    try:
        total = decode_index(index).total_size
    except FileFormatError as error:
        return _fault(error)
    if not unit.files:
        return DAMAGED, "names no shard"
    held = 0
    for one in there:
        own, named = one.header.tensors if one.header else {}, set(unit.files[one.path])
        held += sum(entry.nbytes for entry in own.values())
        if one.is_fine and own.keys() != named:
            name = shown(min(own.keys() ^ named))
            return MISMATCHED, f"tensor {name} is in {one.path.name} or named by the index, but not both"
    if len(there) < len(unit.files) or not all(one.is_fine for one in there):
        return INTACT, ""  # the cause has a line of its own
    try:
        for one in there[1:]:
            check_alike(there[0].path, there[0].output, one.path, one.output)
    except MismatchError as error:
        return MISMATCHED, str(error).replace(f"{unit.path}{os.sep}", "")
    if not any(one.output for one in there):
        return UNCHECKED, ""
    if total != held:  # an index has no checksum
        return DAMAGED, f"its total_size is {shown(total)}; the shards hold {held:,} bytes"
    return INTACT, ""


# --- setting aside what is broken


def check_repairable(found: Verification) -> None:
    """A DirectoryError if it is no directory of snapshots, an InvalidValueError if it can only be read."""
    if not found.is_of_tracker:
        hint = "an output or an import can be made again; a snapshot is set aside in its own directory"
        reason = "holds no snapshots of a tracker, and only these are set aside"
        raise DirectoryError(found.path, reason, hint if any(report.kind for report in found.files) else "")
    files.check_writable("directory", found.path)


def repair(found: Verification) -> tuple[Path, ...]:
    """Set aside what is broken, durably, while the directory is locked; returns the new paths.

    Raises:
        LockedError: a tracker is writing to the directory.
        MismatchError, DirectoryError: a file has changed since, or `damaged` is no folder; nothing was moved.
        WriteError: the system refused. What was moved is in the folder `damaged`, the rest where it was.
    """
    with one_writer(found.path) as check_lease:
        remove_leftovers(found.path)
        for path, known in found.going.items():
            if _stamp(path) not in (known, None):
                raise MismatchError(path, "has changed since it was read; nothing was set aside", "run again")
        check_lease()
        return tuple(move_aside([*found.going], found.path / BROKEN)) if found.going else ()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """The identity of a file; of a link itself."""
    with suppress(FileNotFoundError):
        known = path.lstat()
        return known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns
    return None
