"""Ground truth: directly summed float64 averages of two real recorded training runs of 10,000 steps.

Unless a test says otherwise, snapshots are float32, every 500 steps, of sigma_rel 0.05 and 0.10, and the method is the
published one. The bounds are what this method can reach with such snapshots: on the tracked profiles only float32
rounding is left, and the further a target is from them, the less the twenty snapshot times suffice (the error at 0.20
is a hundred times that at 0.07). Targets above 0.20 are not tested: their error is inherent in the method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import exact_weights
from trajectories import Replay, Trajectory, record

from posthoc_cli import PostHocEMA, disk_sources, plan_synthesis
from posthoc_cli.targets import Beta, Between, Window

pytestmark = pytest.mark.xdist_group("trajectories")

STEPS = 10_000
BOUNDS = {0.05: 3e-6, 0.10: 3e-6, 0.07: 5e-5, 0.15: 2e-4, 0.20: 2e-3}


@pytest.fixture(scope="module")
def cache_folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("trajectories"))


@cache
def recorded(name: str, folder: Path) -> Trajectory:
    return record(name, STEPS, cache=folder)


def truth(run: Trajectory, sigma_rel: float, stride: int, after: int = 0) -> np.ndarray:
    """Return the average over the weights after every `stride`-th step, in float64, by the definition."""
    steps = np.arange(stride, run.steps + 1, stride)
    steps = steps[steps > after]
    weights = exact_weights(sigma_rel, steps)
    return np.tensordot(weights, run.weights[steps - 1].astype(np.float64), axes=1)


def flat(state: dict[str, torch.Tensor]) -> np.ndarray:
    return np.concatenate([tensor.double().reshape(-1).numpy() for tensor in state.values()])


def relative_error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def track(run: Trajectory, folder: Path, stride: int, **settings: object) -> None:
    model = Replay(run)
    chosen = {"sigma_rels": (0.05, 0.10), "checkpoint_dtype": torch.float32, **settings}
    with PostHocEMA.from_model(
        model, folder, update_every=stride, checkpoint_every=500, max_checkpoints=None, **chosen
    ) as tracker:
        for step in range(run.steps):
            if (step + 1) % stride == 0:
                model.go_to(step)
            tracker.update_(model)


@pytest.fixture(scope="module")
def tracked(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Path]:
    """A function that tracks a run with a stride, once, and returns the directory, which tests only read."""

    @cache
    def folder_of(name: str, stride: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{name}-{stride}")
        track(recorded(name, cache_folder), folder, stride)
        return folder

    return folder_of


@pytest.mark.parametrize(("name", "stride"), [("denoiser-adam", 10), ("classifier-sgd", 1)])
def test_synthesized_weights_are_near_the_true_ones(
    name: str, stride: int, cache_folder: Path, tracked: Callable[[str, int], Path]
) -> None:
    run = recorded(name, cache_folder)
    tracker = PostHocEMA.from_path(tracked(name, stride))
    found = {s: flat(tracker.state_dict(sigma_rel=s, method="paper")) for s in BOUNDS}
    errors = {s: relative_error(found[s], truth(run, s, stride)) for s in BOUNDS}
    assert {s: error for s, error in errors.items() if error > BOUNDS[s]} == {}
    # The bounds are meaningful: the average is much further from the last weights.
    assert relative_error(run.weights[-1], truth(run, 0.05, stride)) > 100 * BOUNDS[0.05]


@pytest.mark.parametrize(("name", "tracked", "dtype"), [
    ("denoiser-adam", (0.05, 0.28), torch.float16), ("denoiser-adam", (0.05, 0.10), torch.float32),
    ("classifier-sgd", (0.05, 0.28), torch.bfloat16), ("classifier-sgd", (0.05, 0.10), torch.float16),
])  # fmt: skip
def test_minimum_variance_beats_the_published_method_and_knows_its_error(
    name: str, tracked: tuple[float, float], dtype: torch.dtype, cache_folder: Path, tmp_path: Path
) -> None:
    """Over all cells of scripts/bench_fidelity.py with two profiles, actual / predicted is between 0.31 and 1.78."""
    run = recorded(name, cache_folder)
    track(run, tmp_path, 10, sigma_rels=tracked, checkpoint_dtype=dtype)
    targets = (0.03, 0.07, 0.15, 0.20, 0.25)
    plan = plan_synthesis(disk_sources(tmp_path), targets)
    assert plan.method == "minvar"
    tracker = PostHocEMA.from_path(tmp_path)
    for index, s in enumerate(targets):
        exact = truth(run, s, 10)
        ours = relative_error(flat(tracker.state_dict(sigma_rel=s)), exact)
        paper = relative_error(flat(tracker.state_dict(sigma_rel=s, method="paper")), exact)
        assert ours <= 1.05 * paper
        predicted = plan.predicted_error(index)
        assert 0.3 < ours / predicted < 1.8


@pytest.mark.parametrize(("name", "stride"), [("denoiser-adam", 10), ("classifier-sgd", 1)])
def test_other_averages_of_these_snapshots_are_near_the_truth(
    name: str, stride: int, cache_folder: Path, tracked: Callable[[str, int], Path]
) -> None:
    """An ordinary EMA, x <- beta x + (1 - beta) theta at every step; a window; a span of training."""
    run, folder = recorded(name, cache_folder), tracked(name, stride)
    seen = np.arange(0, STEPS + 1, stride)
    tails = {  # mass after each step, from the definitions
        Beta(0.999): np.where(seen < stride, 1.0, 1 - 0.999 ** (STEPS - seen)),
        Beta(0.9995): np.where(seen < stride, 1.0, 1 - 0.9995 ** (STEPS - seen)),
        Window(2000): np.clip((STEPS - seen) / 2000, 0, 1),
        Between(3000, 7000): np.clip((7000 - seen) / 4000, 0, 1),
    }
    plan = plan_synthesis(disk_sources(folder), list(tails))
    for index, (target, tail) in enumerate(tails.items()):
        exact = np.tensordot(-np.diff(tail), run.weights[seen[1:] - 1].astype(np.float64), axes=1)
        found = flat(PostHocEMA.from_path(folder).state_dict(target))
        error = relative_error(found, exact)
        predicted = plan.predicted_error(index)
        assert predicted < 0.01
        assert 0.3 < error / predicted < 2
