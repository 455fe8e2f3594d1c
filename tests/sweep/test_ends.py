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
from checking import assert_same_tensors, refused
from factories import exact_gamma, random_walk, write_run
from safetensors.torch import load_file, save_file

from posthoc_cli import Run
from posthoc_cli.plots import end_figure
from posthoc_cli.sweep import Lengths
from posthoc_cli.sweep.report import summarize
from posthoc_cli.sweep.search import (
    USUAL_BUDGET,
    Trial,
    earlier_ends,
    estimate,
    estimate_ends,
    next_ends,
    next_measurements,
)

LENGTHS = Lengths(0.02, 0.2886)
TIMES = range(250, 10_001, 250)
LAST = 10_000.0


def mean_time(sigma_rel, t):
    """Return the mean time of a power function."""
    gamma = exact_gamma(sigma_rel)
    return t * (gamma + 1) / (gamma + 2)


def overfit(best):
    """Return a metric whose best average has its mean at a time, however long it is: a diagonal
    valley, later and longer as good as earlier and shorter."""
    return lambda sigma_rel, t: math.log(mean_time(sigma_rel, t) / best) ** 2


def searched(metric, noise=0.0, seed=0):
    """Search as a sweep does; return the trials, and the best length and end."""
    random = np.random.default_rng(seed)
    ends = earlier_ends(TIMES, LAST)
    step = LENGTHS.step(USUAL_BUDGET)
    trials = []

    def measure(sigma_rel, number, t=None):
        value = metric(sigma_rel, LAST if t is None else t) + noise * random.normal()
        trials.append(Trial("", sigma_rel, number, value, t=t))

    while batch := next_measurements(trials, LENGTHS, USUAL_BUDGET, minimize=True):
        for sigma_rel, number in batch:
            measure(sigma_rel, number)
    found = estimate(trials, step, minimize=True)
    if found.best < LENGTHS.high:
        return trials, found.best, LAST
    while batch := next_ends(trials, found, ends, LAST, minimize=True):
        for t, number in batch:
            measure(found.best, number, t)
    return trials, found.best, estimate_ends(trials, found, LAST, minimize=True).best


@pytest.mark.parametrize(
    ("times", "t", "ends"),
    [
        (range(1, 11), 10, [8, 6, 5, 4, 3, 2]),
        ([5, 10], 10, []),
        ([10], 10, []),
        ([1, 9, 10], 10, [9]),
        ([2, 4, 6, 8, 10, 12], 10, [8, 6, 4]),
    ],
)
def test_ends_are_stored_times_a_fifth_earlier_each_and_never_the_first(times, t, ends):
    assert earlier_ends(times, t) == ends


def test_of_a_training_that_overfits_the_best_end_is_found_until_two_in_a_row_are_worse():
    """The mean time of the uniform average is half of its end."""
    trials, best, end = searched(overfit(0.2 * LAST))
    assert best == LENGTHS.high
    assert end == 4000  # nearest to 0.8^4
    measured = [trial.t for trial in trials if trial.t is not None]
    assert measured == [8000, 6500, 5000, 4000, 3250, 2500]


def test_of_a_training_that_does_not_no_earlier_end_is_measured():
    trials, _, end = searched(overfit(0.8 * LAST))
    assert end == LAST
    assert all(trial.t is None for trial in trials)


def test_where_the_longest_is_best_two_earlier_ends_are_measured_and_none_is_taken():
    """0.5 of the last time is the mean of the uniform average, which is the best one."""
    trials, best, end = searched(overfit(0.49 * LAST))
    assert (best, end) == (LENGTHS.high, LAST)
    assert [trial.t for trial in trials if trial.t is not None] == [8000, 6500]


def test_an_end_whose_trial_fails_counts_as_worse():
    trials, _, _ = searched(overfit(0.2 * LAST))
    until = [trial for trial in trials if trial.t is None]
    failed = [Trial("", LENGTHS.high, 0, t=t, error="exit code 1") for t in (8000.0, 6500.0)]
    found = estimate(until, LENGTHS.step(USUAL_BUDGET), minimize=True)
    ends = earlier_ends(TIMES, LAST)
    assert next_ends([*until, *failed], found, ends, LAST, minimize=True) == []
    assert len(next_ends([*until, *failed[:1]], found, ends, LAST, minimize=True)) == 1


def test_of_60_noisy_trainings_the_chosen_average_is_better_than_the_best_length_at_the_end():
    """The regret is the distance from the best pair of all ends and lengths, which is 0."""
    regrets = []
    alone = []
    counts = []
    for seed in range(60):
        place = np.random.default_rng([1, seed]).uniform(0.08, 0.45)
        metric = overfit(place * LAST)
        trials, best, end = searched(metric, 0.03, seed)
        regrets.append(metric(best, end))
        alone.append(metric(LENGTHS.high, LAST))
        counts.append(sum(trial.t is not None for trial in trials))
    assert np.mean(regrets) < 0.03
    assert np.mean(alone) > 10 * np.mean(regrets)
    assert np.mean(np.array(regrets) <= np.array(alone)) > 0.95
    assert max(counts) <= 14


def test_where_the_metric_is_noisy_the_best_end_is_measured_once_more():
    trials, _, end = searched(overfit(0.2 * LAST), noise=0.01)
    again = [trial.t for trial in trials if trial.seed == 1 and trial.t is not None]
    assert end in again
    exact, _, _ = searched(overfit(0.2 * LAST))
    assert not [trial for trial in exact if trial.seed == 1 and trial.t is not None]


def test_the_interval_of_the_metric_at_an_earlier_end_holds_the_true_one():
    inside = []
    for seed in range(100):
        metric = overfit(0.2 * LAST)
        trials, best, end = searched(metric, 0.1, seed)
        found = estimate(trials, LENGTHS.step(USUAL_BUDGET), minimize=True)
        if best < LENGTHS.high or end == LAST:
            continue
        estimated = estimate_ends(trials, found, LAST, minimize=True)
        inside.append(abs(estimated.value - metric(best, end)) <= 2 * estimated.error)
    assert len(inside) > 50
    assert np.mean(inside) > 0.85


# --- in a sweep


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose weights are the step, so that those of an average are its mean time."""
    folder = tmp_path_factory.mktemp("timed") / "run"
    walk = random_walk(40, {"a": (40,)})
    for step, weights in enumerate(walk, start=1):
        weights["a"] = step + 1e-3 * weights["a"]
    write_run(folder, walk, range(1, 41))
    return Run(folder)


def distance_from(best):
    """Return an evaluation of a training that overfits after twice the best mean time."""
    return lambda weights: math.log(float(weights["a"].mean()) / best) ** 2


def test_a_sweep_takes_the_mean_up_to_an_earlier_step_and_says_so(run, tmp_path):
    out = tmp_path / "out"
    last = {"a": torch.full((40,), 40.0)}
    report = run.sweep(distance_from(8), minimize=True, out=out, raw=last)
    assert report.best == report.lengths.high
    assert [trial.t for trial in report.trials if trial.t is not None] == [32, 26, 20, 16, 13, 10]
    assert report.best_t == 16
    texts = dict(summarize(report))
    assert texts["best"] == f"the mean of steps 1 to 16 (sigma_rel {report.best:g} at t = 16)"
    assert "may lie beyond" not in texts["measured"]
    assert "better than the last weights" in texts["gain"]
    written = json.loads((out / "sweep.json").read_text())
    assert written["best"]["t"] == 16
    assert written["end_curve"][0]["t"] == pytest.approx(10)
    assert written["end_curve"][-1]["t"] == pytest.approx(40)
    best = load_file(out / "best.safetensors")
    assert_same_tensors(best, run.average(report.best, t=16))
    again = run.sweep(distance_from(8), minimize=True, out=out, raw=last)
    assert again.trials == report.trials
    (picture,) = end_figure(report.to_dict()).axes
    assert "best: t = 16" in {text.get_text() for text in picture.get_legend().get_texts()}


def test_a_shorter_best_length_is_not_looked_for_at_earlier_ends(run):
    report = run.sweep(distance_from(30), minimize=True)
    assert report.best_t == 40
    assert report.best < report.lengths.high
    assert all(trial.t is None for trial in report.trials)


def test_a_range_that_ends_short_is_reported_as_such_and_no_earlier_end_is_measured(run):
    report = run.sweep(distance_from(8), minimize=True, sigma_range=(0.05, 0.1))
    assert all(trial.t is None for trial in report.trials)
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
        {"minimize": True, "maximize": True},
        {"minimize": False, "maximize": False},
    ],
)
def test_a_direction_that_is_not_said_is_asked_for(run, direction):
    with refused("minimize", "give minimize=True or maximize=True"):
        run.sweep(accuracies(), **direction)


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
