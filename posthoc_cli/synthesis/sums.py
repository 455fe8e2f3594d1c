"""The arithmetic: sums over sources, in one order however they are made.

A sum is defined as: sources in their order, in groups of GROUP places; within a group, from 0, one addition of
coefficient x value after another; then the groups' sums, one after another. A source's place is its index among all
sources that were solved with, so that leaving one out moves no other into another group. One target is made exactly
so. For several, a matrix product is up to twenty times faster, but a library may sum in any order, differently for each
shape; so it is used only if a test on this machine, for this shape, gave the same bits. The bits of a target therefore
depend neither on other targets, nor on tiles, nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

GROUP = 64
"""Sources summed at once: matrix libraries cut longer sums themselves, each in its own way."""

COLUMNS = 16_384
"""Columns of one matrix product: the widest at which its operands stay in the second-level cache (measured)."""

MIN_ROWS = 4
"""Rows of the smallest matrix product: with fewer, libraries take kernels that sum in another order."""

Precision = tuple[str, str]
"""How torch may round the factors of a matrix product in float32, on CUDA and on the CPU."""


class Sums:
    """One thread's buffers for the sums of a chunk: [targets, chunk] and, for matrix products, a group of sources.

    For every chunk: `start`, then for each source in order fill `slot(i)` and call `add(i)`, then `result`.

    Arguments:
        coefficients: float64, shape [sources, targets].
        chunk: elements of a chunk, a multiple of COLUMNS.
        wide: dtype of the sums.
        device: where they are made.
        places: of each source, growing; its number by default.
    """

    def __init__(
        self,
        coefficients: npt.NDArray[np.float64],
        chunk: int,
        wide: torch.dtype,
        device: torch.device,
        places: Sequence[int] = (),
    ) -> None:
        self._sources, self._targets = coefficients.shape
        self._scales = coefficients.tolist()
        self._size = self._padded = -1  # none yet: a chunk may be empty
        self._weights = torch.full((chunk,), 2.0**-20, dtype=wide, device=device)
        groups = group_sources(places or range(self._sources))
        # The group of each source, and which one of the group it is.
        self._members = [(number, index) for number, group in enumerate(groups) for index in range(len(group))]
        self._last = [len(group) - 1 for group in groups]
        shape, precision = max(self._targets, MIN_ROWS), matmul_precision()
        self._by_matrix = self._targets > 1 and all(
            product_is_exact(shape, size, chunk, wide, device, precision) for size in set(map(len, groups))
        )
        rows = max(self._targets, MIN_ROWS) if self._by_matrix else self._targets
        # Zeros: a nan beyond a shorter chunk would slow the arithmetic down.
        self._totals = torch.zeros(rows, chunk, dtype=wide, device=device)
        self._group = torch.zeros_like(self._totals) if len(groups) > 1 else self._totals
        self._values = torch.zeros(max(map(len, groups)) if self._by_matrix else 1, chunk, dtype=wide, device=device)
        matrix = np.zeros((rows, self._sources))
        matrix[: self._targets] = coefficients.T
        self._matrices = [
            torch.from_numpy(matrix[:, group.start : group.stop].copy()).to(device, wide) for group in groups
        ]

    def start(self, size: int) -> None:
        """Begin the sums of a chunk of `size` elements."""
        # Whole columns of a product: every element goes through the same instructions, wherever a chunk ends.
        if size == self._size:
            return
        self._size, self._padded = size, -(-size // COLUMNS) * COLUMNS
        self._slots = [row[:size] for row in self._values.unbind()]
        self._terms = self._values[0, : self._padded]
        self._rows = [row[: self._padded] for row in self._group.unbind()]

    def slot(self, source: int) -> torch.Tensor:
        """Where the values of a source go: shape [size]."""
        return self._slots[self._members[source][1] if self._by_matrix else 0]

    def add(self, source: int) -> None:
        """Add the values in the slot."""
        group_number, index = self._members[source]
        last = index == self._last[group_number]
        if self._by_matrix:
            if last:
                multiply(self._matrices[group_number], self._values[: index + 1, : self._padded], self._group)
        else:
            add_scaled(self._rows, self._terms, self._scales[source], index == 0)
        if last and self._group is not self._totals:
            total, group = self._totals[:, : self._padded], self._group[:, : self._padded]
            total.add_(group) if group_number else total.copy_(group)

    def result(self) -> torch.Tensor:
        """The sums, shape [targets, size]; valid until the next `start`."""
        return self._totals[: self._targets, : self._size]

    def surely_finite(self) -> bool:
        """Whether no sum is nan or infinite; false also where their sums would be too large to tell.

        A weighted sum over all elements reads them once, at the speed of memory; no other test does.
        """
        return bool(torch.mv(self.result(), self._weights[: self._size]).isfinite().all())


def group_sources(places: Sequence[int]) -> list[range]:
    """The groups of sources, as ranges of indices; see the definition of a sum."""
    starts = [i for i, place in enumerate(places) if i == 0 or place // GROUP != places[i - 1] // GROUP]
    return [range(begin, end) for begin, end in pairwise([*starts, len(places)])]


def add_scaled(sums: Sequence[torch.Tensor], values: torch.Tensor, coefficients: Sequence[float], first: bool) -> None:
    """sums[k] += coefficients[k] values, by the definition of a sum; from 0 for the `first` term."""
    for total, coefficient in zip(sums, coefficients, strict=True):
        (total.zero_() if first else total).add_(values, alpha=coefficient)


def multiply(matrix: torch.Tensor, values: torch.Tensor, sums: torch.Tensor) -> None:
    """sums = matrix values, for [rows, sources] x [sources, n x COLUMNS], n at a time."""
    for begin in range(0, values.shape[1], COLUMNS):
        columns = slice(begin, begin + COLUMNS)
        torch.mm(matrix, values[:, columns], out=sums[:, columns])


def matmul_precision() -> Precision:
    """What torch's settings allow now (TF32 and the like); a program may change them at any time."""
    backends: Any = torch.backends
    try:
        return backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision
    except AttributeError:  # before torch 2.9
        return str(backends.cuda.matmul.allow_tf32), torch.get_float32_matmul_precision()


@lru_cache(maxsize=256)
def product_is_exact(
    rows: int,
    sources: int,
    chunk: int,
    wide: torch.dtype,
    device: torch.device,
    precision: Precision,  # noqa: ARG001
) -> bool:
    """Whether a matrix product of this shape gives, bit for bit, the sums by definition.

    The instructions depend on the shapes, the strides and the precision allowed now, so a test with random numbers
    shows whether the order is the same.
    """
    generator = torch.Generator().manual_seed(20240229)
    matrix = torch.randn(rows, sources, dtype=torch.float64, generator=generator).to(wide)
    room = torch.zeros(max(sources, 2), chunk, dtype=wide)
    room[:sources, :COLUMNS] = torch.randn(sources, COLUMNS, dtype=torch.float64, generator=generator).to(wide)
    coefficients = matrix.double().T.tolist()
    values = room.to(device)[:sources, :COLUMNS]
    by_definition, by_product = (torch.zeros(rows, chunk, dtype=wide, device=device) for _ in range(2))
    for source in range(sources):
        add_scaled([row[:COLUMNS] for row in by_definition], values[source], coefficients[source], source == 0)
    multiply(matrix.to(device), values, by_product)
    return torch.equal(by_definition, by_product)
