"""The bytes of an object in a store, by ranges; those that are expected to be read are asked for ahead."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from weakref import WeakSet

from posthoc_cli.errors import RemoteError
from posthoc_cli.remote import store
from posthoc_cli.remote.store import Known

START = 256 * 1024
"""Bytes of the first request, which has the header of most files; small reads elsewhere ask for as many."""

REQUESTS = 16
"""Requests ahead that are in flight at a time, of all files."""

AHEAD = 64 * 1024 * 1024
"""Bytes that are asked for ahead, or have come and wait to be read, of all files."""

_OPENING = 16
"""Objects whose start is asked for ahead."""

_LEAST, _MOST = 64 * 1024, 4 * 1024 * 1024
"""Bytes of a request ahead."""

_NEAR = 64 * 1024
"""Bytes between two ranges that are read rather than passed over by another request."""

_THREADS = 4
"""Ranges of one file that are read at a time, for the size of requests."""

_lock = threading.Lock()
_ahead = 0
_starts: dict[Path, Future[tuple[memoryview, Known]]] = {}


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS, "ema-remote")


def starts_ahead(paths: Sequence[Path]) -> Iterator[Path]:
    """The same paths, of objects that will be opened one after the other: the starts of the next ones are asked for."""
    try:
        for number, path in enumerate(paths):
            for one in paths[number : number + _OPENING]:
                if one not in _starts and not (getattr(one, "is_spooled", False) and os.path.lexists(one)):
                    _starts[one] = _threads().submit(store.get, str(one), 0, START)
            yield path
    finally:
        for path in paths:
            _starts.pop(path, None)


class RemoteBytes:
    """An object that is read at any place by any number of threads; one that was replaced meanwhile is an error.

    Attributes:
        tag: what tells the object from others of its name; may be empty.
    """

    def __init__(self, path: Path) -> None:
        self._url = str(path)
        asked = _starts.pop(path, None)
        self._start: memoryview | None
        self._start, self._known = asked.result() if asked else store.get(self._url, 0, START)
        self.size, self.tag = self._known.size, self._known.tag
        self._plans: dict[int, _Plan] = {}
        _open.add(self)
        _piece(self, 0)

    @property
    def stamp(self) -> tuple[int, str]:
        """Another one when the object was replaced. With a tag every request has asked that it was not."""
        found = self._known if self.tag else store.head(self._url)
        return found.size, found.tag or str(found.modified)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Ask ahead for bytes that the calling thread will read in order; ranges that are near each other are one."""
        joined: list[tuple[int, int]] = []
        for begin, end in sorted(one for one in ranges if max(one[0], START) < one[1]):  # the start is there
            if joined and begin - joined[-1][1] <= _NEAR:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((begin, end))
        own = threading.get_ident()
        if own in self._plans:
            self._plans.pop(own).cancel()
        if joined:
            self._plans[own] = _Plan(self, joined)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view from a place on; returns how many bytes, 0 only at the end of the object."""
        plan = self._plans.get(threading.get_ident())
        data = plan.take(offset, len(view)) if plan else None
        if data is None and len(view) < START:
            data = _piece(self, offset - offset % START)[offset % START :]
        elif data is None:
            data = self.get(offset, offset + len(view))
        count = min(len(view), len(data))
        view[:count] = data[:count]
        return count

    def get(self, begin: int, end: int) -> memoryview:
        """The bytes of a range, by one request; fewer at the end of the object."""
        end = min(end, self.size)
        if begin >= end:
            return memoryview(b"")
        data, found = store.get(self._url, begin, end, self.tag)
        if (found.size, found.tag) != (self.size, self.tag):
            raise RemoteError(self._url, "was replaced while it was being used", "run again")
        if len(data) != end - begin:
            raise RemoteError(self._url, f"cannot be read: the answer has {len(data):,} bytes of {end - begin:,}")
        return data

    def take_start(self) -> memoryview | None:
        """What the first request has brought, once."""
        start, self._start = self._start, None
        return start

    def close(self) -> None:
        """Drop what was asked for."""
        _open.discard(self)
        for plan in self._plans.values():
            plan.cancel()


_open: WeakSet[RemoteBytes] = WeakSet()


@lru_cache(maxsize=64)
def _piece(file: RemoteBytes, begin: int) -> memoryview:
    """The piece from a place on of a file that is read in small parts."""
    return file.take_start() or file.get(begin, begin + START)


class _Plan:
    """Ranges that one thread reads in order, in pieces: two are asked for ahead while there is room for them."""

    def __init__(self, file: RemoteBytes, ranges: Sequence[tuple[int, int]]) -> None:
        self._file, self._size = file, max(_LEAST, min(_MOST, AHEAD // (2 * _THREADS * len(_open))))
        size = self._size
        self._todo = deque((at, min(at + size, end)) for begin, end in ranges for at in range(begin, end, size))
        self._asked: deque[tuple[int, int, Future[memoryview]]] = deque()
        self._ask()

    def _ask(self) -> None:
        global _ahead
        free = 2 * self._size - sum(end - begin for begin, end, _ in self._asked)
        while self._todo and (count := self._todo[0][1] - self._todo[0][0]) <= free:
            with _lock:
                if _ahead + count > AHEAD:
                    return
                _ahead += count
            free -= count
            begin, end = self._todo.popleft()
            self._asked.append((begin, end, _threads().submit(self._file.get, begin, end)))

    def take(self, offset: int, count: int) -> memoryview | None:
        """The bytes from a place on, as many as one piece has of those that are wanted; None where none has any."""
        while self._asked and self._asked[0][1] <= offset:
            self._drop()
        while self._todo and self._todo[0][1] <= offset:
            self._todo.popleft()
        if self._todo and self._todo[0][0] < offset:  # there was no room for what is before
            self._todo[0] = offset, self._todo[0][1]
        self._ask()
        if not self._asked or self._asked[0][0] > offset:
            return None
        begin, end, asked = self._asked[0]
        data = asked.result()[offset - begin :][:count]
        if offset + len(data) == end:
            self._drop()
            self._ask()
        return data

    def _drop(self) -> None:
        global _ahead
        begin, end, asked = self._asked.popleft()
        asked.cancel()
        with _lock:
            _ahead -= end - begin

    def cancel(self) -> None:
        """Drop all that was asked for."""
        self._todo.clear()
        while self._asked:
            self._drop()
