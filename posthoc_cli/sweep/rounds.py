"""What is searched, and the rounds of measurements until the best is known."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from posthoc_cli.errors import InvalidValueError, PostHocError
from posthoc_cli.profiles import SHAPES
from posthoc_cli.run import Run
from posthoc_cli.sweep import search
from posthoc_cli.sweep.results import Record
from posthoc_cli.targets import Beta, Decay, SigmaRel, Target, Window

GOOD_ERROR = 0.01
"""Predicted error of the lengths that are searched unless others are named."""
TIME = "t"
"""The axis of the time of an average."""


@dataclass(frozen=True)
class Axis:
    """What is searched: a kind of target with one parameter.

    Attributes:
        kind: "sigma_rel", "beta" or "window"; "decay 1-sqrt over", "decay linear over" or "decay cosine over", whose
            values are parts of training; or "t", the time of the average.
        low, high: ends of the range.
        values: measure exactly these; None for a search. One alone is given, and not searched.
    """

    kind: str
    low: float
    high: float
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in (TIME, *_KINDS):
            raise InvalidValueError("axis", f"must be one of {', '.join(_KINDS)}, {TIME}", value=self.kind)
        for end in (self.low, self.high, *(self.values or ())):
            self.title(end)  # checks it
        if not self.low < self.high and not self.is_given:
            raise InvalidValueError(
                self.kind, "the first must be below the second", value=f"{self.low:g}:{self.high:g}"
            )

    @classmethod
    def of_values(cls, kind: str, values: Sequence[float]) -> Axis:
        """A grid."""
        return cls(kind, min(values), max(values), tuple(sorted(set(values))))

    @property
    def is_given(self) -> bool:
        """Whether there is nothing to search."""
        return self.values is not None and len(self.values) == 1

    def target(self, value: float) -> Target:
        """The target of a value, as a user writes it; of no time."""
        return _KINDS[self.kind](value)

    def title(self, value: float) -> str:
        """For people: `sigma_rel 0.15`, `t 5000`."""
        if self.kind != TIME:
            return self.target(value).title
        if not value > 0:
            raise InvalidValueError(TIME, "must be above 0", value=f"{value:g}")
        return f"{TIME} {value:.12g}"

    def scaled(self, value: float) -> float:
        """The parameter whose logarithm is searched: of a decay its horizon in steps, else the value itself."""
        return 1 / (1 - value) if self.kind == "beta" else value

    def unscaled(self, x: float) -> float:
        """The value of a parameter, exactly."""
        return 1 - 1 / x if self.kind == "beta" else x

    def value(self, x: float) -> float:
        """The value of a parameter: one that was named, or with three digits, or as many as a narrow range needs."""
        for named in self.values or ():
            if math.isclose(self.scaled(named), x):
                return named
        width = math.log(self.scaled(self.high) / self.scaled(self.low))
        digits = max(3, 2 - math.floor(math.log10(width or 1)))
        if self.kind == "beta":
            value = round(1 - search.rounded(1 / x, digits), 12)
        else:
            value = round(x) if self.kind == "window" else search.rounded(x, digits)
        return min(max(value, self.low), self.high)


_KINDS: dict[str, Callable[[Any], Target]] = {
    "sigma_rel": SigmaRel,
    "beta": Beta,
    "window": Window,
    **{f"decay {shape} over": functools.partial(Decay, shape) for shape in SHAPES},
}


Measure = Callable[[Sequence[tuple[float, int]]], Iterator[Record]]
"""Measures values, as a user writes them, each with a seed, and gives a record of each."""


Told = Callable[[Sequence[Record], search.Estimate], None]
"""Told of all trials of a search, and what they say, after each round."""


def explore(
    axis: Axis, measure: Measure, known: Iterable[Record], minimize: bool, budget: int, repeats: int, again: bool,
    batch: int = search.NEXT, told: Told = lambda *_: None,
) -> tuple[list[Record], search.Estimate, str]:  # fmt: skip
    """Measure until the best is known within the noise, or the budget is spent.

    Arguments:
        known: trials that are there already.
        budget: lengths to measure, each `repeats` times; one that is measured again counts again.
        again: whether a length can be measured again with another seed.
        batch: lengths of each round after the first.
        told: called after each round.

    Returns:
        All trials, what they say, and why no more was measured, with the best one where it counts as an outlier.

    Raises:
        PostHocError: too few trials have succeeded.
    """
    trials, found, why = _explore(axis, measure, known, minimize, budget, repeats, again, batch, told)
    if found.outlier is not None:
        value = (min if minimize else max)(trial.value for trial in trials if trial.value is not None)
        what = f"{value:.6g} at {axis.title(axis.value(found.outlier))} is far better than all others"
        why += f"; {what}, which do not confirm it, and counts as an outlier"
    return trials, found, why


def _explore(
    axis: Axis, measure: Measure, known: Iterable[Record], minimize: bool, budget: int, repeats: int, again: bool,
    batch: int, told: Told,
) -> tuple[list[Record], search.Estimate, str]:  # fmt: skip
    low, high = axis.scaled(axis.low), axis.scaled(axis.high)
    trials = list(known)

    def seeds_of(value: float) -> set[int]:
        return {trial.seed for trial in trials if trial.x == value}

    def spent() -> int:
        return sum(-(-len(seeds_of(value)) // repeats) for value in {trial.x for trial in trials})

    first = axis.values or list(dict.fromkeys(map(axis.value, search.first_batch(low, high))))
    wanted = [(value, seed) for seed in range(repeats) for value in first if seed not in seeds_of(value)]
    while True:
        trials += measure(wanted)
        found = _estimate(axis, trials, minimize, min(3, len(first)))
        told(trials, found)
        left = budget - spent()
        if len({trial.value for trial in trials if trial.value is not None}) == 1:
            return trials, found, "every trial has the same metric: does the evaluation use the weights?"
        if axis.values is not None:
            return trials, found, "all named lengths are measured"
        if found.settled and not found.doubted:
            return trials, found, "the best length is known within the noise"
        count = 1 if found.settled else min(batch, left)  # one is left: what may confirm an outlier
        proposed = [axis.value(x) for x in search.next_batch(found, _good(axis, trials), count, again)]
        failed = {trial.x for trial in trials if trial.value is None}
        proposed = [v for v in dict.fromkeys(proposed) if v not in failed and (again or not seeds_of(v))]
        if found.settled and not proposed:
            return trials, found, "the best length is known within the noise"
        if left <= 0:
            return trials, found, "the budget is spent"
        if not proposed:
            return trials, found, "nothing is left to measure between the measured lengths"
        wanted = []
        for value in proposed:
            start = max(seeds_of(value), default=-1) + 1
            wanted += [(value, seed) for seed in range(start, start + repeats)]


def _good(axis: Axis, trials: Iterable[Record]) -> list[search.Trial]:
    return [
        search.Trial(axis.scaled(trial.x), trial.value, trial.standard_error, trial.seed)
        for trial in trials
        if trial.value is not None
    ]


def _estimate(axis: Axis, trials: Sequence[Record], minimize: bool, least: int) -> search.Estimate:
    good = _good(axis, trials)
    if len({trial.x for trial in good}) < least:
        failed = [trial for trial in trials if trial.value is None]
        reason = f"{len(failed)} of {len(trials)} trials have failed, too many to choose; the last one"
        raise PostHocError("the sweep", f"{reason}: {failed[-1].target}: {failed[-1].error}")
    among = None if axis.values is None else [*map(axis.scaled, axis.values)]
    return search.estimate(good, axis.scaled(axis.low), axis.scaled(axis.high), minimize, among)


def good_range(run: Run, t: float | None = None, method: str | None = None) -> tuple[float, float]:
    """The widest range of sigma_rel whose predicted error is below GOOD_ERROR.

    Raises:
        InvalidValueError: there is none.
    """
    ranges = run.error_curve(t=t, method=method).ranges_below(GOOD_ERROR)
    if not ranges:
        reason = f"no length has a predicted error below {100 * GOOD_ERROR:g} %"
        raise InvalidValueError("sigma_rel", reason, "name a range, such as 0.05:0.25")
    low, high = max(ranges, key=lambda ends: ends[1] / ends[0])
    return math.ceil(low * 1e4) / 1e4, math.floor(high * 1e4) / 1e4


def check_counts(repeats: int, budget: int, axes: Iterable[Axis]) -> None:
    """Raise an InvalidValueError for numbers that leave nothing to search with."""
    least = search.FIRST if any(axis.values is None for axis in axes) else 1  # a list is measured whole
    if budget < least:
        raise InvalidValueError("budget", f"must be at least {least}, the first batch", value=budget)
    if repeats < 1:
        raise InvalidValueError("repeats", "must be at least 1", value=repeats)
