"""The search for the best average by a metric: where to measure next, and what was found.

The trials are the only state of a search: what to measure next follows from them alone, so that a
search continues from a record of them.

It measures a few lengths, evenly in their logarithm, and the best one once more. If that has
another metric, the metric is noisy, and the lengths between are measured, too. Then comes the
length where a quadratic through the best ones is lowest. A list is measured as it is, without
additions. Of lengths that have exactly the same metric, the nearest to UNTUNED is the best one. If
all have, this one is measured, too.

A long best length may tell that the training has gone on for too long: the search then measures
averages of this length at a half, a quarter, ... of the training. An average that is later and
longer holds about what an earlier and shorter one does, so that this line finds a good pair of end
and length; in between the metric is rough.

In a fine-tuning whose first weights are named, shares of these are mixed in, larger ones until one
is worse, then where a quadratic in the share is lowest: a metric is smooth along it.

Whatever was chosen because its metric was the best one has a metric that is too good. So if the
metric is noisy, the winner and the best length at the end are measured afresh, twice each: this
decides between them, and is what may be claimed.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from posthoc_cli.errors import InvalidValueError
from posthoc_cli.profiles import check_sigma_rel, round_sigma_rel, sigma_rel_from_decay
from posthoc_cli.sweep.estimate import UNTUNED, Estimate, estimate, is_in_gap
from posthoc_cli.sweep.trial import FRESH, Spot, Trial, common_metric
from posthoc_cli.targets import Beta, bad, parse_numbers

LEAST_BUDGET = 4  # a quadratic needs three lengths, and one of four may fail
USUAL_COUNT = 12  # lengths of the grid: with it 92 % of choices are within the noise of the best
LOOK_COUNT = 6  # the same of a look by eye: lengths that fit side by side
FIRST_COUNT = 6
"""Lengths of the grid that are measured first, and alone if a repetition has the same metric: with
12 of them eight trainings ended at most 0.04 % better (scripts/overfitting.py)."""
LONGEST = 0.28
"""The sigma_rel from which on nothing longer is worth a search: the weight of the second half of
training is 56 %; it is 50 % in the uniform average, 0.2887."""
LEAST_WALKED = 0.1
"""The least best length of which earlier ends are measured: where the best one was shorter, no
earlier end was better (18 trainings of 18)."""
_SHARES = (0.1, 0.25, 0.5, 0.75)  # of the base, until one is worse
_APART = 0.03  # the least distance of a further share from those: a metric is flat at its best
_CHECKED = 1 + len(FRESH)  # measurements of the best of a grid: once more, and afresh
_BETWEEN = (0.71, 1.41)  # ends between the best one and those at half of it and at twice it


@dataclass(frozen=True)
class Lengths:
    """The sigma_rels to search: a range, or a list that is measured as it is."""

    low: float
    high: float
    listed: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for sigma_rel in (self.low, self.high, *self.listed):
            check_sigma_rel(sigma_rel)
        if not self.low < self.high:
            ends = f"{self.low:g}:{self.high:g}"
            raise InvalidValueError("sigma_rel", "the first must be below the second", value=ends)

    @classmethod
    def from_list(cls, sigma_rels: Sequence[float]) -> Lengths:
        listed = tuple(sorted({*sigma_rels}))
        if len(listed) < 2:
            raise InvalidValueError("sigma_rel", "give at least two lengths", value=list(listed))
        return cls(listed[0], listed[-1], listed)

    @classmethod
    def parse(cls, text: str, name: str, steps: float | None = None) -> Lengths:
        """Parse a range LOW:HIGH or a list of sigma_rels, or, with a number of `steps`, of decays,
        each for the sigma_rel that is as long; an InvalidValueError about `name`
        says what is accepted."""
        is_range = text.count(":") == 1 and "," not in text
        numbers = text.replace(":", ",") if is_range else text
        example = "0.02:0.28" if steps is None else "0.99:0.9999"
        try:
            sigma_rels = parse_numbers(
                numbers, name, f"a range LOW:HIGH, such as {example}, or a list"
            )
            if steps is not None:
                sigma_rels = [sigma_rel_for_decay(decay, steps) for decay in sigma_rels]
            if is_range:
                return cls(sigma_rels[0], sigma_rels[-1])
            return cls.from_list(sigma_rels)
        except InvalidValueError as error:
            raise bad(name, text, error.reason, error.hint) from error

    def __contains__(self, sigma_rel: float) -> bool:
        if self.listed:
            return sigma_rel in self.listed
        return self.low <= sigma_rel <= self.high

    def grid(self, count: int) -> list[float]:
        """List the given lengths, or `count` lengths of the range, evenly in their logarithm."""
        if self.listed:
            return list(self.listed)
        inner = np.geomspace(self.low, self.high, count)[1:-1].tolist()
        return list(dict.fromkeys([self.low, *map(self.round, inner), self.high]))

    def round(self, sigma_rel: float) -> float:
        """Round to three digits, more in a narrow range, within the range."""
        width = math.log(self.high / self.low)
        digits = max(3, 2 - math.floor(math.log10(width)))
        return min(max(float(f"{sigma_rel:.{digits}g}"), self.low), self.high)


def sigma_rel_for_decay(decay: float, steps: float) -> float:
    """Find the sigma_rel that is as long as a decay after this number of steps, to four digits."""
    sigma_rel = sigma_rel_from_decay(Beta(decay).beta, steps)
    if sigma_rel is None:
        most = 1 - 2 / steps
        reason = f"is longer than the uniform average of {steps:,.12g} steps; must be below "
        raise InvalidValueError("decay", f"{reason}{most:.6g}", value=f"{decay:g}")
    return round_sigma_rel(sigma_rel, 4)


class _Walk(NamedTuple):
    """A walk along a line of spots: the best one so far, and what to measure to go on."""

    best: Spot
    wanted: Sequence[Spot] = ()


@dataclass(frozen=True)
class Search:
    """A search: what it may measure, and its trials so far.

    Attributes:
        lengths: of the averages.
        minimize: whether a lower metric is better; None to measure the grid of lengths alone.
        t: the time at which averages end, but for those that end earlier.
        ends: the times at which an average may end: earlier ones, and `t`.
        has_base: whether averages are also mixed with the weights that a fine-tuning started from.
        most: how many averages may be measured; None for no bound.
        trials: in the order in which they were asked for.
    """

    lengths: Lengths
    minimize: bool | None
    t: float
    ends: tuple[float, ...] = ()
    has_base: bool = False
    most: int | None = None
    trials: tuple[Trial, ...] = ()

    # --- lengths

    @cached_property
    def grid(self) -> list[float]:
        """The lengths to measure if the metric is noisy."""
        count = LOOK_COUNT if self.minimize is None else USUAL_COUNT
        if self.most is not None and self.most < FIRST_COUNT + _CHECKED:
            spared = 0 if self.minimize is None else _CHECKED
            count = max(LEAST_BUDGET, min(count, self.most - spared))
        return self.lengths.grid(count)

    @property
    def first_grid(self) -> list[float]:
        """The lengths to measure first."""
        if self.lengths.listed or len(self.grid) <= FIRST_COUNT:
            return self.grid
        rows = np.linspace(0, len(self.grid) - 1, FIRST_COUNT).round().astype(int)
        return [self.grid[row] for row in rows]

    @property
    def _other_lengths(self) -> list[float]:
        """The others of the grid, the nearest to the best one first."""
        first = self.first_grid
        return sorted(
            (sigma_rel for sigma_rel in self.grid if sigma_rel not in first),
            key=lambda sigma_rel: abs(math.log(sigma_rel / self.estimate.best)),
        )

    @cached_property
    def _tried(self) -> set[tuple[Spot | None, int]]:
        return {(trial.spot, trial.seed) for trial in self.trials}

    def _lacking(self, lengths: Iterable[float]) -> list[tuple[Spot, int]]:
        """List the lengths that have not been measured."""
        wanted = [(Spot(sigma_rel), 0) for sigma_rel in lengths]
        return [pair for pair in wanted if pair not in self._tried]

    @property
    def _step(self) -> float:
        """The mean distance between the places of the grid."""
        return math.log(self.lengths.high / self.lengths.low) / (len(self.grid) - 1)

    @cached_property
    def estimate(self) -> Estimate:
        """The estimate of the metric of each length; raises an InvalidValueError without a
        metric."""
        if self.minimize is None:
            raise InvalidValueError("estimate", "there is no estimate without a metric")
        return estimate(self.trials, self._step, self.minimize)

    @property
    def at_end(self) -> Spot:
        """The average of the best length that ends with the others."""
        return Spot(self.estimate.best)

    # --- walks from the best length

    def _value(self, spot: Spot) -> float:
        """Find the metric of a spot that was measured, so that lower is better; infinite if that
        has failed."""
        sign = 1 if self.minimize else -1
        if spot == self.at_end:
            return sign * self.estimate.value
        values = self.measured(spot, [0])
        return sign * values[0] if values else math.inf

    def end_of(self, spot: Spot) -> float:
        return self.t if spot.t is None else spot.t

    def _nearest_end(self, end: float) -> Spot:
        """Find the average of the best length that ends nearest to a time."""
        t = min(self.ends, key=lambda time: abs(time - end))
        return self.at_end._replace(t=None if t == self.t else t)

    @cached_property
    def _end_walk(self) -> _Walk:
        """Walk to earlier ends by halves, until one is worse, or two in a row once one was better;
        then look to each side of the best one."""
        best = self.at_end
        is_tied = common_metric(self.trials) is not None
        is_short = best.sigma_rel < LEAST_WALKED
        if is_short or is_tied or self.lengths.listed or not self.ends:
            return _Walk(best)
        walked = [best]
        worse = 0
        while worse < (1 if best == self.at_end else 2):
            spot = self._nearest_end(self.end_of(walked[-1]) / 2)
            if spot in walked:
                break
            if (spot, 0) not in self._tried:
                wanted = [spot]
                after = self._nearest_end(self.end_of(spot) / 2)
                if best != self.at_end and worse == 0 and after != spot:
                    wanted.append(after)
                return _Walk(best, wanted)
            walked.append(spot)
            worse += 1
            if self._value(spot) < self._value(best):
                best, worse = spot, 0
        if best == self.at_end:
            return _Walk(best)
        sides = [self._nearest_end(ratio * self.end_of(best)) for ratio in _BETWEEN]
        wanted = [spot for spot in sides if (spot, 0) not in self._tried]
        return _Walk(min([best, *sides], key=self._value), wanted)

    @cached_property
    def _share_walk(self) -> _Walk:
        """Mix in larger shares of the base until one is worse; then measure the vertex of a
        quadratic."""
        at = self._end_walk.best
        if not self.has_base or common_metric(self.trials) is not None:
            return _Walk(at)
        walked = [at]
        for share in _SHARES:
            spot = at._replace(base_share=share)
            if (spot, 0) not in self._tried:
                return _Walk(min(walked, key=self._value), [spot])
            walked.append(spot)
            if self._value(spot) >= self._value(walked[-2]):
                break
        best = min(walked, key=self._value)
        if best == at:
            return _Walk(at)
        first = min(walked.index(best) - 1, len(walked) - 3)
        vertex = self._vertex_of_shares(walked[first : first + 3])
        if any(abs(vertex - spot.base_share) <= _APART for spot in walked):
            return _Walk(best)
        last = at._replace(base_share=vertex)
        if (last, 0) not in self._tried:
            return _Walk(best, [last])
        return _Walk(min(best, last, key=self._value))

    def _vertex_of_shares(self, spots: Sequence[Spot]) -> float:
        """Find the share at which a quadratic through three is lowest, between them."""
        shares = np.array([spot.base_share for spot in spots])
        values = np.array([self._value(spot) for spot in spots])
        if not np.isfinite(values).all():
            return float(shares[0])
        curvature, slope, _ = np.polyfit(shares, values, 2).tolist()
        if curvature <= 0:
            return float(shares[0])
        return round(float(np.clip(-slope / (2 * curvature), shares[0], shares[-1])), 2)

    @property
    def line_of_shares(self) -> list[Spot]:
        """The shares of the base that were measured in the average of the best end."""
        spots = {trial.spot for trial in self.trials}
        return [spot for spot in spots if spot and spot[:2] == self.walked_end[:2]]

    @property
    def walked_end(self) -> Spot:
        """The average of the best length at the best end, which the base is mixed with."""
        return self._end_walk.best

    @property
    def tried_ends(self) -> list[float]:
        """The earlier ends that were measured, the nearest to the best one first."""
        ends = {spot.t for spot in self.line_of_ends if spot.t is not None}
        best = self.end_of(self.best)
        return sorted(ends, key=lambda end: (abs(math.log(end / best)), end))

    @property
    def line_of_ends(self) -> list[Spot]:
        """The best length at each end that was measured."""
        spots = {trial.spot for trial in self.trials}
        length = self.at_end.sigma_rel
        return [spot for spot in spots if spot and spot[::2] == (length, 0.0)]

    # --- the result

    def measured(self, spot: Spot, seeds: Container[int] = range(4)) -> list[float]:
        """List the metrics of a spot that were measured with some of the seeds."""
        values = []
        for trial in self.trials:
            if trial.spot == spot and trial.seed in seeds and trial.value is not None:
                values.append(trial.value)
        return values

    def _fresh(self, spot: Spot) -> list[float]:
        return self.measured(spot, FRESH)

    @property
    def _rivals(self) -> list[Spot]:
        """What fresh measurements decide between: the best length at the end, and the winner."""
        return [*dict.fromkeys([self.at_end, self._share_walk.best])]

    @cached_property
    def best(self) -> Spot:
        """The best average: as measured, or if the metric is noisy, as measured afresh."""
        if self.estimate.noise == 0:
            return self._share_walk.best
        sign = 1 if self.minimize else -1

        def judge(spot: Spot) -> float:
            values = self._fresh(spot)
            return sign * float(np.mean(values)) if values else math.inf

        return min(self._rivals, key=judge)  # the first one of those that tie

    @property
    def value(self) -> float:
        """The metric of the best average, of fresh measurements if there are any."""
        if values := self._fresh(self.best):
            return float(np.mean(values))
        if self.best == self.at_end:
            return self.estimate.measured
        return self._value(self.best) * (1 if self.minimize else -1)

    def margin(self, count: int) -> float:
        """Compute half the width of the 95 % interval of the difference between the best average's
        metric and the mean of `count` measurements of other weights; nan if unknown.

        Repetitions show only the noise that is drawn anew. The error that trials state is also that
        of the examples, which all may share. It is then common to a part, and twice the error of
        one mean bounds the error of the difference.
        """
        found = self.estimate
        fresh = len(self._fresh(self.best))
        if found.noise == 0 or not fresh:
            return 2 * found.stated
        error = found.noise * math.hypot(fresh**-0.5, count**-0.5)
        return float(np.fmax(stdtrit(found.freedom, 0.975) * error, 2 * found.stated))

    # --- what to measure next

    @property
    def expected(self) -> int:
        """About how many averages there will be to measure, without walks; for a list, exactly."""
        count = len(self.first_grid)
        if self.minimize is None or count < LEAST_BUDGET:
            return count
        if self._repeated and self.estimate.noise != 0:
            return len(self.grid) + 2 + len(FRESH)
        return count + (1 if self.lengths.listed else 2)  # the best length, and once more

    @property
    def _repeated(self) -> bool:
        """Whether a length was measured once more."""
        return any(seed == 1 for spot, seed in self._tried if spot is not None)

    def next_measurements(self) -> list[tuple[Spot, int]]:
        """Choose what to measure next, each with its seed; nothing if the search has ended."""
        lacking = self._lacking(self.first_grid)
        if lacking or self.minimize is None:
            return lacking
        found = self.estimate
        if self.lengths.listed and math.isnan(found.noise) and not self.has_base:
            return []  # few lengths: the best is as measured
        if not self._repeated:
            return self._afford([(self.at_end, 1)], len(FRESH))
        claimed = 0 if found.noise == 0 else len(FRESH)
        lengths = [] if found.noise == 0 else self._lacking(self._other_lengths)
        if batch := self._afford(lengths or self._lacking(self._between()), claimed):
            return batch
        wanted = [(spot, 0) for spot in self._end_walk.wanted or self._share_walk.wanted]
        if batch := self._afford(wanted, 2 * claimed):
            return batch
        if found.noise == 0:
            return []
        fresh = [(spot, seed) for spot in self._rivals for seed in FRESH]
        return self._afford([pair for pair in fresh if pair not in self._tried], 0)

    def _between(self) -> list[float]:
        """Choose a length where the best one may lie between those measured, if there is one."""
        found = self.estimate
        if self.lengths.listed:
            return []
        if found.means.min() == found.means.max():
            return [UNTUNED] if UNTUNED in self.lengths else []
        between = self.lengths.round(math.exp(found.vertex))
        return [between] if is_in_gap(found, self._step) else []

    def _afford(self, wanted: Sequence[tuple[Spot, int]], spared: int) -> list[tuple[Spot, int]]:
        """Choose the first of the wanted measurements that leave so many others to make."""
        if self.most is None:
            return [*wanted]
        measured = sum(trial.sigma_rel is not None for trial in self.trials)
        return [*wanted[: max(0, self.most - measured - spared)]]

    @property
    def was_bounded(self) -> bool:
        """Whether the search would go on if it might measure more averages."""
        return bool(replace(self, most=None).next_measurements())
