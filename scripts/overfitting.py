"""Compare the search of lengths alone with that of an earlier end, too, and with the whole grid of
ends and lengths, on eight trainings.

    python scripts/overfitting.py

Networks of 7,792 and 19,210 parameters learn scikit-learn's digits, two seeds each; four trainings
go on for too long, two of them with wrong labels. Everything is chosen on validation data and shown
on test data: losses in thousandths of a nat, or the share of errors in percent. The grid has all
forty stored times and twelve lengths.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tables
import torch
import torch.nn.functional as F  # noqa: N812
from tasks import (
    CLASSES,
    Transformer,
    classifier,
    descend,
    digit_sequences,
    half_wave,
    loss_of_next,
    shuffled_digits,
)
from torch import Tensor, nn
from torch.optim import Adam

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.sweep.search import USUAL_COUNT
from posthoc_cli.synthesis.engine import synthesize

SNAPSHOTS = 40
SEEDS = (0, 1)
BATCH = 64
DECAY = 0.999
START = 0.05


@dataclass(frozen=True)
class Training:
    """A training, and the data that it is measured on."""

    name: str
    kind: str  # "errors" of a classifier, its "loss", or the loss of a "sequence" model
    steps: int
    examples: int  # of training
    wrong: float = 0.0  # the share of wrong labels
    rate: float = 2e-3
    schedule: Callable[[float], float] = lambda _: 1.0
    first_classes: int = 0  # trained before on the digits below this one, then on the others


TRAININGS = (
    Training("30 % of labels wrong", "errors", 1600, 800, wrong=0.3),
    Training("30 % of labels wrong, cosine", "errors", 1600, 800, wrong=0.3, schedule=half_wave),
    Training("150 images", "loss", 1200, 150),
    Training("fine-tuned for too long", "sequence", 1600, 60, first_classes=5),
    Training("all images", "loss", 2000, 1000, rate=1e-3),
    Training("all images, cosine", "loss", 2000, 1000, rate=1e-3, schedule=half_wave),
    Training("all sequences", "sequence", 2000, 1200, rate=4e-3),
    Training("all sequences, cosine", "sequence", 2000, 1200, rate=4e-3, schedule=half_wave),
)


@dataclass(frozen=True)
class Results:
    """Test metrics of one training, by the way in which weights were chosen."""

    last: float
    checkpoint: float
    ema: float
    start: float  # the length to try first
    length: float
    search: float
    grid: float
    end: float  # of the search, as a share of the training
    evaluations: int


class Data:
    """Training, validation and test data of a training, as inputs and labels."""

    def __init__(self, training: Training, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        if training.kind == "sequence":
            sequences = digit_sequences()
            labels = sequences[:, 0] - sequences[:, 0].min()
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
            sequences = sequences[order]
            labels = labels[order]
            self.earlier = sequences[labels < training.first_classes]
            sequences = sequences[labels >= training.first_classes]
            inputs, targets = sequences, sequences
        else:
            inputs, targets = shuffled_digits()
        third = (len(inputs) - training.examples) // 2
        count = min(training.examples, len(inputs) - 2 * third)
        self.train = (inputs[:count], targets[:count].clone())
        self.validation = (inputs[count : count + third], targets[count : count + third])
        self.test = (inputs[count + third :], targets[count + third :])
        if training.wrong:
            is_wrong = torch.rand(count, generator=random) < training.wrong
            drawn = torch.randint(CLASSES, (count,), generator=random)
            self.train[1][is_wrong] = drawn[is_wrong]


def loss_of(kind: str, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy, of a label or of each token."""
    if kind == "sequence":
        return loss_of_next(model(inputs[:, :-1]), inputs)
    return F.cross_entropy(model(inputs), targets)


@torch.no_grad()
def metric_of(kind: str, model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    """Return errors in percent, or a loss in thousandths of a nat."""
    inputs, targets = data
    if kind == "errors":
        return float(100 * (model(inputs).argmax(1) != targets).double().mean())
    return 1000 * float(loss_of(kind, model, inputs, targets))


def measure(job: tuple[int, int]) -> Results:
    """Train once, and choose weights in each way."""
    logging.getLogger("posthoc_cli").setLevel(logging.ERROR)  # short averages of early ends
    index, seed = job
    training = TRAININGS[index]
    torch.manual_seed(seed)
    data = Data(training, seed)
    model = Transformer() if training.kind == "sequence" else classifier(256)
    random = torch.Generator().manual_seed(seed)

    def train(examples: tuple[Tensor, Tensor], steps: int, after: Callable[[int], None]) -> None:
        optimizer = Adam(model.parameters(), training.rate)
        for step in range(1, steps + 1):
            rows = torch.randint(len(examples[0]), (BATCH,), generator=random)
            loss = loss_of(training.kind, model, examples[0][rows], examples[1][rows])
            descend(optimizer, loss, training.schedule(step / steps))
            after(step)

    if training.first_classes:
        train((data.earlier, data.earlier), training.steps, lambda _: None)
    own = {name: value.detach().clone() for name, value in model.state_dict().items()}
    checkpoints: dict[int, Mapping[str, Tensor]] = {}
    every = training.steps // SNAPSHOTS
    with tempfile.TemporaryDirectory() as folder:
        ema = PostHocEMA.from_model(
            model, folder, update_every=5, checkpoint_every=every, max_checkpoints=None
        )

        def keep(step: int) -> None:
            ema.update_(model)
            for name, value in model.state_dict().items():
                own[name].lerp_(value, 1 - DECAY)
            if step % every == 0:
                state = model.state_dict()
                checkpoints[step] = {name: value.clone() for name, value in state.items()}

        with ema:
            train(data.train, training.steps, keep)
        return choose(training, data, model, Run(Path(folder)), checkpoints, own)


def choose(
    training: Training,
    data: Data,
    model: nn.Module,
    run: Run,
    checkpoints: Mapping[int, Mapping[str, Tensor]],
    own: Mapping[str, Tensor],
) -> Results:
    """Choose weights in each way on validation data, and measure them on test data."""

    def validate(weights: Mapping[str, Tensor]) -> float:
        model.load_state_dict(weights)
        return metric_of(training.kind, model, data.validation)

    def test(weights: Mapping[str, Tensor]) -> float:
        model.load_state_dict(weights)
        return metric_of(training.kind, model, data.test)

    report = run.sweep(validate, minimize=True, raw=checkpoints[training.steps])
    lengths = report.lengths.grid(USUAL_COUNT)
    grid = {}
    for t in checkpoints:
        made = synthesize(run.plan(lengths, t=t), "cpu")
        tensors = dict(made)
        for index, sigma_rel in enumerate(lengths):
            grid[sigma_rel, t] = validate({name: tensors[name][index] for name in tensors})
    best_length, best_end = min(grid, key=lambda pair: grid[pair])
    return Results(
        last=test(checkpoints[training.steps]),
        checkpoint=test(min(checkpoints.values(), key=validate)),
        ema=test(own),
        start=test(run.average(START)),
        length=test(run.average(report.best)),
        search=test(run.average(report.best, t=report.best_t)),
        grid=test(run.average(best_length, t=best_end)),
        end=report.best_t / run.t,
        evaluations=len(report.trials),
    )


def main() -> None:
    """Print the table."""
    jobs = [(index, seed) for index in range(len(TRAININGS)) for seed in SEEDS]
    found = dict(zip(jobs, tables.in_processes(measure, jobs), strict=True))
    rows = [
        (
            "training",
            "last weights",
            "best checkpoint",
            f"EMA of {DECAY}",
            f"`sigma_rel` {START}",
            "best length at the end",
            "the search",
            "whole grid",
            "it ends at",
            "evaluations",
        )
    ]
    for index, training in enumerate(TRAININGS):
        each = [found[index, seed] for seed in SEEDS]
        values = []
        for name in ("last", "checkpoint", "ema", "start", "length", "search", "grid"):
            mean = float(np.mean([getattr(result, name) for result in each]))
            values.append(f"{mean:.2f} %" if training.kind == "errors" else f"{mean:.1f}")
        ends = " ".join(f"{result.end:.2f}" for result in each)
        counts = " ".join(str(result.evaluations) for result in each)
        rows.append((training.name, *values, ends, counts))
    print(tables.markdown(rows))


if __name__ == "__main__":
    main()
