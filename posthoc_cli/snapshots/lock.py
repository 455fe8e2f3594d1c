"""One writer a directory. The system frees the lock when its holder dies, however it dies."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import filelock

from posthoc_cli import files
from posthoc_cli.errors import LockedError

LOCK_NAME = ".ema.lock"
HOLDER_NAME = ".ema.lock.holder"


class DirectoryLock:
    """The right to write to a directory; taken when made, given back by `release` or the process's end."""

    def __init__(self, directory: Path) -> None:
        self._holder = directory / HOLDER_NAME
        with files.reported_as_write_error(directory):
            self._lock = filelock.FileLock(directory / LOCK_NAME, blocking=False, is_singleton=False)
            try:
                self._lock.acquire()
            except filelock.Timeout:
                raise LockedError(
                    f"{directory}: {self._named_holder()} is writing here; close that tracker, "
                    "or take another directory"
                ) from None
            try:
                self._holder.write_text(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
            except BaseException:
                self.release()
                raise

    def release(self) -> None:
        """Give the lock back."""
        if self._lock.is_locked:
            self._holder.unlink(missing_ok=True)
            self._lock.release()

    def _named_holder(self) -> str:
        try:
            holder = json.loads(self._holder.read_text())
            process, host = int(holder["process"]), str(holder["host"])
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"
        if process == os.getpid() and host == socket.gethostname():
            return f"another tracker of this process ({process})"
        return f"process {process} on {host}"
