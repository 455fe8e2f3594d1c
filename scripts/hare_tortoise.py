"""Hare & Tortoise (arXiv 2406.02596) in small: does the reset keep a network able to learn?

    python scripts/hare_tortoise.py [--seeds 8] [--quick]

The paper's warm-starting experiment, in its terms of epochs: a network first learns a part of the data, half of its
labels wrong, for 1,000 epochs; then all of it, with right labels, for 111. Loss of plasticity is that it generalizes
worse afterwards than one that never saw the first part, though it learns its training data as well. Measured as there,
by accuracy on images that training never saw. Compared are

- fresh: trained on the second part alone;
- warm-started: on both, a new optimizer for each;
- average: the same run, evaluated by its average (a tortoise whose hare is never reset);
- Hare & Tortoise: reset every 10 epochs, the optimizer's state kept, as the authors' code does it;
- ..., state cleared: the optimizer's state is cleared at each reset, too;
- ..., tracker: the last, over a `PostHocEMA` tracker, with its average of sigma_rel 0.025: as wide as a decay of
  0.99 after 4,000 steps, and shorter before, since a tracker's averages lengthen with training;
- fresh, Hare & Tortoise: the second part alone, with resets; is it the plasticity, or would they help anyhow?

Smaller than there: an MLP on 200 digits, 50 of them in the first part (a tenth of the data there), a decay of 0.99 for
0.999, since an epoch has 12 steps and not 200. As there: AdamW, rate and weight decay 1e-3, a warm-up over a tenth of
each part. Each seed has its own images, wrong labels, first weights and batches, the same for all methods.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from digit_trials import Digits, accuracy, cell, loss, network, split, verdict, with_wrong_labels
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from posthoc_cli import PostHocEMA
from posthoc_cli.averages import HareAndTortoise

RATE = WEIGHT_DECAY = 1e-3
BATCH = 16
DECAY = 0.99
SIGMA_REL = 0.025
RESET_EPOCHS = 10
WRONG = 0.5
"""Of the labels in the first part."""


@dataclass(frozen=True)
class Sizes:
    """Images in the first part and in all, epochs of each part, width of the network."""

    first: int = 50
    count: int = 200
    first_epochs: int = 1000
    epochs: int = 111
    width: int = 128


QUICK = Sizes(20, 60, 40, 20, 16)


@dataclass(frozen=True)
class Method:
    """How the network is trained, and which weights are used."""

    label: str
    warm: bool = True
    averaged: bool = True
    resets: bool = True
    clears: bool = False
    tracked: bool = False


METHODS = (
    Method("fresh", warm=False, averaged=False, resets=False),
    Method("warm-started", averaged=False, resets=False),
    Method("average", resets=False),
    Method("Hare & Tortoise"),
    Method("..., state cleared", clears=True),
    Method("..., tracker", clears=True, tracked=True),
    Method("fresh, Hare & Tortoise", warm=False, clears=True),
)


@dataclass(frozen=True)
class Measured:
    """Shares of images told right."""

    test: float
    training: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the experiment with every method and print what was found."""
    options = _parser().parse_args(arguments)
    seeds, sizes = (2, QUICK) if options.quick else (options.seeds, Sizes())
    torch.set_num_threads(1)
    print(
        f"{sizes.first} digits with {WRONG:.0%} of the labels wrong, {sizes.first_epochs} epochs; then {sizes.count} "
        f"with right ones, {sizes.epochs} epochs; {seeds} seeds\n"
    )
    found = [{method.label: run(method, seed, sizes) for method in METHODS} for seed in range(seeds)]
    print(table(found))
    print("\n".join(verdicts(found)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Hare & Tortoise in small, measured as its paper does.")
    parser.add_argument("--seeds", type=int, default=8, help="repetitions, each with its own data (8)")
    parser.add_argument("--quick", action="store_true", help="a tiny network, two seeds: does everything run?")
    return parser


# --- training --------------------------------------------------------------------------------------


def run(method: Method, seed: int, sizes: Sizes) -> Measured:
    """Train by a method and measure the weights that one would use."""
    training, test = split(seed, sizes.count)
    first = with_wrong_labels(training.take(torch.arange(sizes.first)), WRONG, seed)
    random = torch.Generator().manual_seed(seed)
    hare = network(seed, sizes.width)
    with ExitStack() as stack:
        tortoise = _tortoise(hare, method, stack)
        if method.warm:
            _learn(hare, tortoise, method, first, sizes.first_epochs, random)
        _learn(hare, tortoise, method, training, sizes.epochs, random)
        if isinstance(tortoise, PostHocEMA):
            tortoise.load_into(hare, SIGMA_REL)
        used = tortoise.module if isinstance(tortoise, AveragedModel) and method.averaged else hare
        return Measured(accuracy(used, test), accuracy(used, training))


def _tortoise(hare: nn.Module, method: Method, stack: ExitStack) -> PostHocEMA | AveragedModel:
    if not method.tracked:
        return AveragedModel(hare, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    tracker = PostHocEMA.from_model(hare, folder, (SIGMA_REL, 0.28), update_every=1, checkpoint_every=10**9)
    return stack.enter_context(tracker)


def _learn(
    hare: nn.Module,
    tortoise: PostHocEMA | AveragedModel,
    method: Method,
    data: Digits,
    epochs: int,
    random: torch.Generator,
) -> None:
    """One part of the data, with an optimizer of its own."""
    optimizer = torch.optim.AdamW(hare.parameters(), lr=RATE, weight_decay=WEIGHT_DECAY)
    recipe = HareAndTortoise(
        tortoise,
        optimizer=optimizer if method.clears else None,
        sigma_rel=SIGMA_REL if method.tracked else None,
    )
    whole = len(data) // BATCH * BATCH
    warm_up = torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, 1.0, max(1, epochs * (whole // BATCH) // 10))
    for epoch in range(1, epochs + 1):
        for chosen in torch.randperm(len(data), generator=random)[:whole].split(BATCH):
            optimizer.zero_grad()
            loss(hare, data.take(chosen)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            warm_up.step()
            recipe.update(hare)
        if method.resets and epoch % RESET_EPOCHS == 0:
            recipe.reset(hare)


# --- what is printed -------------------------------------------------------------------------------


def table(found: Sequence[dict[str, Measured]]) -> str:
    """A line a method, mean and standard error over seeds, in per cent and points."""
    lines = [f"{'':<24}{'test accuracy %':>18}{'against fresh':>18}{'training accuracy %':>22}"]
    for label in found[0]:
        test = [one[label].test for one in found]
        against = [one[label].test - one["fresh"].test for one in found]
        training = [one[label].training for one in found]
        cells = f"{cell(test, 100):>18}{'' if label == 'fresh' else cell(against, 100):>18}{cell(training, 100):>22}"
        lines.append(f"{label:<24}{cells}")
    return "\n".join(lines)


def verdicts(found: Sequence[dict[str, Measured]]) -> list[str]:
    """Whether each claim shows."""

    def behind(one: str, other: str) -> list[float]:
        return [seed[one].test - seed[other].test for seed in found]

    cleared = "..., state cleared"
    return [
        "\ntest accuracy in points: difference, 95 % interval",
        verdict("warm-started is behind fresh", behind("warm-started", "fresh"), 100),
        verdict("warm-started is behind Hare & Tortoise", behind("warm-started", "Hare & Tortoise"), 100),
        verdict("warm-started is behind the one with the state cleared", behind("warm-started", cleared), 100),
        verdict("warm-started is behind the tracker's", behind("warm-started", "..., tracker"), 100),
        verdict("the average without resets is behind Hare & Tortoise", behind("average", "Hare & Tortoise"), 100),
        verdict("Hare & Tortoise is still behind fresh", behind(cleared, "fresh"), 100),
        verdict("fresh gains by resets, too", behind("fresh", "fresh, Hare & Tortoise"), 100),
    ]


if __name__ == "__main__":
    main()
