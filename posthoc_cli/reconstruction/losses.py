"""What the loss of snapshots costs, one after another, from one factorisation.

With all coefficients but the last as unknowns, expected squared errors are residuals of a least-squares problem. Where
c are its coefficients and P is the inverse of its quadratic form, forcing c_i to 0 adds c_i^2 / P_ii to a squared error,
takes P_ki c_i / P_ii from each c_k, and P_ki P_il / P_ii from each P_kl. So a loss costs as many operations as P has
elements, and not a new solve.
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
        there: the snapshots that are left, by their columns, in order.
        squares: expected squared errors of the targets when they are made of these: shape [targets].
    """

    def __init__(self, factor: FloatArray, goals: FloatArray, unreachable: FloatArray) -> None:
        self.there = list(range(factor.shape[1]))
        self._factor, self._goals, self._unreachable = factor, goals, unreachable
        self._solve()

    def squares_without_each(self) -> FloatArray:
        """Expected squared errors when one more is lost: shape [targets, snapshots left]."""
        return self.squares[:, None] + np.square(self._columns) * self.costs()

    def costs(self) -> FloatArray:
        """What a squared error grows by, per c_i^2, when a snapshot is lost: shape [snapshots left].

        0 for one that rounding cannot tell from combinations of others.
        """
        spread = np.diagonal(self._inverse)
        return np.where(spread > 0, 1 / np.where(spread > 0, spread, 1.0), 0.0)

    def lose(self, snapshot: int) -> None:
        """Go on without one of those that are left."""
        place = self.there.index(snapshot)
        del self.there[place]
        if self._is_degenerate or len(self.there) <= (1 - _SOLVED_ANEW) * self._solved:
            self._solve()
            return
        pivot, lost = self._inverse[:, place] / self._inverse[place, place], self._columns[:, place]
        self.squares = self.squares + lost * lost / self._inverse[place, place]
        self._columns = np.delete(self._columns - lost[:, None] * pivot, place, axis=1)
        inverse = self._inverse - np.outer(pivot, self._inverse[place])
        self._inverse = np.delete(np.delete(inverse, place, axis=0), place, axis=1)

    def of(self, snapshots: Sequence[int]) -> Losses:
        """The same of some of all the snapshots, numbered anew."""
        factor, goals = self._reduced
        return Losses(factor[:, snapshots], goals, self._unreachable)

    def _solve(self) -> None:
        factor, goals = (self._factor, self._goals) if len(self.there) == self._factor.shape[1] else self._reduced
        factor = factor[:, self.there]
        others, last = factor[:, :-1] - factor[:, -1:], factor[:, -1:]
        count = others.shape[1]
        triangle = np.linalg.qr(np.hstack((others, goals - last)), mode="r")
        r = triangle[:count, :count]
        least = max(others.shape) * np.finfo(np.float64).eps
        self._is_degenerate = r.shape[0] < count or (count > 0 and linalg.lapack.dtrcon(r)[0] < least)
        if self._is_degenerate:
            problem = LeastSquares(others)
            solution, root = problem.solve(goals - last), problem.inverse_factor()
            missed = np.sum((others @ solution - (goals - last)) ** 2, axis=0)
        else:
            root = linalg.lapack.dtrtri(r)[0] if count else r
            solution = root @ triangle[:count, count:]
            missed = np.sum(triangle[count:, count:] ** 2, axis=0)
        self._solved = len(self.there)
        self.squares = self._unreachable + missed
        self._columns = np.vstack((solution, 1 - solution.sum(axis=0))).T
        root = np.vstack((root, -root.sum(axis=0)))
        self._inverse = root @ root.T

    @cached_property
    def _reduced(self) -> tuple[FloatArray, FloatArray]:
        """Factor and goals with as many rows as there are columns, at most."""
        count = self._factor.shape[1]
        triangle = np.linalg.qr(np.hstack((self._factor, self._goals)), mode="r")
        return triangle[:, :count], triangle[:, count:]
