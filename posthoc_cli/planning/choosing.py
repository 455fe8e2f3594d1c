"""Which of very many snapshots a reconstruction works with: about those that thinning would leave.

A solve takes time as the third power of the number of snapshots, and little is gained beyond a thousand. Thinning one
by one cannot be followed from ten thousand; but what it leaves lies about as densely as a simple law says, and as good
a choice follows from that law at once. It depends on the snapshots' times alone, on no target.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import FloatArray, PowerFunction

MOST_SOLVED = 1024
"""Snapshots that one reconstruction works with at most."""

LATER = 1.5
"""Thinning leaves more late snapshots than early ones: about at 1 - (1 - x)**LATER of training, x evenly spaced."""


def choose(snapshots: Sequence[PowerFunction], most: int = MOST_SOLVED, keep: int = 1) -> list[int]:
    """At most so many of the snapshots, spread as thinning would leave them: indices, growing; all, where it is fewer.

    The newest one of each profile is among them. Profiles get equal shares.

    Arguments:
        snapshots: profiles of what is stored, in any order.
        most: of all profiles together, except that
        keep: so many of each profile are chosen at least, as far as they are there.
    """
    if len(snapshots) <= most:
        return list(range(len(snapshots)))
    groups: dict[float, list[int]] = {}
    for index in sorted(range(len(snapshots)), key=lambda i: snapshots[i].t):
        groups.setdefault(snapshots[index].gamma, []).append(index)
    end = max(snapshot.t for snapshot in snapshots)
    chosen: list[int] = []
    room = most
    for done, group in enumerate(sorted(groups.values(), key=len)):
        count = min(len(group), max(keep, room // (len(groups) - done)))
        room = max(0, room - count)
        places = _spread(np.array([snapshots[index].t for index in group]) / end, count)
        chosen += [group[place] for place in places.tolist()]
    return sorted(chosen)


def _spread(times: FloatArray, count: int) -> npt.NDArray[np.intp]:
    """`count` of the times, as fractions of training and growing: indices, the last one among them.

    In the coordinate in which thinning leaves them evenly spaced, each time stands for the gap before it. Gaps are
    scaled to a sum of `count`, none beyond 1; whichever takes the running sum past a whole number is chosen.
    """
    if count >= times.size:
        return np.arange(times.size)
    evenly = 1 - (1 - times) ** (1 / LATER)
    gaps = np.maximum(np.diff(evenly, prepend=0.0), np.finfo(np.float64).eps)
    certain = np.zeros(times.size, dtype=bool)
    while True:
        shares = np.where(certain, 1.0, gaps * (count - certain.sum()) / gaps[~certain].sum())
        if not (shares > 1).any():
            break
        certain |= shares >= 1
    whole = np.floor(np.cumsum(shares) + 1e-6)  # the slack is for rounding
    whole[:-1] = np.minimum(whole[:-1], count - 1)  # the last one's share may be less than the slack
    whole[-1] = count
    return np.flatnonzero(np.diff(whole, prepend=0.0))
