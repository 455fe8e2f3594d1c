"""Correlated rounding errors of stored copies, against values that are really rounded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction.motion import assumed_prior, error_after_rounding, inherited_factor, rounding_factor
from posthoc_cli.snapshots.path import encode_sample, places, uneven_motion
from posthoc_cli.snapshots.tensorfile import Entry


@pytest.mark.parametrize("spacings", [0.0, 0.05, 0.15, 0.3, 0.6, 3.0])
def test_the_correlation_is_that_of_values_that_move(spacings: float) -> None:
    """Displacements are Gaussian, in units of the spacing; 200,000 elements of one binade are rounded to float16."""
    generator = np.random.default_rng(0)
    spacing = 2.0**-10
    values = generator.uniform(1.1, 1.9, 200_000)
    moved = values + spacings * spacing * generator.normal(size=values.size)
    errors = [x.astype(np.float16).astype(np.float64) - x for x in (values, moved)]
    measured = np.array([[a @ b for b in errors] for a in errors])
    apart = np.sum((moved - values) ** 2) * (1 - np.eye(2))
    factor = rounding_factor(np.diag(measured), np.zeros(2), apart)
    # Sums of products of 200,000 errors scatter by about 1 / sqrt(200,000); the correlation is limited to 0.99.
    np.testing.assert_allclose(factor.T @ factor, measured, atol=0.025 * measured[0, 0])


@pytest.mark.parametrize("spacings", [0.1, 0.3, 1.0])
def test_where_elements_move_unevenly_the_slow_ones_keep_their_errors(spacings: float) -> None:
    """A sample of 512 shows how unevenly: by log-normal distances, in few large values and many small ones."""
    generator, sizes = np.random.default_rng(0), {"large": 4_000, "small": 496_000}
    values = np.concatenate(
        [scale * generator.uniform(1.1, 1.9, n) for scale, n in zip((8, 1), sizes.values(), strict=True)]
    )
    steps = spacings * 2.0**-10 * np.exp(generator.normal(0, 1, values.size)) * generator.normal(size=(20, values.size))
    path = values + np.vstack((np.zeros(values.size), np.cumsum(steps / np.sqrt(20), axis=0)))
    errors = [x.astype(np.float16).astype(np.float64) - x for x in path[[0, -1]]]
    measured = np.array([[a @ b for b in errors] for a in errors])
    apart = np.sum((path[-1] - path[0]) ** 2) * (1 - np.eye(2))
    stored = {name: Entry("F16", (size,)) for name, size in sizes.items()}
    chosen = [
        index + sizes["large"] * (name == "small") for name, index in places({n: e.shape for n, e in stored.items()})
    ]
    uneven = uneven_motion([[encode_sample(row[chosen], row[chosen]) for row in path]], stored)
    found = [rounding_factor(np.diag(measured), np.zeros(2), apart, each) for each in (uneven, None)]
    right, even = ((factor.T @ factor)[0, 1] / measured[0, 0] for factor in found)
    # A sample of 512 shows a correlation up to about 1 / sqrt(512).
    true = measured[0, 1] / measured[0, 0]
    assert abs(right - true) < 0.08
    assert abs(even - true) > 0.1


def test_inherited_errors_are_correlated_as_far_as_averages_contain_the_same_values() -> None:
    """100,000 averages of three profiles continue from a rounded value at each time; the last profile only at first."""
    generator, times, gammas = np.random.default_rng(0), np.array([100.0, 110.0, 150.0, 400.0]), (0.1, 4.0, 2.0)
    errors: list[np.ndarray] = []
    for index, (gamma, fresh) in enumerate(zip(gammas, (1.0, 2.0, 0.0), strict=True)):
        error = generator.normal(size=100_000)
        for place, t in enumerate(times):
            if place:
                error = error * (times[place - 1] / t) ** (gamma + 1) + fresh * generator.normal(size=error.size)
            errors.insert(place * (index + 1) + index, error)  # in the order of time
    measured = np.array([[np.mean(a * b) for b in errors] for a in errors])
    gamma, t = np.tile(gammas, 4), np.repeat(times, 3)
    factor, passed_on = inherited_factor(np.diag(measured), np.zeros(12), gamma, t)
    assert not passed_on.any()
    np.testing.assert_allclose(np.diag(factor.T @ factor), np.diag(measured), rtol=1e-12)
    # Means of 100,000 products scatter by 1 / sqrt(100,000); correlations count as 0.9 of a standard deviation.
    scale = np.sqrt(np.outer(np.diag(measured), np.diag(measured)))
    trusted = np.where(np.eye(12) > 0, 1.0, 0.9**2)
    np.testing.assert_allclose(factor.T @ factor / scale, trusted * measured / scale, atol=0.015)


def test_errors_inherited_from_a_snapshot_are_its_rounding_errors() -> None:
    """100,000 averages are rounded at four times, and continue from the rounded value of the second."""
    generator, times, rounding = np.random.default_rng(0), np.array([100.0, 110.0, 150.0, 400.0]), np.ones(4)
    own = generator.normal(size=(4, 100_000))
    shares = np.array([0.0, 0.0, (110 / 150) ** 1.5, (110 / 400) ** 1.5])
    inherited = shares[:, None] * own[1]
    factor, passed_on = inherited_factor(shares**2, rounding, np.full(4, 0.5), times)
    stored, errors = np.eye(4) + passed_on, own + inherited
    expected, measured = stored.T @ stored + factor.T @ factor, errors @ errors.T / 100_000
    np.testing.assert_allclose(np.diag(expected), np.diag(measured), atol=0.015)
    np.testing.assert_allclose(expected[1, 2:], 0.9 * measured[1, 2:], atol=0.015)
    # Without the second and its rounding, what came from it is still an error that the later two have in common.
    prior = replace(assumed_prior([PowerFunction(0.5, t) for t in times], 1.0), passed_on=passed_on).of([0, 2, 3])
    assert prior.shared is not None and prior.passed_on is not None
    np.testing.assert_allclose(prior.shared @ prior.shared.T, 0.81 * np.outer(shares, shares)[[0, 2, 3]][:, [0, 2, 3]])
    assert not prior.passed_on.any()


@pytest.mark.parametrize(("share", "resumes"), [(0.5, 30), (0.05, 30), (0.01, 100), (1e-3, 30), (1e-4, 100)])
def test_the_error_of_resumes_is_that_of_averages_that_are_rounded_repeatedly(share: float, resumes: int) -> None:
    """20,000 averages on a grid of spacing 1 move towards values 3 to 30 away, and are rounded after every step:
    averages that move by less than half a spacing do not change, and their errors add up.
    """
    generator = np.random.default_rng(4)
    values = generator.uniform(3, 30, 20_000)
    exact = begun = np.round(generator.uniform(-0.5, 0.5, 20_000))
    error = 0.0
    for _ in range(resumes):
        exact = exact + share * (values - exact)
        moving = begun + share * (values - begun)
        rounded = np.round(moving)
        error = error_after_rounding(
            error * (1 - share) ** 2, float(np.sum((rounded - moving) ** 2)), rounded.size / 12,
            float(np.sum((moving - begun) ** 2)), share,
        )  # fmt: skip
        begun = rounded
    true = float(np.sum((rounded - exact) ** 2))
    assert 0.5 < np.sqrt(true / error) < 2
