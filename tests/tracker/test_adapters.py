"""PEFT: adapters only, under the names that PEFT itself saves and loads them by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import (
    LoHaConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import save_file

from posthoc_cli import PostHocEMA
from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.format import Selection
from posthoc_cli.tracker.model_tensors import collect_tensors

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT itself

LORA = LoraConfig(r=2, target_modules=["middle", "embed"], modules_to_save=["head"])
CONFIGS = {
    "lora": LORA,
    "dora": LoraConfig(r=2, target_modules=["middle"], use_dora=True),
    "loha": LoHaConfig(r=2, target_modules=["middle"]),
}


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(7, 4)
        self.middle = torch.nn.Linear(4, 4)
        self.head = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.middle(self.embed(x).mean(1))))


def track(model: torch.nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """Train for a few steps; returns an average."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    with PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=4, checkpoint_dtype=None) as run:
        for _ in range(8):
            model(torch.randint(0, 7, (8, 3))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            run.update_(model)
    return PostHocEMA.from_path(folder).state_dict(sigma_rel=0.15)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("wrap", [lambda m: m, torch.nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_an_adapter_has_the_names_that_peft_saves(kind: str, wrap) -> None:  # type: ignore[no-untyped-def]
    model = get_peft_model(Network(), CONFIGS[kind])
    found = collect_tensors(wrap(model), Selection())
    assert set(found.averaged) == set(get_peft_model_state_dict(model, save_embedding_layers=False))
    assert not found.copied
    assert "base_model.model.middle.base_layer.weight" in found.left_out


def test_averages_load_by_pefts_own_functions(tmp_path: Path) -> None:
    model = get_peft_model(Network(), LORA)
    weights = track(model, tmp_path / "run")
    assert set(read_directory(tmp_path / "run")[0].info.tensors) == set(weights)

    x = torch.randint(0, 7, (8, 3))
    run = PostHocEMA.from_path(tmp_path / "run", model)
    with run.model(model, sigma_rel=0.15) as averaged, torch.no_grad():
        expected = averaged(x)
    assert not torch.allclose(model(x), expected)

    fresh = get_peft_model(Network(), LORA)
    loaded = set_peft_model_state_dict(fresh, weights)
    assert not loaded.unexpected_keys
    assert torch.equal(fresh.eval()(x), expected)

    # As a folder that from_pretrained reads: PEFT's own configuration, our weights.
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    save_file(dict(weights), tmp_path / "adapter" / "adapter_model.safetensors")
    read = PeftModel.from_pretrained(Network(), str(tmp_path / "adapter"))
    assert torch.equal(read.eval()(x), expected)


def test_an_adapter_injected_into_a_model_has_pefts_names_too(tmp_path: Path) -> None:
    model = inject_adapter_in_model(CONFIGS["lora"], Network())
    weights = track(model, tmp_path)
    assert set(weights) == set(get_peft_model_state_dict(model, save_embedding_layers=False))
    fresh = inject_adapter_in_model(CONFIGS["lora"], Network())
    set_peft_model_state_dict(fresh, weights)
    PostHocEMA.from_path(tmp_path).load_into(model, sigma_rel=0.15)
    x = torch.randint(0, 7, (8, 3))
    assert torch.equal(fresh(x), model(x))


def names(model: torch.nn.Module, **filters: bool) -> set[str]:
    return set(collect_tensors(model, Selection(**filters)).averaged)


def test_names_where_a_part_is_compiled_or_the_model_is_one_of_several_or_has_several_adapters() -> None:
    model = get_peft_model(Network(), LORA)
    expected = names(model)
    model.base_model.model.middle = torch.compile(model.base_model.model.middle, backend="eager")
    assert names(model) == expected
    model = get_peft_model(Network(), CONFIGS["dora"])
    both = torch.nn.ModuleDict({"text": model, "image": torch.nn.Linear(2, 2)})
    assert {"text.base_model.model.middle.lora_A.weight", "image.weight"} < names(both)
    model.add_adapter("second", CONFIGS["dora"])
    each = {f"base_model.model.middle.lora_A.{name}.weight" for name in ("default", "second")}
    assert each < names(model, only_trainable=False)
