"""Work in the background of a training: the same values as without it, errors that are raised once,
nothing lost."""

import errno
import logging
import os
import re
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import deepcopy
from pathlib import Path
from unittest.mock import Mock

import forked
import pytest
import torch
from checking import heavy, refused
from device import DEVICE
from factories import info_of
from snapshots.recorded import failing
from torch import nn
from tracker.runs import EITHER_DEVICE, Training, contents, steps, times, track, wait_for_writers

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import NonFiniteError, RefusedCallError, WriteError
from posthoc_cli.tracker import background, pipeline

SETTINGS = {
    "update_every": 2,
    "checkpoint_every": 4,
    "max_checkpoints": None,
}


def begin(folder, device="model", **settings):
    training = Training()
    training.model[2].bfloat16()
    settings = SETTINGS | settings
    tracker = PostHocEMA.from_model(training.model, folder, device=device, **settings)
    return training, tracker


@pytest.fixture
def gate(monkeypatch):
    """Hold the averages' thread at the beginning of each update while the event is clear."""
    yield from held(monkeypatch, torch.linalg, "vector_norm")


@pytest.fixture
def slow_disk(monkeypatch):
    """Hold the writing of snapshots while the event is clear."""
    yield from held(monkeypatch, files.system, "open_new")


def held(monkeypatch, owner, name):
    gate = threading.Event()
    real = getattr(owner, name)

    def wait(*arguments, **keywords):
        gate.wait(60)
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, wait)
    yield gate
    gate.set()


def plain(folder, steps, device="model"):
    """Track a run in which every call waits for all background work."""
    training, tracker = begin(folder, device)
    with tracker:
        for number in range(1, steps + 1):
            training.run(number, tracker)
            tracker.flush()


def test_a_slow_worker_changes_no_byte(tmp_path, gate):
    """The model's values change before the worker begins with its copy of them."""
    training, tracker = begin(tmp_path / "background", "cpu")
    with tracker:
        for last in range(2, 41, 2):
            training.run(last, tracker)
            # values that no average may take in
            training.model.load_state_dict(Training(1).state())
            gate.set()
            tracker.flush()
            gate.clear()
            training.model.load_state_dict(training.path[-1])
        gate.set()
    plain(tmp_path / "plain", 40)
    assert contents(tmp_path / "background") == contents(tmp_path / "plain")
    assert len(contents(tmp_path / "plain")) == 20


def test_a_reader_in_the_same_process_waits_for_due_snapshots(tmp_path, slow_disk, monkeypatch):
    """The working directory changes in the meantime."""
    monkeypatch.chdir(tmp_path)
    training, tracker = begin(Path("run"), "cpu")
    with tracker, ThreadPoolExecutor(1) as other:
        monkeypatch.chdir("/")
        training.run(4, tracker)
        reader = other.submit(PostHocEMA.from_path, tmp_path / "run")
        time.sleep(0.2)
        assert reader.running()
        slow_disk.set()
        assert reader.result().t == 4


@EITHER_DEVICE
def test_an_interrupted_wait_for_disk_counts_nothing(tmp_path, device, slow_disk):
    """Three updates are taken in while the first snapshots wait, which hold the averages of their
    time."""
    training, tracker = begin(tmp_path / "cut", device)
    with tracker:
        training.run(7, tracker)
        training.run(8)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt), interrupted(after=0.2):
            tracker.update_(training.model)
        assert time.monotonic() - started < 30  # the disk would have taken 60 s
        assert tracker.step == 7
        slow_disk.set()
        tracker.update_(training.model)
        training.run(12, tracker)
    plain(tmp_path / "plain", 12, device)
    assert contents(tmp_path / "cut") == contents(tmp_path / "plain")


@contextmanager
def interrupted(after, times=1):
    """Raise KeyboardInterrupt in the block after some seconds, and after as many again."""

    def interrupt(*_):
        nonlocal times
        times -= 1
        if times:
            signal.setitimer(signal.ITIMER_REAL, after)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_interrupted_end_releases_the_directory_when_all_is_written(tmp_path, slow_disk):
    training, tracker = begin(tmp_path)
    training.run(4, tracker)
    threading.Timer(1.0, slow_disk.set).start()
    with pytest.raises(KeyboardInterrupt), interrupted(after=0.5):
        tracker.close()
    assert times(tmp_path) == {4}


def test_work_that_has_begun_is_waited_for_however_often_the_wait_is_interrupted():
    done = []
    proceed = threading.Event()

    def work():
        done.append(proceed.wait(60))

    with pytest.raises(KeyboardInterrupt), interrupted(after=0.2, times=2):
        threading.Timer(1.0, proceed.set).start()
        background.Worker("test").call(work)
    assert done == [True]


def test_an_error_in_another_thread_of_a_pool_is_raised():
    pool = background.ThreadPool(2)
    has_failed = threading.Event()

    def work(_, thread):
        if thread:
            has_failed.set()
            raise KeyError
        has_failed.wait(60)

    with pytest.raises(KeyError):
        pool.each(work, range(9))


def test_a_value_that_is_not_finite_is_raised_by_the_next_update_however_slow_the_worker_is(
    tmp_path,
    gate,
):
    training, tracker = begin(tmp_path, "cpu", checkpoint_every=100)
    model = training.model
    with tracker:
        gate.set()
        training.run(3, tracker)
        tracker.flush()
        gate.clear()
        model[0].weight.data[0, 0] = torch.nan
        tracker.update_(model)
        model.load_state_dict(training.path[-1])
        tracker.update_(model)
        # the worker has not seen the nan when the call begins
        threading.Timer(0.2, gate.set).start()
        with refused("parameter '0.weight'", "step 4", kind=NonFiniteError):
            tracker.update_(model)
        tracker.update_(model)  # raised once
        assert info_of(tracker.state_dict())["standing"]["step"] == 6


def test_a_call_from_another_thread_waits_for_the_end_of_an_update(tmp_path, gate):
    training, tracker = begin(tmp_path)
    with tracker, ThreadPoolExecutor(2) as others:
        updates = others.submit(training.run, 2, tracker)
        time.sleep(0.2)
        read = others.submit(tracker.state_dict)
        time.sleep(0.2)
        assert not read.done()
        gate.set()
        updates.result()
        assert info_of(read.result())["step"] == 2


def test_a_call_within_a_call_of_its_own_thread_is_refused_at_once(tmp_path, slow_disk):
    """As from a signal handler; the call goes on."""
    training, tracker = begin(tmp_path)
    with tracker:
        training.run(4, tracker)
        subjects = []

        def handle(*_):
            for call in (tracker.flush, tracker.state_dict, tracker.close):
                try:
                    call()
                except RefusedCallError as error:
                    subjects.append(error.subject)
            slow_disk.set()

        before = signal.signal(signal.SIGALRM, handle)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            tracker.flush()
        finally:
            signal.signal(signal.SIGALRM, before)
        assert subjects == ["flush", "state_dict", "close"]
    assert times(tmp_path) == {4}


@EITHER_DEVICE
def test_a_write_that_fails_is_raised_once_at_the_next_call_which_does_its_work(tmp_path, device):
    """A call that fails itself is none."""
    training, tracker = begin(tmp_path, device)
    with tracker:
        with failing("fsync", errno.ENOSPC):
            training.run(4, tracker)
            # the write has failed when this returns, and no call has raised its error
            wait_for_writers(tmp_path)
        with refused("t"):
            tracker.update_(training.model, t=5.0)
        with pytest.raises(WriteError, match="no space left"):
            training.run(5, tracker)
        assert tracker.step == 5
        training.run(8, tracker)
    assert times(tmp_path) == {8}


@EITHER_DEVICE
def test_errors_of_a_closed_tracker_are_raised_once(tmp_path, device):
    """A due snapshot has failed, and so has the last one."""
    training, tracker = begin(tmp_path, device)
    with failing("fsync", errno.ENOSPC):
        with suppress(WriteError):  # an update raises the first one if it has failed by then
            training.run(6, tracker)
        with pytest.raises(WriteError, match="no space left"):
            tracker.close()
    for _ in range(2):
        assert tracker.state_dict(0.05)
        tracker.flush()
        tracker.close()


def test_what_a_killed_write_has_left_is_removed_when_it_is_old_enough(tmp_path):
    """The training goes on at once, when another process could still be writing the file."""
    training, tracker = begin(tmp_path)
    with tracker:
        left = tmp_path / ".ema-0123456789abcdef.tmp"
        left.write_bytes(b"a part")
        training.run(4, tracker)
        tracker.flush()
        assert left.exists()
        os.utime(left, (0, 0))
        training.run(8, tracker)
        tracker.flush()
        assert not left.exists()


def test_an_error_in_the_block_is_not_hidden_by_one_of_the_disk(tmp_path, caplog):
    training, tracker = begin(tmp_path)
    with failing("fsync", errno.ENOSPC), pytest.raises(ZeroDivisionError), tracker:
        training.run(4, tracker)
        raise ZeroDivisionError
    assert "no space left" in caplog.text


FORKS = forked.program("forking_training")


@EITHER_DEVICE
def test_a_process_that_ends_finishes_background_work_which_a_forked_one_leaves_alone(
    tmp_path,
    device,
):
    """The work includes jobs that other jobs submit, and the last snapshot. A forked process has
    none of the tracker's threads, and would wait for them forever."""
    assert forked.run(FORKS, tmp_path, device).code == 7
    assert steps(tmp_path) == [3, 3, 6, 6, 9, 9, 12, 12]


def test_threads_end_with_their_tracker_which_does_not_keep_the_model_alive(tmp_path):
    before = set(threading.enumerate())
    training, tracker = begin(tmp_path, "cpu")
    reference = weakref.ref(training.model)
    training.run(8, tracker)
    tracker.flush()
    del training
    assert reference() is None
    begun = set(threading.enumerate()) - before
    assert len(begun) == 2
    del tracker
    for thread in begun:
        thread.join(60)
        assert not thread.is_alive()


@heavy
def test_a_training_that_waits_gets_one_warning_with_the_times(
    tmp_path,
    gate,
    slow_disk,
    monkeypatch,
    caplog,
):
    """One of updates, and one of snapshots."""
    monkeypatch.setattr(background, "PATIENCE", 0.2)
    training, tracker = begin(tmp_path, "cpu", update_every=1, checkpoint_every=1)
    # on a busy machine the training takes a while until it waits
    threading.Timer(1.0, gate.set).start()
    threading.Timer(2.0, slow_disk.set).start()
    with tracker:
        training.run(15, tracker)
    assert len(caplog.messages) == 2
    said = r"^training has waited for {} \(.*\) for [\d.]+ s of .* took \d"
    for warning, of in zip(caplog.messages, ("updates of the averages", "snapshots"), strict=True):
        assert re.match(said.format(of), warning)


@pytest.mark.usefixtures("small_tiles")
@EITHER_DEVICE
def test_tensors_that_were_replaced_are_followed(tmp_path, device):
    """By equal ones, also of other strides: the elements of a tile are then not in row-major
    order."""
    training, tracker = begin(tmp_path / "changed", device)
    first, norm, last = training.model
    with tracker:
        training.run(3, tracker)
        first.weight.data = first.weight.data.clone()
        training.run(5, tracker)
        first.weight = deepcopy(first.weight)
        training.run(7, tracker)
        norm.running_mean = norm.running_mean.clone()
        training.run(9, tracker)
        last = deepcopy(last)
        training.model[2] = last
        training.run(11, tracker)
        columns = first.weight.data.t().contiguous()
        first.weight.data = columns.t()
        last.weight.data = last.weight.data.repeat(1, 2)[:, :24]
        training.run(13, tracker)
    plain(tmp_path / "plain", 13, device)
    assert contents(tmp_path / "changed") == contents(tmp_path / "plain")


def test_updates_inside_and_outside_of_inference_mode(tmp_path):
    training, tracker = begin(tmp_path / "mixed")
    with tracker:
        for number in range(1, 13):
            with torch.inference_mode(number < 5):
                training.run(number, tracker)
    plain(tmp_path / "plain", 12)
    assert contents(tmp_path / "mixed") == contents(tmp_path / "plain")


@pytest.mark.cuda
def test_averages_on_the_host_use_the_cores_that_an_accelerator_leaves_idle(tmp_path, monkeypatch):
    """Also where torch has one thread, as under torchrun."""
    monkeypatch.setattr(pipeline, "worker_count", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    model = nn.Linear(2048, 2048, device=DEVICE)
    ema = track(model, tmp_path)
    ema.update_(model)
    ema.flush()
    names = {thread.name for thread in threading.enumerate()}
    assert {"ema-averages-1", "ema-averages-2"} <= names
    ema.close()


NO_STREAMS = [
    None,
    Mock(write=Mock(side_effect=OSError)),  # on a full disk
    Mock(write=Mock(side_effect=ValueError)),  # closed
]


@pytest.mark.parametrize("stream", NO_STREAMS)
def test_a_warning_that_cannot_be_printed_ends_no_training(tmp_path, monkeypatch, stream):
    """A service may have no stderr, and that of a long job may lie on a full disk."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr("sys.stderr", stream)
    training, tracker = begin(tmp_path)
    for _ in range(30):  # weights that stand still are warned of
        tracker.update_(training.model)
    tracker.close()
    assert times(tmp_path) == {*range(4, 29, 4), 30}
