"""Averaged weights in memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from posthoc_cli.errors import count_noun, percent
from posthoc_cli.synthesis.plan import Plan

if TYPE_CHECKING:
    import torch


class Weights(OrderedDict[str, "torch.Tensor"]):
    """Averaged tensors by name. It pickles as a plain OrderedDict, so that a file of it loads with
    `weights_only=True`.

    A `with` block of it does nothing: users of other libraries write `with ema.state_dict(...) as
    weights`, where the block's end frees what was made.
    """

    # expected relative L2 distance from the true average; None if unknown
    predicted_error: float | None = None
    # relative L2 distance between the wanted profile and the one made from the snapshots
    profile_error: float = 0.0
    t: float | None = None  # the training time of the average

    def __repr__(self) -> str:
        error = "unknown" if self.predicted_error is None else percent(self.predicted_error)
        return f"Weights({count_noun(len(self), 'tensor')}, predicted error {error})"

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())


def make_weights(
    plan: Plan,
    device: torch.device | str = "cpu",
) -> Weights:
    """Make the first target of a plan in memory. Raises the errors of `synthesize`."""
    from posthoc_cli.synthesis.engine import synthesize

    tensors = {name: values[0] for name, values in synthesize(plan, device)}
    weights = Weights((name, tensors[name]) for name in plan.entries)
    weights.predicted_error = plan.predicted_error(0)
    weights.profile_error = plan.profile_error(0)
    weights.t = plan.t
    return weights
