"""Coefficients for targets by either method, with predicted and profile errors.

The published method (Karras et al., arXiv 2312.02696, section 3.2 and appendix C.3): the stored averages have profiles
p_1 .. p_n, the target has profile p, and the coefficients c minimise the L2 distance

    || sum_i c_i p_i - p ||,      <f, g> = integral f(s) g(s) ds,

and are then divided by their sum. Without that the error at sigma_rel >= 0.2 is several times larger, since an average
of another mass than 1 scales the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from posthoc_cli.errors import InvalidValueError, brief, check_word
from posthoc_cli.profiles import FloatArray, PowerFunction, Profile, StoredProfile
from posthoc_cli.profiles.other_libraries import OrdinaryEMA
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
    order_of,
    solve_once,
    with_points,
)
from posthoc_cli.reconstruction.prior import ASSUMED, Prior, assumed_prior, rounding_factor

# --- minimum variance


_LEAST_LEFT = 0.1
"""Lower limit of what is left of a residual after a solution."""

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
    def unreachable(self) -> FloatArray:
        """The share of the squared norms that no coefficients reach: shape [targets]."""
        return np.asarray(np.maximum(self.norms - np.sum(self.columns**2, axis=0), 0.0))


class MinimumVariance:
    """The coefficients of least expected squared error at `t`, and that error. Coefficients: shape [n, targets].

    For a network that moves as a random walk of variance v(s) ds with noise of intensity w(s) (see `motion`), and
    stored copies with errors of variance r_i, the average with coefficients c, sum(c) = 1, has the error

        E |error|^2 = integral v (sum_i c_i tail_i - tail)^2 ds + integral w (sum_i c_i p_i - p)^2 ds + sum_i c_i^2 r_i.

    Minimising it over c is a least-squares problem, whose residual is the expected squared error; the last coefficient
    is eliminated by the constraint. The second term is the published method; most networks are closer to a walk.

    Where the path of the weights was sketched, the error of any coefficients is measured (see `Sketch`), and that is
    the error bar. What is minimised is the mean of the measured and the expected error: the projections are fewer than
    the directions in which the weights move, and coefficients that suit them alone suit the others less.

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
        cells = cells_between(edges, self._stored, prior.steps)
        self._terms = _terms(prior, cells, self._stored)
        self._root = np.sqrt(0.5) if self.is_measured else 1.0  # of the share of each kind of rows
        self._rows = self._root * np.vstack([term.of_stored(self._stored) for term in self._terms])  # [rows, n]

    def goals(self, targets: Sequence[Profile]) -> Goals:
        """What the other methods ask for."""
        columns, norms = zip(*(term.of_targets(targets) for term in self._terms), strict=True)
        return Goals(targets, self._root * np.vstack(columns), self._root**2 * np.sum(norms, axis=0))

    def solve(self, goals: Goals, at_once: bool = False) -> FloatArray:
        """The coefficients of least expected error; those of a target sum to 1.

        At once, many targets are solved several times faster, and differ in the last bits.
        """
        others, last = self._stacked[:, :-1] - self._stacked[:, -1:], self._stacked[:, -1:]
        wanted = np.vstack((goals.columns, np.zeros((self._errors.shape[0], goals.norms.size)))) - last
        found = solve_once(others, wanted)[0] if at_once else self._problem.solve(wanted)
        solution = np.vstack((found, 1 - found.sum(axis=0)))
        # Coefficients below the rounding of the sum are 0, so that their snapshots need not be read.
        solution[np.abs(solution) < np.finfo(np.float64).eps * np.abs(solution).sum(axis=0)] = 0.0
        exact = {self._stored[i]: i for i in np.flatnonzero(self._prior.rounding <= _NO_ROUNDING * self._prior.norm)}
        for column, target in enumerate(goals.targets):
            if isinstance(target, PowerFunction) and target in exact:
                solution[:, column] = np.arange(len(self._stored)) == exact[target]
        return self._as_given(solution)

    def expected_squares(self, coefficients: FloatArray, goals: Goals, solved: bool = False) -> FloatArray:
        """E |error|^2 of targets, each with its column of coefficients of sum 1: shape [motion and rounding, targets].

        What comes from motion is measured, or else widened where the motion is in doubt; what comes from rounding was
        measured. Of coefficients that were `solved` for, each measured number is as if it had been left out.
        """
        ordered = coefficients[self._order]
        missed = self._rows @ ordered - goals.columns
        if not self.is_measured:
            motion = (goals.unreachable + np.sum(missed**2, axis=0)) * np.exp(2 * _WIDENING * self.doubt)
        else:
            measured = missed[self._measured] / (self._left_out[:, None] if solved else 1.0)
            motion = np.sum(measured**2, axis=0) / self._root**2
        return np.stack((motion, np.sum((self._errors @ ordered) ** 2, axis=0)))

    def error_of(self, coefficients: FloatArray) -> float:
        """The predicted error of exactly these coefficients, [n]: that of the stored copies, whatever decays are."""
        column = coefficients[:, None]
        ordered = column[self._order]
        made = self._rows @ ordered
        squares = np.sum((self._rounding @ ordered) ** 2, axis=0, keepdims=True)
        return float(self.expected_errors(squares, column, Goals((), made, np.sum(made**2, axis=0)))[0])

    @property
    def is_measured(self) -> bool:
        """Whether the errors of any coefficients are measured, see `Sketch`."""
        return self._prior.sketch is not None

    @cached_property
    def _measured(self) -> slice:
        """The rows of measured errors; all of them where none are."""
        rows = self._rows.shape[0]
        return slice(0 if self._prior.sketch is None else rows - sum(self._prior.sketch.means.shape) - 1, rows)

    @property
    def unsure(self) -> float:
        """How far a measured square may be off, relative to it: of an error in one direction, of D projections."""
        return 0.0 if self._prior.sketch is None else float(np.sqrt(2 / self._prior.sketch.means.shape[1]))

    @cached_property
    def _left_out(self) -> FloatArray:
        """What a residual of each of these rows is, relative to what it would be had it not been solved for."""
        return np.maximum(1 - self._problem.leverage[self._measured], _LEAST_LEFT)

    @property
    def doubt(self) -> float:
        """That of the motion, beyond what is usual."""
        return max(0.0, self._prior.doubt - _SURE)

    def expected_errors(self, squares: FloatArray, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """The roots of `expected_squares`, relative to the targets' probable norms; nan if only that is 0."""
        norms, errors = self._norms(coefficients, goals), np.sqrt(squares.sum(axis=0))
        found = np.divide(errors, norms, out=np.full(norms.size, np.nan), where=norms > 0)
        return np.where((norms > 0) | (errors > 0), found, 0.0)

    def losses(self, targets: Sequence[Profile]) -> Losses:
        """The targets' squared errors as snapshots are lost, in the caller's order."""
        goals = self.goals(targets)
        columns = np.vstack((goals.columns, np.zeros((self._errors.shape[0], goals.norms.size))))
        return Losses(self._as_given(self._stacked.T).T, columns, goals.unreachable)

    def _norms(self, coefficients: FloatArray, goals: Goals) -> FloatArray:
        """Probable norms of targets that have these coefficients, whose sum is 1: shape [targets].

        Projections tell them, but for the factor by which they are off of the stored averages in use. Without, from a
        place theta_0 on, |theta_i|^2 = |theta_0|^2 + |sum of the motion in it|^2 is expected of stored averages and of
        targets; it is at least a quarter of the least norm's square. Assumed motion is relative to the stored norms.
        """
        ordered, norms, rows = coefficients[self._order], self._prior.norm, self._rows
        if self._prior.source == ASSUMED or not norms.any():
            return np.full(goals.norms.size, np.sqrt(norms.mean()))
        if (sketch := self._prior.sketch) is None:
            squares = (norms - np.sum(rows**2, axis=0)) @ ordered + goals.norms
            return np.asarray(np.sqrt(np.maximum(squares, norms.min() / 4)))
        projections = slice(self._measured.start, self._measured.start + sketch.means.shape[1])
        projected, wanted = (
            np.sum((sketch.means[:1].T + values[projections] / self._root) ** 2, axis=0)
            for values in (rows, goals.columns)
        )
        total, own = (squares @ np.abs(ordered) for squares in (norms, projected))
        return np.asarray(np.sqrt(wanted * np.divide(total, own, out=np.zeros_like(own), where=own > 0)))

    @cached_property
    def _rounding(self) -> FloatArray:
        """A root of the covariance of the stored copies' errors: shape [n or more, n]."""
        rows = self._rows[self._measured] / self._root
        squared = np.sum(rows**2, axis=0)
        apart = np.maximum(squared[:, None] + squared - 2 * rows.T @ rows, 0.0)
        own = rounding_factor(self._prior.rounding, self._prior.arithmetic, apart)
        return own if self._prior.shared is None else np.vstack((own, self._prior.shared.T))

    @cached_property
    def _errors(self) -> FloatArray:
        """The same with the errors of decays and beginnings that were found: shape [n or more, n].

        A time constant that is off by the factor 1 + e changes each tail by e d tail / d log(tau): the same e in all,
        of the standard deviation that the profiles have. What motion makes of the changes adds up like the errors. So
        does what a beginning changes that is off.
        """
        rows = [self._rounding]
        for others in zip(*(p.others if isinstance(p, OrdinaryEMA) else (p, p) for p in self._stored), strict=True):
            if any(one is not own for one, own in zip(others, self._stored, strict=True)):
                changed = self._root * np.vstack([term.of_stored(others) for term in self._terms]) - self._rows
                rows.append(np.asarray(np.linalg.qr(changed[self._measured] / self._root, mode="r")))
        return np.vstack(rows)

    @cached_property
    def _stacked(self) -> FloatArray:
        return np.vstack((self._rows, self._errors))

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
class _Listed:
    """Rows that are listed one by one: of the updates of intervals that have few, or measured: [rows, profiles]."""

    values: Callable[[Sequence[Profile]], FloatArray]
    root: FloatArray | float = 1.0

    def of_stored(self, profiles: Sequence[StoredProfile]) -> FloatArray:
        return self.of_targets(profiles)[0]

    def of_targets(self, targets: Sequence[Profile]) -> tuple[FloatArray, FloatArray]:
        columns = np.asarray((self.root * self.values(targets).T).T, dtype=np.float64)
        return columns, np.asarray(np.sum(columns**2, axis=0))


def _terms(prior: Prior, cells: Cells, stored: Sequence[StoredProfile]) -> list[_Integral | _Listed]:
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
        profile_error: shape [targets]; || sum_i c_i p_i - p || / || p ||, the paper's measure, 1e-7 for rounding. Of
            checkpoints, whose mass is at single steps, it is far above 1, and tells little.
        predicted_error: shape [targets]; expected relative L2 error of the weights (see `MinimumVariance`).
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
    check_word("method", method, METHODS)
    return method


def reconstruct(
    snapshots: Sequence[StoredProfile],
    targets: Sequence[Profile | FloatArray],
    method: str | None = None,
    prior: Prior | None = None,
    t: float | None = None,
) -> Reconstruction:
    """Coefficients that make each target out of the snapshots.

    Arguments:
        snapshots: profiles of the stored averages (power functions, checkpoints, averages over known times), at least
            one, distinct, none after `t`.
        targets: the wanted profiles; power functions are treated in closed form, others by quadrature. Or
            coefficients of the snapshots, [snapshots], which are taken as they are.
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
        is_profile = all(callable(getattr(wanted, name, None)) for name in ("density", "tail"))
        if not (is_profile or (isinstance(wanted, np.ndarray) and wanted.shape == (len(snapshots),))):
            reason = "must be a profile with density(s) and tail(s), such as PowerFunction.from_sigma_rel(0.15, t)"
            reason += f", or an array of {len(snapshots)} coefficients"
            raise InvalidValueError("target", reason, value=brief(wanted))
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
        if isinstance(target, np.ndarray):
            columns[:, k], predicted[k] = target, problem.variance.error_of(target)
        else:
            columns[:, k : k + 1], predicted[k : k + 1], profile[k : k + 1] = problem.solve([target], method)
    return Reconstruction(columns, profile, predicted, prior)


def expected_errors(
    snapshots: Sequence[StoredProfile], targets: Sequence[PowerFunction], prior: Prior, t: float
) -> tuple[FloatArray, FloatArray]:
    """Predicted and profile errors of power functions by minimum variance: shape [targets] each.

    As by `reconstruct` except for the last digits; solving for all targets together is many times faster.
    """
    return _Problem(snapshots, prior, t).solve(targets, METHODS[0], at_once=True)[1:]


_GAIN_OF_MANY, _GAIN_OF_FEW, _GAIN_OF_ONE = (0.8, 0.95), (0.6, 0.75), (0.4, 0.6)
"""Predicted error of minimum variance, relative to that of the published coefficients, up to which it is used alone,
and from which the published ones are: an imperfect fit of the motion costs more than so small a gain (measured: with
0.9 and 1 up to 1.22 times the published error, after a pause of the clock). The motion is less certain with few
snapshots (measured: up to 1.6 times the published error), and least so with few of one profile (with 0.6 and 0.75 up to
1.8)."""

_FEW_TIMES = 6

_CLEARLY = 0.9
"""Measured squared error, relative to that of the published coefficients, below which others are taken. Errors are
known within some per cent; with 1 a few cells of a thousand came out 5 to 8 % worse than published, with 0.9 none."""

_SURE = 0.25
"""Doubt up to which the motion is trusted. Of recorded runs it is 0.05 to 0.29; of oscillations 0.6 to 3."""

_CAUTION = 6.0
"""Each unit of doubt beyond makes a gain e**6 times less certain."""

_WIDENING = 1.3
"""Each unit of doubt beyond makes errors from motion e**1.3 times larger than the motion says (measured: oscillations
in step with the snapshots were up to 80 times off). More would hold more often, and be too high more often."""


class _Problem:
    """Snapshots, and both solvers for targets at `t`."""

    def __init__(self, snapshots: Sequence[StoredProfile], prior: Prior, t: float) -> None:
        self._snapshots = {snapshot: row for row, snapshot in enumerate(snapshots)}
        self.variance = MinimumVariance(snapshots, prior, t)
        times = [snapshot.t for snapshot in snapshots]
        self._last = max(times)
        edges = with_points(np.unique(np.concatenate(([0.0], times, [t]))), snapshots, prior.steps)
        self._densities = Densities(snapshots, edges)
        self._factor = self._densities.of_stored(snapshots).reshape(-1, len(snapshots))
        self._may_blend = are_powers(snapshots)
        few = _GAIN_OF_FEW if gammas_of(snapshots).size > 1 else _GAIN_OF_ONE
        self._gains = few if np.unique(times).size <= _FEW_TIMES else _GAIN_OF_MANY

    def solve(
        self, targets: Sequence[Profile], method: str, at_once: bool = False
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Coefficients, [snapshots, targets], predicted and profile errors, [targets]."""
        goals = self.variance.goals(targets)
        rows, squares = self._densities.of_targets(targets)
        profiles, norms = rows.reshape(-1, len(targets)), squares.sum(axis=0)
        # Algorithm 3 of the paper, divided by the sum; nan without mass.
        solution = solve_once(self._factor, profiles)[0] if at_once else self._published.solve(profiles)
        total = solution.sum(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            columns = np.where((total > 0) & (total < np.inf), solution / total, np.nan)
        powers = [(k, target) for k, target in enumerate(targets) if isinstance(target, PowerFunction)]
        stored = [(k, self._snapshots[target]) for k, target in powers if target in self._snapshots]
        for column, row in stored:
            columns[:, column] = np.arange(columns.shape[0]) == row  # the exact solution without rounding
        if method == METHODS[0]:
            own = self.variance.solve(goals, at_once)
            columns = np.where(np.isnan(columns) | (not self._may_blend), own, columns)
            blend = self._measured if self.variance.is_measured else self._blended
            columns, expected = blend(own, columns, goals)
        elif np.isnan(columns).any():
            reason = "none of its mass lies before the last snapshot in use"
            raise InvalidValueError("target", reason, "use the time of a snapshot")
        else:
            expected = self.variance.expected_squares(columns, goals)
        # || sum_i c_i p_i - p || / || p ||, outside and inside of the span of the basis.
        unreachable = np.maximum(norms - np.sum(profiles**2, axis=0), 0.0)
        errors = np.sqrt((unreachable + np.sum((self._factor @ columns - profiles) ** 2, axis=0)) / norms)
        for column, row in stored:
            if np.array_equal(np.flatnonzero(columns[:, column]), [row]):
                errors[column] = 0.0
        return columns, self.variance.expected_errors(expected, columns, goals), errors

    def _measured(self, own: FloatArray, published: FloatArray, goals: Goals) -> tuple[FloatArray, FloatArray]:
        """The own coefficients if they are clearly better than others, else the best others; its squares.

        Others are the published ones, and each newest snapshot alone. Projections show too much or too little motion,
        of all coefficients alike if it has one direction; rounding is known. So the own ones must be better either way.
        """
        expected, every = self.variance.expected_squares, np.arange(goals.norms.size)
        newest = [row for snapshot, row in self._snapshots.items() if snapshot.t == self._last]
        alone = np.eye(len(self._snapshots))[:, newest]
        others = np.stack((published, *(np.repeat(one[:, None], every.size, axis=1) for one in alone.T)))
        squares, there = expected(own, goals, solved=True), np.stack([expected(other, goals) for other in others])
        best = there.sum(axis=1).argmin(axis=0)
        is_own = np.ones(every.size, dtype=bool)
        for off in (-self.variance.unsure, self.variance.unsure):
            shown = np.array([1 + off, 1.0])
            is_own &= shown @ squares < _CLEARLY * np.min(shown @ there, axis=0)
        columns = np.where(is_own, own, others[best, :, every].T)
        return columns, np.where(is_own, squares, there[best, :, every].T)

    def _blended(self, own: FloatArray, published: FloatArray, goals: Goals) -> tuple[FloatArray, FloatArray]:
        """Coefficients between both, the nearer to the published ones, the smaller the gain, and its squares."""
        best, there = (self.variance.expected_squares(found, goals).sum(axis=0) for found in (own, published))
        gain = np.sqrt(np.divide(best, there, out=np.zeros(best.size), where=there > 0))
        gain *= np.exp(_CAUTION * self.variance.doubt)
        sure, none = self._gains
        columns = own + np.clip((gain - sure) / (none - sure), 0.0, 1.0) * (published - own)
        return columns, self.variance.expected_squares(columns, goals)

    @cached_property
    def _published(self) -> LeastSquares:
        return LeastSquares(self._factor)


# --- very many snapshots
#
# A solve is cubic in the number of snapshots, with little gain beyond a thousand. Late ones matter more for most
# averages, so that those in use are the newest, and earlier ones ever further apart.

MOST_SOLVED = 1024
"""Limit of the snapshots in one reconstruction."""


def thinned_subset(snapshots: Sequence[StoredProfile], most: int = MOST_SOLVED, keep: int = 1) -> list[int]:
    """A subset of at most `most` snapshots, the newest and a logarithmic spread: growing indices.

    Each power function, and all other profiles together, get equal shares, of at least `keep` each.
    """
    if len(snapshots) <= most:
        return list(range(len(snapshots)))
    groups: dict[float, list[int]] = {}
    for index in sorted(range(len(snapshots)), key=lambda i: -snapshots[i].t):
        groups.setdefault(getattr(snapshots[index], "gamma", np.inf), []).append(index)
    subset: list[int] = []
    room = most
    for done, group in enumerate(sorted(groups.values(), key=len)):
        count = min(len(group), max(keep, room // (len(groups) - done)))
        room = max(0, room - count)
        age = 1
        for left in range(count - 1, -1, -1):  # to the oldest one, each older by the same factor where that is a step
            subset.append(group[age - 1])
            age = max(age + 1, int(age * (len(group) / age) ** (1 / max(1, left)) + 1e-6))
    return sorted(subset)


# --- threads


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit NumPy's linear algebra to one thread within the block: many small problems need no pool.

    It is a setting of the process, and so limits other threads, too. A command sets OPENBLAS_NUM_THREADS instead, which
    holds for all its solves; that is read when NumPy is first imported, and not a library's to set.
    """
    with _openblas().limit(limits=1):
        yield


@lru_cache
def _openblas() -> ThreadpoolController:
    """NumPy's library, and SciPy's if it was imported before. Not MKL, which torch uses, too."""
    return ThreadpoolController().select(internal_api="openblas")
