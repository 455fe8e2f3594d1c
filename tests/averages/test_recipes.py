"""Switch EMA, and Hare and Tortoise: trajectories against NumPy, float64, over both kinds of
averages."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checking import refused
from factories import FloatArray, exact_average
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posthoc_cli import PostHocEMA
from posthoc_cli.averages import HareAndTortoise, SwitchEMA
from posthoc_cli.errors import InvalidValueError

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


class Quadratic(torch.nn.Module):
    """The loss sum curvature weight**2 / 2, whose gradient is curvature weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(START))

    def loss(self) -> torch.Tensor:
        return (torch.tensor(CURVATURE) * self.weight**2).sum() / 2


def train(
    model: Quadratic,
    optimizer: torch.optim.Optimizer,
    recipe: Any,
    steps: int = STEPS,
) -> Iterator[tuple[FloatArray, bool]]:
    """Take steps; yield after each the weights before a switch at that step, and whether there was
    a switch."""
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        weights = model.weight.detach().numpy().copy()
        yield weights, recipe.update(model)


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def averaged(model: torch.nn.Module, **options: Any) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), **options)


def expected_path(forget_momentum: bool) -> list[FloatArray]:
    """Return the path of SGD with momentum and an average, with a switch at every 6th step."""
    weight = START
    velocity = np.zeros(3)
    average = None
    path = []
    for step in range(1, STEPS + 1):
        velocity = MOMENTUM * velocity + CURVATURE * weight
        weight = weight - RATE * velocity
        path.append(weight)
        average = weight if average is None else DECAY * average + (1 - DECAY) * weight
        if step % EVERY == 0:
            weight = average
            velocity = np.zeros(3) if forget_momentum else velocity
    return path


@pytest.mark.parametrize("kind", ["switch", "hare", "hare and its optimizer"])
def test_switching_keeps_the_momentum_unless_the_hares_optimizer_is_given(kind: str) -> None:
    model = Quadratic()
    optimizer = sgd(model)
    average = averaged(model)
    given = (optimizer,) if kind == "hare and its optimizer" else ()
    recipe = (
        SwitchEMA(average, EVERY) if kind == "switch" else HareAndTortoise(average, EVERY, *given)
    )
    weights, switched = zip(*train(model, optimizer, recipe), strict=True)
    assert [*switched] == [step % EVERY == 0 for step in range(1, STEPS + 1)]
    np.testing.assert_allclose(
        weights, expected_path(forget_momentum=bool(given)), rtol=0, atol=ROUNDING
    )
    other = np.array(expected_path(forget_momentum=not given))
    assert np.abs(np.array(weights) - other).max() > 0.1
    assert torch.equal(model.weight, average.module.weight)


def tracker(model: torch.nn.Module, folder: Path, **options: Any) -> PostHocEMA:
    options = {
        "update_every": 1,
        "checkpoint_every": 6,
        "checkpoint_dtype": torch.float64,
        **options,
    }
    return PostHocEMA.from_model(model, folder, sigma_rels=(SIGMA_REL, 0.28), **options)


@pytest.mark.parametrize("kind", [SwitchEMA, HareAndTortoise])
def test_a_switch_gives_the_trackers_average_and_later_ones_go_on_over_the_jumps(
    kind: type,
    tmp_path: Path,
) -> None:
    model = Quadratic()
    with tracker(model, tmp_path) as ema:
        recipe = kind(ema, EVERY, sigma_rel=SIGMA_REL)
        seen: list[FloatArray] = []
        for step, (weights, switched) in enumerate(train(model, sgd(model), recipe), 1):
            seen.append(weights)
            assert switched == (step % EVERY == 0)
            for sigma_rel in (SIGMA_REL, 0.28):
                expected = exact_average(seen, sigma_rel, range(1, step + 1))
                found = ema.state_dict(sigma_rel)["weight"].numpy()
                np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
                if step % EVERY == 0 and sigma_rel == SIGMA_REL:
                    np.testing.assert_allclose(
                        model.weight.detach().numpy(), expected, rtol=0, atol=ROUNDING
                    )
        assert np.abs(seen[-1] - seen[-2]).max() > 1e-3


def test_switching_goes_on_exactly_after_an_interruption(tmp_path: Path) -> None:
    paths = []
    for name, stops in (("whole", [STEPS]), ("parts", [10, STEPS])):
        model = Quadratic()
        done = 0
        states = None
        weights: list[FloatArray] = []
        for stop in stops:
            optimizer = sgd(model)
            ema = tracker(model, tmp_path / name, resume="auto")
            recipe = SwitchEMA(ema, EVERY, sigma_rel=SIGMA_REL)
            if states is not None:
                optimizer.load_state_dict(states[0])
                ema.load_state_dict(states[1])
                recipe.load_state_dict(states[2])
            with ema:
                weights += [one for one, _ in train(model, optimizer, recipe, stop - done)]
                states = optimizer.state_dict(), ema.state_dict(), recipe.state_dict()
            done = stop
        assert recipe.step == STEPS
        paths.append(weights)
    np.testing.assert_array_equal(paths[0], paths[1])


@pytest.mark.parametrize(
    ("kind", "name"), [(SwitchEMA, "switch_every"), (HareAndTortoise, "reset_every")]
)
def test_a_bad_period_or_length_is_named(kind: type, name: str, tmp_path: Path) -> None:
    for every in (0, -1, 2.5, True, "6"):
        with pytest.raises(InvalidValueError, match=name):
            kind(averaged(Quadratic()), every)
    tracked = tracker(Quadratic(), tmp_path, update_every=3)
    with refused(name, "multiple of the tracker's update_every 3"):
        kind(tracked, 4, sigma_rel=SIGMA_REL)
    with refused("sigma_rel", "must be given"):
        kind(tracked, 6)
    with refused("sigma_rel", "only with one"):
        kind(averaged(Quadratic()), 6, sigma_rel=0.1)


def test_nothing_is_switched_before_there_is_an_average(tmp_path: Path) -> None:
    model = Quadratic()
    with tracker(model, tmp_path, update_every=3, update_after_step=9) as ema:
        path = [*train(model, sgd(model), SwitchEMA(ema, EVERY, sigma_rel=SIGMA_REL), steps=12)]
    assert [switched for _, switched in path] == [False] * 11 + [True]
