"""BatchNorm's running statistics: averaged as weights are, kept positive, and a notice if they are copies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import exact_average, rewrite_snapshot
from safetensors.torch import load_file

from posthoc_cli import PostHocEMA, Run, disk_sources, plan_synthesis, synthesize
from posthoc_cli.errors import NonFiniteError

COPIES = "*.running_*"
STATISTICS = ("norm.running_mean", "norm.running_var")
NOTICE = "the running statistics of 1 BatchNorm layer are copies"
WAY_OUT = "torch.optim.swa_utils.update_bn(loader, model)"


class Network(torch.nn.Module):
    """A network with BatchNorm, whose `inputs` make statistics far larger than weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm = torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6)
        self.outer = torch.nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.outer(torch.relu(self.norm(self.inner(x))))


def inputs(seed: int, rows: int = 16) -> torch.Tensor:
    return 300 + 100 * torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))


States = list[dict[str, np.ndarray]]


def trained(folder: Path, steps: int = 60, **settings: object) -> tuple[Network, PostHocEMA, States]:
    """Train and track a model; return it, its tracker, and its state after every step."""
    model = Network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    options = {"update_every": 1, "checkpoint_every": 5, "max_checkpoints": None} | settings
    tracker, states = PostHocEMA.from_model(model, folder, **options), []
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(step)).square().mean().backward()
        optimizer.step()
        tracker.update_(model)
        states.append({name: value.double().numpy().copy() for name, value in model.state_dict().items()})
    tracker.flush()
    return model, tracker, states


def test_statistics_are_averaged_by_the_profile_and_counts_copied(tmp_path: Path) -> None:
    _, tracker, states = trained(tmp_path)
    for source in (tracker, PostHocEMA.from_path(tmp_path), tracker.run):
        for sigma_rel in (0.05, 0.1, 0.2, 0.28):
            weights = source.average(sigma_rel) if isinstance(source, Run) else source.state_dict(sigma_rel=sigma_rel)
            assert weights["norm.num_batches_tracked"] == 60
            for name in STATISTICS:  # as exact as a reconstruction
                expected = exact_average([state[name] for state in states], sigma_rel, range(1, 61))
                np.testing.assert_allclose(weights[name].double(), expected, rtol=0.02)
    for sigma_rel in (0.05, 0.28):  # stored in float32, whatever checkpoint_dtype
        stored = load_file(max(tmp_path.glob(f"*-{sigma_rel}.safetensors")))
        for name in STATISTICS:
            expected = exact_average([state[name] for state in states], sigma_rel, range(1, 61))
            np.testing.assert_allclose(stored[name].double(), expected, rtol=1e-6)


def test_a_variance_stays_positive_where_coefficients_extrapolate(tmp_path: Path) -> None:
    trained(tmp_path, 20, checkpoint_every=10)
    paths = sorted(tmp_path.glob("*.safetensors"))
    small = torch.tensor([1e-3, 1.0, 1.0, 1.0, 1.0, 1.0])
    for path in paths:
        value = small if path is paths[-1] else torch.full((6,), 2.0)
        rewrite_snapshot(path, lambda values, value=value: values.update({name: value.clone() for name in STATISTICS}))
    plan, wanted = plan_synthesis(disk_sources(tmp_path), [0.1]), {paths[0].name: -0.3, paths[-1].name: 1.3}
    chosen = np.array([[wanted.get(source.name, 0.0)] for source in plan.sources])
    assert chosen.sum() == pytest.approx(1)
    plan = replace(plan, reconstruction=replace(plan.reconstruction, coefficients=chosen))
    made = {name: values[0] for name, values in synthesize(plan)}
    np.testing.assert_allclose(made["norm.running_mean"], 1.3 * small - 0.6, rtol=1e-6)  # a mean may be negative
    expected = torch.maximum(1.3 * small - 0.6, torch.minimum(small, torch.tensor(2.0)) / 2)
    assert float(1.3 * small[0] - 0.6) < 0 < float(expected.min())
    np.testing.assert_allclose(made["norm.running_var"], expected, rtol=1e-6)


def test_a_statistic_that_is_not_finite_is_named_at_once(tmp_path: Path) -> None:
    model, tracker, _ = trained(tmp_path, 5)
    model.norm.running_var[2] = float("inf")
    with pytest.raises(NonFiniteError, match=r"norm\.running_var"):
        tracker.update_(model)


# --- the notice


def test_a_block_with_copies_warns_once_per_tracker(tmp_path: Path) -> None:
    model, tracker, _ = trained(tmp_path / "copied", 20, buffers="copy")
    with pytest.warns(RuntimeWarning, match=f"^posthoc_cli: {NOTICE}") as seen:
        for length in (0.2, 0.2, 0.05):
            with tracker.model(model, sigma_rel=length) as averaged:
                averaged(inputs(0))
    assert len(seen) == 1
    assert WAY_OUT in str(seen[0].message)
    assert seen[0].filename == __file__
    live = PostHocEMA.from_path(tmp_path / "copied")
    with pytest.warns(RuntimeWarning, match=NOTICE), live.model(Network(), sigma_rel=0.2):
        pass
    model, tracker, _ = trained(tmp_path / "averaged", 20)
    with tracker.model(model, sigma_rel=0.2), tracker.model(model, 0.05):
        pass  # a warning would be an error
