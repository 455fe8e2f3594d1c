"""A synthesis by the ranks of a torchrun job, and its files after one of them was killed or has
failed."""

import errno
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch.distributed as dist
from checking import assert_same_tensors, load_output
from ema_command import unmeasured_environment
from factories import (
    INDEX,
    RUN_ID,
    contents,
    flip_bit,
    snapshot_files,
    split_snapshot,
    write_snapshot,
)
from safetensors.torch import load_file
from snapshots.recorded import failing

from posthoc_cli import Run
from posthoc_cli.errors import InvalidValueError, WriteError

ROOT = Path(__file__).resolve().parents[2]
WORLD = 3


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for t in (10, 20):
        values = {f"layer.{k}": torch.full((700, 500), float(t + k)) for k in range(9)}
        for sigma_rel in (0.05, 0.28):
            write_snapshot(tmp_path / "run", t, sigma_rel, RUN_ID, values, sigma_rels=(0.05, 0.28))
    return tmp_path / "run"


def arguments(run: Path, out: Path) -> list[str]:
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
    assert done.out.startswith("made sigma_rel 0.1 at t = 20 from 4 snapshots")
    assert len(done.out.splitlines()) == 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == WORLD
    assert_same_tensors(load_output(tmp_path / "out"), load_output(tmp_path / "one.safetensors"))


def start_ranks(code: str, *arguments: str) -> list[forked.Forked]:
    """The processes of a job without a launcher; `code` runs in each before the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        _, port = free.getsockname()
    ranks = []
    for rank in range(WORLD):
        own = unmeasured_environment() | {
            "PYTHONPATH": str(ROOT),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(WORLD),
            "RANK": str(rank),
        }
        ranks.append(forked.Forked(code + forked.EMA, *arguments, env=own))
    return ranks


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
        message = "another process of this job: failed or died; nothing was finished"
        # after a warning of the predicted error
        assert errors.endswith(f"ema: error: {message}\n")
    assert not out.exists()
    for process in start_ranks("", *arguments(run, out)):
        assert process.wait() == 0
    assert (out / INDEX).exists()


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
    assert messages.count("failed: ") == WORLD - 1
    assert not (tmp_path / "out").exists()


# --- shards by the ranks of a job, which here is one process: the same bytes as in one file,
# complete or absent


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    values = {
        "embed": torch.randn(300, 40),
        "a/../b": torch.randn(7),
        "ü 'quoted'": torch.randn(3, 5),
        "none": torch.randn(0, 4),
        "one": torch.randn(()),
        "half": torch.randn(90, 9).half(),
        "count": torch.tensor(7),
    }
    for t in (10, 20, 30):
        tensors = {name: t * value for name, value in values.items()}
        write_snapshot(tmp_path / "run", t, 0.05, RUN_ID, tensors, aliases={"tied": "embed"})
    return tmp_path / "run"


@pytest.fixture(autouse=True)
def _only_rank() -> Iterator[None]:
    """This process is the only rank of a job."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(run: Path, out: Path, target: float = 0.1, **options: Any) -> Any:
    return Run(run).write(target, out, distributed=True, **options)


@pytest.mark.parametrize("size", ["10", "20KB", "1GB"])
def test_any_number_of_shards_gives_the_bytes_of_one_file(small_run, tmp_path, size):
    file = tmp_path / "one.safetensors"
    Run(small_run).write(0.1, file)
    write(small_run, tmp_path / "out", max_shard_size=size)
    assert_same_tensors(load_output(tmp_path / "out"), load_file(file))


@pytest.mark.parametrize(
    ("operation", "exists"),
    [
        ("fsync", False),
        ("rename", True),
    ],
)
def test_a_failure_leaves_what_was_there(small_run, tmp_path, operation, exists):
    out = tmp_path / "out"
    if exists:
        write(small_run, out)
    before = contents(tmp_path)
    full = failing(operation, errno.ENOSPC)
    with full, pytest.raises(WriteError, match=f"{out}.*no space left"):
        write(small_run, out, 0.2, overwrite=True)
    assert contents(tmp_path) == before
    assert not [*tmp_path.glob(".ema-*.tmp")]


@pytest.mark.parametrize(
    ("out", "layout"),
    [
        ("m.safetensors", None),
        ("m", "dcp"),
    ],
)
def test_a_job_makes_a_folder_of_shards(small_run, tmp_path, out, layout):
    message = "makes a folder of shards; name a folder; an export makes one file"
    with pytest.raises(InvalidValueError, match=message):
        write(small_run, tmp_path / out, layout=layout)


def test_a_dry_run_of_a_job_writes_nothing(small_run, tmp_path):
    report = write(small_run, tmp_path / "m", dry_run=True)
    assert report.outputs == ()
    assert not (tmp_path / "m").exists()
