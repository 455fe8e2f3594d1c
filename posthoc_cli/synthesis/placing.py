"""Results in memory: tensors of their own, filled by threads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import torch

from posthoc_cli.snapshots.tensors import torch_dtype
from posthoc_cli.synthesis.plan import Plan
from posthoc_cli.synthesis.tiles import Tile


class PendingTensors:
    """Tensors that are being made, from the first tile of each to its last."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self._targets = len(plan.targets)
        self._shapes = plan.newest.shapes
        self._device = device
        self._tensors: dict[str, list[torch.Tensor]] = {}

    def open(self, tile: Tile) -> TensorPlacement:
        """A place for a tile; its tensors are made if they are not there yet."""
        for piece in tile.pieces:
            if piece.name not in self._tensors:
                self._tensors[piece.name] = self._new(self._shapes[piece.name], torch_dtype(tile.dtype))
        return TensorPlacement(self._tensors, tile)

    def take(self, tile: Tile) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """The tensors that are complete with this tile, which are then no longer held here."""
        for piece in tile.pieces if tile.last else ():
            yield piece.name, self._tensors.pop(piece.name)

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        with torch.inference_mode(False):
            return [torch.empty(shape, dtype=dtype, device=self._device) for _ in range(self._targets)]


class TensorPlacement:
    """A tile's place in tensors, one a target."""

    def __init__(self, tensors: Mapping[str, Sequence[torch.Tensor]], tile: Tile) -> None:
        self._bounds = tile.bounds
        self._begin = tile.pieces[0].begin if tile.pieces else 0
        self._flat = [[tensor.view(-1) for tensor in tensors[piece.name]] for piece in tile.pieces]

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:
        """See `making.Placement`."""
        if len(self._flat) == 1:
            start = self._begin + begin
            self._flat[0][target][start : start + values.numel()].copy_(values)
            return
        for tensors, part in zip(self._flat, torch.split(values, _sizes(self._bounds)), strict=True):
            tensors[target].copy_(part)

    def close(self) -> None:
        """Nothing to do."""


class Nowhere:
    """Takes results and drops them: everything is verified, nothing is changed."""

    def __init__(self, tile: Tile) -> None:
        del tile

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:
        """See `making.Placement`."""

    def close(self) -> None:
        """Nothing to do."""


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - begin for begin, end in pairwise(bounds)]
