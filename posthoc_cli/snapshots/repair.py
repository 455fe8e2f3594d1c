"""Move broken files of a snapshot directory into its folder `damaged`, under their names; only without a writer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError, NonFiniteError
from posthoc_cli.planning import forecast, forecast_at
from posthoc_cli.profiles import FloatArray
from posthoc_cli.snapshots import check
from posthoc_cli.snapshots.check import FileReport, Verification
from posthoc_cli.snapshots.directory import BROKEN, move_aside, remove_leftovers, time_order
from posthoc_cli.snapshots.lock import LOCK_NAME, DirectoryLock
from posthoc_cli.snapshots.measurements import source_prior
from posthoc_cli.snapshots.sources import Snapshot, chosen_up_to

MOVED = frozenset({check.DAMAGED, check.MISSING, check.NONFINITE, check.MISMATCHED})
"""States of files that are set aside."""

SIGMA_RELS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.28)
"""Where the errors before and after are compared."""


@dataclass(frozen=True)
class Errors:
    """Errors to expect from the snapshots, at the time `t` of the last one.

    `predicted` at SIGMA_RELS, `worst` the largest over the useful range; `solved` of `count` snapshots were used.
    """

    t: float
    predicted: FloatArray
    worst: float
    solved: int
    count: int

    def to_dict(self) -> dict[str, Any]:
        """The errors as data for JSON, where infinity is null."""
        worst, *predicted = (float(e) if math.isfinite(e) else None for e in (self.worst, *self.predicted))
        errors = zip(SIGMA_RELS, predicted, strict=True)
        return {
            "t": self.t,
            "errors": [{"sigma_rel": sigma_rel, "predicted_error": error} for sigma_rel, error in errors],
            "worst_error": worst,
            "solved_with": self.solved,
            "of": self.count,
        }


@dataclass(frozen=True)
class Repair:
    """A plan of what to set aside, and what was done of it.

    `staying` have a problem, but may be valid, and are not moved. `before` and `after` are the expected errors with and
    without `gone`, None if there are none; `unknown` counts snapshots in neither, since their headers are damaged.
    `stamps` are the identities of `gone`, to notice files that were replaced; `moved` their new paths.
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


def is_snapshot_directory(found: Verification) -> bool:
    """Whether a tracker writes, or has written, to the directory."""
    if not found.is_directory:
        return False
    own = any(report.kind == "snapshot" and report.unit.parent == found.path for report in found.files)
    return own or (found.path / LOCK_NAME).exists()


def plan_repair(found: Verification) -> Repair:
    """Plan what `repair` sets aside, without reading tensors; a DirectoryError if it is no directory of snapshots."""
    if not is_snapshot_directory(found):
        hint = "an output or an import can be made again; a snapshot is set aside in its own directory"
        reason = "holds no snapshots of a tracker, and only these are set aside"
        raise DirectoryError(found.path, reason, hint if any(report.kind for report in found.files) else "")
    units = dict.fromkeys(report.unit for report in found.files if report.state in MOVED)
    # A model whose shards are in the directory itself is moved file by file.
    gone = [r.path if r.unit == found.path else r.unit for r in found.files if r.unit in units]
    gone = [*dict.fromkeys(gone)]
    staying = [report for report in found.files if not report.is_fine and report.unit not in units]
    after = _errors(found.snapshots)
    before = _errors(sorted((*found.snapshots, *found.lost), key=time_order)) if found.lost else after
    if found.lost and before is not None and after is not None and before.t == after.t:
        # The expected distance cannot fall, but the norm that it is relative to is estimated from fewer averages.
        predicted = np.maximum(after.predicted, before.predicted)
        after = replace(after, predicted=predicted, worst=max(after.worst, before.worst))
    known = {snapshot.path for snapshot in found.lost}
    unknown = {r.unit for r in found.files if r.state == check.DAMAGED and r.kind == "snapshot"} - known
    stamps = tuple(map(_stamp, gone))
    return Repair(found.path, tuple(gone), tuple(staying), before, after, len(unknown), stamps)


def repair(plan: Repair) -> Repair:
    """Set aside what was planned, durably, while the directory is locked; returns the plan with the new paths.

    Raises:
        LockedError: a tracker is writing to the directory.
        MismatchError, DirectoryError: a file has changed since, or `damaged` is no folder; nothing was moved.
        WriteError: the system refused. What was moved is in the folder `damaged`, the rest where it was.
    """
    with DirectoryLock(plan.directory):
        remove_leftovers(plan.directory)
        for path, known in zip(plan.gone, plan.stamps, strict=True):
            if _stamp(path) not in (known, None):
                raise MismatchError(path, "has changed since it was read; nothing was set aside", "run again")
        moved = move_aside(plan.gone, plan.directory / BROKEN) if plan.gone else []
    return replace(plan, moved=tuple(moved), done=True)


def _errors(snapshots: Sequence[Snapshot]) -> Errors | None:
    """Expected errors from these alone; None if there are none, or if a sample of them cannot be read."""
    if not snapshots:
        return None
    t = max(snapshot.info.t for snapshot in snapshots)
    solved, _ = chosen_up_to(snapshots, t)
    try:
        prior = source_prior(solved)
    except (FileFormatError, NonFiniteError):
        return None
    profiles = [snapshot.info.profile.pure for snapshot in solved]
    expected = forecast_at(profiles, prior, np.array(SIGMA_RELS)).predicted_error
    worst = max(float(expected.max()), forecast(profiles, prior).worst)
    return Errors(t, expected, worst, len(solved), len(snapshots))


def _stamp(path: Path) -> tuple[int, ...] | None:
    """The identity of a file; of a link itself."""
    with suppress(FileNotFoundError):
        known = path.lstat()
        return known.st_dev, known.st_ino, known.st_size, known.st_mtime_ns
    return None
