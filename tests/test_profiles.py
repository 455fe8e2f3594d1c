"""Profiles against mpmath and against sums and integrals written here."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import (
    UNIFORM_SIGMA_REL,
    PowerFunction,
    classical_beta,
    gamma_from_sigma_rel,
    mean_age,
    new_value_share,
    sigma_rel_from_classical_beta,
    sigma_rel_from_gamma,
)

# beta for sigma_rel after 1,000 steps, as users of another library know it.
KNOWN_TABLE = {0.001: 0.3700, 0.01: 0.9055, 0.03: 0.9680, 0.05: 0.9808, 0.1: 0.9911, 0.15: 0.9944, 0.2: 0.9962}


def exact_gamma_plus_one(sigma_rel: float) -> mpmath.mpf:
    """The largest root of x**3 + 4 x**2 + (5 - sigma_rel**-2) x + 2, to 50 digits."""
    with mpmath.workdps(50):
        roots = mpmath.polyroots([1, 4, 5 - 1 / mpmath.mpf(sigma_rel) ** 2, 2], maxsteps=500, extraprec=500)
        return max(mpmath.re(root) for root in roots)


@pytest.mark.parametrize("sigma_rel", [*np.geomspace(1e-4, 0.28867, 60), 0.288675, 1e-6, 0.999e-6, 1e-9, 0.28])
def test_gamma_agrees_with_fifty_digits(sigma_rel: float) -> None:
    exact = exact_gamma_plus_one(sigma_rel)
    assert abs((gamma_from_sigma_rel(sigma_rel) + 1) - exact) <= 1e-12 * exact


@given(st.floats(1e-4, 0.28867))
def test_sigma_rel_survives_the_way_to_gamma_and_back(sigma_rel: float) -> None:
    # d log(sigma_rel) / d log(gamma + 1) is at most 1, and rounding enters a few times.
    assert sigma_rel_from_gamma(gamma_from_sigma_rel(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-13)


@pytest.mark.parametrize("wrong", ["0.15", None, [0.15]])
def test_what_is_no_number_is_no_sigma_rel_and_the_error_says_so(wrong: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^sigma_rel .*: must be a number, and lie in \(0, 0\.2887\)"):
        gamma_from_sigma_rel(wrong)


@pytest.mark.parametrize("sigma_rel", [UNIFORM_SIGMA_REL, math.inf, -math.inf])
def test_an_impossible_sigma_rel_is_refused_with_the_range(sigma_rel: float) -> None:
    with pytest.raises(InvalidValueError, match=r"must lie in \(0, 0\.2887\)"):
        gamma_from_sigma_rel(sigma_rel)
    with pytest.raises(InvalidValueError, match="gamma"):
        sigma_rel_from_gamma(0.0)


def test_the_share_of_an_update_follows_the_true_interval() -> None:
    gamma = gamma_from_sigma_rel(0.05)
    assert new_value_share(gamma, 990, 1000) == pytest.approx(1 - 0.99 ** (gamma + 1), rel=1e-13)
    assert new_value_share(gamma, 990, 1000) > 1 - (1 - 1 / 1000) ** (gamma + 1)  # what an interval of 1 would give
    assert new_value_share(16.97, 0, 10) == 1.0  # the first update is taken whole


def test_the_share_of_a_new_value_keeps_its_digits_late_in_training() -> None:
    gamma = gamma_from_sigma_rel(0.28)
    with mpmath.workdps(50):
        exact = 1 - (mpmath.mpf(10**12 - 1) / 10**12) ** (mpmath.mpf(gamma) + 1)
    assert new_value_share(gamma, 10**12 - 1, 10**12) == pytest.approx(float(exact), rel=1e-14)


@given(st.floats(0.01, 0.288), st.lists(st.floats(0.01, 100), min_size=1, max_size=30))
def test_a_chain_of_updates_leaves_the_profiles_own_mass_on_each_value(sigma_rel: float, steps: list[float]) -> None:
    gamma, times = gamma_from_sigma_rel(sigma_rel), np.cumsum(steps)
    left, t_prev = np.zeros(len(times)), 0.0
    for index, t in enumerate(times):
        share = new_value_share(gamma, t_prev, t)
        left *= 1 - share
        left[index] += share
        t_prev = t
    by_definition = np.diff((np.concatenate(([0.0], times)) / times[-1]) ** (gamma + 1))
    np.testing.assert_allclose(left, by_definition, atol=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.15, 0.28])
def test_density_and_tail_are_those_of_one_distribution(sigma_rel: float) -> None:
    profile = PowerFunction.from_sigma_rel(sigma_rel, 500.0)
    for s in (1.0, 100.0, 450.0, 499.0):
        assert profile.tail(s) == pytest.approx(integrate.quad(profile.density, s, 500)[0], rel=1e-9)
    mean = integrate.quad(lambda s: s * profile.density(s), 0, 500)[0]
    variance = integrate.quad(lambda s: (s - mean) ** 2 * profile.density(s), 0, 500)[0]
    assert math.sqrt(variance) / 500 == pytest.approx(sigma_rel, rel=1e-8)
    assert profile.sigma_rel == pytest.approx(sigma_rel, rel=1e-12)


@pytest.mark.parametrize(("sigma_rel", "known"), KNOWN_TABLE.items())
def test_the_table_that_users_know_follows_from_equal_mean_age(sigma_rel: float, known: float) -> None:
    gamma = gamma_from_sigma_rel(sigma_rel)
    steps = np.arange(1, 1001)
    weights = (steps / 1000) ** (gamma + 1) - ((steps - 1) / 1000) ** (gamma + 1)
    age = float(np.sum(weights * (1000 - steps)))
    assert mean_age(gamma, 1000) == pytest.approx(age, rel=1e-9)
    assert classical_beta(sigma_rel, 1000) == pytest.approx(age / (1 + age), rel=1e-12)
    assert classical_beta(sigma_rel, 1000) == pytest.approx(known, abs=0.002)


@given(st.floats(0.001, 0.2886), st.sampled_from([100, 1000, 54_321, 5_000_000]))
def test_beta_and_back_gives_the_sigma_rel(sigma_rel: float, steps: int) -> None:
    found = sigma_rel_from_classical_beta(classical_beta(sigma_rel, steps), steps)
    assert found == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("sigma_rel", [1e-8, 1e-7, 1e-6, 1.02e-5, 1.1e-5, 3e-5, 1e-3, 0.05, 0.28])
def test_the_closed_form_for_long_runs_agrees_with_the_sum(sigma_rel: float) -> None:
    steps = 1_000_001  # the first length that is not summed term by term
    gamma = gamma_from_sigma_rel(sigma_rel)
    direct = float(np.sum(np.exp((gamma + 1) * np.log(np.arange(1, steps) / steps))))
    # Where the first term that is left out is largest, (x/T)**5 / 30240 of an age of T/x, x = T/10: 3e-11.
    assert mean_age(gamma, steps) == pytest.approx(direct, rel=1e-10)


def test_training_has_at_least_a_step() -> None:
    assert mean_age(1.0, 1) == 0.0
    # Two steps: the mean age is (1/2)**(gamma + 1), here 1/4, and beta / (1 - beta) the same.
    assert sigma_rel_from_classical_beta(0.2, 2) == pytest.approx(18**-0.5, rel=1e-12)
    for steps in (1, 3):  # the latter is the uniform average's
        with pytest.raises(InvalidValueError, match="must lie in"):
            sigma_rel_from_classical_beta(0.5, steps)
