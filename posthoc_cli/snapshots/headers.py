"""Parse the header of a safetensors file and check it; decode metadata by the annotations of what it is kept in.

A file may be hostile or come from a failing disk. Whatever is wrong becomes a FileFormatError that names the file and
the tensor or key; a header that passes is consistent with itself and with the file's size.
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
"""The first bytes of a header written by us or by the safetensors library."""

_MOST_DIGITS = 4_300
"""Of a whole number; the limit of Python itself since 3.10.7, unless configured otherwise."""


class DecodeCache:
    """The last decoded values, shared by the headers of a run, which may be thousands: most of their text is equal."""

    def __init__(self) -> None:
        self._decoded: dict[str, tuple[object, Any]] = {}

    def once(self, key: str, source: object, decode: Callable[[], T]) -> T:
        """The result of `decode`, or the previous one if `source`, all that it depends on, is equal."""
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
    # Alike in all headers of a run, which keep one string of it.
    metadata = {key: cache.once(f"text of {key}", text, partial(str, text)) for key, text in metadata.items()}
    header = fmt.FileHeader(metadata, tensors, len(start))
    if header.file_bytes != file_bytes:
        state = "truncated" if file_bytes < header.file_bytes else "too long"
        raise FileFormatError(path, f"{state}: has {file_bytes:,} bytes, its header says {header.file_bytes:,}")
    if metadata.keys() & {"ema.checksum", "ema.format"} and not has_checksum(start, metadata.get("ema.checksum", "")):
        raise FileFormatError(path, "damaged header: its checksum does not match")
    return header


def _split(text: str) -> tuple[Any, str | None]:
    """The metadata, and the text of the other entries: equal in all snapshots of a run. None if these come first."""
    if not text.startswith(_BEGINNING):
        return None, None
    metadata, end = _DECODER.raw_decode(text, len(_BEGINNING))
    if "\\u" in text[len(_BEGINNING) : end]:
        _check_text(metadata)
    # The padding depends on the length of the metadata.
    return metadata, "{" + text[end + 1 :].rstrip(" ") if text.startswith(',"', end) else None


def _decode_entries(path: Path, raw: dict[str, Any]) -> dict[str, fmt.TensorEntry]:
    if "__metadata__" in raw:  # was taken out before
        raise FileFormatError(path, "damaged header: the same key twice")
    _check_count(path, len(raw))  # their keys may be escaped
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
    # Also where another size is 0: no array library can hold the strides of such a shape.
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
    """Whether it is a list of sizes or offsets, such as a shape, that arrays can have."""
    return isinstance(value, list | tuple) and all(type(size) is int and 0 <= size < 2**60 for size in value)


def decode_checksums(path: Path, header: fmt.FileHeader) -> dict[str, str]:
    """Block checksums by tensor, of the right number each; empty for a foreign file, which has none."""
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
    """Whether a header carries this checksum, once, and matches it: two headers of one checksum are equal."""
    carried = fmt.CHECKSUM_MARK + checksum.encode()
    blank = start.replace(carried, fmt.CHECKSUM_MARK + b"0" * fmt.CHECKSUM_DIGITS)
    is_once = carried in start and start.count(fmt.CHECKSUM_MARK) == 1
    return is_once and checksum == xxhash.xxh3_64_hexdigest(blank)


def file_kind(header: fmt.FileHeader) -> str | None:
    """ "snapshot", "output", "state", or None for another library's file."""
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
    """The values of a file of this kind by the keys of `kinds`, as `converted`, without optional ones that it lacks."""
    found = file_kind(header)
    if found != kind:
        what = "has no ema.format" if found is None else f"its ema.format is {shown(found)}"
        raise FileFormatError(path, f"not {'an' if kind == 'output' else 'a'} {kind} of this package: {what}")
    known, version = fmt.version_of(kind), header.metadata.get("ema.version")
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
    """The annotations of a dataclass by its fields."""
    return get_type_hints(form, include_extras=True)


def converted(value: Any, kind: Any) -> Any:
    """A value of JSON as an annotation has it: lists as tuples or arrays, objects as dataclasses, by their fields.

    A ValueError says what it must be. Numbers are finite and at least 0; what a `Rule` asks for is checked, too. Keys
    that a dataclass lacks are of later releases.
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
        made = value if rule is fmt.ANY_SIGN else converted(value, kind)
        _check(bool(rule.accepts(made)), rule.words, value)
        return made
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
    form: Any = kind
    for field in fields(form):
        if field.name not in value and (field.default is MISSING or field.default):
            raise ValueError(f"{field.name}: is missing")
    return form(**{name: _member(value, name, one) for name, one in kinds_of(form).items() if name in value})


def _member(value: Mapping[str, Any], name: str, kind: Any) -> Any:
    try:
        return converted(value[name], kind)
    except ValueError as error:
        raise ValueError(f"{shown(name)[1:-1]}: {error}") from error


def _check(is_right: bool, words: str, value: Any) -> None:
    if not is_right:
        raise ValueError(f"must be {words}, not {shown(value)}")


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, at least 0."""
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
"""What is no object and no list: a test of it, and words for one and for several."""


# --- JSON


def parse_json(path: Path, data: bytes | str, what: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN, no invalid Unicode, no numbers of thousands of digits."""
    with _named_on_error(path, what):
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = _DECODER.decode(text)
        if "\\u" in text:  # only escapes can make invalid text
            _check_text(value)
        return value


def parse_object(path: Path, data: bytes | str, what: str) -> dict[str, Any]:
    """The same where it must be an object."""
    found = parse_json(path, data, what)
    if not isinstance(found, dict):
        raise FileFormatError(path, f"damaged {what}: must be a JSON object")
    return found


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
    """Without Python's own limit, which users may lift, a long number takes hours."""
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_int=_short_int)


def _check_text(value: Any) -> None:
    """Refuse lone surrogates and zero bytes, which escapes can write."""
    left = [("", value)]
    while left:
        key, one = left.pop()
        if isinstance(one, dict):
            left += [*((name, name) for name in one), *one.items()]
        elif isinstance(one, list):
            left += [(key, item) for item in one]
        elif isinstance(one, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in one):
            raise ValueError(f"{shown(key)}: {shown(one)} is not Unicode text, or has a zero byte")


# --- the metadata of a snapshot: its form, and whether it is of the tensors in the file

_PART = fmt.Rule("two numbers such as 3/8", lambda text: re.fullmatch("[1-9][0-9]{0,5}/[1-9][0-9]{0,5}", text))
_SNAPSHOT = kinds_of(fmt.SnapshotInfo) | {"part": Annotated[str, _PART]}
"""What the metadata of a snapshot must be. What a right checksum stands under is of that form and of these tensors; its
meaning is not doubted: checksums are there for accidents, and are no signatures."""


def decode_snapshot(path: Path, header: fmt.FileHeader, cache: DecodeCache | None = None) -> fmt.SnapshotInfo:
    """The checked metadata of a snapshot; a FileFormatError names the file and the key."""
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
    """A ValueError if ema.tensors does not fit the tensors that are stored, or ema.aliases names none of them."""
    for name in _in_both("ema.tensors", tensors, stored):
        role, own, kept = tensors[name].role, tensors[name].dtype, stored[name].dtype
        if not (own == kept if role == "copy" else own in EPS and kept in EPS):
            raise ValueError(f"ema.tensors: tensor {shown(name)}: {kept} cannot hold {role} of {own}")
    for alias, name in aliases.items():
        if name not in tensors or alias in tensors or alias == "__metadata__":
            raise ValueError(f"ema.aliases: {shown(alias)} must be a further name of a stored tensor")


def check_chunks(chunks: Mapping[str, Chunk], stored: Mapping[str, fmt.TensorEntry]) -> None:
    """A ValueError if a chunk in a part is not within its tensor."""
    for name in _in_both("ema.chunks", chunks, stored):
        own, chunk = stored[name].shape, chunks[name]
        fits = len(own) == len(chunk.shape) == len(chunk.offset)
        if not fits or any(last > size for last, size in zip(chunk.box(own).end, chunk.shape, strict=True)):
            what = f"shape {list(own)} at {list(chunk.offset)} is not within {list(chunk.shape)}"
            raise ValueError(f"ema.chunks: tensor {shown(name)}: {what}")


def _in_both(key: str, said: Mapping[str, object], stored: Mapping[str, object]) -> Iterable[str]:
    if differing := said.keys() ^ stored.keys():
        raise ValueError(f"{key}: tensor {shown(min(differing))} is in the payload or here, but not in both")
    return stored
