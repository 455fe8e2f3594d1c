"""Scikit-learn's handwritten digits: 1797 images of 8 x 8, part of that library, no download."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posthoc_cli.errors import MissingDependencyError

SIDE = 8
PIXELS = SIDE * SIDE
CLASSES = 10
STANDARD_DEVIATION = 0.75
"""Of the pixels, once they are scaled to -1 (paper) .. 1 (ink)."""

_LARGEST_VALUE = 16
_FOR_VALIDATION = 360


@dataclass(frozen=True)
class Digits:
    """Images, shape [images, 64], in -1 .. 1, and which digit each one is, shape [images]."""

    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Split:
    """Images to train on, and images that training never sees."""

    training: Digits
    validation: Digits


def load_digits(seed: int) -> Split:
    """All images, split at random.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise MissingDependencyError(
            "the demo trains on scikit-learn's digits, and scikit-learn is not installed",
            "pip install 'posthoc-cli[demo]'",
        ) from error
    pixels, labels = datasets.load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32) / (_LARGEST_VALUE / 2) - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    digits = Digits(images[order], torch.as_tensor(labels, dtype=torch.int64)[order])
    return Split(_part(digits, slice(_FOR_VALIDATION, None)), _part(digits, slice(_FOR_VALIDATION)))


def _part(digits: Digits, which: slice) -> Digits:
    return Digits(digits.images[which], digits.labels[which])
