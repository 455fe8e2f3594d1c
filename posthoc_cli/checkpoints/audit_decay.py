"""Find the decay that explains how an average moved between checkpoints of it and of the weights;
and its uncertainty.

Let x and e be the weights and the average at one checkpoint, x' and e' those at the next one, d = e
- x, v = x' - x and y = e' - x. If the weights moved on the line from x to x', then

    y = B d + s v + residual,

where B is the mass of e' from before the interval, and s the mean of its tail over the interval.
Both follow from how much the average forgets, which a `Model` says. The sums of products of y, d, v
and the weights' next motion over the elements of a piece of a tensor (Gram matrices) suffice: the
best value has the smallest residuals, each weighted by the inverse of its piece's. Rounding of
stored averages adds a known variance to d and y, which is subtracted.

Weights do not move on lines. Where they slow down within an interval, or go on as they did, the
residual is a multiple of v, and the value is too short; with an s of its own for each piece and
interval it is right. Where they go back and forth (noise), both are too long, the latter more: then
the residual goes with the next motion. The noise n of x and n' of x' leaves -(1 - B - s) n - s n'
in the residual, whose products with d and v are (1 - B - s) and (1 - B - 2 s) times the variance of
n. A third value makes the two agree. The differences of the three are a part of the uncertainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar

from posthoc_cli.profiles import (
    POWER_FUNCTION,
    WARM_UPS,
    DecayRule,
    FloatArray,
    sigma_rel_from_gamma,
)

_POINTS = 512  # most points in an interval at which the tail of the average is computed
_EVERYTHING = 1000.0  # -log of the share that remains after a restart, which is 0 in float64
# The first so many updates are added one by one, and as many groups of later ones: of 1,000,000
# updates a group spans 1.5 %.
_UPDATES = 512
# Rules explain files about equally if their log residuals, summed over n intervals, differ by less
# than this / sqrt(n). Of 13 rules and 10 recorded trainings the true rule was within 0.42 of the
# best one with 5 files, and within 0.23 with 20.
_ALIKE = 1.2
_USUAL = ("", "ratio", "power", "ramp-up")
# Rules are the same if their tails differ by less: a warm-up "power" and "ratio" up to 0.99 do by
# 0.052 in the first of 20 intervals.
_SAME = 0.06
# Correlation of residuals with the next motion from which on weights count as going back and forth:
# -0.04 to 0.06 in trainings with momentum, 0.10 without it, 0.25 at batches of 16, 0.4 for white
# noise.
_REVERTING = 0.1
# Optimizers with momentum move a length by this share of the time between checkpoints: 1.2 to 1.9
# steps of 100, for lengths from 10 to 300.
_MOMENTUM = 0.015
_FAR = 3.0  # factor in length that no noise explains
_STEP = 0.01  # difference of logarithms for the derivatives of a sum of residuals

CONSTANT = DecayRule()


@dataclass(frozen=True)
class Model:
    """An average whose updates follow a rule, and which began from the weights at each of the
    `starts`."""

    rule: DecayRule = CONSTANT
    claimed: float | None = None  # the claimed value
    # What it forgets in a unit of time after a warm-up, or before a schedule, or gamma + 1 of a
    # power function. Of a claimed decay that changes a factor of what each update forgets: k for an
    # average that is updated k times a step.
    value: float = 1.0
    every: float = 1.0  # time between updates, 0 if they are many
    starts: tuple[float, ...] = (0.0,)

    @property
    def is_power(self) -> bool:
        return self.rule.warm_up == POWER_FUNCTION

    @property
    def changes(self) -> bool:
        """Whether updates forget unequally; one copy alone is no more than a start."""
        return not self.is_power and bool(self.rule.warm_up or self.rule.copies > 1)

    @property
    def fitted(self) -> DecayRule:
        """The rule with the decay that a search has found; a claimed rule as it is."""
        if self.claimed is not None or self.is_power:
            return self.rule
        if self.rule.is_schedule:
            return replace(self.rule, base=self.parameter)
        return replace(self.rule, decay=self.parameter)

    @property
    def unit(self) -> float:
        """What the value 1 forgets in a unit of time after a warm-up."""
        if self.claimed is None or not self.changes:
            return 1.0
        decay = self.rule.base if self.rule.is_schedule else self.rule.decay
        return -math.log(decay) / self.every

    @property
    def length(self) -> float:
        """The time constant after a warm-up, or the sigma_rel."""
        if self.is_power:
            # gamma 0 is that of the longest one
            return sigma_rel_from_gamma(max(self.value - 1, 1e-300))
        return self.every / -math.expm1(-self.value * self.unit * self.every)

    @property
    def parameter(self) -> float:
        """The decay of one update after a warm-up, or the sigma_rel."""
        return self.length if self.is_power else 1 - self.every / self.length

    def parameter_at(self, t: float) -> float:
        """Return the decay of the update at a time, or the sigma_rel, or a schedule's base."""
        if self.is_power or self.rule.is_schedule:
            return self.parameter
        return math.exp(-self._lost_at(t))

    def length_at(self, t: float) -> float:
        """Return the time constant at a time."""
        return self.every / max(-math.expm1(-self._lost_at(t)), 1e-300)

    def _lost_at(self, t: float) -> float:
        before, after = self.forgotten(np.array([t - self.every, t])).tolist()
        return float(after - before)

    def scaled(self, log: float) -> Model:
        return replace(self, value=self.value * math.exp(log))

    def begun(self, *starts: float) -> Model:
        return replace(self, starts=tuple(sorted({*self.starts, *starts})))

    def forgotten(self, t: FloatArray) -> FloatArray:
        """Return -log of the share that remains of an earlier mass, at each time, up to a
        constant."""
        starts = np.array(self.starts)
        last = np.maximum(np.searchsorted(starts, t, "right") - 1, 0)
        since = t - starts[last]
        if self.is_power:
            lost = self.value * np.log(np.maximum(since, self.every or 1e-300))
        elif not self.changes:
            lost = self.value * since
        else:
            numbers = (t if self.rule.is_schedule else since) / self.every
            lost = self._lost(np.maximum(numbers, 0.0))
        return np.asarray(_EVERYTHING * last + lost)

    def _lost(self, numbers: FloatArray) -> FloatArray:
        """Return -log of what so many updates keep together, with fractions."""
        factor = 1.0 if self.claimed is None else self.value
        most = max(float(numbers.max()), _UPDATES + 1.0)
        later = np.geomspace(_UPDATES, most, _UPDATES)
        ends: FloatArray = np.append(np.arange(float(_UPDATES)), later)
        kept = self.fitted.at((ends[1:] + ends[:-1] + 1) / 2)
        lost = -np.log(np.maximum(kept, 1e-300)) * np.diff(ends)
        return np.asarray(factor * np.interp(numbers, ends, np.append(0.0, np.cumsum(lost))))

    def tails(self, times: FloatArray) -> FloatArray:
        """Return what the average at each time has of each earlier one: [times, times]."""
        forgotten = self.forgotten(times)
        return np.tril(np.exp(np.minimum(forgotten - forgotten[:, None], 0.0)))


def possible_rules(updates: float) -> list[DecayRule]:
    """Return the rules that an average may follow of which nothing is said; schedules end after so
    many updates."""
    rules = [
        CONSTANT,
        DecayRule(warm_up="power", power=0.75),
        DecayRule(warm_up=POWER_FUNCTION),
    ]
    for name, row in WARM_UPS.items():
        rule = DecayRule(warm_up=name, steps=updates)
        rules.append(rule.with_number(row.usual) if row.usual else rule)
    return rules


# --- the checkpoints, and the intervals between them


@dataclass(frozen=True)
class Series:
    """Elements of the weights and of an average at n times, by piece of a tensor."""

    times: FloatArray  # [n]
    # of each piece, the weights and the averages: [2, n, elements]
    values: Sequence[npt.NDArray[np.floating]]
    rounding: FloatArray  # squared rounding error of each piece of the averages: [n, pieces]

    def intervals(self) -> Intervals:
        """Return the Gram matrices between successive times, without the variance of rounding in
        them."""
        grams = []
        for values in self.values:
            x, e = values.astype(np.float64)
            motion = x[1:] - x[:-1]
            following = np.vstack([motion[1:], np.zeros_like(motion[:1])])
            rows = np.stack([e[1:] - x[:-1], e[:-1] - x[:-1], motion, following], axis=1)
            grams.append(rows @ rows.swapaxes(1, 2))
        gram = np.stack(grams, axis=1)
        before = self.rounding[:-1]
        after = self.rounding[1:]
        gram[..., 0, 0] = np.maximum(gram[..., 0, 0] - after, 0)
        gram[..., 1, 1] = np.maximum(gram[..., 1, 1] - before, 0)
        return Intervals(self.times[:-1], self.times[1:], gram, before + after)


@dataclass(frozen=True)
class Intervals:
    """Sums of products between checkpoints, by interval and piece."""

    begin: FloatArray  # [intervals]
    end: FloatArray  # [intervals]
    gram: FloatArray  # of y, d, v and the next interval's v: [intervals, pieces, 4, 4]
    rounding: FloatArray  # its variance: [intervals, pieces]

    def __getitem__(self, rows: Sequence[int]) -> Intervals:
        return Intervals(self.begin[rows], self.end[rows], self.gram[rows], self.rounding[rows])

    @property
    def _motion(self) -> FloatArray:
        """The squared norms of v, above 0 also for a piece that stands still."""
        motion = self.gram[..., 2, 2]
        return np.asarray(np.maximum(motion, 1e-20 * motion.max() + 1e-300))

    def shares(self, model: Model) -> tuple[FloatArray, FloatArray]:
        """Return B and s, [intervals, 1]; s is a mean of at most `_POINTS` updates."""
        begin = self.begin[:, None]
        length = (self.end - self.begin)[:, None]
        counts = np.full(length.shape, float(_POINTS))
        if model.every:
            counts = np.maximum(length / model.every, 1)
        points = int(min(counts.max(), _POINTS))
        updates = (np.arange(points) + 0.5) * (counts / points) - 0.5
        inner = begin + updates * (length / counts)
        forgotten = model.forgotten(np.hstack([inner, begin, self.end[:, None]]))
        kept = np.exp(np.minimum(forgotten[:, :-1] - forgotten[:, -1:], 0))
        return kept[:, -1:], 1 - kept[:, :-1].mean(axis=1, keepdims=True)

    def products(self, model: Model, bends: bool = False) -> FloatArray:
        """Return the products of y - B d - s v with itself and with y, d, v and the next v:
        [intervals, pieces, 5].

        With `bends` each piece has in each interval the s that makes its residual least.
        """
        b, s = self.shares(model)
        without = self.gram[..., 0, :] - b[..., None] * self.gram[..., 1, :]
        if bends:
            s = without[..., 2] / self._motion
        products = without - s[..., None] * self.gram[..., 2, :]
        square = products[..., 0] - b * products[..., 1] - s * products[..., 2]
        return np.concatenate([square[..., None], products], axis=-1)

    def residuals(self, model: Model, bends: bool = False) -> FloatArray:
        """Return the squared norms of y - B d - s v: [intervals, pieces]."""
        return np.asarray(self.products(model, bends)[..., 0])

    def unexplained(self, model: Model) -> FloatArray:
        """Return the sums of residuals, each divided by that of its piece if nothing is explained:
        [intervals]."""
        moved = np.einsum("ipjj->ip", self.gram[..., :3, :3]).clip(1e-300)
        return np.asarray((self.residuals(model) / moved).sum(axis=1))

    def weights(self, residuals: FloatArray) -> FloatArray:
        """Return the weights of squared residuals: the inverse of what is left, and of no less than
        1e-4 of the motion."""
        moved = self.gram[..., 0, 0] + self.gram[..., 2, 2]
        least = 1e-20 * moved.max() + 1e-300  # above 0 also for a piece that stands still
        left = np.maximum(residuals, 0) + self.rounding
        return np.asarray(1 / np.maximum(left, 1e-4 * self.gram[..., 2, 2] + least))

    def search(
        self,
        model_of: Callable[[float], Model],
        grid: FloatArray,
        near: float | None = None,
        bends: bool = False,
    ) -> float:
        """Return the value whose model has the smallest residuals, each weighted by its inverse.

        With `near` it is the minimum that leads down from there.
        """
        weights = self.weights(self.gram[..., 0, 0] + self.gram[..., 2, 2])

        def cost(value: float) -> float:
            return float((self.residuals(model_of(value), bends) * weights).sum())

        for _ in range(4):
            costs = [cost(value) for value in grid.tolist()]
            best = int(np.argmin(costs))
            if near is not None:
                best = _descend(costs, int(np.abs(np.log(grid / max(near, grid[0]))).argmin()))
            low = grid[max(best - 1, 0)]
            high = grid[min(best + 1, len(grid) - 1)]
            exact = {"xatol": 1e-5 * (high - low)}
            found = minimize_scalar(cost, bounds=(low, high), method="bounded", options=exact)
            value = float(found.x)
            if near is not None:
                near = value
            weights = self.weights(self.residuals(model_of(value), bends))
            after = int(np.searchsorted(grid, value))
            grid = grid[max(after - 6, 0) : after + 6]
        return value

    def fit(self, model: Model, near: float | None = None, bends: bool = False) -> Model:
        """Return the model with the value that explains the intervals best.

        Values to try are those of lengths from 1/100 of the least interval to 100 times the run.
        """
        grid = np.geomspace(1.0, 2000.0, 60)
        if not model.is_power:
            shortest = max(float((self.end - self.begin).min()) / 100, model.every / 20)
            grid = np.geomspace(0.01 / (self.end[-1] - self.begin[0]), 1 / shortest, 60)
        value = self.search(
            lambda value: replace(model, value=value), grid / model.unit, near, bends
        )
        return replace(model, value=value)

    def misfit(self, model: Model, bends: bool = False) -> float:
        """Return the log residuals, a mean over the pieces, summed over the intervals."""
        left = np.maximum(self.residuals(model, bends), 0) + self.rounding
        return float(np.log(np.maximum(left, 1e-300)).mean(axis=1).sum())

    # --- the uncertainty of a value

    def spread(self, model: Model, bends: bool) -> float:
        """Return how far a value that fits best varies if intervals, or pieces, are left out,
        relative: the larger jackknife estimate, from derivatives."""
        weights = self.weights(self.residuals(model, bends))
        less, middle, more = (
            weights * self.residuals(model.scaled(log), bends) for log in (-_STEP, 0.0, _STEP)
        )
        slope = (more - less) / (2 * _STEP)
        curvature = float((more + less - 2 * middle).sum()) / _STEP**2
        if curvature <= 0:
            return math.inf
        return max(float(np.linalg.norm(slope.sum(axis=axis))) for axis in (0, 1)) / curvature

    def reversion(self, model: Model) -> float:
        """Return the mean correlation of residuals, without their part along v, with the next
        motion."""
        products = self.products(model, bends=True)
        along = self.gram[..., 2, 3] / self._motion
        both = (products[..., 4] - along * products[..., 3])[:-1]
        weights = self.weights(products[..., 0])[:-1]
        return float(np.mean(both * np.sqrt(weights / self._motion[1:])))

    def without_noise(self, model: Model) -> float:
        """Return the logarithm of the factor by which a value changes if noise is allowed for."""
        weights = self.weights(self.residuals(model))
        logs = np.linspace(-2.0, 2.0, 81)
        differences = np.array([self._disagreement(model.scaled(log), weights) for log in logs])
        changes = np.flatnonzero(differences[1:] * differences[:-1] <= 0)
        if changes.size:
            before = changes[np.abs(logs[changes]).argmin()]
            low, high = differences[before : before + 2]
            return float(logs[before] + 0.05 * low / (low - high or 1.0))
        return float(logs[np.abs(differences).argmin()])

    def _disagreement(self, model: Model, weights: FloatArray) -> float:
        b, s = self.shares(model)
        products = self.products(model)
        noise = products[..., 2] * (1 - b - 2 * s) - products[..., 3] * (1 - b - s)
        return float((weights * noise).sum())


def _descend(costs: Sequence[float], index: int) -> int:
    """Return the place of the minimum that leads down from an index."""
    while costs[index] > min(costs[max(index - 1, 0) : index + 2]):
        is_next_less = index + 1 < len(costs) and costs[index + 1] < costs[index]
        index += 1 if is_next_less else -1
    return index


# --- the rule, and the length with its uncertainty


def best_models(model: Model, rules: Sequence[DecayRule], rows: Intervals) -> list[Model]:
    """Return the model of the rule that explains the intervals best, then those of other rules that
    explain them about as well.

    Rules that few libraries have count as worse by as much as is about equal.
    """
    alike = _ALIKE / math.sqrt(len(rows.begin))
    misfits = []
    for rule in rules:
        fitted = rows.fit(replace(model, rule=rule))
        handicap = 0.0 if rule.warm_up in _USUAL else alike
        misfits.append((rows.misfit(fitted) + handicap, fitted))
    misfits.sort(key=lambda pair: pair[0])
    limit = misfits[0][0] + alike
    return [fitted for misfit, fitted in misfits if misfit <= limit]


def are_the_same(one: Model, other: Model, times: FloatArray) -> bool:
    """Return whether two models make about the same averages at these times."""
    return bool(np.abs(one.tails(times) - other.tails(times)).max() <= _SAME)


def refutes(rows: Intervals, model: Model) -> bool:
    """Return whether the intervals show that a length is far from the claimed one, whose value the
    files explain worse, also if weights bend."""
    if model.claimed is None:
        return False
    claim = replace(model, value=model.claimed)
    if abs(math.log(model.length / claim.length)) < math.log(_FAR):
        return False
    return all(rows.misfit(model, bends) + 1 < rows.misfit(claim, bends) for bends in (False, True))


def refine(model: Model, rows: Intervals) -> tuple[Model, float]:
    """Return the model with the value that allows for bends and noise between checkpoints, and its
    length's relative uncertainty."""
    if len(rows.begin) < 2:  # one interval shows none
        return model, math.inf
    noise = min(max(rows.reversion(model) / _REVERTING, 0.0), 1.0)
    noiseless = rows.without_noise(model)
    bent = math.log(rows.fit(model, model.value, bends=True).value / model.value)
    # A value that bends make shorter comes from noise, and is not taken. Little noise makes a value
    # uncertain, and does not move it: of long averages that would cost more than it gains.
    moved = max(2 * noise - 1, 0.0)
    found = model.scaled((1 - moved) * min(bent, 0.0) + moved * noiseless / 2)
    parts = [noise * noiseless, (1 - noise) * bent, rows.spread(model, bends=False)]
    if noise < 1:
        parts.append(rows.spread(model, bends=True))
    if not model.is_power:
        parts.append(_MOMENTUM * float(np.median(rows.end - rows.begin)) / found.length)
    return found, math.hypot(*parts)
