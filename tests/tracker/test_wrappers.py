"""Wrapped models have the names of bare ones, and one process of a group writes.

Of models with PEFT adapters, the adapters alone are tracked, under the names by which PEFT saves and loads them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checking import assert_same_tensors
from factories import exact_average
from groups import check_group, run_group
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from posthoc_cli import PostHocEMA
from posthoc_cli.errors import InvalidValueError, NotReadyError
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.snapshot import Selection
from posthoc_cli.tracker.model import collect_tensors

SETTINGS: dict = {"update_every": 1, "checkpoint_every": 2, "checkpoint_dtype": None}


class Network(torch.nn.Module):
    """A model with children whose names are those of wrappers' children, a tied parameter and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.module = torch.nn.Linear(3, 4)
        self._orig_mod = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4, bias=False))
        self.head[1].weight = self.head[0].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self._orig_mod(self.module(x)))


NAMES = {"module.weight", "module.bias", "_orig_mod.weight", "_orig_mod.bias", "head.0.weight", "head.0.bias"}
BUFFERS = {"_orig_mod.running_mean", "_orig_mod.running_var", "_orig_mod.num_batches_tracked"}


def network() -> Network:
    torch.manual_seed(0)
    return Network()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def compiled(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def with_part(name: str, wrap: Callable[..., Any]) -> Callable[[torch.nn.Module], torch.nn.Module]:
    def change(model: torch.nn.Module) -> torch.nn.Module:
        setattr(model, name, wrap(getattr(model, name)))
        return model

    return change


WRAPPERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "compiled": compiled,
    "parallel": torch.nn.DataParallel,
    "replicated": DistributedDataParallel,
    "compiled and replicated": lambda model: compiled(DistributedDataParallel(compiled(model))),
    "compiled part": with_part("head", compiled),
    "checkpointed part": with_part("head", checkpoint_wrapper),
}


def step(model: torch.nn.Module, number: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(5, 3, generator=torch.Generator().manual_seed(number))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def values_of(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors that a tracker finds in a model: the average after the first update."""
    with PostHocEMA.from_model(model, folder, update_every=1) as tracker:
        tracker.update_(model)
        return tracker.state_dict(sigma_rel=0.28)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", WRAPPERS)
def test_snapshots_of_a_wrapped_model_are_those_of_the_bare_one_and_load_into_either(tmp_path: Path, kind: str) -> None:
    bare, wrapped = network(), WRAPPERS[kind](network())
    assert_same_tensors(values_of(wrapped, tmp_path / "values"), bare.state_dict())
    with (
        PostHocEMA.from_model(bare, tmp_path / "bare", **SETTINGS) as one,
        PostHocEMA.from_model(network(), tmp_path / "wrapped", **SETTINGS) as other,  # made before the wrapper
    ):
        for number in range(4):
            step(bare, number)
            one.update_(bare)
            step(wrapped, number)
            other.update_(wrapped)
    for name in ("bare", "wrapped"):
        info = read_directory(tmp_path / name)[-1]
        assert (set(info.tensors), info.aliases) == (NAMES | BUFFERS, {"head.1.weight": "head.0.weight"})
    weights = PostHocEMA.from_path(tmp_path / "wrapped").state_dict(sigma_rel=0.15)
    expected = PostHocEMA.from_path(tmp_path / "bare").state_dict(sigma_rel=0.15)
    for name, tensor in expected.items():
        assert torch.allclose(weights[name], tensor, rtol=1e-5, atol=1e-6), name
    fresh = network()
    fresh.load_state_dict(weights)

    x = torch.randn(6, 3)
    before = values_of(wrapped, tmp_path / "before")
    run = PostHocEMA.from_path(tmp_path / "wrapped", wrapped)
    with run.model(wrapped, sigma_rel=0.15) as averaged, torch.no_grad():
        assert torch.allclose(averaged(x), fresh.eval()(x), rtol=1e-5, atol=1e-6)
        with pytest.raises(NotReadyError, match="holds averaged weights"):
            run.update_(wrapped)
    assert_same_tensors(values_of(wrapped, tmp_path / "after"), before)
    run.load_into(wrapped, sigma_rel=0.15)
    assert_same_tensors(values_of(wrapped, tmp_path / "loaded"), weights)


def test_a_model_in_a_wrapper_of_fsdp_1_is_refused(tmp_path: Path, one_process: None) -> None:
    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"))
    with pytest.raises(InvalidValueError, match=r"model: FSDP1 lays .*; use fully_shard or Distributed"):
        PostHocEMA.from_model(model, tmp_path)


@pytest.mark.parametrize("shape", [(0,), (3, 4)])
def test_parameters_of_deepspeed_zero_3_are_refused_by_name(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """The parameter is a placeholder, or for a while holds all values."""
    model = network()
    head = torch.nn.Parameter(torch.empty(shape))
    head.ds_id, head.ds_tensor = 7, torch.zeros(6)  # type: ignore[attr-defined]
    model.head[0].bias = head  # type: ignore[union-attr]
    with pytest.raises(InvalidValueError, match=r"'head\.0\.bias': is sharded over processes by DeepSpeed ZeRO-3"):
        PostHocEMA.from_model(model, tmp_path)
    with PostHocEMA.from_model(model, tmp_path, exclude="head.0.bias", **SETTINGS) as tracker:
        tracker.update_(model)
        model.module.bias = head  # type: ignore[assignment]
        with pytest.raises(InvalidValueError, match=r"'module\.bias': .* by DeepSpeed ZeRO-3"):
            tracker.update_(model)


JOB = """
from torch.nn.parallel import DistributedDataParallel
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1))
if arguments[0] == "ddp":
    model = DistributedDataParallel(model)
else:
    model[0], model[2] = DistributedDataParallel(model[0]), DistributedDataParallel(model[2])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with PostHocEMA.from_model(model, folder / "run", update_every=1, checkpoint_every=3) as ema:
    for step in range(6):
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()
        ema.update_(model)
    assert (ema.step, ema.t, ema.state_dict() == {}) == (6, 6.0, rank == 1)
"""


@pytest.mark.parametrize("what", ["ddp", "part"])
def test_the_first_of_two_processes_writes(tmp_path: Path, what: str) -> None:
    check_group(JOB, 2, tmp_path, what)
    snapshots = read_directory(tmp_path / "run")
    assert {snapshot.step for snapshot in snapshots} == {3, 6}
    assert {name for name in snapshots[0].tensors if name.startswith("0.")} == {"0.weight", "0.bias"}


BEFORE_WRAPPING = """
from torch.nn.parallel import DistributedDataParallel
values = []

def launch():
    torch.manual_seed(0)
    bare = torch.nn.Linear(3, 2).double()
    if values:
        bare.load_state_dict(values[-1])
    return bare, PostHocEMA.from_model(bare, folder / "run", update_every=1, checkpoint_every=3, resume="auto")

def train(bare, run):
    model = DistributedDataParallel(bare)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.attach(optimizer)
    for _ in range(4):
        generator = torch.Generator().manual_seed(2 * len(values) + rank)
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator).double()).square().mean().backward()
        optimizer.step()
        values.append({name: value.clone() for name, value in bare.state_dict().items()})

bare, run = launch()
train(bare, run)
state = run.state_dict()
assert (state == {}) == (rank == 1)
run.close()
dist.barrier()

bare, run = launch()
run.load_state_dict(state)
assert run.step == 4
train(bare, run)
assert (run.step, run.t, run.state_dict() == {}) == (8, 8.0, rank == 1)
with run.model(bare, 0.28):
    torch.save((values, bare.state_dict()), f"{folder}/result-{rank}.pt")
run.close()
dist.barrier()

# Every process may read the snapshots on disk, until the training continues.
run = PostHocEMA.from_path(folder / "run", bare)
torch.save(run.state_dict(sigma_rel=0.15), f"{folder}/read-{rank}.pt")
dist.barrier()
run.update_(bare)
torch.save(run.state_dict(sigma_rel=0.15), f"{folder}/live-{rank}.pt")
run.close()
"""


def test_a_tracker_that_is_made_before_wrapping_trains_and_resumes_in_two_processes(tmp_path: Path) -> None:
    """The training scripts of diffusers do so. Every process makes every call."""
    results = run_group(BEFORE_WRAPPING, 2, tmp_path)
    assert [result.code for result in results] == [0, 0]
    values, averaged = torch.load(tmp_path / "result-1.pt", weights_only=True)
    for name, value in averaged.items():
        exact = exact_average([weights[name].numpy() for weights in values], 0.28, range(1, 9))
        # Eight updates in float64: each rounds by at most half a unit in the last place of values below 1.
        assert abs(value.numpy() - exact).max() < 8 * 2**-53
    for kind in ("read", "live"):
        first, second = (torch.load(tmp_path / f"{kind}-{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(value, second[name]) for name, value in first.items())


PEFTS = pytest.mark.filterwarnings("ignore")  # whose own warnings are many
LORA = LoraConfig(r=2, target_modules=["middle", "embed"], modules_to_save=["head"])
CONFIGS = {
    "lora": LORA,
    "dora": LoraConfig(r=2, target_modules=["middle"], use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=["middle"]),
}


class Adapted(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, 4)
        self.middle = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.middle(self.embed(x).mean(1))))


def track(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Train for a few steps, and return an average."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=4, checkpoint_dtype=None) as run:
        for _ in range(8):
            model(torch.randint(0, 7, (8, 3))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.update_(model)
    return PostHocEMA.from_path(folder).state_dict(sigma_rel=0.15)


@PEFTS
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("wrap", [lambda m: m, torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_an_adapter_has_the_names_that_peft_saves(kind: str, wrap) -> None:  # type: ignore[no-untyped-def]
    model = get_peft_model(Adapted(), CONFIGS[kind])
    tensors = collect_tensors(wrap(model), Selection())
    assert set(tensors.averaged) == set(get_peft_model_state_dict(model, save_embedding_layers=False))
    assert not tensors.copied
    assert "base_model.model.middle.base_layer.weight" in tensors.tracked.left_out


@PEFTS
def test_pefts_own_functions_load_averages(tmp_path: Path) -> None:
    model = get_peft_model(Adapted(), LORA)
    weights = track(model, tmp_path / "run")
    assert set(read_directory(tmp_path / "run")[0].tensors) == set(weights)

    x = torch.randint(0, 7, (8, 3))
    run = PostHocEMA.from_path(tmp_path / "run", model)
    with run.model(model, sigma_rel=0.15) as averaged, torch.no_grad():
        expected = averaged(x)
    assert not torch.allclose(model(x), expected)

    fresh = get_peft_model(Adapted(), LORA)
    loaded = set_peft_model_state_dict(fresh, weights)
    assert not loaded.unexpected_keys
    assert torch.equal(fresh.eval()(x), expected)

    # In a folder that from_pretrained reads, with PEFT's configuration and our weights.
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    save_file(dict(weights), tmp_path / "adapter" / "adapter_model.safetensors")
    read = PeftModel.from_pretrained(Adapted(), str(tmp_path / "adapter"))
    assert torch.equal(read.eval()(x), expected)


def names(model: torch.nn.Module, **filters: bool) -> set[str]:
    return set(collect_tensors(model, Selection(**filters)).averaged)


@PEFTS
def test_names_of_adapters_in_compiled_parts_in_a_larger_model_and_of_several_adapters() -> None:
    model = get_peft_model(Adapted(), LORA)
    expected = names(model)
    model.base_model.model.middle = torch.compile(model.base_model.model.middle, backend="eager")
    assert names(model) == expected
    model = get_peft_model(Adapted(), CONFIGS["dora"])
    both = torch.nn.ModuleDict({"text": model, "image": torch.nn.Linear(2, 2)})
    assert {"text.base_model.model.middle.lora_A.weight", "image.weight"} < names(both)
    model.add_adapter("second", CONFIGS["dora"])
    each = {f"base_model.model.middle.lora_A.{name}.weight" for name in ("default", "second")}
    assert each < names(model, only_trainable=False)
