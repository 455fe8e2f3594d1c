"""The spool: the folder of this machine through which a tracker writes a run to a store.

The tracker writes, reads and deletes as in a directory. Each file is durable in the spool, under its name in the run,
before its upload begins. `Spool.sync` uploads each file complete or not at all, then deletes from the spool the files
that are no longer needed. The newest snapshots stay until later ones replace them: the next ones are measured against
them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path, PosixPath
from typing import Any

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, LockedError, RemoteError, WriteError
from posthoc_cli.remote import lease, store
from posthoc_cli.remote.store import RemotePath
from posthoc_cli.snapshots.directory import SUPERSEDED, find_snapshots
from posthoc_cli.snapshots.format import SUFFIX, FileHeader, SnapshotInfo
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.tensor_file import read_header
from posthoc_cli.snapshots.writer import DirectoryLock

log = logging.getLogger(__name__)

_TOKEN_NAME = ".ema.spool"
"""A file with the lease's token for this spool: the process that holds the spool's lock has the lease."""

_renaming = threading.Lock()
"""Held while a file in a spool is renamed, or deleted because it was uploaded."""

_pending_deletions: dict[SpooledPath, None] = {}
"""Paths that were deleted here, and are yet to be deleted from the store."""


class SpooledPath(RemotePath):
    """A path of a run in a store that is written on this machine; a file in the spool precedes the object.

    Names that begin with a dot exist in the spool only.
    """

    is_spooled = True

    def __str__(self) -> str:
        """Return the URL."""
        return re.sub(f"^.*?/({'|'.join(files.STORES)})/", r"\1//", PosixPath.__str__(self), count=1)

    def __fspath__(self) -> str:
        """Return the name of the file in the spool."""
        return PosixPath.__str__(self)

    @property
    def local(self) -> Path:
        """The path of the file in the spool."""
        return Path(os.fspath(self))

    def is_file(self, **_: Any) -> bool:
        """Return whether the path is a file in the spool or an object."""
        return self.local.is_file() or (self._may_be_stored and super().is_file())

    def is_dir(self, **_: Any) -> bool:
        """Return whether the path is a folder in the spool, or objects lie below it."""
        if os.path.lexists(self) or self.suffix == SUFFIX:
            return self.local.is_dir()
        return self._may_be_stored and super().is_dir()

    def exists(self, **_: Any) -> bool:
        """Return whether the path exists in the spool or in the store."""
        return os.path.lexists(self) or (self._may_be_stored and super().exists())

    def stat(self, **_: Any) -> os.stat_result:
        """Return the status of the file in the spool, or else of the object."""
        try:
            return self.local.stat()
        except FileNotFoundError:
            if not self._may_be_stored:
                raise
            return super().stat()

    def iterdir(self) -> Generator[SpooledPath, None, None]:
        """Yield the paths in the folder, in the spool or in the store."""
        local: list[str] = []
        stored: dict[str, RemotePath] = {}
        with suppress(FileNotFoundError):
            local = [path.name for path in self.local.iterdir()]
        try:
            stored = {child.name: child for child in RemotePath(str(self)).iterdir()}
        except FileNotFoundError:
            if not self.local.is_dir():
                raise
        for name in {*local, *stored}:
            child = self / name
            if name in stored:
                child.info, child._is_known_folder = stored[name].info, stored[name]._is_known_folder
            if name in local or child._may_be_stored:
                yield child

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete the file in the spool now, and the object after the next uploads."""
        if may_be_stored := self._may_be_stored:
            _pending_deletions[self] = None
        self.local.unlink(missing_ok or may_be_stored)

    def rmdir(self) -> None:
        """Delete the empty folder in the spool."""
        self.local.rmdir()

    def replace(self, target: Any) -> Any:
        """Move the file or folder in the spool and in the store."""
        with _renaming:
            if os.path.lexists(self) or not self._may_be_stored:
                self.local.replace(target)
        stored = RemotePath(str(self))
        if self._may_be_stored and stored.exists():
            stored.replace(RemotePath(str(target)))
        return target

    @property
    def _may_be_stored(self) -> bool:
        """Whether the store may have the path."""
        return not self.name.startswith(".") and files.is_url(self) and self not in _pending_deletions


def spooled(path: Path) -> SpooledPath:
    """Return the path of a run for a tracker, and make its folder in the spool.

    The spool is the environment variable `EMA_SPOOL`, since it belongs to the machine, as TMPDIR does, and all
    processes of a training share it; without the variable it is in the user's folder for caches.
    """
    files.check_writable("checkpoint_dir", path)
    scheme, _, rest = str(path).partition("://")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    base = Path(os.environ.get("EMA_SPOOL") or f"{caches}/posthoc-ema").expanduser().absolute()
    endpoint = hashlib.sha256(store.endpoint().encode()).hexdigest()[:8]
    run = SpooledPath(base, endpoint, f"{scheme}:", rest)
    try:
        files.make_directory(run.local)
    except OSError as error:
        reason = f"cannot be made, for what is uploaded to {run}: {(error.strerror or str(error)).lower()}"
        raise WriteError(run.local, reason, "set EMA_SPOOL to a folder of this machine", errno=error.errno) from error
    return run


class Spool:
    """Uploads the files of a run that a tracker writes; holds the run's lease until `close`.

    Arguments:
        directory: the run.
        part: the part of each snapshot that this process writes, and their number; None for complete snapshots.
        leads: whether this process takes the lease, as one process of a training does.

    Attributes:
        kept: uploaded files that stay in the spool.
        is_due: whether a `sync` was scheduled that has not begun.

    Raises:
        LockedError, RemoteError: see `Lease`.
    """

    def __init__(self, directory: SpooledPath, part: tuple[int, int] | None = None, leads: bool = True) -> None:
        self.kept: frozenset[Path] = frozenset()
        self.is_due = False
        self._directory = directory
        self._prefix = "" if part is None else f"part-{part[0]:05d}-of-"
        self._lease = _lease(directory) if leads and not lease.is_off() else None
        self._uploaded: dict[SpooledPath, _Stamp] = {}
        self._has_warned, self._process = False, os.getpid()

    @property
    def waiting(self) -> list[SpooledPath]:
        """Files of this process that are not uploaded, the oldest first."""
        return [path for path in _files(self._directory, self._prefix) if self._uploaded.get(path) != _stamp(path)]

    def sync(self, must: bool = False) -> None:
        """Upload all waiting files, then delete from the store what was deleted here, and from the spool the rest.

        A failure of the store or the network is logged once and retried by the next call; with `must` it raises a
        WriteError. Raise a LockedError if another process has taken over the run.
        """
        self.is_due = False
        try:
            deletions = self._upload_waiting()
            while deletions is None:
                deletions = self._upload_waiting()
            for path in deletions:
                self._check_lease()
                if not os.path.lexists(path):  # else it was written again
                    store.delete(str(path))
                del _pending_deletions[path]
        except LockedError:
            raise
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror or str(error)
            reason += f"; {error.hint}" if isinstance(error, RemoteError) and error.hint else ""
            hint = f"they are kept in {self._directory.local}, and uploaded later, or by the next tracker of this run"
            failure = WriteError(self._directory, f"snapshots are not uploaded: {reason}", hint, errno=error.errno)
            has_warned, self._has_warned = self._has_warned, True
            if must:
                raise failure from error
            if not has_warned:
                log.warning("%s", failure)
        else:
            self._has_warned = False
        for path in [path for path in self._uploaded if path not in self.kept]:
            _drop(path, self._uploaded.pop(path))

    def has_room(self) -> bool:
        """Return whether the waiting files take no more than what is free on the spool's disk."""
        files.make_directory(self._directory.local)  # again, where a cache was cleared
        nbytes = sum(size for path in self.waiting for size in _stamp(path)[2:])
        return nbytes <= shutil.disk_usage(self._directory.local).free

    def close(self) -> None:
        """Release the lease; do nothing in a forked process."""
        if self._process != os.getpid():
            return
        for path in self._own_deletions():
            del _pending_deletions[path]
        if self._lease is not None:
            self._lease.release()

    def _upload_waiting(self) -> list[SpooledPath] | None:
        """Upload the waiting files; return the paths deleted before, whose replacements are now all in the store.

        Return None if thinning has deleted a waiting file: the replacements of those paths may have come since.
        """
        deletions, is_complete = self._own_deletions(), True
        for path in self.waiting:
            self._check_lease()
            stamp = _stamp(path)
            if _upload(path):
                self._uploaded[path] = stamp
                log.info("uploaded %s", path)
            else:
                is_complete = False
        return deletions if is_complete else None

    def _own_deletions(self) -> list[SpooledPath]:
        return [path for path in [*_pending_deletions] if path.is_relative_to(self._directory)]

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()


def hold(directory: SpooledPath) -> Callable[[], None]:
    """Take the lease of a run, unless a tracker of this machine has it, and return what releases it."""
    try:
        lock = DirectoryLock(directory)
    except LockedError:
        return lambda: None
    with lock:
        return Spool(directory).close


def finish(directory: SpooledPath, leads: bool = True) -> None:
    """Upload the files that an earlier tracker has left in the spool, unless another tracker of this machine does so.

    Files are set aside if the run was continued elsewhere since: they belong to another attempt.

    Arguments:
        leads: whether to take the lease; else another process of this training has it.

    Raises:
        LockedError: a process of another machine writes to the run.
        RemoteError, WriteError: the store cannot be read, or written to.
        FileFormatError, MismatchError: of the snapshots in the store.
    """
    if not _files(directory):
        return
    try:
        lock = DirectoryLock(directory)
    except LockedError:
        return
    with lock:
        spool = Spool(directory, leads=leads)
        try:
            stored = find_snapshots(RemotePath(str(directory)))
            foreign = [path for path in spool.waiting if stored and _is_foreign(path, directory, stored[-1].info)]
            for path in foreign:
                aside = directory / SUPERSEDED / f"{path.stem}.{secrets.token_hex(4)}{path.suffix}"
                files.make_directory(aside.parent)
                path.local.replace(aside)
            if foreign:
                what = "%s: the run was continued elsewhere; %d earlier files in the spool, such as %s, are set aside"
                log.warning(what, directory, len(foreign), foreign[0].name)
            spool.sync(must=True)
        finally:
            spool.close()


def _is_foreign(path: SpooledPath, run: Path, newest: SnapshotInfo) -> bool:
    """Return whether a file in the spool is of another attempt or run than the newest snapshot in the store."""
    header, stored = read_header(path), _stored_header(path)
    if path.is_relative_to(run / SUPERSEDED) or header == stored:
        return False
    value = header.metadata.get
    if value("ema.run_id") != newest.run_id or float(value("ema.t", value("ema.averages_t", "0"))) < newest.t:
        return True
    # A state, or a snapshot off the schedule, is replaced by a later one.
    return stored is not None and file_kind(header) == "snapshot" and "ema.off_schedule" not in stored.metadata


# --- files of a spool


_Stamp = tuple[int, ...]


def _stamp(path: SpooledPath) -> _Stamp:
    """Return the inode, time and size of a file, which tell it from another file of its name; empty without a file."""
    with suppress(FileNotFoundError):
        status = path.local.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return ()


def _files(directory: SpooledPath, prefix: str = "") -> list[SpooledPath]:
    """Return the safetensors files in a spool whose names begin with `prefix`, in order of time."""
    paths = []
    for folder, _, names in os.walk(directory.local):
        inside = directory / Path(folder).relative_to(directory.local)
        paths += [inside / n for n in names if n.endswith(SUFFIX) and n.startswith(prefix) and not n.startswith(".")]
    return sorted(paths)


def _drop(path: SpooledPath, stamp: _Stamp) -> None:
    """Delete a file from the spool, unless it was replaced since."""
    with _renaming:
        if stamp and _stamp(path) == stamp:
            path.local.unlink()


def _upload(path: SpooledPath) -> bool:
    """Upload a file, in place of an older one of its name; return False if it was deleted meanwhile."""
    url, is_conditional = str(path), not lease.is_off()
    try:
        if not is_conditional and RemotePath(url).is_file():
            raise FileExistsError
        store.repeated(lambda: store.put(url, path.local, create=is_conditional))
    except FileExistsError:
        if read_header(path) != _stored_header(path):
            store.put(url, path.local, create=False)
    except FileNotFoundError:
        if os.path.lexists(path):
            raise
        return False
    return True


def _stored_header(path: SpooledPath) -> FileHeader | None:
    """Return the header of the object, which has checksums of all its content; None without an object."""
    with suppress(FileFormatError):
        return read_header(RemotePath(str(path)))
    return None


def _lease(directory: SpooledPath) -> lease.Lease:
    """Take the lease of a run with the token of its spool, as the holder of the spool's lock."""
    place = directory.local / _TOKEN_NAME
    if not place.is_file():
        files.write_atomically(place, secrets.token_hex(16).encode())
    return lease.Lease(RemotePath(str(directory)), place.read_text())
