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
import numpy.typing as npt

from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction.steps import Cells, Steps, unknown_steps

MOST_PIECES = 64
"""Pieces of training; with more snapshot times than that, several share a piece."""

_SMOOTHING = 0.1
"""Weight of relative jumps between neighbouring pieces, where 1 is that of a measurement's relative error."""

_TELLING = 1.5
"""Distances a piece from which on noise is told from the walk: one profile with its last two snapshots has nearly 2."""

_ANCHORING = 0.3
"""Weight of what was known before, where 1 is that of a measurement's relative error, for a piece of which no distance
tells anything. One that is told of by distances whose shares add up to 1 has none: the same measurements would count
twice, once for each snapshot that was written since."""

_MOST_PARTS = 96
"""Pieces and parts of them that a motion has at most when it is handed on."""

_LEAST_SHARE = 1e-5
"""Walk and noise stay above this share of a first estimate."""

_NO_NOISE = 1e-3
"""Noise that has a smaller part than this in every distance is none."""

_WIDEST = 40.0
_SEARCH = {"maxiter": 500, "maxfun": 1000, "maxcor": 20, "ftol": 1e-11, "gtol": 1e-6}


@dataclass(frozen=True, eq=False)
class Motion:
    """Summed over all elements of the weights, and constant on pieces of training. Time is counted in steps here,
    as `steps.Cells` do; where those are not known, in units of `t`.

    Attributes:
        edges: ends of the pieces in units of `t`, growing: shape [pieces + 1]. The first one is the time of the first
            update.
        walk: variance of the increments per step, v: shape [pieces].
        noise: intensity of the noise, variance times step, w: shape [pieces]; 0 where the distances are too few to
            tell it from the walk.
    """

    edges: FloatArray
    walk: FloatArray
    noise: FloatArray

    @classmethod
    def even(cls, t: float, variance: float, steps: Steps | None = None) -> Motion:
        """A walk of the given variance over (0, t]."""
        count = t if steps is None else float(steps.clock.step_at(t))
        return cls(np.array([0.0, t]), np.array([variance / count]), np.zeros(1))

    def handed_on(self) -> Motion:
        """The same with a bounded number of pieces, for a snapshot's header: of neighbours, the shortest are joined."""
        edges, walk, noise = (part.tolist() for part in (self.edges, self.walk, self.noise))
        while len(walk) > _MOST_PARTS:
            joined = min(range(len(walk) - 1), key=lambda k: edges[k + 2] - edges[k])
            first, second = edges[joined + 1] - edges[joined], edges[joined + 2] - edges[joined + 1]
            for values in (walk, noise):
                both = first * values[joined] + second * values[joined + 1]
                values[joined : joined + 2] = [both / (first + second)]
            del edges[joined + 1]
        return Motion(np.array(edges), _short(walk), _short(noise))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Motion) and all(
            np.array_equal(own, its) for own, its in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def on(self, edges: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Walk and noise on intervals that do not straddle an edge of the pieces: [K + 1] to [K] each.

        Before the first and after the last edge the nearest piece goes on.
        """
        middle = (edges[:-1] + edges[1:]) / 2
        piece = np.clip(np.searchsorted(self.edges, middle, side="right") - 1, 0, self.walk.size - 1)
        return self.walk[piece], self.noise[piece]


def _short(values: Sequence[float]) -> FloatArray:
    """Six digits, which are plenty, of each."""
    return np.array([float(f"{value:.6g}") for value in values])


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


def fit_motion(
    start: float,
    times: Sequence[float],
    distances: Sequence[PairDistance],
    steps: Steps | None = None,
    known: Motion | None = None,
) -> Motion:
    """The motion that explains measured distances.

    Least squares on relative residuals, with light smoothing between neighbouring pieces that is relative, too. A
    residual counts against the geometric mean of the distance and what the motion makes of it, so that too much and
    too little weigh the same, and distances of a network that stood still for a while do not outweigh all others; a
    jump counts against the geometric mean of its sides, so that a learning rate that falls a hundredfold may do so.

    Arguments:
        start: time of the first update.
        times: snapshot times after `start`; the pieces lie between them.
        distances: at least one, none of them `alike`. Noise is only told from the walk where there are enough of
            them: of two profiles, or over two intervals.
        steps: when the network moved; None where it is not known.
        known: what was found while snapshots were there that are gone now. Where no distance tells more, the motion
            stays as it was.
    """
    if known is not None and not known.walk.any():
        known = None  # it stood still: nothing to go on from
    course = _Course.first(start, times) if known is None else _Course.after(known, times)
    pieces = course.count
    squared = np.array([distance.squared for distance in distances])
    rounding = np.minimum(np.array([distance.rounding for distance in distances]) / squared, 1.0)
    cells = unknown_steps(course.edges) if steps is None else steps.cells(course.edges)
    part = np.clip(np.searchsorted(course.edges, cells.edges[:-1], side="right") - 1, 0, course.edges.size - 2)
    walk, noise = (
        _added_up(influence / squared[:, None], part) @ unit
        for influence, unit in zip(_influence(cells, distances), (course.walk, course.noise), strict=True)
    )
    both = len(distances) >= _TELLING * pieces or (known is not None and bool(known.noise.any()))
    influence = np.hstack([walk, noise] if both else [walk])
    found = _solve(influence, rounding, course.anchors[: influence.shape[1]], pieces)
    found = np.concatenate((found, np.zeros(2 * pieces - found.size)))
    return Motion(course.edges, course.walk @ found[:pieces], course.noise @ found[pieces:])


def _solve(influence: FloatArray, rounding: FloatArray, anchors: FloatArray, pieces: int) -> FloatArray:
    """The unknowns of the pieces, of the walk or of walk and noise: shape [unknowns]; 0 where nothing moved.

    With x = exp(u), a residual (x - y)^2 / (x y) is 2 cosh(u - log y) - 2: smooth in u, so that a quasi-Newton method
    finds the minimum, also where the motion changes by many orders of magnitude from one piece to the next.

    Arguments:
        influence: of each unknown on each distance, relative to it: shape [distances, unknowns].
        rounding: the part of each distance that is rounding.
        anchors: what each unknown is without distances that tell more; nan where there is nothing to say.
    """
    from scipy.optimize import minimize  # a plan needs none of it, and importing takes as long as planning

    told = np.isfinite(anchors)
    parts = np.split(influence, influence.shape[1] // pieces, axis=1)
    scale = np.concatenate([_first_estimate(own, 1 - rounding) for own in parts])
    scale = np.where(told & (anchors > 0), anchors, scale)
    if not np.all(scale > 0):
        return np.zeros(scale.size)
    lowest = np.log(_LEAST_SHARE * scale)
    shares = influence * scale
    coverage = np.sum(shares / np.maximum(np.sum(shares, axis=1, keepdims=True), _LEAST_SHARE), axis=0)
    hold = (_ANCHORING * np.clip(1 - coverage[told], 0, 1)) ** 2
    anchor = np.log(np.maximum(anchors[told], _LEAST_SHARE * scale[told]))
    left = np.delete(np.arange(scale.size - 1), np.arange(pieces - 1, scale.size - 1, pieces))

    def misfit(u: FloatArray) -> tuple[float, FloatArray]:
        x = np.exp(u)
        model = influence @ x + rounding  # each measured distance is 1
        slope = x * (influence.T @ (1 - model**-2))
        jump, off = u[left + 1] - u[left], u[told] - anchor
        pull = _SMOOTHING**2 * 2 * np.sinh(jump)
        slope[left + 1] += pull
        slope[left] -= pull
        slope[told] += hold * 2 * np.sinh(off)
        value = np.sum(model + 1 / model) + _SMOOTHING**2 * 2 * np.sum(np.cosh(jump))
        return float(value + 2 * hold @ np.cosh(off)), slope

    bounds = [(low, low + _WIDEST) for low in lowest]
    found = minimize(misfit, np.log(scale), jac=True, method="L-BFGS-B", bounds=bounds, options=_SEARCH)
    solution: FloatArray = np.exp(found.x)
    if np.all(influence[:, pieces:] @ solution[pieces:] < _NO_NOISE * (influence @ solution + rounding)):
        solution[pieces:] = 0.0
    return solution


def _piece_edges(start: float, times: Sequence[float]) -> FloatArray:
    inner = np.unique(np.asarray(times, dtype=np.float64))
    inner = inner[inner > start]
    if inner.size > MOST_PIECES:
        inner = inner[np.linspace(0, inner.size - 1, MOST_PIECES + 1).round().astype(int)[1:]]
    return np.concatenate(([start], inner)) if inner.size else np.array([start / 2, start])


_EARLY_FALL = 0.5
"""v and w fall as s**-0.5 up to the first snapshot. Networks move fastest at the very start (in one recorded run seven
tenths of v up to the first of twenty snapshots were in the first tenth of it), but not where the rate warms up."""


@dataclass(frozen=True)
class _Course:
    """Pieces of training, and the course of v and w within and between them when every unknown is 1.

    Attributes:
        edges: of all parts of the pieces: shape [parts + 1].
        walk, noise: what a piece's unknown makes of each part: shape [parts, pieces].
        anchors: values that the unknowns, first of the walk and then of the noise, have without distances; nan for
            none: shape [2 * pieces].
    """

    edges: FloatArray
    walk: FloatArray
    noise: FloatArray
    anchors: FloatArray

    @property
    def count(self) -> int:
        """How many pieces there are."""
        return int(self.walk.shape[1])

    @classmethod
    def first(cls, start: float, times: Sequence[float]) -> _Course:
        """Of a run of which nothing is known. The first piece, of which no snapshot tells, is cut into parts, each
        twice as long as the one before, over which v and w fall: see `_EARLY_FALL`.
        """
        pieces = _piece_edges(start, times)
        count = max(1, round(float(np.log2(pieces[1] / pieces[0]))))
        inner = np.geomspace(pieces[0], pieces[1], count + 1)[1:-1]
        edges = np.concatenate((pieces[:1], inner, pieces[1:]))
        first = edges[: count + 1]
        # Mean over each part, relative to the mean over the whole piece.
        power = 1 - _EARLY_FALL
        mean = np.diff(first**power) / np.diff(first)
        unit = np.zeros((edges.size - 1, pieces.size - 1))
        unit[:count, 0] = mean * (pieces[1] - pieces[0]) / (pieces[1] ** power - pieces[0] ** power)
        unit[count:, 1:] = np.eye(pieces.size - 2)
        return cls(edges, unit, unit, np.full(2 * unit.shape[1], np.nan))

    @classmethod
    def after(cls, known: Motion, times: Sequence[float]) -> _Course:
        """Of a run of which a motion is known: the unknowns are relative to it, and new pieces go on as its last one.

        Noise that was not seen is no factor of what there is now: it is relative to the mean.
        """
        edges, walk, noise = known.edges, known.walk, known.noise
        later = np.unique([t for t in times if t > edges[-1]])
        ones = np.concatenate((np.ones(walk.size), np.full(later.size, np.nan)))
        walk = np.maximum(walk, _LEAST_SHARE * walk.max(initial=0.0))
        unit = np.maximum(noise, noise.mean())
        seen = np.divide(noise, unit, out=np.zeros_like(noise), where=unit > 0)
        unit = np.where(unit > 0, unit, walk[-1])
        longer = [np.diag(np.append(own, np.full(later.size, own[-1]))) for own in (walk, unit)]
        seen = np.concatenate((seen, np.full(later.size, np.nan)))
        return cls(np.concatenate((edges, later)), longer[0], longer[1], np.concatenate((ones, seen)))


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


def _influence(cells: Cells, distances: Sequence[PairDistance]) -> tuple[FloatArray, FloatArray]:
    """What a walk and a noise of intensity 1 in one interval add to each distance: shape [distances, K] each."""
    gamma = np.array([distance.gammas for distance in distances])
    times = np.array([distance.times for distance in distances])
    walk, noise = _integrals(cells.edges, gamma, times)
    walk, noise = walk * cells.density, noise * cells.duration
    if cells.interval.size:
        tails = cells.tails(gamma[:, 0], times[:, 0]) - cells.tails(gamma[:, 1], times[:, 1])
        masses = cells.masses(gamma[:, 0], times[:, 0]) - cells.masses(gamma[:, 1], times[:, 1])
        np.add.at(walk.T, cells.interval, cells.stride * tails**2)
        np.add.at(noise.T, cells.interval, masses**2 / cells.stride)
    return walk, noise


def _integrals(edges: FloatArray, gamma: FloatArray, times: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Integrals of (tail_i - tail_j)^2 and of (p_i - p_j)^2 over each interval: shape [distances, K] each."""
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


def _added_up(columns: FloatArray, group: npt.NDArray[np.intp]) -> FloatArray:
    """Sums of columns, [.., K], by the group of each, which grow: shape [.., groups]."""
    return np.asarray(np.add.reduceat(columns, np.flatnonzero(np.diff(group, prepend=-1)), axis=1))


def _moment(
    a: FloatArray, b: FloatArray, t: FloatArray, p: FloatArray, u: FloatArray | None = None, q: FloatArray | None = None
) -> FloatArray:
    """Integral of (s/t)^p (s/u)^q from a to b, with 0 < a <= b <= t, u."""
    power = p + 1 if q is None else p + q + 1
    peak = b * (b / t) ** p
    if u is not None and q is not None:
        peak = peak * (b / u) ** q
    return np.asarray(peak * -np.expm1(-power * np.log(b / a)) / power, dtype=np.float64)
