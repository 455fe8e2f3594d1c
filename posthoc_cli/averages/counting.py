"""Numbers that live in a buffer and are read on the host."""

from __future__ import annotations

import torch


class HostNumber:
    """What a scalar buffer holds, known without asking its device.

    The buffer is what is saved, loaded, moved and broadcast. Reading it from a GPU would wait for all work that was
    queued before, in every training step; so it is read only after somebody else has written to it.
    """

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None
        self._version = -1
        self._value = 0.0

    def read(self, buffer: torch.Tensor) -> float:
        """The number in `buffer`."""
        if buffer is not self._buffer or buffer._version != self._version:
            self._note(buffer, float(buffer.item()))
        return self._value

    def write_(self, buffer: torch.Tensor, value: float) -> None:
        """Put `value` into `buffer`, and go on with it as rounded there, as a resumed run will."""
        buffer.fill_(value)
        self._note(buffer, float(torch.tensor(value, dtype=buffer.dtype)))

    def _note(self, buffer: torch.Tensor, value: float) -> None:
        self._buffer, self._version, self._value = buffer, buffer._version, value
