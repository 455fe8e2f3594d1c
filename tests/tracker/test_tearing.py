"""Whatever reads averages or stops an update, what is there is of one update; `make torture` tries it long."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torture.tearing import Equal, Truth, averages_in, start, torn_reads, torn_states, wrong_state

from posthoc_cli.errors import NotReadyError
from posthoc_cli.tracker import averages
from posthoc_cli.tracker.worker import Job, Worker


def test_no_reader_sees_a_part_of_an_update(tmp_path: Path) -> None:
    tally = torn_reads(tmp_path, 120, random.Random(0))
    assert (tally.tried, tally.failures) == (120, [])


def test_no_signal_leaves_a_part_of_an_update(tmp_path: Path) -> None:
    tally = torn_states(tmp_path, 200, random.Random(0))
    assert (tally.tried, tally.failures) == (200, [])


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("way", ["state", "load", "update", "close"])
def test_calls_in_the_middle_of_an_update_are_after_or_before_it(
    tmp_path: Path, device: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another thread, while the worker has half of an update."""
    inside, go_on, real = threading.Event(), threading.Event(), torch.lerp
    truth, model = Truth(), Equal(1000)
    tracker = start(tmp_path, model, device, 100)

    def train(count: int) -> None:
        for _ in range(count):
            model.go_to(tracker.step + 1)
            tracker.update_(model)

    def lerp(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if inside.is_set() or arguments[0].dtype != torch.float32:
            return real(*arguments, **keywords)
        inside.set()
        assert go_on.wait(60)
        return real(*arguments, **keywords)

    train(20)
    state = tracker.state_dict()
    monkeypatch.setattr(averages.torch, "lerp", lerp)
    training = threading.Thread(target=train, args=(2,))
    training.start()
    assert inside.wait(60)
    found: list[Any] = []

    def call() -> None:
        calls = {
            "state": tracker.state_dict,
            "load": lambda: tracker.load_state_dict(state),
            "update": lambda: tracker.update_(model),
            "close": tracker.close,
        }
        try:
            found.append(calls[way]())
        except NotReadyError as error:
            found.append(error)

    other = threading.Thread(target=call)
    other.start()
    other.join(0.2)
    go_on.set()
    training.join(60)
    other.join(60)
    assert not training.is_alive()
    assert not other.is_alive()
    if way == "state":
        assert wrong_state(found[0], truth) == []
        assert found[0]["step"] in (21, 22)
    assert wrong_state(tracker.state_dict(), truth) == [] if way != "close" else True
    tracker.close()


def test_reading_changes_no_later_bit(tmp_path: Path) -> None:
    states = []
    for name, reads in (("read", True), ("plain", False)):
        model = Equal(500)
        with start(tmp_path / name, model, "model", 10) as tracker:
            for step in range(1, 141):
                model.go_to(step)
                tracker.update_(model)
                if reads:
                    tracker.state_dict()
                    tracker._live_sources()
            states.append(tracker.state_dict())
    for kind in ("totals", "recent"):
        for key, tensors in states[0][kind].items():
            assert all(torch.equal(value, states[1][kind][key][name]) for name, value in tensors.items())
    assert averages_in(states[0]).keys() == {"0.05", "0.28"}


def test_a_job_is_done_once_or_never() -> None:
    done: list[int] = []
    worker, hold = Worker("test"), threading.Event()
    worker.submit(lambda: hold.wait(60) and None)
    jobs = [Job(lambda number=number: done.append(number)) for number in range(3)]
    for job in jobs:
        worker.put(job)
    jobs[1].settle()  # not begun: withdrawn
    hold.set()
    worker.wait()
    for job in jobs:
        job.settle()  # again, and when it is done: returns at once
    assert done == [0, 2]
    worker.close()
