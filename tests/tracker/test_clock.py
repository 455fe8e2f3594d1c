"""The clock of a run that counts images while its batch size changes, as its snapshots store it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tracker.runs import as_if_killed

from posthoc_cli import Beta, PostHocEMA, Run, Window, disk_sources, plan_synthesis, synthesize
from posthoc_cli.targets import Target

STEPS = 2000
SETTINGS: dict = {
    "sigma_rels": (0.03, 0.05, 0.10, 0.15, 0.20, 0.28), "update_every": 1, "checkpoint_every": 250,
    "checkpoint_dtype": None, "t_unit": "images",
}  # fmt: skip


def changing_twice() -> np.ndarray:
    """Return the images seen after each step; the batch grows, and shrinks again, between two
    snapshots."""
    batch = np.full(STEPS, 64.0)
    batch[1290:1440] = 256
    return np.cumsum(batch)


def uneven(steps: int) -> np.ndarray:
    """Return the tokens seen after each step; a step has a thousand, up to 20 % more or fewer."""
    return np.cumsum(np.random.default_rng(0).integers(800, 1201, steps)).astype(np.float64)


def path(times: np.ndarray) -> np.ndarray:
    """Return the weights after each step: one settles, one drifts, one oscillates slowly; shape
    [steps, 3]."""
    s = times / 156_800
    return np.stack([np.exp(-3 * s), 1 + s, np.sin(4 * s) + 2], axis=1)


def weights() -> torch.nn.ParameterDict:
    return torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))})


def track(
    folder: Path, times: Sequence[float], first: int = 1, tracker: PostHocEMA | None = None
) -> PostHocEMA:
    model, values = weights(), torch.from_numpy(path(np.asarray(times)))
    tracker = tracker or fresh(folder)
    with tracker, torch.no_grad():
        for step in range(first, len(times) + 1):
            model["w"].copy_(values[step - 1])
            tracker.update_(model, t=times[step - 1])
    return tracker


def fresh(folder: Path) -> PostHocEMA:
    return PostHocEMA.from_model(weights(), folder, **SETTINGS, resume="auto")


def clocks(folder: Path) -> dict[float, tuple]:
    return {snapshot.t: snapshot.clock for snapshot in Run(folder).snapshots}


def error(folder: Path, target: Target, exact: np.ndarray, known: bool = True) -> float:
    """Return the relative distance of the synthesized weights; with `known` False, headers have no
    clock."""
    sources = disk_sources(folder)
    if not known:
        sources = [replace(s, clock=()) for s in sources]
    plan = plan_synthesis(sources, [target])
    (found,) = dict(synthesize(plan))["w"]
    return float(np.linalg.norm(found.numpy() - exact) / np.linalg.norm(exact))


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed")
    track(folder, changing_twice().tolist())
    return folder


def test_every_header_holds_the_clock_up_to_its_own_time(changed: Path) -> None:
    times = changing_twice()
    turns = [(step, times[step - 1]) for step in (1290, 1440)]
    expected = {}
    for step in range(250, STEPS + 1, 250):
        t = times[step - 1]
        expected[t] = (*(turn for turn in turns if turn[0] < step), (step, t))
    assert clocks(changed) == expected


@pytest.mark.parametrize("steps", [600, 700, None])
def test_averages_over_changing_batches_are_near_the_truth(
    changed: Path, steps: int | None
) -> None:
    """Means of the last steps, and an ordinary EMA (None); without the clock they are wrong."""
    values = path(changing_twice())
    target, exact = (
        (Window(steps), values[-steps:].mean(axis=0)) if steps else (Beta(0.995), values[0])
    )
    for value in () if steps else values[1:]:
        exact = 0.995 * exact + 0.005 * value
    assert error(changed, target, exact) < 5e-4
    assert error(changed, target, exact, known=False) > (2e-3 if steps else 1e-3)


@pytest.mark.parametrize("interrupted_at", [0, 249])
def test_resuming_from_the_state_keeps_the_clock_exactly(
    tmp_path: Path, interrupted_at: int
) -> None:
    times = uneven(700).tolist()
    track(tmp_path / "straight", times)
    state = track(tmp_path / "parts", times[:interrupted_at]).state_dict()
    resumed = fresh(tmp_path / "parts")
    resumed.load_state_dict(state)
    track(tmp_path / "parts", times, interrupted_at + 1, resumed)
    for name in ("parts", "straight"):
        as_if_killed(tmp_path / name)
    assert clocks(tmp_path / "parts") == clocks(tmp_path / "straight")


def test_resuming_from_snapshots_keeps_their_knots(tmp_path: Path) -> None:
    times = changing_twice()
    track(tmp_path, times[:1300].tolist())
    as_if_killed(tmp_path)
    between = PostHocEMA.from_path(tmp_path)
    assert between.state_dict()["clock"][3:] == [1250, 80000.0]
    track(tmp_path, times[:1500].tolist(), 1251, PostHocEMA.from_path(tmp_path, step=1250))
    track(tmp_path, times.tolist(), 1501, PostHocEMA.from_path(tmp_path, step=1500))
    # Neither resume is a knot: steps are as long after it as before.
    assert clocks(tmp_path)[times[-1]] == ((1290, 82560.0), (1440, 120960.0), (2000, 156800.0))
