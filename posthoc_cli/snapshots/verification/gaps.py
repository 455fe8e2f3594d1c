"""Snapshots that the schedule says were due, and that are not there: deleting some is allowed, so these are notes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from posthoc_cli.snapshots.format import SnapshotInfo
from posthoc_cli.snapshots.matching import missing_at_newest
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.segments import by_segment


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
