"""Least squares for one right-hand side after another."""

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
