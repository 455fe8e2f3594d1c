"""`DifferentiableEMA`: averages and gradients against formulas in NumPy, states and bad input."""

import copy
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checking import refused, saved_and_loaded
from factories import FloatArray
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from posthoc_cli.averages import DifferentiableEMA

DECAY = 0.9
STEPS = 30
ROWS = 3
WEIGHTS = 5
EPS = np.finfo(np.float64).eps

MODES = {
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
        matrix = torch.as_tensor(self.data[step])
        return torch.tanh(matrix @ weight**2)

    def values(self, weights: Sequence[FloatArray]) -> FloatArray:
        used = self.data[: len(weights)]
        products = np.einsum("irw,iw->ir", used, np.square(weights))
        return np.tanh(products)

    def derivatives(self, weights: Sequence[FloatArray]) -> FloatArray:
        """Return df_i/dw at the weights of step i: [steps, rows, weights]."""
        used = self.data[: len(weights)]
        slopes = 2 * (1 - self.values(weights) ** 2)
        return np.einsum("ir,irw,iw->irw", slopes, used, np.array(weights))

    def leaf(self) -> nn.Parameter:
        return nn.Parameter(torch.tensor(self.start))


def coefficients(decays: Sequence[float]) -> FloatArray:
    """Return the coefficient of each value: (1 - decay_i) times all later decays; the first has no
    1 - decay."""
    backwards = [1.0, *decays[:0:-1]]
    later = np.cumprod(backwards)[::-1]
    own = 1 - np.array(decays)
    own[0] = 1.0
    return later * own


def rounding(steps=STEPS):
    """Bound the rounding of a sum of `steps` products of numbers near 1, with 8 roundings a
    step."""
    return 8 * steps * ROWS * WEIGHTS * EPS


def assert_near(found: npt.ArrayLike, expected: npt.ArrayLike) -> None:
    assert_allclose(found, expected, rtol=0, atol=rounding())


def make(mode: str) -> DifferentiableEMA:
    return DifferentiableEMA(ROWS, DECAY, mode, **MODES[mode], dtype=torch.float64)


def take(ema: DifferentiableEMA, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Call the module; pass the leaf in the mode that needs it."""
    if ema.mode == "carried":
        return ema(value, leaves=[weight])
    return ema(value)


def gradient_of(weight: nn.Parameter) -> FloatArray:
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
        distance = average - torch.tensor(problem.target)
        loss = distance.square().sum() / 2
        loss.backward(retain_graph=True)
        averages.append(average.detach().numpy())
        gradients.append(gradient_of(weight))
        optimizer.step()
    return weights, averages, gradients


@pytest.mark.parametrize("mode", MODES)
def test_the_average_has_memory_of_its_own(mode):
    """Neither a change of the result by the caller nor of a leaf by the optimizer changes it: the
    window recomputes its average from kept values."""
    weight = nn.Parameter(torch.zeros(ROWS, dtype=torch.float64))
    ema = make(mode)
    for number in (1.0, 2.0, 3.0):
        nn.init.constant_(weight, number)
        result = take(ema, weight.view(ROWS), weight)
        found = result.detach().numpy().copy()
        result.detach().mul_(7.0)
        nn.init.constant_(weight, 50.0)
    expected = coefficients([DECAY] * 3) @ [1, 2, 3]
    assert_near(found, expected)
    assert_near(ema.average, expected)


def expected_gradients(
    problem: Problem,
    seen: Sequence[FloatArray],
    kept: int,
) -> list[FloatArray]:
    """Return g^T sum_i c_i df_i/dw(w_i) at each step over the last `kept` values, with g = average
    - target."""
    values = problem.values(seen)
    derivatives = problem.derivatives(seen)
    found = []
    for t in range(1, len(seen) + 1):
        c = coefficients([DECAY] * t)
        g = c @ values[:t] - problem.target
        first = max(0, t - kept)
        used = slice(first, t)
        gradient = np.einsum("i,r,irw->w", c[used], g, derivatives[used])
        found.append(gradient)
    return found


@pytest.mark.parametrize(
    ("mode", "kept"),
    [
        ("truncated", 1),
        ("window", 7),
        ("full", STEPS),
        ("carried", STEPS),
    ],
    ids=MODES,
)
def test_averages_and_gradients_over_30_steps_of_backward_and_sgd(mode, kept):
    """Each kept value's derivative is taken at the weight of its step, although the optimizer has
    changed it since."""
    problem = Problem()
    ema = make(mode)
    weights, averages, gradients = train(ema, problem)
    moved = weights[-1] - weights[0]
    assert np.linalg.norm(moved) > 0.2
    derivatives = expected_gradients(problem, weights, kept)
    assert_near(gradients, derivatives)
    values = problem.values(weights)
    expected = []
    for t in range(1, STEPS + 1):
        c = coefficients([DECAY] * t)
        expected.append(c @ values[:t])
    assert_near(averages, expected)
    assert_array_equal(ema.average.numpy(), averages[-1])
    assert ema.num_updates == STEPS


def test_carried_reaches_every_leaf_that_it_was_given_and_no_other():
    twos = torch.tensor([2.0, 2.0], dtype=torch.float64)
    one, two, other = (twos.clone().requires_grad_() for _ in range(3))
    ema = DifferentiableEMA((), 0.5, "carried", dtype=torch.float64)
    expected = r"depend on leaves\[1\] of the shape \[2\]: "
    with pytest.warns(RuntimeWarning, match=expected) as warned:
        ema((one * other).sum(), leaves=[one, two])
    assert [warning.filename for warning in warned] == [__file__]
    average = ema((one * two * other).sum(), leaves=[one, two])
    average.backward()
    earlier = 0.5 * 2
    later = 0.5 * 4
    assert one.grad.tolist() == [earlier + later] * 2
    assert two.grad.tolist() == [later] * 2
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
def test_a_copy_goes_on_alone_with_the_average_as_a_constant(mode, copied):
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
    assert first.num_updates == 5
    assert second.num_updates == 6
    starts = [problem.start] * 6
    *_, value = problem.values(starts)
    expected = DECAY * before.numpy() + (1 - DECAY) * value
    assert_near(average.detach(), expected)
    average.sum().backward()
    *_, derivative = problem.derivatives(starts)
    expected = (1 - DECAY) * derivative.sum(axis=0)
    assert_near(gradient_of(other), expected)
    assert weight.grad is None


def test_bad_values_and_leaves_are_named_and_not_taken_in():
    ema = DifferentiableEMA(2, 0.9).half()
    for changed in ({"dtype": torch.float64}, {"device": "meta"}):
        with refused("value", "must be torch.float32 of shape [2] on cpu as the average is"):
            ema(torch.ones(2, **changed))
    with refused("value", "is torch.float32 of shape [3] on cpu"):
        ema(torch.ones(3))
    assert ema.num_updates == 0
    weight = nn.Parameter(torch.ones(2))
    other = nn.Parameter(torch.ones(2))
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
