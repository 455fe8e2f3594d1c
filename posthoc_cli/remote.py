"""Files in stores, by URL: `s3://`, `gs://`, `az://`, `hf://` and `https://`.

`fsspec` makes the requests, by the library of each store: s3fs, gcsfs, adlfs, huggingface_hub,
aiohttp. Credentials and endpoints are read where those libraries read them. A failed request raises
an OSError: a FileNotFoundError, or else a `RemoteError`.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PosixPath
from typing import Any

import fsspec

from posthoc_cli.errors import InvalidValueError, MissingDependencyError, PostHocError, RemoteError

SCHEMES = ("s3", "gs", "az", "hf", "https", "http", "memory")


@contextmanager
def file_system(path: Path) -> Iterator[Any]:
    """Yield the `fsspec` file system of a URL; turn what it raises into an error about the URL."""
    scheme, _, _ = str(path).partition("://")
    try:
        yield _open_file_system(scheme)
    except FileNotFoundError:
        raise _system_error(errno.ENOENT, path) from None
    except ImportError as error:
        raise MissingDependencyError(path, str(error)) from error
    except (PostHocError, NotADirectoryError, IsADirectoryError):
        raise
    except Exception as error:  # the library of each store has classes of its own
        kind = errno.EACCES if isinstance(error, PermissionError) else errno.EIO
        # a redirected request may be signed
        lines = re.sub(r"\?\S*", "?...", str(error)).splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise RemoteError(path, f"the request failed: {reason}", errno=kind) from error


@lru_cache
def _open_file_system(scheme: str) -> Any:
    if scheme == "hf":
        # a read would ask for 5 MB more than it needs
        return fsspec.filesystem(scheme, block_size=1)
    return fsspec.filesystem(scheme)


def _system_error(number: int, path: Path) -> OSError:
    """Make the system's error of this number, such as a FileNotFoundError, about a URL."""
    return OSError(number, os.strerror(number), str(path))


class RemotePath(PosixPath):
    """The path of a file or folder in a store; `remote_path` makes it.

    Functions that do not know about URLs, such as `open`, fail: they would use a folder of the
    working directory.
    """

    _listed: dict[str, Any] | None = None  # what the listing of its folder says

    def __str__(self) -> str:
        """Write the URL with both slashes: a Path keeps one; a relative path has none."""
        scheme, colon, rest = super().__str__().partition(":/")
        return f"{scheme}://{rest}" if colon else scheme

    def __fspath__(self) -> str:
        """Raise an error: the operating system cannot open a URL."""
        raise PostHocError(self, "is a URL; must be a path on a file system of this machine")

    def absolute(self) -> RemotePath:
        return self

    def is_symlink(self) -> bool:
        """Say no: a store has no links."""
        return False

    def fetch_info(self) -> dict[str, Any]:
        """Ask the store about the file or folder; a FileNotFoundError if there is none."""
        with file_system(self) as store:
            store.invalidate_cache()
            return dict(store.info(str(self)))

    def _kind(self) -> str:
        """Find "file", "directory" or, for an absent path, an empty text.

        A file without permission counts as absent: where listing is not permitted, a store denies
        access to what does not exist.
        """
        try:
            info = self._listed or self.fetch_info()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EACCES):
                raise
            return ""
        return str(info["type"])

    def is_file(self, **_: Any) -> bool:
        return self._kind() == "file"

    def is_dir(self, **_: Any) -> bool:
        return self._kind() == "directory"

    def exists(self, **_: Any) -> bool:
        return bool(self._kind())

    def stat(self, **_: Any) -> os.stat_result:
        """Ask the store for the kind and the size."""
        info = self.fetch_info()
        kind = stat.S_IFREG if info["type"] == "file" else stat.S_IFDIR
        return os.stat_result((kind | 0o666, 0, 0, 1, 0, 0, info["size"] or 0, 0, 0, 0))

    lstat = stat

    def iterdir(self) -> Iterator[RemotePath]:  # type: ignore[override]  # a Generator
        with file_system(self) as store:
            store.invalidate_cache()
            listing = store.ls(str(self), detail=True)
        for info in listing:
            child = self._listed_path(info)
            if child != self:
                yield child
            elif not self.is_dir():  # else the empty object by which some tools mark a folder
                raise _system_error(errno.ENOTDIR, self)

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """Yield the paths that match a pattern, sorted."""
        with file_system(self) as store:
            store.invalidate_cache()
            found = store.glob(str(self / pattern), detail=True)
        return iter(sorted(map(self._listed_path, found.values())))

    def _listed_path(self, info: dict[str, Any]) -> RemotePath:
        """Make the path of an entry of a listing of this store."""
        scheme, _, _ = str(self).partition("://")
        key = info["name"].removeprefix(f"{scheme}://").strip("/")
        path = RemotePath(f"{scheme}://{key}")
        path._listed = info
        return path


def remote_path(text: str) -> RemotePath:
    """Make the path of a URL, or of what a Path made of it, with one slash.

    An InvalidValueError about the URL shows its kind alone, as the rest may hold credentials.
    """
    scheme, _, rest = text.partition(":")
    scheme = scheme.lower()
    host, _, path = rest.strip("/").partition("/")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES[:5])
        reason = f"is a URL of an unknown kind; must be a path, or begin with one of {known}"
        raise InvalidValueError(f"{scheme}://", reason)
    if not host:
        raise InvalidValueError(f"{scheme}://", "must name a bucket, a repository or a server")
    is_web = scheme.startswith("http")
    if (scheme != "hf" and "@" in host) or (is_web and "?" in path):
        raise InvalidValueError(f"{scheme}://", "must hold no credentials and no query")
    return RemotePath(f"{scheme}://{host}/{path}")


_PIECE = 256 * 1024
"""Bytes that small reads share, enough for the header of most files."""

_IDENTITIES = (
    "ETag", "etag", "md5Hash", "blob_id", "LastModified", "Last-Modified", "mtime", "created",
)  # fmt: skip
"""What stores call the facts that differ for other content, the surest first."""


class RemoteBytes:
    """The bytes of a file in a store, read at any offset by any number of threads.

    Attributes:
        size: its length in bytes.
        tag: what differs for other content, empty if the store says nothing of the kind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.size, self.tag = self.stamp()
        # as many as tensors that may be read in turns
        self._piece = lru_cache(maxsize=4)(self._read_piece)

    def stamp(self) -> tuple[int, str]:
        """Ask for the size and the tag that the file has now."""
        info = remote_path(str(self._path)).fetch_info()
        if info["type"] != "file":
            raise _system_error(errno.EISDIR, self._path)
        if info["size"] is None:
            raise RemoteError(self._path, "the server does not say its size")
        tags = [str(info[name]) for name in _IDENTITIES if info.get(name)]
        return info["size"], tags[0] if tags else ""

    def read(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view from an offset on; return how many bytes, 0 only at the end
        of the file."""
        if len(view) >= _PIECE:
            data = self._request(offset, offset + len(view))
        else:
            number, begin = divmod(offset, _PIECE)
            data = self._piece(number)[begin : begin + len(view)]
        view[: len(data)] = data
        return len(data)

    def _read_piece(self, number: int) -> memoryview:
        return self._request(number * _PIECE, (number + 1) * _PIECE)

    def _request(self, begin: int, end: int) -> memoryview:
        """Read a range, which ends at the end of the file at the latest."""
        end = min(end, self.size)
        if begin >= end:
            return memoryview(b"")
        with file_system(self._path) as store:
            data = store.cat_file(str(self._path), start=begin, end=end)
        if len(data) != end - begin:
            reason = f"the answer has {len(data):,} bytes of {end - begin:,}"
            raise RemoteError(self._path, reason)
        return memoryview(data)

    def close(self) -> None:
        """Forget what was read: a request ends with its answer."""
        self._piece.cache_clear()
