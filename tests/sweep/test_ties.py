"""Sweeps in which all that is measured has the same metric: as good as it gets, or an evaluation
that does not use the weights."""

import json
import math

import pytest
import torch
from checking import assert_same_tensors, refused
from factories import random_walk, write_ema_checkpoints, write_run
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocError, Run, import_checkpoints
from posthoc_cli.request import SweepRequest
from posthoc_cli.sweep import Sweep
from posthoc_cli.sweep.report import describe_tie, summarize
from posthoc_cli.sweep.weights import RandomWeights, RawTensors

RANGE = (0.02, 0.28)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without anything to compare averages with."""
    folder = tmp_path_factory.mktemp("plain")
    write_run(folder, random_walk(20, {"w": (50,)}), range(1, 21))
    return Run(folder)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A run with an EMA of its own and its last weights, and this EMA."""
    folder = tmp_path_factory.mktemp("stored")
    ema = write_ema_checkpoints(folder)
    import_checkpoints(folder, folder / "run", ema_decay=0.9)
    return Run(folder / "run"), ema


class Saturated:
    """An evaluation that all averages pass: those that are nearer to the last one than 0. The
    distance of random weights is about sqrt(2)."""

    def __init__(self, run, passed=500.0, failed=9.0):
        self.reference = run.average(0.02)["w"]
        self.passed = passed
        self.failed = failed
        self.calls = 0

    def __call__(self, weights):
        self.calls += 1
        distance = (weights["w"] - self.reference).norm() / self.reference.norm()
        return self.passed if distance < 1 else self.failed


def swept(run, evaluate, out=None, on_trial=lambda *_: None, **options):
    lengths = {} if "sigma_rels" in options else {"sigma_range": RANGE, "budget": 8}
    request = SweepRequest(evaluate, out=out, **lengths | {"minimize": False} | options)
    return Sweep(run.sources, request, on_trial=on_trial).run()


def measured(report):
    return [(trial.target, trial.seed) for trial in report.trials]


@pytest.mark.parametrize("minimize", [False, True])
@pytest.mark.parametrize("passed", [500.0, 0.0, (1.0, 0.02), -3.0])
def test_where_all_tie_the_untuned_length_is_taken_and_no_gain_claimed(plain, passed, minimize):
    report = swept(plain, Saturated(plain, passed), minimize=minimize)
    assert report.all_tied
    assert report.best == 0.05
    assert measured(report)[-2:] == [("sigma_rel 0.05", 0), ("random weights", 0)]
    texts = dict(summarize(report))
    assert texts["gain"] == "none: all have the same metric, and random weights another one, 9"
    assert texts["best"].endswith(", untuned, since all tie")
    assert texts["statistically tied"] == "all"
    assert not report.is_at_edge


def test_where_all_tie_the_users_own_ema_is_kept(stored, tmp_path):
    run, ema = stored
    out = tmp_path / "out"
    report = run.sweep(Saturated(run), maximize=True, sigma_range=(0.02, 0.28), out=out)
    assert report.best is None
    assert report.best_trial.target == "your EMA (0.9)"
    assert_same_tensors(load_file(out / "best.safetensors"), {"w": ema})
    written = json.loads((out / "sweep.json").read_text())
    assert written["all_tied"]
    assert written["best"] == {
        "target": "your EMA (0.9)", "sigma_rel": None, "t": None, "base_share": None, "as": None
    }  # fmt: skip
    assert [each["gain"] for each in written["compared"]] == [0, 0]
    texts = dict(summarize(report))
    assert texts["best"] == "your EMA (0.9), untuned, since all tie"
    page = (out / "report.html").read_text()
    assert "None: all have the same metric" in page
    assert "ema synthesize" not in page
    assert report._repr_html_().count("<svg") == 1
    assert "gain: none: all have the same metric" in repr(report)


@pytest.mark.parametrize(
    ("lengths", "best"),
    [
        ({"sigma_rels": [0.1, 0.2]}, 0.1),
        ({"sigma_rels": [0.01, 0.04, 0.09, 0.2]}, 0.04),
        ({"sigma_range": (0.1, 0.28)}, 0.1),
        ({"sigma_range": (0.01, 0.04)}, 0.04),
    ],
)
def test_a_search_without_the_untuned_length_takes_the_nearest(plain, lengths, best):
    report = swept(plain, Saturated(plain), **lengths)
    assert report.best == best
    assert all(trial.t is None for trial in report.trials)


def test_an_evaluation_that_does_not_use_the_weights_is_an_error(stored, tmp_path, caplog):
    run, _ = stored
    out = tmp_path / "out"
    with refused("the sweep", "same metric, 7, and random weights, too", kind=PostHocError):
        swept(run, lambda _: 7, out)
    assert "all trials so far have the same metric, 7: does" in caplog.text
    assert not (out / "best.safetensors").exists()
    again = []
    with refused("the sweep", "does the evaluation use the weights?", kind=PostHocError):
        swept(run, lambda _: 7, out, on_trial=lambda *trial: again.append(trial))
    assert not again


def test_random_weights_that_have_the_metric_by_chance_are_drawn_once_more(plain):
    evaluate = Saturated(plain)
    chances = iter([500.0, 9.0])
    report = swept(
        plain, lambda weights: evaluate(weights) if evaluate(weights) == 500 else next(chances)
    )
    assert measured(report)[-2:] == [("random weights", 0), ("random weights", 1)]
    assert dict(summarize(report))["gain"].endswith("another one, 9")


def test_random_weights_may_fail(plain):
    report = swept(plain, Saturated(plain, failed=math.nan))
    assert report.trials[-1].error == "its metric is nan"
    texts = dict(summarize(report))
    assert texts["gain"].endswith("and random weights none")
    assert "failed" not in texts["measured"]


def test_one_other_metric_is_enough_for_a_choice(plain):
    """Of lengths that have the best one, the nearest to the untuned length is chosen."""
    longest = plain.average(0.28)["w"]

    def evaluate(weights):
        return 0.9 if torch.equal(weights["w"], longest) else 1.0

    report = swept(plain, evaluate, budget=None)
    assert not report.all_tied
    lengths = [trial.sigma_rel for trial in report.trials]
    assert report.best == min(lengths, key=lambda length: abs(math.log(length / 0.05)))
    second, _ = sorted({*lengths})[-2:]
    assert describe_tie(report) == f"sigma_rel 0.02 to {second}, which have the same metric"
    assert not any(trial.is_random for trial in report.trials)


def test_a_best_length_at_an_end_that_others_equal_does_not_point_beyond(plain):
    shortest = plain.average(0.1)["w"]
    longest = plain.average(0.28)["w"]

    def evaluate(weights):
        return 0.9 if torch.equal(weights["w"], longest) else 1.0

    report = swept(plain, evaluate, sigma_range=(0.1, 0.28))
    assert report.best == 0.1
    assert not report.is_at_edge
    alone = swept(
        plain,
        lambda weights: float(torch.equal(weights["w"], shortest)),
        sigma_range=(0.1, 0.28),
    )
    assert alone.is_at_edge


def test_other_weights_with_another_metric_show_that_they_are_used(stored):
    run, ema = stored
    report = swept(run, lambda weights: 0.5 if torch.equal(weights["w"], ema) else 1.0, budget=None)
    assert report.best == 0.05
    own, _ = report.gains
    assert own.gain == 1.0
    assert not any(trial.is_random for trial in report.trials)


ALIKE = "tail -c 8 $1 | od -An -f | awk '\"'{print ($1 == $2) ? 500 : 9}'\"'"
"""A script whose metric is 500 if the last two values are equal."""


def of_equal_values(folder):
    for step in (5, 10, 15, 20):
        save_file({"a": torch.full((9,), float(step))}, folder / f"step-{step}.safetensors")
    return Run(folder / "step-*.safetensors")


def test_commands_side_by_side_measure_random_weights_and_a_record_of_them_is_continued(
    tmp_path, ema
):
    run = of_equal_values(tmp_path)
    command = f"sh -c 'echo >> {tmp_path}/calls; {ALIKE}' sh {{weights}}"
    words = ("sweep", run.directory, "--eval", command, "--maximize", "--jobs", 4)
    options = ("--sigma-rel", "0.05:0.28", "--budget", 9, "--out", tmp_path / "out", "--json")
    done = ema(*words, *options)
    assert done.code == 0, done.err
    assert done.json["all_tied"]
    assert done.json["best"]["sigma_rel"] == 0.05
    assert "random weights another one, 9" in (tmp_path / "out/report.html").read_text()
    calls = (tmp_path / "calls").read_text()
    again = ema(*words, *options)
    assert sorted(map(str, again.json["trials"])) == sorted(map(str, done.json["trials"]))
    assert (tmp_path / "calls").read_text() == calls


def test_random_weights_are_written_as_the_averages_are(tmp_path):
    run = of_equal_values(tmp_path)
    model = tmp_path / "model"
    model.mkdir()
    save_file(dict(run.average(0.1)), model / "model.safetensors")
    (model / "config.json").write_text("{}")
    inside = ALIKE.replace("$1", "$1/model.safetensors", 1)
    command = f"sh -c 'test -e $1/config.json && {inside}' sh {{weights}}"
    report = swept(run, command, tmp_path / "out", like=model)
    assert report.trials[-1].is_random
    assert report.trials[-1].value == 9


def test_random_weights_are_as_large_and_no_variance_is_negative():
    tensors = {
        "weight": 3 * torch.randn(100, 100) + 4,
        "variance": torch.rand(1000),
        "half": torch.randn(1000).half(),
        "count": torch.arange(5),
        "empty": torch.empty(0),
    }
    others = RawTensors(title="x", text="x", tensors=tensors)
    made, _ = RandomWeights(title="y", text="y", others=others, seed=0).make()
    for name, tensor in tensors.items():
        assert made[name].dtype == tensor.dtype
        assert made[name].shape == tensor.shape
    for name in ("weight", "variance", "half"):
        size = tensors[name].double().square().mean()
        assert made[name].double().square().mean() == pytest.approx(size, rel=0.2)
        assert not torch.equal(made[name], tensors[name])
    assert (made["variance"] >= 0).all()
    assert (made["weight"] < 0).any()
    assert made["count"].tolist() == [0, 1, 2, 3, 4]
