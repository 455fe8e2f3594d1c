"""Repositories of the Hugging Face Hub: what is in them, and copies of their files in the cache of
`huggingface_hub`.

A key is `org/model@revision/file`. A revision is resolved to its commit once: a branch that moves
afterwards changes nothing.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.constants import HF_HUB_CACHE, REPO_TYPES_URL_PREFIXES
from huggingface_hub.errors import LocalEntryNotFoundError

from posthoc_cli.errors import RemoteError

_api: Any = HfApi()
_files: Any = HfFileSystem(skip_instance_cache=True)


@cache
def _commit(kind: str, repository: str, revision: str) -> str:
    info = _api.repo_info(repository, revision=revision, repo_type=kind)
    return str(info.sha)


def _resolved(key: str) -> Any:
    """Return the repository, the revision's commit and the file that a key names."""
    path = _files.resolve_path(key)
    path.revision = _commit(path.repo_type, path.repo_id, path.revision)
    return path


def _pinned(key: str) -> str:
    """Return the key with the commit in place of the revision."""
    path = _resolved(key)
    prefix = REPO_TYPES_URL_PREFIXES.get(path.repo_type, "")
    pinned = f"{prefix}{path.repo_id}@{path.revision}/{path.path_in_repo}"
    return pinned.rstrip("/")


def download(key: str) -> Path:
    """Return the path of a file in the cache, after downloading it if it is not there."""
    path = _resolved(key)
    try:
        copy = _api.hf_hub_download(
            path.repo_id,
            path.path_in_repo,
            repo_type=path.repo_type,
            revision=path.revision,
        )
    except LocalEntryNotFoundError as error:  # the request has failed, for the reason in its cause
        raise error.__cause__ or ConnectionError from error
    except ConnectionError:
        raise
    except OSError as error:
        reason = f"cannot be written to {HF_HUB_CACHE}: {(error.strerror or str(error)).lower()}"
        hint = "HF_HOME names another folder"
        raise RemoteError(f"hf://{key}", reason, hint, errno=error.errno) from error
    return Path(copy)


def head(key: str) -> Any:
    """Return the facts about a file; raise a FileNotFoundError if there is none."""
    pinned = _pinned(key)
    folder, _, _ = pinned.rpartition("/")
    if "@" in folder:
        for facts in list_with_delimiter(folder)["objects"]:
            if facts["path"] == pinned:
                return facts
    raise FileNotFoundError


def list_with_delimiter(key: str) -> dict[str, list[Any]]:
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
            facts = {"path": entry["name"], "size": entry["size"], "e_tag": entry.get("blob_id")}
            objects.append(facts)
    return {"common_prefixes": folders, "objects": objects}


def revisions(key: str) -> list[str]:
    """Return the names of the branches and tags of a repository."""
    path = _files.resolve_path(key)
    refs = _api.list_repo_refs(path.repo_id, repo_type=path.repo_type)
    named = [*refs.branches, *refs.tags]
    return [ref.name for ref in named]
