"""Which of very many snapshots a reconstruction works with: about those that thinning would leave.

A solve takes time as the third power of the number of snapshots, and little is gained beyond a thousand. Thinning one
by one cannot be followed from ten thousand; but what it leaves lies about as densely as a simple law says, and as good
a choice follows from that law at once. It depends on the snapshots' times alone, on no target.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import FloatArray, PowerFunction, gamma_from_sigma_rel
from posthoc_cli.reconstruction import Losses, MinimumVariance, Prior
from posthoc_cli.threads import one_blas_thread

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


# --- Which snapshots are kept: those whose loss would raise the predicted error most ---------------


USEFUL_RANGE = (0.05, 0.28)
"""The sigma_rel that snapshots are kept for, unless somebody says otherwise."""

_FOLLOWED = 8
"""Of very many snapshots thinning is followed from so many times those kept: what is left of more looks alike."""

_TARGETS = 12
_NORM = 8
"""Errors over the range are put together by their 8-norm: near the worst one, yet no target is for nothing."""


@one_blas_thread()
def snapshots_to_drop(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    keep: int | None,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[int]:
    """Which snapshots go, so that `keep` of each profile remain: indices, in the order to drop.

    One after another that one goes whose loss raises the predicted error over `sigma_range`, at the time of the last
    snapshot, least; between equals (where nothing moved) the one whose neighbours are closest together; then what is
    kept is improved by exchanges, see `exchanged`. The last one of each profile stays. The costs of all losses follow
    from one factorisation (`Losses`). Of very many, those go first that are not chosen by `choose`: thinning is
    followed from a few times as many as are kept.

    Arguments:
        snapshots: profiles of what is stored, in any order.
        prior: of these snapshots.
        keep: snapshots of each profile to keep; None keeps all.
        sigma_range: what they are kept for.
    """
    if keep is None:
        return []
    if keep < 1:
        raise InvalidValueError("max_checkpoints", "must be at least 1, or None to keep all", value=keep)
    left = list(range(len(snapshots)))
    beyond: list[int] = []
    if len(left) > MOST_SOLVED:
        profiles = len({p.gamma for p in snapshots})
        left = choose(snapshots, min(MOST_SOLVED, _FOLLOWED * keep * profiles), keep)
        beyond = sorted(set(range(len(snapshots))) - set(left))
    losses = losses_of([snapshots[i] for i in left], prior.of(left), sigma_range)
    column = {index: number for number, index in enumerate(left)}
    newest = set(newest_of_each(snapshots))
    counts = Counter(snapshots[i].gamma for i in left)
    dropped: list[int] = []
    while may_go := [i for i in left if counts[snapshots[i].gamma] > keep and i not in newest]:
        errors = errors_after_each(losses)[[column[i] for i in may_go]]
        equals = [may_go[place] for place in np.flatnonzero(errors == errors.min())]
        gone = _closest_together(snapshots, left, equals)
        losses.lose(column[gone])
        left.remove(gone)
        dropped.append(gone)
        counts[snapshots[gone].gamma] -= 1
    return [*beyond, *exchanged(snapshots, prior, left, dropped, newest, sigma_range)]


def newest_of_each(snapshots: Sequence[PowerFunction]) -> list[int]:
    """The last snapshot of each profile: indices."""
    newest: dict[float, int] = {}
    for index in sorted(range(len(snapshots)), key=lambda i: snapshots[i].t):
        newest[snapshots[index].gamma] = index
    return sorted(newest.values())


_MOST_EXCHANGED = 16
_MOST_TRIED = 240
_WORTH_IT = 0.99
"""Exchanges pay where few snapshots are left: with 3 of 20 they halve the error at best, with 20 of 40 nothing. Each
trial is a solve; one that lowers the error by less than a hundredth is not made."""


def exchanged(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    kept: Sequence[int],
    dropped: Sequence[int],
    needed: Collection[int],
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[int]:
    """A choice of snapshots to drop, improved by exchanging one that is dropped for one that is kept, of one profile.

    What is dropped one after another is not always the best choice of that size: a snapshot that was spared early may
    be of little use beside those left in the end.

    Arguments:
        kept, dropped: indices, the latter in the order to drop.
        needed: indices that must stay.
    """
    kept, order = list(kept), list(dropped)
    if len(kept) > _MOST_EXCHANGED or len(order) > _MOST_TRIED // 2:
        return order
    everyone = [*kept, *order]
    losses = losses_of([snapshots[i] for i in everyone], prior.of(everyone), sigma_range)
    place = {index: number for number, index in enumerate(everyone)}
    least = float(_together(losses.of([place[i] for i in kept]).squares[:, None])[0])
    for _ in range(_MOST_TRIED // max(len(order), 1)):
        trials = []
        for coming in order:
            errors = errors_after_each(losses.of([place[i] for i in (*kept, coming)]))
            trials += [
                (float(error), coming, leaving)
                for error, leaving in zip(errors, kept, strict=False)
                if leaving not in needed and snapshots[leaving].gamma == snapshots[coming].gamma
            ]
        error, coming, leaving = min(trials, default=(least, -1, -1))
        if error >= _WORTH_IT * least:
            break
        least = error
        kept[kept.index(leaving)] = coming
        order[order.index(coming)] = leaving
    return order


def _closest_together(snapshots: Sequence[PowerFunction], left: Sequence[int], equals: Sequence[int]) -> int:
    """The one of several whose neighbours of the same profile have the least time between them, and the latest such."""
    gaps = dict.fromkeys(equals, float("inf"))  # where it lacks one
    for gamma in {snapshots[i].gamma for i in equals} if len(equals) > 1 else ():
        own = sorted((i for i in left if snapshots[i].gamma == gamma), key=lambda i: snapshots[i].t)
        for before, index, after in zip(own, own[1:], own[2:], strict=False):
            if index in gaps:
                gaps[index] = snapshots[after].t - snapshots[before].t
    return min(equals, key=lambda i: (gaps[i], -snapshots[i].t))


def losses_of(
    snapshots: Sequence[PowerFunction], prior: Prior, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> Losses:
    """What losses of snapshots cost targets over the range, at the time of the last one."""
    t = max(p.t for p in snapshots)
    return MinimumVariance(snapshots, prior, t).losses([PowerFunction(gamma, t) for gamma in _gammas(sigma_range)])


@lru_cache(maxsize=16)
def _gammas(sigma_range: tuple[float, float]) -> tuple[float, ...]:
    return tuple(gamma_from_sigma_rel(float(s)) for s in np.geomspace(*sigma_range, _TARGETS))


def errors_after_each(losses: Losses) -> FloatArray:
    """The 8-norm of the expected errors over the range when one more is lost: shape [n]."""
    return _together(losses.squares_without_each())


def _together(squares: FloatArray) -> FloatArray:
    """The 8-norm over targets of the roots: shape [targets, n] to [n]."""
    scale = float(squares.max()) or 1.0
    return np.asarray(np.mean((squares / scale) ** (_NORM / 2), axis=0) ** (1 / _NORM) * np.sqrt(scale))
