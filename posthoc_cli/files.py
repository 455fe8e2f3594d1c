"""The file operations that durability rests on, and the one way to make a file appear.

Everything that writes (snapshots, outputs, pictures, tables) uses `PendingFile`:

1. the bytes go to a temporary file in the directory of the final name, made with O_EXCL and the umask's mode;
2. it is flushed and fsynced;
3. it is put under its final name in one step that either happens or does not;
4. the directory is fsynced.

So a name never leads to half a file, a reader that has the old file open keeps it, and a crash leaves at most a
temporary, whose name begins with `.ema-`. Each operation is a method of `files.system`, which a test can replace by one
that fails, or that ends the process.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from posthoc_cli.errors import InvalidValueError, OutputExistsError, RemoteError, WriteError, shown

log = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".ema-"
TEMPORARY_SUFFIX = ".tmp"

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Errors of `link` on a file system without hard links."""


class FileSystem:
    """The system's operations, one method each; each raises an OSError where the system refuses."""

    def open_new(self, path: Path) -> int:
        """A descriptor, for reading and writing, of a file that did not exist before."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open(self, path: Path) -> int:
        """A descriptor for reading."""
        # Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def open_append(self, path: Path) -> int:
        """A descriptor, for reading and for writing at the end, of a file that is made where there is none."""
        return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def read(self, descriptor: int, view: memoryview, offset: int) -> int:
        """Fill the beginning of `view` from `offset` on; returns how many bytes, 0 at the end of the file."""
        return os.preadv(descriptor, [view], offset)

    def write(self, descriptor: int, view: memoryview, offset: int) -> int:
        """Write the beginning of `view` at `offset`; returns how many bytes."""
        return os.pwrite(descriptor, view, offset)

    def close(self, descriptor: int) -> None:
        """Close a descriptor."""
        os.close(descriptor)

    def fsync(self, descriptor: int) -> None:
        """Return when the file's content is on the disk."""
        os.fsync(descriptor)

    def fsync_directory(self, path: Path) -> None:
        """Return when the directory's entries are on the disk, where the system can say so; a store has none."""
        if is_remote(path):
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot sync a directory and answer EINVAL; their rename is synchronous.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Put `source` under the name `target`, replacing what is there, in one step."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """Give `source` the second name `target`; FileExistsError where that name is taken."""
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        """Remove a name."""
        path.unlink()

    def make_directory(self, path: Path) -> None:
        """Make a directory whose parent exists, unless it exists itself."""
        path.mkdir(exist_ok=True)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory."""
        path.rmdir()

    def list(self, path: Path) -> list[Path]:
        """The paths in a directory, in no order."""
        return list(path.iterdir())


system = FileSystem()
"""The one object that tests replace, to make operations fail."""


EMPTY = "is empty; for the working directory give '.'"
"""What is wrong with an empty path, which would mean that directory."""

_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")
"""As a path it would mean a folder named `s3:`. Of two slashes a Path keeps one; a single letter is a drive."""


def is_url(path: str | Path) -> bool:
    """Whether it names something in an object store."""
    return _URL.match(str(path)) is not None


def is_remote(path: Path) -> bool:
    """Whether it is in a store only; what a tracker writes to a store is in a spool first, which the system knows."""
    return is_url(path) and not getattr(path, "is_spooled", False)


def given_path(name: str, path: str | Path) -> Path:
    """An argument as a path, or an InvalidValueError for an empty one: the working directory is "."."""
    if path == "":
        raise InvalidValueError(name, EMPTY)
    if not isinstance(path, str | os.PathLike) or "\0" in str(path):
        raise InvalidValueError(name, "must be a path", value=shown(path))
    return as_path(path)


def expanded(path: str | Path) -> Path:
    """A path with a leading ~ replaced by the home directory; unchanged for an unknown user."""
    path = as_path(path)
    return path if is_url(path) else Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib raises for an unknown user


def as_path(path: str | Path) -> Path:
    """The path of a text, or of a URL."""
    if not is_url(path):
        return Path(path)
    from posthoc_cli.remote.store import RemotePath, remote_path

    return path if isinstance(path, RemotePath) else remote_path(str(path))


def local_path(name: str, path: str | Path) -> Path:
    """As `given_path`, or an InvalidValueError for a URL."""
    found = given_path(name, path)
    if is_url(found):
        raise InvalidValueError(name, "is a URL; must be a path on a file system of this machine", value=found)
    return found


STORES = ("s3:", "gs:", "az:")
"""Beginnings of the URLs at which objects can be written and removed."""


def check_writable(name: str, path: Path) -> None:
    """Raise an InvalidValueError about the argument of that `name` for a URL that can only be read."""
    if is_url(path) and not str(path).startswith(STORES):
        raise InvalidValueError(name, "must be a path, or begin with s3://, gs:// or az://", value=path)


def check_parent(name: str, path: Path) -> None:
    """An InvalidValueError about the argument of that `name` unless the folder that an output goes into is there."""
    if not (is_remote(path.parent) or path.parent.is_dir()):  # a store needs no folders
        raise InvalidValueError(name, "its folder does not exist", value=path)


def is_gone(path: Path) -> bool:
    """Whether a path no longer exists; False if that is unknown, as in a folder that cannot be entered."""
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


def write_at(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    while view:
        written = system.write(descriptor, view, offset)
        view, offset = view[written:], offset + written


def make_directory(path: Path) -> list[Path]:
    """Make a directory and its parents, durably; returns those that were made, the outermost first.

    A store needs none.
    """
    missing = [] if is_remote(path) else [p for p in (path, *path.parents) if not os.path.exists(p)]  # noqa: PTH110
    made = []
    try:
        for directory in reversed(missing):
            _unfinished[directory] = os.getpid()
            system.make_directory(directory)
            made.append(directory)
            system.fsync_directory(directory.parent)
    except BaseException:
        remove_directories(made)
        raise
    return made


def remove_directories(made: list[Path]) -> None:
    """Undo `make_directory`, for directories that are empty."""
    with suppress(OSError):
        for directory in reversed(made):
            system.remove_directory(directory)


def unlink_if_there(path: Path) -> None:
    """Remove a file that may not exist."""
    with suppress(FileNotFoundError):
        system.unlink(path)


def discard(paths: Collection[Path]) -> None:
    """Remove temporaries; those that the system refuses to remove are tried again when the process ends."""
    for path in paths:
        _unfinished[path] = os.getpid()
    for path in paths:
        with suppress(OSError):
            unlink_if_there(path)
            del _unfinished[path]


def leftovers(directory: Path) -> list[Path]:
    """Temporaries in a directory, sorted: of writes in progress, or of processes that were killed."""
    return sorted(path for path in system.list(directory) if is_temporary(path.name))


STILL_SECONDS = 3600.0
"""Temporaries that have not changed for so long are of processes that were killed."""


def remove_leftovers(directory: Path, still: float = STILL_SECONDS) -> None:
    """Remove temporaries, also folders, that have not changed for so many seconds; a refusal is logged."""
    before = time.time() - still
    for path in leftovers(directory):
        try:
            is_folder = stat.S_ISDIR(path.lstat().st_mode)
            inside = path.rglob("*") if is_folder else ()
            if max(one.lstat().st_mtime for one in (path, *inside)) < before:
                shutil.rmtree(path) if is_folder else system.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning("%s: left by an interrupted write, and cannot be removed: %s", path, error.strerror or error)


def is_temporary(name: str) -> bool:
    """Whether a name has the form that `temporary_path` gives."""
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def temporary_path(directory: Path) -> Path:
    """A new name in `directory`, which every reader ignores."""
    return directory / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"


def made_at(path: Path) -> Path:
    """A new name for what will have that of `path` when it is complete: beside it, or where temporary files are.

    An InvalidValueError for a URL that can only be read.
    """
    if not is_remote(path):
        return temporary_path(path.parent)
    check_writable("out", path)
    return temporary_path(Path(tempfile.gettempdir()))


def give_name(folder: Path, path: Path) -> None:
    """Give a complete folder its name, or send its files to a store: the indexes last, and all of them or none."""
    if not is_remote(path):
        system.rename(folder, path)
        system.fsync_directory(path.parent)
        return
    from posthoc_cli.remote import store

    sent = []
    try:
        for file in sorted(folder.rglob("*"), key=lambda one: (one.suffix == ".json", one.name == ".metadata", one)):
            if file.is_file():
                store.put(str(path / file.relative_to(folder)), file)
                sent.append(path / file.relative_to(folder))
    except BaseException:
        discard(sent)
        raise


@contextmanager
def new_directory(path: Path) -> Iterator[None]:
    """Make a directory for the block; it is removed if the block fails and leaves it empty."""
    with reported_as_write_error(path):
        made = make_directory(path)
    try:
        yield
    except BaseException:
        remove_directories(made)
        raise


@contextmanager
def reported_as_write_error(path: Path, refused: str = "written") -> Iterator[None]:
    """Turn an OSError within the block into a WriteError about `path` that could not be `refused`: written, removed."""
    try:
        yield
    except (WriteError, OutputExistsError, RemoteError):
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        left = "nothing partial is left" if refused == "written" else ""
        raise WriteError(path, f"cannot be {refused}: {reason.lower()}", left, errno=error.errno) from error


class PendingFile:
    """A file being written, which appears under its name by `publish`; leaving the `with` block without it removes it.

    One of a store is written to the folder for temporary files first.

    Raises:
        OutputExistsError: `path` exists and `overwrite` is False: at the start, and again without races in `publish`.
        WriteError: the system refused.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        self.path, self._overwrite = path, overwrite
        self.temporary = made_at(path)
        _unfinished[self.temporary] = os.getpid()
        with reported_as_write_error(path):
            _check_free(path, overwrite)
            self.descriptor = system.open_new(self.temporary)
        self._open = True

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at `offset`."""
        with reported_as_write_error(self.path):
            write_at(self.descriptor, data, offset)

    def publish(self) -> None:
        """Make the content durable, then give it its name; a new name is removed if a later step fails.

        To a store it is sent, and appears when all has arrived.
        """
        if is_remote(self.path):
            self._send()
            return
        with reported_as_write_error(self.path):
            system.fsync(self.descriptor)
            replaces = self._overwrite and os.path.lexists(self.path)
            linked = self._take_name()
            try:
                if linked:
                    system.unlink(self.temporary)
                self._close()
                system.fsync_directory(self.path.parent)
                _unfinished.pop(self.temporary, None)
            except BaseException:
                if not replaces:
                    with suppress(OSError):
                        system.unlink(self.path)
                raise

    def _send(self) -> None:
        from posthoc_cli.remote import store

        with reported_as_write_error(self.path):
            try:
                store.put(str(self.path), self.temporary, create=not self._overwrite)
            except FileExistsError as error:
                raise _exists(self.path) from error
        self.discard()

    def discard(self) -> None:
        """Remove the temporary, if there is one. A call that a signal interrupted is finished by the next."""
        if self._open:
            self._close()
        if self.temporary in _unfinished:
            with suppress(OSError):
                system.unlink(self.temporary)
            _unfinished.pop(self.temporary, None)

    def _take_name(self) -> bool:
        """Put the file under its name; returns whether it also has the temporary name."""
        if not self._overwrite:
            try:
                system.link(self.temporary, self.path)
                return True
            except OSError as error:
                # Without hard links the check and the rename are two steps.
                if isinstance(error, FileExistsError) or (error.errno in NO_HARD_LINKS and os.path.lexists(self.path)):
                    raise _exists(self.path) from error
                if error.errno not in NO_HARD_LINKS:
                    raise
        system.rename(self.temporary, self.path)
        return False

    def _close(self) -> None:
        self._open = False
        system.close(self.descriptor)

    def __enter__(self) -> PendingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


_unfinished: dict[Path, int] = {}
"""Temporaries, and directories for new files, each with the process that makes it."""


@atexit.register
def remove_unfinished() -> None:
    """Remove temporaries that were not discarded, and empty directories that were made for them.

    A signal may come between the making of a file and the `with` statement that would remove it; this runs when the
    process ends.
    """
    for path, process in reversed(list(_unfinished.items())):
        if process == os.getpid():  # not in a forked child
            with suppress(OSError):
                system.remove_directory(path) if path.is_dir() else system.unlink(path)
            del _unfinished[path]


def write_whole(path: Path, data: bytes, overwrite: bool = False) -> None:
    """Write a small file as a `PendingFile`."""
    with PendingFile(path, overwrite) as pending:
        pending.write_at(data, 0)
        pending.publish()


def _check_free(path: Path, overwrite: bool) -> None:
    if is_remote(path):
        if not overwrite and path.is_file():
            raise _exists(path)
        return
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if path.is_dir():
        raise OutputExistsError(path, "is a directory", "name a file")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):  # of a link only the link itself would be replaced
        raise OutputExistsError(path, "is a pipe, socket or device, which is never replaced", "choose another name")
    if not overwrite:
        raise _exists(path)


def _exists(path: Path) -> OutputExistsError:
    return OutputExistsError(path, "is there already", "choose another name, or overwrite=True to replace it")
