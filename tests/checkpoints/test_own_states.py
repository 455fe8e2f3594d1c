"""The state of a tracker in a training's checkpoints: it is no model, no average and no part of
either, and commands name the run that the tracker wrote."""

import json
import shlex
import shutil

import pytest
import torch
from checking import assert_same_tensors, refused
from checkpoint_layouts import check_average, distributed
from factories import RUN_ID
from saved import exported, store
from tracker.runs import Training, track

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import DirectoryError

STEPS = range(4, 41, 4)
NOTE = "holds the state of a tracker, whose snapshots make more exact averages: "


def train(folder, save, **settings):
    """Save checkpoints of a training and of its tracker's state; return the weights by step."""
    training = Training()
    ema = track(training.model, folder / "run", checkpoint_every=4, **settings)
    for step in STEPS:
        training.run(step, ema)
        save(folder / "saved", step, training.state(), ema.state_dict())
    ema.close()
    return {step: training.path[step - 1] for step in STEPS}


def in_a_key(folder, step, weights, state):
    content = {"step": step, "state_dict": weights, "ema": state}
    store(folder / f"s{step}.pt", content)


def in_a_callback(folder, step, weights, state):
    callbacks = {"Averaging{'validate': 0.15}": {"steps": step, "tracker": state}}
    content = {"state_dict": weights, "global_step": step, "callbacks": callbacks}
    store(folder / f"s{step}.ckpt", content)


def two_in_a_list(folder, step, weights, state):
    content = {"step": step, "model": weights, "averages": [state, state]}
    store(folder / f"s{step}.pt", content)


def among_the_keys(folder, step, weights, state):
    store(folder / f"s{step}.pt", {"step": step, "model": weights, **state})


def beside_a_model(folder, step, weights, state):
    store(folder / f"step{step}" / "net.pt", weights)
    store(folder / f"step{step}" / "ema_averages.pt", state)


def beside_the_models(folder, step, weights, state):
    store(folder / f"net{step}.safetensors", weights)
    store(folder / f"ema{step}.pt", state)


def registered(folder, step, weights, state):
    """As accelerate saves what `register_for_checkpointing` has registered."""
    store(folder / f"step{step}" / "model.safetensors", weights)
    store(folder / f"step{step}" / "custom_checkpoint_0.pkl", state)


def in_a_distributed_checkpoint(folder, step, weights, state):
    content = {"model": weights, "ema": state, "others": [{"ema": state}]}
    distributed(folder / f"step{step}", content)


def in_a_distributed_checkpoint_of_its_own(folder, step, weights, state):
    store(folder / f"step{step}" / "model.safetensors", weights)
    distributed(folder / f"step{step}" / "posthoc_ema", state)


LAYOUTS = (
    in_a_key,
    in_a_callback,
    two_in_a_list,
    among_the_keys,
    beside_a_model,
    beside_the_models,
    registered,
    in_a_distributed_checkpoint,
    in_a_distributed_checkpoint_of_its_own,
)


@pytest.mark.parametrize("save", LAYOUTS)
def test_a_state_is_no_part_of_the_model_and_names_its_run(tmp_path, save):
    weights = train(tmp_path, save)
    run = Run(tmp_path / "saved")
    check_average(run, weights)
    described = run.info()
    assert [row["holds"] for row in described["checkpoints"]] == ["weights"] * len(STEPS)
    assert described["notes"][-1] == f"{NOTE}name {tmp_path / 'run'}"


COMMANDS = {
    "info": "saved",
    "synthesize": "saved --sigma-rel 0.2 --out made.safetensors",
    "error-plot": "saved --out errors.png",
    "audit": "saved",
    "import": "saved --out own",
    "sweep": "saved --sigma-rel 0.1,0.2 --minimize --out swept --eval "
    "\"sh -c 'echo {sigma_rel} | sed s/raw/9/' {weights}\"",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_run_once(tmp_path, command, ema, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, in_a_key)
    done = ema(command, *shlex.split(COMMANDS[command]))
    assert done.code == (2 if command == "audit" else 0)  # which compares averages: there are none
    assert (done.out + done.err).count(NOTE) == 1
    assert f": {NOTE}name run\n" in done.out + done.err
    if command == "import":
        assert f"{NOTE}name {tmp_path / 'run'}\n" in ema("info", "own").out


def test_a_folder_with_the_newest_checkpoint_alone_names_the_run_beside_it(tmp_path, ema):
    """As the README's `run/`."""

    def save(folder, step, weights, state):
        store(folder.parent / "checkpoint.pt", {"step": step, "model": weights, "ema": state})

    train(tmp_path, save)
    done = ema("synthesize", tmp_path, "--sigma-rel", 0.2, "--dry-run")
    assert f"{NOTE}name {tmp_path / 'run'}\n" in done.err
    assert "is one checkpoint" in done.err
    assert ema("info", tmp_path).code == 0


def test_a_run_in_the_folder_of_checkpoints_without_a_state_is_named(tmp_path, ema):
    def save(folder, step, weights, state):
        store(folder.parent / f"step{step}.pt", weights)

    weights = train(tmp_path, save)
    check_average(Run(tmp_path), weights)
    done = ema("synthesize", tmp_path, "--sigma-rel", 0.2, "--dry-run")
    assert done.code == 0, done.err
    named = f"holds the snapshots of a tracker, too: name {tmp_path / 'run'} for averages of these"
    assert done.err.count(named) == 1


def test_a_run_that_was_moved_with_its_checkpoints_is_found_and_another_one_is_not(tmp_path):
    train(tmp_path / "old", in_a_key)
    shutil.move(tmp_path / "old", tmp_path / "new")
    saved = Run(tmp_path / "new/saved")
    assert f"{NOTE}name {tmp_path / 'new/run'}" in saved.info()["notes"]
    shutil.rmtree(tmp_path / "new/run")
    train(tmp_path / "new", beside_a_model)  # a run of another training in its place
    for path in (tmp_path / "new/saved").glob("step*"):
        shutil.rmtree(path)
    assert f"{NOTE}they are not in {tmp_path / 'old/run'} any more" in saved.info()["notes"]


def test_each_of_two_trackers_names_its_own_run(tmp_path):
    training = Training()
    other = torch.nn.Linear(3, 3)
    one = track(training.model, tmp_path / "one", checkpoint_every=4)
    two = track(other, tmp_path / "two", checkpoint_every=4)
    for step in STEPS:
        training.run(step, one)
        for _ in range(4):
            two.update_(other)
        content = {"step": step, "model": training.state()}
        content |= {"trackers": [one.state_dict(), two.state_dict()]}
        store(tmp_path / "saved" / f"s{step}.pt", content)
    for ema in (one, two):
        ema.close()
    notes = Run(tmp_path / "saved").info()["notes"]
    assert [note for note in notes if NOTE in note] == [
        f"{NOTE}name {tmp_path / 'one'}",
        f"{NOTE}name {tmp_path / 'two'}",
    ]


def test_a_model_with_the_names_of_a_state_is_a_model(tmp_path):
    weights = {}
    for step in STEPS:
        generator = torch.Generator().manual_seed(step)
        weights[step] = {
            "mean.weight": torch.randn(3, 2, generator=generator),
            "high.weight": torch.randn(2, generator=generator),
        }
        content = {**weights[step], "version": 8, "info": '{"run_id": "v2"}', "step": step}
        store(tmp_path / f"s{step}.pt", content)
    check_average(Run(tmp_path), weights)


def test_a_state_alone_is_described_and_is_no_checkpoint(tmp_path, ema):
    train(tmp_path, beside_the_models)
    states = tmp_path / "states"
    states.mkdir()
    for path in (tmp_path / "saved").glob("ema*.pt"):
        path.rename(states / path.name)
    for place in (states, states / "ema4.pt"):
        described = ema("info", place, "--json")
        assert described.code == 0
        assert described.json["checkpoints"][0]["holds"] == "the state of a tracker"
        assert described.json["notes"] == [f"{NOTE}name {tmp_path / 'run'}"]
        with refused(place, "only the state of a tracker", kind=DirectoryError):
            Run(place).plan(0.2)


def test_an_export_of_a_model_beside_a_state_is_that_of_the_model(tmp_path):
    weights = train(tmp_path, registered)
    exported_file = exported(tmp_path / "saved/step40")
    assert_same_tensors(exported_file, weights[40])


# --- copies of a checkpoint


def leaves(state):
    """Return the tensors and values in a state by their keys."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= {f"{key}/{name}": inner for name, inner in leaves(value).items()}
        else:
            found[key] = value
    return found


def assert_same_state(ours, theirs):
    mine = leaves(ours)
    others = leaves(theirs)
    assert mine.keys() == others.keys()
    for name, value in others.items():
        assert torch.equal(mine[name], value) if torch.is_tensor(value) else mine[name] == value


def test_a_copy_of_a_checkpoint_has_the_state_of_the_training_and_a_resume_says_so(
    tmp_path, ema, caplog
):
    train(tmp_path, in_a_key)
    like = tmp_path / "saved/s40.pt"
    out = tmp_path / "new.pt"
    run = tmp_path / "saved"
    done = ema("synthesize", run, "--sigma-rel", 0.25, "--like", like, "--out", out)
    said = "the tracker's state in the copy is that of the training, not of the new weights"
    assert done.err.count(said) == 1
    before = torch.load(like, weights_only=True)
    after = torch.load(out, weights_only=True)
    assert_same_state(after["ema"], before["ema"])
    assert not torch.equal(after["state_dict"]["0.weight"], before["state_dict"]["0.weight"])
    model = Training().model
    model.load_state_dict(after["state_dict"])
    tracker = PostHocEMA.from_model(model, tmp_path / "run", resume="auto")
    tracker.load_state_dict(after["ema"])
    assert "other weights than the network had then" in caplog.text
    tracker.close()


def test_a_copy_with_another_average_has_the_state_of_its_weights(tmp_path, ema):
    """The training keeps an average of its own, too."""

    def save(folder, step, weights, state):
        average = {name: 0.9 * value for name, value in weights.items()}
        content = {"step": step, "model": weights, "model_ema": average, "tracker": state}
        store(folder / f"s{step}.pt", content)

    train(tmp_path, save)
    like = tmp_path / "saved/s40.pt"
    out = tmp_path / "new.pt"
    done = ema("synthesize", tmp_path / "run", "--sigma-rel", 0.2, "--like", like, "--out", out)
    assert "the tracker's state in the copy is that of the training\n" in done.err
    before = torch.load(like, weights_only=True)
    after = torch.load(out, weights_only=True)
    assert_same_state(after["tracker"], before["tracker"])
    assert_same_tensors(after["model"], before["model"])
    assert not torch.equal(after["model_ema"]["0.weight"], before["model_ema"]["0.weight"])


def test_a_copy_of_a_folder_has_the_file_of_its_state(tmp_path, ema):
    train(tmp_path, registered)
    like = tmp_path / "saved/step40"
    out = tmp_path / "new"
    done = ema("synthesize", tmp_path / "run", "--sigma-rel", 0.2, "--like", like, "--out", out)
    assert "the tracker's state in the copy is that of the training" in done.err
    name = "custom_checkpoint_0.pkl"
    assert (out / name).read_bytes() == (like / name).read_bytes()


# --- what is no state


@pytest.mark.parametrize(
    "info",
    ["", "{", "[]", '{"run_id": 3}', '{"run_id": "zz"}', "{" * 10_000, '{"t": "\\u0000"}'],
)
def test_a_text_beside_a_version_is_no_state(tmp_path, info):
    weights = {}
    for step in STEPS:
        weights[step] = {"mean.weight": torch.full((3, 2), float(step))}
        store(tmp_path / f"s{step}.pt", {**weights[step], "version": 8, "info": info})
    check_average(Run(tmp_path), weights)


@pytest.mark.parametrize("directory", ["", "/", "..", "/run", "x" * 5000])
def test_a_state_with_any_directory_is_set_aside(tmp_path, directory):
    info = json.dumps({"run_id": RUN_ID, "directory": directory})
    weights = {}
    for step in STEPS:
        weights[step] = {"mean.weight": torch.full((3, 2), float(step))}
        state = {"version": 8, "info": info, "mean": {"0.1": {"a": torch.ones(3)}}}
        store(tmp_path / f"s{step}.pt", {"model": weights[step], "state": state})
    check_average(Run(tmp_path), weights)
    (note,) = [note for note in Run(tmp_path).info()["notes"] if NOTE in note]
    assert "name" not in note
