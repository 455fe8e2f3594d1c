"""The clock of a run that counts images while its batch size changes: its snapshots' pairs."""

import numpy as np
import torch
from factories import relative_distance

from posthoc_cli import Beta, PostHocEMA, Run, Window
from posthoc_cli.snapshots.sources import run_clock
from posthoc_cli.synthesis import plan

STEPS = 2000
SETTINGS = {
    "sigma_rels": (0.03, 0.05, 0.10, 0.15, 0.20, 0.28),
    "update_every": 1,
    "checkpoint_every": 250,
    "checkpoint_dtype": None,
    "t_unit": "images",
}


def changing_twice():
    """Return the images seen after each step; the batch grows, and shrinks again, between two
    snapshots."""
    batch = np.full(STEPS, 64.0)
    batch[1290:1440] = 256
    return np.cumsum(batch)


def path(times):
    """Return the weights after each step: one settles, one drifts, one oscillates slowly; shape
    [steps, 3]."""
    s = times / 156_800
    settles = np.exp(-3 * s)
    oscillates = np.sin(4 * s) + 2
    return np.stack([settles, 1 + s, oscillates], axis=1)


def track(folder, times, **settings):
    values = torch.from_numpy(path(times))
    model = torch.nn.ParameterDict({"w": values[0]})
    with PostHocEMA.from_model(model, folder, **SETTINGS | settings) as tracker:
        for value, t in zip(values, times.tolist(), strict=True):
            model["w"].data = value
            tracker.update_(model, t=t)


def errors(folder, target, exact):
    """Return the relative distance of the synthesized weights, and the predicted one."""
    average = Run(folder).average(target)
    assert average.predicted_error is not None
    return relative_distance(average["w"], exact), average.predicted_error


def test_what_snapshots_do_not_know_of_a_clock_is_in_the_predicted_error(tmp_path, monkeypatch):
    """The batch changes twice between two snapshots of an earlier version, whose sketches do not
    say the steps of their windows."""
    monkeypatch.setattr(plan, "target_clock", run_clock)
    times = changing_twice()
    track(tmp_path, times)
    exact = path(times)[-600:].mean(axis=0)
    actual, predicted = errors(tmp_path, Window(600), exact)
    assert 1e-3 < actual < 3 * predicted < 0.15


def test_averages_of_steps_are_exact_where_each_step_has_a_snapshot(tmp_path):
    """Batches of random size; a clock from every fourth snapshot alone is off by 1e-4 and more."""
    batches = np.random.default_rng(0).integers(100, 2400, 60)
    times = np.cumsum(batches).astype(np.float64)
    track(tmp_path, times, checkpoint_every=1, max_checkpoints=None, sigma_rels=(0.05, 0.28))
    exact, *later = path(times)
    for value in later:
        exact = 0.995 * exact + 0.005 * value
    actual, _ = errors(tmp_path, Beta(0.995), exact)
    assert actual < 1e-9
