"""The training loop with the hook, and directly tracked averages to compare with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from posthoc_cli.demo.denoiser import Denoiser, Digits, losses, make_denoiser, random_noise_levels
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.tracker import PostHocEMA

UPDATE_EVERY = 10
SNAPSHOTS = 40
"""Kept a tracked profile; no more are taken if the number of steps allows that."""


@dataclass(frozen=True)
class Settings:
    """Settings of the training.

    The learning rate is high and falls late, so that the network circles around good weights, and their mean is better
    than any of them.
    """

    steps: int
    batch: int = 64
    learning_rate: float = 8e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 100 or self.steps % 100:
            raise InvalidValueError("steps", "must be a multiple of 100, from 100", value=self.steps)

    @property
    def checkpoint_every(self) -> int:
        """Steps between snapshots: a divisor of `steps`, so that the last step has one."""
        updates = self.steps // UPDATE_EVERY
        return UPDATE_EVERY * next(n for n in range(max(1, updates // SNAPSHOTS), 0, -1) if updates % n == 0)

    @property
    def decay_start(self) -> int:
        """The step from which the learning rate falls: t_ref of `learning_rate_at`."""
        return self.steps * 3 // 10

    def learning_rate_at(self, step: int) -> float:
        """alpha_ref / sqrt(max(t / t_ref, 1)), the decay of arXiv 2312.02696."""
        return self.learning_rate / math.sqrt(max(step / self.decay_start, 1.0))


class DirectAverage:
    """The power-function average of one length, tracked in float64.

    It shares no code with the tracker, whose results it checks: gamma from the roots of equation 123, one vector of all
    parameters, the recursion written out.
    """

    def __init__(self, sigma_rel: float) -> None:
        self.sigma_rel = sigma_rel
        # The largest real root of (x + 1)**2 (x + 2) = x / sigma_rel**2 with x = gamma + 1.
        roots = np.roots([1, 4, 5 - sigma_rel**-2, 2])
        self.gamma = float(max(root.real for root in roots if abs(root.imag) < 1e-9)) - 1
        self._t, self._value = 0.0, torch.zeros((), dtype=torch.float64)

    def update_(self, weights: torch.Tensor, t: float) -> None:
        """Take in all parameters, as one vector, at time `t`."""
        beta = (self._t / t) ** (self.gamma + 1)  # 0 for the first
        self._t, self._value = t, beta * self._value + (1 - beta) * weights.double()

    def by_name(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """The average as tensors by name, float64."""
        parameters = dict(model.named_parameters())
        values = torch.split(self._value, [parameter.numel() for parameter in parameters.values()])
        return {name: value.reshape(parameters[name].shape) for name, value in zip(parameters, values, strict=True)}


def train(
    settings: Settings, digits: Digits, directory: Path, direct: Sequence[float], advance: Callable[[int], None]
) -> tuple[Denoiser, list[DirectAverage]]:
    """Train a denoiser with the hook, and track averages directly at the same steps; returns both.

    `directory` is for the snapshots, `direct` has the sigma_rel of the averages to track directly; `advance` is called
    with the number of steps since the last call.
    """
    model = make_denoiser(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99))
    averages = [DirectAverage(width) for width in direct]
    every, random = settings.checkpoint_every, torch.Generator().manual_seed(settings.seed)
    with PostHocEMA.from_model(
        model, directory, update_every=UPDATE_EVERY, checkpoint_every=every, max_checkpoints=SNAPSHOTS
    ) as ema:
        for step in range(1, settings.steps + 1):
            optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
            chosen = torch.randint(len(digits.images), (settings.batch,), generator=random)
            sigma = random_noise_levels(settings.batch, random)
            images = Digits(digits.images[chosen], digits.labels[chosen])
            loss = losses(model, images, sigma, torch.randn(images.images.shape, generator=random)).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            ema.update_(model)
            if step % UPDATE_EVERY == 0:
                weights = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])
                for average in averages:
                    average.update_(weights, step)
                advance(UPDATE_EVERY)
    return model, averages
