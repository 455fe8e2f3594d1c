"""Verification finds every change since a file was written, names the file, and reports nothing
else."""

import errno
import json
import os
from contextlib import contextmanager

import pytest
import torch
from checking import refused
from factories import (
    INDEX,
    RUN_ID,
    flip_bit,
    forge,
    rewrite_snapshot,
    snapshot_files,
    write_snapshot,
)
from safetensors.torch import load_file, save_file
from snapshots.recorded import failing

from posthoc_cli import Run, export_file
from posthoc_cli.errors import DirectoryError
from posthoc_cli.snapshots.entry import BLOCK
from posthoc_cli.snapshots.tensorfile import read_file


@pytest.fixture
def output(run, tmp_path):
    path = tmp_path / "output.safetensors"
    Run(run).write(0.1, path)
    return path


@pytest.fixture
def shards(output, tmp_path):
    export_file(output, tmp_path / "shards", max_shard_size="1KB")
    return tmp_path / "shards"


def shards_in(folder):
    return sorted(folder.glob("*.safetensors"))


def wrong(path):
    """Return the state and detail of files that are not fine, by name."""
    files = {}
    for report in Run(path).check().files:
        if not report.is_fine:
            files[report.path.name] = (report.state, report.detail)
    return files


# --- intact files


def test_outputs_in_any_layout_are_intact(output, shards):
    first, *_ = shards_in(shards)
    for path in (output, shards, shards / INDEX, first):
        found = Run(path).check()
        assert found.is_fine, found
        assert {report.state for report in found.files} == {"intact"}
        assert {report.what for report in found.files} == {"output sigma_rel 0.1 at t = 60"}
    everything = Run(output.parent).check()  # the folder of shards and the output
    assert len(everything.files) == len(shards_in(shards)) + 1


def test_a_foreign_file_is_unchecked(tmp_path):
    save_file({"w": torch.full((3,), torch.nan)}, tmp_path / "foreign.safetensors")
    (report,) = Run(tmp_path).check().files
    assert report.is_fine
    assert report.what == "foreign"
    assert report.state == "unchecked"


def test_a_payload_is_read_once_from_beginning_to_end_whatever_its_tensors(tmp_path):
    """It takes constant memory: a bounded number of blocks is in flight."""
    sizes = [0, 1, 2**21 + 1, 5_000_000, *[7] * 200]
    values = {str(number): torch.randn(size).half() for number, size in enumerate(sizes)}
    path = write_snapshot(tmp_path, 10, 0.05, RUN_ID, values | {"n": torch.tensor(3)})
    advances = list[int]()
    read_file(path).verify(advances.append)
    assert sum(advances) == path.stat().st_size
    assert max(advances) <= 4 * BLOCK


# --- damage


@pytest.mark.parametrize("place", [3, 0.5, -1])
def test_a_flip_anywhere_is_found(run, output, shards, place):
    """No other file is reported; `torture` flips every bit of small files."""
    first, *_ = shards_in(shards)
    for path in (snapshot_files(run)[3], output, first):
        position = place if isinstance(place, int) else int(path.stat().st_size * place)
        flip_bit(path, position)
        found = wrong(path.parent)
        assert [*found] == [path.name]
        assert found[path.name][0] == "damaged"
        flip_bit(path, position)


# --- shards


def problem_of(path):
    """Return the only problem, where no file is broken."""
    found = Run(path).check()
    assert not found.broken
    assert not found.is_fine
    (problem,) = found.problems
    return problem


def test_an_index_with_another_size(shards):
    index = shards / INDEX
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] += 1
    index.write_text(json.dumps(content))
    assert "total_size" in problem_of(shards)


def test_an_index_that_names_another_shard(shards):
    index = shards / INDEX
    content = json.loads(index.read_text())
    first = min(content["weight_map"].values())
    content["weight_map"] = dict.fromkeys(content["weight_map"], first)
    index.write_text(json.dumps(content))
    assert "as the index says" in problem_of(shards)


def test_a_shard_that_is_missing(shards):
    first, *_ = shards_in(shards)
    first.unlink()
    assert problem_of(shards).startswith(f"{first}: ")


def by_another_synthesis(shard):
    used = read_file(shard).content["snapshots"]
    forge(shard, {"snapshots": json.dumps(used[1:])})


def by_another_program(shard):
    values = {name: value.clone() for name, value in load_file(shard).items()}
    save_file(values, shard)


@pytest.mark.parametrize("write", [by_another_synthesis, by_another_program])
@pytest.mark.parametrize("number", [0, -1])
def test_shards_of_two_outputs(shards, write, number):
    changed = shards_in(shards)[number]
    write(changed)
    assert changed.name in problem_of(shards)


def test_clocks_that_contradict_each_other_are_of_two_trainings(run):
    rewrite_snapshot(snapshot_files(run)[0], step=11)
    assert "step 11 at t = 10" in problem_of(run)


# --- errors of the system


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (errno.EACCES, "unreadable"),
        (errno.EIO, "damaged"),
    ],
)
def test_what_cannot_be_read_is_reported(run, code, state):
    refused = snapshot_files(run)[0]
    with failing("open", code, lambda path: path == refused):
        found = wrong(run)
    detail = f"cannot be opened: {os.strerror(code).lower()}"
    assert found == {refused.name: (state, detail)}


def test_pipes_folders_and_broken_links_are_damaged_files(run):
    os.mkfifo(run / "fifo.safetensors")
    (run / "folder.safetensors").mkdir()
    (run / "zero.safetensors").symlink_to("/dev/zero")
    (run / "nowhere.safetensors").symlink_to("absent")
    (run / "loop.safetensors").symlink_to("loop.safetensors")
    found = wrong(run)
    assert {state for state, _ in found.values()} == {"damaged"}
    assert found["fifo.safetensors"][1] == found["zero.safetensors"][1] == "is not a regular file"
    assert len(found) == 5


def test_a_file_that_a_training_deletes_meanwhile_is_no_error(run):
    gone = snapshot_files(run)[0]

    @contextmanager
    def bar(_what, _total):
        gone.unlink()  # after the listing
        yield lambda _: None

    found = Run(run).check(bar)
    assert found.is_fine
    assert gone not in {report.path for report in found.files}


def test_no_pickle_is_opened(tmp_path):
    path = tmp_path / "model.pt"
    path.write_bytes(b"\x80\x04cposix\nsystem\n")
    with refused(path):
        Run(path).check()
    with refused(tmp_path, kind=DirectoryError):
        Run(tmp_path).check()


def test_a_pickle_beside_snapshots_is_noted(run):
    (run / "model.pt").touch()
    (note,) = Run(run).check().notes
    assert note.endswith(": 1")
