"""The benchmarks and comparisons run and print what the guides quote; the truths that they compare with are exact."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Sequence
from pathlib import Path

import bench_batch_norm
import bench_fidelity
import bench_load
import bench_planning
import bench_synthesis
import bench_update
import compare_peers
import corner_cases
import corner_walks
import fidelity_runs as runs
import numpy as np
import pytest
import quiet_timing
import torch
import trace_calls
import trajectories
from compare_peers import true_weights
from corner_runs import Tracking
from fidelity_runs import Job
from synthesis_cases import Layers, without_noise
from trajectories import Trajectory
from typer.testing import CliRunner
from update_cases import contenders

from posthoc_cli.cli import app
from posthoc_cli.profiles import PowerFunction, gamma_from_sigma_rel
from posthoc_cli.targets import Beta, Between, Target, Window, as_target


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet_timing, "PATIENCE", 0.0)


def goals(printed: str) -> list[str]:
    """The lines of the verdicts, each of which begins with one."""
    lines = printed.split("Goals:\n")[1].splitlines()
    assert all(line.split()[0] in ("met", "MISSED", "NOT") for line in lines)
    return lines


# --- speed and memory ------------------------------------------------------------------------------


@pytest.mark.usefixtures("_impatient")
def test_bench_synthesis(capsys: pytest.CaptureFixture[str]) -> None:
    bench_synthesis.main(["--quick"])
    assert len(goals(capsys.readouterr().out)) == 8


@pytest.mark.usefixtures("_impatient")
def test_bench_update(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    bench_update.main(["--quick", "--device", "cuda", "--folder", str(tmp_path)])
    out = capsys.readouterr().out
    assert "accelerators: not run" in out
    assert len(goals(out)) == 4 * 2 + 2
    assert not list(tmp_path.iterdir())


@pytest.mark.cuda
@pytest.mark.usefixtures("_impatient")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_benchmark_runs_on_an_accelerator(capsys: pytest.CaptureFixture[str]) -> None:
    bench_update.main(["--quick", "--device", "cuda"])
    out = capsys.readouterr().out
    assert "accelerators: not run" not in out
    assert "% of a step" in out.split("Goals:\n")[1]
    assert "memory in staging buffers" in out.split("Goals:\n")[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_of_everyone_elses_changes_two_averages_of_the_dtype_that_is_shown(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """No private names: the averages are the tensors of this process that have changed."""
    shape = (37, 41)
    for index, who in enumerate(contenders(dtype, "cpu")):
        if not who.installed or who.role not in ("PyPI peer", "other"):
            continue
        with without_noise():
            model = Layers({"layers.0.weight": shape, "layers.1.weight": shape}).to(dtype)
            updates = who.start(model, tmp_path / str(index))
            updates.update()
            with torch.no_grad():
                model.layers[1].fill_(1e5)
            tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
            # A parameter and its detached self are two objects and one tensor.
            kept = {item.data_ptr(): (item, item.detach().clone()) for item in tensors if tuple(item.shape) == shape}
            updates.update()
            updates.settle()
        changed = [now for now, before in kept.values() if not torch.allclose(now, before, rtol=1e-3)]
        assert len(changed) == 2, who.label
        assert {now.dtype for now in changed} == {who.average_dtype or dtype}, who.label
        del tensors, kept, changed


@pytest.mark.usefixtures("_impatient")
def test_bench_planning(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: Sequence[str]) -> None:
        """In this process: importing takes seconds."""
        assert CliRunner().invoke(app, list(words)).exit_code == 0

    monkeypatch.setattr(bench_planning, "run", run)
    bench_planning.main(["--quick"])
    assert len(goals(capsys.readouterr().out)) == 4


def test_bench_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_load.main(["--job", "thinned", "300", str(tmp_path / "run")])
    rows = [line.split("|") for line in capsys.readouterr().out.replace(" ", "").splitlines()]
    assert [row[1:3] for row in rows] == [["3", "0"], ["30", "6"], ["150", "30"], ["300", "40"]]


def test_trace_calls(tmp_path: Path) -> None:
    found = trace_calls.measure(tmp_path)
    assert set(found) == {"update_ with a snapshot", "ema synthesize", "ema error-plot"}
    assert all(len(entered) > 20 for entered in found.values())


# --- accuracy --------------------------------------------------------------------------------------


def test_bench_batch_norm_measures_better_statistics_than_copied_ones(capsys: pytest.CaptureFixture[str]) -> None:
    bench_batch_norm.main(["--seeds", "1", "--steps", "60"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| 0.")]
    losses = {(row[0].strip(), row[1].strip()): (float(row[2]), float(row[3])) for row in rows}
    copied, measured = losses["0.1", "sigma_rel 0.25"]
    assert measured < copied


@pytest.mark.parametrize("stride", [1, 10])
@pytest.mark.parametrize("sigma_rel", compare_peers.TARGETS)
def test_the_scripts_own_true_average_is_the_packages_definition(sigma_rel: float, stride: int) -> None:
    seen = np.arange(stride, 601, stride)
    counts = true_weights(sigma_rel, 600, stride)
    expected = PowerFunction.from_sigma_rel(sigma_rel, 600).discrete_weights(seen)
    np.testing.assert_allclose(counts[seen - 1], expected, rtol=1e-9, atol=1e-15)
    assert counts.sum() == pytest.approx(1)


def test_ours_is_near_the_truth_and_the_peers_where_their_method_puts_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_peers, "PEER_RUNS", ("classifier-sgd",))
    compare_peers.main(["--steps", "600", "--markdown"])
    printed = capsys.readouterr()
    assert printed.err == ""
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.splitlines() if "|" in line]
    assert len(table) == 12
    rows = {(_without_version(line[0]), line[1]): line for line in table[2:]}
    assert len(rows) == 10
    distance = {key: np.array(line[2:7], dtype=float) for key, line in rows.items()}
    assert np.all(distance["posthoc_cli", "1"] < 1e-4)
    assert np.all(distance["posthoc_cli", "10"] < 1.1 * distance["every 10th step, exactly", "10"] + 1e-4)
    for peer in ("ema_pytorch", "posthoc_ema", "posthoc_ema, update_after_step=1"):
        assert np.all(distance[peer, "1"] < 0.1)
        assert np.all(distance[peer, "10"] > 10 * distance["posthoc_cli", "10"])
        assert float(rows[peer, "1"][7]) < 1e-4
        assert float(rows[peer, "10"][7]) < 1e-4


def _without_version(label: str) -> str:
    return re.sub(r" \d+\.[\w.+]*", "", label)


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


# --- recorded runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", trajectories.NAMES)
def test_a_run_is_recorded_after_every_step(name: str) -> None:
    run = trajectories.record(name, 30)
    assert (run.name, run.steps, run.weights.dtype) == (name, 30, np.float32)
    assert run.weights.shape == (30, sum(int(np.prod(shape)) for shape in run.shapes))
    assert 3_600 < run.weights.shape[1] < 12_000
    assert np.isfinite(run.weights).all()
    assert np.all(np.linalg.norm(np.diff(run.weights, axis=0), axis=1) > 0)


@pytest.mark.parametrize("name", trajectories.NAMES)
def test_the_clock_counts_steps_or_images(name: str, tmp_path: Path) -> None:
    for _ in ("recorded", "cached"):
        run = trajectories.record(name, 10, tmp_path)
        sizes = [16] * 4 + [64] * 4 + [256] * 2 if name == "classifier-images" else [1] * 10
        assert run.times.dtype == np.float64
        np.testing.assert_array_equal(np.diff(run.times, prepend=0), sizes)


def test_a_replay_stands_where_the_run_stood() -> None:
    run = trajectories.record("denoiser-adam", 4)
    replay = trajectories.Replay(run)
    held = [parameter.data_ptr() for parameter in replay.parameters()]
    replay.go_to(2)
    assert tuple(tuple(parameter.shape) for parameter in replay.parameters()) == run.shapes
    weights = torch.nn.utils.parameters_to_vector(replay.parameters()).detach().numpy()
    np.testing.assert_array_equal(weights, run.weights[2])
    assert [parameter.data_ptr() for parameter in replay.parameters()] == held
