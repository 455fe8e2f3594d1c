"""Blocks with averaged weights that overlap: in two threads, or left in another order than
entered."""

import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import assert_same_tensors
from torch import nn
from tracker.runs import track

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import NotReadyError


def tracked(folder: Path, model: Any = None, **settings: Any) -> tuple[Any, PostHocEMA]:
    """Return a model after some steps, and its tracker."""
    if model is None:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = track(model, folder, **settings)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape)
        ema.update_(model)
    return model, ema


def evaluation(ema: PostHocEMA, model: Any, sigma_rel: float) -> Iterator[Any]:
    """Evaluate as a generator does that yields within the block."""
    with ema.model(model, sigma_rel) as averaged:
        yield averaged


def in_thread(work: Any) -> list[BaseException]:
    """Do work in another thread, and return its error."""
    errors = list[BaseException]()

    def run() -> None:
        try:
            work()
        except NotReadyError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


@pytest.mark.parametrize("part", ["all", "0", "wrapped"])
def test_a_block_is_refused_while_another_thread_has_one_of_the_same_tensors(
    tmp_path: Path,
    part: str,
) -> None:
    model, ema = tracked(tmp_path / "run")
    other = model
    if part == "0":
        other = model[0]
    elif part == "wrapped":
        other = nn.DataParallel(model)
    _, others = tracked(tmp_path / "other", other)

    def enter_other() -> None:
        with others.model(other, 0.05):
            pass

    raw = deepcopy(model.state_dict())
    with ema.model(model, 0.28):
        averaged = deepcopy(model.state_dict())
        (error,) = in_thread(enter_other)
        assert "another thread evaluates averaged weights of this model" in str(error)
        assert_same_tensors(model.state_dict(), averaged)
    assert_same_tensors(model.state_dict(), raw)
    assert model.training
    assert in_thread(enter_other) == []  # one after the other
    others.update_(other)


def test_blocks_of_different_models_may_be_open_in_several_threads(tmp_path: Path) -> None:
    one, first = tracked(tmp_path / "one")
    two, second = tracked(tmp_path / "two")
    raw = deepcopy(two.state_dict())
    with first.model(one, 0.28):
        assert in_thread(lambda: [*evaluation(second, two, 0.05)]) == []
    assert_same_tensors(two.state_dict(), raw)


@pytest.mark.parametrize("same", [True, False])
def test_blocks_left_in_another_order_are_undone_together(tmp_path: Path, same: bool) -> None:
    """The outer one of two generators ends first; the inner one is of the model or of a part."""
    model, ema = tracked(tmp_path / "run")
    part = model if same else model[0]
    _, inner_ema = tracked(tmp_path / "part", part)
    raw = deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    outer = evaluation(ema, model, 0.05)
    inner = evaluation(inner_ema, part, 0.28)
    next(outer)
    next(inner)
    with pytest.raises(NotReadyError, match="a block was left before one that was entered within"):
        next(outer)
    for _ in range(2):  # the inner one has nothing to undo any more
        assert_same_tensors(model.state_dict(), raw)
        assert [module.training for module in model.modules()] == modes
        assert next(inner, None) is None
    ema.update_(model)
    inner_ema.update_(part)


def test_nested_blocks_restore_what_was_around_them(tmp_path: Path) -> None:
    model, ema = tracked(tmp_path)
    raw = deepcopy(model.state_dict())
    with ema.model(model, 0.05):
        outer = deepcopy(model.state_dict())
        with ema.model(model, 0.28) as averaged:
            assert_same_tensors(averaged.state_dict(), ema.state_dict(0.28))
        inner = ema.model(model[0:2], 0.05)
        with pytest.raises(ZeroDivisionError), ema.model(model, 0.28), inner:
            raise ZeroDivisionError
        assert_same_tensors(model.state_dict(), outer)
    assert_same_tensors(model.state_dict(), raw)


def test_a_step_in_a_block_of_another_thread_is_refused(tmp_path: Path) -> None:
    model, ema = tracked(tmp_path)
    with ema.model(model, 0.28):
        (error,) = in_thread(lambda: ema.update_(model))
    assert "holds averaged weights now" in str(error)


class Shared(nn.Module):
    """A parameter whose rows are one memory, and one whose columns are."""

    def __init__(self) -> None:
        super().__init__()
        row = torch.ones(1, 4)
        column = torch.ones(3, 1)
        self.rows = nn.Parameter(row.expand(3, 4))
        self.columns = nn.Parameter(column.expand(3, 4))
        self.plain = nn.Parameter(torch.zeros(2))


def test_a_parameter_whose_elements_share_memory_has_its_values_again_after_the_block(
    tmp_path: Path,
) -> None:
    model = Shared()
    ema = track(model, tmp_path)
    for value in (1.0, 5.0):
        model.rows.data[0] = value
        model.columns.data[:, 0] = value
        ema.update_(model)
    pointers = [model.rows.data_ptr(), model.columns.data_ptr()]
    with ema.model(model, 0.28):
        assert 1 < float(model.rows.detach()[0, 0]) < 5
    for parameter in (model.rows, model.columns):
        assert torch.equal(parameter, torch.full((3, 4), 5.0))
        assert 0 in parameter.stride()
    assert [model.rows.data_ptr(), model.columns.data_ptr()] == pointers


def test_a_block_that_is_called_like_a_model_says_that_it_needs_with(tmp_path: Path) -> None:
    model, ema = tracked(tmp_path)
    needs_with = r"only within a `with` block; with ema\.model"
    batch = torch.ones(2, 3)
    for block in (ema.model(model, 0.1), ema.models(model, [0.1])["0.1"]):
        for arguments in ((batch,), ()):
            with pytest.raises(NotReadyError, match=needs_with):
                block(*arguments)


def test_a_block_that_is_kept_holds_the_present_average_whenever_it_is_entered(
    tmp_path: Path,
) -> None:
    model, ema = tracked(tmp_path)
    block = ema.model(model, 0.05)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.data += 1
        ema.update_(model)
        raw = deepcopy(model.state_dict())
        with block, block as averaged:
            found = deepcopy(averaged.state_dict())
        assert_same_tensors(found, ema.state_dict(0.05))
        assert_same_tensors(model.state_dict(), raw)
