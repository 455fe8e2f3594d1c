"""The end of a training, which writes a last snapshot and does not change later ones; and resuming from a directory:
by itself, from an earlier call, and exactly, from a state next to the snapshots."""

from __future__ import annotations

import gc
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import exact_average
from safetensors.torch import load_file
from tracker.runs import STEPS, VALUES, matrix, scheduled, times, tracked_error, walk

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import DirectoryError, InvalidValueError, ModelMismatchError, NotReadyError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker import pipeline

SETTINGS: dict = {"update_every": 2, "checkpoint_every": 10, "checkpoint_dtype": None, "max_checkpoints": 3}

pytestmark = pytest.mark.usefixtures("one_run_id")


def begun(folder: Path, last: int, t: float = 0.0, **settings: object) -> torch.nn.Linear:
    """Return the model of a run that was closed after step `last`."""
    model = matrix()
    with PostHocEMA.from_model(model, folder, **SETTINGS | settings) as tracker:
        walk(model, tracker, 1, last, t=t)
    return model


def error(tracker: PostHocEMA, last: int) -> float:
    return tracked_error(tracker, "weight", VALUES[2 : last + 1 : 2].numpy(), range(2, last + 1, 2))


def test_a_script_that_is_run_again_resumes_with_its_new_settings(tmp_path: Path) -> None:
    model, found = matrix(), []
    for first, last, every in ((1, 22, 10), (23, 36, 10), (37, STEPS, 20)):
        settings = SETTINGS | {"checkpoint_every": every}
        with PostHocEMA.from_model(model, tmp_path, **settings, resume="auto") as tracker:
            found.append(tracker.step)
            walk(model, tracker, first, last)
            assert tracker.settings.schedule.checkpoint_every == every
            assert error(tracker, last) < 1e-6
    assert found == [0, 22, 36]
    assert len({s.run_id for s in read_directory(tmp_path)}) == 1


def test_a_run_that_does_not_fit_is_not_resumed(tmp_path: Path) -> None:
    model, other = begun(tmp_path, 10), torch.nn.Linear(3, 4, bias=False)
    for call in (
        lambda: PostHocEMA.from_model(other, tmp_path, **SETTINGS, resume="auto"),
        lambda: PostHocEMA.from_path(tmp_path, other),
    ):
        hint = f"; the run in {re.escape(str(tmp_path))} is of another model; use its model, or another directory"
        with pytest.raises(ModelMismatchError, match=f"tensor 'weight': .*{hint}$"):
            call()
    for wrong, message in (
        ({"resume": "auto", "t_unit": "images"}, r"t_unit 'images': the run in .* counts 'steps'"),
        ({"resume": "auto", "sigma_rels": (0.1, 0.28)}, r"sigma_rels: 0\.1 is none of the tracked ones"),
        *(({"resume": value}, f"resume {value!r}: must be 'auto', a call") for value in ("yes", True, False)),
        *(({"resume": step}, f"resume {step}: must be a whole number") for step in (0, 3.5)),
        ({"resume": 5}, "resume 5: this call of update_ has no snapshot; calls that have one: 10"),
    ):
        with pytest.raises(InvalidValueError, match=message):
            PostHocEMA.from_model(model, tmp_path, **SETTINGS, **wrong)
    with pytest.raises(DirectoryError, match="no such directory"):
        PostHocEMA.from_model(model, tmp_path / "new", **SETTINGS, resume=10)


def test_a_run_that_was_killed_in_its_first_snapshots_begins_again(tmp_path: Path) -> None:
    model = begun(tmp_path, 10)
    read_directory(tmp_path)[-1].path.unlink()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, resume="auto") as tracker:
        assert (tracker.step, tracker.state_dict()["standing"]["t"]) == (0, 0)
        walk(model, tracker, 1, 12)
        assert error(tracker, 12) < 1e-6
    assert times(tmp_path) == {10, 12}
    assert len(list((tmp_path / "superseded").iterdir())) == 1


@pytest.mark.parametrize("way", ["from_path", "from_model"])
def test_resuming_from_an_earlier_call_sets_later_snapshots_aside(
    tmp_path: Path, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = matrix()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        walk(model, tracker, 1, 20)
        torch.nn.init.constant_(model.weight, 100.0)  # the abandoned part of the training
        for _ in range(15):
            tracker.update_(model)
    if way == "from_path":
        tracker = PostHocEMA.from_path(tmp_path, model, step=20)
    else:
        tracker = PostHocEMA.from_model(model, tmp_path, **SETTINGS, resume=20)
    assert times(tmp_path) == {10, 20, 30, 34}
    assert float(tracker.state_dict(sigma_rel=0.28)["weight"].max()) < 50
    assert tracker.state_dict()["clock"][-2] == tracker.step == 20
    with tracker:
        walk(model, tracker, 21, 30)
        assert error(tracker, 30) < 1e-6
    assert times(tmp_path) == {10, 20, 30}
    assert len(list((tmp_path / "superseded").iterdir())) == 4
    (text,) = (text for text in caplog.messages if "from t = 20: 4 snapshots" in text)
    assert re.search("later or of another attempt, moved to .* and 2 more$", text)


def written(folder: Path) -> list[tuple[float, bool]]:
    """Return the time of each snapshot, equal for both profiles, and whether it is off the schedule."""
    infos = read_directory(folder)
    narrow, wide = ([(i.t, i.off_schedule) for i in infos if i.sigma_rel == sigma_rel] for sigma_rel in (0.05, 0.28))
    assert narrow == wide
    return narrow


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("end", ["close", "block", "error", "process", "forgotten"])
def test_the_end_writes_a_last_snapshot(tmp_path: Path, end: str, device: str) -> None:
    model = matrix()
    tracker = PostHocEMA.from_model(model, tmp_path, device=device, **SETTINGS)
    walk(model, tracker, 1, 25)
    if end == "close":
        tracker.close()
    elif end == "block":
        with tracker:
            pass
    elif end == "error":
        with pytest.raises(ZeroDivisionError), tracker:
            raise ZeroDivisionError
    else:
        if end == "forgotten":
            del tracker
            gc.collect()
        pipeline.finish()
    assert written(tmp_path) == [(10, False), (20, False), (24, True)]
    for snapshot in read_directory(tmp_path)[-2:]:
        exact = exact_average(VALUES[2:25:2].numpy(), snapshot.sigma_rel, range(2, 25, 2))
        assert np.abs(load_file(snapshot.path)["weight"].numpy() - exact).max() < 1e-6


def test_the_end_writes_a_last_snapshot_without_starting_a_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.12 and later start no threads in functions that run at exit."""
    model = matrix()
    tracker = PostHocEMA.from_model(model, tmp_path, **SETTINGS)
    walk(model, tracker, 1, 5)  # no snapshot was due: there is no thread that writes them

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    with monkeypatch.context() as ending:
        ending.setattr(threading.Thread, "start", refuse)
        pipeline.finish()
    assert written(tmp_path) == [(4, True)]


def test_the_end_writes_nothing_without_a_new_update(tmp_path: Path) -> None:
    expected = [(10, False), (20, False)]
    for last in (20, 21):
        begun(tmp_path / str(last), last)
        assert written(tmp_path / str(last)) == expected
    model = matrix()
    with PostHocEMA.from_path(tmp_path / "20", model, step=20) as tracker:
        walk(model, tracker, 21, 21)
    assert written(tmp_path / "20") == expected


def test_snapshot_writes_one_unless_there_is_no_new_update(tmp_path: Path) -> None:
    model = matrix()
    tracker = PostHocEMA.from_model(model, tmp_path, **SETTINGS)
    with pytest.raises(NotReadyError, match="no update yet"):
        tracker.snapshot()
    walk(model, tracker, 1, 4)
    tracker.snapshot()
    assert written(tmp_path) == [(4, True)]
    before = [s.path.stat().st_ino for s in read_directory(tmp_path)]
    tracker.snapshot()
    assert [s.path.stat().st_ino for s in read_directory(tmp_path)] == before
    walk(model, tracker, 5, 10)
    tracker.snapshot()
    tracker.close()
    assert written(tmp_path) == [(4, True), (10, False)]
    with pytest.raises(NotReadyError, match="was closed"):
        tracker.snapshot()


@pytest.mark.parametrize(("device", "max_checkpoints"), [("cpu", 3), ("model", None)])
def test_snapshots_off_the_schedule_change_no_others(tmp_path: Path, device: str, max_checkpoints: int | None) -> None:
    """Headers hold distances, the motion so far and what thinning has left, none of them from those snapshots.

    A snapshot between two updates would add an update, see `test_place`.
    """
    settings = SETTINGS | {"max_checkpoints": max_checkpoints, "device": device}
    begun(tmp_path / "complete", STEPS, **settings)
    model, last = matrix(), 0
    with PostHocEMA.from_model(model, tmp_path / "run", **settings) as tracker:
        for step in (2, 8, 12, 18, 20, 44, 46, STEPS):
            walk(model, tracker, last + 1, step)
            tracker.snapshot()
            last = step
    assert scheduled(tmp_path / "run") == scheduled(tmp_path / "complete")


def test_a_due_snapshot_replaces_the_one_off_the_schedule_of_its_time(tmp_path: Path) -> None:
    """The update at call 10 is skipped: the average of call 8 is due, which a snapshot off the schedule holds."""
    for name in ("complete", "run"):
        model = matrix()
        with PostHocEMA.from_model(model, tmp_path / name, **SETTINGS, on_nonfinite="skip") as tracker:
            walk(model, tracker, 1, 8)
            if name == "run":
                tracker.snapshot()
            with pytest.warns(RuntimeWarning, match="update skipped"):
                walk(model, tracker, 9, 10, scale=float("nan"))
    assert scheduled(tmp_path / "run") == scheduled(tmp_path / "complete")
    assert written(tmp_path / "run") == [(8, False)]


def test_thinning_spares_snapshots_on_request(tmp_path: Path) -> None:
    """They stay while they are among the newest five times, as a checkpoint of the training may belong to them."""
    model, last = matrix(), 0
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        for step, asked, expected in (
            (4, True, [(4, True)]),
            (14, True, [(4, True), (10, False), (14, True)]),
            (30, False, [(4, True), (10, False), (14, True), (20, False), (30, False)]),
            (40, False, [(14, True), (20, False), (30, False), (40, False)]),
        ):
            walk(model, tracker, last + 1, step)
            tracker.snapshot() if asked else tracker.flush()
            assert written(tmp_path) == expected
            last = step
        walk(model, tracker, 41, 44)
    assert written(tmp_path) == [(14, True), (20, False), (30, False), (40, False), (44, True)]


def test_a_last_snapshot_of_another_attempt_is_set_aside(tmp_path: Path) -> None:
    model, states = matrix(), []
    for scale in (1.0, 1.001):
        with PostHocEMA.from_model(model, tmp_path, **SETTINGS, resume="auto") as tracker:
            if states:
                tracker.load_state_dict(states[0])
            walk(model, tracker, tracker.step + 1, 12, scale)
            states.append(tracker.state_dict())
            walk(model, tracker, 13, 15, scale)
            states.append(tracker.state_dict())
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS, resume="auto") as tracker:
        tracker.load_state_dict(states[1])  # of the first attempt at step 15; the snapshots are of the second attempt
        assert written(tmp_path) == [(10, False)]
        walk(model, tracker, 16, 17)
    assert written(tmp_path) == [(10, False), (16, True)]
    assert len(list((tmp_path / "superseded").iterdir())) == 4
