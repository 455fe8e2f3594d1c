"""`ema demo`: its training is real, and its numbers hold."""

import json
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib.image
import pytest
import torch
from checking import assert_same_tensors
from ema_command import run_ema
from safetensors.torch import load_file

from posthoc_cli import Run
from posthoc_cli import demo as room
from posthoc_cli.demo import (
    SIGMA_RELS,
    VALIDATION_IMAGES,
    Validation,
    make_denoiser,
    make_waves,
    sample,
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
        done = run_ema("demo", "--out", "my demo", "--steps", 100, "--json")
        assert done.code == 0, done.err
        # one demo is enough for both forms of its report
        with mock.patch("posthoc_cli.demo.run", return_value=done.json):
            text = run_ema("demo", "--out", "my demo").out
        yield Demo(Path("my demo"), done.json, text)


@pytest.fixture
def best(demo):
    """The model with the best average of a demo."""
    model = make_denoiser(seed=1)
    model.load_state_dict(load_file(demo.out / "best.safetensors"))
    return model


def test_a_demo_writes_the_best_average_whose_loss_it_names(demo, best):
    out = demo.out
    assert len(list((out / "snapshots").glob("*.safetensors"))) == 2 * 10
    width = f"{demo.report['best']:g}"
    page = (out / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert f'<dd class="best">sigma_rel {width} (as decay ' in page
    average = Run(out / "snapshots").average(demo.report["best"])
    assert_same_tensors(best.state_dict(), dict(average))
    validation = Validation(make_waves(VALIDATION_IMAGES, seed=1), seed=0, draws=16)
    loss = float(validation(best).mean())
    (named,) = re.findall(rf"^{width} +(0\.\d{{5}}) .*<- best$", demo.text, re.MULTILINE)
    assert float(named) == pytest.approx(loss, abs=1e-5)
    assert f"yours, of {width}: {named}" in demo.text
    result = json.loads((out / "sweep" / "sweep.json").read_text())
    chosen, again = [t for t in result["trials"] if t["sigma_rel"] == demo.report["best"]]
    assert chosen["value"] == again["value"]  # of the same images
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


def test_the_page_of_a_demo_shows_eight_samples_and_five_lengths(demo, best):
    page = (demo.out / "report.html").read_text()
    titles = re.findall(r"<figcaption><b>(last weights|sigma_rel [\d.]+)[ <]", page)
    assert titles[0] == "last weights"
    width = f"sigma_rel {demo.report['best']:g}"
    assert {"sigma_rel 0.05", "sigma_rel 0.28", width} <= {*titles}
    assert len(titles) == 6
    assert page.count("data:image/png;base64,") == 6 * 8
    assert 'data-name="log"' not in page  # trials within a process write none
    *_, drawn = sample(best, torch.arange(8), seed=0).reshape(-1, 8, 8)
    name = f"{width.replace(' ', '-')}-seed-0"
    picture = matplotlib.image.imread(demo.out / "sweep/images" / name / "class-7.png")
    brightness = (drawn.clamp(-1, 1).numpy() + 1) / 2
    assert abs(picture[::8, ::8, 0] - brightness).max() < 0.01


def test_heuns_method_draws_from_a_normal_distribution_whose_denoiser_is_known():
    """Of data of mean m and standard deviation s, D(x; sigma) = (s^2 x + sigma^2 m) / (s^2 +
    sigma^2), and the solution of the differential equation is m + (x - m) times the ratio of
    sqrt(s^2 + sigma^2), from the highest noise to none."""

    def known(noisy, sigma, _):
        return (0.25 * noisy + sigma**2 * 3.0) / (0.25 + sigma**2)

    random = torch.Generator().manual_seed(5)
    highest = room.HIGHEST_NOISE
    start = highest * torch.randn(4, 64, generator=random)
    ratio = (0.25 / (0.25 + highest**2)) ** 0.5
    exact = 3 + (start - 3) * ratio
    drawn = sample(known, torch.arange(4), seed=5)
    assert (drawn - exact).abs().max() < 0.05  # 0.04; by Euler's method 0.16


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
