"""Repositories of the Hugging Face Hub, with the functions of an object store that `store` calls.

A key is `org/model@revision/file`. A revision is resolved to its commit once: a branch that moves
afterwards changes nothing.
"""

from __future__ import annotations

from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any

from huggingface_hub import HfApi, HfFileSystem

_PREFIXES = {"model": "", "dataset": "datasets/", "space": "spaces/"}
_api: Any = HfApi()
_files: Any = HfFileSystem(skip_instance_cache=True)


@cache
def _commit(kind: str, repository: str, revision: str) -> str:
    info = _api.repo_info(repository, revision=revision, repo_type=kind)
    return str(info.sha)


def _pinned(key: str) -> str:
    """Return the key with the commit in place of the revision."""
    path = _files.resolve_path(key)
    commit = _commit(path.repo_type, path.repo_id, path.revision)
    prefix = _PREFIXES[path.repo_type]
    pinned = f"{prefix}{path.repo_id}@{commit}/{path.path_in_repo}"
    return pinned.rstrip("/")


@lru_cache(maxsize=256)  # files whose download addresses are kept
def _opened(pinned: str) -> Any:
    return _files.open(pinned, "rb", cache_type="none")


def head(key: str) -> dict[str, Any]:
    """Return the facts about a file; raise a FileNotFoundError if there is none."""
    pinned = _pinned(key)
    folder, _, _ = pinned.rpartition("/")
    if "@" not in folder:
        raise FileNotFoundError
    for entry in _files.ls(folder, detail=True):
        is_file = entry["type"] == "file"
        if is_file and entry["name"] == pinned:
            return _facts(entry)
    raise FileNotFoundError


def list_with_delimiter(key: str) -> dict[str, Any]:
    """Return the folders and files directly in a folder."""
    pinned = _pinned(key)
    folders = []
    objects = []
    for entry in _files.ls(pinned, detail=True):
        if entry["name"] == pinned:
            continue
        if entry["type"] == "directory":
            folders.append(entry["name"])
        elif entry["type"] == "file":
            objects.append(_facts(entry))
    return {"common_prefixes": folders, "objects": objects}


def get(key: str, options: dict[str, Any]) -> Any:
    """Return a range of a file at the commit of its revision."""
    facts = head(key)
    begin, end = options["range"]
    end = min(end, facts["size"])
    data = b""
    if begin < end:
        file = _opened(_pinned(key))
        data = file._fetch_range(begin, end)
    return SimpleNamespace(bytes=lambda: data, meta=facts)


def revisions(key: str) -> list[str]:
    """Return the names of the branches and tags of a repository."""
    path = _files.resolve_path(key)
    refs = _api.list_repo_refs(path.repo_id, repo_type=path.repo_type)
    named = [*refs.branches, *refs.tags]
    return [ref.name for ref in named]


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    return {"path": entry["name"], "size": entry["size"], "e_tag": entry.get("blob_id")}
