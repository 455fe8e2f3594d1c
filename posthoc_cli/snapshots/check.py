"""Verify a path: list its files, read each against its checksums, compare the snapshots of a run with each other.

`verify` reads every byte; `verify_measurements` also compares values with what headers measured, see `deep`.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError, MismatchError, VanishedError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.deep import compare_measurements
from posthoc_cli.snapshots.directory import (
    PICKLES,
    QUARANTINE,
    SUPERSEDED,
    Listing,
    contradictions,
    difference,
    list_directory,
    missing_at_newest,
    snapshot_path,
    time_order,
)
from posthoc_cli.snapshots.format import SnapshotInfo, by_segment
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.measurements import run_clock
from posthoc_cli.snapshots.outputs import INDEX_NAME, INDEX_SUFFIX, OutputInfo, check_alike, decode_index, decode_output
from posthoc_cli.snapshots.reader import Snapshot, TensorFile, check_payload, in_order, read_header, worker_threads
from posthoc_cli.snapshots.states import COPY, check_state_tensors, decode_state, tensors_with

ACCEPTED = "name a snapshot directory, a folder of outputs, a .safetensors file, or the index of a sharded model"

INTACT = "intact"
UNCHECKED = "unchecked"
DAMAGED = "damaged"
MISSING = "missing"
NONFINITE = "nonfinite"
MISMATCHED = "mismatched"
MISMEASURED = "mismeasured"
UNREADABLE = "unreadable"
UNSUPPORTED = "unsupported"

STATES: Mapping[str, str] = {
    INTACT: "as it was written",
    UNCHECKED: "no checksums: only its structure was checked",
    DAMAGED: "not as it was written, or never a file of this format",
    MISSING: "named by an index, and not there",
    NONFINITE: "an average in it holds nan or infinity",
    MISMATCHED: "an index that does not match its shards, or shards of different models",
    MISMEASURED: "its values contradict what was measured when they were written",
    UNREADABLE: "the system refused to read it, so that nothing is known of it",
    UNSUPPORTED: "of a kind or version that this release does not know",
}
"""The states of a file."""

_BROKEN_FILE = (errno.EIO, errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENODEV)
"""Errors of opening or reading that are the file's fault: a bad disk, a broken link, no regular file."""

_UNITS_AT_A_TIME = 3
"""While the header of one is decoded, the payload of another is read."""

Progress = Callable[[int], object]


# --- reports


@dataclass(frozen=True)
class FileReport:
    """What was found in a file.

    Attributes:
        path: the file.
        unit: the path that is moved if it is broken: the file, or the folder of a sharded model.
        what: a description, in a few words.
        kind: "snapshot", "output" or "state"; None for other files, or if it is unknown.
        state: one of STATES.
        detail: why; may be empty.
        nbytes: bytes that were read.
        run_id: of its run; None if it has none.
        notes: what is unusual and not wrong.
    """

    path: Path
    unit: Path
    what: str
    kind: str | None
    state: str = INTACT
    detail: str = ""
    nbytes: int = 0
    run_id: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_fine(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.state in (INTACT, UNCHECKED)


@dataclass(frozen=True)
class Verification:
    """What was found in a path.

    Attributes:
        path: as it was given.
        is_directory: whether it is one.
        files: in the order of their names.
        problems: what is wrong and not the fault of one file: files that contradict each other, both named.
        notes: what is unusual and not wrong, a line each.
        snapshots: those without fault, by time, then sigma_rel; none that was superseded, and none at all where some
            contradict each other.
        lost: the damaged snapshots of the same run whose headers are valid.
        leftovers: temporaries of interrupted writes, or of writes in progress.
        superseded, quarantined: numbers of files set aside.
        seconds: how long it took.
    """

    path: Path
    is_directory: bool
    files: tuple[FileReport, ...]
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    snapshots: tuple[Snapshot, ...] = ()
    lost: tuple[Snapshot, ...] = ()
    leftovers: tuple[Path, ...] = ()
    superseded: int = 0
    quarantined: int = 0
    seconds: float = 0.0

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
            "quarantined": self.quarantined,
            "bytes": self.nbytes,
            "seconds": self.seconds,
        }


# --- listing


@dataclass(frozen=True)
class Unit:
    """A file, or the shards of a model with their index.

    Attributes:
        path: what is moved if it is broken: the file, or the folder of the shards.
        files: the safetensors files; those that an index names need not exist. With the tensors that the index
            names, if any.
        index: that of the shards.
        problem: why the index cannot be read.
        superseded: whether it was set aside by a training that went back.
    """

    path: Path
    files: Mapping[Path, Collection[str]]
    index: Path | None = None
    problem: FileFormatError | None = None
    superseded: bool = False


@dataclass(frozen=True)
class Contents:
    """What there is to verify; see `Verification`."""

    path: Path
    is_directory: bool
    units: tuple[Unit, ...]
    leftovers: tuple[Path, ...] = ()
    quarantined: int = 0
    notes: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """About how much there is to read."""
        total = 0
        for path in (path for unit in self.units for path in unit.files):
            with suppress(OSError):
                total += path.stat().st_size
        return total


def list_contents(path: Path) -> Contents:
    """List what there is to verify in a directory or a file. Reads indexes, and no other file.

    Raises:
        InvalidValueError: a file that has no checksums and could only be unpickled.
        DirectoryError: there is no such path, it cannot be read, or holds nothing to verify.
    """
    if path.is_dir():
        return _list_directory(path)
    if not os.path.lexists(path):
        raise DirectoryError(path, "no such file or directory", ACCEPTED)
    if path.suffix in PICKLES:
        raise InvalidValueError(path, "has no checksums, and no pickle is opened here", ACCEPTED)
    if path.name.endswith(INDEX_SUFFIX):
        return Contents(path, False, (_shards(path),))
    return Contents(path, False, (Unit(path, {path: ()}),))


def _list_directory(directory: Path) -> Contents:
    listing = list_directory(directory)
    folders = [path for path in listing.entries if path.name not in (SUPERSEDED, QUARANTINE) and _has_index(path)]
    units = [_shards(folder / INDEX_NAME) for folder in (directory, *folders) if _has_index(folder)]
    sharded = {path for unit in units for path in unit.files}
    units += [Unit(path, {path: ()}) for path in listing.files if path not in sharded]
    units.sort(key=lambda unit: unit.index or unit.path)
    aside, note = _list_superseded(directory / SUPERSEDED)
    units += [Unit(path, {path: ()}, superseded=True) for path in aside.files]
    listed = [listing, aside, *(_listed(folder) for folder in folders if not folder.is_symlink())]
    leftovers = sorted(path for one in listed for path in one.leftovers)
    quarantined = len(_listed(directory / QUARANTINE).entries)
    count = len(listing.pickles)
    if not (units or leftovers or quarantined):
        what = "holds no snapshots, outputs or states" + "; no pickle is opened here" * bool(count)
        raise DirectoryError(directory, what, ACCEPTED)
    notes = [note] if note else []
    if count:
        notes.append(f"{count:,} pickled files (.pt and the like) have no checksums and were not read")
    if quarantined:
        notes.append(f"{quarantined:,} set aside in {QUARANTINE}/ as broken; not read")
    return Contents(directory, True, tuple(units), tuple(leftovers), quarantined, tuple(notes))


def _has_index(folder: Path) -> bool:
    with suppress(OSError):  # no permission, or a name too long
        return (folder / INDEX_NAME).is_file()
    return False


def _list_superseded(folder: Path) -> tuple[Listing, str]:
    """The names in the folder, and a note if it was not read: a link would lead out of the directory."""
    if folder.is_symlink():
        return Listing(folder, ()), f"{folder.name}/ is a symbolic link; not read"
    try:
        return list_directory(folder), ""
    except DirectoryError as error:
        gone = isinstance(error.__cause__, FileNotFoundError | NotADirectoryError)
        return Listing(folder, ()), "" if gone else f"{folder.name}/ cannot be read"


def _listed(folder: Path) -> Listing:
    with suppress(DirectoryError):
        return list_directory(folder)
    return Listing(folder, ())


def _shards(index: Path) -> Unit:
    """The shards that an index names; none if it cannot be read, so that files beside it are units of their own."""
    try:
        shards = decode_index(index).shards
    except FileFormatError as error:
        return Unit(index.parent, {}, index, error)
    return Unit(index.parent, {index.parent / name: names for name, names in shards.items()}, index)


# --- verifying


def verify(contents: Contents, progress: Progress = lambda _: None) -> Verification:
    """Read every byte, and compare: checksums, headers, values, the snapshots of the run with each other.

    Takes no lock: files that a training thins away meanwhile are left out, files that it adds are not read.

    Arguments:
        contents: from `list_contents`.
        progress: called with numbers of bytes that were read, by several threads.
    """
    started = time.perf_counter()
    with worker_threads(_UNITS_AT_A_TIME) as pool, _Stoppable(progress) as stoppable:
        found = in_order(pool, lambda unit: _read_unit(unit, stoppable), contents.units)
        read = [*zip(contents.units, found, strict=True)]
    reports = [
        replace(one.report, what=f"superseded {one.report.what}") if unit.superseded else one.report
        for unit, files_read in read
        for one in files_read
    ]
    of_run = [
        (one.content.snapshot, one.report.is_fine)
        for unit, files_read in read
        for one in files_read
        if one.content.snapshot and not (unit.superseded or unit.index)
    ]
    own = sorted((snapshot for snapshot, is_fine in of_run if is_fine), key=time_order)
    harmed = [snapshot for snapshot, is_fine in of_run if not is_fine]
    problems = [str(error) for error in contradictions(own)] or _clock_problems(own)
    return Verification(
        path=contents.path,
        is_directory=contents.is_directory,
        files=tuple(reports),
        problems=tuple(problems),
        notes=(
            *_notes_of_files(reports, own, contents),
            *(gaps(own) if contents.is_directory else ()),
            *contents.notes,
        ),
        snapshots=() if problems else tuple(own),
        lost=() if problems else tuple(_lost(harmed, own)),
        leftovers=contents.leftovers,
        superseded=sum(unit.superseded for unit in contents.units),
        quarantined=contents.quarantined,
        seconds=time.perf_counter() - started,
    )


def verify_measurements(found: Verification, progress: Progress = lambda _: None) -> Verification:
    """Compare the values of the snapshots with what their headers measured; see `deep`.

    Arguments:
        found: from `verify`.
        progress: called with numbers of bytes that were read, `deep.deep_bytes` in all.

    Raises:
        FileFormatError: a file was replaced meanwhile, or became shorter.
    """
    started = time.perf_counter()
    wrong, problems = compare_measurements(found.snapshots, progress)
    return replace(
        found,
        files=tuple(
            replace(report, state=MISMEASURED, detail=wrong[report.path]) if report.path in wrong else report
            for report in found.files
        ),
        problems=(*found.problems, *problems),
        snapshots=tuple(snapshot for snapshot in found.snapshots if snapshot.path not in wrong),
        lost=(*found.lost, *(snapshot for snapshot in found.snapshots if snapshot.path in wrong)),
        seconds=found.seconds + time.perf_counter() - started,
    )


class _Stoppable:
    """Calls `progress` until the block is left; then its next call cancels the reading that makes it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._stopped = threading.Event()

    def __call__(self, nbytes: int) -> None:
        if self._stopped.is_set():
            raise CancelledError
        self._progress(nbytes)

    def __enter__(self) -> _Stoppable:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()


def _clock_problems(snapshots: Sequence[Snapshot]) -> list[str]:
    try:
        if snapshots:
            run_clock([snapshot.info for snapshot in snapshots])
    except MismatchError as error:
        return [str(error)]
    return []


def _lost(harmed: Sequence[Snapshot], snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The harmed ones that would belong with the others, and have no undamaged copy."""
    there = {(s.info.t, s.info.sigma_rel) for s in snapshots}
    return [
        snapshot
        for snapshot in harmed
        if snapshots
        and (snapshot.info.t, snapshot.info.sigma_rel) not in there
        and difference(*sorted((snapshots[0], snapshot), key=time_order)) is None
    ]


def _notes_of_files(reports: Sequence[FileReport], snapshots: Sequence[Snapshot], contents: Contents) -> list[str]:
    directory = contents.path if contents.is_directory else contents.path.parent
    notes = [f"{report.path.relative_to(directory)}: {note}" for report in reports for note in report.notes]
    run_id = snapshots[0].info.run_id if snapshots else None
    others = {
        r.unit: r.run_id for r in reports if r.is_fine and r.kind != "snapshot" and r.run_id not in (None, run_id)
    }
    return notes + [
        f"{unit.relative_to(directory)}: is of run {str(other)[:8]}; the snapshots are of {run_id[:8]}"
        for unit, other in others.items()
        if run_id is not None
    ]


# --- reading a file


@dataclass(frozen=True)
class _Content:
    """What a file's header says.

    Attributes:
        what: in words.
        kind: as `file_kind`.
        averages: names of the tensors that must be finite.
        run_id: of its run, if it has one.
        snapshot, output: if it is one.
    """

    what: str
    kind: str | None
    averages: Collection[str] = ()
    run_id: str | None = None
    snapshot: Snapshot | None = None
    output: OutputInfo | None = None


@dataclass(frozen=True)
class _ReadFile:
    """A file that was read: its report, its content, and its header if that is valid."""

    report: FileReport
    content: _Content
    header: fmt.FileHeader | None = None


def _read_unit(unit: Unit, progress: Progress) -> list[_ReadFile]:
    """The files of a unit, its index first; without files that have gone since they were listed, but for shards."""
    read = {path: _read_file(path, unit, progress) for path in unit.files}
    there = [one for one in read.values() if one is not None]
    if unit.index is None:
        return there
    model = next((one.content for one in there if one.content.output), _Content("", None))
    of = f" of {_output_words(model.output)}" if model.output else ""
    found = _index_problem(unit, unit.index, there)
    reports = [FileReport(unit.index, unit.path, f"index{of}", model.kind, *found, run_id=model.run_id)]
    for path, one in read.items():
        if one is None:
            reports.append(FileReport(path, unit.path, f"shard{of}", None, MISSING, f"{unit.index.name} names it"))
        else:
            reports.append(replace(one.report, what=f"shard{of}") if one.content.output else one.report)
    return [_ReadFile(report, model) for report in reports]


def _read_file(path: Path, unit: Unit, progress: Progress) -> _ReadFile | None:
    """Read every byte of a file; None if it has gone."""
    nbytes = 0
    damaged: dict[str, FileFormatError] = {}
    nonfinite: dict[str, None] = {}
    try:
        with TensorFile(path) as file, closing(check_payload(file)) as found:
            header, content = file.header, _content(path, file.header)
            for checked in found:
                if checked.error is not None:
                    damaged |= dict.fromkeys(checked.damaged, checked.error)
                nonfinite |= dict.fromkeys(checked.nonfinite)
                nbytes += checked.nbytes
                progress(checked.nbytes)
        state, detail = _fault(damaged, nonfinite, content)
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_gone(path):
            return None  # a writer has thinned it away
        known, content = _content_if_valid(path)
        state, detail = _unsupported(known) or _fault_of(error)
        return _ReadFile(FileReport(path, unit.path, content.what, content.kind, state, detail, nbytes), content, known)
    notes = _notes(path, content, nonfinite) if state in (INTACT, UNCHECKED) else ()
    report = FileReport(path, unit.path, content.what, content.kind, state, detail, nbytes, content.run_id, notes)
    return _ReadFile(report, content, header)


def _content(path: Path, header: fmt.FileHeader) -> _Content:
    """Decode a header.

    Raises:
        FileFormatError: it contradicts itself.
    """
    kind = file_kind(header)
    if kind is None:
        return _Content("foreign", None)
    if kind == "output":
        output = decode_output(path, header)
        part = f"part {_shortened(header.metadata['ema.part'])} of " if "ema.part" in header.metadata else ""
        what = f"{part}{_output_words(output)}"
        return _Content(what, kind, header.tensors.keys() - set(output.copies), output.run_id, output=output)
    if kind == "state":
        state = decode_state(path, header)
        check_state_tensors(path, header, state)
        averages = header.tensors.keys() - set(tensors_with(COPY, header).values())
        return _Content(f"state at t = {state.t:,.12g}", kind, averages, state.run_id)
    info = decode_snapshot(path, header)
    averages = {name for name, tensor in info.tensors.items() if tensor.role == "average"}
    what = f"snapshot sigma_rel {info.sigma_rel:g} at t = {info.t:,.12g}"
    return _Content(what, kind, averages, info.run_id, Snapshot(path, header, info))


def _output_words(output: OutputInfo) -> str:
    return f"output {_shortened(output.profile)} at t = {output.t:,.12g}"


def _content_if_valid(path: Path) -> tuple[fmt.FileHeader | None, _Content]:
    """What the header of a damaged file says, or else its name."""
    header = None
    with suppress(FileFormatError):
        header = read_header(path, whole=False)
        return header, _content(path, header)
    if _is_snapshot_name(path):
        return header, _Content("snapshot, by its name", "snapshot")
    return header, _Content("unknown", None)


def _fault(damaged: Mapping[str, FileFormatError], nonfinite: Iterable[str], content: _Content) -> tuple[str, str]:
    """State and detail of a file with a valid header."""
    if damaged:
        return DAMAGED, f"{next(iter(damaged.values())).reason}{_and_more(len(damaged) - 1, 'tensor')}"
    bad = [name for name in nonfinite if name in content.averages]
    if bad:
        return NONFINITE, f"average {shown(bad[0])} holds nan or infinity{_and_more(len(bad) - 1, 'average')}"
    return UNCHECKED if content.kind is None else INTACT, ""


def _fault_of(error: FileFormatError) -> tuple[str, str]:
    """State and detail of a file that cannot be read."""
    cause = error.__cause__
    known = not isinstance(cause, OSError) or cause.errno in _BROKEN_FILE
    return DAMAGED if known else UNREADABLE, error.reason


def _unsupported(header: fmt.FileHeader | None) -> tuple[str, str] | None:
    """State and detail of a file whose header is valid, and of a kind or version from the future."""
    if header is None:
        return None
    kind = file_kind(header)
    known = fmt.version_of(kind)
    version = header.metadata.get("ema.version", known)
    if kind not in (None, "snapshot", "output", "state"):
        return UNSUPPORTED, f"its ema.format is {shown(kind)}, which this release does not know"
    if version != known:
        return UNSUPPORTED, f"its ema.version is {shown(version)}; this release reads {known}"
    return None


def _notes(path: Path, content: _Content, nonfinite: Iterable[str]) -> tuple[str, ...]:
    notes = []
    odd = [name for name in nonfinite if name not in content.averages]
    if odd:
        what = "tensor" if content.kind is None else "copy"
        notes.append(f"{what} {shown(odd[0])} holds nan or infinity{_and_more(len(odd) - 1, 'tensor')}")
    if content.snapshot is not None and _is_snapshot_name(path):
        info = content.snapshot.info
        if path.name != snapshot_path(path.parent, info.t, info.sigma_rel).name:
            notes.append(f"its name differs: it holds sigma_rel {info.sigma_rel:g} at t = {info.t:,.12g}")
    return tuple(notes)


def _is_snapshot_name(path: Path) -> bool:
    """Whether a name has the form that `snapshot_path` gives."""
    t, dash, sigma_rel = path.name.removesuffix(fmt.SUFFIX).partition("-")
    try:
        return bool(dash) and snapshot_path(path.parent, float(t), float(sigma_rel)) == path
    except (ValueError, ArithmeticError):
        return False


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _and_more(count: int, what: str) -> str:
    return f" (and {count:,} {what}{'s' * (count > 1)} more)" if count else ""


# --- an index against its shards


def _index_problem(unit: Unit, index: Path, there: Sequence[_ReadFile]) -> tuple[str, str]:
    """State and detail of an index, compared with the shards that are there."""
    if unit.problem is not None:
        return _fault_of(unit.problem)
    if not unit.files:
        return DAMAGED, "names no shard"
    for one in there:
        own = set(one.header.tensors) if one.header else set()
        if one.header and one.report.is_fine and own != set(unit.files[one.report.path]):
            name = shown(min(own ^ set(unit.files[one.report.path])))
            return MISMATCHED, f"tensor {name} is in {one.report.path.name} or named by the index, but not both"
    if len(there) < len(unit.files) or not all(one.report.is_fine for one in there):
        return INTACT, ""  # the cause has a line of its own
    try:
        for one in there[1:]:
            check_alike(there[0].report.path, there[0].content.output, one.report.path, one.content.output)
    except MismatchError as error:
        return MISMATCHED, str(error).replace(f"{unit.path}{os.sep}", "")
    if not any(one.content.output for one in there):
        return UNCHECKED, ""
    held = sum(entry.nbytes for one in there if one.header for entry in one.header.tensors.values())
    total = decode_index(index).total_size
    if total != held:  # an index has no checksum
        return DAMAGED, f"its total_size is {shown(total)}; the shards hold {held:,} bytes"
    return INTACT, ""


# --- snapshots that are not there: noted, since deleting is allowed


def gaps(snapshots: Sequence[Snapshot]) -> list[str]:
    """A line for each profile and segment that lacks snapshots of the schedule.

    Arguments:
        snapshots: of one run, by time.
    """
    notes = missing_at_newest(snapshots)
    before = 0
    for segment in by_segment(snapshots):
        for sigma_rel in sorted({snapshot.info.sigma_rel for snapshot in segment}):
            infos = [snapshot.info for snapshot in segment if snapshot.info.sigma_rel == sigma_rel]
            found = _missing_times(infos) or _too_few(infos, before)
            notes += [f"sigma_rel {sigma_rel:g}: {found}"] if found else []
        before = max(snapshot.info.step for snapshot in segment)
    return notes


def _missing_times(infos: Sequence[SnapshotInfo]) -> str | None:
    """Times between the first and the newest snapshot at which one was due, where none is ever thinned away."""
    missing: list[tuple[int, int, int]] = []
    for earlier, later in pairwise(infos):
        every = later.schedule.checkpoint_every
        unlimited = earlier.schedule.max_checkpoints is None and later.schedule.max_checkpoints is None
        if unlimited and every == earlier.schedule.checkpoint_every:  # else the time of the change is unknown
            first, last = earlier.step // every + 1, (later.step - 1) // every
            if first <= last:
                missing.append((first * every, last * every, last - first + 1))
    if not missing:
        return None
    count, (first, _, _), (_, last, _) = sum(count for _, _, count in missing), missing[0], missing[-1]
    where = f"at step {first:,}" if count == 1 else f"at {count:,} times from step {first:,} to {last:,}"
    return f"no snapshot {where}, where the schedule had one"


def _too_few(infos: Sequence[SnapshotInfo], before: int) -> str | None:
    """Whether thinning would have kept more, after the step `before` and with one schedule throughout."""
    schedule = infos[-1].schedule
    most, every = schedule.max_checkpoints, schedule.checkpoint_every
    if most is None or any((i.schedule.max_checkpoints, i.schedule.checkpoint_every) != (most, every) for i in infos):
        return None
    due = infos[-1].step // every - max(before, schedule.update_after_step) // every
    found = sum(not info.off_schedule for info in infos)
    if found >= min(due, most):
        return None
    return f"{found:,} snapshot{'s' * (found != 1)} of the {min(due, most):,} that thinning would have left"
