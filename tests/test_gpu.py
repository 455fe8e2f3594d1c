"""`make gpu`: its parts on the CPU, and without a device or plug-ins of pytest."""

import math
import os
import subprocess
import sys

import gpu
import torch
from checking import heavy

CPU = torch.device("cpu")


def run_python(*arguments, **variables):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=gpu.ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@heavy
def test_without_a_device_one_line_says_so_and_nothing_is_run():
    done = run_python("scripts/gpu.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "gpu: no CUDA device is here, so nothing was run\n"


def test_every_row_of_the_table_is_measured():
    rows = [*gpu.measure(CPU, 300_000, 3, repeats=2, until=math.inf)]
    labels = [row.label for row in rows]
    if gpu.is_installed("ema_pytorch"):
        assert "3 tensors of 64 x 64: update of `ema_pytorch`" in labels
    assert len({*labels}) == len(labels)
    for row in rows:
        assert row.host > 0
        assert row.stream is None  # the CPU has none
    for part in (
        '0.3 M parameters in 150 tensors, device="model": update',
        '3 tensors of 64 x 64, device="cpu": update with two snapshots due',
        '3 tensors of 64 x 64, device="cpu": averages swapped in',
        "one average of 20 snapshots, made on cpu",
    ):
        assert part in labels
    assert gpu.table(rows).count("\n") == len(rows) + 2


def test_no_row_begins_when_the_time_is_over():
    assert [*gpu.measure(CPU, 300_000, 3, repeats=2, until=0.0)] == []


def test_a_program_that_takes_too_long_is_stopped(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PART_LIMIT", 0.2)
    assert gpu.run_program(["-c", "import time; time.sleep(60)"]) is None
    assert capsys.readouterr().out == "stopped after 0 s\n"


@heavy
def test_tests_for_a_device_are_found_without_plug_ins(tmp_path):
    absent = {"pytest_timeout", "pytest_randomly", "xdist", "pytest_cov", "hypothesis"}
    absent |= {"ema_pytorch", "posthoc_ema", "torch_ema", "flint", "sklearn"}
    # None in the place of a module means that it does not exist
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}))"
    )
    done = run_python(
        *gpu.cuda_tests(),
        "--collect-only",
        PYTHONPATH=f"{tmp_path}{os.pathsep}{gpu.ROOT}",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
        PYTEST_ADDOPTS="",  # which may have options of absent plug-ins
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_engine.py" in done.stdout
    assert "test_sharding.py" in done.stdout
    assert "error" not in done.stdout
