"""Setting aside what is broken, and removing what interrupted writes have left: only where nobody writes.

Nothing is deleted but temporaries. What is broken keeps its name in the folder `quarantine`, so that a directory that
no reader took is one again, with what is left.
"""

from __future__ import annotations

import math
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli import files
from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError, NonFiniteError
from posthoc_cli.planning import USEFUL_RANGE, forecast_at, sigma_rels_in
from posthoc_cli.profiles import FloatArray
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.directory import QUARANTINE, move_aside, time_order
from posthoc_cli.snapshots.format import of_newest_segment
from posthoc_cli.snapshots.lock import LOCK_NAME, DirectoryLock
from posthoc_cli.snapshots.measurements import chosen_up_to, snapshot_prior
from posthoc_cli.snapshots.models import INDEX_NAME
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.reports import (
    DAMAGED,
    DUPLICATE,
    MISMATCHED,
    MISMEASURED,
    MISSING,
    NONFINITE,
    FileReport,
    Verification,
)

MOVED = frozenset({DAMAGED, MISSING, NONFINITE, MISMATCHED, DUPLICATE, MISMEASURED})
"""States of what is set aside."""

SIGMA_RELS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.28)
"""Where the errors before and after are compared."""

STILL_SECONDS = 60.0
"""A leftover in a snapshot directory, which is locked meanwhile, must not have been written to for so long: somebody
may be synthesizing into it, which takes no lock."""

STILL_SECONDS_UNLOCKED = 3600.0
"""The same in any other folder, which has no lock."""


@dataclass(frozen=True)
class Errors:
    """What to expect of the snapshots of the newest segment.

    Attributes:
        t: time of the last one, and of the averages.
        predicted: errors at SIGMA_RELS.
        worst: the worst over the whole range.
        solved: with how many snapshots a reconstruction works.
        count: how many there are.
    """

    t: float
    predicted: FloatArray
    worst: float
    solved: int
    count: int

    def to_dict(self) -> dict[str, Any]:
        """The errors as data for JSON, where infinity is null."""
        worst, *predicted = (float(e) if math.isfinite(e) else None for e in (self.worst, *self.predicted))
        return {
            "t": self.t,
            "errors": [
                {"sigma_rel": sigma_rel, "predicted_error": error}
                for sigma_rel, error in zip(SIGMA_RELS, predicted, strict=True)
            ],
            "worst_error": worst,
            "solved_with": self.solved,
            "of": self.count,
        }


@dataclass(frozen=True)
class Repair:
    """What would be set aside, and what that means.

    Attributes:
        directory: where it is.
        gone: files, and folders of shards.
        staying: what is wrong and stays, since nobody knows that it is bad, or which of two is.
        before, after: expected errors with and without; None where there is nothing to expect them of.
        unknown: how many snapshots go of which `before` knows nothing, since their headers cannot be believed.
        stamps: what the system says of each of `gone`, to notice files that were replaced.
        moved: new paths.
        done: whether it was carried out.
    """

    directory: Path
    gone: tuple[Path, ...]
    staying: tuple[FileReport, ...]
    before: Errors | None
    after: Errors | None
    unknown: int
    stamps: tuple[tuple[int, ...] | None, ...]
    moved: tuple[Path, ...] = ()
    done: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as data for JSON."""
        return {
            "gone": [str(path.relative_to(self.directory)) for path in self.gone],
            "moved": [str(path.relative_to(self.directory)) for path in self.moved],
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "done": self.done,
        }


@dataclass(frozen=True)
class Cleaning:
    """Leftovers that were removed, and those left, each with a reason."""

    removed: tuple[Path, ...] = ()
    left: tuple[tuple[Path, str], ...] = ()
    done: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The report as data for JSON."""
        return {
            "removed": [path.name for path in self.removed],
            "left": [{"file": path.name, "why": why} for path, why in self.left],
            "done": self.done,
        }


def is_snapshot_directory(found: Verification) -> bool:
    """Whether it is a directory that a tracker writes to, good or bad."""
    if not found.is_directory:
        return False
    if (found.path / LOCK_NAME).exists():
        return True
    # Beside an index, snapshots are as good as always shards, of one that stands in another directory.
    is_shards = (found.path / INDEX_NAME).exists()
    return not is_shards and any(r.kind == "snapshot" and r.unit.parent == found.path for r in found.files)


def plan_repair(found: Verification) -> Repair:
    """What `repair` would do, and the errors to expect then. Reads no tensor, but a sample without measurements.

    Raises:
        DirectoryError: it is no directory of snapshots.
    """
    if not is_snapshot_directory(found):
        raise DirectoryError(
            found.path,
            "is no directory of snapshots, in which alone files are set aside; an output can be made "
            "again, and a snapshot is set aside in the directory that it stands in",
        )
    moved = dict.fromkeys(report.unit for report in found.files if report.state in MOVED)
    gone = [path for unit in moved for path in _parts(unit, found)]
    staying = [report for report in found.files if not report.is_fine and report.unit not in moved]
    after = _errors(found.snapshots)
    before = _errors(sorted((*found.snapshots, *found.lost), key=time_order)) if found.lost else after
    known = {snapshot.path for snapshot in found.lost}
    unknown = {r.unit for r in found.files if r.state == DAMAGED and r.kind == "snapshot"} - known
    return Repair(
        found.path, tuple(gone), tuple(staying), before, after, len(unknown), tuple(_stamp(path) for path in gone)
    )


def repair(plan: Repair) -> Repair:
    """Set aside what was planned, durably, while the directory is locked; returns the plan with the new paths.

    Raises:
        LockedError: a tracker is writing to the directory.
        MismatchError: something of it has changed since; nothing was moved.
        DirectoryError: `quarantine` is a symbolic link, or no folder; nothing was moved.
        WriteError: the system refused. What was moved is in the folder `quarantine`, the rest where it was.
    """
    with _held(plan.directory):
        for path, known in zip(plan.gone, plan.stamps, strict=True):
            if _stamp(path) not in (known, None):
                raise MismatchError(path, "has changed since it was read; nothing was set aside", "run again")
        moved = move_aside(plan.gone, plan.directory / QUARANTINE) if plan.gone else []
    return replace(plan, moved=tuple(moved), done=True)


def clean(found: Verification, now: Callable[[], float] = time.time) -> Cleaning:
    """Remove the leftovers of interrupted writes; nothing that somebody may still be writing.

    In a snapshot directory only while no tracker holds it. A synthesis takes no lock, so that a leftover also must
    have been still for a while.

    Raises:
        LockedError: a tracker is writing to the directory.
        WriteError: the system refused.
    """
    if is_snapshot_directory(found):
        with _held(found.path):
            return _clean(found.leftovers, now() - STILL_SECONDS)
    return _clean(found.leftovers, now() - STILL_SECONDS_UNLOCKED)


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    lock = DirectoryLock(directory)
    try:
        yield
    finally:
        lock.release()


# --- what the loss does ----------------------------------------------------------------------------


def _errors(snapshots: Sequence[Snapshot]) -> Errors | None:
    """Expected errors from these alone; None where there are none, or a sample of them cannot be read."""
    newest = of_newest_segment(snapshots)
    if not newest:
        return None
    t = max(snapshot.info.t for snapshot in newest)
    solved, _ = chosen_up_to(newest, t)
    try:
        prior = snapshot_prior(solved)
    except (FileFormatError, NonFiniteError):
        return None
    profiles = [snapshot.info.profile.pure for snapshot in solved]
    expected = forecast_at(profiles, prior, np.concatenate((SIGMA_RELS, sigma_rels_in(USEFUL_RANGE)))).predicted_error
    return Errors(t, expected[: len(SIGMA_RELS)], float(expected.max()), len(solved), len(newest))


# --- what to move and to remove --------------------------------------------------------------------


def _parts(unit: Path, found: Verification) -> list[Path]:
    """What to move of a unit: itself, but the files of one whose shards are in the directory itself."""
    if unit != found.path:
        return [unit]
    return [report.path for report in found.files if report.unit == unit]


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Tells whether a name leads to what it led to; of a link itself, not of what it points to."""
    with suppress(FileNotFoundError):
        known = path.lstat()
        return known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns
    return None


def _clean(leftovers: Sequence[Path], before: float) -> Cleaning:
    removed, left = [], []
    for path in leftovers:
        with files.reported_as_write_error(path, "removed"), suppress(FileNotFoundError):
            known = path.lstat()
            if known.st_mtime > before:
                left.append((path, "was written to a moment ago; somebody may still be writing it"))
            elif _remove(path, known.st_mode):
                removed.append(path)
            else:
                left.append((path, "is a folder that holds more than shards"))
    for folder in sorted({path.parent for path in removed}):
        with files.reported_as_write_error(folder):
            files.system.fsync_directory(folder)
    return Cleaning(tuple(removed), tuple(left), done=True)


def _remove(path: Path, mode: int) -> bool:
    """Remove a temporary, a link itself and not what it points to; of a folder, shards and their index only."""
    if not stat.S_ISDIR(mode):
        files.system.unlink(path)
        return True
    for inside in files.system.list(path):
        if inside.name == INDEX_NAME or inside.suffix == fmt.SUFFIX or files.is_temporary(inside.name):
            with suppress(IsADirectoryError, PermissionError):  # the latter for a directory, on some systems
                files.unlink_if_there(inside)
    with suppress(OSError):
        files.system.remove_directory(path)
        return True
    return False
