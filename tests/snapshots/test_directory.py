"""A directory holds one run, whose files belong together; adding to it loses nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from factories import OTHER_RUN_ID, RUN_ID, contents, write_run, write_snapshot
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posthoc_cli.errors import DirectoryError, MismatchError
from posthoc_cli.snapshots.directory import inspect_directory, read_directory, set_aside, snapshot_path, thin
from posthoc_cli.snapshots.sources import TrackedTensor, with_sampled_measurements

W = {"w": torch.ones(2, 3)}


def write_times(directory: Path, times: list[float], sigma_rels: tuple[float, ...] = (0.05,)) -> None:
    for t in times:
        for sigma_rel in sigma_rels:
            write_snapshot(directory, t, sigma_rel, RUN_ID, {"w": torch.full((2, 3), float(t))})


def times_in(directory: Path) -> list[float]:
    return [snapshot.t for snapshot in read_directory(directory)]


# --- what belongs together


def test_snapshots_are_ordered_by_time_then_sigma_rel_whatever_their_names(tmp_path: Path) -> None:
    for name, t, sigma_rel in (("a", 30, 0.05), ("b", 20, 0.28), ("c", 20, 0.05), ("d", 100, 0.05)):
        write_snapshot(tmp_path, t, sigma_rel, RUN_ID, W, name=f"{name}.safetensors")
    assert [s.path.stem for s in read_directory(tmp_path)] == ["c", "b", "a", "d"]
    for name in "ac":  # any snapshot can be moved or deleted
        (tmp_path / f"{name}.safetensors").rename(tmp_path / f"0{name}.safetensors")
    (tmp_path / "b.safetensors").unlink()
    assert [s.path.stem for s in read_directory(tmp_path)] == ["0c", "0a", "d"]


def test_outputs_temporary_hidden_and_other_files_next_to_snapshots_are_left_alone(
    tmp_path: Path, small: Callable[[str], Path]
) -> None:
    small("output")
    safetensors.torch.save_file(W, tmp_path / "foreign.safetensors")
    for name in (".ema-0123.tmp", ".ema.lock", "._x.safetensors", "notes.txt", "old.pt"):
        (tmp_path / name).write_bytes(b"junk")
    (tmp_path / "superseded").mkdir()
    (tmp_path / "superseded" / "x.safetensors").write_bytes(b"junk")
    before = contents(tmp_path)
    write_times(tmp_path, [10, 20, 30])
    thin(read_directory(tmp_path), 1)
    assert times_in(tmp_path) == [30]
    assert contents(tmp_path).items() > before.items()


@pytest.mark.parametrize(
    ("values", "fields", "message"),
    [
        (W, {"run_id": OTHER_RUN_ID}, "different runs"),
        (W, {"t_unit": "images"}, "count time in '(steps|images)' and '(steps|images)'"),
        ({"w": torch.ones(3, 2)}, {}, r"tensor 'w' has the shapes \[\d, \d\] and \[\d, \d\]"),
        (W, {"tensors": {"w": TrackedTensor("average", "BF16")}}, "tensor 'w' is average of .* and average of"),
        (W, {"tensors": {"w": TrackedTensor("copy", "F32")}}, "is (average of F32 and copy|copy of F32 and a)"),
        ({"v": W["w"]}, {}, "tensor 'v' is missing in"), ({}, {}, "tensor 'w' is missing in"),
        ({**W, "more\n": W["w"]}, {}, r"tensor 'more\\n' is missing in"),
        (W, {"aliases": {"tied": "w"}}, "tie different names"), (W, {"sigma_rels": (0.05, 0.2)}, "track the profiles"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [True, False])
def test_snapshots_that_do_not_belong_together_never_mix(
    tmp_path: Path, values: dict[str, torch.Tensor], fields: dict[str, Any], message: str, last: bool
) -> None:
    write_times(tmp_path, [20, 30])
    odd = write_snapshot(tmp_path, 40 if last else 10, 0.05, **{"run_id": RUN_ID, "values": values, **fields})
    with pytest.raises(MismatchError, match=message) as caught:
        read_directory(tmp_path)
    first = snapshot_path(tmp_path, 20, 0.05)
    assert caught.value.subject == " and ".join(map(str, (first, odd) if last else (odd, first)))
    assert str(caught.value).isprintable()


AS_F32 = {"w": TrackedTensor("average", "F32")}


@pytest.mark.parametrize(
    "fields", [{}, {"sigma_rel": 0.28}, {"sigma_rels": (0.05,)}, {"values": {"w": W["w"].half()}, "tensors": AS_F32}]
)
def test_profiles_and_stored_dtypes_may_change_within_a_run(tmp_path: Path, fields: dict[str, Any]) -> None:
    """A run may be resumed without a deleted profile, and a value too large for float16 is stored in float32."""
    write_times(tmp_path, [20, 30])
    write_snapshot(tmp_path, 40, **{"sigma_rel": 0.05, "run_id": RUN_ID, "values": W, **fields})
    assert times_in(tmp_path) == [20, 30, 40]


# --- inspection


def test_an_inspection_lists_every_problem_and_continues(tmp_path: Path) -> None:
    write_times(tmp_path, [10, 20], (0.05, 0.28))
    write_times(tmp_path, [5, 30])  # at earlier times thinning keeps different profiles
    write_snapshot(tmp_path, 40, 0.05, OTHER_RUN_ID, W, name="foreign.safetensors")
    first = snapshot_path(tmp_path, 10, 0.05)
    double = shutil.copy(first, tmp_path / "double.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(first.read_bytes()[:-1])
    (tmp_path / ".ema-0123.tmp").touch()
    (tmp_path / "superseded").mkdir()
    (tmp_path / "superseded" / "x.safetensors").touch()
    found = inspect_directory(tmp_path)
    assert (len(found.snapshots), len(found.problems)) == (8, 3)
    damaged, other, both = map(str, found.problems)
    assert "damaged.safetensors: truncated" in damaged and "different runs" in other
    assert both == f"{first} and {double}: both hold sigma_rel 0.05 at t = 10; remove one"
    assert found.notes == ("t = 30, the newest: no snapshot of sigma_rel 0.28",)
    assert (found.leftovers, found.superseded) == ([tmp_path / ".ema-0123.tmp"], 1)


# --- names

some_times = st.integers(1, 2**53).map(float) | st.floats(1e-6, 1e15) | st.integers(1, 10**9).map(lambda n: n / 64)


@settings(deadline=None)
@given(st.lists(some_times, min_size=2, max_size=20, unique=True))
@example([1000.0, 12.5])
def test_names_sort_by_time(times: list[float]) -> None:
    paths = [snapshot_path(Path(), t, 0.05).name for t in sorted(times)]
    assert paths == sorted(paths)
    assert len(set(paths)) == len(times)
    assert all(len(path) < 100 and "/" not in path for path in paths)
    if times == [1000.0, 12.5]:
        assert [name.lstrip("0") for name in paths] == ["12.5-0.05.safetensors", "1000-0.05.safetensors"]


# --- adding


def test_thinning_keeps_what_reconstruction_needs_by_what_headers_measured(tmp_path: Path) -> None:
    """If a network moves only in the middle of training, all other snapshots but the nearest are alike."""
    moves = np.zeros((100, 300))
    moves[40:60] = np.random.default_rng(0).normal(size=(20, 300))
    trajectory = [{"w": values} for values in np.cumsum(moves, axis=0)]
    write_run(tmp_path, trajectory, range(10, 101, 10), (0.05, 0.28))
    snapshots = read_directory(tmp_path)
    measured = [
        replace(snapshot, measurements=average.measurements)
        for snapshot, average in zip(snapshots, with_sampled_measurements(snapshots), strict=True)
    ]
    left = thin(measured, 3)
    assert sum(40 <= s.t <= 80 for s in left) >= 3  # it hardly matters which earlier snapshot is left


def test_thinning_goes_by_headers_and_neither_by_names_nor_by_dates(tmp_path: Path) -> None:
    for name, t in (("z", 10), ("y", 20), ("x", 30)):
        path = write_snapshot(tmp_path, t, 0.05, RUN_ID, W, name=f"{name}.safetensors")
        os.utime(path, (1e9 - t, 1e9 - t))
    assert len(thin(read_directory(tmp_path), 3)) == len(times_in(tmp_path)) == 3
    thin(read_directory(tmp_path), 1)
    assert times_in(tmp_path) == [30]


def test_later_snapshots_are_set_aside_and_never_overwritten_or_deleted(tmp_path: Path) -> None:
    superseded = tmp_path / "superseded"
    assert set_aside([]) == []
    assert not superseded.exists()
    for attempt in range(3):
        for t in (10, 20, 30):
            if t > 10 or attempt == 0:
                write_snapshot(tmp_path, t, 0.05, RUN_ID, {"w": torch.full((2, 3), float(attempt))})
        moved = set_aside([s for s in read_directory(tmp_path) if s.t > 10])
        again = f".{attempt}" if attempt else ""
        assert moved == [superseded / f"00000000000000{t}-0.05{again}.safetensors" for t in (20, 30)]
    assert len(list(superseded.iterdir())) == 6
    assert {safetensors.torch.load_file(path)["w"][0, 0].item() for path in superseded.iterdir()} == {0.0, 1.0, 2.0}
    assert times_in(tmp_path) == [10]


def test_links_in_the_way_are_neither_overwritten_nor_followed(tmp_path: Path) -> None:
    write_times(tmp_path / "run", [10, 20])
    superseded, elsewhere = tmp_path / "run" / "superseded", tmp_path / "elsewhere"
    elsewhere.mkdir()
    for make in (lambda: superseded.symlink_to(elsewhere), lambda: superseded.write_text("mine")):
        superseded.unlink(missing_ok=True)
        make()
        with pytest.raises(DirectoryError, match=f"^{superseded}: is a link or no directory; .* move it away"):
            set_aside(read_directory(tmp_path / "run"))
    assert times_in(tmp_path / "run") == [10, 20]
    superseded.unlink()
    superseded.mkdir()
    link = superseded / snapshot_path(tmp_path, 20, 0.05).name
    link.symlink_to("nowhere")
    (moved,) = set_aside([s for s in read_directory(tmp_path / "run") if s.t > 10])
    assert link.is_symlink()
    assert moved != link
