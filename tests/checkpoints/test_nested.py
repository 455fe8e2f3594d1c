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
    return {
        "a.weight": torch.arange(6.0) * step,
        "a.bias": torch.ones(2) + step,
    }


def save_in(folder: Path, weights: Tensors) -> None:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")


def lerobot(folder, step, weights):
    place = folder / f"{step:06}"
    save_in(place / "pretrained_model", weights)
    state = place / "training_state"
    state.mkdir()
    save_file({"x": torch.ones(3)}, state / "optimizer_state.safetensors")
    if step == STEPS[-1]:
        (folder / "last").symlink_to(place.name)


def olmo(folder, step, weights):
    place = folder / f"step{step}"
    state = place / "train"
    state.mkdir(parents=True)
    distributed(place / "model_and_optim", {"model": weights})
    for rank in range(2):
        torch.save({"max_steps": 9}, state / f"rank{rank}.pt")


def lightning_deepspeed(folder, step, weights):
    place = folder / f"epoch=0-step={step}.ckpt" / "checkpoint"
    place.mkdir(parents=True)
    torch.save({"module": weights}, place / "mp_rank_00_model_states.pt")
    torch.save({"optimizer_state_dict": {}}, place / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (place.parent / "latest").write_text("checkpoint")


def deeper(folder, step, weights):
    save_in(folder / f"{step}" / "actor" / "huggingface", weights)


def write(folder: Path, save: Save) -> Path:
    for step in STEPS:
        save(folder, step, weights_at(step))
    return folder


def beside_a_trainer(folder, step, weights):
    place = folder / f"iter_{step:06}" / "unet"
    place.mkdir(parents=True)
    torch.save(weights, place / "diffusion_pytorch_model.bin")
    state = {"optimizer": {"state": {0: weights}}}
    torch.save(state, place.parent / "trainer.ckpt")


@pytest.mark.parametrize("save", [lerobot, olmo, lightning_deepspeed, deeper, beside_a_trainer])
def test_weights_below_numbered_folders_have_their_numbers(save, tmp_path):
    place = write(tmp_path / "run", save)
    sources = Run(place).sources
    assert [source.t for source in sources] == [*STEPS]
    last = weights_at(STEPS[-1])["a.weight"]
    assert sources[-1].values("a.weight", 0, 6).tolist() == last.tolist()
    import_checkpoints(place, tmp_path / "new")
    assert Run(tmp_path / "new").sources == sources


def two_models(folder, step, weights):
    for name in ("student", "critic"):
        save_in(folder / f"{step}" / name, weights)


def at_two_places(folder, step, weights):
    name = "early" if step == 100 else "late"
    save_in(folder / f"{step}" / name, weights)


def other_number(folder, step, weights):
    save_in(folder / f"try{step}" / "stage2", weights)


def experiments(folder, step, weights):
    save_in(folder / f"exp{step}" / "final", weights)


def zero_3(folder, step, weights):
    place = folder / f"checkpoint-{step}" / f"global_step{step}"
    place.mkdir(parents=True)
    empty = dict.fromkeys(weights, torch.empty(0))
    for rank in range(2):
        file = place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
        torch.save({"module": empty}, file)


def without_endings(folder, step, weights):
    folder.mkdir(exist_ok=True)
    torch.save({"generator": weights}, folder / f"g_{step:08}")
    (folder / f"events.{step}").write_text("text")


def versions(folder, step, weights):
    """A training that was resumed by Lightning."""
    for number in range(2):
        place = folder / f"version_{step}" / "checkpoints"
        place.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": weights}, place / f"epoch={number}-step={step + number}.ckpt")


def foreign(folder, step, weights):
    folder.mkdir(exist_ok=True)
    values = weights["a.weight"].numpy()
    file = folder / f"model-{step}.gguf"
    file.write_bytes(b"GGUF" + values.tobytes())


def one_level_up(folder, step, weights):
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
        (one_level_up, r"run: holds no checkpoints itself; name its folder checkpoints"),
    ],
)
def test_models_that_are_not_taken_are_named(save, message, tmp_path):
    place = write(tmp_path / "run", save)
    with pytest.raises(PostHocError, match=message):
        _ = Run(place).sources
    with pytest.raises(PostHocError, match=message):
        import_checkpoints(place, tmp_path / "new")
    if save is not one_level_up:
        with pytest.raises(PostHocError, match=message):
            Run(place).info()


def test_a_glob_of_a_message_opens_the_files(tmp_path):
    place = write(tmp_path / "run", without_endings)
    with pytest.raises(InvalidValueError) as caught:
        _ = Run(place).sources
    pattern = str(caught.value).split("'")[1]
    run = Run(pattern)
    assert [source.t for source in run.sources] == [*STEPS]
    mean = run.average(Mean(last=len(STEPS)))
    expected = 1 + sum(STEPS) / len(STEPS)
    assert mean["a.bias"].tolist() == pytest.approx([expected, expected], rel=1e-6)
