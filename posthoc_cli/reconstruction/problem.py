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

from collections.abc import Sequence
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
from posthoc_cli.reconstruction.least_squares import LeastSquares, Losses, SumOfOne
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
        self._place = {
            profile: row
            for row, profile in enumerate(snapshots)
            if isinstance(profile, PowerFunction)
        }
        times = [profile.t for profile in snapshots]
        start = min(float(prior.motion.edges[0]), t)
        edges = np.concatenate((prior.motion.edges, times, [t])).clip(start, t)
        self._nodes = Nodes(edges, snapshots, prior.steps)
        # With a sketch the mean of expected and measured squares is minimised.
        self._half = 1.0 if prior.sketch is None else np.sqrt(0.5)
        self._walk, self._noise = self._rows_of_motion()
        expected = self._expected_rows(snapshots)
        # As many rows as columns, with the same lengths and distances.
        self._basis, self._expected = np.linalg.qr(expected)
        # The measured rows, seen and unseen, which are the expected ones without a sketch.
        self._sketched = () if prior.sketch is None else prior.sketch.measured(snapshots)
        self._seen = self._sketched[0] if self._sketched else self._expected
        measured = [self._half * rows for rows in self._sketched]
        self._rounding = self._rounding_rows()
        errors = self._error_rows_beside(expected)
        self._factor = np.vstack((self._expected, *measured, errors))
        first = len(self._expected)
        last = len(self._factor) - len(errors)
        self._motion_rows = slice(0 if prior.sketch is None else first, last)
        self._error_rows = slice(last, None)

    def _rows_of_motion(self) -> tuple[_Rows, _Rows | None]:
        """Return the rows of the walk, and those of the noise if there is any."""
        alone = []
        for profile in self.snapshots:
            if isinstance(profile, Point):
                alone.append(profile.t)
            elif isinstance(profile, Discrete):
                alone.append(profile.t_first)
        nodes = self._nodes

        def rows(intensity: FloatArray) -> _Rows:
            sizes = nodes.weight * intensity[nodes.interval]
            return _Rows(intensity, self._half * np.sqrt(sizes))

        walk, noise = self.prior.motion.on(nodes.edges, alone, nodes.instant)
        return rows(walk), rows(noise) if noise.any() else None

    def _expected_rows(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return the columns of stored profiles in the expected error: for the walk, and for noise
        if there is any."""
        rows = [self._walk.roots[:, None] * self._nodes.tails(profiles)]
        if self._noise is not None:
            rows.append(self._noise.roots[:, None] * self._nodes.masses(profiles))
        return np.vstack(rows)

    def _rounding_rows(self) -> FloatArray:
        """Return a root of the covariance of the stored copies' errors: shape [n or more, n]."""
        rows = np.vstack(self._sketched or (self._expected,))
        squared = np.sum(rows**2, axis=0)
        sums = squared[:, None] + squared
        apart = np.maximum(sums - 2 * rows.T @ rows, 0.0)
        separate = rounding_factor(self.prior.rounding, self.prior.arithmetic, apart)
        if self.prior.shared is None:
            return separate
        return np.vstack((separate, self.prior.shared.T))

    def _error_rows_beside(self, expected: FloatArray) -> FloatArray:
        """Return `_rounding`, and below it the errors of values that averages took in, and of
        decays and beginnings that were estimated: shape [n or more, n].

        If an estimated time constant is off by a factor 1 + e, each tail changes by e d tail / d
        log(tau), with the same e for all averages and the standard deviation that the profiles
        state. The motion turns these changes into errors that add up over the averages. The same
        holds for an estimated beginning that is off.
        """
        rows = [self._rounding, sampling_errors(self.snapshots, self.prior.motion)]
        variants = [
            profile.others if isinstance(profile, OrdinaryEMA) else (profile, profile)
            for profile in self.snapshots
        ]
        for others in zip(*variants, strict=True):
            pairs = zip(others, self.snapshots, strict=True)
            if any(other is not stored for other, stored in pairs):
                changed = (self._expected_rows(others) - expected) / self._half
                rows.append(np.asarray(np.linalg.qr(changed, mode="r")))
        return np.vstack(rows)

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
            column[self._motion_rows] = self._half * measured[:, 0]
        stored = self._place.get(target) if isinstance(target, PowerFunction) else None
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
        return tail, rows, float(self._half**2 * unreachable)

    def optimum(self, goal: Goal) -> FloatArray:
        """Return the coefficients of least expected error, whose sum is 1."""
        row = goal.stored
        if row is not None and self.prior.rounding[row] <= _NO_ROUNDING * self.prior.norm[row]:
            return np.asarray(np.eye(len(self.snapshots))[row])
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
        self, coefficients: FloatArray, goal: Goal, solved: bool = False
    ) -> FloatArray:
        """Return E |error|^2 of coefficients of sum 1, [n] or [n, candidates], in two parts: [2] or
        [2, candidates].

        The parts are from motion, measured if there is a sketch, otherwise expected and widened by
        the doubt, and from rounding. Residuals of `solved` coefficients are scaled to what they
        would be without their rows.
        """
        missed = (self._factor @ coefficients).T - goal.column
        motion = missed[..., self._motion_rows]
        rounding = np.sum(missed[..., self._error_rows] ** 2, axis=-1)
        if self.prior.sketch is None:
            doubt = max(0.0, self.prior.doubt - SURE)
            expected = goal.unreachable + np.sum(motion**2, axis=-1)
            return np.stack((expected * np.exp(2 * _WIDENING * doubt), rounding))
        if solved:
            left = 1 - self._problem.leverage[self._motion_rows]
            motion = motion / np.maximum(left, _LEAST_LEFT)
        measured = np.sum(motion**2, axis=-1) / self._half**2
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
            difference = self._rows_of_target(target)[1] - self._rows_of_target(other)[1]
        else:
            both = np.vstack(self.prior.sketch.measured([target, other]))
            difference = both[:, 0] - both[:, 1]
        return float(np.sum(difference**2))

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
        first = len(self._expected)
        if self.prior.source == ASSUMED or not norms.any():
            return float(np.sqrt(norms.mean()))
        sketch = self.prior.sketch
        if sketch is None:
            moved = goal.unreachable + np.sum(goal.column[:first] ** 2)
            origins = norms - self._expected_norms
            return float(np.sqrt(max(origins @ coefficients + moved, norms.min() / 4)))
        projected = goal.column[first : first + len(self._seen)] / self._half
        wanted = np.sum((sketch.means[0] + projected) ** 2)
        shares = np.abs(coefficients)
        sketched = self._sketched_norms @ shares
        if sketched == 0:
            return 0.0
        return float(np.sqrt(wanted * (norms @ shares) / sketched))

    @cached_property
    def _expected_norms(self) -> FloatArray:
        """The expected squared distance of each stored average from the beginning: shape [n]."""
        return np.asarray(np.sum(self._expected**2, axis=0))

    @cached_property
    def _sketched_norms(self) -> FloatArray:
        """The squared norm of each stored average's projection: shape [n]."""
        assert self.prior.sketch is not None
        begin = self.prior.sketch.means[:1].T
        return np.asarray(np.sum((begin + self._seen) ** 2, axis=0))


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
        missed = goal.outside + np.sum((self._factor @ coefficients - goal.column) ** 2)
        norm = goal.outside + np.sum(goal.column**2)
        return float(np.sqrt(missed / norm)) if norm > 0 else 1.0
