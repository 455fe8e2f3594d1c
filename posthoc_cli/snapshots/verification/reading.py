"""A file read whole: each byte against its checksum, its header against what it is about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, VanishedError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.decoding import decode_snapshot
from posthoc_cli.snapshots.metadata import file_kind
from posthoc_cli.snapshots.outputs import decode_output
from posthoc_cli.snapshots.reader import Snapshot, TensorFile, read_header_alone
from posthoc_cli.snapshots.states import COPY, StateInfo, decode_state, recent_prefix, tensors_with, total_prefix
from posthoc_cli.snapshots.store import snapshot_path
from posthoc_cli.snapshots.verification.reports import (
    DAMAGED,
    NONFINITE,
    UNCHECKED,
    UNSUPPORTED,
    WHOLE,
    FileReport,
    Problem,
    problem_of,
)
from posthoc_cli.snapshots.verifying import check_payload

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
