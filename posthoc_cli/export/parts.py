"""Where the tiles of one target go: to their places in files, or in tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, pairwise
from typing import Protocol

import torch

from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.tensors import tensor_bytes
from posthoc_cli.snapshots.writer import TensorFileWriter
from posthoc_cli.synthesis.placing import TensorPlacement
from posthoc_cli.synthesis.tiles import Tile


class TilePart(Protocol):
    """One tile of one target on its way out; one thread uses it."""

    def write(self, begin: int, values: torch.Tensor) -> None:
        """Take the elements of the tile from `begin` on, which follow those before."""
        ...

    def close(self) -> None:
        """The tile is complete."""
        ...


class FilePart:
    """A tile that is written under all names of its tensors.

    Arguments:
        writer_of: the file that a name is in.
        tile: the tile.
        names: every name that a tensor goes by, its own first.
    """

    def __init__(
        self, writer_of: Callable[[str], TensorFileWriter], tile: Tile, names: Mapping[str, Sequence[str]]
    ) -> None:
        self._writer_of, self._tile, self._names = writer_of, tile, names
        self._size = fmt.ITEM_BYTES[tile.dtype]
        piece = tile.pieces[0]
        begin, end = piece.begin * self._size, piece.end * self._size
        whole = len(tile.pieces) > 1
        self._ranges = [] if whole else [writer_of(name).write_range(name, begin, end) for name in names[piece.name]]

    def write(self, begin: int, values: torch.Tensor) -> None:  # noqa: ARG002
        """See `TilePart`."""
        view = tensor_bytes(values)
        for part in self._ranges:
            part.write(view)
        if not self._ranges:
            self._write_whole(view)

    def close(self) -> None:
        """See `TilePart`."""
        for part in self._ranges:
            part.close()

    def _write_whole(self, view: memoryview) -> None:
        """Small tensors: runs of neighbours in one file at once, then each under its further names."""
        bounds = [bound * self._size for bound in self._tile.bounds]
        begin = 0
        for writer, run in groupby((piece.name for piece in self._tile.pieces), self._writer_of):
            names = list(run)
            end = begin + len(names)
            writer.write_many(names, view[bounds[begin] : bounds[end]])
            begin = end
        for piece, (start, stop) in zip(self._tile.pieces, pairwise(bounds), strict=True):
            for alias in self._names[piece.name][1:]:
                self._writer_of(alias).write(alias, view[start:stop])


class MemoryPart:
    """A tile that is put into tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], tile: Tile) -> None:
        self._placement = TensorPlacement({piece.name: [tensors[piece.name]] for piece in tile.pieces}, tile)

    def write(self, begin: int, values: torch.Tensor) -> None:
        """See `TilePart`."""
        self._placement.place(0, begin, values)

    def close(self) -> None:
        """See `TilePart`."""
