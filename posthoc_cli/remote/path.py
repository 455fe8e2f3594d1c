"""A URL as a path: joined, named and compared like any other; its store is asked what else the system would be."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Generator, Iterator
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path, PosixPath
from typing import Any
from urllib.parse import quote

from posthoc_cli.errors import PostHocError, RemoteError
from posthoc_cli.remote import store
from posthoc_cli.remote.store import Known


class RemotePath(PosixPath):
    """The path of an object or of a folder in a store; of the text from `store.shown_url`, and of nothing else.

    What does not know about URLs, as `open`, fails: it would mean a folder of the working directory.

    Attributes:
        known: what the listing that this path is from has said of the object; None for a folder, and without one.
        is_spooled: whether the system may have the file, too, under the path's name for it.
    """

    is_spooled = False
    known: Known | None = None
    _is_listed = False

    def __str__(self) -> str:
        """The URL; a Path keeps one of two slashes. Of what is relative to another path, the names alone."""
        scheme, colon, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}" if colon else scheme

    def __fspath__(self) -> str:
        """Refuse to be a name for the system."""
        raise PostHocError(self, "is a URL; must be a path on a file system of this machine here")

    def absolute(self) -> RemotePath:
        """The path itself."""
        return self

    def resolve(self, strict: bool = False) -> RemotePath:  # noqa: ARG002
        """The path itself."""
        return self

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def is_file(self, **_: Any) -> bool:
        """Whether it is an object."""
        if self._is_listed:
            return self.known is not None
        try:
            self.known, self._is_listed = store.head(str(self)), True
        except FileNotFoundError:
            return False
        except RemoteError as error:  # the same answer where nothing is there and folders must not be listed
            if error.errno != errno.EACCES:
                raise
            return False
        return True

    def is_dir(self, **_: Any) -> bool:
        """Whether an object is below it."""
        if not self._is_listed and not self._is_web and not self.is_file():
            with suppress(FileNotFoundError):
                self._is_listed = any(store.listed(str(self)))
        return self._is_listed and self.known is None

    @property
    def _is_web(self) -> bool:
        """Whether it is of a web server, which has no folders."""
        return str(self).startswith("http")

    def exists(self, **_: Any) -> bool:
        """Whether it is either."""
        return self.is_file() or self.is_dir()

    def stat(self, **_: Any) -> os.stat_result:
        """The kind, size and time of an object, or the kind of a folder; a FileNotFoundError if it is neither."""
        try:
            found = store.head(str(self))
        except FileNotFoundError:
            if not self.is_dir():
                raise
            return os.stat_result((stat.S_IFDIR | 0o777, 0, 0, 1, 0, 0, 0, 0, 0, 0))
        when = int(found.modified)
        return os.stat_result((stat.S_IFREG | 0o666, 0, 0, 1, 0, 0, found.size, when, when, when))

    def lstat(self) -> os.stat_result:
        """The same as `stat`: there are no links."""
        return self.stat()

    def unlink(self, missing_ok: bool = True) -> None:  # noqa: ARG002 - a store does not say
        """Remove the object, if there is one."""
        store.delete(str(self))

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """What is in the folder; a FileNotFoundError if there is none, a NotADirectoryError of an object."""
        folders, objects = self._listed()
        for key, known in (*((key, None) for key in folders), *((one.key, one) for one in objects)):
            child = self / key.rpartition("/")[2]
            child.known, child._is_listed = known, True
            yield child

    def _listed(self) -> tuple[list[str], list[Known]]:
        try:
            found = ([], []) if self.known or self._is_web else store.listed(str(self))
        except RemoteError:  # of an object it is the same that folders cannot be listed
            if not self.is_file():
                raise
            found = [], []
        if not any(found):
            store.head(str(self))
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self))
        return found

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """What matches in this folder and, by a pattern with slashes, below it; nothing is left out for its dot.

        Of a repository of the Hub, `model@step*` are its revisions.
        """
        first, _slash, rest = pattern.partition("/")
        found: list[RemotePath] = []
        if not glob.has_magic(first):
            found = [self / first] if rest or (self / first).exists() else []
        elif str(self).startswith("hf://") and "@" in first:
            repository, _at, wanted = first.partition("@")
            names = store.revisions(str(self / repository))
            found = [self / f"{repository}@{quote(name, safe='')}" for name in names if fnmatchcase(name, wanted)]
        else:
            with suppress(FileNotFoundError, NotADirectoryError):
                found = [child for child in self.iterdir() if fnmatchcase(child.name, first)]
        for child in found:
            if rest:
                yield from child.glob(rest)
            else:
                yield child


def remote_path(text: str) -> RemotePath:
    """The path of a URL; also of what a Path made of it, with one slash. Errors as of `store.shown_url`."""
    return RemotePath(store.shown_url(text))


def matching(pattern: Path) -> list[Path]:
    """What a pattern that is a URL names, sorted; nothing where its folder is absent."""
    parts = pattern.parts
    first = next(number for number, part in enumerate(parts) if glob.has_magic(part))
    return sorted(RemotePath(*parts[:first]).glob("/".join(parts[first:])))
