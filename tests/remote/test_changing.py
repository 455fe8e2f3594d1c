"""Commands that write to a bucket: an import, and a synthesis by several processes; pruning is
refused."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checking import assert_same_tensors, load_output
from ema_command import Ema
from factories import random_walk, split_snapshot, write_run
from groups import check_group
from remote.faulty import FaultyServer
from safetensors.torch import save_file

from posthoc_cli import Run, export_file, import_checkpoints
from posthoc_cli.errors import (
    FileFormatError,
    InvalidValueError,
    OutputExistsError,
    PostHocError,
    RemoteError,
)
from posthoc_cli.remote import store
from posthoc_cli.remote.store import remote_path

STEPS = (10, 20, 30, 40)
RUN = "s3://bucket/run"
FIRST = "0000000000000010-0.05.safetensors"


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(f"{url}/{path.relative_to(folder).as_posix()}", path)


def names(url: str) -> set[str]:
    return set(store.listed(url))


@pytest.fixture
def local(server: FaultyServer, tmp_path: Path) -> Path:
    """The folder of a run that is also in the bucket; its second snapshot is a folder of parts."""
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", random_walk(max(STEPS), {"large": (60, 50), "small": (7,)}), STEPS)
    split_snapshot(sorted((tmp_path / "run").iterdir())[1])
    upload(tmp_path / "run", RUN)
    server.seen.clear()
    return tmp_path / "run"


def test_a_run_in_a_bucket_is_not_pruned_there(local: Path, ema: Ema) -> None:
    before = names(RUN)
    assert ema("prune", RUN, "--keep", "2", "--dry-run").code == 0
    wanted = f"directory {RUN}: is a URL; must be a path on a file system of this machine"
    assert ema("prune", RUN, "--keep", "2", "--yes").error == wanted
    assert names(RUN) == before


def test_an_import_into_a_bucket_refers_to_objects(
    server: FaultyServer, tmp_path: Path, ema: Ema
) -> None:
    for step in STEPS:
        save_file({"w": torch.full((3,), float(step))}, tmp_path / f"step{step}.safetensors")
    upload(tmp_path, "s3://bucket/old")
    assert (
        f"wrote a run that refers to these files: {RUN}"
        in ema("import", "s3://bucket/old", "--out", RUN).out
    )
    assert names(RUN) == {"ema-import.json"}
    assert torch.equal(Run(RUN).average("last:2")["w"], torch.full((3,), 35.0))
    assert "is this import already" in ema("import", "s3://bucket/old", "--out", RUN).out
    with pytest.raises(OutputExistsError, match="with other settings"):
        import_checkpoints("s3://bucket/old", RUN, include=["w"])
    assert import_checkpoints("s3://bucket/old", RUN, include=["w"], overwrite=True).written
    with pytest.raises(
        InvalidValueError, match="would refer to files of this machine; upload the files"
    ):
        import_checkpoints(tmp_path, "s3://bucket/local")
    server.answer = lambda request: "403 AccessDenied" if request["METHOD"] == "PUT" else None
    assert "access is denied" in ema("import", "s3://bucket/old", "--out", "s3://bucket/new").error
    server.answer = lambda _: None
    assert not names("s3://bucket/new")
    store.put("s3://bucket/old/step20.safetensors", b"replaced", create=False)
    with pytest.raises(
        FileFormatError, match=r"step20.safetensors: was replaced, or has changed, since"
    ):
        Run(RUN).average("last:2")


PROCESSES = """
try:
    url, out = arguments
    Run(url).write(0.15, out, distributed=True, max_shard_size="4KB")
except PostHocError as error:
    print(error)
"""


def test_processes_send_their_own_shards_and_the_index_comes_last(
    local: Path, server: FaultyServer, tmp_path: Path
) -> None:
    out, index = "s3://bucket/out", "model.safetensors.index.json"
    Run(RUN).write(0.15, tmp_path / "one.safetensors")
    server.answer = lambda request: (
        403 if request["METHOD"] == "PUT" and "00002-of" in request["KEY"] else None
    )
    for text in check_group(PROCESSES, 2, tmp_path, RUN, out):
        assert "cannot be written: access is denied" in text
    assert names(out) == set()
    server.answer, server.seen = (lambda _: None), []
    assert check_group(PROCESSES, 2, tmp_path, RUN, out) == ["", ""]
    sent = [line.removeprefix("PUT out/") for line in server.seen if line.startswith("PUT out/")]
    assert (len(sent), sent[-1]) == (3, index)
    export_file(remote_path(out), tmp_path / "merged.safetensors")
    assert_same_tensors(
        load_output(tmp_path / "merged.safetensors"), load_output(tmp_path / "one.safetensors")
    )


# --- objects by URL: put, read, listed and deleted, against an S3 server


def test_an_object_is_put_once_read_by_ranges_and_deleted(bucket: str) -> None:
    url = f"{bucket}/run/a b%20+ü"
    store.put(url, b"0123456789")
    tag = store.head(url).tag
    with pytest.raises(FileExistsError):
        store.put(url, b"other")
    data, info = store.get(url, 2, 100, tag)
    assert (bytes(data), info.size, info.tag, info) == (b"23456789", 10, tag, store.head(url))
    assert bytes(store.get(url, 10, 12)[0]) == b""
    store.put(url, b"replaced", create=False)
    with pytest.raises(RemoteError, match="was replaced while it was being used") as caught:
        store.get(url, 0, 1, tag)
    assert caught.value.errno == errno.ESTALE
    store.delete(url)
    store.delete(url)
    with pytest.raises(FileNotFoundError):
        store.head(url)


def test_functions_that_do_not_know_about_urls_fail_and_touch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = remote_path("s3://bucket/run")
    for call in (lambda: path.open("w"), path.mkdir, path.touch, path.read_bytes):
        with pytest.raises(
            PostHocError, match=r"^s3://bucket/run: is a URL; must be a path on a file system"
        ):
            call()
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_room_is_loaded_where_no_url_is_used(tmp_path: Path) -> None:
    code = (
        "import sys; from posthoc_cli import Run; print(Run(sys.argv[1]))\n"
        "print([name for name in sys.modules if name.startswith(('obstore', "
        "'posthoc_cli.remote', 'huggingface_hub'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
