"""The published method (Karras et al., arXiv 2312.02696, section 3.2 and appendix C.3).

The stored averages have profiles p_1 .. p_n, the target has profile p, and the coefficients c minimise the L2 distance

    || sum_i c_i p_i - p ||,      <f, g> = integral f(s) g(s) ds,

and are then divided by their sum. Without that the error at sigma_rel >= 0.2 is several times larger, since an average
of another mass than 1 scales the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import FloatArray, PowerFunction, Profile
from posthoc_cli.reconstruction.basis import Densities
from posthoc_cli.reconstruction.least_squares import LeastSquares, solve_once

ProfileGoals = tuple[FloatArray, FloatArray]
"""Targets in the orthonormal basis, [rows, targets], and their squared norms, [targets]."""


class ProfileDistance:
    """Distances between stored profiles and targets.

    Arguments:
        snapshots: profiles of the stored averages, all at or before `t`.
        t: time of the targets.
    """

    def __init__(self, snapshots: Sequence[PowerFunction], t: float) -> None:
        gamma = np.array([p.gamma for p in snapshots])
        times = np.array([p.t for p in snapshots])
        self._densities = Densities(np.unique(gamma), np.unique(np.concatenate(([0.0], times, [t]))))
        self._factor = self._densities.of_powers(gamma, times).reshape(-1, gamma.size)

    def solve(self, target: Profile) -> FloatArray:
        """Coefficients by algorithm 3 of the paper, divided by their sum: shape [snapshots].

        Raises:
            InvalidValueError: the target has no mass before the last snapshot.
        """
        goal, _ = self._goal(target)
        solution = self._problem.solve(goal)
        total = float(solution.sum())
        if not 0 < total < np.inf:
            reason = "none of its mass lies before the last snapshot in use"
            raise InvalidValueError("target", reason, "use the time of a snapshot")
        return np.asarray(solution / total, dtype=np.float64)

    def error(self, coefficients: FloatArray, target: Profile) -> float:
        """|| sum_i c_i p_i - p || / || p ||. Values below about 1e-7 are rounding."""
        goal, norm2 = self._goal(target)
        return float(self.errors(coefficients[:, None], (goal[:, None], np.array([norm2])))[0])

    def solve_all(self, goals: ProfileGoals) -> FloatArray:
        """As `solve`, for many targets at once: shape [snapshots, targets]; nan where `solve` raises an error."""
        solution = solve_once(self._factor, goals[0])[0]
        total = solution.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where((total > 0) & (total < np.inf), solution / total, np.nan)

    def errors(self, coefficients: FloatArray, goals: ProfileGoals) -> FloatArray:
        """`error` of each target with its own column of coefficients: shape [targets]."""
        columns, norms = goals
        # The squared distances outside and inside of the span of the basis.
        unreachable = np.maximum(norms - np.sum(columns**2, axis=0), 0.0)
        missed = np.sum((self._factor @ coefficients - columns) ** 2, axis=0)
        return np.asarray(np.sqrt((unreachable + missed) / norms))

    @cached_property
    def _problem(self) -> LeastSquares:
        return LeastSquares(self._factor)

    def _goal(self, target: Profile) -> tuple[FloatArray, float]:
        """The target in the orthonormal basis, and its squared norm."""
        rows, squares = self._densities.of_target(target)
        return rows.reshape(-1), float(squares.sum())

    def goals(self, targets: Sequence[PowerFunction]) -> ProfileGoals:
        """The goals of many targets, for `solve_all` and `errors`."""
        gamma, t = np.array([p.gamma for p in targets]), np.array([p.t for p in targets])
        columns = self._densities.of_powers(gamma, t).reshape(-1, gamma.size)
        return columns, self._densities.squares(gamma, t).sum(axis=0)


def inner_product(gamma_a: npt.ArrayLike, t_a: npt.ArrayLike, gamma_b: npt.ArrayLike, t_b: npt.ArrayLike) -> FloatArray:
    """<p_a, p_b> of two power functions (equation 151), in 1 / time. Arguments broadcast.

    (gamma_a+1)(gamma_b+1) / (gamma_a+gamma_b+1) * (t_min/t_max)**gamma_of_the_later / t_max
    """
    gamma_a, t_a, gamma_b, t_b = (np.asarray(x, dtype=np.float64) for x in (gamma_a, t_a, gamma_b, t_b))
    later_gamma = np.where(t_a < t_b, gamma_b, gamma_a)
    t_min, t_max = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return np.asarray(scale * (t_min / t_max) ** later_gamma / t_max, dtype=np.float64)
