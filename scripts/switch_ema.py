"""Switch EMA (arXiv 2402.09240) in small: is the minimum flatter, deeper, and found sooner?

    python scripts/switch_ema.py [--seeds 8] [--epochs 40] [--quick]

A classifier of digits is trained by SGD with momentum at a constant rate: a good one, one at which training hardly
holds, and the good one with a fifth of the training labels wrong. Compared are

- SGD: the weights themselves;
- EMA: their average in the same run, decay 0.9 a step, which spans a quarter of an epoch;
- Switch EMA: the average in a run where `SwitchEMA` copies it into the model at the end of every epoch;
- Switch EMA, tracker: the same over a `PostHocEMA` tracker, with its average of sigma_rel 0.02.

The paper's claim is a better trade-off between flatness, the width of the minimum that is found, and sharpness, its
depth, so that the network generalizes better; and faster convergence. Measured here, of the weights that one would use:

- **depth**: the training loss; smaller is deeper.
- **width**: how much the training loss rises along random directions, both ways, at half the weights' length. Each row
  of a weight matrix moves by a random row of its own length (the filter-normalized directions of arXiv 1712.09913, by
  which loss landscapes are drawn). And the largest eigenvalue of the loss's Hessian. Smaller is wider.
- **generalization**: accuracy and loss on images that training never saw, with right labels.
- **convergence**: the same test loss after an eighth of the epochs.

Each seed has its own images, first weights and batches, the same for all methods; differences are taken seed by seed.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from digit_trials import Digits, accuracy, cell, loss, network, split, verdict, with_wrong_labels
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posthoc_cli import PostHocEMA
from posthoc_cli.averages import SwitchEMA

BATCH = 32
DECAY = 0.9
SIGMA_REL = 0.02
RADIUS = 0.5
"""Of the random directions, in lengths of the weights."""


@dataclass(frozen=True)
class Setting:
    """What is trained: the learning rate, and the share of training labels that are wrong."""

    rate: float
    wrong: float = 0.0

    def __str__(self) -> str:
        return f"learning rate {self.rate}" + (f", {self.wrong:.0%} of the training labels wrong" if self.wrong else "")


SETTINGS = (Setting(0.05), Setting(0.2), Setting(0.05, 0.2))


@dataclass(frozen=True)
class Measured:
    """One set of weights; smaller is better but for the accuracy."""

    train_loss: float
    rise: float
    eigenvalue: float
    test_accuracy: float
    test_loss: float
    early_test_loss: float


Weights = Callable[[], nn.Module]
"""Gives the network with the weights that one would use now."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every method in every setting and print what was found."""
    options = _parser().parse_args(arguments)
    seeds, epochs, count, width = options.seeds, options.epochs, 1200, 128
    if options.quick:
        seeds, epochs, count, width = 2, 8, 160, 16
    torch.set_num_threads(1)
    print(f"{count} digits to train on, MLP of width {width}, {epochs} epochs, {seeds} seeds; mean ± standard error")
    for setting in SETTINGS:
        print(f"\n{setting}")
        found = [Trial(setting, seed, epochs, count, width).run() for seed in range(seeds)]
        print(table(found))
        print("\n".join(verdicts(found)), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Switch EMA in small, measured as its paper means it.")
    parser.add_argument("--seeds", type=int, default=8, help="repetitions, each with its own data (8)")
    parser.add_argument("--epochs", type=int, default=40, help="epochs of training (40)")
    parser.add_argument("--quick", action="store_true", help="a tiny network, two seeds: does everything run?")
    return parser


# --- training --------------------------------------------------------------------------------------


class Trial:
    """All methods in one setting, with one seed."""

    def __init__(self, setting: Setting, seed: int, epochs: int, count: int, width: int) -> None:
        self.setting, self.seed, self.epochs, self.width = setting, seed, epochs, width
        right, self.test = split(seed, count)
        self.training = with_wrong_labels(right, setting.wrong, seed)

    def run(self) -> dict[str, Measured]:
        """By method."""
        model = network(self.seed, self.width)
        plain = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        found = self.train(model, SwitchEMA(plain), False, {"SGD": lambda: model, "EMA": lambda: plain.module})
        switching = network(self.seed, self.width)
        average = AveragedModel(switching, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
        found |= self.train(switching, SwitchEMA(average), True, {"Switch EMA": lambda: average.module})
        return found | self._over_the_tracker()

    def _over_the_tracker(self) -> dict[str, Measured]:
        model, copied = network(self.seed, self.width), network(self.seed, self.width)
        widths = (SIGMA_REL, 0.28)
        with (
            tempfile.TemporaryDirectory() as folder,
            PostHocEMA.from_model(model, folder, widths, update_every=1, checkpoint_every=10**9) as ema,
        ):

            def weights() -> nn.Module:
                ema.load_into(copied, SIGMA_REL)
                return copied

            recipe = SwitchEMA(ema, sigma_rel=SIGMA_REL)
            return self.train(model, recipe, True, {"Switch EMA, tracker": weights})

    def train(self, model: nn.Module, recipe: SwitchEMA, switch: bool, used: dict[str, Weights]) -> dict[str, Measured]:
        """Train, with a switch at the end of each epoch or without, and measure the weights that one would use."""
        optimizer = torch.optim.SGD(model.parameters(), lr=self.setting.rate, momentum=0.9, weight_decay=5e-4)
        random = torch.Generator().manual_seed(self.seed)
        whole = len(self.training) // BATCH * BATCH
        early: dict[str, float] = {}
        for epoch in range(1, self.epochs + 1):
            for chosen in torch.randperm(len(self.training), generator=random)[:whole].split(BATCH):
                optimizer.zero_grad()
                loss(model, self.training.take(chosen)).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                recipe.update(model)
            if switch:
                recipe.switch(model)
            if epoch == max(1, self.epochs // 8):
                early = {label: _number(loss(weights(), self.test)) for label, weights in used.items()}
        return {label: self._measure(weights(), early[label]) for label, weights in used.items()}

    def _measure(self, model: nn.Module, early: float) -> Measured:
        return Measured(
            train_loss=_number(loss(model, self.training)),
            rise=mean_rise(model, self.training),
            eigenvalue=largest_eigenvalue(model, self.training),
            test_accuracy=accuracy(model, self.test),
            test_loss=_number(loss(model, self.test)),
            early_test_loss=early,
        )


# --- measuring -------------------------------------------------------------------------------------


def _number(value: torch.Tensor) -> float:
    return float(value.detach())


@torch.no_grad()
def mean_rise(model: nn.Module, data: Digits, directions: int = 8) -> float:
    """The mean rise of the loss at RADIUS times a random filter-normalized direction, and at minus as much.

    Biases stay, as is usual for these directions.
    """
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    centre = [weight.clone() for weight in weights]
    random = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(directions):
        moves = [torch.randn(weight.shape, generator=random) for weight in centre]
        for sign in (-RADIUS, RADIUS):
            for weight, start, move in zip(weights, centre, moves, strict=True):
                scale = start.norm(dim=1, keepdim=True) / move.norm(dim=1, keepdim=True)
                weight.copy_(start + sign * scale * move)
            losses.append(loss(model, data))
    for weight, start in zip(weights, centre, strict=True):
        weight.copy_(start)
    return float(torch.stack(losses).mean() - loss(model, data))


def largest_eigenvalue(model: nn.Module, data: Digits, steps: int = 40) -> float:
    """Of the Hessian of the loss, in size, by power iteration with Hessian-vector products."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model, data), parameters, create_graph=True)
    random = torch.Generator().manual_seed(0)
    vector = [torch.randn(parameter.shape, generator=random) for parameter in parameters]
    value = math.nan
    for _ in range(steps):
        length = math.sqrt(sum(float(part.square().sum()) for part in vector))
        vector = [part / length for part in vector]
        product = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        value = sum(float((a * b).sum()) for a, b in zip(product, vector, strict=True))
        vector = list(product)
    return value


# --- what is printed -------------------------------------------------------------------------------

COLUMNS = ("train loss", "rise", "eigenvalue", "test accuracy %", "test loss", "early test loss")


def table(found: Sequence[dict[str, Measured]]) -> str:
    """A line a method, mean and standard error over seeds."""
    lines = [f"{'':<20}" + "".join(f"{column:>17}" for column in COLUMNS)]
    for label in found[0]:
        columns = zip(*(vars(one[label]).values() for one in found), strict=True)
        cells = [
            cell(values, 100 if name == "test accuracy %" else 1) for name, values in zip(COLUMNS, columns, strict=True)
        ]
        lines.append(f"{label:<20}" + "".join(f"{text:>17}" for text in cells))
    return "\n".join(lines)


def verdicts(found: Sequence[dict[str, Measured]]) -> list[str]:
    """Whether each claim shows, Switch EMA against EMA: difference and its 95 % interval."""

    def differences(name: str, sign: int = 1) -> list[float]:
        return [sign * (getattr(one["Switch EMA"], name) - getattr(one["EMA"], name)) for one in found]

    return [
        "Switch EMA against EMA: difference, 95 % interval",
        verdict("deeper (training loss)", differences("train_loss")),
        verdict("wider (rise along random directions)", differences("rise")),
        verdict("wider (largest eigenvalue of the Hessian)", differences("eigenvalue")),
        verdict("generalizes better (test error, points)", differences("test_accuracy", -1), 100),
        verdict("generalizes better (test loss)", differences("test_loss")),
        verdict("sooner (test loss after an eighth of the epochs)", differences("early_test_loss")),
    ]


if __name__ == "__main__":
    main()
