"""Switch EMA, and Hare and Tortoise: trajectories against NumPy, float64, over both kinds of
averages."""

import numpy as np
import pytest
import torch
from checking import refused
from factories import exact_average
from numpy.testing import assert_allclose
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tracker.runs import track

from posthoc_cli.averages import HareAndTortoise, SwitchEMA

STEPS = 30
EVERY = 6
RATE = 0.1
MOMENTUM = 0.9
DECAY = 0.8
CURVATURE = np.array([1.0, 0.3, 3.0])
START = np.array([1.0, -2.0, 0.5])
SIGMA_REL = 0.1

ROUNDING = 8 * STEPS * 10 * np.finfo(np.float64).eps
"""Eight roundings a step, and a momentum that sums up ten of them."""


class Quadratic(nn.Module):
    """The loss sum curvature weight**2 / 2, whose gradient is curvature weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(START))

    def loss(self):
        return (torch.tensor(CURVATURE) * self.weight**2).sum() / 2


def train(model, optimizer, recipe, steps=STEPS):
    """Take steps; yield after each the weights before a switch at that step, and whether there was
    a switch."""
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        weights = model.weight.detach().numpy().copy()
        yield weights, recipe.update(model)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def averaged(model):
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))


def check_path(model, optimizer, recipe, forget_momentum):
    """Compare with the path of SGD with momentum and an average, with a switch at every 6th
    step."""
    weight = START
    velocity = np.zeros(3)
    average = None
    for step, (weights, switched) in enumerate(train(model, optimizer, recipe), 1):
        velocity = MOMENTUM * velocity + CURVATURE * weight
        weight = weight - RATE * velocity
        assert_allclose(weights, weight, rtol=0, atol=ROUNDING)
        assert switched == (step % EVERY == 0)
        if average is None:
            average = weight
        average = DECAY * average + (1 - DECAY) * weight
        if switched:
            weight = average
            if forget_momentum:
                velocity = np.zeros(3)


def test_switching_keeps_the_momentum():
    model = Quadratic()
    average = averaged(model)
    check_path(model, sgd(model), SwitchEMA(average, EVERY), forget_momentum=False)
    assert torch.equal(model.weight, average.module.weight)


def test_the_hares_optimizer_forgets_its_momentum():
    model = Quadratic()
    optimizer = sgd(model)
    recipe = HareAndTortoise(averaged(model), EVERY, optimizer)
    check_path(model, optimizer, recipe, forget_momentum=True)


def test_a_switch_gives_the_trackers_average_and_later_ones_go_on_over_the_jumps(tmp_path):
    model = Quadratic()
    with track(model, tmp_path, (SIGMA_REL, 0.28)) as ema:
        recipe = SwitchEMA(ema, EVERY, sigma_rel=SIGMA_REL)
        seen = []
        for step, (weights, switched) in enumerate(train(model, sgd(model), recipe), 1):
            seen.append(weights)
            assert switched == (step % EVERY == 0)
            expected = exact_average(seen, SIGMA_REL, range(1, step + 1))
            found = ema.state_dict(SIGMA_REL)["weight"]
            assert_allclose(found, expected, rtol=0, atol=ROUNDING)
            if switched:
                assert_allclose(model.weight.detach(), found, rtol=0, atol=ROUNDING)


def test_the_period_goes_on_after_an_interruption():
    model = Quadratic()
    average = averaged(model)
    first = SwitchEMA(average, EVERY)
    for _ in train(model, sgd(model), first, steps=10):
        pass
    second = SwitchEMA(average, EVERY)
    second.load_state_dict(first.state_dict())
    switches = [switched for _, switched in train(model, sgd(model), second, steps=3)]
    assert switches == [False, True, False]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (SwitchEMA, "switch_every"),
        (HareAndTortoise, "reset_every"),
    ],
)
def test_a_bad_period_or_length_is_named(kind, name, tmp_path):
    model = Quadratic()
    with refused(name):
        kind(averaged(model), 0)
    ema = track(model, tmp_path, update_every=3, checkpoint_every=6)
    with refused(name, "update_every 3"):
        kind(ema, 4, sigma_rel=SIGMA_REL)
    with refused("sigma_rel"):
        kind(ema, 6)
    with refused("sigma_rel"):
        kind(averaged(model), 6, sigma_rel=0.1)


def test_nothing_is_switched_before_there_is_an_average(tmp_path):
    model = Quadratic()
    schedule = {"update_every": 3, "update_after_step": 9, "checkpoint_every": 6}
    with track(model, tmp_path, **schedule) as ema:
        recipe = SwitchEMA(ema, EVERY, sigma_rel=SIGMA_REL)
        switches = [switched for _, switched in train(model, sgd(model), recipe, steps=12)]
    assert switches == [False] * 11 + [True]
