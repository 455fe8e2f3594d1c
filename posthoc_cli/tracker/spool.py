"""A run in a store while a tracker writes it: through a spool, a folder of this machine.

The tracker writes, reads and removes as in a directory. What it writes is durable in the spool, under the same names,
before anything is sent. `Spool.sync` uploads it, each file complete or not at all, then removes what no longer has to
be there. The newest snapshots stay until others have taken their place: the next ones are measured against them.
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
from posthoc_cli.errors import FileFormatError, InvalidValueError, LockedError, RemoteError, WriteError
from posthoc_cli.remote import store
from posthoc_cli.remote.lease import Lease
from posthoc_cli.remote.store import RemotePath
from posthoc_cli.snapshots.directory import SUPERSEDED, find_snapshots
from posthoc_cli.snapshots.format import SUFFIX, FileHeader, SnapshotInfo
from posthoc_cli.snapshots.headers import file_kind
from posthoc_cli.snapshots.tensor_file import read_header
from posthoc_cli.snapshots.writer import DirectoryLock

log = logging.getLogger(__name__)

STORES = ("s3", "gs", "az")

_TOKEN = ".ema.spool"
"""A file with what tells this spool from others: of the processes with one, the holder of the lock has the lease."""

_names = threading.Lock()
"""Held while a name in a spool is given to another file, or removed because the file was uploaded."""

_gone: dict[SpooledPath, None] = {}
"""What was removed, and is to be removed from the store."""


class SpooledPath(RemotePath):
    """A path of a run in a store that is written here: what is in the spool is there for the system, too.

    Names that begin with a dot are in the spool only.
    """

    is_spooled = True

    def __str__(self) -> str:
        """The URL."""
        return re.sub(f"^.*?/({'|'.join(STORES)}):/", r"\1://", PosixPath.__str__(self), count=1)

    def __fspath__(self) -> str:
        """The name in the spool."""
        return PosixPath.__str__(self)

    @property
    def here(self) -> Path:
        """The file in the spool."""
        return Path(os.fspath(self))

    def is_symlink(self) -> bool:
        """Whether it is one in the spool."""
        return self.here.is_symlink()

    def is_file(self, **_: Any) -> bool:
        """Whether it is a file in the spool or an object."""
        return self.here.is_file() or (self._is_asked and super().is_file())

    def is_dir(self, **_: Any) -> bool:
        """Whether it is a folder in the spool, or an object is below it."""
        if os.path.lexists(self) or self.suffix == SUFFIX:
            return self.here.is_dir()
        return self._is_asked and super().is_dir()

    def exists(self, **_: Any) -> bool:
        """Whether it is in the spool or in the store."""
        return os.path.lexists(self) or (self._is_asked and super().exists())

    def stat(self, **_: Any) -> os.stat_result:
        """Of the file in the spool, or else of the object."""
        try:
            return self.here.stat()
        except FileNotFoundError:
            if not self._is_asked:
                raise
            return super().stat()

    def iterdir(self) -> Generator[SpooledPath, None, None]:
        """What is in the folder here or in the store."""
        here: list[str] = []
        there: dict[str, RemotePath] = {}
        with suppress(FileNotFoundError):
            here = [path.name for path in self.here.iterdir()]
        try:
            there = {child.name: child for child in RemotePath(str(self)).iterdir()}
        except FileNotFoundError:
            if not self.here.is_dir():
                raise
        for name in {*here, *there}:
            child = self / name
            if name in there:
                child.known, child._is_listed = there[name].known, True
            if name in here or child._is_asked:
                yield child

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove it here now; from the store when everything written before is there."""
        if is_asked := self._is_asked:
            _gone[self] = None
        self.here.unlink(missing_ok or is_asked)

    def replace(self, target: Any) -> Any:
        """Give it another name, also in the store."""
        with _names:
            if os.path.lexists(self) or not self._is_asked:
                self.here.replace(target)
        pairs: list[tuple[Path, Path]] = []
        if self._is_asked:
            try:
                pairs = [(child, target / child.name) for child in RemotePath(str(self)).iterdir()]
            except NotADirectoryError:
                pairs = [(self, target)]
            except FileNotFoundError:
                return target
        for old, new in pairs:
            if not os.path.lexists(new):  # else it is uploaded from here
                store.copy(str(old), str(new))
            store.delete(str(old))
        return target

    @property
    def _is_asked(self) -> bool:
        """Whether it can be in the store."""
        return not self.name.startswith(".") and files.is_url(self) and self not in _gone


def spooled(path: Path) -> SpooledPath:
    """The same path for a tracker, with a folder in the spool.

    That is `EMA_SPOOL`, an environment variable: it belongs to the machine, like a disk for temporary files, and all
    processes of a training share it. Without it the user's folder for caches is taken.
    """
    scheme, _, rest = str(path).partition("://")
    if scheme not in STORES:
        known = ", ".join(f"{name}://" for name in STORES)
        raise InvalidValueError("checkpoint_dir", f"must be a directory, or begin with {known}", value=path)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    base = Path(os.environ.get("EMA_SPOOL") or f"{caches}/posthoc-ema").expanduser().absolute()
    endpoint = hashlib.sha256(store.endpoint().encode()).hexdigest()[:8]
    made = SpooledPath(base, endpoint, f"{scheme}:", rest)
    try:
        files.make_directory(made.here)
    except OSError as error:
        reason = f"cannot be made, for what is uploaded to {made}: {(error.strerror or str(error)).lower()}"
        raise WriteError(made.here, reason, "set EMA_SPOOL to a folder of this machine", errno=error.errno) from error
    return made


class Spool:
    """Uploads what a tracker writes to a run, whose one writer it is until `close`.

    Arguments:
        directory: the run.
        part: of snapshots of several processes the part that this one writes; the first process has the lease.

    Attributes:
        kept: uploaded files that stay in the spool.
        is_due: whether a `sync` was asked for that has not begun.

    Raises:
        LockedError, RemoteError: see `Lease`.
    """

    def __init__(self, directory: SpooledPath, part: tuple[int, int] | None = None, leads: bool = True) -> None:
        self.kept: frozenset[Path] = frozenset()
        self.is_due = False
        self._directory = directory
        self._own = "" if part is None else f"part-{part[0]:05d}-of-"
        self._is_conditional = os.environ.get("EMA_LEASE") != "off"
        self._lease = _lease(directory) if leads and self._is_conditional else None
        self._uploaded: dict[SpooledPath, _Stamp] = {}
        self._is_told, self._process = False, os.getpid()

    @property
    def waiting(self) -> list[SpooledPath]:
        """Files of this process that are not uploaded, the oldest first."""
        return [path for path in _files(self._directory, self._own) if self._uploaded.get(path) != _stamp(path)]

    def sync(self, must: bool = False) -> None:
        """Upload what waits, then remove from the store what is gone, and from the spool what is not kept.

        What fails for the store's or the network's reasons is left for the next call, with one warning; with `must` it
        is a WriteError. A LockedError if another process has taken the run.
        """
        self.is_due = False
        try:
            gone = self._upload_waiting()
            while gone is None:
                gone = self._upload_waiting()
            for path in gone:
                self._check_lease()
                if not os.path.lexists(path):  # else it was written again
                    store.delete(str(path))
                del _gone[path]
        except LockedError:
            raise
        except OSError as error:
            reason = getattr(error, "reason", None) or error.strerror or str(error)
            reason += f"; {error.hint}" if isinstance(error, RemoteError) and error.hint else ""
            hint = f"they are kept in {self._directory.here}, and uploaded later, or by the next tracker of this run"
            failure = WriteError(self._directory, f"snapshots are not uploaded: {reason}", hint, errno=error.errno)
            is_told, self._is_told = self._is_told, True
            if must:
                raise failure from error
            if not is_told:
                log.warning("%s", failure)
        else:
            self._is_told = False
        for path in [path for path in self._uploaded if path not in self.kept]:
            _drop(path, self._uploaded.pop(path))

    def has_room(self) -> bool:
        """Whether what waits takes no more than what is free on the spool's disk."""
        files.make_directory(self._directory.here)  # again, where a cache was cleared
        waits = sum(size for path in self.waiting for size in _stamp(path)[2:])
        return waits <= shutil.disk_usage(self._directory.here).free

    def close(self) -> None:
        """Let another writer in; of a forked process nothing."""
        if self._process != os.getpid():
            return
        for path in self._removed():
            del _gone[path]
        if self._lease is not None:
            self._lease.release()

    def _upload_waiting(self) -> list[SpooledPath] | None:
        """Upload what waits; returns what was gone before: all that has taken its place is in the store.

        None where thinning has removed some of that: what has taken the place of these may have come since.
        """
        gone, is_whole = self._removed(), True
        for path in self.waiting:
            self._check_lease()
            stamp = _stamp(path)
            if _upload(path, self._is_conditional):
                self._uploaded[path] = stamp
                log.info("uploaded %s", path)
            else:
                is_whole = False
        return gone if is_whole else None

    def _removed(self) -> list[SpooledPath]:
        return [path for path in [*_gone] if path.is_relative_to(self._directory)]

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
    """Upload what an earlier tracker has left in the spool, unless one of this machine is at it.

    Without `leads` under the lease of another process.

    Where the run has gone on elsewhere since, what is left is of another attempt, and is set aside.

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
            there = find_snapshots(RemotePath(str(directory)))
            others = [path for path in spool.waiting if there and _is_of_another(path, directory, there[-1].info)]
            for path in others:
                aside = directory / SUPERSEDED / f"{path.stem}.{secrets.token_hex(4)}{path.suffix}"
                files.make_directory(aside.parent)
                path.here.replace(aside)
            if others:
                what = "%s: has gone on elsewhere since %d files, as %s, were written to the spool: they are set aside"
                log.warning(what, directory, len(others), others[0].name)
            spool.sync(must=True)
        finally:
            spool.close()


def _is_of_another(path: SpooledPath, run: Path, newest: SnapshotInfo) -> bool:
    """Whether a file that was left is of another attempt, or run, than the newest snapshot in the store."""
    own, there = read_header(path), _stored_header(path)
    if path.is_relative_to(run / SUPERSEDED) or own == there:
        return False
    told = own.metadata.get
    if told("ema.run_id") != newest.run_id or float(told("ema.t", told("ema.averages_t", "0"))) < newest.t:
        return True
    # A state, or a snapshot off the schedule, is replaced by a later one.
    return there is not None and file_kind(own) == "snapshot" and "ema.off_schedule" not in there.metadata


# --- files of a spool


_Stamp = tuple[int, ...]


def _stamp(path: SpooledPath) -> _Stamp:
    """Another one for another file of the same name: its inode, time and size; empty where there is none."""
    with suppress(FileNotFoundError):
        found = path.here.stat()
        return found.st_ino, found.st_mtime_ns, found.st_size
    return ()


def _files(directory: SpooledPath, own: str = "") -> list[SpooledPath]:
    """The files in a spool whose names begin so, by time."""
    found = []
    for folder, _, names in os.walk(directory.here):
        inside = directory / Path(folder).relative_to(directory.here)
        found += [inside / n for n in names if n.endswith(SUFFIX) and n.startswith(own) and not n.startswith(".")]
    return sorted(found)


def _drop(path: SpooledPath, stamp: _Stamp) -> None:
    """Remove a file from the spool, unless it was replaced since."""
    with _names:
        if stamp and _stamp(path) == stamp:
            path.here.unlink()


def _upload(path: SpooledPath, is_conditional: bool) -> bool:
    """Have a file in the store, in place of an older one of its name; returns False where it was removed meanwhile."""
    here, url = path.here, str(path)
    try:
        if not is_conditional and RemotePath(url).is_file():
            raise FileExistsError
        store.repeated(lambda: store.put(url, here, create=is_conditional))
    except FileExistsError:
        if read_header(path) != _stored_header(path):
            store.put(url, here, create=False)
    except FileNotFoundError:
        if os.path.lexists(here):
            raise
        return False
    return True


def _stored_header(path: SpooledPath) -> FileHeader | None:
    """That of the object of a file's name, with checksums of all its content; None where there is none."""
    with suppress(FileFormatError):
        return read_header(RemotePath(str(path)))
    return None


def _lease(directory: SpooledPath) -> Lease:
    """The lease of a run, for the holder of the lock of its spool: at once where the last holder had this spool."""
    place = directory.here / _TOKEN
    if not place.is_file():
        files.write_whole(place, secrets.token_hex(16).encode())
    return Lease(RemotePath(str(directory)), place.read_text())
