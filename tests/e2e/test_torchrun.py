"""A synthesis by the ranks of a torchrun job, and its files after one of them was killed or has
failed."""

import errno
import shutil
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

SLOW = """
import time
from posthoc_cli.synthesis import engine
make = engine.Maker.make
engine.Maker.make = lambda *arguments: (time.sleep(0.5), make(*arguments))
"""
"""Runs before the command: every tile takes half a second."""

FULL = (
    "import shutil, types\nshutil.disk_usage = lambda _: types.SimpleNamespace(free=20_000_000)\n"
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for t in (10, 20):
        values = {f"layer.{k}": torch.full((700, 500), float(t + k)) for k in range(9)}
        for sigma_rel in (0.05, 0.28):
            write_snapshot(tmp_path / "run", t, sigma_rel, RUN_ID, values, sigma_rels=(0.05, 0.28))
    return tmp_path / "run"


def arguments(run: Path, out: Path) -> list[str]:
    return ["synthesize", str(run), "--sigma-rel", "0.1", "--out", str(out)]


def environment() -> dict[str, str]:
    return {**unmeasured_environment(), "PYTHONPATH": str(ROOT)}


LAUNCHER = f"""
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from posthoc_cli.cli import main

options = dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", start_method="fork")
elastic_launch(LaunchConfig(1, 1, nproc_per_node={WORLD}, **options), main)()
"""
"""What `torchrun --standalone` does, but for the imports in each process."""


def test_torchrun_makes_the_same_tensors_as_one_process(run: Path, tmp_path: Path) -> None:
    """Also if some snapshots are folders of parts."""
    forked.check(forked.EMA, *arguments(run, tmp_path / "one.safetensors"))
    for path in snapshot_files(run)[::2]:
        split_snapshot(path, 3, {"layer.1": (1, 3)})
    done = forked.check(LAUNCHER, *arguments(run, tmp_path / "out"))
    assert done.out.startswith("made sigma_rel 0.1 at t = 20 from 4 snapshots")
    assert len(done.out.splitlines()) == 1
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == WORLD
    assert (tmp_path / "out" / INDEX).exists()
    assert_same_tensors(load_output(tmp_path / "out"), load_output(tmp_path / "one.safetensors"))


def start_ranks(code: str, *arguments: str) -> list[forked.Forked]:
    """The processes of a job without a launcher; `code` runs in each before the command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free.getsockname()[1]),
            "WORLD_SIZE": str(WORLD),
        }
    ranks = []
    for rank in range(WORLD):
        own = environment() | meeting | {"RANK": str(rank)}
        ranks.append(forked.Forked(code + forked.EMA, *arguments, env=own))
    return ranks


def ended(code: str, *arguments: str) -> list[tuple[int, str]]:
    """The exit code and the messages of each process of such a job."""
    processes = start_ranks(code, *arguments)
    return [(process.wait(120), process.communicate()[1]) for process in processes]


def test_when_the_first_rank_is_killed_the_others_end_and_leave_no_model(
    run: Path,
    tmp_path: Path,
) -> None:
    """Also without a launcher; the job can be run again."""
    out = tmp_path / "out"
    processes = start_ranks(SLOW, *arguments(run, out))
    while len(list(tmp_path.glob(".ema-*.tmp/*"))) < WORLD:
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[0].kill()
    processes[0].wait()
    for process in processes[1:]:
        _, errors = process.communicate(timeout=60)
        message = "another process of this job: failed or died; nothing was finished"
        # after a warning of the predicted error
        assert errors.endswith(f"ema: error: {message}\n")
        assert process.returncode == 1
    assert not out.exists()
    for code, errors in ended("", *arguments(run, out)):
        assert code == 0, errors
    assert (out / INDEX).exists()


def test_an_error_in_one_rank_is_named_by_all(run: Path, tmp_path: Path) -> None:
    shard = next(run.iterdir())
    flip_bit(shard)  # of the last tensor, which one rank reads
    found = ended("", *arguments(run, tmp_path / "out"))
    for code, errors in found:
        assert code == 1
        assert shard.name in errors
        assert "layer.8" in errors
    assert sum("failed: " in errors for _, errors in found) == WORLD - 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_on_the_disk_is_refused_before_the_first_byte(
    run: Path,
    tmp_path: Path,
) -> None:
    """9 tensors of 1.4 MB: there is room for one average, but not for two."""
    message = "the output takes 25,200,000 bytes, and 20,000,000 are free"
    for code, errors in ended(FULL, *arguments(run, tmp_path / "out"), "--target", "window:5"):
        assert code == 1
        assert message in errors
    assert not (tmp_path / "out").exists()


# --- shards by the ranks of a job, which here is one process: the same bytes as in one file,
# complete or absent

SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (300, 40),
    "a/../b": (7,),
    "ü 'quoted'": (3, 5),
    "none": (0, 4),
    "one": (),
    **{f"layer.{i}.weight": (40, 50) for i in range(4)},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "run"
    torch.manual_seed(0)
    for t in (10, 20, 30):
        for sigma_rel in (0.05, 0.28):
            values = {name: torch.randn(shape) for name, shape in SHAPES.items()}
            values["half"] = torch.randn(90, 9).half()
            values["count"] = torch.tensor(t)
            tracked = {"sigma_rels": (0.05, 0.28), "aliases": {"tied": "embed"}}
            write_snapshot(folder, t, sigma_rel, RUN_ID, values, **tracked)
    return folder


@pytest.fixture
def own_run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _only_rank() -> Iterator[None]:
    """This process is the only rank of a job."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(own_run: Path, out: Path, target: Any = 0.1, size: int = 20_000, **options: Any) -> None:
    """Write shards, four by default, of a model of 80 kB in float32."""
    Run(own_run).write(target, out, distributed=True, max_shard_size=size, **options)


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (10, None),
        (20_000, "bfloat16"),
        (10**9, None),
    ],
)
def test_any_number_of_shards_gives_the_bytes_of_one_file(
    own_run: Path,
    tmp_path: Path,
    size: int,
    dtype: str | None,
) -> None:
    write(own_run, tmp_path / "out", [0.1, 0.2], size, dtype=dtype)
    for target in (0.1, 0.2):
        folder = tmp_path / "out" / f"sigma_rel-{target}"
        file = tmp_path / f"{target}.safetensors"
        Run(own_run).write(target, file, dtype=dtype)
        within = 0.01 if dtype else 0.0
        torch.testing.assert_close(load_output(folder), load_file(file), rtol=within, atol=1e-6)
        names = {path.name for path in folder.glob("model-*")} | {INDEX}
        if size == 10**9:
            names = {"model.safetensors"}
        assert contents(folder).keys() == names
    write(own_run, tmp_path / "one", 0.1, size, dtype=dtype)
    assert_same_tensors(load_output(tmp_path / "one"), load_file(tmp_path / "0.1.safetensors"))


@pytest.mark.parametrize(
    ("operation", "exists"),
    [
        ("fsync", False),
        ("rename", True),
    ],
)
def test_a_failure_leaves_what_was_there(
    own_run: Path,
    tmp_path: Path,
    operation: str,
    exists: bool,
) -> None:
    out = tmp_path / "out"
    if exists:
        write(own_run, out)
    before = contents(tmp_path)
    refused = pytest.raises(WriteError, match=f"{out}.*no space left")
    with failing(operation, errno.ENOSPC), refused:
        write(own_run, out, 0.2, overwrite=True)
    assert contents(tmp_path) == before
    assert not [*tmp_path.glob(".ema-*.tmp")]


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("m.safetensors", {}),
        ("m", {"layout": "dcp"}),
    ],
)
def test_a_job_makes_a_folder_of_shards(
    own_run: Path,
    tmp_path: Path,
    out: str,
    options: dict[str, Any],
) -> None:
    message = "makes a folder of shards; name a folder; an export makes one file"
    with pytest.raises(InvalidValueError, match=message):
        Run(own_run).write(0.1, tmp_path / out, distributed=True, **options)
    report = Run(own_run).write(0.1, tmp_path / "m", distributed=True, dry_run=True)
    assert report is not None
    assert report.outputs == ()
    assert not (tmp_path / "m").exists()
