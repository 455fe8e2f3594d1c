"""What programs save is found: the average and the weights, tensor for tensor, and how the average
was updated; written by the programs' libraries, or in their published structure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from saved import (
    all_steps,
    assert_equal,
    check,
    check_export,
    check_last,
    exported,
    named,
    read,
    store,
    write_each,
)
from walks import EVERY, Save, Tensors, constant, copied, new_net, ratio, saves, walk, weights_of

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.checkpoints.open_run import open_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.profiles import OrdinaryEMA

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
    ("model/module.", "model_ema/", ""),  # MAR
    ("model/", "ema/module.", ""),  # DiT
    ("params/", "params_ema/", ""),  # BasicSR
    ("model/modelStudent.", "model/modelTeacher.", ""),  # Unbiased Teacher
    ("generator/", "generator_ema/", ""),  # Self-Forcing
    ("model/net.", "model/net_ema.", ""),  # Cosmos
    ("model_without_ema/", "model_ema/", ""),
]
"""Keys and prefixes of the weights and of their average, and the prefix of names in both."""


def at_places(save: Save, weights_place: str, average_place: str) -> dict[str, Any]:
    content = {"optimizer": OPTIMIZER, "critic": {"queue": torch.zeros(4, 8)}}
    for place, tensors in ((weights_place, save.weights), (average_place, save.average)):
        key, _, prefix = place.partition("/")
        content[key] = content.get(key, {}) | named(prefix, tensors)
    return content


@pytest.mark.parametrize(("weights", "average", "prefix"), PLACES)
def test_keys_and_prefixes_say_which_set_is_the_average(weights, average, prefix, tmp_path):
    last = saves()[-1]
    file = tmp_path / "last.pt"
    torch.save(at_places(last, weights, average), file)
    check_export(file, named(prefix, last.average), named(prefix, last.weights))


FOLDERS = {
    "guided-diffusion": ("ema_0.95_{:06}.pt", "model{:06}.pt"),
    "target networks": ("target_model_{}.pt", "model_{}.pt"),
    "two files of a folder": ("{:07}/ema.safetensors", "{:07}/model.safetensors"),
    "a folder next to a file": ("{:07}/ema/model.safetensors", "{:07}/model.safetensors"),
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
        torch.save(OPTIMIZER, tmp_path / f"opt{save.step:06}.pt")
    last = saves()[-1]
    check_last(tmp_path)
    top, *_ = average.format(last.step).split("/")
    assert_equal(exported(tmp_path / top), last.average)


@pytest.mark.parametrize("place", ["*/step{}.pt", "**/step{}.pt"])
@pytest.mark.parametrize("folder", ["ema", "teacher"])
def test_the_name_of_a_folder_of_files_says_that_they_are_averages(folder, place, tmp_path):
    weights = tmp_path
    if place.startswith("*/"):
        weights = tmp_path / "student"
    averages = tmp_path / folder
    for save in saves():
        name = f"step{save.step}.pt"
        store(weights / name, {"model": save.weights})
        store(averages / name, {"model": save.average})
    check_last(tmp_path / place.format("*"))
    made = exported(averages / name)
    assert_equal(made, save.average)
    with pytest.raises(InvalidValueError, match="neither their decay nor weights"):
        _ = Run(averages).sources


def test_the_name_of_an_experiment_does_not_say_it(tmp_path):
    folder = tmp_path / "ema_lr3"
    write_each(folder, "step{save.step}.pt", plain)
    found = {one.holds for one in Run(folder).sources}
    assert found == {"weights"}


def test_one_of_two_decays_in_names_is_chosen(tmp_path):
    for save in saves():
        torch.save(save.weights, tmp_path / f"model{save.step:06}.pt")
        torch.save(save.average, tmp_path / f"ema_0.95_{save.step:06}.pt")
    last = saves()[-1]
    check(tmp_path, last.average, last.weights)
    for save in saves():
        torch.save(saves()[0].weights, tmp_path / f"ema_0.5_{save.step:06}.pt")
    asked = "ema_decay: must be given: the files are of several averages, 0.5 or 0.95"
    with pytest.raises(InvalidValueError, match=asked):
        read(tmp_path)
    check(tmp_path, last.average, last.weights, ema_decay=0.95)


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


def composer(save, model, stored, is_active):
    states = {"parameters_dict": stored, "buffers_dict": {}}
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


def inactive_composer(save):
    return composer(save, save.weights, save.average, False)


def active_composer(save):
    return composer(save, save.average, save.weights, True)


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


def of_lightning(save: Save, **state: torch.Tensor) -> dict[str, Any]:
    return {"state_dict": state, "global_step": save.step, "epoch": save.epoch - 1}


def lit_ema(save):
    state = named("model.diffusion_model.", save.weights)
    for name, value in save.average.items():
        flat = name.replace(".", "")
        state[f"model_ema.diffusion_model{flat}"] = value
    state["model_ema.decay"] = torch.tensor(0.95)
    state["model_ema.num_updates"] = torch.tensor(save.step)
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


def nemo(save):
    optimizer = {
        "opt": OPTIMIZER,
        "ema": tuple(save.average.values()),
        "current_step": save.step,
        "decay": 0.95,
        "every_n_steps": 1,
    }
    return of_lightning(save, **save.weights) | {"optimizer_states": [optimizer]}


PROGRAMS = {
    "audiocraft": Program(
        "checkpoint_{save.epoch}.th", audiocraft, unbiased, 0.95, "", {"steps_per_epoch": EVERY}
    ),
    "OpenFold": Program("{save.epoch}-{save.step}.ckpt", openfold, says=0.95),
    "Composer": Program("ep{save.epoch}-ba{save.step}-rank0.pt", inactive_composer),
    "Composer, active": Program("ep{save.epoch}-ba{save.step}-rank0.pt", active_composer),
    "ACE": Program("ckpt_{save.epoch:04}.tar", ace, ratio, 0.95),
    "LitEma of LDM": Program("step={save.step}.ckpt", lit_ema, ratio, 0.95, "diffusion_model."),
    "AveragedModel in a module of Lightning": Program("step={save.step}.ckpt", averaged_model),
    "fairseq": Program("checkpoint_{save.epoch}_{save.step}.pt", fairseq),
    "NeMo": Program("model--epoch={save.epoch}-step={save.step}.ckpt", nemo, says=0.95),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_that_is_known_by_its_structure(name, tmp_path):
    program = PROGRAMS[name]
    file = write_each(tmp_path, program.file, program.content, program.decay)
    last = saves(program.decay)[-1]
    average = named(program.prefix, last.average)
    weights = named(program.prefix, last.weights)
    check(tmp_path, average, weights, program.says, **program.settings)
    check_export(file, average, weights)


def plain(save):
    return {"model": save.weights}


WRITERS = {nemo: "torch-ema; Lightning, transformers", ace: "torch-ema; ACE", plain: ""}


@pytest.mark.parametrize("content", WRITERS)
def test_info_names_the_program(content, tmp_path):
    write_each(tmp_path, "step{save.step}.pt", content)
    assert Run(tmp_path).info()["written_by"] == WRITERS[content]


def test_ema_pytorch_in_files_of_its_own(tmp_path):
    """Its object has nothing but the average and counters."""
    for save in saves():
        torch.save({"model": save.weights}, tmp_path / f"model-{save.step}.pt")
        state = named("ema_model.", save.average)
        state |= {"initted": torch.tensor(True), "step": torch.tensor(save.step)}
        torch.save(state, tmp_path / f"ema-{save.step}.pt")
    with pytest.raises(InvalidValueError, match=r"update_every: must be given: ema-\d+.pt"):
        read(tmp_path, ema_decay=0.95)
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
    run = Run(tmp_path)
    assert [one.t for one in run.sources] == all_steps()
    assert run.info()["written_by"] == "Megatron and others"


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

    file = write_each(tmp_path, "ep0-ba{save.step}-rank0.pt", content)
    last = saves()[-1]
    average = last.average | averaged
    weights = last.weights | buffers
    check(tmp_path, average, weights, None, step_from=r"ba(\d+)")
    check_export(file, average, weights)


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
    found = read(tmp_path).checkpoints
    averaged = [one for one in found if isinstance(one.profile, OrdinaryEMA)]
    assert [one.t for one in averaged] == all_steps()
    assert averaged[-1].decay == 0.9999
    average = halved(last.average)
    assert_equal(exported(file), average)
    if has_model:
        weights = halved(last.weights)
        check(tmp_path, average, weights, 0.9999)
        check_export(file, average, weights)


def test_counts_of_torchvision_begin_after_its_warm_up(tmp_path):
    """It sets them back to 0 until the learning rate has risen."""
    for save in saves()[5:]:
        average = named("module.", save.average)
        average["n_averaged"] = torch.tensor((save.epoch - 5) * EVERY)
        epoch = save.epoch - 1
        content = {"model": save.weights, "model_ema": average, "epoch": epoch}
        torch.save(content, tmp_path / f"model_{epoch}.pth")
    settings = {"ema_decay": 0.95, "ema_warmup": "none", "first_epoch": 0}
    with pytest.raises(InvalidValueError, match=r"steps_per_epoch: must be .* since epoch 5"):
        read(tmp_path, **settings)
    settings |= {"steps_per_epoch": EVERY, "update_every": 1}
    found = read(tmp_path, **settings).checkpoints
    assert {one.t for one in found} == {*all_steps()[5:]}


@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_tied_parameters_have_one_average(kept, tmp_path):
    """An EMA of `named_parameters()` has one of the two names; both get the average."""

    def content(save):
        average = dict(save.average)
        average[kept] = average.pop("head.weight")
        return {"model": tied(save.weights), "ema": average}

    def tied(tensors):
        return tensors | {"embed.weight": tensors["head.weight"]}

    file = write_each(tmp_path, "step{save.step}.pt", content)
    last = saves()[-1]
    average = tied(last.average)
    weights = tied(last.weights)
    check(tmp_path, average, weights, None)
    check_export(file, average, weights)


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


def test_ema_pytorch_in_a_module_of_lightning(tmp_path):
    def save(step, net, average):
        state = named("diffusion.model.", net.state_dict())
        state |= named("diffusion_ema.", average.state_dict())
        state["diffusion.text.weight"] = torch.ones(9, 9)
        content = {"state_dict": state, "global_step": step, "epoch": 0}
        torch.save(content, tmp_path / f"epoch=0-step={step}.ckpt")

    averaged, weights = by_ema_pytorch(True, save)
    check(tmp_path, averaged, weights, **OF_EMA_PYTORCH, weights="diffusion.model")
    file = tmp_path / "epoch=0-step=400.ckpt"
    assert_equal(exported(file), averaged)


def test_ema_pytorch_in_a_list_of_imagen(tmp_path):
    def save(step, net, average):
        content = {
            "model": named("unets.0.", net.state_dict()),
            "version": "1.26",
            "steps": torch.tensor([step]),
            "optim0": OPTIMIZER,
            "ema": torch.nn.ModuleList([average]).state_dict(),
        }
        torch.save(content, tmp_path / f"checkpoint.{step}.pt")

    averaged, weights = by_ema_pytorch(False, save)
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


@pytest.mark.parametrize("count", [1, 2])
def test_a_list_that_fits_two_weights_about_equally_is_refused(count, tmp_path):
    """Two averages fit them in either order."""
    file = tmp_path / "step5.pt"
    first, second, third = torch.randn(3, 50)
    averages = [(first + second) / 2] * count
    model = {"a": first, "b": second, "c": third}
    torch.save({"model": model, "ema": torch_ema(5, *averages)}, file)
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
