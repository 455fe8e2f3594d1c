"""The motion of the network: fitted to the measured distances between its averages, and sketched by the hook.

Model: the weights follow a random walk with independent increments of variance v(s) ds, which depends on the learning
rate, plus noise of intensity w(s) whose memory is shorter than the time between snapshots, as of a network that is
pulled back to its path. An average is theta_i = integral p_i(s) theta(s) ds = theta(0) + integral tail_i(s) d theta(s).
The expected squared distance of two averages, one of them stored with a rounding error of variance r_j, is

    E |theta_i - theta_j|^2 = integral v (tail_i - tail_j)^2 ds + integral w (p_i - p_j)^2 ds + r_j,

linear in v and w. With both constant on segments of training, every measured distance is a linear equation for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from posthoc_cli.profiles import FloatArray, PowerFunction, Profile, StoredProfile
from posthoc_cli.profiles.tracked import LONGEST, WINDOW
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

_MOST_STORED = 96
"""Limit of the number of segments in a snapshot's header."""


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

    def handed_on(self) -> Motion:
        """Return the motion for a snapshot's header: six digits, the shortest neighbours joined down to a limit."""
        edges, walk, noise = (values.tolist() for values in (self.edges, self.walk, self.noise))
        while len(walk) > _MOST_STORED:
            k = min(range(len(walk) - 1), key=lambda k: edges[k + 2] - edges[k])
            first, second = edges[k + 1] - edges[k], edges[k + 2] - edges[k + 1]
            for values in (walk, noise):
                values[k : k + 2] = [(first * values[k] + second * values[k + 1]) / (first + second)]
            del edges[k + 1]
        walk, noise = ([float(f"{value:.6g}") for value in values] for values in (walk, noise))
        return Motion(np.array(edges), np.array(walk), np.array(noise))

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

_SMOOTHING = 0.1
"""Penalty on the logarithm of a jump between neighbouring segments, relative to that on a measurement's residual."""

_DISTANCES_FOR_NOISE = 1.5
"""Number of distances per segment from which on noise is fitted, too. One profile whose snapshots each have distances
to the two previous ones has nearly 2."""

_ANCHORING = 0.3
"""Weight of an earlier estimate in a segment without measurements, relative to that of a measurement's residual. It
falls to 0 where the shares of distances add up to 1, since the earlier estimate comes from the same measurements."""

_LEAST_SHARE = 1e-5
"""Lower limit of walk and noise, relative to the first estimate."""

_NO_NOISE = 1e-3
"""Noise whose share is below this in every distance is set to 0."""

_NOISE_LATER = 5.0
"""The search starts with noise below its first estimate by this logarithm. Local minima exist in which noise replaces a
walk that jumps: 7 of 352 fits to re-initialized layers ended in such a minimum, 4 of these with errors up to ten times
the predicted ones. With this start 3 fits did, all within 0.05 % of the lowest minimum known."""

_WIDEST = 40.0
"""Width of the range in which an unknown's logarithm is searched."""

_MOST_STEPS, _LEAST_GAIN, _DAMPING, _MOST_DAMPING = 500, 1e-14, 1e-3, 1e12


def fit_motion(
    start: float,
    times: Sequence[float],
    distances: Sequence[PairDistance],
    steps: Steps | None = None,
    known: Motion | None = None,
    may_have_noise: bool = True,
) -> Motion:
    """Return the motion that explains measured distances best.

    Minimises squared relative residuals, with weak smoothing between neighbouring segments. A residual is relative to
    the geometric mean of the measured and the fitted distance, so that too large and too small fits cost the same, and
    the distances of a pause do not outweigh all others. Smoothing penalises the logarithm of the ratio of neighbours,
    so that a segment in which training stands still, with tiny distances, has little influence on the next segment.

    Arguments:
        start: time of the first update.
        times: snapshot times; those after `start` bound the segments.
        distances: at least one, none of them with `same_profile`. With enough distances noise is fitted, too: it makes
            successive intervals differ more than a walk does.
        steps: of the run; None if unknown.
        known: an earlier estimate, from snapshots that may have been deleted. It is kept where distances add nothing.
        may_have_noise: False where all distances carry the same information about an interval.
    """
    if known is not None and not known.walk.any():
        known = None  # a standstill is no estimate of later motion
    edges, walk, noise, anchors = _first_course(start, times) if known is None else _course_after(known, times)
    segments = walk.size
    cells, walks, noises, rounding = influences(edges, distances, steps)
    segment = np.clip(np.searchsorted(edges, cells.edges[:-1], side="right") - 1, 0, segments - 1)
    first = np.flatnonzero(np.diff(segment, prepend=-1))  # the first cell of each segment
    # Averages that should be equal, and differ, are not what their files say: no motion explains them.
    explained = walks.any(axis=1) | (rounding > 0)
    walks, noises, rounding = walks[explained], noises[explained], rounding[explained]
    influence = np.add.reduceat(walks, first, axis=1) * walk
    knows_noise = len(distances) >= _DISTANCES_FOR_NOISE * segments or (known is not None and known.noise.any())
    if knows_noise and may_have_noise:
        influence = np.hstack((influence, np.add.reduceat(noises, first, axis=1) * noise))
    unknowns = np.zeros(2 * segments)
    unknowns[: influence.shape[1]] = _solve(influence, rounding, anchors[: influence.shape[1]], segments)
    return Motion(edges, walk * unknowns[:segments], noise * unknowns[segments:])


# The parametrisation of a fit: the edges of the segments, the units of v and of w in each segment, [segments] each, and
# earlier estimates of the unknowns (v, then w, in these units), nan where there are none, [2 * segments].
_Course = tuple[FloatArray, FloatArray, FloatArray, FloatArray]


def _first_course(start: float, times: Sequence[float]) -> _Course:
    """Return the parametrisation without an earlier estimate: segments between snapshot times, units of 1."""
    inner = np.unique([t for t in times if t > start])
    if inner.size > MOST_SEGMENTS:
        inner = inner[np.linspace(0, inner.size - 1, MOST_SEGMENTS + 1).round().astype(int)[1:]]
    edges = np.concatenate(([start], inner)) if inner.size else np.array([start / 2, start])
    ones = np.ones(edges.size - 1)
    return edges, ones, ones, np.full(2 * ones.size, np.nan)


def _course_after(known: Motion, times: Sequence[float]) -> _Course:
    """Return the parametrisation in units of an earlier estimate, with noise at least at its mean."""
    later = np.unique([t for t in times if t > known.edges[-1]])
    unseen = np.full(later.size, np.nan)
    walk = np.maximum(known.walk, _LEAST_SHARE * known.walk.max())
    noise = np.maximum(known.noise, known.noise.mean())
    seen = np.divide(known.noise, noise, out=np.zeros_like(noise), where=noise > 0)
    noise = np.where(noise > 0, noise, walk[-1])
    walk, noise = (np.append(units, np.full(later.size, units[-1])) for units in (walk, noise))
    return np.append(known.edges, later), walk, noise, np.concatenate((np.ones(seen.size), unseen, seen, unseen))


def _solve(influence: FloatArray, rounding: FloatArray, anchors: FloatArray, segments: int) -> FloatArray:
    """Return the unknowns of all segments, for the walk or for walk and noise: shape [unknowns]; 0 without motion.

    With x = exp(u), a residual (x - y)^2 / (x y) is 2 cosh(u - log y) - 2, smooth in u, so that Newton's method finds
    the minimum even if the motion changes by many orders of magnitude between segments. `influence`, [distances,
    unknowns], and `rounding`, [distances], are relative to the distances; `anchors` are earlier estimates, or nan.
    """
    anchored = np.isfinite(anchors)
    kinds = np.split(influence, influence.shape[1] // segments, axis=1)
    scale = np.concatenate([_first_estimate(kind, 1 - rounding) for kind in kinds])
    scale = np.where(anchored & (anchors > 0), anchors, scale)
    if not np.all(scale > 0):
        return np.zeros(scale.size)
    lowest = np.log(_LEAST_SHARE * scale)
    shares = influence * scale
    coverage = np.sum(shares / np.maximum(np.sum(shares, axis=1, keepdims=True), _LEAST_SHARE), axis=0)
    hold = (_ANCHORING * np.clip(1 - coverage[anchored], 0, 1)) ** 2
    anchor = np.log(np.maximum(anchors[anchored], _LEAST_SHARE * scale[anchored]))
    left = np.delete(np.arange(scale.size - 1), np.arange(segments - 1, scale.size - 1, segments))

    def objective(u: FloatArray) -> tuple[float, FloatArray, FloatArray]:
        """Return the sum of squared residuals and penalties, up to a constant, its gradient and its Hessian."""
        x = np.exp(u)
        model = influence @ x + rounding  # each measured distance is 1
        jump, off = u[left + 1] - u[left], u[anchored] - anchor
        value = np.sum(model + 1 / model) + _SMOOTHING**2 * np.sum(jump**2) + 2 * hold @ np.cosh(off)
        slope, each = x * (influence.T @ (1 - model**-2)), influence * x
        curvature = each.T @ (2 * model[:, None] ** -3 * each) + np.diag(slope)
        pull, stiffness = 2 * _SMOOTHING**2 * jump, 2 * _SMOOTHING**2
        for side, sign in ((left, -1), (left + 1, 1)):
            slope[side] += sign * pull
            curvature[side, side] += stiffness
            curvature[side, side - sign] -= stiffness
        slope[anchored] += 2 * hold * np.sinh(off)
        curvature[anchored, anchored] += 2 * hold * np.cosh(off)
        return float(value), slope, curvature

    start = np.log(scale)
    start[segments:] -= _NOISE_LATER
    solution = np.exp(_minimum(objective, start, lowest, lowest + _WIDEST))
    if np.all(influence[:, segments:] @ solution[segments:] < _NO_NOISE * (influence @ solution + rounding)):
        solution[segments:] = 0.0
    return solution


def _minimum(
    function: Callable[[FloatArray], tuple[float, FloatArray, FloatArray]],
    u: FloatArray,
    low: FloatArray,
    high: FloatArray,
) -> FloatArray:
    """Return a local minimum between bounds, starting at `u`, by Newton's method with Levenberg's damping.

    `function` returns its value, gradient and Hessian. SciPy's search is not used: importing it takes longer than
    everything else that a command does before it reads tensors.
    """
    value, slope, curvature = function(u)
    damping = _DAMPING
    for _ in range(_MOST_STEPS):
        free = np.flatnonzero(((u > low) | (slope < 0)) & ((u < high) | (slope > 0)))
        damped = curvature[np.ix_(free, free)] + damping * np.diag(np.abs(np.diag(curvature)[free]))
        trial, at_trial = u.copy(), None
        with suppress(np.linalg.LinAlgError):  # the Hessian is not positive definite
            np.linalg.cholesky(damped)
            step = np.linalg.solve(damped, slope[free])
            if slope[free] @ step <= _LEAST_GAIN * value:
                break
            trial[free] = np.clip(u[free] - step, low[free], high[free])
            at_trial = function(trial)
        if at_trial is not None and at_trial[0] < value:
            u, (value, slope, curvature), damping = trial, at_trial, damping / 10
        elif (damping := 10 * damping) > _MOST_DAMPING:
            break
    return u


def _first_estimate(relative: FloatArray, goal: FloatArray) -> FloatArray:
    """Return, for each segment, the mean of the constant walks (or noises) that single distances imply.

    Each counts by the segment's share in its distance; `goal` is the part of each distance to explain: [distances].
    """
    total = relative.sum(axis=1)
    seen = total > 0
    if not seen.any():
        return np.zeros(relative.shape[1])
    constant, share = np.maximum(goal[seen], 1e-3) / total[seen], relative[seen] / total[seen, None]
    weight = share.sum(axis=0)
    anywhere = np.full(weight.size, np.exp(np.mean(np.log(constant))))
    return np.asarray(np.divide(share.T @ constant, weight, out=anywhere, where=weight > 1e-9))


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
        """Squared length of a walk across each window: shape [K].

        For a walk of variance V across a window, its mean misses the line between the neighbours' means by V / 4.
        """
        squares = np.full(len(self.means), np.sum(np.diff(self.means, axis=0) ** 2))
        if len(self.means) > 2:
            place = (self._middle[1:-1] - self._middle[:-2]) / (self._middle[2:] - self._middle[:-2])
            line = self.means[:-2] + (self.means[2:] - self.means[:-2]) * place[:, None]
            squares = np.pad(4 * np.sum((self.means[1:-1] - line) ** 2, axis=1), 1, mode="edge")
        return np.asarray(squares, dtype=np.float64)

    @cached_property
    def _noise(self) -> FloatArray:
        """Size of the unseen part of noise, for b = 1: squared, 12 s / n for n folds of variance s: shape [K]."""
        return np.asarray(np.sqrt(12 * self._beyond / np.maximum(self.folds - 1, 1)))

    @cached_property
    def _beyond(self) -> FloatArray:
        """The part of each window's spread that is not steady motion: shape [K]."""
        return np.asarray(np.maximum(self.spread - self._inner * np.sum(self._across**2, axis=1) / 12, 0.0))
