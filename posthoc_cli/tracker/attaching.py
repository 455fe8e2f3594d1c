"""A tracker that follows an optimizer by itself."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch

from posthoc_cli.errors import InvalidValueError, NotReadyError


def follow_optimizer(
    optimizer: torch.optim.Optimizer,
    model: weakref.ref[torch.nn.Module] | None,
    update: Callable[[torch.nn.Module], object],
) -> torch.utils.hooks.RemovableHandle:
    """Call `update` with the model after every step of `optimizer`.

    Raises:
        InvalidValueError: not an optimizer, or no model to follow.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidValueError(f"attach: must be given a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if model is None:
        raise InvalidValueError("attach: this tracker was made without a model; give it to from_model or from_path")

    def after_step(*_: object) -> None:
        followed = model()
        if followed is None:
            raise NotReadyError("attach: the model that this tracker was made with is gone")
        update(followed)

    return optimizer.register_step_post_hook(after_step)
