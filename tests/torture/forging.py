"""Headers taken apart, changed anywhere, and sealed again with a right checksum: what a stranger can write.

A header is a tree: JSON objects as lists of pairs, so that a key may come twice, and the JSON in metadata strings as
trees of their own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

MARK = b'"ema.checksum":"'


class Pairs(list[tuple[Any, Any]]):
    """A JSON object: keys (strings, or `Raw`) with their values."""


@dataclass(frozen=True)
class Inner:
    """JSON in a string."""

    value: Any


@dataclass(frozen=True)
class Raw:
    """Text that stands in the file as it is; what it has of surrogateescape becomes bytes that are no UTF-8."""

    text: str


Place = tuple[int, ...]
"""Where something is in a tree: 2 i for the key and 2 i + 1 for the value of a pair, i in a list, 0 in a string."""


def take_apart(path: Path) -> tuple[Any, bytes]:
    """The header of a file as a tree, and the payload; an index is all header."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return json.loads(data, object_pairs_hook=Pairs), b""
    end = 8 + int.from_bytes(data[:8], "little")
    tree = Pairs(json.loads(data[8:end], object_pairs_hook=Pairs))
    return Pairs((k, Pairs((n, _inner(v)) for n, v in v) if k == "__metadata__" else v) for k, v in tree), data[end:]


def _inner(text: str) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=Pairs)
    except ValueError:
        return text
    return Inner(value) if isinstance(value, list) or dump(value) == text else text


def dump(tree: Any) -> str:
    """A tree as JSON without spaces."""
    if isinstance(tree, Pairs):
        return "{" + ",".join(f"{dump(key)}:{dump(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ",".join(map(dump, tree)) + "]"
    if isinstance(tree, Inner):
        return dump(dump(tree.value))
    if isinstance(tree, Raw):
        return tree.text
    if isinstance(tree, str):
        plain = json.dumps(tree, ensure_ascii=False)
        return json.dumps(tree) if any("\ud800" <= c <= "\udfff" for c in tree) else plain
    return json.dumps(tree)


def seal(tree: Any) -> bytes:
    """The first bytes of a file with this header, with a right checksum where the header has a place for it."""
    text = dump(tree).encode("utf-8", "surrogateescape")
    blank = len(text).to_bytes(8, "little") + text
    before, mark, after = blank.partition(MARK)
    if not mark:
        return blank
    blank = before + mark + b"0" * 16 + after[16:]
    return before + mark + xxhash.xxh3_64_hexdigest(blank).encode() + after[16:]


def written(tree: Any, payload: bytes, is_index: bool) -> bytes:
    """The content of a file with this header."""
    return dump(tree).encode("utf-8", "surrogateescape") if is_index else seal(tree) + payload


def forge(path: Path, changes: Mapping[str, str | None]) -> Path:
    """Give a file's metadata other values, or none, and seal it again."""
    tree, payload = take_apart(path)
    (first, metadata), *entries = tree
    changed = {**dict(metadata), **changes}
    kept = Pairs((key, value) for key, value in changed.items() if value is not None)
    path.write_bytes(seal(Pairs([(first, kept), *entries])) + payload)
    return path


def places(tree: Any, at: Place = ()) -> Iterator[tuple[Place, Any, bool]]:
    """Everything in a tree with its place, and whether it is a key."""
    yield at, tree, False
    if isinstance(tree, Pairs):
        for i, (key, value) in enumerate(tree):
            yield (*at, 2 * i), key, True
            yield from places(value, (*at, 2 * i + 1))
    elif isinstance(tree, list | Inner):
        for i, item in enumerate(tree if isinstance(tree, list) else [tree.value]):
            yield from places(item, (*at, i))


def replaced(tree: Any, at: Place, new: Any) -> Any:
    """The tree with something else at a place."""
    if not at:
        return new
    step, further = at[0], at[1:]
    if isinstance(tree, Inner):
        return Inner(replaced(tree.value, further, new))
    changed = type(tree)(tree)
    if isinstance(tree, Pairs):
        pair = list(tree[step // 2])
        pair[step % 2] = replaced(pair[step % 2], further, new)
        changed[step // 2] = tuple(pair)
    else:
        changed[step] = replaced(tree[step], further, new)
    return changed
