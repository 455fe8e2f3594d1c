"""Print what averaging gained in three trainings that people know, and draw it.

    python scripts/evidence.py

- A language model, a decoder of 3.4 M parameters, learns the source text of Python's standard
  library (8.2 MB) in 1,600 steps of AdamW in bfloat16. "Warm-up, stable, decay" is the run of the
  constant rate up to 80 %; then its rate falls to zero as 1 - sqrt(x).
- A diffusion model of 0.48 M parameters, the denoiser of `denoising`, learns scikit-learn's digits
  in 12,000 steps; its rate falls as one over the square root of time. The Frechet distance compares
  2,000 samples with 360 held-out images, in a classifier's features.
- A classifier of three convolutions with BatchNorm, whose statistics are recomputed, learns noisy
  digits in 4,000 steps of SGD with momentum.

Each was trained with three seeds, and every average of a training was measured on test data; the
measurements are `evidence.json`. The best length was searched on validation data. The hook tracked
0.05 and 0.28 at every 10th step; where the rate fell to zero, it tracked 0.002, 0.005, 0.01, 0.05
and 0.28 at every step.

The first table has a row for each training: the mean metric of the last weights, and what each
average adds to it, with the standard error over the seeds; differences are taken seed by seed. The
second one compares averages of the language model. Losses are in nats, the denoiser's in
thousandths, errors in percent."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pictures
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tables import markdown

from posthoc_cli import plots

TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25)
RECORD = Path(__file__).with_name("evidence.json")
PICTURE = Path(__file__).parent.parent / ".assets" / "gain-language.svg"

AVERAGES = {
    "mean-5": "mean of 5 checkpoints",
    "0.999": "EMA of 0.999",
    "0.05": "`sigma_rel` 0.05",
    "best": "best length",
}
SCHEDULES = {"constant": "constant rate", "decayed": "warm-up, stable, decay", "cosine": "cosine"}

LENGTHS = (0.03, 0.05, 0.07, 0.10, 0.15, 0.20, 0.25)
"""Lengths that were measured in every training."""

SHORT = (0.002, 0.003, 0.005, 0.007, 0.01, 0.014, 0.02)
"""Lengths that were also measured where the learning rate falls to zero."""

Measured = dict[str, Any]
"""The measurements of one training."""


def main() -> None:
    """Print the tables, and draw the picture."""
    measured = json.loads(RECORD.read_text())["trainings"]
    pictures.write(partial(draw, measured), PICTURE)
    print("\n\n".join(tables(measured)))


# --- tables


@dataclass(frozen=True)
class Row:
    """Trainings, one a seed; a measure, its factor in the table, and its decimals."""

    runs: list[Measured]
    metric: str
    scale: float
    digits: int

    def cells(self) -> list[str]:
        """Return the mean of the last weights, the difference of each average from it, and the best
        length of each seed."""
        last = self.values("last")
        cells = [f"{np.mean(last):.{self.digits}f}"]
        cells += [_paired(self.values(average), last, self.digits) for average in AVERAGES]
        lengths = [f"{run['best']:.3g}" for run in self.runs]
        return [*cells, " ".join(lengths)]

    def values(self, average: str) -> list[float]:
        """Return the scaled measure of an average, by seed."""
        return [self.scale * run["rows"][average][self.metric] for run in self.runs]


def tables(found: Sequence[Measured]) -> list[str]:
    """Return Markdown: the table of all trainings, and the one of differences for the language
    model."""
    rows = {}
    for schedule, title in SCHEDULES.items():
        runs = _of(found, "language", schedule)
        rows[f"language model, {title}"] = Row(runs, "loss", 1, 3)
    diffusion = _of(found, "diffusion", "inverse-sqrt")
    rows["denoiser, loss"] = Row(diffusion, "loss", 1e3, 1)
    rows["denoiser, Frechet distance"] = Row(diffusion, "frechet", 1, 3)
    for schedule in ("constant", "cosine"):
        runs = _of(found, "classifier", schedule)
        rows[f"classifier's errors, {SCHEDULES[schedule]}"] = Row(runs, "error", 100, 2)
    lines = [("training", "last weights", *AVERAGES.values(), "best length, by seed")]
    for title, row in rows.items():
        lines.append((title, *row.cells()))
    return [markdown(lines), _differences(found)]


def _of(found: Sequence[Measured], task: str, schedule: str) -> list[Measured]:
    asked = (task, schedule)
    return [one for one in found if (one["task"], one["schedule"]) == asked]


def _differences(found: Sequence[Measured]) -> str:
    """Return what another average of the language model gains or loses at a constant rate."""
    constant = Row(_of(found, "language", "constant"), "loss", 1, 4)
    decayed = Row(_of(found, "language", "decayed"), "loss", 1, 4)
    best = constant.values("best")
    less_mean = _paired(best, constant.values("mean-5"), 4)
    less_decayed = _paired(best, decayed.values("last"), 4)
    rows = [
        ("constant rate", "difference of test losses"),
        ("best length minus the mean of 5 checkpoints", less_mean),
        ("best length minus the decayed run", less_decayed),
    ]
    return markdown(rows)


def _paired(values: Sequence[float], others: Sequence[float], digits: int) -> str:
    """Return the mean difference and its standard error."""
    differences = np.subtract(values, others).tolist()
    return f"{np.mean(differences):+.{digits}f} ± {_error(differences):.{digits}f}"


def _error(values: Sequence[float]) -> float:
    """Return the standard error of the mean."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values))


# --- the picture


def draw(found: Sequence[Measured]) -> Figure:
    """Draw the language model's loss less that of the last weights, seed by seed, against the
    length."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    panels = list(figure.subplots(1, len(SCHEDULES)))
    for axes, schedule in zip(panels, SCHEDULES, strict=True):
        runs = [one["rows"] for one in _of(found, "language", schedule)]
        _draw_gains(axes, runs)
        axes.set_title(SCHEDULES[schedule], fontsize=9)
    panels[0].set_ylabel("loss less the last weights', nats a token", fontsize=9)
    panels[0].legend(fontsize=6, loc="upper left")
    return figure


def _draw_gains(axes: Axes, runs: Sequence[Measured]) -> None:
    """Draw the gains of our averages and of the mean of checkpoints, each with its error."""
    ours = {}
    for length in SHORT + LENGTHS:
        gains = _gains(runs, f"{length:g}")
        if gains:
            ours[length] = gains
    ticks = LENGTHS
    if min(ours) < min(LENGTHS):
        ticks = TICKS
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{length:g}" for length in ticks], fontsize=6)
    axes.minorticks_off()
    axes.set_xlabel("sigma_rel")
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.errorbar(
        [*ours],
        [*map(np.mean, ours.values())],
        [*map(_error, ours.values())],
        color=plots.COLOURS[0],
        linestyle=plots.STYLES[0],
        marker=plots.MARKERS[0],
        markersize=3.5,
        capsize=2,
        label="ours",
    )
    _draw_mean_of_checkpoints(axes, _gains(runs, "mean-5"))
    axes.axhline(0, color="0.5", linewidth=0.8)


def _draw_mean_of_checkpoints(axes: Axes, gains: Sequence[float]) -> None:
    mean = np.mean(gains)
    error = _error(gains)
    colour = plots.COLOURS[1]
    style = plots.STYLES[1]
    axes.axhline(mean, color=colour, linestyle=style, label=AVERAGES["mean-5"])
    axes.axhspan(mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def _gains(runs: Sequence[Measured], row: str) -> list[float]:
    """Return the loss of a row less that of the last weights, of each run that has the row."""
    measured = [rows for rows in runs if row in rows]
    return [rows[row]["loss"] - rows["last"]["loss"] for rows in measured]


if __name__ == "__main__":
    main()
