"""EMAStats: the formulas in NumPy, gradients, precision, copies, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused, saved_and_loaded
from numpy.testing import assert_allclose

from posthoc_cli.averages import EMAStats
from posthoc_cli.errors import NotReadyError

NAMES = ("mean_x", "mean_y", "cov_xx", "cov_yy", "cov_xy")


def batches(count, rows):
    """Return correlated batches of 4 and 3 columns with a nonzero, moving mean."""
    random = np.random.default_rng(0)
    mixing = random.normal(size=(4, 3))
    found = []
    for index in range(count):
        x = random.normal(2.0 + 0.1 * index, size=(rows, 4))
        noise = random.normal(-1.0, 0.5, size=(rows, 3))
        found.append((x, x @ mixing + noise))
    return found


def feed(stats, data, dtype=torch.float32):
    for x, y in data:
        stats(torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype))
    return stats


def check(stats, data, running_mean, within):
    """Compare with the statistics by definition."""
    momentum = stats.momentum
    state = {}
    for x, y in data:
        batch = {
            "mean_x": x.mean(axis=0),
            "mean_y": y.mean(axis=0),
        }
        center = state if state and running_mean else batch
        x = x - center["mean_x"]
        y = y - center["mean_y"]
        degrees = max(len(x) - 1, 1)
        batch["cov_xx"] = x.T @ x / degrees
        batch["cov_yy"] = y.T @ y / degrees
        batch["cov_xy"] = x.T @ y / degrees
        for name, value in batch.items():
            earlier = state.get(name, value)
            state[name] = (1 - momentum) * earlier + momentum * value
    for name, exact in state.items():
        found = getattr(stats, name).detach()
        largest = np.abs(exact).max()
        assert_allclose(found, exact, rtol=0, atol=within * largest, err_msg=name)


@pytest.mark.parametrize(
    ("running_mean", "rows"),
    [
        (True, 33),
        (False, 33),
        (True, 1),
    ],
)
def test_statistics_are_the_formulas(running_mean, rows):
    data = batches(12, rows)
    stats = EMAStats(4, 3, center_with_running_mean=running_mean).double()
    feed(stats, data, torch.float64)
    # A few additions an element and batch, float64 on both sides; differences of values up to 10
    # that are about 1.
    check(stats, data, running_mean, within=1e-12)
    assert stats.num_batches_tracked == 12


def test_correlations_of_one_batch_are_those_of_numpy():
    stats = EMAStats(4, 3, eps=1e-12).double()
    with pytest.raises(NotReadyError):
        stats.correlation()
    data = batches(1, 50)
    feed(stats, data, torch.float64)
    correlations = np.corrcoef(*data[0], rowvar=False)
    assert_allclose(stats.correlation(), correlations[:4, 4:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["mean_y", "cov_xy", "correlation"])
def test_gradients_are_those_of_the_newest_batch(name):
    """Compared with finite differences; earlier batches are constants."""
    earlier = feed(EMAStats(4, 3).double(), batches(1, 6), torch.float64)

    def statistic(x, y):
        stats = copy.deepcopy(earlier)
        stats(x, y)
        if name == "correlation":
            return stats.correlation()
        return getattr(stats, name)

    x = torch.randn(6, 4).double().requires_grad_()
    y = torch.randn(6, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(statistic, (x, y))
    statistic(x, y).square().sum().backward()
    assert y.grad.abs().max() > 1e-3


def test_statistics_are_float32_of_half_precision_batches_under_autocast_and_in_a_cast_module():
    dtype = torch.bfloat16
    data = []
    for x, y in batches(30, 64):
        rounded = [torch.tensor(values, dtype=dtype).double().numpy() for values in (x, y)]
        data.append(rounded)
    with torch.autocast("cpu", dtype):
        stats = feed(EMAStats(4, 3), data, dtype)
    assert stats.cov_xy.dtype == torch.float32
    # Sums of 64 products of values up to about 8 in float32; bfloat16 sums would be off by 4e-3 at
    # least.
    check(stats, data, running_mean=True, within=2e-5)
    stats.half()
    assert stats.cov_xy.dtype == torch.float32


def by_state(stats):
    twin = EMAStats(4, 3)
    twin.load_state_dict(stats.state_dict())
    return twin


@pytest.fixture
def stats():
    """Return statistics of two batches."""
    return feed(EMAStats(4, 3), batches(2, 8))


@pytest.mark.parametrize("copied", [saved_and_loaded, by_state])
def test_copies_while_a_graph_hangs_on_are_detached_and_go_on_alone(copied, stats):
    stats(torch.randn(8, 4, requires_grad=True), torch.randn(8, 3))
    assert stats.cov_xy.requires_grad
    twin = copied(stats)
    before = copy.deepcopy(stats.state_dict())
    assert_same_tensors(twin.state_dict(), before)
    assert not twin.cov_xy.requires_grad
    feed(twin, batches(3, 8))
    assert_same_tensors(stats.state_dict(), before)
    stats.cov_xy.sum().backward()
    feed(stats, batches(3, 8))
    assert_same_tensors(twin.state_dict(), stats.state_dict())


def test_a_state_of_symm_learning_loads(stats):
    """Its class documents the names: `running_` before each statistic."""
    values = stats.state_dict()
    state = {f"running_{name}": values[name] for name in NAMES}
    state["num_batches_tracked"] = values["num_batches_tracked"]
    loaded = EMAStats(4, 3)
    loaded.load_state_dict(state)
    assert_same_tensors(loaded.state_dict(), values)


def test_batches_pass_unchanged_and_count_in_train_mode_only():
    x = torch.randn(5, 3)
    y = torch.randn(5, 2)
    stats = EMAStats(3, 2).eval()
    assert stats(x, y) == (x, y)
    assert stats.num_batches_tracked == 0


def test_batches_that_do_not_fit_are_refused():
    x = torch.randn(5, 3)
    y = torch.randn(5, 2)
    stats = EMAStats(3, 2)
    for other in (x[0], x[:0], x.long()):
        with refused("x"):
            stats(other, y[: len(other)])
    for other in (x, y[1:], None, y.double()):
        with refused("y"):
            stats(x, other)
    assert stats.num_batches_tracked == 0


def test_statistics_of_a_single_batch_correlate_it_with_itself():
    x = torch.randn(5, 3)
    alone = EMAStats(3)
    assert alone(x) == (x, x)
    assert torch.equal(alone.cov_xy, alone.cov_xx)
