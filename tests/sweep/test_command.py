"""A sweep by commands: what a command receives, how failures are handled, and which files are
kept."""

import itertools
import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors, refused
from factories import contents, random_walk, write_run
from forked import Forked
from safetensors.torch import load_file, save_file

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    LockedError,
    MismatchError,
    OutputExistsError,
    PostHocError,
)
from posthoc_cli.snapshots.directory import DirectoryLock
from posthoc_cli.sweep import Axis, Metric, Sweep, sweep
from posthoc_cli.sweep.search import Trial

LENGTHS = (0.05, 0.1, 0.2)
PRINTED = Metric()
GRID = Axis.of_values("sigma_rel", LENGTHS)
BOWL = "awk 'BEGIN { print log({sigma_rel} / 0.1) ^ 2 }' {weights}"


def swept(run, out, command=BOWL, metric=PRINTED, axis=GRID, **options):
    return Sweep(run, command, metric, out, axis, **options).run_all()


def shell(script):
    """Return a command that runs a script; $1 is the weights, $2 sigma_rel, $3 the seed, $4 the
    folder."""
    return f"sh -c '{script}' sh {{weights}} {{sigma_rel}} {{seed}} {{dir}}"


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_search_finds_the_best_length_measures_it_last_and_leaves_its_average(run, out):
    """A best value between measured lengths is only an estimate until then."""
    command = BOWL.replace("0.1)", "0.13)")
    report = swept(run, out, command, axis=Axis("sigma_rel", 0.02, 0.28))
    found = report.found
    assert found.low <= 0.13 <= found.high
    assert found.high < 1.15 * found.low
    assert found.best == pytest.approx(0.13, rel=0.05)
    assert names(out) == {"best.safetensors", "logs", "sweep.json", "trials.jsonl", ".ema.lock"}
    best = load_file(out / "best.safetensors")
    assert_same_tensors(best, run.average(found.best))
    written = json.loads((out / "sweep.json").read_text())
    assert written == report.to_dict()
    *before, last = report.trials
    assert before[0].predicted_error == run.plan(0.02).predicted_error(0)
    assert last.x == found.best
    assert last.value == report.value
    assert last.value < min(trial.value for trial in before)
    assert last.value != found.mean


def test_a_command_gets_the_average_a_seed_and_a_folder_that_is_removed(run, tmp_path, monkeypatch):
    """The paths are absolute, since the command may change the directory."""
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    copy = f'cp "$1" {kept}/$2-$3.safetensors'
    command = shell(f'cd /; {copy}; echo "$4" > {kept}/$2-$3; echo > "$4/a"; echo $2')
    report = swept(run, Path("my sweep"), command, repeats=2)
    measured = [(trial.x, trial.seed) for trial in report.trials]
    assert measured == [*itertools.product(LENGTHS, (0, 1))]
    for x, seed in measured:
        average = load_file(kept / f"{x}-{seed}.safetensors")
        assert_same_tensors(average, run.average(x))
        folder = (kept / f"{x}-{seed}").read_text().strip()
        assert not Path(folder).exists()


def test_the_same_call_goes_on_and_a_longer_list_measures_the_rest(run, tmp_path, out):
    calls = tmp_path / "calls"
    command = shell(f"echo $2 >> {calls}; echo $2")
    first = swept(run, out, command)
    again = swept(run, out, command)
    assert again.to_dict() == first.to_dict()
    longer = Axis.of_values("sigma_rel", [*LENGTHS, 0.25])
    swept(run, out, command, axis=longer)
    assert calls.read_text().split() == ["0.05", "0.1", "0.2", "0.25"]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("metric", {"metric": Metric("loss")}),
        ("direction", {"minimize": False}),
        ("t", {"t": 15}),
        ("kind of length", {"axis": Axis.of_values("window", [2, 10])}),
    ],
)
def test_the_folder_of_another_question_is_refused_and_keeps_its_result(run, out, name, changed):
    swept(run, out)
    before = contents(out)
    with refused(str(out), f"a sweep of another {name}", kind=OutputExistsError):
        swept(run, out, **changed)
    assert contents(out) == before


def test_the_folder_of_another_run_is_refused(run, tmp_path, out):
    swept(run, out)
    other = of_raw_weights(tmp_path)
    with refused(str(out), "a sweep of another run", kind=OutputExistsError):
        swept(other, out)


def test_a_folder_in_which_no_trial_has_succeeded_takes_another_question(run, out):
    with refused("the sweep", kind=PostHocError):
        swept(run, out, "false {weights}")
    report = swept(run, out)
    assert len(report.trials) == len(LENGTHS)


def test_a_record_that_is_none_is_refused(run, tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text('{"run": 1}\n{"target": "a"}')
    with refused(str(path), "is not a sweep's record", kind=FileFormatError):
        swept(run, tmp_path)
    assert '{"target": "a"}' in path.read_text()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo traceback >&2; echo broken >&2; exit 3", "ended with exit code 3: broken"),
        (
            "echo warned >&2; echo none",
            "no line of its standard output is a number alone (--metric names the word before "
            "one): none",
        ),
        ("kill -9 $$", "ended by signal 9: it wrote nothing"),
    ],
)
def test_a_trial_that_fails_has_no_value(run, out, script, message):
    command = shell(f"if [ $2 = 0.1 ]; then {script}; else echo $2; fi")
    report = swept(run, out, command)
    (failed,) = [trial for trial in report.trials if trial.value is None]
    assert failed.error == message
    assert report.found.best == 0.05


def test_two_failures_in_a_row_of_one_cause_end_a_sweep(run, tmp_path, out):
    command = shell(f"echo $2 >> {tmp_path}/calls; echo at $2; exit 3")
    reason = "two trials .* failed alike; .*: sigma_rel 0.1: ended with exit code 3: at 0.1"
    with pytest.raises(PostHocError, match=reason):
        swept(run, out, command)
    assert (tmp_path / "calls").read_text() == "0.05\n0.1\n"


def test_failures_of_different_causes_do_not(run, out):
    axis = Axis.of_values("sigma_rel", [*LENGTHS, 0.22, 0.25])
    script = "case $2 in 0.05) exit 1;; 0.1) exit 2;; 0.2) exit 1;; esac; echo $2"
    with pytest.raises(PostHocError, match="3 of 5 trials have failed, too many to choose"):
        swept(run, out, shell(script), axis=axis)


def test_a_best_length_at_an_end_is_reported_as_such(run, out):
    """A wider range then continues from the trials."""
    narrow = swept(run, out, axis=Axis("sigma_rel", 0.05, 0.08))
    assert narrow.stopped.endswith("the best lies at the end, sigma_rel 0.08, and may lie beyond")
    wider = swept(run, out, axis=Axis("sigma_rel", 0.05, 0.2))
    assert wider.found.best == pytest.approx(0.1, rel=0.1)
    assert "may lie beyond" not in wider.stopped
    assert {*narrow.trials} <= {*wider.trials}


# --- raw weights


def of_raw_weights(folder):
    """Return a run of checkpoints, whose last weights are all 7."""
    for step in (5, 10, 15, 20):
        weights = torch.full((9,), 7.0 if step == 20 else float(step))
        save_file({"a": weights}, folder / f"step-{step}.safetensors")
    return Run(folder / "step-*.safetensors")


LAST_OF_FILE = "tail -c 4 $1 | od -An -f"
"""A script whose metric is the last value of the last tensor."""


def test_raw_weights_that_the_run_contains_are_measured_before_the_searched_lengths(tmp_path, out):
    """A command gets whole numbers without a point."""
    axis = Axis.parse("last:2:4", "target")
    command = shell(f'case "$2" in raw | [234]) {LAST_OF_FILE};; esac')
    report = swept(of_raw_weights(tmp_path), out, command, axis=axis, budget=7)
    values = {trial.x: trial.value for trial in report.trials}
    assert values == {None: 7.0, 2: 11.0, 3: pytest.approx(32 / 3), 4: 9.25}


def test_the_command_says_what_was_measured(ema, run, out):
    command = ("sweep", run.directory, "--run", BOWL, "--minimize", "--out", out)
    done = ema(*command, "--sigma-rel", "0.05,0.1,0.2")
    assert "trial 2 of about 3: sigma_rel 0.1, seed 0: 0 (" in done.out
    assert re.search(r"raw weights +not measured: the run lacks them", done.out)


def test_raw_weights_beside_those_that_the_run_contains_are_refused(tmp_path, out):
    run = of_raw_weights(tmp_path)
    with refused("raw", "is not needed: the run contains the raw weights"):
        swept(run, out, raw=tmp_path / "step-5.safetensors")


def test_raw_weights_whose_trial_fails_are_not_said_to_be_lacking(tmp_path, out):
    run = of_raw_weights(tmp_path)
    report = swept(run, out, shell("if [ $2 = raw ]; then exit 3; else echo $2; fi"))
    assert "raw: not measured: its trial failed," in repr(report)


def test_raw_weights_in_a_checkpoint_are_measured(run, tmp_path, out):
    """Not the average that it holds, too."""
    raw = tmp_path / "last.pt"
    average = dict(run.average(0.1))
    weights = {name: torch.full_like(value, 7.0) for name, value in average.items()}
    torch.save({"model": weights, "ema": average}, raw)
    report = swept(run, out, shell(LAST_OF_FILE), raw=raw)
    first, *_ = report.trials
    assert first == Trial("raw weights", None, 0, 7.0, seconds=first.seconds)


@pytest.mark.parametrize(
    ("raw", "is_said"),
    [
        (1, True),
        (2, False),
    ],
)
def test_raw_weights_of_another_step_are_warned_of(tmp_path, out, raw, is_said, caplog):
    model = torch.nn.Linear(2, 2)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=2) as ema:
        for step in (1, 2):
            torch.nn.init.constant_(model.weight, step)
            save_file(model.state_dict(), tmp_path / f"{step}.safetensors")
            ema.update_(model)
    swept(Run(tmp_path / "run"), out, raw=tmp_path / f"{raw}.safetensors")
    said = "holds other weights than the model had at step 2, of the averages"
    assert (said in caplog.text) == is_said


def test_a_file_without_the_tensors_of_the_averages_is_refused(run, tmp_path, out):
    raw = tmp_path / "other.safetensors"
    save_file({"b": torch.zeros(7)}, raw)
    with refused(str(raw), "lacks tensor 'a'", kind=MismatchError):
        swept(run, out, raw=raw)


# --- failures and interruptions


SAME = ["every trial has the same metric, 5; does the evaluation use"]
CANNOT_START = ["two trials in a row have failed alike", "cannot be started: No such file"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("#!/bin/sh\necho 5", SAME),
        ("#!/no/such/interpreter", CANNOT_START),
    ],
)
def test_a_sweep_without_a_best_says_why_and_writes_none(run, tmp_path, out, content, words):
    program = tmp_path / "program"
    program.write_text(content)
    program.chmod(0o755)
    with refused("the sweep", *words, kind=PostHocError):
        swept(run, out, f"{program} {{weights}}")
    assert names(out) <= {"logs", "trials.jsonl", ".ema.lock"}


def gone(path):
    """Return whether the process of an id in a file ends within seconds: after a kill it must be
    scheduled."""
    state = Path(f"/proc/{int(path.read_text())}/stat")
    for _ in range(100):
        if not state.exists() or ") Z " in state.read_text():
            return True
        time.sleep(0.05)
    return False


def wait_for(path, process):
    """Wait until a file has content; fail if the process that causes it has ended."""
    while not path.exists() or not path.read_text():
        assert process.poll() is None
        time.sleep(0.01)


SWEEP = """
import sys
from pathlib import Path
from posthoc_cli import Run
from posthoc_cli.sweep import Axis, Metric, Sweep
run, command, out = sys.argv[1:]
axis = Axis.of_values("sigma_rel", [0.05, 0.1, 0.2])
Sweep(Run(run), command, Metric("x", "m.json"), Path(out), axis).run_all()
"""


def test_ctrl_c_pressed_twice_stops_a_trial_that_ignores_sigterm_and_keeps_what_was_measured(
    run, tmp_path, out
):
    """The second trial hangs, and has a child."""
    hang = f"sleep 60 & echo $! > {tmp_path}/child; echo $$ > {tmp_path}/hangs; wait"
    write = 'echo "{\\"x\\": $2}" > $4/m.json'
    command = shell(f'trap "" TERM; if [ $2 = 0.1 ]; then {hang}; fi; {write}')
    with Forked(SWEEP, run.directory, command, out) as process:
        wait_for(tmp_path / "hangs", process)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.wait(30) != 0  # of 60; within 1 s where nothing else runs
    assert gone(tmp_path / "hangs")
    assert gone(tmp_path / "child")
    assert names(out) == {"logs", "trials.jsonl", ".ema.lock"}
    _, line = (out / "trials.jsonl").read_text().splitlines()
    assert json.loads(line)["x"] == 0.05


def test_a_killed_sweep_is_continued_while_its_trial_still_runs(run, tmp_path, out):
    """The trial then writes to its old folder and log, not to those of the repeated trial."""
    go = tmp_path / "go"
    late = f'while [ ! -e {go} ]; do sleep 0.01; done; echo 9; echo "{{\\"x\\": 9}}" > $4/m.json'
    first = f"if [ ! -e {tmp_path}/pid ]; then echo $$ > {tmp_path}/pid; {late}; exit; fi"
    last = f'echo $2; echo "{{\\"x\\": $2}}" > $4/m.json; touch {go}; sleep 0.2'
    command = shell(f"{first}; {last}")
    with Forked(SWEEP, run.directory, command, out) as process:
        wait_for(tmp_path / "pid", process)
    report = swept(run, out, command, Metric("x", "m.json"))
    assert [trial.value for trial in report.trials] == list(LENGTHS)
    assert (out / "logs" / f"{report.trials[0].name}.out").read_text() == "0.05\n"


def test_the_folder_of_a_running_sweep_is_refused(run, tmp_path):
    with DirectoryLock(tmp_path), refused(str(tmp_path), "is writing here", kind=LockedError):
        swept(run, tmp_path)


# --- lengths, and what the average is written as

FIVE_DIGITS = [0.1, 0.10008, 0.10016, 0.10024, 0.10032, 0.1004]


@pytest.mark.parametrize(
    ("axis", "lengths"),
    [
        (Axis("window", 18, 20), [18, 19, 20]),
        (Axis("sigma_rel", 0.1, 0.1004), FIVE_DIGITS),
    ],
)
def test_each_length_of_a_narrow_range_is_measured_once(run, out, axis, lengths):
    command = "sh -c 'echo {sigma_rel}' {weights}"
    report = swept(run, out, command, axis=axis, budget=7)
    assert sorted(trial.x for trial in report.trials) == lengths


def test_a_trial_gets_a_copy_of_a_model_folder(run, tmp_path, out):
    model = tmp_path / "model"
    model.mkdir()
    save_file(dict(run.average(0.1)), model / "model.safetensors")
    (model / "config.json").write_text("{}")
    command = shell("test -e $1/config.json && echo $2")
    swept(run, out, command, like=model)
    report = swept(run, out, command, like=model)  # replaces the best average
    assert names(out / "best") == {"model.safetensors", "config.json"}
    best = load_file(out / "best" / "model.safetensors")
    assert_same_tensors(best, run.average(report.best))


def test_a_trial_gets_a_copy_of_a_checkpoint(run, tmp_path, out):
    like = tmp_path / "last.pt"
    torch.save({"model": dict(run.average(0.1)), "step": 7}, like)
    report = swept(run, out, shell("basename $1 .pt; test -e $1 && echo $2"), like=like)
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["step"] == 7
    assert_same_tensors(best["model"], run.average(report.best))


# --- images


DRAW = 'cd "$4"; mkdir b; printf "\\211PNG" > a.png; cp a.png b/c.PNG; touch d.txt'
"""Leaves what begins as pictures do."""


def test_images_of_a_trial_are_kept_without_a_metric_and_nothing_is_searched(run, out):
    report = swept(run, out, shell(DRAW), minimize=None)
    assert [trial.x for trial in report.trials] == [*LENGTHS]
    assert names(out) == {"images", "logs", "sweep.json", "trials.jsonl", ".ema.lock"}
    assert names(out / "images") == {f"sigma_rel-{x}-seed-0" for x in LENGTHS}
    assert names(out / "images/sigma_rel-0.1-seed-0") == {"a.png", "b-c.PNG"}
    assert "best" not in report.to_dict()


@pytest.mark.parametrize(
    ("glob", "kept"),
    [
        ("b/*", {"b-c.PNG"}),
        ("none", set()),
    ],
)
def test_the_images_to_keep_can_be_chosen(run, out, glob, kept):
    swept(run, out, shell(f"{DRAW}; echo $2"), images=glob)
    found = {path.name for path in out.glob("images/sigma_rel-0.05-seed-0/*")}
    assert found == kept


def test_the_newest_images_are_kept_and_none_that_is_large(run, out, caplog):
    dated = "cp a.png $i.png; touch -d 2030-01-01T00:00:$i $i.png"
    large = "truncate -s 3M 20.png; touch -d 2031-01-01 20.png"
    script = f"{DRAW}; for i in $(seq 20); do {dated}; done; {large}"
    swept(run, out, shell(script), minimize=None)
    kept = names(out / "images" / "sigma_rel-0.05-seed-0")
    assert kept == {f"{i}.png" for i in range(4, 20)}
    assert "20.png: 3.15 MB, too large to be kept: at most 2 MB" in caplog.text


def test_a_look_without_images_says_so(run, out):
    with refused("the sweep", "no trial has left an image in {dir}", kind=PostHocError):
        swept(run, out, "true {weights} {dir}", minimize=None)


# --- in Python


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        (None, {}, "metric None: must be a function"),
        (repr, {"values": LENGTHS}, "metric: must return a number"),
        (float, {"values": [0.1, 0.1]}, "values .*: name at least two lengths"),
        (float, {"values": [0.3]}, "sigma_rel 0.3: must lie in"),
        (float, {"values": ["0.1", 0.2]}, "sigma_rel .*: must be a number"),
        (
            float,
            {"low": 0.1, "high": 0.2, "budget": 3},
            "budget 3: .* at least 7; a search begins with 6",
        ),
    ],
)
def test_in_python_arguments_are_checked(run, metric, arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        sweep(run, metric, **arguments)


def test_in_python_the_metric_gets_the_weights(run):
    def size(weights):
        assert weights.predicted_error is not None
        return weights["a"].norm(), torch.tensor(0.1)

    report = sweep(run.directory, size, values=LENGTHS)
    for trial in report.trials:
        average = run.average(trial.x)
        assert trial.value == float(average["a"].norm())
        assert trial.standard_error == pytest.approx(0.1)


@pytest.fixture
def tracked(tmp_path):
    """A model, and its tracker after 20 steps in which each of the 9 weights is the step."""
    model = torch.nn.Linear(3, 3)
    options = {"update_every": 1, "checkpoint_every": 5}
    with PostHocEMA.from_model(model, tmp_path / "run", **options) as tracker:
        for step in range(1, 21):
            torch.nn.init.constant_(model.weight, step)
            tracker.update_(model)
        yield model, tracker


def norm(averaged):
    assert not averaged.training
    return float(averaged.weight.detach().norm())


def test_in_python_a_model_is_restored_and_its_raw_weights_are_measured(tracked):
    model, tracker = tracked
    report = sweep(tracker, norm, model=model, values=LENGTHS)
    assert report.raw == pytest.approx(60.0)
    assert model.training
    assert (model.weight == 20).all()


def test_in_python_raw_weights_of_another_model_or_time_are_not_measured(tracked, tmp_path):
    model, tracker = tracked
    other = torch.nn.Linear(3, 3)
    assert sweep(tracker, norm, model=other, values=LENGTHS).raw is None
    tracker.close()
    # the time of this model's weights is unknown
    again = PostHocEMA.from_path(tmp_path / "run", model)
    assert sweep(again, norm, model=model, values=LENGTHS).raw is None


# --- a run for sweeps


@pytest.fixture
def out(tmp_path):
    """The folder of a sweep, which does not exist yet."""
    return tmp_path / "out"


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "run"
    walk = random_walk(20, {"a": (30, 10), "b": (7,)})
    write_run(folder, walk, range(1, 21))
    return Run(folder)
