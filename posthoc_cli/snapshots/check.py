"""Verify a path: list its files, read each against its checksums, compare the snapshots of a run with each other."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
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
from posthoc_cli.snapshots import directory as directories
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.directory import (
    BROKEN,
    PICKLES,
    SUPERSEDED,
    Listing,
    is_parts_folder,
    is_snapshot_name,
    list_directory,
    list_folder,
    read_folder,
    read_folders,
    time_order,
)
from posthoc_cli.snapshots.format import OutputInfo
from posthoc_cli.snapshots.headers import decode_snapshot, file_kind
from posthoc_cli.snapshots.outputs import INDEX_NAME, INDEX_SUFFIX, check_alike, decode_index, decode_output
from posthoc_cli.snapshots.reading import in_order, open_file, worker_threads
from posthoc_cli.snapshots.sources import Snapshot, run_clock
from posthoc_cli.snapshots.states import COPY, decode_state, tensors_with
from posthoc_cli.snapshots.tensor_file import read_header

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

_BROKEN_FILE = (errno.EIO, errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Errors of opening or reading that are the file's fault: a bad disk, a broken link, no regular file."""

Progress = Callable[[int], object]

_UNITS_AT_A_TIME = 3
"""While the header of one is decoded, the payload of another is read."""


# --- reports


@dataclass(frozen=True)
class FileReport:
    """What was found in a file; `is_fine` if nothing is wrong.

    `unit` is what is moved if it is broken: the file, or the folder of a model in several. `what` describes it in a few
    words, `kind` is "snapshot", "output", "state" or None. `detail` says why it is in its `state`; `notes` are unusual
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
    run_id: str | None = None
    notes: tuple[str, ...] = ()
    header: fmt.FileHeader | None = None
    snapshot: Snapshot | None = None
    output: OutputInfo | None = None
    averages: Collection[str] = ()

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.state in (INTACT, UNCHECKED)


# --- listing


@dataclass(frozen=True)
class Unit:
    """A file, or the files of a sharded model with the tensors that its index names; those need not exist.

    Or the parts of a snapshot. `path` is what is moved if it is broken.
    """

    path: Path
    files: Mapping[Path, Collection[str]]
    index: Path | None = None
    superseded: bool = False
    has_parts: bool = False


@dataclass(frozen=True)
class Inventory:
    """What there is to verify. `leftovers` are temporaries of interrupted writes, or of writes in progress.

    `moved` counts broken files that a repair has moved to `damaged/`; `notes` are unusual and not wrong.
    """

    path: Path
    is_directory: bool
    units: tuple[Unit, ...]
    leftovers: tuple[Path, ...] = ()
    moved: int = 0
    notes: tuple[str, ...] = ()

    @property
    def listed_bytes(self) -> int:
        """About how much there is to read."""
        total = 0
        for path in (path for unit in self.units for path in unit.files):
            with suppress(OSError):
                total += path.stat().st_size
        return total


@dataclass(frozen=True)
class Verification(Inventory):
    """What was found in a path.

    `problems` are files that contradict each other, both named. `snapshots` are those without fault, by time, then
    sigma_rel: none that was superseded, and none at all where some contradict each other. `lost` are the damaged ones
    of the same run whose headers are valid.
    """

    files: tuple[FileReport, ...] = ()
    problems: tuple[str, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    lost: tuple[Snapshot, ...] = ()
    seconds: float = 0.0

    def __repr__(self) -> str:
        wrong = len(self.broken) + len(self.problems)
        return f"Verification({self.path}: {len(self.files)} files, {self.nbytes:,} bytes, {wrong} problems)"

    @property
    def superseded(self) -> int:
        """How many were set aside as superseded."""
        return sum(unit.superseded for unit in self.units)

    @property
    def broken(self) -> tuple[Path, ...]:
        """Units with something wrong."""
        return tuple(dict.fromkeys(report.unit for report in self.files if not report.is_fine))

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.broken or self.problems)

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


def take_inventory(path: Path) -> Inventory:
    """List what there is to verify in a directory or a file: a DirectoryError if nothing. Reads indexes only."""
    if is_parts_folder(path):
        return Inventory(path, True, (_parts(path),), tuple(list_directory(path).leftovers))
    if path.is_dir():
        return _list_directory(path)
    if not os.path.lexists(path):
        raise DirectoryError(path, "no such file or directory", ACCEPTED)
    if path.suffix in PICKLES:
        raise InvalidValueError(path, "has no checksums, and no pickle is opened here", ACCEPTED)
    return Inventory(path, False, (_shards(path) if path.name.endswith(INDEX_SUFFIX) else Unit(path, {path: ()}),))


def _list_directory(directory: Path) -> Inventory:
    listing, notes = list_directory(directory), []
    sharded_in = [path for path in listing.entries if path.name not in (SUPERSEDED, BROKEN) and _has_index(path)]
    units = [_shards(folder / INDEX_NAME) for folder in (directory, *sharded_in) if _has_index(folder)]
    sharded = {path for unit in units for path in unit.files}
    units += [Unit(path, {path: ()}) for path in listing.files if path not in sharded]
    parted = read_folders(listing)
    # What is wrong with parts is reported when they are read.
    units += [_parts(folder) for folder in (*parted.snapshots, *parted.problems)]
    units.sort(key=lambda unit: unit.index or unit.path)
    notes += parted.notes
    inner = [_readable(folder) for folder in (*sharded_in, *parted.snapshots, *parted.problems)]
    aside = _readable(directory / SUPERSEDED, notes)
    units += [Unit(path, {path: ()}, superseded=True) for path in aside.files]
    units += [replace(_parts(path), superseded=True) for path in aside.folders]
    leftovers = sorted([*parted.incomplete, *(path for one in (listing, *inner, aside) for path in one.leftovers)])
    moved = len(_readable(directory / BROKEN).entries)
    count = len(listing.pickles)
    if not (units or leftovers or moved):
        what = "holds no snapshots, outputs or states" + "; no pickle is opened here" * bool(count)
        raise DirectoryError(directory, what, ACCEPTED)
    if count:
        notes.append(f"{count:,} pickled files (.pt and the like) have no checksums and were not read")
    if moved:
        notes.append(f"{moved:,} in {BROKEN}/, where a repair has moved them; not read")
    return Inventory(directory, True, tuple(units), tuple(leftovers), moved, tuple(notes))


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


def _parts(folder: Path) -> Unit:
    return Unit(folder, dict.fromkeys(list_folder(folder).files, ()), has_parts=True)


def _shards(index: Path) -> Unit:
    """The shards that an index names; none if it cannot be read, so that each file beside it is a unit of its own."""
    try:
        shards = decode_index(index).shards
    except FileFormatError:  # reported when the index is compared with the shards
        shards = {}
    return Unit(index.parent, {index.parent / name: names for name, names in shards.items()}, index)


# --- verifying


def verify(inventory: Inventory, progress: Progress = lambda _: None) -> Verification:
    """Read every byte, and compare: checksums, headers, values, the snapshots of the run with each other.

    Takes no lock: files that a training thins away meanwhile are left out, files that it adds are not read. `progress`
    gets the numbers of bytes that were read, from several threads.
    """
    started, stopped = time.perf_counter(), threading.Event()

    def advance(nbytes: int) -> None:
        if stopped.is_set():
            raise CancelledError
        progress(nbytes)

    with worker_threads(_UNITS_AT_A_TIME) as pool:
        try:
            read = in_order(pool, lambda unit: _read_unit(unit, advance), inventory.units)
            reports = [report for of_unit in read for report in of_unit]
        finally:  # after an interrupt the threads do not read on
            stopped.set()
    own = sorted((r.snapshot for r in reports if r.snapshot and r.is_fine), key=time_order)
    damaged = [r.snapshot for r in reports if r.snapshot and not r.is_fine]
    problems = directories.contradictions(own)
    if own and not problems:
        try:
            run_clock([snapshot.info for snapshot in own])
        except MismatchError as error:
            problems = [error]
    notes = (*_notes_of_files(reports, own, inventory), *(gaps(own) * inventory.is_directory), *inventory.notes)
    return Verification(
        **(vars(inventory) | {"notes": notes}), files=tuple(reports), problems=tuple(map(str, problems)),
        snapshots=() if problems else tuple(own), lost=() if problems or not own else tuple(_lost(damaged, own)),
        seconds=time.perf_counter() - started,
    )  # fmt: skip


def _lost(damaged: Sequence[Snapshot], own: Sequence[Snapshot]) -> list[Snapshot]:
    """Damaged snapshots that fit the others and have no intact copy."""
    there = {time_order(snapshot)[:2] for snapshot in own}
    pairs = [sorted((own[0], one), key=time_order) for one in damaged]
    fits = [directories.difference(first, other) is None for first, other in pairs]
    return [one for one, fitting in zip(damaged, fits, strict=True) if fitting and time_order(one)[:2] not in there]


def _notes_of_files(reports: Sequence[FileReport], own: Sequence[Snapshot], inventory: Inventory) -> list[str]:
    directory = inventory.path if inventory.is_directory else inventory.path.parent
    notes = [f"{report.path.relative_to(directory)}: {note}" for report in reports for note in report.notes]
    run_id = own[0].info.run_id if own else ""
    others = {
        r.unit: r.run_id
        for r in reports
        if own and r.is_fine and r.kind != "snapshot" and r.run_id not in (None, run_id)
    }
    return notes + [
        f"{unit.relative_to(directory)}: is of run {str(other)[:8]}; the snapshots are of {run_id[:8]}"
        for unit, other in others.items()
    ]


# --- reading a file


def _read_unit(unit: Unit, progress: Progress) -> list[FileReport]:
    """Reports of the files of a unit, its index first; none for files that were deleted after the listing."""
    read = {path: _read_file(path, unit.path, progress) for path in unit.files}
    there = [report for report in read.values() if report is not None]
    if unit.index is not None:
        return _shard_reports(unit, unit.index, read, there)
    if unit.superseded:
        return [replace(report, what=f"superseded {report.what}", snapshot=None) for report in there]
    if unit.has_parts:
        return _part_reports(unit, there) if len(there) == len(read) else []  # else it is being thinned away
    return there


def _read_file(path: Path, unit: Path, progress: Progress) -> FileReport | None:
    """Read every byte of a file; None if it was deleted meanwhile."""
    nbytes = 0
    damaged: dict[str, FileFormatError] = {}
    nonfinite: dict[str, None] = {}
    try:
        with open_file(path) as file, closing(file.check_payload()) as found:
            report = _described(FileReport(path, unit), file.header)
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
    report = replace(report, nbytes=nbytes)
    bad = [name for name in nonfinite if name in report.averages]
    if damaged:
        detail = f"{next(iter(damaged.values())).reason}{_and_more(len(damaged) - 1, 'tensor')}"
        return replace(report, state=DAMAGED, detail=detail)
    if bad:
        detail = f"average {shown(bad[0])} holds nan or infinity{_and_more(len(bad) - 1, 'average')}"
        return replace(report, state=NONFINITE, detail=detail)
    notes, info = [], report.snapshot and report.snapshot.info
    if nonfinite:
        what, more = "tensor" if report.kind is None else "copy", _and_more(len(nonfinite) - 1, "tensor")
        notes.append(f"{what} {shown(next(iter(nonfinite)))} holds nan or infinity{more}")
    if info and is_snapshot_name(path) and path != directories.snapshot_path(path.parent, info.t, info.sigma_rel):
        notes.append(f"its name differs: it holds sigma_rel {info.sigma_rel:g} at t = {info.t:,.12g}")
    return replace(report, state=UNCHECKED if report.kind is None else INTACT, notes=tuple(notes))


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
        return replace(report, what=what, run_id=output.run_id, output=output, averages=averages)
    if kind == "state":
        state = decode_state(path, header)
        averages = header.tensors.keys() - set(tensors_with(COPY, header).values())
        return replace(report, what=f"{part}state at t = {state.t:,.12g}", run_id=state.run_id, averages=averages)
    if kind == "checkpoint":
        return replace(report, what="checkpoint", run_id=header.metadata.get("ema.run_id"), averages=frozenset())
    info = decode_snapshot(path, header)
    what = f"{part}snapshot sigma_rel {info.sigma_rel:g} at t = {info.t:,.12g}"
    snapshot = None if part else Snapshot(path, header, info)
    averages = frozenset(name for name, tensor in info.tensors.items() if tensor.role != "copy")
    return replace(report, what=what, run_id=info.run_id, snapshot=snapshot, averages=averages)


def _fault(error: FileFormatError) -> tuple[str, str]:
    known = not isinstance(error.__cause__, OSError) or error.__cause__.errno in _BROKEN_FILE
    return DAMAGED if known else UNREADABLE, error.reason


def _unreadable(report: FileReport, error: FileFormatError) -> FileReport:
    """The report of a file that cannot be read, with what its header says if that is valid, or else its name."""
    state, detail = _fault(error)
    if is_snapshot_name(report.unit):
        report = replace(report, what="snapshot, by its name", kind="snapshot")
    with suppress(FileFormatError):
        header = read_header(report.path, check_size=False)
        kind, version = file_kind(header), header.metadata.get("ema.version")
        known = fmt.version_of(kind)
        if kind not in (None, "snapshot", "output", "state", "checkpoint"):
            state, detail = UNSUPPORTED, f"its ema.format is {shown(kind)}, which this release does not know"
        elif version not in (None, known):
            state, detail = UNSUPPORTED, f"its ema.version is {shown(version)}; this release reads {known}"
        report = replace(_described(report, header), run_id=None)
    return replace(report, state=state, detail=detail)


def _output_words(output: OutputInfo) -> str:
    return f"output {_shortened(output.profile)} at t = {output.t:,.12g}"


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _and_more(count: int, what: str) -> str:
    return f" (and {count:,} {what}{'s' * (count > 1)} more)" if count else ""


# --- the parts of a snapshot


def _part_reports(unit: Unit, there: Sequence[FileReport]) -> list[FileReport]:
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
    unit: Unit, index: Path, read: Mapping[Path, FileReport | None], there: Sequence[FileReport]
) -> list[FileReport]:
    model = next((report for report in there if report.output), FileReport(index, unit.path))
    of = f" of {_output_words(model.output)}" if model.output else ""
    state, detail = _index_fault(unit, index, there)
    reports = [FileReport(index, unit.path, f"index{of}", model.kind, state, detail, run_id=model.run_id)]
    for path, report in read.items():
        if report is None:
            report = FileReport(path, unit.path, f"shard{of}", None, MISSING, f"{index.name} names it")
        reports.append(replace(report, what=f"shard{of}" if report.output else report.what, snapshot=None))
    return reports


def _index_fault(unit: Unit, index: Path, there: Sequence[FileReport]) -> tuple[str, str]:
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


# --- snapshots that are not there: noted, since deleting is allowed


def gaps(snapshots: Sequence[Snapshot]) -> list[str]:
    """A line for each profile of a run that lacks snapshots of the schedule; `snapshots` are by time."""
    notes = directories.missing_at_newest(snapshots)
    for sigma_rel in sorted({snapshot.info.sigma_rel for snapshot in snapshots}):
        infos = [snapshot.info for snapshot in snapshots if snapshot.info.sigma_rel == sigma_rel]
        found = _missing_times(infos) or _too_few(infos)
        notes += [f"sigma_rel {sigma_rel:g}: {found}"] if found else []
    return notes


def _missing_times(infos: Sequence[fmt.SnapshotInfo]) -> str | None:
    """Times between the first and the newest snapshot at which one was due, where none is ever thinned away."""
    missing: list[range] = []
    for earlier, later in pairwise(infos):
        every = later.schedule.checkpoint_every
        unlimited = earlier.schedule.max_checkpoints is None and later.schedule.max_checkpoints is None
        if unlimited and every == earlier.schedule.checkpoint_every:  # else the time of the change is unknown
            missing.append(range((earlier.step // every + 1) * every, later.step, every))
    missing = [times for times in missing if times]
    if not missing:
        return None
    count, first, last = sum(map(len, missing)), missing[0][0], missing[-1][-1]
    where = f"at step {first:,}" if count == 1 else f"at {count:,} times from step {first:,} to {last:,}"
    return f"no snapshot {where}, where the schedule had one"


def _too_few(infos: Sequence[fmt.SnapshotInfo]) -> str | None:
    """Whether thinning would have kept more, with one schedule throughout."""
    schedule = infos[-1].schedule
    most, every = schedule.max_checkpoints, schedule.checkpoint_every
    if most is None or any((i.schedule.max_checkpoints, i.schedule.checkpoint_every) != (most, every) for i in infos):
        return None
    due = infos[-1].step // every - schedule.update_after_step // every
    found = sum(not info.off_schedule for info in infos)
    if found >= min(due, most):
        return None
    return f"{found:,} snapshot{'s' * (found != 1)}, where the schedule keeps {min(due, most):,}"
