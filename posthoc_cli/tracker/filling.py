"""A model filled with an average in place, tensor by tensor as it is made."""

from __future__ import annotations

import warnings

import torch

from posthoc_cli.synthesis import Plan, place_synthesis, synthesize
from posthoc_cli.synthesis.placing import Nowhere
from posthoc_cli.tracker.weights import load_weight, weight_targets


def fill_model(
    model: torch.nn.Module, plan: Plan, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu"
) -> None:
    """Fill a model's own tensors with the first target of a plan.

    Everything is made once and dropped before the first tensor changes, so that a damaged snapshot, a value that is
    not finite or a model that does not fit leaves the model as it was; that takes the time twice, and no memory.

    Arguments:
        model: with tensors of the plan's names and shapes; others of its tensors are left alone.
        plan: of one target.
        dtype: None keeps the model's dtypes; else averages take this one.
        device: where tensors on `meta` come to be.

    Raises:
        ModelMismatchError: naming the tensor, before anything is changed.
        FileFormatError, NonFiniteError: as `synthesize`, before anything is changed.
    """
    shapes = {spec.name: spec.shape for spec in plan.specs()}
    weight_targets(model, shapes)
    for _ in place_synthesis(plan, Nowhere, dtype):
        pass
    with torch.inference_mode(False), torch.no_grad():
        _materialise(model, set(shapes), torch.device(device))
        targets = weight_targets(model, shapes)
        for name, (value,) in synthesize(plan, dtype):
            load_weight(targets[name], value, own_dtype=dtype is None)
    _warn_of_the_rest(model)


def _materialise(model: torch.nn.Module, filled: set[str], device: torch.device) -> None:
    """Give room to tensors on `meta` that will be filled; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        start = f"{prefix}." if prefix else ""
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta or start + key not in filled:
                continue
            if id(parameter) not in made:
                room = torch.empty_like(parameter, device=device)
                made[id(parameter)] = torch.nn.Parameter(room, parameter.requires_grad)
            module._parameters[key] = made[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and start + key in filled:
                module._buffers[key] = torch.empty_like(buffer, device=device)


def _warn_of_the_rest(model: torch.nn.Module) -> None:
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        warnings.warn(
            f"on meta still, since no average fills them: {', '.join(left[:10])}"
            f"{f' and {len(left) - 10} more' if len(left) > 10 else ''}; give them values before the model is used",
            RuntimeWarning,
            stacklevel=4,
        )
