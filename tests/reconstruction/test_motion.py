"""The fitted motion: from distances that are exact by construction, from simulated paths, and from
too little."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from factories import power_functions, solved, squared_error
from numpy.testing import assert_allclose
from reconstruction.quadrature import expected_square

from posthoc_cli import PowerFunction, reconstruct
from posthoc_cli.decay_rules import DecayRule
from posthoc_cli.reconstruction import (
    Distance,
    Measurements,
    Motion,
    Prior,
    Problem,
    Sketch,
    StoredAverage,
    measured_prior,
)
from posthoc_cli.reconstruction.motion import (
    ASSUMED_STRETCH,
    fit_motion,
    sampling_errors,
    with_floor,
)
from posthoc_cli.reconstruction.solving import rounding_factor

power = PowerFunction.from_sigma_rel
START = 2.0
TIMES = np.arange(100.0, 1001, 100)
EDGES = np.append(START, TIMES)


def distance(p, q, motion):
    """The distance of two averages, the later one first."""
    squared = expected_square([p], np.ones(1), q, motion, q.t)
    return (p, Distance(q, squared, 0.0))


def neighbours(times, motion, sigma_rels=(0.05, 0.28)):
    """The distances that a tracker measures: between the profiles of one time, and to the two
    previous times."""
    distances = []
    for index, t in enumerate(times):
        earlier = times[max(index - 2, 0) : index]
        others = power_functions(earlier, sigma_rels)
        for profile in power_functions(t, sigma_rels):
            distances += [distance(profile, other, motion) for other in others]
            others.append(profile)
    return distances


def test_a_walk_is_recovered():
    """Wherever later averages contain the segment too, which the last one lacks."""
    slower = np.where(TIMES <= 500, 1.0, 0.1)
    motion = Motion(EDGES, walk=slower, noise=0 * slower)
    distances = neighbours(TIMES, motion)
    fitted, _ = fit_motion(START, TIMES, distances)
    assert set(EDGES) <= set(fitted.edges)
    walk, noise = fitted.on(EDGES)
    assert_allclose(walk[2:5], 1.0, rtol=0.1)
    assert_allclose(walk[5:-1], 0.1, rtol=0.2)
    of_walk = 100**2 * 0.1
    assert noise[2:-1].max() < 0.05 * of_walk


@pytest.mark.parametrize(
    "sigma_rels",
    [
        (0.05, 0.28),
        (0.1,),
    ],
)
def test_noise_is_distinguished_from_a_walk(sigma_rels):
    ones = np.ones(10)
    motion = Motion(EDGES, walk=1e-6 * ones, noise=ones)
    distances = neighbours(TIMES, motion, sigma_rels)
    fitted, _ = fit_motion(START, TIMES, distances)
    walk, noise = fitted.on(EDGES)
    assert_allclose(noise[3:-1], 1.0, rtol=0.1)
    of_walk = walk[3:-1].max() * 100**2
    assert of_walk < 0.1


def test_too_large_and_too_small_fits_cost_the_same():
    """One pair, measured as 1, 1 and 8. The sum of the residuals (x - s_i)^2 / (x s_i) is least
    where x^2 = sum_i s_i / sum_i (1 / s_i): between the harmonic mean and the mean.
    """
    p, q = power_functions(100.0)
    pairs = []
    for squared in (1.0, 8.0, 1.0):
        pairs.append((p, Distance(q, squared, 0.0)))
    fitted, _ = fit_motion(START, [100.0], pairs)
    _, expected = distance(p, q, fitted)
    best = (10 / (1 + 1 + 1 / 8)) ** 0.5
    assert expected.squared == pytest.approx(best, rel=1e-4)


COLLAPSED = np.array([1.0, 1.0, 1e-12, 1.0, 1.0])


def test_a_fitted_walk_that_collapses_is_raised_to_a_share_of_its_neighbours():
    """It cost nothing where a fit left it at 0: errors were 60 times the predicted."""
    each = np.eye(5)
    of_two = (each[:4] + each[1:]) / 2
    raised = with_floor(COLLAPSED, of_two, np.zeros(4))
    assert_allclose(raised, [1, 1, 0.3, 1, 1])


@pytest.mark.parametrize(
    ("fitted", "raised"),
    [
        (COLLAPSED, [1, 1, 0.01, 1, 1]),
        (np.array([4.0, 2.0, 1.0, 0.03, 1e-64]), [4, 2, 1, 0.03, 3e-4]),
        (np.array([1e-64, 1e-64, 1.0]), [1e-4, 1e-2, 1]),
        (np.zeros(3), [0, 0, 0]),
    ],
)
def test_of_a_standstill_that_a_distance_shows_a_hundredth_of_the_next_walk_is_left(fitted, raised):
    """Weights that come back show one: where nothing was left, an error of 7 % was predicted as
    0.0001 %."""
    shown = np.diag(1 / np.maximum(fitted, 1e-200))
    assert_allclose(with_floor(fitted, shown, np.zeros(fitted.size)), raised, rtol=1.5)


def test_the_errors_of_sampled_values_are_those_of_each_update():
    """Also where a profile joins updates, since there are many."""
    profile = DecayRule(0.9999).profile(400_000, 40_000, 10)
    edges = np.array([1.0, 400_000.0])
    one = np.ones(1)
    motion = Motion(edges, one, 0 * one, sampling=3 * one)
    (root,) = sampling_errors([profile], motion).T
    updates = np.arange(0, 400_001, 10.0)
    masses = np.diff(profile.tail(updates))
    expected = 3 * masses @ masses
    assert root @ root == pytest.approx(expected, rel=1e-3)


# --- the prior from headers
# ------------------------------------------------------------------------


def average(t, sigma_rel, norm, *distances):
    profile = power(sigma_rel, t)
    measurements = Measurements(norm, 0.0, distances)
    return StoredAverage(
        profile,
        2.0**-23,
        measurements,
    )


def pair_at_10(squared, norm):
    """Two averages at time 10 that agree on the squared distance between them."""
    short = Distance(power(0.05, 10.0), squared, 0.0)
    long = Distance(power(0.25, 10.0), squared, 0.0)
    first = average(10.0, 0.05, norm, long)
    second = average(10.0, 0.25, norm, short)
    return [first, second]


ALONE = average(10.0, 0.1, 4.0)


def test_distances_of_0_show_that_nothing_moved():
    prior = measured_prior(pair_at_10(0.0, norm=4.0))
    assert prior.evidence == "measured"
    assert prior.motion.walk[-1] < prior.floor.max()


def test_weights_of_0_do_not_move():
    prior = measured_prior(pair_at_10(0.0, norm=0.0))
    assert prior.evidence == "measured"
    assert prior.motion.walk.sum() == 0


def test_a_run_with_an_unmeasured_average_has_an_assumed_prior():
    unmeasured = replace(ALONE, measurements=None)
    measured = pair_at_10(0.5, norm=4.0)
    prior = measured_prior([unmeasured, *measured])
    assert prior.evidence == "assumed"


def test_the_distance_of_two_averages_of_one_profile_shows_no_motion():
    """Of one of 0.1 at 20 to itself, up to rounding: the path has an assumed length."""
    same = power(0.1 * (1 + 1e-9), 20.0)
    later = average(20.0, 0.1, 8.0, Distance(same, 5.0, 0.0))
    prior = measured_prior([ALONE, later])
    assert prior.evidence == "assumed"
    times = np.diff(prior.motion.edges)
    walked = prior.motion.walk @ times
    assert walked == pytest.approx(ASSUMED_STRETCH**2 * 6.0)


# --- correlated rounding errors of stored copies, against values that are really rounded


@pytest.mark.parametrize("spacings", [0.0, 0.3, 3.0])
def test_the_correlation_is_that_of_values_that_move(spacings):
    """Displacements are Gaussian, in units of the spacing; 200,000 elements of one binade are
    rounded to float16."""
    generator = np.random.default_rng(0)
    spacing = 2.0**-10
    values = generator.uniform(1.1, 1.9, 200_000)
    displacement = spacings * spacing * generator.normal(size=values.size)
    both = np.stack((values, values + displacement))
    errors = both.astype(np.float16) - both
    measured = errors @ errors.T
    squared = displacement @ displacement
    apart = squared * (1 - np.eye(2))
    factor = rounding_factor(np.diag(measured), np.zeros(2), apart)
    # Sums of products of 200,000 errors scatter by about 1 / sqrt(200,000); the correlation is
    # limited to 0.99.
    scatter = 0.025 * measured[0, 0]
    assert_allclose(factor.T @ factor, measured, atol=scatter)


# --- errors measured by a sketch of the weights' path, against averages that the tests sum in
# float64

T = 600
SIZE = 40


def averages(path, profiles):
    """Return averages of the weights after each step: shape [profiles, SIZE]."""
    steps = np.arange(T + 1)
    rows = []
    for profile in profiles:
        passed = np.minimum(steps / profile.t, 1.0)
        until = passed ** (profile.gamma + 1)
        rows.append(np.diff(until))
    return np.array(rows) @ path


def sketch_of(path, length):
    """Return windows as the hook makes them: the first step alone, then `length` steps each;
    without projection."""
    whole = range(1 + length, T, length)
    ends = np.unique([1, *whole, T])
    windows = np.split(path, ends[:-1])
    return windows_of(np.append(1.0, ends), windows)


def windows_of(edges, windows):
    """Return the sketch of windows of folds, without projection."""
    folds = np.array([len(window) for window in windows], dtype=float)
    means = np.array([window.mean(axis=0) for window in windows])
    variances = np.array([window.var(axis=0) for window in windows])
    return Sketch(edges, folds, means, variances.sum(axis=1))


RATE = 0.02**2 * SIZE
"""The expected square of a step of `walk`."""


def walk():
    random = np.random.default_rng(2)
    steps = 0.02 * random.standard_normal((T, SIZE))
    return 1 + np.cumsum(steps, axis=0)


SNAPSHOTS = power_functions(range(30, T + 1, 30))
TARGETS = power_functions(T, (0.03, 0.08, 0.15, 0.28))


def prior_of(path, length, walk, rounding):
    """Return the prior of snapshots whose motion by their distances is `walk`; `rounding` is
    relative to squares."""
    stored = averages(path, SNAPSHOTS)
    norm = np.sum(stored**2, axis=1)
    edges = np.array([1.0, T])
    one = np.ones(1)
    motion = Motion(edges, walk=walk * one, noise=0 * one)
    sketch = sketch_of(path, length)
    return Prior(
        motion,
        rounding * norm,
        0 * norm,
        norm,
        "measured",
        sketch=sketch,
    )


def test_the_error_of_single_updates_is_measured_exactly():
    path = walk()
    sketch = sketch_of(path, 1)
    profiles = [*SNAPSHOTS[:3], TARGETS[0]]
    seen, unseen = sketch.measure(profiles)
    exact = averages(path, profiles) - path[0]
    # The mass of power functions before the first update lies on that update, as in these sums.
    assert_allclose(seen.T, exact, atol=1e-12)
    assert not unseen.any()


def test_the_walk_across_a_window_is_that_of_its_steps():
    sketch = sketch_of(walk(), 20)
    assert_allclose(sketch.walk_length(sketch.edges), 20 * RATE, rtol=0.5)


@pytest.mark.parametrize("kind", ["noise", "walk"])
def test_what_windows_do_not_show_is_as_large_as_predicted(kind):
    """Of an average that is shorter than a window."""
    random = np.random.default_rng(2)
    path = random.standard_normal((T, SIZE))
    if kind == "walk":
        path = np.cumsum(path, axis=0)
    short = power_functions(T, (0.01,))
    seen, unseen = sketch_of(path, 20).measure(short)
    moved = averages(path, short) - path[0]
    missed = moved[0] - seen[:, 0]
    predicted = np.sum(unseen**2)
    assert 0.3 < missed @ missed / predicted < 1.5


def assert_least(square, c):
    """Assert that a step in any direction raises a square alike on both sides."""
    least = square(c)
    random = np.random.default_rng(0)
    for direction in random.standard_normal((5, c.size)):
        step = direction - direction.mean()
        step *= np.linalg.norm(c) / np.linalg.norm(step)
        up = square(c + step) - least
        down = square(c - step) - least
        assert abs(up - down) < 1e-4 * (up + down)


def test_the_expected_square_is_minimised():
    prior = replace(prior_of(walk(), 20, RATE, 1e-4), sketch=None)
    problem = Problem(SNAPSHOTS, prior, T)
    square = partial(squared_error, problem, target=TARGETS[1])
    assert_least(square, solved(problem, TARGETS[1]))


def test_the_mean_of_expected_and_measured_squares_is_minimised():
    prior = prior_of(walk(), 20, RATE, 1e-4)
    target = TARGETS[1]
    without_sketch = replace(prior, sketch=None)
    expected = Problem(SNAPSHOTS, without_sketch, T)
    rhs = expected.right_hand_side(target)
    rows = np.vstack(prior.sketch.measure([*SNAPSHOTS, target]))

    def square(c):
        motion, _ = expected.expected_squares(c, rhs)
        missed = rows @ np.append(c, -1)
        measured = missed @ missed
        return (motion + measured) / 2 + c**2 @ prior.rounding

    problem = Problem(SNAPSHOTS, prior, T)
    assert_least(square, solved(problem, target))


def test_copies_are_rounded_alike_where_the_path_stands_still_whatever_the_distances_show():
    """No combination is nearer than one copy, while independent errors would average out."""
    random = np.random.default_rng(3)
    weights = random.standard_normal(SIZE)
    path = np.tile(weights, (T, 1))
    exact = averages(path, SNAPSHOTS)
    errors = exact.astype(np.float16) - exact
    norm = float(weights @ weights)
    rounding = np.sum(errors**2, axis=1) / norm
    prior = prior_of(path, 2, norm / T, rounding)
    result = reconstruct(SNAPSHOTS, TARGETS, None, prior, T)
    one_copy = np.sqrt(rounding[0])
    assert_allclose(result.predicted_error, one_copy, rtol=0.05)


@pytest.mark.parametrize(
    ("rounding", "stays"),
    [
        (1e-8, True),
        (1e-3, False),
    ],
)
def test_the_published_coefficients_stay_where_others_are_hardly_better(rounding, stays):
    """The target is a stored profile; its only error is rounding, which others could lower by a few
    hundredths."""
    prior = prior_of(walk(), 1, RATE, rounding)
    stored = TARGETS[-1]
    result = reconstruct(SNAPSHOTS, [stored], None, prior, T)
    is_alone = np.count_nonzero(result.coefficients) == 1
    assert is_alone == stays


def test_a_long_run_has_a_finite_floor():
    fitted = np.zeros(600)
    fitted[300] = 1.0
    floored = with_floor(fitted, np.diag(1 / np.maximum(fitted, 1e-200)), np.zeros(600))
    assert_allclose(floored[298:303], [1e-4, 1e-2, 1, 1e-2, 1e-4])
    assert np.isfinite(floored).all()
    assert floored[0] == 0
