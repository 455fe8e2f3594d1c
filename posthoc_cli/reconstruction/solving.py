"""Coefficients for targets by either method, with predicted and profile errors.

The published method (Karras et al., arXiv 2312.02696, section 3.2 and appendix C.3): the stored
averages have profiles p_1 .. p_n, the target has profile p, and the coefficients c minimise the L2
distance

    || sum_i c_i p_i - p ||,      <f, g> = integral f(s) g(s) ds,

and are then divided by their sum. Without the division the error at sigma_rel >= 0.2 is several
times larger, since an average whose mass is not 1 scales the weights.

Minimum variance, the default, minimises the expected error of the weights (see `problem`). The
published method is what it does for noise alone; most networks are closer to a walk. Where the gain
over simpler coefficients is small, these replace the optimal ones, in part or altogether: the
motion is never known exactly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from posthoc_cli.errors import InvalidValueError, brief, check_word
from posthoc_cli.profiles import FloatArray, PowerFunction, Profile, StoredProfile
from posthoc_cli.reconstruction.prior import ASSUMED, Prior, assumed_prior
from posthoc_cli.reconstruction.problem import (
    SURE,
    Goal,
    Problem,
    Published,
    PublishedGoal,
    only,
)

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
        self,
        snapshots: Sequence[int] | None = None,
        targets: Sequence[int] | None = None,
    ) -> Reconstruction:
        """Return the part for some of the snapshots, if the others have coefficients of 0, and some
        of the targets."""
        stored, wished = self.coefficients.shape
        rows = list(range(stored) if snapshots is None else snapshots)
        columns = list(range(wished) if targets is None else targets)
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
        InvalidValueError: no snapshots, one after `t`, or a target that is no profile or has no
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
        is_given = isinstance(target, np.ndarray) and target.shape == (len(snapshots),)
        if not (is_given or callable(getattr(target, "tail", None))):
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
        newest = times >= np.unique(times)[-_TIMES_ALONE:][0]
        self._alone = np.eye(times.size)[:, newest]
        gammas = {profile.gamma for profile in snapshots if isinstance(profile, PowerFunction)}
        self._is_of_powers = all(isinstance(profile, PowerFunction) for profile in snapshots)
        if not self._is_of_powers:
            self._gains = _GAIN_OVER_NEAREST
        elif len(gammas) == 1 and np.unique(times).size <= _FEW_TIMES:
            self._gains = _GAIN_OF_ONE
        else:
            self._gains = _GAIN

    @cached_property
    def published(self) -> Published:
        return Published(self.problem.snapshots, self.problem.prior, self._t)

    def solve(self, target: Profile | FloatArray, other: Profile | None) -> _Solution:
        """Return the solution for a target, which may be the `other` one as well."""
        if isinstance(target, np.ndarray):
            return _Solution(target, 0.0, self.problem.error_of(target))
        goal = self.problem.goal(target)
        published_goal = self.published.goal(target)
        published = self._published_coefficients(goal, published_goal)
        if self._is_minimum_variance:
            coefficients, squares = self._minimum_variance(goal, published)
        elif np.isnan(published).any():
            reason = "none of its mass lies before the last snapshot in use"
            raise InvalidValueError("target", reason, "use the time of a snapshot")
        else:
            coefficients = published
            squares = self.problem.expected_squares(coefficients, goal)
        # Coefficients below the rounding of the sum become 0, so that their snapshots need not be
        # read.
        least = np.finfo(np.float64).eps * np.abs(coefficients).sum()
        coefficients = np.where(np.abs(coefficients) < least, 0.0, coefficients)
        profile_error = self.published.error(coefficients, published_goal)
        if goal.stored is not None:
            used = np.flatnonzero(coefficients)
            if used.tolist() == [goal.stored]:
                profile_error = 0.0
        if other is not None:
            squares = np.append(squares, self.problem.apart(target, other))
        predicted = self.problem.relative(squares, coefficients, goal)
        return _Solution(coefficients, profile_error, predicted)

    def _published_coefficients(self, goal: Goal, published_goal: PublishedGoal) -> FloatArray:
        if goal.stored is None:
            return self.published.solve(published_goal)
        # the exact solution without rounding
        return only(goal.stored, len(self.problem.snapshots))

    def _minimum_variance(self, goal: Goal, published: FloatArray) -> tuple[FloatArray, FloatArray]:
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
            shown = np.array([1 + deviation, 1.0])
            if not shown @ squares < _CLEARLY * np.min(shown @ other_squares):
                best = int(other_squares.sum(axis=0).argmin())
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
        both = np.column_stack((optimal, others))
        squares = problem.expected_squares(both, goal).sum(axis=0)
        least, usual = squares.tolist()
        gain = np.sqrt(least / usual) if usual > 0 else 0.0
        gain *= np.exp(_CAUTION * max(0.0, problem.prior.doubt - SURE))
        sure, none = self._gains
        share = np.clip((gain - sure) / (none - sure), 0.0, 1.0)
        coefficients = optimal + share * (others - optimal)
        return coefficients, problem.expected_squares(coefficients, goal)


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
    for index in sorted(range(len(snapshots)), key=lambda i: -snapshots[i].t):
        gamma = getattr(snapshots[index], "gamma", np.inf)
        groups.setdefault(gamma, []).append(index)
    subset: list[int] = []
    for group in groups.values():
        size = len(group)
        count = min(size, max(keep, most * size // len(snapshots)))
        subset += [group[number * size // count] for number in range(count)]
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
