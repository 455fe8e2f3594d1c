"""On a GPU: averages on another device than their model."""

from __future__ import annotations

import pytest
import torch
from factories import tiny_model

from posthoc_cli.averages import EMAStats, ExponentialMovingAverage

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


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
    # Products are fused with sums on one of the two.
    torch.testing.assert_close(device.cpu(), host, rtol=1e-5, atol=1e-5)


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
