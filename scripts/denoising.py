"""The denoiser of digits that `evidence` quotes and `lost_gain` trains, conditioned on their class.
After Karras et al., arXiv 2206.00364, table 1: with a network F,

    D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma)),

where `sigma` is the standard deviation of the noise, not the width of an average. Recorded figures
depend on every random number that is drawn here, and on their order."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

PIXELS = 64
CLASSES = 10
STANDARD_DEVIATION = 0.75  # about the standard deviation of the pixels


class Images(NamedTuple):
    """Images, shape [images, 64], in -1 .. 1, and the class of each, shape [images]."""

    images: torch.Tensor
    labels: torch.Tensor


# of the normal distribution of ln(sigma) in training and validation
LOG_NOISE_MEAN = -0.8
LOG_NOISE_STD = 1.2

_FREQUENCIES = 16
_VARIANCE = STANDARD_DEVIATION**2


class Denoiser(nn.Module):
    """An MLP with residual blocks, conditioned on the noise level and the class."""

    frequencies: torch.Tensor

    def __init__(
        self,
        width: int = 128,
        blocks: int = 3,
    ) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-0.5, 1, _FREQUENCIES))
        self.noise = nn.Linear(2 * _FREQUENCIES, width)
        self.label = nn.Embedding(CLASSES, width)
        self.inward = nn.Linear(PIXELS, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.outward = nn.Linear(width, PIXELS)

    def forward(
        self,
        noisy: torch.Tensor,
        sigma: torch.Tensor,
        labels: torch.Tensor,
    ) -> torch.Tensor:
        """Denoise images: `noisy` [batch, 64], `sigma` [batch, 1], `labels` [batch] -> [batch,
        64]."""
        total = (sigma**2 + _VARIANCE).sqrt()
        angles = sigma.log() / 4 * self.frequencies
        waves = [angles.cos(), angles.sin()]
        features = torch.cat(waves, dim=-1)
        condition = self.noise(features) + self.label(labels)
        hidden = self.inward(noisy / total)
        for block in self.blocks:
            hidden = block(hidden, nn.functional.silu(condition))
        out: torch.Tensor = self.outward(hidden)
        kept = noisy * _VARIANCE / total**2
        return kept + out * sigma * STANDARD_DEVIATION / total


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inward = nn.Linear(width, width)
        self.scale = nn.Linear(width, width)
        self.outward = nn.Linear(width, width)

    def forward(
        self,
        hidden: torch.Tensor,
        condition: torch.Tensor,
    ) -> torch.Tensor:
        inner = self.inward(self.norm(hidden))
        inner = inner * (1 + self.scale(condition))
        change: torch.Tensor = self.outward(nn.functional.silu(inner))
        return hidden + change


def losses(
    model: nn.Module,
    data: Images,
    sigma: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """Compute the weighted squared error of each image, shape [images]; for F = 0 its mean is about
    1.

    `sigma` are the noise levels, shape [images, 1]; `noise` is standard normal, shape [images, 64].
    """
    noisy = data.images + sigma * noise
    denoised = model(noisy, sigma, data.labels)
    weight = (sigma**2 + _VARIANCE) / (sigma**2 * _VARIANCE)
    errors: torch.Tensor = denoised - data.images
    weighted = weight * errors**2
    return weighted.mean(dim=-1)


class Validation:
    """The loss on images that training never saw, with the same noise at every call.

    Each image has `draws` of noise, at the quantiles of the noise levels of training.
    """

    def __init__(
        self,
        data: Images,
        seed: int,
        draws: int = 32,
    ) -> None:
        self._data = data
        random = torch.Generator().manual_seed(seed)
        self._noise = torch.randn(draws, *data.images.shape, generator=random)
        middles = (torch.arange(draws) + 0.5) / draws
        quantiles = torch.special.ndtri(middles)
        self._sigmas = _noise_levels(quantiles)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> torch.Tensor:
        count = len(self._data.images)
        rows = []
        for sigma, noise in zip(self._sigmas, self._noise, strict=True):
            sigmas = sigma.expand(count, 1)
            rows.append(losses(model, self._data, sigmas, noise))
        return torch.stack(rows).double().mean(dim=0)


def random_noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw noise levels as in training, shape [count, 1]."""
    return _noise_levels(torch.randn(count, 1, generator=generator))


def _noise_levels(normal: torch.Tensor) -> torch.Tensor:
    """Convert standard normal numbers to noise levels."""
    logarithms = LOG_NOISE_MEAN + LOG_NOISE_STD * normal
    return logarithms.exp()
