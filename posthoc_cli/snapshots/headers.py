"""Parse and check the header of a safetensors file; decode metadata by the annotations of the dataclass that holds it.

A file may be hostile or come from a failing disk. Every fault becomes a FileFormatError that names the file and the
tensor or key; a header that passes is consistent with itself and with the file's size.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
import xxhash

from posthoc_cli.dtypes import EPS, ITEM_BYTES
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Chunk

T = TypeVar("T")

_BEGINNING = '{"__metadata__":'
"""The beginning of a header that this package or the safetensors library wrote."""

_MOST_DIGITS = 4_300
"""The largest number of digits of an integer: Python's own default limit since 3.10.7, which users may lift."""


class DecodeCache:
    """The last decoded value of each key, shared by the thousands of headers of a run: most of their text is equal."""

    def __init__(self) -> None:
        self._decoded: dict[str, tuple[object, Any]] = {}

    def once(self, key: str, source: object, decode: Callable[[], T]) -> T:
        """Return the result of `decode`, or the previous one if `source`, all that it depends on, is unchanged."""
        last = self._decoded.get(key)
        if last is None or last[0] != source:
            last = self._decoded[key] = source, decode()
        result: T = last[1]
        return result


# --- the header


def decode_header(path: Path, start: bytes, file_bytes: int, cache: DecodeCache | None = None) -> fmt.FileHeader:
    """Parse and check the first 8 + N bytes of a file of `file_bytes` bytes.

    Checks everything that can be checked without the payload: JSON without duplicate keys, known dtypes, offsets that
    tile the payload without gap or overlap, the file's size, the header's checksum where it has one.
    """
    cache = cache or DecodeCache()
    _check_count(path, start.count(b'"dtype"'))  # before all of them are parsed
    with _named_on_error(path, "header"):
        text = start[8:].decode("utf-8")
        metadata, rest = _split(text)
    if rest is None:
        raw = parse_object(path, text, "header")
        metadata, tensors = raw.pop("__metadata__", {}), _decode_entries(path, raw)
    else:
        tensors = cache.once("header", rest, lambda: _decode_entries(path, parse_object(path, rest, "header")))
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(path, "__metadata__ must map names to strings")
    # Equal texts in the headers of a run share one string.
    metadata = {key: cache.once(f"text of {key}", text, partial(str, text)) for key, text in metadata.items()}
    header = fmt.FileHeader(metadata, tensors, len(start))
    if header.file_bytes != file_bytes:
        state = "truncated" if file_bytes < header.file_bytes else "too long"
        raise FileFormatError(path, f"{state}: has {file_bytes:,} bytes, its header says {header.file_bytes:,}")
    if metadata.keys() & {"ema.checksum", "ema.format"} and not has_checksum(start, metadata.get("ema.checksum", "")):
        raise FileFormatError(path, "damaged header: its checksum does not match")
    return header


def _split(text: str) -> tuple[Any, str | None]:
    """Return the metadata and the text of the other entries, which a run's snapshots share; None in another order."""
    if not text.startswith(_BEGINNING):
        return None, None
    metadata, end = _DECODER.raw_decode(text, len(_BEGINNING))
    if "\\u" in text[len(_BEGINNING) : end]:
        _check_text(metadata)
    # The padding depends on the length of the metadata.
    return metadata, "{" + text[end + 1 :].rstrip(" ") if text.startswith(',"', end) else None


def _decode_entries(path: Path, raw: dict[str, Any]) -> dict[str, fmt.TensorEntry]:
    if "__metadata__" in raw:  # a second one: the caller has removed the first
        raise FileFormatError(path, "damaged header: the same key twice")
    _check_count(path, len(raw))  # escaped keys were not counted before
    tensors = {name: _decode_entry(path, name, value) for name, value in raw.items()}
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin != position:
            raise FileFormatError(path, f"tensor {shown(name)}: begins at {entry.begin:,} where {position:,} was due")
        position += entry.nbytes
    return tensors


def _check_count(path: Path, count: int) -> None:
    if count > fmt.MAX_TENSORS:
        raise FileFormatError(path, f"its header names {count:,} tensors; at most {fmt.MAX_TENSORS:,} are read")


def _decode_entry(path: Path, name: str, value: Any) -> fmt.TensorEntry:
    is_entry = isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"}
    dtype, shape, offsets = (value["dtype"], value["shape"], value["data_offsets"]) if is_entry else (None, [], [])
    is_entry = is_sizes(shape) and is_sizes(offsets) and len(offsets) == 2 and len(shape) <= 64
    # Sizes of 0 are ignored here, since no array library can represent the strides of such a shape.
    if not is_entry or math.prod(size or 1 for size in shape) >= 2**60:
        raise FileFormatError(path, f"tensor {shown(name)}: its header entry is malformed")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        known = ", ".join(ITEM_BYTES)
        raise FileFormatError(path, f"tensor {shown(name)}: dtype {shown(dtype)} is none of {known}")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        what = f"{end - begin:,} bytes do not make {dtype} of shape {shape}"
        raise FileFormatError(path, f"tensor {shown(name)}: {what}")
    return fmt.TensorEntry(dtype, tuple(shape), begin, end - begin)


def is_sizes(value: Any) -> bool:
    """Return whether a JSON value is a list of valid sizes or offsets, such as a shape."""
    return isinstance(value, list | tuple) and all(type(size) is int and 0 <= size < 2**60 for size in value)


def decode_checksums(path: Path, header: fmt.FileHeader) -> dict[str, str]:
    """Return each tensor's block checksums after checking their number; empty for a foreign file, which has none."""
    if "ema.checksums" not in header.metadata:
        if file_kind(header) is not None:
            raise FileFormatError(path, "ema.checksums: is missing")
        return {}
    raw = parse_object(path, header.metadata["ema.checksums"], "ema.checksums")
    for name, entry in header.tensors.items():
        value = raw.get(name)
        if not isinstance(value, str) or len(value) != len(fmt.blank_checksums(entry.nbytes)):
            raise FileFormatError(path, f"tensor {shown(name)}: ema.checksums must have a checksum for each block")
    return raw


def has_checksum(start: bytes, checksum: str) -> bool:
    """Return whether a header matches this checksum of it."""
    marked = fmt.CHECKSUM_MARK + checksum.encode()
    blank = start.replace(marked, fmt.CHECKSUM_MARK + b"0" * fmt.CHECKSUM_DIGITS)
    return checksum == xxhash.xxh3_64_hexdigest(blank)


def file_kind(header: fmt.FileHeader) -> str | None:
    """Return the kind of a file: "snapshot", "output", or None for another library's file."""
    return header.metadata.get("ema.format")


# --- metadata


def decode_metadata(
    path: Path,
    header: fmt.FileHeader,
    kind: str,
    kinds: Mapping[str, Any],
    optional: Collection[str] = (),
    cache: DecodeCache | None = None,
) -> dict[str, Any]:
    """Decode the metadata of a file of this kind: the keys of `kinds`, converted, without missing optional ones."""
    actual = file_kind(header)
    if actual != kind:
        reason = "has no ema.format" if actual is None else f"its ema.format is {shown(actual)}"
        raise FileFormatError(path, f"not {'an' if kind == 'output' else 'a'} {kind} of this package: {reason}")
    known, version = fmt.VERSION, header.metadata.get("ema.version")
    if version not in (None, known):
        raise FileFormatError(path, f"ema.version: {shown(version)}; this release reads {known}")
    cache = cache or DecodeCache()
    values: dict[str, Any] = {}
    for name, wanted in {"version": str, **kinds}.items():
        key = f"ema.{name}"
        text = header.metadata.get(key)
        if text is not None:
            values[name] = cache.once(key, text, partial(_decode_value, path, key, text, wanted))
        elif name not in optional:
            raise FileFormatError(path, f"{key}: is missing")
    del values["version"]
    return values


def _decode_value(path: Path, key: str, text: str, kind: Any) -> Any:
    plain = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    raw = text if plain is str else parse_json(path, text, key)
    try:
        return converted(raw, kind)
    except ValueError as error:
        raise FileFormatError(path, f"{key}: {error}") from error


@lru_cache
def kinds_of(form: Any) -> dict[str, Any]:
    """Return the annotations of a dataclass by field name."""
    return get_type_hints(form, include_extras=True)


def converted(value: Any, kind: Any) -> Any:
    """Convert a JSON value to an annotated type: lists to tuples or arrays, objects to dataclasses, by their fields.

    Raises ValueError, which says what is expected. Numbers must be finite and at least 0, and satisfy the annotation's
    `Rule`. Keys that a dataclass does not have are ignored: they come from later releases.
    """
    if kind in _PLAIN:
        accepts, words, _ = _PLAIN[kind]
        _check(accepts(value), words, value)
        return float(value) if kind is float else value
    if kind is Any:
        return value
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        kind, rule = args
        result = value if rule is fmt.ANY_SIGN else converted(value, kind)
        _check(bool(rule.accepts(result)), rule.words, value)
        return result
    if type(None) in args:
        return None if value is None else converted(value, args[0])
    if origin is np.ndarray:
        return np.array(converted(value, tuple[float, ...]), dtype=np.float64)
    if origin is tuple:
        item, is_endless = args[0], args[-1] is ...
        _, _, words = _PLAIN.get(item, ("", "", "lists or objects")) if is_endless else ("", "", str(len(args)))
        _check(isinstance(value, list | tuple) and (is_endless or len(value) == len(args)), f"a list of {words}", value)
        if is_endless and item in _PLAIN:
            _check(all(map(_PLAIN[item][0], value)), f"a list of {words}", value)
        return tuple(map(converted, value, [item] * len(value) if is_endless else args))
    _check(isinstance(value, dict), "a JSON object", value)
    if not is_dataclass(kind):
        return {name: _member(value, name, args[1]) for name in value}
    dataclass: Any = kind
    for field in fields(dataclass):
        if field.name not in value and (field.default is MISSING or field.default):
            raise ValueError(f"{field.name}: is missing")
    members = kinds_of(dataclass).items()
    return dataclass(**{name: _member(value, name, member) for name, member in members if name in value})


def _member(value: Mapping[str, Any], name: str, kind: Any) -> Any:
    try:
        return converted(value[name], kind)
    except ValueError as error:
        raise ValueError(f"{shown(name)[1:-1]}: {error}") from error


def _check(is_right: bool, words: str, value: Any) -> None:
    if not is_right:
        raise ValueError(f"must be {words}, not {shown(value)}")


def is_whole(value: Any) -> bool:
    """Return whether a JSON value is a whole number of at least 0."""
    return type(value) is int and 0 <= value < 2**63


_PLAIN: dict[Any, tuple[Callable[[Any], bool], str, str]] = {
    bool: (lambda value: isinstance(value, bool), "true or false", "true or false"),
    str: (lambda value: isinstance(value, str), "a string", "strings"),
    int: (is_whole, "a whole number, at least 0", "whole numbers, at least 0"),
    float: (
        lambda value: fmt.is_number(value) and value >= 0,
        "a finite number, at least 0",
        "finite numbers, at least 0",
    ),
}
"""The plain types of JSON values, each with a test and its description in the singular and the plural."""


# --- JSON


def parse_json(path: Path, data: bytes | str, what: str) -> Any:
    """Parse strict JSON: no duplicate keys, no NaN, no invalid Unicode, no numbers of thousands of digits."""
    with _named_on_error(path, what):
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = _DECODER.decode(text)
        if "\\u" in text:  # only escapes can produce invalid text
            _check_text(value)
        return value


def parse_object(path: Path, data: bytes | str, what: str) -> dict[str, Any]:
    """Parse strict JSON like `parse_json`; the value must be an object."""
    value = parse_json(path, data, what)
    if not isinstance(value, dict):
        raise FileFormatError(path, f"damaged {what}: must be a JSON object")
    return value


@contextmanager
def _named_on_error(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, f"damaged {what}: {str(error)[:200]}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("the same key twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _short_int(digits: str) -> int:
    """Parse an integer of limited length: a very long one would take hours if Python's own limit is lifted."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_short_int)


def _check_text(value: Any) -> None:
    """Refuse lone surrogates and zero bytes, which escapes can express."""
    stack = [("", value)]
    while stack:
        key, node = stack.pop()
        if isinstance(node, dict):
            stack += [*((name, name) for name in node), *node.items()]
        elif isinstance(node, list):
            stack += [(key, item) for item in node]
        elif isinstance(node, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node):
            raise ValueError(f"{shown(key)}: {shown(node)} is not Unicode text, or has a zero byte")


# --- the metadata of a snapshot: its types, and whether it fits the tensors in the file

_PART = fmt.Rule("two numbers such as 3/8", lambda text: re.fullmatch("[1-9][0-9]{0,5}/[1-9][0-9]{0,5}", text))
_SNAPSHOT = kinds_of(fmt.SnapshotInfo) | {"part": Annotated[str, _PART]}
"""The types of a snapshot's metadata. Types and the fit with the tensors are checked; beyond that, metadata with a
valid checksum is trusted: checksums guard against accidents and are not signatures."""


def decode_snapshot(path: Path, header: fmt.FileHeader, cache: DecodeCache | None = None) -> fmt.SnapshotInfo:
    """Return the checked metadata of a snapshot; raise FileFormatError, naming file and key, if it is invalid."""
    cache, stored = cache or DecodeCache(), header.tensors
    values = decode_metadata(path, header, "snapshot", _SNAPSHOT, fmt.OPTIONAL, cache)
    tensors, aliases, chunks = values["tensors"], values["aliases"], values.pop("chunks", {})
    try:
        cache.once("tensors", (tensors, aliases, stored), lambda: check_tensors(tensors, aliases, stored))
        if "part" in values:
            number, count = map(int, values["part"].split("/"))
            cache.once("chunks", (chunks, stored), lambda: check_chunks(chunks, stored))
            values |= {"part": (number, count), "chunks": chunks}
    except ValueError as error:
        raise FileFormatError(path, str(error)) from error
    return fmt.SnapshotInfo(**values)


def check_tensors(
    tensors: Mapping[str, fmt.TrackedTensor], aliases: Mapping[str, str], stored: Mapping[str, fmt.TensorEntry]
) -> None:
    """Raise ValueError unless ema.tensors fits the stored tensors and ema.aliases names stored tensors."""
    for name in _in_both("ema.tensors", tensors, stored):
        role, original, kept = tensors[name].role, tensors[name].dtype, stored[name].dtype
        if not (original == kept if role == "copy" else original in EPS and kept in EPS):
            raise ValueError(f"ema.tensors: tensor {shown(name)}: {kept} cannot hold {role} of {original}")
    for alias, name in aliases.items():
        if name not in tensors or alias in tensors or alias == "__metadata__":
            raise ValueError(f"ema.aliases: {shown(alias)} must be a further name of a stored tensor")


def check_chunks(chunks: Mapping[str, Chunk], stored: Mapping[str, fmt.TensorEntry]) -> None:
    """Raise ValueError if a chunk in a part is not within its tensor."""
    for name in _in_both("ema.chunks", chunks, stored):
        shape, chunk = stored[name].shape, chunks[name]
        fits = len(shape) == len(chunk.shape) == len(chunk.offset)
        if not fits or any(end > size for end, size in zip(chunk.box(shape).end, chunk.shape, strict=True)):
            reason = f"shape {list(shape)} at {list(chunk.offset)} is not within {list(chunk.shape)}"
            raise ValueError(f"ema.chunks: tensor {shown(name)}: {reason}")


def _in_both(key: str, entries: Mapping[str, object], stored: Mapping[str, object]) -> Iterable[str]:
    if differing := entries.keys() ^ stored.keys():
        raise ValueError(f"{key}: tensor {shown(min(differing))} is in the payload or in {key}, but not in both")
    return stored
