"""Whatever reads averages or stops an update, what is there is of one update; `make torture` tries it long."""

from __future__ import annotations

import random
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import assert_same_tensors
from torture.tearing import Equal, Truth, start, torn_reads, torn_states, wrong_state

from posthoc_cli.errors import NotReadyError
from posthoc_cli.tracker import averages


def test_no_reader_sees_a_part_of_an_update(tmp_path: Path) -> None:
    tally = torn_reads(tmp_path, 120, random.Random(0))
    assert (tally.tried, tally.failures) == (120, [])


def test_no_signal_leaves_a_part_of_an_update(tmp_path: Path) -> None:
    tally = torn_states(tmp_path, 200, random.Random(0))
    assert (tally.tried, tally.failures) == (200, [])


@pytest.mark.parametrize("device", ["cpu", "model"])
@pytest.mark.parametrize("way", ["state", "load", "update", "close"])
def test_calls_amid_an_update_are_after_or_before_it(
    tmp_path: Path, device: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another thread, while the worker has half of an update."""
    inside, go_on, real = threading.Event(), threading.Event(), torch.lerp
    truth, model, found = Truth(), Equal(1000), []
    tracker = start(tmp_path, model, device, 100)

    def train(count: int) -> None:
        for _ in range(count):
            model.go_to(tracker.step + 1)
            tracker.update_(model)

    def lerp(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if not inside.is_set() and arguments[0].dtype == torch.float32:
            inside.set()
            assert go_on.wait(60)
        return real(*arguments, **keywords)

    train(20)
    state = tracker.state_dict()
    calls = {
        "state": tracker.state_dict,
        "load": lambda: tracker.load_state_dict(state),
        "update": lambda: tracker.update_(model),
        "close": tracker.close,
    }

    def call() -> None:
        with suppress(NotReadyError):
            found.append(calls[way]())

    monkeypatch.setattr(averages.torch, "lerp", lerp)
    training, other = threading.Thread(target=train, args=(2,)), threading.Thread(target=call)
    training.start()
    assert inside.wait(60)
    other.start()
    other.join(0.2)
    go_on.set()
    for thread in (training, other):
        thread.join(60)
        assert not thread.is_alive()
    if way == "state":
        assert wrong_state(found[0], truth) == []
        assert found[0]["step"] in (21, 22)
    if way != "close":
        assert wrong_state(tracker.state_dict(), truth) == []
    tracker.close()


def test_reading_changes_no_later_bit(tmp_path: Path) -> None:
    states = []
    for reads in (True, False):
        model = Equal(500)
        with start(tmp_path / str(reads), model, "model", 10) as tracker:
            for step in range(1, 141):
                model.go_to(step)
                tracker.update_(model)
                if reads and step > 1:
                    tracker.state_dict(sigma_rel=0.05)
                    tracker.state_dict()
            states.append(tracker.state_dict())
    for kind in ("totals", "recent"):
        assert states[0][kind].keys() == {"0.05", "0.28"}
        for key, tensors in states[0][kind].items():
            assert_same_tensors(states[1][kind][key], tensors)
