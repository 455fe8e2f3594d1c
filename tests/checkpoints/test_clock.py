"""What the numbers of checkpoints count, and which files are a run."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from saved import asked, check_error, fault, read, times, write_each
from walks import EVERY, STEPS

from posthoc_cli import Run

ALL = [*range(1, 21)]
BEST = [3, 7, 9, 20]
"""The epochs of files that were kept because they are the best."""


def store(path, **values):
    """Write weights, and values beside them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = {
        "w": torch.rand(3),
        "b": torch.rand(2),
    }
    torch.save({"model": model, **values}, path)


def write(folder, name, numbers, **values):
    """Write weights by the numbers in names; return the folder."""
    for number in numbers:
        store(folder / name.format(number), **values)
    return folder


def of_unit(unit, place, **settings):
    """Return the times of an import, which are of this unit."""
    found = read(place, **settings).checkpoints
    assert {one.t_unit for one in found} == {unit}
    return [one.t for one in found]


def epochs_of(place):
    return of_unit("epochs", place)


def steps_of(place, **settings):
    return of_unit("steps", place, **settings)


def says(place, **settings):
    return read(place, **settings).numbers


# --- epochs


@pytest.mark.parametrize(
    ("name", "numbers", "first"),
    [
        ("model_{}.pth", ALL, 1),
        ("{}epoch.pth", ALL, 1),
        ("model.ep={:04}.ckpt", ALL, 1),
        ("model_{}.pth", range(20), 0),
        ("epoch_{}.pt", (4, 9, 14, 19), 0),
    ],
)
def test_numbers_of_epochs(name, numbers, first, tmp_path):
    write(tmp_path, name, numbers)
    epochs = [number + 1 - first for number in numbers]
    assert epochs_of(tmp_path) == epochs
    assert says(tmp_path).startswith(f"epochs, counted from {first}: ")
    assert steps_of(tmp_path, steps_per_epoch=20) == [20 * epoch for epoch in epochs]


@pytest.mark.parametrize(
    ("numbers", "ahead", "values", "first"),
    [
        (BEST, 0, {}, 1),
        (BEST, 0, {"arch": "vit", "version": 2}, 0),  # as of timm
        ((2, 5, 8, 19), 1, {}, 0),
    ],
)
def test_numbers_of_which_the_contents_have_the_epoch(numbers, ahead, values, first, tmp_path):
    for number in numbers:
        store(tmp_path / f"checkpoint-{number}.pth", epoch=number + ahead, **values)
    assert epochs_of(tmp_path) == [number + 1 - first for number in numbers]


def test_a_first_epoch_that_nothing_shows_is_said(tmp_path):
    write(tmp_path, "epoch_{}.pt", BEST)
    unknown = ", and nothing shows the first: `first_epoch` is 0 if it is"
    assert says(tmp_path).endswith(f"by the word for epochs in names{unknown}")
    settings = {
        "first_epoch": 0,
        "steps_per_epoch": 20,
    }
    assert steps_of(tmp_path, **settings) == [80, 160, 200, 420]
    said = says(tmp_path, **settings)
    assert said.endswith("in names; the first checkpoint is of step 80")


def test_numbers_with_gaps_are_steps_which_nothing_states(tmp_path):
    write(tmp_path, "model_{}.pth", BEST, epoch=2)
    assert steps_of(tmp_path) == BEST
    said = says(tmp_path)
    assert said.startswith("taken for steps: they are the only number in names, and nothing states")


def test_steps_and_images_are_not_mixed(tmp_path):
    store(tmp_path / "model_3.pth", global_step=3)
    store(tmp_path / "model_7.pth", state={"cur_nimg": 640})
    assert "some files state their steps, and others images" in asked(tmp_path)


def test_weights_before_the_training_are_left_out(tmp_path, caplog):
    """Of a first epoch 1, the number 0 is before the training, as is a step 0."""
    place = write(tmp_path / "epochs", "epoch_{}.pt", range(4))
    assert times(place, first_epoch=1) == [1, 2, 3]
    assert "epoch_0.pt: left out, as its weights are those before the training" in caplog.text
    assert times(write(tmp_path, "step_{}.pt", (0, 100, 250))) == [100, 250]


def test_numbers_that_are_steps_take_no_epochs(tmp_path):
    write(tmp_path, "step_{}.pt", ALL)
    assert steps_of(tmp_path) == ALL
    reason = "does not apply to numbers that are steps, by the word for steps in names"
    assert reason in asked(tmp_path, steps_per_epoch=20)


def with_decay(save):
    """Return weights and their average, whose decay is stated."""
    return {
        "model": save.weights,
        "ema": {"params": save.average, "decay": 0.95},
    }


def test_a_decay_and_numbers_that_may_be_epochs(tmp_path, caplog):
    """Of kept best epochs the averages are left out, and an import sees that the decay does not
    fit; with the steps of an epoch it does."""
    write_each(tmp_path, "net_{save.epoch}.pt", with_decay)
    for epoch in (1, 2, 5, 8):
        (tmp_path / f"net_{epoch}.pt").unlink()
    check_error(tmp_path, 0.1)
    assert "6 EMAs, such as net_10.pt, left out of averages: their decay is of" in caplog.text
    assert asked(tmp_path).startswith("ema_decay 0.95: does not fit the files")
    assert steps_of(tmp_path, steps_per_epoch=EVERY)[-1] == STEPS


# --- odd files


@pytest.fixture
def epochs(tmp_path):
    """Return a folder with the weights of all epochs."""
    return write(tmp_path / "epochs", "epoch_{}.pt", ALL)


def another_model(path):
    torch.save({"model": {"x": torch.ones(3)}}, path)


def text(path):
    path.write_text("these are the good ones")


def optimizer(path):
    torch.save({"state": {0: {"v": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}, path)


ODD = {
    "epoch_7_optimizerG.pt": (optimizer, "holds no weights"),  # KAIR's name
    "latest.ckpt": (store, "no step"),
    "vae_30.pt": (another_model, "another model"),
    "notes.pt": (text, "cannot be"),
    "step_400.pt": (store, "another kind"),
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_is_left_out_and_named(odd, epochs, caplog):
    make, reason = ODD[odd]
    make(epochs / odd)
    assert epochs_of(epochs) == ALL
    assert f"left out: {odd} ({reason}" in caplog.text


def test_states_of_a_training_are_no_models(epochs):
    for name in ("optimizer_20.pt", "scheduler_20.pt", "rng_state_20.pth"):
        another_model(epochs / name)
    assert epochs_of(epochs) == ALL


def test_a_copy_that_says_its_epoch_is_one_time(tmp_path, caplog):
    """Equal or not, a file without a number does not replace the numbered one."""
    for epoch in ALL:
        store(tmp_path / f"epoch_{epoch}.pt", epoch=epoch)
    shutil.copy(tmp_path / "epoch_20.pt", tmp_path / "last.pt")
    store(tmp_path / "best.pt", epoch=7)
    names = [one.path.name for one in Run(tmp_path).sources]
    assert names == [f"epoch_{epoch}.pt" for epoch in ALL]
    assert "best.pt: left out, as epoch_7.pt has the same number" in caplog.text
    assert "last.pt" not in caplog.text


def test_a_truncated_file_of_the_run_is_an_error(epochs):
    os.truncate(epochs / "epoch_7.pt", 100)
    assert "epoch_7.pt" in fault(epochs)
    described = Run(epochs).info()
    assert len(described["checkpoints"]) == 20
    assert any("epoch_7.pt" in problem for problem in described["problems"])


def test_two_models_of_about_equally_many_files_are_an_error(tmp_path):
    write(tmp_path, "epoch_{}.pt", range(1, 6))
    for epoch in range(6, 10):
        another_model(tmp_path / f"epoch_{epoch}.pt")
    said = fault(tmp_path)
    assert "epoch_1.pt and " in said
    assert "epoch_6.pt: do not match" in said


def test_epochs_and_steps_do_not_mix(tmp_path):
    write(tmp_path, "epoch_{}.pt", (1, 2, 3))
    write(tmp_path, "step_{}.pt", (80, 100))
    assert "are numbered by steps and by epochs" in fault(tmp_path)


@pytest.mark.parametrize("folder", ["exp_100epochs", "of_9_steps"])
def test_the_number_of_an_experiment_is_none_of_its_files(folder, tmp_path, caplog):
    place = write(tmp_path / folder, "epoch_{}.pt", ALL)
    store(place / "best.pt")
    assert epochs_of(place) == ALL
    assert "left out: best.pt (no step)" in caplog.text
    store(place / "best.pt", epoch=7)
    assert epochs_of(place) == ALL


# --- numbers in contents


@pytest.mark.parametrize(
    ("key", "unit"),
    [
        ("global_step", "steps"),
        ("last_epoch", "epochs"),
        ("n_iter", "steps"),
        ("it", "steps"),
        ("step_count", "steps"),
        ("num_updates", "steps"),
        ("batch_idx_train", "steps"),  # as of icefall
    ],
)
def test_a_number_in_the_contents_alone(key, unit, tmp_path):
    place = tmp_path / "an_epoch"
    store(place / "first.pt", **{key: 100, "lr": 0.1})
    store(place / "newest.pt", **{key: 300, "lr": 0.1})
    assert of_unit(unit, place) == [100, 300]
    assert " in the contents" in says(place)
    assert Run(place).sources[0].has_step_unit == (unit == "steps")


def test_of_two_counts_in_the_contents_none_is_read(tmp_path):
    store(tmp_path / "a.pt", n_iter=100, max_steps=900)
    assert "neither its content nor its name tells" in asked(tmp_path)


def test_a_step_may_be_a_number_of_numpy(tmp_path):
    numbers = (
        np.int64(100),
        np.float32(200),
        np.array(300),
        np.array(400, dtype=">i4"),
    )
    for name, number in zip("abcd", numbers, strict=True):
        store(tmp_path / f"{name}.pt", step=number)
    assert steps_of(tmp_path) == [100, 200, 300, 400]


@pytest.mark.parametrize(
    ("name", "counts"), [("iteration", [1, 2, 4, 5]), ("global_step", [1, 1, 2, 2])]
)
def test_a_count_of_epochs_gives_way_to_the_numbers_in_names(name, counts, tmp_path, caplog):
    """VITS stores the epoch as `iteration`: each was taken for a step. Other counts repeat."""
    for number, count in enumerate(counts, 1):
        store(tmp_path / f"G_{100 * number}.pth", **{name: count})
    assert steps_of(tmp_path) == [100, 200, 300, 400]
    said = f"G_100.pth: '{name}' in the contents is 1, and the number in its name 100"
    assert f"{said}: taken is that in names" in caplog.text


def test_a_count_that_contradicts_names_is_said(tmp_path, caplog):
    for epoch in (1, 2, 3):
        store(tmp_path / f"G_{100 * epoch}.pth", global_step=2 * epoch)
    assert steps_of(tmp_path) == [2, 4, 6]
    said = "the number in its name 100: taken is 'global_step' in the contents; `step_from`"
    assert said in caplog.text


@pytest.mark.parametrize(
    "steps",
    [
        [3, 7, 11],
        [200, 400, 600],
    ],
)
def test_a_step_that_names_do_not_exceed_is_taken(steps, tmp_path, caplog):
    for number, step in zip((4, 8, 12), steps, strict=True):
        store(tmp_path / f"m{number}.pt", step=step)
    assert steps_of(tmp_path) == steps
    assert not caplog.messages


# --- steps that begin anew in each epoch


WITHIN = {
    30: (0, 30),
    90: (0, 90),
    110: (1, 10),
    250: (2, 50),
    300: (2, 100),
}
"""The epoch and the step within it, of 100, at some steps."""


def in_names(folder, step, epoch, within):
    store(folder / f"epoch_{epoch}_iter_{within}.pt")


def in_contents(folder, step, epoch, within):
    store(folder / f"2024-05-01_{step}.pt", epoch=epoch, step=within)


@pytest.mark.parametrize("save", [in_names, in_contents])
@pytest.mark.parametrize("first", [0, 1])
def test_steps_that_begin_anew_in_each_epoch(save, first, tmp_path):
    for step, (epoch, within) in WITHIN.items():
        save(tmp_path, step, epoch + first, within)
    reason = "steps_per_epoch: must be given: numbers are steps that begin anew in each epoch"
    assert reason in asked(tmp_path)
    assert "steps_per_epoch 99: must be at least 100" in asked(tmp_path, steps_per_epoch=99)
    assert steps_of(tmp_path, steps_per_epoch=100) == [*WITHIN]
    later = [100 * first + step for step in WITHIN]
    assert steps_of(tmp_path, steps_per_epoch=100, first_epoch=0) == later


def test_steps_at_the_ends_of_epochs_begin_anew(tmp_path):
    write(tmp_path, "epoch_{}_iter_100.pt", (1, 2, 3))
    assert steps_of(tmp_path, steps_per_epoch=100) == [100, 200, 300]


def test_an_epoch_that_begins_anew_at_a_resume_changes_no_step_of_all(tmp_path):
    for step, (_, within) in WITHIN.items():
        store(tmp_path / f"step={step}.ckpt", global_step=step, epoch=within)
    assert steps_of(tmp_path) == [*WITHIN]


def test_steps_go_on_where_epochs_begin_anew_at_a_resume(tmp_path):
    """Names by the epoch may mean either."""
    epochs = {
        60: 1,
        180: 2,
        240: 3,
        300: 1,
        360: 2,
    }
    for step, epoch in epochs.items():
        values = {
            "epoch": epoch,
            "iteration": step,
        }
        store(tmp_path / "steps" / f"s{step}.pt", **values)
        store(tmp_path / "both" / f"epoch_{epoch}_step_{step}.pt", **values)
    assert steps_of(tmp_path / "steps") == [*epochs]
    assert "steps_per_epoch: must be given" in asked(tmp_path / "both")


# --- folders


@pytest.mark.parametrize("name", ["epoch_{}", "epoch_{}/model"])
@pytest.mark.parametrize("ending", ["th", "tar", "pth.tar", "pkl"])
def test_files_and_folders_of_every_ending(ending, name, tmp_path):
    write(tmp_path, f"{name}.{ending}", (1, 2, 3))
    assert epochs_of(tmp_path) == [1, 2, 3]


def test_a_folder_without_a_number_is_left_out_of_a_glob(tmp_path, caplog):
    write(tmp_path, "{}/weights.pth", ("100k", "200k", "latest"))
    place = tmp_path / "*" / "weights.pth"
    assert steps_of(place, step_from=r"/(\d+)k/") == [100, 200]
    (line,) = caplog.messages
    assert line.endswith("left out: latest/weights.pth (no step)")


@pytest.mark.parametrize("folder", ["{}.ckpt", "{:07}"])
def test_a_folder_whose_name_is_a_number_has_that_of_its_files(folder, tmp_path):
    steps = [100, 200, 400]
    write(tmp_path, f"{folder}/nnet.00-of-01.pth", steps)
    for entry in tmp_path.iterdir():
        torch.save(1, entry / "step.pth")
    assert steps_of(tmp_path) == steps
    assert steps_of(tmp_path / "*" / "nnet*.pth") == steps


def test_the_number_of_an_experiment_is_no_step_of_a_glob(tmp_path):
    write(tmp_path, "{}/last.pt", (1, 2, 3))
    reason = "neither its content nor its name tells its step"
    assert reason in asked(tmp_path / "*" / "last.pt")


def lora(folder, files, states):
    """Write series of weights as kohya does: of the last step without a number in the name."""
    names = [f"lora-step{100 * number:08}" for number in range(1, states + 1)]
    for name in names:
        store(folder / f"{name}-state" / "model.bin")
    for step in range(100, 100 * files + 1, 100):
        name = f"lora-step{step:08}"
        if step == 100 * files:
            name = "lora"
        weights = {"w": torch.rand(3)}
        save_file(weights, folder / f"{name}.safetensors", {"ss_steps": str(step)})
    return folder


def test_a_series_of_weights_counts_beside_states(tmp_path):
    assert steps_of(lora(tmp_path, 5, 4)) == [100, 200, 300, 400, 500]


def test_more_states_than_weights_are_asked_for(tmp_path):
    lora(tmp_path, 4, 6)
    globs = f"by a glob: '{tmp_path}/*state' or '{tmp_path}/lora-step*.safetensors'"
    assert globs in asked(tmp_path)
    assert steps_of(tmp_path / "*state") == [100, 200, 300, 400, 500, 600]


@pytest.mark.parametrize(
    ("info", "step"),
    [
        (json.dumps({"step": 300, "epoch": 1}), 300),
        ("a text of another program", 7),
    ],
)
def test_the_step_in_the_metadata_of_ai_toolkit(info, step, tmp_path):
    file = tmp_path / "lora-7.safetensors"
    save_file({"w": torch.ones(3)}, file, {"training_info": info})
    assert steps_of(file) == [step]


# --- info, and what is asked for


def two_unknown_sets(folder):
    """Write averages of unknown decay, by epoch."""
    write_each(
        folder, "epoch_{save.epoch}.pt", lambda save: {"model": save.weights, "ema": save.average}
    )


def of_no_time(folder):
    write(folder, "{}.pt", "ab")


def of_one_time(folder):
    write(folder, "{}_5.pt", "ab")


def of_modules_without_tensors(folder):
    torch.save({"model": None, "epoch": 3}, folder / "epoch_3.pt")


UNCLEAR = {
    two_unknown_sets: "--steps-per-epoch",
    of_no_time: "its step",
    of_one_time: "are both of step 5; name the files of one run by a glob, such as 'a_*.pt' or 'b_",
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
    write(tmp_path, "model_{}.pth", ALL)
    sentence = "epochs, counted from 1: they follow each other without a gap"
    assert Run(tmp_path).info()["numbers"] == sentence
    for command in (["info"], ["import", "--dry-run"]):
        shown = ema(*command, tmp_path).out
        assert sentence in " ".join(shown.split())
