"""Which snapshots can go: those that a schedule thins away, and those of a directory that is pruned, with the errors.

Deleting is safe at any moment: only what was planned goes, only after every survivor was read and verified, and the
least needed first, so that an interruption leaves a valid directory, and the best one of its size.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli import files
from posthoc_cli.errors import InexactError, InvalidValueError, MismatchError, check_alone, check_count, percent
from posthoc_cli.planning import (
    USEFUL_RANGE,
    ErrorCurve,
    check_max_error,
    exchanged,
    forecast,
    removal_order,
    snapshots_to_drop,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import measured_prior, one_blas_thread, thinned_subset
from posthoc_cli.snapshots.directory import StoredSnapshot, read_directory, remove_leftovers, remove_snapshot
from posthoc_cli.snapshots.lock import DirectoryLock
from posthoc_cli.snapshots.measurements import source_prior
from posthoc_cli.snapshots.reading import verify_payload
from posthoc_cli.snapshots.sources import Snapshot

log = logging.getLogger(__name__)

_MARGIN = 2.0
"""A bound on the error is kept by this factor, since an error may be above the expected one (measured: what was left in
5 of 42 cases missed its bound without, by up to 1.45, and with 1.5 one of 54, by 1.22)."""


@dataclass(frozen=True)
class Pruning:
    """A plan of what to delete: `kept` by time, then sigma_rel, `gone` in the order to delete.

    `before` and `after` are expected errors from all snapshots and from the survivors, both with the prior from all
    headers; of very many snapshots only some are used, see `thinned_subset`. `source` as in `Prior`.
    """

    kept: tuple[Snapshot, ...]
    gone: tuple[Snapshot, ...]
    before: ErrorCurve
    after: ErrorCurve
    source: str
    deleted: bool = False

    def __repr__(self) -> str:
        count, left = len(self.kept) + len(self.gone), len(self.kept)
        errors = f"worst error {percent(self.after.worst)}, before {percent(self.before.worst)}"
        return f"Pruning({left} of {count} snapshots stay: {errors})"

    @property
    def read_bytes(self) -> int:
        """Bytes to read for verifying the survivors."""
        return sum(entry.nbytes for snapshot in self.kept for entry in snapshot.header.tensors.values())

    def to_dict(self) -> dict[str, Any]:
        """The report as data for JSON."""
        gone = [(s.path.name, s.info.t, s.info.sigma_rel, s.header.file_bytes) for s in self.gone]
        return {
            "run": self.kept[0].info.run_id,
            "kept": [snapshot.path.name for snapshot in self.kept],
            "gone": [dict(zip(("file", "t", "sigma_rel", "bytes"), one, strict=True)) for one in gone],
            "bytes": file_bytes(self.kept),
            "gone_bytes": file_bytes(self.gone),
            "before": {"worst_error": self.before.worst, "median_error": self.before.median},
            "after": {"worst_error": self.after.worst, "median_error": self.after.median},
            "prior": self.source,
            "deleted": self.deleted,
        }


def file_bytes(snapshots: Sequence[Snapshot]) -> int:
    """The size of all their files."""
    return sum(snapshot.header.file_bytes for snapshot in snapshots)


@one_blas_thread()
def plan_pruning(
    snapshots: Sequence[Snapshot],
    keep: int | None = None,
    max_bytes: int | None = None,
    max_error: float | None = None,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> Pruning:
    """Plan which snapshots to delete. Reads no tensor, but a sample if headers have no measurements.

    The newest one of each profile stays, and so do those of the newest time that all profiles have: training can
    continue from these. Of very many, those that a reconstruction would not use go first.

    Arguments:
        snapshots: all of one directory.
        keep: the number to keep of each profile; or
        max_bytes: keep as many as take at most this; or
        max_error: keep as few as have at most this worst error over `sigma_range`, with a margin for the prediction.
            Exactly one of the three.

    Raises:
        InvalidValueError: `keep` is more than there are, or `max_bytes` less than the newest ones take.
        InexactError: all snapshots together miss `max_error`.
    """
    check_alone(1, keep=keep, max_size=max_bytes, max_error=max_error)
    check_max_error(max_error)
    if keep is not None:
        _check_keep(keep, snapshots)
    profiles = [snapshot.info.profile.pure for snapshot in snapshots]
    needed = _needed(profiles)
    solved = sorted({*thinned_subset(profiles), *needed})
    prior = source_prior([snapshots[index] for index in solved])
    before = forecast([profiles[index] for index in solved], prior, sigma_range)

    def errors_without(gone: Sequence[int]) -> ErrorCurve:
        left = sorted(set(range(len(profiles))) - set(gone))
        chosen = [left[place] for place in thinned_subset([profiles[index] for index in left])]
        if set(chosen) <= set(solved):
            known = prior.of([solved.index(index) for index in chosen])
        else:
            known = replace(source_prior([snapshots[index] for index in chosen]), motion=prior.motion)
        after = forecast([profiles[index] for index in chosen], known, sigma_range)
        # The expected distance cannot fall, but the norm that it is relative to is estimated from fewer averages.
        return replace(after, predicted_error=np.maximum(after.predicted_error, before.predicted_error))

    if max_error is not None and before.worst > max_error:
        raise InexactError(
            "max_error",
            f"all {len(snapshots)} snapshots together have a predicted error of up to "
            f"{before.worst:.2g} for sigma_rel {sigma_range[0]:g} to {sigma_range[1]:g}; nothing can go",
            value=f"{max_error:g}",
        )
    staying = {*thinned_subset(profiles, keep=keep or 1), *needed}
    order = _spread_out([index for index in range(len(profiles)) if index not in staying])
    if staying == set(solved):
        among = [profiles[index] for index in solved]
        found = removal_order(among, prior, range(len(among)), keep or 1, _needed(among), sigma_range)
        order += [solved[index] for index in found]
    count = len(order)
    if max_bytes is not None:
        count = _enough_bytes(snapshots, order, max_bytes)
    if max_error is not None:
        # The errors grow with what goes.
        most = max_error / _MARGIN
        count = bisect_left(range(1, count + 1), True, key=lambda n: errors_without(order[:n]).worst > most)
    gone = order[:count]
    if len(solved) == len(profiles):
        left = sorted(set(range(len(profiles))) - set(gone))
        better = exchanged(profiles, prior, left, gone, needed, sigma_range)
        stay = [snapshot for index, snapshot in enumerate(snapshots) if index not in set(better)]
        fits = max_bytes is None or file_bytes(stay) <= max_bytes  # later ones have longer headers
        if fits and (max_error is None or errors_without(better).worst <= max_error / _MARGIN):
            gone = better
    leaving = set(gone)
    kept = [snapshot for index, snapshot in enumerate(snapshots) if index not in leaving]
    after = errors_without(gone) if gone else before
    return Pruning(tuple(kept), tuple(snapshots[index] for index in gone), before, after, prior.source)


def _check_keep(keep: int, snapshots: Sequence[Snapshot]) -> None:
    check_count("keep", keep)
    most = max(Counter(snapshot.info.sigma_rel for snapshot in snapshots).values())
    if keep > most:
        there = f"there are only {most} snapshots" if most > 1 else "there is only 1 snapshot"
        raise InvalidValueError("keep", f"{there} a profile; nothing was deleted", value=keep)


def prune(directory: Path, pruning: Pruning, progress: Callable[[int], object] = lambda _: None) -> Pruning:
    """Delete what was planned, while the directory is locked: verify all survivors, then delete the others.

    Raises:
        LockedError: a tracker is writing to the directory.
        DirectoryError, MismatchError, FileFormatError: it has changed, or a survivor is damaged; nothing is deleted.
        WriteError: the system refused a deletion. All survivors are there.
    """
    with DirectoryLock(directory):
        remove_leftovers(directory)
        planned = {snapshot.path: snapshot.header for snapshot in (*pruning.kept, *pruning.gone)}
        if {snapshot.path: snapshot.header for snapshot in read_directory(directory)} != planned:
            raise MismatchError(directory, "has changed since it was read; nothing was deleted", "run again")
        for snapshot in pruning.kept:
            for part in snapshot.parts or (snapshot,):
                verify_payload(part.path, part.header, progress)
        for snapshot in pruning.gone:
            remove_snapshot(snapshot.path)
        with files.reported_as_write_error(directory):
            files.system.fsync_directory(directory)
    return replace(pruning, deleted=True)


def _needed(profiles: Sequence[PowerFunction]) -> set[int]:
    """Indices of the newest of each profile, and of those of the newest time that has all."""
    times = {gamma: {p.t for p in profiles if p.gamma == gamma} for gamma in {p.gamma for p in profiles}}
    newest = {gamma: max(own) for gamma, own in times.items()}
    complete = max(set.intersection(*times.values()), default=None)
    return {index for index, p in enumerate(profiles) if p.t in (newest[p.gamma], complete)}


def _spread_out(indices: Sequence[int]) -> list[int]:
    """The same in an order whose every beginning is spread evenly over them: by the reversed bits of their places."""
    bits = len(indices).bit_length()
    return [indices[place] for place in sorted(range(len(indices)), key=lambda place: f"{place:0{bits}b}"[::-1])]


def _enough_bytes(snapshots: Sequence[Snapshot], order: Sequence[int], max_bytes: int) -> int:
    """How many of the first ones must go for the rest to fit."""
    freed = [0, *accumulate(snapshots[index].header.file_bytes for index in order)]
    size = file_bytes(snapshots)
    fitting = next((count for count, nbytes in enumerate(freed) if size - nbytes <= max_bytes), None)
    if fitting is None:
        reason = f"the newest snapshots of each profile, which stay, take {size - freed[-1]:,} bytes"
        raise InvalidValueError("max_size", reason, value=f"{max_bytes:,} bytes")
    return fitting


# --- thinning while a training writes


def on_schedule(stored: Sequence[StoredSnapshot]) -> list[StoredSnapshot]:
    """Those that every run of this schedule has, wherever it was stopped in between."""
    return [snapshot for snapshot in stored if not snapshot.info.off_schedule]


def thin(
    stored: Sequence[StoredSnapshot], max_checkpoints: int | None, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> list[StoredSnapshot]:
    """Keep `max_checkpoints` snapshots a profile, those that reconstruction needs most; delete the others.

    Those on the schedule are chosen as if there were no others, so that a training which was stopped in between keeps
    the same ones. Of those off the schedule the latest stay if there is room, and the newest of all snapshots always.
    Returns what is left, in order of time.
    """
    if max_checkpoints is None:
        return list(stored)
    gone = _surplus(stored, max_checkpoints, sigma_range)
    for snapshot in gone:
        log.debug("thinning: removing %s", snapshot.path)
        remove_snapshot(snapshot.path)
    return [snapshot for snapshot in stored if snapshot not in gone]


def _surplus(
    stored: Sequence[StoredSnapshot], max_checkpoints: int, sigma_range: tuple[float, float]
) -> list[StoredSnapshot]:
    """The snapshots to delete."""
    if max(Counter(snapshot.sigma_rel for snapshot in stored).values(), default=0) <= max_checkpoints:
        return []
    scheduled = on_schedule(stored)
    counts = Counter(snapshot.sigma_rel for snapshot in scheduled)
    gone: list[StoredSnapshot] = []
    if max(counts.values(), default=0) > max_checkpoints:
        averages = [snapshot.info.average() for snapshot in scheduled]
        profiles = [snapshot.info.profile.pure for snapshot in scheduled]
        dropped = snapshots_to_drop(profiles, measured_prior(averages), max_checkpoints, sigma_range)
        gone += [scheduled[index] for index in dropped]
    for sigma_rel in dict.fromkeys(snapshot.sigma_rel for snapshot in stored):
        others = [s for s in stored if s.info.off_schedule and s.sigma_rel == sigma_rel]
        room = max(max_checkpoints - counts[sigma_rel], 0)
        gone += [snapshot for snapshot in others[: max(len(others) - room, 0)] if snapshot.t < stored[-1].t]
    return gone
