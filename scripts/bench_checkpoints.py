"""Measure averages made from checkpoints of other programs, and whether the predicted error holds.

    OMP_NUM_THREADS=1 python scripts/bench_checkpoints.py [--only TEXT] [--seed 0]

Each kind of motion is saved in each layout, as a training would, and opened by the public
interface. The truth is the sum over every step in float64. *Plain* are the coefficients of sum 1
whose tail is nearest to the target's, step by step, computed here. A cell is one target of one run.

- **within 2, 3**: the larger of actual / predicted and predicted / actual is below it.
- **beyond 3**: the actual error is more than 3 times the predicted one.
- **error / plain**: the median, and the share of cells up to 1.05.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from following import FloatArray, distances, gamma_of, least_squares, quiet
from numpy.random import Generator
from tables import grouped, markdown, ratios, share, within
from torch import Tensor

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.run import Weights

STEPS = 2000
SIZE = 400
FILES = 20
EPOCH = STEPS // FILES
WIDTHS = (0.02, 0.06, 0.12, 0.25)

# --- motion: the weights after each step, [STEPS + 1, SIZE], those before the first step included

Motion = Callable[[Generator], FloatArray]


def normal(random: Generator) -> FloatArray:
    """Independent numbers for every step and weight."""
    return random.standard_normal((STEPS + 1, SIZE))


def half_wave() -> FloatArray:
    """A cosine that falls from 1 to -1, for every step: [STEPS + 1, 1]."""
    steps = np.arange(STEPS + 1)
    wave = np.cos(np.pi * steps / STEPS)
    return wave[:, None]


def walk(random: Generator) -> FloatArray:
    """Independent steps of one size."""
    return np.cumsum(0.005 * normal(random), axis=0)


def decaying(random: Generator) -> FloatArray:
    """A walk whose steps are as large as a learning rate that falls to 0 by a cosine."""
    rate = (1 + half_wave()) / 2
    return np.cumsum(0.005 * rate * normal(random), axis=0)


def drift(random: Generator) -> FloatArray:
    """A straight path with noise that forgets in ten steps."""
    place = np.linspace(0, 1, STEPS + 1)[:, None]
    moved = 0.3 * place * random.standard_normal(SIZE)
    return moved + 0.03 * restored(random, 10)


def restored(random: Generator, memory: float) -> FloatArray:
    """Noise of unit variance about a minimum, which forgets in so many steps."""
    kept = np.exp(-1 / memory)
    values = normal(random)
    values[1:] *= np.sqrt(1 - kept**2)
    for before, now in pairwise(values):
        now += kept * before
    return values


def cosine(random: Generator) -> FloatArray:
    """A smooth path: every weight goes from one value to another by half a cosine."""
    place = (1 - half_wave()) / 2
    return place * random.standard_normal(SIZE) * 0.3


def kinks(random: Generator) -> FloatArray:
    """Straight pieces, each in a direction of its own."""
    ends = random.choice(np.arange(1, STEPS), 6, replace=False)
    directions = random.standard_normal((7, SIZE))
    slopes = directions * 0.3 / STEPS**0.5 / 20
    steps = np.arange(STEPS + 1)
    piece = np.searchsorted(np.sort(ends), steps)
    return np.cumsum(slopes[piece], axis=0)


MOTIONS: dict[str, Motion] = {
    "walk": walk,
    "decaying rate": decaying,
    "drift, noise of 10 steps": drift,
    "minimum, 30 steps": lambda random: 0.2 * restored(random, 30),
    "minimum, 300 steps": lambda random: 0.2 * restored(random, 300),
    "cosine": cosine,
    "kinks": kinks,
}

# --- layouts

Times = Callable[[Generator], list[int]]


def evenly(count: int = FILES) -> Times:
    """Return evenly spaced steps."""
    every = STEPS // count
    return lambda _: [*range(every, STEPS + 1, every)]


EVEN = evenly()


def at_random(random: Generator) -> list[int]:
    """Any steps, and the last one."""
    steps = np.arange(40, STEPS)
    chosen = random.choice(steps, FILES - 1, replace=False)
    return [*np.sort(chosen).tolist(), STEPS]


def by_the_clock(random: Generator) -> list[int]:
    """Gaps that vary by a third, as of saves every so many minutes."""
    gaps = random.uniform(2 / 3, 4 / 3, FILES)
    passed = np.cumsum(gaps) / gaps.sum()
    steps = np.ceil(passed * STEPS - 1e-9)
    return [int(step) for step in steps]


def kept_best(random: Generator) -> list[int]:
    """Records of a metric: rarer and rarer."""
    places = random.uniform(0, 1, 3 * FILES)
    chosen = 50 * (STEPS / 50) ** places
    steps = np.unique(chosen[chosen < STEPS].astype(int))
    picked = random.choice(len(steps), FILES - 1, replace=False)
    records = steps[np.sort(picked)]
    return [*records.tolist(), STEPS]


@dataclass(frozen=True)
class Layout:
    """What a training saves, and when."""

    times: Times = EVEN
    weights: bool = True
    decay: float = 0.0  # 0 without an average
    warm_up: bool = False  # the decay of update n is at most (1 + n) / (10 + n)
    every: int = 1
    dtype: torch.dtype = torch.float32
    epochs: bool = False  # files that are named by the number of an epoch, and say nothing else

    def kept(self, update: int) -> float:
        """Return the share of the average that an update keeps, counted from 1."""
        if not self.warm_up:
            return self.decay
        return min(self.decay, (1 + update) / (10 + update))


UNEVEN: dict[str, Times] = {
    "at random": at_random,
    "by the clock": by_the_clock,
    "kept best": kept_best,
}
LAYOUTS: dict[str, Layout] = {
    "weights, each epoch": Layout(),
    "weights, each epoch, numbered": Layout(epochs=True),
    "weights, each 2nd epoch": Layout(evenly(FILES // 2)),
    "weights, five files": Layout(evenly(5)),
    "EMA 0.99": Layout(weights=False, decay=0.99),
    "EMA 0.999": Layout(weights=False, decay=0.999),
    "EMA 0.9995": Layout(weights=False, decay=0.9995),
    "EMA 0.999, warm-up": Layout(weights=False, decay=0.999, warm_up=True),
    "EMA 0.99, weights": Layout(decay=0.99),
    "EMA 0.999, weights": Layout(decay=0.999),
    "EMA 0.999, weights, warm-up": Layout(decay=0.999, warm_up=True),
    "EMA 0.9 every 10th": Layout(weights=False, decay=0.9, every=10),
    "EMA 0.99 every 10th, weights": Layout(decay=0.99, every=10),
}
for name, times in UNEVEN.items():
    LAYOUTS[f"weights, {name}"] = Layout(times)
for name, times in UNEVEN.items():
    LAYOUTS[f"EMA 0.999, {name}"] = Layout(times, weights=False, decay=0.999)
for name, times in UNEVEN.items():
    LAYOUTS[f"EMA 0.999, weights, {name}"] = Layout(times, decay=0.999)
LAYOUTS |= {
    "weights, fp16": Layout(dtype=torch.float16),
    "weights, bf16": Layout(dtype=torch.bfloat16),
    "weights, 50 files, bf16": Layout(evenly(50), dtype=torch.bfloat16),
    "EMA 0.999, weights, bf16": Layout(decay=0.999, dtype=torch.bfloat16),
    "EMA 0.999, fp16": Layout(weights=False, decay=0.999, dtype=torch.float16),
}


# --- one run


@dataclass(frozen=True)
class Saved:
    """What a layout stores of a path: the values, and the tails that they have, step by step."""

    values: FloatArray  # [stored, SIZE]
    tails: FloatArray  # [stored, STEPS]: the mass after step 0, 1, ..., STEPS - 1


def save(path: FloatArray, layout: Layout, times: Sequence[int], folder: Path) -> Saved:
    """Write the files of a training."""
    steps = np.arange(STEPS)
    average = path[0]
    later = np.zeros(STEPS)  # the average's mass after each step
    values = []
    tails = []
    for step in range(1, STEPS + 1):
        is_later = np.where(steps < step, 1.0, 0.0)
        if layout.decay and step % layout.every == 0:
            kept = layout.kept(step // layout.every)
            average = kept * average + (1 - kept) * path[step]
            later = kept * later + (1 - kept) * is_later
        if step not in times:
            continue
        stored = {}
        if layout.weights:
            stored["model"] = rounded(path[step], layout.dtype)
            tails.append(is_later)
        if layout.decay:
            stored["ema"] = rounded(average, layout.dtype)
            tails.append(later)
        values += [value.double().numpy() for value in stored.values()]
        save_file(folder, layout, step, stored)
    return Saved(np.array(values), np.array(tails))


def rounded(values: FloatArray, dtype: torch.dtype) -> Tensor:
    """Return values as a training in float32 stores them."""
    return torch.from_numpy(values).float().to(dtype)


def save_file(folder: Path, layout: Layout, step: int, stored: Mapping[str, Tensor]) -> None:
    """Write the file of a step."""
    content: dict[str, object] = {}
    name = f"model_{step // EPOCH}.pth"
    if not layout.epochs:
        content["step"] = step
        name = f"step{step}.pt"
    for key, value in stored.items():
        content[key] = {"w": value}
    torch.save(content, folder / name)


def opened(folder: Path, layout: Layout) -> Run:
    """Open the files, told what they do not say themselves."""
    if not layout.decay:
        return Run(folder)
    out = folder.with_name("run")
    import_checkpoints(
        folder,
        out,
        ema_decay=layout.decay,
        ema_warmup="ratio" if layout.warm_up else "none",
        update_every=layout.every,
    )
    return Run(out)


@dataclass(frozen=True)
class Cell:
    """One target of one run, with errors relative to the truth."""

    motion: str
    layout: str
    error: float
    plain: float
    predicted: float


def measure(motion: str, name: str, seed: int) -> list[Cell]:
    """Return the cells of one run, of a motion and a layout."""
    layout = LAYOUTS[name]
    motions = [*MOTIONS]
    layouts = [*LAYOUTS]
    seeds = [seed, motions.index(motion), layouts.index(name)]
    random = np.random.default_rng(seeds)
    start = random.standard_normal(SIZE)
    path = start + MOTIONS[motion](random)
    path = path.astype(np.float32).astype(np.float64)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        folder.mkdir()
        saved = save(path, layout, layout.times(random), folder)
        run = opened(folder, layout)
        made = [run.average(width, dtype="float64") for width in WIDTHS]
    errors = errors_of(path, saved, made)
    return [Cell(motion, name, *of_width) for of_width in errors.T.tolist()]


def errors_of(path: FloatArray, saved: Saved, made: list[Weights]) -> FloatArray:
    """Return errors of averages, of plain ones, and the predicted ones: [3, widths]."""
    passed = np.arange(STEPS + 1) / STEPS
    until = np.array([passed ** (gamma_of(width) + 1) for width in WIDTHS])
    truth = np.diff(until) @ path[1:]
    coefficients = least_squares(saved.tails, 1 - until[:, :-1])
    plain = distances(coefficients @ saved.values, truth)
    ours = np.array([average["w"].numpy() for average in made])
    predicted = [average.predicted_error for average in made]
    return np.array([distances(ours, truth), plain, predicted], dtype=np.float64)


# --- the table

HEAD = ("", "cells", "within 2", "within 3", "beyond 3", "error / plain", "up to 1.05")


def table(cells: Sequence[Cell], attribute: str) -> str:
    """Return a table with a row for each motion, or each layout."""
    groups = grouped(cells, attribute)
    uneven = [cell for cell in cells if cell.layout.endswith(tuple(UNEVEN))]
    if uneven:
        groups["uneven steps"] = uneven
    groups["all"] = [*cells]
    rows = [HEAD]
    for name, group in groups.items():
        predicted = ratios(group, "predicted")
        plain = ratios(group, "plain")
        row = (
            name,
            str(len(group)),
            within(predicted, 2),
            within(predicted, 3),
            str(np.sum(predicted > 3)),
            f"{np.median(plain):.3f}",
            share(plain <= 1.05),
        )
        rows.append(row)
    return markdown(rows)


@quiet()
def main() -> None:
    """Measure all cells, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="layouts whose name contains this text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for layout in LAYOUTS:
        if options.only in layout:
            for motion in MOTIONS:
                cells += measure(motion, layout, options.seed)
    print(table(cells, "motion"))
    print()
    print(table(cells, "layout"))


if __name__ == "__main__":
    main()
