"""Objects by URL: put, read, listed and deleted, against an S3 server."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from posthoc_cli.errors import PostHocError, RemoteError
from posthoc_cli.remote import store
from posthoc_cli.remote.store import remote_path


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
        with pytest.raises(PostHocError, match=r"^s3://bucket/run: is a URL; must be a path on a file system"):
            call()
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_room_is_loaded_where_no_url_is_used(tmp_path: Path) -> None:
    code = (
        "import sys; from posthoc_cli import Run; print(Run(sys.argv[1]))\n"
        "print([name for name in sys.modules if name.startswith(('obstore', 'posthoc_cli.remote', 'huggingface_hub'))])"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
