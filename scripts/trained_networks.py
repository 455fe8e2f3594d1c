"""The small networks that `trajectories` trains, and what they are trained on: scikit-learn's digits.

The 1,797 images of 8x8 pixels come with scikit-learn, so that nothing is downloaded and every machine has the same.
Each loss draws its own batch from torch's global random numbers; a network does so once, for its first weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

Loss = Callable[[nn.Module, int], torch.Tensor]
"""Draws a batch of so many images and gives the network's mean loss on it."""


@dataclass(frozen=True)
class Task:
    """A network and its loss.

    Attributes:
        model: builds the network, its first weights drawn.
        loss: builds the loss, its images read.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[], Loss]


SIDE = 8
"""Pixels in a row, and rows in an image."""

CLASSES = 10

PIXELS = 16
"""Tokens that stand for two neighbouring pixels of four levels each; those from here on stand for a label."""


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the standardised images, [images, 64], and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor((images - 4.9) / 6.0, dtype=torch.float32), torch.tensor(labels)


# --- a denoiser ------------------------------------------------------------------------------------


def denoising(width: int) -> Task:
    """Make the task of removing Gaussian noise of any level: 5,280 parameters at width 32."""
    return Task(partial(_denoiser, width), _denoising_loss)


def _denoiser(width: int) -> nn.Module:
    """Make a network from a scaled noisy image and its noise level, [batch, 65], to [batch, 64]."""
    return nn.Sequential(
        nn.Linear(65, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, SIDE * SIDE)
    )


def _denoising_loss() -> Loss:
    """Make the loss: log-normal noise levels; input, target and weighting have variance 1 at every level."""
    images, _ = digits()

    def loss(model: nn.Module, size: int) -> torch.Tensor:
        clean = images[torch.randint(len(images), (size,))]
        level = torch.exp(1.2 * torch.randn(len(clean), 1) - 0.8)
        noisy = clean + level * torch.randn_like(clean)
        scale = torch.sqrt(level**2 + 1)
        guess = model(torch.cat([noisy / scale, torch.log(level) / 4], dim=1))
        # The best linear guess is noisy / scale**2; the network learns what is left of it, in units of its size.
        target = (clean - noisy / scale**2) * scale / level
        return nn.functional.mse_loss(guess, target)

    return loss


# --- two classifiers -------------------------------------------------------------------------------


def classification(width: int) -> Task:
    """Make the task of classifying digits: 3,610 parameters at width 48."""
    return Task(partial(_classifier, width), _classification_loss)


def convolutional_classification() -> Task:
    """Make the same task with two convolutions and batch norm: 4,942 parameters with its weights and biases."""
    return Task(_convolutional_classifier, _classification_loss)


def _classifier(width: int) -> nn.Module:
    """Make a network from an image, [batch, 64], to the logits of 10 classes."""
    return nn.Sequential(nn.Linear(SIDE * SIDE, width), nn.ReLU(), nn.Linear(width, CLASSES))


def _convolutional_classifier() -> nn.Module:
    """Make a convolutional network from an image, [batch, 64], to the logits of 10 classes."""
    return nn.Sequential(
        nn.Unflatten(1, (1, SIDE, SIDE)),
        *(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 2 * 2, CLASSES)),
    )


def _classification_loss() -> Loss:
    """Make the loss: cross-entropy on noisy images. Without noise the gradient would soon vanish."""
    images, labels = digits()

    def loss(model: nn.Module, size: int) -> torch.Tensor:
        chosen = torch.randint(len(images), (size,))
        noisy = images[chosen] + 0.7 * torch.randn(size, images.shape[1])
        return nn.functional.cross_entropy(model(noisy), labels[chosen])

    return loss


# --- a transformer ---------------------------------------------------------------------------------


def next_token() -> Task:
    """Make the task of predicting the pixels of a digit from its label, two pixels a token: 7,792 parameters."""
    return Task(_Transformer, _next_token_loss)


def digit_sequences() -> torch.Tensor:
    """Return each digit as tokens, [images, 33]: its label, then its pixels in reading order, two to a token.

    Two to a token because the time of a step grows with the length; four levels keep the vocabulary at 16.
    """
    images, labels = digits()
    levels = ((images * 6.0 + 4.9).round() / 17 * 4).long()  # pixels are whole numbers from 0 to 16
    return torch.cat([PIXELS + labels[:, None], 4 * levels[:, ::2] + levels[:, 1::2]], dim=1)


class _Block(nn.Module):
    """Causal attention with two heads, then an MLP, each with layer norm before and a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mixed_in, self.mixed_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Map states, [batch, tokens, width], to states of the same shape."""
        parts = self.mixed_in(self.attention_norm(states)).unflatten(2, (3, 2, -1))  # three parts, two heads
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        states = states + self.mixed_out(seen.transpose(1, 2).flatten(2))
        changed: torch.Tensor = states + self.mlp(self.mlp_norm(states))
        return changed


class _Transformer(nn.Module):
    """A transformer from tokens, [batch, 32], to the logits of the next tokens, [batch, 32, 16]."""

    def __init__(self, width: int = 16, blocks: int = 2) -> None:
        super().__init__()
        self.token = nn.Embedding(PIXELS + CLASSES, width)
        self.place = nn.Parameter(0.1 * torch.randn(SIDE * SIDE // 2, width))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.norm, self.logits = nn.LayerNorm(width), nn.Linear(width, PIXELS)
        nn.init.normal_(self.token.weight, std=0.1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the logits at all positions; none depends on a later token."""
        logits: torch.Tensor = self.logits(self.norm(self.blocks(self.token(tokens) + self.place)))
        return logits


def _next_token_loss() -> Loss:
    """Make the loss: cross-entropy of each pair of pixels given the label and all earlier pairs."""
    sequences = digit_sequences()

    def loss(model: nn.Module, size: int) -> torch.Tensor:
        chosen = sequences[torch.randint(len(sequences), (size,))]
        return nn.functional.cross_entropy(model(chosen[:, :-1]).flatten(0, 1), chosen[:, 1:].flatten())

    return loss
