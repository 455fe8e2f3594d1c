"""Layouts of public trainings: two sets of tensors, one of whose keys says that it is the average."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import distributed
from ema_command import Ema
from safetensors.torch import load_file, save_file
from trained import STEPS, TIMES, ema, error_of, named, train

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError

DECAY = 0.99
Weights = dict[str, torch.Tensor]


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def optimizer(weights: Weights) -> dict[str, Any]:
    return {"state": {i: {"exp_avg": torch.zeros_like(v), "step": 3} for i, v in enumerate(weights.values())}}


LAYOUTS: dict[str, Callable[[Weights, Weights], dict[str, Any]]] = {
    "DiT, SiT": lambda w, a: {"model": w, "ema": a, "opt": optimizer(w), "args": {"model": "DiT-XL/2"}},
    "Self-Forcing": lambda w, a: {"generator": w, "critic": named(train(seed=7)[-1]), "generator_ema": a},
    "Cosmos-Predict2": lambda w, a: prefixed("net.", w) | prefixed("net_ema.", a),
    "in a state dict": lambda w, a: {"state_dict": prefixed("model.", w) | prefixed("averaged_model.", a)},
    "MAR": lambda w, a: {"model": w, "model_ema": a, "epoch": 3},
    "shadow": lambda w, a: {"weights": w, "shadow": a},
}


def write(folder: Path, content: Callable[[Weights, Weights], dict[str, Any]]) -> Path:
    """Write the checkpoints of a real training with an EMA of its weights, both in float32."""
    folder.mkdir()
    path = train()
    average = path[0].copy()
    for step in range(1, STEPS + 1):
        average = ema(DECAY)(step, average, path[step - 1])
        if step in TIMES:
            torch.save(content(named(path[step - 1]), named(average)), folder / f"{step:07}.pt")
    return folder


FOLDERS: dict[str, tuple[str, str]] = {
    "guided-diffusion": ("ema_0.99_{:06}.pt", "model{:06}.pt"),
    "two files of a folder": ("{:07}/ema.safetensors", "{:07}/model.safetensors"),
    "a folder next to a file": ("{:07}/ema/model.safetensors", "{:07}/model.safetensors"),
    "two folders": ("{:07}/model_ema/model.safetensors", "{:07}/model/model.safetensors"),
}
"""Places of the average and of the weights of a step."""


def write_folders(folder: Path, layout: str) -> Path:
    path = train()
    average = path[0].copy()
    for step in range(1, STEPS + 1):
        average = ema(DECAY)(step, average, path[step - 1])
        for place, values in zip(FOLDERS[layout], (average, path[step - 1]), strict=True):
            if step in TIMES:
                file = folder / place.format(step)
                file.parent.mkdir(parents=True, exist_ok=True)
                (save_file if file.suffix == ".safetensors" else torch.save)(named(values), file)
        if layout == "guided-diffusion" and step in TIMES:
            torch.save(optimizer(named(average)), folder / f"opt{step:06}.pt")
    return folder


@pytest.mark.parametrize("layout", FOLDERS)
def test_names_of_files_and_folders_say_which_is_the_average(layout: str, tmp_path: Path, ema: Ema) -> None:
    folder = write_folders(tmp_path / "run", layout)
    for settings in ({}, {"ema_decay": DECAY})[layout != "guided-diffusion" :]:  # in which names say it
        done = import_checkpoints(folder, tmp_path / f"imported {len(settings)}", **settings)
        assert done.counts == {f"EMA of decay {DECAY}": len(TIMES), "weights": len(TIMES)}
        found, predicted = error_of(Run(tmp_path / f"imported {len(settings)}"))
        assert found < 2 * predicted < 0.04
    newest = max(path for path in folder.iterdir() if not path.name.startswith(("model", "opt")))
    assert ema("export", newest, "--out", tmp_path / "one.safetensors").code == 0
    stored = folder / FOLDERS[layout][0].format(STEPS)
    expected = load_file(stored) if stored.suffix == ".safetensors" else torch.load(stored)
    exported = load_file(tmp_path / "one.safetensors")
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)


def test_of_files_with_two_decays_one_is_chosen(tmp_path: Path, ema: Ema) -> None:
    folder = write_folders(tmp_path / "run", "guided-diffusion")
    for step in TIMES:
        torch.save(named(train()[0]), folder / f"ema_0.5_{step:06}.pt")  # another average
    done = ema("import", folder, "--out", tmp_path / "0")
    assert done.code == 2
    assert "--ema-decay: must be given: the files are of several averages, 0.5 or 0.99" in done.error
    assert ema("import", folder, "--ema-decay", DECAY, "--out", tmp_path / "1").code == 0
    assert {one.path.name[:8] for one in Run(tmp_path / "1").sources} == {"ema_0.99", "model000", "model001"}
    found, predicted = error_of(Run(tmp_path / "1"))
    assert found < 2 * predicted < 0.04


@pytest.mark.parametrize(
    "content", [lambda a: {"ema": a, "opt": optimizer(a)}, lambda a: {"model_ema": a, "args": {"lr": 3}}]
)
def test_an_average_without_weights_is_not_taken_for_weights(content: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", lambda _, average: content(average))
    with pytest.raises(InvalidValueError, match="holds EMAs, and neither their decay nor weights next to them"):
        _ = Run(folder).sources
    import_checkpoints(folder, tmp_path / "imported", ema_decay=DECAY)
    found, predicted = error_of(Run(tmp_path / "imported"))
    assert found < 2 * predicted < 0.2


@pytest.mark.parametrize("every", [1, 10])
def test_the_width_of_a_power_function_is_given(every: int, tmp_path: Path, ema: Ema) -> None:
    """The n-th update keeps (1 - 1/n)^(gamma + 1), for gamma + 1 = 6.94 of sigma_rel 0.111."""
    (folder := tmp_path / "run").mkdir()
    path, exponent = train(), 6.94
    width = math.sqrt(exponent) / ((exponent + 1) * math.sqrt(exponent + 2))
    average = path[0].copy()
    for step in range(1, STEPS + 1):
        if step % every == 0:
            kept = (1 - every / step) ** exponent
            average = kept * average + (1 - kept) * path[step - 1]
        if step in TIMES:
            torch.save({"model": named(path[step - 1]), "ema": named(average)}, folder / f"{step:07}.pt")
    with pytest.raises(InvalidValueError, match=r"sigma_rels '0.1', '0.2': must be one, of the average in"):
        import_checkpoints(folder, tmp_path / "never", sigma_rels=(0.1, 0.2))
    options = ("--sigma-rels", width, "--update-every", every, "--out", tmp_path / "imported")
    assert ema("import", folder, *options).code == 0
    for wanted in (0.08, 0.15):
        found, predicted = error_of(Run(tmp_path / "imported"), wanted)
        assert found < 2 * predicted < 0.04


@pytest.mark.parametrize("decay", [DECAY, "half-life:10%"])
def test_torchtitans_decay_is_given(decay: float | str, tmp_path: Path) -> None:
    """Its default half-life is 5 % of the training; a fixed decay begins with the weights before the first step."""
    (folder := tmp_path / "run").mkdir()
    path = train()
    average = path[0].copy()
    for step in range(1, STEPS + 1):
        kept = decay if isinstance(decay, float) else 2 ** (-1 / (0.1 * step))
        average = kept * average + (1 - kept) * path[step - 1]
        if step in TIMES:
            states = {f"state.{name}.ema_params": value for name, value in named(average).items()}
            torch.save({"model": named(path[step - 1]), "ema_optimizer": states}, folder / f"step-{step}.pt")
    import_checkpoints(folder, tmp_path / "imported", ema_decay=decay, kind="torchtitan")
    found, predicted = error_of(Run(tmp_path / "imported"))
    assert found < 2 * predicted < 0.04


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_average_is_the_set_that_says_so_and_the_weights_are_the_other(layout: str, tmp_path: Path) -> None:
    """Averages of any length are then within the predicted error of the sum over every step."""
    done = import_checkpoints(write(tmp_path / "run", LAYOUTS[layout]), tmp_path / "imported", ema_decay=DECAY)
    assert done.counts == {f"EMA of decay {DECAY}": len(TIMES), "weights": len(TIMES)}
    found, predicted = error_of(Run(tmp_path / "imported"))
    assert found < 2 * predicted < 0.04


def test_which_set_is_meant_is_asked_where_two_have_a_word_or_fit(tmp_path: Path, ema: Ema) -> None:
    two = write(tmp_path / "two", lambda w, a: {"model": w, "model_ema1": a, "model_ema2": w})
    with pytest.raises(FileFormatError, match=r"average is unclear: 'model_ema1', 'model_ema2'; name"):
        import_checkpoints(two, tmp_path / "imported")
    newest, out = two / f"{STEPS:07}.pt", tmp_path / "raw.safetensors"
    assert ema("export", newest, "--out", out, "--weights").code == 0
    assert all(torch.equal(value, load_file(out)[name]) for name, value in named(train()[-1]).items())
    asked = ema("import", two, "--out", tmp_path / "imported", "--ema-decay", DECAY, "--average", "model_ema1")
    assert asked.code == 0
    found, predicted = error_of(Run(tmp_path / "imported"))
    assert found < 2 * predicted < 0.04
    students = write(tmp_path / "students", lambda w, a: {"one": w, "other": w, "ema": a})
    with pytest.raises(FileFormatError, match="model is unclear: 'one', 'other'"):
        import_checkpoints(students, tmp_path / "again")
    assert import_checkpoints(students, tmp_path / "again", weights="one").written
    with pytest.raises(FileFormatError, match="has no set of tensors 'elsewhere': 'one', 'other', 'ema'"):
        import_checkpoints(students, tmp_path / "never", average="elsewhere")


def test_sets_without_a_word_are_named_by_the_user(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", lambda w, a: {"student": w, "teacher": a})
    with pytest.raises(FileFormatError, match="unclear"):
        Run(folder).average(0.15)
    import_checkpoints(folder, tmp_path / "imported", average="teacher", weights="student")
    found, predicted = error_of(Run(tmp_path / "imported"))
    assert found < 2 * predicted < 0.04


def test_weights_are_never_taken_for_an_average(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", lambda w, _: {"model": w})
    with pytest.raises(InvalidValueError, match=r"ema_decay 0\.99: is for averages, and nothing in .* says"):
        import_checkpoints(folder, tmp_path / "imported", ema_decay=DECAY)


def test_parts_of_a_model_whose_names_have_a_word_remain_in_it(tmp_path: Path) -> None:
    """A layer named `ema` next to others is no average of the model."""
    layers = {f"layer{i}.weight": torch.full((4, 4), float(i)) for i in range(6)}
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        content = {"ema.weight": torch.ones(4, 4), **layers, "quantize.embed_avg": torch.ones(3)}
        torch.save({"model": content}, tmp_path / f"run/{step}.pt")
    assert set(Run(tmp_path / "run").average(0.2)) == {"ema.weight", *layers, "quantize.embed_avg"}


def test_the_states_of_megatrons_chained_optimizers_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        state = {"w": torch.ones(4), "chained_0.optimizer.state.exp_avg.w": torch.ones(4)}
        torch.save(state, tmp_path / f"run/iter_{step}.pt")
    assert set(Run(tmp_path / "run").average(0.2)) == {"w"}


@pytest.mark.parametrize("norm", [torch.nn.utils.spectral_norm, torch.nn.utils.parametrizations.spectral_norm])
def test_the_vectors_of_spectral_norm_are_copied(norm: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    layer = norm(torch.nn.Linear(5, 4))
    vectors = [name for name, _ in layer.named_buffers()]
    for step in (10, 20):
        for name in vectors:
            buffer = layer.get_buffer(name)
            buffer.copy_(torch.nn.functional.normalize(torch.randn(len(buffer)), dim=0))
        torch.save(layer.state_dict(), tmp_path / f"run/step{step}.pt")
    found = Run(tmp_path / "run").average(0.2)
    assert len(vectors) == 2
    assert all(torch.equal(found[name], layer.get_buffer(name)) for name in vectors)


def test_the_directions_of_weight_norm_are_averaged(tmp_path: Path) -> None:
    """They have the name of one of spectral norm's vectors, `weight_v`."""
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        content = {"weight_g": torch.ones(4, 1), "weight_v": torch.full((4, 5), float(step))}
        torch.save(content, tmp_path / f"run/step{step}.pt")
    assert 10 < float(Run(tmp_path / "run").average(0.2)["weight_v"][0, 0]) < 20


def exported(ema: Ema, source: Path, *options: object) -> Weights:
    out = source.parent / "exported.safetensors"
    assert ema("export", source, "--out", out, "--force", *options).code == 0
    return load_file(out)


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_average_in_a_training_checkpoint_is_exported_exactly(layout: str, tmp_path: Path, ema: Ema) -> None:
    """From one file, and from a folder of torch.distributed.checkpoint."""
    weights, average = named(train()[-1]), named(train()[10])
    content = LAYOUTS[layout](weights, average)
    torch.save(content, tmp_path / "last.pt")
    distributed(tmp_path / "last", content)
    for source in (tmp_path / "last.pt", tmp_path / "last"):
        assert_equal(exported(ema, source), average)
        assert_equal(exported(ema, source, "--weights"), weights)


def test_an_average_among_several_is_exported_by_its_key_prefix_or_glob(tmp_path: Path, ema: Ema) -> None:
    """JiT and MAR store two, of which no word says the better one; the statistics that an average lacks are added."""
    weights, *averages = (named(train()[index]) for index in (-1, 10, 20))
    counter = {"bn.num_batches_tracked": torch.tensor(3)}
    content = {"model": weights | counter, "model_ema1": averages[0], "model_ema2": averages[1], "epoch": 3}
    torch.save(content, tmp_path / "last.pth")
    distributed(tmp_path / "last", content)
    for source in (tmp_path / "last.pth", tmp_path / "last"):
        asked = ema("export", source, "--out", tmp_path / "never.safetensors")
        assert asked.code == 1
        assert "average is unclear: 'model_ema1', 'model_ema2'; name the average by `average`" in asked.error
        for key, average in zip(("model_ema1", "*2"), averages, strict=True):
            assert_equal(exported(ema, source, "--average", key), average | counter)
        assert_equal(exported(ema, source, "--weights"), weights | counter)
        unknown = ema("export", source, "--out", tmp_path / "never.safetensors", "--average", "elsewhere")
        assert "has no set of tensors 'elsewhere': 'model', 'model_ema1', 'model_ema2'" in unknown.error
        assert "has several" in ema("export", source, "--out", tmp_path / "never.safetensors", "--average", "*").error
    assert not (tmp_path / "never.safetensors").exists()
    save_file(prefixed("net.", weights) | prefixed("net_mean.", averages[0]), tmp_path / "last.safetensors")
    assert_equal(exported(ema, tmp_path / "last.safetensors", "--average", "net_mean."), averages[0])


def test_the_average_of_torchtitan_is_exported(tmp_path: Path, ema: Ema) -> None:
    weights, average = named(train()[-1]), named(train()[10])
    states = {f"state.{name}.ema_params": value for name, value in average.items()}
    distributed(tmp_path / "step-9", {"model": weights, "ema_optimizer": states})
    assert_equal(exported(ema, tmp_path / "step-9"), average)
    assert_equal(exported(ema, tmp_path / "step-9", "--weights"), weights)


def test_a_checkpoint_without_an_average_is_not_exported_as_one(tmp_path: Path, ema: Ema) -> None:
    torch.save({"model": named(train()[-1]), "optimizer": {}}, tmp_path / "last.pt")
    refused = ema("export", tmp_path / "last.pt", "--out", tmp_path / "model.safetensors")
    assert refused.code == 1
    assert "last.pt: holds no average that its keys name ('model'); name its key by `average`, or say" in refused.err
    assert not (tmp_path / "model.safetensors").exists()
    torch.save({"ema": named(train()[-1]), "step": 3}, tmp_path / "alone.pt")
    assert ema("export", tmp_path / "alone.pt", "--out", tmp_path / "alone.safetensors").code == 0
    assert load_file(tmp_path / "alone.safetensors").keys() == named(train()[-1]).keys()


def test_checkpoints_of_step_0_are_left_out(tmp_path: Path, ema: Ema) -> None:
    (tmp_path / "run").mkdir()
    for step in (0, 10, 20):
        torch.save({"w": torch.full((3,), float(step))}, tmp_path / f"run/step{step}.pt")
    done = ema("info", tmp_path / "run")
    assert done.code == 0
    assert "step0.pt: left out, as its weights are those before the training, of step 0" in done.err
    assert [one.step for one in Run(tmp_path / "run").sources] == [10, 20]


def test_published_names_of_edm2_say_images_and_width(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for width in ("0.050", "0.100"):
        for kimg in (1_048_576, 2_147_483):
            content = {"ema": {"w": torch.full((3,), float(kimg))}}
            torch.save(content, tmp_path / f"run/edm2-img512-s-{kimg}-{width}.pkl")
    sources = Run(tmp_path / "run").sources
    assert [(one.t, one.sigma_rel) for one in sources] == [
        (1000.0 * kimg, width) for kimg in (1_048_576, 2_147_483) for width in (0.05, 0.1)
    ]
