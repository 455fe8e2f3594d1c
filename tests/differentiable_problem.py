"""What tests of `DifferentiableEMA` average: values with known derivatives; and the formulas, written a second time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from posthoc_cli.averages import DifferentiableEMA

FloatArray = npt.NDArray[np.float64]

DECAY = 0.9
STEPS = 30
ROWS, WEIGHTS = 3, 5
EPS = np.finfo(np.float64).eps

MODES: dict[str, dict[str, Any]] = {
    "truncated": {},
    "window": {"window": 7},
    "carried": {},
    "full": {},
}


class Problem:
    """Values x_i = tanh(A_i w_i), whose derivative is (1 - x_i**2) A_i; and a target for their average."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.data = random.normal(size=(STEPS, ROWS, WEIGHTS))
        self.start = random.normal(size=WEIGHTS)
        self.target = random.normal(size=ROWS)

    def value(self, step: int, weight: torch.Tensor) -> torch.Tensor:
        return torch.tanh(torch.as_tensor(self.data[step]) @ weight)

    def values(self, weights: Sequence[FloatArray]) -> FloatArray:
        return np.tanh([data @ weight for data, weight in zip(self.data, weights, strict=False)])

    def derivatives(self, weights: Sequence[FloatArray]) -> FloatArray:
        """df_i/dw at the weights of step i: [steps, rows, weights]."""
        return (1 - self.values(weights)[:, :, None] ** 2) * self.data[: len(weights)]

    def leaf(self) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.tensor(self.start))


def coefficients(decays: Sequence[float]) -> FloatArray:
    """How much each value counts in the average: (1 - decay_i) times all later decays; the first has no 1 - decay."""
    later = np.cumprod([1.0, *decays[:0:-1]])[::-1]
    return later * np.array([1.0, *(1 - decay for decay in decays[1:])])


def rounding(steps: int = STEPS) -> float:
    """Of a sum of `steps` products of a handful of numbers near 1, with room for 8 roundings a step."""
    return 8 * steps * ROWS * WEIGHTS * EPS


def make(mode: str, decay: float | torch.Tensor = DECAY, **options: Any) -> DifferentiableEMA:
    return DifferentiableEMA(ROWS, decay, mode, **{**MODES[mode], **options}, dtype=torch.float64)


def gradient_of(weight: torch.nn.Parameter) -> FloatArray:
    assert weight.grad is not None
    return weight.grad.numpy().copy()
