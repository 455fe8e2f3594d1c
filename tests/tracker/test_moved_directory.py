"""A directory that is moved, replaced or restored while a training writes to it: nothing is written
or deleted at its path any more, since what lies there belongs to another training."""

import errno
import shutil
from contextlib import suppress

import forked
import pytest
from checking import refused
from factories import OTHER_RUN_ID, RUN_ID, contents, write_snapshot
from snapshots.recorded import failing
from tracker.runs import Training, steps, track

from posthoc_cli import Run, files
from posthoc_cli.errors import LockedError, WriteError
from posthoc_cli.snapshots.directory import (
    LOCK_NAME,
    DirectoryLock,
    LockFile,
    remove_snapshot,
)

OTHER_TRAINING = """
import sys
import torch
from posthoc_cli import PostHocEMA
model = torch.nn.Linear(3, 2)
ema = PostHocEMA.from_model(model, sys.argv[1], update_every=1, checkpoint_every=2)
for _ in range(12):
    ema.update_(model)
ema.close()
"""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "parent" / "run"


@pytest.fixture
def training():
    return Training()


@pytest.fixture
def tracker(training, folder):
    """A training that keeps four times, of which one more snapshot drops one."""
    ema = track(training.model, folder, checkpoint_every=2, max_checkpoints=4)
    training.run(8, ema)
    ema.flush()
    yield ema
    with suppress(LockedError, WriteError):  # its last snapshot
        ema.close()


def other_training(folder):
    forked.check(OTHER_TRAINING, folder)


def move(folder):
    folder.rename(folder.with_name("run-old"))


def start_another_in_its_place(folder):
    move(folder)
    other_training(folder)


def make_again(folder):
    move(folder)
    folder.mkdir()


def restore_a_backup(folder):
    """With the files of the same run and a lock file of its own."""
    move(folder)
    shutil.copytree(folder.with_name("run-old"), folder)


def move_the_parent(folder):
    folder.parent.rename(folder.parent.with_name("parent-old"))
    other_training(folder)


def link_to_another(folder):
    move(folder)
    other_training(folder.with_name("other"))
    folder.symlink_to("other")


def delete_the_lock(folder):
    (folder / LOCK_NAME).unlink()


def take_over(folder):
    """A second training continues the run, after the lock file was deleted."""
    (folder / LOCK_NAME).unlink()
    forked.check(OTHER_TRAINING.replace("update_every", "resume=0, update_every"), folder)


@pytest.mark.parametrize(
    "change",
    [
        start_another_in_its_place,
        make_again,
        restore_a_backup,
        move_the_parent,
        link_to_another,
        delete_the_lock,
        take_over,
    ],
)
def test_nothing_is_written_or_deleted_in_a_directory_that_is_another_one_now(
    tmp_path, folder, training, tracker, change
):
    change(folder)
    before = contents(tmp_path)
    with refused(folder, kind=LockedError):
        training.run(10, tracker)
        tracker.flush()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("operation", ["open_new", "write", "fsync", "link"])
def test_a_directory_that_another_training_takes_while_a_snapshot_is_written_stays_its_own(
    folder, training, tracker, operation, monkeypatch
):
    own = getattr(files.system, operation)

    def move_first(*arguments):
        if not folder.with_name("run-old").exists():
            start_another_in_its_place(folder)
            move_first.before = contents(folder)
        return own(*arguments)

    monkeypatch.setattr(files.system, operation, move_first)
    with pytest.raises((LockedError, WriteError)) as raised:
        training.run(10, tracker)
        tracker.flush()
    assert raised.value.subject.startswith(str(folder))
    assert contents(folder).items() >= move_first.before.items()
    assert steps(folder) == sorted(2 * [2, 4, 6, 8, 10, 12])


def test_thinning_stops_when_the_directory_is_moved_between_two_deletions(
    folder, training, tracker, monkeypatch
):
    remove = files.system.unlink

    def move_afterwards(path):
        remove(path)
        if not path.name.startswith(".ema-") and folder.exists():
            start_another_in_its_place(folder)
            move_afterwards.before = contents(folder)

    monkeypatch.setattr(files.system, "unlink", move_afterwards)
    with refused(folder, kind=LockedError):
        training.run(10, tracker)
        tracker.flush()
    assert contents(folder) == move_afterwards.before


def test_a_directory_that_is_moved_back_is_written_to_again(folder, training):
    tracker = track(training.model, folder, checkpoint_every=2)
    training.run(2, tracker)
    tracker.flush()
    move(folder)
    with refused(folder, "step 4 ", kind=WriteError):
        training.run(4, tracker)
        tracker.flush()
    folder.with_name("run-old").rename(folder)
    training.run(6, tracker)
    tracker.close()
    assert steps(folder) == [2, 2, 6, 6]


def test_a_directory_without_permission_to_write_loses_nothing(folder, training, tracker):
    before = contents(folder)
    faults = [failing(name, errno.EROFS) for name in ("open_new", "unlink")]
    with faults[0], faults[1], pytest.raises(WriteError, match="read-only"):
        training.run(10, tracker)
        tracker.flush()
    assert contents(folder) == before


def test_a_process_without_the_lock_knows_that_the_directory_was_replaced(tmp_path):
    """As those of a sharded training but the first."""
    folder = tmp_path / "run"
    folder.mkdir()
    with DirectoryLock(folder):
        follower = LockFile(folder)
        follower.check()
        move(folder)
        with pytest.raises(LockedError):
            follower.check()
        folder.mkdir()
        with DirectoryLock(folder), pytest.raises(LockedError):
            follower.check()


def test_a_file_that_another_run_has_put_in_place_of_a_snapshot_is_not_removed(tmp_path, caplog):
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, Training().state())
    (snapshot,) = Run(tmp_path).snapshots
    path.unlink()
    write_snapshot(tmp_path, 10, 0.05, OTHER_RUN_ID, Training().state())
    with DirectoryLock(tmp_path) as lock:
        remove_snapshot(snapshot, lock)
    assert path.exists()
    assert str(path) in caplog.text
