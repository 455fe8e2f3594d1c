"""Print what the demo shows with other learning rates, scales of the last layer, and batches.

    python scripts/demo_choice.py

`distance` is the mean distance of samples to the letters, in per cent of their height.
Each row is the mean of three trainings, but for the best length, which is that of each. Some ten
minutes on two cores."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tables import in_processes, markdown

from posthoc_cli import Run, demo
from posthoc_cli.plots import FloatArray

STEPS = 6000
SEEDS = (0, 1, 2)
CHOICES = (
    "0.002 512 48",
    "0.001 512 48",
    "0.004 512 48",
    "0.002 64 48",
    "0.002 2048 48",
    "0.002 512 16",
    "0.002 512 128",
)
"""Learning rates, scales of the last layer and batches, first the chosen ones."""


@dataclass(frozen=True)
class Shown:
    """What one training shows: losses and distances of the last weights, the best length and the
    longest."""

    best: float
    losses: tuple[float, float, float]
    distances: tuple[float, float, float]


def main() -> None:
    """Train, and print the table."""
    losses = ("loss of last", "of best", "of 0.28", "gain, %")
    distances = ("distance of last", "of best", "of 0.28")
    rows = [("rate, scale, batch", "best length", *losses, *distances)]
    for choice, seen in zip(CHOICES, in_processes(show, CHOICES), strict=True):
        lengths = [f"{shown.best:g}" for shown in seen]
        last, best, longest = np.mean([shown.losses for shown in seen], axis=0)
        numbers = [f"{last:.3f}", f"{best:.3f}", f"{longest:.3f}", f"{100 * (1 - best / last):.0f}"]
        for mean in np.mean([shown.distances for shown in seen], axis=0):
            numbers.append(f"{mean:.1f}")
        rows.append((choice, " ".join(lengths), *numbers))
    print(markdown(rows))


def show(choice: str) -> list[Shown]:
    """Train with each seed."""
    torch.set_num_threads(1)
    rate, scale, batch = choice.split()
    demo.LEARNING_RATE = float(rate)
    demo.OUTPUT_SCALE = int(scale)
    demo.BATCH = int(batch)
    return [*map(train, SEEDS)]


def train(seed: int) -> Shown:
    """Train with a seed, and measure."""
    with tempfile.TemporaryDirectory() as folder:
        snapshots = Path(folder) / "snapshots"
        model = demo.train(STEPS, snapshots, ignore, seed)
        run = Run(snapshots)
        report = demo.search(model, run)
        best = report.estimate.best
        longest = demo.SIGMA_RELS[-1]
        values = {trial.sigma_rel: trial.value for trial in report.trials}
        weights = (model.state_dict(), run.average(best), run.average(longest))
        return Shown(
            best,
            (values[None], values[best], values[longest]),
            tuple(distance(demo.sample_letters(one)) for one in weights),
        )


def ignore(_: int) -> None:
    """Show no progress."""


def distance(points: FloatArray) -> float:
    """Return the mean distance of points to the nearest stroke, in per cent of the height."""
    begins, ends = demo.STROKES.double().numpy().transpose(1, 0, 2)
    along = ends - begins
    past = points[:, None] - begins
    share = (past * along).sum(-1) / (along * along).sum(-1)
    nearest = past - share.clip(0, 1)[..., None] * along
    distances = np.linalg.norm(nearest, axis=-1).min(axis=1)
    height = np.ptp(ends[:, 1])
    return 100 * float(distances.mean() / height)


if __name__ == "__main__":
    main()
