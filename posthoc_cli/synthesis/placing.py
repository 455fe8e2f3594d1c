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
        dtype = torch_dtype(tile.dtype)
        with torch.inference_mode(False):
            for name in tile.names:
                if name not in self._tensors:
                    self._tensors[name] = self._new(self._shapes[name], dtype)
        return TensorPlacement(self._tensors, tile)

    def take(self, tile: Tile) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """The tensors that are complete with this tile, which are then no longer held here."""
        for piece in tile.pieces if tile.last else ():
            yield piece.name, self._tensors.pop(piece.name)

    def _new(self, shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.empty(shape, dtype=dtype, device=self._device) for _ in range(self._targets)]


class TensorPlacement:
    """A tile's place in tensors, one a target."""

    def __init__(self, tensors: Mapping[str, Sequence[torch.Tensor]], tile: Tile) -> None:
        self._bounds = tile.bounds
        self._begin = tile.pieces[0].begin
        pieces = [[tensor.view(-1) for tensor in tensors[name]] for name in tile.names]
        self._flat = list(zip(*pieces, strict=True))  # by target

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:
        """See `making.Placement`."""
        flat = self._flat[target]
        if len(flat) == 1:
            start = self._begin + begin
            flat[0][start : start + values.numel()].copy_(values)
        else:
            torch._foreach_copy_(flat, torch.split(values, _sizes(self._bounds)))

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
