"""What the numbers of checkpoints count, what files are a run, and how exact averages of weights by
epoch are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ema_command import Ema
from safetensors.torch import save_file
from walks import STEPS, Tensors, distance, history, ratio, saves, true_average

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError
from posthoc_cli.profiles import OrdinaryEMA

EPOCHS = 20
EACH = STEPS // EPOCHS
"""Steps of an epoch."""


def store(path: Path, epoch: int, /, **values: Any) -> None:
    """Write the weights after an epoch."""
    torch.save({"model": weights_at(epoch), **values}, path)


def weights_at(epoch: int) -> Tensors:
    return history()[epoch * EACH - 1]


def write(folder: Path, name: str, epochs: Mapping[int, int], content: Any = None) -> Path:
    """Write the weights after some epochs, by the number that their file has; return the
    folder.

    `content` is what a file holds besides, of its number."""
    folder.mkdir(exist_ok=True)
    for number, epoch in epochs.items():
        values = {} if content is None else content(number)
        store(folder / name.format(number), epoch, **values)
    return folder


def same(*epochs: int) -> dict[int, int]:
    return {epoch: epoch for epoch in epochs}


def times(place: Path, **settings: Any) -> tuple[str, list[float]]:
    """Return the unit and the times of an import."""
    found = import_checkpoints(place, None, dry_run=True, **settings).checkpoints
    return found[0].t_unit, [one.t for one in found]


def says(place: Path, **settings: Any) -> str:
    return import_checkpoints(place, None, dry_run=True, **settings).numbers


# --- epochs


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model_{}.pth", "they follow each other without a gap"),
        ("{}.pt", "they follow each other without a gap"),
        ("{}epoch.pth", "by the word for epochs in names"),
        ("jepa-ep{}.pth.tar", "by the word for epochs in names"),
        ("model.epoch={:04}.ckpt", "by the word for epochs in names"),
    ],
)
def test_numbers_of_epochs(name: str, why: str, tmp_path: Path) -> None:
    write(tmp_path, name, same(*range(1, 21)))
    assert times(tmp_path) == ("epochs", [*range(1, 21)])
    assert says(tmp_path) == f"epochs, counted from 1: {why}"
    assert times(tmp_path, steps_per_epoch=EACH) == ("steps", [EACH * e for e in range(1, 21)])
    assert says(tmp_path, steps_per_epoch=EACH).endswith(f"the first checkpoint is of step {EACH}")


def test_an_equal_epoch_in_the_contents(tmp_path: Path) -> None:
    """Without it, such numbers are steps, which nothing states."""
    write(tmp_path, "model_{}.pth", same(3, 7, 9, 20))
    assert times(tmp_path) == ("steps", [3, 7, 9, 20])
    assert "taken for steps: they are the only number in names" in says(tmp_path)
    assert "nothing states their unit" in says(tmp_path)
    write(tmp_path, "model_{}.pth", same(3, 7, 9, 20), lambda epoch: {"epoch": epoch})
    assert times(tmp_path) == ("epochs", [3, 7, 9, 20])
    write(tmp_path, "model_{}.pth", same(3, 7, 9, 20), lambda _: {"epoch": 2})
    assert times(tmp_path) == ("steps", [3, 7, 9, 20])


def test_steps_and_images_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, "model_{}.pth", same(3), lambda step: {"global_step": step})
    write(tmp_path, "model_{}.pth", same(7), lambda _: {"state": {"cur_nimg": 640}})
    with pytest.raises(InvalidValueError, match="some files state their steps, and others images"):
        times(tmp_path)


def test_an_unknown_first_epoch_is_said(tmp_path: Path) -> None:
    """Of files that were kept because they are the best; timm counts from 0."""
    write(tmp_path, "checkpoint-{}.pth", same(3, 7, 9, 20), lambda epoch: {"epoch": epoch})
    unknown = "nothing shows the first: `first_epoch` is 0 if it is"
    assert unknown in says(tmp_path)
    assert unknown not in says(tmp_path, first_epoch=1)
    of_timm = {"arch": "vit", "version": 2}
    write(
        tmp_path, "checkpoint-{}.pth", same(3, 7, 9, 20), lambda epoch: {"epoch": epoch} | of_timm
    )
    assert times(tmp_path) == ("epochs", [4, 8, 10, 21])
    assert unknown not in says(tmp_path)


@pytest.mark.parametrize(
    ("name", "epochs", "content"),
    [
        ("model_{}.pth", {e: e + 1 for e in range(20)}, None),
        ("checkpoint{:04}.pth", {e: e + 1 for e in range(20)}, lambda n: {"epoch": n + 1}),
        ("checkpoint{:04}.pth", {e: e + 1 for e in (2, 5, 8, 19)}, lambda n: {"epoch": n + 1}),
        ("water_run-123_epoch-{}.pt", {e: e + 1 for e in range(1, 20, 2)}, None),
        ("epoch_{}.pt", {e: e + 1 for e in (4, 9, 14, 19)}, None),
    ],
)
def test_epochs_counted_from_0(
    name: str,
    epochs: dict[int, int],
    content: Any,
    tmp_path: Path,
) -> None:
    write(tmp_path, name, epochs, content)
    assert times(tmp_path) == ("epochs", [*epochs.values()])
    assert says(tmp_path).startswith("epochs, counted from 0: ")
    steps = [EACH * epoch for epoch in epochs.values()]
    assert times(tmp_path, steps_per_epoch=EACH) == ("steps", steps)


@pytest.mark.parametrize("first", [0, 1])
def test_the_first_epoch_is_given(first: int, tmp_path: Path) -> None:
    write(tmp_path, "epoch_{}.pt", same(5, 10, 15, 20))
    assert times(tmp_path)[1] == [5, 10, 15, 20]
    assert times(tmp_path, first_epoch=first)[1] == [e + 1 - first for e in (5, 10, 15, 20)]
    steps = [EACH * (epoch + 1 - first) for epoch in (5, 10, 15, 20)]
    assert times(tmp_path, first_epoch=first, steps_per_epoch=EACH) == ("steps", steps)


def test_weights_before_the_training_are_left_out(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of a first epoch 1, the number 0 is before the training; and of steps."""
    write(tmp_path, "epoch_{}.pt", {0: 1} | same(1, 2, 3))
    assert times(tmp_path, first_epoch=1) == ("epochs", [1, 2, 3])
    assert "epoch_0.pt: left out, as its weights are those before the training" in caplog.text
    write(tmp_path / "steps", "step_{}.pt", {0: 1, 100: 5, 250: 10})
    assert times(tmp_path / "steps") == ("steps", [100, 250])


@pytest.mark.parametrize("pattern", [r"epoch-(\d+)", r"-(\d+)\.pt", r"(\d+)\.pt$"])
def test_a_pattern_and_the_steps_of_an_epoch(pattern: str, tmp_path: Path) -> None:
    write(tmp_path, "run-123_epoch-{}.pt", same(3, 7, 9, 20))
    steps = [60, 140, 180, 400]
    assert times(tmp_path, step_from=pattern, steps_per_epoch=EACH) == ("steps", steps)


@pytest.mark.parametrize(
    ("name", "content"),
    [("model_{}.pt", lambda number: {"global_step": number}), ("step_{}.pt", None)],
)
def test_numbers_that_are_steps_take_no_epochs(name: str, content: Any, tmp_path: Path) -> None:
    write(tmp_path, name, same(*range(1, 21)), content)
    assert times(tmp_path) == ("steps", [*range(1, 21)])
    assert says(tmp_path).startswith("steps, by ")
    with pytest.raises(InvalidValueError, match="says nothing about numbers that are steps, by"):
        times(tmp_path, steps_per_epoch=EACH)


def test_an_average_needs_the_steps_of_an_epoch(tmp_path: Path) -> None:
    """They are asked for, or are what the average has counted."""
    for save in saves():
        content = {"model": save.weights, "ema": {"params": save.average, "decay": 0.95}}
        torch.save(content, tmp_path / f"epoch_{save.epoch}.pt")
    with pytest.raises(InvalidValueError, match=r"^steps_per_epoch: must be given: decays are of"):
        times(tmp_path)
    unit, found = times(tmp_path, steps_per_epoch=40)
    assert (unit, found) == ("steps", sorted(2 * [save.step for save in saves()]))
    averaged = {one["t"]: one["holds"] for one in Run(tmp_path).info()["checkpoints"]}
    assert set(averaged.values()) == {"weights"}
    for save in saves(ratio):
        counted = {"params": save.average, "decay": 0.95, "num_updates": save.step}
        content = {"model": save.weights, "ema": counted}
        torch.save(content, tmp_path / f"epoch_{save.epoch}.pt")
    unit, found = times(tmp_path)
    assert (unit, found) == ("steps", sorted(2 * [save.step for save in saves()]))
    assert "steps are the updates that the averages have counted" in says(tmp_path)


def test_a_decay_and_numbers_that_may_be_epochs(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of kept best epochs the averages are left out, and an import sees that the decay does not
    fit; with the steps of an epoch it does."""
    for epoch in (3, 4, 6, 7, 9, 10):
        kept = saves()[epoch - 1]
        content = {"model": kept.weights, "ema": {"params": kept.average, "decay": 0.95}}
        torch.save(content, tmp_path / f"net_{epoch}.pt")
    made = Run(tmp_path).average(0.1, dtype="float64")
    assert made.predicted_error is not None
    assert distance(made, true_average(0.1)) < 3 * made.predicted_error
    assert "6 EMAs, such as net_10.pt, left out of averages: their decay is of" in caplog.text
    assert "nothing states their unit" in caplog.text
    with pytest.raises(InvalidValueError, match=r"^ema_decay 0\.95: does not fit the files"):
        times(tmp_path)
    assert times(tmp_path, steps_per_epoch=40)[1][-1] == STEPS


def test_averages_alone_by_epoch(tmp_path: Path) -> None:
    """Files of MACE have an average only; steps of an epoch make a run of it."""
    for save in saves():
        torch.save({"model": save.average}, tmp_path / f"water_run-123_epoch-{save.epoch - 1}.pt")
    settings = {"kind": "ema", "ema_decay": 0.95}
    with pytest.raises(InvalidValueError, match=r"^steps_per_epoch: must be given"):
        times(tmp_path, **settings)
    import_checkpoints(tmp_path, tmp_path / "new", steps_per_epoch=40, **settings)
    run = Run(tmp_path / "new")
    assert [one.t for one in run.sources] == [save.step for save in saves()]
    assert all(isinstance(one.profile, OrdinaryEMA) for one in run.sources)
    made = run.average(0.1, dtype="float64")
    assert made.predicted_error is not None
    assert distance(made, true_average(0.1)) < 3 * made.predicted_error


# --- odd files


Odd = Callable[[Path], object]


def another_model(path: Path) -> None:
    torch.save({"model": {"x": torch.ones(3)}}, path)


ODD: dict[str, tuple[Odd, str]] = {
    "latest.ckpt": (lambda path: store(path, 20), "no step"),
    "best.pt": (lambda path: store(path, 7), "no step"),
    "vae_30.pt": (another_model, "another model"),
    "notes.pt": (lambda path: path.write_text("these are the good ones"), "cannot be"),
    "broken.pt": (lambda path: path.write_bytes(b"PK\x03\x04" + bytes(40)), ""),
    "log_5.pt": (lambda path: torch.save({"losses": [1.0, 2.0]}, path), "holds no"),
    "step_400.pt": (lambda path: store(path, 20), "another kind"),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_is_left_out_and_named(
    odd: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, "epoch_{}.pt", same(*range(1, 21)))
    make, reason = ODD[odd]
    make(tmp_path / odd)
    assert [one.t for one in Run(tmp_path).sources] == [*range(1, 21)]
    assert f"left out: {odd} ({reason}" in caplog.text


@pytest.mark.parametrize("odd", ["optimizer_20.pt", "scheduler_20.pt", "rng_state_20.pth"])
def test_states_of_a_training_are_no_models(odd: str, tmp_path: Path) -> None:
    write(tmp_path, "epoch_{}.pt", same(*range(1, 21)))
    torch.save({"x": torch.ones(3)}, tmp_path / odd)
    assert [one.t for one in Run(tmp_path).sources] == [*range(1, 21)]


def test_a_copy_that_says_its_epoch_is_one_time(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Equal or not, a file without a number does not replace the numbered one."""
    write(tmp_path, "epoch_{}.pt", same(*range(1, 21)), lambda epoch: {"epoch": epoch})
    store(tmp_path / "last.pt", 20, epoch=20)
    store(tmp_path / "best.pt", 6, epoch=7)
    run = Run(tmp_path)
    assert [one.t for one in run.sources] == [*range(1, 21)]
    assert all(one.path.name.startswith("epoch_") for one in run.sources)
    assert "best.pt: left out, as epoch_7.pt has the same number" in caplog.text
    assert "last.pt" not in caplog.text


@pytest.mark.parametrize("size", [100, 5000])
def test_a_truncated_file_of_the_run_is_an_error(size: int, tmp_path: Path) -> None:
    write(tmp_path, "epoch_{}.pt", same(*range(1, 21)))
    file = tmp_path / "epoch_7.pt"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(FileFormatError, match=r"epoch_7\.pt"):
        _ = Run(tmp_path).sources
    described = Run(tmp_path).info()
    assert len(described["checkpoints"]) == 20
    assert any("epoch_7.pt" in problem for problem in described["problems"])


def test_two_models_of_about_equally_many_files_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, "epoch_{}.pt", same(*range(1, 6)))
    for epoch in range(6, 10):
        another_model(tmp_path / f"epoch_{epoch}.pt")
    with pytest.raises(MismatchError, match=r"epoch_1\.pt and .*epoch_6\.pt"):
        _ = Run(tmp_path).sources


def test_epochs_and_steps_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, "epoch_{}.pt", same(1, 2, 3))
    write(tmp_path, "step_{}.pt", {80: 4, 100: 5})
    with pytest.raises(MismatchError, match="are numbered by steps and by epochs"):
        _ = Run(tmp_path).sources
    assert len(Run(tmp_path).info()["checkpoints"]) == 5


@pytest.mark.parametrize("folder", ["exp_100epochs", "lr-3_ep50", "of_9_steps", "checkpoint-7"])
def test_the_number_of_an_experiment_is_none_of_its_files(
    folder: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place = write(tmp_path / folder, "epoch_{}.pt", same(*range(1, 21)))
    store(place / "best.pt", 7)
    assert times(place) == ("epochs", [*range(1, 21)])
    assert "left out: best.pt (no step)" in caplog.text
    store(place / "best.pt", 7, epoch=7)
    assert times(place) == ("epochs", [*range(1, 21)])


# --- files without a number


WORDS = {"first": 5, "middle": 10, "newest": 20}


def test_the_content_has_the_step(tmp_path: Path) -> None:
    for word, epoch in WORDS.items():
        store(tmp_path / f"{word}.pt", epoch, global_step=EACH * epoch)
    assert times(tmp_path) == ("steps", [100, 200, 400])
    assert says(tmp_path) == "steps, by 'global_step' in the contents"
    assert Run(tmp_path).sources[0].has_step_unit  # type: ignore[attr-defined]


def test_the_content_has_the_epoch(tmp_path: Path) -> None:
    for word, epoch in WORDS.items():
        store(tmp_path / f"{word}.pt", epoch, epoch=epoch)
    assert times(tmp_path) == ("epochs", [5, 10, 20])  # the folder has the word, too
    assert times(tmp_path, steps_per_epoch=EACH) == ("steps", [100, 200, 400])


# --- folders


@pytest.mark.parametrize("ending", ["th", "tar", "bin", "pth.tar", "ckpt", "pkl", "pth"])
def test_files_of_every_ending(ending: str, tmp_path: Path) -> None:
    write(tmp_path, f"epoch_{{}}.{ending}", same(*range(1, 6)))
    assert times(tmp_path) == ("epochs", [1, 2, 3, 4, 5])
    for epoch in range(1, 6):
        folder = tmp_path / "folders" / f"epoch_{epoch}"
        folder.mkdir(parents=True)
        (tmp_path / f"epoch_{epoch}.{ending}").rename(folder / f"model.{ending}")
    assert times(tmp_path / "folders") == ("epochs", [1, 2, 3, 4, 5])


# --- info


def two_unknown_sets(folder: Path) -> None:
    """Write averages of unknown decay, by epoch."""
    for save in saves():
        content = {"model": save.weights, "ema": save.average}
        torch.save(content, folder / f"epoch_{save.epoch}.pt")


def two_averages(folder: Path) -> None:
    for save in saves():
        content = {"model": save.weights, "ema": save.average, "ema2": save.average}
        torch.save(content, folder / f"step_{save.step}.pt")


def of_no_time(folder: Path) -> None:
    for name in ("a", "b"):
        store(folder / f"{name}.pt", 3)


def of_one_time(folder: Path) -> None:
    store(folder / "a_5.pt", 5)
    store(folder / "b_5.pt", 6)


def of_ema_pytorch(folder: Path) -> None:
    for step in (1, 2):
        torch.save({"initted": torch.tensor(True), "w": torch.ones(3)}, folder / f"0.{step}.pt")


def of_modules_without_tensors(folder: Path) -> None:
    torch.save({"model": None, "epoch": 3}, folder / "epoch_3.pt")


def of_undecided_buffers(folder: Path) -> None:
    for save in saves():
        flat = {f"ema_{name.replace('.', '_')}": one for name, one in save.weights.items()}
        torch.save({"state_dict": save.weights | flat}, folder / f"iter_{save.step}.pth")


UNCLEAR: dict[str, tuple[Odd, str]] = {
    "no steps": (two_unknown_sets, "--steps-per-epoch"),
    "two averages": (two_averages, "average"),
    "no time": (of_no_time, "its step"),
    "one time": (of_one_time, "are both of step 5"),
    "no width": (of_ema_pytorch, "sigma_rels"),
    "no tensors": (of_modules_without_tensors, "no tensors"),
    "undecided": (of_undecided_buffers, "average"),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_info_answers_where_an_import_has_to_be_told_something(
    what: str,
    tmp_path: Path,
    ema: Ema,
) -> None:
    make, asked = UNCLEAR[what]
    make(tmp_path)
    shown = ema("info", tmp_path)
    assert shown.code in (0, 1), shown.err
    assert asked in shown.out + shown.err
    assert ema("info", tmp_path, "--json").json["checkpoints"]


def test_info_says_what_numbers_are_taken_for(tmp_path: Path, ema: Ema) -> None:
    write(tmp_path, "model_{}.pth", same(*range(1, 21)))
    sentence = "epochs, counted from 1: they follow each other without a gap"
    assert Run(tmp_path).info()["numbers"] == sentence
    assert sentence in " ".join(ema("info", tmp_path).out.split())
    assert sentence in " ".join(ema("import", tmp_path, "--dry-run").out.split())


# --- numbers in contents and names that differ, and files beside folders


def test_a_count_that_repeats_gives_way_to_the_numbers_in_names(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """VITS stores the epoch as `iteration`."""
    names = {100 * epoch: epoch for epoch in range(1, 9)}
    place = write(tmp_path, "G_{}.pth", names, lambda number: {"iteration": number // 300 + 1})
    assert times(place) == ("steps", [*names])
    (line,) = caplog.messages
    assert line.endswith(
        "G_100.pth: 'iteration' in the contents is 1, and the number in its name 100: taken is "
        "that in names, as 'iteration' in the contents repeats"
    )


def test_a_count_that_contradicts_names_is_said(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    names = {100 * epoch: epoch for epoch in range(1, 5)}
    place = write(tmp_path, "G_{}.pth", names, lambda number: {"iteration": number // 50})
    assert times(place) == ("steps", [2, 4, 6, 8])
    said = "is 2, and the number in its name 100: taken is 'iteration' in the contents; `step_from`"
    assert said in caplog.text


@pytest.mark.parametrize(
    ("factor", "offset"),
    [
        (1, 0),
        (1, 1),
        (1, -1),
        (50, 0),
    ],
)
def test_a_step_that_names_do_not_exceed_is_taken(
    factor: int,
    offset: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = []
    for number in (4, 8, 12):
        step = factor * number + offset
        steps.append(step)
        store(tmp_path / f"m{number}.pt", number, step=step)
    unit, found = times(tmp_path)
    assert unit == "steps"
    assert found == steps
    assert not caplog.messages


def test_two_files_of_one_number_are_answered_by_what_chooses_files(tmp_path: Path) -> None:
    write(tmp_path, "model{:06}.pt", same(5, 10))
    write(tmp_path, "other{:06}.pt", {5: 7, 10: 12})
    with pytest.raises(MismatchError, match="are both of") as caught:
        times(tmp_path)
    assert str(caught.value).endswith("by a glob, or import with `step_from`")


@pytest.mark.parametrize("folder", ["{}.ckpt", "{:07}"])
def test_a_folder_whose_name_is_a_number_has_that_of_its_files(folder: str, tmp_path: Path) -> None:
    for step in (100, 200, 400):
        place = tmp_path / folder.format(step)
        place.mkdir()
        store(place / "nnet.00-of-01.pth", step // 100)
        torch.save(step, place / "step.pth")
    assert times(tmp_path) == ("steps", [100, 200, 400])
    assert times(tmp_path / "*" / "nnet*.pth") == ("steps", [100, 200, 400])


def test_the_number_of_an_experiment_is_no_step_of_a_glob(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / str(number)).mkdir()
        store(tmp_path / str(number) / "last.pt", number)
    with pytest.raises(InvalidValueError, match="neither its content nor its name tells its step"):
        times(tmp_path / "*" / "last.pt")


def lora(folder: Path, files: int, states: int) -> Path:
    """Write series of weights as kohya does: of the last step without a number in the name."""
    for epoch in range(1, files + 1):
        step = 100 * epoch
        name = f"lora-step{step:08}"
        if epoch == files:
            name = "lora"
        metadata = {"ss_steps": str(step)}
        weights = weights_at(epoch)
        save_file(weights, folder / f"{name}.safetensors", metadata)
    for epoch in range(1, states + 1):
        state = folder / f"lora-step{epoch * 100:08}-state"
        state.mkdir()
        save_file(weights_at(epoch), state / "model.safetensors")
    return folder


def test_a_series_of_weights_counts_beside_states(tmp_path: Path) -> None:
    assert times(lora(tmp_path, 5, 4)) == ("steps", [100, 200, 300, 400, 500])


def test_more_states_than_weights_are_asked_for(tmp_path: Path) -> None:
    lora(tmp_path, 4, 6)
    globs = r"by a glob: '(\S+/\*state)' or '(\S+/lora-step\*\.safetensors)'"
    with pytest.raises(InvalidValueError, match=globs) as caught:
        times(tmp_path)
    states = str(caught.value).split("'")[1]
    assert times(Path(states)) == ("steps", [100, 200, 300, 400, 500, 600])


def test_the_step_in_the_metadata_of_ai_toolkit(tmp_path: Path) -> None:
    names = {
        "lora_000000100": 100,
        "lora_000000200": 200,
        "lora": 300,
    }
    for name, step in names.items():
        text = json.dumps({"step": step, "epoch": 1})
        file = tmp_path / f"{name}.safetensors"
        weights = weights_at(step // 100)
        save_file(weights, file, {"training_info": text})
    unit, steps = times(tmp_path)
    assert unit == "steps"
    assert steps == [100, 200, 300]


def test_a_text_that_another_program_calls_training_info(tmp_path: Path) -> None:
    file = tmp_path / "m-7.safetensors"
    metadata = {"training_info": "a text"}
    save_file(weights_at(1), file, metadata)
    assert times(tmp_path) == ("steps", [7])


def test_a_file_of_states_alone_is_said(tmp_path: Path) -> None:
    state = {"optimizer_state_dict": {"exp_avg": torch.ones(3)}}
    torch.save({"epoch": 1, **state}, tmp_path / "checkpoint.0.100.pt")
    with pytest.raises(FileFormatError, match="no weights, only tensors under 'optimizer_st"):
        times(tmp_path / "checkpoint.0.100.pt")
    torch.save({"a.weight": torch.ones(3)}, tmp_path / "m-1.pt")
    with pytest.raises(
        FileFormatError, match=r"has no set of tensors 'ema': only tensors 'a\.weight'"
    ):
        times(tmp_path / "m-1.pt", average="ema")
