"""Chunks of tensors: boxes assembled from any chunks equal NumPy's own indexing."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import RUN_ID, split_snapshot, write_snapshot

from posthoc_cli.snapshots.directory import read_directory
from posthoc_cli.snapshots.tensorfile import Box, cover_problem

SHAPES = [(), (1,), (7,), (5, 3), (4, 1, 6), (3, 4, 2, 2), (0, 3)]


def cut(rng: np.random.Generator, shape: tuple[int, ...]) -> list[Box]:
    """Return a grid of boxes with random cuts, some of them empty, in random order."""
    cuts = [sorted([0, n, *rng.integers(0, n + 1, rng.integers(0, 3)).tolist()]) for n in shape]
    spans = itertools.product(*(itertools.pairwise(along) for along in cuts))
    boxes = [Box(tuple(a for a, _ in span), tuple(b - a for a, b in span)) for span in spans]
    rng.shuffle(boxes)  # type: ignore[arg-type]
    return boxes


@pytest.mark.parametrize("seed", range(3))
def test_any_box_is_assembled_from_any_chunks(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {str(shape): rng.integers(0, 2**62, shape) for shape in SHAPES}
    values = {name: torch.from_numpy(np.asarray(tensor)) for name, tensor in tensors.items()}
    grids = {name: tuple(rng.integers(1, 4, tensor.ndim).tolist()) for name, tensor in tensors.items()}
    split_snapshot(write_snapshot(tmp_path, 10, 0.05, RUN_ID, values), 81, grids)
    (source,) = read_directory(tmp_path)
    for name, tensor in tensors.items():
        for wanted in cut(rng, tensor.shape):
            expected = tensor[tuple(map(slice, wanted.offset, wanted.end))].reshape(-1)
            found = np.empty_like(expected)
            edges = sorted([0, wanted.size, *rng.integers(0, wanted.size + 1, 4).tolist()])
            for begin, end in itertools.pairwise(edges):
                source.read_box(name, wanted, found[begin:end].view(np.uint8).data, begin)
            assert np.array_equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_grid_covers_a_tensor_once(shape: tuple[int, ...]) -> None:
    boxes = cut(np.random.default_rng(0), shape)
    assert cover_problem(shape, boxes) is None
    for box in (box for box in boxes if box.size):
        assert cover_problem(shape, [other for other in boxes if other is not box])
        assert cover_problem(shape, [*boxes, box])


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((0, 3), []), ((4,), [Box((0,), (3,)), Box((2,), (2,))]), ((4,), [Box((0,), (2,)), Box((3,), (1,))]),
        ((4,), [Box((0,), (5,))]), ((4, 4), [Box((0, 0), (2, 2)), Box((2, 2), (2, 2))]),
    ],
)  # fmt: skip
def test_chunks_that_do_not_cover_a_tensor_once_are_refused(shape: tuple[int, ...], boxes: list[Box]) -> None:
    assert cover_problem(shape, boxes) == "its chunks do not hold each element exactly once"
