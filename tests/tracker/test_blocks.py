"""Blocks with averaged weights: what they restore, and that a model has one at a time."""

import threading
import warnings
from copy import deepcopy
from itertools import chain

import pytest
import torch
from checking import assert_same_tensors, refused
from torch import nn
from torch.nn.utils import parametrize, prune
from tracker.runs import assert_near, track

from posthoc_cli.errors import ModelMismatchError, RefusedCallError
from posthoc_cli.profiles import gamma_from_sigma_rel


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
        except RefusedCallError as error:
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
        with refused("model", kind=RefusedCallError), others.model(other, 0.05):
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
        refused("load_into", kind=RefusedCallError),
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
        with refused("model", "with ema.model", kind=RefusedCallError):
            block(torch.ones(2, 3))


# --- what a block does to the model's tensors


class Scaled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Net(nn.Module):
    """A model of tied and frozen parameters, of buffers of two dtypes, and of a module that lists
    its parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.first.weight
        self.recurrent = nn.LSTM(3, 2)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)

    def forward(self, x):
        hidden = self.tied(self.norm(self.first(x))) + self.frozen
        return self.recurrent(hidden)[0]


def clone_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def load_other_objects(model):
    values = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


def empty(model):
    model.to_empty(device="cpu")
    for tensor in model.parameters():
        tensor.data.fill_(3)


def free(model):
    for tensor in (*model.first.parameters(), model.norm.running_mean):
        tensor.untyped_storage().resize_(0)


def resize(model):
    model.first.weight.data = torch.zeros(2, 7)
    model.norm.running_var.set_(torch.zeros(5))


def replace_modules(model):
    model.first = nn.Linear(3, 3)
    model.norm.running_mean = torch.ones(3)
    model.recurrent.weight_ih_l0 = nn.Parameter(torch.ones(8, 3))
    model.first.bias = None


def remove_tensors(model):
    del model.first.weight
    del model.norm.running_var
    del model.recurrent


def parametrize_and_undo(model):
    parametrize.register_parametrization(model.first, "weight", Scaled())
    parametrize.remove_parametrizations(model.first, "weight")


def normalize_weight_and_undo(model):
    normalize_weight(model)
    remove_weight_norm(model)


def convert_by_swapping(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def convert_to_other_objects(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.bfloat16()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@torch.inference_mode()
def convert_in_inference(model):
    model.half()


def convert_to_meta(model):
    model.to("meta")


def freeze(model):
    model.requires_grad_(False)


CONVERSIONS = [
    nn.Module.half,
    nn.Module.bfloat16,
    nn.Module.double,
    nn.Module.share_memory,
    clone_data,
    load_other_objects,
    empty,
    free,
    resize,
    replace_modules,
    remove_tensors,
    parametrize_and_undo,
    normalize_weight_and_undo,
    convert_by_swapping,
    convert_to_other_objects,
    convert_in_inference,
    convert_to_meta,
    freeze,
]


def leave(model):
    pass


def memory(model):
    """Return what a training keeps of a model: its tensors by name, with their memory and kind."""
    found = {}
    named = chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in named:
        storage = tensor.untyped_storage()._cdata  # `share_memory` moves it
        flags = tensor.dtype, tensor.shape, tensor.requires_grad
        found[name] = id(tensor), id(tensor.grad), storage, flags
    return found


@pytest.mark.parametrize("undo", [leave, nn.Module.float])
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_block_restores_what_it_has_converted_moved_or_replaced(tmp_path, convert, undo):
    """The same objects have their own values, dtype and memory, and the next update takes them."""
    if convert is convert_to_meta and undo is not leave:
        undo = empty
    model, ema = tracked(tmp_path / "run", Net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3)
    model(x).sum().backward()
    raw = deepcopy(model.state_dict())
    before = memory(model)
    model.eval()
    outputs = model(x).detach()
    model.train()
    expected = {}
    for name, average in ema.state_dict(0.28).items():
        share = 1 - (5 / 6) ** (gamma_from_sigma_rel(0.28) + 1)
        if average.is_floating_point():
            expected[name] = average.double() + share * (raw[name].double() - average.double())
    with ema.model(model, 0.28):
        assert not torch.equal(model.first.weight, raw["first.weight"])
        convert(model)
        undo(model)
    assert memory(model) == before
    assert [*model.state_dict()] == [*raw]
    assert_same_tensors(model.state_dict(), raw)
    assert all(module.training for module in model.modules())
    model.eval()
    assert torch.equal(model(x).detach(), outputs)
    model.train()
    ema.update_(model)
    assert_near(ema.state_dict(0.28), expected)
    optimizer.step()
    gradient = model.first.weight.grad
    assert torch.equal(model.tied.weight, raw["first.weight"] - 0.1 * gradient)


def test_a_model_whose_tensors_were_replaced_still_holds_averaged_weights(tmp_path):
    """Neither an update nor a second block would see that by the tensors alone."""
    model, ema = tracked(tmp_path)
    with ema.model(model, 0.28):
        load_other_objects(model)
        with refused("update_", kind=RefusedCallError):
            ema.update_(model)
        with refused("model", kind=RefusedCallError), ema.model(model, 0.05):
            pass


def parametrize_weight(model):
    parametrize.register_parametrization(model.first, "weight", Scaled())


def normalize_spectrum(model):
    nn.utils.parametrizations.spectral_norm(model.first)


def normalize_weight(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old function
        nn.utils.weight_norm(model.first)


def prune_weight(model):
    prune.random_unstructured(model.first, "weight", 0.5)


def remove_parametrization(model):
    parametrize.remove_parametrizations(model.first, "weight", leave_parametrized=False)


def remove_weight_norm(model):
    nn.utils.remove_weight_norm(model.first)


def remove_pruning(model):
    prune.remove(model.first, "weight")


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
@pytest.mark.parametrize(
    ("hide", "undo"),
    [
        (parametrize_weight, remove_parametrization),
        (normalize_spectrum, remove_parametrization),
        (normalize_weight, remove_weight_norm),
        (prune_weight, remove_pruning),
    ],
)
def test_weights_that_a_model_cannot_have_again_are_at_hand_in_the_error(
    tmp_path, hide, undo, error
):
    """Since it computes them of others now. The rest is as before."""
    model, ema = tracked(tmp_path, Net())
    raw = deepcopy(model.state_dict())
    with (
        pytest.raises(
            ModelMismatchError, match=r"block: weight of (Parametrized)?Linear"
        ) as raised,
        ema.model(model, 0.28),
    ):
        hide(model)
        model.norm.half()
        if error is not None:
            raise error
    assert isinstance(raised.value.__context__, error or type(None))
    assert_same_tensors(raised.value.weights, raw)
    assert model.norm.weight.dtype == torch.float32
    undo(model)
    model.load_state_dict(raised.value.weights)
    model.first.weight = model.tied.weight
    assert_same_tensors(model.state_dict(), raw)
    ema.update_(model)
