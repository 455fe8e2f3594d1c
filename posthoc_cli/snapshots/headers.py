"""Parse the header of a safetensors file from bytes, and check it; decode its metadata by a table of what it must be.

A file may be hostile or come from a failing disk. Whatever is wrong becomes a FileFormatError that names the file and
the tensor or key; a header that passes is consistent with itself and with the file's size.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt

T = TypeVar("T")

_BEGINNING = '{"__metadata__":'
"""The first bytes of a header written by us or by the safetensors library."""

_MOST_DIGITS = 4_300
"""The limit of Python itself since 3.10.7, unless configured otherwise."""


class DecodeCache:
    """The last decoded values, shared by the headers of a run, which may be thousands: most of their text is equal."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._decoded: dict[str, tuple[object, Any]] = {}

    def texts(self, metadata: dict[str, str]) -> dict[str, str]:
        """The same metadata, with the previous header's string objects where they are equal."""
        last = self._texts
        self._texts = {key: last[key] if last.get(key) == text else text for key, text in metadata.items()}
        return self._texts

    def once(self, key: str, source: object, decode: Callable[[], T]) -> T:
        """The result of `decode`, or the previous one if `source`, all that it depends on, is equal."""
        last = self._decoded.get(key)
        if last is None or last[0] != source:
            last = self._decoded[key] = source, decode()
        result: T = last[1]
        return result


# --- the header


def decode_header(path: Path, start: bytes, file_bytes: int | None, cache: DecodeCache | None = None) -> fmt.FileHeader:
    """Parse and check the first 8 + N bytes of a file of `file_bytes` bytes; None skips the check of its size.

    Checks everything that can be checked without the payload: JSON without duplicate keys, known dtypes, offsets that
    tile the payload without gap or overlap, the file's size, the header's checksum where it has one.
    """
    cache = cache or DecodeCache()
    with _named_on_error(path, "header"):
        text = start[8:].decode("utf-8")
        metadata, rest = _split(text)
    if rest is None:
        raw = parse_json(path, text, "header")
        metadata = raw.pop("__metadata__", {}) if isinstance(raw, dict) else {}
        tensors = _decode_entries(path, raw)
    else:
        tensors = cache.once("header", rest, lambda: _decode_entries(path, parse_json(path, rest, "header")))
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(path, "__metadata__ must map names to strings")
    header = fmt.FileHeader(cache.texts(metadata), tensors, len(start))
    if file_bytes is not None and header.file_bytes != file_bytes:
        state = "truncated" if file_bytes < header.file_bytes else "too long"
        raise FileFormatError(path, f"{state}: has {file_bytes:,} bytes, its header says {header.file_bytes:,}")
    if "ema.checksum" in metadata or "ema.format" in metadata:
        if start.count(fmt.CHECKSUM_MARK) != 1:
            raise FileFormatError(path, "the header has no checksum, or several")
        if not has_header_checksum(start, fmt.header_checksum(start)):
            raise FileFormatError(path, "damaged header: its checksum does not match")
    return header


def _split(text: str) -> tuple[Any, str | None]:
    """The metadata, and the text of the other entries: equal in all snapshots of a run. None if these come first."""
    if not text.startswith(_BEGINNING):
        return None, None
    metadata, end = _decoder().raw_decode(text, len(_BEGINNING))
    if "\\u" in text[len(_BEGINNING) : end]:
        _check_text(metadata)
    # The padding depends on the length of the metadata.
    return metadata, "{" + text[end + 1 :].rstrip(" ") if text.startswith(',"', end) else None


def _decode_entries(path: Path, raw: Any) -> dict[str, fmt.TensorEntry]:
    if not isinstance(raw, dict):
        raise FileFormatError(path, "the header is not a JSON object; not a safetensors file")
    if "__metadata__" in raw:  # was taken out before
        raise FileFormatError(path, "damaged header: the same key twice")
    tensors = {name: _decode_entry(path, name, value) for name, value in raw.items()}
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin != position:
            raise FileFormatError(path, f"tensor {shown(name)}: begins at {entry.begin:,} where {position:,} was due")
        position += entry.nbytes
    return tensors


def _decode_entry(path: Path, name: str, value: Any) -> fmt.TensorEntry:
    is_entry = isinstance(value, dict) and set(value) == {"dtype", "shape", "data_offsets"}
    dtype, shape, offsets = (value["dtype"], value["shape"], value["data_offsets"]) if is_entry else (None, [], [])
    is_entry = _is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2 and len(shape) <= 64
    # Also where another size is 0: no array library can hold the strides of such a shape.
    if not is_entry or math.prod(size or 1 for size in shape) >= 2**60:
        raise FileFormatError(path, f"tensor {shown(name)}: its header entry is malformed")
    if not isinstance(dtype, str) or dtype not in fmt.ITEM_BYTES:
        known = ", ".join(fmt.ITEM_BYTES)
        raise FileFormatError(path, f"tensor {shown(name)}: dtype {shown(dtype)} is none of {known}")
    begin, end = offsets
    if end - begin != math.prod(shape) * fmt.ITEM_BYTES[dtype]:
        what = f"{end - begin:,} bytes do not make {dtype} of shape {shape}"
        raise FileFormatError(path, f"tensor {shown(name)}: {what}")
    return fmt.TensorEntry(dtype, tuple(shape), begin, end - begin)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)


def decode_checksums(path: Path, header: fmt.FileHeader) -> dict[str, str]:
    """Block checksums by tensor, of the right number each; empty for a foreign file, which has none."""
    if "ema.checksums" not in header.metadata:
        if file_kind(header) is not None:
            raise FileFormatError(path, "ema.checksums: is missing")
        return {}
    raw = parse_json(path, header.metadata["ema.checksums"], "ema.checksums")
    if not isinstance(raw, dict):
        raise FileFormatError(path, "ema.checksums must map names to checksums")
    for name, entry in header.tensors.items():
        value = raw.get(name)
        if not isinstance(value, str) or len(value) != len(fmt.blank_checksums(entry.nbytes)):
            raise FileFormatError(path, f"tensor {shown(name)}: ema.checksums must have a checksum for each block")
    return raw


def has_header_checksum(start: bytes, checksum: str) -> bool:
    """Whether a header carries this checksum and matches it: two headers of one checksum are equal."""
    before, mark, after = start.partition(fmt.CHECKSUM_MARK)
    carried, after = after[: fmt.CHECKSUM_DIGITS], after[fmt.CHECKSUM_DIGITS :]
    blank = before + mark + b"0" * fmt.CHECKSUM_DIGITS + after
    return carried == checksum.encode() == xxhash.xxh3_64_hexdigest(blank).encode()


def file_kind(header: fmt.FileHeader) -> str | None:
    """ "snapshot", "output", "state", or None for another library's file."""
    return header.metadata.get("ema.format")


# --- metadata


@dataclass(frozen=True)
class Entry:
    """What a value of the metadata must be: in words, and as a test of its JSON, or of the text itself where `is_text`.

    `convert` makes the result from it and the results of earlier entries, or raises a ValueError if they do not fit.
    """

    words: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any, Mapping[str, Any]], Any] | None = None
    is_text: bool = False
    optional: bool = False

    def result(self, value: Any, earlier: Mapping[str, Any]) -> Any:
        """The checked value; a ValueError says what is wrong."""
        if not self.accepts(value):
            raise ValueError(f"must be {self.words}, not {shown(value)}")
        return value if self.convert is None else self.convert(value, earlier)


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_amount(value: Any) -> bool:
    """Whether it is a finite number, at least 0."""
    return is_number(value) and value >= 0


def is_whole(value: Any) -> bool:
    """Whether it is a whole number, at least 0."""
    return type(value) is int and 0 <= value < 2**63


def is_list_of(value: Any, accepts: Callable[[Any], bool]) -> bool:
    """Whether it is a list of such values."""
    return isinstance(value, list | tuple) and all(map(accepts, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _listed(value: Any, _: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(value)


TEXT = Entry("a string", _is_text, is_text=True)
UNIT = Entry("a printable name of what t counts", lambda v: _is_text(v) and v != "" and v.isprintable(), is_text=True)
RUN_ID = Entry(
    "32 hexadecimal digits", lambda v: _is_text(v) and re.fullmatch("[0-9a-f]{32}", v) is not None, is_text=True
)
NUMBER = Entry("a finite number", is_number, lambda value, _: float(value))
NUMBER_OR_NULL = Entry(
    "a finite number", lambda v: v is None or is_number(v), lambda v, _: None if v is None else float(v)
)
AMOUNT = Entry("a finite number, at least 0", is_amount, lambda value, _: float(value))
AMOUNTS = Entry("a list of finite numbers, at least 0", lambda v: is_list_of(v, is_amount), _listed)
WHOLE = Entry("a whole number, at least 0", is_whole)
TEXTS = Entry("a list of strings", lambda v: is_list_of(v, _is_text), _listed)
LIST = Entry("a list", lambda v: isinstance(v, list))
OBJECT = Entry("a JSON object", lambda v: isinstance(v, dict))


def decode_metadata(
    path: Path, header: fmt.FileHeader, kind: str, entries: Mapping[str, Entry], cache: DecodeCache | None = None
) -> dict[str, Any]:
    """The values of a file of this kind by the keys of `entries`, without optional ones that it lacks."""
    found = file_kind(header)
    if found != kind:
        what = "has no ema.format" if found is None else f"its ema.format is {shown(found)}"
        raise FileFormatError(path, f"not {'an' if kind == 'output' else 'a'} {kind} of this package: {what}")
    known, version = fmt.version_of(kind), header.metadata.get("ema.version")
    if version is None:
        raise FileFormatError(path, "ema.version: is missing")
    if version != known:
        raise FileFormatError(path, f"ema.version: {shown(version)}; this release reads {known}")
    cache = cache or DecodeCache()
    values: dict[str, Any] = {}
    for name, entry in entries.items():
        key = f"ema.{name}"
        text = header.metadata.get(key)
        if text is not None:
            raw = text if entry.is_text else cache.once(key, text, partial(parse_json, path, text, key))
            try:
                values[name] = entry.result(raw, values)
            except ValueError as error:
                raise FileFormatError(path, f"{key}: {error}") from error
        elif not entry.optional:
            raise FileFormatError(path, f"{key}: is missing")
    return values


# --- JSON


def parse_json(path: Path, data: bytes | str, what: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN, no invalid Unicode, no numbers of thousands of digits."""
    with _named_on_error(path, what):
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = _decoder().decode(text)
        if "\\u" in text:  # only escapes can make invalid text
            _check_text(value)
        return value


@contextmanager
def _named_on_error(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise FileFormatError(path, f"damaged {what}: {str(error)[:200]}") from error


def _decoder() -> json.JSONDecoder:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("the same key twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def short_int(digits: str) -> int:
        if len(digits) > _MOST_DIGITS:
            raise ValueError(f"a number of {len(digits):,} digits")
        return int(digits)

    # Python's own parser is faster, but without Python's own limit it takes hours for a long number.
    has_limit = getattr(sys, "get_int_max_str_digits", lambda: 0)()
    return json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse, parse_int=None if has_limit else short_int)


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
