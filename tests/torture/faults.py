"""A fault, a kill or a power loss at every file operation of a user's run.

Two file systems replace the real one: one fails at a chosen operation, the other records all operations. From the
record, the state that a crash leaves can be built for every moment between two operations, for a process that is killed
and for a machine that loses power.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ema_command import run_ema

from posthoc_cli import files
from posthoc_cli.errors import PostHocError
from posthoc_cli.snapshots.directory import SUPERSEDED, find_snapshots
from posthoc_cli.snapshots.outputs import INDEX_NAME
from torture import Tally
from torture.training import STATE, contents, problems, train, wrong_output, wrong_snapshots

STEPS = 10
STOPS = 7
"""The step at which the first training ends, two steps after its last saved state."""
SAVES = 5


@dataclass
class Run:
    """A user's run: training with thinning and a resume, synthesis, export into shards, pruning."""

    root: Path
    note: Callable[..., None] = lambda *_: None
    """Called with what has become durable, and what is done."""
    make_room: Callable[[], None] = lambda: None
    errors: list[str] = field(default_factory=list)
    """The errors on the way, a line each."""

    def __post_init__(self) -> None:
        self.directory, self.shards = self.root / "run", self.root / "shards"
        self.outputs = [self.root / "out" / f"sigma_rel-{target}.safetensors" for target in (0.1, 0.2)]

    def do(self) -> None:
        """Do all stages; repeat a stage that fails once."""
        if not (self.directory / STATE).exists():
            self._twice(lambda: self._train(STOPS))
        self._twice(lambda: self._train(STEPS))
        out = ["--out", self.root / "out", "--overwrite"]
        self._twice(lambda: _ema("synthesize", self.directory, "--sigma-rel", "0.1,0.2", *out))
        self.note("output", *(path.relative_to(self.root).as_posix() for path in self.outputs))
        shards = ["--out", self.shards, "--max-shard-size", "40", "--overwrite"]
        self._twice(lambda: _ema("export", self.outputs[0], *shards))
        self.note("output", "shards")
        self._twice(lambda: _ema("prune", self.directory, "--keep", 2, "--yes"))

    def names(self) -> set[str]:
        """Return the names of the snapshots."""
        return {snapshot.path.name for snapshot in find_snapshots(self.directory)}

    def _twice(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except (PostHocError, CommandError) as error:
            self.errors.append(str(error))
            self.make_room()
            stage()
        self.make_room()

    def _train(self, until: int) -> None:
        self.errors += train(self.directory, until, (SAVES,), self.note, checkpoint_every=1, max_checkpoints=3)

    def problems(self) -> list[str]:
        """Return the problems in the directory of snapshots."""
        if not any(path.suffix == ".safetensors" for path in self.directory.iterdir()):
            return []
        return problems(self.directory) or wrong_snapshots(self.directory)

    def wrong_outputs(self) -> list[str]:
        """Return the problems of all outputs that must exist at the end."""
        return [*self.wrong_shards(), *(line for path in self.outputs for line in wrong_output(path))]

    def wrong_shards(self) -> list[str]:
        """Return the problems of the exported shards."""
        paths = sorted(self.shards.glob("model*.safetensors"))
        if len(paths) != 2 or not (self.shards / INDEX_NAME).exists():
            return [f"{self.shards.name}: holds {[path.name for path in paths]}"]
        return [line for path in paths for line in wrong_output(path)]


class CommandError(Exception):
    """A command that ended with an exit code above 0."""


def _ema(*arguments: object) -> None:
    result = run_ema(*arguments)
    if result.code:
        raise CommandError(result.err.strip() or f"exit code {result.code}")


# --- errors and crashes

CRASHES = ("kill", "nothing", "names", "some")
"""The kinds of crashes that `Disk.leave` takes."""


def errors_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """Raise each kind of error at each operation of reading and writing; the user repeats what has failed."""
    tally, counting, chance = Tally(), Faulty(), random.Random(seed)
    reference = Run(folder / "reference")
    reference.root.mkdir()
    with installed(counting):
        reference.do()
    for kind in KINDS:
        able = [at for at, name in enumerate(counting.operations) if name in HALVED.get(kind, (name,))]
        for at in sorted(chance.sample(able, max(2, round(share * len(able))))):
            system = Faulty(at, kind)
            run = Run(folder / "faulty", make_room=system.make_room)
            run.root.mkdir()
            try:
                with installed(system):
                    run.do()
            except Exception as error:  # noqa: BLE001 - any error is a failure
                tally.missed.append(f"{system.failed}: ended with {type(error).__name__}: {error}")
            if system.failed is not None:
                tally.tried += 1
                left = [f"{path.name} is left over" for path in run.root.rglob(f"{files.TEMPORARY_PREFIX}*.tmp")]
                tally.lost += [f"{system.failed}: {line}" for line in (*run.problems(), *run.wrong_outputs(), *left)]
                if not run.errors and (differing := run.names() ^ reference.names()):
                    tally.missed.append(
                        f"{system.failed}: no error was raised, and snapshots differ: {sorted(differing)}"
                    )
            shutil.rmtree(run.root)
    return tally


def crashes_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """Kill the process, or cut the power, between any two operations; then the user starts again."""
    tally, chance = Tally(), random.Random(seed)
    reference = Run(folder / "reference")
    reference.root.mkdir()
    recording = Recording(reference.root)
    reference.note = recording.note
    with installed(recording):
        reference.do()
    newest = {name for name in reference.names() if name.startswith(f"{STEPS:016d}")}
    disk, durable, done = Disk(), dict[str, bytes](), set[str]()
    for number, operation in enumerate(recording.operations):
        disk.apply(operation)
        _follow(operation, durable, done)
        for crash in CRASHES:
            if chance.random() > share:
                continue
            run = Run(folder / "crashed")
            disk.leave(run.root, crash, chance)
            tally.tried += 1
            where = f"{crash} after operation {number}, {operation[0]} {operation[1]}"
            try:
                tally.lost += [f"{where}: {line}" for line in _harmed(run, durable, done)]
                run.do()
                tally.missed += [f"{where}: resumed: {error}" for error in run.errors]
                lost = [f"{name} is not there" for name in newest - run.names()]
                lost += [*run.problems(), *run.wrong_outputs()]
                tally.lost += [f"{where}: resumed: {line}" for line in lost]
            except Exception as error:  # noqa: BLE001 - any error is a failure
                tally.missed.append(f"{where}: {type(error).__name__}: {error}")
            shutil.rmtree(run.root)
    return tally


def _follow(operation: tuple[object, ...], durable: dict[str, bytes], done: set[str]) -> None:
    """Update what has been reported durable and not been removed since, and what is done."""
    kind, *rest = operation
    if kind == "note" and rest[0] == "durable":
        durable.clear()
        durable |= rest[1]  # type: ignore[operator]
    elif kind == "note":
        done |= {str(name) for name in rest[1:]}
    elif kind in ("unlink", "rename"):  # a state is replaced by a newer one
        durable.pop(str(rest[-1]).removeprefix("run/"), None)


def _harmed(run: Run, durable: Mapping[str, bytes], done: set[str]) -> list[str]:
    """Return what a crash has lost or left incomplete, before anything else runs."""
    if not run.directory.exists():
        return [f"{name} is gone" for name in durable]
    current, superseded = contents(run.directory), contents(run.directory / SUPERSEDED)
    wrong = [
        f"{name}, which was durable, is gone or different"
        for name, content in durable.items()
        if current.get(name) != content and superseded.get(name) != content
    ]
    for path in run.outputs:
        if path.exists() or path.relative_to(run.root).as_posix() in done:
            wrong += wrong_output(path)
    if (run.shards / INDEX_NAME).exists() or "shards" in done:
        wrong += run.wrong_shards()
    return [*run.problems(), *wrong]


# --- file systems


@contextmanager
def installed(system: files.FileSystem) -> Iterator[None]:
    """Replace the real file system for the block."""
    before, files.system = files.system, system
    try:
        yield
    finally:
        files.system = before


def _watched(name: str) -> Callable[..., Any]:
    return lambda system, *arguments: system.does(name, *arguments)


class Watched(files.FileSystem):
    """A file system that passes every operation to `does` and skips all syncs."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.operations: list[Any] = []

    def does(self, name: str, *arguments: Any) -> Any:
        """Do the operation with this name."""
        return None if name.startswith("fsync") else getattr(super(), name)(*arguments)

    open_new, open, close, list = _watched("open_new"), _watched("open"), _watched("close"), _watched("list")
    read, write, fsync = _watched("read"), _watched("write"), _watched("fsync")
    fsync_directory, rename, link = _watched("fsync_directory"), _watched("rename"), _watched("link")
    unlink, make_directory = _watched("unlink"), _watched("make_directory")
    remove_directory = _watched("remove_directory")


ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES}
KINDS = (*ERRORS, "short", "torn", "full")
"""The faults: one error; a short read or write, which is allowed; half a write, then an error; a full disk until
`make_room`."""
HALVED = {"short": ("write", "read"), "torn": ("write",)}
"""The operations that can be done by half."""
TAKES_ROOM = ("open_new", "write", "make_directory")


class Faulty(Watched):
    """A file system that fails with a fault of KINDS at the operation number `at`, counted from 0, if given."""

    def __init__(self, at: int | None = None, kind: str = "EIO") -> None:
        super().__init__()
        self._at, self._kind, self._full = at, kind, False
        self.failed: str | None = None
        """The fault in words, once it has happened."""

    def make_room(self) -> None:
        """End the full disk."""
        self._full = False

    def does(self, name: str, *arguments: Any) -> Any:
        by_half = name not in ("close", "remove_directory") and self._fails(name, arguments)
        if by_half:
            descriptor, view, offset = arguments
            arguments = descriptor, view[: max(1, len(view) // 2)], offset
        done = super().does(name, *arguments)
        if by_half and self._kind == "torn":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return done

    def _fails(self, name: str, arguments: tuple[Any, ...]) -> bool:
        """Count an operation and raise if it is to fail; return whether it is to be done by half."""
        with self.lock:
            number = len(self.operations)
            self.operations.append(name)
            if self._full and name in TAKES_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number != self._at or name not in HALVED.get(self._kind, (name,)):
                return False
            where = arguments[0] if isinstance(arguments[0], int) else arguments[-1]
            self.failed = f"{self._kind} at operation {number}, {name} {where}"
            if self._kind in HALVED:
                return True
            self._full = self._kind == "full"
            if self._full and name not in TAKES_ROOM:
                return False
            code = ERRORS.get(self._kind, errno.ENOSPC)
            raise OSError(code, os.strerror(code))


class Recording(Watched):
    """A file system that records all operations below `root`, in order, for `Disk.apply`."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self._numbers: dict[int, int | str] = {}
        """The number or, if it was opened for reading, the name of the file of each descriptor."""

    def note(self, *what: object) -> None:
        """Record a note of the scenario."""
        with self.lock:
            self.operations.append(("note", *what))

    def does(self, name: str, *arguments: Any) -> Any:
        if name in ("list", "read"):
            return super().does(name, *arguments)
        with self.lock:
            if name == "close":  # another file may get this descriptor immediately
                self._numbers.pop(arguments[0], None)
            done = super().does(name, *arguments)
            if name == "open":
                self._numbers[done] = self._name(arguments[0])
                return done
            if name == "open_new":
                self._numbers[done] = len(self.operations)
                arguments = *arguments, done
            elif name == "write":
                descriptor, view, offset = arguments
                arguments = descriptor, bytes(view[:done]), offset
            if name != "close":
                self.operations.append((name, *map(self._name, arguments[:2]), *arguments[2:]))
        return done

    def _name(self, what: Any) -> Any:
        if isinstance(what, Path):
            return str(what.relative_to(self._root))
        return self._numbers[what] if isinstance(what, int) else what


@dataclass(eq=False)
class Inode:
    """A file: its current content, and the durable part of it."""

    data: bytes = b""
    durable: bytes = b""


FOLDER = Inode()
"""The entry of every directory."""
Entries = dict[str, Inode | None]
"""Entries by path; None for a removed name."""


class Disk:
    """A simulated disk; `apply` takes the recorded operations in order."""

    def __init__(self) -> None:
        self._now: Entries = {}
        self._durable: Entries = {}
        self._pending: list[Entries] = []
        """The operations on directories that are not synced yet; each is atomic."""
        self._inodes: dict[int, Inode] = {}

    def apply(self, operation: tuple[object, ...]) -> None:
        """Apply one operation."""
        kind, *rest = operation
        getattr(self, f"_{kind}")(*rest)

    def _open_new(self, path: str, number: int) -> None:
        self._inodes[number] = Inode()
        self._edit({path: self._inodes[number]})

    def _write(self, number: int, data: bytes, offset: int) -> None:
        inode = self._inodes[number]
        before = inode.data.ljust(offset, b"\0")
        inode.data = before[:offset] + data + before[offset + len(data) :]

    def _fsync(self, file: int | str) -> None:
        inode = self._now[file] if isinstance(file, str) else self._inodes[file]
        assert inode is not None
        inode.durable = inode.data

    def _fsync_directory(self, path: str) -> None:
        """Make the edits in a directory durable; a rename of a folder takes what it holds along."""
        waiting, self._pending = self._pending, []
        for edits in waiting:
            if any(str(PurePosixPath(name).parent) == path for name in edits):
                self._durable |= edits
            else:
                self._pending.append(edits)

    def _rename(self, source: str, target: str) -> None:
        moved = [name for name, inode in self._now.items() if inode and (f"{name}/").startswith(f"{source}/")]
        self._edit(dict.fromkeys(moved) | {target + name.removeprefix(source): self._now[name] for name in moved})

    def _link(self, source: str, target: str) -> None:
        self._edit({target: self._now[source]})

    def _unlink(self, path: str) -> None:
        self._edit({path: None})

    _remove_directory = _unlink

    def _make_directory(self, path: str) -> None:
        if self._now.get(path) is None:
            self._edit({path: FOLDER})

    def _note(self, *_: object) -> None:
        """Ignore a note of the scenario."""

    def _edit(self, edits: Entries) -> None:
        self._pending.append(edits)
        self._now |= edits

    def leave(self, place: Path, crash: str, chance: random.Random) -> None:
        """Build in `place` what is on the disk after a crash.

        Arguments:
            crash: "kill" (the process dies, the system lives), or a power loss after which of everything unsynced
                "nothing", all "names" without content, or "some" at random has survived.
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
