"""Tiles of a source, read chunk by chunk into a worker's rooms."""

from __future__ import annotations

from collections.abc import Mapping
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
        self._rooms = [torch.zeros(nbytes, dtype=torch.uint8, pin_memory=self._pinned) for _ in range(1 + self._pinned)]
        self._views = [room.numpy().data for room in self._rooms]
        self._sent: list[Any] = [None] * len(self._rooms)
        self._turn = 0

    def next(self, nbytes: int) -> memoryview:
        """Room for that many bytes; what `next` gave before the last time is overwritten."""
        self._turn = (self._turn + 1) % len(self._rooms)
        event = self._sent[self._turn]
        if event is not None:
            event.synchronize()
        return self._views[self._turn][:nbytes]

    def send(self, slot: torch.Tensor, begin: int, end: int, dtype: str) -> None:
        """Convert the bytes `begin` to `end` of the room into `slot`, on its device."""
        values = self._rooms[self._turn][begin:end].view(torch_dtype(dtype))
        if slot.device.type == "cpu":
            slot.copy_(values)
            return
        slot.copy_(values.to(slot.device, non_blocking=self._pinned))
        if self._pinned:
            self._sent[self._turn] = torch.cuda.current_stream(slot.device).record_event()


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
        nbytes = slot.numel() * self._size
        self._range.read_into(scratch.next(nbytes))
        scratch.send(slot, 0, nbytes, self._dtype)


class BatchOfFile:
    """Small tensors whole: neighbours in the file are read and converted together, each is verified alone."""

    def __init__(self, file: TensorFile, tile: Tile) -> None:
        self._file = file
        self._bounds = tile.bounds
        self._entries = [file.header.tensors[piece.name] for piece in tile.pieces]
        self._names = [piece.name for piece in tile.pieces]

    def read_into(self, slot: torch.Tensor, begin: int, scratch: Scratch) -> None:  # noqa: ARG002
        """Read all of it; see `TileReader`."""
        entries, first = self._entries, 0
        for index in range(1, len(entries) + 1):
            last = entries[index - 1]
            if index == len(entries) or (entries[index].begin, entries[index].dtype) != (
                last.begin + last.nbytes,
                last.dtype,
            ):
                self._read_run(slot, first, index, scratch)
                first = index

    def _read_run(self, slot: torch.Tensor, first: int, end: int, scratch: Scratch) -> None:
        entries, names = self._entries[first:end], self._names[first:end]
        start = entries[0].begin
        view = scratch.next(entries[-1].begin + entries[-1].nbytes - start)
        self._file.fill(names[0], view, 0)
        for name, entry in zip(names, entries, strict=True):
            offset = entry.begin - start
            self._file.verify(name, view[offset : offset + entry.nbytes])
        scratch.send(slot[self._bounds[first] : self._bounds[end]], 0, len(view), entries[0].dtype)


class MemoryTile:
    """A tile of tensors that are in memory."""

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
