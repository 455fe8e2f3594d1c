"""Questions about times and models: they are about the series of a training, and what a paste reads
are the weights of the right steps."""

import hashlib
import math
import shlex
import shutil

import pytest
import torch
from checkpoint_layouts import distributed
from safetensors.torch import load_file, save_file
from saved import (
    all_steps,
    asked,
    assert_equal,
    check_error,
    named,
    read,
    store,
    values_of,
    write_each,
)
from walks import saves

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import DirectoryError, UnsuitableError

FIRST, *_, LAST = saves()
NAMES = [*LAST.weights]


def paste(place, question=None):
    """Paste what an import asks for, and check that it reads the weights of each step."""
    line = (question or asked(place)).partition("paste: ")[2]
    program, command, named, option, pattern, *_ = shlex.split(line)
    assert (program, command, named, option) == ("ema", "import", str(place), "--step-from")
    found = read(place, step_from=pattern)
    check_steps(found.checkpoints)
    return found


def check_steps(checkpoints):
    """Check that there are the weights of each save, at its step."""
    assert [one.t for one in checkpoints] == all_steps()
    for source, save in zip(checkpoints, saves(), strict=True):
        assert_equal(values_of(source), save.weights)


def write_all(place, name, extras):
    """Write all saves, and other files: the base model, or a copy of the last save."""
    for save in saves():
        store(place / name.format(save=save), save.weights)
    for extra, save in extras.items():
        store(place / extra, save.weights)


IN_NAMES = {
    "RVC": ("voice_e{save.epoch}_s{save.step}.pth", {"voice.pth": LAST}),
    "GPT-SoVITS": ("xxx_e{save.epoch}_s{save.step}.pth", {"s2G.pth": FIRST}),
    "EveryDream": ("proj-ep00-gs{save.step:05}.pt", {"last-proj-ep00-gs00400.pt": LAST}),
    "pix2pix": ("{save.epoch}_{save.step}_net_G.pth", {"latest_net_G.pth": LAST}),
    "Composer": ("ep0-ba{save.step}-rank0.pt", {"latest-rank0.pt": LAST}),
    "phases": ("phase{save.epoch}x{save.step}.pt", {"final.pt": LAST, "v2.pt": FIRST}),
    "in folders": ("ep0-ba{save.step}/weights.pt", {"init/weights.pt": FIRST}),
    "hours": ("at_{save.epoch}h_u{save.step}.safetensors", {"a_base.safetensors": FIRST}),
}


@pytest.mark.parametrize("program", IN_NAMES)
def test_a_question_is_about_the_series_and_no_copy_or_file_beside_it(program, tmp_path):
    """`s2G.pth` was the file in question, and 1 of 21 files what the paste took."""
    name, extras = IN_NAMES[program]
    write_all(tmp_path, name, extras)
    found = paste(tmp_path)
    (left_out,) = [note for note in found.sources.notes if note.startswith("left out")]
    for extra in extras:
        assert extra.partition("/")[0] in left_out


def test_a_question_is_about_folders_of_two_numbers(tmp_path):
    for save in saves():
        distributed(tmp_path / f"ep0-ba{save.step}", save.weights)
    paste(tmp_path)


# --- what a pattern may read


def test_digits_of_the_users_own_path_are_no_times(tmp_path):
    """`w.jdD3/runs` was read by the pattern of its 3."""
    place = tmp_path / "w.jdD3" / "runs"
    place.mkdir(parents=True)
    save_file(LAST.weights, place / "model.safetensors")
    assert "paste" not in asked(place)


def test_a_number_of_few_files_is_no_pattern(tmp_path):
    for save in saves():
        name = "".join("abcdefghij"[int(digit)] for digit in f"{save.step:04}")
        store(tmp_path / name / "weights.pt", save.weights)
    store(tmp_path / "k9" / "weights.pt", FIRST.weights)
    assert "paste" not in asked(tmp_path)


def hub_cache(place, references):
    """Write the cache of a hub: revisions by their hashes, whose files are links."""
    for save in saves():
        revision = hashlib.sha1(bytes([save.epoch])).hexdigest()
        blob = place / "blobs" / hashlib.sha256(bytes([save.epoch])).hexdigest()
        file = place / "snapshots" / revision / "model.safetensors"
        blob.parent.mkdir(parents=True, exist_ok=True)
        file.parent.mkdir(parents=True)
        save_file(save.weights, blob)
        file.symlink_to(blob)
        for reference in references:
            named = place / "refs" / reference.format(save=save)
            named.parent.mkdir(exist_ok=True)
            named.write_text(revision)


@pytest.mark.parametrize("below", ["", "snapshots"])
@pytest.mark.parametrize(
    "references", [["step{save.step}"], ["main", "v{save.epoch}-step{save.step}"]]
)
def test_references_of_a_hubs_cache_are_the_times(below, references, tmp_path):
    """A pattern of a hash was proposed, which read 1 of 40 files."""
    place = tmp_path / "models--org--net"
    hub_cache(place, references)
    check_steps(read(place / below).checkpoints)


def test_hashes_of_a_hubs_cache_are_no_times(tmp_path):
    hub_cache(tmp_path / "models--org--net", [])
    assert "paste" not in asked(tmp_path)


# --- several models

TWO_MODELS = {
    "HiFi-GAN": ("g_{:08}", "do_{:08}"),
    "VITS": ("G_{}.pth", "D_{}.pth"),
    "ESRGAN": ("net_g_{}.pth", "net_d_{}.pth"),
    "pix2pix": ("{}_net_G.pth", "{}_net_D.pth"),
    "actor and critic": ("actor_{}.pt", "critic_{}.pt"),
    "in folders": ("generator/step_{}.pt", "discriminator/step_{}.pt"),
}


def of_discriminator(save):
    """Make a larger model, with the state of its optimizer."""
    weight = torch.full((99, 9), float(save.step))
    return {"disc.weight": weight, "optimizer": {"m": torch.zeros(99, 9)}}


def write_models(place, *models):
    """Write files of models, by their names and what they hold."""
    for save in saves():
        for name, content in models:
            store(place / name.format(save.step), content(save))


def lines_to_paste(place, caplog):
    """Return the globs in all commands that are proposed, the one of the error first."""
    with caplog.at_level("INFO"):
        lines = [asked(place), *caplog.messages]
    words = [shlex.split(line.partition("paste: ")[2]) for line in lines if "paste: " in line]
    outs = [one[-1] for one in words]
    assert len({*outs}) == len(outs)
    return [one[2] for one in words]


@pytest.mark.parametrize("program", TWO_MODELS)
def test_two_models_are_two_lines_and_no_discriminator_is_first(program, tmp_path, caplog):
    """The larger file was proposed alone, of a discriminator with its optimizer."""
    ours, theirs = TWO_MODELS[program]
    write_models(tmp_path, (ours, lambda save: save.weights), (theirs, of_discriminator))
    first, other = lines_to_paste(tmp_path, caplog)
    check_steps(read(first).checkpoints)
    for checkpoint, save in zip(read(other).checkpoints, saves(), strict=True):
        (value,) = values_of(checkpoint).values()
        assert bool((value == save.step).all())


def test_models_come_before_times_that_contents_contradict(tmp_path, caplog):
    """VITS stores the epoch as `iteration`: the question about it named the discriminator first."""
    for epoch, save in enumerate(saves(), 1):
        for name, tensors in (("G", save.weights), ("D", of_discriminator(save))):
            content = {"model": tensors, "iteration": epoch, "learning_rate": 2e-4}
            store(tmp_path / f"{name}_{save.step}.pth", content)
    first, other = lines_to_paste(tmp_path, caplog)
    assert [first, other] == [f"{tmp_path}/{name}_*.pth" for name in "GD"]
    words = shlex.split(asked(first).partition("paste: ")[2])
    assert words[3:5] == ["--step-from", r"G_(\d+)\.pth$"]
    check_steps(read(first, step_from=words[4]).checkpoints)


@pytest.mark.parametrize("form", ["flat", "torch's"])
def test_files_with_the_state_of_an_optimizer_alone_are_no_model(form, tmp_path):
    """Whatever they are called, such as PhysicsNeMo's `checkpoint.0.10.pt`: they were a second
    model, to choose between."""
    for save in saves():
        moments = {name: torch.full_like(value, save.step) for name, value in save.weights.items()}
        content = {f"{name}.exp_avg": value for name, value in moments.items()}
        if form != "flat":
            state = {number: {"exp_avg": value} for number, value in enumerate(moments.values())}
            content = {"adam": {"state": state, "param_groups": [{"lr": 1.0}]}}
        store(tmp_path / f"net_{save.step}.pt", save.weights)
        store(tmp_path / f"run_{save.step}.pt", content)
    check_steps(read(tmp_path).checkpoints)


def test_a_discriminator_with_more_files_is_not_chosen(tmp_path, caplog):
    write_models(tmp_path, ("D_{}.pth", of_discriminator))
    for save in saves()[-3:]:
        store(tmp_path / f"G_{save.step}.pth", save.weights)
    first, _ = lines_to_paste(tmp_path, caplog)
    assert first == f"{tmp_path}/G_*.pth"


def test_two_generators_and_two_discriminators_are_four_lines(tmp_path, caplog):
    """Of CycleGAN: one of each was named."""
    models = {"G_A": 1, "G_B": -1, "D_A": 0, "D_B": 0}
    for save in saves():
        for name, sign in models.items():
            generator = {key: sign * value for key, value in save.weights.items()}
            content = generator if sign else of_discriminator(save)
            store(tmp_path / f"{save.step}_net_{name}.pth", content)
    globs = lines_to_paste(tmp_path, caplog)
    assert globs == [f"{tmp_path}/*_net_{name}.pth" for name in models]


@pytest.mark.parametrize("names", ["critic_{}.pt policy_{}.pt", "d_{}.pt e_{}.pt"])
def test_a_critic_of_the_same_shapes_is_not_proposed_first(names, tmp_path):
    theirs, ours = names.split()
    contents = [(theirs, lambda save: negative(save.weights)), (ours, lambda save: save.weights)]
    write_models(tmp_path, *contents)
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    check_steps(read(words[2]).checkpoints)


def test_of_other_models_the_one_with_more_parameters_is_first(tmp_path, caplog):
    """Bytes of an optimizer's state made the smaller one the first."""

    def small(save):
        state = {"m": torch.zeros(99, 99)}
        return {"model": {"a.weight": torch.full((2, 2), save.step)}, "optimizer": state}

    models = [("aux_{}.pt", small), ("net_{}.pt", lambda save: save.weights)]
    three = [*models, ("pre_{}.pt", lambda save: {"b.weight": torch.full((3, 2), save.step)})]
    write_models(tmp_path, *three)
    globs = lines_to_paste(tmp_path, caplog)
    assert globs == [f"{tmp_path}/{name}_*.pt" for name in ("net", "pre", "aux")]


# --- parts whose names carry the time of their folder

BODY = ("body.0.weight", "body.0.bias")


def split(tensors):
    """Split a model in two parts, by the names of their tensors."""
    first = {name: value for name, value in tensors.items() if name in BODY}
    return first, {name: value for name, value in tensors.items() if name not in first}


PARTS_OF_TIMES = {
    "OpenVLA-OFT": (
        "lora-r32+8_acts--{save.step}_chkpt",
        ("lora_adapter/adapter_model.safetensors", "action_head--{save.step}_checkpoint.pt"),
    ),
    "unet and encoder": ("checkpoint-{save.step}", ("unet_{save.step}.pt", "enc_{save.step}.pt")),
    "folders": ("iter{save.step}", ("a-{save.step}/model.safetensors", "b-{save.step}/w.pt")),
    "padded": ("{save.step:06}", ("{save.step}_actor.pt", "{save.step}_rest.pt")),
    "epochs": ("v_{save.epoch}", ("first.{save.epoch}.pt", "second.{save.epoch}.pt")),
    "one of them": ("out_{save.step}", ("model.safetensors", "head_{save.step}.safetensors")),
}


@pytest.mark.parametrize("program", PARTS_OF_TIMES)
def test_the_number_of_a_folder_in_names_of_parts_is_their_time(program, tmp_path):
    """The parent was taken for one checkpoint of all tensors of all times."""
    folder, parts = PARTS_OF_TIMES[program]
    for save in saves():
        for name, part in zip(parts, split(save.weights), strict=True):
            store(tmp_path / "run" / folder.format(save=save) / name.format(save=save), part)
    found = read(tmp_path / "run")
    if program == "epochs":
        assert [one.t for one in found.checkpoints] == [save.epoch for save in saves()]
    else:
        check_steps(found.checkpoints)
    like = tmp_path / "run" / folder.format(save=LAST)
    out = tmp_path / "out"
    exact = Run(tmp_path / "run").average(0.1)
    Run(tmp_path / "run").write(0.1, out, like=like)
    copied = {}
    for name in parts:
        file = out / name.format(save=LAST)
        copied |= load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    assert_equal(copied, exact)


@pytest.mark.parametrize("parts", [("a_{}.pt", "b_{}.pt"), ("{}.a.pt", "{}.b.pt")])
def test_parts_of_equal_names_have_no_time_in_their_keys(parts, tmp_path):
    for save in saves():
        for sign, name in zip((1, -1), parts, strict=True):
            content = {key: sign * value for key, value in save.weights.items()}
            store(tmp_path / f"step_{save.step:05}" / name.format(save.step), content)
    for source, save in zip(read(tmp_path).checkpoints, saves(), strict=True):
        assert source.t == save.step
        expected = named("a.", save.weights)
        expected |= named("b.", {name: -value for name, value in save.weights.items()})
        assert_equal(values_of(source), expected)


@pytest.mark.parametrize("part", ["2_Dense", "layer_{}"])
def test_other_numbers_in_names_of_parts_stay(part, tmp_path):
    """The number of sentence-transformers' module is no time in `checkpoint-2`, either."""
    for save in saves():
        body, head = split(save.weights)
        folder = tmp_path / f"checkpoint-{save.epoch}"
        if "{}" in part:
            weight = save.weights[BODY[0]]
            for layer, value in enumerate((weight, -weight, weight.flip(0)), 1):
                store(folder / f"layer_{layer}.pt", {"w.weight": value})
        else:
            store(folder / "model.safetensors", {"w.weight": body[BODY[0]]})
            store(folder / part / "model.safetensors", {"w.weight": head["head.weight"]})
    keys = [sorted(source.stored) for source in read(tmp_path).checkpoints]
    assert len(keys) == len(saves())
    assert all(names == keys[0] for names in keys)
    assert any("2" in name for name in keys[0])


# --- numbers inside that contradict names

SLOTS = {
    "Makani": "ckpt_mp0_v{slot}.tar",
    "v": "ckpt_v{slot}.pt",
    "slot": "slot{slot}.pt",
    "ckpt": "ckpt_{slot:03}.pth",
    "folders": "{slot:04}/state.pt",
    "tens": "keep-{slot}0.pt",
    "step": "ckpt_step{slot}.pt",
}
CALLED_TIMES = {"iter": "net24_iter_{slot}.pth", "epoch": "epoch_{slot}.pt", **SLOTS}


def write_ring(place, name, content, moved=4):
    """Write the saves into slots in turn, of which so many are written anew."""
    for number, save in enumerate(saves()):
        store(place / name.format(slot=(number + moved) % 10), content(save))


@pytest.mark.parametrize("program", CALLED_TIMES)
@pytest.mark.parametrize("moved", [1, 4, 9])
def test_slots_that_are_written_in_turn_have_the_epochs_inside(program, moved, tmp_path):
    """They were read as the times 1 to 10, in the wrong order."""

    def content(save):
        return {"model": save.weights, "epoch": save.epoch}

    write_ring(tmp_path, CALLED_TIMES[program], content, moved)
    check_steps(read(tmp_path, steps_per_epoch=40).checkpoints)


@pytest.mark.parametrize("program", SLOTS)
@pytest.mark.parametrize("moved", [1, 4, 9])
def test_slots_with_no_time_inside_are_asked_about(program, moved, tmp_path):
    """They were epochs that follow each other, in the wrong order."""
    write_ring(tmp_path, SLOTS[program], lambda save: {"model": save.weights}, moved)
    said = asked(tmp_path)
    assert "slots that are written in turn" in said
    words = shlex.split(said.partition("paste: ")[2])
    given = read(tmp_path, step_from=words[4])  # which the user may know better
    assert any("slots that are written in turn" in note for note in given.sources.notes)
    found = given.checkpoints
    order = [(number - moved) % 10 for number in range(1, 10)]
    for source, place in zip(found[-9:], order, strict=True):  # the number 0 may be the start
        assert_equal(values_of(source), saves()[place].weights)


def test_slots_with_an_average_beside_the_weights_are_asked_about(tmp_path):
    both = "net_v{slot}.pt"
    write_ring(tmp_path, both, lambda save: {"model": save.weights, "ema": save.average})
    assert "slots that are written in turn" in asked(tmp_path)


@pytest.mark.parametrize("program", CALLED_TIMES)
@pytest.mark.parametrize("key", ["iters", "iter"])
def test_slots_have_the_steps_inside(key, program, tmp_path):
    def content(save):
        return {"model_state": save.weights, "epoch": save.epoch, key: save.step}

    write_ring(tmp_path, CALLED_TIMES[program], content)
    check_steps(read(tmp_path).checkpoints)


def test_a_number_of_no_unit_in_names_is_no_time_beside_epochs_of_another_order(tmp_path):
    """Too few values to tell which order is theirs."""
    for slot, epoch in enumerate((19, 20, 13, 16)):
        store(
            tmp_path / f"ckpt_{slot}.pt", {"model": torch.full((3,), 1.0 * epoch), "epoch": epoch}
        )
    assert [one.t for one in read(tmp_path).checkpoints] == [13, 16, 19, 20]


@pytest.mark.parametrize("name", ["ckpt_step{}.pt", "epoch_{}.pt"])
def test_names_and_contents_of_other_orders_are_asked_about_if_values_show_none(name, tmp_path):
    for slot, epoch in enumerate((19, 20, 13, 16)):
        weights = torch.full((3,), 1.0 * epoch)
        store(tmp_path / name.format(slot), {"model": weights, "epoch": epoch})
    question = asked(tmp_path)
    assert f"'epoch' in the contents is 19 in {name.format(0)}, whose name says 0" in question
    assert "paste: ema import" in question


COUNTED_ANEW = [
    ("step_{save.step}.pth", "step", lambda save: save.step - 190 * (save.epoch > 5)),
    ("step_{save.step}.pth", "epoch", lambda save: (save.epoch + 5) % 10 + 1),
    ("net_{save.step}.pth", "epoch", lambda save: (save.epoch + 5) % 10 + 1),
    ("at{save.step}steps/net.pth", "epoch", lambda save: (save.epoch + 5) % 10 + 1),
]


@pytest.mark.parametrize(("name", "key", "count"), COUNTED_ANEW)
def test_what_is_counted_anew_after_a_resume_is_no_time(name, key, count, tmp_path):
    """The values follow each other in the order of names."""
    counts = [count(save) for save in saves()]
    assert len({*counts}) == len(counts) and counts != sorted(counts)
    write_each(tmp_path, name, lambda save: {"model": save.weights, key: count(save)})
    check_steps(read(tmp_path).checkpoints)


UNEVEN = [2, 3, 5, 9, 14, 15, 20, 22, 30, 31]


@pytest.mark.parametrize("name", ["best_{}.pth", "ckpt_step{}.pt", "epoch_{}.pth"])
@pytest.mark.parametrize("epochs", [UNEVEN, [*range(13, 23)]])
def test_epochs_inside_that_are_ahead_of_names_are_the_times(name, epochs, tmp_path):
    """The numbers of files were read as their epochs, or as single steps."""
    for number, (epoch, save) in enumerate(zip(epochs, saves(), strict=True), 1):
        store(tmp_path / name.format(number), {"model": save.weights, "epoch": epoch})
    assert [one.t for one in read(tmp_path).checkpoints] == epochs


@pytest.mark.parametrize("name", ["epoch_{}.pth", "model_{}.pth"])
def test_epochs_inside_that_are_behind_names_are_asked_about(name, tmp_path):
    for number, save in enumerate(saves()):
        store(tmp_path / name.format(20 + number), {"model": save.weights, "epoch": number})
    question = asked(tmp_path)
    assert f"'epoch' in the contents is 0 in {name.format(20)}, whose name says 20" in question
    words = shlex.split(question.partition("paste: ")[2])
    found = read(tmp_path, step_from=words[4])
    assert [one.t for one in found.checkpoints] == [*range(20, 30)]


@pytest.mark.parametrize("name", ["lit_{}.pth", "iter-{}-ckpt.pth"])
def test_steps_of_the_optimizer_count_and_no_microbatches(name, tmp_path):
    """LitGPT counts both; TinyLlama names its files by microbatches."""
    for save in saves():
        count = 8 * save.step
        content = {"model": save.weights, "iter_num": count, "step_count": save.step}
        store(tmp_path / name.format(save.epoch if "lit" in name else count), content)
    check_steps(read(tmp_path).checkpoints)


def test_steps_in_names_beside_epochs_that_begin_anew_stay_the_times(tmp_path):
    """A resume may count its epochs from 1 again: they do not tell the files apart."""
    write_each(
        tmp_path,
        "net_{save.step}.pt",
        lambda save: {"model": save.weights, "epoch": save.epoch % 4},
    )
    check_steps(read(tmp_path).checkpoints)


# --- words that call a part of the model an average


def negative(tensors):
    return {name: -value for name, value in tensors.items()}


PARTS = [("encoder", "target_encoder"), ("full", "swa"), ("net", "net_avg"), ("a", "momentum_a")]


@pytest.mark.parametrize("form", ["keys", "prefixes", "files"])
@pytest.mark.parametrize(("part", "other"), PARTS)
def test_a_part_that_a_word_calls_an_average_is_averaged_with_the_model(
    part, other, form, tmp_path
):
    """The line that was proposed took half of the model."""
    for save in saves():
        sets = {part: save.weights, other: negative(save.weights)}
        flat = named(f"{part}.", sets[part]) | named(f"{other}.", sets[other])
        if form == "keys":
            store(tmp_path / f"step{save.step}.pt", sets)
        elif form == "prefixes":
            store(tmp_path / f"step{save.step}.pt", {"state_dict": flat})
        else:
            for key, tensors in sets.items():
                store(tmp_path / f"step{save.step}" / f"{key}.pt", tensors)
    assert asked(tmp_path).endswith(f"ema import {tmp_path} --from checkpoints --out run")
    for source, save in zip(read(tmp_path, kind="checkpoints").checkpoints, saves(), strict=True):
        expected = named(f"{part}.", save.weights)
        assert_equal(values_of(source), expected | named(f"{other}.", negative(save.weights)))


def test_a_network_of_other_names_is_a_part_beside_the_model(tmp_path):
    def teacher(save):
        return {"t.weight": torch.full((3, 2), float(save.step))}

    write_each(
        tmp_path,
        "step{save.step}.pt",
        lambda save: {"model": save.weights, "teacher": teacher(save)},
    )
    assert asked(tmp_path).endswith("--from checkpoints --out run")
    for source, save in zip(read(tmp_path, kind="checkpoints").checkpoints, saves(), strict=True):
        assert_equal(values_of(source), save.weights | named("teacher.", teacher(save)))


@pytest.mark.parametrize("key", ["ema", "target_model"])
def test_a_real_average_is_no_part_of_the_weights_alone(key, tmp_path):
    write_each(
        tmp_path, "step{save.step}.pt", lambda save: {"model": save.weights, key: save.average}
    )
    check_steps(read(tmp_path, kind="checkpoints").checkpoints)


MOMENTS = {
    "beside": lambda tensors: {"exp_avg": tensors, "exp_avg_sq": tensors},
    "within": lambda tensors: {"first": {"exp_avg": tensors}},
    "each": lambda tensors: {"s": {name: {"exp_avg": value} for name, value in tensors.items()}},
    "flat": lambda tensors: named("exp_avg.", tensors),
    "last": lambda tensors: {f"s.{name}.exp_avg": value for name, value in tensors.items()},
    "of SGD": lambda tensors: {"buffers": {"momentum_buffer": tensors}},
}


@pytest.mark.parametrize("form", MOMENTS)
def test_averages_of_gradients_are_no_average_of_weights(form, tmp_path, caplog):
    """Adam's were offered as the average, and by no other name."""

    def content(save):
        return {"model": save.weights, **MOMENTS[form](save.average)}

    write_each(tmp_path, "step{save.step}.pt", content)
    check_steps(read(tmp_path).checkpoints)
    assert "not used" not in caplog.text


# --- what is not used, without a doubt

STATISTICS = {"mean": torch.ones(8), "std": torch.full((8,), 2.0)}


def lerobot(folder, save):
    store(folder / "pretrained_model" / "model.safetensors", save.weights)
    for name in ("preprocessor_step_3_normalizer", "postprocessor_step_0_unnormalizer"):
        store(folder / "pretrained_model" / f"policy_{name}.safetensors", STATISTICS)


def in_a_key(folder, save):
    store(folder / "w.pt", {"model": save.weights, "normalizer": STATISTICS})


def a_loss(folder, save):
    content = {"model": save.weights, "loss_state": {"perceptual": {"w": torch.eye(3)}}}
    store(folder / "w.pt", content)


def a_featurizer(folder, save):
    content = {"state_dict": save.weights, "preprocessor": {"window": torch.hann_window(9)}}
    store(folder / "w.ckpt", content)


def latents(folder, save):
    store(folder / "model.safetensors", save.weights)
    store(folder / "embedding_stats.safetensors", {"centre": torch.arange(5.0)})


@pytest.mark.parametrize("write", [lerobot, in_a_key, a_loss, a_featurizer, latents])
def test_what_never_changes_is_a_note_and_no_warning(write, tmp_path, ema):
    """Every command warned of a policy's normalizers, and failed under `--strict`."""
    for save in saves():
        write(tmp_path / "run" / f"{save.step:06}", save)
    found = read(tmp_path / "run")
    assert found.sources.notes == ()
    check_steps(found.checkpoints)
    done = ema("import", tmp_path / "run", "--out", tmp_path / "made", "--strict")
    assert done.code == 0
    assert "not used, as it never changes" in done.shown


CHANGING = {
    "Makani's loss": ("model_state", "loss_state_dict", ["running_var"]),
    "observations": ("model", "obs_rms", ["mean", "var"]),
    "normalizer": ("policy", "normalizer", ["x.running_mean", "x.running_var"]),
    "quantiles": ("state_dict", "data_stats", ["action.q01", "action.q99", "action.std"]),
    "extremes": ("net", "limits", ["a.min", "a.max"]),
}


@pytest.mark.parametrize("program", CHANGING)
def test_statistics_of_the_data_are_a_note_and_no_warning(program, tmp_path, ema):
    """Those that go on changing were "not used" in a warning of every command."""
    model, key, names = CHANGING[program]
    for save in saves():
        statistics = {name: torch.full((5, 1), float(save.step)) for name in names}
        store(tmp_path / "run" / f"s{save.step}.pt", {model: save.weights, key: statistics})
    done = ema("import", tmp_path / "run", "--out", tmp_path / "made", "--strict")
    assert done.code == 0
    assert f"not used, as statistics of the data: '{key}'" in done.shown
    check_steps(Run(tmp_path / "made").sources)


def test_the_model_that_a_library_keeps_beside_its_average_is_a_note(tmp_path):
    """F5-TTS saves ema-pytorch's `online_model`, too."""
    for save in saves():
        held = named("ema_model.", save.average) | named("online_model.", save.weights)
        content = {"model_state_dict": save.weights, "ema_model_state_dict": held}
        store(tmp_path / f"model_{save.step}.pt", content)
    found = read(tmp_path, ema_decay=0.95)
    assert found.counts == {"EMA of decay 0.95": 10, "weights": 10}
    assert found.sources.notes == ()
    assert "a copy of the weights: 'ema_model_state_dict.online_model'" in found.sources.notices[0]


@pytest.mark.parametrize("name", ["consolidated", "hf/export", "best"])
def test_a_copy_in_another_format_is_a_note_and_no_warning(name, tmp_path):
    for save in saves():
        distributed(tmp_path / f"step_{save.step}" / "model", save.weights)
        store(tmp_path / f"step_{save.step}" / name / "model.safetensors", save.weights)
    found = read(tmp_path)
    check_steps(found.checkpoints)
    assert found.sources.notes == ()
    assert "not used, as a copy of the weights" in found.sources.notices[0]


def test_what_equals_the_weights_once_is_a_warning(tmp_path):
    for save in saves():
        other = save.weights if save is FIRST else negative(save.weights)
        content = {"model": save.weights, "old": other}
        store(tmp_path / f"step_{save.step}.pt", content)
    (note,) = read(tmp_path).sources.notes
    assert "'old', not used" in note


def test_what_changes_and_is_not_used_is_a_warning(tmp_path):
    for save in saves():
        changing = {"model": save.weights, "loss_state": {"w": torch.full((3,), save.step)}}
        store(tmp_path / f"step{save.step}.pt", changing)
    (note,) = read(tmp_path).sources.notes
    assert "'loss_state', not used" in note


# --- refusals with a way out


@pytest.mark.parametrize("every", [1, 40, 100])
@pytest.mark.parametrize("name", ["Net.0.{}.pt", "fno.1.{}.pth", "state-2.{}.pt"])
def test_numbers_behind_a_point_that_count_are_proposed_as_times(name, every, tmp_path):
    """PhysicsNeMo names files by the rank and the epoch, which look like decimals."""
    for number, save in enumerate(saves(), 1):
        store(tmp_path / name.format(number * every), save.weights)
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    found = read(tmp_path, step_from=words[4]).checkpoints
    assert [one.t for one in found] == [number * every for number in range(1, 11)]
    for source, save in zip(found, saves(), strict=True):
        assert_equal(values_of(source), save.weights)


@pytest.mark.parametrize("digits", [1, 2, 3])
def test_a_metric_is_not_proposed_as_a_time(digits, tmp_path):
    for number, save in enumerate(saves()):
        store(tmp_path / f"net_{0.91 + number / 200:.{digits + 2}f}.pt", save.weights)
    assert "paste" not in asked(tmp_path)


FOREIGN = {
    "Orbax": ("{}/default/manifest.ocdbt", b"\x0c\xdb"),
    "PhysicsNeMo": ("Net.0.{}.mdlus", b"PK\x03\x04"),
    "Paddle": ("epoch_{}/model.pdparams", b"\x80\x04"),
    "NeMo": ("a/step{}.nemo", b"./"),
    "llama.cpp": ("{}/model.gguf", b"GGUF"),
}


@pytest.mark.parametrize("program", FOREIGN)
def test_files_of_other_frameworks_are_named_in_folders_too(program, tmp_path):
    name, begin = FOREIGN[program]
    for number in (100, 200):
        file = tmp_path / name.format(number)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(begin + bytes(64))
    for open_files in (read, lambda place: Run(place).info()):
        with pytest.raises(UnsuitableError, match=rf"cannot be read \({program}\)"):
            open_files(tmp_path)


def test_a_model_of_another_framework_beside_the_state_of_a_training_is_named(tmp_path):
    """Of PhysicsNeMo: the states alone were named, which hold no weights."""
    for save in saves():
        (tmp_path / f"Net.0.{save.epoch}.mdlus").write_bytes(b"PK\x03\x04" + bytes(64))
        state = {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": [{"lr": 1.0}]}
        content = {"epoch": save.epoch, "optimizer_state_dict": state}
        store(tmp_path / f"checkpoint.0.{save.epoch}.pt", content)
    with pytest.raises(UnsuitableError, match=r"mdlus: .*\(PhysicsNeMo\)"):
        read(tmp_path)


def test_weights_that_state_step_0_are_the_start(tmp_path):
    """`init.pt` was left out, as if nothing said its time."""
    write_each(
        tmp_path, "at-{save.epoch}.pt", lambda save: {"net": save.weights, "step": save.step}
    )
    store(tmp_path / "init.pt", {"net": negative(FIRST.weights), "step": 0})
    found = read(tmp_path)
    check_steps(found.checkpoints)
    (note,) = found.sources.notes
    assert note == "init.pt: left out: it holds the weights before the training, of step 0"


@pytest.mark.parametrize("name", ["init.pt", "model_init.pt", "initial/weights.pt", "net-INIT.pt"])
def test_weights_before_the_first_epoch_shift_no_epoch(name, tmp_path):
    """Their epoch 0 made all others one later."""
    write_each(
        tmp_path, "epoch_{save.epoch}.pt", lambda save: {"net": save.weights, "epoch": save.epoch}
    )
    store(tmp_path / name, {"net": negative(FIRST.weights), "epoch": 0})
    found = read(tmp_path, steps_per_epoch=40)
    check_steps(found.checkpoints)
    (note,) = found.sources.notes
    assert "left out: " in note


# --- parts of a model under a glob


def write_shards(folder, save, numbers=(1, 2)):
    for number, part in zip((1, 2), split(save.weights), strict=True):
        if number in numbers:
            store(folder / f"model-0000{number}-of-00002.safetensors", part)


@pytest.mark.parametrize("named", ["", "step_*", "step_*/"])
@pytest.mark.parametrize("number", [1, 2])
def test_half_of_the_newest_model_is_an_error_also_under_a_glob(named, number, tmp_path):
    """It was left out with a warning."""
    for save in saves()[:-1]:
        write_shards(tmp_path / f"step_{save.step}", save)
    write_shards(tmp_path / f"step_{LAST.step}", LAST, [number])
    with pytest.raises(
        UnsuitableError, match=f"those that are missing have the numbers {3 - number}"
    ):
        read(f"{tmp_path}/{named}")


def test_half_of_the_newest_model_is_an_error_beside_whole_files(tmp_path):
    for save in saves()[:-1]:
        store(tmp_path / f"step_{save.step}" / "model.safetensors", save.weights)
    write_shards(tmp_path / f"step_{LAST.step}", LAST, [2])
    with pytest.raises(UnsuitableError, match="missing"):
        read(tmp_path / "step_*")


def test_numbers_of_shards_are_not_proposed_as_times(tmp_path):
    for save in saves():
        write_shards(tmp_path / f"run{save.step}x", save)
    said = asked(f"{tmp_path}/run40x/*00001*")
    assert "-of-" not in said.partition("paste: ")[2]


# --- named files, by a pattern with braces


@pytest.mark.parametrize(
    ("pattern", "steps"),
    [
        ("step{120,360,400}.pt", [120, 360, 400]),
        ("step{400,120}.pt", [120, 400]),
        ("{step40,step80}.pt", [40, 80]),
        ("step{1,2}{20,40}.pt", [120, 240]),
        ("step{36,4}*.pt", [40, 360, 400]),
        ("{step120.pt,step160.pt}", [120, 160]),
    ],
)
def test_braces_name_files(pattern, steps, tmp_path):
    write_each(tmp_path, "step{save.step}.pt", lambda save: save.weights)
    if pattern == "step{1,2}{20,40}.pt":
        (tmp_path / "step220.pt").symlink_to(tmp_path / "step240.pt")
        (tmp_path / "step140.pt").symlink_to(tmp_path / "step120.pt")
        steps = [120, 140, 220, 240]
    assert [one.t for one in read(tmp_path / pattern).checkpoints] == steps


def test_the_mean_of_named_steps_is_their_mean(tmp_path):
    write_each(tmp_path, "step{save.step}.pt", lambda save: save.weights)
    made = Run(tmp_path / "step{80,200,240}.pt").average("last:3", dtype="float64")
    chosen = [save.weights for save in saves() if save.step in (80, 200, 240)]
    for name, value in made.items():
        mean = sum(weights[name].double() for weights in chosen) / 3
        torch.testing.assert_close(value, mean, rtol=1e-12, atol=1e-12)


def test_a_named_file_that_is_missing_is_an_error(tmp_path):
    write_each(tmp_path, "step{save.step}.pt", lambda save: save.weights)
    with pytest.raises(DirectoryError, match=r"no file or folder matches step77\.pt"):
        read(tmp_path / "step{40,77}.pt")


def test_a_folder_whose_name_has_braces_is_itself(tmp_path):
    place = tmp_path / "{a,b}"
    write_each(place, "step{save.step}.pt", lambda save: save.weights)
    for save in saves()[:5]:
        store(place / "other" / f"step_{save.step}.pt", negative(save.weights))
    words = shlex.split(asked(place).partition("paste: ")[2])
    check_steps(read(words[2]).checkpoints)
    assert "a,b" in words[2]


# --- folds, seeds and members of an ensemble

MEMBERS = {
    "splits": "split_{}.pt",
    "runs": "run{}/best.pt",
    "ensemble": "model_{}.pth",
    "hundreds": "net{}00.safetensors",
    "copies": "run-v{}.ckpt",
}


def write_members(place, name, count, base=0.0):
    """Write models that begin with the same weights, and walk in other directions."""
    for number in range(1, count + 1):
        generator = torch.Generator().manual_seed(number)
        content = {}
        for key, value in FIRST.weights.items():
            content[key] = base * value + torch.randn(value.shape, generator=generator)
        store(place / name.format(number), content)


@pytest.mark.parametrize("program", MEMBERS)
@pytest.mark.parametrize(("count", "base"), [(5, 0.0), (5, 99.0), (3, 9.0), (2, 0.0)])
def test_files_that_are_equally_far_from_each_other_are_no_series(program, count, base, tmp_path):
    """They were epochs that follow each other without a gap."""
    write_members(tmp_path, MEMBERS[program], count, base)
    said = asked(tmp_path)
    assert ("equally far" if count > 2 else "unrelated") in said
    words = shlex.split(said.partition("paste: ")[2])
    found = read(tmp_path, step_from=words[4])
    assert len(found.checkpoints) == count
    assert any("folds, seeds or members" in note for note in found.sources.notes)


NNUNET = "3d_fullres/fold_{}/checkpoint_{}.pth"


def write_folds(place, name, **epochs):
    """Write the best and the last files of five folds, which state their epochs."""
    for fold in range(5):
        generator = torch.Generator().manual_seed(fold)
        start = {key: torch.randn(v.shape, generator=generator) for key, v in FIRST.weights.items()}
        for kind, epoch in epochs.items():
            weights = {}
            for key, value in start.items():
                weights[key] = value + 1e-4 * epoch * torch.randn(value.shape, generator=generator)
            content = {"network_weights": weights, "current_epoch": epoch + 7 * fold}
            store(place / name.format(fold, kind), content)


@pytest.mark.parametrize("name", [NNUNET, "seed{}/{}.pt"])
def test_each_fold_with_several_files_is_a_run_of_its_own(name, tmp_path, caplog):
    """The numbers of the folds were epochs, or times that were proposed."""
    write_folds(tmp_path, name, best=900, final=1000)
    with caplog.at_level("INFO"):
        said = asked(tmp_path)
    assert "each is a run of its own" in said
    lines = [message for message in caplog.messages if "paste: " in message]
    for fold, line in enumerate([said, *lines]):
        words = shlex.split(line.partition("paste: ")[2])
        assert words[2] == str((tmp_path / name.format(fold, "")).parent)
        found = read(words[2])
        assert [one.t for one in found.checkpoints] == [900 + 7 * fold, 1000 + 7 * fold]


@pytest.mark.parametrize("name", [NNUNET, "fold{}_{}.pt", "seed_{}.{}.pt"])
def test_folds_of_one_file_are_refused_with_what_to_name(name, tmp_path):
    write_folds(tmp_path, name, final=1000)
    said = asked(tmp_path)
    assert said.endswith("each is a run of its own; name several checkpoints of one of them")


def test_a_fold_of_all_data_is_another_training(tmp_path):
    """Both were one run, by the epochs in their files."""
    write_folds(tmp_path, "fold_{}/checkpoint_{}.pth", best=900, latest=950)
    for fold in (1, 2, 3):
        shutil.rmtree(tmp_path / f"fold_{fold}")
    (tmp_path / "fold_4").rename(tmp_path / "fold_all")
    said = asked(tmp_path)
    assert "2 x fold_0, 2 x fold_all" in said and "paste: ema import" in said


@pytest.mark.parametrize("name", ["step{2}-fold{0}.ckpt", "seed_{0}_epoch_{1}.pt"])
def test_folds_that_state_their_epochs_are_no_series(name, tmp_path):
    """The best epoch of each was its time."""
    for number, epoch in enumerate((7, 3, 9, 5), 1):
        generator = torch.Generator().manual_seed(number)
        values = {}
        for key, value in FIRST.weights.items():
            values[key] = torch.randn(value.shape, generator=generator)
        content = {"state_dict": values, "epoch": epoch}
        store(tmp_path / name.format(number, epoch, 10 * epoch), content)
    assert "as folds, seeds or members" in asked(tmp_path)


FOLDS = {
    "folders": "cv{}/best.ckpt",
    "two levels": "fold_{}/checkpoints/best.ckpt",
    "files": "net-{}.ckpt",
    "metrics": "split{}_acc=0.{}7.ckpt",
    "runs": "version_{}/last.ckpt",
}


@pytest.mark.parametrize("name", FOLDS.values(), ids=FOLDS)
def test_folds_that_state_their_steps_are_no_series(name, tmp_path):
    """Of each fold the step of its best file was the time."""
    for number, epoch in enumerate((7, 3, 9, 5), 1):
        generator = torch.Generator().manual_seed(number)
        content = {"epoch": epoch, "global_step": 40 * epoch, "state_dict": {}}
        for key, value in FIRST.weights.items():
            content["state_dict"][key] = torch.randn(value.shape, generator=generator)
        store(tmp_path / name.format(number, epoch), content)
    assert "as folds, seeds or members" in asked(tmp_path)


@pytest.mark.parametrize("name", FOLDS.values(), ids=FOLDS)
def test_a_training_whose_names_count_other_things_than_steps_is_a_series(name, tmp_path):
    for save in saves():
        content = {"epoch": save.epoch, "global_step": save.step, "state_dict": save.weights}
        store(tmp_path / name.format(2 * save.epoch, save.epoch), content)
    check_steps(read(tmp_path).checkpoints)


@pytest.mark.parametrize("name", ["step={}-loss={:.2f}.ckpt", "epoch_{}_acc{:.3f}.pt"])
def test_weights_that_only_jitter_are_a_series_if_a_word_says_their_times(name, tmp_path):
    """Late in a training with weight decay all files are equally far; a metric is no fold."""
    for number in range(1, 6):
        generator = torch.Generator().manual_seed(number)
        values = {}
        for key, value in FIRST.weights.items():
            values[key] = torch.randn(value.shape, generator=generator)
        store(tmp_path / name.format(number, 0.9 + number / 200), values)
    assert [one.t for one in read(tmp_path).checkpoints] == [1, 2, 3, 4, 5]


def test_two_folders_of_one_run_that_share_a_file_are_read_by_the_line(tmp_path):
    """The glob that was proposed asked the same again."""
    for save in saves():
        if save.epoch <= 6:
            store(tmp_path / "run1" / f"step_{save.step}.pt", save.weights)
        if save.epoch >= 6:
            store(tmp_path / "run2" / f"step_{save.step}.pt", save.weights)
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    check_steps(read(words[2]).checkpoints)


# --- two files at one time

TWICE = {
    "Lightning": ("epoch={save.epoch}.ckpt", "epoch=10-v1.ckpt"),
    "padded": ("epoch_{save.epoch:02}.pt", "epoch_10_v1.pt"),
    "resumed": ("ep{save.epoch}.pt", "ep10.2.pt"),
    "in folders": ("epoch-{save.epoch}/w.pt", "epoch-10-v2/w.pt"),
    "steps": ("step_{save.step}.pt", "step_400_7.pt"),
    "brackets": ("[a]_epoch{save.epoch}.pt", "[a]_epoch10_1.pt"),
}


@pytest.mark.parametrize("program", TWICE)
def test_two_files_at_one_time_end_in_a_line_that_reads_the_others(program, tmp_path):
    """The glob in the line matched the odd one, too, and asked again."""
    name, odd = TWICE[program]
    write_each(tmp_path, name, lambda save: save.weights)
    store(tmp_path / odd, negative(LAST.weights))
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    found = read(words[2]).checkpoints
    for source, save in zip(found, saves(), strict=True):
        assert source.t in (save.epoch, save.step)
        assert_equal(values_of(source), save.weights)


TWINS = {
    "metrics": ("epoch={save.epoch}-loss={other:.2f}.ckpt", "epoch=10-loss=0.99.ckpt"),
    "zeros": ("net_{save.step}.pt", "net_0400.pt"),
    "commas": ("ep{save.epoch}, loss {other:.3f}.pt", "ep7, loss 1.995.pt"),
    "in brackets": ("[b] it-{save.step} ({other}).pt", "[b] it-40 (3.1).pt"),
}


@pytest.mark.parametrize("program", TWINS)
def test_two_files_of_one_number_end_in_a_line_that_names_the_others(program, tmp_path):
    """The question had no line: no other number in names is a time."""
    name, odd = TWINS[program]
    for save in saves():
        store(tmp_path / name.format(save=save, other=2 - save.epoch / 10), save.weights)
    store(tmp_path / odd, negative(LAST.weights))
    said = asked(tmp_path)
    assert f"{odd} have the same number" in said or f"{odd} and " in said
    words = shlex.split(said.partition("paste: ")[2])
    found = read(words[2]).checkpoints
    assert len(found) == 10
    right = 0
    for source, save in zip(found, saves(), strict=True):
        assert source.t in (save.epoch, save.step)
        right += torch.equal(values_of(source)[BODY[0]], save.weights[BODY[0]].double())
    assert right >= 9  # of the two one is named


@pytest.mark.parametrize("best", ["valid.acc.ave_10best.pth", "avg_5.pth"])
def test_a_mean_of_the_best_files_is_left_out(best, tmp_path, caplog):
    """ESPnet and WeNet write one beside the files of all epochs."""
    write_each(tmp_path, "{save.epoch}epoch.pth", lambda save: save.weights)
    store(tmp_path / best, {name: (FIRST.weights[name] + LAST.weights[name]) / 2 for name in NAMES})
    assert [one.t for one in read(tmp_path).checkpoints] == [*range(1, 11)]
    assert f"{best} (nothing says its time)" in caplog.text


def test_single_files_are_not_proposed(tmp_path):
    """One of ten was, of which no average can be made."""
    for save in saves():
        content = {"model": save.weights, "epoch": save.epoch // 2}
        store(tmp_path / f"{'abcdefghij'[save.epoch - 1]}.pt", content)
    said = asked(tmp_path)
    assert "paste" not in said
    assert "rename copies" in said


def test_an_average_and_its_weights_are_named_by_braces(tmp_path):
    for save in saves():
        store(tmp_path / f"a_{save.step}.pt", save.average)
        store(tmp_path / f"b_{save.step}.pt", save.weights)
    names = {"average": "a_{[0-9],[0-9][0-9],[0-9][0-9][0-9]}.pt", "weights": "{b,c}_*.pt"}
    found = read(tmp_path, ema_decay=0.95, **names)
    assert found.counts == {"EMA of decay 0.95": 10, "weights": 10}


def test_weights_that_do_not_move_are_a_series(tmp_path):
    for number in range(1, 5):
        store(tmp_path / f"net{number}.pt", FIRST.weights)
    assert len(read(tmp_path).checkpoints) == 4


def test_one_tensor_that_is_called_an_average_is_no_set_that_never_changes(tmp_path):
    ones = torch.ones(5, 5)
    write_each(tmp_path, "s{save.step}.pt", lambda save: {"model": save.weights, "ema": ones})
    check_steps(read(tmp_path).checkpoints)


@pytest.mark.parametrize("name", MEMBERS.values())
@pytest.mark.parametrize("count", [2, 3, 4, 10])
def test_a_training_is_a_series_under_the_same_names(name, count, tmp_path):
    for number, save in enumerate(saves()[:count], 1):
        store(tmp_path / name.format(number), save.weights)
    assert len(read(tmp_path).checkpoints) == count


# --- averages alone, of programs whose decay rises


def rise(n):
    """Return what DINO's n-th update keeps, from 0.9 on; of 400 updates."""
    return 1 - 0.1 * (math.cos(math.pi * (n - 1) / 400) + 1) / 2


def write_teachers(place, *keys):
    for save in saves(rise):
        content = save.average
        for key in reversed(keys):
            content = {key: content}
        store(place / f"step{save.step}.pt", content)


ALONE = {"DINOv2": ["teacher"], "MoCo v3": ["state", "momentum_encoder"]}


@pytest.mark.parametrize("program", ALONE)
def test_a_schedule_of_a_program_is_in_the_question(program, tmp_path):
    """A constant decay was asked for, by which averages were 25 % off."""
    write_teachers(tmp_path, *ALONE[program])
    said = asked(tmp_path)
    assert said.endswith(f"ema import {tmp_path} --ema-warmup cosine:N --out run")
    found = import_checkpoints(tmp_path, tmp_path / "run", ema_warmup="cosine:0.9")
    assert found.sources.notes == ()
    check_error(tmp_path / "run", most=0.1)


@pytest.mark.parametrize("decay", [0.9, 0.95, "half-life:7"])
def test_a_constant_decay_against_the_schedule_is_a_warning_that_errors_count(decay, tmp_path):
    write_teachers(tmp_path / "files", "teacher")
    found = import_checkpoints(tmp_path / "files", tmp_path / "run", ema_decay=decay)
    (note,) = found.sources.notes
    assert "count that" in note
    check_error(tmp_path / "run", most=2.0)  # as large as the weights at most


def test_a_constant_decay_of_another_average_is_no_warning(tmp_path):
    write_each(tmp_path, "step{save.step}.pt", lambda save: {"ema": save.average})
    assert read(tmp_path, ema_decay=0.95).sources.notes == ()


def test_i_jepas_average_alone_rises_on_a_line(tmp_path):
    write_each(tmp_path, "step{save.step}.pt", lambda save: {"target_encoder": save.average})
    assert asked(tmp_path).endswith("--ema-warmup linear:N --out run")


@pytest.mark.parametrize("name", ["checkpoint-{}.pth.tar", "last.{}.pth.tar"])
def test_timms_epochs_are_counted_from_0(name, tmp_path):
    """It keeps the ten last files, of which none need be of epoch 0."""
    for save in saves():
        content = {"epoch": save.epoch + 3, "arch": "vit", "version": 2, "metric": 7.0}
        store(tmp_path / name.format(save.epoch + 3), {**content, "state_dict": save.weights})
    found = read(tmp_path, steps_per_epoch=10)
    assert [one.t for one in found.checkpoints] == [10 * (save.epoch + 4) for save in saves()]
    assert "counted from 0" in found.numbers


# --- copies in another format

EXPORTS = {
    "llm-foundry": ("ep0-ba{save.step}/w.pt", "huggingface/ba{save.step}/model.safetensors"),
    "of two numbers": ("e{save.epoch}_b{save.step}.pt", "export_{save.step}.safetensors"),
    "below": ("stage1/{save.epoch}x{save.step}/w.pt", "hf/step_{save.step}/model.safetensors"),
    "half": ("run2_{save.epoch}_{save.step}.pt", "out/step{save.step}/adapter_model.safetensors"),
}


@pytest.mark.parametrize("program", EXPORTS)
def test_copies_in_another_format_are_no_second_series(program, tmp_path):
    """All files were asked about, of which half are copies."""
    own, export = EXPORTS[program]
    for save in saves():
        store(tmp_path / own.format(save=save), {"state": {"model": save.weights}})
        store(tmp_path / export.format(save=save), save.weights)
    found = read(tmp_path)
    check_steps(found.checkpoints)
    assert "a copy of" in found.sources.notes[0]
