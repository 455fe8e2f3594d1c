"""Averages of a low-rank adapter's products, added to the base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_command import Ema
from factories import exact_weights, write_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posthoc_cli import Run
from posthoc_cli.errors import FileFormatError, MismatchError, PostHocError, VanishedError

CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 12}
STEPS = range(1, 41)
MODULES = {"blocks.0.query": (8, 6), "blocks.1.out_proj": (5, 8)}
Factors = dict[str, torch.Tensor]


def trajectory(rank: int = 3) -> list[Factors]:
    """Factors during a training by gradients, towards a noisy update of each module."""
    draw = torch.Generator().manual_seed(0)
    factors = {}
    for module, (rows, columns) in MODULES.items():
        factors[f"{module}.A"] = torch.randn(rank, columns, generator=draw).requires_grad_()
        factors[f"{module}.B"] = torch.zeros(rows, rank).requires_grad_()
    optimizer = torch.optim.Adam(factors.values(), lr=0.1)
    wanted = {module: torch.randn(shape, generator=draw) for module, shape in MODULES.items()}
    history = []
    for _ in STEPS:
        optimizer.zero_grad()
        for module, update in wanted.items():
            noise = torch.randn(update.shape, generator=draw)
            (factors[f"{module}.B"] @ factors[f"{module}.A"] - update - noise).square().mean().backward()
        optimizer.step()
        history.append({name: value.detach().clone() for name, value in factors.items()})
    return history


def peft_names(factors: Factors) -> Factors:
    """The names of the factors in a file of PEFT."""
    return {f"base_model.model.{name[:-2]}.lora_{name[-1]}.weight": value for name, value in factors.items()}


def kohya_names(factors: Factors) -> Factors:
    """The names in a file of kohya's scripts, with the scale 12 / rank."""
    flat = {name: f"lora_unet_{name[:-2].replace('.', '_')}" for name in factors}
    parts = {"A": "lora_down", "B": "lora_up"}
    named = {f"{flat[name]}.{parts[name[-1]]}.weight": value for name, value in factors.items()}
    return named | {f"{flat[name]}.alpha": torch.tensor(12.0) for name in factors}


def base_weights() -> Factors:
    draw = torch.Generator().manual_seed(7)
    weights = {f"{module}.weight": torch.randn(shape, generator=draw) for module, shape in MODULES.items()}
    return weights | {"norm.weight": torch.randn(8, generator=draw), "count": torch.tensor(3)}


def truth(base: Factors, history: Sequence[Factors], shares: Mapping[int, float], scale: float = 4.0) -> Factors:
    """The base plus the sum of the products at steps (counted from 1) times their shares, in float64."""
    merged = {name: value.double() for name, value in base.items()}
    for module in MODULES:
        for step, share in shares.items():
            factors = history[step - 1]
            merged[f"{module}.weight"] += (
                share * scale * factors[f"{module}.B"].double() @ factors[f"{module}.A"].double()
            )
    return merged


def distance(found: Factors, wanted: Factors, base: Factors) -> float:
    """L2 distance, relative to the change by the adapter."""
    names = [f"{module}.weight" for module in MODULES]
    off = sum(float((found[name].double() - wanted[name]).square().sum()) for name in names)
    return (off / sum(float((wanted[name] - base[name].double()).square().sum()) for name in names)) ** 0.5


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(base_weights(), tmp_path / "base.safetensors", {"format": "pt"})
    return tmp_path / "base.safetensors"


def checkpoints(folder: Path, history: Sequence[Factors], kohya: bool = False, every: int = 1) -> Path:
    for step in STEPS[every - 1 :: every]:
        if kohya:
            folder.mkdir(exist_ok=True)
            meta = {"ss_steps": str(step), "ss_network_dim": "3", "modelspec.title": "x", "sshs_model_hash": "0" * 64}
            save_file(kohya_names(history[step - 1]), folder / f"x-{step:06}.safetensors", meta)
        else:
            save_peft(folder / f"checkpoint-{step}", peft_names(history[step - 1]), json.dumps(CONFIG))
    return folder


def save_peft(checkpoint: Path, tensors: Factors, config: str) -> None:
    checkpoint.mkdir(parents=True, exist_ok=True)
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    (checkpoint / "adapter_config.json").write_text(config)


@pytest.mark.parametrize("kohya", [False, True], ids=["peft", "kohya"])
def test_the_average_of_products_is_the_float64_sum_and_not_the_product_of_averages(
    tmp_path: Path, base: Path, kohya: bool, ema: Ema
) -> None:
    history = trajectory()
    run = checkpoints(tmp_path / "run", history, kohya)
    weights = base_weights()
    for target, steps in (("last:10", 10), ("window:20", 20)):  # exact, with a checkpoint at every step
        wanted = truth(weights, history, dict.fromkeys(STEPS[-steps:], 1 / steps))
        out = tmp_path / f"{steps}.safetensors"
        result = ema("export", run, "--merge", base, "--target", target, "--out", out, "--json")
        assert json.loads(result.out)["from_base"] == 2
        found = load_file(out)
        assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in weights.items()}
        assert torch.equal(found["norm.weight"], weights["norm.weight"])
        assert found["count"] == 3
        assert distance(found, wanted, weights) < 1e-6  # float32 sums
        mean = {name: sum(now[name] for now in history[-steps:]) / steps for name in history[0]}
        assert distance(truth(weights, [mean], {1: 1}), wanted, weights) > 1e-3
        assert ema("verify", out).code == 0


def test_snapshots_of_an_adapter_and_shards_of_a_base(tmp_path: Path, base: Path) -> None:
    """The averaged factors make the product, not the factors of each snapshot; a sharded base keeps its dtype."""
    history, weights, out = trajectory(), base_weights(), tmp_path / "out.safetensors"
    write_run(tmp_path / "run", list(map(peft_names, history)), STEPS[1::2], (0.05, 0.1))
    run = Run(tmp_path / "run")
    with pytest.raises(MismatchError, match=r"the alpha by which.*put the adapter's adapter_config\.json next to it"):
        run.merge(0.1, base, out)
    (tmp_path / "run/adapter_config.json").write_text(json.dumps(CONFIG))
    run.merge(0.1, base, out)
    shares = dict(zip(STEPS, exact_weights(0.1, STEPS).tolist(), strict=True))
    mean = {
        name: sum(share * history[step - 1][name].double() for step, share in shares.items()) for name in history[0]
    }
    assert distance(load_file(out), truth(weights, [mean], {1: 1}), weights) < 1e-6
    assert distance(load_file(out), truth(weights, history, shares), weights) > 1e-3
    run.merge(0.08, base, out, overwrite=True)
    stored = run.average(0.08)
    factors = {name: stored[stored_name] for name, stored_name in zip(history[0], peft_names(history[0]), strict=True)}
    assert distance(load_file(out), truth(weights, [factors], {1: 1}), weights) < 1e-5
    save_file({name: value.bfloat16() for name, value in weights.items() if name != "count"}, base)
    run.merge(0.1, base, tmp_path / "half", layout="sharded", max_shard_size="150B")
    index = json.loads((tmp_path / "half/model.safetensors.index.json").read_text())["weight_map"]
    assert len({*index.values()}) > 1
    run.merge(0.1, tmp_path / "half", out, dtype="float32", overwrite=True)
    assert {value.dtype for value in load_file(out).values()} == {torch.float32}


def test_convolutions_scales_by_pattern_and_the_root_of_the_rank(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    down, up = torch.randn(2, 3, 3, 3, generator=draw), torch.randn(4, 2, 1, 1, generator=draw)
    flat, back = torch.randn(2, 5, generator=draw), torch.randn(6, 2, generator=draw)
    names = {"unet.conv_in.lora_A.weight": down, "unet.conv_in.lora_B.weight": up}
    names |= {"unet.mid.proj.lora_A.weight": flat, "unet.mid.proj.lora_B.weight": back}
    config = {"lora_alpha": 8, "use_rslora": True, "alpha_pattern": {"conv_in": 6}}
    save_peft(tmp_path / "run/checkpoint-1", names, json.dumps(config))
    weights = {"conv_in.weight": torch.zeros(4, 3, 3, 3), "mid.proj.weight": torch.zeros(6, 5)}
    save_file(weights, tmp_path / "base.safetensors")
    Run(tmp_path / "run").merge("last:1", tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    x = torch.randn(1, 3, 7, 7, generator=draw)
    wanted = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down), up) * 6 / 2**0.5
    assert torch.allclose(torch.nn.functional.conv2d(x, found["conv_in.weight"]), wanted, atol=1e-4)
    assert torch.allclose(found["mid.proj.weight"], back @ flat * 8 / 2**0.5, atol=1e-5)


def test_an_adapter_or_a_base_that_cannot_be_merged_is_an_error_of_one_line(
    tmp_path: Path, base: Path, ema: Ema
) -> None:
    history, out = trajectory(), tmp_path / "out.safetensors"
    run = checkpoints(tmp_path / "run", history, every=10)

    def refused(message: str, *options: Any, code: int = 1, folder: Path = run) -> None:
        result = ema("export", folder, "--merge", base, "--out", out, *(options or ("--target", "last:2")))
        assert result.code == code, result.err
        assert message in result.err
        assert len(result.err.splitlines()) == 1, result.err
        assert not out.exists()

    refused("needs one average, not 2", "--sigma-rel", "0.1,0.2", code=2)
    refused("leave out --base, --prefix, --strip-prefix", "--sigma-rel", "0.1", "--prefix", "x.", code=2)
    result = ema("export", base, "--sigma-rel", "0.1", "--out", out)
    assert result.code == 2
    assert "are for --merge" in result.err
    weights = base_weights()
    save_file({name: value for name, value in weights.items() if "out_proj" not in name}, base)
    refused("has no weight of the adapter's module 'blocks.1.out_proj'")
    save_file(weights | {"blocks.0.query.weight": torch.zeros(8, 6, dtype=torch.int8)}, base)
    refused("tensor 'blocks.0.query.weight' is quantized: I8")
    save_file(weights | {"blocks.0.query.weight": torch.zeros(8, 7)}, base)
    refused("'blocks.0.query.weight' has the shape [8, 7]")
    save_file(weights | {"blocks.0.query.weight": torch.full((8, 6), torch.inf)}, base)
    refused("holds nan or infinity")
    base.unlink()
    with pytest.raises(FileFormatError, match=r"base\.safetensors: cannot be opened") as missing:
        Run(run).merge("last:2", base, out)
    assert not isinstance(missing.value, VanishedError)
    save_file(weights, base)
    both = checkpoints(tmp_path / "both", history, every=40)
    again = {name.removeprefix("base_model.model."): value.clone() for name, value in peft_names(history[0]).items()}
    save_file(peft_names(history[0]) | again, both / "checkpoint-40/adapter_model.safetensors")
    refused("are both of 'blocks.0.query.weight'", "--target", "last:1", code=2, folder=both)
    other = run / "checkpoint-20"
    save_file(peft_names(trajectory(rank=4)[5]), other / "adapter_model.safetensors")
    refused("[4, 6]")

    def rewrite(change: Callable[[Factors], Factors], config: str = json.dumps(CONFIG)) -> None:
        for step in range(10, 41, 10):
            save_peft(run / f"checkpoint-{step}", change(peft_names(history[step - 1])), config)

    magnitude = {"base_model.model.blocks.0.query.lora_magnitude_vector.weight": torch.ones(8)}
    rewrite(lambda factors: factors | magnitude)
    refused("lora_magnitude_vector.weight' is no factor of LoRA")
    rewrite(lambda _: {"w": torch.ones(2)})
    refused("'w' is no factor of LoRA")
    rewrite(lambda factors: {name: value for name, value in factors.items() if "lora_A" in name})
    refused("'base_model.model.blocks.0.query' has only one of its two factors")
    for pattern in ('{"(": 1}', '["a"]', '{"m": "x"}', '{"m": null}'):
        rewrite(lambda factors: factors, f'{{"lora_alpha": 1, "alpha_pattern": {pattern}}}')
        refused("numbers lora_alpha and alpha_pattern")
    rewrite(lambda factors: factors, '{"lora_alpha": null}')
    refused("is no configuration of LoRA with numbers lora_alpha and alpha_pattern")
    with pytest.raises(TypeError, match="unexpected keyword argument 'lik'"):
        Run(run).merge(0.1, base, out, lik=3)


def test_kohyas_metadata_stays_with_an_adapter(tmp_path: Path, ema: Ema) -> None:
    """Hashes of the tensors are dropped if the tensors change."""
    run = checkpoints(tmp_path / "run", trajectory(), kohya=True)
    newest = run / "x-000040.safetensors"

    def kept(path: Path) -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return {name: value for name, value in file.metadata().items() if not name.startswith("ema.")}

    assert ema("export", newest, "--out", tmp_path / "same.safetensors").code == 0
    same = {"ss_steps": "40", "ss_network_dim": "3", "modelspec.title": "x"}
    assert kept(tmp_path / "same.safetensors") == same | {"format": "pt", "sshs_model_hash": "0" * 64}
    assert ema("export", newest, "--out", tmp_path / "half.safetensors", "--dtype", "fp16").code == 0
    assert kept(tmp_path / "half.safetensors") == same | {"format": "pt"}
    assert ema("synthesize", run, "--sigma-rel", "0.2", "--out", tmp_path / "average.safetensors").code == 0
    average = kept(tmp_path / "average.safetensors")
    assert {name: average[name] for name in same} == same
    assert "sshs_model_hash" not in average
    assert ema("export", tmp_path / "average.safetensors", "--out", tmp_path / "again.safetensors").code == 0
    assert kept(tmp_path / "again.safetensors").items() >= same.items()
    assert ema("verify", tmp_path / "again.safetensors").code == 0
    with pytest.raises(PostHocError):
        Run(tmp_path / "average.safetensors").merge(0.1, newest, tmp_path / "x.safetensors")
