"""Averages of a model's weights: the formulas, what is copied, states, precision, subclasses and
wrappers."""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused, saved_and_loaded
from factories import FloatArray, tiny_model

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


def random_steps(model: torch.nn.Module, steps: int, seed: int = 1) -> Iterator[int]:
    """Move every floating-point tensor and count every integer up, as a training would; yield each
    step."""
    generator = torch.Generator()
    generator.manual_seed(seed)
    for step in range(steps):
        tensors = {id(tensor): tensor for tensor in model.state_dict().values()}
        with torch.no_grad():
            for tensor in tensors.values():
                change = torch.ones(())
                if tensor.is_floating_point():
                    change = torch.randn(tensor.shape, generator=generator)
                tensor.add_(change.to(tensor.dtype))
        yield step


# --- ExponentialMovingAverage
# ------------------------------------------------------------------------


def average(values: Sequence[FloatArray], momenta: Sequence[float]) -> FloatArray:
    """Return the average by definition, in float64; `momenta[0]` belongs to the first value and is
    not used."""
    result = values[0]
    for value, momentum in zip(values[1:], momenta[1:], strict=True):
        result = (1 - momentum) * result + momentum * value
    return result


@pytest.mark.parametrize(
    ("warmup", "interval", "update_buffers"), [(False, 1, False), (True, 3, True)]
)
def test_the_average_is_the_formula(warmup: bool, interval: int, update_buffers: bool) -> None:
    model = tiny_model()
    ema = ExponentialMovingAverage(
        model, 0.2, interval, update_buffers=update_buffers, warmup=warmup
    )
    weights = []
    variances = []
    momenta = []
    for step in random_steps(model, 40):  # the warm-up has ended by then
        ema.update_parameters(model)
        if step % interval == 0:
            weights.append(numbers(model.head.weight))
            variances.append(numbers(model.norm.running_var))
            momentum = 0.2
            if warmup:
                momentum = 1 - min(1 - 0.2, (1 + step) / (10 + step))
            momenta.append(momentum)
    expected = average(weights, momenta)
    within = rounding(40, largest(*weights))
    error = numbers(ema.module.head.weight) - expected
    assert largest(error) < within < 0.01 * largest(expected)
    assert ema.module.head.weight is ema.module.embed.weight
    expected = numbers(model.norm.running_var)
    if update_buffers:
        expected = average(variances, momenta)
    error = numbers(ema.module.norm.running_var) - expected
    assert largest(error) < rounding(40, largest(*variances))
    assert ema.module.norm.num_batches_tracked == model.norm.num_batches_tracked == 40
    assert ema.steps == 40


def test_half_precision_averages_move() -> None:
    """Rounded after every update, 2e-4 of the distance 1 is lost in values near 1: the average
    would stay at 1."""
    model = torch.nn.Linear(1, 1, dtype=torch.bfloat16)
    torch.nn.init.ones_(model.weight)
    ema = ExponentialMovingAverage(model, momentum=2e-4)
    ema.update_parameters(model)
    torch.nn.init.constant_(model.weight, 2.0)
    for _ in range(2000):
        ema.update_parameters(model)
    expected = 2 - (1 - 2e-4) ** 2000
    assert ema.module.weight.dtype == torch.float32
    assert abs(ema.module.weight.item() - expected) < rounding(2000, 2.0)


def test_a_state_of_mmengine_loads_and_goes_on() -> None:
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
    both = torch.nn.ModuleDict({"generator": model, "ema": ema})
    given = {f"generator.{name}": value for name, value in model.state_dict().items()}
    given.update((f"ema.{name}", value) for name, value in saved.items())
    both.load_state_dict(given, strict=True)
    assert set(ema.state_dict()) == set(saved)
    assert ema.steps == 40
    ema.update_parameters(model)
    expected = 0.75 * saved["module.head.bias"] + 0.25 * model.head.bias
    torch.testing.assert_close(ema.module.head.bias, expected.detach(), rtol=0, atol=1e-6)


def test_another_model_is_an_error_that_lists_names_and_changes_nothing() -> None:
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


@pytest.mark.parametrize("num_updates", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize(("decay", "debias"), [(0.6, False), (0.9999, True)])
def test_the_shadow_is_tensorflows_formula(
    decay: float,
    debias: bool,
    num_updates: int | torch.Tensor | None,
) -> None:
    """A tensor is the caller's clock, which stays as it is here. Zero debiasing divides by the sum
    of the weights."""
    net = ShadowModel(tiny_model(), decay, num_updates, debias)
    counts = isinstance(num_updates, int)
    steps = 20
    shadow = numbers(net.shadow.head.weight)
    if debias:
        shadow = np.zeros_like(shadow)
    mass = 0.0
    values = train(net, steps)
    clock = 1e9 if num_updates is None else int(num_updates)
    for value in values:
        current = min(decay, (1 + clock) / (10 + clock))
        shadow = current * shadow + (1 - current) * value
        mass = current * mass + (1 - current)
        clock += counts
    within = rounding(steps, largest(*values))
    if debias:
        # The mass is float32: its error, at most half a bit an update, is one of the share too.
        assert net.debias_mass.item() == pytest.approx(mass, rel=steps * 2.0**-24)
        shadow = shadow / mass
        within = 2 * within
    error = numbers(net.shadow.head.weight) - shadow
    assert largest(error) < within < 0.01 * largest(shadow)
    if num_updates is None:
        assert net.num_updates is None
    else:
        assert int(net.num_updates) == clock
    assert ("num_updates" in net.state_dict()) == counts


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
    one = torch.tensor(1.0)
    two = torch.tensor(2.0)
    assert net(one, two, shift=1.0).item() == 10.0
    assert net.shadow(one).item() == 1.0, "in eval mode always: nothing is dropped"
    assert net.eval()(one, two, shift=1.0).item() == 4.0
    assert not net.model.training
    net.train()
    assert net.model.training
    assert not any(module.training for module in net.shadow.modules())


def test_everything_moves_and_casts_together_but_the_mass_stays_exact() -> None:
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
    assert all(tensor.is_meta for tensor in net.state_dict().values())


# --- both
# ---------------------------------------------------------------------------------------------


MAKE: dict[str, Callable[[torch.nn.Module], Any]] = {
    "average": lambda model: ExponentialMovingAverage(model, momentum=0.1),
    "shadow": lambda model: ShadowModel(model, 0.9, num_updates=0, zero_debias=True),
}


def updated(average: Any, model: torch.nn.Module, seed: int = 1) -> Any:
    """Return a ShadowModel after five steps of its model."""
    model = getattr(average, "model", model)
    for _ in random_steps(model, 5, seed):
        if isinstance(average, ShadowModel):
            average.update()
        else:
            average.update_parameters(model)
    return average


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["copied", "saved", "by state"])
@pytest.mark.parametrize("kind", MAKE)
def test_a_copy_goes_on_alone_and_exactly(kind: str, how: str, dtype: torch.dtype) -> None:
    model = tiny_model().to(dtype)
    first = updated(MAKE[kind](model), model)
    before = copy.deepcopy(first.state_dict())
    if how == "copied":
        twin = copy.deepcopy(first)
    elif how == "saved":
        twin = saved_and_loaded(first)
    else:
        twin = MAKE[kind](tiny_model(3).to(dtype))
        twin.load_state_dict(copy.deepcopy(before), strict=True)
    updated(twin, copy.deepcopy(model), seed=2)
    assert_same_tensors(first.state_dict(), before)
    updated(first, model, seed=2)
    assert_same_tensors(twin.state_dict(), first.state_dict())
    name = "module.head.weight" if kind == "average" else "shadow.head.weight"
    assert not torch.equal(twin.state_dict()[name], before[name])


# --- arguments of the averages are checked

AVERAGE = partial(averages.ExponentialMovingAverage, torch.nn.Linear(1, 1))
SHADOW = partial(averages.ShadowModel, torch.nn.Linear(1, 1), decay=0.9)
STATISTICS = partial(averages.EMAStats, dim_x=2)
DIFFERENTIABLE = partial(averages.DifferentiableEMA, 2, decay=0.9)
NUMBERS: list[object] = [-0.1, 2, float("nan"), True, "0.1", None]
BAD = [
    (AVERAGE, "momentum", [0.0, 1.0, float("inf"), [0.1], *NUMBERS]),
    (AVERAGE, "interval", [0, -1, 1.5, True, "2"]),
    (SHADOW, "decay", [1.0, *NUMBERS]),
    (SHADOW, "num_updates", [-1, 1.5, True, "3"]),
    (STATISTICS, "momentum", [0.0, *NUMBERS]),
    (STATISTICS, "eps", [-1e-9, float("nan"), float("inf"), "small"]),
    (STATISTICS, "dim_x", [0, 2.0]),
    (STATISTICS, "dim_y", [0, True]),
    (DIFFERENTIABLE, "decay", [1.0, *NUMBERS]),
    (DIFFERENTIABLE, "mode", ["half"]),
    (partial(DIFFERENTIABLE, mode="full"), "window", [3]),
    (partial(DIFFERENTIABLE, mode="window"), "window", [None, 0]),
    (DIFFERENTIABLE, "dtype", [torch.float16]),
]


@pytest.mark.parametrize(("make", "name", "values"), BAD)
def test_a_bad_argument_is_named(
    make: Callable[..., object],
    name: str,
    values: list[object],
) -> None:
    for value in values:
        with refused(name):
            make(**{name: value})
