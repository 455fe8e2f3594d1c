"""Reconstructions from checkpoints, other libraries' averages, and these together with power functions.

The truth is computed as float64 sums over the weights after each step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby

import numpy as np
import pytest
from factories import FloatArray, power_functions

from posthoc_cli.profiles import (
    Clock,
    Discrete,
    Point,
    PowerFunction,
    Profile,
    StoredProfile,
    ema_pytorch_profile,
    gamma_from_sigma_rel,
)
from posthoc_cli.reconstruction import (
    METHODS,
    Distance,
    Measurements,
    Motion,
    Prior,
    Problem,
    Steps,
    StoredAverage,
    measured_prior,
    reconstruct,
)
from posthoc_cli.targets import Between, Decay

STEPS, ELEMENTS = 4000, 400
STEP_CLOCK = Steps(Clock.of_steps())
TARGETS = power_functions(STEPS, (0.05, 0.1, 0.15, 0.25))


def walk(kind: str, steps: int = STEPS) -> FloatArray:
    """Return weights after each step: shape [steps, elements]."""
    rng = np.random.default_rng(0)
    rate = np.cos(np.pi / 2 * np.arange(steps) / steps)[:, None] ** 2 + 1e-2 if kind == "cosine" else 1.0
    path = 100 + np.cumsum(rng.normal(size=(steps, ELEMENTS)) * rate, axis=0)
    return path + 5 * rng.normal(size=path.shape) if kind == "noisy" else path


def masses(profile: Profile, steps: int) -> FloatArray:
    """Return the weight of each step in an average, by definition."""
    if isinstance(profile, Discrete | Point):
        return np.asarray(-np.diff(profile.tail(np.arange(steps + 1))))
    if isinstance(profile, PowerFunction):
        return np.diff(np.minimum(np.arange(steps + 1) / profile.t, 1) ** (profile.gamma + 1))
    return np.asarray(-np.diff(profile.tail(np.arange(steps + 1))))  # a mean of whole steps


def distance(other: StoredProfile, difference: FloatArray) -> Distance:
    return Distance(other, float(np.sum(difference**2)), 0.0)


def errors(
    groups: Sequence[Sequence[StoredProfile]], path: FloatArray, targets: Sequence[Profile]
) -> tuple[FloatArray, FloatArray]:
    """Return actual and predicted relative errors of reconstructions from averages that are measured as snapshots are.

    An average has distances to those of its time, and to the last two before it in each group: shape [targets] each.
    """
    stored = sorted(((p, number) for number, group in enumerate(groups) for p in group), key=lambda pair: pair[0].t)
    profiles = [profile for profile, _ in stored]
    values = {profile: masses(profile, len(path)) @ path for profile in profiles}
    newest: dict[int, list[StoredProfile]] = defaultdict(list)
    averages = []
    for _, same_time in groupby(stored, key=lambda pair: pair[0].t):
        now = list(same_time)
        for profile, _ in now:
            others = [other for other, _ in now if other is not profile]
            others += [other for earlier in newest.values() for other in earlier]
            distances = tuple(distance(other, values[profile] - values[other]) for other in others)
            measurements = Measurements(float(np.sum(values[profile] ** 2)), 0.0, distances)
            averages.append(StoredAverage(profile, 1, 2.0**-52, measurements, STEP_CLOCK))
        for profile, number in now:
            newest[number] = [*newest[number], profile][-2:]
    result = reconstruct(profiles, targets, None, measured_prior(averages), float(len(path)))
    truth = np.stack([masses(target, len(path)) @ path for target in targets])
    made = result.coefficients.T @ np.stack([values[profile] for profile in profiles])
    return np.linalg.norm(made - truth, axis=1) / np.linalg.norm(truth, axis=1), result.predicted_error


def points(count: int) -> list[Point]:
    return [Point(round(STEPS * (i + 1) / count)) for i in range(count)]


def even_prior(count: int, t: float, noise: float = 0.0) -> Prior:
    zeros, motion = np.zeros(count), Motion(np.array([1.0, t]), np.ones(1), np.full(1, noise))
    return Prior(motion, zeros, zeros, zeros + 1, "measured", STEP_CLOCK)


@pytest.mark.parametrize("kind", ["even", "cosine", "noisy"])
@pytest.mark.parametrize("count", [8, 64])
def test_errors_from_checkpoints_alone_are_predicted(kind: str, count: int) -> None:
    actual, predicted = errors(
        [points(count)], walk(kind), [*TARGETS, Between(STEPS / 2, STEPS).profile(STEPS, Clock.of_steps(), 1.0)]
    )
    ratios = actual / predicted
    assert np.all((ratios > 0.6) & (ratios < 1.5)), ratios


@pytest.mark.parametrize(
    ("still", "kind", "count"),
    [
        ("copy", "even", 8),
        ("copy", "noisy", 20),
        ("middle", "noisy", 8),
        ("last fifth", "even", 20),
        ("half", "noisy", 8),
    ],
)
def test_a_standstill_says_nothing_about_motion_elsewhere(kind: str, still: str, count: int) -> None:
    """With equal checkpoints, or weights that did not move for a while, errors were up to 200 times too large."""
    path, stored, targets = walk(kind), points(count), TARGETS
    stop = {"last fifth": STEPS * 4 // 5}.get(still, STEPS // 2)
    if still == "copy":
        path, stored = np.concatenate((path, path[-1:])), [*stored, Point(STEPS + 1)]
        targets = [PowerFunction(target.gamma, STEPS + 1.0) for target in TARGETS]
    elif still == "middle":
        path = np.insert(path[: STEPS * 3 // 4], [stop] * (STEPS // 4), path[stop - 1], axis=0)
    else:
        path[stop:] = path[stop - 1]
    actual, predicted = errors([stored], path, targets)
    ratios = actual / predicted
    assert np.all((ratios > 0.5) & (ratios < 2))


@pytest.mark.parametrize("kind", ["even", "cosine", "noisy"])
def test_checkpoints_in_addition_to_averages_lower_the_errors(kind: str) -> None:
    path, snapshots = walk(kind), [power_functions(np.arange(200.0, STEPS + 1, 200.0), (s,)) for s in (0.05, 0.28)]
    alone, _ = errors(snapshots, path, TARGETS[1:])
    both, predicted = errors([*snapshots, points(20)], path, TARGETS[1:])
    assert np.all(both < 1.1 * alone)
    assert np.all((both / predicted > 0.5) & (both / predicted < 2)), both / predicted


@pytest.mark.parametrize("kind", ["even", "cosine"])
@pytest.mark.parametrize(("update_every", "most"), [(1, 3e-4), (10, 3e-3), (100, 1.5e-2)])
def test_averages_of_another_library_are_combined_within_the_predicted_error(
    kind: str, update_every: int, most: float
) -> None:
    gammas = [gamma_from_sigma_rel(s) for s in (0.05, 0.28)]
    stored = [[ema_pytorch_profile(g, 200 * (i + 1), update_every) for i in range(20)] for g in gammas]
    actual, predicted = errors(stored, walk(kind), TARGETS[1:])
    assert np.all(actual < np.minimum(2 * predicted, most))


def test_a_known_motion_has_the_exact_expectation() -> None:
    """For a walk with noise, by sums over steps."""
    steps, w = 1000, 15.0
    libraries = [ema_pytorch_profile(g, t, 25) for g in (2.0, 7.0) for t in (300, 600, 1000)]
    stored = [*libraries, Point(500.0), Point(990.0), PowerFunction(5.0, 800.0)]
    target = PowerFunction(9.0, 1000.0)
    c = np.random.default_rng(0).dirichlet(np.ones(len(stored)))
    solver = Problem(stored, even_prior(len(stored), 1000.0, w), 1000.0)
    expected = solver.expected_squares(c[:, None], solver.goals([target])).sum()
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
def test_a_decay_of_dense_checkpoints_is_the_closed_form(shape: str, d: Callable[[FloatArray], FloatArray]) -> None:
    """theta(start) + the later increments times d, as a scheduler counts: the first step of the decay has d(0).

    By WSM the sums of the later coefficients are the multipliers.
    """
    steps, start = 600, 400
    stored = [Point(float(t)) for t in range(start - 20, steps + 1)]
    target = Decay(shape, (start, steps)).profile(steps, Clock.of_steps(), 1.0)
    result = reconstruct(stored, [target], None, even_prior(len(stored), float(steps)), float(steps))
    sums = np.cumsum(result.coefficients[::-1, 0])[::-1]
    assert sums[:21] == pytest.approx(1, abs=1e-9)
    assert sums[21:] == pytest.approx(d(np.arange(steps - start) / (steps - start)), abs=1e-9)
    assert result.predicted_error[0] < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_given_coefficients_are_not_changed(method: str) -> None:
    wanted = np.array([0.5, 0.0, -0.25, 0.75])
    result = reconstruct(points(4), [TARGETS[1], wanted], method, even_prior(4, float(STEPS)), float(STEPS))
    assert result.coefficients[:, 1].tolist() == wanted.tolist()
    assert (result.predicted_error[1], result.profile_error[1]) == (0, 0)
