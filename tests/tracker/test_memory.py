"""The memory of a tracker, of snapshots and of queries: bytes a parameter; and measurements of a subset."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest
import torch

from posthoc_cli import PostHocEMA
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker import measuring

PEAK = """
import sys, torch
from posthoc_cli import PostHocEMA
model = torch.nn.Linear(4096, 4096, bias=False)
model.more = torch.nn.ParameterList([torch.nn.Parameter(torch.randn(2048, 1024)) for _ in range(8)])
count = sum(p.numel() for p in model.parameters())

def resident(what):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(what))

def run(path, model, steps):
    with PostHocEMA.from_model(model, path, update_every=1, checkpoint_every=4, device=sys.argv[2]) as tracker:
        for _ in range(steps):
            tracker.update_(model)
        tracker.flush()
        if sys.argv[3] == "query":
            tracker.update_(model)
            tracker.state_dict(0.05)
        return tracker.metrics()["bytes"]

run(sys.argv[1] + "/small", torch.nn.Linear(300, 300), 4)  # what torch and the threads take once
before = resident("VmRSS")
held, kept = run(sys.argv[1] + "/large", model, 12), 16 * count
print((resident("VmHWM") - before - kept) / count, (held - kept) / count)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not report memory")
@pytest.mark.parametrize(
    ("device", "then", "most"),
    [("model", "", 4.0), ("cpu", "", 8.0), ("model", "query", 8.0)],
)
def test_snapshots_take_little_more_than_their_own_bytes_in_addition_to_the_averages(
    tmp_path: Path, device: str, then: str, most: float
) -> None:
    """Two profiles in float16; with averages on the host a copy of the model; and the result of a query.

    Scratch of 1 MB a thread, and samples, come to less than a byte a parameter; the rest is malloc's. One more copy
    would take 4 bytes.
    """
    peak, held = map(float, forked.check(PEAK, tmp_path, device, then or "none").out.split())
    assert held < most - (4.0 if then else 0.0) + 1.0
    assert peak < most + 3.5  # 2.5 was passed once in ten runs


def test_metrics_tell_the_bytes_held(tmp_path: Path) -> None:
    """They include snapshots and the copy of the model; threads' scratch comes to some MB for any model."""
    model = torch.nn.Linear(1500, 1000)
    count = sum(parameter.numel() for parameter in model.parameters())
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=2, device="cpu") as ema:
        assert ema.metrics()["bytes"] == 0
        ema.update_(model)
        ema.flush()
        before = ema.metrics()["bytes"]
        ema.update_(model)
        ema.flush()
        assert ema.metrics()["bytes"] - before == 2 * 2 * count
        assert before > 4 * count  # the bytes of the copy of the model


# --- measurements of a subset


def drift(model: torch.nn.Module, number: int, size: float) -> None:
    """Take a step towards zero, smaller with each number, and add noise."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 - 1 / (10 + number)).add_(size * torch.randn(parameter.shape, generator=generator))


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.LayerNorm(200), torch.nn.Linear(200, 300))


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_measurements_of_a_subset_are_those_of_all_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, stored: str
) -> None:
    """Steps are from far above the rounding to far below it. Sums of n squares of normal numbers have a relative
    standard error of (2 / n)^(1/2); LayerNorm's weights among others make it larger: four times that is allowed."""
    found = []
    for most in (2**20, 2_000):
        monkeypatch.setattr(measuring, "MEASURED_ELEMENTS", most)
        model = network()
        settings = {"update_every": 1, "checkpoint_every": 5, "checkpoint_dtype": stored}
        with PostHocEMA.from_model(model, tmp_path / str(most), **settings) as ema:  # type: ignore[arg-type]
            for number in range(1, 31):
                drift(model, number, size)
                ema.update_(model)
        found.append([snapshot.measurements for snapshot in read_directory(tmp_path / str(most))])
    off = 4 * (2 / 2_000) ** 0.5
    for exact, sampled in zip(*found, strict=True):
        assert sampled.norm == pytest.approx(exact.norm, rel=off)
        assert sampled.norm != exact.norm
        assert sampled.rounding == pytest.approx(exact.rounding, rel=2 * off)  # larger in each binade
