"""How the network moved: fitted to the measured distances between its averages.

The path of the weights is taken for a random walk with independent increments of variance v(s) ds, which follows the
learning rate, and noise around it that forgets faster than snapshots are apart, of intensity w(s): a network that is
pulled back to where it came from. Write an average as theta_i = integral p_i(s) theta(s) ds with its density p_i, or
as theta(0) + integral tail_i(s) d theta(s). Then the expected squared distance of two averages, the one of them as
stored with a rounding error of variance r_j, is

    E |theta_i - theta_j|^2 = integral v (tail_i - tail_j)^2 ds + integral w (p_i - p_j)^2 ds + r_j,

linear in v and w. With both constant on pieces of training (in the first one, falling), every measured
distance is one linear equation for their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import linalg
from scipy.optimize import nnls

from posthoc_cli.profiles import FloatArray

MOST_PIECES = 64
"""Pieces of training; with more snapshot times than that, several share a piece."""

_SMOOTHING = 0.1
"""Weight of relative jumps between neighbouring pieces, where 1 is that of a measurement's relative error."""

_TELLING = 1.5
"""Distances a piece from which on noise is told from the walk: one profile with its last two snapshots has nearly 2."""

_REWEIGHTINGS = 8
_LEAST_SHARE = 1e-3
"""The walk stays above this share of its first estimate: no piece of training stands still altogether."""


@dataclass(frozen=True)
class Motion:
    """Summed over all elements of the weights, and constant on pieces of training.

    Attributes:
        edges: ends of the pieces, growing: shape [pieces + 1]. The first one is the time of the first update.
        walk: variance of the increments per unit of time, v: shape [pieces].
        noise: intensity of the noise, variance times unit of time, w: shape [pieces]; 0 where the distances are too
            few to tell it from the walk.
    """

    edges: FloatArray
    walk: FloatArray
    noise: FloatArray

    @classmethod
    def even(cls, t: float, variance: float) -> Motion:
        """A walk of the given variance over (0, t]."""
        return cls(np.array([0.0, t]), np.array([variance / t]), np.zeros(1))

    def on(self, edges: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Walk and noise on intervals that do not straddle an edge of the pieces: [K + 1] to [K] each.

        Before the first and after the last edge the nearest piece goes on.
        """
        middle = (edges[:-1] + edges[1:]) / 2
        piece = np.clip(np.searchsorted(self.edges, middle, side="right") - 1, 0, self.walk.size - 1)
        return self.walk[piece], self.noise[piece]


@dataclass(frozen=True)
class PairDistance:
    """One measured squared distance between two averages of power-function profiles.

    Attributes:
        gammas, times: of the two, the later one first.
        squared: the squared distance, above 0.
        rounding: the part of it that is rounding.
    """

    gammas: tuple[float, float]
    times: tuple[float, float]
    squared: float
    rounding: float

    @property
    def alike(self) -> bool:
        """Whether the two profiles are one as far as rounding can tell: no motion explains a distance then."""
        (gamma, other), (t, earlier) = self.gammas, self.times
        return abs(gamma - other) <= 1e-6 * (gamma + 1) and t - earlier <= 1e-9 * t


def fit_motion(start: float, times: Sequence[float], distances: Sequence[PairDistance]) -> Motion:
    """The motion that explains measured distances.

    Non-negative least squares on relative residuals, with light smoothing between neighbouring pieces that is
    relative, too. A residual counts against the geometric mean of the distance and what the motion makes of it, so
    that too much and too little weigh the same, and distances of a network that stood still for a while do not
    outweigh all others; a jump counts against the geometric mean of its sides, so that a learning rate that falls a
    hundredfold may do so. Since those means are part of the answer, the problem is solved a few times.

    Arguments:
        start: time of the first update.
        times: snapshot times after `start`; the pieces lie between them.
        distances: at least one, none of them `alike`. Noise is only told from the walk where there are enough of
            them: of two profiles, or over two intervals.
    """
    edges = _piece_edges(start, times)
    shape = _Shape(edges)
    pieces = edges.size - 1
    squared = np.array([distance.squared for distance in distances])
    rounding = np.minimum(np.array([distance.rounding for distance in distances]) / squared, 1.0)
    walk, noise = (part / squared[:, None] for part in _influence(shape.edges, distances))
    walk, noise = shape.folded(walk), shape.folded(noise)
    influence = np.hstack([walk, noise] if len(distances) >= _TELLING * pieces else [walk])
    parts = influence.shape[1] // pieces
    scale = np.concatenate([_first_estimate(part, 1 - rounding) for part in np.split(influence, parts, axis=1)])
    if not np.all(scale > 0):  # nothing moved
        return Motion(edges, np.zeros(pieces), np.zeros(pieces))
    smallest = _LEAST_SHARE * scale
    least = np.where(np.arange(scale.size) < pieces, smallest, 0.0)
    for _ in range(_REWEIGHTINGS):
        weight = 1 / np.sqrt(influence @ scale + rounding)
        solution = _solve_scaled(influence * weight[:, None], (1 - rounding) * weight, scale, least, pieces)
        scale = np.maximum(solution, smallest)
    found = np.concatenate((solution, np.zeros(2 * pieces - solution.size)))
    return Motion(shape.edges, shape.unfolded(found[:pieces]), shape.unfolded(found[pieces:]))


def _piece_edges(start: float, times: Sequence[float]) -> FloatArray:
    inner = np.unique(np.asarray(times, dtype=np.float64))
    inner = inner[inner > start]
    if inner.size > MOST_PIECES:
        inner = inner[np.linspace(0, inner.size - 1, MOST_PIECES + 1).round().astype(int)[1:]]
    return np.concatenate(([start], inner)) if inner.size else np.array([start / 2, start])


_EARLY_FALL = 0.5
"""v and w fall as s**-0.5 up to the first snapshot. Networks move fastest at the very start (in one recorded run seven
tenths of v up to the first of twenty snapshots were in the first tenth of it), but not where the rate warms up."""


class _Shape:
    """The course of v and w within the first piece, of which no snapshot tells: see `_EARLY_FALL`.

    The piece is cut into parts, each twice as long as the one before.
    """

    def __init__(self, edges: FloatArray) -> None:
        count = max(1, round(float(np.log2(edges[1] / edges[0]))))
        inner = np.geomspace(edges[0], edges[1], count + 1)[1:-1]
        self.edges = np.concatenate((edges[:1], inner, edges[1:]))
        first = self.edges[: count + 1]
        # Mean over each part, relative to the mean over the whole piece.
        power = 1 - _EARLY_FALL
        mean = np.diff(first**power) / np.diff(first)
        self._course = mean * (edges[1] - edges[0]) / (edges[1] ** power - edges[0] ** power)

    def folded(self, influence: FloatArray) -> FloatArray:
        """Integrals over all parts, [.., parts], to those over the pieces, [.., pieces]."""
        count = self._course.size
        return np.column_stack((influence[:, :count] @ self._course, influence[:, count:]))

    def unfolded(self, values: FloatArray) -> FloatArray:
        """Values of the pieces to values of all parts."""
        return np.concatenate((values[0] * self._course, values[1:]))


def _first_estimate(relative: FloatArray, goal: FloatArray) -> FloatArray:
    """Each distance's value if there were only this part and it were constant: averaged over the distances by how
    much a piece weighs in them. Shape [distances, pieces] to [pieces].
    """
    total = relative.sum(axis=1)
    seen = total > 0
    constant = np.maximum(goal[seen], 1e-3) / total[seen]
    if constant.size == 0:
        return np.zeros(relative.shape[1])
    share = relative[seen] / total[seen, None]
    weight = share.sum(axis=0)
    anywhere = float(np.exp(np.mean(np.log(constant))))
    return np.where(weight > 1e-9, share.T @ constant / np.where(weight > 1e-9, weight, 1.0), anywhere)


def _solve_scaled(
    influence: FloatArray, goal: FloatArray, scale: FloatArray, least: FloatArray, pieces: int
) -> FloatArray:
    """Non-negative least squares in units of `scale`, above `least`, for one part or both."""
    # The same least-squares problem with as many rows as unknowns.
    (triangle,) = linalg.qr(np.column_stack((influence, goal)), mode="r", check_finite=False)
    triangle = triangle[: scale.size + 1]
    jumps = np.diff(np.eye(scale.size), axis=0)
    if scale.size > pieces:
        jumps = np.delete(jumps, pieces - 1, axis=0)  # the last piece of one part and the first of the other
    left, right = (np.argmax(jumps == sign, axis=1) for sign in (-1, 1))
    jumps *= (_SMOOTHING / (np.sqrt(scale[left]) * np.sqrt(scale[right])))[:, None]
    factor = np.vstack((triangle[:, :-1], jumps))
    wanted = np.concatenate((triangle[:, -1], np.zeros(len(jumps)))) - factor @ least
    solution, _ = nnls(factor * scale, wanted, maxiter=100 * scale.size)
    return np.asarray(least + solution * scale, dtype=np.float64)


def _influence(edges: FloatArray, distances: Sequence[PairDistance]) -> tuple[FloatArray, FloatArray]:
    """Integrals of (tail_i - tail_j)^2 and of (p_i - p_j)^2 over each piece: shape [distances, pieces] each."""
    gamma = np.array([distance.gammas for distance in distances])
    times = np.array([distance.times for distance in distances])
    x, y = gamma[:, :1] + 1, gamma[:, 1:] + 1
    t, u = times[:, :1], times[:, 1:]
    # While both averages still take in values, their tails differ by (s/u)^y - (s/t)^x ...
    a, b = np.minimum(edges[:-1], u), np.minimum(edges[1:], u)
    walk = _moment(a, b, u, 2 * y) - 2 * _moment(a, b, u, y, t, x) + _moment(a, b, t, 2 * x)
    noise = _moment(a, b, u, 2 * y - 2) * (y / u) ** 2 + _moment(a, b, t, 2 * x - 2) * (x / t) ** 2
    noise -= 2 * _moment(a, b, u, y - 1, t, x - 1) * (x / t) * (y / u)
    # ... and after the earlier one's time by 1 - (s/t)^x.
    a, b = np.clip(edges[:-1], u, t), np.clip(edges[1:], u, t)
    walk = np.maximum(walk, 0.0) + np.maximum((b - a) - 2 * _moment(a, b, t, x) + _moment(a, b, t, 2 * x), 0.0)
    noise = np.maximum(noise, 0.0) + _moment(a, b, t, 2 * x - 2) * (x / t) ** 2
    return walk, noise


def _moment(
    a: FloatArray, b: FloatArray, t: FloatArray, p: FloatArray, u: FloatArray | None = None, q: FloatArray | None = None
) -> FloatArray:
    """Integral of (s/t)^p (s/u)^q from a to b, with 0 < a <= b <= t, u."""
    power = p + 1 if q is None else p + q + 1
    peak = b * (b / t) ** p
    if u is not None and q is not None:
        peak = peak * (b / u) ** q
    return np.asarray(peak * -np.expm1(-power * np.log(b / a)) / power, dtype=np.float64)
