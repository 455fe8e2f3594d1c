"""Pruning of a directory: a plan of what to delete, with the errors before and after, and the
deletion.

Deletions are safe at any moment: only what was planned is deleted, only after all survivors were
read and verified, and the least needed snapshots first, so that an interruption leaves the best
valid directory of its size.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
    alone,
    check_sigma_range,
    error_curve,
    exchanged,
    removal_order,
)
from posthoc_cli.profiles import FloatArray, PowerFunction
from posthoc_cli.reconstruction import one_blas_thread, thinned_subset
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
    prior from all headers; of very many snapshots only some are used, see `thinned_subset`.
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
        return {
            "run": self.kept[0].run_id,
            "kept": [snapshot.path.name for snapshot in self.kept],
            "gone": [
                {"file": s.path.name, "t": s.t, "sigma_rel": s.sigma_rel, "bytes": s.nbytes}
                for s in self.to_delete
            ],
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

    The newest snapshot of each profile stays, and those of the newest time that all profiles have,
    from which training can continue. Of very many snapshots, those that a reconstruction would not
    use are deleted first.

    Exactly one of two is given: `keep` snapshots of each profile stay; or as few as have at most
    the worst error `max_error` over `sigma_range`, with a margin for the prediction. An
    InexactError says that no choice can fulfil it.
    """
    check_alone(1, keep=keep, max_error=max_error)
    check_max_error(max_error)
    check_sigma_range(sigma_range)
    if keep is not None:
        check_count("keep", keep)
    profiles = [snapshot.profile for snapshot in snapshots]
    prior = source_prior(snapshots)
    needed = _needed(profiles)
    used = sorted({*thinned_subset(profiles, keep=keep or 1), *needed})

    def errors(gone: Sequence[int], least: FloatArray | float = 0.0) -> ErrorCurve:
        left = [index for index in used if index not in gone]
        curve = error_curve(
            "", [profiles[index] for index in left], prior.of(left), sigma_range, points=_POINTS
        )
        # The expected distance cannot decrease, but the norm that it is relative to is estimated
        # from fewer averages.
        return replace(curve, predicted_error=np.maximum(curve.predicted_error, least))

    before = errors([])
    after = partial(errors, least=before.predicted_error)
    bound = math.inf if max_error is None else max_error / _MARGIN
    if max_error is not None and before.worst > max_error:
        reason = (
            f"all {len(snapshots)} snapshots together have a predicted error of up to "
            f"{before.worst:.2g}"
        )
        reason += f" for sigma_rel {sigma_range[0]:g} to {sigma_range[1]:g}; nothing can go"
        raise InexactError("max_error", reason, value=f"{max_error:g}")

    # The least needed first. The errors grow with the number of deletions.
    among = alone(profiles, used)
    stay = alone(profiles, needed)
    order = removal_order(profiles, prior, among, keep or 1, stay, sigma_range)
    gone = [index for one in order for index in one.indices]
    if max_error is not None:
        gone = gone[
            : bisect_left(
                range(1, len(gone) + 1), True, key=lambda n: after(gone[:n]).worst > bound
            )
        ]
    kept_now = [one for one in among if not {*one.indices} & {*gone}]
    exchange = exchanged(profiles, prior, kept_now, alone(profiles, gone), stay, sigma_range)
    better = [index for one in exchange for index in one.indices]
    gone = better if after(better).worst <= bound else gone
    deleted = [*sorted({*range(len(snapshots))} - {*used}), *gone]
    kept = tuple(snapshot for index, snapshot in enumerate(snapshots) if index not in {*deleted})
    return Pruning(
        kept, tuple(snapshots[index] for index in deleted), before, after(gone), prior.source
    )


def prune(
    directory: Path, pruning: Pruning, progress: Callable[[int], object] = lambda _: None
) -> Pruning:
    """Carry out a plan as the one writer: verify all survivors, then delete the other snapshots.

    If the directory is locked or has changed, or a survivor is damaged, an error says so, and
    nothing is deleted.
    """
    with DirectoryLock(directory):
        remove_leftovers(directory)
        planned = {
            snapshot.path: snapshot.identity for snapshot in (*pruning.kept, *pruning.to_delete)
        }
        if {snapshot.path: snapshot.identity for snapshot in read_directory(directory)} != planned:
            raise MismatchError(
                directory, "has changed since it was read; nothing was deleted", "run again"
            )
        for file in (file for snapshot in pruning.kept for file in snapshot.files):
            progress(file.nbytes - sum(entry.nbytes for entry in file.entries.values()))
            file.verify(progress)
        for snapshot in pruning.to_delete:
            remove_snapshot(snapshot.path)
        with files.reported_as_write_error(directory):
            files.system.fsync_directory(directory)
    return replace(pruning, deleted=True)


def _needed(profiles: Sequence[PowerFunction]) -> set[int]:
    """Return the indices of each profile's newest snapshot, and of those of the newest time that
    all profiles have."""
    times = {
        gamma: {p.t for p in profiles if p.gamma == gamma} for gamma in {p.gamma for p in profiles}
    }
    newest = {gamma: max(of_profile) for gamma, of_profile in times.items()}
    complete = max(set.intersection(*times.values()), default=None)
    return {index for index, p in enumerate(profiles) if p.t in (newest[p.gamma], complete)}
