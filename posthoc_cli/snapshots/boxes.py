"""Boxes of a tensor's index space.

Training on several processes cuts a tensor into chunks, each a box. A reader asks for another box:
the complete tensor, or a chunk of another device mesh. Every box is stored in row-major order, so
that the elements of an intersection have the same order in both boxes."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided


@dataclass(frozen=True)
class Box:
    """A box of a tensor's index space: `shape` indices from `offset` on in each dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def full(cls, shape: Sequence[int]) -> Box:
        """Make the box of all indices of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> tuple[int, ...]:
        """The first index after the box in each dimension."""
        return tuple(map(operator.add, self.offset, self.shape))

    def intersection(self, other: Box) -> Box:
        """Intersect with another box; the result has size 0 if they have no common element."""
        begin = tuple(map(max, self.offset, other.offset))
        end = map(min, self.end, other.end)
        lengths = []
        for first, last in zip(begin, end, strict=True):
            lengths.append(max(0, last - first))
        return Box(begin, tuple(lengths))

    def span(self, inner: Box) -> tuple[int, int]:
        """Find the row-major positions in this box of the first element of `inner` and after its
        last one."""
        first = 0
        reach = 1
        for axis, step in enumerate(row_major(self.shape)):
            first += (inner.offset[axis] - self.offset[axis]) * step
            reach += (inner.shape[axis] - 1) * step
        return first, first + reach

    def view(
        self,
        elements: npt.NDArray[Any],
        inner: Box,
        first: int,
    ) -> npt.NDArray[Any]:
        """View the elements of `inner` among this box's row-major elements, which begin with number
        `first`."""
        begin, _ = self.span(inner)
        steps = [elements.itemsize * step for step in row_major(self.shape)]
        return as_strided(elements[begin - first :], inner.shape, steps)


@dataclass(frozen=True)
class Chunk:
    """The place of a chunk: the `shape` of the complete tensor and the `offset` of the chunk's
    first element."""

    shape: tuple[int, ...]
    offset: tuple[int, ...]

    def box(self, shape: tuple[int, ...]) -> Box:
        """Make the chunk's box, given its own shape."""
        return Box(self.offset, shape)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Compute the row-major strides of a shape, in elements."""
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return tuple(reversed(strides))


def boxes_of_range(
    box: Box,
    begin: int,
    end: int,
) -> Iterator[Box]:
    """Yield the row-major elements `begin` to `end` of a box as boxes, in order: less than two per
    dimension."""
    if begin >= end:
        return
    if not box.shape:
        yield box
        return
    inner = Box(box.offset[1:], box.shape[1:])
    row = inner.size
    while begin < end:
        index, within = divmod(begin, row)
        at = box.offset[0] + index
        count = (end - begin) // row if within == 0 else 0
        if count:
            yield Box((at, *inner.offset), (count, *inner.shape))
        else:
            last = min(within + end - begin, row)
            for part in boxes_of_range(inner, within, last):
                yield Box((at, *part.offset), (1, *part.shape))
        begin = (index + max(count, 1)) * row


def cover_problem(
    shape: Sequence[int],
    chunks: Sequence[Box],
) -> str | None:
    """Say why chunks do not hold each element of a tensor exactly once; None if they do.

    Chunks of a mesh are the cells of a grid: each dimension is cut into intervals, and every
    combination occurs once. Chunks without elements are ignored.
    """
    filled = [chunk for chunk in chunks if chunk.size]
    is_empty = not filled and 0 in shape
    if chunks and (is_empty or _are_cells(filled, shape)):
        return None
    return "its chunks do not hold each element exactly once"


def _are_cells(
    chunks: Sequence[Box],
    shape: Sequence[int],
) -> bool:
    """Return whether chunks are all cells of a grid over a shape, each once."""
    cells = 1
    for axis, length in enumerate(shape):
        intervals = sorted({(chunk.offset[axis], chunk.end[axis]) for chunk in chunks})
        begins = [begin for begin, _ in intervals]
        ends = [end for _, end in intervals]
        if [0, *ends] != [*begins, length]:
            return False
        cells *= len(intervals)
    return len({*chunks}) == len(chunks) == cells
