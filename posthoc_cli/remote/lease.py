"""The lease of a run in a store: an object next to the snapshots that names the run's one writer, who renews it.

It is written by conditional put only, and is emptied when it is released, not deleted. Expiry is judged by the times
that the store reports, since the clock of a machine may be wrong.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from posthoc_cli.errors import LockedError, RemoteError, printable
from posthoc_cli.remote import store
from posthoc_cli.remote.store import ObjectInfo, RemotePath

NAME = ".ema.lease"

SECONDS = 60.0
"""Time after which a lease expires unless it is renewed; renewal is attempted three times within it."""

_MOST_BYTES = 10_000


class Lease:
    """The exclusive right to write to a run in a store, from construction until `release`.

    Arguments:
        run: the folder of the snapshots.
        token: text that identifies the holder; a lease with the same token is taken over at once.

    Raises:
        LockedError: another process holds the lease.
        RemoteError: the store refuses the request, or has no conditional put.
    """

    def __init__(self, run: RemotePath, token: str) -> None:
        self._run, self._token, self._url, self._expiry = run, token, str(run / NAME), 0.0
        self._renewal, self._released = threading.Lock(), threading.Event()
        self._info = self._replaceable()
        self._check_store()
        self.renew()
        # The thread holds no reference to the lease, which expires when its tracker is garbage-collected.
        weakref.finalize(self, self._released.set).atexit = False
        threading.Thread(target=_renew, args=(weakref.ref(self), self._released), name="ema-lease", daemon=True).start()

    def check(self) -> None:
        """Raise a LockedError if another process has taken over the lease, a RemoteError if the store cannot say."""
        if time.monotonic() > self._expiry:
            self.renew()

    def renew(self) -> None:
        """Extend the lease by `SECONDS`; errors as of `check`."""
        with self._renewal:
            began = time.monotonic()
            try:
                self._info = self._put(self._info)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                self._info = self._still_held()
            self._expiry = began + SECONDS

    def release(self) -> None:
        """Let another process take the lease at once."""
        if not self._released.is_set():
            self._released.set()
            with self._renewal, suppress(OSError):
                store.put(self._url, b"{}", replaces=self._info)

    def _replaceable(self) -> ObjectInfo:
        """Return the lease object that may be replaced: a new one, an expired one, or one with the same token."""
        with suppress(FileExistsError):
            return self._put()
        info, note = self._read()
        if note.get("token", "") not in ("", self._token) and self._store_time() < info.modified + SECONDS + 1:
            raise self._refusal(note)
        return info

    def _still_held(self) -> ObjectInfo:
        """Return the object in the store if this process wrote it: the answer to its last request may be lost."""
        try:
            info, note = self._read()
        except FileNotFoundError:
            info, note = ObjectInfo(0), {}
        if note.get("token") != self._token:
            self._expiry = 0.0
            raise self._refusal(note)
        return info

    def _check_store(self) -> None:
        """Raise a RemoteError if the store ignores the conditions of a conditional put."""
        for info in (None, self._info._replace(tag='"0"', version="0" * bool(self._info.version))):
            try:
                self._put(info)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ESTALE):
                    raise
            else:
                raise self._unconditional()

    def _put(self, replaces: ObjectInfo | None = None) -> ObjectInfo:
        """Write a note that names this process: a new object, or in place of a known one."""
        # Random text makes each note different, and so its tag.
        holder = {"token": self._token, "host": socket.gethostname(), "process": os.getpid()}
        note = json.dumps(holder | {"note": secrets.token_hex(8)}).encode()
        try:
            return store.repeated(lambda: store.put(self._url, note, replaces=replaces))
        except RemoteError as error:
            if error.errno == errno.ENOTSUP:
                raise self._unconditional() from error
            raise

    def _unconditional(self) -> RemoteError:
        reason = "the store has no conditional put, by which a run has one writer only"
        return RemoteError(self._run, reason, "set EMA_LEASE=off if nothing else writes there", errno=errno.ENOTSUP)

    def _read(self) -> tuple[ObjectInfo, dict[str, str]]:
        """Return the lease object and its note; an unreadable note has an unknown token."""
        data, info = store.get(self._url, 0, _MOST_BYTES)
        with suppress(ValueError, RecursionError):
            note = json.loads(bytes(data))
            if isinstance(note, dict):
                return info, {str(key): str(value) for key, value in note.items()}
        return info, {"token": "unknown"}

    def _store_time(self) -> float:
        """Return the time of the store's clock, in seconds since 1970."""
        probe = f"{self._url}.{self._token}"
        store.put(probe, b"", create=False)
        try:
            return store.head(probe).modified
        finally:
            store.delete(probe)

    def _refusal(self, note: dict[str, str]) -> LockedError:
        holder = f"process {note.get('process', '?')} on {note.get('host', '?')}"
        reason = f"{printable(holder[:100])} is writing here" if "host" in note else "another process has taken the run"
        hint = f"close that tracker, or take another URL; the lease of a killed process expires after {SECONDS:g} s"
        return LockedError(self._run, reason, hint)


def is_off() -> bool:
    """Return whether the user has declined leases: nothing else writes to the run."""
    return os.environ.get("EMA_LEASE") == "off"


@contextmanager
def held(run: Path) -> Iterator[Callable[[], None]]:
    """Hold the lease of a run for the block, and yield its `check`; errors as of `Lease`."""
    if is_off():
        yield lambda: None
        return
    lease = Lease(store.remote_path(str(run)), secrets.token_hex(16))
    try:
        yield lease.check
    finally:
        lease.release()


def _renew(lease: weakref.ref[Lease], released: threading.Event) -> None:
    """Renew a lease until it is released or garbage-collected."""
    while not released.wait(SECONDS / 3):
        held_lease = lease()
        if held_lease is None:
            return
        with suppress(OSError, LockedError):  # the next call of `check` raises it
            held_lease.renew()
        del held_lease
