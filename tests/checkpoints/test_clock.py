"""What the numbers of checkpoints count, and which files are a run."""

import json
import os
import shlex
import shutil

import numpy as np
import pytest
import torch
from checking import refused
from safetensors.torch import save_file
from saved import asked, read, times, write_each
from walks import EVERY, STEPS

from posthoc_cli import Run
from posthoc_cli.errors import FileFormatError, InvalidValueError, MismatchError

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
        ((2, 5, 8, 19), 1, {}, 0),
    ],
)
def test_numbers_of_which_the_contents_have_the_epoch(numbers, ahead, values, first, tmp_path):
    for number in numbers:
        store(tmp_path / f"checkpoint-{number}.pth", epoch=number + ahead, **values)
    assert epochs_of(tmp_path) == [number + 1 - first for number in numbers]


def test_a_first_epoch_that_nothing_shows_is_said(tmp_path):
    write(tmp_path, "epoch_{}.pt", BEST)
    assert "`first_epoch`" in says(tmp_path)
    settings = {
        "first_epoch": 0,
        "steps_per_epoch": 20,
    }
    assert steps_of(tmp_path, **settings) == [80, 160, 200, 420]
    assert says(tmp_path, **settings).endswith(" step 80")


def test_numbers_with_gaps_are_steps_which_nothing_states(tmp_path):
    write(tmp_path, "model_{}.pth", BEST, epoch=2)
    assert steps_of(tmp_path) == BEST
    assert says(tmp_path).startswith("taken for steps: ")


def test_weights_before_the_training_are_left_out(tmp_path, caplog):
    """Of a first epoch 1, the number 0 is before the training, as is a step 0."""
    place = write(tmp_path / "epochs", "epoch_{}.pt", range(4))
    assert times(place, first_epoch=1) == [1, 2, 3]
    assert "epoch_0.pt: left out" in caplog.text
    assert times(write(tmp_path / "steps", "step_{}.pt", (0, 100, 250))) == [100, 250]


def test_numbers_that_are_steps_take_no_epochs(tmp_path):
    write(tmp_path, "step_{}.pt", ALL)
    assert steps_of(tmp_path) == ALL
    with refused("steps_per_epoch 20"):
        read(tmp_path, steps_per_epoch=20)


def with_decay(save):
    """Return weights and their average, whose decay is stated."""
    return {
        "model": save.weights,
        "ema": {"params": save.average, "decay": 0.95},
    }


def test_a_decay_and_numbers_that_may_be_epochs(tmp_path):
    """Of kept best epochs an import sees that the decay does not fit; with the steps of an epoch
    it does."""
    write_each(tmp_path, "net_{save.epoch}.pt", with_decay)
    for epoch in (1, 2, 5, 8):
        (tmp_path / f"net_{epoch}.pt").unlink()
    with refused("ema_decay 0.95"):
        read(tmp_path)
    assert steps_of(tmp_path, steps_per_epoch=EVERY)[-1] == STEPS


def test_a_decay_of_files_by_epoch_asks_for_the_steps_of_one(tmp_path):
    """Every command does, and weights alone need none."""
    write_each(tmp_path, "net_{save.epoch}.pt", with_decay)
    with refused("steps_per_epoch", "--steps-per-epoch N --out run"):
        _ = Run(tmp_path).sources
    assert of_unit("epochs", tmp_path, kind="checkpoints") == ALL[:10]


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
    "epoch_7_optimizerG.pt": optimizer,  # KAIR's name
    "latest.ckpt": store,
    "vae_30.pt": another_model,
    "notes.pt": text,
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_file_is_left_out_and_named(odd, epochs, caplog):
    ODD[odd](epochs / odd)
    assert epochs_of(epochs) == ALL
    assert f"left out: {odd} " in caplog.text


@pytest.mark.parametrize("odd", ["step_400.pt", "epoch_7_v2.pt", "merged_30.pt", "epoch_21b.pt"])
def test_a_numbered_file_that_is_no_copy_is_asked_about(odd, epochs):
    store(epochs / odd)
    said = asked(epochs)
    assert f"20 x epoch_*.pt, 1 x {odd}" in said
    shutil.copy(epochs / "epoch_20.pt", epochs / odd)
    assert epochs_of(epochs) == ALL


def test_the_best_file_is_left_out_at_an_earlier_time(epochs, caplog):
    store(epochs / "best_epoch_7.pt")
    assert epochs_of(epochs) == ALL
    assert "left out: best_epoch_7.pt " in caplog.text
    (epochs / "best_epoch_7.pt").rename(epochs / "best_epoch_21.pt")
    assert epochs_of(epochs) == [*ALL, 21]


def test_a_mean_of_some_files_is_no_average_at_its_number(epochs):
    """An import asked for the decay of an average after 5 epochs."""
    store(epochs / "epoch_avg_last_25.pt")
    said = asked(epochs)
    assert "20 x epoch_*.pt, 1 x epoch_avg_last_25.pt" in said
    assert epochs_of(shlex.split(said.partition("paste: ")[2])[2]) == ALL


def test_states_of_a_training_are_no_models(epochs):
    for name in ("optimizer_20.pt", "scheduler_20.pt", "rng_state_20.pth"):
        another_model(epochs / name)
    assert epochs_of(epochs) == ALL


def test_a_copy_of_a_numbered_file_is_left_out(tmp_path):
    """Equal or not, a file without a number does not replace the numbered one."""
    for epoch in ALL:
        store(tmp_path / f"epoch_{epoch}.pt", epoch=epoch)
    shutil.copy(tmp_path / "epoch_20.pt", tmp_path / "last.pt")
    store(tmp_path / "best.pt", epoch=7)
    sources = Run(tmp_path).sources
    assert [source.path.name for source in sources] == [f"epoch_{epoch}.pt" for epoch in ALL]
    (note,) = sources.notes
    assert "best.pt (at the time of one of epoch_*.pt)" in note
    assert "last.pt (a copy of epoch_20.pt)" in note


def test_a_truncated_file_of_the_run_is_an_error(epochs):
    os.truncate(epochs / "epoch_7.pt", 100)
    with refused(epochs / "epoch_7.pt", kind=FileFormatError):
        read(epochs)
    described = Run(epochs).info()
    assert len(described["checkpoints"]) == 20
    assert any("epoch_7.pt" in problem for problem in described["problems"])


def test_two_models_of_about_equally_many_files_are_an_error(tmp_path):
    write(tmp_path, "epoch_{}.pt", range(1, 6))
    for epoch in range(6, 10):
        another_model(tmp_path / f"epoch_{epoch}.pt")
    both = f"{tmp_path}/epoch_1.pt and {tmp_path}/epoch_6.pt"
    with refused(both, kind=MismatchError):
        read(tmp_path)


def test_epochs_and_steps_do_not_mix(tmp_path):
    write(tmp_path, "epoch_{}.pt", (1, 2, 3))
    write(tmp_path, "step_{}.pt", (80, 100))
    said = asked(tmp_path)
    assert "3 x epoch_*.pt" in said
    assert "2 x step_*.pt" in said
    assert said.endswith(("/epoch_*.pt' --out run", "/step_*.pt' --out run"))


@pytest.mark.parametrize("folder", ["exp_100epochs", "of_9_steps"])
def test_the_number_of_an_experiment_is_none_of_its_files(folder, tmp_path, caplog):
    place = write(tmp_path / folder, "epoch_{}.pt", ALL)
    store(place / "best.pt")
    assert epochs_of(place) == ALL
    assert "left out: best.pt " in caplog.text
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


def test_a_step_may_be_a_number_of_numpy(tmp_path):
    for name, number in zip("ab", (np.int64(100), np.float32(200)), strict=True):
        store(tmp_path / f"{name}.pt", step=number)
    assert steps_of(tmp_path) == [100, 200]


def test_a_count_of_epochs_behind_the_numbers_in_names_is_asked_about(tmp_path):
    """VITS stores the epoch as `iteration`: each was taken for a step."""
    for epoch in (1, 2, 4, 5):
        store(tmp_path / f"G_{100 * epoch}.pth", iteration=epoch)
    with refused("step_from", "'iteration'", r" --step-from 'G_(\d+)\.pth$' --out run"):
        read(tmp_path)
    assert steps_of(tmp_path, step_from=r"G_(\d+)") == [100, 200, 400, 500]


@pytest.mark.parametrize("name", ["G_step{1}_epoch{0}.pth", "{1}_v2.pth"])
def test_a_count_of_epochs_is_asked_about_beside_other_numbers_in_names(name, tmp_path):
    """Epochs were taken for steps, or proposed."""
    for epoch in (1, 2, 4, 5):
        store(tmp_path / name.format(epoch, 100 * epoch), iteration=epoch)
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    pattern = words[words.index("--step-from") + 1]
    assert steps_of(tmp_path, step_from=pattern) == [100, 200, 400, 500]


def test_a_count_that_repeats_gives_way_to_the_numbers_in_names(tmp_path):
    for number, count in enumerate((1, 1, 2, 2), 1):
        store(tmp_path / f"G_{100 * number}.pth", global_step=count)
    assert steps_of(tmp_path) == [100, 200, 300, 400]


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


def beside_names(folder, step, epoch, within):
    """In the first epoch both are equal, and the steps within all were taken."""
    store(folder / f"model_{step}.pt", epoch=epoch, step=within)


@pytest.mark.parametrize("save", [in_names, in_contents, beside_names])
def test_steps_that_begin_anew_in_each_epoch_are_refused(save, tmp_path):
    for step, (epoch, within) in WITHIN.items():
        save(tmp_path, step, epoch, within)
    with refused("step_from", "anew"):
        read(tmp_path)


def test_an_epoch_that_begins_anew_at_a_resume_changes_no_step_of_all(tmp_path):
    for step, (_, within) in WITHIN.items():
        store(tmp_path / f"step={step}.ckpt", global_step=step, epoch=within)
        store(tmp_path / "steps" / f"s{step}.pt", iteration=step, epoch=within)
    assert steps_of(tmp_path / "step=*") == steps_of(tmp_path / "steps") == [*WITHIN]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("iter_{}.pth", {"meta": {"iter": 0, "epoch": 1}}),  # mmengine
        ("ep0-ba{}-rank0.pt", {"state": {"timestamp": {"batch": 0, "sample": 9}}}),  # Composer
        ("checkpoint_1_{}.pt", {"optimizer_history": [{"num_updates": 3}, {"num_updates": 0}]}),
    ],
)
def test_a_value_deeper_in_the_content_confirms_a_number_in_the_name(name, values, tmp_path):
    for step in (100, 300):
        content = json.loads(json.dumps(values).replace(": 0", f": {step}"))
        store(tmp_path / name.format(step), **content)
    assert steps_of(tmp_path) == [100, 300]
    assert Run(tmp_path).sources[0].has_step_unit


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
    assert "left out: latest/weights.pth " in line


@pytest.mark.parametrize(
    ("name", "numbers", "steps"),
    [
        ("net_v2_{:_}.pt", (1000, 2000, 3500), [1000, 2000, 3500]),
        ("{}-7b.pt", (20250101, 20250301), [20250101, 20250301]),
        ("run{}.pt", ("1_900k", "2_1.2M", "3_1.50M"), [900_000, 1_200_000, 1_500_000]),
    ],
)
def test_a_question_about_steps_ends_in_a_pattern_that_reads_them(name, numbers, steps, tmp_path):
    write(tmp_path, name, numbers)
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    assert steps_of(tmp_path, step_from=words[words.index("--step-from") + 1]) == steps


@pytest.mark.parametrize(
    ("name", "numbers", "steps"),
    [
        ("a1_b{}.pt", (100, 200), [100, 200]),
        ("m{}k.pt", (1.5, 2.5), [1500, 2500]),
        ("net_{}.pt", ("900k", "1.2M"), [900_000, 1_200_000]),
        ("{:03}-0.5.pt", (1, 2, 30), [1, 2, 30]),
        ("lr1e-4_{}.pt", (5, 80), [5, 80]),
        ("v1.5_{}.pt", (5, 80), [5, 80]),
        ("net_{}.pt", ("100_fid48", "250_fid31"), [100, 250]),
    ],
)
def test_the_only_number_that_differs_in_names_is_the_time(name, numbers, steps, tmp_path):
    write(tmp_path, name, numbers)
    assert times(tmp_path) == steps


@pytest.mark.parametrize(
    ("name", "numbers", "steps"),
    [
        ("seed42_{}.pt", (100, 200, 900), [100, 200, 900]),
        ("exp-12_{}.ckpt", (100, 300), [100, 300]),
        ("net_{:_}.pt", (11_000, 12_000, 13_500), [11_000, 12_000, 13_500]),
        ("{}.ckpt", ("00_100_2.69", "01_200_1.33", "02_300_0.71"), [100, 200, 300]),
        ("{}-acc0.5.pt", ("01_100", "02_200"), [100, 200]),
        ("{}.pt", ("2024-05-01_a3-b100", "2024-05-01_a4-b250"), [100, 250]),
        ("{}.pt", ("0c77_1600", "b12a_1100", "d8e4_700"), [700, 1100, 1600]),
    ],
)
def test_no_seed_metric_or_date_is_proposed_as_a_step(name, numbers, steps, tmp_path):
    """The decimals of a loss were proposed, minutes, and 42,100 for the step 100 of the seed 42."""
    write(tmp_path, name, numbers)
    words = shlex.split(asked(tmp_path).partition("paste: ")[2])
    assert steps_of(tmp_path, step_from=words[words.index("--step-from") + 1]) == steps


@pytest.mark.parametrize("name", ["acc{}.pt", "best_fid-{}.pt", "wer={}/model.pt", "net_mAP{}.pt"])
def test_a_metric_that_is_a_whole_number_is_no_time(name, tmp_path):
    """The order of the metrics was that of the weights."""
    write(tmp_path, name, (71, 75, 74, 80))
    assert "cannot determine its training step" in asked(tmp_path)
    assert "paste" not in asked(tmp_path)


DATES = [
    "2024-05-01_12-{:02}-00.pt",
    "2024-05-{:02}.pt",
    "run.2024.05.{:02}.pt",
    "20240501-12{:02}00.pt",
    "model_20240501_12{:02}00.pt",
    "2024-05-01T12:30:{:02}/model.pt",
]


@pytest.mark.parametrize("name", DATES)
def test_a_part_of_a_date_is_no_step(name, tmp_path):
    """Minutes were taken for epochs, without a word."""
    write(tmp_path, name, range(21, 27))
    with pytest.raises(InvalidValueError, match="rename copies") as raised:
        read(tmp_path)
    assert "paste" not in str(raised.value)


def test_the_number_that_differs_beside_a_date_is_the_time(tmp_path):
    for number, step in enumerate((100, 200, 700), 1):
        store(tmp_path / f"a_2024-05-01_12-3{number}-00_{step}.pt")
        store(tmp_path / "other" / f"20240501-12300{number}_{step}.pt")
    assert steps_of(tmp_path / "a_*") == [100, 200, 700]
    assert steps_of(tmp_path / "other") == [100, 200, 700]


def test_a_date_beside_a_step_in_the_contents_is_taken(tmp_path):
    for number in (1, 2, 4):
        store(tmp_path / f"2024-05-01_12-3{number}-00.pt", step=100 * number)
    assert steps_of(tmp_path) == [100, 200, 400]


def test_k_and_m_that_repeat_a_time_have_no_proposal_for_a_part(tmp_path):
    """Of 20 files those in k alone were proposed."""
    write(tmp_path, "net_{}.pt", ("100k", "200k", "0.10M", "0.20M", "0.30M"))
    with pytest.raises(InvalidValueError, match="rename copies") as raised:
        read(tmp_path)
    assert "paste" not in str(raised.value)


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
    with refused(tmp_path / "1" / "last.pt"):
        read(tmp_path / "*" / "last.pt")


def test_a_series_of_weights_counts_beside_folders_of_states(tmp_path):
    """As kohya writes it: of the last step without a number in the name."""
    for step in range(100, 500, 100):
        store(tmp_path / f"lora-step{step:08}-state" / "model.bin")
        name = f"lora-step{step:08}" if step < 400 else "lora"
        save_file({"w": torch.rand(3)}, tmp_path / f"{name}.safetensors", {"ss_steps": str(step)})
    assert steps_of(tmp_path) == [100, 200, 300, 400]


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
    of_no_time: "its training step",
    of_one_time: "1 x a_5.pt, 1 x b_5.pt; rename",
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
    sentence = Run(tmp_path).info()["numbers"]
    assert sentence.startswith("epochs, counted from 1: ")
    for command in (["info"], ["import", "--dry-run"]):
        shown = ema(*command, tmp_path).out
        assert sentence in " ".join(shown.split())


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("{}kstep.pt", [1000, 2000, 4000]),
        ("ckpt_{}-iteration.pt", [1, 2, 4]),
        ("acc_{}_steps.pt", [1, 2, 4]),
        ("iter{}_iteration.pt", [1, 2, 4]),
        ("lr1e-4-step-{}.pt", [1, 2, 4]),
    ],
)
def test_a_word_for_time_on_either_side_of_a_number_says_its_unit(name, steps, tmp_path):
    write(tmp_path, name, (1, 2, 4))
    assert steps_of(tmp_path) == steps
    assert says(tmp_path).startswith("steps, by the word for steps")
