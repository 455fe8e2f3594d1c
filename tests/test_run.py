"""`Run`: what the command line does, as calls on an object."""

import inspect
import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused
from factories import Span, random_walk, write_run
from safetensors.torch import load_file
from tracker.runs import track, update

from posthoc_cli import Beta, CurveRequest, PowerFunction, Request, Run, Window
from posthoc_cli.errors import DirectoryError, OutputExistsError
from posthoc_cli.request import OutputRequest, SweepRequest
from posthoc_cli.targets import GivenProfile

GIVEN = PowerFunction.from_sigma_rel(0.15, 100.0)


@pytest.fixture
def run(tmp_path):
    shapes = {
        "w": (5, 3),
        "b": (3,),
    }
    walk = random_walk(100, shapes)
    write_run(tmp_path / "run", walk, range(10, 101, 10))
    return Run(tmp_path / "run")


def test_a_run_describes_its_snapshots(run):
    assert run.t == 100.0
    assert run.step == 100
    assert run.profiles == [0.05, 0.28]
    assert {name: (entry.dtype, entry.shape) for name, entry in run.tensors.items()} == {
        "w": ("F32", (5, 3)),
        "b": ("F32", (3,)),
    }
    assert repr(run) == f"Run({str(run.directory)!r}: 20 snapshots of 0.05, 0.28 up to 100 steps)"
    _, long = run.info()["profiles"]
    assert long["times"] == [*range(10, 101, 10)]


def test_reading_headers_needs_neither_torch_nor_scipy(run):
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


@pytest.mark.parametrize(
    "target",
    [
        Beta(0.9),
        GivenProfile(Span(20, 80), "span"),
        GIVEN,
    ],
)
def test_an_average_equals_that_in_a_file(run, tmp_path, target):
    out = tmp_path / "a.safetensors"
    weights = run.average(target, dtype="float64")
    report = run.write(target, out, dtype="float64")
    (made,) = report.to_dict()["targets"]
    assert_same_tensors(load_file(out), weights)
    assert made["predicted_error"] == weights.predicted_error
    assert made["profile_error"] == weights.profile_error


def test_an_average_of_another_time_and_dtype(run):
    weights = run.average(0.1, step=50, dtype=torch.bfloat16)
    assert weights["w"].dtype == torch.bfloat16
    assert_same_tensors(run.average(0.1, t=50, dtype="bfloat16"), weights)


def test_one_average_is_made_at_a_time(run):
    with refused("target [0.1, 0.2]"):
        run.average([0.1, 0.2])


def test_writing_several_averages_returns_what_the_command_prints(run, ema, tmp_path):
    report = run.write([0.1, Beta(0.9)], tmp_path / "new", max_error=0.9)
    names = [path.name for path in report.outputs]
    assert names == ["sigma_rel-0.1.safetensors", "decay-0.9.safetensors"]
    with pytest.raises(FrozenInstanceError):
        report.seconds = 0.0
    words = ["--sigma-rel", "0.1", "--decay", "0.9", "--overwrite", "--json"]
    printed = ema("synthesize", run.directory, *words, "--out", tmp_path / "new").json
    expected = json.loads(json.dumps(report.to_dict()))
    for target in (*printed["targets"], *expected["targets"]):
        del target["seconds"]
    assert printed == expected | {"warnings": []}


def test_an_average_that_may_not_be_written_leaves_nothing(run, tmp_path):
    out = tmp_path / "new.safetensors"
    with pytest.raises(TypeError, match="'force'"):
        run.write(0.1, out, force=True)
    with refused("out", "out/given.safetensors"):
        run.write([GIVEN, GIVEN], "out")
    assert not out.exists()
    out.touch()
    with refused(out, "`overwrite`", kind=OutputExistsError):
        run.write(0.1, out)


def test_an_invalid_argument_is_refused(run):
    with refused("t 'x'"):
        run.error_curve(t="x")
    with refused("sigma_rel"):
        run.plan([])


@pytest.mark.parametrize(
    ("method", "request_class"),
    [
        (Run.plan, Request),
        (Run.write, OutputRequest),
        (Run.sweep, SweepRequest),
        (Run.error_curve, CurveRequest),
    ],
)
def test_help_describes_the_arguments_of_a_request(method, request_class):
    described = inspect.getdoc(method)
    for name in request_class.__annotations__:
        assert name == "_" or re.search(rf"\b{name}\b.*: ", described), name


def test_curves_are_what_the_command_prints(run, ema):
    curve = run.error_curve((0.05, 0.28), others=Window(50)).to_dict()
    words = "--sigma-range 0.05:0.28 --target window:50 --json"
    printed = ema("error-plot", run.directory, *words.split()).json
    assert printed == {"curves": [curve], "findings": [], "warnings": []}


def test_a_further_target_of_a_curve_has_the_width_that_was_asked_for(run):
    """It is computed from a gamma, and so are the tracked ones."""
    asked = (0.05, 0.021, 0.017, 0.2886)
    curve = run.error_curve(others=asked)
    assert [other.sigma_rel for other in curve.others] == [*asked]
    assert curve.tracked == (0.05, 0.28)


def test_every_call_reads_the_directory_anew(run, tmp_path):
    later = Run(tmp_path / "later")
    assert "later': " in repr(later)
    with refused(str(later.directory), kind=DirectoryError):
        later.t  # noqa: B018
    run.directory.rename(later.directory)
    assert later.t == 100.0


def test_a_directory_is_a_path():
    with refused("directory None"):
        Run(None)
    with refused("directory"):
        Run("")


def test_the_run_of_a_tracker_has_all_due_snapshots(tmp_path):
    model = torch.nn.Linear(3, 2)
    with track(model, tmp_path / "run", checkpoint_every=5) as tracker:
        update(tracker, model, 10)
        assert tracker.run.step == 10
        assert len(tracker.run.snapshots) == 4


def test_a_program_that_lets_numpy_raise_gets_averages(run):
    with np.errstate(all="raise"):
        run.average(0.01)
