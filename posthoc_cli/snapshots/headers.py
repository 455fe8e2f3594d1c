"""Parse the header of a safetensors file from bytes, and check it; typed access to its metadata.

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
from pathlib import Path
from typing import Any, TypeVar

import xxhash

from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt

T = TypeVar("T")

_BEGINNING = '{"__metadata__":'
"""The first bytes of a header written by us or by the safetensors library."""

_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")

_MOST_DIGITS = 4_300
"""The limit of Python itself since 3.10.7, unless configured otherwise."""


class DecodeCache:
    """The last decoded values, shared by the headers of a run: most of their text is equal.

    A directory may hold thousands of snapshots, each of which names every tensor; equal parts are decoded and stored
    once.
    """

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._decoded: dict[str, tuple[object, Any]] = {}

    def texts(self, metadata: dict[str, str]) -> dict[str, str]:
        """The same metadata, with the previous header's string objects where they are equal."""
        last = self._texts
        self._texts = {key: last[key] if last.get(key) == text else text for key, text in metadata.items()}
        return self._texts

    def once(self, key: str, source: object, decode: Callable[[], T]) -> T:
        """The result of `decode`, or the previous result under `key` if `source` is equal to the previous one.

        Arguments:
            source: all that the result depends on. The result must not be changed.
        """
        last = self._decoded.get(key)
        if last is None or last[0] != source:
            last = self._decoded[key] = source, decode()
        result: T = last[1]
        return result


def decode_header(path: Path, start: bytes, file_bytes: int | None, cache: DecodeCache | None = None) -> fmt.FileHeader:
    """Parse and check the first 8 + N bytes of a file of `file_bytes` bytes; None skips the check of its size.

    Checks everything that can be checked without the payload: JSON without duplicate keys, known dtypes, offsets that
    tile the payload without gap or overlap, the file's size, the header's checksum where it has one.

    Arguments:
        cache: shared by the files of one run.

    Raises:
        FileFormatError: naming the file, and the tensor where there is one.
    """
    cache = cache or DecodeCache()
    with _named_on_error(path, "header"):
        text = start[8:].decode("utf-8")
    split = _split(path, text)
    if split is None:
        raw = _header_object(path, text)
        metadata, tensors = raw.pop("__metadata__", {}), _decode_entries(path, raw)
    else:
        metadata, rest = split
        tensors = cache.once("header", rest, lambda: _decode_entries(path, _header_object(path, rest)))
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


def decode_checksums(path: Path, header: fmt.FileHeader) -> dict[str, str]:
    """Block checksums by tensor, of the right number each; empty for a foreign file, which has none.

    Raises:
        FileFormatError: naming the file and the tensor.
    """
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


class Metadata:
    """Typed access to the metadata of one file, with errors that name the file and the key.

    Arguments:
        expected: the kind of file that it must be, as `file_kind`.
    """

    def __init__(self, path: Path, header: fmt.FileHeader, expected: str) -> None:
        self._path = path
        self._metadata = header.metadata
        found = file_kind(header)
        if found != expected:
            what = "has no ema.format" if found is None else f"its ema.format is {shown(found)}"
            article = "an" if expected.startswith("o") else "a"
            raise FileFormatError(path, f"not {article} {expected} of this package: {what}")
        version = fmt.version_of(expected)
        if self.text("ema.version") != version:
            raise self.bad("ema.version", f"{shown(self.text('ema.version'))}; this release reads {version}")

    def bad(self, key: str, reason: str) -> FileFormatError:
        """The error to raise for a key."""
        return FileFormatError(self._path, f"{key}: {reason}")

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return key in self._metadata

    def text(self, key: str) -> str:
        """The value itself."""
        if key not in self._metadata:
            raise self.bad(key, "is missing")
        return self._metadata[key]

    def unit(self) -> str:
        """The unit of time: printable, since it goes into tables and pictures."""
        text = self.text("ema.t_unit")
        if not (text and text.isprintable()):
            raise self.bad("ema.t_unit", f"{shown(text)} must be a printable name of what t counts")
        return text

    def run_id(self) -> str:
        """32 hexadecimal digits."""
        text = self.text("ema.run_id")
        if not re.fullmatch(r"[0-9a-f]{32}", text):
            raise self.bad("ema.run_id", f"{shown(text)} is not 32 hexadecimal digits")
        return text

    def number(self, key: str) -> float:
        """A finite number."""
        if not _DECIMAL.fullmatch(self.text(key)):  # float() takes more: 1_0, digits of other scripts
            raise self.bad(key, f"{shown(self.text(key))} is not a number")
        value = float(self.text(key))
        if not math.isfinite(value):
            raise self.bad(key, f"{value} is not finite")
        return value

    def optional_number(self, key: str) -> float | None:
        """A finite number, or None for null."""
        return None if self.text(key) == "null" else self.number(key)

    def integer(self, key: str) -> int:
        """A whole number, at least 0."""
        text = self.text(key)
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise self.bad(key, f"{shown(text)} is not a whole number")
        return int(text)

    def json_object(self, key: str) -> dict[str, Any]:
        """A JSON object."""
        value = parse_json(self._path, self.text(key), key)
        if not isinstance(value, dict):
            raise self.bad(key, "is not a JSON object")
        return value

    def json_list(self, key: str) -> list[Any]:
        """A JSON list."""
        value = parse_json(self._path, self.text(key), key)
        if not isinstance(value, list):
            raise self.bad(key, "is not a JSON list")
        return value

    def names(self, key: str) -> tuple[str, ...]:
        """A JSON list of strings."""
        value = self.json_list(key)
        if not all(isinstance(name, str) for name in value):
            raise self.bad(key, "is not a list of names")
        return tuple(value)

    def one_of(self, key: str, value: Any, field: str, accepted: tuple[str, ...]) -> str:
        """The string `field` of the JSON object `value`, one of those accepted."""
        found = value.get(field) if isinstance(value, dict) else None
        if not isinstance(found, str) or found not in accepted:
            raise self.bad(key, f"{field} {shown(found)} is none of {', '.join(accepted)}")
        return found


# --- JSON


def parse_json(path: Path, data: bytes | str, what: str) -> Any:
    """Strict JSON: no duplicate keys, no NaN, no invalid Unicode, no numbers of thousands of digits.

    Raises:
        FileFormatError: naming the file and `what`.
    """
    with _named_on_error(path, what):
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = _decoder().decode(text)
        if "\\u" in text:  # only escapes can make invalid text
            _check_text(value)
        return value


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


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


# --- the header's tensors


def _split(path: Path, text: str) -> tuple[Any, str] | None:
    """The metadata, and the other entries as a JSON object of their own: equal text in every snapshot of a run.

    None for a header that does not begin with its metadata.
    """
    if not text.startswith(_BEGINNING):
        return None
    with _named_on_error(path, "header"):
        metadata, end = _decoder().raw_decode(text, len(_BEGINNING))
        if "\\u" in text[len(_BEGINNING) : end]:
            _check_text(metadata)
    if not text.startswith(',"', end):
        return None
    return metadata, "{" + text[end + 1 :].rstrip(" ")  # the padding depends on the length of the metadata


def _header_object(path: Path, text: str) -> dict[str, Any]:
    raw = parse_json(path, text, "header")
    if not isinstance(raw, dict):
        raise FileFormatError(path, "the header is not a JSON object; not a safetensors file")
    return raw


def _decode_entries(path: Path, raw: Mapping[str, Any]) -> dict[str, fmt.TensorEntry]:
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
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(path, f"tensor {shown(name)}: its header entry is malformed")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in fmt.ITEM_BYTES:
        known = ", ".join(fmt.ITEM_BYTES)
        raise FileFormatError(path, f"tensor {shown(name)}: dtype {shown(dtype)} is none of {known}")
    sizes = _is_sizes(shape) and _is_sizes(offsets) and len(offsets) == 2 and len(shape) <= 64
    # Also where another size is 0: no array library can hold the strides of such a shape.
    if not sizes or math.prod(size or 1 for size in shape) >= 2**60:
        raise FileFormatError(path, f"tensor {shown(name)}: its header entry is malformed")
    begin, end = offsets
    if end - begin != math.prod(shape) * fmt.ITEM_BYTES[dtype]:
        what = f"{end - begin:,} bytes do not make {dtype} of shape {shape}"
        raise FileFormatError(path, f"tensor {shown(name)}: {what}")
    return fmt.TensorEntry(dtype, tuple(shape), begin, end - begin)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**63 for x in value)
