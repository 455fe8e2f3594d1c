"""What the two examples of training with an average share: digits, a network, and whether a difference shows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torch import nn
from trained_networks import CLASSES, SIDE, digits

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Digits:
    """Standardised images, [images, 64], and their labels, [images]."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: torch.Tensor) -> Digits:
        """Those of these indices."""
        return Digits(self.images[chosen], self.labels[chosen])


def split(seed: int, count: int) -> tuple[Digits, Digits]:
    """`count` of scikit-learn's 1,797 digits to train on, drawn at random, and the others to test on."""
    everything = Digits(*digits())
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(seed))
    return everything.take(order[:count]), everything.take(order[count:])


def with_wrong_labels(data: Digits, share: float, seed: int) -> Digits:
    """The same images, a share of them with another label, drawn at random."""
    random = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(data), generator=random)[: round(share * len(data))]
    labels = data.labels.clone()
    labels[wrong] = (labels[wrong] + torch.randint(1, CLASSES, (len(wrong),), generator=random)) % CLASSES
    return Digits(data.images, labels)


def network(seed: int, width: int) -> nn.Module:
    """An MLP with two hidden layers; the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Linear(SIDE * SIDE, width), nn.ReLU()),
            *(nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, CLASSES),
        )


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """The share of images that are told right."""
    return float((model(data.images).argmax(dim=1) == data.labels).float().mean())


def loss(model: nn.Module, data: Digits) -> torch.Tensor:
    """Cross-entropy, the mean over all images."""
    return nn.functional.cross_entropy(model(data.images), data.labels)


# --- does it show? ---------------------------------------------------------------------------------


def cell(values: Sequence[float], scale: float = 1.0) -> str:
    """Mean and standard error over seeds."""
    error = f" ± {scale * np.std(values, ddof=1) / math.sqrt(len(values)):.2g}" if len(values) > 1 else ""
    return f"{scale * np.mean(values):.3g}{error}"


def verdict(claim: str, differences: Sequence[float], scale: float = 1.0) -> str:
    """A line that says whether a claim shows in differences, one a seed, that are negative where it holds.

    It shows where the mean's 95 % interval (Student's t) lies below zero.
    """
    if len(differences) < 2:
        return f"  {'NOT JUDGED':<14}  {claim}: one seed only"
    mean = float(np.mean(differences))
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    word = "shows" if mean + half < 0 else "the contrary" if mean - half > 0 else "does not show"
    return f"  {word:<14}  {claim}: {scale * mean:+.2g} ({scale * (mean - half):+.2g} to {scale * (mean + half):+.2g})"
