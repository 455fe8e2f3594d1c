"""Compare the choices of the search with those of a plain grid, and check the lengths that it calls
tied, and the gains over an own EMA that it claims.

    python scripts/bench_sweep.py

200 made-up metrics over sigma_rel from 0.02 to 0.28 have five shapes, a depth of 1, and noise of 0
to 1/3. The regret of a choice is its true metric less the best one. A choice is "within noise" if
its regret is at most the noise of one evaluation, or 1 % of the depth. The grid has 15 evaluations,
as many as the search on average; it is even in the length, as published, and takes its lowest
value.

The gains are of searches of the same metrics beside an EMA, which in each second one has no more to
gain: its true metric is the best one; else it is that of a random length. Their noise is of three
kinds: of each evaluation; of examples that each evaluation draws anew; and of the same examples in
all, of which the lengths get nearly the same ones right. The last two are accuracies, and state
their error. A gain is claimed if "better" is said, which an interval must not hold.

The last table is of trainings that go on for too long: the metric follows from the mean time of an
average alone, which is best at 8 to 45 % of the training, so that the longest length is best at its
end, and a shorter training is better still. Half of them have an EMA with nothing to gain."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.random import Generator, default_rng
from scipy.special import ndtri
from tables import FloatArray, markdown, share

from posthoc_cli import PowerFunction
from posthoc_cli.sweep import SweepReport
from posthoc_cli.sweep.report import describe_gain
from posthoc_cli.sweep.search import Lengths, Search
from posthoc_cli.sweep.trial import Spot, Trial

LOW = 0.02
HIGH = 0.28
LENGTHS = Lengths(LOW, HIGH)
COUNT = 15
LAST = 10_000.0  # the time at which averages end
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


Measure = Callable[[Spot], "Value"]
"""Measures an average, and states an error, or none."""


def search_all(search: Search, measure: Measure) -> Search:
    """Measure what a search asks for until it has ended."""
    while batch := search.next_measurements():
        trials = [
            Trial(spot.title, spot.sigma_rel, seed, *measure(spot), t=spot.t)
            for spot, seed in batch
        ]
        search = replace(search, trials=(*search.trials, *trials))
    return search


def searched(metric: Metric) -> Search:
    """Search lengths alone."""
    return search_all(
        Search(LENGTHS, True, LAST), lambda spot: (metric.measure(spot.sigma_rel), None)
    )


def grid(metric: Metric) -> float:
    """Return the lowest of a plain grid."""
    lengths = np.linspace(LOW, HIGH, COUNT).tolist()
    return float(min(lengths, key=metric.measure))


# --- gains over an EMA

GAINS_EACH = 80  # searches of each shape and kind of noise
EXAMPLES = 1000
EMA = "your EMA"
Value = tuple[float, float | None]
Evaluate = Callable[[float], Value]
"""Measures the true metric at a place in GRID, and states an error, or none."""


def noisy(metric: Metric) -> Evaluate:
    """Add noise to each evaluation."""

    def evaluate(place: float) -> tuple[float, None]:
        return true_at(metric, place) + metric.noise * metric.random.normal(), None

    return evaluate


def drawn_anew(metric: Metric) -> Evaluate:
    """Draw examples for each evaluation."""

    def evaluate(place: float) -> tuple[float, float]:
        error = error_rate(metric, place)
        return rate(metric.random.binomial(EXAMPLES, error) / EXAMPLES)

    return evaluate


def the_same(metric: Metric) -> Evaluate:
    """Draw examples once. Each has a difficulty, of which a tenth of the variance changes with the
    length."""
    fixed, first, second = metric.random.normal(size=(3, EXAMPLES))
    turn = metric.random.uniform(1, 3, EXAMPLES)

    def evaluate(place: float) -> tuple[float, float]:
        changing = first * np.cos(turn * place) + second * np.sin(turn * place)
        difficulty = math.sqrt(0.9) * fixed + math.sqrt(0.1) * changing
        return rate(float((difficulty < ndtri(error_rate(metric, place))).mean()))

    return evaluate


def true_at(metric: Metric, place: float) -> float:
    """Return the true metric at a place."""
    return float(np.interp(place, GRID, metric.truth))


def error_rate(metric: Metric, place: float) -> float:
    """Return the true rate of errors: from 20 to 50 %."""
    return 0.2 + 0.3 * true_at(metric, place)


def rate(errors: float) -> tuple[float, float]:
    """Return a measured rate of errors with its standard error."""
    return errors, math.sqrt(errors * (1 - errors) / EXAMPLES)


def search_beside_ema(search: Search, measure: Measure, own: Callable[[], Value]) -> SweepReport:
    """Search as `ema sweep` does, beside an own EMA."""
    trials = [Trial(EMA, None, 0, *own())]
    search = search_all(replace(search, trials=tuple(trials)), measure)
    if search.estimate.noise > 0:
        trial = Trial(EMA, None, 1, *own())
        search = replace(search, trials=(*search.trials, trial))
    return SweepReport(search, (EMA,), "metric", {})


def gains_row(title: str, make: Callable[[Metric], Evaluate], scale: float) -> tuple[str, ...]:
    """Compare the gains that searches claim with the true ones."""
    wrong = []
    claimed = []
    covered = []
    for shape, number in itertools.product(SHAPES, range(GAINS_EACH)):
        metric = made_up(shape, NOISES[1 + number % 3], 1000 + number)
        own = float(GRID[metric.truth.argmin()] if number % 2 else metric.random.uniform())
        evaluate = make(metric)
        report = search_beside_ema(
            Search(LENGTHS, True, LAST),
            lambda spot, evaluate=evaluate: evaluate(math.log(spot.sigma_rel / LOW) / SPAN),
            partial(evaluate, own),
        )
        (found,) = report.gains
        gain = scale * (true_at(metric, own) - metric.true(report.best))
        unit = abs(found.value or math.nan)
        margin = unit * (found.margin or 0.0)
        is_claimed = " better than" in describe_gain(report)
        covered.append(abs(unit * (found.gain or 0.0) - gain) <= margin)
        if gain <= 0:
            wrong.append(is_claimed)
        elif gain > margin:
            claimed.append(is_claimed)
    return (title, str(len(covered)), share(wrong), share(claimed), share(covered))


# --- trainings that go on for too long

TIMES = range(500, 10_001, 250)
WHOLE = Search(Lengths(LOW, 0.2886), True, LAST, tuple(map(float, TIMES)))
OVERFITTING = 60  # of each noise
ALONE = 800  # searches of noise alone


def mean_time(x: float, t: float) -> float:
    """Return the mean time of an average."""
    gamma = PowerFunction.from_sigma_rel(x, t).gamma
    return t * (gamma + 1) / (gamma + 2)


def overfitting_row(noise: float) -> tuple[str, ...]:
    """Compare the length at the end with the search of ends, of metrics of a noise."""
    alone = []
    regrets = []
    counts = []
    wrong = []
    covered = []
    for number in range(OVERFITTING):
        random = default_rng([2, round(1000 * noise), number])
        best = math.log(LAST * random.uniform(0.08, 0.45))
        own = 0.0 if number % 2 else 1.0

        def true(spot: Spot, best: float = best) -> float:
            return (math.log(mean_time(spot.sigma_rel, spot.t or LAST)) - best) ** 2

        def measured(value: float, random: Generator = random) -> Value:
            return value + noise * random.normal(), None

        report = search_beside_ema(
            WHOLE,
            lambda spot, true=true, measured=measured: measured(true(spot)),
            partial(measured, own),
        )
        regret = true(report.search.best)
        alone.append(true(report.search.at_end))
        regrets.append(regret)
        counts.append(len(report.trials))
        (found,) = report.gains
        unit = abs(found.value or math.nan)
        margin = unit * (found.margin or 0.0)
        if number % 2:
            wrong.append(" better than" in describe_gain(report))
        if noise:
            covered.append(abs(unit * (found.gain or 0.0) - (own - regret)) <= margin)
    return (
        f"{noise:g}",
        f"{np.mean(alone):.3f}",
        f"{np.mean(regrets):.3f}",
        f"{np.mean(counts):.1f}",
        share(wrong) if noise else "",
        share(covered) if noise else "",
    )


def noise_alone(number: int) -> bool:
    """Search a metric that is noise alone; return whether a gain is claimed."""
    random = default_rng([3, number])

    def measure(_: object = None) -> Value:
        return 100 + random.normal(), None

    report = search_beside_ema(WHOLE, measure, measure)
    return " better than" in describe_gain(report)


def main() -> None:
    """Print the tables."""
    searches = []
    regrets = []
    counts = []
    ties = []
    grids = []
    grid_regrets = []
    for shape, noise, number in itertools.product(SHAPES, NOISES, range(10)):
        metric = made_up(shape, noise, number)
        search = searched(metric)
        found = search.estimate
        searches.append(metric.is_within_noise(found.best))
        regrets.append(metric.true(found.best))
        counts.append(len(search.trials))
        if found.tied is not None:
            low, high = found.tied
            near = found.points[abs(np.log(found.points / metric.best)).argmin()]
            ties.append(low <= near <= high)
        chosen = grid(metric)
        grids.append(metric.is_within_noise(chosen))
        grid_regrets.append(metric.true(chosen))
    title = f"of {len(grids)} made-up metrics"
    rows = (
        (title, "evaluations", "within noise", "mean regret", "best among the tied"),
        (
            "search",
            f"{np.mean(counts):.1f}",
            share(searches),
            f"{np.mean(regrets):.3f}",
            share(ties),
        ),
        ("grid", str(COUNT), share(grids), f"{np.mean(grid_regrets):.3f}", ""),
    )
    print(markdown(rows))
    print()
    heads = ("noise", "searches", "claimed of none", "claimed of larger ones", "true gain inside")
    gains = (
        heads,
        gains_row("of each evaluation", noisy, 1.0),
        gains_row("1,000 examples drawn anew, error stated", drawn_anew, 0.3),
        gains_row("the same 1,000 examples, error stated", the_same, 0.3),
    )
    print(markdown(gains))
    print()
    heads = (
        f"noise, {OVERFITTING} trainings each",
        "regret of the length at the end",
        "with ends",
        "evaluations",
        "claimed of none",
        "true gain inside",
    )
    print(markdown((heads, *map(overfitting_row, (0.0, 0.03, 0.1, 0.3)))))
    print()
    claims = share([noise_alone(number) for number in range(ALONE)])
    print(f"Of {ALONE} searches of noise alone {claims} claim a gain.")


if __name__ == "__main__":
    main()
