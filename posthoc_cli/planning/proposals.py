"""What to track, how often to store it, and as what: the least that is good enough, within a disk budget.

Good enough is a worst predicted error of at most `Task.max_error`; where the budget does not allow it, the smallest
one is looked for. Choices are screened with snapshots that lie about as they will; the few finalists are judged by the
snapshots that a tracker would hold at the end (`Schedule.snapshots`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np

from posthoc_cli.dtypes import DTYPES, EPS, WORDS
from posthoc_cli.errors import InvalidValueError
from posthoc_cli.planning.curves import check_sigma_range
from posthoc_cli.planning.schedule import Forecast, Schedule, forecast, listed
from posthoc_cli.planning.thinning import LATER, USEFUL_RANGE
from posthoc_cli.profiles import PowerFunction, check_sigma_rel, gamma_from_sigma_rel
from posthoc_cli.reconstruction import Motion, assumed_prior
from posthoc_cli.reconstruction.prior import ASSUMED_STRETCH, ROUNDING
from posthoc_cli.threads import one_blas_thread

ITEM_BYTES = {DTYPES[name].torch_name: DTYPES[name].nbytes for name in ("F16", "BF16", "F32")}
"""The dtypes that a plan chooses from, and bytes an element."""

MOST_KEPT = 64
"""Snapshots a profile that are proposed at most, unless asked for: more gain little, and make synthesis slow."""

GOOD_ERROR = 5e-4
"""A worst predicted error that is good enough, unless somebody says otherwise: rounding a result once to float16 costs
2e-4, to bfloat16 1.5e-3."""


def relative_rounding(dtype: str) -> float:
    """Root mean square error of values rounded to the nearest of a dtype, relative to them; float16 1.9e-4."""
    return ROUNDING * EPS[WORDS[check_dtype(dtype)]]


def check_dtype(dtype: str) -> str:
    """A dtype that can be planned with, or an InvalidValueError that lists them."""
    if dtype not in ITEM_BYTES:
        raise InvalidValueError("dtype", f"must be one of {', '.join(ITEM_BYTES)}", value=f"{dtype!r}")
    return dtype


@dataclass(frozen=True)
class Task:
    """What is asked of a plan.

    Attributes:
        steps: length of training.
        parameters: averaged elements of the network.
        max_bytes: for all snapshots at their fullest.
        sigma_range: the averages that are wanted.
        motion: how the network will move over (0, steps], relative to its norm; None for evenly.
        max_error: a worst predicted error that is good enough; of schedules below it the cheapest is the best.
        rounding: measured root mean square error of a stored average by dtype, relative to its norm, where it is
            not `relative_rounding`.
        sigma_rels, dtype, checkpoint_every, max_checkpoints: fixed choices; None leaves them to the search.

    Raises:
        InvalidValueError: naming the attribute.
    """

    steps: int
    parameters: int
    max_bytes: int
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
        for sigma_rel in self.sigma_rels or ():
            check_sigma_rel(sigma_rel)
        for name in ("steps", "checkpoint_every", "max_checkpoints"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 10**15:
                raise InvalidValueError(f"{name} {value}", "must be a whole number from 1 to 1e15")
        if not 0 <= self.max_error < 1:
            raise InvalidValueError(
                "max_error", "must be a relative error in [0, 1), such as 0.0005", value=f"{self.max_error!r}"
            )
        if self.parameters < 1:
            raise InvalidValueError("params", "must be at least 1, such as 1.2e9 or 350M", value=self.parameters)
        if self.dtype is not None:
            check_dtype(self.dtype)
        if self.checkpoint_every is not None and self.checkpoint_every > self.steps:
            raise InvalidValueError(
                "checkpoint_every",
                f"must be at most steps ({self.steps:,}), or no snapshot is ever taken",
                value=f"{self.checkpoint_every:,}",
            )
        self._check_budget()

    @property
    def path(self) -> Motion:
        """How the network is taken to move over training, relative to its norm."""
        return Motion.even(self.steps, ASSUMED_STRETCH**2) if self.motion is None else self.motion

    def rounding_of(self, dtype: str) -> float:
        """Root mean square error of an average stored in a dtype, relative to its norm."""
        return self.rounding.get(dtype, relative_rounding(dtype))

    def snapshot_bytes(self, dtype: str) -> int:
        """Size of one snapshot; its header and buffers are small and not counted."""
        return self.parameters * ITEM_BYTES[dtype]

    def places(self, dtype: str, profiles: int) -> int:
        """Snapshots of each profile that the budget has room for at one moment."""
        return self.max_bytes // (self.snapshot_bytes(dtype) * profiles)

    def taken_most(self) -> int:
        """Times at which snapshots are taken at most."""
        return self.steps // (self.checkpoint_every or 1)

    def fits(self, dtype: str, profiles: int) -> bool:
        """Whether the budget has room for the fixed choices, or for any."""
        kept, taken = self.max_checkpoints or 1, self.taken_most()
        # While one is written there is one more than is kept, unless none is ever dropped.
        return self.places(dtype, profiles) >= (taken if taken <= kept else kept + 1)

    def dtypes(self) -> Sequence[str]:
        """Those that the search may choose from."""
        return tuple(ITEM_BYTES) if self.dtype is None else (self.dtype,)

    def _check_budget(self) -> None:
        profiles = 1 if self.sigma_rels is None else len(self.sigma_rels)
        if any(self.fits(dtype, profiles) for dtype in self.dtypes()):
            return
        least = min(self.snapshot_bytes(dtype) for dtype in self.dtypes()) * profiles
        kept, taken = self.max_checkpoints or 1, self.taken_most()
        moment = taken if taken <= kept else kept + 1
        raise InvalidValueError(
            "max_size",
            f"has no room for {kept:,} snapshot{'s' * (kept > 1)} of {profiles} "
            f"profile{'s' * (profiles > 1)} and the one being written; it takes {least * moment:,} bytes",
            value=f"{self.max_bytes:,} bytes",
        )


# --- What to track, how often to store it, and as what: the least that is good enough, within a disk budg ---


_PROFILES = (1, 2, 3)
_GRID = 6
_LONGEST = 0.28
"""Tracked profiles come from a grid of so many sigma_rels, up to this one."""

_REFINEMENTS = (1.25, 1.1)
"""Factors by which each tracked sigma_rel is then moved, either way, as long as that helps."""

_SCREENED = 24
"""Snapshots a profile that are enough for screening; each stands for several where there are more."""

_COUNTS = (10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)
"""Times at which snapshots are taken, tried one after another until the error is good enough. A tenth of a training is
what one that is killed may lose."""

_UPDATE_EVERY = 10
_UPDATES_IN_WIDTH = 10
"""Steps between updates at most, and updates at least within the width of the shortest average that is wanted."""

_TAKEN = (1, 2, 4)
_TAKEN_BY_THE_BEST = (3, 6, 8)
"""Times at which snapshots are taken, in multiples of those kept: tried for every finalist, and for the best."""


@dataclass(frozen=True)
class Proposal:
    """A schedule with what it costs and gives.

    Attributes:
        schedule: what to track and when to store it.
        dtype: how snapshots are stored.
        nbytes: all snapshots at their fullest: kept ones and those just written before the thinning.
        errors: expected over the wanted range.
    """

    schedule: Schedule
    dtype: str
    nbytes: int
    errors: Forecast

    @property
    def update_every(self) -> int:
        """Steps between updates: 10, or fewer where averages are short, and a divisor of `checkpoint_every`."""
        width = float(self.errors.sigma_rels[0]) * self.schedule.steps
        most = max(1, min(_UPDATE_EVERY, int(width / _UPDATES_IN_WIDTH)))
        return next(every for every in range(most, 0, -1) if self.schedule.checkpoint_every % every == 0)

    @property
    def cost(self) -> tuple[float, float]:
        """What it takes of the training: bytes written to disk, and averages updated in a step."""
        schedule = self.schedule
        written = self.nbytes / _fullest(schedule) * schedule.taken * len(schedule.sigma_rels)
        return written, len(schedule.sigma_rels) / self.update_every

    @property
    def last_step(self) -> int:
        """Step of the last snapshot, and so of the averages."""
        return self.schedule.taken * self.schedule.checkpoint_every

    @property
    def label(self) -> str:
        """For a legend."""
        return f"{listed(self.schedule.sigma_rels)} in {self.dtype}, {self.schedule.kept} each"

    def call(self, sigma_range: tuple[float, float]) -> str:
        """The Python call that makes a tracker of this kind."""
        rels = ", ".join(f"{s!r}" for s in self.schedule.sigma_rels) + "," * (len(self.schedule.sigma_rels) == 1)
        return (
            "ema = PostHocEMA.from_model(\n"
            '    model, "run/ema",\n'
            f"    sigma_rels=({rels}), update_every={self.update_every},\n"
            f"    checkpoint_every={self.schedule.checkpoint_every}, max_checkpoints={self.schedule.max_checkpoints},\n"
            f'    checkpoint_dtype="{self.dtype}", sigma_range={sigma_range},\n'
            ")"
        )

    def to_dict(self) -> dict[str, Any]:
        """The proposal as data for JSON."""
        return {
            "sigma_rels": list(self.schedule.sigma_rels),
            "dtype": self.dtype,
            "snapshots": self.schedule.kept,
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


def planning_report(task: Task, proposals: Sequence[Proposal]) -> dict[str, Any]:
    """A task, the proposals for it, and the call that makes the first of them, as data for JSON."""
    return {
        "steps": task.steps,
        "parameters": task.parameters,
        "max_bytes": task.max_bytes,
        "sigma_range": list(task.sigma_range),
        "max_error": task.max_error,
        "motion": "assumed" if task.motion is None else "like",
        "proposals": [proposal.to_dict() for proposal in proposals],
        "call": proposals[0].call(task.sigma_range),
    }


@one_blas_thread()
def propose(task: Task) -> list[Proposal]:
    """The cheapest choice that is good enough first, or where none is the best; then others that are really different.

    Those are the best of each dtype, of one, two and three profiles, and of half the budget where none is good enough.
    """
    choices = sorted(_screened(task), key=lambda choice: choice.order(task))
    finalists = []
    for index, choice in enumerate(choices):
        earlier = choices[:index]
        if any(c.dtype == choice.dtype for c in earlier) and any(c.profiles == choice.profiles for c in earlier):
            continue
        finalists.append(choice)
    judged = [_cheapest_or_best(task, choice) for choice in finalists]
    if not any(proposal.errors.worst <= task.max_error for proposal in judged):
        leader = finalists[judged.index(_best(judged))]
        judged.append(_best([_best(judged), *_judged(task, leader, _TAKEN_BY_THE_BEST)]))
        frugal = replace(task, max_bytes=task.max_bytes // 2) if _halves(task, leader) else None
        if frugal is not None:
            judged.append(_best(_judged(frugal, leader, _TAKEN)))

    def order(proposal: Proposal) -> tuple[float, ...]:
        good = proposal.errors.worst <= task.max_error
        return (not good, *(proposal.cost if good else ()), *_rank(proposal))

    return _different(sorted(judged, key=order))


def judge(task: Task, schedule: Schedule, dtype: str) -> Proposal:
    """A schedule with what it costs and gives."""
    snapshots = schedule.snapshots(task.path, task.sigma_range)
    errors = forecast(snapshots, assumed_prior(snapshots, schedule.rounding, task.path), task.sigma_range, 81)
    return Proposal(schedule, dtype, _fullest(schedule) * task.snapshot_bytes(dtype), errors)


def _fullest(schedule: Schedule) -> int:
    """Snapshots on disk at once: before thinning there is one more of each profile than is kept."""
    return len(schedule.sigma_rels) * min(schedule.taken, schedule.kept + 1)


def _rank(proposal: Proposal) -> tuple[float, float]:
    return proposal.errors.worst, proposal.errors.median


def _best(proposals: Sequence[Proposal]) -> Proposal:
    return min(proposals, key=_rank)


def _different(ranked: Sequence[Proposal]) -> list[Proposal]:
    """Without those that are like a better one in all but their cadence, unless they need less disk."""
    chosen: list[Proposal] = []
    for proposal in ranked:
        alike = [
            c for c in chosen if (c.dtype, c.schedule.sigma_rels) == (proposal.dtype, proposal.schedule.sigma_rels)
        ]
        if all(proposal.nbytes < 0.75 * other.nbytes for other in alike):
            chosen.append(proposal)
    return chosen


# --- screening -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Choice:
    sigma_rels: tuple[float, ...]
    dtype: str
    count: int
    """Snapshots of each profile that it was screened with."""
    screened: float
    """About the worst error of those."""

    @property
    def profiles(self) -> int:
        return len(self.sigma_rels)

    def order(self, task: Task) -> tuple[float, ...]:
        """Those that seem good enough first, by about what they write."""
        good = self.screened <= task.max_error
        return not good, self.count * self.profiles * task.snapshot_bytes(self.dtype) * good, self.screened


def _screened(task: Task) -> Iterator[_Choice]:
    """The most promising profiles for each dtype and number of profiles that fit."""
    for dtype in task.dtypes():
        for tracked in _starts(task):
            if not task.fits(dtype, len(tracked[0])):
                continue
            kept = _kept(task, dtype, len(tracked[0]))
            for count in sorted({min(_COUNTS[0], kept), kept}):
                errors = {sigma_rels: _screen(task, sigma_rels, dtype, count) for sigma_rels in tracked}
                best = min(errors, key=errors.__getitem__)
                if errors[best] <= task.max_error:
                    break  # with more only rounding would choose
            choice = _Choice(best, dtype, count, errors[best])
            yield choice if task.sigma_rels else _refined(task, choice)


def _starts(task: Task) -> list[list[tuple[float, ...]]]:
    """Tracked profiles to begin with, one list for each number of them."""
    if task.sigma_rels is not None:
        return [[task.sigma_rels]]
    low, high = task.sigma_range
    grid = [_rounded(float(s)) for s in np.geomspace(low, min(high, _LONGEST), _GRID)]
    grid = sorted(set(grid))
    return [list(combinations(grid, profiles)) for profiles in _PROFILES if len(grid) >= profiles]


def _refined(task: Task, choice: _Choice) -> _Choice:
    """The choice after moving one tracked profile at a time, as long as that helps."""
    sigma_rels, dtype, error = choice.sigma_rels, choice.dtype, choice.screened
    for factor in _REFINEMENTS:
        for place in range(len(sigma_rels)):
            for moved in (sigma_rels[place] * factor, sigma_rels[place] / factor):
                other = (*sigma_rels[:place], _rounded(min(moved, _LONGEST)), *sigma_rels[place + 1 :])
                if len(set(other)) < len(other) or list(other) != sorted(other):
                    continue
                found = _screen(task, other, dtype, choice.count)
                if found < error:
                    sigma_rels, error = other, found
    return replace(choice, sigma_rels=sigma_rels, screened=error)


def _rounded(sigma_rel: float) -> float:
    """Two digits are plenty."""
    return float(f"{sigma_rel:.2g}")


def _screen(task: Task, sigma_rels: tuple[float, ...], dtype: str, kept: int) -> float:
    """About the worst error of these profiles with so many snapshots of each."""
    count = min(kept, _SCREENED)
    x = np.arange(1, count + 1) / count
    # Where there is room for more, as many are taken as are kept.
    dense = task.taken_most() > kept == _kept(task, dtype, len(sigma_rels))
    times = task.steps * (1 - (1 - x) ** LATER if dense else x)
    snapshots = [PowerFunction(_gamma(s), float(t)) for t in times for s in sigma_rels]
    prior = assumed_prior(snapshots, task.rounding_of(dtype) * (count / kept) ** 0.5, task.path)
    return forecast(snapshots, prior, task.sigma_range, points=15).worst


@lru_cache(maxsize=1024)
def _gamma(sigma_rel: float) -> float:
    return gamma_from_sigma_rel(sigma_rel)


# --- finalists -------------------------------------------------------------------------------------


def _kept(task: Task, dtype: str, profiles: int) -> int:
    """Snapshots of each profile that are kept."""
    taken, places = task.taken_most(), task.places(dtype, profiles)
    kept = task.max_checkpoints or MOST_KEPT
    return min(taken, kept) if taken <= min(places, kept) else max(1, min(kept, places - 1))


def _cheapest_or_best(task: Task, choice: _Choice) -> Proposal:
    """The choice with the fewest snapshots that are good enough, or, where none are, with those of the least error."""
    proposals: list[Proposal] = []
    if choice.screened > task.max_error:
        proposals = _judged(task, choice, _TAKEN)
        if _best(proposals).errors.worst > task.max_error:
            return _best(proposals)
    for count in _COUNTS:
        if count > 4 * _kept(task, choice.dtype, choice.profiles):
            break
        proposal = judge(task, _schedule(task, choice, count), choice.dtype)
        if proposal.errors.worst <= task.max_error:
            return proposal
    return _best(proposals or _judged(task, choice, _TAKEN))


def _judged(task: Task, choice: _Choice, multiples: Sequence[int]) -> list[Proposal]:
    """The choice with snapshots at so many times of those it keeps; one for all cadences that come out the same."""
    kept = _kept(task, choice.dtype, choice.profiles)
    places = min(task.places(choice.dtype, choice.profiles), task.max_checkpoints or MOST_KEPT)
    proposals = {}
    for multiple in multiples:
        schedule = _schedule(task, choice, places if multiple == 1 else kept * multiple)
        if schedule.checkpoint_every not in proposals:
            proposals[schedule.checkpoint_every] = judge(task, schedule, choice.dtype)
    return list(proposals.values())


def _schedule(task: Task, choice: _Choice, count: int) -> Schedule:
    """The choice with snapshots at about so many times, of which as many are kept as there is room for."""
    places = min(task.places(choice.dtype, choice.profiles), task.max_checkpoints or MOST_KEPT)
    every = task.checkpoint_every or _round_interval(task.steps, count)
    taken = task.steps // every
    keep = task.max_checkpoints or (taken if taken <= places else _kept(task, choice.dtype, choice.profiles))
    return Schedule(choice.sigma_rels, task.steps, every, keep, task.rounding_of(choice.dtype))


def _halves(task: Task, leader: _Choice) -> bool:
    """Whether half the budget is room for the leading choice."""
    half = task.max_bytes // 2
    needed = (task.max_checkpoints or 1) + 1
    fits = half // (task.snapshot_bytes(leader.dtype) * leader.profiles) >= needed
    return fits and task.max_checkpoints is None and task.checkpoint_every is None


def _round_interval(steps: int, times: int) -> int:
    """A checkpoint_every for at most `times` snapshots: one that ends with training, in round numbers, if there is."""
    least = -(-steps // times)
    most = min(2 * least, steps)
    unit = int(10 ** max(len(str(least)) - 2, 0))
    candidates: set[int] = {least, *range(-(-least // unit) * unit, most + 1, unit)}
    candidates |= {steps // n for n in range(max(1, steps // most), times + 1) if steps % n == 0}

    def cost(every: int) -> tuple[bool, int, float]:
        digits = len(str(every).rstrip("0"))
        return steps % every > 0, round(100 * (steps % every) / steps), math.log(every / least) + 0.1 * digits

    return min((every for every in candidates if least <= every <= most), key=cost)
