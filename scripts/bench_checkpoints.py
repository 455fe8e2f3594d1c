"""Measure averages made from checkpoints of other programs, and whether the predicted error holds.

    OMP_NUM_THREADS=1 python scripts/bench_checkpoints.py [--only TEXT] [--seed 0] [--each]

Each kind of motion is saved in each layout, as a training would, and opened by the public
interface. The truth is the sum over every step in float64. *Plain* are the coefficients of sum 1
whose tail is nearest to the target's, step by step, computed here. A cell is one target of one run.

- **within 2, 3**: the larger of actual / predicted and predicted / actual is below it.
- **beyond 3**: the actual error is more than 3 times the predicted one.
- **error / plain**: the median, the 95th percentile, and the share of cells up to 1.05.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from compare_peers import markdown

from posthoc_cli import Run, gamma_from_sigma_rel, import_checkpoints

FloatArray = npt.NDArray[np.float64]

STEPS = 2000
SIZE = 400
FILES = 20
EPOCH = STEPS // FILES
WIDTHS = (0.02, 0.06, 0.12, 0.25)
LEAST = 2.0**-23
"""The least error: eps of float32, to which weights, averages and results are rounded."""

# --- motion: the weights after each step, [STEPS + 1, SIZE], those before the first step included

Motion = Callable[[np.random.Generator], FloatArray]


def walk(random: np.random.Generator) -> FloatArray:
    """Independent steps of one size."""
    moves = random.standard_normal((STEPS + 1, SIZE))
    return np.cumsum(0.005 * moves, axis=0)


def decaying(random: np.random.Generator) -> FloatArray:
    """A walk whose steps are as large as a learning rate that falls to 0 by a cosine."""
    rate = (1 + half_wave()) / 2
    moves = random.standard_normal((STEPS + 1, SIZE))
    return np.cumsum(0.005 * rate[:, None] * moves, axis=0)


def drift(random: np.random.Generator) -> FloatArray:
    """A straight path with noise that forgets in ten steps."""
    place = np.linspace(0, 1, STEPS + 1)[:, None]
    moved = 0.3 * place * random.standard_normal(SIZE)
    return moved + 0.03 * restored(random, 10)


def minimum(memory: float) -> Motion:
    """Return the motion about a minimum, whose restoring force takes so many steps."""
    return lambda random: 0.2 * restored(random, memory)


def restored(random: np.random.Generator, memory: float) -> FloatArray:
    """Noise of unit variance about a minimum, which forgets in so many steps."""
    kept = np.exp(-1 / memory)
    values = random.standard_normal((STEPS + 1, SIZE))
    values[1:] *= np.sqrt(1 - kept**2)
    for step in range(1, STEPS + 1):
        values[step] += kept * values[step - 1]
    return values


def cosine(random: np.random.Generator) -> FloatArray:
    """A smooth path: every weight goes from one value to another by half a cosine."""
    place = (1 - half_wave()) / 2
    return place[:, None] * random.standard_normal(SIZE) * 0.3


def half_wave() -> FloatArray:
    """A cosine that falls from 1 to -1."""
    return np.cos(np.pi * np.arange(STEPS + 1) / STEPS)


def kinks(random: np.random.Generator) -> FloatArray:
    """Straight pieces, each in a direction of its own."""
    ends = np.sort(random.choice(np.arange(1, STEPS), 6, replace=False))
    slopes = random.standard_normal((7, SIZE)) * 0.3 / STEPS**0.5 / 20
    piece = np.searchsorted(ends, np.arange(STEPS + 1))
    return np.cumsum(slopes[piece], axis=0)


MOTIONS: dict[str, Motion] = {
    "walk": walk,
    "decaying rate": decaying,
    "drift, noise of 10 steps": drift,
    "minimum, 30 steps": minimum(30),
    "minimum, 300 steps": minimum(300),
    "cosine": cosine,
    "kinks": kinks,
}

# --- layouts

Times = Callable[[np.random.Generator], list[int]]


def each_epoch(count: int = FILES) -> Times:
    """Return evenly spaced steps."""
    steps = [STEPS * (index + 1) // count for index in range(count)]
    return lambda _: steps


def at_random(random: np.random.Generator) -> list[int]:
    """Any steps, and the last one."""
    chosen = random.choice(np.arange(40, STEPS), FILES - 1, replace=False)
    return [*sorted(chosen.tolist()), STEPS]


def by_the_clock(random: np.random.Generator) -> list[int]:
    """Gaps that vary by a third, as of saves every so many minutes."""
    gaps = random.uniform(2 / 3, 4 / 3, FILES)
    passed = np.cumsum(gaps) / gaps.sum()
    steps = np.ceil(passed * STEPS - 1e-9)
    return [int(step) for step in steps]


def kept_best(random: np.random.Generator) -> list[int]:
    """Records of a metric: rarer and rarer."""
    places = random.uniform(0, 1, 3 * FILES)
    chosen = 50 * (STEPS / 50) ** places
    steps = sorted({int(step) for step in chosen if step < STEPS})
    picked = random.choice(len(steps), FILES - 1, replace=False)
    records = [steps[index] for index in sorted(picked)]
    return [*records, STEPS]


@dataclass(frozen=True)
class Layout:
    """What a training saves, and when."""

    times: Times
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


HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
UNEVEN: dict[str, Times] = {
    "at random": at_random, "by the clock": by_the_clock, "kept best": kept_best
}  # fmt: skip
LAYOUTS: dict[str, Layout] = {
    "weights, each epoch": Layout(each_epoch()),
    "weights, each epoch, numbered": Layout(each_epoch(), epochs=True),
    "weights, each 2nd epoch": Layout(each_epoch(FILES // 2)),
    "weights, five files": Layout(each_epoch(5)),
    "EMA 0.99": Layout(each_epoch(), weights=False, decay=0.99),
    "EMA 0.999": Layout(each_epoch(), weights=False, decay=0.999),
    "EMA 0.9995": Layout(each_epoch(), weights=False, decay=0.9995),
    "EMA 0.999, warm-up": Layout(each_epoch(), weights=False, decay=0.999, warm_up=True),
    "EMA 0.99, weights": Layout(each_epoch(), decay=0.99),
    "EMA 0.999, weights": Layout(each_epoch(), decay=0.999),
    "EMA 0.999, weights, warm-up": Layout(each_epoch(), decay=0.999, warm_up=True),
    "EMA 0.9 every 10th": Layout(each_epoch(), weights=False, decay=0.9, every=10),
    "EMA 0.99 every 10th, weights": Layout(each_epoch(), decay=0.99, every=10),
}
for name, times in UNEVEN.items():
    LAYOUTS[f"weights, {name}"] = Layout(times)
for name, times in UNEVEN.items():
    LAYOUTS[f"EMA 0.999, {name}"] = Layout(times, weights=False, decay=0.999)
for name, times in UNEVEN.items():
    LAYOUTS[f"EMA 0.999, weights, {name}"] = Layout(times, decay=0.999)
for name, dtype in HALF.items():
    LAYOUTS[f"weights, {name}"] = Layout(each_epoch(), dtype=dtype)
LAYOUTS |= {
    "weights, 50 files, bf16": Layout(each_epoch(50), dtype=torch.bfloat16),
    "EMA 0.999, weights, bf16": Layout(each_epoch(), decay=0.999, dtype=torch.bfloat16),
    "EMA 0.999, fp16": Layout(each_epoch(), weights=False, decay=0.999, dtype=torch.float16),
}


# --- one run


@dataclass(frozen=True)
class Saved:
    """What a layout stores of a path: the values, and the tails that they have, step by step."""

    values: FloatArray  # [stored, SIZE]
    tails: FloatArray  # [STEPS, stored]: the mass after step 0, 1, ..., STEPS - 1


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
    return Saved(np.array(values), np.stack(tails, axis=1))


def rounded(values: FloatArray, dtype: torch.dtype) -> torch.Tensor:
    """Return values as a training in float32 stores them."""
    return torch.from_numpy(values).float().to(dtype)


def save_file(
    folder: Path,
    layout: Layout,
    step: int,
    stored: Mapping[str, torch.Tensor],
) -> None:
    """Write the file of a step."""
    content: dict[str, object] = {key: {"w": value} for key, value in stored.items()}
    name = f"model_{step // EPOCH}.pth"
    if not layout.epochs:
        content = {"step": step, **content}
        name = f"step{step}.pt"
    torch.save(content, folder / name)


def opened(folder: Path, layout: Layout) -> Run:
    """Open the files, told what they do not say themselves."""
    if not layout.decay:
        return Run(folder)
    out = folder.with_name("run")
    warm_up = "ratio" if layout.warm_up else "none"
    import_checkpoints(
        folder,
        out,
        ema_decay=layout.decay,
        ema_warmup=warm_up,
        update_every=layout.every,
    )
    return Run(out)


def plain(saved: Saved, wanted: FloatArray) -> FloatArray:
    """Return the coefficients with sum 1 that are nearest to a target by the tails."""
    last = saved.tails[:, -1]
    others = saved.tails[:, :-1] - last[:, None]
    found, *_ = np.linalg.lstsq(others, wanted - last, rcond=1e-12)
    return np.append(found, 1 - found.sum())


@dataclass(frozen=True)
class Cell:
    """One target of one run, with errors relative to the truth."""

    motion: str
    layout: str
    width: float
    error: float
    predicted: float
    plain: float

    def __str__(self) -> str:
        return (
            f"{self.layout}; {self.motion}; {self.width}: {self.error:.1e} predicted "
            f"{self.predicted:.1e} plain {self.plain:.1e} ratio {self.ratio:.1f}"
        )

    @property
    def ratio(self) -> float:
        return max(self.error, LEAST) / max(self.predicted, LEAST)


def measure(motion: str, name: str, seed: int) -> Iterator[Cell]:
    """Return the cells of one run, of a motion and a layout."""
    layout = LAYOUTS[name]
    random = np.random.default_rng([seed, [*MOTIONS].index(motion), [*LAYOUTS].index(name)])
    path = random.standard_normal(SIZE) + MOTIONS[motion](random)
    path = path.astype(np.float32).astype(np.float64)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "files"
        folder.mkdir()
        saved = save(path, layout, layout.times(random), folder)
        run = opened(folder, layout)
        for width in WIDTHS:
            passed = np.arange(STEPS + 1) / STEPS
            until = passed ** (gamma_from_sigma_rel(width) + 1)
            truth = np.diff(until) @ path[1:]
            made = run.average(width, dtype="float64")
            nearest = plain(saved, 1 - until[:-1]) @ saved.values
            yield Cell(
                motion=motion,
                layout=name,
                width=width,
                error=relative_distance(made["w"].numpy(), truth),
                predicted=made.predicted_error or np.nan,
                plain=relative_distance(nearest, truth),
            )


def relative_distance(vector: FloatArray, truth: FloatArray) -> float:
    """Return the distance from the truth, relative to its norm."""
    distance = np.linalg.norm(vector - truth)
    return float(distance / np.linalg.norm(truth))


# --- the table


def row(name: str, cells: Sequence[Cell]) -> tuple[str, ...]:
    """Return the row of some cells."""
    ratios = np.array([cell.ratio for cell in cells])
    larger = np.maximum(ratios, 1 / ratios)
    errors = np.array([cell.error for cell in cells])
    nearest = np.array([cell.plain for cell in cells])
    against = np.maximum(errors, LEAST) / np.maximum(nearest, LEAST)
    return (
        name,
        str(len(cells)),
        f"{np.mean(larger <= 2):.1%}",
        f"{np.mean(larger <= 3):.1%}",
        str(int(np.sum(ratios > 3))),
        f"{ratios.max():.1f}",
        f"{np.median(against):.3f}",
        f"{np.quantile(against, 0.95):.3f}",
        f"{np.mean(against <= 1.05):.1%}",
    )


HEAD = ("", "cells", "within 2", "within 3", "beyond 3", "most",
        "error / plain", "95 %", "up to 1.05")  # fmt: skip


def table(cells: Sequence[Cell], names: Sequence[str], of: Callable[[Cell], str]) -> str:
    """Return a table with a row for each name that cells have."""
    rows = [HEAD]
    for name in names:
        own = [cell for cell in cells if of(cell) == name]
        if own:
            rows.append(row(name, own))
    rows.append(row("all", cells))
    return markdown(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all cells, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="layouts whose name contains this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", action="store_true", help="print every cell, too")
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    started = time.perf_counter()
    cells: list[Cell] = []
    for layout in LAYOUTS:
        if options.only in layout:
            for motion in MOTIONS:
                cells += measure(motion, layout, options.seed)
    if options.each:
        for cell in cells:
            print(cell)
    print(table(cells, [*MOTIONS], lambda cell: cell.motion), end="\n\n")
    print(table(cells, [*LAYOUTS], lambda cell: cell.layout), end="\n\n")
    uneven = [cell for cell in cells if cell.layout.endswith(tuple(UNEVEN))]
    if uneven:
        print(markdown([HEAD, row("uneven steps", uneven)]), end="\n\n")
    print(f"{len(cells)} cells, {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
