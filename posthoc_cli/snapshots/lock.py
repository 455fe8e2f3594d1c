"""One writer a directory. The system frees the lock when its holder dies, however it dies.

The lock is `flock`: of the local file system, or of a network file system that passes it on to its server. Where the
file system has no locks, or a mount keeps them to one host, nothing can keep a second writer out; a warning says so as
far as that can be told. Beside the lock lies a note of who holds it, for people.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import filelock

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, LockedError, printable
from posthoc_cli.snapshots.reader import read_small_file

log = logging.getLogger(__name__)

LOCK_NAME = ".ema.lock"
HOLDER_NAME = ".ema.lock.holder"
MOST_HOLDER_BYTES = 10_000

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What `flock` fails with on a file system without locks."""


class DirectoryLock:
    """The right to write to a directory; taken when made, given back by `release` or the process's end."""

    def __init__(self, directory: Path) -> None:
        self._holder = directory / HOLDER_NAME
        self._forget: Callable[[], object] = lambda: None
        with files.reported_as_write_error(directory):
            # Not filelock's own substitute, a file that is there or not: after a crash it would be there for good.
            self._lock = filelock.FileLock(
                directory / LOCK_NAME, blocking=False, is_singleton=False, fallback_to_soft=False
            )
            try:
                self._lock.acquire()
            except filelock.Timeout:
                raise LockedError(
                    directory,
                    f"{self._named_holder()} is writing here",
                    "close that tracker, or take another directory",
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                log.warning(
                    "%s: this file system has no locks (%s): nothing keeps a second writer out; see that there is none",
                    directory,
                    (error.strerror or str(error)).lower(),
                )
            try:
                if self._holder.exists():
                    log.warning("%s: %s", directory, self._left_behind())
                self._note_holder()
                # Also where nobody releases it: at the end of the process, or of all references.
                self._forget = weakref.finalize(self, _forget, self._holder, os.getpid())
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Give the lock back."""
        self._forget()
        if self._lock.is_locked:
            self._lock.release()

    def _note_holder(self) -> None:
        """Say who holds the lock; for people only, so that nothing rests on its being whole."""
        own = {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}
        files.unlink_if_there(self._holder)
        descriptor = files.system.open_new(self._holder)
        try:
            files.write_at(descriptor, json.dumps(own).encode(), 0)
        finally:
            files.system.close(descriptor)

    def _left_behind(self) -> str:
        """What to say of a note that no lock belongs to."""
        holder = self._read_holder()
        if self._lock.is_locked and (holder is None or holder[1] == socket.gethostname()):
            return f"{self._named_holder()} died without giving it free; taken over"
        return (
            f"{self._named_holder()} has not given it free, and holds no lock that can be seen here; taken over: "
            "see that it is not running any more"
        )

    def _read_holder(self) -> tuple[int, str, float] | None:
        """Process, host and time of the note; None where it cannot be read."""
        try:
            holder = json.loads(read_small_file(self._holder, MOST_HOLDER_BYTES))
            return int(holder["process"]), str(holder["host"]), float(holder["since"])
        except (FileFormatError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def _named_holder(self) -> str:
        holder = self._read_holder()
        if holder is None:
            return "another process"
        process, host, since = holder
        age = f"lock taken {_age(time.time() - since)} ago" if math.isfinite(since) else "lock taken at no known time"
        if process == os.getpid() and host == socket.gethostname():
            return f"another tracker of this process ({process}, {age})"
        return f"process {process} on {printable(host[:80])} ({age})"


def _forget(holder: Path, process: int) -> None:
    """Remove the note of a holder; not in a child that was forked from it."""
    if os.getpid() == process:
        with suppress(OSError):
            files.unlink_if_there(holder)


def _age(seconds: float) -> str:
    """A time span in words; below 0 where the clocks of two hosts differ."""
    for unit, length in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
