"""Find where an average breaks: checkpoints that hold it and the weights in exchanged places, and
intervals in which it forgets faster than before; NumPy, float64.

No claim, and no rule that is fitted to all intervals, enters: what breaks in one would spoil it.
Each interval alone shows how well each of many rates explains it, a rate being the part of an
average that an update forgets. By every rule an average keeps its length or grows longer: its rates
never rise. What rates that rise once explain better than the best ones that never do is the sign
of an average, or of a warm-up of its decay, that began again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import numpy as np

from posthoc_cli.checkpoints.audit_fit import NOTHING, Bools, Intervals
from posthoc_cli.profiles import FloatArray

_RATES = 100  # in a table: of lengths from 50 intervals down to a twentieth of one


@dataclass(frozen=True)
class _Limit:
    """What a rate that rises must explain (mean log of squares) to be a sign."""

    least: float
    intervals: float  # how many that have rates of their own it must explain as much as
    change: float  # by how much a or s is larger with the rate after than with the one before

    def compare(self, gains: FloatArray, table: FloatArray) -> FloatArray:
        alone = _least_sums(table)[:, -1].min() - table.min(axis=0).sum()
        others = np.maximum(alone - gains, 0) / len(gains)
        return np.asarray(gains / (self.least + self.intervals * others))


# Of an average that began again (by a), and of a rate that rose, and does so without any one
# interval after as well (by s). Of 1,400 healthy series of 36 trainings, four of them with spikes
# of the gradient and five of 129 parameters, three are accused by these numbers; of 36 averages
# each that began again, with files 0.3, 0.5, 0.7, 1 and 1.3 lengths apart, 35, 34, 32, 30 and 22
# are found, and of 94 whose warm-up did 84.
_BEGAN = _Limit(0.25, 2.0, 0.05)
_ROSE = _Limit(0.3, 10.0, 0.2)
_DOUBTED = 0.2  # of a sign: 3 % of the healthy series have as much

# Places are exchanged if that explains so much more. Of 236 series with the right ones, of
# trainings and of made-up motions, it explains 0.15 more at most; of 8 trainings with exchanged
# ones 1.1 at least; of made-up motions with files 10 lengths apart often less than the limit.
_EXCHANGED = 0.5


@dataclass(frozen=True)
class _Tables:
    """How well each of some rates, the smallest first, explains each interval: [rates, intervals].

    Misfits are as in `Intervals`.
    """

    a: FloatArray
    s: FloatArray
    even: FloatArray  # misfits, if the weights moved on a line
    uneven: FloatArray  # if they moved at any times within the interval
    # and if, besides, the average began again from the weights, and takes in no less of their
    # motion than it does with the rate
    restarted: FloatArray

    def between(self, first: int, last: int) -> _Tables:
        """Select the intervals from one checkpoint to another."""
        return _Tables(*(table[:, first:last] for table in vars(self).values()))

    @property
    def signs(self) -> FloatArray:
        """How clearly an average began again, or its rate rose, in each interval but the first,
        from 1 on: [intervals - 1]."""
        restarts = _restart_gains(self.uneven, self.restarted)[1:]
        began = np.minimum(_rise_gains(self.uneven, self.a, _BEGAN.change), restarts)
        # What is over early within an interval, as where a rate falls to 0, looks short there.
        later = _rise_gains(self.even[::-1, ::-1], self.s, -np.inf)[::-1]
        rose = np.minimum(_rise_gains(self.even, self.s, _ROSE.change), later)
        signs = [_BEGAN.compare(began, self.uneven), _ROSE.compare(rose, self.even)]
        return np.asarray(np.max(signs, axis=0))


@dataclass(frozen=True)
class Falls:
    """The intervals in which an average forgets faster than before, as by no rule: it, or the
    warm-up of its decay, began again."""

    clear: list[int]
    doubted: list[int]  # those, and others that files about a length apart do not show clearly
    # misfits with the best rate of each interval, if the weights moved at any times within it
    least: FloatArray


def find_falls(rows: Intervals) -> Falls:
    """Find the intervals in which the average forgets faster than before."""
    rows = rows.blurred
    a, s = _list_rates(rows)
    ones = np.ones_like(a[0])
    even = _tabulate(rows, map(rows.even_logs, a, s))
    uneven = _tabulate(rows, (rows.uneven_logs(row, 0 * row, ones) for row in a))
    restarted = _tabulate(rows, (rows.uneven_logs(ones, row, ones) for row in s))
    tables = [_Tables(a, s, *each) for each in zip(even, uneven, restarted, strict=True)]

    @cache
    def list_signs(first: int, last: int) -> FloatArray:
        """List the signs that the mean and the median over pieces show: a layer that is large for
        a step is none."""
        return np.asarray(np.min([each.between(first, last).signs for each in tables], axis=0))

    count = len(rows.gram)
    clear, doubted = (_search(list_signs, 0, count, least) for least in (1.0, _DOUBTED))
    return Falls(clear, doubted, uneven[0].min(axis=0))


def _search(
    list_signs: Callable[[int, int], FloatArray], first: int, last: int, least: float
) -> list[int]:
    """Find such intervals among some, by a least sign."""
    if last - first < 3:
        return []
    signs = list_signs(first, last)
    if signs.max() <= least:
        return []
    place = first + 1 + int(signs.argmax())
    before = _search(list_signs, first, place, least)
    return [*before, place, *_search(list_signs, place, last, least)]


def find_exchanged(rows: Intervals) -> Bools:
    """Find the checkpoints in which the weights are the average, and the average the weights:
    [intervals + 1].

    Of the paths over exchanged or not, with the best rate of each interval, it is the one with the
    least logs of how far the weights move and of what the average leaves together, if it clearly
    leaves less than none, with that motion and without. Noise about a minimum moves weights far.
    """
    rows = rows.blurred  # what nearly nothing is left of on a straight path shows no exchange
    least = {}
    for begin in (False, True):
        for end in (False, True):
            turned = replace(rows, gram=_turn(rows.gram, begin, end))
            least[begin, end] = _least_misfits(turned)
    sums = {False: 0.0, True: 0.0}
    paths = {False: [False], True: [True]}
    for place in range(len(rows.gram)):
        ways = {}
        for end in (False, True):
            before = {begin: sums[begin] + least[begin, end][0, place] for begin in sums}
            ways[end] = min(before, key=before.__getitem__), min(before.values())
        paths = {end: [*paths[begin], end] for end, (begin, _) in ways.items()}
        sums = {end: total for end, (_, total) in ways.items()}
    best = paths[min(sums, key=sums.__getitem__)]
    turned_sum = sum(least[ends][:, place] for place, ends in enumerate(pairwise(best)))
    gains = least[False, False].sum(axis=1) - turned_sum
    return np.asarray(np.array(best) & bool(gains.min() > _EXCHANGED))


def _least_misfits(rows: Intervals) -> FloatArray:
    """Compute what each interval leaves with its best rate, with the motion of the weights and
    without, as the mean and the median over pieces: [4, intervals]."""
    a, s = _list_rates(rows)
    left = list(map(rows.even_logs, a, s))
    motion = np.log(np.maximum(rows.gram[..., 2, 2], NOTHING))
    tables = [*_tabulate(rows, (motion + each for each in left)), *_tabulate(rows, left)]
    return np.asarray(np.min(tables, axis=1))


def _turn(gram: FloatArray, begin: bool, end: bool) -> FloatArray:
    """Compute the Gram matrices with exchanged places at the ends of intervals."""
    rows = np.eye(5)
    m, d, v = np.eye(3, 5)
    if begin:
        m, d, v = m + d, -d, v - d
    if end:
        m, v = v - d, m + d
    rows[:3] = m, d, v
    return np.asarray(rows @ gram @ rows.T)


# --- tables of rates, and paths through them


def _list_rates(rows: Intervals) -> tuple[FloatArray, FloatArray]:
    """Compute a and s of each interval with each rate: [rates, intervals]."""
    counts = rows.counts
    rates = np.geomspace(0.02 / counts.max(), 20 / max(counts.min(), 1.0), _RATES)
    lost = np.maximum(rates[:, None] * counts, NOTHING)
    a = -np.expm1(-lost)
    return a, 1 - a / lost


def _tabulate(rows: Intervals, logs: Iterable[FloatArray]) -> FloatArray:
    """Put together misfits with each rate, as the mean and the median over pieces: [2, rates,
    intervals]."""
    table = [[rows.mean(each), _median(each)] for each in logs]
    return np.moveaxis(np.array(table), 1, 0)


def _median(pieces: FloatArray) -> FloatArray:
    """Compute the median over pieces, as `np.median` does in up to four times the time."""
    in_order = np.sort(pieces, axis=1)
    count = pieces.shape[1]
    return np.asarray((in_order[:, (count - 1) // 2] + in_order[:, count // 2]) / 2)


def _least_sums(table: FloatArray) -> FloatArray:
    """Sum the misfits of the best rates that never rise, up to each interval and with each rate in
    it: shape of `table`."""
    sums = np.zeros(len(table))
    columns = []
    for column in table.T:
        sums = np.minimum.accumulate(sums[::-1])[::-1] + column
        columns.append(sums)
    return np.stack(columns, axis=1)


def _least_sums_after(table: FloatArray) -> FloatArray:
    """Sum the same from each interval on."""
    return _least_sums(table[::-1, ::-1])[::-1, ::-1]


def _rise_gains(table: FloatArray, share: FloatArray, least: float) -> FloatArray:
    """Compute what a rate that rises before each interval but the first explains, and does without
    any one interval before as well, if it makes a share so much larger: [intervals - 1].

    An interval in which an average seems far too long would make the next ones look too short.
    """
    after = _least_sums_after(table)[:, 1:]
    larger = share[after.argmin(axis=0), np.arange(1, table.shape[1])]
    sums = np.zeros((1, len(table)))  # without each interval so far, and with all
    before = []
    smaller = []
    for column in table.T:
        sums = np.minimum.accumulate(sums[:, ::-1], axis=1)[:, ::-1]
        sums = np.vstack([sums[:-1] + column, sums[-1:], sums[-1:] + column])
        before.append(sums[:-1].min(axis=1))
        smaller.append(sums[:-1].argmin(axis=1))
    gains = []
    for place, least_after in enumerate(after.min(axis=0), 1):
        is_clear = larger[place - 1] - share[smaller[place - 1], place] > least
        explained = before[-1][:place] - before[place - 1] - least_after
        gains.append(np.where(is_clear, explained, 0.0).min())
    return np.array(gains)


def _restart_gains(uneven: FloatArray, restarted: FloatArray) -> FloatArray:
    """Compute what an average that began again in each interval explains: [intervals]."""
    before = _least_sums(uneven)
    after = _least_sums_after(uneven)
    nothing = np.zeros((len(before), 1))
    until = np.minimum.accumulate(np.hstack([nothing, before[:, :-1]])[::-1])[::-1]
    since = np.minimum.accumulate(np.hstack([after[:, 1:], nothing]))
    sums = until + restarted + since
    return np.asarray(before[:, -1].min() - sums.min(axis=0))
