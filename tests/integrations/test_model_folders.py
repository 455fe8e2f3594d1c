"""Model folders with averaged weights, made like a given folder: the real libraries load them, and
compute the same."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from checking import assert_same_tensors
from ema_command import Ema
from safetensors.torch import load_file, save_file
from tracker import runs
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import FileFormatError, MismatchError, OutputExistsError

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
LLAMA = {**TEXT, "num_key_value_heads": 2}
T5 = {
    "d_model": 16,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "d_kv": 8,
    "vocab_size": 32,
    "decoder_start_token_id": 0,
}
MODELS: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**LLAMA)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "bert": (BertForMaskedLM, BertConfig(**TEXT, max_position_embeddings=16)),
    "t5": (T5ForConditionalGeneration, T5Config(**T5)),
}


def model_of(name: str) -> nn.Module:
    kind, config = MODELS[name]
    return kind(deepcopy(config))


def track(model: nn.Module, folder: Path, **options: Any) -> None:
    """Write a run of six steps that move every parameter at random."""
    with runs.track(model, folder, checkpoint_every=2, checkpoint_dtype=None, **options) as ema:
        for _ in range(6):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.02 * torch.randn_like(parameter)
            ema.update_(model)


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    tokens = torch.arange(1, 9)[None]
    more = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=tokens, **more).logits


def stored(folder: Path) -> dict[tuple[str, str], torch.dtype]:
    dtypes = {}
    for path in folder.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            dtypes[path.name, name] = tensor.dtype
    return dtypes


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("llama", "10KB"),
        ("llama-tied", "1GB"),
        ("bert", "10KB"),
        ("t5", "1GB"),
    ],
)
def test_a_folder_loads_without_warnings_and_computes_the_same_as_a_filled_model(
    tmp_path: Path,
    name: str,
    size: str,
) -> None:
    model = model_of(name)
    like = tmp_path / "like"
    new = tmp_path / "new"
    model.save_pretrained(like, max_shard_size=size)
    (like / "tokenizer.json").write_text("{}")
    track(model, tmp_path / "run")
    report = Run(tmp_path / "run").write(0.2, new, like=like)
    assert report.copied.kept == []
    loaded, warnings = type(model).from_pretrained(new, output_loading_info=True)
    assert not any(warnings.values()), warnings
    raw = answer(model)
    PostHocEMA.from_path(tmp_path / "run").load_into(model, 0.2)
    assert torch.equal(answer(loaded), answer(model))
    assert not torch.equal(answer(loaded), raw)
    assert stored(new) == stored(like)
    for path in like.iterdir():
        if path.suffix != ".safetensors":
            assert (new / path.name).read_bytes() == path.read_bytes(), path
    assert not [*tmp_path.glob(".*")]


def test_dtypes_and_tensors_that_the_run_lacks_are_those_of_the_folder(
    tmp_path: Path,
    ema: Ema,
) -> None:
    model = model_of("llama-tied")
    model.model.norm.weight.requires_grad_(False)
    like = tmp_path / "like"
    model_of("llama-tied").bfloat16().save_pretrained(like)
    run = tmp_path / "run"
    new = tmp_path / "new"
    track(model, run)
    done = ema("synthesize", run, "--sigma-rel", "0.1,0.2", "--like", like, "--out", new)
    assert done.code == 0, done.err
    assert "kept 1 tensor (model.norm.weight) of like, which the run does not have" in done.err
    raw = load_file(like / "model.safetensors")
    for sigma_rel in (0.1, 0.2):
        folder = new / f"sigma_rel-{sigma_rel}"
        loaded = type(model).from_pretrained(folder, dtype="auto")
        average = Run(run).average(sigma_rel, dtype="bfloat16")
        assert_same_tensors(loaded.state_dict(), raw | average)
        assert stored(folder) == stored(like)


def test_tensors_that_transformers_renames_on_disk_are_refused_with_a_way_out(
    tmp_path: Path,
) -> None:
    """In memory the experts of a mixture are one tensor."""
    experts = {"num_key_value_heads": 2, "num_experts_per_tok": 1, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**TEXT, **experts))
    model.save_pretrained(tmp_path / "like")
    track(model, tmp_path / "run")
    with pytest.raises(MismatchError, match=r"mlp\.experts.*load_into.*save_pretrained"):
        Run(tmp_path / "run").write(0.2, tmp_path / "new", like=tmp_path / "like")
    assert not (tmp_path / "new").exists()
    PostHocEMA.from_path(tmp_path / "run").load_into(model, 0.2)
    model.save_pretrained(tmp_path / "new")
    loaded = MixtralForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(answer(loaded), answer(model))


def test_the_component_of_a_pipeline(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    from integrations.unet import network

    unet = network()
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=10)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path / "like")
    track(unet, tmp_path / "run")
    Run(tmp_path / "run").write(0.2, tmp_path / "new", like=tmp_path / "like")
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path / "new")
    PostHocEMA.from_path(tmp_path / "run").load_into(unet, 0.2)
    assert_same_tensors(loaded.unet.state_dict(), unet.state_dict())


def test_folders_and_options_that_do_not_fit_are_errors_that_leave_nothing_behind(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of("llama")
    track(model, tmp_path / "run")
    for name in ("like", "renamed", "quantized"):
        model.save_pretrained(tmp_path / name)
    model.save_pretrained(tmp_path / "broken", max_shard_size="10KB")
    next((tmp_path / "broken").glob("*.safetensors")).unlink()
    (tmp_path / "empty").mkdir()
    weights = load_file(tmp_path / "renamed/model.safetensors")
    # a name that only a library could know
    weights["model.norm.scale"] = weights.pop("model.norm.weight")
    save_file(weights, tmp_path / "renamed/model.safetensors", {"format": "pt"})
    config = tmp_path / "quantized/config.json"
    content = json.loads(config.read_text())
    content["quantization_config"] = {"bits": 8}
    config.write_text(json.dumps(content))
    for like, kind, words in (
        ("renamed", MismatchError, r"renamed: 1 tensors .*'model\.norm\.weight'.*save_pretrained"),
        ("quantized", MismatchError, r"quantized: .* quantization_config"),
        ("broken", FileFormatError, r"of-0000\d\.safetensors: cannot be opened"),
        ("empty", FileFormatError, "holds no weights"),
    ):
        with pytest.raises(kind, match=words):
            Run(tmp_path / "run").write(0.2, tmp_path / "new", like=tmp_path / like)
    with pytest.raises(OutputExistsError, match="new folder"):
        Run(tmp_path / "run").write(0.2, tmp_path / "quantized", like=tmp_path / "like")
    assert "planning again" not in caplog.text
    assert not (tmp_path / "new").exists()
    assert not [*tmp_path.glob(".*")]
