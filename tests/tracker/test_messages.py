"""What a tracker's threads have to say is logged by the next call, and never by these threads."""

import errno
import logging
import threading

import forked
import pytest
import threadpoolctl
import torch
from snapshots.recorded import failing
from torch import nn
from tracker.runs import steps, track, update

from posthoc_cli.tracker import pipeline

IN_A_HANDLER = forked.program("call_in_a_handler")


@pytest.mark.parametrize(
    ("call", "level", "device", "said"),
    [
        ("close", "WARNING", "model", "no space left"),
        ("snapshot", "INFO", "cpu", "wrote"),
        ("update_", "WARNING", "cpu", "no space left"),
    ],
)
def test_a_signal_handler_within_a_handler_of_logs_may_call_a_tracker(
    tmp_path,
    call,
    level,
    device,
    said,
):
    """At INFO each snapshot has a message, and at any level a disk that is full."""
    done = forked.check(IN_A_HANDLER, tmp_path / "run", call, level, device)
    assert said in done.out
    assert done.out.endswith("goes on\n")


def test_no_thread_of_a_tracker_logs(tmp_path, caplog):
    """A buffer with nan, a snapshot, one that is thinned, a folder that cannot be removed."""
    caplog.set_level(logging.DEBUG)
    model = nn.BatchNorm1d(2)
    model.register_buffer("copied", torch.tensor(torch.nan))
    (tmp_path / ".ema-old.tmp").mkdir()
    for device in ("cpu", "model"):
        with track(
            model,
            tmp_path / device,
            checkpoint_every=1,
            max_checkpoints=1,
            device=device,
        ) as ema:
            update(ema, model, 8)
    for text in (
        "wrote",
        "tensor 'copied' holds nan, and is copied unchanged",
        "thinning: removing",
    ):
        assert text in caplog.text
    for record in caplog.records:
        assert record.thread == threading.main_thread().ident


def test_an_error_in_the_background_is_logged_at_the_latest_when_the_process_ends(tmp_path, caplog):
    model = nn.Linear(2, 2)
    ema = track(model, tmp_path, checkpoint_every=1)
    with failing("fsync", errno.ENOSPC):
        ema.update_(model)
        pipeline.finish()
    assert "in the background" in caplog.text
    assert "no space left" in caplog.text


@pytest.fixture
def _two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("_two_threads")
def test_where_no_thread_can_be_started_those_of_the_training_stay_as_many(tmp_path, monkeypatch):
    """As at the end of the process, or at a limit of threads: the calling thread does the work."""

    def refuse(_):
        raise RuntimeError("can't start new thread")

    def threads():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info()]

    before = threads()
    monkeypatch.setattr(threading.Thread, "start", refuse)
    model = nn.Linear(2, 2)
    ema = track(model, tmp_path, checkpoint_every=2)
    update(ema, model, 5)
    pipeline.finish()
    assert threads() == before
    assert torch.get_num_threads() == 2
    assert steps(tmp_path) == [2, 2, 4, 4, 5, 5]
