"""The end of training: a last snapshot, which changes nothing of what comes afterwards."""

from __future__ import annotations

import gc
import logging
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from factories import exact_average
from safetensors.torch import load_file
from tracker.runs import STEPS, VALUES, matrix, scheduled, walk

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import NotReadyError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker import pipeline

SETTINGS: dict = {"update_every": 2, "checkpoint_every": 10, "checkpoint_dtype": None}

pytestmark = pytest.mark.usefixtures("one_run_id")


def times(folder: Path) -> list[tuple[float, bool]]:
    """Time of each snapshot of the first profile, and whether it is off the schedule; the same of both profiles."""
    found = [(s.info.sigma_rel, (s.info.t, s.info.off_schedule)) for s in read_directory(folder)]
    both = [[one for sigma_rel, one in found if sigma_rel == wanted] for wanted in (0.05, 0.28)]
    assert both[0] == both[1]
    return both[0]


def whole_run(folder: Path, **settings: Any) -> dict[str, bytes]:
    model = matrix()
    with PostHocEMA.from_model(model, folder, **SETTINGS | settings) as tracker:
        walk(model, tracker, 1, STEPS)
    return scheduled(folder)


def _close(trackers: list[PostHocEMA]) -> None:
    trackers.pop().close()


def _leave_block(trackers: list[PostHocEMA]) -> None:
    with trackers.pop():
        pass


def _end_process(_: list[PostHocEMA]) -> None:
    pipeline.finish()


def _forget(trackers: list[PostHocEMA]) -> None:
    del trackers[:]
    gc.collect()
    pipeline.finish()


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("end", [_close, _leave_block, _end_process, _forget])
def test_the_end_writes_what_was_not_written(
    tmp_path: Path, end: Callable[[list[PostHocEMA]], None], device: str
) -> None:
    model = matrix()
    trackers = [PostHocEMA.from_model(model, tmp_path, device=device, **SETTINGS)]
    walk(model, trackers[0], 1, 25)
    end(trackers)
    assert times(tmp_path) == [(10, False), (20, False), (24, True)]
    for snapshot in read_directory(tmp_path)[-2:]:
        updates = range(2, 25, 2)
        exact = exact_average(VALUES[2:25:2].numpy(), snapshot.info.sigma_rel, [float(t) for t in updates])
        assert np.abs(load_file(snapshot.path)["weight"].numpy() - exact).max() < 1e-6


def test_without_threads_to_begin_the_end_writes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 and later begin none in what runs at exit."""
    model = matrix()
    tracker = PostHocEMA.from_model(model, tmp_path, **SETTINGS)
    walk(model, tracker, 1, 5)  # no snapshot so far: there is no thread that writes

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as ending:
        ending.setattr(threading.Thread, "start", refuse)
        pipeline.finish()
    assert times(tmp_path) == [(4, True)]


def test_nothing_new_is_not_written(tmp_path: Path) -> None:
    model = matrix()
    for last in (21, 20):
        with PostHocEMA.from_model(model, tmp_path / str(last), **SETTINGS) as tracker:
            walk(model, tracker, 1, last)
        assert times(tmp_path / str(last)) == [(10, False), (20, False)]
    with PostHocEMA.from_path(tmp_path / "20", model) as tracker:
        walk(model, tracker, 21, 21)
    assert times(tmp_path / "20") == [(10, False), (20, False)]


def test_a_last_snapshot_may_be_declined(tmp_path: Path) -> None:
    model = matrix()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, final_snapshot=False) as tracker:
        walk(model, tracker, 1, 15)
    with PostHocEMA.from_path(tmp_path, model, final_snapshot=False) as tracker:
        walk(model, tracker, 11, 25)
    assert times(tmp_path) == [(10, False), (20, False)]


def test_an_error_in_the_block_is_logged_with_the_last_snapshot(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = matrix()
    with pytest.raises(ZeroDivisionError), PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        walk(model, tracker, 1, 7)
        raise ZeroDivisionError
    assert times(tmp_path) == [(6, True)]
    assert "ZeroDivisionError ended the training at step 7" in caplog.text


def test_a_snapshot_can_be_asked_for(tmp_path: Path) -> None:
    model = matrix()
    tracker = PostHocEMA.from_model(model, tmp_path, **SETTINGS)
    with pytest.raises(NotReadyError, match="no update yet"):
        tracker.snapshot()
    walk(model, tracker, 1, 5)
    tracker.snapshot()
    assert times(tmp_path) == [(4, True)]
    before = [s.path.stat().st_ino for s in read_directory(tmp_path)]
    tracker.snapshot()
    assert [s.path.stat().st_ino for s in read_directory(tmp_path)] == before
    walk(model, tracker, 6, 10)
    tracker.snapshot()
    tracker.close()
    assert times(tmp_path) == [(4, True), (10, False)]
    with pytest.raises(NotReadyError, match="was closed"):
        tracker.snapshot()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"update_after_step": 20}, r"no snapshot: 0 updates .* update_after_step=20, checkpoint_every=10"),
        ({"final_snapshot": False}, r"no snapshot: 3 updates .* checkpoint_every=10, final_snapshot=False"),
    ],
)
def test_a_directory_that_stays_empty_says_why(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict, told: str
) -> None:
    model = matrix()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS | settings) as tracker:
        walk(model, tracker, 1, 7)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(told, record.message)


@pytest.mark.parametrize(("device", "max_checkpoints"), [("cpu", 3), ("model", None)])
def test_snapshots_in_between_change_no_byte_of_those_on_the_schedule(
    tmp_path: Path, device: str, max_checkpoints: int | None
) -> None:
    """Their headers have distances, the motion so far and what thinning has left: all without the others."""
    settings = {"max_checkpoints": max_checkpoints, "device": device}
    right = whole_run(tmp_path / "whole", **settings)
    model, last = matrix(), 0
    with PostHocEMA.from_model(model, tmp_path / "run", **SETTINGS | settings) as tracker:
        for step in (3, 8, 12, 19, 20, 44, 47, STEPS):
            walk(model, tracker, last + 1, step)
            tracker.snapshot()
            last = step
    assert scheduled(tmp_path / "run") == right


def test_a_stop_changes_no_byte_of_what_an_exact_resume_writes(tmp_path: Path) -> None:
    right = whole_run(tmp_path / "whole", max_checkpoints=3)
    model, last, state = matrix(), 0, None
    for step in (5, 16, 30, 33, STEPS):
        with PostHocEMA.from_model(model, tmp_path / "run", **SETTINGS, max_checkpoints=3) as tracker:
            if state is not None:
                tracker.load_state_dict(state)
            walk(model, tracker, last + 1, step)
            state, last = tracker.state_dict(), step
    assert scheduled(tmp_path / "run") == right
    assert not (tmp_path / "run" / "superseded").exists()


def test_an_average_that_is_due_is_written_where_it_lies_off_the_schedule(tmp_path: Path) -> None:
    """At call 10 the update is left out: what is due is the average of call 8, which was asked for before."""
    for name in ("whole", "run"):
        model = matrix()
        with PostHocEMA.from_model(model, tmp_path / name, **SETTINGS, on_nonfinite="skip") as tracker:
            walk(model, tracker, 1, 8)
            if name == "run":
                tracker.snapshot()
            walk(model, tracker, 9, 10, scale=float("nan"))
    assert scheduled(tmp_path / "run") == scheduled(tmp_path / "whole")
    assert times(tmp_path / "run") == [(8, False)]


def test_snapshots_in_between_go_first(tmp_path: Path) -> None:
    """They stay while there is room, the latest of them longest; the newest of all always stays."""
    model = matrix()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, max_checkpoints=3) as tracker:
        walk(model, tracker, 1, 4)
        tracker.snapshot()
        walk(model, tracker, 5, 14)
        tracker.snapshot()
        assert times(tmp_path) == [(4, True), (10, False), (14, True)]
        walk(model, tracker, 15, 20)
        tracker.flush()
        assert times(tmp_path) == [(10, False), (14, True), (20, False)]
        walk(model, tracker, 21, 30)
        tracker.flush()
        assert times(tmp_path) == [(10, False), (20, False), (30, False)]
        walk(model, tracker, 31, 34)
    assert times(tmp_path) == [(10, False), (20, False), (30, False), (34, True)]


def test_a_last_snapshot_of_another_attempt_is_set_aside(tmp_path: Path) -> None:
    model, states = matrix(), []
    for scale in (1.0, 1.001):
        with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
            if states:
                tracker.load_state_dict(states[0])
            walk(model, tracker, tracker.step + 1, 12, scale if states else 1.0)
            states.append(tracker.state_dict())
            walk(model, tracker, 13, 15, scale)
            states.append(tracker.state_dict())
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        tracker.load_state_dict(states[1])  # of the first attempt at step 15; what lies there is the second one's
        assert times(tmp_path) == [(10, False)]
        walk(model, tracker, 16, 17)
    assert times(tmp_path) == [(10, False), (16, True)]
    assert len(list((tmp_path / "superseded").iterdir())) == 4
