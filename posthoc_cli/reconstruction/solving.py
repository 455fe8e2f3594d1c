"""Coefficients for targets by either method, with predicted and profile errors.

The published method (Karras et al., arXiv 2312.02696, section 3.2 and appendix C.3): the stored
averages have profiles p_1 .. p_n, the target has profile p, and the coefficients c minimise the L2
distance

    || sum_i c_i p_i - p ||,      <f, g> = integral f(s) g(s) ds,

and are then divided by their sum. Without the division the error at sigma_rel >= 0.2 is several
times larger, since an average whose mass is not 1 scales the weights.

Minimum variance, the default, minimises the expected error of the weights. For a network that moves
as a random walk of variance v(s) ds with noise of intensity w(s) (see `motion`), and stored copies
with errors of variance r_i, the average with coefficients c, sum(c) = 1, has

    E |error|^2 = integral v (sum_i c_i tail_i - tail)^2 ds + integral w (sum_i c_i p_i - p)^2 ds +
    sum_i c_i^2 r_i.

Minimising it over c is a least-squares problem whose squared residual is the expected squared
error; the constraint eliminates the last coefficient. The published method is what it does for
noise alone; most networks are closer to a walk. Where the gain over simpler coefficients is small,
these replace the optimal ones, in part or altogether: the motion is never known exactly.

If the path of the weights was sketched, the error of any coefficients is measured (see `Sketch`).
The coefficients minimise the mean of the measured and the expected error: there are fewer
projections than directions of motion, and coefficients fitted to the projections alone are worse in
the other directions."""

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
from posthoc_cli.reconstruction.motion import (
    ASSUMED,
    Prior,
    assumed_prior,
    root_of,
    sampling_errors,
)
from posthoc_cli.reconstruction.nodes import Nodes

METHODS = ("minvar", "paper")  # the solvers; the first one is the default


def check_method(method: str | None) -> str:
    """Return `method`, or the default for None; raise an InvalidValueError that lists the methods
    if it is not one."""
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
        self,
        snapshots: Sequence[int] | None = None,
        targets: Sequence[int] | None = None,
    ) -> Reconstruction:
        """Return the part for some of the snapshots, if the others have coefficients of 0, and some
        of the targets."""
        stored, wished = self.coefficients.shape
        if snapshots is None:
            snapshots = range(stored)
        if targets is None:
            targets = range(wished)
        rows = list(snapshots)
        columns = list(targets)
        part = np.ix_(rows, columns)
        return Reconstruction(
            self.coefficients[part],
            self.profile_error[columns],
            self.predicted_error[columns],
            self.prior.of(rows),
        )

    def known_error(self, target: int) -> float | None:
        """Return the `predicted_error` of one target; None if it is not finite or rests on assumed
        motion."""
        error = float(self.predicted_error[target])
        if self.prior.source == ASSUMED or not np.isfinite(error):
            return None
        return error


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
        InvalidValueError: no snapshots, one after `t`, or a target that is not a profile or has no
            mass before them.
    """
    method = check_method(method)
    _check_profiles(snapshots, targets)
    last = max(profile.t for profile in snapshots)
    if t is None:
        wished = [target.t for target in targets if isinstance(target, PowerFunction)]
        t = min(wished, default=last)
    if last > t:
        raise InvalidValueError("snapshots", "must be at or before the time of the target")
    prior = prior or assumed_prior(snapshots)
    solver = _Solver(snapshots, prior, t, method)
    others = others or {}
    coefficients = np.zeros((len(snapshots), len(targets)))
    profile_errors = np.zeros(len(targets))
    predicted_errors = np.zeros(len(targets))
    # One at a time, so that no bit of a target's coefficients depends on the other targets.
    for k, target in enumerate(targets):
        solution = solver.solve(target, others.get(k))
        coefficients[:, k] = solution.coefficients
        profile_errors[k] = solution.profile_error
        predicted_errors[k] = solution.predicted_error
    return Reconstruction(coefficients, profile_errors, predicted_errors, prior)


def _check_profiles(
    snapshots: Sequence[StoredProfile],
    targets: Sequence[Profile | FloatArray],
) -> None:
    if not snapshots:
        raise InvalidValueError("snapshots", "must be at least one")
    for target in targets:
        if isinstance(target, np.ndarray):
            is_usable = target.shape == (len(snapshots),)
        else:
            is_usable = callable(getattr(target, "tail", None))
        if not is_usable:
            reason = "must be a profile with tail(s), such as PowerFunction.from_sigma_rel(0.15, t)"
            reason += f", or an array of {len(snapshots)} coefficients"
            raise InvalidValueError("target", reason, value=brief(target))


# --- one target

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

_CAUTION = 6.0
"""Each unit of doubt beyond SURE makes a gain e**6 times less certain."""


class _Solution(NamedTuple):
    coefficients: FloatArray  # [snapshots], of sum 1
    profile_error: float
    predicted_error: float


class _Solver:
    """Both methods for the snapshots of a run."""

    def __init__(
        self,
        snapshots: Sequence[StoredProfile],
        prior: Prior,
        t: float,
        method: str,
    ) -> None:
        self.problem = Problem(snapshots, prior, t)
        self._t = t
        self._is_minimum_variance = method == METHODS[0]
        times = np.array([profile.t for profile in snapshots])
        distinct = np.unique(times)
        first, *_ = distinct[-_TIMES_ALONE:]
        each_alone = np.eye(times.size)
        self._alone = each_alone[:, times >= first]
        powers = [profile for profile in snapshots if isinstance(profile, PowerFunction)]
        gammas = {profile.gamma for profile in powers}
        self._is_of_powers = len(powers) == len(snapshots)
        if not self._is_of_powers:
            self._gains = _GAIN_OVER_NEAREST
        elif len(gammas) == 1 and distinct.size <= _FEW_TIMES:
            self._gains = _GAIN_OF_ONE
        else:
            self._gains = _GAIN

    @cached_property
    def published(self) -> Published:
        problem = self.problem
        return Published(problem.snapshots, problem.prior, self._t)

    @np.errstate(under="ignore")  # of negligible masses, also where a program lets NumPy raise
    def solve(
        self,
        target: Profile | FloatArray,
        other: Profile | None,
    ) -> _Solution:
        """Return the solution for a target, which may be the `other` one as well."""
        problem = self.problem
        if isinstance(target, np.ndarray):
            error = problem.error_of(target)
            return _Solution(target, 0.0, error)
        goal = problem.goal(target)
        published_goal = self.published.goal(target)
        published = self._published_coefficients(goal, published_goal)
        if self._is_minimum_variance:
            coefficients, squares = self._minimum_variance(goal, published)
        elif np.isnan(published).any():
            reason = "none of its mass lies before the last snapshot in use"
            raise InvalidValueError("target", reason, "use the time of a snapshot")
        else:
            coefficients = published
            squares = problem.expected_squares(coefficients, goal)
        coefficients = _without_negligible(coefficients)
        profile_error = self.published.error(coefficients, published_goal)
        used = np.flatnonzero(coefficients)
        if used.tolist() == [goal.stored]:
            profile_error = 0.0
        if other is not None:
            apart = problem.apart(target, other)
            squares = np.append(squares, apart)
        if problem.prior.lasting is not None:
            lasting = coefficients @ problem.prior.lasting
            squares = np.append(squares, lasting**2)
        predicted = problem.relative(squares, coefficients, goal)
        return _Solution(coefficients, profile_error, predicted)

    def _published_coefficients(self, goal: Goal, published_goal: PublishedGoal) -> FloatArray:
        if goal.stored is None:
            return self.published.solve(published_goal)
        # the exact solution without rounding
        return only(goal.stored, len(self.problem.snapshots))

    def _minimum_variance(
        self,
        goal: Goal,
        published: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Return coefficients of nearly least expected error, and their `expected_squares`."""
        problem = self.problem
        optimal = problem.optimum(goal)
        simple = published if self._is_of_powers else problem.nearest(goal)
        if np.isnan(simple).any():
            simple = optimal
        if problem.prior.sketch is None:
            return self._blended(optimal, simple, goal)
        return self._best_measured(optimal, simple, goal)

    def _best_measured(
        self,
        optimal: FloatArray,
        published: FloatArray,
        goal: Goal,
    ) -> tuple[FloatArray, FloatArray]:
        """Return the optimal coefficients if they are clearly better than others, else the best
        others, with squares.

        Others are the published ones, and each snapshot of the newest times alone. Projections may
        overstate or understate motion, while rounding is known: the optimal ones must be better
        either way.
        """
        problem = self.problem
        others = np.column_stack((published, self._alone))
        squares = problem.expected_squares(optimal, goal, solved=True)
        other_squares = problem.expected_squares(others, goal)
        for deviation in (-problem.unsure, problem.unsure):
            factors = np.array([1 + deviation, 1.0])
            least = np.min(factors @ other_squares)
            if not factors @ squares < _CLEARLY * least:
                totals = other_squares.sum(axis=0)
                best = int(totals.argmin())
                return others[:, best], other_squares[:, best]
        return optimal, squares

    def _blended(
        self,
        optimal: FloatArray,
        others: FloatArray,
        goal: Goal,
    ) -> tuple[FloatArray, FloatArray]:
        """Return coefficients between both, nearer to the other ones for a smaller gain, and their
        squares."""
        problem = self.problem
        candidates = np.column_stack((optimal, others))
        squares = problem.expected_squares(candidates, goal)
        optimal_square, other_square = squares.sum(axis=0).tolist()
        gain = np.sqrt(optimal_square / other_square) if other_square > 0 else 0.0
        doubt = max(0.0, problem.prior.doubt - SURE)
        gain *= np.exp(_CAUTION * doubt)
        lowest, highest = self._gains
        passed = (gain - lowest) / (highest - lowest)
        share = np.clip(passed, 0.0, 1.0)
        coefficients = optimal + share * (others - optimal)
        return coefficients, problem.expected_squares(coefficients, goal)


def _without_negligible(coefficients: FloatArray) -> FloatArray:
    """Return coefficients with 0 for those below the rounding of the sum, so that their snapshots
    need not be read."""
    sizes = np.abs(coefficients)
    least = np.finfo(np.float64).eps * sizes.sum()
    return np.where(sizes < least, 0.0, coefficients)


# --- the expected error of any coefficients

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

    def __init__(
        self,
        snapshots: Sequence[StoredProfile],
        prior: Prior,
        t: float,
    ) -> None:
        self.snapshots = snapshots
        self.prior = prior
        self._row_of_power = {}
        for row, profile in enumerate(snapshots):
            if isinstance(profile, PowerFunction):
                self._row_of_power[profile] = row
        times = [profile.t for profile in snapshots]
        bounds = prior.motion.edges
        start = min(float(bounds[0]), t)
        edges = np.concatenate((bounds, times, [t]))
        self._nodes = Nodes(edges.clip(start, t), snapshots, prior.steps)
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
        sampling = sampling_errors(self.snapshots, self.prior.motion)
        estimates = self._estimate_rows(expected)
        self._factor = np.vstack([*motion, self._rounding, sampling, *estimates])
        self._error_rows = slice(self._motion_rows.stop, None)

    def _rows_of_motion(self) -> tuple[_Rows, _Rows | None]:
        """Return the rows of the walk, and those of the noise if there is any."""
        alone = []
        for profile in self.snapshots:
            if isinstance(profile, Point):
                alone.append(profile.t)
            elif isinstance(profile, Discrete):
                alone.append(profile.t_first)
        nodes = self._nodes
        walk, noise = self.prior.motion.on(nodes.edges, alone, nodes.instant)
        if noise.any():
            return self._rows_of(walk), self._rows_of(noise)
        return self._rows_of(walk), None

    def _rows_of(self, intensity: FloatArray) -> _Rows:
        at_nodes = intensity[self._nodes.interval]
        sizes = self._nodes.weight * at_nodes
        roots = self._scale * np.sqrt(sizes)
        return _Rows(intensity, roots)

    def _expected_rows(self, profiles: Sequence[Profile]) -> FloatArray:
        """Return the columns of stored profiles in the expected error: for the walk, and for noise
        if there is any."""
        tails = self._nodes.tails(profiles)
        of_walk = self._walk.roots[:, None] * tails
        if self._noise is None:
            return of_walk
        masses = self._nodes.masses(profiles)
        of_noise = self._noise.roots[:, None] * masses
        return np.vstack((of_walk, of_noise))

    def _rounding_rows(self, motion: FloatArray) -> FloatArray:
        """Return a root of the covariance of the stored copies' errors, from their columns in the
        error of motion: shape [n or more, n]."""
        prior = self.prior
        squared = _squared_lengths(motion)
        sums = squared[:, None] + squared
        products = 2 * motion.T @ motion
        apart = np.maximum(sums - products, 0.0)
        separate = rounding_factor(prior.rounding, prior.arithmetic, apart)
        if prior.shared is None:
            return separate
        return np.vstack((separate, prior.shared.T))

    def _estimate_rows(self, expected: FloatArray) -> Iterator[FloatArray]:
        """Yield the rows of the errors of decays and beginnings that were estimated.

        If an estimated time constant is off by a factor 1 + e, each tail changes by e d tail / d
        log(tau), with the same e for all averages and the standard deviation that the profiles
        state. The motion turns these changes into errors that add up over the averages. The same
        holds for an estimated beginning that is off.
        """
        longer: list[StoredProfile] = []
        later: list[StoredProfile] = []
        for profile in self.snapshots:
            variants = profile.others if isinstance(profile, OrdinaryEMA) else (profile, profile)
            longer.append(variants[0])
            later.append(variants[1])
        for others in (longer, later):
            pairs = zip(others, self.snapshots, strict=True)
            if any(other is not stored for other, stored in pairs):
                change = self._expected_rows(others) - expected
                yield root_of(change / self._scale)

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
            seen, unseen = self.prior.sketch.measured([target])
            measured = np.vstack((seen, unseen))
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
            of_noise = self._noise.roots * mass
            rows = np.append(rows, of_noise)
            unreachable += self._noise.intensity @ missed
        scaled = self._scale**2 * unreachable
        return tail, rows, float(scaled)

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
        roots = np.sqrt(self._nodes.weight)
        return self._even.solve(roots * goal.tail)

    @cached_property
    def _even(self) -> SumOfOne:
        tails = self._nodes.tails(self.snapshots)
        roots = np.sqrt(self._nodes.weight)
        return SumOfOne(roots[:, None] * tails)

    def losses(self, targets: Sequence[Profile]) -> Losses:
        columns = []
        unreachable = []
        for target in targets:
            goal = self.goal(target)
            columns.append(goal.column)
            unreachable.append(goal.unreachable)
        goals = np.stack(columns, axis=1)
        return Losses(self._factor, goals, np.array(unreachable))

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
        errors = missed[..., self._error_rows]
        rounding = np.sum(errors**2, axis=-1)
        if self.prior.sketch is None:
            doubt = max(0.0, self.prior.doubt - SURE)
            expected = goal.unreachable + np.sum(motion**2, axis=-1)
            widened = expected * np.exp(2 * _WIDENING * doubt)
            return np.stack((widened, rounding))
        if solved:
            leverage = self._problem.leverage[self._motion_rows]
            left = np.maximum(1 - leverage, _LEAST_LEFT)
            motion = motion / left
        squares = np.sum(motion**2, axis=-1)
        measured = squares / self._scale**2
        return np.stack((measured, rounding))

    def relative(
        self,
        squares: FloatArray,
        coefficients: FloatArray,
        goal: Goal,
    ) -> float:
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
        column = self._factor @ coefficients
        no_tail = np.zeros(0)
        goal = Goal(column, no_tail, 0.0, None)
        return self.relative(squares, coefficients, goal)

    def apart(self, target: Profile, other: Profile) -> float:
        """Return the expected squared distance between the averages of two targets."""
        if self.prior.sketch is None:
            _, first, _ = self._rows_of_target(target)
            _, second, _ = self._rows_of_target(other)
        else:
            seen, unseen = self.prior.sketch.measured([target, other])
            first, second = np.vstack((seen, unseen)).T
        difference = first - second
        return float(np.sum(difference**2))

    @property
    def unsure(self) -> float:
        """The relative standard deviation of a squared length that D numbers show: sqrt(2 / D)."""
        count = len(self._seen)
        return float(np.sqrt(2 / count))

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
            expected = goal.column[:end]
            moved = goal.unreachable + np.sum(expected**2)
            origins = norms - self._expected_norms
            square = origins @ coefficients + moved
            least = norms.min() / 4
            return float(np.sqrt(max(square, least)))
        seen = goal.column[end : end + len(self._seen)]
        projected = sketch.means[0] + seen / self._scale
        square = np.sum(projected**2)
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


# --- correlated roundings
#
# If an element moves by several spacings of the storage dtype between two snapshots, its rounding
# errors in them are independent. If it hardly moves, it is rounded to the same value, and combining
# the snapshots does not average the error out. The errors are uniform within a spacing h, with
# variance r = h^2 / 12, and periodic in the value with period h. By the Fourier series of that
# sawtooth, their correlation after a Gaussian displacement of variance d is
#
#     rho = 6 / pi^2 sum_k k^-2 exp(-2 pi^2 k^2 d / h^2)
#         = 6 / pi^2 sum_k k^-2 exp(-pi^2 / 6 k^2 d / r).
#
# With sums over all elements for d and r, it holds for a network whose elements move by equally
# many spacings. As a function of expected squared distances it is a mixture of Gaussian kernels,
# hence positive semidefinite.

_FAR = 12.0
"""Squared distance d / r beyond which the correlation is negligible, exp(-pi^2 / 6 * 12) = 3e-9."""

_LARGEST = 0.99
"""Correlation of the errors of two copies without motion between them. With 1, coefficients of
opposite signs could cancel errors whose sizes differ a little, and grow without bound."""


def rounding_factor(rounding: FloatArray, arithmetic: FloatArray, apart: FloatArray) -> FloatArray:
    """Return a matrix B such that B^T B is the covariance of the stored copies' errors: shape [n,
    n].

    `rounding` and `arithmetic` are variances, [n], the latter of independent errors; `apart` are
    expected squared distances, [n, n].
    """
    root = np.sqrt(rounding)
    scale = root[:, None] * root
    near = apart < _FAR * scale
    np.fill_diagonal(near, val=False)
    variance = rounding + arithmetic
    if not near.any():
        return np.diag(np.sqrt(variance))
    covariance = np.diag(variance)
    scales = scale[near]
    correlation = _correlation(apart[near] / scales)
    covariance[near] = _LARGEST * scales * correlation
    # NumPy's eigh uses divide and conquer; the QR driver fails on about 1 % of these clustered
    # spectra.
    values, vectors = np.linalg.eigh(covariance)
    positive = np.maximum(values, 0.0)
    roots = np.sqrt(positive)
    return np.asarray(roots[:, None] * vectors.T)


def _correlation(distance: FloatArray) -> FloatArray:
    """Return the correlation of two rounding errors at squared distances d / r: shape of
    `distance`."""
    squares = np.arange(1, 65) ** 2
    total = np.zeros_like(distance)
    for square in squares:
        exponent = -(np.pi**2) / 6 * square * distance
        total += np.exp(exponent) / square
    return total / sum(1 / squares)


# --- the published method


class PublishedGoal(NamedTuple):
    """A target as a column of the published problem, and the square of its part that no polynomial
    reaches."""

    column: FloatArray
    outside: float


class Published:
    """The published method: the L2 distance between profiles over time (Karras et al., section 3.2
    and appendix C.3)."""

    def __init__(
        self,
        snapshots: Sequence[StoredProfile],
        prior: Prior,
        t: float,
    ) -> None:
        times = [profile.t for profile in snapshots]
        edges = np.unique([0.0, t, *times])
        self._nodes = Nodes(edges, snapshots, prior.steps, per_step=False)
        self._roots = np.sqrt(self._nodes.weight)
        masses = self._nodes.masses(snapshots)
        self._factor = self._roots[:, None] * masses
        self._problem = LeastSquares(self._factor)

    def goal(self, target: Profile) -> PublishedGoal:
        mass, missed = self._nodes.goal_of_mass(target)
        column = self._roots * mass
        return PublishedGoal(column, float(missed.sum()))

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
            inverse = np.linalg.inv(r)
            self.inverse = np.asarray(inverse)
            condition = _norm(r, size) * _norm(inverse)
        except np.linalg.LinAlgError:  # singular, or fewer rows than columns
            condition = np.inf
        if not limit * condition < 1:
            left, sizes, right = np.linalg.svd(r, full_matrices=False)
            largest = sizes.max(initial=size)
            kept = sizes > limit * largest
            self._q = self._q @ left[:, kept]
            directions = right[kept].T
            self.inverse = directions / sizes[kept]

    def solve(self, goals: FloatArray) -> FloatArray:
        """Return the solutions for goals, [rows, goals]: shape [columns, goals]."""
        within = self._q.T @ goals
        return np.asarray(self.inverse @ within)

    def missed(self, goals: FloatArray) -> FloatArray:
        """Return the squared residuals: shape [goals]."""
        within = self._q.T @ goals
        reached = self._q @ within
        return _squared_lengths(goals - reached)

    @property
    def leverage(self) -> FloatArray:
        """The share of a change in each row of a goal that the fit follows, in [0, 1]: shape
        [rows]."""
        squares = self._q**2
        return np.asarray(squares.sum(axis=1))


def only(row: int, count: int) -> FloatArray:
    """Return the coefficients of one of so many snapshots alone."""
    coefficients = np.zeros(count)
    coefficients[row] = 1.0
    return coefficients


def _squared_lengths(columns: FloatArray) -> FloatArray:
    return np.asarray(np.sum(columns**2, axis=0))


def _norm(matrix: FloatArray, least: float = 0.0) -> float:
    """Return the 1-norm of a matrix, or `least` if that is larger."""
    sizes = np.abs(matrix)
    sums = sizes.sum(axis=0)
    return float(sums.max(initial=least))


class SumOfOne:
    """argmin_c || factor c - goal || for coefficients of sum 1: the last one is 1 minus the others'
    sum."""

    def __init__(self, factor: FloatArray) -> None:
        self._last = factor[:, -1]
        differences = factor[:, :-1] - factor[:, -1:]
        self._others = LeastSquares(differences)

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

    def __init__(
        self,
        factor: FloatArray,
        goals: FloatArray,
        unreachable: FloatArray,
    ) -> None:
        # An equivalent problem with at most as many rows as columns.
        triangle = root_of(np.hstack((factor, goals)))
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
            alike = [group for group in groups if len(group) == size]
            members = np.array(alike)
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
        sizes = np.abs(self._factor)
        size = float(sizes.max())
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


# --- very many snapshots

MOST_SOLVED = 1024
"""Limit of the snapshots in one reconstruction: its time is cubic in them, with little gain beyond
a thousand."""


def thinned_subset(
    snapshots: Sequence[StoredProfile],
    most: int = MOST_SOLVED,
    keep: int = 1,
) -> list[int]:
    """Return the indices, ascending, of at most `most` snapshots, spread evenly back from each
    profile's newest.

    Of each power function, and of all other profiles together, at least `keep` are among them, if
    there are so many.
    """
    groups: dict[float, list[int]] = {}
    ages = [-snapshot.t for snapshot in snapshots]
    newest_first = sorted(range(len(ages)), key=ages.__getitem__)
    for index in newest_first:
        gamma = getattr(snapshots[index], "gamma", np.inf)
        group = groups.setdefault(gamma, [])
        group.append(index)
    subset: list[int] = []
    for group in groups.values():
        size = len(group)
        share = most * size // len(snapshots)
        count = min(size, max(keep, share))
        for number in range(count):
            subset.append(group[number * size // count])
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
