"""Ground truth: directly summed float64 averages of two real recorded training runs of 2,000 steps.

Unless a test says otherwise, snapshots are float32, every 100 steps, of sigma_rel 0.05 and 0.10,
and the method is the published one. The bounds are what this method can reach with such snapshots:
on the tracked profiles only float32 rounding is left, and the further a target is from them, the
less the twenty snapshot times suffice (the error at 0.20 is a hundred times that at 0.07). Targets
above 0.20 are not tested: their error is inherent in the method.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import Span, exact_weights
from trajectories import Replay, Trajectory, record

from posthoc_cli import Beta, PostHocEMA, Window, disk_sources, plan_synthesis
from posthoc_cli.targets import GivenProfile

pytestmark = pytest.mark.xdist_group("trajectories")

STEPS = 2_000
BOUNDS = {0.05: 3e-6, 0.10: 3e-6, 0.07: 5e-5, 0.15: 2e-4, 0.20: 2e-3}

Tracked = Callable[..., tuple[Trajectory, Path]]


def truth(run: Trajectory, steps: np.ndarray, weights: Sequence[np.ndarray]) -> np.ndarray:
    return np.stack(weights) @ run.weights[steps - 1].astype(np.float64)


def distance(found: dict[str, torch.Tensor], exact: np.ndarray) -> float:
    flat = np.concatenate([tensor.double().reshape(-1).numpy() for tensor in found.values()])
    return float(np.linalg.norm(flat - exact) / np.linalg.norm(exact))


@pytest.fixture(scope="module")
def tracked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    """A function that tracks a run, once, and returns it and the directory, which tests only
    read."""
    stored = getattr(request.config, "cache", None)  # pytest's, unless it is switched off
    recorded = cache(
        lambda name: record(name, STEPS, cache=stored and stored.mkdir("trajectories"))
    )

    @cache
    def track(
        name: str,
        stride: int,
        sigma_rels: tuple[float, ...] = (0.05, 0.10),
        dtype: Any = torch.float32,
    ) -> tuple[Trajectory, Path]:
        run = recorded(name)
        folder = tmp_path_factory.mktemp(name)
        model = Replay(run)
        options = {
            "update_every": stride,
            "checkpoint_every": 100,
            "max_checkpoints": None,
            "checkpoint_dtype": dtype,
        }
        with PostHocEMA.from_model(model, folder, sigma_rels, **options) as tracker:
            for step in range(1, STEPS + 1):
                if step % stride == 0:
                    model.go_to(step - 1)
                tracker.update_(model)
        return run, folder

    return track


@pytest.mark.parametrize(("name", "stride"), [("denoiser-adam", 10), ("classifier-sgd", 1)])
def test_synthesized_weights_are_near_the_true_ones(
    name: str, stride: int, tracked: Tracked
) -> None:
    """Also an ordinary EMA, x <- beta x + (1 - beta) theta at every step; a window; a span of
    training."""
    run, folder = tracked(name, stride)
    seen = np.arange(0, STEPS + 1, stride)
    tails = {  # mass after each step, from the definitions
        Beta(0.995): np.where(seen < stride, 1.0, 1 - 0.995 ** (STEPS - seen)),
        Beta(0.9975): np.where(seen < stride, 1.0, 1 - 0.9975 ** (STEPS - seen)),
        Window(400): np.clip((STEPS - seen) / 400, 0, 1),
        GivenProfile(Span(600, 1400)): np.clip((1400 - seen) / 800, 0, 1),
    }
    weights = [exact_weights(s, seen[1:]) for s in BOUNDS] + [
        -np.diff(tail) for tail in tails.values()
    ]
    exact = truth(run, seen[1:], weights)
    tracker = PostHocEMA.from_path(folder)
    found = [
        distance(tracker.state_dict(s, method="paper"), one)
        for s, one in zip(BOUNDS, exact, strict=False)
    ]
    assert {s: error for s, error in zip(BOUNDS, found, strict=True) if error > BOUNDS[s]} == {}
    # The bounds are meaningful: the average is much further from the last weights.
    assert distance({"last": torch.from_numpy(run.weights[-1])}, exact[0]) > 100 * BOUNDS[0.05]
    plan = plan_synthesis(disk_sources(folder), list(tails))
    for index, target in enumerate(tails):
        predicted = plan.predicted_error(index)
        assert predicted < 0.01
        assert (
            0.3 < distance(tracker.state_dict(target), exact[len(BOUNDS) + index]) / predicted < 2
        )


@pytest.mark.parametrize(
    ("name", "sigma_rels", "dtype"),
    [
        ("denoiser-adam", (0.05, 0.28), torch.float16),
        ("denoiser-adam", (0.05, 0.10), torch.float32),
        ("classifier-sgd", (0.05, 0.28), torch.bfloat16),
    ],
)
def test_minimum_variance_beats_the_published_method_and_knows_its_error(
    name: str, sigma_rels: tuple[float, float], dtype: torch.dtype, tracked: Tracked
) -> None:
    """Over all cells of scripts/bench_fidelity.py with two profiles, actual / predicted is between
    0.31 and 1.78."""
    run, folder = tracked(name, 10, sigma_rels, dtype)
    targets = (0.03, 0.07, 0.15, 0.20, 0.25)
    steps = np.arange(10, STEPS + 1, 10)
    plan = plan_synthesis(disk_sources(folder), targets)
    tracker = PostHocEMA.from_path(folder)
    assert plan.method == "minvar"
    for index, exact in enumerate(truth(run, steps, [exact_weights(s, steps) for s in targets])):
        ours = distance(tracker.state_dict(targets[index]), exact)
        assert ours <= 1.05 * distance(tracker.state_dict(targets[index], method="paper"), exact)
        assert 0.3 < ours / plan.predicted_error(index) < 1.8
