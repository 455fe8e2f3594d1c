"""What the demo measures: validation losses, and synthesized weights against directly tracked ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from posthoc_cli.demo.denoiser import Denoiser, Validation

Weights = Mapping[str, torch.Tensor]


RAW = 0.0
"""sigma_rel of the raw weights: an average of no length."""


@dataclass(frozen=True)
class Measured:
    """One set of weights on the validation images.

    Attributes:
        sigma_rel: of the average; `RAW` for the raw weights.
        loss: the validation loss.
        above_best: how far it is above the lowest one of the averages.
        standard_error: of `above_best`, over the images; both losses are measured with the same noise.
    """

    sigma_rel: float
    loss: float
    above_best: float
    standard_error: float


@dataclass(frozen=True)
class DirectCheck:
    """Synthesized weights beside the average of the same length that was tracked directly, in float64.

    Attributes:
        relative_error: || synthesized - tracked || / || tracked || over all parameters.
        raw_distance: the same of the raw weights: how far training ends from its average.
    """

    sigma_rel: float
    relative_error: float
    raw_distance: float


def measure(
    validation: Validation, model: Denoiser, raw: Weights, averages: Mapping[float, Weights]
) -> tuple[Measured, list[Measured]]:
    """The validation loss of the raw weights, and of averages by sigma_rel. `model` takes each of them in turn."""
    losses = {sigma_rel: validation(_loaded(model, weights)) for sigma_rel, weights in averages.items()}
    best = min(losses.values(), key=lambda loss: float(loss.mean()))
    of_raw = _measured(RAW, validation(_loaded(model, raw)), best)
    return of_raw, [_measured(sigma_rel, loss, best) for sigma_rel, loss in losses.items()]


def best_of(averages: Sequence[Measured]) -> Measured:
    """The one with the lowest loss."""
    return min(averages, key=lambda measured: measured.loss)


def compare(sigma_rel: float, synthesized: Weights, tracked: Weights, raw: Weights) -> DirectCheck:
    """Distances to the directly tracked average, over the tensors that it holds."""
    return DirectCheck(sigma_rel, _relative_distance(synthesized, tracked), _relative_distance(raw, tracked))


def _loaded(model: Denoiser, weights: Weights) -> Denoiser:
    model.load_state_dict(weights)
    return model


def _measured(sigma_rel: float, loss: torch.Tensor, best: torch.Tensor) -> Measured:
    above = loss - best
    return Measured(sigma_rel, float(loss.mean()), float(above.mean()), float(above.std() / len(above) ** 0.5))


def _relative_distance(weights: Weights, reference: Weights) -> float:
    apart = _flat({name: weights[name].double() - value for name, value in reference.items()})
    return float(apart.norm() / _flat(reference).norm())


def _flat(weights: Weights) -> torch.Tensor:
    return torch.cat([value.reshape(-1) for value in weights.values()])
