"""Print what averaging gained in three trainings that people know, and draw it.

    python scripts/evidence.py

- A language model on the source text of Python's standard library: a decoder of 3.4 M parameters,
  AdamW in bfloat16, with a constant learning rate, with one that falls over the last fifth, and
  cosine.
- A diffusion model on scikit-learn's digits: the denoiser of `denoising`.
- A classifier of digits with BatchNorm, SGD with momentum, constant rate and cosine.

Each was trained with three seeds, and every average of a training was measured on test data; the
measurements are `evidence.json`. Differences are taken seed by seed."""

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

ROWS = {
    "last": "last weights",
    "mean-5": "mean of the last 5 checkpoints",
    "0.999": "EMA of decay 0.999",
    "0.05": "ours, `sigma_rel` 0.05",
    "best": "ours, best length by a sweep",
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
class Column:
    """Trainings, one a seed; a measure, its factor in the table, and its decimals."""

    runs: list[Measured]
    metric: str
    scale: float
    digits: int

    def cell(self, row: str) -> str:
        """Return the mean of a row; in parentheses its difference from the last weights."""
        values = self.values(row)
        mean = _mean(values, self.digits)
        if row == "last":
            return mean
        return f"{mean} ({_paired(values, self.values('last'), self.digits)})"

    def values(self, row: str) -> list[float]:
        """Return the scaled measure of a row, by seed."""
        return [self.scale * run["rows"][row][self.metric] for run in self.runs]

    def best(self) -> str:
        """Return the best length, by seed."""
        lengths = [f"{run['best']:.3g}" for run in self.runs]
        return " ".join(lengths)


def tables(found: Sequence[Measured]) -> list[str]:
    """Return Markdown: a table of averages for each task, and one of differences for the language
    model."""
    language = {}
    for schedule, title in SCHEDULES.items():
        trainings = _of(found, "language", schedule)
        language[title] = Column(trainings, "loss", 1, 3)
    diffusion = _of(found, "diffusion", "inverse-sqrt")
    denoiser = {
        "test loss, 1e-3": Column(diffusion, "loss", 1e3, 1),
        "Frechet distance": Column(diffusion, "frechet", 1, 3),
    }
    classifier = {}
    for schedule in ("constant", "cosine"):
        trainings = _of(found, "classifier", schedule)
        classifier[SCHEDULES[schedule]] = Column(trainings, "error", 100, 2)
    return [
        _table("test loss, nats a token", language),
        _differences(found),
        _table("denoiser", denoiser),
        _table("error, %", classifier),
    ]


def _of(found: Sequence[Measured], task: str, schedule: str) -> list[Measured]:
    asked = (task, schedule)
    return [one for one in found if (one["task"], one["schedule"]) == asked]


def _table(corner: str, columns: dict[str, Column]) -> str:
    """Return means with standard errors over seeds; in parentheses the difference from the last
    weights, by seed."""
    lines = [(corner, *columns)]
    for row, title in ROWS.items():
        cells = [column.cell(row) for column in columns.values()]
        lines.append((title, *cells))
    lengths = [column.best() for column in columns.values()]
    lines.append(("best length, by seed", *lengths))
    return markdown(lines)


def _differences(found: Sequence[Measured]) -> str:
    """Return what another average of the language model gains or loses at a constant rate."""
    constant = Column(_of(found, "language", "constant"), "loss", 1, 4)
    decayed = Column(_of(found, "language", "decayed"), "loss", 1, 4)
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
    differences = np.subtract(values, others)
    return _mean(differences.tolist(), digits, sign="+")


def _mean(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Return the mean and its standard error."""
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {_error(values):.{digits}f}"


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
    axes.axhline(mean, color=colour, linestyle=style, label=ROWS["mean-5"])
    axes.axhspan(mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)


def _gains(runs: Sequence[Measured], row: str) -> list[float]:
    """Return the loss of a row less that of the last weights, of each run that has the row."""
    measured = [rows for rows in runs if row in rows]
    return [rows[row]["loss"] - rows["last"]["loss"] for rows in measured]


if __name__ == "__main__":
    main()
