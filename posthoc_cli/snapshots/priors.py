"""What the headers of snapshots tell reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

from posthoc_cli.errors import MismatchError
from posthoc_cli.profiles import Clock
from posthoc_cli.reconstruction import Motion, Prior, Steps, StoredAverage, measured_prior
from posthoc_cli.reconstruction.prior import MEASURED
from posthoc_cli.snapshots.format import SnapshotInfo
from posthoc_cli.snapshots.reader import Snapshot
from posthoc_cli.snapshots.sampling import sample_measurements

_EPS = {"F64": 2.0**-52, "F32": 2.0**-23}


def stored_average(info: SnapshotInfo) -> StoredAverage:
    """A snapshot as reconstruction sees it."""
    schedule = info.schedule
    before = schedule.update_after_step // schedule.update_every
    updates = info.updates or max(info.step // schedule.update_every - before, 1)
    own = {tensor.dtype for tensor in info.tensors.values() if tensor.role == "average"}
    # Averages accumulate in float64 for float64 parameters, else in float32.
    eps = _EPS["F64" if own == {"F64"} else "F32"]
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
    """How the network has moved as far as snapshots tell, for the headers of the newest; None where they do not."""
    prior = measured_prior([stored_average(info) for info in infos])
    known = prior.source == MEASURED and prior.motion.edges[0] > 0  # an assumed one begins at time 0
    return prior.motion.handed_on() if known else None


def _step_length(info: SnapshotInfo) -> float:
    """Time of a step at the snapshot: on the last piece of its clock."""
    (step, t), (last_step, last_t) = [(0, 0.0), *info.clock_pairs][-2:]
    return (last_t - t) / (last_step - step)


def snapshot_prior(snapshots: Sequence[Snapshot], others: Sequence[SnapshotInfo] = ()) -> Prior:
    """What snapshots, and averages in memory, say about their run: in the order of `snapshots`, then `others`.

    Where a header has no measurements, those of all snapshots are estimated from a sample.
    """
    sampled = any(snapshot.info.measurements is None for snapshot in snapshots)
    measured = with_sampled_measurements(snapshots) if sampled else snapshots
    prior = measured_prior([stored_average(info) for info in (*(s.info for s in measured), *others)])
    return prior.sampled() if sampled else prior


def with_sampled_measurements(snapshots: Sequence[Snapshot]) -> list[Snapshot]:
    """The same snapshots, each with measurements estimated from one sample of elements.

    All of them, also those whose headers have measurements: distances are between sampled ones.

    Values too large to be squared (float64 holds such) leave them without.

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
    """The run's steps over its training time, as far as its snapshots tell: all their clocks' knots together.

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
