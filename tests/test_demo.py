"""`ema demo`: its training is real, and its numbers and pictures hold."""

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch
from checking import assert_same_tensors
from ema_command import run_ema
from safetensors.torch import load_file

from posthoc_cli import Run
from posthoc_cli import demo as room
from posthoc_cli.demo import (
    SIGMA_RELS,
    STROKES,
    VALIDATION_POINTS,
    Validation,
    make_denoiser,
    make_letters,
    sample,
    sample_letters,
)

pytestmark = pytest.mark.xdist_group("demo")  # one demo for all that look at it


class Demo(NamedTuple):
    """The folder of a demo, and its report as JSON and as text."""

    out: Path
    report: dict[str, Any]
    text: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The working directory is the folder above that of the demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("demo"))
        done = run_ema("demo", "--out", "my demo", "--steps", 2400, "--json")
        assert done.code == 0, done.err
        # one demo is enough for both forms of its report
        with mock.patch("posthoc_cli.demo.run", return_value=done.json):
            text = run_ema("demo", "--out", "my demo").out
        yield Demo(Path("my demo"), done.json, text)


@pytest.fixture
def best(demo):
    """The model with the best average of a demo."""
    return model_of(demo, "best.safetensors")


def model_of(demo, name):
    model = make_denoiser(seed=1)
    model.load_state_dict(load_file(demo.out / name))
    return model


def validation_loss(model):
    """Return the loss by the formula: of each point at the quantiles of the noise levels."""
    return float(Validation(make_letters(VALIDATION_POINTS, seed=1), seed=0)(model).mean())


def distance(points):
    """Return the mean distance of points to the nearest point of the letters, from each stroke as
    many points 0.001 apart."""
    places = torch.linspace(0, 1, 1001)[:, None]
    lines = [begin + places * (end - begin) for begin, end in STROKES]
    curve = torch.cat(lines).double()
    return float(torch.cdist(torch.from_numpy(points), curve).amin(1).mean())


def test_a_demo_writes_the_best_average_whose_loss_it_names(demo, best):
    out = demo.out
    assert len(list((out / "snapshots").glob("*.safetensors"))) == 2 * 40
    width = f"{demo.report['best']:g}"
    page = (out / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert f'<dd class="best">sigma_rel {width} (as decay ' in page
    average = Run(out / "snapshots").average(demo.report["best"])
    assert_same_tensors(best.state_dict(), dict(average))
    (named,) = re.findall(rf"^{width} +(0\.\d{{5}}) .*<- best$", demo.text, re.MULTILINE)
    assert float(named) == pytest.approx(validation_loss(best), abs=1e-5)
    assert f"yours, of {width}: {named}" in demo.text
    result = json.loads((out / "sweep" / "sweep.json").read_text())
    chosen, again = [t for t in result["trials"] if t["sigma_rel"] == demo.report["best"]]
    assert chosen["value"] == again["value"]  # of the same points
    assert "better than the last weights, on these examples" in page
    assert chosen["predicted_error"] == pytest.approx(average.predicted_error)
    assert 0 < chosen["lost_gain"] < 1
    assert chosen["seconds"] > 0


def test_a_demo_has_a_loss_of_each_length_and_of_the_last_weights(demo):
    result = json.loads((demo.out / "sweep" / "sweep.json").read_text())
    losses = {}
    for trial in result["trials"]:
        losses[trial["sigma_rel"]] = f"{trial['value']:.5f}"
    assert [*losses] == [None, *SIGMA_RELS]
    for width, loss in losses.items():
        name = "last weights" if width is None else f"{width:g}"
        assert re.search(rf"^{name} +{loss}", demo.text, re.MULTILINE)
    assert f"a plain EMA of 0.05 or 0.28: {losses[0.05]} or {losses[0.28]};" in demo.text
    last = validation_loss(model_of(demo, "last.safetensors"))
    assert demo.report["raw"] == pytest.approx(last, rel=1e-6)


def test_samples_of_the_best_average_lie_nearest_to_the_letters(demo):
    run = Run(demo.out / "snapshots")
    best = distance(sample_letters(load_file(demo.out / "best.safetensors")))
    last = distance(sample_letters(load_file(demo.out / "last.safetensors")))
    assert best < 0.9 * last  # 0.36 to 0.81 of it with six seeds
    assert best < 0.7 * distance(sample_letters(run.average(0.28)))  # 0.39 to 0.48


def test_the_page_of_a_demo_shows_samples_of_the_best_length_and_of_others(demo):
    page = (demo.out / "report.html").read_text()
    titles = re.findall(r"<figcaption><b>(last weights|sigma_rel [\d.]+)[ <]", page)
    shown = sorted({demo.report["best"], 0.025, 0.05, 0.15, 0.28})
    assert titles == ["last weights", *(f"sigma_rel {width:g}" for width in shown)]
    assert page.count("data:image/png;base64,") == len(titles)
    assert 'data-name="log"' not in page  # trials within a process write none


def test_letters_are_points_on_their_strokes_at_the_same_density():
    points, strokes = make_letters(4000, seed=3)
    begins, ends = STROKES[strokes].unbind(1)
    # on the segment: the ways to both ends are together as long as it
    ways = (points - begins).norm(dim=1) + (points - ends).norm(dim=1)
    lengths = (ends - begins).norm(dim=1)
    assert (ways - lengths).abs().max() < 1e-6
    whole = (STROKES[:, 1] - STROKES[:, 0]).norm(dim=1)
    expected = 4000 * whole / whole.sum()
    counted = strokes.bincount(minlength=len(STROKES))
    assert ((counted - expected).abs() < 5 * expected.sqrt()).all()


def test_the_loss_of_a_network_that_gives_0_follows_from_the_points_alone():
    """Such a network is a new one; D(y + sigma n) = c (y + sigma n) with c = s^2 / (s^2 +
    sigma^2), and the mean of n^2 is 1."""
    points = make_letters(4000, seed=4)
    y = points.points.double()
    variance = room.STANDARD_DEVIATION**2
    expected = []
    for quantile in (np.arange(8) + 0.5) / 8:
        normal = float(torch.special.ndtri(torch.tensor(quantile)))
        sigma = np.exp(room.LOG_NOISE_MEAN + room.LOG_NOISE_STD * normal)
        kept = variance / (variance + sigma**2)
        errors = (1 - kept) ** 2 * y**2 + kept**2 * sigma**2
        expected.append((errors / (variance * (1 - kept))).mean())
    found = Validation(points, seed=0, draws=8)(make_denoiser(seed=0)).mean()
    assert float(found) == pytest.approx(float(np.mean(expected)), rel=0.02)


def test_heuns_method_draws_from_a_normal_distribution_whose_denoiser_is_known():
    """Of data of mean m and standard deviation s, D(x; sigma) = (s^2 x + sigma^2 m) / (s^2 +
    sigma^2), and the solution of the differential equation is m + (x - m) times the ratio of
    sqrt(s^2 + sigma^2), from the highest noise to none."""

    def known(noisy, sigma, _):
        return (0.25 * noisy + sigma**2 * 3.0) / (0.25 + sigma**2)

    random = torch.Generator().manual_seed(5)
    highest = room.HIGHEST_NOISE
    start = highest * torch.randn(50, 2, generator=random)
    ratio = (0.25 / (0.25 + highest**2)) ** 0.5
    exact = 3 + (start - 3) * ratio
    drawn = sample(known, torch.zeros(50), seed=5)
    assert (drawn - exact).abs().max() < 0.05


def test_a_second_demo_takes_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(room.free_folder()) == "ema-demo"
    Path("ema-demo").mkdir()
    Path("ema-demo-2").touch()
    assert str(room.free_folder()) == "ema-demo-3"


def test_the_commands_that_a_demo_suggests_work(demo):
    _, _, end = demo.text.partition("and try:")
    suggested = re.findall(r"^  (ema .*)$", end, re.MULTILINE)
    assert len(suggested) == 3
    for command in suggested:
        done = run_ema(*shlex.split(command)[1:])
        assert done.code == 0, done.err
