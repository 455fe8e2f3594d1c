"""EMAStats: the formulas in NumPy, gradients, precision, copies, and what is refused."""

import copy

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused, saved_and_loaded
from factories import FloatArray
from numpy.testing import assert_allclose

from posthoc_cli.averages import EMAStats
from posthoc_cli.errors import NotReadyError

NAMES = ("mean_x", "mean_y", "cov_xx", "cov_yy", "cov_xy")
Batch = tuple[FloatArray, FloatArray]
Statistics = dict[str, FloatArray]


def batches(count: int, rows: int, dim_x: int, dim_y: int, seed: int = 0) -> list[Batch]:
    """Return correlated batches with a nonzero, moving mean."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(dim_x, dim_y))
    found = []
    for index in range(count):
        mean = 2.0 + 0.1 * index
        x = random.normal(mean, size=(rows, dim_x))
        noise = random.normal(-1.0, 0.5, size=(rows, dim_y))
        y = x @ mixing + noise
        found.append((x, y))
    return found


def expected_statistics(
    data: list[Batch],
    momentum: float,
    running_mean: bool = True,
) -> Statistics:
    """Compute the statistics by definition, independently."""
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
    return state


def feed(
    stats: EMAStats,
    data: list[Batch],
    dtype: torch.dtype = torch.float32,
) -> EMAStats:
    for batch in data:
        x, y = map(torch.from_numpy, batch)
        stats(x.to(dtype), y.to(dtype))
    return stats


def check(stats: EMAStats, expected: Statistics, tolerance: float) -> None:
    for name in NAMES:
        exact = expected[name]
        found = getattr(stats, name).detach().double().numpy()
        within = tolerance * np.abs(exact).max()
        assert_allclose(found, exact, rtol=0, atol=within, err_msg=name)
        assert found.shape == exact.shape


@pytest.mark.parametrize(
    ("running_mean", "momentum", "rows"),
    [
        (True, 0.1, 33),
        (False, 0.1, 33),
        (True, 1.0, 33),
        (True, 0.1, 1),
    ],
)
def test_statistics_are_the_formulas(running_mean, momentum, rows):
    data = batches(12, rows, 4, 3)
    stats = EMAStats(4, 3, momentum, center_with_running_mean=running_mean)
    feed(stats.double(), data, torch.float64)
    # A few additions an element and batch, float64 on both sides; differences of values up to 10
    # that are about 1.
    expected = expected_statistics(data, momentum, running_mean)
    check(stats, expected, 1e-12)
    assert stats.num_batches_tracked == 12
    assert stats.num_features_x == 4
    assert stats.num_features_y == 3


def test_one_batch_has_the_unbiased_covariances_and_correlations_of_numpy():
    stats = EMAStats(4, 3, 0.01, eps=1e-12).double()
    data = batches(1, 50, 4, 3)
    ((x, y),) = data
    feed(stats, data, torch.float64)
    correlations = np.corrcoef(x, y, rowvar=False)
    covariances = np.cov(x, y, rowvar=False)
    of_both = (slice(0, 4), slice(4, 7))
    assert_allclose(stats.correlation(), correlations[of_both], rtol=0, atol=1e-11)
    assert_allclose(stats.cov_xy, covariances[of_both], rtol=0, atol=1e-12)


def test_a_correlation_needs_a_batch():
    stats = EMAStats(4, 3)
    with pytest.raises(NotReadyError, match="correlation"):
        stats.correlation()


@pytest.mark.parametrize("name", ["mean_y", "cov_xy", "correlation"])
@pytest.mark.parametrize("seen", [0, 1])
def test_gradients_are_those_of_the_newest_batch(name, seen):
    """Compared with finite differences; earlier batches are constants."""
    earlier = EMAStats(3, 2, 0.3).double()
    feed(earlier, batches(seen, 6, 3, 2), torch.float64)

    def statistic(x, y):
        stats = EMAStats(3, 2, 0.3).double()
        stats.load_state_dict(earlier.state_dict())
        stats(x, y)
        if name == "correlation":
            return stats.correlation()
        return getattr(stats, name)

    x = torch.randn(6, 3).double().requires_grad_()
    y = torch.randn(6, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(statistic, (x, y))
    statistic(x, y).square().sum().backward()
    moved = y if name == "mean_y" else x
    assert moved.grad.abs().max() > 1e-3


def in_dtype(values: FloatArray, dtype: torch.dtype) -> FloatArray:
    rounded = torch.from_numpy(values).to(dtype)
    return rounded.double().numpy()


def test_statistics_are_float32_of_half_precision_batches_under_autocast_and_in_a_cast_module():
    dtype = torch.bfloat16
    data = []
    for batch in batches(30, 64, 4, 3):
        x, y = (in_dtype(values, dtype) for values in batch)
        data.append((x, y))
    with torch.autocast("cpu", dtype):
        stats = feed(EMAStats(4, 3, 0.05), data, dtype)
    assert stats.cov_xy.dtype == torch.float32
    # Sums of 64 products of values up to about 8 in float32; bfloat16 sums would be off by 4e-3 at
    # least.
    check(stats, expected_statistics(data, 0.05), 2e-5)
    module = torch.nn.Sequential(stats)
    module.half()
    assert stats.cov_xy.dtype == torch.float32
    module.double()
    assert stats.cov_xy.dtype == torch.float64


def by_state(stats: EMAStats) -> EMAStats:
    twin = EMAStats(3, 2)
    twin.load_state_dict(stats.state_dict(), strict=True)
    return twin


@pytest.fixture
def stats() -> EMAStats:
    """Return statistics of two batches."""
    return feed(EMAStats(3, 2), batches(2, 8, 3, 2))


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, by_state])
def test_copies_while_a_graph_hangs_on_are_detached_and_go_on_alone(copied, stats):
    x = torch.randn(8, 3, requires_grad=True)
    stats(x, torch.randn(8, 2))
    assert stats.cov_xy.requires_grad
    twin = copied(stats)
    data = batches(3, 8, 3, 2, seed=5)
    before = copy.deepcopy(stats.state_dict())
    assert_same_tensors(twin.state_dict(), before)
    for name in NAMES:
        assert not getattr(twin, name).requires_grad
    feed(twin, data)
    assert_same_tensors(stats.state_dict(), before)
    stats.cov_xy.sum().backward()
    feed(stats, data)
    assert_same_tensors(twin.state_dict(), stats.state_dict())


def test_a_state_that_was_taken_stays_when_another_is_loaded(stats):
    taken = stats.state_dict()
    before = copy.deepcopy(taken)
    stats.load_state_dict(EMAStats(3, 2).state_dict())
    assert_same_tensors(taken, before)


def test_a_state_of_symm_learning_loads(stats):
    """Its class documents the names: `running_` before each statistic."""
    values = stats.state_dict()
    state = {f"stats.running_{name}": values[name] for name in NAMES}
    state["stats.num_batches_tracked"] = values["num_batches_tracked"]
    loaded = EMAStats(3, 2)
    outer = torch.nn.ModuleDict({"stats": loaded})
    outer.load_state_dict(state, strict=True)
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


def test_statistics_of_one_batch_are_of_it_and_itself():
    x = torch.randn(5, 3)
    alone = EMAStats(3)
    assert alone(x) == (x, x)
    assert torch.equal(alone.cov_xy, alone.cov_xx)
