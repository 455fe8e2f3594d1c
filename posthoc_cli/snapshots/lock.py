"""One writer a directory, by `flock`, which the system releases when its holder dies.

On a file system without locks, or one that keeps them to one host, nothing can exclude a second writer; a warning says
so if that can be detected. A note next to the lock names its holder, for people.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, LockedError, WriteError, printable
from posthoc_cli.snapshots.tensor_file import read_small_file

log = logging.getLogger(__name__)

LOCK_NAME = ".ema.lock"
HOLDER_NAME = ".ema.lock.holder"
MOST_HOLDER_BYTES = 10_000

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of `flock` on a file system without locks."""


class DirectoryLock:
    """The exclusive right to write to a directory: held from construction until `release`, also a context manager.

    A LockedError if another tracker or command holds it, a WriteError if the system refused.
    """

    def __init__(self, directory: Path) -> None:
        import filelock  # takes a tenth of a second, which a look at a run need not wait for

        self._holder = directory / HOLDER_NAME
        self._clear_note: Callable[[], object] = lambda: None
        with files.reported_as_write_error(directory):
            # Not filelock's substitute, a file that exists or not: it would survive a crash.
            path = directory / LOCK_NAME
            if path.is_file() and path.stat().st_size:  # releases of filelock for Python 3.10 would empty it
                raise WriteError(path, "is not a lock: it has content", "move it away")
            self._lock = filelock.FileLock(path, blocking=False, is_singleton=False, fallback_to_soft=False)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                what = f"{self._named_holder()} is writing here"
                raise LockedError(directory, what, "close that tracker, or take another directory") from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                why = (error.strerror or str(error)).lower()
                log.warning("%s: no locks on this file system (%s): make sure that nothing else writes", directory, why)
            try:
                if self._holder.exists() and self._holder.stat().st_size:
                    log.warning("%s: %s", directory, self._left_behind())
                self._note_holder()
                # Also without a call of `release`: at the end of the process, or of all references.
                self._clear_note = weakref.finalize(self, _clear, self._holder, os.getpid())
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Release the lock."""
        try:
            if self._clear_note():
                with suppress(OSError):
                    files.unlink_if_there(self._holder)
        finally:
            if self._lock.is_locked:
                self._lock.release()

    def __enter__(self) -> DirectoryLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _note_holder(self) -> None:
        """Write the note; nothing depends on it, so that it need not be atomic."""
        own = {"host": socket.gethostname(), "process": os.getpid()}
        files.unlink_if_there(self._holder)
        descriptor = files.system.open_new(self._holder)
        try:
            files.write_at(descriptor, json.dumps(own).encode(), 0)
        finally:
            files.system.close(descriptor)

    def _left_behind(self) -> str:
        """A warning about a note without a lock."""
        holder = self._read_holder()
        if self._lock.is_locked and (holder is None or holder[1] == socket.gethostname()):
            return f"{self._named_holder()} died without releasing it; taken over"
        what = f"{self._named_holder()} has not released it, and holds no lock that can be seen here; taken over: "
        return what + "make sure that it is not running any more"

    def _read_holder(self) -> tuple[int, str] | None:
        """Process and host of the note; None if it cannot be read."""
        try:
            holder = json.loads(read_small_file(self._holder, MOST_HOLDER_BYTES))
            return int(holder["process"]), str(holder["host"])
        except (FileFormatError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def _named_holder(self) -> str:
        holder = self._read_holder()
        if holder is None:
            return "another process"
        process, host = holder
        if holder == (os.getpid(), socket.gethostname()):
            return f"another tracker of this process ({process})"
        return f"process {process} on {printable(host[:80])}"


def _clear(holder: Path, process: int) -> bool:
    """Empty the note of a holder; not in a child that was forked from it. Returns whether it was this process's.

    A forgotten lock is cleared whenever the garbage collector runs, also while the directory is being deleted: that
    fails if a name in it goes away meanwhile, so the name stays.
    """
    if is_own := os.getpid() == process:
        with suppress(OSError):
            os.truncate(holder, 0)
    return is_own
