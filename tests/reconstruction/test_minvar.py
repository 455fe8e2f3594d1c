"""Minimum variance: closed forms against quadrature, the solver against 60 digits, and properties
of any optimum."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import flint
import numpy as np
import pytest
from checking import refused
from factories import FloatArray, Span, power_functions, solved, squared_error
from hypothesis import given, settings
from hypothesis import strategies as st
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


def even_motion(start: float, end: float, walk: float = 1.0, noise: float = 0.0) -> Motion:
    return Motion(np.array([start, end]), np.array([walk]), np.array([noise]))


def prior_of(
    snapshots: list[PowerFunction], motion: Motion, rounding: Any = 0.0, steps: Steps | None = None
) -> Prior:
    ones = np.ones(len(snapshots))
    return Prior(motion, rounding * ones, 0 * ones, NORM**2 * ones, "measured", steps)


def expected_square(
    snapshots: list[PowerFunction],
    coefficients: Any,
    target: Profile,
    motion: Motion,
    rounding: Any,
    *kinks: float,
) -> float:
    """The defining integral, by adaptive quadrature between all kinks."""
    points = sorted({*motion.edges, *(p.t for p in snapshots), *kinks})

    def value(profile: Profile, name: str, s: float) -> float:
        if name == "density" and not isinstance(profile, PowerFunction):
            return float(profile.tail(s - 1e-4) - profile.tail(s + 1e-4)) / 2e-4
        return float(getattr(profile, name)(s))

    def miss(s: float, name: str) -> float:
        made = sum(c * value(p, name, s) for c, p in zip(coefficients, snapshots, strict=True))
        return (made - value(target, name, s)) ** 2

    total = float(np.sum(np.asarray(coefficients) ** 2 * rounding))
    for a, b in pairwise(points):
        segment = int(np.searchsorted(motion.edges, (a + b) / 2, side="right")) - 1
        for weight, name in ((motion.walk[segment], "tail"), (motion.noise[segment], "density")):
            if weight:
                total += (
                    weight
                    * integrate.quad(miss, a, b, (name,), epsabs=1e-14, epsrel=1e-10, limit=200)[0]
                )
    return total


@pytest.mark.parametrize(
    ("target", "kinks"),
    [
        (power(0.1, T), ()),
        (Beta(0.99).profile(T, STEPS, START), ()),
        (Beta(0.5).profile(T, STEPS, START), ()),
        (Window(150).profile(T, STEPS, START), (850.0,)),
        (Span(200, 620), (200.0, 620.0)),
    ],
    ids=["power", "beta 0.99", "beta 0.5", "window", "span"],
)
@pytest.mark.parametrize(("noise", "last"), [(0.0, T), (5.0, T), (5.0, 900)])
def test_the_expected_error_is_the_integral(
    target: Profile, kinks: tuple[float, ...], noise: float, last: float
) -> None:
    """From snapshots at the time of the target, and from earlier ones, which miss the motion since
    then."""
    snapshots = power_functions((250, 500, 800, last))
    motion = uneven_motion(noise)
    rounding = np.linspace(0, 1e-3, 8)
    result = reconstruct(snapshots, [target], prior=prior_of(snapshots, motion, rounding), t=T)
    c = result.coefficients[:, 0]
    exact = expected_square(snapshots, c, target, motion, rounding, *kinks)
    assert (NORM * result.predicted_error[0]) ** 2 == pytest.approx(exact, rel=1e-6)
    assert c.sum() == pytest.approx(1, abs=1e-14 * np.abs(c).sum())


# --- the optimum
# -----------------------------------------------------------------------------------


def tail_product(p: PowerFunction, q: PowerFunction, motion: Motion) -> flint.arb:
    """The integral of v tail_p tail_q, term by term."""
    x, y, s, t = (flint.arb(number) for number in (p.gamma + 1, q.gamma + 1, p.t, q.t))
    total = flint.arb(0)
    for (start, end), v in zip(pairwise(motion.edges.tolist()), motion.walk.tolist(), strict=True):
        a, b = (flint.arb(min(edge, p.t, q.t)) for edge in (start, end))

        def moment(z: flint.arb, a: flint.arb = a, b: flint.arb = b) -> flint.arb:
            return (b ** (z + 1) - a ** (z + 1)) / (z + 1)

        total += v * (b - a - moment(x) / s**x - moment(y) / t**y + moment(x + y) / (s**x * t**y))
    return total


@pytest.mark.parametrize(
    ("count", "sigma_rels", "rounding"),
    [
        (4, (0.05, 0.28), 1e-5),
        (4, (0.05, 0.28), 1e-12),
        (16, (0.05, 0.10), 1e-12),
        (32, (0.1,), 1e-12),
    ],
)
def test_the_minimum_is_that_of_sixty_digits(
    count: int, sigma_rels: tuple[float, ...], rounding: float
) -> None:
    """The minima agree; coefficients of nearly equal snapshots may differ where the average does
    not.

    The network moves by more than the roundings everywhere, so that the rounding errors are
    independent.
    """
    flint.ctx.dps = 60
    snapshots = power_functions(np.linspace(0, T, count + 1)[1:], sigma_rels)
    motion = uneven_motion()
    n = len(snapshots)
    solver = Problem(snapshots, prior_of(snapshots, motion, rounding), T)
    products = [[tail_product(p, q, motion) for q in snapshots] for p in snapshots]
    matrix = flint.arb_mat(
        n, n, [products[i][j] + rounding * (i == j) for i in range(n) for j in range(n)]
    )
    constrained = [[matrix[i, j] for j in range(n)] + [flint.arb(1)] for i in range(n)] + [
        [flint.arb(1)] * n + [0]
    ]
    for target in power_functions(T, (0.02, 0.07, 0.15, 0.27)):
        right = flint.arb_mat(n, 1, [tail_product(p, target, motion) for p in snapshots])
        norm = tail_product(target, target, motion)

        def square(x: flint.arb_mat, right: flint.arb_mat = right, norm: flint.arb = norm) -> float:
            return float(((x.transpose() * (matrix * x - 2 * right))[0, 0] + norm).mid())

        exact = flint.arb_mat(constrained).solve(
            flint.arb_mat(n + 1, 1, [*right.entries(), flint.arb(1)])
        )
        c = solved(solver, target)
        least, reached = (square(flint.arb_mat(n, 1, x)) for x in (exact.entries()[:n], c.tolist()))
        # What float64 leaves of a root: eps of the tails times the coefficients.
        slack = float(np.abs(c).sum() ** 2) * 1e-13
        assert reached - least <= 1e-9 * least + slack * float(norm.mid())
        assert reached == pytest.approx(squared_error(solver, c, target), rel=1e-6, abs=slack)
        assert c.sum() == pytest.approx(1, abs=1e-14 * np.abs(c).sum())


# --- properties of any optimum
# ---------------------------------------------------------------------


def test_copies_between_which_nothing_moved_do_not_cancel() -> None:
    """Snapshots at the first update: no motion distinguishes them, and their roundings differ a
    little."""
    snapshots = power_functions((START, 10.0))
    rounding = np.array([1.0, 1.1, 1.0, 1.2]) * 1e-6
    prior = Prior(
        uneven_motion(5.0), rounding, 1e-9 * rounding, np.full(4, 4.0), "measured", Steps(STEPS)
    )
    for t, usable in ((START, range(2)), (10.0, range(4))):
        result = reconstruct(
            [snapshots[i] for i in usable], [power(0.1, t)], prior=prior.of(usable)
        )
        assert np.abs(result.coefficients).sum() < 10
        assert (NORM * result.predicted_error[0]) ** 2 > 0.4e-6


Case = tuple[list[PowerFunction], Prior, PowerFunction]


@st.composite
def problems(draw: st.DrawFn) -> Case:
    """Snapshots, a prior with any walk, noise and rounding, and a target."""
    times = sorted(draw(st.lists(st.integers(4, 1000), min_size=1, max_size=10, unique=True)))
    snapshots = power_functions(
        times, draw(st.sampled_from([(0.05,), (0.05, 0.10), (0.05, 0.28), (0.03, 0.10, 0.28)]))
    )
    segments = draw(st.integers(1, 5))
    edges = np.concatenate(([START], np.linspace(START, 1000, segments + 1)[1:]))
    logs = st.lists(st.floats(-4, 1), min_size=segments, max_size=segments)
    walk, noise = (10 ** np.array(draw(logs)) for _ in range(2))
    noise = noise * draw(st.sampled_from([0.0, 1.0]))
    rounding = 10 ** np.array(
        draw(st.lists(st.floats(-10, -2), min_size=len(snapshots), max_size=len(snapshots)))
    )
    prior = prior_of(snapshots, Motion(edges, walk, noise), rounding)
    return snapshots, prior, power(draw(st.floats(0.02, 0.288)), float(times[-1]))


@given(problems(), st.floats(1e-3, 1e6), st.floats(1e-6, 1e6))
@settings(max_examples=25, deadline=None)
def test_units_of_time_and_of_weights_change_nothing(
    problem: Case, time: float, weights: float
) -> None:
    """A walk has the unit of squares per time, noise that of squares times time."""
    snapshots, prior, target = problem
    before = reconstruct(snapshots, [target], prior=prior)
    motion = prior.motion
    moved = Motion(motion.edges * time, motion.walk * weights / time, motion.noise * weights * time)
    scaled = Prior(
        moved, prior.rounding * weights, prior.arithmetic, prior.norm * weights, prior.source
    )
    *slower, slower_target = (PowerFunction(p.gamma, p.t * time) for p in (*snapshots, target))
    after = reconstruct(slower, [slower_target], prior=scaled)
    # The floor is eps times the walk, under a root.
    assert after.predicted_error[0] == pytest.approx(before.predicted_error[0], rel=1e-4, abs=1e-7)
    scale = np.abs(before.coefficients).sum()
    np.testing.assert_allclose(after.coefficients, before.coefficients, atol=1e-5 * scale)


@given(problems(), st.data())
@settings(max_examples=20, deadline=None)
def test_a_target_that_is_stored_exactly_is_its_snapshot(
    problem: Case, data: st.DataObject
) -> None:
    snapshots, prior, target = problem
    index = data.draw(st.sampled_from([i for i, p in enumerate(snapshots) if p.t == target.t]))
    rounding = np.where(np.arange(len(snapshots)) == index, 0.0, prior.rounding)
    prior = Prior(prior.motion, rounding, prior.rounding, prior.norm, prior.source)
    result = reconstruct(snapshots, [snapshots[index]], prior=prior)
    np.testing.assert_array_equal(result.coefficients[:, 0], np.eye(len(snapshots))[index])
    assert result.profile_error[0] == 0


def test_the_error_is_relative_to_the_norm_of_the_target() -> None:
    """For a walk from a place theta0, E |theta|^2 = |theta0|^2 + integral v tail^2 ds.

    All long averages of a long path may be far shorter vectors than a late one.
    """
    snapshots = power_functions(np.linspace(100, T, 10))
    motion = uneven_motion()
    origin = PowerFunction(1e9, float(motion.edges[0]))  # its tail is 0 where anything moves

    def norm(profile: PowerFunction) -> float:
        return 0.5 + expected_square([profile], [1.0], origin, motion, 0.0)

    norms = np.array([norm(snapshot) for snapshot in snapshots])
    solver = Problem(snapshots, replace(prior_of(snapshots, motion, 1e-6), norm=norms), T)
    for target in power_functions(T, (0.02, 0.05, 0.15, 0.28)):
        c = solved(solver, target)
        goal = solver.goal(target)
        squares = solver.expected_squares(c, goal)
        expected = np.sqrt(squares.sum() / norm(target))
        assert solver.relative(squares, c, goal) == pytest.approx(expected, rel=1e-6)


def test_the_relative_error_of_weights_that_are_all_0_is_0_or_undefined() -> None:
    """It is 0 if no error is expected, and otherwise nan, since the norm is 0."""
    snapshots = power_functions([500.0, T])
    zeros = np.zeros(len(snapshots))
    for arithmetic, expected in ((zeros, 0.0), (zeros + 1, np.nan)):
        solver = Problem(
            snapshots, Prior(Motion.even(T, 0.0), zeros, arithmetic, zeros, "measured"), T
        )
        goal = solver.goal(power(0.1, T))
        c = solver.optimum(goal)
        squares = solver.expected_squares(c, goal)
        np.testing.assert_equal(solver.relative(squares, c, goal), expected)


@given(problems(), st.randoms(use_true_random=False))
@settings(max_examples=15, deadline=None)
def test_errors_after_losses_are_those_of_solving_without_the_lost(
    problem: Case, random: Any
) -> None:
    """For the next loss of each remaining snapshot, after any number of losses."""
    snapshots, prior, target = problem
    losses = Problem(snapshots, prior, target.t).losses([target])
    left = list(range(len(snapshots)))
    while len(left) > 1:
        after = losses.squares_without([[index] for index in range(len(snapshots))])[0]
        lost = random.choice(left)
        left.remove(lost)
        anew = Problem([snapshots[i] for i in left], prior.of(left), target.t)
        expected = pytest.approx(
            squared_error(anew, solved(anew, target), target), rel=1e-3, abs=1e-8
        )
        assert after[lost] == expected
        losses.lose(lost)
        assert losses.squares[0] == expected


def test_a_small_gain_is_not_worth_the_risk_of_a_wrong_motion() -> None:
    """The fit is off by factors of ten in some segments; minimum variance alone has 1.09 times the
    published error."""
    times = np.arange(100.0, T + 1, 100.0)
    snapshots = power_functions(times)
    edges = np.concatenate(([START], times))
    random = np.random.default_rng(202)
    walk = 10 ** random.uniform(-1, 0, 10)
    noise = 300 * 10 ** random.uniform(-1, 0, 10)
    fitted = Motion(
        edges,
        walk * 10.0 ** random.choice([-1, 0, 1], 10),
        noise * 10.0 ** random.choice([-1, 0, 1], 10),
    )
    target = power(0.1, T)
    prior = prior_of(snapshots, fitted)
    ours, paper = (
        expected_square(
            snapshots, result.coefficients[:, 0], target, Motion(edges, walk, noise), 0.0
        )
        for result in (reconstruct(snapshots, [target], method, prior) for method in METHODS)
    )
    assert ours < 1.06**2 * paper


def test_the_worse_motion_explains_distances_the_nearer_coefficients_are_to_published_ones() -> (
    None
):
    snapshots = power_functions(np.linspace(0, T, 21)[1:])
    target = power(0.15, T)
    prior = prior_of(snapshots, uneven_motion(), 1e-6)
    paper = reconstruct(snapshots, [target], "paper", prior).coefficients
    found = (
        reconstruct(snapshots, [target], None, replace(prior, doubt=doubt))
        for doubt in (0.0, 0.3, 5.0)
    )
    sure, unsure, wrong = (float(np.abs(result.coefficients - paper).sum()) for result in found)
    assert sure > unsure > 1
    assert wrong == pytest.approx(0.0, abs=1e-12)


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
    snapshots: list[PowerFunction], method: str
) -> None:
    result = reconstruct(snapshots, [power(0.1, 100.0)], method)
    assert np.isfinite(result.coefficients).all()
    assert result.coefficients.sum() == pytest.approx(1)


# --- the published method against high-precision solutions of the same least-squares problem, and
# against quadrature

LAST = 100_000.0
TARGETS = (0.01, 0.05, 0.07, 0.15, 0.20, 0.28)


def uniform_snapshots(count: int) -> list[PowerFunction]:
    return power_functions(np.linspace(0, LAST, count // 2 + 1)[1:], (0.05, 0.10))


def product(a: PowerFunction, b: PowerFunction) -> flint.arb:
    """The inner product of two power functions, from equation 151."""
    early, late = (a, b) if a.t <= b.t else (b, a)
    g, h, s, t = (flint.arb(x) for x in (early.gamma, late.gamma, early.t, late.t))
    return (g + 1) * (h + 1) / (g + h + 1) * (s / t) ** h / t


def distances_to_exact(
    count: int, sigma_rels: Sequence[float]
) -> Iterator[tuple[float, float, float]]:
    """Yield the relative distance from the exact reconstruction, the stated error and the exact
    error, at 50 digits."""
    snapshots = uniform_snapshots(count)
    targets = power_functions(LAST, sigma_rels)
    ours = reconstruct(snapshots, targets, "paper")
    flint.ctx.dps = 60
    products = [[product(a, b) for b in (*snapshots, *targets)] for a in (*snapshots, *targets)]
    n = len(snapshots)
    of_targets = range(len(snapshots), len(products))
    matrix = flint.arb_mat(n, n, [products[i][j] for i in range(n) for j in range(n)])
    solution = matrix.solve(
        flint.arb_mat(n, len(targets), [products[i][j] for i in range(n) for j in of_targets])
    )
    root = lambda x: max(float(x.mid()), 0.0) ** 0.5  # noqa: E731
    for k, j in enumerate(of_targets):
        right = flint.arb_mat(n, 1, [products[i][j] for i in range(n)])
        total = sum((solution[i, k] for i in range(n)), flint.arb(0))
        exact = flint.arb_mat(n, 1, [solution[i, k] / total for i in range(n)])
        gap = flint.arb_mat(n, 1, [flint.arb(float(c)) for c in ours.coefficients[:, k]]) - exact
        norm2 = products[j][j]
        apart = (gap.transpose() * matrix * gap)[0, 0] / norm2
        error = (
            (exact.transpose() * matrix * exact)[0, 0]
            - 2 * (exact.transpose() * right)[0, 0]
            + norm2
        ) / norm2
        yield root(apart), float(ours.profile_error[k]), root(error)


@pytest.mark.parametrize(
    ("count", "sigma_rels", "near"), [(8, TARGETS, 1e-5), (128, (0.07, 0.28), 1e-5)]
)
def test_agrees_with_fifty_digits(count: int, sigma_rels: tuple[float, ...], near: float) -> None:
    for apart, stated, exact in distances_to_exact(count, sigma_rels):
        assert apart <= 1e-9
        assert stated == pytest.approx(exact, rel=near, abs=1e-7)


@pytest.mark.parametrize("target", power_functions((LAST, 1.05 * LAST), (0.15,)))
def test_the_stated_error_is_the_distance_of_the_profiles(target: PowerFunction) -> None:
    """The mass of the target after the last snapshot included, which no coefficients reach."""
    snapshots = uniform_snapshots(8)
    result = reconstruct(snapshots, [target], "paper")

    def squared(s: float) -> float:
        made = sum(
            c * float(p.density(s))
            for c, p in zip(result.coefficients[:, 0], snapshots, strict=True)
        )
        return (made - float(target.density(s))) ** 2

    parts = pairwise(sorted({0.0, target.t, *(p.t for p in snapshots)}))
    distance2 = sum(integrate.quad(squared, a, b, epsabs=0, epsrel=1e-9)[0] for a, b in parts)
    norm2 = integrate.quad(lambda s: float(target.density(s)) ** 2, 0, target.t)[0]
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


def masses(profile: Profile, steps: int) -> FloatArray:
    return np.asarray(-np.diff(profile.tail(np.arange(steps + 1))))


def even_prior(count: int, t: float, noise: float = 0.0) -> Prior:
    zeros = np.zeros(count)
    motion = Motion(np.array([1.0, t]), np.ones(1), np.full(1, noise))
    return Prior(motion, zeros, zeros, zeros + 1, "measured", Steps(Clock.of_steps()))


def test_a_known_motion_has_the_exact_expectation() -> None:
    """For a walk with noise, by sums over steps."""
    steps = 1000
    w = 15.0
    libraries = [ema_pytorch_profile(g, t, 25) for g in (2.0, 7.0) for t in (300, 600, 1000)]
    stored = [*libraries, Point(500.0), Point(990.0), PowerFunction(5.0, 800.0)]
    target = PowerFunction(9.0, 1000.0)
    c = np.random.default_rng(0).dirichlet(np.ones(len(stored)))
    solver = Problem(stored, even_prior(len(stored), 1000.0, w), 1000.0)
    expected = squared_error(solver, c, target)
    missed = c @ np.stack([masses(p, steps) for p in stored]) - masses(target, steps)
    tails = np.cumsum(missed[::-1])[::-1]
    assert expected == pytest.approx(np.sum(tails[1:] ** 2) + w * np.sum(missed**2), rel=0.03)


# --- sums of coefficients, and decays


@pytest.mark.parametrize(
    ("shape", "d"),
    [
        ("linear", lambda x: 1 - x),
        ("1-sqrt", lambda x: 1 - np.sqrt(x)),
        ("cosine", lambda x: (1 + np.cos(np.pi * x)) / 2),
    ],
)
def test_a_decay_of_dense_checkpoints_is_the_closed_form(
    shape: str, d: Callable[[FloatArray], FloatArray]
) -> None:
    """theta(start) + the later increments times d, as a scheduler counts: the first step of the
    decay has d(0).

    By WSM the sums of the later coefficients are the multipliers.
    """
    steps = 600
    start = 400
    stored = [Point(float(t)) for t in range(start - 20, steps + 1)]
    target = Decay(shape, (start, steps)).profile(steps, Clock.of_steps(), 1.0)
    result = reconstruct(
        stored, [target], None, even_prior(len(stored), float(steps)), float(steps)
    )
    sums = np.cumsum(result.coefficients[::-1, 0])[::-1]
    assert sums[:21] == pytest.approx(1, abs=1e-9)
    assert sums[21:] == pytest.approx(d(np.arange(steps - start) / (steps - start)), abs=1e-9)
    assert result.predicted_error[0] < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_given_coefficients_are_not_changed(method: str) -> None:
    wanted = np.array([0.5, 0.0, -0.25, 0.75])
    stored = [Point(t) for t in (1000, 2000, 3000, 4000)]
    target = PowerFunction.from_sigma_rel(0.1, 4000)
    result = reconstruct(stored, [target, wanted], method, even_prior(4, 4000.0), 4000.0)
    assert result.coefficients[:, 1].tolist() == wanted.tolist()
    assert (result.predicted_error[1], result.profile_error[1]) == (0, 0)
