"""The file operations that durability rests on, and atomic writing of files.

All code that writes files (snapshots, outputs, plots, tables) uses `PendingFile`:

1. the bytes are written to a temporary file in the destination directory, created with O_EXCL and
the umask's mode;
2. the temporary file is fsynced;
3. it is renamed to its final name atomically;
4. the directory is fsynced.

A name therefore never leads to a partial file, a reader that has the old file open keeps it, and a
crash leaves at most a temporary file, whose name begins with `.ema-`. Each operation is a method of
`files.system`, which a test can replace by one that fails or that ends the process.
"""

from __future__ import annotations

import atexit
import errno
import glob
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from posthoc_cli.errors import (
    InvalidValueError,
    Log,
    OutputExistsError,
    RemoteError,
    WriteError,
    argument,
    quote,
)

log = Log(__name__)

TEMPORARY_PREFIX = ".ema-"

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Error numbers of `link` on a file system without hard links."""


class FileSystem:
    """The operating system's file operations; each raises OSError if the system refuses."""

    close = staticmethod(os.close)
    fsync = staticmethod(os.fsync)
    link = staticmethod(os.link)
    remove_directory = staticmethod(os.rmdir)
    unlink = staticmethod(os.unlink)

    def rename(self, path: Path, target: Path) -> None:
        """Rename a file or folder; a network file system may have done so and lost its answer."""
        own = path.lstat()
        try:
            path.replace(target)
        except OSError:
            if not (os.path.lexists(target) and os.path.samestat(own, target.lstat())):
                raise

    def open_new(self, path: Path) -> int:
        """Create a file that does not exist yet and return a descriptor for reading and writing."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def open(self, path: Path) -> int:
        # Without O_NONBLOCK, opening a FIFO waits for a writer that may never come.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    def read(
        self,
        descriptor: int,
        view: memoryview,
        offset: int,
    ) -> int:
        """Read from `offset` into the beginning of `view`; return the number of bytes, 0 at the end
        of the file."""
        return os.preadv(descriptor, [view], offset)

    def write(
        self,
        descriptor: int,
        view: memoryview,
        offset: int,
    ) -> int:
        """Write the beginning of `view` at `offset`; return the number of bytes written."""
        return os.pwrite(descriptor, view, offset)

    def fsync_directory(self, path: Path) -> None:
        """Wait until the directory's entries are on the disk, where the file system supports
        that."""
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            # Some network file systems cannot sync a directory and answer EINVAL; their rename is
            # synchronous.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)

    def make_directory(self, path: Path) -> None:
        """Create a directory in an existing parent; do nothing if it exists."""
        path.mkdir(exist_ok=True)

    def list(self, path: Path) -> list[Path]:
        return list(path.iterdir())


system = FileSystem()  # the file system in use; tests replace it to make operations fail


# --- paths and URLs

_URL = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")
"""The beginning of a URL: one slash, since a Path drops the second; two letters or more, since one
is a drive."""


def is_url(path: str | Path) -> bool:
    """Return whether a text is a URL, which names something in a store, and not a path."""
    return _URL.match(str(path)) is not None


def check_path(name: str, path: str | Path) -> Path:
    """Make a path of an argument, expanded; an InvalidValueError names an empty or invalid one."""
    is_empty = path == ""  # which `Path` would take for the working directory
    if is_empty or not isinstance(path, str | os.PathLike) or "\0" in str(path):
        reason = "is empty; for the working directory give '.'" if is_empty else "must be a path"
        raise InvalidValueError(name, reason, value="" if is_empty else quote(path))
    return expand_user(path)


def expand_user(path: str | Path) -> Path:
    """Replace a leading ~ by the home directory, unless the user is unknown."""
    path = as_path(path)
    return path if is_url(path) else Path(os.path.expanduser(path))  # noqa: PTH111 - pathlib raises for an unknown user


def is_glob(pattern: str | Path) -> bool:
    """Return whether a text is a pattern, and not the name of a file or directory."""
    path = expand_user(pattern)
    has_signs = glob.has_magic(str(path)) or _BRACES.search(str(path)) is not None
    return has_signs and not path.exists()


_BRACES = re.compile(r"(?<!\[)\{([^{}]*,[^{}]*)\}")


def expand_braces(pattern: Path) -> list[Path]:
    """List the patterns that one with alternatives in braces means, such as `step{1000,1500}.pt`,
    in their order; a path that exists is itself."""
    found = _BRACES.search(str(pattern))
    if found is None or pattern.exists():
        return [pattern]
    before, after = str(pattern)[: found.start()], str(pattern)[found.end() :]
    expanded = []
    for alternative in found[1].split(","):
        expanded += expand_braces(as_path(f"{before}{alternative}{after}"))
    return expanded


def escape_glob(path: str) -> str:
    """Make the pattern that matches a path alone."""
    return glob.escape(path).replace("{", "[{]")


def list_in_braces(paths: Iterable[str]) -> str:
    """Make the pattern that matches several paths alone; a comma in one matches any character."""
    return f"{{{','.join(escape_glob(path).replace(',', '?') for path in paths)}}}"


def as_path(path: str | Path) -> Path:
    """Make a Path of a text, a RemotePath of a URL."""
    if not is_url(path):
        return Path(path)
    from posthoc_cli.remote import RemotePath, remote_path

    return path if isinstance(path, RemotePath) else remote_path(str(path))


def local_path(name: str, path: str | Path) -> Path:
    """Make a path of an argument as `check_path` does; a URL is an InvalidValueError, too."""
    local = check_path(name, path)
    if is_url(local):
        reason = "is a URL; must be a path on a file system of this machine"
        hint = "copy it from or to the store with `rclone copy` or `aws s3 cp`"
        raise InvalidValueError(name, reason, hint, value=local)
    return local


def check_parent(path: Path) -> None:
    """Raise InvalidValueError if the folder of the output `path` cannot be made."""
    for folder in path.parents:
        if os.path.lexists(folder):
            if not folder.is_dir():
                raise InvalidValueError("out", f"{folder} is not a folder", value=path)
            return


def check_folder(path: Path) -> None:
    """Raise InvalidValueError if `path`, the folder of outputs, exists and is not a folder, or if
    it is a pipe's usual name."""
    if path == Path("-"):
        raise InvalidValueError("out", "outputs are files; name a file or a folder", value=path)
    if path.exists() and not path.is_dir():
        raise InvalidValueError("out", "is a file; name a folder", value=path)


def new_file(
    out: str | Path,
    endings: Sequence[str],
    overwrite: bool,
) -> Path:
    """Check the ending of an output, and that it and its folder may be written."""
    path = local_path("out", out)
    if path.suffix not in endings:
        raise InvalidValueError("out", f"must end in {', '.join(endings)}", value=path)
    check_parent(path)
    if path.is_dir() or str(out).endswith("/"):
        raise InvalidValueError("out", "is a folder; name a file", value=out)
    if path.exists() and not overwrite:
        raise _exists_error(path)
    return path


def is_real_folder(path: Path) -> bool:
    """Return whether a path is a folder, and not a link, which may lead elsewhere."""
    return path.is_dir() and not path.is_symlink()


def is_absent(path: Path) -> bool:
    """Return whether a path no longer exists; False if that is unknown, as in a folder without
    permission."""
    try:
        path.lstat()
    except OSError as error:
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return False


class Look:
    """What lies in folders: each is listed once, and the size, time and inode of each entry is
    taken before any is opened, so that a later look finds what has changed since."""

    def __init__(self) -> None:
        self._folders = dict[Path, dict[Path, Stamp]]()
        self._paths = dict[Path, Stamp]()
        self._patterns = dict[Path, list[Path]]()

    def list_folder(self, folder: Path) -> list[Path]:
        """List a folder, sorted; raise OSError if it cannot be listed."""
        if folder not in self._folders:
            entries = sorted(system.list(folder))
            self._folders[folder] = {entry: _stamp(entry) for entry in entries}
        return [*self._folders[folder]]

    def match(self, pattern: Path) -> list[Path]:
        """List the files and folders that a glob or a path names, sorted."""
        matches = _list_matches(pattern)
        self._patterns[pattern] = matches
        for path in matches:
            self.add(path)
        return matches

    def add(self, path: Path) -> None:
        """Look at a path that is in no listed folder."""
        self._paths[path] = _stamp(path)

    def is_current(self) -> bool:
        """Look again, and return whether nothing has changed; False if there is nothing to compare,
        as in a store."""
        paths = [*self._folders, *self._paths]
        if not paths or any(map(is_url, paths)):
            return False
        again = Look()
        with suppress(OSError):
            for folder in self._folders:
                again.list_folder(folder)
            for pattern in self._patterns:
                again.match(pattern)
            for path in self._paths:
                again.add(path)
            return vars(again) == vars(self)
        return False


Stamp = tuple[int, int, int] | None
"""The size, the time of the last change and the inode of a file; None for what is not there, and
for objects of a store, where each would be a request."""


def _stamp(path: Path) -> Stamp:
    if is_url(path):
        return None
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _list_matches(pattern: Path) -> list[Path]:
    if not is_glob(pattern):
        return [pattern] if pattern.exists() else []
    if is_url(pattern):
        return [*pattern.parent.glob(pattern.name)]
    # Path.glob takes no absolute patterns
    return sorted(map(Path, glob.glob(str(pattern), recursive=True)))  # noqa: PTH207


# --- directories, and what interrupted writes leave


@contextmanager
def raise_write_errors(path: Path, refused: str = "written") -> Iterator[None]:
    """Turn an OSError of the block into a WriteError: `path` cannot be `refused`, which is
    "written" or "removed"."""
    try:
        yield
    except (WriteError, OutputExistsError, RemoteError):
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        left = "nothing partial is left" if refused == "written" else ""
        raise WriteError(
            path, f"cannot be {refused}: {reason.lower()}", left, errno=error.errno
        ) from error


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents durably."""
    with new_directory(path):
        pass


@contextmanager
def new_directory(path: Path) -> Iterator[None]:
    """Make a directory as `make_directory` does; if this or the block fails, remove what is new and
    empty."""
    created: list[Path] = []
    try:
        with raise_write_errors(path):
            missing = [p for p in (path, *path.parents) if not os.path.exists(p)]  # noqa: PTH110
            for directory in reversed(missing):
                _unfinished[directory] = os.getpid()
                system.make_directory(directory)
                created.append(directory)
                system.fsync_directory(directory.parent)
        yield
    except BaseException:
        with suppress(OSError):
            for directory in reversed(created):
                system.remove_directory(directory)
        raise


def unlink_if_exists(path: Path) -> None:
    """Remove a file that may not exist."""
    with suppress(FileNotFoundError):
        system.unlink(path)


def _remove(path: Path) -> None:
    """Remove a file, a link or a complete folder, if it exists."""
    if is_real_folder(path):
        for entry in system.list(path):
            _remove(entry)
        system.remove_directory(path)
    else:
        unlink_if_exists(path)


_unfinished: dict[Path, int] = {}
"""Temporary files and folders, and directories created for new files, each with the id of the
process that made it. Threads and the end of the process may remove an entry at the same time."""


def _discard(path: Path) -> None:
    """Remove a temporary file or folder, at the exit if the system refuses it now."""
    _unfinished[path] = os.getpid()
    with suppress(OSError):
        _remove(path)
        _unfinished.pop(path, None)


@atexit.register
def remove_unfinished() -> None:
    """Remove temporary files that were not discarded, and empty directories created for them, when
    the process ends.

    A signal may arrive after a file was created and before the `with` statement that would remove
    it.
    """
    for path, process in reversed(list(_unfinished.items())):
        if process == os.getpid():  # not in a forked child
            with suppress(OSError):
                _remove(path) if is_temporary(path.name) else system.remove_directory(path)
            _unfinished.pop(path, None)


def is_temporary(name: str) -> bool:
    """Return whether a name belongs to a temporary file or folder."""
    return name.startswith(TEMPORARY_PREFIX) and name.endswith(".tmp")


def remove_leftovers(directory: Path, still: float = 3600.0) -> None:
    """Remove temporary files and folders that processes have left which were killed; log those that
    cannot be removed.

    These are the files that have not changed for `still` seconds.
    """
    entries: list[Path] = []
    with suppress(PermissionError):  # a folder that may not be listed
        entries = system.list(directory)
    for path in filter(lambda path: is_temporary(path.name), entries):
        try:
            inside = () if path.is_symlink() else path.rglob("*")
            if max(entry.lstat().st_mtime for entry in (path, *inside)) < time.time() - still:
                _remove(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            log.warning(
                "%s: left by an interrupted write, and cannot be removed: %s",
                path,
                error.strerror or error,
            )


# --- writing


def write_atomically(
    path: Path,
    data: bytes,
    overwrite: bool = False,
) -> None:
    """Write a small file durably and atomically, as `PendingFile` does."""
    with PendingFile(path, overwrite) as pending:
        pending.write_at(data, 0)
        pending.publish()


class _Temporary:
    """A file or folder with a temporary name, which readers ignore, until it is published or the
    `with` block ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.parent / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}.tmp"

    def discard(self) -> None:
        """Remove what is there. The next call completes one that a signal interrupted."""
        if self.temporary in _unfinished:
            _discard(self.temporary)

    def __enter__(self: _P) -> _P:
        return self

    def __exit__(
        self,
        _kind: object,
        error: BaseException | None,
        _trace: object,
    ) -> None:
        self.discard()
        if isinstance(error, WriteError):
            error.subject = error.subject.replace(str(self.temporary), str(self.path))


_P = TypeVar("_P", bound=_Temporary)


class PendingFile(_Temporary):
    """A file that is being written. `publish` gives it its name.

    Raises WriteError if the system refuses, and OutputExistsError if `path` exists and may not be
    replaced: at the start and, atomically, in `publish`.
    """

    def __init__(self, path: Path, overwrite: bool = False) -> None:
        super().__init__(path)
        self._overwrite = overwrite
        self.descriptor = -1
        with raise_write_errors(path):
            is_file = path.is_file() or (path.is_symlink() and not path.is_dir())
            if not is_file and os.path.lexists(path):
                raise OutputExistsError(
                    path, "is a directory, pipe, socket or device", "choose another name"
                )
            if is_file and not overwrite:  # replacing a link keeps the file that it names
                raise _exists_error(path)
            _unfinished[self.temporary] = os.getpid()
            self.descriptor = system.open_new(self.temporary)

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data).cast("B")
        with raise_write_errors(self.path):
            while view:
                written = system.write(self.descriptor, view, offset)
                view = view[written:]
                offset = offset + written

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view` with what was written from an offset on."""
        with raise_write_errors(self.path):
            while view:
                count = system.read(self.descriptor, view, offset)
                view = view[count:]
                offset = offset + count

    def publish(self) -> None:
        """Make the content durable and give the file its name; remove a new name if a later step
        fails."""
        with raise_write_errors(self.path):
            system.fsync(self.descriptor)
            self._close()
            linked = not self._overwrite
            replaces = self._overwrite and os.path.lexists(self.path)
            try:
                if linked:
                    system.link(self.temporary, self.path)
            except OSError as error:
                if os.path.lexists(self.path):
                    # a network file system may have made the link, and lost its answer
                    if not os.path.samestat(self.temporary.lstat(), self.path.lstat()):
                        raise _exists_error(self.path) from error
                elif error.errno in NO_HARD_LINKS:
                    linked = False  # this check and the rename are not atomic
                else:
                    raise
            if not linked:
                system.rename(self.temporary, self.path)
            try:
                if linked:
                    with suppress(FileNotFoundError):  # its answer was lost, as in `rename`
                        system.unlink(self.temporary)
                system.fsync_directory(self.path.parent)
                _unfinished.pop(self.temporary, None)
            except BaseException:
                if not replaces:
                    with suppress(OSError):
                        system.unlink(self.path)
                raise

    def discard(self) -> None:
        self._close()
        super().discard()

    def _close(self) -> None:
        descriptor = self.descriptor
        self.descriptor = -1
        if descriptor >= 0:
            system.close(descriptor)


class PendingFolder(_Temporary):
    """A folder that is being written. `publish` gives it its name.

    Raises OutputExistsError if there is something at `path` but an empty folder, or one whose files
    all have names of the pattern `replaces`, which is replaced.
    """

    def __init__(
        self,
        path: Path,
        replaces: re.Pattern[str] | None = None,
    ) -> None:
        super().__init__(path)
        self._replaces = replaces
        with raise_write_errors(path):
            self._is_taken()
            _unfinished[self.temporary] = os.getpid()
            system.make_directory(self.temporary)

    def _is_taken(self) -> bool:
        """Return whether `path` is taken; an OutputExistsError if it may not be replaced."""
        path = self.path
        if not os.path.lexists(path):
            return False
        if path.is_symlink() or not path.is_dir():
            raise self._refuse("is a file or a link; must be a folder")
        if os.path.ismount(path) or path.samefile("."):
            raise self._refuse("is a disk's or the working directory, which is not replaced")
        for entry in sorted(system.list(path)):
            if self._replaces is None or entry.is_dir() or not self._replaces.fullmatch(entry.name):
                raise self._refuse(f"already exists, and holds {quote(entry.name)}")
        return True

    def _refuse(self, reason: str) -> OutputExistsError:
        hint = "name a new folder"
        if self._replaces is None:
            hint += f", or {argument('overwrite')} to replace a model"
        return OutputExistsError(self.path, reason, hint)

    def publish(self) -> None:
        """Make the content durable and give the folder its name; a failure leaves what was
        there."""
        with raise_write_errors(self.path):
            for base, _, names in os.walk(self.temporary):
                for name in names:
                    descriptor = system.open(Path(base, name))
                    try:
                        system.fsync(descriptor)
                    finally:
                        system.close(descriptor)
                system.fsync_directory(Path(base))
            # A name that cleanups leave alone: a kill between the two renames must not cost the old
            # model.
            aside = self.path.with_name(f".{self.path.name}.replaced-{secrets.token_hex(4)}")
            replaced = aside if self._is_taken() else None
            try:
                if replaced:
                    system.rename(self.path, replaced)
                system.rename(self.temporary, self.path)
                system.fsync_directory(self.path.parent)
            except BaseException:
                for source, target in ((self.path, self.temporary), (replaced, self.path)):
                    with suppress(OSError):  # what was not renamed yet
                        system.rename(source, target) if source else None
                raise
            _unfinished.pop(self.temporary, None)
        if replaced:
            _discard(replaced)


def _exists_error(path: Path) -> OutputExistsError:
    hint = f"choose another name, or {argument('overwrite')} to replace it"
    return OutputExistsError(path, "already exists", hint)
