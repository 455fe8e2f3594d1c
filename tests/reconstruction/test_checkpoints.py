"""Reconstructions from checkpoints, other libraries' averages, and these together with power functions.

The truth is computed as float64 sums over the weights after each step.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from factories import FloatArray

from posthoc_cli.profiles import Clock, Point, PowerFunction, Profile, ema_pytorch_profile
from posthoc_cli.reconstruction import METHODS, Motion, Prior, Problem, Steps, reconstruct
from posthoc_cli.targets import Decay


def masses(profile: Profile, steps: int) -> FloatArray:
    """Return the weight of each step in an average."""
    return np.asarray(-np.diff(profile.tail(np.arange(steps + 1))))


def even_prior(count: int, t: float, noise: float = 0.0) -> Prior:
    zeros, motion = np.zeros(count), Motion(np.array([1.0, t]), np.ones(1), np.full(1, noise))
    return Prior(motion, zeros, zeros, zeros + 1, "measured", Steps(Clock.of_steps()))


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
    stored, target = [Point(t) for t in (1000, 2000, 3000, 4000)], PowerFunction.from_sigma_rel(0.1, 4000)
    result = reconstruct(stored, [target, wanted], method, even_prior(4, 4000.0), 4000.0)
    assert result.coefficients[:, 1].tolist() == wanted.tolist()
    assert (result.predicted_error[1], result.profile_error[1]) == (0, 0)
