"""The linear algebra of both methods: functions on the intervals between snapshot times, and least squares.

Within one interval every stored profile, and its tail, is a sum of a few powers of s: a power function has its own
exponent, and a profile with mass at points is constant, since intervals end at these points. A small Gram matrix in
closed form yields an orthonormal basis of these powers; functions on different intervals are orthogonal. In that basis
the squared distance between two averages is a sum of squares, and a reconstruction is a least-squares problem with few
rows, whose condition number is the *square root* of the Gram matrix's (9e4 against 8e9 for 2 profiles x 512).

Motion is modelled per step, not per unit of time, since a clock may advance while nothing is trained. Over the usual
hundreds of updates between snapshots, integrals over time are as good as sums over updates. Intervals with only a few
updates are summed instead, since an average ignores how the network moved between updates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeGuard

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import Clock, FloatArray, PowerFunction, Profile, StoredProfile

MOST_POINTS = 16_384
"""Limit of the points of mass that intervals end at; among more points, evenly spaced ones are chosen."""


def gammas_and_times(powers: Sequence[PowerFunction]) -> tuple[FloatArray, FloatArray]:
    """Return the exponents and the times of power functions: shape [n] each."""
    return np.array([p.gamma for p in powers]), np.array([p.t for p in powers])


def gammas_of(profiles: Iterable[StoredProfile]) -> FloatArray:
    """Return the distinct exponents of the power functions among the profiles, in ascending order."""
    return np.unique([profile.gamma for profile in profiles if isinstance(profile, PowerFunction)])


def order_of(profile: StoredProfile) -> tuple[float, float, float]:
    """Return a sort key that depends on the profile alone; equal profiles have equal keys."""
    if isinstance(profile, PowerFunction):
        return profile.t, profile.gamma, 0.0
    return profile.t, np.inf, float(profile.tail(profile.t / 2))


def points_of(profiles: Iterable[StoredProfile]) -> FloatArray:
    """Return the distinct times at which the profiles have mass, in ascending order, at most MOST_POINTS."""
    points = np.unique(np.concatenate([np.zeros(0), *(getattr(profile, "jumps", ()) for profile in profiles)]))
    if points.size <= MOST_POINTS:
        return points
    return np.asarray(points[np.linspace(0, points.size - 1, MOST_POINTS).round().astype(np.intp)])


def are_powers(profiles: Sequence[Profile]) -> TypeGuard[Sequence[PowerFunction]]:
    """Return whether all profiles are power functions, so that closed forms hold."""
    return all(isinstance(profile, PowerFunction) for profile in profiles)


# --- steps and updates -----------------------------------------------------------------------------

FEW = 8
"""Intervals of at most this many updates are summed. With more updates, integral and sum differ by less than 10 %."""

_SAME = 1e-9
"""Relative difference below which two times, or numbers of updates, are equal."""


@dataclass(frozen=True)
class Cells:
    """Intervals of training with steps of constant length each, and the updates of the intervals that have few.

    Attributes:
        edges: ends of the intervals, ascending: shape [K + 1].
        density: steps per unit of time within each interval; 0 where its updates are listed instead: shape [K].
        before, after, interval: for each listed update, the time of the previous update, its own time, and the index
            of its interval: shape [M] each.
        stride: steps between updates.
    """

    edges: FloatArray
    density: FloatArray
    before: FloatArray
    after: FloatArray
    interval: npt.NDArray[np.intp]
    stride: float

    @property
    def duration(self) -> FloatArray:
        """The duration of a step within each interval; 0 where its updates are listed instead: shape [K]."""
        return np.divide(1.0, self.density, out=np.zeros_like(self.density), where=self.density > 0)

    def tails(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return the mass of each profile at or after each listed update: shape [M, n]."""
        return self._mass_after(self.before, profiles)

    def masses(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return the mass of each profile on each listed update: shape [M, n]."""
        return self.tails(profiles) - self._mass_after(self.after, profiles)

    def _mass_after(self, s: FloatArray, profiles: Sequence[Profile]) -> FloatArray:
        """Return the tails at `s`, [M]; 0 for power functions that end before the update: shape [M, n]."""
        ends = np.array([p.t * (1 + _SAME) if isinstance(p, PowerFunction) else np.inf for p in profiles])
        tails = np.stack([profile.tail(s) for profile in profiles], axis=1)
        return np.where(self.after[:, None] <= ends, tails, 0.0)


@dataclass(frozen=True)
class Steps:
    """A run's clock, and the steps between its updates."""

    clock: Clock
    stride: int = 1


def cells_between(edges: FloatArray, profiles: Iterable[StoredProfile], run: Steps | None) -> Cells:
    """Return the intervals between `edges`, cut at points of mass and where the duration of a step changes.

    Without a `run` every step is one unit of time, and no updates are listed.
    """
    edges = with_points(edges, profiles, run)
    if run is None:
        empty = np.zeros(0)
        return Cells(edges, np.ones(edges.size - 1), empty, empty, np.zeros(0, dtype=np.intp), 0.0)
    knots = np.asarray(run.clock.times)
    edges = np.union1d(edges, knots[(knots > edges[0]) & (knots < edges[-1])])
    steps = run.clock.step_at(edges)
    # An update exactly at an edge belongs to the interval that ends there.
    count = np.floor(steps / run.stride * (1 + _SAME) + _SAME).astype(np.int64)
    few = np.diff(count) <= FEW
    interval = np.repeat(np.flatnonzero(few), np.diff(count)[few])
    listed = [np.arange(a, b) for a, b in zip(count[:-1][few], count[1:][few], strict=True)]
    number = np.concatenate([np.zeros(0), *listed])
    before = np.maximum(run.clock.time_at(number * run.stride), edges[0])
    after = run.clock.time_at((number + 1) * run.stride)
    density = np.where(few, 0.0, np.diff(steps) / np.diff(edges))
    return Cells(edges, density, before, after, interval, float(run.stride))


def with_points(edges: FloatArray, profiles: Iterable[StoredProfile], run: Steps | None) -> FloatArray:
    """Return the edges and, between them, each profile's points of mass and the times one update before these."""
    points = points_of(profiles)
    before = points - 1 if run is None else run.clock.time_at(run.clock.step_at(points) - run.stride)
    return np.unique(np.concatenate((edges, np.clip(np.append(points, before), edges[0], edges[-1]))))


# --- functions --------------------------------------------------------------------------------------


class StoredFunctions(ABC):
    """The tail or the density of profiles, expanded in an orthonormal basis on each interval (edge_k, edge_k+1].

    On interval k the function of stored profile n is a sum of terms amplitude_kn (s / edge_k+1)**power_n, and 0 after
    the profile's own time. With u = s / edge_k+1, f_g = u**p_g / n_g is a power scaled to norm 1. The functions
    e_j = sum_g f_g V_gj / sqrt(lambda_j) are orthonormal, where lambda and V are the eigenvalues and eigenvectors of
    the Gram matrix of the f_g. Directions whose norm is zero up to rounding (nearly equal exponents, very narrow
    intervals) are left out. `exponents` holds all p_g: shape [G]; `edges` ascend from 0 or later: shape [K + 1].
    """

    def __init__(self, exponents: FloatArray, edges: FloatArray) -> None:
        self._exponents, self._edges, self._ends = exponents, edges, edges[1:]
        self._log_ratio = np.full(self._ends.size, np.inf)
        inner = edges[:-1] > 0
        # A difference of logarithms would be 0 for times that differ in the last bit.
        self._log_ratio[inner] = np.log1p(np.diff(edges)[inner] / edges[:-1][inner])
        gram = self._moment(exponents[:, None] + exponents[None, :])  # [K, G, G]
        self._norms = np.sqrt(np.einsum("kgg->kg", gram))
        gram /= self._norms[:, :, None] * self._norms[:, None, :]
        eigenvalues, vectors = np.linalg.eigh(gram)
        kept = eigenvalues > exponents.size * np.finfo(np.float64).eps
        scale = np.where(kept, 1 / np.sqrt(np.where(kept, eigenvalues, 1.0)), 0.0)
        self._to_basis = vectors * scale[:, None, :]  # [K, G, G]

    @abstractmethod
    def _terms(self, gamma: FloatArray, t: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        """Return (power [n] or [1], amplitude [K, n]) of each term, for power functions of `gamma` at `t`."""

    @abstractmethod
    def _constant(self, profile: Profile) -> FloatArray:
        """Return the value on each interval for a profile with mass at points, which is constant there: shape [K]."""

    @abstractmethod
    def _values(self, profile: Profile, s: FloatArray, interval: npt.NDArray[np.intp]) -> FloatArray:
        """Return the function of any profile at the times `s`, which lie in the given intervals: shape [M]."""

    def of_powers(self, profiles: Sequence[PowerFunction]) -> FloatArray:
        """Return the coordinates of power functions in the basis: shape [K, G, n]."""
        return np.asarray(sum(self._expanded(*term) for term in self._terms(*gammas_and_times(profiles))))

    def of_stored(self, profiles: Sequence[StoredProfile]) -> FloatArray:
        """Return the coordinates of stored profiles, all of whose points of mass are edges: shape [K, G, n]."""
        if are_powers(profiles):
            return self.of_powers(profiles)
        rows = np.zeros((*self._to_basis.shape[::2], len(profiles)))
        powers = [index for index, profile in enumerate(profiles) if isinstance(profile, PowerFunction)]
        others = sorted(set(range(len(profiles))) - set(powers))
        if powers:
            rows[:, :, powers] = self.of_powers([profiles[index] for index in powers])  # type: ignore[misc]
        heights = np.stack([self._constant(profiles[index]) for index in others], axis=1)
        rows[:, :, others] = self._expanded(np.zeros(1), heights)
        return rows

    def of_targets(self, targets: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        """Return the coordinates of any profiles, [K, G, n], and the integrals of their squares, [K, n].

        If all targets are power functions, both are in closed form, otherwise by quadrature.
        """
        if are_powers(targets):
            terms = self._terms(*gammas_and_times(targets))
            squares = sum(a * b * self._moment(p + q) for p, a in terms for q, b in terms)
            return self.of_powers(targets), np.asarray(squares, dtype=np.float64)
        rows, integrals = zip(*map(self._by_quadrature, targets), strict=True)
        return np.stack(rows, axis=2), np.stack(integrals, axis=1)

    def _ratio(self, t: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Return 1 on the intervals up to t and 0 after it, and the ratio of their ends to t: shape [K, n] each."""
        end = self._ends[:, None]
        return (end <= t).astype(np.float64), np.where(end <= t, end / t, 0.0)

    def _moment(self, power: FloatArray) -> FloatArray:
        """Return the integral of (s / end)**power over each interval, power > -1: shape [K, *power.shape]."""
        shape = (-1,) + (1,) * power.ndim
        length = -np.expm1(-(power + 1) * self._log_ratio.reshape(shape)) / (power + 1)
        return np.asarray(self._ends.reshape(shape) * length, dtype=np.float64)

    def _expanded(self, power: FloatArray, amplitude: FloatArray) -> FloatArray:
        """Return the coordinates of amplitude_kn (s / end_k)**power_n: [n] or [1] and [K, n] to [K, G, n]."""
        distinct, place = np.unique(power, return_inverse=True)  # many snapshots share an exponent
        overlap = self._moment(self._exponents[:, None] + distinct)[:, :, place]  # [K, G, n]
        overlap = overlap * (amplitude[:, None, :] / self._norms[:, :, None])
        return np.asarray(np.einsum("kgj,kgn->kjn", self._to_basis, overlap), dtype=np.float64)

    def _by_quadrature(self, target: Profile) -> tuple[FloatArray, FloatArray]:
        """Return the coordinates of the target's projection, [K, G], and the integrals of its square, [K]."""
        points, weights, index = resolving_nodes(target, self._edges)
        values = self._values(target, points, index)
        powers = (points / self._ends[index])[:, None] ** self._exponents / self._norms[index]
        overlap, squares = np.zeros((self._ends.size, self._exponents.size)), np.zeros(self._ends.size)
        np.add.at(overlap, index, powers * (values * weights)[:, None])
        np.add.at(squares, index, values**2 * weights)
        return np.einsum("kgj,kg->kj", self._to_basis, overlap), squares


class Tails(StoredFunctions):
    """The tails of profiles; for power functions 1 - (end/t)**(gamma+1) (s/end)**(gamma+1)."""

    def __init__(self, profiles: Sequence[StoredProfile], edges: FloatArray) -> None:
        super().__init__(np.concatenate(([0.0], gammas_of(profiles) + 1)), edges)

    def _terms(self, gamma: FloatArray, t: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        present, ratio = self._ratio(t)
        return [(np.zeros(1), present), (gamma + 1, -(ratio ** (gamma + 1)))]

    def _constant(self, profile: Profile) -> FloatArray:
        return profile.tail((self._edges[1:] + self._edges[:-1]) / 2)

    def _values(self, profile: Profile, s: FloatArray, interval: npt.NDArray[np.intp]) -> FloatArray:  # noqa: ARG002
        return profile.tail(s)


class Densities(StoredFunctions):
    """The densities of profiles; for power functions (gamma + 1) s**gamma / t**(gamma + 1).

    Mass at a point is spread over the interval that ends there. `updates` is the time between updates within each
    interval, [K]: a target's density at s is its mass between s - updates and s + updates, divided by
    their distance. Without the limit a density that grows without bound, as at the start of a 1-sqrt decay, has no
    integrable square, although the mass of each update is finite.
    """

    def __init__(self, profiles: Sequence[StoredProfile], edges: FloatArray, updates: FloatArray | None = None) -> None:
        self._updates = np.zeros(edges.size - 1) if updates is None else updates
        gammas = gammas_of(profiles)
        super().__init__(gammas if are_powers(profiles) else np.union1d([0.0], gammas), edges)

    def _terms(self, gamma: FloatArray, t: FloatArray) -> list[tuple[FloatArray, FloatArray]]:
        present, ratio = self._ratio(t)
        return [(gamma, present * (gamma + 1) / t * ratio**gamma)]

    def _constant(self, profile: Profile) -> FloatArray:
        return np.asarray(-np.diff(profile.tail(self._edges)) / np.diff(self._edges), dtype=np.float64)

    def _values(self, profile: Profile, s: FloatArray, interval: npt.NDArray[np.intp]) -> FloatArray:
        begin, end, apart = self._edges[interval], self._ends[interval], self._updates[interval]
        apart = np.maximum(apart, _STEP * (end - begin))
        low, high = np.maximum(s - apart, begin), np.minimum(s + apart, end)
        return np.asarray((profile.tail(low) - profile.tail(high)) / (high - low))


_STEP = 1e-6
"""Half the width of the difference quotient for a density, as a fraction of its interval."""


# --- Quadrature, for targets that are no power functions --------------------------------------------

_ORDER = 16
"""Number of Gauss-Legendre nodes in each section of an interval: exact for polynomials up to degree 31."""

_BISECTIONS = 100


def resolving_nodes(profile: Profile, edges: FloatArray) -> tuple[FloatArray, FloatArray, npt.NDArray[np.intp]]:
    """Return nodes and weights for integrals between `edges`, and the index of each node's interval: shape [M] each.

    The intervals are cut at quantiles of the profile's mass: evenly spaced levels, and levels that approach 0 and 1
    geometrically. That resolves an average over a few of thousands of steps, and finds the edges of a window up to
    rounding.
    """
    geometric = np.exp2(-np.arange(1.0, 50.0))
    levels = np.unique(np.concatenate((np.linspace(0, 1, 65)[1:-1], geometric, 1 - geometric)))
    low, high = np.full(levels.size, float(edges[0])), np.full(levels.size, float(edges[-1]))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        above = profile.tail(middle) > levels
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    cuts = np.unique(np.concatenate((edges, high)))
    abscissae, weights = np.polynomial.legendre.leggauss(_ORDER)
    half = np.diff(cuts)[:, None] / 2
    points = (cuts[:-1, None] + half) + half * abscissae
    interval = np.searchsorted(edges, cuts[:-1], side="right") - 1
    return points.reshape(-1), (half * weights).reshape(-1), np.repeat(interval, _ORDER)


def relative_width(profile: Profile, t: float) -> float:
    """Return the standard deviation of a profile within (0, t], as a fraction of `t`, mass at its start included.

    With F = 1 - tail, by partial integration the mean is t - integral F and the mean square t^2 - 2 integral s F.
    """
    points, weights, _ = resolving_nodes(profile, np.array([0.0, t]))
    below = (1 - profile.tail(points)) * weights
    mean = t - float(below.sum())
    return float(np.sqrt(max(t * t - 2 * float(below @ points) - mean**2, 0.0))) / t


# --- least squares -------------------------------------------------------------------------------

_EPS = float(np.finfo(np.float64).eps)


class LeastSquares:
    """argmin_x || factor x - goals || by QR, with one factorisation for any number of goals.

    Columns of `factor` that depend on others up to rounding get 0. Finding them takes pivoting, which NumPy lacks.
    """

    def __init__(self, factor: FloatArray) -> None:
        self.factor, self._order = factor, np.arange(factor.shape[1])
        q, r = np.linalg.qr(factor) if factor.size else (factor, factor[:0])
        if factor.shape[1] and _inverse(factor, r) is None:
            from scipy import linalg  # slow to import, and rarely needed

            q, r, order = linalg.qr(factor, mode="economic", pivoting=True, check_finite=False)
            diagonal = np.abs(np.diag(r))
            self._order = order[: int(np.sum(diagonal > diagonal[0] * _EPS * max(factor.shape)))]
        rank = self._order.size
        self._q_transposed, self._r = np.ascontiguousarray(q[:, :rank].T), r[:rank, :rank]

    def solve(self, goals: FloatArray) -> FloatArray:
        """Return the solutions for goals, [rows, goals]: shape [columns, goals]."""
        return self._spread(self._q_transposed @ goals)

    @property
    def leverage(self) -> FloatArray:
        """The share of a change in each row of a goal that the fit follows, in [0, 1]: shape [rows]."""
        return np.asarray(np.sum(self._q_transposed**2, axis=0))

    def inverse_factor(self) -> FloatArray:
        """Return W with W W^T = (factor^T factor)^-1 on the independent columns: shape [columns, rank]."""
        return self._spread(np.eye(self._order.size))

    def _spread(self, values: FloatArray) -> FloatArray:
        """Return R^-1 times the values, with rows of 0 for the dependent columns."""
        solution = np.zeros((self.factor.shape[1], values.shape[1]))
        if self._order.size:
            solution[self._order] = np.linalg.solve(self._r, values)
        return solution


def _inverse(factor: FloatArray, r: FloatArray) -> FloatArray | None:
    """Return R^-1 of a QR decomposition; None if columns depend on others up to rounding."""
    if factor.shape[0] < factor.shape[1]:
        return None
    try:
        inverse = np.asarray(np.linalg.inv(r), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    condition = np.linalg.norm(r, 1) * np.linalg.norm(inverse, 1)
    return inverse if condition < 1 / (_EPS * max(factor.shape)) else None


def solve_once(factor: FloatArray, goals: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return argmin_x || factor x - goals || for many goals, [rows, goals], the squared residuals, and W.

    W W^T = (factor^T factor)^-1; W has fewer columns than rows if columns of `factor` depend on others up to rounding.
    Computes one triangular factor and no orthogonal matrix, which is several times faster than `LeastSquares`.
    """
    count = factor.shape[1]
    triangle = _triangle_of(factor, goals)
    r = triangle[:count, :count]
    if count == 0:
        return np.zeros((0, goals.shape[1])), np.sum(triangle**2, axis=0), np.zeros((0, 0))
    root = _inverse(factor, r)
    if root is None:
        problem = LeastSquares(factor)
        solution = problem.solve(goals)
        return solution, np.sum((factor @ solution - goals) ** 2, axis=0), problem.inverse_factor()
    solution = np.asarray(np.linalg.solve(r, triangle[:count, count:]), dtype=np.float64)
    return solution, np.sum(triangle[count:, count:] ** 2, axis=0), root


def _triangle_of(factor: FloatArray, goals: FloatArray) -> FloatArray:
    """Return the triangular QR factor of both matrices side by side."""
    return np.asarray(np.linalg.qr(np.hstack((factor, goals)), mode="r"), dtype=np.float64)


_REFRESH = 0.25
"""The share of the snapshots after whose loss the problem is solved again, since each loss costs digits."""


class Losses:
    """The expected squared errors of targets as snapshots are lost one after another, from one factorisation.

    All coefficients but the last are the unknowns of a least-squares problem whose squared residuals are the squared
    errors. With its solution c and the inverse P = W W^T of its quadratic form, forcing c_i to 0 adds c_i^2 / P_ii to
    a squared error, subtracts P_ki c_i / P_ii from each c_k, and removes the direction of row i from each row of W.

    Arguments:
        factor: one column per snapshot: shape [rows, n].
        goals: one column per target: shape [rows, targets].
        unreachable: the part of each squared error that no coefficients change: shape [targets].

    Attributes:
        squares: expected squared errors of the targets with the remaining snapshots: shape [targets].
    """

    def __init__(self, factor: FloatArray, goals: FloatArray, unreachable: FloatArray) -> None:
        self._factor, self._goals, self._unreachable = factor, goals, unreachable
        self._left = np.arange(factor.shape[1])
        self.squares: FloatArray
        self._columns: FloatArray  # [targets, n]
        self._root: FloatArray  # W: [n, less than n]
        self._solve()

    def squares_without_each(self) -> FloatArray:
        """Return the expected squared errors after the loss of each snapshot; `squares` if it is lost: [targets, n]."""
        spread = np.sum(self._root**2, axis=1)
        costs = np.divide(1.0, spread, out=np.zeros(spread.size), where=spread > 0)
        return np.asarray(self.squares[:, None] + np.square(self._columns) * costs)

    def lose(self, snapshot: int) -> None:
        """Continue without one of the remaining snapshots."""
        self._left = self._left[self._left != snapshot]
        if self._is_degenerate or self._left.size <= (1 - _REFRESH) * self._solved:
            self._solve()
            return
        row, lost = self._root[snapshot].copy(), self._columns[:, snapshot].copy()
        square = row @ row
        pivot = self._root @ row / square
        self.squares = self.squares + lost * lost / square
        self._columns -= np.multiply.outer(lost, pivot)
        self._root -= np.multiply.outer(pivot, row)
        self._columns[:, snapshot] = self._root[snapshot] = 0.0

    def of(self, snapshots: Sequence[int]) -> Losses:
        """Return the losses for a subset of all the snapshots, which are renumbered."""
        factor, goals = self._reduced
        return Losses(factor[:, snapshots], goals, self._unreachable)

    def _solve(self) -> None:
        """Solve the problem for the remaining snapshots, and set `squares`, the coefficients and W."""
        left, count = self._left, self._factor.shape[1]
        factor, goals = (self._factor, self._goals) if left.size == count else self._reduced
        others, last = factor[:, left[:-1]] - factor[:, left[-1:]], factor[:, left[-1:]]
        solution, missed, root = solve_once(others, goals - last)
        self._solved = left.size
        self._is_degenerate = root.shape[1] < others.shape[1]
        self.squares = self._unreachable + missed
        self._columns, self._root = np.zeros((goals.shape[1], count)), np.zeros((count, root.shape[1]))
        self._columns[:, left[:-1]], self._columns[:, left[-1]] = solution.T, 1 - solution.sum(axis=0)
        self._root[left[:-1]], self._root[left[-1]] = root, -root.sum(axis=0)

    @cached_property
    def _reduced(self) -> tuple[FloatArray, FloatArray]:
        """An equivalent factor and goals, with at most as many rows as columns."""
        count = self._factor.shape[1]
        triangle = _triangle_of(self._factor, self._goals)
        return triangle[:, :count], triangle[:, count:]
