"""Verify a path: check each file against its checksums, and compare snapshots with each other."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
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
    ShardIndex,
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

    Attributes:
        unit: the path of the whole: the file, or the folder of a model or snapshot in several files.
        what: the file in a few words.
        kind: "snapshot", "output" or None.
        detail: explains the `state`, or notes something unusual.
        header: what a valid header says: a snapshot, or a part of one, or an output.
        names: the tensors in the file.
    """

    path: Path
    unit: Path
    what: str = "unknown"
    kind: str | None = None
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
    listed, units = _listed(path)
    reports: list[FileReport] = []
    snapshots: list[Snapshot] = []
    incomplete: dict[Path, str] = {}
    with progress("verifying", sum(map(_size, units))) as advance:
        for unit in units:
            found = unit.verify(advance)
            if isinstance(found, str):
                incomplete[unit.path] = found
                continue
            reports += found.reports
            snapshots += found.snapshots
    snapshots.sort(key=time_order)
    problems = contradictions(snapshots)
    if snapshots and not problems:
        try:
            run_clock(snapshots)
        except MismatchError as error:
            problems = [error]
    notes = [f"{listed.name(report.path)}: {report.detail}" for report in reports if report.is_fine and report.detail]
    if listed.is_directory:
        notes += missing_at_newest(snapshots)
    notes += [f"{folder.name}/: has {parts}" for folder, parts in incomplete.items()]
    return replace(
        listed, files=tuple(reports), problems=tuple(map(str, problems)), notes=(*notes, *listed.notes),
        leftovers=tuple(sorted((*listed.leftovers, *incomplete))),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


# --- listing


def _listed(path: Path) -> tuple[Verification, list[_Unit]]:
    """List what to verify, reading indexes; raise DirectoryError if there is nothing."""
    if is_parts_folder(path):
        return Verification(path, True, leftovers=tuple(list_directory(path).leftovers)), [_Parts(path, is_alone=True)]
    if path.is_dir():
        return _listed_directory(path)
    if files.is_absent(path):
        raise DirectoryError(path, "no such file or directory", ACCEPTED)
    if path.suffix in PICKLES:
        raise InvalidValueError(path, "has no checksums, and no pickle is opened here", ACCEPTED)
    unit = _Shards(path) if path.name.endswith(INDEX_SUFFIX) else _Unit(path)
    return Verification(path, False), [unit]


def _listed_directory(directory: Path) -> tuple[Verification, list[_Unit]]:
    listing = list_directory(directory)
    models = [path for path in listing.entries if path.name != SUPERSEDED and _has_index(path)]
    units: list[_Unit] = [_Shards(folder / INDEX_NAME) for folder in (directory, *models) if _has_index(folder)]
    shards = {path for unit in units for path in unit.files}
    units += [_Unit(path) for path in listing.files if path not in shards]
    parts = [_Parts(path) for path in listing.folders]
    units = sorted([*units, *(unit for unit in parts if unit.files)], key=lambda unit: unit.place)
    notes: list[str] = []
    superseded = _readable(directory / SUPERSEDED, notes)
    old: list[_Unit] = [_Unit(path, superseded=True) for path in superseded.files]
    old += [_Parts(path, superseded=True) for path in superseded.parts_folders]
    empty = [unit.path for unit in parts if not unit.files and not unit.path.is_symlink() and unit.path.is_dir()]
    notes += [f"{path.name}/: has no parts" for path in empty]
    listings = (listing, *map(_readable, (*models, *listing.folders)), superseded)
    leftovers = sorted([*empty, *(path for entries in listings for path in entries.leftovers)])
    pickles = len(listing.pickles)
    if not (units or old or leftovers):
        reason = "holds no snapshots or outputs" + "; no pickle is opened here" * bool(pickles)
        raise DirectoryError(directory, reason, ACCEPTED)
    if pickles:
        notes.append(f"{pickles:,} pickled files (.pt and the like) have no checksums and were not read")
    result = Verification(directory, True, notes=tuple(notes), leftovers=tuple(leftovers), superseded=len(old))
    return result, [*units, *old]


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


def _size(unit: _Unit) -> int:
    """Return about how many bytes there are to read."""
    total = 0
    for path in unit.files:
        with suppress(OSError):
            total += path.stat().st_size
    return total


# --- a file


def _read(path: Path, unit: Path, progress: Callable[[int], object]) -> FileReport | None:
    """Read every byte of a file and return the report; None if the file was deleted meanwhile."""
    report, file, read = FileReport(path, unit), None, 0

    def advance(nbytes: int) -> None:
        nonlocal read
        read += nbytes
        progress(nbytes)

    try:
        file = read_file(path)
        report, averages = _described(report, file)
        advance(file.nbytes - sum(report.names.values()))
        damaged, nonfinite = file.examine(advance)
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_absent(path):
            return None  # a training has deleted it
        return _unreadable(replace(report, nbytes=read), error, file)
    report = replace(report, nbytes=read)
    if damaged:
        reason = next(iter(damaged.values())).reason
        return replace(report, state=DAMAGED, detail=f"{reason}{_and_more(len(damaged) - 1, 'tensor')}")
    if bad := [name for name in nonfinite if name in averages]:
        return replace(report, state=NONFINITE, detail=_nonfinite("average", bad, "average"))
    kind = "tensor" if report.kind is None else "copy"
    return replace(report, detail=_nonfinite(kind, [*nonfinite], "tensor") if nonfinite else "")


def _described(report: FileReport, file: TensorFile) -> tuple[FileReport, Collection[str]]:
    """Add a header's content to a report; return it, and the averages; raise FileFormatError if it is invalid."""
    names = {name: entry.nbytes for name, entry in file.entries.items()}
    report = replace(report, kind=file.kind, names=names)
    if file.kind is None:
        return replace(report, what="foreign", state=UNCHECKED), ()
    if file.kind == "output":
        output = decode_output(file)
        return replace(report, what=_output_words(output), header=output), names.keys() - set(output.copies)
    snapshot = decode_snapshot(file)
    part = "part {}/{} of ".format(*snapshot.part) if snapshot.part else ""
    what = f"{part}snapshot sigma_rel {snapshot.sigma_rel:g} at t = {snapshot.t:,.12g}"
    return replace(report, what=what, header=snapshot), names.keys() - set(snapshot.copies)


def _unreadable(report: FileReport, error: FileFormatError, file: TensorFile | None) -> FileReport:
    """Return the report of a file that cannot be read or decoded, with what its name and its header show."""
    state, detail = _fault(error)
    if is_snapshot_name(report.unit):
        report = replace(report, what="snapshot, by its name", kind="snapshot")
    if file is not None and file.kind not in (None, "snapshot", "output"):
        state, detail = UNSUPPORTED, f"its kind is {shown(file.kind)}, which this release does not know"
    elif file is not None and file.kind and (form := file.content.get("format")) != FORMAT:
        state, detail = UNSUPPORTED, f"its format is {shown(form)}; this release reads {FORMAT}"
    return replace(report, state=state, detail=detail)


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


@dataclass(frozen=True)
class _Found:
    """What was found in a unit: a report for each file, and the complete snapshots in which nothing is wrong."""

    reports: Sequence[FileReport]
    snapshots: Sequence[Snapshot] = ()


class _Unit:
    """A file, or several that belong together."""

    def __init__(self, path: Path, *, superseded: bool = False) -> None:
        self.path, self.place, self.superseded = path, path, superseded
        self.files: Mapping[Path, Collection[str]] = {path: ()}

    def verify(self, progress: Callable[[int], object]) -> _Found | str:
        """Read all files; return what was found, or, in words, what there is of an incomplete snapshot."""
        results = {path: _read(path, self.path, progress) for path in self.files}
        found = self.judged(results, [report for report in results.values() if report is not None])
        if self.superseded and isinstance(found, _Found):
            return _Found([replace(report, what=f"superseded {report.what}") for report in found.reports])
        return found

    def judged(self, _results: Mapping[Path, FileReport | None], existing: list[FileReport]) -> _Found | str:
        """Judge the reports of the files together; None stands for a file that does not exist."""
        headers = [report.header for report in existing if report.is_fine]
        return _Found(existing, [one for one in headers if isinstance(one, Snapshot) and one.part is None])


class _Parts(_Unit):
    """The folder of a snapshot in parts; what is wrong between them is in the report of one of them."""

    def __init__(self, path: Path, *, superseded: bool = False, is_alone: bool = False) -> None:
        super().__init__(path, superseded=superseded)
        self.files, self._is_alone = dict.fromkeys(list_folder(path).files, ()), is_alone

    def judged(self, results: Mapping[Path, FileReport | None], existing: list[FileReport]) -> _Found | str:
        """Judge the parts together: without one of them, a training is deleting the snapshot."""
        if len(existing) < len(results):
            return _Found([])
        stray = next((report for report in existing if report.is_fine and report.kind != "snapshot"), None)
        if stray is not None:
            return _Found(_mismatched(existing, stray, "is in a folder of parts but is not a part of a snapshot"))
        parts = [report.header for report in existing if isinstance(report.header, Snapshot)]
        if len(parts) < len(existing):
            return _Found(existing)
        broken = next((report for report in existing if not report.is_fine), None)
        try:
            content = joined(self.path, parts)
        except PostHocError as error:
            detail = str(error).replace(f"{self.path}{os.sep}", "").removeprefix(f"{self.path}: ")
            return _Found(existing if broken else _mismatched(existing, existing[0], detail))
        if isinstance(content, Snapshot):
            return _Found(existing, () if broken else [content])
        if not content or self.superseded:
            return _Found(existing)
        if not self._is_alone:
            return content
        missing = FileReport(self.path, self.path, "snapshot", "snapshot", MISSING, f"has {content}")
        return _Found([missing, *existing])


def _mismatched(reports: Sequence[FileReport], wrong: FileReport, detail: str) -> list[FileReport]:
    return [replace(r, state=MISMATCHED, detail=detail) if r is wrong else r for r in reports]


class _Shards(_Unit):
    """A model in shards, with the index that names them."""

    def __init__(self, index: Path) -> None:
        super().__init__(index.parent)
        self.place, self._fault = index, ("", "")
        content = ShardIndex({}, None)
        try:
            content = decode_index(index)
        except FileFormatError as error:  # each file is a unit of its own then
            self._fault = _fault(error)
        self.files, self._total = {index.parent / n: names for n, names in content.shards.items()}, content.total_size

    def judged(self, results: Mapping[Path, FileReport | None], existing: list[FileReport]) -> _Found | str:
        """Compare the index with its shards, and these with each other."""
        output = next((r.header for r in existing if isinstance(r.header, OutputInfo)), None)
        of_model = f" of {_output_words(output)}" if output else ""
        state, detail = self._judged_index(existing) if not self._fault[0] else self._fault
        kind = "output" if output else None
        reports = [FileReport(self.place, self.path, f"index{of_model}", kind, state, detail)]
        for path, report in results.items():
            if report is None:
                detail = f"{self.place.name} names it"
                reports.append(FileReport(path, self.path, f"shard{of_model}", None, MISSING, detail))
            else:
                is_output = isinstance(report.header, OutputInfo)
                reports.append(replace(report, what=f"shard{of_model}") if is_output else report)
        return _Found(reports)

    def _judged_index(self, existing: Sequence[FileReport]) -> tuple[str, str]:
        """Return the state of the index, compared with the existing shards, and the detail."""
        if not self.files:
            return DAMAGED, "names no shard"
        for shard in existing:
            if shard.is_fine and (differing := shard.names.keys() ^ set(self.files[shard.path])):
                where = f"is in {shard.path.name} or named by the index, but not both"
                return MISMATCHED, f"tensor {shown(min(differing))} {where}"
        if len(existing) < len(self.files) or not all(shard.is_fine for shard in existing):
            return INTACT, ""  # the shard's report shows the cause
        outputs = [shard.header if isinstance(shard.header, OutputInfo) else None for shard in existing]
        try:
            for shard, output in zip(existing[1:], outputs[1:], strict=True):
                check_alike(existing[0].path, outputs[0], shard.path, output)
        except MismatchError as error:
            return MISMATCHED, str(error).replace(f"{self.path}{os.sep}", "")
        if outputs[0] is None:
            return UNCHECKED, ""
        nbytes = sum(sum(shard.names.values()) for shard in existing)
        if self._total != nbytes:  # an index has no checksum
            return DAMAGED, f"its total_size is {shown(self._total)}; the shards hold {nbytes:,} bytes"
        return INTACT, ""
