"""`DifferentiableEMA`: averages and gradients against formulas in NumPy, states and bad input."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from checking import refused, saved_and_loaded
from factories import FloatArray

from posthoc_cli.averages import DifferentiableEMA

DECAY = 0.9
STEPS = 30
ROWS = 3
WEIGHTS = 5
EPS = np.finfo(np.float64).eps

MODES: dict[str, dict[str, Any]] = {
    "truncated": {},
    "window": {"window": 7},
    "carried": {},
    "full": {},
}


class Problem:
    """Values x_i = tanh(A_i w_i**2), whose derivative is 2 (1 - x_i**2) A_i w_i; and a target for
    their average."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.data = random.normal(size=(STEPS, ROWS, WEIGHTS))
        self.start = random.normal(size=WEIGHTS)
        self.target = random.normal(size=ROWS)

    def value(self, step: int, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.as_tensor(self.data[step]) @ weight**2)

    def values(self, weights: Sequence[FloatArray]) -> FloatArray:
        return np.tanh([data @ weight**2 for data, weight in zip(self.data, weights, strict=False)])

    def derivatives(self, weights: Sequence[FloatArray]) -> FloatArray:
        """Return df_i/dw at the weights of step i: [steps, rows, weights]."""
        slopes = 2 * (1 - self.values(weights)[:, :, None] ** 2)
        return slopes * self.data[: len(weights)] * np.array(weights)[:, None, :]

    def leaf(self) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.tensor(self.start))


def coefficients(decays: Sequence[float]) -> FloatArray:
    """Return the coefficient of each value: (1 - decay_i) times all later decays; the first has no
    1 - decay."""
    later = np.cumprod([1.0, *decays[:0:-1]])[::-1]
    return later * np.array([1.0, *(1 - decay for decay in decays[1:])])


def rounding(steps: int = STEPS) -> float:
    """Bound the rounding of a sum of `steps` products of numbers near 1, with 8 roundings a
    step."""
    return 8 * steps * ROWS * WEIGHTS * EPS


def make(mode: str) -> DifferentiableEMA:
    return DifferentiableEMA(ROWS, DECAY, mode, **MODES[mode], dtype=torch.float64)


def take(ema: DifferentiableEMA, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Call the module; pass the leaf in the mode that needs it."""
    return ema(value, leaves=[weight]) if ema.mode == "carried" else ema(value)


def gradient_of(weight: torch.nn.Parameter) -> FloatArray:
    assert weight.grad is not None
    return weight.grad.numpy().copy()


def train(
    ema: DifferentiableEMA,
    problem: Problem,
) -> tuple[list[FloatArray], list[FloatArray], list[FloatArray]]:
    """Take steps of SGD on |average - target|**2 / 2; return the weights, averages and gradients of
    each step."""
    weight = problem.leaf()
    weights = []
    averages = []
    gradients = []
    optimizer = torch.optim.SGD([weight], lr=0.5)
    for step in range(STEPS):
        weights.append(weight.detach().numpy().copy())
        with ema.recording():
            value = problem.value(step, weight)
        average = take(ema, value, weight)
        optimizer.zero_grad()
        ((average - torch.tensor(problem.target)).square().sum() / 2).backward(retain_graph=True)
        averages.append(average.detach().numpy())
        gradients.append(gradient_of(weight))
        optimizer.step()
    return weights, averages, gradients


@pytest.mark.parametrize("mode", MODES)
def test_the_average_has_memory_of_its_own(mode: str) -> None:
    """Neither a change of the result by the caller nor of a leaf by the optimizer changes it: the
    window recomputes its average from kept values."""
    weight = torch.nn.Parameter(torch.zeros(ROWS, dtype=torch.float64))
    ema = make(mode)
    for number in (1.0, 2.0, 3.0):
        torch.nn.init.constant_(weight, number)
        result = take(ema, weight.view(ROWS), weight)
        found = result.detach().numpy().copy()
        result.detach().mul_(7.0)
        torch.nn.init.constant_(weight, 50.0)
    expected = coefficients([DECAY] * 3) @ [1, 2, 3]
    for average in (found, ema.average.numpy()):
        np.testing.assert_allclose(average, expected, rtol=0, atol=rounding())


def expected_gradients(problem: Problem, seen: Sequence[FloatArray], kept: int) -> list[FloatArray]:
    """Return g^T sum_i c_i df_i/dw(w_i) at each step over the last `kept` values, with g = average
    - target."""
    values = problem.values(seen)
    derivatives = problem.derivatives(seen)
    found = []
    for t in range(1, len(seen) + 1):
        c = coefficients([DECAY] * t)
        g = c @ values[:t] - problem.target
        first = max(0, t - kept)
        found.append(np.einsum("i,r,irw->w", c[first:], g, derivatives[first:t]))
    return found


@pytest.mark.parametrize(
    ("mode", "kept"),
    [("truncated", 1), ("window", 7), ("full", STEPS), ("carried", STEPS)],
    ids=MODES,
)
def test_averages_and_gradients_over_30_steps_of_backward_and_sgd(mode: str, kept: int) -> None:
    """Each kept value's derivative is taken at the weight of its step, although the optimizer has
    changed it since."""
    problem = Problem()
    ema = make(mode)
    weights, averages, gradients = train(ema, problem)
    assert np.linalg.norm(weights[-1] - weights[0]) > 0.2
    np.testing.assert_allclose(
        gradients, expected_gradients(problem, weights, kept), rtol=0, atol=rounding()
    )
    expected = [
        coefficients([DECAY] * t) @ problem.values(weights[:t]) for t in range(1, STEPS + 1)
    ]
    np.testing.assert_allclose(averages, expected, rtol=0, atol=rounding())
    np.testing.assert_array_equal(ema.average.numpy(), averages[-1])
    assert ema.num_updates == STEPS


def test_carried_reaches_every_leaf_that_it_was_given_and_no_other() -> None:
    one, two, other = (
        torch.nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64)) for _ in range(3)
    )
    ema = DifferentiableEMA((), 0.5, "carried", dtype=torch.float64)
    with pytest.warns(
        RuntimeWarning, match=r"depend on leaves\[1\] of the shape \[2\]: "
    ) as warned:
        ema((one * other).sum(), leaves=[one, two])
    assert [warning.filename for warning in warned] == [__file__]
    average = ema((one * two * other).sum(), leaves=[one, two])
    average.backward()
    assert torch.equal(one.grad, torch.full((2,), 0.5 * 2 + 0.5 * 4, dtype=torch.float64))
    assert torch.equal(two.grad, torch.full((2,), 0.5 * 4, dtype=torch.float64))
    assert other.grad is None


def by_state(first: DifferentiableEMA) -> DifferentiableEMA:
    state = copy.deepcopy(first.state_dict())
    second = make(first.mode)
    assert state.keys() == {"average", "num_updates"}
    assert not state["average"].requires_grad
    second.load_state_dict(state)
    return second


@pytest.mark.parametrize("copied", [by_state, copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_goes_on_alone_with_the_average_as_a_constant(
    mode: str,
    copied: Callable[[Any], Any],
) -> None:
    problem = Problem()
    first = make(mode)
    weight = problem.leaf()
    other = problem.leaf()
    for step in range(5):
        take(first, problem.value(step, weight), weight)
    second = copied(first)
    before = first.average.clone()
    average = take(second, problem.value(5, other), other)
    assert torch.equal(first.average, before)
    assert (first.num_updates, second.num_updates) == (5, 6)
    expected = DECAY * before.numpy() + (1 - DECAY) * problem.values([problem.start] * 6)[5]
    np.testing.assert_allclose(average.detach().numpy(), expected, rtol=0, atol=rounding())
    average.sum().backward()
    derivative = (1 - DECAY) * problem.derivatives([problem.start] * 6)[5].sum(axis=0)
    np.testing.assert_allclose(gradient_of(other), derivative, rtol=0, atol=rounding())
    assert weight.grad is None


def test_bad_values_and_leaves_are_named_and_not_taken_in() -> None:
    ema = DifferentiableEMA(2, 0.9).half()
    for changed in ({"dtype": torch.float64}, {"device": "meta"}):
        with refused("value", "must be torch.float32 of shape [2] on cpu as the average is"):
            ema(torch.ones(2, **changed))
    with refused("value", "is torch.float32 of shape [3] on cpu"):
        ema(torch.ones(3))
    assert ema.num_updates == 0
    weight, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    ema = DifferentiableEMA(2, 0.9, "carried")
    for leaves in (
        None,
        weight,
        [],
        [weight, weight],
        [weight, weight * 1],
        [torch.ones(2)],
        ["w"],
    ):
        with refused("leaves", "different leaves that require gradients"):
            ema(weight * 2, leaves=leaves)
    with refused("value", "no graph"):
        ema(torch.ones(2), leaves=[weight])
    ema(weight * 2, leaves=[weight])
    with refused("leaves", "the same ones"):
        ema(weight * 2, leaves=[other])
    with refused("leaves", "only mode 'carried'"):
        DifferentiableEMA(2, 0.9)(weight * 2, leaves=[weight])
