"""A small diffusion model, its made-up data and its training with the hook.

After Karras et al., arXiv 2206.00364, table 1: a network F with preconditioning is the denoiser

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)),

trained on images with added noise of standard deviation `sigma`, which here is never the width of an average.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.tracker import PostHocEMA

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10
STANDARD_DEVIATION = 0.75
"""About that of the pixels."""


@dataclass(frozen=True)
class Images:
    """Images, shape [images, 64], in -1 .. 1, and the class of each, shape [images]."""

    images: torch.Tensor
    labels: torch.Tensor


def make_waves(count: int, seed: int) -> Images:
    """Plane waves of random frequency and phase; the class is their direction, in steps of 18 degrees."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=random)
    direction = (math.pi * labels / CLASSES)[:, None, None]
    frequency = 2.4 + 3.5 * torch.rand(count, 1, 1, generator=random)
    phase = 2 * math.pi * torch.rand(count, 1, 1, generator=random)
    across = torch.linspace(-1, 1, SIDE)
    waves = (frequency * (direction.cos() * across + direction.sin() * across[:, None]) + phase).sin()
    return Images(waves.flatten(1), labels)


LOG_NOISE_MEAN, LOG_NOISE_STD = -0.8, 1.2
"""Of the normal distribution of ln(sigma) in training and validation."""

_FREQUENCIES = 16
_VARIANCE = STANDARD_DEVIATION**2


class Denoiser(nn.Module):
    """An MLP with residual blocks, conditioned on the noise level and the class."""

    frequencies: torch.Tensor

    def __init__(self, width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-0.5, 1, _FREQUENCIES))
        self.noise = nn.Linear(2 * _FREQUENCIES, width)
        self.label = nn.Embedding(CLASSES, width)
        self.inward = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.outward = nn.Linear(width, PIXELS)

    def forward(self, noisy: torch.Tensor, sigma: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The denoised images: `noisy` [batch, 64], `sigma` [batch, 1], `labels` [batch] -> [batch, 64]."""
        total = (sigma**2 + _VARIANCE).sqrt()
        angles = sigma.log() / 4 * self.frequencies
        condition = self.noise(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.label(labels)
        hidden = self.inward(noisy / total)
        for block in self.blocks:
            hidden = block(hidden, nn.functional.silu(condition))
        out: torch.Tensor = self.outward(hidden)
        return noisy * _VARIANCE / total**2 + out * sigma * STANDARD_DEVIATION / total


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, width)
        self.scale = nn.Linear(width, width)
        self.outward = nn.Linear(width, width)

    def forward(self, hidden: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        inner = self.inward(self.norm(hidden)) * (1 + self.scale(condition))
        out: torch.Tensor = hidden + self.outward(nn.functional.silu(inner))
        return out


def make_denoiser(seed: int) -> Denoiser:
    """A denoiser with random weights; keeps the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Denoiser()


def losses(model: nn.Module, data: Images, sigma: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The weighted squared error of each image, shape [images]; for F = 0 about 1 in the mean.

    `sigma` are the noise levels, shape [images, 1]; `noise` is standard normal, shape [images, 64].
    """
    denoised = model(data.images + sigma * noise, sigma, data.labels)
    weight = (sigma**2 + _VARIANCE) / (sigma**2 * _VARIANCE)
    weighted: torch.Tensor = weight * (denoised - data.images) ** 2
    return weighted.mean(dim=-1)


class Validation:
    """The loss on images that training never saw, with the same noise at every call.

    Each image has `draws` of noise, at the quantiles of the noise levels of training.
    """

    def __init__(self, data: Images, seed: int, draws: int = 32) -> None:
        self._data = data
        self._noise = torch.randn(draws, *data.images.shape, generator=torch.Generator().manual_seed(seed))
        middles = (torch.arange(draws) + 0.5) / draws
        self._sigmas = (LOG_NOISE_MEAN + LOG_NOISE_STD * torch.special.ndtri(middles)).exp()

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> torch.Tensor:
        """The loss of each image, the mean over its draws: float64, shape [images]."""
        sigmas = self._sigmas.reshape(-1, 1, 1).expand(-1, len(self._data.images), 1)
        rows = [losses(model, self._data, *draw) for draw in zip(sigmas, self._noise, strict=True)]
        return torch.stack(rows).double().mean(dim=0)


def random_noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels as in training, shape [count, 1]."""
    return (LOG_NOISE_MEAN + LOG_NOISE_STD * torch.randn(count, 1, generator=generator)).exp()


# --- the training ------------------------------------------------------------------------------------

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
    batch: int = 32
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
    settings: Settings, data: Images, directory: Path, direct: Sequence[float], advance: Callable[[int], None]
) -> tuple[Denoiser, list[DirectAverage]]:
    """Train a denoiser with the hook, and track averages directly at the same steps; returns both.

    `directory` is for the snapshots, `direct` has the sigma_rel of the averages to track directly; `advance` is called
    with the number of steps since the last call.
    """
    model = make_denoiser(settings.seed)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.99), fused=True)
    averages = [DirectAverage(width) for width in direct]
    every, random = settings.checkpoint_every, torch.Generator().manual_seed(settings.seed)
    with PostHocEMA.from_model(
        model, directory, update_every=UPDATE_EVERY, checkpoint_every=every, max_checkpoints=SNAPSHOTS
    ) as ema:
        for step in range(1, settings.steps + 1):
            optimizer.param_groups[0]["lr"] = settings.learning_rate_at(step)
            chosen = torch.randint(len(data.images), (settings.batch,), generator=random)
            sigma = random_noise_levels(settings.batch, random)
            images = Images(data.images[chosen], data.labels[chosen])
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
