"""The fitted motion: from distances that are exact by construction, from simulated paths, and from too little."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from factories import FloatArray, exact_gamma, power_functions
from scipy import integrate

from posthoc_cli.profiles import Clock, PowerFunction
from posthoc_cli.reconstruction import (
    Distance,
    Measurements,
    Motion,
    Prior,
    Steps,
    StoredAverage,
    assumed_prior,
    measured_prior,
    reconstruct,
)
from posthoc_cli.reconstruction.motion import ASSUMED_STRETCH, Pair, fit_motion

power = PowerFunction.from_sigma_rel
START = 2.0
EDGES = np.array([START, *range(50, 1001, 50)])


def motion_on(edges: FloatArray, walk: object = 1.0, noise: object = 0.0) -> Motion:
    """Return a motion; a number holds for all segments."""
    return Motion(edges, *(np.broadcast_to(np.asarray(v, np.float64), edges.size - 1) for v in (walk, noise)))


def distance(p: PowerFunction, q: PowerFunction, motion: Motion) -> Pair:
    """The distance of two averages, the later one first, by quadrature of the defining integrals."""
    total = 0.0
    for a, b in pairwise(sorted({*motion.edges[motion.edges < p.t], q.t, p.t})):
        segment = int(np.searchsorted(motion.edges, (a + b) / 2, side="right")) - 1
        for weight, name in ((motion.walk[segment], "tail"), (motion.noise[segment], "density")):

            def squared(s: float, name: str = name) -> float:
                return float(getattr(p, name)(s) - getattr(q, name)(s)) ** 2

            total += weight * integrate.quad(squared, a, b, epsabs=1e-15, epsrel=1e-10)[0]
    return (p, Distance(q, total, 0.0))


def neighbours(times: Sequence[float], motion: Motion, sigma_rels: tuple[float, ...] = (0.05, 0.28)) -> list[Pair]:
    """The distances that a tracker measures: between the profiles of one time, and to the two previous times."""
    distances = []
    for index, t in enumerate(times):
        now = power_functions(t, sigma_rels)
        distances += [distance(p, q, motion) for i, p in enumerate(now) for q in now[:i]]
        before = power_functions(times[max(index - 2, 0) : index], sigma_rels)
        distances += [distance(p, q, motion) for p in now for q in before]
    return distances


def test_a_walk_is_recovered() -> None:
    """Wherever later averages contain the segment too, which the last one lacks."""
    motion = motion_on(EDGES, np.where(EDGES[1:] <= 500, 1.0, 0.1))
    fitted = fit_motion(START, EDGES[1:], neighbours(EDGES[1:], motion))[0]
    assert set(EDGES) <= set(fitted.edges)
    walk, noise = fitted.on(EDGES)
    np.testing.assert_allclose(walk[2:10], 1.0, rtol=0.1)
    np.testing.assert_allclose(walk[10:-1], 0.1, rtol=0.2)
    assert noise[2:-1].max() < 0.05 * 50**2 * 0.1


@pytest.mark.parametrize("sigma_rels", [(0.05, 0.28), (0.1,)])
def test_noise_is_distinguished_from_a_walk(sigma_rels: tuple[float, ...]) -> None:
    edges = np.array([START, *range(100, 1001, 100)])
    distances = neighbours(edges[1:], motion_on(edges, 1e-6, 1.0), sigma_rels)
    walk, noise = fit_motion(START, edges[1:], distances)[0].on(edges)
    np.testing.assert_allclose(noise[3:-1], 1.0, rtol=0.1)
    assert walk[3:-1].max() * 100**2 < 0.1


def test_too_large_and_too_small_fits_cost_the_same() -> None:
    """One pair, measured as 1, 1 and 8. The sum of the residuals (x - s_i)^2 / (x s_i) is least where
    x^2 = sum_i s_i / sum_i (1 / s_i): between the harmonic mean and the mean.
    """
    p, q = power_functions(100.0)
    fitted = fit_motion(START, [100.0], [(p, Distance(q, squared, 0.0)) for squared in (1.0, 8.0, 1.0)])[0]
    assert distance(p, q, fitted)[1].squared == pytest.approx((10 / (1 + 1 + 1 / 8)) ** 0.5, rel=1e-4)


# --- the prior from headers ------------------------------------------------------------------------


def average(t: float, sigma_rel: float, norm: float, *distances: Distance, rounding: float = 0.0) -> StoredAverage:
    profile = PowerFunction(exact_gamma(sigma_rel), t)
    return StoredAverage(profile, int(t), 2.0**-23, Measurements(norm, rounding, distances))


def pair_at_10(squared: float) -> list[StoredAverage]:
    """Two averages at time 10 that agree on the squared distance between them."""
    return [
        average(10.0, s, 4.0, Distance(power(other, 10.0), squared, 0.0)) for s, other in ((0.05, 0.25), (0.25, 0.05))
    ]


ALONE = average(10.0, 0.1, 4.0)


def test_weights_that_stand_still_have_no_motion() -> None:
    late, early = PowerFunction(6.9, 100.0), PowerFunction(6.9, 50.0)
    fitted = fit_motion(START, [50.0, 100.0], [(late, Distance(early, 1e-30, 1e-30))])[0]
    assert np.all(np.isfinite(fitted.walk))
    prior = measured_prior([ALONE, average(20.0, 0.1, 4.0, Distance(power(0.1, 10.0), 0.0, 0.0))])
    result = reconstruct(power_functions(20.0, (0.1,)), power_functions(20.0, (0.2,)), prior=prior.of([1]))
    assert result.predicted_error[0] < 1e-6


def test_the_distance_of_two_averages_of_one_profile_is_ignored() -> None:
    """It is rounding, or a mistake; no motion explains it."""
    twin = Distance(power(0.1 * (1 + 1e-9), 20.0), 5.0, 0.0)
    real = Distance(power(0.1, 10.0), 0.5, 0.0)
    with_twin, without = (
        measured_prior([ALONE, average(20.0, 0.1, 4.0, *distances)]) for distances in ((real, twin), (real,))
    )
    assert with_twin.source == without.source == "measured"
    np.testing.assert_array_equal(with_twin.motion.walk, without.motion.walk)
    only_twin = measured_prior([ALONE, average(20.0, 0.1, 8.0, twin)])
    assert only_twin.source == "assumed"
    np.testing.assert_array_equal(only_twin.motion.walk * 20.0, [ASSUMED_STRETCH**2 * 6.0])


def test_without_motion_or_without_distances_the_prior_is_defined() -> None:
    still = pair_at_10(0.0)
    prior = measured_prior(still)
    assert prior.source == measured_prior(pair_at_10(0.5)).source == "measured"
    assert prior.motion.walk.max() < prior.arithmetic.max()
    zeros = measured_prior([replace(a, measurements=replace(a.measurements, norm=0.0)) for a in still])
    assert zeros.source == "measured"
    assert (zeros.motion.edges[-1], zeros.motion.walk.sum()) == (10.0, 0.0)
    assert (
        measured_prior([replace(ALONE, measurements=None), *still]).source
        == measured_prior([ALONE]).source
        == "assumed"
    )
    assumed = measured_prior([ALONE]).motion
    assert assumed.edges[-1] == 10.0
    # Over all of training the path has the length ASSUMED_STRETCH of the norm.
    assert np.sum(assumed.walk * np.diff(assumed.edges)) == pytest.approx(ASSUMED_STRETCH**2 * 4.0)


@pytest.mark.parametrize("steps", [None, Steps(Clock.of_steps())])
def test_a_longer_run_of_the_same_training_has_the_same_errors(steps: Steps | None) -> None:
    """The same snapshots, at the same fractions of both runs, give averages of equal error, relative to the norm."""
    motion = Motion(np.array([1.0, 300.0, 1000.0]), np.array([2.0, 0.5]), np.array([40.0, 10.0]))
    zeros, norm = np.zeros(6), 9.0
    prior = Prior(motion, zeros, zeros, np.full(6, norm), "measured", steps)
    found = []
    relative = replace(motion, walk=motion.walk / norm, noise=motion.noise / norm)
    for t, expected in ((1000.0, relative), (4000.0, prior.stretched(4000.0, 1000.0, norm))):
        snapshots = power_functions([0.5 * t, 0.8 * t, t], (0.05, 0.28))
        targets = [PowerFunction.from_sigma_rel(width, t) for width in (0.08, 0.15)]
        found.append(reconstruct(snapshots, targets, prior=assumed_prior(snapshots, motion=expected)).predicted_error)
    assert found[1] == pytest.approx(found[0], rel=0.01)  # the short run begins with its first update, at 1
