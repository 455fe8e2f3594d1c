"""An error, a kill or a loss of power at every file operation of a user's run.

Two file systems replace the real one: one fails at a chosen operation, the other knows at every
moment what a crash would leave, of a process that is killed or of a machine that loses power.
"""

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest import mock

from factories import snapshots_in

from posthoc_cli import PostHocError, Run, export_file, files
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

    def __post_init__(self):
        self.root.mkdir(exist_ok=True)
        self.run = self.root / "run"
        self.outputs = [
            self.root / "out/sigma_rel-0.1.safetensors",
            self.root / "out/sigma_rel-0.2.safetensors",
            self.root / "shards",
        ]

    def do(self):
        """Do all stages; repeat a stage that fails once."""
        if not (self.run / STATE).exists():
            self._twice(lambda: self._train(STOPS))
        self._twice(lambda: self._train(STEPS))
        self._twice(lambda: Run(self.run).write([0.1, 0.2], self.root / "out", overwrite=True))
        self.done += self.outputs[:2]
        first, _, shards = self.outputs
        self._twice(lambda: export_file(first, shards, max_shard_size="40", overwrite=True))
        self.done += self.outputs[2:]
        self._twice(lambda: Run(self.run).prune(keep=2))

    def _twice(self, stage):
        try:
            stage()
        except PostHocError as error:
            self.errors.append(str(error))
            self.make_room()
            stage()
        self.make_room()

    def _train(self, until):
        self.errors += train(
            self.run, until, (SAVES,), self.note, checkpoint_every=1, max_checkpoints=3
        )

    def snapshots(self):
        return {snapshot.path.name for snapshot in snapshots_in(self.run)}

    def wrong(self):
        """Return the problems of all snapshots, and of the outputs that exist or have been made."""
        problems = [*wrong_snapshots(self.run)]
        for path in self.outputs:
            if path.exists() or path in self.done:
                problems += wrong_output(path)
        return problems


# --- errors


def errors_at_every_operation(folder, share, seed):
    """Raise each kind of error at each operation of reading and writing; the user repeats what has
    failed."""
    tally = Tally()
    counting = Faulty()
    chance = random.Random(seed)
    reference = Work(folder / "reference")
    with installed(counting):
        reference.do()
    for kind in KINDS:
        able = [at for at, name in enumerate(counting.operations) if can_fail(name, kind)]
        for at in chance.sample(able, max(1, round(share * len(able)))):
            system = Faulty(at, kind)
            work = Work(folder / "faulty", make_room=system.make_room)
            with tally.judged(f"{kind} at operation {at}", refusable=False), installed(system):
                work.do()
            if system.failed:
                _judge(tally, system.failed, work, reference)
            shutil.rmtree(work.root)
    return tally


def _judge(tally, fault, work, reference):
    """Count the work that a fault has met, and what is wrong after it."""
    tally.tried += 1
    tally.lost += [f"{fault}: {line}" for line in work.wrong()]
    for path in work.root.rglob(".ema-*.tmp"):
        tally.lost.append(f"{fault}: {path.name} is left over")
    differing = work.snapshots() ^ reference.snapshots()
    if differing and not work.errors:
        reason = f"no error was raised, and snapshots differ: {sorted(differing)}"
        tally.missed.append(f"{fault}: {reason}")


class Watched:
    """A file system whose operations are calls of `do` with their names and arguments."""

    def do(self, name, *arguments):
        raise NotImplementedError

    def __getattr__(self, name):
        return partial(self.do, name)


def installed(system):
    return mock.patch.object(files, "system", system)


def really(name, *arguments):
    """Do a file operation; skip all syncs."""
    if name.startswith("fsync"):
        return None
    operation = getattr(files.FileSystem(), name)
    return operation(*arguments)


ERRORS = ("EIO", "ENOSPC", "EACCES")
KINDS = (*ERRORS, "short", "torn", "full")
"""The faults: one error; a short read or write, which is allowed; half a write, then an error; a
full disk until `make_room`."""
HALVED = {"short": ("write", "read"), "torn": ("write",)}
NEVER = ("close", "remove_directory")
TAKE_ROOM = ("open_new", "write", "make_directory")
"""The operations that can be done by half, those that do not fail, and those that need room on the
disk."""


def can_fail(name, kind):
    """Return whether an operation can fail with a fault of this kind."""
    return name not in NEVER and name in HALVED.get(kind, (name,))


class Faulty(Watched):
    """A file system that fails with a fault of KINDS at the operation number `at`, counted from 0,
    if given."""

    def __init__(self, at=None, kind="EIO"):
        self._at = at
        self._kind = kind
        self._full = False
        self._lock = threading.Lock()
        self.operations = []
        self.failed = ""  # the fault in words, once it has happened

    def make_room(self):
        self._full = False

    def do(self, name, *arguments):
        with self._lock:
            fails = len(self.operations) == self._at and can_fail(name, self._kind)
            if name not in NEVER:
                self.operations.append(name)
            if fails:
                self.failed = f"{self._kind} at operation {self._at}, {name} {arguments[:1]}"
                self._full = self._kind == "full"
        if (fails and self._kind in ERRORS) or (self._full and name in TAKE_ROOM):
            code = getattr(errno, self._kind, errno.ENOSPC)
            raise OSError(code, os.strerror(code))
        if fails and self._kind in HALVED:
            descriptor, view, offset = arguments
            half = max(1, len(view) // 2)
            arguments = descriptor, view[:half], offset
        done = really(name, *arguments)
        if fails and self._kind == "torn":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return done


# --- crashes


def crashes_at_every_operation(folder, share, seed):
    """Kill the process, or cut the power, between any two operations; then the user starts
    again."""
    tally = Tally()
    chance = random.Random(seed)
    crashes = []

    def crash(after):
        for kind in ("kill", "nothing", "names", "some"):
            if chance.random() <= share:
                work = Work(folder / f"crash-{len(crashes)}")
                work.done = [work.root / path.relative_to(first.root) for path in first.done]
                disk.leave(work.root, kind, chance)
                crashes.append(Crash(f"{kind} after operation {after}", work, dict(disk.kept)))

    disk = Disk(folder / "first", crash)
    first = Work(folder / "first", disk.keep)
    with installed(disk):
        first.do()
    newest = {name for name in first.snapshots() if name.startswith(f"{STEPS:016d}")}
    for each in crashes:
        tally.tried += 1
        work = each.work
        with tally.judged(each.where, refusable=False):
            lost = [*each.gone(), *work.wrong()]
            work.do()
            tally.missed += [f"{each.where}: resumed: {error}" for error in work.errors]
            lost += [f"resumed: {name} is not there" for name in newest - work.snapshots()]
            lost += work.wrong()
            tally.lost += [f"{each.where}: {line}" for line in lost]
        shutil.rmtree(work.root)
    return tally


@dataclass
class Crash:
    """What a crash has left, and the snapshots that were durable before it."""

    where: str
    work: Work
    kept: dict[str, bytes]

    def gone(self):
        current = contents(self.work.run)
        superseded = contents(self.work.run / "superseded")
        for name, content in self.kept.items():
            if content not in (current.get(name), superseded.get(name)):
                yield f"{name}, which was durable, is gone or different"


@dataclass(eq=False)
class File:
    data: bytes = b""
    durable: bytes = b""  # what it was at the last sync


FOLDER = File()  # the entry of every directory
Entries = dict[Path, File | None]  # by path; None for a removed name
WATCHED = (".safetensors", ".json", ".tmp")
"""The endings of files, and of temporary folders, that are written through `files.system`."""


class Disk(Watched):
    """The real file system without syncs, and what a crash would leave of all below `root`; it
    calls `after`."""

    def __init__(self, root, after):
        self._root = root
        self._after = after
        self._lock = threading.Lock()
        # snapshots that were durable and have not been removed or replaced since
        self.kept = {}
        self._files = {}  # by the number of their inode
        self._now = {}
        self._durable = {}
        # atomic operations on directories that are not synced yet
        self._pending = []

    def keep(self, contents):
        with self._lock:
            self.kept = contents

    def do(self, name, *arguments):
        if name in ("list", "read"):
            return really(name, *arguments)
        with self._lock:
            done = really(name, *arguments)
            if name == "open_new":
                self._files[os.fstat(done).st_ino] = File()
            elif name in ("write", "fsync"):
                self._change(name, arguments[0])
            elif name in ("unlink", "rename") and arguments[-1].parent == self._root / "run":
                # what is removed or replaced need not last
                self.kept.pop(arguments[-1].name, None)
            self._compare()
            if name == "fsync_directory":
                self._sync(arguments[0])
            if name not in ("open", "close"):
                self._after(f"{name} {arguments[0]}")
            return done

    def _change(self, name, descriptor):
        status = os.fstat(descriptor)
        file = self._files[status.st_ino]
        if name == "write":
            file.data = os.pread(descriptor, status.st_size, 0)
        else:
            file.durable = file.data

    def _compare(self):
        """Take the changes of names for one operation."""
        now = {}
        for path in self._root.rglob("*"):
            if path.is_dir():
                now[path] = FOLDER
            elif path.suffix in WATCHED:
                now[path] = self._files[path.lstat().st_ino]
        edits = {}
        for path in now.keys() | self._now.keys():
            if now.get(path) is not self._now.get(path):
                edits[path] = now.get(path)
        self._pending.append(edits)
        self._now = now

    def _sync(self, directory):
        pending = []
        for edits in self._pending:
            if any(entry.parent == directory for entry in edits):
                self._durable |= edits
            else:
                pending.append(edits)
        self._pending = pending

    def leave(self, place, crash, chance):
        """Build in `place` what is on the disk after a "kill" of the process, or after a loss of
        power.

        Of everything unsynced "nothing", all "names" without content, or "some" at random has
        survived the latter.
        """
        entries = dict(self._now if crash in ("kill", "names") else self._durable)
        if crash == "some":
            for edits in self._pending:
                if chance.random() < 0.5:
                    entries |= edits
        for name, file in sorted(entries.items()):
            path = place / name.relative_to(self._root)
            if file is FOLDER and path.parent.exists():
                path.mkdir()
            elif file and path.parent.exists():
                data = file.data if crash == "kill" else file.durable
                if crash == "some" and file.data != data:
                    size = len(file.data)
                    left = file.data[: chance.randrange(size + 1)]
                    data = chance.choice((data, left, left.ljust(size, b"\0")))
                path.write_bytes(data)
