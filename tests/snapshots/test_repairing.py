"""A repair sets broken files aside without losing them, the rest works, and nothing is touched during a training."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ema_command import Ema
from factories import (
    RUN_ID,
    contents,
    flip_bit,
    snapshot_files,
    write_snapshot,
)
from snapshots.recorded import Walk, call_number, failing

from posthoc_cli import PostHocEMA, Run, disk_sources
from posthoc_cli.checkpoints.import_run import import_checkpoints
from posthoc_cli.errors import DirectoryError, MismatchError, WriteError
from posthoc_cli.export.convert import export_file
from posthoc_cli.snapshots.check import check_repairable, repair, verify
from posthoc_cli.snapshots.directory import find_snapshots, inspect_directory
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.writer import DirectoryLock
from posthoc_cli.synthesis.plan import plan_synthesis


def is_fine(run: Path, snapshots: int) -> bool:
    """Return whether a run has this number of snapshots and no fault."""
    return verify(run).is_fine and len(find_snapshots(run)) == snapshots


def break_some(run: Path, which: tuple[int, ...]) -> list[Path]:
    paths = [snapshot_files(run)[index] for index in which]
    for path in paths:
        flip_bit(path)
    return paths


# --- repair


@pytest.mark.parametrize("which", [(0,), (4, 5), (-1,), (-2, -1), (0, 3, 9, -1), tuple(range(10))])
def test_the_remaining_snapshots_work_with_a_higher_predicted_error(
    ema: Ema, run: Path, tmp_path: Path, which: tuple[int]
) -> None:
    before_loss = plan_synthesis(disk_sources(run), [0.15]).predicted_error(0)
    broken = break_some(run, which)
    plan, before = verify(run), sorted(contents(run).values())
    assert {path.name for path in repair(plan)} == {path.name for path in broken}
    assert [path for path in sorted(contents(run).values()) if path] == [path for path in before if path]
    assert is_fine(run, 12 - len(which))
    # The norm that both errors are relative to is estimated anew.
    assert plan_synthesis(disk_sources(run), [0.15]).predicted_error(0) > 0.99 * before_loss
    result = ema("synthesize", run, "--sigma-rel", "0.15", "--out", tmp_path / "o.safetensors")
    assert result.code == 0, result.err
    if len(which) == 4:
        assert ema("error-plot", run, "--out", tmp_path / "o.png").code == 0
    assert ema("info", run, "--json").code == (1 if inspect_directory(run).problems else 0)


@pytest.mark.parametrize("which", [(0,), (-2, -1)])
def test_training_is_resumed_after_a_loss(run: Path, which: tuple[int]) -> None:
    break_some(run, which)
    repair(verify(run))
    walk = Walk()
    with PostHocEMA.from_path(run, walk.model, step=PostHocEMA.from_path(run).step) as tracker:
        walk.train(tracker, 20)
    assert verify(run).is_fine
    assert find_snapshots(run)[-1].info.t >= 70


def test_a_link_is_moved_and_not_its_target(run: Path, tmp_path: Path) -> None:
    path, elsewhere = snapshot_files(run)[3], tmp_path / "elsewhere.safetensors"
    path.rename(elsewhere)
    flip_bit(elsewhere)
    path.symlink_to(elsewhere)
    (moved,) = repair(verify(run))
    assert moved.is_symlink()
    assert elsewhere.is_file()
    assert not elsewhere.is_symlink()


def synthesize_shards(ema: Ema, run: Path, out: Path) -> None:
    options = ("--sigma-rel", "0.15", "--layout", "sharded", "--max-shard-size", "1KB")
    result = ema("synthesize", run, "--out", out, *options)
    assert result.code == 0, result.err


def test_shards_of_an_output_in_the_directory_itself(ema: Ema, run: Path) -> None:
    synthesize_shards(ema, run, run)
    shards = sorted(run.glob("model-*"))
    assert len(shards) > 1
    assert is_fine(run, 12)
    flip_bit(shards[0])
    assert {path.name for path in repair(verify(run))} == {INDEX_NAME, *(path.name for path in shards)}
    assert is_fine(run, 12)


def test_only_files_in_a_snapshot_directory_are_repaired(tmp_path: Path) -> None:
    snapshot = write_snapshot(tmp_path / "run", 10, 0.05, RUN_ID, {"w": torch.ones(3)})
    output = tmp_path / "outputs" / "model.safetensors"
    output.parent.mkdir()
    check_repairable(verify(snapshot.parent))
    export_file(snapshot, output)
    flip_bit(output)
    for path in (output.parent, output, snapshot):
        with pytest.raises(DirectoryError, match="only these are set aside"):
            check_repairable(verify(path))


def test_a_name_that_has_no_room_for_a_number_is_an_error(run: Path) -> None:
    (run / "damaged").mkdir()
    for folder in (run, run / "damaged"):
        (folder / f"{'a' * 243}.safetensors").write_bytes(b"broken")
    with pytest.raises(WriteError, match=r"damaged: .*too long"):
        repair(verify(run))
    assert (run / f"{'a' * 243}.safetensors").exists()


def test_a_file_that_has_changed_since_is_not_moved_and_a_missing_one_is_skipped(run: Path) -> None:
    assert repair(verify(run)) == ()
    first, second = break_some(run, (0, 1))
    plan = verify(run)
    first.unlink()
    kept = second.read_bytes()
    second.unlink()
    second.write_bytes(kept)
    with pytest.raises(MismatchError, match="has changed since it was read; nothing was set aside; run again"):
        repair(plan)
    assert not (run / "damaged").exists()
    second.unlink()
    assert repair(plan) == ()


@pytest.mark.parametrize("operation", ["make_directory", "rename", "fsync_directory"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_repair_that_is_interrupted_loses_nothing_and_continues(run: Path, operation: str, after: int) -> None:
    break_some(run, (0, 1, 2))
    before = sorted(contents(run).values())
    plan = verify(run)
    with failing(operation, errno.EIO, call_number(after)):
        try:
            repair(plan)
        except WriteError as error:
            assert "damaged" in str(error)
    assert [data for data in sorted(contents(run).values()) if data] == [data for data in before if data]
    repair(verify(run))
    assert is_fine(run, 9)
    DirectoryLock(run).release()  # the repair has released it


# --- leftovers


def leave(path: Path, age: float) -> Path:
    path.write_text("half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


def resumed(run: Path) -> None:
    walk = Walk()
    with PostHocEMA.from_path(run, walk.model, step=60) as tracker:
        walk.train(tracker, 10)


def repaired(run: Path) -> None:
    repair(verify(run))


def pruned(run: Path) -> None:
    Run(run).prune(keep=5)


@pytest.mark.parametrize("writer", [resumed, repaired, pruned])
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


def test_outputs_and_imports_remove_leftovers_an_hour_old(run: Path, tmp_path: Path) -> None:
    old, young = tmp_path / ".ema-1.tmp", leave(tmp_path / ".ema-2.tmp", 3000)
    writers = (
        lambda: Run(run).write(0.15, tmp_path / "m.safetensors"),
        lambda: Run(run).write(0.15, tmp_path / "shards", layout="sharded"),
        lambda: export_file(tmp_path / "m.safetensors", tmp_path / "m.pt"),
        lambda: import_checkpoints(tmp_path / "ck", tmp_path / "imported", copy=True),
    )
    (tmp_path / "ck").mkdir()
    torch.save({"w": torch.ones(3)}, tmp_path / "ck" / "model-100.pt")
    for write in writers:
        leave(old, 4000)
        write()
        assert not old.exists()
        assert young.exists()


def test_leftovers_that_cannot_be_removed_are_a_warning(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    leftover = leave(run / ".ema-1.tmp", 120)
    with failing("unlink", errno.EACCES, lambda path: path == leftover):
        resumed(run)
    assert f"{leftover}: left by an interrupted write, and cannot be removed" in caplog.text
    assert is_fine(run, 14)


def test_nothing_in_another_directory_is_moved_or_deleted(ema: Ema, run: Path, tmp_path: Path) -> None:
    """Links in place of `superseded` and of a folder of shards lead to directories with other locks."""
    other, shards = Path(shutil.copytree(run, tmp_path / "other")), tmp_path / "shards"
    synthesize_shards(ema, run, shards)
    break_some(other, (0,))
    flip_bit(min(shards.glob("*.safetensors")))
    leave(other / ".ema-1.tmp", 7200)
    leave(shards / ".ema-2.tmp", 7200)
    before = contents(other), contents(shards)
    (run / "superseded").symlink_to(other)
    (run / "linked").symlink_to(shards)
    (run / "0000000000000070-0.1").symlink_to(other)  # named as a snapshot
    found = verify(run)
    assert (found.leftovers, found.superseded) == ((), 0)
    assert "superseded/ is a symbolic link; not read" in found.notes
    assert repair(found) == (run / "damaged" / "linked",)  # the link itself
    assert (contents(other), contents(shards)) == before
