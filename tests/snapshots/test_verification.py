"""Verification finds every change since a file was written, names the file, and reports nothing
else."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from checking import refused
from factories import RUN_ID, flip_bit, forge, rewrite_snapshot, snapshot_files, write_snapshot
from safetensors.torch import load_file, save_file
from snapshots.recorded import failing

from posthoc_cli import Run, export_file
from posthoc_cli.errors import DirectoryError
from posthoc_cli.snapshots.outputs import INDEX_NAME
from posthoc_cli.snapshots.tensorfile import BLOCK, read_file
from posthoc_cli.snapshots.verify import Verification, verify

W = {"w": torch.ones(3)}


@pytest.fixture
def output(run: Path, tmp_path: Path) -> Path:
    return synthesize(run, 0.1, tmp_path / "output.safetensors")


@pytest.fixture
def shards(output: Path, tmp_path: Path) -> Path:
    export_file(output, tmp_path / "shards", max_shard_size="1KB")
    return tmp_path / "shards"


def synthesize(run: Path, sigma_rel: float, out: Path) -> Path:
    Run(run).write(sigma_rel, out)
    return out


def verified(path: Path) -> Verification:
    advances: list[int] = []

    @contextmanager
    def bar(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
        yield advances.append

    found = verify(path, bar)
    assert sum(advances) == found.nbytes or found.broken
    return found


def notes(path: Path) -> tuple[str, ...]:
    found = verified(path)
    assert found.is_fine, found
    return found.notes


def wrong(path: Path) -> dict[str, tuple[str, str]]:
    """Return the state and detail of files that are not fine, by name."""
    found = verified(path)
    assert found.is_fine == (not found.broken) or found.problems
    files = {}
    for report in found.files:
        if not report.is_fine:
            files[report.path.name] = (report.state, report.detail)
    return files


def only_wrong(path: Path) -> tuple[str, str]:
    (found,) = wrong(path).values()
    return found


# --- intact files


def test_outputs_in_any_layout_and_foreign_files(
    run: Path,
    output: Path,
    shards: Path,
    tmp_path: Path,
) -> None:
    for path in (output, shards, shards / INDEX_NAME, next(shards.glob("*.safetensors"))):
        found = verified(path)
        assert found.is_fine, found
        assert {report.state for report in found.files} == {"intact"}
        assert {report.what for report in found.files} == {"output sigma_rel 0.1 at t = 60"}
    count = len(list(shards.glob("*.safetensors")))
    assert len(verified(shards / INDEX_NAME).files) == len(verified(shards).files) == count
    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.full((3,), torch.nan)}, foreign)
    found = verified(foreign)
    assert found.is_fine
    assert found.files[0].what == "foreign"
    assert found.files[0].state == "unchecked"
    found = verified(tmp_path)  # the folder of shards, the output and the foreign file
    assert found.is_fine
    assert len(found.files) == count + 2


def harm(path: Path, name: str) -> None:
    entry = read_file(path).entries[name]
    flip_bit(path, entry.begin + entry.nbytes - 1)


def test_a_payload_is_read_once_from_beginning_to_end_whatever_its_tensors(tmp_path: Path) -> None:
    """It takes constant memory: a bounded number of blocks is in flight."""
    large = [0, 1, 3, 1_000_000, 2**21, 2**21 + 1, 5_000_000]
    sizes = [*large, *[7] * 2000, 1_048_575]
    values = {}
    for number, size in enumerate(sizes):
        values[str(number)] = torch.randn(size).half()
    values["wide"] = torch.randn(300_001)
    values["n"] = torch.tensor(3)
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, values)
    advances = list[int]()
    read_file(path).verify(advances.append)
    assert sum(advances) == path.stat().st_size
    assert max(advances) <= 4 * BLOCK
    for name in ("1500", "5", "wide"):  # each lies before the ones harmed so far
        harm(path, name)
        detail = f"tensor '{name}' is damaged: its checksum does not match"
        assert only_wrong(path) == ("damaged", detail)


# --- damage


@pytest.mark.parametrize("place", [3, 0.5, -1])
def test_a_flip_anywhere_is_found(run: Path, output: Path, shards: Path, place: float) -> None:
    """No other file is reported; `torture` flips every bit of small files."""
    for path in (snapshot_files(run)[3], output, min(shards.glob("*.safetensors"))):
        position = place if isinstance(place, int) else int(path.stat().st_size * place)
        flip_bit(path, position)
        found = wrong(path.parent)
        assert [*found] == [path.name]
        assert found[path.name][0] == "damaged"
        flip_bit(path, position)


# --- shards


def problems(path: Path) -> list[str]:
    found = verified(path)
    assert not found.broken
    assert found.is_fine == (not found.problems)
    return list(found.problems)


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"weight_map": {}}, "or an empty one"),
        ({"metadata": {"total_size": 1}}, "its metadata must be the total_size"),
    ],
)
def test_an_index_that_is_altered(shards: Path, changes: dict[str, Any], detail: str) -> None:
    index = shards / INDEX_NAME
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | changes))
    (problem,) = problems(shards)
    assert detail in problem


def test_an_index_that_names_another_shard(shards: Path) -> None:
    index = shards / INDEX_NAME
    content = json.loads(index.read_text())
    first = min(content["weight_map"].values())
    content["weight_map"] = dict.fromkeys(content["weight_map"], first)
    index.write_text(json.dumps(content))
    (problem,) = problems(shards)
    assert "is not in it, as the index says" in problem


def test_a_shard_that_is_missing(shards: Path) -> None:
    assert notes(shards) == ()
    first = min(shards.glob("*.safetensors"))
    first.unlink()
    assert problems(shards) == [f"{first}: cannot be opened: no such file or directory"]


def test_shards_of_two_outputs(run: Path, shards: Path, tmp_path: Path) -> None:
    others = tmp_path / "others"
    other = synthesize(run, 0.2, tmp_path / "other.safetensors")
    export_file(other, others, max_shard_size="1KB")
    first, *_, last = sorted(shards.glob("*.safetensors"))
    kept = last.read_bytes()
    used = read_file(last).content["snapshots"]

    def check(changed: Path) -> None:
        (problem,) = problems(shards)
        assert changed.name in problem
        assert "are not of one model" in problem

    shutil.copy(others / last.name, last)
    check(last)
    last.write_bytes(kept)
    forge(last, {"snapshots": json.dumps(used[1:])})
    check(last)
    save_file(deepcopy(load_file(last)), last)
    check(last)
    last.write_bytes(kept)
    shutil.copy(others / first.name, first)
    check(first)


def test_clocks_that_contradict_each_other_are_of_two_trainings(run: Path) -> None:
    rewrite_snapshot(snapshot_files(run)[0], step=11)
    (problem,) = problems(run)
    assert problem.endswith("step 10 was at t = 10, and step 11 at t = 10")


# --- errors of the system


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (errno.EACCES, "unreadable"),
        (errno.EIO, "damaged"),
    ],
)
def test_what_cannot_be_read_is_reported_and_the_others_are_read(
    run: Path,
    code: int,
    state: str,
) -> None:
    refused = snapshot_files(run)[0]
    os.mkfifo(run / "fifo.safetensors")
    (run / "folder.safetensors").mkdir()
    (run / "zero.safetensors").symlink_to("/dev/zero")
    (run / "nowhere.safetensors").symlink_to("absent")
    (run / "loop.safetensors").symlink_to("loop.safetensors")
    with failing("open", code, lambda path: path == refused):
        found = wrong(run)
    assert found.pop(refused.name) == (state, f"cannot be opened: {os.strerror(code).lower()}")
    assert {state for state, _ in found.values()} == {"damaged"}
    assert found["fifo.safetensors"][1] == found["zero.safetensors"][1] == "is not a regular file"
    names = {name.removesuffix(".safetensors") for name in found}
    assert names == {"fifo", "folder", "zero", "nowhere", "loop"}


def test_a_file_that_a_training_deletes_meanwhile_is_no_error(run: Path) -> None:
    gone = snapshot_files(run)[0]

    @contextmanager
    def bar(_what: str, _total: int) -> Iterator[Callable[[int], None]]:
        gone.unlink()  # after the listing
        yield lambda _: None

    found = verify(run, bar)
    assert found.is_fine
    assert gone not in {report.path for report in found.files}


def test_no_pickle_is_opened(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "only" / "model.pt"
    path.parent.mkdir()
    path.write_bytes(b"\x80\x04cposix\nsystem\n")
    with refused(str(path), "has no checksums; name a snapshot", "no pickle is opened here"):
        verify(path)
    with pytest.raises(DirectoryError, match="no pickle is opened here"):
        verify(path.parent)
    shutil.copy(path, run)
    assert "(.pt and the like) have no checksums and were not read: 1" in notes(run)[0]
