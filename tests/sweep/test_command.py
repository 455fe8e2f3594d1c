"""A sweep by commands: what a command receives, how failures are handled, and which files are
kept."""

import json
import math
import re
import shlex
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, heavy, refused
from factories import contents, random_walk, write_ema_checkpoints, write_run
from forked import Forked
from safetensors.torch import load_file, save_file
from sweep.searching import BOWL, LISTED, shell, swept

from posthoc_cli import PostHocEMA, PostHocError, Run, import_checkpoints
from posthoc_cli.errors import FileFormatError, LockedError, MismatchError, OutputExistsError
from posthoc_cli.snapshots.directory import DirectoryLock
from posthoc_cli.sweep import Sweep
from posthoc_cli.sweep.images import list_images
from posthoc_cli.sweep.report import summarize
from posthoc_cli.sweep.search import Lengths, Trial


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_a_search_finds_the_best_length_measures_it_and_leaves_its_average(run, out):
    """A best value between measured lengths is only an estimate until then."""
    command = BOWL.replace("0.1)", "0.13)")
    report = swept(run, out, command, sigma_range=(0.02, 0.28))
    assert report.best == pytest.approx(0.13, rel=0.03)
    assert names(out) == {"best.safetensors", "logs", "sweep.json", "trials.jsonl", ".ema.lock"}
    best = load_file(out / "best.safetensors")
    assert_same_tensors(best, run.average(report.best))
    written = json.loads((out / "sweep.json").read_text())
    assert written == report.to_dict()
    assert report.trials[0].predicted_error == run.plan(0.02).predicted_error(0)
    assert report.value == pytest.approx(math.log(report.best / 0.13) ** 2, abs=1e-5)
    assert report.value == min(trial.value for trial in report.trials)


def test_the_curve_ends_with_its_measurements_and_has_no_dip_between_them(run, out):
    report = swept(run, out, shell("echo $2 | sed s/0.05/0.3/"))
    curve = report.curve()
    assert curve[0]["sigma_rel"] == pytest.approx(0.05)
    assert curve[-1]["sigma_rel"] == pytest.approx(0.2)
    means = [point["estimate"] for point in curve]
    assert min(means) == pytest.approx(0.1)
    assert max(means) == pytest.approx(0.3)


def test_a_command_gets_the_average_a_seed_and_a_folder_that_is_removed(run, tmp_path, monkeypatch):
    """The paths are absolute, since the command may change the directory."""
    monkeypatch.chdir(tmp_path)
    kept = tmp_path / "kept"
    kept.mkdir()
    copy = f'cp "$1" {kept}/$2-$3.safetensors'
    command = shell(f'cd /; {copy}; echo "$4" > {kept}/$2-$3; echo > "$4/a"; echo $2')
    report = swept(run, Path("my sweep"), command, sigma_range=(0.05, 0.2), budget=8)
    measured = [(trial.sigma_rel, trial.seed) for trial in report.trials]
    assert (report.best, 1) in measured
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
    longer = [*LISTED, 0.25]
    swept(run, out, command, sigma_rels=longer)
    assert calls.read_text().split() == ["0.05", "0.1", "0.2", "0.25"]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("metric", {"metric": "loss"}),
        ("direction", {"minimize": False}),
        ("t", {"t": 15}),
    ],
)
def test_the_folder_of_another_question_is_refused_and_keeps_its_result(run, out, name, changed):
    swept(run, out)
    before = contents(out)
    with refused(out, name, kind=OutputExistsError):
        swept(run, out, **changed)
    assert contents(out) == before


def test_the_folder_of_another_run_is_refused(run, tmp_path, out):
    swept(run, out)
    other = of_weights(tmp_path)
    with refused(out, "run", kind=OutputExistsError):
        swept(other, out)


def test_a_folder_in_which_no_trial_has_succeeded_takes_another_question(run, out):
    with refused("the sweep", kind=PostHocError):
        swept(run, out, "false {weights}")
    report = swept(run, out)
    assert len(report.trials) == len(LISTED)


WRONG = {"target": "a"}, {"target": "a", "sigma_rel": "0.1", "seed": 0}, {
    "target": "a", "sigma_rel": None, "seed": 0, "value": math.nan
}  # fmt: skip


@pytest.mark.parametrize("entry", WRONG)
def test_a_corrupt_trials_file_is_refused(run, tmp_path, entry):
    path = tmp_path / "trials.jsonl"
    line = json.dumps(entry)
    path.write_text(f'{{"run": 1}}\n{line}')
    with refused(path, kind=FileFormatError):
        swept(run, tmp_path)
    assert line in path.read_text()


ODD = (None, True, -1, 0, 7, 0.13, 1e-9, -2.5, 1e308, 10**400, math.nan, "", "0.1", [], [1], {})
"""Values in place of others."""


def mutate(lines, random):
    """Return lines of JSON of which one has another value, name or text."""
    at = random.integers(len(lines))
    entry = json.loads(lines[at])
    name = random.choice([*entry])
    value = ODD[random.integers(len(ODD))]
    text = json.dumps(entry)
    changed = (
        json.dumps(entry | {name: value}),
        json.dumps({key: old for key, old in entry.items() if key != name}),
        json.dumps(entry | {f"{name}s": value}),
        json.dumps(value),
        text[: random.integers(len(text))],
        "[" * 100_000,
        text * 2,
    )
    index = random.choice(len(changed), p=[0.6, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
    return [*lines[:at], changed[index], *lines[at + 1 :]]


@heavy
def test_odd_records_are_measured_again_or_refused_in_one_line(tmp_path, out):
    """Of 300 changes of a record by chance."""
    write_run(tmp_path / "run", random_walk(4, {"b": (7,)}), range(1, 5))
    run = Run(tmp_path / "run")
    random = np.random.default_rng(0)
    swept(run, out)
    path = out / "trials.jsonl"
    lines = path.read_text().splitlines()
    refusals = 0
    for _ in range(300):
        path.write_text("\n".join(mutate(lines, random)))
        try:
            swept(run, out)
        except (FileFormatError, OutputExistsError) as error:
            assert str(error).startswith(f"{path}: ") or str(error).startswith(f"{out}: ")
            refusals += 1
    assert 100 < refusals < 250


@pytest.mark.parametrize("value", ["1e101", "-1e300"])
def test_a_metric_whose_square_is_no_number_is_none(run, out, value):
    report = swept(run, out, shell(f"if [ $2 = 0.1 ]; then echo {value}; else echo $2; fi"))
    (failed,) = [trial for trial in report.trials if trial.value is None]
    assert "its metric is " in failed.error


@pytest.mark.parametrize(
    ("script", "fact"),
    [
        ("echo traceback >&2; echo broken >&2; exit 3", "exit code 3: broken"),
        ("echo warned >&2; echo none", "`none`"),
        ("kill -9 $$", "signal 9"),
    ],
)
def test_a_trial_that_fails_has_no_value(run, out, script, fact):
    command = shell(f"if [ $2 = 0.1 ]; then {script}; else echo $2; fi")
    report = swept(run, out, command)
    (failed,) = [trial for trial in report.trials if trial.value is None]
    assert fact in failed.error
    assert report.best == 0.05


def test_two_failures_in_a_row_of_one_cause_end_a_sweep(run, tmp_path, out):
    command = shell(f"echo $2 >> {tmp_path}/calls; echo at $2; exit 3")
    with refused("the sweep", "exit code 3: at 0.1", kind=PostHocError):
        swept(run, out, command)
    assert (tmp_path / "calls").read_text() == "0.05\n0.1\n"


def test_a_metric_that_is_found_nowhere_stops_at_the_first_trial_and_names_what_was_printed(
    ema, run, tmp_path, out
):
    """A word in backquotes in the user's output is not taken for an argument of ours."""
    printed = tmp_path / "printed"
    printed.write_text("of `steps`: loss: 0.55")
    command = f"sh -c 'echo >> {tmp_path}/calls; cat {printed}' sh {{weights}}"
    done = ema("sweep", run.directory, "--eval", command, "--minimize", "--out", out)
    assert done.code == 2
    assert done.error.startswith("--eval: ")
    assert done.error.endswith(" `of `steps`: loss: 0.55`; add --metric loss")
    assert (tmp_path / "calls").read_text() == "\n"


def test_no_word_of_the_user_is_taken_for_an_argument_of_ours(ema, run, tmp_path, out):
    """Not in a warning or a path either; our own words are options in commands alone."""
    printed = tmp_path / "printed"
    printed.write_text("of `steps`, `metric` and `raw`")
    command = shell(f"if [ $2 = 0.1 ]; then cat {printed} >&2; exit 3; fi; echo $2")
    options = ("--minimize", "--sigma-rel", "0.05,0.1,0.2", "--json")
    done = ema("sweep", run.directory, "--eval", command, *options, "--out", out)
    assert "of `steps`, `metric` and `raw`; see " in done.err
    (warning,) = json.loads(done.out)["warnings"]
    assert "of `steps`, `metric` and `raw`; see " in warning
    folder = tmp_path / "`like`"
    done = ema("synthesize", folder, "--sigma-rel", "0.1")
    assert done.error.startswith(f"{folder}: no such")
    wrong = ("--sigma-rel", "0.1", "--average", "`like`", "-o", "a.pt")
    done = ema("synthesize", run.directory, *wrong)
    assert done.error == "--average: needs --like, whose tensors it replaces"
    with refused("average", "needs `like`"):
        run.write([0.1], tmp_path / "a.pt", average="x")


def test_failures_of_different_causes_do_not(run, out):
    lengths = [*LISTED, 0.22, 0.25]
    script = "case $2 in 0.05) exit 1;; 0.1) exit 2;; 0.2) exit 1;; esac; echo $2"
    with refused("the sweep", "3 of 5 trials", kind=PostHocError):
        swept(run, out, shell(script), sigma_rels=lengths)


@pytest.mark.parametrize("stream", [1, 2])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_trial_whose_metric_is_on_another_stream_has_failed(run, out, stream, jobs):
    """A number of a progress bar would win over the metrics of all others."""
    late = f"sleep 1; echo loss: 0.01 >&{3 - stream}"  # the first trial ends before
    script = f"case $2 in 0.1) {late};; *) echo loss: $2 >&{stream};; esac"
    lengths = [*LISTED, 0.22, 0.25]
    report = swept(run, out, shell(script), "loss", sigma_rels=lengths, jobs=jobs)
    (failed,) = [trial for trial in report.trials if trial.error]
    assert failed.sigma_rel == 0.1
    first, other = ("output", "error") if stream == 1 else ("error", "output")
    assert (
        f"is on standard {other}, and that of the first trial on standard {first}" in failed.error
    )
    assert report.value == 0.05


def test_the_grid_may_be_measured_in_parts(run, out, monkeypatch):
    """Lengths that have no trial yet are no failures."""
    lengths = [*LISTED, 0.22, 0.25]
    find = Sweep._next_averages
    monkeypatch.setattr(Sweep, "_next_averages", lambda sweep: find(sweep)[:1])
    report = swept(run, out, sigma_rels=lengths)
    assert report.best == 0.1
    assert {trial.sigma_rel for trial in report.trials} == {*lengths}


def test_a_best_length_at_an_end_is_reported_as_such(run, out):
    """A wider range then continues from the trials."""
    narrow = swept(run, out, sigma_range=(0.05, 0.08))
    assert narrow.best == 0.08
    assert narrow.is_at_edge
    wider = swept(run, out, sigma_range=(0.05, 0.2))
    assert wider.best == pytest.approx(0.1, rel=0.05)
    assert not wider.is_at_edge
    assert {*narrow.trials} <= {*wider.trials}


# --- side by side


def test_jobs_run_side_by_side_each_with_a_number_and_give_the_same_result(run, tmp_path, out):
    """Each of the first two waits until the other one runs, and the first ends last."""
    begun = f"touch {tmp_path}/$2"
    both = f"until [ -e {tmp_path}/0.05 ] && [ -e {tmp_path}/0.1 ]; do sleep 0.01; done"
    last = (
        f"[ $2 != 0.05 ] || until [ -s {out}/logs/sigma_rel-0.2-seed-0.out ]; do sleep 0.01; done"
    )
    script = f"echo $5 >> {tmp_path}/jobs; {begun}; {both}; {last}; echo $2"
    command = shell(script).replace("{dir}", "{dir} {job}")
    report = swept(run, out, command, jobs=2)
    one = swept(run, tmp_path / "one", shell("echo $2"))
    assert [replace(trial, seconds=0) for trial in report.trials] == [
        replace(trial, seconds=0) for trial in one.trials
    ]
    assert {*(tmp_path / "jobs").read_text().split()} == {"0", "1"}
    assert report.best == one.best


@pytest.mark.parametrize(("jobs", "devices"), [(1, ["unset"]), (2, ["3", "5"]), (3, ["3", "5"])])
def test_each_job_has_a_cuda_device_of_its_own(run, tmp_path, out, monkeypatch, jobs, devices):
    """No machine of a test has two."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("posthoc_cli.sweep.evaluation.visible_cuda_devices", lambda: ["3", "5"])
    script = f"echo ${{CUDA_VISIBLE_DEVICES-unset}} >> {tmp_path}/devices; echo $2"
    swept(run, out, shell(script), jobs=jobs)
    assert sorted({*(tmp_path / "devices").read_text().split()}) == devices


def test_a_failure_of_the_first_two_of_several_jobs_ends_the_others(run, tmp_path, out):
    command = shell(f"[ $2 = 0.2 ] || exit 3; echo $$ > {tmp_path}/pid; sleep 60")
    with refused("the sweep", "exit code 3", kind=PostHocError):
        swept(run, out, command, jobs=3)
    assert not (tmp_path / "pid").exists() or gone(tmp_path / "pid")


# --- raw weights


def of_weights(folder):
    """Return a run of checkpoints, whose last weights are all 7."""
    for step in (5, 10, 15, 20):
        weights = torch.full((9,), 7.0 if step == 20 else float(step))
        save_file({"a": weights}, folder / f"step-{step}.safetensors")
    return Run(folder / "step-*.safetensors")


LAST_OF_FILE = "tail -c 4 $1 | od -An -f"
"""A script whose metric is the last value of the last tensor."""


def test_the_last_weights_that_the_run_contains_are_measured_before_the_averages(tmp_path, out):
    command = shell(LAST_OF_FILE)
    run = of_weights(tmp_path)
    report = swept(run, out, command)
    first, *others = report.trials
    assert (first.target, first.sigma_rel, first.value) == ("last weights", None, 7.0)
    assert [trial.sigma_rel for trial in others] == [*LISTED]
    (gain,) = report.gains
    assert gain.gain == pytest.approx((7 - report.value) / 7)


def test_the_users_own_ema_is_measured_first_as_it_is_stored(tmp_path, out):
    stored = write_ema_checkpoints(tmp_path)
    import_checkpoints(tmp_path, tmp_path / "run", ema_decay=0.9)
    run = Run(tmp_path / "run")
    kept = tmp_path / "kept"
    kept.mkdir()
    metrics = "case $2 in ema) echo 4;; raw) echo 8;; *) echo $2 | sed s/0/3/;; esac"
    command = shell(f'cp "$1" {kept}/$2.safetensors; {metrics}')
    report = swept(run, out, command)
    titles = [trial.target for trial in report.trials]
    assert titles == ["your EMA (0.9)", "last weights", *(f"sigma_rel {x}" for x in LISTED)]
    copied = load_file(kept / "ema.safetensors")
    assert_same_tensors(copied, {"w": stored})
    own, last = report.gains
    assert own.gain == pytest.approx((4 - 3.05) / 4)
    assert last.gain == pytest.approx((8 - 3.05) / 8)
    texts = dict(summarize(report))
    ours = "24 % better than your EMA (0.9), 62 % better than the last weights"
    assert texts["gain"] == f"{ours}, by one measurement each"
    assert texts["your EMA (0.9)"] == "4"
    assert texts["best"].startswith("sigma_rel 0.05 (as decay ")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run with an EMA of its own and its last weights."""
    folder = tmp_path_factory.mktemp("own")
    write_ema_checkpoints(folder)
    import_checkpoints(folder, folder / "run", ema_decay=0.9)
    return Run(folder / "run")


def awk(prints):
    """Return a command that runs a program: x is the length, 0 of other weights, s the seed."""
    program = shlex.quote(f"BEGIN {{ x += 0; {prints} }}")
    return f"awk -v x={{sigma_rel}} -v s={{seed}} {program} {{weights}}"


@heavy
def test_where_noise_shows_the_own_ema_is_measured_twice(own, out):
    noisy = awk("v = x ? log(x / 0.1) ^ 2 + 0.5 : 1; print v + 0.02 * sin(1000 * x + 2 * s)")
    options = {"sigma_range": (0.05, 0.2), "budget": 10}
    report = swept(own, out, noisy, **options)
    measured = [(each.target, each.seed) for each in report.trials if each.sigma_rel is None]
    assert measured == [("your EMA (0.9)", 0), ("last weights", 0), ("your EMA (0.9)", 1)]
    assert report.estimate.noise > 0
    ours, _ = report.gains
    # sin(0) and sin(2) are the noise of the two measurements
    assert ours.value == pytest.approx(1 + 0.02 * math.sin(2) / 2, abs=1e-5)
    assert ours.gain == pytest.approx((ours.value - report.value) / ours.value)
    assert ours.margin == report.search.margin(2) / ours.value
    written = json.loads((out / "sweep.json").read_text())
    assert written["compared"][0] == ours._asdict()
    assert swept(own, out, noisy, **options).trials == report.trials


def test_equal_metrics_of_two_lengths_are_a_result_where_other_weights_have_another(
    own, out, caplog
):
    """As of a coarse metric, such as an accuracy of few examples."""
    lengths = [0.05, 0.2]
    report = swept(own, out, awk("print x ? 75.71 : 75"), sigma_rels=lengths, minimize=False)
    assert report.value == 75.71
    assert "same metric" not in caplog.text


def test_metrics_that_differ_in_nothing_are_an_error(own, out, caplog):
    with refused("the sweep", "every trial has the same metric, 75.71", kind=PostHocError):
        swept(own, out, awk("print 75.71"), sigma_rels=[0.05, 0.2])
    assert "all trials so far have the same metric, 75.71" in caplog.text


@heavy
def test_a_run_of_plain_weights_is_searched_over_what_its_files_show(tmp_path, out, caplog):
    random = torch.Generator().manual_seed(0)
    weights = torch.zeros(50)
    for step in range(1, 101):
        weights = weights + torch.randn(50, generator=random)
        if step % 10 == 0:
            save_file({"a": weights}, tmp_path / f"step-{step}.safetensors")
    run = Run(tmp_path / "step-*.safetensors")
    report = swept(run, out, shell("echo $2 | sed s/raw/9/"), sigma_rels=None)
    # means of the last two of ten files and of all are uniform over a fifth and all of training
    assert report.lengths == Lengths(round(0.2 * 12**-0.5, 4), 0.28)
    assert "the mean of the last two files" in caplog.text
    assert any("the mean of the last two files" in note for note in report.notes)


def test_the_command_says_what_was_measured(ema, run, out):
    command = ("sweep", run.directory, "--eval", BOWL, "--minimize", "--out", out)
    done = ema(*command, "--sigma-rel", "0.05,0.1,0.2")
    assert "trial 2 of about 3: sigma_rel 0.1 (as decay 0.8): 0 (" in done.out
    assert re.search(r"last weights +not measured: .* --raw", done.out)
    assert (out / "report.html").exists()


def test_decays_name_the_lengths_of_the_same_mean_age(ema, run, out):
    """That of an EMA is -1 / ln(decay) steps, that of a power function steps / (gamma + 2)."""
    command = ("sweep", run.directory, "--eval", BOWL, "--minimize", "--out", out)
    done = ema(*command, "--decay", "0.8,0.9", "--json")
    report = json.loads(done.out)
    for trial, decay in zip(report["trials"], (0.8, 0.9), strict=True):
        gamma = -run.step * math.log(decay) - 2
        variance = (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))
        assert trial["sigma_rel"] == pytest.approx(variance**0.5, rel=1e-3)
        assert trial["lost_gain"] == run.plan(trial["sigma_rel"]).lost_gain(0)
    assert report["best"]["as"] == "decay 0.8"
    longer = ema(*command, "--decay", "0.6,0.99")
    assert longer.error.startswith("--decay 0.6,0.99: ")


def test_last_weights_beside_those_that_the_run_contains_are_refused(tmp_path, out):
    run = of_weights(tmp_path)
    with refused("raw"):
        swept(run, out, raw=tmp_path / "step-5.safetensors")


def test_last_weights_whose_trial_fails_are_not_said_to_be_lacking(tmp_path, out):
    run = of_weights(tmp_path)
    report = swept(run, out, shell("if [ $2 = raw ]; then exit 3; else echo $2; fi"))
    assert dict(summarize(report))["last weights"] == "its trial failed"


def test_last_weights_in_a_checkpoint_are_measured(run, tmp_path, out):
    """Not the average that it holds, too."""
    raw = tmp_path / "last.pt"
    average = dict(run.average(0.1))
    weights = {name: torch.full_like(value, 7.0) for name, value in average.items()}
    torch.save({"model": weights, "ema": average}, raw)
    report = swept(run, out, shell(LAST_OF_FILE), raw=raw)
    first, *_ = report.trials
    assert first == Trial("last weights", None, 0, 7.0, seconds=first.seconds)


def test_a_metric_on_standard_error_and_in_colours_is_found_which_is_said_once(ema, run, out):
    colours = shell('printf "\\033[1mloss\\033[0m: \\033[36m%s\\033[0m\\n" $2 >&2')
    options = ("--metric", "loss", "--minimize", "--sigma-rel", "0.05,0.1,0.2")
    done = ema("sweep", run.directory, "--eval", colours, *options, "--json", "--out", out)
    assert [trial["value"] for trial in done.json["trials"]] == [*LISTED]
    (warning,) = done.json["warnings"]
    assert "the metric is taken from standard error" in warning
    assert done.err.count(warning) == 1


@pytest.mark.parametrize(
    ("raw", "is_said"),
    [
        (1, True),
        (2, False),
    ],
)
def test_last_weights_of_another_step_are_warned_of_and_noted(tmp_path, out, raw, is_said, caplog):
    model = torch.nn.Linear(2, 2)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=2) as ema:
        for step in (1, 2):
            torch.nn.init.constant_(model.weight, step)
            save_file(model.state_dict(), tmp_path / f"{step}.safetensors")
            ema.update_(model)
    report = swept(Run(tmp_path / "run"), out, raw=tmp_path / f"{raw}.safetensors")
    assert caplog.text.count("the model had at step 2") == is_said
    notes = [note for note in report.notes if "the model had at step 2" in note]
    assert len(notes) == is_said


def test_a_note_on_weights_that_are_measured_again_is_in_the_report_once(tmp_path, out, caplog):
    model = torch.nn.Linear(2, 2)
    with PostHocEMA.from_model(model, tmp_path / "run", update_every=1, checkpoint_every=2) as ema:
        for step in range(1, 9):
            torch.nn.init.constant_(model.weight, step)
            save_file(model.state_dict(), tmp_path / f"{step}.safetensors")
            ema.update_(model)
    noisy = shell("case $2 in raw) echo 9.$3;; *) echo $2$3;; esac")  # by the seed
    raw = tmp_path / "1.safetensors"
    report = swept(Run(tmp_path / "run"), out, noisy, sigma_range=(0.05, 0.25), raw=raw)
    assert len([trial for trial in report.trials if trial.target == "last weights"]) == 2
    assert caplog.text.count("the model had at step 8") == 1
    assert len([note for note in report.notes if "the model had at step 8" in note]) == 1


def test_a_file_without_the_tensors_of_the_averages_is_refused(run, tmp_path, out):
    raw = tmp_path / "other.safetensors"
    save_file({"b": torch.zeros(7)}, raw)
    with refused(raw, "'a'", kind=MismatchError):
        swept(run, out, raw=raw)


# --- failures and interruptions


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("#!/bin/sh\necho 5", "same metric, 5"),
        ("#!/no/such/interpreter", "cannot be started"),
    ],
)
def test_a_sweep_without_a_best_says_why_and_writes_none(run, tmp_path, out, content, reason):
    program = tmp_path / "program"
    program.write_text(content)
    program.chmod(0o755)
    with refused("the sweep", reason, kind=PostHocError):
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
from posthoc_cli import Run
from posthoc_cli.request import SweepRequest
from posthoc_cli.sweep import Sweep
run, command, out = sys.argv[1:]
lengths = [0.05, 0.1, 0.2]
request = SweepRequest(command, minimize=True, metric="m.json:x", sigma_rels=lengths, out=out)
Sweep(Run(run).sources, request).run()
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
    assert json.loads(line)["sigma_rel"] == 0.05


def test_after_ctrl_c_the_command_says_how_it_continues(ema, run, out, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sweep, "run", interrupt)
    done = ema("sweep", run.directory, "--eval", BOWL, "--minimize", "--out", out)
    assert done.code == 130
    assert "the same command" in done.err


def test_a_killed_sweep_is_continued_while_its_trial_still_runs(run, tmp_path, out):
    """The trial then writes to its old folder and log, not to those of the repeated trial."""
    go = tmp_path / "go"
    late = f'while [ ! -e {go} ]; do sleep 0.01; done; echo 9; echo "{{\\"x\\": 9}}" > $4/m.json'
    first = f"if [ ! -e {tmp_path}/pid ]; then echo $$ > {tmp_path}/pid; {late}; exit; fi"
    last = f'echo $2; echo "{{\\"x\\": $2}}" > $4/m.json; touch {go}; sleep 0.2'
    command = shell(f"{first}; {last}")
    with Forked(SWEEP, run.directory, command, out) as process:
        wait_for(tmp_path / "pid", process)
    report = swept(run, out, command, "m.json:x")
    assert [trial.value for trial in report.trials] == list(LISTED)
    assert (out / "logs" / f"{report.trials[0].name}.out").read_text() == "0.05\n"


def test_the_folder_of_a_running_sweep_is_refused(run, tmp_path):
    with DirectoryLock(tmp_path), refused(tmp_path, kind=LockedError):
        swept(run, tmp_path)


# --- what the average is written as


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


DRAW = (
    'cd "$4"; mkdir b; printf "\\211PNG" > a.png; cp a.png b/c.PNG; cp a.png b-c.png; touch d.txt'
)
"""Leaves what begins as pictures do."""


def test_images_of_a_trial_are_kept_without_a_metric_and_nothing_is_searched(run, out):
    report = swept(run, out, shell(DRAW), look=True)
    assert [trial.sigma_rel for trial in report.trials] == [*LISTED]
    assert names(out) == {"images", "logs", "sweep.json", "trials.jsonl", ".ema.lock"}
    assert names(out / "images") == {f"sigma_rel-{x}-seed-0" for x in LISTED}
    kept = out / "images/sigma_rel-0.1-seed-0"
    assert list_images(kept) == [kept / "a.png", kept / "b/c.PNG", kept / "b-c.png"]
    assert "best" not in report.to_dict()


def test_the_newest_images_are_kept_and_none_that_is_large(run, out, caplog):
    dated = "cp a.png $i.png; touch -d 2030-01-01T00:00:$i $i.png"
    large = "truncate -s 3M 20.png; touch -d 2031-01-01 20.png"
    script = f"{DRAW}; for i in $(seq 20); do {dated}; done; {large}"
    swept(run, out, shell(script), look=True)
    kept = names(out / "images" / "sigma_rel-0.05-seed-0")
    assert kept == {f"{i}.png" for i in range(4, 20)}
    assert "20.png: 3.15 MB" in caplog.text


def test_a_sweep_by_eye_without_images_is_an_error(run, out):
    with refused("the sweep", "{dir}", kind=PostHocError):
        swept(run, out, "true {weights} {dir}", look=True)
