"""The tensors of a model that are tracked, and averaged weights in a live model."""

from collections import OrderedDict
from contextlib import suppress
from copy import deepcopy
from functools import partial

import pytest
import torch
from checking import assert_same_tensors, refused
from device import DEVICE, IS_SIMULATED, MODULE
from factories import tiny_model
from torch import nn
from tracker.runs import track

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import InvalidValueError, ModelMismatchError, RefusedCallError


def network():
    """Return a model with tied and frozen parameters, float and integer buffers, and no bias in the
    head."""
    model = tiny_model()
    model.head.bias = None
    return model


def trained(folder, steps=10, **settings):
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = track(
        model,
        folder,
        checkpoint_every=5,
        checkpoint_dtype=None,
        **settings,
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        tracker.update_(model)
    return model, tracker, optimizer


def loss_of(model):
    tokens = torch.randint(0, 5, (8,))
    return model(tokens).square().mean()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model after 20 steps and its tracker; tests must not change them."""
    model, tracker, _ = trained(tmp_path_factory.mktemp("run"), 20)
    tracker.flush()
    return model, tracker


def test_parameters_and_statistics_are_averaged_counts_copied_tied_tensors_stored_once(run):
    _, tracker = run
    info = tracker.run.snapshots[-1]
    roles = {name: tensor.role for name, tensor in info.tensors.items()}
    assert roles == {
        "embed.weight": "average",
        "norm.weight": "average",
        "norm.bias": "average",
        "norm.running_mean": "statistic",
        "norm.running_var": "statistic",
        "norm.num_batches_tracked": "copy",
    }
    assert info.aliases == {"head.weight": "embed.weight"}
    assert info.left_out == ("frozen",)
    weights = tracker.state_dict(sigma_rel=0.28)
    assert torch.equal(weights["head.weight"], weights["embed.weight"])
    assert weights["norm.num_batches_tracked"] == 20
    missing = network().load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["frozen"]
    assert missing.unexpected_keys == []


def test_the_state_dict_is_a_dict_a_context_and_pickles_plainly(run, tmp_path):
    model, tracker = run
    before = deepcopy(model.state_dict())
    with tracker.state_dict(sigma_rel=0.15) as weights:
        torch.save(weights, tmp_path / "w.pt")
    loaded = torch.load(tmp_path / "w.pt", weights_only=True)
    assert type(loaded) is OrderedDict
    assert list(loaded) == list(weights)
    for tensor in weights.values():
        tensor.zero_()  # shares memory neither with the model nor with the averages
    assert_same_tensors(model.state_dict(), before)
    assert_same_tensors(tracker.state_dict(sigma_rel=0.15), loaded)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sigma_rel", ["abc", 0.4]),
        ("t", ["10", 21]),
        ("step", [5.5, 4]),
        ("dtype", ["int8"]),
        ("method", ["magic"]),
    ],
)
def test_bad_arguments_are_named(run, name, values):
    _, tracker = run
    for value in values:
        with pytest.raises(InvalidValueError, match=f"^(target|{name}) "):
            tracker.state_dict(**{"sigma_rel": 0.1, name: value})
    with refused("t", "`t`, `step`"):
        tracker.state_dict(0.1, t=10, step=10)


def test_weights_have_the_parameters_dtype_by_default(tmp_path):
    model = nn.Linear(3, 3).half()
    tracker = track(model, tmp_path, checkpoint_every=1, checkpoint_dtype="float32")
    tracker.update_(model)
    for source in (tracker, PostHocEMA.from_path(tmp_path)):
        assert source.state_dict(0.28)["weight"].dtype == torch.float16
        assert source.state_dict(0.28, dtype="bf16")["weight"].dtype == torch.bfloat16


class BodyError(Exception):
    pass


def train(model):
    model.train()
    loss_of(model)  # moves the batch statistics
    for parameter in model.parameters():
        parameter.data.add_(float(parameter.requires_grad))


def fail(_):
    raise BodyError


def all_but_values(model):
    """Return the modes of the modules, and of each parameter what is no value."""
    found = [module.training for module in model.modules()]
    for parameter in model.parameters():
        found += id(parameter), parameter.data_ptr()
        found += parameter.requires_grad, str(parameter.grad)
    return found


@pytest.mark.parametrize("body", [train, fail])
@pytest.mark.parametrize("infers", [False, True])
def test_the_end_of_a_block_restores_everything(tmp_path, body, infers):
    """Also within inference mode, after which the model still trains."""
    model, tracker, optimizer = trained(tmp_path)
    model.norm.eval()
    values = deepcopy(model.state_dict())
    before = all_but_values(model)
    expected = tracker.state_dict(sigma_rel=0.15)
    block = tracker.model(model, sigma_rel=0.15)
    with torch.inference_mode(infers), suppress(BodyError), block as averaged:
        assert averaged is model
        assert not any(module.training for module in model.modules())
        found = model.state_dict()
        assert_same_tensors(found, found | expected)
        body(model)
    assert_same_tensors(model.state_dict(), values)
    assert all_but_values(model) == before
    loss_of(model).backward()
    optimizer.step()


ROWS = [torch.ones(2, 3), torch.ones(4, 3)]
NOT_DENSE = {
    "nested": partial(torch.nested.nested_tensor, ROWS),
    "nested, jagged": partial(torch.nested.nested_tensor, ROWS, layout=torch.jagged),
    "sparse": torch.eye(3).to_sparse,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
@pytest.mark.parametrize("kind", NOT_DENSE)
def test_a_sparse_or_nested_buffer_is_allowed_unless_it_would_be_stored(tmp_path, kind):
    model = nn.Linear(2, 2)
    table = NOT_DENSE[kind]()
    model.register_buffer("adjacency", table, persistent=False)
    model.register_buffer("table", table)
    with refused("tensor 'table'", "dense", "exclude='table'"):
        PostHocEMA.from_model(model, tmp_path)
    tracker = track(model, tmp_path, exclude="table")
    tracker.update_(model)
    with tracker.model(model, sigma_rel=0.28):
        pass
    assert model.table is table


def test_usual_mistakes_name_what_was_meant(tmp_path):
    model = nn.Linear(3, 3)
    ema = track(model, tmp_path)
    for name in ("update", "update_parameters"):
        with pytest.raises(AttributeError, match=r"ema\.update_\(model\)"):
            getattr(ema, name)
    with refused("state", "ema.state_dict()"):
        ema.load_state_dict(model.state_dict())


def test_the_constructor_names_the_two_ways_to_make_a_tracker(tmp_path):
    with refused("PostHocEMA(...)", "from_model(", "from_path("):
        PostHocEMA(network(), tmp_path, sigma_rels=(0.05, 0.28))


@pytest.mark.parametrize(
    ("other", "kind", "name"),
    [
        (nn.Linear(4, 7), ModelMismatchError, "embed.weight"),
        (nn.ModuleDict({"embed": nn.Embedding(4, 3)}), ModelMismatchError, "embed.weight"),
        (tiny_model().to("meta"), InvalidValueError, "embed.weight"),
    ],
)
def test_a_model_that_cannot_hold_the_average_is_refused_and_not_changed(run, other, kind, name):
    _, tracker = run
    before = deepcopy(other.state_dict())
    with refused(f"tensor '{name}'", kind=kind):
        tracker.model(other, sigma_rel=0.15).__enter__()
    with refused(f"tensor '{name}'", kind=kind):
        tracker.load_into(other, 0.15)
    assert str(other.state_dict()) == str(before)


REFUSING = {
    "all": {"all", "0", "1", "2"},
    "0": {"all", "0", "2"},  # 2 has the same parameter
    "1": {"all", "1"},
}
"""The trackers that refuse an update, by the part of the model that holds averaged weights."""


@pytest.mark.parametrize("swapped", REFUSING)
def test_no_tracker_of_a_part_or_all_of_a_model_takes_averaged_weights_as_an_update(
    tmp_path,
    swapped,
):
    layers = [nn.Linear(2, 2) for _ in range(3)]
    model = nn.Sequential(*layers)
    model[2].weight = model[0].weight  # tied
    modules = {"all": model, **dict(model.named_children())}
    trackers = {}
    for name, module in modules.items():
        trackers[name] = track(module, tmp_path / name)
        trackers[name].update_(module)
    refusing = set()
    with trackers[swapped].model(modules[swapped], sigma_rel=0.28):
        model[1].weight = deepcopy(model[1].weight)  # the module is recognised by its bias
        for name, module in modules.items():
            try:
                trackers[name].update_(module)
            except RefusedCallError:
                refusing.add(name)
    assert refusing == REFUSING[swapped]


@pytest.mark.cuda
def test_on_an_accelerator_the_swap_takes_no_second_copy(tmp_path):
    size = 512 if IS_SIMULATED else 4096
    model = nn.Linear(size, size, device=DEVICE)
    with track(model, tmp_path, checkpoint_every=1) as tracker:
        tracker.update_(model)
        before = MODULE.memory_allocated()
        MODULE.reset_peak_memory_stats()
        with tracker.model(model, sigma_rel=0.15):
            assert next(model.parameters()).device.type == DEVICE
        assert MODULE.max_memory_allocated() - before < 0.1 * 4 * size**2
