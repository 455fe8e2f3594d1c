"""`Run`: what the command line does, as calls on an object."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused
from ema_command import Ema
from factories import Span, random_walk, write_run
from safetensors.torch import load_file
from tracker.runs import steps, track, update

from posthoc_cli import Beta, Groups, PostHocEMA, PowerFunction, Run, Window
from posthoc_cli.errors import DirectoryError, InexactError, InvalidValueError, OutputExistsError
from posthoc_cli.run import plan_training
from posthoc_cli.targets import GivenProfile

TARGETS = {
    "beta-0.9": Beta(0.9),
    "span": GivenProfile(Span(20, 80), "span"),
    "given": PowerFunction.from_sigma_rel(0.15, 100.0),
}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    walk = random_walk(100, {"w": (5, 3), "b": (3,)})
    write_run(tmp_path / "run", walk, range(10, 101, 10))
    return Run(tmp_path / "run")


def test_a_run_describes_its_snapshots(run: Run) -> None:
    assert run.t == 100.0
    assert run.step == 100
    assert run.profiles == [0.05, 0.28]
    assert steps(run.directory)[:3] == [10, 10, 20]
    shapes = {name: spec.shape for name, spec in run.tensors.items()}
    assert shapes == {"w": (5, 3), "b": (3,)}
    assert {spec.dtype for spec in run.tensors.values()} == {"F32"}
    assert repr(run) == f"Run({str(run.directory)!r}: 20 snapshots of 0.05, 0.28 up to 100 steps)"
    _, long = run.info()["profiles"]
    assert long["times"] == [*range(10, 101, 10)]


def test_reading_headers_needs_neither_torch_nor_scipy(run: Run) -> None:
    code = """
import sys
from posthoc_cli import Run
run = Run(sys.argv[1])
print(run, run.tensors, run.info(), run.plan(0.15), run.error_curve().to_dict(), run.check())
run.prune(keep=5, dry_run=True)
assert not {"torch", "scipy"} & set(sys.modules)
"""
    command = [sys.executable, "-c", code, run.directory]
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize("name", TARGETS)
def test_an_average_equals_that_of_the_tracker_and_that_in_a_file(
    run: Run,
    tmp_path: Path,
    name: str,
) -> None:
    target = TARGETS[name]
    out = tmp_path / "a.safetensors"
    weights = run.average(target, dtype="float64")
    tracker = PostHocEMA.from_path(run.directory)
    expected = tracker.state_dict(sigma_rel=target, dtype="float64")
    assert_same_tensors(weights, expected)
    assert weights.predicted_error == expected.predicted_error
    (planned,) = run.plan(target, dtype="float64").to_dict()["targets"]
    assert weights.profile_error == planned["profile_error"]
    (made,) = run.write(target, out, dtype="float64").to_dict()["targets"]
    assert_same_tensors(load_file(out), weights)
    assert made["predicted_error"] == weights.predicted_error


def test_an_average_of_another_time_and_dtype_loads_without_this_package(
    run: Run,
    tmp_path: Path,
) -> None:
    weights = run.average(0.1, step=50, dtype=torch.bfloat16)
    assert weights["w"].dtype == torch.bfloat16
    assert_same_tensors(run.average(0.1, t=50, dtype="bfloat16"), weights)
    torch.save(weights, tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert_same_tensors(loaded, weights)


def test_a_curve_has_the_errors_of_plans(run: Run) -> None:
    curve = run.error_curve((0.1, 0.2), others=[Window(50)])
    plan = run.plan([0.1, Window(50)], dtype="float64")
    assert curve.predicted_error[0] == pytest.approx(plan.predicted_error(0))
    assert curve.others[0].predicted_error == pytest.approx(plan.predicted_error(1))


def test_writing_several_averages_returns_what_the_command_prints(
    run: Run,
    ema: Ema,
    tmp_path: Path,
) -> None:
    report = run.write([0.1, Beta(0.9)], tmp_path / "new", max_error=0.9)
    assert [path.name for path in report.outputs] == [
        "sigma_rel-0.1.safetensors",
        "beta-0.9.safetensors",
    ]
    words = ["--sigma-rel", "0.1", "--target", "beta:0.9", "--overwrite", "--json"]
    printed = ema("synthesize", run.directory, *words, "--out", tmp_path / "new").json
    expected = json.loads(json.dumps(report.to_dict()))
    for target in (*printed["targets"], *expected["targets"]):
        del target["seconds"]
    assert printed == expected
    with pytest.raises(FrozenInstanceError):
        report.seconds = 0.0  # type: ignore[misc]
    with pytest.raises(OutputExistsError) as raised:
        run.write([0.1, 0.2], tmp_path / "new")
    assert raised.value.hint == "choose another name, or `overwrite` to replace it"
    with pytest.raises(InexactError):
        run.write(0.1, tmp_path / "no.safetensors", max_error=1e-9)
    assert not (tmp_path / "no.safetensors").exists()
    (planned,) = run.write(0.1, None, dry_run=True).to_dict()["targets"]
    assert planned["output"] is None
    with refused("out"):
        run.write(0.1, None)
    with pytest.raises(TypeError, match="unexpected keyword argument 'force'"):
        run.write(0.1, tmp_path / "no.safetensors", force=True)


@pytest.mark.parametrize(
    ("call", "subject", "words"),
    [
        (lambda _: Run(None), "directory", "None: must be a path"),
        (lambda run: run.average(0.1, device=99), "device", "'99': cannot be used: "),
        (
            lambda run: run.prune(max_error="1%"),
            "max_error",
            "'1%': must be a relative error in (0, 1)",
        ),
        (
            lambda run: run.prune(keep=2, sigma_range=(0.2, 0.1)),
            "sigma_range",
            "(0.2, 0.1): must be two numbers in",
        ),
        (lambda run: run.prune(max_error=0.1, keep=1), "keep and max_error", ": give one of them"),
        (lambda run: run.error_curve(t="x"), "t", "'x': must lie between"),
        (lambda run: run.plan([]), "sigma_rel", "at least one value is needed"),
        (
            lambda run: run.write([TARGETS["given"]] * 2, "out"),
            "out",
            "would both become out/given.safetensors",
        ),
        (
            lambda run: run.error_curve(others=Groups({"*": 0.1})),
            "target",
            "has a profile for each group",
        ),
    ],
)
def test_an_invalid_argument_is_refused(
    run: Run,
    call: Callable[[Run], object],
    subject: str,
    words: str,
) -> None:
    with refused(subject, words):
        call(run)
    assert len(run.snapshots) == 20


def test_curves_and_plans_are_what_the_commands_print(run: Run, ema: Ema) -> None:
    curve = run.error_curve((0.05, 0.28), others=Window(50)).to_dict()
    words = "--sigma-range 0.05:0.28 --target window:50 --json"
    printed = ema("error-plot", run.directory, *words.split()).json
    assert printed == {"curves": [curve]}
    plan = plan_training(1000, 100, 10_000).to_dict()
    words = "plan --steps 1000 --params 100 --disk 10kB --json"
    assert ema(*words.split()).json == json.loads(json.dumps(plan))


def test_every_call_reads_the_directory_anew(run: Run, tmp_path: Path) -> None:
    later = Run(tmp_path / "later")
    assert "later': no such directory" in repr(later)
    with pytest.raises(DirectoryError) as raised:
        later.t  # noqa: B018
    assert raised.value.subject == str(tmp_path / "later")
    run.directory.rename(tmp_path / "later")
    assert later.t == 100.0
    with pytest.raises(InvalidValueError, match="directory: is empty"):
        Run("")


def test_the_run_of_a_tracker_has_all_due_snapshots(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    with track(model, tmp_path / "run", checkpoint_every=5) as tracker:
        assert repr(tracker.run) == f"Run({str(tmp_path / 'run')!r}: no such directory)"
        update(tracker, model, 10)
        assert tracker.run.step == 10
        assert len(tracker.run.snapshots) == 4


def test_a_program_that_lets_numpy_raise_gets_averages(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    with track(model, tmp_path, checkpoint_every=50) as ema:
        for _ in range(500):
            model.weight.data += 0.01 * torch.randn(4, 4)
            ema.update_(model)
    for target in (0.01, "beta:0.9", "window:10"):
        with np.errstate(all="raise"):
            Run(tmp_path).average(target)
