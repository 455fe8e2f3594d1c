"""Snapshots off the schedule: the last one, at the end of a training, and those that the training
asks for."""

import gc
import shutil
from collections import defaultdict
from pathlib import Path

import forked
import pytest
from safetensors.torch import load_file
from tracker.runs import Training, assert_near, contents, steps, track

from posthoc_cli import PostHocEMA, Run, files
from posthoc_cli.errors import LockedError, NonFiniteError, NotReadyError, WriteError
from posthoc_cli.snapshots.directory import DirectoryLock
from posthoc_cli.tracker import pipeline

SETTINGS: dict = {
    "update_every": 2,
    "checkpoint_every": 10,
    "checkpoint_dtype": None,
    "max_checkpoints": 3,
}


def begin(training: Training, folder: Path, **settings: object) -> PostHocEMA:
    return PostHocEMA.from_model(training.model, folder, **SETTINGS | settings)


def written(folder: Path) -> list[str]:
    """Return the time of each snapshot, equal for both profiles, with "off" if it is off the
    schedule."""
    found = defaultdict[float, list[str]](list)
    for snapshot in Run(folder).snapshots:
        kind = " off" if snapshot.off_schedule else ""
        found[snapshot.sigma_rel].append(f"{snapshot.t:g}{kind}")
    assert found[0.05] == found[0.28]
    return found[0.05]


def off_schedule(folder: Path) -> list[str]:
    return [time for time in written(folder) if time.endswith("off")]


@pytest.mark.parametrize(
    ("end", "device"),
    [
        ("block", "model"),
        ("error", "cpu"),
        ("process", "model"),
        ("forgotten", "cpu"),
    ],
)
def test_the_end_writes_a_last_snapshot(tmp_path: Path, end: str, device: str) -> None:
    training = Training()
    tracker = begin(training, tmp_path, device=device)
    training.run(25, tracker)
    if end == "block":
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
    assert written(tmp_path) == ["10", "20", "24 off"]
    for snapshot in Run(tmp_path).snapshots[-2:]:
        exact = training.exact(snapshot.sigma_rel, range(2, 25, 2))
        assert_near(load_file(snapshot.path), exact)


def test_snapshots_are_written_on_request_and_at_the_end_unless_there_is_no_new_update(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    training = Training()
    with begin(training, tmp_path / "short") as tracker:
        training.run(1, tracker)
    assert "short: no snapshot: the first update is at call 2 of update_" in caplog.text
    training = Training()
    with begin(training, tmp_path) as tracker:
        with pytest.raises(NotReadyError, match="no update yet"):
            tracker.snapshot()
        training.run(4, tracker)
        tracker.snapshot()
        assert written(tmp_path) == ["4 off"]
        before = inodes(tmp_path)
        tracker.snapshot()
        assert inodes(tmp_path) == before
        training.run(21, tracker)
    again = training.at(20)
    expected = ["4 off", "10", "20"]
    assert written(tmp_path) == expected
    with PostHocEMA.from_path(tmp_path, again.model) as tracker:
        again.run(21, tracker)
    assert written(tmp_path) == expected


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("device", "max_checkpoints"),
    [
        ("cpu", 3),
        ("model", None),
    ],
)
def test_snapshots_off_the_schedule_change_no_others(
    tmp_path: Path,
    device: str,
    max_checkpoints: int | None,
) -> None:
    """Headers hold distances, the motion so far and what thinning has left, none of them from those
    snapshots.

    A snapshot between two updates would add an update, see `test_continuing`.
    """
    for name in ("complete", "run"):
        training = Training()
        settings = {"max_checkpoints": max_checkpoints, "device": device}
        with begin(training, tmp_path / name, **settings) as tracker:
            for step in (2, 8, 12, 18, 20, 44, 46, 50):
                training.run(step, tracker)
                if name == "run":
                    tracker.snapshot()
    assert contents(tmp_path / "run") == contents(tmp_path / "complete")


def test_a_due_snapshot_replaces_the_one_off_the_schedule_of_its_time(tmp_path: Path) -> None:
    """The update at call 10 is refused: the average of call 8 is due, which a snapshot off the
    schedule holds."""
    for name in ("complete", "run"):
        training = Training()
        with begin(training, tmp_path / name) as tracker:
            training.run(8, tracker)
            if name == "run":
                tracker.snapshot()
            training.model[0].weight.data.fill_(float("nan"))
            with pytest.raises(NonFiniteError):
                training.run(10, tracker)
                tracker.flush()
    assert contents(tmp_path / "run") == contents(tmp_path / "complete")
    assert written(tmp_path / "run") == ["8"]


def test_thinning_spares_snapshots_on_request(tmp_path: Path) -> None:
    """They stay while they are among the newest five times, as a checkpoint of the training may
    belong to them."""
    training = Training()
    with begin(training, tmp_path) as tracker:
        training.run(4, tracker)
        tracker.snapshot()
        assert written(tmp_path) == ["4 off"]
        training.run(14, tracker)
        tracker.snapshot()
        assert written(tmp_path) == ["4 off", "10", "14 off"]
        training.run(30, tracker)
        tracker.flush()
        assert written(tmp_path) == ["4 off", "10", "14 off", "20", "30"]
        training.run(40, tracker)
        tracker.flush()
        assert off_schedule(tmp_path) == ["14 off"]
        assert len(written(tmp_path)) == 4
        training.run(44, tracker)
    assert off_schedule(tmp_path) == ["14 off", "44 off"]


INTERRUPTED = """
import os, signal, sys, threading, time, torch
from posthoc_cli import PostHocEMA, files

folder, interrupts = sys.argv[1], int(sys.argv[2])
trackers = []
for name in ("one", "two", "three"):
    model = torch.nn.Linear(2, 2)
    trackers.append(PostHocEMA.from_model(model, f"{folder}/{name}", update_every=1))
    trackers[-1].update_(model)
own, sent, disk = files.system.fsync, [], threading.Lock()

def slow(descriptor):  # one after the other, each until its interrupt is answered
    with disk:
        if len(sent) < interrupts:
            said = os.fstat(2).st_size
            sent.append(os.kill(os.getpid(), signal.SIGINT))
            while os.fstat(2).st_size == said:
                time.sleep(0.01)
    own(descriptor)

files.system.fsync = slow
"""


@pytest.mark.parametrize("interrupts", [0, 1, 2])
def test_an_interrupt_while_the_exit_writes_loses_nothing_and_a_second_one_says_what_is_lost(
    tmp_path: Path,
    interrupts: int,
) -> None:
    done = forked.run(INTERRUPTED, tmp_path, interrupts)
    said = "writing the last snapshots of" in done.err
    assert said == (interrupts > 0)
    if interrupts < 2:
        assert done.code == 0
        for name in ("one", "two", "three"):
            assert steps(tmp_path / name) == [1, 1]
        assert not [*tmp_path.rglob("*.tmp")]
    else:  # a temporary file may stay until the next tracker of the directory
        assert done.code == 130
        assert f"the last snapshots of {tmp_path}" in done.err
        assert "are lost" in done.err


FORKED = """
import multiprocessing
import sys
import torch
from posthoc_cli import PostHocEMA

def train():
    model = torch.nn.Linear(2, 2)
    tracker = PostHocEMA.from_model(model, sys.argv[1], update_every=1, checkpoint_every=3)
    for _ in range(10):
        tracker.update_(model)

child = multiprocessing.get_context("fork").Process(target=train)
child.start()
child.join()
sys.exit(child.exitcode)
"""


def test_a_child_that_multiprocessing_forks_writes_its_last_snapshot(tmp_path: Path) -> None:
    """Such a child ends without the functions of `atexit`."""
    assert forked.run(FORKED, tmp_path).code == 0
    assert written(tmp_path) == ["3", "6", "9", "10 off"]


OPERATIONS = ["open_new", "write", "fsync", "link", "unlink", "fsync_directory"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_directory_that_is_deleted_while_a_snapshot_is_written_is_named(
    tmp_path: Path,
    operation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By errors of this package, once for each time that is lost; the averages can be read."""
    folder = tmp_path / "run"
    training = Training()
    tracker = track(training.model, folder, checkpoint_every=2)
    training.run(3, tracker)
    tracker.flush()
    own = getattr(files.system, operation)

    def deleting(*arguments: object) -> object:
        monkeypatch.setattr(files.system, operation, own)
        shutil.rmtree(folder)
        return own(*arguments)

    monkeypatch.setattr(files.system, operation, deleting)
    for last in (4, 6):
        training.run(last - 1, tracker)
        with pytest.raises(WriteError, match="run"):
            training.run(last, tracker)
            tracker.flush()
    training.run(7, tracker)
    with pytest.raises(WriteError, match="run: was deleted: the averages of step 7 are lost"):
        tracker.close()
    assert not folder.exists()
    assert tracker.state_dict(0.05)


def test_a_directory_that_is_deleted_and_made_again_is_locked_again(tmp_path: Path) -> None:
    """Else a second training could write to it; one that already does is named."""
    folder = tmp_path / "run"
    training = Training()
    tracker = track(training.model, folder, checkpoint_every=2)
    training.run(3, tracker)
    tracker.flush()
    for last in (4, 6):
        shutil.rmtree(folder)
        folder.mkdir()
        training.run(last, tracker)
        tracker.flush()
        with pytest.raises(LockedError, match="another tracker of this process"):
            DirectoryLock(folder)
        assert written(folder) == [f"{last}"]
    shutil.rmtree(folder)
    folder.mkdir()
    with DirectoryLock(folder), pytest.raises(LockedError, match="is writing here"):
        training.run(8, tracker)
        tracker.flush()
    tracker.close()
    assert written(folder) == ["8"]


def test_a_link_that_leads_elsewhere_later_does_not_divide_a_run(tmp_path: Path) -> None:
    """One to the newest run, in which another training writes from then on."""
    first = tmp_path / "first"
    second = tmp_path / "second"
    first.mkdir()
    second.mkdir()
    latest = tmp_path / "latest"
    latest.symlink_to(first)
    training = Training()
    tracker = track(training.model, latest / "ema", checkpoint_every=2)
    training.run(3, tracker)
    tracker.flush()
    latest.unlink()
    latest.symlink_to(second)
    other = Training()
    later = track(other.model, latest / "ema", checkpoint_every=2)
    training.run(6, tracker)
    other.run(6, later)
    tracker.close()
    later.close()
    assert written(first / "ema") == ["2", "4", "6"]
    assert written(second / "ema") == ["2", "4", "6"]
    exact = training.exact(0.05, range(1, 7))
    assert_near(tracker.state_dict(0.05), exact)
