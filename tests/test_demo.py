"""`ema demo`: its training is real, it prints the commands that it runs, and its numbers hold."""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import matplotlib.image
import pytest
import torch
from checking import assert_same_tensors
from ema_command import Ema, run_ema
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
    train,
)

pytestmark = pytest.mark.xdist_group("demo")  # one demo for all that look at it


class Demo(NamedTuple):
    """The folder of a demo, its report as JSON and as text, and the commands that it has run."""

    out: Path
    report: dict[str, Any]
    text: str
    commands: list[str]


def in_this_process(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Run a command of the demo."""
    assert command[:3] == [sys.executable, "-m", "posthoc_cli"]
    done = run_ema(*command[3:])
    return subprocess.CompletedProcess(command, done.code, done.out, done.err)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """The working directory is the folder above that of the demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("demo"))
        patch.setenv("PATH", "")  # commands are then printed without a path
        patch.setattr("posthoc_cli.demo.subprocess.run", in_this_process)
        done = run_ema("demo", "--out", "my demo", "--steps", 100, "--json")
        assert done.code == 0, done.err
        # one demo is enough for both forms of its report
        with mock.patch("posthoc_cli.demo.run", return_value=done.json):
            text = run_ema("demo", "--out", "my demo").out
        commands = re.findall(r"^\$ (ema .*)$", done.err, re.MULTILINE)
        yield Demo(Path("my demo"), done.json, text, commands)


def test_a_folder_of_the_user_is_refused(ema: Ema, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    refused = ema("demo", "--out", tmp_path)
    assert refused.code == 1
    assert refused.error.endswith("already exists, and is no empty folder; name another one")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_demo_makes_snapshots_pictures_and_the_best_average_whose_loss_is_the_one_it_names(
    demo: Demo,
) -> None:
    out = demo.out
    assert len(list((out / "snapshots").glob("*.safetensors"))) == 2 * 10
    for name in ("loss.png", "error.png", "samples.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "sweep" / "sweep.json").read_text())
    assert f"Best: {result['best']['target']}" in (out / "report.html").read_text()
    best = result["best"]["sigma_rel"]
    assert demo.report["best"] == best
    assert demo.report["raw"] == result["raw"]
    values = [trial["value"] for trial in result["trials"]]
    weights = load_file(out / "best.safetensors")
    assert_same_tensors(weights, dict(Run(out / "snapshots").average(round(best, 6))))
    pattern = r"^(raw weights|0\.\d+) +(0\.\d{5})(?: +[+-].*?%)?.*?(<- best)?$"
    rows = re.findall(pattern, demo.text, re.MULTILINE)
    losses = {width: loss for width, loss, _ in rows}
    widths = [f"{width:g}" for width in SIGMA_RELS]
    assert list(losses) == ["raw weights", *widths]
    assert list(losses.values()) == [f"{value:.5f}" for value in values]
    plain = f"a plain EMA of 0.05 or 0.28: {losses['0.05']} or {losses['0.28']}"
    assert f"{plain}; yours, of {best:g}: {losses[f'{best:g}']}" in demo.text
    assert [width for width, _, mark in rows if mark] == [f"{best:g}"]
    model = make_denoiser(seed=1)
    model.load_state_dict(weights)
    validation = Validation(make_waves(VALIDATION_IMAGES, seed=1), seed=0, draws=16)
    found = float(validation(model).mean())
    assert found == pytest.approx(float(losses[f"{best:g}"]), abs=1e-5)


def test_the_page_of_a_demo_shows_eight_samples_of_the_raw_weights_and_five_lengths(
    demo: Demo,
) -> None:
    out = demo.out
    page = (out / "report.html").read_text()
    titles = re.findall(r"<figcaption>(raw weights|sigma_rel [\d.]+),", page)
    assert titles[0] == "raw weights"
    best = f"sigma_rel {demo.report['best']:g}"
    assert {"sigma_rel 0.05", "sigma_rel 0.28", best} <= {*titles}
    assert len(titles) == 6
    assert page.count("data:image/png;base64,") == 6 * 8
    assert 'data-name="log"' not in page  # trials within a process write none
    model = make_denoiser(seed=1)
    model.load_state_dict(load_file(out / "best.safetensors"))
    drawn = sample(model, torch.arange(8), seed=0).reshape(-1, 8, 8)
    folder = out / "sweep/images" / f"sigma_rel-{demo.report['best']:g}-seed-0"
    for number, image in enumerate(drawn):
        picture = matplotlib.image.imread(folder / f"class-{number}.png")
        pixels = picture[::8, ::8, 0]
        brightness = (image.clamp(-1, 1).numpy() + 1) / 2
        assert abs(pixels - brightness).max() < 0.01


def test_heuns_method_draws_from_a_normal_distribution_whose_denoiser_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of data of mean m and standard deviation s, D(x; sigma) = (s^2 x + sigma^2 m) / (s^2 +
    sigma^2), and the solution of the differential equation is m + (x - m) times the ratio of
    sqrt(s^2 + sigma^2), from the highest noise to none."""

    class Known(torch.nn.Module):
        def forward(
            self,
            noisy: torch.Tensor,
            sigma: torch.Tensor,
            _: torch.Tensor,
        ) -> torch.Tensor:
            return (0.25 * noisy + sigma**2 * 3.0) / (0.25 + sigma**2)

    random = torch.Generator().manual_seed(5)
    highest = room.HIGHEST_NOISE
    start = highest * torch.randn(4, 64, generator=random)
    ratio = (0.25 / (0.25 + highest**2)) ** 0.5
    exact = 3 + (start.double() - 3) * ratio
    errors = []
    for steps in (18, 36):
        monkeypatch.setattr(room, "SAMPLER_STEPS", steps)
        drawn = sample(Known(), torch.arange(4), seed=5).double()
        errors.append(float((drawn - exact).abs().max()))
    assert errors[0] < 0.05
    assert errors[1] < errors[0] / 3  # of the second order, so about a quarter


def test_a_second_demo_takes_another_folder(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(room.free_folder()) == "ema-demo"
    Path("ema-demo").mkdir()
    Path("ema-demo-2").touch()
    assert str(room.free_folder()) == "ema-demo-3"


def test_commands_are_printed_as_the_program_was_called(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    program = Path(".venv/bin/ema")
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    for given, path, name in (
        (program, "", ".venv/bin/ema"),
        (program, tmp_path / program.parent, "ema"),
        ("/usr/lib/posthoc_cli/__main__.py", "", "ema"),
    ):
        monkeypatch.setattr("sys.argv", [str(given), "demo"])
        monkeypatch.setenv("PATH", str(path))
        assert room.command_name() == name


def test_every_command_that_a_demo_prints_can_be_repeated(ema: Ema, demo: Demo) -> None:
    """The commands that it suggests to try next work, too."""
    assert demo.commands == demo.report["commands"]
    names = [shlex.split(command)[1] for command in demo.commands]
    assert names == ["info", "synthesize", "error-plot", "report"]
    _, _, end = demo.text.partition("and try:")
    suggested = re.findall(r"^  (ema .*)$", end, re.MULTILINE)
    assert len(suggested) == 3
    average = demo.out / "best.safetensors"
    before = load_file(average)
    average.unlink()
    for command in demo.commands + suggested:
        done = ema(*shlex.split(command)[1:])
        assert done.code == 0, done.err
    assert_same_tensors(load_file(average), before)


def test_training_is_the_same_every_time_and_leaves_random_state_and_threads_alone(
    tmp_path: Path,
) -> None:
    assert [steps % room.checkpoint_every(steps) for steps in (100, 3300)] == [0, 0]
    images = make_waves(200, seed=0)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    first = train(100, images, tmp_path / "first", lambda _: None)
    second = train(100, images, tmp_path / "second", lambda _: None)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert_same_tensors(first.state_dict(), second.state_dict())
