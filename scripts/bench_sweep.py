"""Compare the choices of the search with those of a plain grid, and check the range that the search
states.

    python scripts/bench_sweep.py

200 made-up metrics over sigma_rel from 0.02 to 0.28 have five shapes, a depth of 1, and noise of 0
to 1/3. The regret of a choice is its true metric less the best one. A choice is "within noise" if
its regret is at most the noise of one evaluation, or 1 % of the depth. Search and grid have 12
evaluations; the grid is even in the length, as published, and takes its lowest value."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, default_rng
from tables import FloatArray, markdown, share

from posthoc_cli.sweep.search import Axis, Estimate, Trial, first_batch

LOW = 0.02
HIGH = 0.28
AXIS = Axis("sigma_rel", LOW, HIGH)
COUNT = 12
NOISES = (0.0, 0.03, 0.1, 1 / 3)
SPAN = math.log(HIGH / LOW)
GRID = np.linspace(0, 1, 2001)
"""Places in the range, even in the logarithm of the length."""


@dataclass(frozen=True)
class Metric:
    """A made-up metric: its true values on GRID, its noise, and its random numbers."""

    truth: FloatArray
    noise: float
    random: Generator

    def true(self, x: float) -> float:
        """Return the true value of a length, which is also its regret."""
        place = math.log(x / LOW) / SPAN
        return float(np.interp(place, GRID, self.truth))

    def measure(self, x: float) -> float:
        """Return one noisy evaluation."""
        return self.true(x) + self.noise * self.random.normal()

    def is_within_noise(self, x: float) -> bool:
        """Return whether a choice is as good as one evaluation can tell."""
        return self.true(x) <= max(self.noise, 0.01)

    @property
    def best(self) -> float:
        """The true best length."""
        place = GRID[self.truth.argmin()]
        return LOW * math.exp(SPAN * place)


# --- the shapes, by the distance from a random place


def smooth(off: FloatArray, random: Generator) -> FloatArray:
    """A parabola whose sides differ."""
    slope = random.uniform(-0.5, 0.5)
    return off**2 * (1 + slope * off)


def flat(off: FloatArray, _: Generator) -> FloatArray:
    """A wide bottom."""
    return off**4


def skewed(off: FloatArray, random: Generator) -> FloatArray:
    """One side much steeper than the other."""
    side = random.choice([-1, 1])
    steep = side * random.uniform(3, 7)
    return np.exp(steep * off) - steep * off


def two_minima(_: FloatArray, random: Generator) -> FloatArray:
    """Two dips, of which either is the deeper one."""
    first = random.uniform(0.1, 0.35)
    second = random.uniform(0.6, 0.9)
    width = random.uniform(0.1, 0.2)
    depth = random.uniform(0.9, 1.1)
    shallow = dip(first, width)
    deep = depth * dip(second, width)
    return -shallow - deep


def kink(off: FloatArray, random: Generator) -> FloatArray:
    """Two straight sides."""
    left = -off * random.uniform(0.5, 2)
    right = off * random.uniform(0.5, 2)
    return np.where(off < 0, left, right)


def dip(centre: float, width: float) -> FloatArray:
    """Return a bell."""
    off = (GRID - centre) / width
    return np.exp(-(off**2))


Shape = Callable[[FloatArray, Generator], FloatArray]
SHAPES: tuple[Shape, ...] = (smooth, flat, skewed, two_minima, kink)


# --- the comparison


def made_up(shape: Shape, noise: float, number: int) -> Metric:
    """Make one of the 200 metrics."""
    seed = [SHAPES.index(shape), round(100 * noise), number]
    random = default_rng(seed)
    off = GRID - random.uniform(0.08, 0.92)
    truth = shape(off, random)
    truth -= truth.min()
    return Metric(truth / truth.max(), noise, random)


def searched(metric: Metric) -> Estimate:
    """Return the result of the search."""
    trials = list[Trial]()
    batch = first_batch(AXIS)
    while len(trials) < COUNT:
        for x in batch:
            before = sum(trial.x == x for trial in trials)
            value = metric.measure(x)
            trials.append(Trial("", x, before, value))
        batch = Estimate(trials, AXIS).proposed(repeat=True)
    return Estimate(trials[:COUNT], AXIS)


def grid(metric: Metric) -> float:
    """Return the lowest of a plain grid."""
    lengths = np.linspace(LOW, HIGH, COUNT).tolist()
    return float(min(lengths, key=metric.measure))


def main() -> None:
    """Print the table."""
    searches = []
    ranges = []
    grids = []
    for shape, noise, number in itertools.product(SHAPES, NOISES, range(10)):
        metric = made_up(shape, noise, number)
        found = searched(metric)
        searches.append(metric.is_within_noise(found.best))
        ranges.append(found.low <= metric.best <= found.high)
        grids.append(metric.is_within_noise(grid(metric)))
    rows = (
        (f"of {len(grids)} made-up metrics", "within noise", "best in the stated range"),
        ("search", share(searches), share(ranges)),
        ("grid", share(grids), ""),
    )
    print(markdown(rows))


if __name__ == "__main__":
    main()
