"""A synthesis by the ranks of a torchrun job, and its files after one of them was killed or has failed."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from checking import assert_same_tensors, load_output
from ema_command import unmeasured_environment
from factories import RUN_ID, flip_bit, snapshot_files, split_snapshot, write_snapshot

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"
WORLD = 3

SLOW = """
import time
from posthoc_cli.synthesis import engine
make = engine.Maker.make
engine.Maker.make = lambda *arguments: (time.sleep(1.0), make(*arguments))
"""
"""Runs before the command: every tile takes a second."""

FULL = "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=10_000_000)\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for t in (10, 20):
        for sigma_rel in (0.05, 0.28):
            values = {f"layer.{k}": torch.full((700, 500), float(t + k)) for k in range(9)}
            write_snapshot(tmp_path / "run", t, sigma_rel, RUN_ID, values, sigma_rels=(0.05, 0.28))
    return tmp_path / "run"


def arguments(run: Path, out: Path) -> list[str]:
    return ["synthesize", str(run), "--sigma-rel", "0.1", "--out", str(out)]


def environment() -> dict[str, str]:
    return {**unmeasured_environment(), "PYTHONPATH": str(ROOT)}


def test_torchrun_makes_the_same_tensors_as_one_process(run: Path, tmp_path: Path) -> None:
    """Also if some snapshots are folders of parts."""
    forked.check(forked.EMA, *arguments(run, tmp_path / "one.safetensors"))
    for path in snapshot_files(run)[::2]:
        split_snapshot(path, 3, {"layer.1": (1, 3)})
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    job = [*launcher, "-m", "posthoc_cli", *arguments(run, tmp_path / "out")]
    done = subprocess.run(job, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("made sigma_rel 0.1 at t = 20 from 4 snapshots")
    assert len(done.stdout.splitlines()) == 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == WORLD
    assert (tmp_path / "out" / INDEX).exists()
    assert_same_tensors(load_output(tmp_path / "out"), load_output(tmp_path / "one.safetensors"))


def start_ranks(code: str, *arguments: str) -> list[forked.Forked]:
    """The processes of a job without a launcher; `code` runs in each before the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(WORLD)}
    return [
        forked.Forked(code + forked.EMA, *arguments, env={**environment(), **meeting, "RANK": str(rank)})
        for rank in range(WORLD)
    ]


def ended(code: str, *arguments: str) -> list[tuple[int, str]]:
    """The exit code and the messages of each process of such a job."""
    processes = start_ranks(code, *arguments)
    return [(process.wait(120), process.communicate()[1]) for process in processes]


def test_when_the_first_rank_is_killed_the_others_end_and_leave_no_model(run: Path, tmp_path: Path) -> None:
    """Also without a launcher; the job can be run again."""
    out = tmp_path / "out"
    processes = start_ranks(SLOW, *arguments(run, out))
    while len(list(tmp_path.glob(".ema-*.tmp/*"))) < WORLD:
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[0].kill()
    processes[0].wait()
    for process in processes[1:]:
        *_, line = process.communicate(timeout=60)[1].splitlines()  # after a warning of the predicted error
        assert line == "ema: error: another process of this job: failed or died; nothing was finished"
        assert process.returncode == 1
    assert not out.exists()
    again = ended("", *arguments(run, out))
    assert [code for code, _ in again] == [0] * WORLD, again
    assert (out / INDEX).exists()


def test_an_error_in_one_rank_is_named_by_all(run: Path, tmp_path: Path) -> None:
    shard = next(run.iterdir())
    flip_bit(shard)  # of the last tensor, which one rank reads
    found = ended(SLOW, *arguments(run, tmp_path / "out"))
    assert all(code == 1 and shard.name in errors and "layer.8" in errors for code, errors in found), found
    assert sum("failed: " in errors for _, errors in found) == WORLD - 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_the_first_byte(run: Path, tmp_path: Path) -> None:
    """9 tensors of 1.4 MB: there is room for any process's part, but not for all."""
    message = "the output takes 12,600,000 bytes, and 10,000,000 are free"
    found = ended(FULL, *arguments(run, tmp_path / "out"))
    assert all(code == 1 and message in errors for code, errors in found), found
    assert not (tmp_path / "out").exists()
