"""Values whose graphs outlive the next optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def recording() -> Iterator[None]:
    """Within the block, graphs keep copies of the tensors that autograd saves, instead of the tensors themselves.

    An optimizer changes parameters in place. A graph that saved one is then unusable, since `backward` would multiply
    with the new value where the derivative has the old one, and torch raises an error. A copy stays as it was.

    Every saved tensor is copied once a block, however many operations save it, and the copy takes its place in the
    graph, so that a recorded graph holds what an ordinary one does, and a copy of each parameter in it. Not covered
    is what a custom `torch.autograd.Function` keeps without `save_for_backward`. Of nested hooks on saved tensors
    only the innermost is called: that is torch's rule.
    """
    copies: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(saved: torch.Tensor) -> torch.Tensor:
        value = saved.detach()
        if value.layout != torch.strided:
            return value.clone()
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.device, value.dtype)
        view = (*place, value.shape, value.stride(), saved._version)
        if view not in copies:
            # The original is held until the block ends: freed, its address could become another tensor's.
            copies[view] = value, value.clone()
        return copies[view][1]

    def give(copy: torch.Tensor) -> torch.Tensor:
        return copy

    try:
        with saved_tensors_hooks(keep, give):
            yield
    finally:
        copies.clear()
