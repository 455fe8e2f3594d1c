"""`DifferentiableEMA`: averages and gradients against formulas in NumPy, states and bad input."""

import copy

import numpy as np
import pytest
import torch
from checking import refused, saved_and_loaded
from numpy.testing import assert_allclose
from torch import nn

from posthoc_cli.averages import DifferentiableEMA

DECAY = 0.9
STEPS = 30
ROWS = 3
WEIGHTS = 5
RANDOM = np.random.default_rng(0)
DATA = RANDOM.normal(size=(STEPS, ROWS, WEIGHTS))
START = RANDOM.normal(size=WEIGHTS)
TARGET = RANDOM.normal(size=ROWS)
MODES = {
    "truncated": 1,
    "window": 7,
    "carried": STEPS,
    "full": STEPS,
}
"""The number of values whose derivatives count."""


def value_of(step, weight):
    """Return A_i w_i**2, whose derivative is 2 A_i w_i."""
    return torch.as_tensor(DATA[step]) @ weight**2


def leaf():
    return nn.Parameter(torch.tensor(START))


def coefficients(count):
    """Return the coefficient of each value: 1 - decay, but for the first, times all later
    decays."""
    later = DECAY ** np.arange(count)[::-1]
    own = np.full(count, 1 - DECAY)
    own[0] = 1.0
    return later * own


def assert_near(found, expected):
    """A sum of products of numbers up to about 10, with 8 roundings a step."""
    within = 10 * 8 * STEPS * ROWS * WEIGHTS * np.finfo(np.float64).eps
    assert_allclose(found, expected, rtol=0, atol=within)


def make(mode):
    window = 7 if mode == "window" else None
    return DifferentiableEMA(ROWS, DECAY, mode, window, dtype=torch.float64)


def take(ema, value, weight):
    """Call the module; pass the leaf in the mode that needs it."""
    if ema.mode == "carried":
        return ema(value, leaves=[weight])
    return ema(value)


@pytest.mark.parametrize("mode", MODES)
def test_averages_and_gradients_over_30_steps_of_backward_and_sgd(mode):
    """Each kept value's derivative is taken at the weight of its step, although the optimizer has
    changed it since."""
    ema = make(mode)
    weight = leaf()
    optimizer = torch.optim.SGD([weight], lr=0.05)
    values = []
    derivatives = []
    for step in range(STEPS):
        at = weight.detach().numpy().copy()
        values.append(DATA[step] @ at**2)
        derivatives.append(2 * DATA[step] * at)
        with ema.recording():
            value = value_of(step, weight)
        average = take(ema, value, weight)
        c = coefficients(step + 1)
        assert_near(average.detach(), c @ values)
        optimizer.zero_grad()
        distance = average - torch.tensor(TARGET)
        loss = distance.square().sum() / 2
        loss.backward(retain_graph=True)
        first = max(0, step + 1 - MODES[mode])
        slope = np.tensordot(c[first:], derivatives[first:], axes=1)
        assert_near(weight.grad, (c @ values - TARGET) @ slope)
        optimizer.step()
        average.detach().mul_(7.0)  # by the caller, whose memory it is
    assert np.linalg.norm(at - START) > 0.2
    assert ema.num_updates == STEPS


@pytest.mark.parametrize("mode", MODES)
def test_values_that_are_views_of_the_leaf_are_kept_although_the_optimizer_changes_it(mode):
    weight = nn.Parameter(torch.zeros(ROWS, dtype=torch.float64))
    ema = make(mode)
    for number in (1.0, 2.0, 3.0):
        nn.init.constant_(weight, number)
        take(ema, weight.view(ROWS), weight)
    assert_near(ema.average, [coefficients(3) @ [1, 2, 3]] * ROWS)


def test_carried_reaches_every_leaf_that_it_was_given_and_no_other(caplog):
    one, two, other = (torch.full((2,), 2.0).requires_grad_() for _ in range(3))
    ema = DifferentiableEMA((), 0.5, "carried")
    ema((one * other).sum(), leaves=[one, two])
    (warning,) = caplog.messages
    assert "depend on leaves[1] of the shape [2]: " in warning
    average = ema((one * two * other).sum(), leaves=[one, two])
    average.backward()
    earlier = 0.5 * 2
    later = 0.5 * 4
    assert one.grad.tolist() == [earlier + later] * 2
    assert two.grad.tolist() == [later] * 2
    assert other.grad is None


def by_state(first):
    second = make(first.mode)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    return second


@pytest.mark.parametrize("copied", [by_state, saved_and_loaded])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_goes_on_alone_with_the_average_as_a_constant(mode, copied):
    first = make(mode)
    weight = leaf()
    other = leaf()
    for step in range(5):
        take(first, value_of(step, weight), weight)
    before = first.average.clone()
    second = copied(first)
    average = take(second, value_of(5, other), other)
    assert torch.equal(first.average, before)
    assert first.num_updates == 5
    assert second.num_updates == 6
    expected = DECAY * before.numpy() + (1 - DECAY) * DATA[5] @ START**2
    assert_near(average.detach(), expected)
    average.sum().backward()
    assert_near(other.grad, (1 - DECAY) * (2 * DATA[5] * START).sum(axis=0))
    assert weight.grad is None


@pytest.mark.parametrize("changed", [{"dtype": torch.float64}, {"device": "meta"}, {"size": (3,)}])
def test_a_value_of_another_kind_is_named_and_not_taken_in(changed):
    ema = DifferentiableEMA(2, 0.9).half()
    with refused("value", "[2]"):
        ema(torch.ones(**{"size": (2,)} | changed))
    assert ema.num_updates == 0


def test_bad_leaves_are_named():
    weight = nn.Parameter(torch.ones(2))
    other = nn.Parameter(torch.ones(2))
    ema = DifferentiableEMA(2, 0.9, "carried")
    for leaves in (None, weight, [], [weight, weight], [weight * 1], [torch.ones(2)]):
        with refused("leaves", "different"):
            ema(weight * 2, leaves=leaves)
    with refused("value", "no graph"):
        ema(torch.ones(2), leaves=[weight])
    ema(weight * 2, leaves=[weight])
    with refused("leaves", "same"):
        ema(weight * 2, leaves=[other])
    with refused("leaves", "'carried'"):
        DifferentiableEMA(2, 0.9)(weight * 2, leaves=[weight])
