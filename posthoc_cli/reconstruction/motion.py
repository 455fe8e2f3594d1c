"""The motion of the network: fitted to the measured distances between its averages, and sketched by the hook.

Model: the weights follow a random walk with independent increments of variance v(s) ds, which depends on the learning
rate, plus noise of intensity w(s) whose memory is shorter than the time between snapshots, as of a network that is
pulled back to its path. An average is theta_i = integral p_i(s) theta(s) ds = theta(0) + integral tail_i(s) d theta(s).
The expected squared distance of two averages, one of them stored with a rounding error of variance r_j, is

    E |theta_i - theta_j|^2 = integral v (tail_i - tail_j)^2 ds + integral w (p_i - p_j)^2 ds + r_j,

linear in v and w. With both constant on segments of training, every measured distance is a linear equation for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from posthoc_cli.profiles import LONGEST, WINDOW, FloatArray, PowerFunction, Profile, StoredProfile
from posthoc_cli.reconstruction.basis import (
    Cells,
    Densities,
    Steps,
    Tails,
    are_powers,
    cells_between,
    gammas_and_times,
)

# --- motion ----------------------------------------------------------------------------------------

ASSUMED_STRETCH = 0.25
"""Assumed root mean square length of the walk over all of training, relative to the norm of the weights. Recorded runs
have 0.01 (learning rate decayed to almost 0) to 0.45 (constant learning rate)."""


@dataclass(frozen=True, eq=False)
class Motion:
    """Walk and noise, summed over all elements of the weights, constant on each segment of training.

    Attributes:
        edges: ends of the segments, in units of `t`, ascending: shape [segments + 1]. The first is the time of the
            first update.
        walk: variance of the increments per step, v: shape [segments]; per unit of `t` if the steps are unknown.
        noise: intensity of the noise, variance times step, w: shape [segments]; 0 with too few distances.
    """

    edges: FloatArray
    walk: FloatArray
    noise: FloatArray

    @classmethod
    def even(cls, t: float, variance: float = ASSUMED_STRETCH**2, steps: Steps | None = None) -> Motion:
        """Return a constant walk of total `variance` over (0, t], relative to the squared norm, without noise."""
        count = t if steps is None else float(steps.clock.step_at(t))
        return cls(np.array([0.0, t]), np.array([variance / count]), np.zeros(1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Motion) and all(
            np.array_equal(a, b) for a, b in zip(vars(self).values(), vars(other).values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def on(self, edges: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return walk and noise on intervals, each within one segment: [K + 1] to [K] each.

        The first and the last segment extend beyond their outer edges.
        """
        middle = (edges[:-1] + edges[1:]) / 2
        segment = np.clip(np.searchsorted(self.edges, middle, side="right") - 1, 0, self.walk.size - 1)
        return self.walk[segment], self.noise[segment]


@dataclass(frozen=True)
class PairDistance:
    """A measured squared distance between two averages, above 0, and the part of it that comes from rounding."""

    later: StoredProfile
    earlier: StoredProfile
    squared: float
    rounding: float

    @property
    def same_profile(self) -> bool:
        """Whether both are one power function up to rounding, so that no motion explains a distance."""
        a, b = self.later, self.earlier
        if not (isinstance(a, PowerFunction) and isinstance(b, PowerFunction)):
            return False
        return abs(a.gamma - b.gamma) <= 1e-6 * (a.gamma + 1) and a.t - b.t <= 1e-9 * a.t


# --- the fit ---------------------------------------------------------------------------------------

MOST_SEGMENTS = 64
"""Limit of the number of segments; of more snapshot times, several share a segment."""

_DISTANCES_FOR_NOISE = 1.5
"""Number of distances per segment from which on noise is fitted, too. One profile whose snapshots each have distances
to the two previous ones has nearly 2."""

_FIRST, _UPDATES = (1.0, 0.1), 1000
"""First walk and noise, each relative to what would explain the distances alone, and the number of updates of a fit.
Of 120 averages of checkpoints, all were within 2 of the predicted error, with a first noise of 1 or 0.01 99 %, and with
100 updates in place of 300 to 3,000 93 %."""


def fit_motion(
    start: float,
    times: Sequence[float],
    distances: Sequence[PairDistance],
    steps: Steps | None = None,
    may_have_noise: bool = True,
) -> Motion:
    """Return the motion that explains measured distances best.

    Minimises the sum of (model - 1)^2 / model, where model is an expected distance relative to the measured one, so
    that too large and too small fits cost the same, and the distances of a pause do not outweigh all others. The model
    is linear in the unknowns x >= 0, model = A x + rounding, and the sum convex. Replacing 1 / model by its bound from
    Jensen's inequality, which is exact at the current x, gives the multiplicative update

        x_j <- x_j sqrt(sum_i A_ij / model_i^2 / sum_i A_ij),

    which never increases the sum.

    Arguments:
        start: time of the first update.
        times: snapshot times; those after `start` bound the segments.
        distances: at least one, none of them with `same_profile`. With enough distances noise is fitted, too: it makes
            successive intervals differ more than a walk does.
        steps: of the run; None if unknown.
        may_have_noise: False where all distances carry the same information about an interval.
    """
    edges = _joined(np.unique([start, *(t for t in times if t > start)]))
    if edges.size == 1:
        edges = np.array([start / 2, start])
    segments = edges.size - 1
    cells, walks, noises, rounding = influences(edges, distances, steps)
    segment = np.clip(np.searchsorted(edges, cells.edges[:-1], side="right") - 1, 0, segments - 1)
    first = np.flatnonzero(np.diff(segment, prepend=-1))  # the first cell of each segment
    # Averages that should be equal, and differ, are not what their files say: no motion explains them.
    explained = walks.any(axis=1) | (rounding > 0)
    kinds = [walks, noises] if may_have_noise and len(distances) >= _DISTANCES_FOR_NOISE * segments else [walks]
    influence = np.hstack([np.add.reduceat(kind[explained], first, axis=1) for kind in kinds])
    rounding = rounding[explained]
    unknowns = np.zeros(2 * segments)
    if influence.any():
        total = influence.sum(axis=0)
        # The same walk everywhere, as large as the distances are in the mean, and far less noise.
        parts = zip(_FIRST, np.hsplit(influence, len(kinds)), strict=False)
        levels = [share / max(part.sum(axis=1).mean(), 1e-300) for share, part in parts]
        x = np.repeat(levels, segments)
        for _ in range(_UPDATES):
            model = np.maximum(influence @ x + rounding, 1e-12)
            x *= np.sqrt(np.divide(model**-2 @ influence, total, out=np.ones_like(total), where=total > 0))
        unknowns[: x.size] = x
    return Motion(edges, unknowns[:segments], unknowns[segments:])


def _joined(edges: FloatArray) -> FloatArray:
    """Return the ends of at most `MOST_SEGMENTS` intervals, evenly chosen among the edges."""
    places = np.linspace(0, edges.size - 1, min(edges.size, MOST_SEGMENTS + 1)).round().astype(np.intp)
    return np.asarray(edges[places])


# --- integrals -------------------------------------------------------------------------------------


def influences(
    edges: FloatArray, distances: Sequence[PairDistance], steps: Steps | None
) -> tuple[Cells, FloatArray, FloatArray, FloatArray]:
    """Return the cells between `edges`, and the contributions to each measured distance, relative to it.

    These are a walk and a noise of intensity 1 in each cell alone, [distances, K] each, and rounding, [distances].
    """
    later, earlier = [distance.later for distance in distances], [distance.earlier for distance in distances]
    cells = cells_between(edges, {*later, *earlier}, steps)
    if are_powers(later) and are_powers(earlier):
        walk, noise = _integrals(cells.edges, later, earlier)
    else:
        walk, noise = (_by_basis(kind, cells.edges, later, earlier) for kind in (Tails, Densities))
    walk, noise = walk * cells.density, noise * cells.duration
    if cells.interval.size:
        np.add.at(walk.T, cells.interval, cells.stride * (cells.tails(later) - cells.tails(earlier)) ** 2)
        np.add.at(noise.T, cells.interval, (cells.masses(later) - cells.masses(earlier)) ** 2 / cells.stride)
    squared, rounding = np.array([(distance.squared, distance.rounding) for distance in distances]).T
    walk, noise = (np.maximum(influence, 0.0) / squared[:, None] for influence in (walk, noise))
    return cells, walk, noise, np.minimum(rounding / squared, 1.0)


def expected_distances(motion: Motion, distances: Sequence[PairDistance], steps: Steps | None) -> FloatArray:
    """Return the distances that are expected with this motion, relative to the measured ones: shape [distances]."""
    cells, walks, noises, rounding = influences(motion.edges, distances, steps)
    walk, noise = motion.on(cells.edges)
    return np.asarray(walks @ walk + noises @ noise + rounding)


def _by_basis(
    kind: type[Tails | Densities],
    edges: FloatArray,
    later: Sequence[StoredProfile],
    earlier: Sequence[StoredProfile],
) -> FloatArray:
    """Return integrals of squared differences of tails or densities over each interval: shape [distances, K]."""
    profiles = list(dict.fromkeys((*later, *earlier)))
    rows = dict(zip(profiles, np.moveaxis(kind(profiles, edges).of_stored(profiles), 2, 0), strict=True))
    pairs = zip(later, earlier, strict=True)
    return np.stack([np.sum((rows[a] - rows[b]) ** 2, axis=1) for a, b in pairs])


def _integrals(
    edges: FloatArray, later: Sequence[PowerFunction], earlier: Sequence[PowerFunction]
) -> tuple[FloatArray, FloatArray]:
    """Return integrals of (tail_i - tail_j)^2 and of (p_i - p_j)^2 over each interval: shape [distances, K] each."""
    (x, t), (y, u) = ((gamma[:, None] + 1, time[:, None]) for gamma, time in map(gammas_and_times, (later, earlier)))
    # Up to the earlier time the tails differ by (s/u)^y - (s/t)^x ...
    a, b = np.minimum(edges[:-1], u), np.minimum(edges[1:], u)
    walk = _moment(a, b, u, 2 * y) - 2 * _moment(a, b, u, y, t, x) + _moment(a, b, t, 2 * x)
    noise = _moment(a, b, u, 2 * y - 2) * (y / u) ** 2 + _moment(a, b, t, 2 * x - 2) * (x / t) ** 2
    noise -= 2 * _moment(a, b, u, y - 1, t, x - 1) * (x / t) * (y / u)
    # ... and after it by 1 - (s/t)^x.
    a, b = np.clip(edges[:-1], u, t), np.clip(edges[1:], u, t)
    walk = np.maximum(walk, 0.0) + np.maximum((b - a) - 2 * _moment(a, b, t, x) + _moment(a, b, t, 2 * x), 0.0)
    noise = np.maximum(noise, 0.0) + _moment(a, b, t, 2 * x - 2) * (x / t) ** 2
    return walk, noise


def _moment(
    a: FloatArray, b: FloatArray, t: FloatArray, p: FloatArray, u: FloatArray | float = 1.0, q: FloatArray | float = 0.0
) -> FloatArray:
    """Return the integral of (s/t)^p (s/u)^q from a to b, with 0 < a <= b <= t, u."""
    peak = b * (b / t) ** p * (b / u) ** q
    return np.asarray(peak * -np.expm1(-(p + q + 1) * np.log(b / a)) / (p + q + 1), dtype=np.float64)


# --- the sketch ------------------------------------------------------------------------------------

_POINTS = 4
"""Number of points in a window at which tails are evaluated."""


@dataclass(frozen=True, eq=False)
class Sketch:
    """The path of the weights as the hook measured it: random projections of their mean over each window of updates.

    The projection S is fixed and linear, and preserves squared lengths in expectation: D numbers do up to a factor
    1 +- sqrt(2 / D). Let m_k be the mean of the k-th window and x_k = S m_k. Coefficients c give that window the mass
    g_k = sum_i c_i P_i(k) - P(k) too much, so that their error is measured, whatever the motion is:

        |error|^2 = |sum_k g_k m_k|^2 ~ |sum_k g_k x_k|^2 = |sum_k G_k (x_k+1 - x_k)|^2,    G = sum_i c_i tail_i - tail,

    with G at the ends of the windows. That assumes that G is linear within a window: the shorter the windows, the more
    exact it is. Within window k, G departs from the line by b_k in the mean, and the motion there is inferred from its
    neighbours. Steady motion, from the previous window to the next one, adds b_k times itself to the error. The rest is
    unseen: motion that the neighbours do not predict, as of a walk, and the part of the window's spread that is not
    steady motion, as of noise.

    Attributes:
        edges: the time of the first update, then that of the last update in each window: shape [K + 1].
        folds: the number of folds in each window: shape [K].
        means: projected mean of each window: shape [K, D].
        spread: mean squared distance of the folds' weights from their window's mean: shape [K].
    """

    edges: FloatArray
    folds: FloatArray
    means: FloatArray
    spread: FloatArray

    def measured(self, profiles: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        """Return a column per profile whose combinations are errors: projected, [D, n], and unseen, [K + 2, n].

        The projected columns are the averages, relative to the weights of the first window.
        """
        tails = np.stack([profile.tail(self.edges) for profile in profiles], axis=1)
        within = np.stack(
            [profile.tail(self._within).reshape(-1, _POINTS).mean(axis=1) for profile in profiles], axis=1
        )
        bend = within - (tails[1:] + tails[:-1]) / 2
        seen = np.diff(self.means, axis=0).T @ tails[1:-1] + self._steady.T @ bend
        # Noise may be equal in all windows, as of weights that alternate: then its contributions add up.
        aligned = self._noise @ bend
        # The mass of the first update lies on one value, not on the mean of its window.
        first = np.sqrt(self.spread[0]) * tails[0]
        return seen, np.vstack((np.hypot(self._walk, self._noise)[:, None] * bend, aligned, first))

    def of_shared_means(
        self, profiles: Sequence[PowerFunction], largest: float, updates: FloatArray
    ) -> tuple[FloatArray, FloatArray]:
        """Return the errors of averages that share means with the weights of the `largest` gamma: projected, unseen.

        The shapes are [D, n] and [K, n]. Within a fold of relative length L the shared weights are steeper by
        u = (largest - gamma) L. If the fold has the mass m in an average, the error contains u m / 12 of the steady
        motion across the fold, which projections show. To the squared error, noise that leaves the variance s in a
        fold's mean adds u^2 m^2 s / 12, and a walk of variance v across the fold u^2 m^2 v / 120, a third of it seen as
        steady motion. Averages of one profile share the errors of their common folds. `updates` counts the updates
        until each edge: folds of two are exact, since the newest value has each profile's own weight, and early in a
        run means are not shared.
        """
        counts = np.maximum(np.diff(updates) / self.folds, 2.0)
        part = (counts - 1) * (counts - 2) / counts**2
        length = np.diff(self.edges) / self.folds / self.edges[1:]
        steeper = np.array([largest - profile.gamma for profile in profiles])
        masses = -np.diff(np.stack([profile.tail(self.edges) for profile in profiles], axis=1), axis=0)
        late = np.logical_or.accumulate((length > 0) & (length * WINDOW <= LONGEST * counts))
        part = np.where(late, part, 0.0)
        bend = (part * length / self.folds / 12)[:, None] * steeper * masses
        # For n folds, each with noise s and a walk v, `_beyond` is s (1 - 1/n) (1 - (1 + 1/n) / (24 n)) +
        # 19/144 v (n - 1/n), and `_squares` is 6 s / n + v n.
        n = np.maximum(self.folds, 2.0)
        noise = np.maximum(self._beyond - 19 / 144 * self._inner * self._squares, 0.0)
        noise /= (1 - 1 / n) * (1 - 5 / 6 * (1 + 1 / n) / n)
        walk = np.maximum(self._squares - 6 * noise / n, 0.0) / n
        unseen = 12 * noise / np.where(part > 0, part, 1.0) + 144 / 120 * 2 / 3 * walk
        return self._across.T @ bend, np.sqrt(unseen * self.folds)[:, None] * bend

    def motion(self, steps: Steps | None) -> Motion:
        """Return the walk that the path makes beyond its main direction, without noise.

        A projection shows motion in one direction fully, and coefficients fitted to it are right; a walk in many
        directions has errors in those that it does not show. Without that distinction errors of oscillations are up to
        400 times larger; leaving out 4 or 16 directions in place of 1 makes a few ordinary ones larger.
        """
        edges = _joined(self.edges[np.diff(self.edges, prepend=-np.inf) > 0])
        if edges.size < 2:
            return Motion(np.array([self.edges[0] / 2, self.edges[0]]), np.zeros(1), np.zeros(1))
        counts = np.diff(edges if steps is None else steps.clock.step_at(edges))
        ends = np.searchsorted(self.edges[1:], edges[1:], side="right")
        squares = self._squares_of(_beyond_main_direction(self._misses))
        return Motion(edges, np.diff(np.append(0.0, np.cumsum(squares))[ends], prepend=0.0) / counts, 0 * counts)

    @cached_property
    def _within(self) -> FloatArray:
        """Times within the windows: shape [K * _POINTS]."""
        place = (np.arange(_POINTS) + 0.5) / _POINTS
        return (self.edges[:-1, None] + np.diff(self.edges)[:, None] * place).ravel()

    @cached_property
    def _inner(self) -> FloatArray:
        """The share of a window's motion that lies inside it and not at its ends, 0 for a single fold: shape [K]."""
        return np.asarray(1 - 1 / self.folds**2)

    @cached_property
    def _middle(self) -> FloatArray:
        return (self.edges[1:] + self.edges[:-1]) / 2

    @cached_property
    def _across(self) -> FloatArray:
        """Projected steady motion across each window: shape [K, D]."""
        if len(self.means) < 2:
            return np.zeros_like(self.means)
        return np.asarray(np.gradient(self.means, self._middle, axis=0) * np.diff(self.edges)[:, None])

    @cached_property
    def _steady(self) -> FloatArray:
        return self._across * self._inner[:, None]

    @cached_property
    def _walk(self) -> FloatArray:
        """Size of the unseen part of a walk, for b = 1: shape [K].

        G, a parabola within a window, has the mean square departure 6/5 b^2 from its line.
        """
        return np.sqrt(6 / 5 * self._inner * self._squares)

    @cached_property
    def _squares(self) -> FloatArray:
        """Squared length of a walk across each window: shape [K]."""
        return self._squares_of(self._misses)

    def _squares_of(self, misses: FloatArray) -> FloatArray:
        """Return the squared lengths that misses stand for; the first and the last window are like their neighbours."""
        squares = np.sum(misses**2, axis=1)
        if len(self.means) < 3:
            return np.full(len(self.means), squares.sum())
        return np.pad(squares, 1, mode="edge")

    @cached_property
    def _misses(self) -> FloatArray:
        """Twice the differences between inner windows' means and the line between their neighbours': shape [K - 2, D].

        A walk of variance V across a window has the expected square V. Of two windows, the difference of their means.
        """
        if len(self.means) < 3:
            return np.diff(self.means, axis=0)
        place = (self._middle[1:-1] - self._middle[:-2]) / (self._middle[2:] - self._middle[:-2])
        line = self.means[:-2] + (self.means[2:] - self.means[:-2]) * place[:, None]
        return np.asarray(2 * (self.means[1:-1] - line))

    @cached_property
    def _noise(self) -> FloatArray:
        """Size of the unseen part of noise, for b = 1: squared, 12 s / n for n folds of variance s: shape [K]."""
        return np.asarray(np.sqrt(12 * self._beyond / np.maximum(self.folds - 1, 1)))

    @cached_property
    def _beyond(self) -> FloatArray:
        """The part of each window's spread that is not steady motion: shape [K]."""
        return np.asarray(np.maximum(self.spread - self._inner * np.sum(self._across**2, axis=1) / 12, 0.0))


def _beyond_main_direction(rows: FloatArray) -> FloatArray:
    """Return rows of projections, [K, D], without their main direction, scaled up as if it had been an average one."""
    if not rows.any():
        return rows
    main = np.linalg.svd(rows, full_matrices=False)[2][:1]
    return np.asarray((rows - rows @ main.T @ main) * np.sqrt(rows.shape[1] / (rows.shape[1] - 1)))
