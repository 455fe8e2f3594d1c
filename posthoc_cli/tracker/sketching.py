"""The path of the network's weights, projected to a few numbers at every fold: see `reconstruction.sketch`.

All averaged weights of a group lie in a flat buffer; of statistics there is no path. Each element is multiplied by a
random sign, and those at places that are equal modulo `NUMBERS` are added up. That is linear, and depends on the places
of elements alone: not on threads, blocks or devices. Signs repeat after so many places that those in the cache serve
for all, and then belong to other sums.
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

PERIOD = 262_147
"""Places after which signs repeat: a prime, so that a motion that is alike in all rows of a matrix meets others in
each, and 3 modulo `NUMBERS`."""

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
        self._spans, self._signs = [], []
        for index, group in enumerate(layout):
            spans = zip(group.names, pairwise(group.bounds), strict=True)
            self._spans.append([*_joined(span for name, span in spans if name in averaged)])
            signs = _signs((part << 8) + index).to(group.device, group.wide)
            self._signs.append(torch.cat((signs, signs.repeat(-(-group.fold_block // PERIOD))[: group.fold_block])))
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
        total = values.new_zeros(NUMBERS, dtype=torch.float32 if values.device.type == "mps" else torch.float64)
        for first, last in self._spans[block.group]:
            begin, end = max(first, block.begin), min(last, block.end)
            if begin < end:
                signs = self._signs[block.group][begin % PERIOD :][: end - begin]
                signed = torch.nn.functional.pad(
                    values[begin - block.begin : end - block.begin] * signs, (0, (begin - end) % NUMBERS)
                )
                total += signed.view(-1, NUMBERS).sum(dim=0).roll(begin % NUMBERS)
        return total


def _appended(sketch: Sketch | None, t: float, sums: list[torch.Tensor]) -> Sketch:
    """A path with one more fold, in a window of its own, or in the last one until this has as many as the others."""
    with np.errstate(over="ignore", invalid="ignore"):  # of weights near the largest numbers: none is written then
        mean = np.stack([own.cpu().numpy() for own in sums]).sum(axis=0, dtype=np.float64, keepdims=True)
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


def _signs(seed: int) -> torch.Tensor:
    """Signs that never change: the top bits of a mixing of 64 bits (splitmix64)."""
    mixed = np.arange(PERIOD, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))
    with np.errstate(over="ignore"):
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(np.where(mixed >> np.uint64(63), np.float32(1), np.float32(-1)))
