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
from numpy.testing import assert_allclose, assert_array_equal, assert_equal
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
    walk = np.array([1.0, 0.1, 0.3, 0.001])
    growing = np.array([1.0, 2.0, 3.0, 4.0])
    return Motion(edges, walk, noise * growing)


def even_motion(start: float, end: float, noise: float) -> Motion:
    """Return a walk of 1 and noise, each the same all the time."""
    edges = np.array([start, end])
    one = np.ones(1)
    return Motion(edges, walk=one, noise=noise * one)


def prior_of(snapshots: Sequence[object], motion: Motion, rounding: Any = 0.0) -> Prior:
    zeros = np.zeros(len(snapshots))
    norm = zeros + NORM**2
    return Prior(motion, zeros + rounding, zeros, norm, "measured")


def expected_square(
    snapshots: list[PowerFunction],
    coefficients: FloatArray,
    target: Profile,
    motion: Motion,
    kink: float = T,
) -> float:
    """The defining integral, by adaptive quadrature between all kinks."""

    def square(s, value):
        values = [value(profile, s) for profile in snapshots]
        combined = float(coefficients @ values)
        return (combined - value(target, s)) ** 2

    times = [profile.t for profile in snapshots]
    kinks = sorted({*motion.edges, *times, kink})
    total = 0.0
    for a, b in pairwise(kinks):
        middle = (a + b) / 2
        segment = np.searchsorted(motion.edges, middle) - 1
        weights = {
            tail_at: motion.walk[segment],
            density_at: motion.noise[segment],
        }
        for value, weight in weights.items():
            if weight:
                integral, _ = integrate.quad(square, a, b, (value,), **QUADRATURE)
                total += weight * integral
    return total


QUADRATURE = {"epsabs": 1e-14, "epsrel": 1e-10, "limit": 200}


def tail_at(profile: Profile, s: float) -> float:
    return float(profile.tail(s))


def density_at(profile: Profile, s: float) -> float:
    if isinstance(profile, PowerFunction):
        return float(profile.density(s))
    before = tail_at(profile, s - 1e-4)
    after = tail_at(profile, s + 1e-4)
    return (before - after) / 2e-4


def check_sum(coefficients: FloatArray) -> None:
    """Check that coefficients have the sum 1, up to rounding."""
    rounding = 1e-14 * np.abs(coefficients).sum()
    assert coefficients.sum() == pytest.approx(1, abs=rounding)


BETA = Beta(0.99).profile(T, STEPS, START)
WINDOW = Window(150).profile(T, STEPS, START)


@pytest.mark.parametrize(
    ("target", "kink"),
    [
        (power(0.1, T), T),
        (BETA, T),
        (WINDOW, 850.0),
    ],
    ids=["power", "beta", "window"],
)
@pytest.mark.parametrize(
    ("noise", "last"),
    [
        (0.0, T),
        (5.0, 900),
    ],
)
def test_the_expected_error_is_the_integral(target, kink, noise, last):
    """From snapshots at the time of the target, and from earlier ones, which miss the motion since
    then."""
    snapshots = power_functions((250, 500, 800, last))
    motion = uneven_motion(noise)
    rounding = np.linspace(0, 1e-3, 8)
    prior = prior_of(snapshots, motion, rounding)
    result = reconstruct(snapshots, [target], prior=prior, t=T)
    c = result.coefficients[:, 0]
    moved = expected_square(snapshots, c, target, motion, kink)
    exact = moved + c**2 @ rounding
    error = NORM * result.predicted_error[0]
    assert error**2 == pytest.approx(exact, rel=1e-6)
    check_sum(c)


# --- the optimum, in 60 digits

Exact = Any  # an array of `flint.arb`
Product = Callable[[PowerFunction, PowerFunction], flint.arb]


def exact_products(profiles: Sequence[PowerFunction], product: Product) -> Exact:
    flint.ctx.dps = 60
    rows = []
    for first in profiles:
        row = [product(first, second) for second in profiles]
        rows.append(row)
    return np.array(rows)


def exact_solution(matrix: Exact, right: Exact) -> Exact:
    n = len(right)
    entries = matrix.ravel().tolist()
    left = flint.arb_mat(n, n, entries)
    column = flint.arb_mat(n, 1, right.tolist())
    solution = left.solve(column)
    return np.array(solution.entries())


def exact_square(matrix: Exact, right: Exact, norm: Exact, c: Exact) -> float:
    """Return the squared distance of combined averages from a target."""
    exact = c.astype(object)
    square = exact @ matrix @ exact
    product = exact @ right
    return float(square - 2 * product + norm)


def tail_product(p: PowerFunction, q: PowerFunction, motion: Motion) -> flint.arb:
    """The integral of v tail_p tail_q, term by term."""
    x = flint.arb(p.gamma + 1)
    y = flint.arb(q.gamma + 1)
    of_p = 1 / flint.arb(p.t) ** x
    of_q = 1 / flint.arb(q.t) ** y
    powers = (
        (flint.arb(0), flint.arb(1)),
        (x, -of_p),
        (y, -of_q),
        (x + y, of_p * of_q),
    )
    last = min(p.t, q.t)
    ends = np.minimum(motion.edges, last)
    edges = [flint.arb(edge) for edge in ends.tolist()]
    total = flint.arb(0)
    for z, scale in powers:
        exponent = z + 1
        integrals = [edge**exponent / exponent for edge in edges]
        segments = zip(motion.walk.tolist(), pairwise(integrals), strict=True)
        for v, (before, after) in segments:
            total += v * scale * (after - before)
    return total


@pytest.mark.parametrize(
    ("count", "sigma_rels", "rounding"),
    [
        (4, (0.05, 0.28), 1e-5),
        (16, (0.05, 0.10), 1e-12),
        (32, (0.1,), 1e-12),
    ],
)
def test_the_minimum_is_that_of_sixty_digits(count, sigma_rels, rounding):
    """The minima agree; coefficients of nearly equal snapshots may differ where the average does
    not.

    The network moves by more than the roundings everywhere, so that the rounding errors are
    independent.
    """
    snapshots = power_functions(even_times(count), sigma_rels)
    targets = power_functions(T, (0.02, 0.07, 0.15, 0.27))
    motion = uneven_motion()
    n = len(snapshots)
    prior = prior_of(snapshots, motion, rounding)
    solver = Problem(snapshots, prior, T)
    of_tails = partial(tail_product, motion=motion)
    products = exact_products([*snapshots, *targets], of_tails)
    matrix = products[:n, :n] + rounding * np.eye(n)
    for number, target in enumerate(targets, start=n):
        right = products[number, :n]
        norm = products[number, number]
        check_minimum(solver, target, matrix, right, norm)


def check_minimum(
    solver: Problem,
    target: PowerFunction,
    matrix: Exact,
    right: Exact,
    norm: Exact,
) -> None:
    """Check that the square of our coefficients is the least one, and the one that we state."""
    best = constrained_solution(matrix, right)
    least = exact_square(matrix, right, norm, best)
    c = solved(solver, target)
    reached = exact_square(matrix, right, norm, c)
    # What float64 leaves of a root: eps of the tails times the coefficients.
    size = float(np.abs(c).sum())
    slack = 1e-13 * size**2
    assert reached - least <= 1e-9 * least + slack * float(norm)
    ours = squared_error(solver, c, target)
    assert reached == pytest.approx(ours, rel=1e-6, abs=slack)
    check_sum(c)


def constrained_solution(matrix: Exact, right: Exact) -> Exact:
    """Return the coefficients of sum 1 that minimise a distance, by a Lagrange multiplier."""
    n = len(right)
    one = flint.arb(1)
    bordered = np.pad(matrix, (0, 1), constant_values=one)
    bordered[n, n] = flint.arb(0)
    solution = exact_solution(bordered, np.append(right, one))
    return solution[:n]


def even_times(count: int, last: float = T) -> FloatArray:
    times = np.linspace(0, last, count + 1)
    return times[1:]


# --- properties of any optimum


def test_copies_between_which_nothing_moved_do_not_cancel():
    """Snapshots at the first update: no motion distinguishes them, and their roundings differ a
    little."""
    snapshots = power_functions((START, 10.0))
    rounding = np.array([1.0e-6, 1.1e-6, 1.0e-6, 1.2e-6])
    norm = np.full(4, 4.0)
    motion = uneven_motion(5.0)
    arithmetic = 1e-9 * rounding
    prior = Prior(motion, rounding, arithmetic, norm, "measured", Steps(STEPS))
    for t, count in ((START, 2), (10.0, 4)):
        target = power(0.1, t)
        known = prior.of(range(count))
        result = reconstruct(snapshots[:count], [target], prior=known)
        assert np.abs(result.coefficients).sum() < 10
        error = NORM * result.predicted_error[0]
        assert error**2 > 0.4e-6


def random_problem(seed: int) -> tuple[list[PowerFunction], Prior, PowerFunction]:
    """Return snapshots, a prior with any walk, noise and rounding, and a target."""
    random = np.random.default_rng(seed)
    count = random.integers(1, 11)
    chosen = random.choice(np.arange(4, 1001), count, replace=False)
    times = np.sort(chosen)
    snapshots = power_functions(times, TRACKED[seed % 4])
    segments = int(random.integers(1, 6))
    edges = np.linspace(START, 1000, segments + 1)
    walk, noise = 10 ** random.uniform(-4, 1, (2, segments))
    if seed % 3 == 0:
        noise = np.zeros(segments)
    motion = Motion(edges, walk, noise)
    rounding = 10 ** random.uniform(-10, -2, len(snapshots))
    prior = prior_of(snapshots, motion, rounding)
    sigma_rel = random.uniform(0.02, 0.288)
    target = power(sigma_rel, float(times[-1]))
    return snapshots, prior, target


TRACKED = [
    (0.05,),
    (0.05, 0.10),
    (0.05, 0.28),
    (0.03, 0.10, 0.28),
]


SEEDS = pytest.mark.parametrize("seed", range(24))


@SEEDS
def test_units_of_time_and_of_weights_change_nothing(seed):
    """A walk has the unit of squares per time, noise that of squares times time."""
    snapshots, prior, target = random_problem(seed)
    before = reconstruct(snapshots, [target], prior=prior)
    random = np.random.default_rng(seed)
    time, weights = 10 ** random.uniform((-3, -6), 6)
    edges = prior.motion.edges * time
    walk = prior.motion.walk * weights / time
    noise = prior.motion.noise * weights * time
    scaled = replace(
        prior,
        motion=Motion(edges, walk, noise),
        rounding=prior.rounding * weights,
        norm=prior.norm * weights,
    )
    *stored, wanted = (PowerFunction(p.gamma, p.t * time) for p in (*snapshots, target))
    after = reconstruct(stored, [wanted], prior=scaled)
    # The floor is eps times the walk, under a root.
    assert_allclose(after.predicted_error, before.predicted_error, rtol=1e-4, atol=1e-7)
    size = np.abs(before.coefficients).sum()
    assert_allclose(after.coefficients, before.coefficients, atol=1e-5 * size)


@SEEDS
def test_a_target_that_is_stored_exactly_is_its_snapshot(seed):
    snapshots, prior, _ = random_problem(seed)
    rounding = prior.rounding.copy()
    rounding[-1] = 0.0
    exact = replace(prior, rounding=rounding, arithmetic=prior.rounding)
    newest = snapshots[-1]
    result = reconstruct(snapshots, [newest], prior=exact)
    *others, last = result.coefficients[:, 0]
    assert last == 1
    assert not any(others)
    assert result.profile_error[0] == 0


@SEEDS
def test_errors_after_losses_are_those_of_solving_without_the_lost(seed):
    """For the next loss of each remaining snapshot, after any number of losses."""
    snapshots, prior, target = random_problem(seed)
    problem = Problem(snapshots, prior, target.t)
    losses = problem.losses([target])
    count = len(snapshots)
    random = np.random.default_rng(seed)
    left = random.permutation(count).tolist()
    each = [[index] for index in range(count)]
    while len(left) > 1:
        (after,) = losses.squares_without(each)
        lost = left.pop()
        others = [snapshots[index] for index in left]
        known = prior.of(left)
        anew = Problem(others, known, target.t)
        c = solved(anew, target)
        error = squared_error(anew, c, target)
        same = pytest.approx(error, rel=1e-3, abs=1e-8)
        assert after[lost] == same
        losses.lose(lost)
        assert losses.squares[0] == same


def test_the_error_is_relative_to_the_norm_of_the_target():
    """For a walk from a place theta0, E |theta|^2 = |theta0|^2 + integral v tail^2 ds.

    All long averages of a long path may be far shorter vectors than a late one.
    """
    snapshots = power_functions(np.linspace(100, T, 10))
    motion = uneven_motion()
    origin = PowerFunction(1e9, START)  # its tail is 0 where anything moves

    def norm(profile):
        moved = expected_square([profile], np.ones(1), origin, motion)
        return 0.5 + moved

    norms = [norm(snapshot) for snapshot in snapshots]
    prior = prior_of(snapshots, motion, 1e-6)
    prior = replace(prior, norm=np.array(norms))
    solver = Problem(snapshots, prior, T)
    targets = power_functions(T, (0.02, 0.05, 0.15, 0.28))
    for target in targets:
        c = solved(solver, target)
        goal = solver.goal(target)
        squares = solver.expected_squares(c, goal)
        relative = solver.relative(squares, c, goal)
        expected = np.sqrt(squares.sum() / norm(target))
        assert relative == pytest.approx(expected, rel=1e-6)


def test_the_error_of_a_target_that_may_be_another_one_is_their_distance():
    snapshots = power_functions((500, T))
    target = snapshots[-1]
    other = power(0.2, T)
    motion = uneven_motion()
    prior = prior_of(snapshots, motion)
    result = reconstruct(snapshots, [target], prior=prior, others={0: other})
    one = np.ones(1)
    apart = expected_square([target], one, other, motion)
    expected = np.sqrt(apart) / NORM
    assert result.predicted_error == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("arithmetic", "expected"),
    [
        (0.0, 0.0),
        (1.0, np.nan),
    ],
)
def test_the_relative_error_of_weights_that_are_all_0_is_0_or_undefined(arithmetic, expected):
    """It is 0 if no error is expected, and otherwise nan, since the norm is 0."""
    snapshots = power_functions([500.0, T])
    target = power(0.1, T)
    still = Motion.even(T, 0.0)
    zeros = np.zeros(4)
    prior = Prior(still, zeros, zeros + arithmetic, zeros, "measured")
    result = reconstruct(snapshots, [target], prior=prior)
    assert_equal(result.predicted_error[0], expected)


def test_a_small_gain_is_not_worth_the_risk_of_a_wrong_motion():
    """The fit is off by factors of ten in some segments; minimum variance alone has 1.09 times the
    published error."""
    times = even_times(10)
    edges = np.append(START, times)
    snapshots = power_functions(times)
    random = np.random.default_rng(202)
    walk = 10 ** random.uniform(-1, 0, 10)
    noise = 300 * 10 ** random.uniform(-1, 0, 10)
    true = Motion(edges, walk, noise)
    walk_off, noise_off = 10.0 ** random.choice([-1, 0, 1], (2, 10))
    fitted = Motion(edges, walk * walk_off, noise * noise_off)
    prior = prior_of(snapshots, fitted)
    target = power(0.1, T)
    squares = []
    for method in METHODS:
        result = reconstruct(snapshots, [target], method, prior)
        c = result.coefficients[:, 0]
        squares.append(expected_square(snapshots, c, target, true))
    ours, paper = squares
    assert ours < 1.06**2 * paper


def test_the_motion_of_two_profiles_is_trusted_though_snapshots_are_few():
    """Where minimum variance has 0.7 of the published error, its coefficients are taken."""
    snapshots = power_functions((250, 500, 750, T))
    motion = even_motion(START, T, 300.0)
    prior = prior_of(snapshots, motion, 1e-6)
    target = power(0.15, T)
    ours = reconstruct(snapshots, [target], "minvar", prior)
    paper = reconstruct(snapshots, [target], "paper", prior)
    assert 0.6 < ours.predicted_error / paper.predicted_error < 0.8
    problem = Problem(snapshots, prior, T)
    (c,) = ours.coefficients.T
    assert_allclose(c, solved(problem, target), rtol=1e-9)


def test_the_worse_motion_explains_distances_the_nearer_coefficients_are_to_published_ones():
    snapshots = power_functions(even_times(20))
    target = power(0.15, T)
    prior = prior_of(snapshots, uneven_motion(), 1e-6)
    paper = reconstruct(snapshots, [target], "paper", prior).coefficients
    apart = []
    for doubt in (0.0, 0.3, 5.0):
        doubted = replace(prior, doubt=doubt)
        result = reconstruct(snapshots, [target], None, doubted)
        difference = result.coefficients - paper
        apart.append(np.abs(difference).sum())
    own, between, published = apart
    assert own > between > 1
    assert published == pytest.approx(0.0, abs=1e-12)


ONE = power_functions((100,), (0.05,))
OF_NEAR_WIDTHS = power_functions((50, 100), (0.1, 0.1 + 1e-14, 0.1000001))
OF_NEAR_TIMES = power_functions((100, np.nextafter(100, 0)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("snapshots", [ONE, OF_NEAR_WIDTHS, OF_NEAR_TIMES])
def test_coefficients_of_one_snapshot_and_of_nearly_equal_ones_are_finite(snapshots, method):
    target = power(0.1, 100.0)
    result = reconstruct(snapshots, [target], method)
    assert np.isfinite(result.coefficients).all()
    assert result.coefficients.sum() == pytest.approx(1)


# --- the published method

LAST = 100_000.0


def uniform_snapshots(count: int) -> list[PowerFunction]:
    times = even_times(count // 2, LAST)
    return power_functions(times, (0.05, 0.10))


def product(a: PowerFunction, b: PowerFunction) -> flint.arb:
    """The inner product of two power functions, from equation 151."""
    early, late = sorted((a, b), key=lambda profile: profile.t)
    g = flint.arb(early.gamma)
    h = flint.arb(late.gamma)
    s = flint.arb(early.t)
    t = flint.arb(late.t)
    common = (s / t) ** h / t
    factor = (g + 1) * (h + 1) / (g + h + 1)
    return factor * common


@pytest.mark.parametrize(
    ("count", "sigma_rels"),
    [
        (8, (0.01, 0.05, 0.07, 0.15, 0.20, 0.28)),
        (128, (0.07, 0.28)),
    ],
)
def test_agrees_with_sixty_digits(count, sigma_rels):
    snapshots = uniform_snapshots(count)
    targets = power_functions(LAST, sigma_rels)
    ours = reconstruct(snapshots, targets, "paper")
    products = exact_products([*snapshots, *targets], product)
    matrix = products[:count, :count]
    for k, row in enumerate(products[count:]):
        norm = row[count + k]
        right = row[:count] / norm
        relative = matrix / norm
        solution = exact_solution(relative, right)
        best = solution / solution.sum()
        gap = ours.coefficients[:, k] - best
        apart = exact_square(relative, 0 * right, 0, gap)
        assert apart <= 1e-9**2
        square = exact_square(relative, right, 1, best)
        error = max(square, 0) ** 0.5
        assert ours.profile_error[k] == pytest.approx(error, rel=1e-5, abs=1e-7)


AT_LAST = power(0.15, LAST)
LATER = power(0.15, 1.05 * LAST)


@pytest.mark.parametrize("target", [AT_LAST, LATER])
def test_the_stated_error_is_the_distance_of_the_profiles(target):
    """The mass of the target after the last snapshot included, which no coefficients reach."""
    snapshots = uniform_snapshots(8)
    result = reconstruct(snapshots, [target], "paper")
    edges = np.array([0.0, target.t])
    one = np.ones(1)
    even = Motion(edges, walk=0 * one, noise=one)
    (c,) = result.coefficients.T
    square = expected_square(snapshots, c, target, even, 0.0)
    norm = expected_square([target], 0 * one, target, even, 0.0)
    distance = (square / norm) ** 0.5
    assert result.profile_error[0] == pytest.approx(distance, rel=1e-6)


def test_a_target_with_no_mass_within_reach_is_refused():
    """All of a very short average lies after the last snapshot: all combinations are equally
    far."""
    snapshots = power_functions(1000.0)
    late = power_functions(1999.0, (0.0005,))
    with refused("target", "none of its mass"):
        reconstruct(snapshots, late, "paper")


def test_a_target_at_one_time_is_as_far_as_its_own_norm_from_any_density():
    result = reconstruct(power_functions(1000.0), [Point(1000.0)])
    assert result.profile_error[0] == 1.0
    assert np.isfinite(result.predicted_error).all()


# --- reconstructions from checkpoints, other libraries' averages, and these together with power
# functions


def even_prior(count: int, t: float, noise: float = 0.0) -> Prior:
    zeros = np.zeros(count)
    motion = even_motion(1.0, t, noise)
    steps = Steps(STEPS)
    return Prior(motion, zeros, zeros, zeros + 1, "measured", steps)


def test_a_known_motion_has_the_exact_expectation():
    """For a walk with noise, by sums over steps."""
    stored = [
        Point(500.0),
        Point(990.0),
        PowerFunction(5.0, 800.0),
    ]
    for t in (300, 600, 1000):
        stored.append(ema_pytorch_profile(2.0, t, 25))
        stored.append(ema_pytorch_profile(7.0, t, 25))
    count = len(stored)
    target = PowerFunction(9.0, T)
    random = np.random.default_rng(0)
    c = random.dirichlet(np.ones(count))
    prior = even_prior(count, T, 15.0)
    solver = Problem(stored, prior, T)
    error = squared_error(solver, c, target)
    steps = np.arange(1001)
    tails = [profile.tail(steps) for profile in stored]
    missed = c @ tails - target.tail(steps)
    of_walk = np.sum(missed[1:] ** 2)
    of_noise = 15.0 * np.sum(np.diff(missed) ** 2)
    assert error == pytest.approx(of_walk + of_noise, rel=0.03)


PASSED = np.arange(200) / 200


@pytest.mark.parametrize(
    ("shape", "multipliers"),
    [
        ("linear", 1 - PASSED),
        ("1-sqrt", 1 - np.sqrt(PASSED)),
        ("cosine", (1 + np.cos(np.pi * PASSED)) / 2),
    ],
)
def test_a_decay_of_dense_checkpoints_is_the_closed_form(shape, multipliers):
    """theta(start) + the later increments times their multipliers, as a scheduler counts: that of
    the first step of the decay is 1.

    By WSM the sums of the later coefficients are the multipliers.
    """
    stored = [Point(float(t)) for t in range(380, 601)]
    decay = Decay(shape, (400, 600))
    target = decay.profile(600, STEPS, 1.0)
    prior = even_prior(len(stored), 600.0)
    result = reconstruct(stored, [target], None, prior, 600.0)
    (c,) = result.coefficients.T
    sums = np.cumsum(c[::-1])[::-1]
    assert sums[:21] == pytest.approx(1, abs=1e-9)
    assert sums[21:] == pytest.approx(multipliers, abs=1e-9)
    assert result.predicted_error[0] < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_given_coefficients_are_not_changed(method):
    wanted = np.array([0.5, 0.0, -0.25, 0.75])
    stored = [Point(t) for t in (1000, 2000, 3000, 4000)]
    targets = [power(0.1, 4000), wanted]
    prior = even_prior(4, 4000.0)
    result = reconstruct(stored, targets, method, prior, 4000.0)
    _, found = result.coefficients.T
    assert_array_equal(found, wanted)
    assert result.predicted_error[1] == 0
    assert result.profile_error[1] == 0
