"""The search for a share of the weights that a fine-tuning started from."""

import json
import re
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused
from safetensors.torch import load_file, save_file
from sweep.searching import LAST, make_search, search_all

from posthoc_cli.errors import InvalidValueError, MismatchError, OutputExistsError
from posthoc_cli.plots import share_figure
from posthoc_cli.sweep import Lengths
from posthoc_cli.sweep.report import summarize
from posthoc_cli.sweep.trial import FRESH

ENDS = tuple(map(float, range(500, 10_001, 250)))


def surface(share, length=0.15, end=LAST, noise=0.0):
    """Return a metric with an optimum, quadratic in the share, and in the logarithms of length and
    end."""

    def metric(spot, seed=0):
        off = np.log([spot.sigma_rel / length, (spot.t or LAST) / end])
        words = [
            seed,
            round(1e6 * spot.sigma_rel),
            round(spot.t or 0),
            round(1e3 * spot.base_share),
        ]
        drawn = noise * np.random.default_rng(words).normal()
        return 1 + float(off @ off) + 3 * (spot.base_share - share) ** 2 + drawn

    return metric


def searched(metric, lengths=None, has_base=True, jobs=99, **options):
    search = make_search(lengths, ends=ENDS, has_base=has_base, **options)
    return search_all(search, metric, jobs)


def shares(search):
    return [trial.base_share for trial in search.trials if trial.base_share and not trial.seed]


@pytest.mark.parametrize(
    ("best", "measured"),
    [
        (0.33, [0.1, 0.25, 0.5, 0.33]),
        (0.15, [0.1, 0.25, 0.15]),
        (0.12, [0.1, 0.25]),  # nearer than 0.03 to one that was measured
        (0.61, [0.1, 0.25, 0.5, 0.75, 0.61]),
        (0.9, [0.1, 0.25, 0.5, 0.75]),
        (0.0, [0.1]),
        (-0.5, [0.1]),
    ],
)
def test_shares_grow_until_one_is_worse_and_the_vertex_of_a_quadratic_is_its_own(best, measured):
    search = searched(surface(best))
    assert shares(search) == measured
    nearest = min([0, *measured], key=lambda share: abs(share - best))
    assert search.best.base_share == nearest
    assert search.value == surface(best)(search.best)


def test_of_an_earlier_end_the_share_is_mixed_with_the_average_there():
    search = searched(surface(0.33, end=2500))
    assert search.best.t == 2500
    assert search.best.base_share == 0.33
    assert {trial.t for trial in search.trials if trial.base_share} == {2500}


def test_without_a_base_none_is_measured():
    assert not shares(searched(surface(0.33), has_base=False))


def test_of_a_short_list_the_best_is_measured_once_more_to_know_the_noise():
    lengths = Lengths.from_list([0.1, 0.15, 0.2])
    search = searched(surface(0.33), lengths)
    assert [(trial.sigma_rel, trial.seed) for trial in search.trials[:4]] == [
        (0.1, 0), (0.15, 0), (0.2, 0), (0.15, 1)
    ]  # fmt: skip
    assert search.best.base_share == 0.33


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_eight_jobs_give_the_answer_of_one(noise):
    one, eight = (searched(surface(0.33, end=2500, noise=noise), jobs=jobs) for jobs in (1, 8))
    assert {*one.trials} == {*eight.trials}
    assert (one.best, one.value) == (eight.best, eight.value)


def test_where_the_metric_is_noisy_mix_and_best_length_are_measured_afresh():
    search = searched(surface(0.4, noise=0.02))
    assert search.best.base_share > 0.1
    fresh = {trial.spot for trial in search.trials if trial.seed in FRESH}
    assert fresh == {search.at_end, search.best}
    assert search.value == np.mean(search.measured(search.best, FRESH))


def test_a_failed_share_is_the_last_one():
    search = searched(surface(0.33))
    until = [trial for trial in search.trials if trial.base_share < 0.25]
    failed = replace(search.trials[-1], target="", base_share=0.25, value=None)
    again = replace(search, trials=(*until, failed))
    assert again.next_measurements() == []
    assert again.best.base_share == 0.1


# --- in a sweep


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.safetensors"
    save_file({"a": torch.full((40,), 200.0)}, path)
    return path


def loss(weights):
    """Best at a mean of 70, later than all of the run, between its weights and the base."""
    return 1 + (float(weights["a"].mean()) / 70 - 1) ** 2


def test_a_sweep_with_a_base_writes_the_mix_and_names_base_hash_and_share(run, base, tmp_path):
    out = tmp_path / "out"
    report = run.sweep(loss, minimize=True, base=base, out=out)
    best = report.search.best
    average = float(run.average(best.sigma_rel)["a"].mean())
    assert best.base_share == pytest.approx((70 - average) / (200 - average), abs=0.03)
    mix = run.average(best.sigma_rel, t=report.best_t, base=base, base_share=best.base_share)
    assert_same_tensors(load_file(out / "best.safetensors"), mix)
    written = json.loads((out / "sweep.json").read_text())
    settings = written["settings"]
    assert settings["base"] == str(base)
    assert re.fullmatch("[0-9a-f]{16}", settings["base_hash"])
    assert written["best"]["base_share"] == best.base_share
    assert written["share_curve"][0]["base_share"] == 0
    told = dict(summarize(report))["base"]
    assert f"a share of {best.base_share:g} of {base} ({settings['base_hash']})" in told
    assert "of a loss, the gain may be one of calibration" in told
    page = (out / "report.html").read_text()
    assert page.count('<img class="chart"') == report._repr_html_().count("<svg")
    assert settings["base_hash"] in page
    command = shlex.join(["--base", str(base), "--base-share", f"{best.base_share:g}"])
    assert command in page
    (picture,) = share_figure(report.to_dict()).axes
    assert f"best: {best.base_share:g}" in {
        text.get_text() for text in picture.get_legend().get_texts()
    }
    again = run.sweep(loss, minimize=True, base=base, out=out)
    assert again.trials == report.trials


def test_another_base_is_another_sweep_and_one_that_does_not_fit_is_refused_first(
    run, base, tmp_path
):
    out = tmp_path / "out"
    run.sweep(loss, minimize=True, base=base, out=out)
    with refused(out, "base", kind=OutputExistsError):
        run.sweep(loss, minimize=True, out=out)
    save_file({"a": torch.zeros(40)}, base)
    with refused(out, "base_hash", kind=OutputExistsError):
        run.sweep(loss, minimize=True, base=base, out=out)
    save_file({"a": torch.zeros(41)}, base)
    with refused(base, "shape", kind=MismatchError):
        run.sweep(lambda _: pytest.fail("measured"), minimize=True, base=base)


def test_a_look_has_no_base(ema, run, base):
    words = ("--eval", "true {weights} {dir}", "--look", "--base", base)
    done = ema("sweep", run.directory, *words)
    assert done.code == 2
    assert InvalidValueError.__name__ not in done.err
    assert "--look" in done.error
