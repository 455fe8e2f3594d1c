"""Coefficients for targets by either method, with predicted and profile errors.

The published method (Karras et al., arXiv 2312.02696, section 3.2 and appendix C.3): the stored
averages have profiles p_1 .. p_n, the target has profile p, and the coefficients c minimise the L2
distance

    || sum_i c_i p_i - p ||,      <f, g> = integral f(s) g(s) ds,

and are then divided by their sum. Without the division the error at sigma_rel >= 0.2 is several
times larger, since an average whose mass is not 1 scales the weights.

Minimum variance, the default: for a network that moves as a random walk of variance v(s) ds with
noise of intensity w(s) (see `motion`), and stored copies with errors of variance r_i, the average
with coefficients c, sum(c) = 1, has

    E |error|^2 = integral v (sum_i c_i tail_i - tail)^2 ds + integral w (sum_i c_i p_i - p)^2 ds +
    sum_i c_i^2 r_i.

Minimising it over c is a least-squares problem whose squared residual is the expected squared
error; the constraint eliminates the last coefficient. The second term alone is the published
method; most networks are closer to a walk.

If the path of the weights was sketched, the error of any coefficients is measured (see `Sketch`),
and that is the error bar. The coefficients minimise the mean of the measured and the expected
error: there are fewer projections than directions of motion, and coefficients fitted to the
projections alone are worse in the other directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from posthoc_cli.errors import InvalidValueError, brief, check_word
from posthoc_cli.profiles import (
    Discrete,
    FloatArray,
    OrdinaryEMA,
    Point,
    PowerFunction,
    Profile,
    StoredProfile,
)
from posthoc_cli.reconstruction.motion import sampling_errors
from posthoc_cli.reconstruction.nodes import Nodes
from posthoc_cli.reconstruction.prior import ASSUMED, Prior, assumed_prior, rounding_factor

METHODS = ("minvar", "paper")  # the solvers; the first one is the default


def check_method(method: str | None) -> str:
    """Return `method`, or the default for None; raise an InvalidValueError that lists the methods
    if it is none."""
    if method is None:
        return METHODS[0]
    check_word("method", method, METHODS)
    return method


@dataclass(frozen=True)
class Reconstruction:
    """Coefficients for targets, [snapshots, targets], each column of sum 1, under the prior of the
    snapshots.

    `profile_error`, [targets], is the paper's measure || sum_i c_i p_i - p || / || p ||; float64
    limits it to about 1e-7. For checkpoints, whose mass is at single steps, it is far above 1 and
    says little. `predicted_error`, [targets], is the expected relative L2 error of the weights.
    """

    coefficients: FloatArray
    profile_error: FloatArray
    predicted_error: FloatArray
    prior: Prior

    def of(
        self, snapshots: Sequence[int] | None = None, targets: Sequence[int] | None = None
    ) -> Reconstruction:
        """Return the part for some of the snapshots, if the others have coefficients of 0, and some
        of the targets."""
        count, wanted = self.coefficients.shape
        rows = list(range(count) if snapshots is None else snapshots)
        columns = list(range(wanted) if targets is None else targets)
        errors = self.profile_error[columns], self.predicted_error[columns]
        return Reconstruction(
            self.coefficients[np.ix_(rows, columns)], *errors, self.prior.of(rows)
        )

    def known_error(self, target: int) -> float | None:
        """Return the `predicted_error` of one target; None if it is not finite or rests on assumed
        motion."""
        error = float(self.predicted_error[target])
        return error if self.prior.source != ASSUMED and np.isfinite(error) else None


def reconstruct(
    snapshots: Sequence[StoredProfile],
    targets: Sequence[Profile | FloatArray],
    method: str | None = None,
    prior: Prior | None = None,
    t: float | None = None,
    others: Mapping[int, Profile] | None = None,
) -> Reconstruction:
    """Return the coefficients of the snapshots that reconstruct each target.

    Arguments:
        snapshots: profiles of the stored averages, at least one, distinct, none after `t`.
        targets: profiles. An array of coefficients, [snapshots], in place of a profile is used
            unchanged.
        method: "minvar", minimum variance, or "paper", the published one; by default the first.
        prior: of the snapshots; by default even motion without rounding.
        t: the time of the targets; by default that of the wanted power functions, else of the last
            snapshot.
        others: by the index of a target what it may be as well, as far as the run's clock is
            unknown: predicted errors contain the distance.

    Raises:
        InvalidValueError: no snapshots, one after `t`, or a target that is no profile or has no
            mass before them.
    """
    method = check_method(method)
    if not snapshots:
        raise InvalidValueError("snapshots", "must be at least one")
    for wanted in targets:
        is_given = isinstance(wanted, np.ndarray) and wanted.shape == (len(snapshots),)
        if not (is_given or callable(getattr(wanted, "tail", None))):
            reason = "must be a profile with tail(s), such as PowerFunction.from_sigma_rel(0.15, t)"
            reason += f", or an array of {len(snapshots)} coefficients"
            raise InvalidValueError("target", reason, value=brief(wanted))
    last = max(p.t for p in snapshots)
    if t is None:
        t = min((p.t for p in targets if isinstance(p, PowerFunction)), default=last)
    if last > t:
        raise InvalidValueError("snapshots", "must be at or before the time of the target")
    prior = assumed_prior(snapshots) if prior is None else prior
    problem = Problem(snapshots, prior, t)
    # One at a time, so that no bit of a target's coefficients depends on the other targets.
    columns, profile, predicted = (
        np.zeros((len(snapshots), len(targets))),
        *np.zeros((2, len(targets))),
    )
    for k, target in enumerate(targets):
        if isinstance(target, np.ndarray):
            columns[:, k], predicted[k] = target, problem.error_of(target)
        else:
            unknown = problem.apart(target, others[k]) if others and k in others else 0.0
            columns[:, k : k + 1], profile[k : k + 1], predicted[k : k + 1] = problem.solve(
                [target], method, unknown
            )
    return Reconstruction(columns, profile, predicted, prior)


# --- least squares


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
            condition = np.abs(r).sum(axis=0).max(initial=size) * np.abs(self.inverse).sum(
                axis=0
            ).max(initial=0.0)
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
        return np.asarray(np.sum((goals - self._q @ (self._q.T @ goals)) ** 2, axis=0))

    @property
    def leverage(self) -> FloatArray:
        """The share of a change in each row of a goal that the fit follows, in [0, 1]: shape
        [rows]."""
        return np.asarray(np.sum(self._q**2, axis=1))


# --- the problem

_LEAST_LEFT = 0.1  # lower limit of the share of a residual that remains after a solution

_NO_ROUNDING = 1e-30
"""Squared rounding, relative to the squared norm, below which a copy is exact; that of any dtype is
far larger."""

_GAIN = (0.8, 0.95)
_GAIN_OF_ONE = (0.4, 0.6)
"""Predicted error of minimum variance, relative to that of the published coefficients. Up to the
first number minimum variance is used alone, from the second on the published coefficients alone,
and a blend in between: an imperfect fit of the motion costs more than so small a gain (measured:
with 0.9 and 1 up to 1.22 times the published error, after a pause of the clock). The motion is less
certain with few snapshots of one profile (with 0.6 and 0.75 up to 1.8)."""

_GAIN_OVER_NEAREST = 0.5, 0.8
"""The same, relative to the coefficients whose tail is nearest, for averages of other programs. Of
the 252 cells of `bench_checkpoints.py` with uneven steps, 71 % are at most 1.05 times as far off as
the nearest tail without a blend, 89 % with 0.8 and 0.95, 95 % with these."""

_FEW_TIMES = 6  # up to this number of distinct times the snapshots are few

_CLEARLY = 0.75
"""Measured squared error, relative to that of the published coefficients, below which others
replace them (measured: of 6,061 hard cells one is 5.05 % worse than published, by float32's
rounding; with 0.8 one is 8 %, with 0.65 6 %)."""

_TIMES_ALONE = 16
"""Number of newest times whose snapshots are compared, each alone, with a reconstruction: where
weights oscillate, an earlier one may be nearest (measured: 5 times nearer, for a sawtooth of 70
steps and snapshots of 100)."""

_SURE = 0.25
_CAUTION = 6.0
_WIDENING = 1.3
"""Doubt up to which the motion is trusted: for recorded runs it is 0.05 to 0.29, for oscillations
0.6 to 3. Each unit beyond makes a gain e**6 times less certain, and widens errors from motion by
e**1.3 (measured: for oscillations in step with the snapshots they were up to 80 times off; a larger
number would hold, and be too high, more often)."""


class _Rows(NamedTuple):
    """The part of the expected error that comes from the walk, or from noise: its intensity in each
    interval, and the factor of each node's row."""

    intensity: FloatArray
    roots: FloatArray


class Goals(NamedTuple):
    """Targets as columns of the least-squares problem of minimum variance: expected rows, then
    measured ones."""

    # the column and the snapshot of each target that is a stored power function
    stored: Sequence[tuple[int, int]]
    columns: FloatArray
    tails: FloatArray  # the targets' tails at the nodes, [nodes, targets]
    unreachable: FloatArray  # the part of each expected squared error that no coefficients change


class Problem:
    """The snapshots of a run, at or before `t`, in the order of the prior, and both solvers for
    targets at `t`.

    Coefficients have the shape [n, targets]. The mass before the first update lies on that update.
    """

    def __init__(self, snapshots: Sequence[StoredProfile], prior: Prior, t: float) -> None:
        self._stored = snapshots
        self._prior = prior
        times = np.array([profile.t for profile in snapshots])
        self._edges = np.unique(np.concatenate(([0.0, t], times)))
        distinct = np.unique(times)
        self._newest = np.flatnonzero(times >= distinct[-_TIMES_ALONE:][0])
        gammas = {profile.gamma for profile in snapshots if isinstance(profile, PowerFunction)}
        self._is_of_powers = all(isinstance(profile, PowerFunction) for profile in snapshots)
        if not self._is_of_powers:
            self._gains = _GAIN_OVER_NEAREST
        elif len(gammas) == 1 and distinct.size <= _FEW_TIMES:
            self._gains = _GAIN_OF_ONE
        else:
            self._gains = _GAIN
        start = min(float(prior.motion.edges[0]), t)
        edges = np.clip(np.concatenate((prior.motion.edges, times, [t])), start, t)
        self._nodes = Nodes(edges, snapshots, prior.steps)
        # The rows of the expected error; with a sketch the mean of expected and measured errors is
        # minimised.
        self._half = np.sqrt(0.5) if prior.sketch is not None else 1.0
        self._walk, self._noise = self._rows_of_motion()
        self._expected = self._expected_rows(snapshots)
        # The measured error, whose rows are the expected ones if there is no sketch: seen and
        # unseen.
        self._sketched = () if prior.sketch is None else prior.sketch.measured(snapshots)
        self._seen = self._sketched[0] if self._sketched else self._expected
        self._factor = np.vstack(
            (self._expected, *(self._half * rows for rows in self._sketched), self._errors)
        )

    def _rows_of_motion(self) -> tuple[_Rows, _Rows | None]:
        """Return the rows of the walk, and those of the noise if there is any."""
        alone = []
        for profile in self._stored:
            if isinstance(profile, Point):
                alone.append(profile.t)
            elif isinstance(profile, Discrete):
                alone.append(profile.t_first)
        nodes = self._nodes

        def rows(intensity: FloatArray) -> _Rows:
            sizes = nodes.weight * intensity[nodes.interval]
            return _Rows(intensity, self._half * np.sqrt(sizes))

        walk, noise = self._prior.motion.on(nodes.edges, alone, nodes.instant)
        return rows(walk), rows(noise) if noise.any() else None

    def _expected_rows(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return the columns of stored profiles in the expected error: for the walk, and for noise
        if there is any."""
        rows = [self._walk.roots[:, None] * self._nodes.tails(profiles)]
        if self._noise is not None:
            rows.append(self._noise.roots[:, None] * self._nodes.masses(profiles))
        return np.vstack(rows)

    def goals(self, targets: Sequence[Profile]) -> Goals:
        """Return the targets as columns of the problem, the argument of the other methods."""
        columns = np.zeros((self._factor.shape[0], len(targets)))
        tails = np.zeros((self._nodes.weight.size, len(targets)))
        unreachable = np.zeros(len(targets))
        for k, target in enumerate(targets):
            tails[:, k], missed = self._nodes.goal_of_tail(target)
            rows = [self._walk.roots * tails[:, k]]
            unreachable[k] = self._walk.intensity @ missed
            if self._noise is not None:
                masses, missed = self._nodes.goal_of_mass(target)
                rows.append(self._noise.roots * masses)
                unreachable[k] += self._noise.intensity @ missed
            if self._prior.sketch is not None:
                rows += (self._half * each[:, 0] for each in self._prior.sketch.measured([target]))
            column = np.concatenate(rows)
            columns[: column.size, k] = column
        place = {
            snapshot: row
            for row, snapshot in enumerate(self._stored)
            if isinstance(snapshot, PowerFunction)
        }
        stored = [(k, place[target]) for k, target in enumerate(targets) if target in place]
        return Goals(stored, columns, tails, self._half**2 * unreachable)

    def solve(
        self, targets: Sequence[Profile], method: str, unknown: float = 0.0
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return coefficients, [snapshots, targets], profile errors and predicted errors, [targets]
        each; the targets are `unknown` by that squared distance."""
        goals = self.goals(targets)
        nodes, factor, problem = self._published
        profiles = np.zeros((factor.shape[0], len(targets)))
        norms = np.zeros(len(targets))
        for k, target in enumerate(targets):
            mass, missed = nodes.goal_of_mass(target)
            profiles[:, k], norms[k] = np.sqrt(nodes.weight) * mass, missed.sum()
        # Algorithm 3 of the paper, divided by the sum; nan for a target without mass here.
        solution = problem.solve(profiles)
        total = solution.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = np.where((total > 0) & (total < np.inf), solution / total, np.nan)
        for column, row in goals.stored:
            # the exact solution without rounding
            columns[:, column] = np.arange(columns.shape[0]) == row
        if method == METHODS[0]:
            optimal = self.optimum(goals)
            if not self._is_of_powers:
                columns = self._nearest(goals)
            columns = np.where(np.isnan(columns), optimal, columns)
            choose = self._blended if self._prior.sketch is None else self._best_measured
            columns, expected = choose(optimal, columns, goals)
        elif np.isnan(columns).any():
            reason = "none of its mass lies before the last snapshot in use"
            raise InvalidValueError("target", reason, "use the time of a snapshot")
        else:
            expected = self.expected_squares(columns, goals)
        # Coefficients below the rounding of the sum become 0, so that their snapshots need not be
        # read.
        columns[np.abs(columns) < np.finfo(np.float64).eps * np.abs(columns).sum(axis=0)] = 0.0
        # || sum_i c_i p_i - p || / || p ||, from the parts outside and inside the span of
        # polynomials.
        missed, norms = (
            norms + np.sum(part**2, axis=0) for part in (factor @ columns - profiles, profiles)
        )
        # A target whose mass lies at one time is nowhere near any density.
        errors = np.sqrt(np.divide(missed, norms, out=np.ones(norms.size), where=norms > 0))
        for column, row in goals.stored:
            if np.array_equal(np.flatnonzero(columns[:, column]), [row]):
                errors[column] = 0.0
        unknown_too = expected + np.array([[unknown], [0.0]])
        return columns, errors, self.relative(unknown_too, columns, goals)

    def apart(self, target: Profile, other: Profile) -> float:
        """Return the expected squared distance between the averages of two targets."""
        goals = self.goals([target, other])
        difference = goals.columns[:, 0] - goals.columns[:, 1]
        first = len(self._expected)
        last = len(self._factor) - len(self._errors)
        if self._prior.sketch is None:
            return float(np.sum(difference[:last] ** 2))
        return float(np.sum(difference[first:last] ** 2)) / self._half**2

    def optimum(self, goals: Goals) -> FloatArray:
        """Return the coefficients of least expected error; the coefficients of each target sum to
        1."""
        others = self._problem.solve(goals.columns - self._factor[:, -1:])
        solution = np.vstack((others, 1 - others.sum(axis=0)))
        for column, row in goals.stored:
            if self._prior.rounding[row] <= _NO_ROUNDING * self._prior.norm[row]:
                solution[:, column] = np.arange(len(self._stored)) == row
        return np.asarray(solution)

    def expected_squares(
        self, coefficients: FloatArray, goals: Goals, solved: bool = False
    ) -> FloatArray:
        """Return E |error|^2 of targets, each with its column of coefficients of sum 1: shape [2,
        targets].

        The rows are the parts from motion, measured if there is a sketch, otherwise expected and
        widened by the doubt, and from rounding. Residuals of `solved` coefficients are scaled to
        what they would be without their rows.
        """
        missed = self._factor @ coefficients - goals.columns
        first = len(self._expected)
        last = len(self._factor) - len(self._errors)
        if self._prior.sketch is None:
            widening = np.exp(2 * _WIDENING * max(0.0, self._prior.doubt - _SURE))
            motion = (goals.unreachable + np.sum(missed[:last] ** 2, axis=0)) * widening
        else:
            measured = missed[first:last]
            if solved:
                measured = measured / np.maximum(
                    1 - self._problem.leverage[first:last, None], _LEAST_LEFT
                )
            motion = np.sum(measured**2, axis=0) / self._half**2
        return np.stack((motion, np.sum(missed[last:] ** 2, axis=0)))

    def relative(self, squares: FloatArray, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """Return the roots of `expected_squares`, relative to the targets' probable norms; nan if
        only that is 0."""
        norms = self._norms(coefficients, goals)
        errors = np.sqrt(squares.sum(axis=0))
        relative = np.divide(errors, norms, out=np.full(norms.size, np.nan), where=norms > 0)
        return np.where((norms > 0) | (errors > 0), relative, 0.0)

    def error_of(self, coefficients: FloatArray) -> float:
        """Return the predicted error of given coefficients, [n], from the errors of the stored
        copies alone."""
        column = coefficients[:, None]
        squares = np.sum((self._rounding @ column) ** 2, axis=0, keepdims=True)
        goals = Goals((), self._factor @ column, np.zeros((0, 1)), np.zeros(1))
        return float(self.relative(squares, column, goals)[0])

    def losses(self, targets: Sequence[Profile]) -> Losses:
        goals = self.goals(targets)
        return Losses(self._factor, goals.columns, goals.unreachable)

    def _best_measured(
        self, optimal: FloatArray, published: FloatArray, goals: Goals
    ) -> tuple[FloatArray, FloatArray]:
        """Return the optimal coefficients if they are clearly better than others, else the best
        others, with squares.

        Others are the published ones, and each snapshot of the newest times alone. Projections may
        overstate or understate motion, by the standard deviation of a squared length that D numbers
        show, sqrt(2 / D), while rounding is known: the optimal ones must be better either way.
        """
        every = np.arange(optimal.shape[1])
        alone = np.eye(len(self._stored))[:, self._newest]
        others = np.stack(
            (published, *(np.repeat(column[:, None], every.size, axis=1) for column in alone.T))
        )
        squares = self.expected_squares(optimal, goals, solved=True)
        other_squares = np.stack([self.expected_squares(other, goals) for other in others])
        best = other_squares.sum(axis=1).argmin(axis=0)
        is_better = np.ones(every.size, dtype=bool)
        unsure = np.sqrt(2 / len(self._seen))
        for deviation in (-unsure, unsure):
            shown = np.array([1 + deviation, 1.0])
            is_better &= shown @ squares < _CLEARLY * np.min(shown @ other_squares, axis=0)
        columns = np.where(is_better, optimal, others[best, :, every].T)
        return columns, np.where(is_better, squares, other_squares[best, :, every].T)

    def _blended(
        self, optimal: FloatArray, others: FloatArray, goals: Goals
    ) -> tuple[FloatArray, FloatArray]:
        """Return coefficients between both, nearer to the other ones for a smaller gain, and their
        squares."""
        least, usual = (self.expected_squares(c, goals).sum(axis=0) for c in (optimal, others))
        gain = np.sqrt(np.divide(least, usual, out=np.zeros(least.size), where=usual > 0))
        gain *= np.exp(_CAUTION * max(0.0, self._prior.doubt - _SURE))
        sure, none = self._gains
        columns = optimal + np.clip((gain - sure) / (none - sure), 0.0, 1.0) * (others - optimal)
        return columns, self.expected_squares(columns, goals)

    def _norms(self, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """Return the probable norms of targets that have these coefficients, whose sum is 1: shape
        [targets].

        A sketch measures them, up to a factor that is taken from the stored averages in use, whose
        norms are known. Without a sketch |theta_i|^2 = |theta_0|^2 + |motion since theta_0|^2 is
        expected of stored averages and of targets, and the result is at least half the smallest
        stored norm.
        """
        norms = self._prior.norm
        first = len(self._expected)
        if self._prior.source == ASSUMED or not norms.any():
            return np.full(coefficients.shape[1], np.sqrt(norms.mean()))
        if (sketch := self._prior.sketch) is None:
            wanted = goals.unreachable + np.sum(goals.columns[:first] ** 2, axis=0)
            squares = (norms - np.sum(self._expected**2, axis=0)) @ coefficients + wanted
            return np.asarray(np.sqrt(np.maximum(squares, norms.min() / 4)))
        projections = slice(first, first + len(self._seen))
        projected, wanted = (
            np.sum((sketch.means[:1].T + values[projections] / self._half) ** 2, axis=0)
            for values in (self._factor, goals.columns)
        )
        exact, sketched = (squares @ np.abs(coefficients) for squares in (norms, projected))
        return np.asarray(
            np.sqrt(
                wanted * np.divide(exact, sketched, out=np.zeros_like(sketched), where=sketched > 0)
            )
        )

    @cached_property
    def _published(self) -> tuple[Nodes, FloatArray, LeastSquares]:
        """The nodes, the factor and the least-squares problem of the published method, over
        time."""
        nodes = Nodes(self._edges, self._stored, self._prior.steps, per_step=False)
        factor = np.sqrt(nodes.weight)[:, None] * nodes.masses(self._stored)
        return nodes, factor, LeastSquares(factor)

    def _nearest(self, goals: Goals) -> FloatArray:
        """Return the coefficients of sum 1 whose tail is nearest to each target's: the best ones
        for a walk that is the same everywhere."""
        factor, problem = self._even
        wanted = np.sqrt(self._nodes.weight)[:, None] * goals.tails
        others = problem.solve(wanted - factor[:, -1:])
        return np.vstack((others, 1 - others.sum(axis=0)))

    @cached_property
    def _even(self) -> tuple[FloatArray, LeastSquares]:
        factor = np.sqrt(self._nodes.weight)[:, None] * self._nodes.tails(self._stored)
        return factor, LeastSquares(factor[:, :-1] - factor[:, -1:])

    @cached_property
    def _problem(self) -> LeastSquares:
        """The problem for all coefficients but the last, which is 1 minus their sum."""
        return LeastSquares(self._factor[:, :-1] - self._factor[:, -1:])

    @cached_property
    def _rounding(self) -> FloatArray:
        """A root of the covariance of the stored copies' errors: shape [n or more, n]."""
        rows = np.vstack(self._sketched or (self._expected,))
        squared = np.sum(rows**2, axis=0)
        apart = np.maximum(squared[:, None] + squared - 2 * rows.T @ rows, 0.0)
        separate = rounding_factor(self._prior.rounding, self._prior.arithmetic, apart)
        if self._prior.shared is None:
            return separate
        return np.vstack((separate, self._prior.shared.T))

    @cached_property
    def _errors(self) -> FloatArray:
        """`_rounding`, and below it the errors of values that averages took in, and of decays and
        beginnings that were estimated: shape [n or more, n].

        If an estimated time constant is off by a factor 1 + e, each tail changes by e d tail / d
        log(tau), with the same e for all averages and the standard deviation that the profiles
        state. The motion turns these changes into errors that add up over the averages. The same
        holds for an estimated beginning that is off.
        """
        rows = [self._rounding, sampling_errors(self._stored, self._prior.motion)]
        for others in zip(
            *(p.others if isinstance(p, OrdinaryEMA) else (p, p) for p in self._stored), strict=True
        ):
            if any(other is not stored for other, stored in zip(others, self._stored, strict=True)):
                changed = (self._expected_rows(others) - self._expected) / self._half
                rows.append(np.asarray(np.linalg.qr(changed, mode="r")))
        return np.vstack(rows)


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
        triangle = np.asarray(np.linalg.qr(np.hstack((factor, goals)), mode="r"))
        self._factor = triangle[:, : factor.shape[1]]
        self._goals = triangle[:, factor.shape[1] :]
        self._unreachable = unreachable
        self._left = np.arange(factor.shape[1])
        self._solve()

    def squares_without(self, groups: Sequence[Sequence[int]]) -> FloatArray:
        """Return the expected squared errors after the loss of each group of snapshots; `squares`
        if they are lost: [targets, groups]."""
        squares = np.repeat(self.squares[:, None], len(groups), axis=1)
        sizes = np.array([len(group) for group in groups])
        for size in set(sizes.tolist()):
            members = np.array([group for group in groups if len(group) == size])
            root = self._root[members]
            costs = np.linalg.pinv(root @ root.transpose(0, 2, 1), hermitian=True)
            lost = self._columns[:, members]
            squares[:, sizes == size] += np.einsum("tgi,gij,tgj->tg", lost, costs, lost)
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
        left = self._left
        count = self._factor.shape[1]
        others = self._factor[:, left[:-1]] - self._factor[:, left[-1:]]
        last = self._factor[:, left[-1:]]
        problem = LeastSquares(others, float(np.abs(self._factor).max()))
        solution = problem.solve(self._goals - last)
        root = problem.inverse
        self._solved = left.size
        self._is_degenerate = root.shape[1] < others.shape[1]
        self.squares = self._unreachable + problem.missed(self._goals - last)
        self._columns = np.zeros((self._goals.shape[1], count))
        self._root = np.zeros((count, root.shape[1]))
        self._columns[:, left[:-1]], self._columns[:, left[-1]] = (
            solution.T,
            1 - solution.sum(axis=0),
        )
        self._root[left[:-1]], self._root[left[-1]] = root, -root.sum(axis=0)


# --- very many snapshots

MOST_SOLVED = 1024
"""Limit of the snapshots in one reconstruction: its time is cubic in them, with little gain beyond
a thousand."""


def thinned_subset(
    snapshots: Sequence[StoredProfile], most: int = MOST_SOLVED, keep: int = 1
) -> list[int]:
    """Return the indices, ascending, of at most `most` snapshots, spread evenly back from each
    profile's newest.

    Of each power function, and of all other profiles together, at least `keep` are among them, if
    there are so many.
    """
    groups: dict[float, list[int]] = {}
    for index in sorted(range(len(snapshots)), key=lambda i: -snapshots[i].t):
        groups.setdefault(getattr(snapshots[index], "gamma", np.inf), []).append(index)
    subset: list[int] = []
    for group in groups.values():
        count = min(len(group), max(keep, most * len(group) // len(snapshots)))
        subset += [group[place * len(group) // count] for place in range(count)]
    return sorted(subset)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit NumPy's linear algebra to one thread in the process: many small problems need no thread
    pool.

    A command sets OPENBLAS_NUM_THREADS instead; a library cannot, since NumPy reads it when it is
    first imported.
    """
    with _openblas().limit(limits=1):
        yield


@lru_cache
def _openblas() -> ThreadpoolController:
    """Return the controller of NumPy's OpenBLAS, and of SciPy's if it is loaded; not of MKL, which
    torch uses, too."""
    return ThreadpoolController().select(internal_api="openblas")
