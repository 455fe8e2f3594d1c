"""The path of the network's weights, projected to a few numbers at every fold: see `reconstruction.sketch`.

All averaged weights of a group lie in a flat buffer; of statistics there is no path. Of rows of elements the first
`NUMBERS` of each are multiplied by random signs, and added up. Rows of small groups are that long; of large ones one
element in eight is taken, and a number of elements that divides no layer's, so that all columns of a matrix are met. It
is linear, and depends on the places of elements alone: not on threads, blocks or devices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import pairwise

import numpy as np
import torch
import xxhash

from posthoc_cli.reconstruction import Sketch
from posthoc_cli.snapshots.format import Path
from posthoc_cli.tracker.averages import Layout, Range

NUMBERS = 64
"""D of a projection: squared lengths are right within 1 +- sqrt(2 / D), 0.18."""

SPARSE, LARGE = 521, 2**22
"""The length of rows in groups of more elements than the second one."""

SIGNS = 16_381
"""Rows after which signs repeat, all with or all against those before. They stay in the cache."""

MOST_WINDOWS = 1024
"""Windows of a sketch; where there are more, each two become one."""

_PENDING = 64
"""Windows whose numbers may still be on an accelerator: to fetch them, one waits for it."""


class Sketcher:
    """Projects the weights' means over windows; from any of a crew's threads, one window at a time."""

    def __init__(self, layout: Layout, averaged: Collection[str], part: int = 0) -> None:
        """Begin a path.

        Arguments:
            layout: where the values lie.
            averaged: the tensors that have a path.
            part: the layout's number of a model's parts, whose signs are independent.
        """
        self.layout = layout
        names = [(group.names, group.shapes, str(group.wide), set(group.names) <= set(averaged)) for group in layout]
        self._projection = xxhash.xxh3_64_intdigest(repr((part, names)).encode()) >> 1
        self._sketch: Sketch | None = None
        self._spans, self._rows, self._signs, self._turns = [], [], [], []
        for index, group in enumerate(layout):
            spans = zip(group.names, pairwise(group.bounds), strict=True)
            self._spans.append([*_joined(span for name, span in spans if name in averaged)])
            self._rows.append(SPARSE if group.bounds[-1] > LARGE else NUMBERS)
            signs = _signs(NUMBERS * SIGNS, 2 * ((part << 8) + index)).view(SIGNS, NUMBERS)
            self._signs.append(signs.to(group.device, group.wide) * (self._rows[-1] / NUMBERS) ** 0.5)
            repeats = group.bounds[-1] // (SIGNS * self._rows[-1]) + 1
            self._turns.append(_signs(repeats, 2 * ((part << 8) + index) + 1).tolist())
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._pending: list[tuple[float, list[torch.Tensor]]] = []

    def goes_on(self, path: Path) -> bool:
        """Go on from a path, if it is of the same projection."""
        is_own = path.projection == self._projection
        if is_own:
            self._sketch = path.sketch
        return is_own

    def take(self, block: Range, mean: torch.Tensor) -> None:
        """Take in a block of a window's mean."""
        self._sums[block.group, block.begin] = self._project(block, mean)

    def end_window(self, t: float) -> None:
        """All blocks of a window have been taken in, whose last update was at time `t`."""
        self._pending.append((t, self._taken()))
        if len(self._pending) >= _PENDING:
            self._fetch()

    def path(self, t: float) -> Path | None:
        """The path so far; blocks taken in since the last window ended are one, which ends at `t`. None for none."""
        self._fetch()
        found = _appended(self._sketch, t, self._taken()) if self._sums else self._sketch
        return None if found is None else Path(self._projection, found)

    def _taken(self) -> list[torch.Tensor]:
        """The sums over all blocks of each group, in a fixed order."""
        places = sorted(self._sums)
        groups = sorted({group for group, _ in places})
        found = [torch.stack([self._sums[at] for at in places if at[0] == group]).sum(dim=0) for group in groups]
        self._sums.clear()
        return found

    def _fetch(self) -> None:
        for window in self._pending:
            self._sketch = _appended(self._sketch, *window)
        self._pending.clear()

    def _project(self, block: Range, values: torch.Tensor) -> torch.Tensor:
        """Shape [NUMBERS], float64; float32 on Apple's GPUs, which have none."""
        length, exact = self._rows[block.group], torch.float32 if values.device.type == "mps" else torch.float64
        total = values.new_zeros(NUMBERS, dtype=exact)
        for first, last in self._spans[block.group]:
            begin, end = max(first, block.begin), min(last, block.end)
            while begin < end:
                row, column = divmod(begin, length)
                turn, row = divmod(row, SIGNS)
                signs, at = self._signs[block.group], begin - block.begin
                rows = 0 if column else min((end - begin + length - NUMBERS) // length, SIGNS - row)
                if rows:  # complete ones, but for elements between them
                    part = values.as_strided((rows, NUMBERS), (length, 1), values.storage_offset() + at)
                    sums = (part * signs[row : row + rows]).sum(dim=0)
                    begin += rows * length
                else:  # one that begins or ends in the middle
                    part = values[at : at + min(end - begin, max(NUMBERS - column, 0))]
                    sums = (
                        torch.nn.functional.pad(
                            part * signs[row, column : column + part.numel()], (column, NUMBERS - column - part.numel())
                        )
                        if part.numel()
                        else 0.0
                    )
                    begin += length - column
                total.add_(sums, alpha=self._turns[block.group][turn])
        return total


def _appended(sketch: Sketch | None, t: float, sums: list[torch.Tensor]) -> Sketch:
    """A path with one more fold, in a window of its own, or in the last one until this has as many as the others."""
    with np.errstate(over="ignore", invalid="ignore"):  # of weights near the largest numbers: none is written then
        parts = [np.zeros(NUMBERS), *(own.cpu().numpy() for own in sums)]  # of a part without elements there are none
        mean = np.stack(parts).sum(axis=0, dtype=np.float64, keepdims=True)
        mean = mean.astype(np.float32).astype(np.float64)  # as states hold it
        if sketch is None:
            return Sketch(np.array([t, t]), np.ones(1), mean, np.zeros(1))
        made = Sketch(
            np.append(sketch.edges, t), np.append(sketch.folds, 1.0),
            np.vstack((sketch.means, mean)), np.append(sketch.spread, 0.0),
        )  # fmt: skip
        if sketch.folds[-1] < sketch.folds.max():
            return _halved(made, len(sketch.folds) - 1)
        return made if len(made.folds) <= MOST_WINDOWS else _halved(made)


def _halved(sketch: Sketch, begin: int = 0) -> Sketch:
    """Each two windows as one, from the one of this index on; an odd last one stays."""
    end = begin + (len(sketch.folds) - begin) // 2 * 2
    values = sketch.folds, sketch.means, sketch.spread
    first, second = ([one[start:end:2] for one in values] for start in (begin, begin + 1))
    folds, apart = first[0] + second[0], second[1] - first[1]
    share = second[0] / folds
    spread = first[2] + share * (second[2] - first[2]) + share * (1 - share) * np.sum(apart**2, axis=1)
    means = (first[1] + share[:, None] * apart).astype(np.float32).astype(np.float64)
    edges = (sketch.edges[:begin], sketch.edges[begin : end + 1 : 2], sketch.edges[end + 1 :])
    joined = [np.concatenate((a[:begin], b, a[end:])) for a, b in zip(values, (folds, means, spread), strict=True)]
    return Sketch(np.concatenate(edges), *joined)


def _joined(spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Neighbours as one."""
    begin = end = 0
    for first, last in spans:
        if first > end:
            if end > begin:
                yield begin, end
            begin = first
        end = last
    if end > begin:
        yield begin, end


def _signs(count: int, seed: int) -> torch.Tensor:
    """Signs that never change: the top bits of a mixing of 64 bits (splitmix64)."""
    mixed = np.arange(count, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))
    with np.errstate(over="ignore"):
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(np.where(mixed >> np.uint64(63), np.float32(1), np.float32(-1)))
