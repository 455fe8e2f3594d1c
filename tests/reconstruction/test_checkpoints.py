"""Averages of checkpoints, of other libraries' averages, and of these beside power functions, against float64 sums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import groupby

import numpy as np
import pytest

from posthoc_cli.profiles import (
    Clock,
    Discrete,
    EmulatedDecay,
    FloatArray,
    Point,
    PowerFunction,
    Profile,
    RecordedPowerFunction,
    StoredProfile,
    Uniform,
    gamma_from_sigma_rel,
)
from posthoc_cli.profiles.other_libraries import ema_pytorch_profile
from posthoc_cli.reconstruction import (
    METHODS,
    Distance,
    DistanceTo,
    Measurements,
    MinimumVariance,
    Motion,
    Prior,
    Reconstruction,
    Steps,
    StoredAverage,
    measured_prior,
    reconstruct,
)

STEPS, ELEMENTS = 4000, 400
STEP_CLOCK = Steps(Clock.of_steps())
WIDTHS = (0.05, 0.1, 0.15, 0.25)


def walk(kind: str, steps: int = STEPS) -> FloatArray:
    """Weights after each step, float64: shape [steps, elements]."""
    rng = np.random.default_rng(0)
    rate = np.cos(np.pi / 2 * np.arange(steps) / steps)[:, None] ** 2 + 1e-2 if kind == "cosine" else 1.0
    path = 100 + np.cumsum(rng.normal(size=(steps, ELEMENTS)) * rate, axis=0)
    return path + 5 * rng.normal(size=path.shape) if kind == "noisy" else path


def masses(profile: Profile, steps: int) -> FloatArray:
    """The weight of each step in an average, by definition."""
    if isinstance(profile, Discrete | Point):
        return np.asarray(-np.diff(profile.tail(np.arange(steps + 1))))
    if isinstance(profile, PowerFunction):
        return np.diff(np.minimum(np.arange(steps + 1) / profile.t, 1) ** (profile.gamma + 1))
    assert isinstance(profile, Uniform)
    inside = (np.arange(1, steps + 1) > profile.start) & (np.arange(1, steps + 1) <= profile.end)
    return inside / inside.sum()


def solved(groups: Sequence[Sequence[StoredProfile]], path: FloatArray, targets: Sequence[Profile]):  # type: ignore[no-untyped-def]
    """The reconstruction from averages of a path, measured as snapshots are, the averages, and their values."""
    stored = sorted(((p, kind) for kind, group in enumerate(groups) for p in group), key=lambda one: one[0].t)
    profiles = [profile for profile, _ in stored]
    values = {profile: masses(profile, len(path)) @ path for profile in profiles}
    newest: dict[int, list[StoredProfile]] = defaultdict(list)
    averages = []
    for _, now in groupby(stored, key=lambda one: one[0].t):
        there = list(now)
        for profile, _ in there:
            others = [other for other, _ in there if other is not profile]
            others += [other for earlier in newest.values() for other in earlier]
            distances = tuple(distance(other, values[profile] - values[other]) for other in others)
            measurements = Measurements(float(np.sum(values[profile] ** 2)), 0.0, distances)
            kept = RecordedPowerFunction(profile.gamma, profile.t, 1.0, 1.0) if power(profile) else profile
            averages.append(StoredAverage(kept, 1, 2.0**-52, measurements, 1.0, STEP_CLOCK))  # type: ignore[arg-type]
        for profile, kind in there:
            newest[kind] = [*newest[kind], profile][-2:]
    prior = measured_prior(averages)
    return reconstruct(profiles, targets, None, prior, float(len(path))), profiles, values


def power(profile: Profile) -> bool:
    return isinstance(profile, PowerFunction)


def distance(other: StoredProfile, apart: FloatArray) -> Distance:
    squared = float(np.sum(apart**2))
    if isinstance(other, PowerFunction):
        return Distance(other.t, other.sigma_rel, squared, 0.0)
    return DistanceTo(other.t, 0.0, squared, 0.0, other)


def errors(found: Reconstruction, profiles, values, path: FloatArray, targets: Sequence[Profile]) -> FloatArray:  # type: ignore[no-untyped-def]
    """Actual errors, relative to the truth's norm."""
    made = found.coefficients.T @ np.stack([values[profile] for profile in profiles])
    truth = np.stack([masses(target, len(path)) @ path for target in targets])
    return np.linalg.norm(made - truth, axis=1) / np.linalg.norm(truth, axis=1)


def points(count: int, steps: int = STEPS) -> list[Point]:
    return [Point(round(steps * (i + 1) / count)) for i in range(count)]


@pytest.mark.parametrize("kind", ["even", "cosine", "noisy"])
@pytest.mark.parametrize("count", [8, 20, 64])
def test_checkpoints_alone(kind: str, count: int) -> None:
    path = walk(kind)
    targets = [*(PowerFunction.from_sigma_rel(s, STEPS) for s in WIDTHS), Uniform(STEPS / 2, STEPS)]
    found, profiles, values = solved([points(count)], path, targets)
    ratios = errors(found, profiles, values, path, targets) / found.predicted_error
    assert np.all((ratios > 0.6) & (ratios < 1.5)), ratios


def test_unevenly_spaced_checkpoints_count_by_the_time_that_they_stand_for() -> None:
    """The mean over a span: each step counts for the checkpoint that is nearest by its increments, the next one."""
    times = [100, 150, 400, 410, 1000]
    prior = even_prior(len(times), 1000.0)
    found = reconstruct([Point(t) for t in times], [Uniform(0.0, 1000.0)], None, prior, 1000.0)
    # On each interval a sum of coefficients meets a falling line in its mean.
    tails = 1 - (np.array([0, *times[:-1]]) + np.array(times)) / 2000
    sums = np.cumsum(found.coefficients[::-1, 0])[::-1]
    assert sums[1:] == pytest.approx(tails[1:], abs=2e-3)


def even_prior(count: int, t: float) -> Prior:
    nothing, motion = np.zeros(count), Motion(np.array([1.0, t]), np.ones(1), np.zeros(1))
    return Prior(motion, nothing, nothing, nothing + 1, "measured", STEP_CLOCK)


@pytest.mark.parametrize("kind", ["even", "cosine", "noisy"])
def test_checkpoints_beside_averages_make_them_more_exact(kind: str) -> None:
    path = walk(kind)
    targets = [PowerFunction.from_sigma_rel(s, STEPS) for s in WIDTHS[1:]]
    own = [[PowerFunction.from_sigma_rel(s, 200.0 * (i + 1)) for i in range(20)] for s in (0.05, 0.28)]
    alone, both = (solved(groups, path, targets) for groups in (own, [*own, points(20)]))
    assert np.all(errors(*both, path, targets) < 1.1 * errors(*alone, path, targets))
    ratios = errors(*both, path, targets) / both[0].predicted_error
    assert np.all((ratios > 0.5) & (ratios < 2)), ratios


@pytest.mark.parametrize("kind", ["even", "cosine"])
@pytest.mark.parametrize("update_every", [1, 10, 100])
def test_averages_of_another_library(kind: str, update_every: int) -> None:
    path = walk(kind)
    gammas = [gamma_from_sigma_rel(s) for s in (0.05, 0.28)]
    stored = [[ema_pytorch_profile(g, 200 * (i + 1), update_every) for i in range(20)] for g in gammas]
    targets = [PowerFunction.from_sigma_rel(s, STEPS) for s in WIDTHS[1:]]
    found, profiles, values = solved(stored, path, targets)
    actual = errors(found, profiles, values, path, targets)
    assert np.all(actual < 2 * found.predicted_error)
    assert np.all(actual < {1: 3e-4, 10: 3e-3, 100: 1.5e-2}[update_every])


def test_a_known_motion_gives_the_exact_expectation() -> None:
    """Of a walk with noise, by sums over steps."""
    steps, v, w = 1000, 2.0, 30.0
    stored = [ema_pytorch_profile(g, t, 25) for g in (2.0, 7.0) for t in (300, 600, 1000)]
    everything = [*stored, Point(500.0), Point(990.0), PowerFunction(5.0, 800.0)]
    nothing = np.zeros(len(everything))
    motion = Motion(np.array([1.0, 1000.0]), np.array([v]), np.array([w]))
    prior = Prior(motion, nothing, nothing, nothing + 1, "measured", STEP_CLOCK)
    target = PowerFunction(9.0, 1000.0)
    coefficients = np.random.default_rng(0).dirichlet(np.ones(len(everything)))
    model = MinimumVariance(everything, prior, 1000.0)
    found = model.expected_squares(coefficients[:, None], model.goals([target])).sum()
    missed = coefficients @ np.stack([masses(p, steps) for p in everything]) - masses(target, steps)
    tails = np.cumsum(missed[::-1])[::-1]
    assert found == pytest.approx(v * np.sum(tails[1:] ** 2) + w * np.sum(missed**2), rel=0.03)


# --- decays


@pytest.mark.parametrize(
    ("shape", "d"),
    [
        ("linear", lambda x: 1 - x),
        ("1-sqrt", lambda x: 1 - np.sqrt(x)),
        ("cosine", lambda x: (1 + np.cos(np.pi * x)) / 2),
    ],
)
def test_a_decay_of_dense_checkpoints_is_the_closed_form(shape: str, d) -> None:  # type: ignore[no-untyped-def]
    """theta(start) + the later increments times d, as a scheduler counts: the first step of the decay has d(0)."""
    steps, start = 600, 400
    path = walk("even", steps)
    target = EmulatedDecay(float(start), float(steps), shape)
    stored = [Point(float(t)) for t in range(start - 20, steps + 1)]
    prior = even_prior(len(stored), float(steps))
    found = reconstruct(stored, [target], None, prior, float(steps))
    made = found.coefficients[:, 0] @ path[start - 21 :]
    factors = d(np.arange(steps - start) / (steps - start))
    truth = path[start - 1] + factors @ np.diff(path[start - 1 :], axis=0)
    assert np.linalg.norm(made - truth) < 1e-6 * np.linalg.norm(truth)
    assert found.predicted_error[0] < 1e-6
    # WSM: the sums of the later coefficients are the multipliers.
    assert np.cumsum(found.coefficients[::-1, 0])[::-1][21:] == pytest.approx(factors, abs=1e-9)


def test_a_decay_of_sparse_checkpoints_counts_by_the_integral() -> None:
    target, times = EmulatedDecay(600.0, 1000.0, "linear"), [600.0, 650.0, 700.0, 900.0, 1000.0]
    found = reconstruct([Point(t) for t in times], [target], None, even_prior(5, 1000.0), 1000.0)
    sums = np.cumsum(found.coefficients[::-1, 0])[::-1]
    assert sums == pytest.approx([1, 1 - 25 / 400, 1 - 75 / 400, 1 - 200 / 400, 1 - 350 / 400], abs=3e-3)


@pytest.mark.parametrize("method", METHODS)
def test_named_coefficients_are_taken_as_they_are(method: str) -> None:
    stored = points(4)
    wanted = np.array([0.5, 0.0, -0.25, 0.75])
    prior = even_prior(4, float(STEPS))
    targets = [PowerFunction.from_sigma_rel(0.1, STEPS), wanted]
    found = reconstruct(stored, targets, method, prior, float(STEPS))
    assert found.coefficients[:, 1].tolist() == wanted.tolist()
    assert (found.predicted_error[1], found.profile_error[1]) == (0, 0)


@pytest.mark.parametrize("count", [8, 20])
@pytest.mark.parametrize("kind", ["even", "noisy"])
@pytest.mark.parametrize("still", ["copy", "middle", "last fifth", "second half"])
def test_a_standstill_says_nothing_of_motion_elsewhere(kind: str, still: str, count: int) -> None:
    """Of two equal checkpoints, or weights that stood still for a while, errors were up to 200 times the predicted."""
    base, steps, stored = walk(kind), STEPS, points(count)
    stops = {"middle": STEPS // 2, "last fifth": STEPS * 4 // 5, "second half": STEPS // 2}
    if still == "copy":
        base, steps = np.concatenate((base, base[-1:])), STEPS + 1
        stored = [*stored, Point(steps)]
    else:
        stop = stops[still]
        goes_on = base[stop:] if still == "middle" else base[:0]
        base = np.concatenate((base[:stop], np.repeat(base[stop - 1 : stop], steps - stop, axis=0)))
        if still == "middle":
            base[stop + STEPS // 4 :] = goes_on[: STEPS // 4]
    targets = [PowerFunction.from_sigma_rel(width, steps) for width in WIDTHS]
    found, profiles, values = solved([stored], base, targets)
    ratios = errors(found, profiles, values, base, targets) / found.predicted_error
    assert np.all((ratios > 0.5) & (ratios < 2))
