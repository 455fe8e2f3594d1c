"""Boxes of tensors: which elements of a tensor a file holds, and which ones a reader wants.

Training on several processes cuts a tensor into chunks, each a box of its index space. A reader asks for another box:
the complete tensor, or a chunk of another device mesh. Every box is stored in row-major order, so that the elements of
an intersection have the same order in both boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Box:
    """A box of a tensor's index space: `shape` indices from `offset` on in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def full(cls, shape: Sequence[int]) -> Box:
        """Return the box of all indices of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """The first index after the box in each dimension."""
        return tuple(begin + length for begin, length in zip(self.offset, self.shape, strict=True))

    def intersection(self, other: Box) -> Box:
        """Return the intersection with another box, of size 0 if they have no common element."""
        begin = tuple(map(max, self.offset, other.offset))
        lengths = (max(0, last - first) for first, last in zip(begin, map(min, self.end, other.end), strict=True))
        return Box(begin, tuple(lengths))

    def span(self, inner: Box) -> tuple[int, int]:
        """Return the row-major positions in this box of the first element of `inner` and after its last one."""
        strides = row_major(self.shape)
        first = sum((at - begin) * step for at, begin, step in zip(inner.offset, self.offset, strides, strict=True))
        return first, first + sum((length - 1) * step for length, step in zip(inner.shape, strides, strict=True)) + 1


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the row-major strides of a shape, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def boxes_of_range(box: Box, begin: int, end: int) -> Iterator[Box]:
    """Yield the row-major elements `begin` to `end` of a box as boxes, in order: less than two per dimension."""
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


def cover_problem(shape: Sequence[int], chunks: Sequence[Box]) -> str | None:
    """Return why chunks do not hold each element of a tensor exactly once; None if they do.

    Chunks of a mesh are the cells of a grid: each dimension is cut into intervals, and every combination occurs once.
    Chunks without elements are ignored.
    """
    filled = [chunk for chunk in chunks if chunk.size]
    if any(last > length for chunk in filled for last, length in zip(chunk.end, shape, strict=True)):
        return "a chunk reaches beyond the tensor"
    if not math.prod(shape):
        return None if chunks else "has no chunk"
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
    """The position of a chunk: the `shape` of the complete tensor and the `offset` of the chunk's first element."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def box(self, shape: tuple[int, ...]) -> Box:
        """Return the chunk's box, given its own shape."""
        return Box(self.offset, shape)
