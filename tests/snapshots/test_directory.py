"""A directory holds one run, whose files belong together; adding to it loses nothing."""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checking import refused
from factories import (
    OTHER_RUN_ID,
    RUN_ID,
    contents,
    flip_bit,
    snapshot_files,
    write_run,
    write_snapshot,
)
from safetensors.torch import load_file, save_file
from snapshots.recorded import Walk

from posthoc_cli import PostHocEMA, Run, export_file, files
from posthoc_cli.errors import DirectoryError, MismatchError
from posthoc_cli.snapshots.directory import (
    inspect_directory,
    read_directory,
    set_aside,
    snapshot_path,
    thin,
)
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.sources import sample_measurements
from posthoc_cli.snapshots.verify import verify

W = {"w": torch.ones(2, 3)}


def write_times(directory: Path, *times: float, sigma_rel: float = 0.05, value: float = 1) -> None:
    for t in times:
        write_snapshot(directory, t, sigma_rel, RUN_ID, {"w": value * W["w"]})


def times_in(directory: Path) -> list[float]:
    return [snapshot.t for snapshot in read_directory(directory)]


# --- what belongs together


def test_snapshots_are_ordered_by_time_then_sigma_rel_whatever_their_names(tmp_path: Path) -> None:
    for name, t, sigma_rel in (
        ("a", 30, 0.05),
        ("b", 20, 0.28),
        ("c", 20, 0.05),
        ("d", 100, 0.05),
    ):
        write_snapshot(tmp_path, t, sigma_rel, RUN_ID, W, name=f"{name}.safetensors")
    assert names_in(tmp_path) == ["c", "b", "a", "d"]
    for name in "ac":  # any snapshot can be moved or deleted
        path = tmp_path / f"{name}.safetensors"
        path.rename(path.with_stem(f"0{name}"))
    (tmp_path / "b.safetensors").unlink()
    assert names_in(tmp_path) == ["0c", "0a", "d"]


def names_in(directory: Path) -> list[str]:
    return [snapshot.path.stem for snapshot in read_directory(directory)]


def test_outputs_temporary_hidden_and_other_files_next_to_snapshots_are_left_alone(
    tmp_path: Path,
    small: Callable[[str], Path],
) -> None:
    small("output")
    save_file(W, tmp_path / "foreign.safetensors")
    for name in (".ema-0123.tmp", ".ema.lock", "._x.safetensors", "notes.txt", "old.pt"):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "superseded").mkdir()
    (tmp_path / "superseded" / "x.safetensors").write_bytes(b"junk")
    before = contents(tmp_path)
    write_times(tmp_path, 10, 20, 30)
    thin(read_directory(tmp_path), 1)
    assert times_in(tmp_path) == [30]
    assert contents(tmp_path).items() > before.items()


@pytest.mark.parametrize(
    ("values", "fields", "message"),
    [
        (W, {"run_id": OTHER_RUN_ID}, "differ in 'run_id'"),
        (W, {"t_unit": "images"}, "differ in 't_unit': '(steps|images)' and '(steps|images)'"),
        ({"w": torch.ones(3, 2)}, {}, r"tensor 'w' has the shapes \[\d, \d\] and \[\d, \d\]"),
        (W, {"tensors": {"w": "average BF16"}}, "tensor 'w' is average of .* and average of"),
        (W, {"tensors": {"w": "copy F32"}}, "is (average of F32 and copy|copy of F32 and a)"),
        ({"v": W["w"]}, {}, "tensor 'v' is missing in"),
        ({**W, "more\n": W["w"]}, {}, r"tensor 'more\\n' is missing in"),
        (W, {"aliases": {"tied": "w"}}, "tie different names"),
    ],
)
@pytest.mark.parametrize("last", [True, False])
def test_snapshots_that_do_not_belong_together_never_mix(
    tmp_path: Path,
    values: dict[str, torch.Tensor],
    fields: dict[str, Any],
    message: str,
    last: bool,
) -> None:
    write_times(tmp_path, 20, 30)
    t = 40 if last else 10
    options = {"run_id": RUN_ID, "values": values, **fields}
    odd = write_snapshot(tmp_path, t, 0.05, **options)
    with pytest.raises(MismatchError, match=message) as caught:
        read_directory(tmp_path)
    first = snapshot_path(tmp_path, 20, 0.05)
    subject = f"{first} and {odd}" if last else f"{odd} and {first}"
    assert caught.value.subject == subject
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "fields",
    [
        {"sigma_rel": 0.28},
        {"sigma_rels": (0.05,)},
        {"values": {"w": W["w"].half()}, "tensors": {"w": "average F32"}},
    ],
)
def test_profiles_and_stored_dtypes_may_change_within_a_run(
    tmp_path: Path,
    fields: dict[str, Any],
) -> None:
    """A run may be resumed without a deleted profile, and a value too large for float16 is stored
    in float32."""
    write_times(tmp_path, 20, 30)
    options = {"sigma_rel": 0.05, "run_id": RUN_ID, "values": W, **fields}
    write_snapshot(tmp_path, 40, **options)
    assert times_in(tmp_path) == [20, 30, 40]


# --- inspection


def test_an_inspection_lists_every_problem_and_continues(tmp_path: Path) -> None:
    write_times(tmp_path, 10, 20)
    write_times(tmp_path, 10, 20, sigma_rel=0.28)
    write_times(tmp_path, 5, 30)  # at earlier times thinning keeps different profiles
    write_snapshot(tmp_path, 15, 0.05, OTHER_RUN_ID, W, name="foreign.safetensors")
    first = snapshot_path(tmp_path, 10, 0.05)
    double = shutil.copy(first, tmp_path / "double.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(first.read_bytes()[:-1])
    (tmp_path / ".ema-0123.tmp").touch()
    (tmp_path / "superseded").mkdir()
    (tmp_path / "superseded" / "x.safetensors").touch()
    found = inspect_directory(tmp_path)
    assert len(found.snapshots) == 8
    assert len(found.problems) == 3
    damaged, both, other = map(str, found.problems)
    assert "damaged.safetensors: truncated" in damaged
    assert "differ in 'run_id'" in other
    assert both == f"{first} and {double}: both hold sigma_rel 0.05 at t = 10; remove one"
    assert found.leftovers == [tmp_path / ".ema-0123.tmp"]
    assert found.superseded == 1
    assert found.notes == ["t = 30, the newest: no snapshot of sigma_rel 0.28"]


# --- names


def test_names_sort_by_time() -> None:
    times = (1e-6, 1 / 64, 12.5, 13.0, 1000.0, 1e15 + 0.5, 2.0**53)
    names = [snapshot_path(Path(), t, 0.05).name for t in times]
    assert names == sorted(names)
    assert names[2].lstrip("0") == "12.5-0.05.safetensors"
    assert names[4].lstrip("0") == "1000-0.05.safetensors"


# --- adding


def test_thinning_keeps_what_reconstruction_needs_by_what_headers_measured(tmp_path: Path) -> None:
    """If a network moves only in the middle of training, all other snapshots but the nearest are
    alike."""
    moves = np.zeros((100, 300))
    moves[40:60] = np.random.default_rng(0).normal(size=(20, 300))
    trajectory = [{"w": values} for values in np.cumsum(moves, axis=0)]
    write_run(tmp_path, trajectory, range(10, 101, 10), (0.05, 0.28))
    snapshots = read_directory(tmp_path)
    measured = []
    for snapshot, sampled in zip(snapshots, sample_measurements(snapshots), strict=True):
        measured.append(replace(snapshot, measurements=sampled))
    left = thin(measured, 3)
    # it hardly matters which earlier snapshot is left
    assert sum(40 <= s.t <= 80 for s in left) >= 3


def test_thinning_goes_by_headers_and_neither_by_names_nor_by_dates(tmp_path: Path) -> None:
    for name, t in (
        ("z", 10),
        ("y", 20),
        ("x", 30),
    ):
        path = write_snapshot(tmp_path, t, 0.05, RUN_ID, W, name=f"{name}.safetensors")
        os.utime(path, (1e9 - t, 1e9 - t))
    thin(read_directory(tmp_path), 1)
    assert times_in(tmp_path) == [30]


def test_later_snapshots_are_set_aside_and_never_overwritten_or_deleted(tmp_path: Path) -> None:
    superseded = tmp_path / "superseded"
    assert set_aside([]) == []
    assert not superseded.exists()
    write_times(tmp_path, 10)
    for attempt, again in enumerate(("", ".1", ".2")):
        write_times(tmp_path, 20, 30, value=attempt)
        moved = set_aside(later_than_10(tmp_path))
        assert [path.name for path in moved] == [
            f"0000000000000020-0.05{again}.safetensors",
            f"0000000000000030-0.05{again}.safetensors",
        ]
        for path in moved:
            assert load_file(path)["w"][0, 0] == attempt
    assert len([*superseded.iterdir()]) == 6
    assert times_in(tmp_path) == [10]


def later_than_10(directory: Path) -> list[Snapshot]:
    return [snapshot for snapshot in read_directory(directory) if snapshot.t > 10]


def test_what_is_set_aside_has_its_new_name_on_the_disk_before_it_loses_the_old_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_times(tmp_path, 10, 20)
    synced = list[Path]()
    monkeypatch.setattr(files.system, "fsync_directory", synced.append)
    set_aside(read_directory(tmp_path))
    assert synced[-2:] == [tmp_path / "superseded", tmp_path]


def test_links_in_the_way_are_neither_overwritten_nor_followed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_times(run, 10, 20)
    superseded = run / "superseded"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    superseded.symlink_to(elsewhere)
    with refused(str(superseded), "is a link or no directory", kind=DirectoryError):
        set_aside(read_directory(run))
    superseded.unlink()
    superseded.write_text("mine")
    with refused(str(superseded), "is a link or no directory", kind=DirectoryError):
        set_aside(read_directory(run))
    assert times_in(run) == [10, 20]
    superseded.unlink()
    superseded.mkdir()
    link = superseded / snapshot_path(tmp_path, 20, 0.05).name
    link.symlink_to("nowhere")
    (moved,) = set_aside(later_than_10(run))
    assert link.is_symlink()
    assert moved != link


# --- what interrupted writes left is removed by the next writer, and nothing in another directory
# is


def leave(path: Path, age: float) -> Path:
    path.write_text("half")
    changed = time.time() - age
    os.utime(path, (changed, changed))
    return path


def resumed(run: Path) -> None:
    walk = Walk()
    with PostHocEMA.from_path(run, walk.model, step=60) as tracker:
        walk.train(tracker, 10)


def pruned(run: Path) -> None:
    Run(run).prune(keep=5)


@pytest.mark.parametrize("writer", [resumed, pruned])
def test_the_next_writer_removes_leftovers_that_no_longer_change(
    run: Path,
    tmp_path: Path,
    writer: Callable[[Path], None],
) -> None:
    old = leave(run / ".ema-1.tmp", 120)
    young = leave(run / ".ema-2.tmp", 5)
    ahead = leave(run / ".ema-3.tmp", -3600)  # another host's clock is fast
    (tmp_path / "precious").write_text("x")
    link = run / ".ema-4.tmp"
    link.symlink_to(tmp_path / "precious")
    empty = run / ".ema-5.tmp"
    still = run / ".ema-import.tmp"
    growing = run / ".ema-growing.tmp"
    for folder in (empty, still, growing):
        folder.mkdir()
    leave(still / "0000000000000020-weights.safetensors", 120)
    leave(growing / ".ema-6.tmp", 5)
    for path in (link, empty, still, growing):
        os.utime(path, (0, 0), follow_symlinks=False)
    (run / ".ema-not-ours").write_text("x")
    assert len(verify(run).leftovers) == 7
    writer(run)
    assert {*verify(run).leftovers} == {young, ahead, growing}
    for path in (old, link, empty, still):
        assert not os.path.lexists(path)
    assert (tmp_path / "precious").exists()
    assert (run / ".ema-not-ours").exists()


def test_outputs_remove_leftovers_an_hour_old(run: Path, tmp_path: Path) -> None:
    old = tmp_path / ".ema-1.tmp"
    young = leave(tmp_path / ".ema-2.tmp", 3000)
    writers = (
        lambda: Run(run).write(0.15, tmp_path / "m.safetensors"),
        lambda: export_file(tmp_path / "m.safetensors", tmp_path / "m.pt"),
    )
    for write in writers:
        leave(old, 4000)
        write()
        assert not old.exists()
        assert young.exists()


def test_nothing_in_another_directory_is_moved_or_deleted(run: Path, tmp_path: Path) -> None:
    """Links in place of `superseded` and of a folder of shards lead to directories with other
    locks."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    shards = tmp_path / "shards"
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
    assert found.leftovers == ()
    assert found.superseded == 0
    (run / "0000000000000070-0.1").unlink()
    pruned(run)
    assert (contents(other), contents(shards)) == before
