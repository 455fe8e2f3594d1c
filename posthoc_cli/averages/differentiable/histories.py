"""What each mode of `DifferentiableEMA` keeps of the past, so that gradients reach it."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable
from typing import Protocol

import torch

from posthoc_cli.errors import InvalidValueError

Decay = float | torch.Tensor
"""A number, or a tensor of no dimensions that may be part of a graph."""

LONGEST_QUIET_GRAPH = 99
"""Values in a growing graph without a warning."""


class History(Protocol):
    """What is kept between updates beside the average itself."""

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """The new average, with whatever graph this mode gives it; a tensor of its own.

        Arguments:
            average: the average before, without a graph; None at the first value.
            value: the new value, of the same shape, dtype and device.
            decay: of this update.
            leaves: what derivatives are carried for; None where none were given.
        """
        ...

    def fresh(self) -> History:
        """One like this that has seen nothing."""
        ...


def blend(average: torch.Tensor, value: torch.Tensor, decay: Decay) -> torch.Tensor:
    """decay average + (1 - decay) value."""
    return average * decay + value * (1 - decay)


def refuse_leaves(leaves: Iterable[torch.Tensor] | None) -> None:
    """Raise an InvalidValueError where leaves were given to a mode that finds them by itself."""
    if leaves is not None:
        raise InvalidValueError(
            "leaves", "only mode 'carried' takes them; the other modes follow the value's own graph"
        )


class Truncated:
    """Nothing: gradients reach the newest value only."""

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """See `History`."""
        refuse_leaves(leaves)
        return value.clone() if average is None else blend(average, value, decay)

    def fresh(self) -> Truncated:
        """See `History`."""
        return Truncated()


class Window:
    """The last `length` values with their graphs, and the average of everything before them, without one.

    Attributes:
        length: how many values are kept.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._before: torch.Tensor | None = None
        self._kept: deque[tuple[torch.Tensor, Decay]] = deque()

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """See `History`."""
        refuse_leaves(leaves)
        if not self._kept:
            self._before = average
        elif len(self._kept) == self.length:
            self._drop_oldest()
        # A copy: the value may be a view of a parameter, which the optimizer is going to change.
        self._kept.append((value.clone(), decay))
        running = None if self._before is None else self._before.to(value)
        for kept, decay_then in self._kept:
            running = _next(running, kept.to(value), decay_then)
        assert running is not None
        return running

    def fresh(self) -> Window:
        """See `History`."""
        return Window(self.length)

    def _drop_oldest(self) -> None:
        value, decay = self._kept.popleft()
        with torch.no_grad():
            before = None if self._before is None else self._before.to(value)
            self._before = _next(before, value, decay)


class Full:
    """The whole graph, which grows with every value."""

    def __init__(self) -> None:
        self._average: torch.Tensor | None = None
        self._length = 0

    def take_in(
        self, average: torch.Tensor | None, value: torch.Tensor, decay: Decay, leaves: Iterable[torch.Tensor] | None
    ) -> torch.Tensor:
        """See `History`."""
        refuse_leaves(leaves)
        before = average if self._average is None else self._average.to(value)
        self._average = _next(before, value, decay)
        self._length += 1
        if self._length > LONGEST_QUIET_GRAPH:
            warnings.warn(
                f"mode 'full' holds the graphs of {self._length} values, and one more with each; use 'window' or "
                "'carried' for training, or call reset()",
                RuntimeWarning,
                stacklevel=CALLER,
            )
        return self._average.clone()

    def fresh(self) -> Full:
        """See `History`."""
        return Full()


CALLER = 5
"""Frames from a warning in `take_in` to the call of the module: take_in, forward, two of torch.nn.Module."""


def _next(average: torch.Tensor | None, value: torch.Tensor, decay: Decay) -> torch.Tensor:
    """The average after `value`; the first value is its own average."""
    if average is None:
        return value.clone()
    if isinstance(decay, torch.Tensor):
        decay = decay.to(average.device)
    return blend(average, value, decay)
