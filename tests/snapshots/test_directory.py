"""A directory holds one run, whose files belong together; adding to it loses nothing."""

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

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

from posthoc_cli import Run, files
from posthoc_cli.errors import MismatchError
from posthoc_cli.snapshots.directory import (
    DirectoryLock,
    inspect_directory,
    set_aside,
    snapshot_path,
    thin,
)
from posthoc_cli.snapshots.sampling import sample_measurements

W = {"w": torch.ones(2, 3)}


def write_times(directory, *times, sigma_rel=0.05, value=1):
    for t in times:
        write_snapshot(directory, t, sigma_rel, RUN_ID, {"w": value * W["w"]})


def times_in(directory):
    return [snapshot.t for snapshot in Run(directory).snapshots]


# --- what belongs together


def test_outputs_temporary_hidden_and_other_files_next_to_snapshots_are_left_alone(tmp_path, small):
    small("output")
    save_file(W, tmp_path / "foreign.safetensors")
    (tmp_path / "superseded").mkdir()
    for name in (".ema-0123.tmp", "._x.safetensors", "old.pt", "superseded/x.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
    before = contents(tmp_path)
    write_times(tmp_path, 10, 20, 30)
    with DirectoryLock(tmp_path) as lock:
        thin(Run(tmp_path).snapshots, 1, lock)
    assert times_in(tmp_path) == [30]
    assert contents(tmp_path).items() > before.items()


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"run_id": OTHER_RUN_ID}, "'run_id'"),
        ({"t_unit": "images"}, "'t_unit': 'steps' and 'images'"),
        ({"values": {"w": torch.ones(3, 2)}}, "'w' has the shapes [2, 3] and [3, 2]"),
        ({"tensors": {"w": "average BF16"}}, "BF16"),
        ({"tensors": {"w": "copy F32"}}, "copy of F32"),
        ({"values": {"v": W["w"]}}, "'v'"),
        ({"values": {**W, "more\n": W["w"]}}, r"'more\n'"),
        ({"aliases": {"tied": "w"}}, "tie"),
    ],
)
def test_snapshots_that_do_not_belong_together_never_mix(tmp_path, fields, fact):
    write_times(tmp_path, 20, 30)
    odd = write_snapshot(tmp_path, 40, 0.05, **{"run_id": RUN_ID, "values": W, **fields})
    subject = f"{snapshot_path(tmp_path, 20, 0.05)} and {odd}"
    with refused(subject, fact, kind=MismatchError):
        _ = Run(tmp_path).snapshots


@pytest.mark.parametrize(
    "fields",
    [
        {"sigma_rel": 0.28},
        {"sigma_rels": (0.05,)},
        {"values": {"w": W["w"].half()}, "tensors": {"w": "average F32"}},
    ],
)
def test_profiles_and_stored_dtypes_may_change_within_a_run(tmp_path, fields):
    """A run may be resumed without a deleted profile, and a value too large for float16 is stored
    in float32."""
    write_times(tmp_path, 20)
    options = {"sigma_rel": 0.05, "run_id": RUN_ID, "values": W, **fields}
    write_snapshot(tmp_path, 40, **options)
    assert times_in(tmp_path) == [20, 40]


# --- inspection


def test_an_inspection_lists_every_problem_and_continues(tmp_path):
    write_times(tmp_path, 10, 20)
    write_snapshot(tmp_path, 15, 0.05, OTHER_RUN_ID, W)
    first = snapshot_path(tmp_path, 10, 0.05)
    double = shutil.copy(first, tmp_path / "double.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(first.read_bytes()[:-1])
    found = inspect_directory(tmp_path)
    assert len(found.snapshots) == 4
    damaged, both, other = map(str, found.problems)
    assert "damaged.safetensors: truncated" in damaged
    assert "'run_id'" in other
    assert both.startswith(f"{first} and {double}: both hold sigma_rel 0.05 at t = 10")


def test_a_profile_that_the_newest_time_lacks_is_noted(tmp_path):
    """At earlier times thinning keeps different profiles."""
    write_times(tmp_path, 5, 10, 20)
    write_times(tmp_path, 10, sigma_rel=0.28)
    found = inspect_directory(tmp_path)
    assert found.notes == ["t = 20, the newest: no snapshot of sigma_rel 0.28"]


# --- names


def test_names_sort_by_time():
    times = (1e-6, 1 / 64, 12.5, 13.0, 1000.0, 1e15 + 0.5, 2.0**53)
    names = [snapshot_path(Path(), t, 0.05).name for t in times]
    assert names == sorted(names)
    assert names[2] == "0000000000000012.5-0.05.safetensors"


# --- adding


def test_thinning_keeps_what_reconstruction_needs_by_what_headers_measured(tmp_path):
    """If a network moves only in the middle of training, all other snapshots but the nearest are
    alike."""
    moves = np.zeros((100, 300))
    moves[40:60] = np.random.default_rng(0).normal(size=(20, 300))
    trajectory = [{"w": values} for values in np.cumsum(moves, axis=0)]
    write_run(tmp_path, trajectory, range(10, 101, 10), (0.05, 0.28))
    snapshots = Run(tmp_path).snapshots
    measured = []
    for snapshot, sampled in zip(snapshots, sample_measurements(snapshots), strict=True):
        measured.append(replace(snapshot, measurements=sampled))
    with DirectoryLock(tmp_path) as lock:
        left = thin(measured, 3, lock)
    # it hardly matters which earlier snapshot is left
    assert sum(40 <= s.t <= 80 for s in left) >= 3


def test_thinning_goes_by_headers_and_neither_by_names_nor_by_dates(tmp_path):
    for name, t in (
        ("z", 10),
        ("y", 20),
        ("x", 30),
    ):
        path = write_snapshot(tmp_path, t, 0.05, RUN_ID, W, name=f"{name}.safetensors")
        os.utime(path, (1e9 - t, 1e9 - t))
    assert times_in(tmp_path) == [10, 20, 30]
    with DirectoryLock(tmp_path) as lock:
        thin(Run(tmp_path).snapshots, 1, lock)
    assert times_in(tmp_path) == [30]


def later_than_10(directory):
    return [snapshot for snapshot in Run(directory).snapshots if snapshot.t > 10]


def test_later_snapshots_are_set_aside_and_never_overwritten_or_deleted(tmp_path):
    write_times(tmp_path, 10)
    stored = {}
    for attempt in range(3):
        write_times(tmp_path, 20, value=attempt)
        with DirectoryLock(tmp_path) as lock:
            (moved,) = set_aside(later_than_10(tmp_path), lock)
        assert moved.parent == tmp_path / "superseded"
        assert moved.name.endswith("0000000000000020-0.05.safetensors")
        stored[moved] = attempt
    for path, value in stored.items():
        assert load_file(path)["w"][0, 0] == value
    assert inspect_directory(tmp_path).superseded == Run(tmp_path).check().superseded == 3
    assert times_in(tmp_path) == [10]


def test_setting_aside_syncs_the_new_name_before_the_old_one_goes(tmp_path, monkeypatch):
    write_times(tmp_path, 10, 20)
    synced = list[Path]()
    monkeypatch.setattr(files.system, "fsync_directory", synced.append)
    with DirectoryLock(tmp_path) as lock:
        set_aside(Run(tmp_path).snapshots, lock)
    assert synced[-2:] == [tmp_path / "superseded", tmp_path]


# --- what interrupted writes left is removed by the next writer, and nothing in another directory
# is


def leave(path, age):
    path.write_text("half")
    changed = time.time() - age
    os.utime(path, (changed, changed))
    return path


def leave_folder(path, age):
    """Leave a folder that has not changed for long, with a file of some age in it."""
    path.mkdir()
    leave(path / "0000000000000020-weights.safetensors", age)
    os.utime(path, (0, 0))
    return path


def test_the_next_writer_removes_leftovers_that_no_longer_change(run, tmp_path):
    precious = leave(tmp_path / "precious", 0)
    link = run / ".ema-4.tmp"
    link.symlink_to(precious)
    os.utime(link, (0, 0), follow_symlinks=False)
    old = [
        leave(run / ".ema-1.tmp", 120),
        link,
        leave_folder(run / ".ema-5.tmp", 120),
    ]
    young = {
        leave(run / ".ema-2.tmp", 5),
        leave_folder(run / ".ema-6.tmp", 5),
    }
    other = leave(run / ".ema-not-ours", 7200)
    Run(run).prune(keep=5)
    assert {*Run(run).check().leftovers} == young
    for path in old:
        assert not os.path.lexists(path)
    assert precious.exists()
    assert other.exists()


def test_outputs_remove_leftovers_an_hour_old(run, tmp_path):
    old = leave(tmp_path / ".ema-1.tmp", 4000)
    young = leave(tmp_path / ".ema-2.tmp", 3000)
    Run(run).write(0.15, tmp_path / "m.safetensors")
    assert not old.exists()
    assert young.exists()


def test_nothing_in_another_directory_is_moved_or_deleted(run, tmp_path):
    """Links in place of `superseded` and of a folder of shards lead to directories with other
    locks."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    flip_bit(snapshot_files(other)[0])
    leave(other / ".ema-1.tmp", 7200)
    before = contents(other)
    (run / "superseded").symlink_to(other)
    (run / "linked").symlink_to(other)
    (run / "0000000000000070-0.1").symlink_to(other)  # named as a snapshot
    assert Run(run).check().superseded == 0
    Run(run).prune(keep=5)
    assert contents(other) == before
