"""Find the tensors in files of `torch.save`, which are zip archives, and in those of `pickle.dump`.

A tensor in a pickle is a call with a storage, an offset, a shape and strides. A storage is a range of bytes of the
file: an uncompressed member of the archive, or the end of a string of bytes in a pickle.

Pickles are read by the interpreter of their opcodes here, which imports nothing: it has functions of this module for
the few names that make tensors, and an inert `Node`, whose call makes another node, for each other name. Python's own
unpickler can neither leave strings of bytes in the file nor limit what a pickle makes in proportion to its length.
`torch.load` can do neither, and it maps files: a file that shrinks would end the process.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from posthoc_cli.dtypes import DTYPES, ITEM_BYTES
from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots.tensorfile import Entry, OpenedFile, is_sizes, row_major

_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STREAM_MAGIC, _STREAM_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001

_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "UntypedStorage": None,
    **{dtype.torch_name: name for name, dtype in DTYPES.items()},
}  # fmt: skip
"""Dtypes by the names of torch's storages and dtypes; None for a storage of bytes."""

Keys = tuple[str, ...]
"""Keys that lead to a tensor within a file's content."""
PARAMETERS = "shadow_params"
"""Key of averages in a list, in the order of the model's parameters."""


class _PickleError(Exception):
    """A fault of a pickle, as a phrase to follow the file's name."""


def _check(is_valid: bool, problem: str) -> None:
    """Raise _PickleError if a condition does not hold."""
    if not is_valid:
        raise _PickleError(problem)


class _Budget:
    """What reading a file may cost, so that a hostile one is refused early: three times its length and `FREE`.

    The densest of real pickles, of many small tensors with short names, cost 3.0 to 3.4 times their length.
    """

    FREE = 2**26
    OPCODE, CONTAINER = 4, 32
    """What an opcode of a pickle costs, which may be longer in memory, and one that makes a dict, list or set."""
    VALUE = 64
    """What a value of the content costs, in addition to the length of its name: a few bytes can refer to a dict again
    and again, under long names."""
    SHARED = 8
    """The tensors of a file have at most this multiple of its bytes and `FREE` more: views of one storage may overlap,
    and be expanded. One tensor that repeats elements has at most `FREE`."""
    ARGUMENTS = 16
    """Largest number of arguments of a call that are used, and of items of a key: a pickle may pass a million to each
    of a million calls."""

    def __init__(self, nbytes: int) -> None:
        self._left = self.FREE + 3 * nbytes

    def spend(self, cost: int) -> None:
        self._left -= cost
        if self._left < 0:
            raise _PickleError("it makes more objects, or longer names, than its length explains")


@dataclass(eq=False, repr=False)
class Node(dict[Any, Any]):
    """An inert object in place of an imported name, or of the result of its call; `state` holds its attributes.

    Its items are those of a subclass of dict; items of a subclass of list are ignored.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None

    __hash__ = object.__hash__  # type: ignore[assignment]  # a Node may be the key of a dict
    __eq__ = object.__eq__

    def __call__(self, *arguments: Any) -> Node:
        """Return a node of the same name."""
        return Node(self.name, arguments)

    def extend(self, _: object) -> None:
        """Ignore the items of a list."""

    append = extend


class _Bytes(NamedTuple):
    """A range of bytes of the file: a string of bytes in a pickle, or a storage, which may have a dtype."""

    begin: int
    nbytes: int
    dtype: str | None = None


_Locate = Callable[[str, int], _Bytes] | None
"""A function that returns the storage of a key, with an expected number of bytes; None if there are no storages."""


@contextmanager
def _reading(file: OpenedFile) -> Iterator[None]:
    """Turn a _PickleError in the block into a FileFormatError."""
    try:
        yield
    except _PickleError as error:
        raise FileFormatError(file.path, f"cannot be read as tensors: {error}") from error


def read_pickled(file: OpenedFile, begin: int, end: int) -> Any:
    """Return the object in a range of a file, written by torch.save since release 1.6, or by pickle.

    It consists of plain values, lists, tuples and dicts, an `Entry` for each tensor, and a `Node` for each other
    object. Raise FileFormatError if it cannot be read.
    """
    with _reading(file):
        return _read(file, begin, end, _Budget(end - begin))


def read_tensors(file: OpenedFile) -> dict[Keys, Any]:
    """Return the tensors, numbers and texts in dicts, and the averages in lists, by the keys that lead to each.

    A tensor of a kind that is not read (sparse, quantized, spread over processes) remains a node. The names of modules
    within a pickled module are one key, joined by dots, as in a state dict. Errors are those of `read_pickled`.
    """
    leaves: dict[Keys, Any] = {}
    budget = _Budget(file.size)
    with _reading(file):
        pending: list[tuple[Keys, Any, bool]] = [((), _read(file, 0, file.size, budget), False)]
        while pending:
            keys, item, is_in_module = pending.pop()
            if isinstance(item, list) and keys[-1:] == (PARAMETERS,):
                item = dict(enumerate(item))
            if not isinstance(item, dict) or (isinstance(item, Node) and item.name.startswith("torch._utils._rebuild")):
                if keys and isinstance(item, Node | Entry | int | float | str):
                    leaves[keys] = item
            else:
                module = _module_tensors(item) if isinstance(item, Node) else None
                is_module, content = module is not None, module or item
                for key in reversed(content):
                    if isinstance(key, str | int):
                        is_inner = is_module and is_in_module
                        name = (*keys[:-1], f"{keys[-1]}.{key}") if is_inner else (*keys, str(key))
                        pending.append((name, content[key], is_module))
                        budget.spend(budget.VALUE + len(".".join(name)))
        total = sum(entry.nbytes for entry in {value for value in leaves.values() if isinstance(value, Entry)})
        _check(
            total <= budget.SHARED * file.size + budget.FREE,
            f"its tensors share bytes, and would take {total:,} in place of {file.size:,}",
        )
    return leaves


def _module_tensors(node: Node) -> dict[Any, Any] | None:
    """Return the parameters, buffers and inner modules of a pickled torch module; None for another object.

    The attributes of a module are its state, one of its arguments, or under `state` in one of these.
    """
    parts = ("_parameters", "_buffers", "_modules")
    for value in (node.state, *node.arguments):
        for state in (value, value.get("state")) if isinstance(value, dict) else ():
            if isinstance(state, dict) and all(isinstance(state.get(part), dict) for part in parts):
                unsaved = state.get("_non_persistent_buffers_set")
                names = {key for key in unsaved if isinstance(key, str)} if isinstance(unsaved, list) else set()
                return {key: value for part in parts for key, value in state[part].items() if key not in names}
    return None


# --- archives, and storages in pickles


def _read(file: OpenedFile, begin: int, end: int, budget: _Budget) -> Any:
    """Return the object in an archive, or in a pickle, whose storages are strings of bytes in it."""
    known: dict[_Bytes, _Bytes] = {}

    def from_bytes(data: Any) -> _Bytes:
        _check(isinstance(data, _Bytes), "a storage without bytes")  # before it is hashed, which may take forever
        if data not in known:
            known[data] = _storage_in(file, data, budget)
        return known[data]

    locate = None
    if file.read_at(4, begin) == _ZIP:
        (begin, nbytes, _), locate = _open_archive(file, begin, end)
        end = begin + nbytes
    calls = _CALLS | {"torch.storage._load_from_bytes": from_bytes}
    value, _ = _unpickled(file, begin, end, budget, calls, locate)
    is_old = value == _STREAM_MAGIC
    _check(not is_old, "is of torch.save before release 1.6, or without its zip archive: load and save it again")
    return value


def _storage_in(file: OpenedFile, data: _Bytes, budget: _Budget) -> _Bytes:
    """Return the storage in a string of bytes: five pickles, of which the fourth names it, its length and its bytes."""
    values: list[Any] = []
    at, end = data.begin, data.begin + data.nbytes
    for _ in range(5):
        value, at = _unpickled(file, at, end, budget, _CALLS, lambda _, nbytes: _Bytes(0, nbytes))
        values.append(value)
    magic, protocol, system = values[:3]
    storage: _Bytes = values[3]
    is_known = (magic, protocol) == (_STREAM_MAGIC, _STREAM_PROTOCOL) and isinstance(storage, _Bytes)
    is_little = isinstance(system, dict) and system.get("little_endian") is True
    _check(is_known and is_little, "is of an unknown release of torch.save, or of a big-endian machine")
    _check(at + 8 + storage.nbytes <= end, "truncated, or its storages are not those of its tensors")
    return storage._replace(begin=at + 8)


def _open_archive(file: OpenedFile, begin: int, end: int) -> tuple[_Bytes, _Locate]:
    """Return the range of the pickle in an archive, and the function that locates its storages."""
    try:
        listed = zipfile.ZipFile(io.BufferedReader(_Range(file, begin, end))).infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, struct.error) as error:
        raise _PickleError(f"a damaged or truncated archive: {error}") from error
    members = {info.filename: info for info in listed}
    _check(len(members) == len(listed), "a damaged archive: two members of one name")
    root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), "")
    _check(bool(root), "is an archive, but not of torch.save: it has no data.pkl")

    def locate(name: str) -> _Bytes:
        _check(root + name in members, f"a damaged archive: it has no {name!r}")
        info = members[root + name]
        is_plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        _check(is_plain, "is a compressed or encrypted archive, which torch.save never makes")
        head = file.read_at(_LOCAL_HEADER.size, begin + info.header_offset)
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(head.ljust(_LOCAL_HEADER.size))
        start = begin + info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        is_in_range = head.startswith(_ZIP) and start + info.file_size <= end
        _check(is_in_range, "a truncated archive, or a member is not where it should be")
        return _Bytes(start, info.file_size)

    if f"{root}byteorder" in members:
        order = locate("byteorder")
        _check(file.read_at(min(16, order.nbytes), order.begin) == b"little", "is of a big-endian machine")
    return locate("data.pkl"), lambda key, _: locate(f"data/{key}")


class _Range(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: OpenedFile, begin: int, end: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, end - begin, 0

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = min(max(0, at), self._size)
        return self._at

    def readinto(self, view: Any) -> int:
        count = self._file.read_into(memoryview(view)[: self._size - self._at], self._begin + self._at)
        self._at += count
        return count


# --- pickles


def _unpickled(
    file: OpenedFile, begin: int, end: int, budget: _Budget, calls: dict[str, Callable[..., Any]], locate: _Locate
) -> tuple[Any, int]:
    """Return the object in the pickle that begins at `begin`, and the end of the pickle, which is `end` at most."""
    machine = _Machine(io.BufferedReader(_Range(file, begin, end)), begin, budget, calls, locate)
    try:
        return machine.run(), begin + machine.stream.tell()
    except (
        LookupError, TypeError, AttributeError, ValueError, OverflowError, struct.error, RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise _PickleError(f"a damaged pickle, near byte {begin + machine.stream.tell():,}") from error


@dataclass
class _Machine:
    """The machine that a pickle is a program for, see the standard `pickletools`.

    `calls` are the functions in place of those that the pickle names; calls of other names make nodes.
    """

    stream: io.BufferedReader
    begin: int
    budget: _Budget
    calls: dict[str, Callable[..., Any]]
    locate: _Locate
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.push = self.stack.append

    def run(self) -> Any:
        """Run the program, and return the object that it leaves."""
        while True:
            read, do, cost = _OPCODES[self.stream.read(1)]
            self.budget.spend(cost)
            argument = read(self.stream) if read else None
            if do is None:
                return self.stack.pop()
            do(self, argument)

    def since_mark(self) -> list[Any]:
        """Remove and return what was pushed since the last mark."""
        begin = self.marks.pop()
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def last(self, count: int) -> list[Any]:
        """Remove and return the last objects."""
        items = self.stack[-count:]
        _check(len(items) == count, "an object is missing")
        del self.stack[-count:]
        return items

    def named(self, module: Any, name: Any) -> Any:
        """Return the function for a name, or a node."""
        _check(isinstance(module, str) and isinstance(name, str), "a name that is no text")
        self.budget.spend(len(module) + len(name))
        return self.calls.get(f"{module}.{name}") or Node(f"{module}.{name}")

    def call(self, function: Any, arguments: Any) -> None:
        """Call a function, or make an object without `__init__`, which is the same here."""
        self.push(function(*arguments[: _Budget.ARGUMENTS]))

    def build(self, state: Any) -> None:
        """Set the state of the last object."""
        if isinstance(self.stack[-1], Node):
            self.stack[-1].state = state

    def push_storage(self) -> None:
        """Replace ("storage", type, key, location, number of elements, ...) by the storage."""
        pid = self.stack.pop()
        is_storage = isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[2], str)
        if self.locate is None or not is_storage or not is_sizes(pid[4:5]):
            raise _PickleError("refers to objects outside the file, or to a storage without a size")
        dtype, count = _dtype_of(pid[1]), pid[4]
        self.push(self.locate(pid[2], count * (ITEM_BYTES[dtype] if dtype else 1))._replace(dtype=dtype))

    def push_bytes(self, layout: str) -> None:
        """Push the range of a string of bytes, and skip it; beyond the end of the file no further opcode is found."""
        (count,) = struct.unpack(layout, self.stream.read(struct.calcsize(layout)))
        self.push(_Bytes(self.begin + self.stream.tell(), count))
        self.stream.seek(count, os.SEEK_CUR)


_DO: dict[str, Callable[[_Machine, Any], object] | None] = {
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BINFLOAT"),
        lambda m, value: m.push(value),
    ),
    "NONE": lambda m, _: m.push(None), "NEWTRUE": lambda m, _: m.push(True), "NEWFALSE": lambda m, _: m.push(False),
    # Strings of bytes stay in the file.
    "SHORT_BINBYTES": lambda m, _: m.push_bytes("<B"), "BINBYTES": lambda m, _: m.push_bytes("<I"),
    "BINBYTES8": lambda m, _: m.push_bytes("<Q"), "BYTEARRAY8": lambda m, _: m.push_bytes("<Q"),
    # Sets become lists: a set would hash its items.
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, _: m.push([])),
    "FROZENSET": lambda m, _: m.push(m.since_mark()),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: (items := m.since_mark(), m.stack[-1].extend(items))),
    "APPEND": lambda m, _: (item := m.stack.pop(), m.stack[-1].append(item)),
    "EMPTY_TUPLE": lambda m, _: m.push(()), "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.push(tuple(m.last(1))), "TUPLE2": lambda m, _: m.push(tuple(m.last(2))),
    "TUPLE3": lambda m, _: m.push(tuple(m.last(3))),
    "EMPTY_DICT": lambda m, _: m.push({}),
    "SETITEM": lambda m, _: (items := _dict_of(m.last(2)), m.stack[-1].update(items)),
    "SETITEMS": lambda m, _: (items := _dict_of(m.since_mark()), m.stack[-1].update(items)),
    "MARK": lambda m, _: m.marks.append(len(m.stack)), "POP_MARK": lambda m, _: m.since_mark(),
    "POP": lambda m, _: m.stack.pop(),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), lambda m, index: m.memo.update({index: m.stack[-1]})),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    "GLOBAL": lambda m, names: m.push(m.named(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.push(m.named(*m.last(2))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.call(*m.last(2))),
    "NEWOBJ_EX": lambda m, _: m.call(*m.last(3)[:2]),
    "BUILD": lambda m, _: m.build(m.stack.pop()), "BINPERSID": lambda m, _: m.push_storage(),
    "PROTO": lambda *_: None, "FRAME": lambda *_: None, "STOP": None,
}  # fmt: skip
"""What the opcodes of protocols 2 to 5 do; torch.save writes 2, later ones add to it. Others are refused: the extension
registry may hold real functions, and buffers are elsewhere."""

_OPCODES: dict[bytes, tuple[Callable[[Any], Any] | None, Callable[[_Machine, Any], object] | None, int]] = {
    opcode.code.encode("latin-1"): (
        None if opcode.arg is None or "BYTE" in opcode.name else opcode.arg.reader, _DO[opcode.name],
        _Budget.CONTAINER if opcode.name in ("EMPTY_LIST", "EMPTY_SET", "EMPTY_DICT", "FROZENSET") else _Budget.OPCODE,
    )
    for opcode in pickletools.opcodes if opcode.name in _DO
}  # fmt: skip
"""The reader of an opcode's argument, what it does, and its cost."""


def _dict_of(items: list[Any]) -> dict[Any, Any]:
    """Return a dict of alternating keys and values."""
    return _checked_pairs(zip(items[::2], items[1::2], strict=True))


def _checked_pairs(pairs: Any) -> dict[Any, Any]:
    """Return a dict of the pairs; raise _PickleError for keys whose hash or text may take forever, as long tuples."""
    checked = {}
    for key, value in pairs:
        parts = key if isinstance(key, tuple) else (key,)
        _check(len(parts) <= _Budget.ARGUMENTS, "a key of a dict is a long tuple")
        for part in parts:
            is_long = isinstance(part, int) and abs(part) >= 2**63
            if is_long or not isinstance(part, str | int | float | Node | None):
                raise _PickleError(f"a key of a dict is a {type(part).__name__}, or an int of many digits")
        checked[key] = value
    return checked


# --- the calls of a pickle that make tensors


def _dtype_of(kind: Any) -> str | None:
    """Return the dtype for the name of a dtype or storage; None for a storage of bytes."""
    name = kind.name.rpartition(".")[2] if isinstance(kind, Node) else ""
    _check(name in _DTYPES, f"a tensor of {name or 'an unknown kind'}, which is not read")
    return _DTYPES[name]


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, kind: Any = None) -> Entry:
    """Return the entry of a tensor in a storage; `kind` names the dtype for a storage of bytes."""
    dtype: Any = _dtype_of(kind) if kind is not None else getattr(storage, "dtype", None)
    is_valid = isinstance(storage, _Bytes) and is_sizes(shape) and is_sizes(strides) and is_sizes((offset,))
    is_valid = is_valid and len(shape) == len(strides) <= 64 and math.prod(s or 1 for s in shape) < 2**60
    _check(is_valid and dtype is not None, "a tensor without a storage, or with a malformed shape")
    item, count = ITEM_BYTES[dtype], math.prod(shape)
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True)) if count else 0
    _check((offset + reach) * item <= storage.nbytes, "a tensor reaches beyond its storage")
    is_small = count * item <= max(storage.nbytes, _Budget.FREE)
    _check(is_small, f"a tensor of shape {list(shape)} that repeats {storage.nbytes:,} bytes")
    is_row_major = all(size == 1 or a == b for size, a, b in zip(shape, strides, row_major(shape), strict=True))
    kept = () if is_row_major or not count else tuple(strides)
    return Entry(dtype, tuple(shape), storage.begin + offset * item, kept)


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    """Return a dict in place of an OrderedDict."""
    checked = _checked_pairs(pairs)
    if checked:
        pairs.clear()  # so that a million calls with the same million pairs end soon
    return checked


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    **dict.fromkeys(("builtins.set", "__builtin__.set", "torch.Size"), lambda values=(): values),
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": lambda *values: _tensor(*values[:4]),
    "torch._utils._rebuild_tensor_v3": lambda *values: _tensor(*values[:4], values[6]),  # type: ignore[call-arg]
    **dict.fromkeys(
        ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"), lambda data, *_: data
    ),
    # A tensor with attributes, or of a subclass.
    "torch._tensor._rebuild_from_type_v2": lambda function, _, arguments, __: function(*arguments[: _Budget.ARGUMENTS]),
}
"""The functions in place of those that torch's pickles name."""
