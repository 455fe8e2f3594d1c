"""Snapshots in several parts are read as one file, are complete or ignored, and are moved as
one."""

import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from checking import assert_same_tensors, refused
from factories import (
    OTHER_RUN_ID,
    RUN_ID,
    read_snapshot,
    rewrite_snapshot,
    snapshot_files,
    split_snapshot,
    write_snapshot,
)
from snapshots.recorded import network, train

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError
from posthoc_cli.snapshots import directory as directories
from posthoc_cli.snapshots.boxes import Box, cover_problem
from posthoc_cli.snapshots.directory import (
    DirectoryLock,
    inspect_directory,
    remove_snapshot,
)

GRIDS = {"0.weight": (2, 2), "1.num_batches_tracked": (), "0.bias": (1,)}


@pytest.fixture
def newest(run):
    """The folder of the newest snapshot of a run, in four parts."""
    return split_snapshot(snapshot_files(run)[-1], 4)


def split_all(run):
    for path in snapshot_files(run):
        split_snapshot(path, 4, GRIDS)


def parts_of(folder):
    return sorted(folder.glob("part-*"))


# --- results equal those from single files


@pytest.mark.parametrize("fields", [{}, {"measurements": None, "sketch": ""}])
def test_all_results_from_parts_equal_those_from_single_files(run, tmp_path, fields):
    """Without measurements in headers, the same sample is read from both."""
    for path in snapshot_files(run):
        rewrite_snapshot(path, **fields)
    unsplit = Run(shutil.copytree(run, tmp_path / "unsplit"))
    split_all(run)
    split = Run(run)
    expected = unsplit.average(0.15)
    found = split.average(0.15)
    assert_same_tensors(found, expected)
    assert found.predicted_error == expected.predicted_error is not None
    assert split.check().is_fine
    assert split.info()["parameters"] == unsplit.info()["parameters"]


def test_chunks_of_several_dtypes_are_read_as_the_widest(tmp_path):
    narrow = torch.randn(3, 4).half()
    wide = 1e6 * torch.randn(2, 4)
    values = torch.cat([narrow.float(), wide])
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": values})
    first, _ = parts_of(split_snapshot(path, 2))
    rewrite_snapshot(first, lambda held: held.update(w=narrow))
    (snapshot,) = Run(tmp_path).snapshots
    rows = Box((2, 0), (2, 4))
    assert torch.equal(snapshot.tensor("w", rows), values[2:4])
    assert torch.equal(Run(tmp_path).average(0.05)["w"], values)


def test_measurements_that_a_part_lacks_are_unknown(run, newest):
    assert directories.read_snapshot(newest).measurements is not None
    rewrite_snapshot(parts_of(newest)[1], measurements=None)
    assert directories.read_snapshot(newest).measurements is None


# --- incomplete snapshots, and parts that do not belong together


def test_an_incomplete_snapshot_is_a_leftover(run, newest):
    parts_of(newest)[1].unlink()
    found = inspect_directory(run)
    assert len(found.snapshots) == 11
    assert found.incomplete == {newest: "3 of 4 parts"}
    checked = Run(run).check()
    assert checked.is_fine
    assert checked.leftovers == (newest,)
    assert f"{newest.name}: has 3 of 4 parts" in checked.notes


def test_an_incomplete_snapshot_that_is_named_is_an_error(newest):
    parts_of(newest)[1].unlink()
    assert not Run(newest).check().is_fine
    with refused(newest, "3 of 4 parts", kind=FileFormatError):
        directories.read_snapshot(newest)
    with refused(newest, "1 of 4 parts", kind=DirectoryError):
        _ = Run(newest).snapshots


def test_a_directory_of_incomplete_snapshots_says_what_processes_must_share(newest):
    parts_of(newest)[1].unlink()
    alone = newest.parent / "alone"
    alone.mkdir()
    newest.rename(alone / newest.name)
    with refused(alone, "3 of 4 parts", "all processes", kind=DirectoryError):
        _ = Run(alone).snapshots


def assert_named(bad, subject, *facts):
    """Assert that a part makes readers and `verify` name a file or folder, and hides no other
    snapshot."""
    run = bad.parent.parent
    with pytest.raises((FileFormatError, MismatchError)) as raised:
        _ = Run(run).snapshots
    for fact in (str(subject), *facts):
        assert fact in str(raised.value)
    assert not Run(run).check().is_fine
    shutil.rmtree(bad.parent)
    assert len(Run(run).snapshots) == 11


@pytest.mark.parametrize(
    ("fields", "fact"),
    [
        ({"run_id": OTHER_RUN_ID}, "'run_id'"),
        ({"part": (1, 4)}, "part 1 of 4"),
        ({"part": None, "chunks": {}}, "not a part"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(newest, fields, fact):
    bad = parts_of(newest)[1]
    rewrite_snapshot(bad, **fields)
    assert_named(bad, bad, fact)


@pytest.mark.parametrize(
    ("place", "fact"),
    [
        ({"shape": (21, 30)}, "(21, 30)"),
        ({"offset": (6, 0)}, "exactly once"),
        ({"offset": (16, 0)}, "exactly once"),
    ],
)
def test_chunks_that_do_not_fit_are_named(newest, place, fact):
    bad = parts_of(newest)[1]
    chunks = dict(read_snapshot(bad).chunks)
    chunks["0.weight"] = replace(chunks["0.weight"], **place)
    rewrite_snapshot(bad, chunks=chunks)
    assert_named(bad, newest, "'0.weight'", fact)


def test_parts_of_another_attempt_neither_complete_a_snapshot_nor_hide_one(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "copy")
    folder = split_snapshot(snapshot_files(run)[-1], 4)
    other = split_snapshot(snapshot_files(copy)[-1], 2)
    first, second = parts_of(other)
    shutil.copy(first, folder)
    assert len(Run(run).snapshots[-1].files) == 4
    shutil.copy(second, folder)
    with pytest.raises(MismatchError, match="two complete snapshots"):
        _ = Run(run).snapshots


# --- moved as one


def test_pruning_deletes_folders(run):
    split_all(run)
    kept = Run(run).prune(keep=3).kept
    assert sorted(run.glob("0*")) == [snapshot.path for snapshot in kept]
    assert len(kept) == 6


def test_a_folder_with_another_file_in_it_stays(run, newest):
    (newest / "notes.txt").write_text("mine")
    with DirectoryLock(run) as lock:
        remove_snapshot(directories.read_snapshot(newest), lock)
    assert [path.name for path in newest.iterdir()] == ["notes.txt"]
    assert inspect_directory(run).incomplete == {newest: "no parts"}


def test_the_next_training_removes_incomplete_snapshots(run, caplog):
    first, second = (split_snapshot(path, 4) for path in snapshot_files(run)[:2])
    parts_of(first)[0].unlink()
    leftover = second / ".ema-1.tmp"
    leftover.write_text("half")
    os.utime(leftover, (0, 0))
    model = network()
    with PostHocEMA.from_path(run, model, step=60) as tracker:
        train(tracker, model, 10)
    assert Run(run).check().leftovers == ()
    assert not first.exists()
    assert f"{first}: has 3 of 4 parts" in caplog.text


# --- chunks of tensors: boxes assembled from any chunks equal NumPy's own indexing


@pytest.mark.parametrize(
    ("shape", "grid"),
    [
        ((), ()),
        ((5, 3), (2, 3)),
        ((3, 4, 2, 2), (3, 2, 2, 1)),
        ((0, 3), (1, 2)),
    ],
)
def test_any_box_is_assembled_from_any_chunks(tmp_path, shape, grid):
    values = torch.randint(2**62, shape)
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": values})
    split_snapshot(path, 24, {"w": grid})
    (source,) = Run(tmp_path).snapshots
    rng = np.random.default_rng(0)
    for _ in range(50):
        begin = rng.integers(0, np.add(shape, 1))
        end = rng.integers(begin, np.add(shape, 1))
        expected = values.numpy()[tuple(map(slice, begin, end))].reshape(-1)
        first, last = sorted(rng.integers(0, expected.size + 1, 2))
        found = np.empty_like(expected[first:last])
        box = Box(tuple(begin.tolist()), tuple((end - begin).tolist()))
        source.read_box("w", box, found.view(np.uint8).data, first)
        assert np.array_equal(found, expected[first:last])


def test_chunks_that_do_not_hold_each_element_once_are_refused():
    """Two quarters of a square, each twice, have as many elements as the square."""
    assert cover_problem((4,), [Box((0,), (3,))])
    assert cover_problem((4,), [Box((0,), (0,))])
    assert cover_problem((4,), 2 * [Box((0,), (4,))])
    corners = [
        Box((0, 0), (2, 2)),
        Box((2, 2), (2, 2)),
    ]
    assert cover_problem((4, 4), corners)
    assert cover_problem((4, 4), corners + corners)
