"""What averages are made from: snapshots on disk, of one file or several parts, and any other stored averages.

What is known of several sources together is here, too: their order, their clock, and the prior of a reconstruction by
their measurements, estimated where headers lack them.

Measurements are estimated from a sample: the averages of a snapshot, one after the other by name, form a long vector,
which is cut into runs of 1,024 elements. Some runs are chosen at random, seeded by the run id: the same elements in
every snapshot, each equally likely. Sums over the sample, times all elements / elements in the sample, are unbiased
estimates. Of a model of up to 1,000,000 elements all are read, and the sums are exact.

The sample is not verified: a checksum covers a block of 4 MiB, all of which would have to be read. It is used for
estimates only, and a synthesis verifies what it reads. Memory: the samples of one time and of the two newest earlier
snapshots of each profile, 8 MB a snapshot.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np

from posthoc_cli.dtypes import DTYPES, ITEM_BYTES
from posthoc_cli.errors import MismatchError, NonFiniteError
from posthoc_cli.profiles import Clock, Discrete, FloatArray, Point, PowerFunction, StoredProfile
from posthoc_cli.reconstruction import (
    ASSUMED,
    Distance,
    DistanceTo,
    Measurements,
    Motion,
    Prior,
    StoredAverage,
    measured_prior,
    thinned_subset,
)
from posthoc_cli.snapshots import format as fmt
from posthoc_cli.snapshots.chunks import Box
from posthoc_cli.snapshots.reading import BackingFile, ElementRange, TensorReader
from posthoc_cli.snapshots.tensor_file import decode_values, opened_in_turn

if TYPE_CHECKING:
    import torch

ReadRanges = Callable[[Sequence["ElementRange"]], Sequence["torch.Tensor"]]
"""Reads ranges of tensors in memory."""


class Source(Protocol):
    """A stored average: a snapshot or a checkpoint on disk, or a current average in memory."""

    @property
    def name(self) -> str:
        """The file's name, or a description of an average in memory."""

    @property
    def info(self) -> fmt.SourceInfo:
        """What is known of it beside its tensors."""

    @property
    def profile(self) -> StoredProfile:
        """What its averages are of: a power function, one checkpoint (`Point`), or known times (`Discrete`)."""

    @property
    def stored(self) -> Mapping[str, fmt.TensorEntry | fmt.TensorSpec]:
        """Dtype, shape and bytes of each stored tensor."""

    def open(self) -> AbstractContextManager[TensorReader | ReadRanges]:
        """Open it for reading, by any number of threads.

        Of an average in memory it is a function that gives ranges (`name`, `begin`, `end`) of its tensors, flat and on
        the host.
        """


@dataclass(frozen=True, repr=False)
class FileSource(ABC):
    """A snapshot on disk, or another program's checkpoint: a file, or a folder of `parts`, as if they were one file."""

    path: Path
    header: fmt.FileHeader
    info: fmt.SourceInfo
    parts: tuple[BackingFile, ...] = ()

    def open(self, boxes: Mapping[str, Box] | None = None) -> TensorReader:
        """Open it, or boxes of some tensors as if these were all; its files must be those whose headers were read."""
        parts = self.parts or (BackingFile(self.path, self.header),)
        return TensorReader(self.path, self.header, parts, boxes)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: {len(self.stored)} tensors at t = {self.info.t:,.12g})"

    @property
    def name(self) -> str:
        """The file's or folder's name."""
        return self.path.name

    @property
    @abstractmethod
    def profile(self) -> StoredProfile:
        """What its averages are of."""

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that tell it from others: the checksum of its header."""
        return self.header.metadata["ema.checksum"]

    @property
    def stored(self) -> Mapping[str, fmt.TensorEntry]:
        """Dtype, shape and place of each stored tensor."""
        return self.header.tensors

    def cells(self, name: str) -> int:
        """The number of chunks that rows of a tensor go through; 0 where it is in one file."""
        boxes = [part.boxes[name] for part in self.parts if name in part.boxes and part.boxes[name].size]
        return len(boxes) // max(1, len({box.offset[:1] for box in boxes}))


class Snapshot(FileSource):
    """A snapshot on disk."""

    info: fmt.SnapshotInfo

    @property
    def profile(self) -> PowerFunction:
        """The power function that it holds."""
        return self.info.profile.pure


# --- several sources


@contextmanager
def all_open(sources: Sequence[Source]) -> Iterator[list[TensorReader | ReadRanges]]:
    """All sources, open for the block."""
    stored = [source for source in sources if isinstance(source, FileSource)]
    turn = opened_in_turn(part.path for one in stored for part in one.parts or (one,))
    with ExitStack() as stack:
        opened = []
        for source in sources:
            for _ in (source.parts or (source,)) if isinstance(source, FileSource) else ():
                next(turn)
            opened.append(stack.enter_context(source.open()))
        yield opened


_Source = TypeVar("_Source", bound=Source)


def by_time(items: Sequence[_Source]) -> list[_Source]:
    """By time, then sigma_rel, checkpoints last."""
    return sorted(items, key=_order)


def chosen_up_to(items: Sequence[_Source], t: float) -> tuple[list[_Source], list[_Source]]:
    """Snapshots to combine for time `t`, at or before it; and a choice of the later ones, for the motion.

    Both by time, then sigma_rel; of very many a limited number, see `thinned_subset`.
    """
    ordered = by_time(items)
    usable, later = [o for o in ordered if o.info.t <= t], [o for o in ordered if o.info.t > t]
    return _chosen(usable), _chosen(later)


def _chosen(items: Sequence[_Source]) -> list[_Source]:
    return [items[index] for index in thinned_subset([item.profile for item in items])]


def _order(source: Source) -> tuple[float, float, bool]:
    return source.info.t, *_kind(source)


def run_clock(infos: Sequence[fmt.SourceInfo]) -> Clock:
    """The run's steps over its time, from all its snapshots' clocks; a MismatchError if two contradict each other."""
    pairs = sorted({pair for info in infos for pair in info.clock_pairs})
    for (step, t), (next_step, next_t) in pairwise(pairs):
        if step == next_step or t >= next_t:
            raise MismatchError(
                "the snapshots are not of one training",
                f"by their clocks step {step} was at t = {t:,.12g}, and step {next_step} at t = {next_t:,.12g}",
            )
    return Clock([step for step, _ in pairs], [t for _, t in pairs])


def counted(sources: Sequence[Source], count: int | None = None, there: int | None = None) -> str:
    """How many of which kind: "1 snapshot", "43 snapshots and checkpoints", or by numbers, "20 of 80 checkpoints"."""
    count = len(sources) if count is None else count
    there = count if there is None else there
    kinds = sorted({kind_of(source) for source in sources}, reverse=True)
    number = f"{count:,}" if count == there else f"{count:,} of {there:,}"
    return f"{number} {' and '.join(f'{kind}s' if there != 1 else kind for kind in kinds)}"


def kind_of(source: Source) -> str:
    """What it is called: "snapshot" or "checkpoint"."""
    return "checkpoint" if isinstance(source, FileSource) and not isinstance(source, Snapshot) else "snapshot"


# --- the prior, by measurements or a sample

MOST_ELEMENTS = 1_000_000
RUN_ELEMENTS = 1_024


def source_prior(sources: Sequence[Source]) -> Prior:
    """The motion of the network and the rounding of each source, in their order.

    If the header of a file has no measurements, those of all files are estimated from a sample of their tensors.
    """
    on_disk = [source for source in sources if isinstance(source, FileSource)]
    ordered = [*on_disk, *(source for source in sources if not isinstance(source, FileSource))]
    averages = [source.info.average(source.profile) for source in ordered]
    if sampled := any(source.info.measurements is None for source in on_disk):
        averages[: len(on_disk)] = with_sampled_measurements(on_disk)
    last = max((source.info.t for source in ordered), default=0.0)  # an earlier one shows a part of the path
    text = next((source.info.sketch for source in ordered if source.info.t == last and source.info.sketch), "")
    prior = measured_prior(averages, fmt.decode_path(text).sketch if text else None)
    place = {id(source): index for index, source in enumerate(ordered)}
    return (prior.sampled() if sampled else prior).of([place[id(source)] for source in sources])


@dataclass(frozen=True)
class EarlierRun:
    """An earlier run scaled to another length, relative to its norm: the motion, None if too little is known.

    `rounding` is the root mean square error of its stored averages by dtype, relative to their norm.
    """

    motion: Motion | None
    rounding: dict[str, float]


def scaled_run(snapshots: Sequence[FileSource], steps: float) -> EarlierRun:
    """The snapshots of one run, scaled to a run of `steps`. Reads a sample if headers lack measurements."""
    snapshots, _ = chosen_up_to(snapshots, max(snapshot.info.t for snapshot in snapshots))
    prior = source_prior(snapshots)
    times = np.array([snapshot.info.t for snapshot in snapshots])
    norm = float(prior.norm[times == times.max()].mean())
    known = prior.source != ASSUMED and norm > 0
    motion = prior.stretched(steps, float(times.max()), norm) if known else None
    found = defaultdict(list)
    for snapshot, rounding, squared in zip(snapshots, prior.rounding, prior.norm, strict=True):
        stored = {snapshot.stored[name].dtype for name in snapshot.info.averages}
        if prior.source != ASSUMED and len(stored) == 1 and rounding > 0 and squared > 0:
            found[DTYPES[stored.pop()].torch_name].append(float(rounding / squared))
    return EarlierRun(motion, {name: math.sqrt(float(np.mean(values))) for name, values in found.items()})


def sample_measurements(snapshots: Sequence[FileSource], local: bool = False) -> list[Measurements]:
    """Estimate the measurements of the snapshots of one run, in their order; all of stored copies.

    `Distance.rounding` is the expected one of both copies, see `expected_rounding`. A FileFormatError or NonFiniteError
    names the file; an OverflowError if values are too large to be squared.

    With `local`, another library's average has one distance in place of all, which only recent motion makes, if it is
    well above its rounding at a time: see `_recent_motion`.
    """
    found: dict[int, Measurements] = {}
    newest: dict[tuple[float, bool], list[list[_Sample]]] = defaultdict(list)
    ranges = _sampled_ranges(snapshots[0]) if snapshots else []
    ordered = sorted(range(len(snapshots)), key=lambda index: _order(snapshots[index]))
    for _, there in groupby(ordered, key=lambda i: snapshots[i].info.t):
        now = {index: _read(snapshots[index], ranges) for index in there}
        earlier = [other for kind in sorted(newest) for others in newest[kind] for other in others]
        recent: dict[int, DistanceTo] = {}
        for index, sample in now.items() if local else ():
            if (motion := _recent_motion(sample, newest[_kind(sample.snapshot)])) is not None:
                recent[index] = motion
        is_clear = any(motion.squared > _CLEAR * motion.rounding for motion in recent.values())
        for index, sample in now.items():
            partners = [other for other in now.values() if other is not sample] + earlier
            own = [recent[index]] if index in recent else []
            found[index] = _measure(sample, [] if own and is_clear else partners, own)
        for kind, alike in groupby(now.values(), key=lambda sample: _kind(sample.snapshot)):
            newest[kind] = [*newest[kind], list(alike)][-2:]
    return [found[index] for index in range(len(snapshots))]


def with_sampled_measurements(snapshots: Sequence[FileSource]) -> list[StoredAverage]:
    """What reconstruction uses of them, all with measurements of one sample, since distances need both sides.

    Without measurements if values are too large to be squared.
    """
    try:
        sampled: Sequence[Measurements | None] = sample_measurements(snapshots, local=True)
    except OverflowError:
        sampled = [None] * len(snapshots)
    return [
        replace(snapshot.info.average(snapshot.profile), measurements=measurements, motion=None)
        for snapshot, measurements in zip(snapshots, sampled, strict=True)
    ]


def expected_rounding(values: FloatArray, stored: str, own: str) -> float:
    """The expected sum of squared rounding errors of values that were rounded to nearest.

    Spacing^2 / 12 each, the variance of an error that is uniform within half the spacing, also among the subnormal
    numbers. 0 for zeros, which are almost always exact (biases and gains that never moved), and where the stored dtype
    holds the average, kept in float64 for a model's float64, else in float32.
    """
    dtype = DTYPES[stored]
    if dtype.mantissa_bits >= DTYPES["F64" if own == "F64" else "F32"].mantissa_bits:
        return 0.0
    moved = values[values != 0]
    exponent = np.maximum(np.frexp(moved)[1] - 1, dtype.lowest_exponent)
    spacing = np.ldexp(1.0, exponent - dtype.mantissa_bits)
    return float(np.dot(spacing, spacing)) / 12


def _kind(source: Source) -> tuple[float, bool]:
    """Its width, and whether it is a checkpoint."""
    return source.info.sigma_rel, isinstance(source.profile, Point)


@dataclass(frozen=True)
class _Sample:
    """Values of the chosen elements of a snapshot, shape [elements]; `scale` is all elements / these."""

    snapshot: FileSource
    values: FloatArray
    scale: float
    rounding: float


def _averaged(snapshot: FileSource) -> dict[str, int]:
    entries = snapshot.stored
    return {name: entries[name].nbytes // ITEM_BYTES[entries[name].dtype] for name in sorted(snapshot.info.averages)}


def _sampled_ranges(snapshot: FileSource) -> list[ElementRange]:
    """The elements to read in every snapshot of the run."""
    elements = _averaged(snapshot)
    total = sum(elements.values())
    if total <= MOST_ELEMENTS:
        return [ElementRange(name, 0, count) for name, count in elements.items() if count]
    runs, wanted = -(-total // RUN_ELEMENTS), MOST_ELEMENTS // RUN_ELEMENTS
    chosen = np.sort(np.random.default_rng(int(snapshot.info.run_id, 16)).choice(runs, wanted, replace=False))
    names, ends = list(elements), list(accumulate(elements.values()))
    return [one for run in chosen for one in _ranges(names, ends, int(run) * RUN_ELEMENTS)]


def _ranges(names: Sequence[str], ends: Sequence[int], begin: int) -> Iterator[ElementRange]:
    """The run that begins at an element of the long vector, cut at the `ends` of tensors."""
    end, index = min(begin + RUN_ELEMENTS, ends[-1]), bisect_right(ends, begin)
    while begin < end:
        start, stop = ends[index - 1] if index else 0, min(end, ends[index])
        if begin < stop:
            yield ElementRange(names[index], begin - start, stop - start)
        begin, index = stop, index + 1


def _read(snapshot: FileSource, ranges: Sequence[ElementRange]) -> _Sample:
    parts, rounding = [np.empty(0)], 0.0
    rounded = not isinstance(snapshot.profile, Point)  # a checkpoint is what the network was
    with snapshot.open() as file:
        items = {name: ITEM_BYTES[entry.dtype] for name, entry in snapshot.stored.items()}
        places = [(name, begin * items[name], end * items[name]) for name, begin, end in ranges]
        file.expect(places, is_verified=False)
        for one in ranges:
            stored, values = snapshot.stored[one.name].dtype, read_values(file, *one)
            if not np.isfinite(values).all():
                file.read(one.name)  # raises if it is damage: a flipped bit
                raise NonFiniteError(snapshot.path, f"tensor {one.name!r}: holds nan or infinity")
            parts.append(values)
            if rounded:
                rounding += expected_rounding(values, stored, snapshot.info.tensors[one.name].dtype)
    values = np.concatenate(parts)
    scale = sum(_averaged(snapshot).values()) / max(values.size, 1)
    return _Sample(snapshot, values, scale, rounding * scale)


def _measure(sample: _Sample, partners: Sequence[_Sample], more: Sequence[Distance] = ()) -> Measurements:
    distances = [*more]
    for partner in partners:
        info, squared = partner.snapshot.info, _squares(sample, sample.values - partner.values)
        distance = Distance(info.t, info.sigma_rel, squared, sample.rounding + partner.rounding)
        other = partner.snapshot.profile
        is_foreign = isinstance(other, Point | Discrete)
        distances.append(DistanceTo(**vars(distance), profile=other) if is_foreign else distance)
    return Measurements(_squares(sample, sample.values), sample.rounding, tuple(distances))


_LIKE = 1e-3
"""Largest difference of the tails of two averages up to a time, one of which goes on from the other."""

_NONE = 1e-9
"""A share of mass below this is none."""

_CLEAR = 2.0
"""A squared distance above so many times its expected rounding tells the motion."""


def _recent_motion(sample: _Sample, before: Sequence[Sequence[_Sample]]) -> DistanceTo | None:
    """How far an average is from what it would be if the weights had not moved on between its last two intervals.

    Of three successive averages a, b, c of one kind a share k of c is b, and the rest is the mean of the weights since,
    m_c = (c - k b) / (1 - k). b and a make m_b. With that in the place of m_c, c would be k b + (1 - k) m_b, an average
    of known profile as well. Its distance from c is (1 - k) |m_c - m_b|, which only the motion in two intervals makes.
    The distance of a long average from b is made by the motion of all training: where that slows down, or goes one way
    for long, the motion of late intervals came out up to five times too large.

    None with fewer earlier ones, for power functions, and where c does not go on from b, or b from a.
    """
    found = [one[0] for one in before]
    if len(found) < 2:
        return None
    a, b, c = (one.snapshot.profile for one in (*found, sample))
    if not (isinstance(a, Discrete) and isinstance(b, Discrete) and isinstance(c, Discrete)):
        return None
    shares = []
    for earlier, later in ((a, b), (b, c)):
        share = 1 - float(later.tail(earlier.t))
        if not _NONE < share < 1 - _NONE:
            return None
        apart = (later.tail(earlier.times) - later.tail(earlier.t)) / share - earlier.tail(earlier.times)
        if np.abs(apart).max() > _LIKE:
            return None
        shares.append(share)
    of_b = shares[1] + (1 - shares[1]) / (1 - shares[0])
    made = of_b * found[1].values + (1 - of_b) * found[0].values
    rounding = sample.rounding + of_b**2 * found[1].rounding + (1 - of_b) ** 2 * found[0].rounding
    after = of_b * b.tail(b.times) + (1 - of_b) * a.tail(b.times)
    masses = np.maximum(-np.diff(after, prepend=1.0), 0.0)
    info, squared = found[1].snapshot.info, _squares(sample, sample.values - made)
    return DistanceTo(info.t, info.sigma_rel, squared, rounding, Discrete(b.times, masses / masses.sum(), b.t))


def _squares(sample: _Sample, values: FloatArray) -> float:
    with np.errstate(over="ignore"):
        total = float(np.dot(values, values)) * sample.scale
    if not np.isfinite(total):
        raise OverflowError(f"{sample.snapshot.path}: holds values too large to be squared")
    return total


def read_values(file: TensorReader, name: str, begin: int, end: int) -> FloatArray:
    """The elements `begin` to `end` of a tensor as `decode_values` gives them, unverified: for estimates only."""
    dtype = file.header.tensors[name].dtype
    item = DTYPES[dtype].nbytes
    return decode_values(file.read_sample(name, begin * item, end * item), dtype)
