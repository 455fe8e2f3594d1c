"""`ema demo`: its training is real, it prints the commands that it runs, and its numbers hold."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import forked
import pytest
import torch
from checking import assert_same_tensors, refused
from ema_command import Ema
from factories import exact_weights
from safetensors.torch import load_file

from posthoc_cli.demo import (
    DIRECT_SIGMA_RELS,
    SIGMA_RELS,
    DirectAverage,
    Folder,
    TrainingSettings,
    make_denoiser,
    make_waves,
    train,
)
from posthoc_cli.errors import OutputExistsError
from posthoc_cli.plots import sweep_figure

pytestmark = pytest.mark.xdist_group("demo")  # one demo for all that look at it


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run `ema demo`; return its folder and its output."""
    base = tmp_path_factory.mktemp("demo")
    done = forked.check(forked.EMA, "demo", "--steps", 300, cwd=base)
    assert done.err == ""
    return base, done.out


def test_a_demo_makes_snapshots_averages_and_pictures_and_names_one_best_length(demo: tuple[Path, str]) -> None:
    base, printed = demo
    out = base / "ema-demo"
    assert len(list((out / "snapshots").glob("*.safetensors"))) == 2 * 30
    assert sorted((out / "averages").iterdir()) == sorted(Folder(out).average(width) for width in SIGMA_RELS)
    for name in ("loss.png", "error.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "sweep" / "sweep.json").read_text())
    assert f"Best: {result['best']['target']}" in (out / "report.html").read_text()
    best = result["best"]["sigma_rel"]
    assert_same_tensors(torch.load(out / "best.pt", weights_only=True), load_file(Folder(out).average(best)))
    legend = {text.get_text() for text in sweep_figure(result).axes[0].get_legend().get_texts()}  # as in loss.png
    assert f"best: {best:g}" in legend
    weights = torch.load(out / "best.pt", weights_only=True)
    assert make_denoiser(seed=1).load_state_dict(weights)
    rows = re.findall(r"^ *(raw weights|0\.\d+) +(0\.\d{5})(?: +([+-].*?%))?.*?(<- best)?$", printed, re.MULTILINE)
    losses = {width: float(loss) for width, loss, _, _ in rows}
    assert list(losses) == ["raw weights", *(f"{width:g}" for width in SIGMA_RELS)]
    assert losses == {
        f"{trial['x']:g}" if trial["x"] else "raw weights": round(trial["value"], 5) for trial in result["trials"]
    }
    assert [width for width, _, _, mark in rows if mark] == [f"{best:g}"]


def test_every_command_that_a_demo_prints_can_be_repeated(demo: tuple[Path, str]) -> None:
    """The commands that it suggests to try next work, too."""
    base, printed = demo
    commands = re.findall(r"^\$ (ema .*)$", printed, re.MULTILINE)
    assert [shlex.split(command)[1] for command in commands] == [
        "info", "error-plot", "synthesize", "export", "report",
    ]  # fmt: skip
    suggested = re.findall(r"^  (ema .*)$", printed.partition("and try:")[2], re.MULTILINE)
    assert len(suggested) == 3
    average = Folder(base / "ema-demo").average(0.1)
    before = load_file(average)
    average.unlink()
    for command in commands + suggested:
        forked.check(forked.EMA, *shlex.split(command)[1:], cwd=base)
    assert_same_tensors(load_file(average), before)


def test_synthesized_weights_are_the_tracked_averages_within_the_predicted_error(demo: tuple[Path, str]) -> None:
    base, printed = demo
    folder = Folder(base / "ema-demo")
    for width in DIRECT_SIGMA_RELS:
        tracked = load_file(folder.tracked(width))
        assert all(value.dtype == torch.float64 for value in tracked.values())
        vectors = [
            torch.cat([weights[name].double().reshape(-1) for name in tracked])
            for weights in (tracked, load_file(folder.average(width)), load_file(folder.raw))
        ]
        error, raw = (float((vector - vectors[0]).norm() / vectors[0].norm()) for vector in vectors[1:])
        predicted = forked.check(forked.EMA, "info", folder.average(width), "--json").json
        assert error <= 3 * predicted["predicted_error"]
        assert error < 0.1 * raw
        assert re.search(rf"^ *{width:g} +{error:.1e} +{raw:.1e}$", printed, re.MULTILINE)


def test_overwrite_replaces_an_earlier_demo_and_leaves_other_files_and_json_is_one_object(
    ema: Ema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: forked.Forked(forked.EMA, *command[3:]))
    out = tmp_path / "my demo"
    Folder(out).prepare(overwrite=False)
    stale = out / "averages" / "sigma_rel-0.01.safetensors"
    for file in (stale, out / "loss.png", out / "notes.txt", out / "averages" / "mine.safetensors"):
        file.write_text("x")

    found = ema("demo", "--out", out, "--steps", 100)
    assert found.code == 1
    assert found.error.endswith("my demo: holds an earlier demo; name another folder, or `overwrite` to replace it")

    done = ema("demo", "--out", "my demo", "--steps", 100, "--overwrite", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    result = json.loads((out / "sweep" / "sweep.json").read_text())
    assert (report["best"], report["raw"]) == (result["best"]["sigma_rel"], result["raw"])
    assert [one["loss"] for one in report["averages"]] == [trial["value"] for trial in result["trials"][1:]]
    assert [check["sigma_rel"] for check in report["tracked"]] == list(DIRECT_SIGMA_RELS)
    assert [f"$ {command}" for command in report["commands"]] == re.findall(r"^\$ .*$", done.err, re.MULTILINE)
    assert "'my demo/snapshots'" in report["commands"][0]
    assert not stale.exists()
    assert (out / "notes.txt").read_text() == "x"
    assert (out / "averages" / "mine.safetensors").read_text() == "x"


def test_a_folder_that_is_not_a_demos_is_never_touched(tmp_path: Path) -> None:
    Folder(tmp_path).prepare(overwrite=False)  # an empty one is taken
    mine = tmp_path / "mine" / "snapshots" / "mine.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    for overwrite in (False, True):
        with refused(str(tmp_path / "mine"), "no earlier demo", kind=OutputExistsError):
            Folder(tmp_path / "mine").prepare(overwrite)
    assert list((tmp_path / "mine").rglob("*")) == [mine.parent, mine]
    with refused(str(mine), "no earlier demo", kind=OutputExistsError):
        Folder(mine).prepare(overwrite=True)


@pytest.mark.parametrize("width", [*DIRECT_SIGMA_RELS, 0.28])
def test_a_direct_average_weighs_each_value_with_the_profiles_mass_on_its_interval(width: float) -> None:
    values = torch.randn(30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    average, times = DirectAverage(width), [10.0 * k for k in range(1, 31)]
    for value, t in zip(values, times, strict=True):
        average.update_(value, t)
    named = average.by_name(torch.nn.Linear(3, 1))
    expected = torch.from_numpy(exact_weights(width, times)) @ values
    assert torch.allclose(torch.cat([named["weight"].reshape(-1), named["bias"]]), expected, rtol=1e-12)


def test_training_is_the_same_every_time_and_leaves_random_state_and_threads_alone(tmp_path: Path) -> None:
    images = make_waves(200, seed=0)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (train(TrainingSettings(100), images, tmp_path / name, [0.1], lambda _: None)[0] for name in "ab")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert_same_tensors(first.state_dict(), second.state_dict())
