"""A run whose model changes while it is trained: the averages go on with what is as it was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from posthoc_cli.errors import NonFiniteError
from posthoc_cli.tracker.model_tensors import ModelTensors, TrackedModel, nonfinite_name

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Change:
    """A new segment: averages of tensors as they were go on, of others they begin with the present values.

    Attributes:
        tracked: what is tracked from now on.
        begun: names of the tensors whose averages begin.
    """

    tracked: TrackedModel
    begun: tuple[str, ...]


@torch.no_grad()
def find_change(tracked: TrackedModel, found: ModelTensors) -> Change:
    """How to go on with what a model has now, in place of what was tracked.

    Raises:
        NonFiniteError: a tensor holds nan or infinity, by name. A new average begins at an update, and this is none.
    """
    wanted = replace(TrackedModel.of_model(found), segment=tracked.segment + 1)
    wanted.check_header()
    begun = [name for name in found.averaged if not _same(name, tracked, wanted)]
    bad = nonfinite_name(found.averaged)
    if bad is not None and bad not in begun:
        raise NonFiniteError(f"parameter {bad!r}", "holds nan or infinity; no average has taken it in")
    if bad is not None:
        raise NonFiniteError(f"parameter {bad!r}", "is new, and holds nan or infinity; its average cannot begin")
    log.warning(
        "the model's tensors have changed: %s; a new segment of snapshots begins",
        "; ".join(filter(None, (_listed("new", begun), _listed("gone", _gone(tracked, wanted))))) or "tied names",
    )
    return Change(wanted, tuple(begun))


def _same(name: str, before: TrackedModel, now: TrackedModel) -> bool:
    return before.tensors.get(name) == now.tensors[name] and before.shapes.get(name) == now.shapes[name]


def _gone(before: TrackedModel, now: TrackedModel) -> list[str]:
    return [name for name in before.tensors if name not in now.tensors]


def _listed(what: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{what}: {', '.join(names[:5])}{more}" if names else ""
