"""The model's values copied out of training's way, into memory that a worker may read at leisure."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from posthoc_cli.tracker.layout import BlockReader, FlatTensors, Layout, lay_out


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
        self._on_device: dict[torch.device, tuple[Layout, FlatTensors]] = {}
        self._streams: dict[torch.device, Any] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def stage(self, tensors: Mapping[str, torch.Tensor]) -> Staged:
        """A copy of tensors as they are now; give it back by `give_back`."""
        layout = lay_out(tensors, torch.device("cpu"))
        staged = self._buffers(layout, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        devices = {tensor.device for tensor in tensors.values()}
        events = []
        for device in devices:
            own = {name: tensor.detach() for name, tensor in tensors.items() if tensor.device == device}
            event = self._copy(own, staged.values.views, device)
            events += [] if event is None else [event]
        return replace(staged, events=tuple(events))

    def give_back(self, staged: Staged) -> None:
        """The copy is no longer needed; from any thread."""
        with self._lock:
            self._free = [replace(staged, events=())]  # one is enough, and old layouts go

    def _buffers(self, layout: Layout, pinned: bool) -> Staged:
        with self._lock:
            for index, staged in enumerate(self._free):
                if staged.layout == layout:
                    return self._free.pop(index)
        return Staged(layout, FlatTensors(layout, wide=False, pinned=pinned))

    def _copy(self, tensors: Mapping[str, torch.Tensor], room: Mapping[str, torch.Tensor], device: torch.device) -> Any:
        """Copy tensors of one device to the host; returns the event after which they are there, None for now."""
        if device.type != "cuda":
            torch._foreach_copy_([room[name] for name in tensors], list(tensors.values()))
            return None
        cuda: Any = torch.cuda
        layout = lay_out(tensors)
        if device not in self._on_device or self._on_device[device][0] != layout:
            self._on_device[device] = layout, FlatTensors(layout, wide=False)
        _, buffers = self._on_device[device]
        stream = self._streams.setdefault(device, cuda.Stream(device))
        training = cuda.current_stream(device)
        training.wait_stream(stream)  # the buffer's last copy may still be on its way to the host
        torch._foreach_copy_([buffers.views[name] for name in tensors], list(tensors.values()))
        stream.wait_stream(training)
        with cuda.stream(stream):
            for name, view in buffers.views.items():
                room[name].copy_(view, non_blocking=True)
        return stream.record_event()
