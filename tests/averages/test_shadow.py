"""ShadowModel: TensorFlow's formula, decay and debiasing, modes, copies, casts and wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from averages.models import numbers, random_steps, rounding
from checking import assert_same_tensors, saved_and_loaded
from factories import FloatArray, tiny_model

from posthoc_cli.averages import ShadowModel


def train(net: ShadowModel, steps: int) -> list[FloatArray]:
    """Values of `head.weight` before each update, the model's first."""
    values = []
    for _ in random_steps(net.model, steps):
        values.append(numbers(net.model.head.weight))
        net.update()
    return values


@pytest.mark.parametrize("num_updates", [None, 0, 7])
def test_the_shadow_is_tensorflows_formula(num_updates: int | None) -> None:
    net = ShadowModel(tiny_model(), 0.6, num_updates)
    shadow = numbers(net.shadow.head.weight)
    values = train(net, 20)
    for count, value in enumerate(values):
        decay = 0.6 if num_updates is None else min(0.6, (1 + num_updates + count) / (10 + num_updates + count))
        shadow -= (1 - decay) * (shadow - value)
    within = rounding(20, float(np.abs(values).max()))
    assert np.abs(numbers(net.shadow.head.weight) - shadow).max() < within < 0.01 * np.abs(shadow).max()
    assert net.num_updates is None if num_updates is None else net.num_updates == num_updates + 20


def test_a_tensor_as_num_updates_is_the_callers_clock() -> None:
    step = torch.tensor(0)
    net = ShadowModel(torch.nn.Linear(1, 1, bias=False), 0.99, num_updates=step)
    expected = net.shadow.weight.item()
    for count in (0, 90, 100_000):
        step.fill_(count)
        torch.nn.init.constant_(net.model.weight, count + 1.0)
        net.update()
        expected += (1 - min(0.99, (1 + count) / (10 + count))) * (count + 1 - expected)
        assert net.shadow.weight.item() == pytest.approx(expected, rel=1e-6)
    assert step == 100_000
    assert set(net.state_dict()) == {"model.weight", "shadow.weight"}


@pytest.mark.parametrize("num_updates", [None, 0])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999])
def test_zero_debiasing_divides_by_the_sum_of_the_weights(decay: float, num_updates: int | None) -> None:
    net = ShadowModel(tiny_model(), decay, num_updates, zero_debias=True)
    values = train(net, 12)
    biased, mass = np.zeros_like(values[0]), 0.0
    for count, value in enumerate(values):
        current = decay if num_updates is None else min(decay, (1 + count) / (10 + count))
        biased = current * biased + (1 - current) * value
        mass = current * mass + (1 - current)
    if num_updates is None:
        assert mass == pytest.approx(1 - decay**12, rel=1e-9)  # as TensorFlow has it
    # The mass is float32: its error, at most half a bit an update, is one of the share too.
    assert net.debias_mass.item() == pytest.approx(mass, rel=12 * 2.0**-24)
    within = 2 * rounding(12, float(np.abs(values).max()))
    assert np.abs(numbers(net.shadow.head.weight) - biased / mass).max() < within


def test_buffers_and_whole_numbers_are_copied_and_a_frozen_parameter_is_exactly_its_shadow() -> None:
    net = ShadowModel(tiny_model(), 0.9)
    for step in range(50):
        net.model.norm.running_mean.fill_(step)
        net.model.norm.num_batches_tracked.fill_(step)
        net.model.head.weight.data.add_(step)
        net.update()
    for name in ("norm.running_mean", "norm.num_batches_tracked", "frozen"):
        assert torch.equal(net.shadow.state_dict()[name], net.model.state_dict()[name])
    assert net.shadow.head.weight is net.shadow.embed.weight is not net.model.head.weight


class Dropped(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.0))
        self.drop = torch.nn.Dropout(1.0)

    def forward(self, x: torch.Tensor, *more: torch.Tensor, shift: float = 0.0) -> torch.Tensor:
        return self.drop(self.scale * (x + sum(more)) + shift)


def test_train_mode_runs_the_model_and_eval_mode_the_shadow() -> None:
    net = ShadowModel(Dropped(), 0.5)
    torch.nn.init.constant_(net.model.scale, 3.0)
    net.model.drop.p = 0.0
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    assert net(one, two, shift=1.0).item() == 10.0
    assert net.shadow(one).item() == 1.0, "in eval mode always: nothing is dropped"
    assert net.eval()(one, two, shift=1.0).item() == 4.0
    assert not net.model.training
    net.train()
    assert net.model.training
    assert not any(module.training for module in net.shadow.modules())


def test_making_one_leaves_the_models_mode_and_tensors_alone() -> None:
    model = tiny_model()
    model.norm.eval()
    net = ShadowModel(model, 0.9)
    assert model.training
    assert not model.norm.training
    assert net.model.head.weight is model.head.weight
    assert not net.shadow.training


def test_only_the_model_gets_gradients_and_steps_of_an_optimizer() -> None:
    net = ShadowModel(torch.nn.Linear(2, 1), 0.9).requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1, weight_decay=0.5)
    before = net.shadow.weight.clone()
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(net.shadow.weight, before)
    assert not torch.equal(net.model.weight, before)
    assert not any(p.requires_grad for p in net.shadow.parameters())
    assert not net.eval()(torch.ones(1, 2)).requires_grad


def test_an_update_in_eval_mode_warns_and_does_nothing() -> None:
    net = ShadowModel(torch.nn.Linear(1, 1), 0.5, num_updates=0).eval()
    before = copy.deepcopy(net.state_dict())
    torch.nn.init.constant_(net.model.weight, 7.0)
    with pytest.warns(RuntimeWarning, match="^posthoc_cli: .*eval mode") as caught:
        net.update()
    assert caught[0].filename == __file__
    assert torch.equal(net.shadow.weight, before["shadow.weight"])
    assert net.num_updates == 0
    net.train().update()
    assert net.num_updates == 1


def settled(dtype: torch.dtype = torch.float32) -> ShadowModel:
    net = ShadowModel(tiny_model().to(dtype), 0.9, num_updates=0, zero_debias=True)
    train(net, 5)
    return net


def from_state(net: ShadowModel) -> ShadowModel:
    twin = ShadowModel(tiny_model(3).to(net.model.head.bias.dtype), 0.9, num_updates=0, zero_debias=True)
    twin.load_state_dict(copy.deepcopy(net.state_dict()), strict=True)
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, from_state])
def test_a_copy_continues_like_the_original(copied: Callable[[ShadowModel], ShadowModel], dtype: torch.dtype) -> None:
    net = settled(dtype)
    twin = copied(net)
    unchanged = copy.deepcopy(net.state_dict())
    train(twin, 5)
    assert_same_tensors(net.state_dict(), unchanged)
    train(net, 5)
    assert_same_tensors(twin.state_dict(), net.state_dict())
    assert not torch.equal(twin.state_dict()["shadow.head.weight"], unchanged["shadow.head.weight"])


def test_everything_moves_and_casts_together_but_the_mass_stays_exact() -> None:
    net = settled()
    mass = net.debias_mass.clone()
    net.half()
    assert net.shadow.head.weight.dtype == net.model.head.weight.dtype == torch.float16
    assert torch.equal(net.debias_mass, mass)
    net.update()
    assert net.debias_mass.dtype == net.accumulators.values["head.bias"].dtype == torch.float32
    assert net.double().shadow.head.weight.dtype == torch.float64
    assert all(tensor.is_meta for tensor in net.to("meta").state_dict().values())


def test_the_state_holds_both_and_names_no_more_than_it_needs() -> None:
    model = torch.nn.Linear(1, 1)
    weights = {"model.weight", "model.bias", "shadow.weight", "shadow.bias"}
    assert set(ShadowModel(model, 0.9).state_dict()) == weights
    both = ShadowModel(model, 0.9, num_updates=3, zero_debias=True)
    assert set(both.state_dict()) == {*weights, "num_updates", "debias_mass"}


def test_compiled() -> None:
    net, x = ShadowModel(torch.nn.Linear(2, 1, bias=False), 0.5), torch.ones(1, 2)
    compiled = torch.compile(net, backend="eager")
    compiled(x).sum().backward()
    assert net.model.weight.grad is not None
    torch.nn.init.ones_(net.model.weight)
    torch.nn.init.zeros_(net.shadow.weight)
    compiled.update()
    assert (compiled(x).item(), compiled.eval()(x).item()) == (2.0, 1.0)
    inside = ShadowModel(torch.compile(net.model, backend="eager"), 0.5)
    inside.update()
    assert inside.train()(x).item() == 2.0
    assert "shadow.weight" in inside.state_dict()
