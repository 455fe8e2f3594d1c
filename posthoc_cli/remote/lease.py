"""One writer of a run in a store: an object beside the snapshots names the holder, who renews it.

It is written by conditional put only, and stays when it is released. Times that are compared are those that the store
gives: the clock of a machine may be wrong.
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
from contextlib import suppress

from posthoc_cli.errors import LockedError, RemoteError, printable
from posthoc_cli.remote import store
from posthoc_cli.remote.store import Known, RemotePath

NAME = ".ema.lease"

SECONDS = 60.0
"""How long a lease holds unless it is renewed, which is tried three times in that time."""

_MOST_BYTES = 10_000


class Lease:
    """The right to write to a run in a store, from construction until `release`.

    Arguments:
        run: where the snapshots are.
        token: what tells this holder from all others; an earlier one with this token has ended.

    Raises:
        LockedError: another process holds it.
        RemoteError: the store refuses, or has no conditional put.
    """

    def __init__(self, run: RemotePath, token: str) -> None:
        self._run, self._token, self._url, self._until = run, token, str(run / NAME), 0.0
        self._one_at_a_time, self._released = threading.Lock(), threading.Event()
        self._known = self._free()
        self._check_store()
        self.renew()
        # The thread has no part in the lease's life: of a tracker that is forgotten the lease runs out.
        weakref.finalize(self, self._released.set).atexit = False
        kept = weakref.ref(self), self._released
        threading.Thread(target=_keep, args=kept, name="ema-lease", daemon=True).start()

    def check(self) -> None:
        """Raise a LockedError if another process has taken it over; a RemoteError if that cannot be known."""
        if time.monotonic() > self._until:
            self.renew()

    def renew(self) -> None:
        """Hold it for longer; raises as `check`."""
        with self._one_at_a_time:
            began = time.monotonic()
            try:
                self._known = self._put(self._known)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
                self._known = self._still_own()
            self._until = began + SECONDS

    def release(self) -> None:
        """Let another writer in."""
        if not self._released.is_set():
            self._released.set()
            with self._one_at_a_time, suppress(OSError):
                store.put(self._url, b"{}", replaces=self._known)

    def _free(self) -> Known:
        """What is to be replaced: a note that was not there, that has expired, or that is of this token."""
        with suppress(FileExistsError):
            return self._put()
        known, note = self._read()
        if note.get("token", "") not in ("", self._token) and self._store_time() < known.modified + SECONDS + 1:
            raise self._refusal(note)
        return known

    def _still_own(self) -> Known:
        """What the store has of the lease where an answer was lost, but the request was done."""
        try:
            known, note = self._read()
        except FileNotFoundError:
            known, note = Known(0), {}
        if note.get("token") != self._token:
            self._until = 0.0
            raise self._refusal(note)
        return known

    def _check_store(self) -> None:
        """Raise a RemoteError where the store takes no notice of conditions."""
        for known in (None, self._known._replace(tag='"0"', version="0" * bool(self._known.version))):
            try:
                self._put(known)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ESTALE):
                    raise
            else:
                raise self._unconditional()

    def _put(self, replaces: Known | None = None) -> Known:
        """Write the note where there is none, or in place of a known one."""
        try:
            return store.repeated(lambda: store.put(self._url, self._note(), replaces=replaces))
        except RemoteError as error:
            if error.errno == errno.ENOTSUP:
                raise self._unconditional() from error
            raise

    def _unconditional(self) -> RemoteError:
        reason = "the store has no conditional put, by which a run has one writer only"
        return RemoteError(self._run, reason, "set EMA_LEASE=off if nothing else writes there", errno=errno.ENOTSUP)

    def _read(self) -> tuple[Known, dict[str, str]]:
        """The object, and what its holder says; nothing where that is no such note."""
        data, known = store.get(self._url, 0, _MOST_BYTES)
        with suppress(ValueError, RecursionError):
            note = json.loads(bytes(data))
            if isinstance(note, dict):
                return known, {str(key): str(value) for key, value in note.items()}
        return known, {"token": "unknown"}

    def _note(self) -> bytes:
        """What the object holds; different at each time, and so is its tag."""
        own = {"token": self._token, "host": socket.gethostname(), "process": os.getpid(), "note": secrets.token_hex(8)}
        return json.dumps(own).encode()

    def _store_time(self) -> float:
        """What the store's clock says."""
        probe = f"{self._url}.{self._token}"
        store.put(probe, b"", create=False)
        try:
            return store.head(probe).modified
        finally:
            store.delete(probe)

    def _refusal(self, note: dict[str, str]) -> LockedError:
        named = f"process {note.get('process', '?')} on {note.get('host', '?')}"
        what = f"{printable(named[:100])} is writing here" if "host" in note else "another process has taken the run"
        hint = f"close that tracker, or take another URL; what it holds ends {SECONDS:g} s after it was killed"
        return LockedError(self._run, what, hint)


def _keep(lease: weakref.ref[Lease], released: threading.Event) -> None:
    """Renew a lease until it is released."""
    while not released.wait(SECONDS / 3):
        held = lease()
        if held is None:
            return
        with suppress(OSError, LockedError):  # the next check says so
            held.renew()
        del held
