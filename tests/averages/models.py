"""What tests of averaged modules share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from factories import FloatArray


def rounding(updates: int, largest: float) -> float:
    """A float32 update rounds a difference (at most twice the largest value), a product of it, the share and a sum."""
    return updates * 7 * 2.0**-24 * largest


def numbers(tensor: torch.Tensor) -> FloatArray:
    return tensor.detach().double().numpy().copy()


def random_steps(model: torch.nn.Module, steps: int, seed: int = 1) -> Iterator[int]:
    """As if trained: every floating-point tensor is moved, every integer counted up."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        with torch.no_grad():
            for tensor in {id(t): t for t in model.state_dict().values()}.values():
                if tensor.is_floating_point():
                    tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
                else:
                    tensor.add_(1)
        yield step
