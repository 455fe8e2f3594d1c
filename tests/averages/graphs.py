"""How many tensors the graphs that are still alive have saved for their backward passes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks


class Saved:
    """A tensor that a graph holds for its backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor.detach()


@contextmanager
def saving(alive: weakref.WeakSet[Saved]) -> Iterator[None]:
    """Record the tensors that graphs made in the block save; those of graphs that are freed vanish from `alive`."""
    with saved_tensors_hooks(lambda tensor: alive.add(kept := Saved(tensor)) or kept, lambda kept: kept.tensor):
        yield
