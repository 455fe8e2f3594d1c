"""Find the length that explains how an average moved between checkpoints of it and of the weights.

Let x and e be the weights and the average at one checkpoint, x' and e' those at the next one, m =
e' - e, d = e - x and v = x' - x. If the weights moved on the line from x to x', then

    m = s v - a d + residual,

where a is the mass of e' in the interval, and s the mean of its tail over the interval. Both follow
from how much the average forgets, which its rule says for each length. The sums of products of m, d
and v over the elements of a piece of a tensor (Gram matrices) suffice: the best length leaves the
smallest residuals. Rounding of stored averages adds a known variance to m and d, which is
subtracted.

Weights do not move on lines: they go back and forth, go on as they did, or come to rest as a rate
falls. `Intervals.uncertainty` says how far that may move a length: by the two halves of the
checkpoints, by the motion before and after each interval, which takes out what goes on, and by what
a alone shows, with any s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from posthoc_cli.checkpoints.audit_rules import ScaledRule
from posthoc_cli.profiles import FloatArray

Bools = npt.NDArray[np.bool_]

# Points of an interval at which the tail is computed: for an average as short as a hundredth of the
# interval, s is then off by 1e-3 of 1 - s.
_POINTS = 256
_UNLIKE = 0.02  # per interval / length: see `Intervals.uncertainty`
# Share of the difference between what lines and any motion show that counts as uncertainty, if it
# leaves so much less (mean log of squares), or files are so many lengths apart, where a line alone
# tells a length. Of 770 series of six motions, with rates constant, by a cosine and in cycles and
# files 0.1 to 10 lengths apart, 66, 97 and 100 % are within 1, 2 and 3 times the uncertainty;
# without it 49, 75 and 82 %.
_UNEVEN = 0.7
_SHOWN = 0.05
FAR = 2.0
# With rates that fall by a cosine within each interval, and files 10 lengths apart.
_LOOSE = 5.0
# Residuals that count as none, as a share of the motion of the weights in an interval, and of their
# usual motion: smaller ones are exact only after a spike, where weights go back as they came.
_LEAST_SHARE = 0.005
_LEAST_USUAL = 1e-6
ENOUGH = 64  # elements of a piece, more of which count no more
_ROUNDS = 6  # after which the mean log no longer falls by 0.001
# Share of a motion that the next one undoes: 0.5 for white noise, 0 for a random walk. With more
# than this (noise of 10 steps about a minimum, files 30 steps apart: 0.48) a length was 1.7 times
# too long, and not in doubt by the other signs.
_UNDONE = 0.4
# Uncertainty by the square of that share, if it is less. Of 32 series of noise about a minimum
# that forgets in 6 to 250 steps, alone or with a walk, files 50 steps and 0.1 to 1 lengths apart,
# 24 were not called noise: lengths were off by up to 6.0 times the uncertainty without this, and
# by 2.1 with it (1.3 where the noise forgets in 12 steps or more).
_BACK = 0.7
NOTHING = 1e-12  # of a piece's motion: a residual that counts as none
_LEAST = 1e-9  # of an interval's: what float32 leaves of a motion that is explained
_SPACING = 0.3  # of the logarithms of lengths at which a search begins
_FLAT = 1e-9  # difference of misfits that shows nothing: of lengths that do not limit a decay
_NEAR = 2.0  # how far a search near a length goes, in its logarithm

# Rules explain n intervals about equally if their misfits, times n, differ by less than this /
# sqrt(n). Of 13 rules and 10 recorded trainings the true rule was within 0.42 of the best one with
# 5 files, and within 0.23 with 20.
_ALIKE = 1.2
# Another rule explains n intervals clearly better than a claimed one if its misfit, times n, is
# less by 1 and this for each interval: of 13 rules and 4 trainings with files 20, 100 and 300 steps
# apart no other one explained them better than the true rule by more than 0.7 with 15 files, and
# 1.9 with 75; a constant decay was worse than a schedule by 3.6.
_CLEARLY = 0.05
_SAME = 0.06  # averages are the same if their tails differ by less
TOLD = 0.2  # and up to this one another rule is told, or a length by files that are far apart

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

    The rows of a Gram matrix are m, d and v, and the motions of the weights in the interval before
    and the one after. Each piece counts relative to the motion of its weights.
    """

    updates: FloatArray  # of the average by each checkpoint: [intervals + 1]
    gram: FloatArray  # [intervals, pieces, 5, 5]
    rounding: FloatArray  # of the stored averages: [intervals, pieces]
    sizes: FloatArray  # numbers of elements: [pieces]

    def between(self, first: int, last: int) -> Intervals:
        """Select the intervals from one checkpoint to another."""
        updates = self.updates[first : last + 1]
        return replace(
            self, updates=updates, gram=self.gram[first:last], rounding=self.rounding[first:last]
        )

    def select_pieces(self, pieces: Bools) -> Intervals:
        return replace(
            self,
            gram=self.gram[:, pieces],
            rounding=self.rounding[:, pieces],
            sizes=self.sizes[pieces],
        )

    @property
    def without_trend(self) -> Intervals:
        """The intervals without what the motion before and after each explains."""
        near = self.gram[..., 3:]
        others = near[..., 3:, :]
        size = np.trace(others, axis1=2, axis2=3)[..., None, None]
        regular = others + (1e-9 * size + 1e-300) * np.eye(2)
        explained = near @ np.linalg.solve(regular, np.swapaxes(near, 2, 3))
        rounding = self.rounding + _LEAST * self.gram[..., 2, 2]
        return replace(self, gram=self.gram - explained, rounding=rounding)

    @property
    def blurred(self) -> Intervals:
        """The intervals with residuals that are never nearly 0."""
        left = _LEAST_SHARE * self.gram[..., 2, 2] + _LEAST_USUAL
        return replace(self, rounding=self.rounding + left)

    # --- what it consists of

    @property
    def counts(self) -> FloatArray:
        """The number of updates in each interval."""
        return np.diff(self.updates)

    @property
    def motion(self) -> FloatArray:
        """The squared motion of the averages: [intervals, pieces]."""
        return np.maximum(self.gram[..., 0, 0], NOTHING)

    @property
    def undone(self) -> float:
        """The share of the weights' motion that the next interval undoes."""
        undone = -self.gram[:-1, :, 2, 4].sum()
        motion = self.gram[..., 2, 2]
        size = np.sqrt(motion[:-1].sum() * motion[1:].sum())
        return float(undone / max(size, NOTHING))

    @property
    def are_noise(self) -> bool:
        """Whether the weights forget between two checkpoints what moved them, so that no line
        describes their path."""
        return self.undone > _UNDONE

    @property
    def are_single(self) -> bool:
        """Whether one update alone explains each interval, m = a (v - d), though weights that move
        on a line let many do."""
        m, d, v = (self.gram[..., row].sum(axis=1) for row in range(3))
        towards = m[:, 2] - m[:, 1]
        distance = v[:, 2] - 2 * v[:, 1] + d[:, 1]  # of the average and the later weights, squared
        a = towards / np.maximum(distance, NOTHING)
        left = m[:, 0] - a * towards
        taken_in = a**2 * v[:, 2]
        rounding = self.rounding.sum(axis=1)
        is_single = left <= _SINGLE * taken_in + rounding
        squares = d[:, 1] * v[:, 2]
        differ = (squares - d[:, 2] ** 2 > _DIFFER * squares) & (a < 1 - _REMAINS)
        shown = differ & (rounding <= _ROUNDED * taken_in)
        return shown.sum() > 1 and bool(is_single[shown].all())

    # --- what an average leaves

    def shares(self, scaled: ScaledRule) -> tuple[FloatArray, FloatArray]:
        """Compute a and s: [intervals] each."""
        begin = self.updates[:-1, None]
        end = self.updates[1:, None]
        counts = np.maximum(end - begin, 1)
        points = int(min(counts.max(), _POINTS))
        places = (np.arange(points) + 0.5) / points
        passed = np.maximum(places * counts - 0.5, 0)
        lost = scaled.forgotten(np.hstack([begin + passed, begin, end]))
        tails = 1 - np.exp(lost - lost[:, -1:])
        return tails[:, -2], tails[:, :-2].mean(axis=1)

    def residuals(self, scaled: ScaledRule) -> FloatArray:
        """Compute the squared norms of m + a d - s v: [intervals, pieces].

        They are negative where averages that hardly moved are rounded alike, so that less than the
        variance of two roundings is left.
        """
        return self._residuals(*self.shares(scaled))

    def _residuals(self, a: FloatArray, s: FloatArray) -> FloatArray:
        factors = np.stack([np.ones_like(a), 2 * a, -2 * s, a**2, -2 * a * s, s**2], axis=1)
        return np.asarray((factors[:, None] @ self._products)[:, 0])

    @cached_property
    def _products(self) -> FloatArray:
        """The products of m, d and v: mm, md, mv, dd, dv and vv, [intervals, 6, pieces]."""
        rows, columns = np.triu_indices(3)
        return np.ascontiguousarray(np.moveaxis(self.gram[..., rows, columns], 2, 1))

    def misfit(self, scaled: ScaledRule) -> float:
        """Compute the mean log of the residuals, with equal weights for all intervals.

        In ten trainings lengths are half as far off as by the logs of sums over pieces.
        """
        return float(self.mean(self.even_logs(*self.shares(scaled))).mean())

    def even_logs(self, a: FloatArray, s: FloatArray) -> FloatArray:
        """Compute the logs of m + a d - s v, squared: [intervals, pieces]."""
        return np.asarray(np.log(self._floored(self._residuals(a, s))))

    def mean(self, pieces: FloatArray) -> FloatArray:
        """Compute the mean over pieces; those of few elements count less: what they leave may be
        0."""
        return np.asarray(pieces @ self._weights)

    @cached_property
    def _weights(self) -> FloatArray:
        """What each piece counts: [pieces]."""
        counted = np.minimum(self.sizes, ENOUGH)
        return np.asarray(counted / counted.sum())

    def _floored(self, left: FloatArray) -> FloatArray:
        """Count residuals as no less than a part of the motion."""
        left = left + self.rounding
        return np.asarray(np.maximum(left, 0, out=left) + self._least)

    @cached_property
    def _least(self) -> FloatArray:
        """What counts as nothing left: [intervals, pieces]."""
        return np.asarray(_LEAST * self._products[:, 5] + NOTHING)

    def uneven_misfit(self, scaled: ScaledRule) -> float:
        """Compute the misfit if the weights moved from x to x' at any times within each
        interval."""
        return float(self.uneven_misfits(scaled).mean())

    def uneven_misfits(self, scaled: ScaledRule) -> FloatArray:
        """Compute the same for each interval: [intervals]."""
        a, _ = self.shares(scaled)
        return self.mean(self.uneven_logs(a, 0 * a, 1 + 0 * a))

    def loose_misfit(self, scaled: ScaledRule) -> float:
        """Compute the misfit if the weights moved so unevenly within each interval that averages
        look up to `_LOOSE` times as short or as long.

        Whenever they moved, no average takes in more of a motion than of weights that are constant.
        """
        a, s = self.shares(scaled)
        most = np.minimum(a, 1 - (1 - s) / _LOOSE)
        least = np.clip(1 - _LOOSE * (1 - s), 0, most)
        return float(self.mean(self.uneven_logs(a, least, most)).mean())

    def uneven_logs(self, a: FloatArray, least: FloatArray, most: FloatArray) -> FloatArray:
        """Compute the same logs with the best s between limits: [intervals, pieces].

        Weights 1 / residual in least squares never raise the mean log.
        """
        along = np.swapaxes(self._products[:, (2, 4, 5)], 1, 2)  # m, d and v along v
        left = np.ones_like(self.rounding)
        for _ in range(_ROUNDS):
            m, d, v = ((self._weights / left)[:, None] @ along)[:, 0].T
            s = np.clip((m + a * d) / np.maximum(v, NOTHING), least, most)
            left = self._floored(self._residuals(a, s))
        return np.asarray(np.log(left))

    # --- the best length

    def fit(self, scaled: ScaledRule, reach: float = math.inf) -> ScaledRule:
        """Find the length that leaves the smallest misfit, no farther from the average's."""
        return _search(scaled, self.misfit, reach)

    def uncertainty(self, scaled: ScaledRule) -> float:
        """Estimate the uncertainty of the logarithm of a length that `fit` found.

        It is what six signs say together: half of what the earlier and the later checkpoints
        differ by, and half of what the pieces that are explained well and badly do; what the motion
        before and after each interval changes, and a part of what motion at any times does; what
        each motion undoes of the one before; and 0.02 of an interval in units of the length.
        """
        count = len(self.gram)
        if count < 2 or self.are_noise:
            return math.inf
        spacing = float(np.median(self.counts)) / scaled.length
        earlier = self.between(0, (count + 1) // 2)
        later = self.between(count // 2, count)
        signs = [
            _UNLIKE * spacing,
            _BACK * max(self.undone, 0.0) ** 2,
            self.without_trend.fit(scaled, _NEAR).log - scaled.log,
            _half_difference(scaled, earlier, later),
        ]
        shares = self.residuals(scaled).sum(axis=0) / self.motion.sum(axis=0)
        is_clear = shares <= np.median(shares)
        if not is_clear.all():
            clear = self.select_pieces(is_clear)
            signs.append(_half_difference(scaled, clear, self.select_pieces(~is_clear)))
        uneven = _search(scaled, self.uneven_misfit, _NEAR)
        gain = self.uneven_misfit(scaled) - uneven.misfit
        if gain > _SHOWN or spacing > FAR:
            signs.append(_UNEVEN * (uneven.log - scaled.log))
        return math.hypot(*signs)


def _half_difference(scaled: ScaledRule, rows: Intervals, others: Intervals) -> float:
    """Compute half of what two selections of intervals show differently."""
    return (rows.fit(scaled, _NEAR).log - others.fit(scaled, _NEAR).log) / 2


def _search(scaled: ScaledRule, measure: Callable[[ScaledRule], float], reach: float) -> ScaledRule:
    """Find the length with the smallest measure, which becomes the misfit, no farther from the
    given one than `reach`, between logarithms; that one if the intervals do not limit it, as before
    the end of a warm-up."""

    def measure_at(log: float) -> float:
        return measure(replace(scaled, log=log))

    low, high = scaled.limits
    low = max(low, scaled.log - reach)
    high = min(high, scaled.log + reach)
    grid = np.linspace(low, high, math.ceil((high - low) / _SPACING) + 2)
    if low < scaled.log < high:
        grid = np.union1d(grid, scaled.log)
    best = int(np.argmin([measure_at(log) for log in grid.tolist()]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    from scipy.optimize import minimize_scalar  # late: it takes as long as many an audit

    options = {"xatol": 1e-4}
    found = minimize_scalar(measure_at, bounds=bounds, method="bounded", options=options)
    log = float(found.x)
    if abs(measure(scaled) - found.fun) <= _FLAT:
        log = scaled.log
    return replace(scaled, log=log, misfit=float(found.fun))


# --- which average explains the intervals


@dataclass(frozen=True)
class Explanation:
    """The averages that explain intervals."""

    rows: Intervals
    claim: ScaledRule | None
    possible: Sequence[ScaledRule]  # of unknown decay, by each rule, the simplest first

    @property
    def equal_within(self) -> float:
        """The difference of misfits at which rules explain the intervals about equally."""
        return float(_ALIKE / len(self.rows.gram) ** 1.5)

    @cached_property
    def equal(self) -> list[ScaledRule]:
        """The averages that explain the intervals about equally, the simplest first."""
        fits = [self.rows.fit(scaled) for scaled in self.possible]
        least = min(fit.misfit for fit in fits)
        return [fit for fit in fits if fit.misfit < least + self.equal_within]

    @cached_property
    def alike(self) -> list[ScaledRule]:
        """Those of them that end like the one that explains the intervals best."""
        best = min(self.equal, key=lambda fit: fit.misfit)
        return [fit for fit in self.equal if self._end_difference(fit, best) <= _SAME]

    @cached_property
    def simplest(self) -> ScaledRule:
        """The simplest of them, of unknown decay."""
        return self.alike[0]

    @cached_property
    def best(self) -> ScaledRule:
        """The average that the verdict is about: the claimed one at the best length, unless another
        rule explains the intervals clearly better."""
        claimed = self.claimed
        if claimed is None:
            return self.simplest
        least = _CLEARLY + 1 / len(self.rows.gram)
        is_better = self.simplest.misfit < claimed.misfit - least
        is_told = is_better and self._uncertainty(self.simplest) <= TOLD
        return self.simplest if is_told else claimed

    @cached_property
    def claimed(self) -> ScaledRule | None:
        """The claimed average, at the best length."""
        return self.claim and self.rows.fit(self.claim)

    def _end_difference(self, one: ScaledRule, other: ScaledRule) -> float:
        """Compute what the tails of two averages differ by at the newest checkpoint."""
        updates = np.append(0.0, self.rows.updates)
        return float(np.abs(one.tails(updates) - other.tails(updates)).max())

    @cached_property
    def sigma(self) -> float:
        """The uncertainty of its length; without a claim also of its rule.

        Tails of lengths that differ by a factor 1 + u differ by u / e at most.
        """
        sigma = self._uncertainty(self.best)
        if self.claim:
            return sigma
        differences = [self._end_difference(fit, self.best) for fit in self.equal]
        return math.hypot(sigma, math.e * max(differences))

    def _uncertainty(self, fit: ScaledRule) -> float:
        """Estimate the uncertainty of a length; for a decay that rises, by how much more or less
        often it may be applied."""
        if not fit.rises:
            return self.rows.uncertainty(fit)
        often = self.rows.fit(replace(fit, rule=fit.fitted, is_known=True))
        return math.hypot(often.log, self.rows.uncertainty(often))

    @cached_property
    def own(self) -> list[ScaledRule]:
        """The averages that explain each interval alone."""
        return [self.fit_alone(index) for index in range(len(self.rows.gram))]

    def fit_alone(self, index: int) -> ScaledRule:
        """Find the average that explains an interval alone; its misfit is relative to the best
        average's, if the weights moved at any times within the interval."""
        row = self.rows.between(index, index + 1)
        fit = row.fit(self.best)
        row = row.blurred
        misfit = row.uneven_misfit(fit) - row.uneven_misfit(self.best)
        return replace(fit, misfit=misfit)

    @property
    def unexplained(self) -> FloatArray:
        """The share of the average's motion in each interval that is left unexplained, as an L2
        norm: in the median over the pieces, since one of them may have been scaled for some
        steps."""
        shares = np.maximum(self.rows.residuals(self.best), 0) / self.rows.motion
        return np.sqrt(np.median(shares, axis=1))
