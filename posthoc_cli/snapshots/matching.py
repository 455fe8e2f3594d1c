"""Whether snapshots belong together: one run, one clock, the same tensors in every segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from posthoc_cli.errors import shown
from posthoc_cli.snapshots.reader import Snapshot


def time_order(snapshot: Snapshot) -> tuple[float, float, str]:
    """The key that sorts snapshots by time, then sigma_rel."""
    return snapshot.info.t, snapshot.info.sigma_rel, snapshot.path.name


def pairs_to_compare(snapshots: Sequence[Snapshot]) -> Iterator[tuple[Snapshot, Snapshot]]:
    """Of snapshots in order: each but the first beside the first of its segment, the first of each segment beside the
    first of all, and neighbours of different segments beside each other.
    """
    firsts: dict[int, Snapshot] = {}
    for index, snapshot in enumerate(snapshots):
        first = firsts.setdefault(snapshot.info.segment, snapshot)
        if first is not snapshot:
            yield first, snapshot
        elif index > 0:
            yield snapshots[0], snapshot
        if index > 1 and snapshots[index - 1].info.segment != snapshot.info.segment:
            yield snapshots[index - 1], snapshot


def difference(first: Snapshot, other: Snapshot) -> str | None:
    """Why a snapshot and a later one cannot be of one directory, as words that follow their names; None if they can."""
    a, b = first.info, other.info
    if a.run_id != b.run_id:
        return f"are of different runs ({a.run_id[:8]} and {b.run_id[:8]}); keep one run a directory"
    if a.t_unit != b.t_unit:
        return f"count time in {shown(a.t_unit)} and {shown(b.t_unit)}"
    # A run whose last snapshot of a profile was deleted may have gone on without that profile.
    if not (set(a.sigma_rels) <= set(b.sigma_rels) or set(b.sigma_rels) <= set(a.sigma_rels)):
        return (
            "do not match: their runs track the profiles "
            f"{', '.join(f'{s:g}' for s in a.sigma_rels)} and {', '.join(f'{s:g}' for s in b.sigma_rels)}"
        )
    if a.segment != b.segment:
        if a.t < b.t and a.segment < b.segment:
            return None
        return f"do not match: the segments {a.segment} and {b.segment} do not follow each other in time"
    return _tensor_difference(first, other)


def _tensor_difference(first: Snapshot, other: Snapshot) -> str | None:
    a, b = first.info, other.info
    tables = [(s.header.tensors, s.info.tensors) for s in (first, other)]
    same = tables[0] == tables[1]  # mostly the same objects
    for name in () if same else sorted(a.tensors.keys() | b.tensors.keys()):
        if name not in a.tensors or name not in b.tensors:
            missing = other if name in a.tensors else first
            return f"do not match: tensor {shown(name)} is missing in {missing.path.name}"
        shapes = [list(s.header.tensors[name].shape) for s in (first, other)]
        if shapes[0] != shapes[1]:
            return f"do not match: tensor {shown(name)} has the shapes {shapes[0]} and {shapes[1]}"
        if a.tensors[name] != b.tensors[name]:
            return (
                f"do not match: tensor {shown(name)} is {a.tensors[name].role} of {a.tensors[name].dtype} "
                f"and {b.tensors[name].role} of {b.tensors[name].dtype}"
            )
    return None if a.aliases == b.aliases else "do not match: they tie different names together"


def missing_at_newest(snapshots: Sequence[Snapshot]) -> list[str]:
    """Profiles that are missing at the newest time, where thinning never removes one.

    Not those that the run no longer tracks: it went on without them.
    """
    own = [s.info for s in snapshots if s.info.run_id == snapshots[0].info.run_id]
    newest = max((info.t for info in own), default=0.0)
    there = [info for info in own if info.t == newest]
    tracked = {sigma_rel for info in there for sigma_rel in info.sigma_rels}
    missing = ({info.sigma_rel for info in own} & tracked) - {info.sigma_rel for info in there}
    if not missing:
        return []
    return [f"t = {newest:,.12g}, the newest: no snapshot of sigma_rel {', '.join(f'{s:g}' for s in sorted(missing))}"]
