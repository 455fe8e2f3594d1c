"""Layouts of public trainings: two sets of tensors, one of whose keys says that it is the
average."""

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import distributed
from ema_command import Ema
from safetensors.torch import load_file, save_file
from trained import STEPS, TIMES, Average, Weights, by, ema, error_of, follow, named, train
from trained import write as write_all

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.profiles import Point

DECAY = 0.99


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def optimizer(weights: Weights) -> dict[str, Any]:
    return {
        "state": {
            i: {"exp_avg": torch.zeros_like(v), "step": 3} for i, v in enumerate(weights.values())
        }
    }


LAYOUTS: dict[str, Callable[[Weights, Weights], dict[str, Any]]] = {
    "DiT, SiT": lambda w, a: {
        "model": w,
        "ema": a,
        "opt": optimizer(w),
        "args": {"model": "DiT-XL/2"},
    },
    "Self-Forcing": lambda w, a: {
        "generator": w,
        "critic": named(train()[7]),
        "generator_ema": a,
    },
    "Cosmos-Predict2": lambda w, a: prefixed("net.", w) | prefixed("net_ema.", a),
    "MAR": lambda w, a: {"model": w, "model_ema": a, "epoch": 3},
    "torchtitan": lambda w, a: {
        "model": w,
        "ema_optimizer": {f"state.{n}.ema_params": v for n, v in a.items()},
    },
}

FOLDERS: dict[str, tuple[str, str]] = {
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
    return [(step, named(train()[step - 1]), named(averages[step - 1])) for step in TIMES[-3:]]


def write(folder: Path, content: Callable[[Weights, Weights], dict[str, Any]]) -> Path:
    """Write the checkpoints of a training as files."""
    folder.mkdir()
    for step, weights, average in stored():
        torch.save(content(weights, average), folder / f"{step:07}.pt")
    return folder


def write_folders(folder: Path, layout: str) -> Path:
    for step, weights, average in stored():
        for place, values in zip(FOLDERS[layout], (average, weights), strict=True):
            file = folder / place.format(step)
            file.parent.mkdir(parents=True, exist_ok=True)
            (save_file if file.suffix == ".safetensors" else torch.save)(values, file)
        if layout == "guided-diffusion":
            torch.save(optimizer(average), folder / f"opt{step:06}.pt")
    return folder


def check(folder: Path, **settings: Any) -> None:
    """Import checkpoints; the run then holds these averages, each with its decay, and the weights
    if it has any."""
    done = import_checkpoints(folder, folder.with_name("imported"), overwrite=True, **settings)
    expected = {step: (average, weights) for step, weights, average in stored()}
    for one in done.checkpoints:
        found = {name: one.tensor(name) for name in one.entries}
        assert_equal(found, expected[one.step][isinstance(one.profile, Point)])
    assert done.counts[f"EMA of decay {DECAY}"] == len(expected)
    assert done.counts["weights"] in (0, len(expected))


def exported(ema: Ema, source: Path, *options: object) -> Weights:
    out = source.parent / "exported.safetensors"
    assert ema("export", source, "--out", out, "--force", *options).code == 0
    return load_file(out)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", [*LAYOUTS, *FOLDERS])
def test_keys_and_names_say_which_set_is_the_average(layout: str, tmp_path: Path, ema: Ema) -> None:
    """It is imported, and exported from one file and from a folder of
    torch.distributed.checkpoint."""
    folder, (_, weights, average) = tmp_path / "run", stored()[-1]
    if layout in LAYOUTS:
        write(folder, LAYOUTS[layout])
        check(folder, ema_decay=DECAY)
        distributed(tmp_path / "last", LAYOUTS[layout](weights, average))
        for source in (folder / f"{STEPS:07}.pt", tmp_path / "last"):
            assert_equal(exported(ema, source), average)
            assert_equal(exported(ema, source, "--weights"), weights)
        return
    write_folders(folder, layout)
    # in which names say it
    for settings in ({}, {"ema_decay": DECAY})[layout != "guided-diffusion" :]:
        check(folder, **settings)
    newest = max(path for path in folder.iterdir() if not path.name.startswith(("model", "opt")))
    assert_equal(exported(ema, newest), average)


def test_of_files_with_two_decays_one_is_chosen(tmp_path: Path, ema: Ema) -> None:
    folder = write_folders(tmp_path / "run", "guided-diffusion")
    for step, *_ in stored():
        torch.save(named(train()[0]), folder / f"ema_0.5_{step:06}.pt")  # another average
    done = ema("import", folder, "--out", tmp_path / "0")
    assert done.code == 2
    assert (
        "--ema-decay: must be given: the files are of several averages, 0.5 or 0.99" in done.error
    )
    check(folder, ema_decay=DECAY)
    assert {one.path.name[:8] for one in Run(tmp_path / "imported").sources} == {
        "ema_0.99",
        "model001",
    }


@pytest.mark.parametrize(
    "content",
    [lambda a: {"ema": a, "opt": optimizer(a)}, lambda a: {"model_ema": a, "args": {"lr": 3}}],
)
def test_an_average_without_weights_is_not_taken_for_weights(content: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", lambda _, average: content(average))
    with pytest.raises(
        InvalidValueError, match="holds EMAs, and neither their decay nor weights next to them"
    ):
        _ = Run(folder).sources
    check(folder, ema_decay=DECAY)


def test_the_width_of_a_power_function_is_given(tmp_path: Path, ema: Ema) -> None:
    """The n-th update keeps (1 - 1/n)^(gamma + 1), for gamma + 1 = 6.94 of sigma_rel 0.111."""
    every = 10
    exponent = 6.94
    width = math.sqrt(exponent) / ((exponent + 1) * math.sqrt(exponent + 2))
    update = by(lambda step: 1.0 if step % every else (1 - every / step) ** exponent)
    folder = write_all(
        tmp_path / "run", train(), update, form=lambda _, *sets: LAYOUTS["DiT, SiT"](*sets)
    )
    with pytest.raises(InvalidValueError, match="sigma_rels: must be one, of the average in"):
        import_checkpoints(folder, tmp_path / "never", sigma_rels=(0.1, 0.2))
    options = ("--sigma-rels", width, "--update-every", every, "--out", tmp_path / "imported")
    assert ema("import", folder, *options).code == 0
    for wanted in (0.08, 0.15):
        found, predicted = error_of(Run(tmp_path / "imported"), wanted)
        assert found < 2 * predicted < 0.04


def started_late(step: int) -> float:
    """Return the decay of an update at step 50 and every 7 steps after, with a half-life of 5 % of
    the updates."""
    updates, rest = divmod(step - 50, 7)
    return 1.0 if rest or step < 50 else 2 ** (-1 / (0.05 * updates)) if updates else 0.0


TITAN: list[tuple[dict[str, Any], Average]] = [
    ({"ema_decay": DECAY}, ema(DECAY)),
    ({"ema_decay": "half-life:10%"}, by(lambda step: 2 ** (-1 / (0.1 * step)))),
    ({"update_every": 7, "update_after_step": 50}, by(started_late)),
]
"""Settings of torchtitan, and the average; its default half-life is 5 % of the training."""


@pytest.mark.parametrize(("settings", "update"), TITAN)
def test_settings_of_torchtitan_are_given(
    settings: dict[str, Any],
    update: Average,
    tmp_path: Path,
) -> None:
    folder = write_all(
        tmp_path / "run", train(), update, form=lambda _, *sets: LAYOUTS["torchtitan"](*sets)
    )
    import_checkpoints(folder, tmp_path / "imported", kind="torchtitan", **settings)
    found, predicted = error_of(Run(tmp_path / "imported"))
    assert found < 2 * predicted < 0.04


def test_which_set_is_meant_is_asked_where_two_or_none_have_a_word(
    tmp_path: Path,
    ema: Ema,
) -> None:
    two = write(tmp_path / "two", lambda w, a: {"model": w, "model_ema1": a, "model_ema2": w})
    check(two, ema_decay=DECAY, average="model_ema1")
    students = write(tmp_path / "students", lambda w, a: {"one": w, "other": w, "ema": a})
    with pytest.raises(FileFormatError, match="model is unclear: 'one', 'other'"):
        import_checkpoints(students, tmp_path / "again")
    assert ema("import", students, "--out", tmp_path / "again", "--weights", "one").code == 0
    folder = write(tmp_path / "run", lambda w, a: {"first": w, "second": a, "third": w})
    with pytest.raises(FileFormatError, match="unclear"):
        Run(folder).average(0.15)
    check(folder, ema_decay=DECAY, average="second", weights="first")


LAYERS = [*map("layer{}.weight".format, range(6)), "ema.weight", "quantize.embed_avg"]


def test_sets_that_are_not_used_are_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
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
    import_checkpoints(tmp_path, tmp_path / "masters", **place)
    last = Run(tmp_path / "masters").sources[-1].values("net.w", 0, 3)
    assert last.tolist() == [40.25, 41.25, 42.25]


def test_quantised_weights_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (10, 20):
        content = {
            "scale": torch.full((9, 9), step / 10),
            "mask": torch.ones(80, dtype=torch.uint8),
        }
        torch.save(content, tmp_path / f"plain{step}.pt")
        content["codes"] = torch.full((9, 9), step, dtype=torch.int8)
        torch.save(content, tmp_path / f"quantised{step}.pt")
    Run(tmp_path / "plain*.pt").average(0.2)
    assert "quantised" not in caplog.text
    Run(tmp_path / "quantised*.pt").average(0.2)
    assert "most elements are integers, copied from the newest: quantised weights" in caplog.text


@pytest.mark.parametrize("names", [LAYERS, ["weight_g", "weight_v"], ["weight_orig", "weight_u"]])
def test_names_that_look_like_another_thing(names: list[str], tmp_path: Path) -> None:
    """A layer named `ema` next to others is no average of the model; the states of Megatron's
    chained optimizers are no weights; weight norm's direction, and a lone tensor, of a name like
    that of spectral norm's vector, are averaged.
    """
    for step in (10, 20):
        content = {name: torch.full((4, 5), float(step)) for name in names}
        torch.save(
            content | {"chained_0.optimizer.state.exp_avg.w": torch.ones(4)},
            tmp_path / f"step{step}.pt",
        )
    found = Run(tmp_path).average(0.2)
    assert found.keys() == set(names)
    assert all(10 < float(value[0, 0]) < 20 for value in found.values())


@pytest.mark.parametrize(
    "norm", [torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.spectral_norm]
)
def test_the_vectors_of_spectral_norm_are_copied(
    norm: Callable[..., torch.nn.Module],
    tmp_path: Path,
) -> None:
    layer = norm(torch.nn.Linear(5, 4))
    for step in (10, 20):
        for buffer in layer.buffers():
            buffer.copy_(torch.nn.functional.normalize(torch.randn(len(buffer)), dim=0))
        torch.save({"model": layer.state_dict()}, tmp_path / f"step{step}.pt")
    found = Run(tmp_path).average(0.2)
    vectors = dict(layer.named_buffers())
    assert found.keys() == layer.state_dict().keys() and len(vectors) == 2
    assert all(torch.equal(found[name], vector) for name, vector in vectors.items())


def test_the_sums_of_a_codebook_are_copied(tmp_path: Path) -> None:
    """Their vectors are averaged; a tensor of such a name alone is a weight."""
    for step in range(10, 70, 10):
        codebook = {
            "vq.embed": torch.full((8, 4), 1 + step / 1000),
            "vq.cluster_size": torch.arange(8.0) * step**2,
            "vq.embed_avg": torch.full((8, 4), 1e6 * step),
            "layer.embed_avg": torch.full((3,), 1 + step / 1000),
        }
        torch.save({"state_dict": codebook}, tmp_path / f"step{step}.pt")
    made = Run(tmp_path).average(0.2)
    assert (made.predicted_error or 1.0) < 0.01
    assert torch.equal(made["vq.cluster_size"], codebook["vq.cluster_size"])
    assert torch.equal(made["vq.embed_avg"], codebook["vq.embed_avg"])
    for name in ("vq.embed", "layer.embed_avg"):
        assert 1.01 < made[name].flatten()[0] < 1.06


@pytest.mark.parametrize("is_folder", [False, True])
def test_an_average_among_several_is_exported_by_its_key_or_glob(
    is_folder: bool,
    tmp_path: Path,
    ema: Ema,
) -> None:
    """JiT and MAR store two, of which no word says the better one; the statistics that an average
    lacks are added."""
    weights, first, second = (named(train()[index]) for index in (-1, 10, 20))
    counter = {"bn.num_batches_tracked": torch.tensor(3)}
    content = {"model": weights | counter, "model_ema1": first, "model_ema2": second}
    source = tmp_path / "last.pth"
    distributed(source, content) if is_folder else torch.save(content, source)
    assert_equal(exported(ema, source, "--average", "model_ema1"), first | counter)
    assert_equal(exported(ema, source, "--average", "*2"), second | counter)
    never = "export", source, "--out", tmp_path / "never.safetensors"
    named_sets = "'model_ema1', 'model_ema2'"
    assert f"unclear: {named_sets}; name the average by --average" in ema(*never).error
    reason = f"has no set of tensors 'elsewhere': 'model', {named_sets}"
    assert reason in ema(*never, "--average", "elsewhere").error
    assert "has several" in ema(*never, "--average", "*").error


def test_an_average_is_exported_by_its_prefix(tmp_path: Path, ema: Ema) -> None:
    sets = prefixed("net.", named(train()[-1])) | prefixed("net_mean.", named(train()[10]))
    save_file(sets, tmp_path / "last.safetensors")
    found = exported(ema, tmp_path / "last.safetensors", "--average", "net_mean.")
    assert_equal(found, named(train()[10]))


def test_a_checkpoint_without_an_average_is_not_exported_as_one(tmp_path: Path, ema: Ema) -> None:
    weights = named(train()[-1])  # of which a set with another purpose has one name
    torch.save({"model": weights, "ema": dict([*weights.items()][:1])}, tmp_path / "last.pt")
    refused = ema("export", tmp_path / "last.pt", "--out", tmp_path / "model.safetensors")
    assert refused.code == 2
    assert (
        "last.pt: holds no average that its keys name ('model', 'ema'); name its key by --average"
        in refused.err
    )
    assert not (tmp_path / "model.safetensors").exists()
    torch.save({"ema": named(train()[-1]), "step": 3}, tmp_path / "alone.pt")
    assert_equal(exported(ema, tmp_path / "alone.pt"), named(train()[-1]))
