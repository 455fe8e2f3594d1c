"""Named schedules of a training: the profiles to track, how often to store them and in which dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from posthoc_cli.dtypes import DTYPES, WORDS
from posthoc_cli.errors import check_count, check_number, percent
from posthoc_cli.planning.curves import EVENLY, ErrorCurve, check_sigma_range, forecast, several
from posthoc_cli.planning.schedule import USEFUL_RANGE, Schedule, listed, relative_rounding
from posthoc_cli.reconstruction import Motion, assumed_prior, one_blas_thread

NAMES = {
    "single": (1, "float16", 10),
    "small": (2, "float16", 8),
    "default": (2, "float16", 20),
    "fine": (2, "float32", 20),
    "exact": (3, "float32", 20),
}
"""The named schedules, by rising size: tracked profiles, dtype, and snapshots kept of each profile."""

_TAKEN = 2
"""Snapshots taken, as a multiple of those kept. The worst error of these schedules of 400,000 steps is then at most 0.8
of that of snapshots that are all kept."""

_UPDATE_EVERY = 10
_UPDATES_IN_WIDTH = 10
"""Upper limit of the steps between updates, and lower limit of the updates within the shortest average's width."""


@dataclass(frozen=True)
class Proposal:
    """A named schedule, the dtype of its snapshots, their largest size on disk in bytes, and expected errors."""

    name: str
    schedule: Schedule
    dtype: str
    nbytes: int
    errors: ErrorCurve

    def __repr__(self) -> str:
        return f"Proposal({self.errors.label}, {self.nbytes:,} bytes, worst error {percent(self.errors.worst)})"

    @property
    def update_every(self) -> int:
        """Steps between updates: 10, or fewer where averages are short, and a divisor of `checkpoint_every`."""
        width = float(self.errors.sigma_rels[0]) * self.schedule.steps
        most = max(1, min(_UPDATE_EVERY, int(width / _UPDATES_IN_WIDTH)))
        return next(every for every in range(most, 0, -1) if self.schedule.checkpoint_every % every == 0)

    def call(self) -> str:
        """Return the line of Python that makes a tracker with this schedule."""
        schedule = self.schedule
        return (
            f'PostHocEMA.from_model(model, "run/ema", sigma_rels={schedule.sigma_rels}, '
            f"update_every={self.update_every}, checkpoint_every={schedule.checkpoint_every}, "
            f'max_checkpoints={schedule.max_checkpoints}, checkpoint_dtype="{self.dtype}")'
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the proposal as data for JSON."""
        return {
            "name": self.name,
            "sigma_rels": list(self.schedule.sigma_rels),
            "dtype": self.dtype,
            "snapshots_each": self.schedule.kept,
            "update_every": self.update_every,
            "checkpoint_every": self.schedule.checkpoint_every,
            "max_checkpoints": self.schedule.max_checkpoints,
            "bytes": self.nbytes,
            "worst_error": self.errors.worst,
            "median_error": self.errors.median,
            "sigma_rel": self.errors.sigma_rels.tolist(),
            "predicted_error": self.errors.predicted_error.tolist(),
            "call": self.call(),
        }


@dataclass(frozen=True)
class PlanReport:
    """The named schedules of a training, by rising size.

    Attributes:
        disk: the most bytes of snapshots at any moment; None if any size will do.
        assumption: about the motion of the network, worded to follow "if".
    """

    proposals: tuple[Proposal, ...]
    disk: int | None = None
    assumption: str = EVENLY

    def __repr__(self) -> str:
        return f"PlanReport({several(self.proposals)})"

    @property
    def within_disk(self) -> Proposal | None:
        """The most exact schedule whose snapshots fit the disk; None if none fits, or without a disk."""
        fitting = [each for each in self.proposals if self.disk is not None and each.nbytes <= self.disk]
        return min(fitting, key=lambda each: each.errors.worst, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data for JSON."""
        chosen = self.within_disk
        return {
            "disk": self.disk,
            "assumption": self.assumption,
            "within_disk": None if chosen is None else chosen.name,
            "schedules": [proposal.to_dict() for proposal in self.proposals],
        }


@one_blas_thread()
def propose(
    steps: int,
    params: int,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    motion: Motion | None = None,
    rounding: Mapping[str, float] | None = None,
) -> list[Proposal]:
    """Return the schedules of `NAMES` for a training.

    Arguments:
        steps: length of training.
        params: averaged elements of the network.
        sigma_range: range of the wanted averages; its ends are tracked, of a single profile its geometric mean.
        motion: of the network over (0, steps], relative to its norm; None for even motion.
        rounding: measured root mean square error of a stored average by dtype, relative to its norm, which replaces
            `relative_rounding`.

    Raises:
        InvalidValueError: names the argument.
    """
    for name, count in (("steps", steps), ("params", params)):
        check_number(name, check_count(name, count), lambda count: count <= 10**15, "be at most 1e15")
    low, high = check_sigma_range(sigma_range)
    middle = float(f"{math.sqrt(low * high):.2g}")
    tracked = {1: (middle,), 2: (low, high), 3: (low, middle, high)}
    proposals = []
    for name, (profiles, dtype, kept) in NAMES.items():
        error = (rounding or {}).get(dtype, relative_rounding(dtype))
        schedule = Schedule(tracked[profiles], steps, _round_interval(steps, _TAKEN * kept), kept, error)
        proposals.append(evaluate(name, schedule, dtype, params, sigma_range, motion))
    return proposals


def evaluate(
    name: str,
    schedule: Schedule,
    dtype: str,
    params: int,
    sigma_range: tuple[float, float] = USEFUL_RANGE,
    motion: Motion | None = None,
) -> Proposal:
    """Return a schedule with its size and its expected errors."""
    motion = motion or Motion.even(schedule.steps)
    snapshots = schedule.snapshots(motion)
    label = f"{name}: {listed(schedule.sigma_rels)} in {dtype}, {schedule.kept} each"
    errors = forecast(snapshots, assumed_prior(snapshots, schedule.rounding, motion), sigma_range, 81, label)
    fullest = len(schedule.sigma_rels) * min(schedule.taken, schedule.kept + 1)  # just before thinning
    return Proposal(name, schedule, dtype, fullest * params * DTYPES[WORDS[dtype]].nbytes, errors)


def _round_interval(steps: int, times: int) -> int:
    """Return a checkpoint_every for at most `times` snapshots, preferably a round number that divides `steps`."""
    least = -(-steps // times)
    most = min(2 * least, steps)
    unit = int(10 ** max(len(str(least)) - 2, 0))
    candidates: set[int] = {least, *range(-(-least // unit) * unit, most + 1, unit)}
    candidates |= {steps // n for n in range(max(1, steps // most), times + 1) if steps % n == 0}

    def cost(every: int) -> tuple[bool, int, float]:
        digits = len(str(every).rstrip("0"))
        return steps % every > 0, round(100 * (steps % every) / steps), math.log(every / least) + 0.1 * digits

    return min((every for every in candidates if least <= every <= most), key=cost)
