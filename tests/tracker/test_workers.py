"""The threads of updates: torch's own threads and settings are left alone; any number of threads gives the same bits.

`test_tearing` tries whether readers and signal handlers see the averages of one update.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import assert_same_tensors
from factories import averages_in
from tracker.test_tearing import Equal, start, wrong_state

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import NotReadyError
from posthoc_cli.tracker import averages, memory


@pytest.fixture
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "TILE", 256)  # a power of two


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("size", [2, 7])
def test_bits_are_the_same_for_any_number_of_threads(tmp_path: Path, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (37, 41), "b": (5003,), "c": (3,), "d": (64, 64), "e": ()}
    dtypes = {"b": torch.bfloat16, "d": torch.float64}
    states = []
    for threads in (1, size):
        torch.set_num_threads(threads)
        generator.manual_seed(0)
        values = {name: torch.empty(shape, dtype=dtypes.get(name)) for name, shape in shapes.items()}
        model = torch.nn.ParameterDict({name: torch.nn.Parameter(value) for name, value in values.items()})
        with PostHocEMA.from_model(model, tmp_path / str(threads), update_every=1, checkpoint_every=100) as tracker:
            for k in range(1, 81):  # folds of one update, which round, and of 32, which are exact; one window is open
                for parameter in model.values():
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
                tracker.update_(model, t=float(k if k < 15 else 10**6 + k))
            assert tracker.state_dict()["standing"]["window"] > 0
            states.append(averages_in(tracker.state_dict()))
    for sigma_rel, average in states[0].items():
        assert_same_tensors(states[1][sigma_rel], average)


@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_threads_of_training_are_left_alone(device: str | None, tmp_path: Path) -> None:
    """Their number stays, also in threads that start during an update or later."""
    torch.set_num_threads(2)  # conftest sets the number to 1 for each test
    seen: list[int] = []
    model = torch.nn.Linear(60, 60)
    with PostHocEMA.from_model(model, tmp_path, update_every=1, checkpoint_every=2, device=device) as tracker:
        for _ in range(4):
            tracker.update_(model)
            thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
            thread.start()
            thread.join()
            seen.append(torch.get_num_threads())
    assert {*seen, torch.get_num_threads()} == {2}


@pytest.mark.parametrize(
    ("device", "way"), [("cpu", "state"), ("model", "state"), ("model", "load"), ("cpu", "update"), ("model", "close")]
)
def test_a_call_during_an_update_sees_the_averages_before_or_after_it(
    tmp_path: Path, device: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call comes from another thread, while the worker is in the middle of an update."""
    inside, proceed, real = threading.Event(), threading.Event(), torch.lerp
    model, found = Equal(1000), []
    tracker = start(tmp_path, model, device, 100)

    def train(count: int) -> None:
        for _ in range(count):
            model.go_to(tracker.step + 1)
            tracker.update_(model)

    def lerp(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if not inside.is_set() and arguments[0].dtype == torch.float32:
            inside.set()
            assert proceed.wait(60)
        return real(*arguments, **keywords)

    train(22)  # the next update interpolates
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
    proceed.set()
    for thread in (training, other):
        thread.join(60)
        assert not thread.is_alive()
    if way == "state":
        assert wrong_state(found[0]) == []
        assert found[0]["clock"][-2] in (23, 24)
    if way != "close":
        assert wrong_state(tracker.state_dict()) == []
    tracker.close()


@pytest.mark.parametrize("begin", [0, 10**6])
def test_reading_changes_no_later_bit(tmp_path: Path, begin: int) -> None:
    states = []
    for reads in (True, False):
        model = Equal(500)
        with start(tmp_path / str(reads), model, "model", 10) as tracker:
            for step in range(1, 141):
                model.go_to(step)
                tracker.update_(model, begin + step)
                if reads and step > 1:
                    tracker.state_dict()
                    with tracker.model(model, 0.2):
                        pass
            state = tracker.state_dict()
            sets = {f"{k} {key}": tensors for k in ("high", "mean") for key, tensors in state[k].items()}
            states.append({f"{kind} {name}": tensor for kind, own in sets.items() for name, tensor in own.items()})
    assert_same_tensors(*states)
