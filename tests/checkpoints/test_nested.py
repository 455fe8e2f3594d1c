"""Checkpoints that lie below numbered folders, and the lines that say where others lie."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import distributed
from safetensors.torch import save_file

from posthoc_cli import Mean, Run, import_checkpoints
from posthoc_cli.errors import InvalidValueError, PostHocError

STEPS = (100, 200, 400)
Tensors = dict[str, torch.Tensor]
Save = Callable[[Path, int, Tensors], Any]


def weights_at(step: int) -> Tensors:
    return {"a.weight": torch.arange(6.0) * step, "a.bias": torch.ones(2) + step}


def lerobot(folder: Path, step: int, weights: Tensors) -> None:
    model = folder / f"{step:06}" / "pretrained_model"
    state = folder / f"{step:06}" / "training_state"
    model.mkdir(parents=True)
    state.mkdir()
    save_file(weights, model / "model.safetensors")
    save_file({"x": torch.ones(3)}, state / "optimizer_state.safetensors")
    if step == STEPS[-1]:
        (folder / "last").symlink_to(f"{step:06}")


def olmo(folder: Path, step: int, weights: Tensors) -> None:
    (folder / f"step{step}" / "train").mkdir(parents=True)
    place = folder / f"step{step}" / "model_and_optim"
    distributed(place, {"model": weights})
    torch.save({"max_steps": 9}, folder / f"step{step}" / "train" / "rank0.pt")
    torch.save({"max_steps": 9}, folder / f"step{step}" / "train" / "rank1.pt")


def lightning_deepspeed(folder: Path, step: int, weights: Tensors) -> None:
    place = folder / f"epoch=0-step={step}.ckpt" / "checkpoint"
    place.mkdir(parents=True)
    torch.save({"module": weights}, place / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, place / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (place.parent / "latest").write_text("checkpoint")


def deeper(folder: Path, step: int, weights: Tensors) -> None:
    place = folder / f"{step}" / "actor" / "huggingface"
    place.mkdir(parents=True)
    save_file(weights, place / "model.safetensors")


def write(folder: Path, save: Save) -> Path:
    for step in STEPS:
        save(folder, step, weights_at(step))
    return folder


def beside_a_trainer(folder: Path, step: int, weights: Tensors) -> None:
    place = folder / f"iter_{step:06}" / "unet"
    place.mkdir(parents=True)
    torch.save(weights, place / "diffusion_pytorch_model.bin")
    torch.save({"optimizer": {"state": {0: weights}}}, place.parent / "trainer.ckpt")


@pytest.mark.parametrize("save", [lerobot, olmo, lightning_deepspeed, deeper, beside_a_trainer])
def test_weights_below_numbered_folders_have_their_numbers(save: Save, tmp_path: Path) -> None:
    place = write(tmp_path / "run", save)
    run = Run(place)
    assert [source.t for source in run.sources] == [*STEPS]
    last = run.sources[-1].values("a.weight", 0, 6)
    assert last.tolist() == weights_at(STEPS[-1])["a.weight"].tolist()
    import_checkpoints(place, tmp_path / "new")
    assert Run(tmp_path / "new").sources == run.sources


def two_models(folder: Path, step: int, weights: Tensors) -> None:
    for name in ("student", "critic"):
        (folder / f"{step}" / name).mkdir(parents=True)
        save_file(weights, folder / f"{step}" / name / "model.safetensors")


def at_two_places(folder: Path, step: int, weights: Tensors) -> None:
    name = "early" if step == 100 else "late"
    (folder / f"{step}" / name).mkdir(parents=True)
    save_file(weights, folder / f"{step}" / name / "model.safetensors")


def other_number(folder: Path, step: int, weights: Tensors) -> None:
    (folder / f"try{step}" / "stage2").mkdir(parents=True)
    save_file(weights, folder / f"try{step}" / "stage2" / "model.safetensors")


def experiments(folder: Path, step: int, weights: Tensors) -> None:
    place = folder / f"exp{step}" / "final"
    place.mkdir(parents=True)
    save_file(weights, place / "model.safetensors")


def zero_3(folder: Path, step: int, weights: Tensors) -> None:
    place = folder / f"checkpoint-{step}" / f"global_step{step}"
    place.mkdir(parents=True)
    for rank in range(2):
        file = place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save({"module": {name: torch.empty(0) for name in weights}}, file)


def without_endings(folder: Path, step: int, weights: Tensors) -> None:
    folder.mkdir(exist_ok=True)
    torch.save({"generator": weights}, folder / f"g_{step:08}")
    (folder / f"events.{step}").write_text("text")


def versions(folder: Path, step: int, weights: Tensors) -> None:
    """A training that was resumed by Lightning."""
    for number in range(2):
        place = folder / f"version_{step}" / "checkpoints"
        place.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": weights}, place / f"epoch={number}-step={step + number}.ckpt")


def foreign(folder: Path, step: int, weights: Tensors) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"model-{step}.gguf").write_bytes(b"GGUF" + weights["a.weight"].numpy().tobytes())


def orbax(folder: Path, step: int, _: Tensors) -> None:
    (folder / str(step)).mkdir(parents=True)
    (folder / str(step) / "_CHECKPOINT_METADATA").write_text("{}")


def one_level_up(folder: Path, step: int, weights: Tensors) -> None:
    lerobot(folder / "checkpoints", step, weights)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (two_models, r"models in 'critic', 'student'; name .* '\S+run/\*/critic' or '\S+/student'"),
        (at_two_places, r"models in 'early', 'late'; name those of one model by a glob"),
        (other_number, r"models in 'stage2'; name .* glob, such as '\S+run/\*/stage\*'"),
        (experiments, r"models in 'final'; name .* glob, such as '\S+run/\*/final', .*`step_from`"),
        (zero_3, r"global_step\d+: holds the partitions of ZeRO-3.*; convert .*zero_to_fp32.py"),
        (without_endings, r"no usual endings; name .* by a glob, such as '\S+run/g_\*', perhaps"),
        (versions, r"by a glob, such as '\S+run/\*/checkpoints/\*', perhaps"),
        (foreign, r"of kinds that are not read: 'model-100.gguf', .*; save the tensors as .safet"),
        (orbax, r"of kinds that are not read: .*, or by torch.save; unpack archives"),
        (one_level_up, r"run: holds no checkpoints itself; name its folder checkpoints"),
    ],
)
def test_models_that_are_not_taken_are_named(save: Save, message: str, tmp_path: Path) -> None:
    place = write(tmp_path / "run", save)
    with pytest.raises(PostHocError, match=message):
        _ = Run(place).sources
    with pytest.raises(PostHocError, match=message):
        import_checkpoints(place, tmp_path / "new")
    if save is not one_level_up:
        with pytest.raises(PostHocError, match=message):
            Run(place).info()


def test_a_glob_of_a_message_opens_the_files(tmp_path: Path) -> None:
    place = write(tmp_path / "run", without_endings)
    with pytest.raises(InvalidValueError) as caught:
        _ = Run(place).sources
    pattern = str(caught.value).split("'")[1]
    run = Run(pattern)
    assert [source.t for source in run.sources] == [*STEPS]
    expected = sum(weights_at(step)["a.bias"].double() for step in STEPS) / len(STEPS)
    mean = run.average(Mean(last=len(STEPS)))
    assert torch.allclose(mean["a.bias"].double(), expected, rtol=1e-6)
