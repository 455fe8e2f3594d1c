"""The profiles of other libraries' averages, against runs of the installed packages."""

import numpy as np
import pytest
import torch
from checking import refused
from ema_pytorch import PostHocEMA as LucidrainsEMA
from posthoc_ema import PostHocEMA as NextmlEMA
from predictions import assert_predicted

from posthoc_cli import gamma_from_sigma_rel, import_checkpoints
from posthoc_cli.decay_rules import MOST_TIMES, ema_pytorch_profile

WIDTHS = (0.05, 0.28)
STEPS = 1000
EVERY = 250


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def walk():
    return normal(STEPS, 8).cumsum(0)


def network_of(path):
    return torch.nn.Linear(path.shape[1], 1, bias=False, dtype=torch.float64)


def by_nextml(folder, path, **settings):
    """Let pytorch-posthoc-ema store averages every `EVERY` steps of a path."""
    network = network_of(path)
    ema = NextmlEMA.from_model(
        network,
        folder,
        sigma_rels=WIDTHS,
        checkpoint_every=EVERY,
        max_checkpoints=99,
        **settings,
    )
    for weights in path:
        network.weight.data.copy_(weights)
        ema.update_(network)


def by_lucidrains(folder, path, every=EVERY, **settings):
    """Let ema-pytorch do so; after about half of the steps another object continues from the state
    of the first one."""
    network = network_of(path)
    state = None
    for part in path.tensor_split([503]):
        ema = LucidrainsEMA(
            network_of(path),
            sigma_rels=WIDTHS,
            checkpoint_every_num_steps=every,
            checkpoint_folder=str(folder),
            **settings,
        )
        if state:
            ema.load_state_dict(state)
        for average in ema.ema_models:
            average.online_model[0] = network
        for weights in part:
            network.weight.data.copy_(weights)
            ema.update()
        state = ema.state_dict()


def check_profiles(folder, name, path, update_every, first):
    """Check that each file has the average of the profile whose first update is at a step."""
    for index, width in enumerate(WIDTHS):
        for step in range(EVERY, STEPS + 1, EVERY):
            stored = torch.load(folder / f"{index}.{step}.pt", weights_only=True)
            profile = ema_pytorch_profile(gamma_from_sigma_rel(width), step, update_every, first)
            places = profile.times.astype(int) - 1
            expected = torch.from_numpy(profile.masses) @ path[places]
            torch.testing.assert_close(stored[name][0], expected, rtol=0, atol=1e-9)
            assert profile.t == step
            assert profile.t_first == first


@pytest.mark.parametrize("update_every", [10, 100])
def test_ema_pytorch_stores_the_average_of_its_profile(update_every, tmp_path):
    path = walk()
    by_lucidrains(tmp_path, path, update_every=update_every, checkpoint_dtype=torch.float64)
    check_profiles(tmp_path, "ema_model.weight", path, update_every, 1)


@pytest.mark.parametrize(
    ("update_every", "after", "first"),
    [
        (100, 137, 137),
        (10, 0, 1),
    ],
)
def test_posthoc_ema_stores_the_average_of_its_profile(update_every, after, first, tmp_path):
    path = walk()
    settings = {"update_every": update_every, "update_after_step": after}
    by_nextml(tmp_path, path, checkpoint_dtype=torch.float64, **settings)
    check_profiles(tmp_path, "weight", path, update_every, first)


def test_very_many_updates_are_joined():
    gamma = gamma_from_sigma_rel(0.1)
    step = 10 * MOST_TIMES + 7
    profile = ema_pytorch_profile(gamma, step, 1)
    assert profile.times.size <= MOST_TIMES
    s = np.linspace(0, step, 1001)
    fraction = np.minimum((s + 1) / (step + 1), 1)
    power = 1 - fraction ** (gamma + 1)
    assert np.abs(profile.tail(s) - power).max() < 10 * (gamma + 1) / step


def test_a_step_before_the_first_update_is_refused():
    with refused("step", "100"):
        ema_pytorch_profile(1.0, 99, 10, first=100)


# --- the motion between stored averages


def drifting_walk():
    """Return weights of norm about 1 whose steps fall to a tenth and have a common drift: shape
    [STEPS, 1000]."""
    elements = 1000
    moves = normal(STEPS, elements) + 0.2 * normal(elements)
    sizes = torch.logspace(0, -1, STEPS, dtype=torch.float64)
    path = (moves * sizes[:, None]).cumsum(0)
    begin = normal(elements) / elements**0.5
    return begin + 0.3 * path / path[-1].norm()


def test_predicted_errors_from_averages_of_another_library_hold(tmp_path):
    """With distances of long averages from earlier ones alone, late motion and errors seemed much
    larger."""
    path = drifting_walk()
    by_lucidrains(tmp_path, path, 50, update_every=10)
    imported = tmp_path / "run"
    import_checkpoints(tmp_path, imported, kind="ema-pytorch", sigma_rels=WIDTHS, update_every=10)
    widths = (0.07, 0.1, 0.15, 0.2, 0.25)
    assert_predicted(imported, path.numpy(), targets=widths, names=["weight"], low=0.5, high=2)
