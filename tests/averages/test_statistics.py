"""EMAStats: the formulas in NumPy, gradients, precision, copies, and what is refused."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused, saved_and_loaded
from factories import FloatArray

from posthoc_cli.averages import EMAStats
from posthoc_cli.errors import NotReadyError

NAMES = ("mean_x", "mean_y", "cov_xx", "cov_yy", "cov_xy")


def batches(
    count: int,
    rows: int,
    dim_x: int,
    dim_y: int,
    seed: int = 0,
) -> list[tuple[FloatArray, FloatArray]]:
    """Return correlated batches with a nonzero, moving mean."""
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(dim_x, dim_y))
    found = []
    for index in range(count):
        x = random.normal(size=(rows, dim_x)) + 2.0 + 0.1 * index
        found.append((x, x @ mixing + 0.5 * random.normal(size=(rows, dim_y)) - 1.0))
    return found


def expected_statistics(
    data: list[tuple[FloatArray, FloatArray]],
    momentum: float,
    running_mean: bool = True,
) -> dict[str, FloatArray]:
    """Compute the statistics by definition, independently."""
    state: dict[str, FloatArray] = {}
    for x, y in data:
        batch = {"mean_x": x.mean(axis=0), "mean_y": y.mean(axis=0)}
        center = state if state and running_mean else batch
        x = x - center["mean_x"]
        y = y - center["mean_y"]
        degrees = max(len(x) - 1, 1)
        batch.update(
            {"cov_xx": x.T @ x / degrees, "cov_yy": y.T @ y / degrees, "cov_xy": x.T @ y / degrees}
        )
        state = {
            name: (1 - momentum) * state[name] + momentum * batch[name] if state else batch[name]
            for name in NAMES
        }
    return state


def feed(
    stats: EMAStats,
    data: list[tuple[FloatArray, FloatArray]],
    dtype: torch.dtype,
) -> EMAStats:
    for x, y in data:
        stats(torch.from_numpy(x).to(dtype), torch.from_numpy(y).to(dtype))
    return stats


def check(stats: EMAStats, expected: dict[str, FloatArray], tolerance: float) -> None:
    for name in NAMES:
        found = getattr(stats, name).detach().double().numpy()
        assert found.shape == expected[name].shape
        assert np.abs(found - expected[name]).max() <= tolerance * np.abs(expected[name]).max(), (
            name
        )


@pytest.mark.parametrize("running_mean", [True, False])
@pytest.mark.parametrize("momentum", [0.1, 1.0])
@pytest.mark.parametrize("rows", [1, 33])
def test_statistics_are_the_formulas(running_mean: bool, momentum: float, rows: int) -> None:
    data = batches(12, rows, 4, 3)
    stats = EMAStats(4, 3, momentum, center_with_running_mean=running_mean).double()
    feed(stats, data, torch.float64)
    # A few additions an element and batch, float64 on both sides; differences of values up to 10
    # that are about 1.
    check(stats, expected_statistics(data, momentum, running_mean), 1e-12)
    assert stats.num_batches_tracked == 12
    assert (stats.num_features_x, stats.num_features_y) == (4, 3)


def test_one_batch_has_the_unbiased_covariances_and_correlations_of_numpy() -> None:
    stats = EMAStats(4, 3, 0.01, eps=1e-12).double()
    with pytest.raises(NotReadyError, match="correlation"):
        stats.correlation()
    ((x, y),) = data = batches(1, 50, 4, 3)
    feed(stats, data, torch.float64)
    np.testing.assert_allclose(
        stats.correlation(), np.corrcoef(x, y, rowvar=False)[:4, 4:], rtol=0, atol=1e-11
    )
    np.testing.assert_allclose(stats.cov_xy, np.cov(x, y, rowvar=False)[:4, 4:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mean_y", "cov_xx", "cov_xy", "correlation"])
@pytest.mark.parametrize("seen", [0, 1])
def test_gradients_are_those_of_the_newest_batch(name: str, seen: int) -> None:
    """Compared with finite differences; earlier batches are constants."""
    state = feed(EMAStats(3, 2, 0.3).double(), batches(seen, 6, 3, 2), torch.float64).state_dict()

    def statistic(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        stats = EMAStats(3, 2, 0.3).double()
        stats.load_state_dict(state)
        stats(x, y)
        return stats.correlation() if name == "correlation" else getattr(stats, name)

    x, y = (torch.randn(6, dim, dtype=torch.float64, requires_grad=True) for dim in (3, 2))
    assert torch.autograd.gradcheck(statistic, (x, y))
    (grad,) = torch.autograd.grad(statistic(x, y).square().sum(), y if name == "mean_y" else x)
    assert grad.abs().max() > 1e-3


def test_statistics_are_float32_of_half_precision_batches_under_autocast_and_in_a_cast_module() -> (
    None
):
    dtype = torch.bfloat16
    data = [
        tuple(torch.from_numpy(b).to(dtype).double().numpy() for b in batch)
        for batch in batches(30, 64, 4, 3)
    ]
    with torch.autocast("cpu", dtype):
        stats = feed(EMAStats(4, 3, 0.05), data, dtype)
    assert stats.cov_xy.dtype == torch.float32
    # Sums of 64 products of values up to about 8 in float32; bfloat16 sums would be off by 4e-3 at
    # least.
    check(stats, expected_statistics(data, 0.05), 2e-5)
    assert torch.nn.Sequential(stats).half()[0].cov_xy.dtype == torch.float32
    assert torch.nn.Sequential(stats).double()[0].cov_xy.dtype == torch.float64


def by_state(stats: EMAStats) -> EMAStats:
    twin = EMAStats(3, 2)
    twin.load_state_dict(stats.state_dict(), strict=True)
    return twin


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded, by_state])
def test_copies_while_a_graph_hangs_on_are_detached_and_go_on_alone(
    copied: Callable[[EMAStats], EMAStats],
) -> None:
    stats = feed(EMAStats(3, 2), batches(2, 8, 3, 2), torch.float32)
    stats(torch.randn(8, 3, requires_grad=True), torch.randn(8, 2))
    assert stats.cov_xy.requires_grad
    twin = copied(stats)
    data = batches(3, 8, 3, 2, seed=5)
    before = {name: value.clone() for name, value in stats.state_dict().items()}
    assert_same_tensors(twin.state_dict(), before)
    assert not any(getattr(twin, name).requires_grad for name in NAMES)
    feed(twin, data, torch.float32)
    assert_same_tensors(stats.state_dict(), before)
    stats.cov_xy.sum().backward()
    feed(stats, data, torch.float32)
    assert_same_tensors(twin.state_dict(), stats.state_dict())


def test_a_state_of_symm_learning_loads() -> None:
    """Its class documents the names: `running_` before each statistic."""
    values = feed(EMAStats(3, 2), batches(2, 8, 3, 2), torch.float32).state_dict()
    state = {f"stats.running_{name}": values[name] for name in NAMES}
    outer = torch.nn.ModuleDict({"stats": EMAStats(3, 2)})
    outer.load_state_dict(
        state | {"stats.num_batches_tracked": values["num_batches_tracked"]}, strict=True
    )
    assert_same_tensors(outer["stats"].state_dict(), values)


def test_batches_pass_unchanged_count_in_train_mode_only_and_must_fit() -> None:
    x = torch.randn(5, 3)
    y = torch.randn(5, 2)
    stats = EMAStats(3, 2).eval()
    assert stats(x, y) == (x, y)
    for batch, subject in (
        ((x[0], y), "x"),
        ((x[:0], y[:0]), "x"),
        ((x, x), "y"),
        ((x, y[1:]), "y"),
        ((x, None), "y"),
        ((x.long(), y), "x"),
        ((x, y.double()), "y"),
    ):
        with refused(subject):
            stats.train()(*batch)
    assert stats.num_batches_tracked == 0
    alone = EMAStats(3)
    assert alone(x) == (x, x)
    assert torch.equal(alone.cov_xy, alone.cov_xx)
