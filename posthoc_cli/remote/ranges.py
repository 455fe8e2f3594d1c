"""Reads of an object in a store by ranges. Threads that read at a time are what keeps several requests in flight."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from posthoc_cli.errors import RemoteError
from posthoc_cli.remote import store

START = 256 * 1024
"""Bytes of the first request, enough for the header of most files; small reads elsewhere request as many."""


class RemoteBytes:
    """The bytes of an object, read at any offset by any number of threads; its replacement meanwhile is an error.

    Attributes:
        tag: the store's tag of the content; may be empty.
    """

    def __init__(self, path: Path) -> None:
        self._url = str(path)
        self._start: memoryview | None
        self._start, self._info = store.get(self._url, 0, START)
        self.size, self.tag = self._info.size, self._info.tag
        _piece(self, 0)

    @property
    def stamp(self) -> tuple[int, str]:
        """A value that changes when the object is replaced; with a tag every request has checked it."""
        info = self._info if self.tag else store.head(self._url)
        return info.size, info.tag or str(info.modified)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view from an offset on; return how many bytes, 0 only at the end of the object."""
        if len(view) < START:
            data = _piece(self, offset - offset % START)[offset % START :]
        else:
            data = self.get(offset, offset + len(view))
        count = min(len(view), len(data))
        view[:count] = data[:count]
        return count

    def get(self, begin: int, end: int) -> memoryview:
        """Return the bytes of a range by one request, fewer at the end of the object."""
        end = min(end, self.size)
        if begin >= end:
            return memoryview(b"")
        data, info = store.get(self._url, begin, end, self.tag)
        if (info.size, info.tag) != (self.size, self.tag):
            raise RemoteError(self._url, "was replaced while it was being used", "run again")
        if len(data) != end - begin:
            raise RemoteError(self._url, f"cannot be read: the answer has {len(data):,} bytes of {end - begin:,}")
        return data

    def take_start(self) -> memoryview | None:
        """Return the first bytes, which came with the first request, and forget them."""
        start, self._start = self._start, None
        return start

    def close(self) -> None:
        """Do nothing: a request ends with its answer."""


@lru_cache(maxsize=64)
def _piece(file: RemoteBytes, begin: int) -> memoryview:
    """Return the `START` bytes of a file from an offset on, for reads that are smaller."""
    return file.take_start() or file.get(begin, begin + START)
