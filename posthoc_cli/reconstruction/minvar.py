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
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import FloatArray, PowerFunction, Profile, StoredProfile
from posthoc_cli.reconstruction.basis import Densities, StoredFunctions, Tails, gammas_and_times, order_of
from posthoc_cli.reconstruction.least_squares import LeastSquares, Losses, solve_once
from posthoc_cli.reconstruction.motion import Cells, cells_between, with_points
from posthoc_cli.reconstruction.prior import Prior, inherited_factor, rounding_factor

_NO_ROUNDING = 1e-30
"""Squared rounding, relative to the squared norm, far below that of any dtype."""


@dataclass(frozen=True)
class Goals:
    """Targets as columns of a least-squares problem, [rows, targets], and their squared norms, [targets].

    Norms may exceed those of the columns: the difference is what no coefficients reach.
    """

    targets: Sequence[Profile]
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


class MinimumVariance:
    """Expected errors, at `t`, of averages made of stored ones. Coefficients have the shape [n, targets].

    The profiles are at or before `t`, with their mass before the first update on it, in the order of the prior.
    """

    def __init__(self, snapshots: Sequence[StoredProfile], prior: Prior, t: float) -> None:
        # A fixed order, so that the caller's order changes no bit.
        self._order = sorted(range(len(snapshots)), key=lambda i: order_of(snapshots[i]))
        self._stored = [snapshots[i] for i in self._order]
        self._prior = prior = prior.of(self._order)
        times = [profile.t for profile in self._stored]
        start = prior.motion.edges[0]
        edges = np.unique(np.clip(np.concatenate((prior.motion.edges, times, [t])), min(start, t), t))
        cells = cells_between(with_points(edges, self._stored, prior.steps), prior.steps)
        self._terms = _terms(prior, cells, self._stored)
        self._rows = np.vstack([term.of_stored(self._stored) for term in self._terms])  # [rows, n]

    def goals(self, targets: Sequence[Profile]) -> Goals:
        """What the other methods ask for."""
        columns, norms = zip(*(term.of_targets(targets) for term in self._terms), strict=True)
        return Goals(targets, np.vstack(columns), np.sum(norms, axis=0))

    def made_of(self, coefficients: FloatArray) -> Goals:
        """The averages with these coefficients, as goals."""
        columns = self._rows @ coefficients[self._order]
        return Goals((), columns, np.sum(columns**2, axis=0))

    def solve(self, goals: Goals, at_once: bool = False) -> FloatArray:
        """The coefficients of least expected error; those of a target sum to 1.

        At once, many targets are solved several times faster, and differ in the last bits.
        """
        others, last = self._stacked[:, :-1] - self._stacked[:, -1:], self._stacked[:, -1:]
        wanted = np.vstack((goals.columns, np.zeros((self._rounding.shape[0], goals.norms.size)))) - last
        found = solve_once(others, wanted)[0] if at_once else self._problem.solve(wanted)
        solution = np.vstack((found, 1 - found.sum(axis=0)))
        # Coefficients below the rounding of the sum are 0, so that their snapshots need not be read.
        solution[np.abs(solution) < np.finfo(np.float64).eps * np.abs(solution).sum(axis=0)] = 0.0
        exact = {self._stored[i]: i for i in np.flatnonzero(self._prior.rounding <= _NO_ROUNDING * self._prior.norm)}
        for column, target in enumerate(goals.targets):
            if isinstance(target, PowerFunction) and target in exact:
                solution[:, column] = np.arange(len(self._stored)) == exact[target]
        return self._as_given(solution)

    def expected_squares(self, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """E |error|^2 of each target with its own column of coefficients, any with sum 1: shape [targets]."""
        ordered = coefficients[self._order]
        missed = np.sum((self._rows @ ordered - goals.columns) ** 2, axis=0)
        return np.asarray(goals.unreachable + missed + np.sum((self._rounding @ ordered) ** 2, axis=0))

    def expected_errors(self, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """The roots of `expected_squares`, relative to the targets' probable norms; nan if only that is 0."""
        apart = np.sum(self._rows**2, axis=0)[:, None] - 2 * self._rows.T @ goals.columns + goals.squares
        norms = self._norms(np.maximum(apart, 0.0))
        errors = np.sqrt(self.expected_squares(coefficients, goals))
        found = np.divide(errors, norms, out=np.full(norms.size, np.nan), where=norms > 0)
        return np.where((norms > 0) | (errors > 0), found, 0.0)

    def losses(self, targets: Sequence[Profile]) -> Losses:
        """The targets' squared errors as snapshots are lost, in the caller's order."""
        goals = self.goals(targets)
        columns = np.vstack((goals.columns, np.zeros((self._rounding.shape[0], goals.norms.size))))
        return Losses(self._as_given(self._stacked.T).T, columns, goals.unreachable)

    def _norms(self, apart: FloatArray) -> FloatArray:
        """Probable norms of targets, by the averages' squared distances from them: shape [n, targets] to [targets].

        The root mean square of the averages' norms, weighted by nearness; the norm of the nearest alone would jump by
        up to a tenth between lengths. Weights fall with the fourth power of the distance, so that many far averages do
        not outweigh the nearest.
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
        powers = [index for index, profile in enumerate(self._stored) if isinstance(profile, PowerFunction)]
        gammas, times = gammas_and_times([self._stored[index] for index in powers])  # type: ignore[misc]
        inherited = np.zeros((len(powers), len(self._stored)))
        inherited[:, powers] = inherited_factor(self._prior.inherited[powers], gammas, times)
        return np.vstack((own, inherited))

    @cached_property
    def _stacked(self) -> FloatArray:
        return np.vstack((self._rows, self._rounding))

    @cached_property
    def _problem(self) -> LeastSquares:
        """The problem for all coefficients but the last."""
        return LeastSquares(self._stacked[:, :-1] - self._stacked[:, -1:])

    def _as_given(self, values: npt.NDArray[Any]) -> FloatArray:
        """Values of the snapshots, in the caller's order."""
        given = np.empty(values.shape)
        given[self._order] = values
        return given


@dataclass(frozen=True)
class _Integral:
    """An integral over intervals of many updates, with the roots of their weights, [K].

    `most` limits a norm: that of noise at a point would be infinite.
    """

    functions: StoredFunctions
    root: FloatArray
    most: float = np.inf

    def of_stored(self, profiles: Sequence[StoredProfile]) -> FloatArray:
        """Columns: shape [rows, n]."""
        return self._scaled(self.functions.of_stored(profiles))

    def of_targets(self, targets: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        """Columns, [rows, n], and squared norms, [n], which may exceed those of the columns."""
        rows, squares = self.functions.of_targets(targets)
        return self._scaled(rows), np.minimum(self.root**2 @ squares, self.most)

    def _scaled(self, rows: FloatArray) -> FloatArray:
        """Rows of the intervals, [K, G, n], times the root of their weight: shape [K * G, n]."""
        return np.asarray((rows * self.root[:, None, None]).reshape(-1, rows.shape[2]), dtype=np.float64)


@dataclass(frozen=True)
class _Sum:
    """A sum over the updates of intervals that have few, with the roots of their variances, [M], and the profiles'
    values at them, [M, n]."""

    root: FloatArray
    values: Callable[[Sequence[Profile]], FloatArray]

    def of_stored(self, profiles: Sequence[StoredProfile]) -> FloatArray:
        return self.of_targets(profiles)[0]

    def of_targets(self, targets: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        columns = np.asarray(self.root[:, None] * self.values(targets), dtype=np.float64)
        return columns, np.asarray(np.sum(columns**2, axis=0))


def _terms(prior: Prior, cells: Cells, stored: Sequence[StoredProfile]) -> list[_Integral | _Sum]:
    walk, noise = prior.motion.on(cells.edges)
    few = cells.interval
    terms: list[_Integral | _Sum] = [_Integral(Tails(stored, cells.edges), np.sqrt(walk * cells.density))]
    if few.size:
        terms.append(_Sum(np.sqrt(walk[few] * cells.stride), cells.tails))
    if noise.any():
        most = float(noise.max()) / cells.stride if cells.stride else np.inf
        terms.append(_Integral(Densities(stored, cells.edges), np.sqrt(noise * cells.duration), most))
        if few.size:
            terms.append(_Sum(np.sqrt(noise[few] / cells.stride), cells.masses))
    return terms
