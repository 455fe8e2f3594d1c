"""Coefficients for targets by either method, with predicted and profile errors.

The published method (Karras et al., arXiv 2312.02696, section 3.2 and appendix C.3): the stored averages have profiles
p_1 .. p_n, the target has profile p, and the coefficients c minimise the L2 distance

    || sum_i c_i p_i - p ||,      <f, g> = integral f(s) g(s) ds,

and are then divided by their sum. Without the division the error at sigma_rel >= 0.2 is several times larger, since an
average whose mass is not 1 scales the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from threadpoolctl import ThreadpoolController

from posthoc_cli.errors import InvalidValueError, brief, check_word
from posthoc_cli.profiles import FloatArray, OrdinaryEMA, PowerFunction, Profile, StoredProfile
from posthoc_cli.reconstruction.basis import (
    Cells,
    Densities,
    LeastSquares,
    Losses,
    StoredFunctions,
    Tails,
    are_powers,
    cells_between,
    gammas_of,
    solve_once,
    with_points,
)
from posthoc_cli.reconstruction.prior import ASSUMED, Prior, assumed_prior, rounding_factor

# --- minimum variance


_LEAST_LEFT = 0.1
"""Lower limit of the share of a residual that remains after a solution, see `_left_out`."""

_NO_ROUNDING = 1e-30
"""Squared rounding, relative to the squared norm, below which a copy is exact; that of any dtype is far larger."""


@dataclass(frozen=True)
class Goals:
    """Targets as columns of a least-squares problem, [rows, targets], and their squared norms, [targets].

    Norms may exceed those of the columns: no coefficients reach the difference.
    """

    targets: Sequence[Profile]
    columns: FloatArray
    norms: FloatArray

    @cached_property
    def unreachable(self) -> FloatArray:
        """The part of the squared norms that no coefficients reach: shape [targets]."""
        return np.asarray(np.maximum(self.norms - np.sum(self.columns**2, axis=0), 0.0))


class MinimumVariance:
    """The coefficients of least expected squared error at `t`, and that error. Coefficients: shape [n, targets].

    For a network that moves as a random walk of variance v(s) ds with noise of intensity w(s) (see `motion`), and
    stored copies with errors of variance r_i, the average with coefficients c, sum(c) = 1, has the error

        E |error|^2 = integral v (sum_i c_i tail_i - tail)^2 ds + integral w (sum_i c_i p_i - p)^2 ds + sum_i c_i^2 r_i.

    Minimising it over c is a least-squares problem whose squared residual is the expected squared error; the constraint
    eliminates the last coefficient. The second term alone is the published method; most networks are closer to a walk.

    If the path of the weights was sketched, the error of any coefficients is measured (see `Sketch`), and that is the
    error bar. The coefficients minimise the mean of the measured and the expected error: there are fewer projections
    than directions of motion, and coefficients fitted to the projections alone are worse in the other directions.

    The profiles are at or before `t`, in the order of the prior; the mass before the first update lies on that update.
    """

    def __init__(self, snapshots: Sequence[StoredProfile], prior: Prior, t: float) -> None:
        self._stored, self._prior = snapshots, prior
        times = [profile.t for profile in self._stored]
        start = prior.motion.edges[0]
        edges = np.unique(np.clip(np.concatenate((prior.motion.edges, times, [t])), min(start, t), t))
        cells = cells_between(edges, self._stored, prior.steps)
        self._terms = _terms(prior, cells, self._stored)
        self._root = np.sqrt(0.5) if self.is_measured else 1.0  # root of the weight of expected and measured rows each
        self._rows = self._root * np.vstack([term.of_stored(self._stored) for term in self._terms])  # [rows, n]

    def goals(self, targets: Sequence[Profile]) -> Goals:
        """Return the targets as columns of the problem, the argument of the other methods."""
        columns, norms = zip(*(term.of_targets(targets) for term in self._terms), strict=True)
        return Goals(targets, self._root * np.vstack(columns), self._root**2 * np.sum(norms, axis=0))

    def solve(self, goals: Goals, at_once: bool = False) -> FloatArray:
        """Return the coefficients of least expected error; the coefficients of each target sum to 1.

        With `at_once`, many targets are solved several times faster, with other last bits.
        """
        wanted = self._with_errors(goals) - self._stacked[:, -1:]
        others = solve_once(self._differences, wanted)[0] if at_once else self._problem.solve(wanted)
        solution = np.vstack((others, 1 - others.sum(axis=0)))
        # Coefficients below the rounding of the sum become 0, so that their snapshots need not be read.
        solution[np.abs(solution) < np.finfo(np.float64).eps * np.abs(solution).sum(axis=0)] = 0.0
        unrounded = np.flatnonzero(self._prior.rounding <= _NO_ROUNDING * self._prior.norm)
        exact = {self._stored[i]: i for i in unrounded.tolist()}
        for column, target in enumerate(goals.targets):
            if isinstance(target, PowerFunction) and target in exact:
                solution[:, column] = np.arange(len(self._stored)) == exact[target]
        return np.asarray(solution)

    def expected_squares(self, coefficients: FloatArray, goals: Goals, solved: bool = False) -> FloatArray:
        """Return E |error|^2 of targets, each with its column of coefficients of sum 1: shape [2, targets].

        The rows are the parts from motion and from rounding. The former is measured if there is a sketch, otherwise
        expected and widened by the doubt. Of coefficients that were `solved` for, residuals are scaled by `_left_out`.
        """
        missed = self._rows @ coefficients - goals.columns
        if not self.is_measured:
            motion = (goals.unreachable + np.sum(missed**2, axis=0)) * np.exp(2 * _WIDENING * self.doubt)
        else:
            measured = missed[self._measured] / (self._left_out[:, None] if solved else 1.0)
            motion = np.sum(measured**2, axis=0) / self._root**2
        return np.stack((motion, np.sum((self._errors @ coefficients) ** 2, axis=0)))

    def error_of(self, coefficients: FloatArray) -> float:
        """Return the predicted error of given coefficients, [n], from the errors of the stored copies alone."""
        column = coefficients[:, None]
        made = self._rows @ column
        squares = np.sum((self._rounding @ column) ** 2, axis=0, keepdims=True)
        return float(self.expected_errors(squares, column, Goals((), made, np.sum(made**2, axis=0)))[0])

    @property
    def is_measured(self) -> bool:
        """Whether the errors of coefficients are measured, see `Sketch`."""
        return self._prior.sketch is not None

    @cached_property
    def _measured(self) -> slice:
        """The rows of measured errors; all rows if there is no sketch."""
        rows = self._rows.shape[0]
        return slice(0 if self._prior.sketch is None else rows - sum(self._prior.sketch.means.shape) - 2, rows)

    @property
    def unsure(self) -> float:
        """Relative standard deviation of a squared error in one direction, measured by D projections: sqrt(2 / D)."""
        return 0.0 if self._prior.sketch is None else float(np.sqrt(2 / self._prior.sketch.means.shape[1]))

    @cached_property
    def _left_out(self) -> FloatArray:
        """The residual of each measured row, relative to its residual if the solution had left the row out."""
        return np.maximum(1 - self._problem.leverage[self._measured], _LEAST_LEFT)

    @property
    def doubt(self) -> float:
        """The doubt about the motion beyond what is usual."""
        return max(0.0, self._prior.doubt - _SURE)

    def expected_errors(self, squares: FloatArray, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """Return the roots of `expected_squares`, relative to the targets' probable norms; nan if only that is 0."""
        norms, errors = self._norms(coefficients, goals), np.sqrt(squares.sum(axis=0))
        relative = np.divide(errors, norms, out=np.full(norms.size, np.nan), where=norms > 0)
        return np.where((norms > 0) | (errors > 0), relative, 0.0)

    def losses(self, targets: Sequence[Profile]) -> Losses:
        """Return the targets' squared errors as snapshots are lost."""
        goals = self.goals(targets)
        return Losses(self._stacked, self._with_errors(goals), goals.unreachable)

    def _norms(self, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """Return the probable norms of targets that have these coefficients, whose sum is 1: shape [targets].

        A sketch measures them, up to a factor that is taken from the stored averages in use, whose norms are known.
        Without a sketch |theta_i|^2 = |theta_0|^2 + |motion since theta_0|^2 is expected of stored averages and of
        targets, and the result is at least half the smallest stored norm. Assumed motion is relative to stored norms.
        """
        norms, rows = self._prior.norm, self._rows
        if self._prior.source == ASSUMED or not norms.any():
            return np.full(goals.norms.size, np.sqrt(norms.mean()))
        if (sketch := self._prior.sketch) is None:
            squares = (norms - np.sum(rows**2, axis=0)) @ coefficients + goals.norms
            return np.asarray(np.sqrt(np.maximum(squares, norms.min() / 4)))
        projections = slice(self._measured.start, self._measured.start + sketch.means.shape[1])
        projected, wanted = (
            np.sum((sketch.means[:1].T + values[projections] / self._root) ** 2, axis=0)
            for values in (rows, goals.columns)
        )
        exact, sketched = (squares @ np.abs(coefficients) for squares in (norms, projected))
        return np.asarray(np.sqrt(wanted * np.divide(exact, sketched, out=np.zeros_like(sketched), where=sketched > 0)))

    @cached_property
    def _rounding(self) -> FloatArray:
        """A root of the covariance of the stored copies' errors: shape [n or more, n]."""
        rows = self._rows[self._measured] / self._root
        squared = np.sum(rows**2, axis=0)
        apart = np.maximum(squared[:, None] + squared - 2 * rows.T @ rows, 0.0)
        separate = rounding_factor(self._prior.rounding, self._prior.arithmetic, apart)
        return separate if self._prior.shared is None else np.vstack((separate, self._prior.shared.T))

    @cached_property
    def _errors(self) -> FloatArray:
        """`_rounding`, and below it the errors of decays and beginnings that were estimated: shape [n or more, n].

        If an estimated time constant is off by a factor 1 + e, each tail changes by e d tail / d log(tau), with the
        same e for all averages and the standard deviation that the profiles state. The motion turns these changes into
        errors that add up over the averages. The same holds for an estimated beginning that is off.
        """
        rows = [self._rounding]
        for others in zip(*(p.others if isinstance(p, OrdinaryEMA) else (p, p) for p in self._stored), strict=True):
            if any(other is not stored for other, stored in zip(others, self._stored, strict=True)):
                changed = self._root * np.vstack([term.of_stored(others) for term in self._terms]) - self._rows
                rows.append(np.asarray(np.linalg.qr(changed[self._measured] / self._root, mode="r")))
        return np.vstack(rows)

    @cached_property
    def _stacked(self) -> FloatArray:
        """The rows of motion, and below them those of `_errors`."""
        return np.vstack((self._rows, self._errors))

    def _with_errors(self, goals: Goals) -> FloatArray:
        """Return the columns of targets, which have no errors, for the rows of `_stacked`."""
        return np.vstack((goals.columns, np.zeros((self._errors.shape[0], goals.norms.size))))

    @property
    def _differences(self) -> FloatArray:
        """The columns for all coefficients but the last, which is 1 minus their sum."""
        return np.asarray(self._stacked[:, :-1] - self._stacked[:, -1:])

    @cached_property
    def _problem(self) -> LeastSquares:
        """The problem for all coefficients but the last."""
        return LeastSquares(self._differences)


@dataclass(frozen=True)
class _Integral:
    """A term of the error that is an integral over intervals of many updates; `root`, [K], is the root of v or w.

    `most` is the limit of a target's squared norm, which would be infinite for noise at a point.
    """

    functions: StoredFunctions
    root: FloatArray
    most: float = np.inf

    def of_stored(self, profiles: Sequence[StoredProfile]) -> FloatArray:
        """Return the columns of stored profiles: shape [rows, n]."""
        return self._scaled(self.functions.of_stored(profiles))

    def of_targets(self, targets: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        """Return the columns of targets, [rows, n], and squared norms, [n], which may exceed those of the columns."""
        rows, squares = self.functions.of_targets(targets)
        return self._scaled(rows), np.minimum(self.root**2 @ squares, self.most)

    def _scaled(self, rows: FloatArray) -> FloatArray:
        """Return rows of the intervals, [K, G, n], times the roots: shape [K * G, n]."""
        return np.asarray((rows * self.root[:, None, None]).reshape(-1, rows.shape[2]), dtype=np.float64)


@dataclass(frozen=True)
class _Listed:
    """A term of the error that is a sum over rows: the updates of intervals that have few, or the sketch's.

    `values` returns a column per profile, [rows, profiles]; `root` is that of each row's weight.
    """

    values: Callable[[Sequence[Profile]], FloatArray]
    root: FloatArray | float = 1.0

    def of_stored(self, profiles: Sequence[StoredProfile]) -> FloatArray:
        """Return the columns of stored profiles: shape [rows, n]."""
        return self.of_targets(profiles)[0]

    def of_targets(self, targets: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        """Return the columns of targets, [rows, n], and their squared norms, [n]."""
        columns = np.asarray((self.root * self.values(targets).T).T, dtype=np.float64)
        return columns, np.asarray(np.sum(columns**2, axis=0))


def _terms(prior: Prior, cells: Cells, stored: Sequence[StoredProfile]) -> list[_Integral | _Listed]:
    """Return the terms of the error: walk, noise if there is any, and the sketch's measurement last."""
    walk, noise = prior.motion.on(cells.edges)
    few = cells.interval
    terms: list[_Integral | _Listed] = [_Integral(Tails(stored, cells.edges), np.sqrt(walk * cells.density))]
    if few.size:
        terms.append(_Listed(cells.tails, np.sqrt(walk[few] * cells.stride)))
    if noise.any():
        most = float(noise.max()) / cells.stride if cells.stride else np.inf
        densities = Densities(stored, cells.edges, cells.stride * cells.duration)
        terms.append(_Integral(densities, np.sqrt(noise * cells.duration), most))
        if few.size:
            terms.append(_Listed(cells.masses, np.sqrt(noise[few] / cells.stride)))
    if (sketch := prior.sketch) is not None:
        terms.append(_Listed(lambda profiles: np.vstack(sketch.measured(profiles))))
    return terms


# --- both methods


METHODS = ("minvar", "paper")
"""The solvers; the first one is the default."""


@dataclass(frozen=True)
class Reconstruction:
    """Coefficients for targets, under the prior of the snapshots.

    Attributes:
        coefficients: shape [snapshots, targets]; each column sums to 1.
        profile_error: shape [targets]; || sum_i c_i p_i - p || / || p ||, the paper's measure; float64 limits it to
            about 1e-7. For checkpoints, whose mass is at single steps, it is far above 1 and says little.
        predicted_error: shape [targets]; expected relative L2 error of the weights (see `MinimumVariance`).
    """

    coefficients: FloatArray
    profile_error: FloatArray
    predicted_error: FloatArray
    prior: Prior

    def of(self, snapshots: Sequence[int] | None = None, targets: Sequence[int] | None = None) -> Reconstruction:
        """Return the part for some of the snapshots, if the others have coefficients of 0, and some of the targets."""
        count, wanted = self.coefficients.shape
        rows = list(range(count) if snapshots is None else snapshots)
        columns = list(range(wanted) if targets is None else targets)
        errors = self.profile_error[columns], self.predicted_error[columns]
        return Reconstruction(self.coefficients[np.ix_(rows, columns)], *errors, self.prior.of(rows))

    def known_error(self, target: int) -> float | None:
        """Return the `predicted_error` of one target; None if it is not finite or rests on assumed motion."""
        error = float(self.predicted_error[target])
        return error if self.prior.source != ASSUMED and np.isfinite(error) else None


def check_method(method: str | None) -> str:
    """Return `method`, or the default for None; raise an InvalidValueError that lists the methods if it is none."""
    if method is None:
        return METHODS[0]
    check_word("method", method, METHODS)
    return method


def reconstruct(
    snapshots: Sequence[StoredProfile],
    targets: Sequence[Profile | FloatArray],
    method: str | None = None,
    prior: Prior | None = None,
    t: float | None = None,
) -> Reconstruction:
    """Return the coefficients of the snapshots that reconstruct each target.

    Arguments:
        snapshots: profiles of the stored averages (power functions, checkpoints, averages over known times), at least
            one, distinct, none after `t`.
        targets: profiles; power functions are treated in closed form, others by quadrature. An array of coefficients,
            [snapshots], in place of a profile is used unchanged.
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
        if not (
            callable(getattr(wanted, "tail", None))
            or (isinstance(wanted, np.ndarray) and wanted.shape == (len(snapshots),))
        ):
            reason = "must be a profile with tail(s), such as PowerFunction.from_sigma_rel(0.15, t)"
            reason += f", or an array of {len(snapshots)} coefficients"
            raise InvalidValueError("target", reason, value=brief(wanted))
    last = max(p.t for p in snapshots)
    if t is None:
        t = min((p.t for p in targets if isinstance(p, PowerFunction)), default=last)
    if last > t:
        raise InvalidValueError("snapshots", "must be at or before the time of the target")
    prior = assumed_prior(snapshots) if prior is None else prior
    problem = _Problem(snapshots, prior, t)
    # One at a time, so that no bit of a target's coefficients depends on the other targets.
    columns, predicted, profile = np.zeros((len(snapshots), len(targets))), *np.zeros((2, len(targets)))
    for k, target in enumerate(targets):
        if isinstance(target, np.ndarray):
            columns[:, k], predicted[k] = target, problem.variance.error_of(target)
        else:
            columns[:, k : k + 1], predicted[k : k + 1], profile[k : k + 1] = problem.solve([target], method)
    return Reconstruction(columns, profile, predicted, prior)


def expected_errors(
    snapshots: Sequence[StoredProfile], targets: Sequence[PowerFunction], prior: Prior, t: float
) -> tuple[FloatArray, FloatArray]:
    """Return predicted and profile errors of power functions by minimum variance: shape [targets] each.

    They equal those of `reconstruct` up to the last digits; solving for all targets at once is many times faster.
    """
    return _Problem(snapshots, prior, t).solve(targets, METHODS[0], at_once=True)[1:]


_GAIN, _GAIN_OF_ONE = (0.8, 0.95), (0.4, 0.6)
"""Predicted error of minimum variance, relative to that of the published coefficients. Up to the first number minimum
variance is used alone, from the second on the published coefficients alone, and a blend in between: an imperfect fit of
the motion costs more than so small a gain (measured: with 0.9 and 1 up to 1.22 times the published error, after a pause
of the clock). The motion is less certain with few snapshots of one profile (with 0.6 and 0.75 up to 1.8)."""

_FEW_TIMES = 6
"""Up to this number of distinct times the snapshots are few."""

_CLEARLY = 0.8
"""Measured squared error, relative to that of the published coefficients, below which others replace them. Of 2,970
cells 3 were more than 5 % worse than published, with 0.9 8."""

_TIMES_ALONE = 16
"""Number of newest times whose snapshots are compared, each alone, with a reconstruction: where weights oscillate, an
earlier one may be nearest (measured: 5 times nearer, for a sawtooth of 70 steps and snapshots of 100)."""

_SURE = 0.25
"""Doubt up to which the motion is trusted. For recorded runs it is 0.05 to 0.29, for oscillations 0.6 to 3."""

_CAUTION = 6.0
"""Each unit of doubt beyond `_SURE` makes a gain e**6 times less certain."""

_WIDENING = 1.3
"""Each unit of doubt beyond `_SURE` widens errors from motion by e**1.3 (measured: for oscillations in step with the
snapshots they were up to 80 times off). A larger number would hold more often, and be too high more often."""


class _Problem:
    """The snapshots, and both solvers for targets at `t`."""

    def __init__(self, snapshots: Sequence[StoredProfile], prior: Prior, t: float) -> None:
        self._snapshots = {snapshot: row for row, snapshot in enumerate(snapshots)}
        self.variance = MinimumVariance(snapshots, prior, t)
        times = [snapshot.t for snapshot in snapshots]
        self._alone_from = np.unique(times)[-_TIMES_ALONE:][0]
        edges = with_points(np.unique(np.concatenate(([0.0], times, [t]))), snapshots, prior.steps)
        self._densities = Densities(snapshots, edges)
        self._factor = self._densities.of_stored(snapshots).reshape(-1, len(snapshots))
        self._may_blend = are_powers(snapshots)
        is_unsure = gammas_of(snapshots).size == 1 and np.unique(times).size <= _FEW_TIMES
        self._gains = _GAIN_OF_ONE if is_unsure else _GAIN

    def solve(
        self, targets: Sequence[Profile], method: str, at_once: bool = False
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Return coefficients, [snapshots, targets], predicted errors and profile errors, [targets] each."""
        goals = self.variance.goals(targets)
        rows, squares = self._densities.of_targets(targets)
        profiles, norms = rows.reshape(-1, len(targets)), squares.sum(axis=0)
        # Algorithm 3 of the paper, divided by the sum; nan for a target without mass here.
        solution = solve_once(self._factor, profiles)[0] if at_once else self._published.solve(profiles)
        total = solution.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = np.where((total > 0) & (total < np.inf), solution / total, np.nan)
        powers = [(k, target) for k, target in enumerate(targets) if isinstance(target, PowerFunction)]
        stored = [(k, self._snapshots[target]) for k, target in powers if target in self._snapshots]
        for column, row in stored:
            columns[:, column] = np.arange(columns.shape[0]) == row  # the exact solution without rounding
        if method == METHODS[0]:
            optimal = self.variance.solve(goals, at_once)
            columns = np.where(np.isnan(columns) | (not self._may_blend), optimal, columns)
            choose = self._best_measured if self.variance.is_measured else self._blended
            columns, expected = choose(optimal, columns, goals)
        elif np.isnan(columns).any():
            reason = "none of its mass lies before the last snapshot in use"
            raise InvalidValueError("target", reason, "use the time of a snapshot")
        else:
            expected = self.variance.expected_squares(columns, goals)
        # || sum_i c_i p_i - p || / || p ||, from the parts outside and inside the span of the basis.
        unreachable = np.maximum(norms - np.sum(profiles**2, axis=0), 0.0)
        errors = np.sqrt((unreachable + np.sum((self._factor @ columns - profiles) ** 2, axis=0)) / norms)
        for column, row in stored:
            if np.array_equal(np.flatnonzero(columns[:, column]), [row]):
                errors[column] = 0.0
        return columns, self.variance.expected_errors(expected, columns, goals), errors

    def _best_measured(self, optimal: FloatArray, published: FloatArray, goals: Goals) -> tuple[FloatArray, FloatArray]:
        """Return the optimal coefficients if they are clearly better than others, else the best others, with squares.

        Others are the published ones, and each snapshot of the newest times alone. Projections overstate or understate
        motion, of all coefficients alike if it has one direction; rounding is known. The optimal ones must be better
        either way.
        """
        expected, every = self.variance.expected_squares, np.arange(goals.norms.size)
        newest = [row for snapshot, row in self._snapshots.items() if snapshot.t >= self._alone_from]
        alone = np.eye(len(self._snapshots))[:, newest]
        others = np.stack((published, *(np.repeat(column[:, None], every.size, axis=1) for column in alone.T)))
        squares = expected(optimal, goals, solved=True)
        other_squares = np.stack([expected(other, goals) for other in others])
        best = other_squares.sum(axis=1).argmin(axis=0)
        is_better = np.ones(every.size, dtype=bool)
        for deviation in (-self.variance.unsure, self.variance.unsure):
            shown = np.array([1 + deviation, 1.0])
            is_better &= shown @ squares < _CLEARLY * np.min(shown @ other_squares, axis=0)
        columns = np.where(is_better, optimal, others[best, :, every].T)
        return columns, np.where(is_better, squares, other_squares[best, :, every].T)

    def _blended(self, optimal: FloatArray, published: FloatArray, goals: Goals) -> tuple[FloatArray, FloatArray]:
        """Return coefficients between both, nearer to the published ones for a smaller gain, and their squares."""
        least, usual = (self.variance.expected_squares(c, goals).sum(axis=0) for c in (optimal, published))
        gain = np.sqrt(np.divide(least, usual, out=np.zeros(least.size), where=usual > 0))
        gain *= np.exp(_CAUTION * self.variance.doubt)
        sure, none = self._gains
        columns = optimal + np.clip((gain - sure) / (none - sure), 0.0, 1.0) * (published - optimal)
        return columns, self.variance.expected_squares(columns, goals)

    @cached_property
    def _published(self) -> LeastSquares:
        """The least-squares problem of the published method."""
        return LeastSquares(self._factor)


# --- very many snapshots

MOST_SOLVED = 1024
"""Limit of the snapshots in one reconstruction: its time is cubic in them, with little gain beyond a thousand."""


def thinned_subset(snapshots: Sequence[StoredProfile], most: int = MOST_SOLVED, keep: int = 1) -> list[int]:
    """Return the indices, ascending, of at most `most` snapshots, spread evenly back from each profile's newest.

    Of each power function, and of all other profiles together, at least `keep` are among them, if there are so many.
    """
    groups: dict[float, list[int]] = {}
    for index in sorted(range(len(snapshots)), key=lambda i: -snapshots[i].t):
        groups.setdefault(getattr(snapshots[index], "gamma", np.inf), []).append(index)
    subset: list[int] = []
    for group in groups.values():
        count = min(len(group), max(keep, most * len(group) // len(snapshots)))
        subset += [group[place * len(group) // count] for place in range(count)]
    return sorted(subset)


# --- threads


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit NumPy's linear algebra to one thread within the block, since many small problems need no thread pool.

    The setting is the process's, so that it limits other threads, too. A command sets OPENBLAS_NUM_THREADS instead,
    which holds for all its solves; a library cannot, since NumPy reads the variable when it is first imported.
    """
    with _openblas().limit(limits=1):
        yield


@lru_cache
def _openblas() -> ThreadpoolController:
    """Return the controller of NumPy's OpenBLAS, and of SciPy's if it is loaded; not of MKL, which torch uses, too."""
    return ThreadpoolController().select(internal_api="openblas")
