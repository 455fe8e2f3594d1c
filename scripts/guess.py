"""Draw the README's picture: test loss of a language model whose decay was a guess, against the
length.

    python scripts/guess.py

The data are those of the guide `gain`, in evidence.json: three trainings at a constant rate."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pictures
from matplotlib.figure import Figure

from posthoc_cli import plots

FOLDER = Path(__file__).parent
PICTURE = FOLDER.parent / ".assets" / "guess.svg"
GUESS = "0.999"


def losses(rows: list[dict[str, dict[str, float]]], name: str) -> list[float]:
    """Return the test loss of an average in each training."""
    return [row[name]["loss"] for row in rows]


def draw() -> Figure:
    """Draw means over trainings, with standard errors."""
    trainings = json.loads((FOLDER / "evidence.json").read_text())["trainings"]
    rows = []
    for training in trainings:
        if (training["task"], training["schedule"]) == ("language", "constant"):
            rows.append(training["rows"])
    lengths = sorted(float(name) for name in rows[0] if name[0].isdigit() and name != GUESS)
    measured = np.array([losses(rows, f"{length:g}") for length in lengths])
    guess = float(np.mean(losses(rows, GUESS)))
    last = float(np.mean(losses(rows, "last")))
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    axes = figure.subplots()
    colours = plots.COLOURS
    axes.axhline(guess, color=colours[1], linestyle="--", label=f"EMA of 0.999: {guess:.2f}")
    axes.axhline(last, color=colours[3], linestyle="-.", label=f"last weights: {last:.2f}")
    means = measured.mean(axis=1)
    axes.errorbar(
        lengths,
        means,
        measured.std(axis=1, ddof=1) / math.sqrt(len(rows)),
        color=colours[0],
        marker="o",
        markersize=4,
        capsize=3,
        label=f"average of any length: {means.min():.2f} at {lengths[means.argmin()]:g}",
    )
    axes.set(xscale="log", xlabel="sigma_rel, chosen after the training")
    axes.set_ylabel("test loss, nats a token")
    axes.set_xticks(lengths, [f"{length:g}" for length in lengths])
    axes.minorticks_off()
    axes.grid(True, color="0.9", linewidth=0.6)
    axes.legend(loc="center right", fontsize=9, bbox_to_anchor=(1.0, 0.62))
    print(f"EMA of {GUESS}: {guess:.3f}, {guess - last:+.3f} to the last weights, {last:.3f}")
    print(f"best of these lengths: {means.min():.3f}, at {lengths[means.argmin()]:g}")
    return figure


if __name__ == "__main__":
    pictures.write(draw, PICTURE)
