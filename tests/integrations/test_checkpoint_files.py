"""Checkpoints that the frameworks have written, opened as runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from posthoc_cli import Run
from posthoc_cli.profiles import Point

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

States = dict[int, dict[str, torch.Tensor]]


def check(run: Run, states: States) -> None:
    """Assert that the checkpoints hold the weights of these steps, and that an average is the planned combination."""
    assert [source.profile for source in run.sources] == [Point(float(step)) for step in sorted(states)]
    plan, average = run.plan(0.2), run.average(0.2, dtype="float64")
    coefficients = plan.reconstruction.coefficients[:, 0].tolist()
    last = states[max(states)]
    assert average.keys() == last.keys()
    for name, value in average.items():
        terms = [c * states[s.step][name].double() for s, c in zip(plan.sources, coefficients, strict=True)]
        is_copy = not last[name].is_floating_point() or name.endswith(("running_mean", "running_var"))
        wanted = last[name].double() if is_copy else sum(terms)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-12, atol=1e-12)


def moved(model: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Move the weights of a model, and return its state."""
    generator = torch.manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return copy.deepcopy({name: value.detach() for name, value in model.state_dict().items()})


@pytest.mark.parametrize("kind", [None, "WeightAveraging", "EMAWeightAveraging"])
def test_lightning(kind: str | None, tmp_path: Path) -> None:
    """If Lightning averages, too, its file holds the average in place of the weights."""
    pytest.importorskip("lightning.pytorch")
    from integrations.digits import Regression, loader, make_trainer
    from lightning.pytorch import Callback, callbacks

    states: States = {}

    class Saved(Callback):
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            states[trainer.global_step] = copy.deepcopy(pl_module.state_dict())

    averaging = [] if kind is None else [getattr(callbacks, kind)()]
    make_trainer(tmp_path, Saved(), *averaging).fit(Regression(), loader(), loader())
    files = sorted((tmp_path / "out").iterdir())
    held = torch.load(files[0], weights_only=True)
    assert ("current_model_state" in held) == (kind is not None)
    assert len(files) == len(states) == 4
    check(Run(tmp_path / "out"), states)


@pytest.mark.parametrize("safe", [True, False])
def test_the_state_of_accelerate(safe: bool, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, states = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)), {}
    model, _ = accelerator.prepare(model, torch.optim.Adam(model.parameters()))
    for step in (100, 200, 300):
        states[step] = moved(model, step)
        accelerator.save_state(str(tmp_path / f"step_{step}"), safe_serialization=safe)
    check(Run(tmp_path), states)
