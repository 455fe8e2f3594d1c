"""Compare the search of lengths alone with that of an earlier end and of a share of the base, too,
and with the whole grid of ends, lengths and shares, on fifteen trainings.

    python scripts/overfitting.py

Networks of 7,792 and 19,210 parameters learn scikit-learn's digits, two seeds each. Some go on for
too long, some have wrong labels or few images, and some are fine-tunings: of a language model of
the digits below 5 on the others, with all weights or with factors of rank 4 (LoRA); of a classifier
of digits that are shifted by a pixel at random on others that are not. Everything is chosen on
validation data and shown on test data: losses in thousandths of a nat, or the share of errors in
percent. The grid has 13 of the forty stored times, six lengths and, of a fine-tuning, five shares;
the regret is the distance of the search's validation metric from its best one.

The second table is of the fine-tunings alone: the best average without and with a share of the
base, by loss and errors on test data, and for classifiers on the shifted digits, too.
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
from safetensors.torch import save_file
from tasks import (
    CLASSES,
    SIDE,
    Transformer,
    classifier,
    descend,
    digit_sequences,
    half_wave,
    loss_of_next,
    shuffled_digits,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Adam

from posthoc_cli import PostHocEMA, Run
from posthoc_cli.synthesis.engine import synthesize

SNAPSHOTS = 40
SEEDS = (0, 1)
BATCH = 64
DECAY = 0.999
SHIFTED = 600  # images that are learnt before a fine-tuning
FIRST_STEPS = 1600
EVERY = 3  # of the stored times in the grid
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75)
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
    shifted_first: bool = False  # trained before on digits that are shifted at random
    rank: int = 0  # of the factors that are trained in place of weights

    @property
    def is_fine_tuning(self) -> bool:
        return bool(self.first_classes or self.shifted_first)


TRAININGS = (
    Training("classifier, 30 % of labels wrong", "errors", 1600, 800, wrong=0.3),
    Training(
        "classifier, 30 % of labels wrong, cosine",
        "errors",
        1600,
        800,
        wrong=0.3,
        schedule=half_wave,
    ),
    Training("classifier, 20 % of labels wrong", "errors", 1600, 800, wrong=0.2),
    Training("classifier, 150 images", "loss", 1200, 150),
    Training("classifier, 60 images", "loss", 800, 60),
    Training("language model, fine-tuned for too long", "sequence", 1600, 60, first_classes=5),
    Training("language model, fine-tuned", "sequence", 200, 60, first_classes=5),
    Training(
        "language model, fine-tuned, LoRA", "sequence", 1600, 60, rate=4e-3, first_classes=5, rank=4
    ),
    Training("classifier, fine-tuned, by loss", "loss", 800, 100, shifted_first=True),
    Training("classifier, fine-tuned, by errors", "errors", 800, 100, shifted_first=True),
    Training(
        "classifier, fine-tuned, 30 % of labels wrong",
        "errors",
        800,
        300,
        wrong=0.3,
        shifted_first=True,
    ),
    Training("classifier, all images", "loss", 2000, 1000, rate=1e-3),
    Training("classifier, all images, cosine", "loss", 2000, 1000, rate=1e-3, schedule=half_wave),
    Training("language model, all sequences", "sequence", 2000, 1200, rate=4e-3),
    Training(
        "language model, all sequences, cosine",
        "sequence",
        2000,
        1200,
        rate=4e-3,
        schedule=half_wave,
    ),
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
    base_share: float
    evaluations: int
    regret: float  # of the search's validation metric, in percent of the grid's
    # loss and errors of the search without and with its share of the base, by test set; of
    # fine-tunings
    mixed: Mapping[str, tuple[float, float]]


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
            earlier = sequences[labels < training.first_classes]
            self.earlier = (earlier, earlier)
            sequences = sequences[labels >= training.first_classes]
            inputs, targets = sequences, sequences
        else:
            inputs, targets = shuffled_digits()
            if training.shifted_first:
                self.earlier = (shift(inputs[:SHIFTED], random), targets[:SHIFTED])
                inputs, targets = inputs[SHIFTED:], targets[SHIFTED:]
        third = (len(inputs) - training.examples) // 2
        count = min(training.examples, len(inputs) - 2 * third)
        self.train = (inputs[:count], targets[:count].clone())
        self.validation = (inputs[count : count + third], targets[count : count + third])
        self.test = (inputs[count + third :], targets[count + third :])
        self.tests = {"test": self.test}
        if training.shifted_first:
            self.tests["shifted"] = (shift(self.test[0], random), self.test[1])
        if training.wrong:
            is_wrong = torch.rand(count, generator=random) < training.wrong
            drawn = torch.randint(CLASSES, (count,), generator=random)
            self.train[1][is_wrong] = drawn[is_wrong]


def shift(images: Tensor, random: torch.Generator) -> Tensor:
    """Shift each image by up to a pixel each way."""
    moves = torch.randint(-1, 2, (len(images), 2), generator=random)
    rows = images.unflatten(1, (SIDE, SIDE))
    shifted = [
        row.roll(move, (0, 1)) for row, move in zip(rows, map(tuple, moves.tolist()), strict=True)
    ]
    return torch.stack(shifted).flatten(1)


class Factors(nn.Module):
    """Add a product of two factors of a low rank, which alone are trained, to a frozen weight."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.first = nn.Parameter(torch.randn(rank, columns) / columns**0.5)
        self.second = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the sum."""
        return weight + self.second @ self.first


def train_factors(model: nn.Module, rank: int) -> None:
    """Freeze a model, and add factors to its linear layers."""
    model.requires_grad_(False)
    for layer in [each for each in model.modules() if isinstance(each, nn.Linear)]:
        parametrize.register_parametrization(layer, "weight", Factors(layer.weight, rank))


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
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = Adam(trained, training.rate)
        for step in range(1, steps + 1):
            rows = torch.randint(len(examples[0]), (BATCH,), generator=random)
            loss = loss_of(training.kind, model, examples[0][rows], examples[1][rows])
            descend(optimizer, loss, training.schedule(step / steps))
            after(step)

    if training.is_fine_tuning:
        train(data.earlier, FIRST_STEPS, lambda _: None)
    if training.rank:
        train_factors(model, training.rank)
    start = {name: value.detach().clone() for name, value in model.state_dict().items()}
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
        return choose(training, data, model, Run(Path(folder)), checkpoints, own, start)


def choose(
    training: Training,
    data: Data,
    model: nn.Module,
    run: Run,
    checkpoints: Mapping[int, Mapping[str, Tensor]],
    own: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
) -> Results:
    """Choose weights in each way on validation data, and measure them on test data."""

    def validate(weights: Mapping[str, Tensor]) -> float:
        model.load_state_dict(weights, strict=not training.rank)
        return metric_of(training.kind, model, data.validation)

    def test(weights: Mapping[str, Tensor]) -> float:
        model.load_state_dict(weights, strict=not training.rank)
        return metric_of(training.kind, model, data.test)

    base = run.directory / "base" / "model.safetensors" if training.is_fine_tuning else None
    if base is not None:
        base.parent.mkdir()
        save_file({**start}, base)
    report = run.sweep(validate, minimize=True, raw=checkpoints[training.steps], base=base)
    lengths = report.search.first_grid
    shares = SHARES if training.is_fine_tuning else SHARES[:1]
    grid = {}
    for t in [*checkpoints][EVERY - 1 :: EVERY]:
        tensors = dict(synthesize(run.plan(lengths, t=t), "cpu"))
        for index, sigma_rel in enumerate(lengths):
            average = {name: tensors[name][index] for name in tensors}
            for share in shares:
                grid[sigma_rel, t, share] = validate(mix(average, start, share))
    best_length, best_end, best_share = min(grid, key=lambda spot: grid[spot])
    spot = report.search.best
    alone = run.average(spot.sigma_rel, t=report.best_t)
    found = mix(alone, start, spot.base_share)
    mixed = {}
    for name, examples in data.tests.items() if training.is_fine_tuning else ():
        for what, weights in (("alone", alone), ("mixed", found)):
            model.load_state_dict(weights, strict=not training.rank)
            kinds = ("sequence",) if training.kind == "sequence" else ("loss", "errors")
            values = [metric_of(kind, model, examples) for kind in kinds]
            mixed[f"{name}, {what}"] = (values[0], values[-1])
    least = min(grid.values())
    return Results(
        last=test(checkpoints[training.steps]),
        checkpoint=test(min(checkpoints.values(), key=validate)),
        ema=test(own),
        start=test(run.average(START)),
        length=test(run.average(report.search.at_end.sigma_rel)),
        search=test(found),
        grid=test(mix(run.average(best_length, t=best_end), start, best_share)),
        end=report.best_t / run.t,
        base_share=spot.base_share,
        evaluations=len(report.trials),
        regret=100 * max(0.0, validate(found) / least - 1),
        mixed=mixed,
    )


def mix(
    average: Mapping[str, Tensor], start: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Mix an average with a share of the weights at the start."""
    return {name: value.lerp(start[name], share) for name, value in average.items()}


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
            "share of the base",
            "evaluations",
            "regret",
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
        shares = " ".join(f"{result.base_share:g}" for result in each)
        regrets = " ".join(f"{result.regret:.1f}" for result in each)
        named = shares if training.is_fine_tuning else ""
        rows.append((training.name, *values, ends, named, counts, f"{regrets} %"))
    print(tables.markdown(rows))
    every = [found[job] for job in jobs]
    counts = [result.evaluations for result in every]
    regrets = [result.regret for result in every]
    print(
        f"evaluations {np.mean(counts):.1f} (most {max(counts)}); regret {np.mean(regrets):.1f} %, "
        f"median {np.median(regrets):.2f}, worst {max(regrets):.0f}"
    )
    print(tables.markdown(fine_tuning_rows(found)))


def fine_tuning_rows(found: Mapping[tuple[int, int], Results]) -> list[tuple[str, ...]]:
    """Make the table of fine-tunings: for each test set, without and with a share of the base."""
    rows = [("fine-tuning", "test set", "loss without", "with", "errors without", "with")]
    for index, training in enumerate(TRAININGS):
        each = [found[index, seed].mixed for seed in SEEDS]
        for name in [name.removesuffix(", alone") for name in each[0] if name.endswith("alone")]:
            cells = []
            for part in range(2 if training.kind != "sequence" else 1):
                for what in ("alone", "mixed"):
                    mean = float(np.mean([result[f"{name}, {what}"][part] for result in each]))
                    cells.append(f"{mean:.2f} %" if part else f"{mean:.1f}")
            rows.append((training.name, name, *cells, *[""] * (4 - len(cells))))
    return rows


if __name__ == "__main__":
    main()
