"""Minimum variance: the coefficients of least expected squared error, and that error.

For a network that moves as a random walk of variance v(s) ds with noise of intensity w(s) (see `motion`), and stored
copies with errors of variance r_i, the average with coefficients c, sum(c) = 1, has the error

    E |error|^2 = integral v (sum_i c_i tail_i - tail)^2 ds + integral w (sum_i c_i p_i - p)^2 ds + sum_i c_i^2 r_i.

Minimising it over c is a least-squares problem; its residual is the expected squared error. The second term is the
published method; most networks are closer to a walk. The constraint is met by elimination of the last coefficient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import FloatArray, PowerFunction, Profile
from posthoc_cli.reconstruction.basis import Densities, StoredFunctions, Tails
from posthoc_cli.reconstruction.least_squares import LeastSquares, Losses, solve_once
from posthoc_cli.reconstruction.prior import Prior
from posthoc_cli.reconstruction.rounding import inherited_factor, rounding_factor
from posthoc_cli.reconstruction.steps import Cells

_NO_ROUNDING = 1e-30
"""Squared rounding, relative to the squared norm, far below that of any dtype."""


class MinimumVariance:
    """Expected errors of averages made of one set of snapshots.

    Arguments:
        snapshots: profiles of the stored averages, all at or before `t`; mass before the first update sits on it.
        prior: of these snapshots, in the same order.
        t: time of the targets.
    """

    def __init__(self, snapshots: Sequence[PowerFunction], prior: Prior, t: float) -> None:
        gamma, times = np.array([p.gamma for p in snapshots]), np.array([p.t for p in snapshots])
        # A fixed order, so that the caller's order changes no bit.
        self._order = np.lexsort((gamma, times))
        self._gamma, self._times = gamma[self._order], times[self._order]
        self._prior = prior = prior.of(self._order.tolist())
        start = prior.motion.edges[0]
        edges = np.unique(np.clip(np.concatenate((prior.motion.edges, self._times, [t])), min(start, t), t))
        cells = prior.cells(edges)
        self._terms = _terms(prior, cells, np.unique(self._gamma))
        self._last: tuple[Profile, FloatArray, float] | None = None
        self._rows = np.vstack([term.of_powers(self._gamma, self._times) for term in self._terms])  # [rows, n]

    def solve(self, target: Profile) -> FloatArray:
        """The coefficients of least expected error: shape [n]; they sum to 1."""
        stored = self._stored_exactly(target)
        if stored is not None:
            return self._as_given(np.arange(self._gamma.size) == stored)
        goal, _ = self._goal(target)
        problem, last = self._problem
        others = problem.solve(np.concatenate((goal, np.zeros(self._rounding.shape[0]))) - last)
        solution = np.append(others, 1 - others.sum())
        # Coefficients below the rounding of the sum are 0, so that their snapshots need not be read.
        solution[np.abs(solution) < np.finfo(np.float64).eps * np.abs(solution).sum()] = 0.0
        return self._as_given(solution)

    def expected_square(self, coefficients: FloatArray, target: Profile) -> float:
        """E |error|^2 of the average of any coefficients with sum 1."""
        goal, norm2 = self._goal(target)
        unreachable = max(norm2 - float(goal @ goal), 0.0)
        ordered = coefficients[self._order]
        moved = float(np.sum((self._rows @ ordered - goal) ** 2))
        return unreachable + moved + float(np.sum((self._rounding @ ordered) ** 2))

    def solve_all(self, goals: Goals) -> FloatArray:
        """As `solve`, for many targets at once, except for the last bits: shape [n, targets]."""
        stacked = np.vstack((self._rows, self._rounding))
        others, last = stacked[:, :-1] - stacked[:, -1:], stacked[:, -1:]
        wanted = np.vstack((goals.columns, np.zeros((self._rounding.shape[0], goals.gamma.size)))) - last
        others = solve_once(others, wanted)[0]
        solution = self._as_given(np.vstack((others, 1 - others.sum(axis=0))))
        for target in np.flatnonzero(np.isin(goals.gamma, self._gamma) & np.isin(goals.t, self._times)):
            stored = self._stored_exactly(PowerFunction(float(goals.gamma[target]), float(goals.t[target])))
            if stored is not None:
                solution[:, target] = self._as_given(np.arange(self._gamma.size) == stored)
        return solution

    def expected_squares(self, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """`expected_square` of each target with its own column of coefficients: shape [targets]."""
        ordered = coefficients[self._order]
        missed = np.sum((self._rows @ ordered - goals.columns) ** 2, axis=0)
        missed += np.sum((self._rounding @ ordered) ** 2, axis=0)
        return np.asarray(goals.unreachable + missed)

    def expected_errors(self, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """`expected_error` of each target with its own column of coefficients: shape [targets]."""
        apart = np.sum(self._rows**2, axis=0)[:, None] - 2 * self._rows.T @ goals.columns + goals.squares
        norms = self._norms(np.maximum(apart, 0.0))
        errors = np.sqrt(self.expected_squares(coefficients, goals))
        found = np.divide(errors, norms, out=np.full(norms.size, np.nan), where=norms > 0)
        return np.where((norms > 0) | (errors > 0), found, 0.0)

    def goals(self, targets: Sequence[PowerFunction]) -> Goals:
        """The goals of many targets, for the methods that take them at once."""
        gamma, t = np.array([p.gamma for p in targets]), np.array([p.t for p in targets])
        columns = np.vstack([term.of_powers(gamma, t) for term in self._terms])
        norms = np.sum([term.squares(gamma, t) for term in self._terms], axis=0)
        return Goals(gamma, t, columns, norms)

    def losses(self, targets: Sequence[PowerFunction]) -> Losses:
        """The targets' squared errors as snapshots are lost, in the caller's order."""
        goals = self.goals(targets)
        stacked = np.empty((self._rows.shape[0] + self._rounding.shape[0], self._gamma.size))
        stacked[:, self._order] = np.vstack((self._rows, self._rounding))
        columns = np.vstack((goals.columns, np.zeros((self._rounding.shape[0], goals.gamma.size))))
        return Losses(stacked, columns, goals.unreachable)

    def expected_error(self, coefficients: FloatArray, target: Profile) -> float:
        """The root of `expected_square`, relative to the target's probable norm; nan if only that is 0."""
        goal, _ = self._goal(target)
        norm = float(self._norms(np.sum((self._rows - goal[:, None]) ** 2, axis=0)[:, None])[0])
        error = float(np.sqrt(self.expected_square(coefficients, target)))
        return error / norm if norm > 0 else 0.0 if error == 0 else float("nan")

    def _norms(self, apart: FloatArray) -> FloatArray:
        """Probable norms of targets: the root mean square of the stored averages' norms, weighted by nearness.

        The norm of the nearest average alone would jump by up to a tenth between lengths. Weights fall with the fourth
        power of the distance, so that many far averages do not outweigh the nearest.

        Arguments:
            apart: squared distances from the targets: shape [n, targets].
        """
        apart = np.maximum(apart, np.finfo(np.float64).tiny)  # 0 if the target is stored
        weight = (apart.min(axis=0) / apart) ** 2
        return np.asarray(np.sqrt(self._prior.norm @ weight / weight.sum(axis=0)))

    @cached_property
    def _rounding(self) -> FloatArray:
        """A root of the covariance of the stored copies' errors: shape [n or more, n]."""
        squared = np.sum(self._rows**2, axis=0)
        apart = np.maximum(squared[:, None] + squared - 2 * self._rows.T @ self._rows, 0.0)
        own = rounding_factor(self._prior.rounding, self._prior.arithmetic, apart)
        if self._prior.inherited is None:
            return own
        return np.vstack((own, inherited_factor(self._prior.inherited, self._gamma, self._times)))

    @cached_property
    def _problem(self) -> tuple[LeastSquares, FloatArray]:
        """The problem for all coefficients but the last, and the column of the last."""
        stacked = np.vstack((self._rows, self._rounding))
        return LeastSquares(stacked[:, :-1] - stacked[:, -1:]), stacked[:, -1]

    def _as_given(self, values: npt.NDArray[Any]) -> FloatArray:
        """Values of the snapshots, in the caller's order."""
        given = np.empty(values.shape)
        given[self._order] = values
        return given

    def _stored_exactly(self, target: Profile) -> int | None:
        """The snapshot that is the target, if its stored copy has no rounding error."""
        if not isinstance(target, PowerFunction):
            return None
        same = (self._gamma == target.gamma) & (self._times == target.t)
        same &= self._prior.rounding <= _NO_ROUNDING * self._prior.norm
        return int(np.flatnonzero(same)[0]) if same.any() else None

    def _goal(self, target: Profile) -> tuple[FloatArray, float]:
        """The target in the orthonormal basis, and its squared norm under the motion; cached for the last target."""
        if self._last is None or self._last[0] is not target:
            goals, norms = zip(*(term.of_target(target) for term in self._terms), strict=True)
            self._last = target, np.concatenate(goals), float(sum(norms))
        return self._last[1:]


@dataclass(frozen=True)
class Goals:
    """Targets as columns of a least-squares problem: `gamma`, `t` and `norms` [targets], `columns` [rows, targets].

    `norms` are squared norms under the motion, which may exceed those of the columns.
    """

    gamma: FloatArray
    t: FloatArray
    columns: FloatArray
    norms: FloatArray

    @cached_property
    def squares(self) -> FloatArray:
        """Squared norms of the columns: shape [targets]."""
        return np.asarray(np.sum(self.columns**2, axis=0))

    @property
    def unreachable(self) -> FloatArray:
        """The share of the squared norms that no coefficients reach: shape [targets]."""
        return np.maximum(self.norms - self.squares, 0.0)


class _Term(Protocol):
    """One term of the expected squared error: a sum of squares over rows."""

    def of_powers(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        """Columns of power functions: shape [rows, n]."""
        ...

    def squares(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        """Their squared norms, which may exceed those of the columns: shape [n]."""
        ...

    def of_target(self, target: Profile) -> tuple[FloatArray, float]:
        """Column and squared norm of any profile: shape [rows], and a number."""
        ...


@dataclass(frozen=True)
class _Integral:
    """An integral over intervals of many updates. `root`: of the weight in each interval, [K]."""

    functions: StoredFunctions
    root: FloatArray
    most: float = np.inf
    """Limit of a norm: that of noise at a point would be infinite."""

    def of_powers(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        return self._scaled(self.functions.of_powers(gamma, t))

    def squares(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        return np.minimum(self.root**2 @ self.functions.squares(gamma, t), self.most)

    def of_target(self, target: Profile) -> tuple[FloatArray, float]:
        rows, squares = self.functions.of_target(target)
        return self._scaled(rows[:, :, None])[:, 0], min(float(self.root**2 @ squares), self.most)

    def _scaled(self, rows: FloatArray) -> FloatArray:
        """Rows of the intervals, [K, G, n], times the root of their weight: shape [K * G, n]."""
        return np.asarray((rows * self.root[:, None, None]).reshape(-1, rows.shape[2]), dtype=np.float64)


@dataclass(frozen=True)
class _Sum:
    """A sum over the updates of intervals that have few. `root`: of the variance at each of them, [M].

    `columns` and `column` are the values of power functions and of any profile at these updates.
    """

    root: FloatArray
    columns: Callable[[FloatArray, FloatArray], FloatArray]
    column: Callable[[Profile], FloatArray]

    def of_powers(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        return np.asarray(self.root[:, None] * self.columns(gamma, t), dtype=np.float64)

    def squares(self, gamma: FloatArray, t: FloatArray) -> FloatArray:
        return np.asarray(np.sum(self.of_powers(gamma, t) ** 2, axis=0))

    def of_target(self, target: Profile) -> tuple[FloatArray, float]:
        column = self.root * self.column(target)
        return column, float(column @ column)


def _terms(prior: Prior, cells: Cells, gammas: FloatArray) -> list[_Term]:
    walk, noise = prior.motion.on(cells.edges)
    terms: list[_Term] = [_Integral(Tails(gammas, cells.edges), np.sqrt(walk * cells.density))]
    if cells.interval.size:
        terms.append(_Sum(np.sqrt(walk[cells.interval] * cells.stride), cells.tails, cells.target_tails))
    if noise.any():
        most = float(noise.max()) / cells.stride if cells.stride else np.inf
        terms.append(_Integral(Densities(gammas, cells.edges), np.sqrt(noise * cells.duration), most))
        if cells.interval.size:
            terms.append(_Sum(np.sqrt(noise[cells.interval] / cells.stride), cells.masses, cells.target_masses))
    return terms
