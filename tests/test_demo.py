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
from safetensors.torch import load_file

from posthoc_cli import Run
from posthoc_cli.demo import SIGMA_RELS, VALIDATION_IMAGES, Validation, make_denoiser, make_waves, prepare, train
from posthoc_cli.errors import OutputExistsError

pytestmark = pytest.mark.xdist_group("demo")  # one demo for all that look at it


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run `ema demo`; return its folder and its output."""
    base = tmp_path_factory.mktemp("demo")
    done = forked.check(forked.EMA, "demo", "--steps", 300, cwd=base)
    assert done.err == ""
    return base, done.out


def test_a_demo_makes_snapshots_pictures_and_the_best_average_whose_loss_is_the_one_it_names(
    demo: tuple[Path, str],
) -> None:
    base, printed = demo
    out = base / "ema-demo"
    assert len(list((out / "snapshots").glob("*.safetensors"))) == 2 * 30
    for name in ("loss.png", "error.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    result = json.loads((out / "sweep" / "sweep.json").read_text())
    assert f"Best: {result['best']['target']}" in (out / "report.html").read_text()
    best = result["best"]["sigma_rel"]
    weights = load_file(out / "best.safetensors")
    assert_same_tensors(weights, dict(Run(out / "snapshots").average(round(best, 6))))
    rows = re.findall(r"^(raw weights|0\.\d+) +(0\.\d{5})(?: +([+-].*?%))?.*?(<- best)?$", printed, re.MULTILINE)
    losses = {width: float(loss) for width, loss, _, _ in rows}
    assert list(losses) == ["raw weights", *(f"{width:g}" for width in SIGMA_RELS)]
    assert losses == {
        f"{trial['x']:g}" if trial["x"] else "raw weights": round(trial["value"], 5) for trial in result["trials"]
    }
    assert [width for width, _, _, mark in rows if mark] == [f"{best:g}"]
    model = make_denoiser(seed=1)
    model.load_state_dict(weights)
    found = float(Validation(make_waves(VALIDATION_IMAGES, seed=1), seed=0)(model).mean())
    assert found == pytest.approx(losses[f"{best:g}"], abs=1e-5)


def test_every_command_that_a_demo_prints_can_be_repeated(demo: tuple[Path, str]) -> None:
    """The commands that it suggests to try next work, too."""
    base, printed = demo
    commands = re.findall(r"^\$ (ema .*)$", printed, re.MULTILINE)
    assert [shlex.split(command)[1] for command in commands] == ["info", "synthesize", "error-plot", "report"]
    suggested = re.findall(r"^  (ema .*)$", printed.partition("and try:")[2], re.MULTILINE)
    assert len(suggested) == 3
    average = base / "ema-demo" / "best.safetensors"
    before = load_file(average)
    average.unlink()
    for command in commands + suggested:
        forked.check(forked.EMA, *shlex.split(command)[1:], cwd=base)
    assert_same_tensors(load_file(average), before)


def test_overwrite_replaces_an_earlier_demo_and_leaves_other_files_and_json_is_one_object(
    ema: Ema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: forked.Forked(forked.EMA, *command[3:]))
    out = tmp_path / "my demo"
    prepare(out, overwrite=False)
    (out / "snapshots").mkdir()
    stale = out / "snapshots" / "0000000000000055-0.05.safetensors"
    for file in (stale, out / "loss.png", out / "notes.txt", out / "mine.safetensors"):
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
    assert [f"$ {command}" for command in report["commands"]] == re.findall(r"^\$ .*$", done.err, re.MULTILINE)
    assert "'my demo/snapshots'" in report["commands"][0]
    assert not stale.exists()
    assert (out / "notes.txt").read_text() == (out / "mine.safetensors").read_text() == "x"


def test_a_folder_that_is_not_a_demos_is_never_touched(tmp_path: Path) -> None:
    prepare(tmp_path, overwrite=False)  # an empty one is taken
    mine = tmp_path / "mine" / "snapshots" / "mine.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("x")
    for overwrite in (False, True):
        with refused(str(tmp_path / "mine"), "no earlier demo", kind=OutputExistsError):
            prepare(tmp_path / "mine", overwrite)
    assert list((tmp_path / "mine").rglob("*")) == [mine.parent, mine]
    with refused(str(mine), "no earlier demo", kind=OutputExistsError):
        prepare(mine, overwrite=True)


def test_training_is_the_same_every_time_and_leaves_random_state_and_threads_alone(tmp_path: Path) -> None:
    images = make_waves(200, seed=0)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (train(100, images, tmp_path / name, lambda _: None) for name in "ab")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert_same_tensors(first.state_dict(), second.state_dict())
