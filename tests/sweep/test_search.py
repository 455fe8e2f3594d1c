"""The estimate of the best length from noisy metrics, and the order in which lengths are
measured."""

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.interpolate import PchipInterpolator
from sweep.searching import make_search, search_all

from posthoc_cli.sweep import Lengths
from posthoc_cli.sweep.estimate import fit_quadratics
from posthoc_cli.sweep.search import FIRST_COUNT, USUAL_COUNT
from posthoc_cli.sweep.trial import FRESH, Trial

LOW = 0.02
HIGH = 0.28
LENGTHS = Lengths(LOW, HIGH)
STEP = math.log(HIGH / LOW) / (USUAL_COUNT - 1)


def bowl(x, best=0.09):
    return math.log(x / best) ** 2


def trial(x, value, seed=0, **fields):
    return Trial(f"sigma_rel {x:g}", x, seed, value, **fields)


def searched(value_of, lengths=LENGTHS, before=(), **options):
    """Search by a function of the length."""
    search = make_search(lengths, trials=tuple(before), **options)
    return search_all(search, lambda spot, _: value_of(spot.sigma_rel))


def found(trials, lengths=LENGTHS, **options):
    return make_search(lengths, trials=tuple(trials), **options)


def noisy(noise, seed=0, best=0.09):
    """Return a bowl as a metric with noise."""
    random = np.random.default_rng(seed)
    return lambda x: bowl(x, best) + noise * random.normal()


def test_a_local_quadratic_gives_value_slope_and_curvature_of_a_quadratic_exactly():
    places = np.log(LENGTHS.grid(12))
    rows = fit_quadratics(places, np.ones(12), 2.5 * STEP)
    values = 3 - 2 * places + 5 * places**2
    exact = [values, -2 + 10 * places, 5 + 0 * places]
    assert_allclose(rows @ values, exact, rtol=1e-8)


@pytest.mark.parametrize("unit", [1, -1e-9])
def test_of_a_metric_without_noise_six_lengths_their_best_again_and_the_vertex_are_measured(unit):
    search = searched(lambda x: unit * bowl(x), minimize=unit > 0)
    best = search.estimate
    assert best.best == pytest.approx(0.09, rel=0.02)
    assert best.noise == 0
    assert best.tied is None
    assert_allclose(best.means, [unit * bowl(x) for x in best.points], rtol=1e-12)
    seeds = [each.seed for each in search.trials]
    assert seeds[: FIRST_COUNT + 1] == [0] * FIRST_COUNT + [1]
    assert len(seeds) in (FIRST_COUNT + 2, FIRST_COUNT + 3)
    first = search.trials[:FIRST_COUNT]
    assert (
        search.trials[FIRST_COUNT].sigma_rel == min(first, key=lambda t: unit * t.value).sigma_rel
    )
    assert search.value == unit * bowl(best.best)


def test_of_a_metric_with_noise_all_twelve_are_measured_and_the_best_afresh():
    search = searched(noisy(0.3))
    assert {*LENGTHS.grid(USUAL_COUNT)} <= {each.sigma_rel for each in search.trials}
    *_, first, second = search.trials
    assert (first.seed, second.seed) == FRESH
    assert first.sigma_rel == second.sigma_rel == search.best.sigma_rel
    assert search.value == (first.value + second.value) / 2
    assert len(search.trials) <= 18


@pytest.mark.statistical
@pytest.mark.parametrize("noise", [0.05, 0.5])
def test_the_noise_and_the_standard_errors_are_those_of_the_metric(noise):
    """Over 100 searches, whose means are close to the expectations."""
    estimates = [searched(noisy(noise, seed)).estimate for seed in range(100)]
    variances = [each.noise**2 for each in estimates]
    assert math.sqrt(np.mean(variances)) == pytest.approx(noise, rel=0.2)
    off = []
    stated = []
    for each in estimates:
        place = abs(np.log(each.points / 0.04)).argmin()
        off.append(each.means[place] - bowl(each.points[place]))
        stated.append(each.errors[place])
    assert np.std(off) == pytest.approx(np.mean(stated), rel=0.35)


@pytest.mark.statistical
def test_the_tied_lengths_contain_the_best_one_and_the_choice_is_within_the_noise():
    right = 0
    regrets = []
    for seed in range(40):
        each = searched(noisy(0.5, seed)).estimate
        low, high = each.tied
        assert low <= each.best <= high
        nearest = each.points[abs(np.log(each.points / 0.09)).argmin()]
        right += low <= nearest <= high
        regrets.append(bowl(each.best))
    assert right >= 34
    assert np.mean(regrets) < 0.5 / 3


def gain_over(own, metric, seed):
    """Search a metric beside weights whose own metric is known, as a sweep does; return the true
    gain, the estimated one and its margin."""
    random = np.random.default_rng(seed)
    search = searched(lambda x: metric(x) + 0.3 * random.normal())
    own_mean = own + 0.3 * random.normal(size=2).mean()
    return own - metric(search.best.sigma_rel), own_mean - search.value, search.margin(2)


@pytest.mark.statistical
def test_the_interval_of_a_gain_holds_the_true_one_and_none_is_claimed_where_there_is_none():
    """Of an own EMA of the best length, whose gain is at most 0, and of a worse one."""
    gains = [gain_over(own, bowl, seed) for seed in range(150) for own in (0.0, 1.5)]
    inside = [abs(estimated - true) <= margin for true, estimated, margin in gains]
    assert 0.91 <= np.mean(inside) <= 0.99
    claimed = [estimated > margin for _, estimated, margin in gains]
    assert np.mean(claimed[::2]) <= 0.05
    assert np.mean(claimed[1::2]) >= 0.9


@pytest.mark.statistical
def test_the_metric_of_the_best_length_is_not_that_of_the_luckiest_trial():
    """Of a metric without any slope. Its mean over 200 searches has an error of 2 ** -0.5 / 200 **
    0.5, 0.05; the lowest of 12 is at -1.63 in the mean."""
    random = np.random.default_rng(0)
    values = [searched(lambda _: random.normal()).value for _ in range(200)]
    assert abs(np.mean(values)) < 3 * 0.05


def test_what_was_measured_afresh_decides_nothing_among_the_lengths():
    search = searched(noisy(0.3))
    before = [each for each in search.trials if each.seed not in FRESH]
    assert found(before).estimate.best == search.estimate.best
    worst = [replace(each, value=9.0) if each.seed in FRESH else each for each in search.trials]
    assert found(worst).best == search.best
    assert found(worst).value == 9


def test_of_repetitions_alike_the_stated_error_gives_the_interval_else_nothing():
    """As of one test set: its examples are the same in all trials."""
    trials = searched(bowl).trials
    assert math.isnan(found(trials).margin(1))
    stated = [replace(each, standard_error=0.1) for each in trials]
    assert found(stated).estimate.noise == 0
    assert found(stated).margin(1) == 0.2
    nearly = [replace(each, value=each.value + 1e-9 * each.seed) for each in stated]
    assert 0 < found(nearly).estimate.noise < 0.1
    assert found(nearly).margin(1) == pytest.approx(0.2)


def test_a_stated_error_bounds_the_noise():
    trials = [replace(each, standard_error=0.1) for each in searched(noisy(1.0)).trials]
    assert found(trials).estimate.noise == 0.1


def test_of_a_list_each_length_is_measured_once_and_the_noise_may_be_unknown():
    lengths = Lengths.from_list([0.2, 0.05, 0.1])
    search = searched(bowl, lengths)
    trials = search.trials
    assert [(each.sigma_rel, each.seed) for each in trials] == [(0.05, 0), (0.1, 0), (0.2, 0)]
    best = search.estimate
    assert best.best == 0.1
    assert math.isnan(best.noise)
    assert best.tied is None


def test_of_a_longer_list_the_best_is_measured_twice_so_that_no_curve_is_taken_for_noise():
    """That of 0.13, although a smooth curve through its neighbours is lower at 0.1."""
    metric = {0.02: 0.0414, 0.05: 0.0345, 0.1: 0.03102, 0.13: 0.0308, 0.2: 0.035, 0.28: 0.084}
    lengths = Lengths.from_list([*metric])
    search = searched(metric.get, lengths)
    assert len(search.trials) == 7
    best = search.estimate
    assert best.best == 0.13
    assert best.noise == 0


def test_without_a_direction_only_the_grid_is_measured():
    search = searched(bowl, minimize=None)
    assert [each.sigma_rel for each in search.trials] == LENGTHS.grid(6)
    search = searched(bowl, minimize=None, most=9)
    assert [each.sigma_rel for each in search.trials] == LENGTHS.grid(6)


def test_one_far_value_does_not_hide_the_best():
    """A wrong trial may have a metric far from all others."""
    trials = []
    for each in searched(noisy(0.01)).trials:
        is_wrong = each.sigma_rel == LENGTHS.grid(12)[4]
        trials.append(replace(each, value=1000.0) if is_wrong else each)
    best = found(trials).estimate
    assert best.best == pytest.approx(0.09, rel=0.2)
    assert best.shown.tolist().count(False) == 1


A_STEP = [0.0] * 6 + [1.0] * 6
TWO_VALUES = [1.0, 0.0] * 6


@pytest.mark.parametrize("values", [A_STEP, TWO_VALUES])
def test_odd_metrics_give_finite_numbers(values):
    measured = dict(zip(LENGTHS.grid(12), values, strict=True))
    trials = [trial(x, value) for x, value in measured.items()]
    best = found(trials).estimate
    assert np.isfinite([best.noise, *best.means, *best.errors]).all()
    low, high = best.tied
    assert low <= best.best <= high


def test_a_failed_length_is_not_measured_again_and_a_wider_range_continues():
    first = searched(noisy(0.01, best=0.2), Lengths(0.02, 0.1))
    assert first.estimate.best == 0.1
    failed = Trial("sigma_rel 0.28", 0.28, 0, error="exit code 1")
    search = searched(noisy(0.01, 1, best=0.2), before=[*first.trials, failed])
    assert {*first.trials} <= {*search.trials}
    assert search.estimate.best == pytest.approx(0.2, rel=0.1)
    assert [each.seed for each in search.trials].count(1) >= 1
    assert sum(each.sigma_rel == 0.28 for each in search.trials) == 1


@pytest.mark.parametrize("noise", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("most", range(4, 26))
def test_a_bound_is_of_all_averages_and_none_is_claimed_without_fresh_measurements(most, noise):
    """Also where the training has gone on for too long, so that ends are measured."""
    search = searched_ends(noise, most)
    assert len(search.trials) <= most
    assert len(search.trials) >= 4
    unbounded = searched_ends(noise, None)
    assert search.was_bounded == (len(search.trials) < len(unbounded.trials))
    assert not unbounded.was_bounded
    is_fresh = bool(search.measured(search.best, FRESH))
    assert math.isnan(search.margin(2)) != (noise > 0 and is_fresh)
    if noise > 0 and search.best != search.at_end:
        assert is_fresh


def searched_ends(noise, most):
    random = np.random.default_rng(1)
    search = make_search(Lengths(0.02, 0.2886), ends=tuple(range(500, 10_001, 250)), most=most)
    return search_all(
        search,
        lambda spot, _: bowl(spot.sigma_rel * (spot.t or 1e4), 2000.0) + noise * random.normal(),
    )


@pytest.mark.parametrize(
    ("lengths", "count", "grid"),
    [
        (Lengths(0.1, 0.1004), 6, [0.1, 0.10008, 0.10016, 0.10024, 0.10032, 0.1004]),
        (Lengths(0.05, 0.2), 4, [0.05, 0.0794, 0.126, 0.2]),
    ],
)
def test_a_grid_has_round_lengths(lengths, count, grid):
    assert lengths.grid(count) == grid


OF_THE_README = {  # the metric of its `train.py`, as a sweep has measured it
    0.0153: 0.0440033, 0.0275: 0.0388426, 0.0359: 0.0366926, 0.0495: 0.0343492, 0.0627: 0.0329182,
    0.077: 0.0319349, 0.0891: 0.0313898, 0.103: 0.030981, 0.12: 0.0307419, 0.138: 0.0307956,
    0.147: 0.0309588, 0.16: 0.0313847, 0.2886: 0.103515,
}  # fmt: skip


def test_of_a_metric_without_noise_the_lowest_measured_one_is_chosen():
    lengths = [*OF_THE_README]
    values = [*OF_THE_README.values()]

    curve = PchipInterpolator(np.log(lengths), values)

    def metric(x):
        return float(curve(math.log(x)))

    search = searched(metric, Lengths(lengths[0], lengths[-1]))
    best = search.estimate
    assert metric(best.best) == min(each.value for each in search.trials)
    assert best.best == pytest.approx(0.12, rel=0.1)
