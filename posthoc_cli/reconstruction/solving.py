"""Coefficients for targets by either method, with predicted and profile errors.

The published method (Karras et al., arXiv 2312.02696, section 3.2 and appendix C.3): the stored averages have profiles
p_1 .. p_n, the target has profile p, and the coefficients c minimise the L2 distance

    || sum_i c_i p_i - p ||,      <f, g> = integral f(s) g(s) ds,

and are then divided by their sum. Without that the error at sigma_rel >= 0.2 is several times larger, since an average
of another mass than 1 scales the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import Combination, FloatArray, PowerFunction, Profile, StoredProfile
from posthoc_cli.reconstruction.basis import Densities, are_powers
from posthoc_cli.reconstruction.least_squares import LeastSquares, solve_once
from posthoc_cli.reconstruction.minvar import MinimumVariance
from posthoc_cli.reconstruction.motion import with_points
from posthoc_cli.reconstruction.prior import ASSUMED, Prior, assumed_prior

METHODS = ("minvar", "paper")
"""The solvers; the first one is the default."""


@dataclass(frozen=True)
class Reconstruction:
    """Coefficients for targets, under the prior of the snapshots.

    Attributes:
        coefficients: shape [snapshots, targets]; each column sums to 1.
        profile_error: shape [targets]; || sum_i c_i p_i - p || / || p ||, the paper's measure, 1e-7 for rounding. Of
            checkpoints, whose mass is at single steps, it is far above 1, and tells little.
        predicted_error: shape [targets]; expected relative L2 error of the weights (see `minvar`).
    """

    coefficients: FloatArray
    profile_error: FloatArray
    predicted_error: FloatArray
    prior: Prior

    def of(self, snapshots: Sequence[int] | None = None, targets: Sequence[int] | None = None) -> Reconstruction:
        """The same for some of the snapshots, where the others have coefficients of 0, and some of the targets."""
        count, wanted = self.coefficients.shape
        rows = list(range(count) if snapshots is None else snapshots)
        columns = list(range(wanted) if targets is None else targets)
        errors = self.profile_error[columns], self.predicted_error[columns]
        return Reconstruction(self.coefficients[np.ix_(rows, columns)], *errors, self.prior.of(rows))

    def known_error(self, target: int) -> float | None:
        """`predicted_error` of one target; None if it rests on an assumed motion."""
        error = float(self.predicted_error[target])
        return error if self.prior.source != ASSUMED and np.isfinite(error) else None


def check_method(method: str | None) -> str:
    """`method`, the default for None, or an InvalidValueError that lists the methods."""
    if method is None:
        return METHODS[0]
    if method not in METHODS:
        raise InvalidValueError("method", f"must be one of {', '.join(METHODS)}", value=f"{method!r}")
    return method


def reconstruct(
    snapshots: Sequence[StoredProfile],
    targets: Sequence[Profile],
    method: str | None = None,
    prior: Prior | None = None,
    t: float | None = None,
) -> Reconstruction:
    """Coefficients that make each target out of the snapshots.

    Arguments:
        snapshots: profiles of the stored averages (power functions, checkpoints, averages over known times), at least
            one, distinct, none after `t`.
        targets: the wanted profiles; power functions are treated in closed form, others by quadrature, and a
            `Combination` of the snapshots, in their order, is taken as it is.
        method: "minvar", minimum variance, or "paper", the published one; by default the first.
        prior: of the snapshots; by default even motion without rounding.
        t: the time of the targets; by default that of the wanted power functions, else of the last snapshot.

    Raises:
        InvalidValueError: no snapshots, one after `t`, or a target that is no profile or has no mass before them.
    """
    method = check_method(method)
    if not snapshots:
        raise InvalidValueError("snapshots", "must be at least one")
    for wanted in targets:
        if not all(callable(getattr(wanted, name, None)) for name in ("density", "tail")):
            reason = "must be a profile with density(s) and tail(s), such as PowerFunction.from_sigma_rel(0.15, t)"
            raise InvalidValueError("target", reason, value=" ".join(repr(wanted)[:40].split()))
    last = max(p.t for p in snapshots)
    if t is None:
        t = min((p.t for p in targets if isinstance(p, PowerFunction)), default=last)
    if last > t:
        raise InvalidValueError("snapshots", "must be at or before the time of the target")
    prior = assumed_prior(snapshots) if prior is None else prior
    problem = _Problem(snapshots, prior, t)
    # One by one, so that the rounding of a target's coefficients does not depend on the other targets.
    columns, predicted, profile = np.zeros((len(snapshots), len(targets))), *np.zeros((2, len(targets)))
    for k, target in enumerate(targets):
        if isinstance(target, Combination):
            columns[:, k], predicted[k] = target.coefficients, problem.error_of(target)
        else:
            columns[:, k : k + 1], predicted[k : k + 1], profile[k : k + 1] = problem.solve([target], method)
    return Reconstruction(columns, profile, predicted, prior)


def expected_errors(
    snapshots: Sequence[StoredProfile], targets: Sequence[PowerFunction], prior: Prior, t: float
) -> tuple[FloatArray, FloatArray]:
    """Predicted and profile errors of power functions by minimum variance: shape [targets] each.

    As by `reconstruct` except for the last digits; solving for all targets at once is many times faster.
    """
    return _Problem(snapshots, prior, t).solve(targets, METHODS[0], at_once=True)[1:]


_GAIN_OF_MANY, _GAIN_OF_FEW = (0.8, 0.95), (0.6, 0.75)
"""Predicted error of minimum variance, relative to that of the published coefficients, up to which it is used alone,
and from which the published ones are: an imperfect fit of the motion costs more than so small a gain (measured: with
0.9 and 1 up to 1.22 times the published error, after a pause of the clock). The motion is less certain with few
snapshots (measured: up to 1.6 times the published error)."""

_FEW_TIMES = 6


class _Problem:
    """Snapshots, and both solvers for targets at `t`."""

    def __init__(self, snapshots: Sequence[StoredProfile], prior: Prior, t: float) -> None:
        self._snapshots = {snapshot: row for row, snapshot in enumerate(snapshots)}
        self._variance = MinimumVariance(snapshots, prior, t)
        times = [snapshot.t for snapshot in snapshots]
        edges = with_points(np.unique(np.concatenate(([0.0], times, [t]))), snapshots, prior.steps)
        self._densities = Densities(snapshots, edges)
        self._factor = self._densities.of_stored(snapshots).reshape(-1, len(snapshots))
        self._may_blend = are_powers(snapshots)
        self._gains = _GAIN_OF_FEW if np.unique(times).size <= _FEW_TIMES else _GAIN_OF_MANY

    def solve(
        self, targets: Sequence[Profile], method: str, at_once: bool = False
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Coefficients, [snapshots, targets], predicted and profile errors, [targets]."""
        goals = self._variance.goals(targets)
        rows, squares = self._densities.of_targets(targets)
        profiles, norms = rows.reshape(-1, len(targets)), squares.sum(axis=0)
        # Algorithm 3 of the paper, divided by the sum; nan without mass.
        solution = solve_once(self._factor, profiles)[0] if at_once else self._published.solve(profiles)
        total = solution.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = np.where((total > 0) & (total < np.inf), solution / total, np.nan)
        stored = [(k, row) for k, target in enumerate(targets) if (row := self._row(target)) is not None]
        for column, row in stored:
            columns[:, column] = np.arange(columns.shape[0]) == row  # the exact solution without rounding
        if method == METHODS[0]:
            own = self._variance.solve(goals, at_once)
            columns = np.where(np.isnan(columns) | (not self._may_blend), own, columns)
            best, there = (self._variance.expected_squares(found, goals) for found in (own, columns))
            gain = np.sqrt(np.divide(best, there, out=np.zeros(best.size), where=there > 0))
            sure, none = self._gains
            columns = own + np.clip((gain - sure) / (none - sure), 0.0, 1.0) * (columns - own)
        elif np.isnan(columns).any():
            reason = "none of its mass lies before the last snapshot in use"
            raise InvalidValueError("target", reason, "use the time of a snapshot")
        # || sum_i c_i p_i - p || / || p ||, outside and inside of the span of the basis.
        unreachable = np.maximum(norms - np.sum(profiles**2, axis=0), 0.0)
        errors = np.sqrt((unreachable + np.sum((self._factor @ columns - profiles) ** 2, axis=0)) / norms)
        for column, row in stored:
            if np.array_equal(np.flatnonzero(columns[:, column]), [row]):
                errors[column] = 0.0
        return columns, self._variance.expected_errors(columns, goals), errors

    def error_of(self, made: Combination) -> float:
        """The predicted error of exactly these coefficients: that of the stored copies."""
        column = made.coefficients[:, None]
        return float(self._variance.expected_errors(column, self._variance.made_of(column))[0])

    @cached_property
    def _published(self) -> LeastSquares:
        return LeastSquares(self._factor)

    def _row(self, target: Profile) -> int | None:
        """The snapshot that is the target."""
        return self._snapshots.get(target) if isinstance(target, PowerFunction) else None
