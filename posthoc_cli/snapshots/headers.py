"""Headers from bytes: parsed and checked, with nothing taken on trust; those of any safetensors file.

A file may come from a stranger or from a failing disk. Whatever is wrong becomes a FileFormatError that
names the file and the tensor or key; what passes is consistent with itself and with the file's size.

What the headers of a run say alike, decoded once and held once in memory: there may be thousands, each naming every
tensor.
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


class Sharing:
    """What the header before said, for the next one: most of both is the same, word for word."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._decoded: dict[str, tuple[object, Any]] = {}

    def texts(self, metadata: dict[str, str]) -> dict[str, str]:
        """The same metadata; a text that the header before had, too, is that one's object."""
        last = self._texts
        self._texts = {key: last[key] if last.get(key) == text else text for key, text in metadata.items()}
        return self._texts

    def once(self, key: str, said: object, decode: Callable[[], T]) -> T:
        """What `decode` makes of what is said: the same object again where the last one under this key said the same.

        Arguments:
            said: all that the result follows from.
            decode: how; whoever gets the result does not change it.
        """
        last = self._decoded.get(key)
        if last is None or last[0] != said:
            last = self._decoded[key] = said, decode()
        result: T = last[1]
        return result


# --- The metadata of one file: typed access, with nothing taken on trust ---------------------------


_DECIMAL = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")

_MOST_DIGITS = 4_300
"""What Python itself accepts since 3.10.7, unless told otherwise."""


def file_kind(header: fmt.FileHeader) -> str | None:
    """ "snapshot", "output", "state", or None for a file that is none of them."""
    return header.metadata.get("ema.format")


def parse_json(path: Path, data: bytes | str, what: str) -> Any:
    """JSON without the liberties that Python takes: no key twice, no NaN, no text that is none.

    Raises:
        FileFormatError: naming the file and `what`.
    """
    text = data if isinstance(data, str) else decode_text(path, data, what)
    with _damage_named(path, what):
        value = _decoder().decode(text)
        if "\\u" in text:  # all other text is as it was decoded
            _check_text(value)
        return value


def decode_text(path: Path, data: bytes, what: str) -> str:
    """Text from UTF-8.

    Raises:
        FileFormatError: naming the file and `what`.
    """
    with _damage_named(path, what):
        return data.decode("utf-8")


def parse_json_at(path: Path, text: str, begin: int, what: str) -> tuple[Any, int]:
    """As `parse_json`, a value within a text, and where it ends.

    Raises:
        FileFormatError: naming the file and `what`.
    """
    with _damage_named(path, what):
        value, end = _decoder().raw_decode(text, begin)
        if "\\u" in text[begin:end]:
            _check_text(value)
        return value, end


@contextmanager
def _damage_named(path: Path, what: str) -> Iterator[None]:
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

    return json.JSONDecoder(object_pairs_hook=unique, parse_constant=refuse, parse_int=_parse_int())


def _parse_int() -> Callable[[str], int] | None:
    """None, the fast way, where Python itself refuses numbers of thousands of digits, which take it hours."""
    limit: Callable[[], int] = getattr(sys, "get_int_max_str_digits", lambda: 0)
    return None if limit() else _short_int


def _short_int(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _check_text(value: Any) -> None:
    """Refuse text that escapes have made of what is none: halves of a character, zero bytes."""
    left = [("", value)]
    while left:
        key, one = left.pop()
        if isinstance(one, dict):
            left += [*((name, name) for name in one), *one.items()]
        elif isinstance(one, list):
            left += [(key, item) for item in one]
        elif isinstance(one, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in one):
            raise ValueError(f"{shown(key)}: {shown(one)} is not Unicode text, or has a zero byte")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


class Metadata:
    """Typed access to the metadata of one file, with errors that name the file and the key."""

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
        """An error to raise: what is wrong with a key."""
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
        """What time counts, as `tracker.settings` accepts it: a word for tables and pictures."""
        text = self.text("ema.t_unit")
        if not (text and text.isprintable()):
            raise self.bad("ema.t_unit", f"{shown(text)} does not name what t counts")
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
        """A whole number."""
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

    def one_of(self, key: str, value: Any, part: str, accepted: tuple[str, ...]) -> str:
        """The string `part` of the object `value`, one of those accepted."""
        found = value.get(part) if isinstance(value, dict) else None
        if not isinstance(found, str) or found not in accepted:
            raise self.bad(key, f"{part} {shown(found)} is none of {', '.join(accepted)}")
        return found


# --- Headers from bytes: parsed and checked, with nothing taken on trust; those of any safetensors file ---


_BEGINNING = '{"__metadata__":'
"""What headers begin with that were written by us, or by the safetensors library."""


def decode_header(path: Path, start: bytes, file_bytes: int | None, sharing: Sharing | None = None) -> fmt.FileHeader:
    """Parse and check the first 8 + N bytes of a file of `file_bytes` bytes; None where that does not matter.

    Checks everything that can be checked without the payload: JSON without duplicate keys, known dtypes,
    offsets that tile the payload without gap or overlap, the file's size, the header's checksum where it has one.

    Arguments:
        sharing: of the files that are read one after another.

    Raises:
        FileFormatError: naming the file, and the tensor where there is one.
    """
    sharing = sharing or Sharing()
    text = decode_text(path, start[8:], "header")
    split = _split(path, text)
    if split is None:
        raw = _header_object(path, text)
        metadata, tensors = raw.pop("__metadata__", {}), _decode_entries(path, raw)
    else:
        metadata, rest = split
        tensors = sharing.once("header", rest, lambda: _decode_entries(path, _header_object(path, rest)))
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(path, "__metadata__ must map names to strings")
    header = fmt.FileHeader(sharing.texts(metadata), tensors, len(start))
    if file_bytes is not None and header.file_bytes != file_bytes:
        state = "truncated" if file_bytes < header.file_bytes else "longer than it should be"
        raise FileFormatError(path, f"{state}: has {file_bytes:,} bytes, its header says {header.file_bytes:,}")
    if "ema.checksum" in metadata or "ema.format" in metadata:
        _check_header_checksum(path, start)
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
        if not isinstance(value, str) or len(value) != fmt.CHECKSUM_DIGITS * -(-entry.nbytes // fmt.BLOCK_BYTES):
            raise FileFormatError(path, f"tensor {shown(name)}: ema.checksums does not hold one checksum a block")
    return raw


def has_header_checksum(start: bytes, checksum: str) -> bool:
    """Whether a header carries this checksum, and rightly so: two headers of one checksum are the same."""
    before, mark, after = start.partition(fmt.CHECKSUM_MARK)
    carried, after = after[: fmt.CHECKSUM_DIGITS], after[fmt.CHECKSUM_DIGITS :]
    blank = before + mark + b"0" * fmt.CHECKSUM_DIGITS + after
    return carried == checksum.encode() == xxhash.xxh3_64_hexdigest(blank).encode()


# --- in parts --------------------------------------------------------------------------------------


def _split(path: Path, text: str) -> tuple[Any, str] | None:
    """The metadata, and the other entries as an object of their own: the same text in every snapshot of a run.

    None for a header that does not begin with its metadata.
    """
    if not text.startswith(_BEGINNING):
        return None
    metadata, end = parse_json_at(path, text, len(_BEGINNING), "header")
    if not text.startswith(',"', end):
        return None
    return metadata, "{" + text[end + 1 :].rstrip(" ")  # padding, as the length of the metadata wants it


def _header_object(path: Path, text: str) -> dict[str, Any]:
    raw = parse_json(path, text, "header")
    if not isinstance(raw, dict):
        raise FileFormatError(path, "the header is not a JSON object; not a safetensors file")
    return raw


def _decode_entries(path: Path, raw: Mapping[str, Any]) -> dict[str, fmt.TensorEntry]:
    if "__metadata__" in raw:  # split off before, or taken out
        raise FileFormatError(path, "damaged header: the same key twice")
    tensors = {name: _decode_entry(path, name, value) for name, value in raw.items()}
    _check_offsets(path, tensors)
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


def _check_offsets(path: Path, tensors: Mapping[str, fmt.TensorEntry]) -> None:
    position = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin != position:
            raise FileFormatError(path, f"tensor {shown(name)}: begins at {entry.begin:,} where {position:,} was due")
        position += entry.nbytes


def _check_header_checksum(path: Path, start: bytes) -> None:
    if start.count(fmt.CHECKSUM_MARK) != 1:
        raise FileFormatError(path, "the header has no checksum, or several")
    if not has_header_checksum(start, fmt.header_checksum(start)):
        raise FileFormatError(path, "damaged header: its checksum does not match")
