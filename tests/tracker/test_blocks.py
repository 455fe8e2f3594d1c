"""Blocks with averaged weights that overlap: in two threads, or left in another order than
entered."""

import threading
from copy import deepcopy

import pytest
import torch
from checking import assert_same_tensors
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal
from tracker.runs import track

from posthoc_cli.errors import NotReadyError


def tracked(folder, model=None, **settings):
    """Return a model after some steps, and its tracker."""
    if model is None:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = track(model, folder, **settings)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.data += torch.randn(parameter.shape)
        ema.update_(model)
    return model, ema


def evaluation(ema, model, sigma_rel):
    """Evaluate as a generator does that yields within the block."""
    with ema.model(model, sigma_rel) as averaged:
        yield averaged


def in_thread(work):
    """Do work in another thread, and return its error."""
    errors = []

    def run():
        try:
            work()
        except NotReadyError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return errors


def part_of(model):
    return model[0]


@pytest.mark.parametrize("other_of", [part_of, nn.DataParallel])
def test_a_block_is_refused_while_another_thread_has_one_of_the_same_tensors(tmp_path, other_of):
    model, ema = tracked(tmp_path / "run")
    other, others = tracked(tmp_path / "other", other_of(model))
    raw = deepcopy(model.state_dict())
    with ema.model(model, 0.28):
        averaged = deepcopy(model.state_dict())
        (error,) = in_thread(lambda: [*evaluation(others, other, 0.05)])
        assert "another thread evaluates averaged weights of this model" in str(error)
        (error,) = in_thread(lambda: others.update_(other))
        assert "holds averaged weights now" in str(error)
        assert_same_tensors(model.state_dict(), averaged)
    assert_same_tensors(model.state_dict(), raw)
    assert model.training
    assert (
        in_thread(
            lambda: [
                *evaluation(
                    others,
                    other,
                    0.05,
                )
            ]
        )
        == []
    )  # one after the other


def test_a_model_is_not_filled_for_good_within_a_block_whose_end_would_undo_it(tmp_path):
    model, ema = tracked(tmp_path / "run")
    with (
        ema.model(model, 0.28),
        pytest.raises(NotReadyError, match="load_into: the model holds averaged weights now"),
    ):
        ema.load_into(model, 0.05)


def test_blocks_of_different_models_may_be_open_in_several_threads(tmp_path):
    one, first = tracked(tmp_path / "one")
    two, second = tracked(tmp_path / "two")
    raw = deepcopy(two.state_dict())
    with first.model(one, 0.28):
        assert in_thread(lambda: [*evaluation(second, two, 0.05)]) == []
    assert_same_tensors(two.state_dict(), raw)


def itself(model):
    return model


@pytest.mark.parametrize("inner_of", [itself, part_of])
def test_blocks_left_in_another_order_are_undone_together(tmp_path, inner_of):
    """The outer one of two generators ends first; the inner one is of the model or of a part."""
    model, ema = tracked(tmp_path / "run")
    part, inner_ema = tracked(tmp_path / "part", inner_of(model))
    raw = deepcopy(model.state_dict())
    outer = evaluation(ema, model, 0.05)
    inner = evaluation(inner_ema, part, 0.28)
    next(outer)
    next(inner)
    with pytest.raises(NotReadyError, match="a block was left before one that was entered within"):
        next(outer)
    assert next(inner, None) is None  # it has nothing to undo any more
    assert_same_tensors(model.state_dict(), raw)
    assert all(module.training for module in model.modules())
    ema.update_(model)


def test_nested_blocks_restore_what_was_around_them(tmp_path):
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


def test_a_parameter_whose_elements_share_memory_has_its_values_again_after_the_block(tmp_path):
    row = torch.ones(1, 4)
    model = nn.Module()
    model.rows = nn.Parameter(row.expand(3, 4))
    ema = track(model, tmp_path)
    for value in (1.0, 5.0):
        row.fill_(value)
        ema.update_(model)
    with ema.model(model, 0.28):
        assert 1 < float(model.rows.detach()[0, 0]) < 5
    assert torch.equal(model.rows, torch.full((3, 4), 5.0))
    assert model.rows.data_ptr() == row.data_ptr()
    assert model.rows.stride() == (0, 1)


def test_a_block_computes_anew_what_torch_has_computed_of_other_weights(tmp_path):
    """Copies in lower precision that autocast keeps, and parametrized tensors that are cached."""
    model, ema = tracked(tmp_path, orthogonal(nn.Linear(4, 4)))
    x = torch.randn(3, 4)

    def outputs():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).detach()

    raw = outputs()
    with ema.model(model, 0.28):
        averaged = outputs()
    with torch.autocast("cpu", torch.bfloat16), parametrize.cached():
        model(x)
        with ema.model(model, 0.28):
            assert torch.equal(outputs(), averaged)
        assert torch.equal(outputs(), raw)
    assert not torch.equal(raw, averaged)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "0", nn.Sequential(model[0])),  # as quantizing in place does
        lambda model: model.register_parameter("more", nn.Parameter(torch.ones(1))),
        lambda model: delattr(model[0], "bias"),
        lambda model: orthogonal(model[0]),
    ],
)
def test_a_block_restores_modules_that_were_changed_within_it(tmp_path, change):
    model, ema = tracked(tmp_path)
    raw = deepcopy(model.state_dict())
    with ema.model(model, 0.28) as averaged:
        change(averaged)
        averaged.register_buffer("table", torch.ones(2), persistent=False)
    assert model.table is not None  # as a forward pass registers that does so once
    assert_same_tensors(model.state_dict(), raw)
    model(torch.ones(2, 3))
    ema.update_(model)


def test_a_block_that_is_called_like_a_model_says_that_it_needs_with(tmp_path):
    model, ema = tracked(tmp_path)
    needs_with = r"only within a `with` block; with ema\.model"
    for block in (ema.model(model, 0.1), ema.models(model, [0.1])["0.1"]):
        with pytest.raises(NotReadyError, match=needs_with):
            block(torch.ones(2, 3))
