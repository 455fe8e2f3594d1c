"""What interrupted writes left is removed by the next writer, and nothing in another directory is."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from factories import contents, flip_bit, snapshot_files
from snapshots.recorded import Walk

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.export.convert import export_file
from posthoc_cli.snapshots.verify import verify


def leave(path: Path, age: float) -> Path:
    path.write_text("half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def resumed(run: Path) -> None:
    walk = Walk()
    with PostHocEMA.from_path(run, walk.model, step=60) as tracker:
        walk.train(tracker, 10)


def pruned(run: Path) -> None:
    Run(run).prune(keep=5)


@pytest.mark.parametrize("writer", [resumed, pruned])
def test_the_next_writer_removes_leftovers_that_no_longer_change(
    run: Path, tmp_path: Path, writer: Callable[[Path], None]
) -> None:
    old, young = leave(run / ".ema-1.tmp", 120), leave(run / ".ema-2.tmp", 5)
    ahead = leave(run / ".ema-3.tmp", -3600)  # another host's clock is fast
    (tmp_path / "precious").write_text("x")
    (run / ".ema-4.tmp").symlink_to(tmp_path / "precious")
    folders = {name: run / f".ema-{name}.tmp" for name in ("5", "import", "growing")}
    for folder in folders.values():
        folder.mkdir()
    leave(folders["import"] / "0000000000000020-weights.safetensors", 120)
    leave(folders["growing"] / ".ema-6.tmp", 5)
    for name in (".ema-4.tmp", *(folder.name for folder in folders.values())):
        os.utime(run / name, (0, 0), follow_symlinks=False)
    (run / ".ema-not-ours").write_text("x")
    assert len(verify(run).leftovers) == 7
    writer(run)
    assert set(verify(run).leftovers) == {young, ahead, folders["growing"]}
    assert not any(os.path.lexists(path) for path in (old, run / ".ema-4.tmp", folders["5"], folders["import"]))
    assert (tmp_path / "precious").exists()
    assert (run / ".ema-not-ours").exists()


def test_outputs_remove_leftovers_an_hour_old(run: Path, tmp_path: Path) -> None:
    old, young = tmp_path / ".ema-1.tmp", leave(tmp_path / ".ema-2.tmp", 3000)
    writers = (
        lambda: Run(run).write(0.15, tmp_path / "m.safetensors"),
        lambda: Run(run).write(0.15, tmp_path / "shards", layout="sharded"),
        lambda: export_file(tmp_path / "m.safetensors", tmp_path / "m.pt"),
    )
    for write in writers:
        leave(old, 4000)
        write()
        assert not old.exists()
        assert young.exists()


def test_nothing_in_another_directory_is_moved_or_deleted(run: Path, tmp_path: Path) -> None:
    """Links in place of `superseded` and of a folder of shards lead to directories with other locks."""
    other, shards = Path(shutil.copytree(run, tmp_path / "other")), tmp_path / "shards"
    Run(run).write(0.15, shards, layout="sharded", max_shard_size="1KB")
    flip_bit(snapshot_files(other)[0])
    flip_bit(min(shards.glob("*.safetensors")))
    leave(other / ".ema-1.tmp", 7200)
    leave(shards / ".ema-2.tmp", 7200)
    before = contents(other), contents(shards)
    (run / "superseded").symlink_to(other)
    (run / "linked").symlink_to(shards)
    (run / "0000000000000070-0.1").symlink_to(other)  # named as a snapshot
    found = verify(run)
    assert (found.leftovers, found.superseded) == ((), 0)
    (run / "0000000000000070-0.1").unlink()
    pruned(run)
    assert (contents(other), contents(shards)) == before
