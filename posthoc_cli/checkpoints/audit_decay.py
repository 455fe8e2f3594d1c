"""Find the length that explains how an average moved between checkpoints of it and of the weights.

Let x and e be the weights and the average at one checkpoint, x' and e' those at the next one, d = e
- x, v = x' - x and y = e' - x. If the weights moved on the line from x to x', then

    y = B d + s v + residual,

where B is the mass of e' from before the interval, and s the mean of its tail over the interval.
Both follow from how much the `Average` forgets, which its rule says for each length. The sums of
products of y, d and v over the elements of a piece of a tensor (Gram matrices) suffice: the best
length leaves the smallest residuals. Rounding of stored averages adds a known variance to d and y,
which is subtracted.

Weights do not move on lines: they go back and forth, go on as they did, or come to rest as a rate
falls. `Intervals.uncertainty` says how far that may move a length: by the two halves of the
checkpoints, by the motion before and after each interval, which takes out what goes on, and by what
B alone shows, with any s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from posthoc_cli.decay_rules import POWER_FUNCTION, WARM_UPS, DecayRule
from posthoc_cli.profiles import FloatArray

Bools = npt.NDArray[np.bool_]

# Points of an interval at which the tail is computed: for an average as short as a hundredth of the
# interval, s is then off by 1e-3 of 1 - s.
_POINTS = 256
# The first so many updates are added one by one, and as many groups of later ones: of 1,000,000
# updates a group spans 1.5 %.
_UPDATES = 512
_COPIED = 40.0  # -log of the share that remains after a copy, which is nothing in float64
_UNLIKE = 0.02  # per interval / length: see `Intervals.uncertainty`
# Share of the difference between what lines and any motion show that counts as uncertainty, if it
# leaves so much less (mean log of squares), or files are so many lengths apart, where a line alone
# tells a length. Of 770 series of six motions, with rates constant, by a cosine and in cycles and
# files 0.1 to 10 lengths apart, 66, 97 and 100 % are within 1, 2 and 3 times the uncertainty;
# without it 49, 75 and 82 %.
_UNEVEN = 0.7
_SHOWN = 0.05
FAR = 2.0
# An average began again in an interval if that leaves so much less of it (mean log of squares), if
# it does in the median interval the contrary, and is so many deviations from it, and if some of the
# average would have been kept. Of 144 such averages with files up to 1 length apart 129 are found;
# none of 288 others is accused.
_RESTART = math.log(1.5)
_DEVIATIONS = 4 * 1.4826
_KEPT = 0.05
_ROUNDS = 6  # after which the mean log no longer falls by 0.001
# Share of a motion that the next one undoes: 0.5 for white noise, 0 for a random walk. With more
# than this (noise of 10 steps about a minimum, files 30 steps apart: 0.48) a length was 1.7 times
# too long, and not in doubt by the other signs.
_UNDONE = 0.4
_NOTHING = 1e-12  # of a piece's motion: a residual that counts as none
_GRID = 40  # lengths at which a search begins


# --- how much an average forgets


def forgotten(rule: DecayRule, numbers: FloatArray) -> FloatArray:
    """Compute -log of the share that so many updates leave of what was before them: shape of
    `numbers`."""
    most = max(float(numbers.max()), _UPDATES + 1.0)
    first = np.arange(float(_UPDATES))
    ends = np.append(first, np.geomspace(_UPDATES, most, _UPDATES))
    middles = (ends[1:] + ends[:-1] + 1) / 2
    kept = np.maximum(rule.at(middles), math.exp(-_COPIED))
    lost = np.cumsum(-np.log(kept) * np.diff(ends))
    by_number = np.append(0.0, lost)
    return np.asarray(np.interp(numbers, ends, by_number))


@dataclass(frozen=True)
class Average:
    """An average by a rule. Those of one rule differ in length by factors, given by their
    logarithms."""

    rule: DecayRule  # of the factor 1
    # whether the decay is known: then averages differ in how often it is applied, else in the decay
    is_known: bool = False
    log: float = 0.0  # of its length
    misfit: float = 0.0  # of the intervals to which it was fitted, see `Intervals.misfit`

    @property
    def own_rule(self) -> DecayRule:
        """The rule of this length; a known rule as it is."""
        return self.rule if self.is_known else self.rule.longer(math.exp(self.log))

    def forgotten(self, numbers: FloatArray) -> FloatArray:
        """Compute what is forgotten after so many updates; see the function of this name."""
        factor = math.exp(-self.log) if self.is_known else 1.0
        return factor * forgotten(self.own_rule, numbers)

    def last_decay(self, updates: float) -> float:
        """Compute the share of the average that its last update keeps."""
        before, after = self.forgotten(np.array([updates - 1, updates])).tolist()
        return math.exp(before - after)

    def length(self, updates: float) -> float:
        """Compute the time constant of the last update, in updates."""
        return 1 / max(1 - self.last_decay(updates), 1e-15)

    def limits(self, updates: float) -> tuple[float, float]:
        """Compute the logarithms between which a length is searched."""
        if self.is_known:
            return -5.0, 5.0
        if self.rule.warm_up == POWER_FUNCTION:  # as long as the mean of all weights
            return 0.0, math.log(max(self.rule.power, 2.0)) - 1e-9
        return -0.5, math.log(100 * max(updates, 2.0))


def possible_averages(updates: float) -> list[Average]:
    """List the rules that an average may follow if nothing is said of it, the most common first. A
    schedule ends after so many updates."""
    rules = [DecayRule(0.5), DecayRule(warm_up=POWER_FUNCTION, power=updates, copies=1)]
    for name, row in WARM_UPS.items():
        rule = DecayRule(0.5, name, base=0.5, steps=updates)
        numbers = () if row.is_schedule or row.usual is None else (row.usual, *row.others)
        rules += [rule.with_number(number) for number in numbers]
        if not numbers:
            rules.append(rule)
    return [Average(rule) for rule in rules]


# --- the intervals


# With one update in each interval, the share of the weights' motion that is left unexplained:
# rounding. With one update a step it is 0.08 to 0.4 in some interval of trainings, and with two in
# an interval as well.
_SINGLE = 0.01
_ROUNDED = 0.04  # largest share of rounding that leaves the two apart
_REMAINS = 0.1  # least share of an average that is left, so that it differs from the weights
_DIFFER = 0.05  # least squared sine between two directions


@dataclass(frozen=True)
class Intervals:
    """Sums of products between successive checkpoints, by interval and piece.

    The rows of a Gram matrix are y, d and v, and the motions of the weights in the interval before
    and the one after. Each piece counts relative to the motion of its weights.
    """

    updates: FloatArray  # of the average by each checkpoint: [intervals + 1]
    gram: FloatArray  # [intervals, pieces, 5, 5]
    rounding: FloatArray  # of the stored averages: [intervals, pieces]

    def between(self, first: int, last: int) -> Intervals:
        """Select the intervals from one checkpoint to another."""
        updates = self.updates[first : last + 1]
        return Intervals(updates, self.gram[first:last], self.rounding[first:last])

    def select_pieces(self, pieces: Bools) -> Intervals:
        return Intervals(self.updates, self.gram[:, pieces], self.rounding[:, pieces])

    @property
    def counts(self) -> FloatArray:
        """The number of updates in each interval."""
        return np.diff(self.updates)

    def shares(self, average: Average) -> tuple[FloatArray, FloatArray]:
        """Compute B and s: [intervals] each."""
        begin = self.updates[:-1, None]
        end = self.updates[1:, None]
        counts = np.maximum(end - begin, 1)
        points = int(min(counts.max(), _POINTS))
        places = (np.arange(points) + 0.5) / points
        passed = np.maximum(places * counts - 0.5, 0)
        numbers = np.hstack([begin + passed, begin, end])
        lost = average.forgotten(numbers)
        kept = np.exp(lost - lost[:, -1:])
        return kept[:, -2], 1 - kept[:, :-2].mean(axis=1)

    def residuals(self, average: Average, goes_on: bool = False) -> FloatArray:
        """Compute the squared norms of y - B d - s v: [intervals, pieces]; with `goes_on` without
        what the motion before and after explains.

        They are negative where averages that hardly moved are rounded alike, so that less than the
        variance of two roundings is left.
        """
        b, s = self.shares(average)
        factors = np.zeros((len(b), 5))
        factors[:, 0] = 1
        factors[:, 1] = -b
        factors[:, 2] = -s
        products = np.einsum("ij,ipjk->ipk", factors, self.gram)
        left: FloatArray = np.einsum("ipk,ik->ip", products, factors)
        if goes_on:
            near = products[..., 3:, None]
            others = self.gram[..., 3:, 3:]
            size = np.trace(others, axis1=2, axis2=3)[..., None, None]
            solved = np.linalg.solve(others + (1e-9 * size + 1e-300) * np.eye(2), near)
            left = left - (near * solved).sum(axis=(2, 3))
        return left

    def misfit(self, average: Average, goes_on: bool = False) -> float:
        """Compute the mean log of the residuals, with equal weights for all intervals and pieces.

        In ten trainings lengths are half as far off as by the logs of sums over pieces.
        """
        return float(np.log(self._floored(self.residuals(average, goes_on))).mean())

    def _floored(self, left: FloatArray) -> FloatArray:
        """Count residuals as no less than a billionth of the motion."""
        left = np.maximum(left + self.rounding, 0)
        return np.asarray(left + 1e-9 * self.gram[..., 2, 2] + _NOTHING)

    def uneven_misfit(self, average: Average) -> float:
        """Compute the misfit if the weights moved from x to x' at any times within each
        interval."""
        b, _ = self.shares(average)
        return float(self._uneven_misfits(b, 0 * b).mean())

    def find_restarts(self, average: Average) -> Bools:
        """Find in which intervals the average began again from the weights: [intervals].

        Either it keeps B of what was before, y = B d + s v with any s, or it began again, y = s v,
        with no less of the motion than if it did so at once. Files that are two lengths apart or
        more do not show it.
        """
        b, s = self.shares(average)
        gains = self._uneven_misfits(b, 0 * b) - self._uneven_misfits(0 * b, s)
        usual = float(np.median(gains))
        if len(gains) < 3 or usual > -_RESTART:
            return np.zeros(len(gains), bool)
        spread = float(np.median(np.abs(gains - usual)))
        before = np.append(gains[1], gains[:-1])
        is_clear = gains > max(_RESTART, usual + _DEVIATIONS * spread)
        return np.asarray(is_clear & (before < -_RESTART / 2) & (b > _KEPT))

    def _uneven_misfits(self, b: FloatArray, least: FloatArray) -> FloatArray:
        """Compute the mean log of y - B d - s v with the best s from `least` to 1: [intervals].

        Weights 1 / residual in least squares never raise the mean log.
        """
        y, d, v = (self.gram[..., :3, row] for row in range(3))
        b = b[:, None]
        apart = y[..., 0] - 2 * b * y[..., 1] + b**2 * d[..., 1]
        along = y[..., 2] - b * d[..., 2]
        motion = v[..., 2]
        left = np.ones_like(motion)
        for _ in range(_ROUNDS):
            best = (along / left).sum(axis=1) / np.maximum((motion / left).sum(axis=1), _NOTHING)
            s = np.clip(best, least, 1)[:, None]
            left = self._floored(apart - 2 * s * along + s**2 * motion)
        return np.asarray(np.log(left).mean(axis=1))

    def fit(
        self,
        average: Average,
        is_near: bool = False,
        measure: Callable[[Average], float] | None = None,
    ) -> Average:
        """Find the length that leaves the smallest misfit, or the smallest other `measure`; with
        `is_near` near that of the average."""
        measure = measure or self.misfit
        low, high = average.limits(self.updates[-1])
        count = _GRID
        if is_near:
            low = max(low, min(average.log, high) - 2)
            high = min(high, average.log + 2)
            count = _GRID // 2

        def measure_at(log: float) -> float:
            return measure(replace(average, log=log))

        grid = np.linspace(low, high, count)
        best = int(np.argmin([measure_at(log) for log in grid.tolist()]))
        bounds = (grid[max(best - 1, 0)], grid[min(best + 1, count - 1)])
        options = {"xatol": 1e-4}
        found = minimize_scalar(measure_at, bounds=bounds, method="bounded", options=options)
        return replace(average, log=float(found.x))

    def uncertainty(self, average: Average) -> float:
        """Estimate the uncertainty of the logarithm of a length that `fit` found.

        It is what five signs say together: half of what the earlier and the later checkpoints
        differ by, and half of what the pieces that are explained well and badly do; what the motion
        before and after each interval changes, and a part of what motion at any times does; and
        0.02 of an interval in units of the length.
        """
        count = len(self.gram)
        if count < 2 or self.are_noise:
            return math.inf
        earlier = self.between(0, (count + 1) // 2)
        later = self.between(count // 2, count)
        shares = self.residuals(average).sum(axis=0) / self.motion.sum(axis=0)
        is_clear = shares <= np.median(shares)
        goes_on = self.fit(average, True, partial(self.misfit, goes_on=True))
        signs = [
            goes_on.log - average.log,
            (earlier.fit(average, True).log - later.fit(average, True).log) / 2,
        ]
        if not is_clear.all():
            clear = self.select_pieces(is_clear).fit(average, True)
            others = self.select_pieces(~is_clear).fit(average, True)
            signs.append((clear.log - others.log) / 2)
        spacing = float(np.median(self.counts)) / average.length(self.updates[-1])
        signs.append(_UNLIKE * spacing)
        uneven = self.fit(average, True, self.uneven_misfit)
        gain = self.uneven_misfit(average) - self.uneven_misfit(uneven)
        if gain > _SHOWN or spacing > FAR:
            signs.append(_UNEVEN * (uneven.log - average.log))
        return math.hypot(*signs)

    @property
    def motion(self) -> FloatArray:
        """The squared motion of the averages: [intervals, pieces]."""
        y = self.gram[..., 0, 0]
        d = self.gram[..., 1, 1]
        moved = y + d - 2 * self.gram[..., 0, 1]
        return np.maximum(moved, _NOTHING)

    @property
    def are_noise(self) -> bool:
        """Whether the weights forget between two checkpoints what moved them, so that no line
        describes their path."""
        undone = -self.gram[:-1, :, 2, 4].sum()
        motion = self.gram[..., 2, 2]
        return bool(undone > _UNDONE * np.sqrt(motion[:-1].sum() * motion[1:].sum()))

    @property
    def are_single(self) -> bool:
        """Whether one update alone explains each interval, y = b d + (1 - b) v, though weights that
        move on a line let many do."""
        gram = self.gram.sum(axis=1)
        squared_distance = gram[:, 0, 0] - 2 * gram[:, 0, 2] + gram[:, 2, 2]  # of y and v
        ways = gram[:, 1, 1] - 2 * gram[:, 1, 2] + gram[:, 2, 2]  # and of d and v
        both = gram[:, 0, 1] - gram[:, 0, 2] - gram[:, 1, 2] + gram[:, 2, 2]
        share = both / np.maximum(ways, _NOTHING)
        left = squared_distance - share * both
        taken_in = (1 - share) ** 2 * gram[:, 2, 2]
        rounding = self.rounding.sum(axis=1)
        is_single = left <= _SINGLE * taken_in + rounding
        is_exact = rounding <= _ROUNDED * taken_in
        squares = gram[:, 1, 1] * gram[:, 2, 2]
        differ = (squares - gram[:, 1, 2] ** 2 > _DIFFER * squares) & (share > _REMAINS)
        shown = differ & is_exact
        return shown.sum() > 1 and bool(is_single[shown].all())
