"""The sources of averages: snapshots on disk, checkpoints of other programs, and live averages;
what several of them show together: their order, their clock, and the prior of a reconstruction."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain, groupby, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from posthoc_cli.dtypes import DTYPES, ITEM_BYTES
from posthoc_cli.errors import MismatchError, NonFiniteError, shown
from posthoc_cli.profiles import Clock, Discrete, EpochClock, FloatArray, Point, StoredProfile
from posthoc_cli.reconstruction import (
    MEASURED,
    SAMPLED,
    Distance,
    Measurements,
    Prior,
    Sketch,
    StoredAverage,
    measured_prior,
    thinned_subset,
)
from posthoc_cli.snapshots.tensorfile import (
    Box,
    Entry,
    TensorFile,
    boxes_of_range,
    decode_values,
    items,
    tensor_from_bytes,
)

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """A condition on a header's value besides its type: in words, and as a test, which may raise
    ValueError."""

    words: str
    accepts: Callable[[Any], object]


ROLES = ("average", "statistic", "copy")
"""The roles of tensors. A statistic is averaged but is not a weight: neither measured nor stored in
fewer bits."""

Role = Annotated[str, Rule(f"one of {', '.join(ROLES)}", lambda role: role in ROLES)]
Dtype = Annotated[str, Rule(f"one of {', '.join(ITEM_BYTES)}", lambda name: name in ITEM_BYTES)]


@dataclass(frozen=True)
class TrackedTensor:
    """How a run tracks one tensor."""

    role: Role
    dtype: Dtype  # in the model


class ElementRange(NamedTuple):
    """The elements `begin` to `end` of a tensor, row-major."""

    name: str
    begin: int
    end: int


class StoredTensors:
    """Tensors in files, which any thread may read.

    As a context manager it keeps its files open; they must be those whose headers were read.
    """

    path: Path  # the file or folder
    files: tuple[TensorFile, ...]  # those that together hold its tensors; none of a live average
    entries: Mapping[str, Entry]  # dtype and complete shape of each stored tensor
    tensors: dict[str, TrackedTensor]
    # further names of tensors, each with the name under which the tensor is stored
    aliases: dict[str, str]
    t: float
    knows_buffers = True  # which are copied; other programs average theirs, masks too

    @property
    def copies(self) -> list[str]:
        return self._of_role("copy")

    @property
    def averages(self) -> list[str]:
        return self._of_role("average")

    def _of_role(self, role: str) -> list[str]:
        return [name for name, tensor in self.tensors.items() if tensor.role == role]

    def cells(self, name: str) -> int:
        """Return the number of chunks that each row of a tensor is spread over."""
        if len(self.files) == 1:
            return 1
        boxes = list[Box]()
        for file in self.files:
            box = file.box(name)
            if box and box.size:
                boxes.append(box)
        rows = {box.offset[:1] for box in boxes}
        return len(boxes) // max(1, len(rows))

    def __enter__(self) -> Any:
        with ExitStack() as stack:
            for file in self.files:
                stack.enter_context(file)
            stack.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with ExitStack() as stack:
            for file in self.files:
                stack.callback(file.__exit__, kind)

    def read_box(
        self,
        name: str,
        box: Box,
        out: memoryview,
        begin: int = 0,
        verify: bool = True,
    ) -> None:
        """Fill `out` with the row-major elements of a box of a tensor, from element `begin` on,
        verified by default."""
        dtype = self.entries[name].dtype
        for file in self.files:
            if file.box(name) == box and file.entries[name].dtype == dtype:
                offset = begin * ITEM_BYTES[dtype]
                file.read(name, offset, out, verify)
                return
        flat = np.frombuffer(out, items(dtype))
        pieces = list(boxes_of_range(box, begin, begin + flat.size))
        for file in self.files:
            chunk = file.box(name)
            if chunk is None:
                continue
            parts = []
            for piece in pieces:
                part = chunk.intersection(piece)
                if part.size:
                    parts.append(part)
            if parts:
                spans = [chunk.span(part) for part in parts]
                first, _ = min(spans)
                last = max(end for _, end in spans)
                values = self._read(file, name, first, last, verify)
                for part in parts:
                    target = box.view(flat, part, begin)
                    target[...] = chunk.view(values, part, first)

    def _read(
        self,
        file: TensorFile,
        name: str,
        begin: int,
        end: int,
        verify: bool,
    ) -> npt.NDArray[Any]:
        """Return the elements `begin` to `end` of a chunk, in the dtype of the run."""
        stored = file.entries[name].dtype
        dtype = self.entries[name].dtype
        size = ITEM_BYTES[stored]
        count = end - begin
        data = np.empty(count * size, np.uint8)
        file.read(name, begin * size, data.data, verify)
        # parts use a wider dtype for values that are too large or small for the run's dtype
        if stored != dtype:
            values = decode_values(data, stored)
            wide = np.dtype(DTYPES[dtype].torch_name)
            data = values.astype(wide).view(np.uint8)
        return data.view(items(dtype))

    def read_many(self, names: Sequence[str], out: memoryview) -> None:
        """Fill `out` with complete tensors, end to end, verified."""
        first, *others = self.files
        if not (others or first.boxes):
            first.read_many(names, out)
            return
        at = 0
        for name in names:
            entry = self.entries[name]
            end = at + entry.nbytes
            self.read_box(name, Box.full(entry.shape), out[at:end])
            at = end

    def tensor(
        self,
        name: str,
        box: Box | None = None,
    ) -> torch.Tensor:
        """Return a tensor, or a box of it, verified, in its stored dtype."""
        dtype = self.entries[name].dtype
        box = box or Box.full(self.entries[name].shape)
        data = np.empty(box.size * ITEM_BYTES[dtype], np.uint8)
        self.read_box(name, box, data.data)
        return tensor_from_bytes(data, dtype, box.shape)

    def values(
        self,
        name: str,
        begin: int,
        end: int,
    ) -> FloatArray:
        """Return the elements `begin` to `end` of a tensor as float64, unverified, for estimates
        only."""
        entry = self.entries[name]
        count = end - begin
        data = np.empty(count * ITEM_BYTES[entry.dtype], np.uint8)
        box = Box.full(entry.shape)
        self.read_box(name, box, data.data, begin, verify=False)
        return decode_values(data, entry.dtype)

    def is_mask(self, values: FloatArray) -> bool:
        """Return whether values are those of a buffer that holds infinity, such as an attention
        mask."""
        if self.knows_buffers:
            return False
        lowest, *others = np.unique(values)
        return bool(lowest == -np.inf and len(others) < 2 and np.isfinite(others).all())


class PathSketch(NamedTuple):
    """A sketch, the identifier of its projection, which depends on the tensors and the random
    signs, and the step at the end of each window, nan if unknown: [K]."""

    projection: int
    sketch: Sketch
    steps: FloatArray


class Source(StoredTensors, ABC):
    """A stored average: a snapshot, a checkpoint of another program, or a live average."""

    word = "snapshot"
    # a power function, one checkpoint (`Point`), or known times (`Discrete`)
    profile: StoredProfile
    run_id: str  # 32 hexadecimal digits, the same for all sources of a run
    t_unit: str
    step: int
    sigma_rel: float  # the width that the average was tracked for; 0 for other averages
    # the earliest time with mass in averages of the run, as far as this source shows
    t_first: float
    left_out: tuple[str, ...]  # names in the model's state that were not tracked
    measurements: Measurements | None  # None if they must be estimated
    path_sketch: PathSketch | None = None  # of the weights up to `t`; None if unknown

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name}: {len(self.entries)} tensors at t = {self.t:,.12g})"
        )

    @property
    def name(self) -> str:
        return self.path.name

    @property
    @abstractmethod
    def identity(self) -> str:
        """16 hexadecimal digits that identify its content."""

    @abstractmethod
    def average(self) -> StoredAverage:
        """Return the average as reconstruction uses it."""


# --- several sources


_Source = TypeVar("_Source", bound=Source)


def _kind(source: Source) -> tuple[float, bool]:
    """Return the width of a source, and whether it is a checkpoint."""
    return source.sigma_rel, isinstance(source.profile, Point)


def by_time(items: Iterable[_Source]) -> list[_Source]:
    """Sort sources by time, then sigma_rel, checkpoints last."""
    return sorted(items, key=lambda source: (source.t, *_kind(source)))


def chosen_up_to(
    items: Sequence[_Source],
    t: float,
) -> tuple[list[_Source], list[_Source]]:
    """Choose the sources to combine for time `t`, at or before it, and later ones, which show the
    motion.

    Both lists are by time, then sigma_rel, and of limited length, see `thinned_subset`.
    """
    ordered = by_time(items)
    usable = [source for source in ordered if source.t <= t]
    later = [source for source in ordered if source.t > t]
    return _thinned(usable), _thinned(later)


def _thinned(items: Sequence[_Source]) -> list[_Source]:
    profiles = [source.profile for source in items]
    return [items[index] for index in thinned_subset(profiles)]


def run_clock(
    sources: Sequence[Source],
    others: Iterable[tuple[float, float]] = (),
) -> Clock:
    """Return the run's clock from the steps and times of all its snapshots, and other pairs; raise
    MismatchError if two contradict each other."""
    known = {(source.step, source.t) for source in sources}
    pairs = sorted(known.union(others))
    for (step, t), (next_step, next_t) in pairwise(pairs):
        if step == next_step or t >= next_t:
            pair = f"step {step} was at t = {t:,.12g}, and step {next_step} at t = {next_t:,.12g}"
            raise MismatchError("the snapshots are not of one training", pair)
    is_of_epochs = any(source.t_unit == "epochs" for source in sources)
    kind = EpochClock if is_of_epochs else Clock
    steps = [step for step, _ in pairs]
    times = [t for _, t in pairs]
    return kind(steps, times)


def target_clock(sources: Sequence[Source]) -> Clock:
    """Return the clock for averages over steps: that of the snapshots, and of the windows of the
    newest sketch.

    Between two snapshots `t` may leap, as if it goes on from elsewhere after a restart: with their
    clock alone an error was 5.8 times the predicted one.
    """
    path = _newest_path(sources)
    if path is None:
        return run_clock(sources)
    is_known = np.isfinite(path.steps)
    steps = path.steps[is_known].tolist()
    times = path.sketch.edges[1:][is_known].tolist()
    return run_clock(sources, zip(steps, times, strict=True))


def model_difference(one: Source, other: Source) -> str:
    """Return why two sources are of different models, as a phrase to follow their names; empty if
    they are of one.

    Checkpoints of a model may be stored in several floating-point dtypes.
    """
    if one.aliases != other.aliases:
        return "do not match: they tie different names together"
    unshared = one.tensors.keys() ^ other.tensors.keys()
    for name in sorted(unshared):
        lacking = other if name in one.tensors else one
        return f"do not match: tensor {shown(name)} is missing in {lacking.name}"
    for name, tensor in one.tensors.items():
        second = other.tensors[name]
        differs = tensor.role != second.role
        if one.word == "snapshot":
            differs = tensor != second
        if differs:
            kinds = f"{tensor.role} of {tensor.dtype} and {second.role} of {second.dtype}"
            return f"do not match: tensor {shown(name)} is {kinds}"
        shape = list(one.entries[name].shape)
        second_shape = list(other.entries[name].shape)
        if shape != second_shape:
            return f"do not match: tensor {shown(name)} has the shapes {shape} and {second_shape}"
    return ""


def counted(
    sources: Sequence[Source],
    count: int | None = None,
    total: int | None = None,
) -> str:
    """Return number and kinds, "1 snapshot", or "20 of 80 checkpoints" with counts."""
    if count is None:
        count = len(sources)
    if total is None:
        total = count
    number = f"{count:,}" if count == total else f"{count:,} of {total:,}"
    word = sources[0].word
    return f"{number} {word}" if total == 1 else f"{number} {word}s"


# --- the prior, from measurements or a sample
#
# The averages of a snapshot, concatenated by name, form a long vector, which is cut into runs. Some
# runs are chosen at random, seeded by the run id: the same elements in every snapshot, all equally
# likely. Sums over the sample, times all elements / elements in the sample, are unbiased estimates,
# and exact for models of which all elements are read.
#
# The sample is not verified, since a checksum covers a block, which would have to be read
# completely. It is used for estimates only; a synthesis verifies what it reads. Memory: the samples
# of one time and of the two newest earlier snapshots of each profile, three of one profile alone, 8
# MB per snapshot.

MOST_ELEMENTS = 1_000_000
RUN_ELEMENTS = 1_024


def source_prior(sources: Sequence[Source]) -> Prior:
    """Return the prior: the motion of the network and the rounding of each source, in their order.

    If the header of a file has no measurements, or the newest one no sketch, the measurements of
    all files are estimated from a sample.
    """
    on_disk = [source for source in sources if source.files]
    averages = averages_of(sources)
    path = _newest_path(sources)
    sketch = None if path is None else path.sketch
    unmeasured = [source for source in on_disk if source.measurements is None]
    if sketch is not None and not unmeasured:
        return measured_prior(averages, sketch)
    sampled = iter(sample_measurements(on_disk))
    for index, source in enumerate(sources):
        if source.files:
            measured = next(sampled)
            averages[index] = replace(averages[index], measurements=measured)
    prior = measured_prior(averages, sketch)
    if prior.source == MEASURED:
        return replace(prior, source=SAMPLED)
    return prior


def _newest_path(sources: Sequence[Source]) -> PathSketch | None:
    """Return the sketched path at the newest time, of a file if one has it: earlier ones show a
    part of it."""
    last = max((source.t for source in sources), default=0.0)
    newest = [source for source in sources if source.t == last]
    for source in sorted(newest, key=lambda source: not source.files):
        if path := source.path_sketch:
            return path
    return None


def averages_of(sources: Sequence[Source]) -> list[StoredAverage]:
    """Return the averages of one run as reconstruction uses them, with the clock of all of them."""
    averages = [source.average() for source in sources]
    if all(source.t == source.step for source in sources):
        return averages
    clock = run_clock(sources)
    if isinstance(clock, EpochClock):
        return averages
    for index, average in enumerate(averages):
        if average.steps:
            steps = replace(average.steps, clock=clock)
            averages[index] = replace(average, steps=steps)
    return averages


# Of Gaussian motions d with a standard deviation of 0, 0.35, 0.5, 0.7, 1, 1.5, 2, 4, 8 and 32
# spacings: the mean squared motion of the rounded elements that are seen to move, in squared
# spacings, and the chance E|d| - E(|d| - 1)+ that one is seen. The former is E|d| + 2 sum_k E(|d|
# - k)+ divided by that chance; it is set above 1.0006 at 0.35 spacings, as where it is about 1 it
# says little.
_MOTION = (1.0, 1.005, 1.065, 1.287, 1.848, 3.25, 5.18, 18.0, 67.5, 1037.0)
_CHANCE = (0.0, 0.28, 0.39, 0.51, 0.631, 0.743, 0.805, 0.901, 0.95, 0.988)


@dataclass(frozen=True)
class _Sample:
    """The sampled elements of a source, shape [elements]; `scale` is all elements / sampled
    elements."""

    source: Source
    values: FloatArray
    starts: npt.NDArray[np.intp]  # the first sampled element of each tensor
    scale: float
    roundings: FloatArray  # the expected squared rounding error of each element

    def squared(self, values: FloatArray) -> float:
        return float(np.dot(values, values)) * self.scale

    @cached_property
    def rounding(self) -> float:
        """The expected squared rounding error."""
        return float(self.roundings.sum()) * self.scale

    def squared_distance(self, other: _Sample) -> float:
        return self.squared(self.values - other.values)

    def distance(self, other: _Sample) -> Distance:
        rounding = self.moving_share(other) * (self.rounding + other.rounding)
        return Distance(other.source.profile, self.squared_distance(other), rounding)

    def moving_share(self, other: _Sample) -> float:
        """Return the share of the rounding error that is of elements in motion: those that are
        frozen have the same error in both samples.

        Rounded elements that move little are seen in motion with a chance only, which follows from
        how far the others are seen to move.
        """
        if not self.rounding:
            return 1.0
        motion = self.values - other.values
        moved = (motion != 0) & (self.roundings > 0)
        seen = float(self.roundings[moved].sum()) * self.scale
        if not seen:
            return 1.0
        spacings = 12 * seen
        relative = self.squared(motion[moved]) / spacings
        chance = float(np.interp(relative, _MOTION, _CHANCE))
        return seen / max(chance * self.rounding, seen)


_STILL = 1e-12
"""Squared distance, relative to the squared norm, below which a tensor is constant: an average of
equal values moves by roundings."""


@np.errstate(over="ignore", invalid="ignore")
def sample_measurements(sources: Sequence[Source]) -> list[Measurements | None]:
    """Estimate the measurements of the sources of one run, in their order, from the stored
    averages.

    `Distance.rounding` is the expected rounding of both averages, of elements in motion. All are
    None if values are too large to be squared; a NonFiniteError for nan or infinity.

    A distance that shows recent motion alone (see `_recent_motion`) replaces all distances of
    another library's average, if at its time it is well above its rounding.

    Norms, to which errors are relative, are those of the tensors that move: a constant table of
    noise levels may be far longer than all weights.
    """
    sampling = _Sampling()
    ranges = _sampled_ranges(sources[0]) if sources else []
    for _, at_time in groupby(by_time(sources), key=lambda source: source.t):
        sampling.add([_read(source, ranges) for source in at_time])
    return sampling.measurements_of(sources)


class _Sampling:
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
            recent.append(_recent_motion(sample, self._newest[_kind(sample.source)]))
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
            kind = _kind(sample.source)
            before = self._newest[kind]
            if before:
                self._steps[kind].append(_step(sample, before[-2:]))
            self._newest[kind] = [*before, sample][-most:]

    def _squares(self, sample: _Sample) -> FloatArray:
        """Return the squared norm of each tensor, and note which have moved."""
        if self._first is None:
            self._first = sample.values
        squares = np.add.reduceat(sample.values**2, sample.starts)
        moves = sample.values - self._first
        moves *= moves  # in place: of a million elements each copy takes 8 MB
        self._moved |= np.add.reduceat(moves, sample.starts) > _STILL * squares
        return squares * sample.scale

    def measurements_of(
        self,
        sources: Sequence[Source],
    ) -> list[Measurements | None]:
        """Return the measurements of the sources; all None if values are too large to be
        squared."""
        for steps in self._steps.values():
            _warn_of_two_trainings(steps)
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
    is_apart: bool  # whether most elements are of tensors that are as far apart as other networks'

    @property
    def time(self) -> float:
        return self.after.t - self.before.t


def _step(sample: _Sample, before: Sequence[_Sample]) -> _Step:
    """Return the step to a sample from the last one of one or two before."""
    last = before[-1]
    squared = sample.squared_distance(last)
    rounding = sample.rounding + last.rounding
    over_two = math.inf
    if len(before) > 1:
        over_two = sample.squared_distance(before[0])
    is_apart = _are_apart(sample, last)
    return _Step(last.source, sample.source, squared, rounding, over_two, is_apart)


def _are_apart(sample: _Sample, other: _Sample) -> bool:
    """Return whether the squared distance of most is nearer to the sum of the squared norms, as
    that of different networks is, than to 0."""
    motion = np.add.reduceat((sample.values - other.values) ** 2, sample.starts)
    norms = np.add.reduceat(sample.values**2 + other.values**2, sample.starts)
    sizes = np.diff(sample.starts, append=sample.values.size)
    apart = sizes[2 * motion > norms]
    return bool(2 * apart.sum() > sizes.sum())


def _warn_of_two_trainings(steps: Sequence[_Step]) -> None:
    """Warn if files move as those of two trainings do, of which one follows the other, or which are
    interleaved, as after a training was resumed from before some of its files; or if each is of
    another one."""
    if len(steps) > 1 and all(step.is_apart for step in steps):
        _warn_of_files(
            steps[0], "each is as far from the next one as those of different trainings are"
        )
        return
    for previous, step in pairwise(steps):
        over_one = min(previous.squared, step.squared)
        if step.over_two < _BACK * over_one:
            names = f"{previous.before.name} and {step.after.name} are closer to each other than to"
            reason = f"{step.before.name} between them, as if it is of another training"
            _warn_of_files(step, f"{names} {reason}, or of one that was resumed from before it")
            return
    neighbours = zip(steps, steps[1:], steps[2:], strict=False)
    for earlier, step, later in neighbours:
        usual = step.rounding
        for other in (earlier, later):
            longer = max(1.0, step.time / other.time)
            usual = max(usual, other.squared * longer**2)
        if step.squared > _JUMP * usual > 0:
            names = f"{step.before.name} and {step.after.name}"
            reason = "are as far apart as files of two trainings, unlike others beside them"
            _warn_of_files(step, f"{names} {reason}")


def _warn_of_files(step: _Step, reason: str) -> None:
    hint = "name the files of one training by a glob"
    log.warning("%s: %s: %s", step.after.path.parent, reason, hint)


def spacing(
    values: FloatArray,
    mantissa_bits: npt.ArrayLike,
    lowest_exponent: npt.ArrayLike,
) -> FloatArray:
    """Return the distance from each value to the next one of its dtype, see `dtypes.Dtype`."""
    _, above = np.frexp(values)
    exponent = np.maximum(above - 1, lowest_exponent)
    spacings = np.ldexp(1.0, exponent - mantissa_bits)
    return np.asarray(spacings)


def expected_roundings(values: FloatArray, stored: str, own: str) -> FloatArray:
    """Return the expected squared rounding error of each value that was rounded to nearest.

    It is spacing^2 / 12, the variance of a uniform error within half the spacing, also
    if it is subnormal. Zeros contribute 0, since they are almost always exact (biases and gains
    that never moved), as do all values if the stored dtype is as wide as the exact average: float64
    for a model's float64, else float32.

    Weights in half precision count as copies of a float32 training's. A training whose own weights
    are in half precision has exact ones, and an error below the predicted one: both have values of
    this dtype, which move by whole spacings or not at all, so that no file distinguishes them.
    """
    dtype = DTYPES[stored]
    if dtype.mantissa_bits >= DTYPES["F64" if own == "F64" else "F32"].mantissa_bits:
        return np.broadcast_to(0.0, values.shape)
    roundings = np.zeros(values.shape)
    rounded = values != 0
    spacings = spacing(values[rounded], dtype.mantissa_bits, dtype.lowest_exponent)
    roundings[rounded] = spacings**2 / 12
    return roundings


def _sampled_ranges(source: Source) -> list[ElementRange]:
    """Choose the elements to read in every source of the run: runs, cut at the ends of tensors."""
    sizes = {name: source.entries[name].size for name in sorted(source.averages)}
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


def finite_values(
    source: StoredTensors,
    name: str,
    begin: int,
    end: int,
) -> FloatArray:
    """Return elements of a tensor, zeros of a mask; raise NonFiniteError if another one holds nan
    or infinity."""
    part = source.values(name, begin, end)
    if np.isfinite(part).all():
        return part
    if source.is_mask(part):
        return np.zeros_like(part)
    source.tensor(name)  # raises if the file is damaged, for example by a flipped bit
    raise NonFiniteError(
        source.path,
        f"tensor {name!r}: holds nan or infinity",
        "an import leaves out a mask or the like by `exclude`",
    )


def _read(source: Source, ranges: Sequence[ElementRange]) -> _Sample:
    values = np.empty(sum(end - begin for _, begin, end in ranges))
    roundings = np.zeros(values.shape)  # takes no memory until it is written to
    starts: dict[str, int] = {}
    at = 0
    with source:
        for name, begin, end in ranges:
            starts.setdefault(name, at)
            part = finite_values(source, name, begin, end)
            elements = slice(at, at + part.size)
            values[elements] = part
            stored = source.entries[name].dtype
            expected = expected_roundings(part, stored, source.tensors[name].dtype)
            if expected.any():
                roundings[elements] = expected
            at += part.size
    total = sum(source.entries[name].size for name in source.averages)
    scale = total / max(values.size, 1)
    return _Sample(source, values, np.array([*starts.values()], np.intp), scale, roundings)


# the largest difference between the tails of two averages up to a time if one continues the other
_LIKE = 1e-3
_NONE = 1e-9  # shares of mass below this count as 0
_CLEAR = 2.0  # a squared distance must be this many times its expected rounding to show motion


def _recent_motion(sample: _Sample, before: Sequence[_Sample]) -> list[Distance]:
    """Return an average's distances from what it would be if the weights since the last one were as
    in an earlier interval: of one and of two intervals before.

    Of successive averages a, b, c of one kind, c consists of b with a share k and of the mean of
    the weights since, m_c = (c - k b) / (1 - k); b and a determine m_b in the same way. With m_b
    in place of m_c, c would be k b + (1 - k) m_b, which is also an average of known profile. Its
    distance from c is (1 - k) |m_c - m_b|, which only the motion in two intervals causes. The
    distance of a long average from b is caused by the motion of all training, from which the motion
    of late intervals was estimated up to five times too large if training slows down.

    Means of a walk are the further apart, the more intervals lie between them, and those of noise
    are not.

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
    """Return the distance of a sample from a mixture of those before it."""
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
    return Distance(mixture, sample.squared(difference), moving * rounding, is_far)


@dataclass(frozen=True, eq=False)
class _Mixture:
    """The profile of a sum of averages with these coefficients, the last of which is the newest.

    Its tails are exact at any time, as theirs are, so that their common part cancels: of an average
    whose decay rises to 1 a late interval has less mass than any early update.
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
    """Return the share of an average in a later one; None if that does not continue it."""
    if not (isinstance(earlier, Discrete) and isinstance(later, Discrete)):
        return None
    share = 1 - float(later.tail(earlier.t))
    if not _NONE < share < 1 - _NONE:
        return None
    times = earlier.times
    since = later.tail(times) - later.tail(earlier.t)
    apart = since / share - earlier.tail(times)
    if np.abs(apart).max() > _LIKE:
        return None
    return share
