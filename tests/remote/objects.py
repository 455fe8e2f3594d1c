"""Objects of a bucket that tests put and read by the store's own library."""

import os
from pathlib import Path
from typing import Any

from posthoc_cli.remote import store


def _place(url: str) -> tuple[Any, str]:
    bucket, _, key = url.removeprefix("s3://").partition("/")
    return store.open_bucket(f"s3://{bucket}/", os.environ["AWS_ENDPOINT_URL"]), key


def put(url: str, data: bytes | Path) -> None:
    bucket, key = _place(url)
    bucket.put(key, data)


def upload(folder: Path, url: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            put(f"{url}/{path.relative_to(folder).as_posix()}", path)
