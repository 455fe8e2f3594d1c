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
from posthoc_cli.checkpoints.open_run import open_checkpoints
from posthoc_cli.checkpoints.source import Checkpoint
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.export.convert import export_file
from posthoc_cli.profiles import OrdinaryEMA, Point

OPTIMIZER = {
    "state": {0: {"exp_avg": torch.zeros(24, 24)}},
    "param_groups": [{"params": [0]}],
}


def named(prefix: str, tensors: Tensors) -> Tensors:
    return {f"{prefix}{name}": value for name, value in tensors.items()}


def values_of(source: Checkpoint) -> Tensors:
    """Return the tensors of a source, under all their names."""
    found = {}
    with source:
        for name, entry in source.entries.items():
            values = source.values(name, 0, entry.size)
            found[name] = torch.from_numpy(values).reshape(entry.shape)
    for alias, name in source.aliases.items():
        found[alias] = found[name]
    return found


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


def check_last(place: Path, **settings: Any) -> None:
    """Check that an import finds the last weights and their average, of a decay that no file
    says."""
    last = saves()[-1]
    check(place, last.average, last.weights, None, **settings)


def all_steps() -> list[int]:
    return [save.step for save in saves()]


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


def unbiased(n):
    counted = 1 - 0.95**n
    return 1 - 0.05 / counted


def audiocraft(save):
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


def openfold(save):
    return {
        "epoch": save.epoch - 1,
        "global_step": save.step,
        "state_dict": named("model.", save.weights),
        "optimizer_states": [OPTIMIZER],
        "ema": {"params": save.average, "decay": 0.95},
    }


def composer(save, is_active):
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


def ace(save):
    names = {name: name.replace(".", "") for name in save.weights}
    return {
        "num_batches_seen": save.step,
        "epoch": save.epoch,
        "stepper": {"module": named("module.", save.weights), "config": {"type": "SFNO"}},
        "optimization": {"optimizer_state_dict": OPTIMIZER},
        "ema": {
            "decay": torch.tensor(0.95),
            "num_updates": torch.tensor(save.step),
            "faster_decay_at_start": True,
            "module_name_to_ema_name": names,
            "ema_params": {flat: save.average[name] for name, flat in names.items()},
        },
    }


def lightning_like(*sets: Callable[[Save], Tensors]) -> Callable[[Save], object]:
    def content(save):
        state = {}
        for tensors_of in sets:
            state |= tensors_of(save)
        return {
            "state_dict": state,
            "global_step": save.step,
            "epoch": save.epoch - 1,
        }

    return content


def moco(save: Save, online: str, slow: str) -> object:
    state = {
        **named(f"module.{online}.", save.weights),
        **named(f"module.{slow}.", save.average),
        "module.queue": torch.zeros(4, 8),
        "module.queue_ptr": torch.zeros(1),
    }
    return {
        "epoch": save.epoch,
        "arch": "vit",
        "state_dict": state,
        "optimizer": OPTIMIZER,
    }


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
    return write_each(folder, program.file, program.content, program.decay)


def write_each(
    folder: Path,
    name: str,
    content: Callable[[Save], object],
    decay: Callable[[int], float] = constant,
) -> Path:
    """Write a file at each save; return the last one."""
    folder.mkdir(exist_ok=True)
    for save in saves(decay):
        file = folder / name.format(step=save.step, epoch=save.epoch)
        torch.save(content(save), file)
    return file


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_known_by_its_structure(name, tmp_path):
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
def test_info_names_the_program(name, tmp_path):
    write(tmp_path / "run", PROGRAMS[name])
    assert Run(tmp_path / "run").info()["written_by"] == WRITERS[name]


def test_ema_pytorch_in_files_of_its_own(tmp_path):
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


def test_megatron_has_a_folder_for_each_rank(tmp_path):
    for save in saves():
        folder = tmp_path / f"iter_{save.step:07}/mp_rank_00"
        folder.mkdir(parents=True)
        content = {"iteration": save.step, "model": {"language_model": save.weights}}
        torch.save(content | {"optimizer": OPTIMIZER}, folder / "model_optim_rng.pt")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    assert [one.t for one in Run(tmp_path).sources] == all_steps()


def test_states_of_edm_hold_the_weights(tmp_path):
    """Their names count thousands of images, rounded."""
    for step, save in zip(all_steps(), saves(), strict=True):
        images = 640 * step
        state = {"cur_nimg": images, "total_elapsed_time": 1.0}
        content = {"net": save.weights, "optimizer_state": OPTIMIZER, "state": state}
        torch.save(content, tmp_path / f"training-state-{images // 1000:07}.pt")
    sources = Run(tmp_path).sources
    assert [one.t for one in sources] == [640 * step for step in all_steps()]
    assert {one.t_unit for one in sources} == {"images"}


def test_composer_links_its_newest_file(tmp_path):
    file = write(tmp_path / "run", PROGRAMS["Composer"])
    (file.parent / "latest-rank0.pt").symlink_to(file.name)
    check_last(file.parent)


def test_several_averages_of_demucs_are_asked_for(tmp_path):
    file = tmp_path / "checkpoint.th"
    first, *_, before, last = saves()
    content = {
        "state": last.weights,
        "optimizer": OPTIMIZER,
        "best_state": first.weights,
        "ema_batch_0": {"state": last.average, "count": 20.0},
        "ema_epoch_0": {"state": before.average, "count": 2.0},
    }
    torch.save(content, file)
    with pytest.raises(FileFormatError, match=r"unclear: .*ema_batch_0.*, .*ema_epoch_0"):
        exported(file)
    for key in ("ema_batch_0", "ema_batch_0.state"):
        assert_equal(exported(file, average=key), last.average)
    assert_equal(exported(file, weights=True), last.weights)


def by_decay_in_keys(save):
    return {"ema_0.95": save.average, "ema_0.99": save.weights}


def in_a_list(save):
    return {"emas": [save.average, save.weights]}


def deep(save):
    return {"a": {"ema": save.average}, "b": ({"net_ema": save.weights},)}


@pytest.mark.parametrize(
    ("averages", "key", "other"),
    [
        (by_decay_in_keys, "ema_0.95", "ema_0.99"),
        (in_a_list, "emas.0", "emas.1"),
        (deep, "a.ema", "b.0.net_ema"),
    ],
)
def test_of_several_averages_one_is_chosen(averages, key, other, tmp_path):
    def content(save):
        return {"model": save.weights, **averages(save)}

    file = write_each(tmp_path, "step{step}.pt", content)
    with pytest.raises(FileFormatError, match=f"unclear: '{key}', '{other}'"):
        exported(file)
    with pytest.raises(FileFormatError, match=f"unclear: '{key}', '{other}'"):
        _ = Run(tmp_path).sources
    check_last(tmp_path, average=key)
    assert_equal(exported(file, average=other), saves()[-1].weights)


PARTS = {
    "solo-learn": ("backbone", "projector", "momentum_backbone", "momentum_projector"),
    "DINO": ("student_backbone", "student_head", "teacher_backbone", "teacher_head"),
}
"""Keys of the two parts of a model, and of their averages."""


def in_parts(tensors: Tensors, body: str, head: str) -> Tensors:
    parts = {}
    for name, value in tensors.items():
        key = body if name.startswith("body") else head
        parts[f"{key}.{name}"] = value
    return parts


@pytest.mark.parametrize("name", PARTS)
def test_an_average_in_two_parts_is_one(name, tmp_path):
    """Also beside a layer that has no average, and a trained one of an average's features."""
    body, head, slow_body, slow_head = PARTS[name]
    classifier = body.replace("backbone", "classifier")
    layers = ("predictor", "momentum_classifier", classifier)
    others = {f"{layer}.bias": torch.ones(3) for layer in layers}
    content = lightning_like(
        lambda save: in_parts(save.weights, body, head),
        lambda save: in_parts(save.average, slow_body, slow_head),
        lambda _: others,
    )
    file = write_each(tmp_path / "run", "step={step}.ckpt", content)
    last = saves()[-1]
    average = in_parts(last.average, body, head)
    weights = in_parts(last.weights, body, head)
    check(file.parent, average, weights, None)
    assert_equal(exported(file), average)
    of_head = {"head.weight": last.average["head.weight"]}
    assert_equal(exported(file, average=slow_head), of_head)


UNNAMED = {
    "FUNIT": ("gen", "gen_test"),
    "a word within a word": ("netG", "netGEMA"),
    "plurals": ("models", "averages"),
}
"""Keys of the weights and of the average, of which none is a word for it."""


@pytest.mark.parametrize("name", UNNAMED)
def test_the_values_show_which_of_two_groups_is_the_average(name, tmp_path):
    key, other = UNNAMED[name]
    discriminator = named("dis.", saves()[0].weights)
    discriminator["last.weight"] = torch.ones(3, 3)

    def content(save):
        return {other: save.average, key: save.weights, "dis": discriminator}

    write_each(tmp_path, "gen_{step:08}.pt", content)
    check_last(tmp_path)


FORMS = {
    "ALBEF, BLIP": ("{}_encoder", "{}_encoder_m"),
    "begun with a word": ("{}", "slow_{}"),
    "with another word": ("{}_q", "{}_k"),
}


REST = {"module.temperature": torch.tensor(0.07), "module.fusion.bias": torch.ones(9)}


def in_two_parts(tensors: Tensors, form: str) -> Tensors:
    visual = form.format("visual")
    text = form.format("text")
    return named("module.", in_parts(tensors, visual, text))


@pytest.mark.parametrize("name", FORMS)
def test_the_values_show_that_parts_of_a_model_are_averages(name, tmp_path):
    form, slow = FORMS[name]

    def model(save):
        averages = in_two_parts(save.average, slow)
        return in_two_parts(save.weights, form) | averages | REST

    file = write_each(tmp_path, "step{step}.pt", lambda save: {"model": model(save)})
    last = saves()[-1]
    average = in_two_parts(last.average, form) | REST
    weights = in_two_parts(last.weights, form) | REST
    check(tmp_path, average, weights, None)
    assert_equal(exported(file, weights=True), model(last))
    with pytest.raises(FileFormatError, match="holds no average"):
        exported(file)


def negated(tensors: Tensors) -> Tensors:
    return {name: -value for name, value in tensors.items()}


def two_generators(save):
    other = negated(save.average)
    return named("a_to_b.", save.weights) | named("b_to_a.", other)


def twin_critics(save):
    other = saves()[-save.epoch].weights
    return named("critic.", save.weights) | named("critic_b.", other)


def a_copy_of_the_begin(save):
    first = copied(saves()[0].weights)
    return named("net.", save.weights) | named("net_init.", first)


def layers(save):
    return named("block.", save.weights) | named("block1.", save.average)


def a_small_head(save):
    return {
        "body.weight": torch.ones(40, 40),
        "head.weight": save.weights["head.weight"],
        "head_aux.weight": save.average["head.weight"],
    }


@pytest.mark.parametrize(
    "model", [two_generators, twin_critics, a_copy_of_the_begin, layers, a_small_head]
)
def test_parts_that_are_alike_are_weights(model, tmp_path):
    """They have the same names and shapes, and none is an average."""
    write_each(tmp_path, "step{step}.pt", lambda save: {"model": model(save)})
    run = Run(tmp_path)
    assert {source.holds for source in run.sources} == {"weights"}
    assert run.tensors.keys() == model(saves()[-1]).keys()


def fixed_by_lightning(save):
    return {
        "state_dict": save.average,
        "current_model_state": save.weights,
        "averaging_state": {"n_averaged": torch.tensor(save.step)},
    }


def fixed_by_mmengine(save):
    weights = named("module.", save.weights)
    weights["steps"] = torch.tensor(save.step)
    return {"state_dict": save.average, "ema_state_dict": weights}


def fixed_by_torchtitan(save):
    states = {f"state.{name}.ema_params": value for name, value in save.average.items()}
    return {"model": save.weights, "ema_optimizer": states}


@pytest.mark.parametrize(
    ("layout", "average", "weights"),
    [
        (fixed_by_lightning, "state_dict", "current_model_state"),
        (fixed_by_mmengine, "state_dict", "ema_state_dict"),
        (fixed_by_torchtitan, "ema_optimizer", "model"),
    ],
)
def test_a_set_that_is_named_counts_where_a_layout_has_another(layout, average, weights, tmp_path):
    def content(save):
        slower = negated(save.average)
        return {**layout(save), "slower": slower, "global_step": save.step}

    file = write_each(tmp_path, "step{step}.pt", content)
    last = saves()[-1]
    slower = negated(last.average)
    assert_equal(exported(file, average=average), last.average)
    assert_equal(exported(file, average=weights), last.weights)
    assert_equal(exported(file, average="slower"), slower)
    with pytest.raises(FileFormatError, match="has no set of tensors 'nowhere'"):
        exported(file, average="nowhere")
    check_last(tmp_path, average=average, weights=weights)
    with pytest.raises(FileFormatError, match="has no set of tensors 'nowhere'"):
        import_checkpoints(tmp_path, None, dry_run=True, weights="nowhere")
    others = import_checkpoints(tmp_path, None, dry_run=True, kind="checkpoints", weights="slower")
    assert_equal(values_of(others.checkpoints[-1]), slower)


LIT_EMA = {"unet_ema.decay": torch.tensor(0.95), "unet_ema.num_updates": torch.tensor(3)}


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("vae_ema", LIT_EMA),
        ("teacher_vae", {}),
    ],
    ids=["of two rules", "of two words"],
)
def test_averages_of_two_rules_are_asked_for(key, values, tmp_path):
    file = tmp_path / "step400.ckpt"
    last = saves()[-1]
    state = {
        **named("unet.", last.weights),
        **named("vae.", last.weights),
        **named("unet_ema.", last.average),
        **named(f"{key}.", last.average),
        **values,
    }
    torch.save({"state_dict": state}, file)
    with pytest.raises(FileFormatError, match=f"unclear: '.*(unet_ema|{key})', '.*_"):
        exported(file)


def test_averages_of_two_models_are_asked_for(tmp_path):
    file = tmp_path / "step400.pt"
    first, *_, last = saves()
    content = {
        "G": last.weights,
        "D": first.weights,
        "G_ema": last.average,
        "D_ema": first.average,
    }
    torch.save(content, file)
    with pytest.raises(FileFormatError, match="unclear: 'G_ema', 'D_ema'"):
        exported(file)


def test_composer_averages_buffers_apart(tmp_path):
    buffers = {}
    averaged = {}
    for index in range(9):
        mean = torch.full((4,), 1.0 * index)
        buffers[f"bn.{index}.running_mean"] = mean
        averaged[f"bn.{index}.running_mean"] = mean / 2

    def content(save):
        parts = {"named_parameters_dict": save.average, "named_buffers_dict": averaged}
        algorithms = [("EMA", {"ema_model": parts, "ema_weights_active": False})]
        model = save.weights | buffers
        return {"state": {"model": model, "algorithms": algorithms}}

    file = write_each(tmp_path, "ep0-ba{step}-rank0.pt", content)
    last = saves()[-1]
    average = last.average | averaged
    weights = last.weights | buffers
    check(tmp_path, average, weights, None, step_from=r"ba(\d+)")
    check_export(file, average, weights)


def of_mmcv(save, is_swapped):
    """The average is in buffers, or has been swapped with the weights."""
    model = save.average if is_swapped else save.weights
    buffers = save.weights if is_swapped else save.average
    state = dict(model)
    for name, value in buffers.items():
        flat = name.replace(".", "_")
        state[f"ema_{flat}"] = value
    meta = {"epoch": save.epoch, "iter": save.step}
    return {"meta": meta, "state_dict": state, "optimizer": OPTIMIZER}


@pytest.mark.parametrize(
    ("is_swapped", "average", "weights"),
    [
        (False, "ema_*", "state_dict"),
        (True, "state_dict", "ema_*"),
    ],
)
def test_buffers_of_mmcv(is_swapped, average, weights, tmp_path, caplog):
    """Of the two sets the average is the one that moves less; a single file asks."""
    file = write_each(tmp_path, "iter_{step}.pth", lambda save: of_mmcv(save, is_swapped))
    check_last(tmp_path)
    assert "which moves less from file to file" in caplog.text
    with pytest.raises(FileFormatError, match="nothing tells which is the average"):
        exported(file)
    last = saves()[-1]
    assert_equal(exported(file, average=average), last.average)
    assert_equal(exported(file, average=weights), last.weights)
    check_last(tmp_path, weights=weights)


def ramp(n):
    risen = 1 - math.exp(-n / 2000)
    return 0.9999 * risen


def of_ultralytics(save, has_model):
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
def test_modules_of_ultralytics(has_model, tmp_path):
    """The `updates` of the average turn epochs into steps."""
    for save in saves(ramp):
        content = of_ultralytics(save, has_model)
        file = tmp_path / f"epoch{save.epoch - 1}.pt"
        torch.save(content, file)
    last = saves(ramp)[-1]
    for copy in ("last.pt", "best.pt"):
        torch.save(content, tmp_path / copy)
    found = import_checkpoints(tmp_path, None, dry_run=True).checkpoints
    averaged = [one for one in found if isinstance(one.profile, OrdinaryEMA)]
    assert [one.t for one in averaged] == all_steps()
    assert averaged[-1].decay == 0.9999
    average = halved(last.average)
    assert_equal(exported(file), average)
    if has_model:
        weights = halved(last.weights)
        check(tmp_path, average, weights, 0.9999)
        check_export(file, average, weights)


@pytest.mark.parametrize("late", [0, 5])
def test_counts_of_torchvision_begin_after_its_warm_up(late, tmp_path):
    """It sets them back to 0 until the learning rate has risen."""
    for save in saves()[5:]:
        counted = (save.epoch - late) * EVERY
        average = named("module.", save.average)
        average["n_averaged"] = torch.tensor(counted)
        epoch = save.epoch - 1
        content = {"model": save.weights, "model_ema": average, "epoch": epoch}
        torch.save(content, tmp_path / f"model_{epoch}.pth")
    settings = {"ema_decay": 0.95, "ema_warmup": "none", "first_epoch": 0}
    if late:
        with pytest.raises(InvalidValueError, match=r"steps_per_epoch: must be .* since epoch 5"):
            import_checkpoints(tmp_path, None, dry_run=True, **settings)
        settings |= {"steps_per_epoch": EVERY, "update_every": 1}
    found = import_checkpoints(tmp_path, None, dry_run=True, **settings).checkpoints
    assert {one.t for one in found} == {*all_steps()[5:]}


def test_states_of_deepspeed_are_no_model(tmp_path):
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
    assert [one.step for one in run.sources] == all_steps()
    assert_equal(run.average("last:1"), saves()[-1].weights)


def test_target_networks_in_files_of_their_own(tmp_path):
    for save in saves():
        torch.save(save.weights, tmp_path / f"model_{save.step}.pt")
        torch.save(save.average, tmp_path / f"target_model_{save.step}.pt")
    check_last(tmp_path)
    last = saves()[-1]
    assert_equal(exported(tmp_path / "target_model_400.pt"), last.average)
    assert_equal(exported(tmp_path / "model_400.pt", weights=True), last.weights)


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_tied_parameters_have_one_average(kept, tmp_path):
    """An EMA of `named_parameters()` has one of the two names; both get the average."""

    def content(save):
        average = dict(save.average)
        average[kept] = average.pop("head.weight")
        return {"model": tied(save.weights), "ema": average}

    def tied(tensors):
        return tensors | {"embed.weight": tensors["head.weight"]}

    file = write_each(tmp_path, "step{step}.pt", content)
    last = saves()[-1]
    average = tied(last.average)
    weights = tied(last.weights)
    check(tmp_path, average, weights, None)
    check_export(file, average, weights)


TEXT = {f"text.{index}.weight": torch.ones(3) for index in range(9)}


def test_an_average_of_a_part_of_the_model(tmp_path):
    """Names tell which part it is of; the run is of that part."""

    def content(save):
        model = named("net.", save.weights) | TEXT
        return {"state_dict": model, "ema": named("net.", save.average)}

    file = write_each(tmp_path, "step{step}.pt", content)
    check_last(tmp_path)
    assert_equal(exported(file), saves()[-1].average)


def test_an_average_that_is_not_used_is_named(tmp_path, caplog):
    """An average of a small part of the model is used if the user names it."""

    def content(save):
        model = save.weights | TEXT
        return {"state_dict": model, "extra": {"deep": {"ema": save.average}}}

    file = write_each(tmp_path, "step{step}.pt", content)
    Run(tmp_path).average(0.1)
    assert "also holds 'extra.deep.ema', not used: an import takes another set by" in caplog.text
    last = saves()[-1]
    average = last.average | TEXT
    check(tmp_path, average, last.weights | TEXT, None, average="deep.ema")
    assert_equal(exported(file, average="ema"), average)


def test_two_towers_are_no_average_and_its_weights(tmp_path, caplog):
    """Networks of other weights have the same names and shapes, and norms that are alike."""
    file = tmp_path / "step9.pt"
    first, second = torch.randn(2, 20, 20)
    source = {"w": first, "norm": torch.ones(20)}
    target = {"w": second, "norm": torch.ones(20)}
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


def test_accelerate_with_an_average_of_diffusers(tmp_path):
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


OF_EMA_PYTORCH = {
    "ema_decay": 0.95,
    "ema_warmup": "power:1",
    "update_every": 1,
    "update_after_step": 0,
}


@pytest.mark.parametrize("has_online", [False, True])
def test_ema_pytorch_in_a_module_of_lightning(has_online, tmp_path):
    def save(step, net, average):
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
def test_ema_pytorch_in_a_list_of_imagen(has_online, tmp_path):
    def save(step, net, average):
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
def test_torch_ema_with_weights_set_aside(is_swapped, tmp_path):
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


def test_lists_of_the_first_torch_ema_leave_out_frozen_parameters(tmp_path):
    """The list has one tensor of two of a shape, and is matched by values."""
    net = new_net()
    net.body[1].weight.requires_grad_(False)
    net.body[0].bias.requires_grad_(False)
    trained = {name: one for name, one in net.named_parameters() if one.requires_grad}
    shadow = copied(trained)
    for step in walk(net):
        share = 1 - ratio(step)
        for name, value in shadow.items():
            value.lerp_(trained[name].detach(), share)
        if step % EVERY == 0:
            content = {
                "model": net.state_dict(),
                "ema": torch_ema(step, *shadow.values()),
            }
            torch.save(content, tmp_path / f"step{step}.pt")
    averaged = weights_of(net) | shadow
    check(tmp_path, averaged, weights_of(net))
    check_export(tmp_path / "step400.pt", averaged, weights_of(net))


def torch_ema(updates: int, *averages: torch.Tensor) -> dict[str, Any]:
    return {
        "decay": 0.95,
        "num_updates": updates,
        "shadow_params": [*averages],
    }


def test_a_list_that_fits_two_weights_about_equally_is_refused(tmp_path):
    file = tmp_path / "step5.pt"
    first, second = torch.randn(2, 50)
    average = torch_ema(5, (first + second) / 2)
    torch.save({"model": {"a": first, "b": second}, "ema": average}, file)
    with pytest.raises(FileFormatError, match="of which one fits two weights about equally"):
        exported(file)


# --- YOLOX, which saves its EMA in place of the weights


@pytest.fixture
def of_yolox(tmp_path):
    """The folder of ten files, one an epoch of 100 steps."""
    folder = tmp_path / "files"
    folder.mkdir()
    for epoch in range(1, 11):
        content = {"start_epoch": epoch, "best_ap": 0.3, "model": {"w": torch.rand(2)}}
        torch.save(content, folder / f"epoch_{epoch}_ckpt.pth")
    return folder


def test_files_of_yolox_ask_whether_they_hold_averages(of_yolox, tmp_path):
    with pytest.raises(InvalidValueError, match="kind: must be given, ema or checkpoints: YOLOX"):
        import_checkpoints(of_yolox, tmp_path / "run")


@pytest.mark.parametrize(
    ("kind", "decay", "holds"),
    [("checkpoints", None, "weights"), ("ema", 0.998, "EMA of decay 0.998")],
)
def test_files_of_yolox_are_taken_as_what_they_are_said_to_hold(
    kind, decay, holds, of_yolox, tmp_path
):
    run = tmp_path / "run"
    import_checkpoints(of_yolox, run, kind=kind, ema_decay=decay, steps_per_epoch=100)
    assert {one.holds for one in open_checkpoints(run)} == {holds}
