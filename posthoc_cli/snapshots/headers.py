"""Headers from bytes: parsed and checked, with nothing taken on trust; those of any safetensors file.

A file may come from a stranger or from a failing disk. Whatever is wrong becomes a FileFormatError that
names the file and the tensor or key; what passes is consistent with itself and with the file's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from posthoc_cli.errors import FileFormatError, shown
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.metadata import decode_text, file_kind, parse_json, parse_json_at
from posthoc_cli.snapshots.sharing import Sharing

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
