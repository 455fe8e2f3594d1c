"""Find the tensors in files of `torch.save`, which are zip archives, and in those of `pickle.dump`.

A tensor in a pickle is a call with a storage, an offset, a shape and strides. A storage is a range
of bytes of the file: an uncompressed member of the archive, or the end of a string of bytes in a
pickle.

Pickles are read by Python's own interpreter of opcodes with some of them replaced, which imports
nothing: it has functions of this module for the few names that make tensors, and an inert `Node`,
whose call makes another node, for each other name. It is the one written in Python: that written in
C can neither leave strings of bytes in the file nor limit what a pickle makes in proportion to its
length. `torch.load` can do neither, and it maps files: a file that shrinks would end the process.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from operator import methodcaller
from typing import Any

import numpy as np

from posthoc_cli.dtypes import DTYPES, EPS, ITEM_BYTES
from posthoc_cli.errors import FileFormatError, RemoteError
from posthoc_cli.snapshots.tensorfile import Entry, OpenedFile, is_sizes, row_major

_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "UntypedStorage": None, **{dtype.torch_name: name for name, dtype in DTYPES.items()},
}  # fmt: skip
"""Dtypes by the names of torch's storages and dtypes; None for a storage of bytes."""

_Items = dict[Any, Any]
Keys = tuple[str, ...]  # keys that lead to a tensor or value within a file's content

# What reading a file may cost, so that a hostile one is refused early, is `_FREE` and three times
# its length. The densest of real pickles, of many small tensors with short names, cost 3.0 to 3.4
# times their length.
_FREE = 2**26
_OPCODE = 4  # an opcode, which may be longer in memory
_CONTAINER = 32  # an opcode that makes a dict, list or set
_VALUE = 64  # a value of the content, or a pair of a call: a few bytes can repeat each
_STREAM = 512  # a storage in a string of bytes
_SHARED = 8  # limits the bytes of tensors to this multiple of the file's: views may overlap
_LONGEST = 100  # characters of the name of a storage or dtype, which a pickle may pass repeatedly
_NUMBERS = re.compile("[iu][1248]|f[248]|b1")  # kinds of numpy
_MOST_AXES = 64
_MOST_ITEMS = 16  # arguments of a call, and items of a key: a pickle may pass a million


class _PickleError(ValueError):
    """A fault of a file, as a phrase to follow its name."""


def _check(is_valid: bool, problem: str) -> None:
    if not is_valid:
        raise _PickleError(problem)


@contextmanager
def _reading(file: OpenedFile) -> Iterator[None]:
    """Turn what faults of a file raise in the block into a FileFormatError."""
    faults = (
        LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError,
        MemoryError, EOFError, struct.error, pickle.UnpicklingError, zipfile.BadZipFile,
    )  # fmt: skip
    try:
        yield
    except faults as error:
        if isinstance(error.__context__, RemoteError):  # which zipfile takes for a damaged archive
            raise error.__context__ from None
        problem = str(error)
        if not isinstance(error, _PickleError):
            first = bytearray(min(file.size, 4))
            file.read_into(memoryview(first), 0)
            begins = f"{file.size:,} bytes that begin with {bytes(first)!r}"
            problem = f"a damaged pickle or archive, or of another kind: {begins}"
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
    items: _Items = field(default_factory=dict)  # those of a subclass of dict

    @property
    def is_array(self) -> bool:
        """Whether it is an array of numpy, or a number."""
        return self.name.endswith(".multiarray._reconstruct")

    def update(self, items: _Items) -> None:
        self.items.update(items)

    def extend(self, _: object) -> None:
        """Ignore the items of a subclass of list."""

    append = extend


@dataclass(frozen=True)
class _Bytes:
    """A range of bytes of the file: a string of bytes in a pickle, or a storage with a dtype."""

    begin: int
    nbytes: int
    dtype: str | None = None


# --- the content of a file


def read_pickled(
    file: OpenedFile,
    begin: int,
    end: int,
    budget: _Budget | None = None,
) -> Any:
    """Return the object in a range of a file, written by torch.save since release 1.6, or by
    pickle.

    It consists of plain values, lists, tuples and dicts, an `Entry` for each tensor, and a `Node`
    for each other object. Raise FileFormatError if it cannot be read.
    """
    with _reading(file):
        budget = budget or _Budget(end - begin)
        archive = None
        if is_archive(file, begin):
            archive = _Archive(file, begin, end)
            pickled = archive.member("data.pkl")
            begin = pickled.begin
            end = begin + pickled.nbytes
        value = _Machine(file, begin, end, budget, archive).load()
        if value == _STREAM_MAGIC:
            problem = "is of torch.save before release 1.6, or has no zip archive"
            raise _PickleError(f"{problem}: load it by torch, and save it again")
    return value


def read_tensors(file: OpenedFile) -> dict[Keys, Any]:
    """Return the tensors, numbers and texts of a file, by the keys that lead to each.

    Items of lists have their positions as keys; numbers and texts in lists are left out. A tensor
    of a kind that is not read (sparse, quantized, spread over processes) remains a node. The names
    of modules within a pickled module are one key, joined by dots, as in a state dict. Errors are
    those of `read_pickled`.
    """
    budget = _Budget(file.size)
    with _reading(file):
        content = read_pickled(file, 0, file.size, budget)
        leaves = dict(_leaves(content, budget))
        entries = {value for value in leaves.values() if isinstance(value, Entry)}
        total = sum(entry.nbytes for entry in entries)
        is_small = total <= _SHARED * file.size + _FREE
        _check(is_small, f"its tensors share bytes, and would take {total:,} in place of its own")
    return leaves


def _leaves(
    content: Any,
    budget: _Budget,
) -> Iterator[tuple[Keys, Any]]:
    """Yield the tensors and values within an object, with their keys."""
    pending: list[tuple[Keys, Any, bool]] = [((), content, False)]
    objects = set[int]()
    while pending:
        keys, item, is_in_module = pending.pop()
        item, is_module = _opened(item, objects, budget)
        if isinstance(item, dict | list | tuple):
            inner = []
            budget.spend(_OPCODE * len(item))
            for key, value in _named_items(item):
                if is_module and is_in_module:
                    name = (*keys[:-1], f"{keys[-1]}.{key}")
                else:
                    name = (*keys, key)
                budget.spend(_VALUE + len(".".join(name)))
                inner.append((name, value, is_module))
            pending.extend(reversed(inner))
        elif keys and isinstance(item, Node | Entry | int | float | str):
            yield keys, item


def _named_items(container: _Items | list[Any] | tuple[Any, ...]) -> Iterator[Any]:
    """Yield the items of a container by name; of a list those that may lead to tensors."""
    if isinstance(container, dict):
        for key, value in container.items():
            if isinstance(key, str | int | float):
                yield str(key), value
        return
    for position, value in enumerate(container):
        if isinstance(value, dict | list | tuple | Node | Entry):
            yield str(position), value


def _module_tensors(node: Node, budget: _Budget) -> _Items | None:
    """Return the parameters, buffers and inner modules of a pickled torch module; None for another
    object.

    The attributes of a module are its state; of a GraphModule an argument; of one of EDM under
    `state` in an argument.
    """
    parts = ("_parameters", "_buffers", "_modules")
    inner = (_items(argument).get("state") for argument in node.arguments)
    for state in map(_items, (node.state, *node.arguments, *inner)):
        if not all(isinstance(state.get(part), dict) for part in parts):
            continue
        listed = state.get("_non_persistent_buffers_set")
        unsaved = set()
        if isinstance(listed, list):
            unsaved = {key for key in listed if isinstance(key, str)}
            budget.spend(_OPCODE * len(listed))
        tensors = {}
        for part in parts:
            budget.spend(_OPCODE * len(state[part]))
            tensors.update(state[part])
        return {key: value for key, value in tensors.items() if key not in unsaved}
    return None


def _opened(
    item: Any,
    objects: set[int],
    budget: _Budget,
) -> tuple[Any, bool]:
    """Return what an object consists of, and whether it is a module; any other item as it is."""
    if not isinstance(item, Node) or item.name.startswith("torch._utils._rebuild"):
        return item, False
    if item.is_array:
        return item.state, False
    module = _module_tensors(item, budget)
    if module is not None:
        return module, True
    return _contents(item, objects), False


def _contents(node: Node, objects: set[int]) -> _Items:
    """Return the items of an object, or else its attributes, as of an average that was pickled
    whole, or its arguments, as of a named tuple: none of an optimizer, nor tensors, which may be
    anything.

    `objects` are those whose attributes are known: they may refer to each other.
    """
    if node.items:
        return node.items
    attributes = _items(node.state)
    if id(node) in objects or "param_groups" in attributes:
        return {}
    objects.add(id(node))
    if not attributes:
        attributes = dict(enumerate(node.arguments))
    return {key: value for key, value in attributes.items() if not isinstance(value, Entry)}


def _items(value: Any) -> _Items:
    """Return the items of a dict or a node; none of another object."""
    items = value.items if isinstance(value, Node) else value
    return items if isinstance(items, dict) else {}


# --- archives, and storages in pickles


class FileRange(io.RawIOBase):
    """A file from some place to some end, as a standard stream; places are those in the file."""

    def __init__(
        self,
        file: OpenedFile,
        at: int,
        end: int,
    ) -> None:
        self._file = file
        self._at = at
        self._end = end

    def readable(self) -> bool:
        return True

    seekable = readable

    def seek(
        self,
        offset: int,
        whence: int = os.SEEK_SET,
    ) -> int:
        bases = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._end}
        position = max(0, bases[whence] + offset)
        self._at = min(position, self._end)
        return self._at

    def readinto(self, view: Any) -> int:
        most = self._end - self._at
        count = self._file.read_into(memoryview(view)[:most], self._at)
        self._at += count
        return count


def is_archive(file: OpenedFile, begin: int = 0) -> bool:
    """Return whether an archive of torch.save begins at a place of a file."""
    return file.read_at(4, begin) == _ZIP


def member_begin(file: OpenedFile, info: zipfile.ZipInfo) -> int:
    """Return where the content of a member of an archive begins."""
    header = file.read_at(_LOCAL_HEADER.size, info.header_offset)
    magic, name, extra = _LOCAL_HEADER.unpack(header)
    _check(magic == _ZIP, f"member {info.filename!r} is not where it should be")
    return int(info.header_offset + _LOCAL_HEADER.size + name + extra)


class _Archive:
    """An archive of torch.save in a range of a file."""

    def __init__(
        self,
        file: OpenedFile,
        begin: int,
        end: int,
    ) -> None:
        self.file = file
        self.begin = begin
        self.end = end
        stream = io.BufferedReader(FileRange(file, begin, end))
        listed = zipfile.ZipFile(stream).infolist()
        self.members = {info.filename: info for info in listed}
        _check(len(self.members) == len(listed), "a damaged archive: two members of one name")
        self.root = ""
        for name in self.members:
            if name.endswith("/data.pkl"):
                self.root = name.removesuffix("data.pkl")
                break
        if f"{self.root}byteorder" in self.members:
            order = self.member("byteorder")
            word = file.read_at(min(16, order.nbytes), order.begin)
            _check(word == b"little", "is of a big-endian machine")

    def member(self, name: str) -> _Bytes:
        """Return the place of a member that is stored as it is."""
        info = self.members.get(self.root + name)
        if info is None:
            raise _PickleError(f"a damaged archive, or not of torch.save: it has no {name!r}")
        start = member_begin(self.file, info)
        end = start + info.file_size
        is_stored = info.compress_type == zipfile.ZIP_STORED
        is_encrypted = info.flag_bits & 1
        is_inside = self.begin <= info.header_offset and end <= self.end
        if is_encrypted or not (is_stored and is_inside):
            problem = "is not where it should be, or is compressed or encrypted"
            raise _PickleError(f"member {name!r} {problem}")
        return _Bytes(start, info.file_size)


def _storage_in(machine: _Machine, data: Any) -> _Bytes:
    """Return the storage in a string of bytes: five pickles, of which the fourth names it, its
    length and its bytes."""
    machine.budget.spend(_STREAM)
    end = data.begin + data.nbytes
    budget = machine.budget
    inner = _Machine(machine.file, data.begin, end, budget, None, is_storage=True)
    magic, protocol, system, storage, _ = [inner.load() for _ in range(5)]
    begin = inner.stream.tell() + 8
    release = (magic, protocol, system["little_endian"])
    is_known = release == (_STREAM_MAGIC, 1001, True)
    if not is_known or begin + storage.nbytes > end:
        problem = "truncated, big-endian, or of an unknown release of torch.save"
        raise _PickleError(f"a storage is {problem}")
    return _Bytes(begin, storage.nbytes, storage.dtype)


# --- pickles


class _Machine(pickle._Unpickler):
    """Python's interpreter of pickles, which finds no class, calls no function of another module,
    and leaves strings of bytes in the file.

    Storages are members of the archive, or `is_storage` that which follows the pickles.
    """

    stack: list[Any]
    memo: dict[int, Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        file: OpenedFile,
        begin: int,
        end: int,
        budget: _Budget,
        archive: _Archive | None,
        is_storage: bool = False,
    ) -> None:
        self.file = file
        self.budget = budget
        self.archive = archive
        self.is_storage = is_storage
        self.stream = io.BufferedReader(FileRange(file, begin, end))
        super().__init__(self.stream)

    def load(self) -> Any:
        """Run the next program, and return the object that it leaves."""
        self.memo.clear()
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        self.budget.spend(len(module) + len(name))
        full_name = f"{module}.{name}"
        return _CALLS.get(full_name) or Node(full_name)

    def skip_frame(self) -> None:
        """Go on behind the length of a frame: its content stays in the file."""
        self.stream.seek(8, os.SEEK_CUR)

    def push_range(self, width: int) -> None:
        """Push the range of a string of bytes, which stays in the file; beyond the end of the file
        no further opcode is found."""
        count = int.from_bytes(self.stream.read(width), "little")
        begin = self.stream.tell()
        self.stream.seek(count, os.SEEK_CUR)
        self.stack.append(_Bytes(begin, count))

    def set_item(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        item = _dict_of([(key, value)])
        self.stack[-1].update(item)

    def set_items(self) -> None:
        items = self.pop_mark()
        pairs = zip(items[::2], items[1::2], strict=True)
        item = _dict_of(pairs)
        self.stack[-1].update(item)

    def reduce(self) -> None:
        """Call a function, or make an object without `__init__`, which is the same here."""
        arguments = self.stack.pop()
        function = self.stack.pop()
        self.stack.append(self.call(function, arguments))

    def reduce_with_names(self) -> None:
        self.stack.pop()
        self.reduce()

    def build(self) -> None:
        """Give an object its state, which only nodes have: its attributes, or a pair of those and
        its slots."""
        state = self.stack.pop()
        if isinstance(state, tuple) and len(state) == 2:
            attributes, slots = map(_items, state)
            self.budget.spend(_VALUE * (len(attributes) + len(slots)))
            state = attributes | slots
        item = self.stack[-1]
        if isinstance(item, Node):
            item.state = _reduced_array(self, state) if item.is_array else state

    def persistent_load(self, pid: Any) -> _Bytes:
        """Return the storage of ("storage", type, key, location, number of elements, ...)."""
        problem = "refers to objects outside the file, or to a storage without a size"
        _check(isinstance(pid, tuple) and len(pid) >= 5, problem)
        word, kind, key, _, count = pid[:5]
        is_known = word == "storage" and isinstance(key, str)
        _check(is_known and is_sizes((count,)), problem)
        dtype = _dtype_of(kind)
        if self.is_storage:
            item = ITEM_BYTES[dtype] if dtype else 1
            return _Bytes(0, count * item, dtype)
        if self.archive is None or len(key) > _LONGEST:
            raise _PickleError(problem)
        member = self.archive.member(f"data/{key}")
        return replace(member, dtype=dtype)

    def call(self, function: Any, arguments: Any) -> Any:
        used = arguments[:_MOST_ITEMS]
        if isinstance(function, Node):
            return Node(function.name, used)
        return function(self, *used)


def _dict_of(pairs: Iterable[Any]) -> _Items:
    checked = {}
    for key, value in pairs:
        parts = key if isinstance(key, tuple) else (key,)
        is_plain = len(parts) <= _MOST_ITEMS and all(map(_is_plain_key, parts))
        _check(is_plain, "a key of a dict is a list or the like, a long tuple, or a long int")
        checked[key] = value
    return checked


def _is_plain_key(key: Any) -> bool:
    """Return whether a key, or an item of it, has a hash and a text that are quickly made."""
    if isinstance(key, int):
        return abs(key) < 2**63
    return isinstance(key, str | float | Node | Entry | None)


_Do = Callable[[Any], None]
_USUAL: dict[int, _Do] = pickle._Unpickler.dispatch
_DONE_HERE: dict[bytes, _Do] = {
    pickle.FRAME: _Machine.skip_frame,
    pickle.SHORT_BINBYTES: methodcaller("push_range", 1),
    pickle.BINBYTES: methodcaller("push_range", 4),
    pickle.BINBYTES8: methodcaller("push_range", 8),
    pickle.BYTEARRAY8: methodcaller("push_range", 8),
    pickle.SETITEM: _Machine.set_item,
    pickle.SETITEMS: _Machine.set_items,
    pickle.REDUCE: _Machine.reduce,
    pickle.NEWOBJ: _Machine.reduce,
    pickle.NEWOBJ_EX: _Machine.reduce_with_names,
    pickle.BUILD: _Machine.build,
    # lists, as a set would hash its items
    pickle.EMPTY_SET: _USUAL[pickle.EMPTY_LIST[0]],
    pickle.ADDITEMS: _USUAL[pickle.APPENDS[0]],
    pickle.FROZENSET: _USUAL[pickle.LIST[0]],
}
_CONTAINERS = b"".join(
    (pickle.EMPTY_LIST, pickle.LIST, pickle.EMPTY_SET, pickle.FROZENSET, pickle.EMPTY_DICT)
)
_REFUSED = pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.INST + pickle.OBJ + pickle.DICT
"""Opcodes that may reach real functions, or hash anything; protocols 2 to 5 need none of them."""
_KNOWN = {ord(opcode.code) for opcode in pickletools.opcodes if opcode.proto <= 5}


def _charged(code: int, do: _Do) -> _Do:
    cost = _CONTAINER if code in _CONTAINERS else _OPCODE

    def charged(machine: _Machine) -> None:
        machine.budget.spend(cost)
        do(machine)

    return charged


_DISPATCH = _USUAL | {code[0]: do for code, do in _DONE_HERE.items()}
_Machine.dispatch = {code: _charged(code, _DISPATCH[code]) for code in _KNOWN.difference(_REFUSED)}


# --- the calls of a pickle that make tensors


def _dtype_of(kind: Any) -> str | None:
    """Return the dtype for the name of a dtype or storage; None for a storage of bytes."""
    name = ""
    if isinstance(kind, Node):
        name = kind.name[-_LONGEST:].rpartition(".")[2]
    if name not in _DTYPES:
        raise _PickleError(f"a tensor of {name or 'an unknown kind'}, which is not read")
    return _DTYPES[name]


def _tensor(
    _: _Machine,
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    *more: Any,
) -> Entry:
    """Return the entry of a tensor in a storage; one of bytes is followed by the dtype, among other
    things."""
    is_valid = isinstance(storage, _Bytes) and _is_view(offset, shape, strides)
    _check(is_valid, "a tensor without a storage, or with a malformed shape")
    dtype: Any = storage.dtype or _dtype_of(more[2])
    item = ITEM_BYTES[dtype]
    count = math.prod(shape)
    reach = 0
    if count:
        reach = 1
        for size, step in zip(shape, strides, strict=True):
            reach += (size - 1) * step
    end = (offset + reach) * item
    _check(end <= storage.nbytes, "a tensor reaches beyond its storage")
    if count * item > max(storage.nbytes, _FREE):
        problem = f"a tensor of shape {list(shape)} that repeats {storage.nbytes:,} bytes"
        raise _PickleError(problem)
    begin = storage.begin + offset * item
    if not count or _is_row_major(shape, strides):
        return Entry(dtype, tuple(shape), begin)
    return Entry(dtype, tuple(shape), begin, tuple(strides))


def _is_view(offset: Any, shape: Any, strides: Any) -> bool:
    """Return whether these are an offset, a shape and strides, of no more elements than can be."""
    if not all(map(is_sizes, (shape, strides, (offset,)))):
        return False
    if not len(shape) == len(strides) <= _MOST_AXES:
        return False
    count: int = math.prod(size or 1 for size in shape)
    return count < 2**60


def _is_row_major(shape: Any, strides: Any) -> bool:
    steps = zip(shape, strides, row_major(shape), strict=True)
    return all(size == 1 or step == usual for size, step, usual in steps)


def _ordered_dict(machine: _Machine, pairs: Any = ()) -> _Items:
    machine.budget.spend(_VALUE * len(pairs))
    return _dict_of(pairs)


def _first(
    _: _Machine,
    value: Any = (),
    *__: Any,
) -> Any:
    """Return the first argument: the items of a set, the tensor of a parameter."""
    return value


def _scalar(
    machine: _Machine,
    dtype: Any,
    data: Any,
) -> int | float | None:
    """Return a number of numpy: its bytes are in the file, or in protocol 2 a text in Latin-1."""
    kind = dtype.arguments[0]
    order = dtype.state[1]
    if not _NUMBERS.fullmatch(str(kind)) or order not in "<>|":
        return None
    if isinstance(data, _Bytes):
        content = machine.file.read_at(min(data.nbytes, 8), data.begin)
    else:
        content = data[:8].encode("latin-1")
    number: int | float = np.frombuffer(content, order + kind)[0].item()
    return number


def _dtype_of_array(dtype: Any) -> str | None:
    kind = dtype.arguments[0]
    name = kind.name[-_LONGEST:].rpartition(".")[2] if isinstance(kind, Node) else kind
    return _DTYPES.get(np.dtype(name).name if _NUMBERS.fullmatch(name) else name)


def _array(
    machine: _Machine,
    data: Any,
    dtype: Any,
    shape: Any,
    order: Any,
    axes: Any = None,
) -> Any:
    """Return the entry of an array of numpy, which lies row by row, with its axes in another order
    if that is "F" or "K"; an integer of 0 dimensions as a number.

    It is a node if it is not read, and None if it holds no numbers.
    """
    if shape == ():
        number = _scalar(machine, dtype, data)
        if isinstance(number, int) or not isinstance(data, _Bytes):
            return number
    stored_dtype = _dtype_of_array(dtype)
    if stored_dtype is None:
        return None
    if not isinstance(data, _Bytes) or dtype.state[1] == ">":
        return Node("array of numpy as text, or big-endian") if stored_dtype in EPS else None
    axes = axes or range(len(shape))
    is_valid = len(shape) == len(axes) <= _MOST_AXES and is_sizes(shape)
    _check(is_valid, "an array with a malformed shape")
    if order == "F":
        shape = shape[::-1]
        axes = axes[::-1]
    steps = row_major(shape)
    strides = tuple(steps[axis] for axis in axes)
    storage = replace(data, dtype=stored_dtype)
    return _tensor(machine, storage, 0, tuple(shape[axis] for axis in axes), strides)


def _reduced_array(machine: _Machine, state: Any) -> Any:
    """Return an array by its state."""
    _, shape, dtype, is_in_columns, data = state
    return _array(machine, data, dtype, shape, "F" if is_in_columns else "C")


def _of_type(
    machine: _Machine,
    function: Any,
    _: Any,
    arguments: Any,
    __: Any,
) -> Any:
    """Return a tensor with attributes, or of a subclass."""
    return machine.call(function, arguments)


_CALLS: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _first,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
    "numpy._core.numeric._frombuffer": _array,
    "jax._src.array._reconstruct_array": lambda machine, *parts: _reduced_array(machine, parts[2]),
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _first,
    "__builtin__.set": _first,
    "torch.Size": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._tensor._rebuild_from_type_v2": _of_type,
    "torch.storage._load_from_bytes": _storage_in,
}
"""The functions in place of those that torch's pickles name."""
