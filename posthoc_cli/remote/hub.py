"""Repositories of the Hub of Hugging Face, asked in the same way as an object store.

A key is `org/model@revision/file`. A revision is looked up once and then stays the commit that it was: a branch that
moves on meanwhile changes nothing.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

from huggingface_hub import HfApi, HfFileSystem

_KINDS = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_OPEN = 256
"""Files whose addresses are kept."""
_api: Any = HfApi()
_files: Any = HfFileSystem(skip_instance_cache=True)


@cache
def _commit(kind: str, repository: str, revision: str) -> str:
    return str(_api.repo_info(repository, revision=revision, repo_type=kind).sha)


def _pinned(key: str) -> str:
    """The same file or folder at the commit of its revision."""
    place = _files.resolve_path(key)
    commit = _commit(place.repo_type, place.repo_id, place.revision)
    return f"{_KINDS[place.repo_type]}{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")


@lru_cache(maxsize=_OPEN)
def _opened(pinned: str) -> Any:
    return _files.open(pinned, "rb", cache_type="none")


def head(key: str) -> dict[str, Any]:
    """What is known of a file."""
    pinned = _pinned(key)
    folder = pinned.rpartition("/")[0]
    for one in _files.ls(folder, detail=True) if "@" in folder else ():
        if one["name"] == pinned and one["type"] == "file":
            return _described(one)
    raise FileNotFoundError


def list_with_delimiter(key: str) -> dict[str, Any]:
    """What is directly in a folder."""
    pinned = _pinned(key)
    found = [one for one in _files.ls(pinned, detail=True) if one["name"] != pinned]
    folders = [one["name"] for one in found if one["type"] == "directory"]
    return {"common_prefixes": folders, "objects": [_described(one) for one in found if one["type"] == "file"]}


def get(key: str, options: dict[str, Any]) -> Any:
    """A range of a file, at the commit of its revision."""
    found = head(key)
    begin, end = options["range"]
    end = min(end, found["size"])
    data = _opened(_pinned(key))._fetch_range(begin, end) if begin < end else b""
    return SimpleNamespace(bytes=lambda: data, meta=found)


def revisions(key: str) -> list[str]:
    """The names of the branches and tags of a repository."""
    place = _files.resolve_path(key)
    found = _api.list_repo_refs(place.repo_id, repo_type=place.repo_type)
    return [one.name for one in (*found.branches, *found.tags)]


def _described(found: dict[str, Any]) -> dict[str, Any]:
    return {"path": found["name"], "size": found["size"], "e_tag": found.get("blob_id"), "last_modified": None}
