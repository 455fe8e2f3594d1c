"""Which snapshots are kept: those whose loss would raise the predicted error most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning.choosing import MOST_SOLVED, choose
from posthoc_cli.profiles import FloatArray, PowerFunction
from posthoc_cli.reconstruction import MinimumVariance, Prior

USEFUL_RANGE = (0.05, 0.28)
"""The sigma_rel that snapshots are kept for, unless somebody says otherwise."""

_FOLLOWED = 8
"""Of very many snapshots thinning is followed from so many times those kept: what is left of more looks alike."""

_TARGETS = 12
_NORM = 8
"""Errors over the range are put together by their 8-norm: near the worst one, yet no target is for nothing."""


def snapshots_to_drop(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    keep: int | None,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[int]:
    """Which snapshots go, so that `keep` of each profile remain: indices, in the order to drop.

    One after another that one goes whose loss raises the predicted error over `sigma_range`, at the time of the last
    snapshot, least; between equals (where nothing moved) the one whose neighbours are closest together. The last one
    of each profile stays. The cost of every loss follows from one factorisation (`MinimumVariance.removal_costs`), so
    that a drop takes as many solves as there are targets, however many snapshots there are. Of very many, those go
    first that are not chosen by `choose`: thinning is followed from a few times as many as are kept.

    Arguments:
        snapshots: profiles of what is stored, in any order.
        prior: of these snapshots.
        keep: snapshots of each profile to keep; None keeps all.
        sigma_range: what they are kept for.
    """
    if keep is None:
        return []
    if keep < 1:
        raise InvalidValueError(f"max_checkpoints {keep}: must be at least 1, or None to keep all")
    left = list(range(len(snapshots)))
    dropped: list[int] = []
    if len(left) > MOST_SOLVED:
        profiles = len({p.gamma for p in snapshots})
        left = choose(snapshots, min(MOST_SOLVED, _FOLLOWED * keep * profiles), keep)
        dropped = sorted(set(range(len(snapshots))) - set(left))
    while True:
        counts = Counter(snapshots[i].gamma for i in left)
        newest = {gamma: max(snapshots[i].t for i in left if snapshots[i].gamma == gamma) for gamma in counts}
        may_go = [i for i in left if counts[snapshots[i].gamma] > keep and snapshots[i].t < newest[snapshots[i].gamma]]
        if not may_go:
            return dropped
        found = errors_after_loss([snapshots[i] for i in left], prior.of(left), sigma_range)
        errors, gaps = dict(zip(left, found, strict=True)), _merged_gaps(snapshots, left)
        gone = min(may_go, key=lambda i: (errors[i], gaps[i], -snapshots[i].t))
        left.remove(gone)
        dropped.append(gone)


def _merged_gaps(snapshots: Sequence[PowerFunction], left: Sequence[int]) -> dict[int, float]:
    """Time between the neighbours, of the same profile, of each snapshot; infinite where it lacks one."""
    gaps = dict.fromkeys(left, float("inf"))
    for gamma in {snapshots[i].gamma for i in left}:
        own = sorted((i for i in left if snapshots[i].gamma == gamma), key=lambda i: snapshots[i].t)
        for before, index, after in zip(own, own[1:], own[2:], strict=False):
            gaps[index] = snapshots[after].t - snapshots[before].t
    return gaps


def errors_after_loss(
    snapshots: Sequence[PowerFunction], prior: Prior, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> FloatArray:
    """The 8-norm of the expected errors over the range when each of the snapshots is lost: shape [n]."""
    t = max(p.t for p in snapshots)
    solver = MinimumVariance(snapshots, prior, t)
    targets = [PowerFunction.from_sigma_rel(float(s), t) for s in np.geomspace(*sigma_range, _TARGETS)]
    columns = [solver.solve(target) for target in targets]
    squares = np.array([solver.expected_square(c, target) for c, target in zip(columns, targets, strict=True)])
    after = squares[:, None] + np.square(columns) * solver.removal_costs()  # [targets, n]
    scale = float(after.max()) or 1.0
    return np.asarray(np.mean((after / scale) ** (_NORM / 2), axis=0) ** (1 / _NORM) * np.sqrt(scale))
