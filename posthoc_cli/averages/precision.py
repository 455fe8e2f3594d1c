"""Averages of half-precision tensors: where the bits are kept that the tensors have no room for.

bfloat16 has 8 significant bits, float16 has 11. An update by 2e-4 of a distance is smaller than half of a weight's last
bit unless the distance is larger than the weight: rounded to such a dtype after every update, an average never leaves
its start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether averages in this dtype would stop moving: floating-point of fewer than 32 bits."""
    return dtype.is_floating_point and torch.finfo(dtype).bits < 32


def kept_wide(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What a module keeps of `before` when it was moved or cast to `after`: the new device, but no narrow dtype."""
    return before.to(after.device) if is_narrow(after.dtype) and not is_narrow(before.dtype) else after


def copies_like(wanted: Sequence[tuple[torch.Tensor, torch.device, torch.dtype]]) -> list[torch.Tensor]:
    """Copies of tensors on other devices and in other dtypes, in one fused pass."""
    copies = [torch.empty_like(tensor, device=device, dtype=dtype) for tensor, device, dtype in wanted]
    if copies:
        torch._foreach_copy_(copies, [tensor for tensor, _, _ in wanted])
    return copies


class WideBuffers(torch.nn.Module):
    """A module whose own buffers follow to another device, but keep their precision under `half()` and the like."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> WideBuffers:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None:
                self._buffers[name] = kept_wide(old, new)
        return self


class Accumulators(torch.nn.Module):
    """The float32 averages behind half-precision tensors, which hold them rounded.

    An element counts as long as it rounds to the tensor's: whoever wrote to the tensor since (a swap, a
    `load_state_dict` of a state without accumulators) has the last word. They are part of the state dict, one key a
    half-precision tensor; a model without such tensors has none.

    Attributes:
        values: name of the tensor -> float32 average.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, torch.Tensor] = {}

    def behind(self, names: Sequence[str], rounded: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The float32 averages behind tensors, to be changed in place; the caller then rounds them into the tensors."""
        wanted = dict(zip(names, rounded, strict=True))
        known = {}
        for name, tensor in wanted.items():
            value = self.values.get(name)
            if value is not None and value.shape == tensor.shape:
                known[name] = value.to(tensor.device)
        again = copies_like([(value, value.device, wanted[name].dtype) for name, value in known.items()])
        for (name, value), same in zip(known.items(), again, strict=True):
            torch.where(same == wanted[name], value, wanted[name], out=value)
        new = [name for name in names if name not in known]
        made = copies_like([(wanted[name], wanted[name].device, torch.float32) for name in new])
        self.values.update(known)
        self.values.update(zip(new, made, strict=True))
        return [self.values[name] for name in names]

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Accumulators:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.values = {name: kept_wide(value, fn(value)) for name, value in self.values.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: value for name, value in self.values.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Take what is there: a state of another class, or of a float32 model, has none."""
        self.values = {
            key.removeprefix(prefix): value.detach().clone()
            for key, value in state_dict.items()
            if key.startswith(prefix)
        }
