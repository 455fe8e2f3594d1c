"""`DifferentiableEMA`: what it keeps alive, its state, and bad input."""

from __future__ import annotations

import copy
import doctest
import io
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from differentiable_problem import DECAY, MODES, ROWS, STEPS, Problem, gradient_of, make, rounding
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from posthoc_cli.averages import DifferentiableEMA
from posthoc_cli.averages import differentiable as ema_module
from posthoc_cli.errors import InvalidValueError, NotReadyError

# --- what is kept ----------------------------------------------------------------------------------


class _Saved:
    """What a graph holds instead of a tensor, so that a test can count what is alive."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()


def graphs_alive(ema: DifferentiableEMA, steps: int) -> list[int]:
    """After each update, how many values' graphs are alive that nobody but the module holds."""
    problem, alive, found = Problem(), weakref.WeakSet[_Saved](), []
    weight = problem.leaf()
    for step in range(steps):
        with saved_tensors_hooks(lambda tensor: alive.add(kept := _Saved(tensor)) or kept, lambda kept: kept.tensor):
            value = problem.value(step % STEPS, weight)
        if step == 0:
            each = len(alive)
        result = ema(value, leaves=[weight]) if ema.mode == "carried" else ema(value)
        result.sum().backward(retain_graph=True)
        del value, result
        found.append(len(alive) // each)
    return found


def test_only_the_graphs_that_the_mode_keeps_stay_alive() -> None:
    assert graphs_alive(make("truncated"), 100) == [0] * 100
    assert graphs_alive(make("carried"), 100) == [0] * 100
    assert graphs_alive(make("window"), 100) == [min(t, 7) for t in range(1, 101)]
    assert graphs_alive(make("full"), 99) == list(range(1, 100))


def test_recording_copies_each_saved_tensor_once() -> None:
    """A weight that is used ten times, and an activation that two operations save."""
    weight = torch.nn.Parameter(torch.eye(4))
    copies = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
        ) -> Any:
            nonlocal copies
            copies += function is torch.ops.aten.clone.default
            return function(*arguments, **(keywords or {}))

    with Counting(), make("window").recording():
        hidden = torch.ones(4)
        for _ in range(10):
            hidden = torch.relu(weight @ hidden)
    assert copies == 1 + 10 + 1  # the weight, each hidden state, the first vector


def test_recording_holds_no_original_after_the_block() -> None:
    ema, weight = make("window"), torch.nn.Parameter(torch.ones(ROWS, dtype=torch.float64))
    with ema.recording():
        hidden = weight * 2
        value = hidden * hidden
    memory = StorageWeakRef(hidden.untyped_storage())
    del hidden
    assert memory.expired()
    value.sum().backward()
    assert torch.equal(weight.grad, torch.full((ROWS,), 8.0, dtype=torch.float64))


def test_recording_tells_apart_what_a_weight_was_worth_before_and_after_a_change() -> None:
    weight = torch.nn.Parameter(torch.tensor(3.0))
    with make("window").recording():
        first = weight * weight
        with torch.no_grad():
            weight.fill_(5.0)
        second = weight * weight
    for value, expected in ((first, 6.0), (second, 10.0)):
        assert torch.autograd.grad(value, weight)[0] == expected


def test_recording_copies_sparse_tensors_too() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    sparse = torch.sparse_coo_tensor([[0, 1], [2, 0]], [2.0, 3.0], (2, 3), check_invariants=True)
    with make("window").recording():
        value = torch.sparse.mm(sparse, weight)
    with torch.no_grad():
        sparse *= 0
    value.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([[3.0, 3.0], [0.0, 0.0], [2.0, 2.0]]))


@pytest.mark.parametrize("mode", ["truncated", "carried"])
def test_modes_without_graphs_record_nothing(mode: str) -> None:
    weight = torch.nn.Parameter(torch.ones(ROWS, dtype=torch.float64))
    with make(mode).recording():
        value = weight * weight
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_full_warns_from_the_100th_value_on() -> None:
    ema = make("full")
    value = torch.ones(ROWS, dtype=torch.float64)
    for _ in range(99):
        ema(value)
    for count in (100, 101):
        with pytest.warns(RuntimeWarning, match=f"'full' holds the graphs of {count} values") as caught:
            ema(value)
        assert caught[0].filename == __file__
    ema.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema(value)


def test_eval_mode_takes_nothing_in() -> None:
    ema = make("truncated")
    ema.eval()
    with pytest.raises(NotReadyError, match="no value was taken in yet"):
        ema(torch.ones(ROWS, dtype=torch.float64))
    ema.train()
    ema(torch.ones(ROWS, dtype=torch.float64, requires_grad=True))
    ema.eval()
    result = ema(torch.zeros(ROWS, dtype=torch.float64, requires_grad=True))
    assert not result.requires_grad
    assert torch.equal(result, torch.ones(ROWS, dtype=torch.float64))
    assert ema.num_updates == 1


# --- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_state_goes_on_with_the_average_as_a_constant(mode: str) -> None:
    problem, first = Problem(), make(mode)
    weight = problem.leaf()
    for step in range(5):
        first(problem.value(step, weight), **({"leaves": [weight]} if mode == "carried" else {}))
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert state.keys() == {"average", "num_updates"}
    assert not state["average"].requires_grad
    for second in (make(mode), copy.deepcopy(first), _through_a_file(first)):
        second.load_state_dict(state)
        assert second.num_updates == 5
        other = problem.leaf()
        average = second(problem.value(5, other), **({"leaves": [other]} if mode == "carried" else {}))
        expected = DECAY * state["average"].numpy() + (1 - DECAY) * problem.values([problem.start] * 6)[5]
        np.testing.assert_allclose(average.detach().numpy(), expected, rtol=0, atol=rounding())
        average.sum().backward()
        derivative = (1 - DECAY) * problem.derivatives([problem.start] * 6)[5].sum(axis=0)
        np.testing.assert_allclose(gradient_of(other), derivative, rtol=0, atol=rounding())


def _through_a_file(ema: DifferentiableEMA) -> DifferentiableEMA:
    file = io.BytesIO()
    torch.save(ema, file)
    file.seek(0)
    loaded: DifferentiableEMA = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize("mode", MODES)
def test_a_copy_is_detached_and_goes_its_own_way(mode: str) -> None:
    problem, ema = Problem(), make(mode)
    weight = problem.leaf()
    options = {"leaves": [weight]} if mode == "carried" else {}
    ema(problem.value(0, weight), **options)
    twin = copy.deepcopy(ema)
    before = ema.average.clone()
    twin(problem.value(1, weight), **options).sum().backward()
    expected = (1 - DECAY) * problem.derivatives([problem.start] * 2)[1].sum(axis=0)
    np.testing.assert_allclose(gradient_of(weight), expected, rtol=0, atol=rounding())
    assert torch.equal(ema.average, before)
    assert (ema.num_updates, twin.num_updates) == (1, 2)


@pytest.mark.parametrize("mode", MODES)
def test_reset_forgets_everything(mode: str) -> None:
    problem, ema = Problem(), make(mode)
    weight, other = problem.leaf(), problem.leaf()
    ema(problem.value(0, weight), **({"leaves": [weight]} if mode == "carried" else {}))
    ema.reset()
    assert not ema.average.any()
    assert ema.num_updates == 0
    average = ema(problem.value(1, other), **({"leaves": [other]} if mode == "carried" else {}))
    assert torch.equal(average, problem.value(1, other))
    average.sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("mode", MODES)
def test_it_moves_to_another_dtype_with_its_graphs(mode: str) -> None:
    """The window and the carried derivative go on through the conversion."""
    weight = torch.nn.Parameter(torch.ones(2))
    ema = DifferentiableEMA((), 0.5, mode, **MODES[mode])
    options = {"leaves": [weight]} if mode == "carried" else {}
    ema(weight.sum(), **options)
    ema.double()
    average = ema(3 * weight.double().sum(), **options)
    assert average.dtype == torch.float64
    average.backward()
    assert torch.equal(weight.grad, torch.full((2,), 1.5 if mode == "truncated" else 2.0))
    with pytest.raises(InvalidValueError, match=r"value: is torch\.float32, the average torch\.float64"):
        ema(weight.sum(), **options)


def test_a_learned_decay_is_part_of_the_state_and_moves() -> None:
    ema = DifferentiableEMA(2, torch.nn.Parameter(torch.tensor(0.5)))
    assert ema.state_dict().keys() == {"decay", "average", "num_updates"}
    assert ema.double().decay.dtype == torch.float64
    assert repr(ema) == "DifferentiableEMA([2], decay=learned, mode='truncated')"
    assert repr(DifferentiableEMA((), 0.5)) == "DifferentiableEMA([], decay=0.5, mode='truncated')"
    assert not copy.deepcopy(ema).decay.grad_fn


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": -1}, r"shape -1: must be a whole number"),
        ({"shape": (2, 1.5)}, r"shape \(2, 1\.5\): must be"),
        ({"decay": 1.0}, r"decay 1\.0: must lie in \[0, 1\)"),
        ({"decay": float("nan")}, "decay nan: must lie"),
        ({"decay": "0.9"}, "decay '0.9': must lie"),
        ({"decay": torch.tensor([0.1, 0.2])}, r"decay: a tensor must have one element of floating point, not \[2\]"),
        ({"decay": torch.tensor(2.0)}, r"decay 2\.0: must lie"),
        ({"mode": "half"}, "mode 'half': must be one of truncated, window, carried, full"),
        ({"mode": "window"}, "window: the number of values to keep"),
        ({"mode": "full", "window": 3}, "window: the number of values to keep"),
        ({"mode": "window", "window": 0}, "window 0: must be a whole number, at least 1"),
        ({"dtype": torch.float16}, r"dtype: must be torch\.float32 or torch\.float64, not torch\.float16"),
        ({"cotangent": torch.ones(2)}, "cotangent: is for mode 'carried'"),
        ({"mode": "carried", "cotangent": torch.ones(3)}, r"cotangent: .* shape \[2\], not \[3\]"),
        ({"mode": "carried", "cotangent": 1.0}, r"cotangent: .* not float"),
        ({"mode": "carried", "cotangent": torch.zeros(2)}, "cotangent: must be finite, and not all zero"),
    ],
)
def test_a_bad_argument_is_named_in_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message) as raised:
        DifferentiableEMA(**{"shape": 2, "decay": 0.9, **arguments})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(3), r"value: must be a tensor of the shape \[2\], not \[3\]"),
        (1.0, r"value: must be a tensor of the shape \[2\], not float"),
        (torch.ones(2, dtype=torch.float64), r"value: is torch\.float64, the average torch\.float32"),
        (torch.ones(2, device="meta"), "value: is on meta, the average on cpu"),
    ],
)
def test_a_bad_value_is_named_and_not_taken_in(value: Any, message: str) -> None:
    ema = DifferentiableEMA(2, 0.9)
    with pytest.raises(InvalidValueError, match=message):
        ema(value)
    assert ema.num_updates == 0


def test_an_average_in_half_precision_is_refused() -> None:
    ema = DifferentiableEMA(2, 0.9).half()
    with pytest.raises(InvalidValueError, match=r"average: is torch\.float16; keep it in torch\.float32"):
        ema(torch.ones(2, dtype=torch.float16))


def test_a_decay_that_left_its_range_is_refused() -> None:
    decay = torch.nn.Parameter(torch.tensor(0.9))
    ema = DifferentiableEMA(2, decay)
    with torch.no_grad():
        decay.fill_(1.5)
    with pytest.raises(InvalidValueError, match=r"decay 1\.5: must lie"):
        ema(torch.ones(2))


def test_bad_leaves_are_named() -> None:
    weight, other = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    ema = DifferentiableEMA(2, 0.9, "carried")
    for leaves, message in (
        (None, "leaves: mode 'carried' needs a sequence of tensors"),
        (weight, "leaves: mode 'carried' needs a sequence of tensors"),
        ([], "leaves: must be one tensor at least"),
        ([weight, weight], "none of them twice"),
        ([weight, weight * 1], r"leaves\[1\]: must be a leaf that requires gradients"),
        ([torch.ones(2)], r"leaves\[0\]: must be a leaf that requires gradients"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            ema(weight * 2, leaves=leaves)
    with pytest.raises(InvalidValueError, match="value: has no graph"):
        ema(torch.ones(2), leaves=[weight])
    ema(weight * 2, leaves=[weight])
    with pytest.raises(InvalidValueError, match="leaves: must be the same tensors at every update"):
        ema(weight * 2, leaves=[other])
    with pytest.raises(InvalidValueError, match="only mode 'carried' takes them"):
        DifferentiableEMA(2, 0.9)(weight * 2, leaves=[weight])
    with pytest.raises(InvalidValueError, match="decay: requires gradients, which mode 'carried' does not give"):
        DifferentiableEMA(2, torch.nn.Parameter(torch.tensor(0.5)), "carried")(weight * 2, leaves=[weight])


def test_the_example_runs() -> None:
    assert doctest.testmod(ema_module).failed == 0
    assert doctest.testmod(ema_module).attempted > 0
