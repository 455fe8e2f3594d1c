"""`ema plan`: what it prints can be pasted, and what it cannot plan it says in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from ema_command import Ema

from posthoc_cli import PostHocEMA

TASK = ("plan", "--steps", "4000", "--params", "1M", "--max-size", "24MB")


def test_it_prints_alternatives_and_a_call_that_runs(ema: Ema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = ema(*TASK)
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    columns = ["tracked", "dtype", "kept", "every", "disk", "worst error", "median error"]
    assert re.split(r"  +", lines[0]) == columns
    table, _, rest = result.out.partition("\npredicted errors")
    assert max(map(len, table.splitlines())) <= 80
    monkeypatch.chdir(tmp_path)
    names: dict = {"PostHocEMA": PostHocEMA, "model": torch.nn.Linear(2, 1)}
    exec(rest[rest.index("\nema = ") :], names)
    settings = names["ema"].settings
    assert settings.sigma_rels == tuple(float(s) for s in lines[1].split("  ")[0].split(", "))
    assert f"{settings.schedule.checkpoint_every:,}" in lines[1]
    assert str(settings.schedule.max_checkpoints) in lines[1].split()


def test_json_has_everything_and_choices_can_be_fixed(ema: Ema) -> None:
    report = ema(*TASK, "--sigma-range", "0.1:0.2", "--json").json
    assert report["max_bytes"] == 24_000_000
    assert report["motion"] == "assumed"
    best = report["proposals"][0]
    assert best["worst_error"] == max(best["predicted_error"]) <= 5e-4 == report["max_error"]
    assert best["bytes"] <= 24_000_000
    assert best["checkpoint_every"] % best["update_every"] == 0
    assert report["call"].startswith("ema = PostHocEMA.from_model(")
    fixed = ("--sigma-rels", "0.1,0.05", "--dtype", "fp16", "--checkpoint-every", "500", "--max-checkpoints", "3")
    (best,) = ema(*TASK, *fixed, "--json").json["proposals"]
    assert (best["sigma_rels"], best["dtype"]) == ([0.05, 0.1], "float16")
    assert (best["checkpoint_every"], best["max_checkpoints"]) == (500, 3)


def test_what_is_good_enough_can_be_said(ema: Ema) -> None:
    fixed = (*TASK, "--max-size", "100MB", "--dtype", "float16", "--sigma-rels", "0.05,0.28", "--json")
    coarse, fine = (ema(*fixed, "--max-error", error).json["proposals"] for error in ("1%", "1e-5"))
    assert coarse[0]["worst_error"] <= 0.01
    assert coarse[0]["bytes"] < fine[0]["bytes"]
    assert fine[0]["worst_error"] == min(other["worst_error"] for other in fine)  # not to be had: the least


def test_like_takes_the_movement_of_a_run(ema: Ema, run: Path) -> None:
    fixed = ("--sigma-rels", "0.05,0.28", "--dtype", "float16", "--checkpoint-every", "500", "--json")
    plain, like = (ema(*TASK, *fixed, *more).json for more in ((), ("--like", run)))
    assert like["motion"] == "like"
    assert like["proposals"][0]["worst_error"] != pytest.approx(plain["proposals"][0]["worst_error"], rel=0.05)
    assert f"as in {run}" in ema(*TASK, *fixed[:-1], "--like", run).out


def test_it_draws(ema: Ema, tmp_path: Path) -> None:
    out = tmp_path / "plan.png"
    fixed = ("--sigma-rels", "0.05,0.28", "--out", out)
    assert ema(*TASK, *fixed).out.splitlines()[-1] == f"wrote {out}"
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert "--overwrite to replace" in ema(*TASK, *fixed).error
    assert ema(*TASK, *fixed, "--overwrite").code == 0
