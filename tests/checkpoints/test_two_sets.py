"""Which of a file's sets of tensors is the average: what names and values say, what is asked for,
and what a user then names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import trained
from checkpoint_layouts import distributed
from saved import (
    assert_equal,
    check,
    check_export,
    check_last,
    exported,
    named,
    read,
    store,
    values_of,
    write_each,
)
from torch import nn
from torch.nn import utils
from trained import by, error_of, train
from truth import distance
from walks import Tensors, copied, saves, true_average

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError

STEP = "step{save.step}.pt"
"""The name of a file."""


# --- several averages


def by_decay_in_keys(average, other):
    return {"ema_0.95": average, "ema_0.99": other}


def in_a_list(average, other):
    return {"emas": [average, other]}


def by_decay(average, other):
    return {"emas": {0.95: average, 0.99: other}}


def deep(average, other):
    return {"a": {"ema": average}, "b": ({"net_ema": other},)}


def of_demucs(average, other):
    return {
        "best_state": other,
        "ema_batch_0": {"state": average, "count": 20.0},
        "ema_epoch_0": {"state": other, "count": 2.0},
    }


def of_two_models(average, other):
    return {"G_ema": average, "D": other, "D_ema": other}


@pytest.mark.parametrize(
    ("averages", "key", "other"),
    [
        (by_decay_in_keys, "ema_0.95", "ema_0.99"),
        (in_a_list, "emas.0", "emas.1"),
        (by_decay, "emas.0.95", "emas.0.99"),
        (deep, "a.ema", "b.0.net_ema"),
        (of_demucs, "ema_batch_0", "ema_epoch_0"),
        (of_two_models, "G_ema", "D_ema"),
    ],
)
def test_of_several_averages_one_is_chosen(averages, key, other, tmp_path):
    first, *_, last = saves()
    file = tmp_path / "step400.pt"
    torch.save({"model": last.weights} | averages(last.average, first.weights), file)
    with pytest.raises(FileFormatError, match=f"unclear: '{key}.*', '{other}"):
        exported(file)
    assert_equal(exported(file, average=key), last.average)
    assert_equal(exported(file, average=other), first.weights)


def test_of_two_files_whose_names_differ_in_a_decay_one_is_chosen(tmp_path):
    first, *_, last = saves()
    files = {
        "model": last.weights,
        "ema_0.95": last.average,
        "ema_0.99": first.weights,
    }
    folder = tmp_path / "step400"
    for name, tensors in files.items():
        store(folder / f"{name}.pt", tensors)
    with pytest.raises(FileFormatError, match=r"unclear: 'ema_0\.95', 'ema_0\.99'"):
        exported(folder)
    made = exported(folder, average="ema_0.95")
    assert_equal(made, last.average)


def test_one_of_several_averages_is_imported(tmp_path):
    def content(save):
        return {"model": save.weights} | deep(save.average, save.weights)

    write_each(tmp_path, STEP, content)
    with pytest.raises(FileFormatError, match=r"unclear: 'a\.ema', 'b\.0\.net_ema'"):
        _ = Run(tmp_path).sources
    check_last(tmp_path, average="a.ema")


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


COUNTER = {"bn.num_batches_tracked": torch.tensor(3)}


@pytest.fixture
def of_two_averages(tmp_path: Path) -> Path:
    """Return a checkpoint as of JiT and MAR, which store two averages of which no word says the
    better one."""
    first, *_, last = saves()
    content = {
        "model": last.weights | COUNTER,
        "model_ema1": last.average,
        "model_ema2": first.average,
    }
    place = tmp_path / "last.pth"
    distributed(place, content)
    return place


def test_an_average_of_torch_distributed_is_exported_by_its_key_or_glob(of_two_averages):
    """The statistics that an average lacks are added."""
    first, *_, last = saves()
    for key, average in (("model_ema1", last.average), ("*2", first.average)):
        assert_equal(exported(of_two_averages, average=key), average | COUNTER)


def test_which_average_is_exported_is_asked_for(of_two_averages, tmp_path, ema):
    command = ("export", of_two_averages, "--out", tmp_path / "never.safetensors")
    sets = "'model_ema1', 'model_ema2'"
    assert f"unclear: {sets}; name the average by --average" in ema(*command).error
    reason = f"has no set of tensors 'elsewhere': 'model', {sets}"
    assert reason in ema(*command, "--average", "elsewhere").error
    assert "has several" in ema(*command, "--average", "*").error


def test_the_weights_of_an_average_are_asked_for(tmp_path):
    write_each(
        tmp_path,
        STEP,
        lambda save: {"one": save.weights, "other": save.weights, "ema": save.average},
    )
    with pytest.raises(FileFormatError, match="model is unclear: 'one', 'other'"):
        read(tmp_path)
    check_last(tmp_path, weights="one")


def test_sets_whose_keys_have_no_word_are_asked_for(tmp_path):
    first = saves()[0].weights
    write_each(tmp_path, STEP, lambda save: {"a": save.weights, "b": save.average, "c": first})
    with pytest.raises(FileFormatError, match="unclear"):
        Run(tmp_path).average(0.15)
    check_last(tmp_path, average="b", weights="a")


def fixed_by_lightning(save):
    return {
        "state_dict": save.average,
        "current_model_state": save.weights,
        "averaging_state": {"n_averaged": torch.tensor(save.step)},
    }


def fixed_by_torchtitan(save):
    return torchtitan(save.step, save.weights, save.average)


@pytest.mark.parametrize(
    ("layout", "average", "weights"),
    [
        (fixed_by_lightning, "state_dict", "current_model_state"),
        (fixed_by_torchtitan, "ema_optimizer", "model"),
    ],
)
def test_a_set_that_is_named_counts_where_a_layout_has_another(layout, average, weights, tmp_path):
    def content(save):
        slower = negated(save.average)
        return {**layout(save), "slower": slower, "global_step": save.step}

    file = write_each(tmp_path, STEP, content)
    last = saves()[-1]
    slower = negated(last.average)
    assert_equal(exported(file, average=average), last.average)
    assert_equal(exported(file, average=weights), last.weights)
    assert_equal(exported(file, average="slower"), slower)
    check_last(tmp_path, average=average, weights=weights)
    with pytest.raises(FileFormatError, match="has no set of tensors 'nowhere'"):
        read(tmp_path, weights="nowhere")
    others = read(tmp_path, kind="checkpoints", weights="slower")
    assert_equal(values_of(others.checkpoints[-1]), slower)


# --- parts, and what no word says


def in_parts(tensors: Tensors, body: str, head: str) -> Tensors:
    parts = {}
    for name, value in tensors.items():
        key = body if name.startswith("body") else head
        parts[f"{key}.{name}"] = value
    return parts


@pytest.mark.parametrize(
    ("body", "head", "slow_body", "slow_head"),
    [
        ("backbone", "projector", "momentum_backbone", "momentum_projector"),
        ("student_backbone", "student_head", "teacher_backbone", "teacher_head"),
    ],
    ids=["solo-learn", "DINO"],
)
def test_an_average_in_two_parts_is_one(body, head, slow_body, slow_head, tmp_path):
    """Also beside a layer that has no average, and a trained one of an average's features."""
    last = saves()[-1]
    file = tmp_path / "step=400.ckpt"
    average = in_parts(last.average, body, head)
    weights = in_parts(last.weights, body, head)
    slow = in_parts(last.average, slow_body, slow_head)
    layers = ("predictor.bias", "momentum_classifier.bias", "student_classifier.bias")
    others = dict.fromkeys(layers, torch.ones(3))
    torch.save({"state_dict": weights | slow | others}, file)
    assert_equal(exported(file), average)
    of_head = {"head.weight": last.average["head.weight"]}
    assert_equal(exported(file, average=slow_head), of_head)


@pytest.mark.parametrize(("key", "other"), [("gen", "gen_test"), ("netG", "netGEMA")])
def test_the_values_show_which_of_two_groups_is_the_average(key, other, tmp_path):
    """Neither key is a word for it, such as those of FUNIT."""
    discriminator = named("dis.", saves()[0].weights)
    discriminator["last.weight"] = torch.ones(3, 3)

    def content(save):
        return {other: save.average, key: save.weights, "dis": discriminator}

    write_each(tmp_path, STEP, content)
    check_last(tmp_path)


REST = {"module.temperature": torch.tensor(0.07), "module.fusion.bias": torch.ones(9)}


def in_two_parts(tensors: Tensors, form: str) -> Tensors:
    visual = form.format("visual")
    text = form.format("text")
    return named("module.", in_parts(tensors, visual, text))


@pytest.mark.parametrize(
    ("form", "slow"),
    [
        ("{}_encoder", "{}_encoder_m"),
        ("{}", "slow_{}"),
    ],
    ids=["ALBEF, BLIP", "begun with a word"],
)
def test_the_values_show_that_parts_of_a_model_are_averages(form, slow, tmp_path):
    def model(save):
        averages = in_two_parts(save.average, slow)
        return in_two_parts(save.weights, form) | averages | REST

    file = write_each(tmp_path, STEP, lambda save: {"model": model(save)})
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
    write_each(tmp_path, STEP, lambda save: {"model": model(save)})
    run = Run(tmp_path)
    assert {source.holds for source in run.sources} == {"weights"}
    assert run.tensors.keys() == model(saves()[-1]).keys()


def of_mmcv(save, is_swapped):
    """The average is in buffers, or has been swapped with the weights."""
    model = save.average if is_swapped else save.weights
    buffers = save.weights if is_swapped else save.average
    state = dict(model)
    for name, value in buffers.items():
        flat = name.replace(".", "_")
        state[f"ema_{flat}"] = value
    meta = {"epoch": save.epoch, "iter": save.step}
    return {"meta": meta, "state_dict": state}


@pytest.mark.parametrize(
    ("is_swapped", "average", "weights"),
    [
        (False, "ema_*", "state_dict"),
        (True, "state_dict", "ema_*"),
    ],
)
def test_buffers_of_mmcv(is_swapped, average, weights, tmp_path, caplog):
    """Of the two sets the average is the one that moves less; a single file asks."""
    file = write_each(tmp_path, "iter_{save.step}.pth", lambda save: of_mmcv(save, is_swapped))
    check_last(tmp_path)
    assert "which moves less from file to file" in caplog.text
    with pytest.raises(FileFormatError, match="nothing tells which is the average"):
        exported(file)
    last = saves()[-1]
    assert_equal(exported(file, average=average), last.average)
    assert_equal(exported(file, average=weights), last.weights)
    check_last(tmp_path, weights=weights)


TEXT = {f"text.{index}.weight": torch.ones(3) for index in range(9)}


def test_an_average_of_a_part_of_the_model(tmp_path):
    """Names tell which part it is of; the run is of that part."""

    def content(save):
        model = named("net.", save.weights) | TEXT
        return {"state_dict": model, "ema": named("net.", save.average)}

    file = write_each(tmp_path, STEP, content)
    check_last(tmp_path)
    assert_equal(exported(file), saves()[-1].average)


class Shadow:
    """An average of one's own, as programs keep it in an object."""

    def __init__(self, average: Tensors) -> None:
        self.shadow = average
        self.decay = 0.95
        self.scale = torch.ones(3)  # no set
        self.itself = self
        parameter = torch.ones(2, requires_grad=True)
        parameter.sum().backward()
        self.solver = torch.optim.SGD([parameter], momentum=0.9)
        self.solver.step()  # its states have tensors as keys


def test_an_average_in_an_object_that_was_pickled_whole(tmp_path):
    file = write_each(
        tmp_path, STEP, lambda save: {"net": save.weights, "ema": Shadow(save.average)}
    )
    last = saves()[-1]
    check(tmp_path, last.average, last.weights, 0.95)
    check_export(file, last.average, last.weights)


def test_an_average_that_is_not_used_is_named(tmp_path, caplog):
    """An average of a small part of the model is used if the user names it."""

    def content(save):
        model = save.weights | TEXT
        return {"state_dict": model, "extra": {"deep": {"ema": save.average}}}

    file = write_each(tmp_path, STEP, content)
    Run(tmp_path).average(0.1)
    assert "also holds 'extra.deep.ema', not used: an import takes another set by" in caplog.text
    last = saves()[-1]
    average = last.average | TEXT
    check(tmp_path, average, last.weights | TEXT, None, average="deep.ema")
    assert_equal(exported(file, average="ema"), average)


def test_an_average_of_numpy_arrays_is_named_which_cannot_be_read(tmp_path, caplog):
    """In the protocol of `torch.save` their bytes are a text."""
    model = nn.Linear(3, 2)
    arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    content = {"model": model.state_dict(), "ema": arrays, "loss": np.array(0.5)}
    torch.save(content, tmp_path / "step5.pt")
    found = import_checkpoints(tmp_path, tmp_path / "run")
    assert found.counts == {"weights": 1}
    assert "step5.pt also holds 'ema', not used" in caplog.text
    with pytest.raises(FileFormatError, match=r"'ema\.weight': is of a kind that is not read"):
        import_checkpoints(tmp_path, tmp_path / "other", average="ema")


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


# --- averages without weights, and weights without averages


def test_an_average_without_weights_is_not_taken_for_weights(tmp_path):
    write_each(tmp_path, STEP, lambda save: {"ema": save.average, "args": {"lr": 3}})
    reason = "holds EMAs, and neither their decay nor weights next to them"
    with pytest.raises(InvalidValueError, match=reason):
        _ = Run(tmp_path).sources
    done = read(tmp_path, ema_decay=0.95)
    assert done.counts == {"EMA of decay 0.95": len(saves())}
    assert_equal(values_of(done.checkpoints[-1]), saves()[-1].average)


def test_a_checkpoint_without_an_average_is_not_exported_as_one(tmp_path, ema):
    """A set with another purpose has one name of the weights."""
    file = tmp_path / "last.pt"
    out = tmp_path / "model.safetensors"
    weights = saves()[-1].weights
    other = {"body.0.weight": weights["body.0.weight"]}
    torch.save({"model": weights, "ema": other}, file)
    refused = ema("export", file, "--out", out)
    assert refused.code == 2
    reason = "holds no average that its keys name ('model', 'ema'); name its key by --average"
    assert f"last.pt: {reason}" in refused.err
    assert not out.exists()


LAYERS = [
    *(f"layer{number}.weight" for number in range(6)),
    "ema.weight",
    "quantize.embed_avg",
]
WEIGHT_NORM = ["weight_g", "weight_v"]
SPECTRAL_NORM = ["weight_orig", "weight_u"]


def test_sets_that_are_not_used_are_named(tmp_path, run, caplog):
    """A discriminator and a frozen network; not the states of an optimizer, nor the best score."""
    values = torch.arange(3.0)
    for step in range(10, 50, 10):
        model = {
            "net.w": values + step,
            "ema_net.w": values + step - 1,
            "frozen.w": values,
        }
        content = {
            "model": model,
            "discriminator": {"c": {"w": values}},
            "callbacks": {"best_model_score": torch.tensor(0.5)},
            "optimizer": {"master": {"net.w": values + step + 0.25}},
        }
        torch.save(content, tmp_path / f"step{step}.pt")
    Run(tmp_path).average(0.2)
    assert "also holds 'model.frozen', 'discriminator', not used: an import takes" in caplog.text
    place = {"weights": "optimizer.master", "kind": "checkpoints"}
    import_checkpoints(tmp_path, run, **place)
    *_, last = Run(run).sources
    found = last.values("net.w", 0, 3)
    assert found.tolist() == [40.25, 41.25, 42.25]


@pytest.mark.parametrize("scale", ["a.weight_scale", "a.weight_scale_inv", "a.scale_weight"])
def test_weights_of_8_bits_with_scales_are_warned_of(scale, tmp_path, caplog):
    for step in (10, 20):
        weight = torch.full((9, 9), step)
        content = {"a.weight": weight.to(torch.float8_e4m3fn)}
        torch.save(content, tmp_path / f"plain{step}.pt")
        content[scale] = torch.tensor([step / 10])
        torch.save(content, tmp_path / f"scaled{step}.pt")
    Run(tmp_path / "plain*.pt").average(0.2)
    assert "scale" not in caplog.text
    Run(tmp_path / "scaled*.pt").average(0.2)
    assert f"'a.weight' is of 8 bits, in units of {scale!r}: its average is wrong" in caplog.text


def test_quantised_weights_are_warned_of(tmp_path, caplog):
    for step in (10, 20):
        codes = torch.full((9, 9), step)
        content = {
            "scale": codes / 10,
            "mask": torch.ones(80, dtype=torch.uint8),
        }
        torch.save(content, tmp_path / f"plain{step}.pt")
        content["codes"] = codes.to(torch.int8)
        torch.save(content, tmp_path / f"quantised{step}.pt")
    Run(tmp_path / "plain*.pt").average(0.2)
    assert "quantised" not in caplog.text
    Run(tmp_path / "quantised*.pt").average(0.2)
    assert "most elements are integers, copied from the newest: quantised weights" in caplog.text


@pytest.mark.parametrize("names", [LAYERS, WEIGHT_NORM, SPECTRAL_NORM])
def test_names_that_look_like_another_thing(names, tmp_path):
    """A layer named `ema` next to others is no average of the model; the states of Megatron's
    chained optimizers are no weights; weight norm's direction, and a lone tensor, of a name like
    that of spectral norm's vector, are averaged.
    """
    for step in (10, 20):
        values = torch.full((4, 5), float(step))
        content = dict.fromkeys(names, values)
        content["chained_0.optimizer.state.exp_avg.w"] = torch.ones(4)
        torch.save(content, tmp_path / f"step{step}.pt")
    found = Run(tmp_path).average(0.2)
    assert found.keys() == set(names)
    for value in found.values():
        assert 10 < value[0, 0] < 20


@pytest.mark.parametrize("norm", [utils.parametrizations.spectral_norm, utils.spectral_norm])
def test_the_vectors_of_spectral_norm_are_copied(norm, tmp_path):
    layer = norm(torch.nn.Linear(5, 4))
    for step in (10, 20):
        for buffer in layer.buffers():
            vector = torch.randn(len(buffer))
            buffer.copy_(vector / vector.norm())
        torch.save({"model": layer.state_dict()}, tmp_path / f"step{step}.pt")
    found = Run(tmp_path).average(0.2)
    assert found.keys() == layer.state_dict().keys()
    vectors = dict(layer.named_buffers())
    assert len(vectors) == 2
    for name, vector in vectors.items():
        assert torch.equal(found[name], vector)


def test_the_sums_of_a_codebook_are_copied(tmp_path):
    """Their vectors are averaged; a tensor of such a name alone is a weight."""
    for step in range(10, 70, 10):
        ones = torch.ones(8, 4)
        value = 1 + step / 1000
        codebook = {
            "vq.embed": value * ones,
            "vq.cluster_size": torch.arange(8.0) * step**2,
            "vq.embed_avg": 1e6 * step * ones,
            "layer.embed_avg": value * ones,
        }
        torch.save({"state_dict": codebook}, tmp_path / f"step{step}.pt")
    made = Run(tmp_path).average(0.2)
    assert made.predicted_error < 0.01
    assert torch.equal(made["vq.cluster_size"], codebook["vq.cluster_size"])
    assert torch.equal(made["vq.embed_avg"], codebook["vq.embed_avg"])
    for name in ("vq.embed", "layer.embed_avg"):
        assert 1.01 < made[name].flatten()[0] < 1.06


# --- other averages than those of a decay


EXPONENT = 6.94
VARIANCE = EXPONENT / ((EXPONENT + 1) ** 2 * (EXPONENT + 2))
"""That of the power function of this gamma + 1, whose sigma_rel is 0.111."""


def power(step):
    """Return (1 - 1/n)^(gamma + 1), for the n-th update at every tenth step."""
    if step % 10:
        return 1.0
    return (1 - 10 / step) ** EXPONENT


def test_the_width_of_a_power_function_is_given(run, files, ema):
    folder = trained.write(files, train(), by(power))
    options = ("--sigma-rels", VARIANCE**0.5, "--update-every", 10)
    assert ema("import", folder, "--out", run, *options).code == 0
    for wanted in (0.08, 0.15):
        found, predicted = error_of(Run(run), wanted)
        assert found < 2 * predicted < 0.04


def test_two_widths_of_one_average_are_refused(tmp_path):
    write_each(tmp_path, STEP, lambda save: {"model": save.weights, "ema": save.average})
    with pytest.raises(InvalidValueError, match="sigma_rels: must be one, of the average in"):
        read(tmp_path, sigma_rels=(0.1, 0.2))


def of_a_tenth(step):
    """A half-life of a tenth of the training."""
    half_life = 0.1 * step
    return 2 ** (-1 / half_life)


def started_late(step):
    """Return the decay of an update at step 50 and every 7 steps after, with a half-life of 5 % of
    the updates."""
    updates, rest = divmod(step - 50, 7)
    if rest or updates < 0:
        return 1.0
    if updates == 0:
        return 0.0
    half_life = 0.05 * updates
    return 2 ** (-1 / half_life)


def torchtitan(_, weights, average):
    states = {f"state.{name}.ema_params": value for name, value in average.items()}
    return {"model": weights, "ema_optimizer": states}


@pytest.mark.parametrize(
    ("settings", "decay"),
    [
        ({"ema_decay": "half-life:10%"}, of_a_tenth),
        ({"update_every": 7, "update_after_step": 50}, started_late),
    ],
)
def test_settings_of_torchtitan_are_given(settings, decay, run, files):
    """Its default half-life is 5 % of the training."""
    folder = trained.write(files, train(), by(decay), form=torchtitan)
    import_checkpoints(folder, run, kind="torchtitan", **settings)
    found, predicted = error_of(Run(run))
    assert found < 2 * predicted < 0.04


def from_step_160(step):
    return 0.95 if step > 160 else 0.0


def test_an_average_that_is_named_may_have_begun_later(run, files):
    files.mkdir()
    for save in saves(from_step_160):
        content = {"step": save.step, "model": save.weights}
        if save.step > 160:
            content["other"] = save.average
        torch.save(content, files / f"step{save.step}.pt")
    done = import_checkpoints(files, run, average="other")
    assert list(done.counts.values()) == [10, 6]
    made = Run(run).average(0.1)
    assert distance(made, true_average(0.1)) < 2 * made.predicted_error < 0.02
