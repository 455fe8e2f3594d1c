"""The user's own single checkpoints, beside the averages of a search."""

import math

import pytest
import torch
from checking import assert_same_tensors
from safetensors.torch import load_file, save_file

from posthoc_cli import Run
from posthoc_cli.sweep.report import summarize
from posthoc_cli.sweep.trial import FRESH

LAST = 64


def save(folder, noise=0.0):
    """Save weights whose first half is the step, and whose second half is noise, which an average
    takes away."""
    random = torch.Generator().manual_seed(0)
    for step in range(1, LAST + 1):
        weights = torch.full((200,), float(step))
        weights[100:] = noise * torch.randn(100, generator=random)
        save_file({"a": weights}, folder / f"step-{step}.safetensors")
    return Run(folder)


def distance_from(step):
    """Return the distance from the weights of one step of a training without noise, squared and
    relative, plus 1."""

    def distance(weights):
        off = weights["a"].clone()
        off[:100] -= step
        return 1 + float(off.square().sum()) / (100 * step**2)

    return distance


def own(report):
    return [trial for trial in report.trials if trial.target.startswith("your checkpoint")]


def titles(*steps):
    return [f"your checkpoint step-{step}.safetensors" for step in steps]


def test_those_at_the_nearest_ends_are_measured_and_the_gain_is_over_the_best_of_them(tmp_path):
    """Of noisy weights averages are better. The one at the end of the best average is nearest."""
    run = save(tmp_path, noise=4.0)
    report = run.sweep(distance_from(8), minimize=True)
    assert report.best_t < LAST
    trials = own(report)
    assert len(trials) == 4
    ends = {trial.t for trial in report.trials} - {None}
    steps = [int(trial.target.split("-")[1].split(".")[0]) for trial in trials]
    assert {*steps} < ends
    assert steps[0] == report.best_t
    files = {trial.target: load_file(tmp_path / trial.target.split()[-1]) for trial in trials}
    best = min(trials, key=lambda trial: trial.value)
    for trial in trials:
        assert trial.value == distance_from(8)(files[trial.target])
    last, over = report.gains
    assert (last.title, over.title) == ("last weights", best.target)
    assert over.value == best.value
    assert over.gain == pytest.approx((best.value - report.value) / best.value)
    assert report.kept is None
    text = dict(summarize(report))["gain"]
    assert text.endswith(f" better than {best.target}, on these examples")


def test_one_that_is_better_than_every_average_is_said_and_written(tmp_path):
    """Of weights without noise, averages are a mean of steps around the best one."""
    folder = tmp_path / "files"
    folder.mkdir()
    run = save(folder)
    sharp = distance_from(16)
    out = tmp_path / "out"

    def evaluate(weights):
        return sharp(weights) + (weights["a"][:100] != 16).any()

    report = run.sweep(evaluate, minimize=True, out=out)
    (kept,) = titles(16)
    assert kept in report.checkpoints
    assert report.kept == kept
    assert report.best is None
    assert report.value == 1
    texts = dict(summarize(report))
    assert texts["best"] == f"{kept}: no average is better"
    assert f"worse than {kept}, on these examples" in texts["gain"]
    assert texts["gain"].startswith(f"of {report.search.best.title}, the best average: ")
    assert "predicted error" not in texts
    assert_same_tensors(
        load_file(out / "best.safetensors"), load_file(folder / "step-16.safetensors")
    )
    written = report.to_dict()["best"]
    nothing = dict.fromkeys(("sigma_rel", "t", "base_share", "as"))
    assert written == {"target": kept} | nothing
    page = (out / "report.html").read_text()
    assert "no average is better" in page
    assert page.count('<img class="chart"') == report._repr_html_().count("<svg") == 2
    again = run.sweep(evaluate, minimize=True, out=out)
    assert again.trials == report.trials


@pytest.mark.parametrize("link", [False, True])
def test_the_one_that_a_name_or_a_link_calls_best_is_measured_also_without_earlier_ends(
    tmp_path, link
):
    run = save(tmp_path)
    if link:
        (tmp_path / "best.safetensors").symlink_to("step-60.safetensors")
    else:
        (tmp_path / "step-60.safetensors").rename(tmp_path / "step-60-best.safetensors")
    report = run.sweep(distance_from(LAST), minimize=True, sigma_range=(0.02, 0.09))
    assert not {trial.t for trial in report.trials} - {None}
    (trial,) = own(report)
    assert trial.value == 1 + (4 / LAST) ** 2


def test_where_the_metric_is_noisy_the_best_of_them_is_measured_afresh_and_wins_beyond_the_noise(
    tmp_path,
):
    run = save(tmp_path)
    random = torch.Generator().manual_seed(0)

    def noisy(best):
        def evaluate(weights):
            is_best = (weights["a"][:100] == best).all()
            noise = 0.01 * torch.randn(1, generator=random).item()
            return 1 + math.log(weights["a"][0] / 16) ** 2 - 0.5 * float(is_best) + noise

        return evaluate

    report = run.sweep(noisy(0), minimize=True)
    assert report.kept is None
    seeds = [trial.seed for trial in own(report) if trial.target == report.best_checkpoint]
    assert seeds == [0, *FRESH]
    assert sum(trial.seed in FRESH for trial in own(report)) == len(FRESH)
    fresh = [trial.value for trial in own(report) if trial.seed in FRESH]
    assert report.gains[-1].value == sum(fresh) / 2
    end = int(report.best_checkpoint.split("-")[1].split(".")[0])
    better = run.sweep(noisy(end), minimize=True)
    assert [better.kept] == titles(end)


def test_a_budget_bounds_them_too_and_a_continued_sweep_compares_with_as_many(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    run = save(folder, noise=4.0)
    for budget in (18, 15, 10):
        out = tmp_path / f"out{budget}"
        report = run.sweep(distance_from(8), minimize=True, budget=budget, out=out)
        assert len(report.trials) <= budget
        again = run.sweep(distance_from(8), minimize=True, budget=budget, out=out)
        assert (again.checkpoints, again.gains) == (report.checkpoints, report.gains)
        assert report.checkpoints or budget == 10
    assert "without the bound of `budget` it would go on" in dict(summarize(report))["measured"]
