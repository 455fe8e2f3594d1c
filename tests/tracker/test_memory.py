"""What a tracker holds, and what it takes for snapshots and queries: bytes a parameter."""

from __future__ import annotations

import threading
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from factories import exact_weights
from tracker.runs import train

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker import measuring, pipeline

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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what a process holds")
@pytest.mark.parametrize(
    ("device", "then", "most"),
    [("model", "", 4.0), ("cpu", "", 8.0), ("model", "query", 8.0)],
)
def test_snapshots_take_little_more_than_their_bytes_beside_the_averages(
    tmp_path: Path, device: str, then: str, most: float
) -> None:
    """Two profiles in float16; with averages on the host a copy of the model; and what a query gives. Some 1 MB a
    thread of vectors, and samples, come to less than a byte for 34 million parameters; the rest is malloc's.
    One more copy would be 4 bytes."""
    peak, held = map(float, forked.check(PEAK, tmp_path, device, then or "none").out.split())
    assert held < most - (4.0 if then else 0.0) + 1.0
    assert peak < most + 3.5  # 2.5 was passed once in ten runs


def test_metrics_tell_the_bytes_held(tmp_path: Path) -> None:
    """Of a sum of tensors that is known here; scratch of threads comes to some MB for any model."""
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
        assert before > 4 * count  # the copy of the model alone


# --- measurements of a subset


def drifting(model: torch.nn.Module, number: int, size: float) -> None:
    """A step towards a goal, slower and slower, and noise."""
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
    """From far above the rounding to far below it. The square of a normal number has a variance of 2: sums over n have
    a standard error of (2 / n)^(1/2), and those of LayerNorm's weights beside others a larger one: here four of it."""
    found = []
    for most in (2**20, 2_000):
        monkeypatch.setattr(measuring, "MEASURED_ELEMENTS", most)
        model = network()
        settings = {"update_every": 1, "checkpoint_every": 5, "checkpoint_dtype": stored}
        with PostHocEMA.from_model(model, tmp_path / str(most), **settings) as ema:  # type: ignore[arg-type]
            for number in range(1, 31):
                drifting(model, number, size)
                ema.update_(model)
        found.append([snapshot.info.measurements for snapshot in read_directory(tmp_path / str(most))])
    off = 4 * (2 / 2_000) ** 0.5
    for exact, sampled in zip(*found, strict=True):
        assert sampled.norm == pytest.approx(exact.norm, rel=off)
        assert sampled.norm != exact.norm
        assert sampled.rounding == pytest.approx(exact.rounding, rel=2 * off)  # larger in each binade
        for one, other in zip(exact.distances, sampled.distances, strict=True):
            assert (other.t, other.sigma_rel) == (one.t, one.sigma_rel)
            assert other.squared == pytest.approx(one.squared, rel=off)
        assert sampled.weights == pytest.approx(exact.weights, rel=2 * off)


def test_what_is_made_of_a_subset_is_as_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of averages by measurements of all elements and of 2,000, against float64: the paths' 64 numbers are of
    other elements, with an error of 0.18 each, so that coefficients differ, and leave nearly the same."""
    errors = []
    for most in (2**20, 2_000):
        monkeypatch.setattr(measuring, "MEASURED_ELEMENTS", most)
        model = network()
        weights = dict(enumerate(exact_weights(0.15, np.arange(1, 101)), start=1))
        truth = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in model.named_parameters()}
        with PostHocEMA.from_model(model, tmp_path / str(most), update_every=1, checkpoint_every=10) as ema:
            for number in range(1, 101):
                drifting(model, number, 1e-3)
                ema.update_(model)
                for name, value in model.named_parameters():
                    truth[name] += weights[number] * value.detach().double()
        made = Run(tmp_path / str(most)).average(0.15)
        away = sum(float((made[name].double() - value).square().sum()) for name, value in truth.items()) ** 0.5
        norm = sum(float(value.square().sum()) for value in truth.values()) ** 0.5
        assert 1 / 2 < away / norm / made.predicted_error < 2
        errors.append(away)
    assert errors[1] < 1.1 * errors[0]


# --- queries


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_query_beside_which_updates_come_is_of_the_averages_that_it_began_with(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two updates come between two tensors that are read; who asks later gets the new averages."""
    model = network()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=100, device=device) as ema:
        train(model, ema, 1, 3)
        expected = ema.state_dict(0.05)
        real, reads = pipeline.LiveAverages.read, []

        def read(*arguments: object) -> list[torch.Tensor]:
            reads.append(True)
            if len(reads) == 2:
                beside = threading.Thread(target=lambda: train(model, ema, 4, 5))
                beside.start()
                beside.join()
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(pipeline.LiveAverages, "read", read)
        found = ema.state_dict(0.05)
        assert len(reads) > 2
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        later = ema.state_dict(0.05)
        assert not torch.equal(later["0.weight"], found["0.weight"])
