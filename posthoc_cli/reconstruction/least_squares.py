"""Small least squares problems by QR, for several goals, and what each unknown is worth in their solution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from posthoc_cli.profiles import FloatArray

_EPS = float(np.finfo(np.float64).eps)


class LeastSquares:
    """argmin_x || factor x - goals || for goals, [rows, goals], one after another, by QR.

    Columns that are combinations of others up to rounding get 0. Finding them takes pivoting, which NumPy lacks.
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
        """Shape [columns, goals]."""
        return self._spread(self._q_transposed @ goals)

    @property
    def leverage(self) -> FloatArray:
        """How much of a change in each row of a goal the solution takes up, in [0, 1]: shape [rows]."""
        return np.asarray(np.sum(self._q_transposed**2, axis=0))

    def inverse_factor(self) -> FloatArray:
        """W with W W^T = (factor^T factor)^-1 on the independent columns: shape [columns, rank]."""
        return self._spread(np.eye(self._order.size))

    def _spread(self, values: FloatArray) -> FloatArray:
        """R^-1 times the values, for all columns: 0 for the dependent ones."""
        solution = np.zeros((self.factor.shape[1], values.shape[1]))
        if self._order.size:
            solution[self._order] = np.linalg.solve(self._r, values)
        return solution


def _inverse(factor: FloatArray, r: FloatArray) -> FloatArray | None:
    """R^-1 of a QR decomposition; None if columns depend on others up to rounding."""
    if factor.shape[0] < factor.shape[1]:
        return None
    try:
        inverse = np.asarray(np.linalg.inv(r), dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    condition = np.linalg.norm(r, 1) * np.linalg.norm(inverse, 1)
    return inverse if condition < 1 / (_EPS * max(factor.shape)) else None


def solve_once(factor: FloatArray, goals: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """argmin_x || factor x - goals || of many goals, [rows, goals], the squared residuals, and W.

    W W^T = (factor^T factor)^-1; W has fewer columns than rows if columns of `factor` depend on others up to rounding.
    Takes one triangle and no orthogonal matrix, several times faster than `LeastSquares`.
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
    return np.asarray(np.linalg.qr(np.hstack((factor, goals)), mode="r"), dtype=np.float64)


_REFRESH = 0.25
"""The share of the snapshots that are lost before the problem is solved again, since each loss costs digits."""


class Losses:
    """Expected squared errors of targets, as snapshots are lost one after another, from one factorisation.

    All coefficients but the last are unknowns of a least-squares problem, whose residuals are the squared errors. Where
    c are its coefficients and P = W W^T is the inverse of its quadratic form, forcing c_i to 0 adds c_i^2 / P_ii to a
    squared error, subtracts P_ki c_i / P_ii from each c_k, and removes the direction of row i from each row of W.

    Arguments:
        factor: one column a snapshot: shape [rows, n].
        goals: one column a target: shape [rows, targets].
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
        """Expected squared errors when one more is lost: shape [targets, n]; `squares` for lost ones."""
        spread = np.sum(self._root**2, axis=1)
        costs = np.divide(1.0, spread, out=np.zeros(spread.size), where=spread > 0)
        return np.asarray(self.squares[:, None] + np.square(self._columns) * costs)

    def lose(self, snapshot: int) -> None:
        """Continue without one of the remaining snapshots."""
        self._left = self._left[self._left != snapshot]
        if self._is_degenerate or self._left.size <= (1 - _REFRESH) * self._solved:
            self._solve()
            return
        own, lost = self._root[snapshot].copy(), self._columns[:, snapshot].copy()
        square = own @ own
        pivot = self._root @ own / square
        self.squares = self.squares + lost * lost / square
        self._columns -= np.multiply.outer(lost, pivot)
        self._root -= np.multiply.outer(pivot, own)
        self._columns[:, snapshot] = self._root[snapshot] = 0.0

    def of(self, snapshots: Sequence[int]) -> Losses:
        """The same for some of all the snapshots, renumbered."""
        factor, goals = self._reduced
        return Losses(factor[:, snapshots], goals, self._unreachable)

    def _solve(self) -> None:
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
        """Factor and goals with at most as many rows as columns."""
        count = self._factor.shape[1]
        triangle = _triangle_of(self._factor, self._goals)
        return triangle[:, :count], triangle[:, count:]
