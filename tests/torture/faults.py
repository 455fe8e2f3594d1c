"""An error, a kill or a loss of power at every file operation of a user's run.

Two file systems replace the real one: one fails at a chosen operation, the other knows at every
moment what a crash would leave, of a process that is killed or of a machine that loses power.
"""

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from factories import snapshots_in

from posthoc_cli import Run, export_file, files
from posthoc_cli.errors import PostHocError
from torture.training import STATE, Tally, contents, train, wrong_output, wrong_snapshots

STEPS = 10
STOPS = 7
SAVES = 5
"""The last step of the training, the one at which it ends for the first time, and the one whose
state is saved."""


@dataclass
class Work:
    """A user's work in a folder: a training with thinning and a resume, synthesis, export into
    shards, pruning."""

    root: Path
    # called with the snapshots when they are durable
    note: Callable[[dict[str, bytes]], None] | None = None
    make_room: Callable[[], None] = lambda: None
    errors: list[str] = field(default_factory=list)
    done: list[Path] = field(default_factory=list)  # the outputs that have been made

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        self.run = self.root / "run"
        names = "out/sigma_rel-0.1.safetensors", "out/sigma_rel-0.2.safetensors", "shards"
        self.outputs = [self.root / name for name in names]

    def do(self) -> None:
        """Do all stages; repeat a stage that fails once."""
        if not (self.run / STATE).exists():
            self._twice(lambda: self._train(STOPS))
        self._twice(lambda: self._train(STEPS))
        first, second, shards = self.outputs
        self._twice(lambda: Run(self.run).write([0.1, 0.2], first.parent, overwrite=True))
        self.done += [first, second]
        self._twice(lambda: export_file(first, shards, max_shard_size="40", overwrite=True))
        self.done.append(shards)
        self._twice(lambda: Run(self.run).prune(keep=2))

    def _twice(self, stage: Callable[[], object]) -> None:
        try:
            stage()
        except PostHocError as error:
            self.errors.append(str(error))
            self.make_room()
            stage()
        self.make_room()

    def _train(self, until: int) -> None:
        self.errors += train(
            self.run, until, (SAVES,), self.note, checkpoint_every=1, max_checkpoints=3
        )

    def snapshots(self) -> set[str]:
        return {snapshot.path.name for snapshot in snapshots_in(self.run)}

    def wrong(self) -> list[str]:
        """Return the problems of all snapshots, and of the outputs that exist or have been made."""
        outputs = (path for path in self.outputs if path.exists() or path in self.done)
        return [
            *wrong_snapshots(self.run),
            *(line for path in outputs for line in wrong_output(path)),
        ]


# --- errors


def errors_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """Raise each kind of error at each operation of reading and writing; the user repeats what has
    failed."""
    tally = Tally()
    counting = Faulty()
    chance = random.Random(seed)
    reference = Work(folder / "reference")
    with installed(counting.do):
        reference.do()
    for kind in KINDS:
        able = [
            at for at, name in enumerate(counting.operations) if name in HALVED.get(kind, (name,))
        ]
        for at in chance.sample(able, max(1, round(share * len(able)))):
            work = Work(folder / "faulty", make_room=(system := Faulty(at, kind)).make_room)
            with tally.judged(f"{kind} at operation {at}", refusable=False), installed(system.do):
                work.do()
            if what := system.failed:
                tally.tried += 1
                left = [f"{path.name} is left over" for path in work.root.rglob(".ema-*.tmp")]
                tally.lost += [f"{what}: {line}" for line in (*work.wrong(), *left)]
                if not work.errors and (differing := work.snapshots() ^ reference.snapshots()):
                    tally.missed.append(
                        f"{what}: no error was raised, and snapshots differ: {sorted(differing)}"
                    )
            shutil.rmtree(work.root)
    return tally


@contextmanager
def installed(do: Callable[..., Any]) -> Iterator[None]:
    """Let every file operation of the block be a call of `do` with its name and arguments."""
    before = files.system
    files.system = files.FileSystem()
    for name in vars(files.FileSystem):
        if name[0] != "_":
            setattr(files.system, name, partial(do, name))
    try:
        yield
    finally:
        files.system = before


def really(name: str, *arguments: Any) -> Any:
    """Do a file operation; skip all syncs."""
    return None if name.startswith("fsync") else getattr(files.FileSystem(), name)(*arguments)


ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES}
KINDS = (*ERRORS, "short", "torn", "full")
"""The faults: one error; a short read or write, which is allowed; half a write, then an error; a
full disk until `make_room`."""
HALVED = {"short": ("write", "read"), "torn": ("write",)}
NEVER = ("close", "remove_directory")
TAKE_ROOM = ("open_new", "write", "make_directory")
"""The operations that can be done by half, those that do not fail, and those that need room on the
disk."""


class Faulty:
    """A file system that fails with a fault of KINDS at the operation number `at`, counted from 0,
    if given."""

    def __init__(self, at: int | None = None, kind: str = "EIO") -> None:
        self._at = at
        self._kind = kind
        self._full = False
        self._lock = threading.Lock()
        self.operations: list[str] = []
        self.failed = ""  # the fault in words, once it has happened

    def make_room(self) -> None:
        self._full = False

    def do(self, name: str, *arguments: Any) -> Any:
        with self._lock:
            fails = (
                len(self.operations) == self._at
                and name in HALVED.get(self._kind, (name,))
                and name not in NEVER
            )
            self.operations += [name] * (name not in NEVER)
            if fails:
                self.failed = f"{self._kind} at operation {self._at}, {name} {arguments[:1]}"
                self._full = self._kind == "full"
        if (fails and self._kind in ERRORS) or (self._full and name in TAKE_ROOM):
            code = ERRORS.get(self._kind, errno.ENOSPC)
            raise OSError(code, os.strerror(code))
        if fails and self._kind in HALVED:
            descriptor, view, offset = arguments
            arguments = descriptor, view[: max(1, len(view) // 2)], offset
        done = really(name, *arguments)
        if fails and self._kind == "torn":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return done


# --- crashes


def crashes_at_every_operation(folder: Path, share: float, seed: int) -> Tally:
    """Kill the process, or cut the power, between any two operations; then the user starts
    again."""
    tally = Tally()
    chance = random.Random(seed)
    places = list[tuple[str, Work, dict[str, bytes]]]()

    def crash(after: str) -> None:
        for kind in ("kill", "nothing", "names", "some"):
            if chance.random() <= share:
                work = Work(folder / f"crash-{len(places)}")
                work.done = [work.root / path.relative_to(first.root) for path in first.done]
                disk.leave(work.root, kind, chance)
                places.append((f"{kind} after operation {after}", work, dict(disk.kept)))

    disk = Disk(folder / "first", crash)
    first = Work(folder / "first", disk.keep)
    with installed(disk.do):
        first.do()
    newest = {name for name in first.snapshots() if name.startswith(f"{STEPS:016d}")}
    for where, work, kept in places:
        tally.tried += 1
        with tally.judged(where, refusable=False):
            current = contents(work.run)
            superseded = contents(work.run / "superseded")
            gone = [
                n
                for n, content in kept.items()
                if content not in (current.get(n), superseded.get(n))
            ]
            lost = [
                f"{name}, which was durable, is gone or different" for name in gone
            ] + work.wrong()
            work.do()
            tally.missed += [f"{where}: resumed: {error}" for error in work.errors]
            lost += [f"resumed: {name} is not there" for name in newest - work.snapshots()]
            tally.lost += [f"{where}: {line}" for line in (*lost, *work.wrong())]
        shutil.rmtree(work.root)
    return tally


@dataclass(eq=False)
class Inode:
    data: bytes = b""  # the current content of a file
    durable: bytes = b""


FOLDER = Inode()  # the entry of every directory
Entries = dict[Path, Inode | None]  # by path; None for a removed name


class Disk:
    """The real file system without syncs, and what a crash would leave of all below `root`; it
    calls `after`."""

    def __init__(self, root: Path, after: Callable[[str], None]) -> None:
        self._root = root
        self._after = after
        self._lock = threading.Lock()
        # snapshots that were durable and have not been removed or replaced since
        self.kept: dict[str, bytes] = {}
        self._now: Entries = {}
        self._durable: Entries = {}
        # atomic operations on directories that are not synced yet
        self._pending: list[Entries] = []
        self._open: dict[int, Inode] = {}  # by descriptor

    def keep(self, contents: dict[str, bytes]) -> None:
        with self._lock:
            self.kept = contents

    def do(self, name: str, *arguments: Any) -> Any:
        if name in ("list", "read"):
            return really(name, *arguments)
        with self._lock:
            done = really(name, *arguments)
            self._follow(name, done, *arguments)
            if name not in ("open", "close"):
                self._after(f"{name} {arguments[0]}")
            return done

    def _follow(self, name: str, done: Any, path: Any, *more: Any) -> None:
        """Update the picture of the disk; `path` is a descriptor of an open file."""
        if name in ("unlink", "rename"):  # what is removed or replaced need not last
            gone = [path, *more][-1]
            self.kept = {
                name: data for name, data in self.kept.items() if self._root / "run" / name != gone
            }
        if name == "open_new":
            self._open[done] = Inode()
            self._edit({path: self._open[done]})
        elif name == "open":
            self._open[done] = self._now.get(path) or Inode()
        elif name == "write":
            inode, (view, offset) = self._open[path], more
            inode.data = (
                inode.data[:offset].ljust(offset, b"\0") + view[:done] + inode.data[offset + done :]
            )
        elif name == "fsync":
            self._open[path].durable = self._open[path].data
        elif name == "fsync_directory":
            for edits in [
                edits for edits in self._pending if path in {entry.parent for entry in edits}
            ]:
                self._pending.remove(edits)
                self._durable |= edits
        elif name == "rename":  # of a folder, takes along what it holds
            moved = [
                entry for entry, inode in self._now.items() if inode and entry.is_relative_to(path)
            ]
            there = {more[0] / entry.relative_to(path): self._now[entry] for entry in moved}
            self._edit({**dict.fromkeys(moved), **there})
        elif name == "link":
            self._edit({more[0]: self._now[path]})
        elif name in ("unlink", "remove_directory"):
            self._edit({path: None})
        elif name == "make_directory" and self._now.get(path) is None:
            self._edit({path: FOLDER})

    def _edit(self, edits: Entries) -> None:
        self._pending.append(edits)
        self._now |= edits

    def leave(self, place: Path, crash: str, chance: random.Random) -> None:
        """Build in `place` what is on the disk after a "kill" of the process, or after a loss of
        power.

        Of everything unsynced "nothing", all "names" without content, or "some" at random has
        survived the latter.
        """
        entries = dict(self._now if crash in ("kill", "names") else self._durable)
        for edits in self._pending if crash == "some" else ():
            entries |= edits if chance.random() < 0.5 else {}
        for name, inode in sorted(entries.items()):
            path = place / name.relative_to(self._root)
            if inode is FOLDER and path.parent.exists():
                path.mkdir()
            elif inode and path.parent.exists():
                data = inode.data if crash == "kill" else inode.durable
                if crash == "some" and inode.data != data:
                    end = chance.randrange(len(inode.data) + 1)
                    left = inode.data[:end]
                    data = chance.choice((data, left, left.ljust(len(inode.data), b"\0")))
                path.write_bytes(data)
