"""How averages lie in memory: flat buffers of whole groups of tensors, read and written block by block.

A block is a range of a flat buffer that stays in the cache while every profile takes it in. So the model is read from
memory once for all profiles, and a model of thousands of small tensors costs no more calls than one of a few large.
"""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from posthoc_cli.tracker.worker import ALONE, Crew

_PORTABLE = 1
"""cudaHostRegisterPortable: pinned for every device."""


def pinned_empty(elements: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor without values in pinned memory of the host, less than a page larger than they are.

    torch's own pinned memory comes in powers of two, up to twice as much. This is memory of the system's, registered
    as it is, and registered no longer when the last tensor that uses it is gone. What is copied to it must be waited
    for by an event: torch does not keep it until the copy is done.
    """
    nbytes = elements * dtype.itemsize
    if not nbytes:
        return torch.empty(0, dtype=dtype)
    # Shared with processes that are forked: of private pages, a copy that is written after a fork may miss ours.
    block = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
    if not _register(block.ctypes.data, nbytes):
        return torch.empty(elements, dtype=dtype, pin_memory=True)
    # The tensor's storage holds `block`, which holds the memory: this is called between the ends of the two.
    weakref.finalize(block, _unregister, block.ctypes.data, os.getpid()).atexit = False
    return torch.from_numpy(block).view(dtype)


def _register(address: int, nbytes: int) -> bool:
    """Pin memory; False where the system does not pin memory that is there already."""
    cuda: Any = torch.cuda
    cudart = cuda.cudart()
    current = cuda.current_device()
    # As torch does: on a device that is not in use yet, this would make a context, which takes memory there.
    with cuda.device(next(iter(_devices_in_use()), current)):
        if int(cudart.cudaHostRegister(address, nbytes, _PORTABLE)) == 0:
            return True
        with suppress(RuntimeError):
            torch.zeros(1, device="cuda").neg_()  # takes the error, which the training's next kernel would raise
    return False


def _unregister(address: int, process: int) -> None:
    """Undo `_register`; for what a forked process has copied there is nothing to undo."""
    if process != os.getpid():
        return
    cuda: Any = torch.cuda
    for device in _devices_in_use():
        cuda.synchronize(device)  # after an error nobody has waited for the copies that are on their way
    cuda.cudart().cudaHostUnregister(address)


def _devices_in_use() -> list[int]:
    """Devices that this process has a context on, the current one first."""
    count, current = torch.cuda.device_count(), torch.cuda.current_device()
    has_context: Any = torch._C._cuda_hasPrimaryContext  # type: ignore[attr-defined]
    return [device for device in sorted(range(count), key=lambda device: device != current) if has_context(device)]


# --- How averages lie in memory: flat buffers of whole groups of tensors, read and written block by block ---


CPU_BLOCK = 524_288
"""Elements of a block on the CPU, which one thread works on."""

DEVICE_BLOCK = 2**24
"""Elements on an accelerator, where starting a kernel costs more than leaving the cache."""


EXACT_BLOCK, EXACT_DEVICE_BLOCK = 131_072, 2**22
"""Elements at a time, on the CPU and on an accelerator, of what is done in float64: scratch for it is small."""

_LIKE_FLOAT32 = (torch.float32, torch.float64, torch.bfloat16)
"""Dtypes of a range in which sums of ordinary values stay finite."""


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: at a decay of 0.9999 a half-precision average never moves."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Group:
    """Tensors of one device and dtype, end to end."""

    device: torch.device
    dtype: torch.dtype
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bounds: tuple[int, ...]
    """Where each tensor begins, in elements, and where the last one ends."""

    @property
    def wide(self) -> torch.dtype:
        """The dtype of their averages."""
        return accumulator_dtype(self.dtype)

    @property
    def exact(self) -> torch.dtype:
        """The dtype of what many updates add up in: float64, but on Apple's GPUs, which have none."""
        return self.wide if self.device.type == "mps" else torch.float64

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return self.bounds[-1]

    @property
    def block(self) -> int:
        """Elements of a block."""
        return CPU_BLOCK if self.device.type == "cpu" else DEVICE_BLOCK

    @property
    def exact_block(self) -> int:
        """Elements of a block of float64 numbers."""
        return EXACT_BLOCK if self.device.type == "cpu" else EXACT_DEVICE_BLOCK

    def views(self, flat: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor's name, and its place in a flat buffer."""
        for name, shape, (begin, end) in zip(self.names, self.shapes, pairwise(self.bounds), strict=True):
            yield name, flat[begin:end].view(shape)


Layout = tuple[Group, ...]


def lay_out(tensors: Mapping[str, torch.Tensor]) -> Layout:
    """Group tensors by device and dtype."""
    return group_tensors({name: (tensor.device, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()})


def group_tensors(tensors: Mapping[str, tuple[torch.device, torch.dtype, tuple[int, ...]]]) -> Layout:
    """The same of tensors of which device, dtype and shape are known."""
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = defaultdict(list)
    for name, (device, dtype, _) in tensors.items():
        groups[device, dtype].append(name)
    return tuple(
        Group(
            where,
            dtype,
            tuple(names),
            tuple(tensors[name][2] for name in names),
            (0, *accumulate(math.prod(tensors[name][2]) for name in names)),
        )
        for (where, dtype), names in groups.items()
    )


def on_host(layout: Layout) -> Layout:
    """The same tensors in the host's memory, where groups of several devices stay apart."""
    return tuple(replace(group, device=torch.device("cpu")) for group in layout)


class FlatTensors:
    """One flat buffer a group, and the tensors in it by name.

    Arguments:
        layout: the groups.
        wide: buffers of the averages' dtype in place of the tensors' own.
        pinned: in memory that an accelerator can copy to by itself; see `pinned_empty`.
        exact: buffers of the dtype that many updates add up in.
    """

    def __init__(self, layout: Layout, wide: bool, pinned: bool = False, exact: bool = False) -> None:
        dtypes = [group.exact if exact else group.wide if wide else group.dtype for group in layout]
        self.flats = [
            pinned_empty(group.elements, dtype)
            if pinned
            else torch.empty(group.elements, dtype=dtype, device=group.device)
            for group, dtype in zip(layout, dtypes, strict=True)
        ]
        self.views = {
            name: view for group, flat in zip(layout, self.flats, strict=True) for name, view in group.views(flat)
        }

    def zero_(self) -> None:
        """Set all to 0, which also has the system give the memory now and not when it is first written to."""
        for flat in self.flats:
            flat.zero_()

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy tensors into their places."""
        for name, view in self.views.items():
            view.copy_(tensors[name])


@dataclass(frozen=True)
class Block:
    """A range of a flat buffer, and the tensors, or parts of them, whose values belong there."""

    group: int
    begin: int
    end: int
    parts: tuple[torch.Tensor, ...]

    def total(self, scratch: torch.Tensor) -> torch.Tensor:
        """A number that is not finite where a value is not: no nan and no infinity can hide in a sum."""
        (first, *others) = self.parts
        return (first if not others and first.dtype in _LIKE_FLOAT32 else self.values(scratch)).sum()

    def values(self, scratch: torch.Tensor) -> torch.Tensor:
        """The values, flat, in the scratch's dtype; they may stand in `scratch`, which holds as many."""
        (first, *others), room = self.parts, scratch[: self.end - self.begin]
        if not others and first.dim() == 1 and first.dtype == scratch.dtype:
            return first
        if not others:
            room.view(first.shape).copy_(first)
            return room
        return torch.cat(self.parts, out=room)


class BlockReader:
    """Tensors of a layout, block by block, wherever their values are. Holds views of the tensors, and no copy.

    Arguments:
        layout: the groups.
        pieces: for each group tensors that hold its values, in order, on the group's device.
        threads: that will read at the same time.
    """

    def __init__(self, layout: Layout, pieces: Sequence[Sequence[torch.Tensor]], threads: int = 1) -> None:
        self.layout = layout
        self.blocks = [
            Block(index, *block)
            for index, (group, own) in enumerate(zip(layout, pieces, strict=True))
            for block in _cut(own, group.block)
        ]
        self._scratch = [[self._room(index, group) for index, group in enumerate(layout)] for _ in range(threads)]

    @classmethod
    def of_tensors(cls, layout: Layout, tensors: Mapping[str, torch.Tensor], threads: int = 1) -> BlockReader:
        """A reader of tensors by name."""
        return cls(layout, [[tensors[name].detach() for name in group.names] for group in layout], threads)

    @classmethod
    def of_flat(cls, layout: Layout, values: FlatTensors, threads: int = 1) -> BlockReader:
        """A reader of flat buffers."""
        return cls(layout, [[flat] for flat in values.flats], threads)

    def _room(self, index: int, group: Group) -> torch.Tensor:
        longest = max((b.end - b.begin for b in self.blocks if b.group == index), default=0)
        return torch.empty(longest, dtype=group.wide, device=group.device)

    def values(self, block: Block, thread: int = 0) -> torch.Tensor:
        """A block's values, in the averages' dtype; valid until the same thread asks for the next one's."""
        return block.values(self._scratch[thread][block.group])

    def surely_finite(self, crew: Crew = ALONE) -> bool:
        """Whether no value is nan or infinite; false also where all are too large to tell. Waits once a group."""
        totals: dict[int, list[torch.Tensor]] = {block.group: [] for block in self.blocks}

        def add(block: Block, thread: int) -> None:
            totals[block.group].append(block.total(self._scratch[thread][block.group]))

        crew.each(add, self.blocks)
        return all(bool(torch.stack(own).isfinite().all()) for own in totals.values())


def _cut(pieces: Sequence[torch.Tensor], size: int) -> Iterator[tuple[int, int, tuple[torch.Tensor, ...]]]:
    """Blocks of at most `size` elements: begin, end, flat parts; a tensor that cannot be flattened is a block alone."""
    begin = end = 0
    parts: list[torch.Tensor] = []
    for piece in pieces:
        flat = piece.is_contiguous()
        for part in torch.split(piece.view(-1), size) if flat else [piece]:
            if not part.numel():
                continue
            if parts and (not flat or parts[-1].dim() != 1 or end - begin + part.numel() > size):
                yield begin, end, tuple(parts)
                begin, parts = end, []
            parts.append(part)
            end += part.numel()
    if parts:
        yield begin, end, tuple(parts)
