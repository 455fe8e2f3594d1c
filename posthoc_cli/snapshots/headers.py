"""Parse the header of a safetensors file and check it; decode metadata by tables of what it must be.

A file may be hostile or come from a failing disk. Whatever is wrong becomes a FileFormatError that names the file and
the tensor or key; a header that passes is consistent with itself and with the file's size.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import xxhash

from posthoc_cli.dtypes import EPS, ITEM_BYTES
from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.reconstruction import Distance, Measurements, Motion
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Chunk
from posthoc_cli.snapshots.format import check_path, decode_sample
from posthoc_cli.snapshots.selection import GLOBS, Selection

T = TypeVar("T")

_BEGINNING = '{"__metadata__":'
"""The first bytes of a header written by us or by the safetensors library."""

_MOST_DIGITS = 4_300
"""Of a whole number; the limit of Python itself since 3.10.7, unless configured otherwise."""


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
    _check_count(path, start.count(b'"dtype"'))  # before all of them are parsed
    with _named_on_error(path, "header"):
        text = start[8:].decode("utf-8")
        metadata, rest = _split(text)
    if rest is None:
        metadata, tensors = cache.once("whole header", text, lambda: _decode_whole(path, text))
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
    metadata, end = _DECODER.raw_decode(text, len(_BEGINNING))
    if "\\u" in text[len(_BEGINNING) : end]:
        _check_text(metadata)
    # The padding depends on the length of the metadata.
    return metadata, "{" + text[end + 1 :].rstrip(" ") if text.startswith(',"', end) else None


def _decode_whole(path: Path, text: str) -> tuple[Any, dict[str, fmt.TensorEntry]]:
    raw = parse_json(path, text, "header")
    metadata = raw.pop("__metadata__", {}) if isinstance(raw, dict) else {}
    return metadata, _decode_entries(path, raw)


def _decode_entries(path: Path, raw: Any) -> dict[str, fmt.TensorEntry]:
    if not isinstance(raw, dict):
        raise FileFormatError(path, "the header is not a JSON object; not a safetensors file")
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

    `convert` makes the result from it, or raises a ValueError.
    """

    words: str
    accepts: Callable[[Any], bool]
    convert: Callable[[Any], Any] | None = None
    is_text: bool = False
    optional: bool = False

    def result(self, value: Any) -> Any:
        """The checked value; a ValueError says what is wrong."""
        if not self.accepts(value):
            raise ValueError(f"must be {self.words}, not {shown(value)}")
        return value if self.convert is None else self.convert(value)


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


TEXT = Entry("a string", _is_text, is_text=True)
UNIT = Entry("a printable name of what t counts", lambda v: _is_text(v) and v != "" and v.isprintable(), is_text=True)
RUN_ID = Entry(
    "32 hexadecimal digits", lambda v: _is_text(v) and re.fullmatch("[0-9a-f]{32}", v) is not None, is_text=True
)
NUMBER = Entry("a finite number", is_number, float)
AMOUNT = Entry("a finite number, at least 0", is_amount, float)
TIME = replace(NUMBER, words="a time of training", accepts=lambda v: is_number(v) and fmt.EARLIEST <= v <= fmt.LATEST)
AMOUNTS = Entry("a list of finite numbers, at least 0", lambda v: is_list_of(v, is_amount), tuple)
WHOLE = Entry("a whole number, at least 0", is_whole)
TEXTS = Entry("a list of strings", lambda v: is_list_of(v, _is_text), tuple)
LIST = Entry("a list", lambda v: isinstance(v, list))
OBJECT = Entry("a JSON object", lambda v: isinstance(v, dict))


def or_null(entry: Entry) -> Entry:
    """A number as this entry, or null."""
    return replace(
        entry,
        accepts=lambda value: value is None or entry.accepts(value),
        convert=lambda value: None if value is None else float(value),
    )


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
                values[name] = entry.result(raw)
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
        value = _DECODER.decode(text)
        if "\\u" in text:  # only escapes can make invalid text
            _check_text(value)
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

_LEAST_SQUARE = 1e-120
"""Squares below this, or above its inverse, are not used: products and ratios of them overflow."""

Values = Mapping[str, Any]


def decode_snapshot(path: Path, header: fmt.FileHeader, cache: DecodeCache | None = None) -> fmt.SnapshotInfo:
    """The checked metadata of a snapshot; a FileFormatError names the file and the key."""
    cache = cache or DecodeCache()
    values = decode_metadata(path, header, "snapshot", _ENTRIES, cache)
    raw, aliases = values["tensors"], values["aliases"]
    try:
        tensors = cache.once("tensors", (raw, header.tensors), lambda: decode_tensors(raw, header.tensors))
        check_aliases(aliases, tensors)
        chunks: dict[str, Chunk] = {}
        if "part" in values:
            places = values.get("chunks", {})
            chunks = cache.once("chunks", (places, header.tensors), lambda: decode_chunks(places, header.tensors))
    except ValueError as error:
        raise FileFormatError(path, str(error)) from error
    return fmt.SnapshotInfo(**(values | {"tensors": tensors, "chunks": chunks}))


def check_aliases(aliases: Values, tensors: Mapping[str, object]) -> None:
    """A ValueError if one is not a further name of a tensor."""
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in tensors or alias in tensors or alias == "__metadata__":
            raise ValueError(f"ema.aliases: {shown(alias)} must be a further name of a stored tensor")


def decode_tensors(raw: Values, stored: Mapping[str, fmt.TensorEntry]) -> dict[str, fmt.TrackedTensor]:
    """The content of ema.tensors; a ValueError if it does not fit the tensors that are stored."""
    try:
        tensors = {name: fmt.TrackedTensor(**_picked(value, _TRACKED)) for name, value in raw.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"ema.tensors: {error}") from error
    for name in sorted(tensors.keys() | stored.keys()):
        if name not in tensors or name not in stored:
            raise ValueError(f"ema.tensors: tensor {shown(name)} is in the payload or here, but not in both")
        role, own, kept = tensors[name].role, tensors[name].dtype, stored[name].dtype
        if not (own == kept if role == "copy" else own in EPS and kept in EPS):
            raise ValueError(f"ema.tensors: tensor {shown(name)}: {kept} cannot hold {role} of {own}")
    return tensors


def decode_chunks(raw: Values, stored: Mapping[str, fmt.TensorEntry]) -> dict[str, Chunk]:
    """The chunks in a part; a ValueError says what is wrong."""
    chunks = {}
    for name in sorted(raw.keys() | stored.keys()):
        if name not in raw or name not in stored:
            raise ValueError(f"ema.chunks: tensor {shown(name)} is in the payload or here, but not in both")
        value = raw[name]
        if not (isinstance(value, dict) and set(value) == {"shape", "offset"} and all(map(is_sizes, value.values()))):
            raise ValueError(f"ema.chunks: {shown(name)} must have a shape and an offset, not {shown(value)}")
        own, chunk = stored[name].shape, Chunk(tuple(value["shape"]), tuple(value["offset"]))
        fits = len(own) == len(chunk.shape) == len(chunk.offset)
        if not fits or any(last > size for last, size in zip(chunk.box(own).end, chunk.shape, strict=True)):
            what = f"shape {list(own)} at {list(chunk.offset)} is not within {list(chunk.shape)}"
            raise ValueError(f"ema.chunks: tensor {shown(name)}: {what}")
        chunks[name] = chunk
    return chunks


def _is_mesh(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"shape", "names"}:
        return bool(value == {})
    return is_sizes(value["shape"]) and (value["names"] is None or TEXTS.accepts(value["names"]))


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch("([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise ValueError(f"must be two numbers such as 3/8, not {shown(text)}")
    return int(match[1]), int(match[2])


def _picked(value: dict[str, Any], form: Mapping[str, Callable[[Any], bool]]) -> dict[str, Any]:
    """The values of these keys; a ValueError if one is missing or cannot be. Further keys are of later releases."""
    for key, accepts in form.items():
        if key not in value or not accepts(value[key]):
            raise ValueError(f"{key} is {shown(value.get(key))}")
    return {key: value[key] for key in form}


def _schedule(raw: dict[str, Any]) -> fmt.TrackingSchedule:
    found = _picked(raw, _SCHEDULE)
    return fmt.TrackingSchedule(**(found | {"sigma_range": tuple(found["sigma_range"])}))


def _selection(raw: dict[str, Any]) -> Selection:
    found = _picked({"copy_only": [], **raw}, _SELECTION)
    return Selection(**(found | {what: tuple(found[what]) for what in GLOBS}))


def _clock(pairs: list[Any]) -> tuple[tuple[int, float], ...]:
    if len(pairs) > fmt.MAX_KNOTS or not all(is_list_of(pair, is_number) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"must be a list of pairs of a step and its time, at most {fmt.MAX_KNOTS:,}")
    if not all(is_whole(step) for step, _ in pairs):
        raise ValueError("a step must be a whole number")
    return tuple((step, float(t)) for step, t in pairs)


def _measurements(raw: dict[str, Any]) -> Measurements | None:
    """None also for measurements that cannot be used: those of absurd weights."""
    found = _picked({"weights": None, **raw}, _MEASURED)
    listed = [_picked(one, _DISTANCE) for one in found.pop("distances")]
    squares = [*found.values(), *(one[key] for one in listed for key in ("squared", "rounding"))]
    return Measurements(**found, distances=tuple(Distance(**one) for one in listed)) if _usable(squares) else None


def _motion(raw: dict[str, Any]) -> Motion | None:
    """None also for a motion that cannot be used."""
    found = _picked(raw, dict.fromkeys(("edges", "walk", "noise"), AMOUNTS.accepts))
    edges, walk, noise = (np.array(found[name], dtype=np.float64) for name in found)
    if not 1 <= len(walk) <= fmt.MAX_PIECES or len(noise) != len(walk) or len(edges) != len(walk) + 1:
        raise ValueError(f"must have 1 to {fmt.MAX_PIECES:,} values of walk, as many of noise, and one more of edges")
    return Motion(edges, walk, noise) if _usable([*walk, *noise]) else None


def _sample(text: str) -> str:
    decode_sample(text)
    return text


def _usable(squares: Iterable[float | None]) -> bool:
    return all(not square or _LEAST_SQUARE < square < 1 / _LEAST_SQUARE for square in squares)


def _is_count(value: Any) -> bool:
    return is_whole(value) and value >= 1


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in ITEM_BYTES


def _or_none(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or accepts(value)


_SCHEDULE: dict[str, Callable[[Any], bool]] = {
    "update_every": _is_count, "checkpoint_every": _is_count, "update_after_step": is_whole,
    "max_checkpoints": _or_none(_is_count), "checkpoint_dtype": _or_none(_is_dtype),
    "sigma_range": lambda value: is_list_of(value, is_number) and len(value) == 2,
}  # fmt: skip
_SELECTION: dict[str, Callable[[Any], bool]] = {
    "only_trainable": lambda value: isinstance(value, bool),
    "buffers": lambda value: isinstance(value, str),  # "skip" by releases before 0.3
    **dict.fromkeys(GLOBS, TEXTS.accepts),
}
_MEASURED: dict[str, Callable[[Any], bool]] = {
    "norm": is_amount, "rounding": is_amount, "weights": _or_none(is_amount),
    "distances": lambda value: is_list_of(value, OBJECT.accepts),
}  # fmt: skip
_DISTANCE = dict.fromkeys(("t", "sigma_rel", "squared", "rounding"), is_amount)
_TRACKED: dict[str, Callable[[Any], bool]] = {
    "role": lambda value: isinstance(value, str) and value in fmt.ROLES, "dtype": _is_dtype,
}  # fmt: skip

SCHEDULE = replace(OBJECT, convert=_schedule)
PART = replace(TEXT, convert=_part, optional=True)
SKETCH = replace(TEXT, convert=check_path)

_ENTRIES = {
    "run_id": RUN_ID,
    "t_unit": UNIT,
    "sigma_rel": NUMBER,
    "sigma_rels": Entry("a list of numbers", lambda v: is_list_of(v, is_number) and len(v) > 0, tuple),
    "gamma": NUMBER,
    "step": WHOLE,
    "t_first": TIME,
    "t": TIME,
    "max_interval": AMOUNT,
    "schedule": SCHEDULE,
    "tensors": OBJECT,
    "aliases": OBJECT,
    "left_out": TEXTS,
    "selection": replace(OBJECT, convert=_selection, optional=True),
    "updates": replace(WHOLE, optional=True),
    "inherited": replace(AMOUNT, optional=True),
    "off_schedule": Entry("true", lambda value: value == "true", bool, is_text=True, optional=True),
    "clock": replace(LIST, convert=_clock, optional=True),
    "measurements": replace(OBJECT, convert=_measurements, optional=True),
    "motion": replace(OBJECT, convert=_motion, optional=True),
    "sample": replace(TEXT, convert=_sample, optional=True),
    "sketch": replace(SKETCH, optional=True),
    "part": PART,
    "chunks": replace(OBJECT, optional=True),
    "mesh": Entry("an object of shape and names", _is_mesh, optional=True),
    "session": replace(WHOLE, optional=True),
}
"""What the metadata of a snapshot must be. What a right checksum stands under is of that form and of these tensors; its
meaning is not doubted: checksums are there for accidents, and are no signatures."""
