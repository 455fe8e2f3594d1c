"""The work cut into tiles: ranges of large tensors, and small tensors in batches. Pure bookkeeping, no torch.

A tile is what one thread makes at a time, and what a part of a larger job consists of: tiles share nothing, so that
any partition of the list can be made anywhere. Its edges are edges of checksum blocks in every snapshot and in the
output, whatever their dtypes; so each byte is verified in the pass that reads it, and read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from posthoc_cli.snapshots import format as fmt
from posthoc_cli.synthesis.plan import Plan, output_dtype
from posthoc_cli.synthesis.sources import distinct_dtypes

if TYPE_CHECKING:
    import torch

MAX_BATCH = 1024
"""Small tensors in one tile at most: so a tile takes milliseconds, also where tensors have one element."""


@dataclass(frozen=True)
class Piece:
    """The elements `begin` to `end` of a tensor, row-major."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class Tile:
    """One piece of a large tensor, or several small tensors whole, end to end.

    Attributes:
        pieces: what it consists of, in order.
        role: "average" or "copy", the same for all pieces.
        dtype: the safetensors name of the output's dtype, the same for all pieces.
        wide: that of the sums; for copies `dtype` itself.
        stored_bytes: bytes that making it counts as, over all sources.
        last: whether its tensors are complete when it and those before it are.
    """

    pieces: tuple[Piece, ...]
    role: str
    dtype: str
    wide: str
    stored_bytes: int
    last: bool = True

    @cached_property
    def bounds(self) -> list[int]:
        """Where each piece begins, in elements of the tile, and where the last one ends."""
        return [0, *accumulate(piece.end - piece.begin for piece in self.pieces)]

    @cached_property
    def names(self) -> list[str]:
        """The tensor of each piece."""
        return [piece.name for piece in self.pieces]

    @property
    def elements(self) -> int:
        """Elements of all pieces."""
        return self.bounds[-1]

    def steps(self, chunk: int) -> Iterator[tuple[int, int]]:
        """Element ranges of at most `chunk`, in order; a tile of several tensors, or of none, is one step."""
        if len(self.pieces) > 1 or not self.elements:
            yield 0, self.elements
            return
        for begin in range(0, self.elements, chunk):
            yield begin, min(begin + chunk, self.elements)


def cut_tiles(
    plan: Plan,
    chunk: int,
    dtype: torch.dtype | str | None = None,
    wide_dtype: str | None = None,
    tile_elements: int | None = None,
) -> list[Tile]:
    """All tiles of a synthesis; tiles of one tensor follow each other.

    Arguments:
        plan: what will be made.
        chunk: elements that a worker has room for, a power of two up to 2**19: what is no larger is batched.
        dtype: of the averages; None for each parameter's own.
        wide_dtype: safetensors name of the dtype of all sums; None for F32, and F64 where the
            parameters, or all averages of them, are stored that exactly: see `Plan.coarse`.
        tile_elements: wanted elements a tile, made a whole number of blocks; one block for None.
    """
    tiles: list[Tile] = []
    batches: dict[tuple[str, str, str], _Batch] = {}
    newest = plan.newest
    shapes = newest.shapes
    dtypes = distinct_dtypes(plan.sources)
    for name, tensor in newest.info.tensors.items():
        stored = output_dtype(tensor.role, tensor.dtype, dtype)
        exact = tensor.dtype == "F64" or name not in plan.coarse
        wide = stored if tensor.role == "copy" else wide_dtype or ("F64" if exact else "F32")
        sizes = [fmt.ITEM_BYTES[types[name]] for types, _ in dtypes]
        count, each = math.prod(shapes[name]), sum(n * size for size, (_, n) in zip(sizes, dtypes, strict=True))
        if tensor.role == "copy":
            each = len(plan.sources) * fmt.ITEM_BYTES[tensor.dtype]
        if count > chunk:
            block = fmt.BLOCK_BYTES // min(*sizes, fmt.ITEM_BYTES[stored])
            step = block * max(1, round((tile_elements or block) / block))
            for begin in range(0, count, step):
                piece = Piece(name, begin, min(begin + step, count))
                nbytes = each * (piece.end - begin)
                tiles.append(Tile((piece,), tensor.role, stored, wide, nbytes, piece.end == count))
            continue
        kind = (tensor.role, stored, wide)
        batch = batches.setdefault(kind, _Batch())
        if batch.elements + count > chunk or len(batch.pieces) == MAX_BATCH:
            tiles.append(batch.tile(kind))
            batch = batches[kind] = _Batch()
        batch.add(Piece(name, 0, count), each * count)
    return tiles + [batch.tile(kind) for kind, batch in batches.items()]


class _Batch:
    """Small tensors that wait for company."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.elements = 0
        self._nbytes = 0

    def add(self, piece: Piece, nbytes: int) -> None:
        self.pieces.append(piece)
        self.elements += piece.end
        self._nbytes += nbytes

    def tile(self, kind: tuple[str, str, str]) -> Tile:
        return Tile(tuple(self.pieces), *kind, self._nbytes)
