"""Measure which BatchNorm statistics averaged weights need, on scikit-learn's digits under noise.

A network with BatchNorm is trained with the hook, at torch's default momentum of 0.1. Averages are evaluated on unseen
images with three kinds of statistics: those of the raw weights, as copied into the newest snapshot; those that the
tracker averaged by the same profile; and those that `torch.optim.swa_utils.update_bn` measures on training images.

    python scripts/bench_batch_norm.py [--seeds 3] [--steps 1500]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from trained_networks import CLASSES, SIDE, digits

from posthoc_cli import PostHocEMA

LENGTHS = (0.05, 0.25)
FOR_VALIDATION = 497
BATCH = 64

Images = tuple[torch.Tensor, torch.Tensor]


def network() -> nn.Sequential:
    """Make three convolutions with BatchNorm, 14,458 parameters: [batch, 1, 8, 8] -> [batch, 10]."""
    layers: list[nn.Module] = []
    for channels, wider in ((1, 16), (16, 32), (32, 32)):
        layers.append(nn.Conv2d(channels, wider, 3, padding=1, bias=False))
        layers += [nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def split(seed: int) -> tuple[Images, Images]:
    """Return images to train on, without noise, and to validate with."""
    images, labels = digits()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    images, labels = images[order].reshape(-1, 1, SIDE, SIDE), labels[order]
    unseen = images[:FOR_VALIDATION]
    noisy = unseen + torch.randn(unseen.shape, generator=generator)
    return (images[FOR_VALIDATION:], labels[FOR_VALIDATION:]), (noisy, labels[:FOR_VALIDATION])


def train(model: nn.Module, training: Images, folder: str, steps: int) -> PostHocEMA:
    """Train on noisy images with SGD at a constant rate; track the weights."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=max(steps // 20, 1))
    ema.attach(optimizer)
    for _ in range(steps):
        rows = torch.randint(0, len(training[0]), (BATCH,))
        images = training[0][rows]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images + torch.randn_like(images)), training[1][rows]).backward()
        optimizer.step()
    return ema


@torch.no_grad()
def loss(model: nn.Module, images: Images) -> float:
    """Return the mean cross-entropy of a model in eval mode."""
    return float(nn.functional.cross_entropy(model(images[0]), images[1]))


def measure(steps: int, seed: int) -> list[tuple[float, ...]]:
    """Return validation losses with copied, averaged and measured statistics: raw weights, then each length."""
    torch.manual_seed(seed)
    model = network()
    training, validation = split(seed)
    with tempfile.TemporaryDirectory() as folder, train(model, training, folder, steps) as ema:
        batches = [images + torch.randn_like(images) for images in training[0].split(BATCH)]
        copies = {name: value.clone() for name, value in model.named_buffers()}
        raw = loss(model.eval(), validation)
        found = []
        for sigma_rel in LENGTHS:
            with ema.model(model, sigma_rel=sigma_rel) as averaged:
                own = loss(averaged, validation)
                averaged.load_state_dict(copies, strict=False)
                copied = loss(averaged, validation)
                update_bn(batches, averaged)
                found.append((copied, own, loss(averaged, validation)))
        update_bn(batches, model)
        return [(raw, raw, loss(model, validation)), *found]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"Validation loss, mean of {asked.seeds} trainings of {asked.steps} steps; BatchNorm statistics:\n")
    print("| weights | copied | averaged | recomputed |\n| --- | ---: | ---: | ---: |")
    runs = torch.tensor([measure(asked.steps, seed) for seed in range(asked.seeds)])
    for length, row in zip(("raw", *LENGTHS), runs.mean(dim=0).tolist(), strict=True):
        print(f"| {length} | {' | '.join(f'{value:.3f}' for value in row)} |")


if __name__ == "__main__":
    main()
