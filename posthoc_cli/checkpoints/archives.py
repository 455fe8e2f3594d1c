"""Find the tensors in files of `torch.save`: the zip archives of today, the streams of before, and plain pickles.

A tensor in a pickle is a call that names a storage, an offset, a shape and strides. A storage is a range of bytes of
the file: an uncompressed member of the archive, a part of the stream behind the pickles, or a string of bytes within a
pickle that holds such a stream itself, as plain `pickle.dump` of a tensor makes it.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

from posthoc_cli.checkpoints.pickles import Call, Extent, Name, PickleError, pickled_value
from posthoc_cli.dtypes import DTYPES, ITEM_BYTES
from posthoc_cli.snapshots.chunks import row_major
from posthoc_cli.snapshots.tensor_file import OpenedFile

ZIP = b"PK\x03\x04"
_MOST_REPEATED = 64 * 1024 * 1024
"""Bytes of a tensor whose elements are stored once for several places, as `expand` makes it."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_BY_TORCH_NAME = {dtype.torch_name: name for name, dtype in DTYPES.items()}
_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32", "Short": "I16",
    "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip
"""Names of torch's storages of one dtype, without `Storage`."""


@dataclass(eq=False)
class Storage:
    """A range of the file: `begin` is known once the stream behind the pickles was seen; no dtype if it is untyped."""

    dtype: str | None
    nbytes: int
    begin: int = -1


@dataclass(frozen=True)
class FoundTensor:
    """A tensor in a file: `begin` in bytes from the file's start, `strides` in elements."""

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements are stored in their order, without gaps."""
        wanted = row_major(self.shape)
        return not self.nbytes or all(
            size == 1 or step == own for size, step, own in zip(self.shape, self.strides, wanted, strict=True)
        )


@dataclass(frozen=True)
class View:
    """A tensor in a pickle, with its place in a storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def found(self) -> FoundTensor:
        """The tensor, once its storage has its place; a PickleError if it reaches beyond that."""
        item = ITEM_BYTES[self.dtype]
        reach = 0
        if math.prod(self.shape):
            reach = 1 + sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        if self.storage.begin < 0 or (self.offset + reach) * item > self.storage.nbytes:
            raise PickleError("a tensor reaches beyond its storage")
        if math.prod(self.shape) * item > max(self.storage.nbytes, _MOST_REPEATED):
            raise PickleError(f"a tensor of shape {list(self.shape)} that repeats {self.storage.nbytes:,} bytes")
        begin = self.storage.begin + self.offset * item
        return FoundTensor(self.dtype, self.shape, self.strides, begin, begin + reach * item)


def read_archive(file: OpenedFile, begin: int, end: int) -> Any:
    """The object in a range of a file: written by torch.save of any release, or by pickle; tensors are `View`s."""
    if file.read_at(4, begin) == ZIP:
        return _read_zip(file, begin, end)
    return _read_stream(file, begin, end, _calls(file))


def _read_stream(file: OpenedFile, begin: int, end: int, calls: dict[str, Call]) -> Any:
    """A pickle, or the five pickles and the storages that torch.save wrote before it made archives."""
    storages: dict[str, Storage] = {}
    value, position = pickled_value(file, begin, end, calls, _persistent(storages))
    if value != _LEGACY_MAGIC:
        if storages:
            raise PickleError("refers to storages outside the file")
        return value
    protocol, position = pickled_value(file, position, end, calls)
    system, position = pickled_value(file, position, end, calls)
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict) or system.get("little_endian") is not True:
        raise PickleError("is of an unknown release of torch.save, or of a big-endian machine")
    value, position = pickled_value(file, position, end, calls, _persistent(storages))
    keys, position = pickled_value(file, position, end, calls)
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key)
        if storage is None or storage.begin >= 0:
            raise PickleError("a damaged file: its storages are not those of its tensors")
        storage.begin = position + 8
        position += 8 + storage.nbytes
    if position > end or any(storage.begin < 0 for storage in storages.values()):
        raise PickleError("truncated: it ends within a tensor")
    return value


def _read_zip(file: OpenedFile, begin: int, end: int) -> Any:
    try:
        archive = zipfile.ZipFile(_Window(file, begin, end))
        members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise PickleError(f"a damaged or truncated archive: {error}") from error
    if len(members) != len(archive.infolist()):
        raise PickleError("a damaged archive: two members of one name")
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
    if root is None:
        raise PickleError("is an archive, but not of torch.save: it has no data.pkl")

    def place(name: str) -> Extent:
        info = members.get(root + name)
        if info is None:
            raise PickleError(f"a damaged archive: it has no {name!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise PickleError("is a compressed or encrypted archive, which torch.save never makes")
        head = file.read_at(_LOCAL_HEADER.size, begin + info.header_offset)
        if len(head) < _LOCAL_HEADER.size or not head.startswith(ZIP):
            raise PickleError("a damaged archive: a member is not where it should be")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head)
        at = begin + info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if at + info.file_size > end:
            raise PickleError("truncated: the archive ends within a tensor")
        return Extent(at, at + info.file_size)

    if f"{root}byteorder" in members:
        order = place("byteorder")
        if file.read_at(min(16, order.end - order.begin), order.begin) != b"little":
            raise PickleError("is of a big-endian machine")
    storages: dict[str, Storage] = {}
    data = place("data.pkl")
    value, _ = pickled_value(file, data.begin, data.end, _calls(file), _persistent(storages))
    for key, storage in storages.items():
        held = place(f"data/{key}")
        if held.end - held.begin < storage.nbytes:
            raise PickleError(f"a damaged archive: data/{key} is too short")
        storage.begin = held.begin
    return value


class _Window(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: OpenedFile, begin: int, end: int) -> None:
        self._file, self._begin, self._end, self._position = file, begin, end, begin

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self._begin

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: self._begin, os.SEEK_CUR: self._position, os.SEEK_END: self._end}[whence]
        if start + offset < self._begin:
            raise OSError("before the start")
        self._position = start + offset
        return self.tell()

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._end - self._position)
        data = self._file.read_at(left if size < 0 else min(size, left), self._position)
        self._position += len(data)
        return data


# --- the calls of a pickle that make tensors


def _persistent(storages: dict[str, Storage]) -> Call:
    """Storages by their keys, as a pickle refers to them: ("storage", type, key, location, number of elements, ...)."""

    def load(key: Any) -> Any:
        if not (isinstance(key, tuple) and len(key) >= 5 and key[0] == "storage" and isinstance(key[2], str)):
            raise PickleError("refers to objects outside the file")
        dtype, count = _storage_dtype(key[1]), _size(key[4])
        storage = Storage(dtype, count * (ITEM_BYTES[dtype] if dtype else 1))
        return storages.setdefault(key[2], storage)

    return load


def _storage_dtype(kind: Any) -> str | None:
    """The dtype of a storage's type; None for one of bytes."""
    name = kind.text.rpartition(".")[2] if isinstance(kind, Name) else ""
    if name == "UntypedStorage":
        return None
    dtype = _STORAGES.get(name.removesuffix("Storage"))
    if dtype is None:
        raise PickleError(f"a tensor of {name or 'an unknown kind'}, which is not read")
    return dtype


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**60:
        raise PickleError("a tensor with a malformed size")
    return value


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > 64:
        raise PickleError("a tensor with a malformed shape")
    return tuple(map(_size, values))


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: str | None = None) -> View:
    if not isinstance(storage, Storage):
        raise PickleError("a tensor without a storage")
    own, sizes, steps = dtype or storage.dtype, _sizes(shape), _sizes(strides)
    if own is None or len(sizes) != len(steps) or math.prod(size or 1 for size in sizes) >= 2**60:
        raise PickleError("a tensor with a malformed shape")
    return View(storage, own, _size(offset), sizes, steps)


def _view_of_dtype(storage: Any, offset: Any, shape: Any, strides: Any, _: Any, __: Any, dtype: Any, *___: Any) -> View:
    name = dtype.text.removeprefix("torch.") if isinstance(dtype, Name) else ""
    if name not in _BY_TORCH_NAME:
        raise PickleError(f"a tensor of dtype {name or 'unknown'}, which is not read")
    return _view(storage, offset, shape, strides, _BY_TORCH_NAME[name])


def _calls(file: OpenedFile) -> dict[str, Call]:
    within = _TENSOR_CALLS
    known: dict[Extent, Any] = {}

    def from_bytes(data: Any) -> Any:
        """A storage that was written into a string of bytes; such a string within another is not read."""
        if not isinstance(data, Extent):
            raise PickleError("a tensor without a storage")
        if data not in known:
            known[data] = _read_stream(file, data.begin, data.end, within)
        return known[data]

    return within | {"torch.storage._load_from_bytes": from_bytes}


_TENSOR_CALLS: dict[str, Call] = {
    "torch._utils._rebuild_tensor": _view,
    "torch._utils._rebuild_tensor_v2": lambda *values: _view(*values[:4]),
    "torch._utils._rebuild_tensor_v3": _view_of_dtype,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
}
