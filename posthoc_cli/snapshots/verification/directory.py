"""All of a path verified: every file by itself, then what they say together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace

from posthoc_cli.snapshots.matching import difference, time_order
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.verification.belonging import Problems, clock_problem, doubles, strangers
from posthoc_cli.snapshots.verification.contents import Contents, Unit
from posthoc_cli.snapshots.verification.deep import contradictions
from posthoc_cli.snapshots.verification.gaps import gaps
from posthoc_cli.snapshots.verification.reading import read_file
from posthoc_cli.snapshots.verification.reports import Examined, FileReport, Verification
from posthoc_cli.snapshots.verification.shards import read_shards
from posthoc_cli.snapshots.verifying import in_order, worker_threads

Progress = Callable[[int], object]

UNITS_AT_A_TIME = 3
"""While the header of one is taken apart, the payload of another is read."""


def verify(contents: Contents, progress: Progress = lambda _: None) -> Verification:
    """Read everything whole, and compare: checksums, headers, values, the snapshots of the run with each other.

    Takes no lock: what a training thins away meanwhile is left out, what it writes is not looked at.

    Arguments:
        contents: see `list_contents`.
        progress: told the bytes that were read, by several threads.
    """
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
        notes=(*_notes(reports, _once(belonging), contents),),
        snapshots=tuple(snapshots),
        lost=tuple(_of_the_run(harmed, snapshots)),
        leftovers=contents.leftovers,
        superseded=contents.superseded,
        quarantined=contents.quarantined,
    )


def verify_measurements(found: Verification, progress: Progress = lambda _: None) -> Verification:
    """Compare the values of the snapshots that are whole with what their headers measured; see `deep`.

    Arguments:
        found: what `verify` found.
        progress: told the bytes that were read, `deep.deep_bytes` in all.

    Raises:
        FileFormatError: a file was replaced meanwhile, or became shorter.
    """
    wrong = contradictions(found.snapshots, progress)
    gone = tuple(snapshot for snapshot in found.snapshots if snapshot.path in wrong)
    return replace(
        found,
        files=tuple(_with_problems(found.files, wrong)),
        snapshots=tuple(snapshot for snapshot in found.snapshots if snapshot not in gone),
        lost=(*found.lost, *gone),
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


def _notes(reports: Sequence[FileReport], snapshots: Sequence[Snapshot], contents: Contents) -> list[str]:
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
