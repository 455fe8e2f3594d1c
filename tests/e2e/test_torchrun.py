"""A synthesis by the ranks of a torchrun job, and its files after one of them was killed or has
failed."""

import json
import os
import time

import forked
import pytest
import torch
import torch.distributed as dist
from checking import assert_same_tensors, heavy, load_output, refused
from ema_command import environments_of_ranks
from factories import (
    INDEX,
    RUN_ID,
    flip_bit,
    snapshot_files,
    split_snapshot,
    write_snapshot,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from posthoc_cli import Run

WORLD = 3


@pytest.fixture
def run(tmp_path):
    for t in (10, 20):
        values = {}
        for k in range(1, 9):
            values[f"layer.{k}"] = torch.full((700, 500), float(t + k))
        for sigma_rel in (0.05, 0.28):
            fields = {"sigma_rels": (0.05, 0.28), "aliases": {"tied": "layer.3"}}
            write_snapshot(tmp_path / "run", t, sigma_rel, RUN_ID, values, **fields)
    return tmp_path / "run"


def arguments(run, out):
    return ["synthesize", str(run), "--sigma-rel", "0.1", "--out", str(out)]


LAUNCHER = f"""
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from posthoc_cli.cli import main

options = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
elastic_launch(LaunchConfig(1, 1, nproc_per_node={WORLD}, **options), main)()
"""
"""What `torchrun --standalone` does, but for the imports in each process."""


def test_torchrun_makes_the_same_tensors_as_one_process(run, tmp_path):
    """Also if some snapshots are folders of parts."""
    forked.check(forked.EMA, *arguments(run, tmp_path / "one.safetensors"))
    for path in snapshot_files(run)[::2]:
        split_snapshot(path, 3, {"layer.1": (1, 3)})
    done = forked.check(LAUNCHER, *arguments(run, tmp_path / "out"))
    assert done.out.startswith("made sigma_rel 0.1 (as decay 0.64) at t = 20 from 4 snapshots")
    assert len(done.out.splitlines()) == 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == WORLD
    assert_same_tensors(load_output(tmp_path / "out"), load_output(tmp_path / "one.safetensors"))


def start_ranks(code, *arguments):
    """The processes of a job without a launcher; `code` runs in each before the command."""
    ranks = []
    for environment in environments_of_ranks(WORLD):
        ranks.append(forked.Forked(code + forked.EMA, *arguments, env=environment))
    return ranks


LATE = forked.program("late_rank")
"""Files appear when the first rank has read the directory and before the second one does."""


@pytest.mark.parametrize("kind", ["snapshots", "checkpoints"])
def test_ranks_that_read_different_snapshots_read_again(run, tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("read")
    late = tmp_path / "late"
    late.mkdir()
    for path in run.glob("*20-*"):
        path.rename(late / path.name)
    if kind == "checkpoints":
        for path in [*run.iterdir(), *late.iterdir()]:
            save_file(load_file(path), path.with_name(f"step{path.name[:16]}.safetensors"))
            path.unlink()
        step_10 = run / "step0000000000000010.safetensors"
        save_file(load_file(step_10), run / "step0000000000000005.safetensors")
    ranks = start_ranks(LATE, *arguments(run, tmp_path / "out"))
    assert [process.wait() for process in ranks] == [0] * WORLD
    out, errors = ranks[0].communicate()
    assert "at t = 20 from" in out
    assert errors.count("reading again") == 1
    times = set()
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            times.add(json.loads(file.metadata()["ema"])["t"])
    assert times == {20.0}
    assert_same_tensors(load_output(tmp_path / "out"), Run(run).average(0.1))


@heavy
def test_when_the_first_rank_is_killed_the_others_end_and_leave_no_model(run, tmp_path):
    """Also without a launcher; the job can be run again."""
    out = tmp_path / "out"
    first, *others = start_ranks(forked.SLOW, *arguments(run, out))
    while len(list(tmp_path.glob(".ema-*.tmp/*"))) < WORLD:
        assert first.poll() is None
        time.sleep(0.01)
    first.kill()
    for process in others:
        assert process.wait() == 1
        _, errors = process.communicate()
        message = "another process of this job: failed or died"
        # after a warning of the predicted error
        assert errors.endswith(f"ema: error: {message}\n")
    assert not out.exists()
    for process in start_ranks("", *arguments(run, out)):
        assert process.wait() == 0
    assert (out / INDEX).exists()


@heavy
def test_an_error_in_one_rank_is_named_by_all(run, tmp_path):
    shard = next(run.iterdir())
    flip_bit(shard)  # of the last tensor, which one rank reads
    messages = ""
    for process in start_ranks("", *arguments(run, tmp_path / "out")):
        assert process.wait() == 1
        _, errors = process.communicate()
        assert shard.name in errors
        assert "layer.8" in errors
        messages += errors
    assert messages.count("error: rank ") == WORLD - 1
    assert not (tmp_path / "out").exists()


def test_a_job_makes_a_folder_of_shards(run, tmp_path):
    path = tmp_path / "m.safetensors"
    with refused(f"out {path}"):
        Run(run).write(0.1, path, distributed=True)


@heavy
def test_a_job_of_one_process_that_has_a_group_makes_the_same_tensors(run, tmp_path):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        Run(run).write(0.1, tmp_path / "out", distributed=True)
    finally:
        dist.destroy_process_group()
    made = load_output(tmp_path / "out")
    assert_same_tensors(made, Run(run).average(0.1))
