"""What owners of checkpoints do with files of further programs: what opens, and what is asked for
and then works."""

import re
import shlex
import zipfile

import pytest
import torch
from checking import refused
from saved import (
    asked,
    assert_equal,
    check_error,
    check_last,
    exported,
    named,
    read,
    store,
    times,
    write_each,
)
from walks import saves

from posthoc_cli import import_checkpoints
from posthoc_cli.errors import FileFormatError

TIMES = [float(save.step) for save in saves()]
EPOCHS = [float(save.epoch) for save in saves()]


def weights(save):
    return save.weights


def negated(tensors):
    return {name: -value for name, value in tensors.items()}


PATTERNS = {
    "run_{save.epoch}_x": (r"run_(\d+)_", EPOCHS, "epochs, .*: they follow each other"),
    "run_{save.step}_x2": (r"run_(\d+)_", TIMES, "taken for steps: they are what the given"),
    "e_{save.epoch}_epoch_3": (
        r"(\d+)_epoch",
        EPOCHS,
        "epochs, .*: by what the given pattern finds",
    ),
    "step{save.step}-epoch3": (r"step(\d+)-epoch", TIMES, "steps, by what the given pattern finds"),
    "epoch{save.epoch}-step9": (
        r"epoch(\d+)-step",
        EPOCHS,
        "epochs, .*: by what the given pattern",
    ),
}
"""Patterns and the numbers that they find, with what these are taken for."""


@pytest.mark.parametrize("name", PATTERNS)
def test_what_a_pattern_finds_counts_as_a_number_in_a_name(name, tmp_path):
    """It is a step only if a word says so: else files of each epoch were those of each step."""
    pattern, expected, says = PATTERNS[name]
    write_each(tmp_path, f"{name}.pt", weights)
    made = read(tmp_path, step_from=pattern)
    assert [one.t for one in made.checkpoints] == expected
    assert re.search(says, made.numbers)


def test_numbers_of_epochs_and_of_an_unknown_unit_do_not_mix(tmp_path):
    """icefall writes both, at other times; its files state their steps, others do not."""
    write_each(tmp_path, "checkpoint-{save.step}.pt", lambda save: save.average)
    write_each(tmp_path, "epoch-{save.epoch}.pt", weights)
    with refused(tmp_path, "10 x checkpoint-*.pt", "10 x epoch-*.pt", "-*.pt' --out run"):
        read(tmp_path)
    assert times(tmp_path / "epoch-*.pt") == EPOCHS


def test_a_number_that_is_always_0_is_asked_about(tmp_path):
    """As that of a rank, in the name of each file."""
    write_each(tmp_path, "s_{save.step}/rank_0.pt", weights)
    words = shlex.split(asked(tmp_path / "*" / "*.pt").partition("paste: ")[2])
    pattern = words[words.index("--step-from") + 1]
    assert times(tmp_path / "*" / "*.pt", step_from=pattern) == TIMES


def with_count(save):
    """Return what RT-DETR and D-FINE store."""
    return {
        "model": save.weights,
        "ema": {"module": save.average, "updates": save.step},
    }


def test_averages_that_count_more_updates_than_numbers_are_of_epochs(tmp_path):
    """Numbers 3, 7, 11, ... were steps, and the decay that was found one of these."""
    for save in saves():
        store(tmp_path / f"checkpoint{4 * save.epoch - 1}.pth", with_count(save))
    made = read(tmp_path, ema_decay=0.95)
    assert {one.t for one in made.checkpoints} == set(TIMES)
    assert "averages have counted more updates" in made.numbers


def test_averages_that_count_one_update_more_than_numbers_are_of_steps(tmp_path):
    """The first step has the number 0. They were refused, and so was what the error named."""
    folder = tmp_path / "files"
    for save in saves():
        store(folder / f"checkpoint{save.step - 1}.pth", with_count(save))
    out = tmp_path / "run"
    done = import_checkpoints(folder, out, ema_decay=0.95, ema_warmup="none")
    assert "as claimed" in done.checks[-1]
    check_error(out)


def test_tensors_that_an_average_leaves_out_are_excluded_as_the_error_says(tmp_path):
    def content(save):
        average = dict(save.average)
        del average["head.weight"]
        return {
            "model": save.weights,
            "ema": average,
        }

    write_each(tmp_path, "s{save.step}.pt", content)
    with refused("average", "'head.weight'", "`exclude`"):
        read(tmp_path)
    made = read(tmp_path, exclude="head.*", ema_decay=0.95, ema_warmup="none")
    assert made.counts["EMA of decay 0.95"] == len(saves())


def test_names_of_values_are_no_options(tmp_path, ema):
    store(tmp_path / "1.pt", {"w": torch.ones(3), "step": 7})
    shown = ema("import", tmp_path, "--dry-run").out
    assert shown.startswith("numbers are steps, by 'step' ")
    write_each(tmp_path / "kept", "ep{save.epoch}7.pt", weights)
    assert "--first-epoch is 0 if it is" in ema("info", tmp_path / "kept").out


def test_info_of_safetensors_that_are_no_run_as_they_are(tmp_path, ema):
    """They were shown as outputs of this package."""
    write_each(tmp_path, "x{save.epoch:02}-save-{save.step}.safetensors", weights)
    report = ema("info", tmp_path, "--json").json
    assert report["kind"] == "checkpoints"
    assert "cannot be used as it is: " in report["notes"][0]
    assert times(tmp_path, step_from=r"save-(\d+)") == TIMES


@pytest.mark.parametrize(
    ("of_weights", "of_average"),
    [
        ("_orig_mod.", ""),
        ("", "_fsdp_wrapped_module."),
    ],
)
def test_a_wrapper_within_the_model_changes_names_of_one_set(of_weights, of_average, tmp_path):
    """An average was not used, with a warning, where blocks of the model were compiled."""
    file = tmp_path / "last.pt"
    average = torch.zeros(3)
    net = {f"body.{of_weights}w": torch.ones(3)}
    torch.save({"net": net, "ema": {f"body.{of_average}w": average}}, file)
    assert_equal(exported(file), {f"body.{of_weights}w": average})


def test_the_folder_of_one_of_several_trainings_is_named(tmp_path):
    write_each(tmp_path / "run1", "step{save.step}.pt", weights)
    write_each(tmp_path / "run2", "step{save.step}.pt", lambda save: negated(save.weights))
    with refused(tmp_path, f"ema import '{tmp_path}/run1/step*.pt' --out"):
        read(tmp_path)
    assert times(tmp_path / "run1") == times(tmp_path / "*1" / "step*.pt") == TIMES


def test_folders_of_weights_and_of_averages_are_opened_together(tmp_path):
    write_each(tmp_path / "weights", "step{save.step}.pt", weights)
    write_each(tmp_path / "ema", "step{save.step}.pt", lambda save: save.average)
    for place in (tmp_path, tmp_path / "*" / "*"):
        assert len(read(place, ema_decay=0.95).checkpoints) == 2 * len(TIMES)


def test_a_target_network_of_a_part_leaves_the_policy_to_another_import(tmp_path, caplog):
    """As in the policies of Stable-Baselines3."""

    def content(save):
        actor = {f"actor.{name}": -value for name, value in save.weights.items()}
        critic = named("critic.", save.weights)
        return actor | critic | named("critic_target.", save.average)

    write_each(tmp_path, "step_{save.step}/policy.pth", content)
    place = tmp_path / "*" / "policy.pth"
    assert asked(place).endswith(" --from checkpoints --out run")
    read(place, average="critic_target", weights="critic", ema_decay=0.95)
    assert "'actor', not used" in caplog.text


def test_weights_that_equal_the_average_are_asked_about(tmp_path):
    """Written while the average was swapped in."""
    write_each(tmp_path, "s{save.step}.pt", lambda save: {"net": save.average, "ema": save.average})
    with refused("weights", "'ema'", "'net'", "--from checkpoints --out run"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["model.pth", "pytorch_model/mp_rank_00_model_states.pt"])
def test_a_folder_of_a_pickled_model_is_exported(name, tmp_path):
    """As litgpt, OLMo and SpeechBrain, or accelerate with DeepSpeed write it."""
    last = saves()[-1]
    folder = tmp_path / "CKPT+2024-05-01+12-30-400"
    store(folder / name, {"model": last.weights, "ema": last.average})
    assert_equal(exported(folder), last.average)
    assert_equal(exported(folder, raw=True), last.weights)


@pytest.mark.parametrize("name", ["rl_model_100_steps.zip", "params.npz"])
def test_an_archive_of_another_kind_is_to_be_unpacked(name, tmp_path):
    with zipfile.ZipFile(tmp_path / name, "w") as archive:
        archive.writestr("policy.pth", "")
    with refused(tmp_path / name, "unpack", kind=FileFormatError):
        exported(tmp_path / name)


def test_an_import_names_the_setting_that_was_given(tmp_path):
    write_each(tmp_path, "ema_step{save.step}.pt", lambda save: save.average)
    (line,) = read(tmp_path, sigma_rels=(0.1,)).checks
    assert line.startswith("sigma_rels is as given")


def test_sets_whose_names_are_paths_are_chosen_by_a_pattern(tmp_path):
    """As those of JAX."""
    for step in (10, 20):
        names = ("params/w", "ema_params/w", "opt/w")
        store(tmp_path / f"step{step}.pt", dict.fromkeys(names, torch.ones(3)))
    assert read(tmp_path, include=("params/*",)).counts == {"weights": 2}


# --- two series of files


def kair(folder):
    """Write weights and averages that no word tells apart, and states of the optimizer."""
    for save in saves():
        store(folder / f"{save.step}_G.pth", save.weights)
        store(folder / f"{save.step}_E.pth", save.average)
        state = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}
        store(folder / f"{save.step}_optimizerG.pth", state)
    store(folder / "best_G.pth", saves()[0].weights)
    return folder


def test_a_series_that_moves_less_is_proposed_as_the_average(tmp_path):
    place = kair(tmp_path)
    said = asked(place, ema_decay=0.95, ema_warmup="none")
    assert "10 x *_E.pth, 10 x *_G.pth" in said
    globs = "--average '*_E.pth' --weights '*[0-9]_G.pth'"
    assert said.endswith(f" --ema-decay 0.95 --ema-warmup none {globs} --out run")
    check_last(place, average="*_E.pth", weights="*_G.pth")


def test_a_glob_that_is_proposed_matches_nothing_else(tmp_path):
    """As OLMo-core's folder of an average beside those of steps."""
    for step in (100, 200, 300):
        store(tmp_path / f"step{step}" / "model.pt", {"w": torch.rand(3)})
        store(tmp_path / f"other{step}" / "model.pt", {"w": torch.rand(3)})
    store(tmp_path / "step300-merged" / "model.pt", {"w": torch.rand(3)})
    said = asked(tmp_path)
    assert said.endswith(("/other*' --out run", "/step*[0-9]' --out run"))
    assert "1 x step300-merged" in asked(tmp_path / "step*")
    assert times(tmp_path / "step*[0-9]") == [100, 200, 300]
