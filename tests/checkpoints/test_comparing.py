"""Distances of models of any kind, against NumPy in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_layouts import LAYOUTS, Weights
from ema_command import Ema
from safetensors.torch import save_file

from posthoc_cli import PostHocEMA, Run, errors
from posthoc_cli.checkpoints.comparing import compare


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((other.double() - one.double()).norm() / one.double().norm())


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "lightning"])
def test_models_of_any_kind(layout: str, tmp_path: Path, weights: dict[int, Weights]) -> None:
    for kind, step in (("archives", 20), (layout, 200)):
        (tmp_path / kind).mkdir(exist_ok=True)
        LAYOUTS[kind](tmp_path / kind, step, weights[step])
    places = [path for path in (tmp_path / layout).iterdir() if "0020." not in path.name]
    found = compare(tmp_path / "archives" / "model-00000020.pt", places[0])
    assert not (found.only_a or found.only_b or found.shapes)
    for one in found.tensors:
        assert one.relative == pytest.approx(relative(weights[20][one.name], weights[200][one.name]), rel=1e-9)
    joined = [torch.cat([value.double().flatten() for value in weights[step].values()]) for step in (20, 200)]
    assert found.total.relative == pytest.approx(relative(*joined), rel=1e-9)
    assert found.total.largest == pytest.approx(float((joined[1] - joined[0]).abs().max()), rel=1e-9)
    assert [one.name for one in found.groups] == ["0", "1", "2"]


def test_a_snapshot_and_an_output(tmp_path: Path) -> None:
    model = torch.nn.Linear(20, 30)
    with PostHocEMA.from_model(model, tmp_path / "run", checkpoint_every=50) as tracker:
        for _ in range(100):
            with torch.no_grad():
                model.weight += 0.01 * torch.randn(30, 20)
            tracker.update_(model)
    Run(tmp_path / "run").write(0.2, tmp_path / "model.safetensors")
    found = compare(tmp_path / "model.safetensors", next((tmp_path / "run").glob("*100-0.28*")))
    assert found.total.relative is not None
    assert 0 < found.total.relative < 1
    same = compare(tmp_path / "model.safetensors", tmp_path / "model.safetensors")
    assert (same.total.relative, same.total.largest) == (0, 0)


def test_numbers_that_are_not_real_or_not_floating(tmp_path: Path) -> None:
    one = {"c": torch.tensor([1 + 2j, 3]), "i": torch.tensor([3, 4]), "b": torch.tensor([True, False])}
    other = {"c": torch.tensor([1 + 6j, 3]), "i": torch.tensor([3, 9]), "b": torch.tensor([True, True])}
    save_file(one, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    found = compare(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [(each.name, each.elements) for each in found.tensors] == [("b", 2), ("c", 2), ("i", 2)]
    assert [each.relative for each in found.tensors] == pytest.approx([1, 4 / 14**0.5, 1])


def test_what_differs_is_named(tmp_path: Path, ema: Ema) -> None:
    a, b = tmp_path / "a.safetensors", tmp_path / "b.pt"
    names = ("layers.0.w", "layers.1.w", "layers.1.b", "head.w")
    save_file({name: torch.ones(10) for name in names} | {"x": torch.ones(2), "gone": torch.ones(1)}, a)
    other = {name: torch.full((10,), 1.5) for name in names} | {"x": torch.ones(3), "new": torch.ones(1)}
    torch.save(other | {"head.w": torch.full((10,), float("nan"))}, b)
    result = ema("diff", a, b)
    assert result.code == 0
    assert [line.split() for line in result.out.splitlines()] == [
        ["tensors", "elements", "distance", "largest"],
        ["head", "10", "unknown", "nan"],
        ["layers.0", "10", "50", "%", "0.5"],
        ["layers.1", "20", "50", "%", "0.5"],
        ["all", "40", "unknown", "nan"],
        ["x:", "shape", "[2]", "in", "A,", "[3]", "in", "B"],
        ["gone:", "only", "in", "A"],
        ["new:", "only", "in", "B"],
    ]
    report = ema("diff", a, b, "--json", "--out", tmp_path / "d.png").json
    assert report["only_a"] == ["gone"]
    assert report["groups"][1] == {"name": "layers.0", "elements": 10, "relative": 0.5, "largest": 0.5}
    assert json.dumps(report["shapes"]) == '{"x": [[2], [3]]}'
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")
    save_file({"other": torch.ones(2)}, a)
    assert ema("diff", a, b).error.endswith("have no tensor in common; choose tensors by --prefix")
    with pytest.raises(errors.FileFormatError, match="holds no weights"):
        (tmp_path / "empty").mkdir()
        compare(a, tmp_path / "empty")
