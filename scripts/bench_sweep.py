"""Compare the choices of the search with those of a plain grid, and check the range that the search
states.

    python scripts/bench_sweep.py [--quick]

200 made-up metrics over sigma_rel from 0.02 to 0.28 have five shapes, a depth of 1, and noise of 0
to 1/3. The regret of a choice is its true metric less the best one. A choice is "within noise" if
its regret is at most the noise of one evaluation, or 1 % of the depth. The grid is even in the
length, as published, and takes its lowest value."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from posthoc_cli.sweep import search
from posthoc_cli.sweep.search import Axis, Trial

LOW = 0.02
HIGH = 0.28
AXIS = Axis("sigma_rel", LOW, HIGH)
COUNTS = (8, 12, 20)
PUBLISHED = 31
SHAPES = ("smooth", "flat", "skewed", "two minima", "kink")
NOISES = (0.0, 0.03, 0.1, 1 / 3)
GRID = np.linspace(0, 1, 2001)
SPAN = math.log(HIGH / LOW)


@dataclass(frozen=True)
class Metric:
    """A made-up metric: its true values on GRID, its noise, and its random numbers."""

    truth: npt.NDArray[np.float64]
    noise: float
    random: np.random.Generator = field(repr=False)

    def true(self, x: float) -> float:
        """Return the true value of a length, which is also its regret."""
        place = math.log(x / LOW) / SPAN
        return float(np.interp(place, GRID, self.truth))

    def measure(self, x: float) -> float:
        """Return one noisy evaluation."""
        return self.true(x) + self.noise * self.random.normal()

    @property
    def best(self) -> float:
        """The true best length."""
        return float(LOW * (HIGH / LOW) ** GRID[self.truth.argmin()])


def made_up(shape: str, noise: float, number: int) -> Metric:
    """Make one of the 200 metrics."""
    seed = [SHAPES.index(shape), round(100 * noise), number]
    random = np.random.default_rng(seed)
    off = GRID - random.uniform(0.08, 0.92)
    if shape == "smooth":
        truth = off**2 * (1 + random.uniform(-0.5, 0.5) * off)
    elif shape == "flat":
        truth = off**4
    elif shape == "skewed":
        steep = random.choice([-1, 1]) * random.uniform(3, 7)
        truth = np.exp(steep * off) - steep * off
    elif shape == "two minima":
        first = random.uniform(0.1, 0.35)
        second = random.uniform(0.6, 0.9)
        width = random.uniform(0.1, 0.2)
        depth = random.uniform(0.9, 1.1)
        truth = -dip(first, width) - depth * dip(second, width)
    else:
        left = -off * random.uniform(0.5, 2)
        right = off * random.uniform(0.5, 2)
        truth = np.where(off < 0, left, right)
    return Metric((truth - truth.min()) / np.ptp(truth), noise, random)


def dip(centre: float, width: float) -> npt.NDArray[np.float64]:
    """Return a bell."""
    return np.exp(-(((GRID - centre) / width) ** 2))


def searched(metric: Metric) -> dict[int, search.Estimate]:
    """Return the result of the search after so many evaluations."""
    trials = list[Trial]()
    found = dict[int, search.Estimate]()
    batch = search.first_batch(AXIS)
    while True:
        for x in batch:
            before = sum(trial.x == x for trial in trials)
            trials.append(Trial("", x, before, metric.measure(x)))
            if len(trials) in COUNTS:
                found[len(trials)] = search.Estimate(trials, AXIS)
            if len(trials) == max(COUNTS):
                return found
        batch = search.Estimate(trials, AXIS).proposed(repeat=True)


def grid(metric: Metric, count: int) -> float:
    """Return the lowest of a plain grid."""
    places = np.linspace(LOW, HIGH, count)
    return float(min(places.tolist(), key=metric.measure))


def cell(metrics: Sequence[Metric], choices: Sequence[float]) -> str:
    """Return the mean regret, and the share of choices within noise."""
    regrets = [metric.true(x) for metric, x in zip(metrics, choices, strict=True)]
    noises = [max(metric.noise, 0.01) for metric in metrics]
    within = np.mean(np.array(regrets) <= noises)
    return f"{np.mean(regrets):7.4f} {100 * within:4.0f} %"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few metrics: does everything run?")
    quick = parser.parse_args(arguments).quick
    kinds = itertools.product(SHAPES, NOISES, range(10))
    if quick:
        kinds = itertools.product(SHAPES, NOISES[-1:], range(1))
    metrics = [made_up(*kind) for kind in kinds]
    columns = "mean regret, share within noise, coverage of the range, its width"
    print(f"{len(metrics)} made-up metrics: {columns}")
    print(f"{'evaluations':>11}  {'search':>14}  {'grid':>14}  coverage  width")
    runs = [searched(metric) for metric in metrics]
    for count in COUNTS:
        print_row(metrics, [estimates[count] for estimates in runs], count)
    even = [grid(metric, PUBLISHED) for metric in metrics]
    print(f"{PUBLISHED:>11}  {'':>14}  {cell(metrics, even):>14}")


def print_row(metrics: Sequence[Metric], found: Sequence[search.Estimate], count: int) -> None:
    """Print a row of the table: the searches after so many evaluations, and a grid of as many."""
    choices = [one.best for one in found]
    even = [grid(metric, count) for metric in metrics]
    held = []
    for one, metric in zip(found, metrics, strict=True):
        held.append(one.low <= metric.best <= one.high)
    width = np.mean([math.log(one.high / one.low) for one in found]) / SPAN
    cells = f"{cell(metrics, choices):>14}  {cell(metrics, even):>14}"
    print(f"{count:>11}  {cells}  {100 * np.mean(held):6.0f} %  {width:5.2f}")


if __name__ == "__main__":
    main()
