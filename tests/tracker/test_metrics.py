"""Metrics for loggers, and callbacks after each snapshot."""

from __future__ import annotations

import threading
from pathlib import Path

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
