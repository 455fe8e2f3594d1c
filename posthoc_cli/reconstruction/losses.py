"""What the loss of snapshots costs, one after another, from one factorisation.

With all coefficients but the last as unknowns, expected squared errors are residuals of a least-squares problem. Where
c are its coefficients and P = W W^T is the inverse of its quadratic form, forcing c_i to 0 adds c_i^2 / P_ii to a
squared error and takes P_ki c_i / P_ii from each c_k, and from each row of W what it has in the direction of row i. So
a loss costs as many operations as W has elements, and not a new solve.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from posthoc_cli.profiles import FloatArray
from posthoc_cli.reconstruction.least_squares import solve_once, triangle_of

_SOLVED_ANEW = 0.25
"""The share of the snapshots that go before the problem is solved anew: each loss takes digits."""


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
        self._root: FloatArray  # W: [n, less than n]
        self._solve()

    def squares_without_each(self) -> FloatArray:
        """Expected squared errors when one more is lost: shape [targets, n], `squares` for those that are gone."""
        return self.squares[:, None] + np.square(self._columns) * self.costs()

    def costs(self) -> FloatArray:
        """What a squared error grows by, per c_i^2, when a snapshot is lost: shape [n].

        0 for one that is gone, and for one that rounding cannot tell from combinations of others.
        """
        spread = np.sum(self._root**2, axis=1)
        costs: FloatArray = np.divide(1.0, spread, out=np.zeros(spread.size), where=spread > 0)
        return costs

    def lose(self, snapshot: int) -> None:
        """Go on without one of those that are left."""
        self._left = self._left[self._left != snapshot]
        if self._is_degenerate or self._left.size <= (1 - _SOLVED_ANEW) * self._solved:
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
        """The same of some of all the snapshots, numbered anew."""
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
        """Factor and goals with as many rows as there are columns, at most."""
        count = self._factor.shape[1]
        triangle = triangle_of(np.hstack((self._factor, self._goals)))
        return triangle[:, :count], triangle[:, count:]
