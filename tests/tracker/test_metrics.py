"""Metrics for loggers, the memory of a tracker, of snapshots and of queries, and callbacks after each snapshot."""

from __future__ import annotations

import threading
from pathlib import Path

import forked
import pytest
from safetensors.torch import load_file
from tracker.runs import Training

from posthoc_cli import PostHocEMA, Run, Window
from posthoc_cli.errors import InvalidValueError


def test_metrics_include_the_measurements_of_the_last_snapshots(tmp_path: Path) -> None:
    training = Training()
    with PostHocEMA.from_model(training.model, tmp_path, (0.1, 0.2), update_every=1, checkpoint_every=10) as ema:
        assert ema.metrics((0.15,)) == {"step": 0, "t": 0, "bytes": 0}
        training.run(35, ema)
        ema.flush()
        found = ema.metrics((0.15, 0.2))
        assert (found["step"], found["t"]) == (35, 35)
        assert ema.metrics(0.15)["predicted_error_0.15"] == found["predicted_error_0.15"]
        others = ema.metrics(["decay:linear:20%", Window(1000), 0.2])  # the run is too short for the window
        names = {name for name in others if name.startswith("predicted")}
        assert names == {"predicted_error_decay-linear-20%", "predicted_error_0.2"}
        assert others["predicted_error_0.2"] == found["predicted_error_0.2"]
        for sigma_rel in (0.15, 0.2):
            assert found[f"predicted_error_{sigma_rel}"] == Run(tmp_path).plan(sigma_rel).predicted_error(0)
        files = [file for file in tmp_path.glob("*.safetensors") if "30-" in file.name]
        assert found["snapshot_bytes"] == sum(one.nbytes for file in files for one in load_file(file).values())
        assert 0 < found["snapshot_seconds"] < 10
        assert 0 <= found["snapshot_waited"] < 10
        assert all(type(value) is float for value in found.values())


def test_callbacks_run_in_the_training_thread_once_after_each_time_with_snapshots(tmp_path: Path) -> None:
    training, calls = Training(), []
    ema = PostHocEMA.from_model(training.model, tmp_path, update_every=1, checkpoint_every=10)
    ema.on_snapshot(lambda tracker: calls.append((tracker.step, threading.get_ident())))
    for step in range(1, 26):
        training.run(step, ema)
        ema.flush()
    assert calls == [(11, threading.get_ident()), (21, threading.get_ident())]
    ema.close()  # the last snapshot, of call 25
    assert [step for step, _ in calls] == [11, 21, 25]


def test_an_error_of_a_callback_is_raised_by_a_call_that_has_done_its_work(tmp_path: Path) -> None:
    training = Training()

    def fail(_: PostHocEMA) -> None:
        raise KeyError("logger")

    with PostHocEMA.from_model(training.model, tmp_path, update_every=1, checkpoint_every=5) as ema:
        with pytest.raises(InvalidValueError, match="on_snapshot None: must be given a function"):
            ema.on_snapshot(None)  # type: ignore[arg-type]
        ema.on_snapshot(fail)
        training.run(5, ema)
        ema.flush()
        with pytest.raises(KeyError, match="logger"):
            training.run(6, ema)
        training.run(8, ema)
        assert ema.step == 8
        with pytest.raises(KeyError, match="logger"):
            ema.close()


# --- memory: bytes a parameter

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
@pytest.mark.parametrize(("device", "then", "most"), [("model", "", 4.0), ("cpu", "", 8.0), ("model", "query", 8.0)])
def test_snapshots_take_little_more_than_their_own_bytes_in_addition_to_the_averages(
    tmp_path: Path, device: str, then: str, most: float
) -> None:
    """Two profiles in float16; with averages on the host a copy of the model; and the result of a query.

    Scratch of 1 MB a thread, and samples, come to less than a byte a parameter; the rest is malloc's. One more copy
    would take 4 bytes.
    """
    peak, held = map(float, forked.check(PEAK, tmp_path, device, then or "none").out.split())
    assert abs(held - (most - (4.0 if then else 0.0))) < 1.0  # what metrics tell
    assert peak < most + 3.5  # 2.5 was passed once in ten runs
