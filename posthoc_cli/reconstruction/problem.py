"""The expected error of any coefficients, for a network whose motion is known, and the coefficients
that minimise it.

For a network that moves as a random walk of variance v(s) ds with noise of intensity w(s) (see
`motion`), and stored copies with errors of variance r_i, the average with coefficients c, sum(c) =
1, has

    E |error|^2 = integral v (sum_i c_i tail_i - tail)^2 ds + integral w (sum_i c_i p_i - p)^2 ds +
    sum_i c_i^2 r_i.

Minimising it over c is a least-squares problem whose squared residual is the expected squared
error; the constraint eliminates the last coefficient.

If the path of the weights was sketched, the error of any coefficients is measured (see `Sketch`).
The coefficients minimise the mean of the measured and the expected error: there are fewer
projections than directions of motion, and coefficients fitted to the projections alone are worse in
the other directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

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
from posthoc_cli.reconstruction.prior import ASSUMED, Prior, rounding_factor

_LEAST_LEFT = 0.1  # lower limit of the share of a residual that remains after a solution

_NO_ROUNDING = 1e-30
"""Squared rounding, relative to the squared norm, below which a copy is exact; that of any dtype is
far larger."""

SURE = 0.25
_WIDENING = 1.3
"""Doubt up to which the motion is trusted: for recorded runs it is 0.05 to 0.29, for oscillations
0.6 to 3. Each unit beyond widens errors from motion by e**1.3 (measured: for oscillations in step
with the snapshots they were up to 80 times off; a larger number would hold, and be too high, more
often)."""


class _Rows(NamedTuple):
    """The part of the expected error that comes from the walk, or from noise: its intensity in each
    interval, and the factor of each node's row."""

    intensity: FloatArray
    roots: FloatArray


class Goal(NamedTuple):
    """A target as a column of the least-squares problem: expected rows, then measured ones, then
    those of errors, which are 0."""

    column: FloatArray
    tail: FloatArray  # the target's tail at the nodes
    unreachable: float  # the part of the expected squared error that no coefficients change
    stored: int | None  # the snapshot whose profile the target is


class Problem:
    """The snapshots of a run, at or before `t`, in the order of the prior, for targets at `t`.

    Coefficients have the shape [n]. The mass before the first update lies on that update.
    """

    def __init__(self, snapshots: Sequence[StoredProfile], prior: Prior, t: float) -> None:
        self.snapshots = snapshots
        self.prior = prior
        self._row_of_power = {
            profile: row
            for row, profile in enumerate(snapshots)
            if isinstance(profile, PowerFunction)
        }
        times = [profile.t for profile in snapshots]
        start = min(float(prior.motion.edges[0]), t)
        edges = np.concatenate((prior.motion.edges, times, [t])).clip(start, t)
        self._nodes = Nodes(edges, snapshots, prior.steps)
        # With a sketch the mean of expected and measured squares is minimised.
        self._scale = 1.0 if prior.sketch is None else np.sqrt(0.5)
        self._walk, self._noise = self._rows_of_motion()
        expected = self._expected_rows(snapshots)
        # As many rows as columns, with the same lengths and distances.
        self._basis, self._expected = np.linalg.qr(expected)
        self._stack_rows(expected)

    def _stack_rows(self, expected: FloatArray) -> None:
        """Set `_factor`: the rows of the expected error, of the measured one if there is a sketch,
        and of the errors of the averages; and where it has the rows of motion and of errors."""
        end = len(self._expected)
        if self.prior.sketch is None:
            self._seen = self._expected
            self._rounding = self._rounding_rows(self._expected)
            motion = [self._expected]
            self._motion_rows = slice(0, end)
        else:
            self._seen, unseen = self.prior.sketch.measured(self.snapshots)
            measured = np.vstack((self._seen, unseen))
            self._rounding = self._rounding_rows(measured)
            motion = [self._expected, self._scale * measured]
            self._motion_rows = slice(end, end + len(measured))
        errors = [
            self._rounding,
            sampling_errors(self.snapshots, self.prior.motion),
            *self._estimate_rows(expected),
        ]
        self._factor = np.vstack((*motion, *errors))
        self._error_rows = slice(self._motion_rows.stop, None)

    def _rows_of_motion(self) -> tuple[_Rows, _Rows | None]:
        """Return the rows of the walk, and those of the noise if there is any."""
        alone = []
        for profile in self.snapshots:
            if isinstance(profile, Point):
                alone.append(profile.t)
            elif isinstance(profile, Discrete):
                alone.append(profile.t_first)
        walk, noise = self.prior.motion.on(self._nodes.edges, alone, self._nodes.instant)
        if noise.any():
            return self._rows_of(walk), self._rows_of(noise)
        return self._rows_of(walk), None

    def _rows_of(self, intensity: FloatArray) -> _Rows:
        sizes = self._nodes.weight * intensity[self._nodes.interval]
        return _Rows(intensity, self._scale * np.sqrt(sizes))

    def _expected_rows(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return the columns of stored profiles in the expected error: for the walk, and for noise
        if there is any."""
        of_walk = self._walk.roots[:, None] * self._nodes.tails(profiles)
        if self._noise is None:
            return of_walk
        of_noise = self._noise.roots[:, None] * self._nodes.masses(profiles)
        return np.vstack((of_walk, of_noise))

    def _rounding_rows(self, motion: FloatArray) -> FloatArray:
        """Return a root of the covariance of the stored copies' errors, from their columns in the
        error of motion: shape [n or more, n]."""
        squared = _squared_lengths(motion)
        sums = squared[:, None] + squared
        apart = np.maximum(sums - 2 * motion.T @ motion, 0.0)
        separate = rounding_factor(self.prior.rounding, self.prior.arithmetic, apart)
        if self.prior.shared is None:
            return separate
        return np.vstack((separate, self.prior.shared.T))

    def _estimate_rows(self, expected: FloatArray) -> Iterator[FloatArray]:
        """Yield the rows of the errors of decays and beginnings that were estimated.

        If an estimated time constant is off by a factor 1 + e, each tail changes by e d tail / d
        log(tau), with the same e for all averages and the standard deviation that the profiles
        state. The motion turns these changes into errors that add up over the averages. The same
        holds for an estimated beginning that is off.
        """
        variants = [
            profile.others if isinstance(profile, OrdinaryEMA) else (profile, profile)
            for profile in self.snapshots
        ]
        for others in zip(*variants, strict=True):
            pairs = zip(others, self.snapshots, strict=True)
            if any(other is not stored for other, stored in pairs):
                changed = (self._expected_rows(others) - expected) / self._scale
                yield np.asarray(np.linalg.qr(changed, mode="r"))

    # --- a target, and the best coefficients for it

    def goal(self, target: Profile) -> Goal:
        """Return a target as a column of the problem, the argument of the other methods."""
        tail, rows, missed = self._rows_of_target(target)
        inside = self._basis.T @ rows
        outside = rows - self._basis @ inside
        unreachable = missed + float(outside @ outside)
        column = np.zeros(len(self._factor))
        column[: inside.size] = inside
        if self.prior.sketch is not None:
            measured = np.vstack(self.prior.sketch.measured([target]))
            column[self._motion_rows] = self._scale * measured[:, 0]
        stored = None
        if isinstance(target, PowerFunction):
            stored = self._row_of_power.get(target)
        return Goal(column, tail, unreachable, stored)

    def _rows_of_target(self, target: Profile) -> tuple[FloatArray, FloatArray, float]:
        """Return a target's tail at the nodes, its rows in the expected error, and the square that
        these miss."""
        tail, missed = self._nodes.goal_of_tail(target)
        rows = self._walk.roots * tail
        unreachable = self._walk.intensity @ missed
        if self._noise is not None:
            mass, missed = self._nodes.goal_of_mass(target)
            rows = np.append(rows, self._noise.roots * mass)
            unreachable += self._noise.intensity @ missed
        return tail, rows, float(self._scale**2 * unreachable)

    def optimum(self, goal: Goal) -> FloatArray:
        """Return the coefficients of least expected error, whose sum is 1."""
        row = goal.stored
        if row is not None:
            exact = _NO_ROUNDING * self.prior.norm[row]
            if self.prior.rounding[row] <= exact:
                return only(row, len(self.snapshots))
        return self._problem.solve(goal.column)

    @cached_property
    def _problem(self) -> SumOfOne:
        return SumOfOne(self._factor)

    def nearest(self, goal: Goal) -> FloatArray:
        """Return the coefficients of sum 1 whose tail is nearest to the target's: the best ones for
        a walk that is the same everywhere."""
        return self._even.solve(np.sqrt(self._nodes.weight) * goal.tail)

    @cached_property
    def _even(self) -> SumOfOne:
        tails = self._nodes.tails(self.snapshots)
        return SumOfOne(np.sqrt(self._nodes.weight)[:, None] * tails)

    def losses(self, targets: Sequence[Profile]) -> Losses:
        goals = [self.goal(target) for target in targets]
        columns = np.stack([goal.column for goal in goals], axis=1)
        unreachable = np.array([goal.unreachable for goal in goals])
        return Losses(self._factor, columns, unreachable)

    # --- the error of any coefficients

    def expected_squares(
        self,
        coefficients: FloatArray,
        goal: Goal,
        solved: bool = False,
    ) -> FloatArray:
        """Return E |error|^2 of coefficients of sum 1, [n] or [n, candidates], in two parts: [2] or
        [2, candidates].

        The parts are from motion, measured if there is a sketch, otherwise expected and widened by
        the doubt, and from rounding. Residuals of `solved` coefficients are scaled to what they
        would be without their rows.
        """
        reached = self._factor @ coefficients
        missed = reached.T - goal.column
        motion = missed[..., self._motion_rows]
        rounding = np.sum(missed[..., self._error_rows] ** 2, axis=-1)
        if self.prior.sketch is None:
            doubt = max(0.0, self.prior.doubt - SURE)
            expected = goal.unreachable + np.sum(motion**2, axis=-1)
            widened = expected * np.exp(2 * _WIDENING * doubt)
            return np.stack((widened, rounding))
        if solved:
            left = 1 - self._problem.leverage[self._motion_rows]
            motion = motion / np.maximum(left, _LEAST_LEFT)
        measured = np.sum(motion**2, axis=-1) / self._scale**2
        return np.stack((measured, rounding))

    def relative(self, squares: FloatArray, coefficients: FloatArray, goal: Goal) -> float:
        """Return the root of the sum of `expected_squares`, [2], relative to the target's probable
        norm; nan if only that is 0."""
        error = float(np.sqrt(squares.sum()))
        norm = self._norm(coefficients, goal)
        if norm > 0:
            return error / norm
        return np.nan if error > 0 else 0.0

    def error_of(self, coefficients: FloatArray) -> float:
        """Return the predicted error of given coefficients from the errors of the stored copies
        alone."""
        squares = (self._rounding @ coefficients) ** 2
        goal = Goal(self._factor @ coefficients, np.zeros(0), 0.0, None)
        return self.relative(squares, coefficients, goal)

    def apart(self, target: Profile, other: Profile) -> float:
        """Return the expected squared distance between the averages of two targets."""
        if self.prior.sketch is None:
            _, first, _ = self._rows_of_target(target)
            _, second, _ = self._rows_of_target(other)
        else:
            first, second = np.vstack(self.prior.sketch.measured([target, other])).T
        return float(np.sum((first - second) ** 2))

    @property
    def unsure(self) -> float:
        """The relative standard deviation of a squared length that D numbers show: sqrt(2 / D)."""
        return float(np.sqrt(2 / len(self._seen)))

    def _norm(self, coefficients: FloatArray, goal: Goal) -> float:
        """Return the probable norm of the target that has these coefficients.

        A sketch measures it, up to a factor that is taken from the stored averages in use, whose
        norms are known. Without a sketch |theta_i|^2 = |theta_0|^2 + |motion since theta_0|^2 is
        expected of stored averages and of the target, and the result is at least half the smallest
        stored norm.
        """
        norms = self.prior.norm
        end = len(self._expected)
        if self.prior.source == ASSUMED or not norms.any():
            return float(np.sqrt(norms.mean()))
        sketch = self.prior.sketch
        if sketch is None:
            moved = goal.unreachable + np.sum(goal.column[:end] ** 2)
            origins = norms - self._expected_norms
            square = origins @ coefficients + moved
            return float(np.sqrt(max(square, norms.min() / 4)))
        projected = goal.column[end : end + len(self._seen)] / self._scale
        square = np.sum((sketch.means[0] + projected) ** 2)
        shares = np.abs(coefficients)
        sketched = self._sketched_norms @ shares
        if sketched == 0:
            return 0.0
        known = norms @ shares
        return float(np.sqrt(square * known / sketched))

    @cached_property
    def _expected_norms(self) -> FloatArray:
        """The expected squared distance of each stored average from the beginning: shape [n]."""
        return _squared_lengths(self._expected)

    @cached_property
    def _sketched_norms(self) -> FloatArray:
        """The squared norm of each stored average's projection: shape [n]."""
        assert self.prior.sketch is not None
        begin = self.prior.sketch.means[:1].T
        return _squared_lengths(begin + self._seen)


class PublishedGoal(NamedTuple):
    """A target as a column of the published problem, and the square of its part that no polynomial
    reaches."""

    column: FloatArray
    outside: float


class Published:
    """The published method: the L2 distance between profiles over time (Karras et al., section 3.2
    and appendix C.3)."""

    def __init__(self, snapshots: Sequence[StoredProfile], prior: Prior, t: float) -> None:
        edges = np.unique([0.0, t, *(profile.t for profile in snapshots)])
        self._nodes = Nodes(edges, snapshots, prior.steps, per_step=False)
        self._roots = np.sqrt(self._nodes.weight)
        self._factor = self._roots[:, None] * self._nodes.masses(snapshots)
        self._problem = LeastSquares(self._factor)

    def goal(self, target: Profile) -> PublishedGoal:
        mass, missed = self._nodes.goal_of_mass(target)
        return PublishedGoal(self._roots * mass, float(missed.sum()))

    def solve(self, goal: PublishedGoal) -> FloatArray:
        """Return the coefficients of algorithm 3, divided by their sum; nan for a target without
        mass here."""
        solution = self._problem.solve(goal.column)
        total = solution.sum()
        if 0 < total < np.inf:
            return np.asarray(solution / total)
        return np.full(solution.size, np.nan)

    def error(self, coefficients: FloatArray, goal: PublishedGoal) -> float:
        """Return || sum_i c_i p_i - p || / || p ||; 1 for a target whose mass lies at one time,
        nowhere near any density."""
        difference = self._factor @ coefficients - goal.column
        missed = goal.outside + np.sum(difference**2)
        norm = goal.outside + np.sum(goal.column**2)
        if norm > 0:
            return float(np.sqrt(missed / norm))
        return 1.0


# --- linear least squares


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
            condition = _norm(r, size) * _norm(self.inverse)
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
        reached = self._q @ (self._q.T @ goals)
        return _squared_lengths(goals - reached)

    @property
    def leverage(self) -> FloatArray:
        """The share of a change in each row of a goal that the fit follows, in [0, 1]: shape
        [rows]."""
        return np.asarray(np.sum(self._q**2, axis=1))


def only(row: int, count: int) -> FloatArray:
    """Return the coefficients of one of so many snapshots alone."""
    coefficients = np.zeros(count)
    coefficients[row] = 1.0
    return coefficients


def _squared_lengths(columns: FloatArray) -> FloatArray:
    return np.asarray(np.sum(columns**2, axis=0))


def _norm(matrix: FloatArray, least: float = 0.0) -> float:
    """Return the 1-norm of a matrix, or `least` if that is larger."""
    sums = np.abs(matrix).sum(axis=0)
    return float(sums.max(initial=least))


class SumOfOne:
    """argmin_c || factor c - goal || for coefficients of sum 1: the last one is 1 minus the others'
    sum."""

    def __init__(self, factor: FloatArray) -> None:
        self._last = factor[:, -1]
        self._others = LeastSquares(factor[:, :-1] - factor[:, -1:])

    def solve(self, goal: FloatArray) -> FloatArray:
        others = self._others.solve(goal - self._last)
        last = 1 - others.sum()
        return np.append(others, last)

    @property
    def leverage(self) -> FloatArray:
        return self._others.leverage


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
        columns = np.hstack((factor, goals))
        triangle = np.asarray(np.linalg.qr(columns, mode="r"))
        count = factor.shape[1]
        self._factor = triangle[:, :count]
        self._goals = triangle[:, count:]
        self._unreachable = unreachable
        self._left = np.arange(count)
        self._solve()

    def squares_without(self, groups: Sequence[Sequence[int]]) -> FloatArray:
        """Return the expected squared errors after the loss of each group of snapshots; `squares`
        if they are lost: [targets, groups]."""
        squares = np.repeat(self.squares[:, None], len(groups), axis=1)
        sizes = np.array([len(group) for group in groups])
        for size in set(sizes.tolist()):
            is_of_size = sizes == size
            members = np.array([group for group in groups if len(group) == size])
            root = self._root[members]
            inverse = root @ root.transpose(0, 2, 1)
            costs = np.linalg.pinv(inverse, hermitian=True)
            lost = self._columns[:, members]
            added = np.einsum("tgi,gij,tgj->tg", lost, costs, lost)
            squares[:, is_of_size] += added
        return squares

    def lose(self, snapshot: int) -> None:
        """Continue without one of the remaining snapshots."""
        self._left = self._left[self._left != snapshot]
        least = (1 - _REFRESH) * self._solved
        if self._is_degenerate or self._left.size <= least:
            self._solve()
            return
        row = self._root[snapshot].copy()
        lost = self._columns[:, snapshot].copy()
        square = row @ row
        pivot = self._root @ row / square
        added = lost * lost / square
        self.squares = self.squares + added
        self._columns -= np.multiply.outer(lost, pivot)
        self._root -= np.multiply.outer(pivot, row)
        self._columns[:, snapshot] = self._root[snapshot] = 0.0

    def of(self, snapshots: Sequence[int]) -> Losses:
        """Return the losses for a subset of all the snapshots, which are renumbered."""
        return Losses(self._factor[:, snapshots], self._goals, self._unreachable)

    def _solve(self) -> None:
        """Solve the problem for the remaining snapshots, and set `squares`, the coefficients and
        W."""
        *others, last = self._left.tolist()
        count = self._factor.shape[1]
        column = self._factor[:, [last]]
        goals = self._goals - column
        differences = self._factor[:, others] - column
        size = float(np.abs(self._factor).max())
        problem = LeastSquares(differences, size)
        solution = problem.solve(goals)
        root = problem.inverse
        rank = root.shape[1]
        self._solved = self._left.size
        self._is_degenerate = rank < len(others)
        self.squares = self._unreachable + problem.missed(goals)
        self._columns = np.zeros((goals.shape[1], count))
        self._columns[:, others] = solution.T
        self._columns[:, last] = 1 - solution.sum(axis=0)
        self._root = np.zeros((count, rank))
        self._root[others] = root
        self._root[last] = -root.sum(axis=0)
