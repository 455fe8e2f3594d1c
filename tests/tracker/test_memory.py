"""What a tracker holds, and what it takes for snapshots and queries: bytes a parameter."""

from __future__ import annotations

import threading
from pathlib import Path

import forked
import pytest
import torch
from tracker.runs import step, train

from posthoc_cli import PostHocEMA, Run
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
        kept = tracker._pipeline.now.averages.accumulators.nbytes
        if sys.argv[3] == "query":
            tracker.update_(model)
            tracker.state_dict(0.05)
        return kept, tracker.metrics()["bytes"]

run(sys.argv[1] + "/small", torch.nn.Linear(300, 300), 4)  # what torch and the threads take once
before = resident("VmRSS")
kept, held = run(sys.argv[1] + "/large", model, 12)
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
    thread of vectors, and samples, come to less than a byte for 34 million parameters; the rest is malloc's."""
    peak, held = map(float, forked.check(PEAK, tmp_path, device, then or "none").out.split())
    assert held < most - (4.0 if then else 0.0) + 1.0
    assert peak < most + 2.0


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


# --- distances from what is stored, and a sample of its rounding


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
def test_distances_of_a_sample_are_those_of_all_elements(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: float, stored: str
) -> None:
    """From far above the rounding to far below it. Estimates from n elements are off by n^(-1/2) of the rounding times
    the distance, times 2, or of the rounding itself where that is larger: here 4 standard errors."""
    found = []
    for most in (2**20, 2_000):
        monkeypatch.setattr(measuring, "SAMPLED", most)
        model = network()
        settings = {"update_every": 1, "checkpoint_every": 5, "checkpoint_dtype": stored}
        with PostHocEMA.from_model(model, tmp_path / str(most), **settings) as ema:  # type: ignore[arg-type]
            for number in range(1, 31):
                drifting(model, number, size)
                ema.update_(model)
        found.append([snapshot.info.measurements for snapshot in read_directory(tmp_path / str(most))])
    for exact, sampled in zip(*found, strict=True):
        assert exact is not None
        assert sampled is not None
        assert sampled.norm == exact.norm
        assert sampled.rounding == exact.rounding
        for one, other in zip(exact.distances, sampled.distances, strict=True):
            spread = 2 * (exact.rounding * one.squared) ** 0.5 + exact.rounding
            assert abs(one.squared - other.squared) <= 4 * 2_000**-0.5 * spread
        # Heavy tails of LayerNorm's weights beside others: a tenth.
        assert sampled.weights == pytest.approx(exact.weights, rel=0.2, abs=4 * 2_000**-0.5 * exact.rounding)


def test_what_is_made_of_sampled_distances_is_as_near(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Coefficients of an average of any length, from measurements of all elements and of a sample."""
    made = []
    for most in (2**20, 2_000):
        monkeypatch.setattr(measuring, "SAMPLED", most)
        model = network()
        with PostHocEMA.from_model(model, tmp_path / str(most), update_every=1, checkpoint_every=10) as ema:
            for number in range(1, 101):
                drifting(model, number, 1e-3)
                ema.update_(model)
        made.append(Run(tmp_path / str(most)).average(0.15))
    exact, sampled = made
    distance = sum(float((exact[name] - sampled[name]).double().square().sum()) for name in exact) ** 0.5
    norm = sum(float(value.double().square().sum()) for value in exact.values()) ** 0.5
    assert distance < 0.1 * exact.predicted_error * norm
    assert sampled.predicted_error == pytest.approx(exact.predicted_error, rel=0.02)


# --- queries


def test_a_query_beside_which_an_update_comes_is_made_again_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The averages move on between two tensors that are read."""
    model = network()
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=100) as ema:
        train(model, ema, 1, 3)
        expected = ema.state_dict(0.05)
        real, moved = type(ema._pipeline)._read, []

        def read(*arguments: object) -> list[torch.Tensor]:
            if not moved:
                moved.append(True)
                beside = threading.Thread(target=lambda: (step(model, 4), ema.update_(model)))
                beside.start()
                beside.join()
            return real(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(type(ema._pipeline), "_read", read)
        found = ema.state_dict(0.05)
        assert moved
        assert not torch.equal(found["0.weight"], expected["0.weight"])
        monkeypatch.undo()
        after = ema.state_dict(0.05)
        assert all(torch.equal(found[name], value) for name, value in after.items())
