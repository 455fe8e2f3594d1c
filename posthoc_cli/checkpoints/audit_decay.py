"""Find the decay that explains how an average moved between checkpoints of it and of the weights;
and its uncertainty.

Let x and e be the weights and the average at one checkpoint, x' and e' those at the next one, d = e
- x, v = x' - x and y = e' - x. If the weights moved on the line from x to x', then

    y = B d + s v + residual,

where B is the mass of e' from before the interval, and s the mean of its tail over the interval.
Both follow from how much the average forgets, which a `Model` says. The sums of products of y, d
and v over the elements of a piece of a tensor (Gram matrices) suffice: the best value has the
smallest residuals, each weighted by the inverse of its piece's. Rounding of stored averages adds a
known variance to d and y, which is subtracted.

Weights do not move on lines: they go back and forth (noise), which makes this value too long, or go
on as they did, which makes it too short, by 11 % of a length that is 0.4 of the time between
checkpoints. So it is where the search for the most likely value begins. (On ten trainings, where
the time constant is the time between checkpoints, this value is 1.5 % off in the median and 5 % at
most; with the motion of the neighbouring intervals taken out 1.1 and 10 %.)

The path is a sum of independent impulses; of each one a share stays, decays, or builds up with the
time (`_responses`), and so the covariance of all weights and averages is a sum of known matrices C,
each times a variance q: one for each response and interval. With S the covariance of the sample and
P the inverse of that sum, the variances follow from q <- q sqrt(tr(P S P C) / tr(P C)).

The earlier half of the checkpoints and the later one are explained alone, too. What each of them
says of the length is the uncertainty, so that it holds for a rule that is not in the table, too.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.interpolate import CubicSpline
from scipy.optimize import minimize_scalar

from posthoc_cli.profiles import (
    POWER_FUNCTION,
    RULES,
    WARM_UPS,
    DecayRule,
    FloatArray,
    sigma_rel_from_gamma,
)

_POINTS = 512  # most points in an interval at which the tail of the average is computed
_COPIED = 40.0  # -log of the share that remains after a copy, which is nothing in float64
_EVERYTHING = 1e8  # and after a restart: more than after all copies before it
# The first so many updates are added one by one, and as many groups of later ones: of 1,000,000
# updates a group spans 1.5 %.
_UPDATES = 512
# Rules explain files about equally if their log residuals, summed over n intervals, differ by less
# than this / sqrt(n). Of 13 rules and 10 recorded trainings the true rule was within 0.42 of the
# best one with 5 files, and within 0.23 with 20.
_ALIKE = 1.2
# A rule explains files clearly better by 1 and this for each interval: of 13 rules and 4 trainings
# with files 20, 100 and 300 steps apart no other one explained them better than the true rule by
# more than 0.7 with 15 files, and 1.9 with 75; a constant decay was worse than a schedule by 3.6.
_CLEARLY = 0.05
# Rules are the same if their tails differ by less: a warm-up "power" and "ratio" up to 0.99 do by
# 0.052 in the first of 20 intervals.
_SAME = 0.06
_CELLS = 16  # cells of time between two checkpoints, in which impulses count as uniform
# times in which impulses decay, and build up, relative to that between two checkpoints
_NOISE = (0.01, 0.3, 1.0)
_BUILD_UP = 0.2
# Motion that all of a training shares is that of the principal components of the weights, one for
# so many checkpoints. In ten trainings lengths of 600 and 1,800 steps were 0.07 and 0.02 % off in
# the median so, from 20 files 300 steps apart, and with polynomials of time 0.11 and 0.06 %. Of 600
# steps from 10 files they were 1.0 and 0.4 % off: few show too few components, and no slow noise.
_CHECKPOINTS_A_COMPONENT = 7
_MANY = 2 * _CHECKPOINTS_A_COMPONENT
_DEGREE = 3  # of a polynomial of time, for fewer checkpoints
_ROUNDS = 40  # to find variances: with 100 no length changed by 0.5 %
# Most checkpoints of one likelihood: with 20, 28 or 40 a length of 100 steps was 0.2 % off at most,
# from 50, 100 and 300 files 20 steps apart.
_TOGETHER = 2 * _MANY
_PARTS = 3  # likelihoods of more checkpoints: of the first, of those in the middle, and the last
_LEAST = 1e-6  # least share of variance: the covariance of a path on a line is singular
# With r = time between two checkpoints / length, other paths than such sums move a length by this,
# times r (1 + r^2 / 7): ten trainings by a quarter to a half of it in the median, 0.07 % at r 0.5,
# 0.6 % at 1.7 and 4 % at 5, and by 2 of it at most,
_UNLIKE = 0.0045
# and for each unit of divergence by this: that is about 0.1 in trainings, and 2.5 for a drift with
# white noise, which moves a length by 13 % at r 2.5.
_UNEXPLAINED = 0.032
_EXACT = 0.0005  # least uncertainty: also where r is 0.1, lengths were 0.05 % off in the median
_PART = 0.25  # share of what the likelihood moves a length that counts as uncertain
_FARTHEST = 2.0  # logarithm of the largest factor that a part of the checkpoints may show
_NARROW = 0.01  # of a logarithm: below it a search finds no better value

# Of one update an interval, the share of the weights' motion that is left unexplained: rounding. Of
# one update a step it is 0.08 to 0.4 in some interval of trainings, of two an interval as well.
_SINGLE = 0.01
_DIFFER = 0.05  # least squared sine between two directions

CONSTANT = DecayRule()


@dataclass(frozen=True)
class Model:
    """An average whose updates follow a rule, and which began from the weights at each of the
    `starts`."""

    rule: DecayRule = CONSTANT
    # The claimed value. A claimed rule has another one if it is applied several times a step, or
    # less often.
    claimed: float | None = None
    # What it forgets in a unit of time after a warm-up, or before a schedule, or gamma + 1 of a
    # power function.
    value: float = 1.0
    every: float = 1.0  # time between updates
    starts: tuple[float, ...] = (0.0,)

    @property
    def claim(self) -> Model:
        """The model with the claimed value; itself without a claim."""
        if self.claimed is None:
            return self
        return replace(self, value=self.claimed)

    @property
    def is_power(self) -> bool:
        return self.rule.warm_up == POWER_FUNCTION

    @property
    def fitted(self) -> DecayRule:
        """The rule with the number that a search has found; a claimed rule as it is."""
        if self.claimed is not None:
            return self.rule
        if self.is_power:
            return self.rule.with_number(self.value)
        if self.rule.is_schedule:
            return self.rule.with_number(self.parameter)
        return replace(self.rule, decay=self.parameter)

    @property
    def length(self) -> float:
        """The time constant after a warm-up, or the sigma_rel."""
        if self.is_power:
            gamma = max(self.value - 1, 1e-300)  # 0 is that of the longest one
            return sigma_rel_from_gamma(gamma)
        lost = -math.expm1(-self.value * self.every)
        return self.every / lost

    @property
    def parameter(self) -> float:
        """The decay of one update after a warm-up, or the sigma_rel."""
        if self.is_power:
            return self.length
        return math.exp(-self.value * self.every)

    def parameter_at(self, t: float) -> float:
        """Return the decay of the update at a time, or the sigma_rel, or a schedule's base."""
        if self.is_power or self.rule.is_schedule:
            return self.parameter
        return 1 - self.every / self.length_at(t)

    def length_at(self, t: float) -> float:
        """Return the time constant at a time."""
        times = np.array([t - self.every, t])
        before, after = self.forgotten(times).tolist()
        lost = -math.expm1(before - after)
        return self.every / max(lost, 1e-300)

    def scaled(self, log: float) -> Model:
        return replace(self, value=self.value * math.exp(log))

    def begun(self, *starts: float) -> Model:
        distinct = {*self.starts, *starts}
        return replace(self, starts=tuple(sorted(distinct)))

    def forgotten(self, t: FloatArray) -> FloatArray:
        """Return -log of the share that remains of an earlier mass, at each time, up to a
        constant."""
        starts = np.array(self.starts)
        begun = np.searchsorted(starts, t)  # at the time of a restart the earlier average is stored
        last = np.maximum(begun - 1, 0)
        since = t
        if not self.rule.is_schedule:
            since = t - starts[last]
        numbers = np.maximum(since / self.every, 0.0)
        forgotten: FloatArray = _EVERYTHING * last + self._lost(numbers)
        return forgotten

    def _lost(self, numbers: FloatArray) -> FloatArray:
        """Return -log of the share that remains of what was before so many updates."""
        if self.rule == CONSTANT:  # most models: twice as fast as by groups of updates
            return numbers * min(self.value * self.every, _COPIED)
        most = float(numbers.max())
        ends = _groups_until(max(most, _UPDATES + 1.0))
        counts = np.diff(ends)
        middles = (ends[1:] + ends[:-1] + 1) / 2
        least = math.exp(-_COPIED)
        kept = np.maximum(self.fitted.at(middles), least)
        lost = np.cumsum(-np.log(kept) * counts)
        if self.claimed is not None:
            lost *= self.value / self.claimed
        by_number = np.append(0.0, lost)
        by_all: FloatArray = np.interp(numbers, ends, by_number)
        return by_all

    def tails(self, times: FloatArray) -> FloatArray:
        """Return what the average at each time has of each earlier one: [times, times]."""
        forgotten = self.forgotten(times)
        logs = forgotten - forgotten[:, None]
        return np.tril(_shares(logs))


def _shares(logs: FloatArray) -> FloatArray:
    """Return the shares that remain, of which these are the logarithms but for rounding."""
    shares: FloatArray = np.exp(np.minimum(logs, 0))
    return shares


@lru_cache(maxsize=64)
def _groups_until(most: float) -> FloatArray:
    """Return the numbers of updates that end each group of them."""
    later = np.geomspace(_UPDATES, most, _UPDATES)
    return np.append(np.arange(float(_UPDATES)), later)


def possible_rules(updates: float) -> list[DecayRule]:
    """Return the rules that an average may follow of which nothing is said; schedules end after so
    many updates."""
    rules = [CONSTANT, DecayRule(warm_up=POWER_FUNCTION, copies=1)]
    for name, row in WARM_UPS.items():
        rule = DecayRule(warm_up=name, steps=updates)
        if row.usual is None:
            rules.append(rule)
            continue
        for number in (row.usual, *row.others):
            rules.append(rule.with_number(number))
    return rules


# --- the checkpoints, and the intervals between them


@dataclass(frozen=True)
class Series:
    """Elements of the weights and of an average at n times, by piece of a tensor."""

    times: FloatArray  # [n]
    # of each piece, the weights and the averages: [2, n, elements]
    values: Sequence[npt.NDArray[np.floating]]
    rounding: FloatArray  # squared rounding error of each piece of the averages: [n, pieces]
    dtypes: Sequence[str]  # in which the averages are stored, of each piece

    def between(self, first: int, last: int) -> Series:
        """Return the series from one time to another."""
        chosen = slice(first, last + 1)
        times = self.times[chosen]
        rounding = self.rounding[chosen]
        values = [of_piece[:, chosen] for of_piece in self.values]
        return Series(times, values, rounding, self.dtypes)

    @property
    def spacing(self) -> float:
        """The median time between two checkpoints."""
        return float(np.median(np.diff(self.times)))

    def covariance(self) -> tuple[FloatArray, FloatArray]:
        """Return that of the later weights and the averages, without the first weights, and its
        part from rounding; elements count relative to their piece's motion."""
        count = len(self.times)
        size = 2 * count - 1
        total = np.zeros((size, size))
        rounding = np.zeros(size)
        for values, errors in zip(self.values, self.rounding.T, strict=True):
            weights, averages = values.astype(np.float64)
            moved = np.concatenate([weights[1:], averages])
            moved -= weights[0]
            gram = moved @ moved.T
            motion = max(float(np.trace(gram)), 1e-300)
            share = moved.shape[1] / motion
            total += gram * share
            rounding[count - 1 :] += errors * share
        variance = np.trace(total) / size
        least = _LEAST * variance * np.eye(size)
        return total + least, np.diag(rounding) + least

    def intervals(self) -> Intervals:
        """Return the Gram matrices between successive times, without the variance of rounding in
        them."""
        grams = []
        for values in self.values:
            weights, averages = values.astype(np.float64)
            y = averages[1:]
            d = averages[:-1]
            v = weights[1:]
            rows = np.stack([y, d, v], axis=1)
            rows -= weights[:-1, None]
            products = rows @ rows.swapaxes(1, 2)
            grams.append(products)
        gram = np.stack(grams, axis=1)
        before = self.rounding[:-1]
        after = self.rounding[1:]
        rounded = [0, 1]  # y and d
        squares = gram[..., rounded, rounded]
        squares -= np.stack([after, before], axis=-1)
        gram[..., rounded, rounded] = np.maximum(squares, 0)
        begin = self.times[:-1]
        end = self.times[1:]
        return Intervals(begin, end, gram, before + after)


@dataclass(frozen=True)
class Intervals:
    """Sums of products between checkpoints, by interval and piece."""

    begin: FloatArray  # [intervals]
    end: FloatArray  # [intervals]
    gram: FloatArray  # of y, d and v: [intervals, pieces, 3, 3]
    rounding: FloatArray  # its variance: [intervals, pieces]

    def __getitem__(self, rows: Sequence[int]) -> Intervals:
        begin = self.begin[rows]
        end = self.end[rows]
        return Intervals(begin, end, self.gram[rows], self.rounding[rows])

    def shares(self, model: Model) -> tuple[FloatArray, FloatArray]:
        """Return B and s, [intervals, 1]; s is a mean of at most `_POINTS` updates."""
        begin = self.begin[:, None]
        end = self.end[:, None]
        length = end - begin
        counts = np.maximum(length / model.every, 1)
        points = int(min(counts.max(), _POINTS))
        each = counts / points
        updates = (np.arange(points) + 0.5) * each - 0.5
        inner = begin + updates * length / counts
        # a restart at `begin` comes after the average is stored, and before the first update
        inner = np.nextafter(inner, end)
        times = np.hstack([inner, begin, end])
        forgotten = model.forgotten(times)
        by_end = forgotten[:, -1:]
        kept = _shares(forgotten[:, :-1] - by_end)
        of_updates = kept[:, :-1]
        tail = of_updates.mean(axis=1, keepdims=True)
        return kept[:, -1:], 1 - tail

    def kept(self) -> FloatArray:
        """Return what is left at the end of each interval of the average at its beginning, whenever
        the weights moved between them: [intervals].

        It is the coefficient of d if d and v explain y, both freely.
        """
        sums = self.gram.sum(axis=1)
        _, of_d, of_v = np.moveaxis(sums, -1, 0)  # products with y, d and v, in this order
        determinant = of_d[:, 1] * of_v[:, 2] - of_d[:, 2] ** 2
        kept: FloatArray = np.zeros_like(determinant)
        first = of_d[:, 0] * of_v[:, 2]
        second = of_v[:, 0] * of_d[:, 2]
        product = first - second
        np.divide(product, determinant, out=kept, where=determinant > 0)
        return kept

    @property
    def are_single(self) -> bool:
        """Whether one update alone explains each interval, y = b d + (1 - b) v, though weights that
        move on a line let many do."""
        sums = self.gram.sum(axis=1)
        share = self.kept()
        factors = np.stack([np.ones_like(share), -share, share - 1], axis=-1)
        left = np.einsum("ij,ijk,ik->i", factors, sums, factors) + self.rounding.sum(axis=1)
        taken_in = (1 - share) ** 2 * sums[:, 2, 2]
        d_and_v = sums[:, 1, 1] * sums[:, 2, 2]
        differ = d_and_v - sums[:, 1, 2] ** 2 > _DIFFER * d_and_v
        return differ.sum() > 1 and bool(np.all(left[differ] <= _SINGLE * taken_in[differ]))

    def residuals(self, model: Model, bends: bool = False) -> FloatArray:
        """Return the squared norms of y - B d - s v: [intervals, pieces].

        With `bends` each piece has in each interval the s that makes its residual least.
        """
        b, s = self.shares(model)
        if bends:
            with_v = self.gram[..., 2]
            y, d, v = np.moveaxis(with_v, -1, 0)
            length = np.maximum(v, self._nothing)
            s = (y - b * d) / length
        all_factors = np.broadcast_arrays(1.0, -b, -s)
        factors = np.stack(all_factors, axis=-1)
        squares: FloatArray = np.einsum("ipj,ipjk,ipk->ip", factors, self.gram, factors)
        return squares

    @cached_property
    def _moved(self) -> FloatArray:
        """The squared norms of y and v together: [intervals, pieces]."""
        y = self.gram[..., 0, 0]
        v = self.gram[..., 2, 2]
        moved: FloatArray = y + v
        return moved

    @cached_property
    def _nothing(self) -> float:
        """A square that counts as none, above 0 also for a piece that stands still."""
        return float(1e-20 * self._moved.max()) + 1e-300

    def search(
        self,
        model_of: Callable[[float], Model],
        grid: FloatArray,
    ) -> float:
        """Return the value whose model has the smallest residuals, each weighted by its inverse, by
        that of no less than 1e-4 of the motion."""
        remaining = self._moved
        motion = self.gram[..., 2, 2]
        least = 1e-4 * motion + self._nothing

        @cache
        def residuals(value: float) -> FloatArray:
            return self.residuals(model_of(value))

        for _ in range(4):
            remaining = np.maximum(remaining, 0) + self.rounding
            weights = 1 / np.maximum(remaining, least)

            def cost(value: float, weights: FloatArray = weights) -> float:
                return float((residuals(value) * weights).sum())

            costs = [cost(value) for value in grid.tolist()]
            best = int(np.argmin(costs))
            neighbours = grid[max(best - 1, 0) : best + 2]
            low = neighbours[0]
            high = neighbours[-1]
            exact = 1e-5 * (high - low)
            value = float(_least(cost, low, high, exact).x)
            remaining = residuals(value)
            after = int(np.searchsorted(grid, value))
            grid = grid[max(after - 6, 0) : after + 6]
        return value

    def fit(
        self,
        model: Model,
        grid: FloatArray | None = None,
    ) -> Model:
        """Return the model with the value that explains the intervals best, of a grid of values."""
        if grid is None:
            grid = self._grid(model)

        def with_value(value: float) -> Model:
            return replace(model, value=value)

        return with_value(self.search(with_value, grid))

    def _grid(self, model: Model) -> FloatArray:
        """Return the values of lengths from 1/100 of the least interval to 100 times the run."""
        if model.is_power:
            return np.geomspace(1.0, 2000.0, 60)
        run = self.end[-1] - self.begin[0]
        intervals = self.end - self.begin
        interval = float(intervals.min())
        shortest = max(interval / 100, model.every / 20)
        return np.geomspace(0.01 / run, 1 / shortest, 60)

    def unexplained(self, model: Model) -> float:
        """Return the sum of the residuals, each divided by that of its piece if nothing is
        explained."""
        moved = np.einsum("ipjj->ip", self.gram).clip(1e-300)
        shares = self.residuals(model) / moved
        return float(shares.sum())

    def misfit(self, model: Model, bends: bool = False) -> float:
        """Return the log residuals, a mean over the pieces, summed over the intervals."""
        left = np.maximum(self.residuals(model, bends), 0)
        left += self.rounding
        logs = np.log(left + self._nothing)
        return float(logs.mean(axis=1).sum())


def _least(
    function: Callable[[float], float],
    low: float,
    high: float,
    exact: float,
) -> Any:
    """Return the place `x` and the value `fun` of a minimum."""
    bounds = (low, high)
    options = {"xatol": exact}
    return minimize_scalar(function, bounds=bounds, method="bounded", options=options)


# --- the rule


def best_models(
    model: Model,
    rules: Sequence[DecayRule],
    rows: Intervals,
) -> list[Model]:
    """Return the model of the rule that explains the intervals best, then those of other rules that
    explain them about as well.

    Rules that few libraries have, and those that begin as the mean of all weights, count as worse
    by as much as is about equal.
    """
    alike = _ALIKE / math.sqrt(len(rows.begin))
    misfits = []
    for rule in rules:
        fitted = rows.fit(replace(model, rule=rule))
        misfit = rows.misfit(fitted)
        if rule.begins_as_mean or not RULES[rule.warm_up].is_common:
            misfit += alike
        misfits.append((misfit, fitted))
    misfits.sort(key=operator.itemgetter(0))
    least, _ = misfits[0]
    return [fitted for misfit, fitted in misfits if misfit <= least + alike]


def are_the_same(one: Model, other: Model, times: FloatArray) -> bool:
    """Return whether two models make about the same averages at these times."""
    apart = one.tails(times) - other.tails(times)
    return bool(np.abs(apart).max() <= _SAME)


def explains_more(rows: Intervals, one: Model, other: Model) -> bool:
    """Return whether a model explains the intervals clearly better than another one, also if
    weights bend."""
    least = 1 + _CLEARLY * len(rows.begin)
    for bends in (False, True):
        apart = rows.misfit(other, bends) - rows.misfit(one, bends)
        if apart <= least:
            return False
    return True


# --- the likelihood of all checkpoints together


def refine(model: Model, series: Series) -> tuple[Model, float]:
    """Return the model with the value that explains all checkpoints together best, and its length's
    relative uncertainty."""
    if len(series.times) < 3:  # one interval shows none
        return model, math.inf
    end = series.times[-1]
    log, divergence = _likeliest(model, series, 1.0)
    refined = model
    if not model.is_power:  # its first averages are too short for the distance between checkpoints
        refined = model.scaled(log)
        factor = refined.length_at(end) / model.length_at(end)
        log = _PART * math.log(factor)
    unexplained = _UNLIKE + _UNEXPLAINED * max(divergence, 0.0)
    unlike = unexplained * _growth(refined, series, end)
    apart = _apart(refined, series)
    return refined, math.hypot(apart, unlike, log, _EXACT)


def is_likelier(one: Model, other: Model, series: Series) -> bool:
    """Return whether all checkpoints together are likelier by a model than by another one, each
    with its best value.

    Where weights go back and forth averages look the longer, the longer the intervals are: by their
    residuals alone a constant decay was taken for a schedule.
    """
    _, of_one = _likeliest(one, series, 1.0)
    _, of_other = _likeliest(other, series, 1.0)
    return of_one < of_other


def _apart(model: Model, series: Series) -> float:
    """Return by how much more than other paths may explain the earlier half of the checkpoints, or
    the later one, or the end of a schedule, shows another length."""
    if model.claimed is None:
        model = replace(model, rule=model.fitted, claimed=model.value)
    last = len(series.times) - 1
    middle = (last + 1) // 2
    earlier = series.between(0, middle)
    parts = [earlier, series.between(middle, last)]
    if model.rule.is_schedule:
        first = max(last - 2, 0)
        parts.append(series.between(first, last))
    most = 0.0
    for part in parts:
        log, _ = _likeliest(model, part, _FARTHEST)
        t = float(part.times.mean())
        unlike = _UNLIKE * _growth(model, part, t)
        most = max(most, log**2 - unlike**2)
    return math.sqrt(most)


def _growth(model: Model, series: Series, t: float) -> float:
    """Return by which factor what other paths explain grows where averages are short."""
    share = series.spacing / model.length_at(t)
    return share * (1 + share**2 / 7)


def _likeliest(
    model: Model,
    series: Series,
    most: float,
) -> tuple[float, float]:
    """Return the logarithm of the factor on a model's value that is most likely, and the divergence
    that remains."""
    likelihoods = [_Likelihood(model, part) for part in _parts(series)]

    def divergence(log: float) -> float:
        return sum(likelihood(log) for likelihood in likelihoods) / len(likelihoods)

    usual = divergence(0.0)
    while most > _NARROW:
        likeliest = _least(divergence, -most, most, 1e-3)
        if likeliest.fun < usual:
            return float(likeliest.x), float(likeliest.fun)
        most /= 4  # a value that the warm-up does not reach makes no difference: search nearer
    return 0.0, usual


def _parts(series: Series) -> list[Series]:
    """Return the series, or `_PARTS` of one of many checkpoints: the time and the memory of a
    likelihood grow with the third power of their number."""
    beyond = len(series.times) - _TOGETHER
    if beyond <= 0:
        return [series]
    firsts = np.linspace(0, beyond, _PARTS).astype(int).tolist()
    return [series.between(first, first + _TOGETHER - 1) for first in firsts]


def _edges_of_cells(times: FloatArray) -> FloatArray:
    """Return the ends of the cells up to each checkpoint, and their beginning."""
    cells = np.arange(len(times) * _CELLS + 1) / _CELLS
    past = 2 * times[0] - times[1]  # which counts for one interval
    begun = np.append(past, times)
    numbers = np.arange(len(begun))
    edges: FloatArray = np.interp(cells, numbers, begun)
    return edges


def _responses(
    at: FloatArray,
    edges: FloatArray,
    spacing: float,
    noise: Sequence[float],
) -> FloatArray:
    """Return what is left at each time of impulses in each cell, if it stays, decays as `noise`, or
    builds up: [responses, cells, times]."""
    begin = edges[:-1, None]
    end = edges[1:, None]
    length = end - begin
    begun = np.maximum(at - begin, 0)
    ended = np.maximum(at - end, 0)
    stays = (begun - ended) / length

    def decays(share: float) -> FloatArray:
        time = share * spacing
        left = np.exp(-ended / time) - np.exp(-begun / time)
        response: FloatArray = time / length * left
        return response

    builds_up = stays - decays(_BUILD_UP)
    fading = map(decays, noise)
    responses = np.stack([stays, *fading, builds_up])
    return responses * np.sqrt(length / spacing)


def _polynomials(at: FloatArray, times: FloatArray) -> FloatArray:
    """Return powers of the time, 0 at the first of the checkpoints: [powers, times]."""
    degrees = np.arange(1, _DEGREE + 1)[:, None]
    first = times[0] / times[-1]
    shares = at / times[-1]
    powers: FloatArray = shares**degrees - first**degrees
    return powers


def _components(at: FloatArray, times: FloatArray, covariance: FloatArray) -> FloatArray:
    """Return the principal components of the later weights, which have this covariance, between
    checkpoints on cubic splines: [components, times]."""
    count = len(times) // _CHECKPOINTS_A_COMPONENT
    _, vectors = np.linalg.eigh(covariance)
    principal = vectors[:, -count:]
    origin = np.zeros(count)
    path = CubicSpline(times, np.vstack([origin, principal]))
    passed = np.minimum(at, times[-1])
    between: FloatArray = path(passed).T
    return between


class _Likelihood:
    """The divergence of all checkpoints from a model with any value."""

    def __init__(self, model: Model, series: Series) -> None:
        self.model = model
        self.sample, self.rounding = series.covariance()
        times = series.times
        self.count = len(times)
        self.edges = _edges_of_cells(times)
        begin = self.edges[:-1]
        end = self.edges[1:]
        middles = (begin + end + model.every) / 2
        at = np.append(middles, times)
        noise: Sequence[float] = _NOISE
        if self.count >= _MANY:
            later = slice(self.count - 1)
            of_weights = self.sample[later, later]
            shared = _components(at, times, of_weights)
        else:
            noise = _NOISE[:-1]
            shared = _polynomials(at, times)
        responses = _responses(at, self.edges, series.spacing, noise)
        self.impulses = responses.reshape(-1, _CELLS, len(at))
        self.shared = shared[:, None]

    def __call__(self, log: float) -> float:
        """Return the divergence for the model's value times exp(log)."""
        lost = self.model.scaled(log).forgotten(self.edges)
        by_checkpoint = lost[_CELLS::_CELLS]
        kept = _shares(lost[:, None] - by_checkpoint)
        begin = np.zeros((1, 1, 2 * self.count - 1))
        begin[..., self.count - 1 :] = kept[_CELLS]  # the first average
        impulses = self._moved(self.impulses, kept)
        shared = self._moved(self.shared, kept)
        paths = [impulses, begin, shared]
        parts = [moved.swapaxes(1, 2) @ moved for moved in paths]
        return self._divergence(np.concatenate(parts))

    def _moved(self, values: FloatArray, kept: FloatArray) -> FloatArray:
        """Return the later weights and the averages, without the first weights, of paths through
        the cells: [paths, impulses, weights and averages]."""
        cells = len(kept) - 1
        path = values[..., :cells]
        first = values[..., cells : cells + 1]
        later = values[..., cells + 1 :]
        averages = path @ np.diff(kept, axis=0)
        return np.concatenate([later, averages], axis=2) - first

    def _divergence(self, parts: FloatArray) -> float:
        """Return how far the sample's covariance is from that of rounding and the likeliest sum of
        parts: twice the Kullback-Leibler divergence, for each row."""
        sample = self.sample
        motion = np.trace(sample)
        traces = np.trace(parts, axis1=1, axis2=2)
        flat = parts.reshape(-1, sample.size)
        shares = motion / np.maximum(traces, 1e-300)
        variances = shares * (traces > 0) / len(parts)
        for _ in range(_ROUNDS):
            modelled = (variances @ flat).reshape(sample.shape)
            modelled += self.rounding
            inverse = np.linalg.inv(modelled)
            explained = inverse @ sample
            measured = flat @ (explained @ inverse).ravel()
            expected = flat @ inverse.ravel()
            ratios = np.maximum(measured, 0) / np.maximum(expected, 1e-300)
            variances *= np.sqrt(ratios)
        _, log_modelled = np.linalg.slogdet(modelled)
        _, log_sample = np.linalg.slogdet(sample)
        logs = log_modelled - log_sample
        twice = float(logs + np.trace(explained))
        return twice / len(sample) - 1
