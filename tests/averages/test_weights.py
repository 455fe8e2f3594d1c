"""Averages of a model's weights: the formulas, what is copied, states, precision, subclasses and
wrappers."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused, saved_and_loaded
from factories import FloatArray, tiny_model
from torch import nn

from posthoc_cli import averages
from posthoc_cli.averages import ExponentialMovingAverage, ShadowModel
from posthoc_cli.errors import ModelMismatchError


def rounding(updates: int, largest: float) -> float:
    """Bound the rounding of a difference, at most twice the largest value, a product, the share and
    a sum."""
    return updates * 7 * 2.0**-24 * largest


def numbers(tensor: torch.Tensor) -> FloatArray:
    return tensor.detach().double().numpy().copy()


def largest(*values: FloatArray) -> float:
    return float(np.abs(values).max())


def random_steps(model: nn.Module, steps: int, seed: int = 1) -> Iterator[int]:
    """Move every floating-point tensor and count every integer up, as a training would; yield each
    step."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    for step in range(steps):
        tensors = {id(tensor): tensor for tensor in model.state_dict().values()}
        for tensor in tensors.values():
            change = torch.ones(())
            if tensor.is_floating_point():
                change = torch.randn(tensor.shape, generator=generator)
            tensor.add_(change.to(tensor.dtype))
        yield step


# --- ExponentialMovingAverage
# ------------------------------------------------------------------------


def check_average(
    found: torch.Tensor, values: Sequence[FloatArray], momenta: Sequence[float]
) -> None:
    """Compare with the average by definition, in float64; `momenta[0]` belongs to the first value,
    and changes nothing."""
    expected = values[0]
    for value, momentum in zip(values, momenta, strict=True):
        expected = (1 - momentum) * expected + momentum * value
    within = rounding(40, largest(*values))
    error = numbers(found) - expected
    assert largest(error) < within < 0.01 * largest(expected)


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
    assert ema.steps == 40


def test_an_infinity_in_an_averaged_buffer_stays():
    """Attention masks hold infinity."""
    model = nn.Linear(1, 1)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    ema = ExponentialMovingAverage(model, update_buffers=True)
    for _ in range(3):
        ema.update_parameters(model)
    assert ema.module.mask.tolist() == [0.0, -math.inf]


def test_half_precision_averages_move():
    """Rounded after every update, 2e-4 of the distance 1 is lost in values near 1: the average
    would stay at 1."""
    model = nn.Linear(1, 1, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    ema = ExponentialMovingAverage(model, momentum=2e-4)
    ema.update_parameters(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(2000):
        ema.update_parameters(model)
    weight = ema.module.weight
    expected = 2 - (1 - 2e-4) ** 2000
    assert weight.dtype == torch.float32
    assert abs(weight.item() - expected) < rounding(2000, 2.0)


def test_a_state_of_mmengine_loads_and_goes_on():
    """`mmengine.model.ExponentialMovingAverage(model).state_dict()` has these names, as
    documented."""
    model = tiny_model()
    saved = {}
    for name, value in model.state_dict().items():
        saved[f"module.{name}"] = torch.randn(value.shape)
    saved["module.norm.num_batches_tracked"] = torch.tensor(17)
    saved["module.head.weight"] = saved["module.embed.weight"]
    saved["steps"] = torch.tensor(40)
    ema = ExponentialMovingAverage(model, momentum=0.25)
    outer = nn.ModuleDict({"ema": ema})
    outer.load_state_dict({f"ema.{name}": value for name, value in saved.items()})
    assert set(ema.state_dict()) == set(saved)
    assert ema.steps == 40
    ema.update_parameters(model)
    expected = 0.75 * saved["module.head.bias"] + 0.25 * model.head.bias.detach()
    found = ema.module.head.bias
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_another_model_is_an_error_that_lists_names_and_changes_nothing():
    model = tiny_model()
    ema = ExponentialMovingAverage(model)
    ema.update_parameters(model)
    before = copy.deepcopy(ema.state_dict())
    other = tiny_model(1)
    shorter = tiny_model(1)
    del other.frozen
    with pytest.raises(ModelMismatchError) as caught:
        ema.update_parameters(other)
    assert "'frozen'" in caught.value.reason
    shorter.norm.running_var = torch.ones(1)
    with refused("tensor 'norm.running_var'", "[1] in the model, [3]", kind=ModelMismatchError):
        ema.update_parameters(shorter)
    assert_same_tensors(ema.state_dict(), before)


# --- ShadowModel
# --------------------------------------------------------------------------------------


def train(net: ShadowModel, steps: int) -> list[FloatArray]:
    """Return the values of `head.weight` before each update, the model's first."""
    values = []
    for _ in random_steps(net.model, steps):
        values.append(numbers(net.model.head.weight))
        net.update()
    return values


STEPS = 20


def check_shadow(net: ShadowModel, clocks: Iterable[float]) -> None:
    """Compare with TensorFlow's formula, by the count of updates before each.

    Zero debiasing divides by the sum of the weights.
    """
    shadow = numbers(net.shadow.head.weight)
    if net.zero_debias:
        shadow = np.zeros_like(shadow)
    mass = 0.0
    values = train(net, STEPS)
    for value, clock in zip(values, clocks, strict=True):
        rising = (1 + clock) / (10 + clock)
        decay = min(net.decay, rising)
        shadow = decay * shadow + (1 - decay) * value
        mass = decay * mass + (1 - decay)
    within = rounding(STEPS, largest(*values))
    if net.zero_debias:
        # The mass is float32: its error, at most half a bit an update, is one of the share too.
        half_bits = STEPS * 2.0**-24
        assert net.debias_mass.item() == pytest.approx(mass, rel=half_bits)
        shadow = shadow / mass
        within = 2 * within
    error = numbers(net.shadow.head.weight) - shadow
    assert largest(error) < within < 0.01 * largest(shadow)


@pytest.mark.parametrize(
    ("decay", "debias", "given", "clocks", "last", "stored"),
    [
        (0.9999, True, None, [1e9] * STEPS, None, False),
        (0.6, False, 7, range(7, 7 + STEPS), 7 + STEPS, True),
        (0.9999, True, 7, range(7, 7 + STEPS), 7 + STEPS, True),
        (0.6, False, torch.tensor(7), [7] * STEPS, 7, False),
    ],
)
def test_a_shadow_has_a_constant_decay_or_counts_or_takes_the_callers_clock(
    decay, debias, given, clocks, last, stored
):
    """A tensor is the caller's, and left as it is."""
    net = ShadowModel(tiny_model(), decay, given, debias)
    check_shadow(net, clocks)
    assert net.num_updates == last
    assert ("num_updates" in net.state_dict()) == stored


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.drop = nn.Dropout(1.0)

    def forward(self, x, *more, shift=0.0):
        total = x + sum(more)
        return self.drop(self.scale * total + shift)


def test_train_mode_runs_the_model_and_eval_mode_the_shadow():
    net = ShadowModel(Dropped(), 0.5)
    nn.init.constant_(net.model.scale, 3.0)
    net.model.drop.p = 0.0
    one = torch.tensor(1.0)
    two = torch.tensor(2.0)
    assert net(one, two, shift=1.0) == 10.0
    assert net.shadow(one) == 1.0, "in eval mode always: nothing is dropped"
    net.eval()
    assert net(one, two, shift=1.0) == 4.0
    assert not net.model.training
    net.train()
    assert net.model.training
    for module in net.shadow.modules():
        assert not module.training


def test_everything_moves_and_casts_together_but_the_mass_stays_exact():
    net = ShadowModel(tiny_model(), 0.9, num_updates=0, zero_debias=True)
    train(net, 5)
    mass = net.debias_mass.clone()
    net.half()
    assert net.shadow.head.weight.dtype == torch.float16
    assert net.model.head.weight.dtype == torch.float16
    assert torch.equal(net.debias_mass, mass)
    net.update()
    assert net.debias_mass.dtype == torch.float32
    net.double()
    assert net.shadow.head.weight.dtype == torch.float64
    net.to("meta")
    for tensor in net.state_dict().values():
        assert tensor.is_meta


# --- both
# ---------------------------------------------------------------------------------------------


MAKE = {
    "average": partial(ExponentialMovingAverage, momentum=0.1),
    "shadow": partial(ShadowModel, decay=0.9, num_updates=0, zero_debias=True),
}


def updated(average: Any, model: nn.Module, seed: int = 1) -> Any:
    """Return a ShadowModel after five steps of its model."""
    model = getattr(average, "model", model)
    for _ in random_steps(model, 5, seed):
        if isinstance(average, ShadowModel):
            average.update()
        else:
            average.update_parameters(model)
    return average


@pytest.mark.parametrize(
    ("kind", "how", "dtype"),
    [
        ("average", "copied", torch.float32),
        ("average", "by state", torch.bfloat16),
        ("shadow", "saved", torch.bfloat16),
        ("shadow", "by state", torch.bfloat16),
    ],
)
def test_a_copy_goes_on_alone_and_exactly(kind, how, dtype):
    make = MAKE[kind]
    model = tiny_model().to(dtype)
    first = updated(make(model), model)
    before = copy.deepcopy(first.state_dict())
    if how == "copied":
        twin = copy.deepcopy(first)
    elif how == "saved":
        twin = saved_and_loaded(first)
    else:
        twin = make(tiny_model(3).to(dtype))
        twin.load_state_dict(copy.deepcopy(before), strict=True)
    updated(twin, copy.deepcopy(model), seed=2)
    assert_same_tensors(first.state_dict(), before)
    updated(first, model, seed=2)
    assert_same_tensors(twin.state_dict(), first.state_dict())
    name = "module.head.weight" if kind == "average" else "shadow.head.weight"
    assert not torch.equal(twin.state_dict()[name], before[name])


# --- arguments of the averages are checked

LINEAR = nn.Linear(1, 1)
AVERAGE = partial(ExponentialMovingAverage, LINEAR)
SHADOW = partial(ShadowModel, LINEAR, decay=0.9)
STATISTICS = partial(averages.EMAStats, dim_x=2)
DIFFERENTIABLE = partial(averages.DifferentiableEMA, 2, decay=0.9)
NUMBERS = [-0.1, 2, math.nan, True, "0.1", None]
BAD = [
    (AVERAGE, "momentum", [0.0, 1.0, math.inf, [0.1], *NUMBERS]),
    (AVERAGE, "interval", [0, -1, 1.5, True, "2"]),
    (SHADOW, "decay", [1.0, *NUMBERS]),
    (SHADOW, "num_updates", [-1, 1.5, True, "3"]),
    (STATISTICS, "momentum", [0.0, *NUMBERS]),
    (STATISTICS, "eps", [-1e-9, math.nan, math.inf, "small"]),
    (STATISTICS, "dim_x", [0, 2.0]),
    (STATISTICS, "dim_y", [0, True]),
    (DIFFERENTIABLE, "decay", [1.0, *NUMBERS]),
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
