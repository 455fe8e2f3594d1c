"""The end of training: a last snapshot, which changes nothing of what comes afterwards."""

from __future__ import annotations

import gc
import logging
import re
import threading
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


def run(folder: Path, last: int, **settings: Any) -> None:
    model = matrix()
    with PostHocEMA.from_model(model, folder, **SETTINGS | settings) as tracker:
        walk(model, tracker, 1, last)


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("end", ["close", "block", "process", "forgotten"])
def test_the_end_writes_what_was_not_written(tmp_path: Path, end: str, device: str) -> None:
    model = matrix()
    tracker = PostHocEMA.from_model(model, tmp_path, device=device, **SETTINGS)
    walk(model, tracker, 1, 25)
    if end == "close":
        tracker.close()
    elif end == "block":
        with tracker:
            pass
    else:
        if end == "forgotten":
            del tracker
            gc.collect()
        pipeline.finish()
    assert times(tmp_path) == [(10, False), (20, False), (24, True)]
    for snapshot in read_directory(tmp_path)[-2:]:
        exact = exact_average(VALUES[2:25:2].numpy(), snapshot.info.sigma_rel, range(2, 25, 2))
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


def test_nothing_new_is_not_written_and_a_last_snapshot_may_be_declined(tmp_path: Path) -> None:
    expected = [(10, False), (20, False)]
    for last, settings in ((21, {}), (20, {}), (25, {"final_snapshot": False})):
        run(tmp_path / str(last), last, **settings)
        assert times(tmp_path / str(last)) == expected
    for folder, last, settings in ((tmp_path / "20", 21, {}), (tmp_path / "25", 25, {"final_snapshot": False})):
        model = matrix()
        with PostHocEMA.from_path(folder, model, **settings) as tracker:
            walk(model, tracker, 21, last)
        assert times(folder) == expected


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
    run(tmp_path, 7, **settings)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(told, record.message)


@pytest.mark.parametrize(("device", "max_checkpoints"), [("cpu", 3), ("model", None)])
def test_snapshots_in_between_change_no_byte_of_those_on_the_schedule(
    tmp_path: Path, device: str, max_checkpoints: int | None
) -> None:
    """Their headers have distances, the motion so far and what thinning has left: all without the others."""
    settings = SETTINGS | {"max_checkpoints": max_checkpoints, "device": device}
    run(tmp_path / "whole", STEPS, **settings)
    model, last = matrix(), 0
    with PostHocEMA.from_model(model, tmp_path / "run", **settings) as tracker:
        for step in (3, 8, 12, 19, 20, 44, 47, STEPS):
            walk(model, tracker, last + 1, step)
            tracker.snapshot()
            last = step
    assert scheduled(tmp_path / "run") == scheduled(tmp_path / "whole")


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
    model, last = matrix(), 0
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, max_checkpoints=3) as tracker:
        for step, asked, expected in (
            (4, True, [(4, True)]),
            (14, True, [(4, True), (10, False), (14, True)]),
            (20, False, [(10, False), (14, True), (20, False)]),
            (30, False, [(10, False), (20, False), (30, False)]),
        ):
            walk(model, tracker, last + 1, step)
            tracker.snapshot() if asked else tracker.flush()
            assert times(tmp_path) == expected
            last = step
        walk(model, tracker, 31, 34)
    assert times(tmp_path) == [(10, False), (20, False), (30, False), (34, True)]


def test_a_last_snapshot_of_another_attempt_is_set_aside(tmp_path: Path) -> None:
    model, states = matrix(), []
    for scale in (1.0, 1.001):
        with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
            if states:
                tracker.load_state_dict(states[0])
            walk(model, tracker, tracker.step + 1, 12, scale)
            states.append(tracker.state_dict())
            walk(model, tracker, 13, 15, scale)
            states.append(tracker.state_dict())
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        tracker.load_state_dict(states[1])  # of the first attempt at step 15; what lies there is the second one's
        assert times(tmp_path) == [(10, False)]
        walk(model, tracker, 16, 17)
    assert times(tmp_path) == [(10, False), (16, True)]
    assert len(list((tmp_path / "superseded").iterdir())) == 4
