"""Reads of an object in a store by ranges, one request each."""

from __future__ import annotations

import threading
from pathlib import Path

from posthoc_cli.errors import RemoteError
from posthoc_cli.remote import store

START = 256 * 1024
"""Bytes of the first request, enough for the header of most files; small reads elsewhere request as many."""

_MOST_PIECES = 4  # pieces of an object that are held at a time: several tensors may be read in turns


class RemoteBytes:
    """The bytes of an object, read at any offset by any number of threads; its replacement meanwhile is an error.

    It holds a few pieces of the object, which small reads share. Size and `tag`, which may be empty, are its `stamp`,
    which differs for other content; every request checks it.
    """

    def __init__(self, path: Path) -> None:
        self._url = str(path)
        start, info = store.get(self._url, 0, START)
        self.size, self.tag = self.stamp = info.size, info.tag
        self._lock = threading.Lock()
        self._pieces: dict[int, memoryview] = {0: start}

    def read(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view from an offset on; return how many bytes, 0 only at the end of the object."""
        if len(view) < START:
            data = self._piece(offset - offset % START)[offset % START :]
        else:
            data = self.get(offset, offset + len(view))
        count = min(len(view), len(data))
        view[:count] = data[:count]
        return count

    def _piece(self, begin: int) -> memoryview:
        if (piece := self._pieces.get(begin)) is None:
            piece = self.get(begin, begin + START)
            with self._lock:
                self._pieces[begin] = piece
                while len(self._pieces) > _MOST_PIECES:
                    del self._pieces[next(iter(self._pieces))]
        return piece

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

    def close(self) -> None:
        """Forget what was read: a request ends with its answer."""
        self._pieces.clear()
