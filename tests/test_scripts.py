"""The benchmarks and comparisons run and print what the guides quote; the truths that they compare with are exact."""

from __future__ import annotations

import importlib
import json
import logging
import re
import runpy
import sys
from pathlib import Path

import any_ema
import bench_averages
import bench_batch_norm
import bench_fidelity
import bench_memory
import bench_sharded
import bench_update
import checkpoint_fidelity
import compare_peers
import corner_cases
import corner_walks
import evidence
import fidelity_runs as runs
import forked
import long_runs
import numpy as np
import pytest
import torch
from checkpoint_fidelity import Job
from compare_peers import true_averages
from fidelity_runs import Tracking
from trajectories import Trajectory

from posthoc_cli.profiles import gamma_from_sigma_rel
from posthoc_cli.targets import Beta, Between, Target, Window, as_target

QUICK = {
    "bench_synthesis": (r"^  (\S.*?)  +\d", 2 * 10 + 5 * 2),
    "bench_remote": (r"^\| \d", 1),
    "bench_sweep": (r"^ +\d+ +0\.\d", 4),
}
"""Scripts with the rows that they print, and how many of them."""


@pytest.mark.parametrize("script", QUICK)
def test_a_quick_call_prints_every_row(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if script == "bench_remote":
        pytest.importorskip("obstore")
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "")  # and what it sets is undone
    importlib.import_module(script).main(["--quick"])
    row, count = QUICK[script]
    assert len(re.findall(row, capsys.readouterr().out, re.MULTILINE)) == count


def test_evidence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    evidence.main(["--quick", "--processes", "1", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("last weights |") == 3
    assert all((tmp_path / "quick" / name).exists() for name in ("evidence.json", "gain-language.svg", "gain-time.svg"))
    evidence.main(["--quick", "--processes", "1", "--out", str(tmp_path)])  # nothing is trained again
    assert printed.endswith(capsys.readouterr().out)


def test_the_tables_of_the_guide_are_those_of_the_record() -> None:
    page = (Path(evidence.__file__).parent.parent / "posthoc_cli/guides/gain.md").read_text()
    for table in evidence.tables(json.loads(evidence.RECORD.read_text())):
        assert table in page


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_bench_update(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    bench_update.main(["--quick", "--device", device, "--busy", "1"])
    out = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:5]] == ["ours, late in a run", "ours, at its beginning", "`ema_pytorch`"]
    assert all(re.fullmatch(r"[\d.e+]+ \([\d.e+]+\)", cell) for row in rows[2:-1] for cell in row[1:])
    assert "one at which two snapshots are due: " in out
    assert re.search(r"\na step without the hook: .* ms; with it [+-]", out)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a peak of memory")
def test_bench_sharded(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import bench_sharded; bench_sharded.main(sys.argv[1:])"
    monkeypatch.setattr(bench_sharded, "start", lambda words: forked.Forked(code, *words))
    bench_sharded.main(["--quick"])
    out = capsys.readouterr().out
    assert [row.split("|")[-2].strip() for row in out.splitlines() if row.startswith(("| one", "| each"))] == ["0", "0"]


def test_bench_memory(capsys: pytest.CaptureFixture[str]) -> None:
    bench_memory.main()
    held = re.findall(r'device="(\w+)": (\d+\.\d) bytes a parameter held', capsys.readouterr().out)
    assert [device for device, _ in held] == ["model", "cpu"]
    assert all(10 < float(nbytes) < 30 for _, nbytes in held)


def test_long_runs(capsys: pytest.CaptureFixture[str]) -> None:
    long_runs.main(["--steps", "300"])
    rows = re.findall(r"^\| (.+?) \| (\S+) / (\S+) \| (\S+) / (\S+) \|$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in rows] == list(long_runs.CASES)
    assert all(float(error) < 2.5e-6 for _, *errors in rows for error in errors)


def test_any_ema(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NAMES", ("classifier-sgd",)), ("LENGTHS", (0.1, 0.03)), ("WIDTHS", (0.05, 0.15))):
        monkeypatch.setattr(any_ema, name, value)
    any_ema.main(["--steps", "600", "--only", "plain"])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| plain | classifier-sgd, 0.1 T")]
    assert [row[2] for row in rows] == ["0.05", "0.15"]
    assert all(float(row[3]) < 0.2 * float(row[4]) for row in rows)  # nearer than the EMA itself


def test_torture(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["torture.py", "--only", "every truncation", "--share", "0.02"])
    logger = logging.getLogger("posthoc_cli")
    monkeypatch.setattr(logger, "level", logger.level)  # which the script raises
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(evidence.__file__).with_name("torture.py")), run_name="__main__")
    assert ended.value.code == 0
    assert re.search(r"^\| every truncation \| [1-9]\d* \| 0 \| 0 \| 0 \| \d+ s \|$", capsys.readouterr().out, re.M)


def test_every_script_is_run_here_or_by_the_wheels_test() -> None:
    scripts = Path(evidence.__file__).parent.glob("*.py")
    programs = {path.stem for path in scripts if "__main__" in path.read_text()} - {"try_wheel", *QUICK}
    assert not [name for name in programs if not re.search(rf"\b{name}(\.main\(|\.py\")", Path(__file__).read_text())]


def test_bench_averages(capsys: pytest.CaptureFixture[str]) -> None:
    bench_averages.main(["--quick"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.count("|") == 5]
    distances = {row[0][2:]: float(row[3].rstrip(" |")) for row in rows[2:]}
    assert distances["carried"] < 1e-5 < distances["window of 3"] < distances["truncated"]


def test_bench_batch_norm_finds_averaged_statistics_near_measured_ones(capsys: pytest.CaptureFixture[str]) -> None:
    bench_batch_norm.main(["--seeds", "1", "--steps", "300"])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("| 0.25 |")
    copied, averaged, measured = map(float, last.split("|")[2:-1])
    assert abs(averaged - measured) < 0.5 * (copied - measured)


def test_ours_is_near_the_truth_and_the_peers_are_not_at_a_stride(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_peers, "PEER_RUNS", ("classifier-sgd",))
    compare_peers.main(["--steps", "600"])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if "e-0" in line]
    distance = {(row[0].split()[1], row[1]): np.array([float(cell.rstrip(" |")) for cell in row[2:]]) for row in table}
    assert len(distance) == 8
    assert np.all(distance["posthoc-cli", "1"] < 1e-4)
    assert np.all(distance["posthoc-cli", "10"] < 1.1 * distance["every", "10"] + 1e-4)
    for peer in ("ema-pytorch", "pytorch-posthoc-ema"):
        assert np.all(distance[peer, "1"] < 0.1)
        assert np.all(distance[peer, "10"] > 10 * distance["posthoc-cli", "10"])


@pytest.mark.parametrize("stride", [1, 10])
def test_the_true_averages_are_those_of_their_definitions(stride: int) -> None:
    """The clock is slow at first: 20 steps of 16, then 40 of 64."""
    walk = np.random.default_rng(0).standard_normal((60, 7)).cumsum(axis=0).astype(np.float32)
    times = np.cumsum(np.where(np.arange(60) < 20, 16.0, 64.0))
    run = Trajectory("classifier-images", walk, ((7,),), times)
    weights = walk.astype(np.float64)
    seen = range(stride - 1, 60, stride)
    power, classical, before = np.zeros(7), weights[stride - 1], 0.0
    for index in seen:
        kept = (before / times[index]) ** (gamma_from_sigma_rel(0.1) + 1)
        power = kept * power + (1 - kept) * weights[index]
        classical = 0.95**stride * classical + (1 - 0.95**stride) * weights[index]
        before = times[index]
    # Of the updates at every tenth step, half of the one at step 40 lies in the window, and all of the one at step 30
    # in the stretch of time.
    window = weights[-25:].mean(axis=0) if stride == 1 else np.array([0.2, 0.4, 0.4]) @ weights[39::10]
    stretch = np.array([2, 2, 1]) @ weights[20:23] / 5 if stride == 1 else weights[29]
    expected: dict[Target, np.ndarray] = {
        as_target(0.1): power, Beta(0.95): classical, Window(25): window, Between(320, 480): stretch,
    }  # fmt: skip
    np.testing.assert_allclose(true_averages(run, [*expected], stride), [*expected.values()], rtol=1e-9)


def test_bench_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Tracked averages are exact, and nothing is better than the oracle."""
    for name, value in (("TRACKED", ((0.05, 0.28),)), ("SNAPSHOTS", (8,)), ("DTYPES", ("float32", "float16"))):
        monkeypatch.setattr(runs, name, value)
    monkeypatch.setattr(bench_fidelity, "_pictured_widths", lambda: np.array([0.02, 0.05, 0.1, 0.2]))
    files = {option: tmp_path / option for option in ("json", "figure.png")}
    options = ["--processes", "1", "--steps", "240", "--only", "denoiser-adam-every-10,denoiser-restart"]
    bench_fidelity.main([*options, "--json", str(files["json"]), "--figure", str(files["figure.png"])])
    text = capsys.readouterr().out
    assert "\n| denoiser-restart (held out) | 24 | " in text
    assert files["figure.png"].read_bytes().startswith(b"\x89PNG")
    cells = json.loads(files["json"].read_text())
    assert len(cells) == 2 * 2 * 12
    # Made of float32 sums, with coefficients of a few ones.
    assert all(cell["oracle"] <= min(cell["error"], cell["paper"]) * (1 + 1e-6) + 3e-7 for cell in cells)
    tracked = [cell for cell in cells if cell["sigma_rel"] in (0.05, 0.28)]
    assert len(tracked) == 2 * 2 * 2
    # An update rounds once, and its rounding fades; 24 of them add up to less than 20, and so do 240.
    assert all(cell["error"] <= 20 * 2**-24 for cell in tracked if cell["dtype"] == "float32")
    assert all(cell["error"] <= 1.1 * cell["floor"] <= 1.1 * 2**-11 for cell in tracked if cell["dtype"] == "float16")


def test_bench_fidelity_of_corner_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = corner_walks.walk("cosine", 120, 200)
    trackings = [Tracking((0.05, 0.28), dtype, 20) for dtype in ("float32", "float16")]
    study = corner_cases.Study(run, trackings, [as_target(0.05), as_target(0.15)])
    monkeypatch.setattr(corner_cases, "STUDIES", {"tiny": lambda: [study]})
    exact, made, rounded, _ = corner_cases.measure("tiny")
    assert exact.error == exact.nearest < 12 * 2**-24  # twelve updates round once each
    assert made.error < 0.1 * made.nearest
    assert 2**-13 < rounded.error < 2**-11  # one rounding to float16, between no and half a spacing of values
    options, file = ["--hard", "--processes", "1", "--only", "tiny"], tmp_path / "cells.json"
    bench_fidelity.main([*options, "--json", str(file)])
    assert len(json.loads(file.read_text())) == 4
    rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[:2] for row in rows[2:]] == [["| all", "4"], ["| walk, cosine", "4"]]
    assert len({row.count("|") for row in rows}) == 1


def test_bench_fidelity_of_checkpoints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In real trainings, predicted errors of checkpoints hold, and the other libraries' averages are corrected."""
    monkeypatch.setattr(checkpoint_fidelity, "JOBS", (Job("classifier-sgd"), Job("classifier-sgd", True)))
    monkeypatch.setattr(checkpoint_fidelity, "COUNTS", (8, 20))
    monkeypatch.setattr(checkpoint_fidelity, "STRIDES", (1, 10))
    cells = [cell for job in checkpoint_fidelity.JOBS for cell in checkpoint_fidelity.measure(job, 960)]
    assert len(cells) == 2 * 2 * 8
    ratios = np.array([cell.error / cell.predicted for cell in cells])
    assert np.mean((ratios > 0.5) & (ratios < 2)) >= 0.9
    assert all(cell.oracle <= cell.error * (1 + 1e-6) for cell in cells)
    repaired = checkpoint_fidelity.repairs(960)
    assert all(repair.error < 0.15 * repair.raw for repair in repaired)
    assert all(repair.error < 0.05 * repair.own for repair in repaired if repair.update_every == 10)
    print(checkpoint_fidelity.tables(cells, repaired))
    first, second = capsys.readouterr().out.split("\n\n")
    assert len({row.count("|") for row in first.splitlines()}) == 1
    assert "| posthoc-ema | 10 | 0.05 |" in second
