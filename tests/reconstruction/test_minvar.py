"""Minimum variance against quadrature and sums over steps, and the published method against 60
digits."""

from dataclasses import replace

import flint
import numpy as np
import pytest
from checking import refused
from factories import power_functions, solved, squared_error
from numpy.testing import assert_array_equal, assert_equal
from reconstruction.quadrature import expected_square

from posthoc_cli import Beta, Decay, PowerFunction, Window, reconstruct
from posthoc_cli.decay_rules import ema_pytorch_profile
from posthoc_cli.profiles import Point
from posthoc_cli.reconstruction import METHODS, Motion, Prior, Problem, Steps
from posthoc_cli.run_clock import Clock

T = 1000.0
START = 3.0

power = PowerFunction.from_sigma_rel
STEPS = Clock((1.0,), (1.0,))


def uneven_motion(noise=0.0):
    """Return a walk that slows down a thousandfold, and noise that grows."""
    edges = np.array([START, 100.0, 400.0, 700.0, T])
    walk = np.array([1.0, 0.1, 0.3, 0.001])
    growing = np.array([1.0, 2.0, 3.0, 4.0])
    return Motion(edges, walk, noise * growing)


def prior_of(snapshots, motion, rounding=0.0, steps=None):
    zeros = np.zeros(len(snapshots))
    return Prior(
        motion,
        zeros + rounding,
        zeros,
        zeros + 1,
        "measured",
        steps,
    )


ORIGIN = PowerFunction(1e9, START)
"""An average of the first weights, before anything moves."""


def norm_of(profile, motion, kink=T):
    """E |theta|^2 for a path that begins at a place whose norm is 1/2."""
    moved = expected_square([profile], np.ones(1), ORIGIN, motion, kink)
    return 0.25 + moved


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
    """Relative to the norm of the target, from snapshots at its time, and from earlier ones, which
    miss the motion since then."""
    snapshots = power_functions((250, 500, 800, last))
    motion = uneven_motion(noise)
    rounding = np.linspace(0, 1e-3, 8)
    norms = [norm_of(snapshot, motion) for snapshot in snapshots]
    prior = prior_of(snapshots, motion, rounding)
    prior = replace(prior, norm=np.array(norms))
    result = reconstruct(snapshots, [target], prior=prior, t=T)
    c = result.coefficients[:, 0]
    moved = expected_square(snapshots, c, target, motion, kink)
    exact = moved + c**2 @ rounding
    norm = norm_of(target, motion, kink)
    (predicted,) = result.predicted_error
    square = norm * predicted**2
    assert square == pytest.approx(exact, rel=1e-6)
    assert c.sum() == pytest.approx(1, abs=1e-12)


# --- properties of any optimum


def even_times(count, last=T):
    times = np.linspace(0, last, count + 1)
    return times[1:]


def test_copies_between_which_nothing_moved_do_not_cancel():
    """Snapshots at the first update: no motion distinguishes them, and their roundings differ a
    little."""
    snapshots = power_functions((START, 10.0))
    rounding = np.array([1.0e-6, 1.1e-6, 1.0e-6, 1.2e-6])
    prior = prior_of(snapshots, uneven_motion(5.0), rounding, Steps(STEPS))
    for t, count in ((START, 2), (10.0, 4)):
        known = prior.subset(range(count))
        target = power(0.1, t)
        result = reconstruct(snapshots[:count], [target], prior=known)
        assert np.abs(result.coefficients).sum() < 10
        assert result.predicted_error[0] ** 2 > 0.4e-6


def test_a_target_that_is_stored_exactly_is_its_snapshot():
    snapshots = power_functions((250, 500, T))
    prior = prior_of(snapshots, uneven_motion(5.0), 1e-6)
    prior.rounding[-1] = 0.0
    result = reconstruct(snapshots, snapshots[-1:], prior=prior)
    (c,) = result.coefficients.T
    assert c.tolist() == [0, 0, 0, 0, 0, 1]
    assert result.profile_error[0] == 0


def test_errors_after_losses_are_those_of_solving_without_the_lost():
    snapshots = power_functions(even_times(8))
    rounding = np.geomspace(1e-8, 1e-4, 16)
    prior = prior_of(snapshots, uneven_motion(5.0), rounding)
    target = power(0.15, T)
    eliminator = Problem(snapshots, prior, T).eliminator([target])
    left = np.random.default_rng(0).permutation(16).tolist()
    while len(left) > 1:
        lost = left.pop()
        ((expected,),) = eliminator.squares_without([[lost]])
        eliminator.drop(lost)
        others = [snapshots[index] for index in left]
        anew = Problem(others, prior.subset(left), T)
        c = solved(anew, target)
        error = squared_error(anew, c, target)
        same = pytest.approx(error, rel=1e-3)
        assert expected == same
        assert eliminator.squares[0] == same


@pytest.mark.parametrize(
    ("floor", "expected"),
    [
        (0.0, 0.0),
        (1.0, np.nan),
    ],
)
def test_the_relative_error_of_weights_that_are_all_0_is_0_or_undefined(floor, expected):
    """It is 0 if no error is expected, and otherwise nan, since the norm is 0."""
    zeros = np.zeros(4)
    still = Motion.even(T, 0.0)
    prior = Prior(
        still,
        zeros,
        zeros + floor,
        zeros,
        "measured",
    )
    snapshots = power_functions([500.0, T])
    target = power(0.1, T)
    result = reconstruct(snapshots, [target], prior=prior)
    assert_equal(result.predicted_error[0], expected)


def test_the_worse_motion_explains_distances_the_nearer_coefficients_are_to_published_ones():
    snapshots = power_functions(even_times(20))
    target = power(0.15, T)
    prior = prior_of(snapshots, uneven_motion(), 1e-6)
    paper = reconstruct(snapshots, [target], "paper", prior).coefficients
    apart = []
    for misfit in (0.0, 0.3, 5.0):
        misfitting = replace(prior, misfit=misfit)
        result = reconstruct(snapshots, [target], None, misfitting)
        difference = result.coefficients - paper
        apart.append(np.abs(difference).sum())
    own, between, published = apart
    assert own > between > 1
    assert published == pytest.approx(0.0, abs=1e-12)


OF_NEAR_WIDTHS = power_functions(
    (50, 100),
    (0.1, 0.1 + 1e-14, 0.1000001),
)
OF_NEAR_TIMES = power_functions((100, np.nextafter(100, 0)))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("snapshots", [OF_NEAR_WIDTHS, OF_NEAR_TIMES])
def test_coefficients_of_nearly_equal_snapshots_are_finite(snapshots, method):
    target = power(0.1, 100.0)
    result = reconstruct(snapshots, [target], method)
    assert np.isfinite(result.coefficients).all()
    assert result.coefficients.sum() == pytest.approx(1)


# --- the published method

LAST = 100_000.0


def uniform_snapshots(count):
    times = even_times(count // 2, LAST)
    return power_functions(times, (0.05, 0.10))


def product(a, b):
    """The inner product of two power functions, from equation 151."""
    early, late = sorted((a, b), key=lambda profile: profile.t)
    g = flint.arb(early.gamma)
    h = flint.arb(late.gamma)
    s = flint.arb(early.t)
    t = flint.arb(late.t)
    common = (s / t) ** h / t
    both = (g + 1) * (h + 1)
    factor = both / (g + h + 1)
    return factor * common


def exact_solution(matrix, right):
    n = len(right)
    left = flint.arb_mat(n, n, matrix.ravel().tolist())
    column = flint.arb_mat(n, 1, right.tolist())
    solution = left.solve(column)
    return np.array(solution.entries())


def exact_square(matrix, right, norm, c):
    """Return the squared distance of combined averages from a target."""
    square = c @ matrix @ c
    mixed = c @ right
    return float(square - 2 * mixed + norm)


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
    flint.ctx.dps = 60
    profiles = np.array([*snapshots, *targets])
    products = np.frompyfunc(product, 2, 1).outer(profiles, profiles)
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


@pytest.mark.parametrize(("sigma_rel", "end"), [(0.15, 1.05), (0.15, 0.97), (0.002, 1)])
def test_the_stated_error_is_the_distance_of_the_profiles(sigma_rel, end):
    """The mass of the target after the last snapshot included, which no coefficients reach, and
    the part of a short one that no polynomial does."""
    snapshots = uniform_snapshots(8)
    target = power(sigma_rel, end * LAST)
    t = max(target.t, LAST)
    result = reconstruct(snapshots, [target], "paper", t=t)
    even = Motion(
        np.array([0.0, t]),
        walk=np.zeros(1),
        noise=np.ones(1),
    )
    (c,) = result.coefficients.T
    square = expected_square(snapshots, c, target, even, target.t)
    norm = expected_square([target], np.zeros(1), target, even, target.t)
    distance = (square / norm) ** 0.5
    assert result.profile_error[0] == pytest.approx(distance, rel=1e-5)


def test_a_target_with_no_mass_within_reach_is_refused():
    """All of a very short average lies after the last snapshot: all combinations are equally
    far."""
    snapshots = power_functions(1000.0)
    late = power_functions(1999.0, (0.0005,))
    with refused("target"):
        reconstruct(snapshots, late, "paper")


def test_a_target_at_one_time_is_as_far_as_its_own_norm_from_any_density():
    result = reconstruct(power_functions(1000.0), [Point(1000.0)])
    assert result.profile_error[0] == 1.0
    assert np.isfinite(result.predicted_error).all()


# --- reconstructions from checkpoints, other libraries' averages, and these together with power
# functions


def even_prior(count, t, noise=0.0):
    edges = np.array([1.0, t])
    one = np.ones(1)
    motion = Motion(edges, walk=one, noise=noise * one)
    return prior_of(range(count), motion, steps=Steps(STEPS))


def test_a_known_motion_has_the_exact_expectation():
    """For a walk with noise, by sums over steps."""
    stored = [
        Point(510.0),
        Point(990.0),
        PowerFunction(5.0, 800.0),
        ema_pytorch_profile(2.0, 300, 25),
        ema_pytorch_profile(2.0, 1000, 25),
        ema_pytorch_profile(7.0, 1000, 25),
    ]
    target = PowerFunction(9.0, T)
    c = np.random.default_rng(0).dirichlet(np.ones(6))
    solver = Problem(stored, even_prior(6, T, 150.0), T)
    error = squared_error(solver, c, target)
    steps = np.arange(1001)
    tails = [profile.tail(steps) for profile in stored]
    missed = c @ tails - target.tail(steps)
    of_walk = np.sum(missed[1:] ** 2)
    of_noise = 150.0 * np.sum(np.diff(missed) ** 2)
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
    decay = Decay(shape, 1 / 3)  # from 400 on
    target = decay.profile(600, STEPS, 1.0)
    prior = even_prior(len(stored), 600.0)
    result = reconstruct(stored, [target], None, prior, 600.0)
    (c,) = result.coefficients.T
    sums = np.cumsum(c[::-1])[::-1]
    assert sums[:21] == pytest.approx(1, abs=1e-9)
    assert sums[21:] == pytest.approx(multipliers, abs=1e-9)
    assert result.predicted_error[0] < 1e-6


def test_given_coefficients_are_not_changed():
    wanted = np.array([0.5, 0.0, -0.25, 0.75])
    stored = [Point(t) for t in (1000, 2000, 3000, 4000)]
    prior = even_prior(4, 4000.0)
    result = reconstruct(
        stored,
        [power(0.1, 4000), wanted],
        None,
        prior,
        4000.0,
    )
    assert_array_equal(result.coefficients[:, 1], wanted)
    assert result.predicted_error[1] == 0
    assert result.profile_error[1] == 0
