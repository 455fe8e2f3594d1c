"""Work beside the training: the same values as without it, errors that come once, nothing lost."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from factories import averages_in, refuse_for_space
from tracker.runs import contents, step, train

from posthoc_cli import PostHocEMA, files
from posthoc_cli.errors import InvalidValueError, NonFiniteError, NotReadyError, WriteError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.tracker import model_tensors
from posthoc_cli.tracker import worker as pacing
from posthoc_cli.tracker.buffers import BlockReader, Staged
from posthoc_cli.tracker.snapshotter import Snapshotter
from posthoc_cli.tracker.worker import Worker

SETTINGS: dict[str, Any] = {"update_every": 2, "checkpoint_every": 4, "max_checkpoints": None}


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 3).bfloat16())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is clear, the worker cannot begin with the values that it was given."""
    gate, real = threading.Event(), Staged.reader
    monkeypatch.setattr(Staged, "reader", lambda *arguments: gate.wait(60) and real(*arguments))
    yield gate
    gate.set()


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is clear, no snapshot is written."""
    gate, real = threading.Event(), Snapshotter.write

    def write(recorder: Snapshotter, *arguments: Any) -> None:
        assert gate.wait(60)
        real(recorder, *arguments)

    monkeypatch.setattr(Snapshotter, "write", write)
    yield gate
    gate.set()


# --- the same values -------------------------------------------------------------------------------


def test_a_slow_worker_changes_no_byte(tmp_path: Path, gate: threading.Event) -> None:
    """Training has gone on, and its values have changed, before the worker looks at what it was given."""
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "beside", device="cpu", **SETTINGS) as tracker:
        for first in range(1, 40, 2):
            train(model, tracker, first, first + 1)
            step(model, 1000 + first)  # what nobody may see
            assert tracker._pipeline.now.averages.standing.step < first + 1
            gate.set()
            tracker.flush()
            gate.clear()
            step_back(model, 1000 + first)
        gate.set()
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "plain", device="model", **SETTINGS) as plain:
        for first in range(1, 40, 2):
            train(model, plain, first, first + 1)
            step(model, 1000 + first)
            step_back(model, 1000 + first)
    assert contents(tmp_path / "beside") == contents(tmp_path / "plain")
    assert len(contents(tmp_path / "plain")) == 20


def step_back(model: torch.nn.Module, number: int) -> None:
    """Undo `step`, up to rounding, which is the same in two runs."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(torch.randn(parameter.shape, generator=generator))
        for buffer in model.buffers():
            buffer.sub_(1)


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_snapshots_hold_the_averages_of_their_time_however_late_they_are_written(
    tmp_path: Path, device: str, slow_disk: threading.Event
) -> None:
    """Three more updates while the first snapshots wait for the disk."""
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "late", device=device, **SETTINGS) as late:
        train(model, late, 1, 4)
        train(model, late, 5, 7)
        slow_disk.set()
        train(model, late, 8, 20)
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "prompt", device="model", **SETTINGS) as prompt:
        for number in range(1, 21):
            train(model, prompt, number, number)
            prompt.flush()
    assert contents(tmp_path / "late") == contents(tmp_path / "prompt")
    assert [s.info.measurements for s in read_directory(tmp_path / "late")] == [
        s.info.measurements for s in read_directory(tmp_path / "prompt")
    ]


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_reader_in_the_same_process_waits_for_what_is_due(
    tmp_path: Path, device: str, slow_disk: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    monkeypatch.chdir(tmp_path)
    with PostHocEMA.from_model(model, tmp_path / "run", device=device, **SETTINGS) as tracker:
        train(model, tracker, 1, 4)
        found: list[PostHocEMA] = []
        reader = threading.Thread(target=lambda: found.append(PostHocEMA.from_path("run")))
        reader.start()
        reader.join(0.2)
        assert reader.is_alive()
        slow_disk.set()
        reader.join()
        assert found[0].t == 4


def test_snapshots_take_the_same_memory_each_time(tmp_path: Path) -> None:
    model = network()
    with PostHocEMA.from_model(model, tmp_path, device="model", **SETTINGS) as tracker:
        rooms = set()
        for number in range(1, 41, 4):
            train(model, tracker, number, number + 3)
            tracker.flush()
            (room,) = tracker._pipeline._rooms
            rooms.add(id(room.recent[0].flats[0]))
        assert len(rooms) == 1


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_wait_for_the_disk_that_is_interrupted_has_counted_nothing(
    tmp_path: Path, device: str, slow_disk: threading.Event
) -> None:
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "cut", device=device, **SETTINGS) as tracker:
        train(model, tracker, 1, 7)
        step(model, 8)
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt), interrupted(after=0.2):
            tracker.update_(model)
        assert time.monotonic() - started < 30  # the disk would have taken 60 s
        assert tracker.step == 7
        slow_disk.set()
        tracker.update_(model)
        train(model, tracker, 9, 12)
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "plain", device=device, **SETTINGS) as plain:
        train(model, plain, 1, 12)
    assert contents(tmp_path / "cut") == contents(tmp_path / "plain")


@contextmanager
def interrupted(after: float) -> Iterator[None]:
    """Raise KeyboardInterrupt in the block after so many seconds."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- errors ----------------------------------------------------------------------------------------


def test_a_value_that_is_not_finite_is_raised_by_the_next_update_however_slow_the_worker_is(
    tmp_path: Path, gate: threading.Event
) -> None:
    model = torch.nn.Linear(3, 2)
    with PostHocEMA.from_model(model, tmp_path, device="cpu", update_every=2, checkpoint_every=100) as tracker:
        gate.set()
        train(model, tracker, 1, 3)
        tracker.flush()
        gate.clear()
        kept = model.weight.detach().clone()
        with torch.no_grad():
            model.weight[0, 0] = torch.nan
        tracker.update_(model)
        with torch.no_grad():
            model.weight.copy_(kept)
        tracker.update_(model)
        threading.Timer(0.2, gate.set).start()  # it has not come so far when the call begins
        with pytest.raises(NonFiniteError, match="'weight': holds nan or infinity at step 4"):
            tracker.update_(model)
        tracker.update_(model)  # raised once
        state = tracker.state_dict()
    assert (state["step"], state["averages_step"], state["updates"]) == (7, 6, 2)


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_write_that_fails_is_raised_once_at_the_next_call_which_does_its_work(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    with PostHocEMA.from_model(model, tmp_path, device=device, **SETTINGS) as tracker:
        with monkeypatch.context() as fault:
            fault.setattr(files.system, "fsync", refuse_for_space)
            train(model, tracker, 1, 4)
            tracker._pipeline.flush()  # type: ignore[union-attr]  # it has failed by now, and nobody knows
        step(model, 5)
        with pytest.raises(WriteError, match="no space left"):
            tracker.update_(model)
        assert tracker.step == 5
        train(model, tracker, 6, 8)
    assert {s.info.t for s in read_directory(tmp_path)} == {8}


def test_a_write_that_failed_is_raised_later_where_the_next_call_fails_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        with monkeypatch.context() as fault:
            fault.setattr(files.system, "fsync", refuse_for_space)
            train(model, tracker, 1, 4)
            tracker._pipeline.flush()  # type: ignore[union-attr]
        with pytest.raises(InvalidValueError, match="pass it at every call or at none"):
            tracker.update_(model, t=5.0)
        with pytest.raises(WriteError, match="no space left"):
            tracker.update_(model)
        assert tracker.step == 5
        train(model, tracker, 6, 8)


def test_an_error_in_the_block_is_not_hidden_by_one_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    monkeypatch.setattr(files.system, "fsync", refuse_for_space)
    with (
        pytest.raises(ZeroDivisionError),
        PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker,
    ):
        train(model, tracker, 1, 4)
        raise ZeroDivisionError
    assert "no space left" in caplog.text


def test_two_threads_must_not_call_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inside, go_on, real = network(), threading.Event(), threading.Event(), model_tensors.collect_tensors

    def wait(*arguments: Any, **keywords: Any) -> Any:
        inside.set()
        assert go_on.wait(60)
        return real(*arguments, **keywords)

    with PostHocEMA.from_model(model, tmp_path, **(SETTINGS | {"update_every": 1})) as tracker:
        monkeypatch.setattr(model_tensors, "collect_tensors", wait)
        other = threading.Thread(target=tracker.update_, args=(model,))
        other.start()
        assert inside.wait(60)
        with pytest.raises(NotReadyError, match="another thread is calling"):
            tracker.update_(model)
        go_on.set()
        other.join()
        assert tracker.step == 1


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=r"'cpu' .* or 'model'"):
        PostHocEMA.from_model(network(), tmp_path, device="cuda")


SCRIPT = """
import os, sys, torch
from posthoc_cli import PostHocEMA
model = torch.nn.Linear(700, 700)
tracker = PostHocEMA.from_model(model, sys.argv[1], update_every=1, checkpoint_every=3, device=sys.argv[2])
for _ in range(7):
    tracker.update_(model)
if len(sys.argv) > 3 and os.fork() == 0:
    sys.exit()
raise SystemExit(7)
"""


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("fork", [[], ["fork"]])
def test_a_process_that_ends_finishes_what_is_under_way(tmp_path: Path, device: str, fork: list[str]) -> None:
    """Also what a job would have begun, and the last snapshot; a child that was forked has nothing to finish."""
    assert forked.run(SCRIPT, tmp_path, device, *fork).code == 7
    assert [s.info.t for s in read_directory(tmp_path)] == [3, 3, 6, 6, 7, 7]


def test_threads_end_with_their_tracker(tmp_path: Path) -> None:
    model = network()
    before = set(threading.enumerate())
    tracker = PostHocEMA.from_model(model, tmp_path, device="cpu", **SETTINGS)
    train(model, tracker, 1, 8)
    tracker.flush()
    begun = set(threading.enumerate()) - before
    assert len(begun) == 2
    del tracker
    for thread in begun:
        thread.join(60)
        assert not thread.is_alive()


# --- waiting ---------------------------------------------------------------------------------------


def test_a_worker_that_falls_behind_is_waited_for_and_no_update_is_dropped(
    tmp_path: Path, gate: threading.Event
) -> None:
    model = network()
    with PostHocEMA.from_model(model, tmp_path, device="cpu", update_every=1, checkpoint_every=100) as tracker:
        train(model, tracker, 1, 1)  # the worker has the first update, and holds on to it
        second = threading.Thread(target=train, args=(model, tracker, 2, 2))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        gate.set()
        second.join()
        train(model, tracker, 3, 20)
        assert tracker.state_dict()["averages_step"] == 20


def test_training_that_waits_is_told_so_once_with_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of 3 s where one comes after every second of training: every 40th step instead of every 10th."""
    now = [0.0]
    monkeypatch.setattr(pacing.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pacing, "PATIENCE", 10.0)
    pace = pacing.Pace("an update", "update_every", lambda factor: pacing.divisor(1000, 10 * factor))

    def come(training: float, waits: float, job: float) -> None:
        now[0] += training
        with pace.waiting():
            now[0] += waits
        pace.warn(stacklevel=1)
        with pace.working():
            now[0] += job
        now[0] -= job  # it is done beside

    come(1, 0, 3)
    for _ in range(4):
        come(1, 2, 3)
    with pytest.warns(
        RuntimeWarning, match=r"an update takes 3 s .* every 1 s: .* waited 10 s .*update_every=40 would"
    ):
        come(1, 2, 3)
    come(1, 2, 3)  # warns once: warnings are errors here


def test_errors_of_a_worker_come_one_by_one_and_in_order() -> None:
    worker = Worker("test")

    def fail(number: int) -> None:
        raise WriteError(28, f"the {number}th")

    for number in range(5):
        worker.submit(lambda number=number: fail(number))
    worker.wait()
    for number in range(5):
        assert str(worker.take_error()).endswith(f"the {number}th")
    assert worker.take_error() is None
    worker.close()


ENDS = """
import sys, threading, torch
from concurrent.futures import thread
from posthoc_cli import PostHocEMA
from posthoc_cli.tracker.buffers import Staged
real = Staged.reader
def late(*arguments):
    while not thread._shutdown:  # the interpreter has begun to end
        threading.Event().wait(0.01)
    return real(*arguments)
model = torch.nn.Linear(2, 2)
tracker = PostHocEMA.from_model(model, sys.argv[1], device="cpu", update_every=1, checkpoint_every=1)
Staged.reader = late
tracker.update_(model)
"""


def test_a_process_that_ends_before_its_averages_are_updated_writes_their_snapshots(tmp_path: Path) -> None:
    assert forked.check(ENDS, tmp_path).err == ""
    assert {s.info.t for s in read_directory(tmp_path)} == {1}


FORKS = """
import os, signal, sys, torch
from posthoc_cli import PostHocEMA
from posthoc_cli.errors import NotReadyError
model = torch.nn.Linear(2, 2)
tracker = PostHocEMA.from_model(model, sys.argv[1], device=sys.argv[2], update_every=1, checkpoint_every=1)
tracker.update_(model)
child = os.fork()
if not child:
    signal.alarm(60)
    for call in (lambda: tracker.update_(model), tracker.flush, tracker.state_dict):
        try:
            call()
        except NotReadyError:
            continue
        os._exit(1)
    tracker.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
tracker.update_(model)
tracker.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_forked_process_has_no_tracker_and_leaves_that_of_its_parent_alone(tmp_path: Path, device: str) -> None:
    """It has none of the threads, and would wait for them for good."""
    forked.check(FORKS, tmp_path, device)
    assert {s.info.t for s in read_directory(tmp_path)} == {1, 2}


# --- what is looked through once -------------------------------------------------------------------


def replace_storage(model: torch.nn.Module) -> None:
    model[0].weight.data = model[0].weight.data.clone()


def replace_parameter(model: torch.nn.Module) -> None:
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone())


def replace_buffer(model: torch.nn.Module) -> None:
    model[1].running_mean = model[1].running_mean.clone()


def replace_module(model: torch.nn.Module) -> None:
    new = torch.nn.Linear(5, 4)
    new.load_state_dict(model[0].state_dict())
    model[0] = new


def to_channels_last(model: torch.nn.Module) -> None:
    model[0].weight.data = model[0].weight.detach().t().contiguous().t()


@pytest.mark.parametrize(
    "change", [replace_storage, replace_parameter, replace_buffer, replace_module, to_channels_last]
)
@pytest.mark.parametrize("device", ["cpu", "model"])
def test_tensors_that_were_replaced_are_followed(tmp_path: Path, change: Any, device: str) -> None:
    for name, changes in (("changed", True), ("plain", False)):
        model = network()
        with PostHocEMA.from_model(model, tmp_path / name, device=device, **SETTINGS) as tracker:
            train(model, tracker, 1, 6)
            if changes:
                change(model)
            train(model, tracker, 7, 12)
    assert contents(tmp_path / "changed") == contents(tmp_path / "plain")


@pytest.mark.parametrize("device", ["cpu", "model"])
def test_a_tensor_turned_in_its_place_is_followed(tmp_path: Path, device: str) -> None:
    """The same storage, shape and dtype, and other values in every place but the diagonal."""
    model = torch.nn.Linear(3, 3)
    with PostHocEMA.from_model(model, tmp_path, device=device, update_every=1, checkpoint_every=100) as tracker:
        tracker.update_(model)
        model.weight.data = model.weight.data.t()
        for _ in range(300):
            tracker.update_(model)
        average = averages_in(tracker.state_dict())["0.05"]["weight"].float()
    torch.testing.assert_close(average, model.weight.detach(), rtol=1e-6, atol=1e-6)


def test_values_are_never_read_from_tensors_that_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was no memory to look at the new ones at the first try."""
    model = torch.nn.Linear(3, 2)
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=100) as tracker:
        tracker.update_(model)
        model.weight.data = torch.full((2, 3), 7.0)
        with monkeypatch.context() as fault:
            fault.setattr(BlockReader, "of_tensors", lambda *_: (_ for _ in ()).throw(MemoryError))
            with pytest.raises(MemoryError):
                tracker.update_(model)
        for _ in range(300):
            tracker.update_(model)
        average = averages_in(tracker.state_dict())["0.05"]["weight"].float()
    torch.testing.assert_close(average, torch.full((2, 3), 7.0))


def test_updates_inside_and_outside_of_inference_mode(tmp_path: Path) -> None:
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "mixed", **SETTINGS) as tracker:
        for number in range(1, 13):
            step(model, number)
            with torch.inference_mode(number < 5):
                tracker.update_(model)
    model = network()
    with PostHocEMA.from_model(model, tmp_path / "plain", **SETTINGS) as plain:
        train(model, plain, 1, 12)
    assert contents(tmp_path / "mixed") == contents(tmp_path / "plain")


def test_a_model_is_looked_through_once_while_it_stays_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        looked, real = [], model_tensors.collect_tensors

        def collect(own: torch.nn.Module, *arguments: Any, **keywords: Any) -> Any:
            looked.append(own)
            return real(own, *arguments, **keywords)

        monkeypatch.setattr(model_tensors, "collect_tensors", collect)
        train(model, tracker, 1, 20)
        assert looked == [model]


def test_a_tracker_does_not_keep_a_model_alive(tmp_path: Path) -> None:
    model = network()
    gone = weakref.ref(model)
    with PostHocEMA.from_model(model, tmp_path, **SETTINGS) as tracker:
        train(model, tracker, 1, 8)
        del model
        assert gone() is None
        assert tracker.state_dict()["step"] == 8
