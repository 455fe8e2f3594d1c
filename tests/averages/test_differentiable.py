"""`DifferentiableEMA`: averages and gradients against formulas in NumPy, float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import pytest
import torch
from differentiable_problem import (
    DECAY,
    MODES,
    ROWS,
    STEPS,
    WEIGHTS,
    FloatArray,
    Problem,
    coefficients,
    gradient_of,
    make,
    rounding,
)

from posthoc_cli.averages import DifferentiableEMA
from posthoc_cli.errors import InvalidValueError

RATE = 0.5


class Training(NamedTuple):
    """At each step the weight, the average, and the gradient that the optimizer then used."""

    weights: list[FloatArray]
    averages: list[FloatArray]
    gradients: list[FloatArray]


def train(ema: DifferentiableEMA, problem: Problem, rate: float = RATE) -> Training:
    """Steps of SGD on |average - target|**2 / 2."""
    weight = problem.leaf()
    optimizer = torch.optim.SGD([weight], lr=rate)
    training = Training([], [], [])
    for step in range(STEPS):
        training.weights.append(weight.detach().numpy().copy())
        with ema.recording():
            value = problem.value(step, weight)
        average = ema(value, leaves=[weight]) if ema.mode == "carried" else ema(value)
        optimizer.zero_grad()
        ((average - torch.tensor(problem.target)).square().sum() / 2).backward(retain_graph=True)
        training.averages.append(average.detach().numpy())
        training.gradients.append(gradient_of(weight))
        optimizer.step()
    return training


# --- the average -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_average(mode: str) -> None:
    problem, ema = Problem(), make(mode)
    training = train(ema, problem, rate=0.0)
    values = problem.values(training.weights)
    for t in range(1, STEPS + 1):
        expected = coefficients([DECAY] * t) @ values[:t]
        np.testing.assert_allclose(training.averages[t - 1], expected, rtol=0, atol=rounding())
    np.testing.assert_array_equal(ema.average.numpy(), training.averages[-1])
    assert ema.num_updates == STEPS


@pytest.mark.parametrize("mode", MODES)
def test_the_average_has_memory_of_its_own(mode: str) -> None:
    """Neither what the caller does with the result nor what the optimizer does with a leaf changes it."""
    weight = torch.nn.Parameter(torch.ones(ROWS, dtype=torch.float64))
    ema = make(mode)
    for _ in range(3):
        result = ema(weight, leaves=[weight]) if mode == "carried" else ema(weight)
        result.mul_(7.0)
        with torch.no_grad():
            weight.fill_(5.0)
            assert ema.average.min() < 5
            weight.fill_(1.0)
    assert torch.allclose(ema.average, torch.ones(ROWS, dtype=torch.float64), rtol=0, atol=rounding())


def test_a_value_that_is_a_parameter_is_kept_as_it_was() -> None:
    """The window recomputes its average from kept values; the optimizer changes the parameter meanwhile."""
    weight = torch.nn.Parameter(torch.zeros(ROWS, dtype=torch.float64))
    ema = make("window")
    for number in (1.0, 2.0, 3.0):
        with torch.no_grad():
            weight.fill_(number)
        result = ema(weight.view(ROWS))
    expected = coefficients([DECAY] * 3) @ [1, 2, 3]
    np.testing.assert_allclose(result.detach().numpy(), expected, rtol=0, atol=rounding())


# --- gradients -------------------------------------------------------------------------------------


def expected_gradients(problem: Problem, seen: Sequence[FloatArray], kept: int) -> list[FloatArray]:
    """At each step g^T sum_i c_i df_i/dw(w_i) over the last `kept` values, with g = average - target."""
    values, derivatives = problem.values(seen), problem.derivatives(seen)
    found = []
    for t in range(1, len(seen) + 1):
        c = coefficients([DECAY] * t)
        g = c @ values[:t] - problem.target
        first = max(0, t - kept)
        found.append(np.einsum("i,r,irw->w", c[first:], g, derivatives[first:t]))
    return found


@pytest.mark.parametrize(
    ("mode", "kept"), [("truncated", 1), ("window", 7), ("full", STEPS), ("carried", STEPS)], ids=MODES
)
def test_gradients_over_30_steps_of_backward_and_sgd(mode: str, kept: int) -> None:
    """Each kept value's derivative is taken at the weight of then, although the optimizer has changed it since."""
    problem, ema = Problem(), make(mode)
    training = train(ema, problem)
    assert np.linalg.norm(training.weights[-1] - training.weights[0]) > 0.2
    expected = expected_gradients(problem, training.weights, kept)
    np.testing.assert_allclose(training.gradients, expected, rtol=0, atol=rounding())


@pytest.mark.parametrize("mode", ["window", "full"])
def test_without_recording_torch_refuses_a_weight_that_has_changed(mode: str) -> None:
    weight = torch.nn.Parameter(torch.ones(ROWS, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=RATE)
    ema = make(mode)
    for block in (ema.recording(), nullcontext()):
        with block:
            value = weight * weight
        average = ema(value)
        average.sum().backward(retain_graph=True)
        optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        average.sum().backward(retain_graph=True)


def test_a_graph_that_is_not_retained_is_refused() -> None:
    problem, ema = Problem(), make("window")
    weight = problem.leaf()
    ema(problem.value(0, weight)).sum().backward()
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        ema(problem.value(1, weight)).sum().backward()


# --- gradients that are carried --------------------------------------------------------------------

forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
"""torch 2.13 compiles rules for forward mode when it is first used, and warns of its own compiler."""


def carried_jacobian(problem: Problem, seen: Sequence[FloatArray]) -> FloatArray:
    """What mode "carried" has after values at the weights `seen`, row by row: [rows, weights]."""
    ema, weight = make("carried"), problem.leaf()
    for step, then in enumerate(seen):
        with torch.no_grad():
            weight.copy_(torch.tensor(then))
        average = ema(problem.value(step, weight), leaves=[weight])
    rows = [torch.autograd.grad(average[row], weight, retain_graph=True)[0].numpy() for row in range(ROWS)]
    return np.array(rows)


def test_carried_is_the_full_graphs_gradient_where_the_leaf_stands_still() -> None:
    problem = Problem()
    carried, full = (train(make(mode), problem, rate=0.0) for mode in ("carried", "full"))
    np.testing.assert_allclose(carried.gradients, full.gradients, rtol=0, atol=rounding())


@forward_mode
def test_carried_is_the_forward_mode_derivative_of_one_shift_of_a_leaf_that_moves() -> None:
    problem = Problem()
    seen = train(make("carried"), problem).weights
    jacobian = carried_jacobian(problem, seen)
    c = torch.tensor(coefficients([DECAY] * STEPS))

    def average(shift: torch.Tensor) -> torch.Tensor:
        shifted = [problem.value(step, torch.tensor(then) + shift) for step, then in enumerate(seen)]
        return (c[:, None] * torch.stack(shifted)).sum(dim=0)

    zero = torch.zeros(WEIGHTS, dtype=torch.float64)
    for direction in torch.eye(WEIGHTS, dtype=torch.float64):
        _, moved = torch.func.jvp(average, (zero,), (direction,))
        np.testing.assert_allclose(jacobian @ direction.numpy(), moved.numpy(), rtol=0, atol=rounding())


@forward_mode
def test_carried_is_neither_todays_derivative_nor_that_through_the_optimizer() -> None:
    """As its description says. Both are well away from it here, and from each other."""
    problem = Problem()
    seen = train(make("carried"), problem).weights
    jacobian = carried_jacobian(problem, seen)
    todays = np.einsum("i,irw->rw", coefficients([DECAY] * STEPS), problem.derivatives([seen[-1]] * STEPS))
    through = torch.func.jacfwd(lambda start: trained_average(problem, start))(torch.tensor(problem.start)).numpy()
    for first, second in ((jacobian, todays), (jacobian, through), (todays, through)):
        assert np.linalg.norm(first - second) > 0.1 * np.linalg.norm(first)


def trained_average(problem: Problem, start: torch.Tensor) -> torch.Tensor:
    """The last average as a function of the weight that `train` began with, the steps of SGD included."""
    weight, values = start, list[torch.Tensor]()
    for step in range(STEPS):
        values.append(problem.value(step, weight))
        c = torch.tensor(coefficients([DECAY] * (step + 1)))
        average = (c[:, None] * torch.stack(values)).sum(dim=0)
        # d value / d w at the weight of each step, as "carried" has it.
        slopes = [(1 - value**2)[:, None] * torch.as_tensor(problem.data[i]) for i, value in enumerate(values)]
        jacobian = (c[:, None, None] * torch.stack(slopes)).sum(dim=0)
        weight = weight - RATE * (average - torch.as_tensor(problem.target)) @ jacobian
    return average


def test_a_fixed_cotangent_carries_the_same_gradient_along_its_direction() -> None:
    problem = Problem()
    direction = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    gradients = []
    for cotangent in (None, direction):
        ema, weight = make("carried", cotangent=cotangent), problem.leaf()
        for step in range(STEPS):
            average = ema(problem.value(step, weight), leaves=[weight])
            with torch.no_grad():
                weight += 0.1
        (-3 * average @ direction).backward()
        gradients.append(gradient_of(weight))
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=0, atol=10 * rounding())


def test_a_gradient_across_the_cotangent_is_refused() -> None:
    problem = Problem()
    weight = problem.leaf()
    ema = make("carried", cotangent=torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    average = ema(problem.value(0, weight), leaves=[weight])
    with pytest.raises(InvalidValueError, match="does not point along the cotangent"):
        average.sum().backward(retain_graph=True)
    (0 * average.sum()).backward(retain_graph=True)
    average[0].backward()
    np.testing.assert_allclose(gradient_of(weight), problem.derivatives([problem.start])[0, 0], atol=rounding(1))


def test_carried_reaches_every_leaf_that_it_was_given_and_no_other() -> None:
    one, two, other = (torch.nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64)) for _ in range(3))
    ema = DifferentiableEMA((), 0.5, "carried", dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"^the value does not depend on leaves\[1\] of the shape \[2\]: ") as told:
        ema((one * other).sum(), leaves=[one, two])
    assert [warning.filename for warning in told] == [__file__]
    average = ema((one * two * other).sum(), leaves=[one, two])
    average.backward()
    assert torch.equal(one.grad, torch.full((2,), 0.5 * 2 + 0.5 * 4, dtype=torch.float64))
    assert torch.equal(two.grad, torch.full((2,), 0.5 * 4, dtype=torch.float64))
    assert other.grad is None


def test_many_leaves_out_of_reach_are_named_once_and_a_part_that_is_skipped_later_is_not() -> None:
    used, *others = (torch.nn.Parameter(torch.ones(n)) for n in range(1, 9))
    ema = DifferentiableEMA((), 0.5, "carried", cotangent=torch.tensor(1.0))
    with pytest.warns(RuntimeWarning, match=r"leaves\[5\] of the shape \[6\] and 2 more: no gradient"):
        ema(used.sum(), leaves=[used, *others])
    ema(others[0].sum(), leaves=[used, *others])


def test_an_earlier_result_keeps_its_own_gradient() -> None:
    problem = Problem()
    weight, ema = problem.leaf(), make("carried")
    first = ema(problem.value(0, weight), leaves=[weight])
    ema(problem.value(1, weight), leaves=[weight])
    first.sum().backward()
    expected = problem.derivatives([problem.start])[0].sum(axis=0)
    np.testing.assert_allclose(gradient_of(weight), expected, rtol=0, atol=rounding(1))


def test_half_precision_leaves_get_their_gradient_in_their_own_dtype() -> None:
    """And J is kept in float32: at a decay of 0.999 a bfloat16 one would stay at its first value."""
    weight = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    ema = DifferentiableEMA((), 0.999, "carried")
    ema((0 * weight).sum().float(), leaves=[weight])
    for _ in range(1000):
        average = ema(weight.sum().float(), leaves=[weight])
    average.backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.float().numpy() == pytest.approx(1 - 0.999**1000, rel=2**-8)


# --- a learned decay -------------------------------------------------------------------------------


def test_a_learned_decay_gets_the_newest_updates_gradient_when_truncated() -> None:
    """a_t = d a_{t-1} + (1 - d) x_t: with a_{t-1} constant, da_t/dd = a_{t-1} - x_t."""
    random = np.random.default_rng(1)
    values = random.normal(size=(STEPS, ROWS))
    decay = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    optimizer = torch.optim.SGD([decay], lr=0.002)
    ema, average = make("truncated", decay), np.zeros(ROWS)
    decays = []
    for step, value in enumerate(values):
        d = float(decay.detach())
        decays.append(d)
        optimizer.zero_grad()
        result = ema(torch.tensor(value))
        if step:
            result.sum().backward()
            assert decay.grad is not None
            assert float(decay.grad) == pytest.approx((average - value).sum(), abs=rounding())
        average = value if step == 0 else d * average + (1 - d) * value
        np.testing.assert_allclose(result.detach().numpy(), average, rtol=0, atol=rounding())
        optimizer.step()
    assert np.ptp(decays) > 0.002


@pytest.mark.parametrize("window", [1, 5, STEPS])
def test_a_learned_decay_gets_the_windows_gradient(window: int) -> None:
    """Over kept updates D_t = a_{t-1} - x_t + d_t D_{t-1}: each with the decay of then, which SGD changes in place."""
    values = np.random.default_rng(2).normal(size=(STEPS, ROWS))
    decay = torch.nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
    optimizer = torch.optim.SGD([decay], lr=0.002)
    ema = make("window", decay, window=window)
    decays, averages = list[float](), list[FloatArray]()
    for step, value in enumerate(values):
        d = float(decay.detach())
        decays.append(d)
        averages.append(value if step == 0 else d * averages[-1] + (1 - d) * value)
        optimizer.zero_grad()
        result = ema(torch.tensor(value))
        if step:
            result.sum().backward(retain_graph=True)
            derivative = np.zeros(ROWS)
            for then in range(max(1, step - window + 1), step + 1):
                derivative = averages[then - 1] - values[then] + decays[then] * derivative
            assert decay.grad is not None
            assert float(decay.grad) == pytest.approx(derivative.sum(), abs=rounding())
        np.testing.assert_allclose(result.detach().numpy(), averages[-1], rtol=0, atol=rounding())
        optimizer.step()
    assert np.ptp(decays) > 0.002


def test_a_decay_may_be_made_anew_for_every_update() -> None:
    logit = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    ema = make("window", 0.5)
    for value in ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0], [0.0, 0.0, 0.0]):
        ema.decay = torch.sigmoid(logit)
        result = ema(torch.tensor(value, dtype=torch.float64))
    result.sum().backward(retain_graph=True)
    d = 1 / (1 + np.exp(-1.0))
    # a_3 = d (d x_1 + (1 - d) x_2); its derivative times that of the sigmoid.
    assert logit.grad is not None
    assert float(logit.grad) == pytest.approx((2 * d * 6 + (1 - 2 * d) * 9) * d * (1 - d), abs=rounding())
    twin = copy.deepcopy(ema)
    assert isinstance(twin.decay, torch.Tensor)
    assert not twin.decay.requires_grad
