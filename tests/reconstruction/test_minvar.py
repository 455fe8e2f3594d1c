"""Minimum variance: closed forms against quadrature, the solver against 60 digits, and properties
of any optimum."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import flint
import numpy as np
import pytest
from checking import refused
from factories import FloatArray, power_functions, solved, squared_error
from scipy import integrate

from posthoc_cli.profiles import Clock, Point, PowerFunction, Profile, ema_pytorch_profile
from posthoc_cli.reconstruction import METHODS, Motion, Prior, Problem, Steps, reconstruct
from posthoc_cli.targets import Beta, Decay, Window

T = 1000.0
START = 3.0
NORM = 1e6
"""The norm of every average, so large that no motion changes it."""

power = PowerFunction.from_sigma_rel
STEPS = Clock.of_steps()


def uneven_motion(noise: float = 0.0) -> Motion:
    """Return a walk that slows down a thousandfold, and noise that grows."""
    edges = np.array([START, 100.0, 400.0, 700.0, T])
    return Motion(edges, np.array([1.0, 0.1, 0.3, 0.001]), noise * np.array([1.0, 2.0, 3.0, 4.0]))


def prior_of(snapshots: Sequence[object], motion: Motion, rounding: Any = 0.0) -> Prior:
    ones = np.ones(len(snapshots))
    return Prior(motion, rounding * ones, 0 * ones, NORM**2 * ones, "measured")


def expected_square(
    snapshots: list[PowerFunction],
    coefficients: FloatArray,
    target: Profile,
    motion: Motion,
    kink: float = T,
) -> float:
    """The defining integral, by adaptive quadrature between all kinks."""

    def density(profile: Profile, s: float) -> float:
        if isinstance(profile, PowerFunction):
            return float(profile.density(s))
        return float(profile.tail(s - 1e-4) - profile.tail(s + 1e-4)) / 2e-4

    def tail(profile: Profile, s: float) -> float:
        return float(profile.tail(s))

    def square(s: float, value: Callable[[Profile, float], float]) -> float:
        values = np.array([value(profile, s) for profile in snapshots])
        return float(coefficients @ values - value(target, s)) ** 2

    total = 0.0
    for a, b in pairwise(sorted({*motion.edges, *(p.t for p in snapshots), kink})):
        segment = int(np.searchsorted(motion.edges, (a + b) / 2)) - 1
        for weight, value in ((motion.walk, tail), (motion.noise, density)):
            if weight[segment]:
                options = {"epsabs": 1e-14, "epsrel": 1e-10, "limit": 200}
                part, _ = integrate.quad(square, a, b, (value,), **options)
                total += weight[segment] * part
    return total


@pytest.mark.parametrize(
    ("target", "kink"),
    [
        (power(0.1, T), T),
        (Beta(0.99).profile(T, STEPS, START), T),
        (Window(150).profile(T, STEPS, START), 850.0),
    ],
    ids=["power", "beta", "window"],
)
@pytest.mark.parametrize(("noise", "last"), [(0.0, T), (5.0, 900)])
def test_the_expected_error_is_the_integral(
    target: Profile,
    kink: float,
    noise: float,
    last: float,
) -> None:
    """From snapshots at the time of the target, and from earlier ones, which miss the motion since
    then."""
    snapshots = power_functions((250, 500, 800, last))
    motion = uneven_motion(noise)
    rounding = np.linspace(0, 1e-3, 8)
    result = reconstruct(snapshots, [target], prior=prior_of(snapshots, motion, rounding), t=T)
    c = result.coefficients[:, 0]
    exact = expected_square(snapshots, c, target, motion, kink) + c**2 @ rounding
    assert (NORM * result.predicted_error[0]) ** 2 == pytest.approx(exact, rel=1e-6)
    assert c.sum() == pytest.approx(1, abs=1e-14 * np.abs(c).sum())


# --- the optimum, in 60 digits

Exact = Any  # an array of `flint.arb`
Product = Callable[[PowerFunction, PowerFunction], flint.arb]


def exact_products(profiles: Sequence[PowerFunction], product: Product) -> Exact:
    flint.ctx.dps = 60
    return np.array([[product(p, q) for q in profiles] for p in profiles])


def exact_solution(matrix: Exact, right: Exact) -> Exact:
    n = len(right)
    left = flint.arb_mat(n, n, matrix.ravel().tolist())
    return np.array(left.solve(flint.arb_mat(n, 1, right.tolist())).entries())


def exact_square(matrix: Exact, right: Exact, norm: Exact, c: Exact) -> float:
    """Return the squared distance of combined averages from a target."""
    exact = c.astype(object)
    return float(exact @ matrix @ exact - 2 * exact @ right + norm)


def tail_product(p: PowerFunction, q: PowerFunction, motion: Motion) -> flint.arb:
    """The integral of v tail_p tail_q, term by term."""
    x, y, s, t = map(flint.arb, (p.gamma + 1, q.gamma + 1, p.t, q.t))
    total = flint.arb(0)
    for (start, end), v in zip(pairwise(motion.edges.tolist()), motion.walk.tolist(), strict=True):
        a = flint.arb(min(start, p.t, q.t))
        b = flint.arb(min(end, p.t, q.t))
        total += v * (b - a)
        for z, scale in ((x, -1 / s**x), (y, -1 / t**y), (x + y, 1 / (s**x * t**y))):
            total += v * scale * (b ** (z + 1) - a ** (z + 1)) / (z + 1)
    return total


@pytest.mark.parametrize(
    ("count", "sigma_rels", "rounding"),
    [(4, (0.05, 0.28), 1e-5), (16, (0.05, 0.10), 1e-12), (32, (0.1,), 1e-12)],
)
def test_the_minimum_is_that_of_sixty_digits(
    count: int,
    sigma_rels: tuple[float, ...],
    rounding: float,
) -> None:
    """The minima agree; coefficients of nearly equal snapshots may differ where the average does
    not.

    The network moves by more than the roundings everywhere, so that the rounding errors are
    independent.
    """
    snapshots = power_functions(np.linspace(0, T, count + 1)[1:], sigma_rels)
    targets = power_functions(T, (0.02, 0.07, 0.15, 0.27))
    motion = uneven_motion()
    n = len(snapshots)
    solver = Problem(snapshots, prior_of(snapshots, motion, rounding), T)
    products = exact_products([*snapshots, *targets], partial(tail_product, motion=motion))
    matrix = products[:n, :n] + rounding * np.eye(n)
    constrained = np.pad(matrix, (0, 1), constant_values=flint.arb(1))
    constrained[n, n] = flint.arb(0)
    for target, row, norm in zip(targets, products[n:], products.diagonal()[n:], strict=True):
        right = row[:n]
        best = exact_solution(constrained, np.append(right, flint.arb(1)))[:n]
        c = solved(solver, target)
        least = exact_square(matrix, right, norm, best)
        reached = exact_square(matrix, right, norm, c)
        # What float64 leaves of a root: eps of the tails times the coefficients.
        slack = float(np.abs(c).sum() ** 2) * 1e-13
        assert reached - least <= 1e-9 * least + slack * float(norm)
        assert reached == pytest.approx(squared_error(solver, c, target), rel=1e-6, abs=slack)
        assert c.sum() == pytest.approx(1, abs=1e-14 * np.abs(c).sum())


# --- properties of any optimum


def test_copies_between_which_nothing_moved_do_not_cancel() -> None:
    """Snapshots at the first update: no motion distinguishes them, and their roundings differ a
    little."""
    snapshots = power_functions((START, 10.0))
    rounding = np.array([1.0, 1.1, 1.0, 1.2]) * 1e-6
    prior = Prior(
        uneven_motion(5.0), rounding, 1e-9 * rounding, np.full(4, 4.0), "measured", Steps(STEPS)
    )
    for t, usable in ((START, range(2)), (10.0, range(4))):
        result = reconstruct(snapshots[: len(usable)], [power(0.1, t)], prior=prior.of(usable))
        assert np.abs(result.coefficients).sum() < 10
        assert (NORM * result.predicted_error[0]) ** 2 > 0.4e-6


def random_problem(seed: int) -> tuple[list[PowerFunction], Prior, PowerFunction]:
    """Return snapshots, a prior with any walk, noise and rounding, and a target."""
    random = np.random.default_rng(seed)
    times = np.sort(random.choice(np.arange(4, 1001), random.integers(1, 11), replace=False))
    tracked = [(0.05,), (0.05, 0.10), (0.05, 0.28), (0.03, 0.10, 0.28)]
    snapshots = power_functions(times, tracked[seed % 4])
    segments = int(random.integers(1, 6))
    edges = np.linspace(START, 1000, segments + 1)
    walk, noise = 10 ** random.uniform(-4, 1, (2, segments))
    rounding = 10 ** random.uniform(-10, -2, len(snapshots))
    prior = prior_of(snapshots, Motion(edges, walk, noise * (seed % 3 > 0)), rounding)
    return snapshots, prior, power(random.uniform(0.02, 0.288), float(times[-1]))


SEEDS = pytest.mark.parametrize("seed", range(24))


@SEEDS
def test_units_of_time_and_of_weights_change_nothing(seed: int) -> None:
    """A walk has the unit of squares per time, noise that of squares times time."""
    snapshots, prior, target = random_problem(seed)
    before = reconstruct(snapshots, [target], prior=prior)
    time, weights = 10 ** np.random.default_rng(seed).uniform((-3, -6), 6)
    motion = prior.motion
    moved = Motion(motion.edges * time, motion.walk * weights / time, motion.noise * weights * time)
    rounding = prior.rounding * weights
    scaled = replace(prior, motion=moved, rounding=rounding, norm=prior.norm * weights)
    slower = [PowerFunction(p.gamma, p.t * time) for p in (*snapshots, target)]
    after = reconstruct(slower[:-1], slower[-1:], prior=scaled)
    # The floor is eps times the walk, under a root.
    assert after.predicted_error[0] == pytest.approx(before.predicted_error[0], rel=1e-4, abs=1e-7)
    scale = np.abs(before.coefficients).sum()
    np.testing.assert_allclose(after.coefficients, before.coefficients, atol=1e-5 * scale)


@SEEDS
def test_a_target_that_is_stored_exactly_is_its_snapshot(seed: int) -> None:
    snapshots, prior, _ = random_problem(seed)
    exact = replace(prior, rounding=prior.rounding.copy(), arithmetic=prior.rounding)
    exact.rounding[-1] = 0.0
    result = reconstruct(snapshots, snapshots[-1:], prior=exact)
    np.testing.assert_array_equal(result.coefficients[:, 0], np.eye(len(snapshots))[-1])
    assert result.profile_error[0] == 0


@SEEDS
def test_errors_after_losses_are_those_of_solving_without_the_lost(seed: int) -> None:
    """For the next loss of each remaining snapshot, after any number of losses."""
    snapshots, prior, target = random_problem(seed)
    losses = Problem(snapshots, prior, target.t).losses([target])
    left = np.random.default_rng(seed).permutation(len(snapshots)).tolist()
    while len(left) > 1:
        after = losses.squares_without([[index] for index in range(len(snapshots))])[0]
        lost = left.pop()
        anew = Problem([snapshots[i] for i in left], prior.of(left), target.t)
        error = squared_error(anew, solved(anew, target), target)
        losses.lose(lost)
        assert (after[lost], losses.squares[0]) == pytest.approx((error,) * 2, rel=1e-3, abs=1e-8)


def test_the_error_is_relative_to_the_norm_of_the_target() -> None:
    """For a walk from a place theta0, E |theta|^2 = |theta0|^2 + integral v tail^2 ds.

    All long averages of a long path may be far shorter vectors than a late one.
    """
    snapshots = power_functions(np.linspace(100, T, 10))
    motion = uneven_motion()
    origin = PowerFunction(1e9, START)  # its tail is 0 where anything moves

    def norm(profile: PowerFunction) -> float:
        return 0.5 + expected_square([profile], np.ones(1), origin, motion)

    norms = np.array([norm(snapshot) for snapshot in snapshots])
    solver = Problem(snapshots, replace(prior_of(snapshots, motion, 1e-6), norm=norms), T)
    for target in power_functions(T, (0.02, 0.05, 0.15, 0.28)):
        c = solved(solver, target)
        goal = solver.goal(target)
        squares = solver.expected_squares(c, goal)
        expected = np.sqrt(squares.sum() / norm(target))
        assert solver.relative(squares, c, goal) == pytest.approx(expected, rel=1e-6)


def test_the_error_of_a_target_that_may_be_another_one_is_their_distance() -> None:
    snapshots = power_functions((500, T))
    target, other = snapshots[-1], power(0.2, T)
    motion = uneven_motion()
    prior = prior_of(snapshots, motion)
    found = reconstruct(snapshots, [target], prior=prior, others={0: other}).predicted_error
    expected = np.sqrt(expected_square([target], np.ones(1), other, motion)) / NORM
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("arithmetic", "expected"), [(0.0, 0.0), (1.0, np.nan)])
def test_the_relative_error_of_weights_that_are_all_0_is_0_or_undefined(
    arithmetic: float,
    expected: float,
) -> None:
    """It is 0 if no error is expected, and otherwise nan, since the norm is 0."""
    snapshots = power_functions([500.0, T])
    zeros = np.zeros(4)
    prior = Prior(Motion.even(T, 0.0), zeros, zeros + arithmetic, zeros, "measured")
    result = reconstruct(snapshots, [power(0.1, T)], prior=prior)
    np.testing.assert_equal(result.predicted_error[0], expected)


def test_a_small_gain_is_not_worth_the_risk_of_a_wrong_motion() -> None:
    """The fit is off by factors of ten in some segments; minimum variance alone has 1.09 times the
    published error."""
    times = np.arange(100.0, T + 1, 100.0)
    snapshots = power_functions(times)
    random = np.random.default_rng(202)
    walk = 10 ** random.uniform(-1, 0, 10)
    noise = 300 * 10 ** random.uniform(-1, 0, 10)
    true = Motion(np.append(START, times), walk, noise)
    off = 10.0 ** random.choice([-1, 0, 1], (2, 10))
    fitted = Motion(true.edges, walk * off[0], noise * off[1])
    target = power(0.1, T)
    squares = []
    for method in METHODS:
        result = reconstruct(snapshots, [target], method, prior_of(snapshots, fitted))
        squares.append(expected_square(snapshots, result.coefficients[:, 0], target, true))
    ours, paper = squares
    assert ours < 1.06**2 * paper


def test_the_motion_of_two_profiles_is_trusted_though_snapshots_are_few() -> None:
    """Where minimum variance has 0.7 of the published error, its coefficients are taken."""
    snapshots = power_functions((250, 500, 750, T))
    prior = prior_of(snapshots, Motion(np.array([START, T]), np.ones(1), np.full(1, 300.0)), 1e-6)
    target = power(0.15, T)
    optimal = solved(Problem(snapshots, prior, T), target)
    ours, paper = (reconstruct(snapshots, [target], m, prior).predicted_error for m in METHODS)
    assert 0.6 < ours / paper < 0.8
    found = reconstruct(snapshots, [target], prior=prior).coefficients[:, 0]
    np.testing.assert_allclose(found, optimal, rtol=1e-9)


def test_the_worse_motion_explains_distances_the_nearer_coefficients_are_to_published_ones() -> (
    None
):
    snapshots = power_functions(np.linspace(0, T, 21)[1:])
    target = power(0.15, T)
    prior = prior_of(snapshots, uneven_motion(), 1e-6)
    paper = reconstruct(snapshots, [target], "paper", prior).coefficients
    apart = []
    for doubt in (0.0, 0.3, 5.0):
        result = reconstruct(snapshots, [target], None, replace(prior, doubt=doubt))
        apart.append(float(np.abs(result.coefficients - paper).sum()))
    assert apart[0] > apart[1] > 1
    assert apart[2] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "snapshots",
    [
        power_functions((100,), (0.05,)),
        power_functions((50, 100), (0.1, 0.1 + 1e-14, 0.1000001)),
        power_functions((100, np.nextafter(100, 0))),
    ],
)
def test_coefficients_of_one_snapshot_and_of_nearly_equal_ones_are_finite(
    snapshots: list[PowerFunction],
    method: str,
) -> None:
    result = reconstruct(snapshots, [power(0.1, 100.0)], method)
    assert np.isfinite(result.coefficients).all()
    assert result.coefficients.sum() == pytest.approx(1)


# --- the published method

LAST = 100_000.0


def uniform_snapshots(count: int) -> list[PowerFunction]:
    return power_functions(np.linspace(0, LAST, count // 2 + 1)[1:], (0.05, 0.10))


def product(a: PowerFunction, b: PowerFunction) -> flint.arb:
    """The inner product of two power functions, from equation 151."""
    early, late = sorted((a, b), key=lambda profile: profile.t)
    g, h, s, t = map(flint.arb, (early.gamma, late.gamma, early.t, late.t))
    return (g + 1) * (h + 1) / (g + h + 1) * (s / t) ** h / t


@pytest.mark.parametrize(
    ("count", "sigma_rels"), [(8, (0.01, 0.05, 0.07, 0.15, 0.20, 0.28)), (128, (0.07, 0.28))]
)
def test_agrees_with_sixty_digits(count: int, sigma_rels: tuple[float, ...]) -> None:
    snapshots = uniform_snapshots(count)
    targets = power_functions(LAST, sigma_rels)
    ours = reconstruct(snapshots, targets, "paper")
    products = exact_products([*snapshots, *targets], product)
    matrix = products[:count, :count]
    for k, row in enumerate(products[count:]):
        norm = row[count + k]
        right = row[:count] / norm
        best = exact_solution(matrix / norm, right)
        best = best / best.sum()
        gap = ours.coefficients[:, k] - best
        error = exact_square(matrix / norm, right, 1, best)
        assert exact_square(matrix / norm, 0 * right, 0, gap) <= 1e-9**2
        assert ours.profile_error[k] == pytest.approx(max(error, 0) ** 0.5, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("target", power_functions((LAST, 1.05 * LAST), (0.15,)))
def test_the_stated_error_is_the_distance_of_the_profiles(target: PowerFunction) -> None:
    """The mass of the target after the last snapshot included, which no coefficients reach."""
    snapshots = uniform_snapshots(8)
    result = reconstruct(snapshots, [target], "paper")
    edges = np.array([0.0, target.t])
    even = Motion(edges, np.zeros(1), np.ones(1))
    distance2 = expected_square(snapshots, result.coefficients[:, 0], target, even, 0.0)
    norm2 = expected_square([target], np.zeros(1), target, even, 0.0)
    assert result.profile_error[0] == pytest.approx((distance2 / norm2) ** 0.5, rel=1e-6)


def test_a_target_with_no_mass_within_reach_is_refused() -> None:
    """All of a very short average lies after the last snapshot: all combinations are equally
    far."""
    with refused("target", "none of its mass"):
        reconstruct(power_functions(1000.0), power_functions(1999.0, (0.0005,)), "paper")


def test_a_target_at_one_time_is_as_far_as_its_own_norm_from_any_density() -> None:
    result = reconstruct(power_functions(1000.0), [Point(1000.0)])
    assert result.profile_error[0] == 1.0
    assert np.isfinite(result.predicted_error).all()


# --- reconstructions from checkpoints, other libraries' averages, and these together with power
# functions


def even_prior(count: int, t: float, noise: float = 0.0) -> Prior:
    zeros = np.zeros(count)
    motion = Motion(np.array([1.0, t]), np.ones(1), np.full(1, noise))
    return Prior(motion, zeros, zeros, zeros + 1, "measured", Steps(STEPS))


def test_a_known_motion_has_the_exact_expectation() -> None:
    """For a walk with noise, by sums over steps."""
    libraries = [ema_pytorch_profile(g, t, 25) for g in (2.0, 7.0) for t in (300, 600, 1000)]
    stored = [*libraries, Point(500.0), Point(990.0), PowerFunction(5.0, 800.0)]
    target = PowerFunction(9.0, T)
    c = np.random.default_rng(0).dirichlet(np.ones(len(stored)))
    solver = Problem(stored, even_prior(len(stored), T, 15.0), T)
    tails = [profile.tail(np.arange(1001)) for profile in (*stored, target)]
    missed = np.append(c, -1) @ tails
    exact = np.sum(missed[1:] ** 2) + 15.0 * np.sum(np.diff(missed) ** 2)
    assert squared_error(solver, c, target) == pytest.approx(exact, rel=0.03)


@pytest.mark.parametrize(
    ("shape", "d"),
    [
        ("linear", lambda x: 1 - x),
        ("1-sqrt", lambda x: 1 - np.sqrt(x)),
        ("cosine", lambda x: (1 + np.cos(np.pi * x)) / 2),
    ],
)
def test_a_decay_of_dense_checkpoints_is_the_closed_form(
    shape: str,
    d: Callable[[FloatArray], FloatArray],
) -> None:
    """theta(start) + the later increments times d, as a scheduler counts: the first step of the
    decay has d(0).

    By WSM the sums of the later coefficients are the multipliers.
    """
    stored = [Point(float(t)) for t in range(380, 601)]
    target = Decay(shape, (400, 600)).profile(600, STEPS, 1.0)
    result = reconstruct(stored, [target], None, even_prior(len(stored), 600.0), 600.0)
    sums = np.cumsum(result.coefficients[::-1, 0])[::-1]
    assert sums[:21] == pytest.approx(1, abs=1e-9)
    assert sums[21:] == pytest.approx(d(np.arange(200) / 200), abs=1e-9)
    assert result.predicted_error[0] < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_given_coefficients_are_not_changed(method: str) -> None:
    wanted = np.array([0.5, 0.0, -0.25, 0.75])
    stored = [Point(t) for t in (1000, 2000, 3000, 4000)]
    result = reconstruct(stored, [power(0.1, 4000), wanted], method, even_prior(4, 4000.0), 4000.0)
    assert result.coefficients[:, 1].tolist() == wanted.tolist()
    assert (result.predicted_error[1], result.profile_error[1]) == (0, 0)
