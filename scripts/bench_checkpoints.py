"""Measure averages made from checkpoints of other programs, and whether the predicted error holds.

    OMP_NUM_THREADS=1 python scripts/bench_checkpoints.py [--only TEXT]

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
from pathlib import Path

import numpy as np
import torch
from corner_cases import remember
from following import distances, least_squares, quiet, shares
from numpy.random import Generator
from tables import FloatArray, markdown, ratios, share, within
from tasks import half_wave
from torch import Tensor

from posthoc_cli import Run, import_checkpoints
from posthoc_cli.targets import as_target

STEPS = 2000
SIZE = 400
FILES = 20
EPOCH = STEPS // FILES
WIDTHS = (0.02, 0.06, 0.12, 0.25)
TARGETS = [as_target(width) for width in WIDTHS]
FALLING = np.array([[half_wave(step / STEPS)] for step in range(STEPS + 1)])
"""From 1 to 0, for every step: [STEPS + 1, 1]."""

# --- motion: the weights after each step, [STEPS + 1, SIZE], those before the first step included

Motion = Callable[[Generator], FloatArray]


def normal(random: Generator) -> FloatArray:
    """Independent numbers for every step and weight."""
    return random.standard_normal((STEPS + 1, SIZE))


def walk(random: Generator) -> FloatArray:
    """Independent steps of one size."""
    return np.cumsum(0.005 * normal(random), axis=0)


def decaying(random: Generator) -> FloatArray:
    """A walk whose steps are as large as a learning rate that falls to 0 by a cosine."""
    return np.cumsum(0.005 * FALLING * normal(random), axis=0)


def drift(random: Generator) -> FloatArray:
    """A straight path with noise that forgets in ten steps."""
    place = np.linspace(0, 1, STEPS + 1)[:, None]
    moved = 0.3 * place * random.standard_normal(SIZE)
    return moved + 0.03 * restored(random, 10)


def restored(random: Generator, memory: float) -> FloatArray:
    """Noise of unit variance about a minimum, which forgets in so many steps."""
    values = normal(random)
    remember(values, memory)
    return values


def cosine(random: Generator) -> FloatArray:
    """A smooth path: every weight goes from one value to another by half a cosine."""
    return (1 - FALLING) * random.standard_normal(SIZE) * 0.3


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


def evenly(count: int) -> Times:
    """Return evenly spaced steps."""
    every = STEPS // count
    return lambda _: [*range(every, STEPS + 1, every)]


EVEN = evenly(FILES)


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


def save(
    path: FloatArray,
    layout: Layout,
    times: Sequence[int],
    folder: Path,
) -> tuple[FloatArray, FloatArray]:
    """Write the files of a training; return the stored values, [stored, SIZE], and the mass that
    each has after step 0, 1, ...: [stored, STEPS]."""
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
    return np.array(values), np.array(tails)


def rounded(values: FloatArray, dtype: torch.dtype) -> Tensor:
    """Return values as a training in float32 stores them."""
    return torch.from_numpy(values).float().to(dtype)


def save_file(
    folder: Path,
    layout: Layout,
    step: int,
    stored: Mapping[str, Tensor],
) -> None:
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


def measure(motion: str, name: str) -> FloatArray:
    """Return errors of averages of one run, of plain ones, and the predicted ones: [3, widths]."""
    layout = LAYOUTS[name]
    motions = [*MOTIONS]
    layouts = [*LAYOUTS]
    random = np.random.default_rng([0, motions.index(motion), layouts.index(name)])
    start = random.standard_normal(SIZE)
    path = start + MOTIONS[motion](random)
    path = path.astype(np.float32).astype(np.float64)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        folder.mkdir()
        values, tails = save(path, layout, layout.times(random), folder)
        run = opened(folder, layout)
        averages = [run.average(width, dtype="float64") for width in WIDTHS]
    wanted = shares(TARGETS, STEPS)
    truth = wanted @ path[1:]
    ours = np.array([average["w"].numpy() for average in averages])
    plain = least_squares(tails, wanted) @ values
    predicted = [average.predicted_error for average in averages]
    errors = [distances(ours, truth), distances(plain, truth), predicted]
    return np.array(errors, dtype=np.float64)


# --- the table

HEAD = ("", "cells", "within 2", "within 3", "beyond 3", "error / plain", "up to 1.05")


def table(results: Mapping[str, FloatArray]) -> str:
    """Return a table with a row for each layout."""
    groups = dict(results)
    uneven = [errors for layout, errors in results.items() if layout.endswith(tuple(UNEVEN))]
    if uneven:
        groups["uneven steps"] = np.hstack(uneven)
    groups["all"] = np.hstack([*results.values()])
    rows = [HEAD]
    for name, (errors, plain, predicted) in groups.items():
        actual = ratios(errors, predicted)
        relative = ratios(errors, plain)
        row = (
            name,
            str(len(errors)),
            within(actual, 2),
            within(actual, 3),
            str(np.sum(actual > 3)),
            f"{np.median(relative):.3f}",
            share(relative <= 1.05),
        )
        rows.append(row)
    return markdown(rows)


@quiet()
def main() -> None:
    """Measure all cells, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="layouts whose name contains this text")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    results = {}
    for layout in LAYOUTS:
        if only in layout:
            results[layout] = np.hstack([measure(motion, layout) for motion in MOTIONS])
    print(table(results))


if __name__ == "__main__":
    main()
