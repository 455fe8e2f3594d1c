"""Verify a path: check each file against its checksums, and compare snapshots with each other."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
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
from posthoc_cli.snapshots.directory import (
    PICKLES,
    SUPERSEDED,
    Directory,
    contradictions,
    is_parts_folder,
    is_snapshot_name,
    joined,
    list_directory,
    list_folder,
    missing_at_newest,
    time_order,
)
from posthoc_cli.snapshots.outputs import (
    INDEX_NAME,
    INDEX_SUFFIX,
    OutputInfo,
    check_alike,
    decode_index,
    decode_output,
)
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot
from posthoc_cli.snapshots.sources import run_clock
from posthoc_cli.snapshots.tensorfile import FORMAT, TensorFile, read_file

ACCEPTED = "name a snapshot directory, a folder of outputs, a .safetensors file, or the index of a sharded model"

# The states of a file.
INTACT = "intact"  # unchanged since it was written
UNCHECKED = "unchecked"  # has no checksums: only its structure was checked
DAMAGED = "damaged"  # changed since it was written, or not a file of this format
MISSING = "missing"  # named by an index, but does not exist
NONFINITE = "nonfinite"  # an average in it holds nan or infinity
MISMATCHED = "mismatched"  # an index that does not match its shards, or shards of different models
UNREADABLE = "unreadable"  # the system refused to read it, so its content is unknown
UNSUPPORTED = "unsupported"  # of a kind or version that this release does not know

_BROKEN_FILE = (errno.EIO, errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Error numbers of opening or reading that mean a broken file: a bad disk, a broken link, not a regular file."""


# --- reports


@dataclass(frozen=True)
class FileReport:
    """The result of verifying a file.

    `unit` is the path of the whole: the file, or the folder of a model in several files. `what` describes the
    file in a few words; `kind` is "snapshot", "output" or None. `detail` explains the `state`,
    or notes something unusual. The other fields come from a valid header. The tensors in `averages` must be finite. A
    `snapshot` in parts is in the report of one part: of the first broken one, if there is any.
    """

    path: Path
    unit: Path
    what: str = "unknown"
    kind: str | None = None
    state: str = INTACT
    detail: str = ""
    nbytes: int = 0
    file: TensorFile | None = None
    snapshot: Snapshot | None = None
    output: OutputInfo | None = None
    averages: Collection[str] = ()

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong with the file."""
        return self.state in (INTACT, UNCHECKED)


@dataclass(frozen=True)
class Verification:
    """The result of verifying a path.

    `problems` name files that contradict each other; `notes` are about unusual files that are not broken. `leftovers`
    are temporary files of interrupted writes, or of writes in progress. `superseded` counts snapshots that were set
    aside.
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
        """The units in which something is wrong."""
        return tuple(dict.fromkeys(report.unit for report in self.files if not report.is_fine))

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.broken or self.problems)

    @property
    def nbytes(self) -> int:
        """The number of bytes read."""
        return sum(report.nbytes for report in self.files)

    def name(self, path: Path) -> str:
        """Return the name of a file for reports: relative to the directory if one was verified."""
        return str(path.relative_to(self.path)) if self.is_directory else str(path)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data for JSON."""
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


# --- listing


class _Unit(NamedTuple):
    """A file, the parts of a snapshot, or the shards of a model, which need not exist."""

    path: Path
    files: Mapping[Path, Collection[str]]
    indexed_by: Path | None = None
    superseded: bool = False
    has_parts: bool = False


def _listed(path: Path) -> tuple[Verification, list[_Unit]]:
    """List what to verify, reading indexes and the headers of parts; raise DirectoryError if there is nothing."""
    if is_parts_folder(path):
        return Verification(path, True, leftovers=tuple(list_directory(path).leftovers)), [_parts(path)]
    if path.is_dir():
        return _listed_directory(path)
    if files.is_absent(path):
        raise DirectoryError(path, "no such file or directory", ACCEPTED)
    if path.suffix in PICKLES:
        raise InvalidValueError(path, "has no checksums, and no pickle is opened here", ACCEPTED)
    return Verification(path, False), [_shards(path) if path.name.endswith(INDEX_SUFFIX) else _Unit(path, {path: ()})]


def _listed_directory(directory: Path) -> tuple[Verification, list[_Unit]]:
    listing = list_directory(directory)
    models = [path for path in listing.entries if path.name != SUPERSEDED and _has_index(path)]
    units = [_shards(folder / INDEX_NAME) for folder in (directory, *models) if _has_index(folder)]
    shards = {path for unit in units for path in unit.files}
    units += [_Unit(path, {path: ()}) for path in listing.files if path not in shards]
    of_parts = [_parts(path) for path in listing.folders]
    units += [unit for unit in of_parts if unit.files]
    units.sort(key=lambda unit: unit.indexed_by or unit.path)
    notes: list[str] = []
    superseded = _readable(directory / SUPERSEDED, notes)
    old_units = [_Unit(path, {path: ()}, superseded=True) for path in superseded.files]
    old_units += [_parts(path)._replace(superseded=True) for path in superseded.parts_folders]
    listings = (listing, *map(_readable, (*models, *listing.folders)), superseded)
    empty = [unit.path for unit in of_parts if not unit.files and not unit.path.is_symlink() and unit.path.is_dir()]
    notes += [f"{path.name}/: has no parts" for path in empty]
    leftovers = sorted([*empty, *(path for entries in listings for path in entries.leftovers)])
    pickles = len(listing.pickles)
    if not (units or old_units or leftovers):
        reason = "holds no snapshots or outputs" + "; no pickle is opened here" * bool(pickles)
        raise DirectoryError(directory, reason, ACCEPTED)
    if pickles:
        notes.append(f"{pickles:,} pickled files (.pt and the like) have no checksums and were not read")
    result = Verification(directory, True, notes=tuple(notes), leftovers=tuple(leftovers), superseded=len(old_units))
    return result, [*units, *old_units]


def _readable(folder: Path, notes: list[str] | None = None) -> Directory:
    """List a folder like `list_folder`; if it cannot be read, return nothing and add a note."""
    reason = "is a symbolic link; not read" if folder.is_symlink() else ""
    listing = Directory(folder)
    try:
        listing = list_folder(folder)
    except DirectoryError:
        reason = "cannot be read"
    if reason and notes is not None:
        notes.append(f"{folder.name}/ {reason}")
    return listing


def _has_index(folder: Path) -> bool:
    with suppress(OSError):  # no permission, or a name too long
        return (folder / INDEX_NAME).is_file()
    return False


def _parts(folder: Path) -> _Unit:
    return _Unit(folder, dict.fromkeys(list_folder(folder).files, ()), has_parts=True)


def _shards(index: Path) -> _Unit:
    """Return the shards that an index names: none if it cannot be read, which makes each file a separate unit."""
    try:
        shards = decode_index(index).shards
    except FileFormatError:  # reported when the index is compared with its shards
        shards = {}
    return _Unit(index.parent, {index.parent / name: names for name, names in shards.items()}, index)


# --- verifying


def verify(path: Path, progress: ProgressBar = no_bar) -> Verification:
    """Read every byte of a directory or a file; check checksums, headers, values, and snapshots against each other.

    No lock is taken: files that a training deletes meanwhile are left out, files that it adds are not read. Raises
    DirectoryError if there is nothing to verify.
    """
    started = time.perf_counter()
    listed, units = _listed(path)
    with progress("verifying", _size(units)) as advance:
        reports = [report for unit in units for report in _read_unit(unit, advance)]
    incomplete = {r.unit: r.detail for r in reports if r.state == MISSING and r.path == r.unit != path}
    reports = [report for report in reports if report.unit not in incomplete]
    snapshots = sorted((r.snapshot for r in reports if r.snapshot and r.is_fine), key=time_order)
    problems = contradictions(snapshots)
    if snapshots and not problems:
        try:
            run_clock([snapshot.info for snapshot in snapshots])
        except MismatchError as error:
            problems = [error]
    notes = [f"{listed.name(report.path)}: {report.detail}" for report in reports if report.is_fine and report.detail]
    if listed.is_directory:
        notes += missing_at_newest(snapshots)
    notes += [f"{folder.name}/: {parts}" for folder, parts in incomplete.items()]
    return replace(
        listed, files=tuple(reports), problems=tuple(map(str, problems)), notes=(*notes, *listed.notes),
        leftovers=tuple(sorted((*listed.leftovers, *incomplete))),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _size(units: Sequence[_Unit]) -> int:
    """Return about how many bytes there are to read."""
    total = 0
    for path in (path for unit in units for path in unit.files):
        with suppress(OSError):
            total += path.stat().st_size
    return total


# --- reading a file


def _read_unit(unit: _Unit, progress: Callable[[int], object]) -> list[FileReport]:
    """Return the reports of a unit's files, its index first, without files that were deleted after the listing."""
    results = {path: _read_file(path, unit.path, progress) for path in unit.files}
    reports = [report for report in results.values() if report is not None]
    if unit.indexed_by is not None:
        return _shard_reports(unit, unit.indexed_by, results, reports)
    if unit.superseded:
        return [replace(report, what=f"superseded {report.what}", snapshot=None) for report in reports]
    if unit.has_parts:  # if a part is missing, a training is deleting the snapshot
        return _part_reports(unit, reports) if len(reports) == len(results) else []
    strays = (report.snapshot is not None and report.snapshot.part is not None for report in reports)
    return [replace(r, snapshot=None) if is_stray else r for r, is_stray in zip(reports, strays, strict=True)]


def _read_file(path: Path, unit: Path, progress: Callable[[int], object]) -> FileReport | None:
    """Read every byte of a file and return the report; None if the file was deleted meanwhile."""
    nbytes = 0
    damaged: dict[str, FileFormatError] = {}
    nonfinite: dict[str, None] = {}
    try:
        file = read_file(path)
        with file, closing(file.checked()) as results:
            report = _described(FileReport(path, unit), file)
            nbytes = file.nbytes - sum(entry.nbytes for entry in file.entries.values())
            progress(nbytes)
            for checked in results:
                damaged |= checked.damaged
                nonfinite |= dict.fromkeys(checked.nonfinite)
                nbytes += checked.nbytes
                progress(checked.nbytes)
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_absent(path):
            return None  # a training has deleted it
        return replace(_unreadable(FileReport(path, unit), error), nbytes=nbytes)
    bad = [name for name in nonfinite if name in report.averages]
    state, detail = UNCHECKED if report.kind is None else INTACT, ""
    if damaged:
        state, detail = DAMAGED, f"{next(iter(damaged.values())).reason}{_and_more(len(damaged) - 1, 'tensor')}"
    elif bad:
        state, detail = NONFINITE, f"average {_nonfinite(bad)}{_and_more(len(bad) - 1, 'average')}"
    elif nonfinite:
        role = "tensor" if report.kind is None else "copy"
        detail = f"{role} {_nonfinite(nonfinite)}{_and_more(len(nonfinite) - 1, 'tensor')}"
    return replace(report, nbytes=nbytes, state=state, detail=detail)


def _nonfinite(names: Collection[str]) -> str:
    return f"{shown(next(iter(names)))} holds nan or infinity"


def _described(report: FileReport, file: TensorFile) -> FileReport:
    """Add a header's content to a report; raise FileFormatError if it is invalid."""
    averages: Collection[str]
    report = replace(report, kind=file.kind, file=file)
    if file.kind is None:
        return replace(report, what="foreign")
    if file.kind == "output":
        output = decode_output(file)
        what, averages = _output_words(output), file.entries.keys() - set(output.copies)
        return replace(report, what=what, output=output, averages=averages)
    snapshot = decode_snapshot(file)
    part = "part {}/{} of ".format(*snapshot.part) if snapshot.part else ""
    what = f"{part}snapshot sigma_rel {snapshot.sigma_rel:g} at t = {snapshot.t:,.12g}"
    averages = frozenset(name for name, tensor in snapshot.tensors.items() if tensor.role != "copy")
    return replace(report, what=what, snapshot=snapshot, averages=averages)


def _fault(error: FileFormatError) -> tuple[str, str]:
    is_broken = not isinstance(error.__cause__, OSError) or error.__cause__.errno in _BROKEN_FILE
    return DAMAGED if is_broken else UNREADABLE, error.reason


def _unreadable(report: FileReport, error: FileFormatError) -> FileReport:
    """Return the report of a file that cannot be read or decoded, with what its name and ema.format show."""
    state, detail = _fault(error)
    if is_snapshot_name(report.unit):
        report = replace(report, what="snapshot, by its name", kind="snapshot")
    with suppress(FileFormatError):
        file = read_file(report.path)
        if file.kind not in (None, "snapshot", "output"):
            state, detail = UNSUPPORTED, f"its kind is {shown(file.kind)}, which this release does not know"
        elif file.kind and (form := file.content.get("format")) != FORMAT:
            state, detail = UNSUPPORTED, f"its format is {shown(form)}; this release reads {FORMAT}"
    return replace(report, state=state, detail=detail)


def _output_words(output: OutputInfo) -> str:
    return f"output {_shortened(output.profile)} at t = {output.t:,.12g}"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _and_more(count: int, what: str) -> str:
    return f" (and {count:,} {what}{'s' * (count > 1)} more)" if count else ""


# --- the parts of a snapshot


def _part_reports(unit: _Unit, reports: list[FileReport]) -> list[FileReport]:
    """Complete the reports of parts: add their snapshot, or what is wrong between them, to the report of one part."""
    place = next((index for index, report in enumerate(reports) if not report.is_fine), 0)
    parts = [report.snapshot for report in reports if report.snapshot]
    reports = [replace(report, snapshot=None) for report in reports]
    if len(parts) < len(reports) and reports[place].is_fine:
        stray = next(report for report in reports if report.kind != "snapshot")
        detail = "is in a folder of parts but is not a part of a snapshot"
        return [replace(r, state=MISMATCHED, detail=detail) if r is stray else r for r in reports]
    try:
        content = joined(unit.path, parts) if len(parts) == len(reports) else None
    except PostHocError as error:
        if reports[place].is_fine:  # otherwise its report shows the cause
            detail = str(error).replace(f"{unit.path}{os.sep}", "").removeprefix(f"{unit.path}: ")
            reports[place] = replace(reports[place], state=MISMATCHED, detail=detail)
        return reports
    if isinstance(content, Snapshot):
        reports[place] = replace(reports[place], snapshot=content)
    elif content:
        return [FileReport(unit.path, unit.path, "snapshot", "snapshot", MISSING, f"has {content}"), *reports]
    return reports


# --- an index against its shards


def _shard_reports(
    unit: _Unit, index: Path, results: Mapping[Path, FileReport | None], existing: Sequence[FileReport]
) -> list[FileReport]:
    model = next((report for report in existing if report.output), FileReport(index, unit.path))
    of_model = f" of {_output_words(model.output)}" if model.output else ""
    state, detail = _index_fault(unit, index, existing)
    reports = [FileReport(index, unit.path, f"index{of_model}", model.kind, state, detail)]
    for path, report in results.items():
        if report is None:
            report = FileReport(path, unit.path, f"shard{of_model}", None, MISSING, f"{index.name} names it")
        reports.append(replace(report, what=f"shard{of_model}" if report.output else report.what, snapshot=None))
    return reports


def _index_fault(unit: _Unit, index: Path, existing: Sequence[FileReport]) -> tuple[str, str]:
    """Return the state of an index, compared with the existing shards, and the detail."""
    try:
        total = decode_index(index).total_size
    except FileFormatError as error:
        return _fault(error)
    if not unit.files:
        return DAMAGED, "names no shard"
    nbytes = 0
    for shard in existing:
        tensors, named = shard.file.entries if shard.file else {}, set(unit.files[shard.path])
        nbytes += sum(entry.nbytes for entry in tensors.values())
        if shard.is_fine and tensors.keys() != named:
            name = shown(min(tensors.keys() ^ named))
            return MISMATCHED, f"tensor {name} is in {shard.path.name} or named by the index, but not both"
    if len(existing) < len(unit.files) or not all(shard.is_fine for shard in existing):
        return INTACT, ""  # the shard's report shows the cause
    try:
        for shard in existing[1:]:
            check_alike(existing[0].path, existing[0].output, shard.path, shard.output)
    except MismatchError as error:
        return MISMATCHED, str(error).replace(f"{unit.path}{os.sep}", "")
    if not any(shard.output for shard in existing):
        return UNCHECKED, ""
    if total != nbytes:  # an index has no checksum
        return DAMAGED, f"its total_size is {shown(total)}; the shards hold {nbytes:,} bytes"
    return INTACT, ""
