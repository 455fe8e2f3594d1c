"""What programs save is found: the average and the weights, tensor for tensor, and how the average
was updated; written by the programs' libraries, or in their published structure."""

import json
import math
import shlex
from dataclasses import replace

import pytest
import torch
from checking import refused
from saved import (
    all_steps,
    asked,
    assert_equal,
    check,
    check_export,
    check_last,
    exported,
    named,
    read,
    store,
    times,
    values_of,
    write_each,
)
from walks import EVERY, constant, new_net, ratio, saves, walk, weights_of

LAST = saves()[-1]
OPTIMIZER = {
    "state": {0: {"exp_avg": torch.zeros(24, 24)}},
    "param_groups": [{"params": [0]}],
}


# --- in their published structure


PLACES = [
    ("student/module.", "teacher/", ""),  # DINO
    ("encoder/module.", "target_encoder/module.", "module."),  # I-JEPA
    ("state/learner.online_encoder.net.", "state/learner.target_encoder.net.", "net."),  # BYOL
    ("state/module.encoder_q.", "state/module.encoder_k.", ""),  # MoCo v2
    ("state/module.base_encoder.", "state/module.momentum_encoder.", ""),  # MoCo v3
    ("model/", "ema/module.", ""),  # DiT
    ("model/modelStudent.", "model/modelTeacher.", ""),  # Unbiased Teacher
    ("model/net.", "model/net_ema.", ""),  # Cosmos
    ("model_without_ema/", "model_ema/", ""),
]
"""Keys and prefixes of the weights and of their average, and the prefix of names in both."""


def at_places(save, weights_place, average_place):
    """Return a content with an optimizer, which only its form shows."""
    content = {
        "adam": OPTIMIZER,
        "critic": {"queue": torch.zeros(4, 8)},
    }
    for place, tensors in ((weights_place, save.weights), (average_place, save.average)):
        key, _, prefix = place.partition("/")
        content[key] = content.get(key, {}) | named(prefix, tensors)
    return content


@pytest.mark.parametrize(("weights", "average", "prefix"), PLACES)
def test_keys_and_prefixes_say_which_set_is_the_average(weights, average, prefix, tmp_path):
    file = tmp_path / "last.pt"
    torch.save(at_places(LAST, weights, average), file)
    check_export(file, named(prefix, LAST.average), named(prefix, LAST.weights))


FOLDERS = {
    "guided-diffusion": ("ema_0.95_{:06}.pt", "model{:06}.pt"),
    "two files of a folder": ("{:07}/ema.safetensors", "{:07}/model.safetensors"),
    "a decay in the name": ("{:07}/ema_0.95.pt", "{:07}/model.pt"),
    "two folders": ("{:07}/model_ema/model.safetensors", "{:07}/model/model.safetensors"),
}
"""Places of the average and of the weights of a step."""


@pytest.mark.parametrize("name", FOLDERS)
def test_names_of_files_say_which_set_is_the_average(name, tmp_path):
    average, weights = FOLDERS[name]
    for save in saves():
        store(tmp_path / average.format(save.step), save.average)
        store(tmp_path / weights.format(save.step), save.weights)
        store(tmp_path / f"opt{save.step:06}.pt", OPTIMIZER)
    check_last(tmp_path)
    top, *_ = average.format(LAST.step).split("/")
    assert_equal(exported(tmp_path / top), LAST.average)


def test_the_name_of_a_folder_of_files_says_that_they_are_averages(tmp_path):
    write_each(tmp_path, "step{save.step}.pt", lambda save: {"model": save.weights})
    file = write_each(tmp_path, "ema/step{save.step}.pt", lambda save: {"model": save.average})
    check_last(tmp_path / "**/step*.pt")
    assert_equal(exported(file), LAST.average)


def test_the_name_of_an_experiment_does_not_say_it(tmp_path):
    write_each(tmp_path / "ema_lr3", "step{save.step}.pt", lambda save: {"model": save.weights})
    assert read(tmp_path / "ema_lr3").counts == {"weights": len(saves())}


@pytest.mark.parametrize(("number", "decay"), [("{:06}", "0.95"), ("{:03}", "0.950")])
def test_one_of_two_decays_in_names_is_chosen(number, decay, tmp_path):
    """`950_100` in `ema_0.950_100.pt` was read as grouped digits."""
    for save in saves():
        step = number.format(save.step)
        store(tmp_path / f"model{step}.pt", save.weights)
        store(tmp_path / f"ema_{decay}_{step}.pt", save.average)
        store(tmp_path / f"ema_0.5_{step}.pt", save.weights)
    globs = {"average": f"ema_{decay}_*.pt", "weights": "model*.pt"}
    with refused(tmp_path, f"--average '{globs['average']}' --weights '{globs['weights']}' --out"):
        read(tmp_path)
    check(tmp_path, LAST.average, LAST.weights, 0.95, **globs)


def openfold(save):
    return {
        "epoch": save.epoch - 1,
        "global_step": save.step,
        "state_dict": named("model.", save.weights),
        "optimizer_states": [OPTIMIZER],
        "ema": {"params": save.average, "decay": 0.95},
    }


def composer(save, model, states, is_active):
    algorithm = {"ema_model": states, "ema_weights_active": is_active}
    return {
        "state": {
            "model": model,
            "optimizers": {"Adam": OPTIMIZER},
            "algorithms": [("EMA", algorithm)],
            "timestamp": {"Timestamp": {"epoch": save.epoch, "batch": save.step, "sample": 9}},
        },
        "rng": [{"torch": torch.get_rng_state()}],
    }


def passive_composer(save):
    states = {"parameters_dict": save.average, "buffers_dict": {}}
    return composer(save, save.weights, states, is_active=False)


def active_composer(save):
    """Return what is written while the average is in the model's place."""
    states = {"parameters_dict": save.weights, "buffers_dict": {}}
    return composer(save, save.average, states, is_active=True)


def ace(save):
    names = {name: name.replace(".", "") for name in save.weights}
    return {
        "num_batches_seen": save.step,
        "stepper": {"module": named("module.", save.weights), "config": {"type": "SFNO"}},
        "ema": {
            "decay": torch.tensor(0.95),
            "num_updates": torch.tensor(save.step),
            "faster_decay_at_start": True,
            "module_name_to_ema_name": names,
            "ema_params": {flat: save.average[name] for name, flat in names.items()},
        },
    }


def of_lightning(save, **state):
    return {
        "state_dict": state,
        "global_step": save.step,
        "epoch": save.epoch - 1,
    }


def lit_ema(save):
    state = named("model.", save.weights)
    for name, value in save.average.items():
        flat = name.replace(".", "")
        state[f"model_ema.{flat}"] = value
    state["model_ema.decay"] = torch.tensor(0.95)
    state["model_ema.num_updates"] = torch.tensor(save.step)
    return of_lightning(save, **state)


def nequip(save, is_swapped=False):
    ours, theirs = save.weights, save.average
    if is_swapped:
        ours, theirs = theirs, ours
    state = named("model.", ours)
    for position, value in enumerate(theirs.values()):
        state[f"ema.ema_weight_{position}"] = value
    state["ema._extra_state"] = {
        "decay": 0.95,
        "num_updates": save.step + 1,  # the copy at its start, too
        "is_holding_ema_weights": not is_swapped,
    }
    return of_lightning(save, **state)


def averaged_model(save):
    state = named("net.", save.weights) | named("slow.module.", save.average)
    state["slow.n_averaged"] = torch.tensor(save.step)
    return of_lightning(save, **state)


def fairseq(save):
    return {
        "model": save.weights,
        "optimizer_history": [{"num_updates": 3}, {"num_updates": save.step}],
        "extra_state": {"train_iterator": {"epoch": save.epoch}, "ema": save.average},
        "last_optimizer_state": OPTIMIZER,
    }


def torch_ema(updates, *averages):
    return {
        "decay": 0.95,
        "num_updates": updates,
        "shadow_params": [*averages],
    }


def torch_ema_with(save, weights, set_aside):
    ema = torch_ema(save.step, *save.average.values())
    ema["collected_params"] = [*set_aside.values()]
    return {
        "state_dict": weights,
        "ema": ema,
    }


def swapped_in_before(save):
    return torch_ema_with(save, save.weights, saves()[0].weights)


PROGRAMS = {
    "OpenFold": ("{save.epoch}-{save.step}.ckpt", openfold, constant, 0.95),
    "Composer": ("ep{save.epoch}-ba{save.step}-rank0.pt", passive_composer, constant, None),
    "ACE": ("ckpt_{save.epoch:04}.tar", ace, ratio, 0.95),
    "LitEma of LDM": ("step={save.step}.ckpt", lit_ema, ratio, 0.95),
    "AveragedModel in Lightning": ("step={save.step}.ckpt", averaged_model, constant, None),
    "fairseq": ("checkpoint_{save.epoch}_{save.step}.pt", fairseq, constant, None),
    "torch-ema": ("step={save.step}.ckpt", swapped_in_before, ratio, 0.95),
}
"""The name of a file, what it holds, how the average is updated, and the decay that it says."""


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_is_known_by_its_structure(program, tmp_path):
    name, content, decay, says = PROGRAMS[program]
    file = write_each(tmp_path, name, content, decay)
    last = saves(decay)[-1]
    check(tmp_path, last.average, last.weights, says)
    check_export(file, last.average, last.weights)


@pytest.mark.parametrize("steps", [[], [80], [400], [*range(40, 401, 40)]])
def test_a_file_that_says_that_the_average_was_swapped_in_is_turned(steps, tmp_path, caplog):
    caplog.set_level("INFO")
    name = "epoch={save.epoch}-step={save.step}.ckpt"
    file = write_each(tmp_path, name, lambda save: nequip(save, save.step in steps), ratio)
    last = saves(ratio)[-1]
    average = named("model.", last.average)
    weights = named("model.", last.weights)
    check(tmp_path, average, weights, 0.95)
    check_export(file, average, weights)
    assert all(f"step={step}.ckpt" in caplog.text for step in steps[:1])


def swap_in(save):
    return torch_ema_with(save, save.average, save.weights)


@pytest.mark.parametrize(
    ("content", "name", "sets"),
    [
        (
            active_composer,
            "ep{save.epoch}-ba{save.step}-rank0.pt",
            "--average state.model --weights state.algorithms.0.1.ema_model",
        ),
        (swap_in, "step={save.step}.ckpt", "--weights ema.collected_params"),
    ],
)
def test_files_written_while_the_average_was_swapped_in_are_asked_about(
    content, name, sets, tmp_path
):
    """The command that the question ends in goes through."""
    write_each(tmp_path, name, content, ratio)
    said = asked(tmp_path, ema_decay=0.95, ema_warmup="ratio")
    assert f" {sets}" in said
    assert said.endswith(" --out run")
    words = shlex.split(said.partition("ema import ")[2])
    options = {"average": None, "weights": None}
    for name in options:
        if f"--{name}" in words:
            options[name] = words[words.index(f"--{name}") + 1]
    last = saves(ratio)[-1]
    check(tmp_path, last.average, last.weights, ema_decay=0.95, ema_warmup="ratio", **options)


def ema_pytorch(save):
    counts = {
        "initted": torch.tensor(True),
        "step": torch.tensor(save.step),
    }
    return named("ema_model.", save.average) | counts


def test_ema_pytorch_in_files_of_its_own(tmp_path):
    """Its object has nothing but the average and counters."""
    file = write_each(tmp_path, "ema-{save.step}.pt", ema_pytorch)
    options = " --ema-decay 0.95 --update-every N --update-after-step N --out run"
    with refused("update_every", options):
        read(tmp_path, ema_decay=0.95)
    assert_equal(exported(file), LAST.average)


def test_megatron_has_a_folder_for_each_rank(tmp_path):
    def content(save):
        model = {"language_model": save.weights}
        return {
            "iteration": save.step,
            "model": model,
            "optimizer": OPTIMIZER,
        }

    write_each(tmp_path, "iter_{save.step:07}/mp_rank_00/model_optim_rng.pt", content)
    assert times(tmp_path) == all_steps()


def test_composer_averages_buffers_apart(tmp_path):
    buffers = {f"bn.{index}.running_mean": torch.ones(4) * index for index in range(9)}
    averaged = {name: mean / 2 for name, mean in buffers.items()}

    def content(save):
        states = {
            "named_parameters_dict": save.average,
            "named_buffers_dict": averaged,
        }
        return composer(save, save.weights | buffers, states, is_active=False)

    file = write_each(tmp_path, "ep0-ba{save.step}-rank0.pt", content)
    check_export(file, LAST.average | averaged, LAST.weights | buffers)


def ramp(n):
    risen = 1 - math.exp(-n / 2000)
    return 0.9999 * risen


def half(tensors):
    net = new_net()
    net.load_state_dict(tensors)
    return net.half()


def test_modules_of_ultralytics(tmp_path):
    """Without the weights; the `updates` of averages in half precision turn epochs into steps."""

    def content(save):
        return {"model": None, "ema": half(save.average), "updates": save.step}

    file = write_each(tmp_path, "epoch{save.epoch}.pt", content, ramp)
    averaged = [one for one in read(tmp_path).checkpoints if one.decay]
    assert [one.t for one in averaged] == all_steps()
    assert averaged[-1].decay == 0.9999
    average = half(saves(ramp)[-1].average).state_dict()
    assert_equal(exported(file), average)
    assert_equal(values_of(averaged[-1]), average)


def test_counts_of_torchvision_begin_after_its_warm_up(tmp_path):
    """It sets them back to 0 until the learning rate has risen."""
    for save in saves()[5:]:
        average = named("module.", save.average)
        average["n_averaged"] = torch.tensor((save.epoch - 5) * EVERY)
        content = {
            "model": save.weights,
            "model_ema": average,
            "epoch": save.epoch,
        }
        store(tmp_path / f"model_{save.epoch}.pth", content)
    settings = {
        "ema_decay": 0.95,
        "ema_warmup": "none",
        "update_every": 1,
    }
    with refused("steps_per_epoch", " --steps-per-epoch N --out run"):
        read(tmp_path, **settings)
    assert {*times(tmp_path, steps_per_epoch=EVERY, **settings)} == {*all_steps()[5:]}


def tied(tensors):
    return tensors | {"embed.weight": tensors["head.weight"]}


def test_tied_parameters_have_one_average(tmp_path):
    """An EMA of `named_parameters()` has one of the two names; both get the average."""

    def content(save):
        average = dict(save.average)
        average["embed.weight"] = average.pop("head.weight")
        return {"model": tied(save.weights), "ema": average}

    file = write_each(tmp_path, "step{save.step}.pt", content)
    check(tmp_path, tied(LAST.average), tied(LAST.weights), None)
    check_export(file, tied(LAST.average), tied(LAST.weights))


# --- written by the libraries


@pytest.mark.parametrize("shapes", ["equal", "unique"])
def test_accelerate_with_an_average_of_diffusers(shapes, tmp_path):
    """Its list of averages is in the model's order, safetensors are in that of names: where shapes
    do not tell which is which, values do."""
    accelerate = pytest.importorskip("accelerate")
    training = pytest.importorskip("diffusers.training_utils")
    accelerator = accelerate.Accelerator(cpu=True)
    plain = new_net() if shapes == "equal" else torch.nn.Linear(16, 24)
    net = accelerator.prepare(plain)
    average = training.EMAModel(net.parameters(), decay=0.95)
    accelerator.register_for_checkpointing(average)
    for step in walk(net):
        average.step(net.parameters())
        if step % EVERY == 0:
            folder = tmp_path / f"checkpoint-{step}"
            accelerator.save_state(str(folder))
    averaged = dict(zip(weights_of(net), average.shadow_params, strict=True))
    check(tmp_path, averaged, weights_of(net))
    check_export(folder, averaged, weights_of(net))


def backup(place, save, *, weights, names, **others):
    """Write a backup as OneTrainer does: models in folders, the averages as a list, the step."""
    folder = place / f"2024-05-01_12-30-{save.epoch:02}-backup-{save.step}-{save.epoch}-0"
    for part, tensors in {"unet": weights, **others}.items():
        store(folder / part / "model.safetensors", tensors)
    averages = [save.average[name] for name in names]
    store(folder / "ema" / "ema.pt", {"decay": 0.95, "ema_parameters": averages})
    store(folder / "optimizer" / "optimizer.pt", OPTIMIZER)
    progress = {"epoch": save.epoch, "epoch_step": 0, "epoch_sample": 0, "global_step": save.step}
    (folder / "meta.json").write_text(json.dumps({"train_progress": progress}))


@pytest.mark.parametrize("order", ["model", "reversed", "part"])
@pytest.mark.parametrize("others", [{}, {"vae": {"encoder.weight": torch.ones(24, 24)}}])
def test_a_list_of_averages_is_matched_by_values(others, order, tmp_path):
    """OneTrainer's: its order is not that of files, and frozen parts have the same shapes."""
    names = [*LAST.average]
    frozen = {}
    if order == "reversed":
        names.reverse()
    elif order == "part":
        frozen = {names.pop(0): torch.ones(24, 16)}
    for save in saves():
        backup(tmp_path, save, weights={**save.weights, **frozen}, names=names, **others)
    prefix = "unet." if others else ""
    rest = {f"{part}.{name}": value for part in others for name, value in others[part].items()}
    averages = named(prefix, {**LAST.average, **frozen}) | rest
    check(tmp_path, averages, named(prefix, {**LAST.weights, **frozen}) | rest)


def test_a_list_of_averages_that_values_do_not_tell_apart_is_asked_about(tmp_path):
    """Two gains of norms that are still 1 may be each other's average."""
    gains = {"a.norm.weight": torch.ones(24), "b.norm.weight": torch.ones(24)}
    for save in saves():
        save = replace(save, average={**gains, **save.average})
        backup(tmp_path, save, weights={**gains, **save.weights}, names=[*save.average])
    assert asked(tmp_path).endswith("--from checkpoints --out run")


def of_imagen(save):
    return {
        "model": named("unets.0.", save.weights),
        "steps": torch.tensor([save.step]),
        "optim0": OPTIMIZER,
        "ema": named("0.", ema_pytorch(save)),
    }


def test_ema_pytorch_in_another_program(tmp_path):
    file = write_each(tmp_path, "checkpoint.{save.step}.pt", of_imagen)
    settings = {
        "ema_decay": 0.95,
        "ema_warmup": "none",
        "update_every": 1,
        "update_after_step": 0,
    }
    check(tmp_path, LAST.average, LAST.weights, **settings)
    assert_equal(exported(file), LAST.average)
    check(tmp_path, LAST.average, LAST.weights, average="ema.0.ema_model", **settings)


@pytest.mark.parametrize(
    ("weights", "file", "key"),
    [
        ("model_{save.step}.pt", "training_state_{save.step}.pt", "ema"),
        ("{save.step}/model.bin", "{save.step}/training_state.pt", "ema"),
        ("checkpoint-{save.step}/model.bin", "checkpoint-{save.step}/model.ema.bin", "model"),
        ("step{save.step}.pt", "step{save.step}.ema", "model"),
    ],
)
def test_an_average_in_another_file_than_the_weights_is_found(weights, file, key, tmp_path):
    def content(save):
        return {key: save.average, "optimizer": OPTIMIZER}

    write_each(tmp_path, weights, lambda save: save.weights)
    last = write_each(tmp_path, file, content)
    check_last(tmp_path)
    assert_equal(exported(last), LAST.average)
