"""A run whose model changes while it is trained: the averages go on with what is as it was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from posthoc_cli.errors import NonFiniteError
from posthoc_cli.tracker.averages import RunningAverages
from posthoc_cli.tracker.layout import accumulator_dtype
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, nonfinite_name

log = logging.getLogger(__name__)


@torch.inference_mode(False)
@torch.no_grad()
def follow_change(averages: RunningAverages, tracked: TrackedModel, found: ModelTensors) -> TrackedModel:
    """Begin a new segment: averages of tensors as they were go on, of others they begin with the present values.

    Arguments:
        averages: changed in place; nothing may be at work on them.
        tracked: what they are of.
        found: what the model has now.

    Returns:
        What is tracked from now on.

    Raises:
        NonFiniteError: a tensor holds nan or infinity, by name; nothing is changed. A new average begins at an update,
            and this is none.
    """
    wanted = replace(TrackedModel.of_model(found), segment=tracked.segment + 1)
    wanted.check_header()
    kept = {name for name in found.averaged if _same(name, tracked, wanted)}
    new = {name: tensor for name, tensor in found.averaged.items() if name not in kept}
    bad = nonfinite_name(found.averaged)
    if bad is not None and bad not in new:
        raise NonFiniteError(f"parameter {bad!r} holds nan or infinity; no average has taken it in")
    if bad is not None:
        raise NonFiniteError(f"parameter {bad!r} is new, and holds nan or infinity; its average cannot begin")
    if averages.exist:
        averages.values = tuple(
            {
                name: own[name] if name in kept else tensor.to(accumulator_dtype(tensor.dtype), copy=True)
                for name, tensor in found.averaged.items()
            }
            for own in averages.values
        )
        averages.copies = {name: tensor.clone() for name, tensor in found.copied.items()}
    log.warning(
        "the model's tensors have changed: %s; a new segment of snapshots begins",
        "; ".join(filter(None, (_listed("new", list(new)), _listed("gone", _gone(tracked, wanted))))) or "tied names",
    )
    return wanted


def _same(name: str, before: TrackedModel, now: TrackedModel) -> bool:
    return before.tensors.get(name) == now.tensors[name] and before.shapes.get(name) == now.shapes[name]


def _gone(before: TrackedModel, now: TrackedModel) -> list[str]:
    return [name for name in before.tensors if name not in now.tensors]


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what}: {', '.join(names[:5])}{more}" if names else ""
