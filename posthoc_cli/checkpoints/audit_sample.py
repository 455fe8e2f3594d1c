"""What a sample of elements shows of an average and of the weights beside it: how both move from
one checkpoint to the next. NumPy, float64."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress

import numpy as np
import numpy.typing as npt

from posthoc_cli.checkpoints.audit_fit import ENOUGH, Bools, Intervals
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.decay_rules import OrdinaryEMA
from posthoc_cli.profiles import FloatArray
from posthoc_cli.snapshots.sampling import estimate_roundings, read_elements
from posthoc_cli.snapshots.source import ElementRange

_MOST_ELEMENTS = 100_000  # in the sample
_PIECES = 32  # least pieces of tensors, if the sample has enough elements

# Least change of weights, relative to their norm, that an average has to follow. In float32 one
# with decay 0.9995 loses changes below 2^-24 / (1 - decay), as of a bias before a BatchNorm, which
# has no gradient and moves by rounding alone.
_FOLLOWED = 1e-4

Pair = tuple[Checkpoint, Checkpoint]
"""The weights and the average of one time."""


@dataclass(frozen=True)
class Sample:
    """How an average and the weights move between times, by piece of a tensor."""

    names: list[str]  # of the tensor of each piece
    sizes: FloatArray  # numbers of elements: [pieces]
    times: FloatArray
    unit: str  # of the times, such as "steps"
    every: int  # interval of the average's updates
    updates: FloatArray  # of the average by each time: [times]
    # as in `Intervals`; one more, in which nothing moves, begins at the last time:
    # [times, pieces, 5, 5]
    gram: FloatArray
    rounding: FloatArray  # squared rounding errors of the averages: [times, pieces]
    norms: FloatArray  # squared, of the newest weights: [pieces]
    still: float  # usual share of the average's elements that stand still while the weights move
    dtype: str  # in which the average is stored

    @cached_property
    def moves(self) -> Bools:
        """Whether the weights move: [intervals, pieces]. Tensors that move too little to be
        followed count as constant, unless all do."""
        motion = self.gram[:-1, :, 2, 2]
        is_clear = motion.sum(axis=0) > _FOLLOWED**2 * self.norms
        if not is_clear.any():
            is_clear[:] = True
        return np.asarray((motion > 0) & is_clear)

    @property
    def stays(self) -> Bools:
        """Whether the average stands still: [intervals, pieces]."""
        return np.asarray(self.gram[:-1, :, 0, 0] == 0)

    @property
    def equals_weights(self) -> Bools:
        """Whether the average equals the weights: [times, pieces]."""
        return np.asarray(self.gram[..., 1, 1] == 0)

    @property
    def copies(self) -> int:
        """The number of times before the average began, at which it equals the weights."""
        is_copy = (self.equals_weights[:-1] | ~self.moves).all(axis=1)
        return int(np.argmin(np.append(is_copy, False)))

    @property
    def is_averaged(self) -> Bools:
        """Whether a piece moves, and is no copy: [pieces]."""
        follows = (~self.stays & self.moves).any(axis=0)
        return np.asarray(follows & ~self.equals_weights[1:].all(axis=0))

    @property
    def untracked(self) -> list[str]:
        """The names of tensors whose weights move, and which are not averaged."""
        are_untracked = self.moves.any(axis=0) & ~self.is_averaged
        return list(dict.fromkeys(compress(self.names, are_untracked)))

    @cached_property
    def intervals(self) -> Intervals:
        """Select the intervals after the copies, of the pieces that are averaged, each relative to
        the motion of its weights, without the variance of rounding."""
        gram = self.gram[:-1, self.is_averaged]
        rounding = self.rounding[:, self.is_averaged]
        before, after = rounding[:-1], rounding[1:]
        shared = _rounding_covariance(gram[..., 0, 0], (before + after) / 2)
        gram[..., 0, 0] -= before + after - 2 * shared
        gram[..., 0, 1] -= shared - before
        gram[..., 1, 0] -= shared - before
        gram[..., 1, 1] -= before
        scale = 1 / np.maximum(gram[..., 2, 2].mean(axis=0), 1e-300)
        relative = gram * scale[:, None, None]
        sizes = self.sizes[self.is_averaged]
        rows = Intervals(self.updates, relative, (before + after) * scale, sizes)
        return rows.between(self.copies, len(gram))


def _rounding_covariance(moved: FloatArray, rounding: FloatArray) -> FloatArray:
    """Estimate the covariance of the rounding errors of two values that moved so far, of the
    variance `rounding` each: both squared, as stored.

    A value that moves by m spacings moves by f (1 - f) more, squared, if it is rounded, where f is
    the fraction of m. If m is normally distributed with deviation s, this is in the mean 1/6 less
    the sum of exp(-2 (pi k s)^2) / (pi k)^2, and twice the variance less twice the covariance.
    """
    deviations = np.append(0, np.geomspace(1e-4, 2, 200))
    numbers = np.arange(1, 30)
    decays = np.exp(-2 * (np.pi * numbers * deviations[:, None]) ** 2)
    covariances = (decays / (np.pi * numbers) ** 2 / 2).sum(axis=1)
    squares = deviations**2 + 2 * (covariances[0] - covariances)
    spacings = 12 * np.maximum(rounding, 1e-300)
    return np.asarray(spacings * np.interp(moved / spacings, squares, covariances, right=0.0))


# --- reading


@dataclass(frozen=True)
class _Point:
    """The elements at one time."""

    weights: FloatArray
    average: FloatArray
    rounding: FloatArray  # squared, of the average

    def still_share(self, later: _Point) -> float:
        """Compute the share of the average's elements that stand still while the weights move."""
        is_still = (self.average == later.average) & (self.weights != later.weights)
        return float(is_still.mean())


def read_sample(pairs: Sequence[Pair], update_every: int = 1) -> Sample:
    """Read pieces of the tensors at all times, about equally many elements of each tensor; raise
    NonFiniteError for nan or infinity. An average is updated at this interval, if its file and the
    settings say no other one."""
    _, newest = pairs[-1]
    pieces = _choose_pieces(newest)
    sizes = np.array([piece.end - piece.begin for piece in pieces])
    starts = np.append(0, np.cumsum(sizes[:-1]))
    rounding = []
    still = []
    gram = []
    for window in _windows(_read_points(pairs, pieces)):
        _, begin, end, _ = window
        rounding.append(np.add.reduceat(begin.rounding, starts))
        still.append(begin.still_share(end))
        gram.append(_sum_products(window, starts))
    times = np.array([average.t for _, average in pairs])
    first, every = _find_updates(newest, update_every)
    return Sample(
        names=[piece.name for piece in pieces],
        sizes=sizes.astype(float),
        times=times,
        unit=newest.t_unit,
        every=every,
        updates=np.maximum((times - first) // every + 1, 0),
        gram=np.array(gram),
        rounding=np.array(rounding),
        norms=np.add.reduceat(end.weights**2, starts),
        still=float(np.median(still[:-1])),
        dtype=newest.entries[pieces[0].name].dtype,
    )


def _find_updates(newest: Checkpoint, update_every: int) -> tuple[int, int]:
    """Find the step of the first update of an average, and their interval."""
    if not isinstance(newest.profile, OrdinaryEMA):
        return update_every, update_every
    settings = newest.profile.settings
    return settings["first"], settings["every"]


def _read_points(pairs: Sequence[Pair], pieces: Sequence[ElementRange]) -> Iterator[_Point]:
    """Yield the elements at each time, and the first and the last ones again, as if nothing had
    moved before and after."""
    for number, (weights, average) in enumerate(pairs):
        with weights, average:  # which share their files
            x = read_elements(weights, pieces)
            e = read_elements(average, pieces)
        point = _Point(x, e, estimate_roundings(average, pieces, e))
        yield point
        if number == 0:
            yield point
    yield point
    yield point


def _windows(points: Iterator[_Point]) -> Iterator[Sequence[_Point]]:
    """Yield each four points that follow each other."""
    window = deque[_Point](maxlen=4)
    for point in points:
        window.append(point)
        if len(window) == 4:
            yield tuple(window)


def _sum_products(window: Sequence[_Point], starts: npt.NDArray[np.intp]) -> FloatArray:
    """Sum the products in the interval between the second and the third of four times, by piece:
    [pieces, 5, 5]."""
    before, begin, end, after = window
    rows = np.stack(
        [
            end.average - begin.average,
            begin.average - begin.weights,
            end.weights - begin.weights,
            begin.weights - before.weights,
            after.weights - end.weights,
        ]
    )
    products = rows[:, None] * rows
    return np.moveaxis(np.add.reduceat(products, starts, axis=2), 2, 0)


def _choose_pieces(newest: Checkpoint) -> list[ElementRange]:
    """Choose the ranges of elements that an audit reads, in the order of names."""
    names = [name for name in sorted(newest.averaged) if newest.entries[name].size]
    most = _MOST_ELEMENTS // len(names)
    parts = -(-_PIECES // len(names))
    pieces = []
    for name in names:
        size = newest.entries[name].size
        count = min(parts, -(-size // ENOUGH))
        each = max(1, min(size, most) // count)
        starts = np.linspace(0, size - each, count).astype(np.int64)
        for start in np.unique(starts).tolist():
            pieces.append(ElementRange(name, start, start + each))
    return pieces
