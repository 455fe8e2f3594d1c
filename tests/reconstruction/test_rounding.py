"""Errors of copies that are rounded alike, against values that are really rounded."""

from __future__ import annotations

import numpy as np
import pytest

from posthoc_cli.reconstruction.prior import error_after_rounding, inherited_factor, rounding_factor


@pytest.mark.parametrize("spacings", [0.0, 0.05, 0.15, 0.3, 0.6, 3.0])
def test_the_correlation_is_that_of_values_that_move(spacings: float) -> None:
    """Gaussian displacements of so many spacings, 200,000 elements of one binade, rounded to float16."""
    generator = np.random.default_rng(0)
    spacing = 2.0**-10
    values = generator.uniform(1.1, 1.9, 200_000)
    moved = values + spacings * spacing * generator.normal(size=values.size)
    errors = [x.astype(np.float16).astype(np.float64) - x for x in (values, moved)]
    measured = np.array([[a @ b for b in errors] for a in errors])
    apart = np.sum((moved - values) ** 2) * (1 - np.eye(2))
    factor = rounding_factor(np.diag(measured), np.zeros(2), apart)
    # Sums of products of 200,000 errors scatter by about 1 / sqrt(200,000) of them, and the
    # correlation is kept below 0.99.
    np.testing.assert_allclose(factor.T @ factor, measured, atol=0.025 * measured[0, 0])


def test_far_ones_are_independent_and_equal_ones_are_one() -> None:
    rounding = np.array([1.0, 4.0, 9.0])
    far = rounding_factor(rounding, np.zeros(3), 1e3 * (1 - np.eye(3)))
    np.testing.assert_array_equal(far, np.diag([1.0, 2.0, 3.0]))
    alike = rounding_factor(rounding, np.zeros(3), np.zeros((3, 3)))
    root = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(alike.T @ alike, np.outer(root, root), rtol=0.011)


def test_nothing_rounded_is_no_trouble() -> None:
    np.testing.assert_array_equal(rounding_factor(np.zeros(3), np.zeros(3), np.zeros((3, 3))), np.zeros((3, 3)))
    mixed = rounding_factor(np.array([0.0, 1.0]), np.array([3.0, 0.0]), np.zeros((2, 2)))
    np.testing.assert_allclose(mixed.T @ mixed, np.diag([3.0, 1.0]), atol=1e-15)


def test_inherited_errors_are_alike_as_far_as_averages_have_the_same_values() -> None:
    """100,000 averages that go on from a rounded value at each time, of three profiles; the last one only at first."""
    generator, times, gammas = np.random.default_rng(0), np.array([100.0, 110.0, 150.0, 400.0]), (0.1, 4.0, 2.0)
    errors: list[np.ndarray] = []
    for index, (gamma, fresh) in enumerate(zip(gammas, (1.0, 2.0, 0.0), strict=True)):
        error = generator.normal(size=100_000)
        for place, t in enumerate(times):
            if place:
                error = error * (times[place - 1] / t) ** (gamma + 1) + fresh * generator.normal(size=error.size)
            errors.insert(place * (index + 1) + index, error)  # growing in time
    measured = np.array([[np.mean(a * b) for b in errors] for a in errors])
    gamma, t = np.tile(gammas, 4), np.repeat(times, 3)
    factor = inherited_factor(np.diag(measured), gamma, t)
    np.testing.assert_allclose(np.diag(factor.T @ factor), np.diag(measured), rtol=1e-12)
    # Means of 100,000 products scatter by 1 / sqrt(100,000).
    scale = np.sqrt(np.outer(np.diag(measured), np.diag(measured)))
    np.testing.assert_allclose(factor.T @ factor / scale, measured / scale, atol=0.015)


def test_inherited_errors_that_are_less_than_what_is_left_of_earlier_ones_are_no_trouble() -> None:
    """Of averages that went on from an exact state since then, and of those without any."""
    factor = inherited_factor(np.array([4.0, 0.1, 0.0, 0.0]), np.full(4, 0.5), np.array([9.0, 10.0, 11.0, 12.0]))
    np.testing.assert_allclose(np.diag(factor.T @ factor), [4.0, 0.1, 0.0, 0.0], rtol=1e-12)
    np.testing.assert_array_equal(inherited_factor(np.zeros(2), np.ones(2), np.ones(2)), np.zeros((2, 2)))


@pytest.mark.parametrize(("share", "resumes"), [(0.5, 30), (0.05, 30), (0.01, 100), (1e-3, 30), (1e-4, 100)])
def test_the_error_of_resumes_is_that_of_averages_that_were_rounded_again_and_again(share: float, resumes: int) -> None:
    """20,000 averages on a grid of spacing 1 that go towards values 3 to 30 away, and are rounded after every step:
    those that move by less than half a spacing stay where they are, and their errors add up.
    """
    generator = np.random.default_rng(4)
    values = generator.uniform(3, 30, 20_000)
    rounded = exact = generator.uniform(-0.5, 0.5, 20_000)
    begun = rounded = np.round(rounded)
    exact = begun.copy()
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
