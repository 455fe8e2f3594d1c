"""The order between what training has accelerators do and what a thread beside it has them do.

Work of one stream is done in order; a thread of its own would use another one. On the host there is nothing to order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

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
