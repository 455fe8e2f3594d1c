"""Chunks of tensors: which elements of a tensor a file holds, and how a range of one chunk is read from others.

Training on several processes cuts a tensor into chunks, each a box of its index space. A reader wants a box of its own:
a complete tensor, or the chunk of another mesh. Elements of a box are in row-major order wherever they are stored, so
that those of an intersection come in the same order from each side, and each file is read forwards only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided


@dataclass(frozen=True)
class Box:
    """Indices of a tensor: from `offset` on, `shape` of them, in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All indices of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """The first index after it, in each dimension."""
        return tuple(begin + length for begin, length in zip(self.offset, self.shape, strict=True))

    def meet(self, other: Box) -> Box:
        """The intersection; of size 0 where they have no element in common."""
        begin = tuple(map(max, self.offset, other.offset))
        lengths = (max(0, last - first) for first, last in zip(begin, map(min, self.end, other.end), strict=True))
        return Box(begin, tuple(lengths))

    def span(self, inner: Box) -> tuple[int, int]:
        """The row-major positions, in this box, of the first element of a box within it, and after its last."""
        strides = row_major(self.shape)
        first = sum((at - own) * step for at, own, step in zip(inner.offset, self.offset, strides, strict=True))
        return first, first + sum((length - 1) * step for length, step in zip(inner.shape, strides, strict=True)) + 1


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one index to the next, in each dimension."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def boxes_of_range(box: Box, begin: int, end: int) -> Iterator[Box]:
    """The row-major elements `begin` to `end` of a box, as boxes, in order: less than two for each dimension."""
    if begin >= end:
        return
    if not box.shape:
        yield box
        return
    inner = Box(box.offset[1:], box.shape[1:])
    row = inner.size
    index, position = begin // row, begin
    while position < end:
        if position % row == 0 and end - position >= row:
            count = (end - position) // row
            yield Box((box.offset[0] + index, *inner.offset), (count, *inner.shape))
        else:
            count = 1
            stop = min(end, (index + 1) * row)
            for part in boxes_of_range(inner, position - index * row, stop - index * row):
                yield Box((box.offset[0] + index, *part.offset), (1, *part.shape))
        index += count
        position = min(end, index * row)


ForwardReader = Callable[[int, int], npt.NDArray[Any]]
"""Gives stored elements of one chunk, from one to another: shape [end - begin]; never before those that it gave."""


def copy_range(into: npt.NDArray[Any], wanted: Box, begin: int, chunks: Sequence[tuple[Box, ForwardReader]]) -> None:
    """Fill `into` with the row-major elements of the box `wanted` from `begin` on.

    Arguments:
        into: contiguous: shape [count], of the dtype of the stored elements.
        chunks: boxes of the same tensor that cover these elements, each with its stored elements.
    """
    strides = [into.itemsize * step for step in row_major(wanted.shape)]
    for part in boxes_of_range(wanted, begin, begin + into.size):
        for chunk, read in chunks:
            common = chunk.meet(part)
            if not common.size:
                continue
            stored = read(*chunk.span(common))
            steps = [stored.itemsize * step for step in row_major(chunk.shape)]
            first, last = wanted.span(common)
            target = as_strided(into[first - begin : last - begin], common.shape, strides)
            target[...] = as_strided(stored, common.shape, steps)


def cover_problem(shape: Sequence[int], chunks: Sequence[Box]) -> str | None:
    """Why chunks do not hold each element of a tensor exactly once; None if they do.

    Chunks of a mesh are the cells of a grid: each dimension is cut into intervals, and every combination is there once.
    Chunks without elements do not count.
    """
    filled = [chunk for chunk in chunks if chunk.size]
    if any(last > length for chunk in filled for last, length in zip(chunk.end, shape, strict=True)):
        return "a chunk reaches beyond the tensor"
    if not math.prod(shape):
        return None if chunks else "no chunk of it is there"
    cells = 1
    for axis, length in enumerate(shape):
        cuts = sorted({(chunk.offset[axis], chunk.end[axis]) for chunk in filled})
        edges = [(0, 0), *cuts, (length, length)]
        if any(before[1] < after[0] for before, after in pairwise(edges)):
            return "elements are missing"
        if any(before[1] > after[0] for before, after in pairwise(edges)):
            return "chunks overlap"
        cells *= len(cuts)
    if len(set(filled)) < len(filled):
        return "chunks overlap"
    return None if len(filled) == cells else "elements are missing"


@dataclass(frozen=True)
class Chunk:
    """Where the elements of a file's tensor belong: the `shape` of the complete tensor, the `offset` of the first."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def box(self, shape: tuple[int, ...]) -> Box:
        """Its indices, for a tensor of this shape in the file."""
        return Box(self.offset, shape)
