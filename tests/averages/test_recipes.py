"""Switch EMA, and Hare and Tortoise: trajectories against NumPy, float64, over both kinds of averages."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused
from factories import FloatArray, exact_average, tiny_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posthoc_cli import PostHocEMA
from posthoc_cli.averages import HareAndTortoise, SwitchEMA
from posthoc_cli.errors import InvalidValueError, ModelMismatchError

STEPS, EVERY = 30, 6
RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.8
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


class Trajectory(NamedTuple):
    """The weights after each step, before a switch at that step; and whether there was a switch."""

    weights: list[FloatArray]
    switched: list[bool]


def train(model: Quadratic, optimizer: torch.optim.Optimizer, recipe: Any, steps: int = STEPS) -> Trajectory:
    path = Trajectory([], [])
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss().backward()
        optimizer.step()
        path.weights.append(model.weight.detach().numpy().copy())
        path.switched.append(recipe.update(model))
    return path


def sgd(model: torch.nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)


def averaged(model: torch.nn.Module, **options: Any) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), **options)


def expected_path(forget_momentum: bool) -> list[FloatArray]:
    """Return the path of SGD with momentum and an average, with a switch at every 6th step."""
    weight, velocity, average, path = START, np.zeros(3), None, []
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
    optimizer, average = sgd(model), averaged(model)
    given = (optimizer,) if kind == "hare and its optimizer" else ()
    recipe = SwitchEMA(average, EVERY) if kind == "switch" else HareAndTortoise(average, EVERY, *given)
    path = train(model, optimizer, recipe)
    assert path.switched == [step % EVERY == 0 for step in range(1, STEPS + 1)]
    np.testing.assert_allclose(path.weights, expected_path(forget_momentum=bool(given)), rtol=0, atol=ROUNDING)
    other = np.array(expected_path(forget_momentum=not given))
    assert np.abs(np.array(path.weights) - other).max() > 0.1
    assert torch.equal(model.weight, average.module.weight)


@pytest.mark.parametrize("kind", [SwitchEMA, HareAndTortoise])
def test_a_switch_touches_neither_the_parameter_objects_nor_the_average(kind: type) -> None:
    model = Quadratic()
    optimizer = torch.optim.Adam(model.parameters())
    average = averaged(model)
    recipe = kind(average)
    train(model, optimizer, recipe, steps=5)
    parameter, address = model.weight, model.weight.data_ptr()
    state, before = copy.deepcopy(optimizer.state_dict()), average.module.weight.clone()
    recipe.switch(model) if kind is SwitchEMA else recipe.reset(model)
    assert model.weight is parameter
    assert model.weight.data_ptr() == address != average.module.weight.data_ptr()
    assert torch.equal(model.weight, before)
    assert torch.equal(average.module.weight, before)
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert torch.equal(after["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


def test_adam_counts_its_steps_anew_after_a_reset() -> None:
    model = Quadratic()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, HareAndTortoise(averaged(model), EVERY, optimizer), steps=EVERY + 2)
    assert optimizer.state[model.weight]["step"] == 2


def test_buffers_come_with_the_average() -> None:
    model = tiny_model()
    average = averaged(model, use_buffers=True)
    recipe = SwitchEMA(average)
    for seed in range(3):
        model(torch.randint(5, (8,), generator=torch.Generator().manual_seed(seed)))
        recipe.update(model)
    assert not torch.equal(model.norm.running_mean, average.module.norm.running_mean)
    recipe.switch(model)
    assert_same_tensors(model.state_dict(), average.module.state_dict())


def test_a_model_with_other_tensors_is_refused_and_left_alone() -> None:
    recipe = SwitchEMA(averaged(torch.nn.Linear(2, 3)))
    for model, name in ((torch.nn.Linear(2, 4), "weight"), (torch.nn.Linear(2, 3, bias=False), "bias")):
        before = model.weight.clone()
        with refused(f"tensor '{name}'", kind=ModelMismatchError):
            recipe.switch(model)
        assert torch.equal(model.weight, before)


def tracker(model: torch.nn.Module, folder: Path, **options: Any) -> PostHocEMA:
    options = {"update_every": 1, "checkpoint_every": 6, "checkpoint_dtype": torch.float64, **options}
    return PostHocEMA.from_model(model, folder, sigma_rels=(SIGMA_REL, 0.28), **options)


@pytest.mark.parametrize("kind", [SwitchEMA, HareAndTortoise])
def test_a_switch_gives_the_trackers_average_and_later_ones_go_on_over_the_jumps(kind: type, tmp_path: Path) -> None:
    model = Quadratic()
    with tracker(model, tmp_path) as ema:
        recipe = kind(ema, EVERY, sigma_rel=SIGMA_REL)
        seen: list[FloatArray] = []
        optimizer = sgd(model)
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            model.loss().backward()
            optimizer.step()
            seen.append(model.weight.detach().numpy().copy())
            assert recipe.update(model) == (step % EVERY == 0)
            for sigma_rel in (SIGMA_REL, 0.28):
                expected = exact_average(seen, sigma_rel, range(1, step + 1))
                found = ema.state_dict(sigma_rel)["weight"].numpy()
                np.testing.assert_allclose(found, expected, rtol=0, atol=ROUNDING)
                if step % EVERY == 0 and sigma_rel == SIGMA_REL:
                    np.testing.assert_allclose(model.weight.detach().numpy(), expected, rtol=0, atol=ROUNDING)
        assert np.abs(seen[-1] - seen[-2]).max() > 1e-3


def test_switching_goes_on_exactly_after_an_interruption(tmp_path: Path) -> None:
    paths = []
    for name, stops in (("whole", [STEPS]), ("parts", [10, STEPS])):
        model, done, states = Quadratic(), 0, None
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
                weights += train(model, optimizer, recipe, stop - done).weights
                states = optimizer.state_dict(), ema.state_dict(), recipe.state_dict()
            done = stop
        assert recipe.step == STEPS
        paths.append(weights)
    np.testing.assert_array_equal(paths[0], paths[1])


def test_nothing_is_switched_before_there_is_an_average(tmp_path: Path) -> None:
    model = Quadratic()
    with tracker(model, tmp_path, update_every=3, update_after_step=9) as ema:
        recipe = SwitchEMA(ema, EVERY, sigma_rel=SIGMA_REL)
        with pytest.warns(RuntimeWarning, match="no average yet, so the raw weights are used: .*call 12"):
            recipe.switch(model)
        path = train(model, sgd(model), recipe, steps=12)
    assert path.switched == [False] * 11 + [True]


def test_a_tracker_that_is_attached_is_only_switched(tmp_path: Path) -> None:
    model = Quadratic()
    optimizer = sgd(model)
    with tracker(model, tmp_path) as ema:
        ema.attach(optimizer)
        recipe = SwitchEMA(ema, sigma_rel=SIGMA_REL)
        for _ in range(4):
            model.loss().backward()
            optimizer.step()
        recipe.switch(model)
        assert ema.step == 4
        np.testing.assert_allclose(model.weight.detach(), ema.state_dict(SIGMA_REL)["weight"], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("kind", "name"), [(SwitchEMA, "switch_every"), (HareAndTortoise, "reset_every")])
def test_a_bad_period_is_named(kind: type, name: str, tmp_path: Path) -> None:
    for every in (0, -1, 2.5, True, "6"):
        with pytest.raises(InvalidValueError, match=name):
            kind(averaged(Quadratic()), every)
    with refused(name, "multiple of the tracker's update_every 3"):
        kind(tracker(Quadratic(), tmp_path, update_every=3), 4, sigma_rel=SIGMA_REL)


def test_what_is_no_average_is_named(tmp_path: Path) -> None:
    model = Quadratic()
    with refused("average", "not Quadratic"):
        SwitchEMA(model, 3)  # type: ignore[arg-type]
    with refused("tortoise", "not NoneType"):
        HareAndTortoise(None, 3)  # type: ignore[arg-type]
    with refused("sigma_rel", "must be given"):
        SwitchEMA(tracker(model, tmp_path), 6)
    with refused("sigma_rel", "AveragedModel has a single average"):
        HareAndTortoise(averaged(model), 6, sigma_rel=0.1)
