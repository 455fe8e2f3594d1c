"""Read a pickle as data: its opcodes make lists, dicts and inert nodes, and nothing is imported or called.

A pickle is a program for a machine with a stack: some opcodes push values, others name a function and call it. Here a
name stays a `Name`, and a call makes a `Node` that remembers name and arguments. Only the few functions that the caller
passes in are run; they are ours and make descriptions of tensors. Strings of bytes stay in the file: each an `Extent`.

Whatever is wrong with a pickle is a `PickleError`. Time and memory are bounded by the length of the pickle.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posthoc_cli.snapshots.tensor_file import OpenedFile

LONGEST_LINE = 4096
"""Characters of a line, or bytes of a number, at most."""
MOST_TEXT = 16 * 1024 * 1024
"""Bytes of text in one value at most."""
_BUFFER = 64 * 1024


class PickleError(ValueError):
    """What is wrong with a pickle, in words that follow the file's name."""


@dataclass(frozen=True)
class Name:
    """A global name in a pickle, `module.attribute`."""

    text: str


@dataclass(frozen=True)
class Extent:
    """Bytes of the file, from `begin` to `end`."""

    begin: int
    end: int


@dataclass(eq=False)
class Node:
    """An object that the pickle would have made by a call: `name` says of what, where that is known.

    `state` is what would have been its attributes, `items` its content if it was filled like a dict or a list.
    """

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)


Call = Callable[..., Any]
"""A function for calls of one name; gets the call's arguments, and raises a PickleError or TypeError."""

_MARK = object()


def pickled_value(
    file: OpenedFile, begin: int, end: int, calls: Mapping[str, Call], persistent: Call | None = None
) -> tuple[Any, int]:
    """The value of the pickle that begins at `begin`, and where it ends.

    Arguments:
        end: where the file or the part of it with the pickle ends.
        calls: what to do for calls of a name; other calls make nodes.
        persistent: gets a persistent id, and gives the object.
    """
    machine = _Machine(_Stream(file, begin, end), calls, persistent)
    try:
        value = machine.run()
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, RecursionError, ValueError) as error:
        if isinstance(error, PickleError):
            raise
        raise PickleError(f"a damaged pickle, near byte {machine.stream.position:,}") from error
    return value, machine.stream.position


class _Stream:
    """The bytes of a range, read in order."""

    def __init__(self, file: OpenedFile, begin: int, end: int) -> None:
        self._file, self.position, self._end = file, begin, end
        self._buffer, self._start = b"", begin

    def take(self, count: int) -> bytes:
        """The next bytes."""
        at = self.position - self._start
        if at + count > len(self._buffer):
            if self.position + count > self._end:
                raise PickleError("the pickle is truncated")
            self._buffer = self._file.read_at(min(max(count, _BUFFER), self._end - self.position), self.position)
            self._start, at = self.position, 0
            if len(self._buffer) < count:
                raise PickleError("the pickle is truncated")
        self.position += count
        return self._buffer[at : at + count]

    def skip(self, count: int) -> Extent:
        """Pass over bytes."""
        if self.position + count > self._end:
            raise PickleError("the pickle is truncated")
        self.position += count
        if self.position - self._start > len(self._buffer):
            self._buffer, self._start = b"", self.position
        return Extent(self.position - count, self.position)

    def number(self, layout: str) -> Any:
        """A number in one of struct's layouts."""
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        """Text up to the end of a line."""
        found = bytearray()
        while (byte := self.take(1)) != b"\n":
            found += byte
            if len(found) > LONGEST_LINE:
                raise PickleError("a damaged pickle: a line without an end")
        return found.decode("utf-8")

    def text(self, count: int, encoding: str = "utf-8") -> str:
        """Text of so many bytes."""
        if count > MOST_TEXT:
            raise PickleError(f"a text of {count:,} bytes")
        return self.take(count).decode(encoding)

    def long(self, count: int) -> int:
        """A whole number of so many bytes."""
        if count > LONGEST_LINE:
            raise PickleError("a number of thousands of digits")
        return int.from_bytes(self.take(count), "little", signed=True)


class _Machine:
    """The stack and the memo of a pickle."""

    def __init__(self, stream: _Stream, calls: Mapping[str, Call], persistent: Call | None) -> None:
        self.stream, self._calls, self._persistent = stream, calls, persistent
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Obey opcodes up to the end."""
        while (opcode := self.stream.take(1)) != b".":
            action = _ACTIONS.get(opcode)
            if action is None:
                raise PickleError(f"not a pickle, or a damaged one: opcode {opcode!r}")
            action(self)
        return self.pop()

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise PickleError("a damaged pickle: a mark in place of a value")
        return value

    def marked(self) -> list[Any]:
        """The values above the last mark."""
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise PickleError("a damaged pickle: no mark")
        values = self._stack[at + 1 :]
        del self._stack[at:]
        return values

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def call(self, function: Any, arguments: Any) -> None:
        """Push what a call makes."""
        if not isinstance(arguments, tuple):
            raise PickleError("a damaged pickle: a call without arguments")
        self.push(self.made(function, arguments))

    def made(self, function: Any, arguments: tuple[Any, ...]) -> Any:
        """What a call makes: of a function that we know its value, else a node."""
        if function == Name("torch._tensor._rebuild_from_type_v2") and len(arguments) == 4:
            return self.made(arguments[0], tuple(arguments[2]))  # a tensor with attributes, or of a subclass
        name = function.text if isinstance(function, Name) else ""
        known = self._calls.get(name) or _CALLS.get(name)
        return Node(name, arguments) if known is None else known(*arguments)

    def build(self) -> None:
        """Give the last object its state."""
        state, target = self.pop(), self._stack[-1]
        if isinstance(target, Node):
            target.state = state

    def set_items(self, values: list[Any]) -> None:
        target = self._stack[-1]
        items = target.items if isinstance(target, Node) else target
        if not isinstance(items, dict) or len(values) % 2:
            raise PickleError("a damaged pickle: items of what is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            items[_hashable(key)] = value

    def append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, Node):
            target.values += values
        elif isinstance(target, list):
            target += values
        else:
            raise PickleError("a damaged pickle: values of what is no list")

    def load_persistent(self, key: Any) -> None:
        if self._persistent is None:
            raise PickleError("refers to objects outside the file")
        self.push(self._persistent(key))

    def get(self, index: int) -> None:
        self.push(self._memo[index])


def _hashable(key: Any) -> Any:
    """A key of a dict: text, a number, a node, or a tuple of them; the hash of a nested tuple may take forever."""
    for part in key if isinstance(key, tuple) else (key,):
        if not isinstance(part, str | int | float | Node | Name | None):
            raise PickleError(f"a key of a dict is a {type(part).__name__}")
    return key


def _ordered(*arguments: Any) -> dict[Any, Any]:
    """An OrderedDict, as old and new pickles make it."""
    pairs = arguments[0] if arguments else ()
    return {_hashable(key): value for key, value in (pairs.items() if isinstance(pairs, dict) else pairs)}


_CALLS: dict[str, Call] = {
    "collections.OrderedDict": _ordered,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "builtins.set": lambda values=(): list(values),
    "__builtin__.set": lambda values=(): list(values),
}


def _integer(text: str) -> int | bool:
    return {"00": False, "01": True}[text] if text in ("00", "01") else int(text.rstrip("L"))


def _pops(count: int) -> Callable[[_Machine], None]:
    def action(machine: _Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(values[::-1]))

    return action


def _new(machine: _Machine, with_keywords: bool = False) -> None:
    keywords = machine.pop() if with_keywords else {}
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, (*arguments, *keywords.values()) if keywords else arguments)


def _global(machine: _Machine) -> None:
    name, module = machine.pop(), machine.pop()
    if not (isinstance(name, str) and isinstance(module, str)):
        raise PickleError("a damaged pickle: a name that is no text")
    machine.push(Name(f"{module}.{name}"))


def _reduce(machine: _Machine) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.call(function, arguments)


def _instance(machine: _Machine, name: Name | None = None) -> None:
    values = machine.marked()
    machine.call(values[0] if name is None else name, tuple(values[1:] if name is None else values))


def _pairs(machine: _Machine) -> None:
    values = machine.marked()
    machine.push({})
    machine.set_items(values)


_ACTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m.stream.take(1),
    b"\x95": lambda m: m.stream.take(8),
    b"(": lambda m: m.push(_MARK),
    b"0": lambda m: m._stack.pop(),
    b"1": lambda m: m.marked(),
    b"2": lambda m: m.push(m._stack[-1]),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": lambda m: m.push(_integer(m.stream.line())),
    b"L": lambda m: m.push(_integer(m.stream.line())),
    b"J": lambda m: m.push(m.stream.number("<i")),
    b"K": lambda m: m.push(m.stream.number("<B")),
    b"M": lambda m: m.push(m.stream.number("<H")),
    b"\x8a": lambda m: m.push(m.stream.long(m.stream.number("<B"))),
    b"\x8b": lambda m: m.push(m.stream.long(m.stream.number("<I"))),
    b"F": lambda m: m.push(float(m.stream.line())),
    b"G": lambda m: m.push(m.stream.number(">d")),
    b"S": lambda m: m.push(m.stream.line().strip("'\"")),
    b"T": lambda m: m.push(m.stream.text(m.stream.number("<I"), "latin-1")),
    b"U": lambda m: m.push(m.stream.text(m.stream.number("<B"), "latin-1")),
    b"V": lambda m: m.push(m.stream.line()),
    b"X": lambda m: m.push(m.stream.text(m.stream.number("<I"))),
    b"\x8c": lambda m: m.push(m.stream.text(m.stream.number("<B"))),
    b"\x8d": lambda m: m.push(m.stream.text(m.stream.number("<Q"))),
    b"B": lambda m: m.push(m.stream.skip(m.stream.number("<I"))),
    b"C": lambda m: m.push(m.stream.skip(m.stream.number("<B"))),
    b"\x8e": lambda m: m.push(m.stream.skip(m.stream.number("<Q"))),
    b"\x96": lambda m: m.push(m.stream.skip(m.stream.number("<Q"))),
    b"]": lambda m: m.push([]),
    b"l": lambda m: m.push(m.marked()),
    b"a": lambda m: m.append([m.pop()]),
    b"e": lambda m: m.append(m.marked()),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.marked())),
    b"\x85": _pops(1),
    b"\x86": _pops(2),
    b"\x87": _pops(3),
    b"}": lambda m: m.push({}),
    b"d": _pairs,
    b"s": lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    b"u": lambda m: m.set_items(m.marked()),
    b"\x8f": lambda m: m.push([]),
    b"\x90": lambda m: m.append(m.marked()),
    b"\x91": lambda m: m.push(m.marked()),
    b"c": lambda m: m.push(Name(f"{m.stream.line()}.{m.stream.line()}")),
    b"\x93": _global,
    b"R": _reduce,
    b"b": lambda m: m.build(),
    b"\x81": _new,
    b"\x92": lambda m: _new(m, with_keywords=True),
    b"i": lambda m: _instance(m, Name(f"{m.stream.line()}.{m.stream.line()}")),
    b"o": _instance,
    b"p": lambda m: m.put(int(m.stream.line())),
    b"q": lambda m: m.put(m.stream.number("<B")),
    b"r": lambda m: m.put(m.stream.number("<I")),
    b"\x94": lambda m: m.put(len(m._memo)),
    b"g": lambda m: m.get(int(m.stream.line())),
    b"h": lambda m: m.get(m.stream.number("<B")),
    b"j": lambda m: m.get(m.stream.number("<I")),
    b"P": lambda m: m.load_persistent(m.stream.line()),
    b"Q": lambda m: m.load_persistent(m.pop()),
}
"""What each opcode does. Codes of the extension registry and buffers outside the file are none of these."""
