"""Least squares: for one right-hand side after another, and for many at once."""

from __future__ import annotations

import numpy as np
from scipy import linalg

from posthoc_cli.profiles import FloatArray


class LeastSquares:
    """argmin_x || factor x - goal || for one `goal` after another, by QR.

    Columns of `factor`, shape [rows, columns], that rounding cannot tell from combinations of others get 0: they are
    found by pivoting, which is several times slower and so is left out where the columns are told apart.
    """

    def __init__(self, factor: FloatArray) -> None:
        self.factor = factor
        self._order = np.arange(factor.shape[1])
        if factor.shape[1] == 0:
            return
        least = max(factor.shape) * np.finfo(np.float64).eps
        q, r = linalg.qr(factor, mode="economic", check_finite=False)
        if factor.shape[0] < factor.shape[1] or linalg.lapack.dtrcon(r)[0] < least:
            q, r, order = linalg.qr(factor, mode="economic", pivoting=True, check_finite=False)
            diagonal = np.abs(np.diag(r))
            self._order = order[: int(np.sum(diagonal > diagonal[0] * least))]
        rank = self._order.size
        self._q_transposed = np.ascontiguousarray(q[:, :rank].T)
        self._r = np.asfortranarray(r[:rank, :rank])

    def solve(self, goal: FloatArray) -> FloatArray:
        """Shape [rows] or [rows, goals] to shape [columns] or [columns, goals]."""
        solution = np.zeros((self.factor.shape[1], *goal.shape[1:]))
        if self._order.size:
            solution[self._order] = linalg.solve_triangular(self._r, self._q_transposed @ goal, check_finite=False)
        return solution

    def inverse_factor(self) -> FloatArray:
        """W with W W^T = (factor^T factor)^-1 on the columns that are told apart: shape [columns, rank]."""
        result = np.zeros((self.factor.shape[1], self._order.size))
        if self._order.size:
            result[self._order] = linalg.solve_triangular(self._r, np.eye(self._order.size), check_finite=False)
        return result


def solve_once(factor: FloatArray, goals: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """argmin_x || factor x - goals || of many goals, [rows, goals], the squared residuals, and a root W of an inverse.

    W W^T = (factor^T factor)^-1; it has fewer columns than rows where rounding cannot tell columns of `factor` from
    combinations of others. From one triangle and without an orthogonal matrix: several times faster than
    `LeastSquares`.
    """
    count = factor.shape[1]
    triangle = triangle_of(np.hstack((factor, goals)))
    r = triangle[:count, :count]
    least = max(factor.shape) * np.finfo(np.float64).eps
    if r.shape[0] < count or (count > 0 and linalg.lapack.dtrcon(r)[0] < least):
        problem = LeastSquares(factor)
        solution = problem.solve(goals)
        return solution, np.sum((factor @ solution - goals) ** 2, axis=0), problem.inverse_factor()
    if count == 0:
        return np.zeros((0, goals.shape[1])), np.sum(triangle**2, axis=0), np.zeros((0, 0))
    solution, _ = linalg.lapack.dtrtrs(r, triangle[:count, count:])
    return solution, np.sum(triangle[count:, count:] ** 2, axis=0), linalg.lapack.dtrtri(r)[0]


def triangle_of(matrix: FloatArray) -> FloatArray:
    """R of a QR decomposition."""
    return np.asarray(np.linalg.qr(matrix, mode="r"), dtype=np.float64)
