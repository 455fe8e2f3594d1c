"""Verify a path: check each file against its checksums, and compare snapshots with each other."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
    ShardIndex,
    check_alike,
    decode_index,
    decode_output,
)
from posthoc_cli.snapshots.snapshot import Snapshot, decode_snapshot
from posthoc_cli.snapshots.sources import run_clock
from posthoc_cli.snapshots.tensorfile import FORMAT, TensorFile, file_size, read_file

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

    Attributes:
        unit: the path of the whole: the file, or the folder of a model or snapshot in several files.
        what: the file in a few words.
        detail: explains the `state`, or notes something unusual.
        header: what a valid header says: a snapshot, or a part of one, or an output.
        names: the tensors in the file.
    """

    path: Path
    unit: Path
    what: str = "unknown"
    state: str = INTACT
    detail: str = ""
    nbytes: int = 0
    header: Snapshot | OutputInfo | None = None
    names: Mapping[str, int] = field(default_factory=dict)

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


def verify(path: Path, progress: ProgressBar = no_bar) -> Verification:
    """Read every byte of a directory or a file; check checksums, headers, values, and snapshots against each other.

    No lock is taken: files that a training deletes meanwhile are left out, files that it adds are not read. Raises
    DirectoryError if there is nothing to verify.
    """
    started = time.perf_counter()
    found, units = _listed(path)
    reports: list[FileReport] = []
    snapshots: list[Snapshot] = []
    incomplete: dict[Path, str] = {}
    with progress("verifying", sum(file_size(file) for unit in units for file in unit.files)) as advance:
        for unit in units:
            results = {file: _read(file, unit.path, advance) for file in unit.files}
            existing = [report for report in results.values() if report is not None]
            if unit.index is not None:
                existing = _judged_shards(unit.index, results, existing)
            elif unit.is_folder:
                existing, whole = _judged_parts(unit, existing, len(results))
                if isinstance(whole, str):
                    incomplete[unit.path] = whole
                elif whole and not unit.superseded:
                    snapshots.append(whole)
            elif not unit.superseded:
                headers = [report.header for report in existing if report.is_fine]
                snapshots += [one for one in headers if isinstance(one, Snapshot) and one.part is None]
            reports += [replace(r, what=f"superseded {r.what}") for r in existing] if unit.superseded else existing
    snapshots.sort(key=time_order)
    problems = [str(problem) for problem in contradictions(snapshots)]
    if snapshots and not problems:
        try:
            run_clock(snapshots)
        except MismatchError as error:
            problems = [str(error)]
    notes = [f"{found.name(report.path)}: {report.detail}" for report in reports if report.is_fine and report.detail]
    notes += missing_at_newest(snapshots) if found.is_directory else []
    notes += [f"{folder.name}/: has {parts}" for folder, parts in incomplete.items()]
    return replace(
        found, files=tuple(reports), problems=tuple(problems), notes=(*notes, *found.notes),
        leftovers=tuple(sorted((*found.leftovers, *incomplete))), seconds=time.perf_counter() - started,
    )  # fmt: skip


# --- listing


@dataclass(frozen=True)
class _Unit:
    """A file, or several that belong together: the shards of a model, with its index, or the parts in a folder."""

    path: Path
    files: Sequence[Path]
    index: Path | None = None
    is_folder: bool = False
    is_alone: bool = False
    superseded: bool = False


def _of_index(index: Path) -> _Unit:
    with suppress(FileFormatError):  # reported with the index
        return _Unit(index.parent, [index.parent / name for name in decode_index(index).shards], index)
    return _Unit(index.parent, [], index)


def _of_parts(folder: Path, superseded: bool = False) -> _Unit:
    return _Unit(folder, list_folder(folder).files, is_folder=True, superseded=superseded)


def _listed(path: Path) -> tuple[Verification, list[_Unit]]:
    """List what to verify, reading indexes; raise DirectoryError if there is nothing."""
    if is_parts_folder(path):
        return Verification(path, True, leftovers=tuple(list_directory(path).leftovers)), [
            replace(_of_parts(path), is_alone=True)
        ]
    if path.is_dir():
        return _listed_directory(path)
    if files.is_absent(path):
        raise DirectoryError(path, "no such file or directory", ACCEPTED)
    if path.suffix in PICKLES:
        raise InvalidValueError(path, "has no checksums, and no pickle is opened here", ACCEPTED)
    unit = _of_index(path) if path.name.endswith(INDEX_SUFFIX) else _Unit(path, [path])
    return Verification(path, False), [unit]


def _listed_directory(directory: Path) -> tuple[Verification, list[_Unit]]:
    listing = list_directory(directory)
    models = [path for path in listing.entries if path.name != SUPERSEDED and _has_index(path)]
    units = [_of_index(folder / INDEX_NAME) for folder in (directory, *models) if _has_index(folder)]
    shards = {path for unit in units for path in unit.files}
    units += [_Unit(path, [path]) for path in listing.files if path not in shards]
    parts = [_of_parts(path) for path in listing.folders if not path.is_symlink() and path.is_dir()]
    units = sorted([*units, *(unit for unit in parts if unit.files)], key=lambda unit: unit.index or unit.path)
    superseded, notes = _readable(directory / SUPERSEDED)
    old = [_Unit(path, [path], superseded=True) for path in superseded.files]
    old += [_of_parts(path, superseded=True) for path in superseded.parts_folders]
    empty = [unit.path for unit in parts if not unit.files]
    notes += [f"{path.name}/: has no parts" for path in empty]
    inner = [superseded, *(_readable(folder)[0] for folder in (*models, *listing.folders))]
    leftovers = sorted([*empty, *(path for each in (listing, *inner) for path in each.leftovers)])
    pickles = len(listing.pickles)
    if not (units or old or leftovers):
        reason = "holds no snapshots or outputs" + "; no pickle is opened here" * bool(pickles)
        raise DirectoryError(directory, reason, ACCEPTED)
    if pickles:
        notes.append(f"{pickles:,} pickled files (.pt and the like) have no checksums and were not read")
    result = Verification(directory, True, notes=tuple(notes), leftovers=tuple(leftovers), superseded=len(old))
    return result, [*units, *old]


def _readable(folder: Path) -> tuple[Directory, list[str]]:
    """List a folder like `list_folder`; if it cannot be read, return nothing, and a note."""
    if folder.is_symlink():
        return Directory(folder), [f"{folder.name}/ is a symbolic link; not read"]
    try:
        return list_folder(folder), []
    except DirectoryError:
        return Directory(folder), [f"{folder.name}/ cannot be read"]


def _has_index(folder: Path) -> bool:
    with suppress(OSError):  # no permission, or a name too long
        return (folder / INDEX_NAME).is_file()
    return False


# --- a file


def _read(path: Path, unit: Path, progress: Callable[[int], object]) -> FileReport | None:
    """Read every byte of a file and return the report; None if the file was deleted meanwhile."""
    report, read = FileReport(path, unit, "snapshot, by its name" if is_snapshot_name(unit) else "unknown"), [0]

    def advance(nbytes: int) -> None:
        read.append(nbytes)
        progress(nbytes)

    try:
        file = read_file(path)
        report = _described(report, file)
        if report.state not in (INTACT, UNCHECKED):
            return report
        advance(file.nbytes - sum(report.names.values()))
        damaged, nonfinite = file.examine(advance)
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_absent(path):
            return None  # a training has deleted it
        state, detail = _fault(error)
        return replace(report, nbytes=sum(read), state=state, detail=detail)
    report = replace(report, nbytes=sum(read))
    if damaged:
        reason = next(iter(damaged.values())).reason
        return replace(report, state=DAMAGED, detail=f"{reason}{_and_more(len(damaged) - 1, 'tensor')}")
    copies = set(report.header.copies) if report.header else report.names.keys()
    if bad := [name for name in nonfinite if name not in copies]:
        return replace(report, state=NONFINITE, detail=_nonfinite("average", bad, "average"))
    kind = "copy" if report.header else "tensor"
    return replace(report, detail=_nonfinite(kind, nonfinite, "tensor") if nonfinite else "")


def _described(report: FileReport, file: TensorFile) -> FileReport:
    """Add a header's content to a report; raise FileFormatError if it is invalid."""
    names = {name: entry.nbytes for name, entry in file.entries.items()}
    if file.kind is None:
        return replace(report, what="foreign", state=UNCHECKED, names=names)
    if file.kind not in ("snapshot", "output"):
        detail = f"its kind is {shown(file.kind)}, which this release does not know"
        return replace(report, state=UNSUPPORTED, detail=detail, names=names)
    if (form := file.content.get("format")) != FORMAT:
        detail = f"its format is {shown(form)}; this release reads {FORMAT}"
        return replace(report, state=UNSUPPORTED, detail=detail, names=names)
    if file.kind == "output":
        output = decode_output(file)
        return replace(report, what=_output_words(output), header=output, names=names)
    snapshot = decode_snapshot(file)
    part = "part {}/{} of ".format(*snapshot.part) if snapshot.part else ""
    what = f"{part}snapshot sigma_rel {snapshot.sigma_rel:g} at t = {snapshot.t:,.12g}"
    return replace(report, what=what, header=snapshot, names=names)


def _fault(error: FileFormatError) -> tuple[str, str]:
    is_broken = not isinstance(error.__cause__, OSError) or error.__cause__.errno in _BROKEN_FILE
    return DAMAGED if is_broken else UNREADABLE, error.reason


def _output_words(output: OutputInfo) -> str:
    profile = output.profile if len(output.profile) <= 60 else f"{output.profile[:57]}..."
    return f"output {profile} at t = {output.t:,.12g}"


def _nonfinite(kind: str, names: Sequence[str], others: str) -> str:
    return f"{kind} {shown(names[0])} holds nan or infinity{_and_more(len(names) - 1, others)}"


def _and_more(count: int, what: str) -> str:
    return f" (and {count:,} {what}{'s' * (count > 1)} more)" if count else ""


# --- what belongs together


def _judged_parts(
    unit: _Unit, existing: list[FileReport], count: int
) -> tuple[list[FileReport], Snapshot | str | None]:
    """Judge the parts in a folder together; return the reports, and the snapshot or what there is of it.

    What is wrong between the parts is in the report of one of them.
    """
    if len(existing) < count:
        return [], None  # a training is deleting the snapshot
    parts = [report.header for report in existing if isinstance(report.header, Snapshot)]
    is_fine = all(report.is_fine for report in existing)
    stray = next((report for report in existing if report.is_fine and not isinstance(report.header, Snapshot)), None)
    try:
        if stray is not None:
            raise MismatchError(stray.path, "is in a folder of parts but is not a part of a snapshot")
        content = joined(unit.path, parts) if len(parts) == count else None
    except PostHocError as error:
        wrong = stray or existing[0]
        detail = (
            error.reason if stray else str(error).replace(f"{unit.path}{os.sep}", "").removeprefix(f"{unit.path}: ")
        )
        judged = [replace(r, state=MISMATCHED, detail=detail) if r is wrong else r for r in existing]
        return judged if is_fine or stray else existing, None
    if not isinstance(content, str):
        return existing, content if is_fine else None
    if unit.superseded:
        return existing, None
    if unit.is_alone:
        return [FileReport(unit.path, unit.path, "snapshot", MISSING, f"has {content}"), *existing], None
    return [], content


def _judged_shards(
    index: Path, results: Mapping[Path, FileReport | None], existing: Sequence[FileReport]
) -> list[FileReport]:
    """Judge the shards of a model together with their index, which has a report of its own."""
    output = next((report.header for report in existing if isinstance(report.header, OutputInfo)), None)
    of_model = f" of {_output_words(output)}" if output else ""
    try:
        state, detail = _judged_index(decode_index(index), existing)
    except FileFormatError as error:
        state, detail = _fault(error)
    except MismatchError as error:
        state, detail = MISMATCHED, str(error).replace(f"{index.parent}{os.sep}", "")
    reports = [FileReport(index, index.parent, f"index{of_model}", state, detail)]
    for path, report in results.items():
        if report is None:
            reports.append(FileReport(path, index.parent, f"shard{of_model}", MISSING, f"{index.name} names it"))
        else:
            is_output = isinstance(report.header, OutputInfo)
            reports.append(replace(report, what=f"shard{of_model}") if is_output else report)
    return reports


def _judged_index(index: ShardIndex, existing: Sequence[FileReport]) -> tuple[str, str]:
    """Return the state of an index, compared with the existing shards, and the detail; raise MismatchError."""
    if not index.shards:
        return DAMAGED, "names no shard"
    for shard in existing:
        if shard.is_fine and (differing := shard.names.keys() ^ set(index.shards[shard.path.name])):
            where = f"is in {shard.path.name} or named by the index, but not both"
            return MISMATCHED, f"tensor {shown(min(differing))} {where}"
    if len(existing) < len(index.shards) or not all(shard.is_fine for shard in existing):
        return INTACT, ""  # the shard's report shows the cause
    outputs = [shard.header if isinstance(shard.header, OutputInfo) else None for shard in existing]
    for shard, output in zip(existing, outputs, strict=True):
        check_alike(existing[0].path, outputs[0], shard.path, output)
    if outputs[0] is None:
        return UNCHECKED, ""
    nbytes = sum(sum(shard.names.values()) for shard in existing)
    if index.total_size != nbytes:  # an index has no checksum
        return DAMAGED, f"its total_size is {shown(index.total_size)}; the shards hold {nbytes:,} bytes"
    return INTACT, ""
