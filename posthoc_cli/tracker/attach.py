"""A tracker that an optimizer's steps update."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer


class Attachment:
    """A tracker's attachment to one optimizer, until `remove`.

    A step counts when it has changed the parameters, and counts once, however often it calls its
    closure. A step that a GradScaler skips does not count, nor a step that only makes the
    optimizer's state for a checkpoint. `optimizer.step()` raises an error of the update after it
    has changed the parameters.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        update: Callable[[float | None], None],
        t: Callable[[], float] | None,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._update: Callable[[float | None], None] | None = update  # while attached
        self._t = t
        # A compiled step must not trace file operations and counters.
        hook = torch.compiler.disable(self._after_step)  # type: ignore[no-untyped-call]
        self._handle = optimizer.register_step_post_hook(hook)

    def remove(self) -> None:
        """Detach the tracker. A second call does nothing."""
        self._handle.remove()
        self._update = None  # which holds the tracker

    @property
    def optimizer(self) -> Optimizer | None:
        """The optimizer, or None once the tracker is detached or the optimizer no longer exists."""
        return None if self._update is None else self._optimizer()

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if self._update is None or was_skipped(optimizer) or _makes_state(optimizer):
            return
        self._update(None if self._t is None else self._t())


def was_skipped(optimizer: Optimizer) -> bool:
    """Return whether the step that ends now changed nothing: a GradScaler calls fused optimizers
    even when it finds infinities."""
    return bool(getattr(optimizer, "found_inf", None))


def _makes_state(optimizer: Optimizer) -> bool:
    """Return whether a step has rates and gradients of 0, by which torch makes an optimizer's state
    for a checkpoint; the first step of a warm-up may have a rate of 0, too."""
    gradients = []
    for group in optimizer.param_groups:
        rate = group.get("lr", 1.0)
        # torch's 0 is on the CPU; reading a rate on an accelerator would wait for it at every step
        if (isinstance(rate, Tensor) and rate.device.type != "cpu") or float(rate):
            return False
        gradients += [parameter.grad for parameter in group["params"]]
    return not any(gradient is not None and bool(gradient.any()) for gradient in gradients)
