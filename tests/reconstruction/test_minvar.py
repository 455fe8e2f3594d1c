"""Minimum variance: closed forms against quadrature, the solver against 60 digits, what must hold of any optimum."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import mpmath
import numpy as np
import pytest
from factories import exact_gamma, exact_weights, solved, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate

from posthoc_cli.profiles import ClassicalEMA, Clock, PowerFunction, StepWindow, Uniform
from posthoc_cli.reconstruction import (
    METHODS,
    MinimumVariance,
    Motion,
    Prior,
    Steps,
    assumed_prior,
    expected_errors,
    reconstruct,
    relative_width,
)
from posthoc_cli.reconstruction.basis import FEW

T = 1000.0
START = 3.0
NORM = 1e6
"""Of every average, so large that no motion changes it."""


def snapshots_at(times, sigma_rels=(0.05, 0.28)) -> list[PowerFunction]:  # type: ignore[no-untyped-def]
    return [PowerFunction.from_sigma_rel(s, float(t)) for t in times for s in sigma_rels]


def uneven_motion(noise: float = 0.0) -> Motion:
    """A walk that slows down a thousandfold, and noise that grows."""
    edges = np.array([START, 100.0, 400.0, 700.0, T])
    return Motion(edges, np.array([1.0, 0.1, 0.3, 0.001]), noise * np.array([1.0, 2.0, 3.0, 4.0]))


def prior_of(snapshots, motion: Motion, rounding) -> Prior:  # type: ignore[no-untyped-def]
    r = np.broadcast_to(np.asarray(rounding, dtype=np.float64), (len(snapshots),))
    return Prior(motion, r, np.zeros(len(snapshots)), np.full(len(snapshots), NORM**2), "measured")


def expected_square(snapshots, coefficients, target, motion: Motion, rounding) -> float:  # type: ignore[no-untyped-def]
    """The defining integral, by adaptive quadrature between all kinks."""
    points = sorted({*motion.edges, *(p.t for p in snapshots), *getattr(target, "kinks", ())})

    def miss(values):  # type: ignore[no-untyped-def]
        made = sum(c * float(values(p)) for c, p in zip(coefficients, snapshots, strict=True))
        return (made - float(values(target))) ** 2

    total = float(np.sum(np.asarray(coefficients) ** 2 * rounding))
    for a, b in pairwise(points):
        piece = int(np.searchsorted(motion.edges, (a + b) / 2, side="right")) - 1
        v, w = motion.walk[piece], motion.noise[piece]
        tails = integrate.quad(lambda s: miss(lambda p: p.tail(s)), a, b, epsabs=1e-14, epsrel=1e-10, limit=200)[0]
        total += v * tails
        if w:
            total += w * integrate.quad(lambda s: miss(lambda p: p.density(s)), a, b, epsabs=1e-14, limit=200)[0]
    return total


TARGETS = [
    PowerFunction.from_sigma_rel(0.1, T), ClassicalEMA(0.99, T, Clock.of_steps(), START),
    ClassicalEMA(0.5, T, Clock.of_steps(), START), StepWindow(150, T, Clock.of_steps()), Uniform(200.0, 620.0),
]  # fmt: skip


@pytest.mark.parametrize("target", TARGETS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_the_expected_error_is_the_integral(target, noise: float) -> None:  # type: ignore[no-untyped-def]
    snapshots = snapshots_at((250, 500, 800, 1000))
    motion, rounding = uneven_motion(noise), np.linspace(0, 1e-3, 8)
    result = reconstruct(snapshots, [target], prior=prior_of(snapshots, motion, rounding), t=T)
    c = result.coefficients[:, 0]
    if type(target) in (StepWindow, Uniform):
        start = {StepWindow: (850.0,), Uniform: (200.0, 620.0)}[type(target)]
        motion_edges = sorted({*motion.edges, *start})
        pieces = motion.on(np.array(motion_edges))
        motion = Motion(np.array(motion_edges), *pieces)
    exact = expected_square(snapshots, c, target, motion, rounding)
    assert (NORM * result.predicted_error[0]) ** 2 == pytest.approx(exact, rel=1e-6)
    assert c.sum() == pytest.approx(1, abs=1e-14 * np.abs(c).sum())


def test_the_width_of_a_profile_is_its_standard_deviation() -> None:
    for sigma_rel in (0.02, 0.1, 0.28):
        for t in (T, 1e-3):
            assert relative_width(PowerFunction.from_sigma_rel(sigma_rel, t), t) == pytest.approx(sigma_rel, rel=1e-9)
    assert relative_width(Uniform(200, 620), T) == pytest.approx(0.42 / 12**0.5, rel=1e-9)
    assert relative_width(ClassicalEMA(0.9, T, Clock.of_steps()), T) == pytest.approx(
        -1 / np.log(0.9) / T, rel=1e-6  # an exponential density in time
    )  # fmt: skip


# --- the optimum -----------------------------------------------------------------------------------


def tail_products(motion: Motion, profiles: list[PowerFunction]) -> mpmath.matrix:
    """Integrals of v tail_i tail_j at 60 digits, term by term."""
    number = mpmath.mpf
    edges = sorted({*motion.edges, *(p.t for p in profiles)})
    variance = motion.on(np.array(edges))[0]

    def power(a, b, scale_a, x, scale_b, y):  # type: ignore[no-untyped-def]
        """Integral of (s/scale_a)^x (s/scale_b)^y."""
        p = x + y + 1
        return (b**p - a**p) / p / (scale_a**x * scale_b**y)

    n = len(profiles)
    products = mpmath.zeros(n, n)
    for a, b, v in zip(edges[:-1], edges[1:], variance, strict=True):
        a, b, v = number(float(a)), number(float(b)), number(float(v))
        for i in range(n):
            for j in range(i, n):
                p, q = profiles[i], profiles[j]
                if b > p.t or b > q.t:
                    continue
                x, y, s, t = (number(z) for z in (p.gamma, q.gamma, p.t, q.t))
                x, y, one = x + 1, y + 1, number(1)
                value = (b - a) - power(a, b, s, x, one, 0) - power(a, b, t, y, one, 0) + power(a, b, s, x, t, y)
                products[i, j] += v * value
                if i != j:
                    products[j, i] += v * value
    return products


def square_of(x, products: mpmath.matrix, rounding: float) -> mpmath.mpf:  # type: ignore[no-untyped-def]
    """The expected squared error of coefficients; the target is the last of the products."""
    n = products.rows - 1
    total = products[n, n]
    for i in range(n):
        total += x[i] * (mpmath.mpf(rounding) * x[i] - 2 * products[i, n])
        total += x[i] * sum(products[i, j] * x[j] for j in range(n))
    return total


@pytest.mark.parametrize(
    ("count", "sigma_rels", "rounding"),
    [
        *[(4, (0.05, 0.28), rounding) for rounding in (1e-5, 1e-8, 1e-12)],
        *[(16, (0.05, 0.10), rounding) for rounding in (1e-5, 1e-12)],
        (32, (0.1,), 1e-12),
    ],
)
def test_the_minimum_is_that_of_sixty_digits(count: int, sigma_rels: tuple[float, ...], rounding: float) -> None:
    """In value: the coefficients of nearly equal snapshots may differ where the average does not.

    The network moves by more than the roundings everywhere, so that their errors have nothing to do with each other.
    """
    snapshots = snapshots_at(np.linspace(0, T, count + 1)[1:], sigma_rels)
    motion = Motion(uneven_motion().edges, uneven_motion().walk, np.zeros(4))
    prior = prior_of(snapshots, motion, rounding)
    solver = MinimumVariance(snapshots, prior, T)
    targets = [PowerFunction.from_sigma_rel(sigma_rel, T) for sigma_rel in (0.02, 0.07, 0.15, 0.27)]
    n = len(snapshots)
    with mpmath.workdps(60):
        every = tail_products(motion, [*snapshots, *targets])
    for k, target in enumerate(targets):
        c = solved(solver, target)
        with mpmath.workdps(60):
            own = [*range(n), n + k]
            products = mpmath.matrix([[every[i, j] for j in own] for i in own])
            matrix = mpmath.matrix(n + 1, n + 1)
            right = mpmath.matrix(n + 1, 1)
            for i in range(n):
                for j in range(n):
                    matrix[i, j] = products[i, j] + (mpmath.mpf(rounding) if i == j else 0)
                matrix[i, n] = matrix[n, i] = 1
                right[i] = products[i, n]
            right[n] = 1
            exact = mpmath.lu_solve(matrix, right)
            least, found = (square_of(x, products, rounding) for x in (exact, [mpmath.mpf(float(x)) for x in c]))
            # What float64 leaves of a root: eps of the tails times the coefficients.
            slack = mpmath.mpf(float(np.abs(c).sum()) ** 2 * 1e-13)
            assert found - least <= 1e-9 * least + slack * products[n, n]
            assert float(found) == pytest.approx(squared_error(solver, c, target), rel=1e-6, abs=float(slack))
        assert c.sum() == pytest.approx(1, abs=1e-14 * np.abs(c).sum())


def test_large_problems_are_solved_as_well() -> None:
    """300 times of two profiles and 1,000 of one: no neighbour of the solution is better."""
    generator = np.random.default_rng(0)
    for count, sigma_rels in ((300, (0.05, 0.28)), (1000, (0.1,))):
        snapshots = snapshots_at(np.linspace(0, 1e5, count + 1)[1:], sigma_rels)
        solver = MinimumVariance(snapshots, assumed_prior(snapshots, 2e-4), 1e5)
        target = PowerFunction.from_sigma_rel(0.15, 1e5)
        c = solved(solver, target)
        least = squared_error(solver, c, target)
        assert np.abs(c).sum() < 2
        for _ in range(20):
            change = generator.normal(size=c.size)
            change -= change.mean()
            for size in (1e-6, -1e-6, 1e-4):
                assert squared_error(solver, c + size * change, target) >= least


# --- what must hold --------------------------------------------------------------------------------

TIMES = st.lists(st.integers(4, 1000), min_size=1, max_size=10, unique=True)
PROFILES = st.sampled_from([(0.05,), (0.05, 0.10), (0.05, 0.28), (0.03, 0.10, 0.28)])


def test_copies_between_which_nothing_moved_do_not_cancel() -> None:
    """Snapshots at the first update: no movement tells them apart, and their roundings differ a little."""
    snapshots = snapshots_at((START, 10.0))
    rounding = np.array([1.0, 1.1, 1.0, 1.2]) * 1e-6
    prior = Prior(uneven_motion(5.0), rounding, 1e-9 * rounding, np.full(4, 4.0), "measured", Steps(Clock.of_steps()))
    for t in (START, 10.0):
        usable = [i for i, p in enumerate(snapshots) if p.t <= t]
        chosen = [snapshots[i] for i in usable]
        result = reconstruct(chosen, [PowerFunction.from_sigma_rel(0.1, t)], prior=prior.of(usable))
        assert np.abs(result.coefficients).sum() < 10
        assert (NORM * result.predicted_error[0]) ** 2 > 0.4e-6


def test_noise_at_a_point_is_that_of_one_interval() -> None:
    """A target far shorter than the time between updates is the last weights, not something infinitely noisy."""
    snapshots = snapshots_at((500, 1000))
    motion = Motion(np.array([1.0, T]), np.array([1e-9]), np.array([2.0]))  # noise of a step; of an update 2 / 10
    prior = Prior(motion, np.zeros(4), np.zeros(4), np.full(4, NORM**2), "measured", Steps(Clock.of_steps(), 10))
    for sigma_rel in (1e-9, 1e-5):
        result = reconstruct(snapshots, [PowerFunction.from_sigma_rel(sigma_rel, T)], prior=prior)
        assert (NORM * result.predicted_error[0]) ** 2 <= 2.0 / 10 + 0.1


@st.composite
def problems(draw):  # type: ignore[no-untyped-def]
    """(snapshots, prior, target): any walk, noise and rounding."""
    times = sorted(draw(TIMES))
    snapshots = snapshots_at(times, draw(PROFILES))
    pieces = draw(st.integers(1, 5))
    edges = np.concatenate(([START], np.linspace(START, 1000, pieces + 1)[1:]))
    logs = st.lists(st.floats(-4, 1), min_size=pieces, max_size=pieces)
    walk, noise = (10 ** np.array(draw(logs)) for _ in range(2))
    noise = noise * draw(st.sampled_from([0.0, 1.0]))
    rounding = 10 ** np.array(draw(st.lists(st.floats(-10, -2), min_size=len(snapshots), max_size=len(snapshots))))
    prior = prior_of(snapshots, Motion(edges, walk, noise), rounding)
    return snapshots, prior, PowerFunction.from_sigma_rel(draw(st.floats(0.02, 0.288)), float(times[-1]))


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_snapshots_changes_nothing(problem, random) -> None:  # type: ignore[no-untyped-def]
    snapshots, prior, target = problem
    order = list(range(len(snapshots)))
    random.shuffle(order)
    c = solved(MinimumVariance(snapshots, prior, target.t), target)
    shuffled = solved(MinimumVariance([snapshots[i] for i in order], prior.of(order), target.t), target)
    np.testing.assert_array_equal(shuffled, c[order])


@given(problems(), st.floats(1e-3, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=60, deadline=None)
def test_units_of_time_and_of_weights_change_nothing(problem, time: float, weights: float) -> None:  # type: ignore[no-untyped-def]
    """Coefficients and relative errors; a walk is squares per time, noise squares times time."""
    snapshots, prior, target = problem
    before = reconstruct(snapshots, [target], prior=prior)
    motion = prior.motion
    moved = Motion(motion.edges * time, motion.walk * weights / time, motion.noise * weights * time)
    scaled = Prior(moved, prior.rounding * weights, prior.arithmetic, prior.norm * weights, prior.source)
    slower = [PowerFunction(p.gamma, p.t * time) for p in snapshots]
    after = reconstruct(slower, [PowerFunction(target.gamma, target.t * time)], prior=scaled)
    # The floor is eps times the walk, under a root.
    assert after.predicted_error[0] == pytest.approx(before.predicted_error[0], rel=1e-4, abs=1e-7)
    scale = np.abs(before.coefficients).sum()
    np.testing.assert_allclose(after.coefficients, before.coefficients, atol=1e-5 * scale)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_magnitudes_are_bounded_by_what_rounding_allows(problem) -> None:  # type: ignore[no-untyped-def]
    """sum c_i^2 r_i is part of a minimum that is no larger than that of any single snapshot."""
    snapshots, prior, target = problem
    solver = MinimumVariance(snapshots, prior, target.t)
    c = solved(solver, target)
    single = min(squared_error(solver, row, target) for row in np.eye(len(snapshots)))
    assert np.sum(c**2 * prior.rounding) <= single * (1 + 1e-9)
    assert np.abs(c).sum() <= np.sqrt(single * np.sum(1 / prior.rounding)) * (1 + 1e-9)
    assert c.sum() == pytest.approx(1, abs=1e-13 * np.abs(c).sum())


@given(problems(), st.data())
@settings(max_examples=40, deadline=None)
def test_a_target_that_is_stored_exactly_is_its_snapshot(problem, data) -> None:  # type: ignore[no-untyped-def]
    snapshots, prior, _ = problem
    newest = [i for i, p in enumerate(snapshots) if p.t == max(q.t for q in snapshots)]
    index = data.draw(st.sampled_from(newest))
    rounding = np.where(np.arange(len(snapshots)) == index, 0.0, prior.rounding)
    prior = Prior(prior.motion, rounding, prior.rounding, prior.norm, prior.source)
    result = reconstruct(snapshots, [snapshots[index]], prior=prior)
    np.testing.assert_array_equal(result.coefficients[:, 0], np.eye(len(snapshots))[index])
    assert result.profile_error[0] == 0


def test_the_error_is_relative_to_the_norm_of_the_target() -> None:
    """Of a walk from a place theta0: E |theta|^2 = |theta0|^2 + integral v tail^2 ds.

    Long averages of a long way may all be far shorter vectors than a late one.
    """
    snapshots, motion = snapshots_at(np.linspace(100, T, 10)), uneven_motion()
    origin = PowerFunction(1e9, float(motion.edges[0]))  # whose tail is 0 where anything moves

    def norm(profile: PowerFunction) -> float:
        return 0.5 + expected_square([profile], [1.0], origin, motion, 0.0)

    norms = np.array([norm(snapshot) for snapshot in snapshots])
    solver = MinimumVariance(snapshots, replace(prior_of(snapshots, motion, 1e-6), norm=norms), T)
    for sigma_rel in (0.02, 0.05, 0.15, 0.28):
        target = PowerFunction.from_sigma_rel(sigma_rel, T)
        c, goals = solved(solver, target)[:, None], solver.goals([target])
        squares = solver.expected_squares(c, goals)
        expected = np.sqrt(squares.sum() / norm(target))
        assert solver.expected_errors(squares, c, goals) == pytest.approx(expected, rel=1e-6)


def test_weights_that_are_all_0_have_no_relative_error_but_0() -> None:
    """Nothing is wrong: no error. Something is, and the norm says 0: no number."""
    snapshots = snapshots_at([500.0, T])
    zeros = np.zeros(len(snapshots))
    target = PowerFunction.from_sigma_rel(0.1, T)
    for arithmetic, expected in ((zeros, 0.0), (zeros + 1, np.nan)):
        solver = MinimumVariance(snapshots, Prior(Motion.even(T, 0.0), zeros, arithmetic, zeros, "measured"), T)
        goals = solver.goals([target])
        c = solver.solve(goals)
        np.testing.assert_equal(solver.expected_errors(solver.expected_squares(c, goals), c, goals), [expected])


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_errors_after_losses_are_those_of_solving_without_them(problem, random) -> None:  # type: ignore[no-untyped-def]
    """Of one more for each that is left, after any number of others."""
    snapshots, prior, target = problem
    losses = MinimumVariance(snapshots, prior, target.t).losses([target])
    left = list(range(len(snapshots)))
    while len(left) > 1:
        after = losses.squares_without_each()[0]
        gone = random.choice(left)
        left.remove(gone)
        anew = MinimumVariance([snapshots[i] for i in left], prior.of(left), target.t)
        expected = pytest.approx(squared_error(anew, solved(anew, target), target), rel=1e-3, abs=1e-8)
        assert after[gone] == expected
        losses.lose(gone)
        assert losses.squares[0] == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_copy_of_a_snapshot_costs_nothing_when_it_is_lost(count: int) -> None:
    """Rounding aside, of which there is none here; nor does the only snapshot have a share that could grow."""
    snapshots = [PowerFunction.from_sigma_rel(0.1, T)] * count
    solver = MinimumVariance(snapshots, prior_of(snapshots, uneven_motion(), 0.0), T)
    losses = solver.losses([PowerFunction.from_sigma_rel(0.15, T)])
    only = losses.squares.copy()
    for lost in range(count - 1):
        losses.lose(lost)
    np.testing.assert_allclose(losses.squares, only)


def test_losses_of_some_are_those_of_a_problem_without_the_others() -> None:
    snapshots = snapshots_at(np.arange(50.0, T + 1, 50.0))
    prior = prior_of(snapshots, uneven_motion(0.3), 1e-4)
    targets = [PowerFunction.from_sigma_rel(s, T) for s in (0.06, 0.15, 0.27)]
    some = [0, 3, 4, 11, 16, len(snapshots) - 1]
    found = MinimumVariance(snapshots, prior, T).losses(targets).of(some)
    anew = MinimumVariance([snapshots[i] for i in some], prior.of(some), T).losses(targets)
    np.testing.assert_allclose(found.squares_without_each(), anew.squares_without_each(), rtol=1e-7)


@given(problems())
@settings(max_examples=30, deadline=None)
def test_errors_of_many_at_once_are_those_of_one_at_a_time(problem) -> None:  # type: ignore[no-untyped-def]
    snapshots, prior, target = problem
    last = snapshots[-1]
    targets = [target, PowerFunction.from_sigma_rel(0.11, target.t), *([last] if last.t == target.t else [])]
    one_by_one = reconstruct(snapshots, targets, prior=prior, t=target.t)
    predicted, profile = expected_errors(snapshots, targets, prior, target.t)
    np.testing.assert_allclose(predicted, one_by_one.predicted_error, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(profile, one_by_one.profile_error, rtol=1e-3, atol=1e-6)


def test_what_is_assumed_is_an_even_walk_of_a_quarter_of_the_weights_norm() -> None:
    snapshots = snapshots_at([100.0, 400.0])
    prior = assumed_prior(snapshots, 3e-3)
    found = np.array([prior.rounding, prior.arithmetic, prior.norm])
    np.testing.assert_array_equal(found, np.multiply.outer([3e-3**2, 0, 1], np.ones(4)))
    assert (prior.source, prior.steps) == ("assumed", None)
    assert prior.motion == Motion(np.array([0.0, 400.0]), np.array([0.25**2 / 400]), np.zeros(1))
    own = uneven_motion()
    assert assumed_prior(snapshots, motion=own).motion is own


@pytest.mark.parametrize("seed", [2, 202])
def test_a_small_gain_is_not_worth_a_motion_that_was_fitted_wrong(seed: int) -> None:
    """Off by factors of ten in some pieces, where minimum variance alone would be 1.09 times the published error."""
    times = np.arange(100.0, T + 1, 100.0)
    snapshots, edges = snapshots_at(times), np.concatenate(([START], times))
    random = np.random.default_rng(seed)
    walk, noise = 10 ** random.uniform(-1, 0, 10), 300 * 10 ** random.uniform(-1, 0, 10)
    fitted = Motion(edges, walk * 10.0 ** random.choice([-1, 0, 1], 10), noise * 10.0 ** random.choice([-1, 0, 1], 10))
    target, prior = PowerFunction.from_sigma_rel(0.1, T), prior_of(snapshots, fitted, 0.0)
    ours, paper = (
        expected_square(snapshots, found.coefficients[:, 0], target, Motion(edges, walk, noise), 0.0)
        for found in (reconstruct(snapshots, [target], method, prior) for method in ("minvar", "paper"))
    )
    assert ours < 1.06**2 * paper


def test_with_noise_alone_it_is_the_published_method() -> None:
    """Up to the constraint: there the coefficients are divided by their sum, here they sum to 1 from the start."""
    snapshots = snapshots_at(np.linspace(0, T, 21)[1:])
    motion = Motion(np.array([1e-9, T]), np.array([0.0]), np.array([1.0]))
    prior = Prior(motion, np.zeros(40), np.zeros(40), np.ones(40), "measured")
    target = PowerFunction.from_sigma_rel(0.15, T)
    ours, paper = (reconstruct(snapshots, [target], method, prior) for method in ("minvar", "paper"))
    assert ours.profile_error[0] == pytest.approx(paper.profile_error[0], rel=1e-3)
    assert ours.predicted_error[0] <= paper.predicted_error[0] * (1 + 1e-9)


# --- edges -----------------------------------------------------------------------------------------


def test_a_target_after_the_last_snapshot_misses_what_the_network_moved_since() -> None:
    snapshots = snapshots_at((50, 100))
    motion = Motion(np.array([1.0, 100.0, 200.0]), np.array([1.0, 0.25]), np.zeros(2))
    target = PowerFunction.from_sigma_rel(0.05, 150.0)
    result = reconstruct(snapshots, [target], prior=prior_of(snapshots, motion, 0.0))
    since = 0.25 * integrate.quad(lambda s: float(target.tail(s)) ** 2, 100, 150)[0]
    assert (NORM * result.predicted_error[0]) ** 2 >= since
    assert (NORM * result.predicted_error[0]) ** 2 == pytest.approx(since, rel=0.3)


def test_a_network_that_never_moved_needs_no_certain_combination() -> None:
    snapshots = snapshots_at((50, 100))
    still = Motion(np.array([1.0, 100.0]), np.zeros(1), np.zeros(1))
    for rounding in (0.0, 1.0):
        prior = prior_of(snapshots, still, rounding)
        result = reconstruct(snapshots, [PowerFunction.from_sigma_rel(0.1, 100.0)], prior=prior)
        assert result.coefficients.sum() == pytest.approx(1)
        # All four copies are rounded to the same values.
        assert (NORM * result.predicted_error[0]) ** 2 == pytest.approx(rounding, rel=0.01)
        assert np.abs(result.coefficients).sum() < 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "snapshots",
    [
        snapshots_at((100,), (0.05,)),
        snapshots_at((50, 100), (0.1, 0.1 + 1e-14, 0.1000001)),
        snapshots_at((100, np.nextafter(100, 0))),
    ],
)
def test_one_snapshot_and_nearly_equal_ones_are_no_trouble(snapshots: list[PowerFunction], method: str) -> None:
    result = reconstruct(snapshots, [PowerFunction.from_sigma_rel(0.1, 100.0)], method)
    assert np.isfinite(result.coefficients).all()
    assert result.coefficients.sum() == pytest.approx(1)


# --- few updates in an interval are a sum, and a clock may run on while nothing is trained --------------


def simulated_square(c, snapshots, sigma_rel, updates, rate):  # type: ignore[no-untyped-def]
    """E |error|^2 of a walk that moves by `rate` from each update to the next: a sum over updates, from the weights."""
    made = np.zeros(updates.size)
    for coefficient, (s, t) in zip(c, snapshots, strict=True):
        count = int(np.searchsorted(updates, t, side="right"))
        made[:count] += coefficient * exact_weights(s, updates[:count])
    missed = made - exact_weights(sigma_rel, updates)
    after = np.cumsum(missed[::-1])[::-1]  # what an increment at update k shifts: all values from k on
    return float(rate @ after[1:] ** 2)


@pytest.mark.parametrize("noise", [0.0, 5.0])
@pytest.mark.parametrize(("every", "stride"), [(10, 10), (20, 10), (3, 1)])
def test_a_snapshot_at_every_update_or_every_few_makes_averages_to_rounding(
    every: int, stride: int, noise: float
) -> None:
    steps = every * 40
    updates = np.arange(stride, steps + 1, stride, dtype=np.float64)
    stored = [(s, float(t)) for t in range(every, steps + 1, every) for s in (0.05, 0.28)]
    snapshots = [PowerFunction(exact_gamma(s), t) for s, t in stored]
    motion = Motion(np.array([float(stride), steps]), np.array([2.0]), np.array([noise]))
    tiny = np.full(len(snapshots), 1e-14)
    prior = Prior(motion, tiny, 0 * tiny, np.ones(len(snapshots)), "measured", Steps(Clock.of_steps(), stride))
    target = PowerFunction(exact_gamma(0.15), float(steps))
    solver = MinimumVariance(snapshots, prior, target.t)
    c = solved(solver, target)
    true = simulated_square(c, stored, 0.15, updates, np.full(updates.size - 1, 2.0 * stride))
    expected = squared_error(solver, c, target) - 1e-14 * float(c @ c)
    if noise == 0:
        assert expected == pytest.approx(true, rel=0.02, abs=1e-13)
    # Two profiles and an update or two between snapshots: as many unknowns as values.
    assert true < (1e-10 if every <= 2 * stride else 1e-3)


@pytest.mark.parametrize("count", [FEW, FEW + 1, 4 * FEW])
def test_the_sum_and_the_integral_agree_where_one_gives_way_to_the_other(count: int) -> None:
    """Two snapshots, `count` updates apart: the expected square against the sum over updates."""
    updates = np.arange(1.0, 11 * count + 1)
    stored = [(0.1, 10.0 * count), (0.1, 11.0 * count)]
    snapshots = [PowerFunction(exact_gamma(s), t) for s, t in stored]
    motion = Motion(np.array([1.0, 11.0 * count]), np.ones(1), np.zeros(1))
    prior = Prior(motion, np.zeros(2), np.zeros(2), np.ones(2), "measured", Steps(Clock.of_steps()))
    target = PowerFunction(exact_gamma(0.06), 11.0 * count)
    solver = MinimumVariance(snapshots, prior, target.t)
    c = solved(solver, target)
    true = simulated_square(c, stored, 0.06, updates, np.ones(updates.size - 1))
    assert squared_error(solver, c, target) == pytest.approx(true, rel=0.1)


def test_a_pause_of_the_clock_is_no_movement() -> None:
    """1,000 steps, a pause as long as they took, and 1,000 more: how one combination misses, against the sum."""
    times = np.concatenate((np.arange(1.0, 1001), np.arange(2001.0, 3001)))
    clock = Clock((1000, 1001, 2000), (1000.0, 2001.0, 3000.0))
    stored = [(s, t) for t in (1000.0, 2500.0, 3000.0) for s in (0.05, 0.28)]
    snapshots = [PowerFunction(exact_gamma(s), t) for s, t in stored]
    motion = Motion(np.array([1.0, 3000.0]), np.ones(1), np.zeros(1))
    prior = Prior(motion, np.zeros(6), np.zeros(6), np.ones(6), "measured", Steps(clock))
    target = PowerFunction(exact_gamma(0.2), 3000.0)
    solver = MinimumVariance(snapshots, prior, 3000.0)
    for c in (solved(solver, target), np.array([0.2, 0.3, -0.1, 0.2, 0.1, 0.3])):
        true = simulated_square(c, stored, 0.2, times, np.ones(1999))
        assert squared_error(solver, c, target) == pytest.approx(true, rel=0.02)
    # Without the clock the pause counts as half of the training.
    blind = MinimumVariance(snapshots, Prior(motion, np.zeros(6), np.zeros(6), np.ones(6), "measured"), 3000.0)
    assert squared_error(blind, c, target) != pytest.approx(true, rel=0.1)
