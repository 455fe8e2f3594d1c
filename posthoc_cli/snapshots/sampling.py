"""The measurements of several sources, estimated from a sample of their values.

The averages of a source, concatenated by name, form a long vector, which is cut into runs. Some
runs are chosen at random, seeded by the run id: the same elements in every source, all equally
likely. Sums over the sample, times all elements / elements in the sample, are unbiased estimates,
and exact for models whose elements are all read.

The sample is not verified, since a checksum covers a block, which would have to be read completely.
It is used for estimates only; a synthesis verifies what it reads. Memory: the samples of one time
and of the two newest earlier sources of each kind, three of one kind alone, 8 MB each.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, chain, groupby, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from posthoc_cli.profiles import Discrete, FloatArray, StoredProfile
from posthoc_cli.reconstruction import Distance, Measurements
from posthoc_cli.snapshots.source import (
    ElementRange,
    Source,
    StoredTensors,
    by_time,
    expected_roundings,
    finite_values,
    is_exact,
    series_key,
)

MOST_ELEMENTS = 1_000_000
RUN_ELEMENTS = 1_024


# Of Gaussian motions d with a standard deviation of 0, 0.35, 0.5, 0.7, 1, 1.5, 2, 4, 8 and 32
# spacings: the mean squared motion of the rounded elements that are seen to move, in squared
# spacings, and the chance E|d| - E(|d| - 1)+ that one is seen. The former is E|d| + 2 sum_k E(|d|
# - k)+ divided by that chance; it is set above 1.0006 at 0.35 spacings, as where it is about 1 it
# says little.
_MOTION = (1.0, 1.005, 1.065, 1.287, 1.848, 3.25, 5.18, 18.0, 67.5, 1037.0)
_CHANCE = (0.0, 0.28, 0.39, 0.51, 0.631, 0.743, 0.805, 0.901, 0.95, 0.988)


@dataclass(frozen=True, eq=False)
class _Sample:
    """The sampled elements of a source, shape [elements]; `scale` is all elements / sampled
    elements."""

    source: Source
    values: FloatArray
    starts: npt.NDArray[np.intp]  # the first sampled element of each tensor
    scale: float
    roundings: FloatArray  # the expected squared rounding error of each element
    _distances: dict[int, float] = field(default_factory=dict)  # squared, by the id of the source

    def sum_squares(self, values: FloatArray) -> float:
        return float(np.dot(values, values)) * self.scale

    @cached_property
    def rounding(self) -> float:
        """The expected squared rounding error."""
        return float(self.roundings.sum()) * self.scale

    @cached_property
    def squares(self) -> FloatArray:
        """The squared norm of the sampled elements of each tensor."""
        return np.asarray(np.add.reduceat(self.values**2, self.starts))

    def squared_distances(self, values: FloatArray) -> FloatArray:
        """Compute the squared distance from others' values for each tensor."""
        moves = self.values - values
        moves *= moves  # in place: of a million elements each copy takes 8 MB
        return np.asarray(np.add.reduceat(moves, self.starts))

    def squared_distance(self, other: _Sample) -> float:
        key = id(other.source)
        if key not in self._distances:
            self._distances[key] = self.sum_squares(self.values - other.values)
        return self._distances[key]

    def distance(self, other: _Sample) -> Distance:
        rounding = self.moving_share(other) * (self.rounding + other.rounding)
        return Distance(other.source.profile, self.squared_distance(other), rounding)

    def moving_share(self, other: _Sample) -> float:
        """Estimate the share of the rounding error that comes from elements in motion: frozen
        elements have the same error in both samples.

        Rounded elements that move little are seen in motion only by chance, which follows from how
        far the others are seen to move.
        """
        if not self.rounding:
            return 1.0
        motion = self.values - other.values
        moved = (motion != 0) & (self.roundings > 0)
        seen = float(self.roundings[moved].sum()) * self.scale
        if not seen:
            return 1.0
        spacings = 12 * seen
        relative = self.sum_squares(motion[moved]) / spacings
        chance = float(np.interp(relative, _MOTION, _CHANCE))
        return seen / max(chance * self.rounding, seen)


_STILL = 1e-12
"""Squared distance, relative to the squared norm, below which a tensor is constant: an average of
equal values moves by roundings."""


def sample_measurements(sources: Sequence[Source]) -> list[Measurements | None]:
    """Estimate the measurements of the sources of one run, in their order, from the stored
    averages.

    `Distance.rounding` is the expected rounding of both averages, of elements in motion. All are
    None if values are too large to be squared; a NonFiniteError for nan or infinity.

    A distance that shows recent motion alone (see `_recent_motion`) replaces all distances of
    another library's average, if at its time it is well above its rounding.

    Norms, to which errors are relative, cover the tensors that move: a constant table of noise
    levels may be far longer than all weights.
    """
    return sample_values(sources).measure_sources(sources)


@np.errstate(over="ignore", invalid="ignore")
def sample_values(sources: Sequence[Source]) -> Sampling:
    """Read the sample of the sources of one run."""
    sampling = Sampling()
    ranges = _sampled_ranges(sources[0]) if sources else []
    for _, at_time in groupby(by_time(sources), key=lambda source: source.t):
        with ExitStack() as stack:
            sources_at_time = [*map(stack.enter_context, at_time)]  # which may share a file
            sampling.add([_read(source, ranges) for source in sources_at_time])
    return sampling


class Sampling:
    """The measurements of a run's sources, taken in one time after another."""

    def __init__(self) -> None:
        self._first: FloatArray | None = None
        # the tensors that are not constant in all sources so far
        self._moved: npt.NDArray[np.bool_] | bool = False
        # by the id of the source: the squared norm of each tensor, the rounding, and the distances
        self._measured: dict[int, tuple[FloatArray, float, list[Distance]]] = {}
        # of each kind the averages of the two newest times, of one alone of three
        self._newest: dict[tuple[float, bool], list[_Sample]] = defaultdict(list)
        self._steps: dict[tuple[float, bool], list[_Step]] = defaultdict(list)

    def add(self, samples: Sequence[_Sample]) -> None:
        """Measure the samples of one time, later than all before."""
        recent = []
        earlier = []
        for sample in samples:
            recent.append(_recent_motion(sample, self._newest[series_key(sample.source)]))
        for kind in sorted(self._newest):
            earlier += self._newest[kind][-2:]
        motions = chain.from_iterable(recent)
        is_clear = any(motion.squared > _CLEAR * motion.rounding for motion in motions)
        for sample, own in zip(samples, recent, strict=True):
            distances = [*own]
            if not (own and is_clear):
                others = [other for other in samples if other is not sample]
                distances += map(sample.distance, others + earlier)
            squares = self._squares(sample)
            self._measured[id(sample.source)] = squares, sample.rounding, distances
        self._keep(samples)

    def _keep(self, samples: Sequence[_Sample]) -> None:
        # Means of two intervals before distinguish noise from a walk, as an average's weights do.
        most = 3 if len(samples) == 1 else 2
        for sample in samples:
            kind = series_key(sample.source)
            before = self._newest[kind]
            if before:
                steps = self._steps[kind]
                # of interest only if all are: otherwise each would take as long as its distance
                is_apart = all(step.is_apart for step in steps) and _are_apart(sample, before[-1])
                steps.append(_step(sample, before[-2:], is_apart))
            self._newest[kind] = [*before, sample][-most:]

    def _squares(self, sample: _Sample) -> FloatArray:
        """Compute the squared norm of each tensor, and note which have moved."""
        if self._first is None:
            self._first = sample.values
        self._moved |= sample.squared_distances(self._first) > _STILL * sample.squares
        return sample.squares * sample.scale

    @property
    def doubts(self) -> list[str]:
        """Lines that say that files may be of two trainings, for each kind."""
        return [*filter(None, map(_find_two_trainings, self._steps.values()))]

    @np.errstate(over="ignore", invalid="ignore")
    def measure_sources(
        self,
        sources: Sequence[Source],
    ) -> list[Measurements | None]:
        """List the measurements of the sources; all None if values are too large to be squared."""
        moving = self._moved if np.any(self._moved) else ...  # all if none moves
        measurements = list[Measurements | None]()
        sums = list[float]()
        for source in sources:
            squares, rounding, distances = self._measured[id(source)]
            norm = float(squares[moving].sum())
            measurements.append(Measurements(norm, rounding, tuple(distances)))
            sums.append(norm)
            sums += [distance.squared for distance in distances]
        if not np.isfinite(sums).all():
            return [None] * len(sources)
        return measurements


# --- files of two trainings in one folder
#
# In ten trainings of 3,000 and 6,000 steps, one of them with restarts of the learning rate, and
# files at even, uneven and geometric times, the squared motion over two intervals was at least 1.3
# times that over each of them, and the motion over one at most 1.9 times what its neighbours would
# show at their speeds, 3.9 times between single steps; in half precision, too. Where one training
# followed another the latter was 240, and 4 to 27 where both began with the same weights and had 14
# files each. Where two were interleaved the former was 0.007. Where a training was resumed from
# before some files, which lie between those that it wrote since, it was below 0.5 in all cases in
# which an error was more than 1.2 times the predicted one.

_BACK = 0.5
_JUMP = 5.0


@dataclass(frozen=True)
class _Step:
    """The motion from one sample to the next."""

    before: Source
    after: Source
    squared: float
    rounding: float  # the expected squared rounding error of both
    over_two: float  # squared motion in this step and the one before together; infinite if unknown
    # whether most elements are of tensors that are as far apart as other networks', here and in all
    # steps before
    is_apart: bool

    @property
    def time(self) -> float:
        return self.after.t - self.before.t


def _step(sample: _Sample, before: Sequence[_Sample], is_apart: bool) -> _Step:
    """Measure the step to a sample from the last of one or two earlier ones."""
    last = before[-1]
    squared = sample.squared_distance(last)
    rounding = sample.rounding + last.rounding
    over_two = math.inf
    if len(before) > 1:
        over_two = sample.squared_distance(before[0])
    return _Step(last.source, sample.source, squared, rounding, over_two, is_apart)


def _are_apart(sample: _Sample, other: _Sample) -> bool:
    """Return whether most elements belong to tensors whose squared distance is nearer to the sum of
    the squared norms, as between different networks, than to 0."""
    motion = sample.squared_distances(other.values)
    norms = sample.squares + other.squares
    sizes = np.diff(sample.starts, append=sample.values.size)
    apart = sizes[2 * motion > norms]
    return bool(2 * apart.sum() > sizes.sum())


_HINT = "name the files of one training with a glob"


def _find_two_trainings(steps: Sequence[_Step]) -> str:
    """Say that files move as the files of two trainings do: one follows the other, or they are
    interleaved, as after a training was resumed from before some of its files; or each file is of
    another training. Empty if they do not."""
    if len(steps) > 1 and all(step.is_apart for step in steps):
        reason = "each is as far from the next one as if they were of different trainings"
        return f"{reason}: {_HINT}"
    for previous, step in pairwise(steps):
        over_one = min(previous.squared, step.squared)
        if step.over_two < _BACK * over_one:
            names = f"{previous.before.name} and {step.after.name} are closer to each other than to"
            reason = f"{step.before.name} between them, as if it is of another training"
            return f"{names} {reason}, or of one that was resumed from before it: {_HINT}"
    neighbours = zip(steps, steps[1:], steps[2:], strict=False)
    for earlier, step, later in neighbours:
        usual = step.rounding
        for other in (earlier, later):
            longer = max(1.0, step.time / other.time)
            usual = max(usual, other.squared * longer**2)
        if step.squared > _JUMP * usual > 0:
            names = f"{step.before.name} and {step.after.name}"
            reason = "are as far apart as files of two trainings, unlike others beside them"
            return f"{names} {reason}: {_HINT}"
    return ""


def _sampled_ranges(source: Source) -> list[ElementRange]:
    """Choose the elements to read in every source of the run: runs, cut at the ends of tensors."""
    sizes = {name: source.entries[name].size for name in sorted(source.averaged)}
    names = list(sizes)
    ends = list(accumulate(sizes.values()))
    total = sum(sizes.values())
    runs = [(0, total)]
    if total > MOST_ELEMENTS:
        generator = np.random.default_rng(int(source.run_id, 16))
        count = -(-total // RUN_ELEMENTS)
        drawn = generator.choice(count, MOST_ELEMENTS // RUN_ELEMENTS, replace=False)
        begins = [RUN_ELEMENTS * run for run in sorted(drawn.tolist())]
        runs = [(begin, min(begin + RUN_ELEMENTS, total)) for begin in begins]
    ranges = []
    for begin, last in runs:
        index = bisect_right(ends, begin)
        while begin < last:
            name = names[index]
            start = ends[index] - sizes[name]
            end = min(ends[index], last)
            if end > begin:
                ranges.append(ElementRange(name, begin - start, end - start))
            begin = end
            index += 1
    return ranges


def _read(source: Source, ranges: Sequence[ElementRange]) -> _Sample:
    values = read_elements(source, ranges)
    starts: dict[str, int] = {}
    at = 0
    for name, begin, end in ranges:
        starts.setdefault(name, at)
        at += end - begin
    total = sum(source.entries[name].size for name in source.averaged)
    scale = total / max(values.size, 1)
    roundings = estimate_roundings(source, ranges, values)
    return _Sample(source, values, np.array([*starts.values()], np.intp), scale, roundings)


def read_elements(
    source: StoredTensors,
    ranges: Sequence[ElementRange],
    read: Callable[[StoredTensors, str, int, int], FloatArray] = finite_values,
) -> FloatArray:
    """Read ranges of elements, end to end: the elements of any source that estimates rest on."""
    values = np.empty(sum(end - begin for _, begin, end in ranges))
    at = 0
    with source:
        together = source.read_together(ranges)
        if together is not None and (read is not finite_values or np.isfinite(together).all()):
            return together
        for name, begin, end in ranges:
            values[at : at + end - begin] = read(source, name, begin, end)
            at += end - begin
    return values


def estimate_roundings(
    source: StoredTensors, ranges: Sequence[ElementRange], values: FloatArray
) -> FloatArray:
    """Estimate the expected squared rounding error of each of these elements."""
    roundings = np.zeros(values.shape)  # takes no memory until it is written to
    at = 0
    for name, begin, end in ranges:
        elements = slice(at, at + end - begin)
        stored = source.entries[name].dtype
        own = source.tensors[name].dtype
        if not is_exact(stored, own):
            roundings[elements] = expected_roundings(values[elements], stored, own)
        at = elements.stop
    return roundings


# the largest difference between the tails of two averages up to a time if one continues the other
_LIKE = 1e-3
_NONE = 1e-9  # shares of mass below this count as 0
_CLEAR = 2.0  # a squared distance must be this many times its expected rounding to show motion


def _recent_motion(sample: _Sample, before: Sequence[_Sample]) -> list[Distance]:
    """Compute an average's distances from what it would be if the weights since the last average
    were as in an earlier interval: one and two intervals before.

    Of successive averages a, b, c of one kind, c consists of b with a share k and of the mean of
    the weights since, m_c = (c - k b) / (1 - k); b and a determine m_b in the same way. With m_b
    in place of m_c, c would be k b + (1 - k) m_b, which is also an average of known profile. Its
    distance from c is (1 - k) |m_c - m_b|, which only the motion in two intervals causes. The
    distance of a long average from b is caused by the motion of all training, from which the motion
    of late intervals was estimated up to five times too large if training slows down.

    Means of a walk are further apart the more intervals lie between them; means of noise are not.

    Returns none with fewer than two earlier averages, for power functions, and if c does not
    continue b, or b not a.
    """
    profiles = [each.source.profile for each in (*before, sample)]
    shares = [_share(*pair) for pair in pairwise(profiles)]
    distances: list[Distance] = []
    for index in range(len(shares) - 1):
        since = [share for share in shares[index:] if share is not None]
        if len(since) < len(shares) - index:
            continue
        share = since[0]
        kept = since[-1]
        new_share = (1 - kept) / (1 - share)
        coefficients = np.zeros(len(before))
        coefficients[-1] = kept
        coefficients[index : index + 2] += -share * new_share, new_share
        unmoved = _Mixture(tuple(profiles[:-1]), coefficients)
        distances.append(_distance(sample, before, unmoved))
    return distances


def _distance(sample: _Sample, before: Sequence[_Sample], mixture: _Mixture) -> Distance:
    """Compute the distance of a sample from a mixture of earlier samples."""
    difference = sample.values.copy()
    rounding = sample.rounding
    used = [sample]
    for coefficient, each in zip(mixture.coefficients.tolist(), before, strict=True):
        if coefficient:
            difference -= coefficient * each.values
            rounding += coefficient**2 * each.rounding
            used.insert(-1, each)
    moving = max(later.moving_share(earlier) for earlier, later in pairwise(used))
    is_far = len(used) == 4
    return Distance(mixture, sample.sum_squares(difference), moving * rounding, is_far)


@dataclass(frozen=True, eq=False)
class _Mixture:
    """The profile of a sum of averages with these coefficients, the newest average's last.

    Its tails are exact at any time, as the averages' are, so that their common part cancels: of an
    average whose decay rises to 1 a late interval has less mass than any early update.
    """

    averages: Sequence[Any]
    coefficients: FloatArray

    @property
    def t(self) -> float:
        return float(self.averages[-1].t)

    @property
    def jumps(self) -> FloatArray:
        return np.asarray(self.averages[-1].jumps)

    def tail(self, s: npt.ArrayLike) -> FloatArray:
        tails = [average.tail(s) for average in self.averages]
        return np.tensordot(self.coefficients, tails, 1)


def _share(earlier: StoredProfile, later: StoredProfile) -> float | None:
    """Find the share of an average in a later one; None if the later one does not continue it."""
    if not (isinstance(earlier, Discrete) and isinstance(later, Discrete)):
        return None
    share = 1 - float(later.tail(earlier.t))
    if not _NONE < share < 1 - _NONE:
        return None
    times = earlier.times
    since = later.tail(times) - later.tail(earlier.t)
    difference = since / share - earlier.tail(times)
    if np.abs(difference).max() > _LIKE:
        return None
    return share
