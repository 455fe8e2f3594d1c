"""Find the tensors in files of `torch.save`: the zip archives of today, the streams of before, and plain pickles.

A tensor in a pickle is a call that names a storage, an offset, a shape and strides. A storage is a range of bytes of
the file: an uncompressed member of the archive, a part of the stream behind the pickles, or a string of bytes within a
pickle that holds such a stream itself, as plain `pickle.dump` of a tensor makes it.

Pickles are read by Python's own unpickler, with each name that they could import replaced: by functions of ours that
describe tensors, all others by an inert `Node`, whose call makes another. It is the unpickler in Python, since of that
in C strings of bytes cannot be left in the file, nor keys of dicts refused whose hash takes forever. For the same
reasons `torch.load` is not used, and since it maps files: one that shrinks would end the process.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from posthoc_cli.dtypes import DTYPES, ITEM_BYTES
from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.chunks import row_major
from posthoc_cli.snapshots.format import TensorEntry
from posthoc_cli.snapshots.headers import is_sizes
from posthoc_cli.snapshots.tensor_file import OpenedFile

_ZIP = b"PK\x03\x04"
_MOST_REPEATED = 64 * 1024 * 1024
"""Bytes of a tensor whose elements are stored once for several places, as `expand` makes it."""
_MOST_ARGUMENTS = 16
"""Of a call; a pickle may give a million to each of a million calls."""
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LONGEST_LINE = 4096
"""Bytes of a name or number that is written as text."""
_LOCAL_HEADER = struct.Struct("<4s22xHH")

_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": None,
    **{dtype.torch_name: name for name, dtype in DTYPES.items()},
}  # fmt: skip
"""By the names of torch's storages and dtypes; None of a storage of bytes."""


@dataclass(eq=False, repr=False)
class Node(dict[Any, Any]):
    """What a name in a pickle stands for, or an object made by a call of it; `state` would be its attributes.

    What it was filled with like a dict are its items; those of a list are passed over.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None

    __hash__ = object.__hash__  # type: ignore[assignment]  # a Node may be the key of a dict
    __eq__ = object.__eq__

    def __call__(self, *arguments: Any) -> Node:
        """An inert object of the same name."""
        return Node(self.name, arguments)

    def extend(self, _: object) -> None:
        """Pass over the items of a list."""

    append = extend


def read_pickled(file: OpenedFile, begin: int, end: int) -> Any:
    """The object in a range of a file, written by torch.save of any release, or by pickle.

    It is made of plain values, lists, tuples and dicts, a `TensorEntry` for each tensor, and `Node`s for all else. A
    FileFormatError names the file and says what is wrong.
    """

    known: dict[_Bytes, Any] = {}

    def from_bytes(data: Any) -> Any:
        """A storage that was written into a string of bytes; such a string within another is not read."""
        _check(isinstance(data, _Bytes), "a storage without bytes")  # before it is hashed, which may take forever
        if data not in known:
            known[data] = _read_stream(file, data.begin, data.begin + data.nbytes, _CALLS)
        return known[data]

    calls: _Calls = {**_CALLS, "torch.storage._load_from_bytes": from_bytes}
    try:
        is_zip = file.read_at(4, begin) == _ZIP
        return _read_zip(file, begin, end, calls) if is_zip else _read_stream(file, begin, end, calls)
    except _PickleError as error:
        raise FileFormatError(file.path, f"cannot be read as tensors: {error}") from error


class _PickleError(Exception):
    """What is wrong with a pickle, in words that follow the file's name."""


def _check(is_right: bool, wrong: str) -> None:
    if not is_right:
        raise _PickleError(wrong)


@dataclass(frozen=True)
class _Bytes:
    """Bytes of the file: a string of them in a pickle, or a storage, which may have a dtype."""

    begin: int
    nbytes: int
    dtype: str | None = None


_Calls = Mapping[str, Callable[..., Any]]
"""What to do for calls of a name; other calls make nodes."""
_Locate = Callable[[str, int], _Bytes] | None
"""The storage of a key, which is said to have so many bytes; None where there are none."""


# --- archives and streams


def _read_stream(file: OpenedFile, begin: int, end: int, calls: _Calls) -> Any:
    """A pickle, or the five pickles and the storages that torch.save wrote before it made archives."""
    value, start = _unpickled(file, begin, end, calls)
    if value != _LEGACY_MAGIC:
        return value
    protocol, start = _unpickled(file, start, end, calls)
    system, start = _unpickled(file, start, end, calls)
    is_known = protocol == _LEGACY_PROTOCOL and isinstance(system, dict) and system.get("little_endian") is True
    _check(is_known, "is of an unknown release of torch.save, or of a big-endian machine")
    sizes: dict[str, int] = {}
    begins: dict[str, int] = {}

    def locate(key: str, nbytes: int) -> _Bytes:
        sizes[key] = max(nbytes, sizes.get(key, 0))
        return _Bytes(begins.get(key, 0), nbytes)

    # The order of the storages is behind the pickle that refers to them, so that it is read twice.
    _, behind = _unpickled(file, start, end, calls, locate)
    keys, position = _unpickled(file, behind, end, calls)
    for key in keys if isinstance(keys, list) else ():
        if isinstance(key, str):
            begins[key] = position + 8
            position += 8 + sizes.get(key, 0)
    is_whole = position <= end and begins.keys() == sizes.keys()
    _check(is_whole, "truncated, or its storages are not those of its tensors")
    return _unpickled(file, start, end, calls, locate)[0]


def _read_zip(file: OpenedFile, begin: int, end: int, calls: _Calls) -> Any:
    try:
        archive = zipfile.ZipFile(io.BufferedReader(_Range(file, begin, end)))
        members = {info.filename: info for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise _PickleError(f"a damaged or truncated archive: {error}") from error
    _check(len(members) == len(archive.infolist()), "a damaged archive: two members of one name")
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), "")
    _check(bool(root), "is an archive, but not of torch.save: it has no data.pkl")

    def place(name: str) -> _Bytes:
        _check(root + name in members, f"a damaged archive: it has no {name!r}")
        info = members[root + name]
        is_plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        _check(is_plain, "is a compressed or encrypted archive, which torch.save never makes")
        head = file.read_at(_LOCAL_HEADER.size, begin + info.header_offset)
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head.ljust(_LOCAL_HEADER.size))
        at = begin + info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        is_there = head.startswith(_ZIP) and at + info.file_size <= end
        _check(is_there, "a truncated archive, or a member is not where it should be")
        return _Bytes(at, info.file_size)

    if f"{root}byteorder" in members:
        order = place("byteorder")
        _check(file.read_at(min(16, order.nbytes), order.begin) == b"little", "is of a big-endian machine")
    data = place("data.pkl")
    return _unpickled(file, data.begin, data.begin + data.nbytes, calls, lambda key, _: place(f"data/{key}"))[0]


class _Range(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: OpenedFile, begin: int, end: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, end - begin, 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, view: Any) -> int:
        count = self._file.read_into(memoryview(view)[: max(0, self._size - self._at)], self._begin + self._at)
        self._at += count
        return count


class _Buffered(io.BufferedReader):
    """The same, buffered."""

    def readline(self, size: int | None = _LONGEST_LINE) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n"):  # truncated, or longer: what is left of it would be read as operations
            raise EOFError
        return line


# --- pickles


def _unpickled(file: OpenedFile, begin: int, end: int, calls: _Calls, locate: _Locate = None) -> tuple[Any, int]:
    """The value of the pickle that begins at `begin`, and where it ends, at `end` at the latest."""
    stream = _Buffered(_Range(file, begin, end))
    try:
        return _Unpickler(stream, calls, locate, begin).load(), begin + stream.tell()
    except (
        pickle.UnpicklingError, EOFError, LookupError, TypeError, AttributeError, ValueError, OverflowError,
        struct.error, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise _PickleError(f"a damaged pickle, near byte {begin + stream.tell():,}") from error


class _Unpickler(pickle._Unpickler):
    """Imports nothing, and calls only `calls` and nodes."""

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch}
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: Any, calls: _Calls, locate: _Locate, begin: int) -> None:
        super().__init__(stream, encoding="latin-1")
        self._stream, self._calls, self._locate, self._begin = stream, calls, locate, begin

    def find_class(self, module: str, name: str) -> Any:
        """The function for a name, or what stands for it."""
        return self._calls.get(f"{module}.{name}") or Node(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        """The storage of ("storage", type, key, location, number of elements, ...)."""
        known = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[2], str)
        if self._locate is None or not known or not is_sizes(pid[4:5]):
            raise _PickleError("refers to objects outside the file, or to a storage without a size")
        dtype, count = _dtype_of(pid[1]), pid[4]
        return replace(self._locate(pid[2], count * (ITEM_BYTES[dtype] if dtype else 1)), dtype=dtype)

    def call(self, _: object = None) -> None:
        """A call, or an object made without `__init__`, which is the same here. Keyword arguments are ignored."""
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(function(*arguments[:_MOST_ARGUMENTS]))

    def build(self) -> None:
        """Give the last object its state."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Node):
            self.stack[-1].state = state

    def fill(self, items: list[Any]) -> None:
        """Put keys and values into the last object."""
        self.stack[-1].update(_checked_pairs(zip(items[::2], items[1::2], strict=True)))

    def make_dict(self) -> None:
        """A dict of the values since the last mark."""
        items = self.pop_mark()
        self.append({})
        self.fill(items)

    def pass_over(self, layout: str) -> None:
        """Leave a string of bytes in the file."""
        (count,) = struct.unpack(layout, self.read(struct.calcsize(layout)))
        self.append(_Bytes(self._begin + self._stream.tell(), count))
        self._stream.seek(count, os.SEEK_CUR)  # beyond the end nothing is read any more

    # Frames are passed through, so that places in the file are known. Sets become lists: a set would hash what is put
    # into it. Nothing comes from the registry of extensions, whose entries may be real functions.
    dispatch |= {
        pickle.FRAME[0]: lambda self: self.read(8),
        pickle.SHORT_BINBYTES[0]: lambda self: self.pass_over("<B"),
        pickle.BINBYTES[0]: lambda self: self.pass_over("<I"),
        pickle.BINBYTES8[0]: lambda self: self.pass_over("<Q"),
        pickle.BYTEARRAY8[0]: lambda self: self.pass_over("<Q"),
        pickle.EMPTY_SET[0]: dispatch[pickle.EMPTY_LIST[0]],
        pickle.ADDITEMS[0]: dispatch[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: dispatch[pickle.LIST[0]],
        pickle.REDUCE[0]: call,
        pickle.NEWOBJ[0]: call,
        pickle.NEWOBJ_EX[0]: lambda self: self.call(self.stack.pop()),
        pickle.BUILD[0]: build,
        pickle.SETITEM[0]: lambda self: self.fill([self.stack.pop(), self.stack.pop()][::-1]),
        pickle.SETITEMS[0]: lambda self: self.fill(self.pop_mark()),
        pickle.DICT[0]: make_dict,
    }
    for _extension in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[_extension[0]]


def _checked_pairs(pairs: Any) -> dict[Any, Any]:
    """A dict whose keys are texts, numbers, nodes, or tuples of them; the hash of a nested tuple may take forever."""
    made = {}
    for key, value in pairs:
        for part in key if isinstance(key, tuple) else (key,):
            is_long = isinstance(part, int) and abs(part) >= 2**63  # as text it may take forever, too
            if is_long or not isinstance(part, str | int | float | Node | None):
                raise _PickleError(f"a key of a dict is a {type(part).__name__}, or an int of many digits")
        made[key] = value
    return made


# --- the calls of a pickle that make tensors


def _dtype_of(kind: Any) -> str | None:
    """The dtype that a name in a pickle says, that of a storage, too; None for bytes of any."""
    name = kind.name.rpartition(".")[2] if isinstance(kind, Node) else ""
    _check(name in _DTYPES, f"a tensor of {name or 'an unknown kind'}, which is not read")
    return _DTYPES[name]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, kind: Any = None) -> TensorEntry:
    """A tensor within a storage; of a storage of bytes `kind` names the dtype."""
    dtype: Any = _dtype_of(kind) if kind is not None else getattr(storage, "dtype", None)
    fits = isinstance(storage, _Bytes) and is_sizes(shape) and is_sizes(strides) and is_sizes((offset,))
    fits = fits and len(shape) == len(strides) <= 64 and math.prod(s or 1 for s in shape) < 2**60
    _check(fits and dtype is not None, "a tensor without a storage, or with a malformed shape")
    item, count = ITEM_BYTES[dtype], math.prod(shape)
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if count else 0
    _check((offset + reach) * item <= storage.nbytes, "a tensor reaches beyond its storage")
    is_small = count * item <= max(storage.nbytes, _MOST_REPEATED)
    _check(is_small, f"a tensor of shape {list(shape)} that repeats {storage.nbytes:,} bytes")
    in_order = all(one == 1 or a == b for one, a, b in zip(shape, strides, row_major(shape), strict=True))
    kept = () if in_order or not count else tuple(strides)
    return TensorEntry(dtype, tuple(shape), storage.begin + offset * item, count * item, kept)


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    """An OrderedDict, as old and new pickles make it."""
    made = _checked_pairs(pairs)
    if made:
        pairs.clear()  # so that a million calls with a million pairs are soon over
    return made


_CALLS: _Calls = {
    "collections.OrderedDict": _ordered,
    **dict.fromkeys(("builtins.set", "__builtin__.set", "torch.Size"), lambda values=(): values),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": lambda *values: _tensor(*values[:4]),
    "torch._utils._rebuild_tensor_v3": lambda *values: _tensor(*values[:4], values[6]),  # type: ignore[call-arg]
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    # A tensor with attributes, or of a subclass.
    "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, __: function(*arguments[:_MOST_ARGUMENTS]),
}
"""The names that are known, and what is done in place of calls of them."""
