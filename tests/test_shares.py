"""Shards by the ranks of a job, which here is one process: the same bytes as in one file, complete or absent."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checking import assert_same_tensors, load_output
from factories import RUN_ID, contents, write_snapshot
from safetensors.torch import load_file
from snapshots.recorded import failing

from posthoc_cli import Run, files
from posthoc_cli.errors import InvalidValueError, WriteError

INDEX_NAME = "model.safetensors.index.json"
SHAPES: dict[str, tuple[int, ...]] = {
    "embed": (300, 40), "a/../b": (7,), "ü 'quoted'": (3, 5), "none": (0, 4), "one": (),
    **{f"layer.{i}.weight": (40, 50) for i in range(12)}, **{f"layer.{i}.bias": (50,) for i in range(12)},
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "run"
    for t in (10, 20, 30):
        for sigma_rel in (0.05, 0.28):
            generator = torch.Generator().manual_seed(t + round(100 * sigma_rel))
            values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
            values["half"] = torch.randn(90, 9, generator=generator).half()
            values["count"] = torch.tensor(t)
            tracked = {"sigma_rels": (0.05, 0.28), "aliases": {"tied": "embed"}}
            write_snapshot(folder, t, sigma_rel, RUN_ID, values, **tracked)
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """This process is the only rank of a job."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def write(run: Path, out: Path, target: Any = 0.1, size: int = 60_000, **options: Any) -> None:
    """Write shards, four by default, of a model of 200 kB in float32."""
    Run(run).write(target, out, distributed=True, max_shard_size=size, **options)


@pytest.mark.parametrize(("size", "dtype"), [(10, None), (60_000, "bfloat16"), (10**9, None)])
def test_any_number_of_shards_gives_the_bytes_of_one_file(
    run: Path, tmp_path: Path, size: int, dtype: str | None
) -> None:
    write(run, tmp_path / "out", [0.1, 0.2], size, dtype=dtype)
    for target in (0.1, 0.2):
        folder, file = tmp_path / "out" / f"sigma_rel-{target}", tmp_path / f"{target}.safetensors"
        Run(run).write(target, file, dtype=dtype)
        torch.testing.assert_close(load_output(folder), load_file(file), rtol=0.01 * bool(dtype), atol=1e-6)
        shards = [path.name for path in folder.glob("model-*")]
        assert {*contents(folder)} == ({*shards, INDEX_NAME} if shards else {"model.safetensors"})
    write(run, tmp_path / "one", 0.1, size, dtype=dtype)
    assert_same_tensors(load_output(tmp_path / "one"), load_file(tmp_path / "0.1.safetensors"))


@pytest.mark.parametrize(("operation", "exists"), [("fsync", False), ("link", False), ("rename", True)])
def test_a_failure_leaves_what_was_there(run: Path, tmp_path: Path, operation: str, exists: bool) -> None:
    out = tmp_path / "out"
    if exists:
        write(run, out)
    before = contents(out) if exists else {}
    with failing(operation, errno.ENOSPC), pytest.raises(WriteError, match=f"{out}.*no space left"):
        write(run, out, 0.2, overwrite=True)
    assert (contents(out) if out.exists() else {}) == before
    assert not files.leftovers(tmp_path)


@pytest.mark.parametrize(
    ("out", "options"), [("m.safetensors", {}), ("m.pt", {}), ("m", {"layout": "pt"}), ("m", {"layout": "dcp"})]
)
def test_a_job_makes_a_folder_of_shards(run: Path, tmp_path: Path, out: str, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match="makes a folder of shards; name a folder; an export makes one file"):
        Run(run).write(0.1, tmp_path / out, distributed=True, **options)
    report = Run(run).write(0.1, tmp_path / "m", distributed=True, dry_run=True)
    assert report is not None
    assert report.outputs == ()
    assert not (tmp_path / "m").exists()
