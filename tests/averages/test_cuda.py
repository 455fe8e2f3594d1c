"""On a GPU: updates that never wait for it, and averages on another device than their model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from factories import tiny_model

from posthoc_cli.averages import EMAStats, ExponentialMovingAverage, ShadowModel

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_update_waits_for_the_device(dtype: torch.dtype, waiting_is_an_error: None) -> None:
    model = tiny_model().to("cuda", dtype)
    ema = ExponentialMovingAverage(model, momentum=0.1, update_buffers=True, warmup=True)
    net = ShadowModel(model, 0.9, num_updates=0, zero_debias=True).cuda()
    stats = EMAStats(3).cuda()
    x = torch.randn(8, 3, device="cuda", dtype=dtype)
    for step in range(5):
        ema.update_parameters(model)
        net.update()
        stats(x)
        if step == 1:
            torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    assert ema.steps == net.num_updates == stats.num_batches_tracked == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_average_on_the_host_is_that_on_the_device(dtype: torch.dtype) -> None:
    model = tiny_model().to("cuda", dtype)
    averages = [ExponentialMovingAverage(model, momentum=0.1, device=device) for device in ("cpu", "cuda")]
    for _ in range(5):
        for ema in averages:
            ema.update_parameters(model)
        torch.nn.init.normal_(model.head.bias)
    host, device = (ema.module.head.bias for ema in averages)
    assert (host.device.type, device.device.type) == ("cpu", "cuda")
    # Products are fused with sums on one of the two; half precision may then round to the neighbour.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(device.cpu(), host, rtol=tolerance, atol=tolerance)


def test_statistics_on_the_device_under_autocast_are_those_on_the_host() -> None:
    host, device = EMAStats(4, 3).double(), EMAStats(4, 3).double().cuda()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(16, 4, generator=generator), torch.randn(16, 3, generator=generator)
        host(x, y)
        with torch.autocast("cuda"):
            device(x.cuda(), y.cuda())
    torch.testing.assert_close(device.cov_xy.cpu(), host.cov_xy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(device.correlation().cpu(), host.correlation(), rtol=1e-9, atol=1e-9)
