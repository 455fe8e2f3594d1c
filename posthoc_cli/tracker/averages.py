"""The running averages: state, and the arithmetic of one update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from posthoc_cli.profiles import gamma_from_sigma_rel, new_value_share


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: at a decay of 0.9999 a half-precision average never moves."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def update_averages_(averages: Sequence[torch.Tensor], values: Sequence[torch.Tensor], share: float) -> None:
    """averages <- averages + share (values - averages), in place; one fused pass a device and dtype.

    Arguments:
        averages, values: tensors of equal shapes, pairwise on one device and of one dtype.
        share: 1 - beta, from `profiles.new_value_share`.
    """
    groups = defaultdict(list)
    for average, value in zip(averages, values, strict=True):
        groups[average.device, average.dtype].append((average, value))
    for pairs in groups.values():
        torch._foreach_lerp_([average for average, _ in pairs], [value for _, value in pairs], share)


class RunningAverages:
    """Averages of the same tensors with several profiles, on the tensors' own devices.

    Attributes:
        sigma_rels, gammas: the profiles.
        values: for each profile, name -> accumulator; empty before the first update.
        copies: name -> tensor as it was at `t`.
        t, step: time and calls at the last update; 0 before.
        t_first: time of the first update; 0 before.
        max_interval: the longest time between two updates so far.
    """

    def __init__(self, sigma_rels: Sequence[float]) -> None:
        self.sigma_rels = tuple(sigma_rels)
        self.gammas = tuple(gamma_from_sigma_rel(sigma_rel) for sigma_rel in sigma_rels)
        self.values: tuple[dict[str, torch.Tensor], ...] = tuple({} for _ in sigma_rels)
        self.copies: dict[str, torch.Tensor] = {}
        self.t = 0.0
        self.step = 0
        self.t_first = 0.0
        self.max_interval = 0.0

    @property
    def exist(self) -> bool:
        """Whether there was an update yet."""
        return self.t > 0

    @torch.inference_mode(False)  # made there, accumulators could never be updated outside
    @torch.no_grad()
    def update_(
        self, values: Mapping[str, torch.Tensor], copies: Mapping[str, torch.Tensor], t: float, step: int
    ) -> None:
        """Take in the model's tensors as they are at time `t`."""
        wide = {name: value.to(accumulator_dtype(value.dtype)) for name, value in values.items()}
        for gamma, average in zip(self.gammas, self.values, strict=True):
            if not self.exist:
                average.update({name: value.clone() for name, value in wide.items()})
                continue
            self._follow_devices(average, wide)
            share = new_value_share(gamma, self.t, t)
            update_averages_(list(average.values()), [wide[name] for name in average], share)
        self.copies = {name: tensor.clone() for name, tensor in copies.items()}
        if self.exist:
            self.max_interval = max(self.max_interval, t - self.t)
        else:
            self.t_first = t
        self.t, self.step = t, step

    @staticmethod
    def _follow_devices(average: dict[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
        """Move averages to where the model has gone."""
        for name, value in values.items():
            if average[name].device != value.device:
                average[name] = average[name].to(value.device)
