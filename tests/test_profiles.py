"""Profiles against mpmath, sums and integrals, and against simulated averages."""

import dataclasses
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
from checking import refused
from factories import Span
from numpy.testing import assert_allclose

from posthoc_cli import (
    Beta,
    Decay,
    HalfLife,
    Mean,
    PowerFunction,
    Window,
    gamma_from_sigma_rel,
    sigma_rel_from_gamma,
)
from posthoc_cli.profiles import (
    UNIFORM_SIGMA_REL,
    Point,
    decay_from_sigma_rel,
    sigma_rel_from_decay,
)
from posthoc_cli.run_clock import Clock
from posthoc_cli.targets import (
    KINDS,
    GivenProfile,
    SigmaRel,
    as_target,
    name_equal_length,
    parse_targets,
)


@pytest.mark.parametrize("sigma_rel", [1e-9, 0.999e-6, 1e-6, 0.01, 0.288675])
def test_gamma_agrees_with_fifty_digits(sigma_rel):
    gamma = gamma_from_sigma_rel(sigma_rel)
    with mpmath.workdps(50):
        linear = 5 - 1 / mpmath.mpf(sigma_rel) ** 2
        roots = mpmath.polyroots([1, 4, linear, 2], maxsteps=500, extraprec=500)
        exact = max(mpmath.re(root) for root in roots)
    error = abs((gamma + 1) - exact)
    assert error <= 1e-12 * exact
    # d log(sigma_rel) / d log(gamma + 1) is at most 1, and there are a few roundings.
    again = sigma_rel_from_gamma(gamma)
    assert again == pytest.approx(sigma_rel, rel=1e-13, abs=0)


@pytest.mark.parametrize("gamma", [1e-9, 0.01, 0.04, 0.05, 0.1, 7.0])
def test_the_width_that_is_named_for_a_decay_is_accepted(gamma):
    """The one of an EMA that is nearly as long as the training rounds to 0.289."""
    steps = 1000
    beta = Beta(math.exp(-(gamma + 2) / steps))
    clock = Clock([steps], [float(steps)])
    named = (name_equal_length(beta, steps), beta.on_clock(steps, clock))
    for text in named:
        width = float(text.split()[-1])
        assert SigmaRel(width).sigma_rel == pytest.approx(sigma_rel_from_gamma(gamma), rel=5e-3)


@pytest.mark.parametrize("wrong", [UNIFORM_SIGMA_REL, -math.inf, "0.15", [0.15]], ids=str)
def test_an_impossible_sigma_rel_is_refused_with_the_range(wrong):
    with refused("sigma_rel"):
        gamma_from_sigma_rel(wrong)


def test_a_decay_is_the_power_function_of_the_same_mean_age():
    steps = 10_000
    for sigma_rel in (1e-3, 0.05, 0.2, 0.28):
        decay = decay_from_sigma_rel(sigma_rel, steps)
        assert sigma_rel_from_decay(decay, steps) == pytest.approx(sigma_rel, rel=1e-9)
        passed = np.arange(steps) / steps
        until = passed ** (gamma_from_sigma_rel(sigma_rel) + 1)
        ages = np.arange(30 * steps)
        forgetting = (1 - decay) * decay**ages
        assert until.sum() == pytest.approx(forgetting @ ages, rel=1e-3, abs=0.05)
    assert sigma_rel_from_decay(0.99999, 10_000) is None  # longer than the uniform average


# --- the clock -----------------------------------------------------------------------------------

UNEVEN = Clock((10, 40, 100), (5.0, 80.0, 90.0))
"""Steps of half a unit, then of two and a half, then of a sixth."""


def uneven_time(step):
    if step <= 10:
        return step / 2
    if step <= 40:
        return 5 + (step - 10) * 2.5
    return 80 + (step - 40) / 6


def test_steps_between_known_pairs_have_equal_lengths():
    steps = np.arange(101)
    times = np.array([uneven_time(step) for step in steps])
    assert_allclose(UNEVEN.step_at(times), steps, rtol=1e-14)
    assert_allclose(UNEVEN.time_at(steps), times, rtol=1e-14)


def test_steps_outside_of_known_pairs_have_the_length_of_the_nearest():
    outside = [[-3.0, 0.0], [100.0, 150.0]]
    found = UNEVEN.step_at(outside)
    assert_allclose(found, [[0, 0], [160, 460]])


# --- other profiles ------------------------------------------------------------------------------


CLOCKS = (
    (Clock((1.0,), (1.0,)), np.arange(101.0)),
    (UNEVEN, np.array([uneven_time(step) for step in range(101)])),
)
"""Clocks, with the times of steps 0 to 100."""


def check_weights(target, weights, first):
    """Check that a target weighs steps 0 to 100 so, on any clock, in a run with this first
    update."""
    backwards = np.cumsum(weights[:0:-1])
    later = np.append(backwards[::-1], 0.0)
    for clock, times in CLOCKS:
        profile = target.profile(times[-1], clock, times[first])
        assert_allclose(profile.tail(times), later, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("decay", "first"),
    [
        (0.5, 1),
        (1 - 1e-12, 7),
    ],
)
def test_the_classical_profile_has_the_weights_of_its_recursion(decay, first):
    """x <- decay x + (1 - decay) theta_k, which starts with x = theta_first."""
    weights = np.zeros(101)
    weights[first] = 1.0
    for step in range(first + 1, 101):
        weights *= decay
        weights[step] += 1 - decay
    check_weights(Beta(decay), weights, first)


@pytest.mark.parametrize("steps", [1, 30])
def test_a_window_weighs_each_of_its_steps_the_same(steps):
    weights = np.zeros(101)
    weights[-steps:] = 1 / steps
    check_weights(Window(steps), weights, 1)


# --- targets: the right profile for each target, and an error that names each impossible one

STEPS = Clock((1.0,), (1.0,))
IMAGES = Clock((10, 10_000), (1_280.0, 1_000_000.0))


NINE = Span(0, 9)


@pytest.mark.parametrize(
    ("target", "label", "title", "sigma_rel"),
    [
        (SigmaRel(0.15), "0.15", "sigma_rel 0.15", 0.15),
        (GivenProfile(NINE, "mine"), "mine", "profile mine", None),
    ],
)
def test_each_target_has_its_names(target, label, title, sigma_rel):
    assert target.label == label
    assert target.title == title
    assert target.sigma_rel == sigma_rel
    assert as_target(target) is target


def test_a_number_is_a_sigma_rel_and_an_object_with_tail_a_profile():
    for value in (0.15, np.float32(0.15), np.array(0.15)):
        assert as_target(value) == SigmaRel(float(value))
    assert as_target(NINE) == GivenProfile(NINE)
    assert Beta(1 - 1e-12).label != Beta(1 - 2e-12).label


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("window:10,20", "2"),
        ("0.9", "`decay` 0.9"),
        ("beta:0.99", "`decay` 0.99"),
        ("0.1,0.2,...", "..."),
        ("0.1,...,0.3", "..."),
        ("decay:linear:50", ""),
        ("decay:linear:5%:20%", ""),
        ("half-life:5%", ""),
        ("window:1:1e5:1", "10,000"),
        ("window:1:5:-1", "step"),
    ],
)
def test_a_text_that_names_no_target_is_refused(text, fact):
    with refused("target", text, fact):
        as_target(text)


@pytest.mark.parametrize(
    ("make", "arguments", "subject"),
    [
        (as_target, [None], "target None"),
        (Beta, [0.4], "decay 0.4"),
        (Decay, ["linear", ()], "over ()"),
        (Mean, [2.5], "last 2.5"),
        (GivenProfile, [NINE, "../a b"], "profile '../a b'"),
    ],
)
def test_a_value_that_makes_no_target_is_refused(make, arguments, subject):
    with refused(subject):
        make(*arguments)


@pytest.mark.parametrize(
    ("target", "fact"),
    [(Mean(3), "last:3"), (Window(10**4 + 1), " 10,000 ")],
)
def test_a_target_that_a_run_cannot_have_is_refused(target, fact):
    with refused("target", fact):
        target.profile(1e6, IMAGES, 1280.0)


@dataclasses.dataclass
class Written:
    """A profile whose tail a test writes."""

    tail: Callable


def with_a_step(s):
    return np.where(abs(s - 50) < 10, 1, np.clip(1 - s / 100, 0, 1))


def of_one_time(s):
    return max(0, 1 - s / 100)


@pytest.mark.parametrize(
    ("tail", "fact"),
    [
        (np.log, "nan at s = -100"),
        (np.size, "shape ()"),
        (with_a_step, "1 at s = 40.0390625"),
        (of_one_time, "The truth value"),
        (Span(0, 100 + 1e-4).tail, "9.99999e-07 at s = 100"),
    ],
)
def test_the_fault_of_a_given_profile_is_named(tail, fact):
    with np.errstate(all="ignore"), refused("profile given", fact):
        as_target(Written(tail)).profile(100.0, STEPS, 1.0)


def test_the_mean_is_of_the_last_checkpoints():
    stored = [Point(30), PowerFunction(5.0, 40.0), Point(10), Point(20)]
    of_two = Mean(2).compute_coefficients(stored)
    assert of_two.tolist() == [0.5, 0, 0, 0.5]
    averages = [PowerFunction(5.0, 10.0), PowerFunction(5.0, 20.0)]
    of_one = Mean(1).compute_coefficients(averages)
    assert of_one.tolist() == [0, 1]
    with refused("target last:4"):
        Mean(4).compute_coefficients(stored)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        (" 0.1 , 0.2,0.1", [SigmaRel(0.1), SigmaRel(0.2)]),
        ("0.05:0.25:0.05", [SigmaRel(width) for width in (0.05, 0.1, 0.15, 0.2, 0.25)]),
        ("0.25,0.24,...,0.22", [SigmaRel(width) for width in (0.25, 0.24, 0.23, 0.22)]),
        ("half-life:100,200,...,400", [HalfLife(100), HalfLife(200), HalfLife(300), HalfLife(400)]),
        (
            "decay:1-sqrt:5%:15%:5%",
            [Decay("1-sqrt", 0.05), Decay("1-sqrt", 0.1), Decay("1-sqrt", 0.15)],
        ),
        ("decay:cosine:0.1,5%", [Decay("cosine", 0.1), Decay("cosine", 0.05)]),
    ],
)
def test_a_text_names_targets(text, targets):
    assert parse_targets(text) == targets


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_made_and_named(name):
    """Its text form gives it back, and it has a profile or coefficients in a small run."""
    (target,) = parse_targets(KINDS[name].example)
    assert parse_targets(target.title) == [target]
    assert target.label == target.title.replace(":", "-")
    if isinstance(target, Mean):
        stored = [Point(float(t)) for t in range(20)]
        assert target.compute_coefficients(stored).sum() == pytest.approx(1)
    else:
        check_profile_of(target)


def test_a_decay_is_a_target_with_the_same_length_as_a_sigma_rel():
    assert Beta(0.9999).title == "decay 0.9999"
    assert Beta(0.9999).label == "decay-0.9999"
    check_profile_of(Beta(0.9999))
    profile = Beta(0.9999).profile(1e6, STEPS, 1.0)
    assert profile.sigma_rel == sigma_rel_from_decay(0.9999, 1e6)


def check_profile_of(target):
    """Check that a target's profile has the mass 1, and depends on the clock if it counts steps."""
    times = np.linspace(0.0, 1e6, 10_001)
    profile = target.profile(1e6, STEPS, 1.0)
    assert profile.tail(-1.0) == 1
    tail = profile.tail(times)
    assert tail[-1] == 0
    assert np.diff(tail).max() <= 1e-15  # roundings: not every expm1 is monotonic
    bent = target.profile(1e6, Clock((5e5, 1e6), (1e5, 1e6)), 1.0)
    differs = not np.array_equal(bent.tail(times), tail)
    assert target.counts_steps == differs


def test_a_half_life_is_a_decay():
    assert HalfLife(2000).beta == pytest.approx(0.5 ** (1 / 2000), rel=1e-15)
