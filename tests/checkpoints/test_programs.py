"""What programs save is found: the average and the weights, tensor for tensor, and how the average
was updated; written by the programs' libraries, or in their published structure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from walks import (
    EVERY,
    STEPS,
    Save,
    Tensors,
    constant,
    copied,
    new_net,
    ratio,
    saves,
    walk,
    weights_of,
)

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.export.convert import export_file
from posthoc_cli.profiles import OrdinaryEMA, Point

OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(24, 24)}}, "param_groups": [{"params": [0]}]}


def named(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def values_of(source: Checkpoint) -> Tensors:
    """Return the tensors of a source, under all their names."""
    names = {name: name for name in source.entries} | source.aliases
    with source:
        return {
            alias: torch.from_numpy(source.values(name, 0, source.entries[name].size)).reshape(
                source.entries[name].shape
            )
            for alias, name in names.items()
        }


def assert_equal(made: Tensors, stored: Tensors) -> None:
    assert made.keys() == stored.keys()
    for name, value in stored.items():
        assert torch.equal(made[name].double(), value.double()), name


def check(
    place: Path,
    average: Tensors,
    weights: Tensors,
    decay: float | None = 0.95,
    /,
    **settings: Any,
) -> None:
    """Check what an import finds at the last step; `decay` None if the file does not say it."""
    given = dict(settings)
    if decay is None:
        given |= {"ema_decay": 0.95, "ema_warmup": "none"}
    found = import_checkpoints(place, None, dry_run=True, **given).checkpoints
    assert found[-1].t == STEPS
    newest = [one for one in found if one.t == STEPS]
    (raw,) = [one for one in newest if isinstance(one.profile, Point)]
    (averaged,) = [one for one in newest if isinstance(one.profile, OrdinaryEMA)]
    assert_equal(values_of(raw), weights)
    assert_equal(values_of(averaged), average)
    assert averaged.decay == pytest.approx(decay or 0.95, abs=1e-7)
    assert len(found) >= 19  # an average that has not begun is none


def exported(file: Path, **options: Any) -> Tensors:
    out = file.with_name("exported.safetensors")
    export_file(file, out, overwrite=True, **options)
    return load_file(out)


def check_export(file: Path, average: Tensors, weights: Tensors, /, **options: Any) -> None:
    assert_equal(exported(file, **options), average)
    assert_equal(exported(file, weights=True, **options), weights)


# --- in their published structure


@dataclass(frozen=True)
class Program:
    """What a program writes at a save, and what its files do not say."""

    file: str
    content: Callable[[Save], object]
    decay: Callable[[int], float] = constant
    says: float | None = None  # the decay, as the import takes it from the file
    prefix: str = ""  # of names in both sets
    settings: dict[str, Any] = field(default_factory=dict)


def unbiased(n: int) -> float:
    return 1.0 - (1 - 0.95) / float(1 - 0.95**n)


def audiocraft(save: Save) -> object:
    return {
        "xp.cfg": {"optim": {"ema": {"use": True, "decay": 0.95, "updates": 1}}},
        "xp.sig": "abc",
        "history": [{"train": {"ce": 3.0}}],
        "best_state": {"model": saves()[0].weights},
        "fsdp_best_state": {},
        "model": save.weights,
        "optimizer": OPTIMIZER,
        "ema": {"state": {"model": save.average}, "count": 20.0},
    }


def openfold(save: Save) -> object:
    return {
        "epoch": save.epoch - 1,
        "global_step": save.step,
        "state_dict": named("model.", save.weights),
        "optimizer_states": [OPTIMIZER],
        "ema": {"params": save.average, "decay": 0.95},
    }


def composer(save: Save, is_active: bool) -> object:
    stored = save.weights if is_active else save.average
    model = save.average if is_active else save.weights
    states = {"ema_model": {"parameters_dict": stored, "buffers_dict": {}}}
    return {
        "state": {
            "model": model,
            "optimizers": {"Adam": OPTIMIZER},
            "algorithms": [("EMA", states | {"ema_weights_active": is_active})],
            "timestamp": {"Timestamp": {"epoch": save.epoch, "batch": save.step, "sample": 9}},
        },
        "rng": [{"torch": torch.get_rng_state()}],
    }


def ace(save: Save) -> object:
    return {
        "num_batches_seen": save.step,
        "epoch": save.epoch,
        "stepper": {"module": named("module.", save.weights), "config": {"type": "SFNO"}},
        "optimization": {"optimizer_state_dict": OPTIMIZER},
        "ema": {
            "decay": torch.tensor(0.95),
            "num_updates": torch.tensor(save.step),
            "faster_decay_at_start": True,
            "module_name_to_ema_name": {name: name.replace(".", "") for name in save.weights},
            "ema_params": {name.replace(".", ""): one for name, one in save.average.items()},
        },
    }


def lightning_like(*sets: Callable[[Save], Tensors]) -> Callable[[Save], object]:
    def content(save: Save) -> object:
        state = {name: value for one in sets for name, value in one(save).items()}
        return {"state_dict": state, "global_step": save.step, "epoch": save.epoch - 1}

    return content


def moco(save: Save, online: str, slow: str) -> object:
    state = named(f"module.{online}.", save.weights) | named(f"module.{slow}.", save.average)
    state["module.queue"] = torch.zeros(4, 8)
    state["module.queue_ptr"] = torch.zeros(1)
    return {"epoch": save.epoch, "arch": "vit", "state_dict": state, "optimizer": OPTIMIZER}


EPOCHS = {"steps_per_epoch": EVERY}
PROGRAMS = {
    "audiocraft": Program("checkpoint_{epoch}.th", audiocraft, unbiased, 0.95, "", EPOCHS),
    "OpenFold": Program("{epoch}-{step}.ckpt", openfold, says=0.95),
    "Composer": Program("ep{epoch}-ba{step}-rank0.pt", lambda save: composer(save, False)),
    "Composer, active": Program("ep{epoch}-ba{step}-rank0.pt", lambda save: composer(save, True)),
    "ACE": Program("ckpt_{epoch:04}.tar", ace, ratio, 0.95),
    "DINO": Program(
        "checkpoint{epoch:04}.pth",
        lambda save: {
            "student": named("module.", save.weights),
            "teacher": save.average,
            "optimizer": OPTIMIZER,
            "epoch": save.epoch + 1,
            "dino_loss": {"center": torch.zeros(1, 8)},
        },
        settings={**EPOCHS, "first_epoch": 1},
    ),
    "I-JEPA": Program(
        "jepa-ep{epoch}.pth.tar",
        lambda save: {
            "encoder": named("module.", save.weights),
            "predictor": {"module.embed.weight": torch.zeros(8, 32)},
            "target_encoder": named("module.", save.average),
            "opt": OPTIMIZER,
            "epoch": save.epoch,
        },
        prefix="module.",
        settings=EPOCHS,
    ),
    "BYOL": Program(
        "byol-{step}.ckpt",
        lightning_like(
            lambda save: named("learner.online_encoder.net.", save.weights),
            lambda _: {"learner.online_predictor.net.0.weight": torch.ones(8, 4)},
            lambda save: named("learner.target_encoder.net.", save.average),
        ),
        prefix="net.",
    ),
    "MoCo v2": Program(
        "checkpoint_{epoch:04}.pth.tar",
        lambda save: moco(save, "encoder_q", "encoder_k"),
        settings=EPOCHS,
    ),
    "MoCo v3": Program(
        "checkpoint_{epoch:04}.pth.tar",
        lambda save: moco(save, "base_encoder", "momentum_encoder"),
        settings=EPOCHS,
    ),
    "DDP, weights": Program(
        "step_{step}.pt",
        lambda save: {"model": named("module.", save.weights), "model_ema": save.average},
    ),
    "DDP, average": Program(
        "step_{step}.pt",
        lambda save: {"model": save.weights, "ema": named("module.", save.average)},
    ),
    "BasicSR": Program(
        "net_g_{step}.pth",
        lambda save: {"params": save.weights, "params_ema": save.average},
    ),
    "LitEma of LDM": Program(
        "step={step}.ckpt",
        lightning_like(
            lambda save: named("model.diffusion_model.", save.weights),
            lambda save: {
                f"model_ema.diffusion_model{name.replace('.', '')}": value
                for name, value in save.average.items()
            },
            lambda save: {
                "model_ema.decay": torch.tensor(0.95),
                "model_ema.num_updates": torch.tensor(save.step),
            },
        ),
        ratio,
        0.95,
        "diffusion_model.",
    ),
    "AveragedModel in a module of Lightning": Program(
        "step={step}.ckpt",
        lightning_like(
            lambda save: named("net.", save.weights),
            lambda save: named("slow.module.", save.average),
            lambda save: {"slow.n_averaged": torch.tensor(save.step)},
        ),
    ),
    "fairseq": Program(
        "checkpoint_{epoch}_{step}.pt",
        lambda save: {
            "model": save.weights,
            "optimizer_history": [{"num_updates": 3}, {"num_updates": save.step}],
            "extra_state": {"train_iterator": {"epoch": save.epoch}, "ema": save.average},
            "last_optimizer_state": OPTIMIZER,
        },
    ),
    "NeMo": Program(
        "model--epoch={epoch}-step={step}.ckpt",
        lambda save: {
            "global_step": save.step,
            "epoch": save.epoch,
            "state_dict": save.weights,
            "optimizer_states": [
                {
                    "opt": OPTIMIZER,
                    "ema": tuple(save.average.values()),
                    "current_step": save.step,
                    "decay": 0.95,
                    "every_n_steps": 1,
                }
            ],
        },
        says=0.95,
    ),
    "Unbiased Teacher": Program(
        "model_{step:07}.pth",
        lambda save: {
            "model": named("modelTeacher.", save.average) | named("modelStudent.", save.weights),
            "optimizer": OPTIMIZER,
            "iteration": save.step,
        },
    ),
    "consistency models": Program(
        "run-{step}.pt",
        lambda save: {"online": {"unet": save.weights}, "target": {"unet": save.average}},
        prefix="unet.",
    ),
}


def write(folder: Path, program: Program) -> Path:
    """Write the files of a program; return the last one."""
    folder.mkdir(exist_ok=True)
    for save in saves(program.decay):
        file = folder / program.file.format(step=save.step, epoch=save.epoch)
        torch.save(program.content(save), file)
    return file


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_known_by_its_structure(name: str, tmp_path: Path) -> None:
    program = PROGRAMS[name]
    file = write(tmp_path / "run", program)
    last = saves(program.decay)[-1]
    average = named(program.prefix, last.average)
    weights = named(program.prefix, last.weights)
    check(file.parent, average, weights, program.says, **program.settings)
    check_export(file, average, weights)


WRITERS = {
    "NeMo": "torch-ema; Lightning, transformers",
    "ACE": "torch-ema; ACE",
    "Unbiased Teacher": "Megatron",
    "DDP, weights": "",
}


@pytest.mark.parametrize("name", WRITERS)
def test_info_names_the_program(name: str, tmp_path: Path) -> None:
    write(tmp_path / "run", PROGRAMS[name])
    assert Run(tmp_path / "run").info()["written_by"] == WRITERS[name]


def test_ema_pytorch_in_files_of_its_own(tmp_path: Path) -> None:
    """Its object has nothing but the average and counters."""
    for save in saves():
        torch.save({"model": save.weights}, tmp_path / f"model-{save.step}.pt")
        state = named("ema_model.", save.average)
        state |= {"initted": torch.tensor(True), "step": torch.tensor(save.step)}
        torch.save(state, tmp_path / f"ema-{save.step}.pt")
    with pytest.raises(InvalidValueError, match=r"update_every: must be given: ema-\d+.pt"):
        import_checkpoints(tmp_path, None, dry_run=True, ema_decay=0.95)
    last = saves()[-1]
    file = tmp_path / f"ema-{last.step}.pt"
    assert_equal(exported(file), last.average)


def test_megatron_has_a_folder_for_each_rank(tmp_path: Path) -> None:
    for save in saves():
        folder = tmp_path / f"iter_{save.step:07}/mp_rank_00"
        folder.mkdir(parents=True)
        content = {"iteration": save.step, "model": {"language_model": save.weights}}
        torch.save(content | {"optimizer": OPTIMIZER}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    assert [one.t for one in Run(tmp_path).sources] == [save.step for save in saves()]


def test_states_of_edm_hold_the_weights(tmp_path: Path) -> None:
    """Their names count thousands of images, rounded."""
    for save in saves():
        state = {"cur_nimg": 640 * save.step, "total_elapsed_time": 1.0}
        content = {"net": save.weights, "optimizer_state": OPTIMIZER, "state": state}
        torch.save(content, tmp_path / f"training-state-{640 * save.step // 1000:07}.pt")
    run = Run(tmp_path)
    assert [(one.t, one.t_unit) for one in run.sources] == [
        (640 * save.step, "images") for save in saves()
    ]


def test_composer_links_its_newest_file(tmp_path: Path) -> None:
    file = write(tmp_path / "run", PROGRAMS["Composer"])
    (file.parent / "latest-rank0.pt").symlink_to(file.name)
    last = saves()[-1]
    check(file.parent, last.average, last.weights, None)


def test_several_averages_of_demucs_are_asked_for(tmp_path: Path) -> None:
    last = saves()[-1]
    content = {
        "state": last.weights,
        "optimizer": OPTIMIZER,
        "best_state": saves()[0].weights,
        "ema_batch_0": {"state": last.average, "count": 20.0},
        "ema_epoch_0": {"state": saves()[-2].average, "count": 2.0},
    }
    torch.save(content, tmp_path / "checkpoint.th")
    with pytest.raises(FileFormatError, match=r"unclear: .*ema_batch_0.*, .*ema_epoch_0"):
        exported(tmp_path / "checkpoint.th")
    for key in ("ema_batch_0", "ema_batch_0.state"):
        assert_equal(exported(tmp_path / "checkpoint.th", average=key), last.average)
    assert_equal(exported(tmp_path / "checkpoint.th", weights=True), last.weights)


SEVERAL: dict[str, tuple[Callable[[Save], dict[str, Any]], str, str]] = {
    "by decay in keys": (
        lambda save: {"ema_0.95": save.average, "ema_0.99": save.weights},
        "ema_0.95",
        "ema_0.99",
    ),
    "a list": (lambda save: {"emas": [save.average, save.weights]}, "emas.0", "emas.1"),
    "deep": (
        lambda save: {"a": {"ema": save.average}, "b": ({"net_ema": save.weights},)},
        "a.ema",
        "b.0.net_ema",
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_averages_one_is_chosen(name: str, tmp_path: Path) -> None:
    content, key, other = SEVERAL[name]
    for save in saves():
        torch.save({"model": save.weights, **content(save)}, tmp_path / f"step{save.step}.pt")
    last = saves()[-1]
    with pytest.raises(FileFormatError, match=f"unclear: '{key}', '{other}'"):
        exported(tmp_path / "step400.pt")
    with pytest.raises(FileFormatError, match=f"unclear: '{key}', '{other}'"):
        _ = Run(tmp_path).sources
    check(tmp_path, last.average, last.weights, None, average=key)
    assert_equal(exported(tmp_path / "step400.pt", average=other), last.weights)


PARTS = {
    "solo-learn": ("backbone", "projector", "momentum_backbone", "momentum_projector"),
    "DINO": ("student_backbone", "student_head", "teacher_backbone", "teacher_head"),
}
"""Keys of the two parts of a model, and of their averages."""
OTHERS = {"predictor.bias": torch.ones(3), "momentum_classifier.bias": torch.ones(3)}


def in_parts(tensors: Tensors, body: str, head: str) -> Tensors:
    parts = {}
    for name, value in tensors.items():
        key = body if name.startswith("body") else head
        parts[f"{key}.{name}"] = value
    return parts


@pytest.mark.parametrize("name", PARTS)
def test_an_average_in_two_parts_is_one(name: str, tmp_path: Path) -> None:
    """Also beside a layer that has no average, and a trained one of an average's features."""
    keys = PARTS[name][:2]
    content = lightning_like(
        lambda save: in_parts(save.weights, *keys),
        lambda save: in_parts(save.average, *PARTS[name][2:]),
        lambda _: OTHERS | {f"{keys[0].replace('backbone', 'classifier')}.bias": torch.ones(3)},
    )
    file = write(tmp_path / "run", Program("step={step}.ckpt", content))
    last = saves()[-1]
    average = in_parts(last.average, *keys)
    weights = in_parts(last.weights, *keys)
    check(file.parent, average, weights, None)
    assert_equal(exported(file), average)
    assert_equal(
        exported(file, average=PARTS[name][3]), {"head.weight": last.average["head.weight"]}
    )


UNNAMED = {
    "FUNIT": ("gen", "gen_test"),
    "a word within a word": ("netG", "netGEMA"),
    "plurals": ("models", "averages"),
}
"""Keys of the weights and of the average, of which none is a word for it."""


@pytest.mark.parametrize("name", UNNAMED)
def test_the_values_show_which_of_two_groups_is_the_average(name: str, tmp_path: Path) -> None:
    key, other = UNNAMED[name]
    discriminator = named("dis.", saves()[0].weights) | {"last.weight": torch.ones(3, 3)}
    for save in saves():
        content = {other: save.average, key: save.weights, "dis": discriminator}
        torch.save(content, tmp_path / f"gen_{save.step:08}.pt")
    last = saves()[-1]
    check(tmp_path, last.average, last.weights, None)


FORMS = {
    "ALBEF, BLIP": ("{}_encoder", "{}_encoder_m"),
    "begun with a word": ("{}", "slow_{}"),
    "with another word": ("{}_q", "{}_k"),
}


def in_two_parts(tensors: Tensors, form: str) -> Tensors:
    return named("module.", in_parts(tensors, form.format("visual"), form.format("text")))


def with_slow_parts(save: Save, name: str) -> Tensors:
    form, slow = FORMS[name]
    rest = {"module.temperature": torch.tensor(0.07), "module.fusion.bias": torch.ones(9)}
    return in_two_parts(save.weights, form) | in_two_parts(save.average, slow) | rest


@pytest.mark.parametrize("name", FORMS)
def test_the_values_show_that_parts_of_a_model_are_averages(name: str, tmp_path: Path) -> None:
    for save in saves():
        torch.save({"model": with_slow_parts(save, name)}, tmp_path / f"step{save.step}.pt")
    last = saves()[-1]
    rest = {"module.temperature": torch.tensor(0.07), "module.fusion.bias": torch.ones(9)}
    average = in_two_parts(last.average, FORMS[name][0]) | rest
    check(tmp_path, average, in_two_parts(last.weights, FORMS[name][0]) | rest, None)
    file = tmp_path / "step400.pt"
    assert_equal(exported(file, weights=True), with_slow_parts(last, name))
    with pytest.raises(FileFormatError, match="holds no average"):
        exported(file)


def negated(tensors: Tensors) -> Tensors:
    return {name: -value for name, value in tensors.items()}


ALIKE: dict[str, Callable[[Save], Tensors]] = {
    "two generators": lambda save: (
        named("a_to_b.", save.weights) | named("b_to_a.", negated(save.average))
    ),
    "twin critics": lambda save: (
        named("critic.", save.weights) | named("critic_b.", saves()[-save.epoch].weights)
    ),
    "a copy of the begin": lambda save: (
        named("net.", save.weights) | named("net_init.", negated(negated(saves()[0].weights)))
    ),
    "layers": lambda save: named("block.", save.weights) | named("block1.", save.average),
    "a small head": lambda save: (
        {"body.weight": torch.ones(40, 40)}
        | {
            "head.weight": save.weights["head.weight"],
            "head_aux.weight": save.average["head.weight"],
        }
    ),
}
"""Parts with the same names and shapes, of which none is an average."""


@pytest.mark.parametrize("name", ALIKE)
def test_parts_that_are_alike_are_weights(name: str, tmp_path: Path) -> None:
    for save in saves():
        torch.save({"model": ALIKE[name](save)}, tmp_path / f"step{save.step}.pt")
    run = Run(tmp_path)
    assert {source.holds for source in run.sources} == {"weights"}
    assert run.tensors.keys() == ALIKE[name](saves()[-1]).keys()


FIXED_KEYS: dict[str, Callable[[Save], dict[str, Any]]] = {
    "state_dict current_model_state": lambda save: {
        "state_dict": save.average,
        "current_model_state": save.weights,
        "averaging_state": {"n_averaged": torch.tensor(save.step)},
    },
    "state_dict ema_state_dict": lambda save: {
        "state_dict": save.average,
        "ema_state_dict": named("module.", save.weights) | {"steps": torch.tensor(save.step)},
    },
    "ema_optimizer model": lambda save: {
        "model": save.weights,
        "ema_optimizer": {f"state.{name}.ema_params": one for name, one in save.average.items()},
    },
}
"""The keys of the average and of the weights in Lightning, mmengine and torchtitan."""


@pytest.mark.parametrize("keys", FIXED_KEYS)
def test_a_set_that_is_named_counts_also_where_a_layout_has_another(
    keys: str,
    tmp_path: Path,
) -> None:
    for save in saves():
        content = FIXED_KEYS[keys](save) | {
            "slower": negated(save.average),
            "global_step": save.step,
        }
        torch.save(content, tmp_path / f"step{save.step}.pt")
    average_key, weights_key = keys.split()
    last = saves()[-1]
    file = tmp_path / "step400.pt"
    assert_equal(exported(file, average=average_key), last.average)
    assert_equal(exported(file, average=weights_key), last.weights)
    assert_equal(exported(file, average="slower"), negated(last.average))
    with pytest.raises(FileFormatError, match="has no set of tensors 'nowhere'"):
        exported(file, average="nowhere")
    check(tmp_path, last.average, last.weights, None, average=average_key, weights=weights_key)
    with pytest.raises(FileFormatError, match="has no set of tensors 'nowhere'"):
        import_checkpoints(tmp_path, None, dry_run=True, weights="nowhere")
    others = import_checkpoints(tmp_path, None, dry_run=True, kind="checkpoints", weights="slower")
    assert_equal(values_of(others.checkpoints[-1]), negated(last.average))


LIT_EMA = {"decay": torch.tensor(0.95), "num_updates": torch.tensor(3)}
NOT_ONE: dict[str, tuple[list[str], Tensors]] = {
    "of two rules": (["unet_ema", "vae_ema"], named("unet_ema.", LIT_EMA)),
    "of two words": (["unet_ema", "teacher_vae"], {}),
}


@pytest.mark.parametrize("name", NOT_ONE)
def test_averages_of_two_rules_are_asked_for(name: str, tmp_path: Path) -> None:
    keys, values = NOT_ONE[name]
    last = saves()[-1]
    state = named("unet.", last.weights) | named("vae.", last.weights) | values
    for key in keys:
        state |= named(f"{key}.", last.average)
    torch.save({"state_dict": state}, tmp_path / "step400.ckpt")
    with pytest.raises(FileFormatError, match=f"unclear: '.*({'|'.join(keys)})', '.*_"):
        exported(tmp_path / "step400.ckpt")


def test_averages_of_two_models_are_asked_for(tmp_path: Path) -> None:
    last = saves()[-1]
    content = {"G": last.weights, "D": saves()[0].weights, "G_ema": last.average}
    torch.save(content | {"D_ema": saves()[0].average}, tmp_path / "step400.pt")
    with pytest.raises(FileFormatError, match="unclear: 'G_ema', 'D_ema'"):
        exported(tmp_path / "step400.pt")


def test_composer_averages_buffers_apart(tmp_path: Path) -> None:
    last = saves()[-1]
    for save in saves():
        buffers = {f"bn.{index}.running_mean": torch.full((4,), 1.0 * index) for index in range(9)}
        averaged = {name: value / 2 for name, value in buffers.items()}
        parts = {"named_parameters_dict": save.average, "named_buffers_dict": averaged}
        algorithms = [("EMA", {"ema_model": parts, "ema_weights_active": False})]
        state = {"model": save.weights | buffers, "algorithms": algorithms}
        torch.save({"state": state}, tmp_path / f"ep0-ba{save.step}-rank0.pt")
    check(tmp_path, last.average | averaged, last.weights | buffers, None, step_from=r"ba(\d+)")
    file = tmp_path / "ep0-ba400-rank0.pt"
    check_export(file, last.average | averaged, last.weights | buffers)


@pytest.mark.parametrize("is_swapped", [False, True])
def test_buffers_of_mmcv(
    is_swapped: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of the two sets the average is the one that moves less; a single file asks."""
    for save in saves():
        model = save.average if is_swapped else save.weights
        buffers = save.weights if is_swapped else save.average
        flat = {f"ema_{name.replace('.', '_')}": value for name, value in buffers.items()}
        meta = {"epoch": save.epoch, "iter": save.step}
        file = tmp_path / f"iter_{save.step}.pth"
        torch.save({"meta": meta, "state_dict": model | flat, "optimizer": OPTIMIZER}, file)
    last = saves()[-1]
    check(tmp_path, last.average, last.weights, None)
    assert "which moves less from file to file" in caplog.text
    with pytest.raises(FileFormatError, match="nothing tells which is the average"):
        exported(file)
    keys = ["ema_*", "state_dict"]
    if is_swapped:
        keys.reverse()
    assert_equal(exported(file, average=keys[0]), last.average)
    assert_equal(exported(file, average=keys[1]), last.weights)
    check(tmp_path, last.average, last.weights, None, weights=keys[1])
    with pytest.raises(FileFormatError, match="has no set of tensors 'nowhere'"):
        exported(file, average="nowhere")


def ramp(n: int) -> float:
    return 0.9999 * (1 - math.exp(-n / 2000))


def of_ultralytics(save: Save, has_model: bool) -> object:
    """Whole modules in half precision."""
    net = new_net()
    net.load_state_dict(save.weights)
    averaged = new_net()
    averaged.load_state_dict(save.average)
    return {
        "epoch": save.epoch - 1,
        "model": net.half() if has_model else None,
        "ema": averaged.half(),
        "updates": save.step,
        "optimizer": OPTIMIZER,
        "train_args": {"epochs": 10},
    }


def halved(tensors: Tensors) -> Tensors:
    return {name: value.half() for name, value in tensors.items()}


@pytest.mark.parametrize("has_model", [False, True])
def test_modules_of_ultralytics(has_model: bool, tmp_path: Path) -> None:
    """The `updates` of the average turn epochs into steps."""
    for save in saves(ramp):
        content = of_ultralytics(save, has_model)
        file = tmp_path / f"epoch{save.epoch - 1}.pt"
        torch.save(content, file)
    for copy in ("last.pt", "best.pt"):
        torch.save(content, tmp_path / copy)
    last = saves(ramp)[-1]
    found = import_checkpoints(tmp_path, None, dry_run=True).checkpoints
    averaged = [one for one in found if isinstance(one.profile, OrdinaryEMA)]
    assert [one.t for one in averaged] == [save.step for save in saves(ramp)]
    assert averaged[-1].decay == 0.9999
    assert_equal(exported(file), halved(last.average))
    if has_model:
        check(tmp_path, halved(last.average), halved(last.weights), 0.9999)
        check_export(file, halved(last.average), halved(last.weights))


@pytest.mark.parametrize("late", [0, 5])
def test_counts_of_torchvision_begin_after_its_warm_up(late: int, tmp_path: Path) -> None:
    """It sets them back to 0 until the learning rate has risen."""
    for save in saves()[5:]:
        average = named("module.", save.average)
        average["n_averaged"] = torch.tensor((save.epoch - late) * EVERY)
        content = {"model": save.weights, "model_ema": average, "epoch": save.epoch - 1}
        torch.save(content, tmp_path / f"model_{save.epoch - 1}.pth")
    settings = {"ema_decay": 0.95, "ema_warmup": "none", "first_epoch": 0}
    if late:
        with pytest.raises(InvalidValueError, match=r"steps_per_epoch: must be .* since epoch 5"):
            import_checkpoints(tmp_path, None, dry_run=True, **settings)
        settings |= {"steps_per_epoch": EVERY, "update_every": 1}
    found = import_checkpoints(tmp_path, None, dry_run=True, **settings).checkpoints
    assert {one.t for one in found} == {save.step for save in saves()[5:]}


def test_states_of_deepspeed_are_no_model(tmp_path: Path) -> None:
    for save in saves():
        folder = tmp_path / f"global_step{save.step}"
        folder.mkdir()
        state = {"module": save.weights, "optimizer": None, "global_steps": save.step}
        torch.save(state, folder / "mp_rank_00_model_states.pt")
        flat = {"optimizer_state_dict": {"fp32_flat_groups": [torch.zeros(9)]}}
        torch.save(flat, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
        torch.save(flat, folder / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step400")
    (tmp_path / "zero_to_fp32.py").write_text("")
    run = Run(tmp_path)
    assert [one.step for one in run.sources] == [save.step for save in saves()]
    assert_equal(run.average("last:1"), saves()[-1].weights)


def test_target_networks_in_files_of_their_own(tmp_path: Path) -> None:
    for save in saves():
        torch.save(save.weights, tmp_path / f"model_{save.step}.pt")
        torch.save(save.average, tmp_path / f"target_model_{save.step}.pt")
    last = saves()[-1]
    check(tmp_path, last.average, last.weights, None)
    assert_equal(exported(tmp_path / "target_model_400.pt"), last.average)
    assert_equal(exported(tmp_path / "model_400.pt", weights=True), last.weights)


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_tied_parameters_have_one_average(kept: str, tmp_path: Path) -> None:
    """An EMA of `named_parameters()` has one of the two names; both get the average."""
    for save in saves():
        state = dict(save.weights)
        average = dict(save.average)
        state["embed.weight"] = state["head.weight"]
        average["embed.weight"] = average.pop("head.weight")
        average[kept] = average.pop("embed.weight")
        torch.save({"model": state, "ema": average}, tmp_path / f"step{save.step}.pt")
    last = saves()[-1]
    weights = last.weights | {"embed.weight": last.weights["head.weight"]}
    averaged = last.average | {"embed.weight": last.average["head.weight"]}
    check(tmp_path, averaged, weights, None)
    check_export(tmp_path / "step400.pt", averaged, weights)


def test_an_average_of_a_part_of_the_model(tmp_path: Path) -> None:
    """Names tell which part it is of; the run is of that part."""
    text = {f"text.{index}.weight": torch.ones(3) for index in range(9)}
    for save in saves():
        model = {"state_dict": named("net.", save.weights) | text}
        torch.save(model | {"ema": named("net.", save.average)}, tmp_path / f"step{save.step}.pt")
    last = saves()[-1]
    check(tmp_path, last.average, last.weights, None)
    assert_equal(exported(tmp_path / "step400.pt"), last.average)


def test_an_average_that_is_not_used_is_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An average of a small part of the model is used if the user names it."""
    rest = {f"text.{index}.weight": torch.ones(3) for index in range(9)}
    for save in saves():
        content = {"state_dict": save.weights | rest, "extra": {"deep": {"ema": save.average}}}
        torch.save(content, tmp_path / f"step{save.step}.pt")
    last = saves()[-1]
    Run(tmp_path).average(0.1)
    assert "also holds 'extra.deep.ema', not used: an import takes another set by" in caplog.text
    check(tmp_path, last.average | rest, last.weights | rest, None, average="deep.ema")
    assert_equal(exported(tmp_path / "step400.pt", average="ema"), last.average | rest)


def test_two_towers_are_no_average_and_its_weights(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Networks of other weights have the same names and shapes, and norms that are alike."""
    file = tmp_path / "step9.pt"
    noise = torch.Generator().manual_seed(0)
    source = {
        "w": torch.randn(20, 20, generator=noise),
        "norm": torch.ones(20),
    }
    target = {
        "w": torch.randn(20, 20, generator=noise),
        "norm": torch.ones(20),
    }
    torch.save({"source_encoder": source, "target_encoder": target}, file)
    exported(file)
    assert "average is unrelated to the weights; name it by `average` if it is" in caplog.text
    caplog.clear()
    assert_equal(exported(file, average="target_encoder"), target)
    near = {name: value + 0.5 for name, value in source.items()}
    torch.save({"source_encoder": source, "target_encoder": near}, file)
    assert_equal(exported(file), near)
    assert "unrelated" not in caplog.text


# --- written by the libraries


def test_accelerate_with_an_average_of_diffusers(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    training = pytest.importorskip("diffusers.training_utils")
    net = new_net()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    prepared, _ = accelerator.prepare(net, optimizer)
    average = training.EMAModel(net.parameters(), decay=0.95)
    accelerator.register_for_checkpointing(average)
    for step in walk(net):
        average.step(net.parameters())
        if step % EVERY == 0:
            accelerator.save_state(str(tmp_path / f"checkpoint-{step}"))
    assert prepared is net
    names = [name for name, _ in net.named_parameters()]
    averaged = dict(zip(names, average.shadow_params, strict=True))
    check(tmp_path, averaged, weights_of(net))
    check_export(tmp_path / "checkpoint-400", averaged, weights_of(net))


def by_ema_pytorch(
    has_online: bool,
    save: Callable[[int, torch.nn.Module, torch.nn.Module], None],
) -> tuple[Tensors, Tensors]:
    """Train with the library's EMA, and call `save` with the step, model and EMA at each save;
    return the last average and weights."""
    library = pytest.importorskip("ema_pytorch")
    net = new_net()
    settings = {"beta": 0.95, "power": 1.0, "update_every": 1, "update_after_step": 0}
    average = library.EMA(net, include_online_model=has_online, **settings)
    for step in walk(net):
        average.update()
        if step % EVERY == 0:
            save(step, net, average)
    return copied(average.ema_model.state_dict()), weights_of(net)


OF_EMA_PYTORCH: dict[str, Any] = {
    "ema_decay": 0.95,
    "ema_warmup": "power:1",
    "update_every": 1,
    "update_after_step": 0,
}


@pytest.mark.parametrize("has_online", [False, True])
def test_ema_pytorch_in_a_module_of_lightning(has_online: bool, tmp_path: Path) -> None:
    def save(step: int, net: torch.nn.Module, average: torch.nn.Module) -> None:
        state = named("diffusion.model.", net.state_dict())
        state |= named("diffusion_ema.", average.state_dict())
        state["diffusion.text.weight"] = torch.ones(9, 9)
        content = {"state_dict": state, "global_step": step, "epoch": 0}
        torch.save(content, tmp_path / f"epoch=0-step={step}.ckpt")

    averaged, weights = by_ema_pytorch(has_online, save)
    settings = {"weights": "diffusion.model"} if has_online else {}
    check(tmp_path, averaged, weights, **OF_EMA_PYTORCH, **settings)
    file = tmp_path / "epoch=0-step=400.ckpt"
    assert_equal(exported(file), averaged)


@pytest.mark.parametrize("has_online", [False, True])
def test_ema_pytorch_in_a_list_of_imagen(has_online: bool, tmp_path: Path) -> None:
    def save(step: int, net: torch.nn.Module, average: torch.nn.Module) -> None:
        content = {
            "model": named("unets.0.", net.state_dict()),
            "version": "1.26",
            "steps": torch.tensor([step]),
            "optim0": OPTIMIZER,
            "ema": torch.nn.ModuleList([average]).state_dict(),
        }
        torch.save(content, tmp_path / f"checkpoint.{step}.pt")

    averaged, weights = by_ema_pytorch(has_online, save)
    check(tmp_path, averaged, weights, **OF_EMA_PYTORCH)
    check_export(tmp_path / "checkpoint.400.pt", averaged, weights)


@pytest.mark.parametrize("is_swapped", [False, True])
def test_torch_ema_with_weights_set_aside(is_swapped: bool, tmp_path: Path) -> None:
    """While the average is swapped in, the raw weights are in `collected_params`; afterwards old
    ones are there."""
    library = pytest.importorskip("torch_ema")
    net = new_net()
    average = library.ExponentialMovingAverage(net.parameters(), decay=0.95)
    for step in walk(net):
        average.update()
        if step % EVERY == 0:
            weights = weights_of(net)
            if is_swapped:
                average.store()
                average.copy_to()
            content = {"state_dict": net.state_dict(), "ema": average.state_dict()}
            torch.save(content | {"global_step": step}, tmp_path / f"step={step}.ckpt")
            if is_swapped:
                average.restore()
            else:
                average.store()
    averaged = dict(zip(weights, average.shadow_params, strict=True))
    check(tmp_path, averaged, weights)
    check_export(tmp_path / "step=400.ckpt", averaged, weights)


def test_lists_of_the_first_torch_ema_leave_out_frozen_parameters(tmp_path: Path) -> None:
    """The list has one tensor of two of a shape, and is matched by values."""
    net = new_net()
    net.body[1].weight.requires_grad_(False)
    net.body[0].bias.requires_grad_(False)
    trained = {name: one for name, one in net.named_parameters() if one.requires_grad}
    shadow = copied(trained)
    for step in walk(net):
        for name, value in shadow.items():
            value.lerp_(trained[name].detach(), 1 - ratio(step))
        if step % EVERY == 0:
            state = {"decay": 0.95, "num_updates": step, "shadow_params": [*shadow.values()]}
            torch.save({"model": net.state_dict(), "ema": state}, tmp_path / f"step{step}.pt")
    averaged = weights_of(net) | shadow
    check(tmp_path, averaged, weights_of(net))
    check_export(tmp_path / "step400.pt", averaged, weights_of(net))


def test_a_list_that_fits_two_weights_about_equally_is_refused(tmp_path: Path) -> None:
    first, second = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    state = {"decay": 0.95, "num_updates": 5, "shadow_params": [(first + second) / 2]}
    torch.save({"model": {"a": first, "b": second}, "ema": state}, tmp_path / "step5.pt")
    with pytest.raises(FileFormatError, match="of which one fits two weights about equally"):
        exported(tmp_path / "step5.pt")
