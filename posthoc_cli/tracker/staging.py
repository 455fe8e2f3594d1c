"""The model's values copied out of training's way, into memory that a worker may read at leisure."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from posthoc_cli.tracker.layout import BlockReader, FlatTensors, Group, Layout, lay_out


@dataclass(frozen=True, eq=False)
class Staged:
    """A model's values at one moment, on the host.

    Attributes:
        layout: of the buffers.
        values: the parameters, in their own dtypes.
        events: of accelerators, after which the values are there.
    """

    layout: Layout
    values: FlatTensors
    events: tuple[Any, ...] = ()

    def arrived(self) -> Mapping[str, torch.Tensor]:
        """The values by name; waits until they are there."""
        for event in self.events:
            event.synchronize()
        return self.values.views

    def reader(self) -> BlockReader:
        """The values, block by block; waits until they are there."""
        self.arrived()
        return BlockReader.of_flat(self.layout, self.values)


class Stager:
    """Copies models' values into buffers on the host, and uses the buffers again.

    From an accelerator, the values are first copied, in the training's own stream, into one buffer there, and from
    there to the host by another stream: training goes on meanwhile.
    """

    def __init__(self) -> None:
        self._free: list[Staged] = []
        self._lock = threading.Lock()
        self._known: tuple[Mapping[str, torch.Tensor], Layout] | None = None
        self._on_device: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}
        self._streams: dict[torch.device, Any] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def stage(self, tensors: Mapping[str, torch.Tensor]) -> Staged:
        """A copy of tensors as they are now; give it back by `give_back`."""
        if self._known is None or self._known[0] is not tensors:
            self._known = tensors, lay_out(tensors)
        layout = self._known[1]
        staged = self._buffers(layout)
        copied = [self._copy(group, tensors, room) for group, room in zip(layout, staged.values.flats, strict=True)]
        return replace(staged, events=tuple(event for event in copied if event is not None))

    def give_back(self, staged: Staged) -> None:
        """The copy is no longer needed; from any thread."""
        with self._lock:
            self._free = [replace(staged, events=())]  # one is enough, and old layouts go

    def _buffers(self, layout: Layout) -> Staged:
        host = tuple(replace(group, device=torch.device("cpu")) for group in layout)
        with self._lock:
            for index, staged in enumerate(self._free):
                if staged.layout == host:
                    return self._free.pop(index)
        pinned = any(group.device.type == "cuda" for group in layout)
        return Staged(host, FlatTensors(host, wide=False, pinned=pinned))

    def _copy(self, group: Group, tensors: Mapping[str, torch.Tensor], room: torch.Tensor) -> Any:
        """Copy tensors of one device to the host; returns the event after which they are there, None for now."""
        values = [tensors[name].detach() for name in group.names]
        if group.device.type != "cuda":
            torch._foreach_copy_([view for _, view in group.views(room)], values)
            return None
        cuda: Any = torch.cuda
        if group.device not in self._streams:
            self._streams[group.device] = cuda.Stream(group.device)
        stream = self._streams[group.device]
        training = cuda.current_stream(group.device)
        training.wait_stream(stream)  # the buffer's last copy may still be on its way to the host
        buffer = self._on_device.get((group.device, group.dtype))
        if buffer is None or buffer.numel() != group.elements:
            buffer = torch.empty(group.elements, dtype=group.dtype, device=group.device)
            self._on_device[group.device, group.dtype] = buffer
        torch._foreach_copy_([view for _, view in group.views(buffer)], values)
        stream.wait_stream(training)
        with cuda.stream(stream):
            room.copy_(buffer, non_blocking=True)
        return stream.record_event()
