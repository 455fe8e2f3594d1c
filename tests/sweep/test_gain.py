"""What a sweep says of its gain: with an interval, for these examples alone, in points."""

import math
from dataclasses import replace

import pytest
from sweep.searching import make_search, search_all

from posthoc_cli.sweep import Lengths, SweepReport
from posthoc_cli.sweep.report import summarize
from posthoc_cli.sweep.trial import Trial

OWN = "your EMA (0.9)"
LAST = "last weights"
LENGTHS = Lengths(0.02, 0.28)


def bowl(x, _):
    """A metric without noise, whose best value is 0.5."""
    return math.log(x / 0.1) ** 2 + 0.5


def waves(x, seed):
    """The same with noise."""
    return bowl(x, seed) + 0.02 * math.sin(1000 * x + 2 * seed)


def report_of(metric, own=(1.0,), error=None, name="metric", minimize=True, lengths=LENGTHS):
    """Make the report of a search, the own EMA measured so often, and the last weights of 2."""
    trials = [Trial(LAST, None, 0, 2.0, error)]
    trials += [Trial(OWN, None, seed, value, error) for seed, value in enumerate(own)]
    search = search_all(
        make_search(lengths, minimize, trials=tuple(trials)),
        lambda spot, seed: metric(spot.sigma_rel, seed),
    )
    stated = tuple(replace(trial, standard_error=error) for trial in search.trials)
    return SweepReport(replace(search, trials=stated), (OWN, LAST), name, {})


def texts_of(*arguments, **options):
    return dict(summarize(report_of(*arguments, **options)))


def test_a_gain_beyond_the_noise_has_an_interval():
    report = report_of(waves, (1.0, 1.02))
    ours, last = report.gains
    assert ours.value == pytest.approx(1.01)
    assert ours.gain == pytest.approx((1.01 - report.value) / 1.01)
    assert 0 < ours.margin < ours.gain
    assert last.margin > ours.margin / 2
    text = dict(summarize(report))["gain"]
    size = f"{100 * ours.gain:.2g} % ± {100 * ours.margin:.2g} %"
    assert text.startswith(f"{size} better than {OWN}, 75 % ± ")


def test_a_loss_beyond_the_noise_has_an_interval():
    report = report_of(waves, (0.4, 0.42))
    text = dict(summarize(report))["gain"]
    assert text.startswith(f"{-100 * report.gains[0].gain:.2g} % ± ")
    assert f"worse than {OWN}" in text


@pytest.mark.parametrize(("own", "begin"), [((0.52, 0.51), ""), ((0.47, 0.48), "-")])
def test_a_gain_within_the_noise_is_said_to_be_that(own, begin):
    report = report_of(waves, own)
    ours, _ = report.gains
    size = f"{begin}{100 * abs(ours.gain):.2g} % ± {100 * ours.margin:.2g} %"
    text = dict(summarize(report))["gain"]
    assert text.startswith(f"within the noise of {OWN} ({size}), ")


def test_a_gain_of_equal_repetitions_holds_for_these_examples_alone():
    texts = texts_of(bowl)
    ours = f"50 % better than {OWN}, 75 % better than the last weights"
    assert texts["gain"] == f"{ours}, on these examples"
    tied = texts["statistically tied"]
    assert tied == "none on these examples: a repetition had the same metric"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (0.2, f"50 % ± 40 % better than {OWN}, 75 % ± 20 % better than the last weights"),
        (0.3, f"within the noise of {OWN} (50 % ± 60 %), 75 % ± 30 % better than the last weights"),
    ],
)
def test_of_equal_repetitions_twice_the_stated_error_is_the_interval(error, text):
    assert texts_of(bowl, error=error)["gain"] == text


FEW = Lengths.from_list([0.05, 0.1, 0.2])


@pytest.mark.parametrize(
    ("metric", "own", "minimize", "name", "text"),
    [
        ((76.38, 75), 75.71, False, "metric", "+0.67 (0.88 %) better than"),
        ((0.63, 0.6), 0.6, False, "metric", "+0.03 (5 %) better than"),
        ((70, 69), 71, False, "acc", "-1 (1.4 %) worse than"),
        ((9, 11), 10, True, "top1_error", "-1 (10 %) better than"),
        ((101, 100), 100, False, "metric", "1 % better than"),
        ((9, 11), 10, True, "loss", "10 % better than"),
        ((-9, -11), -10, False, "metric", "10 % better than"),
        ((9, 11), 9, True, "loss", "as good as"),
        ((9, 11), 9, False, "acc", "+2 (22 %) better than"),
    ],
)
def test_the_gain_of_what_may_be_a_percentage_is_said_in_points_too(
    metric, own, minimize, name, text
):
    best, others = metric
    found = texts_of(lambda x, _: best if x == 0.1 else others, (own,), None, name, minimize, FEW)
    assert found["gain"].startswith(f"{text} {OWN}")
    assert found["gain"].endswith(", by one measurement each")


def test_points_have_an_interval_too():
    report = report_of(lambda x, seed: 4 - waves(x, seed), (2.99, 3.0), minimize=False)
    text = dict(summarize(report))["gain"]
    assert text.startswith("+0.51 ± 0.03 (")
    assert " (17 % ± " in text
    report = report_of(lambda x, seed: 4 - waves(x, seed), (3.52, 3.53), minimize=False)
    text = dict(summarize(report))["gain"]
    assert text.startswith(f"within the noise of {OWN} (-0.0")
    assert text.count("±") == 4


def test_over_a_metric_of_0_no_gain_is_said():
    assert texts_of(bowl, (0.0,))["gain"] == "75 % better than the last weights, on these examples"
