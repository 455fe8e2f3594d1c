"""Every byte of a file against its checksums, on all cores and in constant memory; values that are not finite."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from posthoc_cli.dtypes import DTYPES
from posthoc_cli.errors import FileFormatError
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.reader import TensorFile

THREADS = 8
"""Blocks that are read at a time: some devices need several requests in flight."""

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Piece:
    """The bytes `begin` to `end` of a tensor, within one of its blocks."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Checked:
    """What was found in some bytes of a payload.

    Attributes:
        nbytes: how many.
        damaged: tensors that are not what their checksums say.
        error: what is wrong with the first of them.
        nonfinite: tensors that hold nan or infinity.
    """

    nbytes: int
    damaged: tuple[str, ...] = ()
    error: FileFormatError | None = None
    nonfinite: tuple[str, ...] = ()


def verify_payload(path: Path, header: fmt.FileHeader, progress: Callable[[int], object] | None = None) -> None:
    """Read a file and check each block of each tensor. Memory: a block a thread.

    Arguments:
        path: the file.
        header: what it must still have.
        progress: called with the bytes that were read, in this thread.

    Raises:
        FileFormatError: the file was replaced, or naming it and the tensor that is damaged.
    """
    with TensorFile(path, header) as file, closing(check_payload(file)) as found:
        for checked in found:
            if checked.error is not None:
                raise checked.error
            if progress is not None:
                progress(checked.nbytes)


def check_payload(file: TensorFile) -> Generator[Checked, None, None]:
    """What is in the bytes of a file, from its first to its last; goes on where something is wrong."""
    check = _Check(file)
    jobs = _pieces(file.header)
    first = list(islice(jobs, 2))
    if len(first) < 2:  # threads take longer to start than to read a small file
        yield from map(check, first)
        return
    with worker_threads() as pool:
        yield from in_order(pool, check, chain(first, jobs))


class _Check:
    """Reads some pieces that follow each other in a file, and looks at them."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._own = threading.local()

    def __call__(self, pieces: Sequence[Piece]) -> Checked:
        nbytes = sum(piece.end - piece.begin for piece in pieces)
        view = self._room()[:nbytes]
        try:
            self._file.fill(pieces[0].name, view, pieces[0].begin)
        except FileFormatError as error:
            return Checked(nbytes, tuple(piece.name for piece in pieces), error)
        damaged, begin = [], 0
        for piece in pieces:
            end = begin + piece.end - piece.begin
            expected = self._file.checksum(piece.name, piece.begin // fmt.BLOCK_BYTES)
            if expected is not None and xxhash.xxh3_64_hexdigest(view[begin:end]) != expected:
                damaged.append(piece.name)
            begin = end
        wrong = self._file.damaged(damaged[0]) if damaged else None
        return Checked(nbytes, tuple(damaged), wrong, self._nonfinite(pieces, view))

    def _room(self) -> memoryview:
        if not hasattr(self._own, "room"):
            self._own.room = memoryview(bytearray(fmt.BLOCK_BYTES))
        room: memoryview = self._own.room
        return room

    def _nonfinite(self, pieces: Sequence[Piece], view: memoryview) -> tuple[str, ...]:
        """Neighbours of one dtype are looked at together, and one by one only where there is something."""
        tensors = self._file.header.tensors
        found: list[str] = []
        begin = 0
        for dtype, group in groupby(pieces, lambda piece: tensors[piece.name].dtype):
            own = list(group)
            end = begin + sum(piece.end - piece.begin for piece in own)
            if holds_nonfinite(view[begin:end], dtype):
                place = begin
                for piece in own:
                    stop = place + piece.end - piece.begin
                    if holds_nonfinite(view[place:stop], dtype):
                        found.append(piece.name)
                    place = stop
            begin = end
        return tuple(found)


def holds_nonfinite(data: memoryview, dtype: str) -> bool:
    """Whether little-endian numbers of a dtype (a safetensors name) have nan or infinity among them.

    Without their signs, the bits of floating-point numbers are in the order of the numbers, and what is not finite
    comes last. As signed integers the positive ones are in this order, and all others below; as unsigned ones the
    negative ones are, and all others below. So the two largest tell, without a copy.
    """
    item, least = DTYPES[dtype].nbytes, DTYPES[dtype].first_nonfinite
    if not least or not len(data):
        return False
    sign = 1 << (8 * item - 1)
    signed = np.frombuffer(data, f"<i{item}")
    return int(signed.max()) >= least or int(signed.view(f"<u{item}").max()) >= sign | least


def _pieces(header: fmt.FileHeader) -> Iterator[list[Piece]]:
    """The whole payload from its first byte to its last, in pieces of at most a block together."""
    batch: list[Piece] = []
    room = fmt.BLOCK_BYTES
    for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].begin):
        for begin in range(0, entry.nbytes, fmt.BLOCK_BYTES):
            piece = Piece(name, begin, min(begin + fmt.BLOCK_BYTES, entry.nbytes))
            if piece.end - begin > room:
                yield batch
                batch, room = [], fmt.BLOCK_BYTES
            batch.append(piece)
            room -= piece.end - begin
    if batch:
        yield batch


# --- threads ---------------------------------------------------------------------------------------


@contextmanager
def worker_threads(count: int = THREADS) -> Iterator[Executor]:
    """Threads for the block; at its end, also on error, they finish what they have begun and nothing else."""
    pool = ThreadPoolExecutor(count, "ema-verify")
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
    """What a function makes of each item, in their order; only some are under way, however many there are."""
    under_way: deque[Future[_Result]] = deque()
    for item in items:
        under_way.append(pool.submit(function, item))
        if len(under_way) > 4 * THREADS:
            yield under_way.popleft().result()
    while under_way:
        yield under_way.popleft().result()
