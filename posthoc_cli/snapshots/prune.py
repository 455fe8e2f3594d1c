"""Pruning of a directory: a plan of what to delete, with the errors before and after, and the
deletion.

Deletions are safe at any moment: only what was planned is deleted, only after all survivors were
read and verified, and the least needed snapshots first, so that an interruption leaves the best
valid directory of its size.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli import files
from posthoc_cli.errors import (
    InexactError,
    MismatchError,
    check_alone,
    check_count,
    check_max_error,
    percent,
)
from posthoc_cli.planning import (
    USEFUL_RANGE,
    ErrorCurve,
    SameTime,
    check_sigma_range,
    error_curve,
    exchanged,
    removal_order,
    times_of,
    unused_times,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import one_blas_thread
from posthoc_cli.snapshots.directory import (
    DirectoryLock,
    read_directory,
    remove_leftovers,
    remove_snapshot,
)
from posthoc_cli.snapshots.snapshot import Snapshot, file_bytes
from posthoc_cli.snapshots.sources import source_prior

# The factor by which predicted errors stay below a user's bound, since true errors may exceed the
# expected ones (measured: without it, 5 of 42 prunings exceeded the bound, by up to 1.45; with 1.5,
# one of 54, by 1.22).
_MARGIN = 2.0
_POINTS = 41  # sigma_rels whose errors are compared


@dataclass(frozen=True)
class Pruning:
    """A plan of what to delete: `kept` by time, then sigma_rel, and `to_delete` in the order of
    deletion.

    `before` and `after` are the expected errors from all snapshots and from the survivors, with the
    prior from all headers; of very many snapshots only some are used, see `unused_times`.
    `source` is that of `Prior`.
    """

    kept: tuple[Snapshot, ...]
    to_delete: tuple[Snapshot, ...]
    before: ErrorCurve
    after: ErrorCurve
    source: str
    deleted: bool = False

    def __repr__(self) -> str:
        count = len(self.kept) + len(self.to_delete)
        left = len(self.kept)
        errors = f"worst error {percent(self.after.worst)}, before {percent(self.before.worst)}"
        return f"Pruning({left} of {count} snapshots stay: {errors})"

    def to_dict(self) -> dict[str, Any]:
        gone = []
        for snapshot in self.to_delete:
            facts = {
                "file": snapshot.path.name,
                "t": snapshot.t,
                "sigma_rel": snapshot.sigma_rel,
                "bytes": snapshot.nbytes,
            }
            gone.append(facts)
        return {
            "run": self.kept[0].run_id,
            "kept": [snapshot.path.name for snapshot in self.kept],
            "gone": gone,
            "bytes": file_bytes(self.kept),
            "gone_bytes": file_bytes(self.to_delete),
            "before": {"worst_error": self.before.worst, "median_error": self.before.median},
            "after": {"worst_error": self.after.worst, "median_error": self.after.median},
            "prior": self.source,
            "deleted": self.deleted,
        }


@one_blas_thread()
def plan_pruning(
    snapshots: Sequence[Snapshot],
    keep: int | None = None,
    max_error: float | None = None,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> Pruning:
    """Plan which snapshots of a directory to delete. Reads no tensors, except a sample if headers
    lack measurements.

    All snapshots of a time are deleted, or none. The newest time of each profile stays, and the
    newest one that all profiles have, from which training can continue. Of very many snapshots,
    those that a reconstruction would not use are deleted first.

    Exactly one of two is given: `keep` times stay; or as few as have at most the worst error
    `max_error` over `sigma_range`, with a margin for the prediction. An InexactError says that no
    choice can fulfil it.
    """
    check_alone(1, keep=keep, max_error=max_error)
    check_max_error(max_error)
    check_sigma_range(sigma_range)
    least = 1 if keep is None else check_count("keep", keep)
    choice = _Choice(snapshots, least, sigma_range)
    order = choice.least_needed()
    bound = math.inf
    if max_error is not None:
        choice.check(max_error)
        bound = max_error / _MARGIN
        counts = range(1, len(order) + 1)
        most = bisect_right(counts, bound, key=lambda count: choice.without(order[:count]).worst)
        order = order[:most]
    better = choice.exchanged(order)
    if choice.without(better).worst <= bound:
        order = better
    gone = [*choice.unused, *order]
    times = {time.t for time in gone}
    return Pruning(
        kept=tuple(snapshot for snapshot in snapshots if snapshot.t not in times),
        to_delete=tuple(snapshots[index] for time in gone for index in time.indices),
        before=choice.before,
        after=choice.without(order),
        source=choice.prior.source,
    )


class _Choice:
    """The times that may be deleted, and the expected errors without some of them."""

    def __init__(
        self,
        snapshots: Sequence[Snapshot],
        keep: int,
        sigma_range: tuple[float, float],
    ) -> None:
        self._profiles = [snapshot.profile for snapshot in snapshots]
        self._keep = keep
        self._sigma_range = sigma_range
        self.prior = source_prior(snapshots)
        times = times_of(self._profiles)
        self._needed = _needed(self._profiles, times)
        self.unused = unused_times(self._profiles, self._needed, keep)
        self._used = [time for time in times if time not in self.unused]
        self.before = self._curve(self._used)

    def least_needed(self) -> list[SameTime]:
        """Return the times to delete, the least needed first: the errors grow with their number."""
        return removal_order(
            self._profiles,
            self.prior,
            self._used,
            self._keep,
            self._needed,
            self._sigma_range,
        )

    def exchanged(self, gone: Sequence[SameTime]) -> list[SameTime]:
        kept = [time for time in self._used if time not in gone]
        return exchanged(self._profiles, self.prior, kept, gone, self._needed, self._sigma_range)

    def _curve(self, left: Sequence[SameTime]) -> ErrorCurve:
        indices = [index for time in left for index in time.indices]
        profiles = [self._profiles[index] for index in indices]
        prior = self.prior.of(indices)
        return error_curve("", profiles, prior, self._sigma_range, points=_POINTS)

    def without(self, gone: Collection[SameTime]) -> ErrorCurve:
        curve = self._curve([time for time in self._used if time not in gone])
        # The expected distance cannot decrease, but the norm that it is relative to is estimated
        # from fewer averages.
        larger = np.maximum(curve.predicted_error, self.before.predicted_error)
        return replace(curve, predicted_error=larger)

    def check(self, max_error: float) -> None:
        if self.before.worst > max_error:
            low, high = self._sigma_range
            reason = (
                f"all {len(self._profiles)} snapshots together have a predicted error of up to "
                f"{self.before.worst:.2g} for sigma_rel {low:g} to {high:g}; none can be deleted"
            )
            raise InexactError("max_error", reason, value=f"{max_error:g}")


def prune(
    directory: Path,
    pruning: Pruning,
    progress: Callable[[int], object] = lambda _: None,
) -> Pruning:
    """Carry out a plan as the one writer: verify all survivors, then delete the other snapshots.

    If the directory is locked or has changed, or a survivor is damaged, an error says so, and
    nothing is deleted.
    """
    with DirectoryLock(directory):
        remove_leftovers(directory)
        planned = _identities([*pruning.kept, *pruning.to_delete])
        if _identities(read_directory(directory)) != planned:
            raise MismatchError(
                directory,
                "has changed since it was read; nothing was deleted",
                "run again",
            )
        for snapshot in pruning.kept:
            for file in snapshot.files:
                file.verify(progress)
        for snapshot in pruning.to_delete:
            remove_snapshot(snapshot.path)
        with files.reported_as_write_error(directory):
            files.system.fsync_directory(directory)
    return replace(pruning, deleted=True)


def _identities(snapshots: Sequence[Snapshot]) -> dict[Path, str]:
    return {snapshot.path: snapshot.identity for snapshot in snapshots}


def _needed(
    profiles: Sequence[PowerFunction],
    times: Sequence[SameTime],
) -> list[SameTime]:
    """Return the newest time of each profile, and the newest one that all profiles have."""
    newest = {profile.gamma: profile.t for profile in profiles}  # in order of time
    needed = {*newest.values()}
    complete = [time.t for time in times if len(time.indices) == len(newest)]
    needed.update(complete[-1:])
    return [time for time in times if time.t in needed]
