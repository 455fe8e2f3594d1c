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
error; the constraint eliminates the last coefficient. For noise alone it is the published method;
most networks are closer to a walk. Where the gain over simpler coefficients is small, these replace
the optimal coefficients, in part or altogether: the motion is never known exactly.

If the path of the weights was sketched, the error of any coefficients is measured (see `Sketch`).
The coefficients minimise the mean of the measured and the expected error: there are fewer
projections than directions of motion, and coefficients fitted to the projections alone are worse in
the other directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from threadpoolctl import ThreadpoolController

from posthoc_cli.decay_rules import OrdinaryEMA
from posthoc_cli.errors import InvalidValueError, abbreviate, check_word
from posthoc_cli.profiles import Discrete, FloatArray, Point, PowerFunction, Profile, StoredProfile
from posthoc_cli.reconstruction.motion import (
    ASSUMED,
    Prior,
    assumed_prior,
    compress_rows,
    sampling_errors,
)
from posthoc_cli.reconstruction.nodes import Nodes

METHODS = ("minvar", "paper")  # the solvers; the first one is the default


def check_method(method: str | None) -> str:
    """Check a method, and replace None by the default; raise an InvalidValueError that lists the
    methods if it is not one."""
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
    says little. `predicted_error`, [targets], is the expected relative L2 error of the weights, and
    `distance`, [targets], the expected distance of the average from the weights at `t`, relative to
    the same norm.
    """

    coefficients: FloatArray
    profile_error: FloatArray
    predicted_error: FloatArray
    distance: FloatArray
    prior: Prior

    def subset(
        self,
        snapshots: Sequence[int] | None = None,
        targets: Sequence[int] | None = None,
    ) -> Reconstruction:
        """Select some of the snapshots, if the others have coefficients of 0, and some of the
        targets."""
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
            self.distance[columns],
            self.prior.subset(rows),
        )

    @property
    def lost_gain(self) -> FloatArray:
        """A bound of the loss of the metric's gain, [targets]; see the function `lost_gain`."""
        return lost_gain(self.predicted_error, self.distance)

    def known_error(self, target: int) -> float | None:
        """Return the `predicted_error` of one target; None if it is not finite or rests on assumed
        motion."""
        error = float(self.predicted_error[target])
        if self.prior.evidence == ASSUMED or not np.isfinite(error):
            return None
        return error


def lost_gain(error: npt.ArrayLike, distance: npt.ArrayLike) -> FloatArray:
    """Bound the expected loss of what averaging gains in a metric, as a share of the gain, at most
    1.

    The metric makes its gain over the distance from the last weights to the average; an error moves
    the average by a part of that distance, in any direction, and loses at most about this part of
    the gain. Really lost is less, in the median 0.42 of it for 20 files of weights, 0.31 for 40,
    0.12 for the hook and 0.09 for files of an EMA (`scripts/lost_gain.py`). Weights that do not
    move have nothing to gain.
    """
    error = np.asarray(error)
    distance = np.asarray(distance)
    lost = np.divide(error, distance, out=np.ones_like(error), where=error < distance)
    return np.where((error > 0) & (distance > 0), lost, 0.0)


def reconstruct(
    snapshots: Sequence[StoredProfile],
    targets: Sequence[Profile | FloatArray],
    method: str | None = None,
    prior: Prior | None = None,
    t: float | None = None,
) -> Reconstruction:
    """Find the coefficients of the snapshots that reconstruct each target.

    Arguments:
        snapshots: profiles of the stored averages, at least one, distinct, none after `t`.
        targets: profiles. An array of coefficients, [snapshots], in place of a profile is used
            unchanged.
        method: "minvar", minimum variance, or "paper", the published one; by default the first.
        prior: of the snapshots; by default even motion without rounding.
        t: the time of the targets; by default the time of the wanted power functions, else of the
            last snapshot.

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
    return Solver(snapshots, prior or assumed_prior(snapshots), t, method).reconstruct(targets)


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
            raise InvalidValueError("target", reason, value=abbreviate(target))


# --- one target

_GAIN = (0.8, 0.95)
_GAIN_OF_ONE = (0.4, 0.6)
"""Predicted error of minimum variance, relative to the published coefficients' predicted error. Up
to the first number minimum variance is used alone, from the second on the published coefficients
alone, and a blend in between: an imperfect fit of the motion costs more than so small a gain
(measured: with 0.9 and 1 up to 1.22 times the published error, after a pause of the clock). The
motion is less certain with few snapshots of one profile (with 0.6 and 0.75 up to 1.8)."""

_GAIN_OVER_NEAREST = 0.5, 0.8
"""The same, relative to the coefficients whose tail is nearest, for averages of other programs. Of
the 252 cells of `bench_checkpoints.py` with uneven steps, 71 % are at most 1.05 times as far off as
the nearest tail without a blend, 89 % with 0.8 and 0.95, 95 % with these."""

_FEW_TIMES = 6  # up to this number of distinct times the snapshots are few

_CLEARLY = 0.75
"""Measured squared error, relative to the published coefficients' squared error, below which others
replace them (measured: of 6,061 hard cells one is 5.05 % worse than published, by float32's
rounding; with 0.8 one is 8 %, with 0.65 6 %)."""

_TIMES_ALONE = 16
"""Number of newest times whose snapshots are compared, each alone, with a reconstruction: where
weights oscillate, an earlier one may be nearest (measured: 5 times nearer, for a sawtooth of 70
steps and snapshots of 100)."""

_CAUTION = 6.0
"""Each unit of misfit beyond TRUSTED_MISFIT makes a gain e**6 times less certain."""


class _Solution(NamedTuple):
    coefficients: FloatArray  # [snapshots], of sum 1
    profile_error: float
    predicted_error: float
    distance: float


class Solver:
    """Both methods for the snapshots of a run, with one factorisation for all targets at a time;
    see `reconstruct` for the arguments."""

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

    def reconstruct(self, targets: Sequence[Profile | FloatArray]) -> Reconstruction:
        """Find the coefficients of the snapshots that reconstruct each target."""
        problem = self.problem
        _check_profiles(problem.snapshots, targets)
        coefficients = np.zeros((len(problem.snapshots), len(targets)))
        profile_errors = np.zeros(len(targets))
        predicted_errors = np.zeros(len(targets))
        distances = np.zeros(len(targets))
        # One at a time, so that no bit of a target's coefficients depends on the other targets.
        for k, target in enumerate(targets):
            solution = self._solve(target)
            coefficients[:, k] = solution.coefficients
            profile_errors[k] = solution.profile_error
            predicted_errors[k] = solution.predicted_error
            distances[k] = solution.distance
        return Reconstruction(
            coefficients, profile_errors, predicted_errors, distances, problem.prior
        )

    @cached_property
    def published(self) -> Published:
        problem = self.problem
        return Published(problem.snapshots, problem.prior, self._t)

    @np.errstate(under="ignore")  # of negligible masses, also where a program lets NumPy raise
    def _solve(self, target: Profile | FloatArray) -> _Solution:
        problem = self.problem
        if isinstance(target, np.ndarray):
            rhs = problem.combine(target)
            error = problem.error_of_copies(target, rhs)
            return _Solution(target, 0.0, error, self._distance(target, rhs))
        rhs = problem.right_hand_side(target)
        published_rhs = self.published.right_hand_side(target)
        published = self._published_coefficients(rhs, published_rhs)
        if self._is_minimum_variance:
            coefficients, squares = self._minimum_variance(rhs, published)
        elif np.isnan(published).any():
            reason = "none of its mass lies before the last snapshot in use"
            raise InvalidValueError("target", reason, "use the time of a snapshot")
        else:
            coefficients = published
            squares = problem.expected_squares(coefficients, rhs)
        coefficients = _without_negligible(coefficients)
        profile_error = self.published.error(coefficients, published_rhs)
        used = np.flatnonzero(coefficients)
        if used.tolist() == [rhs.stored]:
            profile_error = 0.0
        predicted = problem.relative(squares, coefficients, rhs)
        distance = self._distance(coefficients, rhs)
        return _Solution(coefficients, profile_error, predicted, distance)

    def _distance(self, coefficients: FloatArray, rhs: RightHandSide) -> float:
        """Compute the expected relative distance of a target from the weights at `t`."""
        square = self.problem.squared_distance(rhs, self._last_weights)
        return self.problem.relative(np.array([square]), coefficients, rhs)

    @cached_property
    def _last_weights(self) -> RightHandSide:
        return self.problem.right_hand_side(Point(self._t))

    def _published_coefficients(
        self, rhs: RightHandSide, published_rhs: PublishedSide
    ) -> FloatArray:
        if rhs.stored is None:
            return self.published.solve(published_rhs)
        # the exact solution without rounding
        return unit_vector(rhs.stored, len(self.problem.snapshots))

    def _minimum_variance(
        self,
        rhs: RightHandSide,
        published: FloatArray,
    ) -> tuple[FloatArray, FloatArray]:
        """Find coefficients of nearly the least expected error, and their `expected_squares`."""
        problem = self.problem
        optimal = problem.optimum(rhs)
        simple = published if self._is_of_powers else problem.nearest(rhs)
        if np.isnan(simple).any():
            simple = optimal
        if problem.prior.sketch is None:
            return self._blend(optimal, simple, rhs)
        return self._prefer_measured(optimal, simple, rhs)

    def _prefer_measured(
        self,
        optimal: FloatArray,
        published: FloatArray,
        rhs: RightHandSide,
    ) -> tuple[FloatArray, FloatArray]:
        """Choose the optimal coefficients if they are clearly better than others, else the best
        others; return them with their squares.

        The others are the published coefficients, and each snapshot of the newest times alone.
        Projections may overstate or understate motion, while rounding is known: the optimal
        coefficients must be better either way.
        """
        problem = self.problem
        others = np.column_stack((published, self._alone))
        squares = problem.expected_squares(optimal, rhs, solved=True)
        other_squares = problem.expected_squares(others, rhs)
        for deviation in (-problem.spread_of_lengths, problem.spread_of_lengths):
            factors = np.array([1 + deviation, 1.0])
            least = np.min(factors @ other_squares)
            if not factors @ squares < _CLEARLY * least:
                totals = other_squares.sum(axis=0)
                best = int(totals.argmin())
                return others[:, best], other_squares[:, best]
        return optimal, squares

    def _blend(
        self,
        optimal: FloatArray,
        others: FloatArray,
        rhs: RightHandSide,
    ) -> tuple[FloatArray, FloatArray]:
        """Blend both coefficients, nearer to the others the smaller the gain is; return them with
        their squares."""
        problem = self.problem
        candidates = np.column_stack((optimal, others))
        squares = problem.expected_squares(candidates, rhs)
        optimal_square, other_square = squares.sum(axis=0).tolist()
        gain = np.sqrt(optimal_square / other_square) if other_square > 0 else 0.0
        excess = max(0.0, problem.prior.misfit - TRUSTED_MISFIT)
        gain *= np.exp(_CAUTION * excess)
        lowest, highest = self._gains
        passed = (gain - lowest) / (highest - lowest)
        share = np.clip(passed, 0.0, 1.0)
        coefficients = optimal + share * (others - optimal)
        return coefficients, problem.expected_squares(coefficients, rhs)


def _without_negligible(coefficients: FloatArray) -> FloatArray:
    """Set coefficients below the rounding of the sum to 0, so that their snapshots need not be
    read."""
    sizes = np.abs(coefficients)
    least = np.finfo(np.float64).eps * sizes.sum()
    return np.where(sizes < least, 0.0, coefficients)


# --- the expected error of any coefficients

_LEAST_LEFT = 0.1  # lower limit of the share of a residual that remains after a solution

_NO_ROUNDING = 1e-30
"""Squared rounding, relative to the squared norm, below which a copy is exact; any dtype rounds far
more."""

TRUSTED_MISFIT = 0.25
_WIDENING = 1.3
"""Misfit up to which the motion is trusted: for recorded runs it is 0.05 to 0.29, for oscillations
0.6 to 3. Each unit beyond it widens errors from motion by e**1.3 (measured: for oscillations in
step with the snapshots they were up to 80 times off; a larger number would hold, and be too high,
more often)."""


class _Rows(NamedTuple):
    """The part of the expected error that comes from the walk, or from noise: its intensity in each
    interval, and the factor of each node's row."""

    intensity: FloatArray
    roots: FloatArray


class RightHandSide(NamedTuple):
    """A target as the right-hand side of the least-squares problem, whose rows for errors are 0."""

    expected: FloatArray  # of the rows of the expected error: [n]
    projected: FloatArray  # of the rows of a sketch, [D + K + 2]; empty without one
    tail: FloatArray  # the target's tail at the nodes
    unreachable: float  # the part of the expected squared error that no coefficients change
    stored: int | None  # the snapshot whose profile the target is


class Problem:
    """The snapshots of a run, at or before `t`, in the order of the prior, for targets at `t`.

    Coefficients have the shape [n]. The mass before the first update lies on that update. There are
    three blocks of rows, [rows, n] each, whose combinations are errors: the errors that the motion
    leads to expect, the errors that the projections of a sketch show (none without a sketch), and
    the errors of the averages themselves, which do not depend on the target.
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
        at_nodes = self._expected_at_nodes(snapshots)
        # As many rows as columns, with the same lengths and distances.
        self._basis, self._expected = np.linalg.qr(at_nodes)
        self._projected = self._project(snapshots)
        self._rounding = self._rounding_rows()
        sampling = sampling_errors(snapshots, prior.motion)
        estimates = self._estimate_rows(at_nodes)
        self._errors = np.vstack([self._rounding, sampling, *estimates])

    @cached_property
    def _factor(self) -> FloatArray:
        return np.vstack((self._expected, self._scale * self._projected, self._errors))

    def _column(self, rhs: RightHandSide) -> FloatArray:
        """Arrange a right-hand side in the order of the rows of `_factor`."""
        no_errors = np.zeros(len(self._errors))
        return np.concatenate((rhs.expected, self._scale * rhs.projected, no_errors))

    def _project(self, profiles: Sequence[Profile]) -> FloatArray:
        """Compute the rows that a sketch shows: the projections, then what they do not see."""
        if self.prior.sketch is None:
            return np.zeros((0, len(profiles)))
        seen, unseen = self.prior.sketch.measure(profiles)
        return np.vstack((seen, unseen))

    def _rows_of_motion(self) -> tuple[_Rows, _Rows | None]:
        """Make the rows of the walk, and the rows of the noise if there is any."""
        alone = []
        for profile in self.snapshots:
            if isinstance(profile, Point):
                alone.append(profile.t)
            elif isinstance(profile, Discrete):
                alone.append(profile.t_first)
        nodes = self._nodes
        walk, noise = self.prior.motion.on(nodes.edges, alone, nodes.instant)
        if noise.any():
            return self._scale_rows(walk), self._scale_rows(noise)
        return self._scale_rows(walk), None

    def _scale_rows(self, intensity: FloatArray) -> _Rows:
        at_nodes = intensity[self._nodes.interval]
        sizes = self._nodes.weight * at_nodes
        roots = self._scale * np.sqrt(sizes)
        return _Rows(intensity, roots)

    def _expected_at_nodes(self, profiles: Sequence[Profile]) -> FloatArray:
        """Compute the columns of stored profiles in the expected error: for the walk, and for noise
        if there is any."""
        tails = self._nodes.tails(profiles)
        of_walk = self._walk.roots[:, None] * tails
        if self._noise is None:
            return of_walk
        masses = self._nodes.masses(profiles)
        of_noise = self._noise.roots[:, None] * masses
        return np.vstack((of_walk, of_noise))

    def _rounding_rows(self) -> FloatArray:
        """Compute a root of the covariance of the stored copies' errors: shape [n, n]."""
        motion = self._expected if self.prior.sketch is None else self._projected
        squared = _squared_lengths(motion)
        sums = squared[:, None] + squared
        products = 2 * motion.T @ motion
        squared_distances = np.maximum(sums - products, 0.0)
        return rounding_factor(self.prior.rounding, self.prior.floor, squared_distances)

    def _estimate_rows(self, at_nodes: FloatArray) -> Iterator[FloatArray]:
        """Yield the rows of the errors of averages that may not be as they are said.

        If an estimated time constant is off by a factor 1 + e, each tail changes by e d tail / d
        log(tau), with the same e for all averages and the standard deviation that the profiles
        state. The motion turns these changes into errors that add up over the averages; averages
        that may have begun again change alike.
        """
        doubted: list[StoredProfile] = []
        for profile in self.snapshots:
            doubted.append(profile.doubted if isinstance(profile, OrdinaryEMA) else profile)
        pairs = zip(doubted, self.snapshots, strict=True)
        if any(other is not stored for other, stored in pairs):
            change = self._expected_at_nodes(doubted) - at_nodes
            yield compress_rows(change / self._scale)

    # --- a target, and the best coefficients for it

    def right_hand_side(self, target: Profile) -> RightHandSide:
        """Express a target as the argument of the other methods."""
        tail, residual = self._nodes.project_tail(target)
        at_nodes = self._walk.roots * tail
        unreachable = self._walk.intensity @ residual
        if self._noise is not None:
            mass, residual = self._nodes.project_mass(target)
            of_noise = self._noise.roots * mass
            at_nodes = np.append(at_nodes, of_noise)
            unreachable += self._noise.intensity @ residual
        expected = self._basis.T @ at_nodes
        outside = at_nodes - self._basis @ expected
        unreachable = self._scale**2 * unreachable + outside @ outside
        projected = self._project([target])[:, 0]
        stored = None
        if isinstance(target, PowerFunction):
            stored = self._row_of_power.get(target)
        return RightHandSide(expected, projected, tail, float(unreachable), stored)

    def optimum(self, rhs: RightHandSide) -> FloatArray:
        """Solve for the coefficients of least expected error, whose sum is 1."""
        row = rhs.stored
        if row is not None:
            exact = _NO_ROUNDING * self.prior.norm[row]
            if self.prior.rounding[row] <= exact:
                return unit_vector(row, len(self.snapshots))
        return self._solver.solve(self._column(rhs))

    @cached_property
    def _solver(self) -> SumOfOne:
        return SumOfOne(self._factor)

    def nearest(self, rhs: RightHandSide) -> FloatArray:
        """Solve for the coefficients of sum 1 whose tail is nearest to the target's: the best
        coefficients for a walk that is the same everywhere."""
        roots = np.sqrt(self._nodes.weight)
        return self._even_solver.solve(roots * rhs.tail)

    @cached_property
    def _even_solver(self) -> SumOfOne:
        tails = self._nodes.tails(self.snapshots)
        roots = np.sqrt(self._nodes.weight)
        return SumOfOne(roots[:, None] * tails)

    def eliminator(self, targets: Sequence[Profile]) -> Eliminator:
        """Compute the errors of targets as snapshots are dropped."""
        sides = [self.right_hand_side(target) for target in targets]
        columns = [self._column(rhs) for rhs in sides]
        unreachable = np.array([rhs.unreachable for rhs in sides])
        return Eliminator(self._factor, np.stack(columns, axis=1), unreachable)

    # --- the error of any coefficients

    def expected_squares(
        self,
        coefficients: FloatArray,
        rhs: RightHandSide,
        solved: bool = False,
    ) -> FloatArray:
        """Predict E |error|^2 of coefficients of sum 1, [n] or [n, candidates], in two parts: [2]
        or [2, candidates].

        The parts are from motion, measured if there is a sketch, otherwise expected and widened by
        the misfit, and from rounding. Residuals of `solved` coefficients are scaled to what they
        would be without their rows.
        """
        errors = (self._errors @ coefficients).T
        rounding = np.sum(errors**2, axis=-1)
        if self.prior.sketch is None:
            residual = (self._expected @ coefficients).T - rhs.expected
            excess = max(0.0, self.prior.misfit - TRUSTED_MISFIT)
            expected = rhs.unreachable + np.sum(residual**2, axis=-1)
            widened = expected * np.exp(2 * _WIDENING * excess)
            return np.stack((widened, rounding))
        residual = (self._projected @ coefficients).T - rhs.projected
        if solved:
            first = len(self._expected)
            leverage = self._solver.leverage[first : first + len(self._projected)]
            residual = residual / np.maximum(1 - leverage, _LEAST_LEFT)
        return np.stack((np.sum(residual**2, axis=-1), rounding))

    def relative(
        self,
        squares: FloatArray,
        coefficients: FloatArray,
        rhs: RightHandSide,
    ) -> float:
        """Compute the root of the sum of `expected_squares`, [2], relative to the target's probable
        norm; nan if only that is 0."""
        error = float(np.sqrt(squares.sum()))
        norm = self._norm(coefficients, rhs)
        if norm > 0:
            return error / norm
        return np.nan if error > 0 else 0.0

    def combine(self, coefficients: FloatArray) -> RightHandSide:
        """Make a target of the sum of the snapshots with given coefficients."""
        expected = self._expected @ coefficients
        projected = self._projected @ coefficients
        return RightHandSide(expected, projected, np.zeros(0), 0.0, None)

    def error_of_copies(self, coefficients: FloatArray, rhs: RightHandSide) -> float:
        """Predict the error of given coefficients, the target, from the errors of the stored copies
        alone."""
        squares = (self._rounding @ coefficients) ** 2
        return self.relative(squares, coefficients, rhs)

    def squared_distance(self, rhs: RightHandSide, other: RightHandSide) -> float:
        """Compute the expected squared distance between two targets, measured if there is a
        sketch."""
        if self.prior.sketch is not None:
            difference = rhs.projected - other.projected
            return float(difference @ difference)
        difference = rhs.expected - other.expected
        unreachable = rhs.unreachable + other.unreachable
        return float(difference @ difference) + unreachable

    @property
    def spread_of_lengths(self) -> float:
        """The relative standard deviation of a squared length that a sketch of D numbers shows:
        sqrt(2 / D)."""
        assert self.prior.sketch is not None
        return float(np.sqrt(2 / self.prior.sketch.means.shape[1]))

    def _norm(self, coefficients: FloatArray, rhs: RightHandSide) -> float:
        """Estimate the probable norm of the target that has these coefficients.

        A sketch measures it, up to a factor that is taken from the stored averages in use, whose
        norms are known. Without a sketch |theta_i|^2 = |theta_0|^2 + |motion since theta_0|^2 is
        expected of stored averages and of the target, and the result is at least half the smallest
        stored norm.
        """
        norms = self.prior.norm
        if self.prior.evidence == ASSUMED or not norms.any():
            return float(np.sqrt(norms.mean()))
        sketch = self.prior.sketch
        if sketch is None:
            moved = rhs.unreachable + np.sum(rhs.expected**2)
            origins = norms - _squared_lengths(self._expected)
            square = origins @ coefficients + moved
            least = norms.min() / 4
            return float(np.sqrt(max(square, least)))
        begin = sketch.means[0]
        square = np.sum((begin + rhs.projected[: begin.size]) ** 2)
        shares = np.abs(coefficients)
        sketched = self._sketched_norms @ shares
        if sketched == 0:
            return 0.0
        known = norms @ shares
        return float(np.sqrt(square * known / sketched))

    @cached_property
    def _sketched_norms(self) -> FloatArray:
        """The squared norm of each stored average's projection: shape [n]."""
        assert self.prior.sketch is not None
        begin = self.prior.sketch.means[:1].T
        return _squared_lengths(begin + self._projected[: begin.size])


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


def rounding_factor(
    rounding: FloatArray,
    floor: FloatArray,
    squared_distances: FloatArray,
) -> FloatArray:
    """Compute a matrix B such that B^T B is the covariance of the stored copies' errors: shape [n,
    n].

    `rounding` and `floor` are variances, [n], the latter of independent errors; the expected
    `squared_distances` are [n, n].
    """
    root = np.sqrt(rounding)
    scale = root[:, None] * root
    near = squared_distances < _FAR * scale
    np.fill_diagonal(near, val=False)
    variance = rounding + floor
    if not near.any():
        return np.diag(np.sqrt(variance))
    covariance = np.diag(variance)
    scales = scale[near]
    correlation = _correlation(squared_distances[near] / scales)
    covariance[near] = _LARGEST * scales * correlation
    # NumPy's eigh uses divide and conquer; the QR driver fails on about 1 % of these clustered
    # spectra.
    values, vectors = np.linalg.eigh(covariance)
    positive = np.maximum(values, 0.0)
    roots = np.sqrt(positive)
    return np.asarray(roots[:, None] * vectors.T)


def _correlation(distance: FloatArray) -> FloatArray:
    """Compute the correlation of two rounding errors at squared distances d / r: shape of
    `distance`."""
    squares = np.arange(1, 65) ** 2
    total = np.zeros_like(distance)
    for square in squares:
        exponent = -(np.pi**2) / 6 * square * distance
        total += np.exp(exponent) / square
    return total / sum(1 / squares)


# --- the published method


class PublishedSide(NamedTuple):
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

    def right_hand_side(self, target: Profile) -> PublishedSide:
        mass, residual = self._nodes.project_mass(target)
        column = self._roots * mass
        return PublishedSide(column, float(residual.sum()))

    def solve(self, rhs: PublishedSide) -> FloatArray:
        """Compute the coefficients of algorithm 3, divided by their sum; nan for a target without
        mass here."""
        solution = self._problem.solve(rhs.column)
        total = solution.sum()
        if 0 < total < np.inf:
            return np.asarray(solution / total)
        return np.full(solution.size, np.nan)

    def error(self, coefficients: FloatArray, rhs: PublishedSide) -> float:
        """Compute || sum_i c_i p_i - p || / || p ||; 1 for a target whose mass lies at one time,
        nowhere near any density."""
        difference = self._factor @ coefficients - rhs.column
        squared_distance = rhs.outside + np.sum(difference**2)
        norm = rhs.outside + np.sum(rhs.column**2)
        if norm > 0:
            return float(np.sqrt(squared_distance / norm))
        return 1.0


# --- linear least squares


class LeastSquares:
    """argmin_x || factor x - sides || with one factorisation for any number of right-hand sides.

    The directions of `factor` whose size is zero up to rounding are left out, relative to `size`,
    the size of the numbers whose differences it holds. `inverse` is W with W W^T = (factor^T
    factor)^-1 on the others, [columns, rank].
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

    def solve(self, sides: FloatArray) -> FloatArray:
        """Solve for right-hand sides, [rows, sides]: shape [columns, sides]."""
        within = self._q.T @ sides
        return np.asarray(self.inverse @ within)

    def squared_residuals(self, sides: FloatArray) -> FloatArray:
        """Compute the squared residuals: shape [sides]."""
        within = self._q.T @ sides
        fitted = self._q @ within
        return _squared_lengths(sides - fitted)

    @property
    def leverage(self) -> FloatArray:
        """The share of a change in each row of a right-hand side that the fit follows, in [0, 1]:
        shape [rows]."""
        squares = self._q**2
        return np.asarray(squares.sum(axis=1))


def unit_vector(row: int, count: int) -> FloatArray:
    """Make coefficients of 0 but for one of `count` snapshots."""
    coefficients = np.zeros(count)
    coefficients[row] = 1.0
    return coefficients


def _squared_lengths(columns: FloatArray) -> FloatArray:
    return np.asarray(np.sum(columns**2, axis=0))


def _norm(matrix: FloatArray, least: float = 0.0) -> float:
    """Compute the 1-norm of a matrix, or `least` if that is larger."""
    sizes = np.abs(matrix)
    sums = sizes.sum(axis=0)
    return float(sums.max(initial=least))


class SumOfOne:
    """argmin_c || factor c - side || for coefficients of sum 1: the last one is 1 minus the others'
    sum."""

    def __init__(self, factor: FloatArray) -> None:
        self._last = factor[:, -1]
        differences = factor[:, :-1] - factor[:, -1:]
        self._others = LeastSquares(differences)

    def solve(self, side: FloatArray) -> FloatArray:
        others = self._others.solve(side - self._last)
        last = 1 - others.sum()
        return np.append(others, last)

    @property
    def leverage(self) -> FloatArray:
        return self._others.leverage


# the share of the snapshots after which the problem is solved again, since each one dropped costs
# digits
_REFRESH = 0.25


class Eliminator:
    """The expected squared errors of targets as snapshots are dropped one after another, from one
    factorisation.

    All coefficients but the last are the unknowns of a least-squares problem whose squared
    residuals are the squared errors. With its solution c and the inverse P = W W^T of its quadratic
    form, forcing c_i to 0 adds c_i^2 / P_ii to a squared error, subtracts P_ki c_i / P_ii from each
    c_k, and removes the direction of row i from each row of W. The arguments are a column per
    snapshot, a column per target, and `RightHandSide.unreachable`.
    """

    squares: FloatArray  # with the remaining snapshots: [targets]
    _coefficients: FloatArray  # [targets, n]
    _root: FloatArray  # W: [n, less than n]

    def __init__(
        self,
        factor: FloatArray,
        sides: FloatArray,
        unreachable: FloatArray,
    ) -> None:
        # An equivalent problem with at most as many rows as columns.
        triangle = compress_rows(np.hstack((factor, sides)))
        count = factor.shape[1]
        self._factor = triangle[:, :count]
        self._sides = triangle[:, count:]
        self._unreachable = unreachable
        self._left = np.arange(count)
        self._solve()

    def squares_without(self, groups: Sequence[Sequence[int]]) -> FloatArray:
        """Compute the expected squared errors after each group of snapshots is dropped alone:
        [targets, groups]."""
        squares = np.repeat(self.squares[:, None], len(groups), axis=1)
        sizes = np.array([len(group) for group in groups])
        for size in set(sizes.tolist()):
            is_of_size = sizes == size
            alike = [group for group in groups if len(group) == size]
            members = np.array(alike)
            root = self._root[members]
            inverse = root @ root.transpose(0, 2, 1)
            costs = np.linalg.pinv(inverse, hermitian=True)
            dropped = self._coefficients[:, members]
            added = np.einsum("tgi,gij,tgj->tg", dropped, costs, dropped)
            squares[:, is_of_size] += added
        return squares

    def drop(self, snapshot: int) -> None:
        """Continue without one of the remaining snapshots."""
        self._left = self._left[self._left != snapshot]
        least = (1 - _REFRESH) * self._solved
        if self._is_degenerate or self._left.size <= least:
            self._solve()
            return
        row = self._root[snapshot].copy()
        dropped = self._coefficients[:, snapshot].copy()
        square = row @ row
        pivot = self._root @ row / square
        added = dropped * dropped / square
        self.squares = self.squares + added
        self._coefficients -= np.multiply.outer(dropped, pivot)
        self._root -= np.multiply.outer(pivot, row)
        self._coefficients[:, snapshot] = self._root[snapshot] = 0.0

    def _solve(self) -> None:
        """Solve the problem for the remaining snapshots, and set `squares`, the coefficients and
        W."""
        *others, last = self._left.tolist()
        count = self._factor.shape[1]
        column = self._factor[:, [last]]
        sides = self._sides - column
        differences = self._factor[:, others] - column
        sizes = np.abs(self._factor)
        size = float(sizes.max())
        problem = LeastSquares(differences, size)
        solution = problem.solve(sides)
        root = problem.inverse
        rank = root.shape[1]
        self._solved = self._left.size
        self._is_degenerate = rank < len(others)
        self.squares = self._unreachable + problem.squared_residuals(sides)
        self._coefficients = np.zeros((sides.shape[1], count))
        self._coefficients[:, others] = solution.T
        self._coefficients[:, last] = 1 - solution.sum(axis=0)
        self._root = np.zeros((count, rank))
        self._root[others] = root
        self._root[last] = -root.sum(axis=0)


# --- very many snapshots

MOST_SOLVED = 1024
"""Limit of the snapshots in one reconstruction: its time is cubic in them, with little gain beyond
a thousand."""


def choose_evenly(
    snapshots: Sequence[StoredProfile],
    most: int = MOST_SOLVED,
    keep: int = 1,
) -> list[int]:
    """Choose at most `most` snapshots, spread evenly back from each profile's newest; return their
    indices, ascending.

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
    """Find the controller of NumPy's OpenBLAS, and of SciPy's if it is loaded; not of MKL, which
    torch uses, too."""
    return ThreadpoolController().select(internal_api="openblas")
