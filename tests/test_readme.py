"""The README's own code, run as it stands there."""

from __future__ import annotations

import re
import types
from pathlib import Path

import pytest
import torch
from ema_command import Ema
from torture.experiments import EXPERIMENTS

from posthoc_cli import PostHocEMA
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker import pipeline

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


@pytest.mark.parametrize(("steps", "last"), [(2950, [1000, 2000, 2950]), (900, [900]), (1000, [1000])])
def test_the_hook_in_ten_lines_runs_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, last: list[int]
) -> None:
    """And a second time, from where the first one ended: nothing after the last snapshot is lost."""
    monkeypatch.chdir(tmp_path)
    block, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = torch.nn.Linear(4, 4)
    evaluated: list[torch.Tensor] = []

    def step(network: torch.nn.Linear, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            network.weight.add_(batch)
        return batch

    names = {
        "model": model,
        "loader": torch.randn(steps, 4, 4),
        "optimizer": types.SimpleNamespace(step=lambda: None),
        "step": step,
        "evaluate": lambda network: evaluated.append(network.weight.detach().clone()),
    }
    exec(compile(block, "README.md", "exec"), names)
    assert torch.equal(model.weight, evaluated[0])
    assert "strict=False" not in README  # which hides what does not fit; load_into refuses it
    pipeline.finish()  # as the end of the process does
    assert sorted({s.info.t for s in read_directory(tmp_path / "run" / "ema")}) == last
    names["ema"].close()  # type: ignore[attr-defined]
    exec(compile(block, "README.md", "exec"), names | {"loader": torch.randn(20, 4, 4)})
    pipeline.finish()
    assert read_directory(tmp_path / "run" / "ema")[-1].info.t == steps + 20


def test_the_lines_for_inside_training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, block = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    evaluated = []

    def evaluate(network: torch.nn.Module) -> None:
        assert not network.training
        evaluated.append(network[0].weight.detach().clone())  # type: ignore[index]

    with PostHocEMA.from_model(model, "run/ema", update_every=1) as ema:
        for _ in range(20):
            with torch.no_grad():
                model[0].weight += 0.1
            ema.update_(model)
        last = model[0].weight.detach().clone()
        loader = torch.randn(5, 8, 4)
        exec(compile(block, "README.md", "exec"), locals())
        for found, tracked in zip([evaluated[1], model[0].weight], [0.05, 0.05], strict=True):
            assert torch.allclose(found, ema.state_dict(sigma_rel=tracked)["0.weight"], rtol=1e-5)
        assert float((evaluated[0] - evaluated[1]).abs().min()) > 0.1
        assert not torch.equal(model[0].weight, last)
        optimizer.step()
        assert ema.step == 21


def test_every_command_line_in_the_readme_is_accepted(
    ema: Ema, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its options exist and take such values; what it names need not be there."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^\$ ema (.*?)\s*(?:#.*)?$", README, re.MULTILINE)
    assert len(lines) >= 10
    for line in lines:
        if line.startswith("demo"):
            continue
        result = ema(*line.split())
        assert result.code != 2 or re.search("no such|its folder does not exist", result.error), (line, result.err)


def test_every_test_in_the_table_of_invariants_exists() -> None:
    _, _, section = README.partition("### What holds, and what shows it")
    named = set(re.findall(r"`(test_\w+)`", section.partition("\n## ")[0]))
    assert len(named) >= 20
    folder = Path(__file__).resolve().parent
    defined = {name for path in folder.rglob("*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert named <= defined, sorted(named - defined)


def test_every_experiment_in_the_readme_exists() -> None:
    _, _, section = README.partition("### What holds, and what shows it")
    named = set(re.findall(r"\*([^*|]+)\*", section.partition("\n## ")[0]))
    assert named <= {experiment.name for experiment in EXPERIMENTS}
