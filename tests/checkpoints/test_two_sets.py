"""Layouts of public trainings: two sets of tensors, one of whose keys says that it is the average."""

from __future__ import annotations

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
from trained import STEPS, TIMES, ema, error_of, named, train

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError
from posthoc_cli.profiles import Point

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

FOLDERS: dict[str, tuple[str, str]] = {
    "guided-diffusion": ("ema_0.99_{:06}.pt", "model{:06}.pt"),
    "two files of a folder": ("{:07}/ema.safetensors", "{:07}/model.safetensors"),
    "a folder next to a file": ("{:07}/ema/model.safetensors", "{:07}/model.safetensors"),
    "two folders": ("{:07}/model_ema/model.safetensors", "{:07}/model/model.safetensors"),
}
"""Places of the average and of the weights of a step."""


@functools.cache
def recorded(kept: Callable[[int], float] = lambda _: DECAY) -> list[tuple[int, Weights, Weights]]:
    """Return the step, the weights of a real training and their EMA, both in float32, at `TIMES`."""
    found, average = [], train()[0].copy()
    for step, weights in enumerate(train(), 1):
        average = ema(kept(step))(step, average, weights)
        if step in TIMES:
            found.append((step, named(weights), named(average)))
    return found


def stored() -> list[tuple[int, Weights, Weights]]:
    """Return the last of them, which most tests store."""
    return recorded()[-3:]


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
    """Import checkpoints; the run then holds these averages, each with its decay, and the weights if it has any."""
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
    folder = tmp_path / "run"
    if layout in LAYOUTS:
        write(folder, LAYOUTS[layout])
        check(folder, ema_decay=DECAY)
        return
    write_folders(folder, layout)
    for settings in ({}, {"ema_decay": DECAY})[layout != "guided-diffusion" :]:  # in which names say it
        check(folder, **settings)
    newest = max(path for path in folder.iterdir() if not path.name.startswith(("model", "opt")))
    assert_equal(exported(ema, newest), recorded()[-1][2])


def test_of_files_with_two_decays_one_is_chosen(tmp_path: Path, ema: Ema) -> None:
    folder = write_folders(tmp_path / "run", "guided-diffusion")
    for step, *_ in stored():
        torch.save(named(train()[0]), folder / f"ema_0.5_{step:06}.pt")  # another average
    done = ema("import", folder, "--out", tmp_path / "0")
    assert done.code == 2
    assert "--ema-decay: must be given: the files are of several averages, 0.5 or 0.99" in done.error
    check(folder, ema_decay=DECAY)
    assert {one.path.name[:8] for one in Run(tmp_path / "imported").sources} == {"ema_0.99", "model001"}


@pytest.mark.parametrize(
    "content", [lambda a: {"ema": a, "opt": optimizer(a)}, lambda a: {"model_ema": a, "args": {"lr": 3}}]
)
def test_an_average_without_weights_is_not_taken_for_weights(content: Any, tmp_path: Path) -> None:
    folder = write(tmp_path / "run", lambda _, average: content(average))
    with pytest.raises(InvalidValueError, match="holds EMAs, and neither their decay nor weights next to them"):
        _ = Run(folder).sources
    check(folder, ema_decay=DECAY)


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


def started_late(step: int) -> float:
    """Return the decay of an update at step 50 and every 7 steps after, with a half-life of 5 % of the updates."""
    updates, rest = divmod(step - 50, 7)
    return 1.0 if rest or step < 50 else 2 ** (-1 / (0.05 * updates)) if updates else 0.0


TITAN: list[tuple[dict[str, Any], Callable[[int], float]]] = [
    ({"ema_decay": DECAY}, lambda _: DECAY),
    ({"ema_decay": "half-life:10%"}, lambda step: 2 ** (-1 / (0.1 * step))),
    ({"update_every": 7, "update_after_step": 50}, started_late),
]
"""Settings of torchtitan, and the decay at a step; its default half-life is 5 % of the training."""


@pytest.mark.parametrize(("settings", "decay"), TITAN)
def test_settings_of_torchtitan_are_given(
    settings: dict[str, Any], decay: Callable[[int], float], tmp_path: Path
) -> None:
    (folder := tmp_path / "run").mkdir()
    for step, weights, average in recorded(decay):
        states = {f"state.{name}.ema_params": value for name, value in average.items()}
        torch.save({"model": weights, "ema_optimizer": states}, folder / f"step-{step}.pt")
    import_checkpoints(folder, tmp_path / "imported", kind="torchtitan", **settings)
    found, predicted = error_of(Run(tmp_path / "imported"))
    assert found < 2 * predicted < 0.04


def test_which_set_is_meant_is_asked_where_two_have_a_word_or_fit(tmp_path: Path, ema: Ema) -> None:
    two = write(tmp_path / "two", lambda w, a: {"model": w, "model_ema1": a, "model_ema2": w})
    with pytest.raises(FileFormatError, match=r"average is unclear: 'model_ema1', 'model_ema2'; name"):
        import_checkpoints(two, tmp_path / "imported")
    check(two, ema_decay=DECAY, average="model_ema1")
    assert_equal(exported(ema, two / f"{STEPS:07}.pt", "--weights"), recorded()[-1][1])
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
    check(folder, ema_decay=DECAY, average="teacher", weights="student")


def test_weights_are_never_taken_for_an_average(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", lambda w, _: {"model": w})
    with pytest.raises(
        InvalidValueError, match=r"ema_decay 0\.99: says nothing about checkpoints; averages that no name"
    ):
        import_checkpoints(folder, tmp_path / "imported", ema_decay=DECAY)


@pytest.mark.parametrize("what", ["layers", "optimizers", "weight norm", "spectral norm", "old spectral norm"])
def test_names_that_look_like_another_thing(what: str, tmp_path: Path) -> None:
    """A layer named `ema` next to others is no average of the model; the states of Megatron's chained optimizers are no
    weights; the vectors of spectral norm are copied, and weight norm's direction of a like name is averaged.
    """
    norms = torch.nn.utils.parametrizations.spectral_norm, torch.nn.utils.spectral_norm
    layer: torch.nn.Module = norms[what.startswith("old")](torch.nn.Linear(5, 4))
    vectors = [name for name, _ in layer.named_buffers()]
    (tmp_path / "run").mkdir()
    for step in (10, 20):
        values, content = torch.full((4, 5), float(step)), {}
        if what == "layers":
            content = {f"layer{i}.weight": values for i in range(6)} | {
                "ema.weight": values,
                "quantize.embed_avg": values,
            }
        elif what == "optimizers":
            content = {"w": values, "chained_0.optimizer.state.exp_avg.w": torch.ones(4)}
        elif what == "weight norm":
            content = {"weight_g": torch.ones(4, 1), "weight_v": values}
        else:
            for buffer in layer.buffers():
                buffer.copy_(torch.nn.functional.normalize(torch.randn(len(buffer)), dim=0))
            content = layer.state_dict()
        torch.save(content if what == "optimizers" else {"model": content}, tmp_path / f"run/step{step}.pt")
    found = Run(tmp_path / "run").average(0.2)
    assert found.keys() == {name for name in content if not name.startswith("chained")}
    if what.endswith("spectral norm"):
        assert len(vectors) == 2
        assert all(torch.equal(found[name], layer.get_buffer(name)) for name in vectors)
    else:
        averaged = [name for name in found if name != "weight_g"]
        assert all(10 < float(found[name][0, 0]) < 20 for name in averaged)


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
    assert_equal(exported(ema, tmp_path / "alone.pt"), named(train()[-1]))


def test_checkpoints_of_step_0_are_left_out(tmp_path: Path, ema: Ema) -> None:
    (tmp_path / "run").mkdir()
    for step in (0, 10, 20):
        torch.save({"w": torch.full((3,), float(step))}, tmp_path / f"run/step{step}.pt")
    done = ema("info", tmp_path / "run")
    assert done.code == 0
    assert "step0.pt: left out, as its weights are those before the training, of step 0" in done.err
    assert [one.step for one in Run(tmp_path / "run").sources] == [10, 20]
