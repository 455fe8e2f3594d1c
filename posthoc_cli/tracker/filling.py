"""A model filled with an average in place, tensor by tensor as it is made."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import chain, islice, pairwise

import torch

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.snapshots.tensors import torch_dtype
from posthoc_cli.synthesis import Plan, place_synthesis, synthesize
from posthoc_cli.synthesis.placing import Nowhere
from posthoc_cli.synthesis.plan import names_by_tensor
from posthoc_cli.synthesis.tiles import Tile
from posthoc_cli.tracker.naming import named_tensors
from posthoc_cli.tracker.weights import check_dtypes_free, check_fits, load_weight, weight_targets


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
    targets = weight_targets(model, shapes)
    if dtype is not None:
        check_dtypes_free(model, dtype)
    room = _usable_device(device)
    dtypes = {name: target.tensor.dtype for name, target in targets.items()} if dtype is None else {}
    names = names_by_tensor(plan.newest.info)
    for _ in place_synthesis(plan, lambda tile: _Fitting(tile, dtypes, names), dtype):
        pass
    with torch.inference_mode(False), torch.no_grad():
        made = synthesize(plan, dtype)
        first = list(islice(made, 1))  # all files are open now, so that none can go any more
        _materialise(model, set(shapes), room)
        targets = weight_targets(model, shapes)
        for name, (value,) in chain(first, made):
            load_weight(targets[name].tensor, value, own_dtype=dtype is None)
    _warn_of_the_rest(model)


class _Fitting(Nowhere):
    """Drops results after a check that the model's tensors can hold them."""

    def __init__(self, tile: Tile, dtypes: Mapping[str, torch.dtype], names: Mapping[str, Sequence[str]]) -> None:
        super().__init__(tile)
        self._pieces = [
            (name, dtypes[name], start, end)
            for piece, (start, end) in zip(tile.pieces, pairwise(tile.bounds), strict=True)
            for name in names[piece.name]
            if dtypes and dtypes[name] != torch_dtype(tile.dtype)
        ]

    def place(self, target: int, begin: int, values: torch.Tensor) -> None:  # noqa: ARG002
        """See `making.Placement`."""
        for name, dtype, start, end in self._pieces:
            check_fits(name, values[max(0, start - begin) : max(0, end - begin)], dtype)


def _usable_device(device: torch.device | str) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without it
        reason = str(error).split("\n")[0]
        raise InvalidValueError("device", f"cannot be used: {reason}", value=f"{str(device)!r}") from error


def _materialise(model: torch.nn.Module, filled: set[str], device: torch.device) -> None:
    """Give room to tensors on `meta` that will be filled; tied ones stay tied, under whatever names."""
    named = named_tensors(model)
    old = {id(found.registered): found.registered for found in named if found.tensor.is_meta and found.name in filled}
    new = {key: torch.empty_like(tensor, device=device) for key, tensor in old.items()}
    for key, tensor in old.items():
        if isinstance(tensor, torch.nn.Parameter):
            new[key] = torch.nn.Parameter(new[key], tensor.requires_grad)
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, value in own.items():
                if id(value) in new:
                    own[name] = new[id(value)]  # type: ignore[assignment]


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
