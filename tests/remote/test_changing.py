"""Commands that write to a bucket: pruning, repair, an import, and a synthesis by several processes."""

from __future__ import annotations

import secrets
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
    LockedError,
    MismatchError,
    OutputExistsError,
    RemoteError,
)
from posthoc_cli.remote import lease, store
from posthoc_cli.remote.lease import Lease
from posthoc_cli.remote.store import remote_path
from posthoc_cli.snapshots import writer
from posthoc_cli.snapshots.check import repair

STEPS = (10, 20, 30, 40)
RUN = "s3://bucket/run"
FIRST = "0000000000000010-0.05.safetensors"


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            store.put(f"{url}/{path.relative_to(folder).as_posix()}", path)


def names(url: str) -> set[str]:
    """Return the names in a folder of a store, without that of the lease."""
    return store.listed(url).keys() - {lease.NAME}


@pytest.fixture
def local(server: FaultyServer, tmp_path: Path) -> Path:
    """The folder of a run that is also in the bucket; its second snapshot is a folder of parts."""
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", random_walk(max(STEPS), {"large": (60, 50), "small": (7,)}), STEPS)
    split_snapshot(sorted((tmp_path / "run").iterdir())[1])
    upload(tmp_path / "run", RUN)
    server.seen.clear()
    return tmp_path / "run"


def test_a_run_in_a_bucket_is_pruned_as_its_copy_on_a_disk(local: Path, server: FaultyServer, ema: Ema) -> None:
    wanted, found = (ema("prune", place, "--keep", "2", "--yes", "--json").json for place in (local, RUN))
    assert found == wanted and found["deleted"]
    deleted = [place for place, line in enumerate(server.seen) if line.startswith("DELETE")]
    read = [place for place, line in enumerate(server.seen) if line.startswith("GET") and line.endswith(".safetensors")]
    assert len(deleted) == len(wanted["gone"]) + 2  # the parts of a snapshot are three objects
    assert max(read) < min(deleted)
    assert names(RUN) == {path.name for path in local.iterdir() if not path.name.startswith(".")}
    assert "all intact" in ema("verify", RUN).out


def test_pruning_that_is_interrupted_leaves_a_valid_run_and_frees_the_lease(
    local: Path, ema: Ema, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(store.RETRIES, "max_retries", 0)
    store._opened.cache_clear()
    refused = iter((None, "403 AccessDenied"))
    server.answer = lambda request: next(refused, "403 AccessDenied") if request["METHOD"] == "DELETE" else None
    assert "cannot be removed: access is denied" in ema("prune", RUN, "--keep", "2", "--yes").error
    server.answer = lambda _: None
    assert len(names(RUN)) == 2 * len(STEPS) - 1
    assert "deleted" in ema("prune", RUN, "--keep", "2", "--yes").out
    assert len(names(RUN)) == 4


def test_broken_objects_are_set_aside_in_the_bucket(local: Path, ema: Ema, server: FaultyServer) -> None:
    damaged = bytearray((local / FIRST).read_bytes())
    damaged[-1] ^= 1
    store.put(f"{RUN}/{FIRST}", bytes(damaged), create=False)
    found = ema("verify", RUN, "--repair", "--yes", "--json").json
    assert found["repair"] == {"gone": [FIRST], "moved": [f"damaged/{FIRST}"], "done": True}
    assert bytes(store.get(f"{RUN}/damaged/{FIRST}", 0, 10**6)[0]) == damaged
    assert names(RUN) == {path.name for path in local.iterdir()} - {FIRST} | {"damaged"}
    assert "all intact" in ema("verify", RUN).out
    (part, *_) = sorted(path for path in local.rglob("part-*"))
    folder = part.parent.name
    store.put(f"{RUN}/{folder}/{part.name}", b"nothing", create=False)
    assert ema("verify", RUN, "--repair", "--yes").code == 0
    assert names(f"{RUN}/damaged/{folder}") == {path.name for path in part.parent.iterdir()}
    assert folder not in names(RUN)


def test_an_object_that_is_replaced_after_it_was_verified_is_not_set_aside(local: Path) -> None:
    sound = (local / FIRST).read_bytes()
    store.put(f"{RUN}/{FIRST}", sound[:-1] + b"?", create=False)
    found = Run(RUN).check()
    store.put(f"{RUN}/{FIRST}", sound, create=False)
    with pytest.raises(MismatchError, match="has changed since it was read; nothing was set aside"):
        repair(found)
    assert FIRST in names(RUN) and "damaged" not in names(RUN)


@pytest.mark.parametrize("command", [("prune", RUN, "--keep", "2"), ("verify", RUN, "--repair")])
def test_a_run_is_changed_by_one_process_only(local: Path, ema: Ema, command: tuple[str, ...]) -> None:
    store.put(f"{RUN}/{FIRST}", b"broken", create=False) if command[0] == "verify" else None
    held = Lease(remote_path(RUN), secrets.token_hex(16))
    assert "is writing here" in ema(*command, "--yes").error
    held.release()
    assert "damaged" not in names(RUN) and len(names(RUN)) == 2 * len(STEPS)
    assert ema(*command, "--yes").code == 0


def test_pruning_stops_when_another_process_takes_the_lease(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SECONDS", 0.0)

    def taken(*_: object) -> None:
        store.put(f"{RUN}/{lease.NAME}", b'{"token": "another", "host": "node7"}', create=False)

    monkeypatch.setattr(writer, "verify_payload", taken)
    with pytest.raises(LockedError, match="node7 is writing here"):
        Run(RUN).prune(keep=2)
    assert len(names(RUN)) == 2 * len(STEPS)


@pytest.mark.parametrize("url", ["hf://org/model@main/run", "https://127.0.0.1:1/run"])
def test_urls_that_are_only_read_are_refused(url: str, local: Path) -> None:
    wanted = r"must be a path, or begin with s3://, gs:// or az://$"
    run = Run(local)
    assert run.snapshots
    run.directory = remote_path(url)  # as if the same snapshots were found there
    with pytest.raises(InvalidValueError, match=f"^directory {url}: {wanted}"):
        run.prune(keep=2)
    with pytest.raises(InvalidValueError, match=f"^out {url}: {wanted}"):
        import_checkpoints(local, url)


def test_an_import_into_a_bucket_refers_to_objects(server: FaultyServer, tmp_path: Path, ema: Ema) -> None:
    for step in STEPS:
        save_file({"w": torch.full((3,), float(step))}, tmp_path / f"step{step}.safetensors")
    upload(tmp_path, "s3://bucket/old")
    assert f"wrote a run that refers to these files: {RUN}" in ema("import", "s3://bucket/old", "--out", RUN).out
    assert names(RUN) == {"ema-import.json"}
    assert torch.equal(Run(RUN).average("last:2")["w"], torch.full((3,), 35.0))
    assert "is this import already" in ema("import", "s3://bucket/old", "--out", RUN).out
    with pytest.raises(OutputExistsError, match="has other settings"):
        import_checkpoints("s3://bucket/old", RUN, include=["w"])
    assert import_checkpoints("s3://bucket/old", RUN, include=["w"], overwrite=True).written
    with pytest.raises(InvalidValueError, match="copies are written to a disk; upload the folder when it is complete"):
        import_checkpoints("s3://bucket/old", "s3://bucket/copies", copy=True)
    with pytest.raises(InvalidValueError, match="would refer to files of this machine; upload the files"):
        import_checkpoints(tmp_path, "s3://bucket/local")
    server.answer = lambda request: "403 AccessDenied" if request["METHOD"] == "PUT" else None
    assert "access is denied" in ema("import", "s3://bucket/old", "--out", "s3://bucket/new").error
    server.answer = lambda _: None
    assert not names("s3://bucket/new")
    store.put("s3://bucket/old/step20.safetensors", b"replaced", create=False)
    with pytest.raises(FileFormatError, match=r"step20.safetensors: has 8 bytes, and had"):
        Run(RUN).average("last:2")


def test_a_large_object_is_moved_through_this_machine(server: FaultyServer, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytes(range(256)) * 80_000  # 20 MB
    store.put("s3://bucket/large", data)
    monkeypatch.setattr(store, "_ONE_REQUEST", 1024)
    large, moved = remote_path("s3://bucket/large"), remote_path("s3://bucket/moved")
    with monkeypatch.context() as patch, pytest.raises(RemoteError, match="access is denied"):
        patch.setitem(store.RETRIES, "max_retries", 0)
        store._opened.cache_clear()
        reads = iter((None, None))
        server.answer = lambda request: next(reads, 403) if request["METHOD"] == "GET" else None
        large.replace(moved)
    server.answer = lambda _: None
    assert names("s3://bucket") == {"large"}
    large.replace(moved)
    assert names("s3://bucket") == {"moved"}
    assert bytes(store.get("s3://bucket/moved", 0, len(data))[0]) == data


PROCESSES = """
try:
    url, out, *options = arguments
    Run(url).write(0.2 if options else 0.15, out, distributed=True, max_shard_size="4KB", overwrite="again" in options)
except PostHocError as error:
    print(error)
"""


def test_processes_send_their_own_shards_and_the_index_comes_last(
    local: Path, server: FaultyServer, tmp_path: Path
) -> None:
    out, index = "s3://bucket/out", "model.safetensors.index.json"
    Run(RUN).write(0.15, tmp_path / "one.safetensors")
    server.answer = lambda request: 403 if request["METHOD"] == "PUT" and "00002-of" in request["KEY"] else None
    for text in check_group(PROCESSES, 2, tmp_path, RUN, out):
        assert "cannot be written: access is denied" in text
    assert names(out) == {"model-00001-of-00002.safetensors"}  # no model to any reader
    server.answer, server.seen = (lambda _: None), []
    assert check_group(PROCESSES, 2, tmp_path, RUN, out) == ["", ""]
    sent = [line.removeprefix("PUT out/") for line in server.seen if line.startswith("PUT out/")]
    assert sent == ["model-00002-of-00002.safetensors", index]
    export_file(remote_path(out), tmp_path / "merged.safetensors")
    assert_same_tensors(load_output(tmp_path / "merged.safetensors"), load_output(tmp_path / "one.safetensors"))
    server.seen = []
    assert check_group(PROCESSES, 2, tmp_path, RUN, out) == ["", ""]  # it is complete
    assert not [line for line in server.seen if line.startswith("PUT") and not line.endswith(index)]
    for text in check_group(PROCESSES, 2, tmp_path, RUN, out, "other"):
        assert "is another output" in text
    assert check_group(PROCESSES, 2, tmp_path, RUN, out, "again") == ["", ""]
    assert Run(out).info()["sigma_rel"] == 0.2
