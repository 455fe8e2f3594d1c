"""Model folders with averaged weights, made like a given folder: the real libraries load them, and
compute the same."""

import json

import pytest
import torch
from checking import refused

pytest.importorskip("transformers")

from checking import assert_same_tensors
from safetensors.torch import load_file
from tracker import runs
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from posthoc_cli import PostHocEMA, PostHocError, Run
from posthoc_cli.errors import MismatchError

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own

TEXT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**TEXT, **options))


def track(model, folder, **options):
    """Write a run of six steps that move every parameter at random."""
    with runs.track(model, folder, checkpoint_every=2, checkpoint_dtype=None, **options) as ema:
        for _ in range(6):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.02 * torch.randn_like(parameter)
            ema.update_(model)


@torch.no_grad()
def answer(model):
    tokens = torch.arange(1, 9)[None]
    return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_loads_without_warnings_and_computes_the_same_as_a_filled_model(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    like = tmp_path / "like"
    new = tmp_path / "new"
    model.save_pretrained(like, max_shard_size="10KB")
    (like / "tokenizer.json").write_text("{}")
    track(model, tmp_path / "run")
    report = Run(tmp_path / "run").write(0.2, new, like=like)
    assert report.copied.kept == []
    loaded, warnings = type(model).from_pretrained(new, output_loading_info=True)
    assert not any(warnings.values()), warnings
    PostHocEMA.from_path(tmp_path / "run").load_into(model, 0.2)
    assert torch.equal(answer(loaded), answer(model))
    assert {path.name for path in new.iterdir()} == {path.name for path in like.iterdir()}
    for path in like.iterdir():
        if path.suffix != ".safetensors":
            assert (new / path.name).read_bytes() == path.read_bytes(), path


def test_dtypes_and_tensors_that_the_run_lacks_are_those_of_the_folder(tmp_path, ema):
    model = llama()
    model.model.norm.weight.requires_grad_(False)
    like = tmp_path / "like"
    llama().bfloat16().save_pretrained(like)
    run = tmp_path / "run"
    new = tmp_path / "new"
    track(model, run)
    done = ema("synthesize", run, "--sigma-rel", 0.2, "--like", like, "--out", new)
    assert "kept 1 tensor (model.norm.weight)" in done.err
    loaded = type(model).from_pretrained(new, dtype="auto")
    raw = load_file(like / "model.safetensors")
    average = Run(run).average(0.2, dtype="bfloat16")
    assert_same_tensors(loaded.state_dict(), raw | average)


def test_tensors_that_transformers_renames_on_disk_are_refused_with_a_way_out(tmp_path):
    """In memory the experts of a mixture are one tensor."""
    model = MixtralForCausalLM(MixtralConfig(**TEXT, num_local_experts=2))
    model.save_pretrained(tmp_path / "like")
    track(model, tmp_path / "run")
    with pytest.raises(MismatchError, match=r"mlp\.experts.*load_into"):
        Run(tmp_path / "run").write(0.2, tmp_path / "new", like=tmp_path / "like")
    assert not (tmp_path / "new").exists()


def test_the_component_of_a_pipeline(tmp_path):
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


def quantized(folder):
    config = folder / "config.json"
    content = json.loads(config.read_text())
    content["quantization_config"] = {"bits": 8}
    config.write_text(json.dumps(content))


def without_weights(folder):
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "fact"),
    [(quantized, "quantization_config"), (without_weights, "weights")],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, change, fact):
    model = llama()
    track(model, tmp_path / "run")
    model.save_pretrained(tmp_path / "like")
    change(tmp_path / "like")
    with refused(tmp_path / "like", fact, kind=PostHocError):
        Run(tmp_path / "run").write(0.2, tmp_path / "new", like=tmp_path / "like")
    assert not (tmp_path / "new").exists()
