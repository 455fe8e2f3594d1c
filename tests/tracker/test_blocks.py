"""Blocks with averaged weights: what they restore, and that a model has one at a time."""

import threading
from copy import deepcopy

import pytest
import torch
from checking import assert_same_tensors, refused
from torch import nn
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
def test_a_second_block_of_the_same_tensors_is_refused(tmp_path, other_of):
    """In the same thread or another one, of the model, a part or a wrapper."""
    model, ema = tracked(tmp_path / "run")
    other, others = tracked(tmp_path / "other", other_of(model))
    raw = deepcopy(model.state_dict())
    with ema.model(model, 0.28):
        averaged = deepcopy(model.state_dict())
        with refused("model", kind=NotReadyError), others.model(other, 0.05):
            pass
        (error,) = in_thread(lambda: [*evaluation(others, other, 0.05)])
        assert error.subject == "model"
        (error,) = in_thread(lambda: others.update_(other))
        assert error.subject == "update_"
        assert_same_tensors(model.state_dict(), averaged)
    assert_same_tensors(model.state_dict(), raw)
    assert model.training
    assert in_thread(lambda: [*evaluation(others, other, 0.05)]) == []  # one after the other


def test_a_model_is_not_filled_for_good_within_a_block_whose_end_would_undo_it(tmp_path):
    model, ema = tracked(tmp_path / "run")
    with (
        ema.model(model, 0.28),
        refused("load_into", kind=NotReadyError),
    ):
        ema.load_into(model, 0.05)


def test_blocks_of_different_models_may_be_open_in_several_threads(tmp_path):
    one, first = tracked(tmp_path / "one")
    two, second = tracked(tmp_path / "two")
    raw = deepcopy(two.state_dict())
    with first.model(one, 0.28):
        assert in_thread(lambda: [*evaluation(second, two, 0.05)]) == []
    assert_same_tensors(two.state_dict(), raw)


def test_a_block_restores_weights_buffers_gradients_and_modes_also_after_an_error(tmp_path):
    model, ema = tracked(tmp_path)
    model[1].eval()
    model(torch.ones(2, 3)).sum().backward()
    raw = deepcopy(model.state_dict())
    gradient = model[0].weight.grad
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), ema.model(model, 0.28) as averaged:
            assert_same_tensors(averaged.state_dict(), ema.state_dict(0.28))
            assert not averaged.training
            assert averaged[0].weight.grad is None
            averaged[1].running_mean.fill_(7)
            averaged.load_state_dict({name: value + 1 for name, value in raw.items()})
            raise ZeroDivisionError
        assert_same_tensors(model.state_dict(), raw)
        assert [module.training for module in model.modules()] == [True, True, False]
        assert model[0].weight.grad is gradient


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


def test_a_block_computes_anew_what_autocast_has_copied_of_other_weights(tmp_path):
    model, ema = tracked(tmp_path, nn.Linear(4, 4))
    x = torch.randn(3, 4)

    def outputs():
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).detach()

    raw = outputs()
    with ema.model(model, 0.28):
        averaged = outputs()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
        with ema.model(model, 0.28):
            assert torch.equal(outputs(), averaged)
        assert torch.equal(outputs(), raw)
    assert not torch.equal(raw, averaged)


def test_a_block_that_is_called_like_a_model_says_that_it_needs_with(tmp_path):
    model, ema = tracked(tmp_path)
    for block in (ema.model(model, 0.1), ema.models(model, [0.05])["0.05"]):
        with refused("model", "with ema.model", kind=NotReadyError):
            block(torch.ones(2, 3))
