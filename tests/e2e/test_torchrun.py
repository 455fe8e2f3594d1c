"""A synthesis by the processes of a torchrun job, and what is left when one of them is killed or fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch
from ema_command import unmeasured_environment
from factories import RUN_ID, write_snapshot
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
INDEX = "model.safetensors.index.json"
WORLD = 3

SLOW = """
import os, sys, time
if "RANK" in os.environ:
    from posthoc_cli.export import ranks
    from posthoc_cli.synthesis import engine
    make = engine.Maker.make
    def slowly(self, *arguments):
        time.sleep(1.0)
        make(self, *arguments)
    engine.Maker.make = slowly
    ranks.PATIENCE = 3.0
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


def environment(*paths: Path) -> dict[str, str]:
    return {**unmeasured_environment(), "PYTHONPATH": os.pathsep.join(map(str, (*paths, ROOT)))}


def arguments(run: Path, out: Path) -> list[str]:
    return ["synthesize", str(run), "--sigma-rel", "0.1", "--out", str(out)]


def torchrun(*arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLD}"]
    return [*launcher, "-m", "posthoc_cli", *arguments]


def wait_for_work(out: Path, process: subprocess.Popen[str] | forked.Forked) -> None:
    while len(list(out.glob(".ema-*.tmp"))) < WORLD:
        assert process.poll() is None
        time.sleep(0.01)


def test_torchrun_makes_the_same_tensors_as_one_process(run: Path, tmp_path: Path) -> None:
    job = torchrun(*arguments(run, tmp_path / "out"))
    done = subprocess.run(job, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote the index") == 1
    assert len(done.stdout.splitlines()) == 1
    forked.check(forked.EMA, *arguments(run, tmp_path / "one.safetensors"))
    expected = load_file(tmp_path / "one.safetensors")
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) == WORLD
    found = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert (tmp_path / "out" / INDEX).exists()
    refused = start_ranks("", *arguments(run, tmp_path / "two.safetensors"))
    for process in refused:
        _, errors = process.communicate()
        assert process.returncode == 2
        assert "makes a folder of shards" in errors


def children(process: subprocess.Popen[str]) -> dict[int, int]:
    """The process of each rank of a job."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError):
            continue
        ranks = [int(v[5:]) for v in variables if v.startswith(b"RANK=")]
        if parent == process.pid and ranks:
            found[ranks[0]] = int(path.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_killed_rank_of_torchrun_is_named_and_leaves_no_model(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW)
    job, own = torchrun(*arguments(run, out)), environment(tmp_path / "slow")
    with subprocess.Popen(job, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_work(out, process)
        os.kill(children(process)[1], signal.SIGKILL)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "ema: error: rank 1: has died" in errors
    assert "wrote" not in printed
    assert not (out / INDEX).exists()
    again = start_ranks("", *arguments(run, out))
    ended = [process.communicate() for process in again]
    assert [process.returncode for process in again] == [0] * WORLD, ended
    assert (out / INDEX).exists()


def start_ranks(code: str, *arguments: str) -> list[forked.Forked]:
    """The processes of a job that nobody watches; `code` runs in each before the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(WORLD)}
    return [
        forked.Forked(code + forked.EMA, *arguments, env={**environment(), **meeting, "RANK": str(rank)})
        for rank in range(WORLD)
    ]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_is_named_by_the_others_where_no_launcher_watches(run: Path, tmp_path: Path, victim: int) -> None:
    out = tmp_path / "out"
    processes = start_ranks(SLOW, *arguments(run, out))
    wait_for_work(out, processes[0])
    processes[victim].kill()
    for rank, process in enumerate(processes):
        _, errors = process.communicate(timeout=60)
        if rank != victim:
            assert process.returncode == 1
            assert f"ema: error: rank {victim}" in errors
            assert "has died" in errors
    assert not (out / INDEX).exists()


def test_an_error_in_one_rank_is_named_by_all(run: Path, tmp_path: Path) -> None:
    shard = next(run.iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1  # of the last tensor, which one rank reads
    shard.write_bytes(data)
    processes = start_ranks(SLOW, *arguments(run, tmp_path / "out"))
    ended = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1] * WORLD
    assert all(shard.name in errors and "layer.8" in errors for errors in ended), ended
    assert sum("failed: " in errors for errors in ended) == WORLD - 1
    assert not (tmp_path / "out" / INDEX).exists()


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_the_first_byte(run: Path, tmp_path: Path) -> None:
    """9 tensors of 1.4 MB: there is room for any process's part, but not for all."""
    processes = start_ranks(FULL, *arguments(run, tmp_path / "out"))
    ended = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [1] * WORLD
    assert all("the 3 outputs take 12,600,000 bytes, and 10,000,000 are free" in errors for errors in ended), ended
    assert not (tmp_path / "out").exists()
