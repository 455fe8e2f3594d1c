"""The checks on the simulated accelerator, in processes of their own: torch knows the device in the
whole process."""

import os
import subprocess
import sys
from pathlib import Path

import gpu
import pytest
from accelerator import simulator
from checking import heavy

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
REASON = simulator.missing()

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def run_checks(*arguments):
    """Run pytest with the simulated device."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:xdist", *arguments],
        cwd=ROOT,
        env=os.environ | {"EMA_DEVICE": "sim", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]
    return done.stdout


SCENARIOS = HERE / "check_tracker.py"
MUTATIONS = HERE / "check_mutations.py"
OTHERS = sorted({*HERE.glob("check_*.py")} - {SCENARIOS, MUTATIONS})


@pytest.mark.parametrize(
    "paths",
    [
        pytest.param([SCENARIOS], id="tracker"),
        pytest.param([MUTATIONS], id="mutations", marks=heavy),
        pytest.param(OTHERS, id="others"),
    ],
)
def test_checks_on_the_simulated_accelerator(paths):
    assert " passed" in run_checks(*map(str, paths))


def test_tests_for_cuda_devices_pass_on_the_simulated_one():
    files = [argument for argument in gpu.cuda_tests() if argument.endswith(".py")]
    done = run_checks("-m", "cuda", *files)
    assert "skipped" in done  # those with CUDA graphs and NCCL
