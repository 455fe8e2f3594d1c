"""Chunks of tensors: boxes assembled from any chunks equal NumPy's own indexing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from posthoc_cli.snapshots.sources import Source
from posthoc_cli.snapshots.tensorfile import Box, Entry, cover_problem

SHAPES = [(), (1,), (7,), (5, 3), (4, 1, 6), (3, 4, 2, 2), (0, 3)]


class Parts(Source):
    """A tensor in chunks that are in memory, each with its box."""

    identity = clock_pairs = average = None  # type: ignore[assignment]

    def __init__(self, chunks: list[tuple[Box, np.ndarray]], shape: tuple[int, ...]) -> None:
        self.entries = {"w": Entry("I64", shape)}
        self.files = tuple(Part(*chunk) for chunk in chunks)  # type: ignore[assignment]


class Part:
    """One of these chunks, read as from a file."""

    def __init__(self, box: Box, values: np.ndarray) -> None:
        self._box, self._bytes, self.entries = box, values.view(np.uint8), {"w": Entry("I64", box.shape)}

    def box(self, _: str) -> Box:
        return self._box

    def read(self, _: str, begin: int, view: memoryview, verify: bool) -> None:
        assert verify
        view[:] = self._bytes[begin : begin + len(view)].data


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
@pytest.mark.parametrize("seed", range(3))
def test_any_box_is_assembled_from_any_chunks(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensor = rng.integers(0, 2**62, shape)
    for wanted in cut(rng, shape):
        source = Parts([(box, np.ascontiguousarray(tensor[slices(box)]).reshape(-1)) for box in cut(rng, shape)], shape)
        expected = tensor[slices(wanted)].reshape(-1)
        found = np.empty_like(expected)
        edges = sorted([0, wanted.size, *rng.integers(0, wanted.size + 1, 4).tolist()])
        for begin, end in itertools.pairwise(edges):
            source.read_box("w", wanted, found[begin:end].view(np.uint8).data, begin)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_a_grid_covers_a_tensor_once(shape: tuple[int, ...], seed: int) -> None:
    rng = np.random.default_rng(seed)
    boxes = cut(rng, shape)
    assert cover_problem(shape, boxes) is None
    filled = [box for box in boxes if box.size]
    for box in filled:
        others = [other for other in boxes if other is not box]
        assert cover_problem(shape, others)
        assert cover_problem(shape, [*boxes, box])


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((0, 3), []), ((0,), []), ((4,), [Box((0,), (3,)), Box((2,), (2,))]),
        ((4,), [Box((0,), (2,)), Box((3,), (1,))]),
        ((4,), [Box((0,), (5,))]), ((4, 4), [Box((0, 0), (2, 2)), Box((2, 2), (2, 2))]), ((0,), [Box((0,), (1,))]),
    ],
)  # fmt: skip
def test_chunks_that_do_not_cover_a_tensor_once_are_refused(shape: tuple[int, ...], boxes: list[Box]) -> None:
    assert cover_problem(shape, boxes) == "its chunks do not hold each element exactly once"
