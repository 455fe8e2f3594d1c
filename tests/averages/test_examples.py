"""The public names of `posthoc_cli.averages`; examples in docstrings and scripts run and print what they promise."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path

import bench_averages
import bench_differentiable
import hare_tortoise
import pytest
import quiet_timing
import switch_ema
import torch

import posthoc_cli
from posthoc_cli import averages


@pytest.mark.parametrize("name", averages.__all__)
def test_the_example_in_the_docstring_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = getattr(averages, name)
    names = dict(vars(sys.modules[found.__module__]))
    (example,) = doctest.DocTestFinder(recurse=False).find(found, name, globs=names)
    outcome = doctest.DocTestRunner().run(example)
    assert outcome.failed == 0, capsys.readouterr().out
    assert outcome.attempted > 2


def test_settings_show() -> None:
    layer = torch.nn.Linear(1, 1)
    assert "momentum=0.01, interval=2, update_buffers=False, warmup=True" in repr(
        averages.ExponentialMovingAverage(layer, 0.01, 2, warmup=True)
    )
    assert "decay=0.9, num_updates=3, zero_debias=True" in repr(averages.ShadowModel(layer, 0.9, 3, True))
    assert "dim_x=3, dim_y=2, momentum=0.5, eps=1e-06" in repr(averages.EMAStats(3, 2, 0.5))


def test_the_room_is_there_without_an_import_of_its_own() -> None:
    assert posthoc_cli.averages is averages
    assert averages.__all__ == sorted(averages.__all__)


def test_bench_averages_judges_no_busy_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**9))
    monkeypatch.setattr(quiet_timing, "PATIENCE", 0.0)
    monkeypatch.setattr(quiet_timing, "busy_seconds", lambda: 1000.0 * next(ticks))
    bench_averages.main(["--quick"])
    out = capsys.readouterr().out
    assert len(re.findall(r"^  (?:ExponentialMovingAverage|ShadowModel|swa_utils\S+) +\d+\.\d\d ms", out, re.M)) == 9
    assert "Goal: NOT JUDGED" in out


def test_bench_differentiable_prints_its_table_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "picture.png"
    bench_differentiable.main(["--quick", "--figure", str(picture)])
    lines = capsys.readouterr().out.splitlines()
    for label in ("truncated", "window of 3", "carried", "full graph"):
        assert sum(line.startswith(label) for line in lines) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_switch_ema_prints_every_method_and_claim(capsys: pytest.CaptureFixture[str]) -> None:
    switch_ema.main(["--quick"])
    text = capsys.readouterr().out
    for label in ("SGD", "EMA", "Switch EMA", "Switch EMA, tracker"):
        assert len(re.findall(rf"^{label} +\d", text, re.MULTILINE)) == len(switch_ema.SETTINGS)
    verdicts = re.findall(r"^  (shows|does not show|the contrary)  ", text, re.MULTILINE)
    assert len(verdicts) == 6 * len(switch_ema.SETTINGS)


def test_hare_and_tortoise_prints_every_method_and_claim(capsys: pytest.CaptureFixture[str]) -> None:
    hare_tortoise.main(["--quick"])
    lines = capsys.readouterr().out.splitlines()
    for method in hare_tortoise.METHODS:
        assert sum(line[:24].rstrip() == method.label for line in lines) == 1
    assert sum(bool(re.match("  (shows|does not show|the contrary)  ", line)) for line in lines) == 7
