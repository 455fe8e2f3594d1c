"""The estimate of the best length: the stated range contains it, and is as wide as the noise requires."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from posthoc_cli.sweep import Axis
from posthoc_cli.sweep.search import NEXT, POINTS, Search, Trial, estimate, first_batch, next_batch

LOW, HIGH = 0.02, 0.28
AXIS = Axis("sigma_rel", LOW, HIGH)


def trial(x: float, value: float, standard_error: float | None = None, seed: int = 0) -> Trial:
    return Trial(f"sigma_rel {x:g}", x, seed, value, standard_error)


def bowl(x: float, best: float = 0.09) -> float:
    return math.log(x / best) ** 2


def trials(noise: float, count: int = 12, seed: int = 0, sign: float = 1.0) -> list[Trial]:
    random = np.random.default_rng(seed)
    return [trial(x, sign * (bowl(x) + noise * random.normal())) for x in np.geomspace(LOW, HIGH, count).tolist()]


@pytest.mark.parametrize("sign", [1, -1])
def test_without_noise_a_parabola_is_known_after_one_batch(sign: int) -> None:
    found = estimate(trials(0, 6, sign=sign), AXIS, minimize=sign > 0)
    assert found.best == pytest.approx(0.09, rel=0.02)  # of the grid's spacing, 2.7 %
    assert found.low <= 0.09 <= found.high < 1.1 * found.low
    assert abs(found.mean) < 0.01
    assert found.settled
    assert found.xs.shape == found.curve.shape == found.errors.shape == (POINTS,)
    assert np.allclose(found.curve, [sign * bowl(x) for x in found.xs.tolist()], atol=0.02)
    for unit in (1e-9, 1e9):  # the unit of the metric changes nothing
        other = estimate([trial(t.x, unit * (t.value or 0)) for t in trials(0, 6, sign=sign)], AXIS, minimize=sign > 0)
        assert (other.best, other.low, other.high) == pytest.approx((found.best, found.low, found.high))
        assert other.mean / unit == pytest.approx(found.mean)


def test_the_range_contains_the_best_as_often_as_stated() -> None:
    """With a coverage of 95 %, fewer than 24 of 30 searches contain it once in 1,700 cases."""
    estimates = [estimate(trials(0.5, seed=seed), AXIS) for seed in range(30)]
    assert sum(found.low <= 0.09 <= found.high for found in estimates) >= 24
    assert np.mean([math.log(found.high / found.low) for found in estimates]) < 0.8 * math.log(HIGH / LOW)


def test_more_noise_widens_the_range_and_a_stated_error_is_believed() -> None:
    widths = [math.log(found.high / found.low) for found in (estimate(trials(n), AXIS) for n in (0, 0.1, 1.0))]
    assert widths[0] < widths[1] < widths[2]
    unsure = [trial(t.x, t.value, standard_error=1.0) for t in trials(0)]
    assert estimate(unsure, AXIS).high / estimate(unsure, AXIS).low > 1.5
    assert estimate(unsure, AXIS).noise == pytest.approx(1.0)


def test_the_offset_of_a_seed_is_not_noise() -> None:
    offset = {0: 0.0, 1: 5.0, 2: -3.0}
    shared = [trial(x, bowl(x) + offset[seed], seed=seed) for seed in offset for x in first_batch(AXIS)]
    found = estimate(shared, AXIS)
    assert found.low <= 0.09 <= found.high < 1.25 * found.low


@pytest.mark.parametrize(
    "values",
    [[1.0] * 12, [0.0] * 6 + [1.0] * 6, [1, 0] * 6, [100.0 if k == 3 else 0.0 for k in range(12)]],
    ids=["constant", "a-step", "two-values", "an-outlier"],
)
def test_odd_metrics_give_finite_numbers_and_no_narrow_range(values: list[float]) -> None:
    given = [trial(t.x, value) for t, value in zip(trials(0), values, strict=True)]
    found = estimate(given, AXIS)
    assert all(map(math.isfinite, (found.best, found.mean, found.standard_error, found.regret)))
    assert LOW <= found.low <= found.best <= found.high <= HIGH
    assert found.high > 1.3 * found.low


def test_the_next_batch_lies_where_the_best_may_be_and_repeats_near_lengths() -> None:
    first = [trial(x, bowl(x)) for x in first_batch(AXIS)]
    noisy = [trial(t.x, t.value, standard_error=1.5) for t in first]
    found = estimate(noisy, AXIS)
    proposed = next_batch(found, noisy)
    assert 1 < len(proposed) <= NEXT
    assert all(found.low <= x <= found.high for x in proposed)
    crowded = [trial(x, bowl(x), standard_error=30.0) for x in np.geomspace(0.0201, 0.279, 60).tolist()]
    assert set(next_batch(estimate(crowded, AXIS), crowded, repeat=True)) <= {t.x for t in crowded}


def test_one_far_value_does_not_hide_the_best() -> None:
    """A wrong trial may have a value far from all others."""
    values = {x: math.log(x / 0.1) ** 2 for x in (0.02, 0.034, 0.057, 0.097, 0.16, 0.28)}
    for place in (0.034, 0.16):
        found = estimate([trial(x, 1000.0 if x == place else value) for x, value in values.items()], AXIS)
        assert found.low <= 0.1 <= found.high
        assert abs(found.mean) < 10
    well = [trial(x, -1000.0 if x in (0.097, 0.16) else value) for x, value in values.items()]
    assert 0.08 < estimate(well, AXIS).best < 0.2


# --- the rounds of a search


def searched(noise: float, budget: int, repeats: int = 1, seed: int = 0) -> Search:
    """Search a bowl within the range."""
    search = Search(AXIS, minimize=True, budget=budget, repeats=repeats, again=True)
    random = np.random.default_rng(seed)

    def measure(wanted: Sequence[tuple[float, int]]) -> list[Trial]:
        return [trial(x, bowl(x) + noise * random.normal(), seed=number) for x, number in wanted]

    *_, _ = search.rounds(measure)
    return search


def test_a_search_stops_when_further_trials_would_hardly_help() -> None:
    """More noise needs more trials; the chosen length is then worse than the best by a small part of the noise."""
    counts = []
    for noise in (0.1, 1.0):
        done = [searched(noise, 60, seed=seed) for seed in range(12)]
        assert all(search.stopped == "the best length is known within the noise" for search in done)
        counts.append(np.mean([len(search.trials) for search in done]))
        assert np.mean([bowl(search.found.best) for search in done]) < noise / 6
    assert 6 <= counts[0] < 8
    assert 9 < counts[1] < 15


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_search_measures_as_many_lengths_as_its_budget(repeats: int) -> None:
    """A length that is measured again with other seeds counts again."""
    done = [searched(1.0, 7, repeats, seed) for seed in range(8)]
    assert any(search.stopped == "the budget is spent" for search in done)
    for search in done:
        assert len({(one.x, one.seed) for one in search.trials}) == len(search.trials) <= 7 * repeats
        if search.stopped == "the budget is spent":
            assert len(search.trials) == 7 * repeats
