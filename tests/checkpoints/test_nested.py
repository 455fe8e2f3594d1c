"""Checkpoints that lie below numbered folders, and the lines that say where others lie."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import distributed
from saved import assert_equal, read, store, times, values_of

from posthoc_cli import Run, files
from posthoc_cli.errors import InvalidValueError, PostHocError

STEPS = (100, 200, 400)
Tensors = dict[str, torch.Tensor]
Save = Callable[[Path, int, Tensors], Any]


def weights_at(step: int) -> Tensors:
    return {
        "a.weight": torch.arange(6.0) * step,
        "a.bias": torch.ones(2) + step,
    }


def save_in(folder: Path, weights: Tensors) -> None:
    store(folder / "model.safetensors", weights)


def lerobot(folder, step, weights):
    place = folder / f"{step:06}"
    save_in(place / "pretrained_model", weights)
    store(place / "training_state" / "optimizer_state.safetensors", {"x": torch.ones(3)})
    if step == STEPS[-1]:
        (folder / "last").symlink_to(place.name)


def olmo(folder, step, weights):
    place = folder / f"step{step}"
    for rank in range(2):
        store(place / "train" / f"rank{rank}.pt", {"max_steps": 9})
    distributed(place / "model_and_optim", {"model": weights})


def lightning_deepspeed(folder, step, weights):
    place = folder / f"epoch=0-step={step}.ckpt" / "checkpoint"
    flat = {"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(9)]}}
    store(place / "mp_rank_00_model_states.pt", {"module": weights, "global_steps": step})
    store(place / "zero_pp_rank_0_mp_rank_00_optim_states.pt", flat)
    store(place / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", flat)
    (place.parent / "latest").write_text("checkpoint")


def write(folder: Path, save: Save) -> Path:
    for step in STEPS:
        save(folder, step, weights_at(step))
    return folder


def beside_a_trainer(folder, step, weights):
    place = folder / f"iter_{step:06}"
    store(place / "unet" / "diffusion_pytorch_model.bin", weights)
    store(place / "trainer.ckpt", {"optimizer": {"state": {0: weights}}})


def fairseq2(folder, step, weights):
    place = folder / f"step_{step}"
    store(place / "model" / "pp_00" / "tp_00" / "sdp_00.pt", {"model": weights})
    store(place / "trainer" / "rank_00.pt", {"state": {}, "param_groups": [{"lr": 0.1}]})


def verl(folder, step, weights, ranks=1):
    place = folder / f"global_step_{step}"
    store(place / "data.pt", {"_num_yielded": step})
    for rank in range(ranks):
        for name, content in {"model": weights, "optim": {}, "extra_state": {}}.items():
            store(place / "actor" / f"{name}_world_size_{ranks}_rank_{rank}.pt", content)


@pytest.mark.parametrize(
    "save",
    [
        lerobot,
        olmo,
        lightning_deepspeed,
        beside_a_trainer,
        fairseq2,
        verl,
    ],
)
def test_weights_below_numbered_folders_have_their_numbers(save, tmp_path):
    place = write(tmp_path / "run", save)
    sources = Run(place).sources
    assert [source.t for source in sources] == [*STEPS]
    assert_equal(values_of(sources[-1]), weights_at(STEPS[-1]))


def two_models(folder, step, weights):
    for name in ("student", "critic"):
        save_in(folder / f"{step}" / name, weights)


def other_number(folder, step, weights):
    save_in(folder / f"try{step}" / "stage2", weights)


def experiments(folder, step, weights):
    save_in(folder / f"exp{step}" / "final", weights)


def zero_3(folder, step, weights):
    place = folder / f"checkpoint-{step}" / f"global_step{step}"
    empty = dict.fromkeys(weights, torch.empty(0))
    for rank in range(2):
        store(place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", {"module": empty})


def nanotron(folder, step, weights):
    for part in ("body", "head"):
        place = folder / str(step) / "model" / part
        store(place / "model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors", weights)


def without_endings(folder, step, weights):
    store(folder / f"g_{step:08}", {"generator": weights})
    (folder / f"events.{step}").write_text("text")


def versions(folder, step, weights):
    """A training that was resumed by Lightning."""
    for number in range(2):
        place = folder / f"version_{step}" / "checkpoints"
        store(place / f"epoch={number}-step={step + number}.ckpt", {"state_dict": weights})


def foreign(folder, step, weights):
    folder.mkdir(exist_ok=True)
    (folder / f"model-{step}.gguf").write_bytes(b"GGUF" + bytes(100))


def orbax(folder, step, _):
    (folder / str(step)).mkdir(parents=True)
    (folder / str(step) / "_CHECKPOINT_METADATA").write_text("{}")


def one_level_up(folder, step, weights):
    lerobot(folder / "checkpoints", step, weights)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (two_models, r"models in 'critic', 'student'; name .* '\S+run/\*/critic' or '\S+/student'"),
        (other_number, r"models in 'stage2'; name .* glob, such as '\S+run/\*/stage\*'"),
        (experiments, r"models in 'final'; name .* glob, such as '\S+run/\*/final', .*`step_from`"),
        (zero_3, r"global_step\d+: holds partitions .*; convert .*zero_to_fp32.py"),
        (partial(verl, ranks=2), r"actor: holds partitions .*; convert .*own script"),
        (nanotron, r"model/head: holds partitions .*; convert .*own script"),
        (without_endings, r"no usual endings; name .* by a glob, such as '\S+run/g_\*', perhaps"),
        (versions, r"by a glob, such as '\S+run/\*/checkpoints/\*', perhaps"),
        (foreign, r"of kinds that are not read: 'model-100.gguf', .*; save the tensors as .safet"),
        (orbax, r"of kinds that are not read: .*, or by torch.save; unpack archives"),
        (one_level_up, r"run: holds no checkpoints itself; name its folder checkpoints"),
    ],
)
def test_models_that_are_not_taken_are_named(save, message, tmp_path):
    place = write(tmp_path / "run", save)
    with pytest.raises(PostHocError, match=message):
        read(place)


def test_info_names_them(tmp_path):
    place = write(tmp_path / "run", two_models)
    with pytest.raises(PostHocError, match="models in 'critic', 'student'"):
        Run(place).info()


def test_a_glob_of_a_message_opens_the_files(tmp_path):
    place = write(tmp_path / "run", without_endings)
    with pytest.raises(InvalidValueError) as caught:
        _ = Run(place).sources
    pattern = str(caught.value).split("'")[1]
    assert times(pattern) == [*STEPS]


def test_files_two_folders_down_are_not_opened(tmp_path, monkeypatch):
    """To read those of a whole disk takes minutes."""
    for name in ("first.pkl", "other.pkl"):
        store(tmp_path / "data" / "words" / name, {"x": torch.ones(3)})
    opened = []
    monkeypatch.setattr(files.system, "open", opened.append)
    with pytest.raises(PostHocError, match="holds no snapshots, outputs or models"):
        Run(tmp_path).info()
    assert not opened
