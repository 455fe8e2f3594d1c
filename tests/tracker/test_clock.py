"""The clock of a run that counts images while its batch size changes: its snapshots' pairs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import relative_distance

from posthoc_cli import Beta, PostHocEMA, Run, Window
from posthoc_cli.snapshots.sources import run_clock
from posthoc_cli.synthesis import plan
from posthoc_cli.targets import Target

STEPS = 2000
SETTINGS: dict = {
    "sigma_rels": (0.03, 0.05, 0.10, 0.15, 0.20, 0.28),
    "update_every": 1,
    "checkpoint_every": 250,
    "checkpoint_dtype": None,
    "t_unit": "images",
}


def changing_twice() -> np.ndarray:
    """Return the images seen after each step; the batch grows, and shrinks again, between two
    snapshots."""
    batch = np.full(STEPS, 64.0)
    batch[1290:1440] = 256
    return np.cumsum(batch)


def path(times: np.ndarray) -> np.ndarray:
    """Return the weights after each step: one settles, one drifts, one oscillates slowly; shape
    [steps, 3]."""
    s = times / 156_800
    settles = np.exp(-3 * s)
    oscillates = np.sin(4 * s) + 2
    return np.stack([settles, 1 + s, oscillates], axis=1)


def track(folder: Path, times: np.ndarray, **settings: object) -> None:
    values = torch.from_numpy(path(times))
    model = torch.nn.ParameterDict({"w": values[0]})
    with PostHocEMA.from_model(model, folder, **SETTINGS | settings) as tracker:
        for value, t in zip(values, times.tolist(), strict=True):
            model["w"].data = value
            tracker.update_(model, t=t)


def errors(folder: Path, target: Target, exact: np.ndarray) -> tuple[float, float]:
    """Return the relative distance of the synthesized weights, and the predicted one."""
    average = Run(folder).average(target)
    assert average.predicted_error is not None
    return relative_distance(average["w"], exact), average.predicted_error


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changed")
    track(folder, changing_twice())
    return folder


def average_of(steps: int | None, values: np.ndarray) -> tuple[Target, np.ndarray]:
    """Return a mean of the last steps, or an ordinary EMA (None), and what it is in float64."""
    if steps:
        return Window(steps), values[-steps:].mean(axis=0)
    exact = values[0]
    for value in values[1:]:
        exact = 0.995 * exact + 0.005 * value
    return Beta(0.995), exact


@pytest.mark.parametrize("steps", [600, None])
def test_what_snapshots_do_not_know_of_a_clock_is_in_the_predicted_error(
    changed: Path,
    steps: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The batch changes twice between two snapshots of an earlier version, whose sketches do not
    say the steps of their windows."""
    monkeypatch.setattr(plan, "target_clock", run_clock)
    target, exact = average_of(steps, path(changing_twice()))
    actual, predicted = errors(changed, target, exact)
    assert actual < 3 * predicted
    assert predicted < 0.05
    if steps is not None:
        assert actual > 1e-3


@pytest.mark.parametrize("steps", [20, None])
def test_averages_of_steps_are_exact_where_each_step_has_a_snapshot(
    tmp_path: Path,
    steps: int | None,
) -> None:
    """Batches of random size; a clock from every fourth snapshot alone is off by 1e-4 and more."""
    batches = np.random.default_rng(0).integers(100, 2400, 60)
    times = np.cumsum(batches).astype(np.float64)
    track(tmp_path, times, checkpoint_every=1, max_checkpoints=None, sigma_rels=(0.05, 0.28))
    target, exact = average_of(steps, path(times))
    actual, _ = errors(tmp_path, target, exact)
    assert actual < 1e-9


def test_each_snapshot_holds_its_own_pair_of_step_and_time(changed: Path) -> None:
    times = changing_twice()
    steps = set()
    for snapshot in Run(changed).snapshots:
        assert snapshot.t == times[snapshot.step - 1]
        steps.add(snapshot.step)
    assert steps == {*range(250, STEPS + 1, 250)}
