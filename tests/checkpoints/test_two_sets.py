"""Which of a file's sets of tensors is the average: what names and values say, what is asked for,
and what a user then names."""

import pickle
import shlex
from collections import namedtuple

import numpy as np
import pytest
import torch
from checking import refused
from checkpoint_layouts import distributed
from saved import (
    asked,
    assert_equal,
    check,
    check_error,
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
from walks import EVERY, copied, saves

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError

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
    ({"emas": {"0.95": AVERAGE, "0.99": OTHER}}, "emas.0.95", "emas.0.99"),
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
    with refused(file, f"'{key}", f"'{other}"):
        exported(file)
    assert_equal(exported(file, average=key), AVERAGE)
    assert_equal(exported(file, average=other), OTHER)


def test_two_files_whose_names_differ_in_a_decay_are_two_averages(tmp_path):
    store(tmp_path / "model.pt", LAST.weights)
    store(tmp_path / "ema_0.95.pt", AVERAGE)
    store(tmp_path / "ema_0.99.pt", OTHER)
    with refused(tmp_path, "'ema_0.95'", "'ema_0.99'"):
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
    assert_equal(exported(file, raw=True), LAST.weights)
    check_error(tmp_path, most=0.1)


def test_sets_that_no_word_tells_apart_are_asked_for(tmp_path):
    def content(save):
        return {
            "one": save.weights,
            "other": save.weights,
            "ema": save.average,
        }

    write_each(tmp_path, STEP, content)
    said = asked(tmp_path, ema_decay=0.95, ema_warmup="none")
    assert said.endswith(" --ema-decay 0.95 --ema-warmup none --weights one --out run")
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
    with refused(place, "'model_ema1'", "'model_ema2'"):
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
    assert_equal(exported(file, average="slower"), negated(AVERAGE))
    check_last(tmp_path, average="state_dict", weights="current_model_state")
    with refused(tmp_path / "step120.pt", "'nowhere'", kind=FileFormatError):
        read(tmp_path, weights="nowhere")


# --- what no word says


def twin_critics(save):
    other = saves()[-save.epoch].weights
    return named("critic.", save.weights) | named("critic_b.", other)


def a_copy_of_the_begin(save):
    return named("net.", save.weights) | named("net_init.", copied(OTHER))


def two_towers(save):
    """Make two networks of one start, of which one has gone a third as far its own way."""
    noise = torch.Generator().manual_seed(2)
    other = copied(OTHER)
    for _ in range(save.epoch):
        for value in other.values():
            value += 0.008 * torch.randn(value.shape, generator=noise)
    return named("query.", save.weights) | named("passage.", other)


def a_small_layer(save):
    body = {f"body.{number}.weight": torch.ones(9, number) for number in range(1, 16)}
    return {
        **body,
        "head.weight": save.weights["head.weight"],
        "head_aux.weight": save.average["head.weight"],
    }


@pytest.mark.parametrize("model", [twin_critics, a_copy_of_the_begin, two_towers, a_small_layer])
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
def test_buffers_of_mmcv_are_asked_about(content, average, weights, tmp_path):
    """The command proposes the two sets in the order in which they move as an average does."""
    file = write_each(tmp_path, "iter_{save.step}.pth", content)
    said = asked(tmp_path, ema_decay=0.95, ema_warmup="none")
    sets = shlex.join(["--average", average, "--weights", weights])
    assert said.endswith(f" --ema-decay 0.95 --ema-warmup none {sets} --out run")
    check_last(tmp_path, average=average, weights=weights)
    with refused(file):
        exported(file)


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
    assert "'extra.deep.ema', not used" in caplog.text
    check(tmp_path, AVERAGE | TEXT, LAST.weights | TEXT, None, average="deep.ema")


def test_an_average_of_numpy_arrays_is_named_which_cannot_be_read(tmp_path, caplog):
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
    assert "'ema', 'ema_vector (one tensor)', not used" in caplog.text
    with refused(tmp_path / "step5.pt", "numpy.", kind=FileFormatError):
        read(tmp_path, average="ema")


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
    assert "unrelated" in caplog.text
    assert_equal(exported(file, average="target_encoder"), towers["target_encoder"])


def scaled(tensors, factor):
    return {name: factor * value for name, value in tensors.items()}


def a_second_encoder(save):
    return {"encoder": save.weights, "target_encoder": negated(save.weights)}


def a_long_average(save):
    """Return weights that grow evenly from 0, and what an average of 4,000 steps has of them."""
    t = save.step
    return {"encoder": scaled(OTHER, t), "target_encoder": scaled(OTHER, t**2 / 8000)}


@pytest.mark.parametrize("content", [a_second_encoder, a_long_average])
def test_a_set_that_is_far_from_the_weights_is_asked_about(content, tmp_path):
    """Whatever its name says, it may be a second network, or a long average."""

    def state(save):
        sets = content(save)
        encoder = named("encoder.", sets["encoder"])
        return {"state_dict": encoder | named("target_encoder.", sets["target_encoder"])}

    write_each(tmp_path, STEP, state)
    assert asked(tmp_path).endswith("--from checkpoints --out run")
    assert read(tmp_path, kind="checkpoints").counts == {"weights": len(saves())}


# --- averages without weights, and weights without averages


def test_an_average_without_weights_is_not_taken_for_weights(tmp_path):
    write_each(tmp_path, STEP, lambda save: {"ema": save.average, "args": {"lr": 3}})
    with refused("ema_decay"):
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
    done = ema("export", file, "--out", out)
    assert done.code == 2
    assert "last.pt: none of its keys" in done.error
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
    assert "'model.frozen', 'discriminator', not used" in caplog.text
    (source,) = read(tmp_path, weights="optimizer.master", kind="checkpoints").checkpoints
    assert source.values("net.w", 0, 3).tolist() == [0.25, 1.25, 2.25]


def test_weights_of_8_bit_floats_are_refused(tmp_path):
    file = tmp_path / "step10.pt"
    content = {"a.weight": torch.ones(9).to(torch.float8_e4m3fn), "b": torch.ones(2)}
    torch.save(content, file)
    with refused(file, "'a.weight'", kind=FileFormatError):
        read(file)
    assert read(file, exclude="a.*").counts == {"weights": 1}


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
    """Their vectors are averaged, but not measured: errors are those of what is trained. A tensor
    of such a name alone is a weight."""
    for step in (10, 20):
        state = {}
        for name in ("vq.embed", "vq.cluster_size", "vq.embed_avg", "layer.embed_avg"):
            state[name] = torch.full((8, 4), float(step))
        torch.save({"state_dict": state}, tmp_path / f"step{step}.pt")
    run = Run(tmp_path)
    made = run.average("last:2")
    assert run.sources[0].averaged == ["layer.embed_avg"]
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


def test_of_two_sets_the_one_that_moves_less_is_proposed_as_the_average(files):
    """As in RoseTTAFold2, whose `model_state_dict` is the average."""
    write(files, model_state_dict=AVERAGES, non_ema_state_dict=WEIGHTS)
    given = {"ema_decay": 0.95, "ema_warmup": "none", "steps_per_epoch": EVERY}
    said = asked(files, **given)
    assert said.endswith(" --average model_state_dict --weights non_ema_state_dict --out run")
    sets = {"average": "model_state_dict", "weights": "non_ema_state_dict"}
    check_last(files, steps_per_epoch=EVERY, **sets)


def test_an_average_of_weights_that_are_noise_is_proposed_too(tmp_path):
    """Of training at a minimum: from file to file the average moves hardly towards the weights."""
    noise = torch.Generator().manual_seed(0)
    weights = average = torch.randn(40, 30, generator=noise)
    begin = weights
    for step in range(1, 2001):
        weights = begin + 0.1 * torch.randn(40, 30, generator=noise)
        average = average.lerp(weights, 0.01)
        if step % 200 == 0:
            sets = {"model": {"l.weight": weights}, "slow": {"l.weight": average}}
            store(tmp_path / f"step{step}.pt", {"step": step, **sets})
    assert asked(tmp_path).endswith(" --average slow --weights model --out run")


def test_two_networks_in_one_state_of_which_one_moves_less_are_asked_about(files):
    """As in stylegan2-pytorch's `GAN`, whose `GE` is the average of `G`; it was averaged again."""
    model = []
    for save in saves():
        other = negated(save.weights)
        sets = {"G": save.weights, "D": other, "GE": save.average, "D_aug": other}
        model.append({f"{key}.{name}": sets[key][name] for key in sets for name in save.weights})
    write(files, GAN=model)
    given = {"ema_decay": 0.95, "ema_warmup": "none", "steps_per_epoch": EVERY}
    assert asked(files, **given).endswith(" --average GAN.GE --weights GAN.G --out run")
    check_last(files, steps_per_epoch=EVERY, average="GAN.GE", weights="GAN.G")


@pytest.mark.parametrize(
    "sets",
    [
        {"model": WEIGHTS, "state": WEIGHTS},
        {"model": WEIGHTS, "reference": STILL},
        {"model": WEIGHTS, "best_model": AVERAGES},
        {"model": WEIGHTS, "twin": [*map(negated, WEIGHTS)]},
    ],
)
def test_a_copy_or_a_set_that_moves_otherwise_is_no_average(files, sets):
    found = read(write(files, **sets))
    assert found.counts == {"weights": 10}
    assert_equal(values_of(found.checkpoints[-1]), LAST.weights)


def test_a_set_that_never_moves_is_no_average_whatever_its_name_says(files, caplog):
    found = read(write(files, model=WEIGHTS, target=STILL))
    assert found.counts == {"weights": 10}
    assert "'target' never moves" in caplog.text


@pytest.mark.parametrize(
    "sets",
    [
        {"model": WEIGHTS, "ema": STILL},
        {"model": WEIGHTS, "target": STILL},
        {"state_dict": WEIGHTS, "ema_model": STILL},
    ],
)
def test_an_import_is_opened_as_it_was_found(files, run, sets):
    """An average that never moves was left out by the import, and used by a synthesis of it."""
    import_checkpoints(write(files, **sets), run)
    synthesized = Run(run).average(0.1)
    assert_equal(synthesized, Run(write(files.with_name("alone"), model=WEIGHTS)).average(0.1))


def test_two_widths_of_one_average_are_refused(tmp_path):
    write_each(tmp_path, STEP, lambda save: {"model": save.weights, "ema": save.average})
    with refused("sigma_rels"):
        read(tmp_path, sigma_rels=(0.1, 0.2))


def from_step_160(step):
    return 0.95 if step > 160 else 0.0


def test_an_average_that_is_named_may_have_begun_later(run, files):
    def content(save):
        sets = {"model": save.weights}
        if save.step > 160:
            sets["other"] = save.average
        return sets

    write_each(files, STEP, content, from_step_160)
    given = {"ema_decay": 0.95, "ema_warmup": "none", "update_after_step": 160}
    done = import_checkpoints(files, run, average="other", **given)
    assert [*done.counts.values()] == [10, 6]
    check_error(run)


def test_a_random_number_state_among_the_weights_is_left_out(tmp_path):
    def content(save):
        return {**save.weights, "cuda_rng_state": torch.get_rng_state()}

    last = write_each(tmp_path, STEP, content)
    assert_equal(exported(last, raw=True), LAST.weights)
    assert Run(tmp_path).average(0.1).keys() == LAST.weights.keys()


State = namedtuple("State", ["params", "step", "ema_params"])


def test_sets_in_a_named_tuple_have_numbers_as_keys(tmp_path):
    for save in saves():
        state = State(save.weights, save.step, save.average)
        (tmp_path / f"{save.step}.pkl").write_bytes(pickle.dumps(state))
    assert "'0', '2'" in asked(tmp_path)
    check_last(tmp_path, average="2", weights="0")
