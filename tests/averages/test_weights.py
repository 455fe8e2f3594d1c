"""Averages of a model's weights: the formulas, what is copied, states, precision, and the arguments
of all averages."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused
from factories import tiny_model
from torch import nn

from posthoc_cli import averages
from posthoc_cli.averages import ExponentialMovingAverage, ShadowModel
from posthoc_cli.errors import ModelMismatchError


def numbers(tensor):
    return tensor.detach().double().numpy().copy()


def random_steps(model, steps, seed=1):
    """Move every floating-point tensor and count every integer up, as a training would; yield each
    step."""
    torch.manual_seed(seed)
    tensors = [*model.parameters(), *model.buffers()]
    for step in range(steps):
        for tensor in tensors:
            change = torch.ones(())
            if tensor.is_floating_point():
                change = torch.randn(tensor.shape)
            tensor.data += change.to(tensor.dtype)
        yield step


def assert_near(found, expected, updates):
    """Each update rounds a difference, at most twice the largest value, a product, the share and a
    sum; values here are below 20."""
    error = np.abs(numbers(found) - expected).max()
    assert error < updates * 7 * 2.0**-24 * 20


# --- ExponentialMovingAverage


def check_average(found, values, momenta):
    """Compare with the average by definition; `momenta[0]` belongs to the first value, and changes
    nothing."""
    expected = values[0]
    for value, momentum in zip(values, momenta, strict=True):
        expected = (1 - momentum) * expected + momentum * value
    assert_near(found, expected, len(values))


def test_the_average_is_the_formula():
    """Buffers are copied."""
    model = tiny_model()
    ema = ExponentialMovingAverage(model, 0.2)
    weights = []
    for _ in random_steps(model, 40):
        ema.update_parameters(model)
        weights.append(numbers(model.head.weight))
    averaged = ema.module
    check_average(averaged.head.weight, weights, [0.2] * 40)
    assert averaged.head.weight is averaged.embed.weight
    assert torch.equal(averaged.norm.running_var, model.norm.running_var)
    assert averaged.norm.num_batches_tracked == 40
    assert ema.steps == 40


def test_a_warm_up_an_interval_and_averaged_buffers():
    model = tiny_model()
    ema = ExponentialMovingAverage(model, 0.2, 3, update_buffers=True, warmup=True)
    weights = []
    variances = []
    momenta = []
    for step in random_steps(model, 40):  # the warm-up has ended by then
        ema.update_parameters(model)
        if step % 3 == 0:
            weights.append(numbers(model.head.weight))
            variances.append(numbers(model.norm.running_var))
            momenta.append(max(0.2, 9 / (10 + step)))
    averaged = ema.module
    check_average(averaged.head.weight, weights, momenta)
    check_average(averaged.norm.running_var, variances, momenta)
    assert averaged.norm.num_batches_tracked == 40


def test_an_infinity_in_an_averaged_buffer_stays():
    """Attention masks hold infinity."""
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    ema = ExponentialMovingAverage(model, update_buffers=True)
    for _ in range(3):
        ema.update_parameters(model)
    assert ema.module.mask.tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("cast", ["before", "after"])
@pytest.mark.parametrize(
    "make",
    [
        partial(ExponentialMovingAverage, momentum=2e-4),
        partial(ShadowModel, decay=1 - 2e-4),
    ],
)
def test_half_precision_averages_move(make, cast):
    """Rounded after every update, 2e-4 of the distance 1 is lost in values near 1: the average
    would stay at 1."""
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    if cast == "before":
        model.bfloat16()
    average = make(model)
    update = getattr(average, "update", None) or partial(average.update_parameters, model)
    update()
    if cast == "after":
        nn.Sequential(model, average).bfloat16()
    nn.init.constant_(model.weight, 2.0)
    for _ in range(2000):
        update()
    averaged = getattr(average, "shadow", None) or average.module
    assert model.weight.dtype == torch.bfloat16
    assert averaged.weight.dtype == torch.float32
    assert averaged.weight.item() == pytest.approx(2 - (1 - 2e-4) ** 2000, abs=1e-3)


def test_a_state_of_mmengine_loads_and_goes_on():
    """`mmengine.model.ExponentialMovingAverage(model).state_dict()` has these names, as
    documented."""
    model = tiny_model()
    saved = {}
    for name, value in model.state_dict().items():
        saved[f"module.{name}"] = torch.full_like(value, 17)
    saved["steps"] = torch.tensor(40)
    ema = ExponentialMovingAverage(model, momentum=0.25)
    assert ema.state_dict().keys() == saved.keys()
    ema.load_state_dict(saved)
    assert ema.steps == 40
    ema.update_parameters(model)
    expected = 0.75 * 17 + 0.25 * model.head.bias.detach()
    torch.testing.assert_close(ema.module.head.bias, expected)


def test_another_model_is_an_error_that_names_a_tensor_and_changes_nothing():
    model = tiny_model()
    ema = ExponentialMovingAverage(model)
    before = copy.deepcopy(ema.state_dict())
    other = tiny_model(1)
    other.norm.running_var = torch.ones(1)
    with refused("tensor 'norm.running_var'", "[1]", kind=ModelMismatchError):
        ema.update_parameters(other)
    del other.frozen
    with refused("model", "'frozen'", kind=ModelMismatchError):
        ema.update_parameters(other)
    assert_same_tensors(ema.state_dict(), before)


# --- ShadowModel


def check_shadow(net, clocks):
    """Compare with TensorFlow's formula, by the count of updates before each.

    Zero debiasing divides by the sum of the weights.
    """
    shadow = numbers(net.shadow.head.weight)
    mass = 1.0
    if net.zero_debias:
        shadow = np.zeros_like(shadow)
        mass = 0.0
    for step in random_steps(net.model, len(clocks)):
        clock = clocks[step]
        decay = min(net.decay, (1 + clock) / (10 + clock))
        shadow = decay * shadow + (1 - decay) * numbers(net.model.head.weight)
        mass = decay * mass + (1 - decay)
        net.update()
    # the mass is rounded, too
    assert_near(net.shadow.head.weight, shadow / mass, 2 * len(clocks))


@pytest.mark.parametrize(
    ("decay", "debias", "given", "clocks", "last"),
    [
        (0.9999, True, None, [1e9] * 20, None),
        (0.6, False, 7, range(7, 27), 27),
        (0.6, False, torch.tensor(7), [7] * 20, 7),
    ],
)
def test_a_shadow_has_a_constant_decay_or_counts_or_takes_the_callers_clock(
    decay, debias, given, clocks, last
):
    """A tensor is the caller's, and left as it is."""
    net = ShadowModel(tiny_model(), decay, given, debias)
    check_shadow(net, clocks)
    assert net.num_updates == last
    assert ("num_updates" in net.state_dict()) == isinstance(given, int)
    assert ("debias_mass" in net.state_dict()) == debias


def test_train_mode_runs_the_model_and_eval_mode_the_shadow():
    """The shadow is in eval mode always: nothing is dropped."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout(1.0))
    net = ShadowModel(model, 0.5)
    x = torch.ones(1)
    average = net.shadow(x)
    nn.init.constant_(model[0].weight, 50.0)
    assert net(x) == 0.0
    assert net.eval()(x) == average != 0.0
    assert not model.training
    assert not net.train().shadow.training
    assert model.training


# --- arguments of the averages are checked

LINEAR = nn.Linear(1, 1)
AVERAGE = partial(ExponentialMovingAverage, LINEAR)
SHADOW = partial(ShadowModel, LINEAR, decay=0.9)
STATISTICS = partial(averages.EMAStats, dim_x=2)
DIFFERENTIABLE = partial(averages.DifferentiableEMA, 2, decay=0.9)
BAD = [
    (AVERAGE, "momentum", [0.0, 1.0, "0.1"]),
    (AVERAGE, "interval", [0, 1.5, True]),
    (SHADOW, "decay", [-0.1, 1.0]),
    (SHADOW, "num_updates", [-1]),
    (STATISTICS, "momentum", [0.0, 2, True]),
    (STATISTICS, "eps", [-1e-9, math.inf]),
    (STATISTICS, "dim_y", [0]),
    (DIFFERENTIABLE, "decay", [-0.1, 1.0]),
    (DIFFERENTIABLE, "mode", ["half"]),
    (partial(DIFFERENTIABLE, mode="full"), "window", [3]),
    (partial(DIFFERENTIABLE, mode="window"), "window", [None, 0]),
    (DIFFERENTIABLE, "dtype", [torch.float16]),
]


@pytest.mark.parametrize(("make", "name", "values"), BAD)
def test_a_bad_argument_is_named(make, name, values):
    for value in values:
        with refused(name):
            make(**{name: value})
