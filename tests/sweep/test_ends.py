"""The search for an earlier end, where the longest length is the best one: as of a training that
overfits."""

import json
import math
import shlex
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, heavy, refused
from factories import exact_gamma
from safetensors.torch import load_file, save_file
from sweep.searching import LAST, distance_from, make_search, measure, search_all

from posthoc_cli import Run
from posthoc_cli.plots import end_figure
from posthoc_cli.sweep import Lengths
from posthoc_cli.sweep.report import summarize
from posthoc_cli.sweep.trial import FRESH, Spot

LENGTHS = Lengths(0.02, 0.2886)
ENDS = tuple(map(float, range(500, 10_001, 250)))


def mean_time(sigma_rel, t):
    """Return the mean time of a power function."""
    gamma = exact_gamma(sigma_rel)
    return t * (gamma + 1) / (gamma + 2)


def overfit(best):
    """Return a metric whose best average has its mean at a time, however long it is: a diagonal
    valley, later and longer as good as earlier and shorter."""
    return lambda spot, _=0: math.log(mean_time(spot.sigma_rel, spot.t or LAST) / best) ** 2


def noisy(metric, noise, seed):
    """Add the same noise to a spot and seed, whenever it is measured."""

    def measure(spot, number):
        words = [seed, number, round(1e6 * spot.sigma_rel), round(spot.t or 0)]
        return metric(spot) + noise * np.random.default_rng(words).normal()

    return measure


def searched(metric, lengths=LENGTHS, ends=ENDS, jobs=99, **options):
    return search_all(make_search(lengths, ends=ends, **options), metric, jobs)


def walked(search):
    """List the earlier ends that were measured, in their order."""
    return [trial.t for trial in search.trials if trial.t is not None and trial.seed == 0]


def test_of_a_training_that_overfits_ends_by_halves_and_both_sides_of_the_best_are_measured():
    """The mean time of the uniform average is half of its end, so that 0.2 / 0.5 is best."""
    search = searched(overfit(0.2 * LAST))
    assert search.best == Spot(LENGTHS.high, 3500)  # the nearest of those measured to 4000
    assert walked(search) == [5000, 2500, 1250, 3500, 7000]
    assert not [trial for trial in search.trials if trial.seed in FRESH]


def test_after_a_worse_end_no_other_is_measured_and_after_a_better_one_two():
    search = searched(overfit(0.49 * LAST))
    assert search.best == search.at_end
    assert walked(search) == [5000]
    rough = {5000: 0.5, 2500: 0.8, 1250: 0.2, 500: 0.9}
    search = searched(lambda spot, _: rough.get(spot.t, overfit(0.5 * LAST)(spot) + 0.6))
    assert walked(search) == [5000, 2500, 1250, 500, 1000, 1750]
    assert search.best == Spot(LENGTHS.high, 1250)


def test_the_length_at_which_ends_are_measured_is_the_best_one_of_a_tenth_or_more():
    """Of a metric whose valley is best at a length, too."""

    def metric(length):
        return lambda spot, _: overfit(2500)(spot) + 9 * math.log(spot.sigma_rel / length) ** 2

    search = searched(metric(0.15))
    assert 0.1 < search.best.sigma_rel < 0.2
    assert search.best.t is not None
    search = searched(metric(0.05))
    assert search.best.sigma_rel < 0.1
    assert not walked(search)


@pytest.mark.parametrize("ends", [(), (LAST,), (9750.0, LAST), (5000.0, LAST)])
def test_ends_are_those_that_are_stored(ends):
    search = searched(overfit(0.2 * LAST), ends=ends)
    assert walked(search) == [*ends[:-1]]
    assert search.best.t == min(ends[:-1], default=None)


def test_an_end_whose_trial_fails_counts_as_worse():
    search = searched(overfit(0.2 * LAST))
    until = [trial for trial in search.trials if trial.t is None]
    failed = measure(Spot(LENGTHS.high, 5000.0), 0, None, error="exit code 1")
    again = replace(search, trials=(*until, failed))
    assert again.next_measurements() == []
    assert again.best == again.at_end


def test_of_a_range_of_short_lengths_or_a_list_no_earlier_end_is_measured():
    assert not walked(searched(overfit(0.2 * LAST), Lengths(0.02, 0.09)))
    assert not walked(searched(overfit(0.2 * LAST), Lengths.from_list([0.1, 0.15, 0.2, 0.28])))


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("place", [0.1, 0.3, 0.49])
def test_eight_jobs_give_the_answer_of_one(noise, place):
    metric = noisy(overfit(place * LAST), noise, 0)
    one, eight = (searched(metric, jobs=jobs) for jobs in (1, 8))
    assert {*one.trials} == {*eight.trials}
    assert (one.best, one.value) == (eight.best, eight.value)


def test_of_60_noisy_trainings_the_chosen_average_is_better_than_the_best_length_at_the_end():
    """The regret is the distance from the best pair of all ends and lengths, which is 0. Ends that
    are a factor of 1.41 apart have at most log(1.41 ** 0.5) ** 2 = 0.03 without noise."""
    regrets = []
    alone = []
    for seed in range(60):
        place = np.random.default_rng([1, seed]).uniform(0.08, 0.45)
        metric = overfit(place * LAST)
        search = searched(noisy(metric, 0.03, seed))
        regrets.append(metric(search.best))
        alone.append(metric(search.at_end))
        assert len(search.trials) <= 26
    assert np.mean(regrets) < 0.03
    assert np.mean(alone) > 10 * np.mean(regrets)
    assert np.mean(np.array(regrets) <= np.array(alone)) > 0.95


# --- what is claimed


def test_the_winner_and_the_best_length_at_the_end_are_measured_afresh_and_decide():
    search = searched(noisy(overfit(0.2 * LAST), 0.01, 0))
    assert search.best.t is not None
    fresh = [(trial.spot, trial.seed) for trial in search.trials if trial.seed in FRESH]
    assert fresh == [(spot, seed) for spot in (search.at_end, search.best) for seed in FRESH]
    assert search.value == np.mean(search.measured(search.best, FRESH))

    def with_fresh(value):
        trials = []
        for trial in search.trials:
            is_fresh = trial.spot == search.best and trial.seed in FRESH
            trials.append(replace(trial, value=value) if is_fresh else trial)
        return replace(search, trials=tuple(trials))

    end = float(np.mean(search.measured(search.at_end, FRESH)))
    assert with_fresh(end).best == search.at_end  # a tie
    assert with_fresh(end).value == end
    assert with_fresh(end - 1e-9).best == search.best
    assert with_fresh(None).best == search.at_end


def test_the_metric_that_is_claimed_is_right_in_the_mean_and_its_interval_holds_the_true_one():
    """Of trainings whose winner is an earlier end. The error of each mean of two is noise / sqrt 2,
    so that of the mean over all is noise / sqrt(2 n); the interval is of the difference to other
    weights that are measured so often that they have no error."""
    noise = 0.1
    off = []
    inside = []
    for seed in range(100):
        metric = overfit(0.2 * LAST)
        search = searched(noisy(metric, noise, seed))
        if search.best != search.at_end:
            off.append(search.value - metric(search.best))
            inside.append(abs(off[-1]) <= search.margin(10**9))
    assert len(off) > 80
    assert abs(np.mean(off)) < 3 * noise / math.sqrt(2 * len(off))
    assert np.mean(inside) > 0.88


@heavy
def test_of_800_searches_of_noise_alone_at_most_5_percent_claim_a_gain():
    """Over weights that are measured twice. The rate to expect is that of one side of a 95 %
    interval, 2.5 %, and twice that of the better of two that were measured afresh."""
    claims = 0
    walks = 0
    for seed in range(800):
        search = searched(noisy(lambda _: 100.0, 1.0, seed))
        own = 100 + np.random.default_rng([7, seed]).normal(size=2).mean()
        claims += own - search.value > search.margin(2)
        walks += bool(walked(search))
    assert walks > 200
    assert claims <= 0.05 * 800


# --- in a sweep


def test_a_sweep_takes_the_average_at_an_earlier_step_and_says_so(run, tmp_path):
    out = tmp_path / "out"
    last = {"a": torch.full((40,), 40.0)}
    report = run.sweep(distance_from(8), minimize=True, out=out, raw=last)
    assert report.best == report.lengths.high
    assert [trial.t for trial in report.trials if trial.t is not None] == [20, 10, 5, 14, 28]
    assert report.best_t == 14
    texts = dict(summarize(report))
    title = f"sigma_rel {report.best:g} at t = 14"
    assert texts["best"] == f"{title}, as if the training had ended there"
    assert "may lie beyond" not in texts["measured"]
    assert "better than the last weights" in texts["gain"]
    written = json.loads((out / "sweep.json").read_text())
    assert written["best"]["t"] == 14
    assert written["end_curve"][0]["t"] == pytest.approx(5)
    assert written["end_curve"][-1]["t"] == pytest.approx(40)
    best = load_file(out / "best.safetensors")
    assert_same_tensors(best, run.average(report.best, t=14))
    again = run.sweep(distance_from(8), minimize=True, out=out, raw=last)
    assert again.trials == report.trials
    (picture,) = end_figure(report.to_dict()).axes
    assert "best: t = 14" in {text.get_text() for text in picture.get_legend().get_texts()}


def test_a_shorter_best_length_is_not_looked_for_at_earlier_ends(run):
    report = run.sweep(distance_from(37), minimize=True)
    assert report.best_t == 40
    assert report.best < 0.1
    assert all(trial.t is None for trial in report.trials)


def test_a_range_that_ends_short_is_reported_as_such(run):
    report = run.sweep(distance_from(8), minimize=True, sigma_range=(0.05, 0.09))
    assert "the end of the range, and may lie beyond" in dict(summarize(report))["measured"]


def test_a_list_is_measured_as_it_is(run):
    report = run.sweep(distance_from(8), minimize=True, sigma_rels=[0.1, 0.2, 0.28])
    assert [trial.sigma_rel for trial in report.trials] == [0.1, 0.2, 0.28]


# --- by a function


def test_a_function_gives_the_same_search_as_a_command_that_prints_the_same(run, tmp_path):
    def evaluate(weights):
        return round(distance_from(25)(weights), 6)

    program = tmp_path / "evaluate.py"
    program.write_text(
        "import math, sys\n"
        "from safetensors.numpy import load_file\n"
        "mean = float(load_file(sys.argv[1])['a'].mean(dtype='float32'))\n"
        "print(round(math.log(mean / 25) ** 2, 6))\n"
    )
    by_function = run.sweep(evaluate, minimize=True, sigma_range=(0.05, 0.25), budget=4)
    command = shlex.join([sys.executable, str(program), "{weights}"])
    by_command = run.sweep(
        command,
        minimize=True,
        sigma_range=(0.05, 0.25),
        budget=4,
        out=tmp_path / "out",
        jobs=2,
    )
    assert [replace(trial, seconds=0.0) for trial in by_function.trials] == [
        replace(trial, seconds=0.0) for trial in by_command.trials
    ]
    assert by_function.best == by_command.best


def accuracies():
    """Return an evaluation whose metrics of 0.05, 0.1 and 0.2 have their best one in the middle."""
    values = iter([0.8, 0.9, 0.7])
    return lambda _: next(values)


@pytest.mark.parametrize(
    ("direction", "best"),
    [
        ({"maximize": True}, 0.9),
        ({"minimize": False}, 0.9),
        ({"minimize": False, "maximize": True}, 0.9),
        ({"minimize": True}, 0.7),
        ({"maximize": False}, 0.7),
    ],
)
def test_the_direction_is_said_and_followed(run, direction, best):
    report = run.sweep(accuracies(), **direction, sigma_rels=[0.05, 0.1, 0.2])
    assert report.value == best


@pytest.mark.parametrize(
    "direction",
    [
        {},
        {"minimize": None},
        {"minimize": "loss"},
        {"minimize": False, "maximize": False},
    ],
)
def test_a_direction_that_is_not_said_is_asked_for(run, direction):
    with refused("minimize", "say whether lower or higher is better", "or `look`, to compare"):
        run.sweep(accuracies(), **direction)


def test_options_that_contradict_each_other_or_have_no_effect_are_refused(run, tmp_path):
    function = accuracies()
    with refused("minimize", "at most one of `minimize`, `maximize`, `look`"):
        run.sweep(function, minimize=True, maximize=True)
    with refused("look", "needs a command"):
        run.sweep(function, look=True)
    with refused("like", "needs `out`"):
        run.sweep(function, minimize=True, like=tmp_path / "model.pt")
    with refused("budget 9", "a list is measured as it is"):
        run.sweep(function, minimize=True, sigma_rels=[0.1, 0.2], budget=9)
    with refused("jobs 0", "at least 1"):
        run.sweep(function, minimize=True, jobs=0)
    with refused("evaluate 0.8", "must be a function"):
        run.sweep(0.8, minimize=True)
    with refused("raw", "must be a path"):
        run.sweep(function, minimize=True, raw=3)
    with refused("sigma_range", "at most one of"):
        run.sweep(function, minimize=True, sigma_rels=[0.1, 0.2], sigma_range=(0.1, 0.2))


def test_a_report_says_its_result_and_a_notebook_shows_its_curve(run):
    report = run.sweep(accuracies(), maximize=True, metric="acc", sigma_rels=[0.05, 0.1, 0.2])
    assert repr(report) == f"SweepReport(best: {report.best_title}; acc: 0.9)"
    shown = report._repr_html_()
    assert "acc: 0.9" in shown
    assert shown.count("<svg") == 1
    last = {"a": torch.full((40,), 40.0)}
    early = run.sweep(distance_from(8), minimize=True, raw=last)
    assert repr(early).endswith("better than the last weights, on these examples)")
    assert early._repr_html_().count("<svg") == 2


def test_a_folder_receives_the_files_that_the_command_writes(run, ema, tmp_path):
    report = run.sweep(distance_from(25), minimize=True, sigma_rels=[0.1, 0.2], out=tmp_path / "a")
    words = ("--eval", "sh -c 'echo {sigma_rel}' {weights}", "--minimize", "--out", tmp_path / "b")
    assert ema("sweep", run.directory, *words, "--sigma-rel", "0.1,0.2").code == 0
    written = [{path.name for path in (tmp_path / name).iterdir()} for name in ("a", "b")]
    assert written[0] == written[1]
    assert {"best.safetensors", "sweep.json", "report.html"} < written[0]
    assert report.outputs == (tmp_path / "a/best.safetensors", tmp_path / "a/report.html")
    page = (tmp_path / "a/report.html").read_text()
    assert f"ema synthesize {run.directory}" in page


def test_a_function_may_return_its_standard_error_and_its_own_errors_are_raised(run):
    report = run.sweep(
        lambda weights: (float(weights["a"][0]), 0.5), minimize=True, sigma_rels=[0.1, 0.2]
    )
    assert {trial.standard_error for trial in report.trials} == {0.5}

    def fail(_):
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        run.sweep(fail, minimize=True)
    with refused("evaluate", "must return a number"):
        run.sweep(lambda _: "good", minimize=True, sigma_rels=[0.1, 0.2])


def test_a_function_that_returns_no_finite_number_has_failed_there(run):
    values = iter([1.0, math.nan, 3.0])
    report = run.sweep(lambda _: next(values), minimize=True, sigma_rels=[0.1, 0.2, 0.25])
    assert [trial.value for trial in report.trials] == [1.0, None, 3.0]
    assert "its metric is nan" in report.trials[1].error


def test_a_command_needs_a_folder_and_a_file_of_the_last_weights(run, tmp_path):
    with refused("out"):
        run.sweep("true {weights}", minimize=True)
    with refused("raw"):
        run.sweep("true {weights}", minimize=True, out=tmp_path / "out", raw={"a": torch.zeros(40)})


def test_weights_at_an_earlier_time_have_their_name_and_the_gain_is_over_the_last_ones(tmp_path):
    for step in range(1, 11):
        save_file({"a": torch.full((9,), float(step))}, tmp_path / f"step-{step}.safetensors")
    run = Run(tmp_path / "step-*.safetensors")
    report = run.sweep(
        lambda weights: float(weights["a"].mean()), minimize=True, sigma_rels=[0.1, 0.2], step=8
    )
    assert report.t == 8
    measured = {trial.target: trial.value for trial in report.trials}
    assert measured["last weights"] == 10
    assert measured["weights at t = 8"] == 8
    last, earlier = report.gains
    assert (last.title, last.value) == ("last weights", 10)
    assert (earlier.title, earlier.value) == ("weights at t = 8", 8)
    with refused("step", "the nearest are at 8, 9, 10"):
        run.sweep(lambda _: 0.0, minimize=True, step=12)
