"""Reads of an object in a store by ranges, with prefetching of the ranges that will be read next."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from weakref import WeakSet

from posthoc_cli.errors import RemoteError
from posthoc_cli.remote import store
from posthoc_cli.remote.store import ObjectInfo

START = 256 * 1024
"""Bytes of the first request, enough for the header of most files; small reads elsewhere request as many."""

REQUESTS = 16
"""Prefetching requests in flight at a time, of all files together."""

AHEAD = 64 * 1024 * 1024
"""Bytes that are being prefetched, or are prefetched and not read yet, of all files together."""

_OPENING = 16
"""Objects whose first bytes are prefetched at a time."""

_LEAST, _MOST = 64 * 1024, 4 * 1024 * 1024
"""Bounds on the bytes of a prefetching request."""

_NEAR = 64 * 1024
"""Ranges that are no further apart than these bytes are one range."""

_THREADS = 4
"""Assumed number of threads that read one file, which decides the size of requests."""

_lock = threading.Lock()
_ahead = 0
_starts: dict[Path, Future[tuple[memoryview, ObjectInfo]]] = {}


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS, "ema-remote")


def starts_ahead(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the paths of objects that will be opened one after the other, and prefetch the first bytes of the next."""
    try:
        for number, path in enumerate(paths):
            for coming in paths[number : number + _OPENING]:
                if coming not in _starts:
                    _starts[coming] = _pool().submit(store.get, str(coming), 0, START)
            yield path
    finally:
        for path in paths:
            _starts.pop(path, None)


class RemoteBytes:
    """The bytes of an object, read at any offset by any number of threads; its replacement meanwhile is an error.

    Attributes:
        tag: the store's tag of the content; may be empty.
    """

    def __init__(self, path: Path) -> None:
        self._url = str(path)
        prefetched = _starts.pop(path, None)
        self._start: memoryview | None
        self._start, self._info = prefetched.result() if prefetched else store.get(self._url, 0, START)
        self.size, self.tag = self._info.size, self._info.tag
        self._prefetches: dict[int, _Prefetch] = {}
        _open.add(self)
        _piece(self, 0)

    @property
    def stamp(self) -> tuple[int, str]:
        """A value that changes when the object is replaced; with a tag every request has checked it."""
        info = self._info if self.tag else store.head(self._url)
        return info.size, info.tag or str(info.modified)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Prefetch the ranges that the calling thread will read in order, joined where they are near each other."""
        joined: list[tuple[int, int]] = []
        for begin, end in sorted((begin, end) for begin, end in ranges if max(begin, START) < end):
            if joined and begin - joined[-1][1] <= _NEAR:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((begin, end))
        thread = threading.get_ident()
        if thread in self._prefetches:
            self._prefetches.pop(thread).cancel()
        if joined:
            self._prefetches[thread] = _Prefetch(self, joined)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view from an offset on; return how many bytes, 0 only at the end of the object."""
        prefetch = self._prefetches.get(threading.get_ident())
        data = prefetch.take(offset, len(view)) if prefetch else None
        if data is None and len(view) < START:
            data = _piece(self, offset - offset % START)[offset % START :]
        elif data is None:
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
        """Drop what was prefetched."""
        _open.discard(self)
        for prefetch in self._prefetches.values():
            prefetch.cancel()


_open: WeakSet[RemoteBytes] = WeakSet()


@lru_cache(maxsize=64)
def _piece(file: RemoteBytes, begin: int) -> memoryview:
    """Return the `START` bytes of a file from an offset on, for reads that are smaller."""
    return file.take_start() or file.get(begin, begin + START)


class _Prefetch:
    """The ranges that one thread reads in order, cut into pieces, of which two are prefetched while `AHEAD` allows."""

    def __init__(self, file: RemoteBytes, ranges: Sequence[tuple[int, int]]) -> None:
        self._file, self._size = file, max(_LEAST, min(_MOST, AHEAD // (2 * _THREADS * len(_open))))
        size = self._size
        self._todo = deque((at, min(at + size, end)) for begin, end in ranges for at in range(begin, end, size))
        self._requested: deque[tuple[int, int, Future[memoryview]]] = deque()
        self._request()

    def _request(self) -> None:
        """Request the next pieces while there is room for them."""
        global _ahead
        free = 2 * self._size - sum(end - begin for begin, end, _ in self._requested)
        while self._todo and (count := self._todo[0][1] - self._todo[0][0]) <= free:
            with _lock:
                if _ahead + count > AHEAD:
                    return
                _ahead += count
            free -= count
            begin, end = self._todo.popleft()
            self._requested.append((begin, end, _pool().submit(self._file.get, begin, end)))

    def take(self, offset: int, count: int) -> memoryview | None:
        """Return up to `count` bytes from an offset on, those that one piece holds; None if no piece has the first."""
        while self._requested and self._requested[0][1] <= offset:
            self._drop()
        while self._todo and self._todo[0][1] <= offset:
            self._todo.popleft()
        if self._todo and self._todo[0][0] < offset:  # the bytes before it were not prefetched
            self._todo[0] = offset, self._todo[0][1]
        self._request()
        if not self._requested or self._requested[0][0] > offset:
            return None
        begin, end, request = self._requested[0]
        data = request.result()[offset - begin :][:count]
        if offset + len(data) == end:
            self._drop()
            self._request()
        return data

    def _drop(self) -> None:
        global _ahead
        begin, end, request = self._requested.popleft()
        request.cancel()
        with _lock:
            _ahead -= end - begin

    def cancel(self) -> None:
        """Drop all pieces."""
        self._todo.clear()
        while self._requested:
            self._drop()
