"""Schedules of snapshots before training, and thinning, which keeps those that lower the predicted error most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_cli.dtypes import EPS, WORDS
from posthoc_cli.profiles import FloatArray, PowerFunction, gamma_from_sigma_rel
from posthoc_cli.reconstruction import (
    MOST_SOLVED,
    ROUNDING,
    Losses,
    Motion,
    Prior,
    Problem,
    assumed_prior,
    one_blas_thread,
    thinned_subset,
)


def relative_rounding(dtype: str) -> float:
    """Return the root mean square error of rounding to a dtype, relative to the values; for float16 1.9e-4."""
    return ROUNDING * EPS[WORDS[dtype]]


@dataclass(frozen=True)
class Schedule:
    """A plan of snapshots.

    Attributes:
        sigma_rels: tracked profiles.
        steps: length of training.
        checkpoint_every: steps between snapshots.
        max_checkpoints: snapshots kept per profile, thinned as they arrive; None keeps all.
        rounding: root mean square error of a stored average, relative to its norm.
    """

    sigma_rels: tuple[float, ...]
    steps: int
    checkpoint_every: int
    max_checkpoints: int | None = None
    rounding: float = 0.0

    @property
    def taken(self) -> int:
        """The number of times at which snapshots are taken."""
        return self.steps // self.checkpoint_every

    @property
    def kept(self) -> int:
        """The number of snapshots of each profile at the end."""
        return min(self.taken, self.max_checkpoints or self.taken)

    def snapshots(self, motion: Motion | None = None) -> list[PowerFunction]:
        """Return the snapshots at the end, by time; `motion` is relative to the norm, by default even."""
        motion = motion or Motion.even(self.steps)
        gammas = [gamma_from_sigma_rel(s) for s in self.sigma_rels]
        if self.kept == self.taken:
            counts = range(1, self.taken + 1)
            return [PowerFunction(gamma, float(count * self.checkpoint_every)) for count in counts for gamma in gammas]
        left: list[PowerFunction] = []
        for count in range(1, self.taken + 1):
            left += [PowerFunction(gamma, float(count * self.checkpoint_every)) for gamma in gammas]
            if len(left) > self.kept * len(gammas):
                prior = assumed_prior(left, self.rounding, motion)
                spared = spared_times(self.kept)
                dropped = set(snapshots_to_drop(left, prior, self.kept, range_of(self.sigma_rels), spared))
                left = [p for index, p in enumerate(left) if index not in dropped]
        return left


def powers(sigma_rels: FloatArray, t: float) -> list[PowerFunction]:
    """Return the power functions of these widths at time `t`."""
    return [PowerFunction.from_sigma_rel(float(sigma_rel), t) for sigma_rel in sigma_rels]


def listed(sigma_rels: Sequence[float]) -> str:
    """Return the numbers as text for a label."""
    return ", ".join(f"{sigma_rel:g}" for sigma_rel in sigma_rels)


# --- thinning --------------------------------------------------------------------------------------

SPARED_TIMES = 5
"""The newest times whose snapshots thinning spares while a training writes: it may be continued from them."""


def spared_times(keep: int) -> int:
    """Return how many of the newest snapshots of a profile thinning spares: at most a quarter of those it keeps."""
    return max(1, min(SPARED_TIMES, keep // 4))


USEFUL_RANGE = (0.05, 0.28)
"""The default range of sigma_rel for which thinning keeps snapshots."""


def range_of(sigma_rels: Sequence[float]) -> tuple[float, float]:
    """Return the range for which thinning keeps snapshots: the tracked one, or the default for a single profile."""
    return (min(sigma_rels), max(sigma_rels)) if len(sigma_rels) > 1 else USEFUL_RANGE


_SIMULATED = 8
"""Limit of the snapshots from which thinning chooses, as a multiple of those kept; more make little difference."""

_TARGETS = 12
_NORM = 8
"""Number of targets over the range, and the norm that combines their errors: near the worst one, but all count."""


@one_blas_thread()
def snapshots_to_drop(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    keep: int,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    spared: int = 1,
) -> list[int]:
    """Return the indices of the snapshots to drop so that `keep` of each profile remain, in the order to drop.

    First, always the snapshot goes whose loss raises the predicted error over `sigma_range`, at the time of the last
    snapshot, least; among equals (where nothing moved) the one whose neighbours are closest together. Then exchanges
    improve the rest, see `exchanged`. The last `spared` snapshots of each profile stay. Of very many snapshots, those
    outside a subset (`thinned_subset`) go before all others.
    """
    left, beyond = list(range(len(snapshots))), list[int]()
    newest: set[int] = set()
    for gamma in {p.gamma for p in snapshots}:
        newest |= {*sorted((i for i in left if snapshots[i].gamma == gamma), key=lambda i: snapshots[i].t)[-spared:]}
    if len(left) > MOST_SOLVED:
        profiles = len({p.gamma for p in snapshots})
        left = sorted({*thinned_subset(snapshots, min(MOST_SOLVED, _SIMULATED * keep * profiles), keep), *newest})
        beyond = sorted(set(range(len(snapshots))) - set(left))
    dropped = removal_order(snapshots, prior, left, keep, newest, sigma_range)
    kept = sorted({*left} - {*dropped})
    return [*beyond, *exchanged(snapshots, prior, kept, dropped, newest, sigma_range)]


def removal_order(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    among: Sequence[int],
    keep: int,
    needed: Collection[int],
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[int]:
    """Return which of the snapshots `among` to drop, the least needed first, until `keep` of each profile remain.

    `among` and `needed`, the snapshots that must stay, are indices.
    """
    left = list(among)
    losses = losses_of([snapshots[i] for i in left], prior.of(left), sigma_range)
    column = {index: number for number, index in enumerate(left)}
    counts = Counter(snapshots[i].gamma for i in left)
    dropped: list[int] = []
    while may_go := [i for i in left if counts[snapshots[i].gamma] > keep and i not in needed]:
        errors = _combined(losses.squares_without_each())[[column[i] for i in may_go]]
        equals = [may_go[k] for k in np.flatnonzero(errors == errors.min())]
        index = _closest_together(snapshots, left, equals)
        losses.lose(column[index])
        left.remove(index)
        dropped.append(index)
        counts[snapshots[index].gamma] -= 1
    return dropped


_MOST_EXCHANGED = 16
_MOST_TRIED = 240
_LEAST_GAIN = 0.99
"""Limits of the snapshots kept and of the solves for exchanges, one each, and the ratio of errors from which on none is
made. They pay if few snapshots are left: with 3 of 20 they halve the error at best, with 20 of 40 they gain nothing."""


def exchanged(
    snapshots: Sequence[PowerFunction],
    prior: Prior,
    kept: Sequence[int],
    dropped: Sequence[int],
    needed: Collection[int],
    sigma_range: tuple[float, float] = USEFUL_RANGE,
) -> list[int]:
    """Return the snapshots to drop, in order, after exchanging dropped ones for kept ones of the same profile.

    Greedy drops do not always find the best set: a snapshot that was kept early may be of little use in the end.
    `kept`, `dropped` (in the order to drop) and `needed`, the snapshots that must stay, are indices.
    """
    kept, order = list(kept), list(dropped)
    if len(kept) > _MOST_EXCHANGED or len(order) > _MOST_TRIED // 2:
        return order
    everyone = sorted([*kept, *order])
    losses = losses_of([snapshots[i] for i in everyone], prior.of(everyone), sigma_range)
    place = {index: number for number, index in enumerate(everyone)}
    least = float(_combined(losses.of([place[i] for i in kept]).squares[:, None])[0])
    for _ in range(_MOST_TRIED // max(len(order), 1)):
        trials = []
        for coming in order:
            errors = _combined(losses.of([place[i] for i in (*kept, coming)]).squares_without_each())
            trials += [
                (float(error), coming, leaving)
                for error, leaving in zip(errors, kept, strict=False)
                if leaving not in needed and snapshots[leaving].gamma == snapshots[coming].gamma
            ]
        error, coming, leaving = min(trials, default=(least, -1, -1))
        if error >= _LEAST_GAIN * least:
            break
        least = error
        kept[kept.index(leaving)] = coming
        order[order.index(coming)] = leaving
    return order


def _closest_together(snapshots: Sequence[PowerFunction], left: Sequence[int], equals: Sequence[int]) -> int:
    """Return the snapshot whose neighbours of the same profile are closest together, the latest of equals."""
    gaps = dict.fromkeys(equals, float("inf"))  # infinity without two neighbours
    for gamma in {snapshots[i].gamma for i in equals} if len(equals) > 1 else ():
        of_profile = sorted((i for i in left if snapshots[i].gamma == gamma), key=lambda i: snapshots[i].t)
        for before, index, after in zip(of_profile, of_profile[1:], of_profile[2:], strict=False):
            if index in gaps:
                gaps[index] = snapshots[after].t - snapshots[before].t
    return min(equals, key=lambda i: (gaps[i], -snapshots[i].t))


def losses_of(
    snapshots: Sequence[PowerFunction], prior: Prior, sigma_range: tuple[float, float] = USEFUL_RANGE
) -> Losses:
    """Return the errors of targets over the range, at the time of the last snapshot, as snapshots are lost."""
    t = max(p.t for p in snapshots)
    return Problem(snapshots, prior, t).losses(powers(np.geomspace(*sigma_range, _TARGETS), t))


def _combined(squares: FloatArray) -> FloatArray:
    """Return the 8-norm over targets of the roots of squared errors: shape [targets, n] to [n]."""
    scale = float(squares.max()) or 1.0
    return np.asarray(np.mean((squares / scale) ** (_NORM / 2), axis=0) ** (1 / _NORM) * np.sqrt(scale))
