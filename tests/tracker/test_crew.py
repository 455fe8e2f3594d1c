"""Threads of our own for updates: none of torch's, none of its settings touched, and the same bits for any number."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors
from factories import averages_in

from posthoc_cli import PostHocEMA
from posthoc_cli.tracker import buffers
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.worker import Crew


@pytest.fixture
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "CPU_BLOCK", 1000)
    monkeypatch.setattr(buffers, "EXACT_BLOCK", 300)


@pytest.fixture
def _two_threads() -> None:
    torch.set_num_threads(2)  # conftest sets it to 1 for each test


@pytest.mark.usefixtures("_small_blocks")
@pytest.mark.parametrize("size", [2, 3, 7])
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
            for _ in range(40):  # more than a window: totals are added to as well
                for parameter in model.values():
                    parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
                tracker.update_(model)
            states.append(averages_in(tracker.state_dict()))
    for sigma_rel, average in states[0].items():
        assert_same_tensors(states[1][sigma_rel], average)


def test_every_item_is_done_once_and_by_several_threads() -> None:
    crew, barrier = Crew(3), threading.Barrier(3)
    done: list[tuple[int, int]] = []

    def work(item: int, thread: int) -> None:
        if item < 3:
            barrier.wait(60)  # three items are under way at once
        assert torch.get_num_threads() == 1 or thread == 0
        done.append((item, thread))

    crew.each(work, range(100))
    assert sorted(item for item, _ in done) == list(range(100))
    assert {thread for item, thread in done if item < 3} == {0, 1, 2}
    crew.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_any_thread_is_raised_when_nobody_works_any_more(failing: int) -> None:
    crew, barrier, working = Crew(2), threading.Barrier(2), []

    def work(item: int, thread: int) -> None:
        working.append(thread)
        barrier.wait(60)
        if thread == failing:
            raise MemoryError("none left")
        working.remove(thread)

    with pytest.raises(MemoryError, match="none left"):
        crew.each(work, range(2))
    assert working == [failing]
    crew.each(lambda *_: None, range(2))  # and goes on afterwards
    crew.close()


def test_a_crew_that_gets_no_thread_does_the_work_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done: list[int] = []
    crew = Crew(4)
    monkeypatch.setattr(threading.Thread, "start", refused)
    crew.each(lambda item, _: done.append(item), range(9))
    assert done == list(range(9))


@pytest.mark.usefixtures("_small_blocks", "_two_threads")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_threads_of_training_are_left_alone(
    device: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, during and after an update, in its own thread and in those that begin later."""
    seen: dict[str, list[int]] = {"averages": [], "training": [], "later": []}
    real = RunningAverages.update_

    def later() -> None:
        thread = threading.Thread(target=lambda: seen["later"].append(torch.get_num_threads()))
        thread.start()
        thread.join()

    def update_(*arguments: object) -> None:
        seen["averages"].append(torch.get_num_threads())
        later()
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunningAverages, "update_", update_)
    with PostHocEMA.from_model(
        model := torch.nn.Linear(60, 60), tmp_path, update_every=1, checkpoint_every=100, device=device
    ) as tracker:
        for _ in range(3):
            tracker.update_(model)
            seen["training"].append(torch.get_num_threads())
        assert tracker._pipeline._crew.size == 2
    later()
    assert seen == {"averages": [1] * 3, "training": [2] * 3, "later": [2] * 4}
    assert torch.get_num_threads() == 2
