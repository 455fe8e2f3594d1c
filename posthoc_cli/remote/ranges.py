"""Reads of an object in a store by ranges, one request each, or, while a synthesis reads it, ahead by long requests."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from posthoc_cli.errors import RemoteError
from posthoc_cli.remote import store

START = 256 * 1024
"""Bytes of the first request, enough for the header of most files; small reads elsewhere request as many."""

_AHEAD_BYTES = 64 * 1024 * 1024  # bytes of all objects together that are held, or under way, before they are read

MOST_AHEAD = _AHEAD_BYTES // (2 * START)  # the largest number of objects that are read ahead

_LONGEST = 4 * 1024 * 1024
_MOST_PIECES = 4  # pieces of an object that are held at a time: several tensors may be read in turns


class Ahead(NamedTuple):
    """What reads objects ahead: threads that make the requests, and the bytes of each."""

    pool: ThreadPoolExecutor
    length: int


@contextmanager
def reading_ahead(objects: int, threads: int) -> Iterator[Ahead | None]:
    """Make the threads for reading this many objects ahead; None for so many that their bytes would be too many."""
    if objects > MOST_AHEAD:
        yield None
        return
    pool = ThreadPoolExecutor(threads, "ema-ahead")
    try:
        yield Ahead(pool, min(_LONGEST, _AHEAD_BYTES // (2 * objects) // START * START))
    finally:  # on an error, too: wait for the requests being made and cancel the others
        pool.shutdown(wait=True, cancel_futures=True)


class RemoteBytes:
    """The bytes of an object, read at any offset by any number of threads; its replacement meanwhile is an error.

    It holds a few pieces of the object: short ones that small reads share, or long ones that are requested ahead. Size
    and `tag`, which may be empty, are its `stamp`, which differs for other content; every request checks it.
    """

    def __init__(self, path: Path) -> None:
        self._url = str(path)
        start, info = store.get(self._url, 0, START)
        self.size, self.tag = self.stamp = info.size, info.tag
        self._ahead: Ahead | None = None
        self._lock = threading.Lock()
        self._small: dict[int, memoryview] = {0: start}
        self._long: dict[int, tuple[Future[memoryview], int]] = {}
        """The pieces requested ahead, each with the number of its bytes that were not read yet."""

    def read_ahead(self, ahead: Ahead, begin: int) -> None:
        """Request the bytes from an offset on, and from now on those after what is read."""
        self._ahead = ahead
        with self._lock:
            self._request(begin - begin % ahead.length, ahead)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view from an offset on; return how many bytes, 0 only at the end of the object."""
        data = self._taken_ahead(offset, len(view), self._ahead) if self._ahead else None
        if data is None and len(view) < START:
            data = self._small_piece(offset - offset % START)[offset % START :]
        elif data is None:
            data = self.get(offset, offset + len(view))
        count = min(len(view), len(data))
        view[:count] = data[:count]
        return count

    def _small_piece(self, begin: int) -> memoryview:
        if (piece := self._small.get(begin)) is None:
            piece = self.get(begin, begin + START)
            with self._lock:
                self._small[begin] = piece
                while len(self._small) > _MOST_PIECES:
                    del self._small[next(iter(self._small))]
        return piece

    def _taken_ahead(self, offset: int, count: int, ahead: Ahead) -> memoryview | None:
        """Return bytes of the piece at an offset; None for a short read that no piece has, far from others."""
        begin = offset - offset % ahead.length
        with self._lock:
            if begin not in self._long and count < START // 2:
                return None
            piece, unread = self._request(begin, ahead)
            count = min(count, begin + ahead.length - offset)
            self._long[begin] = piece, unread - count
            if unread <= count:
                del self._long[begin]
            self._request(begin + ahead.length, ahead)
        return piece.result()[offset - begin : offset - begin + count]

    def _request(self, begin: int, ahead: Ahead) -> tuple[Future[memoryview], int]:
        """Return the piece that begins at an offset, requested if it is neither here nor under way."""
        if begin not in self._long:
            end = max(begin, min(begin + ahead.length, self.size))
            piece = ahead.pool.submit(self.get, begin, end), end - begin
            if begin == end:
                return piece
            self._long[begin] = piece
            while len(self._long) > _MOST_PIECES:
                del self._long[next(iter(self._long))]
        return self._long[begin]

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
        self._ahead = None
        self._small.clear()
        self._long.clear()
