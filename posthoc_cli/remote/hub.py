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
    return str(_api.repo_info(repository, revision=revision, repo_type=kind).sha)


def _pinned(key: str) -> str:
    """Return the key with the commit in place of the revision."""
    place = _files.resolve_path(key)
    commit = _commit(place.repo_type, place.repo_id, place.revision)
    return f"{_PREFIXES[place.repo_type]}{place.repo_id}@{commit}/{place.path_in_repo}".rstrip("/")


@lru_cache(maxsize=256)  # files whose download addresses are kept
def _opened(pinned: str) -> Any:
    return _files.open(pinned, "rb", cache_type="none")


def head(key: str) -> dict[str, Any]:
    """Return the facts about a file; raise a FileNotFoundError if there is none."""
    pinned = _pinned(key)
    folder = pinned.rpartition("/")[0]
    for entry in _files.ls(folder, detail=True) if "@" in folder else ():
        if entry["name"] == pinned and entry["type"] == "file":
            return _facts(entry)
    raise FileNotFoundError


def list_with_delimiter(key: str) -> dict[str, Any]:
    """Return the folders and files directly in a folder."""
    pinned = _pinned(key)
    entries = [entry for entry in _files.ls(pinned, detail=True) if entry["name"] != pinned]
    folders = [entry["name"] for entry in entries if entry["type"] == "directory"]
    return {
        "common_prefixes": folders,
        "objects": [_facts(entry) for entry in entries if entry["type"] == "file"],
    }


def get(key: str, options: dict[str, Any]) -> Any:
    """Return a range of a file at the commit of its revision."""
    facts = head(key)
    begin, end = options["range"]
    end = min(end, facts["size"])
    data = _opened(_pinned(key))._fetch_range(begin, end) if begin < end else b""
    return SimpleNamespace(bytes=lambda: data, meta=facts)


def revisions(key: str) -> list[str]:
    """Return the names of the branches and tags of a repository."""
    place = _files.resolve_path(key)
    refs = _api.list_repo_refs(place.repo_id, repo_type=place.repo_type)
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def _facts(entry: dict[str, Any]) -> dict[str, Any]:
    return {"path": entry["name"], "size": entry["size"], "e_tag": entry.get("blob_id")}
