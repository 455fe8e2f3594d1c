"""Checkpoints that lie below numbered folders, and the lines that say where others lie."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import refused
from checkpoint_layouts import distributed
from saved import assert_equal, read, store, times, values_of

from posthoc_cli import PostHocError, Run, files
from posthoc_cli.checkpoints import places
from posthoc_cli.errors import DirectoryError

STEPS = (100, 200, 400)
Tensors = dict[str, torch.Tensor]
Save = Callable[[Path, int, Tensors], Any]


def weights_at(step):
    return {
        "a.weight": torch.arange(6.0) * step,
        "a.bias": torch.ones(2) + step,
    }


def lerobot(folder, step, weights):
    place = folder / f"{step:06}"
    store(place / "pretrained_model" / "model.safetensors", weights)
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


def write(folder, save):
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


def verl(folder, step, weights):
    place = folder / f"global_step_{step}"
    store(place / "data.pt", {"_num_yielded": step})
    for name, content in {"model": weights, "optim": {}, "extra_state": {}}.items():
        store(place / "actor" / f"{name}_world_size_1_rank_0.pt", content)


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


def write_at(folder, *places):
    """Write the weights of each step into places of it."""
    for step in STEPS:
        for place in places:
            store(folder / place.format(step), weights_at(step))
    return folder


TWO_MODELS = ("{}/student/model.safetensors", "{}/critic/model.safetensors")


def test_one_of_several_models_is_chosen(tmp_path):
    place = write_at(tmp_path / "run", *TWO_MODELS)
    with refused(place / "100", "'critic', 'student'", " --weights critic "):
        read(place)
    assert times(place, weights="student") == [*STEPS]
    described = Run(place).info()
    assert "critic (2), student (2)" in {row["holds"] for row in described["checkpoints"]}


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (
            ["s{}/mp_rank_00/model.pt", "s{}/mp_rank_01/model.pt"],
            r"s\d+: holds partitions",
        ),
        (
            ["s{}/actor/model_world_size_2_rank_0.pt", "s{}/actor/model_world_size_2_rank_1.pt"],
            "actor: holds partitions",
        ),
        (
            ["s{}/consolidated.00.pth", "s{}/consolidated.01.pth"],
            "holds partitions",
        ),
        (
            ["{}/model/body/model_weight_pp-rank-0-of-1_tp-rank-0-of-1.safetensors"],
            "model/body: holds partitions",
        ),
        (
            ["version_{0}/checkpoints/step={0}.ckpt", "version_{0}/checkpoints/step={0}1.ckpt"],
            r"ema import '\S+run/version_\S+/checkpoints/step=\*.ckpt' --out run$",
        ),
    ],
)
def test_models_that_are_not_taken_are_named(places, message, tmp_path):
    place = write_at(tmp_path / "run", *places)
    with pytest.raises(PostHocError, match=message):
        read(place)


def zero_3(folder, step, weights):
    place = folder / f"checkpoint-{step}" / f"global_step{step}"
    empty = dict.fromkeys(weights, torch.empty(0))
    for rank in range(2):
        store(place / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", {"module": empty})


def foreign(folder, step, weights):
    folder.mkdir(exist_ok=True)
    (folder / f"model-{step}.gguf").write_bytes(b"GGUF" + bytes(100))


def flax(folder, step, _):
    """Write the first bytes of a map of msgpack, {"step": ...}."""
    folder.mkdir(exist_ok=True)
    (folder / f"checkpoint_{step}").write_bytes(b"\x82\xa4step" + bytes(100))


def paddle(folder, step, weights):
    store(folder / f"{step}.pdparams", weights)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (zero_3, r"global_step\d+: .*zero_to_fp32.py"),
        (foreign, r"model-100.gguf: .*llama.cpp"),
        (flax, "checkpoint_100: .*Flax"),
        (paddle, "100.pdparams: .*Paddle"),
    ],
)
def test_a_file_of_another_format_is_named(save, message, tmp_path):
    place = write(tmp_path / "run", save)
    with pytest.raises(PostHocError, match=message):
        read(place)


@pytest.mark.parametrize(
    "name",
    [
        "g_{:08}",
        "checkpoints/{:06}/pretrained_model/model.safetensors",
        "model.pt.ep{}",
        "a/alone/b/alone/c/step{}.pt",  # what is alone is no level
    ],
)
def test_files_are_known_by_their_first_bytes_three_folders_down(name, tmp_path):
    place = write_at(tmp_path / "run", name)
    (place / "events.100").write_text("text")
    (place / "samples").mkdir()
    for number in range(40):
        (place / "samples" / f"{number}.png").write_bytes(b"\x89PNG")
    assert times(place) == [*STEPS]


@pytest.mark.parametrize("inner", ["", "*", "*/model.pt"])
def test_a_link_to_a_folder_of_the_run_does_not_take_its_place(inner, tmp_path):
    place = write_at(tmp_path / "run", "step_{}/model.pt")
    elsewhere = write_at(tmp_path / "elsewhere", "step_{}/model.pt")
    (place / "best").symlink_to("step_200")
    (place / "step_300").symlink_to(elsewhere / "step_400")
    assert times(place / inner) == [*STEPS[:2], 300, STEPS[2]]


def test_files_far_down_are_not_opened(tmp_path, monkeypatch):
    """To read the files of a whole disk takes minutes."""
    folder = tmp_path
    for name in ("data", "of", "many", "more", "words"):
        (folder / "others").mkdir()
        folder = folder / name
        folder.mkdir()
    for name in ("first.pkl", "other.pkl"):
        store(folder / name, {"x": torch.ones(3)})
    opened = []
    monkeypatch.setattr(files.system, "open", opened.append)
    with refused(tmp_path, kind=DirectoryError):
        Run(tmp_path).info()
    assert not opened


def test_a_place_is_looked_at_once_and_only_in_part_if_it_is_large(tmp_path, monkeypatch, caplog):
    place = write_at(tmp_path / "run", "step{}.pt")
    (place / "itself").symlink_to(place)
    assert times(place) == [*STEPS]
    assert not caplog.text
    monkeypatch.setattr(places, "_MOST_ENTRIES", 2)
    (place / "itself").unlink()
    assert times(place) == [*STEPS]
    assert not caplog.text
    (place / "many" / "more").mkdir(parents=True)
    assert times(place) == [*STEPS]
    assert "holds more than 2 files" in caplog.text
