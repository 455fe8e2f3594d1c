"""What the numbers of checkpoints count, what files are a run, and how exact averages of weights by
epoch are."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from truth import distance
from walks import STEPS, Save, Tensors, history, ratio, saves, true_average

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError
from posthoc_cli.profiles import OrdinaryEMA

EPOCHS = 20
EACH = STEPS // EPOCHS
"""Steps of an epoch."""
ALL = [*range(1, EPOCHS + 1)]


def store(path: Path, epoch: int, /, **values: Any) -> None:
    """Write the weights after an epoch."""
    path.parent.mkdir(exist_ok=True)
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
    done = import_checkpoints(place, None, dry_run=True, **settings)
    first, *_ = done.checkpoints
    return first.t_unit, [one.t for one in done.checkpoints]


def epochs_of(place: Path, **settings: Any) -> list[float]:
    unit, found = times(place, **settings)
    assert unit == "epochs"
    return found


def steps_of(place: Path, **settings: Any) -> list[float]:
    unit, found = times(place, **settings)
    assert unit == "steps"
    return found


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
def test_numbers_of_epochs(name, why, tmp_path):
    write(tmp_path, name, same(*ALL))
    assert epochs_of(tmp_path) == ALL
    assert says(tmp_path) == f"epochs, counted from 1: {why}"
    assert steps_of(tmp_path, steps_per_epoch=EACH) == [EACH * epoch for epoch in ALL]
    said = says(tmp_path, steps_per_epoch=EACH)
    assert said.endswith(f"the first checkpoint is of step {EACH}")


BEST = [3, 7, 9, 20]
"""The epochs of files that were kept because they are the best."""


def has_its_epoch(number):
    return {"epoch": number}


def test_numbers_with_gaps_are_steps_which_nothing_states(tmp_path):
    write(tmp_path, "model_{}.pth", same(*BEST))
    assert steps_of(tmp_path) == BEST
    said = says(tmp_path)
    assert "taken for steps: they are the only number in names" in said
    assert "nothing states their unit" in said


def test_numbers_are_steps_if_the_contents_have_another_epoch(tmp_path):
    for number in BEST:
        store(tmp_path / f"model_{number}.pth", number, epoch=2)
    assert steps_of(tmp_path) == BEST


def test_steps_and_images_are_not_mixed(tmp_path):
    store(tmp_path / "model_3.pth", 3, global_step=3)
    store(tmp_path / "model_7.pth", 7, state={"cur_nimg": 640})
    with pytest.raises(InvalidValueError, match="some files state their steps, and others images"):
        times(tmp_path)


UNKNOWN = "nothing shows the first: `first_epoch` is 0 if it is"


def test_numbers_are_epochs_if_the_contents_have_an_equal_epoch(tmp_path):
    """Their first one is said to be unknown."""
    write(tmp_path, "checkpoint-{}.pth", same(*BEST), has_its_epoch)
    assert epochs_of(tmp_path) == BEST
    assert UNKNOWN in says(tmp_path)
    assert UNKNOWN not in says(tmp_path, first_epoch=1)


def test_timm_counts_epochs_from_0(tmp_path):
    def content(number):
        return {"epoch": number, "arch": "vit", "version": 2}

    write(tmp_path, "checkpoint-{}.pth", same(*BEST), content)
    assert epochs_of(tmp_path) == [4, 8, 10, 21]
    assert UNKNOWN not in says(tmp_path)


def has_the_next_epoch(number):
    return {"epoch": number + 1}


@pytest.mark.parametrize(
    ("name", "numbers", "content"),
    [
        ("model_{}.pth", range(20), None),
        ("checkpoint{:04}.pth", range(20), has_the_next_epoch),
        ("checkpoint{:04}.pth", (2, 5, 8, 19), has_the_next_epoch),
        ("water_run-123_epoch-{}.pt", range(1, 20, 2), None),
        ("epoch_{}.pt", (4, 9, 14, 19), None),
    ],
)
def test_epochs_counted_from_0(name, numbers, content, tmp_path):
    epochs = {number: number + 1 for number in numbers}
    write(tmp_path, name, epochs, content)
    assert epochs_of(tmp_path) == [*epochs.values()]
    assert says(tmp_path).startswith("epochs, counted from 0: ")
    steps = [EACH * epoch for epoch in epochs.values()]
    assert steps_of(tmp_path, steps_per_epoch=EACH) == steps


@pytest.mark.parametrize(
    ("first", "epochs"),
    [
        (0, [6, 11, 16, 21]),
        (1, [5, 10, 15, 20]),
    ],
)
def test_the_first_epoch_is_given(first, epochs, tmp_path):
    write(tmp_path, "epoch_{}.pt", same(5, 10, 15, 20))
    assert epochs_of(tmp_path) == [5, 10, 15, 20]
    assert epochs_of(tmp_path, first_epoch=first) == epochs
    steps = [EACH * epoch for epoch in epochs]
    assert steps_of(tmp_path, first_epoch=first, steps_per_epoch=EACH) == steps


def test_weights_before_the_training_are_left_out(tmp_path, caplog):
    """Of a first epoch 1, the number 0 is before the training."""
    write(tmp_path, "epoch_{}.pt", {0: 1} | same(1, 2, 3))
    assert epochs_of(tmp_path, first_epoch=1) == [1, 2, 3]
    assert "epoch_0.pt: left out, as its weights are those before the training" in caplog.text


def test_a_step_0_is_left_out(tmp_path):
    write(tmp_path, "step_{}.pt", {0: 1, 100: 5, 250: 10})
    assert steps_of(tmp_path) == [100, 250]


@pytest.mark.parametrize("pattern", [r"epoch-(\d+)", r"-(\d+)\.pt", r"(\d+)\.pt$"])
def test_a_pattern_and_the_steps_of_an_epoch(pattern, tmp_path):
    write(tmp_path, "run-123_epoch-{}.pt", same(*BEST))
    steps = steps_of(tmp_path, step_from=pattern, steps_per_epoch=EACH)
    assert steps == [60, 140, 180, 400]


def has_its_step(number):
    return {"global_step": number}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model_{}.pt", has_its_step),
        ("step_{}.pt", None),
    ],
)
def test_numbers_that_are_steps_take_no_epochs(name, content, tmp_path):
    write(tmp_path, name, same(*ALL), content)
    assert steps_of(tmp_path) == ALL
    assert says(tmp_path).startswith("steps, by ")
    with pytest.raises(InvalidValueError, match="says nothing about numbers that are steps, by"):
        times(tmp_path, steps_per_epoch=EACH)


def store_with_average(path: Path, save: Save, **values: Any) -> None:
    """Write weights and their average, whose decay the file states."""
    average = {"params": save.average, "decay": 0.95, **values}
    torch.save({"model": save.weights, "ema": average}, path)


def twice() -> list[int]:
    """Return the steps of all weights and averages."""
    steps = [save.step for save in saves()]
    return sorted(steps + steps)


def test_an_average_needs_the_steps_of_an_epoch(tmp_path):
    for save in saves():
        store_with_average(tmp_path / f"epoch_{save.epoch}.pt", save)
    with pytest.raises(InvalidValueError, match=r"^steps_per_epoch: must be given: decays are of"):
        times(tmp_path)
    assert steps_of(tmp_path, steps_per_epoch=40) == twice()
    described = Run(tmp_path).info()["checkpoints"]
    assert {one["holds"] for one in described} == {"weights"}


def test_the_updates_of_an_average_are_the_steps_of_an_epoch(tmp_path):
    for save in saves(ratio):
        file = tmp_path / f"epoch_{save.epoch}.pt"
        store_with_average(file, save, num_updates=save.step)
    assert steps_of(tmp_path) == twice()
    assert "steps are the updates that the averages have counted" in says(tmp_path)


def check_average(run: Run) -> None:
    made = run.average(0.1, dtype="float64")
    assert distance(made, true_average(0.1)) < 3 * made.predicted_error


def test_a_decay_and_numbers_that_may_be_epochs(tmp_path, caplog):
    """Of kept best epochs the averages are left out, and an import sees that the decay does not
    fit; with the steps of an epoch it does."""
    for epoch in (3, 4, 6, 7, 9, 10):
        store_with_average(tmp_path / f"net_{epoch}.pt", saves()[epoch - 1])
    check_average(Run(tmp_path))
    assert "6 EMAs, such as net_10.pt, left out of averages: their decay is of" in caplog.text
    assert "nothing states their unit" in caplog.text
    with pytest.raises(InvalidValueError, match=r"^ema_decay 0\.95: does not fit the files"):
        times(tmp_path)
    assert steps_of(tmp_path, steps_per_epoch=40)[-1] == STEPS


def test_averages_alone_by_epoch(tmp_path, run):
    """Files of MACE have an average only; steps of an epoch make a run of it."""
    for save in saves():
        file = tmp_path / f"water_run-123_epoch-{save.epoch - 1}.pt"
        torch.save({"model": save.average}, file)
    settings = {"kind": "ema", "ema_decay": 0.95}
    with pytest.raises(InvalidValueError, match=r"^steps_per_epoch: must be given"):
        times(tmp_path, **settings)
    import_checkpoints(tmp_path, run, steps_per_epoch=40, **settings)
    sources = Run(run).sources
    steps = [save.step for save in saves()]
    assert [one.t for one in sources] == steps
    assert all(isinstance(one.profile, OrdinaryEMA) for one in sources)
    check_average(Run(run))


# --- odd files


@pytest.fixture
def epochs(tmp_path: Path) -> Path:
    """Return a folder with the weights of all epochs."""
    return write(tmp_path / "epochs", "epoch_{}.pt", same(*ALL))


def of_epoch_20(path):
    store(path, 20)


def another_model(path):
    torch.save({"model": {"x": torch.ones(3)}}, path)


def text(path):
    path.write_text("these are the good ones")


def broken(path):
    path.write_bytes(b"PK\x03\x04" + bytes(40))


def without_tensors(path):
    torch.save({"losses": [1.0, 2.0]}, path)


ODD = {
    "latest.ckpt": (of_epoch_20, "no step"),
    "vae_30.pt": (another_model, "another model"),
    "notes.pt": (text, "cannot be"),
    "broken.pt": (broken, ""),
    "log_5.pt": (without_tensors, "holds no"),
    "step_400.pt": (of_epoch_20, "another kind"),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_is_left_out_and_named(odd, epochs, caplog):
    make, reason = ODD[odd]
    make(epochs / odd)
    assert epochs_of(epochs) == ALL
    assert f"left out: {odd} ({reason}" in caplog.text


@pytest.mark.parametrize("odd", ["optimizer_20.pt", "scheduler_20.pt", "rng_state_20.pth"])
def test_states_of_a_training_are_no_models(odd, epochs):
    torch.save({"x": torch.ones(3)}, epochs / odd)
    assert epochs_of(epochs) == ALL


def test_a_copy_that_says_its_epoch_is_one_time(tmp_path, caplog):
    """Equal or not, a file without a number does not replace the numbered one."""
    write(tmp_path, "epoch_{}.pt", same(*ALL), has_its_epoch)
    store(tmp_path / "last.pt", 20, epoch=20)
    store(tmp_path / "best.pt", 6, epoch=7)
    sources = Run(tmp_path).sources
    assert [one.t for one in sources] == ALL
    assert all(one.path.name.startswith("epoch_") for one in sources)
    assert "best.pt: left out, as epoch_7.pt has the same number" in caplog.text
    assert "last.pt" not in caplog.text


@pytest.mark.parametrize("size", [100, 5000])
def test_a_truncated_file_of_the_run_is_an_error(size, epochs):
    os.truncate(epochs / "epoch_7.pt", size)
    with pytest.raises(FileFormatError, match=r"epoch_7\.pt"):
        _ = Run(epochs).sources
    described = Run(epochs).info()
    assert len(described["checkpoints"]) == 20
    assert any("epoch_7.pt" in problem for problem in described["problems"])


def test_two_models_of_about_equally_many_files_are_an_error(tmp_path):
    write(tmp_path, "epoch_{}.pt", same(*range(1, 6)))
    for epoch in range(6, 10):
        another_model(tmp_path / f"epoch_{epoch}.pt")
    with pytest.raises(MismatchError, match=r"epoch_1\.pt and .*epoch_6\.pt"):
        _ = Run(tmp_path).sources


def test_epochs_and_steps_do_not_mix(tmp_path):
    write(tmp_path, "epoch_{}.pt", same(1, 2, 3))
    write(tmp_path, "step_{}.pt", {80: 4, 100: 5})
    with pytest.raises(MismatchError, match="are numbered by steps and by epochs"):
        _ = Run(tmp_path).sources
    assert len(Run(tmp_path).info()["checkpoints"]) == 5


@pytest.mark.parametrize("folder", ["exp_100epochs", "lr-3_ep50", "of_9_steps", "checkpoint-7"])
def test_the_number_of_an_experiment_is_none_of_its_files(folder, tmp_path, caplog):
    place = write(tmp_path / folder, "epoch_{}.pt", same(*ALL))
    store(place / "best.pt", 7)
    assert epochs_of(place) == ALL
    assert "left out: best.pt (no step)" in caplog.text
    store(place / "best.pt", 7, epoch=7)
    assert epochs_of(place) == ALL


# --- files without a number


WORDS = {"first": 5, "middle": 10, "newest": 20}


def test_the_content_has_the_step(tmp_path):
    for word, epoch in WORDS.items():
        store(tmp_path / f"{word}.pt", epoch, global_step=EACH * epoch)
    assert steps_of(tmp_path) == [100, 200, 400]
    assert says(tmp_path) == "steps, by 'global_step' in the contents"
    assert Run(tmp_path).sources[0].has_step_unit


def test_the_content_has_the_epoch(tmp_path):
    for word, epoch in WORDS.items():
        store(tmp_path / f"{word}.pt", epoch, epoch=epoch)
    assert epochs_of(tmp_path) == [5, 10, 20]  # the folder has the word, too
    assert steps_of(tmp_path, steps_per_epoch=EACH) == [100, 200, 400]


# --- folders


@pytest.mark.parametrize("name", ["epoch_{}", "epoch_{}/model"])
@pytest.mark.parametrize("ending", ["th", "tar", "bin", "pth.tar", "ckpt", "pkl", "pth"])
def test_files_and_folders_of_every_ending(ending, name, tmp_path):
    for epoch in (1, 2, 3):
        file = tmp_path / f"{name.format(epoch)}.{ending}"
        file.parent.mkdir(exist_ok=True)
        store(file, epoch)
    assert epochs_of(tmp_path) == [1, 2, 3]


# --- info


def two_unknown_sets(folder):
    """Write averages of unknown decay, by epoch."""
    for save in saves():
        content = {"model": save.weights, "ema": save.average}
        torch.save(content, folder / f"epoch_{save.epoch}.pt")


def two_averages(folder):
    for save in saves():
        content = {
            "model": save.weights,
            "ema": save.average,
            "ema2": save.average,
        }
        torch.save(content, folder / f"step_{save.step}.pt")


def of_no_time(folder):
    for name in ("a", "b"):
        store(folder / f"{name}.pt", 3)


def of_one_time(folder):
    store(folder / "a_5.pt", 5)
    store(folder / "b_5.pt", 6)


def of_ema_pytorch(folder):
    content = {
        "initted": torch.tensor(True),
        "w": torch.ones(3),
    }
    for step in (1, 2):
        torch.save(content, folder / f"0.{step}.pt")


def of_modules_without_tensors(folder):
    torch.save({"model": None, "epoch": 3}, folder / "epoch_3.pt")


UNCLEAR = {
    two_unknown_sets: "--steps-per-epoch",
    two_averages: "average",
    of_no_time: "its step",
    of_one_time: "are both of step 5",
    of_ema_pytorch: "sigma_rels",
    of_modules_without_tensors: "no tensors",
}


@pytest.mark.parametrize("make", UNCLEAR)
def test_info_answers_where_an_import_has_to_be_told_something(make, tmp_path, ema):
    make(tmp_path)
    shown = ema("info", tmp_path)
    assert shown.code in (0, 1), shown.err
    assert UNCLEAR[make] in shown.out + shown.err
    assert ema("info", tmp_path, "--json").json["checkpoints"]


def test_info_says_what_numbers_are_taken_for(tmp_path, ema):
    write(tmp_path, "model_{}.pth", same(*ALL))
    sentence = "epochs, counted from 1: they follow each other without a gap"
    assert Run(tmp_path).info()["numbers"] == sentence
    for command in (["info"], ["import", "--dry-run"]):
        shown = ema(*command, tmp_path).out
        assert sentence in " ".join(shown.split())


# --- numbers in contents and names that differ, and files beside folders


def test_a_count_that_repeats_gives_way_to_the_numbers_in_names(tmp_path, caplog):
    """VITS stores the epoch as `iteration`."""
    for epoch in (1, 2, 3, 4):
        store(tmp_path / f"G_{100 * epoch}.pth", epoch, iteration=(epoch + 1) // 2)
    assert steps_of(tmp_path) == [100, 200, 300, 400]
    (line,) = caplog.messages
    taken = "taken is that in names, as 'iteration' in the contents repeats"
    said = "G_100.pth: 'iteration' in the contents is 1, and the number in its name 100"
    assert line.endswith(f"{said}: {taken}")


def test_a_count_that_contradicts_names_is_said(tmp_path, caplog):
    for epoch in (1, 2, 3, 4):
        store(tmp_path / f"G_{100 * epoch}.pth", epoch, iteration=2 * epoch)
    assert steps_of(tmp_path) == [2, 4, 6, 8]
    said = "the number in its name 100: taken is 'iteration' in the contents; `step_from`"
    assert said in caplog.text


WITHIN = {
    30: (0, 30),
    90: (0, 90),
    110: (1, 10),
    160: (1, 60),
    250: (2, 50),
    300: (2, 100),
}
"""The epoch and the step within it, of 100, at some steps."""


@pytest.mark.parametrize("key", ["step", "iteration", None])
@pytest.mark.parametrize("first", [0, 1])
def test_steps_that_begin_anew_in_each_epoch(key, first, tmp_path):
    for step, (epoch, within) in WITHIN.items():
        number = epoch + first
        if key is None:
            file = tmp_path / f"epoch_{number}_iter_{within}.pt"
            store(file, 1)
        else:
            file = tmp_path / f"2024-05-01_{step}.pt"
            values = {"epoch": number, key: within}
            store(file, 1, **values)
    asked = "steps_per_epoch: must be given: numbers are steps that begin anew in each epoch"
    with pytest.raises(InvalidValueError, match=asked):
        times(tmp_path)
    with pytest.raises(InvalidValueError, match="steps_per_epoch 99: must be at least 100"):
        times(tmp_path, steps_per_epoch=99)
    assert steps_of(tmp_path, steps_per_epoch=100) == [*WITHIN]
    found = steps_of(tmp_path, steps_per_epoch=100, first_epoch=0)
    assert found == [100 * first + step for step in WITHIN]


def test_steps_at_the_ends_of_epochs_begin_anew(tmp_path):
    for epoch in (1, 2, 3):
        store(tmp_path / f"epoch_{epoch}_iter_100.pt", epoch)
    assert steps_of(tmp_path, steps_per_epoch=100) == [100, 200, 300]


def test_an_epoch_that_begins_anew_at_a_resume_changes_no_step_of_all(tmp_path):
    for step, (_, within) in WITHIN.items():
        store(tmp_path / f"step={step}.ckpt", 1, global_step=step, epoch=within)
    assert steps_of(tmp_path) == [*WITHIN]


@pytest.mark.parametrize("key", ["step", "iteration"])
@pytest.mark.parametrize("first", [0, 1])
def test_steps_go_on_where_epochs_begin_anew_at_a_resume(key, first, tmp_path):
    """Epochs of 100 steps, resumed at step 480; names by the epoch within may mean either."""
    for step in range(60, 960, 60):
        since = step if step <= 480 else step - 480
        epoch = first + since // 100
        values = {"epoch": epoch, key: step}
        store(tmp_path / "steps" / f"s{step}.pt", 1 + step % 20, **values)
        store(tmp_path / "both" / f"epoch_{epoch}_step_{step}.pt", 1 + step % 20, **values)
    assert steps_of(tmp_path / "steps") == [*range(60, 960, 60)]
    with pytest.raises(InvalidValueError, match="steps_per_epoch: must be given"):
        times(tmp_path / "both")


COUNTS = [
    "n_iter",
    "it",
    "total_steps",
    "step_count",
    "num_updates",
]


@pytest.mark.parametrize("key", COUNTS)
def test_a_lone_count_in_the_contents_is_read_where_names_have_no_number(key, tmp_path):
    for epoch in (1, 2, 4):
        values = {key: 100 * epoch, "lr": 0.1}
        store(tmp_path / f"{'abcde'[epoch]}.pt", epoch, **values)
    assert steps_of(tmp_path) == [100, 200, 400]
    assert says(tmp_path) == f"steps, by {key!r} in the contents"


def test_of_two_counts_in_the_contents_none_is_read(tmp_path):
    for epoch in (1, 2):
        store(tmp_path / f"{'abc'[epoch]}.pt", epoch, n_iter=100 * epoch, max_steps=900)
    with pytest.raises(InvalidValueError, match="neither its content nor its name tells"):
        times(tmp_path)


NUMBERS = [
    np.int64,
    np.array,
    np.float32,
    lambda step: np.array(step, dtype=">i4"),
]


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_step_may_be_a_number_of_numpy(kind, protocol, tmp_path):
    for epoch in (1, 2, 4):
        content = {"model": weights_at(epoch), "step": kind(300 * epoch)}
        torch.save(content, tmp_path / f"{'abcde'[epoch]}.pt", pickle_protocol=protocol)
    assert steps_of(tmp_path) == [300, 600, 1200]


def test_a_folder_without_a_number_is_left_out_of_a_glob(tmp_path, caplog):
    for name, epoch in {"100k": 1, "200k": 2, "latest": 2}.items():
        folder = tmp_path / name
        folder.mkdir()
        store(folder / "weights.pth", epoch)
    place = tmp_path / "*" / "weights.pth"
    assert steps_of(place, step_from=r"/(\d+)k/") == [100, 200]
    (line,) = caplog.messages
    assert line.endswith("left out: latest/weights.pth (no step)")


@pytest.mark.parametrize(
    "steps",
    [
        [4, 8, 12],
        [5, 9, 13],
        [3, 7, 11],
        [200, 400, 600],
    ],
    ids=str,
)
def test_a_step_that_names_do_not_exceed_is_taken(steps, tmp_path, caplog):
    for number in (1, 2, 3):
        store(tmp_path / f"m{4 * number}.pt", number, step=steps[number - 1])
    assert steps_of(tmp_path) == steps
    assert not caplog.messages


def test_two_files_of_one_number_are_answered_by_what_chooses_files(tmp_path):
    write(tmp_path, "model{:06}.pt", same(5, 10))
    write(tmp_path, "other{:06}.pt", {5: 7, 10: 12})
    with pytest.raises(MismatchError, match="are both of") as caught:
        times(tmp_path)
    assert str(caught.value).endswith("by a glob, or import with `step_from`")


@pytest.mark.parametrize("folder", ["{}.ckpt", "{:07}"])
def test_a_folder_whose_name_is_a_number_has_that_of_its_files(folder, tmp_path):
    for step in (100, 200, 400):
        place = tmp_path / folder.format(step)
        place.mkdir()
        store(place / "nnet.00-of-01.pth", step // 100)
        torch.save(step, place / "step.pth")
    assert steps_of(tmp_path) == [100, 200, 400]
    assert steps_of(tmp_path / "*" / "nnet*.pth") == [100, 200, 400]


def test_the_number_of_an_experiment_is_no_step_of_a_glob(tmp_path):
    for number in (1, 2, 3):
        folder = tmp_path / str(number)
        folder.mkdir()
        store(folder / "last.pt", number)
    with pytest.raises(InvalidValueError, match="neither its content nor its name tells its step"):
        times(tmp_path / "*" / "last.pt")


def lora(folder: Path, files: int, states: int) -> Path:
    """Write series of weights as kohya does: of the last step without a number in the name."""
    for epoch in range(1, files + 1):
        step = 100 * epoch
        name = "lora" if epoch == files else f"lora-step{step:08}"
        metadata = {"ss_steps": str(step)}
        save_file(weights_at(epoch), folder / f"{name}.safetensors", metadata)
    for epoch in range(1, states + 1):
        step = 100 * epoch
        state = folder / f"lora-step{step:08}-state"
        state.mkdir()
        save_file(weights_at(epoch), state / "model.safetensors")
    return folder


def test_a_series_of_weights_counts_beside_states(tmp_path):
    assert steps_of(lora(tmp_path, 5, 4)) == [100, 200, 300, 400, 500]


def test_more_states_than_weights_are_asked_for(tmp_path):
    lora(tmp_path, 4, 6)
    globs = r"by a glob: '(\S+/\*state)' or '(\S+/lora-step\*\.safetensors)'"
    with pytest.raises(InvalidValueError, match=globs) as caught:
        times(tmp_path)
    states = str(caught.value).split("'")[1]
    assert steps_of(Path(states)) == [100, 200, 300, 400, 500, 600]


def test_the_step_in_the_metadata_of_ai_toolkit(tmp_path):
    names = {
        "lora_000000100": 100,
        "lora_000000200": 200,
        "lora": 300,
    }
    for name, step in names.items():
        info = json.dumps({"step": step, "epoch": 1})
        file = tmp_path / f"{name}.safetensors"
        weights = weights_at(step // 100)
        save_file(weights, file, {"training_info": info})
    assert steps_of(tmp_path) == [100, 200, 300]


def test_a_text_that_another_program_calls_training_info(tmp_path):
    file = tmp_path / "m-7.safetensors"
    metadata = {"training_info": "a text"}
    save_file(weights_at(1), file, metadata)
    assert steps_of(tmp_path) == [7]


def test_a_file_of_states_alone_is_said(tmp_path):
    file = tmp_path / "checkpoint.0.100.pt"
    state = {"exp_avg": torch.ones(3)}
    torch.save({"epoch": 1, "optimizer_state_dict": state}, file)
    with pytest.raises(FileFormatError, match="no weights, only tensors under 'optimizer_st"):
        times(file)


def test_a_set_that_a_file_lacks_is_said(tmp_path):
    file = tmp_path / "m-1.pt"
    torch.save({"a.weight": torch.ones(3)}, file)
    reason = r"has no set of tensors 'ema': only tensors 'a\.weight'"
    with pytest.raises(FileFormatError, match=reason):
        times(file, average="ema")
