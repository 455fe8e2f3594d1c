"""The model's values copied out of training's way, into memory that a worker may read at leisure.

The order between what training has accelerators do and what a thread beside it has them do.

Work of one stream is done in order; a thread of its own would use another one. On the host there is nothing to order.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from posthoc_cli.tracker.layout import BlockReader, FlatTensors, Group, Layout, lay_out

Streams = dict[torch.device, Any]
Marks = tuple[tuple[torch.device, Any], ...]
"""Events, each with its device: what was asked of it before is done when the event is."""


class DeviceStreams:
    """The streams of one tracker.

    Attributes:
        last: what comes after the last update.
    """

    def __init__(self) -> None:
        self.last: Marks = ()
        self._own: Streams = {}

    @staticmethod
    def current(devices: Iterable[torch.device]) -> Streams:
        """The streams that the calling thread uses on these devices."""
        return {device: torch.cuda.current_stream(device) for device in {*devices} if device.type == "cuda"}

    @classmethod
    def marks(cls, tensors: Iterable[torch.Tensor]) -> Marks:
        """Events after what the calling thread has asked for so far."""
        return tuple(
            (device, stream.record_event()) for device, stream in cls.current(t.device for t in tensors).items()
        )

    @contextmanager
    def entered(self, streams: Streams) -> Iterator[None]:
        """Work in streams of another thread, which waits meanwhile; `last` comes after it."""
        with ExitStack() as stack:
            for stream in streams.values():
                stack.enter_context(torch.cuda.stream(stream))
            yield
            self.last = tuple((device, stream.record_event()) for device, stream in streams.items())

    @contextmanager
    def beside_training(self) -> Iterator[None]:
        """Work in streams of this thread's own, after the last update; it is done at the end of the block."""
        cuda: Any = torch.cuda
        with ExitStack() as stack:
            for device, event in self.last:
                if device not in self._own:
                    self._own[device] = cuda.Stream(device)
                self._own[device].wait_event(event)
                stack.enter_context(cuda.stream(self._own[device]))
            yield
            for device, _ in self.last:
                self._own[device].synchronize()


# --- The model's values copied out of training's way, into memory that a worker may read at leisure ---


@dataclass(frozen=True, eq=False)
class Staged:
    """A model's values at one moment, on the host.

    Attributes:
        layout: of the buffers with what is averaged.
        values: the parameters, in their own dtypes.
        copied_layout, copied: the same of what is copied.
        events: of accelerators, after which the values are there.
    """

    layout: Layout
    values: FlatTensors
    copied_layout: Layout
    copied: FlatTensors
    events: tuple[Any, ...] = ()

    def arrived(self) -> Mapping[str, torch.Tensor]:
        """The values by name; waits until they are there."""
        self._wait()
        return self.values.views

    def copies(self) -> dict[str, torch.Tensor]:
        """What is copied, by name, in tensors of its own that outlast these buffers; waits until it is there."""
        self._wait()
        return {name: view.clone() for name, view in self.copied.views.items()}

    def reader(self, threads: int = 1) -> BlockReader:
        """The values, block by block, for so many threads; waits until they are there."""
        self._wait()
        return BlockReader.of_flat(self.layout, self.values, threads)

    def _wait(self) -> None:
        for event in self.events:
            event.synchronize()


@dataclass(eq=False)
class _DeviceBuffer:
    """A group's values on an accelerator, and the event after which they have left for the host."""

    values: torch.Tensor
    sent: Any = None


@dataclass(eq=False)
class _Known:
    """Tensors that were staged last, how they lie, and a buffer on the accelerator a group."""

    averaged: Mapping[str, torch.Tensor]
    copied: Mapping[str, torch.Tensor] | None
    layouts: tuple[Layout, Layout]
    buffers: dict[int, _DeviceBuffer] = field(default_factory=dict)


class Stager:
    """Copies models' values into buffers on the host, and uses the buffers again.

    From an accelerator, the values are first copied, in the training's own stream, into a buffer there, and from
    there to the host by another stream: training goes on meanwhile. So one more copy of what is staged stays on the
    accelerator.
    """

    def __init__(self) -> None:
        self._free: list[Staged] = []
        self._lock = threading.Lock()
        self._known: _Known | None = None
        self._streams: dict[torch.device, Any] = {}

    @torch.inference_mode(False)
    @torch.no_grad()
    def stage(self, averaged: Mapping[str, torch.Tensor], copied: Mapping[str, torch.Tensor] | None = None) -> Staged:
        """A copy of tensors as they are now; give it back by `give_back`.

        Arguments:
            averaged: parameters.
            copied: what goes with them, for `Staged.copies`.
        """
        known = self._known
        if known is None or known.averaged is not averaged or known.copied is not copied:
            known = self._known = _Known(averaged, copied, (lay_out(averaged), lay_out(copied or {})))
        layout, copied_layout = known.layouts
        staged = self._buffers(layout, copied_layout)
        work = [(group, averaged, room) for group, room in zip(layout, staged.values.flats, strict=True)]
        work += [(group, copied or {}, room) for group, room in zip(copied_layout, staged.copied.flats, strict=True)]
        events = [self._copy(index, *one) for index, one in enumerate(work)]
        return replace(staged, events=tuple(event for event in events if event is not None))

    def give_back(self, staged: Staged) -> None:
        """The copy has arrived and is no longer needed; from any thread."""
        with self._lock:
            self._free = [replace(staged, events=())]  # one is enough, and old layouts go

    def _buffers(self, *layouts: Layout) -> Staged:
        own, copied = (tuple(replace(group, device=torch.device("cpu")) for group in layout) for layout in layouts)
        with self._lock:
            for index, staged in enumerate(self._free):
                if (staged.layout, staged.copied_layout) == (own, copied):
                    return self._free.pop(index)
        pinned = any(group.device.type == "cuda" for layout in layouts for group in layout)
        values, copies = (FlatTensors(layout, wide=False, pinned=pinned) for layout in (own, copied))
        return Staged(own, values, copied, copies)

    def _copy(self, index: int, group: Group, tensors: Mapping[str, torch.Tensor], room: torch.Tensor) -> Any:
        """Copy tensors of one group to the host; returns the event after which they are there, None for now."""
        values = [tensors[name].detach() for name in group.names]
        if group.device.type != "cuda":
            torch._foreach_copy_([view for _, view in group.views(room)], values)
            return None
        cuda: Any = torch.cuda
        if group.device not in self._streams:
            self._streams[group.device] = cuda.Stream(group.device)
        stream, training = self._streams[group.device], cuda.current_stream(group.device)
        buffer = self._device_buffer(index, group)
        if buffer.sent is not None:
            training.wait_event(buffer.sent)  # its last values may still be on their way to the host
        torch._foreach_copy_([view for _, view in group.views(buffer.values)], values)
        stream.wait_stream(training)
        with cuda.stream(stream):
            room.copy_(buffer.values, non_blocking=True)
        # A thread that waits for it sleeps, and takes no core from the training.
        buffer.sent = stream.record_event(cuda.Event(blocking=True))
        # Given free, it is not used again before both are done with it.
        for user in (stream, training):
            buffer.values.record_stream(user)
        return buffer.sent

    def _device_buffer(self, index: int, group: Group) -> _DeviceBuffer:
        assert self._known is not None
        buffers = self._known.buffers
        if index not in buffers:
            buffers[index] = _DeviceBuffer(torch.empty(group.elements, dtype=group.dtype, device=group.device))
        return buffers[index]
