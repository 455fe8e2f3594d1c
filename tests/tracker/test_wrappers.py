"""Wrapped models have the names of bare ones.

Of models with PEFT adapters, the adapters alone are tracked, under the names by which PEFT saves
and loads them.
"""

import copy
import warnings

import forked
import pytest
import torch
import torch.distributed as dist
from checking import refused
from peft import (
    LoHaConfig,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tracker.runs import Training, contents, track

from posthoc_cli import PostHocEMA, Run

SETTINGS = {"update_every": 1, "checkpoint_every": 2, "checkpoint_dtype": None}


class Network(nn.Module):
    """A model with children whose names are those of wrappers' children, a tied parameter and
    buffers."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 4)
        self._orig_mod = nn.BatchNorm1d(4)
        outer = nn.Linear(4, 4)
        inner = nn.Linear(4, 4, bias=False)
        inner.weight = outer.weight
        self.head = nn.Sequential(outer, inner)

    def forward(self, x):
        return self.head(self._orig_mod(self.module(x)))


def network():
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_a_sharded_model_names_the_torch_that_it_needs(tmp_path, monkeypatch):
    """A DTensor of torch 2.4 does not tell its chunks."""
    net = nn.Linear(2, 2)
    fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
    monkeypatch.delattr(DTensor, "__create_chunk_list__")
    with refused("tensor 'weight'", "torch 2.5"):
        PostHocEMA.from_model(net, tmp_path / "run").update_(net)


def compiled(model):
    return torch.compile(model, backend="eager")


def compiled_and_replicated(model):
    return compiled(DistributedDataParallel(compiled(model)))


def with_compiled_and_checkpointed_parts(model):
    model.head = compiled(model.head)
    model.module = checkpoint_wrapper(model.module)
    return model


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        compiled_and_replicated,
        with_compiled_and_checkpointed_parts,
    ],
)
def test_snapshots_of_a_wrapped_model_are_those_of_the_bare_one_and_load_into_either(
    tmp_path,
    wrap,
):
    bare = network()
    inner = network()
    wrapped = wrap(inner)
    # made before the wrapper
    with (
        PostHocEMA.from_model(bare, tmp_path / "bare", **SETTINGS) as one,
        PostHocEMA.from_model(network(), tmp_path / "wrapped", **SETTINGS) as other,
    ):
        Training(model=bare).run(4, one)
        Training(model=wrapped).run(4, other)
    assert contents(tmp_path / "wrapped") == contents(tmp_path / "bare")
    info = Run(tmp_path / "bare").snapshots[-1]
    assert info.tensors.keys() == bare.state_dict().keys() - {"head.1.weight"}

    run = PostHocEMA.from_path(tmp_path / "wrapped", wrapped)
    bare.load_state_dict(run.state_dict(sigma_rel=0.15))
    x = torch.randn(6, 3)
    with run.model(wrapped, sigma_rel=0.15) as averaged, torch.no_grad():
        expected = bare.eval()(x)
        torch.testing.assert_close(averaged(x), expected, rtol=1e-5, atol=1e-6)
    run.load_into(wrapped, sigma_rel=0.15)
    parameters = zip(wrapped.parameters(), bare.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in parameters)


@pytest.mark.usefixtures("one_process")
def test_models_of_fsdp_1_and_of_deepspeed_zero_3_are_refused_by_name(tmp_path):
    flat = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with refused("model", "FSDP1"):
        PostHocEMA.from_model(flat, tmp_path)
    head = nn.Parameter(torch.empty(0))
    head.ds_id = 7
    head.ds_tensor = torch.zeros(6)
    model = network()
    model.head[0].bias = head
    with refused("tensor 'head.0.bias'", "ZeRO-3"):
        PostHocEMA.from_model(model, tmp_path)


PEFTS = pytest.mark.filterwarnings("ignore")  # whose own warnings are many
CONFIGS = {
    "lora": LoraConfig(
        r=2,
        target_modules=["middle", "embed"],
        modules_to_save=["head"],
    ),
    "dora": LoraConfig(r=2, target_modules=["middle"], use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=["middle"]),
}


class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


def average_of(model, folder, **filters):
    with PostHocEMA.from_model(model, folder, **SETTINGS, **filters) as run:
        Training(model=model).run(4, run)
    return PostHocEMA.from_path(folder).state_dict(sigma_rel=0.15)


def with_compiled_part(model):
    adapted = model.base_model.model
    adapted.middle = compiled(adapted.middle)
    return model


@PEFTS
@pytest.mark.parametrize(
    ("kind", "wrap"),
    [
        ("lora", with_compiled_part),
        ("dora", compiled),
        ("loha", nn.DataParallel),
    ],
)
def test_an_adapter_alone_is_tracked_under_the_names_that_peft_saves(tmp_path, kind, wrap):
    model = get_peft_model(Adapted(), CONFIGS[kind])
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = average_of(wrap(model), tmp_path)
    assert weights.keys() == saved.keys()
    left_out = Run(tmp_path).snapshots[0].left_out
    assert any("base_layer.weight" in name for name in left_out)
    fresh = get_peft_model(Adapted(), CONFIGS[kind])
    assert not set_peft_model_state_dict(fresh, weights).unexpected_keys


@PEFTS
def test_an_adapted_part_of_a_larger_model_and_several_adapters_are_tracked(tmp_path):
    model = get_peft_model(Adapted(), CONFIGS["lora"])
    names = average_of(model, tmp_path / "one").keys()
    both = nn.ModuleDict({"text": model, "image": nn.Linear(2, 2)})
    expected = {"image.weight", *(f"text.{name}" for name in names)}
    assert expected <= average_of(both, tmp_path / "both").keys()
    model.add_adapter("second", CONFIGS["lora"])
    several = average_of(model, tmp_path / "several", include="*")
    for name, _ in model.named_parameters():
        if ".second" in name or ".default" in name:
            assert name in several


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when it compiles
def test_a_compiled_function_may_call_a_tracker(tmp_path):
    model = nn.Linear(2, 2)
    ema = track(model, tmp_path)

    def step():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        ema.update_(model)
        ema.state_dict(0.05)
        ema.flush()
        with ema.model(model, 0.05) as averaged:
            return float(averaged.bias.detach().sum())

    compiled = torch.compile(step, backend="eager")
    for _ in range(4):
        compiled()
    assert ema.step == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit
def test_a_model_of_torch_jit_is_refused(tmp_path):
    part = torch.jit.script(nn.Linear(2, 2))
    for model in (part, nn.Sequential(part)):
        with refused("model", "torch.jit"):
            PostHocEMA.from_model(model, tmp_path)


def test_an_exported_model_is_tracked_and_filled(tmp_path):
    inner = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model = torch.export.export(inner, (torch.ones(1, 2),)).module()
    with track(model, tmp_path) as ema:
        ema.update_(model)
        ema.load_into(model, 0.28)


WITHOUT_THE_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "posthoc_cli":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
for name in [name for name in sys.modules if name.split(".")[0] == "posthoc_cli"]:
    del sys.modules[name]
import copy, torch
for path in sys.argv[1:]:
    model = torch.load(path, weights_only=False)
    model.load_state_dict(copy.deepcopy(model).state_dict())
    print(type(model).__name__)
"""


def test_a_pickled_model_does_not_need_this_package(tmp_path):
    """Pickled, or copied and pickled, before the first update, later, and after the end."""
    model = nn.Sequential(nn.Linear(2, 2))
    paths = [tmp_path / f"{number}.pt" for number in range(4)]
    with track(model, tmp_path / "run") as ema:
        torch.save(model, paths[0])
        ema.update_(model)
        torch.save(copy.deepcopy(model), paths[1])
        with ema.model(model, 0.28):
            torch.save(model, paths[2])
    torch.save(model, paths[3])
    done = forked.run(WITHOUT_THE_PACKAGE, *paths)
    assert done.code == 0, done.err
    assert done.out.split() == ["Sequential"] * 4


class Quantized(torch.Tensor):
    """A float32 tensor that is kept in float16, with few operations, as classes of quantized
    weights are."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            dtype=torch.float32,
        )

    def __init__(self, values):
        self.values = values.half()

    @classmethod
    def __torch_dispatch__(cls, operation, _types, arguments, _=None):
        if operation is torch.ops.aten.detach.default:
            return cls(arguments[0].values)
        return cls.other(operation, arguments)

    @staticmethod
    def other(operation, _arguments):
        raise NotImplementedError(f"{operation} is not implemented")


class Computed(Quantized):
    """Every other operation takes values that are computed for it, so that none changes them."""

    @staticmethod
    def other(operation, arguments):
        values = [value.values.float() for value in arguments]
        return operation(*values)


@pytest.mark.parametrize("kind", [Quantized, Computed])
def test_quantized_weights_may_be_frozen_and_are_refused_by_name_if_tracked(tmp_path, kind):
    model = nn.Module()
    values = kind(torch.ones(3, 3))
    model.base = nn.Parameter(values, requires_grad=False)
    model.adapter = nn.Parameter(torch.ones(3))
    with track(model, tmp_path / "run") as ema:
        ema.update_(model)
        with ema.model(model, 0.05):
            pass
        assert ema.state_dict(0.05)["adapter"].tolist() == [1, 1, 1]
    with refused("tensor 'base'", kind.__name__, "exclude='base'"):
        track(model, tmp_path / "all", include="*")
