"""Measure what the error of an average costs: the share of the metric's gain that is lost.

    python scripts/lost_gain.py [--out FOLDER]

Small trainings record true averages of several lengths, over every step in float64, and write what
users have: snapshots of the hook, and checkpoints of the weights with an EMA of one decay. From 10
to 80 of them an average is made; from the weights alone, too. With the metric, a loss, of the true
average, of the one that was made, and of the last weights,

    lost = (loss of the one made - loss of the true one) / (loss of the last - loss of the true one)

is 0 for an exact average, and 1 where averaging has gained nothing. It is compared with figures
that can be shown without a metric: the predicted error, relative to the norm; the same relative to
the expected distance from the last weights, `lost_gain`; its square; and the sum of the squared
coefficients, which for weights alone is 1 / their effective number.

Two rules leave noise out. An average counts if its gain is at least four standard errors over the
held-out parts, so that it is known to a quarter: 234 of 432 do. A ratio counts from a figure of 1 %
on, with the standard error of the loss in place of a smaller loss. Trainings and measurements are
kept in `--out`; a call that was stopped goes on with what is not there. Some 3 minutes on two
cores.

No figure says within a factor of 3 what every average loses; `lost_gain` comes nearest. Lost gain /
figure where the figure is at least 1 %, 152 averages of five trainings ("within 3": the share
within a factor of 3 of the median):

    figure                       median  within 3  by training    weights alone: median  within 3
    predicted error                 9.2      62 %     4 to 23                        18      67 %
    lost_gain                      0.40      64 %  0.34 to 0.78                    0.82      77 %
    its square                      3.8      49 %   2.3 to 4.9                      3.8      54 %
    sum of squared coefficients    0.09      16 %  0.03 to 0.35                    0.80      76 %

Really lost / `lost_gain` is 0.42 in the median for 20 files of weights, 0.31 for 40, 0.12 for the
hook and 0.09 for files of an EMA."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tasks
import torch
from denoising import Denoiser
from following import gamma_of, quiet
from tables import FloatArray, in_processes, markdown
from torch import Tensor
from torch.nn import Module, utils
from torch.optim import AdamW, Optimizer
from trajectories import RECIPES

from posthoc_cli import (
    PostHocEMA,
    Request,
    disk_sources,
    import_checkpoints,
    plan_synthesis,
    synthesize,
)
from posthoc_cli.profiles import Point
from posthoc_cli.snapshots.source import Source

FILES = 80
"""Checkpoints of a training."""

STRIDES = (1, 3, 8)
"""Every first, third and eighth of them is used, counted from the end."""

ENDS = (0.6, 1.0)
"""Fractions of training at which averages end."""

LENGTHS = (0.03, 0.07, 0.13, 0.22)

EMA_LENGTHS = 20
"""Time constants of the EMA in a training: its decay is 1 - 20 / steps."""

CERTAIN = 4.0
LEAST = 0.01
"""The gain of an average that counts, in standard errors, and the least figure of a ratio."""

Cell = dict[str, Any]
"""What was measured of one average."""


@dataclass(frozen=True)
class Training:
    """A network, its loss on a batch drawn from torch's global random numbers at a fraction of
    training, and its metric: the losses of parts of held-out data."""

    name: str
    steps: int
    model: Callable[[], Module]
    optimizer: Callable[[Module], Optimizer]
    loss: Callable[[Module, float], Tensor]
    rate: Callable[[float], float]
    held_out: Callable[[Module], FloatArray]
    seed: int = 0

    @property
    def decay(self) -> float:
        """The decay of the EMA."""
        return 1 - EMA_LENGTHS / self.steps


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(tempfile.gettempdir()) / "lost-gain"
    parser.add_argument(
        "--out", type=Path, default=default, help=f"folder to keep all in ({default})"
    )
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    tasks.tokens(folder)  # once, before the processes need them
    cells = []
    for measured in in_processes(partial(work, folder), TRAININGS):
        cells += measured
    print("\n\n".join(tables(cells)))


def work(root: Path, name: str) -> list[Cell]:
    """Return the measurements of a training, made unless that is done."""
    torch.set_num_threads(1)
    training = TRAININGS[name](root)
    folder = root / name
    if not (folder / "truth.npz").exists():
        shutil.rmtree(folder, ignore_errors=True)
        train(training, folder)
    file = folder / "cells.json"
    if not file.exists():
        with quiet():
            cells = [*measure(training, folder)]
        file.write_text(json.dumps(cells))
    content: list[Cell] = json.loads(file.read_text())
    return content


# --- one training
# ------------------------------------------------------------------------------------


def train(training: Training, folder: Path) -> None:
    """Train, and record in a new folder."""
    (folder / "both").mkdir(parents=True)
    torch.manual_seed(training.seed)
    model = training.model()
    # The parameters become views of one vector, so that all are averaged by one operation.
    vector = utils.parameters_to_vector(model.parameters()).detach()
    utils.vector_to_parameters(vector, model.parameters())
    every = training.steps // FILES
    tracker = PostHocEMA.from_model(
        model,
        folder / "hook",
        update_every=2,
        checkpoint_every=every,
        max_checkpoints=None,
        checkpoint_dtype="float16",
    )
    exponents = np.array([gamma_of(length) + 1 for length in LENGTHS])
    truths = torch.zeros(len(LENGTHS), vector.numel(), dtype=torch.float64)
    ema = vector.clone()
    ends = {round(end * training.steps): end for end in ENDS}
    record = {}
    for step in steps(training, model):
        tracker.update_(model)
        ema.lerp_(vector, 1 - training.decay if step > 1 else 1.0)
        kept = torch.tensor(((step - 1) / step) ** exponents)
        truths.lerp_(vector.double().expand_as(truths), (1 - kept)[:, None])
        if step % every == 0:
            content = {"model": split(model, vector), "ema": split(model, ema), "step": step}
            torch.save(content, folder / "both" / f"{step:06}.pt")
        if step in ends:
            record[f"{ends[step]}"] = truths.numpy().copy()
            record[f"last-{ends[step]}"] = vector.double().numpy()
    tracker.close()
    np.savez(folder / "truth.npz", **record)


def steps(training: Training, model: Module) -> Iterator[int]:
    """Train a model, and yield the number of each step."""
    optimizer = training.optimizer(model)
    for step in range(1, training.steps + 1):
        fraction = (step - 1) / training.steps
        loss = training.loss(model, fraction)
        tasks.descend(optimizer, loss, training.rate(fraction))
        yield step


def split(model: Module, vector: Tensor) -> dict[str, Tensor]:
    """Return a vector as tensors by name."""
    tensors = {}
    begin = 0
    for name, parameter in model.named_parameters():
        end = begin + parameter.numel()
        tensors[name] = vector[begin:end].clone().view_as(parameter)
        begin = end
    return tensors


# --- its averages
# ------------------------------------------------------------------------------------


class Metric:
    """The metric of weights."""

    def __init__(self, training: Training) -> None:
        torch.manual_seed(training.seed)
        self.model = training.model()
        self._held_out = training.held_out

    @torch.no_grad()
    def __call__(self, weights: FloatArray) -> FloatArray:
        """Return the losses of the held-out parts, with the same random numbers at every call."""
        vector = torch.from_numpy(weights).float()
        utils.vector_to_parameters(vector, self.model.parameters())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2**20)
            return self._held_out(self.model)


def measure(training: Training, folder: Path) -> Iterator[Cell]:
    """Yield the measurements of each average."""
    metric = Metric(training)
    truth = np.load(folder / "truth.npz")
    import_checkpoints(folder / "both", folder / "run", ema_decay=training.decay, overwrite=True)
    both = disk_sources(folder / "run")
    weights = [source for source in both if isinstance(source.profile, Point)]
    kinds = {"hook": disk_sources(folder / "hook"), "EMA and weights": both, "weights": weights}
    for end in ENDS:
        averages = truth[f"{end}"]
        last = metric(truth[f"last-{end}"])
        exact = [metric(average) for average in averages]
        for kind, sources in kinds.items():
            for used in choices(sources, end * training.steps):
                plan = plan_synthesis(used, Request(LENGTHS))
                made = in_order(dict(synthesize(plan)), metric.model)
                for index, length in enumerate(LENGTHS):
                    losses = metric(made[index])
                    error = np.linalg.norm(made[index] - averages[index])
                    yield {
                        "training": training.name,
                        "kind": kind,
                        "files": len({source.t for source in used}),
                        "end": end,
                        "length": length,
                        "predicted": plan.predicted_error(index),
                        "distance": float(plan.reconstruction.distance[index]),
                        "squares": float(np.sum(plan.coefficients[:, index] ** 2)),
                        "actual": float(error / np.linalg.norm(averages[index])),
                        "gain": mean_and_error(last - exact[index]),
                        "loss": mean_and_error(losses - exact[index]),
                    }


def choices(sources: Sequence[Source], end: float) -> Iterator[list[Source]]:
    """Yield the sources of every first, third, ... time up to an end."""
    times = sorted({source.t for source in sources if source.t <= end})
    for stride in STRIDES:
        chosen = times[::-stride]
        yield [source for source in sources if source.t in chosen]


def in_order(tensors: dict[str, list[Tensor]], model: Module) -> FloatArray:
    """Return averages, of which each name has a list, as vectors in the order of the parameters:
    [averages, parameters]."""
    ordered = [torch.stack(tensors[name]).flatten(1) for name, _ in model.named_parameters()]
    return torch.cat(ordered, dim=1).double().numpy()


def mean_and_error(values: FloatArray) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size))


# --- tables
# ------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[Cell], float]] = {
    "predicted error": lambda cell: cell["predicted"],
    "error / distance": lambda cell: cell["predicted"] / cell["distance"],
    "(error / distance)²": lambda cell: (cell["predicted"] / cell["distance"]) ** 2,
    "sum of squared coefficients": lambda cell: cell["squares"],
}

STEPS = (0.0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.4, math.inf)
"""Ends of the classes of error / distance in a table."""


def tables(cells: Sequence[Cell]) -> Iterator[str]:
    """Yield Markdown: what is lost in each class of error / distance; how far each figure explains
    it."""
    certain = [cell for cell in cells if cell["gain"][0] >= CERTAIN * cell["gain"][1]]
    yield f"{len(certain)} of {len(cells)} averages gain at least {CERTAIN:g} standard errors."
    yield markdown([*classes(certain)])
    figure = FIGURES["error / distance"]
    counted = [cell for cell in certain if figure(cell) >= LEAST]
    rows = [("lost gain / figure", "kind", "averages", "median", "quartiles", "spread", "within 3")]
    for kind in ("weights", "EMA and weights", "hook", "all"):
        of_kind = [cell for cell in counted if kind in (cell["kind"], "all")]
        for name in FIGURES:
            rows.append((name, kind, str(len(of_kind)), *explained(of_kind, name)))
    yield markdown(rows)
    rows = [("median of lost gain / figure", *FIGURES)]
    for training in dict.fromkeys(cell["training"] for cell in counted):
        of_training = [cell for cell in counted if cell["training"] == training]
        medians = [explained(of_training, name)[0] for name in FIGURES]
        rows.append((training, *medians))
    yield markdown(rows)


def classes(cells: Sequence[Cell]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of a table of what is lost by error / distance."""
    yield (
        "error / distance",
        "averages",
        "predicted error",
        "lost: median",
        "size: median",
        "9 of 10 below",
    )
    figure = FIGURES["error / distance"]
    for low, high in itertools.pairwise(STEPS):
        members = [cell for cell in cells if low <= figure(cell) < high]
        lost = np.array([cell["loss"][0] / cell["gain"][0] for cell in members])
        errors = np.percentile([cell["predicted"] for cell in members], [10, 90])
        yield (
            f"{100 * low:g} to {100 * high:g} %",
            str(len(members)),
            f"{100 * errors[0]:.2g} to {100 * errors[1]:.2g} %",
            f"{100 * np.median(lost):.2g} %",
            f"{100 * np.median(np.abs(lost)):.2g} %",
            f"{100 * np.percentile(lost, 90):.2g} %",
        )


def explained(cells: Sequence[Cell], name: str) -> tuple[str, str, str, str]:
    """Return median, quartiles, spread, and the share within 3 of the median of lost gain / a
    figure."""
    logarithms = []
    for cell in cells:
        loss, error = cell["loss"]
        lost = max(abs(loss), error) / cell["gain"][0]
        logarithms.append(math.log(lost / FIGURES[name](cell)))
    first, median, third = np.exp(np.percentile(logarithms, [25, 50, 75]))
    spread = math.exp(np.std(logarithms))
    near = np.abs(np.array(logarithms) - math.log(median)) < math.log(3)
    quartiles = f"{first:.2g} to {third:.2g}"
    return f"{median:.2g}", quartiles, f"{spread:.1f}", f"{100 * near.mean():.0f} %"


# --- the trainings
# ------------------------------------------------------------------------------------


def recorded(name: str, count: int, _: Path) -> Training:
    """Return a run of `trajectories`, measured on fresh noise."""
    recipe = RECIPES[name]

    def held_out(model: Module) -> FloatArray:
        return np.array([float(recipe.loss(model, 256)) for _ in range(12)])

    return Training(
        name,
        count,
        recipe.model,
        lambda model: recipe.optimizer(model.parameters()),
        lambda model, fraction: recipe.loss(model, recipe.batch(fraction)),
        recipe.rate,
        held_out,
        recipe.seed,
    )


CONTEXT = 64


def language(root: Path) -> Training:
    """Return a decoder of 0.1 M parameters on the standard library's source text, AdamW at a
    constant rate."""
    parts = tasks.tokens(root)

    def loss(model: Module, text: Tensor, starts: Tensor) -> Tensor:
        places = starts[:, None] + torch.arange(CONTEXT + 1)
        chosen = text[places]
        return tasks.loss_of_next(model(chosen[:, :-1]), chosen)

    def drawn(model: Module, _: float) -> Tensor:
        text = parts["training"]
        return loss(model, text, torch.randint(len(text) - CONTEXT - 1, (4,)))

    def held_out(model: Module) -> FloatArray:
        text = parts["test"]
        starts = torch.linspace(0, len(text) - CONTEXT - 2, 64).long()
        return np.array([float(loss(model, text, four)) for four in starts.split(4)])

    return Training(
        "language-constant",
        960,
        lambda: tasks.Decoder(width=64, depth=1),
        lambda model: AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        drawn,
        lambda fraction: min(1.0, fraction / 0.05 + 1e-3),
        held_out,
    )


def diffusion(_: Path) -> Training:
    """Return the denoiser of digits, Adam, rate falling as one over the square root of time."""
    task = tasks.Diffusion()
    return Training(
        "diffusion",
        1600,
        lambda: Denoiser(width=96, blocks=2),
        task.optimizer,
        lambda model, _: task.loss(model, torch.default_generator),
        lambda fraction: 1 / math.sqrt(max(10 * fraction, 1.0)),
        lambda model: task.validation(model).numpy(),
    )


TRAININGS: dict[str, Callable[[Path], Training]] = {
    "language-constant": language,
    "diffusion": diffusion,
    "denoiser-adam": partial(recorded, "denoiser-adam", 1600),
    "denoiser-constant": partial(recorded, "denoiser-constant", 1600),
    "transformer-adamw": partial(recorded, "transformer-adamw", 1600),
    "classifier-images": partial(recorded, "classifier-images", 1600),
}

if __name__ == "__main__":
    main()
