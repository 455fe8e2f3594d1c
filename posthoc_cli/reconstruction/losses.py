"""What the loss of snapshots costs, one after another, from one factorisation.

With all coefficients but the last as unknowns, expected squared errors are residuals of a least-squares problem. Where
c are its coefficients and P is the inverse of its quadratic form, forcing c_i to 0 adds c_i^2 / P_ii to a squared
error, takes P_ki c_i / P_ii from each c_k, and P_ki P_il / P_ii from each P_kl. So a loss costs as many operations as P
has elements, and not a new solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy import linalg

from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction.least_squares import LeastSquares

_SOLVED_ANEW = 0.25
"""The share of the snapshots that go before the problem is solved anew: each loss takes digits from P."""


class Losses:
    """Expected squared errors of targets, as snapshots are lost.

    Arguments:
        factor: one column a snapshot: shape [rows, n].
        goals: one column a target: shape [rows, targets].
        unreachable: what no coefficients change of each squared error: shape [targets].

    Attributes:
        squares: expected squared errors of the targets when they are made of what is left: shape [targets].
    """

    def __init__(self, factor: FloatArray, goals: FloatArray, unreachable: FloatArray) -> None:
        self._factor, self._goals, self._unreachable = factor, goals, unreachable
        self._left = np.arange(factor.shape[1])
        self.squares: FloatArray
        self._columns: FloatArray  # [targets, n]
        self._inverse: FloatArray  # [n, n]
        self._solve()

    def squares_without_each(self) -> FloatArray:
        """Expected squared errors when one more is lost: shape [targets, n], `squares` for those that are gone."""
        return self.squares[:, None] + np.square(self._columns) * self.costs()

    def costs(self) -> FloatArray:
        """What a squared error grows by, per c_i^2, when a snapshot is lost: shape [n].

        0 for one that is gone, and for one that rounding cannot tell from combinations of others.
        """
        spread = np.diagonal(self._inverse)
        return np.divide(1.0, spread, out=np.zeros(spread.size), where=spread > 0)

    def lose(self, snapshot: int) -> None:
        """Go on without one of those that are left."""
        self._left = self._left[self._left != snapshot]
        if self._is_degenerate or self._left.size <= (1 - _SOLVED_ANEW) * self._solved:
            self._solve()
            return
        own, lost = self._inverse[snapshot, snapshot], self._columns[:, snapshot].copy()
        pivot = self._inverse[snapshot] / own
        self.squares = self.squares + lost * lost / own
        self._columns -= np.multiply.outer(lost, pivot)
        self._inverse -= np.multiply.outer(pivot, self._inverse[snapshot].copy())
        self._columns[:, snapshot] = self._inverse[snapshot] = self._inverse[:, snapshot] = 0.0

    def of(self, snapshots: Sequence[int]) -> Losses:
        """The same of some of all the snapshots, numbered anew."""
        factor, goals = self._reduced
        return Losses(factor[:, snapshots], goals, self._unreachable)

    def _solve(self) -> None:
        left, count = self._left, self._factor.shape[1]
        factor, goals = (self._factor, self._goals) if left.size == count else self._reduced
        others, last = factor[:, left[:-1]] - factor[:, left[-1:]], factor[:, left[-1:]]
        solution, root, missed = _solved(others, goals - last)
        self._solved = left.size
        self._is_degenerate = root.shape[1] < others.shape[1]
        self.squares = self._unreachable + missed
        self._columns, self._inverse = np.zeros((goals.shape[1], count)), np.zeros((count, count))
        self._columns[:, left] = np.vstack((solution, 1 - solution.sum(axis=0))).T
        root = np.vstack((root, -root.sum(axis=0)))
        self._inverse[np.ix_(left, left)] = root @ root.T

    @cached_property
    def _reduced(self) -> tuple[FloatArray, FloatArray]:
        """Factor and goals with as many rows as there are columns, at most."""
        count = self._factor.shape[1]
        triangle = _triangle(np.hstack((self._factor, self._goals)))
        return triangle[:, :count], triangle[:, count:]


def _solved(factor: FloatArray, goals: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Solution, a root W with W W^T = (factor^T factor)^-1, and squared residuals, of a least-squares problem.

    The root has fewer columns than rows where rounding cannot tell columns from combinations of others.
    """
    count = factor.shape[1]
    triangle = _triangle(np.hstack((factor, goals)))
    r = triangle[:count, :count]
    least = max(factor.shape) * np.finfo(np.float64).eps
    if r.shape[0] < count or (count and linalg.lapack.dtrcon(r)[0] < least):
        problem = LeastSquares(factor)
        solution = problem.solve(goals)
        return solution, problem.inverse_factor(), np.sum((factor @ solution - goals) ** 2, axis=0)
    root = linalg.lapack.dtrtri(r)[0] if count else r
    return root @ triangle[:count, count:], root, np.sum(triangle[count:, count:] ** 2, axis=0)


def _triangle(matrix: FloatArray) -> FloatArray:
    """R of a QR decomposition."""
    return np.asarray(np.linalg.qr(matrix, mode="r"), dtype=np.float64)
