"""The bytes of an object in a store, by ranges; those that are expected to be read are asked for ahead."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

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

_KEPT = 64
"""Pieces of small reads that are kept, of all files."""

_LEAST, _MOST = 64 * 1024, 4 * 1024 * 1024
"""Bytes of a request ahead."""

_NEAR = 64 * 1024
"""Bytes between two ranges that are read rather than passed over by another request."""

_THREADS = 4
"""Ranges of one file that are read at a time, for the size of requests."""

_lock = threading.Lock()
_kept: OrderedDict[tuple[int, int], memoryview] = OrderedDict()
_open: set[int] = set()
_ahead = 0
_starts: dict[str, Future[tuple[memoryview, Known]]] = {}


@lru_cache(maxsize=1)
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(REQUESTS, "ema-remote")


def starts_ahead(paths: Iterable[Path]) -> Iterator[Path]:
    """The same paths, of objects that will be opened one after the other: the starts of the next ones are asked for."""
    waiting: deque[Path] = deque()
    try:
        for path in paths:
            if not (getattr(path, "is_spooled", False) and os.path.lexists(path)):
                _starts[str(path)] = _threads().submit(store.get, str(path), 0, START)
            waiting.append(path)
            if len(waiting) > _OPENING:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        for path in waiting:
            _starts.pop(str(path), None)


class RemoteBytes:
    """An object that is read at any place by any number of threads; one that was replaced meanwhile is an error."""

    def __init__(self, path: Path) -> None:
        self._url = str(path)
        asked = _starts.pop(self._url, None)
        start, self._known = asked.result() if asked else store.get(self._url, 0, START)
        self.size = self._known.size
        self._streams: list[_Stream] = []
        _keep((id(self), 0), start)
        with _lock:
            _open.add(id(self))

    @property
    def tag(self) -> str:
        """What tells the object from others of its name; may be empty."""
        return self._known.tag

    @property
    def stamp(self) -> tuple[int, str]:
        """Another one when the object was replaced. With a tag every request has asked that it was not."""
        found = self._known if self.tag else store.head(self._url)
        return found.size, found.tag or str(found.modified)

    def expect(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Ask ahead for bytes that the calling thread will read in order; ranges that are near each other are one."""
        piece = max(_LEAST, min(_MOST, AHEAD // (2 * _THREADS * len(_open))))
        joined: list[tuple[int, int]] = []
        for begin, end in sorted(one for one in ranges if max(one[0], START) < one[1]):  # the start is there
            if joined and begin - joined[-1][1] <= _NEAR:
                joined[-1] = joined[-1][0], max(end, joined[-1][1])
            else:
                joined.append((begin, end))
        streams = [_Stream(self, begin, end, piece) for begin, end in joined]
        own = threading.get_ident()
        with _lock:
            gone = [one for one in self._streams if one.thread == own]
            self._streams = [one for one in self._streams if one.thread != own] + streams
        for one in gone:
            one.cancel()

    def read(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a view from a place on; returns how many bytes, 0 only at the end of the object."""
        own = threading.get_ident()
        with _lock:
            stream = next((one for one in self._streams if one.thread == own and one.at <= offset < one.end), None)
        if stream is not None:
            data = stream.take(offset, len(view))
            if stream.at == stream.end:
                with _lock:
                    self._streams.remove(stream)
        elif len(view) < START:
            data = self._small(offset)
        else:
            data = self.get(offset, min(offset + len(view), self.size))
        count = min(len(view), len(data))
        view[:count] = data[:count]
        return count

    def _small(self, offset: int) -> memoryview:
        """The bytes from a place to the end of the piece that it is in."""
        first = offset - offset % START
        with _lock:
            piece = _kept.get((id(self), first))
        if piece is None:
            piece = self.get(first, min(first + START, self.size))
            _keep((id(self), first), piece)
        return piece[offset - first :]

    def get(self, begin: int, end: int) -> memoryview:
        """The bytes of a range, by one request."""
        if begin >= end:
            return memoryview(b"")
        data, found = store.get(self._url, begin, end, self.tag)
        if (found.size, found.tag) != (self.size, self.tag):
            raise RemoteError(self._url, "was replaced while it was being used", "run again")
        if len(data) != end - begin:
            raise RemoteError(self._url, f"cannot be read: the answer has {len(data):,} bytes of {end - begin:,}")
        return data

    def close(self) -> None:
        """Drop what was asked for."""
        with _lock:
            streams, self._streams = self._streams, []
            _open.discard(id(self))
            for key in [key for key in _kept if key[0] == id(self)]:
                del _kept[key]
        for stream in streams:
            stream.cancel()


def _keep(key: tuple[int, int], piece: memoryview) -> None:
    with _lock:
        _kept[key] = piece
        if len(_kept) > _KEPT:
            _kept.popitem(last=False)


class _Stream:
    """A range that one thread reads in order, in pieces: two are asked for ahead while there is room for them."""

    def __init__(self, file: RemoteBytes, begin: int, end: int, piece: int) -> None:
        self.thread, self.at, self.end = threading.get_ident(), begin, end
        self._file, self._piece, self._next = file, piece, begin
        self._asked: list[tuple[int, int, Future[memoryview]]] = []
        self._ask()

    def _ask(self) -> None:
        global _ahead
        while len(self._asked) < 2 and self._next < self.end:
            begin, end = self._next, min(self._next + self._piece, self.end)
            with _lock:
                if _ahead + end - begin > AHEAD:
                    return
                _ahead += end - begin
            self._asked.append((begin, end, _threads().submit(self._file.get, begin, end)))
            self._next = end

    def take(self, offset: int, count: int) -> memoryview:
        """The bytes from a place on, as many as one piece has of those that are wanted."""
        while self._asked and self._asked[0][1] <= offset:
            self._drop()
        if not self._asked:  # there was no room, or the place is behind what was asked for
            self.at = self._next = min(offset + count, self.end)
            self._ask()
            return self._file.get(offset, self.at)
        begin, end, asked = self._asked[0]
        data = asked.result()[offset - begin :][:count]
        self.at = offset + len(data)
        if self.at == end:
            self._drop()
        self._ask()
        return data

    def _drop(self) -> None:
        global _ahead
        begin, end, asked = self._asked.pop(0)
        asked.cancel()
        with _lock:
            _ahead -= end - begin

    def cancel(self) -> None:
        """Drop all that was asked for."""
        self._next = self.end
        while self._asked:
            self._drop()
