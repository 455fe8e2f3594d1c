"""Linear least squares with one factorisation: for any number of goals, and for the loss of
unknowns one after another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from posthoc_cli.profiles import FloatArray


class LeastSquares:
    """argmin_x || factor x - goals || with one factorisation for any number of goals.

    The directions of `factor` whose size is zero up to rounding are left out, relative to `size`,
    that of the numbers whose differences it holds. `inverse` is W with W W^T = (factor^T factor)^-1
    on the others, [columns, rank].
    """

    def __init__(self, factor: FloatArray, size: float = 0.0) -> None:
        self._q, r = np.linalg.qr(factor)
        limit = np.finfo(np.float64).eps * max(factor.shape)
        try:
            self.inverse = np.asarray(np.linalg.inv(r))
            condition = _norm(r, size) * _norm(self.inverse)
        except np.linalg.LinAlgError:  # singular, or fewer rows than columns
            condition = np.inf
        if not limit * condition < 1:
            left, sizes, right = np.linalg.svd(r, full_matrices=False)
            kept = sizes > limit * sizes.max(initial=size)
            self._q = self._q @ left[:, kept]
            self.inverse = right[kept].T / sizes[kept]

    def solve(self, goals: FloatArray) -> FloatArray:
        """Return the solutions for goals, [rows, goals]: shape [columns, goals]."""
        return np.asarray(self.inverse @ (self._q.T @ goals))

    def missed(self, goals: FloatArray) -> FloatArray:
        """Return the squared residuals: shape [goals]."""
        reached = self._q @ (self._q.T @ goals)
        return np.asarray(np.sum((goals - reached) ** 2, axis=0))

    @property
    def leverage(self) -> FloatArray:
        """The share of a change in each row of a goal that the fit follows, in [0, 1]: shape
        [rows]."""
        return np.asarray(np.sum(self._q**2, axis=1))


def _norm(matrix: FloatArray, least: float = 0.0) -> float:
    """Return the 1-norm of a matrix, or `least` if that is larger."""
    return float(np.abs(matrix).sum(axis=0).max(initial=least))


class SumOfOne:
    """argmin_c || factor c - goal || for coefficients of sum 1: the last one is 1 minus the others'
    sum."""

    def __init__(self, factor: FloatArray) -> None:
        self._last = factor[:, -1]
        self._others = LeastSquares(factor[:, :-1] - factor[:, -1:])

    def solve(self, goal: FloatArray) -> FloatArray:
        others = self._others.solve(goal - self._last)
        return np.asarray(np.append(others, 1 - others.sum()))

    @property
    def leverage(self) -> FloatArray:
        return self._others.leverage


# the share of the snapshots after whose loss the problem is solved again, since each loss costs
# digits
_REFRESH = 0.25


class Losses:
    """The expected squared errors of targets as snapshots are lost one after another, from one
    factorisation.

    All coefficients but the last are the unknowns of a least-squares problem whose squared
    residuals are the squared errors. With its solution c and the inverse P = W W^T of its quadratic
    form, forcing c_i to 0 adds c_i^2 / P_ii to a squared error, subtracts P_ki c_i / P_ii from each
    c_k, and removes the direction of row i from each row of W. The arguments are a column per
    snapshot, a column per target, and `Goals.unreachable`.
    """

    squares: FloatArray  # with the remaining snapshots: [targets]
    _columns: FloatArray  # [targets, n]
    _root: FloatArray  # W: [n, less than n]

    def __init__(self, factor: FloatArray, goals: FloatArray, unreachable: FloatArray) -> None:
        # An equivalent problem with at most as many rows as columns.
        columns = np.hstack((factor, goals))
        triangle = np.asarray(np.linalg.qr(columns, mode="r"))
        count = factor.shape[1]
        self._factor = triangle[:, :count]
        self._goals = triangle[:, count:]
        self._unreachable = unreachable
        self._left = np.arange(count)
        self._solve()

    def squares_without(self, groups: Sequence[Sequence[int]]) -> FloatArray:
        """Return the expected squared errors after the loss of each group of snapshots; `squares`
        if they are lost: [targets, groups]."""
        squares = np.repeat(self.squares[:, None], len(groups), axis=1)
        sizes = np.array([len(group) for group in groups])
        for size in set(sizes.tolist()):
            members = np.array([group for group in groups if len(group) == size])
            root = self._root[members]
            inverse = root @ root.transpose(0, 2, 1)
            costs = np.linalg.pinv(inverse, hermitian=True)
            lost = self._columns[:, members]
            added = np.einsum("tgi,gij,tgj->tg", lost, costs, lost)
            squares[:, sizes == size] += added
        return squares

    def lose(self, snapshot: int) -> None:
        """Continue without one of the remaining snapshots."""
        self._left = self._left[self._left != snapshot]
        if self._is_degenerate or self._left.size <= (1 - _REFRESH) * self._solved:
            self._solve()
            return
        row = self._root[snapshot].copy()
        lost = self._columns[:, snapshot].copy()
        square = row @ row
        pivot = self._root @ row / square
        self.squares = self.squares + lost * lost / square
        self._columns -= np.multiply.outer(lost, pivot)
        self._root -= np.multiply.outer(pivot, row)
        self._columns[:, snapshot] = self._root[snapshot] = 0.0

    def of(self, snapshots: Sequence[int]) -> Losses:
        """Return the losses for a subset of all the snapshots, which are renumbered."""
        return Losses(self._factor[:, snapshots], self._goals, self._unreachable)

    def _solve(self) -> None:
        """Solve the problem for the remaining snapshots, and set `squares`, the coefficients and
        W."""
        *others, last = self._left.tolist()
        count = self._factor.shape[1]
        goals = self._goals - self._factor[:, [last]]
        differences = self._factor[:, others] - self._factor[:, [last]]
        size = float(np.abs(self._factor).max())
        problem = LeastSquares(differences, size)
        solution = problem.solve(goals)
        root = problem.inverse
        rank = root.shape[1]
        self._solved = self._left.size
        self._is_degenerate = rank < len(others)
        self.squares = self._unreachable + problem.missed(goals)
        self._columns = np.zeros((goals.shape[1], count))
        self._columns[:, others] = solution.T
        self._columns[:, last] = 1 - solution.sum(axis=0)
        self._root = np.zeros((count, rank))
        self._root[others] = root
        self._root[last] = -root.sum(axis=0)
