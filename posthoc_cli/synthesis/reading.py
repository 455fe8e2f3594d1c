"""Tiles of a source, read chunk by chunk into a worker's rooms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch

from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.reader import TensorFile
from posthoc_cli.snapshots.tensors import torch_dtype
from posthoc_cli.synthesis.tiles import Piece, Tile


class TileReader(Protocol):
    """One tile of one source, read in order."""

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:
        """Fill `slot` with the elements of the tile from `begin` on, in the slot's dtype and on its device.

        Raises:
            FileFormatError: naming the file and the tensor.
        """
        ...


class Scratch:
    """A worker's room for bytes as they are stored, made once and used for every chunk."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        # With an accelerator the next bytes are read while the last ones are on their way.
        self._rooms = [_Room(nbytes, self._pinned) for _ in range(1 + self._pinned)]
        self._turn = 0

    def next(self, nbytes: int) -> memoryview:
        """Room for that many bytes; what `next` gave before the last time is overwritten."""
        self._turn = (self._turn + 1) % len(self._rooms)
        room = self._rooms[self._turn]
        if room.sent is not None:
            room.sent.synchronize()
        return room.view[:nbytes]

    def parts(self, bounds: Sequence[int]) -> list[memoryview]:
        """The bytes that `next` gave, cut at `bounds`."""
        return self._rooms[self._turn].parts(bounds)

    def send(self, slot: torch.Tensor, dtype: str) -> None:
        """Convert the first values in the room, of a safetensors dtype, into `slot`, on its device."""
        room = self._rooms[self._turn]
        values = room.typed(dtype)[: slot.numel()]
        if slot.device.type == "cpu":
            slot.copy_(values)
            return
        slot.copy_(values.to(slot.device, non_blocking=self._pinned))
        if self._pinned:
            room.sent = torch.cuda.current_stream(slot.device).record_event()


class _Room:
    """Bytes, the same as tensors of any dtype, and the event after which they may be overwritten."""

    def __init__(self, nbytes: int, pinned: bool) -> None:
        self._bytes = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.view = self._bytes.numpy().data
        self.sent: Any = None
        self._typed: dict[str, torch.Tensor] = {}
        self._bounds: Sequence[int] = ()
        self._parts: list[memoryview] = []

    def typed(self, dtype: str) -> torch.Tensor:
        if dtype not in self._typed:
            self._typed[dtype] = self._bytes.view(torch_dtype(dtype))
        return self._typed[dtype]

    def parts(self, bounds: Sequence[int]) -> list[memoryview]:
        # The same for every source, as a rule.
        if bounds != self._bounds:
            self._bounds, self._parts = bounds, [self.view[a:b] for a, b in pairwise(bounds)]
        return self._parts


def open_file_tile(file: TensorFile, tile: Tile) -> TileReader:
    """Start reading a tile of a file."""
    return RangeOfFile(file, tile.pieces[0]) if len(tile.pieces) == 1 else BatchOfFile(file, tile)


class RangeOfFile:
    """A range of one tensor, chunk by chunk."""

    def __init__(self, file: TensorFile, piece: Piece) -> None:
        self._dtype = file.header.tensors[piece.name].dtype
        self._size = fmt.ITEM_BYTES[self._dtype]
        self._range = file.read_range(piece.name, piece.begin * self._size, piece.end * self._size)

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        """Read what comes next; see `TileReader`."""
        self._range.read_into(scratch.next(slot.numel() * self._size))
        scratch.send(slot, self._dtype)


class BatchOfFile:
    """Small tensors whole: neighbours in the file are read and converted together, each is verified alone."""

    def __init__(self, file: TensorFile, tile: Tile) -> None:
        self._file = file
        self._bounds = tile.bounds
        self._names = tile.names
        self._entries = [file.header.tensors[name] for name in tile.names]

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        """Read all of it; see `TileReader`."""
        first = 0
        for end in self._run_ends():
            self._read_run(slot, first, end, scratch)
            first = end

    def _run_ends(self) -> list[int]:
        """Where runs of neighbours of one dtype end."""
        start, dtype = self._entries[0].begin, self._entries[0].dtype
        size = fmt.ITEM_BYTES[dtype]
        begins, dtypes = [entry.begin for entry in self._entries], {entry.dtype for entry in self._entries}
        if dtypes == {dtype} and begins == [start + size * bound for bound in self._bounds[:-1]]:
            return [len(self._entries)]  # all of them, as a rule
        cuts = [
            index
            for index, (one, other) in enumerate(pairwise(self._entries), 1)
            if other.begin != one.begin + one.nbytes or other.dtype != one.dtype
        ]
        return [*cuts, len(self._entries)]

    def _read_run(self, slot: torch.Tensor, first: int, end: int, scratch: Scratch) -> None:
        names, dtype = self._names[first:end], self._entries[first].dtype
        size, start = fmt.ITEM_BYTES[dtype], self._bounds[first]
        bounds = [size * (bound - start) for bound in self._bounds[first : end + 1]]
        self._file.fill(names[0], scratch.next(bounds[-1]), 0)
        self._file.verify(names, scratch.parts(bounds))
        scratch.send(slot[start : self._bounds[end]], dtype)


class MemoryTile:
    """A tile of tensors that are in memory.

    Arguments:
        tensors: on the host or, where their values are there already, elsewhere: sums on the CPU are made by threads
            that do not wait for what is under way in the caller's stream.
        tile: what is read of them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], tile: Tile) -> None:
        self._pieces = [tensors[piece.name].detach().reshape(-1)[piece.begin : piece.end] for piece in tile.pieces]
        self._bounds = tile.bounds

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        """Copy the elements from `begin` on; see `TileReader`."""
        if len(self._pieces) == 1:
            slot.copy_(self._pieces[0][begin : begin + slot.numel()])
            return
        for (start, end), piece in zip(pairwise(self._bounds), self._pieces, strict=True):
            slot[start:end].copy_(piece)
