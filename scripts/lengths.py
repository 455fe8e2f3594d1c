"""Draw what the lengths of averages mean: the weight of each moment of training in averages of
three lengths, and in an EMA. Print the table that README has beside the picture.

    python scripts/lengths.py

The EMA is the one of the same mean age as the average of 0.1. Decays are of a training of 100,000
steps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pictures
from matplotlib.figure import Figure
from tables import markdown

from posthoc_cli import plots
from posthoc_cli.profiles import PowerFunction, decay_from_sigma_rel, gamma_from_sigma_rel

PICTURE = Path(__file__).parent.parent / ".assets" / "lengths.svg"
SIGMA_RELS = (0.05, 0.1, 0.28)
EMA_OF = 0.1
STEPS = 100_000
HIGHEST = 22.0  # times the mean weight; 0.05 ends at 18


def recent(sigma_rel: float, mass: float = 0.9) -> float:
    """Compute the share of the training, at its end, from which this much of an average comes."""
    exponent = 1 / (gamma_from_sigma_rel(sigma_rel) + 1)
    return float(1 - (1 - mass) ** exponent)


def draw() -> Figure:
    """Draw the profiles over training time, from 0 to 1."""
    figure = Figure(figsize=(6.4, 2.8), layout="constrained")
    axes = figure.subplots()
    times = np.linspace(0, 1, 601)
    for index, sigma_rel in enumerate(SIGMA_RELS):
        profile = PowerFunction.from_sigma_rel(sigma_rel, 1.0)
        label = f"sigma_rel {sigma_rel:g}"
        axes.plot(times, profile.density(times), color=plots.COLOURS[index], label=label)
    rate = gamma_from_sigma_rel(EMA_OF) + 2  # 1 / the mean age
    label = f"EMA as long as {EMA_OF:g}"
    axes.plot(times, rate * np.exp(rate * (times - 1)), "--", color="0.5", label=label)
    axes.set(xlabel="training time", ylabel="weight in the average", xlim=(0, 1), ylim=(0, HIGHEST))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["start", "25 %", "50 %", "75 %", "end"])
    axes.set_yticks([])
    axes.legend(loc="upper left", fontsize=9)
    return figure


if __name__ == "__main__":
    rows = [("sigma_rel", "90 % comes from the last", f"as an EMA, in {STEPS:,} steps")]
    for sigma_rel in SIGMA_RELS:
        decay = decay_from_sigma_rel(sigma_rel, STEPS)
        rows.append((f"{sigma_rel:g}", f"{recent(sigma_rel):.0%}", f"{decay:.5f}"))
    print(markdown(rows))
    pictures.write(draw, PICTURE)
