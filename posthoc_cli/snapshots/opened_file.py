"""A file, or an object in a store, open for reading at any offset."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from posthoc_cli import files
from posthoc_cli.errors import FileFormatError, RemoteError, UnsuitableError, VanishedError

if TYPE_CHECKING:
    from posthoc_cli.remote import RemoteBytes


# requests to a store, or blocks to verify, at a time: they wait more than they compute
THREADS = 16
SHORTER = "became shorter while it was read"
_NEAR = 16_384  # bytes: reading so many more takes about as long as a further request
_TOGETHER = 4_000_000  # most bytes that are read together, but for a single longer span
Span = tuple[int, int]
"""Where bytes begin and end in a file."""
S = TypeVar("S")

T = TypeVar("T")


@contextmanager
def named_on_error(path: Path, verb: str) -> Iterator[None]:
    """Turn the system's errors in the block into a FileFormatError: the file "cannot be {verb}", as
    "opened"."""
    try:
        yield
    except RemoteError:
        raise
    except OSError as error:
        # ESTALE: on a network file system another host has removed a file that is open here.
        kind = VanishedError if error.errno in (errno.ENOENT, errno.ESTALE) else FileFormatError
        reason = error.strerror or str(error)
        hint = ""
        if error.errno == errno.EMFILE:
            hint = "raise the limit of open files, as with ulimit -n 4096"
        raise kind(path, f"cannot be {verb}: {reason.lower()}", hint) from error
    except ValueError as error:
        reason = "no file can have this name"
        raise FileFormatError(f"{str(path)!r}", f"cannot be {verb}: {reason}") from error


class OpenedFile:
    """A regular file or one in a store, open for reading at any offset by any number of threads.

    It is a context manager.

    Attributes:
        size: its length in bytes.
        tag: what a store says that differs for other content; empty for a file.
        stamp: a value that changes when the file is written to, as it was at the opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tag = ""
        self.remote: RemoteBytes | None = None
        with named_on_error(path, "opened"):
            if files.is_url(path):
                from posthoc_cli.remote import RemoteBytes

                self.remote = RemoteBytes(path)
                self.size = self.remote.size
                self.tag = self.remote.tag
                self.stamp: tuple[int, int | str] = self.size, self.tag
                return
            self._descriptor = files.system.open(path)
            status = os.fstat(self._descriptor)
            self.size = status.st_size
            self.stamp = self.size, status.st_mtime_ns
            if not stat.S_ISREG(status.st_mode):
                self.close()
                raise UnsuitableError(path, "is not a regular file")

    def is_changed(self) -> bool:
        """Return whether the file was written to since the opening."""
        if self.remote:
            with named_on_error(self.path, "read"):
                return self.remote.stamp() != self.stamp
        status = os.fstat(self._descriptor)
        return (status.st_size, status.st_mtime_ns) != self.stamp

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with the bytes from an offset on; return the number read, smaller only at the
        end of the file."""
        done = 0
        count = 1
        with named_on_error(self.path, "read"):
            while done < len(view) and count:
                rest = view[done:]
                at = offset + done
                if self.remote:
                    count = self.remote.read(rest, at)
                else:
                    count = files.system.read(self._descriptor, rest, at)
                done += count
        return done

    def read_at(self, count: int, offset: int) -> bytes:
        """Read `count` bytes at an offset, fewer at the end of the file."""
        buffer = bytearray(count)
        count = self.read_into(memoryview(buffer), offset)
        return bytes(buffer[:count])

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill `view` with bytes from an offset on; raise FileFormatError if there are fewer."""
        if self.read_into(view, offset) < len(view):
            raise FileFormatError(self.path, SHORTER)

    def read_spans(self, spans: Sequence[Span]) -> npt.NDArray[np.uint8]:
        """Read ranges of bytes, end to end, those near each other by one request; raise
        FileFormatError if the file ends before one of them."""
        places = [*accumulate((end - begin for begin, end in spans), initial=0)]
        data = np.empty(places[-1], np.uint8)
        view = data.data
        for group in _group_near(spans):
            first, _ = spans[group[0]]
            last = max(spans[index][1] for index in group)
            piece = np.empty(last - first, np.uint8).data
            self.fill(piece, first)
            for index in group:
                begin, end = spans[index]
                view[places[index] : places[index + 1]] = piece[begin - first : end - first]
        return data

    def close(self) -> None:
        if self.remote:
            self.remote.close()
        else:
            files.system.close(self._descriptor)

    def __enter__(self) -> OpenedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _group_near(spans: Sequence[Span]) -> Iterator[list[int]]:
    """Yield the indices of spans that are read together, in their order in the file."""
    group = list[int]()
    first = last = 0
    for index in sorted(range(len(spans)), key=spans.__getitem__):
        begin, end = spans[index]
        if group and (begin - last > _NEAR or end - first > _TOGETHER):
            yield group
            group = []
        if not group:
            first = begin
            last = end
        group.append(index)
        last = max(last, end)
    if group:
        yield group


def read_small_file(path: Path, most: int) -> bytes:
    """Read the content of a regular file; raise FileFormatError if it has more than `most`
    bytes."""
    with OpenedFile(path) as file:
        if file.size > most:
            raise FileFormatError(path, f"has {file.size:,} bytes; at most {most:,} are allowed")
        return file.read_at(file.size, 0)


def file_size(path: Path) -> int:
    """Find the size of a file or object for a progress bar; 0 if it is unknown."""
    with suppress(OSError):
        return path.stat().st_size
    return 0


# the number and size of the pieces of a file from which its identity is computed
_SAMPLES = 16
_SAMPLE = 4096


def sampled_identity(file: OpenedFile) -> str:
    """Compute 16 hexadecimal digits from a file's size and evenly spaced pieces of its content; for
    an object with a tag from its size and the tag."""
    size = file.size.to_bytes(8, "little")
    digest = xxhash.xxh3_64(size + file.tag.encode())
    last = max(0, file.size - _SAMPLE)
    for index in range(0 if file.tag else _SAMPLES):
        position = last * index // (_SAMPLES - 1)
        digest.update(file.read_at(_SAMPLE, position))
    return digest.hexdigest()


def in_turn(
    work: Callable[[S], T],
    things: Sequence[S],
    at_once: bool,
) -> Iterator[T]:
    """Yield the result of `work` for each thing, in order; with `at_once` for several at a time, as
    requests to a store wait more than they compute."""
    if not at_once:
        yield from map(work, things)
        return
    with ThreadPoolExecutor(THREADS, "ema-in-turn") as pool:
        yield from pool.map(work, things)
