"""The fidelity benchmark: its truth, its cells, its tables and its goals."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import bench_fidelity
import corner_cases
import corner_report
import corner_walks
import fidelity_report as report
import fidelity_runs as runs
import numpy as np
import pytest
from corner_runs import Cell as CornerCell
from corner_runs import Tracking
from fidelity_runs import Cell, Job
from trajectories import HELD_OUT, Trajectory

from posthoc_cli.profiles import PowerFunction, gamma_from_sigma_rel
from posthoc_cli.targets import Beta, Between, GivenProfile, Target, Window, as_target

# --- the truth -------------------------------------------------------------------------------------


def _walk(steps: int = 60, seed: int = 0) -> Trajectory:
    """On a clock that is slow at first."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal((steps, 7)).cumsum(axis=0).astype(np.float32)
    times = np.cumsum(np.where(np.arange(steps) < steps // 3, 16.0, 64.0))
    return Trajectory("classifier-images", weights, ((7,),), times)


def _truth(run: Trajectory, target: Target, stride: int) -> runs.FloatArray:
    (average,) = runs.true_averages(run, [target], stride)
    return average


@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("sigma_rel", [0.02, 0.1, 0.28])
def test_the_true_average_of_a_width_is_what_tracking_in_float64_gives(sigma_rel: float, stride: int) -> None:
    run = _walk()
    average, before = np.zeros(7), 0.0
    for index in range(stride - 1, run.steps, stride):
        kept = (before / run.times[index]) ** (gamma_from_sigma_rel(sigma_rel) + 1)
        average = kept * average + (1 - kept) * run.weights[index].astype(np.float64)
        before = run.times[index]
    np.testing.assert_allclose(_truth(run, as_target(sigma_rel), stride), average, rtol=1e-9)


@pytest.mark.parametrize("stride", [1, 10])
def test_the_true_classical_average_begins_as_a_copy_of_the_first_weights(stride: int) -> None:
    """What an update at every tenth step takes in counts for ten."""
    run, beta = _walk(), 0.95
    first, *later = run.weights.astype(np.float64)[stride - 1 :: stride]
    average = first
    for weights in later:
        average = beta**stride * average + (1 - beta**stride) * weights
    np.testing.assert_allclose(_truth(run, Beta(beta), stride), average, rtol=1e-12)


def test_the_true_window_is_the_mean_of_the_last_steps() -> None:
    run = _walk()
    weights = run.weights.astype(np.float64)
    np.testing.assert_allclose(_truth(run, Window(25), 1), weights[-25:].mean(axis=0), rtol=1e-12)
    # Of the update that looks at steps 31 to 40, half of the steps lie in the window.
    np.testing.assert_allclose(_truth(run, Window(25), 10), np.array([0.2, 0.4, 0.4]) @ weights[39::10], rtol=1e-12)


def test_the_true_stretch_is_the_mean_over_its_time() -> None:
    """The clock runs in 16ths for 20 steps, then in 64ths: 320 to 480 is two and a half of the later steps."""
    run = _walk()
    weights = run.weights.astype(np.float64)
    np.testing.assert_allclose(_truth(run, Between(320, 480), 1), np.array([2, 2, 1]) @ weights[20:23] / 5, rtol=1e-12)
    # Of the update at step 30, which has the time from step 20 on, the whole of it.
    np.testing.assert_allclose(_truth(run, Between(320, 480), 10), weights[29], rtol=1e-12)


def test_another_profile_has_no_truth_here() -> None:
    with pytest.raises(ValueError, match="profile given"):
        _truth(_walk(), GivenProfile(PowerFunction(1.0, 60.0)), 1)


def test_the_targets_stretch_with_the_run() -> None:
    assert [target.label for target in runs.targets(9_600)[9:]] == ["beta-0.999", "beta-0.9995", "window-2000"]
    assert [target.label for target in runs.targets(960)[9:]] == ["beta-0.99", "beta-0.995", "window-200"]


# --- cells -----------------------------------------------------------------------------------------


@pytest.fixture
def few_setups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TRACKED", ((0.05, 0.28),))
    monkeypatch.setattr(runs, "SNAPSHOTS", (8,))
    monkeypatch.setattr(runs, "DTYPES", ("float32", "float16"))


@pytest.mark.usefixtures("few_setups")
@pytest.mark.parametrize(
    "job",
    [Job("denoiser-restart"), Job("classifier-images"), Job("denoiser-adam", 10)],
    ids=lambda job: job.label,
)
def test_what_is_tracked_is_exact_and_the_oracle_is_not_beaten(job: Job) -> None:
    cells = runs.measure(job, 240)
    assert len(cells) == 2 * 12
    # Made of float32 sums, with coefficients of a few ones.
    assert all(cell.oracle <= min(cell.error, cell.paper) * (1 + 1e-6) + 3e-7 for cell in cells)
    assert all(cell.predicted > 0 and cell.held_out == job.held_out for cell in cells)
    unit = {"float32": 2**-24, "float16": 2**-11}
    assert all(cell.floor <= unit[cell.dtype] for cell in cells)
    tracked = [cell for cell in cells if cell.sigma_rel in cell.tracked]
    assert len(tracked) == 2 * 2
    # An update rounds once, and its rounding fades; 240 of them add up to less than 20.
    assert all(cell.error <= 20 * unit["float32"] for cell in tracked if cell.dtype == "float32")
    assert all(cell.error <= 1.1 * cell.floor for cell in tracked if cell.dtype == "float16")


def test_the_runs_are_all_there_are_and_two_with_gaps() -> None:
    assert sum(job.stride == 1 for job in runs.JOBS) == 10
    assert [job.held_out for job in runs.JOBS if job.stride == 10] == [False, True]
    assert {job.name for job in runs.JOBS if job.held_out} == set(HELD_OUT)


def test_the_oracle_finds_the_combination_there_is() -> None:
    stored = np.random.default_rng(0).standard_normal((4, 30))
    truth = np.array([[0.5, -0.25, 0.5, 0.25], [0, 1, 0, 0]]) @ stored
    np.testing.assert_allclose(runs._oracle(stored, truth), truth, atol=1e-13)
    assert np.linalg.norm(runs._oracle(stored, 2 * truth) - 2 * truth) > 0.1  # the sum must be 1


# --- tables and goals ------------------------------------------------------------------------------

GOOD = Cell("a", False, (0.05, 0.28), 64, "float16", "sigma_rel 0.1", 0.1, 1e-4, 1e-3, 1e-4, 2e-4, 5e-5)


def _verdicts(cells: Sequence[Cell]) -> list[bool]:
    return [goal.met for goal in report.goals(cells)]


def test_good_cells_meet_every_goal() -> None:
    assert _verdicts([GOOD] * 20) == [True] * 6


@pytest.mark.parametrize(
    ("changes", "missed", "measured"),
    [
        ({"error": 1.06e-3, "predicted": 1e-3, "sigma_rel": 0.02}, {0}, "1.060; 1 of 20 cells above"),
        ({"error": 4.1e-4, "predicted": 4e-4}, {2}, "4.10e-04; floor 2.0e-04, oracle 5.0e-05"),
        ({"error": 4.1e-4, "predicted": 1e-4, "snapshots": 20}, {4}, "4.100"),
    ],
)
def test_one_cell_misses_a_goal_of_every_cell(changes: dict[str, float], missed: set[int], measured: str) -> None:
    goals = report.goals([*[GOOD] * 19, replace(GOOD, **changes)])
    assert {index for index, goal in enumerate(goals) if not goal.met} == missed
    assert goals[missed.pop()].measured == measured


@pytest.mark.parametrize(
    ("changes", "share", "missed"),
    [
        ({"paper": 2e-4}, 11, {1}),
        ({"paper": 2e-4}, 9, set()),
        ({"predicted": 2.5e-4}, 2, {3}),
        ({"predicted": 2.5e-4}, 1, set()),
        ({"predicted": 0.8e-4}, 11, {5}),
        ({"predicted": 0.95e-4}, 11, set()),
    ],
)
def test_goals_of_shares_and_medians_bear_a_few_cells(changes: dict[str, float], share: int, missed: set[int]) -> None:
    verdicts = _verdicts([*[GOOD] * (20 - share), *[replace(GOOD, **changes)] * share])
    assert {index for index, met in enumerate(verdicts) if not met} == missed


def test_the_goal_of_exactness_bears_on_its_setup_and_range_only() -> None:
    others = ({"snapshots": 20}, {"dtype": "bfloat16"}, {"tracked": (0.05, 0.10)}, {"sigma_rel": 0.03})
    for changes in (*others, {"sigma_rel": None}):
        assert len(_verdicts([replace(GOOD, **changes)])) == 5


def test_held_out_runs_are_judged_alone_too() -> None:
    bad = replace(GOOD, held_out=True, error=5e-4)
    text = report.goals_text([*[GOOD] * 19, bad])
    both, alone = text.split("goals, held-out runs:")
    assert both.count("MISSED") == 2  # one cell, of 64 snapshots, 5 times off
    assert alone.count("MISSED") == 5
    assert "missed" in report.goals_markdown([*[GOOD] * 19, bad])


def test_the_tables_show_each_group() -> None:
    cells = [GOOD, replace(GOOD, run="b", held_out=True, dtype="bfloat16", tracked=(0.10,), paper=5e-5)]
    text = report.text_tables(cells)
    for group in ("all runs", "held-out runs", "float16, (0.05, 0.28)", "bfloat16, (0.10,)", "64 snapshots", "b *"):
        assert any(line.startswith(group) for line in text.splitlines())
    (line,) = (line for line in text.splitlines() if line.startswith("all runs"))
    assert line.split()[2:7] == ["2", "1.050", "2.000", "0.100", "1"]
    rows = report.markdown_table(cells).splitlines()
    assert len({row.count("|") for row in rows}) == 1
    assert len(rows) == 2 + 2 + 2 + 1


def test_the_worst_cells_come_first() -> None:
    far = replace(GOOD, run="far", predicted=1e-6)
    near_paper = replace(GOOD, run="near-paper", paper=1.2e-4)
    inexact = replace(GOOD, run="inexact", error=3e-4, paper=1.0, predicted=3e-4)
    text = report.worst_cells([GOOD, far, near_paper, inexact], count=1)
    assert [block.splitlines()[1].split(",")[0] for block in text.split("\n\n")] == ["near-paper", "far", "inexact"]


# --- the command -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("few_setups")
def test_the_benchmark_prints_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_fidelity, "_pictured_widths", lambda: np.array([0.02, 0.05, 0.1, 0.2]))
    files = {option: tmp_path / option for option in ("json", "figure.png")}
    options = ["--processes", "1", "--steps", "240", "--runs", "denoiser-adam-every-10", "--worst"]
    bench_fidelity.main([*options, "--json", str(files["json"]), "--figure", str(files["figure.png"])])
    text = capsys.readouterr().out
    assert "goals, all runs:" in text
    assert "largest error/paper" in text
    cells = json.loads(files["json"].read_text())
    assert len(cells) == 2 * 12
    assert {cell["run"] for cell in cells} == {"denoiser-adam-every-10"}
    assert files["figure.png"].read_bytes().startswith(b"\x89PNG")


def test_the_benchmark_prints_markdown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(runs, "measure", lambda *_, **__: [GOOD])
    bench_fidelity.main(["--processes", "1", "--markdown"])
    table, goals = capsys.readouterr().out.split("\n\n")
    assert table.startswith("|  | cells | error/paper |")
    assert goals.startswith("| goal | all runs |")


def test_each_run_has_a_process_with_one_blas_thread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_fidelity, "ProcessPoolExecutor", lambda processes, *_: ThreadPoolExecutor(processes))
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)

    def work(job: Job) -> tuple[str, str]:
        return job.label, os.environ["OMP_NUM_THREADS"] + os.environ["OPENBLAS_NUM_THREADS"]

    found = bench_fidelity._in_processes(runs.JOBS, work, 2)
    assert found == {job: (job.label, "11") for job in runs.JOBS}
    assert os.environ["OMP_NUM_THREADS"] == "5"
    assert "OPENBLAS_NUM_THREADS" not in os.environ
    assert "12 of 12" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [["--steps", "1000"], ["--steps", "0"], ["--runs", "denoiser-adam,nobody"]], ids=lambda o: o[-1]
)
def test_what_cannot_be_measured_is_a_usage_error(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_fidelity.main(options)
    assert stopped.value.code == 2
    assert options[-1].split(",")[-1] in capsys.readouterr().err


# --- corner cases ----------------------------------------------------------------------------------


def test_rates_change_where_they_say() -> None:
    fractions = np.array([0.0, 0.1, 0.3, 0.49, 0.5, 0.6, 0.8])
    np.testing.assert_array_equal(corner_walks.frozen(fractions), [1, 1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(corner_walks.alternating(4)(fractions), [1, 1, 1e-3, 1e-3, 1, 1, 1e-3])
    np.testing.assert_array_equal(corner_walks.alternating(2, slow_first=True)(fractions), [1e-3] * 4 + [1] * 3)
    np.testing.assert_allclose(corner_walks.restarts(np.array([0, 0.125, 0.25, 0.875])), [1, 0.5, 1, 0.5], atol=1e-15)


@pytest.mark.parametrize("make", [corner_walks.walk, corner_walks.descent])
def test_a_synthetic_run_is_the_same_every_time_and_stands_still_when_frozen(
    make: Callable[..., Trajectory],
) -> None:
    """Over the boundary between two blocks, 1,000 steps each, it goes on from where it was."""
    run = make("frozen", 2500, 50, seed=3)
    np.testing.assert_array_equal(run.weights, make("frozen", 2500, 50, seed=3).weights)
    assert np.all(run.weights[1250:] == run.weights[1249])
    moves = np.linalg.norm(np.diff(run.weights[:1250], axis=0), axis=1)
    assert moves[999] < 2 * moves[990:1010].mean()


def test_a_walk_is_as_long_as_asked() -> None:
    """2,000 parameters: the root mean square of 2,000 squares is off by 1/sqrt(4000), 1.6 %; so is the start's norm."""
    run = corner_walks.walk("constant", 1500, 2000, stretch=0.4)
    length = np.linalg.norm(run.weights[-1].astype(float) - run.weights[0]) / np.linalg.norm(run.weights[0])
    assert length == pytest.approx(0.4, rel=0.1)


def test_a_pause_is_on_the_clock_only() -> None:
    run = corner_walks.walk("constant", 6, 20)
    later = corner_walks.paused(run, 4, 10)
    np.testing.assert_array_equal(later.times, [1, 2, 3, 4, 15, 16])
    np.testing.assert_array_equal(later.weights, run.weights)


def test_a_layer_is_drawn_anew_right_after_a_step() -> None:
    run = corner_walks.walk("constant", 60, 500)
    changed = corner_walks.reinitialised(run, 30)
    moved = np.abs(changed.weights - run.weights).max(axis=1) > 0.01
    assert list(np.flatnonzero(moved)) == list(range(30, 60))
    np.testing.assert_array_equal(changed.weights[:, :-50], run.weights[:, :-50])
    # It goes on by the same steps, each rounded to float32 once more.
    np.testing.assert_allclose(np.diff(changed.weights[30:], axis=0), np.diff(run.weights[30:], axis=0), atol=1e-7)


def test_adam_steps_by_its_rate_and_stops_with_it() -> None:
    """Before the moments have averaged anything, each element moves by the rate: 0.1 / sqrt(400).

    Adam's epsilon, 1e-8, shortens that by 1e-8 over the gradient, which is above 1e-3.
    """
    path = np.concatenate(list(corner_walks.adam_blocks(corner_walks.cosine, 400, 30, 0)))
    first = np.random.default_rng(0).standard_normal((2, 30)) * corner_walks.SCALE
    np.testing.assert_allclose(np.abs(path[0] - first.sum(axis=0)), corner_walks.SCALE / 20, rtol=1e-5)
    assert np.abs(path[-1] - path[-2]).max() < 1e-4 * corner_walks.SCALE


@pytest.fixture
def one_study(monkeypatch: pytest.MonkeyPatch) -> None:
    run = corner_walks.walk("cosine", 120, 200)
    trackings = [Tracking((0.05, 0.28), dtype, 20) for dtype in ("float32", "float16")]
    study = corner_cases.Study(run, trackings, [as_target(0.05), as_target(0.15)])
    monkeypatch.setattr(corner_cases, "STUDIES", {"tiny": lambda: [study]})


@pytest.mark.usefixtures("one_study")
def test_a_tracked_average_is_its_own_nearest_and_another_is_not() -> None:
    exact, made, rounded, _ = corner_cases.measure("tiny")
    assert (exact.run, exact.target, exact.setup) == (
        "walk, cosine", "sigma_rel 0.05", "float32, (0.05, 0.28), every 10 and 20"
    )  # fmt: skip
    # Twelve updates round once each.
    assert exact.error == exact.nearest < 12 * 2**-24
    assert exact.paper == pytest.approx(exact.error, rel=1e-3)
    assert made.error < 0.1 * made.nearest
    assert 2**-13 < rounded.error < 2**-11  # one rounding to float16, between no and half a spacing of values
    assert exact.predicted > 0


@pytest.mark.usefixtures("one_study")
def test_the_corner_cases_print_their_tables_and_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cells.json"
    bench_fidelity.main(["--corners", "--processes", "1", "--case", "tiny", "--worst", "--json", str(file)])
    text = capsys.readouterr().out
    assert "goals, tiny:" in text
    assert "tiny, error/nearest" in text
    assert len(json.loads(file.read_text())) == 4
    bench_fidelity.main(["--corners", "--processes", "1", "--case", "tiny", "--markdown"])
    table, goals = capsys.readouterr().out.split("\n\n")
    assert len({row.count("|") for row in table.splitlines()}) == 1
    assert goals.startswith("| goal | all cases |")


def test_every_case_of_the_issue_is_there() -> None:
    assert set(corner_cases.CASES) == {
        "few-left", "long", "resumes", "resumes-kept", "plan-promise", "every-update", "pause", "reinit", "live",
        "subnormal", "alternating", "tiny", "pruning", "keeping",
    }  # fmt: skip


def test_choices_are_all_those_with_the_newest_of_each_profile() -> None:
    profiles = [PowerFunction(gamma, t) for t in (1.0, 2.0, 3.0) for gamma in (16.0, 1.0)]
    assert sorted(corner_cases._choices(profiles, 2)) == [[0, 1, 4, 5], [0, 3, 4, 5], [1, 2, 4, 5], [2, 3, 4, 5]]


CORNER = CornerCell("a", "walk", "float16", "0.1", error=1e-3, paper=1e-3, nearest=2e-3, predicted=1e-3)


def _corner_verdicts(changes: dict[str, float], share: int) -> list[bool]:
    cells = [*[CORNER] * (100 - share), *[replace(CORNER, **changes)] * share]
    return [goal.met for goal in corner_report.goals(cells)]


@pytest.mark.parametrize(
    ("changes", "share", "missed"),
    [
        ({}, 0, set()),
        ({"paper": 0.9e-3}, 1, {0}),
        ({"nearest": 0.9e-3}, 1, {1}),
        ({"predicted": 0.3e-3}, 2, set()),
        ({"predicted": 0.3e-3}, 3, {2, 3}),
        ({"predicted": 4e-3}, 3, {2}),
        ({"predicted": 0.0}, 3, {2, 3}),
    ],
)
def test_each_corner_goal_bears_on_its_ratio(changes: dict[str, float], share: int, missed: set[int]) -> None:
    assert {index for index, met in enumerate(_corner_verdicts(changes, share)) if not met} == missed


def test_corner_ratios_leave_out_what_is_not_known() -> None:
    unknown = replace(CORNER, predicted=math.nan, paper=math.nan)
    kept = CornerCell("b", "walk", "float16", "3 of 20", predicted=3e-3, best=2e-3)
    none = replace(CORNER, case="c", error=0.0, paper=0.0, nearest=0.0, predicted=0.0)
    text = corner_report.text_tables([CORNER, unknown, kept, none])
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:]}
    assert rows["b"] == ["b", "1", "0", "1.500", "1.500"]
    assert rows["c"][2:4] == ["1.000", "1.000"]
    assert rows["a"][-1] == "1"
    assert "kept/best" in corner_report.worst_cells([kept])


@pytest.mark.parametrize("case", ["nothing", "tiny,nothing"])
def test_a_case_that_is_none_is_a_usage_error(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench_fidelity.main(["--corners", "--case", case])
    assert stopped.value.code == 2
    assert "nothing: no such case" in capsys.readouterr().err
