"""Layouts of public trainings: two sets of tensors, one of whose keys says that it is the
average."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import trained
from checkpoint_layouts import distributed
from ema_command import Ema
from safetensors.torch import load_file, save_file
from torch.nn import utils
from trained import STEPS, TIMES, Weights, by, ema, error_of, follow, named, train

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.profiles import Point

DECAY = 0.99


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + name: value for name, value in weights.items()}


def optimizer(weights: Weights) -> dict[str, Any]:
    states = {}
    for index, value in enumerate(weights.values()):
        zeros = torch.zeros_like(value)
        states[index] = {"exp_avg": zeros, "step": 3}
    return {"state": states}


def dit(weights, average):
    return {
        "model": weights,
        "ema": average,
        "opt": optimizer(weights),
        "args": {"model": "DiT-XL/2"},
    }


def self_forcing(weights, average):
    return {
        "generator": weights,
        "critic": named(train()[7]),
        "generator_ema": average,
    }


def cosmos_predict2(weights, average):
    return prefixed("net.", weights) | prefixed("net_ema.", average)


def mar(weights, average):
    return {"model": weights, "model_ema": average, "epoch": 3}


def torchtitan(weights, average):
    states = {f"state.{name}.ema_params": value for name, value in average.items()}
    return {"model": weights, "ema_optimizer": states}


LAYOUTS = [dit, self_forcing, cosmos_predict2, mar, torchtitan]
"""The content of a file, from the weights and their average."""

FOLDERS = {
    "guided-diffusion": ("ema_0.99_{:06}.pt", "model{:06}.pt"),
    "two files": ("ema_{:06}.safetensors", "model_{:06}.safetensors"),
    "two files of a folder": ("{:07}/ema.safetensors", "{:07}/model.safetensors"),
    "a folder next to a file": ("{:07}/ema/model.safetensors", "{:07}/model.safetensors"),
    "two folders": ("{:07}/model_ema/model.safetensors", "{:07}/model/model.safetensors"),
}
"""Places of the average and of the weights of a step."""


@functools.cache
def stored() -> list[tuple[int, Weights, Weights]]:
    """Return three steps, the weights of a real training and their EMA, both in float32."""
    averages = follow(ema(DECAY))
    found = []
    for step in TIMES[-3:]:
        weights = named(train()[step - 1])
        average = named(averages[step - 1])
        found.append((step, weights, average))
    return found


def write(folder: Path, content: Callable[[Weights, Weights], dict[str, Any]]) -> Path:
    """Write the checkpoints of a training as files."""
    folder.mkdir()
    for step, weights, average in stored():
        torch.save(content(weights, average), folder / f"{step:07}.pt")
    return folder


def write_folders(folder: Path, layout: str) -> Path:
    place_of_average, place_of_weights = FOLDERS[layout]
    for step, weights, average in stored():
        save(average, folder / place_of_average.format(step))
        save(weights, folder / place_of_weights.format(step))
        if layout == "guided-diffusion":
            torch.save(optimizer(average), folder / f"opt{step:06}.pt")
    return folder


def save(values: Weights, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        save_file(values, file)
    else:
        torch.save(values, file)


def check(folder, **settings):
    """Import checkpoints; the run then holds these averages, each with its decay, and the weights
    if it has any."""
    out = folder.with_name("imported")
    done = import_checkpoints(folder, out, overwrite=True, **settings)
    averages = {step: average for step, _, average in stored()}
    raw = {step: weights for step, weights, _ in stored()}
    for one in done.checkpoints:
        found = {name: one.tensor(name) for name in one.entries}
        expected = raw if isinstance(one.profile, Point) else averages
        assert_equal(found, expected[one.step])
    counts = done.counts
    assert counts["EMA of decay 0.99"] == len(averages)
    assert counts["weights"] in (0, len(raw))


def exported(ema: Ema, source: Path, *options: object) -> Weights:
    out = source.parent / "exported.safetensors"
    assert ema("export", source, "--out", out, "--force", *options).code == 0
    return load_file(out)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("content", LAYOUTS)
def test_keys_say_which_set_is_the_average(content, run, ema):
    """It is imported, and exported from a file."""
    write(run, content)
    check(run, ema_decay=DECAY)
    file = run / f"{STEPS:07}.pt"
    _, weights, average = stored()[-1]
    assert_equal(exported(ema, file), average)
    assert_equal(exported(ema, file, "--weights"), weights)


@pytest.mark.parametrize("content", LAYOUTS)
def test_keys_say_it_in_a_folder_of_torch_distributed(content, run, ema):
    _, weights, average = stored()[-1]
    distributed(run, content(weights, average))
    assert_equal(exported(ema, run), average)
    assert_equal(exported(ema, run, "--weights"), weights)


@pytest.mark.parametrize("layout", FOLDERS)
def test_names_say_which_set_is_the_average(layout, run, ema):
    write_folders(run, layout)
    check(run, ema_decay=DECAY)
    place, _ = FOLDERS[layout]
    name = Path(place.format(STEPS)).parts[0]
    _, _, average = stored()[-1]
    assert_equal(exported(ema, run / name), average)


def test_names_of_guided_diffusion_say_the_decay(run):
    write_folders(run, "guided-diffusion")
    check(run)


def test_of_files_with_two_decays_one_is_chosen(run, tmp_path, ema):
    write_folders(run, "guided-diffusion")
    other = named(train()[0])
    for step, *_ in stored():
        torch.save(other, run / f"ema_0.5_{step:06}.pt")
    done = ema("import", run, "--out", tmp_path / "0")
    assert done.code == 2
    reason = "--ema-decay: must be given: the files are of several averages, 0.5 or 0.99"
    assert reason in done.error
    check(run, ema_decay=DECAY)
    for one in Run(tmp_path / "imported").sources:
        assert one.path.name.startswith(("ema_0.99", "model001"))


def ema_alone(_, average):
    return {"ema": average, "opt": optimizer(average)}


def model_ema_alone(_, average):
    return {"model_ema": average, "args": {"lr": 3}}


@pytest.mark.parametrize("content", [ema_alone, model_ema_alone])
def test_an_average_without_weights_is_not_taken_for_weights(content, run):
    write(run, content)
    reason = "holds EMAs, and neither their decay nor weights next to them"
    with pytest.raises(InvalidValueError, match=reason):
        _ = Run(run).sources
    check(run, ema_decay=DECAY)


def write_all(folder: Path, content: Any, decay: Any) -> Path:
    """Write all files of the training whose n-th update keeps decay(n)."""

    def form(_, weights, average):
        return content(weights, average)

    return trained.write(folder, train(), by(decay), form=form)


EXPONENT = 6.94
VARIANCE = EXPONENT / ((EXPONENT + 1) ** 2 * (EXPONENT + 2))
"""That of the power function of this gamma + 1, whose sigma_rel is 0.111."""


def power(step):
    """Return (1 - 1/n)^(gamma + 1), for the n-th update at every tenth step."""
    if step % 10:
        return 1.0
    return (1 - 10 / step) ** EXPONENT


def test_the_width_of_a_power_function_is_given(run, files, ema):
    folder = write_all(files, dit, power)
    options = ("--sigma-rels", VARIANCE**0.5, "--update-every", 10)
    assert ema("import", folder, "--out", run, *options).code == 0
    for wanted in (0.08, 0.15):
        found, predicted = error_of(Run(run), wanted)
        assert found < 2 * predicted < 0.04


def test_two_widths_of_one_average_are_refused(run, tmp_path):
    write(run, dit)
    with pytest.raises(InvalidValueError, match="sigma_rels: must be one, of the average in"):
        import_checkpoints(run, tmp_path / "never", sigma_rels=(0.1, 0.2))


def constant(_):
    return DECAY


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


TITAN = [
    ({"ema_decay": DECAY}, constant),
    ({"ema_decay": "half-life:10%"}, of_a_tenth),
    ({"update_every": 7, "update_after_step": 50}, started_late),
]
"""Settings of torchtitan, and the average; its default half-life is 5 % of the training."""


@pytest.mark.parametrize(("settings", "decay"), TITAN)
def test_settings_of_torchtitan_are_given(settings, decay, run, files):
    folder = write_all(files, torchtitan, decay)
    import_checkpoints(folder, run, kind="torchtitan", **settings)
    found, predicted = error_of(Run(run))
    assert found < 2 * predicted < 0.04


def test_one_of_two_averages_is_chosen(run):
    write(run, lambda w, a: {"model": w, "model_ema1": a, "model_ema2": w})
    check(run, ema_decay=DECAY, average="model_ema1")


def test_the_weights_of_an_average_are_asked_for(run, tmp_path, ema):
    write(run, lambda w, a: {"one": w, "other": w, "ema": a})
    new = tmp_path / "new"
    with pytest.raises(FileFormatError, match="model is unclear: 'one', 'other'"):
        import_checkpoints(run, new)
    assert ema("import", run, "--out", new, "--weights", "one").code == 0


def test_sets_whose_keys_have_no_word_are_asked_for(run):
    write(run, lambda w, a: {"first": w, "second": a, "third": w})
    with pytest.raises(FileFormatError, match="unclear"):
        Run(run).average(0.15)
    check(run, ema_decay=DECAY, average="second", weights="first")


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


COUNTER = {"bn.num_batches_tracked": torch.tensor(3)}


@pytest.fixture(params=["file", "folder"])
def of_two_averages(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return a checkpoint as of JiT and MAR, which store two averages of which no word says the
    better one."""
    content = {
        "model": named(train()[-1]) | COUNTER,
        "model_ema1": named(train()[10]),
        "model_ema2": named(train()[20]),
    }
    place = tmp_path / "last.pth"
    if request.param == "folder":
        distributed(place, content)
    else:
        torch.save(content, place)
    return place


def test_an_average_among_several_is_exported_by_its_key_or_glob(of_two_averages, ema):
    """The statistics that an average lacks are added."""
    for key, index in (("model_ema1", 10), ("*2", 20)):
        found = exported(ema, of_two_averages, "--average", key)
        average = named(train()[index])
        assert_equal(found, average | COUNTER)


def test_which_average_is_exported_is_asked_for(of_two_averages, tmp_path, ema):
    command = ("export", of_two_averages, "--out", tmp_path / "never.safetensors")
    sets = "'model_ema1', 'model_ema2'"
    assert f"unclear: {sets}; name the average by --average" in ema(*command).error
    reason = f"has no set of tensors 'elsewhere': 'model', {sets}"
    assert reason in ema(*command, "--average", "elsewhere").error
    assert "has several" in ema(*command, "--average", "*").error


def test_an_average_is_exported_by_its_prefix(tmp_path, ema):
    average = named(train()[10])
    weights = named(train()[-1])
    content = prefixed("net.", weights) | prefixed("net_mean.", average)
    file = tmp_path / "last.safetensors"
    save_file(content, file)
    found = exported(ema, file, "--average", "net_mean.")
    assert_equal(found, average)


def test_a_checkpoint_without_an_average_is_not_exported_as_one(tmp_path, ema):
    """A set with another purpose has one name of the weights."""
    file = tmp_path / "last.pt"
    out = tmp_path / "model.safetensors"
    weights = named(train()[-1])
    other = {"0.weight": weights["0.weight"]}
    torch.save({"model": weights, "ema": other}, file)
    refused = ema("export", file, "--out", out)
    assert refused.code == 2
    reason = "holds no average that its keys name ('model', 'ema'); name its key by --average"
    assert f"last.pt: {reason}" in refused.err
    assert not out.exists()


def test_an_average_alone_is_exported(tmp_path, ema):
    file = tmp_path / "alone.pt"
    average = named(train()[-1])
    torch.save({"ema": average, "step": 3}, file)
    assert_equal(exported(ema, file), average)
