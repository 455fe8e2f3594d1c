"""Ground truth: directly summed float64 averages of two real recorded training runs of 10,000 steps.

The snapshots are float32, every 500 steps, of sigma_rel 0.05 and 0.10; the method is the published one. The
bounds are what it can do on such snapshots: on the tracked profiles only the rounding of float32 is left, and
the further a target lies from them the less the twenty snapshot times suffice (its error at 0.20 is a hundred
times that at 0.07). Targets above 0.20 are not promised here: their profile error is the method's own.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import exact_gamma, exact_weights
from trajectories import Replay, Trajectory, record

from posthoc_cli import PostHocEMA

pytestmark = pytest.mark.xdist_group("trajectories")

STEPS = 10_000
BOUNDS = {0.05: 3e-6, 0.10: 3e-6, 0.07: 5e-5, 0.15: 2e-4, 0.20: 2e-3}
RUNS = ("denoiser-adam", "classifier-sgd")


@pytest.fixture(scope="module")
def cache_folder(request: pytest.FixtureRequest) -> Path:
    return Path(request.config.cache.mkdir("trajectories"))


@cache
def recorded(name: str, folder: Path) -> Trajectory:
    return record(name, STEPS, cache=folder)


def truth(run: Trajectory, sigma_rel: float, stride: int, after: int = 0) -> np.ndarray:
    """The average over the weights after every `stride`-th step, in float64, from the definition."""
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
    with PostHocEMA.from_model(
        model, folder, sigma_rels=(0.05, 0.10), update_every=stride, checkpoint_every=500, max_checkpoints=None,
        checkpoint_dtype=torch.float32, **settings,
    ) as tracker:  # fmt: skip
        for step in range(run.steps):
            if (step + 1) % stride == 0:
                model.go_to(step)
            tracker.update_(model)


@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("name", RUNS)
def test_synthesized_weights_are_near_the_true_average(
    name: str, stride: int, cache_folder: Path, tmp_path: Path
) -> None:
    run = recorded(name, cache_folder)
    track(run, tmp_path, stride)
    tracker = PostHocEMA.from_path(tmp_path)
    found = {s: flat(tracker.state_dict(sigma_rel=s, method="paper")) for s in BOUNDS}
    errors = {s: relative_error(found[s], truth(run, s, stride)) for s in BOUNDS}
    assert {s: error for s, error in errors.items() if error > BOUNDS[s]} == {}
    # ... and the bounds mean something: the average is much further from the last weights than that.
    assert relative_error(run.weights[-1], truth(run, 0.05, stride)) > 100 * BOUNDS[0.05]


def test_an_earlier_time_is_met_as_well(cache_folder: Path, tmp_path: Path) -> None:
    run = recorded("denoiser-adam", cache_folder)
    track(run, tmp_path, 10)
    earlier = Trajectory(run.name, run.weights[:5000], run.shapes)
    found = flat(PostHocEMA.from_path(tmp_path).state_dict(sigma_rel=0.10, t=5000))
    assert relative_error(found, truth(earlier, 0.10, 10)) <= BOUNDS[0.10]


def test_a_warm_up_is_part_of_the_profile(cache_folder: Path, tmp_path: Path) -> None:
    """Weights before the warm-up never count: their mass sits on the first one that was taken in."""
    run = recorded("denoiser-adam", cache_folder)
    track(run, tmp_path, 10, update_after_step=3000)
    tracker = PostHocEMA.from_path(tmp_path)
    for sigma_rel in (0.05, 0.10):
        found = flat(tracker.state_dict(sigma_rel=sigma_rel))
        assert relative_error(found, truth(run, sigma_rel, 10, after=3000)) <= BOUNDS[sigma_rel]


@pytest.mark.parametrize("name", RUNS)
def test_the_peers_beta_misses_these_bounds_by_far(name: str, cache_folder: Path) -> None:
    """At a stride of 10 a beta for an interval of 1 is a different average altogether."""
    run = recorded(name, cache_folder)
    gamma = exact_gamma(0.05)
    average = run.weights[9].astype(np.float64)
    for step in range(20, STEPS + 1, 10):
        average += (1 - (1 - 1 / step) ** (gamma + 1)) * (run.weights[step - 1] - average)
    assert relative_error(average, truth(run, 0.05, 10)) > 1000 * BOUNDS[0.05]
