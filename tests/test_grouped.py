"""Outputs whose tensors have averages of different lengths."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors, refused
from ema_command import Ema
from factories import random_walk, write_run
from safetensors.torch import load_file

from posthoc_cli import Run
from posthoc_cli.errors import OutputExistsError

SHAPES = {"up.a": (30, 10), "down.b": (7,), "up.c": (5,), "down.d": (300, 40)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("grouped") / "run"
    write_run(folder, random_walk(12, SHAPES), range(1, 13))
    return Run(folder)


def expected(run: Run, up: float, down: float) -> dict[str, torch.Tensor]:
    wide, narrow = run.average(up), run.average(down)
    return {name: wide[name] if name.startswith("up") else narrow[name] for name in SHAPES}


@pytest.mark.parametrize("layout", [None, "sharded"])
def test_each_tensor_has_the_length_of_its_group_in_every_output(run: Run, tmp_path: Path, layout: str | None) -> None:
    paths = [tmp_path / (name if layout else f"{name}.safetensors") for name in ("one", "two")]
    wanted = [{"up.*": 0.2, "*": 0.1}, {"up.*": 0.05, "*": 0.1}]
    errors = run.write_groups(wanted, paths, layout=layout)
    for path, groups, error in zip(paths, wanted, errors, strict=True):
        file = path / "model.safetensors" if layout else path
        assert_same_tensors(load_file(file), expected(run, groups["up.*"], groups["*"]))
        parts = [run.plan(width).predicted_error(0) for width in groups.values()]
        assert error == max(part for part in parts if part is not None)
    with refused(str(paths[0]), kind=OutputExistsError):
        run.write_groups(wanted, paths, layout=layout)


def test_the_command_makes_one_output_that_names_its_groups_and_verifies(ema: Ema, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    done = ema("synthesize", run.directory, "--group", "up.*=0.2", "--group", "*=0.1", "--out", path)
    assert done.code == 0, done.err
    assert_same_tensors(load_file(path), expected(run, 0.2, 0.1))
    assert ema("verify", path).code == 0
    assert ema("info", path, "--json").json["profile"] == "sigma_rel 0.2 (up.*), 0.1 (*)"


def test_a_tensor_without_a_group_and_a_group_without_a_tensor_are_refused(run: Run, tmp_path: Path) -> None:
    with refused("group", "none matches tensor 'down.b'", "add '*=0.1'"):
        run.write_groups([{"up.*": 0.1}], [tmp_path / "x.safetensors"])
    with refused("group", "matches no tensor"):
        run.write_groups([{"*": 0.1, "up.*": 0.2}], [tmp_path / "x.safetensors"])
    assert list(tmp_path.iterdir()) == []
