"""Outputs whose tensors have averages of different lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors, refused
from ema_command import Ema
from factories import random_walk, write_run
from safetensors.torch import load_file

from posthoc_cli import Groups, PostHocEMA, Run

SHAPES = {"up.a": (30, 10), "down.b": (7,), "up.c": (5,), "down.d": (300, 40)}
GROUPS = {"up.*": 0.2, "*": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("grouped") / "run"
    write_run(folder, random_walk(12, SHAPES), range(1, 13))
    return Run(folder)


def expected(run: Run, up: float, down: float) -> dict[str, torch.Tensor]:
    wide, narrow = run.average(up), run.average(down)
    return {name: wide[name] if name.startswith("up") else narrow[name] for name in SHAPES}


def test_each_tensor_has_the_length_of_its_group_beside_other_targets(run: Run, tmp_path: Path) -> None:
    wanted = [Groups(GROUPS), 0.15, Groups({"*.d": 0.05, "*": 0.1})]
    report = run.write(wanted, tmp_path / "new", skip_existing=True)
    assert report is not None
    first, plain, last = map(load_file, report.outputs)
    assert_same_tensors(first, expected(run, 0.2, 0.1))
    assert_same_tensors(plain, run.average(0.15))
    assert_same_tensors(last, {**run.average(0.1), "down.d": run.average(0.05)["down.d"]})
    parts = [run.plan(width).predicted_error(0) for width in GROUPS.values()]
    assert report.plan.predicted_error(0) == max(part for part in parts if part is not None)
    again = run.write(wanted, tmp_path / "new", skip_existing=True)
    assert again is not None
    assert again.existing == {0, 1, 2}
    assert_same_tensors(run.average(wanted[0]), first)
    assert_same_tensors(PostHocEMA.from_path(run.directory).state_dict(wanted[0]), first)


def test_the_command_makes_outputs_that_name_their_groups_and_verify(ema: Ema, run: Run, tmp_path: Path) -> None:
    """Whole, or in shards."""
    path, words = tmp_path / "model.safetensors", ("--group", "up.*=0.2", "--group", "*=0.1", "--json")
    report = ema("synthesize", run.directory, *words, "--out", path).json
    assert_same_tensors(load_file(path), expected(run, 0.2, 0.1))
    assert ema("verify", path).code == 0
    assert ema("info", path, "--json").json["profile"] == "sigma_rel 0.2 (up.*), 0.1 (*)"
    assert report["targets"][0]["target"] == "sigma_rel 0.2 (up.*), 0.1 (*)"
    words = (*words, "--layout", "sharded", "--max-shard-size", "100")
    assert ema("synthesize", run.directory, *words, "--out", tmp_path / "parts").code == 0
    shards = [load_file(shard) for shard in sorted((tmp_path / "parts").glob("*.safetensors"))]
    assert len(shards) > 1
    assert_same_tensors({k: v for shard in shards for k, v in shard.items()}, expected(run, 0.2, 0.1))


def test_a_tensor_without_a_group_and_a_group_without_a_tensor_are_refused(run: Run) -> None:
    with refused("group", "tensor 'down.b' matches no group", "add '*=0.1'"):
        run.plan(Groups({"up.*": 0.1}))
    with refused("group", "matches no tensor"):
        run.plan(Groups({"*": 0.1, "up.*": 0.2}))
