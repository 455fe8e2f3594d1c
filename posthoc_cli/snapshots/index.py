"""The index of a sharded model: which tensor is in which file. As the Hugging Face libraries define it, and checked.

{"metadata": {"total_size": bytes}, "weight_map": {tensor: name of a file beside the index}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.metadata import parse_json
from posthoc_cli.snapshots.reader import read_small_file

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class ShardIndex:
    """What an index says.

    Attributes:
        shards: the tensors in each file, by the file's name, growing.
        total_size: bytes of all tensors; None where it says nothing of the kind.
    """

    shards: dict[str, list[str]]
    total_size: int | None


def read_index(path: Path) -> dict[str, list[str]]:
    """The tensors in each file of a sharded model, by the file's name, growing. Raises what `decode_index` raises."""
    return decode_index(path).shards


def decode_index(path: Path) -> ShardIndex:
    """The index of a sharded model.

    Nothing in an index is believed: a name leads to a file beside it and nowhere else.

    Raises:
        FileFormatError: naming the index and what is wrong with it.
    """
    found = _read_object(path)
    weight_map, metadata = found.get("weight_map"), found.get("metadata")
    if not isinstance(weight_map, dict):
        raise FileFormatError(path, "is not an index of shards: it has no weight_map")
    shards: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        if not (isinstance(name, str) and is_plain_name(name)):
            raise FileFormatError(path, f"tensor {shown(tensor)}: {shown(name)} is not the name of a file beside it")
        shards.setdefault(name, []).append(tensor)
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return ShardIndex(dict(sorted(shards.items())), total if type(total) is int else None)


def encode_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The content of an index."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def is_plain_name(name: str) -> bool:
    """Whether a name leads to a visible file in its own folder, on every system."""
    return (
        name.endswith(fmt.SUFFIX)
        and not name.startswith(".")
        and len(name.encode(errors="replace")) <= 255
        and all(c.isprintable() and c not in "/\\:" for c in name)
    )


def _read_object(path: Path) -> dict[str, Any]:
    found = parse_json(path, read_small_file(path, fmt.MAX_HEADER_BYTES), "index")
    if not isinstance(found, dict):
        raise FileFormatError(path, "is not an index of shards: it is no JSON object")
    return found
