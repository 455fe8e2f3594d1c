"""A search: rounds of measurements until the best is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from posthoc_cli.errors import InvalidValueError, PostHocError
from posthoc_cli.sweep import search
from posthoc_cli.sweep.axes import Axis
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

    Attributes:
        trials: all of them, failed ones with their error.
        found: what they say, after the first round.
        stopped: why no more was measured, with the best trial where it counts as an outlier.
    """

    found: search.Estimate

    def __init__(
        self, axis: Axis, known: Iterable[Record] = (), *, minimize: bool, budget: int, repeats: int = 1,
        again: bool = False, batch: int = search.NEXT,
    ) -> None:  # fmt: skip
        self._axis, self._minimize, self._budget, self._repeats = axis, minimize, budget, repeats
        self._again, self._batch = again, batch
        low, high = axis.scaled(axis.low), axis.scaled(axis.high)
        self._first = list(axis.values or dict.fromkeys(map(axis.value, search.first_batch(low, high))))
        self.trials = list(known)
        self.stopped = "it is still measuring"

    def rounds(self, measure: Measure) -> Iterator[search.Estimate]:
        """Measure until the best is known within the noise, or the budget is spent; gives what is known each time.

        Raises:
            PostHocError: too few trials have succeeded.
        """
        values: Sequence[float] = self._first
        wanted = [(v, seed) for seed in range(self._repeats) for v in values if seed not in self._seeds(v)]
        while True:
            self.trials += measure(wanted)
            self.found = self._estimate()
            yield self.found
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

    def _next(self) -> list[float]:
        """The values of the next round; none where the search is at its end, and then why."""
        axis, found = self._axis, self.found
        spent = sum(-(-len(self._seeds(value)) // self._repeats) for value in {trial.x for trial in self.trials})
        left = self._budget - spent
        settled = "the best length is known within the noise"
        if len({trial.value for trial in self.trials if trial.value is not None}) == 1:
            return self._end("every trial has the same metric: does the evaluation use the weights?")
        if axis.values is not None:
            return self._end("all named lengths are measured")
        if found.settled and not found.doubted:
            return self._end(settled)
        count = 1 if found.settled else min(self._batch, left)  # one is left: what may confirm an outlier
        proposed = [axis.value(x) for x in search.next_batch(found, self._good(), count, self._again)]
        failed = {trial.x for trial in self.trials if trial.value is None}
        proposed = [v for v in dict.fromkeys(proposed) if v not in failed and (self._again or not self._seeds(v))]
        if found.settled and not proposed:
            return self._end(settled)
        if left <= 0:
            return self._end("the budget is spent")
        return proposed or self._end("nothing is left to measure between the measured lengths")

    def _end(self, why: str) -> list[float]:
        outlier = self.found.outlier
        if outlier is not None:
            best = (min if self._minimize else max)(trial.value for trial in self.trials if trial.value is not None)
            what = f"{best:.6g} at {self._axis.title(self._axis.value(outlier))} is far better than all others"
            why += f"; {what}, which do not confirm it, and counts as an outlier"
        self.stopped = why
        return []

    def _seeds(self, value: float) -> set[int]:
        """Of the trials of a value."""
        return {trial.seed for trial in self.trials if trial.x == value}

    def _good(self) -> list[search.Trial]:
        return [
            search.Trial(self._axis.scaled(trial.x), trial.value, trial.standard_error, trial.seed)
            for trial in self.trials
            if trial.value is not None
        ]

    def _estimate(self) -> search.Estimate:
        axis, good = self._axis, self._good()
        if len({trial.x for trial in good}) < min(3, len(self._first)):
            failed = [trial for trial in self.trials if trial.value is None]
            reason = f"{len(failed)} of {len(self.trials)} trials have failed, too many to choose; the last one"
            raise PostHocError("the sweep", f"{reason}: {failed[-1].target}: {failed[-1].error}")
        among = None if axis.values is None else [*map(axis.scaled, axis.values)]
        return search.estimate(good, axis.scaled(axis.low), axis.scaled(axis.high), self._minimize, among)


def check_counts(repeats: int, budget: int, axes: Iterable[Axis]) -> None:
    """Raise an InvalidValueError for numbers that leave nothing to search with."""
    least = search.FIRST if any(axis.values is None for axis in axes) else 1  # a list is measured whole
    if budget < least:
        raise InvalidValueError("budget", f"must be at least {least}, the first batch", value=budget)
    if repeats < 1:
        raise InvalidValueError("repeats", "must be at least 1", value=repeats)
