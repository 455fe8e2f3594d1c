"""Proposals of the profiles to track, how often to store them and in which dtype, within a disk budget.

The best proposal is the cheapest one with a worst predicted error of at most `Task.max_error`, or else the most
accurate one. Options are screened with approximate snapshot times; the finalists are assessed by the snapshots that a
tracker would hold at the end (`Schedule.snapshots`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np

from posthoc_cli.errors import InvalidValueError, check_count, check_number, percent
from posthoc_cli.planning.curves import EVENLY, ErrorCurve, check_max_error, check_sigma_range, forecast, several
from posthoc_cli.planning.schedule import (
    PLANNED_BYTES,
    USEFUL_RANGE,
    Schedule,
    check_interval,
    check_tracked,
    listed,
    powers,
    relative_rounding,
)
from posthoc_cli.profiles import PowerFunction
from posthoc_cli.reconstruction import MinimumVariance, Motion, assumed_prior, one_blas_thread

MOST_KEPT = 64
"""Default limit of the snapshots per profile: more gain little, and slow synthesis down."""

GOOD_ERROR = 5e-4
"""Default of `Task.max_error`. For comparison, rounding a result once to float16 costs 2e-4, to bfloat16 1.5e-3."""

LATER = 1.5
"""Thinning leaves snapshots at about the fractions 1 - (1 - x)**LATER of training, with x evenly spaced."""


@dataclass(frozen=True)
class Task:
    """The requirements of a plan.

    Attributes:
        steps: length of training.
        params: averaged elements of the network.
        max_size: budget in bytes for all snapshots at any moment.
        sigma_range: range of the wanted averages.
        motion: of the network over (0, steps], relative to its norm; None for even motion.
        max_error: the worst predicted error that is good enough.
        rounding: measured root mean square error of a stored average by dtype, relative to its norm, which replaces
            `relative_rounding`.
        sigma_rels, dtype, checkpoint_every, max_checkpoints: fixed values; None leaves them to the search.

    Raises:
        InvalidValueError: names the attribute.
    """

    steps: int
    params: int
    max_size: int
    sigma_range: tuple[float, float] = USEFUL_RANGE
    motion: Motion | None = None
    max_error: float = GOOD_ERROR
    rounding: Mapping[str, float] = field(default_factory=dict)
    sigma_rels: tuple[float, ...] | None = None
    dtype: str | None = None
    checkpoint_every: int | None = None
    max_checkpoints: int | None = None

    def __post_init__(self) -> None:
        check_sigma_range(self.sigma_range)
        check_max_error(self.max_error)
        check_count("max_size", self.max_size)
        for name in ("steps", "params", "checkpoint_every", "max_checkpoints"):
            if (value := getattr(self, name)) is not None:
                check_number(name, check_count(name, value), lambda count: count <= 10**15, "be at most 1e15")
        if self.sigma_rels is not None:
            check_tracked(self.sigma_rels)
        if self.dtype is not None:
            relative_rounding(self.dtype)
        if self.checkpoint_every is not None:
            check_interval(self.checkpoint_every, self.steps)
        profiles = 1 if self.sigma_rels is None else len(self.sigma_rels)
        if not any(self.fits(dtype, profiles) for dtype in self.dtypes):
            least, kept = min(map(self.snapshot_bytes, self.dtypes)) * profiles, self.max_checkpoints or 1
            wanted = f"{kept:,} snapshot{'s' * (kept > 1)} of {profiles} profile{'s' * (profiles > 1)}"
            needed = f"it takes {least * self._least_places:,} bytes"
            reason = f"has no room for {wanted} and the one being written; {needed}"
            raise InvalidValueError("max_size", reason, value=f"{self.max_size:,} bytes")

    @property
    def expected_motion(self) -> Motion:
        """The motion of the network over training, relative to its norm."""
        return self.motion or Motion.even(self.steps)

    def rounding_of(self, dtype: str) -> float:
        """Return the root mean square error of an average stored in a dtype, relative to its norm."""
        return self.rounding.get(dtype, relative_rounding(dtype))

    def snapshot_bytes(self, dtype: str) -> int:
        """Return the size of one snapshot, without header and buffers, which are small."""
        return self.params * PLANNED_BYTES[dtype]

    def places(self, dtype: str, profiles: int) -> int:
        """Return the number of snapshots of each profile that fit the budget."""
        return self.max_size // (self.snapshot_bytes(dtype) * profiles)

    def kept(self, dtype: str, profiles: int, taken: int | None = None) -> int:
        """Return the number of snapshots of each profile that are kept of those `taken`, by default of all."""
        taken, places, kept = taken or self.taken_most, self.places(dtype, profiles), self.max_checkpoints or MOST_KEPT
        return taken if taken <= min(places, kept) else max(1, min(kept, places - 1))

    @property
    def taken_most(self) -> int:
        """The largest number of times at which snapshots are taken."""
        return self.steps // (self.checkpoint_every or 1)

    def fits(self, dtype: str, profiles: int) -> bool:
        """Return whether so many profiles in this dtype fit the budget with the fixed values, or with any."""
        return self.places(dtype, profiles) >= self._least_places

    @property
    def _least_places(self) -> int:
        """The least number of snapshots of each profile on disk: one more than kept while a new one is written."""
        kept = self.max_checkpoints or 1
        return self.taken_most if self.taken_most <= kept else kept + 1

    @property
    def dtypes(self) -> Sequence[str]:
        """The dtypes of the search."""
        return tuple(PLANNED_BYTES) if self.dtype is None else (self.dtype,)


_PROFILES = (1, 2, 3)
_GRID = 6
_LONGEST = 0.28
"""Number of sigma_rels in the grid from which tracked profiles are chosen, and its upper limit."""

_REFINEMENTS = (1.25, 1.1)
"""Factors by which each tracked sigma_rel is varied after the grid search."""

_SCREENED = 24
"""Limit of the snapshots per profile in screening; of more snapshots, each represents several."""

_COUNTS = (10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Numbers of times at which snapshots are taken, tried until the error is good enough. With at least 10 times, a
training that is killed loses at most a tenth of its progress."""

_UPDATE_EVERY = 10
_UPDATES_IN_WIDTH = 10
"""Upper limit of the steps between updates, and lower limit of the updates within the shortest average's width."""

_TAKEN = (1, 2, 4)
_TAKEN_BY_THE_BEST = (3, 6, 8)
"""Numbers of snapshots taken, as multiples of those kept: for every finalist, and in addition for the best one."""


@dataclass(frozen=True)
class Proposal:
    """A schedule, the dtype of its snapshots, their largest size on disk in bytes, and expected errors."""

    schedule: Schedule
    dtype: str
    nbytes: int
    errors: ErrorCurve

    def __repr__(self) -> str:
        every, worst = self.schedule.checkpoint_every, percent(self.errors.worst)
        return f"Proposal({self.errors.label}, every {every:,}, {self.nbytes:,} bytes, worst error {worst})"

    @property
    def update_every(self) -> int:
        """Steps between updates: 10, or fewer where averages are short, and a divisor of `checkpoint_every`."""
        width = float(self.errors.sigma_rels[0]) * self.schedule.steps
        most = max(1, min(_UPDATE_EVERY, int(width / _UPDATES_IN_WIDTH)))
        return next(every for every in range(most, 0, -1) if self.schedule.checkpoint_every % every == 0)

    @property
    def cost(self) -> tuple[float, float]:
        """The cost for training: bytes written, and averages updated per step."""
        profiles = len(self.schedule.sigma_rels)
        written = self.nbytes / _fullest(self.schedule) * self.schedule.taken * profiles
        return written, profiles / self.update_every

    @property
    def rank(self) -> tuple[float, float]:
        """Worst and median error: the smaller, the more accurate the proposal."""
        return self.errors.worst, self.errors.median

    @property
    def last_step(self) -> int:
        """The step of the last snapshot."""
        return self.schedule.taken * self.schedule.checkpoint_every

    def call(self) -> str:
        """Return the Python call that makes a tracker with this schedule."""
        rels = ", ".join(f"{s!r}" for s in self.schedule.sigma_rels) + "," * (len(self.schedule.sigma_rels) == 1)
        return f"""ema = PostHocEMA.from_model(
    model, "run/ema",
    sigma_rels=({rels}), update_every={self.update_every},
    checkpoint_every={self.schedule.checkpoint_every}, max_checkpoints={self.schedule.max_checkpoints},
    checkpoint_dtype="{self.dtype}",
)"""

    def to_dict(self) -> dict[str, Any]:
        """Return the proposal as data for JSON."""
        return {
            "sigma_rels": list(self.schedule.sigma_rels),
            "dtype": self.dtype,
            "snapshots_each": self.schedule.kept,
            "update_every": self.update_every,
            "checkpoint_every": self.schedule.checkpoint_every,
            "max_checkpoints": self.schedule.max_checkpoints,
            "last_step": self.last_step,
            "bytes": self.nbytes,
            "worst_error": self.errors.worst,
            "median_error": self.errors.median,
            "sigma_rel": self.errors.sigma_rels.tolist(),
            "predicted_error": self.errors.predicted_error.tolist(),
        }


@dataclass(frozen=True)
class PlanReport:
    """A task and the proposals for it, the best one first.

    Attributes:
        assumption: about the motion of the network, worded to follow "if".
        like: directory of the earlier run whose motion is used.
    """

    task: Task
    proposals: tuple[Proposal, ...]
    assumption: str = EVENLY
    like: str | None = None

    def __repr__(self) -> str:
        return f"PlanReport({several(self.proposals)})"

    def to_dict(self) -> dict[str, Any]:
        """Return the report as data for JSON, with the call that makes a tracker with the first proposal."""
        task = self.task
        return {
            "steps": task.steps,
            "parameters": task.params,
            "max_bytes": task.max_size,
            "sigma_range": list(task.sigma_range),
            "max_error": task.max_error,
            "motion": "assumed" if task.motion is None else "like",
            "proposals": [proposal.to_dict() for proposal in self.proposals],
            "call": self.proposals[0].call(),
            "like": self.like,
        }


@one_blas_thread()
def propose(task: Task) -> list[Proposal]:
    """Return the cheapest proposal that is good enough, or else the most accurate one, and then alternatives.

    The alternatives are the best for each dtype, for one, two and three profiles, and, if no proposal is good enough,
    for half the budget.
    """
    options = sorted(_screened(task), key=lambda option: option.order(task))
    finalists = [
        option
        for index, option in enumerate(options)
        if option.dtype not in {earlier.dtype for earlier in options[:index]}
        or option.profiles not in {earlier.profiles for earlier in options[:index]}
    ]
    proposals = [_cheapest_or_best(task, option) for option in finalists]
    if not any(proposal.errors.worst <= task.max_error for proposal in proposals):
        leader = finalists[proposals.index(_best(proposals))]
        proposals.append(_best([_best(proposals), *_evaluated(task, leader, _TAKEN_BY_THE_BEST)]))
        half, free = task.max_size // 2, task.max_checkpoints is None and task.checkpoint_every is None
        if free and half // (task.snapshot_bytes(leader.dtype) * leader.profiles) >= 2:
            proposals.append(_best(_evaluated(replace(task, max_size=half), leader, _TAKEN)))

    def order(proposal: Proposal) -> tuple[float, ...]:
        good = proposal.errors.worst <= task.max_error
        return (not good, *(proposal.cost if good else ()), *proposal.rank)

    return _different(sorted(proposals, key=order))


def evaluate(task: Task, schedule: Schedule, dtype: str) -> Proposal:
    """Return a schedule with its size and its expected errors."""
    motion = task.expected_motion
    snapshots = schedule.snapshots(motion)
    label = f"{listed(schedule.sigma_rels)} in {dtype}, {schedule.kept} each"
    errors = forecast(snapshots, assumed_prior(snapshots, schedule.rounding, motion), task.sigma_range, 81, label)
    return Proposal(schedule, dtype, _fullest(schedule) * task.snapshot_bytes(dtype), errors)


def _fullest(schedule: Schedule) -> int:
    """Return the largest number of snapshots on disk, just before thinning."""
    return len(schedule.sigma_rels) * min(schedule.taken, schedule.kept + 1)


def _best(proposals: Sequence[Proposal]) -> Proposal:
    return min(proposals, key=lambda proposal: proposal.rank)


def _different(ranked: Sequence[Proposal]) -> list[Proposal]:
    """Return the proposals without those that differ from a better one only in schedule and need similar disk space."""
    different: list[Proposal] = []
    for proposal in ranked:
        tracked = (proposal.dtype, proposal.schedule.sigma_rels)
        better = [other for other in different if (other.dtype, other.schedule.sigma_rels) == tracked]
        if all(proposal.nbytes < 0.75 * other.nbytes for other in better):
            different.append(proposal)
    return different


# --- Screening --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Option:
    """Profiles to track and their dtype, with `count` snapshots each, and their approximate worst error."""

    sigma_rels: tuple[float, ...]
    dtype: str
    count: int
    screened: float

    @property
    def profiles(self) -> int:
        return len(self.sigma_rels)

    def order(self, task: Task) -> tuple[float, ...]:
        """Return a sort key: options that seem good enough first, by approximate size, then the rest by error."""
        good = self.screened <= task.max_error
        return not good, self.count * self.profiles * task.snapshot_bytes(self.dtype) * good, self.screened


def _screened(task: Task) -> Iterator[_Option]:
    """Yield the most promising profiles for each dtype and number of profiles that fit."""
    for dtype in task.dtypes:
        for tracked in _starts(task):
            if not task.fits(dtype, len(tracked[0])):
                continue
            kept = task.kept(dtype, len(tracked[0]))
            for count in sorted({min(_COUNTS[0], kept), kept}):
                errors = {sigma_rels: _screen(task, sigma_rels, dtype, count) for sigma_rels in tracked}
                best = min(errors, key=errors.__getitem__)
                if errors[best] <= task.max_error:
                    break  # with more snapshots the errors would differ by rounding only
            option = _Option(best, dtype, count, errors[best])
            yield option if task.sigma_rels else _refined(task, option)


def _starts(task: Task) -> list[list[tuple[float, ...]]]:
    """Return the profiles of the grid search: for each number of profiles, the list of combinations."""
    if task.sigma_rels is not None:
        return [[task.sigma_rels]]
    low, high = task.sigma_range
    grid = sorted({_two_digits(float(s)) for s in np.geomspace(low, min(high, _LONGEST), _GRID)})
    return [list(combinations(grid, profiles)) for profiles in _PROFILES if len(grid) >= profiles]


def _refined(task: Task, option: _Option) -> _Option:
    """Return the option with each sigma_rel varied by `_REFINEMENTS` as long as the error falls."""
    sigma_rels, dtype, error = option.sigma_rels, option.dtype, option.screened
    for factor in _REFINEMENTS:
        for place in range(len(sigma_rels)):
            for varied in (sigma_rels[place] * factor, sigma_rels[place] / factor):
                other = (*sigma_rels[:place], _two_digits(min(varied, _LONGEST)), *sigma_rels[place + 1 :])
                if len(set(other)) < len(other) or list(other) != sorted(other):
                    continue
                other_error = _screen(task, other, dtype, option.count)
                if other_error < error:
                    sigma_rels, error = other, other_error
    return replace(option, sigma_rels=sigma_rels, screened=error)


def _two_digits(sigma_rel: float) -> float:
    return float(f"{sigma_rel:.2g}")


def _screen(task: Task, sigma_rels: tuple[float, ...], dtype: str, kept: int) -> float:
    """Return the approximate worst error with `kept` snapshots of each profile."""
    count = min(kept, _SCREENED)
    x = np.arange(1, count + 1) / count
    # Thinning happens only if the limit of the budget is reached.
    dense = task.taken_most > kept == task.kept(dtype, len(sigma_rels))
    times = task.steps * (1 - (1 - x) ** LATER if dense else x)
    snapshots = [PowerFunction.from_sigma_rel(s, float(t)) for t in times for s in sigma_rels]
    prior = assumed_prior(snapshots, task.rounding_of(dtype) * (count / kept) ** 0.5, task.expected_motion)
    t = snapshots[-1].t
    targets = powers(np.geomspace(*task.sigma_range, 15), t)
    return math.sqrt(MinimumVariance(snapshots, prior, t).losses(targets).squares.max())


# --- Finalists --------------------------------------------------------------------------------------


def _cheapest_or_best(task: Task, option: _Option) -> Proposal:
    """Return the proposal with the fewest snapshots that is good enough, or else with the least error."""
    proposals: list[Proposal] = []
    if option.screened > task.max_error:
        proposals = _evaluated(task, option, _TAKEN)
        if _best(proposals).errors.worst > task.max_error:
            return _best(proposals)
    most = 4 * task.kept(option.dtype, option.profiles)
    for count in (count for count in _COUNTS if count <= most):
        proposal = evaluate(task, _schedule(task, option, count), option.dtype)
        if proposal.errors.worst <= task.max_error:
            return proposal
    return _best(proposals or _evaluated(task, option, _TAKEN))


def _evaluated(task: Task, option: _Option, multiples: Sequence[int]) -> list[Proposal]:
    """Return proposals that take snapshots at multiples of the number that they keep, one for each interval."""
    kept = task.kept(option.dtype, option.profiles)
    places = min(task.places(option.dtype, option.profiles), task.max_checkpoints or MOST_KEPT)
    different: dict[int, Schedule] = {}
    for multiple in multiples:
        schedule = _schedule(task, option, places if multiple == 1 else kept * multiple)
        different.setdefault(schedule.checkpoint_every, schedule)
    return [evaluate(task, schedule, option.dtype) for schedule in different.values()]


def _schedule(task: Task, option: _Option, count: int) -> Schedule:
    """Return a schedule with snapshots at about `count` times, of which it keeps as many as fit."""
    every = task.checkpoint_every or _round_interval(task.steps, count)
    keep = task.max_checkpoints or task.kept(option.dtype, option.profiles, task.steps // every)
    return Schedule(option.sigma_rels, task.steps, every, keep, task.rounding_of(option.dtype))


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
