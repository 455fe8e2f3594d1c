"""Snapshots in several parts are read as one file, are complete or ignored, and are moved as
one."""

import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checking import assert_same_tensors
from factories import (
    OTHER_RUN_ID,
    RUN_ID,
    read_snapshot,
    rewrite_snapshot,
    snapshot_files,
    split_snapshot,
    write_snapshot,
)
from safetensors.torch import load_file
from snapshots.recorded import Walk

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.errors import DirectoryError, FileFormatError, MismatchError
from posthoc_cli.snapshots import directory as directories
from posthoc_cli.snapshots.directory import (
    find_snapshots,
    inspect_directory,
    read_directory,
    remove_snapshot,
    set_aside,
    thin,
)
from posthoc_cli.snapshots.snapshot import Snapshot
from posthoc_cli.snapshots.tensorfile import Box, cover_problem
from posthoc_cli.snapshots.verify import verify

GRIDS = {"0.weight": (2, 2), "1.num_batches_tracked": (), "0.bias": (1,)}


@pytest.fixture
def unsplit(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "unsplit"))


def split_all(run: Path, how: str = "rows") -> list[Path]:
    """Split the snapshots of a run: all by rows or a grid, or every second one."""
    paths = snapshot_files(run)
    if how == "mixed":
        paths = paths[::2]
    grids = GRIDS if how == "grid" else None
    return [split_snapshot(path, 4, grids) for path in paths]


def parts_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("part-*"))


# --- results equal those from single files


@pytest.mark.parametrize("how", ["mixed", "unmeasured"])
def test_all_results_from_parts_equal_those_from_single_files(
    run: Path,
    unsplit: Path,
    how: str,
) -> None:
    """Without measurements in headers, the same sample is read from both."""
    if how == "unmeasured":
        for path in (*snapshot_files(run), *snapshot_files(unsplit)):
            rewrite_snapshot(path, measurements=None, sketch="")
    split_all(run, "grid" if how == "unmeasured" else how)
    expected = Run(unsplit)
    split = Run(run)
    for target in (0.15, 0.27):
        average = expected.average(target)
        other = split.average(target)
        assert_same_tensors(other, average)
        assert other.predicted_error == average.predicted_error is not None
    for part, whole in zip(split.snapshots, expected.snapshots, strict=True):
        assert part.measurements == whole.measurements
    curve = split.error_curve()
    assert np.array_equal(curve.predicted_error, expected.error_curve().predicted_error)
    assert pruned(split) == pruned(expected)
    assert split.check().is_fine
    info = split.info()
    of_files = expected.info()
    for key in ("parameters", "dtypes", "averaged", "problems"):
        assert info[key] == of_files[key]


def pruned(run: Run) -> list[tuple[float, float]]:
    gone = run.prune(keep=3, dry_run=True).to_delete
    return [(snapshot.t, snapshot.sigma_rel) for snapshot in gone]


def test_chunks_of_several_dtypes_are_read_as_the_widest(tmp_path: Path) -> None:
    narrow = torch.randn(3, 4).half()
    wide = 1e6 * torch.randn(2, 4)
    values = torch.cat([narrow.float(), wide])
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, {"w": values})
    first = parts_of(split_snapshot(path, 2))[0]
    assert load_file(first)["w"].shape == (3, 4)
    rewrite_snapshot(first, lambda held: held.update(w=narrow))
    (snapshot,) = read_directory(tmp_path)
    assert snapshot.entries["w"].dtype == "F32"
    assert torch.equal(snapshot.tensor("w"), values)
    rows = Box((2, 0), (2, 4))
    assert torch.equal(snapshot.tensor("w", rows), values[2:4])
    room = memoryview(bytearray(80))
    snapshot.read_many(["w"], room)
    assert room.tobytes() == values.numpy().tobytes()


def test_measurements_that_a_part_lacks_are_unknown(run: Path) -> None:
    folder = split_snapshot(snapshot_files(run)[-1], 4)
    assert directories.read_snapshot(folder).measurements is not None
    rewrite_snapshot(parts_of(folder)[1], measurements=None)
    assert directories.read_snapshot(folder).measurements is None


# --- incomplete snapshots, and parts that do not belong together


def test_an_incomplete_snapshot_is_a_leftover(run: Path) -> None:
    folder = split_snapshot(snapshot_files(run)[-1], 4)
    count = len(read_directory(run))
    parts_of(folder)[1].unlink()
    found = inspect_directory(run)
    assert len(found.snapshots) == count - 1
    assert found.problems == []
    assert found.incomplete == {folder: "3 of 4 parts"}
    checked = verify(run)
    assert checked.is_fine
    assert checked.leftovers == (folder,)
    assert f"{folder.name}: has 3 of 4 parts" in checked.notes
    assert not verify(folder).is_fine
    with pytest.raises(FileFormatError, match="is no complete snapshot: it has 3 of 4 parts"):
        directories.read_snapshot(folder)
    reason = r"no snapshots here; part-\S+: has 1 of 4 parts; name the directory"
    with pytest.raises(DirectoryError, match=reason):
        read_directory(folder)
    alone = run / "alone"
    alone.mkdir()
    folder.rename(alone / folder.name)
    hint = "has 3 of 4 parts; all processes .* write to one directory, on a file system"
    with pytest.raises(DirectoryError, match=hint):
        read_directory(alone)


def with_fields(**fields: object) -> Callable[[Path], None]:
    return lambda part: rewrite_snapshot(part, **fields)


def elsewhere(**changes: tuple[int, ...]) -> Callable[[Path], None]:
    def harm(part: Path) -> None:
        chunks = dict(read_snapshot(part).chunks)
        chunks["0.weight"] = replace(chunks["0.weight"], **changes)
        rewrite_snapshot(part, chunks=chunks)

    return harm


FAULTS: list[tuple[Callable[[Path], None], str]] = [
    (with_fields(run_id=OTHER_RUN_ID), "differ in 'run_id'"),
    (
        elsewhere(shape=(21, 30)),
        r"'0.weight': its chunks are of the shapes \[\(20, 30\), \(21, 30\)\]",
    ),
    (
        elsewhere(offset=(6, 0)),
        "tensor '0.weight': its chunks do not hold each element exactly once",
    ),
    (
        elsewhere(offset=(16, 0)),
        r"'0.weight': shape \[5, 30\] at \[16, 0\] is not within \[20, 30\]",
    ),
    (with_fields(part=(1, 4)), "are both part 1 of 4"),
    (with_fields(part=None, chunks={}), "is in a folder of parts but is not a part of a snapshot"),
    (lambda part: os.truncate(part, part.stat().st_size - 1), "truncated"),
]


@pytest.mark.parametrize(("harm", "message"), FAULTS)
def test_parts_that_do_not_belong_together_are_named(
    run: Path,
    harm: Callable[[Path], None],
    message: str,
) -> None:
    count = len(snapshot_files(run))
    folder = split_snapshot(snapshot_files(run)[-1], 4)
    bad = parts_of(folder)[1]
    harm(bad)
    named = folder if "its chunks " in message else bad
    with pytest.raises((FileFormatError, MismatchError), match=message) as raised:
        find_snapshots(run)
    assert named.name in str(raised.value)
    assert str(folder) in str(raised.value)
    found = verify(run)
    assert not found.is_fine
    for path in found.broken:
        assert folder in path.parents
    for problem in found.problems:
        assert folder.name in problem
    shutil.move(folder, run.parent)
    assert len(read_directory(run)) == count - 1


def test_parts_of_another_attempt_neither_complete_a_snapshot_nor_hide_one(
    run: Path,
    unsplit: Path,
) -> None:
    folder = split_snapshot(snapshot_files(run)[-1], 4)
    other = split_snapshot(snapshot_files(unsplit)[-1], 2)
    first, second = parts_of(other)
    shutil.copy(first, folder)
    assert len(read_directory(run)[-1].files) == 4
    shutil.copy(second, folder)
    with pytest.raises(MismatchError, match="are parts of two complete snapshots"):
        read_directory(run)
    for part in (first, second):
        (folder / part.name).unlink()
    # it is being replaced by one on the schedule
    rewrite_snapshot(parts_of(folder)[0], off_schedule=True)
    assert list(inspect_directory(run).incomplete) == [folder]


# --- moved as one


def test_pruning_and_thinning_delete_folders(run: Path) -> None:
    split_all(run, "mixed")
    done = Run(run).prune(keep=3)
    for snapshot in done.to_delete:
        assert not os.path.lexists(snapshot.path)
    stored = read_directory(run)
    assert paths(stored) == paths(done.kept)
    left = thin(stored, 2)
    assert paths(read_directory(run)) == paths(left)
    assert len(left) < len(stored)


def paths(snapshots: Sequence[Snapshot]) -> list[Path]:
    return [snapshot.path for snapshot in snapshots]


def test_folders_are_set_aside_and_not_overwritten(run: Path) -> None:
    folder = split_snapshot(snapshot_files(run)[-1], 4)
    newest = directories.read_snapshot(folder)
    (moved,) = set_aside([newest])
    assert moved == run / "superseded" / folder.name
    shutil.copytree(moved, folder)  # a later snapshot of the same time
    assert set_aside([newest]) == [moved.with_name(f"{folder.name}.1")]
    assert inspect_directory(run).superseded == verify(run).superseded == 2


def test_a_folder_with_another_file_in_it_stays(run: Path) -> None:
    folder = split_snapshot(snapshot_files(run)[-1], 4)
    (folder / "notes.txt").write_text("mine")
    remove_snapshot(folder)
    remove_snapshot(run / "nothing")
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert inspect_directory(run).incomplete == {folder: "no parts"}


def test_the_next_training_removes_incomplete_snapshots(
    run: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first, second, third = (split_snapshot(path, 4) for path in snapshot_files(run)[:3])
    for folder in (first, second):
        parts_of(folder)[0].unlink()
    leftover = third / ".ema-1.tmp"
    leftover.write_text("half")
    os.utime(leftover, (0, 0))
    walk = Walk()
    with PostHocEMA.from_path(run, walk.model, step=60) as tracker:
        walk.train(tracker, 10)
    found = verify(run)
    assert found.is_fine
    assert found.leftovers == ()
    assert len(read_directory(run)) == 12
    note = f"{first}: has 3 of 4 parts, left by an interrupted training, and is removed"
    assert note in caplog.text
    assert not first.exists()


# --- chunks of tensors: boxes assembled from any chunks equal NumPy's own indexing

SHAPES = [
    (),
    (1,),
    (7,),
    (5, 3),
    (4, 1, 6),
    (3, 4, 2, 2),
    (0, 3),
]


def cut_randomly(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Box]:
    """Return a grid of boxes with random cuts, some of them empty, in random order."""
    intervals = [itertools.pairwise(cut_length(rng, length)) for length in shape]
    boxes = []
    for cell in itertools.product(*intervals):
        offset = tuple(begin for begin, _ in cell)
        lengths = tuple(end - begin for begin, end in cell)
        boxes.append(Box(offset, lengths))
    rng.shuffle(boxes)  # type: ignore[arg-type]
    return boxes


def cut_length(rng: np.random.Generator, length: int, most: int = 2) -> list[int]:
    """Return the ends of random intervals that fill a length, in order."""
    cuts = rng.integers(0, length + 1, rng.integers(0, most + 1))
    return sorted([0, length, *cuts.tolist()])


@pytest.mark.parametrize("seed", range(2))
def test_any_box_is_assembled_from_any_chunks(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {}
    grids = {}
    for shape in SHAPES:
        name = str(shape)
        tensors[name] = torch.randint(2**62, shape)
        grids[name] = tuple(rng.integers(1, 4, len(shape)).tolist())
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, tensors)
    split_snapshot(path, 81, grids)
    (source,) = read_directory(tmp_path)
    for name, tensor in tensors.items():
        for box in cut_randomly(rng, tuple(tensor.shape)):
            index = tuple(map(slice, box.offset, box.end))
            expected = tensor.numpy()[index].reshape(-1)
            found = np.empty_like(expected)
            for begin, end in itertools.pairwise(cut_length(rng, box.size, most=4)):
                room = found[begin:end].view(np.uint8)
                source.read_box(name, box, room.data, begin)
            assert np.array_equal(found, expected)


def of_row(begin: int, end: int) -> Box:
    return Box((begin,), (end - begin,))


SQUARES = [
    Box((0, 0), (2, 2)),
    Box((2, 2), (2, 2)),
]
"""Two of the four quarters of a square of 4 by 4."""


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((0, 3), []),
        ((4,), [of_row(0, 3), of_row(2, 4)]),
        ((4,), [of_row(0, 5)]),
        ((4, 4), SQUARES),
        ((4, 4), SQUARES + SQUARES),
    ],
)
def test_chunks_that_do_not_cover_a_tensor_once_are_refused(
    shape: tuple[int, ...],
    boxes: list[Box],
) -> None:
    assert cover_problem(shape, boxes) == "its chunks do not hold each element exactly once"
