"""File systems in place of the real one: one that fails at a chosen operation, and one that remembers everything.

From what the second remembers, what a crash would have left can be made at every moment between two operations, for
a process that is killed and for a machine that loses its power.
"""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from posthoc_cli import files

ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES}
KINDS = (*ERRORS, "short", "torn", "full")
"""Faults: an error once; a write that takes half, which is allowed; half a write, then an error; a disk that is full
until somebody makes room."""
HALVED = {"short": ("write", "read"), "torn": ("write",)}
"""Operations that can be done by half."""
TAKES_ROOM = ("open_new", "write", "make_directory")


@contextmanager
def installed(system: files.FileSystem) -> Iterator[None]:
    """Put a file system in the place of the real one for the block."""
    before, files.system = files.system, system
    try:
        yield
    finally:
        files.system = before


# --- one that fails


def _counted(name: str) -> Callable[..., Any]:
    """A method of `Faulty` that does an operation on paths, unless it is to fail."""

    def method(self: Faulty, *paths: Path) -> object:
        self._pass(name, paths[-1])
        return getattr(files.FileSystem, name)(self, *paths)

    return method


class Faulty(files.FileSystem):
    """Counts operations, and fails at that of number `at`, from 0 on, if any, in the way of one of KINDS."""

    def __init__(self, at: int | None = None, kind: str = "EIO") -> None:
        self._at, self._kind, self._full = at, kind, False
        self._lock = threading.Lock()
        self.operations: list[str] = []
        self.failed: str | None = None
        """In words."""

    def make_room(self) -> None:
        """The disk is full no longer."""
        self._full = False

    def read(self, descriptor: int, view: memoryview, offset: int) -> int:
        if self._pass("read", descriptor):
            view = view[: max(1, len(view) // 2)]
        return super().read(descriptor, view, offset)

    def write(self, descriptor: int, view: memoryview, offset: int) -> int:
        if self._pass("write", descriptor):
            written = super().write(descriptor, view[: max(1, len(view) // 2)], offset)
            if self._kind == "short":
                return written
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(descriptor, view, offset)

    def fsync(self, descriptor: int) -> None:
        self._pass("fsync", descriptor)

    def fsync_directory(self, path: Path) -> None:
        self._pass("fsync_directory", path)

    open_new, open, list = _counted("open_new"), _counted("open"), _counted("list")
    rename, link, unlink = _counted("rename"), _counted("link"), _counted("unlink")
    make_directory = _counted("make_directory")

    def _pass(self, operation: str, where: object) -> bool:
        """Count an operation, and raise where it is to fail; True where it is to be done by half."""
        with self._lock:
            number = len(self.operations)
            self.operations.append(operation)
            if self._full and operation in TAKES_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number != self._at or operation not in HALVED.get(self._kind, (operation,)):
                return False
            self.failed = f"{self._kind} at operation {number}, {operation} {where}"
            if self._kind in HALVED:
                return True
            self._full = self._kind == "full"
            if self._full and operation not in TAKES_ROOM:
                return False
            code = ERRORS.get(self._kind, errno.ENOSPC)
            raise OSError(code, os.strerror(code))


# --- one that remembers


@dataclass(eq=False)
class Inode:
    """A file: its content now, and what of it is on the disk."""

    data: bytes = b""
    durable: bytes = b""


FOLDER = Inode()
"""Stands for every directory."""
Entries = dict[str, Inode | None]
"""By the path; None where a name is removed."""


class Disk:
    """What would be on a disk: `apply` takes the operations that were recorded, in their order."""

    def __init__(self) -> None:
        self._now: Entries = {}
        self._durable: Entries = {}
        self._pending: list[Entries] = []
        """Operations on directories, each of which is done as a whole or not at all."""
        self._inodes: dict[int, Inode] = {}

    def apply(self, operation: tuple[object, ...]) -> None:
        """Take one operation."""
        kind, *rest = operation
        getattr(self, f"_{kind}")(*rest)

    def _open_new(self, path: str, number: int) -> None:
        self._inodes[number] = Inode()
        self._edit({path: self._inodes[number]})

    def _write(self, number: int, data: bytes, offset: int) -> None:
        inode = self._inodes[number]
        before = inode.data.ljust(offset, b"\0")
        inode.data = before[:offset] + data + before[offset + len(data) :]

    def _fsync(self, number: int) -> None:
        self._inodes[number].durable = self._inodes[number].data

    def _fsync_directory(self, path: str) -> None:
        waiting, self._pending = self._pending, []
        for edits in waiting:
            if any(str(PurePosixPath(name).parent) == path for name in edits):
                self._durable |= edits
            else:
                self._pending.append(edits)

    def _rename(self, source: str, target: str) -> None:
        assert self._now[source] is not FOLDER
        self._edit({source: None, target: self._now[source]})

    def _link(self, source: str, target: str) -> None:
        self._edit({target: self._now[source]})

    def _unlink(self, path: str) -> None:
        self._edit({path: None})

    _remove_directory = _unlink

    def _make_directory(self, path: str) -> None:
        if self._now.get(path) is None:
            self._edit({path: FOLDER})

    def _note(self, *_: object) -> None:
        """Something that the scenario says; no operation."""

    def _edit(self, edits: Entries) -> None:
        self._pending.append(edits)
        self._now |= edits

    def leave(self, place: Path, crash: str, chance: random.Random) -> None:
        """Make in `place` what is there after a crash.

        Arguments:
            crash: "kill" (the process dies, the system lives), or a loss of power after which "nothing" that was not
                synced is there, every "name" is there but no content that was not synced, or "some" of it is.
        """
        entries = dict(self._now if crash in ("kill", "names") else self._durable)
        for edits in self._pending if crash == "some" else ():
            entries |= edits if chance.random() < 0.5 else {}
        place.mkdir()
        for name, inode in sorted(entries.items()):
            path = place / name
            if inode is FOLDER and path.parent.exists():
                path.mkdir()
            elif inode and path.parent.exists():
                path.write_bytes(_content(inode, crash, chance))


def _content(inode: Inode, crash: str, chance: random.Random) -> bytes:
    if crash == "kill":
        return inode.data
    if crash == "some" and inode.data != inode.durable:
        end = chance.randrange(len(inode.data) + 1)
        return chance.choice((inode.durable, inode.data[:end], inode.data[:end].ljust(len(inode.data), b"\0")))
    return inode.durable


def _recorded(name: str) -> Callable[..., None]:
    """A method of `Recording` that does an operation on paths, and remembers it."""

    def method(self: Recording, *paths: Path) -> None:
        with self._lock:
            getattr(files.FileSystem, name)(self, *paths)
            self.operations.append((name, *map(self._name, paths)))

    return method


class Recording(files.FileSystem):
    """Does everything below `root`, and remembers it for `Disk.apply` in the order in which it was done."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._numbers: dict[int, int] = {}
        self.operations: list[tuple[object, ...]] = []

    def note(self, *what: object) -> None:
        """Remember something that the scenario says."""
        with self._lock:
            self.operations.append(("note", *what))

    def open_new(self, path: Path) -> int:
        with self._lock:
            descriptor = super().open_new(path)
            self._numbers[descriptor] = len(self.operations)
            self.operations.append(("open_new", self._name(path), len(self.operations)))
        return descriptor

    def close(self, descriptor: int) -> None:
        with self._lock:
            self._numbers.pop(descriptor, None)
            super().close(descriptor)

    def write(self, descriptor: int, view: memoryview, offset: int) -> int:
        with self._lock:
            written = super().write(descriptor, view, offset)
            self.operations.append(("write", self._numbers[descriptor], bytes(view[:written]), offset))
        return written

    def fsync(self, descriptor: int) -> None:
        with self._lock:
            self.operations.append(("fsync", self._numbers[descriptor]))

    def fsync_directory(self, path: Path) -> None:
        with self._lock:
            self.operations.append(("fsync_directory", self._name(path)))

    rename, link = _recorded("rename"), _recorded("link")
    unlink, make_directory = _recorded("unlink"), _recorded("make_directory")
    remove_directory = _recorded("remove_directory")

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self._root))
