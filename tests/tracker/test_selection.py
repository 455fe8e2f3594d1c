"""The selection of tracked tensors: filters by name, buffers, and tensors of every kind."""

import pytest
import torch
from checking import refused
from torch import nn
from torch.nn.utils import parametrizations
from tracker.runs import Training, assert_near

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import ModelMismatchError, NonFiniteError

SETTINGS = {
    "sigma_rels": (0.05, 0.28),
    "update_every": 1,
    "checkpoint_every": 3,
    "checkpoint_dtype": None,
}


def network():
    model = Training().model
    model[2].bias.requires_grad_(False)
    return model


def tracked(model, folder, **settings):
    settings = SETTINGS | settings
    with PostHocEMA.from_model(model, folder, **settings) as run:
        return Training(model=model, size=1.0).run(6, run)


def newest(folder):
    return Run(folder).snapshots[-1]


def roles(folder):
    return {name: tensor.role for name, tensor in newest(folder).tensors.items()}


def names_of(folder, role):
    return {name for name, own in roles(folder).items() if own == role}


ALL = {
    "0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var",
    "1.num_batches_tracked", "2.weight", "2.bias",
}  # fmt: skip


@pytest.mark.parametrize(
    ("filters", "taken"),
    [
        ({}, ALL - {"2.bias"}),
        ({"include": "*"}, ALL),
        ({"include": ["*.weight", "2.*"], "exclude": ("1.*", "0.*")}, {"2.weight", "2.bias"}),
    ],
)
def test_filters_take_what_they_name_and_the_header_lists_the_rest(tmp_path, filters, taken):
    tracked(network(), tmp_path, **filters)
    info = newest(tmp_path)
    assert set(info.tensors) == taken
    assert set(info.left_out) == ALL - taken
    # the selection is in the header
    with PostHocEMA.from_path(tmp_path, network(), step=info.step) as run:
        run.update_(network())


@pytest.mark.parametrize(
    ("argument", "value", "subject"),
    [
        ("include", "conv.*", "include 'conv.*'"),
        ("exclude", ["2.*", "3.*"], "exclude '3.*'"),
        ("include", 3, "include 3"),
        ("exclude", "*", "model"),
        ("buffers", "mean", "buffers 'mean'"),
    ],
)
def test_filters_that_make_no_sense_are_refused(tmp_path, argument, value, subject):
    filters = {argument: value}
    with refused(subject):
        PostHocEMA.from_model(network(), tmp_path, **filters)


def test_a_tied_tensor_is_stored_under_its_selected_name(tmp_path):
    layers = [nn.Linear(3, 3) for _ in range(3)]
    model = nn.Sequential(*layers)
    model[1].weight = model[0].weight
    tracked(model, tmp_path, include="1.*")
    assert roles(tmp_path) == {"1.weight": "average", "1.bias": "average"}


def test_a_tensor_that_is_tied_to_another_one_than_before_is_refused(tmp_path):
    layers = [nn.Linear(3, 3) for _ in range(3)]
    model = nn.Sequential(*layers)
    model[2].weight = model[0].weight
    tracked(model, tmp_path)
    model[2].weight = model[1].weight
    with refused("tensor '2.weight'", "tied", kind=ModelMismatchError):
        PostHocEMA.from_path(tmp_path, model)


def test_floating_point_buffers_can_be_averaged_as_parameters_are(tmp_path):
    training = tracked(network(), tmp_path, buffers="average")
    assert names_of(tmp_path, "copy") == {"1.num_batches_tracked"}
    weights = PostHocEMA.from_path(tmp_path).state_dict(sigma_rel=0.28)
    exact = training.exact(0.28, range(1, 7))
    assert_near(weights, {"1.running_mean": exact["1.running_mean"]}, within=1e-5)
    settings = SETTINGS | {"buffers": "copy", "resume": "auto"}
    with refused("tensor '1.running_mean'", kind=ModelMismatchError):
        PostHocEMA.from_model(network(), tmp_path, **settings)


COPIED = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}


def assert_same_copies(found, model):
    for name in COPIED:
        assert torch.equal(found[name], model[name]), name


def test_copied_tensors_have_the_values_of_the_time_of_the_average(tmp_path):
    """The average may be of float16 snapshots, of the live tracker or of a resumed one."""
    model = network()
    training = tracked(
        model,
        tmp_path,
        buffers="copy",
        checkpoint_dtype=torch.float16,
    )
    assert names_of(tmp_path, "copy") == COPIED
    finished = PostHocEMA.from_path(tmp_path)
    for step in (3, 6):
        weights = finished.state_dict(sigma_rel=0.15, step=step)
        assert_same_copies(weights, training.path[step - 1])

    with PostHocEMA.from_path(tmp_path, model) as run:
        raw = training.run(7, run).path[-1]
        state = run.state_dict()
        training.run(8)
        with run.model(model, 0.05):
            assert_same_copies(model.state_dict(), raw)
        run.load_state_dict(state)
        assert_same_copies(run.state_dict()["copies"], raw)


def test_models_that_cannot_be_averaged_are_refused_by_name(tmp_path):
    no_values = Holder(p=torch.zeros(2, device="meta"))
    no_arithmetic = Holder(p=torch.zeros(2).to(torch.float8_e4m3fnuz))
    frozen = nn.Linear(2, 2).requires_grad_(False)
    for model, subject in (
        (no_values, "tensor 'p'"),
        (no_arithmetic, "parameter 'p'"),
        (nn.LazyLinear(3), "tensor 'weight'"),
        (frozen, "model"),
    ):
        with refused(subject):
            PostHocEMA.from_model(model, tmp_path)


class Holder(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def check_average(folder, training, within=1e-5):
    weights = PostHocEMA.from_path(folder).state_dict(0.28, dtype="float32")
    exact = training.exact(0.28, range(1, 7))
    averaged = names_of(folder, "average")
    assert_near(weights, {name: exact[name] for name in averaged}, within)


def test_tensors_without_dimensions_and_without_elements(tmp_path):
    model = Holder(
        scale=torch.tensor(2.0),
        none=torch.zeros(0, dtype=torch.bfloat16),  # alone in its dtype
        flat=torch.zeros(3, 0, 2),
        w=torch.ones(2, 2),
    )
    training = tracked(model, tmp_path, checkpoint_dtype=torch.float16)
    check_average(tmp_path, training, within=1e-3)
    with PostHocEMA.from_path(tmp_path, model) as run:
        run.update_(model)
        for sigma_rel in (0.05, 0.15):
            weights = run.state_dict(sigma_rel)
            assert weights["flat"].shape == (3, 0, 2)
            assert weights["none"].shape == (0,)
            assert weights["none"].dtype == torch.bfloat16


def test_8_bit_parameters_are_averaged_in_float32_and_checked(tmp_path):
    dtype = torch.float8_e4m3fn
    model = Holder(w=torch.linspace(-2, 2, 12).to(dtype))
    check_average(tmp_path, tracked(model, tmp_path, checkpoint_dtype=torch.float32))
    with PostHocEMA.from_path(tmp_path, model) as run:
        average = run.state_dict(sigma_rel=0.28, dtype="float32")["w"]
        with run.model(model, sigma_rel=0.28):
            assert torch.equal(model.w.float(), average.to(dtype).float())
        model.w.data[1] = float("nan")
        with refused("parameter 'w'", kind=NonFiniteError):
            run.update_(model)


def test_the_name_that_safetensors_reserves_is_refused(tmp_path):
    """The error comes before training, not with the first snapshot, also for a tied parameter."""
    model = nn.Linear(3, 2)
    model.register_parameter("__metadata__", model.weight)
    with refused("tensor '__metadata__'"):
        PostHocEMA.from_model(model, tmp_path)


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("a\0b", True),
        ("a\ud800b", False),
    ],
)
def test_a_name_that_no_header_can_hold_is_refused_before_training(tmp_path, name, trained):
    """Names of tensors that are left out are in the header, too."""
    model = nn.Linear(3, 2)
    own = nn.Parameter(torch.ones(2), requires_grad=trained)
    model.register_parameter(name, own)
    with refused("tensor", "a", "b"):
        PostHocEMA.from_model(model, tmp_path)


def test_the_originals_of_a_parametrized_module_are_averaged(tmp_path):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)))
    check_average(tmp_path, tracked(model, tmp_path))
    assert names_of(tmp_path, "average") == dict(model.named_parameters()).keys()
