"""Pruning of a directory: a plan of what to delete, with the errors before and after, and the
deletion.

Deletions are safe at any moment: only what was planned is deleted, only after all remaining
snapshots were read and verified, and the least needed snapshots first, so that an interruption
leaves the best valid directory of its size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from posthoc_cli import files
from posthoc_cli.errors import MismatchError, check_count, percent
from posthoc_cli.planning import (
    USEFUL_RANGE,
    CurveRequest,
    ErrorCurve,
    check_sigma_range,
    error_curve,
    times_to_drop,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import Prior, choose_evenly, one_blas_thread
from posthoc_cli.snapshots.directory import (
    DirectoryLock,
    read_directory,
    read_kept_time,
    remove_leftovers,
    remove_snapshot,
)
from posthoc_cli.snapshots.snapshot import Snapshot, file_bytes
from posthoc_cli.snapshots.sources import Sources

_POINTS = 41  # sigma_rels whose errors are compared


@dataclass(frozen=True)
class Pruning:
    """A plan of what to delete: `kept` by time, then sigma_rel, and `to_delete` in the order of
    deletion.

    `before` and `after` are the predicted errors with all snapshots and with the remaining ones,
    both under the prior from all headers. `source` is `Prior.evidence`.
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
    keep: int,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> Pruning:
    """Plan which snapshots of a directory to delete so that `keep` times stay. Reads no tensors,
    except a sample if headers lack measurements.

    All snapshots of a time are deleted, or none. The newest time of each profile stays, the newest
    one that all profiles have, from which training can continue, and the one that the last
    `ema.snapshot()` keeps.
    """
    check_count("keep", keep)
    check_sigma_range(sigma_range)
    profiles = [snapshot.profile for snapshot in snapshots]
    prior = Sources.of(snapshots).prior()
    needed = _needed_times(profiles)
    kept_time = read_kept_time(snapshots[0].path.parent)
    needed.update(profile.t for profile in profiles if profile.t == kept_time)
    order = times_to_drop(profiles, prior, keep, needed, sigma_range)
    dropped = {time.t for time in order}
    before = _curve(profiles, prior, range(len(profiles)), sigma_range)
    kept = [index for index, profile in enumerate(profiles) if profile.t not in dropped]
    after = _curve(profiles, prior, kept, sigma_range)
    # The expected distance cannot decrease, but the norm that it is relative to is estimated from
    # fewer averages.
    larger = np.maximum(after.predicted_error, before.predicted_error)
    return Pruning(
        kept=tuple(snapshots[index] for index in kept),
        to_delete=tuple(snapshots[index] for time in order for index in time.indices),
        before=before,
        after=replace(after, predicted_error=larger),
        source=prior.evidence,
    )


def _needed_times(profiles: Sequence[PowerFunction]) -> set[float]:
    """Find the newest time of each profile, and the newest time that all profiles have."""
    times: dict[float, set[float]] = {}
    for profile in profiles:
        times.setdefault(profile.gamma, set()).add(profile.t)
    needed = {max(own) for own in times.values()}
    common = set.intersection(*times.values())
    if common:
        needed.add(max(common))
    return needed


def _curve(
    profiles: Sequence[PowerFunction],
    prior: Prior,
    indices: Collection[int],
    sigma_range: tuple[float, float],
) -> ErrorCurve:
    """Predict the errors of reconstructions from some of the snapshots; from an even choice if
    there are very many."""
    left = [*indices]
    remaining = [profiles[index] for index in left]
    chosen = [left[number] for number in choose_evenly(remaining)]
    usable = [profiles[index] for index in chosen]
    return error_curve("", usable, prior.subset(chosen), CurveRequest(sigma_range), points=_POINTS)


def prune(
    directory: Path,
    pruning: Pruning,
    progress: Callable[[int], object] = lambda _: None,
) -> Pruning:
    """Carry out a plan as the one writer: verify all remaining snapshots, then delete the others.

    If the directory is locked or has changed, or a remaining snapshot is damaged, an error says so,
    and nothing is deleted.
    """
    with DirectoryLock(directory) as lock:
        remove_leftovers(directory, lock)
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
            remove_snapshot(snapshot, lock)
        with files.raise_write_errors(directory):
            files.system.fsync_directory(directory)
    return replace(pruning, deleted=True)


def _identities(snapshots: Sequence[Snapshot]) -> dict[Path, str]:
    return {snapshot.path: snapshot.identity for snapshot in snapshots}
