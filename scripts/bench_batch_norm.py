"""Why averaged weights need their own BatchNorm statistics, measured on scikit-learn's digits.

A small convolutional network with BatchNorm is trained with the hook, once with torch's default momentum of 0.1
(statistics of about the last 10 steps) and once with 0.01 (the last 100). Then averages of several lengths are
evaluated on images that training never saw: with the statistics that the newest snapshot copied, which are those of
the raw weights, and with statistics measured anew on the training images by `ema.update_bn`.

    python scripts/bench_batch_norm.py [--seeds 3] [--steps 600]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from torch import nn
from trained_networks import CLASSES, SIDE, digits

from posthoc_cli import PostHocEMA

LENGTHS = (0.05, 0.1, 0.15, 0.2, 0.25)
FOR_VALIDATION = 497
BATCH = 64

Images = tuple[torch.Tensor, torch.Tensor]


def network(momentum: float) -> nn.Sequential:
    """Three convolutions, each with BatchNorm: 14,458 parameters. [batch, 1, 8, 8] -> [batch, 10]."""
    layers: list[nn.Module] = []
    for channels, wider in ((1, 16), (16, 32), (32, 32)):
        layers += [
            nn.Conv2d(channels, wider, 3, padding=1, bias=False),
            nn.BatchNorm2d(wider, momentum=momentum),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def split(seed: int) -> tuple[Images, Images]:
    """Images to train on, and to validate with."""
    images, labels = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order].reshape(-1, 1, SIDE, SIDE), labels[order]
    return (images[FOR_VALIDATION:], labels[FOR_VALIDATION:]), (images[:FOR_VALIDATION], labels[:FOR_VALIDATION])


def train(model: nn.Module, training: Images, folder: str, steps: int) -> PostHocEMA:
    """Train with SGD at a constant rate, and follow."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    ema = PostHocEMA.from_model(model, folder, update_every=1, checkpoint_every=max(steps // 20, 1))
    ema.attach(optimizer)
    for _ in range(steps):
        rows = torch.randint(0, len(training[0]), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(training[0][rows]), training[1][rows]).backward()
        optimizer.step()
    return ema


@torch.no_grad()
def loss(model: nn.Module, images: Images) -> float:
    """Mean cross entropy of a model in eval mode."""
    return float(nn.functional.cross_entropy(model(images[0]), images[1]))


def measure(momentum: float, steps: int, seed: int) -> list[tuple[float, float]]:
    """Validation loss with copied and with measured statistics: first of the raw weights, then of each length."""
    torch.manual_seed(seed)
    model = network(momentum)
    training, validation = split(seed)
    batches = training[0].split(BATCH)
    with tempfile.TemporaryDirectory() as folder, train(model, training, folder, steps) as ema:
        raw = loss(model.eval(), validation)
        found = []
        for sigma_rel in LENGTHS:
            with ema.model(model, sigma_rel=sigma_rel) as averaged:
                copied = loss(averaged, validation)
                ema.update_bn(averaged, batches)
                found.append((copied, loss(averaged, validation)))
        ema.update_bn(model, batches)
        return [(raw, loss(model, validation)), *found]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"Validation loss, mean of {asked.seeds} trainings of {asked.steps} steps; BatchNorm statistics:\n")
    print("| momentum | weights | copied with the snapshot | measured by update_bn |")
    print("|---|---|---|---|")
    for momentum in (0.1, 0.01):
        runs = torch.tensor([measure(momentum, asked.steps, seed) for seed in range(asked.seeds)])
        for name, (copied, measured) in zip(("raw", *LENGTHS), runs.mean(dim=0).tolist(), strict=True):
            title = name if name == "raw" else f"sigma_rel {name}"
            print(f"| {momentum} | {title} | {copied:.4f} | {measured:.4f} |")


if __name__ == "__main__":
    main()
