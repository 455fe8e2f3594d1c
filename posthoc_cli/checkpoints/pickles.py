"""Find the tensors in files of `torch.save`, which are zip archives, and in those of `pickle.dump`.

A tensor in a pickle is a call with a storage, an offset, a shape and strides. A storage is a range
of bytes of the file: an uncompressed member of the archive, or the end of a string of bytes in a
pickle.

Pickles are read by the interpreter of their opcodes here, which imports nothing: it has functions
of this module for the few names that make tensors, and an inert `Node`, whose call makes another
node, for each other name. Python's own unpickler can neither leave strings of bytes in the file nor
limit what a pickle makes in proportion to its length. `torch.load` can do neither, and it maps
files: a file that shrinks would end the process.
"""

from __future__ import annotations

import io
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from posthoc_cli.dtypes import DTYPES, ITEM_BYTES
from posthoc_cli.errors import FileFormatError, RemoteError
from posthoc_cli.snapshots.tensorfile import Entry, OpenedFile, is_sizes, row_major

_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
    "ComplexFloatStorage": "C64",
    "UntypedStorage": None,
    **{dtype.torch_name: name for name, dtype in DTYPES.items()},
}
"""Dtypes by the names of torch's storages and dtypes; None for a storage of bytes."""

Keys = tuple[str, ...]  # keys that lead to a tensor within a file's content
PARAMETERS = "shadow_params"  # key of averages in a list, in the order of the model's parameters

# What reading a file may cost, so that a hostile one is refused early, is `_FREE` and three times
# its length. The densest of real pickles, of many small tensors with short names, cost 3.0 to 3.4
# times their length.
_FREE = 2**26
# an opcode, which may be longer in memory, and one that makes a dict, list or set
_OPCODE, _CONTAINER = (4, 32)
# a value of the content or a pair of a call, and a storage: a few bytes can repeat each
_VALUE, _STREAM = (64, 512)
# limits the tensors of a file to this multiple of its length and `_FREE`: views of a storage may
# overlap
_SHARED = 8
# characters of the name of a storage or dtype, which a pickle may pass again and again
_LONGEST = 100
# arguments of a call, and items of a key: a pickle may pass a million to each of a million calls
_MOST_ITEMS = 16


class _PickleError(ValueError):
    """A fault of a file, as a phrase to follow its name."""


def _check(is_valid: bool, problem: str) -> None:
    if not is_valid:
        raise _PickleError(problem)


@contextmanager
def _reading(file: OpenedFile) -> Iterator[None]:
    """Turn what faults of a file raise in the block into a FileFormatError."""
    try:
        yield
    except (
        LookupError,
        TypeError,
        AttributeError,
        ValueError,
        ArithmeticError,
        RuntimeError,
        MemoryError,
        struct.error,
        zipfile.BadZipFile,
    ) as error:
        if isinstance(error.__context__, RemoteError):  # which zipfile takes for a damaged archive
            raise error.__context__ from None
        problem = error if isinstance(error, _PickleError) else "a damaged pickle or archive"
        raise FileFormatError(file.path, f"cannot be read as tensors: {problem}") from error


class _Budget:
    def __init__(self, nbytes: int) -> None:
        self._left = _FREE + 3 * nbytes

    def spend(self, cost: int) -> None:
        self._left -= cost
        _check(self._left >= 0, "it makes more objects, or longer names, than its length explains")


@dataclass(eq=False, repr=False)
class Node:
    """An inert object in place of an imported name, or of the result of its call."""

    name: str
    arguments: Any = ()
    state: Any = None  # its attributes
    items: dict[Any, Any] = field(default_factory=dict)  # those of a subclass of dict

    def update(self, items: dict[Any, Any]) -> None:
        self.items.update(items)

    def extend(self, _: object) -> None:
        """Ignore the items of a subclass of list."""


_KEYS = str | float | Node | None
"""Keys of dicts, or items of such keys, besides int; the hash and the text of others may take
forever."""


class _Bytes(NamedTuple):
    """A range of bytes of the file: a string of bytes in a pickle, or a storage, which may have a
    dtype."""

    begin: int
    nbytes: int
    dtype: str | None = None


def read_pickled(file: OpenedFile, begin: int, end: int, budget: _Budget | None = None) -> Any:
    """Return the object in a range of a file, written by torch.save since release 1.6, or by
    pickle.

    It consists of plain values, lists, tuples and dicts, an `Entry` for each tensor, and a `Node`
    for each other object. Raise FileFormatError if it cannot be read.
    """
    with _reading(file):
        budget, find = budget or _Budget(end - begin), None
        if file.read_at(4, begin) == _ZIP:
            find = _open_archive(file, begin, end)
            begin, nbytes, _ = find("data.pkl")
            end = begin + nbytes
        value = _Machine(file, begin, end, budget, find).run()
        _check(
            value != _STREAM_MAGIC,
            "is of torch.save before release 1.6, or has no zip archive: save it again",
        )
    return value


def read_tensors(file: OpenedFile) -> dict[Keys, Any]:
    """Return the tensors, numbers and texts in dicts, and the averages in lists, by the keys that
    lead to each.

    A tensor of a kind that is not read (sparse, quantized, spread over processes) remains a node.
    The names of modules within a pickled module are one key, joined by dots, as in a state dict.
    Errors are those of `read_pickled`.
    """
    leaves: dict[Keys, Any] = {}
    budget = _Budget(file.size)
    with _reading(file):
        pending: list[tuple[Keys, Any, bool]] = [
            ((), read_pickled(file, 0, file.size, budget), False)
        ]
        while pending:
            keys, item, is_in_module = pending.pop()
            is_module = False
            if isinstance(item, Node) and not item.name.startswith("torch._utils._rebuild"):
                module = _module_tensors(item, budget)
                is_module, item = module is not None, module or item.items
            elif isinstance(item, list) and keys[-1:] == (PARAMETERS,):
                item = dict(enumerate(item))
            if isinstance(item, dict):
                for key in reversed(item):
                    budget.spend(_VALUE)
                    if isinstance(key, str | int):
                        is_inner = is_module and is_in_module
                        name = (*keys[:-1], f"{keys[-1]}.{key}") if is_inner else (*keys, str(key))
                        pending.append((name, item[key], is_module))
                        budget.spend(len(".".join(name)))
            elif keys and isinstance(item, Node | Entry | int | float | str):
                leaves[keys] = item
        total = sum(
            entry.nbytes
            for entry in {value for value in leaves.values() if isinstance(value, Entry)}
        )
        is_small = total <= _SHARED * file.size + _FREE
        _check(
            is_small, f"its tensors share bytes, and would take {total:,} in place of {file.size:,}"
        )
    return leaves


def _module_tensors(node: Node, budget: _Budget) -> dict[Any, Any] | None:
    """Return the parameters, buffers and inner modules of a pickled torch module; None for another
    object.

    The attributes of a module are its state; of a GraphModule an argument; of one of EDM under
    `state` in an argument.
    """
    parts = ("_parameters", "_buffers", "_modules")
    inner = (_items(argument).get("state") for argument in node.arguments)
    for state in map(_items, (node.state, *node.arguments, *inner)):
        if all(isinstance(state.get(part), dict) for part in parts):
            listed = state.get("_non_persistent_buffers_set")
            listed = listed if isinstance(listed, list) else []
            unsaved = {key for key in listed if isinstance(key, str)}
            budget.spend(_OPCODE * sum(map(len, (listed, *(state[part] for part in parts)))))
            return {
                key: value
                for part in parts
                for key, value in state[part].items()
                if key not in unsaved
            }
    return None


def _items(value: Any) -> dict[Any, Any]:
    """Return the items of a dict or a node; none of another object."""
    items = value.items if isinstance(value, Node) else value
    return items if isinstance(items, dict) else {}


# --- archives, and storages in pickles


class _Stream(io.RawIOBase):
    """A file from some place to some end, as a standard stream; places are those in the file."""

    def __init__(self, file: OpenedFile, at: int, end: int) -> None:
        self._file, self._at, self._end = file, at, end

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        self._at = min(max(0, at), self._end)
        return self._at

    def readinto(self, view: Any) -> int:
        count = self._file.read_into(memoryview(view)[: self._end - self._at], self._at)
        self._at += count
        return count


def _open_archive(file: OpenedFile, begin: int, end: int) -> Callable[..., _Bytes]:
    """Return a function that finds the members of an archive of torch.save by name."""
    listed = zipfile.ZipFile(io.BufferedReader(_Stream(file, begin, end))).infolist()
    members = {info.filename: info for info in listed}
    _check(len(members) == len(listed), "a damaged archive: two members of one name")
    root = next(
        (name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), ""
    )

    def find(name: str, _: int = 0) -> _Bytes:
        _check(
            root + name in members, f"a damaged archive, or not of torch.save: it has no {name!r}"
        )
        info = members[root + name]
        magic, *lengths = _LOCAL_HEADER.unpack(file.read_at(_LOCAL_HEADER.size, info.header_offset))
        start = info.header_offset + _LOCAL_HEADER.size + sum(lengths)
        is_plain = info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1
        is_there = magic == _ZIP and begin <= info.header_offset and start + info.file_size <= end
        _check(
            is_plain and is_there,
            f"member {name!r} is not where it should be, or is compressed or encrypted",
        )
        return _Bytes(start, info.file_size)

    if f"{root}byteorder" in members:
        order = find("byteorder")
        _check(
            file.read_at(min(16, order.nbytes), order.begin) == b"little",
            "is of a big-endian machine",
        )
    return find


def _storage_in(machine: _Machine, data: Any) -> _Bytes:
    """Return the storage in a string of bytes: five pickles, of which the fourth names it, its
    length and its bytes."""
    machine.budget.spend(_STREAM)
    end = data.begin + data.nbytes
    inner = _Machine(
        machine.file, data.begin, end, machine.budget, lambda _, nbytes: _Bytes(0, nbytes)
    )
    magic, protocol, system, storage, _ = [inner.run() for _ in range(5)]
    begin = inner.stream.tell() + 8
    is_known = (magic, protocol, system["little_endian"]) == (_STREAM_MAGIC, 1001, True)
    is_complete = begin + storage.nbytes <= end
    _check(
        is_known and is_complete,
        "a storage is truncated, big-endian, or of an unknown release of torch.save",
    )
    return _Bytes(begin, storage.nbytes, storage.dtype)


# --- pickles


class _Machine:
    """The machine that a pickle is a program for; `find` returns the storage of a name and an
    expected size."""

    def __init__(
        self,
        file: OpenedFile,
        begin: int,
        end: int,
        budget: _Budget,
        find: Callable[..., _Bytes] | None,
    ) -> None:
        self.file, self.budget, self.find = file, budget, find
        self.stream = io.BufferedReader(_Stream(file, begin, end))

    def run(self) -> Any:
        """Run the next program, and return the object that it leaves."""
        self.stack, self.outer, self.memo = list[Any](), list[list[Any]](), dict[int, Any]()
        while True:
            cost, read, takes, takes_marked, gives, do = _OPCODES[self.stream.read(1)]
            self.budget.spend(cost)
            taken = [read(self.stream)] if read else []
            if takes_marked:
                taken, self.stack = [self.stack], self.outer.pop()
            for _ in range(takes):
                taken.insert(0, self.stack.pop())
            if do is None:
                return taken[0]
            made = do(self, *taken)
            if gives:
                self.stack.append(made)

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def skip(self, count: int) -> _Bytes:
        """Skip a string of bytes, and return its range; beyond the end of the file no further
        opcode is found."""
        begin = self.stream.tell()
        self.stream.seek(count, os.SEEK_CUR)
        return _Bytes(begin, count)

    def named(self, module: Any, name: Any) -> Any:
        _check(isinstance(module, str) and isinstance(name, str), "a name that is no text")
        self.budget.spend(len(module) + len(name))
        return _CALLS.get(f"{module}.{name}") or Node(f"{module}.{name}")

    def call(self, function: Any, arguments: Any, _: object = None) -> Any:
        """Call a function, or make an object without `__init__`, which is the same here."""
        used = arguments[:_MOST_ITEMS]
        return Node(function.name, used) if isinstance(function, Node) else function(self, *used)

    def storage(self, pid: Any) -> _Bytes:
        """Return the storage of ("storage", type, key, location, number of elements, ...)."""
        is_storage = (
            isinstance(pid, tuple)
            and len(pid) >= 5
            and pid[0] == "storage"
            and isinstance(pid[2], str)
        )
        if self.find is None or not is_storage or len(pid[2]) > _LONGEST or not is_sizes(pid[4:5]):
            raise _PickleError("refers to objects outside the file, or to a storage without a size")
        dtype = _dtype_of(pid[1])
        return self.find(f"data/{pid[2]}", pid[4] * (ITEM_BYTES[dtype] if dtype else 1))._replace(
            dtype=dtype
        )

    def built(self, target: Any, state: Any) -> Any:
        """Return an object with a state, which only nodes have."""
        if isinstance(target, Node):
            target.state = state
        return target


def _dict_of(pairs: Iterable[Any]) -> dict[Any, Any]:
    checked = {}
    for key, value in pairs:
        parts = key if isinstance(key, tuple) else (key,)
        is_plain = len(parts) <= _MOST_ITEMS
        for part in parts[:_MOST_ITEMS]:
            is_plain &= isinstance(part, _KEYS) or (isinstance(part, int) and abs(part) < 2**63)
        _check(
            is_plain,
            "a key of a dict is a list or the like, a long tuple, or an int of many digits",
        )
        checked[key] = value
    return checked


_LENGTHS: dict[str, Callable[[Any], int]] = {
    "SHORT_BINBYTES": pickletools.read_uint1,
    "BINBYTES": pickletools.read_uint4,
    "BINBYTES8": pickletools.read_uint8,
    "BYTEARRAY8": pickletools.read_uint8,
}
"""What reads the length of a string of bytes, which stays in the file."""

_DO: dict[str, Callable[..., Any] | None] = {
    **dict.fromkeys(
        (
            "BININT",
            "BININT1",
            "BININT2",
            "LONG1",
            "LONG4",
            "SHORT_BINUNICODE",
            "BINUNICODE",
            "BINUNICODE8",
            "BINFLOAT",
        ),
        lambda _, value: value,
    ),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    **dict.fromkeys(_LENGTHS, _Machine.skip),
    # Sets become lists: a set would hash its items.
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda _: []),
    "FROZENSET": lambda _, items: items,
    **dict.fromkeys(
        ("APPENDS", "ADDITEMS"), lambda _, target, items: target.extend(items) or target
    ),
    "APPEND": lambda _, target, item: target.extend([item]) or target,
    "EMPTY_TUPLE": lambda _: (),
    "TUPLE": lambda _, items: tuple(items),
    **dict.fromkeys(("TUPLE1", "TUPLE2", "TUPLE3"), lambda _, *items: items),
    "EMPTY_DICT": lambda _: {},
    "SETITEM": lambda _, target, *pair: target.update(_dict_of([pair])) or target,
    "SETITEMS": lambda _, target, items: (
        target.update(_dict_of(zip(items[::2], items[1::2], strict=True))) or target
    ),
    "MARK": _Machine.mark,
    **dict.fromkeys(("POP_MARK", "POP", "PROTO", "FRAME"), lambda *_: None),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda m, index: m.memo[index]),
    **dict.fromkeys(
        ("BINPUT", "LONG_BINPUT"), lambda m, index: m.memo.update({index: m.stack[-1]})
    ),
    "MEMOIZE": lambda m, item: m.memo.setdefault(len(m.memo), item),
    "GLOBAL": lambda m, names: m.named(*names.split(" ", 1)),
    "STACK_GLOBAL": _Machine.named,
    **dict.fromkeys(("REDUCE", "NEWOBJ", "NEWOBJ_EX"), _Machine.call),
    "BUILD": _Machine.built,
    "BINPERSID": _Machine.storage,
    "STOP": None,
}
"""What the opcodes of protocols 2 to 5 do with their argument, and with what they take from the
stack; others are refused: the extension registry may hold real functions, and buffers are
elsewhere. torch.save writes protocol 2."""


_OPCODES = {
    opcode.code.encode("latin-1"): (
        _CONTAINER
        if opcode.name in ("EMPTY_LIST", "EMPTY_SET", "EMPTY_DICT", "FROZENSET")
        else _OPCODE,
        _LENGTHS.get(opcode.name) or getattr(opcode.arg, "reader", None),
        [*opcode.stack_before, pickletools.markobject].index(pickletools.markobject),
        pickletools.markobject in opcode.stack_before,
        opcode.stack_after not in ([], [pickletools.markobject]),
        _DO[opcode.name],
    )
    for opcode in pickletools.opcodes
    if opcode.name in _DO
}
"""By code: the cost; what reads the argument; how many objects it takes from the stack, before
those after a mark; whether it takes these; whether it leaves an object, as the standard library
documents; and what it does."""


# --- the calls of a pickle that make tensors


def _dtype_of(kind: Any) -> str | None:
    """Return the dtype for the name of a dtype or storage; None for a storage of bytes."""
    name = kind.name[-_LONGEST:].rpartition(".")[2] if isinstance(kind, Node) else ""
    _check(name in _DTYPES, f"a tensor of {name or 'an unknown kind'}, which is not read")
    return _DTYPES[name]


def _tensor(_: _Machine, storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Entry:
    """Return the entry of a tensor in a storage; one of bytes is followed by the dtype, among other
    things."""
    is_valid = (
        isinstance(storage, _Bytes)
        and is_sizes(shape)
        and is_sizes(strides)
        and is_sizes((offset,))
    )
    is_valid = (
        is_valid and len(shape) == len(strides) <= 64 and math.prod(s or 1 for s in shape) < 2**60
    )
    _check(is_valid, "a tensor without a storage, or with a malformed shape")
    dtype: Any = storage.dtype or _dtype_of(more[2])
    item, count = ITEM_BYTES[dtype], math.prod(shape)
    reach = (
        1 + sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
        if count
        else 0
    )
    _check((offset + reach) * item <= storage.nbytes, "a tensor reaches beyond its storage")
    is_small = count * item <= max(storage.nbytes, _FREE)
    _check(is_small, f"a tensor of shape {list(shape)} that repeats {storage.nbytes:,} bytes")
    is_row_major = all(
        size == 1 or a == b for size, a, b in zip(shape, strides, row_major(shape), strict=True)
    )
    kept = () if is_row_major or not count else tuple(strides)
    return Entry(dtype, tuple(shape), storage.begin + offset * item, kept)


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": lambda m, pairs=(): (
        m.budget.spend(_VALUE * len(pairs)) or _dict_of(pairs)
    ),
    **dict.fromkeys(("builtins.set", "__builtin__.set", "torch.Size"), lambda _, values=(): values),
    **dict.fromkeys(("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"), _tensor),
    "torch._utils._rebuild_tensor_v3": _tensor,
    **dict.fromkeys(
        ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"),
        lambda _, data, *__: data,
    ),
    # A tensor with attributes, or of a subclass.
    "torch._tensor._rebuild_from_type_v2": lambda m, function, _, arguments, __: m.call(
        function, arguments
    ),
    "torch.storage._load_from_bytes": _storage_in,
}
"""The functions in place of those that torch's pickles name."""
