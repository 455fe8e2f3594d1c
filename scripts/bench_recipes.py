"""Do the recipes that train from their average help? Hare & Tortoise and Switch EMA in small, on digits.

    python scripts/bench_recipes.py [--seeds 8] [--quick]

**Hare & Tortoise** (arXiv 2406.02596), the paper's warm-starting experiment in its terms of epochs: a network first
learns 50 digits, half of their labels wrong, for 1,000 epochs; then 200 with right labels for 111. The reset comes
every 10 epochs, with the optimizer's state kept, as in the authors' code, or cleared. A decay of 0.99 stands for their
0.999, since an epoch has 12 steps and not 200. AdamW, rate and weight decay 1e-3, a warm-up over a tenth of each part.

**Switch EMA** (arXiv 2402.09240): SGD with momentum on 1,200 digits for 40 epochs, at a good learning rate and at four
times that rate, the average of decay 0.9 copied into the model at the end of every epoch.

Shown is the share of unseen images that the weights in use tell right, and its difference to another row, seed by seed:
means and standard errors. Each seed has its own images, wrong labels, first weights and batches, the same for all rows.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from trained_networks import CLASSES, SIDE, digits

from posthoc_cli.averages import HareAndTortoise, SwitchEMA

Images = tuple[torch.Tensor, torch.Tensor]
"""Images and labels."""


@dataclass(frozen=True)
class Method:
    """A row: how the network is trained, and which weights are used.

    Attributes:
        label: of the row.
        against: the label of the row that the difference is taken to.
        warm: whether the part with wrong labels comes first.
        averaged: whether the average is used, not the weights.
        copies: whether the average is copied into the model.
        clears: whether the optimizer's state is cleared then.
    """

    label: str
    against: str = ""
    warm: bool = True
    averaged: bool = True
    copies: bool = True
    clears: bool = False


HARE = (
    Method("fresh", warm=False, averaged=False, copies=False),
    Method("warm-started", "fresh", averaged=False, copies=False),
    Method("Hare & Tortoise", "warm-started"),
    Method("Hare & Tortoise, state cleared", "warm-started", clears=True),
)
SWITCH = (
    Method("SGD", averaged=False, copies=False),
    Method("EMA", "SGD", copies=False),
    Method("Switch EMA", "EMA"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=8, help="repetitions, each with its own data (8)")
    parser.add_argument("--quick", action="store_true", help="tiny networks, two seeds: does everything run?")
    asked = parser.parse_args(arguments)
    seeds = range(2 if asked.quick else asked.seeds)
    torch.set_num_threads(1)
    show(HARE, [{method.label: hare(method, seed, asked.quick) for method in HARE} for seed in seeds])
    for rate in (0.05, 0.2):
        print(f"\nlearning rate {rate}")
        show(SWITCH, [{method.label: switch(method, rate, seed, asked.quick) for method in SWITCH} for seed in seeds])


def show(methods: Sequence[Method], found: Sequence[dict[str, float]]) -> None:
    """A line for each method; `found` has the accuracies of each seed."""
    print(f"{'':<32}{'accuracy %':>14}   difference")
    for method in methods:
        mean, error = _mean([seed[method.label] for seed in found])
        line = f"{method.label:<32}{f'{mean:.1f} ± {error:.1f}':>14}"
        if method.against:
            mean, error = _mean([seed[method.label] - seed[method.against] for seed in found])
            line += f"   {mean:+.2g} ± {error:.1g} against {method.against}"
        print(line, flush=True)


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, in per cent."""
    return 100 * float(np.mean(values)), 100 * float(np.std(values, ddof=1)) / math.sqrt(len(values))


# --- training --------------------------------------------------------------------------------------


def hare(method: Method, seed: int, quick: bool) -> float:
    """Accuracy after both parts of the data."""
    first, count, epochs, width = (20, 60, (40, 20), 16) if quick else (50, 200, (1000, 111), 128)
    training, test = split(seed, count)
    wrong = with_wrong_labels((training[0][:first], training[1][:first]), seed)
    model, random = network(seed, width), torch.Generator().manual_seed(seed)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for (images, labels), length in zip((wrong, training), epochs, strict=True):
        if labels is wrong[1] and not method.warm:
            continue
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-3)
        recipe = HareAndTortoise(average, optimizer=optimizer if method.clears else None)
        steps = length * (len(labels) // 16)
        warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, max(1, steps // 10))
        for epoch in range(1, length + 1):
            for chosen in batches(len(labels), 16, random):
                learn(model, (images[chosen], labels[chosen]), optimizer)
                warm_up.step()
                recipe.update(model)
            if method.copies and epoch % 10 == 0:
                recipe.reset(model)
    return accuracy(average.module if method.averaged else model, test)


def switch(method: Method, rate: float, seed: int, quick: bool) -> float:
    """Accuracy after training by SGD."""
    count, epochs, width = (160, 8, 16) if quick else (1200, 40, 128)
    (images, labels), test = split(seed, count)
    model, random = network(seed, width), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    recipe = SwitchEMA(average)
    for _ in range(epochs):
        for chosen in batches(len(labels), 32, random):
            learn(model, (images[chosen], labels[chosen]), optimizer)
            recipe.update(model)
        if method.copies:
            recipe.switch(model)
    return accuracy(average.module if method.averaged else model, test)


def learn(model: nn.Module, batch: Images, optimizer: torch.optim.Optimizer) -> None:
    """A step."""
    optimizer.zero_grad()
    torch.autograd.backward(nn.functional.cross_entropy(model(batch[0]), batch[1]))
    optimizer.step()


def batches(count: int, size: int, random: torch.Generator) -> Sequence[torch.Tensor]:
    """Indices of an epoch."""
    return torch.randperm(count, generator=random)[: count // size * size].split(size)


def split(seed: int, count: int) -> tuple[Images, Images]:
    """`count` of scikit-learn's 1,797 digits to train on, drawn at random, and the others to test on."""
    images, labels = digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return (images[order[:count]], labels[order[:count]]), (images[order[count:]], labels[order[count:]])


def with_wrong_labels(data: Images, seed: int) -> Images:
    """The same images, half of them with another label, drawn at random."""
    images, labels = data[0], data[1].clone()
    random = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(labels), generator=random)[: round(len(labels) / 2)]
    labels[wrong] = (labels[wrong] + torch.randint(1, CLASSES, (len(wrong),), generator=random)) % CLASSES
    return images, labels


def network(seed: int, width: int) -> nn.Module:
    """An MLP with two hidden layers."""
    torch.manual_seed(seed)
    layers = (nn.Linear(SIDE * SIDE, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(width, CLASSES))


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """The share of images that are told right."""
    return float((model(data[0]).argmax(dim=1) == data[1]).float().mean())


if __name__ == "__main__":
    main()
