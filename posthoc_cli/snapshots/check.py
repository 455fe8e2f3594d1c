"""What there is to verify in a path, before any of it is read."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, FileFormatError, InvalidValueError, MismatchError, VanishedError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.deep import contradictions
from posthoc_cli.snapshots.directory import (
    QUARANTINE,
    SUPERSEDED,
    candidates,
    closed_folders,
    closed_text,
    difference,
    missing_at_newest,
    snapshot_path,
    time_order,
)
from posthoc_cli.snapshots.format import SnapshotInfo, by_segment
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.lock import LOCK_NAME
from posthoc_cli.snapshots.measurements import run_clock
from posthoc_cli.snapshots.models import INDEX_NAME, decode_index, read_index
from posthoc_cli.snapshots.outputs import decode_output
from posthoc_cli.snapshots.payload import check_payload, in_order, worker_threads
from posthoc_cli.snapshots.reader import Snapshot, TensorFile, read_header_alone
from posthoc_cli.snapshots.reports import (
    CONFLICTING,
    DAMAGED,
    DUPLICATE,
    MISMATCHED,
    MISSING,
    NONFINITE,
    UNCHECKED,
    UNSUPPORTED,
    WHOLE,
    Examined,
    FileReport,
    Problem,
    Verification,
    problem_of,
)
from posthoc_cli.snapshots.sharded import is_sharded, read_sharded
from posthoc_cli.snapshots.states import COPY, StateInfo, decode_state, recent_prefix, tensors_with, total_prefix

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
"""What files are called that only a pickle's reader could check. None is opened."""

ACCEPTED = "name a snapshot directory, a folder of outputs, a .safetensors file, or the index of a sharded model"


@dataclass(frozen=True)
class Unit:
    """What is good or bad as one: a file, or the shards of an index.

    Attributes:
        path: the file, or the folder of the shards.
        files: the safetensors files; those that the index names need not be there.
        index: that of the shards.
        tensors: what the index says is in each file, by the file's name; None where it cannot be read.
        problem: what is wrong with the index.
        superseded: whether it was set aside, as not on the way of the training.
    """

    path: Path
    files: tuple[Path, ...]
    index: Path | None = None
    tensors: dict[str, list[str]] | None = None
    problem: FileFormatError | None = None
    superseded: bool = False


@dataclass(frozen=True)
class Contents:
    """What there is to verify.

    Attributes:
        path: as it was given.
        is_directory: whether it is one.
        units: in the order of their names.
        leftovers: temporaries of interrupted writes, or of writes that go on.
        superseded: how many snapshots were set aside by a training that went back.
        quarantined: how many things were set aside as broken.
        pickles: how many files cannot be checked.
        notes: what is not looked at, and why.
    """

    path: Path
    is_directory: bool
    units: tuple[Unit, ...]
    leftovers: tuple[Path, ...] = ()
    superseded: int = 0
    quarantined: int = 0
    pickles: int = 0
    notes: tuple[str, ...] = ()

    @property
    def holds_a_run(self) -> bool:
        """Whether the files in it are looked at as snapshots of one run: not as shards whose index is damaged."""
        shards = any(unit.path == self.path and unit.problem for unit in self.units)
        return self.is_directory and (not shards or (self.path / LOCK_NAME).exists())

    @property
    def nbytes(self) -> int:
        """About how much there is to read."""
        return sum(_size(file) for unit in self.units for file in unit.files)


def list_contents(path: Path) -> Contents:
    """What there is to verify in a directory, or that a file is. Reads indexes, and no other file.

    Raises:
        InvalidValueError: a file that has no checksums and could only be unpickled.
        DirectoryError: there is no such path, it cannot be read, or holds nothing of the kind.
    """
    if path.is_dir():
        return _of_directory(path)
    if not os.path.lexists(path):
        raise DirectoryError(path, f"no such file or directory; {ACCEPTED}")
    if path.suffix in PICKLES:
        raise InvalidValueError(path, f"has no checksums, and no pickle is opened here; {ACCEPTED}")
    if path.name.endswith(".safetensors.index.json"):
        return Contents(path, False, (_sharded(path),))
    return Contents(path, False, (Unit(path, (path,)),))


def _of_directory(directory: Path) -> Contents:
    aside, broken = directory / SUPERSEDED, directory / QUARANTINE
    units = _units(directory)
    superseded, notes = _superseded(aside)
    folders = {directory, *(unit.path for unit in units if unit.index is not None and not unit.path.is_symlink())}
    folders |= {aside} if superseded else set()
    found = Contents(
        path=directory,
        is_directory=True,
        units=(*units, *(replace(unit, superseded=True) for unit in superseded)),
        leftovers=tuple(path for folder in sorted(folders) for path in _leftovers(folder)),
        superseded=sum(unit.path.parent == aside for unit in superseded),
        quarantined=len(_listed(broken)) if broken.is_dir() else 0,
        pickles=sum(path.suffix in PICKLES for path in _listed(directory)),
        notes=(*notes, *map(closed_text, closed_folders(_listed(directory)))),
    )
    if not (found.units or found.leftovers or found.quarantined):
        hint = "; no pickle is opened here" if found.pickles else ""
        raise DirectoryError(directory, f"holds no snapshots, outputs or states{hint}; {ACCEPTED}")
    return found


def _superseded(aside: Path) -> tuple[list[Unit], list[str]]:
    """What was set aside, and a note where that cannot be looked at: a link would lead out of the directory."""
    if aside.is_symlink():
        return [], [f"{aside.name}/ is a symbolic link, which no training follows; not looked at"]
    try:
        return (_units(aside) if aside.is_dir() else []), []
    except DirectoryError:
        return [], [f"{aside.name}/ cannot be read; not looked at"]


def _units(directory: Path) -> list[Unit]:
    """What is in a directory: its own shards, the sharded models in it, and files."""
    try:
        paths = candidates(directory)
    except FileNotFoundError:
        raise DirectoryError(directory, f"no such directory; {ACCEPTED}") from None
    folders = [directory, *(path for path in paths if is_sharded(path))]
    units = []
    for folder in folders:
        own = paths if folder is directory else _listed(folder)
        units += _units_of_folder(folder, (path for path in own if path not in folders), directory)
    return sorted(units, key=lambda unit: unit.index or unit.path)


def _units_of_folder(folder: Path, paths: Iterable[Path], directory: Path) -> list[Unit]:
    """The shards in a folder of a directory, where it has an index, and files that are none of them."""
    found = sorted(path for path in paths if path.suffix == fmt.SUFFIX and not path.name.startswith("."))
    if not is_sharded(folder):
        return [Unit(path, (path,)) for path in found]
    try:
        shards = _sharded(folder / INDEX_NAME)
    except VanishedError:
        return []
    if folder.is_symlink() and folder != directory:
        return [shards]  # what else is in it is of another directory
    loose = [path for path in found if path not in shards.files]
    return [shards, *(Unit(path, (path,)) for path in loose)]


def _sharded(index: Path) -> Unit:
    """The shards of an index; none where it cannot be read, so that files beside it are judged by themselves.

    Raises:
        VanishedError: the index is gone.
    """
    try:
        tensors = read_index(index)
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_gone(index):
            raise
        return Unit(index.parent, (), index, problem=error)
    return Unit(index.parent, tuple(index.parent / name for name in tensors), index, tensors)


def _leftovers(folder: Path) -> list[Path]:
    try:
        return files.leftovers(folder)
    except OSError:
        return []  # a folder that can be entered and not be listed, or that has gone


def _listed(folder: Path) -> list[Path]:
    try:
        return files.system.list(folder)
    except OSError:
        return []


def _size(path: Path) -> int:
    with suppress(OSError):
        return path.stat().st_size
    return 0


# --- A file read whole: each byte against its checksum, its header against what it is about --------


Progress = Callable[[int], object]


@dataclass(frozen=True)
class Content:
    """What a file says that it is.

    Attributes:
        what: in words.
        kind: as `file_kind`.
        averages: names of the tensors that must be finite.
        run_id: of its run, where it says one.
        snapshot: where it is one.
        model: what it is a shard of, where it is one; the same words as `what`, but for a part of an output.
    """

    what: str
    kind: str | None
    averages: Collection[str] = ()
    run_id: str | None = None
    snapshot: Snapshot | None = None
    model: str = ""


@dataclass(frozen=True)
class ReadFile:
    """A file that was read: what is to be said of it, what it is, and its header, where that can be believed."""

    report: FileReport
    content: Content
    header: fmt.FileHeader | None


def read_file(path: Path, unit: Path, progress: Progress) -> ReadFile | None:
    """Read a file whole; None where it has gone since it was listed.

    Arguments:
        path: the file.
        unit: what is good or bad as one with it.
        progress: told the bytes that were read.
    """
    nbytes = 0
    try:
        with TensorFile(path) as file, closing(check_payload(file)) as found:
            content = _content(path, file.header)
            damaged: dict[str, FileFormatError] = {}
            nonfinite: dict[str, None] = {}
            for checked in found:
                if checked.error is not None:
                    damaged |= dict.fromkeys(checked.damaged, checked.error)
                nonfinite |= dict.fromkeys(checked.nonfinite)
                nbytes += checked.nbytes
                progress(checked.nbytes)
    except FileFormatError as error:
        if isinstance(error, VanishedError) and files.is_gone(path):
            return None  # a writer has thinned it away since the directory was listed
        left, content = _what_it_was(path)
        problem = _unsupported(left) or problem_of(error, path)
        return ReadFile(report_of(path, unit, content, problem, nbytes), content, left)
    report = report_of(path, unit, content, _problem(path, damaged, nonfinite, content), nbytes)
    return ReadFile(replace(report, notes=_notes(path, content, nonfinite)), content, file.header)


def _what_it_was(path: Path) -> tuple[fmt.FileHeader | None, Content]:
    """What is left to tell of a file that cannot be read whole: by its header, or else by its name."""
    header = None
    try:
        header = read_header_alone(path)
        return header, _content(path, header)
    except FileFormatError:
        return header, _by_its_name(path)


def _content(path: Path, header: fmt.FileHeader) -> Content:
    """What a file says that it is, checked against itself.

    Raises:
        FileFormatError: it contradicts itself.
    """
    kind = file_kind(header)
    if kind is None:
        return Content("foreign", None)
    if kind == "output":
        output = decode_output(path, header)
        part = f"part {shortened(header.metadata['ema.part'])} of " if "ema.part" in header.metadata else ""
        model = f"output {shortened(output.profile)} at t = {output.t:,.12g}"
        averages = header.tensors.keys() - set(output.copies)
        return Content(f"{part}{model}", kind, averages, output.run_id, model=model)
    if kind == "state":
        state = decode_state(path, header)
        _check_state_tensors(path, header, state)
        averages = header.tensors.keys() - set(tensors_with(COPY, header).values())
        return Content(f"state at t = {state.t:,.12g}", kind, averages, state.run_id)
    info = decode_snapshot(path, header)
    averages = {name for name, tensor in info.tensors.items() if tensor.role == "average"}
    what = f"snapshot sigma_rel {info.sigma_rel:g} at t = {info.t:,.12g}"
    return Content(what, kind, averages, info.run_id, Snapshot(path, header, info), what)


def _check_state_tensors(path: Path, header: fmt.FileHeader, state: StateInfo) -> None:
    """Check that each profile of a state has the same averages, and that there is nothing else but copies."""
    totals = [total_prefix(sigma_rel) for sigma_rel in state.sigma_rels]
    recent = [recent_prefix(sigma_rel) for sigma_rel in state.sigma_rels]
    named = {kind: tensors_with(kind, header) for kind in (*totals, *recent, COPY)}
    if sum(map(len, named.values())) != len(header.tensors):
        stranger = min(header.tensors.keys() - {full for one in named.values() for full in one.values()})
        raise FileFormatError(path, f"tensor {shown(stranger)} is of no profile that the state has")
    averages = {
        kind: {(name, header.tensors[full].dtype, header.tensors[full].shape) for name, full in named[kind].items()}
        for kind in (*totals, *recent)
    }
    for kinds in (totals, recent):
        for kind in kinds:
            if averages[kind] != averages[kinds[0]]:
                name = min(averages[kind] ^ averages[kinds[0]])[0]
                raise FileFormatError(path, f"tensor {shown(name)} is not the same in {kinds[0]} and {kind}")
    if {(name, shape) for name, _, shape in averages[totals[0]]} != {
        (name, shape) for name, _, shape in averages[recent[0]]
    }:
        raise FileFormatError(path, f"the tensors of {totals[0]} are not those of {recent[0]}")


def _unsupported(header: fmt.FileHeader | None) -> Problem | None:
    """Whether a file, whose header is as it was written, is of a kind or version from the future."""
    if header is None:
        return None
    kind = file_kind(header)
    known = fmt.version_of(kind)
    version = header.metadata.get("ema.version", known)
    if kind not in (None, "snapshot", "output", "state"):
        return Problem(UNSUPPORTED, f"its ema.format is {shown(str(kind))}, which this release does not know")
    if version != known:
        return Problem(UNSUPPORTED, f"its ema.version is {shown(version)}; this release reads {known}")
    return None


def _problem(
    path: Path, damaged: Mapping[str, FileFormatError], nonfinite: Iterable[str], content: Content
) -> Problem | None:
    if damaged:
        first = problem_of(next(iter(damaged.values())), path)
        return Problem(DAMAGED, f"{first.detail}{and_more(len(damaged) - 1, 'tensor')}")
    bad = [name for name in nonfinite if name in content.averages]
    if bad:
        return Problem(NONFINITE, f"average {shown(bad[0])} holds nan or infinity{and_more(len(bad) - 1, 'average')}")
    return Problem(UNCHECKED, "") if content.kind is None else None


def _notes(path: Path, content: Content, nonfinite: Iterable[str]) -> tuple[str, ...]:
    notes = []
    odd = [name for name in nonfinite if name not in content.averages]
    if odd:
        what = "tensor" if content.kind is None else "copy"
        notes.append(f"{what} {shown(odd[0])} holds nan or infinity{and_more(len(odd) - 1, 'tensor')}")
    if content.snapshot is not None and _is_snapshot_name(path):
        info = content.snapshot.info
        if path.name != snapshot_path(path.parent, info.t, info.sigma_rel).name:
            notes.append(f"its name says otherwise: it holds sigma_rel {info.sigma_rel:g} at t = {info.t:,.12g}")
    return tuple(notes)


def report_of(path: Path, unit: Path, content: Content, problem: Problem | None, nbytes: int = 0) -> FileReport:
    """What is to be said of a file with this content."""
    state, detail = (WHOLE, "") if problem is None else (problem.state, problem.detail)
    return FileReport(path, unit, content.what, content.kind, state, detail, nbytes, content.run_id)


def _by_its_name(path: Path) -> Content:
    return Content("snapshot, by its name", "snapshot") if _is_snapshot_name(path) else Content("unknown", None)


def _is_snapshot_name(path: Path) -> bool:
    """Whether a name is one of those that `snapshot_path` gives, for whatever time and sigma_rel."""
    t, dash, sigma_rel = path.name.removesuffix(fmt.SUFFIX).partition("-")
    try:
        return bool(dash) and snapshot_path(path.parent, float(t), float(sigma_rel)) == path
    except (ValueError, ArithmeticError):
        return False


def shortened(text: str) -> str:
    """A stranger's text, of a length that fits a line."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def and_more(count: int, what: str) -> str:
    """ " (and 2 tensors more)"; nothing for 0."""
    return f" (and {count:,} {what}{'s' * (count > 1)} more)" if count else ""


# --- Shards and their index: each shard as a file, and all of them against the index and each other ---


_OF_ONE_OUTPUT = ("ema.run_id", "ema.profile", "ema.t", "ema.t_unit", "ema.method", "ema.plan")
"""What the shards of one output agree about. Not coefficients, which other processors round otherwise."""


def read_shards(unit: Unit, index: Path, progress: Progress) -> Examined:
    """Read all shards of an index; nothing is said where all have gone since they were listed.

    Arguments:
        unit: the shards.
        index: theirs.
        progress: told the bytes that were read.
    """
    found = {path: read_file(path, unit.path, progress) for path in unit.files}
    if files.is_gone(index):
        return Examined(())
    there = [file for file in found.values() if file is not None]
    kinds = {file.content.kind for file in there if file.header is not None}
    what = next((file.content.model for file in there if file.content.model), "")
    of = f" of {what}" if what else ""
    reports = [_report_of_shard(path, file, unit, index, f"shard{of}") for path, file in found.items()]
    snapshot, problem = _together(unit, index, there)
    if problem is not None and problem.state == MISMATCHED and not all(report.is_fine for report in reports):
        problem = None  # the cause has a line of its own
    if problem is None and kinds <= {None}:
        problem = Problem(UNCHECKED, "")
    first = there[0].content if there else Content("", None)
    content = Content(f"index{of}", first.kind, run_id=first.run_id)
    return Examined((report_of(index, unit.path, content, problem), *reports), snapshot)


def _report_of_shard(path: Path, file: ReadFile | None, unit: Unit, index: Path, what: str) -> FileReport:
    if file is None:
        return FileReport(path, unit.path, what, None, MISSING, f"{index.name} names it")
    report = file.report if file.content.kind is None else replace(file.report, what=what)
    named = set((unit.tensors or {})[path.name])
    if file.header is None or not report.is_fine or named == file.header.tensors.keys():
        return report
    missing = named - file.header.tensors.keys()
    detail = (
        f"tensor {shown(min(missing))} is not in it, as {index.name} says"
        if missing
        else f"tensor {shown(min(file.header.tensors.keys() - named))} is in it, and not in {index.name}"
    )
    return replace(report, state=MISMATCHED, detail=detail)


def _together(unit: Unit, index: Path, there: Sequence[ReadFile]) -> tuple[Snapshot | None, Problem | None]:
    """The snapshot that the shards are, where they are one, and what is wrong with all of them together."""
    if unit.problem is not None:
        return None, problem_of(unit.problem, index)
    if not unit.tensors:
        return None, Problem(DAMAGED, "names no shard")
    kinds = {file.content.kind for file in there if file.header is not None}
    if len(there) < len(unit.files) or any(file.header is None for file in there):
        return None, None
    problem = _difference(there) or _wrong_size(index, there)
    snapshot = None
    if problem is None and kinds == {"snapshot"} and index.name == INDEX_NAME:
        try:
            snapshot = read_sharded(unit.path)
        except FileFormatError as error:
            problem = Problem(MISMATCHED, str(error).replace(f"{unit.path}{os.sep}", ""))
    return snapshot, problem


def _difference(there: Sequence[ReadFile]) -> Problem | None:
    """What tells two shards apart that should be of one model."""
    first = there[0]
    for other in there[1:]:
        names = f"{first.report.path.name} and {other.report.path.name}"
        if first.content.kind != other.content.kind:
            return Problem(MISMATCHED, f"{names} are not of one model: {first.content.what}, and {other.content.what}")
        if first.content.kind != "output" or first.header is None or other.header is None:
            continue
        for key in _OF_ONE_OUTPUT:
            values = [shortened(str(file.header.metadata.get(key))) for file in (first, other) if file.header]
            if values[0] != values[1]:
                return Problem(
                    MISMATCHED, f"{names} are not of one output: their {key} are {values[0]} and {values[1]}"
                )
    return None


def _wrong_size(index: Path, there: Sequence[ReadFile]) -> Problem | None:
    """An index has no checksum: what nothing else tells is compared with the shards. Other libraries' may be off."""
    held = sum(entry.nbytes for file in there if file.header for entry in file.header.tensors.values())
    try:
        said = decode_index(index).total_size
    except FileFormatError as error:
        return problem_of(error, index)
    if said == held or all(file.content.kind is None for file in there):
        return None
    told = "missing" if said is None else f"{said:,}" if abs(said) < 2**63 else shown(said)
    return Problem(DAMAGED, f"its total_size is {told}; the shards hold {held:,} bytes")


# --- Which snapshots of a directory belong together, and which are the strangers: the fewer ones ---


Problems = dict[Path, Problem]
"""What is wrong, by a snapshot's path."""


def strangers(snapshots: Sequence[Snapshot]) -> Problems:
    """Those that no reader would take together with most of the others.

    What is left when they are gone is what `store.read_directory` takes, but for `doubles`. Where as many speak for
    one side as for the other, the one with the newest snapshot is right.
    """
    found: Problems = {}
    left = sorted(snapshots, key=time_order)
    for key in (lambda s: s.info.run_id, lambda s: s.info.t_unit):
        left = _agreeing(left, key, found)
    left = [s for segment in by_segment(left) for s in _agreeing(segment, _tensors, found)]
    left = _with_nested_profiles(left, found)
    _drop_disordered_segments(left, found)
    return found


def doubles(snapshots: Sequence[Snapshot]) -> Problems:
    """Those of one profile and time: copies of one that stays, or several of which nobody knows which is right."""
    found: Problems = {}
    groups: dict[tuple[float, float], list[Snapshot]] = {}
    for snapshot in snapshots:
        groups.setdefault((snapshot.info.t, snapshot.info.sigma_rel), []).append(snapshot)
    for group in groups.values():
        first, *others = sorted(group, key=_strangeness_of_name)
        alike = len({s.header.metadata["ema.checksum"] for s in group}) == 1
        for other in others:
            if alike:
                found[other.path] = Problem(DUPLICATE, f"a copy of {first.path.name}")
            else:
                found[first.path] = Problem(CONFLICTING, _of_one_time(other))
                found[other.path] = Problem(CONFLICTING, _of_one_time(first))
    return found


def clock_problem(snapshots: Sequence[Snapshot]) -> str | None:
    """Why the clocks of snapshots are not those of one training; None if they are."""
    try:
        if snapshots:
            run_clock([snapshot.info for snapshot in snapshots])
    except MismatchError as error:
        return str(error)
    return None


# --- strangers -------------------------------------------------------------------------------------


def _agreeing(snapshots: Sequence[Snapshot], key: Callable[[Snapshot], Hashable], found: Problems) -> list[Snapshot]:
    """Those that agree with most; of the others `found` is told why not."""
    sides: dict[Hashable, list[Snapshot]] = {}
    for snapshot in snapshots:
        sides.setdefault(key(snapshot), []).append(snapshot)
    if len(sides) < 2:
        return list(snapshots)
    right = max(sides.values(), key=_weight)
    for side in sides.values():
        if side is not right:
            found |= {snapshot.path: _told((right[0], snapshot), snapshot) for snapshot in side}
    return right


def _weight(side: Sequence[Snapshot]) -> tuple[int, float]:
    return len(side), max(snapshot.info.t for snapshot in side)


def _tensors(snapshot: Snapshot) -> Hashable:
    """What all snapshots of a segment have in common."""
    tensors = snapshot.info.tensors
    entries = snapshot.header.tensors
    shapes = frozenset((name, tensor.role, tensor.dtype, entries[name].shape) for name, tensor in tensors.items())
    return shapes, frozenset(snapshot.info.aliases.items())


def _with_nested_profiles(snapshots: Sequence[Snapshot], found: Problems) -> list[Snapshot]:
    """Those whose tracked profiles are among each other's, as where a run went on without one; most of them."""
    sides: dict[tuple[float, ...], list[Snapshot]] = {}
    for snapshot in snapshots:
        sides.setdefault(snapshot.info.sigma_rels, []).append(snapshot)
    right: list[tuple[float, ...]] = []
    for profiles in sorted(sides, key=lambda side: _weight(sides[side]), reverse=True):
        other = next((one for one in right if not (set(one) <= set(profiles) or set(profiles) <= set(one))), None)
        if other is None:
            right.append(profiles)
        else:
            found |= {s.path: _told((sides[other][0], s), s) for s in sides[profiles]}
    return [snapshot for snapshot in snapshots if snapshot.info.sigma_rels in right]


def _drop_disordered_segments(snapshots: Sequence[Snapshot], found: Problems) -> None:
    """Of segments that do not follow each other in time the smaller ones are the strangers.

    One after the other is held against the last of those that do so far: what does not fit goes, it or that one.
    """
    kept: list[list[Snapshot]] = []
    for segment in by_segment(sorted(snapshots, key=time_order)):
        while kept and kept[-1][-1].info.t >= segment[0].info.t:
            pair = kept[-1][-1], segment[0]
            wrong = min(kept[-1], segment, key=_weight)
            found |= {snapshot.path: _told(pair, snapshot) for snapshot in wrong}
            if wrong is segment:
                break
            kept.pop()
        else:
            kept.append(segment)


def _told(pair: tuple[Snapshot, Snapshot], stranger: Snapshot) -> Problem:
    """Why two do not belong together, one of which is on the stranger's side, and mostly itself."""
    first, second = sorted(pair, key=time_order)
    names = ["it" if one is stranger else one.path.name for one in (first, second)]
    return Problem(MISMATCHED, f"{names[0]} and {names[1]} {difference(first, second) or 'do not match'}")


# --- doubles ---------------------------------------------------------------------------------------


def _strangeness_of_name(snapshot: Snapshot) -> tuple[bool, bool, str]:
    info = snapshot.info
    usual = snapshot_path(snapshot.path.parent, info.t, info.sigma_rel).name
    return snapshot.path.name != usual, snapshot.path.is_symlink(), snapshot.path.name


def _of_one_time(other: Snapshot) -> str:
    return f"{other.path.name} holds other values of the same profile and time; remove one of them"


# --- Snapshots that the schedule says were due, and that are not there: deleting some is allowed, so thes ---


def gaps(snapshots: Sequence[Snapshot]) -> list[str]:
    """A line for each thing that is missing.

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
        if unlimited and every == earlier.schedule.checkpoint_every:  # else nobody knows when it changed
            first, last = earlier.step // every + 1, (later.step - 1) // every
            if first <= last:
                missing.append((first * every, last * every, last - first + 1))
    if not missing:
        return None
    count, (first, _, _), (_, last, _) = sum(count for _, _, count in missing), missing[0], missing[-1]
    where = f"at step {first:,}" if count == 1 else f"at {count:,} times from step {first:,} to {last:,}"
    return f"no snapshot {where}, where the schedule had one"


def _too_few(infos: Sequence[SnapshotInfo], before: int) -> str | None:
    """Whether thinning would have kept more: after the step `before`, and with one schedule all along."""
    schedule = infos[-1].schedule
    most, every = schedule.max_checkpoints, schedule.checkpoint_every
    if most is None or any((i.schedule.max_checkpoints, i.schedule.checkpoint_every) != (most, every) for i in infos):
        return None
    due = infos[-1].step // every - max(before, schedule.update_after_step) // every
    found = sum(not info.off_schedule for info in infos)
    if found >= min(due, most):
        return None
    return f"{found:,} snapshot{'s' * (found != 1)} of the {min(due, most):,} that thinning would have left"


# --- All of a path verified: every file by itself, then what they say together ---------------------


UNITS_AT_A_TIME = 3
"""While the header of one is taken apart, the payload of another is read."""


def verify(contents: Contents, progress: Progress = lambda _: None) -> Verification:
    """Read everything whole, and compare: checksums, headers, values, the snapshots of the run with each other.

    Takes no lock: what a training thins away meanwhile is left out, what it writes is not looked at.

    Arguments:
        contents: see `list_contents`.
        progress: told the bytes that were read, by several threads.
    """
    started = time.perf_counter()
    with worker_threads(UNITS_AT_A_TIME) as pool, _Stoppable(progress) as told:
        examined = in_order(pool, lambda unit: _examine(unit, told), contents.units)
        found = [(unit, one) for unit, one in zip(contents.units, examined, strict=True) if one.reports]
    own = [(one.snapshot, one.is_fine) for unit, one in found if one.snapshot and _is_of_the_run(unit, contents)]
    whole = [snapshot for snapshot, is_fine in own if is_fine]
    wrong = strangers(whole)
    belonging = sorted((snapshot for snapshot in whole if snapshot.path not in wrong), key=time_order)
    twice = doubles(belonging)
    snapshots = [snapshot for snapshot in belonging if snapshot.path not in twice]
    harmed = [snapshot for snapshot, is_fine in own if not is_fine]
    clock = clock_problem(snapshots)
    reports = _with_problems([report for _, one in found for report in one.reports], wrong | twice)
    return Verification(
        path=contents.path,
        is_directory=contents.is_directory,
        files=tuple(reports),
        problems=() if clock is None else (clock,),
        notes=(*_directory_notes(reports, _once(belonging), contents),),
        snapshots=tuple(snapshots),
        lost=tuple(_of_the_run(harmed, snapshots)),
        leftovers=contents.leftovers,
        superseded=contents.superseded,
        quarantined=contents.quarantined,
        seconds=time.perf_counter() - started,
    )


def verify_measurements(found: Verification, progress: Progress = lambda _: None) -> Verification:
    """Compare the values of the snapshots that are whole with what their headers measured; see `deep`.

    Arguments:
        found: what `verify` found.
        progress: told the bytes that were read, `deep.deep_bytes` in all.

    Raises:
        FileFormatError: a file was replaced meanwhile, or became shorter.
    """
    started = time.perf_counter()
    wrong = contradictions(found.snapshots, progress)
    gone = tuple(snapshot for snapshot in found.snapshots if snapshot.path in wrong)
    return replace(
        found,
        files=tuple(_with_problems(found.files, wrong)),
        snapshots=tuple(snapshot for snapshot in found.snapshots if snapshot not in gone),
        lost=(*found.lost, *gone),
        seconds=found.seconds + time.perf_counter() - started,
    )


def _once(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """One of each profile and time: where several contradict each other, none is missing."""
    return list({(snapshot.info.t, snapshot.info.sigma_rel): snapshot for snapshot in snapshots}.values())


def _is_of_the_run(unit: Unit, contents: Contents) -> bool:
    """Whether readers of the directory see a unit: not what was superseded, nor a file in a folder of shards."""
    return unit.path == contents.path or (contents.holds_a_run and unit.path.parent == contents.path)


class _Stoppable:
    """Tells progress until the block is left: then whoever still reads a large file for it stops."""

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


def _examine(unit: Unit, progress: Progress) -> Examined:
    if unit.index is not None:
        examined = read_shards(unit, unit.index, progress)
    else:
        file = read_file(unit.path, unit.path, progress)
        examined = Examined(()) if file is None else Examined((file.report,), file.content.snapshot)
    if not unit.superseded:
        return examined
    return replace(examined, reports=tuple(replace(r, what=f"superseded {r.what}") for r in examined.reports))


def _with_problems(reports: Iterable[FileReport], problems: Problems) -> list[FileReport]:
    """The same, where a unit has a problem with it in the first file of the unit that has none of its own."""
    left: Problems = dict(problems)
    result = []
    for report in reports:
        problem = left.pop(report.unit, None) if report.is_fine else None
        result.append(report if problem is None else replace(report, state=problem.state, detail=problem.detail))
    return result


def _of_the_run(harmed: Sequence[Snapshot], snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """Those that would belong with the whole ones, and that are not there a second time."""
    if not snapshots:
        return []
    there = {(s.info.t, s.info.sigma_rel) for s in snapshots}
    return [
        snapshot
        for snapshot in harmed
        if (snapshot.info.t, snapshot.info.sigma_rel) not in there
        and difference(*sorted((snapshots[0], snapshot), key=time_order)) is None
    ]


def _directory_notes(reports: Sequence[FileReport], snapshots: Sequence[Snapshot], contents: Contents) -> list[str]:
    directory = contents.path if contents.is_directory else contents.path.parent
    notes = [f"{report.path.relative_to(directory)}: {note}" for report in reports for note in report.notes]
    run_id = snapshots[0].info.run_id if snapshots else None
    others = {r.unit: r for r in reports if r.is_fine and None not in (r.run_id, run_id) and r.run_id != run_id}
    notes += [
        f"{unit.relative_to(directory)}: is of run {str(report.run_id)[:8]}; the snapshots are of {str(run_id)[:8]}"
        for unit, report in others.items()
    ]
    if contents.is_directory:
        notes += gaps(snapshots)
    notes += contents.notes
    if contents.pickles:
        notes.append(f"{contents.pickles:,} pickled files (.pt and the like) have no checksums and were not looked at")
    if contents.quarantined:
        notes.append(f"{contents.quarantined:,} set aside in quarantine/ as broken; not looked at")
    return notes
