"""Which of a file's sets of tensors is the average: what names and values say, what is asked for,
and what a user then names."""

import pickle
import sys
from collections import namedtuple
from types import ModuleType

import numpy as np
import pytest
import torch
import trained
from checkpoint_layouts import distributed
from saved import (
    asked,
    assert_equal,
    check,
    check_error,
    check_export,
    check_last,
    exported,
    fault,
    named,
    read,
    store,
    values_of,
    write_each,
)
from torch import nn
from torch.nn import utils
from trained import by, error_of, train
from walks import EVERY, copied, saves

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError

STEP = "step{save.step}.pt"
"""The name of a file."""


# --- several averages

FIRST, *_, LAST = saves()
AVERAGE = LAST.average
OTHER = FIRST.weights


def negated(tensors):
    return {name: -value for name, value in tensors.items()}


SEVERAL = [
    ({"emas": [AVERAGE, OTHER]}, "emas.0", "emas.1"),
    ({"emas": {0.95: AVERAGE, 0.99: OTHER}}, "emas.0.95", "emas.0.99"),
    (
        {
            "G_ema": AVERAGE,
            "D": OTHER,
            "D_ema": OTHER,
        },
        "G_ema",
        "D_ema",
    ),
    (
        {
            "best_state": OTHER,
            "ema_batch_0": {"state": AVERAGE, "count": 20.0},
            "ema_epoch_0": {"state": OTHER, "count": 2.0},
        },  # as of demucs
        "ema_batch_0",
        "ema_epoch_0",
    ),
]


@pytest.mark.parametrize(("averages", "key", "other"), SEVERAL)
def test_of_several_averages_one_is_chosen(averages, key, other, tmp_path):
    file = tmp_path / "step400.pt"
    torch.save({"model": LAST.weights} | averages, file)
    with pytest.raises(FileFormatError, match=f"unclear: '{key}.*', '{other}"):
        exported(file)
    assert_equal(exported(file, average=key), AVERAGE)
    assert_equal(exported(file, average=other), OTHER)


def test_two_files_whose_names_differ_in_a_decay_are_two_averages(tmp_path):
    store(tmp_path / "model.pt", LAST.weights)
    store(tmp_path / "ema_0.95.pt", AVERAGE)
    store(tmp_path / "ema_0.99.pt", OTHER)
    with pytest.raises(FileFormatError, match=r"unclear: 'ema_0\.95', 'ema_0\.99'"):
        exported(tmp_path)
    assert_equal(exported(tmp_path, average="ema_0.95"), AVERAGE)


def test_tensors_beside_the_model_are_not_taken_for_it(tmp_path):
    def content(save):
        state = torch.get_rng_state()
        return {
            "net": save.weights,
            "rng": state,
            "loss": torch.tensor(0.5),
            "step": save.step,
        }

    file = write_each(tmp_path, STEP, content)
    assert_equal(exported(file, weights=True), LAST.weights)
    check_error(tmp_path, most=0.1)


def test_sets_that_no_word_tells_apart_are_asked_for(tmp_path):
    def content(save):
        return {
            "one": save.weights,
            "other": save.weights,
            "ema": save.average,
        }

    write_each(tmp_path, STEP, content)
    assert "model is unclear: 'one', 'other'" in fault(tmp_path)
    check_last(tmp_path, weights="one")


def test_an_average_of_torch_distributed_is_exported_by_its_glob(tmp_path):
    """As of JiT and MAR, which store two averages. The statistics that an average lacks are
    added."""
    content = {
        "model": LAST.weights | {"bn.num_batches_tracked": torch.tensor(3)},
        "model_ema1": AVERAGE,
        "model_ema2": OTHER,
    }
    place = tmp_path / "last.pth"
    distributed(place, content)
    made = exported(place, average="*1")
    assert made.pop("bn.num_batches_tracked") == 3
    assert_equal(made, AVERAGE)
    with pytest.raises(FileFormatError, match="has several"):
        exported(place, average="*")


def test_a_set_that_is_named_counts_where_the_layout_of_lightning_has_another(tmp_path):
    def content(save):
        return {
            "state_dict": save.average,
            "current_model_state": save.weights,
            "averaging_state": {"n_averaged": torch.tensor(save.step)},
            "slower": negated(save.average),
            "global_step": save.step,
        }

    file = write_each(tmp_path, STEP, content)
    assert_equal(exported(file, average="current_model_state"), LAST.weights)
    assert_equal(exported(file, average="slower"), negated(AVERAGE))
    check_last(tmp_path, average="state_dict", weights="current_model_state")
    assert "has no set of tensors 'nowhere'" in fault(tmp_path, weights="nowhere")


# --- parts, and what no word says


def in_parts(tensors, body, head):
    parts = {}
    for name, value in tensors.items():
        key = body if name.startswith("body") else head
        parts[f"{key}.{name}"] = value
    return parts


def test_an_average_in_two_parts_is_one(tmp_path):
    """As of solo-learn, beside a layer that has no average, and a trained one of an average's
    features."""
    file = tmp_path / "step=400.ckpt"
    state = dict.fromkeys(("predictor.bias", "momentum_classifier.bias"), torch.ones(3))
    state |= in_parts(LAST.weights, "backbone", "projector")
    state |= in_parts(AVERAGE, "momentum_backbone", "momentum_projector")
    torch.save({"state_dict": state}, file)
    assert_equal(exported(file), in_parts(AVERAGE, "backbone", "projector"))


def test_the_values_show_which_of_two_groups_is_the_average(tmp_path):
    """Neither key is a word for it, as in FUNIT."""
    discriminator = named("dis.", OTHER) | {"last.weight": torch.ones(3, 3)}

    def content(save):
        return {
            "gen_test": save.average,
            "gen": save.weights,
            "dis": discriminator,
        }

    write_each(tmp_path, STEP, content)
    check_last(tmp_path)


REST = {
    "module.temperature": torch.tensor(0.07),
    "module.fusion.bias": torch.ones(9),
}


def in_two_parts(tensors, form="{}_encoder"):
    parts = in_parts(tensors, form.format("visual"), form.format("text"))
    return named("module.", parts)


def test_the_values_show_that_parts_of_a_model_are_averages(tmp_path):
    """As in ALBEF and BLIP."""

    def content(save):
        averages = in_two_parts(save.average, "{}_encoder_m")
        return {"model": in_two_parts(save.weights) | averages | REST}

    file = write_each(tmp_path, STEP, content)
    average = in_two_parts(AVERAGE) | REST
    weights = in_two_parts(LAST.weights) | REST
    check(tmp_path, average, weights, None)
    assert_equal(exported(file, weights=True), content(LAST)["model"])
    with pytest.raises(FileFormatError, match="none of its keys names an average"):
        exported(file)


def twin_critics(save):
    other = saves()[-save.epoch].weights
    return named("critic.", save.weights) | named("critic_b.", other)


def a_copy_of_the_begin(save):
    return named("net.", save.weights) | named("net_init.", copied(OTHER))


def layers(save):
    return named("block.", save.weights) | named("block1.", save.average)


def a_small_head(save):
    return {
        "body.weight": torch.ones(40, 40),
        "head.weight": save.weights["head.weight"],
        "head_aux.weight": save.average["head.weight"],
    }


@pytest.mark.parametrize("model", [twin_critics, a_copy_of_the_begin, layers, a_small_head])
def test_parts_that_are_alike_are_weights(model, tmp_path):
    """They have the same names and shapes, and none is an average."""
    write_each(tmp_path, STEP, lambda save: {"model": model(save)})
    run = Run(tmp_path)
    assert {source.holds for source in run.sources} == {"weights"}
    assert run.tensors.keys() == model(LAST).keys()


def of_mmcv(step, model, buffers):
    state = dict(model)
    for name, value in buffers.items():
        flat = name.replace(".", "_")
        state[f"ema_{flat}"] = value
    return {
        "meta": {"iter": step},
        "state_dict": state,
    }


def beside_buffers(save):
    return of_mmcv(save.step, save.weights, save.average)


def swapped_with_buffers(save):
    return of_mmcv(save.step, save.average, save.weights)


@pytest.mark.parametrize(
    ("content", "average", "weights"),
    [
        (beside_buffers, "ema_*", "state_dict"),
        (swapped_with_buffers, "state_dict", "ema_*"),
    ],
)
def test_buffers_of_mmcv(content, average, weights, tmp_path, caplog):
    """Of the two sets the average is the one that moves less; a single file asks."""
    file = write_each(tmp_path, "iter_{save.step}.pth", content)
    check_last(tmp_path)
    assert "which moves less from file to file" in caplog.text
    with pytest.raises(FileFormatError, match="nothing tells which is the average"):
        exported(file)
    assert_equal(exported(file, average=average), AVERAGE)
    assert_equal(exported(file, average=weights), LAST.weights)
    check_last(tmp_path, weights=weights)


TEXT = {f"text.{index}.weight": torch.ones(3) for index in range(9)}


def test_an_average_of_a_part_of_the_model(tmp_path):
    """Names tell which part it is of; the run is of that part."""

    def content(save):
        model = named("net.", save.weights) | TEXT
        return {
            "state_dict": model,
            "ema": named("net.", save.average),
        }

    file = write_each(tmp_path, STEP, content)
    check_last(tmp_path)
    assert_equal(exported(file), AVERAGE)


class Shadow:
    """An average of one's own, as programs keep it in an object."""

    def __init__(self, average):
        self.shadow = average
        self.decay = 0.95
        self.scale = torch.ones(3)  # no set
        self.itself = self
        parameter = torch.ones(2, requires_grad=True)
        parameter.sum().backward()
        self.solver = torch.optim.SGD([parameter], momentum=0.9)
        self.solver.step()  # its states have tensors as keys


class WithSlots:
    __slots__ = ("__dict__", "shadow")

    def __init__(self, average):
        self.decay = 0.95
        self.shadow = average


@pytest.mark.parametrize("kind", [Shadow, WithSlots])
def test_an_average_in_an_object_that_was_pickled_whole(kind, tmp_path):
    file = write_each(tmp_path, STEP, lambda save: {"net": save.weights, "ema": kind(save.average)})
    check(tmp_path, AVERAGE, LAST.weights, 0.95)
    check_export(file, AVERAGE, LAST.weights)


def test_an_average_that_is_not_used_is_named(tmp_path, caplog):
    """An average of a small part of the model is used if the user names it."""

    def content(save):
        model = save.weights | TEXT
        return {
            "state_dict": model,
            "extra": {"deep": {"ema": save.average}},
        }

    write_each(tmp_path, STEP, content)
    read(tmp_path)
    assert "also holds 'extra.deep.ema', not used: an import takes another set by" in caplog.text
    check(tmp_path, AVERAGE | TEXT, LAST.weights | TEXT, None, average="deep.ema")


class Reconstructed:
    """An array of JAX, as a pickle has it."""

    def __init__(self, array):
        self.parts = (*array.__reduce__(), {"weak_type": False})

    def __reduce__(self):
        return (make_array, self.parts)


def make_array(*_):
    """Stand for the function that JAX names."""


make_array.__module__ = "jax._src.array"
make_array.__qualname__ = "_reconstruct_array"
FORMS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "permuted": lambda array: np.ascontiguousarray(array[None].T).T[0],
    "JAX": Reconstructed,
}


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("form", FORMS)
def test_arrays_in_a_pickle_are_tensors(form, protocol, tmp_path, monkeypatch):
    array = ModuleType("jax._src.array")
    array._reconstruct_array = make_array
    for name in ("jax", array.__name__):
        monkeypatch.setitem(sys.modules, name, array)

    def content(save):
        sets = {}
        for name, tensors in {"params": save.weights, "ema_params": save.average}.items():
            sets[name] = {key: FORMS[form](tensor.numpy()) for key, tensor in tensors.items()}
        return sets | {"epoch": np.array(save.epoch), "names": np.array(["a"])}

    for save in saves():
        file = tmp_path / f"{save.epoch}.pkl"
        file.write_bytes(pickle.dumps(content(save), protocol))
    check(tmp_path, AVERAGE, LAST.weights, None, steps_per_epoch=EVERY)
    check_export(file, AVERAGE, LAST.weights)


def test_an_average_of_numpy_arrays_is_named_which_cannot_be_read(tmp_path, caplog):
    """In the protocol of `torch.save` their bytes are a text."""
    weights = {
        "weight": torch.ones(3, 2),
        "bias": torch.ones(3),
    }
    arrays = {name: tensor.numpy() for name, tensor in weights.items()}
    content = {
        "model": weights,
        "ema": arrays,
        "loss": np.array(0.5),
        "ema_vector": torch.ones(9),
    }
    torch.save(content, tmp_path / "step5.pt")
    assert read(tmp_path).counts == {"weights": 1}
    assert "step5.pt also holds 'ema', 'ema_vector (one tensor)', not used" in caplog.text
    assert "is of a kind that is not read ('array of numpy as text" in fault(
        tmp_path, average="ema"
    )


def test_an_average_in_a_list_of_parameters_within_the_model(tmp_path):
    """As facebook's flow_matching has it."""

    def content(save):
        model = named("model.", save.weights)
        for number, tensor in enumerate(save.average.values()):
            model[f"shadow_params.{number}"] = tensor
        return {"model": model}

    file = write_each(tmp_path, STEP, content)
    average = named("model.", AVERAGE)
    check(tmp_path, average, named("model.", LAST.weights), None)
    assert_equal(exported(file), average)


@pytest.mark.parametrize("frozen", [(), ("body.0.weight", "body.0.bias")])
def test_an_average_by_places_in_memory_is_matched_by_its_values(frozen, tmp_path):
    """Their order is no one's: two weights of a shape are swapped. Frozen ones have none."""
    still = {name: OTHER[name] for name in frozen}
    order = ("body.0.weight", "body.0.bias", "head.weight", "body.1.bias", "body.1.weight")
    places = {name: 10**9 + number for number, name in enumerate(order) if name not in frozen}

    def content(save):
        shadow = {place: save.average[name] for name, place in places.items()}
        return {"model": save.weights | still, "shadow": shadow}

    file = write_each(tmp_path, STEP, content)
    check(tmp_path, AVERAGE | still, LAST.weights | still, None)
    assert_equal(exported(file), AVERAGE | still)


@pytest.mark.parametrize(
    ("key", "has_names"), [("ema", False), ("ema", True), ("ax", False), ("slow", False)]
)
def test_an_optimizers_average_is_taken_by_its_key(key, has_names, tmp_path, caplog):
    """By the name or number of each parameter, in groups of their own order; `ema` may be of
    gradients."""

    def content(save):
        names = sorted(save.weights, key=lambda name: save.weights[name].ndim)
        states = {}
        for number, name in enumerate(names):
            moments = torch.randn(save.weights[name].shape)
            one = name if has_names else number
            states[one] = {"exp_avg": moments, key: save.average[name]}
        solver = {"state": states, "param_groups": [{"lr": 0.1}]}
        return {"net": save.weights, "adam": solver}

    file = write_each(tmp_path, STEP, content)
    assert read(tmp_path).counts == {"weights": len(saves())}
    is_named = f"also holds 'adam.state.{key}', not used: an import takes" in caplog.text
    assert is_named == (key != "slow")
    check(tmp_path, AVERAGE, LAST.weights, None, average=key)
    assert_equal(exported(file, average=f"adam.state.{key}"), AVERAGE)


def test_weights_among_the_states_of_an_optimizer_have_the_models_names(tmp_path):
    """Of a schedule-free one, whose average is in the model."""

    def content(save):
        states = {number: {"z": value} for number, value in enumerate(save.weights.values())}
        return {"model": save.average, "optimizer": {"state": states}}

    write_each(tmp_path, STEP, content)
    newest = read(tmp_path, weights="z").checkpoints[-1]
    assert_equal(values_of(newest), LAST.weights)


def test_two_towers_are_no_average_and_its_weights(tmp_path, caplog):
    """Networks of other weights have the same names and shapes, and norms that are alike."""
    file = tmp_path / "step9.pt"
    first, second = torch.randn(2, 20, 20)
    towers = {
        "source_encoder": {"w": first},
        "target_encoder": {"w": first + 0.5},
    }
    torch.save(towers, file)
    exported(file)
    assert "unrelated" not in caplog.text
    towers["target_encoder"] = {
        "w": second,
        "norm": torch.ones(20),
    }
    towers["source_encoder"]["norm"] = torch.ones(20)
    torch.save(towers, file)
    exported(file)
    assert "average is unrelated to the weights; name it by `average` if it is" in caplog.text
    assert_equal(exported(file, average="target_encoder"), towers["target_encoder"])


def scaled(tensors, factor):
    return {name: factor * value for name, value in tensors.items()}


def a_second_encoder(save):
    return {"encoder": save.weights, "target_encoder": negated(save.weights)}


def a_long_average(save):
    """Return weights that grow evenly from 0, and what an average of 4,000 steps has of them."""
    t = save.step
    return {"encoder": scaled(OTHER, t), "target_encoder": scaled(OTHER, t**2 / 8000)}


@pytest.mark.parametrize(
    ("content", "is_part"),
    [
        (a_second_encoder, True),
        (a_long_average, False),
    ],
)
def test_a_second_network_is_a_part_of_the_model_whatever_its_name_says(
    content, is_part, tmp_path, caplog
):
    """It is far from the weights, as a long average may be, but does not move towards them."""

    def state(save):
        sets = content(save)
        encoder = named("encoder.", sets["encoder"])
        return {"state_dict": encoder | named("target_encoder.", sets["target_encoder"])}

    write_each(tmp_path, STEP, state)
    found = set(Run(tmp_path).tensors)
    assert (found == state(LAST)["state_dict"].keys()) == is_part
    assert ("does not move towards them" in caplog.text) == is_part


# --- averages without weights, and weights without averages


def test_an_average_without_weights_is_not_taken_for_weights(tmp_path):
    write_each(tmp_path, STEP, lambda save: {"ema": save.average, "args": {"lr": 3}})
    reason = "holds EMAs, and neither their decay nor weights next to them"
    with pytest.raises(InvalidValueError, match=reason):
        _ = Run(tmp_path).sources
    done = read(tmp_path, ema_decay=0.95)
    assert done.counts == {"EMA of decay 0.95": len(saves())}
    assert_equal(values_of(done.checkpoints[-1]), AVERAGE)


def test_a_checkpoint_without_an_average_is_not_exported_as_one(tmp_path, ema):
    """A set with another purpose has one name of the weights."""
    file = tmp_path / "last.pt"
    out = tmp_path / "model.safetensors"
    other = {"body.0.weight": LAST.weights["body.0.weight"]}
    torch.save({"model": LAST.weights, "ema": other}, file)
    refused = ema("export", file, "--out", out)
    assert refused.code == 2
    reason = "none of its keys names an average ('model', 'ema'); name its key by --average"
    assert f"last.pt: {reason}" in refused.err
    assert not out.exists()


def test_sets_that_are_not_used_are_named(tmp_path, caplog):
    """A discriminator and a frozen network; not the states of an optimizer, nor the best score."""
    values = torch.arange(3.0)
    content = {
        "model": {"net.w": values, "ema_net.w": values - 1, "frozen.w": values},
        "discriminator": {"c": {"w": values}},
        "callbacks": {"best_model_score": torch.tensor(0.5)},
        "optimizer": {"master": {"net.w": values + 0.25}},
    }
    torch.save(content, tmp_path / "step10.pt")
    read(tmp_path, ema_decay=0.95)
    assert "also holds 'model.frozen', 'discriminator', not used: an import takes" in caplog.text
    (source,) = read(tmp_path, weights="optimizer.master", kind="checkpoints").checkpoints
    assert source.values("net.w", 0, 3).tolist() == [0.25, 1.25, 2.25]


@pytest.mark.parametrize("scale", ["a.weight_scale", "a.weight_scale_inv", "a.scale_weight"])
def test_weights_of_8_bits_with_scales_are_warned_of(scale, tmp_path, caplog):
    file = tmp_path / "step10.pt"
    weights = {"a.weight": torch.ones(9).to(torch.float8_e4m3fn)}
    torch.save(weights, file)
    read(file)
    assert not caplog.messages
    torch.save(weights | {scale: torch.ones(1)}, file)
    read(file)
    assert f"'a.weight' is of 8 bits, in units of {scale!r}: its average is wrong" in caplog.text


def test_quantised_weights_are_warned_of(tmp_path, caplog):
    file = tmp_path / "step10.pt"
    weights = {
        "scale": torch.ones(81),
        "mask": torch.ones(80, dtype=torch.uint8),
    }
    torch.save(weights, file)
    read(file)
    assert not caplog.messages
    weights["codes"] = torch.ones(81, dtype=torch.int8)
    weights["spectrum"] = torch.ones(3, dtype=torch.complex64)
    torch.save(weights, file)
    read(file)
    assert "most elements are integers, copied from the newest: quantised weights" in caplog.text
    assert "complex elements are copied from the newest: for averages save" in caplog.text


LAYERS = [*(f"layer{number}.weight" for number in range(6)), "ema.weight", "quantize.embed_avg"]
WEIGHT_NORM = ["weight_g", "weight_v"]
SPECTRAL_NORM = ["weight_orig", "weight_u"]


@pytest.mark.parametrize("names", [LAYERS, WEIGHT_NORM, SPECTRAL_NORM])
def test_names_that_look_like_another_thing(names, tmp_path):
    """A layer named `ema` next to others is no average of the model; the states of Megatron's
    chained optimizers are no weights; weight norm's direction, and a lone tensor, of a name like
    that of spectral norm's vector, are averaged.
    """
    for step in (10, 20):
        content = dict.fromkeys(names, torch.full((4, 5), float(step)))
        content["chained_0.optimizer.state.exp_avg.w"] = torch.ones(4)
        torch.save(content, tmp_path / f"step{step}.pt")
    found = Run(tmp_path).average("last:2")
    assert found.keys() == set(names)
    for value in found.values():
        assert value[0, 0] == 15


@pytest.mark.parametrize("norm", [utils.parametrizations.spectral_norm, utils.spectral_norm])
def test_the_vectors_of_spectral_norm_are_copied(norm, tmp_path):
    for step in (10, 20):
        layer = norm(nn.Linear(5, 4))
        torch.save({"model": layer.state_dict()}, tmp_path / f"step{step}.pt")
    found = Run(tmp_path).average("last:2")
    vectors = dict(layer.named_buffers())
    assert len(vectors) == 2
    for name, vector in vectors.items():
        assert torch.equal(found[name], vector)


def test_the_sums_of_a_codebook_are_copied(tmp_path):
    """Their vectors are averaged; a tensor of such a name alone is a weight."""
    for step in (10, 20):
        state = {}
        for name in ("vq.embed", "vq.cluster_size", "vq.embed_avg", "layer.embed_avg"):
            state[name] = torch.full((8, 4), float(step))
        torch.save({"state_dict": state}, tmp_path / f"step{step}.pt")
    made = Run(tmp_path).average("last:2")
    assert made["vq.embed"].mean() == made["layer.embed_avg"].mean() == 15
    assert made["vq.cluster_size"].mean() == made["vq.embed_avg"].mean() == 20


# --- two sets in files by epoch


def write(folder, **sets):
    """Write a file an epoch, with a set of tensors under each key."""
    for epoch, tensors in enumerate(zip(*sets.values(), strict=True), 1):
        content = dict(zip(sets, tensors, strict=True))
        store(folder / f"model_{epoch}.pt", content | {"epoch": epoch})
    return folder


WEIGHTS = [one.weights for one in saves()]
AVERAGES = [one.average for one in saves()]
STILL = [OTHER] * len(WEIGHTS)


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_the_set_that_moves_less_is_the_average(wrapper, files, caplog):
    """As in RoseTTAFold2, whose `model_state_dict` is the average, and DDIM with its wrapper."""
    averages = [named(wrapper, average) for average in AVERAGES]
    write(files, model_state_dict=averages, non_ema_state_dict=WEIGHTS)
    last = named(wrapper, LAST.weights)
    check(files, averages[-1], last, None, steps_per_epoch=EVERY)
    assert "the average is model_state_dict, which moves less" in caplog.text


@pytest.mark.parametrize(
    "sets",
    [
        {"model": WEIGHTS, "state": WEIGHTS},
        {"model": WEIGHTS, "reference": STILL},
        {"model": WEIGHTS, "best_model": AVERAGES},
    ],
)
def test_a_copy_or_a_set_that_never_moves_is_no_average(files, sets):
    found = read(write(files, **sets))
    assert found.counts == {"weights": 10}
    assert_equal(values_of(found.checkpoints[-1]), LAST.weights)


def test_two_models_that_move_alike_are_asked_about(files):
    write(files, model=WEIGHTS, twin=[*map(negated, WEIGHTS)])
    assert "neither follows the other: twin or model" in asked(files)
    assert read(files, kind="checkpoints").counts == {"weights": 10}


# --- other averages than those of a decay


def power(step):
    """Return (1 - 1/n)^(gamma + 1) of gamma 5.94, for the n-th update at every tenth step."""
    if step % 10:
        return 1.0
    return (1 - 10 / step) ** 6.94


def test_the_width_of_a_power_function_is_given(run, files):
    folder = trained.write(files, train(), by(power))
    import_checkpoints(folder, run, sigma_rels=[0.110967], update_every=10)
    found, predicted = error_of(Run(run))
    assert found < 2 * predicted < 0.04


def test_two_widths_of_one_average_are_refused(tmp_path):
    write_each(tmp_path, STEP, lambda save: {"model": save.weights, "ema": save.average})
    assert "sigma_rels: must be one, of the average in" in asked(tmp_path, sigma_rels=(0.1, 0.2))


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
    return {
        "model": weights,
        "ema_optimizer": states,
    }


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
    def content(save):
        sets = {"model": save.weights}
        if save.step > 160:
            sets["other"] = save.average
        return sets

    write_each(files, STEP, content, from_step_160)
    done = import_checkpoints(files, run, average="other")
    assert [*done.counts.values()] == [10, 6]
    check_error(run)


def test_the_state_of_random_numbers_among_the_weights_is_none_of_them(tmp_path):
    def content(save):
        return {**save.weights, "cuda_rng_state": torch.get_rng_state()}

    last = write_each(tmp_path, STEP, content)
    assert_equal(exported(last, weights=True), LAST.weights)
    assert Run(tmp_path).average(0.1).keys() == LAST.weights.keys()


State = namedtuple("State", ["params", "step", "ema_params"])


def test_sets_in_a_named_tuple_are_found(tmp_path):
    """As programs of JAX pickle their state."""
    for save in saves():
        weights = {name: value.numpy() for name, value in save.weights.items()}
        average = {name: value.numpy() for name, value in save.average.items()}
        state = State(weights, save.step, average)
        (tmp_path / f"{save.step}.pkl").write_bytes(pickle.dumps(state))
    check_last(tmp_path)
    check_last(tmp_path, average="2", weights="0")
