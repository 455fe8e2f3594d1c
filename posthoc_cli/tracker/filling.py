"""A model filled with an average in place, tensor by tensor as it is made."""

from __future__ import annotations

import warnings

import torch

from posthoc_cli.synthesis import Plan, place_synthesis, synthesize
from posthoc_cli.synthesis.placing import Nowhere
from posthoc_cli.tracker.naming import named_modules, named_tensors
from posthoc_cli.tracker.weights import check_dtypes_free, load_weight, weight_targets


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
    if dtype is not None:
        check_dtypes_free(model, dtype)
    for _ in place_synthesis(plan, Nowhere, dtype):
        pass
    with torch.inference_mode(False), torch.no_grad():
        _materialise(model, set(shapes), torch.device(device))
        targets = weight_targets(model, shapes)
        for name, (value,) in synthesize(plan, dtype):
            load_weight(targets[name].tensor, value, own_dtype=dtype is None)
    _warn_of_the_rest(model)


def _materialise(model: torch.nn.Module, filled: set[str], device: torch.device) -> None:
    """Give room to tensors on `meta` that will be filled; tied ones stay tied."""
    made: dict[int, torch.nn.Parameter] = {}
    modules = {place.raw: place.module for place in named_modules(model)}
    for found in named_tensors(model):
        path, _, key = found.raw.rpartition(".")
        tensor = found.registered
        if not tensor.is_meta or found.name not in filled:
            continue
        if not isinstance(tensor, torch.nn.Parameter):
            modules[path]._buffers[key] = torch.empty_like(tensor, device=device)
            continue
        if id(tensor) not in made:
            made[id(tensor)] = torch.nn.Parameter(torch.empty_like(tensor, device=device), tensor.requires_grad)
        modules[path]._parameters[key] = made[id(tensor)]


def _warn_of_the_rest(model: torch.nn.Module) -> None:
    on_meta = {id(found.registered): found.name for found in named_tensors(model) if found.registered.is_meta}
    left = list(on_meta.values())
    if left:
        warnings.warn(
            f"on meta still, since no average fills them: {', '.join(left[:10])}"
            f"{f' and {len(left) - 10} more' if len(left) > 10 else ''}; give them values before the model is used",
            RuntimeWarning,
            stacklevel=4,
        )
