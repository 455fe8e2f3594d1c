"""Blocks with averaged weights: what they restore, and that a model has one at a time."""

import threading
import warnings
from contextlib import suppress
from copy import deepcopy
from itertools import chain

import pytest
import torch
from checking import assert_same_tensors, refused
from peft import LoraConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, parametrizations, parametrize, prune
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
    nn.utils.remove_weight_norm(model.first)


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


def parametrize_weight(model):
    parametrize.register_parametrization(model.first, "weight", Scaled())


def normalize_spectrum(model):
    parametrizations.spectral_norm(model.first)


def normalize_weight(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of an old function
        nn.utils.weight_norm(model.first)
        nn.utils.weight_norm(model.recurrent, "weight_hh_l0")


def prune_weight(model):
    prune.random_unstructured(model.first, "weight", 0.5)


def add_tensors(model):
    model.scale = nn.Parameter(torch.ones(3))
    model.first.register_buffer("operations", torch.zeros(1))
    model.head = nn.Linear(3, 3)


def replace_forward(model):
    model.norm.forward = torch.neg


def replace_class(model):
    model.norm.__class__ = Scaled


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
    parametrize_weight,
    normalize_spectrum,
    normalize_weight,
    prune_weight,
    add_tensors,
    replace_forward,
    replace_class,
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


# --- a block that rebuilds the model, for a faster evaluation


def unnormalize(model):
    """As vocoders do."""
    unnormalize_parts(model.vocoder)


def unnormalize_parts(vocoder):
    parametrize.remove_parametrizations(vocoder[0], "weight")
    parametrize.remove_parametrizations(vocoder[1], "bias")
    parametrize.remove_parametrizations(vocoder[2], "weight")


def undo_old_norms(model):
    nn.utils.remove_weight_norm(model.old[0])
    nn.utils.remove_spectral_norm(model.old[1])
    prune.remove(model.old[2], "weight")


def normalize_once_more(model):
    parametrizations.weight_norm(model.vocoder[0], "bias")


def unnormalize_a_copy(model):
    """The copies share their classes, from which torch removes the parametrizations."""
    unnormalize_parts(deepcopy(model.vocoder))


class Fusible(nn.Module):
    """A convolution that takes in its norm, as those of YOLO do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2)

    def forward(self, x):
        return self.norm(self.conv(x))

    def fuse(self):
        self.conv = fuse_conv_bn_eval(self.conv, self.norm)
        del self.norm
        self.forward = self.conv.forward


class Branches(nn.Module):
    """Two branches, which become one convolution for deployment, as those of RepVGG do."""

    def __init__(self):
        super().__init__()
        self.dense = Fusible()
        self.identity = nn.BatchNorm2d(2)
        self.deployed = False
        self.kernel = [3, 3]

    def forward(self, x):
        return self.merged(x) if self.deployed else self.dense(x) + self.identity(x)

    def deploy(self):
        self.merged = fuse_conv_bn_eval(self.dense.conv, self.dense.norm)
        for parameter in self.parameters():
            parameter.detach_()
        del self.dense
        del self.identity
        self.deployed = True


class Attention(nn.Module):
    """Projections that may be computed in one, as those of diffusers."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(4, 4)
        self.key = nn.Linear(4, 4)
        self.processor = self.project_each

    def forward(self, x):
        return self.processor(x)

    def project_each(self, x):
        return self.query(x) * self.key(x)

    def project_both(self, x):
        query, key = self.both(x).chunk(2, dim=-1)
        return query * key

    def fuse(self):
        self.both = nn.Linear(4, 8)
        self.processor = self.project_both


class Rebuilt(nn.Module):
    """A model of parts that evaluations rebuild."""

    def __init__(self):
        super().__init__()
        self.vocoder = nn.Sequential(
            parametrizations.weight_norm(nn.Conv2d(2, 2, 3, padding=1)),
            nn.Conv2d(2, 2, 3, padding=1),
            parametrizations.spectral_norm(nn.Conv2d(2, 2, 3, padding=1)),
        )
        parametrizations.weight_norm(self.vocoder[1], "weight")
        parametrizations.weight_norm(self.vocoder[1], "bias")
        self.old = nn.Sequential(*(nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old functions
            nn.utils.weight_norm(self.old[0])
            nn.utils.spectral_norm(self.old[1])
        prune.random_unstructured(self.old[2], "weight", 0.5)
        self.fusible = Fusible()
        self.branches = Branches()
        self.layers = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU())
        self.attention = Attention()

    def forward(self, x):
        for part in self.children():
            x = part(x)
        return x


def fuse(model):
    model.fusible.fuse()


def deploy(model):
    model.branches.deploy()


def fuse_layers(model):
    torch.ao.quantization.fuse_modules(model.layers, [["0", "1", "2"]], inplace=True)


def fuse_projections(model):
    model.attention.fuse()


def drop_norm(model):
    model.layers[1] = nn.Identity()


def rebuild_all(model):
    unnormalize(model)
    undo_old_norms(model)
    fuse(model)
    model.half()
    deploy(model)
    fuse_projections(model)


def keep_hook(module, arguments, output):
    pass


def structure(model):
    """Return all that the modules of a model have: classes, attributes, children and hooks."""
    found = {}
    for name, module in model.named_modules():
        registered = {}
        attributes = {}
        for key, value in vars(module).items():
            if isinstance(value, dict | set):
                registered[key] = [*value]
            else:
                attributes[key] = value
        found[name] = type(module), id(module), registered, attributes
    return found


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
@pytest.mark.parametrize(
    "rebuild",
    [
        unnormalize,
        undo_old_norms,
        normalize_once_more,
        unnormalize_a_copy,
        fuse,
        deploy,
        fuse_layers,
        fuse_projections,
        drop_norm,
        rebuild_all,
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.ao
def test_a_block_restores_a_model_that_it_has_rebuilt(tmp_path, rebuild, error):
    """Each time; the training goes on with the same tensors."""
    model, ema = tracked(tmp_path, Rebuilt())
    model.layers[2].register_forward_hook(keep_hook)  # torch moves it to the fused layer
    x = torch.randn(2, 2, 4, 4)
    model(x).sum().backward()
    raw = deepcopy(model.state_dict())
    before = structure(model)
    tensors = memory(model)
    for _ in range(2):
        with suppress(ZeroDivisionError), ema.model(model, 0.28):
            rebuild(model)
            if error is not None:
                raise error
        assert structure(model) == before
        assert memory(model) == tensors
        assert [*model.state_dict()] == [*raw]
        assert_same_tensors(model.state_dict(), raw)
    model.eval()
    copied = Rebuilt()
    copied.load_state_dict(raw)
    assert torch.equal(model(x), copied.eval()(x))
    model.train()
    model(x).sum().backward()
    ema.update_(model)


class Cached(nn.Module):
    """A module whose forward pass counts, and keeps tables of positions."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.passes = 0
        self.last = None
        self.longest = 1
        self.register_buffer("table", torch.arange(1.0), persistent=False)

    def forward(self, x):
        self.passes += 1
        self.last = len(x)
        if not hasattr(self, "mask"):
            self.register_buffer("mask", torch.ones(3), persistent=False)
        return self.linear(x) * self.mask

    def look_up(self, x):
        if len(x) > self.longest:
            self.longest = len(x)
            self.table = torch.arange(float(self.longest))
        return self(x) + self.table[: len(x), None]


def test_what_a_forward_pass_leaves_in_a_model_stays(tmp_path):
    """Attributes, caches, hooks and compiled code: a block that does not rebuild has no say in
    them."""
    model, ema = tracked(tmp_path, Cached())
    with ema.model(model, 0.28):
        model(torch.ones(4, 3))
        model.train()
        model.linear.register_forward_hook(keep_hook)
        model.linear.compile(backend="eager")
        model.half()
    assert (model.passes, model.last, len(model.mask)) == (1, 4, 3)
    assert [*model.linear._forward_hooks.values()] == [keep_hook]
    assert model.linear._compiled_call_impl is not None
    with torch.no_grad():
        model(torch.ones(4, 3))
    assert model.passes == 2
    ema.update_(model)


def test_a_table_that_grows_within_a_block_is_as_long_as_its_module_knows(tmp_path):
    model, ema = tracked(tmp_path, Cached())
    for length in (5, 9):
        with ema.model(model, 0.28):
            model.look_up(torch.ones(length, 3))
        model.look_up(torch.ones(4, 3))


def test_lazy_modules_that_a_block_has_initialized_stay_so(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(2), nn.LazyBatchNorm1d())
    ema = track(model, tmp_path, exclude=["1.*", "2.*"])
    ema.update_(model)
    for _ in range(2):
        with ema.model(model, 0.28):
            model(torch.ones(4, 3))
    assert [*map(type, model)] == [nn.Linear, nn.Linear, nn.BatchNorm1d]
    assert all(module.training for module in model.modules())
    ema.update_(model)


# --- adapters that are added to frozen weights, of which a block has no copy


def largest(tensor):
    return float(tensor.detach().abs().max())


def merge_and_unmerge(model):
    model.merge_adapter()
    model.unmerge_adapter()


def merge(model):
    model.merge_adapter()


def merge_into_copies(model):
    model.merge_adapter(safe_merge=True)


def unload(model):
    model.merge_and_unload()


def unload_and_convert(model):
    model.merge_and_unload().half()


def convert_and_unload(model):
    model.half().merge_and_unload()


def unload_a_copy(model):
    deepcopy(model).merge_and_unload()


@pytest.mark.parametrize(
    "evaluate",
    [
        merge_and_unmerge,
        merge,
        merge_into_copies,
        unload,
        unload_and_convert,
        convert_and_unload,
        unload_a_copy,
    ],
)
def test_adapters_that_a_block_has_merged_are_subtracted_again(tmp_path, evaluate):
    """Adding an averaged adapter a to a weight w, and subtracting it, each round to half a digit:
    2**-24 of |w| + |a|, at most."""
    base = nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4), nn.Linear(4, 3))
    config = LoraConfig(r=2, target_modules=["0", "1"], modules_to_save=["2"])
    model, ema = tracked(tmp_path, get_peft_model(base, config), include="*lora_*")
    raw = deepcopy(model.state_dict())
    before = structure(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    with ema.model(model, 0.28):
        added = max(largest(layer.get_delta_weight("default")) for layer in layers)
        evaluate(model)
    assert added > 0.1
    assert structure(model) == before
    for name, value in model.state_dict().items():
        rounding = 2**-23 * (largest(raw[name]) + added) if "base_layer" in name else 0
        assert torch.allclose(value, raw[name], rtol=0, atol=rounding), name
    assert not any(layer.merged for layer in layers)
    ema.update_(model)


class Adapted(nn.Linear):
    """A layer that adds its adapter to the weight in eval mode, as those of loralib do."""

    def __init__(self):
        super().__init__(3, 3)
        self.weight.requires_grad_(False)
        self.adapter = nn.Parameter(torch.randn(3, 3))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode and self.merged:
            self.weight.data -= self.adapter.data
        if not mode and not self.merged:
            self.weight.data += self.adapter.data
        self.merged = not mode
        return self


def test_adapters_that_eval_mode_merges_are_subtracted_again(tmp_path):
    model, ema = tracked(tmp_path, nn.Sequential(Adapted()), include="*adapter")
    raw = deepcopy(model.state_dict())
    with ema.model(model, 0.28):
        assert model[0].merged
        rounding = 2**-23 * (largest(raw["0.weight"]) + largest(model[0].adapter))
    assert not model[0].merged
    assert torch.allclose(model[0].weight, raw["0.weight"], rtol=0, atol=rounding)
    assert torch.equal(model[0].adapter, raw["0.adapter"])


# --- what cannot be restored


class Base(nn.Linear):
    pass


def zeros(module):
    return torch.zeros(4, 3)


class Derived(Base):
    pass


@pytest.mark.parametrize("error", [None, ZeroDivisionError])
def test_weights_that_a_model_cannot_have_again_are_at_hand_in_the_error(
    tmp_path, monkeypatch, error
):
    """Since a class computes them of others now. The rest is as before."""
    model, ema = tracked(tmp_path, nn.Sequential(Derived(3, 4), nn.BatchNorm1d(4)))
    raw = deepcopy(model.state_dict())
    with (
        pytest.raises(ModelMismatchError, match="block: weight of Derived") as raised,
        ema.model(model, 0.28),
    ):
        del model[0].weight
        monkeypatch.setattr(Base, "weight", property(zeros), raising=False)
        model[1].half()
        if error is not None:
            raise error
    assert isinstance(raised.value.__context__, error or type(None))
    assert_same_tensors(raised.value.weights, raw)
    assert model[1].weight.dtype == torch.float32
    monkeypatch.undo()
    model.load_state_dict(raised.value.weights)
    assert_same_tensors(model.state_dict(), raw)
    ema.update_(model)


def test_a_norm_that_is_fused_outside_of_a_block_is_named_by_the_next_update(tmp_path):
    model, ema = tracked(tmp_path, nn.Sequential(Fusible()))
    model.eval()
    model[0].fuse()
    with refused("tensor '0.norm.weight'", "is not tracked", kind=ModelMismatchError):
        ema.update_(model)
