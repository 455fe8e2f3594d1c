"""Nothing is written to a bucket; an import on this machine refers to its objects."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ema_command import Ema
from factories import contents, random_walk, split_snapshot, write_run
from remote.servers import Server
from safetensors.torch import save_file

from posthoc_cli import Run
from posthoc_cli.errors import (
    FileFormatError,
    PostHocError,
    RemoteError,
)
from posthoc_cli.remote import store
from posthoc_cli.remote.store import remote_path

STEPS = (10, 20, 30, 40)
RUN = "s3://bucket/run"
FIRST = "0000000000000010-0.05.safetensors"


@pytest.fixture
def bucket(serve: Callable[[Path], Server], tmp_path: Path) -> Path:
    """The folder of a bucket with a run, whose second snapshot is a folder of parts."""
    folder = tmp_path / "served/bucket"
    run = folder / "run"
    run.mkdir(parents=True)
    walk = random_walk(max(STEPS), {"large": (60, 50), "small": (7,)})
    write_run(run, walk, STEPS)
    split_snapshot(sorted(run.iterdir())[1])
    serve(folder.parent)
    return folder


def test_a_run_in_a_bucket_is_not_pruned_there(bucket: Path, ema: Ema) -> None:
    before = contents(bucket)
    assert ema("prune", RUN, "--keep", "2", "--dry-run").code == 0
    wanted = f"directory {RUN}: is a URL; must be a path on a file system of this machine"
    assert wanted in ema("prune", RUN, "--keep", "2", "--yes").error
    assert contents(bucket) == before


@pytest.mark.parametrize(
    "command",
    [
        ["synthesize", RUN, "--sigma-rel", "0.1", "--out", "s3://bucket/a.safetensors"],
        ["export", f"{RUN}/{FIRST}", "--out", "hf://org/model/a.pt"],
        ["import", RUN, "--out", "s3://bucket/new"],
        ["error-plot", RUN, "--out", "s3://bucket/error.png"],
    ],
)
@pytest.mark.usefixtures("bucket")
def test_an_output_in_a_store_is_refused(ema: Ema, command: list[str]) -> None:
    error = ema(*command).error
    assert f"out {command[-1]}: is a URL; must be a path on a file system of this machine" in error
    assert "copy it from or to the store by `rclone copy` or `aws s3 cp`" in error


def test_an_import_on_this_machine_refers_to_objects(
    bucket: Path,
    tmp_path: Path,
    ema: Ema,
) -> None:
    old = bucket / "old"
    old.mkdir()
    for step in STEPS:
        save_file({"w": torch.full((3,), float(step))}, old / f"step{step}.safetensors")
    run = tmp_path / "run"
    imported = ema("import", "s3://bucket/old", "--out", run)
    assert f"wrote a run that refers to these files: {run}" in imported.out
    average = Run(run).average("last:2")
    assert average["w"].tolist() == [35.0, 35.0, 35.0]
    assert "is this import already" in ema("import", "s3://bucket/old", "--out", run).out
    (old / "step20.safetensors").write_bytes(b"replaced")
    replaced = r"step20.safetensors: was replaced, or has changed, since"
    with pytest.raises(FileFormatError, match=replaced):
        Run(run).average("last:2")


def test_an_object_is_read_by_ranges(bucket: Path) -> None:
    name = "a b%20+ü"
    url = f"s3://bucket/{name}"
    (bucket / name).write_bytes(b"0123456789")
    tag = store.head(url).tag
    data, info = store.get(url, 2, 100, tag)
    assert bytes(data) == b"23456789"
    assert info.size == 10
    assert info.tag == tag
    assert info == store.head(url)
    assert bytes(store.get(url, 10, 12)[0]) == b""
    (bucket / name).write_bytes(b"replaced")
    with pytest.raises(RemoteError, match="was replaced while it was being used") as caught:
        store.get(url, 0, 1, tag)
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(FileNotFoundError):
        store.head(f"{url}/none")


def test_functions_that_do_not_know_about_urls_fail_and_touch_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = remote_path("s3://bucket/run")
    refusal = r"^s3://bucket/run: is a URL; must be a path on a file system"
    for call in (lambda: path.open("w"), path.mkdir, path.touch, path.read_bytes):
        with pytest.raises(PostHocError, match=refusal):
            call()
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_room_is_loaded_where_no_url_is_used(tmp_path: Path) -> None:
    code = (
        "import sys; from posthoc_cli import Run; print(Run(sys.argv[1]))\n"
        "print([name for name in sys.modules if name.startswith(('obstore', "
        "'posthoc_cli.remote', 'huggingface_hub'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
