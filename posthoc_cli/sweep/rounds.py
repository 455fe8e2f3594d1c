"""A search: rounds of measurements until the best is known."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from posthoc_cli.errors import InvalidValueError, PostHocError, check_count
from posthoc_cli.sweep import search
from posthoc_cli.sweep.axes import GOOD_ERROR, Axis
from posthoc_cli.sweep.results import Record

Measure = Callable[[Sequence[tuple[float, int]]], Iterable[Record]]
"""Measures values, as a user writes them, each with a seed, and gives a record of each."""


class Search:
    """One search: its trials, and what they say.

    Arguments:
        axis: what is searched.
        known: trials that are there already.
        minimize: whether lower is better.
        budget: lengths to measure, each `repeats` times; one that is measured again counts again.
        again: whether a length can be measured again with another seed.
        batch: lengths of each round after the first.
        beyond: the axis with its upper end, or its lower one, further out; None where that is of no use.

    Attributes:
        axis: what is searched, widened where its end was best.
        trials: all of them, failed ones with their error.
        found: what they say, after the first round.
        stopped: why no more was measured.
    """

    found: search.Estimate

    def __init__(
        self, axis: Axis, known: Iterable[Record] = (), *, minimize: bool, budget: int, repeats: int = 1,
        again: bool = False, batch: int = search.NEXT,
        beyond: Callable[[Axis, bool], Axis | None] = lambda _axis, _upwards: None,
    ) -> None:  # fmt: skip
        self._minimize, self._budget, self._repeats = minimize, budget, repeats
        self._again, self._batch, self._beyond = again, batch, beyond
        low, high = axis.scaled(axis.low), axis.scaled(axis.high)
        self._first = list(axis.values or dict.fromkeys(map(axis.value, search.first_batch(low, high))))
        self._known = list(known)
        self.trials: list[Record] = []
        self._take(axis)
        self.stopped = "it is still measuring"

    def rounds(self, measure: Measure) -> Iterator[search.Estimate]:
        """Measure until the best is known within the noise, or the budget is spent; gives what is known each time.

        Raises:
            PostHocError: too few trials have succeeded.
        """
        wanted = self._missing(self._first)
        while True:
            self.trials += measure(wanted)
            self.found = self._estimate()
            yield self.found
            if further := self._widen():
                wanted = self._missing(further)
                continue
            values = self._next()
            if not values:
                return
            wanted = []
            for value in values:
                start = max(self._seeds(value), default=-1) + 1
                wanted += [(value, seed) for seed in range(start, start + self._repeats)]

    def run(self, measure: Measure) -> Search:
        """All rounds; itself."""
        for _ in self.rounds(measure):
            pass
        return self

    def _take(self, axis: Axis) -> None:
        """Search these values, with the trials of them that are there already."""
        self.axis = axis

        def within(trial: Record) -> bool:
            return trial.x in axis.values if axis.values else axis.low <= trial.x <= axis.high

        self.trials += [trial for trial in self._known if within(trial)]
        self._known = [trial for trial in self._known if not within(trial)]

    def _missing(self, values: Sequence[float]) -> list[tuple[float, int]]:
        """What is not measured yet of some values."""
        return [(v, seed) for seed in range(self._repeats) for v in values if seed not in self._seeds(v)]

    @property
    def _left(self) -> int:
        """Lengths that may still be measured."""
        spent = (-(-len(self._seeds(value)) // self._repeats) for value in {trial.x for trial in self.trials})
        return self._budget - sum(spent)

    def _widen(self) -> list[float]:
        """Go on beyond an end that is best, and give the values to measure there; none if there is nothing."""
        axis, edge = self.axis, self.found.edge
        if edge is None or axis.values is not None or self._left <= 0:
            return []
        upwards = edge == self.found.xs[-1]
        wider = self._beyond(axis, upwards)
        if wider is None:
            return []
        self._take(wider)
        end = wider.scaled(wider.high if upwards else wider.low)
        return list(dict.fromkeys(map(wider.value, (math.sqrt(edge * end), end))))[: self._left]

    def _next(self) -> list[float]:
        """The values of the next round; none where the search is at its end, and then why."""
        axis, left = self.axis, self._left
        if axis.values is not None:
            return self._end("all named lengths are measured")
        if self.found.settled:
            return self._end("the best length is known within the noise")
        if left <= 0:
            return self._end("the budget is spent")
        count = min(self._batch, left)
        proposed = [axis.value(x) for x in search.next_batch(self.found, self._good(), count, self._again)]
        failed = {trial.x for trial in self.trials if trial.value is None}
        proposed = [v for v in dict.fromkeys(proposed) if v not in failed and (self._again or not self._seeds(v))]
        return proposed or self._end("nothing is left to measure between the measured lengths")

    def _end(self, why: str) -> list[float]:
        edge = self.found.edge
        if edge is not None:
            kind = "list" if self.axis.values else "range"
            why += f"; the best lies at the end of the {kind}, {self.axis.title(self.axis.value(edge))}"
            exact = f", beyond which no average is exact within {100 * GOOD_ERROR:g} %"
            why += ", and may lie beyond" if self.axis.values or self._left <= 0 else exact
        self.stopped = why
        return []

    def _seeds(self, value: float) -> set[int]:
        """Of the trials of a value."""
        return {trial.seed for trial in self.trials if trial.x == value}

    def _good(self) -> list[search.Trial]:
        return [
            search.Trial(self.axis.scaled(trial.x), trial.value, trial.standard_error, trial.seed)
            for trial in self.trials
            if trial.value is not None
        ]

    def _estimate(self) -> search.Estimate:
        axis, good = self.axis, self._good()
        if len({trial.x for trial in good}) < min(3, len(self._first)):
            failed = [trial for trial in self.trials if trial.value is None]
            reason = f"{len(failed)} of {len(self.trials)} trials have failed, too many to choose; the last one"
            raise PostHocError("the sweep", f"{reason}: {failed[-1].target}: {failed[-1].error}")
        if len({trial.x for trial in good}) > 1 and len({trial.value for trial in good}) == 1:
            reason = f"every trial has the same metric, {good[0].value:.12g}"
            raise PostHocError("the sweep", reason, "does the evaluation use the weights?")
        among = None if axis.values is None else [*map(axis.scaled, axis.values)]
        return search.estimate(good, axis.scaled(axis.low), axis.scaled(axis.high), self._minimize, among)


def check_counts(repeats: int, budget: int, axes: Iterable[Axis]) -> None:
    """Raise an InvalidValueError for numbers that leave nothing to search with."""
    least = search.FIRST if any(axis.values is None for axis in axes) else 1  # a list is measured whole
    if budget < least:
        raise InvalidValueError("budget", f"must be at least {least}, the first batch", value=budget)
    check_count("repeats", repeats)
