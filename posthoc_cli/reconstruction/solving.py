"""Coefficients for targets by either method, with predicted and profile errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import FloatArray, PowerFunction, Profile
from posthoc_cli.reconstruction.minvar import MinimumVariance
from posthoc_cli.reconstruction.paper import ProfileDistance
from posthoc_cli.reconstruction.prior import ASSUMED, Prior, assumed_prior

METHODS = ("minvar", "paper")
"""The solvers; the first one is the default."""


@dataclass(frozen=True)
class Reconstruction:
    """Coefficients for one or several targets.

    Attributes:
        coefficients: shape [snapshots, targets]; each column sums to 1.
        profile_error: shape [targets]; || sum_i c_i p_i - p || / || p ||, the paper's measure. Values below 1e-7 are
            rounding.
        predicted_error: shape [targets]; expected relative L2 error of the weights under the prior (see `minvar`).
        prior: of the snapshots.
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
        return Reconstruction(
            self.coefficients[np.ix_(rows, columns)],
            self.profile_error[columns],
            self.predicted_error[columns],
            self.prior.of(rows),
        )

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
    snapshots: Sequence[PowerFunction],
    targets: Sequence[Profile],
    method: str | None = None,
    prior: Prior | None = None,
    t: float | None = None,
) -> Reconstruction:
    """Coefficients that make each target out of the snapshots.

    Arguments:
        snapshots: profiles of the stored averages, at least one, distinct, none after `t`.
        targets: the wanted profiles; power functions are treated in closed form, others by quadrature.
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
        _check_profile(wanted)
    if t is None:
        last = max(p.t for p in snapshots)
        t = min((p.t for p in targets if isinstance(p, PowerFunction)), default=last)
    if any(snapshot.t > t for snapshot in snapshots):
        raise InvalidValueError("snapshots", "must be at or before the time of the target")
    prior = assumed_prior(snapshots) if prior is None else prior
    distance = ProfileDistance(snapshots, t)
    variance = MinimumVariance(snapshots, prior, t)
    coefficients = np.zeros((len(snapshots), len(targets)))
    profile_error, predicted_error = np.zeros(len(targets)), np.zeros(len(targets))
    # One by one, so that the rounding of a target's coefficients does not depend on the other targets.
    for index, target in enumerate(targets):
        if method == "minvar":
            column = _careful(variance, distance, snapshots, target)
        else:
            column = _published(distance, snapshots, target)
        coefficients[:, index] = column
        predicted_error[index] = variance.expected_error(column, target)
        profile_error[index] = 0.0 if _is_stored(column, snapshots, target) else distance.error(column, target)
    return Reconstruction(coefficients, profile_error, predicted_error, prior)


def expected_errors(
    snapshots: Sequence[PowerFunction], targets: Sequence[PowerFunction], prior: Prior, t: float
) -> tuple[FloatArray, FloatArray]:
    """Predicted and profile errors of power functions by minimum variance: shape [targets] each.

    As by `reconstruct` except for the last digits; solving for all targets at once is many times faster.
    """
    distance, variance = ProfileDistance(snapshots, t), MinimumVariance(snapshots, prior, t)
    goals, profiles = variance.goals(targets), distance.goals(targets)
    own, published = variance.solve_all(goals), distance.solve_all(profiles)
    rows = {snapshot: row for row, snapshot in enumerate(snapshots)}
    stored = [(rows[target], column) for column, target in enumerate(targets) if target in rows]
    for row, column in stored:
        published[:, column] = np.arange(len(snapshots)) == row
    published = np.where(np.isnan(published), own, published)
    best, there = variance.expected_squares(own, goals), variance.expected_squares(published, goals)
    gain = np.sqrt(np.divide(best, there, out=np.zeros(best.size), where=there > 0))
    columns = own + _share_of_published(snapshots, gain) * (published - own)
    profile_error = distance.errors(columns, profiles)
    for row, column in stored:
        if np.array_equal(np.flatnonzero(columns[:, column]), [row]):
            profile_error[column] = 0.0
    return variance.expected_errors(columns, goals), profile_error


def _check_profile(target: object) -> None:
    if not all(callable(getattr(target, name, None)) for name in ("density", "tail")):
        reason = "must be a profile with density(s) and tail(s), such as PowerFunction.from_sigma_rel(0.15, t)"
        raise InvalidValueError("target", reason, value=" ".join(repr(target)[:40].split()))


_GAIN_OF_MANY, _GAIN_OF_FEW = (0.8, 0.95), (0.6, 0.75)
"""Predicted error of minimum variance, relative to that of the published coefficients, up to which it is used alone,
and from which the published ones are: an imperfect fit of the motion costs more than so small a gain (measured: with
0.9 and 1 up to 1.22 times the published error, after a pause of the clock). The motion is less certain with few
snapshots (measured: up to 1.6 times the published error)."""

_FEW_TIMES = 6


def _careful(
    variance: MinimumVariance, distance: ProfileDistance, snapshots: Sequence[PowerFunction], target: Profile
) -> FloatArray:
    """The coefficients of minimum variance, or the published ones if the gain is small."""
    own = variance.solve(target)
    try:
        published = _published(distance, snapshots, target)
    except InvalidValueError:
        return own
    there, best = variance.expected_square(published, target), variance.expected_square(own, target)
    gain = float(np.sqrt(best / there)) if there > 0 else 0.0
    return own + _share_of_published(snapshots, np.array(gain)) * (published - own)


def _share_of_published(snapshots: Sequence[PowerFunction], gain: FloatArray) -> FloatArray:
    """The share of the published coefficients in the result, by the relative predicted error of the others."""
    few = len({snapshot.t for snapshot in snapshots}) <= _FEW_TIMES
    sure, none = _GAIN_OF_FEW if few else _GAIN_OF_MANY
    return np.clip((gain - sure) / (none - sure), 0.0, 1.0)


def _published(distance: ProfileDistance, snapshots: Sequence[PowerFunction], target: Profile) -> FloatArray:
    if isinstance(target, PowerFunction) and target in snapshots:
        column = np.zeros(len(snapshots))  # the exact solution without rounding
        column[list(snapshots).index(target)] = 1.0
        return column
    return distance.solve(target)


def _is_stored(column: FloatArray, snapshots: Sequence[PowerFunction], target: Profile) -> bool:
    used = np.flatnonzero(column)
    return used.size == 1 and snapshots[used[0]] == target
