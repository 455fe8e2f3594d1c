"""Minimum variance: the coefficients whose average is expected to be nearest, and how near.

With the network's path a walk of variance v(s) ds and noise of intensity w(s) (see `motion`), and a stored copy's
error of variance r_i, the average that the coefficients c make, sum(c) = 1, misses the wanted one by

    E |error|^2 = integral v (sum_i c_i tail_i - tail)^2 ds + integral w (sum_i c_i p_i - p)^2 ds + sum_i c_i^2 r_i.

Its minimum over c is a least-squares problem, and its value there the expected squared error itself. With the second
term alone it would be the published method; the path of a network is mostly closer to a walk.

The constraint is met by elimination: the last coefficient is 1 minus the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import FloatArray, PowerFunction, Profile
from posthoc_cli.reconstruction.intervals import Densities, StoredFunctions, Tails
from posthoc_cli.reconstruction.least_squares import LeastSquares
from posthoc_cli.reconstruction.prior import Prior
from posthoc_cli.reconstruction.rounding import rounding_factor


class MinimumVariance:
    """Expected errors of averages made of one set of snapshots, for targets up to one time.

    Arguments:
        snapshots: profiles of the stored averages, all at or before `t`; what sits before the first update sits on
            its values.
        prior: of these snapshots, in the same order.
        t: the last time that counts.
    """

    def __init__(self, snapshots: Sequence[PowerFunction], prior: Prior, t: float) -> None:
        gamma, times = np.array([p.gamma for p in snapshots]), np.array([p.t for p in snapshots])
        # All is done in one order, so that the caller's changes nothing, not even a last bit.
        self._order = np.lexsort((gamma, times))
        self._gamma, self._times = gamma[self._order], times[self._order]
        self._prior = prior = prior.of(self._order.tolist())
        edges = np.concatenate((prior.motion.edges, self._times, [t]))
        edges = np.unique(edges[(edges >= prior.motion.edges[0]) & (edges <= t)])
        walk, noise = prior.motion.on(edges)
        gammas = np.unique(self._gamma)
        self._parts: list[tuple[StoredFunctions, FloatArray]] = [(Tails(gammas, edges), np.sqrt(walk))]
        if noise.any():
            self._parts.append((Densities(gammas, edges), np.sqrt(noise)))
        # Of a profile as short as one interval; noise at a point would be infinite.
        self._most_noise = float(noise.max(initial=0.0)) / prior.interval if prior.interval > 0 else np.inf
        self._rows = np.vstack([  # [rows, n]
            _scaled(functions.of_powers(self._gamma, self._times), root) for functions, root in self._parts
        ])  # fmt: skip

    def solve(self, target: Profile) -> FloatArray:
        """The coefficients of least expected error: shape [n]; they sum to 1."""
        stored = self._stored_exactly(target)
        if stored is not None:
            return self._as_given(np.arange(self._gamma.size) == stored)
        goal, _ = self._goal(target)
        problem, last = self._problem
        others = problem.solve(np.concatenate((goal, np.zeros(self._gamma.size))) - last)
        solution = np.append(others, 1 - others.sum())
        # What is below the rounding of the sum is nothing, and need not be read.
        solution[np.abs(solution) < np.finfo(np.float64).eps * np.abs(solution).sum()] = 0.0
        return self._as_given(solution)

    def expected_square(self, coefficients: FloatArray, target: Profile) -> float:
        """E |error|^2 of the average that any coefficients with sum 1 make."""
        goal, norm2 = self._goal(target)
        unreachable = max(norm2 - float(goal @ goal), 0.0)
        ordered = coefficients[self._order]
        moved = float(np.sum((self._rows @ ordered - goal) ** 2))
        return unreachable + moved + float(np.sum((self._rounding @ ordered) ** 2))

    def expected_error(self, coefficients: FloatArray, target: Profile) -> float:
        """The root of `expected_square`, relative to the norm that the target probably has.

        nan where that norm is 0 and the error is not.
        """
        norm = self._norm(target)
        error = float(np.sqrt(self.expected_square(coefficients, target)))
        return error / norm if norm > 0 else 0.0 if error == 0 else float("nan")

    def _norm(self, target: Profile) -> float:
        """Mean of the stored averages' squared norms, the nearer one is to the target the more it counts, and its root.

        Averages of different lengths can differ by a tenth in it: that of the nearest one alone would jump where one
        length takes over from another. By the fourth power of the distance, so that many far ones do not outweigh it.
        """
        goal, _ = self._goal(target)
        apart = np.sum((self._rows - goal[:, None]) ** 2, axis=0)
        apart = np.maximum(apart, np.finfo(np.float64).tiny)  # of one that is the target itself
        weight = (apart.min() / apart) ** 2
        return float(np.sqrt(weight @ self._prior.norm / weight.sum()))

    def removal_costs(self) -> FloatArray:
        """What E |error|^2 grows by, per c_i^2, when snapshot i is lost and the rest is solved anew: shape [n].

        Forcing one coefficient of a constrained quadratic minimum to 0 costs its square over the corresponding
        diagonal element of the inverse of the quadratic form.
        """
        factor = self._problem[0].inverse_factor()
        spread = np.sum(np.vstack((factor, -factor.sum(axis=0))) ** 2, axis=1)
        # 0 for one that rounding cannot tell from combinations of others.
        return self._as_given(np.where(spread > 0, 1 / np.where(spread > 0, spread, 1.0), 0.0))

    @cached_property
    def _rounding(self) -> FloatArray:
        """A root of the covariance of the stored copies' errors: shape [n, n]."""
        squared = np.sum(self._rows**2, axis=0)
        apart = np.maximum(squared[:, None] + squared - 2 * self._rows.T @ self._rows, 0.0)
        return rounding_factor(self._prior.rounding, self._prior.arithmetic, apart)

    @cached_property
    def _problem(self) -> tuple[LeastSquares, FloatArray]:
        """For all coefficients but the last, and the column of that one."""
        stacked = np.vstack((self._rows, self._rounding))
        return LeastSquares(stacked[:, :-1] - stacked[:, -1:]), stacked[:, -1]

    def _as_given(self, values: npt.NDArray[Any]) -> FloatArray:
        """Values of the snapshots, in the caller's order."""
        given = np.empty(values.size)
        given[self._order] = values
        return given

    def _stored_exactly(self, target: Profile) -> int | None:
        """The snapshot that is the target, where its stored copy is free of rounding."""
        if not isinstance(target, PowerFunction):
            return None
        same = (self._gamma == target.gamma) & (self._times == target.t) & (self._prior.rounding == 0)
        return int(np.flatnonzero(same)[0]) if same.any() else None

    def _goal(self, target: Profile) -> tuple[FloatArray, float]:
        """The target in the orthonormal functions, and its squared norm under the motion."""
        goals, norm2 = [], 0.0
        for functions, root in self._parts:
            rows, squares = functions.of_target(target)
            goals.append(_scaled(rows[:, :, None], root)[:, 0])
            norm2 += min(float(root**2 @ squares), self._most_noise if isinstance(functions, Densities) else np.inf)
        return np.concatenate(goals), norm2


def _scaled(rows: FloatArray, root: FloatArray) -> FloatArray:
    """Rows of the intervals, [K, G, n], times the root of their weight, [K]: shape [K * G, n]."""
    return np.asarray((rows * root[:, None, None]).reshape(-1, rows.shape[2]), dtype=np.float64)
