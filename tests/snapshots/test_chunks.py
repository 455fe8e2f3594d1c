"""Chunks of tensors: boxes assembled from any chunks equal NumPy's own indexing."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

from posthoc_cli.snapshots.chunks import Box, cover_problem

SHAPES = [(), (1,), (7,), (5, 3), (4, 1, 6), (3, 4, 2, 2), (0, 3)]


@dataclass
class Stored:
    """The elements of a chunk, which may only be read forwards."""

    values: npt.NDArray[np.int64]
    position: int = 0

    def read(self, begin: int, end: int) -> npt.NDArray[np.int64]:
        assert self.position <= begin < end <= self.values.size
        self.position = end
        return self.values[begin:end].copy()


def cut(rng: np.random.Generator, shape: tuple[int, ...], most: int = 3) -> list[Box]:
    """Return a grid of chunks with random cuts, some of them empty, in random order."""
    boxes = [Box.full(shape)]
    for axis, length in enumerate(shape):
        cuts = sorted([0, length, *rng.integers(0, length + 1, rng.integers(0, most)).tolist()])
        boxes = [
            Box(
                (*box.offset[:axis], first, *box.offset[axis + 1 :]),
                (*box.shape[:axis], last - first, *box.shape[axis + 1 :]),
            )
            for box in boxes
            for first, last in itertools.pairwise(cuts)
        ]
    rng.shuffle(boxes)  # type: ignore[arg-type]
    return boxes


def slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(first, last) for first, last in zip(box.offset, box.end, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_any_box_is_assembled_from_any_chunks(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor = rng.integers(0, 2**62, shape)
    for wanted in cut(rng, shape):
        stored = [(box, Stored(np.ascontiguousarray(tensor[slices(box)]).reshape(-1)).read) for box in cut(rng, shape)]
        expected = tensor[slices(wanted)].reshape(-1)
        found = np.empty_like(expected)
        edges = sorted([0, wanted.size, *rng.integers(0, wanted.size + 1, 4).tolist()])
        for begin, end in itertools.pairwise(edges):
            copy_range(found[begin:end], wanted, begin, stored)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_a_grid_covers_a_tensor_once(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = cut(rng, shape)
    assert cover_problem(shape, boxes) is None
    filled = [box for box in boxes if box.size]
    for box in filled:
        others = [other for other in boxes if other is not box]
        assert cover_problem(shape, others) == "elements are missing"
        assert cover_problem(shape, [*boxes, box]) == "chunks overlap"


def test_chunks_that_do_not_cover_a_tensor_once_are_named() -> None:
    assert cover_problem((0, 3), []) == "has no chunk"
    assert cover_problem((4,), [Box((0,), (3,)), Box((2,), (2,))]) == "chunks overlap"
    assert cover_problem((4,), [Box((0,), (2,)), Box((3,), (1,))]) == "elements are missing"
    assert cover_problem((4,), [Box((0,), (5,))]) == "a chunk reaches beyond the tensor"
    diagonal = [Box((0, 0), (2, 2)), Box((2, 2), (2, 2))]
    assert cover_problem((4, 4), diagonal) == "elements are missing"
