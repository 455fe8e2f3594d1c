"""Snapshots off the schedule: the last one, at the end of a training, and those that the training
asks for."""

import gc
import shutil
from collections import defaultdict

import forked
import pytest
from checking import refused
from safetensors.torch import load_file
from tracker.runs import EITHER_DEVICE, Training, assert_near, track

from posthoc_cli import PostHocEMA, Run, files
from posthoc_cli.errors import LockedError, NotReadyError, RefusedCallError, WriteError
from posthoc_cli.tracker import pipeline

SETTINGS = {
    "update_every": 2,
    "checkpoint_every": 10,
    "checkpoint_dtype": None,
    "max_checkpoints": 3,
}


def begin(training, folder, **settings):
    return PostHocEMA.from_model(training.model, folder, **SETTINGS | settings)


def written(folder):
    """Return the time of each snapshot, equal for both profiles, with "off" if it is off the
    schedule."""
    found = defaultdict(list)
    for snapshot in Run(folder).snapshots:
        kind = " off" if snapshot.step % snapshot.schedule.checkpoint_every else ""
        found[snapshot.sigma_rel].append(f"{snapshot.t:g}{kind}")
    assert found[0.05] == found[0.28]
    return found[0.05]


def test_an_error_in_the_block_writes_a_last_snapshot(tmp_path):
    training = Training()
    with pytest.raises(ZeroDivisionError), begin(training, tmp_path) as tracker:
        training.run(25, tracker)
        raise ZeroDivisionError
    assert written(tmp_path) == ["10", "20", "24 off"]
    for snapshot in Run(tmp_path).snapshots[-2:]:
        exact = training.exact(snapshot.sigma_rel, range(2, 25, 2))
        assert_near(load_file(snapshot.path), exact)


@EITHER_DEVICE
def test_a_close_in_the_middle_of_an_update_is_refused_and_between_two_works(
    tmp_path,
    device,
    monkeypatch,
):
    """As by a handler of SIGTERM."""
    training = Training()
    tracker = begin(training, tmp_path, device=device)
    training.run(10, tracker)

    def handle(*_):
        with refused("close", kind=RefusedCallError):
            tracker.close()
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.DeviceStreams, "current", handle)
        training.run(12, tracker)
    tracker.close()
    assert written(tmp_path) == ["10", "12 off"]


def test_the_end_of_the_process_writes_the_last_snapshot_also_of_a_forgotten_tracker(tmp_path):
    training = Training()
    tracker = begin(training, tmp_path)
    training.run(25, tracker)
    del tracker
    gc.collect()
    pipeline.finish()
    assert written(tmp_path) == ["10", "20", "24 off"]


def test_a_training_without_an_update_says_that_it_leaves_no_snapshot(tmp_path, caplog):
    training = Training()
    with begin(training, tmp_path) as tracker:
        training.run(1, tracker)
        with refused("snapshot", kind=NotReadyError):
            tracker.snapshot()
    assert "no snapshot: the first update is at call 2 " in caplog.text


def test_snapshots_are_written_on_request_and_at_the_end_unless_there_is_no_new_update(tmp_path):
    training = Training()
    with begin(training, tmp_path) as tracker:
        training.run(4, tracker)
        tracker.snapshot()
        before = inodes(tmp_path)
        tracker.snapshot()
        assert inodes(tmp_path) == before
        training.run(21, tracker)
    expected = ["4 off", "10", "20"]
    assert written(tmp_path) == expected
    again = training.at(20)
    with PostHocEMA.from_path(tmp_path, again.model) as tracker:
        again.run(21, tracker)
    assert written(tmp_path) == expected


def inodes(folder):
    return {path.stat().st_ino for path in folder.glob("*.safetensors")}


INTERRUPTED = forked.program("interrupted_end")


def test_an_interrupt_while_the_exit_writes_loses_nothing(tmp_path):
    done = forked.check(INTERRUPTED, tmp_path, 1)
    assert "writing the last snapshots of" in done.err
    for name in ("one", "two", "three"):
        assert written(tmp_path / name) == ["1 off"]
    assert not [*tmp_path.rglob("*.tmp")]


def test_a_second_interrupt_while_the_exit_writes_says_what_is_lost(tmp_path):
    """A temporary file may stay until the next tracker of the directory."""
    done = forked.run(INTERRUPTED, tmp_path, 2)
    assert done.code == 130
    assert f"the last snapshots of {tmp_path}" in done.err
    assert "are lost" in done.err


FORKED = forked.program("forked_end")


def test_a_child_that_multiprocessing_forks_writes_its_last_snapshot(tmp_path):
    """Such a child ends without the functions of `atexit`."""
    forked.check(FORKED, tmp_path)
    assert written(tmp_path) == ["3", "6", "9", "10 off"]


@pytest.mark.parametrize("operation", ["open_new", "write", "link", "fsync_directory"])
def test_a_directory_that_is_deleted_while_a_snapshot_is_written_is_named(
    tmp_path,
    operation,
    monkeypatch,
):
    """By errors of this package, once for each time that is lost; the averages can be read."""
    folder = tmp_path / "run"
    training = Training()
    tracker = track(training.model, folder, checkpoint_every=2)
    training.run(3, tracker)
    tracker.flush()
    own = getattr(files.system, operation)

    def deleting(*arguments):
        shutil.rmtree(folder, ignore_errors=True)
        return own(*arguments)

    monkeypatch.setattr(files.system, operation, deleting)
    with pytest.raises((WriteError, LockedError)):
        training.run(4, tracker)
        tracker.flush()
    training.run(5, tracker)
    with refused(folder, "step 5 ", kind=WriteError):
        tracker.close()
    assert not folder.exists()
    assert tracker.state_dict(0.05)


def test_a_link_that_leads_elsewhere_later_does_not_divide_a_run(tmp_path):
    """As one to the newest run."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    latest = tmp_path / "latest"
    latest.symlink_to("first")
    training = Training()
    with track(training.model, latest / "ema", checkpoint_every=2) as tracker:
        training.run(3, tracker)
        latest.unlink()
        latest.symlink_to("second")
        training.run(6, tracker)
        assert_near(tracker.state_dict(0.05), training.exact(0.05, range(1, 7)))
    assert written(tmp_path / "first" / "ema") == ["2", "4", "6"]
