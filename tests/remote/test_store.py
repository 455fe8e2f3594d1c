"""Objects by URL: put, read, listed and deleted, against an S3 server."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from posthoc_cli.errors import PostHocError, RemoteError
from posthoc_cli.remote import store
from posthoc_cli.remote.store import RemotePath, matching, remote_path
from posthoc_cli.snapshots.tensorfile import OpenedFile


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


def test_a_path_of_a_url_asks_the_store(bucket: str) -> None:
    for name in ("run/a.bin", "run/sub/b.bin", "c.bin"):
        store.put(f"{bucket}/{name}", b"12")
    place = remote_path(bucket.replace("//", "/"))  # what a Path makes of it
    run = place / "run"
    assert str(run) == f"{bucket}/run" and isinstance(run.parent, RemotePath)
    assert run == Path(f"{bucket}/run".replace("//", "/")) and run.parent == place and {run: 1}[place / "run"]
    assert sorted(map(str, run.iterdir())) == [f"{bucket}/run/a.bin", f"{bucket}/run/sub"]
    assert [(path.is_dir(), path.is_file()) for path in sorted(run.iterdir())] == [(False, True), (True, False)]
    assert run.is_dir() and not run.is_file() and run.exists() and not (run / "none").exists()
    assert (run / "a.bin").stat().st_size == 2 and (run / "a.bin").is_file() and not (run / "a.bin").is_dir()
    assert [path.name for path in sorted(place.glob("*.bin"))] == ["c.bin"]
    assert [path.name for path in matching(place / "r*/*.bin")] == ["a.bin"]
    assert matching(place / "r*/a.bin") == [run / "a.bin"] and not matching(place / "n*/a.bin")
    with pytest.raises(NotADirectoryError):
        list((run / "a.bin").iterdir())
    with pytest.raises(FileNotFoundError):
        list((run / "none").iterdir())


def test_functions_that_do_not_know_about_urls_fail_and_touch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = remote_path("s3://bucket/run")
    for call in (lambda: path.open("w"), path.mkdir, path.touch, path.read_bytes):
        with pytest.raises(PostHocError, match=r"^s3://bucket/run: is a URL; must be a path on a file system"):
            call()
    assert not list(tmp_path.iterdir())


def test_an_opened_object_is_read_by_ranges_and_seen_to_be_replaced(bucket: str) -> None:
    data = bytes(range(256)) * 4096  # 1 MiB
    url = f"{bucket}/file"
    store.put(url, data)
    with OpenedFile(remote_path(url)) as file:
        assert file.size == len(data) and file.read_at(10, 5) == data[5:15]
        assert file.read_at(len(data), 700_000) == data[700_000:]
        room = bytearray(600_000)
        for at in range(0, 600_000, 50_000):
            assert file.read_into(memoryview(room)[at : at + 50_000], 300_000 + at) == 50_000
        assert room == data[300_000:900_000]
        stamp = file.stamp
        assert stamp == file.stamp
        store.put(url, bytes(len(data)), create=False)
        with pytest.raises(RemoteError, match=f"^{url}: was replaced while it was being used; run again$"):
            file.read_at(len(data), 10)


def test_nothing_of_the_room_is_loaded_where_no_url_is_used(tmp_path: Path) -> None:
    code = (
        "import sys; from posthoc_cli import Run; print(Run(sys.argv[1]))\n"
        "print([name for name in sys.modules if name.startswith(('obstore', 'posthoc_cli.remote', 'huggingface_hub'))])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
