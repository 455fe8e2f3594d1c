"""Which snapshots of a directory belong together, and which are the strangers: the fewer ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

from posthoc_cli.errors import MismatchError
from posthoc_cli.snapshots.matching import difference, time_order
from posthoc_cli.snapshots.priors import run_clock
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.segments import by_segment
from posthoc_cli.snapshots.store import snapshot_path
from posthoc_cli.snapshots.verification.reports import CONFLICTING, DUPLICATE, MISMATCHED, Problem

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
