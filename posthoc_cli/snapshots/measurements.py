"""What headers tell reconstruction, and estimates of the measurements that headers lack.

Measurements are estimated from a sample: the averages of a snapshot, one after the other by name, form a long vector,
which is cut into runs of 1,024 elements. Some runs are chosen at random, seeded by the run id: the same elements in
every snapshot, each equally likely. Sums over the sample, times all elements / elements in the sample, are unbiased
estimates. Of a model of up to 1,000,000 elements all are read, and the sums are exact.

The sample is not verified: a checksum covers a block of 4 MiB, all of which would have to be read. It is used for
estimates only, and a synthesis verifies what it reads. Memory: the samples of one time and of the two newest earlier
snapshots of each profile, 8 MB a snapshot.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from math import sqrt

import numpy as np
import numpy.typing as npt

from posthoc_cli.dtypes import DTYPES, EPS, ITEM_BYTES
from posthoc_cli.errors import MismatchError, NonFiniteError
from posthoc_cli.planning import thinned_subset
from posthoc_cli.profiles import Clock, FloatArray
from posthoc_cli.reconstruction import (
    ASSUMED,
    MEASURED,
    Distance,
    Measurements,
    Motion,
    Prior,
    Steps,
    StoredAverage,
    measured_prior,
)
from posthoc_cli.snapshots.format import One, SnapshotInfo, of_newest_segment
from posthoc_cli.snapshots.reader import Snapshot, TensorFile

MOST_ELEMENTS = 1_000_000
RUN_ELEMENTS = 1_024


def sample_measurements(snapshots: Sequence[Snapshot]) -> list[Measurements]:
    """Estimate the measurements of the snapshots of one run, in their order.

    Distances are between stored copies, to the other profiles of the same time and to the two newest earlier
    snapshots of each profile. The exact averages are unknown: roundings are expected ones, see `expected_rounding`,
    and `Distance.rounding` is the sum for both copies.

    Raises:
        FileFormatError: a file is damaged, or became shorter.
        NonFiniteError: a value is nan or infinity; names file and tensor.
        OverflowError: values are too large to be squared.
    """
    found: dict[int, Measurements] = {}
    newest: dict[float, list[_Sample]] = {}
    ranges = _sampled_ranges(snapshots[0]) if snapshots else []
    by_time = sorted(range(len(snapshots)), key=lambda i: (snapshots[i].info.t, snapshots[i].info.sigma_rel))
    for _, group in groupby(by_time, key=lambda i: snapshots[i].info.t):
        now = {index: _read(snapshots[index], ranges) for index in group}
        for index, sample in now.items():
            others = [other for other in now.values() if other is not sample]
            earlier = [other for sigma_rel in sorted(newest) for other in newest[sigma_rel]]
            found[index] = _measure(sample, others + earlier)
        for sample in now.values():
            newest[sample.snapshot.info.sigma_rel] = [*newest.get(sample.snapshot.info.sigma_rel, []), sample][-2:]
    return [found[index] for index in range(len(snapshots))]


def expected_rounding(values: FloatArray, stored: str, own: str) -> float:
    """The expected sum of squared rounding errors of values that were rounded to nearest.

    Spacing^2 / 12 each, the variance of an error that is uniform within half the spacing, also among the subnormal
    numbers. 0 for zeros, which are almost always exact (biases and gains that never moved).

    Arguments:
        values: as they are stored.
        stored, own: dtypes (safetensors names) of the file and of the model. The average was kept in float64 for
            a model's float64, else in float32; a stored dtype that holds that is not rounded.
    """
    dtype = DTYPES[stored]
    if dtype.mantissa_bits >= DTYPES["F64" if own == "F64" else "F32"].mantissa_bits:
        return 0.0
    moved = values[values != 0]
    exponent = np.maximum(np.frexp(moved)[1] - 1, dtype.lowest_exponent)
    spacing = np.ldexp(1.0, exponent - dtype.mantissa_bits)
    return float(np.dot(spacing, spacing)) / 12


# --- the sample


@dataclass(frozen=True)
class _Range:
    """Consecutive elements of one tensor."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True)
class _Sample:
    """Values of the chosen elements of a snapshot, shape [elements]; `scale` is all elements / these."""

    snapshot: Snapshot
    values: FloatArray
    scale: float
    rounding: float


def _averaged(snapshot: Snapshot) -> dict[str, int]:
    """Elements of each averaged tensor, by name."""
    entries = snapshot.header.tensors
    names = sorted(name for name, tensor in snapshot.info.tensors.items() if tensor.role == "average")
    return {name: entries[name].nbytes // ITEM_BYTES[entries[name].dtype] for name in names}


def _sampled_ranges(snapshot: Snapshot) -> list[_Range]:
    """The elements to read in every snapshot of the run."""
    elements = _averaged(snapshot)
    total = sum(elements.values())
    if total <= MOST_ELEMENTS:
        return [_Range(name, 0, count) for name, count in elements.items() if count]
    runs, wanted = -(-total // RUN_ELEMENTS), MOST_ELEMENTS // RUN_ELEMENTS
    chosen = np.sort(np.random.default_rng(int(snapshot.info.run_id, 16)).choice(runs, wanted, replace=False))
    names, ends = list(elements), list(accumulate(elements.values()))
    return [one for run in chosen for one in _ranges(names, ends, int(run) * RUN_ELEMENTS)]


def _ranges(names: Sequence[str], ends: Sequence[int], begin: int) -> Iterator[_Range]:
    """The run that begins at an element of the long vector, cut at the `ends` of tensors."""
    end = min(begin + RUN_ELEMENTS, ends[-1])
    index = bisect_right(ends, begin)
    while begin < end:
        start, stop = ends[index - 1] if index else 0, min(end, ends[index])
        if begin < stop:
            yield _Range(names[index], begin - start, stop - start)
        begin, index = stop, index + 1


def _read(snapshot: Snapshot, ranges: Sequence[_Range]) -> _Sample:
    parts, rounding = [np.empty(0)], 0.0
    with TensorFile(snapshot.path, snapshot.header) as file:
        for one in ranges:
            stored = snapshot.header.tensors[one.name].dtype
            item = ITEM_BYTES[stored]
            values = decode_values(file.read_unverified(one.name, one.begin * item, one.end * item), stored)
            if not np.isfinite(values).all():
                file.read(one.name)  # raises if it is damage: a flipped bit
                raise NonFiniteError(snapshot.path, f"tensor {one.name!r}: holds nan or infinity")
            parts.append(values)
            rounding += expected_rounding(values, stored, snapshot.info.tensors[one.name].dtype)
    values = np.concatenate(parts)
    scale = sum(_averaged(snapshot).values()) / max(values.size, 1)
    return _Sample(snapshot, values, scale, rounding * scale)


def _e4m3_values() -> FloatArray:
    """The value of each byte: a sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinity, one nan a sign."""
    codes = np.arange(128)
    exponents, mantissas = codes >> 3, (codes & 7) / 8
    values = np.where(exponents > 0, 1 + mantissas, 2 * mantissas) * 2.0 ** (exponents - 7)
    values[127] = np.nan
    return np.concatenate([values, -values])


_E4M3 = _e4m3_values()


def decode_values(data: npt.NDArray[np.uint8], dtype: str) -> FloatArray:
    """Little-endian bytes as float64."""
    if dtype == "F8_E4M3":
        return _E4M3[data]
    if dtype == "BF16":  # the upper half of a float32
        values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    elif dtype == "F8_E5M2":  # the upper half of a float16
        values = (data.astype(np.uint16) << 8).view(np.float16)
    else:
        values = data.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
    with np.errstate(invalid="ignore"):  # some kinds of nan raise a flag of the processor
        return values.astype(np.float64)


# --- sums


def _measure(sample: _Sample, partners: Sequence[_Sample]) -> Measurements:
    distances = tuple(
        Distance(
            partner.snapshot.info.t,
            partner.snapshot.info.sigma_rel,
            _squares(sample, sample.values - partner.values),
            sample.rounding + partner.rounding,
        )
        for partner in partners
    )
    return Measurements(_squares(sample, sample.values), sample.rounding, distances)


def _squares(sample: _Sample, values: FloatArray) -> float:
    with np.errstate(over="ignore"):
        total = float(np.dot(values, values)) * sample.scale
    if not np.isfinite(total):
        raise OverflowError(f"{sample.snapshot.path}: holds values too large to be squared")
    return total


# --- headers for reconstruction


def stored_average(info: SnapshotInfo) -> StoredAverage:
    """The part of a header that reconstruction uses."""
    schedule = info.schedule
    before = schedule.update_after_step // schedule.update_every
    updates = info.updates or max(info.step // schedule.update_every - before, 1)
    own = {tensor.dtype for tensor in info.tensors.values() if tensor.role == "average"}
    # Averages accumulate in float64 for float64 parameters, else in float32.
    eps = EPS["F64" if own == {"F64"} else "F32"]
    steps, times = zip(*info.clock_pairs, strict=True)
    return StoredAverage(
        info.profile,
        updates,
        eps,
        info.measurements,
        _step_length(info),
        Steps(Clock(steps, times), schedule.update_every),
        info.motion,
        info.inherited,
    )


def motion_so_far(infos: Sequence[SnapshotInfo]) -> Motion | None:
    """The motion up to the newest snapshots, for their headers; None if too few were measured."""
    prior = measured_prior([stored_average(info) for info in infos])
    known = prior.source == MEASURED and prior.motion.edges[0] > 0  # an assumed motion begins at time 0
    return prior.motion.handed_on() if known else None


def _step_length(info: SnapshotInfo) -> float:
    """Time of a step between the last two knots of the clock."""
    (step, t), (last_step, last_t) = [(0, 0.0), *info.clock_pairs][-2:]
    return (last_t - t) / (last_step - step)


def snapshot_prior(snapshots: Sequence[Snapshot], others: Sequence[SnapshotInfo] = ()) -> Prior:
    """The prior from headers of snapshots, and of averages in memory: in the order of `snapshots`, then `others`.

    If a header has no measurements, those of all snapshots are estimated from a sample.
    """
    sampled = any(snapshot.info.measurements is None for snapshot in snapshots)
    measured = with_sampled_measurements(snapshots) if sampled else snapshots
    prior = measured_prior([stored_average(info) for info in (*(s.info for s in measured), *others)])
    return prior.sampled() if sampled else prior


def with_sampled_measurements(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The same snapshots, all with measurements estimated from one sample of elements: distances need both sides.

    Without measurements if values are too large to be squared.

    Raises:
        FileFormatError, NonFiniteError: while reading the sample.
    """
    try:
        sampled = sample_measurements(snapshots)
    except OverflowError:
        return [replace(s, info=replace(s.info, measurements=None, motion=None)) for s in snapshots]
    return [
        replace(snapshot, info=replace(snapshot.info, measurements=measurements, motion=None))
        for snapshot, measurements in zip(snapshots, sampled, strict=True)
    ]


def run_clock(infos: Sequence[SnapshotInfo]) -> Clock:
    """The run's steps over its training time: the knots of all its snapshots' clocks.

    Raises:
        MismatchError: two snapshots contradict each other.
    """
    pairs = sorted({pair for info in infos for pair in info.clock_pairs})
    for (step, t), (next_step, next_t) in pairwise(pairs):
        if step == next_step or t >= next_t:
            raise MismatchError(
                "the snapshots are not of one training",
                f"by their clocks step {step} was at t = {t:,.12g}, and step {next_step} at t = {next_t:,.12g}",
            )
    return Clock([step for step, _ in pairs], [t for _, t in pairs])


# --- choosing snapshots of a large directory


def chosen_up_to(items: Sequence[One], t: float) -> tuple[list[One], list[One]]:
    """Snapshots to combine for time `t`, at or before it; and a choice of the later ones, for the motion.

    Both by time, then sigma_rel; of very many a limited number, see `planning.thinned_subset`.
    """
    ordered = sorted(items, key=lambda item: (item.info.t, item.info.sigma_rel))
    return _chosen([o for o in ordered if o.info.t <= t]), _chosen([o for o in ordered if o.info.t > t])


def _chosen(items: Sequence[One]) -> list[One]:
    return [items[index] for index in thinned_subset([item.info.profile.pure for item in items])]


# --- an earlier run, for a plan


@dataclass(frozen=True)
class Likeness:
    """An earlier run, relative to its norm and stretched to another length.

    Attributes:
        motion: of its network; None if too little is known.
        rounding: root mean square error of its stored averages by dtype, relative to their norm.
    """

    motion: Motion | None
    rounding: dict[str, float]


def likeness(snapshots: Sequence[Snapshot], steps: float) -> Likeness:
    """Describe the snapshots of one run for a plan of a run of `steps`.

    Raises:
        FileFormatError, NonFiniteError: while reading a sample, if headers have no measurements.
    """
    snapshots = of_newest_segment(snapshots)
    snapshots, _ = chosen_up_to(snapshots, max(snapshot.info.t for snapshot in snapshots))
    prior = snapshot_prior(snapshots)
    times = np.array([snapshot.info.t for snapshot in snapshots])
    norm = float(prior.norm[times == times.max()].mean())
    known = prior.source != ASSUMED and norm > 0
    motion = stretched(prior, steps, float(times.max()), norm) if known else None
    found = defaultdict(list)
    for snapshot, rounding, squared in zip(snapshots, prior.rounding, prior.norm, strict=True):
        stored = {snapshot.header.tensors[name].dtype for name in _averaged(snapshot)}
        if prior.source != ASSUMED and len(stored) == 1 and rounding > 0 and squared > 0:
            found[DTYPES[stored.pop()].torch_name].append(float(rounding / squared))
    return Likeness(motion, {name: sqrt(float(np.mean(values))) for name, values in found.items()})


def stretched(prior: Prior, steps: float, t: float, norm: float) -> Motion:
    """The motion up to `t` of a run of `steps` steps on the same path, relative to a squared norm.

    Increments have the variance v dn over dn steps, so that v shrinks as the number of steps grows; densities shrink,
    too, and with them integral w p^2 dn, so that w grows.
    """
    motion = prior.motion
    edges = motion.edges if prior.steps is None else prior.steps.clock.step_at(motion.edges)
    factor = steps / (t if prior.steps is None else float(prior.steps.clock.step_at(t)))
    # The new run moves from its start, even if the earlier one's averages began later.
    edges = np.concatenate(([0.0], edges[1:] * factor))
    return Motion(edges, motion.walk / (factor * norm), motion.noise * factor / norm)
