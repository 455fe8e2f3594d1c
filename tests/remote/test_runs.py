"""Runs and checkpoints in a bucket: each command does the same as with the files on a disk; nothing
is written to a bucket."""

import shutil
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors
from factories import contents, random_walk, split_snapshot, write_run
from safetensors.torch import save_file

from posthoc_cli import Run, files
from posthoc_cli.errors import FileFormatError, PostHocError
from posthoc_cli.remote import store
from posthoc_cli.remote.store import remote_path

STEPS = (10, 20, 30, 40)
BUCKET = "s3://bucket"
RUN = f"{BUCKET}/run"
FILE = f"{RUN}/0000000000000040-0.05.safetensors"


@pytest.fixture(scope="session")
def _made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    shapes = {
        "large": (400, 350),
        "small": (7,),
        "scalar": (),
    }
    walk = random_walk(max(STEPS), shapes)
    (folder / "run").mkdir()
    write_run(folder / "run", walk, STEPS, dtype=torch.float16)
    shutil.copytree(folder / "run", folder / "parted")
    for path in sorted((folder / "parted").iterdir()):
        split_snapshot(path)
    (folder / "pickles").mkdir()
    for step in STEPS:
        weights = {"w": torch.full((3,), float(step))}
        place = folder / f"folders/checkpoint-{step}"
        place.mkdir(parents=True)
        save_file(weights, place / "model.safetensors")
        content = {"state_dict": weights, "global_step": step}
        torch.save(content, folder / f"pickles/step{step}.pt")
    return folder


@pytest.fixture
def bucket(_made, serve, tmp_path):
    """The folder of a bucket with a run, the same in parts, and checkpoints of two layouts."""
    folder = Path(shutil.copytree(_made, tmp_path / "served/bucket"))
    serve(folder.parent)
    return folder


@pytest.mark.parametrize("name", ["run", "parted"])
def test_averages_of_a_run_in_a_bucket_are_those_of_its_copy_on_a_disk(bucket, name):
    local = Run(bucket / name)
    remote = Run(f"{BUCKET}/{name}")
    wanted = local.average(0.15)
    found = remote.average(0.15)
    assert found.predicted_error == wanted.predicted_error
    assert_same_tensors(found, wanted)
    other = {"path": "", "bytes": 0}
    assert remote.info() | other == local.info() | other


@pytest.mark.parametrize("place", ["folders", "folders/checkpoint-*", "pickles/step*.pt"])
@pytest.mark.usefixtures("bucket")
def test_checkpoints_in_a_bucket_are_averaged(place):
    found = Run(f"{BUCKET}/{place}").average("last:3")
    assert found["w"].tolist() == [30.0, 30.0, 30.0]


@pytest.mark.usefixtures("bucket")
def test_each_command_takes_a_url(ema, tmp_path):
    synthesis = ["synthesize", RUN, "--sigma-rel", "0.1", "--out", tmp_path / "out.safetensors"]
    assert ema("info", RUN, "--json").json["path"] == RUN
    assert "would read " in ema(*synthesis, "--dry-run").out
    assert ema(*synthesis).code == 0
    assert "all intact" in ema("verify", f"{BUCKET}/parted").out
    assert ema("export", FILE, "--out", tmp_path / "one.pt").code == 0
    assert ema("error-plot", RUN, "--out", tmp_path / "error.png").code == 0


# --- nothing is written to a bucket


def test_a_run_in_a_bucket_is_not_pruned_there(bucket, ema):
    before = contents(bucket)
    assert ema("prune", RUN, "--keep", "2", "--dry-run").code == 0
    wanted = f"directory {RUN}: is a URL; must be a path on a file system of this machine"
    assert wanted in ema("prune", RUN, "--keep", "2", "--yes").error
    assert contents(bucket) == before


@pytest.mark.parametrize(
    "command",
    [
        ["synthesize", RUN, "--sigma-rel", "0.1", "--out", "s3://bucket/a.safetensors"],
        ["export", FILE, "--out", "hf://org/model/a.pt"],
        ["import", RUN, "--out", "s3://bucket/new"],
    ],
)
@pytest.mark.usefixtures("bucket")
def test_an_output_in_a_store_is_refused(ema, command):
    error = ema(*command).error
    assert f"out {command[-1]}: is a URL; must be a path on a file system of this machine" in error
    assert "copy it from or to the store by `rclone copy` or `aws s3 cp`" in error


def test_an_import_on_this_machine_refers_to_objects(bucket, tmp_path, ema):
    run = tmp_path / "run"
    command = ("import", f"{BUCKET}/folders", "--out", run)
    imported = ema(*command)
    assert f"wrote a run that refers to these files: {run}" in imported.out
    assert Run(run).average("last:2")["w"].tolist() == [35.0, 35.0, 35.0]
    again = ema(*command)
    assert "is this import already" in again.out
    (bucket / "folders/checkpoint-20/model.safetensors").write_bytes(b"replaced")
    with pytest.raises(FileFormatError, match="was replaced, or has changed, since"):
        Run(run).average("last:2")


# --- objects and paths


def test_an_object_is_read_by_ranges(bucket):
    url = f"{BUCKET}/a b%20+ü"
    path = bucket / "a b%20+ü"
    path.write_bytes(b"0123456789")
    data, info = store.get(url, 2, 100)
    assert bytes(data) == b"23456789"
    assert info.size == 10
    assert info == store.head(url)
    assert bytes(store.get(url, 10, 12)[0]) == b""
    with pytest.raises(FileNotFoundError):
        store.head(f"{url}/none")


def test_an_object_that_was_listed_and_is_gone_is_absent(bucket):
    listed = next(remote_path(RUN).iterdir())
    (bucket / "run" / listed.name).unlink()
    assert files.is_absent(listed)


def test_functions_that_do_not_know_about_urls_fail_and_touch_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = remote_path(RUN)
    for call in (path.mkdir, path.touch, path.read_bytes):
        with pytest.raises(PostHocError, match=f"^{RUN}: is a URL; must be a path on a file"):
            call()
    assert not list(tmp_path.iterdir())
